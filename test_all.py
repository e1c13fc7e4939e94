"""Every claim of the other files, each test named after one: `pytest test_all.py`, no network, no GPU."""
import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import model
from data import (Codec, ImageFolder, Latents, Order, PatchPCA, Shapes, UserError, crop, open_dataset, pack, read_image,
                  read_tensors)
from model import JiT
from objective import KDiff, equilibrium, k_of_t, logit_normal, optimal_k, optimal_loss, train_linear
from sample import generate, guided, integrate, load, read_log
from train import EMA

HERE = Path(__file__).parent
# ---------------------------------------------------------------------------------------------------------------
# objective.py

EVERY_TARGET = ["x", "v", "eps", "k", "two", "time", 0.0, 0.3, 1.0]


class Answer(torch.nn.Module):
    """A network that answers what it was told, whatever it is asked."""

    def __init__(self, u):
        super().__init__()
        self.u = u

    def forward(self, z, t, y):
        return self.u


def kdiff_for(target, u=None, **kw):
    """A KDiff whose learnable w is not at its start, in float64."""
    kdiff = KDiff(Answer(u), target, num_classes=10, **kw).double()
    if kdiff.w is not None:
        with torch.no_grad():
            kdiff.w.copy_(torch.linspace(-1.0, 2.0, kdiff.w.numel()).view(kdiff.w.shape))
    return kdiff


def solve(c, d, t, z, u):
    """(x, e) from z = t x + (1-t) e and u = c x + d e, by torch's linear solver."""
    matrix = torch.stack([torch.stack([t, 1 - t], -1), torch.stack([c.flatten(), d.flatten()], -1)], 1)       # (N, 2, 2)
    x, e = torch.linalg.solve(matrix, torch.stack([z.flatten(1), u.flatten(1)], 1)).unbind(1)
    return x.view_as(z), e.view_as(z)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_every_target_gives_back_the_velocity_at_all_t(target):
    """u = c x + d e of the true x, e converts to x - e wherever Delta is not clamped."""
    t = torch.linspace(0.001, 0.999, 40, dtype=torch.float64)
    x, e = torch.randn(2, 40, 2, 3, 3, dtype=torch.float64)
    s = t.view(-1, 1, 1, 1)
    kdiff = kdiff_for(target, tau=1e-6)
    c, d = kdiff.coefficients(t)
    torch.testing.assert_close(kdiff.velocity(c * x + d * e, s * x + (1 - s) * e, t), x - e, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("loss", ["u", "x", "eps", "v"])
def test_loss_is_the_squared_error_of_the_variable_it_names(target, loss):
    """Against solving for x^ and e^ with a linear solver, at times where nothing is clamped."""
    if (target, loss) == ("two", "u"):
        with pytest.raises(ValueError, match="two"):
            KDiff(None, target, num_classes=10, loss=loss)
        return
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x, e, u_hat = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64)
    kdiff = kdiff_for(target, u_hat, tau=0.05, loss=loss)
    c, d = kdiff.coefficients(t)
    s = t.view(-1, 1, 1, 1)
    x_hat, e_hat = solve(c, d, t, s * x + (1 - s) * e, u_hat)
    error = {"u": u_hat - c * x - d * e, "x": x_hat - x, "eps": e_hat - e, "v": (x_hat - e_hat) - (x - e)}[loss]
    torch.testing.assert_close(kdiff.loss(x, None, t, e), error.square().mean(), atol=1e-10, rtol=1e-5)


def test_one_clamp_bounds_loss_and_velocity():
    """At t = 1 x-prediction divides by tau in both; its own x-loss stays the plain MSE."""
    x, e, u_hat = torch.randn(3, 1, 2, 3, 3, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    kdiff = kdiff_for("x", u_hat, tau=0.05)
    torch.testing.assert_close(kdiff.velocity(u_hat, x, one), (u_hat - x) / 0.05)
    torch.testing.assert_close(kdiff.loss(x, None, one, e), ((u_hat - x) / 0.05).square().mean())
    torch.testing.assert_close(kdiff_for("x", u_hat, tau=0.05, loss="x").loss(x, None, one, e), (u_hat - x).square().mean())
    eps = kdiff_for("eps", u_hat, tau=0.05, loss="eps")
    torch.testing.assert_close(eps.loss(x, None, 0 * one, e), (u_hat + e).square().mean())


@pytest.mark.parametrize("target", ["k", "two", "time"])
def test_gradient_of_w_is_the_slope_of_the_loss(target):
    """Through the target and through Delta: autograd against finite differences of the whole loss."""
    torch.manual_seed(1)
    x, e, u_hat = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64)
    kdiff, t = kdiff_for(target, u_hat, tau=0.05), torch.tensor([0.03, 0.4, 0.7, 0.999], dtype=torch.float64)
    kdiff.loss(x, None, t, e).backward()
    direction, h, w = torch.randn_like(kdiff.w), 1e-6, kdiff.w.detach().clone()
    ends = []
    for sign in (1, -1):
        kdiff.w.data = w + sign * h * direction
        ends.append(kdiff.loss(x, None, t, e).item())
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx((kdiff.w.grad * direction).sum().item(), rel=1e-5)


def test_k_of_t_is_linear_between_its_129_points():
    """At the end points the sigmoid of their w, half-way their mean."""
    w = torch.randn(129)
    t = torch.arange(129) / 128
    torch.testing.assert_close(k_of_t(w, t), torch.sigmoid(w))
    torch.testing.assert_close(k_of_t(w, t[:-1] + 1 / 256), (torch.sigmoid(w[1:]) + torch.sigmoid(w[:-1])) / 2)


def test_draws_follow_table_4():
    """logit(t) is normal, the noise has its scale, a tenth of the labels drop; and each image follows its seed alone."""
    kdiff = KDiff(None, num_classes=10, t_mean=-0.8, t_std=0.8, noise_scale=2.0, label_drop=0.1)
    x, y = torch.zeros(4000, 1, 4, 4), torch.arange(4000) % 10
    t, e, dropped = kdiff.draw(x, y, range(4000))
    logit = torch.logit(t)
    assert abs(logit.mean() + 0.8) < 0.05 and abs(logit.std() - 0.8) < 0.05 and abs(e.std() - 2) < 0.02
    assert abs((dropped == 10).float().mean() - 0.1) < 0.02 and (dropped[dropped != 10] == y[dropped != 10]).all()
    assert abs(torch.corrcoef(torch.stack([logit, e[:, 0, 0, 0], (dropped == 10).float()])).tril(-1)).max() < 0.06
    t2, e2, _ = kdiff.draw(x[:3], y[:3], [7, 3999, 0])
    assert torch.equal(t2, t[[7, 3999, 0]]) and torch.equal(e2, e[[7, 3999, 0]])


@pytest.mark.parametrize("bad", ["y", "2", -0.1, None])
def test_unknown_target_is_named(bad):
    """A target is a row of the table or a number in [0, 1]."""
    with pytest.raises(ValueError, match="target"):
        KDiff(None, bad, num_classes=10)


# Theory

def test_eq_12_equals_monte_carlo():
    """The loss of the linear layer at Eq. (11)'s weights, averaged over random data, noise and times."""
    torch.manual_seed(0)
    d, D, n = 3, 8, 400_000
    for c, dd, loss, density, draw, tau in (
            (0.7, -0.3, "u", None, lambda: torch.rand(n), 0.0),
            (lambda t: t, lambda t: t - 1, "x", None, lambda: torch.rand(n), 0.0),
            (0.7, -0.3, "v", logit_normal(-0.8, 0.8), lambda: torch.sigmoid(0.8 * torch.randn(n) - 0.8), 0.4)):
        t = draw().double()
        a, b = t, 1 - t
        c_t, d_t = (f(t) if callable(f) else torch.full_like(t, f) for f in (c, dd))
        delta = (c_t * b - d_t * a).clamp(min=tau)
        weight = {"u": 1.0, "x": ((1 - t) / delta) ** 2, "v": 1 / delta ** 2}[loss]
        par, perp = equilibrium(c, dd, loss, density, tau)
        x, e_par, e_perp = torch.randn(n, d).double(), torch.randn(n, d).double(), torch.randn(n, D - d).double()
        a, b, c_t, d_t = (v[:, None] for v in (a, b, c_t, d_t))
        error = ((par * (a * x + b * e_par) - c_t * x - d_t * e_par) ** 2).sum(1) + ((perp * b - d_t) * e_perp).square().sum(1)
        assert (weight * error).mean().item() == pytest.approx(optimal_loss(c, dd, d, D, loss, density, tau), rel=0.02)


@pytest.mark.parametrize("d, D", [(64, 64), (32, 64), (8, 64), (1, 64), (10, 768)])
def test_eq_12_is_least_at_k_of_theorem_3_2(d, D):
    """The minimum of the quadrature over a grid of k, against D / (D + d)."""
    ks = np.linspace(0, 1, 2001)
    at = min(range(1000, 2001), key=lambda i: optimal_loss(ks[i], ks[i] - 1, d, D))
    assert ks[at] == pytest.approx(optimal_k(d, D), abs=1e-3) and optimal_k(d, D) == D / (D + d)


def test_the_theorem_is_about_the_u_loss():
    """Under the v-loss the same layer prefers other k: reference values for D = 64, d = 32."""
    ks = np.linspace(0.5, 1, 501)[:-1].tolist() + [1.0]
    for expected, density, tau in ((1.0, None, 0.05), (0.543, logit_normal(-0.8, 0.8), 0.05), (0.995, logit_normal(0, 1), 0.0)):
        best = min(ks, key=lambda k: optimal_loss(k, k - 1, 32, 64, "v", density, tau))
        assert best == pytest.approx(expected, abs=2e-3)


def test_gradient_descent_finds_k_and_the_loss_of_the_theorem():
    """A linear layer and k trained together, d = 8 of D = 32."""
    kdiff, _, loss = train_linear(8, 32, steps=1500, batch=256)
    assert kdiff.ks()["k"].item() == pytest.approx(0.8, abs=0.02)
    assert loss == pytest.approx(optimal_loss(0.8, -0.2, 8, 32), rel=0.02)


def test_modes_of_w_relax_at_their_two_rates():
    """Eq. (9): W_par and W_perp follow exponentials of rates <a^2+b^2> = 2/3 and <b^2> = 1/3 to Eq. (11)."""
    seen, rate = {}, 0.05
    train_linear(4, 16, target="x", steps=301, batch=2048, rate=rate, watch=lambda n, W, P: seen.update({n: (
        (P.T @ W @ P).trace().item() / 4, (W.trace() - (P.T @ W @ P).trace()).item() / 12)}))
    par, perp = equilibrium(1.0, 0.0)
    assert (par, perp) == pytest.approx((0.75, 0.0), abs=1e-6)                   # <a>/<a^2+b^2> = (1/2)/(2/3)
    v = {}
    train_linear(4, 16, target="v", steps=301, batch=2048, rate=rate, watch=lambda n, W, P: v.update({n: (
        (W.trace() - (P.T @ W @ P).trace()).item() / 12)}))
    for n in (20, 60, 300):
        assert seen[n][0] == pytest.approx(0.75 * (1 - math.exp(-n * rate * 2 / 3)), abs=0.02)
        assert v[n] == pytest.approx(-1.5 * (1 - math.exp(-n * rate / 3)), abs=0.02)


# ---------------------------------------------------------------------------------------------------------------
# data.py

def test_item_i_of_shapes_is_always_the_same_image():
    """Whatever the number of items and the order of asking; all eight classes come in turn."""
    a, b = Shapes(40, 32), Shapes(1000, 32)
    assert [a[i][1] for i in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    for i in (39, 3, 17):
        assert a[i][0].dtype == torch.uint8 and torch.equal(a[i][0], b[i][0])
    assert not torch.equal(a[0][0], a[8][0])


def test_shapes_are_anti_aliased():
    """A disc covers pi r^2 to better than a third of a pixel: whole pixels would miss by several."""
    shapes = Shapes(80, 32)
    for i in range(0, 80, 8):
        radius = 0.9 * (0.24 + 0.1 * shapes.factors[i][2]) * 32
        image = shapes[i][0].double() / 255
        covered = ((image - 0.06) / (image.amax((1, 2), keepdim=True) - 0.06)).amax(0).sum()
        assert abs(covered - math.pi * radius ** 2) < 0.02 * math.pi * radius ** 2


@pytest.fixture
def photos(tmp_path):
    """A folder of images of many kinds: modes, sizes, formats, EXIF, links, names."""
    root = tmp_path / "Fotos für Büro"
    for name in ("chats été", "dogs/deep er"):
        (root / name).mkdir(parents=True)
    noise = np.random.RandomState(0).randint(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(root / "chats été" / "a b.jpg")
    image.convert("CMYK").save(root / "chats été" / "cmyk.JPEG")
    image.convert("P").save(root / "chats été" / "p.png")
    image.convert("L").resize((40, 90)).save(root / "dogs" / "grey.bmp")
    image.convert("RGBA").save(root / "dogs" / "deep er" / "ß.webp", lossless=True)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(root / "dogs" / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                                             # to be turned a quarter
    image.save(root / "dogs" / "turned.png", exif=exif)
    image.save(root / "beside.png")
    (root / "readme.txt").write_text("no image")
    return root


def test_folders_of_odd_images_are_read(photos):
    """Every mode becomes RGB, EXIF turns, 16 bits become 8, subfolders are classes, names keep their letters."""
    data = ImageFolder(photos, 32)
    assert data.classes == ["Fotos für Büro", "chats été", "dogs"] and len(data) == 8
    assert all(data[i][0].shape == (3, 32, 32) and data[i][0].dtype == torch.uint8 for i in range(8))
    assert read_image(photos / "dogs" / "turned.png").size == (50, 70)
    plain = np.asarray(read_image(photos / "beside.png"))
    assert np.array_equal(np.asarray(read_image(photos / "dogs" / "sixteen.png"))[..., 0], plain[..., 0])
    flat = ImageFolder(photos / "chats été", 32)
    assert flat.classes == ["chats été"] and [label for _, label in (flat[0], flat[1])] == [0, 0]


def test_crop_is_adms():
    """For an image that halves exactly: the mean of 2x2 blocks, then Pillow's bicubic, then the centre."""
    pixels = np.random.RandomState(0).randint(0, 256, (160, 208, 3), dtype=np.uint8)
    half = pixels.reshape(80, 2, 104, 2, 3).mean((1, 3))
    resized = np.asarray(Image.fromarray(np.floor(half + 0.5).astype(np.uint8)).resize((83, 64), Image.BICUBIC), int)
    ours = np.asarray(crop(Image.fromarray(pixels), 64), int)
    assert ours.shape == (64, 64, 3) and abs(ours - resized[:, 9:73]).max() <= 1
    small = crop(Image.fromarray(pixels[:20, :30]), 64)                          # enlarged where it is too small
    assert small.size == (64, 64)


def test_order_is_one_permutation_after_the_other():
    """Batches of 8 from 11 images: positions in a chain of permutations, whatever the start and the process count."""
    chain = [item for batch in Order(11, 8, 3, 0, 22) for item in batch]
    for epoch in range(16):
        assert sorted(chain[epoch * 11:epoch * 11 + 11]) == [(epoch, i) for i in range(11)]
    assert [item for batch in Order(11, 8, 3, 5, 9) for item in batch] == chain[40:72]
    two = [list(Order(11, 8, 3, 0, 22, rank, 2)) for rank in (0, 1)]
    assert [item for a, b in zip(*two) for item in a + b] == chain
    assert chain[:11] != [(0, i) for _, i in chain[11:22]]                       # and epochs differ


def test_flips_follow_seed_epoch_and_index(photos):
    """A key (epoch, i) is mirrored or not, half of the time, and always the same."""
    data = ImageFolder(photos, 32)
    flipped = [not torch.equal(data[(epoch, 3)][0], data[3][0]) for epoch in range(64)]
    assert 16 < sum(flipped) < 48
    assert flipped == [not torch.equal(data[(epoch, 3)][0], data[3][0]) for epoch in range(64)]
    assert torch.equal(data[(flipped.index(True), 3)][0], data[3][0].flip(-1))


def test_packed_array_gives_the_folders_images(photos, tmp_path):
    """pack, then read through the memory map: same pixels, labels, class names."""
    pack(photos, 24, tmp_path / "p.npy")
    packed, folder = open_dataset(tmp_path / "p.npy", 24), ImageFolder(photos, 24)
    assert packed.classes == folder.classes and len(packed) == len(folder)
    assert all(torch.equal(packed[i][0], folder[i][0]) and packed[i][1] == folder[i][1] for i in range(8))
    with pytest.raises(UserError, match="24"):
        open_dataset(tmp_path / "p.npy", 32)


def test_patch_pca_round_trip_is_the_orthogonal_projection():
    """Idempotent, symmetric, of the right rank; with all channels the identity; more than a patch has is refused."""
    images = torch.randn(200, 3, 8, 8) @ torch.randn(8, 8)
    pca = PatchPCA.fit(images, 4, 10)
    flat = lambda x: F.pixel_unshuffle(x, 4).transpose(0, 1).flatten(1)                              # (48, patches)
    patches = flat(images)
    centred = patches - patches.mean(1, keepdim=True)
    U = torch.linalg.svd(centred, full_matrices=False).U[:, :10]
    torch.testing.assert_close(flat(pca.decode(pca.encode(images))), U @ U.T @ centred + patches.mean(1, keepdim=True),
                               atol=2e-3, rtol=0)
    full = PatchPCA.fit(images, 4, 48)
    torch.testing.assert_close(full.decode(full.encode(images)), images, atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="48 values"):
        PatchPCA.fit(images, 4, 49)


def test_codec_scales_once_and_back():
    """Pixels: [-1, 1] and rounding; latents: (z - mean) / std and its inverse."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(Codec().decode(Codec().encode(images)), images)
    assert Codec().encode(images).min() == -1 and Codec().encode(images).max() == 1
    assert Codec().decode(torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]
    z, mean, std = torch.randn(4, 2, 3, 3), torch.randn(1, 2, 1, 1), torch.rand(1, 2, 1, 1) + 0.5
    codec = Codec(None, mean, std)
    torch.testing.assert_close(codec.encode(z), (z - mean) / std)
    assert not codec.decodes


def test_safetensors_are_read_and_truncation_is_named(tmp_path):
    """A file written by hand, byte by byte, as the format's specification has it."""
    latents, labels = np.random.RandomState(0).randn(5, 4, 2, 2).astype("<f2"), np.arange(5, dtype="<i8")
    parts, entries, offset = [latents, latents[..., ::-1].copy(), labels], {}, 0
    for name, array in zip(("latents", "latents_flip", "labels"), parts):
        entries[name] = {"dtype": {"f": "F16", "i": "I64"}[array.dtype.kind], "shape": list(array.shape),
                         "data_offsets": [offset, offset := offset + array.nbytes]}
    header = json.dumps(entries | {"__metadata__": {"by": "hand"}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"".join(array.tobytes() for array in parts)
    for shard in (0, 1):
        (tmp_path / f"latents_rank00_shard{shard:03}.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="mean and std"):
        Latents(tmp_path)
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, tmp_path / "latents_stats.pt")
    read = open_dataset(tmp_path, None)
    assert len(read) == 10 and read.shape == (4, 2, 2) and read[7][1] == 2
    assert np.array_equal(read[7][0].numpy(), latents[2]) and np.array_equal(read.item(7, True)[0].numpy(), parts[1][2])
    (tmp_path / "latents_rank00_shard001.safetensors").write_bytes(data[:-3])
    with pytest.raises(UserError, match=f"shard001.*{len(data)} bytes expected, {len(data) - 3} found"):
        Latents(tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# sample.py

def test_heun_converges_at_second_order_and_euler_at_first():
    """dz/dt = -z + t from 1: the error against the closed form falls by 4 and by 2 when the steps double."""
    exact = 2 * math.exp(-1)                                                     # z = t - 1 + 2 exp(-t)
    for solver, factor in (("heun", 4), ("euler", 2)):
        errors = [abs(integrate(lambda z, t: -z + t.double(), torch.ones(1, dtype=torch.float64), n, solver).item() - exact)
                  for n in (40, 80)]
        assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)


def test_fifty_heun_steps_take_99_evaluations():
    """The last step is Euler; times go from 0 to the last grid point before 1."""
    times = []
    integrate(lambda z, t: times.append(t.item()) or z, torch.zeros(1))
    assert len(times) == 99 and times[0] == 0 and max(times) == pytest.approx(0.98)


class Echo(torch.nn.Module):
    """Predicts its label's number; keeps the batch sizes and times it was asked for."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, z, t, y):
        self.calls.append((len(z), t[0].item()))
        return y.float().view(-1, 1, 1, 1).expand_as(z)


@pytest.mark.parametrize("interval, first, last", [((0.1, 1.0), 6, 49), ((0.0, 1.0), 0, 49), ((0.3, 0.5), 16, 24)])
def test_guidance_acts_strictly_inside_its_interval(interval, first, last):
    """On the grid of 50 steps, t = 0.1 is outside of [0.1, 1], t = 0 is inside of [0, 1]; outside there is one pass."""
    net = Echo()
    kdiff = KDiff(net, "v", num_classes=4, tau=0.0)
    velocity = guided(kdiff, torch.tensor([1]), 3.0, interval)
    inside = [velocity(torch.zeros(1, 1, 1, 1), t).item() for t in torch.linspace(0, 1, 51)[:-1]]
    assert inside == [-5.0 if first <= i <= last else 1.0 for i in range(50)]    # 4 + 3 (1 - 4), or 1
    assert [n for n, _ in net.calls] == [2 if first <= i <= last else 1 for i in range(50)]


def test_guidance_of_one_is_one_pass():
    """Scale 1 is the conditional velocity itself."""
    net = Echo()
    guided(KDiff(net, "v", num_classes=4), torch.tensor([1]), 1.0, (0.0, 1.0))(torch.zeros(1, 1, 1, 1), torch.tensor(0.5))
    assert net.calls == [(1, 0.5)]


def tiny(target="x", **kw):
    """A small JiT with random weights everywhere, as a KDiff."""
    torch.manual_seed(0)
    net = JiT(image_size=16, patch_size=8, dim=32, depth=2, heads=2, num_classes=4, bottleneck=8, context_tokens=2,
              context_start=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return KDiff(net, target, num_classes=4, **kw).eval()


def test_samples_follow_their_index_alone():
    """Batch size and the images beside it change no pixel by more than one level; the seed changes them all."""
    kdiff, how = tiny(), dict(cfg=2.0, interval=(0.1, 1.0), steps=8)
    together = generate(kdiff, Codec(), [0, 1, 2, 3, 0], [0, 1, 2, 3, 4], **how).int()
    alone = torch.cat([generate(kdiff, Codec(), [i % 4], [i], **how) for i in range(5)]).int()
    assert (together - alone).abs().max() <= 1
    assert (together - generate(kdiff, Codec(), [0, 1, 2, 3, 0], [0, 1, 2, 3, 4], **how, seed=1).int()).abs().max() > 8


def test_published_jit_files_load_and_sample(tmp_path):
    """With the training script's extras (a pickled Namespace, an optimizer); ema1 is the default, ema2 can be chosen."""
    net = model.build("JiT-demo/8", 32, 10)
    def weights(factor):
        return {f"net.{k}": v * factor for k, v in net.state_dict().items() if k != "pos_embed"} | {
            "net.pos_embed": net.pos_embed}
    torch.save({"model": weights(1), "model_ema1": weights(2), "model_ema2": weights(3), "epoch": 5,
                "optimizer": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "checkpoint-last.pth")
    bias = net.t_embedder.mlp[0].weight
    for ema, factor in ((None, 2), ("0.9996", 3)):
        it = load(tmp_path / "checkpoint-last.pth", ema=ema)
        torch.testing.assert_close(it.kdiff.net.t_embedder.mlp[0].weight, bias * factor)
    assert it.config["model"] == "JiT-demo/8" and it.kdiff.target == "x" and it.kdiff.noise_scale == 32 / 256
    assert generate(it.kdiff, it.codec, [9], [0], cfg=2.9, interval=(0.1, 1.0), steps=2).shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match="0.5"):
        load(tmp_path / "checkpoint-last.pth", ema="0.5")


# ---------------------------------------------------------------------------------------------------------------
# train.py

def test_ema_is_the_direct_sum():
    """After n steps: decay^n p0 + (1 - decay) sum decay^(n-i) p_i; a step not taken changes nothing."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, history = EMA([p], [0.9, 0.5]), [p.detach().clone()]
    for n in range(6):
        p.data = torch.randn(2)
        history.append(p.detach().clone())
        ema.update(torch.tensor(1.0))
        before = [average[0].clone() for average in ema.averages.values()]
        p.data = torch.randn(2)
        ema.update(torch.tensor(0.0))
        assert all(torch.equal(a, average[0]) for a, average in zip(before, ema.averages.values()))
    for decay in (0.9, 0.5):
        direct = decay ** 6 * history[0] + sum((1 - decay) * decay ** (6 - i) * history[i] for i in range(1, 7))
        torch.testing.assert_close(ema.averages[str(decay)][0], direct)
    with ema.swapped("0.5"):
        torch.testing.assert_close(p.data, direct)
    assert torch.equal(p.data, p.data) and not torch.allclose(p.data, direct)


def command(*words, processes=None, fails=False, **kw):
    """Run one of our scripts (under torchrun where processes is given) on one thread; returns what it printed."""
    launch = [sys.executable] if processes is None else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*launch, *map(str, words)], capture_output=True, text=True, timeout=150, cwd=HERE,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


TINY = ("train.py", "--batch_size", 8, "--samples", 0, "--log_every", 1, "--model", "JiT-demo/8")


def test_two_processes_and_micro_batches_equal_one_process(tmp_path):
    """Same global batch: three steps agree to float tolerance, weights, averages, k and logged loss alike."""
    command(*TINY, "--steps", 3, "--out", tmp_path / "one")
    command(*TINY, "--steps", 3, "--micro_batch", 2, "--out", tmp_path / "two", processes=2)
    one, two = (read_tensors(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    for key, value in one["ema"]["0.98"].items():
        torch.testing.assert_close(two["ema"]["0.98"][key], value, atol=2e-5, rtol=1e-3)
    logs = [read_log(tmp_path / name, "loss")[1] for name in ("one", "two")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and one["model"]["w"] != 0


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    """2 + 2 steps against 4: model, averages, optimizer; the log has every step once; a finished run says so."""
    command(*TINY, "--steps", 4, "--out", tmp_path / "whole")
    command(*TINY, "--steps", 2, "--out", tmp_path / "halves")
    said = command(*TINY, "--steps", 4, "--out", tmp_path / "halves")
    assert f"resuming from {tmp_path / 'halves' / 'ckpt.pt'} at step 2" in said and "resuming with steps 4" in said
    whole, halves = (read_tensors(tmp_path / name / "ckpt.pt") for name in ("whole", "halves"))
    for part in ("model", "optimizer", "ema"):
        a, b = (torch.utils._pytree.tree_flatten(file[part])[0] for file in (whole, halves))
        assert len(a) == len(b) and all(torch.equal(torch.as_tensor(p), torch.as_tensor(q)) for p, q in zip(a, b))
    assert read_log(tmp_path / "whole", "loss") == read_log(tmp_path / "halves", "loss")
    assert "finished" in command(*TINY, "--steps", 4, "--out", tmp_path / "halves")
    said = command(*TINY, "--steps", 4, "--out", tmp_path / "halves", "--target", "v", fails=True)
    assert "target k, not v" in said and "Traceback" not in said


def test_short_demo_raises_k_and_writes_its_files(tmp_path):
    """Sixty steps of the pixel demo move k from 0.5 past 0.6; the pictures and the log are there; it samples."""
    said = command("train.py", "--space", "pixel", "--steps", 60, "--batch_size", 32, "--samples", 8, "--sample_steps", 4,
                   "--out", tmp_path)
    assert read_log(tmp_path, "k")[1][-1] > 0.6 and "samples.png" in said
    assert Image.open(tmp_path / "samples.png").size > (96, 8 * 96) and (tmp_path / "curves.png").exists()
    command("sample.py", tmp_path / "ckpt.pt", "--classes", "star,3", "--n", 4, "--steps", 2, "--out", tmp_path / "s.npz",
            processes=2)
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (4, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [5, 3, 5, 3] and json.loads(str(file["settings"]))["steps"] == 2
    assert "star9" in command("sample.py", tmp_path / "ckpt.pt", "--classes", "star9", fails=True)
