"""A small checkpoint for sampling: one average of the weights, without the optimizer.

    python examples/cut.py out/pixel/ckpt.pt small.pt                   the default average
    python examples/cut.py out/pixel/ckpt.pt small.pt 0.99
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import new_file, read_tensors, require, run
from sample import default_average

def main(path, out, ema=None):
    """Write what load() in sample.py needs."""
    checkpoint = read_tensors(path)
    ema = ema or default_average(checkpoint["ema"], checkpoint["step"])
    require(ema in checkpoint["ema"], f"{path} has the averages {', '.join(checkpoint['ema'])}: name one")
    small = {key: checkpoint[key] for key in ("step", "config", "data")}
    with new_file(out) as file:
        torch.save(small | {"ema": {ema: checkpoint["ema"][ema]}}, file)

if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
