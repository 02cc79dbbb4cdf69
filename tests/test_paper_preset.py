"""The paper preset's code paths at the full model sizes, a few steps each on a CPU: python -m pytest -m slow -k paper."""

import csv
import json

import pytest

from tests.conftest import run_script
from tests.test_data import write_cifar

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "dataset, width, model, flags",
    [
        ("cifar10", 384, "crate-c", ("--srr-reg", 1e-3)),
        ("cifar100", 768, "crate", ("--srr-reg", 1e-3, "--srr-layer", "random")),
        ("cifar10", 768, "vit", ()),
        ("cifar10", 768, "crate-e", ("--augment", "none", "--schedule", "constant", "--stop-at-loss", 0.01, "--dropout", 0.1)),
    ],
)
def test_paper_preset(monkeypatch, capsys, tmp_path, dataset, width, model, flags):
    write_cifar(tmp_path, monkeypatch, dataset, 4)
    out, results = tmp_path / "runs", tmp_path / "results"
    run = ("--preset", "paper", "--dataset", dataset, "--model", model, "--width", width, "--batch-size", 2, "--amp", "bf16")
    run += ("--data-dir", tmp_path, "--train-subset", 3, "--log-srr-every", 1, *flags, "--out", out)
    capsys.readouterr()
    assert run_script(monkeypatch, "train", *run, "--dry-run", "--epochs", 200) == 0
    assert "400 steps" in capsys.readouterr().out  # 200 epochs of two batches
    assert run_script(monkeypatch, "train", *run, "--epochs", 2) == 0
    (folder,) = (path.parent for path in out.glob("*/result.json"))
    before = (folder / "log.jsonl").read_text()
    (folder / "result.json").unlink()
    assert run_script(monkeypatch, "train", *run, "--epochs", 2) == 0  # resumed after its last epoch
    assert (folder / "log.jsonl").read_text() == before
    rows = [json.loads(line) for line in before.splitlines()]
    assert len(rows) == 3 and len(rows[-1]["srr"]) == 12 and rows[-1]["step"] == 4
    config = json.loads((folder / "config.json").read_text())
    assert (config["depth"], config["heads"], config["patch_size"], config["amp"]) == (12, 6, 4, "bf16")
    groups = ("--groups", "norms", "path-norm", "srr")
    assert run_script(monkeypatch, "measure", out, *groups, "--images", 3, "--out", results / "measures.csv") == 0
    (row,) = csv.DictReader((results / "measures.csv").open())
    assert float(row["srr"]) > 0 and float(row["l2"]) > 0
    assert run_script(monkeypatch, "crate.report", "--runs", out, "--results", results, "--attention", tmp_path) == 0
    assert f"--dataset {dataset}" in (results / "REPORT.md").read_text()
