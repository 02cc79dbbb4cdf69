"""Data sets: the shipped digits, Fashion-MNIST, CIFAR-10 and CIFAR-100, as tensors on the device, and their batches.

Images are (C, H, W), normalised by the training set's mean and standard deviation per channel. The order of an epoch's
examples, and what augmentation makes of them, are functions of (seed, epoch) alone.
"""

import functools
import gzip
import hashlib
import io
import os
import signal
import sys
import tarfile
import threading
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from crate.cli import InputError, cores
from crate.config import DATASETS
from crate.distributed import RANK, WORLD

DIGITS = Path(__file__).with_name("digits.npz")
DIGITS_SHA256 = "5fe13e34b3dd716db1281d456700d350f8628ee754b9c493869f197171b85f4b"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts its files
FASHION_FILES = tuple(
    f"{name}-ubyte.gz" for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)
FILES = {  # that a data set is read from, for the message that they are missing
    "digits": DIGITS,
    "fashion-mnist": ", ".join(FASHION_FILES),
    "cifar10": "cifar-10-batches-py/ (batches.meta, data_batch_1 to 5, test_batch)",
    "cifar100": "cifar-100-python/ (meta, train, test)",
}
ORDER, AUGMENTATION, DROPOUT = range(3)  # what a seed is for


@dataclass
class Data:
    """A training and a validation set on one device: normalised images (n, C, H, W) float32, labels (n,) int64."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    val_images: torch.Tensor
    val_labels: torch.Tensor
    raw_train_images: torch.Tensor  # (n, C, H, W) uint8 on the CPU, for augmentation
    mean: torch.Tensor  # (C, 1, 1), of the training images as values from 0 to 1
    std: torch.Tensor
    image_size: int  # that the model sees

    def normalise(self, images):
        """Images of bytes -> standardised per channel, float32."""
        return (images.float() / 255 - self.mean) / self.std

    def resize(self, images):
        """(n, C, H, W) -> (n, C, image_size, image_size); a larger image size would fill the memory if done at once."""
        if images.shape[-1] == self.image_size:
            return images
        return F.interpolate(images, self.image_size, mode="bilinear", antialias=True)


def mixed_seed(*numbers):
    """One 63-bit seed out of several whole numbers, the same on every machine; nearby numbers give unrelated seeds.

    The first number says what the seed is for: ORDER, AUGMENTATION or DROPOUT.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def _digits(data_dir):
    content = DIGITS.read_bytes()
    if hashlib.sha256(content).hexdigest() != DIGITS_SHA256:
        raise InputError(f"{DIGITS}: its checksum is wrong; restore it with `git checkout crate/digits.npz`")
    arrays = np.load(io.BytesIO(content))
    train, val = (arrays[f"{part}_images"].astype(int) * 255 // 16 for part in ("train", "val"))  # shipped as 0 to 16
    return [train, arrays["train_labels"], val, arrays["val_labels"]]


def _fashion_mnist(data_dir):
    folders = [data_dir, data_dir / "fashion-mnist", data_dir / "FashionMNIST" / "raw", DEBIAN]
    folder = next((f for f in folders if all((f / name).is_file() for name in FASHION_FILES)), None)
    if folder is None:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(data_dir, download=True)
        folder = folders[2]
    return [_idx(folder / name) for name in FASHION_FILES]


def _idx(path):
    """The array in a gzipped IDX file: two zero bytes, type 8 (uint8), the number of axes, each axis' length, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
        axes = content[3]
        shape = np.frombuffer(content, ">i4", axes, offset=4)
        if content[:3] != b"\0\0\x08":
            raise ValueError
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error):
        raise InputError(f"{path}: not a gzipped IDX file of bytes; delete it, and it is downloaded again")


def _cifar(kind, data_dir):
    from torchvision import datasets

    parts = [getattr(datasets, kind)(data_dir, train, download=True) for train in (True, False)]
    return [array for part in parts for array in (part.data.transpose(0, 3, 1, 2), np.array(part.targets))]


# name: function of the folder that returns training images, training labels, validation images, validation labels
LOADERS = {"digits": _digits, "fashion-mnist": _fashion_mnist}
LOADERS |= {name: functools.partial(_cifar, name.upper()) for name in ("cifar10", "cifar100")}


@functools.lru_cache(1)  # the runs of a grid share it
def load_data(name, data_dir="data", *, image_size=None, train_subset=None, hold_out=0.0, device="cpu"):
    """The data set `name` as Data on `device`, downloaded into `data_dir` where it is missing.

    image_size: resize to this (None: the data set's own). train_subset: keep that many training images, chosen at random,
    always the same. hold_out: validate on this share of the training images, taken out of training, in the place of the
    validation images: what hyperparameters may be chosen by. Raises InputError where files are missing and can't be
    downloaded, are broken, or hold too few images.
    """
    if name not in LOADERS:
        raise InputError(f"--dataset {name}: unknown; choose from {', '.join(LOADERS)}")
    try:
        arrays = LOADERS[name](Path(data_dir))
    except (OSError, RuntimeError, HTTPException, tarfile.TarError, zlib.error, EOFError) as error:  # no network, a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        missing = f"--data-dir {data_dir}: {name} is not there ({reason})"
        raise InputError(f"{missing}; put {FILES[name]} there, or use --dataset digits")
    images, labels, val_images, val_labels = (torch.from_numpy(np.array(array)) for array in arrays)
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
    size, channels, _ = DATASETS[name]
    images, val_images = (x.view(-1, channels, size, size).byte() for x in (images, val_images))
    std, mean = (x[:, None, None].to(device) for x in torch.std_mean(images.float() / 255, (0, 2, 3)))
    data = Data(None, labels.long().to(device), None, val_labels.long().to(device), images, mean, std, image_size or size)
    data.train_images, data.val_images = data.normalise(images.to(device)), data.normalise(val_images.to(device))
    return data


def data_of(config, data_dir=None, device="cpu"):
    """The data set of a run, from its config.json; data_dir: instead of the run's own."""
    settings = {key: config[key] for key in ("image_size", "train_subset", "hold_out")}
    return load_data(config["dataset"], data_dir or config["data_dir"], **settings, device=device)


def epoch_order(examples, seed, epoch):
    """The order in which an epoch sees the training set, (examples,) int64."""
    return torch.randperm(examples, generator=torch.Generator().manual_seed(mixed_seed(ORDER, seed, epoch)))


def batches(data, batch_size, seed, epoch, start=0):
    """An epoch's (images, labels) from batch `start` on, this rank's share of each: normalised, without augmentation."""
    order = epoch_order(len(data.train_labels), seed, epoch).to(data.train_labels.device, non_blocking=True)
    for index in order.split(batch_size)[start:]:
        index = index[RANK::WORLD]
        yield data.resize(data.train_images[index]), data.train_labels[index]


class _Augmentation(torch.utils.data.Dataset):
    """Batches of augmented images: random resized crop, horizontal flip, RandAugment(n = 2, m = 14) (Section 6)."""

    def __init__(self, images, size):
        from torchvision.transforms import v2

        self.images, self.size = images, size
        crop = v2.RandomResizedCrop(size, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandAugment(num_ops=2, magnitude=14)])

    def __getitem__(self, item):
        """(seed, epoch, indices) -> images (b, C, size, size) uint8, indices (b,). Runs in a worker."""
        seed, epoch, index = item
        images = torch.empty(len(index), len(self.images[0]), self.size, self.size, dtype=torch.uint8)
        for image, i in zip(images, index.tolist()):
            # An image depends on (seed, epoch) alone: not on the workers, the ranks, the batch or where an epoch was resumed.
            torch.manual_seed(mixed_seed(AUGMENTATION, seed, epoch, i))
            image[:] = self.transform(self.images[i])
        return images, index


def _start_worker(worker):
    """One thread, and of the signals that may be sent to all processes at once none but the training process' own SIGTERM."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_asked, daemon=True).start()


def _end_when_asked():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class AugmentedBatches:
    """An epoch's batches with augmentation, made image by image in worker processes that live as long as this object."""

    def __init__(self, data, batch_size, seed):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.plan = []  # (seed, epoch, indices) of every batch of the coming epoch: what the loader samples
        self.loader = torch.utils.data.DataLoader(
            _Augmentation(data.raw_train_images, data.image_size), batch_size=None, sampler=self.plan,
            num_workers=min(8, max(1, cores() - 1)), persistent_workers=True,
            pin_memory=data.train_labels.is_cuda, worker_init_fn=_start_worker,
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            generator=torch.Generator(),  # else the first epoch would draw from the generator that dropout uses
        )  # fmt: skip

    def epoch(self, epoch, start=0):
        """As `batches`."""
        order = epoch_order(len(self.data.train_labels), self.seed, epoch).split(self.batch_size)
        self.plan[:] = [(self.seed, epoch, index[RANK::WORLD]) for index in order[start:]]
        device = self.data.train_labels.device
        try:
            for images, index in self.loader:
                images, index = images.to(device, non_blocking=True), index.to(device, non_blocking=True)
                yield self.data.normalise(images), self.data.train_labels[index]
        except (EOFError, ConnectionError):  # the loader itself notices most deaths, but not one in the middle of a batch
            raise RuntimeError("a worker process that augments images died")
