"""Quality of samples: Frechet Inception Distance and Inception Score, by torch-fidelity's formulas.

Images stream through Inception-v3 (2015) into float64 sums. For FID memory does not grow with their number;
the Inception Score keeps 4 kB of each. Neither the batch size nor the number of processes changes the result.
`--features pixels` needs no weights: it is the distance of 16x16 thumbnails, an offline yardstick, and not
called FID.

    python fid.py --make_ref imagenet/train --image_size 256 --out ref.npz   the statistics of training images
    torchrun --nproc_per_node=8 fid.py out/pixel-train/ckpt*.pt ref.npz      checkpoints: a table, fid.csv
    python fid.py SAMPLES ref.npz             samples: a folder of images, a packed file, an .npz (arr_0)
"""
# N images, H, W their size in pixels, D features
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

from data import (RANK, Dataset, FileError, ImageFolder, Stored, UserError, all_reduce, download,
                  first_decides, my_batches, new_file, new_parser, open_dataset, open_safetensors, print0,
                  read_items, read_tensors, reading, require, run, setup)
from sample import SAMPLER, append_row, open_sampler, read_rows

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians: mu (D,),
    sigma (D, D). The trace of the root is the sum of the singular values of A1^T A2, where sigma
    = A A^T: a real number at every rank, never NaN. UserError for other shapes or numbers that
    are not finite."""
    mu1, sigma1 = gaussian(mu1, sigma1)
    mu2, sigma2 = gaussian(mu2, sigma2, len(mu1))
    cross = scipy.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    shift = (mu1 - mu2) @ (mu1 - mu2)
    return float(shift + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)

def gaussian(mu, sigma, dim=None):
    """mu and sigma in float64. UserError unless they are finite numbers, (D,) and (D, D); dim:
    the D expected."""
    mu, sigma = (np.asarray(a, dtype=np.float64) for a in (mu, sigma))
    dim = dim or mu.size
    fit = mu.shape == (dim,) and sigma.shape == (dim, dim)
    require(fit and np.isfinite(mu).all() and np.isfinite(sigma).all(),
            f"mu {mu.shape}, sigma {sigma.shape}: {dim} and {dim} x {dim} finite numbers are needed")
    return mu, sigma

def root(sigma):
    """A (D, rank) with A A^T = sigma. Eigenvalues that should be 0 are left out."""
    values, vectors = scipy.linalg.eigh(sigma)
    require(values[0] >= -1e-3 * abs(values[-1]) and np.allclose(sigma, sigma.T), "sigma is no covariance")
    keep = values > len(sigma) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, keep] * np.sqrt(values[keep])

def inception_score(logits, splits=10):
    """exp of the mean KL(p(y|x) || p(y)) in each split of the shuffled logits (N, 1008): mean
    and std. The order of rows matters: it is that of the files, or of the samples' indices. UserError
    for N < splits."""
    logits = torch.as_tensor(logits)
    n = len(logits)
    require(n >= splits, f"{n} images do not fill {splits} splits")
    order = torch.from_numpy(np.random.RandomState(2020).permutation(n))
    scores = []
    for i in range(splits):
        part = order[i * n // splits:(i + 1) * n // splits]
        log_p = logits[part].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))

# ---- Features ----------------------------------------------------------------------------------------------

def resize(x, size=299):
    """TensorFlow 1's bilinear resize: uint8 (N, 3, H, W) to float32 (N, 3, size, size),
    unscaled. Destination i reads source i H / size: no half-pixel shift, no antialiasing. That
    is part of FID."""
    for _ in ("width", "height"):                                 # the last dimension, then turn the image
        source = torch.arange(size, device=x.device) * (x.shape[-1] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[-1] - 1)
        left = x.index_select(-1, low).float()
        right = x.index_select(-1, high).float()
        x = (left + (right - left) * (source - low)).mT
    return x

# A block concatenates its branches, which are separated by "|". A branch is a chain of
# convolutions, named as in the file, and of pools. They keep the size of the image, except for "halve"
# and "name/s", a convolution of stride s without padding. "a+b" means that a and b get the same input,
# and that their outputs are concatenated.
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
    """The Inception-v3 of FID: uint8 images (N, 3, H, W) to pool3 (N, 2048) and bias-free logits
    (N, 1008). weights_file: keys and shapes as published, else FileError. Float32 throughout:
    the caller's autocast and TF32 would move an FID in its third digit."""
    key, dim = "fid", 2048

    def __init__(self, weights_file):
        super().__init__()
        weights = read_tensors(weights_file)
        with reading(weights_file, "FID's Inception-v3"):
            for key, value in weights.items():
                self.register_buffer(key.replace(".", " "), value)         # a name has no dots
            self.to(memory_format=torch.channels_last)                            # 1.4 times as fast on CPU
            self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))                      # fails if one does not fit
        self.sha256 = sha256(weights_file)

    @torch.no_grad()
    def forward(self, images):
        exact = torch.autocast(images.device.type, enabled=False)
        with exact, torch.backends.cudnn.flags(True, allow_tf32=False):
            x = (resize(images) - 128) / 128
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.chain(x, STEM)                                               # (N, 192, 35, 35)
            for name, branches in BLOCKS.items():
                parts = [self.chain(x, branch, name + " ") for branch in branches.split(" | ")]
                x = torch.cat(parts, dim=1)
            pool3 = x.mean((2, 3), keepdim=True)                                  # (N, 2048, 1, 1)
            weight = self.get_buffer("fc weight")[..., None, None]
            logits = F.conv2d(pool3, weight)                                      # a matmul might use TF32
            return pool3.flatten(1), logits.flatten(1)

    def chain(self, x, steps, block=""):
        """x (N, C, H, W) through the steps of a branch in the table above."""
        for step in steps.split():
            if step in POOLS:
                x = POOLS[step](x)
            else:
                x = torch.cat([self.convolve(x, block + name) for name in step.split("+")], dim=1)
        return x

    def convolve(self, x, name):
        """Convolution, with the norm folded into it, and ReLU. name: a step of the table,
        after its block's."""
        name, _, stride = name.partition("/")
        weight, gain, bias, mean, var = (self.get_buffer(f"{name} {key}") for key in (
            "conv weight", "bn weight", "bn bias", "bn running_mean", "bn running_var"))
        gain = gain / (var + 1e-3).sqrt()
        weight = weight * gain[:, None, None, None]
        bias = bias - mean * gain
        if stride:
            return F.conv2d(x, weight, bias, int(stride)).relu_()
        return F.conv2d(x, weight, bias, padding="same").relu_()

class Pixels(nn.Module):
    """uint8 images (N, 3, H, W) to 16x16 area-averaged RGB in [0, 1], (N, 768), and None
    for the logits."""
    key, dim, sha256 = "pixel_distance", 768, None

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1), None

EXTRACTORS = {"inception": Inception, "pixels": Pixels}
WEIGHTS = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"                       # sha256
URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")

def make_extractor(features="inception", weights=None, device="cpu"):
    """Pixels, or Inception with the weights in a file: by default the published ones, downloaded
    once a machine."""
    if features == "pixels":
        return Pixels().to(device)
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", Path(URL).name))
    if not weights and not path.exists():
        download(URL, path, ", or name it with --weights", hash_prefix=WEIGHTS)
    return Inception(path).to(device)

def sha256(path):
    """The file's hash, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

# ---- What is measured --------------------------------------------------------------------------------------

class NpzImages(Dataset):
    """The images in arr_0 of an .npz, uint8 (N, H, W, 3), and what `python sample.py` writes with
    them: settings, a dict."""

    def __init__(self, path):
        with reading(path, "an .npz of images"), np.load(path) as file:          # nothing is unpickled
            self.images = file["arr_0"]
            self.settings = json.loads(str(file.get("settings", "null")))
            self.n = len(self.images)
            if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
                raise ValueError(f"arr_0 is {self.images.dtype} {self.images.shape}")

    def item(self, i):
        return torch.from_numpy(self.images[i]).permute(2, 0, 1), 0

def open_samples(path):
    """The Dataset of images in a folder (not cropped), a packed file or an .npz. UserError
    for all else."""
    if Path(path).is_dir():
        return ImageFolder(path, None)
    if path.endswith(".npz"):
        return NpzImages(path)
    return Stored(path)

def batches_of(data, batch_size, path):
    """This process's share of a dataset's images, as moments() takes it. UserError for other items."""
    first, _ = data[0]
    require(first.dtype == torch.uint8, f"{path}: its items are {first.dtype}, not uint8 images")
    for indices in my_batches(len(data), batch_size):
        with reading(path, "images of one size", "; `fid.py --make_ref` crops the images of a folder"):
            images, _ = read_items(data, [min(i, len(data) - 1) for i in indices])
            if images[0].shape != first.shape:
                raise ValueError(f"{tuple(first.shape)}, {tuple(images[0].shape)}")
        yield images, indices

class Reference(NamedTuple):
    """The statistics of an .npz. Published files contain mu and sigma alone."""
    path: str
    mu: np.ndarray                    # (D,)
    sigma: np.ndarray                 # (D, D)
    n: int = 0                        # images; 0: unknown
    image_size: int = None            # pixels; None: unknown
    weights: str = None               # sha256 of those that made it; None: unknown
    sha256: str = ""                  # of the file that was read

def load_reference(path, features="inception"):
    """The Reference in an .npz, published or of --make_ref. UserError if it was made
    with other features, or contains images."""
    with reading(path, "an .npz of statistics (see --make_ref)"):
        file = np.load(path)
        mu, sigma = file["mu"], file["sigma"]
        made = {name: file[name].item() for name in file.files if file[name].ndim == 0}
    require(made.pop("features", features) == features, f"{path}: not made with --features {features}")
    try:
        mu, sigma = gaussian(mu, sigma, EXTRACTORS[features].dim)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    known = {name: made[name] or None for name in ("n", "image_size", "weights") if name in made}
    return Reference(path, mu, sigma, sha256=sha256(path), **known)

def moments(batches, n, extractor, device, score=False):
    """mu (D,) and the unbiased sigma (D, D), float64, of the features of n images on all
    processes; then mean and std of the Inception Score, None without `score`. batches: this
    process's (uint8 (B, 3, H, W), range of indices), as of my_batches(). UserError for n < 2."""
    require(n > 1, f"{n} images have no covariance: 2 are needed, and 50,000 are usual")
    exact = device
    if device.type == "mps":                                      # which has no float64
        exact = "cpu"
    total = torch.zeros(extractor.dim, dtype=torch.float64, device=exact)
    squares = torch.zeros(extractor.dim, extractor.dim, dtype=torch.float64, device=exact)
    table = torch.zeros(n if score else 0, 1008)                  # logits in the order of the indices
    for images, indices in batches:
        images = images[:max(0, n - indices.start)]               # without the surplus of my_batches
        features, logits = extractor(images.to(device))
        features = features.to(total)
        total += features.sum(0)
        squares += features.T @ features
        if score:
            table[indices.start:indices.stop] = logits.cpu()
    mu = all_reduce(total) / n
    sigma = (all_reduce(squares) - n * torch.outer(mu, mu)) / (n - 1)
    all_reduce(table)                                             # each row is 0 on all processes but one
    mu, sigma = mu.cpu().numpy(), sigma.cpu().numpy()
    if score:
        return mu, sigma, *inception_score(table)
    return mu, sigma, None, None

def evaluate(batches, n, extractor, reference, device, settings=None):
    """Measure n images, given as for moments(), against a Reference, and print the numbers with
    what made them. Returns a dict: fid or pixel_distance and, for 10 images or more through
    Inception, is_mean and is_std. UserError if images or weights do not fit the reference."""
    require(reference.weights in (None, extractor.sha256), f"{reference.path}: made with other weights")

    def fitting():
        side = reference.image_size
        for images, indices in batches:
            require(not side or images.shape[2:] == (side, side),
                    f"{reference.path}: of {side} x {side} pixels, samples of {tuple(images.shape[2:])}")
            yield images, indices
    score = extractor.key == "fid" and n >= 10
    mu, sigma, is_mean, is_std = moments(fitting(), n, extractor, device, score)
    result = {extractor.key: frechet_distance(mu, sigma, reference.mu, reference.sigma)}
    if extractor.key == "fid":
        print0(f"FID {result['fid']:.6g}")
        if min(n, reference.n or n) < 2048:
            print0("warning: it is too high, being of fewer than 2,048 images")
    else:
        print0(f"pixel distance {result['pixel_distance']:.6g}")
    if score:
        result |= {"is_mean": is_mean, "is_std": is_std}
        print0(f"IS {is_mean:.6g} +- {is_std:.4g}")
    print0(f"samples: {n:,} images | settings {json.dumps(settings)}")
    print0(f"reference: {reference.n or 'unknown'} images | {reference.path} | "
           f"sha256 {reference.sha256}")
    if extractor.sha256:
        print0(f"weights: sha256 {extractor.sha256}")
        if extractor.sha256 != WEIGHTS:
            print0("warning: these are not FID's own weights: the number compares with nothing")
    return result

# ---- Commands ----------------------------------------------------------------------------------------------

FOUND = "fid pixel_distance is_mean is_std".split()               # columns of fid.csv behind the settings

def measure(path, args, extractor, reference, device):
    """Add the distance of a checkpoint's samples to fid.csv next to it. A measurement is known by
    its settings and by the hashes of checkpoint and reference: a
    measurement that is already in the table is not repeated."""
    settings = {"file": sha256(path)[:16], "reference": reference.sha256[:16]}
    settings["weights"] = (extractor.sha256 or "")[:16]
    for name in ("tokenizer", "stats"):
        file = getattr(args, name)
        settings[name] = sha256(file)[:16] if file else ""
    checkpoint, classes, how, sampling = open_sampler(path, args, device)
    if not sha256(path).startswith(settings["file"]):             # perhaps on one process only
        raise FileError(f"{path} was replaced while it was read: try again")
    sampling["solver_steps"] = sampling.pop("steps")
    settings = sampling | settings
    key = {name: str(value) for name, value in settings.items()}
    table = Path(path).with_name("fid.csv")
    known = False
    if RANK == 0 and table.exists():
        rows = read_rows(table)
        require(all(list(row) == [*key, *FOUND] for row in rows),
                f"{table}: not a table of these measurements; move it away")
        known = any(key.items() <= row.items() for row in rows)
    if first_decides(known):
        return print0(f"{path}: measured already, in {table}")
    labels = [classes[i % len(classes)] for i in range(settings["n"])]
    batches = checkpoint.batches(labels, args.batch_size or 64, **how)
    result = evaluate(batches, len(labels), extractor, reference, device, settings)
    if RANK == 0:
        found = {name: f"{number:.6g}" for name, number in result.items()}
        append_row(table, key | dict.fromkeys(FOUND, "") | found)

def make_reference(args, extractor, device):
    """Write the statistics of training images."""
    data = open_dataset(args.make_ref, args.image_size)
    batches = batches_of(data, args.batch_size or 64, args.make_ref)
    mu, sigma, _, _ = moments(batches, len(data), extractor, device)
    if RANK == 0:
        made = {"n": len(data), "image_size": args.image_size, "features": args.features}
        with new_file(args.out) as file:
            np.savez(file, mu=mu, sigma=sigma, weights=extractor.sha256 or "", **made)
    print0(f"wrote {args.out}: {args.features} features of {len(data):,} images of {args.image_size} px")

def is_checkpoint(path):
    """Whether it is to be sampled. Packed images are .safetensors files, too."""
    if path.endswith(".safetensors"):
        return "images" not in open_safetensors(path)[0]
    return path.endswith((".pt", ".pth"))

FLAGS = SAMPLER + """
    paths          texts                checkpoints or samples, and last the reference
    --make_ref     text                 write a reference of these data, named as for train.py --data
    --image_size   count                --make_ref: pixels to which images are cropped, as in training
    --out          text                 --make_ref: the .npz
    --features     inception|pixels     pixels needs no weights, and is no FID (default inception)
    --weights      text                 Inception weights file (default: downloaded once)
"""

def parse(argv=None):
    """The command line. argv: a list of words; None: the program's. UserError for flags
    that do not fit."""
    args = new_parser(__doc__, FLAGS).parse_intermixed_args(argv)
    args.features = args.features or "inception"
    if args.make_ref:
        require(args.image_size and (args.out or "").endswith(".npz") and not args.paths,
                "--make_ref DATA needs --image_size PIXELS and --out FILE.npz, and no other path")
    else:
        require(len(args.paths) > 1, "give SAMPLES or CHECKPOINTS and REF, or --make_ref DATA")
    without_effect = []
    if not args.make_ref:
        without_effect += ["image_size", "out"]
    if args.features == "pixels":
        without_effect += ["weights"]
    if not any(map(is_checkpoint, args.paths)):
        sampler = new_parser("", SAMPLER).parse_args([])
        without_effect += set(vars(sampler)) - {"batch_size", "device"}
    for name in without_effect:
        require(getattr(args, name) in (None, False), f"--{name} has no effect here")
    return args

def main():
    """Measure checkpoints or samples against a reference, or write one."""
    args = parse()
    device = setup(args.device)
    if not args.make_ref:                     # read first: it takes less time than fetching weights
        reference = load_reference(args.paths[-1], args.features)
    extractor = make_extractor(args.features, args.weights, device)
    if args.make_ref:
        return make_reference(args, extractor, device)
    for path in args.paths[:-1]:
        if is_checkpoint(path):
            measure(path, args, extractor, reference, device)
        else:
            data = open_samples(path)
            batches = batches_of(data, args.batch_size or 64, path)
            evaluate(batches, len(data), extractor, reference, device, getattr(data, "settings", None))

if __name__ == "__main__":
    run(main)
