"""correlate.py as its user calls it: what it writes, and each complaint."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import assert_refused
from PIL import Image

from crate import figures, statistics

AXES = ("model", "width", "lr", "dropout")
FLAGS = ("--hyperparameters", "model", "lr", "dropout", "--gap", "gap", "--resamples", 100)
BY_WIDTH = (*FLAGS, "--by", "width")
FILES = ["correlation.csv", "correlation.md", "forest.png", "scatter.png", "srr.png"]


def models():
    """32 models, as measure.py would tabulate them."""
    rng, gap = np.random.default_rng(0), np.random.default_rng(1).normal(size=32)
    levels = itertools.product(("crate-c", "crate-n", "crate-t", "crate"), (24, 48), (1e-3, 2e-3), (0, 0.1))
    table = pd.DataFrame(levels, columns=AXES).assign(seed=0, reached_target=True)
    table.insert(0, "run", [f"run{k}" for k in range(32)])
    measures = {"l2": rng.normal(size=32), "srr": gap + rng.normal(size=32), "path_norm": np.exp(9 * gap)}
    return table.assign(gap=gap, gap_accuracy=gap / 10, flag="ok", **measures).astype(object)


def changed(cells):
    """The models with other cells: {(row, column): cell}, in all rows where `row` is None."""
    table = models()
    for (row, column), cell in cells.items():
        table.loc[table.index if row is None else row, column] = cell
    return table


@pytest.fixture
def call(script, tmp_path, monkeypatch):
    """call(table, *flags) -> (code, stdout, stderr). Plots take most of the time: they are drawn where `drawn` says so."""

    def run(table, *flags, drawn=False):
        if not drawn:
            for name in ("scatter", "srr_scatter", "forest"):
                monkeypatch.setattr(figures, name, lambda *values, **_: [v.touch() for v in values if isinstance(v, Path)])
        text = table.to_csv(index=False) if isinstance(table, pd.DataFrame) else table
        (tmp_path / "measures.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return script("correlate", tmp_path / "measures.csv", *(flags or FLAGS), "--out", tmp_path / "out")

    return run


def result(folder):
    return pd.read_csv(folder / "correlation.csv", keep_default_na=False, na_values=["nan"]).set_index("measure")


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_every_file_for_each_width_and_for_all(call, tmp_path):
    out = tmp_path / "out"
    for folder in ("width=96", "lr=1"):  # of an earlier correlate.py; the notes are the user's
        (out / folder).mkdir(parents=True)
        for name in ("correlation.csv", "srr.png", "reliability.csv"):
            (out / folder / name).touch()
    (out / "lr=1/notes.txt").touch()
    code, output, _ = call(models(), *BY_WIDTH)
    folders = [out / "width=24", out / "width=48", out]
    assert code == 0 and [line.split(": ")[0] for line in output.splitlines()[1:]] == [str(folder) for folder in folders]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["lr=1", "width=24", "width=48"]
    assert files(out / "lr=1") == ["notes.txt"]
    for folder, count, axes in zip(folders, (16, 16, 32), ([], [], ["width"])):
        assert files(folder) == FILES
        rows = result(folder)
        assert rows.index[0] == "path_norm" and sorted(rows.index) == ["baseline_type", "l2", "path_norm", "srr"]
        assert rows["tau"].iloc[0] == 1 and rows["tau"].is_monotonic_decreasing and set(rows["models"]) == {count}
        psi = [column for column in rows if column.startswith("psi_")]
        assert psi == [f"psi_{axis}" for axis in ("model", "lr", "dropout", *axes)]
        text = (folder / "correlation.md").read_text()
        assert text.startswith("| measure | model | lr | dropout |") and "100 bootstrap resamples" in text and "1/24" in text
        assert f"{rows['tau']['srr']:+.3f} [{rows['tau_low']['srr']:+.2f}" in text


def test_the_numbers_are_those_of_the_package(call, tmp_path):
    table = models()
    flags = ("--hyperparameters", *AXES, "--gap", "gap_accuracy", "--measures", "l2", "srr", "--resamples", 200, "--seed", 3)
    flags += ("--controls", "l2", "path_norm", "--controls", "model")
    assert call(table, *flags, drawn=True)[0] == 0
    for name in FILES[2:]:
        path = tmp_path / "out" / name
        assert Image.open(path).size[0] > 300 and path.stat().st_size <= 200_000
    table["baseline_type"] = table.groupby("model")["srr"].transform("mean")
    measures = ["l2", "srr", "baseline_type"]
    expected = statistics.correlate(
        table, AXES, "gap_accuracy", measures, strata="model", controls=[["l2", "path_norm"], ["model"]], resamples=200, rng=3
    )
    assert "rho given l2, path_norm" in (tmp_path / "out/correlation.md").read_text()
    pd.testing.assert_frame_equal(
        result(tmp_path / "out").loc[measures], pd.DataFrame(expected).set_index("measure"), check_like=True, rtol=1e-12
    )


def test_models_that_are_left_out_are_named(call, tmp_path):
    cells = {(3, "reached_target"): False, (3, "gap"): "", (3, "l2"): "text", (7, "reached_target"): 0, (9, "gap"): "#N/A"}
    code, output, _ = call(changed(cells | {(11, "gap"): "inf"}), "--hyperparameters", *AXES, *FLAGS[4:])
    assert code == 0
    assert "2 models left out, they did not reach the target: run3, run7\n" in output
    assert "2 models left out, their gap is missing or not finite: run9, run11\n" in output
    assert set(result(tmp_path / "out")["models"]) == {28}


def test_a_table_that_is_not_ours(call, tmp_path):
    """Several seeds, no model, a measure with a hole, columns that would be broken formulas."""
    rng = np.random.default_rng(0)
    rows = [{"$\\lr$": x, "try": t, "error": x + rng.normal(), "m/1 $\\norm": x, "m2": ""} for x in range(6) for t in "ab"]
    rows[0]["m2"] = 1.0
    flags = ("--hyperparameters", "$\\lr$", "--gap", "error", "--seed-column", "try", "--resamples", 50)
    code, output, error = call(pd.DataFrame(rows), *flags, drawn=True)
    assert code == 0, error
    table = result(tmp_path / "out")
    assert table[["models", "seeds"]].values.tolist() == [[12, 2], [0, 0]] and table["note"].iloc[1] == "too few models"
    assert files(tmp_path / "out") == FILES[:4] and "2 seeds" in (tmp_path / "out/correlation.md").read_text()


def test_seeds_that_pair_nothing(call, tmp_path):
    code, output, _ = call(models().assign(seed=range(32)), "--hyperparameters", *AXES, *FLAGS[4:])
    assert code == 0 and "every run has a seed of its own" in output and set(result(tmp_path / "out")["models"]) == {32}


def test_validation_losses(call, tmp_path):
    losses = np.random.default_rng(0).normal(size=(40, 50))
    np.savez(tmp_path / "losses.npz", run=[f"run{k}" for k in reversed(range(40))], losses=losses)
    flags = ("--hyperparameters", *AXES, *FLAGS[4:], "--val-losses", tmp_path / "losses.npz")
    code, output, _ = call(models(), *flags)
    assert code == 0 and "; reliability of the gap 0.9" in output and ", within model 0.9" in output
    table = pd.read_csv(tmp_path / "out/reliability.csv").set_index("run")
    assert table.loc["run3", "standard_error"] == pytest.approx(losses[36].std(ddof=1) / 50**0.5)
    assert_refused(call(models().assign(run="other"), *flags), "--val-losses", "32 runs", "such as other")
    np.savez(tmp_path / "losses.npz", run=["run0"])
    assert_refused(call(models(), *flags), "--val-losses", "arrays run (names) and losses (runs, images)")


def test_tables_as_spreadsheets_write_them(call, tmp_path):
    flags, text = ("--hyperparameters", *AXES, *FLAGS[4:]), models().to_csv(index=False)
    assert call(text, *flags)[0] == 0
    expected = (tmp_path / "out/correlation.csv").read_text()
    for same in ("\ufeff" + text.replace(",", ", "), text.replace(",", ";").replace("\n", "\r\n"), models().to_csv()):
        assert call(same, *flags)[0] == 0
        assert (tmp_path / "out/correlation.csv").read_text() == expected


def test_missing_cells_and_columns_of_text(call, tmp_path):
    missing = ("", "NA", "#N/A", "None", "NULL", "nan", "NaN", "inf")
    code, output, _ = call(changed({(k, "l2"): cell for k, cell in enumerate(missing)}), "--hyperparameters", *AXES, *FLAGS[4:])
    assert code == 0 and "flag is taken for no measure: it holds text\n" in output
    assert result(tmp_path / "out").loc["l2", ["models", "dropped"]].tolist() == [24, 8]


@pytest.mark.faults
@pytest.mark.parametrize("cells, flags, words", [
    ({}, ("--gap", "loss"), ("--gap loss", "no such column", "gap_accuracy", "path_norm")),
    ({}, ("--by", "depth"), ("--by depth", "no such column")),
    ({}, ("--hyperparameters", "lr", "gap"), ("--gap gap", "hyperparameter")),
    ({}, ("--hyperparameters", "lr", "--by", "lr"), ("--by lr", "only hyperparameter")),
    ({}, ("--gap", "path_norm"), ("--gap path_norm", "--measures")),
    ({}, ("--measures", "flag"), ("--measures flag: row 2 (run run0): 'ok' is not a number",)),
    ({(5, "l2"): "12%"}, ("--measures", "l2"), ("--measures l2: row 7 (run run5): '12%' is not a number",)),
    ({(6, "gap"): "0,5"}, (), ("--gap gap: row 8 (run run6): '0,5' is not a number",)),
    ({}, ("--hyperparameters", "model", "width"), ("--hyperparameters: the combination model crate-c, width 24 occurs twice",)),
    ({}, ("--hyperparameters", "model", "--seed-column", "run", "--strata", "run"), ("--strata run: models that share",)),
    ({}, ("--resamples", "0"), ("--resamples", ">= 1")),
    ({}, ("--val-losses", "/dev/null"), ("--val-losses /dev/null: not an .npz file",)),
    ({(None, "gap"): ""}, (), ("--gap gap: 0 models", "3 or more")),
    ({(None, "reached_target"): False}, (), ("reached_target", "3 models")),
    ({(None, "l2"): "nan"}, ("--measures", "l2"), ("--measures: none is finite",)),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(call, tmp_path, cells, flags, words):
    assert_refused(call(changed(cells), "--hyperparameters", *AXES, *FLAGS[4:], *flags), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
@pytest.mark.parametrize("text, words", [
    ("", ("not a CSV table",)),
    ("model,gap,l2\na,1,2\nb,1,2,3\n", ("not a CSV table", "line 3")),
    ("model,gap,l2\na,1,2\nb,2,3\n", ("--gap gap: 2 models", "3 or more")),
    ("model;gap;l2\na;0,5;2\n", ("--gap gap: row 2: '0,5' is not a number",)),
    (b"\xff\xfe\x00", ("not a CSV table in UTF-8",)),
])  # fmt: skip
def test_bad_tables_are_refused_in_one_line(call, tmp_path, text, words):
    assert_refused(call(text, "--hyperparameters", "model", "--gap", "gap"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_values_with_too_few_models_have_no_folder(call, script, tmp_path):
    table = models()
    code, output, _ = call(table[(table["width"] == 24) | (table["run"] == "run4")], *BY_WIDTH)
    assert code == 0 and "width=48: left out: --gap gap: 1 models" in output
    assert (tmp_path / "out/width=24").is_dir() and not (tmp_path / "out/width=48").exists()
    assert_refused(script("correlate", tmp_path / "none.csv", *FLAGS, "--out", tmp_path / "none"), "none.csv", "No such file")
