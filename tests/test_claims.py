"""The verdict's rule, and every claim on made-up tables whose answer is known."""

import math

import pytest
from scipy import stats

from crate import claims, tables


@pytest.mark.parametrize(
    "low, high, side, expected",
    [
        (0.1, 0.5, +1, "holds"), (0.1, 0.5, -1, "contradicted"), (-0.5, -0.1, +1, "contradicted"), (-0.5, -0.1, -1, "holds"),
        (-0.1, 0.5, +1, "undecided"), (-0.1, 0.5, -1, "undecided"), (0.0, 0.5, +1, "undecided"), (0.0, 0.5, -1, "undecided"),
        (-0.5, 0.0, +1, "undecided"), (-0.5, 0.0, -1, "undecided"), (0.0, 0.0, +1, "undecided"),
        (math.nan, math.nan, +1, "undecided"), (math.nan, math.nan, -1, "undecided"),
    ],
)  # fmt: skip
def test_verdict(low, high, side, expected):
    assert claims.verdict(low, high, side) == expected


def test_interval():
    mean, low, high = claims.mean_interval([1.0, 2.0, 4.0])
    wanted = stats.t.interval(0.95, 2, 7 / 3, stats.sem([1, 2, 4]))
    assert (mean, low, high) == pytest.approx((7 / 3, *wanted))
    assert claims.mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)
    mean, low, high = claims.mean_interval([3.0])
    assert mean == 3 and math.isnan(low) and math.isnan(high)


def find(rows, *words):
    (row,) = [row for row in rows if all(word in row["claim"] + row["measure"] for word in words)]
    return row["verdict"], pytest.approx(row["number"])


def rates(rule, changes_by_seed):
    return [
        {"rule": rule, "seed": seed, "layer": layer, "before": 10.0, "after": 10.0 + change, "overflow": False}
        for seed, changes in enumerate(changes_by_seed) for layer, change in enumerate(changes, 1)
    ]  # fmt: skip


def test_attention_claims():
    rows = rates("exact", [[-1, -2, -3], [-1.1, -4, -2]]) + rates("softmax", [[2, 1, 9], [3, 5, 1.1]])
    rows += rates("expansion", [[5], [6]])
    rows.append({"rule": "expansion", "seed": 0, "layer": 2, "before": 1.0, "after": None, "overflow": True})
    result = claims.attention_claims(rows)
    assert find(result, "Eq. 6") == ("holds", -1.05) and find(result, "Eq. 8") == ("holds", 1.05)
    assert find(result, "Eq. 7")[1] == 5.5
    mixed = claims.attention_claims(rates("softmax", [[2, -1], [3, 1]]))
    assert [row["verdict"] for row in mixed] == ["undecided"]
    assert claims.attention_claims([]) == []


def layer_rows(model, seed, epoch, values):
    return [{"model": model, "seed": seed, "epoch": epoch, "layer": layer, "srr": v} for layer, v in enumerate(values, 1)]


def test_layer_claims():
    rows = []
    for seed, noise in enumerate((0.0, 0.1, 0.2)):
        rows += layer_rows("crate", seed, 0, [9, 7, 5 + noise, 8])
        rows += layer_rows("crate", seed, 20, [10, 9, 8 + noise, 7 + noise])
    result = claims.layer_claims(rows[::-1])  # in any order
    assert find(result, "first three quarters") == ("holds", -3.9)
    assert find(result, "last quarter") == ("holds", 2.9)
    assert find(result, "Training", "crate:") == ("contradicted", -0.9)  # the last layer
    assert len(result) == 3


def test_operator_claims():
    rows = []
    for seed in range(3):
        for layer in (1, 2):
            for point, value in (("input", 5), ("compressed", 7 + seed), ("normalised", 4), ("output", 4.5)):
                rows.append(dict(model="crate-c", seed=seed, epoch=9, layer=layer, point=point, rate_subspaces=value + layer))
    rows += [row | {"epoch": 0, "rate_subspaces": 0.0} for row in rows]
    result = claims.operator_claims(rows)
    assert find(result, "attention step")[1] == 3 and len(result) == 2
    assert find(result, "ReLU") == ("contradicted", 0.5)


def test_the_worst_verdict_decides_and_among_those_the_worst_number():
    def rows(*intervals):
        return [{"x": (low + high) / 2, "x_low": low, "x_high": high} for low, high in intervals]

    for side in (1, -1):
        for intervals, worst in (
            ([(0.1, 0.3), (-0.5, 0.9), (-0.2, 0.3), (0.2, 0.9)], 2),  # the widest reaches lowest, but is not the closest
            ([(0.1, 0.3), (0.05, 0.9)], 0),
            ([(-0.3, -0.1), (-0.9, 0.1), (-0.8, -0.1)], 2),
        ):
            own = rows(*(sorted((side * low, side * high)) for low, high in intervals))
            assert claims.deciding(own, "x", side) is own[worst]


def statistic(measure, tau, low, high, diff=0.0, psi=0.0):
    row = {"measure": measure, "models": 64.0, "tau": tau, "tau_low": low, "tau_high": high}
    row |= {"diff_srr": diff, "diff_srr_low": diff - 0.1, "diff_srr_high": diff + 0.1}
    for axis in ("model", "dropout"):
        row |= {f"diff_srr_psi_{axis}": psi, f"diff_srr_psi_{axis}_low": psi - 0.1, f"diff_srr_psi_{axis}_high": psi + 0.1}
    return row


def test_correlation_claims():
    table = [
        statistic("srr", 0.4, 0.2, 0.6), statistic("srr_rate", 0.9, 0.8, 1.0, -0.5, -0.5),
        statistic("path_norm", -0.3, -0.5, -0.1, 0.7, 0.2),
        statistic("log_prod_of_fro", -0.6, -0.7, -0.5, 1.0, 1.0), statistic("log_sum_of_spec", -0.1, -0.3, 0.1, 0.5, 0.9),
        statistic("pacbayes_flatness", 0.2, 0.1, 0.3, 0.2, -0.4),
    ]  # fmt: skip
    result = claims.correlation_claims(table, "d = 48", True)
    assert find(result, "SRR correlates") == ("holds", 0.4)
    assert find(result, "highest tau", "pacbayes_flatness") == ("holds", 0.2)  # srr's own part is no competitor
    assert find(result, "model-type axis", "pacbayes_flatness") == ("contradicted", -0.4)
    assert find(result, "norms", "log_sum_of_spec") == ("undecided", -0.1)  # the weakest of the group decides
    assert find(result, "Path-norm") == ("holds", -0.3) and find(result, "flatness correlates") == ("holds", 0.2)
    assert not [row for row in result if "1/margin" in row["claim"]] and {row["n"] for row in result} == {64}
    wide = claims.correlation_claims(table, "d = 96", False)
    assert find(wide, "dropout axis") == ("holds", -0.4) and find(wide, "model axis") == ("holds", -0.4)
    assert len(wide) == 4 and claims.correlation_claims(table[1:], "", True) == []
    without = [{key: value for key, value in row.items() if "dropout" not in key} for row in table]  # not varied
    assert len(claims.correlation_claims(without, "d = 96", False)) == 3


def test_regularisation_claims():
    table = {
        ("crate-c", None): [90, 91, 92], ("crate-c", "last"): [92.0, 93.1, 93.9], ("crate-c", "random"): [91, 91, 91],
        ("crate-c", "1"): [95, 96, 95.5], ("crate-n", None): [89, 90.2, 91.1],
        ("crate-t", None): [95, 95.5, 96], ("crate", None): [96, 97, 97],
        ("crate", "last"): [96, 98, 96], ("crate-e", None): [95, 96.1, 97.2],
    }  # fmt: skip

    def accuracy(model, layer=None, among_layers=False):
        return dict(zip("abc", table.get((model, layer), [])))

    result = claims.regularisation_claims(accuracy)
    assert find(result, "helps crate-c") == ("holds", 2.0)
    assert find(result, "helps crate:") == ("undecided", 0.0)
    assert find(result, "CRATE-N beats") == ("contradicted", -0.9)
    assert find(result, "nearer")[1] == ((190 - 90 - 96) + (191 - 91 - 97) + (192 - 92 - 97)) / 3
    assert find(result, "fixed layer") == ("holds", (2.5 + 3.55 + 3.7) / 3)
    assert find(result, "Shallower") == ("holds", (3 + 2.9 + 1.6) / 3)
    assert find(result, "exact gradient") == ("holds", 5.1)
    assert len(result) == 7


def test_claims_side_by_side_begin_with_what_is_contradicted():
    def row(text, number, verdict, measure=""):
        bounds = {"low": number - 1, "high": number + 1}
        return {
            "section": 5,
            "claim": text,
            "claimed": "> 0",
            "number": number,
            "measure": measure,
            "verdict": verdict,
        } | bounds

    a = [
        row("both", 2.0, "holds"),
        row("neither", 0.5, "undecided"),
        row("here", 3.0, "holds", "l2"),
        row("a alone", 2.0, "holds"),
    ]
    b = [
        row("both", 4.0, "holds"),
        row("neither", 0.1, "undecided"),
        row("here", 0.0, "undecided"),
        row("b", -2.0, "contradicted"),
    ]
    lines = tables.claims_side_by_side({"digits": a, "fashion": b}).splitlines()
    assert lines[0].endswith("| claimed | digits | fashion |")
    assert [line.split(" | ")[1] for line in lines[2:]] == ["b", "here", "neither", "both", "a alone"]
    assert lines[3] == "| 5 | here | > 0 | +3 (l2) [+2, +4] **holds** | +0 [-1, +1] **undecided** |"
    assert lines[2].endswith("| - | -2 [-3, -1] **contradicted** |")
