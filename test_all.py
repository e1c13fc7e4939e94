"""Every claim of the other files, each test named after one: `pytest test_all.py`, no network, no GPU.

The first six tests teach: the formula and its clamp, the velocity, the order of training, resuming, two
processes that equal one, and the sampler's order of convergence. Read them first.
"""
import argparse
import colorsys
import copy
import gzip
import hashlib
import importlib
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
from data import VAVAE, Codec, ImageFolder, PatchPCA, Shapes, UserError, open_dataset, read_image, read_tensors
from examples.losses import logit_normal
from objective import KDiff, Linear, k_of_direction, k_of_innovation, optimal_loss, train_linear
from sample import guided, integrate, load, read_log

HERE = Path(__file__).parent

# ---- What many tests use -----------------------------------------------------------------------------------

def normal(key, *shape):
    """Normal numbers that depend on the key alone (numpy's legacy generator is frozen)."""
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    return torch.tensor(generator.standard_normal(shape)).float()

def noise(*shape):
    """uint8 pixels, always the same for one shape."""
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)

def error(ours, theirs):
    """The relative error of a tensor."""
    theirs = theirs.double()
    return ((ours.double() - theirs).norm() / theirs.norm()).item()

def stack(dataset, n):
    """The first n images."""
    return torch.stack([dataset[i][0] for i in range(n)])

class Bare(torch.nn.Module):
    """The least that KDiff asks of a network: net(z, t, y) -> like z."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 16, 4, 2, 1)
        self.table = torch.nn.Embedding(9, 16)
        self.up = torch.nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, z, t, y):
        condition = t[:, None] + self.table(y)
        self.out = self.up(F.silu(self.down(z) + condition[:, :, None, None]))
        return self.out

def state_of(kdiff, *decays, classes="01234567"):
    """A train.State in pixels."""
    return train.State(kdiff, Codec(), {"ema": decays}, list(classes))

def loop(state, dataset, **change):
    """train.train() with plain settings."""
    plain = dict(steps=5, seed=7, batch_size=6, micro_batch=4, workers=0, lr=3e-3, k_lr=3.0, warmup_epochs=2,
                 clip=0.0, dtype="float32")
    return train.train(state, dataset, SimpleNamespace(**plain | change))

TINY = "train.py --batch_size 8 --samples 0 --log_every 1 --model JiT-narrow/8".split()

@pytest.fixture
def call(monkeypatch, capsys):
    """Run one of our scripts in this process. Returns what it printed, its errors last."""
    def call(script, *words, status=0):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            data.run(importlib.import_module(script[:-3]).main)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        said = "".join(capsys.readouterr())
        assert exit.value.code == status, said
        return said
    return call

def start(*words, processes=None, wait_for=None):
    """Start a script, under torchrun for several processes, marked in their environment. Await a word."""
    command = [sys.executable, *map(str, words)]
    if processes:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    mark = f"test-{time.time_ns()}"
    process = subprocess.Popen(command, env=os.environ | {"MARK": mark}, cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.mark = mark
    if wait_for:
        assert any(wait_for in line for line in process.stdout), f"it never printed {wait_for}"
    return process

def alive(mark, *words):
    """The ids of processes whose environment contains MARK=mark and these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            environment = path.read_text(errors="replace").split("\0")
            if {f"MARK={mark}", *words} <= set(environment):
                found.append(int(path.parent.name))
    return sorted(found)

def ending(process, status, began=None):
    """What a process printed. It and all it started must end within 10 s of began, or of its error line."""
    timer = threading.Timer(150, lambda: [os.kill(pid, 9) for pid in alive(process.mark)])
    timer.start()
    said = ""
    for line in process.stdout:                    # to its end: when the last of its processes is gone
        said += line
        if began is None and line.startswith("error: "):
            began = time.time()
    timer.cancel()
    assert process.wait() == status, said
    assert not alive(process.mark)
    assert time.time() - (began or 1e12) < 10
    assert not re.search(r"File .*(train|data|sample).py", said), said
    return said

def run_script(words):
    """Run a script's main() in this process, with these words as its command line."""
    sys.argv = words.split()
    importlib.import_module(sys.argv[0][:-3]).main()

def work_of_two(folder):
    """What each of two processes does for the fixture below, by `torchrun test_all.py FOLDER`."""
    os.chdir(folder)
    run_script(" ".join(TINY) + " --steps 3 --micro_batch 2 --out two")
    evaluate_shapes()
    shrink_vavae()
    run_script("data.py encode photos --tokenizer vavae.pt --image_size 32 --batch_size 3 --out latents")
    run_script("sample.py two/ckpt.pt --classes star,3 --samples 5 --steps 2 --out s.npz")

    def spoiled(net, inputs, output):              # the second step of one process, to be skipped by both
        return output * (math.inf if data.RANK == 1 and state.step == 1 else 1)
    torch.manual_seed(0)
    state = state_of(KDiff(model.build("JiT-narrow/8", 16, 8), num_classes=8), 0.9)
    state.kdiff.net.register_forward_hook(spoiled)
    for _, norm, _ in loop(state, Shapes(12, 16), steps=3, batch_size=4, micro_batch=1, clip=1.0):
        numbers = [*state.parameters, *state.averages["0.9"].parameters()]
        for moments in state.optimizer.state.values():
            numbers += moments.values()
        total = sum(tensor.double().norm().item() for tensor in numbers)
        sys.stdout.write(f"rank {data.RANK} step {state.step} norm {norm:.8f} total {total}\n")

    write = train.Log.write
    def interrupted(log, lr):                      # one process is asked to stop
        if data.RANK == 1 and log.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        write(log, lr)
    train.Log.write = interrupted
    run_script(" ".join(TINY) + " --steps 9 --out stopped")

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes made of their work: (folder, what they printed)."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "photos").mkdir()
    for i, image in enumerate(noise(9, 40, 40, 3)):
        Image.fromarray(image).save(folder / "photos" / f"{i}.png")
    torch.manual_seed(0)
    weights = VAVAE(widths=(32,) * 5).state_dict()
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(())}}, folder / "vavae.pt")
    return folder, ending(start(HERE / "test_all.py", folder, processes=2), status=1)

def shrink_vavae():
    """VA-VAE of a quarter of the width: a fiftieth of its weights, the same shapes of latents."""
    VAVAE.__init__.__defaults__ = (None, (32,) * 5)

@pytest.fixture
def small_vavae(monkeypatch):
    """The same for one test."""
    monkeypatch.setattr(VAVAE.__init__, "__defaults__", (None, (32,) * 5))

# ---- Six tests that teach ----------------------------------------------------------------------------------

K = normal("w", 129).double().sigmoid()
TIMES = torch.tensor([0.1, 0.2, 0.4, 0.9]).double().view(4, 1, 1, 1)
K_OF_T = torch.tensor(np.interp(TIMES, np.arange(129) / 128, K))
K_OF_C = K[:10].view(10, 1, 1)

@pytest.mark.parametrize("target, c, d, ks", [
    ("x", 1, 0, dict(k=1)),
    ("v", 1, -1, dict(k=0.5)),
    ("eps", 0, -1, dict(k=0)),
    (0.0, 0, -1, dict(k=0)),
    ("0.3", 0.3, -0.7, dict(k=0.3)),
    ("k", K[0], K[0] - 1, dict(k=K[0])),
    ("two", K[0], -K[1], dict(k1=K[0], k2=K[1], k=K[0] / (K[0] + K[1]))),
    ("time", K_OF_T, K_OF_T - 1, dict(k=K.mean())),
    ("channel", K_OF_C, K_OF_C - 1, dict(k=K_OF_C.mean(), k_min=K_OF_C.min(), k_max=K_OF_C.max()))])
def test_velocity_and_loss_are_those_of_x_and_e_solved_from_z_and_u(target, c, d, ks):
    """z = t x + (1-t) e and u = c x + d e are two equations for x and e. A linear solver knows the rest."""
    x, e, u = torch.randn(3, 4, 10, 2, 2).double()
    kdiff = KDiff(lambda z, t, y: u, target, num_classes=10, channels=10)
    if kdiff.w is not None:
        assert not kdiff.w.any()                                            # k starts at a half
        kdiff.w.data = normal("w", *kdiff.w.shape)
    learned = kdiff.ks()
    assert list(learned) == list(ks)
    assert [float(k) for k in learned.values()] == pytest.approx([float(k) for k in ks.values()], abs=1e-6)
    kdiff = kdiff.double()
    z = TIMES * x + (1 - TIMES) * e
    matrix = torch.stack([entry * torch.ones_like(z) for entry in (TIMES, 1 - TIMES, c, d)], -1)
    solved = torch.linalg.solve(matrix.unflatten(-1, (2, 2)), torch.stack([z, u], -1))
    x_hat, e_hat = solved.unbind(-1)
    v_hat = kdiff.velocity(u, z, TIMES.flatten())
    torch.testing.assert_close(v_hat, x_hat - e_hat, atol=1e-10, rtol=1e-5)
    errors = {"u": u - c * x - d * e, "x": x_hat - x, "eps": e_hat - e, "v": x_hat - e_hat - (x - e)}
    for kdiff.loss_variable, expected in errors.items():
        loss = kdiff.loss(x, None, TIMES.flatten(), e)
        torch.testing.assert_close(loss, expected.square().mean(), atol=1e-10, rtol=1e-5)

def test_one_clamp_bounds_loss_and_velocity():
    """At t = 1 x-prediction divides by tau in both. Its own x-loss stays the plain squared error."""
    x, e, u = torch.randn(3, 1, 2, 3, 3).double()
    one = torch.ones(1).double()
    for target, loss, t, expected in (
            ("x", "v", one, (u - x) / 0.05), ("x", "x", one, u - x), ("eps", "eps", 0 * one, u + e)):
        kdiff = KDiff(lambda z, t, y: u, target, num_classes=10, loss=loss)
        torch.testing.assert_close(kdiff.loss(x, None, t, e), expected.square().mean())
    v = KDiff(None, "x", num_classes=10).velocity(u, x, one)
    torch.testing.assert_close(v, (u - x) / 0.05)
    assert [objective.ends(target) for target in ("x", "eps", "v", 0.3)] == [
        (1, 0), (0, 1), (1, 1), pytest.approx((0.3, 0.7))]

def test_order_is_one_permutation_after_the_other():
    """Batches of 8 from 11 images are positions in a chain of permutations, from any start, on any process."""
    chain = sum(data.batch_indices(11, 8, 3, 0, 22), [])
    for epoch in range(16):
        part = chain[11 * epoch:11 * epoch + 11]
        assert sorted(part) == [(epoch, i) for i in range(11)]
    assert sum(data.batch_indices(11, 8, 3, 5, 9), []) == chain[40:72]
    halves = [sum(data.batch_indices(11, 8, 3, 1, 2, rank, 2), []) for rank in (0, 1)]
    assert halves[0] + halves[1] == chain[8:16]
    assert [i for _, i in chain[:11]] != [i for _, i in chain[11:22]]
    assert sum(data.batch_indices(11, 8, 4, 0, 1), []) != chain[:8]

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(call, tmp_path, monkeypatch, number):
    """A signal saves step 3 and is printed. Then 1 step against 4: weights, averages, optimizer, log."""
    write = train.Log.write
    def interrupted(log, lr):
        if log.args.steps == 9 and log.state.step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        write(log, lr)
    monkeypatch.setattr(train.Log, "write", interrupted)
    whole = (*TINY, "--out", tmp_path / "whole")
    halves = (*TINY, "--out", tmp_path / "halves")
    call(*whole, "--steps", 4, "--keep_every", 3)
    said = call(*halves, "--steps", 9, status=128 + number)
    assert f"stopped by signal {int(number)} after step 3; the same" in said
    assert "done" not in said and "resuming" not in said
    ckpt = tmp_path / "halves" / "ckpt.pt"
    early = ckpt.read_bytes()
    for _ in range(2):
        ckpt.write_bytes(early)                                             # as if it died before saving
        said = call(*halves, "--steps", 4)
        assert f"resuming from {ckpt} at step 3" in said and "resuming with steps 4, before: 9" in said
    ours, theirs = read_tensors(ckpt), read_tensors(tmp_path / "whole" / "ckpt.pt")
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], atol=0, rtol=0)
    assert len(ours["optimizer"]["state"]) > 10
    assert read_log(tmp_path / "whole", "loss") == read_log(tmp_path / "halves", "loss")
    assert read_log(tmp_path / "halves", "step")[0] == [1, 2, 3, 4]
    kept = sorted((tmp_path / "whole").glob("ckpt*"))
    assert [(path.name, load(path).step) for path in kept] == [("ckpt-0000003.pt", 3), ("ckpt.pt", 4)]
    assert "finished at step 4" in call(*halves, "--steps", 4)
    os.utime(tmp_path / "halves" / "curves.png", (0, 0))                    # as if killed before drawing
    assert "Look at" in call(*halves, "--steps", 4)
    for name, before, value in (("target", "k", "v"), ("seed", 0, 1)):
        said = call(*halves, f"--{name}", value, status=2)
        assert f"with {name} {before}, not {value}" in said and f"--init {ckpt}" in said

def test_two_processes_equal_one_and_skip_and_stop_together(two, call, tmp_path):
    """Steps in micro batches agree. What is not finite on one changes neither. SIGTERM to one stops both."""
    folder, printed = two
    call(*TINY, "--steps", 3, "--out", tmp_path)
    one, other = read_tensors(tmp_path / "ckpt.pt"), read_tensors(folder / "two" / "ckpt.pt")
    torch.testing.assert_close(other["ema"]["0.95"], one["ema"]["0.95"], atol=2e-5, rtol=1e-3)
    assert read_log(folder / "two", "loss")[1] == pytest.approx(read_log(tmp_path, "loss")[1], rel=1e-4)
    assert one["model"]["w"] != 0 and printed.count("step 3/3 | ") == 1 and "micro_batch=2 " in printed
    rows = sorted(re.findall(r"rank (\d) step (\d) norm (\S+) total (\S+)", printed))
    first, second = rows[:3], rows[3:]
    assert [row[1:] for row in first] == [row[1:] for row in second] and len(rows) == 6
    assert [math.isfinite(float(norm)) for _, _, norm, _ in first] == [True, False, True]
    assert first[0][3] == first[1][3] != first[2][3]                        # weights, averages, moments
    assert printed.count("stopped by signal 15 after step 3; the same command resumes stopped/ckpt.pt") == 1
    assert "exitcode  : 143" in printed
    said = call(*TINY, "--steps", 4, "--out", folder / "stopped")
    assert "stopped/ckpt.pt at step 3" in said
    assert read_log(folder / "stopped", "step")[0] == [1, 2, 3, 4]

def test_heun_converges_at_second_order_and_euler_at_first():
    """dz/dt = z cos(5 t) ends at z exp(sin(5) / 5); from t = 0.3 on it is known, too."""
    def end(solver, steps, start):
        *_, z = integrate(lambda z, t: z * torch.cos(5 * t), torch.ones(1), steps, solver, start)
        return z.item()
    for start in (0.0, 0.3):
        exact = math.exp((math.sin(5) - math.sin(5 * start)) / 5)
        for solver, order in (("euler", 1), ("heun", 2)):
            coarse, fine = (abs(end(solver, steps, start) - exact) for steps in (40, 80))
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    states = list(integrate(lambda z, t: 0 * z + 1, torch.zeros(1), 4))
    assert torch.cat(states).tolist() == [0.25, 0.5, 0.75, 1.0]             # one after each step
    with pytest.raises(ValueError, match="solver 'midpoint'"):
        next(integrate(None, None, solver="midpoint"))

# ---- model.py ----------------------------------------------------------------------------------------------

TINY_JIT = dict(image_size=32, patch_size=8, dim=64, depth=6, heads=4, num_classes=10, bottleneck=16,
                context_tokens=4, context_start=2)
TINY_DIT = dict(image_size=8, patch_size=1, in_channels=4, dim=64, depth=4, heads=4, num_classes=10)
JIT, DIT = (model.JiT, TINY_JIT), (model.DiT, TINY_DIT)

def fill(net):
    """Weights as a function of their key. The tables of positions stay, and nothing asks for gradients."""
    for key, value in net.state_dict().items():
        r = normal(key, *value.shape)
        if value.ndim < 2:
            value.copy_(0.1 * r + key.endswith("weight"))
        elif "pos_embed" not in key and "feat_rope" not in key:
            value.copy_(r / math.sqrt(value[0].numel()))
    return net.eval().requires_grad_(False)

def inputs(config):
    """x, t, y of a batch for a network of this config. Label 10 is the null class."""
    size = config["image_size"]
    x = normal("x", 3, config.get("in_channels", 3), size, size)
    return x, torch.tensor([0.05, 0.5, 0.93]), torch.tensor([0, 3, 10])

class PlainNetwork:
    """Both transformers in float64 and in plain formulas: explicit rotation matrices, softmax, loops."""

    def __init__(self, state, heads, p, start=None):
        self.state = {key: value.double() for key, value in state.items()}
        self.heads, self.p, self.start = heads, p, start

    def linear(self, name, v):
        return v @ self.state[name + ".weight"].flatten(1).T + self.state.get(name + ".bias", 0)

    def rms(self, name, v):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.state[name + ".weight"]

    def modulated(self, name, v, shift, scale):
        return self.rms(name, v) * (1 + scale[:, None]) + shift[:, None]

    def angles(self, place, n):
        return place[:, None] * 10000 ** (-torch.arange(n).double() / n)

    def __call__(self, x, t, y):
        a = self.angles(t.double(), 128)
        time = self.linear("t_embedder.mlp.0", torch.cat([a.cos(), a.sin()], 1))
        time = self.linear("t_embedder.mlp.2", F.silu(time))
        label = self.state["y_embedder.embedding_table.weight"][y]
        condition = F.silu(time + label)
        v = F.unfold(x.double(), self.p, stride=self.p).transpose(1, 2)
        for name in ("x_embedder.proj", "x_embedder.proj1", "x_embedder.proj2"):
            if name + ".weight" in self.state:
                v = self.linear(name, v)
        N, T, D = v.shape
        h = D // self.heads
        side = torch.arange(math.isqrt(T)).double()
        row, column = torch.cartesian_prod(side, side).T
        tables = [f(self.angles(at, D // 4)) for at in (column, row) for f in (torch.sin, torch.cos)]
        v = v + torch.cat(tables, 1)
        turn = torch.cat([self.angles(row, h // 4), self.angles(column, h // 4)], 1).diag_embed()
        turn = torch.kron(turn, torch.tensor([[0, -1], [1, 0]])).matrix_exp()      # a rotation for each token
        depth = sum(key.endswith("mlp.w3.bias") for key in self.state)
        for i in range(depth):
            if i == self.start and "in_context_posemb" in self.state:
                v = torch.cat([label[:, None] + self.state["in_context_posemb"], v], 1)
                turn = torch.cat([torch.eye(h).double().expand(v.shape[1] - T, h, h), turn])
            v = self.block(f"blocks.{i}.", v, condition, turn)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", condition).chunk(2, 1)
        v = self.linear("final_layer.linear", self.modulated("final_layer.norm_final", v[:, -T:], shift, scale))
        v = v.view(N, T, self.p ** 2, -1).transpose(2, 3).flatten(2).mT            # (p, p, C) to (C, p, p)
        return F.fold(v, x.shape[2:], self.p, stride=self.p)

    def block(self, b, v, condition, turn):
        N, T, D = v.shape
        m = self.linear(b + "adaLN_modulation.1", condition).chunk(6, 1)
        u = self.linear(b + "attn.qkv", self.modulated(b + "norm1", v, m[0], m[1]))
        q, k, u = u.view(N, T, 3, self.heads, -1).unbind(2)
        if b + "attn.q_norm.weight" in self.state:
            q, k = self.rms(b + "attn.q_norm", q), self.rms(b + "attn.k_norm", k)
        q, k = (torch.einsum("tij,nthj->nthi", turn, a) for a in (q, k))
        weights = torch.einsum("nthi,nshi->nhts", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        u = torch.einsum("nhts,nshi->nthi", weights, u).flatten(2)
        v = v + m[2][:, None] * self.linear(b + "attn.proj", u)
        gate, u = self.linear(b + "mlp.w12", self.modulated(b + "norm2", v, m[3], m[4])).chunk(2, -1)
        return v + m[5][:, None] * self.linear(b + "mlp.w3", F.silu(gate) * u)

@pytest.mark.parametrize("network, config, change, recorded", [
    (*JIT, {}, (103.878723639, 1.1088155, 0.1001933)),
    (*DIT, {}, (27.796994863, 0.6621699, 0.6637198)),
    (*JIT, dict(context_tokens=0), None),
    (*JIT, dict(patch_size=4, context_start=5), None),
    (*JIT, dict(in_channels=1, context_start=0), None),
    (*DIT, dict(patch_size=2, qk_norm=True), None)])
def test_networks_agree_with_plain_formulas_and_the_official_code(network, config, change, recorded):
    """With recorded norm and values; class tokens from any block or none; patches, channels, q/k norm."""
    config = config | change
    net = fill(network(**config))
    out = net(*inputs(config))
    plain = PlainNetwork(net.state_dict(), 4, config["patch_size"], config.get("context_start"))
    assert error(out, plain(*inputs(config))) < 2e-6
    if recorded:
        found = out.double().norm().item(), *out.flatten()[::out.numel() // 2].tolist()
        assert found == pytest.approx(recorded, rel=2e-6, abs=2e-5)

def test_vavae_gives_the_recorded_outputs():
    """Recorded from a network that agreed with the published one. The log variance is clamped, the mean not."""
    net = fill(VAVAE(widths=(32, 32, 64, 64, 128)))
    mean, logvar = net.moments(normal("image", 1, 3, 32, 32).clamp(-1, 1))
    decoded = net.decode(normal("latent", 1, 32, 2, 2))
    for ours, theirs in (
            (mean, [-0.6117827, 0.0519157, -0.3235235, -0.3613891, -0.5173731, 0.2138819, -0.0047993]),
            (logvar, [-0.2333690, 0.5852250, -0.2726730, -0.1882787, 0.2563668, 0.3818888, -0.2070874]),
            (decoded, [-0.0909988, -0.0762513, 0.4537423, 0.1829014, 0.3043323, 0.1066596])):
        assert error(ours.flatten()[::ours.numel() // 6], torch.tensor(theirs)) < 5e-6
    for value, bound in ((100.0, 20.0), (-100.0, -30.0)):
        net.quant_conv.bias.fill_(value)
        mean, logvar = net.moments(normal("image", 1, 3, 48, 64))
        assert (logvar == bound).all() and (mean.abs() > 50).all() and mean.shape == (1, 32, 3, 4)

@pytest.mark.parametrize("name, shape, params, gflops, keys", [
    ("JiT-B/16", (3, 256, 256), 131, 25, 1938688673),
    ("JiT-B/32", (3, 512, 512), 133, 26, None),
    ("JiT-L/16", (3, 256, 256), 459, 88, None),
    ("JiT-H/16", (3, 256, 256), 953, 182, None),
    ("LightningDiT-XL/1", (32, 16, 16), 675, 119, 625017063)])
def test_published_sizes_have_the_published_params_gflops_and_keys(name, shape, params, gflops, keys):
    """The papers' tables, in millions and billions; a checksum of the keys and shapes in the files."""
    with torch.device("meta"):
        net, vavae = model.build(name, shape[1], num_classes=1000), VAVAE()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == params
    assert round(model.gmacs(net, shape)) == gflops
    for each, checksum in ((net, keys), (vavae, 1982465131)):
        shapes = sorted((key, *value.shape) for key, value in each.state_dict().items())
        assert checksum in (None, zlib.crc32(repr(shapes).encode()))

def test_dropout_acts_in_the_middle_half_and_in_training_only():
    """Each block twice on one input. In the MLP dropout comes before w3, in attention after proj."""
    net, plain = (fill(model.JiT(**TINY_JIT | dict(depth=10, dropout=dropout))) for dropout in (0.5, 0.0))
    assert torch.equal(net(*inputs(TINY_JIT)), plain(*inputs(TINY_JIT)))
    net.train()
    x, condition = normal("tokens", 2, 16, 64), normal("condition", 2, 64)
    turn = net.cos[-16:], net.sin[-16:]
    differs = [not torch.equal(block(x, condition, *turn), block(x, condition, *turn)) for block in net.blocks]
    assert differs == [2 <= i < 6 for i in range(10)]
    dropped = (net.blocks[2].attn(x, *turn) == 0).float().mean()
    assert 0.4 < dropped < 0.6 and (net.blocks[2].mlp(x) == 0).float().mean() < 0.1

@pytest.mark.parametrize("network, config", [JIT, DIT])
def test_networks_start_at_zero_with_the_stated_spread(network, config):
    """adaLN-zero: the output is 0 and blocks are the identity. Xavier elsewhere, 0.02 in the embeddings."""
    torch.manual_seed(0)
    net = network(**config)
    x, condition = normal("tokens", 1, 4, 64), normal("c", 1, 64)
    assert not net(*inputs(config)).any()
    assert torch.equal(net.blocks[0](x, condition, net.cos[:4], net.sin[:4]), x)
    for name, p in net.named_parameters():
        assert not name.endswith("bias") or not p.any()
        if re.search("t_embedder.*weight|embedding_table|in_context", name):
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
    for part in (net.blocks[0].attn.qkv, *net.x_embedder):
        w = part.weight.flatten(1)
        assert w.abs().max().item() == pytest.approx(math.sqrt(6 / sum(w.shape)), rel=0.05)

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("network, config", [JIT, DIT])
def test_bf16_autocast_keeps_norms_time_and_stream_in_float32(network, config):
    """Close to float32; norms lose no digit, the time embedding is that of float64, the stream float32."""
    net, outs = fill(network(**config)), []
    for part in (net.t_embedder, *net.blocks):
        part.register_forward_hook(lambda *called: outs.append(called[-1]))
    x, t, y = inputs(config)
    exact = net(x, t, y)
    norm, (tokens, shift, scale) = net.blocks[0].norm1, normal("x", 3, 5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < error(net(x, t, y), exact) < 2e-2
        normed, modulated = norm(tokens), norm(tokens, shift, scale)
    assert torch.equal(outs[0], outs[len(outs) // 2]) and {out.dtype for out in outs} == {torch.float32}
    a = t.double()[:, None] * 1e4 ** -(torch.arange(128).double() / 128)
    assert error(outs[0], net.t_embedder.mlp.double()(torch.cat([a.cos(), a.sin()], 1))) < 6e-8
    tokens = F.rms_norm(tokens.double(), tokens.shape[-1:], norm.weight.double(), 1e-6)
    assert error(normed, tokens) < 1e-6 and error(modulated, tokens * (1 + scale.double()) + shift) < 1e-6

@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_and_checkpointed_networks_agree_with_eager():
    """Output and gradients, which are stored like their parameters; the keys of the state dict stay."""
    config = TINY_JIT | dict(depth=1, context_start=0)
    eager, compiled, checkpointed = (fill(model.JiT(**config)).requires_grad_() for _ in range(3))
    compiled.compile(dynamic=False)
    checkpointed.checkpointing = True
    expected = eager(*inputs(config))
    expected.square().mean().backward()
    for net in (compiled, checkpointed):
        out = net(*inputs(config))
        out.square().mean().backward()
        assert error(out, expected) < 2e-6
        for (key, a), (same, b) in zip(net.named_parameters(), eager.named_parameters()):
            assert key == same and error(a.grad, b.grad) < 2e-5 and a.grad.stride() == a.stride()
    assert all(part._compiled_call_impl for part in (*compiled.blocks, compiled.final_layer))

def test_names_carry_the_patch_and_keywords_win():
    """Any number after the slash is a patch, keywords override the table, errors name what is wrong."""
    with torch.device("meta"):
        assert model.build("JiT-S/4", image_size=64, num_classes=10).pos_embed.shape == (1, 256, 384)
        net = model.build("LightningDiT-B/4", 16, 10, in_channels=4, patch_size=2, qk_norm=True, depth=1)
    assert net.x_embedder.proj.weight.shape == (768, 4, 2, 2) and hasattr(net.blocks[0].attn.q_norm, 'weight')
    for name, size, message in (
            ("JiT-B/16", 250, "^image_size 250 is not a multiple of patch_size 16: try 256$"),
            ("JiT-B/16", (16, 32), "image_size .16, 32.: this network takes square images"),
            ("JiT-demo/8", 32, "^context_start 4 is after the last block: try 3$"),
            ("JiT-X/16", 256, "JiT-X/16.*JiT-B/16.*LightningDiT-XL/1"),
            ("JiT-B/0", 256, "model JiT-B/0")):
        with pytest.raises(ValueError, match=message):
            model.build(name, size, 10, context_start=4)

# ---- objective.py ------------------------------------------------------------------------------------------

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
    words = kdiff.draw(x[:400], y[:400, None].expand(400, 400), range(400))[2]     # a caption is dropped whole
    assert ((words == 10).all(1) == (words == 10).any(1)).all() and (words == 10).any()
    assert KDiff(None, num_classes=10).noise_scale == 1

@pytest.mark.parametrize("how, named", [
    (dict(loss="w"), "loss 'w'"), (dict(target="channel"), "channels"), (dict(target="two", loss="u"), "two"),
    (dict(target="2"), "target '2'"), (dict(target=-0.1), "target -0.1"), (dict(target="nan"), "target 'nan'")])
def test_unknown_target_or_loss_is_named(how, named):
    """A target is a row of the table or a number in [0, 1]; a loss one of four; two k shrink under loss u."""
    with pytest.raises(ValueError, match=named):
        KDiff(None, num_classes=10, **how)

def test_k_starts_where_it_is_told():
    """A number, or a tensor with a number for each channel."""
    assert KDiff(None, "time", num_classes=1, k_start=0.9).ks()["k"] == pytest.approx(0.9)
    starts = torch.tensor([0.2, 0.7]).view(2, 1, 1)
    ks = KDiff(None, "channel", num_classes=1, channels=2, k_start=starts).ks()
    assert [ks["k_min"].item(), ks["k_max"].item()] == pytest.approx([0.2, 0.7])

def test_eq_12_equals_monte_carlo():
    """The loss of the linear layer with the best weights for random data, noise and times."""
    torch.manual_seed(0)
    n = 400_000
    x, e = F.pad(torch.randn(n, 3), (0, 5)), torch.randn(n, 8)
    for c, d, loss, density, t, tau in (
            (lambda t: t, lambda t: t - 1, "x", None, torch.rand(n), 0.0),
            (0.7, -0.3, "v", logit_normal(-0.8, 0.8), torch.sigmoid(0.8 * torch.randn(n) - 0.8), 0.4)):
        t = t.double()[:, None]
        c_t, d_t = (f(t) if callable(f) else f for f in (c, d))
        delta = (c_t * (1 - t) - d_t * t).clamp(min=tau)
        scale = (1 - t if loss == "x" else 1) / delta
        z = scale * (t * x + (1 - t) * e)
        u = scale * (c_t * x + d_t * e)
        W = (z * u).sum(0) / (z * z).sum(0)
        expected = optimal_loss(c, d, 3, 8, loss, density, tau)
        assert (W * z - u).square().sum(1).mean().item() == pytest.approx(expected, rel=0.02)

def test_objective_py_prints_theory_next_to_measurement(monkeypatch, capsys):
    """In few steps: k and loss learned for each d of D = 64; of other losses the best k; of a spectrum."""
    monkeypatch.setattr(optimal_loss, "__defaults__", (*optimal_loss.__defaults__[:-1], 2000))
    monkeypatch.setattr(objective, "train_linear", lambda *of, **how: train_linear(*of, steps=400, batch=128))
    objective.main()
    said = capsys.readouterr().out
    def numbers(line):
        return [float(number) for found in re.findall(line, said, re.M) for number in found.split()]
    D, d, learned, theorem, loss, eq_12 = np.reshape(numbers(r"^ +(64 .*) ="), (-1, 6)).T
    k = 64 / (64 + d)                                                       # Eq. (12), its integrals done
    expected = d * (k ** 2 + (1 - k) ** 2 - 1.5 * (k - 0.5) ** 2) + (64 - d) * (1 - k) ** 2 / 4
    assert [*d] == [64, 32, 16, 8, 1]
    assert [*theorem, *eq_12] == pytest.approx([*k, *expected], abs=1e-3)
    assert [*learned, *loss] == pytest.approx([*k, *expected], abs=0.03, rel=0.06)
    spectrum = [1 / (1 + s) for s in (4, 4, 1, 0.3, 0.1, 0.01, 0, 0)]
    common = [8 / (8 + 9.41 / sigma ** 2) for sigma in (0.7, 1, 2)]
    assert numbers(r"(?:^ +| of .*)theory +(.*)")[:11] == pytest.approx(spectrum + common, abs=6e-4)
    blind, formula = np.array(numbers(r"^ +(?:descent|theory) +(.*)")[8:]).reshape(2, 6)
    assert blind == pytest.approx(formula, abs=1e-3)

def test_modes_of_w_relax_at_their_two_rates():
    """Eq. (9): W_par and W_perp follow exponentials of rates <a^2+b^2> = 2/3 and <b^2> = 1/3 to Eq. (11)."""
    for target, axes, end, rate in (("x", slice(4), 0.75, 0.05 * 2 / 3), ("v", slice(4, 16), -1.5, 0.05 / 3)):
        for n in (20, 60, 300):
            kdiff, _ = train_linear([1] * 4 + [0] * 12, target, steps=n, batch=2048, rate=0.05)
            mode = kdiff.net.weight.diag()[axes].mean().item()
            assert mode == pytest.approx(end * (1 - math.exp(-n * rate)), abs=0.02)

def test_spectrum_of_k_is_what_descent_finds():
    """One k for each direction, and one for all of them under louder noise, by training."""
    variances = torch.tensor([4, 1, 0.3, 0.1])
    kdiff, _ = train_linear(variances, "channel", steps=1500, batch=256, k_rate=8.0)
    expected = [1 / 5, 1 / 2, 1 / 1.3, 1 / 1.1]
    assert torch.sigmoid(kdiff.w.detach()).flatten().tolist() == pytest.approx(expected, abs=0.02)
    assert k_of_direction(variances).tolist() == pytest.approx(expected)
    kdiff, _ = train_linear(variances / 4, steps=1500, batch=256)
    assert kdiff.ks()["k"].item() == pytest.approx(4 / (4 + 5.4 / 4), abs=0.02)

def test_k_of_innovation_is_what_regression_and_a_grid_find():
    """Of each coordinate given the others, seen through noise, at each time; k then from a grid."""
    x = (normal("x", 4000, 6) @ normal("mix", 6, 6)).view(-1, 3, 2, 1)
    ours = k_of_innovation(x, -0.8, 0.8, noise_scale=2.0, points=100)
    S = np.cov(x.flatten(1).double().numpy(), rowvar=False)
    t = 1 / (1 + np.exp(0.8 - 0.8 * scipy.stats.norm.ppf((np.arange(100) + 0.5) / 100)))
    noise_variance = (2 * (1 - t) / t)[:, None, None] ** 2
    left = np.zeros((100, 6))                                   # the innovation of a coordinate at every time
    for i in range(6):
        rest, cross = np.delete(np.delete(S, i, 0), i, 1), np.delete(S[i], i)
        inverses = np.linalg.inv(rest + np.eye(5) * noise_variance)
        left[:, i] = S[i, i] - inverses @ cross @ cross
    ks = np.linspace(0, 1, 4001)[1:-1, None]
    for c in range(3):
        r = left[:, 2 * c:2 * c + 2].mean(1)
        loss = ((r * ks ** 2 + 4 * (1 - ks) ** 2) / (ks * (1 - t) + (1 - ks) * t) ** 2).mean(1)
        assert ours[c].item() == pytest.approx(ks[loss.argmin(), 0], abs=5e-4)

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
    assert np.array_equal(Shapes(9, 9).factors, shapes.factors[:9])
    assert not np.array_equal(Shapes(9, 9, 1).factors, shapes.factors[:9])
    for i, (place_x, place_y, radius, angle, hue) in enumerate(shapes.factors):
        image, label = shapes[i]
        image = image.double().numpy() / 255
        colour = image.max((1, 2))
        assert colour == pytest.approx([0.15 + 0.85 * c for c in colorsys.hsv_to_rgb(hue, 1, 1)], abs=0.02)
        assert image.min() == pytest.approx(0.06, abs=0.003) and label == i % 8
        covered = ((image - 0.06) / (colour[:, None, None] - 0.06)).max(0).clip(0)
        assert covered.sum() == pytest.approx(areas[i % 8] * ((0.27 + 0.07 * radius) * size) ** 2, rel=0.02)
        x, y = covered.sum(0) @ grid / covered.sum(), covered.sum(1) @ grid / covered.sum()
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

def test_folders_of_odd_images_are_read(photos, tmp_path, capsys):
    """Every mode becomes RGB, EXIF turns, 16 bits become 8, subfolders are classes, names keep letters."""
    dataset = ImageFolder(photos, 32)
    assert "1 files are left out" in capsys.readouterr().out
    assert dataset.classes == ["Fotos für Büro", "chats été", "dogs"]
    assert [label for _, label in dataset] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image, _ in dataset)
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
        ours = np.asarray(data.crop(Image.fromarray(pixels.transpose(axes)), 64), int)
        assert ours.shape == (64, 64, 3) and abs(ours - expected.transpose(axes)).max() <= 2
    assert np.array_equal(data.crop(half, 80), half.crop((12, 0, 92, 80)))   # halving stops at its size
    assert data.crop(Image.fromarray(pixels[:20, :30]), 64).size == (64, 64)

def test_flips_follow_seed_epoch_and_index(photos):
    """A key (epoch, i) is mirrored or not, half of the time, and always the same."""
    dataset, flips = ImageFolder(photos, 32), []
    for dataset.seed, dataset.flips in ((0, True), (0, True), (1, True), (0, False)):
        mirrored = dataset[3][0].flip(-1)
        flips.append([torch.equal(dataset[(epoch, 3)][0], mirrored) for epoch in range(64)])
    assert 16 < sum(flips[0]) < 48 and flips[0] == flips[1] != flips[2] and not any(flips[3])

def test_packed_file_gives_the_folders_images(photos, tmp_path, call, capsys):
    """Same pixels, labels, names, mirror images. Loading processes are sent a place, not the bytes."""
    path = tmp_path / "packed"
    assert "8 images of 24 px" in call("data.py", "pack", photos, "--image_size", 24, "--out", path)
    sent = pickle.dumps(open_dataset(path, 24))
    packed, folder = pickle.loads(sent), ImageFolder(photos, 24)
    assert packed.classes == folder.classes and len(packed) == 8 and len(sent) < 8 * 24 * 24
    for i in range(8):
        for flip in (False, True):
            a, b = (dataset.mirrored(i) if flip else dataset[i] for dataset in (packed, folder))
            assert torch.equal(a[0], b[0]) and a[1] == b[1]
    with pytest.raises(UserError, match="24"):
        open_dataset(path, 32)
    capsys.readouterr()
    assert [*data.in_batches(range(5), 2)] == [range(2), range(2, 4), range(4, 5)]
    assert "images 5/5 | " in capsys.readouterr().err
    for names, known in ((["a", "b"], "labels 0 to 2, but 2"), ("abc", "class names"), ([1, 2, 3], "class names")):
        with pytest.raises(UserError, match=known):
            data.class_names({"classes": json.dumps(names)}, np.array([0, 2]), path)
    assert data.class_names({}, np.array([0, 2]), path) == ["0", "1", "2"]

def save_safetensors(folder, parts, name="latents_rank00_shard000.safetensors"):
    """One shard, byte by byte as the format's specification says, and statistics. Returns the bytes."""
    kinds, ends = {"<f2": "F16", "<f4": "F32", "<i8": "I64"}, np.cumsum([a.nbytes for a in parts.values()])
    entries = {key: dict(dtype=kinds[a.dtype.str], shape=a.shape, data_offsets=[int(n) - a.nbytes, int(n)])
               for (key, a), n in zip(parts.items(), ends)}
    header = json.dumps(entries | {"__metadata__": {"by": "hand"}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"".join(a.tobytes() for a in parts.values())
    (folder / name).write_bytes(content)
    statistic = torch.ones(1, parts["latents"].shape[1], 1, 1)
    torch.save({"mean": 0 * statistic, "std": statistic}, folder / "latents_stats.pt")
    return content

def test_published_latents_are_read_and_what_does_not_fit_is_named(tmp_path):
    """Two shards; cut short, parts that do not fit together or the other shard, no statistics: one line."""
    latents = np.random.RandomState(0).randn(5, 4, 32, 32).astype("<f2")
    parts = {"latents": latents, "latents_flip": -latents, "labels": np.arange(5)}
    content = save_safetensors(tmp_path, parts)
    second = "latents_rank00_shard001.safetensors"
    save_safetensors(tmp_path, parts, second)
    sent = pickle.dumps(open_dataset(tmp_path, None))                        # as loading processes get it
    read = pickle.loads(sent)
    assert len(read) == 10 and read.shape == (4, 32, 32) and len(sent) < 10_000 < latents.nbytes
    assert [read[i][1] for i in (5, 7)] == [0, 2] and read.classes == ["0", "1", "2", "3", "4"]
    assert np.array_equal(read[7][0], latents[2]) and np.array_equal(read.mirrored(8)[0], -latents[3])
    def saved(**change):
        return save_safetensors(tmp_path, parts | change, second)
    less, loose = latents[:, :3], "a shard that fits the others"
    for bad, named in ((content[:-3], "not a readable safetensors file"),
                       (content.replace(b"32, 32]", b"32, 31]", 1), "bytes of latents do not fit"),
                       (saved(latents_flip=less), loose), (saved(labels=np.arange(4)), loose),
                       (saved(latents=less, latents_flip=less), loose)):
        (tmp_path / second).write_bytes(bad)
        with pytest.raises(UserError, match=f"shard001.*{named}"):
            open_dataset(tmp_path, None)
    (tmp_path / second).unlink()
    for stats, named in (({"std": torch.zeros(4)}, "std above 0"), ({"mean": torch.ones(3)}, "a mean and a std")):
        torch.save({"mean": torch.zeros(4), "std": torch.ones(4)} | stats, tmp_path / "latents_stats.pt")
        with pytest.raises(UserError, match=named):
            open_dataset(tmp_path, None)
    (tmp_path / "latents_stats.pt").unlink()
    with pytest.raises(UserError, match="latents_stats.pt: no such file"):
        open_dataset(tmp_path, None)

def test_patch_pca_round_trip_is_the_orthogonal_projection():
    """The projection of an SVD."""
    images = torch.randn(200, 3, 8, 8) @ torch.randn(8, 8)
    pca = PatchPCA.fit(images, 4, 10)
    def flat(x):
        return F.pixel_unshuffle(x, 4).transpose(0, 1).flatten(1)            # (48, patches)
    mean = flat(images).mean(1, keepdim=True)
    U = torch.linalg.svd(flat(images) - mean, full_matrices=False).U[:, :10]
    projected = U @ U.T @ (flat(images) - mean) + mean
    torch.testing.assert_close(flat(pca.decode(pca.encode(images))), projected, atol=2e-3, rtol=0)

def test_codec_scales_once_and_back():
    """Pixels: [-1, 1] and rounding; latents: (z - mean) / std and its inverse; grey becomes RGB; no NaN."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = Codec().encode(images)
    assert torch.equal(Codec().decode(x), images) and (x.min(), x.max()) == (-1, 1)
    assert Codec().decode(torch.tensor([-3.0, 3.0, 0.0]).view(3, 1, 1, 1))[:, 2].flatten().tolist() == [0, 255, 128]
    mean, std = torch.randn(1, 48, 1, 1), torch.rand(1, 48, 1, 1) + 0.5
    codec = Codec(PatchPCA.fit(torch.randn(9, 3, 16, 16), 4, 48), mean, std)
    assert (codec.decode(codec.encode(images)).int() - images.int()).abs().max() <= 1
    with pytest.raises(UserError, match="not finite"):
        Codec().decode(x * math.nan)

# ---- sample.py ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("interval, first, last, scale", [
    ((0.1, 1.0), 6, 49, 3), ((0.0, 1.0), 0, 49, 3), ((0.3, 0.5), 16, 24, 3), ((0.0, 1.0), 50, 0, 1)])
def test_guidance_acts_strictly_inside_its_interval(interval, first, last, scale):
    """Of 50 steps, t = 0.1 is outside of [0.1, 1], t = 0 inside of [0, 1]; else, and at scale 1, one pass."""
    calls, found = [], []
    def echo(z, t, y):
        calls.append((len(z), t[0].item()))
        return y.view(-1, 1, 1, 1).expand_as(z)
    velocity = guided(KDiff(echo, "v", num_classes=4, tau=0.0), torch.tensor([1]), scale, interval)
    for _ in integrate(lambda z, t: found.append(velocity(z, t).item()) or 0, torch.zeros(1, 1, 1, 1), 50, "euler"):
        pass
    guided_steps = [first <= i <= last for i in range(50)]
    assert found == [-5.0 if guided else 1.0 for guided in guided_steps]     # 4 + 3 (1 - 4), or 1
    assert [passes for passes, _ in calls] == [1 + guided for guided in guided_steps]
    assert [t for _, t in calls] == pytest.approx([i / 50 for i in range(50)])

def checkpoint_of(kdiff, shape, classes="0123456789"):
    """A Checkpoint in pixels."""
    config = {"shape": shape, "cfg": 2.0, "interval": [0.1, 1.0]}
    return sample.Checkpoint(kdiff, Codec(), config, list(classes), 7, "none")

def test_samples_follow_their_index_alone():
    """Batch size and the images in it change no pixel by more than one level; the seed changes them."""
    checkpoint = checkpoint_of(KDiff(fill(model.JiT(**TINY_JIT)), "v", num_classes=10), (3, 32, 32))
    together, other, ones, twos = (
        checkpoint.sample([0, 1, 2, 3, 0], batch_size=size, seed=seed, steps=8).int()
        for size, seed in ((5, 0), (5, 1), (1, 0), (2, 0)))
    assert (together - ones).abs().max() <= 1 and (together - twos).abs().max() <= 1
    assert (together - other).abs().max() > 8 and (together[0] - together[4]).abs().max() > 8
    batches = list(checkpoint.batches([0, 1, 2, 3, 0], 3, steps=8))          # all of one size, with a surplus
    assert [indices for _, indices in batches] == [range(3), range(3, 6)]
    joined = torch.cat([images for images, _ in batches])[:5]
    assert (joined.int() - together).abs().max() <= 1
    named = checkpoint.sample(["3", "1"], n=2, steps=8)
    assert torch.equal(named, checkpoint.sample([3, 3, 1, 1], steps=8))
    assert checkpoint.sample("4", n=3, steps=1).shape == (3, 3, 32, 32)
    less = checkpoint.sample([0, 1], steps=8, cfg=1.0)
    assert not torch.equal(less, checkpoint.sample([0, 1], steps=8, interval=(0.0, 1.0)))

def test_jit_loss_and_sampler_give_the_published_numbers():
    """Recorded from the official JiT: its loss, and six guided steps of both solvers (one pixel, norm)."""
    kdiff = KDiff(fill(model.JiT(**TINY_JIT)), "x", num_classes=10, noise_scale=1.0, tau=0.05)
    x, t, y = inputs(TINY_JIT)
    e, z0 = normal("e", 3, 3, 32, 32), normal("z0", 3, 3, 32, 32)
    assert kdiff.loss(0.5 * x, y, t, e).item() == pytest.approx(102.92652, rel=1e-6)
    for solver, recorded in (("heun", (-0.416544, -1.016429, 0.516974, 125.321983)),
                             ("euler", (-0.015014, -1.051720, -0.029472, 122.744453))):
        *_, z = integrate(guided(kdiff, torch.tensor([0, 3, 1]), 2.9, (0.1, 1.0)), z0, 6, solver)
        assert (*z[:, 1, 5, 7].tolist(), z.norm().item()) == pytest.approx(recorded, abs=2e-5, rel=1e-5)

def test_published_jit_files_load(tmp_path):
    """With the training script's extras (a pickled Namespace, an optimizer); ema1, or another where chosen."""
    net, path = model.build("JiT-demo/8", 32, 10), tmp_path / "checkpoint-last.pth"
    weights = {name: {f"module.net.{k}": factor * v for k, v in net.state_dict().items()}
               for factor, name in enumerate(("model", "model_ema1", "model_ema2"))}
    torch.save(weights | {"epoch": 5, "optimizer": {}, "args": argparse.Namespace(lr=1)}, path)
    for ema, factor in ((None, 1), ("0.9996", 2), ("none", 0)):
        ours = load(path, ema=ema)
        assert torch.equal(ours.kdiff.net.t_embedder.mlp[0].weight, net.t_embedder.mlp[0].weight * factor)
    ours = load(path)
    assert ours.config["model"] == "JiT-demo/8" and ours.kdiff.target == "x"
    assert (ours.shape, ours.step, ours.ema, ours.kdiff.tau) == ((3, 32, 32), 5, "0.9999", 0.05)
    assert ours.kdiff.noise_scale == 32 / 256 and ours.classes == [*"0123456789"]
    assert (ours.config["cfg"], ours.config["interval"]) == (2.9, [0.1, 1.0])
    with pytest.raises(UserError, match="--ema 0.9999, 0.9996, none|none, 0.9999, 0.9996"):
        load(path, ema="0.5")
    with pytest.raises(UserError, match="not a JiT-wide/8 whose weights fit"):
        load(path, model="JiT-wide/8")

@pytest.mark.parametrize("qk_norm", [False, True])
def test_published_dit_files_load_with_their_statistics(tmp_path, qk_norm):
    """Flat weights under "ema"; wrapped otherwise, as bfloat16 .safetensors, without tables; others are named."""
    net = fill(model.build("LightningDiT-demo/1", 16, 10, qk_norm=qk_norm))
    file, stats, state = tmp_path / "dit.pt", tmp_path / "stats.pt", net.state_dict()
    angles = [[place / 10 ** (i // 2 / 2) for place in divmod(n, 16) for i in range(16)] for n in range(256)]
    tables = state["feat_rope.freqs_cos"], state["feat_rope.freqs_sin"]
    assert error(torch.stack(tables), torch.tensor(np.stack([np.cos(angles), np.sin(angles)]))) < 1e-6
    torch.save({"mean": torch.arange(32.0), "std": torch.ones(32)}, stats)
    bare = {key: value for key, value in state.items() if "feat_rope" not in key and key != "pos_embed"}
    args = normal("x", 2, 32, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([1, 10])
    for content in ({"ema": state}, {"ema_model": bare, "opt": {}}, bare,
                    {"state_dict": {f"_orig_mod.model.{k}": v for k, v in bare.items()}}):
        torch.save(content, file)
        ours = load(file, stats=stats)
        assert torch.equal(ours.kdiff.net(*args), net(*args)) and ours.shape == (32, 16, 16)
    assert ours.config["model"] == "LightningDiT-demo/1" and ours.codec.mean.flatten().tolist() == [*range(32)]
    assert (ours.kdiff.target, ours.kdiff.tau, ours.kdiff.noise_scale, ours.config["cfg"]) == ("v", 0.0, 1.0, 1.5)
    with pytest.raises(UserError, match="--stats"):
        load(file)
    torch.save(state | {"feat_rope.freqs_sin": tables[1][1:]}, file)
    with pytest.raises(UserError, match="freqs_sin"):
        load(file, stats=stats)
    with open(tmp_path / "dit.safetensors", "wb") as file:
        positions = data.begin_safetensors(file, [], **{key: ("BF16", value.shape) for key, value in bare.items()})
        for key, value in bare.items():
            data.append(file, positions, key, value.bfloat16().view(torch.uint16))
    rough = load(tmp_path / "dit.safetensors", stats=stats)
    assert error(rough.kdiff.net(*args), net(*args)) < 0.05
    for strange, named in (({"conv.weight": torch.zeros(3)}, "alien.pt: it is a file with conv.weight"),
                           (state | {"blocks.0.mlp.fc1.weight": tables[0]}, "a DiT or SiT, neither"),
                           ({"t_embedder.mlp.0.weight": tables[0]}, "alien.pt")):
        torch.save(strange, tmp_path / "alien.pt")
        with pytest.raises(UserError, match=named):
            load(tmp_path / "alien.pt")

def test_curves_are_drawn_where_their_numbers_are(tmp_path):
    """Two panels, each in its own scale: a line from corner to corner; from -50 to 50, without the NaN."""
    curves = {"k": ([0, 5, 10], [0, 0.5, 1])}, {"a": ([0, 1, 2, 3], [-50, 50, math.nan, 0])}
    sample.draw_curves(curves, tmp_path / "c.png")
    picture = Image.open(tmp_path / "c.png").convert("RGB")
    blue = (np.asarray(picture) == (31, 119, 180)).all(-1)                   # the first of COLOURS
    for left, top, last in ((0, 40, 40), (560, 334 - 294 / 1.025, 334 - 147 / 1.025)):      # to 50 * 1.05
        rows, columns = np.nonzero(blue[30:, left:left + 560])               # below the title
        found = columns.min(), columns.max(), 30 + rows.min(), 30 + rows.max()
        assert found == pytest.approx((64, 540, top, 334), abs=2)
        assert 30 + rows[columns == columns.max()].mean() == pytest.approx(last, abs=2)

def test_grid_shows_each_image_in_its_row():
    """Images of 8 px in rows of three, enlarged without blur; each name begins a row; large ones as they are."""
    images = torch.from_numpy(noise(10, 3, 8, 8))
    sheet = np.asarray(sample.grid(images, ["a", "long name"], 3))
    margin = sheet.shape[1] - 3 * 100 - 4
    assert len(sheet) == 404 and 16 < margin < 200 and (sheet[:, :margin - 8] < 100).any()
    cells = sheet[4:, margin:-4].reshape(4, 100, 3, 100, 3)[:, :96:12, :, :96:12].transpose(0, 2, 4, 1, 3)
    shown = cells.reshape(12, 3, 8, 8)[[0, 1, 2, 3, 4, 6, 7, 8, 9, 10]]      # five each, two rows a name
    assert np.array_equal(shown, images)
    assert sample.grid(images[:6].repeat(1, 1, 25, 25), "ab", 3).size[1] == 2 * 204 + 4
    assert sample.grid(images[:, :, :4], ["a"]).size[1] == 2 * 100 + 4       # 4 x 8 pixels, 24 times

def test_classes_are_chosen_by_names_or_by_numbers():
    """All words are names, else all are numbers; a name may contain a comma; what is neither is an error."""
    for text, names, expected in (
            ("b,c", "abc", [1, 2]), ("0,2", "abc", [0, 2]), ("7,1", "17", [1, 0]), ("0,1,2", ["1", "10", "2"], [0, 1, 2]),
            ("c,0", "abc", [2, 0]), ("a, b", ["c", "a, b"], [1]), ('"a, b",c', ["c", "a, b"], [1, 0])):
        assert sample.choose_classes(text, list(names)) == expected
    for word in ("3", "d", "-1"):
        with pytest.raises(UserError, match=r"not a label.* 2 .a, b, c.$"):
            sample.choose_classes(word, [*"abc"])

# ---- train.py ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clip, dtype", [(0.0, "float32"), (0.1, "float32"), (0.0, "bfloat16")])
def test_a_step_of_any_network_is_algorithm_1_written_by_hand(clip, dtype):
    """Loss, AdamW, clipping and averages in plain formulas and one batch; the loop adds up micro batches."""
    torch.manual_seed(0)
    kdiff, dataset = KDiff(Bare(), num_classes=8), Shapes(12, 8)
    by_hand, state = copy.deepcopy(kdiff).double(), state_of(kdiff, 0.9, 0.5)
    weights = dict(by_hand.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in weights.items()}
    averages = {decay: {name: p.detach().clone() for name, p in weights.items()} for decay in (0.9, 0.5)}
    steps = loop(state, dataset, clip=clip, dtype=dtype)
    rel = 2e-2 if dtype == "bfloat16" else 1e-4
    for step, items in enumerate(data.batch_indices(12, 6, 7, 0, 5)):
        x = torch.stack([dataset[i][0] for _, i in items]).float() / 127.5 - 1
        labels = torch.tensor([dataset[i][1] for _, i in items])
        t, e, y = by_hand.draw(x, labels, [data.seed_of(7, step, n) for n in range(6)])
        loss = by_hand.loss(x.double(), y, t.double(), e.double())
        gradients = dict(zip(weights, torch.autograd.grad(loss, weights.values())))
        norm = sum(g.square().sum() for g in gradients.values()).sqrt().item()
        shrink = min(1, clip / norm) if clip else 1
        lr = 3e-3 * min(1, (step + 1) / 4)                                   # two epochs of two steps
        with torch.no_grad():
            for name, p in weights.items():
                g, (m, v) = gradients[name] * shrink, moments[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                rate = lr * (3 if name == "w" else 1)                        # --k_lr
                p -= rate * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                for decay, average in averages.items():
                    average[name].mul_(decay).add_((1 - decay) * p)
        assert next(steps) == pytest.approx((loss.item(), norm, lr), rel=rel)
    assert next(steps, None) is None and state.step == 5
    for ours, theirs in ((kdiff, weights), *((state.averages[str(decay)], averages[decay]) for decay in averages)):
        for name, p in ours.named_parameters():
            assert error(p, theirs[name]) < rel
    assert kdiff.net.out.dtype == getattr(torch, dtype) and not state.averages["0.9"].training
    images = checkpoint_of(state.averages["0.5"], (3, 8, 8)).sample([0, 5, 8], steps=4)
    assert images.shape == (3, 3, 8, 8) and images.dtype == torch.uint8

def test_optimizer_takes_every_parameter_but_frozen_ones():
    """Another parameter of KDiff has the rate of w; one that no gradient reaches, or a frozen one, stays."""
    kdiff = KDiff(Bare(), num_classes=8)
    kdiff.gain = torch.nn.Parameter(torch.ones(()))
    kdiff.net.unused = torch.nn.Parameter(torch.ones(2))
    kdiff.net.down.requires_grad_(False)
    rule = kdiff.rule
    kdiff.rule = lambda w, t: rule(w + kdiff.gain, t)
    before = {name: p.clone() for name, p in kdiff.named_parameters()}
    state = state_of(kdiff, 0.9)
    for _ in loop(state, Shapes(12, 8), steps=1, warmup_epochs=0, k_lr=10.0):
        pass
    moved = {name: (p - before[name]).abs().max().item() for name, p in kdiff.named_parameters()}
    still = {"net.unused", "net.down.weight", "net.down.bias"}
    assert {name for name, distance in moved.items() if distance == 0} == still
    assert moved["gain"] == pytest.approx(0.03, rel=0.01) and moved["net.up.bias"] == pytest.approx(3e-3, rel=0.01)

def test_presets_are_table_4_and_what_depends_on_data_is_filled_in(monkeypatch, tmp_path):
    """The paper's numbers, tau where Delta vanishes; steps, micro batch, guidance, patch, preset, folder."""
    monkeypatch.chdir(tmp_path)
    def parsed(words):
        return vars(train.parse(words.split()))

    def configured(words, n=100, classes=8):
        args = train.parse(words.split())
        shapes = Shapes(n, 32)
        shapes.classes = shapes.classes[:classes]
        return train.make_config(args, shapes, Codec(), torch.device("cpu"))
    common = dict(batch_size=1024, lr=2e-4, k_lr=1.0, ema=[.9999, .9998, .9996], label_drop=0.1, target="k",
                  loss="v", interval=[0.1, 1.0], clip=0.0, flip=True, steps=None, samples=None, preset="paper")
    for words, expected in (
            ("--space latent", dict(model="LightningDiT-XL/1", image_size=256, epochs=800, warmup_epochs=0,
                                    t_mean=0.0, t_std=1.0, noise_scale=1.0, tau=0.0, cfg=1.5)),
            ("--space pixel", dict(model="JiT-B/16", image_size=256, epochs=600, warmup_epochs=5, t_mean=-0.8,
                                   t_std=0.8, noise_scale=1.0, tau=0.05, cfg=2.9)),
            ("--image_size 512", dict(model="JiT-B/32", image_size=512, noise_scale=2.0)),
            ("--image_size 128 --model JiT-S/8 --lr 0", dict(model="JiT-S/8", noise_scale=0.5, lr=0.0)),
            ("--warmup_epochs 3 --t_mean -1.5 --ema 0.5", dict(warmup_epochs=3.0, t_mean=-1.5, ema=[0.5])),
            *((f"--space latent --target {target}", dict(target=target, tau=tau)) for tau, targets in (
                (0.05, ("eps", "x", "0", "1.0")), (0.0, ("v", "0.3"))) for target in targets)):
        args = parsed(f"--data photos {words}")
        assert {key: args[key] for key in common | expected} == common | expected
    for words, expected in (
            ("", dict(model="JiT-demo/8", image_size=32, tau=0.05, preset="demo")),
            ("--data fashion --lr 1e-3", dict(model="JiT-demo/8", preset="fashion", lr=1e-3, epochs=4.267)),
            ("--space latent --target 0.5", dict(model="LightningDiT-demo/1", tokenizer="pca", k_lr=1.0)),
            ("--data photos --image_size 96", dict(model="JiT-S/12", preset="small", k_lr=10.0)),
            ("--data photos --image_size 32", dict(model="JiT-demo/4", preset="laptop", steps=8000))):
        args = parsed(words)
        assert {key: args[key] for key in expected} == expected
    monkeypatch.setattr(train, "WORLD", 2)
    assert configured("--batch_size 600 --epochs 12").items() >= dict(
        micro_batch=100, steps=2, workers=0, samples=64, compile=False, shape=[3, 32, 32], num_classes=8,
        processes=2, cfg=2.0, out="out/pixel").items()
    paper = configured("--preset paper", classes=1)
    assert 1 <= paper["workers"] <= 8 and paper["samples"] == 8 and paper["cfg"] == 1.0
    assert configured("--label_drop 0 --target 0.5") .items() >= dict(cfg=1.0, out="out/pixel-0.5").items()
    for words, printed in (("--batch_size 65", "65 does not divide over 2 processes: try 64"),
                           ("--batch_size 1", "try 2"), ("--batch_size 12 --micro_batch 4", "try 3")):
        with pytest.raises(UserError, match=printed):
            configured(words)

def test_the_average_that_is_shown_follows_from_the_step():
    """The longest that has forgotten the start: 0.95^90 < 0.01; before that the weights themselves."""
    for step, average in ((0, "none"), (89, "none"), (90, "0.95"), (228, "0.98"), (459, "0.99"), (10 ** 6, "0.99")):
        assert sample.default_average(["0.99", "0.98", "0.95"], step) == average

def test_samples_of_two_processes_make_one_file(two, call, tmp_path):
    """An npz of images, labels going round, and settings: the same as one process makes."""
    call("sample.py", two[0] / "two" / "ckpt.pt", "--steps", 2, "--n", 5, "--classes", "star,ring", "--batch_size", 2, "--out",
         tmp_path / "one.npz")
    with np.load(two[0] / "s.npz") as file, np.load(tmp_path / "one.npz") as one:
        assert file["arr_0"].shape == (5, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [5, 3, 5, 3, 5] == one["arr_1"].tolist()
        assert np.abs(file["arr_0"].astype(int) - one["arr_0"]).max() <= 1 and file["arr_0"].std() > 10
        settings = json.loads(str(file["settings"]))
    assert settings.items() >= dict(steps=2, classes="star,3", n=5, class_names=Shapes.classes).items()
    assert not [*tmp_path.glob(".*"), *two[0].glob(".*")]                    # no temporary file

def test_each_flag_of_the_sampler_changes_samples(two, call, tmp_path):
    """Of a network with filled weights and an average with others; a flag without effect is refused."""
    source = load(two[0] / "two" / "ckpt.pt")
    fill(source.kdiff.net)
    state = train.State(source.kdiff.requires_grad_(), Codec(), source.config | {"ema": [0.5]}, source.classes)
    state.averages["0.5"].net.final_layer.linear.bias.data += 1
    ckpt = tmp_path / "ckpt.pt"
    train.save(ckpt, state)
    def drawn(*flags):
        call("sample.py", ckpt, "--steps", 4, "--n", 2, *flags, "--out", tmp_path / "a.npz")
        return np.load(tmp_path / "a.npz")["arr_0"].tobytes()
    plain = drawn()
    for flags in (("--seed", 1), ("--interval", 0.6, 1), ("--solver", "euler"), ("--dtype", "bfloat16"),
                  ("--cfg", 4), ("--tau", 0.9), ("--ema", "0.5"), ("--steps", 5), ("--classes", "ring,star")):
        assert drawn(*flags) != plain, flags
    assert drawn() == plain
    for flags in (("--tokenizer", ckpt), ("--stats", ckpt)):
        assert f"{flags[0]} {ckpt} has no effect" in call("sample.py", ckpt, *flags, status=2)

def test_latents_of_two_processes_are_posterior_samples_to_train_on(two, small_vavae, call, tmp_path):
    """Mean and spread, noise of their own, mirror images; statistics; they train; pictures need the file."""
    latents, vavae, run = two[0] / "latents", tmp_path / "vavae.pt", tmp_path / "run"
    dataset, images, draws = open_dataset(latents, None), ImageFolder(two[0] / "photos", 32), []
    batch = stack(images, 9).float() / 127.5 - 1
    for flip in (False, True):
        mean, logvar = VAVAE(two[0] / "vavae.pt").moments(batch.flip(-1) if flip else batch)
        drawn = torch.stack([(dataset.mirrored(i) if flip else dataset[i])[0] for i in range(9)])
        draws.append((drawn - mean) / torch.exp(logvar / 2))
        assert abs(draws[-1].mean()) < 0.1 and abs(draws[-1].std() - 1) < 0.1
    assert torch.corrcoef(torch.cat([d.flatten(1) for d in draws])).fill_diagonal_(0).abs().max() < 0.45
    both = torch.stack([item[0] for i in range(9) for item in (dataset[i], dataset.mirrored(i))]).double()
    std, mean = torch.std_mean(both, (0, 2, 3), correction=0)
    assert dataset.mean.flatten().tolist() == pytest.approx(mean.tolist(), abs=1e-3)
    assert dataset.std.flatten().tolist() == pytest.approx(std.tolist(), abs=1e-3)
    assert {dataset[i][1] for i in range(9)} == {0} and dataset.classes == ["photos"]
    assert dataset.shape == (32, 2, 2) and len(list(latents.glob("*.safetensors"))) == 2
    shutil.copy(two[0] / "vavae.pt", vavae)
    words = ("train.py", *"--space latent --preset demo --image_size 32 --batch_size 4 --samples 0".split(),
             "--data", latents, "--out", run, "--tokenizer", vavae, "--steps")
    assert "resuming" not in call(*words, 2) and "resuming" in call(*words, 3)
    ours = load(run / "ckpt.pt")
    assert ours.shape == (32, 2, 2) and ours.codec.can_decode and ours.kdiff.tau == 0
    moved = vavae.rename(tmp_path / "moved.pt")
    assert "--tokenizer" in call("sample.py", run / "ckpt.pt", status=2)
    call("sample.py", run / "ckpt.pt", "--tokenizer", moved, "--n", 9, "--steps", 2, "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[1] == 204                  # one class, rows of eight
    assert "contains latents" in call(
        "data.py", "encode", two[0] / "photos", "--tokenizer", moved, "--out", latents, status=2)

def test_the_short_demo_raises_k_and_writes_its_files(call, tmp_path):
    """Forty steps of the pixel demo move k from 0.5 past 0.6; pictures on the way, log, files."""
    dry = call("train.py", "--dry_run", "--steps", 9, "--image_size", 16, "--out", tmp_path / "none")
    assert " s a step here " in dry and not (tmp_path / "none").exists()
    flags = "--steps 40 --batch_size 32 --samples 16 --sample_every 20"
    said = call("train.py", *flags.split(), "--out", tmp_path)
    steps, ks = read_log(tmp_path, "k")
    assert steps == [20, 40] and ks[1] > 0.6 and "= 0.20 epochs of 200.0 steps" in said
    assert "samples.png" in said and "done in 0:" in said
    assert re.search(r"^step 40/40 \| epoch 0.2 \| loss \d\.\d{4} \| k 0.\d{3} \| lr \d\.\de-03 \| "
                     r"grad \d\.\d\d \| [\d,]+ img/s \| eta 0:00:00$", said, re.M)
    _, losses = read_log(tmp_path, "loss")
    assert losses[1] < 0.75 * losses[0] and Image.open(tmp_path / "samples.png").size[1] == 8 * 100 + 4
    assert {*os.listdir(tmp_path)} == {*"ckpt.pt log.csv curves.png samples.png samples-0000020.png".split()}

def test_pca_latents_are_white_and_what_hardly_varies_is_dropped(call, tmp_path):
    """Whitened, and decoded again; of flat colours three components are left; of one black picture none."""
    call(*TINY[:-2], "--space", "latent", "--steps", 1, "--out", tmp_path / "latent")
    ours, images = load(tmp_path / "latent" / "ckpt.pt"), data.some_items(Shapes(6400, 32), 200)
    x = ours.codec.encode(images)
    assert x.mean((0, 2, 3)).abs().max() < 0.2 and (x.std((0, 2, 3)) - 1).abs().max() < 0.2
    assert ours.shape == (16, 4, 4) and (ours.codec.decode(x).float() - images).abs().mean() < 10
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, colour in enumerate(noise(30, 3).tolist()):
        Image.new("RGB", (16, 16), tuple(colour)).save(folder / f"{i}.png")
    words = (*TINY[:-2], *"--space latent --preset demo --image_size 16 --steps 1 --data".split(), folder, "--out")
    assert "3 of 16 channels" in call(*words, tmp_path / "three")
    assert load(tmp_path / "three" / "ckpt.pt").shape == (3, 2, 2)
    for path in folder.iterdir():
        Image.new("RGB", (16, 16)).save(path)
    assert "all alike" in call(*words, tmp_path / "none", status=2)

@pytest.mark.parametrize("target, columns", [
    ("two", ("k1", "k2", "k")), ("time", ("k",)), ("channel", ("k", "k_min", "k_max"))])
def test_what_other_targets_learn_is_logged(call, tmp_path, target, columns):
    """k1 and k2 and what k they are; the mean of k(t); a k for each principal component, strongest first."""
    words = (*TINY, "--image_size", 16, "--target", target, "--noise_scale", 3, "--out", tmp_path, "--steps")
    call(*words, 2)
    said = call(*words, 3)
    ours = load(tmp_path / "ckpt.pt", ema="none")
    logged = [read_log(tmp_path, column)[1][-1] for column in columns]
    assert logged == pytest.approx([k.item() for k in ours.kdiff.ks().values()], abs=2e-6) and logged[0] != 0.5
    assert f"| {columns[0]} {logged[0]:.3f} |" in said and "at step 2" in said
    if target == "channel":
        basis = ours.codec.tokenizer.basis                                   # orthonormal: noise stays white
        torch.testing.assert_close(basis.T @ basis, torch.eye(192), atol=1e-5, rtol=0)
        patches = F.pixel_unshuffle(data.some_items(Shapes(6400, 16), 6400).double() / 127.5, 8)
        values = torch.linalg.eigvalsh(torch.cov(patches.transpose(0, 1).flatten(1))).flip(0)
        x = ours.codec.encode(data.some_items(Shapes(6400, 16), 6400))
        torch.testing.assert_close(x.var((0, 2, 3))[:32].double(), values[:32], rtol=0.05, atol=0)
        call("sample.py", tmp_path / "ckpt.pt", "--n", 8, "--steps", 2, "--out", tmp_path / "s.png")

def test_checkpoints_are_measured_once(call, tmp_path, monkeypatch):
    """fid.csv has a row per checkpoint, reference and setting, as fid.py finds it for the samples in a file."""
    call(*TINY, "--steps", 2, "--keep_every", 1, "--out", tmp_path)
    ref, measured, evaluate = tmp_path / "ref.npz", [], fid.evaluate
    np.savez(ref, mu=np.zeros(768), sigma=np.eye(768), features="pixels")
    monkeypatch.setattr(fid, "evaluate", lambda *a, **kw: measured.append(1) or evaluate(*a, **kw))
    how = ("--n", 6, "--steps", 2, "--solver", "euler")
    first, second = (tmp_path / f"ckpt-000000{step}.pt" for step in (1, 2))
    def measure(*words):
        call("fid.py", *words, ref, *how, "--features", "pixels")
        return [(row["step"], row["cfg"]) for row in sample.read_rows(tmp_path / "fid.csv")]
    assert measure(second) == measure(second) == [("2", "2.0")] and len(measured) == 1
    assert measure(second, "--cfg", 1.25) == [("2", "2.0"), ("2", "1.25")]
    assert measure(first, second) == [("2", "2.0"), ("2", "1.25"), ("1", "2.0")] and len(measured) == 3
    call("sample.py", second, *how, "--out", tmp_path / "s.npz")
    said = call("fid.py", tmp_path / "s.npz", ref, "--features", "pixels")
    distance = float(re.search(r"pixel distance (\S+)", said)[1])
    assert float(sample.read_rows(tmp_path / "fid.csv")[0]["pixel_distance"]) == pytest.approx(distance, rel=1e-3)
    np.savez(ref, mu=np.ones(768), sigma=np.eye(768), features="pixels")     # another reference, the same name
    assert len(measure(second)) == 4
    call(*TINY, "--steps", 1, "--keep_every", 1, "--seed", 1, "--out", tmp_path / "b")
    shutil.copy(tmp_path / "b" / "ckpt-0000001.pt", first)                   # other weights, the same name
    assert len(measure(first)) == 5
    (tmp_path / "fid.csv").write_text("step\nx\n")
    assert "move it away" in call("fid.py", second, ref, "--features", "pixels", status=2)

def test_init_takes_what_fits_and_says_what_does_not(call, photos, tmp_path):
    """Other classes, another target, another size at one patch; the codec of the checkpoint; another network."""
    call(*TINY, "--steps", 2, "--out", tmp_path / "source")
    ckpt = tmp_path / "source" / "ckpt.pt"
    source = load(ckpt).kdiff.state_dict()
    words = (*TINY, *"--batch_size 2 --steps 1 --lr 0 --init".split(), ckpt, "--out")
    for more, printed, new in (
            (("--data", photos, "--preset", "demo"), "8 classes, which are not these 3", {"y_embedder.embedding_table.weight"}),
            (("--target", "time"), "predicts k, this run time", {"w"}),
            (("--image_size", 40), "positions are new", {"pos_embed"})):
        said = call(*words, tmp_path / printed, *more)
        ours = read_tensors(tmp_path / printed / "ckpt.pt")["model"]
        assert printed in said and said.count("--init ") == 1
        assert {key.removeprefix("net.") for key in source if not torch.equal(ours[key], source[key])} == new
    said = call(*words, tmp_path / "no", "--model", "JiT-wide/8", status=2)
    assert "contains a JiT-narrow/8, not a JiT-wide/8" in said
    latent = ("--space", "latent", "--preset", "demo", "--batch_size", 4, "--samples", 0, "--steps", 1, "--out")
    call("train.py", *latent, tmp_path / "a")
    said = call("train.py", *latent, tmp_path / "b", "--data", photos, "--init", tmp_path / "a" / "ckpt.pt")
    assert "statistics of the data: they are kept" in said
    assert torch.equal(*(load(tmp_path / run / "ckpt.pt").codec.tokenizer.basis for run in "ab"))

# ---- fid.py ------------------------------------------------------------------------------------------------

class PlainInception:
    """FID's network in float64 from its description, of 4 channels each, 3 x 3. It makes its weights, state."""

    def __init__(self):
        self.state = {}

    def weight(self, key, *shape):
        r = normal(key, *shape) / math.prod(shape[1:]) ** 0.5
        if len(shape) == 1:
            r = 0.1 * r + key.endswith(("running_var", "bn.weight"))
        self.state[key] = r
        return r.double()

    def conv(self, x, name, stride=1, padding=1):
        x = F.conv2d(x, self.weight(f"{name}.conv.weight", 4, x.shape[1], 3, 3), None, stride, padding)
        self.state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
        numbers = [self.weight(f"{name}.bn.{key}", 4) for key in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *numbers, eps=1e-3))

    def __call__(self, images):
        def matrix(n):                                                        # TF1 bilinear, (299, n)
            rows = [np.interp(np.arange(299) * n / 299, range(n), unit) for unit in np.eye(n)]
            return torch.from_numpy(np.array(rows).T)
        x = (matrix(images.shape[2]) @ images.double() @ matrix(images.shape[3]).T - 128) / 128
        x = self.conv(self.conv(x, "Conv2d_1a_3x3", 2, 0), "Conv2d_2a_3x3", 1, 0)
        x = F.max_pool2d(self.conv(x, "Conv2d_2b_3x3"), 3, 2)
        x = self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 1, 0)
        x = F.max_pool2d(x, 3, 2)
        for blocks, branches in (                                    # branches of so many numbered convolutions
                ("5b 5c 5d", dict(branch1x1=0, branch5x5=2, branch3x3dbl=3)),
                ("6a", dict(branch3x3=0, branch3x3dbl=3)),
                ("6b 6c 6d 6e", dict(branch1x1=0, branch7x7=3, branch7x7dbl=5)),
                ("7a", dict(branch3x3=2, branch7x7x3=4)),
                ("7b 7c", dict(branch1x1=0, branch3x3=2, branch3x3dbl=3))):
            for block in blocks.split():
                x = self.block(x, f"Mixed_{block}", branches)
        self.weight("fc.bias", 1008)
        pool3 = x.mean((2, 3))
        return pool3, pool3 @ self.weight("fc.weight", 1008, x.shape[1]).T

    def block(self, x, block, branches):
        parts, halves = [], block[-2:] in ("6a", "7a")
        for name, n in branches.items():
            y = x
            *names, last = [f"{block}.{name}_{i + 1}" for i in range(n)] or [f"{block}.{name}"]
            for each in names:
                y = self.conv(y, each)
            ends = "ab" if block[-2:] in ("7b", "7c") and n else [""]         # the last one forks there
            parts += [self.conv(y, last + end, *((2, 0) if halves else ())) for end in ends]
        if halves:
            return torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)
        pool = F.max_pool2d(x, 3, 1, 1)
        if block != "Mixed_7c":
            pool = F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)   # without padding
        return torch.cat([*parts, self.conv(pool, f"{block}.branch_pool")], 1)

def test_inception_agrees_with_plain_layers(tmp_path):
    """One side enlarged, one shrunk; keys as published (a checksum); train() and autocast change nothing."""
    images, plain, path = torch.from_numpy(noise(2, 3, 40, 333)), PlainInception(), tmp_path / "random.pth"
    expected, state = plain(images), plain.state
    assert len(state) == 566 and zlib.crc32(repr(sorted(state)).encode()) == 3580115373
    torch.save(state, path)
    network = fid.Inception(path).train()
    with torch.autocast("cpu", torch.bfloat16):
        ours = network(images)
    assert not ours[0].requires_grad and max(error(*pair) for pair in zip(ours, expected)) < 5e-6
    assert network.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    key = "Mixed_7c.branch_pool.conv.weight"
    weight = state.pop(key)
    for unfit in (state, state | {key: weight[:, 1:]}):
        torch.save(unfit, path)
        with pytest.raises(UserError, match="random.pth: not FID's Inception"):
            fid.Inception(path)

def test_frechet_distance_has_its_closed_forms_at_every_rank():
    """Equal or commuting covariances; n and m samples in 100 dimensions, by the norm of X Y^T; no NaN."""
    rng, mu = np.random.RandomState(0), np.zeros(50)
    turn, _ = np.linalg.qr(rng.randn(50, 50))
    a, b = rng.rand(2, 50) ** 4
    s1, s2, shift = turn * a @ turn.T, turn * b @ turn.T, rng.randn(50)
    assert fid.frechet_distance(mu, s1, shift, s1) == pytest.approx(shift @ shift, rel=1e-10)
    assert fid.frechet_distance(mu, s1, mu, s2) == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-9)
    assert fid.frechet_distance(np.ones(5), np.zeros((5, 5)), np.zeros(5), np.zeros((5, 5))) == 5
    for bad in ((mu[None], s1), (mu, s1[:3]), (mu[:3], s1[:3, :3]), (mu * np.nan, s1), (mu, s1 + np.inf)):
        for four in ((mu, s1, *bad), (*bad, mu, s1)):
            with pytest.raises(UserError):
                fid.frechet_distance(*four)
    for n in (10, 100, 101, 300):
        for m in (80, 400):
            x, y = (rng.randn(rows, 100) * np.linspace(1, 0.1, 100) for rows in (n, m))
            (mu1, s1), (mu2, s2) = ((v.mean(0), np.cov(v, rowvar=False)) for v in (3 * x, y))
            x, y = (3 * x - mu1) / (n - 1) ** 0.5, (y - mu2) / (m - 1) ** 0.5
            expected = sum((v ** 2).sum() for v in (mu1 - mu2, x, y)) - 2 * np.linalg.norm(x @ y.T, "nuc")
            assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-10)
            assert abs(fid.frechet_distance(mu1, s1, mu1, s1)) < 1e-6

def test_inception_score_is_the_mean_kl_of_uneven_splits():
    """By loops over 103 rows in 10 splits of 10 and 11; K for K certain classes; too few are refused."""
    logits = 3 * torch.from_numpy(np.random.RandomState(0).randn(103, 7).astype(np.float32))
    p = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(103)]
    parts = [p[i * 103 // 10:(i + 1) * 103 // 10] for i in range(10)]
    scores = [np.exp(np.mean([(row * np.log(row / part.mean(0))).sum() for row in part])) for part in parts]
    assert fid.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)
    certain = torch.eye(4, 5, dtype=torch.float64).repeat(2, 1) * 2000       # class 4 never: 0 log 0 is not NaN
    assert fid.inception_score(certain, splits=1) == pytest.approx((4, 0), rel=1e-12)
    with pytest.raises(UserError, match="9 images"):
        fid.inception_score(torch.zeros(9, 5))

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
    batches = list(fid.batches_of(Shapes(53, 32), 10, "shapes"))[::-1]
    reference = fid.Reference(__file__, np.zeros(12), np.eye(12))
    result = fid.evaluate(batches, 53, Stub(__file__), reference, torch.device("cpu"))
    data.print0("result", json.dumps(result))

def test_evaluation_does_not_depend_on_processes_batches_or_their_order(two, capsys):
    """Distance and score of 53 images at once, in batches of 10, the last first, and on two processes."""
    features, logits = Stub(__file__)(stack(Shapes(53, 32), 53))
    mu, sigma = features.double().mean(0).numpy(), np.cov(features.double().numpy(), rowvar=False)
    score, spread = fid.inception_score(logits)
    distance = fid.frechet_distance(mu, sigma, np.zeros(12), np.eye(12))
    assert score > 1.01
    evaluate_shapes()
    for said in (capsys.readouterr().out, two[1]):
        result = json.loads(re.search(r"^result (.*)$", said, re.M)[1])
        assert result == pytest.approx({"fid": distance, "is_mean": score, "is_std": spread}, rel=1e-6)

@pytest.fixture
def samples(tmp_path):
    """12 shapes of 32 px as PNGs in two folders, an array in a zip, stored or deflated, a packed file."""
    images = stack(Shapes(12, 32), 12)
    arr_0 = images.permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(arr_0):
        folder = tmp_path / "png" / str(i // 6)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.png")
    np.savez(tmp_path / "stored.npz", arr_0=arr_0, arr_1=np.zeros(12), settings=np.array('{"cfg": 2.5}'))
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=np.asfortranarray(arr_0))
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(arr_0))
    data.pack(tmp_path / "png", 32, tmp_path / "packed")
    return tmp_path, images

def test_samples_of_any_kind_of_file_are_measured(samples, call):
    """All kinds contain the same images, 0 from their own reference; hash and settings are printed."""
    (folder, images), how = samples, ("--features", "pixels", "--batch_size", 5)
    for name in ("png", "stored.npz", "deflated.npz", "columns.npz", "packed"):
        source = fid.open_samples(str(folder / name))
        assert getattr(source, "settings", None) == ({"cfg": 2.5} if name == "stored.npz" else None)
        batches = [batch for batch, _ in fid.batches_of(source, 5, name)]
        assert torch.equal(torch.cat(batches)[:12], images) and len(source) == 12
    make = ("fid.py", "--out", folder / "ref.npz", *how, "--make_ref")
    call(*make, folder / "png", "--image_size", 32)
    ref = fid.load_reference(str(folder / "ref.npz"), "pixels")
    features = images.numpy().reshape(12, 3, 16, 2, 16, 2).mean((3, 5)).reshape(12, 768) / 255
    assert np.abs(ref.mu - features.mean(0)).max() < 1e-6
    assert np.abs(ref.sigma - np.cov(features, rowvar=False)).max() < 1e-6
    assert (ref.n, ref.image_size, ref.weights) == (12, 32, None)
    dark = (images // 2).permute(0, 2, 3, 1).numpy()
    np.savez(folder / "dark.npz", arr_0=dark)
    np.savez(folder / "published.npz", mu=ref.mu, sigma=ref.sigma, arr_0=dark)       # as ADM's references
    distances = []
    for names in (("stored.npz", "ref.npz"), ("packed", "published.npz"), ("dark.npz", "ref.npz")):
        said = call("fid.py", *(folder / name for name in names), *how)
        distances.append(float(re.search(r"^pixel distance (\S+)", said, re.M)[1]))
        assert "12 images" in said and "FID" not in said and fid.sha256(folder / names[1]) in said
        assert ('"cfg": 2.5' in said) == (names[0] == "stored.npz")
    assert distances[:2] == pytest.approx([0, 0], abs=1e-6) and distances[2] > 1
    assert "6,400 images" in call(*make, "shapes", "--image_size", 4)
    Image.new("RGB", (32, 33)).save(folder / "png" / "11.png")
    mixed = call("fid.py", folder / "png", folder / "published.npz", *how, status=2)
    assert re.search("error: .*not images of one size.*3, 33, 32.*--make_ref", mixed) and mixed.count("error: ") == 1

MU, SIGMA, IMAGES = np.zeros(768), np.eye(768), np.zeros((4, 32, 32, 3), np.uint8)
UNFIT = {                  # what an .npz contains, or what becomes of a whole one; what the error says
    "cut": (lambda whole: whole[:-2000], "zip"),
    "huge": (lambda whole: whole.replace(b"(12, 32", b"(99, 32"), "greater than file size|mu"),
    "empty": (dict(other=SIGMA), "arr_0|mu"), "float": (dict(arr_0=IMAGES / 2), "float64|mu"),
    "grey": (dict(arr_0=IMAGES[..., 0]), r"\(4, 32, 32\)|mu"),
    "one": (dict(arr_0=IMAGES[:1]), "1 images have no covariance|mu")}
ODD = {
    "half": (dict(mu=MU), "sigma"), "wide": (dict(mu=MU, sigma=SIGMA[:64]), "64, 768"),
    "small": (dict(mu=MU[:64], sigma=SIGMA[:64, :64]), "64,"), "nan": (dict(mu=MU, sigma=SIGMA * np.nan), "finite"),
    "other": (dict(mu=MU, sigma=SIGMA, features="inception"), "--features pixels"),
    "size": (dict(mu=MU, sigma=SIGMA, image_size=64), "of 64 x 64 pixels.*32, 32")}

@pytest.mark.parametrize("name", [*UNFIT, *ODD])
def test_unfit_samples_and_references_get_one_line(samples, call, name):
    """As a reference and, if they contain images, as samples; exit status 2."""
    folder, _ = samples
    content, said = (UNFIT | ODD)[name]
    bad, whole, ref = folder / f"{name}.npz", folder / "packed", folder / "ref.npz"
    np.savez(ref, mu=MU, sigma=SIGMA)
    if callable(content):
        bad.write_bytes(content((folder / "stored.npz").read_bytes()))
    else:
        np.savez(bad, **content)
    for pair in [(whole, bad), (bad, ref)][:1 + (name in UNFIT)]:
        printed = call("fid.py", *pair, "--features", "pixels", "--batch_size", 5, status=2)
        assert re.fullmatch(rf"(images .*\n)*error: .*\n", printed) and re.search(said, printed)

def test_only_the_right_weights_are_taken(samples, call, monkeypatch, capsys):
    """Fetched once; others with --any_weights alone; IS is printed; of under 2,048 images a warning."""
    a, b, ref, png, hub = (samples[0] / name for name in ("a.pth", "b.pth", "ref.npz", "png", "hub"))
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
    assert said.count("warning: too high") == 1 and "WARNING" not in said
    assert f"error: {ref}: made with other weights" in call(*use, b, "--any_weights", status=2)
    call(*make, b, "--any_weights")
    assert "WARNING: not FID's own" in call(*use, b, "--any_weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    for path, printed in ((samples[0] / "gone.pth", "gone.pth.*hub/checkpoints.*--weights"), (b, "invalid hash")):
        monkeypatch.setattr(fid, "URL", path.as_uri())
        with pytest.raises(UserError, match=printed):
            fid.make_extractor("inception")
    assert not list((hub / "checkpoints").iterdir())
    monkeypatch.setattr(fid, "URL", a.as_uri())
    assert fid.make_extractor("inception").sha256 == fid.WEIGHTS
    a.unlink()
    assert fid.make_extractor("inception").sha256 == fid.WEIGHTS

# ---- Faults: interruptions, lost processes, full disks, files that are not what they say -------------------

@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes there")
@pytest.mark.parametrize("processes, victim, status, printed", [
    (None, None, 2, r"\S*/5.png: not a readable image"), (2, None, 1, r"\S*/5.png: not a readable image"),
    (None, -1, 2, "a loading process died, .*--workers"), (2, 0, 1, "process 0 lost the others")])
def test_fault_of_one_process_ends_everything_with_one_line(tmp_path, processes, victim, status, printed):
    """A damaged image that a loader meets; a loader killed as for memory, or one of two that train."""
    for i, image in enumerate(noise(9, 16, 16, 3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    words = "--batch_size 4 --preset demo --image_size 16 --workers 2 --steps 1000000 --data".split()
    out = tmp_path.parent / f"{tmp_path.name}-out"
    process = start(*TINY, *words, tmp_path, "--out", out, processes=processes,
                    wait_for="step 3/")
    if victim is None:
        os.truncate(tmp_path / "5.png", 400)
    else:
        os.kill(alive(process.mark, *(["RANK=1"] if processes else []))[victim], signal.SIGKILL)
    said = ending(process, status, None if victim is None else time.time())
    assert len(re.findall(f"^error: {printed}", said, re.M)) == 1 and said.count("5.png") == (victim is None)
    assert processes or said.count("error: ") == 1 and "Traceback" not in said
    steps = [int(step) for step in re.findall(r"^step (\d+)/", said, re.M)]
    if steps and not processes:
        assert read_tensors(out / "ckpt.pt")["step"] == steps[-1]            # what can be foreseen saves first

def test_kill_at_a_random_moment_leaves_a_loadable_checkpoint(tmp_path):
    """Of a run that saves every step, twice here, with ENDURANCE=1 fifty times: it loads and only grows."""
    steps, words = [0], (*TINY, "--steps", 10 ** 6, "--save_every", 1, "--out", tmp_path)
    for _ in range(50 if os.environ.get("ENDURANCE") else 2):
        process = start(*words, wait_for=f"step {steps[-1] + 2:,}/")
        time.sleep(random.random())
        process.kill()
        process.communicate()
        steps.append(read_tensors(tmp_path / "ckpt.pt")["step"])
        assert steps[-1] > steps[-2] and [*tmp_path.glob("ckpt*.pt")] == [tmp_path / "ckpt.pt"]

def test_bad_steps_and_full_disks_leave_the_last_good_checkpoint(call, photos, tmp_path):
    """Weights thrown to 1e30, a disk without room: one line, status 2, no NaN, no temporary or half file."""
    run, packed, samples = (tmp_path / name for name in ("run", "packed", "s.npz"))
    said = call(*TINY, "--steps", 30, "--lr", "1e30", "--save_every", 1, "--out", run, status=2)
    assert "10 steps in a row" in said and "try a lower --lr" in said and "| skipped 9" in said
    file = read_tensors(run / "ckpt.pt")
    assert file["step"] == int(re.search(r"at step (\d+) is intact", said)[1]) >= 1
    assert all(t.isfinite().all() for part in (file["model"], *file["ema"].values()) for t in part.values())
    state = state_of(KDiff(Bare(), num_classes=8), 0.9)
    next(state.averages["0.9"].parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match="after step 0 are not finite"):
        train.save(tmp_path / "nan.pt", state)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 16, before[1]))          # no file grows beyond 64 kB
    try:
        for named, *words in (
                ("ckpt.pt", *TINY, "--steps", file["step"] + 2, "--out", run),
                ("packed", "data.py", "pack", photos, "--image_size", 128, "--out", packed),
                ("s.npz", "sample.py", run / "ckpt.pt", "--n", 30, "--steps", 9, "--out", samples)):
            said = call(*words, status=2)
            assert said.count("error: ") == 1 and f"{named} could not be written" in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_tensors(run / "ckpt.pt")["step"] == file["step"] and not list(tmp_path.rglob("*.tmp"))
    assert not packed.exists() and not samples.exists()

@pytest.mark.parametrize("error, said, status, local_rank", [
    (FileNotFoundError(2, "No such file", "a.csv"), "a.csv: No such file", 2, 0), (UserError("a"), "", 2, 1),
    (torch.cuda.OutOfMemoryError("CUDA"), "out of GPU memory: try half the", 2, 1),
    (data.FileError("Caught FileError\nThen\ndata.FileError: a: b Error: c"), "a: b Error: c\n", 2, 1),
    (UserError("a: not whole\n(KeyError: b)"), "a: not whole (KeyError: b)\n", 2, 0),
    (BrokenPipeError(32, "Broken pipe"), "nobody reads", 2, 0),
    (SystemExit(130), "", 130, 0), (ConnectionResetError(104, "reset"), "a loading process died", 2, 0)])
def test_errors_are_explained_in_one_line(monkeypatch, capsys, error, said, status, local_rank):
    """Paths, memory, lost processes; of two, one prints what both met; bugs of ours keep their traceback."""
    def fail():
        raise error
    monkeypatch.setattr(data, "LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as exit:
        data.run(fail)
    printed = capsys.readouterr().err
    assert exit.value.code == status and printed.startswith(f"error: {said}" if said else "")
    assert printed.count("\n") == bool(said)
    for error in (OSError("no file"), RuntimeError("shapes differ"), TypeError("a typo")):
        with pytest.raises(type(error), match=str(error)):
            data.run(fail)

def test_bad_files_are_named_and_nothing_is_unpickled(tmp_path, monkeypatch):
    """Payloads of pickles; images cut, empty, vanished, too long, a pipe, a bomb; links in a circle; none."""
    class Payload:                                                           # unpickled, it creates a file
        def __reduce__(self):
            return os.system, ("touch marker",)
    monkeypatch.chdir(tmp_path)
    torch.save({"config": {}, "data": Payload()}, "a.pt")
    payload = np.array([Payload()], dtype=object)
    np.save("b.npy", payload, allow_pickle=True)
    np.savez("c.npz", mu=payload, sigma=SIGMA)
    for path, f, how in (("a.pt", load, None), ("b.npy", open_dataset, 9), ("c.npz", fid.load_reference, "pixels")):
        with pytest.raises(UserError, match=path):
            f(path, how)
    assert not Path("marker").exists()
    Image.fromarray(noise(40, 40, 3)).save("good.png")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:900])
    Path("empty.jpg").touch()
    os.mkfifo("pipe.png")
    for name, size in (("bomb.png", (30000, 30000)), ("thread.png", (1, 101))):
        Image.new("1", size).save(name)
    Image.new("F", (9, 9)).save("float.tiff")
    for name in ("cut.png", "empty.jpg", "bomb.png", "gone.png", "thread.png", "pipe.png", "float.tiff"):
        with pytest.raises(UserError, match=name):
            read_image(name)
    Image.new("P", (1, 100), 0).save("long.png", transparency=0)             # is read, and becomes white
    assert np.array_equal(read_image("long.png"), np.full((100, 1, 3), 255))
    Path("class").mkdir()
    Path("class", "a.heic").touch()
    for name, printed in ((".", "class: a class folder without images"), ("class", "contains no images.*1 .heic"),
                          ("nowhere", "nowhere: no such file"), ("good.png", "good.png: not a readable safetensors")):
        with pytest.raises(UserError, match=printed):
            open_dataset(name, 32)
    Path("class", "loop").symlink_to(tmp_path)
    Path("class", "a.png").symlink_to("../good.png")
    assert len(data.list_images("class")) == 1

BAD = {
    "train.py --batch_size 0": "--batch_size: 0: a number of at least 1", "train.py --lr nan": "--lr: nan",
    "train.py --ema 0.9 1": "--ema [0.9, 1.0]: decays", "sample.py nowhere.pt": "nowhere.pt",
    "train.py --target two --loss u": "two", "train.py --target eps --tau 0": "--tau 0 with --target eps",
    "train.py --data . --image_size 100": "--image_size 100 is no multiple of 8: try 104",
    "train.py --data . --image_size 20 --preset paper": "--image_size 20 has no network in Table 4",
    "train.py --device cpux": "--device cpux is not usable", "train.py --step 3": "--step",
    "train.py --init nowhere.pt --out out": "nowhere.pt", "fid.py nowhere nowhere": "nowhere",
    "train.py --space latent --image_size 30": "--image_size 30", "sample.py a.pt --out a.jpg": "--out a.jpg",
    "train.py --data .. --space latent": "--tokenizer pca, or run", "sample.py a.pt --n 0": "--n/--samples: 0",
    "train.py --target channel --model JiT-demo": "--image_size 32 is no multiple of 8",
    "sample.py a.pt b.pt": "b.pt", "fid.py nowhere": "give SAMPLES or CHECKPOINTS and REF",
    "fid.py --make_ref shapes --image_size 32 --out ref": "--out FILE.npz",
    "data.py pack nowhere --out out/x": "nowhere: no such folder", "train.py --out": "--out",
    "data.py encode . --out out --tokenizer nowhere.pt": "nowhere.pt",
    "data.py encode . --out out": "encode needs --tokenizer"}
BAD.pop("train.py --target channel --model JiT-demo")

@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, call, words):
    """The line names the flag or file; nothing is written."""
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    (tmp_path / ".here").mkdir()
    monkeypatch.chdir(tmp_path / ".here")
    *said, last = call(*words.split(), status=2).splitlines()
    assert last.startswith("error: ") and BAD[words] in last and "error: " not in "".join(said)
    assert not list(Path().iterdir())

def test_corruption_of_any_file_is_an_error_line_or_harmless(samples):
    """Images, checkpoints, packed files, latents: UserError, or read as what they still are; ENDURANCE=1: 220."""
    folder, _ = samples
    def read_samples(path):
        return list(fid.batches_of(fid.open_samples(str(path)), 5, path))
    def read_latents(path):
        return list(torch.utils.data.DataLoader(open_dataset(path.parent, 8)))
    openers = dict.fromkeys(("a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tiff"), read_image)
    for name in openers:
        Image.fromarray(noise(24, 24, 3)).save(folder / name)
    openers |= dict.fromkeys(("stored.npz", "deflated.npz", "packed"), read_samples)
    openers |= dict.fromkeys(("shards/a.safetensors", "shards/latents_stats.pt"), read_latents)
    openers |= {"ref.npz": lambda path: fid.load_reference(str(path), "pixels"), "a.pt": load}
    (folder / "shards").mkdir()
    latents = np.zeros((3, 2, 2, 2), "<f4")
    parts = dict(latents=latents, latents_flip=latents, labels=np.zeros(3, "<i8"))
    save_safetensors(folder / "shards", parts, "a.safetensors")
    np.savez(folder / "ref.npz", mu=MU, sigma=SIGMA)
    torch.save(model.build("JiT-narrow/8", 16, 8).half().state_dict(), folder / "a.pt")
    rng, refused = random.Random(1), 0
    for i in range(220 if os.environ.get("ENDURANCE") else 52):
        name, opener = list(openers.items())[i % len(openers)]
        path = folder / name
        whole = path.read_bytes()
        at, stretch = rng.randrange(len(whole)), rng.randint(1, 64)
        part, rest = whole[at:at + stretch], whole[at + stretch:]    # cut off, removed, overwritten, doubled
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

def test_fashion_is_padded_and_trains_and_bad_files_get_one_line(call, monkeypatch, tmp_path):
    """28 px in the middle of 32, grey thrice; missing, cut, other content, no network; kept once fetched."""
    pixels, packed, folder = noise(40, 28, 28), {}, tmp_path / "idx"
    header, labels = b"\0\0\x08\3" + np.array([40, 28, 28], ">u4").tobytes(), bytes(i % 10 for i in range(40))
    folder.mkdir()
    for name, content in (("labels-idx1", header[:8] + labels), ("images-idx3", header + pixels.tobytes())):
        images = folder / f"train-{name}-ubyte.gz"
        images.write_bytes(gzip.compress(content))
        monkeypatch.setitem(data.Fashion.sha256, f"train-{name}-ubyte", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data.Fashion, "places", [folder, tmp_path / "cache"])
    dataset = open_dataset("fashion", 32)
    image, label = dataset[13]
    assert len(dataset) == 40 and dataset.classes[label] == "dress" and image.shape == (3, 32, 32)
    assert np.array_equal(image[1, 2:30, 2:30], pixels[13]) and image.sum() == 3 * int(pixels[13].sum())
    words = ("train.py", "--data", "fashion", "--batch_size", 4, "--samples", 0, "--steps", 1, "--out", tmp_path / "run")
    call(*words, "--space", "latent")
    whole = images.read_bytes()
    for content, said in ((whole[:-9], "not Fashion-MNIST"), (gzip.compress(b"other"), "checksum")):
        images.write_bytes(content)
        assert said in call(*words, status=2)
    images.write_bytes(whole)
    monkeypatch.setattr(data.Fashion, "places", [tmp_path / "none", tmp_path / "cache"])
    monkeypatch.setattr(data.Fashion, "url", (tmp_path / "idx").as_uri() + "/")
    assert len(data.Fashion()) == 40                                         # as if from the network
    shutil.rmtree(folder)
    assert len(data.Fashion()) == 40
    shutil.rmtree(tmp_path / "cache")
    assert f"put it at {tmp_path / 'cache'}" in call(*words, status=2)

def test_busy_cores_or_no_compiler_cost_a_line(monkeypatch, capsys):
    """A process with less than 0.7 of its threads' time loses a thread; networks stay eager, not an error."""
    threads, clock = [], np.zeros(2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    clocks = dict(perf_counter=lambda: clock[0], process_time=lambda: clock[1])
    monkeypatch.setattr(train, "time", SimpleNamespace(**clocks))
    cores = train.watch_cores()
    next(cores)
    for wall, used, expected in ((1.9, 0.1, []), (0.2, 4.0, []), (2.1, 1.3, [1]), (2.1, 4.0, [1])):
        clock += wall, used
        next(cores)
        assert threads == expected
    assert "other programs left 0.6 of 2 cores" in capsys.readouterr().out
    def broken(*args, **kw):
        raise RuntimeError("no compiler\nfound")
    monkeypatch.setattr(torch, "compile", broken)
    net = Linear(4, 4)
    sample.compile_network(net)
    said = capsys.readouterr().out
    assert "not compiled" in said and said.count("\n") == 1
    assert net(torch.ones(1, 4, 1, 1), None, None).shape == (1, 4, 1, 1)

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
    data.pack(tmp_path / "photos", 256, tmp_path / "imagenet256.safetensors")
    latents = np.random.RandomState(0).standard_normal((2, 32, 16, 16)).astype(np.float16)
    parts = dict(latents=latents, latents_flip=latents, labels=np.zeros(2, int))
    save_safetensors(tmp_path / "latents", parts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.DATASETS, "fashion", lambda size: Shapes(80, size))
    monkeypatch.setattr(train, "estimate", lambda *args: None)               # minutes, for some
    scripts = {"train.py": train.main, "sample.py": sample.parse, "data.py": data.parse, "fid.py": fid.parse}
    assert len(commands) >= 20 and {words[0] for words in commands} >= {
        *scripts, "objective.py", "model.py", "test_all.py"}
    for script, *flags in commands:
        if script == "train.py" and "--tokenizer" in flags:                   # a file that only a user has
            del flags[flags.index("--tokenizer"):flags.index("--tokenizer") + 2]
        monkeypatch.setattr(sys, "argv", [script, *flags, *["--dry_run"] * (script == "train.py")])
        scripts.get(script, lambda: None)()

if __name__ == "__main__":                                        # one of the processes of the fixture `two`
    data.run(lambda: work_of_two(sys.argv[1]))
