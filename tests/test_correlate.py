"""correlate.py as its user calls it: what it writes, and each complaint."""

import math

import numpy as np
import pytest
from conftest import assert_refused

from crate import statistics
from crate.files import read_csv, write_csv

AXES = ("model", "width", "lr", "dropout")
FILES = (
    "correlation.csv",
    "correlation.md",
    *(f"{name}.{kind}" for name in ("forest", "heatmap", "scatter") for kind in ("pdf", "png")),
)
FLAGS = ("--hyperparameters", "model", "lr", "dropout", "--gap", "gap", "--resamples", 100)


def rows():
    """32 models, as measure.py would tabulate them."""
    rng, table = np.random.default_rng(0), []
    for k in range(32):
        model, width = ("crate-c", "crate-n", "crate-t", "crate")[k % 4], (24, 48)[k // 4 % 2]
        row = {"run": f"run{k}", "model": model, "width": width, "lr": (1e-3, 2e-3)[k // 8 % 2], "dropout": (0, 0.1)[k // 16]}
        gap = rng.normal()
        row |= {"seed": 0, "reached_target": True, "gap": gap, "gap_accuracy": gap / 10, "flag": "ok"}
        table.append(row | {"l2": rng.normal(), "srr": gap + rng.normal(), "path_norm": math.exp(9 * gap)})
    return table


@pytest.fixture
def table(tmp_path):
    """table(rows) -> the path of a CSV file with them."""

    def write(rows):
        write_csv(tmp_path / "measures.csv", rows)
        return tmp_path / "measures.csv"

    return write


def written(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_every_file_for_each_width_and_for_all(script, table, tmp_path):
    out = tmp_path / "new" / "correlation"
    code, output, _ = script("correlate", table(rows()), *FLAGS, "--by", "width", "--out", out)
    assert code == 0 and "100 resamples" in output
    for folder, models, extra in ((out / "width=24", 16, []), (out / "width=48", 16, []), (out, 32, ["psi_width"])):
        assert written(folder) == list(FILES)
        for name in FILES[2:]:
            assert (folder / name).read_bytes().startswith(b"\x89PNG" if name.endswith("png") else b"%PDF")
        result = read_csv(folder / "correlation.csv")
        first = "measure models tau tau_low tau_high p_value tau_b ties psi_model psi_lr psi_dropout".split()
        assert list(result[0])[: 15 + len(extra)] == [*first, *extra, "Psi", "K", "sign_error_mean", "sign_error_max"]
        assert [row["measure"] for row in result] == ["path_norm", "srr", "l2"]  # sorted by tau; not run, flag, gap_accuracy
        assert float(result[0]["tau"]) == 1 and {row["models"] for row in result} == {str(models)}
        text = (folder / "correlation.md").read_text()
        assert text.startswith("| measure | model | lr | dropout |") and "100 bootstrap resamples" in text
        assert f"{float(result[1]['tau']):+.3f} [{float(result[1]['tau_low']):+.2f}" in text


def test_the_numbers_are_those_of_the_package(script, table, tmp_path):
    path = table(rows())
    flags = ("--hyperparameters", *AXES, "--gap", "gap_accuracy", "--measures", "l2", "srr", "--resamples", 200, "--seed", 3)
    assert script("correlate", path, *flags, "--out", tmp_path / "out")[0] == 0
    expected = statistics.correlate(read_csv(path), AXES, "gap_accuracy", ["l2", "srr"], resamples=200, rng=3)
    for row in read_csv(tmp_path / "out" / "correlation.csv"):
        (same,) = [other for other in expected if other["measure"] == row["measure"]]
        assert row == {key: str(value) for key, value in same.items()}


def test_models_that_missed_the_target_are_left_out_and_named(script, table, tmp_path):
    models = rows()
    models[3] |= {"reached_target": False, "gap": "", "l2": ""}
    models[9] |= {"gap": "nan"}
    code, output, _ = script("correlate", table(models), "--hyperparameters", *AXES, *FLAGS[4:], "--out", tmp_path / "out")
    assert code == 0
    assert "1 models left out, they did not reach the target: run3\n" in output
    assert "1 models left out, their gap is not finite: run9\n" in output
    assert {row["models"] for row in read_csv(tmp_path / "out" / "correlation.csv")} == {"30"}


def test_any_table_with_several_seeds(script, table, tmp_path):
    rng = np.random.default_rng(0)
    models = [{"learning rate": x, "try": t, "error": x + rng.normal(), "m/1": x, "m2": ""} for x in range(6) for t in "ab"]
    models[0]["m2"] = 1.0
    flags = ("--hyperparameters", "learning rate", "--gap", "error", "--seed-column", "try", "--resamples", 50)
    code, output, error = script("correlate", table(models), *flags, "--out", tmp_path / "out")
    assert code == 0, error
    first, second = read_csv(tmp_path / "out" / "correlation.csv")
    assert (first["measure"], first["models"], first["seeds"]) == ("m/1", "12", "2")
    assert (second["measure"], second["models"], second["note"]) == ("m2", "0", "too few models")
    assert "2 seeds" in (tmp_path / "out" / "correlation.md").read_text()


@pytest.mark.parametrize("change, flags, words", [
    ({}, ("--gap", "loss"), ("--gap loss", "no such column", "gap_accuracy", "path_norm")),
    ({}, ("--measures", "l2", "l3"), ("--measures l3", "no such column")),
    ({}, ("--hyperparameters", "modle"), ("--hyperparameters modle", "model")),
    ({}, ("--by", "depth"), ("--by depth", "no such column")),
    ({}, ("--colour", "depth"), ("--colour depth", "no such column")),
    ({}, ("--colour", "run"), ("--colour run", "32 values")),
    ({}, ("--seed-column", "depth"), ("--seed-column depth", "no such column")),
    ({}, ("--validation-points", 100, "--accuracy-gap", "depth"), ("--accuracy-gap depth", "no such column")),
    ({}, ("--measures", "l2", "l2"), ("--measures", "l2 is named twice")),
    ({}, ("--hyperparameters", "lr", "lr"), ("--hyperparameters", "lr is named twice")),
    ({}, ("--hyperparameters", "lr", "gap"), ("--gap gap", "hyperparameter")),
    ({}, ("--gap", "path_norm"), ("--gap path_norm", "--measures")),
    ({}, ("--measures", "flag"), ("--measures flag", "'ok' (run run0) is not a number")),
    ({}, ("--hyperparameters", "model", "width"), ("occurs twice", "model crate-c, width 24")),
    ({}, ("--resamples", "0"), ("--resamples", ">= 1")),
    ({"gap": "high"}, (), ("--gap gap", "'high' (run run0) is not a number")),
    ({"gap": ""}, (), ("--gap gap", "'' (run run0) is not a number")),
    ({"gap": math.inf}, (), ("rank statistics need 3 or more",)),
    ({"reached_target": False}, (), ("reached_target", "3 models")),
    ({"l2": math.nan}, ("--measures", "l2"), ("no measure is finite",)),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(script, table, tmp_path, change, flags, words):
    path = table([row | change for row in rows()])
    outcome = script("correlate", path, "--hyperparameters", *AXES, *FLAGS[4:], "--out", tmp_path / "out", *flags)
    assert_refused(outcome, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, words", [
    (None, ("no such file",)),
    ("", ("empty",)),
    ("model,gap,l2\n", ("empty",)),
    ("model,gap,l2\na,1\n", ("row 2", "fields")),
    ("model,gap,l2\na,1,2\nb,2,3\n", ("2 models", "3 or more")),
    (b"\xff\xfe\x00", ("not a CSV table",)),
])  # fmt: skip
def test_bad_tables_are_refused_in_one_line(script, tmp_path, text, words):
    if text is not None:
        (tmp_path / "measures.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    flags = ("--hyperparameters", "model", "--gap", "gap", "--out", tmp_path / "out")
    assert_refused(script("correlate", tmp_path / "measures.csv", *flags), *words)
    assert not (tmp_path / "out").exists()


def test_values_with_too_few_models_have_no_folder(script, table, tmp_path):
    models = [row for row in rows() if row["width"] == 24 or row["run"] == "run4"]
    code, output, _ = script("correlate", table(models), *FLAGS, "--by", "width", "--out", tmp_path / "out")
    assert code == 0 and "width=48: left out: --gap gap: 1 models" in output
    assert (tmp_path / "out" / "width=24").is_dir() and not (tmp_path / "out" / "width=48").exists()
    models += [row | {"seed": 1, "run": "again"} for row in models if row["run"] in ("run4", "run0", "run1", "run2")]
    models += [row | {"run": "other"} for row in rows() if row["run"] == "run5"]  # three of this width, but two with one seed
    code, output, _ = script("correlate", table(models), *FLAGS, "--by", "width", "--out", tmp_path / "seeds")
    assert code == 0 and "width=48: left out" in output and (tmp_path / "seeds" / "width=24").is_dir()
