"""Released CRATE checkpoints: their import against tests/reference.py, measure.py on them, and what is refused."""

import argparse
import math
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from crate.data import load_data
from crate.model import from_released_crate
from tests import reference
from tests.conftest import assert_refused
from tests.reference import assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(13)


def released_state(*, channels=3, patch=4, grid=2, width=12, depth=2, classes=5):
    """A random state_dict in the released names, of (grid patch) x (grid patch) images."""
    patch_dim = patch**2 * channels

    def norm(name, n):
        return {f"{name}.weight": 1 + 0.1 * torch.randn(n), f"{name}.bias": 0.1 * torch.randn(n)}

    def affine(name, rows, columns):
        return {f"{name}.weight": torch.randn(rows, columns) / math.sqrt(columns), f"{name}.bias": 0.1 * torch.randn(rows)}

    state = {"pos_embedding": torch.randn(1, grid**2 + 1, width), "cls_token": torch.randn(1, 1, width)}
    state |= norm("to_patch_embedding.1", patch_dim) | affine("to_patch_embedding.2", width, patch_dim)
    state |= norm("to_patch_embedding.3", width)
    for i in range(depth):
        name = f"transformer.layers.{i}"
        state |= norm(f"{name}.0.norm", width) | affine(f"{name}.0.fn.to_out.0", width, width)
        state |= {f"{name}.0.fn.qkv.weight": torch.randn(width, width) / math.sqrt(width)}
        state |= norm(f"{name}.1.norm", width) | {f"{name}.1.fn.weight": torch.randn(width, width) / math.sqrt(width)}
    return state | norm("mlp_head.0", width) | affine("mlp_head.1", classes, width)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPERS = {
    "bare": lambda state: state,
    "main.py": lambda state: {"epoch": 3, "state_dict": prefixed("module.", state), "best_acc1": torch.ones(())},
    "finetune.py": lambda state: {"model": prefixed("module.", state), "optimizer": {"state": {}}, "scaler": {}},
    "compiled, then parallel": lambda state: prefixed("module._orig_mod.", state),
    "parallel, then compiled": lambda state: {"model": prefixed("_orig_mod.module.", state)},
}
SIZES = [
    dict(channels=3, patch=4, grid=2), dict(channels=1, patch=4, grid=2), dict(channels=3, patch=1, grid=3),
    dict(channels=1, patch=6, grid=1), dict(channels=3, patch=2, grid=4, depth=12), dict(channels=1, patch=3, grid=2),
]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_import(sizes, wrapper):
    state = released_state(**sizes)
    before = {name: tensor.clone() for name, tensor in state.items()}
    depth, size = sizes.get("depth", 2), sizes["patch"] * sizes["grid"]
    images = torch.randn(2, sizes["channels"], size, size, dtype=torch.float64)
    wide = {name: tensor.double() for name, tensor in state.items()}
    expected = reference.released_forward(images, wide, heads=3, patch_size=sizes["patch"], depth=depth)
    model = from_released_crate(WRAPPERS[wrapper](state), heads=3)
    assert len(model.layers) == depth
    assert_close(model(images.float()), expected, 1e-4)
    assert_close(model.double()(images), expected, 1e-10)
    assert not torch.allclose(from_released_crate(state, 2).double()(images), expected, atol=1e-3)  # heads matter
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


def assert_not_imported(state, heads=3, *words):
    with pytest.raises(ValueError) as error:
        from_released_crate(state, heads)
    message = str(error.value)
    assert message and "\n" not in message and all(word in message for word in words)


@pytest.mark.faults
@pytest.mark.parametrize("name", released_state(depth=1))
def test_malformed_entry(name, faults):
    state = released_state()
    tensor = state[name]
    assert_not_imported({other: value for other, value in state.items() if other != name})
    flat = tensor.flatten()
    empty = [tensor.narrow(axis, 0, 0) for axis in range(tensor.ndim)]
    wrong = [tensor[None], flat[1:], flat[0], tensor[..., :-1], torch.cat([tensor, tensor]), *empty, None]
    for value in wrong:
        assert_not_imported(state | {name: value})
    faults("a released checkpoint with a wrong entry", len(wrong) + 1, "refused in one line")


def test_other_malformed_checkpoints():
    state = released_state()
    for name in ("mlp_head.2.weight", "transformer.layers.0.0.fn.qkv.bias", "transformer.layers.7.1.fn.weight", "x"):
        assert_not_imported(state | {name: torch.randn(12, 12)}, 3, name.split(".")[-1])
    for heads in (5, 24):
        assert_not_imported(state, heads, f"heads {heads}")
    assert_not_imported({}, 3, "no weights")
    assert_not_imported({"state_dict": {}}, 3, "no weights")
    assert_not_imported({"model": nn.Linear(2, 2).state_dict()}, 3, "not a released CRATE checkpoint")
    assert_not_imported(state | {"pos_embedding": torch.randn(1, 4, 12)})  # 3 patches are not a square
    assert_not_imported({name.replace("layers.1", "layers.2"): tensor for name, tensor in state.items()})


# measure.py


@pytest.fixture
def measured(script, tmp_path):
    """measured(state, *flags) -> its row of the table, as measure.py writes it."""

    def call(state, *flags, heads=3):
        torch.save({"state_dict": state}, tmp_path / "crate.pth")
        out = tmp_path / "measures.csv"
        code, printed, error = script("measure", tmp_path / "crate.pth", "--heads", heads, "--out", out, "--images", 20, *flags)
        assert code == 0, error
        return pd.read_csv(out, index_col="run").loc["crate.pth"]

    return call


def losses(state, images, labels, patch_size, depth=2):
    wide = {name: tensor.double() for name, tensor in state.items()}
    return F.cross_entropy(reference.released_forward(images.double(), wide, 3, patch_size, depth), labels, reduction="none")


def test_row(measured, tmp_path):
    state, data = released_state(channels=1, classes=10), load_data("digits")
    row = measured(state, "--dataset", "digits")
    train, val = (
        losses(state, data.prepare(images), labels, 4)
        for images, labels in ((data.train_images, data.train_labels), (data.val_images, data.val_labels))
    )
    assert row["gap"] == pytest.approx((val.mean() - train.mean()).item(), rel=1e-3)
    assert row["val_loss"] == pytest.approx(val.mean().item(), rel=1e-5)
    saved = np.load(tmp_path / "measures_val_losses.npz")
    assert list(saved["run"]) == ["crate.pth"]
    np.testing.assert_allclose(saved["losses"], val[None], rtol=1e-3, atol=1e-5)
    matrices = [tensor.double() for tensor in state.values() if tensor.ndim == 2]
    assert row["l2"] == pytest.approx(sum(w.square().sum() for w in matrices).sqrt().item())
    assert (row["model"], row["width"], row["depth"], row["heads"]) == ("crate", 12, 2, 3)
    assert (row[["path_norm", "pacbayes_flatness", "sharpness_flatness", "rate_subspaces_released"]] > 0).all()
    assert not {"l2_dist", "fro_dist", "baseline_srr_init"} & set(row.index)  # it has no initial weights


def test_colour_images_are_standardised_as_the_released_code_does(measured, tmp_path):
    random, folder = np.random.default_rng(0), tmp_path / "pictures"
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / part / label / f"{i}.png")
    state, data = released_state(classes=2), load_data(str(folder))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = losses(state, (data.val_images / 255 - mean) / std, data.val_labels, 4)
    row = measured(state, "--dataset", folder, "--groups", "norms")
    assert row["val_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_without_labels_that_fit(measured, script, tmp_path):
    state = released_state(channels=1, classes=7, patch=4, grid=4)
    row = measured(state, "--dataset", "digits", "--groups", "norms", "srr")
    assert row[["gap", "gap_accuracy", "margin", "train_loss"]].isna().all() and row[["l2", "srr"]].notna().all()
    assert "inverse_margin" not in row.index
    row = measured(released_state(), "--dataset", "digits", "--groups", "norms")
    assert row["l2"] > 0
    command = ("measure", tmp_path / "crate.pth", "--heads", 3, "--out", tmp_path / "m.csv", "--dataset", "digits")
    assert_refused(script(*command, "--groups", "srr"), "3 channels and 5 classes", "--groups norms")


def checkpoint(value):
    return lambda path: torch.save(value, path)


class Pickled:
    pass


def safetensors(path):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def truncated(path):
    torch.save(released_state(), path)
    path.write_bytes(path.read_bytes()[:-1000])


FOREIGN = {
    "argparse.Namespace": (checkpoint({"state_dict": released_state(), "args": argparse.Namespace(lr=1)}), "state_dict alone"),
    "numpy scalar": (checkpoint({"state_dict": released_state(), "best": np.float64(0.9)}), "state_dict alone"),
    "pickled module": (checkpoint(nn.Linear(2, 2)), "state_dict alone"),
    "older file with a Namespace": (
        lambda path: torch.save({"args": argparse.Namespace()}, path, _use_new_zipfile_serialization=False), "state_dict alone",
    ),
    "list": (checkpoint([torch.zeros(2)]), "holds a list"),
    "other network": (checkpoint(nn.Linear(2, 2).state_dict()), "not a released CRATE checkpoint"),
    "other heads": (checkpoint(released_state(width=16)), "--heads 3"),
    "more classes": (checkpoint(released_state(channels=1, classes=1000)), "1000 classes"),
    "safetensors": (safetensors, "not a checkpoint of torch"),
    "HTML page": (lambda path: path.write_text("<!DOCTYPE html><html>Sign in</html>"), "not a checkpoint of torch"),
    "empty file": (lambda path: path.touch(), "not a checkpoint of torch"),
    "truncated file": (truncated, "damaged"),
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(script, tmp_path, kind, faults):
    (write, reason), path = FOREIGN[kind], tmp_path / "crate.pth"
    write(path)
    before = path.read_bytes()
    outcome = script("measure", path, "--heads", 3, "--dataset", "digits", "--out", tmp_path / "m.csv")
    assert_refused(outcome, str(path), reason)
    _, _, error = outcome
    assert len([line for line in error.splitlines() if "error: " in line]) == 1
    assert "delete" not in error and "remove" not in error and ("state_dict" in error) == ("state_dict" in reason)
    assert path.read_bytes() == before and not (tmp_path / "m.csv").exists()
    faults("a foreign file for a released checkpoint", 1, "refused in one line, with the reason")
