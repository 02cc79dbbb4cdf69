"""crate.report: run folders become tables, tables a report; broken runs and strange folders."""

import json
import shutil
import statistics
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from crate.runs import DEFAULTS
from tests.conftest import assert_refused, run_script

MODELS = ("crate-c", "crate-n", "crate-t", "crate")
ACCURACY = {0.0: (0.90, 0.92, 0.97), 0.001: (0.93, 0.93, 0.99)}  # of table2, {eta: of each seed}


def write_run(runs, experiment, name, epochs=(0, 5, 10), accuracy=0.5, gap=0.1, **settings):
    """A finished run as train.py leaves it, of two layers, whose SRR is 10 * layer + epoch + seed - 100 * eta."""
    config = DEFAULTS | {"dataset": "digits", "depth": 2, "preset": "laptop", "device": "cpu", "amp": "off", "parameters": 4650}
    config |= {"commit": None, "command": "python train.py", "versions": {"torch": "2.9", "processor": "x86_64", "cores": 2}}
    config |= settings
    log, rates = [], {"l0": 100.123456789, "rate_subspaces": 5.0, "rate": 3.0}
    for epoch in epochs:
        srr = [rates | {"srr": 10 * layer + epoch + config["seed"] - 100 * config["srr_reg"]} for layer in (1, 2)]
        log.append(
            {"epoch": epoch, "srr": srr, "srr_val": srr} if epoch != 5 else {"epoch": epoch, "srr": srr, "srr_val": None}
        )
        if epoch != 5:
            after = {"compressed": 6.0 + config["seed"], "normalised": 4.0, "output": 3.0}
            points = {point: rates | {"rate_subspaces": x, "rate_subspaces_equal_norm": x - 1} for point, x in after.items()}
            log[-1]["operators"] = [{"input": rates} | points, {"input": rates} | points]
    result = {"reached_target": None, "epochs": 10, "steps": 9, "train_srr": [3.0], "val_accuracy": accuracy, "gap": gap}
    result |= {"gap_accuracy": 0.0, "seconds": 2.5}
    folder = runs / experiment / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(the results folder of a report on every experiment, what the report said on stderr)."""
    runs = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        for model in MODELS:
            for eta, accuracy in ACCURACY.items():
                write_run(runs, "table2", f"{model}_{eta}_{seed}", model=model, srr_reg=eta, seed=seed, accuracy=accuracy[seed])
            for width in (384, 768):
                write_run(runs, "layers", f"{model}_{1000 - width}_{seed}", epochs=(0,), model=model, seed=seed, width=width)
        write_run(runs, "table2-cifar100", f"crate_{seed}", model="crate", seed=seed, dataset="cifar100")
        write_run(runs, "table3", f"e_{seed}", model="crate-e", seed=seed, accuracy=0.8 + seed / 100)
        for layer in ("1", "10", "2", "random"):
            write_run(runs, "table6", f"{layer}_{seed}", srr_reg=0.001, srr_layer=layer, seed=seed, accuracy=0.91)
        for eta in (-0.1, 0.0, 0.1):  # slopes of 0.002, 0.003, 0.004
            gap = 1 - (0.2 + seed / 10) * eta
            write_run(runs, "intervention", f"{eta}_{seed}", model="crate-n", srr_reg=eta, seed=seed, gap=gap)
    write_run(runs, "grid", "missed", lr=0.1)
    (write_run(runs, "grid", "torn") / "log.jsonl").write_text('{"epoch": 0}\n{"epo')
    (write_run(runs, "grid", "empty") / "result.json").write_text("{}")
    write_run(runs, "grid", "unknown", versions={})
    (write_run(runs, "grid", "unfinished") / "result.json").unlink()
    (runs / "results/figures").mkdir(parents=True)
    for stale in ("figures/fig_2-cifar10.png", "figures/mine.png", "claims.csv"):
        (runs / "results" / stale).write_text("of an earlier report")
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stderr(StringIO()) as stderr:
        assert run_script(monkeypatch, "crate.report", runs) == 0
    return runs / "results", stderr.getvalue()


def cells(text, heading):
    """The cells of the table below a heading, without its own."""
    lines = [line for line in text.split(f"## {heading}")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_broken_runs_are_named_and_left_out(reported):
    results, stderr = reported
    lines = stderr.strip().splitlines()
    assert len(lines) == 3 and all("left out: " in line for line in lines)
    for name, reason in (("torn", "line 2"), ("empty", "missing"), ("unknown", "'torch'")):
        assert any(f"grid/{name}" in line and reason in line for line in lines)
    assert set(pd.read_csv(results / "runs.csv").query("experiment == 'grid'")["run"]) == {"missed"}


def test_tables_hold_what_the_runs_say(reported):
    table, layers, operators = (pd.read_csv(reported[0] / f"{name}.csv") for name in ("runs", "layers", "operators"))
    assert len(table) == 3 * (8 + 8 + 1 + 1 + 4 + 3) + 1
    row = table.query("experiment == 'table2' and run == 'crate_0.001_2'").iloc[0]
    assert (row["epochs"], row["max_epochs"], row["val_accuracy"], row["processor"]) == (10, 200, 0.99, "x86_64, 2 cores")
    assert row["srr"] == 15 + 10 + 2 - 0.1 and row["srr_layer"] == "last"
    assert set(layers["experiment"]) == {"table2", "table2-cifar100", "table3", "layers"} == set(operators["experiment"])
    trained, initial = 3 * (4 + 1 + 1), 3 * 4 * 2  # runs without SRR in the loss, of two layers and, for operators, four points
    assert len(layers) == 2 * (trained * (3 + 2) + initial * 2) and set(layers["l0"]) == {100.1235}
    assert len(operators) == 8 * (trained * 2 + initial) and operators.query("point != 'input'").notna().all(axis=None)


def test_what_the_report_says(reported):
    text = (reported[0] / "REPORT.md").read_text()
    assert text.startswith("# Report: digits, cifar100\n")
    assert text.split("\n## ")[1].startswith("The paper's claims") and "nan" not in text
    low, high = stats.t.interval(0.95, 2, 2, statistics.stdev([3, 1, 2]) / 3**0.5)
    lines = cells(text, "SRR of the last layer in the loss (Section 6, Table 2)")
    assert [line[:2] for line in lines] == [[model, eta] for model in MODELS for eta in ("0.0", "0.001")]
    assert lines[0][2:] == [f"93.00 ± {100 * statistics.stdev(ACCURACY[0.0]):.2f} (n = 3)", ""]
    assert lines[1][2].startswith("95.00 ± ") and lines[1][3] == f"+2.00 [{low:+.2f}, {high:+.2f}]"
    assert [line[0] for line in cells(text, "Output matrices")] == [*MODELS, "crate-e"]
    lines = cells(text, "Which layer's SRR")
    assert [line[0] for line in lines] == ["1", "2", "10", "random"] and lines[0][3].startswith("-2.00 [")
    assert ["reached the target", "0"] in cells(text, "The models of Section 5") and "Missed the target: missed" in text
    expected = ["crate-c", "attention step", "2.00 ± 1.00 (n = 3)", "1.00 ± 1.00 (n = 3)"]
    assert cells(text, "Layer-wise SRR")[0] == expected
    for line in cells(text, "Where the numbers come from"):
        assert line[2:5] == ["`python train.py`", "unknown", "2.9"] and int(line[-1]) == round(2.5 * int(line[-2]))
    claims = {line[1]: line for line in cells(text, "The paper's claims")}
    assert any(number.endswith("(d = 384, L = 2, layers)") for _, _, _, number, *_ in claims.values())
    assert claims["CRATE-N beats CRATE-C: points"][4] == "-"  # equal in every seed
    (slope,) = (line for claim, line in claims.items() if "slope" in claim)
    assert float(slope[3]) == 0.003 and slope[-1] == "**holds**"


def test_p_values_are_adjusted_within_a_section(reported):
    table = pd.read_csv(reported[0] / "claims.csv", dtype={"section": str})
    for _, own in table.dropna(subset="p_value").groupby("section"):
        own, so_far = own.sort_values("p_value"), 0
        for k, row in enumerate(own.itertuples()):  # Holm
            so_far = max(so_far, min(1, row.p_value * (len(own) - k)))
            assert row.p_holm == pytest.approx(so_far, rel=1e-4)
    assert table.loc[table["verdict"] == "finding", "p_holm"].isna().all()
    decided = table[table["verdict"].str.contains("holds|contradicted")]
    assert (decided["verdict"].str.endswith(" (unadjusted)") == (decided["p_holm"] >= 0.05)).all()


def test_figures(reported):
    results, _ = reported
    shown = [line.split("](")[1].rstrip(")") for line in (results / "REPORT.md").read_text().splitlines() if line[:2] == "!["]
    names = [f"fig_2{data}{kind}.png" for data in ("", "-cifar100") for kind in ("", "_validation", "_parts")]
    assert set(shown) == {f"figures/{name}" for name in (*names, "layers.png", "intervention.png")}
    assert {file.name for file in (results / "figures").iterdir()} == {Path(name).name for name in shown} | {"mine.png"}
    assert all(5000 < (results / name).stat().st_size <= 200_000 for name in shown)


def test_report_is_rebuilt_from_its_tables_alone(reported, script, tmp_path, monkeypatch):
    monkeypatch.setattr("crate.figures.save", lambda figure, file: shutil.copy(reported[0] / "figures" / file.name, file))
    (tmp_path / "new/figures").mkdir(parents=True)
    for name in ("runs", "layers", "operators"):
        shutil.copy(reported[0] / f"{name}.csv", tmp_path / "new")
    assert script("crate.report", "--results", tmp_path / "new")[0] == 0
    for name in ("REPORT.md", "claims.csv"):
        assert (tmp_path / "new" / name).read_bytes() == (reported[0] / name).read_bytes()


def test_what_is_refused(script, tmp_path):
    assert_refused(script("crate.report"), "RUNS", "--results")
    assert_refused(script("crate.report", tmp_path), str(tmp_path), "no finished run")
    assert_refused(script("crate.report", "--results", tmp_path), "--results", "no table")
    assert_refused(script("crate.report", "--results", tmp_path / "r"), "--results", "no table")
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs.csv").write_text("run,model\na,crate\n")
    assert_refused(script("crate.report", "--results", tmp_path), "runs.csv", "experiment")
    assert_refused(script("crate.report", "--claims", tmp_path), "--claims", "claims.csv")
    for width in (24, 48):
        write_run(tmp_path, "table2", f"crate-c_d{width}", width=width)
    assert_refused(script("crate.report", tmp_path, "--results", "/proc/nowhere"), "--results /proc/nowhere")
    assert_refused(script("crate.report", tmp_path), "table2", "crate-c_d24, crate-c_d48", "another experiment")


def test_claims_side_by_side_begin_with_what_disagrees_with_the_paper(script, tmp_path):
    verdicts = {
        "both": ("holds", "holds"), "one": ("holds", None), "neither": ("undecided", "undecided"), "found": ("finding", None),
        "here": ("holds", "undecided"), "other": ("contradicted", "undecided"), "none": ("no effect (within 2 nats)", "holds"),
    }  # fmt: skip
    for k, data in enumerate(("digits", "cifar10")):
        row = {"section": "4.1", "note": "l2" if k else "", "claimed": "> 0", "number": 2 + k, "low": 1, "high": 3}
        rows = [row | {"claim": claim, "verdict": both[k]} for claim, both in verdicts.items() if both[k]]
        (tmp_path / data).mkdir()
        pd.DataFrame(rows).to_csv(tmp_path / data / "claims.csv", index=False)
    code, text, error = script("crate.report", "--claims", tmp_path / "digits", tmp_path / "cifar10")
    assert code == 0 and "| claimed | digits | cifar10 |" in text, error
    lines = cells("## claims\n" + text, "claims")
    assert [line[1] for line in lines] == ["other", "none", "here", "neither", "found", "both", "one"]
    assert (
        lines[2] == ["4.1", "here", "> 0", "+2 [+1, +3] **holds**", "+3 (l2) [+1, +3] **undecided**"] and lines[-1][-1] == "-"
    )
