"""The target without a formula: one picture, its noise, and what the network is asked for as k slides.

    python examples/target.py assets/target.png
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import Codec, Shapes
from sample import INK, PAPER

def main(out, item=13, size=96, t=0.5):
    """Draw x, e, z = t x + (1-t) e, and u = k x - (1-k) e for k from 0 to 1."""
    torch.manual_seed(0)
    x = Codec().encode(Shapes(item + 1, 32)[item][0][None])
    e = 0.5 * torch.randn_like(x)                                       # half as loud, so that eyes see through
    pictures = {"picture x": x, "noise e": e, "input z": t * x + (1 - t) * e}
    for k, name in ((0, "k = 0: noise"), (0.25, "k = 1/4"), (0.5, "k = 1/2: velocity"), (0.75, "k = 3/4"),
                    (1, "k = 1: picture")):
        pictures[name] = (k * x - (1 - k) * e) / max(k, 1 - k)          # scaled to the picture's range
    cell = size + 44
    sheet = Image.new("RGB", (len(pictures) * cell + 8, size + 36), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (name, picture) in enumerate(pictures.items()):
        image = Image.fromarray(Codec().decode(picture)[0].permute(1, 2, 0).numpy())
        sheet.paste(image.resize((size, size), Image.NEAREST), (i * cell + 26, 28))
        pen.text((i * cell + 26 + size // 2, 14), name, INK, font, anchor="mm")
    sheet.save(out)

if __name__ == "__main__":
    main(*sys.argv[1:])
