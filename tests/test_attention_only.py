"""The attention-only experiment (Section 4.1; Figs. 1, 5) and attention_only.py."""

import pytest
import torch

from crate.compression import RULES, compress, random_orthonormal
from crate.files import read_csv
from crate.rates import log_approximations
from tests import reference
from tests.conftest import assert_refused

PAPER = dict(tokens=196, depth=12, width=384, heads=6)
TINY = dict(tokens=20, depth=3, width=12, heads=3)
FLAGS = ("--tokens", 20, "--depth", 3, "--width", 12, "--heads", 3)


@pytest.mark.parametrize("rule, panel", list(zip(RULES, "abcden")))
def test_rates_are_the_textbook_ones(rule, panel):
    settings = dict(alpha=0.7, gamma=0.3, scale=0.4)
    rows = compress(rule, 5, **TINY, **settings)
    generator = torch.Generator().manual_seed(5)
    Z = 0.4 * torch.randn(20, 12, generator=generator, dtype=torch.float64)
    assert [row["layer"] for row in rows] == [1, 2, 3]
    for row in rows:
        U = random_orthonormal(12, generator, torch.float64)
        assert row["before"] == pytest.approx(reference.subspace_coding_rate(Z, U, 3, 0.3).item(), rel=1e-9)
        Z = reference.update(panel, Z, U, 3, 0.7, 0.3)
        assert row["after"] == pytest.approx(reference.subspace_coding_rate(Z, U, 3, 0.3).item(), rel=1e-9, abs=1e-9)


def test_random_orthonormal():
    generator = torch.Generator().manual_seed(0)
    Q = torch.stack([random_orthonormal(3, generator, torch.float64) for _ in range(2000)])
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3, dtype=torch.float64).expand_as(Q))
    # Uniform: every entry has mean 0 and variance 1/d, signs and determinants are even.
    assert Q.mean(0).abs().max() < 0.06 and (Q.square().mean(0) - 1 / 3).abs().max() < 0.04
    assert abs(torch.linalg.det(Q).mean()) < 0.1


EXPECTED = {"exact": 977, "expansion": 2935, "first-order": 0, "second-order": 2938, "softmax": 1245}


@pytest.mark.parametrize("rule, after", EXPECTED.items())
def test_the_papers_setting(rule, after):
    first = compress(rule, 0, **PAPER | {"depth": 1})[0]
    assert first["before"] == pytest.approx(980, abs=5)
    assert first["after"] == pytest.approx(after, rel=0.005, abs=0.01)


def test_softmax_raises_the_rate_at_every_layer_and_the_exact_gradient_lowers_it():
    softmax, exact = (compress(rule, 0, **PAPER) for rule in ("softmax", "exact"))
    assert len(softmax) == len(exact) == 12
    assert all(row["after"] > row["before"] for row in softmax) and softmax[-1]["after"] == pytest.approx(4170, rel=0.01)
    assert all(row["after"] < row["before"] for row in exact)


def test_small_tokens_are_compressed_by_the_expansion():
    rows = compress("expansion", 0, **PAPER | {"depth": 2}, scale=384**-0.5)
    assert all(row["after"] < row["before"] for row in rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_overflow_ends_the_run_at_its_layer(dtype):
    rows = compress("second-order", 0, **TINY | {"depth": 30}, dtype=dtype)
    assert [row["overflow"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[-1]["after"] is None and rows[-2]["after"] > rows[-2]["before"] > 0
    assert len(rows) < 12


def test_log_approximations_touch_at_one_and_bound():
    x = torch.linspace(1, 5, 50, dtype=torch.float64)
    curves = log_approximations(x)
    assert all(values[0] == 0 for values in curves.values())
    assert torch.all(curves["first order"] >= curves["log x"]) and torch.all(curves["second order"] <= curves["log x"])
    torch.testing.assert_close(curves["second order"], curves["first order"] + curves["second-order term only"])


def test_overflow_at_the_first_layer_is_reported_too(script, tmp_path):
    code, out, error = script("attention_only", *FLAGS, "--scale", 1e160, "--seed", 0, "--out", tmp_path)
    assert code == 0, error
    assert "(a) exact gradient, Eq. 6 | - | - | - | 0 of 0 | 1 |" in out and (tmp_path / "fig_5.png").exists()


def test_script(script, tmp_path):
    code, out, _ = script("attention_only", *FLAGS, "--seed", 3, 4, "--depth", 9, "--out", tmp_path)
    assert code == 0 and "CRATE-N" in out and "overflow" in out
    figures = {f"fig_{n}.{kind}" for n in ("1a", "1b", "5") for kind in ("png", "pdf")}
    assert {path.name for path in tmp_path.iterdir()} == {"rates.csv", "log.csv"} | figures
    rows = read_csv(tmp_path / "rates.csv")
    assert {row["rule"] for row in rows} == set(RULES) and {row["seed"] for row in rows} == {"3", "4"}
    expected = compress("softmax", 4, **TINY | {"depth": 9})
    written = [row for row in rows if row["rule"] == "softmax" and row["seed"] == "4"]
    assert [float(row["after"]) for row in written] == [row["after"] for row in expected]
    assert any(row["overflow"] == "True" and row["after"] == "" for row in rows)
    assert "nan" not in (tmp_path / "rates.csv").read_text().lower()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--width", 13), ("--width 13", "--heads 3")),
        (("--gamma", -1), ("--gamma",)),
        (("--gamma", "nan"), ("--gamma",)),
        (("--scale", 0), ("--scale",)),
        (("--tokens", 0), ("--tokens",)),
        (("--seed", 1, 1), ("--seed 1 1", "twice")),
        (("--out", "/proc/nowhere"), ("--out /proc/nowhere",)),
    ],
)
def test_bad_flags(script, tmp_path, flags, words):
    out = () if "--out" in flags else ("--out", tmp_path)
    assert_refused(script("attention_only", *FLAGS, *out, *flags), *words)
