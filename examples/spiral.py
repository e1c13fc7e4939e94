"""The spiral of the JiT paper (its Figure 2) with k learned: the whole method with a network of another kind.

    python examples/spiral.py                    # trains 16 networks, writes spiral.png
"""
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from objective import KDiff
from sample import COLOURS, INK, PAPER, guided, integrate

class MLP(nn.Module):
    """u^ = net(z, t, y): all that is asked of a network. z (N, D, 1, 1), t (N,) in [0, 1]."""

    def __init__(self, D, width=256, frequencies=16):
        super().__init__()
        layers, inputs = [], D + 2 * frequencies
        for _ in range(4):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(width, D))
        self.register_buffer("frequencies", torch.logspace(0, 1.5, frequencies))

    def forward(self, z, t, y):
        a = t[:, None] * self.frequencies
        return self.layers(torch.cat([z.flatten(1), a.cos(), a.sin()], dim=1)).view_as(z)

def spiral(u):
    """The points (N, 2) of a spiral at u (N,) in [0, 1], evenly spread along it, of variance about 1."""
    angle = 3 * math.pi * (u + 0.02).sqrt()
    return 0.2 * angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)

def main(out="spiral.png", steps=1500, batch=256, dimensions=(2, 8, 16, 512)):
    """A spiral on a random plane of R^D: the same MLP learns eps, v, x, k. A row a target, a column a D."""
    cell, font = 200, ImageFont.load_default(14)
    sheet = Image.new("RGB", (len(dimensions) * cell, 4 * cell), PAPER)
    pen, curve, y = ImageDraw.Draw(sheet), spiral(torch.linspace(0, 1, 2000)), torch.zeros(batch).long()
    for row, target in enumerate(("eps", "v", "x", "k")):
        for column, D in enumerate(dimensions):
            torch.manual_seed(0)
            P = torch.linalg.qr(torch.randn(D, 2)).Q                              # (D, 2), orthonormal
            kdiff = KDiff(MLP(D), target, num_classes=0, t_mean=0.0, t_std=1.0)
            groups = [{"params": kdiff.net.parameters()}]
            if target == "k":
                groups.append({"params": [kdiff.w], "lr": 1e-2})
            optimizer = torch.optim.Adam(groups, lr=1e-3)
            for _ in range(steps):
                x = spiral(torch.rand(batch)) @ P.T                               # (N, D)
                loss = kdiff(x.view(batch, D, 1, 1), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                *_, z = integrate(guided(kdiff, y, 1.0, (0.0, 1.0)), torch.randn(batch, D, 1, 1))
            z, k = z.flatten(1), kdiff.ks()["k"].item()
            off = torch.cdist(z, curve @ P.T).min(1).values.mean().item()
            print(f"D {D:3} | target {target:3} | k {k:.3f} | distance to the spiral {off:.3f}", flush=True)
            pen.text((column * cell + 8, row * cell + 6), f"D {D}  {target}  k {k:.2f}", INK, font)
            for a, b in (z @ P).clamp(-3, 3).tolist():
                at = column * cell + cell / 2 + 30 * a, row * cell + cell / 2 + 30 * b
                pen.rectangle([at, (at[0] + 1, at[1] + 1)], COLOURS[row])
    sheet.save(out)

if __name__ == "__main__":
    main(*sys.argv[1:])
