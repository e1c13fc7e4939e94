"""k-Diff: a diffusion objective that learns what to predict.

    time      t = 0 is noise, t = 1 is data
    path      z = t x + (1-t) e             x data, e noise                          Eq. (1a)
    target    u = c x + d e                 what the network predicts from (z, t, y)  Eq. (1b)
    velocity  v = dz/dt = x - e = (u - (c+d) z) / Delta,   Delta = c (1-t) - d t      App. A
    loss      |v^ - v|^2 = |u^ - u|^2 / Delta^2                                       Eq. (15)

`python objective.py` runs the theory behind k: a linear network and k, trained together, find closed forms.
"""
import math
import time

import torch
from torch import nn

BINS = 128                            # of the time-dependent k; a learnable w stands at each end point
STRONGEST = 8                         # components whose noise target "asym" predicts

def k_of_t(w, t):
    """k(t): linear interpolation of sigmoid(w), w (BINS + 1,), at times t in [0, 1] of any shape (App. E)."""
    k, position = torch.sigmoid(w), t * BINS
    left = position.long().clamp(0, BINS - 1)
    return torch.lerp(k[left], k[left + 1], position - left)

# The target u = c x + d e: shape of the learnable w, "C" for one number a channel, and (c, d) from w and t.
# k slides from noise (0) through velocity (0.5) to data (1): u = k x - (1-k) e, Eq. (13). A row is a target.
# None: nothing to learn; w is then the indices of channels. EDM: what z does not tell linearly about data
# of variance 1, E[u z] = c t + d (1-t) = 0. AsymFlow (arXiv 2605.12964): noise in strong components alone.
TARGETS = {
    "x":       (None, lambda w, t: (1.0, 0.0)),                                    # JiT's baseline
    "v":       (None, lambda w, t: (1.0, -1.0)),                                   # LightningDiT's baseline
    "eps":     (None, lambda w, t: (0.0, -1.0)),                                   # noise, up to its sign
    "k":       ((), lambda w, t: (torch.sigmoid(w), torch.sigmoid(w) - 1)),        # the method
    "two":     ((2,), lambda w, t: (torch.sigmoid(w[0]), -torch.sigmoid(w[1]))),   # Table 3
    "time":    ((BINS + 1,), lambda w, t: (k_of_t(w, t), k_of_t(w, t) - 1)),       # App. E
    "channel": ("C", lambda w, t: (torch.sigmoid(w), torch.sigmoid(w) - 1)),       # a k for each channel
    "edm":     (None, lambda w, t: ((1 - t) / (t*t + (1-t)**2).sqrt(), -t / (t*t + (1-t)**2).sqrt())),
    "asym":    (None, lambda w, t: (1.0, -1.0 * (w < STRONGEST))),
}
LOSSES = ("v", "u", "x", "eps")

def fixed_k(target):
    """The number in [0, 1] that a target is (or spells), else None."""
    try:
        return float(target) if 0 <= float(target) <= 1 else None
    except (TypeError, ValueError):
        return None

def error_scale(loss, c, d, t, tau):
    """The factor from the error u^ - u to the error in v, u, x or eps (Eqs. 21-26); like t, c, d."""
    delta = (c * (1 - t) - d * t).clamp(min=tau)        # Delta's one clamp, shared with the sampler (Table 4)
    return {"v": 1.0, "u": delta, "x": (1 - t).clamp(min=tau), "eps": t.clamp(min=tau)}[loss] / delta

def seeded_normal(shape, seeds, device):
    """Standard normal (N, *shape) float32, row n drawn from the integer seeds[n], whatever the batch."""
    rows = torch.empty(len(seeds), *shape, device=device)
    generator = torch.Generator(device)
    for row, seed in zip(rows, seeds):
        row.normal_(generator=generator.manual_seed(seed))
    return rows

class KDiff(nn.Module):
    """A network with its target, its velocity and its loss.

    net         called as net(z (N,C,H,W), t (N,), y (N,)) -> u^ (N,C,H,W); class `num_classes` is "no label"
    target      a row of TARGETS, or a number in [0, 1]: that k, fixed
    channels    C, where the target asks for it (default: net.in_channels)
    t_mean, t_std, noise_scale, tau, label_drop      Table 4 (in train.py)
    loss        the variable whose error is squared: "v" (the paper's), "u", "x" or "eps"
    ValueError for an unknown target or loss, for target "two" with loss "u" (k1 = k2 = 0 would win), and for
    "channel" and "asym" without channels."""

    def __init__(self, net, target="k", *, num_classes, t_mean=-0.8, t_std=0.8, noise_scale=1.0, tau=0.05,
                 label_drop=0.1, loss="v", channels=None):
        super().__init__()
        fixed = fixed_k(target)
        if target not in TARGETS and fixed is None:
            raise ValueError(f"target {target!r} is unknown: {', '.join(TARGETS)} or a number in [0, 1]")
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is unknown: one of {', '.join(LOSSES)}")
        if (target, loss) == ("two", "u"):
            raise ValueError("target two cannot learn under loss u: k1 = k2 = 0 would win; take v, x or eps")
        shape, self.rule = TARGETS[target] if target in TARGETS else (None, lambda w, t: (fixed, fixed - 1))
        self.net, self.target, self.loss_space, self.num_classes = net, target, loss, num_classes
        self.t_mean, self.t_std, self.noise_scale = t_mean, t_std, noise_scale
        self.tau, self.label_drop = tau, label_drop
        channels = channels or getattr(net, "in_channels", None)
        if channels is None and target in ("channel", "asym"):
            raise ValueError(f"target {target} needs channels: the number of channels of x")
        index = torch.arange(channels or 1).view(-1, 1, 1)                     # (C, 1, 1)
        shape = index.shape if shape == "C" else shape
        self.w = None if shape is None else nn.Parameter(torch.zeros(shape))     # sigmoid(0): k starts at 0.5
        self.register_buffer("index", index, persistent=False)

    def coefficients(self, t):
        """(c, d) of the target at times t (N,), each (N, 1, 1, 1), or (N, C, 1, 1) where channels differ."""
        t = t.view(-1, 1, 1, 1)
        c, d = self.rule(self.index if self.w is None else self.w, t)
        return c * torch.ones_like(t), d * torch.ones_like(t)

    def velocity(self, u, z, t):
        """The velocity v^ (N,C,H,W) that the prediction u^ implies at z (N,C,H,W) and times t (N,)."""
        c, d = self.coefficients(t)
        return (u.to(z.dtype) - (c + d) * z) * error_scale("v", c, d, t.view(-1, 1, 1, 1), self.tau)

    def loss(self, x, y, t, e):
        """The loss (a scalar): data x (N,C,H,W), labels y (N,), times t (N,), noise e of std noise_scale."""
        c, d = self.coefficients(t)
        s = t.view(-1, 1, 1, 1)
        z = s * x + (1 - s) * e                                                   # Eq. (1a)
        u = c * x + d * e                                                         # Eq. (1b)
        error = self.net(z, t, y).to(u.dtype) - u
        return (error * error_scale(self.loss_space, c, d, s, self.tau)).square().mean()      # Eq. (15)

    def draw(self, x, y, seeds=None):
        """Times (N,), noise like x, and labels y, some of them the null class. seeds: an integer an image."""
        n = x[0].numel() + 2                     # the first decides t, the second the label, the others are e
        r = torch.randn(len(x), n, device=x.device) if seeds is None else seeded_normal((n,), seeds, x.device)
        t = torch.sigmoid(self.t_mean + self.t_std * r[:, 0])
        dropped = torch.special.ndtr(r[:, 1]) < self.label_drop
        return t, self.noise_scale * r[:, 2:].reshape(x.shape), torch.where(dropped, self.num_classes, y)

    def forward(self, x, y, seeds=None):
        """One training loss: Algorithm 1. x (N,C,H,W) in the network's units, labels y (N,)."""
        t, e, y = self.draw(x, y, seeds)
        return self.loss(x, y, t, e)

    def ks(self):
        """What was learned, as tensors: {"k": k, or its mean over t or channels}, before it {"k1", "k2"} for
        target two, after it {"k_min", "k_max"} for channel. A fixed target gives its k."""
        c, d = self.coefficients(torch.linspace(0, 1, BINS + 1, device=self.index.device))
        c, d = c.detach(), d.detach()
        k = c / (c - d)
        before = {"k1": c.mean(), "k2": -d.mean()} if self.target == "two" else {}
        after = {"k_min": k.min(), "k_max": k.max()} if self.target == "channel" else {}
        return before | {"k": k.mean()} | after

# ---- Theory (Sec. 3). Data x = P s fills d of D dimensions; one linear layer u^ = W z serves every t. ------

def optimal_k(d, D):
    """Theorem 3.2: the k whose optimal u-loss is least, for d-dimensional data in D dimensions, t uniform."""
    return D / (D + d)                                                            # Eq. (14)

def k_of_direction(variance):
    """The k of a direction whose data have this variance in units of the noise's: the theorem, one axis each.

    A linear layer costs an axis s^2 k^2 + (1-k)^2 - 3/4 (s^2 k - (1-k))^2 / (1 + s^2), whose slope is
    ((1 + s^2) k - 1) / 2: noise is to be predicted where data are strong, data where they are weak. Summed
    over D axes with one common k the slope vanishes at D / (D + trace S): Theorem 3.2 with trace S for d."""
    return 1 / (1 + variance)

def k_of_innovation(x, t_mean, t_std, noise_scale=1.0, points=200):
    """The k (C,) that leaves a network least to do in each channel of data x (N, C, H, W), under the v-loss.

    v^ holds -(c+d) z / Delta, a skip connection from z. If the network adds what the rest of the noisy
    picture tells of x_i, there remains k xi - (1-k) e, with xi of variance r(t), the innovation: what is left
    by a linear regression on all other coordinates, seen as z/t = x + (1-t)/t e. With s the noise's scale the
    slope of <(r k^2 + s^2 (1-k)^2) / Delta^2> vanishes at k = 1 / (1 + rho), where
    rho = <r t / Delta^3> / (s^2 <(1-t) / Delta^3>). Without a picture around, r is the variance; under the
    u-loss Delta drops out and k_of_direction() is left."""
    values, vectors = torch.linalg.eigh(torch.cov(x.flatten(1).T.double()))       # of all C H W coordinates
    quantiles = (torch.arange(points, device=x.device).double() + 0.5) / points
    t = torch.sigmoid(t_mean + t_std * torch.special.ndtri(quantiles))[:, None]
    n = (noise_scale * (1 - t) / t).square()
    r = 1 / ((1 / (values.clamp(min=0) + n)) @ vectors.square().T) - n            # (points, C H W)
    r = r.clamp(min=0).view(points, x.shape[1], -1).mean(2) / noise_scale ** 2    # (points, C)
    k = torch.full_like(r[:1], 0.5)
    for _ in range(200):
        cube = (k * (1 - t) + (1 - k) * t) ** 3
        k = (k + 1 / (1 + (r * t / cube).mean(0) / ((1 - t) / cube).mean(0))) / 2
    return k[0]

def logit_normal(mean, std):
    """The density p(t) of t = sigmoid(N(mean, std)), as a function of t in (0, 1)."""
    scale = std * math.sqrt(2 * math.pi)
    return lambda t: (-((torch.logit(t) - mean) / std) ** 2 / 2).exp() / (scale * t * (1 - t))

def optimal_loss(c, d, dim, ambient_dim, loss="u", density=None, tau=0.0, points=20_000):
    """Eq. (12): the least summed loss of a linear layer, for dim-dimensional data in ambient_dim dimensions.
    c, d        the target's coefficients, numbers or functions of t (float64 tensor in (0, 1))
    loss, tau   as in KDiff; density: p(t) as a function of t, None for uniform times"""
    a = (torch.arange(points, dtype=torch.float64) + 0.5) / points                # midpoint rule
    b = 1 - a
    c, d = (torch.as_tensor(f(a) if callable(f) else f, dtype=torch.float64).expand(points) for f in (c, d))
    weight = torch.as_tensor(error_scale(loss, c, d, a, tau)) ** 2 * (density(a) if density else 1)  # Eq. (5)
    mean = lambda f: (f * weight).mean().item()
    along = mean(c*c + d*d) - mean(a*c + b*d) ** 2 / mean(a*a + b*b)
    across = mean(d*d) - mean(b*d) ** 2 / mean(b*b)
    return dim * along + (ambient_dim - dim) * across

class Linear(nn.Linear):
    """Eq. (2): u^ = W z for all t, as a network that KDiff can train; W (D, D) is its weight."""

    def forward(self, z, t, y):
        """u^ like z (N, D, 1, 1); t and y play no part."""
        return super().forward(z.flatten(1)).view_as(z)

def train_linear(variances, target="k", steps=2000, batch=512, rate=0.5, k_rate=4.0, seed=0):
    """Train the linear layer and its target by gradient descent on the u-loss, t uniform.
    variances (D,): of the data along each axis, in units of the noise's; a plane of Theorem 3.2 is ones, then
    zeros (how the axes are turned plays no part). While k is learned the rates fall over the last half.
    Returns (kdiff, mean loss of the last quarter summed over the D axes)."""
    g, D = torch.Generator().manual_seed(seed), len(variances)
    scale = torch.as_tensor(variances, dtype=torch.float32).sqrt().view(D, 1, 1)
    kdiff = KDiff(Linear(D, D, bias=False), target, num_classes=0, loss="u", channels=D)
    W = nn.init.zeros_(kdiff.net.weight)
    groups = [{"params": [W], "lr": rate * D / 2}]               # of a mean over D: its gradient is 2/D small
    groups += [] if kdiff.w is None else [{"params": [kdiff.w], "lr": k_rate}]
    optimizer = torch.optim.SGD(groups)
    fall = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 1.0 if kdiff.w is None else min(1.0, 2 - 2 * n / steps))
    losses = []
    for _ in range(steps):
        x = scale * torch.randn(batch, D, 1, 1, generator=g)
        t = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch        # uniform, one in each slot
        loss = kdiff.loss(x, None, t, torch.randn(x.shape, generator=g))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()
        losses.append(loss.item() * D)
    return kdiff, sum(losses[-steps // 4:]) / len(losses[-steps // 4:])

def main():
    """Check the theorems by gradient descent and print theory beside measurement."""
    start, D = time.time(), 64
    print("Theorem 3.2. A linear layer and k, trained together by gradient descent on the u-loss\n")
    print("   D    d   k learned   D/(D+d)   loss reached   loss by Eq. (12)")
    for d in (64, 32, 16, 8, 1):
        kdiff, loss = train_linear([1.0] * d + [0.0] * (D - d))
        k, learned = optimal_k(d, D), kdiff.ks()["k"]
        print(f"{D:4} {d:4} {learned:11.3f} {k:9.3f} {loss:14.3f} {optimal_loss(k, k - 1, d, D):18.3f}")

    variances = torch.tensor([4, 4, 1, 0.3, 0.1, 0.01, 0, 0])
    kdiff, _ = train_linear(variances, "channel", steps=6000, k_rate=16.0)
    print("\nThe spectrum. One k a direction, for data of any covariance: 1 / (1 + s^2)\n")
    print("   s^2    " + "".join(f"{s:8.2f}" for s in variances))
    print("   learned" + "".join(f"{k:8.3f}" for k in torch.sigmoid(kdiff.w.detach()).flatten()))
    print("   theory " + "".join(f"{k:8.3f}" for k in k_of_direction(variances)))
    print("\nOne k for all of them, D / (D + trace S / sigma^2): louder noise moves it as more pixels do\n")
    for sigma in (0.7, 1, 2):
        kdiff, _ = train_linear(variances / sigma ** 2, rate=0.25)
        k = optimal_k(variances.sum().item() / sigma ** 2, len(variances))
        print(f"   noise of standard deviation {sigma:3}: learned {kdiff.ks()['k']:.3f}, theory {k:.3f}")

    print(f"\nWhat the theorem does not cover. The best k of the same layer, D = {D}, d = 32, by Eq. (12)\n")
    ks = [n / 1000 for n in range(1, 1001)]
    for name, *how in (
            ("u-loss, uniform t: Theorem 3.2", "u", None, 0.0),
            ("v-loss, uniform t, tau 0.05", "v", None, 0.05),
            ("v-loss, t as in pixel space (Table 4), tau 0.05", "v", logit_normal(-0.8, 0.8), 0.05),
            ("v-loss, t as in latent space (Table 4), tau 0", "v", logit_normal(0.0, 1.0), 0.0)):
        best = min(ks, key=lambda k: optimal_loss(k, k - 1, 32, D, *how))
        print(f"    {name:50} {best:.3f}")
    print("\nA linear network that sees t reaches the v-loss s^2 / (s^2 t^2 + (1-t)^2) whatever k is: then "
          "the target matters\nonly through what a network of finite width and training can do.")
    print("\nThe networks of this repository learn k under the v-loss: do not read a dimension off their k.")
    print(f"({time.time() - start:.0f} s)")

if __name__ == "__main__":
    main()
