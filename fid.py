"""Quality of samples: Frechet Inception Distance and Inception Score, equal to torch-fidelity's number for number.

Images stream through Inception-v3 (2015) into float64 sums, so memory does not grow with their number, and neither
batch size nor the number of processes changes the result. `--features pixels` needs no weights: the same distance
between 16x16 thumbnails, an offline yardstick for small experiments, which is not an FID and is not called one.

    python fid.py SAMPLES REF             each a folder of images, an .npz (arr_0, or mu and sigma) or a packed .npy
    python fid.py --make_ref DATA --image_size 256 --out ref.npz          the reference statistics of training images
    torchrun --nproc_per_node 8 fid.py SAMPLES REF                        the images are split over the processes
"""
# N images, H, W their size in pixels, D features
import hashlib
import http.client
import json
import math
import os
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import (RANK, WORLD, Packed, Parser, Shapes, UserError, list_images, open_dataset, print0, progress, read_image,
                  read_json, read_tensors, run, setup, to_tensor, write_atomically)

# ----------------------------------------------------------------------------------------------------------------
# Features

# Branches in the order in which a block concatenates them: name, then convolutions "channels:kernel". Each keeps the
# image's size, but for "/s": stride s, no padding. "+" joins two side by side. branch_pool pools before it convolves.
A = "branch1x1 64:1x1, branch5x5 48:1x1 64:5x5, branch3x3dbl 64:1x1 96:3x3 96:3x3, branch_pool {}:1x1"
B = "branch3x3 384:3x3/2, branch3x3dbl 64:1x1 96:3x3 96:3x3/2, branch_pool"
C = ("branch1x1 192:1x1, branch7x7 {0}:1x1 {0}:1x7 192:7x1, "
     "branch7x7dbl {0}:1x1 {0}:7x1 {0}:1x7 {0}:7x1 192:1x7, branch_pool 192:1x1")
D = "branch3x3 192:1x1 320:3x3/2, branch7x7x3 192:1x1 192:1x7 192:7x1 192:3x3/2, branch_pool"
E = "branch1x1 320:1x1, branch3x3 384:1x1 384:1x3+3x1, branch3x3dbl 448:1x1 384:3x3 384:1x3+3x1, branch_pool 192:1x1"

POOL = {"average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        "max": lambda x: F.max_pool2d(x, 3, 1, 1),
        "halve": lambda x: F.max_pool2d(x, 3, 2)}
BLOCKS = {"Mixed_5b": (A.format(32), "average"), "Mixed_5c": (A.format(64), "average"),
          "Mixed_5d": (A.format(64), "average"), "Mixed_6a": (B, "halve"),
          "Mixed_6b": (C.format(128), "average"), "Mixed_6c": (C.format(160), "average"),
          "Mixed_6d": (C.format(160), "average"), "Mixed_6e": (C.format(192), "average"),
          "Mixed_7a": (D, "halve"), "Mixed_7b": (E, "average"), "Mixed_7c": (E, "max")}


class Conv(nn.Module):
    """Convolution, BatchNorm by the running statistics, ReLU; kernel as in the table above."""

    def __init__(self, width, channels, kernel):
        super().__init__()
        kernel, _, stride = kernel.partition("/")
        kernel = [int(k) for k in kernel.split("x")]
        padding = 0 if stride else [k // 2 for k in kernel]
        self.conv = nn.Conv2d(width, channels, kernel, int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x):
        # the norm is folded into the convolution: one pass over the activations less, train() and eval() agree
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        weight, bias = self.conv.weight * scale[:, None, None, None], self.bn.bias - self.bn.running_mean * scale
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding).relu_()


class Mixed(nn.Module):
    """One row of BLOCKS. Convolutions of a branch are numbered where there are several: branch5x5_1, branch3x3_2a."""

    def __init__(self, width, branches, pool):
        super().__init__()
        self.pool, self.branches, self.width = POOL[pool], [], 0
        for branch in branches.split(", "):
            name, *steps = branch.split()
            channels, names = width, []
            for i, step in enumerate(steps, 1):
                inputs, (channels, kernels) = channels, step.split(":")
                kernels, number = kernels.split("+"), f"_{i}" if len(steps) > 1 else ""
                names.append([name + number + letter for letter in ("ab" if len(kernels) > 1 else [""])])
                for key, kernel in zip(names[-1], kernels):
                    self.add_module(key, Conv(inputs, int(channels), kernel))
                channels = int(channels) * len(kernels)
            self.branches.append(names)
            self.width += channels

    def forward(self, x):
        outputs = []
        for names in self.branches:
            y = self.pool(x) if names is self.branches[-1] else x
            for keys in names:
                y = torch.cat([self.get_submodule(key)(y) for key in keys], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def resize(images, size=299):
    """TensorFlow 1's bilinear resize: uint8 (N, 3, H, W) to float32 (N, 3, size, size), unscaled.

    Destination i reads source i * H / size: no half-pixel shift and no antialiasing, which FID's definition includes.
    """
    x = images
    for dim in (3, 2):
        source = torch.arange(size, dtype=torch.float32, device=x.device) * (x.shape[dim] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        fraction = (source - low)[(...,) + (None,) * (3 - dim)]
        left, right = x.index_select(dim, low).float(), x.index_select(dim, high).float()
        x = left + (right - left) * fraction
    return x


class Inception(nn.Module):
    """The Inception-v3 of FID: uint8 images (N, 3, H, W) to pool3 (N, 2048) and logits without bias (N, 1008).

    weights_file: with the published file's keys; None leaves it untrained. UserError where it does not fit. Float32
    throughout whatever the caller's autocast and TF32 settings, since both would move an FID in its third digit.
    """
    name, dim, title = "inception", 2048, "FID"

    def __init__(self, weights_file=None):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, "3x3/2")
        self.Conv2d_2a_3x3 = Conv(32, 32, "3x3/1")
        self.Conv2d_2b_3x3 = Conv(32, 64, "3x3")
        self.Conv2d_3b_1x1 = Conv(64, 80, "1x1")
        self.Conv2d_4a_3x3 = Conv(80, 192, "3x3/1")
        width = 192
        for name, row in BLOCKS.items():
            self.add_module(name, block := Mixed(width, *row))
            width = block.width
        self.fc = nn.Linear(width, 1008)
        self.sha256 = sha256(weights_file) if weights_file else None
        if weights_file:
            try:
                self.load_state_dict(read_tensors(weights_file))
            except (RuntimeError, TypeError) as error:
                raise UserError(f"{weights_file}: not FID's Inception-v3 ({' '.join(str(error).split())[:120]} ...)") from None
        self.requires_grad_(False).to(memory_format=torch.channels_last)          # 1.4 times as fast on CPU

    @torch.no_grad()
    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False), torch.backends.cudnn.flags(True, allow_tf32=False):
            x = ((resize(images) - 128) / 128).contiguous(memory_format=torch.channels_last)
            x = POOL["halve"](self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))      # (N, 64, 73, 73)
            x = POOL["halve"](self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                          # (N, 192, 35, 35)
            for name in BLOCKS:
                x = self.get_submodule(name)(x)                                                   # (N, 2048, 8, 8)
            pool3 = x.mean((2, 3), keepdim=True)
            logits = F.conv2d(pool3, self.fc.weight[..., None, None])     # no matmul: those have a TF32 setting of their own
            return pool3.flatten(1), logits.flatten(1)


class Pixels(nn.Module):
    """uint8 images (N, 3, H, W) to 16x16 area-averaged RGB in [0, 1], (N, 768), and None for the logits."""
    name, dim, title, sha256 = "pixels", 768, "pixel distance", None

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1), None


WEIGHTS = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URLS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth")
CACHE = Path("~/.cache/kdiff").expanduser()


def sha256(path):
    """The file's hash as hexadecimal digits. UserError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2 ** 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()


def download(path):
    """Fetch the weights from the first of URLS that answers with the right bytes; UserError where none does."""
    for url in URLS:
        try:
            print0(f"downloading {url}")
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read(2 ** 27)
        except (OSError, http.client.HTTPException):
            continue
        if hashlib.sha256(content).hexdigest() == WEIGHTS:
            return write_atomically(path, lambda temporary: temporary.write_bytes(content))
    raise UserError(f"no Inception weights and no network: download {URLS[0]} elsewhere and name it with --weights")


def find_weights():
    """The published weights: cached by us or by the evaluators that share the file, else downloaded by one process."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    for path in (ours := CACHE / URLS[0].rpartition("/")[2], *(hub / url.rpartition("/")[2] for url in URLS)):
        if path.exists():
            return path
    failure = [None]
    if RANK == 0:
        try:
            download(ours)
        except UserError as error:
            failure = [str(error)]
    if WORLD > 1:
        dist.broadcast_object_list(failure)
    if failure[0]:
        raise UserError(failure[0])
    return ours


def make_extractor(features="inception", weights=None, device="cpu", any_weights=False):
    """Inception or Pixels on the device: a module with .name, .dim, .title, .sha256. UserError for other weights."""
    if features == "pixels":
        return Pixels().to(device)
    weights = weights or find_weights()
    if not any_weights and sha256(weights) != WEIGHTS:
        raise UserError(f"{weights}: not the published weights (sha256 {sha256(weights)[:8]}..., not {WEIGHTS[:8]}...): "
                        "no FID could be compared; get the file again, or pass --any_weights for a number of your own")
    return Inception(weights).to(device)


# ----------------------------------------------------------------------------------------------------------------
# Statistics and distances

class Statistics:
    """Mean and covariance of features that arrive in batches and on several processes, in float64.

    Keeps the scatter around the current mean, sum (f - mean)(f - mean)^T, and merges by Chan, Golub and LeVeque (1983):
    the difference of the two means enters as one more row. Nothing large is ever subtracted from something large.
    """

    def __init__(self, dim, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device          # which has no float64
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features):
        """features (N, D), any floating dtype and device."""
        features = features.to(self.mean.device).double()
        n, mean = len(features), features.mean(0)
        between = (mean - self.mean) * math.sqrt(self.n * n / (self.n + n))
        rows = torch.cat([features - mean, between[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += (mean - self.mean) * (n / (self.n + n))
        self.n += n

    def reduce(self):
        """Merge the statistics of all processes, on all of them."""
        if WORLD > 1:
            total = torch.cat([self.mean * self.n, self.mean.new_tensor([self.n])])
            dist.all_reduce(total)
            mean = total[:-1] / total[-1].clamp(min=1)
            self.scatter += self.n * torch.outer(self.mean - mean, self.mean - mean)
            dist.all_reduce(self.scatter)
            self.mean, self.n = mean, int(total[-1])
        return self

    def finish(self):
        """mu (D,), sigma (D, D) with N - 1 in the denominator, as numpy float64, and N. ValueError for N < 2."""
        if self.n < 2:
            raise ValueError(f"a covariance needs 2 images or more, not {self.n}")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy(), self.n


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians: mu (D,), sigma (D, D).

    tr (sigma1 sigma2)^(1/2) sums the roots of the eigenvalues of sigma1 sigma2, which are those of the symmetric
    A^T sigma1 A with sigma2 = A A^T: real, and never NaN. ValueError for other shapes or values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise ValueError("mu (D,) and sigma (D, D) expected of both, not "
                         + ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2)))
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("mu and sigma must be finite")
    try:
        scipy.linalg.cholesky(sigma1, check_finite=False)                         # both have to be positive definite
        values = scipy.linalg.eigh(sigma1, sigma2, type=2, driver="gv", eigvals_only=True, check_finite=False)
        cross = np.sqrt(values.clip(min=0)).sum()
    except scipy.linalg.LinAlgError:
        # The roots of eigenvalues that should be 0 would add up to 1e-8 each. They are the singular values of A1^T A2,
        # which need no root, and A has as many columns as sigma has rank.
        cross = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False).sum()
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def factor(sigma):
    """A (D, rank) with sigma = A A^T, leaving out the eigenvalues that are rounding errors."""
    values, vectors = scipy.linalg.eigh(sigma)
    keep = values > len(sigma) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, keep] * np.sqrt(values[keep])


def inception_score(logits, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) in each of the splits of the shuffled logits (N, 1008): mean and std.

    The order of the rows matters: it is that of the files, or of the samples' indices. ValueError for N < splits.
    """
    logits, n = torch.as_tensor(logits), len(logits)
    if n < splits:
        raise ValueError(f"{n} images do not fill {splits} splits")
    order, scores = torch.from_numpy(np.random.RandomState(2020).permutation(n)), []
    for i in range(splits):
        log_p = logits[order[i * n // splits:(i + 1) * n // splits]].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ----------------------------------------------------------------------------------------------------------------
# Files

class Images(NamedTuple):
    """n images of size (H, W); read(first, last, batch_size) yields (uint8 (N, 3, H, W), index of its first image)."""
    path: str
    n: int
    size: tuple
    settings: dict
    read: Callable

    def batches(self, batch_size):
        """This process's share, with a line of progress."""
        start, first, last = time.time(), self.n * RANK // WORLD, self.n * (RANK + 1) // WORLD
        for images, i in self.read(first, last, batch_size):
            yield images, i
            progress(i + len(images) - first, last - first, start, Path(self.path).name)


class Reference(NamedTuple):
    """Statistics with what is known of their making; published files tell mu and sigma alone."""
    path: str
    mu: np.ndarray
    sigma: np.ndarray
    n: int = None
    image_size: int = None
    weights: str = None

    def check(self, size, extractor):
        """UserError where images of this (H, W), or this extractor's numbers, cannot be compared with it."""
        if self.image_size and (self.image_size,) * 2 != tuple(size):
            raise UserError(f"{self.path}: made at {self.image_size} px, the samples have {size[1]}x{size[0]}")
        if self.weights and self.weights != extractor.sha256:
            raise UserError(f"{self.path}: made with other Inception weights (sha256 {self.weights[:8]}...)")


def read_ahead(item, workers):
    """A reader of Images from item(i) -> uint8 (3, H, W); threads decode a batch while the last one is used."""
    def read(first, last, batch_size):
        with ThreadPoolExecutor(workers) as pool:
            ahead = pool.map(item, range(first, min(first + batch_size, last)))
            for i in range(first, last, batch_size):
                batch, ahead = ahead, pool.map(item, range(i + batch_size, min(i + 2 * batch_size, last)))
                yield torch.stack(list(batch)), i
    return read


def open_folder(path, workers):
    """The images below a folder at their own size, in the order of their paths."""
    files = list_images(path)
    width, height = read_image(files[0]).size

    def item(i):
        image = read_image(files[i])
        if image.size != (width, height):
            raise UserError(f"{files[i]} is {image.width}x{image.height}, {files[0]} is {width}x{height}: "
                            "all images must have one size")
        return to_tensor(image)
    settings = os.path.join(path, "settings.json")
    return Images(path, len(files), (height, width), read_json(settings) if os.path.exists(settings) else None,
                  read_ahead(item, workers))


@contextmanager
def open_zip(path):
    """A zipfile.ZipFile; whatever is wrong with its bytes becomes one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:                                                    # zipfile, zlib and numpy raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable .npz ({reason})") from None


def read_header(file):
    """Shape and dtype of an opened .npy file, which is left at its first byte of data."""
    version = np.lib.format.read_magic(file)
    shape, fortran, dtype = {(1, 0): np.lib.format.read_array_header_1_0,
                             (2, 0): np.lib.format.read_array_header_2_0}[version](file)
    return shape, dtype, fortran


def read_small(archive, name):
    """A member of an .npz as an array of at most 256 MB; None where there is none."""
    if f"{name}.npy" not in archive.namelist():
        return None
    if archive.getinfo(f"{name}.npy").file_size > 2 ** 28:
        raise ValueError(f"{name} is too large")
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def open_npz(path, features):
    """A Reference where the .npz holds mu and sigma, else the Images of its arr_0, streamed and never held whole."""
    with open_zip(path) as archive:
        mu, sigma = read_small(archive, "mu"), read_small(archive, "sigma")
