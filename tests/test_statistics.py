"""crate.statistics against loops over pairs, scipy, and tables whose statistics are known."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.stats import rankdata

from crate import statistics
from crate.statistics import correlate

AXES = {
    "model": ["crate-c", "crate-n", "crate-t", "crate"],
    "lr": ["1e-3", "3e-3"],
    "batch_size": [64, 128],
    "dropout": [0, 0.1],
}


def noisy(seeds=(0,), ties=False, holes=0, rng=0, axes=AXES):
    """A table with a gap and the measures `a` and `b`; rounded for ties; so many models are missing as `holes` says."""
    rng = np.random.default_rng(rng)
    table = [dict(zip(axes, values), seed=seed) for seed in seeds for values in itertools.product(*axes.values())]
    table = [table[k] for k in sorted(rng.permutation(len(table))[holes:])]
    for row in table:
        gap = rng.normal() + (row["lr"] == "1e-3") + (row["model"] == "crate")
        row |= {"gap": gap, "a": gap + rng.normal(), "b": rng.normal()}
        if ties:
            row |= {key: round(row[key]) for key in ("gap", "a", "b")}
    if holes:
        table[1]["a"], table[4]["a"], table[7]["a"] = math.nan, None, math.inf
    return table


def one(table, measure="a", **settings):
    (row,) = correlate(table, list(AXES), "gap", [measure], **{"resamples": 50} | settings)
    return row


def sign(x):
    return (x > 0) - (x < 0)


def agreement(a, b, measure="a"):
    return sign(a[measure] - b[measure]) * sign(a["gap"] - b["gap"])


def mean_over_pairs(rows, chosen=lambda a, b: True):
    values = [agreement(a, b) for a, b in itertools.permutations(rows, 2) if chosen(a, b)]
    return np.mean(values) if values else math.nan


def differ_on(a, b):
    return [name for name in AXES if a[name] != b[name]]


def slow_psi(rows, axis):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in AXES if name != axis), []).append(row)
    return np.mean([mean_over_pairs(group) for group in groups.values() if len(group) > 1])


def slow_k(rows, sets=[S for size in range(3) for S in itertools.combinations(AXES, size)]):
    """min over S of I(V_mu; V_g | U_S) / H(V_g | U_S), by dictionaries of conditional probabilities."""
    ratios = []
    for S in sets:
        cells = {}
        for a, b in itertools.permutations(rows, 2):
            v = (sign(a["a"] - b["a"]), sign(a["gap"] - b["gap"]))
            if 0 not in v:
                cells.setdefault((tuple(a[s] for s in S), tuple(b[s] for s in S)), []).append(v)
        total, information, entropy = sum(map(len, cells.values())), 0, 0
        for values in cells.values():
            n = len(values)
            for v_mu, v_g in itertools.product((-1, 1), (-1, 1)):
                p = values.count((v_mu, v_g)) / n
                p_mu, p_g = sum(v[0] == v_mu for v in values) / n, sum(v[1] == v_g for v in values) / n
                information += n / total * (p * math.log(p / (p_mu * p_g)) if p else 0)
            for v_g in (-1, 1):
                p_g = sum(v[1] == v_g for v in values) / n
                entropy -= n / total * (p_g * math.log(p_g) if p_g else 0)
        if entropy > 1e-9:
            ratios.append(information / entropy)
    return min(ratios)


def slow_errors(rows, axis):
    """The loss of each pair of settings that differ on one axis, the mean over seeds."""
    losses = {}
    for a, b in itertools.combinations(sorted(rows, key=lambda row: [str(row[name]) for name in AXES]), 2):
        if a["seed"] == b["seed"] and differ_on(a, b) == [axis]:
            losses.setdefault(tuple((a[name], b[name]) for name in AXES), []).append((1 - agreement(a, b)) / 2)
    return [np.mean(values) for values in losses.values()]


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("holes", (0, 7))
@pytest.mark.parametrize("seeds", ((0,), (3, 5, 8)))
def test_all_statistics_equal_loops_over_pairs(ties, holes, seeds):
    table = noisy(seeds, ties, holes)
    rows = [row for row in table if row["a"] is not None and math.isfinite(row["a"])]
    by_seed = [[row for row in rows if row["seed"] == seed] for seed in seeds]
    result = one(table, seed_column="seed", strata="model")

    def expect(column, of_seed, tolerance=1e-12):
        values = [of_seed(part) for part in by_seed]
        assert result[column] == pytest.approx(np.mean(values), abs=tolerance), column
        if f"{column}_sd" in result:
            sd = np.std(values, ddof=1) if len(values) > 1 else math.nan
            assert result[f"{column}_sd"] == pytest.approx(sd, abs=tolerance, nan_ok=True)

    assert (result["models"], result["dropped"], result["seeds"]) == (len(rows), len(table) - len(rows), len(seeds))
    expect("tau", mean_over_pairs)
    expect("tau_b", lambda part: stats.kendalltau([row["a"] for row in part], [row["gap"] for row in part]).statistic)
    expect("tau_within", lambda part: mean_over_pairs(part, lambda a, b: a["model"] == b["model"]))
    expect("tau_between", lambda part: mean_over_pairs(part, lambda a, b: a["model"] != b["model"]))
    expect("tau_in_crate-n", lambda part: mean_over_pairs(part, lambda a, b: a["model"] == b["model"] == "crate-n"))
    for axis in AXES:
        expect(f"psi_{axis}", lambda part: slow_psi(part, axis))
    expect("Psi", lambda part: np.mean([slow_psi(part, axis) for axis in AXES]))
    expect("K", slow_k, 1e-9)
    expect("K_within", lambda part: slow_k(part, [("model",)]), 1e-9)
    assert result["ties"] == sum(agreement(a, b) == 0 for part in by_seed for a, b in itertools.combinations(part, 2))
    errors = {axis: slow_errors(rows, axis) for axis in AXES}
    pooled = sum(errors.values(), [])
    assert [result[f"sign_error_{what}"] for what in ("mean", "max", "p90")] == pytest.approx(
        [np.mean(pooled), max(pooled), np.quantile(pooled, 0.9, method="inverted_cdf")]
    )
    for axis, values in errors.items():
        assert result[f"sign_error_mean_{axis}"] == pytest.approx(np.mean(values))


def test_tau_is_that_within_and_between_by_their_numbers_of_pairs():
    row = one(noisy(), strata="model")
    within = 4 * math.comb(8, 2)
    between = math.comb(32, 2) - within
    assert row["tau"] == pytest.approx((within * row["tau_within"] + between * row["tau_between"]) / (within + between))
    assert row["tau_within"] == pytest.approx(np.mean([row[f"tau_in_{model}"] for model in AXES["model"]]))
    assert row["tau_within_low"] <= row["tau_within"] <= row["tau_within_high"]


def test_a_measure_equal_to_the_gap_and_its_negative():
    table = [row | {"same": row["gap"], "negative": -row["gap"]} for row in noisy()]
    for row, value in zip(correlate(table, list(AXES), "gap", ["same", "negative"], strata="model", resamples=200), (1, -1)):
        keys = [key for key in row if key.split("_")[0] in ("tau", "Psi", "psi") and not key.endswith("_sd")]
        assert len(keys) > 15 and [row[key] for key in keys] == pytest.approx([value] * len(keys))
        assert row["K"] == pytest.approx(1) and row["ties"] == 0
        assert row["sign_error_mean"] == row["sign_error_max"] == (1 - value) / 2
        assert row["p_value"] == row["p_within"] == pytest.approx(1 / 201) and row["p_holm"] == pytest.approx(2 / 201)


def test_a_measure_that_is_one_of_the_hyperparameters():
    table = [row | {"gap": row["gap"] + 100 * (row["lr"] == "3e-3")} for row in noisy()]
    row = one(table, "lr", strata="lr")
    assert row["psi_lr"] == row["tau_between"] == 1 and row["Psi"] == 1 / 4
    assert row["psi_model"] == row["psi_batch_size"] == row["tau_within"] == 0
    assert row["tau"] == pytest.approx(16 * 16 / math.comb(32, 2)) and row["ties"] == 2 * math.comb(16, 2)


def test_pairs_join_no_two_seeds_unless_every_run_has_its_own():
    table = noisy((0, 1, 2))
    plain = one(table, seed_column="seed", strata="model")
    shifted = [row | {"a": row["a"] + 1000 * row["seed"], "gap": row["gap"] - 1000 * row["seed"]} for row in table]
    assert one(shifted, seed_column="seed", strata="model") == pytest.approx(plain, abs=1e-12, nan_ok=True)
    table = [row | {"seed": k} for k, row in enumerate(noisy())]
    assert one(table, seed_column="seed", strata="model") == pytest.approx(one(table, strata="model"), nan_ok=True)


def test_resamples_equal_loops_over_the_copies():
    rows = [row for row in noisy(ties=True, holes=5) if row["a"] is not None and math.isfinite(row["a"])]
    models = statistics.arrange(pd.DataFrame(rows), list(AXES))
    mu, g = (np.array([row[key] for row in rows], float) for key in ("a", "gap"))
    draws = statistics.draw(np.zeros(len(rows)), 10, np.random.default_rng(1))
    assert (draws.sum(axis=0) == len(rows)).all()
    i, j = statistics.all_pairs(models)
    groups = statistics.pair_groups(models, i, j, list(AXES), ())
    result = statistics.averages(mu[None], g, draws, i, j, groups)
    for r, draw in enumerate(draws.T.astype(int)):
        pairs = [(a, b) for a, b in itertools.combinations(np.repeat(np.arange(len(rows)), draw), 2) if a != b]
        assert result["tau"][0, 0, r] == pytest.approx(np.mean([agreement(rows[a], rows[b]) for a, b in pairs]), abs=1e-6)
        psis = []
        for axis in AXES:
            values = {}
            for a, b in ((rows[a], rows[b]) for a, b in pairs):
                if differ_on(a, b) == [axis]:
                    values.setdefault(tuple(a[name] for name in AXES if name != axis), []).append(agreement(a, b))
            psis += [np.mean([np.mean(of_group) for of_group in values.values()])] if values else []
        assert result["Psi"][0, 0, r] == pytest.approx(np.mean(psis), abs=1e-6)


def test_p_values_equal_exact_ones():
    """All 24 orders of four models: a perfect tau, either way round, has 2 of them; in two strata of three it is 2 of 36."""
    table = [{"x": k, "gap": k, "up": k, "tied": min(k, 2)} for k in range(4)]
    up, tied = correlate(table, ["x"], "gap", ["up", "tied"], resamples=20_000)
    assert up["p_value"] == pytest.approx(2 / 24, abs=0.01) and tied["p_value"] == pytest.approx(4 / 24, abs=0.01)
    assert tied["tau"] == pytest.approx(5 / 6) and tied["tau_b"] == pytest.approx(5 / math.sqrt(6 * 5))
    table = [{"x": k, "type": "ab"[k // 3], "gap": k % 3 + 10 * (k < 3), "up": k} for k in range(6)]
    (row,) = correlate(table, ["x", "type"], "gap", ["up"], strata="type", resamples=20_000)
    assert row["tau_within"] == 1 and row["tau_between"] == -1 and row["p_within"] == pytest.approx(2 / 36, abs=0.01)


def test_p_values_under_the_null_are_uniform():
    rng, names = np.random.default_rng(0), [f"m{k}" for k in range(200)]
    table = [{"x": k} | {name: rng.normal() for name in ("gap", *names)} for k in range(20)]
    p_values = [row["p_value"] for row in correlate(table, ["x"], "gap", names, resamples=500)]
    for t in (0.05, 0.2, 0.5, 0.8):  # up to the steps of tau, and three standard deviations of 200 measures
        assert np.mean(np.array(p_values) <= t) == pytest.approx(t, abs=0.1)


def test_p_values_of_several_seeds_permute_whole_settings():
    """Seeds that repeat each other are no further evidence: the p-value is that of one of them."""
    table = noisy()
    copies = [row | {"seed": seed} for seed in range(4) for row in table]
    once, often = (one(rows, "b", seed_column="seed", resamples=4000)["p_value"] for rows in (table, copies))
    assert once == often
    assert statistics.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)


def test_p_values_where_some_settings_have_a_second_run():
    """Only settings with as many runs can take turns: the p-value is that of all 6! 3! such orders."""
    generator = np.random.default_rng(4)
    setting = np.array([0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8])
    mu, gaps = generator.normal(size=12), generator.normal(size=12)
    gaps = gaps + 0.5 * mu
    table = [{"a": a, "seed": k, "b": m, "gap": g} for k, (a, m, g) in enumerate(zip(setting, mu, gaps))]
    (row,) = statistics.correlate(table, ["a"], "gap", ["b"], seed_column="seed", resamples=20_000)
    i, j = np.triu_indices(12, 1)
    signs = np.sign(mu[i] - mu[j])
    single, double = itertools.permutations(range(6)), np.array(list(itertools.permutations([6, 8, 10])))
    second = (double[:, :, None] + [0, 1]).reshape(6, 6)
    orders = np.array([[*one, *two] for one in single for two in second])
    moved = gaps[orders]
    taus = np.abs((signs * np.sign(moved[:, i] - moved[:, j])).sum(axis=1))
    assert row["p_value"] == pytest.approx(np.mean(taus >= taus[0]), abs=0.015)


def test_srr_against_its_rivals():
    """srr ranks like the gap, `near` has two neighbours the wrong way round; parts of SRR and baselines are no rivals."""
    table = [row | {"srr": row["gap"], "srr_rate": row["gap"], "baseline_x": row["gap"]} for row in noisy()]
    order = np.argsort([row["gap"] for row in table])
    for rank, k in enumerate(order):
        table[k] |= {"near": rank, "far": -rank}
    table[order[0]]["near"], table[order[1]]["near"] = 1, 0
    names = ["srr", "srr_rate", "baseline_x", "near", "far"]
    srr, rate, _, near, far = correlate(table, list(AXES), "gap", names, strata="model", resamples=400)
    assert srr["lead"] == near["diff_srr"] == pytest.approx(2 / math.comb(32, 2)) and srr["lead_rival"] == "near"
    assert srr["lead_low"] == 0 and srr["lead_high"] > srr["lead"] and "lead" not in near
    assert srr["share_first"] == pytest.approx((1 - (1 - 1 / 32) ** 32) ** 2, abs=0.08)  # both neighbours are drawn
    assert far["diff_srr"] == far["diff_srr_low"] == far["diff_srr_psi_lr"] == far["diff_srr_psi_lr_high"] == 2
    assert rate["diff_srr"] == rate["diff_srr_low"] == rate["diff_srr_high"] == 0
    assert math.isnan(rate["p_holm"]) and srr["p_holm"] == pytest.approx(3 * srr["p_value"])  # srr, near and far are counted
    assert srr["lead_within"] == pytest.approx(1 - near["tau_within"])
    assert srr["lead_psi_model"] == pytest.approx(1 - near["psi_model"])


def test_rank_correlation_given_others_is_that_of_residuals():
    rng = np.random.default_rng(0)
    steps = rng.normal(size=40)
    table = pd.DataFrame(
        {"id": range(40), "gap": steps + 0.3 * rng.normal(size=40), "steps": steps, "fixed": 1.0, "other": rng.normal(size=40)}
    )
    table["srr"], table["kind"] = steps + 0.3 * rng.normal(size=40), list("abcd") * 10
    table.loc[3, "srr"] = math.nan
    row = correlate(table, ["id"], "gap", ["srr"], controls=[["steps", "other", "fixed", "kind"]], resamples=200)[0]
    ranks = np.stack(
        [rankdata(table.drop(3)[name]) for name in ("srr", "gap", "steps", "other")]
        + [table["kind"].drop(3) == kind for kind in "abcd"]
    )
    mu, g = (values - ranks[2:].T @ np.linalg.lstsq(ranks[2:].T, values)[0] for values in ranks[:2])
    name = "rho_given_steps_other_fixed_kind"
    assert row[name] == pytest.approx(np.corrcoef(mu, g)[0, 1]) and abs(row[name]) < 0.4 < row["tau"]
    assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    times = rng.multinomial(40, np.full(40, 1 / 40), size=1).T  # a resample is the table with its rows so often
    found = statistics.partial_correlation(rankdata(table["gap"]), rankdata(table["other"]), [rankdata(table["steps"])], times)
    copies = np.repeat(np.stack([rankdata(table[name]) for name in ("gap", "other", "steps")]), times[:, 0], axis=1)
    a, b, c = np.corrcoef(copies)[[0, 0, 1], [1, 2, 2]]
    assert found == pytest.approx((a - b * c) / math.sqrt((1 - b**2) * (1 - c**2)))


def test_reliability():
    """Of gaps that are noise alone it is 0, of those that are three parts true to one of noise 3/4, inside strata, too.

    An image that is hard for all models alike, or for all of a stratum, shifts their gaps together: no noise between them.
    """
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(400, 100)) * 10 + 50 * rng.normal(size=100)
    noise, strata = losses.mean(axis=1), np.arange(400) % 2
    gaps = noise + rng.normal(size=400) * math.sqrt(3)
    result = statistics.reliability(gaps + 5 * strata, losses, strata)
    assert result["standard_error"] == pytest.approx(losses.std(axis=1, ddof=1) / 10)
    of_strata = losses + 50 * rng.normal(size=(2, 100))[strata]
    assert statistics.reliability(gaps, of_strata, strata)["reliability_within"] == pytest.approx(result["reliability_within"])
    assert statistics.reliability(noise, losses)["reliability"] == pytest.approx(0, abs=0.1)
    assert result["reliability_within"] == pytest.approx(3 / 4, abs=0.1) and result["reliability"] > 0.85
    assert math.isnan(statistics.reliability(gaps, losses)["reliability_within"])


def test_constant_and_missing_measures():
    table = noisy((0, 1))[:34]  # two models of the second seed: too few
    for k, row in enumerate(table):
        row |= {"constant": 3.0, "rare": row["gap"] if k < 2 else None}
    table[5]["gap"] = None
    constant, rare, a = correlate(table, list(AXES), "gap", ["constant", "rare", "a"], seed_column="seed", resamples=100)
    assert constant["tau"] == constant["tau_low"] == constant["Psi"] == 0 and constant["p_value"] == 1
    assert constant["note"] == "constant" and math.isnan(constant["tau_b"]) and math.isnan(constant["K"])
    assert (constant["models"], constant["dropped"], constant["seeds"]) == (31, 3, 1)
    assert (rare["note"], rare["models"]) == ("too few models", 0) and math.isnan(rare["tau"]) and math.isnan(rare["p_holm"])
    assert 0 < a["p_value"] < 0.05 and math.isnan(a["tau_sd"])


def test_first_columns_are_the_contract():
    first = "measure models tau tau_low tau_high p_value tau_b ties psi_model psi_lr psi_batch_size psi_dropout Psi K".split()
    assert list(one(noisy()))[: len(first) + 2] == [*first, "sign_error_mean", "sign_error_max"]


def test_too_many_pairs_leave_out_intervals_and_p_values(monkeypatch):
    monkeypatch.setattr(statistics, "MOST_WORK", 10_000)
    row = one(noisy(), strata="model")
    assert "left out" in row["note"] and row["resamples"] == 0 and row["tau"] == one(noisy(), resamples=5)["tau"]
    assert all(math.isnan(row[key]) for key in ("tau_low", "Psi_high", "tau_within_low", "p_value", "p_holm", "p_within"))


@pytest.mark.parametrize("cell", ("1,234.5", "12%", "high"))
def test_text_in_a_column_of_numbers_is_refused(cell):
    table = pd.DataFrame(noisy()).astype({"a": object}).assign(run="r")
    table.loc[3, "a"] = cell
    with pytest.raises(ValueError, match=rf"^measures a: row 3 \(run r\): '{cell}' is not a number"):
        one(table)


def test_bad_tables_raise_with_the_name_of_the_argument():
    table = noisy()
    with pytest.raises(ValueError, match="^hyperparameters: the combination model crate-c, .* occurs twice"):
        one([*table, table[0]])
    with pytest.raises(ValueError, match="^gap gap: 2 models; .* 3 or more"):
        one(table[:2])
    with pytest.raises(ValueError, match="^gap gap: 0 models; .* 3 or more"):
        one([row | {"gap": math.nan} for row in table])
    with pytest.raises(ValueError, match="^strata part: models that share all hyperparameters differ in it"):
        one([row | {"part": row["seed"]} for row in noisy((0, 1))], seed_column="seed", strata="part")


@pytest.mark.slow
def test_intervals_cover_about_as_often_as_they_claim():
    """32 models of a bivariate normal: tau is 2/pi arcsin(rho), and so are every psi and tau within types."""
    rng, rho, repeats = np.random.default_rng(0), 0.6, 400
    true, table = 2 / math.pi * math.asin(rho), noisy()
    covered = {"tau": 0, "Psi": 0, "tau_within": 0}
    for _ in range(repeats):
        for row, (x, y) in zip(table, rng.normal(size=(32, 2))):
            row |= {"gap": x, "a": rho * x + math.sqrt(1 - rho**2) * y}
        result = one(table, resamples=1000, strata="model")
        for key in covered:
            covered[key] += result[f"{key}_low"] <= true <= result[f"{key}_high"]
    assert 0.91 <= covered["tau"] / repeats <= 0.98, covered
    assert 0.93 <= covered["Psi"] / repeats <= 1.0, covered  # somewhat wide, see `averages`
    assert 0.85 <= covered["tau_within"] / repeats <= 0.98, covered
