"""Data sets as bytes on the device, and the batches of an epoch, augmented as in Section 6 where that is asked for.

torchvision is imported where it is needed: that takes longer than to load the digits.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from crate.augmentation import crop_and_flip, draw_augmentation, rand_augment
from crate.cli import InputError, one_line, path

DIGITS = Path(__file__).with_name("digits.npz")
CLASS_FOLDERS = "FOLDER/train/CLASS/* and FOLDER/test/CLASS/* (or val, valid)"
ORDER, AUGMENTATION, DROPOUT = range(3)  # what a seed is for
VALUES_AT_ONCE = 2**22  # that are augmented together, 1,365 images of 3 x 32 x 32: more fit no cache, fewer cost more calls

# torchvision's augmentation waits for its stream: for this one, of the whole process, not for the training steps.
side_stream = lru_cache(1)(torch.cuda.Stream)


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
    checksum: str  # of all pictures and labels before a subset is taken, and their numbers

    def prepare(self, images):
        """Bytes (n, C, H, W) -> float32 (n, C, image_size, image_size), standardised per channel."""
        images = (images.float() / 255 - self.mean) / self.std
        if images.shape[-1] == self.image_size:
            return images
        return F.interpolate(images, self.image_size, mode="bilinear", antialias=True)


def _digits(data_dir):
    """500 images to train on, 50 a class, and 1,297 to validate on, so that the gap is not mostly noise. Values: 0 to 16."""
    images, labels, val_images, val_labels = np.load(DIGITS).values()
    images, val_images = ((part[:, None].astype(int) * 255 // 16).astype(np.uint8) for part in (images, val_images))
    return images, labels, val_images, val_labels


def _torchvision(kind, data_dir):
    """The data set of the class `kind` of torchvision.datasets, downloaded where it isn't in `data_dir`."""
    from torchvision import datasets

    try:
        parts = [getattr(datasets, kind)(data_dir, train, download=True) for train in (True, False)]
    except Exception as error:  # no network, or what tarfile, gzip and pickle make of a damaged file: nearly anything
        where = f"--data-dir {data_dir}: {kind} can't be downloaded, or what is there of it is damaged"
        raise InputError(f"{where} ({one_line(error)}); --dataset digits needs nothing") from error
    return [array for part in parts for array in (part.data.transpose(0, 3, 1, 2), np.array(part.targets))]


# Functions of data_dir: training images (n, C, H, W) uint8, their labels (n,), validation images, their labels.
DATASETS = {
    "digits": _digits,
    "cifar10": partial(_torchvision, "CIFAR10"),
    "cifar100": partial(_torchvision, "CIFAR100"),
}


def dataset(text):
    """An argparse `type`: a name of DATASETS, or a folder, however it is written, as one absolute path."""
    return os.path.abspath(path(text)) if text not in DATASETS and path(text).is_dir() else text


def read_class_folders(folder, image_size=None):
    """The same out of FOLDER/train/CLASS/* and FOLDER/test|val|valid/CLASS/*, as torchvision's ImageFolder finds them.

    Pictures are resized to `image_size`; without it all must be squares of one size. C is 1 where all are grey.
    """
    from torchvision.datasets import ImageFolder

    test = next((name for name in ("test", "val", "valid") if (folder / name).is_dir()), "test")
    every = {"is_valid_file": lambda file: not Path(file).name.startswith(".")}  # what isn't a picture is said, not left out
    try:
        train, val = (ImageFolder(folder / name, **every) for name in ("train", test))
    except OSError as error:
        raise InputError(f"{one_line(error)}; expected {CLASS_FOLDERS}")
    if train.classes != val.classes or len(val.classes) < 2:
        raise InputError(f"{folder}: train and {test} don't hold the same two classes or more; expected {CLASS_FOLDERS}")
    size = image_size or picture(train.samples[0][0]).width
    images, labels, sizes = decode(tuple(train.samples), size)
    val_images, val_labels, val_sizes = decode(tuple(val.samples), size)
    if not image_size and sizes | val_sizes != {(size, size)}:
        raise InputError(f"{folder}: its pictures are not of one square size; give --image-size to resize them to")
    if all((part == part[:, :1]).all() for part in (images, val_images)):
        images, val_images = images[:, :1], val_images[:, :1]
    return images, labels, val_images, val_labels


def picture(file):
    """A picture in colours. Raises InputError naming the file where it is none, cut off, or of more than 8 bits a channel."""
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # Pillow's names for 16 and 32 bits, which it would cut off at 255
                raise ValueError("more than 8 bits a channel")
            return image.convert("RGB")
    except Exception as error:  # Pillow's, for damaged files: nearly anything
        raise InputError(f"{file}: can't be read ({one_line(error)}); replace or remove it") from error


@lru_cache(2)  # training and validation pictures; it may take half a minute, and is asked for with and without a size
def decode(samples, size):
    """Pictures (path, class) -> (n, 3, size, size) uint8, classes (n,), and the sizes of the pictures, a set.

    Classes take turns: the first n are a sample of all.
    """
    sizes = set()

    def pixels(i):
        image = picture(samples[i][0])
        sizes.add(image.size)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))

    labels = np.array([label for _, label in samples])
    order = np.lexsort((labels, np.arange(len(labels)) - np.searchsorted(labels, labels)))  # by place in the class, then class
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        images = np.stack(list(threads.map(pixels, order))).transpose(0, 3, 1, 2)
    return images, labels[order], sizes


@lru_cache(1)  # the runs of a grid share it
def load_data(name, data_dir="data", *, image_size=None, train_subset=None, hold_out=0.0, device="cpu"):
    """The data set `name` of DATASETS, downloaded into `data_dir` where it is missing, or that of a folder of images: as Data.
    Class folders in data_dir/NAME count as the data set NAME.

    image_size: that the model sees (None: the data set's own). train_subset: keep that many training images, always the same.
    hold_out: validate on this share of the training images, taken out of training, in the place of the validation images.
    Raises InputError where files are missing and can't be downloaded, are damaged, or hold too few images.
    """
    folder = Path(data_dir) / name if name in DATASETS else Path(name)
    if (folder / "train").is_dir():
        arrays = read_class_folders(folder, image_size)
    elif name in DATASETS:
        arrays = DATASETS[name](data_dir)
    else:
        raise InputError(f"--dataset {name}: unknown; choose from {', '.join(DATASETS)}, or name a folder, {CLASS_FOLDERS}")
    arrays = [np.array(array, order="C") for array in arrays]
    digest = hashlib.sha256(b"".join(arrays)).hexdigest()[:12]
    images, labels, val_images, val_labels = map(torch.from_numpy, arrays)
    checksum = f"{len(labels)} + {len(val_labels)} images, {digest}"
    classes, size = int(labels.max()) + 1, image_size or images.shape[-1]
    if train_subset is not None:
        if train_subset > len(labels):
            raise InputError(f"--train-subset {train_subset}: {name} has {len(labels)} training images")
        chosen = permutation(len(labels), seed=0)[:train_subset]
        images, labels = images[chosen], labels[chosen]
    if hold_out:
        held = round(hold_out * len(labels))
        order = permutation(len(labels), seed=1)
        if not 0 < held < len(labels):
            raise InputError(f"--hold-out {hold_out}: leaves {held} of {len(labels)} training images to validate on")
        val_images, images = images[order].tensor_split([held])
        val_labels, labels = labels[order].tensor_split([held])
    moments = [torch.std_mean(channel.float() / 255) for channel in images.unbind(1)]
    std, mean = (torch.stack(of_all)[:, None, None] for of_all in zip(*moments))
    std = std.clamp(min=1 / 255)  # a channel without contrast
    tensors = (images, labels.long(), val_images, val_labels.long(), mean, std)
    return Data(*(tensor.to(device) for tensor in tensors), size, classes, checksum)


def data_of(config, data_dir=None, device="cpu"):
    """The data set of a run, from its config.json; data_dir: in the place of the run's. Refuses other images than the run's."""
    settings = {key: config[key] for key in ("image_size", "train_subset", "hold_out")}
    data = load_data(config["dataset"], data_dir or config["data_dir"], **settings, device=device)
    check_images(config.get("data"), data.checksum, f"--dataset {config['dataset']}")
    return data


def check_images(of_run, found, where):
    """Raise InputError where two checksums of data sets, if known, differ; `where` says what is at fault."""
    if None not in (of_run, found) and of_run != found:
        cure = "name the folder that holds those with --dataset, or train anew with train.py --again"
        raise InputError(f"{where}: its images ({found}) are not the run's ({of_run}); {cure}")


def mixed_seed(*numbers):
    """One 63-bit seed out of several whole numbers, the same on every machine; nearby numbers give unrelated seeds.

    The first number says what the seed is for: ORDER, AUGMENTATION or DROPOUT.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def permutation(n, seed):
    """A random order of n things, (n,) int64."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batches(data, batch_size, seed, epoch, augment=False, rank=0, world=1):
    """An epoch's batches, which depend on (seed, epoch) alone: prepared images, labels, weight. Of each batch, this rank gets
    every `world`-th image.

    The mean over a batch is the mean over the ranks of weight * (mean over a rank's share). A rank for which no image is left
    gets the batch's first one, with weight 0.
    """
    examples, (_, channels, size, _) = len(data.train_labels), data.train_images.shape
    # Waits until it is there, for `side` too.
    order = permutation(examples, mixed_seed(ORDER, seed, epoch)).to(data.train_labels.device)
    if augment:
        drawn = draw_augmentation(examples, size, mixed_seed(AUGMENTATION, seed, epoch))
    side = side_stream() if augment and order.is_cuda else None
    at_once = max(1, VALUES_AT_ONCE // (channels * max(size, data.image_size) ** 2) // batch_size) * batch_size
    for start in range(0, examples, at_once):
        some = slice(start, start + at_once)
        labels = data.train_labels[order[some]]
        with torch.cuda.stream(side):
            images = data.train_images[order[some]]
            if augment:
                box, flip, operations, signs = (values[some] for values in drawn)
                images = rand_augment(crop_and_flip(images, box, flip, data.image_size), operations, signs)
        if side:
            torch.cuda.current_stream().wait_stream(side)
            images.record_stream(torch.cuda.current_stream())
        for batch, its_labels in zip(images.split(batch_size), labels.split(batch_size)):
            share = slice(rank, None, world) if rank < len(batch) else slice(1)
            yield data.prepare(batch[share]), its_labels[share], len(batch[rank::world]) * world / len(batch)
