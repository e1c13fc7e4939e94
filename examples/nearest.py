"""Are samples copies? Below each, the training picture whose pixels are nearest.

    python examples/nearest.py assets/fashion.pt fashion nearest.png
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import in_batches, open_dataset, read_items, run
from sample import grid, load, save_picture

def nearest(images, data):
    """For each uint8 image (N, 3, H, W) the item of a dataset whose pixels are nearest: (N, 3, H, W)."""
    distance = torch.full((len(images),), torch.inf)
    found = images.clone()
    for indices in in_batches(range(len(data)), 512):
        batch, _ = read_items(data, indices)
        batch = torch.cat([batch, batch.flip(-1)])                      # training may have mirrored it
        d, i = torch.cdist(images.flatten(1).float(), batch.flatten(1).float()).min(1)
        found = torch.where((d < distance).view(-1, 1, 1, 1), batch[i], found)
        distance = torch.minimum(d, distance)
    return found

def main(path, source, out, each=4):
    """Draw `each` samples of up to ten classes, and their nearest training pictures."""
    checkpoint = load(path)
    names = checkpoint.classes[:10]
    images = checkpoint.sample(names, int(each))
    found = nearest(images, open_dataset(source, images.shape[2]))
    pictures, labels = [], []
    for i, name in enumerate(names):
        part = slice(i * int(each), (i + 1) * int(each))
        pictures += [images[part], found[part]]
        labels += [name, "nearest"]
    save_picture(grid(torch.cat(pictures), labels), out)

if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
