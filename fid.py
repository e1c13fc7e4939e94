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

from data import (RANK, WORLD, Packed, Parser, Shapes, UserError, in_short, list_images, open_dataset, print0,
                  progress, read_image, read_json, read_tensors, run, setup, to_tensor, write_atomically)

# ------------------------------------------------------------------------------------------------------------
# Features

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


def resize(images, size=299):
    """TensorFlow 1's bilinear resize: uint8 (N, 3, H, W) to float32 (N, 3, size, size), unscaled.

    Destination i reads source i * H / size: no half-pixel shift, no antialiasing; that is part of FID.
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
    """The Inception-v3 of FID: uint8 images (N, 3, H, W) to pool3 (N, 2048) and bias-free logits (N, 1008).

    weights_file: with the published file's keys; None leaves it untrained. UserError where it does not fit.
    Float32 throughout, whatever the caller's autocast and TF32: both would move an FID in its third digit.
    """
    name, key, dim = "inception", "fid", 2048

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
                raise UserError(f"{weights_file}: not FID's Inception-v3 ({in_short(error)})") from None
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
WEIGHTS = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URLS = ("https://github.com/mseitzer/pytorch-fid/releases/download/"
        "fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/"
        "v0.2.0/weights-inception-2015-12-05-6726825d.pth")


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
    """Write the weights to path from the first URL that gives the right bytes; returns it, or None."""
    for url in URLS:
        print0(f"downloading {url}")
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read(2 ** 27)
        except (OSError, http.client.HTTPException):
            continue
        if hashlib.sha256(content).hexdigest() == WEIGHTS:
            write_atomically(path, lambda temporary: temporary.write_bytes(content))
            return path


def find_weights():
    """The published weights: in our cache or that of other evaluators, else downloaded, once."""
    hub, names = Path(torch.hub.get_dir()) / "checkpoints", [url.rpartition("/")[2] for url in URLS]
    places = [Path("~/.cache/kdiff").expanduser() / names[0], *(hub / name for name in names)]
    cached = next((path for path in places if path.exists()), None)
    found = [cached or download(places[0]) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(found)
    if not found[0]:
        raise UserError(f"no Inception weights and no network: fetch {URLS[0]} elsewhere "
                        f"and name it with --weights, or put it at {places[0]}")
    return found[0]


def make_extractor(features="inception", weights=None, device="cpu", any_weights=False):
    """Inception or Pixels on the device. UserError for a weights file that is not the published one."""
    if features == "pixels":
        return Pixels().to(device)
    weights = weights or find_weights()
    if not any_weights and (found := sha256(weights)) != WEIGHTS:
        raise UserError(f"{weights}: not FID's weights (sha256 {found[:8]}..., not {WEIGHTS[:8]}...): "
                        f"fetch {URLS[0]}, or pass --any_weights for a number that compares with nothing")
    return Inception(weights).to(device)


# ------------------------------------------------------------------------------------------------------------
# Statistics and distances

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
        """mu (D,), sigma (D, D) with N - 1 in the denominator, numpy float64, and N. UserError for N < 2."""
        if self.n < 2:
            raise UserError(f"{self.n} images have no covariance: 2 are needed, and 50,000 are usual")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy(), self.n


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians: mu (D,), sigma (D, D).

    tr (sigma1 sigma2)^(1/2) sums the roots of the eigenvalues of sigma1 sigma2, those of the symmetric
    A^T sigma1 A with sigma2 = A A^T: real, never NaN. ValueError for other shapes or values not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise ValueError("mu (D,) and sigma (D, D) expected of both, not "
                         + ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2)))
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
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

    def check(self, size, weights=None):
        """UserError where images of this size, or features of these weights, do not compare with it."""
        if self.size and size and tuple(self.size) != tuple(size):
            raise UserError(f"{self.path}: made at {self.size[1]}x{self.size[0]} px, "
                            f"the samples have {size[1]}x{size[0]}")
        if self.weights and weights and self.weights != weights:
            raise UserError(f"{self.path}: made with other weights "
                            f"(sha256 {self.weights[:8]}..., now {weights[:8]}...)")


@torch.no_grad()
def collect(batches, extractor, device="cpu"):
    """(mu, sigma, n) and the logits (n, 1008) in global order (None for pixels), of all processes."""
    statistics, rows = Statistics(extractor.dim, device), []
    for images, first in batches:
        features, logits = extractor(images.to(device))
        statistics.add(features)
        rows.append((first, logits))
    mu, sigma, n = statistics.reduce().finish()
    if extractor.name == "pixels":
        return (mu, sigma, n), None
    table = torch.zeros(n, 1008, device=device)
    for first, logits in rows:
        table[first:first + len(logits)] = logits
    if WORLD > 1:
        dist.all_reduce(table)                                    # each row is zero on all processes but one
    return (mu, sigma, n), table.cpu()


def evaluate(batches, extractor, reference, device="cpu"):
    """Measure this process's batches of (uint8 (N, 3, H, W), global index of the first), of files or samples.

    Returns, on all processes, a dict: fid or pixel_distance, n and, for 10 images or more through Inception,
    is_mean and is_std. UserError where images or weights do not fit the reference.
    """
    def checked():
        for images, first in batches:
            reference.check(images.shape[2:], extractor.sha256)
            yield images, first
    (mu, sigma, n), logits = collect(checked(), extractor, device)
    result = {extractor.key: frechet_distance(mu, sigma, reference.mu, reference.sigma), "n": n}
    if logits is not None and n >= 10:
        result["is_mean"], result["is_std"] = inception_score(logits)
    return result


def show(result, reference, weights=None, settings=None):
    """Print a result of evaluate() with what made it; weights: their sha256, settings: of the samples."""
    few = min(result["n"] or 2048, reference.n or 2048)
    if "fid" in result:
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

class Images(NamedTuple):
    """n images of one size (H, W) on disk."""
    n: int
    size: tuple
    read: Callable                            # (first, last, batch_size) -> batches as evaluate() takes them
    settings: dict = None                     # of the sampler that made them

    def batches(self, batch_size):
        """This process's share, with a line of progress."""
        start, first, last = time.time(), self.n * RANK // WORLD, self.n * (RANK + 1) // WORLD
        for images, i in self.read(first, last, batch_size):
            yield images, i
            progress(i + len(images) - first, last - first, start)


def read_ahead(item, workers):
    """Images.read from item(i) -> uint8 (3, H, W): threads decode a batch while the caller uses the last."""
    def read(first, last, batch_size):
        with ThreadPoolExecutor(workers) as pool:
            ahead = pool.map(item, range(first, min(first + batch_size, last)))
            for i in range(first, last, batch_size):
                batch, ahead = ahead, pool.map(item, range(i + batch_size, min(i + 2 * batch_size, last)))
                yield torch.stack(list(batch)), i
    return read


def open_folder(path, workers):
    """Images below a folder, not cropped, in the order of their paths."""
    files, settings = list_images(path), Path(path, "settings.json")
    width, height = read_image(files[0]).size

    def item(i):
        image = read_image(files[i])
        if image.size != (width, height):
            raise UserError(f"{files[i]} is {image.width}x{image.height}, "
                            f"{files[0]} is {width}x{height}: one size needed")
        return to_tensor(image)
    return Images(len(files), (height, width), read_ahead(item, workers),
                  read_json(settings) if settings.exists() else None)


@contextmanager
def open_zip(path):
    """A zipfile.ZipFile; whatever is wrong with its bytes becomes one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:                                    # zipfile, zlib and numpy raise many kinds
        raise UserError(f"{path}: {str(error).splitlines()[0] if str(error) else 'damaged'}") from None


def read_member(archive, name):
    """An array of an .npz; None where it holds none of that name. ValueError beyond 256 MB unpacked."""
    if f"{name}.npy" not in archive.namelist():
        return None
    if archive.getinfo(f"{name}.npy").file_size > 2 ** 28:
        raise ValueError(f"{name} is too large")
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def open_npz(path, features):
    """The Reference in an .npz of mu and sigma, else the Images in its arr_0, streamed, never held whole."""
    def read(first, last, batch_size):
        with open_zip(path) as archive, archive.open("arr_0.npy") as file:
            file.seek(start + first * pixels)
            for i in range(first, last, batch_size):
                n = min(batch_size, last - i)
                batch = torch.frombuffer(bytearray(file.read(n * pixels)), dtype=torch.uint8)
                yield batch.view(n, *shape[1:]).permute(0, 3, 1, 2), i

    with open_zip(path) as archive:
        mu, sigma = read_member(archive, "mu"), read_member(archive, "sigma")
        if mu is not None or sigma is not None:                   # ADM's references hold arr_0 as well
            return read_statistics(path, archive, mu, sigma, features)
        settings = read_member(archive, "settings")
        with archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start, pixels = file.tell(), math.prod(shape[1:])
        if len(shape) != 4 or shape[3] != 3 or pixels < 1 or dtype != np.uint8 or fortran:
            raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3) in C order")
        if archive.getinfo("arr_0.npy").file_size != start + shape[0] * pixels:
            raise ValueError(f"arr_0 does not hold its {shape[0]:,} images")
        return Images(shape[0], shape[1:3], read, None if settings is None else json.loads(settings.item()))


def read_statistics(path, archive, mu, sigma, features):
    """The Reference of mu and sigma and what --make_ref adds. ValueError where they do not fit."""
    members = (read_member(archive, name) for name in ("features", "n", "image_size", "weights"))
    made, n, size, weights = (None if value is None else value.item() for value in members)
    dim = EXTRACTORS[features].dim
    if made and made != features:
        raise ValueError(f"made with --features {made}, not {features}")
    if np.shape(mu) != (dim,) or np.shape(sigma) != (dim, dim):
        raise ValueError(f"mu {np.shape(mu)} and sigma {np.shape(sigma)}, "
                         f"but {features} features are {dim} numbers")
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise ValueError("mu and sigma are not finite")
    return Reference(path, mu.astype(np.float64), sigma.astype(np.float64), n,
                     (size, size) if size else None, weights)


def open_source(path, features, workers=1):
    """Reference or Images: a folder, an .npz or a packed .npy. UserError for others, and below 2 images."""
    if os.path.isdir(path):
        source = open_folder(path, workers)
    elif path.endswith(".npz"):
        source = open_npz(path, features)
    else:
        source = open_data(path, Packed(path), workers)
    if isinstance(source, Images) and source.n < 2:
        raise UserError(f"{path}: {source.n} images have no covariance: 2 are needed, and 50,000 are usual")
    return source


def open_data(path, data, workers):
    """A dataset of data.py as Images. UserError where it holds something else."""
    image, _ = data[0]
    if image.dtype != torch.uint8 or len(image) != 3:
        raise UserError(f"{path}: {image.dtype} {tuple(image.shape)} is no RGB image")
    return Images(len(data), tuple(image.shape[1:]), read_ahead(lambda i: data[i][0], workers))


def load_reference(path, features="inception"):
    """The Reference that --make_ref wrote, or a published one. UserError for other features."""
    reference = open_source(path, features)
    if isinstance(reference, Images):
        raise UserError(f"{path}: images, not their statistics; make them by `python fid.py --make_ref`")
    return reference


def make_reference(images, out, extractor, device, batch_size):
    """Write the statistics of square Images to out, an .npz for load_reference()."""
    (mu, sigma, n), _ = collect(images.batches(batch_size), extractor, device)
    made = dict(mu=mu, sigma=sigma, n=n, image_size=images.size[0], features=extractor.name,
                weights=extractor.sha256 or "")
    if RANK == 0:
        write_atomically(out, lambda temporary: np.savez(temporary, **made))
    print0(f"wrote {out}: {extractor.name} features of {n:,} images of {images.size[0]} px")


def parse():
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("samples", nargs="?", help="a folder of images, an .npz (arr_0, or mu and sigma) or a packed .npy")
    add("reference", nargs="?", help="likewise")
    add("--make_ref", metavar="DATA",
        help="write a reference: a folder of images, a packed .npy, or `shapes`")
    add("--image_size", type=int, help="for --make_ref: pixels, cropped to as in training")
    add("--out", help="for --make_ref: the .npz")
    add("--features", choices=list(EXTRACTORS), default="inception", help="default inception")
    add("--weights", help="Inception weights file (default: downloaded once)")
    add("--any_weights", action="store_true",
        help="accept other weights: a number that compares with nothing")
    add("--batch_size", type=int, default=64, help="images at a time on each process (default 64)")
    add("--workers", type=int, default=max(1, os.cpu_count() // WORLD),
        help="decoding threads (default: the cores)")
    add("--device", help="default: cuda, else cpu")
    args = parser.parse_args()
    if (args.make_ref is None and args.reference is None
            or args.make_ref and not (args.image_size and args.out)):
        parser.error("give SAMPLES and REF, or --make_ref DATA --image_size PIXELS --out FILE.npz")
    if args.make_ref and not args.out.endswith(".npz"):
        parser.error(f"--out {args.out}: a reference is an .npz file")
    if min(args.batch_size, args.workers, args.image_size or 1) < 1:
        parser.error("--batch_size, --workers and --image_size must be positive")
    return args


def main():
    """Write a reference, or measure samples against one."""
    args = parse()
    device, *_ = setup(args.device)
    size = args.image_size
    if args.make_ref:
        data = Shapes(10_000, size) if args.make_ref == "shapes" else open_dataset(args.make_ref, size)
        sources = [open_data(args.make_ref, data, args.workers)]
    else:
        sources = [open_source(path, args.features, args.workers) for path in (args.samples, args.reference)]
    samples, reference = sources[0], sources[-1]
    if any(isinstance(source, Images) for source in sources):
        extractor = make_extractor(args.features, args.weights, device, args.any_weights)
        weights = extractor.sha256
    else:
        weights = samples.weights
    if measured := isinstance(reference, Images) and reference:
        reference = Reference(args.reference, None, None, size=measured.size)
    reference.check(samples.size, weights)
    run.each_for_itself = True          # a damaged image is met by one process alone, which has to report it
    if args.make_ref:
        return make_reference(samples, args.out, extractor, device, args.batch_size)
    if measured:
        (mu, sigma, n), _ = collect(measured.batches(args.batch_size), extractor, device)
        reference = reference._replace(mu=mu, sigma=sigma, n=n, weights=weights)
    if isinstance(samples, Images):
        result = evaluate(samples.batches(args.batch_size), extractor, reference, device)
        return show(result, reference, weights, samples.settings)
    distance = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    show({EXTRACTORS[args.features].key: distance, "n": samples.n}, reference, weights)


if __name__ == "__main__":
    run(main)
