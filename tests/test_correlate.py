"""correlate.py as its user calls it: what it writes, and each complaint."""

import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from crate import figures, ranks
from tests.conftest import assert_refused

AXES = ("model", "width", "lr", "dropout")
FLAGS = ("--hyperparameters", "model", "lr", "dropout", "--resamples", 100)
ALL = ("--hyperparameters", *AXES, *FLAGS[4:])
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
            for name in ("scatter", "forest"):
                monkeypatch.setattr(figures, name, lambda *values, **_: [v.touch() for v in values if isinstance(v, Path)])
        text = table.to_csv(index=False) if isinstance(table, pd.DataFrame) else table
        read, write = os.pipe()  # a table may come out of one, and be read once
        os.write(write, text if isinstance(text, bytes) else text.encode())
        os.close(write)
        outcome = script("correlate", f"/dev/fd/{read}", *(flags or FLAGS), "--out", tmp_path / "out")
        os.close(read)
        return outcome

    return run


def result(folder, gap="gap"):
    table = pd.read_csv(folder / "correlation.csv", keep_default_na=False, na_values=["nan"])
    return table[table["gap"] == gap].set_index("measure")


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_every_file_for_each_width_and_for_all(call, tmp_path):
    out = tmp_path / "out"
    code, output, _ = call(models(), *BY_WIDTH)
    folders = [out / "width=24", out / "width=48", out]
    assert code == 0 and [line.split(": ")[0] for line in output.splitlines()[1:]] == [str(folder) for folder in folders]
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["width=24", "width=48"]
    for folder, count, axes in zip(folders, (16, 16, 32), ([], [], ["width"])):
        assert files(folder) == FILES
        for gap in ("gap", "gap_accuracy"):
            rows = result(folder, gap)
            assert rows.index[0] == "path_norm" and {*rows.index[1:]} == {"baseline_lr", "baseline_type", "l2", "srr"}
            assert rows["tau"].iloc[0] == 1 and rows["tau"].is_monotonic_decreasing and set(rows["models"]) == {count}
            psi = [column for column in rows if column.startswith("psi_")]
            assert psi == [f"psi_{axis}" for axis in ("model", "lr", "dropout", *axes)]
        text, rows = (folder / "correlation.md").read_text(), result(folder)
        assert text.startswith("| measure | model | lr | dropout |") and "100 bootstrap resamples" in text
        assert "| tau | tau, same model | tau, same model, lr | models |" in text and "`gap_accuracy`" in text
        assert f"{rows['tau']['srr']:+.2f} [{rows['tau_low']['srr']:+.2f}" in text


def test_the_numbers_are_those_of_the_package(call, tmp_path):
    table, same = models(), [("width",), ("model", "dropout")]
    flags = ("--gap", "gap_accuracy", "--measures", "l2", "srr", "--same", "width", "model,dropout")
    assert call(table, *ALL, *flags, drawn=True)[0] == 0
    for name in FILES[2:]:
        path = tmp_path / "out" / name
        assert Image.open(path).size[0] > 300 and path.stat().st_size <= 200_000
    table = table.assign(baseline_type=table.groupby("model")["srr"].transform("mean"), baseline_lr=table["lr"]).infer_objects()
    measures = ["l2", "srr", "baseline_type", "baseline_lr"]
    expected = pd.DataFrame(ranks.correlate(table, AXES, "gap_accuracy", measures, same, resamples=100))
    found = result(tmp_path / "out", "gap_accuracy").loc[measures]
    pd.testing.assert_frame_equal(found, expected.set_index("measure"), check_like=True, rtol=1e-12)


def test_what_is_left_out_is_named(call, tmp_path):
    """Models, columns of text, and cells without a number."""
    cells = {(3, "reached_target"): False, (3, "gap"): "", (7, "reached_target"): 0, (9, "gap"): "#N/A", (11, "gap"): "inf"}
    missing = ("", "NA", "#N/A", "None", "NULL", "nan", "  ", "inf")
    cells |= {(20 + k, "l2"): cell for k, cell in enumerate(missing)}
    code, output, error = call(changed(cells | {(3, "run"): ""}), *ALL)
    assert code == 0 and "not measures: flag\n" in output and "without a number: l2 8\n" in output, error
    assert "2 models left out, which missed the target: , run7\n" in output
    assert "2 models left out, which have no finite gap: run9, run11\n" in output
    models = result(tmp_path / "out")["models"]
    assert (
        set(models.drop("l2")) == {28}
        and models["l2"] == 20
        and result(tmp_path / "out", "gap_accuracy")["models"]["srr"] == 30
    )


def test_a_table_that_is_not_ours(call, tmp_path):
    """Several seeds, no model, a measure with holes, a name with $ and |."""
    rng, measure = np.random.default_rng(0), r"$\norm w|_2$"
    rows = [{"x": x, "seed": t, "error": x + rng.normal(), measure: x, "m2": ""} for x in range(6) for t in "ab"]
    rows[0]["m2"], rows[3][measure] = 1.0, np.nan
    flags = ("--hyperparameters", "x", "--gap", "error", "--resamples", 50)
    code, output, error = call(pd.DataFrame(rows), *flags, drawn=True)
    assert code == 0, error
    assert "12 models of 6 settings: models of one setting are taken for its seeds" in output
    table = result(tmp_path / "out", "error")
    assert table["models"].to_dict() == {measure: 11, "m2": 1, "baseline_other_seed": 12} and np.isnan(table["tau"]["m2"])
    assert files(tmp_path / "out") == FILES[:4]
    text = (tmp_path / "out/correlation.md").read_text()
    assert "50 bootstrap resamples of the settings" in text and text.count("![") == 2
    code, output, error = call(pd.DataFrame(rows), *flags, "--mean-over-seeds", "--same", "x")
    assert code == 0 and "6 settings, 3 measures" in output, error
    means = pd.DataFrame(rows).groupby("x", as_index=False)[["error", measure]].mean()
    (expected,) = ranks.correlate(means, ["x"], "error", [measure], same=[("x",)], resamples=50)
    found = result(tmp_path / "out", "error").loc[measure]
    assert found.drop("gap").to_dict() == pytest.approx({key: expected[key] for key in found.index[1:]}, nan_ok=True)


def test_levels_are_what_the_cells_say(call, tmp_path):
    """None and NA are levels; 48 and 48.0 are one, and 0.001 of float32; a row of commas is no model."""
    table = models().astype({"width": str, "lr": str})
    table.loc[::2, "width"] += ".0"
    table.loc[::3, "lr"] = [f"{np.float32(lr):.17g}" for lr in table.loc[::3, "lr"].astype(float)]
    table["model"] = table["model"].map({"crate-c": "None", "crate-n": "NA", "crate-t": "nan", "crate": "crate"})
    table["dropout"] = ["0.1" if k % 2 else "none" for k in range(32)]  # text, in which 0.10 is 0.1
    table.loc[1::4, "dropout"] = "0.10"
    lines = table.to_csv(index=False).splitlines()
    assert call("\n".join([*lines[:5], "," * (table.shape[1] - 1), "", *lines[5:]]), *BY_WIDTH)[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("width=*")) == ["width=24", "width=48"]
    found = result(tmp_path / "out")
    assert call(models(), *BY_WIDTH)[0] == 0
    pd.testing.assert_frame_equal(found, result(tmp_path / "out"))
    assert call(table, *ALL, "--by", "model")[0] == 0
    assert {path.name for path in (tmp_path / "out").glob("*=*")} == {"model=None", "model=NA", "model=nan", "model=crate"}


def test_what_was_written_before_is_replaced_and_nothing_else(call, script, tmp_path):
    out = tmp_path / "out"
    assert call(models(), *BY_WIDTH)[0] == 0
    (out / "width=24/mine.txt").touch()
    assert_refused(call(models(), *BY_WIDTH, "--gap", "path_norm"), "--measures")
    assert files(out) == FILES and files(out / "width=48") == FILES
    assert call(models().drop(columns="srr"), *ALL)[0] == 0
    assert files(out) == FILES[:4] and files(out / "width=24") == ["mine.txt"] and not (out / "width=48").exists()
    (out / "srr.png").write_text("mine")  # it is not in correlation.md
    assert call(models().drop(columns="srr"), *ALL)[0] == 0 and (out / "srr.png").read_text() == "mine"
    (out / FILES[0]).write_text(text := models().to_csv(index=False))
    assert_refused(script("correlate", out / FILES[0], *ALL, "--out", out), f"--out {out}", FILES[0])
    assert (out / FILES[0]).read_text() == text
    (mine := tmp_path / "mine").mkdir()
    (mine / "scatter.png").touch()
    assert_refused(script("correlate", out / FILES[0], *ALL, "--out", mine), f"--out {mine}", "scatter.png", "another folder")
    assert files(mine) == ["scatter.png"]


MODEL = ("--hyperparameters", "model")


@pytest.mark.faults
@pytest.mark.parametrize("cells, flags, words", [
    ({}, (*ALL, "--gap", "loss"), ("--gap loss", "no such column", "gap_accuracy", "path_norm")),
    ({}, (*ALL, "--by", "depth"), ("--by depth", "no such column")),
    ({}, (*ALL, "--same", "model,depth"), ("--same depth", "no such column")),
    ({}, (*MODEL, "gap"), ("--gap gap", "--hyperparameters")),
    ({}, ("--hyperparameters", "lr", "--by", "lr"), ("--hyperparameters", "lr 0.001", "occurs twice")),
    ({}, (*MODEL, "width"), ("--hyperparameters: model crate-c, width 24 occurs twice",)),
    ({}, (*ALL, "--gap", "path_norm"), ("--measures", "--gap path_norm")),
    ({}, (*ALL, "--measures", "flag"), ("--measures flag: line 2: 'ok' is not a number",)),
    ({}, (*ALL, "--resamples", "0"), ("--resamples", ">= 1")),
    *(({(5, "l2"): cell}, ALL, ("column l2: line 7", cell, "not a number")) for cell in ("31 %", "about 30", "1_000", "−3")),
    ({(6, "gap"): "0,5"}, ALL, ("--gap gap: line 8: '0,5' is not a number",)),
    ({(None, "l2"): "nan"}, (*ALL, "--measures", "l2"), ("--measures: none is finite",)),
    ({(4, "lr"): ""}, ALL, ("column lr: line 6", "empty cell")),
    ({(4, "model"): "a/b"}, (*ALL, "--by", "model"), ("--by model", "a/b", "name of a folder")),
    ("", MODEL, ("not a CSV table",)),
    ("model,gap,l2\na,1,2\nb,1\n", MODEL, ("line 3 has 2 cells, the header 3",)),
    ("model,gap,l2,l2\na,1,2,3\n", MODEL, ("two columns are called l2",)),
    ("model,gap,l2\na,1,2\nb,2,3\n", MODEL, ("--gap gap: 2 models", "3 or more")),
    ("model,l2\na,1\nb,2\n", MODEL, ("--gap gap: no such column", "model, l2")),
    ("model;gap;l2\na;0,5;2\n", MODEL, ("line 2 has 2 cells, the header 1",)),
    ('model,gap,l2\na,1,"2\n', MODEL, ("not a CSV table",)),
    (b"\xff\xfe\x00", MODEL, ("not a CSV table in UTF-8",)),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(call, tmp_path, cells, flags, words):
    table = changed(cells) if isinstance(cells, dict) else cells
    assert_refused(call(table, *flags), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_values_with_too_few_models_have_no_folder(call, script, tmp_path):
    table = models()
    code, output, _ = call(table[(table["width"] == 24) | (table["run"] == "run4")], *BY_WIDTH)
    assert code == 0 and "width=48: left out: --gap gap: 1 models" in output
    assert (tmp_path / "out/width=24").is_dir() and not (tmp_path / "out/width=48").exists()
    assert_refused(script("correlate", tmp_path / "none.csv", *FLAGS, "--out", tmp_path / "none"), "none.csv", "No such file")
