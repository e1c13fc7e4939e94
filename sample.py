"""From noise to pictures: guidance, ODE solvers, checkpoints of ours and published ones, drawing.

    python sample.py out/pixel/ckpt.pt                              a grid next to the checkpoint
    python sample.py out/pixel/ckpt.pt --classes star,ring --cfg 2  chosen classes, guidance scale
    torchrun --nproc_per_node=8 sample.py ckpt.pt --samples 50000 --out samples.npz

    checkpoint = load("assets/fashion.pt")                               the same from Python
    grid(checkpoint.sample("bag", n=8), ["bag"], columns=8).show()

N images, C channels, H, W their size; t runs from 0 (noise) to 1 (data).
"""
import csv
import io
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import (RANK, WORLD, Codec, FileError, PatchPCA, UserError, first_decides, gather,
                  in_short, my_batches, new_file, new_parser, open_vavae, print0, read_statistics,
                  read_tensors, reading, require, run, seed_of, setup, writing)
from model import TABLES, build, from_published
from objective import KDiff, seeded_normal

# ---- Guidance and solvers (Alg. 2) -------------------------------------------------------------------------

def guided(kdiff, y, scale, interval):
    """Returns a function velocity(z (N,C,H,W), t 0-d) for labels y (N,). It is guided by `scale`
    while interval[0] < t < interval[1], and also at t = 0 if interval[0] is 0. At other times, and
    at scale 1, only the conditional pass runs."""
    low, high = interval
    both = torch.cat([y, torch.full_like(y, kdiff.num_classes)])

    def predicted(z, t, labels):
        times = torch.full((len(z),), t.item(), device=z.device)
        return kdiff.velocity(kdiff.net(z, times, labels), z, times)

    def velocity(z, t):
        t = torch.as_tensor(t, dtype=torch.float32, device="cpu")       # compared in float32, no GPU sync
        inside = (t > low or t == low == 0) and t < high
        if scale == 1 or not inside:
            return predicted(z, t, y)
        v, v_null = predicted(torch.cat([z, z]), t, both).chunk(2)
        return v_null + scale * (v - v_null)
    return velocity

def integrate(velocity, z, steps=50, solver="heun", start=0.0):
    """Solve dz/dt = velocity(z, t) from t = start to 1 in equal steps, from z (N,C,H,W).
    Yields z after each step; the last one is the sample. Between steps z may be changed in place.
    solver: "euler", or "heun", whose last step is Euler's. ValueError for others."""
    if solver not in ("heun", "euler"):
        raise ValueError(f"solver {solver!r} is unknown: heun or euler")
    times = torch.linspace(start, 1, steps + 1)
    for i in range(steps):
        t, t_next = times[i], times[i + 1]
        v = velocity(z, t)
        if solver == "heun" and i < steps - 1:
            v = (v + velocity(z + (t_next - t) * v, t_next)) / 2
        z = z + (t_next - t) * v
        yield z

def fastest_dtype(device):
    """The dtype of autocast: "bfloat16" on GPUs with hardware for it, else "float32"."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"

def autocast(device, dtype):
    """A context in which matrix products run in bfloat16, if that is the dtype."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()

def compile_network(net):
    """Compile it in place if there is a compiler. Our networks do so block by block (model.py)."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(1, device=next(net.parameters()).device))
    except Exception as error:                        # no Triton or C++ compiler, or a GPU too old
        print0(f"not compiled, which is impossible here: {in_short(error)}")
    else:
        net.compile(dynamic=False)

# ---- Checkpoints -------------------------------------------------------------------------------------------

class Checkpoint(NamedTuple):
    """A network that is ready to sample."""
    kdiff: KDiff
    codec: Codec
    config: dict                      # settings
    classes: list                     # their names
    step: int                         # steps trained; 0 for published files
    ema: str                          # which average of the weights it is, or "none"

    @torch.no_grad()
    def generate(self, labels, indices, cfg=None, interval=None, steps=50, solver="heun", seed=0,
                 dtype="float32"):
        """uint8 images (N,3,H,W) of a list of class indices. Image n starts from the noise of
        (seed, indices[n]). cfg, interval: as in guided(), by default the checkpoint's. steps,
        solver: as in integrate(). dtype: of autocast."""
        device = next(self.kdiff.parameters()).device
        if cfg is None:
            cfg = self.config["cfg"]
        seeds = [seed_of(seed, "sample", i) for i in indices]
        z = self.kdiff.noise_scale * seeded_normal(self.config["shape"], seeds, device)
        torch.manual_seed(seeds[0])                   # for a solver that draws noise on its way
        labels = torch.tensor(labels, device=device)
        velocity = guided(self.kdiff, labels, cfg, interval or self.config["interval"])
        with autocast(device, dtype):
            for z in integrate(velocity, z, steps, solver):
                pass
        return self.codec.decode(z)

    def sample(self, labels, n=1, batch_size=64, **how):
        """uint8 images (len(labels) n, 3, H, W), n for each label, all made on this process. labels:
        a class name, or a list of names or class indices. how: further arguments of generate()."""
        if isinstance(labels, str):
            labels = [labels]
        chosen = []
        for label in labels:
            if isinstance(label, str):
                label = self.classes.index(label)
            chosen += [label] * n
        images = []
        for i in range(0, len(chosen), batch_size):
            part = chosen[i:i + batch_size]
            images.append(self.generate(part, range(i, i + len(part)), **how).cpu())
        return torch.cat(images)

    def batches(self, labels, batch_size=64, **how):
        """This process's samples of a list of labels: (uint8 (B,3,H,W), range of indices), as
        my_batches() gives them. All batches are of one size, so that one compiled graph serves them."""
        for indices in my_batches(len(labels), batch_size, "samples"):
            part = [labels[i % len(labels)] for i in indices]
            yield self.generate(part, indices, **how), indices

# What a checkpoint's config needs for sampling.
SETTINGS = {"model": str, "target": (str, float), "loss": str, "space": str, "shape": list,
            "num_classes": int, "t_mean": float, "t_std": float, "noise_scale": float, "tau": float,
            "label_drop": float, "cfg": float, "interval": list}

def build_kdiff(config, k_start=0.5):
    """The untrained KDiff of a config, a dict with the keys of SETTINGS. UserError for sizes
    that do not fit."""
    channels, height, width = config["shape"]
    side = height
    if height != width:
        side = height, width                          # for a network that takes it
    change = {}
    if config.get("qk_norm"):
        change["qk_norm"] = True
    if config.get("components"):                      # the codec has cut the patches
        change["patch_size"] = 1
    names = "num_classes t_mean t_std noise_scale tau label_drop loss target".split()
    try:
        net = build(config["model"], side, config["num_classes"], channels, **change)
        return KDiff(net, channels=channels, k_start=k_start, **{name: config[name] for name in names})
    except ValueError as error:
        raise UserError(str(error)) from error

def default_average(decays, step):
    """Which average of the weights to show after so many steps: the longest of those that have
    forgotten the start, decay^step < 0.01. "none", the weights themselves, if all remember it.
    decays: texts."""
    forgotten = [decay for decay in decays if float(decay) ** step < 0.01]
    return max(forgotten, key=float, default="none")

def codec_state(codec, file=None):
    """What a checkpoint keeps of a Codec: statistics; the arrays of PCA, or the file of a VA-VAE."""
    pca = None
    if isinstance(codec.tokenizer, PatchPCA):
        pca = dict(codec.tokenizer.named_buffers())
    return {"mean": codec.mean, "std": codec.std, "pca": pca, "tokenizer": file}

def open_codec(kept, file=None):
    """The Codec of codec_state's dict. file: the VA-VAE, if it is not where it was."""
    known = kept.get("tokenizer")
    if known and os.path.exists(known):
        file = file or known
    tokenizer = None
    if kept.get("pca"):
        tokenizer = PatchPCA(**kept["pca"])
    elif file:
        tokenizer = open_vavae(file)
    return Codec(tokenizer, kept.get("mean"), kept.get("std"))

def read_checkpoint(path, ema=None):
    """(the dict in a checkpoint of ours, or a published one in our form; which average; the weights
    of KDiff). FileError for other files; UserError for an average that it does not contain."""
    file = read_tensors(path)
    published = not {"config", "data", "ema"} <= set(file)
    if published:
        try:
            file = from_published(file)
        except ValueError as error:
            raise FileError(f"{path}: {error}") from error
        except KeyError as error:
            raise FileError(f"{path}: it lacks the weight {error}") from error
    # its settings must be usable
    config, averages = file["config"], file["ema"]
    with reading(path, "a checkpoint of this version"):
        wrong = [key for key, kind in SETTINGS.items() if not isinstance(config.get(key), kind)]
        if wrong:
            raise ValueError(f"its {', '.join(wrong)} cannot be used")
        low, high = config["interval"]
        names = [name for name in file["data"]["classes"] if isinstance(name, str)]
        if not (len(names) == config["num_classes"] and high - low > 0 and min(config["shape"]) > 0):
            raise ValueError("its classes, interval or shape cannot be used")
        _, _, _ = config["shape"]
        if not published:
            default = default_average(averages, file["step"])
    # published files are shown by their longest average
    if published:
        named = [key for key in averages if key.startswith("0.") or "ema" in key]
        default = max(named, default=next(iter(averages)))
        if not any("pos_embed" in key for key in averages[default]):
            print0(f"{path}: it has no pos_embed; a grid of 16 x 16 tokens is assumed")
    ema = ema or default
    weights = averages.get(ema)
    if ema == "none" and not published:
        weights = file.get("model")
    require(weights, f"--ema {ema}: {path} has {', '.join(averages)}")
    return file, ema, weights

def load(path, ema=None, tokenizer=None, stats=None, device="cpu"):
    """A Checkpoint from a file of ours or a published one (.pt, .pth or .safetensors).
    ema          which average: a decay, or "none" for the weights themselves (default: default_average)
    tokenizer    the VA-VAE weights file; stats: latents_stats.pt. Both are for latent networks.
    UserError for files that do not fit, or that need a tokenizer or statistics."""
    # what the file is, and what of the flags belongs to it
    file, ema, weights = read_checkpoint(path, ema)
    config, kept = file["config"], file["data"]
    latent = config["space"] == "latent"
    require(not tokenizer or (latent and not kept.get("pca")),
            f"--tokenizer {tokenizer} has no effect: {path} needs no VA-VAE")
    require(not stats or (latent and kept.get("mean") is None),
            f"--stats {stats} has no effect: {path} needs no statistics")
    if stats:
        mean, std = read_statistics(stats, config["shape"][0])
        kept = kept | {"mean": mean, "std": std}
    require(not latent or kept.get("mean") is not None,
            f"{path}: a latent network needs --stats (latents_stats.pt) and --tokenizer to sample")
    # the network, the codec
    kdiff = build_kdiff(config)
    tables = {f"net.{key}": value for key, value in kdiff.net.state_dict().items() if key in TABLES}
    with reading(path, f"a {config['model']} whose weights fit"):
        kdiff.load_state_dict(tables | weights)
    codec = open_codec(kept, tokenizer).to(device)
    kdiff = kdiff.to(device).eval().requires_grad_(False)
    return Checkpoint(kdiff, codec, config, kept["classes"], file["step"], ema)

# ---- Drawing, with Pillow alone ----------------------------------------------------------------------------

INK, GREY, PAPER = "#1e1e1e #c8c8c8 #ffffff".split()
COLOURS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #787878".split()

def grid(images, names, columns=8):
    """A picture of uint8 images (N,3,H,W), equally many for each name. Each name begins a row,
    of up to `columns` images. Images below 96 pixels are enlarged."""
    each = len(images) // len(names)
    columns = min(columns, each)
    rows = math.ceil(each / columns)                                    # for each name
    # sizes in pixels: small images enlarged to about 96, next to a margin for the longest name
    zoom = max(1, 96 // images.shape[2])
    height, width = (zoom * side for side in images.shape[2:])
    font = ImageFont.load_default(14)
    margin = 16 + int(max(map(font.getlength, names)))
    size = margin + columns * (width + 4) + 4, rows * len(names) * (height + 4) + 4
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        name, place = divmod(i, each)
        row, column = divmod(place, columns)
        top = 4 + (name * rows + row) * (height + 4)
        picture = Image.fromarray(image).resize((width, height), Image.NEAREST)
        sheet.paste(picture, (margin + column * (width + 4), top))
        if place == 0:
            pen.text((8, top + height // 2), names[name], INK, font, anchor="lm")
    return sheet

def draw_curves(panels, path, x_label="step"):
    """Write a picture of panels side by side, each {name: (xs, ys)}. The names are the title, in
    the colours of their curves. Points that are not finite are left out."""
    W, H = 560, 390
    sheet = Image.new("RGB", (W * len(panels), H), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for p, curves in enumerate(panels):
        points = [np.array(curve, dtype=float).T for curve in curves.values()]
        points = [rows[np.isfinite(rows).all(1)] for rows in points]
        # both axes contain 0, and have about five steps, of one digit
        low = np.concatenate([[[0, 0]], *points]).min(0)
        high = np.concatenate([[[0, 0]], *points]).max(0)
        high[high == low] = 1
        step = np.array([float(f"{size / 5:.0e}") for size in high - low])
        first, last = np.floor(low / step), np.ceil(high / step)
        origin, size = np.array([p * W + 64, H - 56]), np.array([W - 84, 96 - H])

        def place(*point):
            return tuple(origin + (point / step - first) / (last - first) * size)
        bottom, top = first * step, last * step                         # corners: lower left, upper right
        for x in np.arange(first[0], last[0] + 1) * step[0]:
            pen.line([place(x, bottom[1]), place(x, top[1])], GREY)
            pen.text(place(x, bottom[1]), f"\n{x:,.4g}", INK, font, anchor="ma", spacing=-4)
        for y in np.arange(first[1], last[1] + 1) * step[1]:
            pen.line([place(bottom[0], y), place(top[0], y)], GREY)
            pen.text(place(bottom[0], y), f"{y:.3g}  ", INK, font, anchor="rm")
        # the curves, and their names as a title
        title = p * W + 64
        for name, rows, colour in zip(curves, points, COLOURS):
            pen.line([place(*row) for row in rows], colour, 2)
            pen.text((title, 12), name, colour, font)
            title += font.getlength(f"{name}    ")
        pen.text((p * W + W - 20, H - 6), x_label, INK, font, anchor="rb")
    save_picture(sheet, path)

def save_picture(picture, path):
    """Write a PIL picture as PNG."""
    with new_file(path) as file:
        picture.save(file, "PNG")

def read_rows(path):
    """The rows of a csv file, each a dict. FileError if it is damaged."""
    with reading(path, "a table"), open(path, newline="") as file:
        return list(csv.DictReader(file))

def read_log(run_folder, column):
    """(steps, values) of a column of a run's log.csv. FileError if they are not there."""
    rows = read_rows(Path(run_folder, "log.csv"))
    with reading(run_folder, f"a run whose log.csv has a column {column!r}"):
        return [float(row["step"]) for row in rows], [float(row[column]) for row in rows]

def write_rows(path, columns, rows):
    """Write a csv file of rows, each a dict with these columns."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *(row.values() for row in rows)])
    with new_file(path) as file:
        file.write(text.getvalue().encode())

def append_row(path, row):
    """Append a row, a dict, to a csv file with its columns. Other processes may do the same."""
    if not os.path.exists(path):
        write_rows(path, row, [])
    with writing(path), open(path, "a", newline="") as file:
        csv.writer(file).writerow(row.values())

# ---- Commands ----------------------------------------------------------------------------------------------

def choose_classes(text, names):
    """The indices that a --classes value names, separated by commas. If all words are names of classes,
    they are taken as names, else as indices. A name that contains a comma is put in double
    quotes."""
    words = next(csv.reader([text]), [])
    if text in names:
        words = [text]
    if set(words) <= set(names):
        return [names.index(word) for word in words]
    for word in words:
        require(word.isdecimal() and int(word) < len(names),
                f"--classes {word}: not a label of this checkpoint, which has 0 to {len(names) - 1} "
                f"({', '.join(names[:20])})")
    return [int(word) for word in words]

# The flags of sample.py and fid.py that say what to draw from a checkpoint, and how.
SAMPLER = """
    --classes      text                 names or numbers, separated by commas (default: all; in a picture 8)
    --n,--samples  count                images (default: 8 a class in a picture, else 50,000)
    --cfg          amount               guidance scale; 1 is none (default: the checkpoint's)
    --interval     amounts              two times between which guidance acts (default: the checkpoint's)
    --steps        count                solver steps (default 50)
    --solver       heun|euler           (default heun)
    --tau          amount               the least Delta (default: the checkpoint's)
    --ema          text                 an average, or none (default: see default_average())
    --seed         integer              of the noise (default 0)
    --tokenizer    text                 VA-VAE weights file, for latent networks
    --stats        text                 latents_stats.pt, for published latent networks
    --dtype        float32|bfloat16     of autocast (default: bfloat16 if the GPU has it)
    --batch_size   count                images at a time on each process (default 64)
"""
FLAGS = SAMPLER + """
    checkpoint     text                 ours or published
    --out          text                 a .png or an .npz of samples (default: samples.png next to it)
"""

def open_sampler(path, args, device, picture=False):
    """What the flags of SAMPLER say about a checkpoint: (Checkpoint, class indices, how: arguments
    of generate(), settings: what makes the samples). picture: True for a
    grid, which shows by default the first 8 classes."""
    checkpoint = load(path, args.ema, args.tokenizer, args.stats, device)
    config, names = checkpoint.config, checkpoint.classes
    if first_decides(checkpoint.step) != checkpoint.step:              # perhaps on one process only
        raise FileError(f"{path} was replaced while it was read: try again")
    require(checkpoint.codec.can_decode, f"{path}: latents need --tokenizer FILE to become images")
    classes = list(range(len(names)))
    if args.classes:
        classes = choose_classes(args.classes, names)
    elif picture:
        classes = classes[:8]
    if args.tau is not None:
        checkpoint.kdiff.tau = args.tau
    # how to sample: the checkpoint's own guidance and the usual solver, unless flags say otherwise
    how = {"cfg": config["cfg"], "interval": config["interval"], "steps": 50, "solver": "heun", "seed": 0,
           "dtype": fastest_dtype(device)}
    how |= {name: getattr(args, name) for name in how if getattr(args, name) is not None}
    check_interval(how["interval"])
    require(how["cfg"] == 1 or 0 < config["label_drop"] < 1,
            f"--cfg {how['cfg']}: {path} was trained with all labels, "
            "which leaves nothing to guide away from")
    # what made the samples, for their file and for the table of fid.py
    n = args.n or 50_000
    if picture:                                       # equally many of each
        n = len(classes) * math.ceil((args.n or 8 * len(classes)) / len(classes))
    settings = {"checkpoint": Path(path).name, "step": checkpoint.step, "ema": checkpoint.ema, "n": n}
    settings |= {"model": config["model"], "classes": "all"}
    if args.classes:
        settings["classes"] = ",".join(names[c] for c in classes)
    settings |= {"tau": checkpoint.kdiff.tau, **how}
    print0(f"{path}: " + " | ".join(f"{name} {value}" for name, value in settings.items()))
    if device.type == "cuda" and n // WORLD >= 1000:   # for fewer, compiling takes longer than it saves
        compile_network(checkpoint.kdiff.net)
    return checkpoint, classes, how, settings

def check_interval(interval):
    """UserError if the two times are not in order, or not in [0, 1]."""
    require(len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1,
            f"--interval {interval}: two times between 0 and 1 are needed, in order")

def write_samples(checkpoint, labels, out, batch_size, how, settings):
    """Write samples of a list of labels, made by all processes, as an .npz: arr_0 uint8
    (N,H,W,3), arr_1 the labels, settings. The first process collects and writes them."""
    parts = []
    for images, _ in checkpoint.batches(labels, batch_size, **how):
        parts.append(gather(images.permute(0, 2, 3, 1).contiguous().cpu()))      # (B, H, W, 3)
    if RANK == 0:
        samples = torch.cat(parts)[:len(labels)].numpy()
        with new_file(out) as file:
            np.savez(file, arr_0=samples, arr_1=labels, settings=json.dumps(settings))

def parse(argv=None):
    """The command line. argv: a list of words; None: the program's. UserError for flags
    that do not fit."""
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    args.out = Path(args.out or Path(args.checkpoint).with_name("samples.png"))
    require(args.out.suffix in (".png", ".npz"), f"--out {args.out}: a .png or an .npz is needed")
    return args

def main():
    """Draw a grid, or write samples, as the flags say."""
    args = parse()
    device = setup(args.device)
    picture = args.out.suffix == ".png"
    checkpoint, classes, how, settings = open_sampler(args.checkpoint, args, device, picture)
    names = [checkpoint.classes[c] for c in classes]
    n = settings["n"]
    if not picture:
        labels = [classes[i % len(classes)] for i in range(n)]
        settings["class_names"] = checkpoint.classes
        write_samples(checkpoint, labels, args.out, args.batch_size or 64, how, settings)
    elif RANK == 0:
        images = checkpoint.sample(classes, n // len(classes), args.batch_size or 64, **how)
        save_picture(grid(images, names), args.out)
    print0(f"wrote {args.out}")

if __name__ == "__main__":
    run(main)
