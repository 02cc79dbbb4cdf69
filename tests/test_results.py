"""The published results: every report is what its own tables say, byte for byte."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from crate.files import read_csv

ROOT = Path(__file__).parents[1]
REPORTS = sorted(path.parent for path in ROOT.glob("results/*/REPORT.md"))


@pytest.fixture(autouse=True)
def published(folder):
    """Results that were made anew here may be between two stages; the published ones are what git has."""
    changed = subprocess.run(["git", "status", "--porcelain", folder], cwd=ROOT, capture_output=True, text=True).stdout
    if changed:
        pytest.skip(f"{folder} differs from what was published")


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.name)
def test_report_is_rebuilt_from_its_tables(script, tmp_path, folder):
    for name in (folder.name, "attention_only"):
        shutil.copytree(ROOT / "results" / name, tmp_path / name)
    results, before = tmp_path / folder.name, {}
    for name in ("REPORT.md", "claims.csv"):
        before[name] = (results / name).read_bytes()
        (results / name).unlink()
    figures = {path.name for path in (results / "figures").glob("*.png")}
    shutil.rmtree(results / "figures")
    code, _, error = script("crate.report", "--results", results, "--attention", tmp_path / "attention_only")
    assert code == 0, error
    for name, content in before.items():
        assert (results / name).read_bytes() == content, name
    assert {path.name for path in (results / "figures").glob("*.png")} == figures


@pytest.mark.parametrize("folder", REPORTS, ids=lambda folder: folder.name)
def test_report_is_whole(folder):
    text = (folder / "REPORT.md").read_text()
    for target in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert 3000 < (folder / target).stat().st_size <= 200_000, target
    runs = {row["run"] for row in read_csv(folder / "runs.csv")}
    assert {row["run"] for row in read_csv(folder / "measures.csv")} <= runs, "measures of runs that the report doesn't know"
    assert f"# Report: {folder.name}" in text and "Where the numbers come from" in text
    assert not list(folder.rglob("*.pt"))


@pytest.mark.parametrize("folder", [ROOT / "results"])
def test_readme_shows_the_claims_on_all_data_sets(script, folder):
    code, table, error = script("crate.report", "--claims", *(ROOT / "results" / name for name in ("digits", "fashion-mnist")))
    assert code == 0, error
    assert table in (ROOT / "README.md").read_text()
