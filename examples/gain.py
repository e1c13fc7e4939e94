"""Why networks obey the blind-spot theorem of k_of_innovation, or do not: what they do with a channel's own value.

    python examples/gain.py                      # trains five networks in out/gain, 25 minutes on one core
    python examples/gain.py gain.png out/gain 1000

A network's gain in a channel is du_i/dz_i, the derivative of an output by the input of the same number, in the
mean over pictures. The theorem holds for gain 0. Printed next to it: the gain of the best linear network, and
the one that Tweedie's formula asks of any network whose error is the measured one. The channels are all
principal components of patches of shapes; the networks differ in how many of them fit through the bottleneck.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from data import open_dataset, read_items
from model import SIZES
from objective import innovation, k_of_innovation
from sample import draw_curves, load, read_log

SIZES["JiT-wide-open"] = SIZES["JiT-wide"] | {"bottleneck": 192}
SIZES["JiT-demo-tight"] = SIZES["JiT-demo"] | {"bottleneck": 16}
# a patch of 8 has 192 values, a patch of 4 has 48
NETWORKS = "JiT-demo/8 JiT-wide/8 JiT-wide-open/8 JiT-demo-tight/4 JiT-demo/4".split()

def trained(name, out, steps):
    """A network with a k for each channel after the demo's training, from `out` if it is there."""
    flags = f"--target channel --model {name} --steps {steps} --samples 0 --log_every 100 --out"
    sys.argv[1:] = [*flags.split(), str(out)]
    train.main()
    return load(out / "ckpt.pt", ema="none")

def measure(net, z, y, t, x, k):
    """Gain and mean square error of the x implied by u, each (C,), for noisy pictures z (N, C, h, w) at time t."""
    z.requires_grad_()
    u = net(z, torch.full((len(z),), t), y)
    n, (row, column) = torch.arange(len(z)), torch.randint(z.shape[2], (2, len(z)))     # one place a picture
    gain = []
    for c in range(z.shape[1]):
        slope, = torch.autograd.grad(u[n, c, row, column].sum(), z, retain_graph=True)
        gain.append(slope[n, c, row, column].mean())
    # u = k x - (1-k) e and z = t x + (1-t) e
    implied = ((1 - t) * u + (1 - k) * z) / (k * (1 - t) + (1 - k) * t)
    return torch.stack(gain), (implied - x).detach().square().mean((0, 2, 3))

def main(out="assets/gain.png", folder="out/gain", steps=1000, n=128, times=(0.15, 0.3, 0.6), networks=NETWORKS):
    """Print a row for each network and time. Draw the gains of the second and third network."""
    panels = {}
    for name in networks:
        run = Path(folder, name.replace("/", "-"))
        checkpoint = trained(name, run, int(steps))
        images, y = read_items(data := open_dataset("shapes", 32), range(len(data)))
        x, kdiff = checkpoint.codec.encode(images), checkpoint.kdiff
        k = torch.sigmoid(kdiff.w).flatten()
        theory = k_of_innovation(x, kdiff.t_mean, kdiff.t_std)
        print(f"\n{name}, bottleneck {SIZES[name.split('/')[0]]['bottleneck']} of {len(k)} values | loss "
              f"{sum(read_log(run, 'loss')[1]):.4f} | mean distance of k {(k - theory).abs().mean():.4f}")
        for t in times:
            torch.manual_seed(0)
            z = t * x[:n] + (1 - t) * torch.randn(x[:n].shape)
            gain, error = measure(kdiff.net, z, y[:n], t, x[:n], kdiff.w.sigmoid())
            print(t, gain[:5], error[:5])

if __name__ == "__main__":
    main(*sys.argv[1:])
