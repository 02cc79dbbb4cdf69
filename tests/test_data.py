"""Data sets and batches: the shipped digits, tiny files in the formats of Fashion-MNIST and CIFAR, augmentation."""

import gzip
import hashlib
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from torchvision import datasets

from crate import data as data_module
from crate.cli import InputError
from crate.data import FASHION_FILES, AugmentedBatches, batches, epoch_order, load_data, mixed_seed


def test_digits_are_the_stratified_split():
    data = load_data("digits")
    assert data.train_images.shape == (1437, 1, 8, 8) and data.val_images.shape == (360, 1, 8, 8)
    train, val = data.train_labels.bincount(), data.val_labels.bincount()
    assert torch.all((val - (train + val) * 360 / 1797).abs() < 1)
    assert (train + val).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # the source's documented class counts
    assert data.raw_train_images.min() == 0 and data.raw_train_images.max() == 255
    images = torch.cat([data.train_images, data.val_images]).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # nothing stands in both parts


def test_normalised_by_the_training_set():
    data = load_data("digits", train_subset=300)
    pixels = data.raw_train_images.numpy() / 255
    np.testing.assert_allclose(data.train_images, (pixels - pixels.mean()) / pixels.std(ddof=1), atol=1e-5)
    raw_val = np.load(data_module.DIGITS)["val_images"].astype(int) * 255 // 16 / 255
    np.testing.assert_allclose(data.val_images[:, 0], (raw_val - pixels.mean()) / pixels.std(ddof=1), atol=1e-5)


def test_broken_digits(tmp_path, monkeypatch):
    content = bytearray(data_module.DIGITS.read_bytes())
    content[1000] ^= 1
    (tmp_path / "digits.npz").write_bytes(content)
    monkeypatch.setattr(data_module, "DIGITS", tmp_path / "digits.npz")
    with pytest.raises(InputError, match="checksum"):
        load_data("digits")


def test_held_out_images_come_from_the_training_set():
    whole, data = load_data("digits", train_subset=200), load_data("digits", train_subset=200, hold_out=0.25)
    assert len(data.train_labels) == 150 and len(data.val_labels) == 50
    again = load_data("digits", train_subset=200, hold_out=0.25)
    assert torch.equal(data.val_images, again.val_images)
    parts = torch.cat([data.normalise(data.raw_train_images), data.val_images])  # of one mean and standard deviation
    rows = {tuple(image.flatten().tolist()) for image in data.normalise(whole.raw_train_images)}
    assert len(rows) == 200 and rows == {tuple(image.flatten().tolist()) for image in parts}
    assert data.train_images.mean((0, 2, 3)).abs().max() < 1e-5  # standardised by the images that are left for training
    with pytest.raises(InputError, match="--hold-out 0.001: leaves 0"):
        load_data("digits", train_subset=200, hold_out=0.001)


def test_train_subset_is_fixed_and_bounded():
    a, b, more = (load_data("digits", train_subset=images) for images in (50, 50, 60))
    assert torch.equal(a.raw_train_images, b.raw_train_images)
    assert torch.equal(a.raw_train_images, more.raw_train_images[:50])
    assert len(a.val_labels) == 360
    with pytest.raises(InputError, match="--train-subset 2000.*1437"):
        load_data("digits", train_subset=2000)


def test_resize():
    data = load_data("digits", image_size=12)
    assert data.resize(data.train_images[:3]).shape == (3, 1, 12, 12)
    same = load_data("digits")
    assert same.resize(same.train_images) is same.train_images


def write_fashion(folder, n):
    """The four files with n training and n + 1 validation images; returns the arrays in their order."""
    random, arrays = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for name in FASHION_FILES:
        shape = (n + name.startswith("t10k"), 28, 28)[: 3 if "images" in name else 1]
        arrays.append(random.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8))
        header = struct.pack(">BBBB", 0, 0, 8, len(shape)) + struct.pack(f">{len(shape)}i", *shape)
        (folder / name).write_bytes(gzip.compress(header + arrays[-1].tobytes()))
    return arrays


@pytest.mark.parametrize("below", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_from_its_files(tmp_path, below):
    images, labels, val_images, val_labels = write_fashion(tmp_path / below, 7)
    data = load_data("fashion-mnist", tmp_path)
    assert np.array_equal(data.raw_train_images[:, 0], images) and np.array_equal(data.train_labels, labels)
    assert data.val_images.shape == (8, 1, 28, 28) and np.array_equal(data.val_labels, val_labels)
    pixels = images / 255
    expected = (val_images / 255 - pixels.mean()) / pixels.std(ddof=1)
    np.testing.assert_allclose(data.val_images[:, 0], expected, rtol=1e-3, atol=1e-5)


BROKEN = [b"", b"nonsense", gzip.compress(b"\0\0\x08\x03\0"), gzip.compress(b"\1\0\x0d\x01\0\0\0\1a")]


@pytest.mark.parametrize("content", BROKEN)
def test_broken_fashion_mnist(tmp_path, content):
    write_fashion(tmp_path, 3)
    (tmp_path / FASHION_FILES[0]).write_bytes(content)
    with pytest.raises(InputError, match=f"{FASHION_FILES[0]}: not a gzipped IDX file"):
        load_data("fashion-mnist", tmp_path)


def write_cifar(folder, monkeypatch, name, n):
    """CIFAR's pickled batches with n images each, known to torchvision by their own checksums; returns images, labels."""
    random = np.random.default_rng(0)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key, classes = {"cifar10": ("labels", 10), "cifar100": ("fine_labels", 100)}[name]
    (folder / kind.base_folder).mkdir(parents=True)
    contents = []

    def write(file, content):
        raw = pickle.dumps(content)
        (folder / kind.base_folder / file).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    for files in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(kind, files):
            images = random.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)  # row by row, red, green, blue planes
            labels = random.integers(0, classes, n).tolist()
            entries.append([file, write(file, {"data": images.reshape(n, -1), key: labels})])
            contents.append((images, labels))
        monkeypatch.setattr(kind, files, entries)
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", meta)
    return contents


@pytest.mark.parametrize("name, files", [("cifar10", 6), ("cifar100", 2)])
def test_cifar_from_its_files(tmp_path, monkeypatch, name, files):
    contents = write_cifar(tmp_path, monkeypatch, name, 4)
    assert len(contents) == files
    data = load_data(name, tmp_path)
    images, labels = (np.concatenate([c[i] for c in contents[:-1]]) for i in (0, 1))
    assert np.array_equal(data.raw_train_images, images) and data.train_labels.tolist() == labels.tolist()
    assert data.val_labels.tolist() == contents[-1][1]
    pixels = images / 255
    expected = (pixels - pixels.mean((0, 2, 3), keepdims=True)) / pixels.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(data.train_images, expected, atol=1e-3)


@pytest.mark.parametrize("name, file", [("fashion-mnist", FASHION_FILES[0]), ("cifar10", "data_batch_1"), ("cifar100", "meta")])
def test_missing_data_names_folder_files_and_the_way_on(tmp_path, monkeypatch, name, file):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(data_module, "DEBIAN", tmp_path)
    with pytest.raises(InputError) as error:
        load_data(name, tmp_path)
    for word in (str(tmp_path), file, "--dataset digits"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_data_set():
    with pytest.raises(InputError, match="--dataset mnist: unknown; choose from digits"):
        load_data("mnist")


def test_mixed_seed():
    seeds = {mixed_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900 and all(0 <= s < 2**63 for s in seeds)
    assert mixed_seed(1, 2) == mixed_seed(1, 2) != mixed_seed(2, 1)


def test_an_epoch_sees_every_example_once():
    data = load_data("digits", train_subset=130)
    seen = torch.cat([labels for _, labels in batches(data, 50, seed=0, epoch=1)])
    assert [len(labels) for _, labels in batches(data, 50, 0, 1)] == [50, 50, 30]
    assert torch.equal(seen, data.train_labels[epoch_order(130, 0, 1)])
    orders = [epoch_order(130, seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    assert all(torch.equal(order.sort().values, torch.arange(130)) for order in orders)
    assert not any(torch.equal(orders[i], orders[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_augmentation_is_a_function_of_seed_and_epoch(monkeypatch):
    data = load_data("digits", train_subset=120, image_size=10)
    epochs = {}
    for cores in (2, 4):  # one and three workers
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        augmented = AugmentedBatches(data, 50, seed=3)
        for epoch in (1, 2):
            epochs[cores, epoch] = list(augmented.epoch(epoch))
    for epoch in (1, 2):
        for (images, labels), (again, labels_again) in zip(epochs[2, epoch], epochs[4, epoch], strict=True):
            assert images.shape[1:] == (1, 10, 10) and torch.equal(images, again) and torch.equal(labels, labels_again)
    labels = torch.cat([labels for _, labels in epochs[2, 1]])
    assert torch.equal(labels, data.train_labels[epoch_order(120, 3, 1)])
    assert not torch.equal(epochs[2, 1][0][0], epochs[2, 2][0][0])
    plain = torch.cat([data.resize(images) for images, _ in batches(data, 50, 3, 1)])
    change = torch.cat([images for images, _ in epochs[2, 1]]) - plain
    assert change.flatten(1).norm(dim=1).min() > 0.1  # every image is changed


def test_shipped_digits_are_small():
    assert data_module.DIGITS.stat().st_size < 100_000


@pytest.mark.skipif(not data_module.DEBIAN.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_real_fashion_mnist(tmp_path):
    for name in FASHION_FILES:
        shutil.copy(data_module.DEBIAN / name, tmp_path)
    data = load_data("fashion-mnist", tmp_path)
    assert len(data.train_labels) == 60000 and len(data.val_labels) == 10000
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert float(data.mean) == pytest.approx(0.2860, abs=5e-4) and float(data.std) == pytest.approx(0.3530, abs=5e-4)
