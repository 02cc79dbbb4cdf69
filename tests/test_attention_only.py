"""The attention-only experiment (Section 4.1; Figs. 1, 5), attention_only.py and its table."""

import shutil

import pandas as pd
import pytest
import torch

from crate import figures
from crate.compression import RULES, compress, random_orthonormal
from crate.report import attention_table
from tests import reference
from tests.conftest import assert_refused

TINY = dict(tokens=20, depth=3, width=12, heads=3)
FLAGS = ("--tokens", 20, "--depth", 9, "--width", 12, "--heads", 3)


@pytest.mark.parametrize("rule, panel", list(zip(RULES, "abcden")))
def test_rates_are_the_textbook_ones(rule, panel):
    rows = compress(rule, 5, **TINY, alpha=0.7, gamma=0.3, scale=0.4)
    generator = torch.Generator().manual_seed(5)
    Z = 0.4 * torch.randn(20, 12, generator=generator, dtype=torch.float64)
    assert [row["layer"] for row in rows] == [1, 2, 3]
    for row in rows:
        U = random_orthonormal(12, generator, torch.float64)
        moved = reference.update(panel, Z, U, 3, 0.7, 0.3)
        tokens = {"before": Z, "after": moved, "after_equal_norm": reference.at_norm_of(moved[None], Z[None])[0]}
        rates = {key: reference.subspace_coding_rate(values, U, 3, 0.3).item() for key, values in tokens.items()}
        assert {key: row[key] for key in rates} == pytest.approx(rates, rel=1e-9, abs=1e-9)
        Z = moved


def test_random_orthonormal():
    generator = torch.Generator().manual_seed(0)
    Q = torch.stack([random_orthonormal(3, generator, torch.float64) for _ in range(300)])
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3, dtype=torch.float64).expand_as(Q))
    # Uniform: every entry has mean 0 and variance 1/d, signs and determinants are even.
    assert Q.mean(0).abs().max() < 0.12 and (Q.square().mean(0) - 1 / 3).abs().max() < 0.08
    assert abs(torch.linalg.det(Q).mean()) < 0.2


@pytest.mark.parametrize(
    "rule, after, equal_norm",
    [
        ("exact", 977, 979),
        ("expansion", 2935, 775),
        ("first-order", 0, None),
        ("second-order", 2938, 776),
        ("softmax", 1245, 980),
    ],
)
def test_the_papers_setting(rule, after, equal_norm):
    paper = dict(tokens=196, width=384, heads=6)
    first, *rest = compress(rule, 0, depth=2, **paper)
    assert first["before"] == pytest.approx(980, abs=5) and first["after"] == pytest.approx(after, rel=0.005, abs=0.01)
    assert first["after_equal_norm"] == (equal_norm and pytest.approx(equal_norm, rel=0.005))
    assert len(rest) == 1
    small = compress("expansion", 0, depth=2, scale=384**-0.5, **paper)  # the expansion is good where tokens are small
    assert all(row["after"] < row["before"] for row in small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_overflow_ends_the_run_at_its_layer(dtype):
    rows = compress("second-order", 0, **TINY | {"depth": 30}, dtype=dtype)
    assert [row["overflow"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[-1]["after"] is None and rows[-2]["after"] > rows[-2]["before"] > 0 and len(rows) < 12


def test_table():
    rates = [
        (0, 1, 4.0, 3.0, 3.5),
        (1, 1, 5.0, 4.0, 5.5),
        (0, 2, 3.0, 3.5, 2.0),
        (1, 2, 4.0, 4.5, None),
        (0, 3, 3.5, None, None),
    ]
    rates = pd.DataFrame(rates, columns=["seed", "layer", "before", "after", "after_equal_norm"])
    table = attention_table(rates.assign(rule="exact", overflow=rates["layer"] == 3))
    line = next(line for line in table.splitlines() if "(a)" in line)
    rates = "4.50 ± 0.71 (n = 2) | 3.50 ± 0.71 (n = 2) | 4.50 ± 1.41 (n = 2) | 4.00 ± 0.71 (n = 2)"
    assert line == f"| {RULES['exact'][0]} | {rates} | 2 of 4 | 1 of 3 | 3 |"
    assert "Raw R^c" in table and "At\nequal norm" in table


def test_script(script, tmp_path):
    code, out, error = script("attention_only", *FLAGS, "--seed", 3, 4, "--out", tmp_path)
    assert code == 0 and "CRATE-N" in out and "overflow" in out, error
    assert {path.name for path in tmp_path.iterdir()} == {"rates.csv", "log.csv", "fig_1a.png", "fig_1b.png", "fig_5.png"}
    assert all(5000 < path.stat().st_size <= 200_000 for path in tmp_path.glob("*.png"))
    rates = pd.read_csv(tmp_path / "rates.csv")
    assert set(rates["rule"]) == set(RULES) and set(rates["seed"]) == {3, 4}
    expected = [row["after"] for row in compress("softmax", 4, **TINY | {"depth": 9})]
    assert rates.query("rule == 'softmax' and seed == 4")["after"].to_list() == expected
    assert rates.query("overflow")["after"].isna().all() and rates["overflow"].any()
    (tmp_path / "results").mkdir()
    shutil.copytree(tmp_path, tmp_path / "results" / "attention_only", ignore=shutil.ignore_patterns("results"))
    assert script("crate.report", "--results", tmp_path / "results")[0] == 0  # without any run
    text = (tmp_path / "results" / "REPORT.md").read_text()
    assert "CRATE-C's attention (Eq. 8) raises R^c" in text and out.splitlines()[-4] in text and "fig_5.png" in text


def test_overflow_at_the_first_layer(tmp_path):
    rates = pd.DataFrame(compress("exact", 0, **TINY, scale=1e160))
    assert "(a) exact gradient, Eq. 6 | - | - | - | - | 0 of 0 | 0 of 0 | 1 |" in attention_table(rates)
    figures.rates_by_layer(rates, {"exact": "(a)"}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--width", 13), ("--width", "--heads", "13", "3")), (("--gamma", -1), ("--gamma",)), (("--scale", 0), ("--scale",)),
        (("--gamma", "nan"), ("--gamma",)), (("--tokens", 0), ("--tokens",)), (("--seed", 1, 1), ("--seed 1 1", "twice")),
        (("--out", "/proc/nowhere"), ("--out /proc/nowhere",)),
    ],
)  # fmt: skip
def test_bad_flags(script, tmp_path, flags, words):
    assert_refused(script("attention_only", *FLAGS, "--out", tmp_path, *flags), *words)
