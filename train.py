"""The training loop: one process or many, from a laptop's minute to Table 4 on ImageNet.

    torchrun train.py --space pixel                            the demo: built-in shapes, k finds x-prediction
    torchrun train.py --space latent                           the same in latents: k stays in between
    torchrun --nproc_per_node=8 train.py --space pixel --data imagenet/train           Table 4
    torchrun train.py --space pixel --data photos --dry_run    what that would do, without doing it

The same command again resumes from its last checkpoint. Everything that is set below can be set by a flag.
"""
import argparse
import csv
import io
import math
import os
import shutil
import signal
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fid
from data import (RANK, VAVAE, WORLD, Codec, ImageFolder, Latents, Order, Packed, Parser, PatchPCA, Shapes,
                  UserError, barrier, check_ranges, duration, in_short, open_dataset, print0, read_tensors,
                  run, seed_of, setup, write_atomically)
from model import gmacs
from sample import (assemble, autocast, compile_blocks, draw_curves, draw_grid, draw_k_of_t, generate_split,
                    pack_codec, precision, read_log, read_weights, sample_all)

PRESETS = {  # Table 4      latent                 pixel
    "model":               ("LightningDiT-XL/1",   "JiT-B/16"),       # JiT-B/32 at 512 px
    "image_size":          (256,                   256),
    "epochs":              (800,                   600),              # ablations: 64 and 200
    "warmup_epochs":       (0,                     5),
    "batch_size":          (1024,                  1024),
    "lr":                  (2e-4,                  2e-4),
    "k_lr":                (1.0,                   1.0),
    "ema":                 ([.9999, .9998, .9996], [.9999, .9998, .9996]),
    "t_mean":              (0.0,                   -0.8),
    "t_std":               (1.0,                   0.8),
    "noise_scale":         (1.0,                   None),             # image_size / 256
    "tau":                 (None,                  0.05),             # 0 where Delta cannot vanish, else 0.05
    "label_drop":          (0.1,                   0.1),
    "cfg":                 (1.5,                   2.9),
    "interval":            ([0.1, 1.0],            [0.1, 1.0]),
    "log_every":           (50,                    50),
    "save_every":          (1000,                  1000),
    "sample_every":        (5000,                  5000),
}
DEMO = PRESETS | {  #       latent                 pixel            A patch has more values than the network
    "model":               ("LightningDiT-demo/1", "JiT-demo/8"),   # is wide: where only x fits through (JiT)
    "image_size":          (32,                    32),
    "epochs":              (13,                    10),
    "warmup_epochs":       (0.25,                  0.25),
    "batch_size":          (64,                    64),
    "lr":                  (4e-3,                  4e-3),
    "k_lr":                (1.0,                   10.0),
    "ema":                 ([.99, .98, .95],       [.99, .98, .95]),
    "noise_scale":         (1.0,                   1.0),
    "cfg":                 (2.0,                   2.0),
    "log_every":           (20,                    20),
    "save_every":          (500,                   500),
    "sample_every":        (500,                   500),
}
SHAPES = 6_400                        # images of the demo
PCA = dict(factor=8, channels=16)     # the latent demo's tokenizer

# What a run may change when it is resumed; any other difference is refused.
HARMLESS = set("""
    out steps epochs device dtype compile activation_checkpointing micro_batch processes workers log_every
    save_every sample_every keep samples sample_steps cfg interval init data tokenizer lr k_lr clip
    warmup_epochs ema_default bench dry_run fid_every fid_ref fid_samples features weights
""".split())


def number(word):
    """The number that a --target is, or None."""
    try:
        return float(word)
    except ValueError:
        return None


def preset(space, demo, image_size=None, target="k"):
    """The defaults of one column, with what depends on the image's size and the target filled in."""
    column, table = ("latent", "pixel").index(space), DEMO if demo else PRESETS
    values = {name: row[column] for name, row in table.items()}
    size = image_size or values["image_size"]
    if values["noise_scale"] is None:
        values["noise_scale"] = size / 256
    if space == "pixel" and not demo:
        values["model"] = {256: "JiT-B/16", 512: "JiT-B/32"}.get(size)
    if values["tau"] is None:
        values["tau"] = 0.05 if target in ("x", "eps") or number(target) in (0, 1) else 0.0
    return values


def defaults():
    """(preset, whether it is the demo's) for --space, --data, --image_size and --target, read first."""
    first = Parser(None, add_help=False, allow_abbrev=False)
    for name, kind in (("--space", str), ("--data", str), ("--image_size", int), ("--target", str)):
        first.add_argument(name, type=kind, nargs="?")
    try:
        known = first.parse_known_args()[0]
    except UserError:                                           # a value of the wrong kind: parse() says so
        return preset("pixel", True), True
    space = known.space if known.space in ("pixel", "latent") else "pixel"
    demo = known.data in (None, "shapes")
    return preset(space, demo, known.image_size, known.target or "k"), demo


def make_parser(demo):
    """The flags; most of their defaults are the preset's."""
    parser = Parser(__doc__, allow_abbrev=False)
    add, yes_no = parser.add_argument_group("run").add_argument, argparse.BooleanOptionalAction
    add("--space", choices=("pixel", "latent"), default="pixel", help="of the data: the column of Table 4")
    add("--out", help="folder of checkpoints, log and pictures (default out/SPACE[-TARGET])")
    add("--steps", type=int, help="optimiser steps in all (default: from --epochs)")
    add("--epochs", type=float, help="passes over the data in all")
    add("--seed", type=int, default=0, help="of weights, order, noise, pictures")
    add("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    add("--dry_run", action="store_true", help="print what would be done, and stop")
    add("--bench", type=int, metavar="N", help="time N steps on resident data, and stop")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="folder of images or latents, or a packed array (default: shapes, the built-in demo)")
    add("--image_size", type=int, help="pixels")
    add("--flip", action=yes_no, default=True, help="mirror images of --data at random")
    add("--workers", type=int, default=0 if demo else min(8, (os.cpu_count() or 1) // WORLD),
        help="loading processes of each training process")
    add("--tokenizer", help="VA-VAE weights file, to see latents of --data as pictures")
    add = parser.add_argument_group("model").add_argument
    add("--model", help="a size that `python model.py` lists")
    add("--qk_norm", action="store_true", help="LightningDiT: normalise queries and keys")
    add("--init", metavar="CKPT", help="start from these weights, ours or published")
    add = parser.add_argument_group("objective").add_argument
    add("--target", default="k", help="x, v, eps, k, two, time, or a number in [0, 1]: k, fixed")
    add("--loss", choices=("v", "u", "x", "eps"), default="v", help="the variable whose error is squared")
    add("--t_mean", type=float, help="of the normal whose sigmoid is t")
    add("--t_std", type=float, help="of the same")
    add("--noise_scale", type=float, help="standard deviation of the noise")
    add("--tau", type=float, help="least Delta in the division")
    add("--label_drop", type=float, help="probability of training without the label")
    add_training_flags(parser)
    return parser


def add_training_flags(parser):
    """How the network is trained, and what is shown and measured on the way."""
    add, yes_no = parser.add_argument_group("optimisation").add_argument, argparse.BooleanOptionalAction
    add("--batch_size", type=int, help="images a step, over all processes")
    add("--micro_batch", type=int,
        help="images at a time on a process (default: at most 128); gradients accumulate")
    add("--lr", type=float, help="learning rate, constant after the warmup")
    add("--k_lr", type=float, help="learning rate of w as a multiple of --lr; 1 is the paper's")
    add("--warmup_epochs", type=float, help="of linear warmup")
    add("--ema", type=float, nargs="+", help="decays of the averages of the weights")
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0: none")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of autocast (default: bfloat16 on GPUs that have it)")
    add("--compile", action=yes_no, help="compile each block (default: on GPUs, but for the demo)")
    add("--activation_checkpointing", action="store_true",
        help="recompute activations: less memory, more time")
    add = parser.add_argument_group("logging").add_argument
    add("--log_every", type=int, help="steps")
    add("--save_every", type=int, help="steps between checkpoints")
    add("--keep", type=int, default=0, help="older checkpoints to keep beside ckpt.pt")
    add("--sample_every", type=int, help="steps between pictures; 0: only at the end")
    add("--samples", type=int, help="images in a picture; 0: no pictures")
    add("--sample_steps", type=int, help="solver steps for pictures (default 25; for --data on a GPU 50)")
    add("--cfg", type=float, help="guidance scale of pictures")
    add("--interval", type=float, nargs=2, help="times between which guidance acts")
    add("--fid_every", type=int, default=0, help="steps between evaluations; 0: none")
    add("--fid_ref", help="reference statistics (python fid.py --make_ref)")
    add("--fid_samples", type=int, default=50_000, help="images an evaluation, over all processes")
    add("--features", choices=list(fid.EXTRACTORS), default="inception",
        help="pixels: a distance without weights, no FID")
    add("--weights", help="Inception weights file (default: downloaded once)")


def parse():
    """The command line, over the preset that it chooses. UserError for values that cannot work."""
    values, demo = defaults()
    parser = make_parser(demo)
    parser.set_defaults(**values)
    args = parser.parse_args()
    args.data = None if args.data == "shapes" else args.data
    check_ranges(args, batch_size=1, log_every=1, save_every=1, micro_batch=1, image_size=1, steps=1, bench=1,
                 epochs=0, sample_every=0, samples=0, sample_steps=1, keep=0, workers=0, fid_every=0,
                 fid_samples=2, lr=0, k_lr=0, clip=0, warmup_epochs=0, label_drop=0, noise_scale=0, t_std=0,
                 tau=0)
    if args.fid_every and not args.fid_ref:
        raise UserError("--fid_every needs --fid_ref: statistics made by `python fid.py --make_ref`")
    if args.tau == 0 and (args.target == "eps" or number(args.target) == 0):
        raise UserError(f"--tau 0 with --target {args.target} divides by zero at t = 0: try --tau 0.05")
    if not all(0 < decay < 1 for decay in args.ema):
        raise UserError(f"--ema {' '.join(map(str, args.ema))}: decays lie between 0 and 1")
    if args.model is None:
        raise UserError(f"--image_size {args.image_size} has no network in Table 4: "
                        "name one, such as --model JiT-B/16")
    args.out = Path(args.out or f"out/{args.space}" + (f"-{args.target}" if args.target != "k" else ""))
    return args


# ------------------------------------------------------------------------------------------------------------
# Data

def open_data(args):
    """The dataset and the Codec that makes it the network's x. UserError where data and space do not fit."""
    demo = args.data is None
    data = Shapes(SHAPES, args.image_size) if demo else open_dataset(args.data, args.image_size)
    data.flips, data.seed = data.flips and args.flip, args.seed
    if args.space == "pixel":
        if isinstance(data, Latents):
            raise UserError(f"--data {args.data} holds latents: pass --space latent")
        return data, Codec()
    if demo:
        if args.image_size % PCA["factor"]:
            raise UserError(f"--image_size {args.image_size} is no multiple of the patch, {PCA['factor']} px")
        images = torch.stack([data[i][0] for i in range(1024)]).float() / 127.5 - 1
        tokenizer = PatchPCA.fit(images, **PCA)
        z = tokenizer.encode(images)
        return data, Codec(tokenizer, z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True))
    if isinstance(data, (ImageFolder, Packed)):
        raise UserError(f"--data {args.data} holds images: run `python data.py encode {args.data} "
                        f"--tokenizer FILE --image_size {args.image_size} --out latents` "
                        "and pass --data latents")
    C, h, w = data.shape
    if h != w or args.image_size != h * VAVAE.factor:
        raise UserError(f"--data {args.data} holds latents of {h}x{w}: "
                        f"they fit --image_size {h * VAVAE.factor}, not {args.image_size}")
    if args.tokenizer and C != VAVAE.channels:
        raise UserError(f"--data {args.data} holds latents of {C} channels: --tokenizer has {VAVAE.channels}")
    codec = Codec(VAVAE(args.tokenizer) if args.tokenizer else None, data.mean, data.std)
    some = codec.encode(torch.stack([data[i][0] for i in range(0, len(data), max(1, len(data) // 64))]))
    if not 0.5 < some.std().item() < 2:
        raise UserError(f"--data {args.data}: normalised latents have std {some.std().item():.2f}, "
                        "not about 1: the statistics belong to other latents")
    return data, codec


def fingerprint(data):
    """A word that tells datasets apart wherever they lie: their size, classes and some of their items."""
    some = [data[i] for i in sorted({0, len(data) // 2, len(data) - 1})]
    return f"{seed_of(len(data), data.classes, [(item.numpy().tobytes(), label) for item, label in some]):x}"


# ------------------------------------------------------------------------------------------------------------
# One step

class EMA:
    """Exponential moving averages of the same parameters at several decays, each a list of tensors."""

    def __init__(self, parameters, decays):
        self.parameters = list(parameters)
        self.averages = {str(decay): [p.detach().clone() for p in self.parameters] for decay in decays}

    @torch.no_grad()
    def update(self, good):
        """average += (1 - decay) (parameter - average), where `good` (0-d, 0 or 1): a step was taken."""
        for decay, average in self.averages.items():
            torch._foreach_lerp_(average, self.parameters, [(1 - float(decay)) * good] * len(average))

    @contextmanager
    def swapped(self, decay):
        """Within: the parameters are the average of that decay."""
        def swap():
            for p, average in zip(self.parameters, self.averages[decay]):
                p.data, average.data = average.data, p.data
        swap()
        try:
            yield
        finally:
            swap()


class Step:
    """Everything that one optimiser step touches. Nothing in it waits for the device."""

    def __init__(self, kdiff, codec, args, device):
        self.kdiff, self.codec, self.args, self.device = kdiff, codec, args, device
        self.parameters = [p for p in kdiff.parameters() if p.requires_grad]
        groups = [{"params": list(kdiff.net.parameters())}]
        groups += [] if kdiff.w is None else [{"params": [kdiff.w]}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.ema = EMA(self.parameters, args.ema)
        self.sums = torch.zeros(3, device=device)        # since the last log line: steps, loss, norm
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)    # in all, in a row, longest row
        if args.compile:
            compile_blocks(kdiff.net)
        kdiff.net.checkpointing = args.activation_checkpointing
        warnings.filterwarnings("ignore", message=".*broadcast_buffers")     # renamed in torch 2.13
        self.model = kdiff if WORLD == 1 else DistributedDataParallel(
            kdiff, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
            gradient_as_bucket_view=True)

    def __call__(self, batch, labels, seeds, warm):
        """One step on this process's share of a batch; seeds: an integer an image; warm: warmup's factor."""
        for group, rate in zip(self.optimizer.param_groups, (self.args.lr, self.args.lr * self.args.k_lr)):
            group["lr"] = rate * warm
        loss_sum, n, m = torch.zeros((), device=self.device), len(batch), self.args.micro_batch
        for i in range(0, n, m):
            x = self.codec.encode(batch[i:i + m].to(self.device, non_blocking=True))
            y = labels[i:i + m].to(self.device, non_blocking=True)
            with nullcontext() if i + m >= n or WORLD == 1 else self.model.no_sync():
                with autocast(self.device, self.args.dtype):
                    loss = self.model(x, y, seeds[i:i + m]) * (len(x) / n)
                # a loss that is not finite makes every gradient so, and through DDP's sum on every process
                loss.backward(torch.where(loss.isfinite(), 1.0, torch.nan))
            loss_sum += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters])
        if self.args.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.args.clip, norm)
        good = norm.isfinite()
        self.optimizer.found_inf = 1.0 - good.float()    # then the kernel leaves weights and moments alone
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(good.float())
        self.sums += torch.where(good, torch.stack([torch.ones_like(norm), loss_sum, norm]), 0.0)
        total, row, longest = self.skipped.unbind()
        row = (row + 1) * ~good
        self.skipped = torch.stack([total + ~good, row, torch.maximum(longest, row)])

    def read(self):
        """(mean loss, mean gradient norm, steps skipped, longest row of them); waits for the device."""
        sums = self.sums.clone()
        if WORLD > 1:
            dist.all_reduce(sums)
        steps, loss, norm = (sums / WORLD).tolist()
        self.sums.zero_()
        total, _, longest = self.skipped.tolist()
        steps = steps or math.nan                        # where every step was skipped there is no mean
        return loss / steps, norm / steps, total, longest


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and interruptions

def save(path, step, it, config, data_state, keep):
    """Write a checkpoint, whole or not at all, and keep `keep` older ones under their step's number."""
    def full(tensors):                                   # a KDiff state dict whose parameters are these
        return {**it.kdiff.state_dict(), **dict(zip(names, tensors))}
    names = [name for name, p in it.kdiff.named_parameters() if p.requires_grad]
    every = [*it.parameters, *(t for average in it.ema.averages.values() for t in average),
             *(t for state in it.optimizer.state.values() for t in state.values())]
    if not torch.stack([t.isfinite().all() for t in every]).all():
        raise UserError(f"the weights after step {step} are not finite: {path} keeps what it held; "
                        "try a lower --lr")
    if RANK:
        return
    checkpoint = {"step": step, "model": it.kdiff.state_dict(), "optimizer": it.optimizer.state_dict(),
                  "ema": {decay: full(average) for decay, average in it.ema.averages.items()},
                  "skipped": it.skipped.tolist(), "config": config, "data": data_state}
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))
    if keep:
        older = path.with_name(f"ckpt-{step:08}.pt")
        write_atomically(older, lambda temporary: link_or_copy(path, temporary))
        for old in sorted(path.parent.glob("ckpt-*.pt"))[:-keep - 1]:
            old.unlink()


def agree(start, out):
    """UserError where the processes resume at different steps: their machines see different folders."""
    ends = torch.tensor([start, -start])
    if WORLD > 1:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise UserError(f"--out {out} is not the same folder on all machines: share it")


def link_or_copy(source, target):
    """A second name for a file, or its copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def resume(path, it, config):
    """Load a checkpoint into the step; returns its number. UserError, naming what differs, for others."""
    file = read_tensors(path)
    try:
        before = file["config"]
        differs = [key for key in {**config, **before} if before.get(key) != config.get(key)]
        first = ("model", "target", "fingerprint")
        for key in sorted(set(differs) - HARMLESS, key=lambda key: key not in first):
            what = "other data" if key == "fingerprint" else f"{key} {before.get(key)}, not {config.get(key)}"
            raise UserError(f"--out {path.parent} holds a run with {what}: name another --out, or remove it")
        for key in differs:
            print0(f"resuming with {key} {config.get(key)}, before: {before.get(key)}")
        it.kdiff.load_state_dict(file["model"])
        names = [name for name, p in it.kdiff.named_parameters() if p.requires_grad]
        for decay, average in it.ema.averages.items():
            torch._foreach_copy_(average, [file["ema"][decay][name].to(it.device) for name in names])
        it.optimizer.load_state_dict(file["optimizer"])
        it.skipped = torch.tensor([file["skipped"][0], 0, 0], device=it.device)
        return file["step"]
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: of another program or version, name another --out or remove it "
                        f"({in_short(error)})") from None


class Interrupt:
    """SIGTERM and SIGINT ask the loop to finish its step and save; where all is saved they end at once."""

    def __init__(self):
        self.signal, self.at_once = 0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        """The handler of the signals."""
        self.signal = self.signal or number
        if self.at_once:
            print0(f"stopped by signal {self.signal}; the step is saved: the same command continues")
            self.leave()

    def leave(self):
        """End the process, not through exit handlers that would wait for the other processes."""
        os._exit(128 + self.signal)

    def anywhere(self):
        """Whether any process was asked to stop: all must leave after the same step. Asked on the CPU."""
        flag = torch.tensor(float(self.signal))
        if WORLD > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.signal = self.signal or int(flag)
        return bool(flag)


# ------------------------------------------------------------------------------------------------------------
# What a run shows

COLUMNS = ("step", "epoch", "loss", "k", "k1", "k2", "lr", "grad", "img_per_s", "skipped", "fid", "is",
           "pixel_distance")


class Log:
    """log.csv, a row at a time; a resumed run first drops the rows that it is going to write again."""

    def __init__(self, path, step):
        rows = []
        if step and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file)
                        if (row["step"] or "x").isdigit() and int(row["step"]) <= step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))
        self.file = open(path, "a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, extrasaction="ignore")

    def row(self, **values):
        """Write values, by column, at once."""
        self.writer.writerow(values)
        self.file.flush()


def show(args, it, codec, data, step, last):
    """The pictures of a run at this step: samples of the default average, curves, k(t). On one process."""
    out, written = args.out, []
    if args.samples and codec.decodes:
        rows = min(8, len(data.classes), args.samples)
        columns = -(-args.samples // rows)
        with it.ema.swapped(args.ema_default):
            it.kdiff.eval()
            labels = [j // columns for j in range(rows * columns)]
            images = sample_all(it.kdiff, codec, labels, 64, cfg=args.cfg, interval=args.interval,
                                steps=args.sample_steps, dtype=args.dtype)
            it.kdiff.train()
        written.append(out / ("samples.png" if last else f"samples-{step:07}.png"))
        draw_grid(images, data.classes[:rows], written[-1], columns)
    names = ("k1", "k2") if args.target == "two" else ("k",)
    panels = [("loss",), names, ("fid",), ("pixel_distance",)]
    curves = [(" and ".join(panel), "step", {name: read_log(out, name) for name in panel})
              for panel in panels]
    curves = [panel for panel in curves if any(xs for xs, _ in panel[2].values())]
    if curves:                                           # none before the first line of the log
        written.append(out / "curves.png")
        draw_curves(curves, written[-1])
    if args.target == "time":
        draw_k_of_t(it.kdiff, out / "k_of_t.png")
        written.append(out / "k_of_t.png")
    return written


def evaluate(args, it, codec, data, extractor, reference):
    """Distance and score of --fid_samples samples of the default average; all processes take part."""
    with it.ema.swapped(args.ema_default):
        it.kdiff.eval()
        samples = generate_split(it.kdiff, codec, range(len(data.classes)), args.fid_samples, 64,
                                 cfg=args.cfg, interval=args.interval, dtype=args.dtype)
        measured = ((images, indices[0]) for images, _, indices in samples)
        result = fid.evaluate(measured, extractor, reference, it.device)
        it.kdiff.train()
    fid.show(result, reference, extractor.sha256, dict(
        ema=args.ema_default, cfg=args.cfg, interval=args.interval, solver="heun", steps=50, seed=0,
        dtype=precision(it.device, args.dtype)))
    result = {"is" if name == "is_mean" else name: value for name, value in result.items()}
    return result


def bench(it, args, data, gflops):
    """Time `--bench N` steps on one resident batch after warm-up, beside a matrix product's rate."""
    share = args.batch_size // WORLD
    items = [data[i % len(data)] for i in range(share)]
    batch = torch.stack([x for x, _ in items]).to(it.device)
    labels = torch.tensor([y for _, y in items]).to(it.device)
    cuda = it.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    with autocast(it.device, args.dtype):
        dtype = torch.mm(*[torch.ones(1, 1, device=it.device)] * 2).dtype
    a, b = torch.randn(2, *[8192 if cuda else 2048] * 2, device=it.device, dtype=dtype)
    rates, times = [], []
    for i in range(args.bench + 3):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        middle = time.perf_counter()
        it(batch, labels, [seed_of(args.seed, i, n) for n in range(share)], 1.0)
        wait()
        rates.append(2 * len(a) ** 3 / (middle - start) / 1e12)
        times.append(time.perf_counter() - middle)
    seconds, peak = sorted(times[3:])[args.bench // 2], sorted(rates[3:])[args.bench // 2]
    rate = 6 * gflops * share / seconds / 1e3              # forward and backward: 3 forwards of 2 flops each
    memory = f" | peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if cuda else ""
    print0(f"{seconds * 1e3:.1f} ms per step (median of {args.bench}) | "
           f"{args.batch_size / seconds:,.1f} images/s | {rate:.3f} TFLOP/s per process = {rate / peak:.0%} "
           f"of a {len(a)}x{len(a)} {dtype} product's {peak:.3f}{memory}")


def prepare(args, device):
    """Settle what depends on data and machine: (data, codec, config, steps per epoch). Fills in args."""
    data, codec = open_data(args)
    share = args.batch_size // WORLD
    if args.batch_size % WORLD:
        raise UserError(f"--batch_size {args.batch_size} does not divide over {WORLD} processes: "
                        f"try {max(share, 1) * WORLD}")
    args.micro_batch = args.micro_batch or next(m for m in range(min(share, 128), 0, -1) if share % m == 0)
    if share % args.micro_batch:
        fits = next(m for m in range(min(share, args.micro_batch), 0, -1) if share % m == 0)
        raise UserError(f"--micro_batch {args.micro_batch} does not divide the {share} images of a process: "
                        f"try {fits}")
    per_epoch = len(data) / args.batch_size
    args.steps = args.steps or max(1, round(args.epochs * per_epoch))
    if args.compile is None:                         # the demo would end before compiling does
        args.compile = device.type == "cuda" and args.data is not None
    if args.samples is None:                         # on a CPU a large network's picture takes long
        args.samples = 64 if args.data is None or device.type == "cuda" else 4
    args.sample_steps = args.sample_steps or (50 if args.data and device.type == "cuda" else 25)
    fit = [decay for decay in args.ema if decay ** args.steps < 0.01]    # the initial weights have faded here
    args.ema_default = str(max(fit) if fit else min(args.ema))
    pixel = args.space == "pixel"
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()} | {
        "net_size": args.image_size if pixel else args.image_size // (codec.tokenizer or VAVAE).factor,
        "in_channels": 3 if pixel else codec.mean.shape[1], "num_classes": len(data.classes),
        "fingerprint": fingerprint(data), "processes": WORLD}
    return data, codec, config, per_epoch


def describe(args, config, kdiff, gflops, per_epoch):
    """The settings that made a run, and what the command does with them."""
    print0("settings  " + "  ".join(
        f"{key}={value}" for key, value in config.items()
        if value is not None and key not in ("out", "steps", "epochs", "dry_run", "bench")))
    params = sum(p.numel() for p in kdiff.net.parameters())
    print0(f"network   {args.model}: {params / 1e6:,.1f}M parameters, "
           f"{gflops:.2f} Gflops an image and forward")
    print0(f"batch     {args.batch_size} = {WORLD} processes "
           f"x {args.batch_size // WORLD // args.micro_batch} micro batches x {args.micro_batch} images")
    print0(f"steps     {args.steps:,} = {args.steps / per_epoch:,.2f} epochs of {per_epoch:,.1f} steps")
    print0(f"writes to {args.out}")


def start_from(path, kdiff, args):
    """Load a checkpoint's network, ours or published, and its w where the target is the same."""
    source, weights, *_ = read_weights(path)
    if source["target"] != args.target:
        weights = {key: value for key, value in weights.items() if key != "w"}
        weights |= {key: value for key, value in kdiff.state_dict().items() if key == "w"}
    try:
        kdiff.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"--init {path}: not a {args.model} for this data ({in_short(error)})") from None
    if source["target"] != args.target:
        print0(f"--init {path} predicts {source['target']}, this run {args.target}: "
               "its output is read as another variable until training has adapted it")


def batches(data, args, start, device):
    """(batch, labels) of this process for the steps left, in an order that the step alone decides."""
    order = Order(len(data), args.batch_size, args.seed, start, args.steps, RANK, WORLD)
    return torch.utils.data.DataLoader(
        data, batch_sampler=order, num_workers=args.workers, pin_memory=device.type == "cuda",
        prefetch_factor=4 if args.workers else None, worker_init_fn=ignore_signals)


def ignore_signals(worker):
    """A loader's worker ends with its parent, not with the Ctrl-C that asks the parent to save first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def main():
    """Train, from the last checkpoint where there is one; the loop."""
    args = parse()
    device, rank, _ = setup(args.device)
    data, codec, config, per_epoch = prepare(args, device)
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):                 # a dry run needs no weights
        kdiff = assemble(config)
    gflops = gmacs(kdiff.net)
    describe(args, config, kdiff, gflops, per_epoch)
    if args.dry_run:
        return
    if args.init:
        start_from(args.init, kdiff, args)
    kdiff, codec, tokenizer = kdiff.to(device).train(), codec.to(device), args.tokenizer
    it = Step(kdiff, codec, args, device)
    if args.fid_every:
        if not codec.decodes:
            raise UserError("--fid_every needs --tokenizer to make images of latents")
        extractor = fid.make_extractor(args.features, args.weights, device)
        reference = fid.load_reference(args.fid_ref, args.features)
        reference.check((args.image_size,) * 2, extractor.sha256)
    if args.bench:
        return bench(it, args, data, gflops)

    args.out.mkdir(parents=True, exist_ok=True)
    path, start = args.out / "ckpt.pt", 0
    due = lambda step: args.fid_every and step > 0 and (step % args.fid_every == 0 or step == args.steps)
    missed = False
    if path.exists():
        start = resume(path, it, config)
        missed = due(start) and start not in read_log(args.out, extractor.key)[0]      # killed while it was
        if start >= args.steps and not missed and (not args.samples or (args.out / "samples.png").exists()):
            return print0(f"{path} is finished at step {start:,}: nothing to do "
                          "(--steps for more, --out for another run)")
        print0(f"resuming from {path} at step {start:,}")
    agree(start, args.out)
    if args.ema_default != str(max(args.ema)) or float(args.ema_default) ** args.steps >= 0.01:
        print0(f"EMA       {max(args.ema)} averages over {1 / (1 - max(args.ema)):,.0f} steps "
               f"and the run has {args.steps:,}: pictures show {args.ema_default}; --ema sets others")
    state = {"classes": data.classes, **pack_codec(codec, tokenizer)}
    log = Log(args.out / "log.csv", start) if rank == 0 else None
    interrupt, run.each_for_itself = Interrupt(), True    # from here on a process reports what it alone meets
    warmup, share, saved = args.warmup_epochs * per_epoch, args.batch_size // WORLD, start
    began = ticked = time.time()
    logged = start

    def evaluate_and_log(step):
        interrupt.at_once = True                         # the step is saved, a resumed run evaluates again
        result = evaluate(args, it, codec, data, extractor, reference)
        if log:
            log.row(step=step, epoch=f"{step / per_epoch:.4f}", **result)
        interrupt.at_once = False
    if missed:
        evaluate_and_log(start)
    for step, (batch, labels) in enumerate(batches(data, args, start, device), start):
        seeds = [seed_of(args.seed, step, position) for position in range(rank * share, (rank + 1) * share)]
        warm = min(1.0, (step + 1) / max(warmup, 1))
        it(batch, labels, seeds, warm)
        step += 1
        leave = interrupt.anywhere()
        if step % args.log_every == 0 or step == args.steps or leave:
            loss, grad, skipped, longest = it.read()
            speed = (step - logged) * args.batch_size / (time.time() - ticked)
            ks, ticked, logged = {name: k.item() for name, k in kdiff.ks().items()}, time.time(), step
            left = duration((ticked - began) / (step - start) * (args.steps - step))
            print0(f"step {step:,}/{args.steps:,} | epoch {step / per_epoch:.1f} | loss {loss:.4f} | "
                   + " | ".join(f"{name} {k:.3f}" for name, k in ks.items())
                   + f" | lr {args.lr * warm:.1e} | grad {grad:.2f} | {speed:,.0f} img/s | eta {left}"
                   + (f" | skipped {skipped}" if skipped else ""))
            if log:
                if "k1" in ks:
                    ks["k"] = ks["k1"] / (ks["k1"] + ks["k2"])
                log.row(step=step, epoch=f"{step / per_epoch:.4f}", loss=f"{loss:.6g}",
                        lr=f"{args.lr * warm:.6g}", grad=f"{grad:.6g}", img_per_s=f"{speed:.1f}",
                        skipped=skipped, **{name: f"{k:.6f}" for name, k in ks.items()})
            if longest >= 10:
                run.each_for_itself = False                      # all processes meet this one
                raise UserError("10 steps in a row had a loss or gradient that is not finite; "
                                f"{path} at step {saved} is intact: "
                                "try a lower --lr, --clip 1, --qk_norm or --dtype float32")
        if step % args.save_every == 0 or step == args.steps or leave or due(step):
            save(path, step, it, config, state, args.keep)
            saved = step
        if leave:
            barrier()                                        # until the first process has written it
            print0(f"stopped by signal {interrupt.signal} after step {step:,}, saved in {path}: "
                   "the same command continues")
            interrupt.leave()
        paused = time.time()
        if due(step):
            evaluate_and_log(step)
        if rank == 0 and step < args.steps and args.sample_every and step % args.sample_every == 0:
            show(args, it, codec, data, step, last=False)
        ticked += time.time() - paused
    if rank == 0:
        interrupt.at_once = True                             # all is saved: nothing can be lost from here on
        written = show(args, it, codec, data, args.steps, last=True)
        print0(f"done in {duration(time.time() - began)}. Look at " + ", ".join(map(str, written))
               + f"; more samples: python sample.py {path}")


if __name__ == "__main__":
    run(main)
