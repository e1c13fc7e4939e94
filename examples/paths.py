"""From noise to images with several checkpoints side by side, each under the name of its target.

    python examples/paths.py strip.png out/pixel-{eps,v,x}/ckpt.pt out/pixel/ckpt.pt       where they end
    python examples/paths.py paths.gif out/pixel-{eps,v,x}/ckpt.pt out/pixel/ckpt.pt       the way there
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import new_file, run, seed_of
from objective import seeded_normal
from sample import INK, PAPER, guided, integrate, load, save_picture

ACROSS = 3                            # a panel has 3 x 3 images
SIDE, GAP, TITLE = 64, 20, 28         # of an image, between panels, above them, in pixels
WORDS = {"eps": "noise (eps)", "v": "velocity (v)", "x": "image (x)"}

def name_of(kdiff):
    """The target in words."""
    k = f"k = {kdiff.ks()['k']:.2f}"
    if kdiff.w is not None:
        return f"learned ({k})"
    return WORDS.get(kdiff.target, k)

@torch.no_grad()
def way(checkpoint, steps):
    """The images (N, 3, H, W) before the first step of the solver and after each. All
    checkpoints start from the same noise."""
    kdiff, config = checkpoint.kdiff, checkpoint.config
    seeds = [seed_of(0, "sample", i) for i in range(ACROSS ** 2)]
    z = kdiff.noise_scale * seeded_normal(config["shape"], seeds, "cpu")
    y = torch.arange(len(z)) % len(checkpoint.classes)
    velocity = guided(kdiff, y, config["cfg"], config["interval"])
    return [checkpoint.codec.decode(z) for z in (z, *integrate(velocity, z, steps))]

def draw(panels, names):
    """A picture of panels in a row, each some images (N, 3, H, W) below their name."""
    width = ACROSS * (SIDE + 2) + GAP
    sheet = Image.new("RGB", (width * len(panels), TITLE + ACROSS * (SIDE + 2) + GAP // 2), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for p, images in enumerate(panels):
        left = p * width + GAP // 2
        pen.text((left + (width - GAP) // 2, TITLE // 2), names[p], INK, font, anchor="mm")
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            row, column = divmod(i, ACROSS)
            image = Image.fromarray(image).resize((SIDE, SIDE), Image.NEAREST)
            sheet.paste(image, (left + column * (SIDE + 2), TITLE + row * (SIDE + 2)))
    return sheet

def main(out, *paths, steps=18):
    """Write a PNG of the solver's last step, or a GIF of all of them."""
    checkpoints = [load(path) for path in paths]
    names = [name_of(checkpoint.kdiff) for checkpoint in checkpoints]
    ways = [way(checkpoint, steps) for checkpoint in checkpoints]
    frames = [draw(panels, names) for panels in zip(*ways)]
    if Path(out).suffix != ".gif":
        return save_picture(frames[-1], out)
    frames = [frame.quantize(64) for frame in frames]                   # noise hardly compresses
    frames += frames[-1:] * 15                                          # rest at the end
    with new_file(out) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)

if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
