"""Every claim of the other files, each test named after one: `pytest test_all.py`, no network, no GPU."""
import argparse
import hashlib
import importlib
import io
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tracemalloc
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")      # threads that wait by spinning make a shared machine crawl

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import data
import fid
import model
import train
from data import (VAVAE, Codec, ImageFolder, Latents, Order, PatchPCA, Shapes, UserError, crop, open_dataset,
                  pack, read_image, read_tensors, run)
from model import JiT
from objective import KDiff, equilibrium, k_of_t, logit_normal, optimal_k, optimal_loss, train_linear
from sample import assemble, generate, guided, integrate, load, read_log
from train import EMA

HERE = Path(__file__).parent


TINY_JIT = dict(image_size=32, patch_size=8, dim=64, depth=6, heads=4, num_classes=10, bottleneck=16,
                context_tokens=4, context_start=2)
TINY_DIT = dict(image_size=8, patch_size=1, in_channels=4, dim=64, depth=4, heads=4, num_classes=10)
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                                    reason="needs a C++ compiler")
PUBLISHED = {"JiT-B/16": (256, 131, 25), "JiT-B/32": (512, 133, 26), "LightningDiT-XL/1": (16, 675, 119)}


def normal(key, *shape):
    """Normal numbers that depend on the key alone (numpy's legacy generator is frozen)."""
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(r, dtype=np.float32))


def noise(*shape):
    """uint8 pixels, always the same for one shape."""
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def fill(net, conv_gain=1.0):
    """Weights as a function of their key; the tables of positions stay."""
    state = net.state_dict()
    for key, value in state.items():
        if "pos_embed" in key or "feat_rope" in key or "num_batches_tracked" in key:
            continue
        r = normal(key, *value.shape)
        if key.endswith("running_var"):
            value.copy_(1 + 0.1 * r.abs())
        elif value.ndim > 1:
            value.copy_(r / math.sqrt(value[0].numel()) * (conv_gain if value.ndim == 4 else 1))
        else:
            value.copy_(0.1 * r + key.endswith("weight"))
    net.load_state_dict(state)
    return net.eval()


def inputs(net, n=3):
    x = normal("x", n, net.in_channels, net.image_size, net.image_size)
    return x, torch.tensor([0.05, 0.5, 0.93])[:n], torch.tensor([0, 3, 10])[:n]


def error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def plain_network(state, x, t, y, heads, p, start=None):
    """Both transformers in float64 and in plain formulas: explicit rotation matrices, softmax, loops."""
    state, x = {key: value.double() for key, value in state.items()}, x.double()
    def linear(name, v): return v @ state[name + ".weight"].flatten(1).T + state.get(name + ".bias", 0)
    def silu(v): return v / (1 + torch.exp(-v))
    def rms(v): return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    def modulated(name, v, shift, scale):
        return rms(v) * state[name + ".weight"] * (1 + scale[:, None]) + shift[:, None]

    f = torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)]).double()
    f = t.double()[:, None] * f
    label = state["y_embedder.embedding_table.weight"][y]
    time = silu(linear("t_embedder.mlp.0", torch.cat([f.cos(), f.sin()], 1)))
    condition = silu(linear("t_embedder.mlp.2", time) + label)

    v = F.unfold(x, p, stride=p).transpose(1, 2)
    for name in ("x_embedder.proj", "x_embedder.proj1", "x_embedder.proj2"):
        v = linear(name, v) if name + ".weight" in state else v
    N, T, D = v.shape
    side, h = math.isqrt(T), D // heads
    turn = torch.eye(h).double().repeat(T, 1, 1)                  # a rotation matrix for each token
    for n in range(T):
        row, column = divmod(n, side)
        for i in range(D // 4):
            w = 10000 ** (-i / (D / 4))
            for k, a in enumerate((column, column + math.pi / 2 / w, row, row + math.pi / 2 / w)):
                v[:, n, k * D // 4 + i] += math.sin(a * w)
        for i in range(h // 4):
            for k, position in enumerate((row, column)):
                a, j = position * 10000 ** (-2 * i / (h / 2)), k * h // 2 + 2 * i
                c, s = math.cos(a), math.sin(a)
                turn[n, j:j + 2, j:j + 2] = torch.tensor([[c, -s], [s, c]])

    depth = sum(key.endswith("attn.qkv.weight") for key in state)
    for i in range(depth):
        b = f"blocks.{i}."
        if i == start:
            v = torch.cat([label[:, None] + state["in_context_posemb"], v], 1)
            turn = torch.cat([torch.eye(h).double().repeat(v.shape[1] - T, 1, 1), turn])
        m = linear(b + "adaLN_modulation.1", condition).chunk(6, 1)
        u = linear(b + "attn.qkv", modulated(b + "norm1", v, m[0], m[1]))
        q, k, u = u.view(N, -1, 3, heads, h).unbind(2)
        if b + "attn.q_norm.weight" in state:
            q, k = rms(q) * state[b + "attn.q_norm.weight"], rms(k) * state[b + "attn.k_norm.weight"]
        q, k = (torch.einsum("tij,nthj->nthi", turn, a) for a in (q, k))
        weights = torch.einsum("nthi,nshi->nhts", q, k).div(math.sqrt(h)).softmax(-1)
        u = torch.einsum("nhts,nshi->nthi", weights, u).flatten(2)
        v = v + m[2][:, None] * linear(b + "attn.proj", u)
        gate, u = linear(b + "mlp.w12", modulated(b + "norm2", v, m[3], m[4])).chunk(2, -1)
        v = v + m[5][:, None] * linear(b + "mlp.w3", silu(gate) * u)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, 1)
    v = linear("final_layer.linear", modulated("final_layer.norm_final", v[:, -T:], shift, scale))
    out = torch.zeros_like(x)
    for n in range(T):
        r, c = (p * a for a in divmod(n, side))
        out[:, :, r:r + p, c:c + p] = v[:, n].view(N, p, p, -1).permute(0, 3, 1, 2)
    return out


@torch.no_grad()
def test_jit_gives_the_published_outputs():
    """Eight values and the norm, recorded from the official JiT with the same weights and inputs."""
    net = fill(model.JiT(**TINY_JIT))
    out = net(*inputs(net))
    assert out.double().norm().item() == pytest.approx(103.878723639, rel=2e-6)
    assert error(out.flatten()[::1152], torch.tensor([
        1.1088155, 0.3588501, 0.2639662, 0.8095108, 0.1001933, -0.7362202, -0.3031009, 0.5599152])) < 5e-6


@torch.no_grad()
def test_dit_gives_the_published_outputs():
    """Eight values and the norm, recorded from the official LightningDiT with the same weights and inputs."""
    net = fill(model.DiT(**TINY_DIT))
    out = net(*inputs(net))
    assert out.double().norm().item() == pytest.approx(27.796994863, rel=2e-6)
    assert error(out.flatten()[::96], torch.tensor([
        0.6621699, -0.5919473, -1.8791257, 0.8669273, 0.6637198, 0.1345732, -0.2202371, 0.3395236])) < 5e-6


@torch.no_grad()
def test_vavae_gives_the_recorded_outputs():
    """Recorded from this network on the day it agreed with the published VA-VAE to 2e-6 on other inputs."""
    net = fill(model.Autoencoder())
    assert len(net.state_dict()) == 342
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(69.8e6, rel=1e-3)
    mean, logvar = net.encode(normal("image", 1, 3, 32, 32).clamp(-1, 1))
    decoded = net.decode(normal("latent", 1, 32, 2, 2))
    for ours, step, theirs in (
            (mean, 21, [-1.0745137, 0.0772690, 0.1852882, 0.0853687, 0.1466803, 0.8969275, -0.2936863]),
            (logvar, 21, [0.5578808, -0.1124427, 0.0686487, 0.2051294, 0.5207110, -0.7133107, 0.2566133]),
            (decoded, 512, [0.0819790, 0.0125354, 0.0633307, 0.3859310, 0.0738646, -0.3686411])):
        assert error(ours.flatten()[::step], torch.tensor(theirs)) < 5e-6


@pytest.mark.parametrize("change", [
    {}, {"context_tokens": 0}, {"patch_size": 4, "context_start": 5}, {"in_channels": 1, "context_start": 0}])
@torch.no_grad()
def test_jit_agrees_with_plain_formulas(change):
    """Class tokens at the first, a middle or the last block, or none, other patches, other channels."""
    config = TINY_JIT | change
    net = fill(model.JiT(**config))
    assert ("in_context_posemb" in net.state_dict()) == (config["context_tokens"] > 0)
    start = config["context_start"] if config["context_tokens"] else None
    args = inputs(net)
    assert error(net(*args), plain_network(net.state_dict(), *args, 4, config["patch_size"], start)) < 2e-6


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_dit_agrees_with_plain_formulas(patch_size, qk_norm):
    """With and without normalised queries and keys, for both patch sizes."""
    net = fill(model.DiT(**TINY_DIT | dict(patch_size=patch_size, qk_norm=qk_norm)))
    assert ("blocks.0.attn.q_norm.weight" in net.state_dict()) == qk_norm
    args = inputs(net)
    assert error(net(*args), plain_network(net.state_dict(), *args, 4, patch_size)) < 2e-6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_params_and_gflops(name):
    """The papers' tables: millions of parameters, billions of multiply-adds for one image."""
    size, params, gflops = PUBLISHED[name]
    with torch.device("meta"):
        net = model.build(name, size, num_classes=1000)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == params
    assert round(model.gmacs(net)) == gflops


def test_state_dicts_have_the_published_keys():
    """Their number, and one key and shape of every kind (the lists come from the published files)."""
    with torch.device("meta"):
        jit = {k: tuple(v.shape) for k, v in model.build("JiT-B/16", 256, 1000).state_dict().items()}
        dit = {k: tuple(v.shape) for k, v in model.build("LightningDiT-XL/1", 16, 1000).state_dict().items()}
    expected = {
        "pos_embed": (1, 256, 768), "in_context_posemb": (1, 32, 768), "t_embedder.mlp.0.weight": (768, 256),
        "t_embedder.mlp.2.bias": (768,), "y_embedder.embedding_table.weight": (1001, 768),
        "x_embedder.proj1.weight": (128, 3, 16, 16), "x_embedder.proj2.weight": (768, 128, 1, 1),
        "blocks.11.attn.q_norm.weight": (64,), "blocks.11.attn.qkv.weight": (2304, 768),
        "blocks.11.mlp.w12.weight": (4096, 768), "blocks.11.mlp.w3.weight": (768, 2048),
        "blocks.11.adaLN_modulation.1.weight": (4608, 768), "final_layer.norm_final.weight": (768,),
        "final_layer.linear.weight": (768, 768), "final_layer.adaLN_modulation.1.bias": (1536,)}
    assert len(jit) == 183 and expected.items() <= jit.items()
    assert len(dit) == 351 and not any("q_norm" in key for key in dit)
    assert {"x_embedder.proj.weight": (1152, 32, 1, 1), "feat_rope.freqs_cos": (256, 72),
            "blocks.27.mlp.w12.weight": (6144, 1152)}.items() <= dit.items()


@torch.no_grad()
def test_rope_tables_of_a_file_are_checked_but_not_used():
    """Wrong numbers change nothing, a wrong shape or a missing table is an error, the caller's dict stays."""
    net = fill(model.DiT(**TINY_DIT))
    out, state = net(*inputs(net)), net.state_dict()
    wrong = state | {"feat_rope.freqs_cos": torch.full((64, 16), 7.0)}
    net.load_state_dict(wrong)
    assert torch.equal(net(*inputs(net)), out) and (wrong["feat_rope.freqs_cos"] == 7).all()
    with pytest.raises(RuntimeError, match="freqs_sin"):
        net.load_state_dict(state | {"feat_rope.freqs_sin": torch.zeros(49, 16)})
    with pytest.raises(RuntimeError, match="freqs_sin"):
        net.load_state_dict({k: v for k, v in state.items() if k != "feat_rope.freqs_sin"})


def test_rope_turns_by_relative_position_and_leaves_class_tokens():
    """q.k of one vector pair at all positions: equal offsets give equal logits, other offsets others."""
    side, prefix = 4, 2
    rope = model.RoPE(side, head_dim=16, prefix=prefix)(prefix + side ** 2)
    q, k = (normal(name, 16).expand(1, prefix + side ** 2, 1, 16) for name in "qk")
    turned = [model.rotate(a, rope)[0, :, 0] for a in (q, k)]
    assert torch.equal(turned[0][:prefix], q[0, :prefix, 0])
    logits = turned[0][prefix:] @ turned[1][prefix:].T
    by_offset = {}
    for i in range(side ** 2):
        for j in range(side ** 2):
            offset = i // side - j // side, i % side - j % side
            by_offset.setdefault(offset, []).append(logits[i, j].item())
    assert all(max(group) - min(group) < 1e-5 for group in by_offset.values())
    means = sorted(sum(group) / len(group) for group in by_offset.values())
    assert min(b - a for a, b in zip(means, means[1:])) > 1e-4 and len(means) == (2 * side - 1) ** 2


@torch.no_grad()
def test_dropout_acts_in_the_middle_half_and_in_training_only():
    """Each block twice on one input; in the MLP dropout sits before w3, in attention after proj."""
    net = fill(model.JiT(**TINY_JIT | dict(depth=10, dropout=0.5))).train()
    x, condition, rope = normal("tokens", 2, 16, 64), normal("condition", 2, 64), net.rope(16)
    random = [not torch.equal(block(x, condition, rope), block(x, condition, rope)) for block in net.blocks]
    assert random == [2 <= i < 6 for i in range(10)]
    assert 0.4 < (net.blocks[2].attn(x, rope) == 0).float().mean() < 0.6
    assert (net.blocks[2].mlp(x) == 0).float().mean() < 0.1
    net.eval()
    undropped = fill(model.JiT(**TINY_JIT | dict(depth=10)))
    assert torch.equal(net(*inputs(net)), undropped(*inputs(net)))


def test_networks_start_at_zero_with_the_stated_spread():
    """adaLN-zero: the output is 0 and blocks are the identity; Xavier elsewhere, 0.02 in the embeddings."""
    torch.manual_seed(0)
    jit, dit = model.JiT(**TINY_JIT), model.DiT(**TINY_DIT)
    for net in (jit, dit):
        assert not net(*inputs(net)).any()
        x = normal("tokens", 1, 4, 64)
        rope = [table[:4] for table in (net.rope if net is jit else net.feat_rope)(16)]
        assert torch.equal(net.blocks[0](x, normal("c", 1, 64), rope), x)
        assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))
        for weight in (net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight,
                       net.y_embedder.embedding_table.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert jit.in_context_posemb.std().item() == pytest.approx(0.02, rel=0.2)
    for weight in (jit.blocks[0].attn.qkv.weight, jit.blocks[0].mlp.w3.weight, jit.x_embedder.proj1.weight,
                   jit.x_embedder.proj2.weight, dit.x_embedder.proj.weight):
        fan_in, fan_out = weight[0].numel(), weight.shape[0]
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / (fan_in + fan_out)), rel=0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("network, config", [(model.JiT, TINY_JIT), (model.DiT, TINY_DIT)])
@torch.no_grad()
def test_bf16_autocast_keeps_norms_time_and_stream_in_float32(network, config):
    """Close to float32; time embedding and norms lose no digit, the stream stays float32."""
    net, times, streams = fill(network(**config)), [], []
    net.t_embedder.register_forward_hook(lambda module, args, out: times.append(out))
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: streams.append(out.dtype))
    exact = net(*inputs(net))
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(*inputs(net))
        norm, (x, shift, scale) = net.blocks[0].norm1, normal("x", 3, 5, 64).bfloat16()
        normed, modulated = norm(x), norm(x, shift, scale)
    assert 1e-4 < error(rough, exact) < 2e-2
    assert torch.equal(times[0], times[1]) and set(streams) == {torch.float32}
    x, shift, scale = x.double(), shift.double(), scale.double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert error(normed, x) < 1e-6 and error(modulated, x * (1 + scale) + shift) < 1e-6


@needs_compiler
@pytest.mark.filterwarnings("error:.*complex.*")
def test_blocks_compiled_in_place_agree_with_eager():
    """Output and gradients; the keys of the state dict stay."""
    config = TINY_JIT | dict(depth=1, context_start=0)
    eager, compiled = fill(model.JiT(**config)), fill(model.JiT(**config))
    for block in compiled.blocks:
        block.compile()
    out = [net(*inputs(net)) for net in (eager, compiled)]
    for o in out:
        o.square().mean().backward()
    assert error(out[1], out[0]) < 2e-6 and eager.state_dict().keys() == compiled.state_dict().keys()
    for a, b in zip(compiled.parameters(), eager.parameters()):
        assert error(a.grad, b.grad) < 2e-5


@torch.no_grad()
def test_autoencoder_clamps_logvar_and_takes_any_multiple_of_16():
    """logvar within [-30, 20], the mean unclamped; 48 x 64 pixels are 3 x 4 latents and back."""
    net = fill(model.Autoencoder(widths=(32,) * 5, latent=4))
    for value, bound in ((100.0, 20.0), (-100.0, -30.0)):
        net.quant_conv.bias.fill_(value)
        mean, logvar = net.encode(normal("image", 1, 3, 48, 64))
        assert mean.shape == logvar.shape == (1, 4, 3, 4)
        assert (logvar == bound).all() and (mean.abs() > 50).all()
    assert net.decode(mean).shape == (1, 3, 48, 64)


def test_wrong_sizes_and_names_are_refused_in_one_line():
    """The message names the values and a remedy."""
    with pytest.raises(ValueError, match="^image_size 250 is not a multiple of patch_size 16: try 256$"):
        model.build("JiT-B/16", image_size=250, num_classes=10)
    with pytest.raises(ValueError, match="JiT-X/16.*JiT-B/16.*LightningDiT-XL/1"):
        model.build("JiT-X/16", image_size=256, num_classes=10)


# ------------------------------------------------------------------------------------------------------------
# objective.py

EVERY_TARGET = ["x", "v", "eps", "k", "two", "time", 0.0, 0.3, 1.0]


class Answer(torch.nn.Module):
    """A network that answers what it was told, whatever it is asked."""

    def __init__(self, u):
        super().__init__()
        self.u = u

    def forward(self, z, t, y):
        return self.u


def kdiff_for(target, u=None, **kw):
    """A KDiff whose learnable w is not at its start, in float64."""
    kdiff = KDiff(Answer(u), target, num_classes=10, **kw).double()
    if kdiff.w is not None:
        with torch.no_grad():
            kdiff.w.copy_(torch.linspace(-1.0, 2.0, kdiff.w.numel()).view(kdiff.w.shape))
    return kdiff


def solve(c, d, t, z, u):
    """(x, e) from z = t x + (1-t) e and u = c x + d e, by torch's linear solver."""
    rows = torch.stack([t, 1 - t], -1), torch.stack([c.flatten(), d.flatten()], -1)
    matrix = torch.stack(rows, 1)                                             # (N, 2, 2)
    x, e = torch.linalg.solve(matrix, torch.stack([z.flatten(1), u.flatten(1)], 1)).unbind(1)
    return x.view_as(z), e.view_as(z)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_every_target_gives_back_the_velocity_at_all_t(target):
    """u = c x + d e of the true x, e converts to x - e wherever Delta is not clamped."""
    t = torch.linspace(0.001, 0.999, 40, dtype=torch.float64)
    x, e = torch.randn(2, 40, 2, 3, 3, dtype=torch.float64)
    s = t.view(-1, 1, 1, 1)
    kdiff = kdiff_for(target, tau=1e-6)
    c, d = kdiff.coefficients(t)
    velocity = kdiff.velocity(c * x + d * e, s * x + (1 - s) * e, t)
    torch.testing.assert_close(velocity, x - e, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("loss", ["u", "x", "eps", "v"])
def test_loss_is_the_squared_error_of_the_variable_it_names(target, loss):
    """Against solving for x^ and e^ with a linear solver, at times where nothing is clamped."""
    if (target, loss) == ("two", "u"):
        with pytest.raises(ValueError, match="two"):
            KDiff(None, target, num_classes=10, loss=loss)
        return
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x, e, u_hat = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64)
    kdiff = kdiff_for(target, u_hat, tau=0.05, loss=loss)
    c, d = kdiff.coefficients(t)
    s = t.view(-1, 1, 1, 1)
    x_hat, e_hat = solve(c, d, t, s * x + (1 - s) * e, u_hat)
    errors = {"u": u_hat - c * x - d * e, "x": x_hat - x, "eps": e_hat - e, "v": (x_hat - e_hat) - (x - e)}
    torch.testing.assert_close(kdiff.loss(x, None, t, e), errors[loss].square().mean(), atol=1e-10, rtol=1e-5)


def test_one_clamp_bounds_loss_and_velocity():
    """At t = 1 x-prediction divides by tau in both; its own x-loss stays the plain MSE."""
    x, e, u_hat = torch.randn(3, 1, 2, 3, 3, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    kdiff = kdiff_for("x", u_hat, tau=0.05)
    torch.testing.assert_close(kdiff.velocity(u_hat, x, one), (u_hat - x) / 0.05)
    torch.testing.assert_close(kdiff.loss(x, None, one, e), ((u_hat - x) / 0.05).square().mean())
    kdiff = kdiff_for("x", u_hat, tau=0.05, loss="x")
    torch.testing.assert_close(kdiff.loss(x, None, one, e), (u_hat - x).square().mean())
    eps = kdiff_for("eps", u_hat, tau=0.05, loss="eps")
    torch.testing.assert_close(eps.loss(x, None, 0 * one, e), (u_hat + e).square().mean())


@pytest.mark.parametrize("target", ["k", "two", "time"])
def test_gradient_of_w_is_the_slope_of_the_loss(target):
    """Through the target and through Delta: autograd against finite differences of the whole loss."""
    torch.manual_seed(1)
    x, e, u_hat = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    kdiff, t = kdiff_for(target, u_hat, tau=0.05), torch.tensor([0.03, 0.4, 0.7, 0.999], dtype=torch.float64)
    kdiff.loss(x, None, t, e).backward()
    direction, h, w = torch.randn_like(kdiff.w), 1e-6, kdiff.w.detach().clone()
    ends = []
    for sign in (1, -1):
        kdiff.w.data = w + sign * h * direction
        ends.append(kdiff.loss(x, None, t, e).item())
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx((kdiff.w.grad * direction).sum().item(), rel=1e-5)


def test_k_of_t_is_linear_between_its_129_points():
    """At the end points the sigmoid of their w, half-way their mean."""
    w = torch.randn(129)
    t, k = torch.arange(129) / 128, torch.sigmoid(w)
    torch.testing.assert_close(k_of_t(w, t), k)
    torch.testing.assert_close(k_of_t(w, t[:-1] + 1 / 256), (k[1:] + k[:-1]) / 2)


def test_draws_follow_table_4():
    """logit(t) is normal, noise has its scale, a tenth of labels drop; each image follows its seed alone."""
    kdiff = KDiff(None, num_classes=10, t_mean=-0.8, t_std=0.8, noise_scale=2.0, label_drop=0.1)
    x, y = torch.zeros(4000, 1, 4, 4), torch.arange(4000) % 10
    t, e, labels = kdiff.draw(x, y, range(4000))
    logit, dropped = torch.logit(t), labels == 10
    assert abs(logit.mean() + 0.8) < 0.05 and abs(logit.std() - 0.8) < 0.05 and abs(e.std() - 2) < 0.02
    assert abs(dropped.float().mean() - 0.1) < 0.02 and (labels[~dropped] == y[~dropped]).all()
    correlation = torch.corrcoef(torch.stack([logit, e[:, 0, 0, 0], dropped.float()]))
    assert abs(correlation.tril(-1)).max() < 0.06
    t2, e2, _ = kdiff.draw(x[:3], y[:3], [7, 3999, 0])
    assert torch.equal(t2, t[[7, 3999, 0]]) and torch.equal(e2, e[[7, 3999, 0]])


@pytest.mark.parametrize("bad", ["y", "2", -0.1, None])
def test_unknown_target_is_named(bad):
    """A target is a row of the table or a number in [0, 1]."""
    with pytest.raises(ValueError, match="target"):
        KDiff(None, bad, num_classes=10)


# ------------------------------------------------------------------------------------------------------------
# objective.py: theory

def test_eq_12_equals_monte_carlo():
    """The loss of the linear layer at Eq. (11)'s weights, averaged over random data, noise and times."""
    torch.manual_seed(0)
    d, D, n = 3, 8, 400_000
    for c, dd, loss, density, draw, tau in (
            (0.7, -0.3, "u", None, lambda: torch.rand(n), 0.0),
            (lambda t: t, lambda t: t - 1, "x", None, lambda: torch.rand(n), 0.0),
            (0.7, -0.3, "v", logit_normal(-0.8, 0.8),
             lambda: torch.sigmoid(0.8 * torch.randn(n) - 0.8), 0.4)):
        t = draw().double()
        a, b = t, 1 - t
        c_t, d_t = (f(t) if callable(f) else torch.full_like(t, f) for f in (c, dd))
        delta = (c_t * b - d_t * a).clamp(min=tau)
        weight = {"u": 1.0, "x": ((1 - t) / delta) ** 2, "v": 1 / delta ** 2}[loss]
        par, perp = equilibrium(c, dd, loss, density, tau)
        x, e_par, e_perp = (torch.randn(n, size).double() for size in (d, d, D - d))
        a, b, c_t, d_t = (v[:, None] for v in (a, b, c_t, d_t))
        error = (par * (a * x + b * e_par) - c_t * x - d_t * e_par).square().sum(1)
        error += ((perp * b - d_t) * e_perp).square().sum(1)
        expected = optimal_loss(c, dd, d, D, loss, density, tau)
        assert (weight * error).mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("d, D", [(64, 64), (32, 64), (8, 64), (1, 64), (10, 768)])
def test_eq_12_is_least_at_k_of_theorem_3_2(d, D):
    """The minimum of the quadrature over a grid of k, against D / (D + d)."""
    ks = np.linspace(0, 1, 2001)
    at = min(range(1000, 2001), key=lambda i: optimal_loss(ks[i], ks[i] - 1, d, D))
    assert ks[at] == pytest.approx(optimal_k(d, D), abs=1e-3) and optimal_k(d, D) == D / (D + d)


def test_the_theorem_is_about_the_u_loss():
    """Under the v-loss the same layer prefers other k: reference values for D = 64, d = 32."""
    ks = np.linspace(0.5, 1, 501)[:-1].tolist() + [1.0]
    for expected, density, tau in ((1.0, None, 0.05), (0.543, logit_normal(-0.8, 0.8), 0.05),
                                   (0.995, logit_normal(0, 1), 0.0)):
        best = min(ks, key=lambda k: optimal_loss(k, k - 1, 32, 64, "v", density, tau))
        assert best == pytest.approx(expected, abs=2e-3)


def test_gradient_descent_finds_k_and_the_loss_of_the_theorem():
    """A linear layer and k trained together, d = 8 of D = 32."""
    kdiff, _, loss = train_linear(8, 32, steps=1500, batch=256)
    assert kdiff.ks()["k"].item() == pytest.approx(0.8, abs=0.02)
    assert loss == pytest.approx(optimal_loss(0.8, -0.2, 8, 32), rel=0.02)


def test_modes_of_w_relax_at_their_two_rates():
    """Eq. (9): W_par and W_perp follow exponentials of rates <a^2+b^2> = 2/3 and <b^2> = 1/3 to Eq. (11)."""
    seen, rate = {}, 0.05
    train_linear(4, 16, target="x", steps=301, batch=2048, rate=rate, watch=lambda n, W, P: seen.update({n: (
        (P.T @ W @ P).trace().item() / 4, (W.trace() - (P.T @ W @ P).trace()).item() / 12)}))
    par, perp = equilibrium(1.0, 0.0)
    assert (par, perp) == pytest.approx((0.75, 0.0), abs=1e-6)                # <a>/<a^2+b^2> = (1/2)/(2/3)
    v = {}
    train_linear(4, 16, target="v", steps=301, batch=2048, rate=rate, watch=lambda n, W, P: v.update({n: (
        (W.trace() - (P.T @ W @ P).trace()).item() / 12)}))
    for n in (20, 60, 300):
        assert seen[n][0] == pytest.approx(0.75 * (1 - math.exp(-n * rate * 2 / 3)), abs=0.02)
        assert v[n] == pytest.approx(-1.5 * (1 - math.exp(-n * rate / 3)), abs=0.02)


# ------------------------------------------------------------------------------------------------------------
# data.py

def test_item_i_of_shapes_is_always_the_same_image():
    """Whatever the number of items and the order of asking; all eight classes come in turn."""
    a, b = Shapes(40, 32), Shapes(1000, 32)
    assert [a[i][1] for i in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    for i in (39, 3, 17):
        assert a[i][0].dtype == torch.uint8 and torch.equal(a[i][0], b[i][0])
    assert not torch.equal(a[0][0], a[8][0])


def test_shapes_are_anti_aliased():
    """A disc covers pi r^2 to better than a third of a pixel: whole pixels would miss by several."""
    shapes = Shapes(80, 32)
    for i in range(0, 80, 8):
        radius = 0.9 * (0.27 + 0.07 * shapes.factors[i][2]) * 32
        image = shapes[i][0].double() / 255
        covered = ((image - 0.06) / (image.amax((1, 2), keepdim=True) - 0.06)).amax(0).sum()
        assert abs(covered - math.pi * radius ** 2) < 0.02 * math.pi * radius ** 2


@pytest.fixture
def photos(tmp_path):
    """A folder of images of many kinds: modes, sizes, formats, EXIF, links, names."""
    root = tmp_path / "Fotos für Büro"
    for name in ("chats été", "dogs/deep er"):
        (root / name).mkdir(parents=True)
    pixels = noise(50, 70, 3)
    image = Image.fromarray(pixels)
    image.save(root / "chats été" / "a b.jpg")
    image.convert("CMYK").save(root / "chats été" / "cmyk.JPEG")
    image.convert("P").save(root / "chats été" / "p.png")
    image.convert("L").resize((40, 90)).save(root / "dogs" / "grey.bmp")
    image.convert("RGBA").save(root / "dogs" / "deep er" / "ß.webp", lossless=True)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(root / "dogs" / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                                          # to be turned a quarter
    image.save(root / "dogs" / "turned.png", exif=exif)
    image.save(root / "beside.png")
    (root / "readme.txt").write_text("no image")
    return root


def test_folders_of_odd_images_are_read(photos):
    """Every mode becomes RGB, EXIF turns, 16 bits become 8, subfolders are classes, names keep letters."""
    data = ImageFolder(photos, 32)
    assert data.classes == ["Fotos für Büro", "chats été", "dogs"] and len(data) == 8
    assert all(data[i][0].shape == (3, 32, 32) and data[i][0].dtype == torch.uint8 for i in range(8))
    assert read_image(photos / "dogs" / "turned.png").size == (50, 70)
    plain = np.asarray(read_image(photos / "beside.png"))
    assert np.array_equal(np.asarray(read_image(photos / "dogs" / "sixteen.png"))[..., 0], plain[..., 0])
    flat = ImageFolder(photos / "chats été", 32)
    assert flat.classes == ["chats été"] and [label for _, label in (flat[0], flat[1])] == [0, 0]


def test_crop_is_adms():
    """For an image that halves exactly: the mean of 2x2 blocks, then Pillow's bicubic, then the centre."""
    pixels = noise(160, 208, 3)
    half = Image.fromarray(np.floor(pixels.reshape(80, 2, 104, 2, 3).mean((1, 3)) + 0.5).astype(np.uint8))
    resized = np.asarray(half.resize((83, 64), Image.BICUBIC), int)
    ours = np.asarray(crop(Image.fromarray(pixels), 64), int)
    assert ours.shape == (64, 64, 3) and abs(ours - resized[:, 9:73]).max() <= 2
    small = crop(Image.fromarray(pixels[:20, :30]), 64)                       # enlarged where it is too small
    assert small.size == (64, 64)


def test_order_is_one_permutation_after_the_other():
    """Batches of 8 from 11 images: positions in a chain of permutations for any start and process count."""
    chain = [item for batch in Order(11, 8, 3, 0, 22) for item in batch]
    for epoch in range(16):
        assert sorted(chain[epoch * 11:epoch * 11 + 11]) == [(epoch, i) for i in range(11)]
    assert [item for batch in Order(11, 8, 3, 5, 9) for item in batch] == chain[40:72]
    two = [list(Order(11, 8, 3, 0, 22, rank, 2)) for rank in (0, 1)]
    assert [item for a, b in zip(*two) for item in a + b] == chain
    assert chain[:11] != [(0, i) for _, i in chain[11:22]]                    # and epochs differ


def test_flips_follow_seed_epoch_and_index(photos):
    """A key (epoch, i) is mirrored or not, half of the time, and always the same."""
    data = ImageFolder(photos, 32)
    flipped = [not torch.equal(data[(epoch, 3)][0], data[3][0]) for epoch in range(64)]
    assert 16 < sum(flipped) < 48
    assert flipped == [not torch.equal(data[(epoch, 3)][0], data[3][0]) for epoch in range(64)]
    assert torch.equal(data[(flipped.index(True), 3)][0], data[3][0].flip(-1))


def test_packed_array_gives_the_folders_images(photos, tmp_path):
    """pack, then read through the memory map: same pixels, labels, class names."""
    pack(photos, 24, tmp_path / "p.npy")
    packed, folder = open_dataset(tmp_path / "p.npy", 24), ImageFolder(photos, 24)
    assert packed.classes == folder.classes and len(packed) == len(folder)
    assert all(torch.equal(packed[i][0], folder[i][0]) and packed[i][1] == folder[i][1] for i in range(8))
    with pytest.raises(UserError, match="24"):
        open_dataset(tmp_path / "p.npy", 32)


def test_patch_pca_round_trip_is_the_orthogonal_projection():
    """The projection of an SVD; with all channels the identity; more than a patch has is refused."""
    images = torch.randn(200, 3, 8, 8) @ torch.randn(8, 8)
    pca = PatchPCA.fit(images, 4, 10)
    def flat(x): return F.pixel_unshuffle(x, 4).transpose(0, 1).flatten(1)    # (48, patches)
    patches = flat(images)
    mean = patches.mean(1, keepdim=True)
    U = torch.linalg.svd(patches - mean, full_matrices=False).U[:, :10]
    projected = U @ U.T @ (patches - mean) + mean
    torch.testing.assert_close(flat(pca.decode(pca.encode(images))), projected, atol=2e-3, rtol=0)
    full = PatchPCA.fit(images, 4, 48)
    torch.testing.assert_close(full.decode(full.encode(images)), images, atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="48 values"):
        PatchPCA.fit(images, 4, 49)


def test_codec_scales_once_and_back():
    """Pixels: [-1, 1] and rounding; latents: (z - mean) / std and its inverse."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(Codec().decode(Codec().encode(images)), images)
    assert Codec().encode(images).min() == -1 and Codec().encode(images).max() == 1
    assert Codec().decode(torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]
    z, mean, std = torch.randn(4, 2, 3, 3), torch.randn(1, 2, 1, 1), torch.rand(1, 2, 1, 1) + 0.5
    codec = Codec(None, mean, std)
    torch.testing.assert_close(codec.encode(z), (z - mean) / std)
    assert not codec.decodes


def test_safetensors_are_read_and_truncation_is_named(tmp_path):
    """A file written by hand, byte by byte, as the format's specification has it."""
    latents, labels = np.random.RandomState(0).randn(5, 4, 2, 2).astype("<f2"), np.arange(5, dtype="<i8")
    parts, entries, offset = [latents, latents[..., ::-1].copy(), labels], {}, 0
    for name, array in zip(("latents", "latents_flip", "labels"), parts):
        entries[name] = {"dtype": {"f": "F16", "i": "I64"}[array.dtype.kind], "shape": list(array.shape),
                         "data_offsets": [offset, offset := offset + array.nbytes]}
    header = json.dumps(entries | {"__metadata__": {"by": "hand"}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"".join(array.tobytes() for array in parts)
    for shard in (0, 1):
        (tmp_path / f"latents_rank00_shard{shard:03}.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="mean and std"):
        Latents(tmp_path)
    statistics = {"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}
    torch.save(statistics, tmp_path / "latents_stats.pt")
    read = open_dataset(tmp_path, None)
    assert len(read) == 10 and read.shape == (4, 2, 2) and read[7][1] == 2
    assert np.array_equal(read[7][0].numpy(), latents[2])
    assert np.array_equal(read.item(7, True)[0].numpy(), parts[1][2])
    (tmp_path / "latents_rank00_shard001.safetensors").write_bytes(data[:-3])
    with pytest.raises(UserError, match=f"shard001.*{len(data)} bytes expected, {len(data) - 3} found"):
        Latents(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# sample.py

def test_heun_converges_at_second_order_and_euler_at_first():
    """dz/dt = -z + t from 1: the error against the closed form falls by 4 and by 2 when the steps double."""
    one, exact = torch.ones(1, dtype=torch.float64), 2 * math.exp(-1)         # z = t - 1 + 2 exp(-t)
    for solver, factor in (("heun", 4), ("euler", 2)):
        errors = [abs(integrate(lambda z, t: -z + t.double(), one, n, solver).item() - exact)
                  for n in (40, 80)]
        assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)


def test_fifty_heun_steps_take_99_evaluations():
    """The last step is Euler; times go from 0 to the last grid point before 1."""
    times = []
    integrate(lambda z, t: times.append(t.item()) or z, torch.zeros(1))
    assert len(times) == 99 and times[0] == 0 and max(times) == pytest.approx(0.98)


class Echo(torch.nn.Module):
    """Predicts its label's number; keeps the batch sizes and times it was asked for."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, z, t, y):
        self.calls.append((len(z), t[0].item()))
        return y.float().view(-1, 1, 1, 1).expand_as(z)


@pytest.mark.parametrize("interval, first, last", [
    ((0.1, 1.0), 6, 49), ((0.0, 1.0), 0, 49), ((0.3, 0.5), 16, 24)])
def test_guidance_acts_strictly_inside_its_interval(interval, first, last):
    """Of 50 steps, t = 0.1 is outside of [0.1, 1], t = 0 is inside of [0, 1]; outside there is one pass."""
    net = Echo()
    kdiff = KDiff(net, "v", num_classes=4, tau=0.0)
    velocity = guided(kdiff, torch.tensor([1]), 3.0, interval)
    inside = [velocity(torch.zeros(1, 1, 1, 1), t).item() for t in torch.linspace(0, 1, 51)[:-1]]
    assert inside == [-5.0 if first <= i <= last else 1.0 for i in range(50)]    # 4 + 3 (1 - 4), or 1
    assert [n for n, _ in net.calls] == [2 if first <= i <= last else 1 for i in range(50)]


def test_guidance_of_one_is_one_pass():
    """Scale 1 is the conditional velocity itself."""
    net = Echo()
    velocity = guided(KDiff(net, "v", num_classes=4), torch.tensor([1]), 1.0, (0.0, 1.0))
    velocity(torch.zeros(1, 1, 1, 1), torch.tensor(0.5))
    assert net.calls == [(1, 0.5)]


def test_samples_follow_their_index_alone():
    """Batch size and the images beside it change no pixel by more than one level; the seed changes them."""
    kdiff = KDiff(fill(JiT(**TINY_JIT)), "v", num_classes=10).eval()
    classes, how = [0, 1, 2, 3, 0], dict(cfg=2.0, interval=(0.1, 1.0), steps=8)
    together = generate(kdiff, Codec(), classes, range(5), **how).int()
    alone = torch.cat([generate(kdiff, Codec(), [classes[i]], [i], **how) for i in range(5)]).int()
    assert (together - alone).abs().max() <= 1
    others = generate(kdiff, Codec(), classes, range(5), **how, seed=1).int()
    assert (together - others).abs().max() > 8


def test_published_jit_files_load_and_sample(tmp_path):
    """With the training script's extras (a pickled Namespace, an optimizer); ema1, or ema2 where chosen."""
    net = model.build("JiT-demo/8", 32, 10)
    def weights(factor):
        return {f"net.{k}": v * factor for k, v in net.state_dict().items() if k != "pos_embed"} | {
            "net.pos_embed": net.pos_embed}
    torch.save({"model": weights(1), "model_ema1": weights(2), "model_ema2": weights(3), "epoch": 5,
                "optimizer": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "checkpoint-last.pth")
    bias = net.t_embedder.mlp[0].weight
    for ema, factor in ((None, 2), ("0.9996", 3)):
        it = load(tmp_path / "checkpoint-last.pth", ema=ema)
        torch.testing.assert_close(it.kdiff.net.t_embedder.mlp[0].weight, bias * factor)
    assert it.config["model"] == "JiT-demo/8" and it.kdiff.target == "x" and it.kdiff.noise_scale == 32 / 256
    images = generate(it.kdiff, it.codec, [9], [0], cfg=2.9, interval=(0.1, 1.0), steps=2)
    assert images.shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match="0.5"):
        load(tmp_path / "checkpoint-last.pth", ema="0.5")


# ------------------------------------------------------------------------------------------------------------
# train.py

def test_ema_is_the_direct_sum():
    """After n steps: decay^n p0 + (1 - decay) sum decay^(n-i) p_i; a step not taken changes nothing."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, history = EMA([p], [0.9, 0.5]), [p.detach().clone()]
    for n in range(6):
        p.data = torch.randn(2)
        history.append(p.detach().clone())
        ema.update(torch.tensor(1.0))
        before = [average[0].clone() for average in ema.averages.values()]
        p.data = torch.randn(2)
        ema.update(torch.tensor(0.0))
        assert all(torch.equal(a, average[0]) for a, average in zip(before, ema.averages.values()))
    for decay in (0.9, 0.5):
        direct = decay ** 6 * history[0] + sum(
            (1 - decay) * decay ** (6 - i) * history[i] for i in range(1, 7))
        torch.testing.assert_close(ema.averages[str(decay)][0], direct)
    with ema.swapped("0.5"):
        torch.testing.assert_close(p.data, direct)
    assert torch.equal(p.data, p.data) and not torch.allclose(p.data, direct)


def launch(words, processes):
    """What starts a script on one thread, under torchrun where processes is given: arguments of Popen."""
    torchrun = [] if processes is None else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return dict(args=[sys.executable, *torchrun, *map(str, words)], text=True, cwd=HERE,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})


def command(*words, processes=None, status=0, **kw):
    """Run one of our scripts to its end; returns what it printed, its errors last."""
    done = subprocess.run(**launch(words, processes), capture_output=True, timeout=150, **kw)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(*words, processes=None, wait_for="step 3/"):
    """Start a script in the background; return it once it has printed wait_for."""
    process = subprocess.Popen(**launch(words, processes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if wait_for in line:
            return process
    raise AssertionError("it ended before it printed " + wait_for)


TINY = ("train.py", "--batch_size", 8, "--samples", 0, "--log_every", 1, "--model", "JiT-demo/8")


def test_two_processes_and_micro_batches_equal_one_process(tmp_path):
    """Same global batch: three steps agree to float tolerance, weights, averages, k and logged loss alike."""
    command(*TINY, "--steps", 3, "--out", tmp_path / "one")
    command(*TINY, "--steps", 3, "--micro_batch", 2, "--out", tmp_path / "two", processes=2)
    one, two = (read_tensors(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    for key, value in one["ema"]["0.95"].items():
        torch.testing.assert_close(two["ema"]["0.95"][key], value, atol=2e-5, rtol=1e-3)
    logs = [read_log(tmp_path / name, "loss")[1] for name in ("one", "two")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and one["model"]["w"] != 0


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    """2 + 2 steps against 4: model, averages, optimizer; each step is logged once; a finished run says so."""
    command(*TINY, "--steps", 4, "--out", tmp_path / "whole")
    command(*TINY, "--steps", 2, "--out", tmp_path / "halves")
    said = command(*TINY, "--steps", 4, "--out", tmp_path / "halves")
    assert f"resuming from {tmp_path / 'halves' / 'ckpt.pt'} at step 2" in said
    assert "resuming with steps 4" in said
    whole, halves = (read_tensors(tmp_path / name / "ckpt.pt") for name in ("whole", "halves"))
    for part in ("model", "optimizer", "ema"):
        a, b = (torch.utils._pytree.tree_flatten(file[part])[0] for file in (whole, halves))
        assert len(a) == len(b)
        assert all(torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in zip(a, b))
    assert read_log(tmp_path / "whole", "loss") == read_log(tmp_path / "halves", "loss")
    assert "finished" in command(*TINY, "--steps", 4, "--out", tmp_path / "halves")
    said = command(*TINY, "--steps", 4, "--out", tmp_path / "halves", "--target", "v", status=2)
    assert "target k, not v" in said and "Traceback" not in said


def test_short_demo_raises_k_and_writes_its_files(tmp_path):
    """Sixty steps of the pixel demo move k from 0.5 past 0.6; pictures and log are there; it samples."""
    said = command("train.py", "--space", "pixel", "--steps", 60, "--batch_size", 32, "--samples", 8,
                   "--sample_steps", 4, "--out", tmp_path)
    assert read_log(tmp_path, "k")[1][-1] > 0.6 and "samples.png" in said
    assert Image.open(tmp_path / "samples.png").size > (96, 8 * 96) and (tmp_path / "curves.png").exists()
    command("sample.py", tmp_path / "ckpt.pt", "--classes", "star,3", "--samples", 4, "--steps", 2,
            "--out", tmp_path / "s.npz", processes=2)
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (4, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [5, 3, 5, 3] and json.loads(str(file["settings"]))["steps"] == 2
    assert "star9" in command("sample.py", tmp_path / "ckpt.pt", "--classes", "star9", status=2)


def test_latents_of_a_folder_are_encoded_trained_on_resumed_and_sampled(photos, tmp_path):
    """encode by two processes: posterior samples and their statistics; without meta.json it is refused."""
    torch.manual_seed(0)
    tokenizer, file, out = VAVAE(), tmp_path / "vavae.pt", tmp_path / "latents"
    torch.save({"state_dict": tokenizer.state_dict() | {"loss.logvar": torch.zeros(())}}, file)
    command("data.py", "encode", photos, "--tokenizer", file, "--image_size", 32, "--out", out, processes=2)
    data, images = open_dataset(out, None), ImageFolder(photos, 32)
    batch = torch.stack([images[i][0] for i in range(8)]).float() / 127.5 - 1
    for flip, batch in ((False, batch), (True, batch.flip(-1))):
        mean, logvar = tokenizer.moments(batch)
        latents = torch.stack([data.item(i, flip)[0] for i in range(8)]).float()
        drawn = (latents - mean) / torch.exp(logvar / 2)
        assert abs(drawn.mean()) < 0.15 and abs(drawn.std() - 1) < 0.15
    both = np.concatenate([np.load(out / f"{name}.npy") for name in ("latents", "latents_flip")])
    std, mean = torch.std_mean(torch.from_numpy(both).double(), (0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(data.mean.double(), mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(data.std.double(), std, atol=1e-3, rtol=0)
    assert [data[i][1] for i in range(8)] == [images[i][1] for i in range(8)]
    assert data.classes == images.classes
    words = ("train.py", "--space", "latent", "--data", out, "--image_size", 32, "--batch_size", 4,
             "--model", "LightningDiT-demo/1", "--samples", 0, "--out", tmp_path / "run")
    command(*words, "--steps", 2)
    assert "resuming" in command(*words, "--steps", 3)
    command("sample.py", tmp_path / "run" / "ckpt.pt", "--n", 3, "--steps", 2, "--tokenizer", file,
            "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[1] > 3 * 96
    assert "--tokenizer" in command("sample.py", tmp_path / "run" / "ckpt.pt", status=2)
    (out / "meta.json").unlink()
    with pytest.raises(UserError, match="meta.json"):
        open_dataset(out, None)


def test_jit_loss_and_sampler_give_the_published_numbers():
    """Recorded from the official JiT: its loss, and six guided steps of both solvers (one pixel, norm)."""
    kdiff = KDiff(fill(JiT(**TINY_JIT)), "x", num_classes=10, noise_scale=1.0, tau=0.05)
    x, e, z0 = (normal(name, 3, 3, 32, 32) for name in ("x", "e", "z0"))
    t, y, labels = torch.tensor([0.05, 0.5, 0.93]), torch.tensor([0, 3, 10]), torch.tensor([0, 3, 1])
    with torch.no_grad():
        assert kdiff.loss(0.5 * x, y, t, e).item() == pytest.approx(102.92652, rel=1e-6)
        for solver, pixels, norm in (("heun", [-0.416544, -1.016429, 0.516974], 125.321983),
                                     ("euler", [-0.015014, -1.051720, -0.029472], 122.744453)):
            z = integrate(guided(kdiff, labels, 2.9, (0.1, 1.0)), z0, 6, solver)
            assert z[:, 1, 5, 7].tolist() == pytest.approx(pixels, abs=2e-5)
            assert z.norm().item() == pytest.approx(norm, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# fid.py: network

def plain_inception(state, images):
    """FID's network in float64 from its description: layer by layer, the resize by two matrices."""
    state = {key: value.double() for key, value in state.items()}

    def matrix(n):                                                            # TF1 bilinear, (299, n)
        m = torch.zeros(299, n).double()
        for i in range(299):
            at = i * n / 299
            low = int(at)
            m[i, low] += 1 - (at - low)
            m[i, min(low + 1, n - 1)] += at - low
        return m

    def conv(x, name, stride=1, valid=False):
        w, bn = state[name + ".conv.weight"], name + ".bn."
        x = F.conv2d(x, w, None, stride, 0 if valid or stride > 1 else (w.shape[2] // 2, w.shape[3] // 2))
        mean, var, scale, shift = (state[bn + k] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, scale, shift, eps=1e-3))

    def chain(x, name, n, last_stride=1):
        for i in range(1, n + 1):
            x = conv(x, f"{name}_{i}", last_stride if i == n else 1)
        return x

    def average(x):
        ones = torch.ones_like(x[:, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)        # the padding is not counted

    def fork(x, name):
        return torch.cat([conv(x, name + "a"), conv(x, name + "b")], 1)

    x = matrix(images.shape[2]) @ images.double() @ matrix(images.shape[3]).T
    x = conv((x - 128) / 128, "Conv2d_1a_3x3", 2)
    x = conv(conv(x, "Conv2d_2a_3x3", valid=True), "Conv2d_2b_3x3")
    x = conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x = F.max_pool2d(conv(x, "Conv2d_4a_3x3", valid=True), 3, 2)
    for m in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):
        x = torch.cat([conv(x, m + "branch1x1"), chain(x, m + "branch5x5", 2),
                       chain(x, m + "branch3x3dbl", 3), conv(average(x), m + "branch_pool")], 1)
    m = "Mixed_6a."
    x = torch.cat([conv(x, m + "branch3x3", 2), chain(x, m + "branch3x3dbl", 3, 2), F.max_pool2d(x, 3, 2)], 1)
    for m in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):
        x = torch.cat([conv(x, m + "branch1x1"), chain(x, m + "branch7x7", 3),
                       chain(x, m + "branch7x7dbl", 5), conv(average(x), m + "branch_pool")], 1)
    m = "Mixed_7a."
    x = torch.cat([chain(x, m + "branch3x3", 2, 2), chain(x, m + "branch7x7x3", 4, 2),
                   F.max_pool2d(x, 3, 2)], 1)
    for m, pool in (("Mixed_7b.", average), ("Mixed_7c.", lambda x: F.max_pool2d(x, 3, 1, 1))):
        x = torch.cat([conv(x, m + "branch1x1"), fork(conv(x, m + "branch3x3_1"), m + "branch3x3_2"),
                       fork(chain(x, m + "branch3x3dbl", 2), m + "branch3x3dbl_3"),
                       conv(pool(x), m + "branch_pool")], 1)
    pool3 = x.mean((2, 3))
    return pool3, pool3 @ state["fc.weight"].T


@pytest.fixture(scope="module")
def inception():
    """The network with weights that are a function of their key."""
    return fill(fid.Inception(None), conv_gain=2 ** 0.5)


def test_inception_agrees_with_plain_layers(inception):
    """Both outputs, one side enlarged and one shrunk; train() and autocast change nothing."""
    images = torch.from_numpy(noise(1, 3, 40, 333))
    expected = plain_inception(inception.state_dict(), images)
    inception.train()
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with context:
            ours = inception(images)
        inception.eval()
        assert [tuple(v.shape) for v in ours] == [(1, 2048), (1, 1008)]
        assert max(error(*pair) for pair in zip(ours, expected)) < 5e-6


def test_inception_has_the_published_keys(inception):
    """The checksum is of the published file's sorted keys and shapes."""
    shapes = sorted((key, tuple(value.shape)) for key, value in inception.state_dict().items())
    assert len(shapes) == 566 and zlib.crc32(repr(shapes).encode()) == 1407405072


@pytest.mark.parametrize("size", [17, 256, 299, 512])
def test_resize_reads_source_i_n_over_299(size):
    """A ramp, in either direction, stays a ramp; past the last pixel it is flat."""
    ramp = torch.arange(size).clamp(max=255).to(torch.uint8)
    expected = np.interp(np.arange(299) * size / 299, np.arange(size), ramp.numpy())
    for image in (ramp[None, :].expand(size, size), ramp[:, None].expand(size, size)):
        out = fid.resize(image.expand(1, 3, size, size))[0, 1]
        out = out if image.stride(0) == 0 else out.T
        assert np.abs(out.numpy() - expected).max() < 1e-4


# ------------------------------------------------------------------------------------------------------------
# fid.py: distances

def covariance(n, dim, seed, scale=1.0):
    x = np.random.RandomState(seed).randn(n, dim) * np.linspace(1, 0.1, dim) * scale
    return x, x.mean(0), np.cov(x, rowvar=False)


def test_frechet_distance_has_its_closed_forms():
    """Equal covariances: |mu1 - mu2|^2. aa I, bb I: D (a - b)^2. Commuting: the roots' squared distance."""
    rng, D = np.random.RandomState(0), 50
    _, mu, sigma = covariance(200, D, 1)
    shift = rng.randn(D)
    assert fid.frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx(shift @ shift, rel=1e-10)
    assert fid.frechet_distance(mu, 25 * np.eye(D), mu, 4 * np.eye(D)) == pytest.approx(D * 9, rel=1e-10)
    turn, (a, b) = np.linalg.qr(rng.randn(D, D))[0], rng.rand(2, D) ** 4
    distance = fid.frechet_distance(mu, turn * a @ turn.T, mu, turn * b @ turn.T)
    assert distance == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_root():
    """scipy's sqrtm of the product, where that is well conditioned; symmetric in its arguments."""
    (_, mu1, s1), (_, mu2, s2) = covariance(300, 40, 0), covariance(250, 40, 1, 1.5)
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = (mu1 - mu2) @ (mu1 - mu2) + np.trace(s1 + s2 - 2 * root.real)
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [10, 99, 100, 101, 102, 110, 300])
@pytest.mark.parametrize("m", [80, 400])
def test_frechet_distance_is_exact_at_every_rank(n, m):
    """n samples in 100 dimensions: 0 to themselves; to others by the nuclear norm of X Y^T, with no root."""
    (x, mu1, s1), (y, mu2, s2) = covariance(n, 100, 0, 3), covariance(m, 100, 1)
    assert abs(fid.frechet_distance(mu1, s1, mu1, s1)) < 1e-6
    x, y = (x - mu1) / (n - 1) ** 0.5, (y - mu2) / (m - 1) ** 0.5
    cross = np.linalg.svd(x @ y.T)[1].sum()
    expected = (mu1 - mu2) @ (mu1 - mu2) + (x ** 2).sum() + (y ** 2).sum() - 2 * cross
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-10)
    assert fid.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_few_samples_at_full_size_is_0_to_themselves():
    """300 samples of 2048 numbers, and no variance at all."""
    _, mu, sigma = covariance(300, 2048, 0)
    assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-6
    assert fid.frechet_distance(np.ones(5), np.zeros((5, 5)), np.zeros(5), np.zeros((5, 5))) == 5


@pytest.mark.parametrize("change", [
    lambda m, s: (m[None], s), lambda m, s: (m, s[:3]), lambda m, s: (m[:3], s[:3, :3]),
    lambda m, s: (m * np.nan, s), lambda m, s: (m, s + np.inf)])
def test_frechet_distance_refuses_what_is_no_statistics(change):
    """Other shapes, NaN, infinity."""
    mu, sigma = np.zeros(4), np.eye(4)
    with pytest.raises(ValueError):
        fid.frechet_distance(mu, sigma, *change(mu, sigma))
    with pytest.raises(ValueError):
        fid.frechet_distance(*change(mu, sigma), mu, sigma)


def test_inception_score_is_the_mean_kl_of_uneven_splits():
    """By loops over 103 rows in 10 splits of 10 and 11; 1 where all agree, K for K certain classes."""
    logits = 3 * np.random.RandomState(0).randn(103, 7).astype(np.float32)
    p = np.exp(logits.astype(np.float64))[np.random.RandomState(2020).permutation(103)]
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * 103 // 10:(i + 1) * 103 // 10]
        scores.append(np.exp(sum((row * np.log(row / part.mean(0))).sum() for row in part) / len(part)))
    expected = np.mean(scores), np.std(scores)
    assert fid.inception_score(torch.from_numpy(logits)) == pytest.approx(expected, rel=1e-10)
    assert fid.inception_score(np.ones((20, 5))) == pytest.approx((1, 0), abs=1e-12)
    certain = torch.eye(4, 5, dtype=torch.float64).repeat(2, 1) * 2000    # class 4 never: 0 log 0 is not NaN
    assert fid.inception_score(certain, splits=1) == pytest.approx((4, 0), rel=1e-12)
    with pytest.raises(ValueError):
        fid.inception_score(torch.zeros(9, 5))


@pytest.mark.parametrize("sizes", [[1] * 60, [60], [7, 20, 33], [33, 20, 7]])
def test_streamed_statistics_equal_one_pass(sizes):
    """numpy's mean and cov for every way to cut the stream, around a mean a million times the spread."""
    x = np.random.RandomState(0).randn(60, 8) + 1e6
    statistics = fid.Statistics(8)
    for part in torch.from_numpy(x).split(sizes):
        statistics.add(part)
    mu, sigma, n = statistics.finish()
    assert n == 60 and np.abs(mu - x.mean(0)).max() < 1e-8
    assert np.abs(sigma - np.cov(x, rowvar=False)).max() < 1e-8


# ------------------------------------------------------------------------------------------------------------
# fid.py: evaluation

SPLIT = """
import json, numpy as np, torch, fid
from data import RANK, WORLD, Shapes, print0, setup

class Stub(fid.Pixels):
    name, key = "inception", "fid"
    def forward(self, images):
        features, _ = super().forward(images)
        return features, torch.cat([features, features[:, :240]], 1) * 8

setup("cpu")
mine = list(range(53 * RANK // WORLD, 53 * (RANK + 1) // WORLD))
parts = [mine[i:i + BATCH] for i in range(0, len(mine), BATCH)]
batches = [(torch.stack([Shapes(53, 32)[i][0] for i in part]), part[0]) for part in parts]
reference = fid.Reference("none", np.zeros(768), np.eye(768))
print0(json.dumps(fid.evaluate(reversed(batches), Stub(), reference)))
"""


def test_evaluation_does_not_depend_on_processes_batches_or_their_order(tmp_path):
    """Distance and score of 53 images: one process, batches of 53 and 10, the last first; two processes."""
    results = []
    for processes, batch in ((None, 53), (None, 10), (2, 8)):
        script = tmp_path / f"split{batch}.py"
        script.write_text(SPLIT.replace("BATCH", str(batch)))
        results.append(json.loads(command(script, processes=processes).splitlines()[0]))
    assert results[0]["n"] == 53 and results[0]["is_mean"] > 1.01
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-7)


@pytest.fixture
def samples(tmp_path):
    """12 shapes of 40 px as PNGs in two folders, an array in a zip, stored or deflated, a packed array."""
    images = [Shapes(12, 40)[i][0].permute(1, 2, 0).numpy() for i in range(12)]
    for i, image in enumerate(images):
        (tmp_path / "png" / str(i // 6)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "png" / str(i // 6) / f"{i:03}.png")
    (tmp_path / "png" / "settings.json").write_text('{"cfg": 2.5}')
    settings = np.array('{"cfg": 2.5}')
    np.savez(tmp_path / "stored.npz", arr_0=np.stack(images), arr_1=np.zeros(12), settings=settings)
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=np.stack(images))
    data.pack(tmp_path / "png", 40, tmp_path / "packed.npy")
    return tmp_path, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["png", "stored.npz", "deflated.npz", "packed.npy"])
def test_every_kind_of_file_gives_the_same_images(samples, name):
    """All, and a process's share from the middle, in batches that do not divide it."""
    folder, images = samples
    source = fid.open_source(str(folder / name), "pixels", workers=2)
    assert (source.n, tuple(source.size)) == (12, (40, 40))
    assert source.settings == ({"cfg": 2.5} if name in ("png", "stored.npz") else None)
    for first, last in ((0, 12), (4, 11)):
        batches, indices = zip(*source.read(first, last, 5))
        assert torch.equal(torch.cat(batches), images[first:last]) and indices == tuple(range(first, last, 5))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, save):
    """Reading 24 MB in batches of 0.4 MB never holds 4 MB, deflated or not."""
    save(tmp_path / "a.npz", arr_0=np.random.RandomState(0).randint(0, 9, (2000, 64, 64, 3), dtype=np.uint8))
    source = fid.open_source(str(tmp_path / "a.npz"), "pixels")
    tracemalloc.start()
    total = sum(int(batch.sum()) for batch, _ in source.read(50, 2000, 32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0 and peak < 4e6


def fid_command(monkeypatch, capsys, *words):
    """What `python fid.py ...` prints, its errors, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, words)])
    monkeypatch.setattr(run, "each_for_itself", False, raising=False)
    status = 0
    try:
        run(fid.main)
    except SystemExit as exit:
        status = exit.code
    said = capsys.readouterr()
    return said.out, [line for line in said.err.splitlines() if not line.startswith("images ")], status


def test_reference_is_written_used_and_told(samples, monkeypatch, capsys):
    """Samples are 0 from their own reference, elsewhere not; hash and settings are printed, `FID` is not."""
    folder, images = samples
    words = ("--features", "pixels", "--batch_size", 5)
    made = ("--make_ref", folder / "png", "--image_size", 40, "--out", folder / "ref.npz")
    assert fid_command(monkeypatch, capsys, *made, *words)[2] == 0
    ref, x = fid.load_reference(str(folder / "ref.npz"), "pixels"), images.double().numpy() / 255
    weights = np.zeros((16, 40))                                              # area average of 2.5 pixels
    for i in range(16):
        for j in range(40):
            low, high = int(np.floor(i * 2.5)), int(np.ceil((i + 1) * 2.5))
            weights[i, j] = (low <= j < high) / (high - low)
    features = (weights @ x @ weights.T).reshape(12, 768)
    assert np.abs(ref.mu - features.mean(0)).max() < 1e-6
    assert np.abs(ref.sigma - np.cov(features, rowvar=False)).max() < 1e-6
    out, errors, status = fid_command(monkeypatch, capsys, folder / "png", folder / "ref.npz", *words)
    assert status == 0 and not errors and abs(float(re.search(r"pixel distance (\S+)", out)[1])) < 1e-6
    digest = hashlib.sha256((folder / "ref.npz").read_bytes()).hexdigest()
    assert digest in out and '"cfg": 2.5' in out and "12 images" in out and "FID" not in out
    np.savez(folder / "dark.npz", arr_0=(images // 2).permute(0, 2, 3, 1).numpy())
    said = [fid_command(monkeypatch, capsys, folder / "dark.npz", folder / name, *words)[0]
            for name in ("ref.npz", "packed.npy")]
    distances = [float(re.search(r"pixel distance (\S+)", text)[1]) for text in said]
    assert distances[0] > 1 and distances[1] == pytest.approx(distances[0], rel=1e-5)


def test_fid_of_few_images_comes_with_a_warning(capsys):
    """Fewer than 2,048 of either; published references do not tell, and the pixel distance needs none."""
    reference = fid.Reference("ref.npz", None, None)
    for result, n, warns in (({"fid": 3.0, "n": 2047}, None, True), ({"fid": 3.0, "n": 2048}, None, False),
                             ({"fid": 3.0, "n": 9999}, 2047, True),
                             ({"pixel_distance": 3.0, "n": 9}, None, False)):
        fid.show(result, reference._replace(n=n), fid.WEIGHTS)
        out = capsys.readouterr().out
        assert ("warning" in out) == warns and ("FID" in out) == ("fid" in result)


def damage(folder):
    """Files that no evaluation must accept, each with what its error has to name."""
    stored, eye = (folder / "stored.npz").read_bytes(), np.eye(768)
    (folder / "cut.npz").write_bytes(stored[:-2000])
    (folder / "flipped.npz").write_bytes(stored[:2000] + bytes([stored[2000] ^ 1]) + stored[2001:])
    (folder / "text.npz").write_text("hello")
    (folder / "text.npy").write_text("hello")
    np.savez(folder / "empty.npz", other=eye)
    np.savez(folder / "float.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(folder / "grey.npz", arr_0=np.zeros((4, 8, 8), dtype=np.uint8))
    np.savez(folder / "pickled.npz", mu=np.array([{}], dtype=object), sigma=eye)
    np.savez(folder / "half.npz", mu=np.zeros(768))
    np.savez(folder / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(folder / "nan.npz", mu=np.zeros(768), sigma=eye * np.nan)
    np.savez(folder / "other.npz", mu=np.zeros(768), sigma=eye, features="inception")
    np.savez(folder / "size.npz", mu=np.zeros(768), sigma=eye, features="pixels", image_size=64)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10 ** 9, 512, 512, 3)})
    with zipfile.ZipFile(folder / "huge.npz", "w") as file:
        file.writestr("arr_0.npy", header.getvalue() + b"0" * 100)
    (folder / "one").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "one" / "a.png")
    np.savez(folder / "one.npz", arr_0=np.zeros((1, 40, 40, 3), dtype=np.uint8))


UNFIT = {"nowhere.npz": "No such file", "cut.npz": "zip", "flipped.npz": "CRC", "text.npz": "zip",
         "text.npy": "not a readable array", "empty.npz": "arr_0", "float.npz": "float64",
         "grey.npz": r"\(4, 8, 8\)", "pickled.npz": "allow_pickle=False", "half.npz": "sigma",
         "small.npz": r"\(64,\)", "nan.npz": "not finite", "other.npz": "inception",
         "size.npz": "made at 64x64 px, the samples have 40x40", "huge.npz": "1,000,000,000",
         "one": "1 images", "one.npz": "1 images"}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_samples_and_references_get_one_line(samples, monkeypatch, capsys, name):
    """As a reference and as samples; exit status 2."""
    folder, _ = samples
    damage(folder)
    good, bad = folder / "png", folder / name
    for pair in [(good, bad)] if name == "size.npz" else [(good, bad), (bad, good)]:
        _, errors, status = fid_command(monkeypatch, capsys, *pair, "--features", "pixels", "--batch_size", 5)
        assert status == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
        assert name in errors[0] and re.search(UNFIT[name], errors[0]), errors


def test_images_of_two_sizes_are_both_named(samples, monkeypatch, capsys):
    """Met while reading ahead in a thread."""
    folder, _ = samples
    Image.new("RGB", (40, 41)).save(folder / "png" / "0" / "004.png")
    words = (folder / "png", folder / "stored.npz", "--features", "pixels")
    _, errors, status = fid_command(monkeypatch, capsys, *words)
    assert status == 2 and len(errors) == 1
    assert "004.png is 40x41" in errors[0] and "000.png is 40x40" in errors[0]


def test_other_weights_are_refused(samples, inception, monkeypatch, capsys):
    """A file of another hash; --any_weights takes it and says so; such a reference fits these alone."""
    folder, _ = samples
    torch.save(inception.state_dict(), folder / "random.pth")
    words = ("--make_ref", folder / "png", "--image_size", 40, "--out", folder / "ref.npz",
             "--weights", folder / "random.pth")
    _, errors, status = fid_command(monkeypatch, capsys, *words)
    assert status == 2 and len(errors) == 1 and "random.pth: not FID's weights" in errors[0]
    assert fid_command(monkeypatch, capsys, *words, "--any_weights")[2] == 0
    words = (folder / "png", folder / "ref.npz", "--any_weights", "--weights")
    out, _, status = fid_command(monkeypatch, capsys, *words, folder / "random.pth")
    assert status == 0 and "WARNING: not FID's own" in out
    assert abs(float(re.search(r"FID (\S+)", out)[1])) < 1e-6
    state = inception.state_dict()
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, folder / "others.pth")
    out, errors, status = fid_command(monkeypatch, capsys, *words, folder / "others.pth")
    assert status == 2 and len(errors) == 1 and "made with other weights" in errors[0]
    torch.save({"conv": torch.zeros(3)}, folder / "alien.pth")
    with pytest.raises(UserError, match="alien.pth: not FID's Inception"):
        fid.Inception(folder / "alien.pth")


def test_weights_are_downloaded_once_and_only_if_right(tmp_path, monkeypatch):
    """A wrong answer is not stored, the second address is asked; without network one line tells where."""
    right, answers, asked = b"the weights", {}, []

    def urlopen(url, timeout):
        asked.append(url)
        if url not in answers:
            raise OSError("no network")
        return io.BytesIO(answers[url])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(fid, "WEIGHTS", hashlib.sha256(right).hexdigest())
    with pytest.raises(UserError, match="no network.*https://github.com.*--weights"):
        fid.make_extractor("inception")
    answers = {fid.URLS[0]: b"a login page", fid.URLS[1]: right}
    path = fid.find_weights()
    assert path.read_bytes() == right and asked == [*fid.URLS] * 2
    assert fid.find_weights() == path and len(asked) == 4


# ------------------------------------------------------------------------------------------------------------
# Faults: interruptions, numbers that are not finite, files that are not what they say

def step_for(monkeypatch, *flags):
    """A Step of the demo as train.py makes it, and a function that takes its n-th step in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch_size", "8", *flags])
    args, cpu = train.parse(), torch.device("cpu")
    data, codec, config, _ = train.prepare(args, cpu)
    torch.manual_seed(0)
    it = train.Step(assemble(config).train(), codec, args, cpu)

    def take(n, spoil=lambda batch: batch):
        items = [data[8 * n + i] for i in range(8)]
        batch = torch.stack([image for image, _ in items])
        labels = torch.tensor([label for _, label in items])
        it(spoil(batch), labels, list(range(8 * n, 8 * n + 8)), 1.0)
        return it.read()
    return it, take


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_that_is_not_finite_changes_nothing(monkeypatch, value):
    """Neither weights nor optimizer nor averages; it is counted; the next step goes on as if it had not."""
    it, take = step_for(monkeypatch, "--clip", "1")
    take(0)

    def state():
        moments = (t for state in it.optimizer.state.values() for t in state.values())
        averages = (t for average in it.ema.averages.values() for t in average)
        return [t.clone() for t in (*it.parameters, *moments, *averages)]
    before = state()
    loss, _, skipped, row = take(1, lambda batch: batch.float().index_fill(0, torch.tensor([3]), value))
    assert all(torch.equal(a, b) for a, b in zip(before, state())) and math.isnan(loss)
    assert (skipped, row) == (1, 1)
    loss, _, skipped, row = take(1)
    assert math.isfinite(loss) and (skipped, row) == (1, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, it.parameters))


BAD_LOSS = """
import torch, train
from data import setup
from sample import assemble

device, rank, world = setup("cpu")
args = train.parse()
data, codec, config, _ = train.prepare(args, device)
it = train.Step(assemble(config).train(), codec, args, device)
for step in range(3):
    batch = torch.stack([data[rank * 2 + i][0] for i in range(2)]).float() / 127.5 - 1
    batch += torch.inf if step == 1 and rank == 1 else 0
    before = [p.clone() for p in it.parameters]
    it(batch, torch.tensor([0, 1]), [step, 9 + rank], 1.0)
    moved = not all(torch.equal(a, b) for a, b in zip(before, it.parameters))
    total = sum(p.double().sum().item() for p in it.parameters)
    print(f"rank {rank} step {step} moved {moved} sum {total:.12f}")
"""


def test_process_with_a_bad_loss_stops_the_step_on_all(tmp_path):
    """Two processes, one of which sees an infinite pixel: neither moves, and they stay equal."""
    (tmp_path / "bad.py").write_text(BAD_LOSS)
    said = re.findall(r"rank (\d) step (\d) moved (\w+) sum ([\d.]+)",         # two may share a line
                      command(tmp_path / "bad.py", "--batch_size", 4, processes=2))
    moved = {(int(rank), int(step)): (whether, total) for rank, step, whether, total in said}
    assert [moved[rank, step][0] for rank in (0, 1) for step in range(3)] == ["True", "False", "True"] * 2
    assert moved[0, 2][1] == moved[1, 2][1]


def test_ten_bad_steps_in_a_row_end_the_run(tmp_path):
    """A rate that throws the weights to 1e30: one line says what to try, and no checkpoint holds a NaN."""
    said = command(*TINY, "--steps", 30, "--lr", "1e30", "--save_every", 1, "--out", tmp_path, status=2)
    assert "10 steps in a row" in said and "--lr" in said and "Traceback" not in said
    file = read_tensors(tmp_path / "ckpt.pt")
    for weights in (file["model"], *file["ema"].values()):
        assert all(t.isfinite().all() for t in weights.values())


def test_bfloat16_checkpointing_and_clipping_follow_float32(monkeypatch):
    """Thirty steps of the demo: bfloat16 autocast within noise of float32, recomputed activations equal."""
    curves = {}
    for name, flags in (("float32", ()), ("bfloat16", ("--dtype", "bfloat16")),
                        ("recomputed", ("--activation_checkpointing",))):
        it, take = step_for(monkeypatch, *flags)
        curves[name] = [take(n)[0] for n in range(30)]
        assert all(p.dtype == torch.float32 for p in it.parameters)
    assert curves["recomputed"] == pytest.approx(curves["float32"], rel=1e-5)
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.05)
    assert curves["bfloat16"] != curves["float32"]


@pytest.mark.parametrize("processes", [None, 2])
def test_sigterm_saves_the_step_and_the_same_command_continues(tmp_path, processes):
    """Also under torchrun, also when the signal comes twice: a line says where, and the log goes on there."""
    process = start(*TINY, "--steps", 500, "--out", tmp_path, processes=processes)
    process.send_signal(signal.SIGTERM)
    if processes is None:
        process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "the same command continues" in said
    step = read_tensors(tmp_path / "ckpt.pt")["step"]
    assert f"after step {step}" in said and read_log(tmp_path, "step")[0] == list(range(1, step + 1))
    assert f"at step {step}" in command(*TINY, "--steps", step + 1, "--out", tmp_path)
    assert read_log(tmp_path, "step")[0] == list(range(1, step + 2))


def kill_and_check(folder, rounds, rng):
    """kill -9 a run that saves after every step, at random moments; its checkpoint loads and only grows."""
    steps = [0]
    for _ in range(rounds):
        process = start(*TINY, "--steps", 100000, "--save_every", 1, "--keep", 1, "--out", folder,
                        wait_for=f"step {steps[-1] + 2:,}/")
        time.sleep(rng.uniform(0, 1))
        process.kill()
        process.communicate()
        steps.append(read_tensors(folder / "ckpt.pt")["step"])
        assert steps[-1] > steps[-2]
    return steps


def test_kill_at_a_random_moment_leaves_a_loadable_checkpoint(tmp_path):
    """Twice here; ENDURANCE=1 does it fifty times."""
    kill_and_check(tmp_path, 50 if os.environ.get("ENDURANCE") else 2, random.Random(0))


def test_full_disk_while_saving_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk: one line, exit status 2, no temporary file left."""
    command(*TINY, "--steps", 1, "--out", tmp_path)
    said = command(*TINY, "--steps", 3, "--out", tmp_path, status=2,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20)))
    assert "ckpt.pt could not be written" in said and "Traceback" not in said
    assert read_tensors(tmp_path / "ckpt.pt")["step"] == 1 and not list(tmp_path.glob("*.tmp*"))


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_hostile_files_are_refused_without_running_them(tmp_path):
    """Pickle payloads in checkpoints, .npy and .npz; the error names the file."""
    marker = tmp_path / "marker"
    torch.save({"config": {}, "data": Payload(marker)}, tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "c.npz", arr_0=np.array([Payload(marker)], dtype=object))
    for path, opener in (("a.pt", load), ("b.npy", lambda path: open_dataset(path, 32)),
                         ("c.npz", lambda path: fid.open_source(str(path), "pixels"))):
        with pytest.raises(UserError, match=path):
            opener(tmp_path / path)
    assert not marker.exists()


def test_bad_images_are_named(tmp_path):
    """Truncated, empty, renamed text, vanished, a decompression bomb, a link in a circle, an empty class."""
    good = tmp_path / "good.png"
    Image.fromarray(noise(40, 40, 3)).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:900])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    for name in ("cut.png", "empty.jpg", "text.jpg", "bomb.png", "gone.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match="class.*without images"):
        ImageFolder(tmp_path, 32)
    (tmp_path / "class" / "loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="loop.*circle"):
        ImageFolder(tmp_path, 32)
    with pytest.raises(UserError, match="nowhere"):
        open_dataset(tmp_path / "nowhere", 32)


def test_bad_image_ends_all_processes_with_one_line(tmp_path):
    """Met by a loader's worker of one of two processes, in a dataset smaller than the batch."""
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    words = ("train.py", "--data", tmp_path, "--image_size", 16, "--model", "JiT-demo/8", "--batch_size", 4,
             "--steps", 3, "--workers", 1, "--samples", 0, "--out")
    command(*words, tmp_path / "out")
    (tmp_path / "2.png").write_bytes(b"no image")
    began = time.time()
    said = command(*words, tmp_path / "other", processes=2, status=1)
    assert "error: " in said and "2.png: not a readable image" in said and time.time() - began < 60
    assert not re.search(r"File .*(train|data).py", said)             # torchrun's own report has a traceback


BAD = [
    (("train.py", "--batch_size", "0"), "--batch_size 0"),
    (("train.py", "--model", "JiT-X/16"), "JiT-X/16"),
    (("train.py", "--image_size", "30"), "30"),
    (("train.py", "--data", "nowhere"), "nowhere"),
    (("train.py", "--data", ".", "--image_size", "64"), "--model"),
    (("train.py", "--target", "y"), "target"),
    (("train.py", "--target", "two", "--loss", "u"), "two"),
    (("train.py", "--micro_batch", "7"), "--micro_batch 7"),
    (("train.py", "--steps", "x"), "--steps"),
    (("train.py", "--init", "nowhere.pt", "--out", "OUT"), "nowhere.pt"),
    (("sample.py", "nowhere.pt"), "nowhere.pt"),
    (("fid.py", "nowhere", "nowhere"), "nowhere"),
    (("data.py", "pack", "nowhere", "--out", "OUT/x.npy"), "nowhere"),
    (("data.py", "encode", ".", "--out", "OUT", "--tokenizer", "nowhere.pt"), "nowhere.pt"),
]


@pytest.mark.parametrize("words, named", BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, capsys, words, named):
    """The line names the flag or file; nothing is written."""
    monkeypatch.setattr(sys, "argv", [word.replace("OUT", str(tmp_path / "out")) for word in words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(importlib.import_module(words[0][:-3]).main)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and named in said and said.count("\n") == 1 and said.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_batch_that_does_not_divide_over_processes_is_told_once():
    """Under torchrun: one line from the first process, then torchrun's own report."""
    said = command("train.py", "--batch_size", 65, processes=2, status=1)
    assert said.count("--batch_size 65 does not divide over 2 processes: try 64") == 1
    assert not re.search(r"File .*(train|data).py", said)


def corrupted(content, rng):
    """A copy that is cut short, has bytes overwritten, or a stretch removed or doubled."""
    content, at = bytearray(content), rng.randrange(len(content))
    kind, stretch = rng.randrange(4), rng.randint(1, 64)
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        content[at:at + stretch] = rng.randbytes(min(stretch, len(content) - at))
    elif kind == 2:
        del content[at:at + stretch]
    else:
        content[at:at] = content[at:at + stretch]
    return bytes(content)


def test_corruption_of_any_file_is_an_error_line_or_harmless(tmp_path):
    """Images, checkpoints, arrays, latents: UserError, or read as what they still are; ENDURANCE=1: 200."""
    rng, picture = random.Random(1), Image.fromarray(noise(24, 24, 3))
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp"):
        picture.save(tmp_path / name)
    net = model.build("JiT-demo/8", 32, 8).half()
    torch.save({f"net.{k}": v for k, v in net.state_dict().items()}, tmp_path / "a.pt")
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8),
                        settings=np.array('{"cfg": 2}'))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(768), sigma=np.eye(768))
    header = json.dumps({
        "latents": {"dtype": "F32", "shape": [3, 2, 2, 2], "data_offsets": [0, 96]},
        "latents_flip": {"dtype": "F32", "shape": [3, 2, 2, 2], "data_offsets": [96, 192]},
        "labels": {"dtype": "I64", "shape": [3], "data_offsets": [192, 216]}}).encode()
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(216))
    torch.save({"mean": torch.zeros(2), "std": torch.ones(2)}, shards / "latents_stats.pt")
    np.save(tmp_path / "a.npy", np.zeros(3, [("image", "u1", (3, 8, 8)), ("label", "<i8")]))

    def read_npz(path):
        source = fid.open_source(str(path), "pixels")
        return list(source.read(0, source.n, 2)) if hasattr(source, "read") else source

    def read_all(data):
        return [data[i] for i in range(len(data))]
    openers = {"a.png": read_image, "a.jpg": read_image, "a.webp": read_image, "a.bmp": read_image,
               "a.pt": load, "a.npz": read_npz, "ref.npz": read_npz,
               "a.npy": lambda path: read_all(open_dataset(path, 8)),
               "shards/a.safetensors": lambda path: read_all(Latents(path.parent)),
               "shards/latents_stats.pt": lambda path: Latents(path.parent)}
    whole = {name: (tmp_path / name).read_bytes() for name in openers}
    refused = 0
    for i in range(220 if os.environ.get("ENDURANCE") else 40):
        name = list(openers)[i % len(openers)]
        (tmp_path / name).write_bytes(corrupted(whole[name], rng))
        try:
            openers[name](tmp_path / name)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        (tmp_path / name).write_bytes(whole[name])
        openers[name](tmp_path / name)
    assert refused > i / 4


# ------------------------------------------------------------------------------------------------------------
# Speed: SPEED=1 pytest -s -k speed, on an idle machine

def plain_norm(self, x, shift=None, scale=None):
    x = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
    return x if shift is None else x * (1 + scale) + shift


def plain_attention(self, x, rope):
    """Every step of the published formula as an operation of its own, the matrix of attention in memory."""
    def turned(a):
        even, odd = a[..., 0::2], a[..., 1::2]
        cos, sin = (table[..., 1:].expand(-1, -1, -1, 2).flatten(-2) for table in rope)
        return (a * cos + torch.stack([-odd, even], -1).flatten(-2) * sin).transpose(1, 2)
    q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
    q, k = turned(self.q_norm(q)), turned(self.k_norm(k))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return self.proj((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


def plain_mlp(self, x):
    gate, x = self.w12(x).chunk(2, -1)
    return self.w3(F.silu(gate) * x)


def plain_block(self, x, condition, rope, drop=0):
    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
    x = x + gate1 * self.attn(self.norm1(x, shift1, scale1), rope)
    return (x + gate2 * self.mlp(self.norm2(x, shift2, scale2)))[:, drop:]


class PlainStep:
    """One optimiser step as repositories of this kind write it: loops over tensors, a wait for the loss."""

    def __init__(self, kdiff, decays):
        self.kdiff, self.decays = kdiff, decays
        self.optimizer = torch.optim.AdamW(kdiff.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
        self.averages = [[p.detach().clone() for p in kdiff.parameters()] for _ in decays]

    def __call__(self, batch, labels):
        loss = self.kdiff(batch.float() / 127.5 - 1, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for decay, average in zip(self.decays, self.averages):
                for a, p in zip(average, self.kdiff.parameters()):
                    a.mul_(decay).add_(p, alpha=1 - decay)
        return loss.item()


@contextmanager
def plain_parts():
    """Within: the networks compute with the plain parts above."""
    with pytest.MonkeyPatch.context() as patch:
        for part, forward in ((model.RMSNorm, plain_norm), (model.Attention, plain_attention),
                              (model.SwiGLU, plain_mlp), (model.Block, plain_block)):
            patch.setattr(part, "forward", forward)
        yield


def step_of(kdiff, ema, compile=False):
    """train.py's Step on a KDiff, in float32 on the CPU."""
    return train.Step(kdiff, Codec(), argparse.Namespace(
        lr=2e-4, k_lr=1.0, ema=ema, clip=0, dtype="float32", micro_batch=128, compile=compile,
        activation_checkpointing=False), torch.device("cpu"))


def middling_step(compile=False):
    """(Step, function that takes a step on images and labels) of a middling JiT with three averages."""
    it = step_of(KDiff(JiT(**MIDDLING), num_classes=1000), [.9999, .9998, .9996], compile)
    return it, lambda images, labels: it(images, labels, list(range(len(images))), 1.0)


def test_plain_parts_and_plain_step_compute_the_same():
    """What speed is compared with gives our outputs and gradients, and takes the same step."""
    ours, plain = (KDiff(fill(JiT(**TINY_JIT)), num_classes=10) for _ in range(2))
    x, t, y = inputs(ours.net)
    drawn = ours.draw(x, y)
    for kdiff in (ours, plain):
        kdiff.draw = lambda *args: drawn
    it, plain_step = step_of(ours, ema=[0.9, 0.5]), PlainStep(plain, [0.9, 0.5])
    images, start = torch.from_numpy(noise(*x.shape)), [p.detach().clone() for p in ours.parameters()]
    with plain_parts():
        out = plain.net(x, t, y)
        plain(x, y).backward()
    assert error(out, ours.net(x, t, y)) < 1e-5
    ours(x, y).backward()
    for a, b in zip(plain.parameters(), ours.parameters()):
        assert error(a.grad, b.grad) < 1e-4
    with plain_parts():
        plain_step(images, y)
    it.optimizer.zero_grad()
    it(images, y, [0] * len(images), 1.0)
    moved = [torch.cat([(p - q).flatten() for p, q in zip(kdiff.parameters(), start)])
             for kdiff in (plain, ours)]
    averages = [torch.cat([a.flatten() for a in average]) for average in
                (plain_step.averages[1], it.ema.averages["0.5"])]
    assert error(moved[0], moved[1]) < 0.02 and error(averages[0], averages[1]) < 1e-5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_freed_by_a_step_is_kept_for_the_next():
    """A freed 64 MB tensor comes back without the page faults that it costs otherwise."""
    code = ("import resource, torch, data\n"
            "def faults():\n"
            "    for _ in range(8):\n"
            "        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "        torch.ones(2 ** 24)\n"
            "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
            "print(faults(), data.keep_memory() or faults())")
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, stdout=-1, check=True)
    given_back, kept = map(int, result.stdout.split())
    assert kept < given_back / 4


def alternate(ways, rounds):
    """Ways (name: callable) called by turns, so that all meet the same machine: the median seconds of each,
    and the median of its ratios to the first."""
    times = {name: [] for name in ways}
    for i in range(rounds + 2):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name] += [time.perf_counter() - began] if i >= 2 else []
    first, median = next(iter(times.values())), statistics.median
    return ({name: median(each) for name, each in times.items()},
            {name: median(a / b for a, b in zip(each, first)) for name, each in times.items()})


@pytest.fixture
def speed():
    """All cores, and memory as train.py has it; skips unless SPEED is set."""
    if not os.environ.get("SPEED"):
        pytest.skip("SPEED=1 measures")
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    data.keep_memory()
    yield
    torch.set_num_threads(threads)


MIDDLING = dict(image_size=128, patch_size=16, dim=384, depth=6, heads=6, num_classes=1000, bottleneck=128,
                context_tokens=32, context_start=2)


def batch_of(n):
    return torch.from_numpy(noise(n, 3, 128, 128)), torch.arange(n)


@needs_compiler
def test_speed_of_a_training_step(speed):
    """Less than the plain implementation's time, forward to averages; compiled, less than 0.95 of it."""
    (it, ours), (_, compiled), batch = middling_step(), middling_step(compile=True), batch_of(16)
    a = torch.randn(2048, 2048)
    plain_step = PlainStep(KDiff(JiT(**MIDDLING), num_classes=1000), [.9999, .9998, .9996])

    def plain():
        with plain_parts():
            plain_step(*batch)
    seconds, ratio = alternate({"plain": plain, "eager": lambda: ours(*batch),
                                "compiled": lambda: compiled(*batch), "product": lambda: a @ a}, 25)
    rate, flops = 2 * len(a) ** 3 / seconds["product"], 6e9 * 16 * model.gmacs(it.kdiff.net)
    for name in ("plain", "eager", "compiled"):
        print(f"\nstep, {name}: {seconds[name] * 1e3:.0f} ms = {ratio[name]:.2f} of plain, "
              f"{flops / seconds[name] / rate:.0%} of a product's rate", end="")
    assert ratio["eager"] < 1 and ratio["compiled"] < 0.95


def test_speed_per_image_is_the_same_from_batch_8_to_256(speed):
    """Within 15% from 64 up; at 8 the optimiser and the averages, which cost the same for any batch, show."""
    _, ours = middling_step()
    _, ratio = alternate({n: lambda n=n, batch=batch_of(n): [ours(*batch) for _ in range(256 // n)]
                          for n in (64, 8, 256)}, 3)
    print("\ntime per image, by batch size:", {n: round(ratio[n], 2) for n in (8, 64, 256)}, end="")
    assert 0.85 <= ratio[256] <= 1.15 and ratio[8] <= 1.25


def test_speed_of_the_guidance_interval(speed):
    """50 Heun steps take about 1 - 11/198 = 0.944 of both passes: 11 of 99 evaluations lie before t = 0.1."""
    kdiff = KDiff(fill(model.build("JiT-demo/8", 32, 8)), num_classes=8).eval()
    _, ratio = alternate({low: lambda low=low: generate(kdiff, Codec(), [0] * 64, range(64), 2.0, (low, 1.0))
                          for low in (0, 0.1)}, 11)
    print(f"\nsampling with the interval: {ratio[0.1]:.3f} of always both passes", end="")
    assert ratio[0.1] <= 0.96


def test_speed_of_packed_images(speed, tmp_path):
    """At least 20 times the images/s of a folder of JPEGs, on one core."""
    picture = Image.fromarray(noise(24, 32, 3)).resize((500, 375), Image.BICUBIC)
    for i in range(64):
        picture.save(tmp_path / f"{i}.jpg", quality=90)
    pack(tmp_path, 256, tmp_path / "p.npy")
    sets = {"packed": open_dataset(tmp_path / "p.npy", 256), "folder": ImageFolder(tmp_path, 256)}
    seconds, ratio = alternate({name: lambda s=s: [s[i] for i in range(64)] for name, s in sets.items()}, 7)
    print(f"\nimages/s: folder {64 / seconds['folder']:,.0f}, packed {64 / seconds['packed']:,.0f}, "
          f"{ratio['folder']:.0f} times", end="")
    assert ratio["folder"] >= 20


# ------------------------------------------------------------------------------------------------------------
# README.md

def readme_commands():
    """Every call of our scripts in the README's bash blocks: [script, flag, ...]; loops at first value."""
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    for name, value in re.findall(r"for (\w+) in (\S+)", text):
        text = text.replace(f"${name}", value)
    return [shlex.split(call, comments=True) for call in
            re.findall(r"(?:python|torchrun|-\S+)[ =](?:HOST:29500 )?(\w+\.py[^;&|\n]*)", text)]


def test_every_readme_command_is_understood(tmp_path, monkeypatch, capsys):
    """Its script parses its flags; each train.py among them does a dry run on small stand-ins for data."""
    for name in ("imagenet/train", "photos", "latents"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name / "a.png")
    np.save(tmp_path / "imagenet256.npy", np.zeros(2, [("image", "u1", (3, 256, 256)), ("label", "<i8")]))
    for name, shape in (("latents", (2, 32, 16, 16)), ("latents_flip", (2, 32, 16, 16)), ("labels", 2)):
        random = np.random.RandomState(0).standard_normal(shape).astype(np.float16)
        np.save(tmp_path / "latents" / f"{name}.npy", random if name != "labels" else np.zeros(2, np.int64))
    (tmp_path / "latents" / "meta.json").write_text(json.dumps(
        {"mean": [0.0] * 32, "std": [1.0] * 32, "classes": ["a"], "image_size": 256}))
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert len(commands) >= 25 and {words[0] for words in commands} == {
        "train.py", "sample.py", "fid.py", "data.py", "objective.py", "test_all.py"}
    for script, *flags in commands:
        if script == "test_all.py":
            continue
        module = importlib.import_module(script[:-3])
        if script == "train.py":
            for flag in ("--tokenizer", "--fid_every", "--fid_ref"):          # files that only a user has
                if flag in flags:
                    del flags[flags.index(flag):flags.index(flag) + 2]
            monkeypatch.setattr(sys, "argv", [script, *flags, "--dry_run"])
            module.main()
        elif script in ("sample.py", "fid.py", "data.py"):
            monkeypatch.setattr(sys, "argv", [script, *flags])
            module.parse()
