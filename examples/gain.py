"""Do networks use a channel's own value? Their gains du_i/dz_i tell: those of blind networks are 0.

    python examples/gain.py                      # trains three networks in out/gain: half an hour on one core
    python examples/gain.py gain.png out/gain "JiT-demo/8 JiT-open/8"

Channels are components of patches of shapes. Networks differ in width, bottleneck and patches.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from data import open_dataset, read_items
from model import SIZES
from objective import innovation, k_of_innovation, show
from sample import draw_curves, load

SIZES["JiT-open"] = SIZES["JiT-wide"] | {"bottleneck": 192}            # as many as values in a patch
NAMES = "JiT-wide/8 JiT-open/8 JiT-demo/4"

def measure(kdiff, x, y, t):
    """Mean gain, and mean square error of the predicted x, like x (N, C, h, w), in each channel: two (C,)."""
    torch.manual_seed(0)
    C, side = x.shape[1:3]
    channel, times = torch.arange(C), torch.full((C,), t)
    gains, errors = [], []
    for images, labels in zip(x.split(C), y.split(C)):                 # image i measures channel i
        z = t * images + (1 - t) * torch.randn_like(images)
        u = kdiff.net(z.requires_grad_(), times, labels)
        place = channel, channel, *torch.randint(side, (2, C))
        slope, = torch.autograd.grad(u[place].sum(), z)
        gains.append(slope[place])
        off = z + (1 - t) * kdiff.velocity(u, z, times) - images
        errors.append(off.detach().square().mean((0, 2, 3)))
    return sum(gains) / len(gains), sum(errors) / len(errors)

def best_gain(k, error, t):
    """For u = k x - (1-k) e. By Tweedie's formula the best prediction of x has slope t error / (1-t)^2."""
    delta = k * (1 - t) + (1 - k) * t                                  # u = (delta x - (1-k) z) / (1-t)
    return (delta * t * error / (1 - t) ** 2 - (1 - k)) / (1 - t)

def main(out="gain.png", folder="out/gain", names=NAMES, steps=1000, n=3072, times=(0.15, 0.6, 0.3)):
    """Print a row for each network and time. Draw the first two at the last time."""
    images, y = read_items(data := open_dataset("shapes", 32), range(len(data)))
    panels = []
    for name in names.split():
        run = Path(folder, name.replace("/", "-"))
        sys.argv[1:] = f"--target channel --model {name} --steps {steps} --samples 0 --out {run}".split()
        train.main()
        kdiff, codec, *_ = load(run / "ckpt.pt", ema="none")
        x, k = codec.encode(images), torch.sigmoid(kdiff.w).flatten()
        off = k - k_of_innovation(x, kdiff.t_mean, kdiff.t_std)
        print(f"{name}: k is {off.abs().mean():.4f} off the formula, in the mean {off.mean():+.4f}")
        for t in times:
            noise = torch.tensor([1 / t - 1]) ** 2                     # its variance in z / t
            r = innovation(x, noise)[0].float()
            gain, error = measure(kdiff, x[:n], y[:n], t)
            gains = {name: gain, "best": best_gain(k, error, t)}
            gains["linear"] = best_gain(k, r * noise / (r + noise), t)
            print(f"t = {t}: mean size of the gain in four quarters of the channels, correlation with row 1")
            for title, row in gains.items():
                correlation = torch.stack([gain, row]).corrcoef()[0, 1]
                show(title, [*row.abs().view(4, -1).mean(1), correlation], 4)
        panels.append({title: (range(len(k))[:61], row[:61]) for title, row in gains.items()})
    draw_curves(panels[:2], out, "channel")

if __name__ == "__main__":
    main(*sys.argv[1:])
