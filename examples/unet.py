"""A foreign network: a small U-Net under the name UNet, with all that train.py does.

    python examples/unet.py --steps 500 --out out/unet                  # the flags of train.py
"""
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import sample
import train
from data import run

class UNet(nn.Module):
    """Two levels. A network need only be called as net(z (N,C,H,W), t (N,), y (N,)) and return u^ like z."""

    def __init__(self, channels, num_classes, width=64):
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.leave = nn.Conv2d(2 * width, channels, 3, padding=1)
        self.label = nn.Embedding(num_classes + 1, 2 * width)
        self.time = nn.Sequential(nn.Linear(1, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))

    def forward(self, z, t, y):
        condition = self.time(t[:, None]) + self.label(y)               # (N, 2 width)
        first = F.silu(self.enter(z))
        x = F.silu(self.down(first) + condition[:, :, None, None])
        x = x + F.silu(self.middle(x))
        return self.leave(torch.cat([F.silu(self.up(x)), first], dim=1))

def build(name, image_size, num_classes, in_channels=None, **how):
    """model.build() with one more name."""
    if name == "UNet":
        return UNet(in_channels, num_classes)
    return known(name, image_size, num_classes, in_channels, **how)

known, sample.build = sample.build, build

if __name__ == "__main__":
    sys.argv[1:1] = ["--model", "UNet"]
    run(train.main)
