"""measure.py through its command line: the tables, what is kept and what is measured again, broken runs."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import measure
from crate import runs as of_runs
from crate.data import data_of
from crate.runs import load_run
from crate.srr import layer_srr
from crate.training import train
from measure import COLUMNS, SETTINGS
from tests.conftest import assert_refused
from tests.test_training import config

CHEAP = ("--groups", "norms", "--images", 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two finished runs, a and b; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in (("a", "crate-c"), ("b", "crate")):
        train(config(model=model, depth=2, epochs=2), folder / name, show_progress=False)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of them that a test may break."""
    return shutil.copytree(trained, tmp_path / "runs")


def table(path, index="run"):
    return pd.read_csv(path, index_col=index)


def change_weights(path, name, factor):
    content = torch.load(path, weights_only=True)
    content["model"][name] *= factor
    torch.save(content, path)


def test_a_row_per_run_and_a_row_per_layer(script, runs, tmp_path):
    out = tmp_path / "new" / "some.csv"
    code, printed, _ = script("measure", runs, "--out", out, "--images", 20)
    assert code == 0 and "a: " in printed and "2 models, 0 measured already" in printed
    rows, layers = table(out), table(out.with_name("some_layers.csv"), ["run", "layer"])
    assert list(rows.index) == ["a", "b"] and list(layers.index) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert tuple(rows.columns[: len(COLUMNS) - 1]) == COLUMNS[1:] and COLUMNS[-2:] == ("gap", "gap_accuracy")
    for name in "ab":
        row = rows.loc[name]
        flags, result, model, initial = load_run(runs / name)
        assert {key: row[key] for key in SETTINGS} == pytest.approx({key: flags[key] for key in SETTINGS})
        for key in ("gap", "gap_accuracy", "train_loss", "steps"):
            assert row[key] == result[key]
        moved = sum((p - q).square().sum().item() for p, q in zip(model.parameters(), initial.parameters()) if p.ndim == 2)
        assert row["fro_dist"] == pytest.approx(moved, rel=1e-5)
        images = data_of(flags, None, "cpu")
        parts = layer_srr(model, images.prepare(images.train_images))
        assert row["srr"] == pytest.approx(np.mean([part["srr"] for part in parts]), rel=1e-5)
        assert row["srr_rate"] == pytest.approx(layers.loc[name]["rate"].mean())


def test_what_is_measured_is_kept_until_checkpoint_or_images_change(script, runs, tmp_path, monkeypatch):
    out, asked, real = tmp_path / "measures.csv", [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda *arguments: asked.append(list(arguments[3])) or real(*arguments))

    def groups(*flags):
        """Run by run, which groups are computed."""
        asked.clear()
        assert script("measure", runs, "--out", out, *flags)[0] == 0
        return asked

    assert groups("--groups", "norms", "srr", "--images", 20) == [["norms", "srr"]] * 2
    before = out.read_bytes()
    assert groups("--groups", "srr", "--images", 20) == [] and out.read_bytes() == before
    assert groups("--groups", "path-norm", "norms", "--images", 20) == [["path-norm"]] * 2
    assert {"l2", "path_norm", "srr"} <= set(table(out).columns)
    assert len(table(out.with_name("measures_layers.csv"))) == 4
    change_weights(runs / "b" / "last.pt", "head.1.weight", 2)
    assert groups(*CHEAP) == [["norms"]]
    assert groups("--groups", "norms", "--images", 30) == [["norms"]] * 2  # of other images than it says
    (runs / "a" / "measures.json").write_text("{")
    assert groups("--groups", "norms", "--images", 30) == [["norms"]]
    monkeypatch.setattr(measure, "code_checksum", lambda: "edited")
    monkeypatch.setattr(of_runs, "code_checksum", lambda: "edited")
    assert groups("--groups", "norms", "srr", "--images", 30) == [["srr"]] * 2
    assert "\nmeasured by other code: 2 of 2" in script("measure", runs, "--out", out, "--images", 30, "--groups", "srr")[1]
    assert groups("--groups", "norms", "--images", 30, "--again") == [["norms"]] * 2
    assert "measured by other code" not in script("measure", runs, "--out", out, "--images", 30, "--groups", "norms")[1]
    shutil.rmtree(runs / "a")
    assert groups(*CHEAP) and list(table(out).index) == ["b"]  # the tables are of these runs alone


def test_names_and_what_is_left_out(script, runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "other disk" / "a")
    (runs / "again").symlink_to(tmp_path / "other disk")
    (tmp_path / "other disk" / "above").symlink_to(runs)
    (runs / "a" / "result.json").unlink()

    code, printed, _ = script("measure", runs, "--out", tmp_path / "m.csv", *CHEAP)
    assert code == 0 and "unfinished or of no epoch are left out: a\n" in printed
    assert list(table(tmp_path / "m.csv").index) == ["again/a", "b"]


BREAKS = [
    (lambda run: os.truncate(run / "last.pt", 500), "last.pt"),
    (lambda run: (run / "init.pt").unlink(), "init.pt"),
    (lambda run: (run / "result.json").write_text("{"), "result.json"),
    (lambda run: change_weights(run / "last.pt", "layers.0.ista.D", torch.nan), "not finite"),
]


@pytest.mark.faults
@pytest.mark.parametrize("damage, word", BREAKS, ids=["checkpoint", "initial weights", "result", "NaN"])
def test_a_broken_run_is_reported_and_the_others_are_measured(script, runs, tmp_path, damage, word):
    damage(runs / "a")
    code, _, error = script("measure", runs, "--out", tmp_path / "m.csv", *CHEAP)
    (line,) = [line for line in error.splitlines() if "error: " in line]
    assert code == 2 and word in line and str(runs / "a") in line and "Traceback" not in error
    assert list(table(tmp_path / "m.csv").index) == ["b"]


@pytest.mark.faults
def test_a_group_that_can_not_be_computed_leaves_the_others(script, runs, tmp_path):
    command = ("measure", runs, "--out", tmp_path / "m.csv", "--groups", "norms", "srr", "--images", 20)
    change_weights(runs / "a" / "last.pt", "layers.1.ista.D", 1e25)
    code, printed, _ = script(*command)
    assert code == 0 and "srr can't be computed: layer 2" in printed
    rows = table(tmp_path / "m.csv")
    assert np.isnan(rows.loc["a", "srr"]) and np.isfinite(rows.loc["a", "l2"])
    assert {"srr", "margin", "inverse_margin"} <= set(rows.loc["a", "flags"].split())
    assert np.isfinite(rows.loc["b", "srr"]) and "2 measured already" in script(*command)[1]


@pytest.mark.faults
def test_bad_input(script, runs, tmp_path):
    out = ("--out", tmp_path / "m.csv")
    assert_refused(script("measure", tmp_path / "nowhere", *out), "no such folder")
    assert_refused(script("measure", runs / "b" / "last.pt", *out), "--heads")
    assert_refused(script("measure", runs, "--out", tmp_path), str(tmp_path))
    assert not list(runs.glob("*/measures.json"))
