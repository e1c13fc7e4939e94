"""The solver's way from noise to pictures as a GIF, one row for each checkpoint.

    python examples/paths.py paths.gif out/eps/ckpt.pt out/v/ckpt.pt out/x/ckpt.pt out/k/ckpt.pt
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import new_file, seed_of
from objective import seeded_normal
from sample import grid, guided, integrate, load

@torch.no_grad()
def main(out, *paths, n=8, steps=50):
    """Draw every state of the solver. All checkpoints must have pictures of one size."""
    ways = []
    for path in paths:
        checkpoint = load(path)
        kdiff, config = checkpoint.kdiff, checkpoint.config
        y = torch.arange(n) % len(checkpoint.classes)
        z = kdiff.noise_scale * seeded_normal(config["shape"], [seed_of(0, "sample", i) for i in range(n)], "cpu")
        velocity = guided(kdiff, y, config["cfg"], config["interval"])
        states = [z, *integrate(velocity, z, steps, "euler")]
        ways.append([checkpoint.codec.decode(z) for z in states])
    names = [load(path).config["target"] for path in paths]
    frames = [grid(torch.cat(images), names, n) for images in zip(*ways)]
    frames = [frame.quantize(64) for frame in frames]
    with new_file(out) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:] + frames[-1:] * 15, duration=80, loop=0)

if __name__ == "__main__":
    main(*sys.argv[1:])
