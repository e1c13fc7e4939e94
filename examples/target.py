"""The target without a formula: an image, its noise, and what the network is asked for as k slides.

    python examples/target.py assets/target.png
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import Codec, Shapes
from objective import blend
from sample import COLOURS, INK, PAPER, save_picture

SIDE, TOP = 96, 56                    # of an image, and the text above it, in pixels
TARGETS = {0: "noise", 0.25: "", 0.5: "velocity", 0.75: "", 1: "image"}

def main(out, item=13, t=0.5):
    """On the left x, e and z = t x + (1-t) e. On the right u = k x - (1-k) e for five k."""
    torch.manual_seed(0)
    x = Codec().encode(Shapes(item + 1, 32)[item][0][None])
    e = 0.5 * torch.randn_like(x)                                       # half as loud: eyes see through
    z = t * x + (1 - t) * e
    sheet = Image.new("RGB", (900, TOP + SIDE + 48), PAPER)
    pen = ImageDraw.Draw(sheet)

    def write(text, middle, y, size=15):
        pen.text((middle, y), text, INK, ImageFont.load_default(size), anchor="mm")

    def paste(tensor, middle, name):
        image = Image.fromarray(Codec().decode(tensor)[0].permute(1, 2, 0).numpy())
        sheet.paste(image.resize((SIDE, SIDE), Image.NEAREST), (middle - SIDE // 2, TOP))
        write(name, middle, TOP - 12)

    # what goes in
    write("What the network sees is z", 174, 16, 18)
    paste(x, 56, "image x")
    write("+", 115, TOP + SIDE // 2, 20)
    paste(e, 174, "noise e")
    write("=", 233, TOP + SIDE // 2, 20)
    paste(z, 292, "z, half of each")

    # what shall come out, above a slider
    write("What it is asked for, as k slides", 636, 16, 18)
    slider = TOP + SIDE + 14
    pen.line([(428, slider), (844, slider)], COLOURS[0], 3)
    for k, name in TARGETS.items():
        middle = 428 + round(416 * k)
        c, d = blend(k)
        paste((c * x + d * e) / max(c, -d), middle, name)               # scaled to the range of an image
        pen.circle((middle, slider), 6, COLOURS[0])
        write(f"k = {k}", middle, slider + 20)
    save_picture(sheet, out)

if __name__ == "__main__":
    main(*sys.argv[1:])
