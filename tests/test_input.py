"""Any command line and any table: a correct result, or exit code 2 and one line that says what is wrong."""

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from crate import data
from tests.conftest import run_script

pytestmark = pytest.mark.faults

SETTINGS = dict(deadline=None, database=None, derandomize=True)
SETTINGS |= dict(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
# Text that may be a flag's value or a table's cell; no digits, so that no huge model comes out of it.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Nd"), exclude_characters="\0"), max_size=8)
BAD = ["", "-1", "nan", "inf", "-inf", "1e400", "0", "0.5", "2.5", "1/2", "../x", "--", "-", "None", "true"]
BAD = st.one_of(TEXT, st.sampled_from(BAD))


def flags(known, most):
    """A command line out of {flag: good values}, some of them bad, some of them repeated, unknown ones among them."""
    good = st.one_of([st.tuples(st.just(flag), st.lists(values, min_size=1, max_size=2)) for flag, values in known.items()])
    bad = st.tuples(st.one_of(st.sampled_from(sorted(known)), TEXT.map("--".__add__)), st.lists(BAD, max_size=2))
    pairs = st.lists(st.one_of(good, good, good, good, bad), max_size=most)
    return pairs.map(lambda pairs: [text for flag, values in pairs for text in [flag, *map(str, values)]])


def check(monkeypatch, capsys, script, *arguments):
    """Run it: the exit code, 0 or 2, and in that case one line that says why."""
    capsys.readouterr()
    code = run_script(monkeypatch, script, *arguments)
    error = capsys.readouterr().err
    assert code in (0, 2), (code, error)
    assert "Traceback" not in error
    if code == 2:
        lines = [line for line in error.replace("\r", "\n").splitlines() if f"{script}.py: error: " in line]
        assert len(lines) >= 1, error
        assert error.splitlines()[-1] == lines[-1]
    return code


TRAIN = {
    "--model": st.sampled_from(["crate-c", "crate-n", "crate-t", "crate", "crate-fix", "crate-identity", "crate-e", "vit"]),
    "--preset": st.sampled_from(["auto", "laptop", "fashion", "paper"]),
    "--dataset": st.sampled_from(["digits", "fashion-mnist", "cifar10"]),
    "--train-subset": st.integers(1, 30),
    "--hold-out": st.floats(0, 0.999),
    "--augment": st.sampled_from(["none"]),
    "--image-size": st.sampled_from([4, 8, 12]),
    "--patch-size": st.sampled_from([2, 4, 8, 5]),
    "--width": st.sampled_from([4, 8, 6]),
    "--depth": st.sampled_from([1, 2]),
    "--heads": st.sampled_from([1, 2, 4]),
    "--dropout": st.floats(0, 0.99),
    "--epochs": st.sampled_from([1, 2]),
    "--batch-size": st.integers(1, 40),
    "--lr": st.floats(1e-6, 10.0),
    "--schedule": st.sampled_from(["cosine", "constant"]),
    "--weight-decay": st.floats(0, 10),
    "--clip-norm": st.floats(1e-3, 10),
    "--stop-at-loss": st.floats(1e-3, 5),
    "--srr-reg": st.floats(0, 10),
    "--srr-layer": st.sampled_from(["last", "all", "random", "1", "2"]),
    "--srr-sparsity": st.sampled_from(["l0", "l1"]),
    "--srr-lambda": st.floats(0, 10),
    "--srr-gamma": st.floats(1e-3, 10),
    "--ista-beta": st.floats(1e-3, 10),
    "--ista-lambda": st.floats(0, 10),
    "--temperature": st.sampled_from(["sqrt-p", "none"]),
    "--log-srr-every": st.integers(0, 2),
    "--seed": st.integers(0, 2**40),
    "--save-every": st.floats(0, 10),
    "--device": st.sampled_from(["auto", "cpu"]),
    "--amp": st.sampled_from(["auto", "off", "bf16", "fp16"]),
    "--shard": st.sampled_from(["1/1", "1/2", "2/2", "3/2"]),
    "--jobs": st.sampled_from([1]),
}


def test_command_lines_of_train(monkeypatch, capsys, tmp_path, faults):
    def absent(data_dir):
        raise OSError("no network")

    for name in ("fashion-mnist", "cifar10"):
        monkeypatch.setitem(data.LOADERS, name, absent)
    count, codes = itertools.count(), []
    small = ("--preset", "laptop", "--width", 8, "--heads", 2, "--depth", 2, "--patch-size", 4, "--epochs", 1)
    small += ("--train-subset", 20, "--log-srr-every", 0)

    @settings(max_examples=500, **SETTINGS)
    @given(flags(TRAIN, 5))
    def cases(arguments):
        out = tmp_path / "runs" / str(next(count))
        codes.append(check(monkeypatch, capsys, "train", *small, *arguments, "--out", out))
        results = list(out.glob("*/result.json"))
        if codes[-1] == 0 and "--status" not in arguments:
            assert results or "--help" in arguments
        for path in results:
            result = json.loads(path.read_text())
            assert math.isfinite(result["train_loss"]) and 0 <= result["val_accuracy"] <= 1

    cases()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "something was written elsewhere"
    assert codes.count(0) > 50 and codes.count(2) > 50
    counts = f"{codes.count(0)} trained, {codes.count(2)} refused in one line"
    faults("command lines of train.py, generated", len(codes), counts)


WORDS = st.sampled_from(["", "nan", "inf", "a", "True"])
CELL = st.one_of(st.floats(-10, 10).map(str), st.integers(0, 3).map(str), WORDS, TEXT)
NAMES = ("model", "lr", "gap", "srr", "seed", "l2", "reached_target", "run")


@st.composite
def tables(draw):
    """The text of a table: half of them a grid of models that makes sense, half of them with something wrong in it."""
    grid = [{"model": model, "lr": lr} for model in "abc" for lr in ("1", "2")]
    rows = [row | {"gap": str(draw(st.floats(-10, 10))), "srr": str(draw(st.floats(-10, 10)))} for row in grid]
    for name in draw(st.lists(st.one_of(st.sampled_from(NAMES[5:]), TEXT), max_size=2)):
        for row in rows:
            row.setdefault(name, "True" if name == "reached_target" else str(draw(st.floats(-10, 10))))
    lines = [list(rows[0])] + [list(row.values()) for row in rows]
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 3))):
            line = draw(st.sampled_from(lines))
            where = draw(st.integers(0, len(line)))
            line[where : where + draw(st.integers(0, 1))] = draw(st.lists(CELL, max_size=1))
        lines = lines[: draw(st.integers(0, len(lines)))]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


CORRELATE = {
    "--hyperparameters": st.sampled_from(NAMES),
    "--gap": st.sampled_from(NAMES),
    "--measures": st.sampled_from(NAMES),
    "--seed-column": st.sampled_from([*NAMES, "none"]),
    "--by": st.sampled_from(NAMES),
    "--colour": st.sampled_from(NAMES),
    "--validation-points": st.integers(1, 100),
    "--seed": st.integers(0, 2**40),
}


def test_tables_for_correlate(monkeypatch, capsys, tmp_path, faults):
    for name in ("scatter", "forest", "rank_heatmap"):  # drawn for real in test_correlate.py: here they would take minutes
        monkeypatch.setattr(f"crate.figures.{name}", lambda *a, **k: None)
    count, codes = itertools.count(), []

    @settings(max_examples=500, **SETTINGS)
    @given(tables(), st.one_of(st.just([]), flags(CORRELATE, 2)))
    def cases(table, arguments):
        out = tmp_path / "out" / str(next(count))
        (tmp_path / "table.csv").write_text(table, encoding="utf-8", newline="")
        usual = ("--hyperparameters", "model", "lr", "--gap", "gap", "--resamples", 5)
        codes.append(check(monkeypatch, capsys, "correlate", tmp_path / "table.csv", *usual, *arguments, "--out", out))
        if codes[-1] == 0 and not arguments:  # tau is that of scipy
            rows = list(csv.DictReader(io.StringIO(table, newline="")))
            rows = [row for row in rows if row.get("reached_target", "").strip().lower() not in ("false", "0")]
            pairs = [(float(row["gap"]), float(row["srr"])) for row in rows]
            pairs = np.array([pair for pair in pairs if np.isfinite(pair).all()])
            (ours,) = [r for r in csv.DictReader((out / "correlation.csv").open()) if r["measure"] == "srr"]
            if "seed" not in rows[0] and len(pairs) >= 3 and len(np.unique(pairs[:, 1])) > 1:
                assert float(ours["tau_b"]) == pytest.approx(kendalltau(*pairs.T).statistic, abs=1e-9)

    cases()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "table.csv"], "something was written elsewhere"
    assert codes.count(0) > 50 and codes.count(2) > 50
    counts = f"{codes.count(0)} analysed, {codes.count(2)} refused in one line"
    faults("tables and flags for correlate.py, generated", len(codes), counts)


MEASURE = {
    "--groups": st.sampled_from(["norms", "srr"]),
    "--images": st.integers(1, 50),
    "--jobs": st.sampled_from([1]),
    "--device": st.sampled_from(["auto", "cpu"]),
    "--heads": st.integers(1, 4),
    "--dataset": st.sampled_from(["digits"]),
}
ATTENTION = {
    "--tokens": st.integers(1, 8),
    "--depth": st.integers(1, 2),
    "--width": st.sampled_from([2, 4, 6]),
    "--heads": st.integers(1, 4),
    "--alpha": st.floats(1e-3, 10),
    "--gamma": st.floats(1e-3, 10),
    "--scale": st.floats(1e-3, 100),
    "--seed": st.integers(0, 2**40),
    "--dtype": st.sampled_from(["float64", "float32"]),
    "--out": st.sampled_from(["attention", "m"]),
}


def test_command_lines_of_the_other_scripts(monkeypatch, capsys, tmp_path, faults):
    monkeypatch.chdir(tmp_path)
    for name in ("rates_by_layer", "log_curves"):
        monkeypatch.setattr(f"crate.figures.{name}", lambda *a, **k: None)
    small = ("--preset", "laptop", "--width", 8, "--heads", 2, "--depth", 1, "--patch-size", 4, "--train-subset", 20)
    assert run_script(monkeypatch, "train", *small, "--epochs", 1, "--out", "runs") == 0
    codes = []

    @settings(max_examples=100, **SETTINGS)
    @given(st.lists(st.one_of(st.just("runs"), st.just("runs"), TEXT), max_size=2), flags(MEASURE, 3))
    def measure(runs, arguments):
        codes.append(check(monkeypatch, capsys, "measure", *runs, "--groups", "norms", *arguments, "--out", "m/m.csv"))

    @settings(max_examples=100, **SETTINGS)
    @given(flags(ATTENTION, 3))
    def attention_only(arguments):
        small = ("--tokens", 5, "--depth", 1, "--width", 4, "--heads", 2, "--out", "attention")
        codes.append(check(monkeypatch, capsys, "attention_only", *small, *arguments))

    measure()
    attention_only()
    assert codes.count(0) > 20 and codes.count(2) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention", "m", "runs"]
    counts = f"{codes.count(0)} accepted, {codes.count(2)} refused in one line"
    faults("command lines of measure.py and attention_only.py, generated", len(codes), counts)
