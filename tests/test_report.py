"""crate.report: run folders become tables, tables a report. tests/test_results.py rebuilds the published reports."""

import numpy as np
import pandas as pd
from scipy import stats

from crate import figures
from crate.model import VARIANTS, Variant
from crate.runs import read_log, read_run
from tests.conftest import assert_refused
from tests.processes import SMALL

EXPERIMENTS = {
    "table2": ("--model", "crate", "crate-c", "--srr-reg", 0, 0.1, "--epochs", 3, "--lr", 0.01),
    "layers": ("--width", 12, 24, "--epochs", 0),
    "table6": ("--srr-reg", 0.1, "--srr-layer", "random", 2, 1, "--epochs", 1),
    "grid": ("--epochs", 1),
}


def test_the_report_says_what_the_runs_say(script, tmp_path):
    """Three seeds each. A run that can't be read is named and left out."""
    runs = tmp_path / "runs"
    for name, flags in EXPERIMENTS.items():
        assert script("train", *SMALL, *flags, "--seed", 0, 1, 2, "--out", runs / name)[0] == 0
    empty, torn, unfinished = sorted((runs / "grid").iterdir())
    (empty / "result.json").write_text("{")
    (torn / "log.jsonl").write_text('{"epoch": 0}\n{"epo')
    (unfinished / "result.json").unlink()
    code, _, stderr = script("crate.report", runs)
    assert code == 0
    empty, torn = stderr.strip().splitlines()
    assert "left out: " in empty and "_s0/result.json" in empty and "_s1: Unterminated" in torn
    table, layers, operators = (pd.read_csv(runs / f"results/{name}.csv") for name in ("runs", "layers", "operators"))
    assert len(table) == 12 + 6 + 9 and "grid" not in set(table["experiment"])
    # 6 trained runs without SRR in the loss, 6 at initialisation; epochs 0, 2, 3; two layers; for operators, four points.
    assert len(layers) == 2 * 2 * (6 * 3 + 6) and len(operators) == 2 * 4 * (6 * 2 + 6)

    text = (runs / "results/REPORT.md").read_text()

    def cells(begin):
        lines = text.split(begin)[1].split("\n\n")[1].splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]

    found = [read_run(path.parent) for path in runs.glob("table2/crate-c*/result.json")]
    points = {(config["srr_reg"], config["seed"]): 100 * result["val_accuracy"] for config, result in found}
    plain, other = (np.array([points[eta, seed] for seed in range(3)]) for eta in (0.0, 0.1))
    first, second, *_ = cells("**Table 2.** SRR of the last layer in the loss, digits, d = 12")
    assert first == ["crate-c", "0.0", f"{plain.mean():.2f} ± {plain.std(ddof=1):.2f}", "-", "3"]
    low, high = stats.ttest_1samp(other - plain, 0).confidence_interval()
    gain = f"{(other - plain).mean():+.2f} [{low:+.2f}, {high:+.2f}]"
    assert second == ["crate-c", "0.1", f"{other.mean():.2f} ± {other.std(ddof=1):.2f}", gain, "3"]
    assert [line[2] for line in cells("**Table 6.**")] == ["1", "2", "random"]
    assert sorted(path.name for path in (runs / "results/figures").iterdir()) == ["fig_2_d_12.png", "layers.png"]


def test_single_runs(script, tmp_path):
    """A folder of them, one of them, and the folder above: a row each, and its layers drawn."""
    folder = tmp_path / "grids"  # a name that no section is about
    assert script("train", *SMALL, "--epochs", 2, "--srr-reg", 0, 0.1, "--out", folder)[0] == 0
    names = sorted(path.parent.name for path in folder.glob("*/result.json"))
    for runs, shown in (folder, names), (folder / names[1], names[1:]), (tmp_path, names):
        assert script("crate.report", runs, "--results", tmp_path / "results")[0] == 0
        text = (tmp_path / "results/REPORT.md").read_text()
        for name in shown:
            config, result = read_run(folder / name)
            srr = np.mean([parts["srr"] for parts in read_log(folder / name)[-1]["srr"]])
            numbers = [2, result["val_accuracy"], result["gap"], result["gap_accuracy"], srr]
            row = f"| {name} | {' | '.join(f'{x:.4g}' for x in numbers)} |"
            assert row in text and text.count(name) == 1
        assert f"{len(shown)} of {len(shown)} runs" in text and "(figures/runs_grids.png)" in text
        assert set(pd.read_csv(tmp_path / "results/layers.csv")["run"]) == set(shown)


def test_an_invented_type_is_everywhere(script, monkeypatch, tmp_path):
    """A new row of VARIANTS, trained, measured, ranked and reported like the others; claims say that it is in none of them."""
    monkeypatch.setitem(VARIANTS, "crate-half", Variant(+0.5, "U", "U", "ISTA", "Z + MSSA(Z; U) / 2"))
    drawn, by_layer = [], figures.by_layer
    monkeypatch.setattr(figures, "by_layer", lambda rows, *rest: (drawn.append(rows), by_layer(rows, *rest)))
    runs, results, two = tmp_path / "runs", tmp_path / "digits", ("--model", "crate-half", "crate-c", "--epochs", 2)
    for name, *flags in (
        ("table2", "--srr-reg", 0, 0.1, "--seed", 0, 1),
        ("grid", "--lr", 1e-3, 3e-3, "--dropout", 0, 0.1, "--stop-at-loss", 10),
        ("intervention", "--srr-reg", 0, 0.1, "--srr-layer", "all", "--seed", 0, 1),
    ):
        assert script("train", *SMALL, *two, *flags, "--out", runs / name)[0] == 0
    assert script("measure", runs / "grid", "--out", results / "measures.csv", "--groups", "norms", "srr")[0] == 0
    ranked = ("--hyperparameters", "model", "lr", "dropout", "--resamples", 20, "--out", results / "correlation")
    assert script("correlate", results / "measures.csv", *ranked)[0] == 0
    assert script("crate.report", runs, "--results", results)[0] == 0
    text = (results / "REPORT.md").read_text()
    assert "Of all claims in those of rank correlations alone: crate-half.\n" in text and "output matrix" in text
    rows = "| crate-half |"  # of attention, two of Table 2 and one of Table 3; then the intervention's slopes
    assert text.count(rows) == 4 and "; crate-half +" in text
    assert ["crate-half" in set(rows["model"]) for rows in drawn] == [True]  # Fig. 2
    table, measures = (pd.read_csv(results / f"{name}.csv") for name in ("correlation/correlation", "measures"))
    assert set(table["models"]) == {8} and (measures.groupby("model").size() == 4).all()
    (results / "datasets.json").write_text('{"digits": "my photographs"}')  # what runs are of can be said better
    monkeypatch.delitem(VARIANTS, "crate-half")  # and a report is rebuilt where nobody knows the type
    assert script("crate.report", "--results", results)[0] == 0
    renamed = (results / "REPORT.md").read_text()
    assert renamed.startswith("# Report: my photographs\n") and renamed.count("crate-half") == text.count("crate-half")
    assert script("crate.report", runs / "grid", "--results", tmp_path / "alone")[0] == 0  # no run with layer-wise SRR


def test_what_is_refused(script, tmp_path):
    assert_refused(script("crate.report", tmp_path), str(tmp_path), "no finished run")
    assert_refused(script("crate.report", "--results", tmp_path), "--results", "no runs.csv")
    assert script("train", *SMALL, "--epochs", 1, "--lr", 1e-3, 2e-3, "--out", tmp_path / "table2")[0] == 0
    assert_refused(script("crate.report", tmp_path), "table2", "lr0.001", "lr0.002", "another experiment")
