"""measure.py through its command line: the tables, what is skipped, broken and unfinished runs, bad input."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import measure
from crate import data
from crate.checkpoint import load_checkpoint, load_run
from crate.config import DATASETS, DEFAULTS
from crate.measures import COLUMNS, SETTINGS
from crate.srr import layer_srr
from crate.training import train
from tests.conftest import assert_refused

CHEAP = ("--groups", "norms", "--images", 20, "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two finished runs, a and b; not to be changed."""
    size, channels, classes = DATASETS["digits"]
    config = DEFAULTS | dict(dataset="digits", patch_size=4, image_size=size, channels=channels, classes=classes)
    config |= dict(width=12, heads=3, depth=2, epochs=2, train_subset=100, lr=1e-2)
    config |= dict(data_dir="data", device="cpu", amp="off", compile=False, save_every=0)
    folder = tmp_path_factory.mktemp("runs")
    for name, model in (("a", "crate-c"), ("b", "crate")):
        train(config | {"model": model}, folder / name, False)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of them that a test may break."""
    return shutil.copytree(trained, tmp_path / "runs")


def table(path):
    with open(path, newline="") as stream:
        return {(row["run"], row.get("layer")): row for row in csv.DictReader(stream)}


def test_a_row_per_run_and_a_row_per_layer(script, runs, tmp_path):
    out = tmp_path / "new" / "measures.csv"
    code, printed, error = script("measure", runs, "--out", out, "--images", 20, "--device", "cpu")
    assert code == 0 and "a: " in printed and "2 runs, 0 measured already" in printed
    rows, layers = table(out), table(out.with_name("measures_layers.csv"))
    assert list(rows) == [("a", None), ("b", None)] and list(layers) == [(run, l) for run in "ab" for l in "12"]
    for name in "ab":
        row, config = rows[name, None], json.loads((runs / name / "config.json").read_text())
        result = json.loads((runs / name / "result.json").read_text())
        columns = list(row)
        assert tuple(columns[: len(COLUMNS)]) == COLUMNS and COLUMNS[-2:] == ("gap", "gap_accuracy")
        for key in SETTINGS:
            assert row[key] == ("" if config[key] is None else str(config[key]))
        for key in ("gap", "gap_accuracy", "train_loss"):
            assert float(row[key]) == result[key]
        for key in columns[len(COLUMNS) :]:
            float(row[key])  # every group's measures are there
        assert set(measure.GROUPS.values()) <= set(columns[len(COLUMNS) :])
        _, model = load_run(runs / name)
        parts = layer_srr(model, data.load_data("digits", train_subset=100).train_images)
        for l, part in enumerate(parts, start=1):
            assert float(layers[name, str(l)]["rate"]) == pytest.approx(part["rate"])
        assert float(row["srr"]) == pytest.approx(sum(part["srr"] for part in parts) / 2)
        initial = load_checkpoint(runs / name / "init.pt")["model"]
        moved = sum(((p.detach() - initial[key]) ** 2).sum().item() for key, p in model.named_parameters() if p.ndim == 2)
        assert float(row["fro_dist"]) == pytest.approx(moved, rel=1e-5)


def test_what_is_measured_is_skipped_unless_its_checkpoint_changed(script, runs, tmp_path):
    out = tmp_path / "measures.csv"
    script("measure", runs / "a", runs / "b", "--out", out, *CHEAP)
    before = out.read_bytes()
    assert "2 runs, 2 measured already" in script("measure", runs / "b", runs / "a", "--out", out, *CHEAP)[1]
    assert out.read_bytes() == before
    state = torch.load(runs / "b" / "last.pt", weights_only=True)
    state["model"]["head.1.weight"] *= 2
    torch.save(state, runs / "b" / "last.pt")
    assert "2 runs, 1 measured already" in script("measure", runs, "--out", out, *CHEAP)[1]
    assert table(out)["a", None] == list(csv.DictReader(before.decode().splitlines()))[0]
    assert float(table(out)["b", None]["l2"]) > float(list(csv.DictReader(before.decode().splitlines()))[1]["l2"])
    assert "2 runs, 0 measured already" in script("measure", runs, "--out", out, *CHEAP, "--redo")[1]
    assert "2 runs, 0 measured already" in script("measure", runs, "--out", out, *CHEAP, "--images", 30)[1]


def test_another_group_completes_a_row(script, runs, tmp_path):
    out = tmp_path / "measures.csv"
    script("measure", runs, "--out", out, *CHEAP)
    assert "srr" not in table(out)["a", None]
    script("measure", runs / "a", "--out", out, "--groups", "norms", "srr", "path-norm", *CHEAP[2:])
    rows = table(out)
    assert float(rows["a", None]["srr"]) and rows["b", None]["srr"] == "" and float(rows["b", None]["l2"])
    assert tuple(rows["b", None])[: len(COLUMNS)] == COLUMNS
    script("measure", runs, "--out", out, *CHEAP, "--redo")  # replaces rows, but none of their groups gets lost
    assert table(out) == rows
    assert list(table(out.with_name("measures_layers.csv"))) == [("a", "1"), ("a", "2")]


def test_an_interruption_keeps_what_is_measured(script, runs, tmp_path, monkeypatch):
    out, real = tmp_path / "measures.csv", measure.measure_one

    def interrupted(path, options):
        if path.name == "b":
            raise KeyboardInterrupt
        return real(path, options)

    monkeypatch.setattr(measure, "measure_one", interrupted)
    assert script("measure", runs, "--out", out, *CHEAP)[0] == 130
    assert list(table(out)) == [("a", None)]
    monkeypatch.setattr(measure, "measure_one", real)
    assert "2 runs, 1 measured already" in script("measure", runs, "--out", out, *CHEAP)[1]
    assert list(table(out)) == [("a", None), ("b", None)]


def test_processes_change_nothing(script, runs, tmp_path):
    groups = ("--groups", "pac-bayes", "srr", *CHEAP[2:])
    for jobs in (1, 2):
        assert script("measure", runs, "--out", tmp_path / f"{jobs}.csv", *groups, "--jobs", jobs)[0] == 0
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    assert (tmp_path / "1_layers.csv").read_bytes() == (tmp_path / "2_layers.csv").read_bytes()


def truncate(path):
    path.write_bytes(path.read_bytes()[:500])


BREAKS = {
    "truncated checkpoint": (lambda run: truncate(run / "last.pt"), "last.pt"),
    "no checkpoint": (lambda run: (run / "last.pt").unlink(), "last.pt"),
    "no initial weights": (lambda run: (run / "init.pt").unlink(), "init.pt"),
    "truncated initial weights": (lambda run: truncate(run / "init.pt"), "init.pt"),
    "no config": (lambda run: (run / "config.json").unlink(), "config.json"),
    "half a config": (lambda run: (run / "config.json").write_text('{"model": "crate"}'), "config.json"),
    "half a result": (lambda run: (run / "result.json").write_text("{}"), "result.json says None"),
    "malformed result": (lambda run: (run / "result.json").write_text("{"), "result.json"),
    "other width": (lambda run: change(run / "config.json", width=24), "width is 12 in it but 24"),
    "weights of NaN": (lambda run: nan(run / "last.pt"), "not finite"),
}


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nan(path):
    state = torch.load(path, weights_only=True)
    state["model"]["layers.0.ista.D"].fill_(torch.nan)
    torch.save(state, path)


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_run_is_reported_and_the_others_are_measured(script, runs, tmp_path, how):
    out, (damage, word) = tmp_path / "measures.csv", BREAKS[how]
    damage(runs / "a")
    code, _, error = script("measure", runs, "--out", out, "--groups", "srr", *CHEAP[2:])
    lines = [line for line in error.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1 and word in lines[0] and str(runs / "a") in lines[0] and "Traceback" not in error
    assert list(table(out)) == [("b", None)]


def test_unfinished_runs_are_counted_and_named(script, runs, tmp_path):
    (runs / "a" / "result.json").unlink()
    code, printed, _ = script("measure", runs, "--out", tmp_path / "measures.csv", *CHEAP)
    assert code == 0 and "1 unfinished" in printed and re.search(r"\ba\b", printed)
    assert list(table(tmp_path / "measures.csv")) == [("b", None)]
    (runs / "b" / "result.json").unlink()
    assert_refused(script("measure", runs, "--out", tmp_path / "measures.csv", *CHEAP), "no finished run")


def test_bad_input(script, runs, tmp_path, monkeypatch):
    out = tmp_path / "measures.csv"
    (tmp_path / "empty").mkdir()
    assert_refused(script("measure", tmp_path / "nowhere", "--out", out), "nowhere", "no such folder")
    assert_refused(script("measure", tmp_path / "empty", "--out", out), "empty", "no run")
    assert_refused(script("measure", runs, runs / "a", tmp_path / "empty", "--out", out), "empty")
    assert_refused(script("measure", runs, "--images", 0, "--out", out), "--images", "0")
    assert_refused(script("measure", runs, "--images", 10_001, "--out", out), "--images", "10000")
    assert_refused(script("measure", runs, "--jobs", 0, "--out", out), "--jobs")
    assert_refused(script("measure", runs, "--groups", "flatness", "--out", out), "--groups", "flatness")
    assert_refused(script("measure", runs, "--device", "abacus", "--out", out), "--device abacus")
    assert_refused(script("measure", runs, "--out", tmp_path), str(tmp_path))
    shutil.copytree(runs / "a", tmp_path / "others" / "a")
    assert_refused(script("measure", runs, tmp_path / "others", "--out", out), "of one name")
    for text in ("", "run,gap\n", "run,gap\na,1,2\n", "name,tau\nl2,0.5\n", "\x00\xff"):
        out.write_text(text)
        assert_refused(script("measure", runs, "--out", out, *CHEAP), "measures.csv")
        assert out.read_text() == text
    out.unlink()

    def offline(folder):
        raise OSError("no network")

    monkeypatch.setitem(data.LOADERS, "cifar10", offline)
    change(runs / "b" / "config.json", dataset="cifar10")
    assert_refused(script("measure", runs, "--out", out, *CHEAP), "--data-dir", "cifar10")
    assert not out.exists()


def test_released_checkpoint(script, runs, tmp_path):
    _, model = load_run(runs / "b")
    names = {
        "patch_embedding.0.": "to_patch_embedding.1.", "patch_embedding.1.": "to_patch_embedding.2.",
        "patch_embedding.2.": "to_patch_embedding.3.", "head.": "mlp_head.",
    }  # fmt: skip
    layer = {"norm1.": "0.norm.", "mssa.U.": "0.fn.qkv.", "mssa.W.": "0.fn.to_out.0.", "norm2.": "1.norm."}
    layer |= {"ista.D": "1.fn.weight"}
    names |= {f"layers.{l}.{ours}": f"module.transformer.layers.{l}.{name}" for l in range(2) for ours, name in layer.items()}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = re.sub("^" + re.escape(ours), theirs, name)
        state[name] = tensor
    checkpoint, out = tmp_path / "crate.pth", tmp_path / "measures.csv"
    torch.save({"state_dict": state}, checkpoint)
    arguments = ("--out", out, "--groups", "srr", *CHEAP[2:])
    assert script("measure", checkpoint, *arguments, "--heads", 3, "--dataset", "digits")[0] == 0
    assert script("measure", runs / "b", *arguments)[0] == 0
    released, run = (table(out)[name, None] for name in ("crate.pth", "b"))
    assert released["l2"] == run["l2"] and released["model"] == "crate" and released["width"] == "12"
    assert released["l2_dist"] == released["fro_dist"] == "" != run["l2_dist"]
    assert float(released["gap"]) == pytest.approx(float(released["val_loss"]) - float(released["train_loss"]))
    assert script("measure", checkpoint, *arguments)[0] == 0  # measured already: needs no flags
    for flags, word in (((), "--heads"), (("--heads", 5, "--dataset", "digits"), "--heads 5")):
        code, _, error = script("measure", checkpoint, *arguments, "--redo", *flags)
        assert code == 2 and word in error and "Traceback" not in error


def test_help_needs_no_torch():
    program = "import sys, measure; sys.argv[1:] = ['--help']\ntry: measure.main()\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_only_drops_other_runs(script, runs, tmp_path):
    out = tmp_path / "measures.csv"
    assert script("measure", runs, "--out", out, "--groups", "srr", *CHEAP[2:])[0] == 0
    shutil.rmtree(runs / "a")
    assert script("measure", runs, "--out", out, "--groups", "srr", *CHEAP[2:])[0] == 0
    assert {run for run, _ in table(out)} == {"a", "b"}
    assert script("measure", runs, "--out", out, "--groups", "srr", *CHEAP[2:], "--only")[0] == 0
    assert {run for run, _ in table(out)} == {run for run, _ in table(out.with_name("measures_layers.csv"))} == {"b"}
