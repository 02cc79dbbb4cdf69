"""Data sets as bytes on the device, and the batches of an epoch, augmented as in Section 6 where that is asked for.

The order of an epoch and its augmentation depend on (seed, epoch) alone. torchvision is imported where it is needed: that takes
longer than to load the digits.
"""

import gzip
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from crate.augmentation import crop_and_flip, draw_augmentation, rand_augment
from crate.cli import InputError
from crate.files import write_bytes

DIGITS = Path(__file__).with_name("digits.npz")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts its files
CLASS_FOLDERS = "FOLDER/train/CLASS/* and FOLDER/test/CLASS/* (or val, valid)"
ORDER, AUGMENTATION, DROPOUT = range(3)  # what a seed is for
VALUES_AT_ONCE = 2**22  # that are augmented together, 1,365 images of 3 x 32 x 32: more fit no cache, fewer cost more calls


@dataclass
class Data:
    """A training and a validation set on one device: images are bytes, (n, C, H, W), labels int64, (n,)."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    mean: torch.Tensor  # (C, 1, 1), of the training images as values from 0 to 1
    std: torch.Tensor
    image_size: int  # that the model sees
    classes: int

    def prepare(self, images):
        """Bytes (n, C, H, W) -> float32 (n, C, image_size, image_size), standardised per channel."""
        images = (images.float() / 255 - self.mean) / self.std
        if images.shape[-1] == self.image_size:
            return images
        return F.interpolate(images, self.image_size, mode="bilinear", antialias=True)


def _reason(error):
    return " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__


def _digits(data_dir):
    """500 images to train on, 50 a class, and 1,297 to validate on: with the shipped 360 the gap would be mostly noise."""
    arrays = np.load(DIGITS)
    images, labels = (np.concatenate([arrays[f"{part}_{kind}"] for part in ("train", "val")]) for kind in ("images", "labels"))
    images = (images[:, None].astype(int) * 255 // 16).astype(np.uint8)  # shipped as 0 to 16
    order = np.random.default_rng(0).permutation(len(arrays["train_labels"]))
    train = np.sort(np.concatenate([order[labels[order] == c][:50] for c in range(10)]))
    val = np.setdiff1d(np.arange(len(labels)), train)
    return images[train], labels[train], images[val], labels[val]


def _torchvision(kind, data_dir):
    """The data set of the class `kind` of torchvision.datasets, downloaded where it isn't in `data_dir`. Raises InputError."""
    from torchvision import datasets

    try:
        parts = [getattr(datasets, kind)(data_dir, train, download=True) for train in (True, False)]
    except Exception as error:  # no network, or what tarfile, gzip and pickle make of a damaged file: nearly anything
        where = f"--data-dir {data_dir}: {kind} can't be downloaded, or what is there of it is damaged"
        raise InputError(f"{where} ({_reason(error)}); --dataset digits needs nothing") from error
    return [array for part in parts for array in (_channels_first(np.asarray(part.data)), np.asarray(part.targets))]


def _channels_first(images):
    """(n, H, W) or (n, H, W, C) -> (n, C, H, W)."""
    return images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)


def _fashion_mnist(data_dir):
    """As torchvision reads it; Debian's files, if they are there, are unpacked to where it looks."""
    raw = data_dir / "FashionMNIST" / "raw"
    for packed in DEBIAN.glob("*-ubyte.gz"):
        if not (raw / packed.stem).exists():
            raw.mkdir(parents=True, exist_ok=True)
            write_bytes(raw / packed.stem, gzip.decompress(packed.read_bytes()))
    return _torchvision("FashionMNIST", data_dir)


# Functions of data_dir: training images (n, C, H, W) uint8, their labels (n,), validation images, their labels.
DATASETS = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": partial(_torchvision, "CIFAR10"),
    "cifar100": partial(_torchvision, "CIFAR100"),
}


@contextmanager
def _picture(path):
    """The picture in a file, opened by Pillow. Raises InputError where that fails, there or in the block."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow's names for 16 and 32 bits, which it would cut off at 255
                raise ValueError("more than 8 bits a channel")
            yield image
    except Exception as error:  # Pillow's, for damaged files: nearly anything
        raise InputError(f"{path}: not a picture, cut off or unreadable ({_reason(error)}); replace or remove it") from error


class SizesDiffer(InputError):
    """Pictures are not of one square size, and no size was given to resize them to."""


def read_class_folders(folder, image_size=None):
    """FOLDER/train/CLASS/* and FOLDER/test|val|valid/CLASS/* -> training images (n, C, H, W) uint8, their labels (n,),
    validation images, their labels. Classes are numbered in alphabetical order and take turns: the first n are a sample of all.

    C is 1 where all pictures are grey, else 3. Pictures of one square size keep it, others are resized to `image_size`. Hidden
    files are ignored, links followed. Raises InputError that names the file or folder that is wrong.
    """
    parts = [folder / "train", next((folder / p for p in ("test", "val", "valid") if (folder / p).is_dir()), folder / "test")]
    for part in parts:
        if not part.is_dir():
            raise InputError(f"{part}: no such folder; expected {CLASS_FOLDERS}")
    files = [{path.name: _visible(path) for path in _visible(part) if path.is_dir()} for part in parts]
    names = sorted(files[0].keys() | files[1].keys())
    if len(names) < 2:
        raise InputError(f"{parts[0]}: {len(names)} class folders; expected two or more, as in {CLASS_FOLDERS}")
    for part, name in product((0, 1), names):
        if not files[part].get(name):
            raise InputError(f"{parts[part] / name}: no picture there; {parts[0]} and {parts[1]} both need each class")
    pictures = [sorted((i, c, path) for c, name in enumerate(names) for i, path in enumerate(part[name])) for part in files]
    sizes, modes = {}, set()
    for _, _, path in pictures[0] + pictures[1]:
        with _picture(path) as image:
            sizes.setdefault(image.size, path)
            modes.add(image.mode)
    size = next(iter(sizes))
    if len(sizes) > 1 or size[0] != size[1]:
        if image_size is None:
            some = " and ".join(f"{width} x {height} ({path})" for (width, height), path in list(sizes.items())[:2])
            raise SizesDiffer(f"{folder}: its pictures are not of one square size: {some}; give --image-size to resize them to")
        size = image_size, image_size
    mode = "L" if modes <= {"1", "L", "LA"} else "RGB"
    arrays = []
    for part in pictures:
        arrays += [_decode([path for _, _, path in part], mode, size), np.array([c for _, c, _ in part])]
    return arrays


def _visible(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _decode(paths, mode, size):
    """Pictures -> (n, C, H, W) uint8."""

    def decode(some):
        images = []
        for path in some:
            with _picture(path) as image:
                images.append(np.asarray(image.convert(mode).resize(size, Image.Resampling.BILINEAR)))
        return np.stack(images)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        images = np.concatenate(list(threads.map(decode, (paths[i : i + 256] for i in range(0, len(paths), 256)))))
    return _channels_first(images)


@lru_cache(1)  # it may take half a minute, and is asked for with and without a size
def read(name, data_dir, image_size=None):
    """Training images, their labels, validation images and their labels of the data set or folder `name`, as arrays.

    Class folders in data_dir/NAME count as the data set NAME.
    """
    folder = Path(data_dir) / name if name in DATASETS else Path(name)
    if (folder / "train").is_dir() or (name not in DATASETS and folder.is_dir()):
        return read_class_folders(folder, image_size)
    if name in DATASETS:
        return DATASETS[name](Path(data_dir))
    raise InputError(f"--dataset {name}: unknown; choose from {', '.join(DATASETS)}, or name a folder, {CLASS_FOLDERS}")


@lru_cache(1)  # the runs of a grid share it
def load_data(name, data_dir="data", *, image_size=None, train_subset=None, hold_out=0.0, device="cpu"):
    """The data set `name` of DATASETS, downloaded into `data_dir` where it is missing, or that of a folder of images: as Data.

    image_size: that the model sees (None: the data set's own). train_subset: keep that many training images, chosen at random,
    always the same. hold_out: validate on this share of the training images, taken out of training, in the place of the
    validation images: what hyperparameters may be chosen by. Raises InputError where files are missing and can't be
    downloaded, are damaged, or hold too few images.
    """
    try:
        arrays = read(name, str(data_dir))
    except SizesDiffer:
        if image_size is None:
            raise
        arrays = read(name, str(data_dir), image_size)
    images, labels, val_images, val_labels = (torch.from_numpy(np.array(array, order="C")) for array in arrays)
    classes, size = int(labels.max()) + 1, image_size or images.shape[-1]
    if train_subset is not None:
        if train_subset > len(labels):
            raise InputError(f"--train-subset {train_subset}: {name} has {len(labels)} training images")
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:train_subset]
        images, labels = images[chosen], labels[chosen]
    if hold_out:
        held = round(hold_out * len(labels))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        if not 0 < held < len(labels):
            raise InputError(f"--hold-out {hold_out}: leaves {held} of {len(labels)} training images to validate on")
        val_images, images = images[order].tensor_split([held])
        val_labels, labels = labels[order].tensor_split([held])
    moments = [torch.std_mean(channel.float() / 255) for channel in images.unbind(1)]
    std, mean = (torch.stack(of_all)[:, None, None] for of_all in zip(*moments))
    std = std.clamp(min=1 / 255)  # a channel without contrast
    tensors = (images, labels.long(), val_images, val_labels.long(), mean, std)
    return Data(*(tensor.to(device) for tensor in tensors), size, classes)


def data_of(config, data_dir=None, device="cpu"):
    """The data set of a run, from its config.json; data_dir: instead of the run's own."""
    settings = {key: config[key] for key in ("image_size", "train_subset", "hold_out")}
    return load_data(config["dataset"], data_dir or config["data_dir"], **settings, device=device)


def mixed_seed(*numbers):
    """One 63-bit seed out of several whole numbers, the same on every machine; nearby numbers give unrelated seeds.

    The first number says what the seed is for: ORDER, AUGMENTATION or DROPOUT.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def epoch_order(examples, seed, epoch):
    """The order in which an epoch sees the training set, (examples,) int64."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(mixed_seed(ORDER, seed, epoch)))


def batches(data, batch_size, seed, epoch, augment=False, rank=0, world=1):
    """An epoch's batches: prepared images, labels, weight. Of each batch, this rank gets every `world`-th image.

    The mean over a batch is the mean over the ranks of weight * (mean over a rank's share). A rank for which no image is left
    gets the batch's first one, with weight 0.
    """
    examples, (_, channels, size, _) = len(data.train_labels), data.train_images.shape

    def shares(rows):  # this rank's part of every batch
        return [batch[rank::world] if rank < len(batch) else batch[:1] for batch in rows.split(batch_size)]

    order = epoch_order(examples, seed, epoch)
    indices = shares(order.to(data.train_labels.device, non_blocking=True))
    weights = [len(batch[rank::world]) * world / len(batch) for batch in order.split(batch_size)]
    rows = shares(torch.arange(examples))
    if augment:
        drawn = draw_augmentation(examples, size, mixed_seed(AUGMENTATION, seed, epoch))
    together = max(1, VALUES_AT_ONCE // (channels * max(size, data.image_size) ** 2) // batch_size)  # batches made at once
    # torchvision's augmentation waits for its stream: with one of its own, it doesn't wait for the training steps.
    side = torch.cuda.Stream() if augment and data.train_images.is_cuda else None
    if side:
        side.wait_stream(torch.cuda.current_stream())
    for start in range(0, len(indices), together):
        some = slice(start, start + together)
        with torch.cuda.stream(side):
            images = data.train_images[torch.cat(indices[some])]
            if augment:
                box, flip, operations, signs = (values[torch.cat(rows[some])] for values in drawn)
                images = rand_augment(crop_and_flip(images, box, flip, data.image_size), operations, signs)
        if side:
            torch.cuda.current_stream().wait_stream(side)
            images.record_stream(torch.cuda.current_stream())
        for part, index, weight in zip(images.split([len(i) for i in indices[some]]), indices[some], weights[some]):
            yield data.prepare(part), data.train_labels[index], weight
