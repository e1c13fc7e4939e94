"""Two more targets as rows of the table, with all that the other scripts do.

asym    AsymFlow (arXiv 2605.12964): x - e in the 8 strongest components of a patch, x in the others
edm     EDM (arXiv 2206.00364): the u that is uncorrelated with z, for data of variance 1:
        E[u z] = c t + d (1-t) = 0

    python examples/rows.py train.py --target asym                      # then the flags of that script
    python examples/rows.py sample.py out/pixel-asym/ckpt.pt
"""
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import run
from objective import TARGETS

def asym(w, t):
    """c = 1; d = -1 for the 8 strongest channels, else 0. w (C, 1, 1) is not learned: it tells C."""
    strong = torch.arange(len(w), device=w.device).view(-1, 1, 1) < 8
    return 1.0, -1.0 * strong

def edm(w, t):
    """c = (1-t) / s, d = -t / s, where s = sqrt(t^2 + (1-t)^2): k(t) = 1 - t, at unit variance."""
    s = (t ** 2 + (1 - t) ** 2).sqrt()
    return (1 - t) / s, -t / s

TARGETS["asym"] = ("C", asym)
TARGETS["edm"] = (None, edm)

if __name__ == "__main__":
    del sys.argv[0]
    run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
