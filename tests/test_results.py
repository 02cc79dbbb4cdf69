"""The published results: every report is what its own tables say, byte for byte, and so is every number of the page."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from crate import ranks
from results import page
from tests.conftest import assert_refused

ROOT = Path(__file__).parents[1]
REPORTS = sorted(path.parent for path in ROOT.glob("results/*/runs.csv"))


@pytest.mark.skipif(not REPORTS, reason="no results are published")
@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.name)
def test_report_is_rebuilt_from_its_tables(script, tmp_path, folder):
    """Results that were made anew here may be between two stages; the published ones are what git has."""
    changed = subprocess.run(["git", "status", "--porcelain", folder], cwd=ROOT, capture_output=True, text=True).stdout
    if changed:
        pytest.skip(f"{folder} differs from what was published")
    results = shutil.copytree(folder, tmp_path / folder.name)
    text = (results / "REPORT.md").read_text()
    assert len(text.split()) <= 3000 and len(pd.read_csv(folder / "claims.csv")) <= 30
    for target in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert 3000 < (folder / target).stat().st_size <= 200_000, target
    assert "Where the numbers come from" in text and not list(folder.rglob("*.pt"))
    for measures in folder.glob("*measures.csv"):
        runs, measured = (set(pd.read_csv(file)["run"]) for file in (folder / "runs.csv", measures))
        assert measured <= runs, "measures of runs that the report doesn't know"
    for name in ("REPORT.md", "claims.csv"):
        (results / name).unlink()
    for drawn in (results / "figures").glob("*.png"):
        drawn.unlink()
    code, _, error = script("crate.report", "--results", results)
    assert code == 0, error
    for name in ("REPORT.md", "claims.csv"):
        assert (results / name).read_bytes() == (folder / name).read_bytes(), name
    drawn, published = ({path.name for path in where.glob("figures/*.png")} for where in (results, folder))
    assert drawn == published


NUMBER = r"-?\d+\.?\d*"
THREE = rf"({NUMBER}) (?:points )?\[({NUMBER}), ({NUMBER})\]"
# In no table: the paper's tau, lambda, dropouts; tau of the digits' first grids (commits 5c6145f, a06fbfb) and of a new one.
GIVEN = (
    "(the paper: 0.445)",
    "0.1 ||Z||_0",
    "up to 0.1, 0.05 and 0.02",
    "was 0.26, 0.33 and",
    "it was 0.52",
    "after the first 8: 0.12 [-0.10, 0.33]",
)


def shown(number, like):
    """The number as text, with as many digits behind the point as `like` has."""
    text = f"{number:.{len(like.partition('.')[2])}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def test_every_number_of_the_page_is_in_its_table():
    """Numbers with their intervals are one row, or its negative; in a table one of what the row and the column are called."""
    text = (ROOT / "results/README.md").read_text()
    assert len(re.findall(r"[^\s|]+", re.sub(r"\| ---.*", "", text))) <= 1000
    table, wrong, seen = pd.read_csv(ROOT / "results/page.csv"), [], 0
    text = re.sub(r"\n(?![|\n-])\s*", " ", text)  # a line a bullet, or a row of a table
    readme = (ROOT / "README.md").read_text().split("## What was found")[1].split("\n## ")[0]
    assert all(f"{number} [{low}, {high}]" in text for number, low, high in re.findall(THREE, readme))
    for words in GIVEN:
        assert words in text
        text = text.replace(words, "")
    for section in text.split("## ")[1:]:
        rows, header = table[table["question"] == int(section[0])], []
        rows = rows.assign(named=rows["quantity"] + ", " + rows["where"])
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.split("|")[1:-1]] or [line]
            header = header if len(cells) == len(header) else cells
            for title, cell in zip(header, cells):
                own = rows[rows["of"].eq(cells[0])] if len(cells) > 1 else rows
                for words in re.split("[,:] ", title) if len(cells) > 1 else ():
                    own = own[own["named"].str.contains(words, regex=False)]
                numbers = own[["number", "low", "high"]].to_numpy()
                numbers = np.vstack([numbers, -numbers[:, [0, 2, 1]]])
                known = {tuple(map(shown, three, found)) for found in re.findall(THREE, cell) for three in numbers}
                alone = re.findall(rf"{NUMBER}(?= %)|(?<![-\w^.])(?<!= )-?\d+\.\d+", re.sub(THREE, "", cell))
                known |= {shown(number, found) for found in alone for number, *_ in numbers if not np.isnan(number)}
                wrong += [(title, cells[0], found) for found in [*re.findall(THREE, cell), *alone] if found not in known]
                seen += len(alone) + len(re.findall(THREE, cell))
    assert not wrong and seen > 70, wrong
    first = table[(table["quantity"] == "models that reached the target") & ~table["where"].str.endswith(page.BOTH)]
    reached = [(int(row["number"]), int(row["n"])) for _, row in first.iterrows()]
    assert {(int(a), int(b)) for a, b in re.findall(r"(\d+) of (\d+)", text)} == set(reached)
    attention = table[table["quantity"].str.startswith("change of R^c") & (table["of"] != "mean")]
    assert len(attention) and (attention["low"] * attention["high"] > 0).all()  # "No interval of this table contains 0"


def test_the_page_of_made_up_tables(script, tmp_path):
    """Two widths; random settings of a rate each; one rate, three seeds a setting; the push of one model type."""
    rng, rows = np.random.default_rng(0), []
    for k in range(96):
        setting = {"model": "crate-c" if k % 4 < 2 else "crate", "width": 48 + k // 48 * 48, "lr": (1e-3, 3e-3)[k % 2]}
        rows.append(setting | {"batch_size": k, "reached_target": k > 0, "gap": rng.normal(), "gap_accuracy": rng.normal()})
        rows[-1] |= {name: rng.normal() for name in page.MEASURES if name == "baseline_steps" or "baseline" not in name}
    grid = pd.DataFrame(rows)
    small = grid[grid["width"] == 48]
    seeds = pd.concat([small.assign(lr=1e-3, reached_target=True, gap=small["gap"] + 0.1 * rng.normal(size=48)) for _ in "abc"])
    runs = pd.DataFrame([(seed, eta) for seed in range(3) for eta in (-0.01, 0.0, 0.01)], columns=["seed", "srr_reg"])
    runs = runs.assign(experiment="intervention", model="crate", width=48, depth=4, srr_layer="all", val_accuracy=0.5, run="",
                       reached_target=True, srr=30 - 900 * runs["srr_reg"], gap=1 + runs["seed"])  # fmt: skip
    (tmp_path / "digits").mkdir()
    study = small.assign(lr=np.exp(rng.uniform(-7, -6.8, 48)))
    for name, table in {"measures": grid, "study_measures": study, "one_lr_measures": seeds, "runs": runs}.items():
        table.to_csv(tmp_path / f"digits/{name}.csv", index=False)
    assert script("results.page", tmp_path) == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["srr_pushed.png", "srr_ranks.png"]
    found = pd.read_csv(tmp_path / "page.csv").set_index(["quantity", "of", "where"])
    options = dict(same=[("model",), ("model", "lr")], resamples=9)
    sets = {"grid": small[1:], "random": study[1:], "one rate": seeds, "one rate, d = 48, means": seeds}
    for name, table in sets.items():
        means, where = name.endswith("means"), f"digits, {name}, d = 48".replace("means, d = 48", "means")
        rows = ranks.correlate(table, ["model", "lr", "batch_size"], "gap", ["srr"], means=means, **options)
        statistics = {"all pairs": "tau", "same type": "tau_same_model", "same type and learning rate": "tau_same_model_lr"}
        for pairs, statistic in statistics.items():
            for of, row in zip(("SRR", "gap of another seed"), rows):
                own = found.loc[f"tau, gap, {pairs}", of, where]
                assert own["number"] == pytest.approx(row[statistic], abs=1e-4) and own["low"] < own["high"]
                assert (own["n"], own["pairs"]) == (row["models"], row[statistic.replace("tau", "pairs")])
    together = found.loc["tau, gap, same type", "SRR", "together"]
    assert together["n"] == 47 + 48 + 47 and together["low"] < together["number"] < together["high"]
    assert found.loc["pushed, eta = 0.01: SRR, %", "CRATE", "digits, d = 48"]["number"] == pytest.approx(-30)
    assert_refused(script("results.page", tmp_path / "none"), "digits or cifar10")
    grid.drop(columns="srr").to_csv(tmp_path / "digits/measures.csv", index=False)
    for name in ("study_measures", "one_lr_measures"):
        small[:2].to_csv(tmp_path / f"digits/{name}.csv", index=False)
    assert_refused(script("results.page", tmp_path), "too few models")
