"""The published results: every report is what its own tables say, byte for byte."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

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
    if (folder / "measures.csv").exists():
        runs, measured = (set(pd.read_csv(folder / f"{name}.csv")["run"]) for name in ("runs", "measures"))
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
