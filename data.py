"""From files to tensors and back: datasets, the order of training, tokenizers, the Codec.

A dataset gives (uint8 image (3, H, W) or latent (C, h, w), label). The Codec turns a batch of them into the
network's x, and x back into uint8 images. The second half serves all scripts: processes, errors, files.
N images, C channels, H, W their size in pixels, h, w their size in latents.

    python data.py pack photos --image_size 256 --out photos.safetensors              decode and crop once
    python data.py encode photos --tokenizer vavae.pt --image_size 256 --out latents  write VA-VAE latents
encode also runs under torchrun.
"""
import argparse
import functools
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, features
from torch import nn

from model import VAVAE
from objective import seeded_normal

try:
    import fcntl
except ImportError:                   # Windows
    fcntl = None

# ---- Datasets ----------------------------------------------------------------------------------------------

class Dataset(torch.utils.data.Dataset):
    """n items with labels below len(classes). A dataset of yours sets n and classes and defines
    item(i), which always gives the same (tensor, label); flips says whether they may be mirrored.
    data[i] is item i. data[(epoch, i)] is mirrored or not, as (seed, epoch, i) decide."""
    flips = False
    seed = 0
    mean = std = None                 # of latents, for each channel: (1, C, 1, 1)

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            return self.item(key)
        epoch, i = key
        if self.flips and seed_of(self.seed, "flip", epoch, i) % 2 == 1:
            return self.mirrored(i)
        return self.item(i)

    def mirrored(self, i):
        """The mirror image of item i, and its label."""
        image, label = self.item(i)
        return image.flip(-1), label

    def fingerprint(self):
        """A text that differs if the data differ: a hash of n, the classes and up to 100 items."""
        some = range(0, self.n, math.ceil(self.n / 100))
        return digest(self.n, self.classes, *map(self.content, some))

    def content(self, i):
        """What identifies item i."""
        tensor, label = self[i]
        return label, tensor.numpy().tobytes()

# Signed distance of a point (x, y), which is r away from the centre, to the outline of a shape of
# radius about 1. It is negative inside.
def cross(x, y, r):
    """Two endless bars, cut to the square |x|, |y| < 1."""
    bars = np.minimum(abs(x), abs(y)) - 0.28
    return np.maximum(np.maximum(abs(x), abs(y)) - 1, bars)

def star(x, y, r):
    """The outline has ten equal pieces, from tip to notch: folding the angle makes them one line."""
    tenth = np.pi / 5                                    # the angle from a tip to a notch
    angle = abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
    return r * np.sin(0.4 + angle) - 1.1 * np.sin(0.4)

def ellipse(x, y, r):
    """Its equation, divided by its slope: near the outline this is the distance."""
    steep = np.hypot(x / 1.1 ** 2, y / 0.5 ** 2)
    return ((x / 1.1) ** 2 + (y / 0.5) ** 2 - np.hypot(x / 1.1, y / 0.5)) / steep.clip(1e-9)

OUTLINES = {
    "disc": lambda x, y, r: r - 0.9,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.8,
    "triangle": lambda x, y, r: np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.52,
    "ring": lambda x, y, r: abs(r - 0.75) - 0.22,
    "cross": cross,
    "star": star,
    "ellipse": ellipse,
    "moon": lambda x, y, r: np.maximum(r - 0.95, 0.85 - np.hypot(x - 0.55, y)),     # a disc minus another
}

class Shapes(Dataset):
    """n images of 8 shapes, each in one bright hue on a dark ground. Item i, of class i % 8, is
    always the same. Five factors: place (2), size, angle, hue. item: (uint8 (3, image_size,
    image_size), label)."""
    classes = list(OUTLINES)

    def __init__(self, n, image_size, seed=0):
        self.n = n
        self.image_size = image_size
        self.factors = np.random.Generator(np.random.Philox(seed)).random((n, 5))

    def item(self, i):
        if self.image_size <= 64:
            return self.drawn_once(i), i % 8
        return self.draw(i), i % 8

    def draw(self, i):
        """The image of item i, uint8 (3, H, W), from its factors."""
        place_x, place_y, size, angle, hue = self.factors[i]
        pixels = (np.arange(self.image_size) + 0.5) / self.image_size - 0.5       # from -0.5 to 0.5
        radius = 0.27 + 0.07 * size
        x = pixels[None, :] - 0.22 * (place_x - 0.5)
        y = pixels[:, None] - 0.22 * (place_y - 0.5)
        angle = 0.5 * (angle - 0.5)
        cos, sin = np.cos(angle), np.sin(angle)
        x, y = (x * cos + y * sin) / radius, (y * cos - x * sin) / radius
        outline = OUTLINES[Shapes.classes[i % 8]]
        distance = outline(x, y, np.hypot(x, y)) * radius * self.image_size       # in pixels
        inside = np.clip(0.5 - distance, 0, 1)                                    # anti-aliased
        sector = (6 * hue + np.array([0, 4, 2])) % 6                              # hue to RGB
        colour = 0.15 + 0.85 * np.clip(np.abs(sector - 3) - 1, 0, 1)
        rgb = 0.06 + (colour[:, None, None] - 0.06) * inside
        return torch.from_numpy((rgb * 255 + 0.5).astype(np.uint8))
    drawn_once = functools.lru_cache(6_400)(draw)                                 # small ones stay in memory

class Fashion(Dataset):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747; MIT licence): 10 kinds of clothes
    in grey. The 60,000 for training, 28 px, padded with black. They are read from the folder of
    Debian's package dataset-fashion-mnist, or else from our cache, to which they are downloaded once.
    item: (uint8 (3, image_size, image_size), label)."""
    classes = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
    url = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    places = ["/usr/share/datasets/fashion-mnist", "~/.cache/kdiff"]
    sha256 = {                        # of the unpacked content: Debian compresses it anew
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"}

    def __init__(self, image_size=32):
        require(image_size >= 28, f"--image_size {image_size}: --data fashion has 28 px, which are padded")
        pixels, labels = map(self.read, self.sha256)
        before = (image_size - 28) // 2
        around = before, image_size - 28 - before
        self.pixels = np.pad(pixels[16:].reshape(-1, 28, 28), ((0, 0), around, around))
        self.labels = labels[8:]
        self.n = len(self.labels)

    def item(self, i):
        return torch.from_numpy(self.pixels[i]).expand(3, -1, -1), int(self.labels[i])

    def read(self, name):
        """The bytes of a file. FileError if they are not the published ones."""
        paths = [Path(place, f"{name}.gz").expanduser() for place in self.places]
        path = next(filter(Path.is_file, paths), paths[-1])
        if not path.is_file():
            download(self.url + path.name, path)
        with reading(path, "Fashion-MNIST"):
            content = gzip.decompress(path.read_bytes())
            if hashlib.sha256(content).hexdigest() != self.sha256[name]:
                raise ValueError("its checksum is not the published one")
        return np.frombuffer(content, np.uint8)

FORMATS = {"JPEG": ".jpg .jpeg .jfif", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif",
           "TIFF": ".tif .tiff"}
if features.check("avif"):            # not in every build of Pillow
    FORMATS["AVIF"] = ".avif"
ENDINGS = " ".join(FORMATS.values()).split()
SKIPPED = ".", "__MACOSX", "__pycache__"               # beginnings of folders without pictures of yours

def list_images(folder):
    """The images below a folder, sorted. Links are followed. A line counts the files that are
    left out. UserError: no such folder, or no image in it."""
    require(os.path.isdir(folder), f"{folder}: no such folder")
    found, left_out = [], Counter()
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(SKIPPED)]
        if os.path.realpath(here) in map(os.path.realpath, Path(os.path.abspath(here)).parents):
            folders.clear()                                            # a link in a circle
            continue
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if ending in ENDINGS and name[0] != ".":
                found.append(os.path.join(here, name))
            else:
                left_out[ending or name] += 1
    counts = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common(5))
    require(found, f"{folder}: contains no images ({', '.join(ENDINGS)}); other files: {counts or 'none'}")
    if left_out:
        print0(f"{folder}: {left_out.total()} files are left out, which are not read as images: {counts}")
    return sorted(found)

def read_image(path):
    """The image file as an upright RGB image, the first frame if there are several. FileError
    if unreadable."""
    with reading(path, "a readable image", "; mend or remove it"):
        if not os.path.isfile(path):                                   # a pipe would wait for ever
            raise ValueError("no such file")
        with Image.open(path, formats=list(FORMATS)) as image:
            if image.mode == "F" or max(image.size) > 100 * min(image.size):
                raise ValueError("floating-point pixels, or 100 times as long as wide")
            if image.mode == "I" and image.format != "PNG":            # only PNG says their range: 16 bits
                raise ValueError("32-bit pixels")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                             # 16-bit grey: convert() would clip it
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            if image.has_transparency_data:                            # on white, as a browser shows it
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")

def crop(image, size):
    """ADM's preprocessing: halve with BOX down to at least `size`, BICUBIC to `size`, crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

class ImageFolder(Dataset):
    """The images below a folder, cropped to image_size if it is not None. Each subfolder is a
    class. Images next to subfolders, or in a flat folder, are a class named like the folder.
    UserError for an empty one."""
    flips = True

    def __init__(self, folder, image_size):
        self.folder = str(folder)
        self.image_size = image_size
        paths = [os.path.relpath(path, folder) for path in list_images(folder)]
        own = os.path.basename(os.path.abspath(folder))
        names = [path.split(os.sep)[0] if os.sep in path else own for path in paths]
        # numbers are sorted by their value
        self.classes = sorted(set(names), key=lambda name: name.zfill(9) if name.isdecimal() else name)
        for entry in os.scandir(folder):
            if entry.is_dir() and not entry.name.startswith(SKIPPED):
                require(entry.name in self.classes,
                        f"{entry.path}: a class folder without images; fill or remove it")
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([number[name] for name in names])
        self.paths = np.array([os.fsencode(path) for path in paths])   # one block, shared by forked workers
        self.n = len(paths)

    def path(self, i):
        return os.path.join(self.folder, os.fsdecode(self.paths[i]))

    def item(self, i):
        image = read_image(self.path(i))
        if self.image_size:
            image = crop(image, self.image_size)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return image.contiguous(), int(self.labels[i])

    def fingerprint(self):
        sizes = [os.path.getsize(self.path(i)) for i in range(self.n)]
        return digest(self.image_size, self.paths.tobytes(), sizes, super().fingerprint())

    def content(self, i):
        with reading(self.path(i), "readable"):
            return Path(self.path(i)).read_bytes()

class Memmap(np.memmap):
    """A read-only array in a file. It is pickled as path and offset, so that loading
    processes reopen it."""

    def __reduce__(self):
        return Memmap, (self.filename, self.dtype, "r", self.offset, self.shape)

# The names of dtypes in .safetensors files, in which packed images and latents are stored.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "u1"}

def open_safetensors(path):
    """({name: Memmap}, metadata {name: text}) of a .safetensors file. bfloat16 becomes uint16.
    FileError if it is cut or damaged."""
    arrays = {}
    with reading(path, "a readable safetensors file"), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, os.path.getsize(path))))
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            dtype = np.dtype(DTYPES[entry["dtype"]])
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if min(begin, *shape) < 0 or end - begin != dtype.itemsize * math.prod(shape):
                raise ValueError(f"the bytes of {name} do not fit its shape {shape}")
            arrays[name] = Memmap(path, dtype, "r", 8 + length + begin, shape)   # fails past the end
    return arrays, metadata

def as_tensor(array):
    """A copy in memory of an array of open_safetensors()."""
    tensor = torch.from_numpy(np.array(array))
    if tensor.dtype == torch.uint16:
        return tensor.view(torch.bfloat16)
    return tensor

def begin_safetensors(file, classes, **arrays):
    """Write the header of a .safetensors file with these arrays, each (dtype, shape), and class
    names. Returns {name: position}, for append() to write the arrays bit by bit."""
    header = {"__metadata__": {"classes": json.dumps(classes)}}
    end = 0
    for name, (dtype, shape) in arrays.items():
        begin, end = end, end + np.dtype(DTYPES[dtype]).itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                    # arrays begin at multiples of 8
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: file.tell() + header[name]["data_offsets"][0] for name in arrays}

def append(file, positions, name, tensor):
    """Write a tensor behind what was written of an array before."""
    file.seek(positions[name])
    file.write(tensor.numpy().tobytes())
    positions[name] = file.tell()

def class_names(metadata, labels, path):
    """The names of classes 0, 1, ...: those in the metadata, or numbers. UserError if the
    labels do not fit."""
    low, high = int(labels.min()), int(labels.max())
    with reading(path, "a file with class names"):
        names = json.loads(metadata.get("classes", "null")) or list(map(str, range(min(high + 1, 1_000_000))))
        if type(names) is not list or set(map(type, names)) != {str}:
            raise ValueError(names)
    require(0 <= low and high < len(names), f"{path}: labels {low} to {high}, but {len(names)} classes")
    return names

def read_tensors(path, mmap=False):
    """The dict in a torch or .safetensors file. Nothing in it is executed. FileError if it is
    damaged or contains more than tensors, containers and argparse.Namespace, which JiT's
    published files contain. mmap: tensors stay in the file until they are used, so that several
    processes share one copy."""
    require(os.path.isfile(path), f"{path}: no such file")
    if str(path).endswith(".safetensors"):
        return {name: as_tensor(array) for name, array in open_safetensors(path)[0].items()}
    with reading(path, "a file of plain tensors"), torch.serialization.safe_globals([argparse.Namespace]):
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(file, dict):
            raise ValueError(f"it is a {type(file).__name__}")
        return file

def open_vavae(path):
    """The VA-VAE in a published file. FileError if it is another file."""
    weights = read_tensors(path)
    with reading(path, "a VA-VAE f16d32"):
        return VAVAE(weights)

def read_statistics(path, channels):
    """mean and std, each (1, C, 1, 1), in a latents_stats.pt. FileError if they are of no use."""
    file = read_tensors(path)
    with reading(path, f"a mean and a std for each of {channels} channels"):
        mean = file["mean"].float().view(1, channels, 1, 1)
        std = file["std"].float().view(1, channels, 1, 1)
        if not ((std > 0).all() and (mean + std).isfinite().all()):
            raise ValueError("they must be finite, and std above 0")
    return mean, std

class Stored(Dataset):
    """Packed images, or latents of `data.py encode` or LightningDiT: the .safetensors files at a
    path, memory-mapped. Each contains labels, and either images (N, 3, H, W), or latents and
    latents_flip (N, C, h, w). Next to latents is latents_stats.pt with mean and std, for each channel.
    item: (uint8 image or float32 latent, not normalised, label). mirrored: the latent of the
    mirrored image."""
    flips = True

    def __init__(self, path):
        paths = sorted(Path(path).glob("*.safetensors")) or [path]
        opened = [open_safetensors(file) for file in paths]
        self.files = [arrays for arrays, _ in opened]
        metadata = opened[0][1]
        self.kind, names, dtypes = "images", ["images"], "u1"
        if "images" not in self.files[0]:
            self.kind, names, dtypes = "latents", ["latents", "latents_flip"], "f2 f4 u2"     # u2: bfloat16
        for file, (arrays, about) in zip(paths, opened):
            with reading(file, "a file of `python data.py`, or a shard that fits the others"):
                labels = arrays["labels"]
                shape = labels.shape + self.files[0][self.kind].shape[1:]
                if labels.dtype.kind != "i" or len(shape) != 4:
                    raise ValueError(f"labels {labels.dtype}, {self.kind} of shape {shape}")
                for name in names:
                    array = arrays[name]
                    if array.shape != shape or array.dtype.str[1:] not in dtypes:
                        raise ValueError(f"{name} {array.dtype} {array.shape}, labels {labels.shape}")
                if about.get("classes") != metadata.get("classes"):
                    raise ValueError("other classes")
        self.shape = shape[1:]
        labels = [arrays["labels"] for arrays in self.files]
        self.starts = np.cumsum([0, *map(len, labels)])
        self.n = int(self.starts[-1])
        require(self.n, f"{path}: contains no items")
        self.classes = class_names(metadata, np.concatenate(labels), path)
        if self.kind == "latents":
            file = Path(path, "latents_stats.pt")                      # written last: the folder is complete
            self.mean, self.std = read_statistics(file, shape[1])

    def item(self, i, name=None):
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        arrays = self.files[number]
        i = i - self.starts[number]
        tensor = as_tensor(arrays[name or self.kind][i])
        if self.kind == "latents":
            tensor = tensor.float()
        return tensor, int(arrays["labels"][i])

    def mirrored(self, i):
        if self.kind == "images":
            return super().mirrored(i)
        return self.item(i, "latents_flip")

# What --data may name beside paths. The value of a row is called as value(image_size).
DATASETS = {"shapes": functools.partial(Shapes, 6_400), "fashion": Fashion}

def open_dataset(source, image_size):
    """What --data names: a row of DATASETS, a folder of images or latents, a packed file;
    else UserError."""
    if source in DATASETS:
        return DATASETS[source](image_size)
    path = Path(source)
    require(path.exists(), f"{path}: no such file or folder")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return ImageFolder(path, image_size)
    data = Stored(path)
    require(data.kind == "latents" or data.shape[1] == image_size,
            f"{path} was packed for --image_size {data.shape[1]}")
    return data

def batch_indices(n, batch_size, seed, start, stop, rank=0, world=1):
    """The order of training: one permutation of the n items per epoch, concatenated, and cut into
    batches. Yields a process's share of each batch as a list of (epoch, index), for steps start, ...,
    stop - 1."""
    @functools.lru_cache(2)                                            # a batch may straddle two epochs
    def permutation(epoch):
        generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
        return torch.randperm(n, generator=generator)
    share = batch_size // world
    for step in range(start, stop):
        first = step * batch_size + rank * share
        positions = (divmod(p, n) for p in range(first, first + share))
        yield [(epoch, int(permutation(epoch)[i])) for epoch, i in positions]

def keep_outside(out, source):
    """UserError if out is in the folder of the data, where the next reading would take it for data."""
    folder, path = Path(source).resolve(), Path(out).resolve()
    require(not folder.is_dir() or folder not in (path, *path.parents),
            f"--out {out} is inside {source}, whose pictures are read: name a place elsewhere")

def read_items(data, indices):
    """Items of a dataset, read by threads: a tensor (n, ...) and a tensor of labels (n,)."""
    with ThreadPoolExecutor(CORES) as pool:
        tensors, labels = zip(*pool.map(data.__getitem__, indices))
    return torch.stack(tensors), torch.stack([torch.as_tensor(label) for label in labels])

def some_items(data, n=4096):
    """Up to n items as one tensor (n, ...), fewer if they are large. Drawn from all data,
    always the same."""
    n = max(1, min(n, len(data), 2 ** 26 // data[0][0].numel()))
    batch = next(batch_indices(len(data), n, 0, 0, 1))
    return read_items(data, [i for _, i in batch])[0]

# ---- Tokenizers and the Codec ------------------------------------------------------------------------------

class PatchPCA(nn.Module):
    """Principal components of image patches. They are orthonormal, so that decoding is a transpose.
    mean (3 p p,); basis (3 p p, channels) with orthonormal columns; factor p is the side of a patch."""

    def __init__(self, mean, basis):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        values, self.channels = basis.shape
        self.factor = round((values / 3) ** 0.5)

    @classmethod
    def fit(cls, images, factor, channels):
        """Fit to images (N, 3, H, W) in [-1, 1]. channels: how many components, the strongest first."""
        patches = F.pixel_unshuffle(images, factor).transpose(0, 1).flatten(1).double()     # (3 p p, patches)
        mean = patches.mean(1)
        basis = torch.linalg.eigh(torch.cov(patches)).eigenvectors.flip(1)
        return cls(mean.float(), basis[:, :channels].float().contiguous())

    def encode(self, images):
        """Coordinates (N, channels, H/p, W/p) of the patches of images (N, 3, H, W)."""
        patches = F.pixel_unshuffle(images, self.factor) - self.mean[:, None, None]
        return F.conv2d(patches, self.basis.T[..., None, None])

    def decode(self, latents):
        """Images (N, 3, H, W) of the patches with these coordinates."""
        patches = F.conv2d(latents, self.basis[..., None, None]) + self.mean[:, None, None]
        return F.pixel_shuffle(patches, self.factor)

class Codec(nn.Module):
    """Between what datasets contain and the network's x: the only place where images and latents
    are scaled. tokenizer: None for pixels. mean, std (1, C, 1, 1): of the latents. can_decode:
    whether x can become images."""

    def __init__(self, tokenizer=None, mean=None, std=None):
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.can_decode = mean is None or tokenizer is not None

    @torch.no_grad()
    def encode(self, batch):
        """uint8 images (N, 3, H, W), or latents as stored, to x (N, C, h, w)."""
        if batch.dtype == torch.uint8:
            batch = batch.float() / 127.5 - 1
            if self.tokenizer:
                batch = self.tokenizer.encode(batch)
        if self.mean is None:
            return batch.float()
        return (batch.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, x):
        """x (N, C, h, w) to uint8 images (N, 3, H, W): round(clip((x + 1) 127.5)). Grey becomes
        RGB. UserError if x is not finite."""
        if self.mean is not None:
            x = x * self.std + self.mean
        if self.tokenizer:
            x = self.tokenizer.decode(x)
        require(x.isfinite().all(), "the samples are not finite numbers: are the weights?")
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        return ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)

# ---- Commands: pack and encode -----------------------------------------------------------------------------

def pack(source, image_size, out):
    """Write a folder's images, cropped to image_size, and labels as one file that can be
    memory-mapped."""
    data = ImageFolder(source, image_size)
    n = len(data)
    keep_outside(out, source)
    with new_file(out) as file:
        positions = begin_safetensors(
            file, data.classes, images=("U8", (n, 3, image_size, image_size)), labels=("I64", (n,)))
        for indices in in_batches(range(n), 64):
            images, labels = read_items(data, indices)
            append(file, positions, "images", images)
            append(file, positions, "labels", labels)
    print(f"wrote {out}: {n:,} images of {image_size} px; train with --data {out}")

@torch.no_grad()
def encode(source, tokenizer, image_size, out, batch_size=32):
    """Write VA-VAE latents of every image and its mirror image, and labels, in LightningDiT's
    format. Each process writes one file. The statistics come last: without them a folder is
    half-written."""
    data = open_dataset(source, image_size)
    out, factor = Path(out), tokenizer.factor
    require(image_size % factor == 0, f"--image_size {image_size} is no multiple of the tokenizer's {factor}")
    require(data.mean is None, f"{source}: these are latents already")
    keep_outside(out, source)
    require(len(data) >= WORLD, f"{source}: {len(data)} images for {WORLD} processes: use fewer")
    require(not any(out.glob("*.safetensors")), f"--out {out} contains latents: name another folder")
    barrier()                                                      # all have looked before the first writes
    device = next(tokenizer.parameters()).device
    shape = (tokenizer.channels, image_size // factor, image_size // factor)
    sums = torch.zeros(2, shape[0], dtype=torch.float64)           # of the values and of their squares
    mine = range(len(data) * RANK // WORLD, len(data) * (RANK + 1) // WORLD)
    latents = "F16", (len(mine), *shape)
    with new_file(out / f"latents_rank{RANK:02}.safetensors") as file:
        positions = begin_safetensors(
            file, data.classes, latents=latents, latents_flip=latents, labels=("I64", (len(mine),)))
        for indices in in_batches(mine, batch_size):
            images, labels = read_items(data, indices)
            append(file, positions, "labels", labels)
            for name, batch in (("latents", images), ("latents_flip", images.flip(-1))):
                noise = seeded_normal(shape, [seed_of(0, name, i) for i in indices], device)
                x = tokenizer.encode(Codec().encode(batch).to(device), noise).cpu()
                append(file, positions, name, x.half())
                x = x.double()
                sums += torch.stack([x, x.square()]).sum((1, 3, 4))
    mean, square = all_reduce(sums) / (2 * len(data) * math.prod(shape[1:]))
    std = (square - mean ** 2).clamp(min=0).sqrt()
    if RANK == 0:
        with new_file(out / "latents_stats.pt") as file:
            torch.save({"mean": mean, "std": std}, file)
    print0(f"wrote {out}: {len(data):,} latents of {shape}, also mirrored; train with --data {out}")

FLAGS = """
    command        pack|encode          store a folder's images, cropped, or their latents
    source         text                 a folder of images; encode also takes a packed file
    --image_size   count                pixels (default 256)
    --out          text                 the file of pack, the folder of encode
    --tokenizer    text                 encode: VA-VAE weights file
    --batch_size   count                encode: images at a time on each process (default 32)
    --dtype        float32|bfloat16     encode: of the tokenizer (default float32)
"""

def parse(argv=None):
    """The command line of `pack` and `encode`. argv: a list of words; None: the program's."""
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    require(args.out, "--out says where to write")
    if args.command == "pack":
        for name in ("tokenizer", "batch_size", "dtype", "device"):
            require(getattr(args, name) is None, f"--{name} has no effect on pack")
        require(not Path(args.out).is_dir(), f"--out {args.out}: a folder; name a file")
    else:
        require(args.tokenizer, "encode needs --tokenizer: a VA-VAE weights file")
    args.image_size = args.image_size or 256
    return args

def main():
    """`python data.py pack` and `python data.py encode`."""
    args = parse()
    if args.command == "pack":
        require(WORLD == 1, "pack runs on one process")
        return pack(args.source, args.image_size, args.out)
    device = setup(args.device)
    tokenizer = open_vavae(args.tokenizer).to(device, getattr(torch, args.dtype or "float32"))
    encode(args.source, tokenizer, args.image_size, args.out, args.batch_size or 32)

# ---- Processes: torchrun's, and the device of each ---------------------------------------------------------

RANK = int(os.environ.get("RANK", 0))                         # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))             # on this machine
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
CORES = max(1, (os.cpu_count() or 1) // LOCAL_WORLD)          # of each process

def setup(device=None):
    """Join the other processes, if any. Returns the torch.device: as named, else cuda if there is one."""
    name = device or "cpu"
    if not device and torch.cuda.is_available():
        name = "cuda"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("torch sees no GPU")
            if device.index is None:
                device = torch.device("cuda", LOCAL_RANK)
            torch.cuda.set_device(device)             # first: else each process would also occupy GPU 0
            torch.set_float32_matmul_precision("high")
        torch.zeros(1, device=device).item()
    except Exception as error:                        # torch raises many kinds
        raise UserError(f"--device {name} is not usable here: {in_short(error)}") from error
    if WORLD > 1 and not dist.is_initialized():
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))    # longer than pictures and saving
    return device

def all_reduce(x, op=dist.ReduceOp.SUM):
    """The tensor x, which becomes the sum over the processes, or what op says."""
    if WORLD > 1 and dist.is_initialized():
        dist.all_reduce(x, op)
    return x

def barrier():
    """Wait for all processes. On the CPU, so that it needs no device."""
    all_reduce(torch.zeros(1))

def first_decides(value):
    """Every process gets the value of the first, as an integer."""
    return int(all_reduce(torch.tensor(int(value) * (RANK == 0))))

def gather(x):
    """The CPU tensors x (n, ...) of all processes, one after the other: on the first
    process, else None."""
    if WORLD == 1:
        return x
    if RANK > 0:
        return dist.gather(x)
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.gather(x, parts)
    return torch.cat(parts)

def in_batches(indices, batch_size, what="images"):
    """Slices of indices. Prints a line every 10 seconds and at the end: progress and time left."""
    start = printed = time.time()
    n = len(indices)
    for first in range(0, n, batch_size):
        yield indices[first:first + batch_size]
        now = time.time()
        done = min(first + batch_size, n)
        if RANK == 0 and (now - printed > 10 or done == n > batch_size):
            printed = now
            left = (now - start) * (n - done) / done
            print(f"{what} {done:,}/{n:,} | {left:,.0f} s left", file=sys.stderr)

def my_batches(n, batch_size, what="images"):
    """This process's share of the indices 0, ..., n - 1: ranges of one length, equally many on
    each process. So the last ranges may go beyond n - 1. Whoever collects the results drops these."""
    size = min(batch_size, math.ceil(n / WORLD))
    for part in in_batches(range(n), size * WORLD, what):
        first = part.start + RANK * size
        yield range(first, first + size)

def print0(line):
    """Print a line on the first process only."""
    if RANK == 0:
        print(f"{line}\n", end="", flush=True)                # in one piece: a signal may come in between

def digest(*parts):
    """A hash of values, as a short text, equal on every machine."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

def seed_of(*key):
    """A 63-bit seed from numbers and words, equal on every machine."""
    return int.from_bytes(bytes.fromhex(digest(*key)), "little") >> 1

# ---- Errors: one line that names the flag or file, the value and the remedy, and exit status 2 -------------

class UserError(ValueError):
    """Something that the user can mend. All processes raise it; the first of each machine prints it."""

class FileError(UserError):
    """The same for a file. Perhaps one process alone raises it; that one prints it."""

def require(ok, message):
    """UserError(message) unless ok."""
    if not ok:
        raise UserError(message)

@contextmanager
def reading(path, what, remedy=""):
    """Around the reading of a file: any error becomes FileError("{path}: not {what}
    ({error}){remedy}"). Libraries raise many kinds for bad bytes. Our own code stays outside, so that
    its errors are shown."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise FileError(f"{path}: not {what} ({in_short(error)}){remedy}") from error

def in_short(error):
    """The text of an error on one line, for the end of ours."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:150] or type(error).__name__

def at_least(low, kind=float):
    """The type of a flag that takes a finite number from low on."""
    def convert(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: a finite number of at least {low} is needed")
        return value
    return convert

def nonempty(text):
    """The type of a flag that takes a name or a path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text.strip()

# The kinds of flags in the tables FLAGS of the scripts. A kind "a|b" takes one of these words.
KINDS = {
    "text": {"type": nonempty},
    "texts": {"type": nonempty, "nargs": "*"},
    "count": {"type": at_least(1, int)},
    "whole": {"type": at_least(0, int)},
    "integer": {"type": int},
    "amount": {"type": at_least(0)},
    "amounts": {"type": at_least(0), "nargs": "+"},
    "number": {"type": at_least(-math.inf)},
    "switch": {"action": "store_true"},
    "yes/no": {"action": argparse.BooleanOptionalAction},
}

def new_parser(doc, flags):
    """An argparse parser for a table of flags: in each line a name, a kind and a help. A flag
    that is not given is None, or False for a switch. Errors are one line, like ours."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message} (see --help)")
    parser.add_argument("--device", help="cuda, cpu, mps, ... (default: cuda if there is one, else cpu)")
    for line in filter(str.strip, flags.splitlines()):
        names, kind, text = line.split(None, 2)
        how = KINDS.get(kind) or {"choices": kind.split("|")}
        parser.add_argument(*names.split(","), help=text.replace("%", "%%"), **how)
    return parser

SIGNALS = [getattr(signal, name) for name in "SIGTERM SIGINT SIGHUP".split() if hasattr(signal, name)]

def on_signals(handler):
    """Set the handler of the signals that ask this process to end. nohup's choice to ignore SIGHUP
    stays."""
    for number in SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

def stop(number, frame):
    """A signal as an exception, so that half-written files are removed."""
    raise SystemExit(128 + number)

def run(main):
    """Call main(). A UserError ends the program with its one line and exit status 2. Under torchrun
    the first process of each machine prints it. With KDIFF_DEBUG=1 in the environment the traceback
    and its causes are printed, too."""
    status = 0
    try:
        on_signals(stop)
        sys.stdout.reconfigure(errors="backslashreplace")     # paths need not be text
        main()
        barrier()                                             # nobody leaves while others still need it
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as error:
        status = error.code
    except (UserError, RuntimeError, OSError, EOFError) as error:
        status = 2
        workers = end_workers()                               # first: torch's handler would raise again
        line = explain(error)
        if os.environ.get("KDIFF_DEBUG"):
            traceback.print_exc()
        if LOCAL_RANK == 0 or type(error) is not UserError:
            print("error:", line.replace("\n", " "), file=sys.stderr, flush=True)
        exit_now(status, workers)
    finally:
        workers = end_workers()                               # a traceback must not wait for them either
    exit_now(status, workers)

def explain(error):
    """One line for a UserError, or for what is no bug of ours: a path, memory, a lost
    process. Else raises."""
    text = str(error).rstrip()
    if isinstance(error, UserError):
        if text.startswith("Caught "):                        # in a loading process: its own line comes last
            text = text.splitlines()[-1].partition("Error: ")[2]
        return text
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")
        return "nobody reads the output any more"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory: try half the --micro_batch or --batch_size, or --activation_checkpointing"
    if WORLD > 1 and (isinstance(error, dist.DistError) or re.search("[Cc]onnection|[Tt]imed out", text)):
        return f"process {RANK} lost the others; the first error above says why ({in_short(error)})"
    cut_off = isinstance(error, (ConnectionError, EOFError)) or "end of file during message" in text
    if "DataLoader worker" in text or cut_off:
        return f"a loading process died, perhaps for memory: try fewer --workers ({in_short(error)})"
    raise error

def end_workers():
    """Kill this process's loading processes: they ignore signals, and one may hold a lock.
    Returns them."""
    workers = multiprocessing.active_children()
    if hasattr(signal, "SIGCHLD"):                            # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)         # torch's handler would raise
    for worker in workers:
        worker.kill()
    return workers

def exit_now(status, workers=()):
    """End this process without waiting for its loading processes or for other processes."""
    if not (workers or end_workers() or dist.is_initialized()):
        sys.exit(status)
    sys.stdout.flush()
    os._exit(status)

# ---- Files -------------------------------------------------------------------------------------------------

@contextmanager
def writing(path):
    """Around the writing of a file: no room, or no permission, is a FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} could not be written, what it was before is intact: "
                        f"{in_short(error)}") from error

def hold(file, path):
    """Lock an open file or folder until it is closed. UserError if another process holds it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:                                  # any other: a file system without locks
        require(not isinstance(error, BlockingIOError), f"{path}: another process is writing there")

@contextmanager
def own_folder(path):
    """Make a folder in which only this run writes. UserError if another one does, or a machine
    does not see it."""
    lock = Path(path, ".lock")
    if RANK == 0:
        with writing(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "ab")
        hold(file, path)
    barrier()
    seen = all_reduce(torch.tensor(int(lock.exists())), dist.ReduceOp.MIN)
    require(seen, f"--out {path}: this folder is not shared by all machines")
    yield
    barrier()
    if RANK == 0:
        lock.unlink()

@contextmanager
def new_file(path):
    """An open file that becomes path when the block ends, and is removed if the block fails: a
    reader sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")           # hidden: no pattern of ours finds it
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()                                     # or take over what a killed process has left
        with open(temporary, "r+b") as file:
            hold(file, path)
            try:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

def download(url, path, remedy="", **how):
    """Fetch url to path, whole or not at all. FileError if it cannot be fetched. remedy: what else helps."""
    with reading(url, "to be fetched", f"; fetch it elsewhere and put it at {path}{remedy}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, path, **how)

if __name__ == "__main__":
    run(main)
