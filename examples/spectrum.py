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
from data import open_dataset, some_items
from losses import logit_normal
from objective import k_of_direction, k_of_innovation
from sample import draw_curves, load, write_rows

def main(path):
    """Draw the spectrum of the checkpoint's raw weights."""
    checkpoint = load(path, ema="none")
    kdiff, config, out = checkpoint.kdiff, checkpoint.config, Path(path).parent
    t = torch.linspace(0, 1, 1025)
    if config["target"] == "time":
        c, d = kdiff.coefficients(t)
        k, inner = (c / (c - d)).flatten(), t[1:-1]
        density = logit_normal(kdiff.t_mean, kdiff.t_std)(inner)
        draw_curves([{"k(t)": (t.tolist(), k.tolist()), "EDM: 1 - t": (t.tolist(), (1 - t).tolist())},
                     {"density of the times in training": (inner.tolist(), density.tolist())}],
                    out / "k_of_t.png", "t: noise to data")
        return
    x = checkpoint.codec.encode(some_items(open_dataset(config["data"], config["image_size"]), 16384))
    variance = x.var(0).mean((1, 2)) / kdiff.noise_scale ** 2           # around the mean picture
    columns = {"k": torch.sigmoid(kdiff.w).flatten(), "1 / (1 + variance)": k_of_direction(variance),
               "1 / (1 + innovation)": k_of_innovation(x, kdiff.t_mean, kdiff.t_std, kdiff.noise_scale)}
    channels = list(range(len(variance)))
    draw_curves([{name: (channels, ks.tolist()) for name, ks in columns.items()},
                 {"log10 of variance / noise": (channels, variance.clamp(min=1e-9).log10().tolist())}],
                out / "k_of_channel.png", "channel")
    table = {"variance": variance, "k": columns["k"], "k_of_variance": columns["1 / (1 + variance)"],
             "k_of_innovation": columns["1 / (1 + innovation)"]}
    rows = [{"channel": c} | {name: f"{column[c]:.6g}" for name, column in table.items()} for c in channels]
    write_rows(out / "k_of_channel.csv", list(rows[0]), rows)
    for name in ("k_of_variance", "k_of_innovation"):
        print(f"mean distance of k from {name}: {(table['k'] - table[name]).abs().mean():.4f}")

if __name__ == "__main__":
    main(*sys.argv[1:])
