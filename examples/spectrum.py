"""What a target has learned, next to theory: a k for each channel, or k(t).

    python train.py --target channel && python examples/spectrum.py out/pixel-channel/ckpt.pt
    python train.py --space latent --target time && python examples/spectrum.py out/latent-time/ckpt.pt

Writes k_of_channel.png and k_of_channel.csv (channel, variance in units of the noise's, k, and what theory
says), or k_of_t.png, next to the checkpoint.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import open_dataset, run, some_items
from losses import logit_normal
from objective import k_of_direction, k_of_innovation
from sample import draw_curves, load, write_rows

def draw_times(kdiff, out):
    """k(t) next to EDM's, and where training draws its times."""
    t = torch.linspace(0, 1, 1025)
    c, d = kdiff.coefficients(t)
    k = (c / (c - d)).flatten()
    inner = t[1:-1]
    density = logit_normal(kdiff.t_mean, kdiff.t_std)(inner)
    draw_curves([{"k(t)": (t, k.detach()), "EDM: 1 - t": (t, 1 - t)},
                 {"density of the times in training": (inner, density)}], out, "t: noise to data")

def main(path):
    """Draw the spectrum of the checkpoint's raw weights."""
    checkpoint = load(path, ema="none")
    kdiff, config = checkpoint.kdiff, checkpoint.config
    if config["target"] == "time":
        return draw_times(kdiff, Path(path).with_name("k_of_t.png"))
    x = checkpoint.codec.encode(some_items(open_dataset(config["data"], config["image_size"]), 16384))
    variance = x.var(0).mean((1, 2)) / kdiff.noise_scale ** 2           # around the mean picture
    table = {"variance": variance, "k": torch.sigmoid(kdiff.w).flatten()}
    table["k_of_variance"] = k_of_direction(variance)
    table["k_of_innovation"] = k_of_innovation(x, kdiff.t_mean, kdiff.t_std, kdiff.noise_scale)
    channels = torch.arange(len(variance))
    curves = {name: (channels, table[name]) for name in ("k", "k_of_variance", "k_of_innovation")}
    strength = {"log10 of variance / noise": (channels, variance.clamp(min=1e-9).log10())}
    draw_curves([curves, strength], Path(path).with_name("k_of_channel.png"), "channel")
    rows = []
    for i in range(len(variance)):
        rows.append({"channel": i} | {name: f"{column[i]:.6g}" for name, column in table.items()})
    write_rows(Path(path).with_name("k_of_channel.csv"), list(rows[0]), rows)
    for name in ("k_of_variance", "k_of_innovation"):
        print(f"mean distance of k from {name}: {(table['k'] - table[name]).abs().mean():.4f}")

if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
