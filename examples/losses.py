"""What Theorem 3.2 does not cover: the best k of its linear layer for other losses and times, by Eq. (12).

    python examples/losses.py
"""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from objective import optimal_loss

def logit_normal(mean, std):
    """The density p(t) of t = sigmoid(N(mean, std)), as a function of t in (0, 1)."""
    scale = std * math.sqrt(2 * math.pi)

    def density(t):
        height = (-((torch.logit(t) - mean) / std) ** 2 / 2).exp()
        return height / (scale * t * (1 - t))
    return density

def best_k(d, D, loss, density, tau):
    """The k, of thousandths, with the least loss for d-dimensional data in D dimensions."""
    ks = [n / 1000 for n in range(1, 1001)]
    how = {"dim": d, "ambient_dim": D, "loss": loss, "density": density, "tau": tau}
    return min(ks, key=lambda k: optimal_loss(k, k - 1, **how))

def main(D=64, d=32):
    """Print one row for each loss and law of times."""
    pixels, latents = logit_normal(-0.8, 0.8), logit_normal(0.0, 1.0)             # Table 4
    print(f"The best k, D = {D}, d = {d}")
    print(f"    u-loss, uniform t: Theorem 3.2            {best_k(d, D, 'u', None, 0.0):.3f}")
    print(f"    v-loss, uniform t, tau 0.05               {best_k(d, D, 'v', None, 0.05):.3f}")
    print(f"    v-loss, t as in pixel space, tau 0.05     {best_k(d, D, 'v', pixels, 0.05):.3f}")
    print(f"    v-loss, t as in latent space, tau 0       {best_k(d, D, 'v', latents, 0.0):.3f}")

if __name__ == "__main__":
    main()
