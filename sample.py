"""From noise to pictures: guidance, ODE solvers, checkpoints of ours and the published ones, drawing.

    python sample.py out/pixel/ckpt.pt                                   a labelled grid beside the checkpoint
    python sample.py out/pixel/ckpt.pt --classes star,ring --cfg 2       chosen classes, guidance scale
    torchrun --nproc_per_node=8 sample.py ckpt.pt --samples 50000 --out samples.npz     samples for evaluation
    python sample.py out/pixel/ckpt*.pt --fid ref.npz                    measure them, draw the curve (fid.py)
    python sample.py out/pixel out/latent --plot k --out k.png           a column of several runs' log.csv

N images, C channels, H, W their size; t runs from 0 (noise) to 1 (data).
"""
import csv
import io
import json
import math
import os
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import fid
import model
from data import (RANK, VAVAE, WORLD, ArrayFile, Codec, PatchPCA, UserError, barrier, check_ranges, checked,
                  in_batches, in_short, need, new_parser, open_dataset, part_of, print0, read_in_batches,
                  read_tensors, run, seed_of, setup, write_atomically)
from objective import BINS, KDiff, k_of_direction, logit_normal, seeded_normal

# What the published weights need for sampling (their papers' and Table 4's settings).
PUBLISHED = {
    "JiT":          dict(space="pixel", target="x", tau=0.05, cfg=2.9, interval=(0.1, 1.0)),
    "LightningDiT": dict(space="latent", target="v", tau=0.0, cfg=1.5, interval=(0.1, 1.0)),
}

# ---- Guidance and solvers (Alg. 2) -------------------------------------------------------------------------

def guided(kdiff, y, scale, interval):
    """velocity(z (N,C,H,W), t 0-d) of labels y (N,), guided by `scale` while interval[0] < t < interval[1].
    An interval that begins at 0 holds t = 0 too. Outside it, and at scale 1, the null pass is left out."""
    low, high = interval
    both = torch.cat([y, torch.full_like(y, kdiff.num_classes)])

    def velocity(z, t):
        t = torch.as_tensor(t, dtype=torch.float32, device="cpu")       # compared in float32, no GPU sync
        if scale == 1 or not ((t > low or t == low == 0) and t < high):
            times = torch.full((len(z),), t.item(), device=z.device)
            return kdiff.velocity(kdiff.net(z, times, y), z, times)
        times = torch.full((2 * len(z),), t.item(), device=z.device)
        zz = torch.cat([z, z])
        v, v_null = kdiff.velocity(kdiff.net(zz, times, both), zz, times).chunk(2)
        return v_null + scale * (v - v_null)
    return velocity

def integrate(velocity, z, steps=50, solver="heun", watch=lambda z: None):
    """Solve dz/dt = velocity(z, t) from t = 0 to 1 in equal steps; "euler", or "heun" with Euler's last.
    watch(z) is shown where each step begins."""
    times = torch.linspace(0, 1, steps + 1)
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        watch(z)
        v = velocity(z, t)
        if solver == "heun" and i < steps - 1:
            v = (v + velocity(z + (t_next - t) * v, t_next)) / 2
        z = z + (t_next - t) * v
    return z

def fastest_dtype(device):
    """Of autocast: "bfloat16" on GPUs that have it in hardware, else "float32"."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if bf16 else "float32"

def autocast(device, dtype):
    """A context in which matrix products run in bfloat16, where that is the dtype; else it does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()

def compile_network(net):
    """Compile it in place, where a compiler is at hand; our networks do so block by block (model.py)."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(1, device=next(net.parameters()).device))
        net.compile(dynamic=False)
    except Exception as error:                        # no Triton or C++ compiler, or a GPU too old
        print0(f"not compiled, which is impossible here: {in_short(error)}")

@torch.no_grad()
def generate(kdiff, codec, shape, labels, indices, cfg, interval, dtype="float32", seed=0, **solve):
    """uint8 images (N,3,H,W) of labels (list of N); image n starts from the noise of (seed, indices[n]).
    shape (C,H,W): of the network's x. cfg, interval as in guided(), solve as in integrate()."""
    device = next(kdiff.parameters()).device
    z = kdiff.noise_scale * seeded_normal(shape, [seed_of(seed, "sample", i) for i in indices], device)
    with autocast(device, dtype):
        x = integrate(guided(kdiff, torch.tensor(labels, device=device), cfg, interval), z, **solve)
    return codec.decode(x)

def generate_split(kdiff, codec, shape, labels, batch_size, rank=RANK, world=WORLD, **how):
    """One process's part of the samples of labels (list of N), in batches (uint8 (b,3,H,W), indices (b))."""
    for indices in in_batches(part_of(len(labels), rank, world), batch_size, "samples"):
        yield generate(kdiff, codec, shape, [labels[i] for i in indices], indices, **how), indices

def sample_all(*args, **how):
    """uint8 images (N,3,H,W) as of generate_split(), all made on this process."""
    return torch.cat([images.cpu() for images, _ in generate_split(*args, rank=0, world=1, **how)])

# ---- Checkpoints -------------------------------------------------------------------------------------------

def assemble(config):
    """The untrained KDiff of a config, a dict of the settings below; UserError where they do not fit."""
    settings = ("num_classes", "t_mean", "t_std", "noise_scale", "tau", "label_drop", "loss")
    change = {"qk_norm": True} if config.get("qk_norm") else {}
    change |= {"patch_size": 1} if config.get("components") else {}            # the codec has cut the patches
    try:
        size, channels = config["net_size"], config["in_channels"]
        net = model.build(config["model"], size, config["num_classes"], channels, **change)
        return KDiff(net, config["target"], channels=channels, **{key: config[key] for key in settings})
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None

def shape_of(config):
    """(C, H, W) of the network's x."""
    return config["in_channels"], config["net_size"], config["net_size"]

def pack_codec(codec, file=None):
    """What a checkpoint keeps of a Codec: statistics, and the tokenizer's arrays or (VA-VAE) its file."""
    pca = dict(codec.tokenizer.named_buffers()) if isinstance(codec.tokenizer, PatchPCA) else None
    return {"mean": codec.mean, "std": codec.std, "pca": pca, "tokenizer": file}

def unpack_codec(state, tokenizer_file=None):
    """The Codec of pack_codec's dict; tokenizer_file overrides where the VA-VAE weights lie."""
    known = state.get("tokenizer")
    file = tokenizer_file or (known if os.path.exists(known or "") else None)
    tokenizer = PatchPCA(**state["pca"]) if state.get("pca") else VAVAE(file) if file else None
    return Codec(tokenizer, state.get("mean"), state.get("std"))

def published(file, ema, name):
    """Config, weights without prefixes and EMA's name of a published file; name None: the size that fits."""
    names = {"0.9999": "model_ema1", "0.9996": "model_ema2"} if "model_ema1" in file else {"ema": "ema"}
    ema = ema or next(iter(names))
    need(ema in names, f"--ema {ema}: the file has {', '.join(names)}")
    weights = next((file[k] for k in (names[ema], "ema", "model") if isinstance(file.get(k), dict)), file)
    for prefix in ("module.", "_orig_mod.", "net."):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    family = "JiT" if "x_embedder.proj1.weight" in weights else "LightningDiT"
    patches = weights[f"x_embedder.{'proj1' if family == 'JiT' else 'proj'}.weight"]
    (_, tokens, dim), patch = weights["pos_embed"].shape, patches.shape[-1]
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    fits = [f"{size}/{patch}" for size, row in model.SIZES.items()
            if row[:2] == (dim, depth) and size.startswith(family)]
    need(name or fits, "weights of no network known here, neither JiT nor LightningDiT (--model names one)")
    size = math.isqrt(tokens) * patch
    config = dict(model=name or fits[0], net_size=size, in_channels=patches.shape[1], t_mean=0.0, t_std=1.0,
                  num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1, label_drop=0.1, loss="v",
                  noise_scale=size / 256 if family == "JiT" else 1.0,
                  qk_norm=family != "JiT" and "blocks.0.attn.q_norm.weight" in weights, **PUBLISHED[family])
    return config, weights, ema

def read_weights(path, ema=None, model=None):
    """(config, KDiff state dict, data state, step, EMA's name) of a checkpoint of ours or a published one."""
    file = read_tensors(path)
    with checked(path, "a checkpoint of ours, JiT or LightningDiT"):
        if "config" not in file or "data" not in file:
            config, weights, ema = published(file, ema, model)
            state = {"classes": [str(i) for i in range(config["num_classes"])]}
            return config, {f"net.{k}": v for k, v in weights.items()}, state, file.get("epoch", 0), ema
        config, state, ema = file["config"], file["data"], ema or file["config"]["ema_default"]
        if not {"cfg", "interval", "space", "net_size"} <= set(config) or type(state["classes"]) is not list:
            raise ValueError("its config is of another version")
        need(model in (None, config["model"]), f"--model {model}: it holds a {config['model']}")
        need(ema in file["ema"] or ema == "none", f"--ema {ema}: it has {', '.join(file['ema'])} or none")
        return config, file["model"] if ema == "none" else file["ema"][ema], state, file["step"], ema

def load(path, ema=None, model=None, tokenizer=None, stats=None, device="cpu"):
    """Open a checkpoint of ours or a published one, ready to sample.
    ema          which average: a key of the checkpoint's "ema", "none" for the raw weights; None: its default
    model        the size, for published files (else found from the shapes)
    tokenizer    VA-VAE weights file; stats: latents_stats.pt, for published latent networks
    Returns a namespace: kdiff, codec, shape (of x), classes (names), config, step, ema; else UserError."""
    config, weights, state, step, ema = read_weights(path, ema, model)
    if stats:
        values = read_tensors(stats)
        with checked(stats, "latent statistics"):
            state = state | {key: values[key].float().view(1, -1, 1, 1) for key in ("mean", "std")}
    need(config["space"] == "pixel" or state.get("mean") is not None,
         f"{path}: a latent network needs --stats (latents_stats.pt) and --tokenizer to sample")
    with checked(path, f"a {config.get('model')} whose weights fit"):
        kdiff, codec = assemble(config), unpack_codec(state, tokenizer)
        kdiff.load_state_dict(weights)
    return SimpleNamespace(
        kdiff=kdiff.to(device).eval().requires_grad_(False), codec=codec.to(device), shape=shape_of(config),
        classes=state["classes"], config=config, step=step, ema=ema)

# ---- Drawing (Pillow alone) --------------------------------------------------------------------------------

INK, GREY, PAPER = (30, 30, 30), (200, 200, 200), (255, 255, 255)
COLOURS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (120, 120, 120)]

def grid(images, names, columns):
    """A picture of uint8 images (N,3,H,W) in rows of `columns`, names in front; small ones enlarged."""
    size = images.shape[-1]
    zoom, gap = max(1, 96 // size), 4
    cell, font = size * zoom + gap, ImageFont.load_default(14)
    margin = 16 + int(max(font.getlength(name) for name in names))
    sheet = Image.new("RGB", (margin + columns * cell + gap, -(-len(images) // columns) * cell + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        picture = picture.resize((size * zoom,) * 2, Image.NEAREST)
        sheet.paste(picture, (margin + column * cell, gap + row * cell))
        if column == 0:
            pen.text((8, gap + row * cell + cell // 2), names[row], INK, font, anchor="lm")
    return sheet

def draw_paths(paths, names, out):
    """Write a GIF of the solver's way: paths holds, a row each, lists of uint8 images (N,3,H,W)."""
    frames = [grid(torch.cat(images), names, len(images[0])) for images in zip(*paths)]
    write_atomically(out, lambda temporary: frames[0].save(
        temporary, save_all=True, append_images=frames[1:] + frames[-1:] * 15, duration=80, loop=0))

def nearest(images, data):
    """To each of the uint8 images (N,3,H,W) the item of a dataset whose pixels are nearest: (N,3,H,W)."""
    distance, found = torch.full((len(images),), math.inf), images.clone()
    for _, batch, _ in read_in_batches(data, range(len(data)), 512):
        d, i = torch.cdist(images.flatten(1).float(), batch.flatten(1).float()).min(1)
        found = torch.where((d < distance).view(-1, 1, 1, 1), batch[i], found)
        distance = torch.minimum(d, distance)
    return found

def ticks(low, high):
    """About five round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 5.01)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]

def draw_curves(panels, path):
    """Write panels side by side, each (title, x label, {name: (xs, ys)}); y from 0 to 1 where that fits."""
    W, H, left, right, top, bottom = 560, 380, 64, 20, 40, 46
    sheet = Image.new("RGB", (W * len(panels), H), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for p, (title, x_label, curves) in enumerate(panels):
        xs, ys = ([v for curve in curves.values() for v in curve[i] if math.isfinite(v)] for i in (0, 1))
        if not xs or not ys:
            continue
        x0, x1 = min(xs), max(max(xs), min(xs) + 1)
        y0, y1 = min(0, min(ys)), max(max(ys), 1e-9) * 1.05
        y1 = 1 if y0 == 0 and 0.3 < max(ys) <= 1 else y1
        px = lambda x: p * W + left + (x - x0) / (x1 - x0) * (W - left - right)
        py = lambda y: H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom)
        for x in ticks(x0, x1):
            pen.line([(px(x), py(y0)), (px(x), py(y1))], GREY)
            pen.text((px(x), py(y0) + 6), f"{x:,.10g}", INK, font, anchor="mt")
        for y in ticks(y0, y1):
            pen.line([(px(x0), py(y)), (px(x1), py(y))], GREY)
            pen.text((px(x0) - 6, py(y)), f"{y:.10g}", INK, font, anchor="rm")
        lasts = [curve[1][-1] for curve in curves.values() if curve[1]]
        legend = H - bottom - 10 - 18 * len(curves) if min(lasts) > (y0 + y1) / 2 else top + 10
        for i, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            points = [(x, y) for x, y in zip(*curve) if math.isfinite(x) and math.isfinite(y)]
            pen.line([(px(x), py(min(max(y, y0), y1))) for x, y in points], colour, 2)
            if len(curves) > 1:
                pen.text((p * W + W - right - 8, legend + 18 * i), name, colour, font, anchor="rt")
        pen.text((p * W + W // 2, 12), title, INK, ImageFont.load_default(16), anchor="mt")
        pen.text((p * W + W // 2, H - 8), x_label, INK, font, anchor="mb")
    write_atomically(path, sheet.save)

def draw_spectrum(columns, path):
    """What target "channel" learned, beside theory, as a picture and a csv file of the same name. columns:
    tensors (C,) "channel", "variance" (in units of the noise's), "k" and perhaps "k_of_innovation"."""
    x, k, variance, innovation = map(columns.get, ("channel", "k", "variance", "k_of_innovation"))
    theory = {"1 / (1 + variance)": k_of_direction(variance), "1 / (1 + innovation)": innovation}
    curves = {"learned": k, **theory}
    curves = {name: (x.tolist(), ks.tolist()) for name, ks in curves.items() if ks is not None}
    logs = {"": (x.tolist(), variance.clamp(min=1e-9).log10().tolist())}
    draw_curves([("k of each channel", "channel", curves),
                 ("log10 of its variance / the noise's", "channel", logs)], path)
    rows = zip(*[[f"{value:.6g}" for value in values.tolist()] for values in columns.values()])
    write_rows(path.with_suffix(".csv"), list(columns), [dict(zip(columns, row)) for row in rows])

def read_rows(path):
    """The rows of a csv file, each a dict."""
    with checked(path, "a table"), open(path, newline="") as file:
        return list(csv.DictReader(file))

def read_log(run_folder, column):
    """(steps, values) of a column of a run's log.csv, rows without a value left out."""
    with checked(run_folder, f"a run whose log.csv has a column {column!r}"):
        rows = [row for row in read_rows(Path(run_folder, "log.csv")) if row[column]]
        return [float(row["step"]) for row in rows], [float(row[column]) for row in rows]

def write_rows(path, columns, rows):
    """Write a csv file of rows, each a dict."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))

def draw_k_of_t(kdiff, path):
    """Fig. 5: k(t), learned by target "time", EDM's beside it, and the density of training's times."""
    t = torch.linspace(0, 1, 8 * BINS + 1)
    c, d = kdiff.coefficients(t.to(kdiff.index.device))
    k, inner = (c / (c - d)).detach().flatten().cpu(), t[1:-1]
    p, x_label = logit_normal(kdiff.t_mean, kdiff.t_std)(inner), "t: noise to data"
    curves = {kdiff.target: (t.tolist(), k.tolist()), "edm": (t.tolist(), (1 - t).tolist())}
    draw_curves([("k(t)", x_label, curves),
                 ("density of the times in training", x_label, {"p": (inner.tolist(), p.tolist())})], path)

# ---- Samples for evaluation --------------------------------------------------------------------------------

def measure(it, path, batches, extractor, reference, settings):
    """Append the distance of samples to fid.csv beside the checkpoint, unless it is there; draw fid.png.
    it: of load(), batches: of generate_split(), from every process, settings: what a row tells of them."""
    table, key = Path(path).with_name("fid.csv"), {name: str(value) for name, value in settings.items()}
    rows, found = read_rows(table) if table.exists() else [], ["fid", "pixel_distance", "is_mean", "is_std"]
    need(all(list(row) == [*key, *found] and str(row["step"]).isdecimal() for row in rows),
         f"{table}: not a table of these measurements; move it away")
    barrier()                                                  # all have read before the first writes
    if any(key.items() <= row.items() for row in rows):
        return print0(f"{path}: measured already, in {table}")
    result = fid.evaluate(((images, indices[0]) for images, indices in batches), extractor, reference,
                          next(it.kdiff.parameters()).device)
    fid.show(result, reference, extractor.sha256, settings)
    row = key | {name: f"{result[name]:.6g}" if name in result else "" for name in found}
    if RANK == 0:
        rows, curves = sorted([*rows, row], key=lambda each: int(each["step"])), {}
        write_rows(table, list(row), rows)
        for each in rows:
            if each[extractor.key]:
                xs, ys = curves.setdefault(f"EMA {each['ema']}, CFG {each['cfg']}, n {each['n']}", ([], []))
                xs.append(int(each["step"]))
                ys.append(float(each[extractor.key]))
        draw_curves([(extractor.key.replace("_", " "), "step", curves)], table.with_suffix(".png"))
    barrier()                                                  # until it is written

def write_samples(batches, labels, size, out, settings):
    """Write samples of `size` px, made by all processes: an .npz (arr_0, arr_1, settings), or PNGs."""
    out = Path(out)
    if out.suffix != ".npz":
        need(not out.is_dir() or not any(out.iterdir()), f"--out {out} holds files: name another folder")
        barrier()                                              # all have looked before the first writes
        for images, indices in batches:
            for image, i in zip(images.permute(0, 2, 3, 1).cpu().numpy(), indices):
                write_atomically(out / f"{i:06}_{labels[i]}.png", Image.fromarray(image).save)
        return
    part = out.with_name(f"{out.name}.tmp.npy")                # written by all, and then put into the .npz

    def write(temporary):
        with zipfile.ZipFile(temporary, "w") as file:
            file.write(part, "arr_0.npy")
            for name, array in (("arr_1", labels), ("settings", json.dumps(settings))):
                with file.open(f"{name}.npy", "w") as member:
                    np.save(member, array)
    try:
        pixels = ArrayFile(part, np.uint8, (len(labels), size, size, 3))
        for images, indices in batches:
            pixels.write(indices[0], images.permute(0, 2, 3, 1).cpu().numpy())
        barrier()
        if RANK == 0:
            write_atomically(out, write)
    finally:
        if RANK == 0:
            part.unlink(missing_ok=True)

def choose_classes(text, names):
    """The indices that a --classes value names: numbers or class names, separated by commas."""
    chosen, listed = [], f" ({', '.join(names)})" if len(names) <= 20 else ""
    for word in text.split(","):
        need(word in names or word.isdecimal() and int(word) < len(names),
             f"--classes {word}: not a label of this checkpoint, which has 0 to {len(names) - 1}{listed}")
        chosen.append(int(word) if word.isdecimal() and word not in names else names.index(word))
    return chosen

def parse():
    """The command line. UserError for flags that do not go together."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="+", help="ours or published; several for --fid, --gif; for --plot runs' folders")
    add("--classes", help="names or numbers, separated by commas (default: all, in a grid the first 8)")
    add("--n", "--samples", type=int, help="images (default: 8 a class in a grid, 50,000 for --fid)")
    add("--cfg", type=float, help="guidance scale; 1 is none (default: the checkpoint's)")
    add("--interval", type=float, nargs=2, help="times within which guidance acts (the checkpoint's)")
    add("--steps", type=int, default=50, help="solver steps (default 50)")
    add("--solver", choices=("heun", "euler"), default="heun", help="(default heun)")
    add("--ema", help="which average of the weights, or none (default: the checkpoint's)")
    add("--seed", type=int, default=0, help="(default 0)")
    add("--batch_size", type=int, default=64, help="images at a time on each process (default 64)")
    add("--out", help="picture (.png), .npz of samples, or a folder for PNGs (default: samples.png beside)")
    add("--model", help="the size of a published checkpoint, where it cannot be told from the shapes")
    add("--tokenizer", help="VA-VAE weights file, for latent checkpoints")
    add("--stats", help="latents_stats.pt, for published latent checkpoints")
    add("--device", help="default: cuda, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of autocast (default: bfloat16 if the GPU has it)")
    add("--fid", metavar="REF", help="evaluate against this reference (see fid.py)")
    add("--features", choices=list(fid.EXTRACTORS), default="inception", help="for --fid (default inception)")
    add("--weights", help="Inception weights file, for --fid")
    add("--nearest", metavar="DATA", help="below each sample its nearest picture of these training data")
    add("--gif", metavar="FILE", help="draw the solver's way from noise to picture, a row a checkpoint")
    add("--plot", metavar="COLUMN", help="draw this column of the log.csv of the runs given")
    args = parser.parse_args()
    check_ranges(args, n=1, steps=1, batch_size=1)
    need(Path(args.out or "").suffix in ("", ".png", ".npz"), f"--out {args.out}: a .png, .npz or folder")
    need(not args.fid or not args.out, "--fid measures samples without writing them: leave out --out")
    need(not args.gif or args.gif.endswith(".gif") and not (args.fid or args.out),
         "--gif FILE.gif goes without --fid and --out")
    need(not args.plot or (args.out or ".png").endswith(".png"), f"--out {args.out}: a .png for --plot")
    need(args.fid or args.plot or args.gif or len(args.checkpoint) == 1,
         f"{args.checkpoint[-1]}: one checkpoint at a time, but for --fid, --gif and --plot")
    return args

def main():
    """Draw a grid, a GIF or curves, write samples or measure them, as the flags say."""
    args, ways = parse(), {}
    if args.plot:
        out = args.out or f"{args.plot}.png"
        curves = {"/".join(Path(run).parts[-2:]): read_log(run, args.plot) for run in args.checkpoint}
        draw_curves([(args.plot, "step", curves)], out)
        return print0(f"wrote {out}")
    device = setup(args.device)
    if args.fid:
        reference = fid.load_reference(args.fid, args.features)
        extractor = fid.make_extractor(args.features, args.weights, device)
    picture = not args.fid and (args.out is None or args.out.endswith(".png"))        # a grid, or a GIF
    for path in map(Path, args.checkpoint):
        it = load(path, args.ema, args.model, args.tokenizer, args.stats, device)
        need(it.codec.decodes, f"{path}: latents need their tokenizer to become images: --tokenizer FILE")
        classes = range(len(it.classes))[:8 if picture else None]
        classes = choose_classes(args.classes, it.classes) if args.classes else classes
        how = dict(cfg=it.config["cfg"] if args.cfg is None else args.cfg,
                   interval=args.interval or it.config["interval"], steps=args.steps,
                   solver="euler" if args.gif else args.solver, seed=args.seed,
                   dtype=args.dtype or fastest_dtype(device))
        n = args.n or (50_000 if args.fid else len(classes) * (8 if picture and not args.gif else 1))
        settings = dict(checkpoint=path.name, step=it.step, ema=it.ema, model=it.config["model"],
                        net_size=it.config["net_size"], n=n, classes=args.classes or "all", **how)
        print0(f"{path}: {it.config['model']}, step {it.step}, EMA {it.ema} | "
               + " | ".join(f"{key} {value}" for key, value in how.items()))
        if device.type == "cuda" and n // WORLD >= 1000:    # for fewer, compiling takes longer than it saves
            compile_network(it.kdiff.net)
        columns, out = math.ceil(n / len(classes)), args.out or path.with_name("samples.png")
        labels = [c for c in classes for _ in range(columns)]                         # whole rows
        if not picture:
            labels = [classes[i % len(classes)] for i in range(n)]
            batches = generate_split(it.kdiff, it.codec, it.shape, labels, args.batch_size, **how)
        if args.fid:
            settings |= {"solver_steps": settings.pop("steps"), "reference": args.fid}
            measure(it, path, batches, extractor, reference, settings)
        elif not picture:
            size = it.shape[1] * getattr(it.codec.tokenizer, "factor", 1)
            write_samples(batches, labels, size, out, settings)
            print0(f"wrote {out}: {n:,} samples")
        elif RANK == 0 and args.gif:
            way = ways[f"{path.parent.name}/{path.stem}"] = []
            last = generate(it.kdiff, it.codec, it.shape, labels[:n], range(n), **how,
                            watch=lambda z: way.append(it.codec.decode(z).cpu()))
            way.append(last.cpu())
        elif RANK == 0:
            images = sample_all(it.kdiff, it.codec, it.shape, labels, args.batch_size, **how)
            names = [it.classes[c] for c in classes]
            if args.nearest:
                data = open_dataset(args.nearest, images.shape[-1])
                need(data[0][0].dtype == torch.uint8, f"--nearest {args.nearest}: latents, not images")
                both = images, nearest(images, data)
                images = torch.stack([each.unflatten(0, (-1, columns)) for each in both], 1).flatten(0, 2)
                names = [each for name in names for each in (name, "nearest")]
            write_atomically(out, grid(images, names, columns).save)
            print0(f"wrote {out}: {len(labels)} samples")
    if args.gif and RANK == 0:
        need(len({way[0].shape[1:] for way in ways.values()}) == 1, "--gif: checkpoints of one image size")
        draw_paths(ways.values(), list(ways), args.gif)
        print0(f"wrote {args.gif}")

if __name__ == "__main__":
    run(main)
