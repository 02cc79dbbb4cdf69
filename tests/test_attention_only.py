"""The attention-only experiment (Section 4.1; Figs. 1, 5), attention_only.py and its table."""

import pandas as pd
import pytest
import torch

from crate.compression import RULES, random_orthonormal, rates_along
from tests import reference
from tests.conftest import assert_refused

TINY = dict(tokens=20, depth=3, width=12, heads=3)
FLAGS = ("--tokens", 20, "--depth", 9, "--width", 12, "--heads", 3)


@pytest.mark.parametrize("rule, panel", list(zip(RULES, "abcden")))
def test_rates_are_the_textbook_ones(rule, panel):
    rows = rates_along(rule, 5, **TINY, alpha=0.7, gamma=0.3, scale=0.4)
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


AFTER = {"exact": 976.9, "expansion": 2935.0, "first-order": 0, "second-order": 2937.9, "softmax": 1244.9, "negative": 0}


@pytest.mark.parametrize("rule", AFTER)
def test_the_papers_setting(rule):
    (row,) = rates_along(rule, 0, depth=1, tokens=196, width=384, heads=6)
    assert row["before"] == pytest.approx(979.8, rel=5e-3)
    assert row["after"] == pytest.approx(AFTER[rule], rel=5e-3, abs=1e-6)
    assert (row["after_equal_norm"] is None) == (AFTER[rule] == 0)  # what is left is rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_overflow_ends_the_run_at_its_layer(dtype):
    rows = rates_along("second-order", 0, **TINY | {"depth": 30}, dtype=dtype)
    assert [row["overflow"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[-1]["after"] is None and rows[-2]["after"] > rows[-2]["before"] > 0 and len(rows) < 12


def test_script(script, tmp_path):
    out = tmp_path / "results" / "attention_only"
    code, printed, error = script("attention_only", *FLAGS, "--seed", 3, 4, "--out", out)
    assert code == 0 and "CRATE-N" in printed, error
    assert {path.name for path in out.iterdir()} == {"rates.csv", "log.csv", "fig_1a.png", "fig_1b.png", "fig_5.png"}
    rates = pd.read_csv(out / "rates.csv")
    assert set(rates["rule"]) == set(RULES) and set(rates["seed"]) == {3, 4}
    softmax = rates.query("rule == 'softmax'")
    expected = [row["after"] for row in rates_along("softmax", 4, **TINY | {"depth": 9})]
    assert softmax.query("seed == 4")["after"].to_list() == expected
    first = softmax.query("layer == 1")["after_equal_norm"]
    (line,) = [line for line in printed.splitlines() if line.startswith("(e)")]
    assert line.split()[-2:] == [f"{first.mean():.2f}", f"{first.std():.2f}"] and "over 2 seeds" in printed
    assert rates.query("overflow")["after"].isna().all() and rates["overflow"].any()


@pytest.mark.parametrize("flags, word", [(("--width", 13), "--width"), (("--seed", 1, 1), "--seed 1 1")])
def test_bad_flags(script, tmp_path, flags, word):
    assert_refused(script("attention_only", *FLAGS, "--out", tmp_path, *flags), word)
