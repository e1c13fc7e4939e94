"""Every claim of the other files, each test named after one: `pytest test_all.py`, no network, no GPU."""
import argparse
import colorsys
import copy
import csv
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
from shutil import which
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
from data import (VAVAE, Codec, ImageFolder, Latents, PatchPCA, Shapes, UserError, crop, open_dataset, order,
                  pack, read_image, read_tensors, run, seed_of)
from model import JiT
from objective import (KDiff, Linear, k_of_direction, k_of_innovation, k_of_t, logit_normal, optimal_k,
                       optimal_loss, train_linear)
from sample import compile_network, generate, guided, integrate, load, nearest, read_log
from train import State

HERE = Path(__file__).parent
TINY_JIT = dict(image_size=32, patch_size=8, dim=64, depth=6, heads=4, num_classes=10, bottleneck=16,
                context_tokens=4, context_start=2)
TINY_DIT = dict(image_size=8, patch_size=1, in_channels=4, dim=64, depth=4, heads=4, num_classes=10)
JIT, DIT = (model.JiT, TINY_JIT), (model.DiT, TINY_DIT)
needs_compiler = pytest.mark.skipif(not (which("g++") or which("clang++")), reason="needs a C++ compiler")

def normal(key, *shape):
    """Normal numbers that depend on the key alone (numpy's legacy generator is frozen)."""
    return torch.tensor(np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)).float()

def noise(*shape):
    """uint8 pixels, always the same for one shape."""
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)

def fill(net, conv_gain=1.0):
    """Weights as a function of their key; the tables of positions stay."""
    for key, value in net.state_dict().items():
        if "pos_embed" in key or "feat_rope" in key or "num_batches_tracked" in key:
            continue
        r = normal(key, *value.shape)
        if key.endswith("running_var"):
            value.copy_(1 + 0.1 * r.abs())
        elif value.ndim > 1:
            value.copy_(r / math.sqrt(value[0].numel()) * (conv_gain if value.ndim == 4 else 1))
        else:
            value.copy_(0.1 * r + key.endswith("weight"))
    return net.eval()

# ------------------------------------------------------------------------------------------------------------
# model.py

def inputs(config, n=3):
    """x, t, y of a batch for a network of this config; label 10 is the null class."""
    x = normal("x", n, config.get("in_channels", 3), config["image_size"], config["image_size"])
    return x, torch.tensor([0.05, 0.5, 0.93])[:n], torch.tensor([0, 3, 10])[:n]

def error(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.double().norm()).item()

def digest(net):
    """A checksum of the state dict's keys and shapes; those in these tests come from the published files."""
    return zlib.crc32(repr(sorted((key, *value.shape) for key, value in net.state_dict().items())).encode())

def plain_network(state, x, t, y, heads, p, start=None):
    """Both transformers in float64 and in plain formulas: explicit rotation matrices, softmax, loops."""
    state, x = {key: value.double() for key, value in state.items()}, x.double()
    def linear(name, v): return v @ state[name + ".weight"].flatten(1).T + state.get(name + ".bias", 0)
    def rms(name, v): return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name + ".weight"]
    def modulated(name, v, m, s): return rms(name, v) * (1 + s[:, None]) + m[:, None]

    f = t.double()[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)]).double()
    label = state["y_embedder.embedding_table.weight"][y]
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([f.cos(), f.sin()], 1))))
    condition, v = F.silu(time + label), F.unfold(x, p, stride=p).transpose(1, 2)
    for name in ("x_embedder.proj", "x_embedder.proj1", "x_embedder.proj2"):
        v = linear(name, v) if name + ".weight" in state else v
    (N, T, D), h = v.shape, v.shape[2] // heads
    turn = torch.zeros(T, h, h).double()                          # a rotation matrix for each token
    for n in range(T):
        row, column = divmod(n, math.isqrt(T))
        v[:, n] += torch.tensor([f(place * 10000 ** (-i / (D / 4))) for place in (column, row)
                                 for f in (math.sin, math.cos) for i in range(D // 4)])
        angles = [place * 10000 ** (-2 * i / (h / 2)) for place in (row, column) for i in range(h // 4)]
        turn[n] = torch.block_diag(*[torch.tensor([[0, -a], [a, 0]]).double() for a in angles]).matrix_exp()

    for i in range(sum(key.endswith("attn.qkv.weight") for key in state)):
        b = f"blocks.{i}."
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
@torch.no_grad()
def test_networks_agree_with_plain_formulas_and_the_official_code(network, config, change, recorded):
    """With recorded norm and values; class tokens from any block or none; patches, channels, q/k norm."""
    config = config | change
    net, args = fill(network(**config)), inputs(config)
    out, state = net(*args), net.state_dict()
    assert ("in_context_posemb" in state) == (config.get("context_tokens", 0) > 0)
    assert ("blocks.0.attn.q_norm.weight" in state) == config.get("qk_norm", network is model.JiT)
    plain = plain_network(state, *args, 4, config["patch_size"], config.get("context_start"))
    assert error(out, plain) < 2e-6
    if recorded:
        assert out.double().norm().item() == pytest.approx(recorded[0], rel=2e-6)
        assert out.flatten()[::out.numel() // 2].tolist() == pytest.approx(recorded[1:], abs=2e-5)

@torch.no_grad()
def test_vavae_gives_the_recorded_outputs():
    """Recorded from a network that agreed with the published one; logvar is clamped, the mean is not."""
    assert digest(model.Autoencoder()) == 1982465131
    net = fill(model.Autoencoder(widths=(32, 32, 64, 64, 128)))
    mean, logvar = net.encode(normal("image", 1, 3, 32, 32).clamp(-1, 1))
    decoded = net.decode(normal("latent", 1, 32, 2, 2))
    for ours, step, theirs in (
            (mean, 21, [-0.6117827, 0.0519157, -0.3235235, -0.3613891, -0.5173731, 0.2138819, -0.0047993]),
            (logvar, 21, [-0.2333690, 0.5852250, -0.2726730, -0.1882787, 0.2563668, 0.3818888, -0.2070874]),
            (decoded, 512, [-0.0909988, -0.0762513, 0.4537423, 0.1829014, 0.3043323, 0.1066596])):
        assert error(ours.flatten()[::step], torch.tensor(theirs)) < 5e-6
    for value, bound in ((100.0, 20.0), (-100.0, -30.0)):
        net.quant_conv.bias.fill_(value)
        mean, logvar = net.encode(normal("image", 1, 3, 48, 64))
        assert (logvar == bound).all() and (mean.abs() > 50).all() and mean.shape == (1, 32, 3, 4)

@pytest.mark.parametrize("name, shape, params, gflops, keys", [
    ("JiT-B/16", (3, 256, 256), 131, 25, 1938688673), ("JiT-B/32", (3, 512, 512), 133, 26, None),
    ("JiT-L/16", (3, 256, 256), 459, 88, None), ("JiT-H/16", (3, 256, 256), 953, 182, None),
    ("LightningDiT-XL/1", (32, 16, 16), 675, 119, 625017063)])
def test_published_sizes_have_the_published_params_gflops_and_keys(name, shape, params, gflops, keys):
    """The papers' tables (millions; billions of multiply-adds for one image), the files' keys and shapes."""
    with torch.device("meta"):
        net = model.build(name, shape[1], num_classes=1000)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == params
    assert round(model.gmacs(net, shape)) == gflops and (not keys or digest(net) == keys)

@torch.no_grad()
def test_rope_tables_of_a_file_are_checked_but_not_used():
    """The published ones are saved; wrong numbers change nothing, wrong shapes or no tables are errors."""
    net, args = fill(model.DiT(**TINY_DIT)), inputs(TINY_DIT)
    out, state = net(*args), net.state_dict()
    angles = torch.tensor([[place / 10 ** (i // 2) for place in divmod(n, 8) for i in range(8)]
                           for n in range(64)])
    assert error(state["feat_rope.freqs_cos"], angles.cos()) < 1e-6
    assert error(state["feat_rope.freqs_sin"], angles.sin()) < 1e-6
    net.load_state_dict(state | {name: torch.full((64, 16), 7.0) for name in state if "feat_rope" in name})
    assert torch.equal(net(*args), out)
    table = {"feat_rope.freqs_sin": torch.zeros(49, 16)}
    for wrong in (state | table, {key: state[key] for key in state.keys() - table}):
        pytest.raises(RuntimeError, net.load_state_dict, wrong).match("freqs_sin")

@torch.no_grad()
def test_dropout_acts_in_the_middle_half_and_in_training_only():
    """Each block twice on one input; in the MLP dropout sits before w3, in attention after proj."""
    net = fill(model.JiT(**TINY_JIT | dict(depth=10, dropout=0.5))).train()
    x, condition, rope = normal("tokens", 2, 16, 64), normal("condition", 2, 64), net.rope[:, -16:]
    random = [not torch.equal(block(x, condition, rope), block(x, condition, rope)) for block in net.blocks]
    assert random == [2 <= i < 6 for i in range(10)]
    assert 0.4 < (net.blocks[2].attn(x, rope) == 0).float().mean() < 0.6
    assert (net.blocks[2].mlp(x) == 0).float().mean() < 0.1
    undropped, args = fill(model.JiT(**TINY_JIT | dict(depth=10))), inputs(TINY_JIT)
    assert torch.equal(net.eval()(*args), undropped(*args))

@pytest.mark.parametrize("network, config", [JIT, DIT])
def test_networks_start_at_zero_with_the_stated_spread(network, config):
    """adaLN-zero: the output is 0 and blocks are the identity; Xavier elsewhere, 0.02 in the embeddings."""
    torch.manual_seed(0)
    net, x = network(**config), normal("tokens", 1, 4, 64)
    assert not net(*inputs(config)).any()
    assert torch.equal(net.blocks[0](x, normal("c", 1, 64), net.rope[:, :4]), x)
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    for part in (net.t_embedder.mlp[0], net.t_embedder.mlp[2], net.y_embedder.embedding_table):
        assert part.weight.std().item() == pytest.approx(0.02, rel=0.1)
    if network is model.JiT:
        assert net.in_context_posemb.std().item() == pytest.approx(0.02, rel=0.2)
    for part in (net.blocks[0].attn.qkv, net.blocks[0].mlp.w3, *net.x_embedder):
        bound = math.sqrt(6 / sum(part.weight.flatten(1).shape))
        assert part.weight.abs().max().item() == pytest.approx(bound, rel=0.05)

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("network, config", [JIT, DIT])
@torch.no_grad()
def test_bf16_autocast_keeps_norms_time_and_stream_in_float32(network, config):
    """Close to float32; norms lose no digit, the time embedding is that of float64, the stream float32."""
    net, outs, args = fill(network(**config)), [], inputs(config)
    for part in (net.t_embedder, *net.blocks):
        part.register_forward_hook(lambda *called: outs.append(called[-1]))
    exact = net(*args)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(*args)
        norm, (x, shift, scale) = net.blocks[0].norm1, normal("x", 3, 5, 64).bfloat16()
        normed, modulated = norm(x), norm(x, shift, scale)
    assert 1e-4 < error(rough, exact) < 2e-2
    assert torch.equal(outs[0], outs[len(outs) // 2]) and {out.dtype for out in outs} == {torch.float32}
    f = args[1].double()[:, None] * 1e4 ** -(torch.arange(128).double() / 128)
    assert error(outs[0], net.t_embedder.mlp.double()(torch.cat([f.cos(), f.sin()], 1))) < 6e-8
    x = F.rms_norm(x.double(), x.shape[-1:], norm.weight.double(), 1e-6)
    assert error(normed, x) < 1e-6 and error(modulated, x * (1 + scale.double()) + shift) < 1e-6

@needs_compiler
def test_compiled_and_checkpointed_networks_agree_with_eager():
    """Output and gradients, which lie in memory as their parameters do; the keys of the state dict stay."""
    config = TINY_JIT | dict(depth=1, context_start=0)
    nets = eager, compiled, checkpointed = [fill(model.JiT(**config)) for _ in range(3)]
    compiled.compile(dynamic=False)
    checkpointed.checkpointing = True
    expected = eager(*inputs(config)).detach()
    for net in nets:
        out = net(*inputs(config))
        out.square().mean().backward()
        assert error(out, expected) < 2e-6 and net.state_dict().keys() == eager.state_dict().keys()
        for a, b in zip(net.parameters(), eager.parameters()):
            assert error(a.grad, b.grad) < 2e-5 and a.grad.stride() == a.stride()
    assert all(part._compiled_call_impl for part in (*compiled.blocks, compiled.final_layer))

def test_names_carry_the_patch_and_keywords_win():
    """Any number behind the slash is a patch, keywords override the table; what is wrong is named."""
    with torch.device("meta"):
        assert model.build("JiT-S/4", image_size=64, num_classes=10).pos_embed.shape == (1, 256, 384)
        net = model.build("LightningDiT-B/4", 16, 10, in_channels=4, patch_size=2, qk_norm=True, depth=1)
    assert net.x_embedder.proj.weight.shape == (768, 4, 2, 2) and hasattr(net.blocks[0].attn.q_norm, 'weight')
    for name, size, start, message in (
            ("JiT-B/16", 250, 4, "^image_size 250 is not a multiple of patch_size 16: try 256$"),
            ("JiT-demo/8", 32, 4, "^context_start 4 lies behind the last block: try 3$"),
            *((name, 256, 4, name + ".*JiT-B/16.*LightningDiT-XL/1") for name in ("JiT-X/16", "JiT-B/0"))):
        pytest.raises(ValueError, model.build, name, size, 10, context_start=start).match(message)

# ------------------------------------------------------------------------------------------------------------
# objective.py

def kdiff_for(target, u=None, **kw):
    """A KDiff whose network answers u and whose learnable w is not at its start, in float64."""
    kdiff = KDiff(lambda z, t, y: u, target, num_classes=10, channels=2, **kw).double()
    if kdiff.w is not None:
        kdiff.w.data = torch.linspace(-1.0, 2.0, kdiff.w.numel()).double().view(kdiff.w.shape)
    return kdiff

@pytest.mark.parametrize("target", [*objective.TARGETS, "0.3", 1.0])
@pytest.mark.parametrize("loss", ["u", "x", "eps", "v"])
def test_velocity_and_loss_are_those_of_the_solved_x_and_e(target, loss):
    """Against solving for x^ and e^ with a linear solver, at times where nothing is clamped."""
    if (target, loss) == ("two", "u"):
        return                                                               # refused, see below
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x, e, u_hat = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64)
    kdiff, s = kdiff_for(target, u_hat, tau=0.05, loss=loss), t.view(-1, 1, 1, 1)
    (c, d), z = kdiff.coefficients(t), s * x + (1 - s) * e
    matrix = torch.stack([entry.expand(z.shape) for entry in (s, 1 - s, c, d)], -1).unflatten(-1, (2, 2))
    x_hat, e_hat = torch.linalg.solve(matrix, torch.stack([z, u_hat], -1)).unbind(-1)
    errors = {"u": u_hat - c * x - d * e, "x": x_hat - x, "eps": e_hat - e, "v": (x_hat - e_hat) - (x - e)}
    torch.testing.assert_close(kdiff.loss(x, None, t, e), errors[loss].square().mean(), atol=1e-10, rtol=1e-5)
    torch.testing.assert_close(kdiff.velocity(u_hat, z, t), x_hat - e_hat, atol=1e-10, rtol=1e-5)

@pytest.mark.parametrize("target, c, d", [
    ("x", 1, 0), ("v", 1, -1), ("eps", 0, -1), ("0.3", 0.3, -0.7), ("k", 0.5, -0.5), ("two", 0.5, -0.5),
    (0.0, 0, -1), ("time", 0.5, -0.5), ("channel", 0.5, -0.5)])
def test_targets_are_those_of_the_table(target, c, d):
    """Their coefficients where w is at its start, at any time; what is learned is told by its name."""
    kdiff = KDiff(None, target, num_classes=10, channels=4)
    for value, of_table in zip(kdiff.coefficients(torch.tensor([0.0, 0.4, 1.0])), (c, d)):
        assert len(value) == 3 and {round(v, 6) for v in value.flatten().tolist()} == {of_table}
    names = {"two": ["k1", "k2", "k"], "channel": ["k", "k_min", "k_max"]}.get(target, ["k"])
    ks = {name: k.item() for name, k in kdiff.ks().items()}
    assert ks == pytest.approx(dict.fromkeys(names, c / (c - d)))

def test_edm_is_what_the_input_does_not_tell_and_asym_has_noise_in_eight_channels():
    """E[u z] = c t + d (1-t) = 0 for white data, at c^2 + d^2 = 1; u = x - e in eight channels, then x."""
    t = torch.linspace(0, 1, 11)
    c, d = (value.flatten() for value in KDiff(None, "edm", num_classes=10).coefficients(t))
    assert (c * t + d * (1 - t)).abs().max() < 1e-6 and (c * c + d * d - 1).abs().max() < 1e-6
    c, d = KDiff(None, "asym", num_classes=10, channels=10).coefficients(t)
    assert (c == 1).all() and d[3].flatten().tolist() == [-1] * 8 + [0] * 2

def test_one_clamp_bounds_loss_and_velocity():
    """At t = 1 x-prediction divides by tau in both; its own x-loss stays the plain MSE."""
    (x, e, u), one = torch.randn(3, 1, 2, 3, 3).double(), torch.ones(1).double()
    torch.testing.assert_close(kdiff_for("x", tau=0.05).velocity(u, x, one), (u - x) / 0.05)
    for target, loss, t, expected in (("x", "v", one, (u - x) / 0.05), ("x", "x", one, u - x),
                                      ("eps", "eps", 0 * one, u + e)):
        kdiff = kdiff_for(target, u, tau=0.05, loss=loss)
        torch.testing.assert_close(kdiff.loss(x, None, t, e), expected.square().mean())

def test_k_of_t_is_linear_between_its_129_points():
    """At the end points the sigmoid of their w, half-way their mean; the k told is their mean."""
    kdiff, t = KDiff(None, "time", num_classes=10), torch.arange(129) / 128
    kdiff.w.data = torch.randn(129)
    k = torch.sigmoid(kdiff.w.data)
    torch.testing.assert_close(k_of_t(kdiff.w.data, t), k)
    torch.testing.assert_close(k_of_t(kdiff.w.data, t[:-1] + 1 / 256), (k[1:] + k[:-1]) / 2)
    torch.testing.assert_close(kdiff.ks()["k"], k.mean())

def test_draws_follow_table_4():
    """logit(t) is normal, noise has its scale, a tenth of labels drop; each image follows its seed alone."""
    torch.manual_seed(0)
    kdiff = KDiff(None, num_classes=10, noise_scale=2.0)
    x, y = torch.zeros(4000, 1, 4, 4), torch.arange(4000) % 10
    for t, e, labels in (kdiff.draw(x, y), kdiff.draw(x, y, range(4000))):
        logit, dropped = torch.logit(t), labels == 10
        assert abs(logit.mean() + 0.8) < 0.05 and abs(logit.std() - 0.8) < 0.05 and abs(e.std() - 2) < 0.02
        assert abs(dropped.float().mean() - 0.1) < 0.02 and (labels[~dropped] == y[~dropped]).all()
        correlation = torch.corrcoef(torch.stack([logit, e[:, 0, 0, 0], e[:, 0, 0, 1], dropped.float()]))
        assert abs(correlation.tril(-1)).max() < 0.06
    t2, e2, _ = kdiff.draw(x[:3], y[:3], [7, 3999, 0])
    assert torch.equal(t2, t[[7, 3999, 0]]) and torch.equal(e2, e[[7, 3999, 0]])
    assert (kdiff.tau, KDiff(None, num_classes=10).noise_scale) == (0.05, 1)

@pytest.mark.parametrize("how, named", [
    *((dict(target=target), f"target {target!r}") for target in ("y", "2", -0.1, 1.01)),
    (dict(loss="w"), "loss 'w'"), (dict(target="two", loss="u"), "two"), (dict(target="asym"), "channels")])
def test_unknown_target_or_loss_is_named(how, named):
    """A target is a row of the table or a number in [0, 1]; a loss one of four."""
    pytest.raises(ValueError, KDiff, None, num_classes=10, **how).match(named)

# ------------------------------------------------------------------------------------------------------------
# objective.py: theory

def test_eq_12_equals_monte_carlo():
    """The loss of the linear layer with the best weights for random data, noise and times."""
    torch.manual_seed(0)
    d, D, n = 3, 8, 400_000
    for c, dd, loss, density, draw, tau in (
            (0.7, -0.3, "u", torch.ones_like, lambda: torch.rand(n), 0.0),
            (lambda t: t, lambda t: t - 1, "x", torch.ones_like, lambda: torch.rand(n), 0.0),
            (0.7, -0.3, "v", logit_normal(-0.8, 0.8),
             lambda: torch.sigmoid(0.8 * torch.randn(n) - 0.8), 0.4)):
        t = draw().double()
        a, b = t, 1 - t
        c_t, d_t = (f(t) if callable(f) else torch.full_like(t, f) for f in (c, dd))
        delta = (c_t * b - d_t * a).clamp(min=tau)
        weight = {"u": 1.0, "x": ((1 - t) / delta) ** 2, "v": 1 / delta ** 2}[loss]
        x, e = (torch.randn(n, D).double() * (torch.arange(D) < data) for data in (d, D))
        a, b, c_t, d_t, weight = (torch.as_tensor(v).expand(n)[:, None] for v in (a, b, c_t, d_t, weight))
        z, u = a * x + b * e, c_t * x + d_t * e
        W = (weight * z * u).sum(0) / (weight * z * z).sum(0)
        error = (weight * (z * W - u).square()).sum(1).mean().item()
        assert error == pytest.approx(optimal_loss(c, dd, d, D, loss, density, tau), rel=0.02)

def test_objective_py_prints_theory_beside_measurement(monkeypatch, capsys):
    """In few steps: k and loss learned for each d of D = 64; of other losses the best k; of a spectrum."""
    train, seen = objective.train_linear, []
    monkeypatch.setattr(optimal_loss, "__defaults__", (*optimal_loss.__defaults__[:-1], 2000))
    monkeypatch.setattr(objective, "train_linear", lambda v, *target, **how: (
        seen.append(v) if not how else None) or train(v, *target, steps=400, batch=128))
    objective.main()
    numbers = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [list(map(float, words)) for words in numbers if len(words) == 6 and words[0] == "64"]
    assert [row[1] for row in rows] == [64, 32, 16, 8, 1] == [sum(v) for v in seen]
    for (D, d, learned, of_theorem, loss, of_eq_12), v in zip(rows, seen):
        k = 64 / (64 + d)                                                     # Eq. (12), its integrals done
        expected = d * (k ** 2 + (1 - k) ** 2 - 1.5 * (k - 0.5) ** 2) + (64 - d) * (1 - k) ** 2 / 4
        assert len(v) == D and optimal_k(d, D) == k and of_eq_12 == pytest.approx(expected, abs=1e-3)
        assert (learned, of_theorem, loss) == pytest.approx((k, k, expected), abs=0.03, rel=0.06)
    best = [float(words[-1]) for words in numbers if words and words[0] in ("u-loss,", "v-loss,")]
    assert best == pytest.approx([2 / 3, 1.0, 0.543, 0.995], abs=2e-3)
    theory = next(words[1:] for words in numbers if words[:1] == ["theory"])
    spectrum = [1 / (1 + s) for s in (4, 4, 1, 0.3, 0.1, 0.01, 0, 0)]
    assert list(map(float, theory)) == pytest.approx(spectrum, abs=6e-4)
    common = [float(words[-1]) for words in numbers if words[:2] == ["noise", "of"]]
    assert common == pytest.approx([8 / (8 + 9.41 / sigma ** 2) for sigma in (0.7, 1, 2)], abs=6e-4)

def test_modes_of_w_relax_at_their_two_rates():
    """Eq. (9): W_par and W_perp follow exponentials of rates <a^2+b^2> = 2/3 and <b^2> = 1/3 to Eq. (11)."""
    for n in (20, 60, 300):
        for target, axes, limit, rate in (("x", slice(4), 0.75, 2 / 3), ("v", slice(4, 16), -1.5, 1 / 3)):
            kdiff, _ = train_linear([1] * 4 + [0] * 12, target, steps=n, batch=2048, rate=0.05)
            mode = kdiff.net.W.diag()[axes].mean().item()
            assert mode == pytest.approx(limit * (1 - math.exp(-n * 0.05 * rate)), abs=0.02)

# ------------------------------------------------------------------------------------------------------------
# data.py

@pytest.mark.parametrize("size", [32, 96])
def test_shapes_have_the_areas_places_and_hues_of_their_factors(size):
    """Anti-aliased: areas by closed forms to 2%, whole pixels would miss by more; centres, angle, colour."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, 1001)] * 2)
    moon = 4 * ((np.hypot(x, y) < 0.95) & (np.hypot(x - 0.55, y) > 0.85)).mean()
    star = 5.5 * math.sin(math.pi / 5) * 1.1 * math.sin(0.4) / math.sin(0.4 + math.pi / 5)
    areas = (math.pi * 0.9 ** 2, 1.6 ** 2, 1.56 * 0.78 / 0.866, math.pi * (0.97 ** 2 - 0.53 ** 2),
             2 * 2 * 0.56 - 0.56 ** 2, star, math.pi * 1.1 * 0.5, moon)
    shapes, grid = Shapes(80, size), np.arange(size) + 0.5
    assert torch.equal(shapes[9][0], Shapes(1000, size)[9][0])               # whatever the number of items
    assert not torch.equal(shapes[0][0], Shapes(1, size, seed=1)[0][0])
    for i in range(80):
        place_x, place_y, radius, angle, hue = shapes.factors[i]
        image = shapes[i][0].double().numpy() / 255
        colour = image.max((1, 2))
        assert colour == pytest.approx([0.15 + 0.85 * c for c in colorsys.hsv_to_rgb(hue, 1, 1)], abs=0.02)
        assert image.min() == pytest.approx(0.06, abs=0.003) and shapes[i][1] == i % 8
        covered = ((image - 0.06) / (colour[:, None, None] - 0.06)).max(0).clip(0)
        assert covered.sum() == pytest.approx(areas[i % 8] * ((0.27 + 0.07 * radius) * size) ** 2, rel=0.02)
        x, y = (covered.sum(0) @ grid, covered.sum(1) @ grid) / covered.sum()
        if i % 8 != 7:                                                       # the moon is not symmetric
            centre = [(0.5 + 0.22 * (place - 0.5)) * size for place in (place_x, place_y)]
            assert (x, y) == pytest.approx(centre, abs=0.1)
        if i % 8 == 6:                                                       # the ellipse shows the angle
            dx, dy = grid - x, (grid - y)[:, None]
            slope = 2 * (covered * dx * dy).sum() / ((covered * dx ** 2).sum() - (covered * dy ** 2).sum())
            assert math.atan(slope) / 2 == pytest.approx(0.5 * (angle - 0.5), abs=0.02)

@pytest.fixture
def photos(tmp_path):
    """A folder of images of many kinds: modes, sizes, formats, EXIF, names."""
    root = tmp_path / "Fotos für Büro"
    for name in ("chats été", "dogs/deep er", ".hidden"):
        (root / name).mkdir(parents=True)
    pixels, exif = noise(50, 70, 3), Image.Exif()
    image = Image.fromarray(pixels)
    image.save(root / "chats été" / "a b.jpg")
    image.convert("CMYK").save(root / "chats été" / "cmyk.JPEG")
    image.convert("P").save(root / "chats été" / "p.png")
    image.convert("L").resize((40, 90)).save(root / "dogs" / "grey.bmp")
    image.convert("RGBA").save(root / "dogs" / "deep er" / "ß.webp", lossless=True)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(root / "dogs" / "sixteen.png")
    exif[0x0112] = 6                                                         # to be turned a quarter
    image.save(root / "dogs" / "turned.png", exif=exif)
    image.save(root / "beside.png")
    (root / "readme.txt").write_text("no image")
    (root / ".hidden" / "no.png").write_text("no image")
    return root

def test_folders_of_odd_images_are_read(photos, tmp_path):
    """Every mode becomes RGB, EXIF turns, 16 bits become 8, subfolders are classes, names keep letters."""
    data = ImageFolder(photos, 32)
    assert data.classes == ["Fotos für Büro", "chats été", "dogs"] and len(data) == 8
    assert [data[i][1] for i in range(8)] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert all(data[i][0].shape == (3, 32, 32) and data[i][0].dtype == torch.uint8 for i in range(8))
    assert read_image(photos / "dogs" / "turned.png").size == (50, 70)
    plain, sixteen = (np.asarray(read_image(photos / name)) for name in ("beside.png", "dogs/sixteen.png"))
    assert np.array_equal(plain, noise(50, 70, 3)) and np.array_equal(sixteen[..., 0], plain[..., 0])
    assert ImageFolder(photos / "chats été", 32).classes == ["chats été"]
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(tmp_path / "clear.png")  # a fifth of red on white
    assert read_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 204, 204)

def test_crop_is_adms():
    """For an image that halves exactly: the mean of 2x2 blocks, then Pillow's bicubic, then the centre."""
    pixels = noise(160, 208, 3)
    half = Image.fromarray(np.floor(pixels.reshape(80, 2, 104, 2, 3).mean((1, 3)) + 0.5).astype(np.uint8))
    resized = np.asarray(half.resize((83, 64), Image.BICUBIC), int)
    for image, expected in ((pixels, resized[:, 9:73]),
                            (pixels.swapaxes(0, 1), resized.swapaxes(0, 1)[9:73])):
        ours = np.asarray(crop(Image.fromarray(image), 64), int)
        assert ours.shape == (64, 64, 3) and abs(ours - expected).max() <= 2
    assert np.array_equal(crop(half, 80), half.crop((12, 0, 92, 80)))        # halving stops at its size
    assert crop(Image.fromarray(pixels[:20, :30]), 64).size == (64, 64)      # enlarged

def test_order_is_one_permutation_after_the_other():
    """Batches of 8 from 11 images: positions in a chain of permutations for any start and process count."""
    chain = [item for batch in order(11, 8, 3, 0, 22) for item in batch]
    for epoch in range(16):
        assert sorted(chain[epoch * 11:epoch * 11 + 11]) == [(epoch, i) for i in range(11)]
    assert [item for batch in order(11, 8, 3, 5, 9) for item in batch] == chain[40:72]
    two = [order(11, 8, 3, 0, 22, rank, 2) for rank in (0, 1)]
    assert [item for a, b in zip(*two) for item in a + b] == chain
    assert [i for _, i in chain[:11]] != [i for _, i in chain[11:22]]        # epochs differ, and seeds
    assert next(order(11, 8, 4, 0, 1)) != chain[:8]

def test_flips_follow_seed_epoch_and_index(photos):
    """A key (epoch, i) is mirrored or not, half of the time, and always the same."""
    data = ImageFolder(photos, 32)
    def flipped(): return [not torch.equal(data[(epoch, 3)][0], data[3][0]) for epoch in range(64)]
    first = flipped()
    assert 16 < sum(first) < 48 and first == flipped()
    assert torch.equal(data[(first.index(True), 3)][0], data[3][0].flip(-1))
    data.seed = 1
    assert flipped() != first
    data.flips = False
    assert not any(flipped())

def test_packed_array_gives_the_folders_images(photos, tmp_path, capsys):
    """pack, then read through the memory map: same pixels, labels, class names, mirror images."""
    pack(photos, 24, path := tmp_path / "p.npy")
    said, names = capsys.readouterr(), tmp_path / "p.npy.json"
    assert "8 images of 24 px" in said.out
    packed, folder = open_dataset(path, 24), ImageFolder(photos, 24)
    assert packed.classes == folder.classes and len(packed) == 8
    for i in range(16):
        a, b = (data.item(i % 8, i > 7) for data in (packed, folder))
        assert torch.equal(a[0], b[0]) and a[1] == b[1]
    pytest.raises(UserError, open_dataset, path, 32).match("24")
    names.unlink()
    assert open_dataset(path, 24).classes == ["0", "1", "2"]
    for said, value in (("labels 0 to 2", '["a", "b"]'), ("classes have names", "5")):
        names.write_text(f'{{"classes": {value}}}')
        pytest.raises(UserError, open_dataset, path, 24).match(said)

def save_arrays(folder, parts, **meta):
    """Latents as `data.py encode` writes them."""
    for name, array in parts.items():
        np.save(folder / f"{name}.npy", array)
    channels = parts["latents"].shape[1]
    (folder / "meta.json").write_text(json.dumps({"mean": [0.0] * channels, "std": [1.0] * channels} | meta))

def save_safetensors(folder, parts, name="latents_rank00_shard000.safetensors"):
    """One shard, byte by byte as the format's specification has it, and statistics; returns the bytes."""
    kinds, entries, offset = {"<f2": "F16", "<f4": "F32", "<i8": "I64"}, {}, 0
    for key, array in parts.items():
        entries[key] = {"dtype": kinds[array.dtype.str], "shape": list(array.shape),
                        "data_offsets": [offset, offset := offset + array.nbytes]}
    header = json.dumps(entries | {"__metadata__": {"by": "hand"}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"".join(a.tobytes() for a in parts.values())
    (folder / name).write_bytes(content)
    statistic = torch.ones(1, parts["latents"].shape[1], 1, 1)
    torch.save({"mean": 0 * statistic, "std": statistic}, folder / "latents_stats.pt")
    return content

@pytest.mark.parametrize("save", [save_arrays, save_safetensors, None])
def test_loading_processes_are_sent_a_place_not_the_bytes(tmp_path, save):
    """A megabyte of latents or packed images pickles to less than 10 kB, and the copy reads the same."""
    source, values = tmp_path, noise(400, 3, 32, 32)
    if save:
        values = values.astype(np.float16)
        save(tmp_path, {"latents": values, "latents_flip": values[..., ::-1], "labels": np.arange(400) % 7})
    else:
        records = np.zeros(400, [("image", "u1", (3, 32, 32)), ("label", "<i8")])
        records["image"] = values
        np.save(source := tmp_path / "p.npy", records)
    whole = open_dataset(source, 32)
    sent = pickle.dumps(whole)
    copy = pickle.loads(sent)
    assert len(sent) < 10_000 and copy.classes == whole.classes and len(copy) == len(whole) == 400
    assert np.array_equal(copy[7][0], values[7]) and copy[7][1] == whole[7][1]
    assert np.array_equal(copy.item(3, True)[0], values[3, ..., ::-1])

def test_safetensors_are_read_and_what_does_not_fit_is_named(tmp_path):
    """Two shards; cut short, parts that do not fit together or the other shard, no statistics: one line."""
    latents = np.random.RandomState(0).randn(5, 4, 2, 2).astype("<f2")
    parts = {"latents": latents, "latents_flip": latents[..., ::-1], "labels": np.arange(5)}
    content = save_safetensors(tmp_path, parts)
    save_safetensors(tmp_path, parts, second := "latents_rank00_shard001.safetensors")
    read = open_dataset(tmp_path, None)
    assert len(read) == 10 and read.shape == (4, 2, 2) and [read[i][1] for i in (5, 7)] == [0, 2]
    assert np.array_equal(read[7][0], latents[2]) and read.classes == ["0", "1", "2", "3", "4"]
    for bad, named in ((content[:-3], "not a readable safetensors file"),
                       (content.replace(b"[5, 4, 2, 2]", b"[5, 4, 2, 1]", 1), "bytes of latents do not fit")):
        (tmp_path / second).write_bytes(bad)
        pytest.raises(UserError, Latents, tmp_path).match(f"shard001.*{named}")
    for change in ({"latents_flip": latents[:, :3]}, {"labels": np.arange(4)},
                   {"latents": latents[:, :3], "latents_flip": latents[:, :3]}):
        save_safetensors(tmp_path, parts | change, second)
        pytest.raises(UserError, Latents, tmp_path).match("shard001.*fit together and the other shards")
    save_safetensors(tmp_path, parts, second)
    (tmp_path / "latents_stats.pt").unlink()
    pytest.raises(UserError, Latents, tmp_path).match("latents_stats.pt: not readable .no such file")

def test_patch_pca_round_trip_is_the_orthogonal_projection():
    """The projection of an SVD; more channels than a patch has values are refused."""
    images = torch.randn(200, 3, 8, 8) @ torch.randn(8, 8)
    pca = PatchPCA.fit(images, 4, 10)
    def flat(x): return F.pixel_unshuffle(x, 4).transpose(0, 1).flatten(1)   # (48, patches)
    mean = flat(images).mean(1, keepdim=True)
    U = torch.linalg.svd(flat(images) - mean, full_matrices=False).U[:, :10]
    projected = U @ U.T @ (flat(images) - mean) + mean
    torch.testing.assert_close(flat(pca.decode(pca.encode(images))), projected, atol=2e-3, rtol=0)
    assert pca.encode(images).shape == (200, 10, 2, 2) and (pca.factor, pca.channels) == (4, 10)
    pytest.raises(UserError, PatchPCA.fit, images, 4, 49).match("48 values")

def test_codec_scales_once_and_back():
    """Pixels: [-1, 1] and rounding; latents: (z - mean) / std and its inverse."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = Codec().encode(images)
    assert torch.equal(Codec().decode(x), images) and (x.min(), x.max()) == (-1, 1)
    assert Codec().decode(torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]
    z, mean, std = torch.randn(4, 48, 3, 3), torch.randn(1, 48, 1, 1), torch.rand(1, 48, 1, 1) + 0.5
    torch.testing.assert_close(Codec(None, mean, std).encode(z), (z - mean) / std)
    codec = Codec(PatchPCA.fit(torch.randn(9, 3, 16, 16), 4, 48), mean, std)
    assert Codec().decodes and codec.decodes and not Codec(None, mean, std).decodes
    assert (codec.decode(codec.encode(images)).int() - images.int()).abs().max() <= 1

@pytest.fixture
def small_vavae(monkeypatch):
    """VA-VAE of a quarter of the width: a fiftieth of its weights, the same shapes of latents."""
    monkeypatch.setattr(model.Autoencoder.__init__, "__defaults__", ((32, 32, 32, 32, 32), 32))

# ------------------------------------------------------------------------------------------------------------
# sample.py

@pytest.mark.parametrize("solver, factor, evaluations", [("heun", 4, 99), ("euler", 2, 50)])
def test_heun_converges_at_second_order_and_euler_at_first(solver, factor, evaluations):
    """dz/dt = -z + t from 1, z = t - 1 + 2 exp(-t): the error falls by 4 or 2 when the steps double."""
    one, times = torch.ones(1, dtype=torch.float64), []
    errors = [abs(integrate(lambda z, t: -z + t.double(), one, n, solver).item() - 2 * math.exp(-1))
              for n in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)
    integrate(lambda z, t: times.append(t.item()) or z, one, solver=solver)  # Heun's last is Euler's
    assert len(times) == evaluations and times[0] == 0 and max(times) == pytest.approx(0.98)

@pytest.mark.parametrize("interval, first, last, scale", [
    ((0.1, 1.0), 6, 49, 3), ((0.0, 1.0), 0, 49, 3), ((0.3, 0.5), 16, 24, 3), ((0.0, 1.0), 50, 0, 1)])
def test_guidance_acts_strictly_inside_its_interval(interval, first, last, scale):
    """Of 50 steps, t = 0.1 is outside of [0.1, 1], t = 0 inside of [0, 1]; else, and at scale 1, one pass."""
    calls = []
    def echo(z, t, y): return calls.append((len(z), t[0].item())) or y.view(-1, 1, 1, 1).expand_as(z)
    velocity = guided(KDiff(echo, "v", num_classes=4, tau=0.0), torch.tensor([1]), scale, interval)
    found = [velocity(torch.zeros(1, 1, 1, 1), t).item() for t in torch.linspace(0, 1, 51)[:-1]]
    assert found == [-5.0 if first <= i <= last else 1.0 for i in range(50)]  # 4 + 3 (1 - 4), or 1
    assert [n for n, _ in calls] == [2 if first <= i <= last else 1 for i in range(50)]
    assert [t for _, t in calls] == pytest.approx([i / 50 for i in range(50)])

def test_samples_follow_their_index_alone():
    """Batch size and the images beside it change no pixel by more than one level; the seed changes them."""
    kdiff, classes = KDiff(fill(JiT(**TINY_JIT)), "v", num_classes=10).eval(), [0, 1, 2, 3, 0]
    shape, how = (3, 32, 32), dict(cfg=2.0, interval=(0.1, 1.0), steps=8)
    together, others = (generate(kdiff, Codec(), shape, classes, range(5), **how, seed=seed).int()
                        for seed in (0, 1))
    for size in (1, 2):
        batches = sample.sample_all(kdiff, Codec(), shape, classes, size, **how).int()
        assert (together - batches).abs().max() <= 1
    assert (together - others).abs().max() > 8 and (together[0] - together[4]).abs().max() > 8

def test_jit_loss_and_sampler_give_the_published_numbers():
    """Recorded from the official JiT: its loss, and six guided steps of both solvers (one pixel, norm)."""
    kdiff = KDiff(fill(JiT(**TINY_JIT)), "x", num_classes=10, noise_scale=1.0, tau=0.05)
    _, t, y = inputs(TINY_JIT)
    x, e, z0 = (normal(name, 3, 3, 32, 32) for name in ("x", "e", "z0"))
    with torch.no_grad():
        assert kdiff.loss(0.5 * x, y, t, e).item() == pytest.approx(102.92652, rel=1e-6)
        for solver, pixels, norm in (("heun", [-0.416544, -1.016429, 0.516974], 125.321983),
                                     ("euler", [-0.015014, -1.051720, -0.029472], 122.744453)):
            z = integrate(guided(kdiff, torch.tensor([0, 3, 1]), 2.9, (0.1, 1.0)), z0, 6, solver)
            assert z[:, 1, 5, 7].tolist() == pytest.approx(pixels, abs=2e-5)
            assert z.norm().item() == pytest.approx(norm, rel=1e-5)

def test_published_jit_files_load(tmp_path):
    """With the training script's extras (a pickled Namespace, an optimizer); ema1, or ema2 where chosen."""
    net, path = model.build("JiT-demo/8", 32, 10), tmp_path / "checkpoint-last.pth"
    def weights(factor):
        return {f"module.net.{k}": v if k == "pos_embed" else v * factor for k, v in net.state_dict().items()}
    torch.save({"model": weights(1), "model_ema1": weights(2), "model_ema2": weights(3), "epoch": 5,
                "optimizer": {}, "args": argparse.Namespace(lr=1)}, path)
    for ema, factor in ((None, 2), ("0.9996", 3)):
        it = load(path, ema=ema)
        assert torch.equal(it.kdiff.net.t_embedder.mlp[0].weight, net.t_embedder.mlp[0].weight * factor)
    assert it.config["model"] == "JiT-demo/8" and it.kdiff.target == "x" and it.kdiff.noise_scale == 32 / 256
    assert (it.shape, it.step, it.ema, it.kdiff.tau) == ((3, 32, 32), 5, "0.9996", 0.05)
    assert (it.config["cfg"], it.config["interval"], it.classes) == (2.9, (0.1, 1.0), [*"0123456789"])
    pytest.raises(UserError, load, path, ema="0.5").match("0.5")
    pytest.raises(UserError, load, path, model="JiT-wide/8").match("not a JiT-wide/8 whose weights fit")

@pytest.mark.parametrize("qk_norm", [False, True])
def test_published_dit_files_load_with_their_statistics(tmp_path, qk_norm):
    """Flat weights under "ema"; mean and std of the latents come beside them; without, one line says so."""
    net, file, stats = fill(model.build("LightningDiT-demo/1", 4, 10, qk_norm=qk_norm)), *(
        tmp_path / name for name in ("dit.pt", "stats.pt"))
    torch.save({"ema": net.state_dict()}, file)
    torch.save({"mean": torch.arange(32.0), "std": torch.ones(32)}, stats)
    it = load(file, stats=stats)
    assert it.config["model"] == "LightningDiT-demo/1" and it.shape == (32, 4, 4) and it.ema == "ema"
    assert (it.kdiff.target, it.kdiff.tau, it.kdiff.noise_scale, it.config["cfg"]) == ("v", 0.0, 1.0, 1.5)
    args = normal("x", 2, 32, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([1, 10])
    assert torch.equal(it.kdiff.net(*args), net(*args))
    assert torch.equal(it.codec.mean, torch.arange(32.0).view(1, 32, 1, 1))
    pytest.raises(UserError, load, file).match("--stats")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "alien.pt")
    pytest.raises(UserError, load, tmp_path / "alien.pt").match("alien.pt: not a checkpoint of ours, JiT")

def test_curves_are_drawn_where_their_numbers_are(tmp_path):
    """Two panels, each in its own scale: a line from corner to corner; from -50 to 50, without the NaN."""
    sample.draw_curves([("k", "step", {"k": ([0.0, 5.0, 10.0], [0.0, 0.5, 1.0])}),
                        ("loss", "step", {"a": ([0, 1, 2, 3], [-50.0, 50.0, math.nan, 0.0])})],
                       tmp_path / "c.png")
    picture = np.asarray(Image.open(tmp_path / "c.png")).astype(int)
    grey = (picture == sample.GREY).all(-1)                                  # lines at 0, 0.2, ..., 1
    assert np.flatnonzero(grey[:, 80:140].all(1)).tolist() == [40, 98, 157, 216, 275, 334]
    assert np.flatnonzero(grey[300:334, :560].mean(0) > 0.8).tolist() == [64, 159, 254, 349, 444, 540]
    scale = 294 / 102.5                                                      # from -50 to 50 * 1.05
    for left, top, last in ((0, 40, 40), (560, 334 - 100 * scale, 334 - 50 * scale)):
        rows, columns = np.nonzero((picture[:, left:left + 560] == sample.COLOURS[0]).all(-1))
        ends = columns.min(), columns.max(), rows.min(), rows.max()
        assert ends == pytest.approx((64, 540, top, 334), abs=2)
        assert rows[columns == columns.max()].mean() == pytest.approx(last, abs=2)

def test_grid_shows_each_image_in_its_row():
    """Six images of 8 px in rows of three, enlarged without blur, the rows' names before them."""
    images = torch.from_numpy(noise(6, 3, 8, 8))
    sheet = np.asarray(sample.grid(images, ["a", "long name"], 3))
    margin = sheet.shape[1] - 3 * 100 - 4
    assert len(sheet) == 204 and 16 < margin < 200 and (sheet[:, :margin - 8] < 100).any()
    for i in range(6):
        top, left = 4 + i // 3 * 100, margin + i % 3 * 100
        assert np.array_equal(sheet[top:top + 96:12, left:left + 96:12], images[i].permute(1, 2, 0).numpy())
    assert sample.grid(images.repeat(1, 1, 25, 25), ["a", "b"], 3).size[1] == 2 * 204 + 4     # no larger

def test_classes_are_chosen_by_name_or_number():
    """A name wins over a number that it looks like; what is neither is an error that lists the names."""
    assert sample.choose_classes("b,0,2", ["a", "b", "c"]) == [1, 0, 2]
    assert sample.choose_classes("7,1", ["1", "7"]) == [1, 0]
    for word in ("3", "d", "-1"):
        with pytest.raises(UserError, match=f"--classes {word}: not a label .* 0 to 2 .a, b, c."):
            sample.choose_classes(word, ["a", "b", "c"])

# ------------------------------------------------------------------------------------------------------------
# train.py

class Bare(torch.nn.Module):
    """The least that KDiff asks of a network, net(z, t, y) -> like z; time and class as channels."""
    def __init__(self, *layers):
        super().__init__()
        self.table, self.across = torch.nn.Embedding(9, 2), torch.nn.Conv2d(3, 3, 1)
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, z, t, y):
        marks = torch.cat([t[:, None], self.table(y)], 1)[:, :, None, None].expand(-1, -1, *z.shape[2:])
        self.out = self.layers(torch.cat([z, marks], 1))
        return self.out + self.across(z)

def mlp(size):
    """Two linear layers."""
    return Bare(torch.nn.Flatten(), torch.nn.Linear(6 * size ** 2, 64), torch.nn.SiLU(),
                torch.nn.Linear(64, 3 * size ** 2), torch.nn.Unflatten(1, (3, size, size)))

def unet(size):
    """Down, up and a connection across."""
    return Bare(torch.nn.Conv2d(6, 16, 4, 2, 1), torch.nn.SiLU(), torch.nn.ConvTranspose2d(16, 3, 4, 2, 1))

def loop(state, data, **change):
    """train() on the CPU; the settings that it reads are anything with attributes."""
    plain = dict(steps=150, seed=0, batch_size=16, micro_batch=16, workers=0, lr=3e-3, k_lr=3.0,
                 warmup_epochs=0, clip=0.0, dtype=None)
    return train.train(state, Codec(), data, SimpleNamespace(**plain | change), torch.device("cpu"))

@pytest.mark.parametrize("network, dtype", [(mlp, None), (unet, "bfloat16")])
def test_any_network_trains_and_samples(network, dtype):
    """One that knows z, t, y alone, also in bfloat16: its loss falls, k moves, samples follow the class."""
    torch.manual_seed(0)
    state = train.State(KDiff(network(16), num_classes=8, noise_scale=1.0), [0.9])
    losses = [loss for loss, *_ in loop(state, Shapes(200, 16), dtype=dtype)]
    assert len(losses) == state.step == 150 and sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert state.kdiff.w != 0 and {p.dtype for p in state.parameters} == {torch.float32}
    assert state.kdiff.net.out.dtype == getattr(torch, dtype or "float32")
    with state.averaged("0.9") as kdiff:
        images = generate(kdiff, Codec(), (3, 16, 16), [0, 5, 8], [3, 3, 3], 1.0, (0.1, 1.0), steps=4)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert (images[0].int() - images[1].int()).abs().max() > 5 and images[0].float().std() > 10

@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_step_is_algorithm_1_written_by_hand(clip):
    """Loss, AdamW, clipping and averages in plain formulas and one batch; the loop adds up micro batches."""
    torch.manual_seed(0)
    kdiff, data = KDiff(mlp(8), num_classes=8), Shapes(12, 8)
    by_hand, state = copy.deepcopy(kdiff).double(), train.State(kdiff, [0.9, 0.5])
    weights = dict(by_hand.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in weights.items()}
    averages = {decay: {name: p.detach().clone() for name, p in weights.items()} for decay in (0.9, 0.5)}
    steps = loop(state, data, steps=5, seed=7, batch_size=6, micro_batch=4, warmup_epochs=2, clip=clip)
    for step, items in enumerate(order(12, 6, 7, 0, 5)):
        x = torch.stack([data[i][0] for _, i in items]).float() / 127.5 - 1
        y = torch.tensor([data[i][1] for _, i in items])
        t, e, y = by_hand.draw(x, y, [seed_of(7, step, n) for n in range(6)])
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
        assert next(steps) == pytest.approx((loss.item(), norm, lr), rel=1e-4) and state.step == step + 1
        ours = [dict(kdiff.named_parameters()), *(dict(zip(state.names, a)) for a in state.averages.values())]
        theirs = [weights, *averages.values()]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3, check_dtype=False)
    assert next(steps, None) is None
    raw = kdiff.net.table.weight.detach().clone()
    with state.averaged("0.5") as averaged:
        assert error(averaged.net.table.weight, averages[0.5]["net.table.weight"]) < 1e-4
        assert not averaged.training and not torch.equal(averaged.net.table.weight, raw)
    assert torch.equal(kdiff.net.table.weight, raw) and kdiff.training

def settings_of(monkeypatch, words):
    """What train.py makes of these flags."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    return train.parse()

def test_presets_are_table_4(monkeypatch):
    """The paper's numbers for both spaces, 512 pixels, and tau where Delta vanishes; a flag overrides."""
    common = dict(batch_size=1024, lr=2e-4, k_lr=1.0, ema=[.9999, .9998, .9996], label_drop=0.1, target="k",
                  loss="v", interval=[0.1, 1.0], clip=0.0, flip=True, steps=None, samples=None)
    for words, expected in (
            ("--space latent", dict(model="LightningDiT-XL/1", image_size=256, epochs=800, warmup_epochs=0,
                                    t_mean=0.0, t_std=1.0, noise_scale=1.0, tau=0.0, cfg=1.5)),
            ("--space pixel", dict(model="JiT-B/16", image_size=256, epochs=600, warmup_epochs=5, t_mean=-0.8,
                                   t_std=0.8, noise_scale=1.0, tau=0.05, cfg=2.9)),
            ("--image_size 512", dict(model="JiT-B/32", image_size=512, noise_scale=2.0)),
            ("--image_size 128 --model JiT-S/8 --lr 0", dict(model="JiT-S/8", noise_scale=0.5, lr=0.0)),
            *((f"--space latent --target {target}", dict(tau=tau, target=target)) for target, tau in (
                ("eps", 0.05), ("x", 0.05), ("0", 0.05), ("1.0", 0.05), ("v", 0.0), ("0.3", 0.0)))):
        args = vars(settings_of(monkeypatch, f"--data photos {words}"))
        assert {key: args[key] for key in common | expected} == common | expected
    demo, latent = (settings_of(monkeypatch, words) for words in ("", "--space latent --target 0.5"))
    assert (demo.model, demo.image_size, demo.tau, str(demo.out)) == ("JiT-demo/8", 32, 0.05, "out/pixel")
    assert (latent.tokenizer, latent.preset, str(latent.out)) == ("pca", "demo", "out/latent-0.5")

def test_settings_that_hang_on_data_are_filled_in(monkeypatch):
    """Steps from epochs, the largest micro batch that divides, the longest average that forgets the start."""
    def settled(words):
        return train.settle(settings_of(monkeypatch, words), Shapes(100, 32), Codec(), torch.device("cpu"))
    monkeypatch.setattr(train, "WORLD", 2)
    filled = dict(micro_batch=100, steps=2, workers=0, samples=64, sample_steps=25, compile=False,
                  net_size=32, in_channels=3, images=100, num_classes=8, processes=2, ema_default="0.95")
    config, paper = settled("--batch_size 600 --epochs 12"), settled("--preset paper")
    assert {key: config[key] for key in filled} == filled
    assert 1 <= paper["workers"] <= 8 and paper["samples"] == 8
    for steps, decay in ((89, "0.95"), (227, "0.95"), (228, "0.98"), (459, "0.99")):
        assert settled(f"--steps {steps} --micro_batch 16")["ema_default"] == decay
    for words, message in (("--batch_size 65", "65 does not divide over 2 processes: try 64"),
                           ("--batch_size 1", "try 2"), ("--batch_size 12 --micro_batch 4", "try 3")):
        with pytest.raises(UserError, match=message):
            settled(words)

TINY = ("train.py", "--batch_size", 8, "--samples", 0, "--log_every", 1, "--model", "JiT-narrow/8")

def start(*words, processes=None, wait_for=None):
    """Start a script, under torchrun for several processes, marked in their environment; await a word."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path, mark = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", f"test-{time.time_ns()}"
    process = subprocess.Popen(
        [sys.executable, *(torchrun if processes else []), *map(str, words)], cwd=HERE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MARK": mark},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
        handlers, ended = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}, 0
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        try:
            run(importlib.import_module(script[:-3]).main)
        except SystemExit as exit:
            ended = exit.code
        for number, handler in handlers.items():
            signal.signal(number, handler)
        said = "".join(capsys.readouterr())
        assert ended == status, said
        return said
    return call

def work_of_two(folder):
    """What each of two processes does for the fixture below, by `torchrun test_all.py FOLDER`."""
    class Spoiled(Shapes):                      # one process's second step holds an infinite pixel
        def __getitem__(self, key):
            image, label = super().__getitem__(key)
            return image / 127.5 - 1 + (torch.inf if data.RANK == 1 and state.step == 1 else 0), label

    def call(module, *words):
        sys.argv = [module.__name__, *map(str, words)]
        module.main()

    def interrupted(log, lr, write=train.Log.write):                      # one process is asked to stop
        if data.RANK == 1 and log.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        write(log, lr)
    os.chdir(folder)
    call(train, *TINY[1:], "--steps", 3, "--micro_batch", 2, "--out", "two")
    evaluate_shapes()
    model.Autoencoder.__init__.__defaults__ = ((32,) * 5, 32)
    call(data, *"encode photos --tokenizer vavae.pt --image_size 32 --batch_size 3 --out latents".split())
    call(sample, *"two/ckpt.pt --classes star,3 --samples 5 --steps 2 --out s.npz".split())
    torch.manual_seed(0)
    state = train.State(KDiff(model.build("JiT-narrow/8", 16, 8), num_classes=8), [0.9])
    for _, norm, _ in loop(state, Spoiled(12, 16), steps=3, batch_size=4, micro_batch=1, clip=1.0):
        moments = [t for moments in state.optimizer.state.values() for t in moments.values()]
        sums = [sum(t.double().sum().item() for t in tensors)
                for tensors in (state.parameters, state.averages["0.9"], moments)]
        sys.stdout.write(f"rank {data.RANK} step {state.step} norm {norm:.8f} sums {sums}\n")
    train.Log.write = interrupted
    call(train, *TINY[1:], "--steps", 9, "--out", "stopped")

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made of their work: (folder, what they printed)."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "photos").mkdir()
    for i, image in enumerate(noise(9, 40, 40, 3)):
        Image.fromarray(image).save(folder / "photos" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.Autoencoder.__init__, "__defaults__", ((32,) * 5, 32))
        torch.manual_seed(0)
        weights = VAVAE().state_dict() | {"loss.logvar": torch.zeros(())}
        torch.save({"state_dict": weights}, folder / "vavae.pt")
    return folder, ending(start(HERE / "test_all.py", folder, processes=2), status=1)

def test_two_processes_and_micro_batches_equal_one_process(two, call, tmp_path):
    """Same global batch: three steps agree to float tolerance, weights, averages, k and logged loss alike."""
    call(*TINY, "--steps", 3, "--out", tmp_path)
    one, other = (read_tensors(path / "ckpt.pt") for path in (tmp_path, two[0] / "two"))
    torch.testing.assert_close(other["ema"]["0.95"], one["ema"]["0.95"], atol=2e-5, rtol=1e-3)
    logs = [read_log(path, "loss")[1] for path in (tmp_path, two[0] / "two")]
    assert len(logs[0]) == 3 and logs[0] == pytest.approx(logs[1], rel=1e-4) and one["model"]["w"] != 0
    assert two[1].count("step 3/3 | ") == 1 and "8 = 2 processes x 2 micro batches x 2 images" in two[1]

def test_step_that_is_not_finite_on_one_process_changes_nothing_on_any(two):
    """Neither weights nor averages nor moments; all are told by the norm, stay equal and go on."""
    said = re.findall(r"rank (\d) step (\d) norm (\S+) sums (.*)", two[1])
    told = {rank + step: (math.isfinite(float(norm)), sums) for rank, step, norm, sums in said}
    assert len(told) == 6 and all(told["0" + step] == told["1" + step] for step in "123")
    assert [told["0" + step][0] for step in "123"] == [True, False, True]
    assert told["01"][1] == told["02"][1] != told["03"][1]

def test_process_that_is_asked_to_stop_stops_all_after_the_same_step(two, call):
    """One of two got SIGTERM: both saved step 3, a line says so, and the same command goes on there."""
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
    names = sorted(path.name for path in (tmp_path / "pngs").iterdir())
    assert names == [f"{i:06}_{i % 8}.png" for i in range(9)]
    assert "pngs holds " in call(*words, 9, "--out", tmp_path / "pngs", status=2)
    assert not [*tmp_path.glob("*tmp*"), *two[0].glob("*tmp*")]

def test_latents_of_two_processes_are_posterior_samples(two, small_vavae):
    """Mean and spread of the posterior, each with noise of its own, mirror images, statistics, labels."""
    data, images = open_dataset(two[0] / "latents", None), ImageFolder(two[0] / "photos", 32)
    tokenizer, draws = VAVAE(two[0] / "vavae.pt"), []
    batch = torch.stack([images[i][0] for i in range(9)]).float() / 127.5 - 1
    for flip, batch in ((False, batch), (True, batch.flip(-1))):
        mean, logvar = tokenizer.moments(batch)
        draws.append((torch.stack([data.item(i, flip)[0] for i in range(9)]) - mean) / torch.exp(logvar / 2))
        assert abs(draws[-1].mean()) < 0.1 and abs(draws[-1].std() - 1) < 0.1
    assert torch.corrcoef(torch.cat([d.flatten(1) for d in draws])).fill_diagonal_(0).abs().max() < 0.45
    both = [np.load(two[0] / "latents" / f"latents{flip}.npy").astype(float) for flip in ("", "_flip")]
    for ours, statistic in ((data.mean, np.mean), (data.std, np.std)):
        assert ours.flatten().tolist() == pytest.approx(statistic(both, (0, 1, 3, 4)), abs=1e-3)
    assert {data[i][1] for i in range(9)} == {0} and data.classes == ["photos"] and data.shape == (32, 2, 2)

def test_latents_are_trained_on_resumed_and_sampled(two, small_vavae, call, tmp_path):
    """A run on encoded latents; pictures need the tokenizer; a folder without meta.json is half-written."""
    latents, file, ckpt = two[0] / "latents", tmp_path / "vavae.pt", tmp_path / "run" / "ckpt.pt"
    shutil.copy(two[0] / "vavae.pt", file)
    words = ("train.py", *"--space latent --preset demo --image_size 32 --batch_size 4 --samples 0".split(),
             "--data", latents, "--out", tmp_path / "run", "--tokenizer", file, "--steps")
    assert "resuming" not in call(*words, 2) and "resuming" in call(*words, 3)
    it = load(ckpt)
    assert it.shape == (32, 2, 2) and it.codec.decodes and it.kdiff.tau == 0
    file.rename(moved := tmp_path / "moved.pt")
    assert "--tokenizer" in call("sample.py", ckpt, status=2)
    call("sample.py", ckpt, "--tokenizer", moved, "--n", 3, "--steps", 2, "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[1] == 104                   # one class, one row
    words = ("data.py", "encode", two[0] / "photos", "--tokenizer", moved, "--out", latents)
    assert "finished latents" in call(*words, status=2)
    shutil.copytree(latents, tmp_path / "copy", ignore=shutil.ignore_patterns("meta.json"))
    with pytest.raises(UserError, match="meta.json"):
        open_dataset(tmp_path / "copy", None)

def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(call, tmp_path):
    """2 + 2 steps against 4: model, averages, optimizer; each step is logged once; a finished run says so."""
    halves, ckpt = (*TINY, "--out", tmp_path / "halves"), tmp_path / "halves" / "ckpt.pt"
    call(*TINY, "--steps", 4, "--keep_every", 3, "--out", tmp_path / "whole")
    assert "resuming" not in call(*halves, "--steps", 2)
    early = ckpt.read_bytes()
    call(*halves, "--steps", 3)
    ckpt.write_bytes(early)                                                   # as if dead before saving
    said = call(*halves, "--steps", 4)
    assert f"resuming from {ckpt} at step 2" in said and "resuming with steps 4, before: 2" in said
    a, b = ({part: read_tensors(path)[part] for part in ("model", "optimizer", "ema")}
            for path in (tmp_path / "whole" / "ckpt.pt", ckpt))
    torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert read_log(tmp_path / "whole", "loss") == read_log(tmp_path / "halves", "loss")
    assert read_log(tmp_path / "whole", "step")[0] == [1, 2, 3, 4] and len(a["optimizer"]["state"]) > 10
    kept = sorted(tmp_path.glob("whole/ckpt*"))
    assert [(path.name, load(path).step) for path in kept] == [("ckpt-0000003.pt", 3), ("ckpt.pt", 4)]
    assert "finished at step 4" in call(*halves, "--steps", 4)
    for word, said in (("--target v", "target k, not v"), ("--seed 1", "seed 0, not 1")):
        assert f"with {said}" in call(*halves, *word.split(), status=2)

def test_short_demo_raises_k_and_writes_its_files(call, tmp_path, monkeypatch):
    """Forty steps of the pixel demo move k from 0.5 past 0.6; pictures, log; latents are white."""
    assert " s a step here " in call(*TINY, "--dry_run", "--out", tmp_path / "none")
    labels, draw = [], sample.sample_all
    monkeypatch.setattr(train, "sample_all", lambda *a, **how: labels.append(a[3]) or draw(*a, **how))
    flags = "--steps 40 --batch_size 32 --samples 16 --sample_steps 2 --sample_every 20"
    said, (steps, ks) = call("train.py", *flags.split(), "--out", tmp_path), read_log(tmp_path, "k")
    assert labels == [sorted([*range(8)] * 2)] * 2 and "samples.png" in said and "done in 0:" in said
    assert steps == [20, 40] and ks[1] > 0.6 and "= 0.20 epochs of 200.0 steps" in said
    assert re.search(r"^step 40/40 \| epoch 0.2 \| loss \d\.\d{4} \| k 0.\d{3} \| lr \d\.\de-03 \| "
                     r"grad \d\.\d\d \| [\d,]+ img/s \| eta 0:00:00$", said, re.M)
    assert Image.open(tmp_path / "samples.png").size[1] == 8 * 100 + 4
    assert {path.name for path in tmp_path.iterdir()} == {
        "ckpt.pt", "log.csv", "curves.png", "samples.png", "samples-0000020.png"}
    call("sample.py", tmp_path, tmp_path, "--plot", "k", "--out", tmp_path / "k.png")
    assert Image.open(tmp_path / "k.png").size == (560, 380)
    assert "column 'q'" in call("sample.py", tmp_path, "--plot", "q", status=2)
    call(*TINY[:-2], "--space", "latent", "--steps", 1, "--out", tmp_path / "latent")
    it, images = load(tmp_path / "latent" / "ckpt.pt"), data.some_items(Shapes(6400, 32), 200)
    x = it.codec.encode(images)                                               # whitened, and decoded again
    assert x.mean((0, 2, 3)).abs().max() < 0.2 and (x.std((0, 2, 3)) - 1).abs().max() < 0.2
    assert it.shape == (16, 4, 4) and (it.codec.decode(x).float() - images).abs().mean() < 10

@pytest.mark.parametrize("target, columns", [
    ("two", ("k1", "k2", "k")), ("time", ("k",)), ("channel", ("k", "k_min", "k_max"))])
def test_what_other_targets_learn_is_logged_and_drawn(call, tmp_path, monkeypatch, target, columns):
    """k1 and k2 and what k they are; k(t) in a picture; a k for each principal component of the patches."""
    monkeypatch.setattr(train, "some_items", lambda images, n=400: data.some_items(images, min(n, 400)))
    said = call(*TINY, "--image_size", 16, "--target", target, "--steps", 3, "--out", tmp_path)
    logged = [read_log(tmp_path, column)[1][-1] for column in columns]
    ks = load(tmp_path / "ckpt.pt", ema="none").kdiff.ks()
    assert logged[:len(ks)] == pytest.approx([k.item() for k in ks.values()], abs=2e-6) and logged[0] != 0.5
    assert target != "two" or logged[2] == pytest.approx(logged[0] / (logged[0] + logged[1]))
    assert f"| {columns[0]} {logged[0]:.3f} |" in said
    assert (tmp_path / "k_of_t.png").exists() == (target == "time")
    if target == "channel":
        with open(tmp_path / "k_of_channel.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 192 and float(rows[0]["variance"]) > 20 * float(rows[50]["variance"])
        assert min(float(row["k"]) for row in rows) == pytest.approx(logged[1], abs=1e-5)

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
        with open(tmp_path / "fid.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert ", ".join(f"{row['step']} {row['cfg']}" for row in rows) == told and len(measured) == n
        assert len(pictures := pictures | {(tmp_path / "fid.png").read_bytes()}) == n
    call("sample.py", tmp_path / "ckpt-0000002.pt", *words, "--out", tmp_path / "s.npz")
    distance = distance_in(call("fid.py", tmp_path / "s.npz", *use))
    assert distance == pytest.approx(float(rows[1]["pixel_distance"]), rel=1e-3)

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

# ------------------------------------------------------------------------------------------------------------
# fid.py

def plain_inception(images, state):
    """FID's network in float64 from its description, of 4 channels each, 3 x 3; state gets the weights."""
    def weight(key, *shape):
        one = key.endswith(("running_var", "bn.weight"))
        state[key] = one + normal(key, *shape) / math.prod(shape[1:]) ** 0.5 * (0.1 if len(shape) == 1 else 1)
        return state[key].double()

    def matrix(n):                                                            # TF1 bilinear, (299, n)
        at = torch.arange(299).double() * n / 299
        low, pick = at.long(), torch.eye(n).double()
        return pick[low] * (1 - at + low)[:, None] + pick[(low + 1).clamp(max=n - 1)] * (at - low)[:, None]

    def conv(x, name, stride=1, padding=1):
        x = F.conv2d(x, weight(f"{name}.conv.weight", 4, x.shape[1], 3, 3), None, stride, padding)
        mean, var, scale, shift = (weight(f"{name}.bn.{key}", 4)[:, None, None]
                                   for key in ("running_mean", "running_var", "weight", "bias"))
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
        return F.relu((x - mean) / (var + 1e-3).sqrt() * scale + shift)
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
    key = "Mixed_7c.branch_pool.conv.weight"
    for unfit in ({k: v for k, v in state.items() if k != key}, {**state, key: state[key][:, 1:]}, [1]):
        torch.save(unfit, path)
        with pytest.raises(UserError, match="random.pth: not FID's Inception"):
            fid.Inception(path)

def test_frechet_distance_has_its_closed_forms():
    """Equal covariances: |mu1 - mu2|^2. Commuting: the roots' squared distance. No shape else, nor NaN."""
    rng, mu = np.random.RandomState(0), np.zeros(50)
    turn, (a, b) = np.linalg.qr(rng.randn(50, 50))[0], rng.rand(2, 50) ** 4
    s1, s2, shift = turn * a @ turn.T, turn * b @ turn.T, rng.randn(50)
    assert fid.frechet_distance(mu, s1, shift, s1) == pytest.approx(shift @ shift, rel=1e-10)
    assert fid.frechet_distance(mu, s1, mu, s2) == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-9)
    assert fid.frechet_distance(np.ones(5), np.zeros((5, 5)), np.zeros(5), np.zeros((5, 5))) == 5
    for bad in ((mu[None], s1), (mu, s1[:3]), (mu[:3], s1[:3, :3]), (mu * np.nan, s1), (mu, s1 + np.inf)):
        for four in ((mu, s1, *bad), (*bad, mu, s1)):
            with pytest.raises(UserError):
                fid.frechet_distance(*four)

@pytest.mark.parametrize("n", [10, 100, 101, 102, 300])
@pytest.mark.parametrize("m", [80, 400])
def test_frechet_distance_is_exact_at_every_rank(n, m):
    """n and m samples in 100 dimensions, definite or not: 0 to themselves; else by the norm of X Y^T."""
    x, y = (np.random.RandomState(rows).randn(rows, 100) * np.linspace(1, 0.1, 100) for rows in (n, m))
    (mu1, s1), (mu2, s2) = ((samples.mean(0), np.cov(samples, rowvar=False)) for samples in (3 * x, y))
    x, y = (3 * x - mu1) / (n - 1) ** 0.5, (y - mu2) / (m - 1) ** 0.5
    cross = np.linalg.svd(x @ y.T)[1].sum()
    if min(n, m) > 101:                                          # at full rank, where sqrtm keeps its digits
        assert cross == pytest.approx(np.trace(scipy.linalg.sqrtm(s1 @ s2)).real, rel=1e-9)
    expected = (mu1 - mu2) @ (mu1 - mu2) + (x ** 2).sum() + (y ** 2).sum() - 2 * cross
    for four in ((mu1, s1, mu2, s2), (mu2, s2, mu1, s1)):
        assert fid.frechet_distance(*four) == pytest.approx(expected, rel=1e-10)
    assert abs(fid.frechet_distance(mu1, s1, mu1, s1)) < 1e-6

def test_inception_score_is_the_mean_kl_of_uneven_splits():
    """By loops over 103 rows in 10 splits of 10 and 11; K for K certain classes; too few are refused."""
    logits = 3 * np.random.RandomState(0).randn(103, 7).astype(np.float32)
    p, scores = np.exp(logits.astype(np.float64))[np.random.RandomState(2020).permutation(103)], []
    p /= p.sum(1, keepdims=True)
    for i in range(10):
        part = p[i * 103 // 10:(i + 1) * 103 // 10]
        scores.append(np.exp(sum((row * np.log(row / part.mean(0))).sum() for row in part) / len(part)))
    expected = np.mean(scores), np.std(scores)
    assert fid.inception_score(torch.from_numpy(logits)) == pytest.approx(expected, rel=1e-10)
    certain = torch.eye(4, 5, dtype=torch.float64).repeat(2, 1) * 2000    # class 4 never: 0 log 0 is not NaN
    assert fid.inception_score(certain, splits=1) == pytest.approx((4, 0), rel=1e-12)
    with pytest.raises(UserError):
        fid.inception_score(torch.zeros(9, 5))

@pytest.mark.parametrize("sizes", [[1] * 60, [60], [7, 20, 33]])
def test_streamed_statistics_equal_one_pass(sizes):
    """numpy's mean and cov for every way to cut the stream, around a mean a million times the spread."""
    x, statistics = np.random.RandomState(0).randn(60, 8) + 1e6, fid.Statistics(8)
    for part in torch.from_numpy(x).split(sizes):
        statistics.add(part)
    mu, sigma, n = statistics.finish()
    assert n == 60 and np.abs(mu - x.mean(0)).max() < 1e-8
    assert np.abs(sigma - np.cov(x, rowvar=False)).max() < 1e-8

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
    mine = list(range(53 * data.RANK // data.WORLD, 53 * (data.RANK + 1) // data.WORLD))
    parts = [mine[i:i + 10] for i in range(0, len(mine), 10)]
    batches = [(torch.stack([Shapes(53, 32)[i][0] for i in part]), part[0]) for part in reversed(parts)]
    reference = fid.Source("none", mu=np.zeros(12), sigma=np.eye(12))
    data.print0(json.dumps(fid.evaluate(batches, Stub(fid.__file__), reference)))

def test_evaluation_does_not_depend_on_processes_batches_or_their_order(two, capsys):
    """Distance and score of 53 images at once, in batches of 10, the last first, and on two processes."""
    features, logits = Stub(fid.__file__)(torch.stack([Shapes(53, 32)[i][0] for i in range(53)]))
    mu, sigma = features.double().mean(0).numpy(), np.cov(features.double().numpy(), rowvar=False)
    score, distance = fid.inception_score(logits), fid.frechet_distance(mu, sigma, np.zeros(12), np.eye(12))
    expected = {"fid": distance, "n": 53, "is_mean": score[0], "is_std": score[1]}
    evaluate_shapes()
    for said in (capsys.readouterr().out, two[1]):
        assert json.loads(re.search(r'^\{"fid".*\}$', said, re.M)[0]) == pytest.approx(expected, rel=1e-7)
    assert score[0] > 1.01

@pytest.fixture
def samples(tmp_path):
    """12 shapes of 32 px as PNGs in two folders, an array in a zip, stored or deflated, a packed array."""
    images = torch.stack([Shapes(12, 32)[i][0] for i in range(12)])
    arr_0 = images.permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(arr_0):
        (folder := tmp_path / "png" / str(i // 6)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    np.savez(tmp_path / "stored.npz", arr_0=arr_0, arr_1=np.zeros(12), settings=np.array('{"cfg": 2.5}'))
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=arr_0)
    data.pack(tmp_path / "png", 32, tmp_path / "packed.npy")
    return tmp_path, images

@pytest.mark.parametrize("name", ["png", "stored.npz", "deflated.npz", "packed.npy"])
def test_every_kind_of_file_gives_the_same_images(samples, monkeypatch, name):
    """All, and the middle one of three processes' shares, in batches that do not divide it."""
    source = fid.open_source(str(samples[0] / name), "pixels")
    assert (source.n, source.size) == (12, (32, 32)) and torch.equal(source.read(0, 12), samples[1])
    assert source.settings == ({"cfg": 2.5} if name == "stored.npz" else None)
    monkeypatch.setattr(fid, "RANK", 1)
    monkeypatch.setattr(fid, "WORLD", 3)
    batches, indices = zip(*source.batches(3))
    assert torch.equal(torch.cat(batches), samples[1][4:8]) and indices == (4, 7)

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, save):
    """Reading 6 MB in batches of 0.2 MB never holds 2 MB, deflated or not."""
    save(tmp_path / "a.npz", arr_0=noise(500, 64, 64, 3) // 32)
    tracemalloc.start()
    batches = fid.open_source(str(tmp_path / "a.npz"), "pixels").batches(16)
    assert sum(len(batch) for batch, _ in batches) == 500 and tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()

def distance_in(said):
    """The FID or pixel distance that fid.py printed."""
    return float(re.search(r"^(?:FID|pixel distance) (\S+)", said, re.M)[1])

def test_reference_is_written_used_and_told(samples, call):
    """Samples are 0 from their own reference, elsewhere not; hash and settings are printed, `FID` is not."""
    (folder, images), how = samples, ("--features", "pixels", "--batch_size", 5)
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
    distances = [distance_in(each) for each in said]
    assert distances == pytest.approx([0, 0] + 2 * distances[2:3], rel=1e-5, abs=1e-6) and distances[2] > 1
    assert said[0].count("12 images") == 2 and "FID" not in said[0] and '"cfg": 2.5' in said[0]
    assert hashlib.sha256((folder / "ref.npz").read_bytes()).hexdigest() in said[0]
    assert "6,400 images" in call(*make, "shapes", "--image_size", 4)
    with pytest.raises(UserError, match="stored.npz: images.*--make_ref"):
        fid.load_reference(str(folder / "stored.npz"), "pixels")

@pytest.mark.parametrize("key, n, reference, weights, warnings", [
    ("fid", 2047, 0, fid.WEIGHTS, 1), ("fid", 2048, 0, fid.WEIGHTS, 0), ("fid", 9999, 2047, fid.WEIGHTS, 1),
    ("fid", 2048, 0, "others", 1), ("pixel_distance", 9, 0, None, 0)])
def test_few_images_and_other_weights_come_with_a_warning(capsys, key, n, reference, weights, warnings):
    """Fewer than 2,048 of either; published references do not tell, and the pixel distance needs none."""
    fid.show({key: 3.0, "n": n}, fid.Source("ref.npz", reference), weights)
    out = capsys.readouterr().out
    assert out.lower().count("warning") == warnings and ("FID 3" in out) == (key == "fid")

MU, SIGMA, IMAGES = np.zeros(768), np.eye(768), np.zeros((4, 8, 8, 3), np.uint8)
UNFIT = {                  # what an .npz holds, or what becomes of a whole one; what the error tells
    "cut": (lambda whole: whole[:-2000], "zip"),
    "flipped": (lambda whole: whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:], "CRC"),
    "huge": (lambda whole: whole.replace(b"(12, 32", b"(99, 32"), r"\(99, 32"),
    "empty": (dict(other=SIGMA), "arr_0"), "float": (dict(arr_0=IMAGES / 2), "float64"),
    "grey": (dict(arr_0=IMAGES[..., 0]), r"\(4, 8, 8\)"), "half": (dict(mu=MU), "sigma"),
    "fortran": (dict(arr_0=np.asfortranarray(IMAGES)), r"uint8 \(4, 8, 8, 3\)"),
    "pickled": (dict(mu=np.array([{}], dtype=object), sigma=SIGMA), "allow_pickle=False"),
    "small": (dict(mu=MU[:64], sigma=SIGMA), r"\(64,\)"),
    "wide": (dict(mu=MU, sigma=SIGMA[:64]), r"\(64, 768\)"),
    "nan": (dict(mu=MU, sigma=SIGMA * np.nan), "finite"),
    "other": (dict(mu=MU, sigma=SIGMA, features="inception"), "--features pixels"),
    "size": (dict(mu=MU, sigma=SIGMA, image_size=64), r"\(64, 64\).*\(32, 32\)|no images"),
    "one": (dict(arr_0=np.zeros((1, 32, 32, 3), np.uint8)), "fewer than 2"),
    "mixed": (None, "11.png is 32x33, .*000.png is 32x32")}

@pytest.mark.parametrize("name", UNFIT)
def test_unfit_samples_and_references_get_one_line(samples, call, name):
    """As a reference and as samples; exit status 2."""
    (folder, _), (content, told), bad = samples, UNFIT[name], samples[0] / f"{name}.npz"
    if callable(content):
        bad.write_bytes(content((folder / "stored.npz").read_bytes()))
    elif content:
        np.savez(bad, **content)
    else:
        Image.new("RGB", (32, 33)).save((bad := folder / "png") / "11.png")
    for pair in ((folder / "packed.npy", bad), (bad, folder / "packed.npy")):
        said = call("fid.py", *pair, "--features", "pixels", "--batch_size", 5, status=2)
        errors = [line for line in said.splitlines() if not line.startswith("images ")]
        assert len(errors) == 1 and re.match(f"error: .*{bad.name}", errors[0]) and re.search(told, said)

@pytest.fixture
def stub(monkeypatch, tmp_path):
    """12 features in the place of Inception's; files of weights a and b, of which a is the published one."""
    monkeypatch.setattr(fid, "Inception", Stub)
    monkeypatch.setitem(fid.EXTRACTORS, "inception", Stub)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(fid, "WEIGHTS", fid.sha256(tmp_path / "a.pth"))

def test_other_weights_are_refused_or_told(samples, stub, call):
    """A file of another hash, unless --any_weights; a reference made with others; IS is printed."""
    a, b, ref, png = (samples[0] / name for name in ("a.pth", "b.pth", "ref.npz", "png"))
    make = ("fid.py", "--make_ref", png, "--image_size", 32, "--out", ref, "--weights")
    use = ("fid.py", png, ref, "--weights")
    assert f"error: {b}: not FID's weights" in call(*make, b, status=2)
    call(*make, a)
    said = call(*use, a)
    assert fid.WEIGHTS in said and "IS 1." in said and abs(distance_in(said)) < 1e-6
    assert f"error: {ref}: made with other weights" in call(*use, b, "--any_weights", status=2)
    call(*make, b, "--any_weights")
    assert "WARNING: not FID's own" in call(*use, b, "--any_weights")

def test_weights_are_downloaded_once_and_only_if_right(stub, tmp_path, monkeypatch):
    """By one process of a machine; a wrong file is not stored; without network one line tells where."""
    def fetch(name, local_rank=0):
        monkeypatch.setattr(fid, "URL", (tmp_path / name).as_uri())
        monkeypatch.setattr(fid, "LOCAL_RANK", local_rank)
        return fid.make_extractor("inception").sha256
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name, told in (("gone.pth", "gone.pth.*hub/checkpoints.*--weights"), ("b.pth", "invalid hash")):
        with pytest.raises(UserError, match=told):
            fetch(name)
    with pytest.raises(FileNotFoundError):
        fetch("a.pth", local_rank=1)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir()) and fetch("a.pth") == fid.WEIGHTS
    (tmp_path / "a.pth").unlink()
    assert fetch("a.pth") == fid.WEIGHTS

# ------------------------------------------------------------------------------------------------------------
# Faults: interruptions, lost processes, full disks, files that are not what they say

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes there")

@pytest.fixture
def nine(tmp_path):
    """Nine images of 16 px, and the words that train on them for ever with two loading processes."""
    for i, image in enumerate(noise(9, 16, 16, 3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return tmp_path, (*TINY, "--batch_size", 4, "--data", tmp_path, "--preset", "demo", "--image_size", 16,
                      "--workers", 2, "--steps", 10 ** 6, "--out", tmp_path / "out")

@needs_proc
@pytest.mark.parametrize("processes", [None, 2])
def test_damaged_image_ends_everything_with_one_line(nine, processes):
    """Met by a loading process in mid-training, of one of two processes: nobody waits, nobody stays."""
    (nine[0] / "5.png").write_bytes((nine[0] / "5.png").read_bytes()[:400])
    said = ending(start(*nine[1], processes=processes), status=2 if processes is None else 1)
    assert "writes to" in said                                                # the start had not read it
    named = [line for line in said.splitlines() if "5.png" in line]
    assert len(named) == 1 and named[0].startswith("error: ") and "not a readable image" in named[0]
    assert processes or said.count("error: ") == 1 and "Traceback" not in said

@needs_proc
@pytest.mark.parametrize("processes, victim, status, told", [
    (None, -1, 2, "a loading process died, .*--workers"), (2, 0, 1, "process 0 lost the others")])
def test_lost_process_ends_the_others_with_a_line(nine, processes, victim, status, told):
    """A loading process, killed as the kernel does where memory is short; or one of two that train."""
    process = start(*nine[1], processes=processes, wait_for="step 3/")
    os.kill(alive(process.mark, *(["RANK=1"] if processes else []))[victim], signal.SIGKILL)
    said = ending(process, status, time.time())
    assert re.search(f"^error: {told}", said, re.M) and (processes or said.count("error: ") == 1)

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_step_at_hand(call, tmp_path, monkeypatch, number):
    """Also when it comes twice; the exit status tells the signal."""
    def interrupted(log, lr, write=train.Log.write):
        for _ in range(2 if log.state.step == 2 else 0):
            os.kill(os.getpid(), number)
        write(log, lr)
    monkeypatch.setattr(train.Log, "write", interrupted)
    said = call(*TINY, "--steps", 9, "--out", tmp_path, status=128 + number)
    assert f"stopped by signal {int(number)} after step 3; the same" in said and "done" not in said
    assert load(tmp_path / "ckpt.pt").step == 3 and read_log(tmp_path, "step")[0] == [1, 2, 3]

def test_kill_at_a_random_moment_leaves_a_loadable_checkpoint(tmp_path):
    """Of a run that saves every step, twice here, with ENDURANCE=1 fifty times: it loads and only grows."""
    steps, rng = [0], random.Random(0)
    for _ in range(50 if os.environ.get("ENDURANCE") else 2):
        process = start(*TINY, "--steps", 10 ** 6, "--save_every", 1, "--out", tmp_path,
                        wait_for=f"step {steps[-1] + 2:,}/")
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate()
        steps.append(read_tensors(tmp_path / "ckpt.pt")["step"])
        assert steps[-1] > steps[-2]

def test_ten_bad_steps_in_a_row_end_the_run(call, tmp_path):
    """A rate that throws the weights to 1e30: one line says what to try, and no checkpoint holds a NaN."""
    said = call(*TINY, "--steps", 30, "--lr", "1e30", "--save_every", 1, "--out", tmp_path, status=2)
    assert "10 steps in a row" in said and "try a lower --lr" in said and "| skipped 9" in said
    file = read_tensors(tmp_path / "ckpt.pt")
    assert file["step"] == int(re.search(r"at step (\d+) is intact", said)[1]) >= 1
    for weights in (file["model"], *file["ema"].values()):
        assert all(t.isfinite().all() for t in weights.values())
    state = train.State(KDiff(mlp(2), num_classes=8), [0.9])
    state.averages["0.9"][0].fill_(math.nan)
    with pytest.raises(UserError, match="after step 0 are not finite"):
        train.save(tmp_path / "nan.pt", state, {}, Codec(), Shapes(8, 8))

def test_full_disk_leaves_what_was_there(call, photos, tmp_path):
    """One line, exit status 2, no temporary file: the checkpoint before stays, half an array is none."""
    call(*TINY, "--steps", 1, "--out", tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 16, before[1]))           # no file grows beyond 64 kB
    try:
        for named, *words in (
                ("held before is intact", *TINY, "--steps", 3, "--out", tmp_path / "run"),
                ("p.npy", "data.py", "pack", photos, "--image_size", 128, "--out", tmp_path / "p.npy"),
                ("s.npz", "sample.py", tmp_path / "run" / "ckpt.pt", "--n", 30, "--out", tmp_path / "s.npz")):
            said = call(*words, status=2)
            assert said.count("error: ") == 1 and named in said and "written" in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_tensors(tmp_path / "run" / "ckpt.pt")["step"] == 1 and not list(tmp_path.glob("run/*.tmp*"))
    assert not (tmp_path / "p.npy").exists() and not (tmp_path / "s.npz").exists()

@pytest.mark.parametrize("error, said, status, local_rank", [
    (FileNotFoundError(2, "No such file", "a.csv"), "a.csv: No such file", 2, 0),
    (torch.cuda.OutOfMemoryError("CUDA"), "out of GPU memory: try half the", 2, 1),
    (data.FileError("Caught FileError\nThen\ndata.FileError: a: b Error: c"), "a: b Error: c\n", 2, 1),
    (UserError("a: not whole (KeyError: b)"), "a: not whole (KeyError: b)\n", 2, 0),
    (UserError("a"), "", 2, 1), (KeyboardInterrupt(), "", 130, 0),
    (ConnectionResetError(104, "reset by peer"), "a loading process died", 2, 0)])
def test_errors_are_explained_in_one_line(monkeypatch, capsys, error, said, status, local_rank):
    """Paths, memory, lost processes; of two, one prints what both met; bugs of ours keep their traceback."""
    def fail(): raise error
    monkeypatch.setattr(data, "LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as exit:
        run(fail)
    printed = capsys.readouterr().err
    assert exit.value.code == status and printed.startswith(f"error: {said}" if said else "")
    assert printed.count("\n") == bool(said)
    for error in (OSError("no file"), RuntimeError("shapes differ")):
        with pytest.raises(type(error), match=str(error)):
            run(fail)

class Payload:
    """Unpickled, it would create a file."""
    def __reduce__(self):
        return os.system, ("touch marker",)

def test_hostile_files_are_refused_without_running_them(tmp_path, monkeypatch):
    """Pickle payloads in checkpoints, .npy and .npz; the error names the file."""
    monkeypatch.chdir(tmp_path)
    torch.save({"config": {}, "data": Payload()}, "a.pt")
    np.save("b.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    np.savez("c.npz", mu=np.array([Payload()], dtype=object), sigma=SIGMA)
    for path, opener in (("a.pt", load), ("b.npy", lambda path: open_dataset(path, 32)),
                         ("c.npz", lambda path: fid.open_source(path, "pixels"))):
        with pytest.raises(UserError, match=path):
            opener(path)
    assert not Path("marker").exists()

def test_bad_images_are_named(tmp_path):
    """Cut, empty, vanished, too long, a pipe, a decompression bomb, links in a circle, none at all."""
    Image.fromarray(noise(40, 40, 3)).save(good := tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:900])
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name, size in (("bomb.png", (30000, 30000)), ("thread.png", (1, 101)), ("long.png", (1, 100))):
        Image.new("1", size).save(tmp_path / name)
    for name in ("cut.png", "empty.jpg", "bomb.png", "gone.png", "thread.png", "pipe.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    assert read_image(tmp_path / "long.png").size == (1, 100)
    (tmp_path / "class").mkdir()
    for name, told in ((".", "class: a class folder without images"), ("class", "holds no images"),
                       ("nowhere", "nowhere: no such file"), ("good.png", "good.png: not a readable array")):
        with pytest.raises(UserError, match=told):
            open_dataset(tmp_path / name, 32)
    (tmp_path / "class" / "loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="loop: a link in a circle"):
        open_dataset(tmp_path, 32)

BAD = {
    "train.py --batch_size 0": "--batch_size 0: at least 1", "train.py --lr nan": "--lr nan: at least 0",
    "train.py --ema 0.9 1": "--ema [0.9, 1.0]: decays", "train.py --model JiT-X/16": "JiT-X/16",
    "train.py --image_size 30": "30",
    "train.py --data . --image_size 64": "--image_size 64 has no network in Table 4: ",
    "train.py --target y": "target", "train.py --target two --loss u": "two",
    "train.py --target eps --tau 0": "--tau 0 with --target eps",
    "train.py --micro_batch 7": "--micro_batch 7", "train.py --step 3": "--step",
    "train.py --device cpux": "--device cpux is not usable here",
    "train.py --space latent --image_size 30": "--image_size 30",
    "train.py --data ../photos --space latent": "--tokenizer pca, or run",
    "train.py --init nowhere.pt --out out": "nowhere.pt", "sample.py nowhere.pt": "nowhere.pt",
    "sample.py nowhere.pt --n 0": "--n 0: at least 1", "sample.py a.pt b.pt": "one checkpoint at a time",
    "sample.py a.pt --out a.jpg": "--out a.jpg",
    "sample.py a.pt --fid ref.npz --out a.png": "leave out --out", "fid.py nowhere nowhere": "nowhere",
    "fid.py nowhere": "give SAMPLES and REF, or --make_ref",
    "fid.py --make_ref shapes --image_size 32 --out ref": "give SAMPLES and REF, or --make_ref",
    "data.py pack nowhere --out out/x.npy": "nowhere: no such folder",
    "data.py encode . --out out --tokenizer nowhere.pt": "nowhere.pt",
    "data.py encode . --out out": "encode needs --tokenizer"}

@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, call, words):
    """The line names the flag or file; nothing is written."""
    for name in ("photos", "here"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path / "here")
    said = call(*words.split(), status=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and BAD[words] in errors[0] and said.endswith(errors[0] + "\n")
    assert not list(Path().iterdir())

def corrupted(content, rng):
    """A copy that is cut short, has bytes overwritten, or a stretch removed or doubled."""
    at, stretch = rng.randrange(len(content)), rng.randint(1, 64)
    part = content[at:at + stretch]
    middle = rng.choice((None, rng.randbytes(len(part)), b"", 2 * part))
    return content[:at] + (b"" if middle is None else middle + content[at + stretch:])

def test_corruption_of_any_file_is_an_error_line_or_harmless(tmp_path):
    """Images, checkpoints, arrays, latents: UserError, or read as what they still are; ENDURANCE=1: 220."""
    def read_npz(path):
        source = fid.open_source(str(path), "pixels")
        return source.read and list(source.batches(2))

    def read_all(path):
        data = open_dataset(path, 8)
        return [data[i] for i in range(len(data))]
    openers = dict.fromkeys(("a.png", "a.jpg", "a.webp", "a.bmp"), read_image) | {
        "a.pt": load, "a.npz": read_npz, "ref.npz": read_npz, "a.npy": read_all} | dict.fromkeys(
        ("shards/a.safetensors", "shards/latents_stats.pt"), lambda path: read_all(path.parent))
    rng, refused, latents = random.Random(1), 0, np.zeros((3, 2, 2, 2), "<f4")
    for name in list(openers)[:4]:
        Image.fromarray(noise(24, 24, 3)).save(tmp_path / name)
    net = model.build("JiT-narrow/8", 16, 8).half()
    torch.save({f"net.{k}": v for k, v in net.state_dict().items()}, tmp_path / "a.pt")
    np.savez_compressed(tmp_path / "a.npz", arr_0=noise(4, 8, 8, 3), settings=np.array('{"cfg": 2}'))
    np.savez(tmp_path / "ref.npz", mu=MU, sigma=SIGMA)
    np.save(tmp_path / "a.npy", np.zeros(3, [("image", "u1", (3, 8, 8)), ("label", "<i8")]))
    (tmp_path / "shards").mkdir()
    parts = dict(latents=latents, latents_flip=latents, labels=np.zeros(3, "<i8"))
    save_safetensors(tmp_path / "shards", parts, "a.safetensors")
    for i in range(220 if os.environ.get("ENDURANCE") else 40):
        name, opener = list(openers.items())[i % len(openers)]
        whole = (path := tmp_path / name).read_bytes()
        path.write_bytes(corrupted(whole, rng))
        try:
            opener(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
        opener(path)
    assert refused > i / 4

# ------------------------------------------------------------------------------------------------------------
# Beyond the paper: the spectrum of k

def test_best_k_of_a_direction_is_one_over_one_plus_its_variance():
    """Brute force: the u-loss of the best linear gain over a grid of k, by sums; one k for several."""
    t, ks = (np.arange(4000) + 0.5) / 4000, np.linspace(0, 1, 2001)[:, None]

    def least(s2):
        gain = (s2 * t * ks + (1 - t) * (ks - 1)).mean(1) / (s2 * t ** 2 + (1 - t) ** 2).mean()
        return (s2 * (ks - gain[:, None] * t) ** 2 + (ks - 1 - gain[:, None] * (1 - t)) ** 2).mean(1)
    for s2 in (0, 0.01, 0.3, 1, 5, 50):
        assert ks[least(s2).argmin(), 0] == pytest.approx(k_of_direction(s2), abs=6e-4)
    variances = (50, 5, 1, 0.3, 0.1, 0.01, 0, 0)
    assert ks[sum(map(least, variances)).argmin(), 0] == pytest.approx(optimal_k(sum(variances), 8), abs=6e-4)

def test_gradient_descent_finds_the_spectrum():
    """One k a direction, and one for all under louder noise, trained with a linear layer on the u-loss."""
    variances = torch.tensor([4, 1, 0.3, 0.1])
    kdiff, _ = train_linear(variances, "channel", steps=1500, batch=256, k_rate=8.0)
    learned = torch.sigmoid(kdiff.w.detach()).flatten().tolist()
    assert learned == pytest.approx([1 / 5, 1 / 2, 1 / 1.3, 1 / 1.1], abs=0.02)
    kdiff, _ = train_linear(variances / 4, steps=1500, batch=256)
    assert kdiff.ks()["k"].item() == pytest.approx(4 / (4 + 5.4 / 4), abs=0.02)

def test_k_of_innovation_minimises_the_loss_that_is_left():
    """Against regressing each coordinate on the others, at every time, and a grid of k for what is left."""
    x = (normal("x", 4000, 6) @ normal("mix", 6, 6)).view(-1, 3, 2, 1)
    ours = k_of_innovation(x, -0.8, 0.8, noise_scale=2.0, points=100)
    S, ks = np.cov(x.flatten(1).double().numpy(), rowvar=False), np.linspace(0, 1, 4001)[1:-1, None]
    t = 1 / (1 + np.exp(0.8 - 0.8 * scipy.stats.norm.ppf((np.arange(100) + 0.5) / 100)))
    left = np.zeros((100, 6))
    for i in range(6):
        others = [j for j in range(6) if j != i]
        for m, n in enumerate((2 * (1 - t) / t) ** 2):
            cross = S[i, others]
            left[m, i] = S[i, i] - cross @ np.linalg.solve(S[np.ix_(others, others)] + n * np.eye(5), cross)
    left = left.reshape(100, 3, 2).mean(2)
    for c in range(3):
        loss = ((left[:, c] * ks ** 2 + 4 * (1 - ks) ** 2) / (ks * (1 - t) + (1 - ks) * t) ** 2).mean(1)
        assert ours[c].item() == pytest.approx(ks[loss.argmin(), 0], abs=5e-4)

def test_channels_of_pixel_space_are_all_components_of_a_patch(call, tmp_path):
    """Orthonormal, so that noise stays white; strongest first; csv and picture; resumes, samples."""
    words = (*TINY, "--image_size", 16, "--target", "channel", "--out", tmp_path)
    assert "in_channels=192" in call(*words, "--steps", 2)
    assert "at step 2" in call(*words, "--steps", 3)
    basis = read_tensors(tmp_path / "ckpt.pt")["data"]["pca"]["basis"]
    torch.testing.assert_close(basis.T @ basis, torch.eye(192), atol=1e-5, rtol=0)
    rows = [list(map(float, row)) for row in list(csv.reader(open(tmp_path / "k_of_channel.csv")))[1:]]
    number, variance, k = (torch.tensor(column) for column in list(zip(*rows))[:3])
    shapes = Shapes(6400, 16)
    patches = F.pixel_unshuffle(torch.stack([shapes[i][0] for i in range(6400)]).double() / 127.5, 8)
    values = torch.linalg.eigvalsh(torch.cov(patches.transpose(0, 1).flatten(1))).flip(0)
    assert number.tolist() == list(range(192)) and (k != 0.5).all()
    torch.testing.assert_close(variance[:32].double(), values[:32], rtol=0.05, atol=0)
    assert read_log(tmp_path, "k_min")[1][-1] == pytest.approx(k.min().item(), abs=1e-5)
    assert (tmp_path / "k_of_channel.png").exists()
    call("sample.py", tmp_path / "ckpt.pt", "--n", 8, "--steps", 2, "--out", tmp_path / "s.png")

# ------------------------------------------------------------------------------------------------------------
# Real pictures

@pytest.fixture
def idx(tmp_path, monkeypatch):
    """A folder of small Fashion-MNIST files whose checksums are the published ones, and their pixels."""
    pixels, labels = noise(40, 28, 28), np.arange(40, dtype=np.uint8) % 10
    header = b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (40, 28, 28))
    (tmp_path / "idx").mkdir()
    for name, content in (("images-idx3", header + pixels.tobytes()),
                          ("labels-idx1", header[:8] + labels.tobytes())):
        (tmp_path / "idx" / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(data.Fashion.sha256, f"train-{name}-ubyte", hashlib.sha256(content).hexdigest())
    return tmp_path / "idx", pixels

def test_fashion_is_padded_and_trains_in_both_spaces(idx, call, tmp_path):
    """28 px in the middle of 32, grey thrice; a default folder of its own; latents by PCA."""
    folder, pixels = idx
    dataset = data.open_dataset("fashion", 32, folder)
    image, label = dataset[13]
    assert len(dataset) == 40 and dataset.classes[label] == "dress" and image.shape == (3, 32, 32)
    assert np.array_equal(image[1, 2:30, 2:30], pixels[13]) and image.sum() == 3 * int(pixels[13].sum())
    for space in ("pixel", "latent"):
        call("train.py", "--space", space, "--data", "fashion", "--data_dir", folder, "--steps", 1,
             "--batch_size", 4, "--samples", 0, "--out", tmp_path / space)
    found = call("train.py", "--data", "fashion", "--data_dir", folder, "--dry_run")
    assert "writes to out/pixel-fashion" in found and re.search(r"time +\S+ s a step", found)

def test_bad_fashion_files_get_one_line(idx, call, monkeypatch, tmp_path):
    """Missing, cut, of other content; no network; what is fetched is checked before it is kept."""
    folder, _ = idx
    words = ("train.py", "--data", "fashion", "--dry_run", "--data_dir")
    images = folder / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for content, said in ((whole[:-9], "not Fashion-MNIST"), (gzip.compress(b"other"), "checksum")):
        images.write_bytes(content)
        assert said in call(*words, folder, status=2)
    images.unlink()
    assert "holds no train-images" in call(*words, folder, status=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Path, "is_file", lambda path: str(path).startswith(str(tmp_path)) and path.exists())
    answers = []
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answers.pop()))
    for answer in ([], [b"a login page"]):
        answers[:] = answer
        assert "--data_dir" in call(*words[:-1], status=2) and not (tmp_path / ".cache").exists()
    answers[:] = [(folder / "train-labels-idx1-ubyte.gz").read_bytes(), whole]
    assert len(data.Fashion()) == len(data.Fashion()) == 40 and not answers

def test_small_preset_lets_k_arrive_and_the_average_forget(tmp_path, call, monkeypatch):
    """300 pictures of 64 px: w can pass 3, the average has faded the start; Table 4 says it cannot."""
    for i in range(300):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(train, "time_a_step", lambda *args: None)
    words = ("train.py", "--data", tmp_path, "--dry_run")
    small = call(*words, "--image_size", 64, "--preset", "small")
    settings = dict(re.findall(r"(\w+)=(\S+)", small))
    steps = int(re.search(r"steps +([\d,]+)", small)[1].replace(",", ""))
    assert settings["model"] == "JiT-S/8" and float(settings["lr"]) * float(settings["k_lr"]) * steps > 3
    assert float(settings["ema_default"]) ** steps < 0.01 and "preset small" not in small
    assert "--preset small" in call(*words) and "--preset small" in call(*words, "--image_size", 64, status=2)

def test_transparency_becomes_white(tmp_path):
    """An invisible red pixel, in a PNG with alpha and in one with a transparent palette entry."""
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.save(tmp_path / "a.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "p.png", transparency=0)
    assert all(np.asarray(read_image(tmp_path / name)).min() == 255 for name in ("a.png", "p.png"))

def test_nearest_finds_the_copy_and_gif_shows_every_step(call, tmp_path):
    """A shape with noise finds itself among 500; one frame a step, then the result."""
    shapes = Shapes(500, 32)
    images = torch.stack([shapes[i][0] for i in (3, 499, 77)])
    noisy = (images.int() + torch.randint(-9, 9, images.shape)).clamp(0, 255).to(torch.uint8)
    assert torch.equal(nearest(noisy, shapes), images)
    call(*TINY, "--steps", 1, "--out", tmp_path)
    words = ("sample.py", tmp_path / "ckpt.pt", "--steps", 3, "--n", 8)
    call(*words, "--gif", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames >= 4
    call(*words, "--nearest", "shapes", "--out", tmp_path / "n.png")
    assert Image.open(tmp_path / "n.png").size[1] > 16 * 96

# ------------------------------------------------------------------------------------------------------------
# Machines

def test_busy_cores_cost_a_thread_and_a_line(monkeypatch, capsys, tmp_path):
    """Where a process got less than 0.7 of its threads' time, one thread goes; an idle machine keeps all."""
    settings, threads = argparse.Namespace(batch_size=8, steps=9), []
    state = State(KDiff(Linear(4), num_classes=1), [0.9])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    clock = {"perf_counter": 0.0, "process_time": 0.0}
    for name in clock:
        monkeypatch.setattr(time, name, lambda name=name: clock[name])
    log = train.Log(tmp_path / "log.csv", state, settings, range(16))
    for wall, used, expected in ((1.9, 0.1, []), (0.2, 4.0, []), (2.1, 1.3, [1]), (2.1, 4.0, [1])):
        clock["perf_counter"] += wall
        clock["process_time"] += used
        log.add(0.5, 1.0)
        assert threads == expected
    assert "other programs left 0.6 of 2 cores" in capsys.readouterr().out

def test_without_a_compiler_networks_stay_eager(monkeypatch, capsys):
    """One line instead of an error in the first step."""
    def broken(*args, **kw):
        raise RuntimeError("no compiler\nfound")
    monkeypatch.setattr(torch, "compile", broken)
    net = Linear(3)
    compile_network(net)
    assert "not compiled" in (said := capsys.readouterr().out) and said.count("\n") == 1
    assert net(torch.ones(1, 3, 1, 1), None, None).shape == (1, 3, 1, 1)

# ------------------------------------------------------------------------------------------------------------
# README.md

def readme_commands():
    """Every call of our scripts in the README: [script, flag, ...]; loops at their first value."""
    text = (HERE / "README.md").read_text()
    blocks, inline = re.findall(r"```bash\n(.*?)```", text, re.S), re.sub("```.*?```", "", text, flags=re.S)
    calls = re.findall("`((?:python|torchrun) (?!data)[^`]+)`", inline)
    text = "\n".join(blocks + [call.replace("\n", " ") for call in calls]).replace("\\\n", " ")
    for name, value in re.findall(r"for (\w+) in (\S+)", text):
        text = text.replace(f"${name}", value)
    return [shlex.split(call, comments=True) for call in
            re.findall(r"(?:python|torchrun|-\S+)[ =](?:HOST:29500 )?(\w+\.py[^;&|\n]*)", text)]

def test_every_readme_command_is_understood(tmp_path, monkeypatch):
    """Its script parses its flags; each train.py among them does a dry run on small stand-ins for data."""
    for name in ("imagenet/train", "photos", "latents"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name / "a.png")
    np.save(tmp_path / "imagenet256.npy", np.zeros(2, [("image", "u1", (3, 256, 256)), ("label", "<i8")]))
    latents = np.random.RandomState(0).standard_normal((2, 32, 16, 16)).astype(np.float16)
    save_arrays(tmp_path / "latents", dict(latents=latents, latents_flip=latents, labels=np.zeros(2, int)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "Fashion", lambda size, folder: Shapes(80, size))
    monkeypatch.setattr(train, "time_a_step", lambda *args: None)             # minutes, for some
    commands = readme_commands()
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
