"""Which share of samples is what it should be? A small network, trained on real pictures, judges them.

    python sample.py out/pixel/ckpt.pt --n 500 --steps 25 --out s.npz && python examples/judge.py shapes s.npz
"""
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import open_dataset, read_items, run

def train_judge(images, labels, steps=1500, batch=128):
    """A convolutional network that names the class of uint8 images (N, 3, 32, 32)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(4096, int(labels.max()) + 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        i = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(net(images[i] / 255), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()

@torch.no_grad()
def right(net, images, labels):
    """The share of images that the network takes for what their labels say."""
    return (net(images / 255).argmax(1) == labels).float().mean().item()

def main(source, *files, steps=1500, held_out=2000):
    """Print the share of held-out real pictures, and of the samples in each .npz, that are right."""
    images, labels = read_items(data := open_dataset(source, 32), range(len(data)))
    net = train_judge(images[held_out:], labels[held_out:], int(steps))
    print(f"real pictures: {100 * right(net, images[:held_out], labels[:held_out]):.1f}% right")
    for path in files:
        with np.load(path) as file:
            samples = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
            print(f"{path}: {100 * right(net, samples, torch.from_numpy(file['arr_1'])):.1f}% right")

if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
