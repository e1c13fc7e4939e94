"""k-Diff: a diffusion objective that learns what to predict.

    time      t = 0 is noise, t = 1 is data
    path      z = a x + b e                  x data, e noise; a = t, b = 1 - t            Eq. (1a)
    target    u = c x + d e                  the network predicts u from (z, t, y)        Eq. (1b)
    velocity  v = dz/dt = x - e = (u - (c+d) z) / Delta,   Delta = b c - a d              App. A
    loss      |v^ - v|^2 = |u^ - u|^2 / Delta^2                                           Eq. (15)

u^ is the network's prediction of u, v^ the velocity that follows from it. The method is target "k": c = k,
d = -(1-k), and k is trained with the network. Equations, tables and theorems are those of the paper,
arXiv 2601.21419. `python objective.py` checks the paper's theorem and one of ours: linear networks and k,
trained together, converge to closed forms.
"""
import math
import time

import torch
from torch import nn

BINS = 128                            # target "time" learns k at the 129 edges of these bins of t

def path(t):
    """a and b of z = a x + b e at times t, and their derivatives in t."""
    return t, 1 - t, 1, -1

def blend(k):
    """c and d of u = k x - (1-k) e, Eq. (13): noise at k = 0, velocity at 0.5, data at 1."""
    return k, k - 1

def k_of_t(w, t):
    """k(t) for times t in [0, 1] of any shape: sigmoid(w), w (BINS + 1,), linearly
    interpolated (App. E)."""
    k = torch.sigmoid(w)
    position = t * BINS
    left = position.long().clamp(0, BINS - 1)
    return torch.lerp(k[left], k[left + 1], position - left)

# A target is a row: the shape of its learnable w, and c and d as a function of w and t.
# The shape None means that nothing is learned. "C" means one number for each channel of x. In pixel
# space train.py then lets x be the principal components of patches: they are its channels.
TARGETS = {
    "x":       (None,        lambda w, t: (1.0, 0.0)),                 # JiT's baseline
    "v":       (None,        lambda w, t: (1.0, -1.0)),                # LightningDiT's baseline
    "eps":     (None,        lambda w, t: (0.0, -1.0)),                # noise, up to its sign
    "k":       ((),          lambda w, t: blend(torch.sigmoid(w))),    # the method
    "two":     ((2,),        lambda w, t: (torch.sigmoid(w[0]), -torch.sigmoid(w[1]))),     # Table 3
    "time":    ((BINS + 1,), lambda w, t: blend(k_of_t(w, t))),        # App. E
    "channel": ("C",         lambda w, t: blend(torch.sigmoid(w))),    # one k for each channel
}
LOSSES = "v u x eps".split()

def target_row(target):
    """(shape of w, rule) of a row of TARGETS, or of a number in [0, 1], a fixed k.
    ValueError for others."""
    if target in TARGETS:
        return TARGETS[target]
    try:
        k = float(target)
    except (TypeError, ValueError):
        k = math.nan
    if not 0 <= k <= 1:
        raise ValueError(f"target {target!r} is unknown: {', '.join(TARGETS)} or a number in [0, 1]")
    return None, lambda w, t: blend(k)

def clamped_delta(c, d, t, tau):
    """Delta = b c - a d, but at least tau. Training and sampling share this one clamp (Table 4)."""
    a, b, _, _ = path(t)
    return (b * c - a * d).clamp(min=tau)

def error_scale(loss, c, d, t, tau):
    """The factor from the error u^ - u to the error in v, u, x or eps (Eqs. 21-26), shaped
    like t, c, d."""
    a, b, da, db = path(t)
    delta = clamped_delta(c, d, t, tau)
    # b and a are clamped like Delta. So the x-loss of target x (Delta = b) and the eps-loss of target
    # eps (Delta = a) are exactly the u-loss
    numerator = {"v": da * b - db * a, "u": delta, "x": b.clamp(min=tau), "eps": a.clamp(min=tau)}
    return numerator[loss] / delta

def seeded_normal(shape, seeds, device):
    """Standard normal (N, *shape) float32. Row n depends on the integer seeds[n] alone, not
    on the batch."""
    rows = torch.empty(len(seeds), *shape, device=device)
    generator = torch.Generator(device)
    for row, seed in zip(rows, seeds):
        row.normal_(generator=generator.manual_seed(seed))
    return rows

class KDiff(nn.Module):
    """A network with its target, its velocity and its loss.

    net         is called as net(z (N,C,H,W), t (N,), y (N,)) -> u^ (N,C,H,W); y = num_classes is "no label"
    target      a row of TARGETS, or a number in [0, 1]: that k, fixed
    t_mean, t_std, noise_scale, tau, label_drop      flags of train.py, which explains them
    loss        the variable whose error is squared: "v" (the paper's), "u", "x" or "eps"
    channels    C, needed if the target learns a number for each channel (default: net.in_channels)
    k_start     where k starts, from 0.001 to 0.999: a number, or a tensor that broadcasts to w
    ValueError: an unknown target or loss; "two" with loss "u", where target and loss would vanish at
    k1 = k2 = 0; a target that needs channels, without them."""

    def __init__(self, net, target="k", *, num_classes, t_mean=-0.8, t_std=0.8, noise_scale=1.0, tau=0.05,
                 label_drop=0.1, loss="v", channels=None, k_start=0.5):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is unknown: one of {', '.join(LOSSES)}")
        if (target, loss) == ("two", "u"):
            raise ValueError("target two learns nothing with loss u, 0 at k1 = k2 = 0: try v, x or eps")
        self.net = net
        self.target = target
        self.loss_variable = loss
        self.num_classes = num_classes
        self.t_mean = t_mean
        self.t_std = t_std
        self.noise_scale = noise_scale
        self.tau = tau
        self.label_drop = label_drop
        shape, self.rule = target_row(target)
        if shape == "C":
            channels = channels or getattr(net, "in_channels", None)
            if channels is None:
                raise ValueError(f"target {target} needs channels: the number of channels of x")
            shape = (channels, 1, 1)
        self.w = None
        if shape is not None:
            start = torch.logit(torch.as_tensor(k_start, dtype=torch.float32), eps=1e-3)
            self.w = nn.Parameter(start.expand(shape).clone())

    def coefficients(self, t):
        """c and d at times t (N,): each (N, 1, 1, 1), or (N, C, 1, 1) if channels differ."""
        t = t.view(-1, 1, 1, 1)
        c, d = self.rule(self.w, t)
        return c * torch.ones_like(t), d * torch.ones_like(t)

    def velocity(self, u, z, t):
        """The velocity v^ (N,C,H,W) that the prediction u^ implies at z (N,C,H,W) and times t (N,)."""
        c, d = self.coefficients(t)
        t = t.view(-1, 1, 1, 1)
        a, b, da, db = path(t)
        v = (da * b - db * a) * u.to(z.dtype) + (db * c - da * d) * z             # u - (c + d) z on this path
        return v / clamped_delta(c, d, t, self.tau)

    def loss(self, x, y, t, e):
        """The loss, a scalar. Data x (N,C,H,W), labels y (N,), times t (N,), noise e, already scaled."""
        c, d = self.coefficients(t)
        times = t.view(-1, 1, 1, 1)
        a, b, _, _ = path(times)
        z = a * x + b * e                                                         # Eq. (1a)
        u = c * x + d * e                                                         # Eq. (1b)
        error = self.net(z, t, y).to(u.dtype) - u
        scale = error_scale(self.loss_variable, c, d, times, self.tau)
        return (error * scale).square().mean()                                    # Eq. (15)

    def draw(self, x, y, seeds=None):
        """Times (N,), noise like x, and labels y, some of them dropped. seeds: one integer
        for each image."""
        n = x[0].numel() + 2                      # random numbers per image: for t, label drop, e
        if seeds is None:
            r = torch.randn(len(x), n, device=x.device)
        else:
            r = seeded_normal((n,), seeds, x.device)
        t = torch.sigmoid(self.t_mean + self.t_std * r[:, 0])
        dropped = torch.special.ndtr(r[:, 1]) < self.label_drop       # ndtr makes it uniform in [0, 1]
        dropped = dropped.view(-1, *[1] * (y.ndim - 1))                # y may hold several words a label
        e = self.noise_scale * r[:, 2:].reshape(x.shape)
        return t, e, torch.where(dropped, self.num_classes, y)

    def forward(self, x, y, seeds=None):
        """One training loss, Algorithm 1. x (N,C,H,W) in the network's units, labels y (N,)."""
        t, e, y = self.draw(x, y, seeds)
        return self.loss(x, y, t, e)

    @torch.no_grad()
    def ks(self):
        """What was learned, as {name: number in a tensor}: "k" is k, or its mean over times and
        channels. For a w of a few numbers k1, k2, ... come before it. For a w for each channel k_min
        and k_max come after it."""
        w = torch.zeros(0)
        if self.w is not None:
            w = self.w
        c, d = self.coefficients(torch.linspace(0, 1, BINS + 1, device=w.device))
        k = c / (c - d)                                # u / (c - d) = k x - (1-k) e
        learned = {}
        if w.ndim == 1 and len(w) < 10:                # not the many numbers of target "time"
            for i, number in enumerate(torch.sigmoid(w)):
                learned[f"k{i + 1}"] = number
        learned["k"] = k.mean()
        if w.ndim == 3:
            learned["k_min"] = k.min()
            learned["k_max"] = k.max()
        return learned

# ---- Theory (Sec. 3). Data fill d of D dimensions; one linear layer u^ = W z serves all times. -----

def optimal_k(d, D):
    """Theorem 3.2: the k with the least u-loss, for d-dimensional data in D dimensions and
    uniform times."""
    return D / (D + d)                                                            # Eq. (14)

def k_of_direction(variance):
    """The best k of one direction of the data, whose variance is given in units of the noise's variance.

    This is Theorem 3.2 for a single axis, with D = 1 and the variance s^2 for d. The least u-loss of
    the axis, over its one weight, is
        s^2 k^2 + (1-k)^2 - 3/4 (s^2 k - (1-k))^2 / (1 + s^2),      with slope  ((1 + s^2) k - 1) / 2,
    where 3/4 = <t>^2 / <t^2> for uniform times.
    So noise is the target where data are strong, and data are the target where they are weak.
    For one k and D axes the slopes add up to 0 at D / (D + trace S): Theorem 3.2, with the total
    variance for d."""
    return 1 / (1 + variance)

EXACT = 4096                          # up to so many numbers in a picture the innovation is exact

def innovation(x, noise):
    """r (L, C): the part of a coordinate's variance that the rest of the noisy picture cannot predict,
    averaged over the coordinates of each channel. x (N, C, H, W): data of covariance S; noise (L,): L
    variances of the noise; row l of r is for variance l.

    Linear regression of a noisy coordinate on all others leaves the variance 1 / [(S + noise
    I)^-1]_ii. Without the coordinate's own noise it is
        r_i = 1 / [(S + noise I)^-1]_ii - noise.
    If a picture has at most EXACT numbers, and there are at least as many pictures as numbers, S is
    measured and its eigenvalues are used. Otherwise pictures are taken for stationary. In the
    Fourier basis S then consists of blocks, a C x C matrix S_f for each frequency f. For i in channel c,
    [(S + noise I)^-1]_ii is the mean over f of [(S_f + noise I)^-1]_cc."""
    N, C, H, W = x.shape
    x = x - x.mean(0)
    if x[0].numel() <= min(N, EXACT):
        S = torch.cov(x.flatten(1).T)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                   # where cores are busy, several take 10 times as long
        values, vectors = torch.linalg.eigh(S)                                    # (C H W,), (C H W, C H W)
        torch.set_num_threads(threads)
        square = vectors.double().square()
        square = square / square.sum(1, keepdim=True)                 # eigh in float32 is 1e-6 off
        inverse = (1 / (values.double().clamp(min=0) + noise[:, None])) @ square.T    # (L, C H W)
        return (1 / inverse - noise[:, None]).view(len(noise), C, -1).mean(2)
    f = torch.fft.fft2(x, norm="ortho")
    S = torch.einsum("nchw,ndhw->hwcd", f, f.conj()) / (N - 1)
    values, vectors = torch.linalg.eigh(S.flatten(0, 1).to(torch.complex128))     # (H W, C), (H W, C, C)
    square = vectors.abs().square()
    values = values.clamp(min=0)[:, None]
    return torch.stack([1 / (square / (values + m)).sum(2).mean(0) - m for m in noise])

def even_times(t_mean, t_std, points):
    """Quantiles (points,) of t = sigmoid(N(t_mean, t_std)): their plain mean is an expectation over t."""
    quantiles = (torch.arange(points).double() + 0.5) / points
    return torch.sigmoid(t_mean + t_std * torch.special.ndtri(quantiles))

def k_of_innovation(x, t_mean, t_std, noise_scale=1.0, together=False, points=200):
    """The k (C,) that leaves a network least to do in each channel of data x (N, C, H, W), under
    the v-loss. With together: the one k (1,) for all channels. ValueError for fewer than 2
    pictures, or if all are alike.

    Theorem. Call a network blind if its output i sees t and all inputs except input i. Its best
    prediction of u_i = k x_i - (1-k) e_i is then k times the regression of x_i on the others, because
    the noise e_i is independent of all that it sees. What is left is k m_i - (1-k) e_i, where m_i is
    x_i minus that regression. The variance r(t) of m_i is the innovation() for noise of standard
    deviation sigma (1-t) / t, which is the noise in z / t. So the least v-loss is, with sigma the
    noise_scale and <> the mean over times,
        L(k) = <(k^2 r + sigma^2 (1-k)^2) / Delta^2>,   Delta = k (1-t) + (1-k) t.
    Its slope is, since Delta - k Delta' = t and Delta + (1-k) Delta' = 1-t with Delta' = dDelta/dk,
        dL/dk = 2 <(r t k - sigma^2 (1-t) (1-k)) / Delta^3>,
    which is 0 at
        k = 1 / (1 + rho),   rho = <r t / Delta^3> / (sigma^2 <(1-t) / Delta^3>).
    This is exact for blind networks that are linear at each t, on data of any distribution, and for
    all blind networks on Gaussian data.

    Trained networks see their input, and yet in pixels they end close to this k. One reason may be
    what dL/dk is made of. After regression on the other inputs k m_i - (1-k) e_i remains of u_i,
    and t m_i + (1-t) e_i remains of z_i. Their covariance is r t k - sigma^2 (1-t) (1-k), the
    numerator in dL/dk. So at this k a blind network would gain nothing if it could add s z_i / Delta to its
    output i, with one number s for all times. (An s that depends on t would help.)

    If the rest tells nothing, r is the variance. If, moreover, the loss is the u-loss, k is
    k_of_direction(). A k that is free at each t is sigma^2 (1-t) / (sigma^2 (1-t) + r t)."""
    if len(x) < 2 or not (x != x[:1]).any():
        raise ValueError("these data do not differ: they foretell no k")
    t = even_times(t_mean, t_std, points)
    r = innovation(x.float().cpu(), (noise_scale * (1 - t) / t).square())         # z / t = x + (1-t) / t e
    r = r.clamp(min=0) / noise_scale ** 2                                         # (points, C)
    if together:
        r = r.mean(1, keepdim=True)
    t = t[:, None]
    k = torch.full_like(r[:1], 0.5)
    for _ in range(200):                           # the equation for k, solved by damped iteration
        cube = (k * (1 - t) + (1 - k) * t) ** 3
        rho = (r * t / cube).mean(0) / ((1 - t) / cube).mean(0)
        k = (k + 1 / (1 + rho)) / 2
    return k[0].float()

def optimal_loss(c, d, dim, ambient_dim, loss="u", density=None, tau=0.0, points=20_000):
    """Eq. (12): the least loss of a linear layer, summed over `ambient_dim` axes. Data lie
    in `dim` of them.
    c, d        the target's coefficients, numbers or functions of t (float64 tensor in (0, 1))
    loss, tau   as in KDiff; density: p(t) as a function of t, None for uniform times"""
    t = (torch.arange(points, dtype=torch.float64) + 0.5) / points                # midpoint rule
    a, b, _, _ = path(t)
    if callable(c):
        c = c(t)
    if callable(d):
        d = d(t)
    weight = error_scale(loss, c, d, t, tau) ** 2                                 # Eq. (5)
    if density:
        weight = weight * density(t)

    def mean(f):
        return (f * weight).mean().item()
    along = mean(c*c + d*d) - mean(a*c + b*d) ** 2 / mean(a*a + b*b)
    across = mean(d*d) - mean(b*d) ** 2 / mean(b*b)
    return dim * along + (ambient_dim - dim) * across

# Two times with the mean and the variance of uniform times. The u-loss of one linear layer is quadratic
# in t, so that its mean over these two is its mean over all.
TWO_TIMES = torch.tensor([0.5 - 12 ** -0.5, 0.5 + 12 ** -0.5])

def expected_loss(W, k, S, t, loss="u"):
    """The mean loss of linear networks u^ = W z, summed over the D coordinates, for data of
    covariance S (D, D), noise of variance 1, and times t (points,). W (D, D), or (points, D, D): a
    network for each time. k: a number, or (D, 1): one for each coordinate."""
    t = t.view(-1, 1, 1)
    eye = torch.eye(len(S))
    # the error W z - u is A x + B e: its mean square is the diagonal of A S A^T + B B^T
    A = t * W - k * eye
    B = (1 - t) * W + (1 - k) * eye
    square = (A @ S * A + B * B).sum(2, keepdim=True)              # (points, D, 1)
    scale = error_scale(loss, *blend(k), t, tau=0)
    return (square * scale ** 2).mean(0).sum()

def descend(S, t, loss="u", blind=False, each=False, steps=800):
    """Train linear networks and k together, by gradient descent on expected_loss(). Either one
    network for all times, or blind ones for each time, whose output i does not see input i. each: a
    k for each coordinate. Returns (k (D,) or (1,), the loss)."""
    W = torch.zeros(S.shape, requires_grad=True)
    seen = torch.ones(S.shape)
    if blind:
        W = torch.zeros(len(t), *S.shape, requires_grad=True)
        seen = 1 - torch.eye(len(S))
    w = torch.zeros(len(S) if each else 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([W, w], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        value = expected_loss(W * seen, torch.sigmoid(w), S, t, loss)
        value.backward()
        optimizer.step()
        schedule.step()
    return torch.sigmoid(w.detach()).flatten(), value.item()

def show(name, values, digits=3):
    """Print numbers in columns."""
    print(f"   {name:10}" + "".join(f"{value:8.{digits}f}" for value in values))

def check_theorem(D=64):
    """Theorem 3.2: the k that is learned and the loss that is reached, next to their formulas."""
    print("Theorem 3.2. A linear layer and k, trained together by gradient descent on the u-loss\n")
    print("   D    d   k learned   D/(D+d)   loss reached   by Eq. (12): along the data + across")
    for d in (64, 32, 16, 8, 1):
        S = torch.diag((torch.arange(D) < d).float())              # how the axes are turned changes nothing
        learned, loss = descend(S, TWO_TIMES)
        k = optimal_k(d, D)
        along = optimal_loss(k, k - 1, dim=d, ambient_dim=d)
        across = optimal_loss(k, k - 1, dim=0, ambient_dim=D - d)
        print(f"{D:4} {d:4} {learned.item():11.3f} {k:9.3f} {loss:14.3f} {along + across:14.3f} = "
              f"{along:.3f} + {across:.3f}")

def check_modes(k=0.8, rate=0.05):
    """Eqs. (8)-(11): the layer's weight along the data, and across them, approaches the best one,
    <u z> / <z^2>, as an exponential."""
    print(f"\nEqs. (8)-(11). The layer's weight on its way, for k = {k} fixed\n")
    S = torch.diag(torch.tensor([1.0, 0.0]))
    W = torch.zeros(2, 2, requires_grad=True)
    for n in range(1, 161):
        expected_loss(W, k, S, TWO_TIMES).backward()
        W.data -= rate * W.grad / 2                      # the paper's rate is of half the squared error
        W.grad = None
        if n in (10, 40, 160):
            along = (1.5 * k - 0.75) * (1 - math.exp(-rate * n * 2 / 3))
            across = (1.5 * k - 1.5) * (1 - math.exp(-rate * n / 3))
            print(f"   step {n:3}: along {W[0, 0]:.3f}, theory {along:.3f}; "
                  f"across {W[1, 1]:.3f}, theory {across:.3f}")

def check_spectrum():
    """One k for each direction, and one for all, when directions differ in variance."""
    variances = torch.tensor([4, 4, 1, 0.3, 0.1, 0.01, 0, 0])
    learned, _ = descend(torch.diag(variances), TWO_TIMES, each=True)
    print("\nThe spectrum. One k for each direction, for data of any covariance: 1 / (1 + s^2)\n")
    show("s^2", variances, 2)
    show("learned", learned)
    show("theory", k_of_direction(variances))
    print("\nOne k for all of them, D / (D + trace S / sigma^2): louder noise raises k\n")
    for sigma in (0.7, 1, 2):
        S = torch.diag(variances / sigma ** 2)
        learned, _ = descend(S, TWO_TIMES)
        k = optimal_k(S.trace().item(), len(S))
        print(f"   noise of standard deviation {sigma:3}: learned {learned.item():.3f}, theory {k:.3f}")

def check_blind_spot(points=24):
    """The theorem of k_of_innovation on a random covariance."""
    print("\nThe blind-spot theorem (k_of_innovation): v-loss, data of any covariance\n")
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    x = torch.cat([root, -root]) * math.sqrt(11 / 2)     # 12 points of covariance root^T root, unbiased
    t = even_times(-0.8, 0.8, points).float()
    learned, _ = descend(root.T @ root, t, "v", blind=True, each=True)
    show("descent", learned, 4)
    show("theory", k_of_innovation(x.view(12, 6, 1, 1), -0.8, 0.8, points=points), 4)

def main():
    """Check the theorems by gradient descent. Print theory next to measurement."""
    start = time.time()
    check_theorem()
    check_modes()
    check_spectrum()
    check_blind_spot()
    print("\nA linear network that sees t and its input reaches the v-loss s^2 / (s^2 t^2 + (1-t)^2) for "
          "every k:\nthe target then matters only through what finite width and training can do.")
    print(f"({time.time() - start:.0f} s)")

if __name__ == "__main__":
    main()
