"""Data sets and batches: the shipped digits, small files in the formats of the others, class folders, augmentation."""

from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from torchvision import datasets, transforms
from torchvision.transforms import v2

from crate import data as data_module
from crate.augmentation import crop_and_flip, draw_augmentation, rand_augment
from crate.cli import InputError
from crate.data import batches, data_of, decode, load_data


def refused(*arguments, **settings):
    """The message, of one line, with which load_data refuses; the files may be others than a moment ago."""
    load_data.cache_clear()
    decode.cache_clear()
    with pytest.raises(InputError) as error:
        load_data(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def random_images(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()


def test_digits_are_balanced_and_disjoint():
    data = load_data("digits")
    assert data.train_images.shape == (500, 1, 8, 8) and data.val_images.shape == (1297, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert data.train_labels.bincount().tolist() == [50] * 10
    labels = torch.cat([data.train_labels, data.val_labels])
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as the source documents
    images = torch.cat([data.train_images, data.val_images])
    assert len(images.flatten(1).unique(dim=0)) == 1797 and images.min() == 0 and images.max() == 255
    assert data.checksum == "500 + 1297 images, 71f7d64d7703"  # those of the published results


def test_train_subset_hold_out_and_image_size():
    a, more, held = (load_data("digits", train_subset=n, hold_out=h) for n, h in ((200, 0), (260, 0), (200, 0.25)))
    assert torch.equal(a.train_images, more.train_images[:200]) and len(a.val_labels) == 1297
    assert (len(held.train_labels), len(held.val_labels)) == (150, 50)
    parts = torch.cat([held.train_images, held.val_images])
    assert torch.equal(a.train_images.flatten(1).unique(dim=0), parts.flatten(1).unique(dim=0))
    assert held.prepare(held.train_images).mean().abs() < 1e-5  # by the images that are left
    config = dict(dataset="digits", data_dir="data", image_size=None, train_subset=200, hold_out=0.25, lr=1)
    assert torch.equal(data_of(config).val_images, held.val_images)
    for size in (5, 12):  # resized as Pillow does
        other = load_data("digits", image_size=size)
        wanted = [
            Image.fromarray(image[0].numpy()).resize((size, size), Image.Resampling.BILINEAR) for image in other.val_images[:3]
        ]
        wanted = (torch.from_numpy(np.stack(wanted))[:, None] / 255 - other.mean) / other.std
        assert (other.prepare(other.val_images[:3]) - wanted).abs().max() < 1.1 / 255 / other.std.min()  # Pillow rounds twice
    assert "--train-subset 2000: digits has 500" in refused("digits", train_subset=2000)
    assert "--hold-out 0.001: leaves 0" in refused("digits", hold_out=0.001)
    assert "digits, cifar10" in refused("mnist") and "FOLDER/train/CLASS" in refused("mnist")


def write_picture(path, size=(6, 6), mode="RGB", number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], len(mode)), np.uint8).tobytes()
    Image.frombytes(mode, size, values).save(path)


def write_classes(folder, names="ab", test="test", kind="png", **settings):
    """Three training pictures a class, two for the test."""
    for part, count in (("train", 3), (test, 2)):
        for i, name in enumerate(names):
            for j in range(count):
                write_picture(folder / part / name / f"{j}.{kind}", number=100 * i + 10 * j + count, **settings)
    return folder


@pytest.mark.parametrize("kind, test, mode", [("png", "test", "RGB"), ("jpg", "val", "L"), ("png", "valid", "L")])
def test_class_folders(tmp_path, kind, test, mode):
    """Also in the place of a data set's download."""
    data = load_data(str(write_classes(tmp_path / "cifar10", "abc", test, kind, mode=mode)))
    assert torch.equal(load_data("cifar10", tmp_path).val_images, data.val_images)
    tmp_path = tmp_path / "cifar10"
    assert data.classes == 3 and data.image_size == 6 and data.train_images.shape == (9, len(mode), 6, 6)
    assert data.train_labels.tolist() == [0, 1, 2] * 3 and data.val_labels.tolist() == [0, 1, 2] * 2  # they take turns
    for i, (image, label) in enumerate(zip(data.train_images, data.train_labels)):
        expected = Image.open(tmp_path / "train" / "abc"[label] / f"{i // 3}.{kind}")
        assert np.array_equal(image.permute(1, 2, 0).squeeze(2), np.asarray(expected))
    assert load_data(str(tmp_path), image_size=8).train_images.shape == (9, len(mode), 8, 8)


def test_pictures_of_several_kinds_and_sizes(tmp_path):
    write_classes(tmp_path, mode="L")
    write_picture(tmp_path / "train/a/x.png", mode="RGBA")
    files = [Image.open(tmp_path / f"train/a/{name}.png") for name in "012x"]
    found = (data := load_data(tmp_path)).train_images[data.train_labels == 0].permute(0, 2, 3, 1)
    assert np.array_equal(found, np.stack([np.asarray(file.convert("RGB")) for file in files]))
    write_picture(tmp_path / "train/a/0.png", size=(12, 8))
    load_data.cache_clear(), decode.cache_clear()
    data = load_data(tmp_path, image_size=5)
    expected = Image.open(tmp_path / "train/a/0.png").resize((5, 5), Image.Resampling.BILINEAR)
    assert np.array_equal(data.train_images[0].permute(1, 2, 0), np.asarray(expected))


DAMAGE = [  # what is done to a folder, and what the message says
    (lambda f: (f / "test/b").rename(f / "b"), "train and test don't hold the same two classes or more"),
    (lambda f: (f / "test/a/x.jpg").write_text("hello"), "/test/a/x.jpg: can't be read"),
    (lambda f: (f / "train/b/1.jpg").write_bytes(b"\xff\xd8\xff"), "/train/b/1.jpg: can't be read ("),
    (lambda f: (f / "test").rename(f / "dev"), "/test: No such file or directory; expected FOLDER/train/CLASS"),
    (lambda f: write_picture(f / "train/b/0.jpg", size=(6, 6)), "not of one square size; give --image-size"),
    (lambda f: (f / "train/b/notes.txt").write_text("hello"), "/train/b/notes.txt: can't be read"),
    (lambda f: Image.new("I;16", (9, 9)).save(f / "train/a/deep.png"), "/train/a/deep.png: can't be read (more than 8 bits"),
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("damage, words", DAMAGE, ids=[words.split(";")[0] for _, words in DAMAGE])
def test_damaged_class_folders(tmp_path, damage, words):
    damage(write_classes(tmp_path, kind="jpg", size=(9, 9)))
    assert str(tmp_path) in refused(tmp_path) and words in refused(tmp_path)


@pytest.mark.parametrize("kind, classes", [("CIFAR10", 10), ("CIFAR100", 100)])
def test_data_sets_of_torchvision(tmp_path, monkeypatch, kind, classes):
    def fake(root, train, download):
        assert root == tmp_path and download
        random = np.random.default_rng(train)
        labels = random.permutation(classes).tolist()
        return SimpleNamespace(data=random.integers(0, 256, (classes, 32, 32, 3), np.uint8), targets=labels)

    monkeypatch.setattr(datasets, kind, fake)
    data = load_data(kind.lower(), tmp_path)
    for train, images, labels in ((1, data.train_images, data.train_labels), (0, data.val_images, data.val_labels)):
        expected = fake(tmp_path, train, download=True)
        assert np.array_equal(images.permute(0, 2, 3, 1), expected.data) and labels.tolist() == expected.targets
    pixels = data.train_images.numpy() / 255
    expected = (pixels - pixels.mean((0, 2, 3), keepdims=True)) / pixels.std((0, 2, 3), keepdims=True, ddof=1)
    np.testing.assert_allclose(data.prepare(data.train_images), expected, atol=1e-4)


@pytest.mark.faults
def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=URLError("no network")))
    message = refused("cifar100", tmp_path / "empty")
    assert all(words in message for words in (str(tmp_path), "can't be downloaded", "no network", "--dataset digits"))


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_and_its_ranks(augment, monkeypatch):
    data, state = load_data("digits", train_subset=131, image_size=10), torch.get_rng_state()
    epoch = list(batches(data, 65, 3, 1, augment))
    assert [len(labels) for _, labels, _ in epoch] == [65, 65, 1] and all(weight == 1 for _, _, weight in epoch)
    images, labels = (torch.cat(parts) for parts in list(zip(*epoch))[:2])
    plain = torch.cat([images for images, *_ in batches(data, 65, 3, 1)])
    order = torch.cdist(plain.flatten(1), data.prepare(data.train_images).flatten(1)).argmin(1)
    assert torch.equal(order.sort().values, torch.arange(131)) and torch.equal(labels, data.train_labels[order])
    assert images.shape == plain.shape and images.dtype == torch.float32
    assert torch.equal(images, plain) != augment and ((images - plain).flatten(1).norm(dim=1).median() > 1) == augment
    monkeypatch.setattr(data_module, "VALUES_AT_ONCE", 4000)  # in several portions, of batches of another size
    assert torch.equal(torch.cat([images for images, _, _ in batches(data, 20, 3, 1, augment)]), images)
    ranks = [batches(data, 65, 3, 1, augment, rank, world=3) for rank in range(3)]
    for (whole, whole_labels, _), *parts in zip(epoch, *ranks, strict=True):
        assert sum(weight for _, _, weight in parts) == pytest.approx(3)
        for rank, (share, labels, weight) in enumerate(parts):
            assert torch.equal(share, whole[rank::3] if weight else whole[:1])
            assert torch.equal(labels, whole_labels[rank::3] if weight else whole_labels[:1])
        mean = sum(weight * share.mean() for share, _, weight in parts) / 3
        assert float(mean) == pytest.approx(float(whole.mean()), abs=1e-5)
    for other in ((3, 2), (4, 1)):
        assert not torch.equal(next(batches(data, 65, *other, augment))[0], epoch[0][0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("channels, pixels, size", [(3, 32, 32), (1, 28, 28), (1, 8, 12), (3, 40, 16)])
def test_crop_and_flip_are_those_of_torchvision(channels, pixels, size):
    images = random_images(300, channels, pixels, pixels)
    box, flip, _, _ = draw_augmentation(300, pixels, seed=1)
    expected = [v2.functional.resized_crop(x, *b, [size, size], antialias=True) for x, b in zip(images, box.int().tolist())]
    expected = torch.where(flip[:, None, None, None], torch.stack(expected).flip(-1), torch.stack(expected))
    assert (crop_and_flip(images, box, flip, size).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("channels, pixels", [(3, 32), (1, 28), (3, 9)])
def test_rand_augment_is_that_of_torchvision(channels, pixels):
    images = random_images(500, channels, pixels, pixels)
    images[:100] = images[:100] // 4 + 60  # of low contrast
    images[100:110] = 7
    _, _, operations, signs = draw_augmentation(500, pixels, seed=1)
    transform = v2.RandAugment(magnitude=14)
    names = list(transform._AUGMENTATION_SPACE)

    def apply(image, operation, sign):
        levels, signed = transform._AUGMENTATION_SPACE[names[operation]]
        levels = levels(31, pixels, pixels)
        level = 0.0 if levels is None else float(levels[14]) * (sign if signed else 1)
        return transform._apply_image_or_video_transform(
            image, names[operation], level, transform.interpolation, transform._fill
        )

    found = rand_augment(images, operations, signs)
    assert len(operations.unique()) == len(names) == 14
    for image, result, (first, second), (sign, then) in zip(images, found, operations.tolist(), signs.tolist()):
        assert torch.equal(result, apply(apply(image, first, sign), second, then)), (names[first], names[second])


def test_draws_are_distributed_as_those_of_torchvision():
    box, flip, operations, signs = draw_augmentation(5000, 32, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = transforms.RandomResizedCrop
        theirs = [crop.get_params(torch.empty(1, 32, 32), (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(5000)]
    theirs, area = torch.tensor(theirs), box[:, 2:].prod(1) / 32**2
    for found, expected in ((box, theirs), (area, theirs[:, 2:].prod(1) / 32**2)):
        assert np.min(ks_2samp(found, expected).pvalue) > 0.001
    assert area.min() == pytest.approx(0.08, abs=0.01) and area.max() == 1
    pairs = operations[:, 0] * 14 + operations[:, 1]
    for drawn in (operations.flatten(), pairs, signs.flatten() + 1, flip):
        assert chisquare(drawn.int().unique(return_counts=True)[1]).pvalue > 0.001
    assert len(pairs.unique()) == 196
    assert not any(torch.equal(box, draw_augmentation(5000, 32, other)[0]) for other in (0, 2))
