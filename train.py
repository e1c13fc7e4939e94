"""The training loop: one process or many, from a laptop's minute to Table 4 on ImageNet.

    torchrun train.py --space pixel                            the demo: built-in shapes, k finds x-prediction
    torchrun train.py --space latent                           the same in latents: k stays in between
    torchrun --nproc_per_node=8 train.py --space pixel --data imagenet/train           Table 4
    torchrun train.py --space pixel --data photos --image_size 64 --preset small       your own pictures

The same command again resumes from its last checkpoint; --dry_run prints what a command would do.
"""
import argparse
import csv
import math
import os
import signal
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data import (LOCAL_WORLD, RANK, VAVAE, WORLD, Codec, Latents, PatchPCA, all_reduce, barrier,
                  check_ranges, checked, leave, need, new_parser, open_dataset, order, print0, read_tensors,
                  run, seed_of, setup, some_items, write_atomically)
from model import gmacs
from objective import LOSSES, TARGETS, fixed_k, k_of_innovation
from sample import (assemble, autocast, compile_network, draw_curves, draw_k_of_t, draw_spectrum,
                    fastest_dtype, grid, pack_codec, read_log, read_rows, read_weights, sample_all, shape_of,
                    unpack_codec, write_rows)

TABLE_4 = {   #      latent                  pixel                   the flag's help
    "model":         ("LightningDiT-XL/1",    None,                   "a size that `python model.py` lists"),
    "image_size":    (256,                    256,                    "pixels"),
    "epochs":        (800.0,                  600.0,                  "passes over the data"),
    "warmup_epochs": (0.0,                    5.0,                    "of linear warmup"),
    "batch_size":    (1024,                   1024,                   "images a step, over all processes"),
    "lr":            (2e-4,                   2e-4,                   "learning rate after the warmup"),
    "k_lr":          (1.0,                    1.0,                    "that of w, a multiple of --lr"),
    "ema":           ([.9999, .9998, .9996],  [.9999, .9998, .9996],  "decays of averages of the weights"),
    "t_mean":        (0.0,                    -0.8,                   "of the normal whose sigmoid is t"),
    "t_std":         (1.0,                    0.8,                    "of the same"),
    "noise_scale":   (1.0,                    None,                   "in pixels image_size / 256"),
    "tau":           (None,                   0.05,                   "least Delta; 0 if it cannot vanish"),
    "label_drop":    (0.1,                    0.1,                    "probability of having no label"),
    "cfg":           (1.5,                    2.9,                    "guidance scale of pictures"),
    "interval":      ([0.1, 1.0],             [0.1, 1.0],             "times within which guidance acts"),
    "log_every":     (50,                     50,                     "steps"),
    "save_every":    (1000,                   1000,                   "steps between checkpoints"),
    "sample_every":  (5000,                   5000,                   "steps between pictures; 0: none"),
    "tokenizer":     (None,                   None,                   "pca (of patches), or VA-VAE weights"),
}
# What other presets change, (latent, pixel) where the two differ. The demo's patch has more values than its
# network is wide, so that only x fits through (JiT); small is for 1,000 to 50,000 pictures at 64 to 128 px.
PRESETS = {
    "paper": {},
    "demo": dict(model=("LightningDiT-demo/1", "JiT-demo/8"), image_size=32, epochs=(13.0, 10.0),
                 warmup_epochs=0.25, batch_size=64, lr=4e-3, k_lr=(1.0, 10.0), ema=[.99, .98, .95],
                 noise_scale=1.0, cfg=2.0, log_every=20, save_every=500, sample_every=500,
                 tokenizer=("pca", None)),
    "small": dict(model=("LightningDiT-S/1", None), image_size=64, epochs=400.0, batch_size=64, lr=5e-4,
                  k_lr=(1.0, 10.0), ema=[.9995, .999, .995], noise_scale=1.0, cfg=None, log_every=20,
                  save_every=500, sample_every=1000, tokenizer=("pca", None)),
}
FASHION = PRESETS["demo"] | dict(epochs=4.267, warmup_epochs=0.03, ema=[.999, .998, .995], save_every=1000,
                                 sample_every=1000)                         # the demo on 60,000 pictures
COMPONENTS = ("channel", "asym")      # targets that take the principal components of patches as channels

# What a resumed run must share with its checkpoint; all else may change, and is told.
FIXED = ("model", "target", "space", "loss", "images", "num_classes", "net_size", "in_channels", "batch_size",
         "seed", "flip", "qk_norm", "ema", "t_mean", "t_std", "noise_scale", "tau", "label_drop")

def train(state, codec, data, args, device):
    """Algorithm 1 from state.step on. Yields (loss, gradient norm, learning rate) after every step.
    state: a State. data, codec: a dataset, and what makes its items the network's x. args needs steps, seed,
    batch_size, micro_batch, workers, lr, k_lr, warmup_epochs, clip, dtype. The loss is this process's; the
    norm of a step that was skipped is not finite. Whoever drives the loop logs, saves, shows, stops."""
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")             # renamed in torch 2.13
    model = state.kdiff if WORLD == 1 else DistributedDataParallel(
        state.kdiff, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
        gradient_as_bucket_view=True)
    warmup, share = args.warmup_epochs * len(data) / args.batch_size, args.batch_size // WORLD

    # draw a batch: uint8 images or latents (share, ...), labels (share,), in the order of data.order
    for step, (batch, labels) in enumerate(batches(data, args, state.step, device), state.step):
        # noise, t and label drop of an image follow from the step and its place in the global batch
        seeds = [seed_of(args.seed, step, n) for n in range(RANK * share, (RANK + 1) * share)]

        # the learning rate: linear warmup, then constant; w has a multiple of its own
        lr = args.lr * min(1.0, (step + 1) / max(warmup, 1))
        for group, factor in zip(state.optimizer.param_groups, (1.0, args.k_lr)):
            group["lr"] = lr * factor

        # forward and backward; gradients accumulate over micro batches, and over processes at the last
        loss = 0.0
        for i in range(0, share, args.micro_batch):
            part = slice(i, i + args.micro_batch)
            x = codec.encode(batch[part].to(device, non_blocking=True))                  # (N, C, H, W)
            y = labels[part].to(device, non_blocking=True)                               # (N,)
            with model.no_sync() if WORLD > 1 and i + args.micro_batch < share else nullcontext():
                with autocast(device, args.dtype):
                    mean = model(x, y, seeds[part]) * (len(x) / share)
                # a loss that is not finite makes every gradient so, and through DDP's sum on every process
                mean.backward(torch.where(mean.isfinite(), 1.0, torch.nan))
            loss = loss + mean.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in state.parameters])
        if args.clip:
            torch.nn.utils.clip_grads_with_norm_(state.parameters, args.clip, norm)

        # skip what is not finite, on all processes alike: the one place where a step waits for the device
        loss, norm = torch.stack([loss, norm]).tolist()
        if math.isfinite(norm):
            # update the weights, then their averages, which sample: decay * average + (1 - decay) * weight
            state.optimizer.step()
            for decay, average in state.averages.items():
                get_ema_multi_avg_fn(float(decay))(average, state.parameters, None)
        state.optimizer.zero_grad(set_to_none=True)
        state.step = step + 1
        yield loss, norm, lr

def main():
    """Train, from the last checkpoint where there is one; log, save and show on the way."""
    args = parse()
    device = setup(args.device)
    data, codec = open_data(args)
    config = settle(args, data, codec, device)
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):                        # a dry run needs no weights
        kdiff = assemble(config)
    describe(args, config, kdiff, data)
    if args.dry_run:
        return time_a_step(args, config, device)
    path = args.out / "ckpt.pt"
    if args.init and not path.exists():
        start_from(args.init, kdiff, args, len(data.classes))
    state = State(kdiff.to(device).train(), args.ema)
    codec = resume(path, state, codec, config, args, data).to(device)
    if state.step >= args.steps and (not args.samples or (args.out / "samples.png").exists()):
        return print0(f"{path} is finished at step {state.step:,}: nothing to do "
                      "(--steps for more, --out for another run)")
    if args.compile:
        compile_network(kdiff.net)
    kdiff.net.checkpointing = args.activation_checkpointing
    saved, log, asked = state.step, Log(args.out / "log.csv", state, args, data), []
    on_signals(lambda number, frame: asked.append(number))

    for loss, norm, lr in train(state, codec, data, args, device):
        stop = agreed(asked[0] if asked else 0)            # by any process: all leave after the same step
        last = state.step == args.steps or stop
        # log
        log.add(loss, norm)
        if state.step % args.log_every == 0 or last:
            log.write(lr)
        need(log.bad_in_a_row < 10, "10 steps in a row had a loss or gradient that is not finite; "
             f"{path} at step {saved} is intact: try a lower --lr, --clip 1, --qk_norm or --dtype float32")
        # save
        if state.step % args.save_every == 0 or last:
            save(path, state, config, codec, data)
            saved = state.step
        if args.keep_every and state.step % args.keep_every == 0:
            save(args.out / f"ckpt-{state.step:07}.pt", state, config, codec, data)
        if stop:
            barrier()                                      # until the first process has written it
            print0(f"stopped by signal {stop} after step {state.step:,}; the same command resumes {path}")
            leave(128 + stop)
        # show
        if args.sample_every and state.step % args.sample_every == 0 and not last:
            if RANK == 0:
                show(args, state, codec, data, config, last=False)
            barrier()                                      # what the others wait is not counted as training
            log.restart()
    on_signals(signal.SIG_DFL)                             # all is saved: nothing can be lost from here on
    if RANK == 0:
        written = ", ".join(map(str, show(args, state, codec, data, config, last=True)))
        print0(f"done in {timedelta(seconds=int(time.perf_counter() - log.began))}. Look at {written}; "
               f"more samples: python sample.py {path}")

# ---- What training changes, and its checkpoints ------------------------------------------------------------

class State:
    """A KDiff, its optimizer, the averages of its weights at several decays, the number of steps taken."""

    def __init__(self, kdiff, decays):
        self.kdiff, self.step, self.skipped = kdiff, 0, 0
        self.names, self.parameters = zip(*((n, p) for n, p in kdiff.named_parameters() if p.requires_grad))
        groups = [{"params": list(kdiff.net.parameters())}]
        groups += [] if kdiff.w is None else [{"params": [kdiff.w]}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.averages = {str(decay): [p.detach().clone() for p in self.parameters] for decay in decays}

    @contextmanager
    def averaged(self, decay):
        """Within: the network is the average of that decay, ready to sample."""
        def swap():
            for p, average in zip(self.parameters, self.averages[decay]):
                p.data, average.data = average.data, p.data
        swap()
        try:
            yield self.kdiff.eval()
        finally:
            swap()
            self.kdiff.train()

def save(path, state, config, codec, data):
    """Write a checkpoint, whole or not at all. UserError where the weights are not finite."""
    every = [*state.parameters, *(t for average in state.averages.values() for t in average),
             *(t for moments in state.optimizer.state.values() for t in moments.values())]
    need(torch.stack([t.isfinite().all().to(state.parameters[0].device) for t in every]).all(),
         f"the weights after step {state.step} are not finite: {path} keeps what it held; try a lower --lr")
    weights = state.kdiff.state_dict()
    checkpoint = {"step": state.step, "model": weights, "optimizer": state.optimizer.state_dict(),
                  "ema": {decay: weights | dict(zip(state.names, average))
                          for decay, average in state.averages.items()},
                  "skipped": state.skipped, "config": config,
                  "data": {"classes": data.classes, **pack_codec(codec, config["tokenizer"])}}
    if RANK == 0:
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))

def resume(path, state, codec, config, args, data):
    """Load the checkpoint, if any, into the state; returns its codec. UserError, naming what differs."""
    if path.exists():
        file = read_tensors(path, mmap=state.parameters[0].is_cuda)      # many processes share one copy
        with checked(path, "of this version", remedy="; name another --out or remove it"):
            before = file["config"]
            for key in FIXED:
                need(before.get(key) == config[key], f"--out {path.parent} holds a run with {key} "
                     f"{before.get(key)}, not {config[key]}: name another --out, or remove it")
            need(file["data"]["classes"] == data.classes,
                 f"--out {path.parent} holds a run with other data: name another --out, or remove it")
            for key in sorted({*before, *config} - {"out", "data"}):
                if before.get(key) != config.get(key):
                    print0(f"resuming with {key} {config.get(key)}, before: {before.get(key)}")
            state.kdiff.load_state_dict(file["model"])
            for decay, average in state.averages.items():
                for name, tensor in zip(state.names, average):
                    tensor.copy_(file["ema"][decay][name])
            state.optimizer.load_state_dict(file["optimizer"])
            state.step, state.skipped = file["step"], file["skipped"]
            codec = unpack_codec(file["data"], args.tokenizer if args.tokenizer != "pca" else None)
        print0(f"resuming from {path} at step {state.step:,}")
    need(agreed(state.step) == -agreed(-state.step), f"--out {path.parent}: to be shared by all machines")
    return codec

# ---- Settings: a flag, else the preset's value -------------------------------------------------------------

def parse():
    """The command line over its preset."""
    parser, yes_no = new_parser(__doc__), argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--space", choices=("pixel", "latent"), default="pixel", help="column of Table 4 (default pixel)")
    add("--data", default="shapes", help="shapes, fashion, or a path: images, latents, a packed .npy")
    add("--data_dir", help="where the files of --data fashion lie, if not where they are looked for")
    add("--preset", choices=list(PRESETS), help="other defaults (demo for built-in data, else paper)")
    add("--out", help="folder of checkpoints, log and pictures (default out/SPACE[-DATA][-TARGET])")
    add("--target", default="k", help=f"{', '.join(TARGETS)}, or a number in [0, 1]: k, fixed (default k)")
    add("--loss", choices=LOSSES, default="v", help="the variable whose error is squared (default v)")
    add("--steps", type=int, help="optimiser steps in all (default: from --epochs)")
    add("--seed", type=int, default=0, help="of weights, order, noise, pictures (default 0)")
    add("--init", metavar="CKPT", help="start from these weights, ours or published")
    add("--dry_run", action="store_true", help="print what would be done and how long it takes, and stop")
    add("--device", help="cuda, cpu, mps, ... (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of autocast (default: bfloat16 if the GPU has it)")
    add("--compile", action=yes_no, help="compile each block (default: on GPUs, but for the demo)")
    add("--activation_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--micro_batch", type=int, help="images at a time on a process (default: at most 128)")
    add("--workers", type=int, help="loading processes of each training process")
    add("--flip", action=yes_no, default=True, help="mirror images of --data at random")
    add("--qk_norm", action="store_true", help="LightningDiT: normalise queries and keys")
    add("--clip", type=float, default=0.0, help="largest gradient norm; 0: none")
    add("--keep_every", type=int, default=0, help="steps between checkpoints that stay, as ckpt-STEP.pt")
    add("--samples", type=int, help="images in a picture; 0: no pictures")
    add("--sample_steps", type=int, help="solver steps for pictures (default 25; on a GPU 50)")
    for name, (latent, pixel, text) in TABLE_4.items():
        value = pixel if latent is None else latent
        many = {"nargs": "+" if name == "ema" else 2} if isinstance(value, list) else {}
        kind = type(value[0] if many else value or "")
        add(f"--{name}", type=kind, help=f"{text} (paper: {latent} / {pixel})", **many)
    return from_preset(parser.parse_args())

def from_preset(args):
    """The flags of args, the preset's values where none was given. UserError for what cannot work."""
    args.preset = args.preset or ("demo" if args.data in ("shapes", "fashion") else "paper")
    preset = FASHION if (args.data, args.preset) == ("fashion", "demo") else PRESETS[args.preset]
    values = {name: preset.get(name, columns[:2]) for name, columns in TABLE_4.items()}
    fill(args, {name: value[args.space == "pixel"] if isinstance(value, tuple) else value
                for name, value in values.items()})
    check_ranges(args, batch_size=1, log_every=1, save_every=1, micro_batch=1, image_size=1, steps=1,
                 epochs=0, sample_every=0, keep_every=0, samples=0, sample_steps=1, workers=0, lr=0, k_lr=0,
                 clip=0, warmup_epochs=0, label_drop=0, noise_scale=0, t_std=0, tau=0)
    table4 = {256: "JiT-B/16", 512: "JiT-B/32"}.get(args.image_size)
    args.model = args.model or (f"JiT-S/{args.image_size // 8}" if args.preset == "small" else table4)
    need(args.model, f"--image_size {args.image_size} has no network in Table 4: "
         "try --preset small, or name one, such as --model JiT-B/16")
    need(all(0 < decay < 1 for decay in args.ema), f"--ema {args.ema}: decays lie between 0 and 1")
    end = args.target == "eps" or fixed_k(args.target) == 0               # Delta = t vanishes with t
    vanishes = end or args.target in ("x", "asym") or fixed_k(args.target) == 1
    fill(args, {"noise_scale": args.image_size / 256, "tau": 0.05 if vanishes else 0.0})
    need(args.label_drop <= 1, f"--label_drop {args.label_drop}: a probability")
    need(args.tau or not end, f"--tau 0 with --target {args.target} divides by 0 at t = 0: try --tau 0.05")
    name = args.space + ("" if args.data == "shapes" else f"-{Path(args.data).stem}")
    args.out = Path(args.out or f"out/{name}" + ("" if args.target == "k" else f"-{args.target}"))
    return args

def fill(args, values):
    """Set the flags that were not given."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

def open_data(args):
    """The dataset and the Codec that makes it the network's x. UserError where data and space do not fit."""
    data = open_dataset(args.data, args.image_size, args.data_dir)
    data.flips, data.seed = data.flips and args.flip, args.seed
    if isinstance(data, Latents):
        need(args.space == "latent", f"--data {args.data} holds latents: pass --space latent")
        (C, h, w), tokenizer = data.shape, None if args.tokenizer == "pca" else args.tokenizer
        need(h == w and args.image_size == h * VAVAE.factor, f"--data {args.data} holds latents of {h}x{w}: "
             f"they fit --image_size {h * VAVAE.factor}, not {args.image_size}")
        need(not tokenizer or C == VAVAE.channels,
             f"--data {args.data} holds latents of {C} channels: --tokenizer has {VAVAE.channels}")
        codec = Codec(VAVAE(tokenizer) if tokenizer else None, data.mean, data.std)
        std = codec.encode(some_items(data, 64)).std().item()
        need(0.5 < std < 2, f"--data {args.data}: std {std:.2f}, not about 1: statistics of other latents")
        return data, codec
    if args.space == "pixel" and args.target not in COMPONENTS:
        return data, Codec()
    need(args.space == "pixel" or args.tokenizer == "pca", f"--data {args.data} holds images: pass "
         f"--tokenizer pca, or run `python data.py encode {args.data} --tokenizer FILE --image_size "
         f"{args.image_size} --out latents` and pass --data latents")
    patch = args.model.rpartition("/")[2] if args.space == "pixel" else "8"
    need(patch.isdecimal() and int(patch), f"--model {args.model}: NAME/PATCH expected, such as JiT-B/16")
    patch = int(patch)
    need(args.image_size % patch == 0, f"--image_size {args.image_size}: no multiple of the patch, {patch}")
    images = Codec().encode(some_items(data))
    if args.space == "pixel":              # all components, orthonormal: noise stays white, nothing is lost
        codec = Codec(PatchPCA.fit(images, patch, 3 * patch ** 2))
    else:
        tokenizer = PatchPCA.fit(images, patch, 16)
        std, mean = torch.std_mean(tokenizer.encode(images), (0, 2, 3), keepdim=True)
        codec = Codec(tokenizer, mean, std)
    for buffer in codec.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)          # machines may differ in a component's sign
    return data, codec

def settle(args, data, codec, device):
    """Fill in what depends on data and machine; returns the config, all that made a run, as plain values."""
    share = args.batch_size // WORLD
    need(args.batch_size % WORLD == 0, f"--batch_size {args.batch_size} does not divide over {WORLD} "
         f"processes: try {max(share, 1) * WORLD}")
    fits = next(m for m in range(min(share, args.micro_batch or 128), 0, -1) if share % m == 0)
    need(args.micro_batch in (None, fits), f"--micro_batch {args.micro_batch} of {share} images: try {fits}")
    demo, cuda = args.preset == "demo", device.type == "cuda"
    defaults = {"cfg": 1.0 if len(data.classes) == 1 else 2.0,      # one class leaves nothing to guide to
                "micro_batch": fits, "steps": max(1, round(args.epochs * len(data) / args.batch_size)),
                "workers": 0 if demo else min(8, (os.cpu_count() or 1) // LOCAL_WORLD),
                "dtype": fastest_dtype(device), "compile": cuda and not demo,      # compiling takes a minute
                "samples": 64 if demo or cuda else 8, "sample_steps": 50 if cuda and not demo else 25}
    fill(args, defaults)
    C, size, _ = codec.encode(data[0][0][None])[0].shape
    faded = [decay for decay in args.ema if decay ** args.steps < 0.01]     # they have forgotten the start
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()} | {
        "net_size": size, "in_channels": C, "images": len(data), "num_classes": len(data.classes),
        "components": args.space == "pixel" and codec.tokenizer is not None, "processes": WORLD,
        "ema_default": str(max(faded, default=min(args.ema)))}

def describe(args, config, kdiff, data):
    """Print the settings in force and what they amount to; warn where they cannot work."""
    params, per_epoch = sum(p.numel() for p in kdiff.net.parameters()), len(data) / args.batch_size
    print0("settings  " + "  ".join(f"{key}={value}" for key, value in config.items() if value is not None
                                    and key not in ("out", "steps", "epochs", "dry_run")))
    print0(f"network   {args.model}: {params / 1e6:,.1f}M parameters, "
           f"{gmacs(kdiff.net, shape_of(config)):.2f} billion multiply-adds an image and forward")
    print0(f"steps     {args.steps:,} = {args.steps / per_epoch:,.2f} epochs of {per_epoch:,.1f} steps")
    if float(config["ema_default"]) < max(args.ema):
        print0(f"EMA       {max(args.ema)} averages over {1 / (1 - max(args.ema)):,.0f} steps and the run "
               f"has {args.steps:,}: pictures show {config['ema_default']}; --ema sets others")
    farthest = args.lr * args.k_lr * args.steps            # Adam moves w by its rate a step
    if kdiff.w is not None and farthest < 3:
        remedy = "more --steps" if args.preset == "small" else "--preset small"
        print0(f"k         w moves by at most {farthest:.2g} in {args.steps:,} steps, so that k stays below "
               f"{1 / (1 + math.exp(-farthest)):.2f}: try {remedy}")
    print0(f"writes to {args.out}")

def time_a_step(args, config, device):
    """Print how long the run would take here, from a few images' forward and backward."""
    kdiff = assemble(config).to(device)
    cost = 6 * gmacs(kdiff.net, shape_of(config))          # billions of operations an image
    n = min(args.micro_batch, max(1, int(50 / cost)))
    x = torch.randn(n, *shape_of(config), device=device)
    for _ in range(3):
        began = time.perf_counter()
        with autocast(device, args.dtype):
            loss = kdiff(x, torch.zeros(n, dtype=torch.long, device=device))
        loss.backward()
        next(kdiff.net.parameters()).grad.sum().item()     # waits for the device
        seconds = (time.perf_counter() - began) / n * args.batch_size / WORLD
    print0(f"time      {seconds:.3g} s a step here (a share of {n} images timed, not compiled), "
           f"{timedelta(seconds=int(seconds * args.steps))} in all, loading and pictures aside")

def start_from(path, kdiff, args, classes):
    """Load a checkpoint's network, ours or published; not its w for another target, nor labels of others."""
    source, weights, *_ = read_weights(path)
    if source["target"] != args.target:
        weights = {key: value for key, value in weights.items() if key != "w"}
        print0(f"--init {path} predicts {source['target']}, this run {args.target}: it will have to adapt")
    if source["num_classes"] != classes:
        weights = {key: value for key, value in weights.items() if "y_embedder" not in key}
        print0(f"--init {path} knows {source['num_classes']} classes, not {classes}: the labels start anew")
    with checked(f"--init {path}", f"a {args.model} for these data"):
        kdiff.load_state_dict(kdiff.state_dict() | weights)

# ---- Around the loop ---------------------------------------------------------------------------------------

def batches(data, args, start, device):
    """(batch, labels) of this process for the steps left, in an order that the step alone decides."""
    steps = order(len(data), args.batch_size, args.seed, start, args.steps, RANK, WORLD)
    # a loading process ends with its parent, not with the signal that asks the parent to save first
    return torch.utils.data.DataLoader(
        data, batch_sampler=steps, num_workers=args.workers, pin_memory=device.type == "cuda",
        prefetch_factor=4 if args.workers else None, worker_init_fn=partial(on_signals, signal.SIG_IGN))

def on_signals(handler, worker=None):
    """What SIGTERM and SIGINT do from now on in this process, perhaps a loading one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)

def agreed(number):
    """The largest of the processes' numbers, on all of them; compared on the CPU."""
    return all_reduce(torch.tensor(number), dist.ReduceOp.MAX).item()

class Log:
    """Lines on the screen and in log.csv; a resumed run first drops the rows that it will write again."""
    columns = "step epoch loss k k1 k2 k_min k_max lr grad img_per_s skipped".split()

    def __init__(self, path, state, args, data):
        self.path, self.state, self.args, self.per_epoch = path, state, args, len(data) / args.batch_size
        self.on_cpu = state.parameters[0].device.type == "cpu"
        self.first, self.began = state.step, time.perf_counter()
        self.bad_in_a_row, self.good = 0, []
        self.restart()
        with checked(path, "a log that can be continued"):
            rows = read_rows(path) if state.step and path.exists() else []
            rows = [row for row in rows if int(row["step"]) <= state.step]
        barrier()                                          # all have read before the first writes
        if RANK == 0:
            write_rows(path, self.columns, rows)

    def restart(self):
        """Count time and steps from here."""
        self.logged, self.ticked = self.state.step, time.perf_counter()
        self.watched = self.ticked, time.process_time()

    def add(self, loss, norm):
        """Take note of a step; its norm is not finite where it was skipped. Watch the machine."""
        if math.isfinite(norm):
            self.bad_in_a_row = 0
            self.good.append((loss, norm))
        else:
            self.bad_in_a_row += 1
            self.state.skipped += 1
        now, threads = (time.perf_counter(), time.process_time()), torch.get_num_threads()
        wall, used = (b - a for a, b in zip(self.watched, now))
        if self.on_cpu and threads > 1 and wall > 2:       # threads spin while they wait for one another
            self.watched = now
            if used < 0.7 * threads * wall:
                torch.set_num_threads(threads - 1)
                print0(f"other programs left {used / wall:.1f} of {threads} cores: one thread less from now")

    def write(self, lr):
        """The mean of the steps since the last line, over all processes."""
        state, args, now = self.state, self.args, time.perf_counter()
        means = torch.tensor(self.good or [(math.nan, math.nan)]).mean(0) / WORLD
        loss, grad = all_reduce(means).tolist()            # of as many steps on each process
        speed = (state.step - self.logged) * args.batch_size / (now - self.ticked)
        left = (now - self.began) / (state.step - self.first) * (args.steps - state.step)
        ks = {name: k.item() for name, k in state.kdiff.ks().items()}
        print0(f"step {state.step:,}/{args.steps:,} | epoch {state.step / self.per_epoch:.1f} | "
               f"loss {loss:.4f} | " + " | ".join(f"{name} {k:.3f}" for name, k in ks.items())
               + f" | lr {lr:.1e} | grad {grad:.2f} | {speed:,.0f} img/s | eta {timedelta(seconds=int(left))}"
               + (f" | skipped {state.skipped}" if state.skipped else ""))
        row = dict(step=state.step, epoch=state.step / self.per_epoch, loss=loss, lr=lr, grad=grad,
                   img_per_s=speed, skipped=state.skipped, **ks)
        if RANK == 0:
            with checked(self.path, "written"), open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow({key: f"{row[key]:.10g}" for key in row})
        self.good, self.logged, self.ticked = [], state.step, now

def show(args, state, codec, data, config, last):
    """Draw samples of the default average, curves of the log, k(t) or k's spectrum; returns their paths."""
    written, kdiff, out = [], state.kdiff, args.out
    if args.samples and codec.decodes:
        rows = min(8, len(data.classes), args.samples)
        columns = -(-args.samples // rows)
        labels = [j // columns for j in range(rows * columns)]
        with state.averaged(config["ema_default"]):
            images = sample_all(kdiff, codec, shape_of(config), labels, 64, cfg=args.cfg,
                                interval=args.interval, steps=args.sample_steps, dtype=args.dtype)
        written.append(out / ("samples.png" if last else f"samples-{state.step:07}.png"))
        write_atomically(written[-1], grid(images, data.classes[:rows], columns).save)
    written.append(out / "curves.png")
    draw_curves([(", ".join(names), "step", {name: read_log(out, name) for name in names})
                 for names in (["loss"], [*kdiff.ks()])], written[-1])
    if args.target in ("time", "edm"):
        written.append(out / "k_of_t.png")
        draw_k_of_t(kdiff, written[-1])
    if args.target == "channel":
        written.append(out / "k_of_channel.png")
        x = codec.encode(some_items(data, 16384).to(kdiff.w.device)).cpu()
        spectrum = {"channel": torch.arange(x.shape[1]), "variance": x.var((0, 2, 3)) / args.noise_scale ** 2,
                    "k": torch.sigmoid(kdiff.w.detach()).cpu().flatten()}
        if x[0].numel() <= 4096 and last:                  # an eigenvalue problem of that size: seconds
            spectrum["k_of_innovation"] = k_of_innovation(x, args.t_mean, args.t_std, args.noise_scale)
        draw_spectrum(spectrum, written[-1])
    return written

if __name__ == "__main__":
    run(main)
