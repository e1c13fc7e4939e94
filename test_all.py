"""Every claim of the other files, each test named after one: `pytest test_all.py`, no network, no GPU.

The first six tests teach: the velocity of a prediction, its clamp, the order of training, resuming, two
processes that equal one, and the solver's order of convergence. Read them first. Helpers follow behind them.
"""
import argparse
import ast
import copy
import functools
import gzip
import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")      # threads that wait by spinning make a shared machine crawl
os.environ["CUDA_VISIBLE_DEVICES"] = ""            # equal to the last bit is a claim about CPUs

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import approx, fixture, mark, raises, skip
from torch import nn
from torch.testing import assert_close

import data
import fid
import model
import objective
import sample
import train
from data import Codec, ImageFolder, PatchPCA, Shapes, UserError, open_dataset, read_image, read_tensors
from examples.losses import logit_normal
from examples.unet import UNet
from model import VAVAE
from objective import KDiff, innovation, k_of_innovation, optimal_loss
from sample import guided, integrate, load, read_log

HERE = Path(__file__).parent

# ---- Six tests that teach ----------------------------------------------------------------------------------

K = np.linspace(0.2, 0.8, 129)                     # ks for w: all for target "time", the first few for others
TIMES = torch.tensor([0.1, 0.2, 0.4, 0.9]).double().view(4, 1, 1, 1)
K_OF_TIMES = 0.2 + 0.6 * TIMES
K_OF_CHANNELS = torch.tensor(K[:10]).view(10, 1, 1)

@mark.parametrize("target, c, d, learned", [
    ("x", 1, 0, [1]),
    ("v", 1, -1, [0.5]),
    ("eps", 0, -1, [0]),
    (0.0, 0, -1, [0]),
    ("0.3", 0.3, -0.7, [0.3]),
    ("k", 0.2, -0.8, [0.2]),
    ("two", K[0], -K[1], [K[0], K[1], K[0] / (K[0] + K[1])]),
    ("time", K_OF_TIMES, K_OF_TIMES - 1, [0.5]),
    ("channel", K_OF_CHANNELS, K_OF_CHANNELS - 1, [K[:10].mean(), K[0], K[9]])])
def test_velocity_and_loss_are_those_of_x_and_e_solved_from_z_and_u(target, c, d, learned):
    """z = t x + (1-t) e and u = c x + d e are two equations for x and e. A linear solver knows the rest."""
    x, e, u = torch.randn(3, 4, 10, 2, 2).double()
    kdiff = KDiff(lambda z, t, y: u, target, num_classes=10, channels=10)
    if kdiff.w is not None:
        assert not kdiff.w.any()                                            # k starts at a half
        ks = torch.tensor(K[:kdiff.w.numel()]).float()
        kdiff.w.data = torch.logit(ks).view(kdiff.w.shape)
    assert [k.item() for k in kdiff.ks().values()] == approx(learned, abs=1e-6)
    kdiff = kdiff.double()
    z = TIMES * x + (1 - TIMES) * e
    matrix = torch.stack([factor * torch.ones_like(z) for factor in (TIMES, 1 - TIMES, c, d)], -1)
    solved = torch.linalg.solve(matrix.unflatten(-1, (2, 2)), torch.stack([z, u], -1))
    x_hat, e_hat = solved.unbind(-1)
    t = TIMES.flatten()
    assert_close(kdiff.velocity(u, z, t), x_hat - e_hat, atol=1e-5, rtol=1e-5)
    errors = {"u": u - (c * x + d * e), "x": x_hat - x, "eps": e_hat - e, "v": x_hat - e_hat - (x - e)}
    for variable, difference in errors.items():
        kdiff.loss_variable = variable
        loss = kdiff.loss(x, None, t, e)
        assert_close(loss, difference.square().mean(), atol=1e-5, rtol=1e-5)

def test_one_clamp_bounds_loss_and_velocity():
    """At t = 1 x-prediction divides by tau in both, while its own x-loss stays the plain squared error."""
    x, e, u = torch.randn(3, 1, 2, 3, 3)
    for target, variable, t, expected in (
            ("x", "v", 1.0, (u - x) / 0.05),
            ("x", "x", 1.0, u - x),
            ("eps", "eps", 0.0, u + e)):
        kdiff = KDiff(lambda z, t, y: u, target, num_classes=10, loss=variable)
        loss = kdiff.loss(x, None, torch.tensor([t]), e)
        assert_close(loss, expected.square().mean())
    velocity = KDiff(None, "x", num_classes=10).velocity(u, x, torch.ones(1))
    assert_close(velocity, (u - x) / 0.05)

def test_order_is_one_permutation_after_the_other():
    """Batches of 8 of 11 images are positions in a chain of permutations, from any start, on any process."""
    def order(seed, start, stop, **process):
        return sum(data.batch_indices(11, 8, seed, start, stop, **process), [])
    chain = order(seed=3, start=0, stop=22)
    for epoch in range(16):
        part = chain[11 * epoch:11 * epoch + 11]
        assert sorted(part) == [(epoch, i) for i in range(11)]
    assert order(3, 5, 9) == chain[40:72]
    assert order(3, 1, 2, rank=0, world=2) + order(3, 1, 2, rank=1, world=2) == chain[8:16]
    assert [i for _, i in chain[:11]] != [i for _, i in chain[11:22]]
    assert order(4, 0, 1) != chain[:8]                                      # another seed

@mark.parametrize("name", "SIGTERM SIGINT SIGHUP".split())
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(call, monkeypatch, name):
    """Three steps, a signal, one step more; against four at once: weights, averages, optimizer, log."""
    number = getattr(signal, name)
    if signal.getsignal(number) == signal.SIG_IGN:                          # under nohup
        signal.signal(number, signal.SIG_DFL)
    write = train.Log.write

    def interrupted(log, lr):
        if log.args.steps == 9 and log.state.step == 2:                     # heard after the next step
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        write(log, lr)
    monkeypatch.setattr(train.Log, "write", interrupted)
    call(TINY, "--steps 4 --keep_every 3 --out whole")
    said = call(TINY, "--steps 9 --out halves", status=128 + number)
    assert f"stopped by signal {int(number)} after step 3; the same" in said
    assert "done" not in said and "resuming" not in said
    early = Path("halves/ckpt.pt").read_bytes()
    for _ in range(2):
        Path("halves/ckpt.pt").write_bytes(early)                           # as if it died before saving
        assert "ckpt.pt at step 3" in call(TINY, "--steps 4 --out halves")
    ours = read_tensors("halves/ckpt.pt")
    theirs = read_tensors("whole/ckpt.pt")
    for part in ("model", "ema", "optimizer"):
        assert_close(ours[part], theirs[part], atol=0, rtol=0)
    assert len(ours["optimizer"]["state"]) > 10
    assert read_log("whole", "loss") == read_log("halves", "loss")
    assert read_log("halves", "step")[0] == [1, 2, 3, 4]
    assert load("whole/ckpt-0000003.pt").step == 3 and load("whole/ckpt.pt").step == 4

def test_two_processes_equal_one_and_skip_and_stop_together(two, call):
    """Steps in micro batches agree. What is not finite on one changes neither. SIGTERM to one stops both."""
    printed = (two / "said.txt").read_text()
    call(TINY, "--steps 3 --out one")
    one = read_tensors("one/ckpt.pt")
    other = read_tensors(two / "two/ckpt.pt")
    assert_close(other["ema"]["0.95"], one["ema"]["0.95"], atol=2e-5, rtol=1e-3)
    assert read_log(two / "two", "loss")[1] == approx(read_log("one", "loss")[1], rel=1e-4)
    assert one["model"]["w"] != 0
    assert printed.count("step 3/3 | ") == 1 and "micro_batch=2 " in printed
    # the step that one process spoiled: (norm, sum of weights, averages and moments) after each step
    rows = sorted(re.findall(r"rank (\d) step (\d) norm (\S+) total (\S+)", printed))
    first = [row[2:] for row in rows[:3]]
    assert first == [row[2:] for row in rows[3:]]
    assert [math.isfinite(float(norm)) for norm, _ in first] == [True, False, True]
    assert first[0][1] == first[1][1] != first[2][1]
    # the signal
    assert printed.count("stopped by signal 15 after step 3; the same command resumes stopped/ckpt.pt") == 1
    assert "exitcode  : 143" in printed
    assert "stopped/ckpt.pt at step 3" in call(TINY, "--steps 4 --out", two / "stopped")
    assert read_log(two / "stopped", "step")[0] == [1, 2, 3, 4]

def test_heun_converges_at_second_order_and_euler_at_first():
    """dz/dt = z cos(5 t) ends at z exp(sin(5) / 5); from t = 0.3 on it is known, too."""
    def error_of(solver, steps, start):
        *_, z = integrate(lambda z, t: z * torch.cos(5 * t), torch.ones(1), steps, solver, start)
        return abs(z.item() - math.exp((math.sin(5) - math.sin(5 * start)) / 5))
    for start in (0.0, 0.3):
        for solver, order in (("euler", 1), ("heun", 2)):
            gain = error_of(solver, 40, start) / error_of(solver, 80, start)
            assert math.log2(gain) == approx(order, abs=0.15)
    states = list(integrate(lambda z, t: 0 * z + 1, torch.zeros(1), 4))
    assert torch.cat(states).tolist() == [0.25, 0.5, 0.75, 1.0]             # one after each step
    with raises(ValueError, match="solver 'midpoint'"):
        next(integrate(None, None, solver="midpoint"))

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

def recorded(text, rel=2e-6, abs=1e-5):
    """Numbers in a text, to compare with those of sketch()."""
    return approx([float(word) for word in text.split()], rel, abs)

def sketch(tensor):
    """The norm of a tensor and three of its numbers."""
    numbers = tensor.double().flatten()
    return [numbers.norm().item(), *numbers[::len(numbers) // 3][:3].tolist()]

def stack(dataset, n):
    """The first n images."""
    return torch.stack([dataset[i][0] for i in range(n)])

def state_of(kdiff, *decays):
    """A train.State in pixels."""
    return train.State(kdiff, Codec(), {"ema": decays}, list("01234567"))

def loop(state, dataset, **change):
    """train.train() with plain settings."""
    plain = dict(steps=5, seed=7, batch_size=6, micro_batch=4, workers=0, lr=3e-3, k_lr=3.0, warmup_epochs=2,
                 clip=0.0, dtype="float32")
    return train.train(state, dataset, SimpleNamespace(**plain | change))

def rows(table):
    """The lines of a text as lists of cells, which " | " separates."""
    return [line.strip().split(" | ") for line in table.strip().splitlines()]

def keywords(text):
    """The words such as dim=64 of a text, as a dict of Python's values."""
    pairs = [word.split("=") for word in text.split() if "=" in word]
    return {name: ast.literal_eval(value) for name, value in pairs}

def refused(message, function, *args, **how):
    """A call must raise a UserError with this message."""
    with raises(UserError, match=message):
        function(*args, **how)

def save_arrays(path, classes=(), **arrays):
    """Tensors as a .safetensors file."""
    kinds = {torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header = {name: (kinds[tensor.dtype], tensor.shape) for name, tensor in arrays.items()}
    with open(path, "wb") as file:
        positions = data.begin_safetensors(file, list(classes), **header)
        for name, tensor in arrays.items():
            data.append(file, positions, name, tensor.view(torch.uint8))    # numpy has no bfloat16

def save_latents(folder, latents, flip=None, labels=torch.arange(5), name="a.safetensors"):
    """A folder of latents (N, C, h, w), by default mirrored by their sign, with their statistics."""
    os.makedirs(folder, exist_ok=True)
    if flip is None:
        flip = -latents
    save_arrays(f"{folder}/{name}", latents=latents, latents_flip=flip, labels=labels)
    ones = torch.ones(latents.shape[1])
    torch.save({"mean": 0 * ones, "std": ones}, f"{folder}/latents_stats.pt")

TINY = "train.py --batch_size 8 --samples 0 --log_every 1 --image_size 16 --model JiT-narrow/8"
data.DATASETS["shapes"] = functools.cache(data.DATASETS["shapes"])          # drawn once, for all tests

def words_of(parts):
    """A command line as words: texts are split at spaces, paths and numbers are one word each."""
    words = []
    for part in parts:
        if isinstance(part, str):
            words += part.split()
        else:
            words.append(str(part))
    return words

def script(*parts):
    """The main() of a script of ours, after this command line was set."""
    sys.argv = words_of(parts)
    return sys.modules[Path(sys.argv[0]).stem].main

@fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A test runs in an empty folder of its own, and signals are handled after it as before it."""
    monkeypatch.chdir(tmp_path)
    before = list(map(signal.getsignal, data.SIGNALS))
    yield
    for number, handler in zip(data.SIGNALS, before):
        signal.signal(number, handler)

@fixture
def call(capsys):
    """Run a script of ours in this process. Returns what it printed, its errors last."""
    def call(*parts, status=0):
        with raises(SystemExit) as exit:
            data.run(script(*parts))
        said = "".join(capsys.readouterr())
        assert exit.value.code == status, said
        return said
    return call

def start(*parts, processes=None, wait_for=None):
    """Start a script, under torchrun for several processes, marked in their environment. Await a word."""
    command = [sys.executable, *words_of(parts)]
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
            if {f"MARK={mark}", *words} <= set(path.read_text(errors="replace").split("\0")):
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
    assert began is None or time.time() - began < 10
    assert not re.search(r"File .*(train|data|sample).py", said), said
    return said

def work_of_two(folder):
    """What each of two processes does for the fixture below, by `torchrun test_all.py FOLDER`."""
    os.chdir(folder)
    script(TINY, "--steps 3 --micro_batch 2 --out two")()
    evaluate_shapes()
    shrink_vavae()
    script("data.py encode photos --tokenizer vavae.pt --image_size 32 --batch_size 3 --out latents")()
    script("sample.py two/ckpt.pt --classes star,ring --samples 5 --steps 2 --out s.npz")()

    def spoiled(net, inputs, output):              # the second step of one process, to be skipped by both
        if data.RANK == 1 and state.step == 1:
            return output * math.inf
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
    script(TINY, "--steps 9 --out stopped")()

@fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes made of their work; what they printed is in said.txt."""
    folder = tmp_path_factory.mktemp("two")
    save_images(folder / "photos", noise(9, 40, 40, 3))
    torch.manual_seed(0)
    weights = VAVAE(*NARROW).state_dict()
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(())}}, folder / "vavae.pt")
    process = start(HERE / "test_all.py", folder, processes=2)
    (folder / "said.txt").write_text(ending(process, 1))
    return folder

def save_images(folder, arrays):
    """Images as 0.png, 1.png, ... in a folder."""
    os.makedirs(folder, exist_ok=True)
    for i, image in enumerate(arrays):
        Image.fromarray(image).save(f"{folder}/{i}.png")

NARROW = None, (32,) * 5               # no weights; channels of the five levels

def shrink_vavae():
    """VA-VAE of a quarter of the width: a fiftieth of its weights, the same shapes of latents."""
    VAVAE.__init__.__defaults__ = NARROW

@fixture
def small_vavae(monkeypatch):
    """The same for one test."""
    monkeypatch.setattr(VAVAE.__init__, "__defaults__", NARROW)

# ---- model.py ----------------------------------------------------------------------------------------------

CONFIGS = {
    "JiT": dict(image_size=32, patch_size=8, dim=64, depth=6, heads=4, num_classes=10, bottleneck=16,
                context_tokens=4, context_start=2),
    "DiT": dict(image_size=8, patch_size=1, in_channels=4, dim=64, depth=4, heads=4, num_classes=10)}

def weight(key, shape):
    """A tensor that is a function of its key: near 1 for scales, near 0 for biases."""
    r = normal(key, *shape)
    if len(shape) < 2:
        return 0.1 * r + key.endswith(("weight", "running_var"))
    return r / math.sqrt(math.prod(shape[1:]))

def fill(net):
    """Give a network such weights. The tables of positions stay, and nothing asks for gradients."""
    for key, value in net.state_dict().items():
        if "pos_embed" not in key and "feat_rope" not in key:
            value.copy_(weight(key, value.shape))
    return net.eval().requires_grad_(False)

def tiny(name="JiT", **change):
    """A small network with weights that are always the same."""
    return fill(getattr(model, name)(**CONFIGS[name] | change))

def inputs(net):
    """x, t, y of a batch for a network. Label 10 is the null class."""
    size = net.side * net.patch_size
    x = normal("x", 3, net.in_channels, size, size)
    return x, torch.tensor([0.05, 0.5, 0.93]), torch.tensor([0, 3, 10])

def output(net):
    """What a network makes of them."""
    return net(*inputs(net))

# The first two are recorded from the official code, the others from plain formulas in float64.
@mark.parametrize("network, numbers", rows("""
    JiT | 103.87872 1.108816 -0.49818305 -1.2780507
    DiT | 27.796995 0.66216985 1.5480807 1.1558447
    JiT context_tokens=0 | 103.45248 1.0240357 -0.53317081 -1.2044665
    JiT patch_size=4 context_start=5 | 99.425725 0.52691607 -0.6148628 -0.91423966
    JiT in_channels=1 context_start=0 | 59.045582 0.63230963 -0.10579589 -0.68772749
    DiT patch_size=2 qk_norm=True | 28.395167 -0.11655954 1.3257091 2.3747103"""))
def test_networks_give_the_recorded_outputs(network, numbers):
    """Of all kinds: without context tokens, with other patches, channels, norms."""
    assert sketch(output(tiny(network[:3], **keywords(network)))) == recorded(numbers)

def test_vavae_gives_the_recorded_outputs():
    """Recorded from a network that agreed with the published one. The log variance is clamped."""
    net = fill(VAVAE(widths=(32, 32, 64, 64, 128)))
    mean, logvar = net.moments(normal("image", 1, 3, 32, 32).clamp(-1, 1))
    decoded = net.decode(normal("latent", 1, 32, 2, 2))
    assert sketch(mean) == recorded("5.2336514 -0.61178332 -0.32352319 -0.51737301")
    assert sketch(logvar) == recorded("4.9750052 -0.23336806 -0.27267228 0.25636692")
    assert sketch(decoded) == recorded("36.855968 -0.09099842 0.45374232 0.30433233")
    for value, bound in ((100, 20), (-100, -30)):
        net.quant_conv.bias.fill_(value)
        mean, logvar = net.moments(normal("image", 1, 3, 48, 64))
        assert (logvar == bound).all() and (mean.abs() > 50).all()
        assert mean.shape == (1, 32, 3, 4)

def checksum(state):
    """A number that keys and shapes of a state dict decide."""
    shapes = sorted((key, *value.shape) for key, value in state.items())
    return zlib.crc32(repr(shapes).encode())

# The side of x; the papers' millions of parameters, billions of multiply-adds; a checksum of the file's keys.
@mark.parametrize("name, numbers", rows("""
    JiT-B/16 | 256 131 25 1938688673
    JiT-B/32 | 512 133 26
    JiT-L/16 | 256 459 88
    JiT-H/16 | 256 953 182
    LightningDiT-XL/1 | 16 675 119 625017063"""))
def test_published_sizes_have_the_published_params_gflops_and_keys(name, numbers):
    """As in the papers' tables and in the files; so has VA-VAE."""
    size, params, gflops, *keys = map(int, numbers.split())
    with torch.device("meta"):
        net = model.build(name, size, 1000)
        vavae = VAVAE()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == params
    assert round(model.gmacs(net, (net.in_channels, size, size))) == gflops
    assert keys in ([], [checksum(net.state_dict())])
    assert checksum(vavae.state_dict()) == 1982465131

def test_dropout_acts_in_the_middle_half_and_in_training_only():
    """Each block twice on one input. In the MLP dropout comes before w3, in attention after proj."""
    net = tiny(depth=10, dropout=0.5)
    assert torch.equal(output(net), output(tiny(depth=10)))
    net.train()
    x, turn = normal("tokens", 2, 16, 64), (net.cos[-16:], net.sin[-16:])
    args = x, normal("condition", 2, 64), *turn
    for i, block in enumerate(net.blocks):
        assert torch.equal(block(*args), block(*args)) == (i not in range(2, 6))
    block = net.blocks[2]
    assert 0.4 < (block.attn(x, *turn) == 0).float().mean() < 0.6
    assert (block.mlp(x) == 0).float().mean() < 0.1

@mark.parametrize("name", CONFIGS)
def test_networks_start_at_zero_with_the_stated_spread(name):
    """adaLN-zero: the output is 0 and blocks are the identity. Xavier elsewhere, 0.02 in the embeddings."""
    torch.manual_seed(0)
    net = getattr(model, name)(**CONFIGS[name])
    assert not output(net).any()
    x = normal("tokens", 1, 4, 64)
    assert torch.equal(net.blocks[0](x, normal("c", 1, 64), net.cos[:4], net.sin[:4]), x)
    for key, p in net.named_parameters():
        assert not key.endswith("bias") or not p.any()
        if re.search("t_embedder.*weight|embedding_table|in_context", key):
            assert p.std().item() == approx(0.02, rel=0.1)
    for part in (net.blocks[0].attn.qkv, *net.x_embedder):
        w = part.weight.flatten(1)
        assert w.abs().max().item() == approx(math.sqrt(6 / sum(w.shape)), rel=0.05)

@mark.filterwarnings("error")
@mark.parametrize("name", CONFIGS)
def test_bf16_autocast_keeps_norms_time_and_stream_in_float32(name):
    """Close to float32. Norms lose no digit, the embedding of time is the same, the stream is float32."""
    net, outs = tiny(name), []
    for part in (net.t_embedder, *net.blocks):
        part.register_forward_hook(lambda *called: outs.append(called[-1]))
    exact = output(net)
    norm = net.blocks[0].norm1
    tokens, shift, scale = normal("x", 3, 5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert 1e-4 < error(output(net), exact) < 2e-2
        normed = norm(tokens, shift, scale)
    assert torch.equal(outs[0], outs[len(outs) // 2])                       # time, without and with autocast
    assert {out.dtype for out in outs} == {torch.float32}
    plain = F.rms_norm(tokens.double(), (64,), norm.weight.double(), 1e-6)
    assert error(normed, plain * (1 + scale.double()) + shift) < 1e-6
    assert error(norm(tokens), plain) < 1e-6

@mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_and_checkpointed_networks_agree_with_eager():
    """Output and gradients, which are stored like their parameters; the keys of the state dict stay."""
    eager, compiled, checkpointed = (tiny(depth=1, context_start=0).requires_grad_() for _ in range(3))
    compiled.compile(dynamic=False)
    checkpointed.checkpointing = True
    expected = output(eager)
    for net in (eager, compiled, checkpointed):
        out = output(net)
        out.square().mean().backward()
        assert error(out, expected) < 2e-6
        for (key, ours), (same, theirs) in zip(net.named_parameters(), eager.named_parameters()):
            assert key == same and error(ours.grad, theirs.grad) < 2e-5
            assert ours.grad.stride() == ours.stride()
    assert all(part._compiled_call_impl for part in (*compiled.blocks, compiled.final_layer))

def test_without_a_compiler_networks_stay_eager(monkeypatch, capsys):
    """A line says so, and the network works."""
    def broken(*args, **how):
        raise RuntimeError("no compiler\nfound")
    monkeypatch.setattr(torch, "compile", broken)
    net = nn.Linear(4, 4)
    sample.compile_network(net)
    said = capsys.readouterr().out
    assert "not compiled" in said and said.count("\n") == 1
    assert net(torch.ones(1, 4)).shape == (1, 4)

def test_names_carry_the_patch_and_keywords_win():
    """Any number after the slash is a patch, keywords override the table, errors name what is wrong."""
    with torch.device("meta"):
        assert model.build("JiT-S/4", 64, 10).pos_embed.shape == (1, 256, 384)
        net = model.build("LightningDiT-B/4", 16, 10, in_channels=4, patch_size=2, qk_norm=True, depth=1)
    assert net.x_embedder.proj.weight.shape == (768, 4, 2, 2)
    assert hasattr(net.blocks[0].attn.q_norm, "weight")

@mark.parametrize("name, size, message", rows("""
    JiT-B/16 | 250 | ^image_size 250 is no.? .*multiple of patch_size 16: try 256$
    JiT-B/16 | 16, 32 | image_size .16, 32.: this network takes square images
    JiT-demo/8 | 32 | ^context_start 4 is after the last block: try 3$
    JiT-X/16 | 256 | JiT-X/16.*JiT-B/16.*LightningDiT-XL/1
    JiT-B/0 | 256 | model JiT-B/0"""))
def test_sizes_that_do_not_fit_are_named(name, size, message):
    """With what to try instead."""
    with raises(ValueError, match=message):
        model.build(name, ast.literal_eval(size), 10, context_start=4)

# ---- objective.py ------------------------------------------------------------------------------------------

def test_draws_follow_table_4():
    """logit(t) is normal, noise has its scale, a tenth of labels drop; drawn at once or from seeds."""
    torch.manual_seed(0)
    kdiff = KDiff(None, num_classes=10, noise_scale=2.0)
    x = torch.zeros(4000, 2, 1, 1)
    y = torch.arange(4000) % 10
    for seeds in (None, range(4000)):
        t, e, labels = kdiff.draw(x, y, seeds)
        dropped = labels == 10
        assert (dropped | (labels == y)).all()
        numbers = torch.stack([torch.logit(t), *e.flatten(1).T, dropped])
        assert numbers.mean(1).tolist() == recorded("-0.8 0 0 0.1", abs=0.07)
        assert numbers.std(1).tolist() == recorded("0.8 2 2 0.3", abs=0.07)
        assert torch.corrcoef(numbers).tril(-1).abs().max() < 0.06          # independent of each other
    dropped = kdiff.draw(x, y[:, None].expand(-1, 40), range(4000))[2] == 10
    assert torch.equal(dropped.all(1), dropped.any(1)) and dropped.any()    # a caption is dropped whole

@mark.parametrize("how, named", rows("""
    loss='w' | loss 'w'
    target='channel' | channels
    target='two' loss='u' | two
    target='2' | target '2'
    target=-0.1 | target -0.1
    target='nan' | target 'nan'"""))
def test_unknown_target_or_loss_is_named(how, named):
    """A target is a row of the table or a number in [0, 1]; a loss one of four; two k shrink under loss u."""
    with raises(ValueError, match=named):
        KDiff(None, num_classes=10, **keywords(how))

def test_eq_12_equals_monte_carlo():
    """The loss of the linear layer with the best weights for random data, noise and times."""
    torch.manual_seed(0)
    n = 400_000
    x = F.pad(torch.randn(n, 3), (0, 5))                                    # 3 of 8 axes contain data
    e = torch.randn(n, 8)
    t = torch.sigmoid(0.8 * torch.randn(n, 1) - 0.8)
    scale = 1 / (2 * t * (1 - t)).clamp(min=0.4)                            # for c = t, d = t - 1
    z = scale * (t * x + (1 - t) * e)
    u = scale * (t * x - (1 - t) * e)
    W = (z * u).sum(0) / (z * z).sum(0)
    expected = optimal_loss(lambda t: t, lambda t: t - 1, 3, 8, "v", logit_normal(-0.8, 0.8), tau=0.4)
    assert (W * z - u).square().sum(1).mean().item() == approx(expected, rel=0.02)

def test_objective_py_prints_theory_next_to_measurement(monkeypatch, capsys):
    """In few steps: k and loss for each d of D = 64, modes of W, k of a spectrum, of blind networks."""
    for function, fewer in ((optimal_loss, 2000), (objective.descend, 150)):    # points; steps
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], fewer))
    objective.main()
    said = capsys.readouterr().out

    def rows(line):
        return [np.array(found.split(), float) for found in re.findall(line, said, re.M)]
    D, d, learned, theorem, loss, eq_12 = np.transpose(rows("^ +(64 .*) ="))
    k = 64 / (64 + d)
    expected = d * (k ** 2 + (1 - k) ** 2 - 1.5 * (k - 0.5) ** 2) + (64 - d) * (1 - k) ** 2 / 4
    assert [*d] == [64, 32, 16, 8, 1]
    assert [*theorem, *eq_12] == approx([*k, *expected], abs=1e-3)
    assert [*learned, *loss] == approx([*k, *expected], abs=0.03)
    # both modes grow towards Eq. (11), here 0.45 and -0.3, at the rates <a^2 + b^2> = 2/3 and <b^2> = 1/3
    measured, theory = np.array(re.findall(r"(\S+), theory (-?\d\.\d+)", said), float).T
    assert theory[:6:2] == approx(0.45 * (1 - np.exp([-1 / 3, -4 / 3, -16 / 3])), abs=1e-3)
    assert len(theory) == 9                                                 # and of three louder noises
    assert measured == approx(theory, abs=4e-3)
    # one k for each direction; then of blind networks
    learned, theory, blind, formula = rows("^ +(?:learned|theory|descent) +(.*)")
    assert theory == approx([0.2, 0.2, 0.5, 0.769, 0.909, 0.990, 1, 1], abs=1e-3)
    assert learned == approx(theory, abs=0.05)
    assert blind == approx(formula, abs=2e-4)

def test_both_ways_to_the_innovation_agree_on_stationary_data(monkeypatch):
    """And with the closed form 1 / <1 / (S_f + n)> - n. Shapes are not stationary: there they differ."""
    f = torch.fft.fftfreq(6)
    power = 1 / (0.05 + f[:, None] ** 2 + f ** 2)                           # of noise, coloured on a torus
    white = torch.fft.fft2(normal("white", 20_000, 1, 6, 6))
    x = torch.fft.ifft2(white * power.sqrt()).real + 3                       # the mean does not count
    shapes = Codec().encode(stack(Shapes(2000, 8), 2000))
    noises = torch.tensor([0.1, 1.0, 10.0]).double()
    expected = [1 / (1 / (power + n)).mean().item() - n.item() for n in noises]
    found = []
    for limit in (4096, 0):
        monkeypatch.setattr(objective, "EXACT", limit)
        assert innovation(x, noises).flatten().tolist() == approx(expected, rel=0.02)
        found.append(k_of_innovation(shapes, -0.8, 0.8, together=True).item())
    assert found[0] - found[1] > 0.01

def test_k_of_innovation_has_the_least_loss_of_all_k():
    """The loss of a blind network, with its innovation, on a grid of k; louder noise, several channels."""
    x = (normal("x", 400, 6) @ normal("mix", 6, 6)).view(-1, 3, 2, 1)
    t = torch.sigmoid(0.8 * torch.special.ndtri((torch.arange(100).double() + 0.5) / 100) - 0.8)
    r = innovation(x, (2 * (1 - t) / t) ** 2)                               # (times, channels)
    r = torch.cat([r, r.mean(1, keepdim=True)], 1)                          # and of all together
    t = t[:, None]
    k = torch.linspace(0, 1, 4001)[1:-1, None, None].double()
    loss = ((r * k ** 2 + 4 * (1 - k) ** 2) / (k * (1 - t) + (1 - k) * t) ** 2).mean(1)
    ours = [k_of_innovation(x, -0.8, 0.8, 2.0, together, 100) for together in (False, True)]
    assert torch.cat(ours).tolist() == approx(k[loss.argmin(0)].flatten().tolist(), abs=5e-4)

# ---- data.py -----------------------------------------------------------------------------------------------

@mark.parametrize("size", [32, 96])
def test_shapes_have_the_areas_and_places_of_their_factors(size):
    """Anti-aliased: areas by closed forms to 2%, whole pixels would miss by more."""
    # of radius 1, for instance of the disc pi 0.9^2, of the square 1.6^2
    areas = [2.545, 2.560, 1.405, 2.073, 1.926, 1.617, 1.728, 1.272]
    assert len(open_dataset("shapes", size)) == 6400
    shapes = Shapes(80, size)
    pixels = np.arange(size) + 0.5
    for (image, label), factors in zip(shapes, shapes.factors):
        bright = image.numpy().max(0) / 255 - 0.06                          # above the ground
        covered = bright.clip(0) / 0.94
        area = covered.sum()
        assert area == approx(areas[label] * ((0.27 + 0.07 * factors[2]) * size) ** 2, rel=0.02)
        if label != 7:                                                      # the moon is not symmetric
            centre = np.stack([covered.sum(0), covered.sum(1)]) @ pixels / area
            assert centre == approx((0.5 + 0.22 * (factors[:2] - 0.5)) * size, abs=0.1)

def test_shapes_are_always_the_same():
    """To the last bit, on every machine; other seeds, other shapes."""
    assert zlib.crc32(stack(Shapes(16, 32), 16).numpy()) == 295099810
    assert np.array_equal(Shapes(9, 9).factors, Shapes(80, 32).factors[:9])
    assert not np.array_equal(Shapes(9, 9, 1).factors, Shapes(9, 9).factors)

@fixture
def photos(tmp_path):
    """A folder of images of many kinds: modes, sizes, formats, EXIF, names."""
    root = tmp_path / "Fotos für Büro"
    for folder in ("chats été", "dogs/deep er", ".hidden"):
        os.makedirs(root / folder)
    pixels = noise(50, 70, 3)
    image = Image.fromarray(pixels)
    for name, mode in {"beside.png": "RGB", ".hidden/no.png": "RGB", "chats été/a b.jpg": "RGB",
                       "chats été/cmyk.JPEG": "CMYK", "chats été/p.png": "P",
                       "dogs/deep er/ß.webp": "RGBA"}.items():
        image.convert(mode).save(root / name)
    image.convert("L").resize((40, 90)).save(root / "dogs/grey.bmp")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(root / "dogs/sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # to be turned a quarter
    image.save(root / "dogs/turned.png", exif=exif)
    (root / "readme.txt").write_text("no image")
    return root

def test_folders_of_odd_images_are_read(photos, capsys):
    """Every mode becomes RGB, EXIF turns, 16 bits become 8, subfolders are classes, names keep letters."""
    dataset = ImageFolder(photos, 32)
    assert "1 files are left out" in capsys.readouterr().out
    assert dataset.classes == ["Fotos für Büro", "chats été", "dogs"]
    assert [label for _, label in dataset] == [0] + 3 * [1] + 4 * [2]
    assert stack(dataset, 8).shape == (8, 3, 32, 32)
    assert ImageFolder(photos / "chats été", 32).classes == ["chats été"]
    pixels = noise(50, 70, 3)
    assert np.array_equal(read_image(photos / "dogs/turned.png"), np.rot90(pixels, -1))
    assert np.array_equal(read_image(photos / "dogs/sixteen.png").getchannel(0), pixels[..., 0])
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save("a.png")                # a fifth of red on white
    assert read_image("a.png").getpixel((1, 1)) == (255, 204, 204)
    Image.new("P", (4, 4), 0).save("a.png", transparency=0)
    assert read_image("a.png").getpixel((1, 1)) == (255, 255, 255)

def test_numbered_class_folders_are_in_order():
    """Folder 10 comes after folder 9, so that a label is its number."""
    names = [f"{number}" for number in range(12)]
    for name in names:
        save_images(name, noise(1, 8, 8, 3))
    assert ImageFolder(".", 8).classes == names

def test_crop_is_adms():
    """For an image that halves exactly: the mean of 2x2 blocks, then Pillow's bicubic, then the centre."""
    pixels = noise(160, 208, 3)
    blocks = pixels.reshape(80, 2, 104, 2, 3).mean((1, 3))
    half = Image.fromarray((blocks + 0.5).astype(np.uint8))
    expected = half.resize((83, 64), Image.BICUBIC).crop((9, 0, 73, 64))
    assert levels(data.crop(Image.fromarray(pixels), 64), expected) <= 2
    assert data.crop(half, 80) == half.crop((12, 0, 92, 80))                # halving stops at its size
    upright = half.transpose(Image.TRANSPOSE)
    assert data.crop(upright, 80) == upright.crop((0, 12, 80, 92))
    assert data.crop(half.crop((0, 0, 30, 20)), 64).size == (64, 64)

def test_flips_follow_seed_epoch_and_index(photos):
    """A key (epoch, i) is mirrored or not, half of the time, and always the same."""
    dataset = ImageFolder(photos, 32)
    mirrored = dataset[3][0].flip(-1)

    def flips(seed):
        dataset.seed = seed
        return [torch.equal(dataset[epoch, 3][0], mirrored) for epoch in range(64)]
    assert 16 < sum(flips(0)) < 48 and flips(0) == flips(0) != flips(1)
    dataset.flips = False
    assert not any(flips(0))

def test_packed_file_gives_the_folders_images(photos, call, capsys):
    """Same pixels, labels, names, mirror images. Loading processes are sent a place, not the bytes."""
    assert "8 images of 24 px" in call("data.py pack", photos, "--image_size 24 --out packed")
    sent = pickle.dumps(open_dataset("packed", 24))
    assert len(sent) < 8 * 24 * 24
    packed, folder = pickle.loads(sent), ImageFolder(photos, 24)
    assert packed.classes == folder.classes and len(packed) == 8
    for i in range(8):
        assert_close(packed[i], folder[i])                                  # whole numbers: equal
        assert_close(packed.mirrored(i), folder.mirrored(i))
    refused("24", open_dataset, "packed", 32)
    capsys.readouterr()
    assert [*data.in_batches(range(5), 2)] == [range(2), range(2, 4), range(4, 5)]
    assert "images 5/5 | " in capsys.readouterr().err

def test_class_names_fit_the_labels():
    """A list of texts, at least as many as labels; without one, classes are numbered."""
    labels = np.array([0, 2])
    for names, known in (('["a"]', "labels 0 to 2, but 1"), ('"abc"', "class names"), ("[1]", "class names")):
        with raises(UserError, match=known):
            data.class_names({"classes": names}, labels, "file")
    assert data.class_names({}, labels, "file") == ["0", "1", "2"]

def test_stored_files_follow_the_safetensors_specification():
    """Eight bytes of length, a JSON header, the arrays: written by hand, then by us, who align to 8."""
    header = b'{"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}, "__metadata__": {"b": "c"}}'
    path = Path("a.safetensors")
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.array([5, 6], "<i8").tobytes())
    arrays, metadata = data.open_safetensors(path)
    assert arrays["a"].tolist() == [5, 6] and metadata == {"b": "c"}
    save_arrays(path, ["x"], a=torch.tensor([5, 6]))
    assert data.open_safetensors(path)[0]["a"].tolist() == [5, 6]
    assert path.stat().st_size % 8 == 0

def test_published_latents_are_read_and_what_does_not_fit_is_named():
    """Two shards; cut short, parts that do not fit together or the other shard, no statistics: one line."""
    latents = normal("latents", 5, 4, 32, 32).half()
    save_latents(".", latents)
    save_latents(".", latents, name="b.safetensors")
    sent = pickle.dumps(open_dataset(".", None))                            # as loading processes get it
    read = pickle.loads(sent)
    assert len(read) == 10 and read.shape == (4, 32, 32) and len(sent) < 10_000
    assert [read[i][1] for i in (5, 7)] == [0, 2] and read.classes == list("01234")
    assert torch.equal(read[7][0], latents[2].float())
    assert torch.equal(read.mirrored(8)[0], -latents[3].float())
    def unread(said):
        refused(said, open_dataset, ".", None)
    second = Path("b.safetensors")
    content = second.read_bytes()
    for damaged, said in ((content[:-3], "not a readable safetensors file"),
                          (content.replace(b"32, 32]", b"32, 31]", 1), ".*bytes of latents do not fit")):
        second.write_bytes(damaged)
        unread(f"{second}: {said}")
    few = latents[:, :3]
    for unfit in ((few,), (latents, few), (latents, -latents, torch.arange(4))):
        save_latents(".", *unfit, name=second)
        unread(f"{second}.*a shard that fits the others")
    second.unlink()
    four, statistics = torch.ones(4), Path("latents_stats.pt")
    for mean, std, said in (four, 0 * four, "std above 0"), (four[:3], four, "a mean and a std"):
        torch.save({"mean": mean, "std": std}, statistics)
        unread(said)
    statistics.unlink()
    unread("latents_stats.pt: no such file")

def test_codec_scales_once_and_back():
    """Pixels: [-1, 1] and rounding; latents: (z - mean) / std and its inverse; grey becomes RGB; no NaN."""
    images = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(2, 3, 16, 16)
    x = Codec().encode(images)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(Codec().decode(x), images)
    assert Codec().decode(torch.tensor([[[[-3.0, 3.0, 0.0]]]]))[0, 2].tolist() == [[0, 255, 128]]
    mean, std = normal("statistics", 2, 1, 48, 1, 1).exp()
    pca = PatchPCA.fit(torch.randn(9, 3, 16, 16), 4, 48)
    codec = Codec(pca, mean, std)
    assert_close(codec.encode(images), (pca.encode(x) - mean) / std)
    assert levels(codec.decode(codec.encode(images)), images) <= 1
    refused("not finite", Codec().decode, x * math.nan)

# ---- sample.py ---------------------------------------------------------------------------------------------

@mark.parametrize("interval, scale, steps", [
    ((0.1, 1.0), 3, range(6, 50)),
    ((0.0, 0.5), 3, range(25)),
    ((0.5, 1.0), 3, range(26, 50)),
    ((0.0, 1.0), 1, [])])
def test_guidance_acts_strictly_inside_its_interval(interval, scale, steps):
    """Of 50 steps t = 0.1 is outside of [0.1, 1], t = 0 inside of [0, 0.5]; else, or at scale 1, one pass."""
    calls = []

    def echo(z, t, y):
        calls.append((len(z), t[0]))
        return y.view(-1, 1, 1, 1).expand_as(z)
    velocity = guided(KDiff(echo, "v", num_classes=4), torch.tensor([1]), scale, interval)
    for i, t in enumerate(torch.linspace(0, 1, 51)):
        passes, v = 1, 1
        if i in steps:
            passes, v = 2, 4 + scale * (1 - 4)
        assert velocity(torch.zeros(1, 1, 1, 1), t) == v
        assert calls[i] == (passes, t)

def levels(a, b):
    """The largest difference of two pictures or arrays of uint8."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()

def test_samples_follow_their_index_alone():
    """Batch size and the images in it change no pixel by more than one level; the seed changes them."""
    config = {"shape": (3, 32, 32), "cfg": 2.0, "interval": [0.1, 1.0]}
    kdiff = KDiff(tiny(), "v", num_classes=10)
    checkpoint = sample.Checkpoint(kdiff, Codec(), config, list("0123456789"), 7, "none")
    labels = [0, 1, 2, 3, 0]

    def drawn(labels, **how):
        return checkpoint.sample(labels, steps=4, **how)
    together = drawn(labels)
    assert levels(together, drawn(labels, batch_size=2)) <= 1
    assert levels(together, drawn(labels, seed=1)) > 8
    assert levels(together[0], together[4]) > 8
    batches, places = zip(*checkpoint.batches(labels, 3, steps=4))          # all of one size, with a surplus
    assert places == (range(3), range(3, 6))
    assert levels(torch.cat(batches)[:5], together) <= 1
    assert torch.equal(drawn(["3", "1"], n=2), drawn([3, 3, 1, 1]))         # names, or numbers
    assert torch.equal(drawn("4"), drawn([4]))

def test_jit_loss_and_sampler_give_the_published_numbers():
    """Recorded from the official JiT: its loss, and six guided steps of both solvers (one pixel, norm)."""
    kdiff = KDiff(tiny(), "x", num_classes=10)
    x, t, y = inputs(kdiff.net)
    loss = kdiff.loss(0.5 * x, y, t, normal("e", 3, 3, 32, 32))
    assert loss.item() == approx(102.92652, rel=1e-6)
    velocity = guided(kdiff, torch.tensor([0, 3, 1]), 2.9, (0.1, 1.0))
    for solver, numbers in (("heun", "125.321983 -0.416544 -1.016429 0.516974"),
                            ("euler", "122.744453 -0.015014 -1.051720 -0.029472")):
        *_, z = integrate(velocity, normal("z0", 3, 3, 32, 32), 6, solver)
        found = [z.norm().item(), *z[:, 1, 5, 7].tolist()]
        assert found == recorded(numbers, rel=1e-5, abs=2e-5)

def test_published_jit_files_load(monkeypatch):
    """With all that JiT's script saves (a pickled Namespace, an optimizer); ema1, or the average chosen."""
    net = model.build("JiT-demo/8", 32, 10)
    path = "checkpoint-last.pth"
    file = {"epoch": 5, "optimizer": {}, "args": argparse.Namespace(lr=1)}
    for factor, name in enumerate("model model_ema2 model_ema1".split()):
        file[name] = {f"module.net.{key}": factor * value for key, value in net.state_dict().items()}
    torch.save(file, path)
    for ema, factor in ((None, 2), ("0.9996", 1), ("none", 0)):
        ours = load(path, ema).kdiff.net.t_embedder.mlp[0].weight
        assert torch.equal(ours, net.t_embedder.mlp[0].weight * factor)
    ours = load(path)
    assert (ours.step, ours.ema, ours.classes) == (0, "0.9999", list("0123456789"))
    assert has(ours.config, "model=JiT-demo/8 shape=[3,32,32] cfg=2.9 interval=[0.1,1.0] target=x tau=0.05")
    refused("--ema 0.5: .*0.9996, 0.9999", load, path, "0.5")
    monkeypatch.setitem(model.SIZES, "JiT-twin", model.SIZES["JiT-demo"])
    refused("depth 4 and width 96: 2 rows of SIZES fit", load, path)

@mark.parametrize("qk_norm", [False, True])
def test_published_dit_files_load_with_their_statistics(qk_norm):
    """Flat weights under "ema"; wrapped otherwise, as bfloat16, without tables; other files are named."""
    net = fill(model.build("LightningDiT-demo/1", 16, 10, qk_norm=qk_norm))
    state = net.state_dict()
    bare = {key: value for key, value in state.items() if key not in model.TABLES}
    wrapped = {f"_orig_mod.model.{key}": value for key, value in bare.items()}
    torch.save({"mean": torch.arange(32.0), "std": torch.ones(32)}, "stats.pt")
    for content in ({"ema": state}, {"ema_model": bare, "opt": {}}, bare, {"state_dict": wrapped}):
        torch.save(content, "dit.pt")
        ours = load("dit.pt", stats="stats.pt")
        assert torch.equal(output(ours.kdiff.net), output(net))
    assert has(ours.config, "model=LightningDiT-demo/1 shape=[32,16,16] cfg=1.5 target=v tau=0.0 "
                            "noise_scale=1.0")
    assert ours.codec.mean.flatten().tolist() == [*range(32)]
    refused("--stats", load, "dit.pt")
    for mean, std, said in (0, 0, "std above 0"), (math.nan, 1, "finite"):
        torch.save({"mean": torch.full((32,), mean), "std": torch.full((32,), std)}, "bad.pt")
        refused(said, load, "dit.pt", stats="bad.pt")
    save_arrays("dit.safetensors", **{key: value.bfloat16() for key, value in bare.items()})
    rough = load("dit.safetensors", stats="stats.pt").kdiff.net
    assert error(output(rough), output(net)) < 0.05
    bias = state["blocks.0.attn.proj.bias"]
    for named, strange in {"proj.weight": state | {"blocks.0.attn.proj.weight": bias},
                           "alien.pt: it is a file with conv.weight": {"conv.weight": bias},
                           "a DiT or SiT, neither": state | {"blocks.0.mlp.fc1.weight": bias},
                           "alien.pt": {"t_embedder.mlp.0.weight": bias}}.items():
        torch.save(strange, "alien.pt")
        refused(named, load, "alien.pt", stats="stats.pt")

def test_curves_are_drawn_where_their_numbers_are():
    """Two panels, each in its own scale: a line from corner to corner; from -50 to 50, without the NaN."""
    panels = {"k": ([0, 5, 10], [0, 0.5, 1])}, {"a": ([0, 1, 2, 3], [-50, 50, math.nan, 0])}
    sample.draw_curves(panels, "c.png")
    picture = np.asarray(Image.open("c.png"))
    blue = (picture == (31, 119, 180)).all(-1)                              # the first of COLOURS
    blue[:30] = False                                                       # the title
    # 294 pixels: of 0 to 1; of -60 to 60, where the last point is 0
    for left, top, bottom, last in ((0, 40, 334, 40), (560, 64, 310, 187)):
        y, x = np.nonzero(blue[:, left:left + 560])
        found = [x.min(), x.max(), y.min(), y.max()]
        assert found == approx([64, 540, top, bottom], abs=2)
        assert y[x == x.max()].mean() == approx(last, abs=2)

def test_grid_shows_each_image_in_its_row():
    """Images of 8 px in rows of three, enlarged without blur; each name begins a row."""
    images = torch.from_numpy(noise(12, 3, 8, 8))
    sheet = np.asarray(sample.grid(images, ["a", "long name"], 3))
    margin = sheet.shape[1] - 3 * 100 - 4
    assert len(sheet) == 404 and 16 < margin < 200
    dark, _, _ = np.nonzero(sheet[:, :margin - 8] < 100)                    # the names, at their first rows
    assert [dark.min(), dark.max()] == approx([52, 252], abs=12)
    for i, image in enumerate(images):
        top, left = 4 + 100 * (i // 3), margin + 100 * (i % 3)
        cell = sheet[top:top + 96:12, left:left + 96:12]
        assert np.array_equal(cell, image.permute(1, 2, 0))
    assert sample.grid(images[:10], "ab", 3).height == 404                  # five each: rows of three and two
    assert sample.grid(images.repeat(1, 1, 25, 25), "ab", 6).height == 2 * 204 + 4
    assert sample.grid(images[:, :, :4], "a", 12).height == 100 + 4         # 4 x 8 pixels, 24 times

def test_classes_are_chosen_by_names_or_by_numbers():
    """All words are names, else all are numbers; a name may contain a comma; what is neither is an error."""
    for text, names, expected in rows("""
            b,c | a b c | [1, 2]
            0,2 | a b c | [0, 2]
            7,1 | 1 7 | [1, 0]
            0,1,2 | 1 10 2 | [0, 1, 2]
            a,b | c a,b | [1]
            "a,b",c | c a,b | [1, 0]"""):
        assert repr(sample.choose_classes(text, names.split())) == expected
    for word in ("3", "d", "-1", "a,1"):
        refused("not a label.* 2 .a, b, c.$", sample.choose_classes, word, list("abc"))

# ---- train.py ----------------------------------------------------------------------------------------------

@mark.parametrize("clip, dtype, rel", [
    (0.0, "float32", 1e-4), (0.1, "float32", 1e-4), (0.0, "bfloat16", 2e-2)])
def test_a_step_of_any_network_is_algorithm_1_written_by_hand(clip, dtype, rel):
    """One batch, torch's Adam, clipping and averages in float64; the loop adds up micro batches."""
    torch.manual_seed(0)
    kdiff, dataset, dtypes = KDiff(UNet(3, 8, 8), num_classes=8), Shapes(12, 8), set()
    by_hand = copy.deepcopy(kdiff).double()
    averages = {decay: copy.deepcopy(by_hand).requires_grad_(False) for decay in (0.9, 0.5)}
    adam = torch.optim.Adam([{"params": by_hand.net.parameters()}, {"params": by_hand.w}], betas=(0.9, 0.95))
    kdiff.net.register_forward_hook(lambda *called: dtypes.add(called[-1].dtype))
    state = state_of(kdiff, *averages)
    steps = loop(state, dataset, clip=clip, dtype=dtype)
    for step, items in enumerate(data.batch_indices(12, 6, 7, 0, 5)):
        images, labels = data.read_items(dataset, [i for _, i in items])
        x = images.float() / 127.5 - 1
        t, e, y = by_hand.draw(x, labels, [data.seed_of(7, step, n) for n in range(6)])
        loss = by_hand.loss(x.double(), y, t.double(), e.double())
        adam.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(by_hand.parameters(), clip or math.inf).item()
        lr = 3e-3 * min(1, (step + 1) / 4)                                  # two epochs of two steps
        adam.param_groups[0]["lr"] = lr
        adam.param_groups[1]["lr"] = 3 * lr                                 # --k_lr 3
        adam.step()
        for decay, average in averages.items():
            for mean, p in zip(average.parameters(), by_hand.parameters()):
                mean.lerp_(p, 1 - decay)
        assert next(steps) == approx((loss.item(), norm, lr), rel=rel)
    assert next(steps, None) is None and state.step == 5
    for ours, expected in zip((kdiff, *state.averages.values()), (by_hand, *averages.values())):
        for p, q in zip(ours.parameters(), expected.parameters()):
            assert error(p, q) < rel
    assert dtypes == {getattr(torch, dtype)} and not state.averages["0.9"].training

def test_optimizer_takes_every_parameter_but_frozen_ones():
    """Another parameter of KDiff has the rate of w; one that no gradient reaches, or a frozen one, stays."""
    kdiff = KDiff(UNet(3, 8, 8), num_classes=8)
    kdiff.gain = nn.Parameter(torch.ones(()))
    kdiff.net.unused = nn.Parameter(torch.ones(2))
    kdiff.net.down.requires_grad_(False)
    kdiff.rule = lambda w, t: objective.blend(torch.sigmoid(w + kdiff.gain))
    before = copy.deepcopy(kdiff.state_dict())
    list(loop(state_of(kdiff, 0.9), Shapes(12, 8), steps=1, warmup_epochs=0, k_lr=10.0))
    moved = {name: (p - before[name]).abs().max().item() for name, p in kdiff.named_parameters()}
    assert [name for name in moved if not moved[name]] == ["net.unused", "net.down.weight", "net.down.bias"]
    assert [moved["gain"], moved["net.up.bias"]] == approx([0.03, 0.003], rel=0.01)

def has(settings, expected):
    """Whether a dict has these settings, in a text such as "lr=0.0002 ema=[0.5]"."""
    texts = {f"{name}={value}".replace(" ", "") for name, value in settings.items()}
    return set(expected.split()) <= texts

PAPER = ("batch_size=1024 lr=0.0002 k_lr=1.0 ema=[0.9999,0.9998,0.9996] label_drop=0.1 target=k loss=v "
         "k_start=0.5 interval=[0.1,1.0] clip=0.0 flip=True steps=None samples=None preset=paper "
         "image_size=256 noise_scale=1.0")
# Flags, and settings that they lead to.
PRESETS = f"""
    train.py --data photos --space latent | {PAPER}
    train.py --data photos --space latent | model=LightningDiT-XL/1 epochs=800.0 warmup_epochs=0.0 tau=0.0
    train.py --data photos --space latent | t_mean=0.0 t_std=1.0 cfg=1.5
    train.py --data photos --space pixel | {PAPER}
    train.py --data photos --space pixel | model=JiT-B/16 epochs=600.0 warmup_epochs=5.0 tau=0.05
    train.py --data photos --space pixel | t_mean=-0.8 t_std=0.8 cfg=2.9
    train.py --data photos --image_size 512 | model=JiT-B/32 image_size=512 noise_scale=2.0 preset=paper
    train.py --data photos --image_size 128 --model JiT-S/8 --lr 0 | model=JiT-S/8 noise_scale=0.5 lr=0.0
    train.py --data photos --warmup_epochs 3 --t_mean -1.5 | warmup_epochs=3.0 t_mean=-1.5
    train.py --data photos --ema 0.5 | ema=[0.5]
    train.py --data photos --space latent --target eps | target=eps tau=0.05
    train.py --data photos --space latent --target x | target=x tau=0.05
    train.py --data photos --space latent --target 0 | target=0 tau=0.05
    train.py --data photos --space latent --target 1.0 | target=1.0 tau=0.05
    train.py --data photos --space latent --target v | target=v tau=0.0
    train.py --data photos --space latent --target 0.3 | target=0.3 tau=0.0
    train.py | model=JiT-demo/8 image_size=32 tau=0.05 preset=demo lr=0.004 k_lr=10.0
    train.py --data fashion --lr 1e-3 | model=JiT-demo/8 preset=fashion lr=0.001 epochs=4.267
    train.py --space latent --target 0.5 | model=LightningDiT-demo/1 tokenizer=pca k_lr=1.0
    train.py --data photos --image_size 96 | model=JiT-S/12 preset=small k_lr=10.0
    train.py --data photos --image_size 32 | model=JiT-demo/4 preset=laptop steps=3000
"""

@mark.parametrize("command, settings", rows(PRESETS))
def test_presets_are_table_4(command, settings):
    """The paper's numbers, and tau where Delta vanishes; the preset that fits data and size."""
    _, *flags = command.split()
    assert has(vars(train.parse(flags)), settings)

def test_what_depends_on_data_and_machine_is_filled_in(monkeypatch):
    """Steps, micro batch, guidance, number of pictures, folder."""
    shapes = Shapes(100, 32)

    def configured(flags):
        return train.make_config(train.parse(flags.split()), shapes, Codec(), torch.device("cpu"))
    monkeypatch.setattr(train, "WORLD", 2)
    assert has(configured("--batch_size 600 --epochs 12"),
               "micro_batch=100 steps=2 workers=0 samples=64 compile=False shape=[3,32,32] num_classes=8 "
               "processes=2 cfg=2.0 out=out/pixel")
    assert has(configured("--label_drop 0 --target 0.5"), "cfg=1.0 out=out/pixel-0.5")
    shapes.classes = ["disc"]                                               # nothing to guide away from
    paper = configured("--preset paper")
    assert has(paper, "samples=8 cfg=1.0") and 1 <= paper["workers"] <= 8
    for flags, printed in rows("""
            --batch_size 65 | 65 does not divide over 2 processes: try 64
            --batch_size 1 | try 2
            --batch_size 12 --micro_batch 4 | try 3"""):
        refused(printed, configured, flags)

def test_a_run_is_known_by_its_data_and_belongs_to_one_process(call, monkeypatch):
    """Finished runs are left alone. Another target, seed or picture, or a second writer, is refused."""
    save_images("photos", noise(9, 16, 16, 3))
    words = TINY + " --preset demo --steps 1 --data photos"
    run = " --out out/pixel-photos"
    assert "writes to out/pixel-photos\n" in call(words)
    assert "finished at step 1" in call(words)
    os.utime("out/pixel-photos/curves.png", (0, 0))                         # as if killed before drawing
    assert "Look at" in call(words)
    assert "target k, not v" in call(words + run, "--target v", status=2)
    said = call(words + run, "--seed 1", status=2)
    assert "seed 0, not 1" in said and "--init out/pixel-photos/ckpt.pt" in said
    with data.own_folder("out/pixel-photos"), data.new_file("a.png"):
        assert "pixel-photos: another process is writing there" in call(words, status=2)
        with raises(UserError, match="a.png: another process"), data.new_file("a.png"):
            pass
    Image.new("RGB", (16, 16)).save("photos/5.png")
    assert "data_fingerprint" in call(words, status=2)

@mark.parametrize("target, told, columns", rows("""
    k | data | k
    two | 0.5 | k1 k2 k
    time | 0.9 | k
    channel | data | k k_min k_max"""))
def test_k_starts_where_it_is_told_and_what_is_learned_is_logged(call, target, told, columns):
    """As told or foretold, and it stays without a rate. k1 and k2; the mean of k(t); the channels' range."""
    words = TINY, "--out run --target", target, "--k_start", told, "--steps"
    said = call(*words, "1 --k_lr 0")
    start = load("run/ckpt.pt", "none")
    theory, ks = start.config["k_of_theory"], start.kdiff.ks()
    assert f"theory    k {theory:.3f} from " in said and 0.8 < theory < 1
    assert ks["k"].item() == approx(float(told.replace("data", f"{theory}")), abs=1e-3)
    if target == "channel":
        assert f"from {ks['k_min']:.3f} to {ks['k_max']:.3f}" in said
    said = call(*words, 3)
    assert "at step 1" in said
    learned = load("run/ckpt.pt", "none").kdiff.ks()
    assert list(learned) == columns.split()
    for name, k in learned.items():
        logged = read_log("run", name)[1][-1]
        assert logged == approx(k.item(), abs=2e-6) and logged != ks[name]
        assert f"| {name} {logged:.3f} |" in said

@mark.parametrize("pictures", [noise(1, 16, 16, 3), np.zeros((9, 16, 16, 3), np.uint8)])
def test_data_that_foretell_nothing_get_a_sentence(call, pictures):
    """One picture, or black ones: they train, but not from a k of theirs."""
    words = TINY + " --preset demo --batch_size 1 --steps 2 --no-flip --data photos --out"
    save_images("photos", pictures)
    said = call(words, "run")
    assert "theory    none: these data do not differ" in said and "nan" not in said
    assert "foretells no k" in call(words, "other --k_start data", status=2)

def test_the_average_that_is_shown_follows_from_the_step():
    """The longest that has forgotten the start: 0.95^90 < 0.01; before that the weights themselves."""
    found = [sample.default_average(["0.99", "0.98", "0.95"], step) for step in (0, 89, 90, 228, 459)]
    assert found == "none none 0.95 0.98 0.99".split()

def test_samples_of_two_processes_make_one_file(two, call):
    """An npz of images, labels going round, and settings: the same as one process makes."""
    words = "--steps 2 --n 5 --classes star,ring --batch_size 2 --out one.npz"
    call("sample.py", two / "two/ckpt.pt", words)
    ours = np.load(two / "s.npz")
    theirs = np.load("one.npz")
    images = ours["arr_0"]
    assert images.shape == (5, 16, 16, 3) and images.std() > 10
    assert levels(images, theirs["arr_0"]) <= 1
    assert ours["arr_1"].tolist() == theirs["arr_1"].tolist() == [5, 3, 5, 3, 5]
    settings = json.loads(f"{ours['settings']}")
    assert has(settings, "steps=2 classes=star,ring n=5") and settings["class_names"] == Shapes.classes
    call("sample.py", two / "two/ckpt.pt", "--steps 2 --n 5 --classes star,ring --out grid.png")
    assert Image.open("grid.png").height == 2 * 100 + 4                     # three of each class

def test_each_flag_of_the_sampler_changes_samples(two, call):
    """Of a network with filled weights and averages with others; a flag without effect is refused."""
    path = two / "two/ckpt.pt"
    filled = fill(load(path).kdiff)
    torch.save(read_tensors(path) | {"model": filled.state_dict()}, "ckpt.pt")

    def drawn(flags):
        call("sample.py ckpt.pt --steps 4 --n 2 --out a.npz", flags)
        return np.load("a.npz")["arr_0"].tobytes()
    plain = drawn("")
    for flag in ("seed 1, interval 0.6 1, solver euler, dtype bfloat16, cfg 4, tau 0.9, ema 0.95, steps 5, "
                 "classes ring,star").split(", "):
        assert drawn(f"--{flag}") != plain, flag
    assert drawn("") == plain
    for flag in ("--tokenizer ckpt.pt", "--stats ckpt.pt"):
        assert f"{flag} has no effect" in call("sample.py ckpt.pt", flag, status=2)

def test_latents_of_two_processes_are_posterior_samples(two, small_vavae):
    """Mean and spread, noise of their own, mirror images, labels; the statistics are theirs."""
    dataset = open_dataset(two / "latents", None)
    images = Codec().encode(stack(ImageFolder(two / "photos", 32), 9))
    latents = torch.cat([stack(dataset, 9), *(dataset.mirrored(i)[0][None] for i in range(9))])
    mean, logvar = VAVAE(two / "vavae.pt").moments(torch.cat([images, images.flip(-1)]))
    own = ((latents - mean) / torch.exp(logvar / 2)).flatten(1)
    assert own.mean().abs() < 0.1 and (own.std() - 1).abs() < 0.1
    assert torch.corrcoef(own).fill_diagonal_(0).abs().max() < 0.45
    spread = torch.std_mean(latents, (0, 2, 3), keepdim=True, correction=0)
    assert_close((dataset.std, dataset.mean), spread, atol=1e-3, rtol=0)
    assert dataset.classes == ["photos"] and dataset[8][1] == 0
    assert len([*two.glob("latents/*.safetensors")]) == 2

def test_latents_train_and_their_pictures_need_the_tokenizer(two, small_vavae, call):
    """A run resumes; sampling finds the file where it was, or where --tokenizer says."""
    shutil.copy(two / "vavae.pt", "vavae.pt")
    words = ("train.py --space latent --preset demo --image_size 32 --batch_size 4 --samples 0 --out run",
             "--tokenizer vavae.pt --data", two / "latents", "--steps")
    assert "resuming" not in call(*words, 2)
    assert "resuming" in call(*words, 3)
    ours = load("run/ckpt.pt")
    assert ours.config["shape"] == [32, 2, 2] and ours.codec.can_decode and ours.kdiff.tau == 0
    os.rename("vavae.pt", "moved.pt")
    assert "--tokenizer" in call("sample.py run/ckpt.pt", status=2)
    call("sample.py run/ckpt.pt --tokenizer moved.pt --n 9 --steps 2 --out grid.png")
    assert Image.open("grid.png").height == 204                             # one class, rows of eight
    again = two / "photos", "--out", two / "latents"
    assert "contains latents" in call("data.py encode --tokenizer moved.pt", *again, status=2)

def test_the_short_demo_raises_k_and_writes_its_files(call, monkeypatch):
    """Forty steps of the pixel demo move k from 0.5 past 0.6; pictures on the way, log, files."""
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: 20 * time.time())       # the estimate takes six seconds
        assert " s a step here " in call("train.py --dry_run --steps 9 --image_size 16 --out none")
    assert not Path("none").exists()
    said = call("train.py --steps 40 --batch_size 32 --image_size 16 --samples 8 --sample_every 20 --out run")
    steps, ks = read_log("run", "k")
    assert steps == [20, 40] and ks[1] > 0.6
    assert "= 0.20 epochs of 200.0 steps" in said and "samples.png" in said and "done in 0:" in said
    assert re.search(r"^step 40/40 \| epoch 0.2 \| loss \d\.\d{4} \| k 0.\d{3} \| lr \d\.\de-03 \| "
                     r"grad \d\.\d\d \| [\d,]+ img/s \| eta 0:00:00$", said, re.M)
    first, last = read_log("run", "loss")[1]
    assert last < 0.75 * first
    assert Image.open("run/samples.png").height == 8 * 100 + 4
    found = " ".join(sorted(os.listdir("run")))
    assert found == "ckpt.pt curves.png log.csv samples-0000020.png samples.png"

def test_pca_latents_are_white_and_stay_with_their_weights(call, photos):
    """Whitened, and decoded again; --init brings them; of flat colours three are left; of black ones none."""
    words = "train.py --batch_size 8 --samples 0 --space latent --preset demo --steps 1 --out "
    call(words, "run")
    codec = load("run/ckpt.pt").codec
    images = data.some_items(Shapes(6400, 32), 200)
    x = codec.encode(images)
    std, mean = torch.std_mean(x, (0, 2, 3))
    assert mean.abs().max() < 0.2 and (std - 1).abs().max() < 0.2
    assert x.shape[1:] == (16, 4, 4)
    assert (codec.decode(x) - images.float()).abs().mean() < 10
    assert "statistics of the data: they are kept" in call(words, "other --init run/ckpt.pt --data", photos)
    assert torch.equal(load("other/ckpt.pt").codec.tokenizer.basis, codec.tokenizer.basis)
    words += "flat --image_size 16 --data colours"
    colours = noise(30, 1, 1, 3).repeat(16, 1).repeat(16, 2)
    save_images("colours", colours)
    assert "3 of 16 channels" in call(words)
    assert load("flat/ckpt.pt").config["shape"] == [3, 2, 2]
    save_images("colours", 0 * colours)
    assert "all alike" in call(words, status=2)

def test_channels_of_pixels_are_principal_components_strongest_first(call):
    """The basis is orthonormal: noise stays white; variances are the eigenvalues; samples are images."""
    call(TINY, "--target channel --label_drop 0 --steps 1 --out run")
    _, codec, config, *_ = load("run/ckpt.pt")
    assert config["flip"] is False                                          # shapes are never mirrored
    basis = codec.tokenizer.basis
    assert_close(basis.T @ basis, torch.eye(192), atol=1e-5, rtol=0)
    images = data.some_items(Shapes(6400, 16), 6400)
    patches = F.pixel_unshuffle(images.double() / 127.5, 8).transpose(0, 1).flatten(1)
    values = torch.linalg.eigvalsh(torch.cov(patches)).flip(0)
    variances = codec.encode(images).var((0, 2, 3)).double()
    assert_close(variances[:32], values[:32], rtol=0.05, atol=0)
    call("sample.py run/ckpt.pt --n 8 --steps 2 --out s.npz")
    assert np.load("s.npz")["arr_0"].shape == (8, 16, 16, 3)
    assert "nothing to guide away from" in call("sample.py run/ckpt.pt --cfg 2", status=2)

def test_checkpoints_are_measured_once(call, monkeypatch):
    """fid.csv has a row for each checkpoint, reference and setting: the distance of those samples."""
    def measure(words):
        call("fid.py --features pixels --n 6 --steps 2 --solver euler", words, "ref.npz")
        return [f"{row['step']} {row['cfg']}" for row in sample.read_rows("run/fid.csv")]
    call(TINY, "--steps 2 --keep_every 1 --out run")
    first, second = "run/ckpt-0000001.pt", "run/ckpt-0000002.pt"
    np.savez("ref.npz", **REFERENCE, features="pixels")
    assert measure(second) == ["2 2.0"]
    with monkeypatch.context() as patch:
        patch.setattr(fid, "evaluate", None)                                # it is not asked again
        assert measure(second) == ["2 2.0"]
    assert measure(second + " --cfg 1.25") == ["2 2.0", "2 1.25"]
    assert measure(first + " " + second) == ["2 2.0", "2 1.25", "1 2.0"]
    call("sample.py --n 6 --steps 2 --solver euler --out s.npz", second)
    said = call("fid.py s.npz ref.npz --features pixels")
    distance = re.search(r"pixel distance (\S+)", said)[1]
    found = sample.read_rows("run/fid.csv")[0]["pixel_distance"]
    assert float(found) == approx(float(distance), rel=1e-3)
    np.savez("ref.npz", mu=MU + 1, sigma=SIGMA, features="pixels")          # the same name
    assert len(measure(second)) == 4
    call(TINY, "--steps 1 --seed 1 --out b")
    shutil.copy("b/ckpt.pt", first)                                         # other weights, the same name
    assert len(measure(first)) == 5
    Path("run/fid.csv").write_text("step\nx\n")
    assert "move it away" in call("fid.py --features pixels", second, "ref.npz", status=2)

def test_init_takes_what_fits_and_says_what_does_not(call, photos):
    """Other classes, another target, another size at one patch; another network is refused."""
    call(TINY, "--steps 2 --out source")
    source = load("source/ckpt.pt").kdiff.state_dict()
    words = TINY + " --batch_size 2 --steps 1 --lr 0 --init source/ckpt.pt --out"
    photos.rename("photos")
    for new, change, printed in rows("""
            net.y_embedder.embedding_table.weight | --data photos | 8 classes, which are not these 3
            w | --target time | predicts k, this run time
            net.pos_embed | --image_size 8 | positions are new"""):
        said = call(words, new, "--preset demo", change)
        assert printed in said and said.count("--init ") == 1
        ours = read_tensors(f"{new}/ckpt.pt")["model"]
        assert [key for key in source if not torch.equal(ours[key], source[key])] == [new]
    assert "w, if it has one, is left out" in call(words, "start --preset demo --k_start 0.7")
    assert load("start/ckpt.pt").kdiff.ks()["k"].item() == approx(0.7)
    assert "contains a JiT-narrow/8, not a JiT-wide/8" in call(words, "no --model JiT-wide/8", status=2)

# ---- fid.py ------------------------------------------------------------------------------------------------

class Recorder(fid.Inception):
    """FID's network of 4 channels a convolution, 3 x 3. It makes weights when its layers ask for them."""

    def __init__(self):
        nn.Module.__init__(self)
        self.state = {}

    def convolve(self, x, name):
        self.shape = 4, x.shape[1], 3, 3
        return super().convolve(x, name)

    def get_buffer(self, name):
        key, shape = name.replace(" ", "."), (4,)
        if key.endswith("conv.weight"):
            shape = self.shape
        if key == "fc.weight":
            shape = 1008, 24
        return self.state.setdefault(key, weight(key, shape))

def test_inception_gives_the_recorded_outputs():
    """Recorded from plain layers in float64, one side enlarged, one shrunk; autocast changes nothing."""
    recorder = Recorder()
    images = torch.from_numpy(noise(2, 3, 40, 333))
    recorder(images)
    state = recorder.state
    assert zlib.crc32(repr(sorted(state)).encode()) == 1188313831                # the published names
    path = Path("random.pth")
    torch.save(state, path)
    network = fid.Inception(path).train()
    with torch.autocast("cpu", torch.bfloat16):
        pool3, logits = network(images)
    assert not pool3.requires_grad
    assert sketch(pool3) == recorded("0.60207963 0.016440132 0 0")
    assert sketch(logits) == recorded("3.9143447 0.034167975 0.23375223 0.003192849")
    assert network.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    key = "Mixed_7c.branch_pool.conv.weight"
    weights = state.pop(key)
    for unfit in (state, state | {key: weights[:, 1:]}):
        torch.save(unfit, path)
        refused("random.pth: not FID's Inception", fid.Inception, path)

def test_frechet_distance_has_its_closed_forms():
    """Equal and commuting covariances of full rank, of others, and of none; what does not fit is refused."""
    rng = np.random.RandomState(0)
    turn, _ = np.linalg.qr(rng.randn(50, 50))
    mu, shift = np.zeros(50), rng.randn(50)
    for ranks in ((50, 50), (50, 20), (20, 30), (1, 0)):
        a, b = rng.rand(2, 50) ** 4 * (np.arange(50) < np.array(ranks)[:, None])
        s1, s2 = turn * a @ turn.T, turn * b @ turn.T
        expected = shift @ shift + ((a ** 0.5 - b ** 0.5) ** 2).sum()
        assert fid.frechet_distance(mu, s1, shift, s2) == approx(expected, rel=1e-9)
        assert abs(fid.frechet_distance(mu, s1, mu, s1)) < 1e-6
    for bad in ((mu[None], s1), (mu[:3], s1[:3, :3]), (mu, s1[:3]), (mu * np.nan, s1), (mu, s1 + np.inf)):
        refused("finite numbers are needed", fid.frechet_distance, mu, s1, *bad)

def test_frechet_distance_of_samples_is_by_the_nuclear_norm():
    """Of covariances X^T X that do not commute, of 30 and 80 samples in 100 dimensions: by that of X Y^T."""
    rng = np.random.RandomState(0)
    x, y = rng.randn(30, 100), rng.randn(80, 100)
    expected = (x ** 2).sum() + (y ** 2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")
    assert fid.frechet_distance(x[0], x.T @ x, x[0], y.T @ y) == approx(expected, rel=1e-10)

def test_inception_score_is_the_mean_kl_of_uneven_splits():
    """By rows of 103 in 10 splits of 10 and 11; K for K certain classes; too few are refused."""
    logits = 3 * normal("logits", 103, 7)
    order = np.random.RandomState(2020).permutation(103)
    p = logits.double().softmax(1).numpy()[order]
    scores = []
    for part in np.split(p, np.arange(1, 10) * 103 // 10):
        divergence = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert fid.inception_score(logits) == approx((np.mean(scores), np.std(scores)), rel=1e-10)
    certain = torch.eye(4, 5).repeat(2, 1) * 2000                           # class 4 never: 0 log 0 is 0
    assert fid.inception_score(certain, splits=1) == approx((4, 0), rel=1e-12)
    refused("9 images", fid.inception_score, torch.zeros(9, 5))

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
    data.print0(f"result {json.dumps(result)}")

def test_evaluation_does_not_depend_on_processes_batches_or_their_order(two, capsys):
    """Distance and score of 53 images at once, in batches of 10, the last first, and on two processes."""
    features, logits = Stub(__file__)(stack(Shapes(53, 32), 53))
    features = features.double().numpy()
    score, spread = fid.inception_score(logits)
    assert score > 1.01
    distance = fid.frechet_distance(features.mean(0), np.cov(features.T), np.zeros(12), np.eye(12))
    evaluate_shapes()
    for said in (capsys.readouterr().out, (two / "said.txt").read_text()):
        result = json.loads(re.search(r"^result (.*)$", said, re.M)[1])
        assert result == approx({"fid": distance, "is_mean": score, "is_std": spread}, rel=1e-6)

@fixture
def samples():
    """12 shapes of 32 px as PNGs in two folders, an array in a zip, stored or deflated, a packed file."""
    images = stack(Shapes(12, 32), 12)
    arr_0 = images.permute(0, 2, 3, 1).numpy()
    save_images("png/0", arr_0[:6])
    save_images("png/1", arr_0[6:])
    np.savez("stored.npz", arr_0=arr_0, arr_1=np.zeros(12, int), settings='{"cfg": 2.5}')
    columns = np.asfortranarray(arr_0)
    np.savez_compressed("deflated.npz", arr_0=columns)
    np.savez("columns.npz", arr_0=columns)
    data.pack("png", 32, "packed")
    return images

PIXELS = "fid.py --features pixels --batch_size 5"

def test_samples_of_any_kind_of_file_are_read(samples):
    """All kinds contain the same images; settings are those of the file."""
    for name in "png stored.npz deflated.npz columns.npz packed".split():
        source = fid.open_samples(name)
        batches, _ = zip(*fid.batches_of(source, 5, name))
        assert torch.equal(torch.cat(batches)[:12], samples) and len(source) == 12
        expected = {"stored.npz": {"cfg": 2.5}}
        assert getattr(source, "settings", None) == expected.get(name)

def test_references_are_written_and_measured_against(samples, call):
    """Mean and covariance of thumbnails; 0 from their own; hash and settings are printed; one size only."""
    call(PIXELS, "--make_ref png --image_size 32 --out ref.npz")
    ref = fid.load_reference("ref.npz", "pixels")
    features = F.avg_pool2d(samples / 255, 2).flatten(1).double().numpy()
    assert ref.mu == approx(features.mean(0), abs=1e-6)
    assert np.abs(ref.sigma - np.cov(features.T)).max() < 1e-6
    assert (ref.n, ref.image_size, ref.weights) == (12, 32, None)
    dark = (samples // 2).permute(0, 2, 3, 1).numpy()
    np.savez("dark.npz", arr_0=dark)
    np.savez("published.npz", mu=ref.mu, sigma=ref.sigma, arr_0=dark)       # as ADM's references

    def measured(name, reference):
        said = call(PIXELS, name, reference)
        assert "12 images" in said and "FID" not in said and fid.sha256(reference) in said
        assert ('"cfg": 2.5' in said) == (name == "stored.npz")
        return float(re.search(r"^pixel distance (\S+)", said, re.M)[1])
    assert abs(measured("stored.npz", "ref.npz")) < 1e-6
    assert abs(measured("packed", "published.npz")) < 1e-6
    assert measured("dark.npz", "ref.npz") > 1
    Image.new("RGB", (32, 33)).save("png/1/5.png")
    said = "error: .*not images of one size.*3, 33, 32.*--make_ref"
    assert re.search(said, call(PIXELS, "png published.npz", status=2))

MU, SIGMA, IMAGES = np.zeros(768), np.eye(768), np.zeros((4, 32, 32, 3), np.uint8)
REFERENCE = dict(mu=MU, sigma=SIGMA)
UNFIT = {                              # what an .npz contains; what is said of it as samples, as a reference
    "empty": (dict(other=SIGMA), "arr_0|mu"),
    "float": (dict(arr_0=IMAGES / 2), "float64|mu"),
    "grey": (dict(arr_0=IMAGES[..., 0]), r"\(4, 32, 32\)|mu"),
    "one": (dict(arr_0=IMAGES[:1]), "1 images have no covariance|mu"),
    "cut": (dict(arr_0=IMAGES), "zip"),
    "half": (dict(mu=MU), "arr_0|sigma"),
    "small": (dict(mu=MU[:64], sigma=SIGMA[:64, :64]), "arr_0|64,"),
    "nan": (REFERENCE | dict(sigma=SIGMA * np.nan), "arr_0|finite"),
    "other": (REFERENCE | dict(features="inception"), "arr_0|--features pixels"),
    "size": (REFERENCE | dict(image_size=64), "arr_0|of 64 x 64 pixels.*32, 32")}

@mark.parametrize("name", UNFIT)
def test_unfit_samples_and_references_get_one_line(samples, call, name):
    """As a reference and as samples; exit status 2."""
    content, said = UNFIT[name]
    np.savez("ref.npz", **REFERENCE)
    np.savez("bad.npz", **content)
    if name == "cut":
        os.truncate("bad.npz", 9000)
    for pair in ("packed bad.npz", "bad.npz ref.npz"):
        printed = call(PIXELS, pair, status=2)
        assert re.fullmatch(r"(images .*\n)*error: .*\n", printed) and re.search(said, printed)

@fixture
def weights(monkeypatch):
    """Two small files, of which right.pth is taken for FID's weights."""
    Path("right.pth").write_text("right")
    Path("other.pth").write_text("other")
    monkeypatch.setattr(fid, "Inception", Stub)
    monkeypatch.setitem(fid.EXTRACTORS, "inception", Stub)
    monkeypatch.setattr(fid, "WEIGHTS", fid.sha256("right.pth"))

def test_other_weights_are_told(weights, samples, call):
    """In a warning; IS is printed; of under 2,048 images there is a warning."""
    make = "fid.py --make_ref png --image_size 32 --out ref.npz --weights"
    use = "fid.py png ref.npz --weights"
    call(make, "right.pth")
    said = call(use, "right.pth")
    assert fid.WEIGHTS in said and "IS 1." in said
    assert abs(float(re.search(r"FID (\S+)", said)[1])) < 1e-6
    assert said.count("warning: it is too high") == 1 and "own weights" not in said
    assert "made with other weights" in call(use, "other.pth", status=2)
    call(make, "other.pth")
    assert "warning: these are not FID's own" in call(use, "other.pth")

def test_weights_are_fetched_once(weights, monkeypatch):
    """Whole or not at all; what went wrong is said with the place where they belong."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")

    def fetched(name):
        monkeypatch.setattr(fid, "URL", Path(name).absolute().as_uri())
        return fid.make_extractor()
    for name, printed in (
            ("gone.pth", "put it at hub/checkpoints.*--weights"), ("other.pth", "invalid hash")):
        refused(printed, fetched, name)
    assert not os.listdir("hub/checkpoints")
    for _ in range(2):
        assert fetched("right.pth").sha256 == fid.WEIGHTS
        Path("right.pth").unlink(missing_ok=True)

# ---- Faults: interruptions, lost processes, full disks, files that are not what they say -------------------

@mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes there")
@mark.parametrize("processes, victim, status, printed", [
    (None, None, 2, r"\S*/5.png: not a readable image"),
    (2, None, 1, r"\S*/5.png: not a readable image"),
    (None, [-1], 2, "a loading process died, .*--workers"),
    (2, [0, "RANK=1"], 1, "process 0 lost the others")])
def test_fault_of_one_process_ends_everything_with_one_line(tmp_path, processes, victim, status, printed):
    """An image damaged while they train; a loader killed as for memory, or one of two processes."""
    photos, out = tmp_path / "photos", tmp_path / "run"
    save_images(photos, noise(9, 16, 16, 3))
    process = start(TINY, "--batch_size 4 --preset demo --workers 2 --steps 1000000 --data", photos,
                    "--out", out, processes=processes, wait_for="step 3/")
    began = None
    if victim:
        began = time.time()
        place, *marks = victim
        os.kill(alive(process.mark, *marks)[place], signal.SIGKILL)
    else:
        os.truncate(photos / "5.png", 400)
    said = ending(process, status, began)
    assert len(re.findall(f"^error: {printed}", said, re.M)) == 1, said
    if not processes:
        assert said.count("error: ") == 1 and "Traceback" not in said
        if not victim:                                                      # what can be foreseen saves first
            *_, last = re.findall(r"^step ([\d,]+)/", said, re.M)
            assert f"{read_tensors(out / 'ckpt.pt')['step']:,}" == last

def test_kill_at_a_random_moment_leaves_a_loadable_checkpoint(tmp_path):
    """Of a run that saves every step: it loads and only grows. TRIES=50 in the environment tries longer."""
    last = 0
    for _ in range(int(os.environ.get("TRIES", 2))):
        words = "--steps 1000000 --save_every 1 --out"
        process = start(TINY, words, tmp_path, wait_for=f"step {last + 2:,}/")
        time.sleep(random.random())
        process.kill()
        process.communicate()
        path, = tmp_path.glob("ckpt*.pt")                                   # one
        step = read_tensors(path)["step"]
        assert step > last
        last = step

def test_bad_steps_leave_the_last_good_checkpoint(call):
    """Weights thrown to 1e30: one line, status 2, no NaN in a file."""
    said = call(TINY, "--steps 30 --lr 1e30 --save_every 1 --out run", status=2)
    assert "the last 10 steps" in said and "try a lower --lr" in said and "| skipped 9" in said
    file = read_tensors("run/ckpt.pt")
    assert file["step"] == int(re.search(r"at step (\d+) is intact", said)[1]) >= 1
    for part in (file["model"], *file["ema"].values()):
        assert all(tensor.isfinite().all() for tensor in part.values())
    state = state_of(KDiff(UNet(3, 8, 8), num_classes=8), 0.9)
    next(state.averages["0.9"].parameters()).data.fill_(math.nan)
    refused("after step 0 are not finite", train.save, "nan.pt", state)

def test_full_disks_leave_no_half_file(call, photos):
    """Checkpoints, packed files, samples: one line, and what was there before."""
    call(TINY, "--steps 1 --out run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 16, before[1]))         # no file grows beyond 64 kB
    try:
        for name, *words in (
                ("ckpt.pt", TINY, "--steps 3 --out run"),
                ("packed", "data.py pack --image_size 128 --out packed", photos),
                ("s.npz", "sample.py run/ckpt.pt --n 100 --steps 2 --out s.npz")):
            said = call(*words, status=2)
            assert said.count("error: ") == 1 and f"{name} could not be written" in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_tensors("run/ckpt.pt")["step"] == 1
    assert not list(Path().rglob("*.tmp"))
    assert not Path("packed").exists() and not Path("s.npz").exists()

@mark.parametrize("error, said, local_rank", [
    (FileNotFoundError(2, "No such file", "a.csv"), "a.csv: No such file", 0),
    (UserError("a"), "", 1),
    (torch.cuda.OutOfMemoryError("CUDA"), "out of GPU memory: try half the", 1),
    (data.FileError("Caught FileError\nThen\ndata.FileError: a: b Error: c"), "a: b Error: c\n", 1),
    (UserError("a: not whole\n(KeyError: b)"), "a: not whole (KeyError: b)\n", 0),
    (BrokenPipeError(32, "Broken pipe"), "nobody reads", 0),
    (SystemExit(130), "", 0),
    (ConnectionRefusedError(111, "refused"), "a loading process died", 0),
    (OSError("got end of file during message"), "a loading process died", 0)])
def test_errors_are_explained_in_one_line(monkeypatch, capsys, error, said, local_rank):
    """Paths, memory, lost processes; of two processes one prints what both met."""
    def fail():
        raise error
    monkeypatch.setattr(data, "LOCAL_RANK", local_rank)
    monkeypatch.setattr(sys, "stdout", sys.stdout)                          # which a closed pipe replaces
    with raises(SystemExit) as exit:
        data.run(fail)
    printed = capsys.readouterr().err
    assert exit.value.code == getattr(error, "code", 2)
    if said:
        assert printed.startswith(f"error: {said}")
    assert printed.count("\n") == bool(said)

@mark.parametrize("error", [
    OSError("no file"), FileNotFoundError("no word"), RuntimeError("shapes differ"), TypeError("a typo")])
def test_bugs_of_ours_keep_their_traceback(error):
    """Only what a user can mend is a line."""
    def fail():
        raise error
    with raises(type(error), match=str(error)):
        data.run(fail)

def test_nothing_is_unpickled():
    """Payloads in checkpoints, datasets and references."""
    class Payload:                                                          # unpickled, it creates a file
        def __reduce__(self):
            return os.system, ("touch marker",)
    torch.save({"config": {}, "data": Payload()}, "a.pt")
    payload = np.array([Payload()], dtype=object)
    np.save("b.npy", payload)
    np.savez("c.npz", mu=payload, sigma=SIGMA)
    for path, opener, how in (
            ("a.pt", load, None), ("b.npy", open_dataset, 9), ("c.npz", fid.load_reference, "pixels")):
        refused(path, opener, path, how)
    assert not Path("marker").exists()

def test_bad_images_and_folders_are_named():
    """Cut, empty, vanished, a pipe, a bomb, floating point; a folder without images."""
    save_images(".", noise(1, 40, 40, 3))
    Path("cut.png").write_bytes(Path("0.png").read_bytes()[:900])
    Path("empty.jpg").touch()
    os.mkfifo("pipe.png")
    Image.new("1", (14000, 14000)).save("bomb.png")
    Image.new("F", (9, 9)).save("float.tiff")
    for name in "cut.png empty.jpg bomb.png gone.png pipe.png float.tiff".split():
        refused(name, read_image, name)
    os.mkdir("class")
    Path("class/a.heic").touch()
    refused("contains no images.*1 .heic", open_dataset, "class", 32)

# A command, and what its error says.
BAD = """
    train.py --batch_size 0 | --batch_size: 0: a
    train.py --lr nan | --lr: nan
    train.py --noise_scale inf | --noise_scale: inf
    train.py --ema 0.9 1 | --ema [0.9, 1.0]: decays
    train.py --interval 0.9 0.1 | --interval [0.9, 0.1]
    train.py --label_drop 1.5 | --label_drop 1.5
    train.py --image_size 16 --target two --loss u | two
    train.py --target eps --tau 0 | --tau 0 with --target eps
    train.py --k_start 1.5 | --k_start 1.5: data, or a number
    train.py --target v --k_start 0.5 | --k_start has no effect on --target v
    train.py --target x --k_lr 2 | --k_lr has no effect on --target x
    train.py --target foo | --target: target 'foo' is unknown
    train.py --target 1.5 | --target: target '1.5' is unknown
    train.py --steps 3 --epochs 3 | --epochs has no effect next to --steps
    data.py pack .. --batch_size 3 --out x | --batch_size has no effect on pack
    train.py --tokenizer pca | --tokenizer has no effect in pixel space
    train.py --data . --image_size 100 | --image_size 100 is no multiple of 8: try 104
    train.py --data . --image_size 20 --preset paper | --image_size 20 has no network in Table 4
    train.py --data .. --preset demo --image_size 256 | is inside
    data.py pack .. --out x | --out x is inside ..
    train.py --data .. --space latent | --tokenizer pca, or run
    train.py --space latent --image_size 30 | --image_size 30
    train.py --device cpux | --device cpux is not usable
    train.py --data nowhere --preset demo | nowhere: no such file
    train.py --data ../a.png --preset demo | ../a.png: not a readable safetensors
    train.py --step 3 | --step
    train.py --out | --out
    train.py --image_size 16 --init nowhere.pt --out out | nowhere.pt
    sample.py nowhere.pt | nowhere.pt
    sample.py a.pt --out a.jpg | --out a.jpg
    sample.py a.pt --n 0 | --n/--samples: 0
    sample.py a.pt b.pt | b.pt
    fid.py nowhere nowhere | nowhere
    fid.py nowhere | give SAMPLES or CHECKPOINTS and REF
    fid.py a.npz b.npz --cfg 2 | --cfg has no effect here
    fid.py a.npz b.npz --image_size 32 | --image_size has no effect here
    fid.py --make_ref shapes --image_size 32 --out ref | --out FILE.npz
    data.py pack nowhere --out out/x | nowhere: no such folder
    data.py pack .. --out . | --out .: a folder; name a file
    data.py encode . --out out --tokenizer nowhere.pt | nowhere.pt
    data.py encode . --out out | encode needs --tokenizer
"""

@mark.parametrize("command, expected", rows(BAD))
def test_bad_input_gets_one_line_and_status_2(call, monkeypatch, command, expected):
    """The line names the flag or file; nothing is written."""
    Image.new("RGB", (256, 256)).save("a.png")
    os.mkdir(".here")
    monkeypatch.chdir(".here")
    *said, last = call(command, status=2).splitlines()
    assert last.startswith("error: ") and expected in last
    assert "error: " not in "".join(said)
    assert not os.listdir()

def test_corruption_of_any_file_is_an_error_line_or_harmless(samples):
    """Images, checkpoints, packed files, latents: UserError, or read as what they still are."""
    def read(name):
        if name == "a.pt":
            load(name)
        elif name == "ref.npz":
            fid.load_reference(name, "pixels")
        elif name.startswith("shards"):
            list(open_dataset("shards", 8))
        elif name.startswith("a."):
            read_image(name)
        else:
            list(fid.batches_of(fid.open_samples(name), 5, name))
    names = ("a.png a.jpg a.webp a.bmp a.gif a.tiff a.pt ref.npz stored.npz deflated.npz packed "
             "shards/a.safetensors shards/latents_stats.pt").split()
    for name in names[:6]:
        Image.fromarray(noise(24, 24, 3)).save(name)
    save_latents("shards", torch.zeros(5, 2, 2, 2).half())
    np.savez("ref.npz", **REFERENCE)
    torch.save(model.build("JiT-narrow/8", 16, 8).half().state_dict(), "a.pt")
    rng, errors = random.Random(1), 0
    for i in range(int(os.environ.get("TRIES", 52))):
        name = names[i % len(names)]
        whole = Path(name).read_bytes()
        at, size = rng.randrange(len(whole)), rng.randint(1, 64)
        rest = whole[at + size:]
        # cut off, removed, overwritten, more than before
        end = rng.choice((b"", rest, rng.randbytes(size) + rest, rng.randbytes(size) + whole[at:]))
        Path(name).write_bytes(whole[:at] + end)
        try:
            read(name)
        except UserError as error:
            assert "\n" not in str(error)
            errors += 1
        Path(name).write_bytes(whole)
        read(name)
    assert errors > i / 4

@fixture
def fashion(monkeypatch, tmp_path):
    """40 pictures of noise in the place of Fashion-MNIST's files. Returns the pixels and the folder."""
    pixels = noise(40, 28, 28)
    files = {"train-labels-idx1-ubyte": bytes(8) + bytes(range(10)) * 4,    # a header that nobody reads
             "train-images-idx3-ubyte": bytes(16) + pixels.tobytes()}
    folder = tmp_path / "idx"
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        monkeypatch.setitem(data.Fashion.sha256, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data.Fashion, "places", [folder, tmp_path / "cache"])
    monkeypatch.setattr(data.Fashion, "url", folder.as_uri() + "/")
    return pixels, folder

def test_fashion_is_padded_and_trains_and_bad_files_get_one_line(fashion, call):
    """28 px in the middle of 32, grey thrice; cut, or of other content."""
    pixels, folder = fashion
    dataset = open_dataset("fashion", 32)
    image, label = dataset[13]
    assert len(dataset) == 40 and dataset.classes[label] == "dress" and image.shape == (3, 32, 32)
    assert np.array_equal(image[1, 2:30, 2:30], pixels[13])
    assert image.sum() == 3 * int(pixels[13].sum())
    words = "train.py --data fashion --batch_size 4 --samples 0 --steps 1 --space latent --out run"
    call(words)
    images = folder / "train-images-idx3-ubyte.gz"
    for content, said in ((images.read_bytes()[:-9], "not Fashion"), (gzip.compress(b"other"), "checksum")):
        images.write_bytes(content)
        assert said in call(words, status=2)

def test_fashion_is_fetched_once(fashion, monkeypatch, tmp_path):
    """To the cache; without a network, the error says where it belongs."""
    folder, cache = data.Fashion.places
    monkeypatch.setattr(data.Fashion, "places", [tmp_path / "none", cache])
    assert len(data.Fashion()) == 40                                        # as if from the network
    shutil.rmtree(folder)
    assert len(data.Fashion()) == 40
    shutil.rmtree(cache)
    refused(f"put it at {cache}", data.Fashion)

# ---- Examples and documents --------------------------------------------------------------------------------

# Scripts with their arguments. name=value is a size that main() takes beside arguments.
# What ends in .png, .gif or .pt, without a slash, is written. run, time, channel are folders of runs.
EXAMPLES = """
    losses.py D=8 d=4
    target.py t.png
    spiral.py s.png steps=2 batch=4 dimensions=(2,3)
    curves.py loss c.png run
    cut.py run/ckpt.pt small.pt 0.95
    nearest.py run/ckpt.pt png n.png 1
    paths.py p.gif run/ckpt.pt time/ckpt.pt steps=2
    edit.py run/ckpt.pt star e.png n=1
    judge.py png stored.npz steps=2 held_out=4
    spectrum.py channel/ckpt.pt
    spectrum.py time/ckpt.pt
    compare.py finished k --seeds 2
    resolution.py r.png png steps=1 largest=3 each=2
    gain.py g.png gain JiT-narrow/4 steps=1 n=96
    unet.py --steps 1 --batch_size 8 --samples 0 --image_size 16 --out out
    rows.py train.py --target asym --steps 1 --batch_size 8 --samples 0 --image_size 16 --out out
    rows.py train.py --target edm --steps 1 --batch_size 8 --samples 0 --image_size 16 --out out
"""

@mark.parametrize("line", EXAMPLES.strip().splitlines())
def test_examples_run(line, samples, two, call, monkeypatch):
    """Each at a tiny size, to its end, and writes what it says."""
    name, *words = line.split()
    path = f"{HERE}/examples/{name}"
    if not os.path.exists(path):
        skip(f"{name} is not here")
    monkeypatch.syspath_prepend(HERE / "examples")                          # they import each other
    monkeypatch.setitem(data.DATASETS, "shapes", lambda size: Shapes(200, size))
    monkeypatch.setattr(objective, "TARGETS", dict(objective.TARGETS))      # they add rows
    monkeypatch.setattr(model, "SIZES", dict(model.SIZES))
    monkeypatch.setattr(sample, "build", sample.build)
    for folder in ("run", "finished/k-0", "finished/k-1"):
        shutil.copytree(two / "two", folder)
        Path(folder, "distance.txt").write_text("pixel distance 1.5")
    for target in ("time", "channel"):
        if f"{target}/" in line:
            call(TINY, "--steps 1 --target", target, "--out", target)
    sys.argv = [name, *words]
    main = runpy.run_path(path).get("main")
    if main:
        main(*[word for word in words if "=" not in word], **keywords(line))
    else:
        with suppress(SystemExit):
            runpy.run_path(path, run_name="__main__")
    for word in words:
        if re.fullmatch(r"\w+.(png|gif|pt)", word):
            assert os.path.getsize(word) > 100
    assert "--out" not in words or Path("out/ckpt.pt").exists()

NOTEBOOK = HERE / "examples" / "kdiff.ipynb"

@mark.skipif(not NOTEBOOK.exists(), reason="the notebook is not here")
def test_the_notebook_runs(monkeypatch):
    """All code cells, one after the other, with three steps of training."""
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(objective, "TARGETS", dict(objective.TARGETS))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code, changes = re.subn(r"^STEPS = \d+", "STEPS = 3", code, flags=re.M)
    assert changes == 1
    exec(code, {})

def commands_of(text):
    """The commands of our scripts in a document, as words: of bash blocks, and inline those with flags."""
    blocks = re.findall(r"```bash\n(.*?)```", text.replace("\\\n", " "), re.S)
    prose = re.sub("```.*?```", "", text, flags=re.S)
    inline = re.findall(r"`((?:python|torchrun) [^`]*--[^`]+)`", prose)
    lines = re.sub("#.*", "", "\n".join(blocks + inline))
    found = map(shlex.split, re.findall(r"\S+\.py\b[^&;\n]*", lines))
    return [words for words in found if "--help" not in words]

@mark.parametrize("document", ["README.md", "RESULTS.md"])
def test_every_command_of_the_documents_is_understood(monkeypatch, document):
    """Its script exists and parses its flags; train.py does a dry run on small stand-ins."""
    path = HERE / document
    if not path.exists():
        skip(f"{document} is not here")
    text = path.read_text()
    save_latents("latents", normal("latents", 5, 32, 16, 16).half())
    stored = open_dataset("latents", None)

    def stand_in(source, image_size):
        return stored if "latents" in source else Shapes(8, image_size)
    monkeypatch.setattr(train, "open_dataset", stand_in)
    monkeypatch.setattr(train, "open_vavae", lambda file: SimpleNamespace(channels=32))
    monkeypatch.setattr(train, "start_of_k", lambda *args: 0.5)
    for size in model.SIZES.values():                                       # one block of each
        for key, value in dict(depth=1, context_start=0).items():
            monkeypatch.setitem(size, key, value)
    monkeypatch.setattr(train, "estimate", lambda *args: None)               # minutes, for some
    scripts = {"sample.py": sample.parse, "data.py": data.parse, "fid.py": fid.parse}
    commands = commands_of(text)
    for name, *flags in commands:
        assert (HERE / name).exists(), name
        if name in scripts:
            scripts[name](flags)
        if name == "train.py":
            for file in flags:
                if file.endswith((".pt", ".pth")):                           # of --init
                    Path(file).touch()
            script("train.py --dry_run", *flags)()
    if document == "README.md":
        assert {name for name, *_ in commands} >= {"train.py", "test_all.py", *scripts}
        assert "<!-- main command -->\n```bash" in text and "<!-- test command -->\n```bash" in text

def test_velocity_is_right_on_any_path(monkeypatch):
    """On the README's cosine path, too, where a'b - b'a is not 1: the true u gives the true dz/dt."""
    def path(t):
        q = math.pi / 2
        a, b = torch.sin(q * t), torch.cos(q * t)
        return a, b, q * b, -q * a
    monkeypatch.setattr(objective, "path", path)
    x, e = torch.randn(2, 4, 3, 2, 2).double()
    a, b, da, db = path(TIMES)
    t = TIMES.flatten()
    for target in "x v eps 0.3".split():
        kdiff = KDiff(None, target, num_classes=1, tau=0.0)
        c, d = kdiff.coefficients(t)
        assert_close(kdiff.velocity(c * x + d * e, a * x + b * e, t), da * x + db * e)

def python_of(document):
    """The code blocks of a document that are Python."""
    return re.findall("```python\n(.*?)```", (HERE / document).read_text(), re.S)

def test_five_lines_of_the_readme_are_the_loss():
    """They give KDiff's loss and the same gradient in w, where the clamp is not reached."""
    x, e = torch.randn(2, 4, 3, 2, 2).double()
    kdiff = KDiff(lambda z, t, y=None: 0.3 * z, num_classes=1, k_start=0.7).double()
    names = {"torch": torch, "w": kdiff.w, "x": x, "e": e, "t": TIMES, "net": kdiff.net}
    exec(python_of("README.md")[0], names)
    loss = kdiff.loss(x, None, TIMES.flatten(), e)
    assert_close(names["loss"], loss)
    assert_close(torch.autograd.grad(names["loss"], kdiff.w), torch.autograd.grad(loss, kdiff.w))

def test_python_of_the_readme_trains_and_samples():
    """In few steps, with a checkpoint that loads."""
    os.symlink(HERE / "assets", "assets")
    names = {}
    exec(python_of("README.md")[1].replace('"200"', '"2"'), names)
    assert load("mine.pt").step == 2 and names["picture"].width > 8 * 96

class Words(nn.Module):
    """A network whose label is a caption."""
    in_channels = 3

    def __init__(self, vocabulary):
        super().__init__()
        self.words = nn.Embedding(vocabulary + 1, 3)

    def forward(self, z, t, y):
        return z + self.words(y).mean(1)[..., None, None]

def test_captions_train(call, monkeypatch):
    """The README's recipe for conditions: labels (L,), a vocabulary for classes, a network for both."""
    dataset = Shapes(8, 16)
    dataset.item = lambda i: (dataset.draw(i), torch.tensor([i, 0, 7]))
    monkeypatch.setitem(data.DATASETS, "captions", lambda image_size: dataset)
    monkeypatch.setattr(sample, "build", lambda name, side, num_classes, channels: Words(num_classes))
    call(TINY, "--data captions --model Words --steps 1 --out a")
    assert read_tensors("a/ckpt.pt")["config"]["label_shape"] == [3]

# Where it was edited, and what is there now.
@mark.parametrize("where, value", rows("""
    config | "text"
    config num_classes | -3
    config shape | [3]
    config interval | ["a", "b"]
    data classes | [1, 2]
    data | 3
    step | "x"
    ema | ["a"]"""))
def test_edited_checkpoints_get_one_line(two, where, value):
    """Whatever an editor has made of one entry."""
    file = read_tensors(two / "two/ckpt.pt")
    inner = file
    *outer, last = where.split()
    for key in outer:
        inner = inner[key]
    inner[last] = json.loads(value)
    torch.save(file, "edited.pt")
    refused("edited.pt", load, "edited.pt")

if __name__ == "__main__":                                        # one of the processes of the fixture `two`
    data.run(lambda: work_of_two(sys.argv[1]))
