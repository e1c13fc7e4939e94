"""From files to tensors and back: built-in shapes, image folders, packed arrays, latents, tokenizers.

A dataset gives (uint8 image (3, H, W) or latent (C, h, w), label); Codec turns a batch of them into the
network's x, and x back into uint8 images. Here too: processes and device, clear errors, atomic writing.
N images, C channels, H, W their size in pixels, h, w in latents.

    python data.py pack photos --image_size 256 --out photos.npy                      decode and crop once
    python data.py encode photos --tokenizer vavae.pt --image_size 256 --out latents  (also under torchrun)
"""
import argparse
import ctypes
import functools
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from model import Autoencoder
from objective import seeded_normal

# ------------------------------------------------------------------------------------------------------------
# Processes, device, errors

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))      # set by torchrun
THREADS = max(1, (os.cpu_count() or 1) // WORLD)          # of a process, to read or write images with


class UserError(Exception):
    """Something the user can mend: one line naming the flag or file, the value and the remedy."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Help texts that end with the default in force."""

    def _get_help_string(self, action):
        plain = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help
        return action.help + ("" if plain else " (default: %(default)s)")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like every other error of ours."""

    def __init__(self, doc, **kw):
        super().__init__(description=doc, formatter_class=Help, **kw)

    def error(self, message):
        """Raise a UserError where argparse would print its usage."""
        raise UserError(f"{message} (see --help)")


def check_ranges(args, **least):
    """UserError for a flag of args below its least value, or not a number; flags that are None pass."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise UserError(f"--{name} {value}: at least {low}")


def run(main):
    """Call main(); a UserError ends the program with its one line and exit status 2, once under torchrun."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, RuntimeError, OSError) as error:
        text = str(error).rstrip().splitlines()[-1] if isinstance(error, UserError) else run_failure(error)
        if LOCAL_RANK == 0 or getattr(run, "each_for_itself", False):
            # from a loader's worker an error comes wrapped in a traceback: its last line is the error
            print("error:", text.rpartition("UserError: ")[2], file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_failure(error):
    """One line for an error that is no bug of ours: a path, memory, a lost process. Raises any other."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory: try half the --micro_batch or --batch_size, or --activation_checkpointing"
    if "DataLoader worker" in str(error):
        return f"a loading process died, out of memory perhaps: try fewer --workers ({in_short(error)})"
    if WORLD > 1 and isinstance(error, dist.DistError) or "onnection closed" in str(error):
        return f"process {RANK} lost the others; the first error above says why"
    raise error


def keep_memory():
    """Have the C library (glibc) keep freed memory for the next step: the kernel zeroes it page by page."""
    try:
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4   # as in malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, -1)                               # never give the heap's end back
        libc.mallopt(M_MMAP_MAX, 0)                                      # nor put large blocks outside of it
    except (AttributeError, OSError, TypeError):
        pass                                                             # another C library: only slower


def setup(device=None):
    """Join torchrun's processes, if any: (torch.device, rank, world). device: cuda where there is one."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not usable here: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        if device.index is None:
            count = torch.cuda.device_count()
            if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > count:
                raise UserError(f"--nproc_per_node is larger than the {count} GPUs of this machine")
            device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        keep_memory()
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device, RANK, WORLD


def barrier():
    """Wait for all processes; on the CPU, so that it needs no device."""
    if WORLD > 1:
        dist.all_reduce(torch.zeros(1))


def print0(*args):
    """Print on the first process only."""
    if RANK == 0:
        print(*args, flush=True)


def duration(seconds):
    """12.3 s as 0:12, 4000 s as 1:06:40."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def progress(done, total, start, what="images", every=10.0):
    """One line of progress, rate and time left: rewritten in place on a terminal, else a line every 10 s."""
    now, tty = time.time(), sys.stderr.isatty()
    if RANK or not (tty or done == total or now - getattr(progress, "last", start) > every):
        return
    progress.last = now
    rate = done / max(now - start, 1e-9)
    line = f"{what} {done:,}/{total:,} | {rate:,.1f}/s | {duration((total - done) / max(rate, 1e-9))} left"
    end = "" if tty and done != total else "\n"
    print(f"\r{line:<79}" if tty else line, end=end, file=sys.stderr, flush=True)


def write_atomically(path, write):
    """write(temporary path), then rename to path: a reader sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{path.suffix}")   # numpy appends a suffix that is not there
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):        # torch.save's full disk is the latter
            raise
        message = f"{path} could not be written, whatever it held before is intact: {error}"
        raise UserError(message.splitlines()[0])


def in_short(error):
    """An error's text on one line, for the end of ours."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def seed_of(*key):
    """A 63-bit seed from numbers and words, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


# ------------------------------------------------------------------------------------------------------------
# Datasets: len(), .classes, .item(i, flip) -> (tensor, label)

class Dataset(torch.utils.data.Dataset):
    """data[i] is item i as it is; data[(epoch, i)] may be mirrored, as drawn from (seed, epoch, i) alone."""
    flips, seed = False, 0

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (None, key)
        flip = self.flips and epoch is not None and seed_of(self.seed, "flip", epoch, i) % 2 == 1
        return self.item(i, flip)


class Shapes(Dataset):
    """n images of 8 shapes in one bright hue on a dark ground; item i, of class i % 8, is always the same.

    Five factors: place (2), size, angle, hue. item: (uint8 (3, image_size, image_size), label).
    """
    classes = ["disc", "square", "triangle", "ring", "cross", "star", "ellipse", "moon"]

    def __init__(self, n, image_size, seed=0):
        self.image_size, self.n = image_size, n
        self.factors = np.random.Generator(np.random.Philox(seed)).random((n, 5))
        self.drawn = {} if n * 3 * image_size ** 2 < 2 ** 28 else None    # small sets are drawn once and kept

    def __len__(self):
        return self.n

    def item(self, i, flip=False):
        """(uint8 image (3, H, W), label); the shapes are not mirrored, whatever flip says."""
        if not 0 <= i < self.n:
            raise IndexError(i)
        if self.drawn is None:
            return self.draw(i), i % 8
        if i not in self.drawn:
            self.drawn[i] = self.draw(i)
        return self.drawn[i], i % 8

    def draw(self, i):
        """The image itself, uint8 (3, H, W), from the factors of item i."""
        place_x, place_y, size, angle, hue = self.factors[i]
        grid = (np.arange(self.image_size) + 0.5) / self.image_size - 0.5
        radius, angle = 0.27 + 0.07 * size, 0.5 * (angle - 0.5)
        x, y = grid[None, :] - 0.22 * (place_x - 0.5), grid[:, None] - 0.22 * (place_y - 0.5)
        cos, sin = np.cos(angle), np.sin(angle)
        x, y = (x * cos + y * sin) / radius, (y * cos - x * sin) / radius
        distance = shape_distance(self.classes[i % 8], x, y) * radius * self.image_size    # in pixels
        inside = np.clip(0.5 - distance, 0, 1)                                             # anti-aliased
        sector = (6 * hue + np.array([0, 4, 2])) % 6                                       # hue to RGB
        colour = 0.15 + 0.85 * np.clip(np.abs(sector - 3) - 1, 0, 1)
        rgb = 0.06 + (colour[:, None, None] - 0.06) * inside
        return torch.from_numpy((rgb * 255 + 0.5).astype(np.uint8))


def shape_distance(name, x, y):
    """Signed distance from (x, y) to the outline of a shape of radius about 1, negative inside."""
    r = np.hypot(x, y)
    if name == "disc":
        return r - 0.9
    if name == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if name == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.52
    if name == "ring":
        return np.abs(r - 0.75) - 0.22
    if name == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - 1, y - 0.28), np.maximum(x - 0.28, y - 1))
    if name == "star":                                          # fold to one point: a line, tip to notch
        fold = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        return np.cos(0.4) * (r * np.sin(fold)) + np.sin(0.4) * (r * np.cos(fold) - 1.1)
    if name == "ellipse":
        level, slope = np.hypot(x / 1.1, y / 0.5), np.hypot(x / 1.1 ** 2, y / 0.5 ** 2)
        return level * (level - 1) / np.maximum(slope, 1e-9)
    return np.maximum(r - 0.95, 0.85 - np.hypot(x - 0.55, y))   # moon: a disc without another


IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def list_images(folder):
    """Images below a folder, sorted, links followed. UserError: no folder, no image, a link in a circle."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
        chain = {os.path.realpath(parent) for parent in (here, *Path(here).parents)}
        for f in folders:
            if os.path.islink(link := os.path.join(here, f)) and os.path.realpath(link) in chain:
                raise UserError(f"{link}: a link in a circle; remove it")
        found += [os.path.join(here, f) for f in files if f.lower().endswith(IMAGES) and f[0] != "."]
    if not found:
        raise UserError(f"{folder}: holds no images ({', '.join(IMAGES)}); "
                        "one subfolder a class, or all in one folder")
    return sorted(found)


def read_image(path):
    """The file as an upright RGB image. UserError naming it where it cannot be read, whatever the reason."""
    try:
        assert os.path.isfile(path), "no such file"                   # nor a pipe, which would wait for ever
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
            assert max(image.size) <= 100 * min(image.size), "over 100 times as long as wide"
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                            # 16-bit grey; convert() would clip it
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:                                        # Pillow raises many kinds on bad bytes
        reason = (str(error) or type(error).__name__).splitlines()[0].replace("UserError", "")
        raise UserError(f"{path}: not a readable image ({reason}); mend or remove it") from None


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
        self.classes = sorted(set(names))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith((".", "__")) and entry.name not in self.classes:
                raise UserError(f"{entry.path}: a class folder without images; fill or remove it")
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([index[name] for name in names])
        self.paths = np.array([os.fsencode(path) for path in paths])   # one block, which forked workers share

    def __len__(self):
        return len(self.paths)

    def item(self, i, flip=False):
        """(uint8 image (3, H, W), label), mirrored where flip says so."""
        path = os.path.join(self.folder, os.fsdecode(self.paths[i]))
        image = to_tensor(crop(read_image(path), self.image_size))
        return (image.flip(-1) if flip else image), int(self.labels[i])


def class_names(meta, labels, path):
    """The names of classes 0, 1, ...: meta's "classes", or numbers. UserError for labels that do not fit."""
    low, high = int(labels.min()), int(labels.max())
    names = meta.get("classes") or [str(i) for i in range(min(high + 1, 1_000_000))]
    if not isinstance(names, list):
        raise UserError(f"{path}: its class names are no list")
    if low < 0 or high >= len(names) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: its labels, {low} to {high}, do not fit its {len(names)} classes")
    return names


class Packed(Dataset):
    """An array made by `data.py pack`: records of uint8 image (3, H, W) and label, memory-mapped."""

    def __init__(self, path):
        self.records = open_array(path)
        names = self.records.dtype.names or ()
        image = self.records.dtype["image"] if "image" in names else None
        if image is None or "label" not in names or image.base != np.uint8 or image.shape[:1] != (3,) \
                or image.shape[1:2] != image.shape[2:]:
            raise UserError(f"{path}: not an array made by `python data.py pack`")
        if not len(self.records):
            raise UserError(f"{path}: holds no images")
        self.image_size, self.flips = image.shape[-1], True
        meta = read_json(f"{path}.json") if os.path.exists(f"{path}.json") else {}
        self.classes = class_names(meta, self.records["label"], path)

    def __len__(self):
        return len(self.records)

    def item(self, i, flip=False):
        """(uint8 image (3, H, W), label), mirrored where flip says so."""
        image, label = self.records[i]
        return torch.from_numpy(image[..., ::-1].copy() if flip else np.array(image)), int(label)


def open_array(path):
    """A .npy file as a read-only memory map; UserError where it is damaged."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        assert isinstance(array, np.memmap) and array.ndim, "not one array in a .npy file"
        assert array.offset + array.nbytes == os.path.getsize(path), "its size is not what its header says"
        return array
    except Exception as error:                                        # numpy raises many kinds on bad bytes
        raise UserError(f"{path}: not a readable array ({str(error).splitlines()[0]})") from None


def read_json(path):
    """A JSON file's content; UserError where it is damaged."""
    try:
        content = json.loads(Path(path).read_text())
        assert isinstance(content, dict), "not an object"
        return content
    except (OSError, ValueError, AssertionError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({in_short(error)})") from None


def read_tensors(path):
    """A torch file read as data: nothing in it is executed. UserError where it is damaged or holds more.

    The one class allowed beside tensors and containers is argparse.Namespace, of JiT's published files.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:                                        # torch raises many kinds on bad bytes
        reason = "no such file" if isinstance(error, FileNotFoundError) else "damaged, or not plain tensors"
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None


SAFETENSORS = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}


def open_safetensors(path):
    """{name: memory map} of a .safetensors file; UserError for anything that is not whole."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length <= size - 8 else None
            entries = {name: (SAFETENSORS[entry["dtype"]], tuple(map(int, entry["shape"])),
                              *map(int, entry["data_offsets"]))
                       for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: not a readable safetensors header") from None
    expected = 8 + length + max((end for *_, end in entries.values()), default=0)
    if expected != size:
        raise UserError(f"{path}: truncated or damaged: {expected:,} bytes expected, {size:,} found")
    for name, (dtype, shape, begin, end) in entries.items():
        if min((begin, *shape)) < 0 or end - begin != np.dtype(dtype).itemsize * math.prod(shape):
            raise UserError(f"{path}: the bytes of {name} do not fit its shape {shape}")
    return {name: np.memmap(path, dtype, "r", 8 + length + begin, shape) if end > begin
            else np.empty(shape, dtype) for name, (dtype, shape, begin, end) in entries.items()}


class Latents(Dataset):
    """Latents made by `data.py encode`, or LightningDiT's published shards; .mean and .std are (1, C, 1, 1).

    item: (float16 or float32 (C, h, w), not normalised, label); flip picks the latent of the mirrored image.
    """

    def __init__(self, folder):
        folder = Path(folder)
        shards = sorted(folder.glob("*.safetensors"))
        self.flips, self.meta = True, {}
        if shards:
            self.parts = [open_safetensors(path) for path in shards]
            stats = folder / "latents_stats.pt"
            statistics = read_tensors(stats) if stats.exists() else {}
        elif (folder / "meta.json").exists():
            self.meta = statistics = read_json(folder / "meta.json")
            names, shards = ("latents", "latents_flip", "labels"), [folder]
            self.parts = [{name: open_array(folder / f"{name}.npy") for name in names}]
        else:
            raise UserError(f"{folder}: latents without meta.json, so half-written: "
                            "run `python data.py encode` again")
        for path, part in zip(shards, self.parts):
            try:
                fits = part["latents"].shape == part["latents_flip"].shape and part["latents"].ndim == 4 \
                    and part["labels"].shape == part["latents"].shape[:1] \
                    and part["latents"].shape[1:] == self.parts[0]["latents"].shape[1:]
            except KeyError as missing:
                raise UserError(f"{path}: holds no {missing}") from None
            if not fits:
                raise UserError(f"{path}: latents, latents_flip and labels do not fit together "
                                "or the other shards")
        self.starts = np.cumsum([0] + [len(part["labels"]) for part in self.parts])
        if not len(self):
            raise UserError(f"{folder}: holds no latents")
        self.shape = self.parts[0]["latents"].shape[1:]
        try:
            self.mean, self.std = (torch.as_tensor(statistics[key]).float().view(1, -1, 1, 1)
                                   for key in ("mean", "std"))
            assert self.mean.shape[1] == self.std.shape[1] == self.shape[0]
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError):
            raise UserError(f"{folder}: no mean and std of its {self.shape[0]} channels "
                            "(latents_stats.pt or meta.json)") from None
        self.classes = class_names(self.meta, np.concatenate([part["labels"] for part in self.parts]), folder)

    def __len__(self):
        return int(self.starts[-1])

    def item(self, i, flip=False):
        """(latent (C, h, w) as stored, label): the mirror image's where flip says so."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        part, i = self.parts[shard], i - self.starts[shard]
        latent = part["latents_flip" if flip else "latents"][i]
        return torch.from_numpy(np.array(latent)), int(part["labels"][i])


def open_dataset(path, image_size):
    """The dataset at path: folder of images or latents, or packed array. UserError where it does not fit."""
    path = Path(path)
    if path.is_dir():
        latents = (path / "latents.npy").exists() or any(path.glob("*.safetensors"))
        return Latents(path) if latents else ImageFolder(path, image_size)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    data = Packed(path)
    if data.image_size != image_size:
        raise UserError(f"{path}: packed at {data.image_size} px: "
                        f"pass --image_size {data.image_size} or pack again")
    return data


class Order:
    """The order of training: one permutation after another, batch n is positions [n B, (n+1) B) of them all.

    Yields one process's share of each batch as a list of (epoch, index), for steps start, ..., stop - 1.
    """

    def __init__(self, n, batch_size, seed, start, stop, rank=0, world=1):
        self.n, self.seed, self.steps = n, seed, range(start, stop)
        self.batch_size, self.share = batch_size, batch_size // world
        self.first = rank * self.share

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        @functools.lru_cache(2)                                       # a batch may straddle two epochs
        def permutation(epoch):
            seed = seed_of(self.seed, "order", epoch)
            return torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))
        for step in self.steps:
            first = step * self.batch_size + self.first
            positions = range(first, first + self.share)
            yield [(p // self.n, int(permutation(p // self.n)[p % self.n])) for p in positions]


# ------------------------------------------------------------------------------------------------------------
# Tokenizers: .encode(images (N, 3, H, W) in [-1, 1]) -> (N, channels, H/factor, W/factor), .decode back

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
        if not 0 < channels <= values:
            raise UserError(f"PatchPCA with {channels} channels: a patch of {factor} px has {values} values")
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
            weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
            try:
                self.load_state_dict({key: value for key, value in weights.items() if key.startswith(ours)})
            except RuntimeError as error:
                raise UserError(f"{file}: not a VA-VAE f16d32 ({in_short(error)})") from None
        self.eval().requires_grad_(False)

    @property
    def dtype(self):
        """Of the weights."""
        return self.quant_conv.weight.dtype

    def moments(self, images):
        """Mean and log-variance of the posterior, each (N, 32, H/16, W/16); logvar in [-30, 20]."""
        mean, logvar = super().encode(images.to(self.dtype))
        return mean.float(), logvar.float()

    def encode(self, images, noise=None):
        """A sample of the posterior; noise: standard normal like the latent, drawn where None."""
        mean, logvar = self.moments(images)
        return mean + torch.exp(logvar / 2) * (torch.randn_like(mean) if noise is None else noise)

    def decode(self, latents):
        """Images (N, 3, H, W), about in [-1, 1], of latents (N, 32, H/16, W/16)."""
        return super().decode(latents.to(self.dtype)).float()


class Codec(nn.Module):
    """Between what datasets hold and the network's x: the only place where images and latents are scaled.

    tokenizer: None for pixels. mean, std (1, C, 1, 1): of the latents. `decodes`: whether images can be made.
    """

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


# ------------------------------------------------------------------------------------------------------------
# Commands

def read_in_batches(data, indices, batch_size):
    """Batches (tensor (n, ...), list of labels) of the items at indices, read by threads in order."""
    with ThreadPoolExecutor(THREADS) as pool:
        for i in range(0, len(indices), batch_size):
            images, labels = zip(*pool.map(data.__getitem__, indices[i:i + batch_size]))
            yield torch.stack(images), list(labels)


def pack(source, image_size, out):
    """Write a folder's images, cropped to image_size, and labels as one array that can be memory-mapped."""
    data, start, done = ImageFolder(source, image_size), time.time(), 0
    record = np.dtype([("image", "u1", (3, image_size, image_size)), ("label", "<i8")])

    def write(temporary):
        nonlocal done
        with open(temporary, "wb") as file:             # plain writes: a full disk is an error, not a crash
            np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(record),
                                                        "fortran_order": False, "shape": (len(data),)})
            for images, labels in read_in_batches(data, range(len(data)), 64):
                records = np.empty(len(labels), record)
                records["image"], records["label"] = images, labels
                file.write(records.tobytes())
                progress(done := done + len(labels), len(data), start)
    classes = json.dumps({"classes": data.classes})
    write_atomically(f"{out}.json", lambda temporary: temporary.write_text(classes))
    write_atomically(out, write)
    print0(f"wrote {out}: {len(data):,} images of {image_size} px in {len(data.classes)} classes; "
           f"train with --data {out}")


def reserve(path, dtype, shape):
    """Create a .npy file of its full size: a full disk is an error now, not halfway."""
    with open(path, "wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        size = file.tell() + np.dtype(dtype).itemsize * math.prod(shape)
        try:
            if hasattr(os, "posix_fallocate"):                    # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        except OSError as error:
            raise UserError(f"--out {path.parent}: no room for the latents ({error.strerror})") from None


@torch.no_grad()
def encode_seeded(tokenizer, images, seeds, device):
    """Latents (n, C, h, w), on the CPU, of uint8 images; a VA-VAE's noise is that of seeds, one an image."""
    x = images.to(device).float() / 127.5 - 1
    if not isinstance(tokenizer, VAVAE):
        return tokenizer.encode(x).cpu()
    shape = (tokenizer.channels, *(size // tokenizer.factor for size in images.shape[2:]))
    return tokenizer.encode(x, noise=seeded_normal(shape, seeds, device)).cpu()


def encode(source, tokenizer, image_size, out, batch_size=32, device="cpu", seed=0):
    """Write latents of every image and its mirror image, labels and statistics; processes share the work.

    meta.json is written last: a folder without it is half-written, and is not taken for a whole one.
    """
    data, out, start, done = open_dataset(source, image_size), Path(out), time.time(), 0
    if (out / "meta.json").exists():
        raise UserError(f"--out {out} holds finished latents already; remove it or choose another")
    factor = tokenizer.factor
    if image_size % factor:
        raise UserError(f"--image_size {image_size} is not divisible by the tokenizer's factor {factor}")
    if not isinstance(data, (ImageFolder, Packed)):
        raise UserError(f"{source}: latents already")
    shape = (len(data), tokenizer.channels, image_size // factor, image_size // factor)
    names = {"latents": (np.float16, shape), "latents_flip": (np.float16, shape),
             "labels": (np.int64, shape[:1])}
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        for name, (dtype, full) in names.items():
            reserve(out / f"{name}.npy", dtype, full)
    barrier()
    arrays = {name: np.load(out / f"{name}.npy", mmap_mode="r+") for name in names}
    tokenizer = tokenizer.to(device)
    sums = torch.zeros(3, shape[1], dtype=torch.float64)          # sum, sum of squares, count, per channel
    mine = range(len(data) * RANK // WORLD, len(data) * (RANK + 1) // WORLD)
    run.each_for_itself = True                     # a damaged image is met by one process alone
    for images, labels in read_in_batches(data, mine, batch_size):
        i = mine.start + done
        for name, batch in (("latents", images), ("latents_flip", images.flip(-1))):
            seeds = [seed_of(seed, name, n) for n in range(i, i + len(labels))]
            latents = encode_seeded(tokenizer, batch, seeds, device)
            arrays[name][i:i + len(labels)] = latents.numpy()
            sums += torch.stack([latents.double().sum((0, 2, 3)), latents.double().square().sum((0, 2, 3)),
                                 torch.full((shape[1],), latents[:, 0].numel(), dtype=torch.float64)])
        arrays["labels"][i:i + len(labels)] = labels
        done += len(labels)
        progress(done, len(mine), start)
    for array in arrays.values():
        array.flush()
    if WORLD > 1:
        dist.all_reduce(sums)
    mean = sums[0] / sums[2]
    std = (sums[1] / sums[2] - mean ** 2).clamp(min=0).sqrt()
    meta = {"n": len(data), "image_size": image_size, "classes": data.classes,
            "mean": mean.tolist(), "std": std.tolist()}
    if RANK == 0:
        write_atomically(out / "meta.json", lambda temporary: temporary.write_text(json.dumps(meta)))
    barrier()
    print0(f"wrote {out}: {len(data):,} latents of {shape[1:]} and their mirror images; "
           f"train with --data {out}")


def parse():
    """The command line of `pack` and `encode`."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True,
                                     parser_class=functools.partial(Parser, None))
    for name, text, source, out in (
        ("pack", "decode, crop and store a folder of images", "a folder of images", "the .npy file"),
        ("encode", "store a folder's latents", "a folder of images or a packed array", "the folder to write"),
    ):
        add = commands.add_parser(name, help=text).add_argument
        add("source", help=source)
        add("--image_size", type=int, default=256, help="pixels (default 256)")
        add("--out", required=True, help=out)
    add("--tokenizer", required=True, help="VA-VAE weights file")     # of `encode` alone, from here
    add("--batch_size", type=int, default=32, help="images at a time on each process (default 32)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="the tokenizer's")
    add("--device", help="default: cuda, else cpu")
    args = parser.parse_args()
    check_ranges(args, image_size=1, **({"batch_size": 1} if args.command == "encode" else {}))
    return args


def main():
    """`python data.py pack` and `python data.py encode`."""
    args = parse()
    if args.command == "pack":
        pack(args.source, args.image_size, args.out)
    else:
        device, *_ = setup(args.device)
        tokenizer = VAVAE(args.tokenizer).to(getattr(torch, args.dtype))
        encode(args.source, tokenizer, args.image_size, args.out, args.batch_size, device)


if __name__ == "__main__":
    run(main)
