"""Quality of samples: Frechet Inception Distance and Inception Score, equal to torch-fidelity's.

Images stream through Inception-v3 (2015) into float64 sums, so memory does not grow with their number, and
neither batch size nor the number of processes changes the result. `--features pixels` needs no weights: the
same distance of 16x16 thumbnails, an offline yardstick for small experiments; not an FID, nor called one.

    python fid.py SAMPLES REF       each a folder of images, an .npz (arr_0, or mu and sigma) or a packed .npy
    python fid.py --make_ref DATA --image_size 256 --out ref.npz   the reference statistics of training images
    torchrun --nproc_per_node 8 fid.py SAMPLES REF                 the images are split over the processes
"""
# N images, H, W their size in pixels, D features
import hashlib
import json
import math
import os
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import (LOCAL_RANK, RANK, THREADS, WORLD, FileError, Packed, Parser, Shapes, UserError, barrier,
                  check_ranges, list_images, need, open_dataset, print0, Progress, read_image, read_json,
                  read_tensors, readable, run, setup, to_tensor, write_atomically)

# ------------------------------------------------------------------------------------------------------------
# Distance and score

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians: mu (D,), sigma (D, D).

    tr (sigma1 sigma2)^(1/2) sums the roots of the eigenvalues of sigma1 sigma2, those of the symmetric
    A^T sigma1 A with sigma2 = A A^T: real, never NaN. ValueError for other shapes or values not finite.
    """
    mu1, sigma1, mu2, sigma2 = arrays = [np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2)]
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise ValueError(f"mu (D,) and sigma (D, D) expected of both, not {[a.shape for a in arrays]}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("mu and sigma must be finite")
    try:
        scipy.linalg.cholesky(sigma1, check_finite=False)                  # both have to be positive definite
        values = scipy.linalg.eigh(sigma1, sigma2, type=2, driver="gv", eigvals_only=True, check_finite=False)
        cross = np.sqrt(values.clip(min=0)).sum()
    except scipy.linalg.LinAlgError:
        # The roots of eigenvalues that should be 0 would add up to 1e-8 each. They are the singular values of
        # A1^T A2, which need no root, and A has as many columns as sigma has rank.
        cross = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False).sum()
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def factor(sigma):
    """A (D, rank) with sigma = A A^T, leaving out the eigenvalues that are rounding errors."""
    values, vectors = scipy.linalg.eigh(sigma)
    keep = values > len(sigma) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, keep] * np.sqrt(values[keep])


def inception_score(logits, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) in each split of the shuffled logits (N, 1008): mean and std.

    The order of the rows matters: that of the files, or of the samples' indices. ValueError for N < splits.
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


class Statistics:
    """Mean and covariance of features that arrive in batches and on several processes, in float64.

    Keeps the scatter around the current mean, sum (f - mean)(f - mean)^T, and merges by Chan, Golub, LeVeque
    (1983): the difference of two means enters as one more row. Nothing large is subtracted from a large one.
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

    def finish(self):
        """Of all processes, on each: mu (D,), sigma (D, D) over N - 1, numpy float64, and N. UserError: N < 2."""
        if WORLD > 1:
            total = torch.cat([self.mean * self.n, self.mean.new_tensor([self.n])])
            dist.all_reduce(total)
            mean = total[:-1] / total[-1].clamp(min=1)
            self.scatter += self.n * torch.outer(self.mean - mean, self.mean - mean)
            dist.all_reduce(self.scatter)
            self.mean, self.n = mean, int(total[-1])
        need(self.n > 1, f"{self.n} images have no covariance: 2 are needed, and 50,000 are usual")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy(), self.n


# ------------------------------------------------------------------------------------------------------------
# Features

def resize(images, size=299):
    """TensorFlow 1's bilinear resize: uint8 (N, 3, H, W) to float32 (N, 3, size, size), unscaled.

    Destination i reads source i * H / size: no half-pixel shift, no antialiasing; that is part of FID.
    """
    x = images
    for _ in "WH":                                                # the last dimension; then the image is turned
        source = torch.arange(size, device=x.device) * (x.shape[-1] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[-1] - 1)
        left, right = x.index_select(-1, low).float(), x.index_select(-1, high).float()
        x = (left + (right - left) * (source - low)).mT
    return x


# Branches in the order in which a block concatenates them: name, then convolutions "channels:kernel". Each
# keeps the image's size, but for "/s": stride s, no padding. "+" joins two. branch_pool pools first.
A = "branch1x1 64:1x1, branch5x5 48:1x1 64:5x5, branch3x3dbl 64:1x1 96:3x3 96:3x3, branch_pool {}:1x1"
B = "branch3x3 384:3x3/2, branch3x3dbl 64:1x1 96:3x3 96:3x3/2, branch_pool"
C = ("branch1x1 192:1x1, branch7x7 {0}:1x1 {0}:1x7 192:7x1, "
     "branch7x7dbl {0}:1x1 {0}:7x1 {0}:1x7 {0}:7x1 192:1x7, branch_pool 192:1x1")
D = "branch3x3 192:1x1 320:3x3/2, branch7x7x3 192:1x1 192:1x7 192:7x1 192:3x3/2, branch_pool"
E = ("branch1x1 320:1x1, branch3x3 384:1x1 384:1x3+3x1, "
     "branch3x3dbl 448:1x1 384:3x3 384:1x3+3x1, branch_pool 192:1x1")

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
        """The norm is folded into the convolution: one pass less, and train() and eval() agree."""
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        weight = self.conv.weight * scale[:, None, None, None]
        bias = self.bn.bias - self.bn.running_mean * scale
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding).relu_()


class Mixed(nn.Module):
    """One row of BLOCKS. Several convolutions of a branch are numbered: branch5x5_1, branch3x3_2a."""

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
        """(N, C, H, W) to the branches' outputs side by side."""
        outputs = []
        for names in self.branches:
            y = self.pool(x) if names is self.branches[-1] else x
            for keys in names:
                y = torch.cat([self.get_submodule(key)(y) for key in keys], dim=1)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """The Inception-v3 of FID: uint8 images (N, 3, H, W) to pool3 (N, 2048) and bias-free logits (N, 1008).

    weights_file: with the published file's keys; None leaves it untrained. UserError where it does not fit.
    Float32 throughout, whatever the caller's autocast and TF32: both would move an FID in its third digit.
    """
    name, key, dim, sha256 = "inception", "fid", 2048, None

    def __init__(self, weights_file=None):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, "3x3/2")
        self.Conv2d_2a_3x3 = Conv(32, 32, "3x3/1")
        self.Conv2d_2b_3x3 = Conv(32, 64, "3x3")
        self.Conv2d_3b_1x1 = Conv(64, 80, "1x1")
        self.Conv2d_4a_3x3 = Conv(80, 192, "3x3/1")
        width = 192
        for name, row in BLOCKS.items():
            self.add_module(name, Mixed(width, *row))
            width = self.get_submodule(name).width
        self.fc = nn.Linear(width, 1008)
        if weights_file:
            with readable(weights_file, "FID's Inception-v3"):
                self.load_state_dict(read_tensors(weights_file))
            self.sha256 = sha256(weights_file)
        self.requires_grad_(False).to(memory_format=torch.channels_last)          # 1.4 times as fast on CPU

    @torch.no_grad()
    def forward(self, images):
        """uint8 images (N, 3, H, W) to (N, 2048) and (N, 1008)."""
        with (torch.autocast(images.device.type, enabled=False),
              torch.backends.cudnn.flags(True, allow_tf32=False)):
            x = ((resize(images) - 128) / 128).contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))             # (N, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOL["halve"](x)))                  # (N, 192, 71, 71)
            x = POOL["halve"](x)                                                          # (N, 192, 35, 35)
            for name in BLOCKS:
                x = self.get_submodule(name)(x)                                           # (N, 2048, 8, 8)
            pool3 = x.mean((2, 3), keepdim=True)
            logits = F.conv2d(pool3, self.fc.weight[..., None, None])      # a matmul has its own TF32 switch
            return pool3.flatten(1), logits.flatten(1)


class Pixels(nn.Module):
    """uint8 images (N, 3, H, W) to 16x16 area-averaged RGB in [0, 1], (N, 768), and None for the logits."""
    name, key, dim, sha256 = "pixels", "pixel_distance", 768, None

    def forward(self, images):
        """uint8 images (N, 3, H, W) to (N, 768) and None."""
        return F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1), None


EXTRACTORS = {"inception": Inception, "pixels": Pixels}
WEIGHTS = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"                        # sha256
URLS = ("https://github.com/mseitzer/pytorch-fid/releases/download/"
        "fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/"
        "v0.2.0/weights-inception-2015-12-05-6726825d.pth")


def make_extractor(features="inception", weights=None, device="cpu", any_weights=False):
    """Inception or Pixels on the device. UserError for a weights file that is not the published one."""
    if features == "pixels":
        return Pixels().to(device)
    weights = weights or find_weights()
    network = Inception(weights)
    need(any_weights or network.sha256 == WEIGHTS,
         f"{weights}: not FID's weights (sha256 {network.sha256[:8]}..., not {WEIGHTS[:8]}...): "
         f"fetch {URLS[0]}, or pass --any_weights for a number that compares with nothing")
    return network.to(device)


def find_weights():
    """The published file in torch's cache, as other evaluators keep it; each machine downloads it once."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    places = [folder / url.rpartition("/")[2] for url in URLS]
    for url, place in zip(URLS, places):
        if LOCAL_RANK == 0 and not any(path.exists() for path in places):
            print0(f"downloading {url}")
            socket.setdefaulttimeout(30)                          # a network that answers nothing is no network
            try:
                folder.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, place, hash_prefix=WEIGHTS, progress=False)
            except (OSError, RuntimeError, HTTPException):        # the second: another hash
                continue
    barrier()
    found = [path for path in places if path.exists()]
    need(found, f"no Inception weights and no network: fetch {URLS[0]} elsewhere "
                f"and name it with --weights, or put it at {places[0]}")
    return found[0]


def sha256(path):
    """The file's hash as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Evaluation

class Reference(NamedTuple):
    """Statistics, and of their making what is known: published files tell mu and sigma alone."""
    path: str
    mu: np.ndarray                                                                # (D,)
    sigma: np.ndarray                                                             # (D, D)
    n: int = None
    size: tuple = None                                                            # (H, W)
    weights: str = None                                                           # sha256


class Images(NamedTuple):
    """n images of one size (H, W) on disk."""
    path: str
    n: int
    size: tuple
    read: Callable                            # (first, last, batch_size) -> batches as evaluate() takes them
    settings: dict = None                     # of the sampler that made them
    weights: str = None                       # they have none

    def batches(self, batch_size):
        """This process's share, with a line of progress."""
        progress, first, last = Progress(self.n // WORLD), self.n * RANK // WORLD, self.n * (RANK + 1) // WORLD
        for images, i in self.read(first, last, batch_size):
            yield images, i
            progress(i + len(images) - first)


def check_alike(made, size, weights):
    """UserError where images of this size, or features of these weights, do not compare with what was made."""
    if made.size and size and made.size != size:
        raise UserError(f"{made.path}: made at {made.size[1]}x{made.size[0]} px, "
                        f"the other images have {size[1]}x{size[0]}")
    if made.weights and weights and made.weights != weights:
        raise UserError(f"{made.path}: made with other weights "
                        f"(sha256 {made.weights[:8]}..., now {weights[:8]}...)")


def evaluate(batches, extractor, reference, device="cpu"):
    """Measure this process's batches of (uint8 (N, 3, H, W), global index of the first), of files or samples.

    Returns, on all processes, a dict: fid or pixel_distance, n and, for 10 images or more through Inception,
    is_mean and is_std. UserError where images or weights do not fit the reference.
    """
    statistics, rows = Statistics(extractor.dim, device), []
    for images, first in batches:
        check_alike(reference, images.shape[2:], extractor.sha256)
        features, logits = extractor(images.to(device))
        statistics.add(features)
        rows.append((first, logits))
    mu, sigma, n = statistics.finish()
    result = {extractor.key: frechet_distance(mu, sigma, reference.mu, reference.sigma), "n": n}
    if extractor.key == "fid" and n >= 10:
        table = torch.zeros(n, 1008, device=device)               # in global order, whoever made a row
        for first, logits in rows:
            table[first:first + len(logits)] = logits
        if WORLD > 1:
            dist.all_reduce(table)                                # each row is zero on all processes but one
        result["is_mean"], result["is_std"] = inception_score(table.cpu())
    return result


def make_reference(images, extractor, device, batch_size):
    """The Reference of Images."""
    statistics = Statistics(extractor.dim, device)
    for batch, _ in images.batches(batch_size):
        statistics.add(extractor(batch.to(device))[0])
    return Reference(images.path, *statistics.finish(), images.size, extractor.sha256)


def show(result, reference, weights=None, settings=None):
    """Print a result of evaluate() with what made it; weights: their sha256, settings: of the samples."""
    if "fid" in result:
        few = min(result["n"] or 2048, reference.n or 2048)
        print0(f"FID {result['fid']:.6g}", "" if few >= 2048 else
               f"(warning: from {few:,} images; fewer than 2,048 give too high an FID)")
    else:
        print0(f"pixel distance {result['pixel_distance']:.6g}")
    if "is_mean" in result:
        print0(f"IS {result['is_mean']:.6g} +- {result['is_std']:.4g}")
    samples, images = (f"{n:,} images" if n else "statistics of unknown count"
                       for n in (result["n"], reference.n))
    print0(f"samples: {samples}", f"| settings {json.dumps(settings)}" if settings else "")
    print0(f"reference: {images} | {reference.path}",
           f"| sha256 {sha256(reference.path)}" if RANK == 0 and os.path.isfile(reference.path) else "")
    if weights:
        print0(f"weights: sha256 {weights}",
               "" if weights == WEIGHTS else "(WARNING: not FID's own; not comparable)")


# ------------------------------------------------------------------------------------------------------------
# Files

def open_source(path, features):
    """Reference or Images: a folder, an .npz or a packed .npy. UserError for others, and below 2 images."""
    if path.endswith(".npz") and not os.path.isdir(path):
        source = open_npz(path, features)
    else:
        source = open_folder(path) if os.path.isdir(path) else open_data(path, Packed(path))
    need(source.n is None or source.n > 1, f"{path}: {source.n} images have no covariance: 2 are needed")
    return source


def load_reference(path, features="inception"):
    """The Reference that --make_ref wrote, or a published one. UserError for other features."""
    reference = open_source(path, features)
    need(isinstance(reference, Reference),
         f"{path}: images, not their statistics; make them by `python fid.py --make_ref`")
    return reference


def open_data(path, data):
    """A dataset of data.py as Images. UserError where it holds something else."""
    image, _ = data[0]
    need(image.dtype == torch.uint8 and len(image) == 3,
         f"{path}: {image.dtype} {tuple(image.shape)} is no RGB image")
    return Images(path, len(data), image.shape[1:], read_ahead(lambda i: data[i][0]))


def open_folder(path):
    """Images below a folder, not cropped, in the order of their paths."""
    files, settings = list_images(path), Path(path, "settings.json")
    width, height = read_image(files[0]).size

    def item(i):
        image = read_image(files[i])
        if image.size != (width, height):
            raise FileError(f"{files[i]} is {image.width}x{image.height}, "
                            f"{files[0]} is {width}x{height}: one size needed")
        return to_tensor(image)
    return Images(path, len(files), (height, width), read_ahead(item),
                  read_json(settings) if settings.exists() else None)


def read_ahead(item):
    """Images.read from item(i) -> uint8 (3, H, W): threads decode a batch while the caller uses the last."""
    def read(first, last, batch_size):
        with ThreadPoolExecutor(THREADS) as pool:
            ahead = pool.map(item, range(first, min(first + batch_size, last)))
            for i in range(first, last, batch_size):
                batch, ahead = ahead, pool.map(item, range(i + batch_size, min(i + 2 * batch_size, last)))
                yield torch.stack(list(batch)), i
    return read


def open_npz(path, features):
    """The Reference in an .npz of mu and sigma, else the Images in its arr_0, streamed, never held whole."""
    def member(name, default=None):
        if f"{name}.npy" not in archive.namelist():
            return default
        need(archive.getinfo(f"{name}.npy").file_size < 2 ** 28, f"{path}: its {name} is too large")
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    with readable(path, "an .npz of images or statistics"), zipfile.ZipFile(path) as archive:
        if member("mu") is None and member("sigma") is None:
            return stream_npz
    return None
