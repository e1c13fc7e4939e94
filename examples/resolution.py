"""k against resolution, foretold from pictures alone: it goes to 1 as pictures grow.

    python examples/resolution.py                               # pictures of power spectrum 1 / f^2
    python examples/resolution.py resolution.png PHOTOGRAPHS    # yours: half an hour on one core
"""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from data import DATASETS, Codec, Dataset, list_images, read_image
from objective import k_of_direction, k_of_innovation, show
from sample import draw_curves, read_log

def made_picture(seed, side=1024):
    """Power 1 / f^2, std 0.5. What differs between colors is a third as loud as what they share."""
    torch.manual_seed(seed)
    noise = torch.randn(3, side, side) + 3 * torch.randn(side, side)
    f = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)).clamp(min=1 / side)
    x = torch.fft.irfft2(torch.fft.rfft2(noise) / f)[None]
    return Image.fromarray(Codec().decode(0.5 * x / x.std())[0].permute(1, 2, 0).numpy())

def crops(images, R, each):
    """uint8 (N, 3, R, R): square crops, 2/3 to 1 times the shorter side; fewer crops for large R."""
    found = []
    for image in images:
        torch.manual_seed(0)
        for share, x, y in torch.rand(min(each, max(2, 2 ** 21 // R ** 2)), 3).tolist():
            side = int(min(image.size) * (1 - share / 3))
            left, top = x * (image.width - side), y * (image.height - side)
            part = image.resize((R, R), box=(left, top, left + side, top + side), reducing_gap=3.0)
            found.append(torch.from_numpy(np.array(part)).permute(2, 0, 1))
    return torch.stack(found)

def learned_k(pictures, steps):
    """What the demo's network learns in so many steps."""
    data, R = Dataset(), pictures.shape[2]
    data.n, data.classes, data.item = len(pictures), ["picture"], lambda i: (pictures[i], 0)
    DATASETS["crops"] = lambda image_size: data
    flags = f"--data crops --preset demo --image_size {R} --model JiT-demo/{R // 4} --samples 0"
    sys.argv[1:] = f"{flags} --steps {steps} --out out/resolution-{R}".split()
    train.main()
    return read_log(f"out/resolution-{R}", "k")[1][-1]

def main(out="resolution.png", source=None, steps=1000, largest=9, each=200):
    """Print and draw k for R = 8, 16, ..., 2^largest. Steps 0: nothing is trained."""
    images = map(read_image, list_images(source)) if source else map(made_picture, range(32))
    images, names, table = list(images), ("innovation", "D/(D+trace S)", "learned", "noise R/256"), []
    print("   R       ", *names)
    for R in [2 ** power for power in range(3, int(largest) + 1)]:
        pictures = crops(images, R, int(each))
        x = Codec().encode(pictures)
        k = [k_of_innovation(x, -0.8, 0.8, together=True).item()]
        k += [k_of_direction(x.var(0).mean()).item(), np.nan]
        if int(steps) and R <= 64:
            k[2] = learned_k(pictures, steps)
        k.append(k_of_innovation(x, -0.8, 0.8, R / 256, together=True).item())
        show(str(R), k, 4)
        table.append(k)
    panels = [{}, {}]
    for i, column in enumerate(1 - np.array(table).T):                  # how far from predicting the picture
        panels[i // 3][f"1 - k: {names[i]}"] = range(len(table)), column
    draw_curves(panels, out, "n of the side R = 8 * 2^n")

if __name__ == "__main__":
    main(*sys.argv[1:])
