"""Released CRATE checkpoints: their import against tests/reference.py, measure.py on them, and what is refused."""

import argparse

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crate.data import load_data
from crate.released import from_released_crate
from tests import reference
from tests.conftest import assert_refused
from tests.reference import assert_close
from tests.test_data import write_classes


def released_state(*, channels=3, patch=4, grid=2, width=12, depth=2, classes=5):
    """A random state_dict in the released names, of (grid patch) x (grid patch) images."""

    shapes = {"pos_embedding": (1, grid**2 + 1, width), "cls_token": (1, 1, width)}
    affine = {"to_patch_embedding.1": (patch**2 * channels,), "to_patch_embedding.2": (width, patch**2 * channels)}
    affine |= {"to_patch_embedding.3": (width,), "mlp_head.0": (width,), "mlp_head.1": (classes, width)}
    for layer in (f"transformer.layers.{i}" for i in range(depth)):
        shapes |= {f"{layer}.0.fn.qkv.weight": (width, width), f"{layer}.1.fn.weight": (width, width)}
        affine |= {f"{layer}.0.norm": (width,), f"{layer}.0.fn.to_out.0": (width, width), f"{layer}.1.norm": (width,)}
    for name, shape in affine.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    norms = [f"{name}.weight" for name, shape in affine.items() if len(shape) == 1]  # near 1
    return {name: torch.randn(shape) / shape[-1] ** 0.5 + (name in norms) for name, shape in shapes.items()}


SIZES = [dict(channels=3, patch=4, grid=2), dict(channels=1, patch=6, grid=1), dict(channels=3, patch=2, grid=4, depth=12)]


@pytest.mark.parametrize("entry, prefix", [(None, ""), ("state_dict", "module."), ("model", "module._orig_mod."), ("net", "")])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_import(sizes, entry, prefix):
    state, depth, size = released_state(**sizes), sizes.get("depth", 2), sizes["patch"] * sizes["grid"]
    images = torch.randn(2, sizes["channels"], size, size, dtype=torch.float64)
    wide = {name: tensor.double() for name, tensor in state.items()}
    expected = reference.released_forward(images, wide, heads=3, patch_size=sizes["patch"], depth=depth)
    saved = {prefix + name: tensor for name, tensor in state.items()}
    model = from_released_crate({"optimizer": {"state": {}}, entry: saved} if entry else saved, heads=3)
    assert_close(model(images.float()), expected, 1e-4)
    assert_close(model.double()(images), expected, 1e-10)


@pytest.mark.faults
@pytest.mark.parametrize("name", released_state(depth=1))
def test_malformed_entry(name):
    state = released_state()
    tensor, others = state[name], {other: value for other, value in state.items() if other != name}
    wrong = [others, state | {name: tensor[..., :-1]}, state | {name: tensor[..., :0]}, state | {name + "2": tensor}]
    for malformed in wrong:
        with pytest.raises(ValueError) as error:
            from_released_crate(malformed, 3)
        assert "\n" not in str(error.value)


@pytest.fixture
def measured(script, tmp_path):
    """measured(state, *flags) -> its row of the table, as measure.py writes it."""

    def call(state, *flags):
        torch.save({"state_dict": state}, tmp_path / "crate.pth")
        out = tmp_path / "measures.csv"
        code, _, error = script("measure", tmp_path / "crate.pth", "--heads", 3, "--out", out, "--images", 20, *flags)
        assert code == 0, error
        return pd.read_csv(out, index_col="run").loc["crate.pth"]

    return call


def losses(state, images, labels):
    wide = {name: tensor.double() for name, tensor in state.items()}
    return F.cross_entropy(reference.released_forward(images.double(), wide, 3, 4, 2), labels, reduction="none")


def test_row(measured):
    state, data = released_state(channels=1, classes=10), load_data("digits")
    row = measured(state, "--dataset", "digits")
    train = losses(state, data.prepare(data.train_images), data.train_labels)
    val = losses(state, data.prepare(data.val_images), data.val_labels)
    assert row["gap"] == pytest.approx((val.mean() - train.mean()).item(), rel=1e-3)
    assert row["val_loss"] == pytest.approx(val.mean().item(), rel=1e-5)
    assert (row["model"], row["width"], row["depth"], row["heads"]) == ("crate", 12, 2, 3)
    assert (row[["path_norm", "pacbayes_flatness", "sharpness_flatness"]] > 0).all()
    assert not {"l2_dist", "fro_dist", "baseline_srr_init"} & set(row.index)  # it has no initial weights


def test_colour_images_are_standardised_as_the_released_code_does(measured, tmp_path):
    folder = write_classes(tmp_path / "pictures", size=(8, 8))
    state, data = released_state(classes=2), load_data(str(folder))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = losses(state, (data.val_images / 255 - mean) / std, data.val_labels)
    row = measured(state, "--dataset", folder, "--groups", "norms")
    assert row["val_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_without_labels_that_fit(measured, script, tmp_path):
    row = measured(released_state(channels=1, classes=7), "--dataset", "digits", "--groups", "norms", "srr")
    assert row[["gap", "gap_accuracy", "margin", "train_loss"]].isna().all() and row[["l2", "srr"]].notna().all()
    assert measured(released_state(), "--dataset", "digits", "--groups", "norms")["l2"] > 0
    command = ("measure", tmp_path / "crate.pth", "--heads", 3, "--out", tmp_path / "m.csv", "--dataset", "digits")
    assert_refused(script(*command, "--groups", "srr"), "3 channels and 5 classes", "--groups norms")


FOREIGN = {
    "pickled objects": (lambda: {"args": argparse.Namespace(lr=1)}, "not a checkpoint of tensors"),
    "no weights": (lambda: {"state_dict": {}}, "no weights"),
    "two networks": (lambda: {"student": released_state(), "teacher": released_state()}, "only student, teacher"),
    "list": (lambda: [torch.zeros(2)], "holds a list"),
    "other network": (lambda: nn.Linear(2, 2).state_dict(), "not a released CRATE checkpoint"),
    "other heads": (lambda: released_state(width=16), "--heads 3"),
    "truncated file": (released_state, "damaged"),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(script, tmp_path, kind):
    (content, reason), path = FOREIGN[kind], tmp_path / "crate.pth"
    torch.save(content(), path)
    if kind == "truncated file":
        path.write_bytes(path.read_bytes()[:-1000])
    command = ("measure", path, "--heads", 3, "--dataset", "digits", "--out", tmp_path / "m.csv")
    assert_refused(script(*command), str(path), reason)
    assert not (tmp_path / "m.csv").exists()
