"""Edit pictures with a trained network: vary one from a noised state, and fill a hole.

    python examples/edit.py assets/fashion.pt shirt edit.png            # a class name, or its number
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import run
from sample import choose_classes, grid, guided, integrate, load, save_picture

@torch.no_grad()
def vary(checkpoint, x, y, start, steps=25):
    """Variations of x (N, C, H, W): noised up to t = start, then solved from there."""
    z = start * x + (1 - start) * checkpoint.kdiff.noise_scale * torch.randn_like(x)
    config = checkpoint.config
    velocity = guided(checkpoint.kdiff, y, config["cfg"], config["interval"])
    *_, z = integrate(velocity, z, steps, start=start)
    return z

@torch.no_grad()
def fill(checkpoint, x, y, hole, steps=50):
    """Pictures equal to x (N, C, H, W) outside of hole, a boolean mask (H, W)."""
    e = checkpoint.kdiff.noise_scale * torch.randn_like(x)
    config = checkpoint.config
    velocity = guided(checkpoint.kdiff, y, config["cfg"], config["interval"])
    for i, z in enumerate(integrate(velocity, e, steps)):
        t = (i + 1) / steps
        z.copy_(torch.where(hole, z, t * x + (1 - t) * e))              # what is known, at this noise
    return z

def main(path, label, out, n=8):
    """Draw pictures of a class, variations of them, the same with a hole, and the hole filled."""
    checkpoint = load(path)
    torch.manual_seed(0)
    index = choose_classes(label, checkpoint.classes)[0]
    images = checkpoint.sample([index], n)
    x, y = checkpoint.codec.encode(images), torch.full((n,), index)
    hole = torch.zeros(x.shape[2:], dtype=torch.bool)
    hole[x.shape[2] // 4:x.shape[2] // 2] = True
    rows = {"pictures": x}
    rows["from t = 0.3"] = vary(checkpoint, x, y, 0.3)
    rows["from t = 0.5"] = vary(checkpoint, x, y, 0.5)
    rows["a hole"] = x.masked_fill(hole, 0)
    rows["filled"] = fill(checkpoint, x, y, hole)
    pictures = checkpoint.codec.decode(torch.cat(list(rows.values())))
    save_picture(grid(pictures, list(rows)), out)

if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
