"""From files to tensors and back: datasets, the order of training, tokenizers, the Codec.

A dataset gives (uint8 image (3, H, W) or latent (C, h, w), label); Codec turns a batch of them into the
network's x, and x back into uint8 images. At the end: processes and device, clear errors, atomic writing.
N images, C channels, H, W their size in pixels, h, w in latents.

    python data.py pack photos --image_size 256 --out photos.npy                      decode and crop once
    python data.py encode photos --tokenizer vavae.pt --image_size 256 --out latents  (also under torchrun)
"""
import argparse
import functools
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from model import Autoencoder
from objective import seeded_normal

# ---- Datasets: .n items, .classes (names), .item(i, flip) -> (tensor, label); .flips: may be mirrored ------

class Dataset(torch.utils.data.Dataset):
    """data[i] is item i as it is; data[(epoch, i)] may be mirrored, as drawn from (seed, epoch, i) alone."""
    n, flips, seed = 0, False, 0

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (None, key)
        flip = self.flips and epoch is not None and seed_of(self.seed, "flip", epoch, i) % 2 == 1
        return self.item(i, flip)

class Shapes(Dataset):
    """n images of 8 shapes in one bright hue on a dark ground; item i, of class i % 8, is always the same.
    Five factors: place (2), size, angle, hue. item: (uint8 (3, image_size, image_size), label)."""
    # signed distance from (x, y), of radius r, to the outline of a shape of radius about 1, negative inside
    outlines = {
        "disc": lambda x, y, r: r - 0.9,
        "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.8,
        "triangle": lambda x, y, r: np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.52,
        "ring": lambda x, y, r: abs(r - 0.75) - 0.22,
        "cross": lambda x, y, r: np.maximum(
            np.maximum(abs(x), abs(y)) - 1, np.minimum(abs(x), abs(y)) - 0.28),
        "star": lambda x, y, r: r * np.sin(0.4 + abs(           # folded to one line, from a tip to a notch
            (np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)) - 1.1 * np.sin(0.4),
        "ellipse": lambda x, y, r: ((x / 1.1) ** 2 + (y / 0.5) ** 2 - np.hypot(x / 1.1, y / 0.5)) / np.hypot(
            x / 1.1 ** 2, y / 0.5 ** 2).clip(1e-9),
        "moon": lambda x, y, r: np.maximum(r - 0.95, 0.85 - np.hypot(x - 0.55, y)),  # a disc without another
    }
    classes = list(outlines)

    def __init__(self, n, image_size, seed=0):
        self.image_size, self.n = image_size, n
        self.factors = np.random.Generator(np.random.Philox(seed)).random((n, 5))

    def item(self, i, flip=False):
        return (self.kept if self.image_size <= 64 else self.draw)(i), i % 8

    def draw(self, i):
        """The image itself, uint8 (3, H, W), from the factors of item i."""
        place_x, place_y, size, angle, hue = self.factors[i]
        grid = (np.arange(self.image_size) + 0.5) / self.image_size - 0.5
        radius, angle = 0.27 + 0.07 * size, 0.5 * (angle - 0.5)
        x, y = grid[None, :] - 0.22 * (place_x - 0.5), grid[:, None] - 0.22 * (place_y - 0.5)
        cos, sin = np.cos(angle), np.sin(angle)
        x, y = (x * cos + y * sin) / radius, (y * cos - x * sin) / radius
        distance = self.outlines[self.classes[i % 8]](x, y, np.hypot(x, y)) * radius * self.image_size
        inside = np.clip(0.5 - distance, 0, 1)                                             # anti-aliased
        sector = (6 * hue + np.array([0, 4, 2])) % 6                                       # hue to RGB
        colour = 0.15 + 0.85 * np.clip(np.abs(sector - 3) - 1, 0, 1)
        rgb = 0.06 + (colour[:, None, None] - 0.06) * inside
        return torch.from_numpy((rgb * 255 + 0.5).astype(np.uint8))
    kept = functools.lru_cache(6_400)(draw)                           # small ones are drawn once

class Fashion(Dataset):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747; MIT licence): 10 kinds of clothes in grey.
    The 60,000 for training, 28 px, padded with black. From `folder`, Debian's package dataset-fashion-mnist
    or our cache, else fetched once. item: (uint8 (3, image_size, image_size), label)."""
    classes = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    sha256 = {     # of what is inside: packagers compress anew
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"}

    def __init__(self, image_size=32, folder=None):
        need(image_size >= 28, f"--image_size {image_size}: --data fashion is 28 px, to be padded")
        self.pixels = self.read("train-images-idx3-ubyte", folder)[16:].reshape(-1, 28, 28)
        self.labels = self.read("train-labels-idx1-ubyte", folder)[8:]
        self.n, self.image_size = len(self.labels), image_size

    def item(self, i, flip=False):
        before = (self.image_size - 28) // 2
        image = np.pad(self.pixels[i], (before, self.image_size - 28 - before))
        return torch.from_numpy(image).expand(3, -1, -1), int(self.labels[i])

    def read(self, name, folder):
        """A file's bytes, from disk or network. FileError where they are not the published ones."""
        def unpacked(packed):
            content = gzip.decompress(packed)
            if hashlib.sha256(content).hexdigest() != self.sha256[name]:
                raise ValueError("its checksum is not the published one")
            return np.frombuffer(content, np.uint8)
        places = [folder] if folder else ["/usr/share/datasets/fashion-mnist", "~/.cache/kdiff"]
        paths = [Path(place, f"{name}.gz").expanduser() for place in places]
        path = next(filter(Path.is_file, paths), paths[-1])
        if not folder and not path.is_file() and LOCAL_RANK == 0:
            with checked(self.url + path.name, "Fashion-MNIST", remedy="; --data_dir names where it is"):
                packed = urllib.request.urlopen(self.url + path.name, timeout=30).read()
                unpacked(packed)
            write_atomically(path, lambda temporary: temporary.write_bytes(packed))
        barrier()                                                # until the first process has fetched it
        need(path.is_file(), f"{path.parent}: holds no {path.name}")
        with checked(path, "Fashion-MNIST"):
            return unpacked(path.read_bytes())

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

def list_images(folder):
    """Images below a folder, sorted, links followed. UserError: no folder, no image, a link in a circle."""
    need(os.path.isdir(folder), f"{folder}: no such folder")
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
        for link in filter(os.path.islink, (os.path.join(here, f) for f in folders)):
            need(os.path.realpath(link) not in map(os.path.realpath, Path(link).parents),
                 f"{link}: a link in a circle; remove it")
        found += [os.path.join(here, f) for f in files if f.lower().endswith(IMAGES) and f[0] != "."]
    need(found, f"{folder}: holds no images ({', '.join(IMAGES)}), in subfolders, one a class, or flat")
    return sorted(found)

def read_image(path):
    """The file as an upright RGB image. FileError naming it where it cannot be read, whatever the reason."""
    with checked(path, "a readable image", remedy="; mend or remove it"):
        if not os.path.isfile(path):                                  # nor a pipe, which would wait for ever
            raise ValueError("no such file")
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
            if max(image.size) > 100 * min(image.size):
                raise ValueError("over 100 times as long as wide")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                            # 16-bit grey; convert() would clip it
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            if image.has_transparency_data:                           # on white, as a browser shows it
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")

def crop(image, size):
    """ADM's preprocessing: halve by BOX while that leaves at least `size`, BICUBIC to `size`, centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

def to_tensor(image):
    """A PIL RGB image as a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

class ImageFolder(Dataset):
    """Images below a folder, cropped to image_size. A first-level subfolder is a class; images beside them,
    or a flat folder, are one class named like the folder. UserError for a missing or empty (class) folder."""

    def __init__(self, folder, image_size):
        self.folder, self.image_size, self.flips = str(folder), image_size, True
        paths = [os.path.relpath(path, folder) for path in list_images(folder)]
        own = os.path.basename(os.path.abspath(folder))
        names = [path.split(os.sep)[0] if os.sep in path else own for path in paths]
        self.classes, self.labels = np.unique(names, return_inverse=True)
        self.classes = self.classes.tolist()
        for entry in os.scandir(folder):
            need(not entry.is_dir() or entry.name.startswith((".", "__")) or entry.name in self.classes,
                 f"{entry.path}: a class folder without images; fill or remove it")
        self.paths = np.array([os.fsencode(path) for path in paths])   # one block, which forked workers share
        self.n = len(paths)

    def item(self, i, flip=False):
        path = os.path.join(self.folder, os.fsdecode(self.paths[i]))
        image = to_tensor(crop(read_image(path), self.image_size))
        return (image.flip(-1) if flip else image), int(self.labels[i])

def class_names(meta, labels, path):
    """The names of classes 0, 1, ...: meta's "classes", or numbers. UserError for labels that do not fit."""
    low, high = int(labels.min()), int(labels.max())
    names = meta.get("classes") or [str(i) for i in range(min(high + 1, 1_000_000))]
    need(type(names) is list and {*map(type, names)} == {str}, f"{path}: its class names are no list")
    need(0 <= low and high < len(names), f"{path}: labels {low} to {high}, not of its {len(names)} classes")
    return names

def record(size):
    """The dtype of an image (3, size, size) and its label in a packed array."""
    return np.dtype([("image", "u1", (3, size, size)), ("label", "<i8")])

class Packed(Dataset):
    """An array made by `data.py pack`: records of uint8 image (3, H, W) and label, memory-mapped."""

    def __init__(self, path):
        self.records = open_array(path)
        self.n, kind, self.flips = len(self.records), self.records.dtype, True
        with checked(path, "packed by `python data.py pack`"):
            self.image_size = kind["image"].shape[2]
            need(self.n and self.records.ndim == 1 and kind == record(self.image_size),
                 f"{path}: not packed by `python data.py pack`, or empty")
        meta = read_json(f"{path}.json") if os.path.exists(f"{path}.json") else {}
        self.classes = class_names(meta, self.records["label"], path)

    def item(self, i, flip=False):
        image, label = self.records[i]
        return torch.from_numpy(image[..., ::-1].copy() if flip else np.array(image)), int(label)

class Map(np.memmap):
    """A read-only array in a file; loading processes are sent its place, not its bytes, and open it anew."""

    def __reduce__(self):
        return Map, (self.filename, self.dtype, "r", self.offset, self.shape)

def open_array(path):
    """A .npy file as a Map; FileError where it is damaged."""
    with checked(path, "a readable array"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        need(isinstance(array, np.memmap) and array.ndim, f"{path}: not one array in a .npy file")
        need(array.offset + array.nbytes == os.path.getsize(path), f"{path}: not of the size its header says")
        return array.view(Map)

def open_safetensors(path):
    """{name: Map} of a .safetensors file; FileError where it is cut or damaged."""
    kinds, arrays = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}, {}
    with checked(path, "a readable safetensors file"), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, os.path.getsize(path))))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, (begin, end) = kinds[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            need(min(begin, *shape) >= 0 and end - begin == np.dtype(dtype).itemsize * math.prod(shape),
                 f"{path}: the bytes of {name} do not fit its shape {shape}")
            arrays[name] = Map(path, dtype, "r", 8 + length + begin, shape)      # fails past the end
    return arrays

def read_json(path):
    """A JSON file's content, a dict; FileError where it is damaged."""
    with checked(path, "readable JSON"):
        return json.loads(Path(path).read_text()) | {}                # no list, nor a number

def read_tensors(path, mmap=False):
    """A torch file read as data: nothing in it is executed. FileError where it is damaged or holds more.
    The one class allowed beside tensors and containers is argparse.Namespace, of JiT's published files.
    mmap: leave the tensors in the file until they are used, so that many processes share one copy."""
    reason = "damaged, or not plain tensors" if os.path.isfile(path) else "no such file"
    with checked(path, "readable", reason), torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

class Latents(Dataset):
    """Latents made by `data.py encode`, or LightningDiT's published shards; .mean and .std are (1, C, 1, 1).
    item: (float16/32 (C, h, w), not normalised, label); flip picks the latent of the mirrored image."""

    def __init__(self, folder):
        folder, names = Path(folder), ("latents", "latents_flip", "labels")
        shards = sorted(folder.glob("*.safetensors"))
        self.flips, self.parts = True, [open_safetensors(path) for path in shards]
        if shards:
            meta = read_tensors(folder / "latents_stats.pt")
        else:
            need((folder / "meta.json").exists(), f"{folder}: no meta.json, so half-written: encode again")
            meta = read_json(folder / "meta.json")
            self.parts = [{name: open_array(folder / f"{name}.npy") for name in names}]
        for path, part in zip(shards or [folder], self.parts):
            with checked(path, "latents, latents_flip and labels that fit together and the other shards"):
                (n, *shape), flipped, labels = (part[name].shape for name in names)
                C, h, w = self.shape = self.parts[0]["latents"].shape[1:]
                if not (n and labels == (n,) and flipped == (n, *shape) == (n, C, h, w)):
                    raise ValueError("empty, or of other shapes")
        self.starts = np.cumsum([0] + [len(part["labels"]) for part in self.parts])
        self.n = int(self.starts[-1])
        with checked(folder, "whole", f"its {C} channels need a mean and std each"):
            self.mean, self.std = (torch.as_tensor(meta[key]).float().view(1, C, 1, 1)
                                   for key in ("mean", "std"))
        self.classes = class_names(meta, np.concatenate([part["labels"] for part in self.parts]), folder)

    def item(self, i, flip=False):
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        part, i = self.parts[shard], i - self.starts[shard]
        latent = part["latents_flip" if flip else "latents"][i]
        return torch.from_numpy(np.array(latent)), int(part["labels"][i])

def open_dataset(source, image_size, folder=None):
    """What --data names: built-in, a folder of images or latents, a packed array. UserError for others."""
    path = Path(source)
    if source == "shapes":
        return Shapes(6_400, image_size)
    if source == "fashion":
        return Fashion(image_size, folder)
    if path.is_dir():
        latents = (path / "latents.npy").exists() or any(path.glob("*.safetensors"))
        return Latents(path) if latents else ImageFolder(path, image_size)
    need(path.exists(), f"{path}: no such file or folder")
    data = Packed(path)
    need(data.image_size == image_size, f"{path} was packed for --image_size {data.image_size}")
    return data

def order(n, batch_size, seed, start, stop, rank=0, world=1):
    """The order of training: one permutation after another, batch m is positions [m B, (m+1) B) of them all.
    Yields one process's share of each batch as a list of (epoch, index), for steps start, ..., stop - 1."""
    @functools.lru_cache(2)                                           # a batch may straddle two epochs
    def permutation(epoch):
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch)))
    share = batch_size // world
    for step in range(start, stop):
        first = step * batch_size + rank * share
        yield [(p // n, int(permutation(p // n)[p % n])) for p in range(first, first + share)]

def some_items(data, n=4096):
    """Up to n items as one tensor (n, ...), fewer of large ones; drawn from all data, always the same."""
    n = max(1, min(n, len(data), 2 ** 27 // data[0][0].numel()))
    indices = [i for _, i in next(order(len(data), n, 0, 0, 1))]
    return next(read_in_batches(data, indices, n))[1]

# ---- Tokenizers: .encode(images (N, 3, H, W) in [-1, 1]) -> (N, channels, H/factor, W/factor), .decode back

class PatchPCA(nn.Module):
    """Principal components of image patches: orthonormal, so decoding is a transpose. Fitted in seconds."""

    def __init__(self, mean, basis):
        """mean (3 p p,), basis (3 p p, channels) with orthonormal columns; p is the factor."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self.channels, self.factor = basis.shape[1], round((basis.shape[0] / 3) ** 0.5)

    @classmethod
    def fit(cls, images, factor, channels):
        """Fit to images (N, 3, H, W) in [-1, 1]; UserError for more channels than a patch has values."""
        values = 3 * factor ** 2
        need(0 < channels <= values, f"{channels} channels: a patch of {factor} px has {values} values")
        patches = F.pixel_unshuffle(images, factor).transpose(0, 1).flatten(1).double()     # (3 p p, patches)
        mean = patches.mean(1)
        basis = torch.linalg.eigh(torch.cov(patches)).eigenvectors.flip(1)[:, :channels]
        return cls(mean.float(), basis.float().contiguous())

    def encode(self, images):
        """Coordinates (N, channels, H/p, W/p) of the patches of images (N, 3, H, W)."""
        patches = F.pixel_unshuffle(images, self.factor) - self.mean[:, None, None]
        return F.conv2d(patches, self.basis.T[..., None, None])

    def decode(self, latents):
        """Images (N, 3, H, W) of the patches at these coordinates."""
        patches = F.conv2d(latents, self.basis[..., None, None]) + self.mean[:, None, None]
        return F.pixel_shuffle(patches, self.factor)

class VAVAE(Autoencoder):
    """VA-VAE f16d32, untrained or from the published file. In bfloat16 too it takes and gives float32."""
    factor, channels = 16, 32

    def __init__(self, file=None):
        super().__init__()
        if file:
            ours = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
            weights = read_tensors(file)
            with checked(file, "a VA-VAE f16d32"):
                weights = weights.get("state_dict", weights)
                self.load_state_dict({key: value for key, value in weights.items() if key.startswith(ours)})
        self.eval().requires_grad_(False)

    def moments(self, images):
        """Mean and log-variance of the posterior, each (N, 32, H/16, W/16); logvar in [-30, 20]."""
        mean, logvar = super().encode(images.to(self.quant_conv.weight.dtype))
        return mean.float(), logvar.float()

    def encode(self, images, noise=None):
        """A sample of the posterior; noise: standard normal like the latent, drawn where None."""
        mean, logvar = self.moments(images)
        return mean + torch.exp(logvar / 2) * (torch.randn_like(mean) if noise is None else noise)

    def decode(self, latents):
        """Images (N, 3, H, W), about in [-1, 1], of latents (N, 32, H/16, W/16)."""
        return super().decode(latents.to(self.quant_conv.weight.dtype)).float()

class Codec(nn.Module):
    """Between what datasets hold and the network's x: the only place where images and latents are scaled.
    tokenizer: None for pixels. mean, std (1, C, 1, 1): of the latents. decodes: whether to images."""

    def __init__(self, tokenizer=None, mean=None, std=None):
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.decodes = mean is None or tokenizer is not None

    @torch.no_grad()
    def encode(self, batch):
        """uint8 images (N, 3, H, W), or latents as stored, to x (N, C, h, w)."""
        if batch.dtype == torch.uint8:
            batch = batch.float() / 127.5 - 1
            batch = self.tokenizer.encode(batch) if self.tokenizer else batch
        return batch.float() if self.mean is None else (batch.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, x):
        """x (N, C, h, w) to uint8 images (N, 3, H, W): round(clip((x + 1) 127.5))."""
        x = x if self.mean is None else x * self.std + self.mean
        x = self.tokenizer.decode(x) if self.tokenizer else x
        return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)

# ---- Commands ----------------------------------------------------------------------------------------------

class ArrayFile:
    """A .npy file whose rows all processes write, by plain writes: a full disk is an error, not a crash."""

    def __init__(self, path, dtype, shape):
        self.path = Path(path)
        if RANK == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with checked(path, "written"):
                np.lib.format.open_memmap(path, "w+", dtype, shape)
        barrier()
        array = open_array(path)
        self.start, self.row = array.offset, array.strides[0]                     # in bytes

    def write(self, first, rows):
        """Write an array's rows at first, first + 1, ...; FileError where there is no room."""
        with checked(self.path, "written"), open(self.path, "r+b") as file:
            file.seek(self.start + first * self.row)
            file.write(rows.tobytes())

def read_in_batches(data, indices, batch_size):
    """Batches (indices, tensor (n, ...), list of labels) of the items at indices, read by threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for part in in_batches(indices, batch_size):
            images, labels = zip(*pool.map(data.__getitem__, part))
            yield part, torch.stack(images), list(labels)

def pack(source, image_size, out):
    """Write a folder's images, cropped to image_size, and labels as one array that can be memory-mapped."""
    data = ImageFolder(source, image_size)

    def write(temporary):
        array = ArrayFile(temporary, record(image_size), (len(data),))
        for indices, images, labels in read_in_batches(data, range(len(data)), 64):
            records = np.empty(len(labels), record(image_size))
            records["image"], records["label"] = images, labels
            array.write(indices[0], records)
        write_atomically(f"{out}.json", lambda path: path.write_text(json.dumps({"classes": data.classes})))
    write_atomically(out, write)
    print0(f"wrote {out}: {len(data):,} images of {image_size} px; train with --data {out}")

@torch.no_grad()
def encode(source, tokenizer, image_size, out, batch_size=32):
    """Write VA-VAE latents of every image and its mirror image, labels, statistics; processes share the work.
    meta.json is written last: a folder without it is half-written, and is not taken for a whole one."""
    data, out, factor = open_dataset(source, image_size), Path(out), tokenizer.factor
    device = next(tokenizer.parameters()).device
    need(not (out / "meta.json").exists(), f"--out {out} holds finished latents; remove it or choose another")
    need(image_size % factor == 0, f"--image_size {image_size} is no multiple of the tokenizer's {factor}")
    need(not isinstance(data, Latents), f"{source}: latents already")
    shape = (len(data), tokenizer.channels, image_size // factor, image_size // factor)
    files = {name: ArrayFile(out / f"{name}.npy", kind, shape[:dims]) for name, kind, dims in (
        ("latents", np.float16, 4), ("latents_flip", np.float16, 4), ("labels", np.int64, 1))}
    sums = torch.zeros(3, shape[1], dtype=torch.float64)          # sum, sum of squares, count, per channel
    for indices, images, labels in read_in_batches(data, part_of(len(data)), batch_size):
        for name, batch in (("latents", images), ("latents_flip", images.flip(-1))):
            noise = seeded_normal(shape[1:], [seed_of(0, name, i) for i in indices], device)
            latents = tokenizer.encode(Codec().encode(batch.to(device)), noise).cpu()
            files[name].write(indices[0], latents.half().numpy())
            flat = latents.double().transpose(0, 1).flatten(1)
            sums += torch.stack([flat.sum(1), flat.square().sum(1), torch.ones_like(flat).sum(1)])
        files["labels"].write(indices[0], np.array(labels))
    total = all_reduce(sums)
    mean, square = total[:2] / total[2]
    meta = {"n": len(data), "image_size": image_size, "classes": data.classes, "mean": mean.tolist(),
            "std": (square - mean ** 2).clamp(min=0).sqrt().tolist()}
    if RANK == 0:
        write_atomically(out / "meta.json", lambda temporary: temporary.write_text(json.dumps(meta)))
    barrier()
    print0(f"wrote {out}: {len(data):,} latents of {shape[1:]}, also mirrored; train with --data {out}")

def parse():
    """The command line of `pack` and `encode`."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("command", choices=("pack", "encode"), help="store a folder's images, cropped, or their latents")
    add("source", help="a folder of images; for encode, a packed array will do")
    add("--image_size", type=int, default=256, help="pixels (default 256)")
    add("--out", required=True, help="the .npy file of pack, the folder of encode")
    add("--tokenizer", help="for encode: VA-VAE weights file")
    add("--batch_size", type=int, default=32, help="for encode: images at a time on a process (default 32)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="for encode: the tokenizer's")
    add("--device", help="for encode (default: cuda, else cpu)")
    args = parser.parse_args()
    check_ranges(args, image_size=1, batch_size=1)
    need(args.command == "pack" or args.tokenizer, "encode needs --tokenizer: VA-VAE weights file")
    return args

def main():
    """`python data.py pack` and `python data.py encode`."""
    args = parse()
    if args.command == "pack":
        pack(args.source, args.image_size, args.out)
    else:
        device = setup(args.device)
        tokenizer = VAVAE(args.tokenizer).to(device, getattr(torch, args.dtype))
        encode(args.source, tokenizer, args.image_size, args.out, args.batch_size)

# ---- Processes and device ----------------------------------------------------------------------------------

RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))      # set by torchrun
THREADS = max(1, (os.cpu_count() or 1) // LOCAL_WORLD)    # of a process, to read or write images with

def setup(device=None):
    """Join torchrun's processes, if any; returns the torch.device: cuda where there is one, or as named."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            need(LOCAL_WORLD <= max(torch.cuda.device_count(), 1), "--nproc_per_node: more than GPUs here")
            device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
            torch.cuda.set_device(device)                 # first: else each process would occupy GPU 0, too
            torch.set_float32_matmul_precision("high")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not usable here: {in_short(error)}") from None
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device

def all_reduce(x, op=dist.ReduceOp.SUM):
    """The tensor x, which becomes the sum (or what op says) over the processes."""
    if WORLD > 1 and dist.is_initialized():
        dist.all_reduce(x, op)
    return x

def barrier():
    """Wait for all processes; on the CPU, so that it needs no device."""
    all_reduce(torch.zeros(1))

def part_of(n, rank=RANK, world=WORLD):
    """This process's part of n things that all processes share: a range of their indices."""
    return range(n * rank // world, n * (rank + 1) // world)

def print0(*args):
    """Print on the first process only."""
    if RANK == 0:
        print(*args, flush=True)

def seed_of(*key):
    """A 63-bit seed from numbers and words, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1

def in_batches(indices, batch_size, what="images"):
    """Slices of indices; of several, a line every 10 seconds and at the end: progress, rate, time left."""
    start, told, total = time.time(), time.time(), len(indices)
    for done in range(0, total, batch_size):
        yield indices[done:done + batch_size]
        done, now = min(done + batch_size, total), time.time()
        if RANK == 0 and total > batch_size and (done == total or now - told > 10):
            told, rate = now, done / max(now - start, 1e-9)
            left = timedelta(seconds=int((total - done) / rate))
            print(f"{what} {done:,}/{total:,} | {rate:,.1f}/s | {left} left", file=sys.stderr)

# ---- Errors: one line that names the flag or file, the value and the remedy, and exit status 2 -------------

class UserError(ValueError):
    """Something the user can mend, met by all processes alike: the first of each machine prints it."""

class FileError(UserError):
    """The same of a file, met perhaps by one process alone: whoever meets it prints it."""

def need(ok, message):
    """UserError(message) unless ok."""
    if not ok:
        raise UserError(message)

@contextmanager
def checked(path, what, reason=None, remedy=""):
    """Within: an error of any kind (on bad bytes libraries raise many) is a FileError, `path: not what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise FileError(f"{path}: not {what} ({reason or in_short(error)}){remedy}") from None

def in_short(error):
    """An error's text on one line, for the end of ours."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:150] or type(error).__name__

def new_parser(doc):
    """An argparse parser whose complaints are one line, like every other error of ours."""
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(description=doc, **how)
    parser.error = lambda message: need(False, f"{message} (see --help)")
    return parser

def check_ranges(args, **least):
    """UserError for a flag of args below its least value, or not a number; flags that are None pass."""
    for name, low in least.items():
        value = getattr(args, name)
        need(value is None or value >= low, f"--{name} {value}: at least {low}")

def write_atomically(path, write):
    """write(temporary path), then rename to path: a reader sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{path.suffix}")   # numpy appends a suffix that is not there
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "r+b") as file:                      # writable, or Windows refuses
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):        # torch.save's full disk is the latter
            raise
        raise FileError(f"{path} could not be written, whatever it held before is intact: "
                        + in_short(error)) from None

def explain(error):
    """One line for a UserError, or what is no bug of ours: a path, memory, a lost process. Else raises."""
    if isinstance(error, UserError):          # from a loading process it comes in a traceback: the last line
        text = str(error).rstrip()
        return text.splitlines()[-1].partition("Error: ")[2] if text.startswith("Caught ") else text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory: try half the --micro_batch or --batch_size, or --activation_checkpointing"
    if WORLD > 1 and (isinstance(error, dist.DistError) or "onnection " in str(error)):      # closed or reset
        return f"process {RANK} lost the others; the first error above says why"
    if "DataLoader worker" in str(error) or isinstance(error, (ConnectionResetError, EOFError)):
        return f"a loading process died, out of memory perhaps: try fewer --workers ({in_short(error)})"
    raise error

def run(main):
    """Call main(); a UserError ends the program with its one line and exit status 2, once under torchrun."""
    try:
        main()
        barrier()                                                 # nobody leaves while another needs it
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        leave(130)
    except (UserError, RuntimeError, OSError, EOFError) as error:
        end_workers()                                             # first: torch's handler would raise again
        if LOCAL_RANK == 0 or type(error) is not UserError:
            print("error:", explain(error), file=sys.stderr, flush=True)
        leave(2)
    finally:
        end_workers()                                             # a traceback must not wait for them either

def end_workers():
    """Kill this process's loading processes: they ignore SIGTERM (see train.py), and one may hold a lock."""
    for worker in multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):                            # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)         # torch's handler would raise
        worker.kill()

def leave(status):
    """End this process at once: it must not wait for its loading processes, nor for those it ran beside."""
    if not multiprocessing.active_children() and not dist.is_initialized():
        sys.exit(status)
    end_workers()
    sys.stdout.flush()
    os._exit(status)

if __name__ == "__main__":
    run(main)
