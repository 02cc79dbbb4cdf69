"""The verdict's rule, and every claim on made-up tables whose answer is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crate import claims

NAN = math.nan


@pytest.mark.parametrize(
    "low, high, positive, negative",
    [
        (0.1, 0.5, "holds", "contradicted"), (-0.5, -0.1, "contradicted", "holds"), (-0.1, 0.5, "undecided", "undecided"),
        (0.0, 0.5, "undecided", "undecided"), (-0.5, 0.0, "undecided", "undecided"), (NAN, NAN, "undecided", "undecided"),
        (1e-13, 3e-13, "undecided", "undecided"),  # rounding has no sign
    ],
)  # fmt: skip
def test_verdict(low, high, positive, negative):
    assert (claims.verdict(low, high, +1), claims.verdict(low, high, -1)) == (positive, negative)


def test_mean_interval():
    wanted = stats.t.interval(0.9, 2, 7 / 3, stats.sem([1, 2, 4]))
    assert claims.mean_interval([1, 2, 4], 0.9) == pytest.approx((7 / 3, *wanted))
    # Three seeds can't tell whether accuracies that count in steps of 1/500 are equal, in any notation of the difference.
    for values in ([2.0, 2.0], [0.0, 0.0, 0.0], [92.4 - 92.2, 90.6 - 90.4, 0.2], [3.0]):
        mean, *bounds = claims.mean_interval(values)
        assert mean == pytest.approx(values[0]) and np.isnan(bounds).all()
        assert claims.over_seeds("6", "", +1, pd.Series(values), margin=claims.POINTS)["verdict"] == "undecided"


def test_no_effect_is_two_one_sided_tests():
    generator, seen = np.random.default_rng(0), set()
    for _ in range(300):
        values = pd.Series(generator.normal(generator.uniform(-0.7, 0.7), generator.uniform(0.05, 0.7), 5))
        row = claims.over_seeds("6", "", +1, values, margin=(0.5, "points"))
        above, below = (stats.ttest_1samp(values, x, alternative=a).pvalue for x, a in ((-0.5, "greater"), (0.5, "less")))
        p_value = stats.ttest_1samp(values, 0).pvalue
        assert row["p_value"] == pytest.approx(p_value)
        expected = "no effect (within 0.5 points)" if max(above, below) < 0.05 else "undecided"
        if p_value < 0.05:
            expected = "holds" if values.mean() > 0 else "contradicted"
        assert row["verdict"] == expected
        seen.add(expected)
    assert len(seen) == 4


def find(rows, *words):
    (row,) = [row for row in rows if all(word in row["claim"] for word in words)]
    return row["verdict"], pytest.approx(row["number"])


def test_attention_claims():
    changes = {  # {rule: [seed][layer](raw, at equal norm)}
        "exact": [[(-1, -0.5), (-2, -0.2)], [(-1.1, -0.4), (-4, -0.3)]],
        "softmax": [[(2, 1e-13), (1, -2e-13)], [(3, 0.0), (1.1, -3e-13)]],
        "expansion": [[(5, -7), (9, 9)], [(5.1, -7.1), (8, 8)]],
    }
    rows = [
        {"rule": rule, "seed": seed, "layer": layer, "before": 10.0, "after": 10 + raw, "after_equal_norm": 10 + equal}
        for rule, seeds in changes.items() for seed, layers in enumerate(seeds) for layer, (raw, equal) in enumerate(layers, 1)
    ]  # fmt: skip
    rows.append({"rule": "expansion", "seed": 0, "layer": 3, "before": 1.0, "after": NAN, "after_equal_norm": NAN})
    result = claims.attention_claims(pd.DataFrame(rows[::-1]))  # in any order
    raw, equal = ([row for row in result if ("equal norm" in row["claim"]) is word] for word in (False, True))
    assert find(raw, "Eq. 6") == ("holds", -1.05) and find(equal, "Eq. 6") == ("undecided", -0.25)
    assert find(raw, "Eq. 7") == ("holds", 5.05) and find(equal, "Eq. 7") == ("contradicted", -7.05)
    assert find(raw, "Eq. 8") == ("holds", 1.05) and find(equal, "Eq. 8")[0] == "no effect (within 0.01 nats)"
    assert [row["n"] for row in result if "second-order" in row["claim"]] == [0, 0]


def curves(by_epoch, seeds=3):
    """Rows of layer-wise SRR of a model; seed s adds s to layer 3."""
    return [
        {"seed": seed, "epoch": epoch, "layer": layer, "srr": value + seed * (layer == 3) / 10}
        for seed in range(seeds) for epoch, values in by_epoch.items() for layer, value in enumerate(values, 1)
    ]  # fmt: skip


def test_initial_claims_take_the_mean_over_model_types():
    layers = pd.DataFrame(curves({0: [9, 7, 5, 8]}) + curves({0: [11, 9, 3, 10]}))
    result = claims.initial_claims(layers, "d = 384, L = 4, layers")
    assert find(result, "first three quarters") == ("holds", 4.1 - 10)
    assert find(result, "last quarter") == ("holds", 9 - 4.1)
    assert find(result, "optimised") == ("undecided", -1)  # equal in every seed
    assert find(result, "lowest layer") == ("finding", 3)
    assert {row["note"] for row in result} == {"d = 384, L = 4, layers"}


def test_training_is_judged_at_every_logged_epoch():
    falls_between = {0: [1, 1, 1, 1], 5: [3, 3, 3, 0], 10: [2.5, 4, 4, -1]}
    frame = pd.concat(pd.DataFrame(curves(falls_between)).assign(model=model) for model in ("crate", "crate-c"))
    frame.loc[frame["seed"] == 1, "srr"] *= 1.01
    result = claims.course_claims(frame, ", cifar100")
    assert find(result, "crate, cifar100") == ("contradicted", -(1 + 1.01 + 1) / 3)  # its last layer
    assert find(result, "but the last quarter", "crate-c, cifar100") == ("contradicted", -(0.5 + 0.505 + 0.5) / 3)
    assert [row["note"] for row in result if row["n"]] == ["83% of 18 steps rise", "62% of 24 steps rise"]


def test_operators():
    values = {"input": (5, NAN), "compressed": (7, 4.5), "normalised": (4, 4), "output": (4.5, 3)}  # raw, at equal norm
    rows = [
        ("crate-c", seed, layer, point, raw + layer + seed * (point != "input"), equal + layer + seed)
        for seed in range(3) for layer in (1, 2) for point, (raw, equal) in values.items()
    ]  # fmt: skip
    columns = ["model", "seed", "layer", "point", "rate_subspaces", "rate_subspaces_equal_norm"]
    changes = claims.operator_changes(pd.DataFrame(rows, columns=columns))
    assert changes.loc[("crate-c", "compressed", 1)].tolist() == [3, 0.5] and len(changes) == 9
    result = [row for row in claims.operator_claims(changes, "") if row["n"]]
    assert len(result) == 4 and find(result[:1], "attention step raises") == ("holds", 3)
    assert find(result, "attention", "equal norm") == ("undecided", 0.5)
    assert find(result[2:3], "ReLU") == ("undecided", 0.5) and find(result, "ReLU", "equal norm")[1] == -1


def statistic(measure, number, lead=None):
    """A row of correlation.csv whose numbers are all `number`, with the interval around it of +-0.1."""
    row = {"measure": measure, "models": 64, "p_value": 0.01, "p_within": 0.02, "lead_rival": "l2", "share_first": 0.9}
    for column in ("tau", "tau_between", "tau_within", "lead", "lead_psi_model", "diff_srr_psi_model"):
        value = NAN if column.startswith("lead") and lead is None else number
        row |= {column: value, f"{column}_low": value - 0.1, f"{column}_high": value + 0.1}
    return row


def test_correlation_claims():
    table = pd.DataFrame([
        statistic("l2", 0.8), statistic("srr", 0.4, lead=0.4), statistic("path_norm", -0.05), statistic("inverse_margin", -0.3),
        statistic("log_prod_of_fro", -0.11), statistic("log_sum_of_spec", -0.3), statistic("log_sum_of_fro", -0.4),
    ])  # fmt: skip
    table.loc[table["measure"].isin(["log_sum_of_spec", "log_sum_of_fro"]), "tau_high"] = 0.2
    small = claims.rank_claims(table, claims.OF_THE_SMALLER_WIDTH, "d = 48", "smaller width")
    assert find(small, "SRR correlates", "smaller width") == ("holds", 0.4)
    assert find(small, "within") == ("holds", 0.4) and find(small, "between") == ("holds", 0.4)
    assert find(small, "norms all") == ("undecided", -0.3)  # the worst verdict, then the worst number
    assert find(small, "Path-norm")[0] == "undecided" and find(small, "1/margin")[0] == "contradicted"
    assert not any("PAC-Bayes" in row["claim"] for row in small)  # not measured
    notes = {row["claim"].split(",")[0]: (row["note"], row["p_value"]) for row in small}
    assert notes["SRR has the highest tau"][0] == "d = 48, rival l2, first in 90% of resamples"
    assert notes["Products and sums of norms all correlate negatively"] == ("d = 48, log_sum_of_spec", 0.01)
    assert notes["SRR ranks within an implementation"][1] == 0.02 and np.isnan(notes["SRR ranks between implementations"][1])
    large = claims.rank_claims(table.replace("l2", "pacbayes_flatness"), claims.OF_THE_LARGER_WIDTH, "d = 96", "larger width")
    assert find(large, "model types") == ("contradicted", 0.8) and len(large) == 5  # dropout has not been varied
    (row,) = claims.rank_claims(table, claims.ACROSS_WIDTHS, "")
    assert (row["verdict"], row["number"], row["claimed"]) == ("finding", 0.4, "") and np.isnan(row["p_value"])
    assert claims.rank_claims(table.iloc[:1], claims.OF_THE_STUDY, "") == []
    certain = table.assign(tau_low=table["tau"], tau_high=table["tau"])  # every resample alike: too few models
    assert find(claims.rank_claims(certain, claims.OF_EACH_WIDTH, ""), "SRR correlates") == ("undecided", 0.4)


def test_intervention_slopes_are_those_of_least_squares():
    generator = np.random.default_rng(1)
    runs = pd.DataFrame([(seed, eta) for seed in range(4) for eta in (-0.1, 0.0, 0.1, 1.0)], columns=["seed", "srr_reg"])
    noise = generator.normal(size=(2, 16))
    runs = runs.assign(model="crate-t", srr=100 - 50 * runs["srr_reg"] + noise[0], gap=noise[1])
    expected = [np.polyfit(own["srr"], own["gap"], 1)[0] for _, own in runs.groupby("seed")]
    assert claims.slopes(runs).to_list() == pytest.approx(expected)
    result = claims.intervention_claims(runs)
    assert find(result, "slope", "crate-t")[1] == np.mean(expected) and find(result, "lowers SRR")[0] == "holds"


def test_claims_about_accuracies():
    plain = pd.DataFrame({  # a row per seed
        "crate-c": [90, 91, 92], "crate-n": [89, 90.2, 91.1], "crate-t": [95, 95.5, 96], "crate": [96, 97, NAN],
        "crate-fix": [94, 94, 95.5],
    })  # fmt: skip
    result = claims.model_claims(plain, "")
    assert find(result, "N beats") == ("contradicted", -0.9) and find(result, "falls behind")[1] == (6 + 5.3 + 4.9) / 3
    assert find(result, "nearer")[1] == ((190 - 90 - 96) + (191 - 91 - 97)) / 2  # without the seed that crate lacks
    assert find(result, "best", "T - Fix") == ("undecided", 1) and find(result, "T - C:")[0] == "holds"
    assert [row["n"] for row in result if "Identity" in row["claim"] or "crate-e" in row["claim"]] == [0, 0]
    gains = pd.DataFrame({0.001: [0.1, -0.1, 0.05, 2, 2.1, 1.8]}, pd.MultiIndex.from_product([["crate", "crate-c"], range(3)]))
    result = claims.gain_claims(gains, "")
    assert find(result, "crate-c, eta = 0.001")[0] == "holds"
    assert find(result, "crate, eta")[0] == "no effect (within 0.5 points)"


def test_layer_choice_claims():
    accuracies = {"10": [94, 94.5, 95], "2": [96, 97, 96], "last": [92, 93, 91.5], "random": [93, 93.1, 93], "all": [5, 6, 7]}
    by_layer = pd.DataFrame(accuracies).unstack().rename_axis(["srr_layer", "seed"]).to_frame(0.001)
    assert claims.in_depth(accuracies) == ["2", "10", "all", "last", "random"]
    result = claims.layer_choice_claims(by_layer)
    assert find(result, "Shallower") == ("holds", (4 + 4 + 4.5) / 3)
    assert find(result, "fixed layer")[1] == np.mean([94, 284.5 / 3, 282.5 / 3]) - np.mean([93, 93.1, 93])
