"""Quality of samples: Frechet Inception Distance and Inception Score, equal to torch-fidelity's.

Images stream through Inception-v3 (2015) into float64 sums, so memory does not grow with their number, and
neither batch size nor the number of processes changes the result. `--features pixels` needs no weights: the
distance of 16x16 thumbnails, an offline yardstick, not called FID.

    python fid.py SAMPLES REF       each a folder of images, a packed .npy, an .npz (arr_0, or mu and sigma)
    python fid.py --make_ref DATA --image_size 256 --out ref.npz   the reference statistics of training images
    torchrun --nproc_per_node 8 fid.py SAMPLES REF                 the images are split over the processes
"""
# N images, H, W their size in pixels, D features
import hashlib
import json
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

from data import (LOCAL_RANK, RANK, THREADS, FileError, Packed, all_reduce, barrier, check_ranges, checked,
                  in_batches, list_images, need, new_parser, open_dataset, part_of, print0, read_image,
                  read_tensors, run, setup, to_tensor, write_atomically)

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians: mu (D,), sigma (D, D).
    tr (sigma1 sigma2)^(1/2) is the sum of the singular values of A1^T A2, where sigma = A A^T: real, never
    NaN, exact at every rank. UserError for other shapes or values not finite."""
    mu1, sigma1, mu2, sigma2 = arrays = [np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2)]
    shapes = [a.shape for a in arrays]
    need(mu1.ndim == 1 and shapes == [mu1.shape, 2 * mu1.shape] * 2 and np.isfinite(sum(map(np.sum, arrays))),
         f"mu (D,) and sigma (D, D) of finite numbers expected twice, not {shapes}")
    roots = []
    for sigma in (sigma1, sigma2):
        values, vectors = scipy.linalg.eigh(sigma)
        keep = values > len(sigma) * np.finfo(np.float64).eps * values[-1]        # the others should be 0
        roots.append(vectors[:, keep] * np.sqrt(values[keep]))                    # A (D, rank)
    cross = scipy.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)

def inception_score(logits, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) in each split of the shuffled logits (N, 1008): mean and std.
    The order of the rows matters: that of the files, or of the samples' indices. UserError for N < splits."""
    logits, n = torch.as_tensor(logits), len(logits)
    need(n >= splits, f"{n} images do not fill {splits} splits")
    order, scores = torch.from_numpy(np.random.RandomState(2020).permutation(n)), []
    for i in range(splits):
        log_p = logits[order[i * n // splits:(i + 1) * n // splits]].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))

class Statistics:
    """Mean and covariance of features that arrive in batches and on several processes, in float64. Keeps the
    scatter around the current mean, sum (f - mean)(f - mean)^T, and merges by Chan, Golub, LeVeque (1983):
    the difference of two means enters as one more row. Nothing large is subtracted from a large one."""

    def __init__(self, dim, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device          # which has no float64
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features):
        """features (N, D), any floating dtype and device."""
        features = features.to(self.mean)
        n, mean = len(features), features.mean(0)
        between = (mean - self.mean) * math.sqrt(self.n * n / (self.n + n))
        rows = torch.cat([features - mean, between[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += (mean - self.mean) * (n / (self.n + n))
        self.n += n

    def finish(self):
        """mu (D,), sigma (D, D) over N - 1, numpy float64, and N, of all processes. UserError for N < 2."""
        total = all_reduce(torch.cat([self.mean * self.n, self.mean.new_tensor([self.n])]))
        mean = total[:-1] / total[-1].clamp(min=1)
        self.scatter += self.n * torch.outer(self.mean - mean, self.mean - mean)
        all_reduce(self.scatter)
        self.mean, self.n = mean, int(total[-1])
        need(self.n > 1, f"{self.n} images have no covariance: 2 are needed, and 50,000 are usual")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy(), self.n

# ---- Features ----------------------------------------------------------------------------------------------

def resize(x, size=299):
    """TensorFlow 1's bilinear resize: uint8 (N, 3, H, W) to float32 (N, 3, size, size), unscaled.
    Destination i reads source i * H / size: no half-pixel shift, no antialiasing; that is part of FID."""
    for _ in "WH":                                                # the last dimension, then turn the image
        source = torch.arange(size, device=x.device) * (x.shape[-1] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[-1] - 1)
        left, right = x.index_select(-1, low).float(), x.index_select(-1, high).float()
        x = (left + (right - left) * (source - low)).mT
    return x

# Blocks concatenate branches, between bars: chains of pools and of convolutions, named as in the file, which
# keep the image's size, but for "/s": stride s, no padding. "+" sets two side by side.
STEM = "Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 halve Conv2d_3b_1x1 Conv2d_4a_3x3/1 halve"
A = "branch1x1 | branch5x5_1 branch5x5_2 | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 | average branch_pool"
B = "branch3x3/2 | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2 | halve"
C = ("branch1x1 | branch7x7_1 branch7x7_2 branch7x7_3 | branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 "
     "branch7x7dbl_4 branch7x7dbl_5 | average branch_pool")
D = "branch3x3_1 branch3x3_2/2 | branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2 | halve"
E = ("branch1x1 | branch3x3_1 branch3x3_2a+branch3x3_2b | "
     "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a+branch3x3dbl_3b | average branch_pool")
BLOCKS = {"Mixed_5b": A, "Mixed_5c": A, "Mixed_5d": A,
          "Mixed_6a": B, "Mixed_6b": C, "Mixed_6c": C, "Mixed_6d": C, "Mixed_6e": C,
          "Mixed_7a": D, "Mixed_7b": E, "Mixed_7c": E.replace("average", "max")}
POOLS = {"average": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
         "max": nn.MaxPool2d(3, 1, 1), "halve": nn.MaxPool2d(3, 2)}

class Inception(nn.Module):
    """The Inception-v3 of FID: uint8 images (N, 3, H, W) to pool3 (N, 2048) and bias-free logits (N, 1008).
    weights_file: keys and shapes as published, else UserError. Float32 throughout, whatever the caller's
    autocast and TF32, which would move an FID in its third digit."""
    key, dim = "fid", 2048

    def __init__(self, weights_file):
        super().__init__()
        with checked(weights_file, "FID's Inception-v3"):
            for key, value in read_tensors(weights_file).items():
                self.register_buffer(key.replace(".", " "), value)
            self.to(memory_format=torch.channels_last)                            # 1.4 times as fast on CPU
            self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))                      # fails where one is unfit
            self.sha256 = sha256(weights_file)

    @torch.no_grad()
    def forward(self, images):
        with (torch.autocast(images.device.type, enabled=False),
              torch.backends.cudnn.flags(True, allow_tf32=False)):
            x = ((resize(images) - 128) / 128).contiguous(memory_format=torch.channels_last)
            x = self.chain(x, STEM)                                                       # (N, 192, 35, 35)
            for name, branches in BLOCKS.items():
                x = torch.cat([self.chain(x, branch, name + " ") for branch in branches.split(" | ")], dim=1)
            pool3 = x.mean((2, 3), keepdim=True)                                          # (N, 2048, 1, 1)
            logits = F.conv2d(pool3, self.get_buffer("fc weight")[..., None, None])  # a matmul might use TF32
            return pool3.flatten(1), logits.flatten(1)

    def chain(self, x, steps, block=""):
        """x (N, C, H, W) through the steps of a branch in the table above."""
        for step in steps.split():
            convs = [self.convolve(x, block + name) for name in step.split("+") if step not in POOLS]
            x = torch.cat(convs, dim=1) if convs else POOLS[step](x)
        return x

    def convolve(self, x, name):
        """Convolution, norm folded into it, and ReLU; name as in the table above, behind its block's."""
        name, _, stride = name.partition("/")
        weight, gain, bias, mean, var = (self.get_buffer(f"{name} {key}") for key in (
            "conv weight", "bn weight", "bn bias", "bn running_mean", "bn running_var"))
        gain = gain / (var + 1e-3).sqrt()
        weight, bias = weight * gain[:, None, None, None], bias - mean * gain
        return F.conv2d(x, weight, bias, int(stride or 1), "valid" if stride else "same").relu_()

class Pixels(nn.Module):
    """uint8 images (N, 3, H, W) to 16x16 area-averaged RGB in [0, 1], (N, 768), and None for the logits."""
    key, dim, sha256 = "pixel_distance", 768, None

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1), None

EXTRACTORS = {"inception": Inception, "pixels": Pixels}
WEIGHTS = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"                       # sha256
URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")

def make_extractor(features="inception", weights=None, device="cpu", any_weights=False):
    """Pixels, or Inception with the published weights, downloaded once a machine; UserError for others."""
    if features == "pixels":
        return Pixels().to(device)
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", Path(URL).name))
    if LOCAL_RANK == 0 and not weights and not path.exists():
        with checked(URL, f"to be had; fetch it elsewhere and put it at {path}, or name it with --weights"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, path, hash_prefix=WEIGHTS)
    barrier()
    network = Inception(path)
    need(any_weights or network.sha256 == WEIGHTS, f"{path}: not FID's weights ({URL}) but of sha256 "
         f"{network.sha256}; --any_weights takes them for a number that compares with nothing")
    return network.to(device)

def sha256(path):
    """The file's hash, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

# ---- Evaluation: of samples as they come, and of files -----------------------------------------------------

def evaluate(batches, extractor, reference, device="cpu"):
    """Measure this process's batches of (uint8 (N, 3, H, W), global index of the first), of files or samples.
    Returns, on all processes, a dict: fid or pixel_distance, n and, for 10 images or more through Inception,
    is_mean and is_std. UserError where images or weights do not fit the reference."""
    statistics, rows = Statistics(extractor.dim, device), []
    for images, first in batches:
        need(reference.size in (None, images.shape[2:]),
             f"{reference.path}: height and width {reference.size}, the samples {tuple(images.shape[2:])}")
        need(reference.weights in (None, extractor.sha256), f"{reference.path}: made with other weights")
        features, logits = extractor(images.to(device))
        statistics.add(features)
        rows.append((first, logits))
    mu, sigma, n = statistics.finish()
    result = {extractor.key: frechet_distance(mu, sigma, reference.mu, reference.sigma), "n": n}
    if extractor.key == "fid" and n >= 10:
        table = torch.zeros(n, 1008, device=device)               # in global order, whoever made a row
        for first, logits in rows:
            table[first:first + len(logits)] = logits
        all_reduce(table)                                         # each row is zero on all processes but one
        result["is_mean"], result["is_std"] = inception_score(table.cpu())
    return result

def show(result, reference, weights=None, settings=None):
    """Print a result of evaluate() with what made it; weights: their sha256, settings: of the samples."""
    if "fid" in result:
        print0(f"FID {result['fid']:.6g}", "(warning: too high, of fewer than 2,048 images)"
               if min(result["n"] or 2048, reference.n or 2048) < 2048 else "")
    else:
        print0(f"pixel distance {result['pixel_distance']:.6g}")
    if "is_mean" in result:
        print0(f"IS {result['is_mean']:.6g} +- {result['is_std']:.4g}")
    print0(f"samples: {result['n']:,} images", f"| settings {json.dumps(settings)}" if settings else "")
    print0(f"reference: {f'{reference.n:,} images' if reference.n else 'statistics'} | {reference.path}",
           f"| sha256 {sha256(reference.path)}" if RANK == 0 and Path(reference.path).is_file() else "")
    if weights:
        print0(f"weights: sha256 {weights}", "" if weights == WEIGHTS else "(WARNING: not FID's own)")

class Source(NamedTuple):
    """Images of one size on disk, or their statistics: published files tell mu and sigma alone."""
    path: str
    n: int = 0                                                    # 0: unknown
    size: tuple = None                                            # (H, W)
    mu: np.ndarray = None                                         # (D,)
    sigma: np.ndarray = None                                      # (D, D)
    weights: str = None                                           # sha256 of those that made mu and sigma
    read: Callable = None                                         # (i, j) -> uint8 (j - i, 3, H, W)
    settings: dict = None                                         # of the sampler that made the images

    def batches(self, batch_size):
        """This process's share as evaluate() takes it; a GPU still computes while the next batch is read."""
        need(self.read and self.n > 1, f"{self.path}: no images, or fewer than 2, so without covariance")
        for indices in in_batches(part_of(self.n), batch_size):
            yield self.read(indices[0], indices[-1] + 1), indices[0]

def open_images(path, names, item):
    """The Source of item(i), uint8 (3, H, W), read by threads. UserError for latents, and for two sizes."""
    first, pool = item(0), ThreadPoolExecutor(THREADS)
    need(first.dtype == torch.uint8, f"{path}: latents, not images")

    def read(i, j):
        images = list(pool.map(item, range(i, j)))
        for name, image in zip(names[i:j], images):
            if image.shape != first.shape:
                raise FileError(f"{name} is {image.shape[2]}x{image.shape[1]}, "
                                f"{names[0]} is {first.shape[2]}x{first.shape[1]}: one size needed")
        return torch.stack(images)
    return Source(path, len(names), tuple(first.shape[1:]), read=read)

def open_npz(path, features):
    """mu and sigma of an .npz, else the images in its arr_0, streamed, never held whole."""
    def member(name):
        need(archive.getinfo(f"{name}.npy").file_size < 2 ** 28, f"{path}: its {name} is too large")
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def read(i, j):
        with checked(path, "an .npz of images"):
            file.seek(start + i * pixels)                         # unpacks what lies between
            batch = torch.frombuffer(bytearray(file.read((j - i) * pixels)), dtype=torch.uint8)
            return batch.view(j - i, *shape[1:]).permute(0, 3, 1, 2)
    with checked(path, "an .npz of images or statistics"):
        archive = zipfile.ZipFile(path)
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if names & {"mu", "sigma"}:                               # ADM's references hold arr_0 as well
            mu, sigma, dim = member("mu"), member("sigma"), EXTRACTORS[features].dim
            made = {name: member(name).item() for name in names & {"features", "n", "image_size", "weights"}}
            need(made.get("features", features) == features, f"{path}: not made with --features {features}")
            need(mu.shape == (dim,) and sigma.shape == (dim, dim) and np.isfinite(mu.sum() + sigma.sum()),
                 f"{path}: mu {mu.shape}, sigma {sigma.shape}: {features} features are {dim} finite numbers")
            size = (made["image_size"],) * 2 if "image_size" in made else None
            return Source(path, int(made.get("n", 0)), size, mu, sigma, made.get("weights") or None)
        file = archive.open("arr_0.npy")
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        start, pixels, size = file.tell(), math.prod(shape[1:]), archive.getinfo("arr_0.npy").file_size
        need(len(shape) == 4 and shape[3] == 3 and dtype == np.uint8 and not fortran
             and start + shape[0] * pixels == size > start,
             f"{path}: arr_0 is {size:,} bytes of {dtype} {shape}, not uint8 (N, H, W, 3) in C order")
        settings = json.loads(member("settings").item()) if "settings" in names else None
        return Source(path, shape[0], shape[1:3], read=read, settings=settings)

def open_source(path, features):
    """The Source in a folder (images are not cropped), an .npz or a packed .npy; UserError for all else."""
    if Path(path).is_dir():
        files = list_images(path)
        return open_images(path, files, lambda i: to_tensor(read_image(files[i])))
    if path.endswith(".npz"):
        return open_npz(path, features)
    data = Packed(path)
    return open_images(path, range(len(data)), lambda i: data[i][0])

def load_reference(path, features="inception"):
    """The statistics in an .npz, published or of --make_ref. UserError for other features, and for images."""
    reference = open_source(path, features)
    need(not reference.read, f"{path}: images; make their statistics by `python fid.py --make_ref`")
    return reference

def parse():
    """The command line: SAMPLES and REF, or --make_ref with what it needs."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("samples", nargs="?", help="a folder of images, a packed .npy, an .npz (arr_0, or mu and sigma)")
    add("reference", nargs="?", help="likewise")
    add("--make_ref", metavar="DATA", help="write a reference of DATA, as for train.py --data")
    add("--image_size", type=int, help="for --make_ref: pixels, cropped to as in training")
    add("--out", help="for --make_ref: the .npz")
    add("--features", choices=list(EXTRACTORS), default="inception", help="pixels needs no weights; no FID")
    add("--weights", help="Inception weights file (default: downloaded once)")
    add("--any_weights", action="store_true", help="accept others: a number that compares with nothing")
    add("--batch_size", type=int, default=64, help="images at a time on each process")
    add("--device", help="default: cuda, else cpu")
    args = parser.parse_args()
    check_ranges(args, batch_size=1, image_size=1)
    need(args.image_size and (args.out or "").endswith(".npz") if args.make_ref else args.reference,
         "give SAMPLES and REF, or --make_ref DATA --image_size PIXELS --out FILE.npz")
    return args

def main():
    """Measure samples against a reference, or write one."""
    args = parse()
    device = setup(args.device)
    if args.make_ref:
        data = open_dataset(args.make_ref, args.image_size)
        reference = open_images(args.make_ref, range(len(data)), lambda i: data[i][0])
    else:
        samples, reference = (open_source(path, args.features) for path in (args.samples, args.reference))
        need(None in (samples.size, reference.size) or samples.size == reference.size,
             f"{args.reference}: height and width {reference.size}, {args.samples} {samples.size}")
        if not samples.read and not reference.read:
            distance = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
            return show({EXTRACTORS[args.features].key: distance, "n": samples.n}, reference, samples.weights)
    extractor = make_extractor(args.features, args.weights, device, args.any_weights)
    if reference.read:
        statistics = Statistics(extractor.dim, device)
        for images, _ in reference.batches(args.batch_size):
            statistics.add(extractor(images.to(device))[0])
        mu, sigma, n = statistics.finish()
        reference = reference._replace(mu=mu, sigma=sigma)
    if not args.make_ref:
        result = evaluate(samples.batches(args.batch_size), extractor, reference, device)
        return show(result, reference, extractor.sha256, samples.settings)
    made = dict(mu=mu, sigma=sigma, n=n, image_size=args.image_size, features=args.features)
    if RANK == 0:
        write_atomically(args.out, lambda path: np.savez(path, weights=extractor.sha256 or "", **made))
    print0(f"wrote {args.out}: {args.features} features of {n:,} images of {args.image_size} px")

if __name__ == "__main__":
    run(main)
