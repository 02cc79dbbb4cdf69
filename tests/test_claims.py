"""The verdict's rule, and claims on made-up tables whose answer is known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crate import claims


@pytest.mark.parametrize("side", (1, -1))
def test_verdict(side):
    above, across, below = (
        tuple(side * x for x in bounds) for bounds in ((0.3, 0.1, 0.5), (0.2, -0.1, 0.5), (-0.2, -0.4, -0.1))
    )
    for numbers, expected in [
        ([above, above], "holds"),
        ([below, below], "contradicted"),
        ([across, across], "undecided"),
        ([(0.2, math.nan, math.nan)], "undecided"),  # an interval without width decides nothing
        ([above, across, below], "contradicted in 1 of 3, holds in 1 of 3"),
    ]:
        (row,) = claims.claim("6", "", side, dict(zip("abc", numbers)), "3 seeds")
        assert row["verdict"] == expected
    assert claims.claim("6", "", side, {}, "") == []


def test_intervals_over_seeds():
    """Those of one row hold together; equal values are no certainty."""
    values = {name: pd.Series(np.random.default_rng(0).normal(size=6)) for name in "abcd"}
    (row,) = claims.over_seeds("6", "", +1, values)
    low, high = stats.ttest_1samp(values["a"], 0).confidence_interval(1 - 0.05 / 4)
    assert f"[{low:+.3g}, {high:+.3g}]" in row["numbers"] and row["n"] == "6 seeds"
    wanted = stats.t.interval(0.9, 2, 7 / 3, stats.sem([1, 2, 4]))
    assert claims.mean_interval([1, 2, 4], 0.9) == pytest.approx((7 / 3, *wanted))
    for values in ([2.0, 2.0], [92.4 - 92.2, 90.6 - 90.4, 0.2], [3.0]):
        mean, *bounds = claims.mean_interval(values)
        assert mean == pytest.approx(values[0]) and np.isnan(bounds).all()
        assert claims.over_seeds("6", "", +1, {"": pd.Series(values)}, margin=0.5)[0]["verdict"] == "undecided"


def test_no_effect_is_two_one_sided_tests():
    generator, seen = np.random.default_rng(0), set()
    for _ in range(300):
        values = pd.Series(generator.normal(generator.uniform(-0.7, 0.7), generator.uniform(0.05, 0.7), 5))
        (row,) = claims.over_seeds("6", "", +1, {"": values}, margin=0.5)
        above, below = (stats.ttest_1samp(values, x, alternative=a).pvalue for x, a in ((-0.5, "greater"), (0.5, "less")))
        expected = "no effect" if max(above, below) < 0.05 else "undecided"
        if stats.ttest_1samp(values, 0).pvalue < 0.05:
            expected = "holds" if values.mean() > 0 else "contradicted"
        assert row["verdict"] == expected
        seen.add(expected)
    assert len(seen) == 4


def test_disagreements_come_first_and_verdicts_are_counted():
    verdicts = ["holds", "undecided", "contradicted in 1 of 2, holds in 1 of 2", "contradicted", "holds in 1 of 3"]
    verdicts += ["no effect", "contradicted in 2 of 3", "holds"]
    rows = [{"claim": claim, "verdict": verdict} for verdict in verdicts for claim in ("a", f"{claims.BEYOND}b")]
    (first, ours), (second, others) = claims.by_verdict(rows).items()
    assert [row["verdict"] for row in ours] == [verdicts[i] for i in (3, 2, 6, 5, 1, 4, 0, 7)]
    assert first == (
        "The paper's 8 claims: contradicted 1, contradicted in part 2, no effect 1, undecided 1, holds in part 1, holds 2"
    )
    assert len(others) == 8 and second.startswith("Beyond the paper, 8 claims: ")


def find(rows, *words):
    """The verdict and the numbers of the only row whose claim has these words."""
    (row,) = [row for row in rows if all(word in row["claim"] for word in words)]
    return row["verdict"], row["numbers"]


def test_layers_at_initialisation():
    rows = [
        (seed, layer, value + seed * (layer == 3) / 10)
        for seed in range(3) for values in ([9, 7, 5, 8], [11, 9, 4, 10]) for layer, value in enumerate(values, 1)
    ]  # fmt: skip
    layers = pd.DataFrame(rows, columns=["seed", "layer", "srr"]).assign(of="d = 12", width=12, model="crate")
    layers = layers.assign(rate_subspaces=-layers["srr"] / 2, rate=1.0)
    layers = pd.concat([layers, layers.assign(of="d = 24", width=24), layers.assign(model="crate-e", srr=0)])
    result = claims.initial_claims(layers)  # about the smallest width's main types
    (falls, fall), (rises, rise) = find(result, "first three quarters"), find(result, "last quarter")
    assert falls == rises == "holds" and fall.startswith("d = 12 -5.4 [") and rise.startswith("d = 12 +4.4 [")
    verdict, numbers = find(result, "without its sparsity")
    assert verdict == "contradicted" and numbers.startswith("d = 12 +2.7 [")


def test_training_raises_srr_is_decided_by_the_worst_step():
    generator = np.random.default_rng(3)
    layers = pd.MultiIndex.from_product([range(12), [1, 2, 3], [0, 1, 2]], names=["seed", "layer", "epoch"])
    layers = layers.to_frame(index=False)
    layers["srr"] = 3 * layers["epoch"] + generator.normal(size=108)  # here and there a single seed's step falls
    rising = layers.assign(of="d = 12", model="crate-t")
    assert find(claims.course_claims(rising))[0] == "holds"
    falls = rising.eval("layer == 2 and epoch == 2")
    falling = rising.assign(srr=rising["srr"] - 15 * falls)
    steps = falling[falls]["srr"].to_numpy() - falling.query("layer == 2 and epoch == 1")["srr"].to_numpy()
    verdict, numbers = find(claims.course_claims(falling))
    low, _ = stats.ttest_1samp(steps, 0).confidence_interval(1 - 0.05 / 6)  # of 3 layers x 2 steps
    assert verdict == "contradicted" and f") {steps.mean():+.3g} [{low:+.3g}" in numbers
    rise = (np.diff(falling.sort_values("epoch").groupby(["seed", "layer"])["srr"].agg(list).to_list()) > 0).mean()
    assert numbers.startswith(f"d = 12: crate-t ({rise:.0%} rise)")


def test_correlation_claims():
    taus = {"srr": 0.4, "path_norm": -0.05, "inverse_margin": -0.3, "log_prod_of_fro": -0.11, "log_sum_of_fro": 0.4}
    table = pd.DataFrame(taus.items(), columns=["measure", "tau"]).assign(gap="gap", models=64, tau_same_model=-0.2)
    for name in ("tau", "tau_same_model"):
        table = table.assign(**{f"{name}_low": table[name] - 0.1, f"{name}_high": table[name] + 0.1})
    accuracy = table.iloc[:1].assign(gap="gap_accuracy", tau=-0.5, tau_low=-0.6, tau_high=-0.4)
    result = claims.rank_claims({"d = 48": pd.concat([table, accuracy])}, {})
    assert find(result, "SRR correlates with the gap: tau") == ("holds", "d = 48 +0.4 [+0.3, +0.5]")
    assert find(result, "gap in accuracy") == ("contradicted", "d = 48 -0.5 [-0.6, -0.4]")
    assert find(result, "models of one type: tau") == ("contradicted", "d = 48 -0.2 [-0.3, -0.1]")
    assert find(result, "Norms")[0] == "contradicted in 1 of 3, holds in 1 of 3"
    assert find(result, "Norms")[1].startswith("d = 48: path_norm -0.05 [-0.15, +0.05]; log_prod_of_fro -0.11")
    assert find(result, "1/margin")[0] == "contradicted"
    assert not any("random settings" in row["claim"] or "highest" in row["claim"] for row in result)  # not measured


def test_intervention_slopes_are_those_of_least_squares():
    generator = np.random.default_rng(1)
    runs = pd.DataFrame([(seed, eta) for seed in range(4) for eta in (-0.1, 0.0, 0.1, 1.0)], columns=["seed", "srr_reg"])
    noise = generator.normal(size=(2, 16))
    runs = runs.assign(model="crate-t", srr=100 - 50 * runs["srr_reg"] + noise[0], gap=noise[1])
    expected = [np.polyfit(own["srr"], own["gap"], 1)[0] for _, own in runs.groupby("seed")]
    assert claims.slopes(runs)["crate-t"].to_list() == pytest.approx(expected)


def test_observed_slope_is_that_of_a_regression_with_a_constant_for_each_type(tmp_path):
    generator = np.random.default_rng(2)
    model = np.repeat(["crate", "crate-c", "crate-t"], [4, 7, 5])
    srr = generator.normal(size=16) + np.repeat([10, 30, 20], [4, 7, 5])
    models = pd.DataFrame({"model": model, "srr": srr, "gap": 0.1 * srr + generator.normal(size=16)})
    design = np.column_stack([srr, *(model == one for one in np.unique(model))]).astype(float)
    coefficients = np.linalg.lstsq(design, models["gap"])[0]
    for models, slope in (models, coefficients[0]), (models.iloc[[0, 4, 11]], math.nan):
        models.assign(reached_target=True, width=48).to_csv(tmp_path / "measures.csv")
        assert claims.observed_slope(tmp_path) == pytest.approx(slope, nan_ok=True)
    assert math.isnan(claims.observed_slope(tmp_path / "none"))


def test_claims_about_accuracies():
    plain = {"crate-c": [90, 91, 92], "crate-n": [89, 90.2, 91.1], "crate-t": [95, 95.5, 96], "crate": [96, 97, math.nan]}
    points = pd.concat({"d = 48": pd.DataFrame(plain).rename_axis("seed").rename_axis("model", axis=1).stack()}, names=["of"])
    eta = pd.concat({0.1: 0 * points + np.arange(len(points))}, names=["srr_reg"])
    result = claims.accuracy_claims(points.swaplevel("of", "seed"), eta.swaplevel("of", "seed"))
    assert find(result, "N beats")[0] == "contradicted" and find(result, "falls behind")[1].startswith("d = 48 -5.4 [")
    assert find(result, "nearer")[1].startswith("d = 48 +3.5 [")  # without the seed that crate lacks
    assert find(result, "transpose")[1].startswith("d = 48: to C +4.5 [")
    assert find(result, "in the loss helps, any other eta")[1].startswith("eta = 0.1, d = 48: ")
    by_layer = {"1": [94, 94.5, 95], "2": [96, 97, 96], "all": [5] * 3, "last": [92, 93, 91.5], "random": [93, 93.1, 93]}
    by_layer = pd.DataFrame(by_layer).rename_axis("seed").rename_axis("srr_layer", axis=1).stack()
    result = claims.layer_choice_claims(by_layer)
    assert find(result, "fixed layer")[1].startswith("+1.3 [")


def test_changes_are_shares_of_the_types_mean():
    plain = pd.DataFrame([("crate", 0, 10.0, 1.0), ("crate", 1, 30.0, 3.0)], columns=["model", "seed", "srr", "gap"])
    pushed = plain.assign(srr_reg=0.1, srr=plain["srr"] - 2, gap=plain["gap"] + [1, 2])
    assert claims.changes(plain, pushed)[["srr_reg", "srr", "gap"]].to_numpy().tolist() == [[0.1, -10, 50], [0.1, -10, 100]]
