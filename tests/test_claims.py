"""The verdict's rule, and claims on made-up tables whose answer is known. tests/test_results.py rebuilds all claims."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crate import claims


def test_verdict():
    for low, high, positive, negative in [
        (0.1, 0.5, "holds", "contradicted"),
        (-0.1, 0.5, "undecided", "undecided"),
        (1e-13, 3e-13, "undecided", "undecided"),  # rounding has no sign
    ]:
        assert (claims.verdict(low, high, +1), claims.verdict(low, high, -1)) == (positive, negative)
        assert (claims.verdict(-high, -low, -1), claims.verdict(-high, -low, +1)) == (positive, negative)


def test_mean_interval():
    wanted = stats.t.interval(0.9, 2, 7 / 3, stats.sem([1, 2, 4]))
    assert claims.mean_interval([1, 2, 4], 0.9) == pytest.approx((7 / 3, *wanted))
    for values in ([2.0, 2.0], [92.4 - 92.2, 90.6 - 90.4, 0.2], [3.0]):  # equal values are no certainty
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


def test_layers_at_initialisation():
    rows = [
        (seed, layer, value + seed * (layer == 3) / 10)
        for seed in range(3) for values in ([9, 7, 5, 8], [11, 9, 4, 10]) for layer, value in enumerate(values, 1)
    ]  # fmt: skip
    result = claims.initial_claims(pd.DataFrame(rows, columns=["seed", "layer", "srr"]), "")  # two model types
    assert find(result, "first three quarters") == ("holds", 4.6 - 10)
    assert find(result, "last quarter") == ("holds", 9 - 4.6)
    assert find(result, "optimised") == ("undecided", -1)  # equal in every seed
    assert find(result, "lowest layer") == ("finding", 3)


def test_training_raises_srr_is_decided_by_the_worst_step():
    generator = np.random.default_rng(3)
    layers = pd.MultiIndex.from_product([range(12), [1, 2, 3], [0, 1, 2]], names=["seed", "layer", "epoch"])
    layers = layers.to_frame(index=False)
    layers["srr"] = 3 * layers["epoch"] + generator.normal(size=108)  # here and there a single seed's step falls
    rising = layers.assign(model="crate-t")
    (row,) = claims.course_claims(rising, "")
    curves = rising.pivot(index=["layer", "epoch"], columns="seed", values="srr").groupby("layer").diff().dropna()
    assert row["verdict"] == "holds"
    assert row["p_value"] == pytest.approx(stats.ttest_1samp(curves, 0, axis=1).pvalue.max())  # all six steps must rise
    falls = rising.eval("layer == 2 and epoch == 2")
    falling = rising.assign(srr=rising["srr"] - 15 * falls)
    steps = falling[falls]["srr"].to_numpy() - falling.query("layer == 2 and epoch == 1")["srr"].to_numpy()
    (row,) = claims.course_claims(falling, "")
    assert (row["verdict"], row["number"]) == ("contradicted", pytest.approx(steps.mean()))
    assert row["p_value"] == pytest.approx(6 * stats.ttest_1samp(steps, 0).pvalue)  # one of 3 layers x 2 steps


def test_correlation_claims():
    taus = {"srr": 0.4, "path_norm": -0.05, "inverse_margin": -0.3, "log_prod_of_fro": -0.11, "log_sum_of_fro": -0.4}
    table = pd.DataFrame(taus.items(), columns=["measure", "tau"])
    table = table.assign(models=64, p_value=0.01, tau_low=table["tau"] - 0.1, tau_high=table["tau"] + 0.1)
    table.loc[table["measure"] == "log_sum_of_fro", "tau_high"] = 0.2
    result = claims.rank_claims(table, claims.OF_THE_SMALLER_WIDTH, "d = 48")
    assert find(result, "SRR correlates") == ("holds", 0.4) and result[0]["p_value"] == 0.01
    assert find(result, "norms all") == ("undecided", -0.4)  # the worst verdict decides
    assert find(result, "Path-norm")[0] == "undecided" and find(result, "1/margin")[0] == "contradicted"
    assert not any("PAC-Bayes" in row["claim"] for row in result)  # not measured


def test_intervention_slopes_are_those_of_least_squares():
    generator = np.random.default_rng(1)
    runs = pd.DataFrame([(seed, eta) for seed in range(4) for eta in (-0.1, 0.0, 0.1, 1.0)], columns=["seed", "srr_reg"])
    noise = generator.normal(size=(2, 16))
    runs = runs.assign(model="crate-t", srr=100 - 50 * runs["srr_reg"] + noise[0], gap=noise[1])
    expected = [np.polyfit(own["srr"], own["gap"], 1)[0] for _, own in runs.groupby("seed")]
    assert claims.slopes(runs).to_list() == pytest.approx(expected)
    assert find(claims.intervention_claims(runs, ""), "lowers SRR")[0] == "holds"
    both = pd.concat([runs, runs.assign(model="crate-n", gap=-3 * runs["gap"])])
    assert find(claims.intervention_claims(both, ""), "mean over types") == ("undecided", pytest.approx(-np.mean(expected)))


def test_each_lever_has_its_own_runs_and_those_without():
    runs = pd.DataFrame({"srr_reg": [0, 0.1, 0.1, 0.1, 0], "srr_layer": ["last", "last", "all", "2", "last"]})
    levers = {which: list(own.index) for which, own in claims.by_lever(runs).items()}
    assert levers == {", layer 2": [0, 3, 4], ", all layers": [0, 2, 4], "": [0, 1, 4]}


def test_observed_slope_is_that_of_a_regression_with_a_constant_for_each_type():
    generator = np.random.default_rng(2)
    model = np.repeat(["crate", "crate-c", "crate-t"], [4, 7, 5])
    srr = generator.normal(size=16) + np.repeat([10, 30, 20], [4, 7, 5])
    models = pd.DataFrame({"model": model, "srr": srr, "gap": 0.1 * srr + generator.normal(size=16)})
    design = np.column_stack([srr, *(model == one for one in np.unique(model))]).astype(float)
    coefficients, residual, _, _ = np.linalg.lstsq(design, models["gap"])
    error = np.sqrt(residual[0] / (16 - 4) * np.linalg.inv(design.T @ design)[0, 0])
    (row,) = claims.observed_slopes(models, "")
    assert row["number"] == pytest.approx(coefficients[0])
    assert (row["high"] - row["low"]) / 2 == pytest.approx(2.178813 * error)  # t of 12 degrees of freedom
    assert claims.observed_slopes(models.iloc[[0, 4, 5, 11]], "") == []


def test_claims_about_accuracies():
    plain = {"crate-c": [90, 91, 92], "crate-n": [89, 90.2, 91.1], "crate-t": [95, 95.5, 96], "crate": [96, 97, math.nan]}
    result = claims.model_claims(pd.DataFrame(plain), "")  # a row per seed
    assert find(result, "N beats") == ("contradicted", -0.9) and find(result, "falls behind")[1] == (6 + 5.3 + 4.9) / 3
    assert find(result, "nearer")[1] == ((190 - 90 - 96) + (191 - 91 - 97)) / 2  # without the seed that crate lacks
    accuracies = {"10": [94, 94.5, 95], "2": [96, 97, 96], "last": [92, 93, 91.5], "random": [93, 93.1, 93], "all": [5] * 3}
    by_layer = pd.DataFrame(accuracies).unstack().rename_axis(["srr_layer", "seed"]).to_frame(0.001)
    result = claims.layer_choice_claims(by_layer)
    assert find(result, "Shallower") == ("holds", (4 + 4 + 4.5) / 3)
    assert find(result, "fixed layer")[1] == np.mean([94, 284.5 / 3, 282.5 / 3]) - np.mean([93, 93.1, 93])
