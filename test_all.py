"""Every claim of the other files, each test named after one: `pytest test_all.py`, no network, no GPU."""
import argparse
import colorsys
import copy
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")      # threads that wait by spinning make a shared machine crawl

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

import data
import fid
import model
import objective
import sample
import train
from data import (VAVAE, Codec, ImageFolder, PatchPCA, Shapes, UserError, crop, open_dataset, order, pack,
                  read_image, read_tensors, run, seed_of)
from objective import (KDiff, Linear, k_of_direction, k_of_innovation, logit_normal, optimal_loss,
                       train_linear)
from sample import choose_classes, compile_network, generate, guided, integrate, load, nearest, read_log
from train import State

HERE = Path(__file__).parent
TINY_JIT = dict(image_size=32, patch_size=8, dim=64, depth=6, heads=4, num_classes=10, bottleneck=16,
                context_tokens=4, context_start=2)
TINY_DIT = dict(image_size=8, patch_size=1, in_channels=4, dim=64, depth=4, heads=4, num_classes=10)
JIT, DIT = (model.JiT, TINY_JIT), (model.DiT, TINY_DIT)

def normal(key, *shape):
    """Normal numbers that depend on the key alone (numpy's legacy generator is frozen)."""
    return torch.tensor(np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)).float()

def noise(*shape):
    """uint8 pixels, always the same for one shape."""
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)

def fill(net):
    """Weights as a function of their key; the tables of positions stay, and nothing asks for gradients."""
    for key, value in net.state_dict().items():
        r = normal(key, *value.shape)
        if value.ndim < 2:
            value.copy_(0.1 * r + key.endswith("weight"))
        elif "pos_embed" not in key and "feat_rope" not in key:
            value.copy_(r / math.sqrt(value[0].numel()))
    return net.eval().requires_grad_(False)

def inputs(config):
    """x, t, y of a batch for a network of this config; label 10 is the null class."""
    x = normal("x", 3, config.get("in_channels", 3), config["image_size"], config["image_size"])
    return x, torch.tensor([0.05, 0.5, 0.93]), torch.tensor([0, 3, 10])

def error(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.double().norm()).item()

# ---- model.py ----------------------------------------------------------------------------------------------

def plain_network(state, x, t, y, heads, p, start=None):
    """Both transformers in float64 and in plain formulas: explicit rotation matrices, softmax, loops."""
    state, x = {key: value.double() for key, value in state.items()}, x.double()
    def linear(name, v): return v @ state[name + ".weight"].flatten(1).T + state.get(name + ".bias", 0)
    def rms(name, v): return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name + ".weight"]
    def modulated(name, v, m, s): return rms(name, v) * (1 + s[:, None]) + m[:, None]
    def angles(place, n): return place[:, None] * 10000 ** (-torch.arange(n).double() / n)
    f, label = angles(t.double(), 128), state["y_embedder.embedding_table.weight"][y]
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([f.cos(), f.sin()], 1))))
    condition, v = F.silu(time + label), F.unfold(x, p, stride=p).transpose(1, 2)
    for name in ("x_embedder.proj", "x_embedder.proj1", "x_embedder.proj2"):
        v = linear(name, v) if name + ".weight" in state else v
    (N, T, D), h = v.shape, v.shape[2] // heads
    row, column = torch.cartesian_prod(*2 * [torch.arange(math.isqrt(T)).double()]).T
    v = v + torch.cat([f(angles(at, D // 4)) for at in (column, row) for f in (torch.sin, torch.cos)], 1)
    turn = torch.cat([angles(row, h // 4), angles(column, h // 4)], 1).diag_embed()
    turn = torch.kron(turn, torch.tensor([[0, -1], [1, 0]])).matrix_exp()      # a rotation for each token
    for i, b in enumerate(f"blocks.{i}." for i in range(9) if f"blocks.{i}.mlp.w3.bias" in state):
        if i == start and "in_context_posemb" in state:
            v = torch.cat([label[:, None] + state["in_context_posemb"], v], 1)
            turn = torch.cat([torch.eye(h).double().expand(v.shape[1] - T, h, h), turn])
        m = linear(b + "adaLN_modulation.1", condition).chunk(6, 1)
        u = linear(b + "attn.qkv", modulated(b + "norm1", v, m[0], m[1]))
        q, k, u = u.view(N, -1, 3, heads, h).unbind(2)
        if b + "attn.q_norm.weight" in state:
            q, k = rms(b + "attn.q_norm", q), rms(b + "attn.k_norm", k)
        q, k = (torch.einsum("tij,nthj->nthi", turn, a) for a in (q, k))
        weights = torch.einsum("nthi,nshi->nhts", q, k).div(math.sqrt(h)).softmax(-1)
        u = torch.einsum("nhts,nshi->nthi", weights, u).flatten(2)
        v = v + m[2][:, None] * linear(b + "attn.proj", u)
        gate, u = linear(b + "mlp.w12", modulated(b + "norm2", v, m[3], m[4])).chunk(2, -1)
        v = v + m[5][:, None] * linear(b + "mlp.w3", F.silu(gate) * u)
    m = linear("final_layer.adaLN_modulation.1", condition).chunk(2, 1)
    v = linear("final_layer.linear", modulated("final_layer.norm_final", v[:, -T:], *m))
    v = v.view(N, T, p * p, -1).transpose(2, 3).flatten(2).mT     # (p, p, C) to (C, p, p)
    return F.fold(v, x.shape[2:], p, stride=p)

@pytest.mark.parametrize("network, config, change, recorded", [
    (*JIT, {}, (103.878723639, 1.1088155, 0.1001933)), (*DIT, {}, (27.796994863, 0.6621699, 0.6637198)),
    (*JIT, dict(context_tokens=0), None), (*JIT, dict(patch_size=4, context_start=5), None),
    (*JIT, dict(in_channels=1, context_start=0), None), (*DIT, dict(patch_size=2, qk_norm=True), None)])
def test_networks_agree_with_plain_formulas_and_the_official_code(network, config, change, recorded):
    """With recorded norm and values; class tokens from any block or none; patches, channels, q/k norm."""
    config = config | change
    net, args = fill(network(**config)), inputs(config)
    out, start = net(*args), config.get("context_start")
    assert error(out, plain_network(net.state_dict(), *args, 4, config["patch_size"], start)) < 2e-6
    told = out.double().norm().item(), *out.flatten()[::out.numel() // 2].tolist()
    assert not recorded or told == pytest.approx(recorded, rel=2e-6, abs=2e-5)

def test_vavae_gives_the_recorded_outputs():
    """Recorded from a network that agreed with the published one; logvar is clamped, the mean is not."""
    net = fill(model.Autoencoder(widths=(32, 32, 64, 64, 128)))
    out = (*net.encode(normal("image", 1, 3, 32, 32).clamp(-1, 1)), net.decode(normal("latent", 1, 32, 2, 2)))
    for ours, theirs in zip(out, (
            [-0.6117827, 0.0519157, -0.3235235, -0.3613891, -0.5173731, 0.2138819, -0.0047993],
            [-0.2333690, 0.5852250, -0.2726730, -0.1882787, 0.2563668, 0.3818888, -0.2070874],
            [-0.0909988, -0.0762513, 0.4537423, 0.1829014, 0.3043323, 0.1066596])):
        assert error(ours.flatten()[::ours.numel() // 6], torch.tensor(theirs)) < 5e-6
    for value, bound in ((100.0, 20.0), (-100.0, -30.0)):
        net.quant_conv.bias.fill_(value)
        mean, logvar = net.encode(normal("image", 1, 3, 48, 64))
        assert (logvar == bound).all() and (mean.abs() > 50).all() and mean.shape == (1, 32, 3, 4)

@pytest.mark.parametrize("name, shape, params, gflops, keys", [
    ("JiT-B/16", (3, 256, 256), 131, 25, 1938688673), ("JiT-B/32", (3, 512, 512), 133, 26, None),
    ("JiT-L/16", (3, 256, 256), 459, 88, None), ("JiT-H/16", (3, 256, 256), 953, 182, None),
    ("LightningDiT-XL/1", (32, 16, 16), 675, 119, 625017063)])
def test_published_sizes_have_the_published_params_gflops_and_keys(name, shape, params, gflops, keys):
    """The papers' tables, in millions and billions; a checksum of the keys and shapes in the files."""
    with torch.device("meta"):
        net, vavae = model.build(name, shape[1], num_classes=1000), model.Autoencoder()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == params
    assert round(model.gmacs(net, shape)) == gflops
    for each, checksum in ((net, keys), (vavae, 1982465131)):
        shapes = sorted((key, *value.shape) for key, value in each.state_dict().items())
        assert checksum in (None, zlib.crc32(repr(shapes).encode()))

def test_dropout_acts_in_the_middle_half_and_in_training_only():
    """Each block twice on one input; in the MLP dropout sits before w3, in attention after proj."""
    net, plain = (fill(model.JiT(**TINY_JIT | dict(depth=10, dropout=dropout))) for dropout in (0.5, 0.0))
    assert torch.equal(net(*inputs(TINY_JIT)), plain(*inputs(TINY_JIT)))
    x, condition, rope = normal("tokens", 2, 16, 64), normal("condition", 2, 64), net.train().rope[:, -16:]
    random = [not torch.equal(block(x, condition, rope), block(x, condition, rope)) for block in net.blocks]
    assert random == [2 <= i < 6 for i in range(10)]
    assert 0.4 < (net.blocks[2].attn(x, rope) == 0).float().mean() < 0.6
    assert (net.blocks[2].mlp(x) == 0).float().mean() < 0.1

@pytest.mark.parametrize("network, config", [JIT, DIT])
def test_networks_start_at_zero_with_the_stated_spread(network, config):
    """adaLN-zero: the output is 0 and blocks are the identity; Xavier elsewhere, 0.02 in the embeddings."""
    torch.manual_seed(0)
    net, x, c = network(**config), normal("tokens", 1, 4, 64), normal("c", 1, 64)
    assert not net(*inputs(config)).any() and torch.equal(net.blocks[0](x, c, net.rope[:, :4]), x)
    for name, p in net.named_parameters():
        assert not name.endswith("bias") or not p.any()
        if re.search("t_embedder.*weight|embedding_table|in_context", name):
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
    for w in (part.weight.flatten(1) for part in (net.blocks[0].attn.qkv, *net.x_embedder)):
        assert w.abs().max().item() == pytest.approx(math.sqrt(6 / sum(w.shape)), rel=0.05)

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("network, config", [JIT, DIT])
def test_bf16_autocast_keeps_norms_time_and_stream_in_float32(network, config):
    """Close to float32; norms lose no digit, the time embedding is that of float64, the stream float32."""
    net, outs, args = fill(network(**config)), [], inputs(config)
    for part in (net.t_embedder, *net.blocks):
        part.register_forward_hook(lambda *called: outs.append(called[-1]))
    exact, norm, (x, shift, scale) = net(*args), net.blocks[0].norm1, normal("x", 3, 5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(*args)
        normed, modulated = norm(x), norm(x, shift, scale)
    assert 1e-4 < error(rough, exact) < 2e-2
    assert torch.equal(outs[0], outs[len(outs) // 2]) and {out.dtype for out in outs} == {torch.float32}
    f = args[1].double()[:, None] * 1e4 ** -(torch.arange(128).double() / 128)
    assert error(outs[0], net.t_embedder.mlp.double()(torch.cat([f.cos(), f.sin()], 1))) < 6e-8
    x = F.rms_norm(x.double(), x.shape[-1:], norm.weight.double(), 1e-6)
    assert error(normed, x) < 1e-6 and error(modulated, x * (1 + scale.double()) + shift) < 1e-6

@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_and_checkpointed_networks_agree_with_eager():
    """Output and gradients, which lie in memory as their parameters do; the keys of the state dict stay."""
    config = TINY_JIT | dict(depth=1, context_start=0)
    nets = eager, compiled, checkpointed = [fill(model.JiT(**config)).requires_grad_() for _ in range(3)]
    compiled.compile(dynamic=False)
    checkpointed.checkpointing = True
    for net in nets:
        (out := net(*inputs(config))).square().mean().backward()
        assert error(out, eager(*inputs(config))) < 2e-6
        for (key, a), (same, b) in zip(net.named_parameters(), eager.named_parameters()):
            assert key == same and error(a.grad, b.grad) < 2e-5 and a.grad.stride() == a.stride()
    assert all(part._compiled_call_impl for part in (*compiled.blocks, compiled.final_layer))

def test_names_carry_the_patch_and_keywords_win():
    """Any number behind the slash is a patch, keywords override the table; what is wrong is named."""
    with torch.device("meta"):
        assert model.build("JiT-S/4", image_size=64, num_classes=10).pos_embed.shape == (1, 256, 384)
        net = model.build("LightningDiT-B/4", 16, 10, in_channels=4, patch_size=2, qk_norm=True, depth=1)
    assert net.x_embedder.proj.weight.shape == (768, 4, 2, 2) and hasattr(net.blocks[0].attn.q_norm, 'weight')
    for name, size, message in (
            ("JiT-B/16", 250, "^image_size 250 is not a multiple of patch_size 16: try 256$"),
            ("JiT-demo/8", 32, "^context_start 4 lies behind the last block: try 3$"),
            ("JiT-X/16", 256, "JiT-X/16.*JiT-B/16.*LightningDiT-XL/1"), ("JiT-B/0", 256, "model JiT-B/0")):
        pytest.raises(ValueError, model.build, name, size, 10, context_start=4).match(message)

# ---- objective.py ------------------------------------------------------------------------------------------

K, TIMES = normal("w", 129).double().sigmoid(), torch.tensor([0.1, 0.2, 0.4, 0.9]).double().view(4, 1, 1, 1)
K_OF_T, K_OF_C = torch.tensor(np.interp(TIMES, np.arange(129) / 128, K)), K[:10].view(10, 1, 1)
EDM, ASYM = torch.atan2(TIMES, 1 - TIMES), torch.tensor(8 * [-1] + [0, 0]).view(10, 1, 1)

@pytest.mark.parametrize("target, c, d, ks", [
    ("x", 1, 0, dict(k=1)), ("v", 1, -1, dict(k=0.5)), ("eps", 0, -1, dict(k=0)), (0.0, 0, -1, dict(k=0)),
    ("0.3", 0.3, -0.7, dict(k=0.3)), ("k", K[0], K[0] - 1, dict(k=K[0])), ("asym", 1, ASYM, dict(k=0.6)),
    ("two", K[0], -K[1], dict(k1=K[0], k2=K[1], k=K[0] / (K[0] + K[1]))),
    ("time", K_OF_T, K_OF_T - 1, dict(k=K.mean())),
    ("channel", K_OF_C, K_OF_C - 1, dict(k=K_OF_C.mean(), k_min=K_OF_C.min(), k_max=K_OF_C.max())),
    ("edm", EDM.cos(), -EDM.sin(), dict(k=0.5))])      # E[u z] = c t + d (1-t) = 0 where c^2 + d^2 = 1
def test_loss_and_velocity_are_those_of_the_tables_u_solved_for_x_and_e(target, c, d, ks):
    """By a linear solver, at times where nothing is clamped; k starts at a half; what is learned is named."""
    x, e, u = torch.randn(3, 4, 10, 2, 2).double()
    kdiff = KDiff(lambda z, t, y: u, target, num_classes=10, channels=10)
    if kdiff.w is not None:
        assert not kdiff.w.any()
        kdiff.w.data = normal("w", *kdiff.w.shape)
    assert kdiff.ks().keys() == ks.keys() and all(abs(k - ks[name]) < 1e-6 for name, k in kdiff.ks().items())
    kdiff, s, t, z = kdiff.double(), TIMES, TIMES.flatten(), TIMES * x + (1 - TIMES) * e
    matrix = torch.stack([entry * torch.ones_like(z) for entry in (s, 1 - s, c, d)], -1)
    x_hat, e_hat = torch.linalg.solve(matrix.unflatten(-1, (2, 2)), torch.stack([z, u], -1)).unbind(-1)
    torch.testing.assert_close(kdiff.velocity(u, z, t), x_hat - e_hat, atol=1e-10, rtol=1e-5)
    for kdiff.loss_space, errors in (("u", u - c * x - d * e), ("x", x_hat - x), ("eps", e_hat - e),
                                     ("v", (x_hat - e_hat) - (x - e))):
        torch.testing.assert_close(kdiff.loss(x, None, t, e), errors.square().mean(), atol=1e-10, rtol=1e-5)

def test_one_clamp_bounds_loss_and_velocity():
    """At t = 1 x-prediction divides by tau in both; its own x-loss stays the plain MSE."""
    (x, e, u), one = torch.randn(3, 1, 2, 3, 3).double(), torch.ones(1).double()
    for target, loss, t, errors in (
            ("x", "v", one, (u - x) / 0.05), ("x", "x", one, u - x), ("eps", "eps", 0 * one, u + e)):
        kdiff = KDiff(lambda z, t, y: u, target, num_classes=10, loss=loss)
        torch.testing.assert_close(kdiff.loss(x, None, t, e), errors.square().mean())
    torch.testing.assert_close(KDiff(None, "x", num_classes=10).velocity(u, x, one), (u - x) / 0.05)

def test_draws_follow_table_4():
    """logit(t) is normal, noise has its scale, a tenth of labels drop; drawn at once or from seeds."""
    torch.manual_seed(0)
    kdiff = KDiff(None, num_classes=10, noise_scale=2.0)
    x, y = torch.zeros(4000, 1, 4, 4), torch.arange(4000) % 10
    for t, e, labels in (kdiff.draw(x, y), kdiff.draw(x, y, range(4000))):
        logit, dropped = torch.logit(t), labels == 10
        assert abs(logit.mean() + 0.8) < 0.05 and abs(logit.std() - 0.8) < 0.05 and abs(e.std() - 2) < 0.02
        assert abs(dropped.float().mean() - 0.1) < 0.02 and (labels[~dropped] == y[~dropped]).all()
        correlation = torch.corrcoef(torch.stack([logit, e[:, 0, 0, 0], e[:, 0, 0, 1], dropped.float()]))
        assert abs(correlation.tril(-1)).max() < 0.06
    assert KDiff(None, num_classes=10).noise_scale == 1

@pytest.mark.parametrize("how, named", [(dict(loss="w"), "loss 'w'"), (dict(target="asym"), "channels"), *(
    (dict(target=target), f"target {target!r}") for target in ("2", -0.1, 1.01))])
def test_unknown_target_or_loss_is_named(how, named):
    """A target is a row of the table or a number in [0, 1]; a loss one of four."""
    pytest.raises(ValueError, KDiff, None, num_classes=10, **how).match(named)

def test_eq_12_equals_monte_carlo():
    """The loss of the linear layer with the best weights for random data, noise and times."""
    torch.manual_seed(0)
    n, x, e = 400_000, F.pad(torch.randn(400_000, 3), (0, 5)), torch.randn(400_000, 8)
    for c, d, loss, p, t, tau in (
            (lambda t: t, lambda t: t - 1, "x", None, torch.rand(n), 0.0),
            (0.7, -0.3, "v", logit_normal(-0.8, 0.8), torch.sigmoid(0.8 * torch.randn(n) - 0.8), 0.4)):
        t = t.double()[:, None]
        c_t, d_t = (f(t) if callable(f) else f for f in (c, d))
        delta = (c_t * (1 - t) - d_t * t).clamp(min=tau)
        scale = (1 - t if loss == "x" else 1) / delta
        z, u = scale * (t * x + (1 - t) * e), scale * (c_t * x + d_t * e)
        W = (z * u).sum(0) / (z * z).sum(0)
        expected = optimal_loss(c, d, 3, 8, loss, p, tau)
        assert (W * z - u).square().sum(1).mean().item() == pytest.approx(expected, rel=0.02)

def test_objective_py_prints_theory_beside_measurement(monkeypatch, capsys):
    """In few steps: k and loss learned for each d of D = 64; of other losses the best k; of a spectrum."""
    monkeypatch.setattr(optimal_loss, "__defaults__", (*optimal_loss.__defaults__[:-1], 2000))
    monkeypatch.setattr(objective, "train_linear", lambda *of, **how: train_linear(*of, steps=400, batch=128))
    objective.main()
    said = capsys.readouterr().out
    def numbers(line): return [float(n) for found in re.findall(line, said, re.M) for n in found.split()]
    D, d, learned, of_theorem, loss, of_eq_12 = np.reshape(numbers(r"^ +(64 .*)"), (-1, 6)).T
    k = 64 / (64 + d)                                                         # Eq. (12), its integrals done
    expected = d * (k ** 2 + (1 - k) ** 2 - 1.5 * (k - 0.5) ** 2) + (64 - d) * (1 - k) ** 2 / 4
    assert [*d] == [64, 32, 16, 8, 1] and [*of_theorem, *of_eq_12] == pytest.approx([*k, *expected], abs=1e-3)
    assert [*learned, *loss] == pytest.approx([*k, *expected], abs=0.03, rel=0.06)
    assert numbers(r"^ +[uv]-loss, .* (\S+)$") == pytest.approx([2 / 3, 1.0, 0.543, 0.995], abs=2e-3)
    spectrum = [1 / (1 + s) for s in (4, 4, 1, 0.3, 0.1, 0.01, 0, 0)]
    common = [8 / (8 + 9.41 / sigma ** 2) for sigma in (0.7, 1, 2)]
    assert numbers(r"(?:^ +| of .*)theory +(.*)") == pytest.approx(spectrum + common, abs=6e-4)

def test_modes_of_w_relax_at_their_two_rates():
    """Eq. (9): W_par and W_perp follow exponentials of rates <a^2+b^2> = 2/3 and <b^2> = 1/3 to Eq. (11)."""
    for target, axes, end, rate in (("x", slice(4), 0.75, 0.05 * 2 / 3), ("v", slice(4, 16), -1.5, 0.05 / 3)):
        for n in (20, 60, 300):
            kdiff, _ = train_linear([1] * 4 + [0] * 12, target, steps=n, batch=2048, rate=0.05)
            mode = kdiff.net.weight.diag()[axes].mean().item()
            assert mode == pytest.approx(end * (1 - math.exp(-n * rate)), abs=0.02)

# ---- data.py -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 96])
def test_shapes_have_the_areas_places_and_hues_of_their_factors(size):
    """Anti-aliased: areas by closed forms to 2%, whole pixels would miss by more; centres, angle, colour."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, 1001)] * 2)
    moon = 4 * ((np.hypot(x, y) < 0.95) & (np.hypot(x - 0.55, y) > 0.85)).mean()
    star = 5.5 * math.sin(math.pi / 5) * 1.1 * math.sin(0.4) / math.sin(0.4 + math.pi / 5)
    areas = (math.pi * 0.9 ** 2, 1.6 ** 2, 1.56 * 0.78 / 0.866, math.pi * (0.97 ** 2 - 0.53 ** 2),
             2 * 2 * 0.56 - 0.56 ** 2, star, math.pi * 1.1 * 0.5, moon)
    shapes, grid = Shapes(80, size), np.arange(size) + 0.5
    assert [np.array_equal(Shapes(9, 9, n).factors, shapes.factors[:9]) for n in (0, 1)] == [True, False]
    for i, (place_x, place_y, radius, angle, hue) in enumerate(shapes.factors):
        image = shapes[i][0].double().numpy() / 255
        colour = image.max((1, 2))
        assert colour == pytest.approx([0.15 + 0.85 * c for c in colorsys.hsv_to_rgb(hue, 1, 1)], abs=0.02)
        assert image.min() == pytest.approx(0.06, abs=0.003) and shapes[i][1] == i % 8
        covered = ((image - 0.06) / (colour[:, None, None] - 0.06)).max(0).clip(0)
        assert covered.sum() == pytest.approx(areas[i % 8] * ((0.27 + 0.07 * radius) * size) ** 2, rel=0.02)
        x, y = (covered.sum(0) @ grid, covered.sum(1) @ grid) / covered.sum()
        centre = [(0.5 + 0.22 * (place - 0.5)) * size for place in (place_x, place_y)]
        assert i % 8 == 7 or (x, y) == pytest.approx(centre, abs=0.1)        # the moon is not symmetric
        dx, dy = grid - x, (grid - y)[:, None]
        slant = math.atan2(2 * (covered * dx * dy).sum(), (covered * (dx ** 2 - dy ** 2)).sum()) / 2
        assert i % 8 != 6 or slant == pytest.approx(0.5 * (angle - 0.5), abs=0.02)     # the ellipse shows it

@pytest.fixture
def photos(tmp_path):
    """A folder of images of many kinds: modes, sizes, formats, EXIF, names."""
    root, image, exif = tmp_path / "Fotos für Büro", Image.fromarray(noise(50, 70, 3)), Image.Exif()
    exif[0x0112] = 6                                                         # to be turned a quarter
    sixteen = Image.fromarray(noise(50, 70, 3)[..., 0].astype(np.uint16) * 257)
    for name, picture in (
            ("chats été/a b.jpg", image), ("chats été/cmyk.JPEG", image.convert("CMYK")),
            ("chats été/p.png", image.convert("P")), ("dogs/grey.bmp", image.convert("L").resize((40, 90))),
            ("dogs/deep er/ß.webp", image.convert("RGBA")), ("dogs/sixteen.png", sixteen),
            ("dogs/turned.png", image), ("beside.png", image), (".hidden/no.png", image)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name, exif=exif if "turned" in name else b"")
    (root / "readme.txt").write_text("no image")
    return root

def test_folders_of_odd_images_are_read(photos, tmp_path):
    """Every mode becomes RGB, EXIF turns, 16 bits become 8, subfolders are classes, names keep letters."""
    data = ImageFolder(photos, 32)
    assert data.classes == ["Fotos für Büro", "chats été", "dogs"]
    assert [label for _, label in data] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image, _ in data)
    turned, deep = (np.asarray(read_image(photos / "dogs" / name)) for name in ("turned.png", "sixteen.png"))
    assert np.array_equal(turned, np.rot90(noise(50, 70, 3), -1))
    assert np.array_equal(deep[..., 0], noise(50, 70, 3)[..., 0])
    assert ImageFolder(photos / "chats été", 32).classes == ["chats été"]
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(tmp_path / "fifth.png")  # a fifth of red on white
    Image.new("P", (4, 4), 0).save(tmp_path / "none.png", transparency=0)
    for name, colour in (("fifth.png", (255, 204, 204)), ("none.png", (255, 255, 255))):
        assert read_image(tmp_path / name).getpixel((1, 1)) == colour

def test_crop_is_adms():
    """For an image that halves exactly: the mean of 2x2 blocks, then Pillow's bicubic, then the centre."""
    pixels = noise(160, 208, 3)
    half = Image.fromarray(np.floor(pixels.reshape(80, 2, 104, 2, 3).mean((1, 3)) + 0.5).astype(np.uint8))
    expected = np.asarray(half.resize((83, 64), Image.BICUBIC), int)[:, 9:73]
    for axes in ((0, 1, 2), (1, 0, 2)):
        ours = np.asarray(crop(Image.fromarray(pixels.transpose(axes)), 64), int)
        assert ours.shape == (64, 64, 3) and abs(ours - expected.transpose(axes)).max() <= 2
    assert np.array_equal(crop(half, 80), half.crop((12, 0, 92, 80)))        # halving stops at its size
    assert crop(Image.fromarray(pixels[:20, :30]), 64).size == (64, 64)      # enlarged

def test_order_is_one_permutation_after_the_other():
    """Batches of 8 from 11 images: positions in a chain of permutations, from any start."""
    chain = sum(order(11, 8, 3, 0, 22), [])
    assert all(sorted(chain[n:n + 11]) == [(n // 11, i) for i in range(11)] for n in range(0, 176, 11))
    assert sum(order(11, 8, 3, 5, 9), []) == chain[40:72]
    assert [(1, i) for _, i in chain[:11]] != chain[11:22] and [*order(11, 8, 4, 0, 1)] != [chain[:8]]

def test_flips_follow_seed_epoch_and_index(photos):
    """A key (epoch, i) is mirrored or not, half of the time, and always the same."""
    data, flips = ImageFolder(photos, 32), []
    for data.seed, data.flips in ((0, True), (0, True), (1, True), (0, False)):
        flips.append([torch.equal(data[(epoch, 3)][0], data[3][0].flip(-1)) for epoch in range(64)])
    assert 16 < sum(flips[0]) < 48 and flips[0] == flips[1] != flips[2] and not any(flips[3])

def test_packed_array_gives_the_folders_images(photos, tmp_path, capsys):
    """Same pixels, labels, names, mirror images; loading processes are sent a place, not the bytes."""
    names = tmp_path / "p.npy.json"
    pack(photos, 24, path := tmp_path / "p.npy")
    assert "8 images of 24 px" in capsys.readouterr().out
    assert [*data.in_batches(range(5), 2)] == [range(2), range(2, 4), range(4, 5)]
    assert "images 5/5 | " in capsys.readouterr().err
    packed, folder = pickle.loads(sent := pickle.dumps(open_dataset(path, 24))), ImageFolder(photos, 24)
    assert packed.classes == folder.classes and len(packed) == 8 and len(sent) < 8 * 24 * 24
    for i in range(16):
        a, b = (data.item(i % 8, i > 7) for data in (packed, folder))
        assert torch.equal(a[0], b[0]) and a[1] == b[1]
    pytest.raises(UserError, open_dataset, path, 32).match("24")
    names.unlink()
    assert open_dataset(path, 24).classes == ["0", "1", "2"]
    for said, value in (("labels 0 to 2", '["a", "b"]'), ("no list", '"abc"'), ("no list", "[1, 2]")):
        names.write_text(f'{{"classes": {value}}}')
        pytest.raises(UserError, open_dataset, path, 24).match(said)

def save_safetensors(folder, parts, name="latents_rank00_shard000.safetensors"):
    """One shard, byte by byte as the format's specification has it, and statistics; returns the bytes."""
    kinds, ends = {"<f2": "F16", "<f4": "F32", "<i8": "I64"}, np.cumsum([a.nbytes for a in parts.values()])
    entries = {key: dict(dtype=kinds[a.dtype.str], shape=a.shape, data_offsets=[int(n) - a.nbytes, int(n)])
               for (key, a), n in zip(parts.items(), ends)}
    header = json.dumps(entries | {"__metadata__": {"by": "hand"}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"".join(a.tobytes() for a in parts.values())
    (folder / name).write_bytes(content)
    statistic = torch.ones(1, parts["latents"].shape[1], 1, 1)
    torch.save({"mean": 0 * statistic, "std": statistic}, folder / "latents_stats.pt")
    return content

def test_safetensors_are_read_and_what_does_not_fit_is_named(tmp_path):
    """Two shards; cut short, parts that do not fit together or the other shard, no statistics: one line."""
    latents = np.random.RandomState(0).randn(5, 4, 32, 32).astype("<f2")
    parts = {"latents": latents, "latents_flip": -latents, "labels": np.arange(5)}
    content = save_safetensors(tmp_path, parts)
    save_safetensors(tmp_path, parts, second := "latents_rank00_shard001.safetensors")
    read = pickle.loads(sent := pickle.dumps(open_dataset(tmp_path, None)))  # as loading processes get it
    assert len(read) == 10 and read.shape == (4, 32, 32) and len(sent) < 10_000 < latents.nbytes
    assert [read[i][1] for i in (5, 7)] == [0, 2] and read.classes == ["0", "1", "2", "3", "4"]
    assert np.array_equal(read[7][0], latents[2]) and np.array_equal(read.item(8, True)[0], -latents[3])
    (tmp_path / "latents_stats.pt").unlink()
    pytest.raises(UserError, open_dataset, tmp_path, None).match("latents_stats.pt: not readable .no such")
    def saved(**change): return save_safetensors(tmp_path, parts | change, second)
    less, loose = latents[:, :3], "labels that fit together and the other shards"
    for bad, named in ((content[:-3], "not a readable safetensors file"),
                       (content.replace(b"32, 32]", b"32, 31]", 1), "bytes of latents do not fit"),
                       (saved(latents_flip=less), loose), (saved(labels=np.arange(4)), loose),
                       (saved(latents=less, latents_flip=less), loose)):
        (tmp_path / second).write_bytes(bad)
        pytest.raises(UserError, open_dataset, tmp_path, None).match(f"shard001.*{named}")

def test_patch_pca_round_trip_is_the_orthogonal_projection():
    """The projection of an SVD; more channels than a patch has values are refused."""
    images = torch.randn(200, 3, 8, 8) @ torch.randn(8, 8)
    pca = PatchPCA.fit(images, 4, 10)
    def flat(x): return F.pixel_unshuffle(x, 4).transpose(0, 1).flatten(1)   # (48, patches)
    mean = flat(images).mean(1, keepdim=True)
    U = torch.linalg.svd(flat(images) - mean, full_matrices=False).U[:, :10]
    projected = U @ U.T @ (flat(images) - mean) + mean
    torch.testing.assert_close(flat(pca.decode(pca.encode(images))), projected, atol=2e-3, rtol=0)
    pytest.raises(UserError, PatchPCA.fit, images, 4, 49).match("48 values")

def test_codec_scales_once_and_back():
    """Pixels: [-1, 1] and rounding; latents: (z - mean) / std and its inverse."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = Codec().encode(images)
    assert torch.equal(Codec().decode(x), images) and (x.min(), x.max()) == (-1, 1)
    assert Codec().decode(torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]
    mean, std = torch.randn(1, 48, 1, 1), torch.rand(1, 48, 1, 1) + 0.5
    codec = Codec(PatchPCA.fit(torch.randn(9, 3, 16, 16), 4, 48), mean, std)
    assert (codec.decode(codec.encode(images)).int() - images.int()).abs().max() <= 1

@pytest.fixture
def small_vavae(monkeypatch):
    """VA-VAE of a quarter of the width: a fiftieth of its weights, the same shapes of latents."""
    monkeypatch.setattr(model.Autoencoder.__init__, "__defaults__", ((32, 32, 32, 32, 32), 32))

# ---- sample.py ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("interval, first, last, scale", [
    ((0.1, 1.0), 6, 49, 3), ((0.0, 1.0), 0, 49, 3), ((0.3, 0.5), 16, 24, 3), ((0.0, 1.0), 50, 0, 1)])
def test_guidance_acts_strictly_inside_its_interval(interval, first, last, scale):
    """Of 50 steps, t = 0.1 is outside of [0.1, 1], t = 0 inside of [0, 1]; else, and at scale 1, one pass."""
    calls, found = [], []
    def echo(z, t, y): return calls.append((len(z), t[0].item())) or y.view(-1, 1, 1, 1).expand_as(z)
    velocity = guided(KDiff(echo, "v", num_classes=4, tau=0.0), torch.tensor([1]), scale, interval)
    integrate(lambda z, t: found.append(velocity(z, t).item()) or 0, torch.zeros(1, 1, 1, 1), solver="euler")
    assert found == [-5.0 if first <= i <= last else 1.0 for i in range(50)]  # 4 + 3 (1 - 4), or 1
    assert calls == [(2 if first <= i <= last else 1, pytest.approx(i / 50)) for i in range(50)]

def test_samples_follow_their_index_alone():
    """Batch size and the images beside it change no pixel by more than one level; the seed changes them."""
    kdiff, how = KDiff(fill(model.JiT(**TINY_JIT)), "v", num_classes=10), dict(interval=(0.1, 1.0), steps=8)
    together, other, ones, twos = (
        sample.sample_all(kdiff, Codec(), (3, 32, 32), [0, 1, 2, 3, 0], size, cfg=2.0, seed=seed, **how).int()
        for size, seed in ((5, 0), (5, 1), (1, 0), (2, 0)))
    assert (together - ones).abs().max() <= 1 and (together - twos).abs().max() <= 1
    assert (together - other).abs().max() > 8 and (together[0] - together[4]).abs().max() > 8

def test_jit_loss_and_sampler_give_the_published_numbers():
    """Recorded from the official JiT: its loss, and six guided steps of both solvers (one pixel, norm)."""
    kdiff = KDiff(fill(model.JiT(**TINY_JIT)), "x", num_classes=10, noise_scale=1.0, tau=0.05)
    (x, t, y), e, z0 = inputs(TINY_JIT), normal("e", 3, 3, 32, 32), normal("z0", 3, 3, 32, 32)
    assert kdiff.loss(0.5 * x, y, t, e).item() == pytest.approx(102.92652, rel=1e-6)
    for solver, recorded in (("heun", (-0.416544, -1.016429, 0.516974, 125.321983)),
                             ("euler", (-0.015014, -1.051720, -0.029472, 122.744453))):
        z = integrate(guided(kdiff, torch.tensor([0, 3, 1]), 2.9, (0.1, 1.0)), z0, 6, solver)
        assert (*z[:, 1, 5, 7].tolist(), z.norm().item()) == pytest.approx(recorded, abs=2e-5, rel=1e-5)

def test_published_jit_files_load(tmp_path):
    """With the training script's extras (a pickled Namespace, an optimizer); ema1, or ema2 where chosen."""
    net, path = model.build("JiT-demo/8", 32, 10), tmp_path / "checkpoint-last.pth"
    weights = {name: {f"module.net.{k}": factor * v for k, v in net.state_dict().items()}
               for factor, name in enumerate(("model", "model_ema1", "model_ema2"))}
    torch.save(weights | {"epoch": 5, "optimizer": {}, "args": argparse.Namespace(lr=1)}, path)
    for ema, factor in ((None, 1), ("0.9996", 2)):
        it = load(path, ema=ema)
        assert torch.equal(it.kdiff.net.t_embedder.mlp[0].weight, net.t_embedder.mlp[0].weight * factor)
    assert it.config["model"] == "JiT-demo/8" and it.kdiff.target == "x" and it.kdiff.noise_scale == 32 / 256
    assert (it.shape, it.step, it.ema, it.kdiff.tau) == ((3, 32, 32), 5, "0.9996", 0.05)
    assert (it.config["cfg"], it.config["interval"], it.classes) == (2.9, (0.1, 1.0), [*"0123456789"])
    pytest.raises(UserError, load, path, ema="0.5").match("0.5")
    pytest.raises(UserError, load, path, model="JiT-wide/8").match("not a JiT-wide/8 whose weights fit")

@pytest.mark.parametrize("qk_norm", [False, True])
def test_published_dit_files_load_with_their_statistics(tmp_path, qk_norm):
    """Flat weights under "ema", statistics beside; the tables of RoPE are saved and checked, but not used."""
    net = fill(model.build("LightningDiT-demo/1", 4, 10, qk_norm=qk_norm))
    file, stats = tmp_path / "dit.pt", tmp_path / "stats.pt"
    state, tables = net.state_dict(), ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
    angles = [[place / 10 ** (i // 2 / 2) for place in divmod(n, 4) for i in range(16)] for n in range(16)]
    cos, sin = (state.pop(name) for name in tables)
    assert error(torch.stack([cos, sin]), torch.tensor(np.stack([np.cos(angles), np.sin(angles)]))) < 1e-6
    torch.save({"mean": torch.arange(32.0), "std": torch.ones(32)}, stats)
    for wrong in ([cos], [cos, sin[1:]]):
        torch.save({"ema": state | dict(zip(tables, wrong))}, file)
        pytest.raises(UserError, load, file, stats=stats).match("freqs_sin")
    torch.save({"ema": state | dict(zip(tables, (sin, cos)))}, file)
    it = load(file, stats=stats)
    assert it.config["model"] == "LightningDiT-demo/1" and it.shape == (32, 4, 4) and it.ema == "ema"
    assert (it.kdiff.target, it.kdiff.tau, it.kdiff.noise_scale, it.config["cfg"]) == ("v", 0.0, 1.0, 1.5)
    args = normal("x", 2, 32, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([1, 10])
    assert torch.equal(it.kdiff.net(*args), net(*args)) and it.codec.mean.flatten().tolist() == [*range(32)]
    pytest.raises(UserError, load, file).match("--stats")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "alien.pt")
    pytest.raises(UserError, load, tmp_path / "alien.pt").match("alien.pt: not a checkpoint of ours, JiT")

def test_curves_are_drawn_where_their_numbers_are(tmp_path):
    """Two panels, each in its own scale: a line from corner to corner; from -50 to 50, without the NaN."""
    lines = {"k": ([0, 5, 10], [0, 0.5, 1])}, {"a": ([0, 1, 2, 3], [-50, 50, math.nan, 0])}
    sample.draw_curves([("loss", "step", line) for line in lines], tmp_path / "c.png")
    picture = np.asarray(Image.open(tmp_path / "c.png"))
    grey = (picture == sample.GREY).all(-1)                                  # lines at 0, 0.2, ..., 1
    assert np.flatnonzero(grey[:, 80:140].all(1)).tolist() == [40, 98, 157, 216, 275, 334]
    assert np.flatnonzero(grey[300:334, :560].mean(0) > 0.8).tolist() == [64, 159, 254, 349, 444, 540]
    for left, top, last in ((0, 40, 40), (560, 334 - 294 / 1.025, 334 - 147 / 1.025)):      # to 50 * 1.05
        rows, columns = np.nonzero((picture[:, left:left + 560] == sample.COLOURS[0]).all(-1))
        found = columns.min(), columns.max(), rows.min(), rows.max(), rows[columns == columns.max()].mean()
        assert found == pytest.approx((64, 540, top, 334, last), abs=2)

def test_grid_shows_each_image_in_its_row():
    """Six images of 8 px in rows of three, enlarged without blur, the rows' names before them."""
    images = torch.from_numpy(noise(6, 3, 8, 8))
    sheet = np.asarray(sample.grid(images, ["a", "long name"], 3))
    margin = sheet.shape[1] - 3 * 100 - 4
    assert len(sheet) == 204 and 16 < margin < 200 and (sheet[:, :margin - 8] < 100).any()
    cells = sheet[4:, margin:-4].reshape(2, 100, 3, 100, 3)[:, :96:12, :, :96:12].transpose(0, 2, 4, 1, 3)
    assert np.array_equal(cells.reshape(6, 3, 8, 8), images)
    assert sample.grid(images.repeat(1, 1, 25, 25), "ab", 3).size[1] == 2 * 204 + 4         # not enlarged

def test_classes_are_chosen_by_name_or_number():
    """A name wins over a number that it looks like; what is neither is an error that lists the names."""
    assert choose_classes("b,0,2", [*"abc"]) == [1, 0, 2] and choose_classes("7,1", [*"17"]) == [1, 0]
    for word in ("3", "d", "-1"):
        pytest.raises(UserError, choose_classes, word, [*"abc"]).match(f"{word}: not a label.* 2 .a, b, c.$")

# ---- train.py ----------------------------------------------------------------------------------------------

class Bare(torch.nn.Module):
    """The least that KDiff asks of a network: net(z, t, y) -> like z."""
    def __init__(self):
        super().__init__()
        self.down, self.table = torch.nn.Conv2d(3, 16, 4, 2, 1), torch.nn.Embedding(9, 16)
        self.up = torch.nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, z, t, y):
        self.out = self.up(F.silu(self.down(z) + (t[:, None] + self.table(y))[:, :, None, None]))
        return self.out

def loop(state, data, **change):
    """train() on the CPU; the settings that it reads are anything with attributes."""
    plain = dict(steps=5, seed=7, batch_size=6, micro_batch=4, workers=0, lr=3e-3, k_lr=3.0, warmup_epochs=2,
                 dtype=None)
    return train.train(state, Codec(), data, SimpleNamespace(**plain | change), torch.device("cpu"))

@pytest.mark.parametrize("clip, dtype", [(0.0, None), (0.1, None), (0.0, "bfloat16")])
def test_a_step_of_any_network_is_algorithm_1_written_by_hand(clip, dtype):
    """Loss, AdamW, clipping and averages in plain formulas and one batch; the loop adds up micro batches."""
    torch.manual_seed(0)
    kdiff, data = KDiff(Bare(), num_classes=8), Shapes(12, 8)
    by_hand, state = copy.deepcopy(kdiff).double(), State(kdiff, [0.9, 0.5])
    weights = dict(by_hand.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in weights.items()}
    averages = {decay: {name: p.detach().clone() for name, p in weights.items()} for decay in (0.9, 0.5)}
    steps, rel = loop(state, data, clip=clip, dtype=dtype), 2e-2 if dtype else 1e-4
    for step, items in enumerate(order(12, 6, 7, 0, 5)):
        x = torch.stack([data[i][0] for _, i in items]).float() / 127.5 - 1
        t, e, y = by_hand.draw(x, torch.tensor([data[i][1] for _, i in items]),
                               [seed_of(7, step, n) for n in range(6)])
        loss = by_hand.loss(x.double(), y, t.double(), e.double())
        gradients = dict(zip(weights, torch.autograd.grad(loss, weights.values())))
        norm = sum(g.square().sum() for g in gradients.values()).sqrt().item()
        lr = 3e-3 * min(1, (step + 1) / 4)                                    # two epochs of two steps
        with torch.no_grad():
            for name, p in weights.items():
                g, (m, v) = gradients[name] * (min(1, clip / norm) if clip else 1), moments[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                p -= lr * (3 if name == "w" else 1) * m / (1 - 0.9 ** (step + 1)) / (
                    (v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                for decay, average in averages.items():
                    average[name].mul_(decay).add_((1 - decay) * p)
        assert next(steps) == pytest.approx((loss.item(), norm, lr), rel=rel) and state.step == step + 1
        ours = [dict(zip(state.names, each)) for each in (state.parameters, *state.averages.values())]
        theirs = [weights, *averages.values()]
        torch.testing.assert_close(ours, theirs, atol=rel / 10, rtol=10 * rel, check_dtype=False)
    assert next(steps, None) is None and kdiff.net.out.dtype == getattr(torch, dtype or "float32")
    table, raw = kdiff.net.table.weight, kdiff.net.table.weight.detach().clone()
    with state.averaged("0.5"):
        assert error(table, averages[0.5]["net.table.weight"]) < rel and not kdiff.training
        images = generate(kdiff, Codec(), (3, 8, 8), [0, 5, 8], [3, 3, 3], 1.0, (0.1, 1.0), steps=4)
        assert images.shape == (3, 3, 8, 8) and not torch.equal(images[0], images[1])    # another class
        assert images.dtype == torch.uint8 and not torch.equal(table, raw)
    assert torch.equal(table, raw) and kdiff.training and table.dtype == torch.float32

def test_presets_are_table_4_and_what_hangs_on_data_is_filled_in(monkeypatch):
    """The paper's numbers, tau where Delta vanishes; steps, micro batch, an average that forgot the start."""
    def parsed(words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
        return train.parse()

    def settled(words, n=100):
        return train.settle(parsed(words), Shapes(n, 32), Codec(), torch.device("cpu"))
    common = dict(batch_size=1024, lr=2e-4, k_lr=1.0, ema=[.9999, .9998, .9996], label_drop=0.1, target="k",
                  loss="v", interval=[0.1, 1.0], clip=0.0, flip=True, steps=None, samples=None)
    for words, expected in (
            ("--space latent", dict(model="LightningDiT-XL/1", image_size=256, epochs=800, warmup_epochs=0,
                                    t_mean=0.0, t_std=1.0, noise_scale=1.0, tau=0.0, cfg=1.5)),
            ("--space pixel", dict(model="JiT-B/16", image_size=256, epochs=600, warmup_epochs=5, t_mean=-0.8,
                                   t_std=0.8, noise_scale=1.0, tau=0.05, cfg=2.9)),
            ("--image_size 512", dict(model="JiT-B/32", image_size=512, noise_scale=2.0)),
            ("--image_size 128 --model JiT-S/8 --lr 0", dict(model="JiT-S/8", noise_scale=0.5, lr=0.0)),
            *((f"--space latent --target {target}", dict(target=target, tau=tau)) for tau, targets in (
                (0.05, ("eps", "x", "0", "1.0")), (0.0, ("v", "0.3"))) for target in targets)):
        args = vars(parsed(f"--data photos {words}"))
        assert {key: args[key] for key in common | expected} == common | expected
    demo, latent = parsed(""), parsed("--space latent --target 0.5")
    assert (demo.model, demo.image_size, demo.tau, str(demo.out)) == ("JiT-demo/8", 32, 0.05, "out/pixel")
    assert (latent.tokenizer, latent.preset, str(latent.out)) == ("pca", "demo", "out/latent-0.5")
    small = settled("--preset small --data photos", 300)                      # w can pass 3
    assert small["model"] == "JiT-S/8" and small["lr"] * small["k_lr"] * small["steps"] > 3
    assert float(small["ema_default"]) ** small["steps"] < 0.01
    monkeypatch.setattr(train, "WORLD", 2)
    config, paper = settled("--batch_size 600 --epochs 12"), settled("--preset paper")
    assert config.items() >= dict(
        micro_batch=100, steps=2, workers=0, samples=64, sample_steps=25, compile=False, net_size=32,
        in_channels=3, images=100, num_classes=8, processes=2, ema_default="0.95").items()
    assert 1 <= paper["workers"] <= 8 and paper["samples"] == 8
    for steps, decay in ((89, "0.95"), (227, "0.95"), (228, "0.98"), (459, "0.99")):
        assert settled(f"--steps {steps} --micro_batch 16")["ema_default"] == decay
    for words, told in (("--batch_size 65", "65 does not divide over 2 processes: try 64"),
                        ("--batch_size 1", "try 2"), ("--batch_size 12 --micro_batch 4", "try 3")):
        pytest.raises(UserError, settled, words).match(told)

TINY = "train.py --batch_size 8 --samples 0 --log_every 1 --model JiT-narrow/8".split()

def start(*words, processes=None, wait_for=None):
    """Start a script, under torchrun for several processes, marked in their environment; await a word."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command, mark = [*(torchrun if processes else []), *map(str, words)], f"test-{time.time_ns()}"
    process = subprocess.Popen([sys.executable, *command], env=os.environ | {"MARK": mark}, cwd=HERE,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.mark = mark
    assert not wait_for or any(wait_for in line for line in process.stdout), f"it never printed {wait_for}"
    return process

def alive(mark, *words):
    """The ids of processes whose environment holds MARK=mark and these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if {f"MARK={mark}", *words} <= set(path.read_text(errors="replace").split("\0")):
                found.append(int(path.parent.name))
    return sorted(found)

def ending(process, status, began=None):
    """What a process printed; asserts that it and all it started end in 10 s from began or an error line."""
    said, timer = "", threading.Timer(150, lambda: [os.kill(pid, 9) for pid in alive(process.mark)])
    timer.start()
    for line in process.stdout:                       # to its end: when the last of its processes is gone
        said += line
        began = time.time() if began is None and line.startswith("error: ") else began
    timer.cancel()
    assert process.wait() == status and not alive(process.mark) and time.time() - (began or 1e12) < 10, said
    assert not re.search(r"File .*(train|data|sample).py", said), said
    return said

@pytest.fixture
def call(monkeypatch, capsys):
    """Run one of our scripts in this process; returns what it printed, its errors last."""
    def call(script, *words, status=0):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            run(importlib.import_module(script[:-3]).main)
            sys.exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        said = "".join(capsys.readouterr())
        assert exit.value.code == status, said
        return said
    return call

def work_of_two(folder):
    """What each of two processes does for the fixture below, by `torchrun test_all.py FOLDER`."""
    def call(words):
        sys.argv = words.split()
        importlib.import_module(sys.argv[0][:-3]).main()

    def spoiled(net, inputs, output):                         # the second step of one process, to be skipped
        return output * (math.inf if data.RANK == 1 and state.step == 1 else 1)

    def interrupted(log, lr, write=train.Log.write):          # one process is asked to stop
        if data.RANK == 1 and log.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        write(log, lr)
    os.chdir(folder)
    call(" ".join(TINY) + " --steps 3 --micro_batch 2 --out two")
    evaluate_shapes()
    model.Autoencoder.__init__.__defaults__ = ((32,) * 5, 32)
    call("data.py encode photos --tokenizer vavae.pt --image_size 32 --batch_size 3 --out latents")
    call("sample.py two/ckpt.pt --classes star,3 --samples 5 --steps 2 --out s.npz")
    torch.manual_seed(0)
    state = State(KDiff(model.build("JiT-narrow/8", 16, 8), num_classes=8), [0.9])
    state.kdiff.net.register_forward_hook(spoiled)
    for _, norm, _ in loop(state, Shapes(12, 16), steps=3, batch_size=4, micro_batch=1, clip=1.0):
        moments = [t for moments in state.optimizer.state.values() for t in moments.values()]
        total = sum(t.double().norm().item() for t in (*state.parameters, *state.averages["0.9"], *moments))
        sys.stdout.write(f"rank {data.RANK} step {state.step} norm {norm:.8f} total {total}\n")
    train.Log.write = interrupted
    call(" ".join(TINY) + " --steps 9 --out stopped")

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made of their work: (folder, what they printed)."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "photos").mkdir()
    for i, image in enumerate(noise(9, 40, 40, 3)):
        Image.fromarray(image).save(folder / "photos" / f"{i}.png")
    torch.manual_seed(0)
    weights = model.Autoencoder(((32,) * 5), 32).state_dict() | {"loss.logvar": torch.zeros(())}
    torch.save({"state_dict": weights}, folder / "vavae.pt")
    return folder, ending(start(HERE / "test_all.py", folder, processes=2), status=1)

def test_two_processes_equal_one_and_skip_and_stop_together(two, call, tmp_path):
    """Steps in micro batches agree; what is not finite on one changes neither; SIGTERM to one stops both."""
    call(*TINY, "--steps", 3, "--out", tmp_path)
    one, other = (read_tensors(path / "ckpt.pt") for path in (tmp_path, two[0] / "two"))
    torch.testing.assert_close(other["ema"]["0.95"], one["ema"]["0.95"], atol=2e-5, rtol=1e-3)
    logs = [read_log(path, "loss")[1] for path in (tmp_path, two[0] / "two")]
    assert len(logs[0]) == 3 and logs[0] == pytest.approx(logs[1], rel=1e-4) and one["model"]["w"] != 0
    assert two[1].count("step 3/3 | ") == 1 and "micro_batch=2 " in two[1]
    said = sorted(re.findall(r"rank (\d) step (\d) norm (\S+) total (\S+)", two[1]))
    assert [row[1:] for row in said[:3]] == [row[1:] for row in said[3:]] and len(said) == 6
    assert [math.isfinite(float(norm)) for *_, norm, _ in said[:3]] == [True, False, True]
    assert said[0][3] == said[1][3] != said[2][3]              # weights, averages, moments after each step
    assert two[1].count("stopped by signal 15 after step 3; the same command resumes stopped/ckpt.pt") == 1
    said = call(*TINY, "--steps", 4, "--out", two[0] / "stopped")
    assert "stopped/ckpt.pt at step 3" in said and "exitcode  : 143" in two[1]
    assert read_log(two[0] / "stopped", "step")[0] == [1, 2, 3, 4]

def test_samples_of_two_processes_make_one_file(two, call, tmp_path):
    """An npz of images, labels going round, and settings: the same as one process makes; or a folder."""
    words = ("sample.py", two[0] / "two" / "ckpt.pt", "--steps", 2, "--n")
    call(*words, 5, "--classes", "star,3", "--batch_size", 2, "--out", tmp_path / "one.npz")
    with np.load(two[0] / "s.npz") as file, np.load(tmp_path / "one.npz") as one:
        assert file["arr_0"].shape == (5, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [5, 3, 5, 3, 5] == one["arr_1"].tolist()
        assert np.abs(file["arr_0"].astype(int) - one["arr_0"]).max() <= 1 and file["arr_0"].std() > 10
        assert json.loads(str(file["settings"])).items() >= dict(steps=2, classes="star,3", n=5).items()
    call(*words, 9, "--out", tmp_path / "pngs")
    assert {*os.listdir(tmp_path / "pngs")} == {f"{i:06}_{i % 8}.png" for i in range(9)}
    assert "pngs holds " in call(*words, 9, "--out", tmp_path / "pngs", status=2)
    assert not [*tmp_path.glob("*tmp*"), *two[0].glob("*tmp*")]

def test_latents_of_two_processes_are_posterior_samples_to_train_on(two, small_vavae, call, tmp_path):
    """Mean and spread, noise of their own, mirror images; statistics; they train; pictures need the file."""
    latents, file, ckpt = two[0] / "latents", tmp_path / "vavae.pt", tmp_path / "run" / "ckpt.pt"
    data, images, draws = open_dataset(latents, None), ImageFolder(two[0] / "photos", 32), []
    batch = torch.stack([images[i][0] for i in range(9)]).float() / 127.5 - 1
    for flip, batch in ((False, batch), (True, batch.flip(-1))):
        mean, logvar = VAVAE(two[0] / "vavae.pt").moments(batch)
        draws.append((torch.stack([data.item(i, flip)[0] for i in range(9)]) - mean) / torch.exp(logvar / 2))
        assert abs(draws[-1].mean()) < 0.1 and abs(draws[-1].std() - 1) < 0.1
    assert torch.corrcoef(torch.cat([d.flatten(1) for d in draws])).fill_diagonal_(0).abs().max() < 0.45
    both = [np.load(latents / f"latents{flip}.npy").astype(float) for flip in ("", "_flip")]
    for ours, statistic in ((data.mean, np.mean), (data.std, np.std)):
        assert ours.flatten().tolist() == pytest.approx(statistic(both, (0, 1, 3, 4)), abs=1e-3)
    assert {data[i][1] for i in range(9)} == {0} and data.classes == ["photos"] and data.shape == (32, 2, 2)
    shutil.copy(two[0] / "vavae.pt", file)
    words = ("train.py", *"--space latent --preset demo --image_size 32 --batch_size 4 --samples 0".split(),
             "--data", latents, "--out", tmp_path / "run", "--tokenizer", file, "--steps")
    assert "resuming" not in call(*words, 2) and "resuming" in call(*words, 3)
    assert load(ckpt).shape == (32, 2, 2) and load(ckpt).codec.decodes and load(ckpt).kdiff.tau == 0
    file.rename(moved := tmp_path / "moved.pt")
    assert "--tokenizer" in call("sample.py", ckpt, status=2)
    call("sample.py", ckpt, "--tokenizer", moved, "--n", 3, "--steps", 2, "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[1] == 104                   # one class, one row
    assert "finished latents" in call(
        "data.py", "encode", two[0] / "photos", "--tokenizer", moved, "--out", latents, status=2)
    shutil.copytree(latents, tmp_path / "half", ignore=shutil.ignore_patterns("meta.json"))
    pytest.raises(UserError, open_dataset, tmp_path / "half", None).match("meta.json")

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(call, tmp_path, monkeypatch, number):
    """A signal, twice, saves step 3 and is told; then 1 step against 4: model, averages, optimizer, log."""
    def interrupted(log, lr, write=train.Log.write):
        for _ in range(2 if log.args.steps == 9 and log.state.step == 2 else 0):
            os.kill(os.getpid(), number)
        write(log, lr)
    monkeypatch.setattr(train.Log, "write", interrupted)
    whole, halves = ((*TINY, "--out", tmp_path / name) for name in ("whole", "halves"))
    call(*whole, "--steps", 4, "--keep_every", 3)
    said = call(*halves, "--steps", 9, status=128 + number)
    assert f"stopped by signal {int(number)} after step 3; the same" in said and "done" not in said
    assert "resuming" not in said and "k stays below 0.59: try --preset small" in said   # 1 / (1 + e^-0.36)
    early = (ckpt := tmp_path / "halves" / "ckpt.pt").read_bytes()
    for _ in range(2):
        ckpt.write_bytes(early)                                               # as if dead before saving
        said = call(*halves, "--steps", 4)
    assert f"resuming from {ckpt} at step 3" in said and "resuming with steps 4, before: 9" in said
    a, b = ({part: read_tensors(path)[part] for part in ("model", "optimizer", "ema")}
            for path in (tmp_path / "whole" / "ckpt.pt", ckpt))
    torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert read_log(tmp_path / "whole", "loss") == read_log(tmp_path / "halves", "loss")
    assert read_log(tmp_path / "whole", "step")[0] == [1, 2, 3, 4] and len(a["optimizer"]["state"]) > 10
    kept = sorted(tmp_path.glob("whole/ckpt*"))
    assert [(path.name, load(path).step) for path in kept] == [("ckpt-0000003.pt", 3), ("ckpt.pt", 4)]
    assert "finished at step 4" in call(*halves, "--steps", 4)
    for name, before, value in (("target", "k", "v"), ("seed", 0, 1)):
        assert f"with {name} {before}, not {value}" in call(*halves, f"--{name}", value, status=2)

def test_short_demo_raises_k_and_writes_its_files(call, tmp_path, monkeypatch):
    """Forty steps of the pixel demo move k from 0.5 past 0.6; pictures, log; latents are white."""
    dry = call(*TINY, "--dry_run", "--preset", "small", "--steps", 9, "--out", tmp_path / "none")
    assert " s a step here " in dry and "try more --steps" in dry
    labels, draw = [], sample.sample_all
    monkeypatch.setattr(train, "sample_all", lambda *a, **how: labels.append(a[3]) or draw(*a, **how))
    flags = "--steps 40 --batch_size 32 --samples 16 --sample_steps 2 --sample_every 20"
    said, (steps, ks) = call("train.py", *flags.split(), "--out", tmp_path), read_log(tmp_path, "k")
    assert labels == [sorted([*range(8)] * 2)] * 2 and "samples.png" in said and "done in 0:" in said
    assert steps == [20, 40] and ks[1] > 0.6 and "= 0.20 epochs of 200.0 steps" in said
    losses = read_log(tmp_path, "loss")[1]
    assert re.search(r"^step 40/40 \| epoch 0.2 \| loss \d\.\d{4} \| k 0.\d{3} \| lr \d\.\de-03 \| "
                     r"grad \d\.\d\d \| [\d,]+ img/s \| eta 0:00:00$", said, re.M)
    assert losses[1] < 0.75 * losses[0] and Image.open(tmp_path / "samples.png").size[1] == 8 * 100 + 4
    assert {*os.listdir(tmp_path)} == {*"ckpt.pt log.csv curves.png samples.png samples-0000020.png".split()}
    call("sample.py", tmp_path, tmp_path, "--plot", "k", "--out", tmp_path / "k.png")
    assert Image.open(tmp_path / "k.png").size == (560, 380)
    assert "column 'q'" in call("sample.py", tmp_path, "--plot", "q", status=2)
    for more in ("--gif", tmp_path / "a.gif"), ("--nearest", "shapes", "--out", tmp_path / "n.png"):
        call("sample.py", tmp_path / "ckpt.pt", "--steps", 3, "--n", 8, *more)
    assert Image.open(tmp_path / "a.gif").n_frames >= 4 and Image.open(tmp_path / "n.png").size[1] > 16 * 96
    images = torch.stack([(shapes := Shapes(515, 32))[i][0] for i in (3, 514, 77)])       # two batches
    noisy = (images.int() + torch.randint(-9, 9, images.shape)).clamp(0, 255).to(torch.uint8)
    assert torch.equal(nearest(noisy, shapes), images)
    call(*TINY[:-2], "--space", "latent", "--steps", 1, "--out", tmp_path / "latent")
    it, images = load(tmp_path / "latent" / "ckpt.pt"), data.some_items(Shapes(6400, 32), 200)
    x = it.codec.encode(images)                                               # whitened, and decoded again
    assert x.mean((0, 2, 3)).abs().max() < 0.2 and (x.std((0, 2, 3)) - 1).abs().max() < 0.2
    assert it.shape == (16, 4, 4) and (it.codec.decode(x).float() - images).abs().mean() < 10

@pytest.mark.parametrize("target, columns", [
    ("two", ("k1", "k2", "k")), ("time", ("k",)), ("channel", ("k", "k_min", "k_max"))])
def test_what_other_targets_learn_is_logged_and_drawn(call, tmp_path, target, columns):
    """k1 and k2 and what k they are; k(t); a k for each principal component, strongest first; resumes."""
    words = (*TINY, "--image_size", 16, "--target", target, "--noise_scale", 3, "--out", tmp_path, "--steps")
    assert ("in_channels=192" in call(*words, 2)) == (target == "channel")
    said, ks = call(*words, 3), load(tmp_path / "ckpt.pt", ema="none").kdiff.ks()
    logged = [read_log(tmp_path, column)[1][-1] for column in columns]
    assert logged[:len(ks)] == pytest.approx([k.item() for k in ks.values()], abs=2e-6) and logged[0] != 0.5
    assert target != "two" or logged[2] == pytest.approx(logged[0] / (logged[0] + logged[1]))
    assert f"| {columns[0]} {logged[0]:.3f} |" in said and "at step 2" in said
    pictures = {"two": [], "time": ["k_of_t.png"], "channel": ["k_of_channel.png"]}[target]
    assert [path.name for path in tmp_path.glob("k_of*.png")] == pictures
    if target == "channel":
        rows = np.genfromtxt(tmp_path / "k_of_channel.csv", delimiter=",", names=True)
        patches = F.pixel_unshuffle(data.some_items(Shapes(6400, 16), 6400).double() / 127.5 / 3, 8)
        values = torch.linalg.eigvalsh(torch.cov(patches.transpose(0, 1).flatten(1))).flip(0)
        assert rows["channel"].tolist() == list(range(192)) and (rows["k"] != 0.5).all()
        assert rows["variance"][:32] == pytest.approx(values[:32].numpy(), rel=0.05)
        assert rows["k"].min() == pytest.approx(logged[1], abs=1e-5)
        basis = read_tensors(tmp_path / "ckpt.pt")["data"]["pca"]["basis"]    # noise stays white
        torch.testing.assert_close(basis.T @ basis, torch.eye(192), atol=1e-5, rtol=0)
        call("sample.py", tmp_path / "ckpt.pt", "--n", 8, "--steps", 2, "--out", tmp_path / "s.png")

def test_samples_are_measured_once(call, tmp_path, monkeypatch):
    """fid.csv has a row per setting, as fid.py finds it for the same samples in a file; fid.png the curve."""
    call(*TINY, "--steps", 2, "--keep_every", 1, "--out", tmp_path)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(768), sigma=np.eye(768), features="pixels")
    words, use = ("--n", 6, "--steps", 2, "--solver", "euler"), (tmp_path / "ref.npz", "--features", "pixels")
    measured, pictures, evaluate = [], set(), fid.evaluate
    monkeypatch.setattr(fid, "evaluate", lambda *a, **kw: measured.append(1) or evaluate(*a, **kw))
    for step, cfg, n, told in ((2, "2.0", 1, "2 2.0"), (2, "2.0", 1, "2 2.0"),
                               (2, "1.25", 2, "2 2.0, 2 1.25"), (1, "2.0", 3, "1 2.0, 2 2.0, 2 1.25")):
        call("sample.py", tmp_path / f"ckpt-000000{step}.pt", "--cfg", cfg, *words, "--fid", *use)
        rows = sample.read_rows(tmp_path / "fid.csv")
        assert ", ".join(f"{row['step']} {row['cfg']}" for row in rows) == told and len(measured) == n
        assert len(pictures := pictures | {(tmp_path / "fid.png").read_bytes()}) == n
    call("sample.py", tmp_path / "ckpt-0000002.pt", *words, "--out", tmp_path / "s.npz")
    distance = re.search(r"pixel distance (\S+)", call("fid.py", tmp_path / "s.npz", *use))[1]
    assert float(distance) == pytest.approx(float(rows[1]["pixel_distance"]), rel=1e-3)
    (tmp_path / "fid.csv").write_text("step\nx\n")
    assert "move it away" in call("sample.py", tmp_path / "ckpt-0000002.pt", "--fid", *use, status=2)

def test_init_with_other_classes_starts_the_table_of_labels_anew(call, photos, tmp_path):
    """All other weights are the checkpoint's default average; another target starts its own w; it is told."""
    call(*TINY, "--steps", 2, "--out", tmp_path / "source")
    source = load(ckpt := tmp_path / "source" / "ckpt.pt").kdiff.state_dict()
    words = (*TINY, *"--batch_size 2 --steps 1 --lr 0 --init".split(), ckpt, "--out")
    for more, told, anew in (
            (("--data", photos, "--preset", "demo"), "knows 8 classes, not 3: the",
             "net.y_embedder.embedding_table.weight"),
            (("--target", "time"), "predicts k, this run time", "w")):
        said = call(*words, tmp_path / anew, *more)
        ours = read_tensors(tmp_path / anew / "ckpt.pt")["model"]
        assert told in said and said.count("--init ") == 1
        assert {key for key in source if not torch.equal(ours[key], source[key])} == {anew}
    assert "not a JiT-wide/8" in call(*words, tmp_path / "no", "--model", "JiT-wide/8", status=2)

# ---- fid.py ------------------------------------------------------------------------------------------------

def plain_inception(images, state):
    """FID's network in float64 from its description, of 4 channels each, 3 x 3; state gets the weights."""
    def weight(key, *shape):
        one = key.endswith(("running_var", "bn.weight"))
        state[key] = one + normal(key, *shape) / math.prod(shape[1:]) ** 0.5 * (0.1 if len(shape) == 1 else 1)
        return state[key].double()

    def matrix(n):                                                            # TF1 bilinear, (299, n)
        rows = [np.interp(np.arange(299) * n / 299, range(n), unit) for unit in np.eye(n)]
        return torch.from_numpy(np.array(rows).T)

    def conv(x, name, stride=1, padding=1):
        x = F.conv2d(x, weight(f"{name}.conv.weight", 4, x.shape[1], 3, 3), None, stride, padding)
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
        keys = "running_mean", "running_var", "weight", "bias"
        return F.relu(F.batch_norm(x, *(weight(f"{name}.bn.{key}", 4) for key in keys), eps=1e-3))
    x = (matrix(images.shape[2]) @ images.double() @ matrix(images.shape[3]).T - 128) / 128
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2, 0), "Conv2d_2a_3x3", 1, 0), "Conv2d_2b_3x3")
    x = F.max_pool2d(conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 1, 0), 3, 2)
    for blocks, branches in (                                    # branches of so many numbered convolutions
            ("5b 5c 5d", dict(branch1x1=0, branch5x5=2, branch3x3dbl=3)),
            ("6a", dict(branch3x3=0, branch3x3dbl=3)),
            ("6b 6c 6d 6e", dict(branch1x1=0, branch7x7=3, branch7x7dbl=5)),
            ("7a", dict(branch3x3=2, branch7x7x3=4)),
            ("7b 7c", dict(branch1x1=0, branch3x3=2, branch3x3dbl=3))):
        for block in blocks.split():
            parts, halves = [], block in ("6a", "7a")
            for name, n in branches.items():
                y, names = x, [f"Mixed_{block}.{name}_{i + 1}" for i in range(n)] or [f"Mixed_{block}.{name}"]
                for each in names[:-1]:
                    y = conv(y, each)
                ends = "ab" if block in ("7b", "7c") and n else [""]                  # the last fork there
                parts += [conv(y, names[-1] + end, *((2, 0) if halves else ())) for end in ends]
            mean = F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)   # no padding
            pool = F.max_pool2d(x, 3, 1, 1) if block == "7c" else mean
            parts += [F.max_pool2d(x, 3, 2) if halves else conv(pool, f"Mixed_{block}.branch_pool")]
            x = torch.cat(parts, 1)
    weight("fc.bias", 1008)
    return x.mean((2, 3)), x.mean((2, 3)) @ weight("fc.weight", 1008, x.shape[1]).T

def test_inception_agrees_with_plain_layers(tmp_path):
    """One side enlarged, one shrunk; keys as published (a checksum); train() and autocast change nothing."""
    images, state, path = torch.from_numpy(noise(2, 3, 40, 333)), {}, tmp_path / "random.pth"
    expected = plain_inception(images, state)
    assert len(state) == 566 and zlib.crc32(repr(sorted(state)).encode()) == 3580115373
    torch.save(state, path)
    network = fid.Inception(path).train()
    with torch.autocast("cpu", torch.bfloat16):
        ours = network(images)
    assert not ours[0].requires_grad and max(error(*pair) for pair in zip(ours, expected)) < 5e-6
    assert network.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    weight = state.pop(key := "Mixed_7c.branch_pool.conv.weight")
    for unfit in (state, state | {key: weight[:, 1:]}, [1]):
        torch.save(unfit, path)
        pytest.raises(UserError, fid.Inception, path).match("random.pth: not FID's Inception")

def test_frechet_distance_has_its_closed_forms_at_every_rank():
    """Equal or commuting covariances; n and m samples in 100 dimensions, by the norm of X Y^T; no NaN."""
    rng, mu = np.random.RandomState(0), np.zeros(50)
    turn, (a, b) = np.linalg.qr(rng.randn(50, 50))[0], rng.rand(2, 50) ** 4
    s1, s2, shift = turn * a @ turn.T, turn * b @ turn.T, rng.randn(50)
    assert fid.frechet_distance(mu, s1, shift, s1) == pytest.approx(shift @ shift, rel=1e-10)
    assert fid.frechet_distance(mu, s1, mu, s2) == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-9)
    assert fid.frechet_distance(np.ones(5), np.zeros((5, 5)), np.zeros(5), np.zeros((5, 5))) == 5
    for bad in ((mu[None], s1), (mu, s1[:3]), (mu[:3], s1[:3, :3]), (mu * np.nan, s1), (mu, s1 + np.inf)):
        for four in ((mu, s1, *bad), (*bad, mu, s1)):
            pytest.raises(UserError, fid.frechet_distance, *four)
    for n, m in ((n, m) for n in (10, 100, 101, 102, 300) for m in (80, 400)):
        x, y = (rng.randn(rows, 100) * np.linspace(1, 0.1, 100) for rows in (n, m))
        (mu1, s1), (mu2, s2) = ((samples.mean(0), np.cov(samples, rowvar=False)) for samples in (3 * x, y))
        x, y = (3 * x - mu1) / (n - 1) ** 0.5, (y - mu2) / (m - 1) ** 0.5
        expected = sum((v ** 2).sum() for v in (mu1 - mu2, x, y)) - 2 * np.linalg.norm(x @ y.T, "nuc")
        for four in ((mu1, s1, mu2, s2), (mu2, s2, mu1, s1)):
            assert fid.frechet_distance(*four) == pytest.approx(expected, rel=1e-10)
        assert abs(fid.frechet_distance(mu1, s1, mu1, s1)) < 1e-6

def test_inception_score_is_the_mean_kl_of_uneven_splits():
    """By loops over 103 rows in 10 splits of 10 and 11; K for K certain classes; too few are refused."""
    logits = 3 * torch.from_numpy(np.random.RandomState(0).randn(103, 7).astype(np.float32))
    p = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(103)]
    parts = [p[i * 103 // 10:(i + 1) * 103 // 10] for i in range(10)]
    scores = [np.exp(np.mean([(row * np.log(row / part.mean(0))).sum() for row in part])) for part in parts]
    assert fid.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)
    certain = torch.eye(4, 5, dtype=torch.float64).repeat(2, 1) * 2000    # class 4 never: 0 log 0 is not NaN
    assert fid.inception_score(certain, splits=1) == pytest.approx((4, 0), rel=1e-12)
    pytest.raises(UserError, fid.inception_score, torch.zeros(9, 5))

def test_images_and_features_are_streamed(tmp_path):
    """numpy's mean and cov however they are cut, around a mean a million times the spread; 6 MB within 2."""
    x = np.random.RandomState(0).randn(60, 8) + 1e6
    for sizes in ([1] * 60, [60], [7, 20, 33]):
        statistics = fid.Statistics(8)
        for part in torch.from_numpy(x).split(sizes):
            statistics.add(part)
        for ours, expected in zip(statistics.finish(), (x.mean(0), np.cov(x, rowvar=False), 60)):
            assert np.abs(ours - expected).max() < 1e-8
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=noise(500, 64, 64, 3) // 32)
        tracemalloc.start()
        batches = fid.open_source(str(tmp_path / "a.npz"), "pixels").batches(16)
        assert sum(len(batch) for batch, _ in batches) == 500 and tracemalloc.get_traced_memory()[1] < 2e6
        tracemalloc.stop()

class Stub(fid.Pixels):
    """12 features and logits made of them, in the place of Inception's."""
    key, dim = "fid", 12

    def __init__(self, path):
        super().__init__()
        self.sha256 = fid.sha256(path)

    def forward(self, images):
        features = F.adaptive_avg_pool2d(images / 255, 2).flatten(1)
        return features, features.repeat(1, 84) * 8

def evaluate_shapes():
    """Print the evaluation of 53 shapes in batches of 10, the last first, by all processes."""
    source = fid.Source("", 53, read=lambda i, j: torch.stack([Shapes(53, 32)[n][0] for n in range(i, j)]))
    batches, reference = list(source.batches(10)), fid.Source("none", mu=np.zeros(12), sigma=np.eye(12))
    data.print0(json.dumps(fid.evaluate(batches[::-1], Stub(fid.__file__), reference)))

def test_evaluation_does_not_depend_on_processes_batches_or_their_order(two, capsys):
    """Distance and score of 53 images at once, in batches of 10, the last first, and on two processes."""
    features, logits = Stub(fid.__file__)(torch.stack([Shapes(53, 32)[i][0] for i in range(53)]))
    mu, sigma = features.double().mean(0).numpy(), np.cov(features.double().numpy(), rowvar=False)
    score, distance = fid.inception_score(logits), fid.frechet_distance(mu, sigma, np.zeros(12), np.eye(12))
    assert score[0] > 1.01
    expected = {"fid": distance, "n": 53, "is_mean": score[0], "is_std": score[1]}
    evaluate_shapes()
    for said in (capsys.readouterr().out, two[1]):
        assert json.loads(re.search(r'^\{"fid".*\}$', said, re.M)[0]) == pytest.approx(expected, rel=1e-7)

@pytest.fixture
def samples(tmp_path):
    """12 shapes of 32 px as PNGs in two folders, an array in a zip, stored or deflated, a packed array."""
    images = data.some_items(Shapes(12, 32), 12)
    arr_0 = images.permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(arr_0):
        (folder := tmp_path / "png" / str(i // 6)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    np.savez(tmp_path / "stored.npz", arr_0=arr_0, arr_1=np.zeros(12), settings=np.array('{"cfg": 2.5}'))
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=arr_0)
    data.pack(tmp_path / "png", 32, tmp_path / "packed.npy")
    return tmp_path, images

def test_reference_of_any_kind_of_file_is_written_used_and_told(samples, call):
    """All kinds hold the same images, 0 from their own reference; hash and settings are told, not `FID`."""
    (folder, images), how = samples, ("--features", "pixels", "--batch_size", 5)
    for name in ("png", "stored.npz", "deflated.npz", "packed.npy"):
        source, settings = fid.open_source(str(folder / name), "pixels"), {"stored.npz": {"cfg": 2.5}}
        assert (source.n, source.size, source.settings) == (12, (32, 32), settings.get(name))
        assert torch.equal(torch.cat([batch for batch, _ in source.batches(5)]), images)
        assert torch.equal(source.read(2, 9), images[2:9])
    make = ("fid.py", "--out", folder / "ref.npz", *how, "--make_ref")
    call(*make, folder / "png", "--image_size", 32)
    ref = fid.load_reference(str(folder / "ref.npz"), "pixels")
    features = images.numpy().reshape(12, 3, 16, 2, 16, 2).mean((3, 5)).reshape(12, 768) / 255
    assert np.abs(ref.mu - features.mean(0)).max() < 1e-6
    assert np.abs(ref.sigma - np.cov(features, rowvar=False)).max() < 1e-6
    assert (ref.n, ref.size, ref.weights) == (12, (32, 32), None)
    np.savez(folder / "dark.npz", arr_0=(images // 2).permute(0, 2, 3, 1).numpy())
    np.savez(folder / "published.npz", mu=ref.mu, sigma=ref.sigma, arr_0=0)
    pairs = "stored.npz ref.npz", "ref.npz published.npz", "dark.npz ref.npz", "dark.npz packed.npy"
    said = [call("fid.py", *(folder / name for name in pair.split()), *how) for pair in pairs]
    distances = [float(re.search(r"^pixel distance (\S+)", each, re.M)[1]) for each in said]
    assert distances == pytest.approx([0, 0] + 2 * distances[2:3], rel=1e-5, abs=1e-6) and distances[2] > 1
    assert said[0].count("12 images") == 2 and "FID" not in said[0] and '"cfg": 2.5' in said[0]
    assert fid.sha256(folder / "ref.npz") in said[0]
    assert "6,400 images" in call(*make, "shapes", "--image_size", 4)
    assert "stored.npz: images; make" in call("sample.py", "", "--fid", folder / "stored.npz", *how, status=2)
    Image.new("RGB", (32, 33)).save(folder / "png" / "11.png")
    mixed = call("fid.py", folder / "packed.npy", folder / "png", *how, status=2)
    assert re.search("error: .*11.png is 32x33, .*000.png is 32x32", mixed) and mixed.count("error: ") == 1

MU, SIGMA, IMAGES = np.zeros(768), np.eye(768), np.zeros((4, 32, 32, 3), np.uint8)
UNFIT = {                  # what an .npz holds, or what becomes of a whole one; what the error tells
    "cut": (lambda whole: whole[:-2000], "zip"), "half": (dict(mu=MU), "sigma"),
    "flipped": (lambda whole: whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:], "CRC"),
    "huge": (lambda whole: whole.replace(b"(12, 32", b"(99, 32"), r"\(99, 32"),
    "empty": (dict(other=SIGMA), "arr_0"), "float": (dict(arr_0=IMAGES / 2), "float64"),
    "grey": (dict(arr_0=IMAGES[..., 0]), r"\(4, 32, 32\)"), "one": (dict(arr_0=IMAGES[:1]), "fewer than 2"),
    "fortran": (dict(arr_0=np.asfortranarray(IMAGES)), r"uint8 \(4, 32, 32, 3\)"),
    "wide": (dict(mu=MU, sigma=SIGMA[:64]), "64, 768"), "small": (dict(mu=MU[:64], sigma=SIGMA), "64,"),
    "nan": (dict(mu=MU, sigma=SIGMA * np.nan), "finite"),
    "other": (dict(mu=MU, sigma=SIGMA, features="inception"), "--features pixels"),
    "size": (dict(mu=MU, sigma=SIGMA, image_size=64), r"\(64, 64\).*\(32, 32\)|\(32, 32\).*\(64, 64\)")}

@pytest.mark.parametrize("name", UNFIT)
def test_unfit_samples_and_references_get_one_line(samples, call, name):
    """As a reference and as samples; exit status 2."""
    (content, told), bad, whole = UNFIT[name], samples[0] / f"{name}.npz", samples[0] / "packed.npy"
    np.savez(bad, **({} if callable(content) else content))
    if callable(content):
        bad.write_bytes(content((samples[0] / "stored.npz").read_bytes()))
    for pair in ((whole, bad), (bad, whole)):
        said = call("fid.py", *pair, "--features", "pixels", "--batch_size", 5, status=2)
        assert re.fullmatch(rf"(images .*\n)*error: .*{bad.name}.*\n", said) and re.search(told, said)

def test_right_weights_are_downloaded_once_and_others_refused_or_told(samples, call, monkeypatch, capsys):
    """By one process of a machine; --any_weights; IS is printed; under 2,048 images of either a warning."""
    a, b, gone, ref, png, hub = (samples[0] / name for name in "a.pth b.pth gone.pth ref.npz png hub".split())
    a.write_text("right")
    b.write_text("other")
    for name, value in (("Inception", Stub), ("WEIGHTS", fid.sha256(a)), ("EXTRACTORS", {"inception": Stub})):
        monkeypatch.setattr(fid, name, value)
    make = ("fid.py", "--make_ref", png, "--image_size", 32, "--out", ref, "--weights")
    use = ("fid.py", png, ref, "--weights")
    assert f"error: {b}: not FID's weights" in call(*make, b, status=2)
    call(*make, a)
    said = call(*use, a)
    assert fid.WEIGHTS in said and "IS 1." in said and abs(float(re.search(r"FID (\S+)", said)[1])) < 1e-6
    assert f"error: {ref}: made with other weights" in call(*use, b, "--any_weights", status=2)
    call(*make, b, "--any_weights")
    assert "WARNING: not FID's own" in call(*use, b, "--any_weights")

    def fetch(path, local_rank=0):
        monkeypatch.setattr(fid, "URL", path.as_uri())
        monkeypatch.setattr(fid, "LOCAL_RANK", local_rank)
        return fid.make_extractor("inception").sha256
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    for path, told in ((gone, "gone.pth.*hub/checkpoints.*--weights"), (b, "invalid hash")):
        pytest.raises(UserError, fetch, path).match(told)
    pytest.raises(FileNotFoundError, fetch, a, local_rank=1)
    assert not list((hub / "checkpoints").iterdir()) and fetch(a) == fid.WEIGHTS
    a.unlink()
    assert fetch(a) == fid.WEIGHTS
    capsys.readouterr()
    for key, n, reference, weights, warnings in (
            ("fid", 2047, 0, fid.WEIGHTS, 1), ("fid", 2048, 0, fid.WEIGHTS, 0), ("fid", 9999, 2047, None, 1),
            ("fid", 2048, 0, "others", 1), ("pixel_distance", 9, 0, None, 0)):
        fid.show({key: 3.0, "n": n}, fid.Source("ref.npz", reference), weights)
        said = capsys.readouterr().out
        assert said.lower().count("warning") == warnings and ("FID 3" in said) == (key == "fid")

# ---- Faults: interruptions, lost processes, full disks, files that are not what they say -------------------

@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes there")
@pytest.mark.parametrize("processes, victim, status, told", [
    (None, None, 2, r"\S*/5.png: not a readable image"), (2, None, 1, r"\S*/5.png: not a readable image"),
    (None, -1, 2, "a loading process died, .*--workers"), (2, 0, 1, "process 0 lost the others")])
def test_fault_of_one_process_ends_everything_with_one_line(tmp_path, processes, victim, status, told):
    """A damaged image that a loader meets; a loader killed as for memory, or one of two that train."""
    for i, image in enumerate(noise(9, 16, 16, 3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    if victim is None:
        os.truncate(tmp_path / "5.png", 400)
    words = "--batch_size 4 --preset demo --image_size 16 --workers 2 --steps 1000000 --data".split()
    process = start(*TINY, *words, tmp_path, "--out", tmp_path / "out", processes=processes,
                    wait_for="writes to" if victim is None else "step 3/")    # the start has not read it
    if victim is not None:
        os.kill(alive(process.mark, *(["RANK=1"] if processes else []))[victim], signal.SIGKILL)
    said = ending(process, status, None if victim is None else time.time())
    assert len(re.findall(f"^error: {told}", said, re.M)) == 1 and said.count("5.png") == (victim is None)
    assert processes or said.count("error: ") == 1 and "Traceback" not in said

def test_kill_at_a_random_moment_leaves_a_loadable_checkpoint(tmp_path):
    """Of a run that saves every step, twice here, with ENDURANCE=1 fifty times: it loads and only grows."""
    steps, words = [0], (*TINY, "--steps", 10 ** 6, "--save_every", 1, "--out", tmp_path)
    for _ in range(50 if os.environ.get("ENDURANCE") else 2):
        process = start(*words, wait_for=f"step {steps[-1] + 2:,}/")
        time.sleep(random.random())
        process.kill()
        process.communicate()
        steps.append(read_tensors(tmp_path / "ckpt.pt")["step"])
        assert steps[-1] > steps[-2]

def test_bad_steps_and_full_disks_leave_the_last_good_checkpoint(call, photos, tmp_path):
    """Weights thrown to 1e30, a disk without room: one line, status 2, no NaN, no temporary or half file."""
    run, array, samples = (tmp_path / name for name in ("run", "p.npy", "s.npz"))
    said = call(*TINY, "--steps", 30, "--lr", "1e30", "--save_every", 1, "--out", run, status=2)
    assert "10 steps in a row" in said and "try a lower --lr" in said and "| skipped 9" in said
    file = read_tensors(run / "ckpt.pt")
    assert file["step"] == int(re.search(r"at step (\d+) is intact", said)[1]) >= 1
    assert all(t.isfinite().all() for part in (file["model"], *file["ema"].values()) for t in part.values())
    state = State(KDiff(Bare(), num_classes=8), [0.9])
    state.averages["0.9"][0].fill_(math.nan)
    saved = pytest.raises(UserError, train.save, tmp_path / "nan.pt", state, {}, Codec(), Shapes(8, 8))
    saved.match("after step 0 are not finite")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 16, before[1]))           # no file grows beyond 64 kB
    try:
        for named, *words in (
                ("held before is intact", *TINY, "--steps", file["step"] + 2, "--out", run),
                ("p.npy", "data.py", "pack", photos, "--image_size", 128, "--out", array),
                ("s.npz", "sample.py", run / "ckpt.pt", "--n", 30, "--steps", 9, "--out", samples)):
            said = call(*words, status=2)
            assert said.count("error: ") == 1 and named in said and "written" in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_tensors(run / "ckpt.pt")["step"] == file["step"] and not list(tmp_path.rglob("*.tmp*"))
    assert not array.exists() and not samples.exists()

@pytest.mark.parametrize("error, said, status, local_rank", [
    (FileNotFoundError(2, "No such file", "a.csv"), "a.csv: No such file", 2, 0), (UserError("a"), "", 2, 1),
    (torch.cuda.OutOfMemoryError("CUDA"), "out of GPU memory: try half the", 2, 1),
    (data.FileError("Caught FileError\nThen\ndata.FileError: a: b Error: c"), "a: b Error: c\n", 2, 1),
    (UserError("a: not whole (KeyError: b)"), "a: not whole (KeyError: b)\n", 2, 0),
    (KeyboardInterrupt(), "", 130, 0), (ConnectionResetError(104, "reset"), "a loading process died", 2, 0)])
def test_errors_are_explained_in_one_line(monkeypatch, capsys, error, said, status, local_rank):
    """Paths, memory, lost processes; of two, one prints what both met; bugs of ours keep their traceback."""
    def fail(): raise error
    monkeypatch.setattr(data, "LOCAL_RANK", local_rank)
    exit, printed = pytest.raises(SystemExit, run, fail), capsys.readouterr().err
    assert exit.value.code == status and printed.startswith(f"error: {said}" if said else "")
    assert printed.count("\n") == bool(said)
    for error in (OSError("no file"), RuntimeError("shapes differ")):
        pytest.raises(type(error), run, fail).match(str(error))

def test_bad_files_are_named_and_nothing_is_unpickled(tmp_path, monkeypatch):
    """Payloads of pickles; images cut, empty, vanished, too long, a pipe, a bomb; links in a circle; none."""
    class Payload:                                                            # unpickled, it creates a file
        def __reduce__(self): return os.system, ("touch marker",)
    monkeypatch.chdir(tmp_path)
    torch.save({"config": {}, "data": Payload()}, "a.pt")
    np.save("b.npy", payload := np.array([Payload()], dtype=object), allow_pickle=True)
    np.savez("c.npz", mu=payload, sigma=SIGMA)
    for path, f, how in (("a.pt", load, None), ("b.npy", open_dataset, 9), ("c.npz", fid.open_npz, "pixels")):
        pytest.raises(UserError, f, path, how).match(path)
    assert not Path("marker").exists()
    Image.fromarray(noise(40, 40, 3)).save("good.png")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:900])
    Path("empty.jpg").touch()
    os.mkfifo("pipe.png")
    for name, size in (("bomb.png", (30000, 30000)), ("thread.png", (1, 101))):
        Image.new("1", size).save(name)
    for name in ("cut.png", "empty.jpg", "bomb.png", "gone.png", "thread.png", "pipe.png"):
        pytest.raises(UserError, read_image, name).match(name)
    Image.new("P", (1, 100), 0).save("long.png", transparency=0)              # is read, and becomes white
    assert np.array_equal(read_image("long.png"), np.full((100, 1, 3), 255))
    Path("class").mkdir()
    for name, told in ((".", "class: a class folder without images"), ("class", "holds no images"),
                       ("nowhere", "nowhere: no such file"), ("good.png", "good.png: not a readable array")):
        pytest.raises(UserError, open_dataset, name, 32).match(told)
    Path("class", "loop").symlink_to(tmp_path)
    pytest.raises(UserError, open_dataset, ".", 32).match("loop: a link in a circle")

BAD = {
    "train.py --batch_size 0": "--batch_size 0: at least 1", "train.py --lr nan": "--lr nan: at least 0",
    "train.py --ema 0.9 1": "--ema [0.9, 1.0]: decays", "sample.py nowhere.pt": "nowhere.pt",
    "train.py --target two --loss u": "two", "train.py --target eps --tau 0": "--tau 0 with --target eps",
    "train.py --data . --image_size 64": "--image_size 64 has no network in Table 4: try --preset small",
    "train.py --device cpux": "--device cpux is not usable", "train.py --step 3": "--step",
    "train.py --init nowhere.pt --out out": "nowhere.pt", "fid.py nowhere nowhere": "nowhere",
    "train.py --space latent --image_size 30": "--image_size 30", "sample.py a.pt --out a.jpg": "--out a.jpg",
    "train.py --data .. --space latent": "--tokenizer pca, or run", "sample.py a.pt --n 0": "--n 0: at least",
    "sample.py a.pt --fid ref.npz --out a.png": "leave out --out",
    "sample.py a.pt b.pt": "one checkpoint at a time", "fid.py nowhere": "give SAMPLES and REF, or --make",
    "fid.py --make_ref shapes --image_size 32 --out ref": "give SAMPLES and REF, or --make_ref",
    "data.py pack nowhere --out out/x.npy": "nowhere: no such folder",
    "data.py encode . --out out --tokenizer nowhere.pt": "nowhere.pt",
    "data.py encode . --out out": "encode needs --tokenizer"}

@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, call, words):
    """The line names the flag or file; nothing is written."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / ".here").mkdir()
    monkeypatch.chdir(tmp_path / ".here")
    *said, last = call(*words.split(), status=2).splitlines()
    assert last.startswith("error: ") and BAD[words] in last and "error: " not in "".join(said)
    assert not list(Path().iterdir())

def test_corruption_of_any_file_is_an_error_line_or_harmless(samples):
    """Images, checkpoints, arrays, latents: UserError, or read as what they still are; ENDURANCE=1: 220."""
    def read_samples(path): return list(fid.open_source(str(path), "pixels").batches(5))
    def read_latents(path): return list(torch.utils.data.DataLoader(open_dataset(path.parent, 8)))
    openers = dict.fromkeys(("a.png", "a.jpg", "a.webp", "a.bmp"), read_image)
    for name in openers:
        Image.fromarray(noise(24, 24, 3)).save(samples[0] / name)
    openers |= dict.fromkeys(("stored.npz", "deflated.npz", "packed.npy"), read_samples)
    openers |= dict.fromkeys(("shards/a.safetensors", "shards/latents_stats.pt"), read_latents)
    openers |= {"ref.npz": lambda path: fid.load_reference(str(path), "pixels"), "a.pt": load}
    rng, refused, latents = random.Random(1), 0, np.zeros((3, 2, 2, 2), "<f4")
    (samples[0] / "shards").mkdir()
    parts = dict(latents=latents, latents_flip=latents, labels=np.zeros(3, "<i8"))
    save_safetensors(samples[0] / "shards", parts, "a.safetensors")
    np.savez(samples[0] / "ref.npz", mu=MU, sigma=SIGMA)
    torch.save(model.build("JiT-narrow/8", 16, 8).half().state_dict(), samples[0] / "a.pt")
    for i in range(220 if os.environ.get("ENDURANCE") else 44):
        name, opener = list(openers.items())[i % len(openers)]
        whole = (path := samples[0] / name).read_bytes()
        at, stretch = rng.randrange(len(whole)), rng.randint(1, 64)
        part, rest = whole[at:at + stretch], whole[at + stretch:]     # cut off, removed, overwritten, doubled
        end = rng.choice((b"", rest, rng.randbytes(len(part)) + rest, 2 * part + rest))
        path.write_bytes(whole[:at] + end)
        try:
            opener(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
        opener(path)
    assert refused > i / 4

# ---- Beyond the paper: the spectrum of k, real pictures, machines; README.md -------------------------------

def test_spectrum_of_k_is_what_descent_and_regression_find():
    """Of directions, and of all under louder noise, by training; of coordinates given the others, by grid."""
    variances = torch.tensor([4, 1, 0.3, 0.1])
    kdiff, _ = train_linear(variances, "channel", steps=1500, batch=256, k_rate=8.0)
    learned, expected = torch.sigmoid(kdiff.w.detach()).flatten().tolist(), [1 / 5, 1 / 2, 1 / 1.3, 1 / 1.1]
    assert learned == pytest.approx(expected, abs=0.02)
    assert k_of_direction(variances).tolist() == pytest.approx(expected)
    kdiff, _ = train_linear(variances / 4, steps=1500, batch=256)
    assert kdiff.ks()["k"].item() == pytest.approx(4 / (4 + 5.4 / 4), abs=0.02)
    x = (normal("x", 4000, 6) @ normal("mix", 6, 6)).view(-1, 3, 2, 1)
    ours = k_of_innovation(x, -0.8, 0.8, noise_scale=2.0, points=100)
    S, ks = np.cov(x.flatten(1).double().numpy(), rowvar=False), np.linspace(0, 1, 4001)[1:-1, None]
    t = 1 / (1 + np.exp(0.8 - 0.8 * scipy.stats.norm.ppf((np.arange(100) + 0.5) / 100)))
    left = np.zeros((100, 6))                           # of a coordinate at every time, k then from a grid
    for i in range(6):
        rest, cross = np.delete(np.delete(S, i, 0), i, 1), np.delete(S[i], i)
        inverses = np.linalg.inv(rest + np.eye(5) * (2 * (1 - t) / t)[:, None, None] ** 2)
        left[:, i] = S[i, i] - inverses @ cross @ cross
    for c, s in enumerate(left.reshape(100, 3, 2).mean(2).T):
        loss = ((s * ks ** 2 + 4 * (1 - ks) ** 2) / (ks * (1 - t) + (1 - ks) * t) ** 2).mean(1)
        assert ours[c].item() == pytest.approx(ks[loss.argmin(), 0], abs=5e-4)

def test_fashion_is_padded_and_trains_and_bad_files_get_one_line(call, monkeypatch, tmp_path):
    """28 px in the middle of 32, grey thrice; missing, cut, other content, no network; kept once checked."""
    pixels, packed, folder = noise(40, 28, 28), [], tmp_path / "idx"
    header, labels = b"\0\0\x08\3" + np.array([40, 28, 28], ">u4").tobytes(), bytes(i % 10 for i in range(40))
    folder.mkdir()
    for name, content in (("labels-idx1", header[:8] + labels), ("images-idx3", header + pixels.tobytes())):
        packed.append(gzip.compress(content))
        (images := folder / f"train-{name}-ubyte.gz").write_bytes(packed[-1])
        monkeypatch.setitem(data.Fashion.sha256, f"train-{name}-ubyte", hashlib.sha256(content).hexdigest())
    image, label = (dataset := open_dataset("fashion", 32, folder))[13]
    assert len(dataset) == 40 and dataset.classes[label] == "dress" and image.shape == (3, 32, 32)
    assert np.array_equal(image[1, 2:30, 2:30], pixels[13]) and image.sum() == 3 * int(pixels[13].sum())
    words = ("train.py", "--data", "fashion", "--batch_size", 4, "--samples", 0)
    call(*words, "--space", "latent", "--steps", 1, "--out", tmp_path / "run", "--data_dir", folder)
    found = call(*(words := (*words, "--dry_run", "--data_dir")), folder)
    assert "writes to out/pixel-fashion" in found and re.search(r"time +\S+ s a step", found)
    for content, said in ((packed[1][:-9], "not Fashion-MNIST"), (gzip.compress(b"other"), "checksum")):
        images.write_bytes(content)
        assert said in call(*words, folder, status=2)
    images.unlink()
    assert "holds no train-images" in call(*words, folder, status=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Path, "is_file", lambda path: str(path).startswith(str(tmp_path)) and path.exists())
    for answers in ([], [b"a login page"], packed):
        monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answers.pop()))
        if answers is not packed:
            assert "--data_dir" in call(*words[:-1], status=2) and not (tmp_path / ".cache").exists()
    assert len(data.Fashion()) == len(data.Fashion()) == 40 and not answers

def test_busy_cores_or_no_compiler_cost_a_line(monkeypatch, capsys, tmp_path):
    """A process with less than 0.7 of its threads' time loses a thread; networks stay eager, not an error."""
    threads, clock = [], np.zeros(2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    clocks = dict(perf_counter=lambda: clock[0], process_time=lambda: clock[1])
    monkeypatch.setattr(train, "time", SimpleNamespace(**clocks))
    state = State(KDiff(Linear(4, 4), num_classes=1), [0.9])
    log = train.Log(tmp_path / "log.csv", state, argparse.Namespace(batch_size=8, steps=9), range(16))
    for wall, used, expected in ((1.9, 0.1, []), (0.2, 4.0, []), (2.1, 1.3, [1]), (2.1, 4.0, [1])):
        clock += wall, used
        log.add(0.5, 1.0)
        assert threads == expected
    assert "other programs left 0.6 of 2 cores" in capsys.readouterr().out
    def broken(*args, **kw): raise RuntimeError("no compiler\nfound")
    monkeypatch.setattr(torch, "compile", broken)
    compile_network(state.kdiff.net)
    assert "not compiled" in (said := capsys.readouterr().out) and said.count("\n") == 1
    assert state.kdiff.net(torch.ones(1, 4, 1, 1), None, None).shape == (1, 4, 1, 1)

def test_every_readme_command_is_understood(tmp_path, monkeypatch):
    """Its script parses its flags, loops at their first value; train.py does a dry run on small stand-ins."""
    text = (HERE / "README.md").read_text()
    blocks, inline = re.findall(r"```bash\n(.*?)```", text, re.S), re.sub("```.*?```", "", text, flags=re.S)
    calls = re.findall("`((?:python|torchrun) (?!data)[^`]+)`", inline)
    text = "\n".join(blocks + [call.replace("\n", " ") for call in calls]).replace("\\\n", " ")
    for name, value in re.findall(r"for (\w+) in (\S+)", text):
        text = text.replace(f"${name}", value)
    commands = [shlex.split(call, comments=True) for call in
                re.findall(r"(?:python|torchrun|-\S+)[ =](?:HOST:29500 )?(\w+\.py[^;&|\n]*)", text)]
    for name in ("imagenet/train", "photos", "latents"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name / "a.png")
    np.save(tmp_path / "imagenet256.npy", np.zeros(2, [("image", "u1", (3, 256, 256)), ("label", "<i8")]))
    latents = np.random.RandomState(0).standard_normal((2, 32, 16, 16)).astype(np.float16)
    parts = dict(latents=latents, latents_flip=latents, labels=np.zeros(2, int))
    save_safetensors(tmp_path / "latents", parts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "Fashion", lambda size, folder: Shapes(80, size))
    monkeypatch.setattr(train, "time_a_step", lambda *args: None)             # minutes, for some
    scripts = {"train.py": train.main, "sample.py": sample.parse, "data.py": data.parse, "fid.py": fid.parse}
    assert len(commands) >= 20 and {words[0] for words in commands} >= {
        *scripts, "objective.py", "model.py", "test_all.py"}
    for script, *flags in commands:
        if script == "train.py" and "--tokenizer" in flags:                   # a file that only a user has
            del flags[flags.index("--tokenizer"):flags.index("--tokenizer") + 2]
        monkeypatch.setattr(sys, "argv", [script, *flags, *["--dry_run"] * (script == "train.py")])
        scripts.get(script, lambda: None)()

if __name__ == "__main__":                                        # one of the processes of the fixture `two`
    run(lambda: work_of_two(sys.argv[1]))
