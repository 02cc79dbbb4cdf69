"""measure.py through its command line: the tables, what is kept and what is measured again, shared work, broken runs."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import measure
from crate import data
from crate.runs import Busy, load_run, locked, resolve
from crate.srr import layer_srr
from crate.training import train
from measure import COLUMNS, SETTINGS
from tests.conftest import assert_refused

CHEAP = ("--groups", "norms", "--images", 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two finished runs, a and b; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    flags = dict(width=12, heads=3, depth=2, patch_size=4, epochs=2, train_subset=100, lr=1e-2, log_srr_every=0)
    for name, model in (("a", "crate-c"), ("b", "crate")):
        options = dict(preset="laptop", device="cpu", amp="off", data_dir="data", compile=False, graph=True, save_every=0)
        (config,) = resolve(flags | {"model": model}, **options).values()
        train(config, folder / name, show_progress=False)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of them that a test may break."""
    return shutil.copytree(trained, tmp_path / "runs")


def table(path, index="run"):
    return pd.read_csv(path, index_col=index)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(path, name, factor):
    content = torch.load(path, weights_only=True)
    content["model"][name] *= factor
    torch.save(content, path)


def files_of(out):
    return [out.with_name(out.stem + ending).read_bytes() for ending in (".csv", "_layers.csv", "_val_losses.npz")]


def test_a_row_per_run_and_a_row_per_layer(script, runs, tmp_path):
    out = tmp_path / "new" / "some.csv"
    code, printed, _ = script("measure", runs, "--out", out, "--images", 20)
    assert code == 0 and "a: " in printed and "2 models, 0 measured already" in printed
    rows, layers = table(out), table(out.with_name("some_layers.csv"), ["run", "layer"])
    losses = np.load(out.with_name("some_val_losses.npz"))
    assert list(rows.index) == ["a", "b"] and list(layers.index) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert tuple(rows.columns[: len(COLUMNS) - 1]) == COLUMNS[1:] and COLUMNS[-2:] == ("gap", "gap_accuracy")
    assert not rows.columns.duplicated().any() and rows.iloc[:, len(COLUMNS) :].select_dtypes(exclude="number").empty
    images = data.load_data("digits", train_subset=100)
    for name in "ab":
        row = rows.loc[name]
        config, result, model, initial = load_run(runs / name)
        assert {key: row[key] for key in SETTINGS} == pytest.approx({key: config[key] for key in SETTINGS})
        for key in ("gap", "gap_accuracy", "train_loss", "steps"):
            assert row[key] == result[key]
        assert row["baseline_steps"] == result["steps"]
        moved = sum((p - q).square().sum().item() for p, q in zip(model.parameters(), initial.parameters()) if p.ndim == 2)
        assert row["fro_dist"] == pytest.approx(moved, rel=1e-5)
        for measured, of in (("srr", model), ("baseline_srr_init", initial)):
            parts = layer_srr(of, images.prepare(images.train_images))
            assert row[measured] == pytest.approx(np.mean([part["srr"] for part in parts]), rel=1e-5)
        assert row["rate_subspaces_released"] == pytest.approx(layers.loc[name]["rate_subspaces_released"].mean())
        assert losses["losses"][list(losses["run"]).index(name)].mean() == pytest.approx(result["val_loss"], rel=1e-5)


def test_what_is_measured_is_kept_until_checkpoint_or_images_change(script, runs, tmp_path, monkeypatch):
    out, asked = tmp_path / "measures.csv", []
    real = measure.measure
    monkeypatch.setattr(measure, "measure", lambda *arguments: asked.append(list(arguments[3])) or real(*arguments))

    def groups(*flags):
        """Run by run, which groups are computed; those of an earlier call stay in the table."""
        asked.clear()
        assert script("measure", runs, "--out", out, *flags)[0] == 0
        return asked

    assert groups("--groups", "norms", "sharpness", "--images", 20) == [["norms", "sharpness"]] * 2
    before = out.read_bytes()
    assert groups("--groups", "sharpness", "--images", 20) == [] and out.read_bytes() == before
    assert groups("--groups", "srr", "norms", "--images", 20) == [["srr"]] * 2
    full = table(out)
    assert len(table(out.with_name("measures_layers.csv"))) == 4
    assert sorted(json.loads((runs / "b" / "measures.json").read_text())["groups"]) == ["norms", "sharpness", "srr"]
    change_weights(runs / "b" / "last.pt", "head.1.weight", 2)
    assert groups("--groups", "norms", "--images", 20) == [["norms"]]
    assert table(out).loc["b", "l2"] > full.loc["b", "l2"] and table(out).loc["a", "l2"] == full.loc["a", "l2"]
    assert groups("--groups", "norms", "--images", 30) == [["norms"]] * 2  # of other images than it says
    (runs / "a" / "measures.json").write_text("{")
    assert groups("--groups", "srr", "--images", 30) == [["srr"]] * 2
    script("measure", runs / "b", "--out", out, *CHEAP)
    assert list(table(out).index) == ["b"]  # the table is of these runs alone
    shutil.rmtree(tmp_path / "runs" / "a")
    (runs / "b" / "val_losses.npy").unlink()
    assert groups("--groups", "path-norm", "--images", 30) and not out.with_name("measures_val_losses.npz").exists()


def test_names(script, runs, tmp_path, monkeypatch):
    out = tmp_path / "measures.csv"
    shutil.copytree(runs / "a", runs / "again" / "a")
    script("measure", runs, "--out", out, *CHEAP)
    assert list(table(out).index) == ["a", "again/a", "b"]
    monkeypatch.chdir(runs / "b")
    assert script("measure", ".", "--out", out, *CHEAP)[0] == 0 and list(table(out).index) == ["b"]


def test_a_run_that_another_process_holds_is_left_to_it(script, runs, tmp_path, monkeypatch):
    out = tmp_path / "measures.csv"

    @contextmanager
    def lock(folder):
        if folder.name == "a":
            raise Busy
        with locked(folder):
            yield

    monkeypatch.setattr(measure, "locked", lock)
    code, printed, _ = script("measure", runs, "--out", out, *CHEAP)
    assert code == 0 and "1 models, 1 left to other processes" in printed and list(table(out).index) == ["b"]


@pytest.mark.slow
@pytest.mark.faults
def test_two_commands_at_once_and_a_kill_lose_nothing(script, runs, tmp_path, faults):
    expected, out = tmp_path / "expected.csv", tmp_path / "measures.csv"
    for i in range(4):
        shutil.copytree(runs / "ab"[i % 2], runs / f"run{i}")
    flags = ("--groups", "norms", "srr", "--images", 20)
    script("measure", runs, "--out", expected, *flags)
    for path in runs.glob("*/measures.json"):
        path.unlink()

    def start(jobs):
        command = [sys.executable, "measure.py", runs, "--out", out, *flags, "--jobs", jobs]
        return subprocess.Popen(list(map(str, command)), cwd=Path(measure.__file__).parent)

    killed = start(1)
    while not list(runs.glob("*/measures.json")):
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    assert not out.exists()
    assert [process.wait(120) for process in (start(1), start(2))] == [0, 0]
    assert files_of(out)[:2] == files_of(expected)[:2]
    faults("two measure.py and a third process at once, after a kill", 1, "one complete table")


def truncate(path):
    path.write_bytes(path.read_bytes()[:500])


BREAKS = {
    "truncated checkpoint": (lambda run: truncate(run / "last.pt"), "last.pt"),
    "no checkpoint": (lambda run: (run / "last.pt").unlink(), "last.pt"),
    "another run's checkpoint": (lambda run: shutil.copy(run / "../b/last.pt", run / "last.pt"), "last.pt"),
    "no initial weights": (lambda run: (run / "init.pt").unlink(), "init.pt"),
    "truncated initial weights": (lambda run: truncate(run / "init.pt"), "init.pt"),
    "half a config": (lambda run: (run / "config.json").write_text('{"model": "crate"}'), "config.json"),
    "half a result": (lambda run: (run / "result.json").write_text("{}"), "result.json"),
    "malformed result": (lambda run: (run / "result.json").write_text("{"), "result.json"),
    "other width": (lambda run: change(run / "config.json", width=24), "width is 12 there but 24"),
    "weights of NaN": (lambda run: change_weights(run / "last.pt", "layers.0.ista.D", torch.nan), "not finite"),
    "a folder that can't be written": (lambda run: (run / ".lock").unlink() or (run / ".lock").mkdir(), ".lock"),
}


@pytest.mark.faults
@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_run_is_reported_and_the_others_are_measured(script, runs, tmp_path, how, faults):
    out, (damage, word) = tmp_path / "measures.csv", BREAKS[how]
    damage(runs / "a")
    code, _, error = script("measure", runs, "--out", out, *CHEAP)
    lines = [line for line in error.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1 and word in lines[0] and str(runs / "a") in lines[0] and "Traceback" not in error
    assert list(table(out).index) == ["b"]
    faults("a broken run, measured", 1, "exit code 2, one line; the others measured")


@pytest.mark.faults
def test_a_group_that_can_not_be_computed_leaves_the_others(script, runs, tmp_path, faults):
    out, flags = tmp_path / "measures.csv", ("--groups", "norms", "srr", "--images", 20)
    script("measure", runs, "--out", out, *flags)
    change_weights(runs / "a" / "last.pt", "layers.1.ista.D", 1e25)
    code, printed, _ = script("measure", runs, "--out", out, *flags)
    assert code == 0 and "srr can't be computed: layer 2" in printed
    row = table(out).loc["a"]
    assert row[["srr", "srr_l0"]].isna().all() and np.isfinite(row["l2"]) and "srr" in row["flags"].split()
    assert np.isfinite(table(out).loc["b", "srr"])
    assert "NaN" not in (runs / "a" / "measures.json").read_text()
    assert "2 measured already" in script("measure", runs, "--out", out, *flags)[1]
    faults("tokens that are not finite, measured", 1, "NaN and a flag; other groups kept")


def test_unfinished_runs_are_named(script, runs, tmp_path):
    (runs / "a" / "result.json").unlink()
    code, printed, _ = script("measure", runs, "--out", tmp_path / "measures.csv", *CHEAP)
    assert code == 0 and "1 unfinished runs are left out: a\n" in printed
    assert list(table(tmp_path / "measures.csv").index) == ["b"]
    (runs / "b" / "result.json").unlink()
    assert_refused(script("measure", runs, "--out", tmp_path / "measures.csv", *CHEAP), "no finished run")


@pytest.mark.faults
def test_bad_input(script, runs, tmp_path, faults):
    out = tmp_path / "measures.csv"
    (tmp_path / "empty").mkdir()
    wrong = [
        ((tmp_path / "nowhere",), "no such folder"), ((tmp_path / "empty",), "no run"), ((runs, tmp_path / "empty"), "empty"),
        ((runs, "--images", 0), "--images"), ((runs, "--jobs", 0), "--jobs"), ((runs, "--groups", "flatness"), "flatness"),
        ((runs, "--device", "abacus"), "--device abacus"), ((runs / "b" / "last.pt",), "--heads"), ((), "RUN_OR_FOLDER"),
    ]  # fmt: skip
    for arguments, word in wrong:
        assert_refused(script("measure", *arguments, "--out", out), word)
    assert_refused(script("measure", runs, "--out", tmp_path), str(tmp_path))
    assert_refused(script("measure", runs, "--out", runs / "a" / "last.pt" / "x.csv"), "--out")
    assert not out.exists() and not list(runs.glob("*/measures.json"))
    faults("wrong arguments of measure.py", len(wrong) + 2, "refused in one line")


def test_every_flag_has_a_default(script):
    code, printed, _ = script("measure", "--help")
    options = printed.split("options:")[1].replace("\n  -", "\0").split("\0")[2:]
    assert code == 0 and len(options) >= 8 and all("default" in option for option in options)
