"""crate.report: run folders become tables, tables a report. tests/test_results.py rebuilds the published reports."""

from contextlib import redirect_stderr
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crate import page, ranks
from crate.runs import read_log, read_run
from tests.conftest import assert_refused, run_script
from tests.processes import SMALL

EXPERIMENTS = {
    "table2": ("--model", "crate", "crate-c", "--srr-reg", 0, 0.1, "--epochs", 3, "--lr", 0.01),
    "layers": ("--width", 12, 24, "--epochs", 0),
    "table6": ("--srr-reg", 0.1, "--srr-layer", "random", 2, 1, "--epochs", 1),
    "grid": ("--epochs", 1),
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(the folder of runs with three seeds each, what the report said on stderr)."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, flags in EXPERIMENTS.items():
            assert run_script(monkeypatch, "train", *SMALL, *flags, "--seed", 0, 1, 2, "--out", runs / name) == 0
        empty, torn, unfinished = sorted((runs / "grid").iterdir())
        (empty / "result.json").write_text("{")
        (torn / "log.jsonl").write_text('{"epoch": 0}\n{"epo')
        (unfinished / "result.json").unlink()
        with redirect_stderr(StringIO()) as stderr:
            assert run_script(monkeypatch, "crate.report", runs) == 0
    return runs, stderr.getvalue()


def test_tables_hold_what_the_runs_say(reported):
    runs, stderr = reported
    empty, torn = stderr.strip().splitlines()
    assert "left out: " in empty and "_s0/result.json" in empty and "_s1: Unterminated" in torn
    table, layers, operators = (pd.read_csv(runs / f"results/{name}.csv") for name in ("runs", "layers", "operators"))
    assert len(table) == 12 + 6 + 9 and "grid" not in set(table["experiment"])
    for row in table.to_dict("records"):
        folder = runs / row["experiment"] / row["run"]
        (config, result), log = read_run(folder), read_log(folder)
        assert (row["epochs"], row["max_epochs"]) == (result["epochs"], config["epochs"])
        assert row["gap"] == pytest.approx(result["gap"]) and row["lr"] == config["lr"]
        assert row["srr"] == pytest.approx(np.mean([parts["srr"] for parts in log[-1]["srr"]]))  # Eq. 11
    # 6 trained runs without SRR in the loss, 6 at initialisation; epochs 0, 2, 3; two layers; for operators, four points.
    assert len(layers) == 2 * 2 * (6 * 3 + 6) and len(operators) == 2 * 4 * (6 * 2 + 6)


def test_what_the_report_says(reported):
    runs, _ = reported
    text = (runs / "results/REPORT.md").read_text()

    def cells(heading):
        lines = [line for line in text.split(f"## {heading}")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]

    found = [read_run(path.parent) for path in runs.glob("table2/crate-c*/result.json")]
    points = {(config["srr_reg"], config["seed"]): 100 * result["val_accuracy"] for config, result in found}
    plain, other = (np.array([points[eta, seed] for seed in range(3)]) for eta in (0.0, 0.1))
    first, second, *_ = cells("SRR of the last layer in the loss (Section 6, Table 2)")
    assert first == ["crate-c", "0.0", f"{plain.mean():.2f} ± {plain.std(ddof=1):.2f} (n = 3)", ""]
    low, high = stats.ttest_1samp(other - plain, 0).confidence_interval()
    assert second[3] == f"{(other - plain).mean():+.2f} [{low:+.2f}, {high:+.2f}]"
    assert [line[0] for line in cells("Which layer's SRR")] == ["1", "2", "random"]
    assert any("d = 12, L = 2 " in line[3] for line in cells("The claims"))  # of the smaller width


def test_the_results_page(script, tmp_path):
    """Two data sets of two widths; random settings of a rate each; the push of one model type."""
    rng, rows = np.random.default_rng(0), []
    for k in range(96):
        lr = (1e-3, 3e-3)[k % 2]
        rows.append(
            {"model": "crate-c" if k % 4 < 2 else "crate", "width": 48 + k // 48 * 48, "lr": lr, "reached_target": k > 0}
        )
        rows[-1] |= dict(zip(page.MEASURES, rng.normal(size=11)), gap=rng.normal(), gap_accuracy=rng.normal())
    grid = pd.DataFrame(rows).drop(columns=["baseline_type", "baseline_lr"])
    study = grid[grid["width"] == 48].assign(lr=np.exp(rng.uniform(-7, -6.8, 48)))
    runs = pd.DataFrame([(seed, eta) for seed in range(3) for eta in (-0.01, 0.0, 0.01)], columns=["seed", "srr_reg"])
    runs = runs.assign(
        experiment="intervention", model="crate", srr_layer="all", srr=30 - 900 * runs["srr_reg"], gap=1 + runs["seed"]
    )
    (tmp_path / "digits").mkdir()
    for name, table in {"measures": grid, "study_measures": study, "runs": runs}.items():
        table.to_csv(tmp_path / f"digits/{name}.csv", index=False)
    assert script("crate.report", "--page", tmp_path) == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["srr_pushed.png", "srr_ranks.png"]
    found = pd.read_csv(tmp_path / "page.csv", keep_default_na=False).set_index(["gap", "same", "measure", "models"])
    own = grid.query("width == 48 and reached_target").assign(lr=grid["lr"])
    (srr,) = ranks.correlate(own, ["model", "lr"], "gap", ["srr"], resamples=9)[:1]
    for same, statistic in {"": "tau", "model": "tau_same_model", "model, lr": "tau_same_model_lr"}.items():
        row = found.loc["gap", same, "srr", "digits, grid, d = 48"]
        assert float(row["tau"]) == pytest.approx(srr[statistic], abs=1e-4)
        assert (row["n"], row["pairs"]) == (47, srr[statistic.replace("tau", "pairs")])
        together = found.loc["gap", same, "srr", "together"]
        assert together["n"] == 47 + 48 + 47 and float(together["low"]) < float(together["tau"]) < float(together["high"])
    assert_refused(script("crate.report", "--page", tmp_path / "none"), "--page", "digits or cifar10")


def test_what_is_refused(script, tmp_path):
    assert_refused(script("crate.report", tmp_path), str(tmp_path), "no finished run")
    assert_refused(script("crate.report", "--results", tmp_path), "--results", "no table")
    assert script("train", *SMALL, "--epochs", 1, "--lr", 1e-3, 2e-3, "--out", tmp_path / "table2")[0] == 0
    assert_refused(script("crate.report", tmp_path), "table2", "lr0.001", "lr0.002", "another experiment")
