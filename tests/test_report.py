"""Tables and figures out of run folders."""

import json
import shutil
import statistics

import pytest
from scipy import stats

from crate import report, tables
from crate.config import DEFAULTS, PRESETS
from crate.files import read_csv
from tests.conftest import assert_refused, run_script

FLAGS = ("--width", 12, "--heads", 3, "--depth", 2, "--patch-size", 4, "--train-subset", 200, "--device", "cpu")


def row(**changes):
    """A line of runs.csv at the laptop preset's settings."""
    settings = DEFAULTS | PRESETS["laptop"] | {"preset": "laptop"}
    settings |= {"max_epochs": settings.pop("epochs"), "parameters": 1000, "val_accuracy": 0.5, "image_size": 8, "run": "r"}
    return {key: "" if value is None else str(value) for key, value in (settings | changes).items()}


def cells(markdown):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.strip().splitlines()]


def test_table_2_pairs_by_seed():
    plain, srr = [0.90, 0.92, 0.97], [0.93, 0.93, 0.99]
    rows = [row(seed=s, val_accuracy=a) for s, a in enumerate(plain)]
    rows += [row(seed=s, val_accuracy=a, srr_reg=0.001) for s, a in reversed(list(enumerate(srr)))]
    rows += [row(seed=9, val_accuracy=0.1, srr_reg=0.001, srr_layer="1")]  # another layer belongs to Table 6
    (line,) = cells(tables.table_2(rows))[2:]
    interval = stats.t.interval(0.95, 2, 2, statistics.stdev([3, 1, 2]) / 3**0.5)
    assert line[:2] == ["crate-c", "0.001"]
    assert line[2] == f"93.00 ± {100 * statistics.stdev(plain):.2f} (n = 3)" and line[3].startswith("95.00 ± ")
    assert line[4] == f"+2.00 [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def test_table_3_counts_parameters_and_leaves_out_srr():
    rows = [row(model="crate", parameters=12345), row(model="crate-fix"), row(model="crate", srr_reg=0.1, val_accuracy=1)]
    lines = cells(tables.table_3(rows))[2:]
    assert [line[0] for line in lines] == ["crate", "crate-fix"]
    assert lines[0][2:] == ["12,345", "50.00 (n = 1)"]


def test_table_4_names_the_runs_that_missed():
    rows = [row(run=f"run{i}", lr=lr, reached_target=i != 1, gap=i, epochs=5) for i, lr in enumerate((0.001, 0.01, 0.001))]
    text = tables.table_4(rows)
    table = dict(line[:2] for line in cells(text.split("\n\n")[0]))
    assert set(table["lr"].split(", ")) == {"0.01", "0.001"}
    assert table["runs"] == "3" and table["reached the target"] == "2"
    assert table["gap (loss)"] == "0 to 2, median 1" and "run1" in text and "run0" not in text


def test_table_6_orders_layers_and_compares_with_none():
    rows = [row(val_accuracy=0.5)]
    rows += [row(srr_reg=0.001, srr_layer=layer, val_accuracy=0.6) for layer in ("last", "2", "random", "10", "all")]
    lines = cells(tables.table_6(rows))[2:]
    assert [line[1] for line in lines] == ["none", "2", "10", "all", "last", "random"]
    assert lines[1][2:] == ["l0", "0.001", "60.00 (n = 1)", "+10.00"]


def held_out_runs():
    """Held-out images prefer eta 0.01, weight decay 0.1 and dropout 0.2; validation images prefer others."""
    rows = [row(seed=s, val_accuracy=0.80) for s in range(2)]
    for axis, values in {"srr_reg": (0.001, 0.01), "weight_decay": (0.1, 1.0), "dropout": (0.2, 0.3)}.items():
        better = {"srr_reg": 1, "weight_decay": 0, "dropout": 0}[axis]
        for k, value in enumerate(values):
            for s in range(2):
                rows.append(row(**{axis: value}, hold_out=0.2, seed=s, val_accuracy=0.7 + 0.1 * (k == better)))
                rows.append(row(**{axis: value}, seed=s, val_accuracy=0.85 - 0.01 * (k == better) + 0.02 * s))
    return rows + [row(hold_out=0.2, val_accuracy=0.99), row(hold_out=0.2, srr_layer="1", srr_reg=1.0, val_accuracy=1)]


def test_strengths_are_chosen_on_held_out_images():
    rows = held_out_runs()
    chosen = [tables.chosen(rows, "crate-c", axis) for axis in ("srr_reg", "weight_decay", "dropout")]
    assert chosen == ["0.01", "0.1", "0.2"]
    assert tables.chosen([row()], "crate-c", "srr_reg") == "0.001" and tables.chosen([row()], "crate-c", "dropout") is None
    (line,) = cells(tables.table_2(rows))[2:]
    assert line[1] == "0.01" and line[4].startswith("+5.00")
    (line,) = cells(tables.table_regularisers(rows))[2:]
    assert line[0] == "crate-c" and line[1].startswith("80.00")
    assert [cell.split(" [")[0] for cell in line[2:]] == ["0.01: +5.00", "0.1: +5.00", "0.2: +5.00"]
    lines = cells(tables.table_choices(rows))[2:]
    assert [line[1] for line in lines] == ["0.0", "0.001", "**0.01**"]
    assert [line[2].split()[0] for line in lines] == ["99.00", "70.00", "80.00"]


def test_depth(tmp_path):
    rows = [row(run=f"L{L}s{s}", depth=L, seed=s, val_accuracy=0.5 + L / 100 + s / 10) for L in (2, 4, 8) for s in range(2)]
    rows += [row(run="r", model="crate"), row(run="e", depth=8, srr_reg=0.1, val_accuracy=1)]
    layers = [
        {"run": f"L{L}s{s}", "epoch": epoch, "layer": l, "images": images, "srr": l + s, "rate": 1, "rate_subspaces": 1}
        for L in (2, 4, 8) for s in range(2) for epoch in (0, 9) for images in ("train", "val") for l in range(1, L + 1)
    ]  # fmt: skip
    table, image = report.depth_section(rows, layers, tmp_path)
    (line,) = cells(table)[2:]  # crate has one depth alone
    assert cells(table)[0][1:] == ["L = 2", "L = 4", "L = 8"]
    assert [cell.split()[0] for cell in line] == ["crate-c", "57.00", "59.00", "63.00"]
    assert "figures/depth.png" in image and (tmp_path / "figures" / "depth.png").stat().st_size > 5000
    assert report.depth_section([row()], [], tmp_path) == []


def test_models_that_no_figure_shows(tmp_path):
    layers = [{"model": "crate-fix", "images": "train", "epoch": 0, "layer": 1, "srr": 1, "rate": 1, "rate_subspaces": 1}]
    report.layer_figures(layers, [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_table_of_matrices():
    measured = [{"run": f"v{s}", "model": "vit", "srr": 5 + s, "srr_key": 7, "srr_value": 9} for s in range(2)]
    measured += [{"run": "c", "model": "crate", "srr": 3.0, "srr_key": None}, {"run": "deep", "model": "crate", "srr": 99}]
    rows = [row(run="v0", model="vit"), row(run="v1", model="vit"), row(run="c", model="crate")]
    crate, vit = cells(tables.table_matrices(measured, rows))[2:]
    assert crate == ["crate", "3.00 (n = 1)", "-", "-"]
    assert vit[1:] == ["5.50 ± 0.71 (n = 2)", "7.00 ± 0.00 (n = 2)", "9.00 ± 0.00 (n = 2)"]


def test_only_runs_at_the_presets_settings_enter_the_tables():
    others = dict(width=96, lr=0.5, max_epochs=2, stop_at_loss=0.01, augment="basic", ista_beta=0.2)
    rows = [row(), *(row(**{key: value}) for key, value in others.items())]
    rows += [row(model="crate", srr_reg=0.1), row(seed=3, srr_layer="all", srr_reg=0.001), row(depth=2), row(dropout=0.1)]
    assert tables.at_preset(rows) == [rows[0], *rows[-4:]]
    assert tables.accuracies(rows, "crate-c") == {"0": 50.0}


def test_attention_table():
    rows = [
        {"rule": "exact", "seed": "0", "layer": 1, "before": 4.0, "after": 3.0, "overflow": False},
        {"rule": "exact", "seed": "0", "layer": 2, "before": 3.0, "after": 3.5, "overflow": False},
        {"rule": "exact", "seed": "0", "layer": 3, "before": 3.5, "after": None, "overflow": True},
    ]
    line = next(line for line in cells(tables.attention_table(rows)) if line[0].startswith("(a)"))
    assert line[1:] == ["4.00 (n = 1)", "3.00 (n = 1)", "3.50 (n = 1)", "1 of 2", "3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of two models and two seeds, with layer-wise SRR at initialisation and after the second epoch."""
    out = tmp_path_factory.mktemp("runs")
    flags = ("--model", "crate-c", "crate", "--seed", 0, 1, "--epochs", 2, "--log-srr-every", 2, "--out", out)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_script(monkeypatch, "train", *flags, *FLAGS) == 0
    return out


def test_collect(runs, tmp_path):
    report.collect(runs, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "layers.csv").write_text("of other runs")
    shutil.copytree(runs, tmp_path / "unlogged")
    for log in tmp_path.glob("unlogged/*/log.jsonl"):
        log.write_text("")
    report.collect(tmp_path / "unlogged", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["runs.csv"]
    rows, layers, operators = (read_csv(tmp_path / f"{name}.csv") for name in ("runs", "layers", "operators"))
    assert len(operators) == 4 * 2 * 2 * 4
    assert {r["point"] for r in operators} == {"input", "compressed", "normalised", "output"}
    assert len(rows) == 4 and {r["max_epochs"] for r in rows} == {"2"}
    assert {(r["epoch"], r["layer"]) for r in layers} == {("0", "1"), ("0", "2"), ("2", "1"), ("2", "2")} and len(layers) == 32
    assert {r["images"] for r in layers} == {"train", "val"}
    for r in rows:
        result = json.loads((runs / r["run"] / "result.json").read_text())
        assert float(r["gap"]) == result["val_loss"] - result["train_loss"]
        assert "train.py" in r["command"] and r["width"] == "12"


def test_report_is_rebuilt_from_its_tables_alone(runs, tmp_path, script, monkeypatch):
    selected = dict(width=12, heads=3, depth=2, epochs=2, patch_size=4, train_subset=200)
    monkeypatch.setitem(PRESETS, "laptop", PRESETS["laptop"] | selected)
    assert script("attention_only", "--tokens", 9, "--depth", 2, "--width", 12, "--heads", 3, "--out", tmp_path / "a")[0] == 0
    flags = ("--results", tmp_path / "r", "--attention", tmp_path / "a")
    assert script("crate.report", "--runs", runs, *flags)[0] == 0
    text = (tmp_path / "r" / "REPORT.md").read_text()
    assert text.split("## ")[1].startswith("The paper's claims")
    for word in ("Fig. 5", "Fig. 1b", "Table 3", "crate-c", "Where the numbers come from", "train.py", "(n = 2)", "**holds**"):
        assert word in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "r" / line.split("](")[1].rstrip(")")).stat().st_size > 5000, line
    assert "fig_2.png" in text and "nan" not in text.lower()
    assert "Choosing eta" not in text and "weight decay" not in text  # nothing was held out: no heading without its table
    assert script("crate.report", *flags)[0] == 0
    assert (tmp_path / "r" / "REPORT.md").read_text() == text


def test_nothing_to_report(script, tmp_path):
    assert_refused(script("crate.report", "--results", tmp_path, "--attention", tmp_path), "--results", "stages")
    assert_refused(script("crate.report", "--results", tmp_path / "r"), "--results", "no such folder")
    assert_refused(script("crate.report", "--claims", tmp_path), "--claims", "claims.csv")
    assert_refused(script("crate.report", "--claims", tmp_path, tmp_path), "--claims", "different names")
    assert_refused(script("crate.report", "--results", tmp_path / "r", "--runs", tmp_path), "--runs", "no finished run")
    assert_refused(script("crate.report", "--results", "/proc/nowhere", "--runs", tmp_path), "--results /proc/nowhere")
