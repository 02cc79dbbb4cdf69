"""crate.ranks against loops over pairs, scipy, and tables whose statistics are known."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crate import ranks
from crate.ranks import correlate

AXES = {
    "model": ["crate-c", "crate-n", "crate-t", "crate"],
    "lr": [1e-3, 3e-3],
    "batch_size": [64, 128],
    "dropout": [0, 0.1],
}
SHARED = {"tau": (), "tau_same_model": ("model",), "tau_same_model_lr": ("model", "lr")}


def noisy(seeds=1, ties=False, holes=0, rng=0):
    """A table with a gap and the measure `a`; rounded for ties; `holes` models are missing, and then three numbers of `a`."""
    rng = np.random.default_rng(rng)
    table = [dict(zip(AXES, values)) for values in itertools.product(*AXES.values()) for _ in range(seeds)]
    table = [table[k] for k in sorted(rng.permutation(len(table))[holes:])]
    for row in table:
        gap = rng.normal() + (row["lr"] == 1e-3) + (row["model"] == "crate")
        row |= {"gap": gap, "a": gap + rng.normal(), "b": rng.normal()}
        if ties:
            row |= {key: round(row[key]) for key in ("gap", "a", "b")}
    if holes:
        table[1]["a"], table[4]["a"], table[7]["a"] = math.nan, None, math.inf
    return table


def one(table, measure="a", axes=AXES, **settings):
    row, *_ = correlate(table, axes, "gap", [measure], **{"resamples": 50} | settings)
    return row


def sign(x):
    return (x > 0) - (x < 0)


def agreement(a, b, measure="a"):
    return sign(a[measure] - b[measure]) * sign(a["gap"] - b["gap"])


def share(a, b, columns):
    return all(a[column] == b[column] for column in columns)


def slow_psi(rows, axis):
    others, groups = [name for name in AXES if name != axis], {}
    for a, b in itertools.combinations(rows, 2):
        if share(a, b, others) and a[axis] != b[axis]:
            groups.setdefault(tuple(a[name] for name in others), []).append(agreement(a, b))
    return np.mean([np.mean(values) for values in groups.values()])


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("holes", (0, 7))
@pytest.mark.parametrize("seeds", (1, 3))
def test_all_statistics_equal_loops_over_pairs(ties, holes, seeds):
    table = noisy(seeds, ties, holes)
    rows = [row for row in table if row["a"] is not None and math.isfinite(row["a"])]
    result = one(table)
    assert result["models"] == len(rows) and result["gap"] == "gap" and result["measure"] == "a"
    for name, columns in SHARED.items():
        values = [agreement(a, b) for a, b in itertools.combinations(rows, 2) if share(a, b, columns)]
        assert result[name] == pytest.approx(np.mean(values), abs=1e-12), name
        assert result[name.replace("tau", "pairs")] == len(values)
        assert result[f"{name}_low"] <= result[name] <= result[f"{name}_high"]
    for axis in AXES:
        assert result[f"psi_{axis}"] == pytest.approx(slow_psi(rows, axis), abs=1e-12), axis
    assert result["Psi"] == pytest.approx(np.mean([slow_psi(rows, axis) for axis in AXES]), abs=1e-12)
    if not ties:
        a, gap = zip(*((row["a"], row["gap"]) for row in rows))
        assert result["tau"] == pytest.approx(stats.kendalltau(a, gap).statistic)
    of_statistic = [(name, f"{name}_low", f"{name}_high", name.replace("tau", "pairs")) for name in SHARED]
    names = ["gap", "measure", "models", *sum(of_statistic, ()), *(f"psi_{axis}" for axis in AXES), "Psi"]
    assert [*result][: len(names)] == names


@pytest.mark.parametrize("seeds", (1, 2))  # that seeds share their rate doesn't make rates a grid's
def test_rates_drawn_at_random_are_the_same_within_a_factor(seeds):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"model": [*"ab"] * 40, "lr": np.exp(rng.uniform(-7, -5, 80))})
    table = pd.concat([table] * seeds, ignore_index=True).assign(gap=rng.normal(size=80 * seeds))
    table["a"] = table["gap"] + rng.normal(size=80 * seeds)
    near = [agreement(a, b) for a, b in itertools.combinations(table.to_dict("records"), 2)
            if a["model"] == b["model"] and max(a["lr"], b["lr"]) <= 1.25 * min(a["lr"], b["lr"])]  # fmt: skip
    row = one(table, axes=["model", "lr"])
    assert row["pairs_same_model_lr"] == len(near) and row["tau_same_model_lr"] == pytest.approx(np.mean(near))


def test_fewer_than_twenty_pairs_give_no_number():
    row = one(noisy(), same=[("model", "lr", "batch_size"), ("model", "batch_size")])
    assert row["pairs_same_model_lr_batch_size"] == 16 and math.isnan(row["tau_same_model_lr_batch_size"])
    assert math.isnan(row["tau_same_model_lr_batch_size_high"]) and math.isfinite(row["tau_same_model_batch_size"])


@pytest.mark.parametrize("seeds", (1, 3))
def test_resamples_equal_loops_over_the_copies(seeds):
    """Copies of a setting bring their seeds' own pairs each, and make no pairs with each other."""
    table = pd.DataFrame([row for row in noisy(seeds, ties=True, holes=5) if row["a"] is not None and math.isfinite(row["a"])])
    rows, n = table.to_dict("records"), len(table)
    setting = table.groupby([*AXES]).ngroup().to_numpy()
    i, j = ranks.matched(table, (), setting)
    draws = ranks.draw(setting, np.zeros(n), 10, np.random.default_rng(1))
    assert (draws[:, 0] == 1).all() and (draws[np.unique(setting, return_index=True)[1]].sum(axis=0) == setting.max() + 1).all()
    others = [name for name in AXES if name != "lr"]
    group = table.groupby(others).ngroup().to_numpy()
    own = group[i] == group[j]
    tau = ranks.tau(ranks.agreement(table, "gap", ["a"], i, j), i, j, draws, setting)[0]
    psi = ranks.tau(ranks.agreement(table, "gap", ["a"], i[own], j[own]), i[own], j[own], draws, setting, group[i[own]])[0]
    for r, times in enumerate(draws.T.astype(int)):
        copies = [(a, copy) for a in range(n) for copy in range(times[a])]
        pairs = [(a, b) for (a, first), (b, second) in itertools.combinations(copies, 2)
                 if setting[a] != setting[b] or (first == second and a != b)]  # fmt: skip
        assert tau[r] == pytest.approx(np.mean([agreement(rows[a], rows[b]) for a, b in pairs]))
        values = {}
        for a, b in pairs:
            if share(rows[a], rows[b], others):
                values.setdefault(group[a], []).append(agreement(rows[a], rows[b]))
        assert psi[r] == pytest.approx(np.mean([np.mean(of_group) for of_group in values.values()]))


def test_a_bootstrap_draws_settings_with_all_their_seeds_inside_strata():
    setting, stratum = np.repeat(np.arange(6), 3), np.repeat([0, 1], 9)
    draws = ranks.draw(setting, stratum, 50, np.random.default_rng(0)).reshape(6, 3, 51)
    assert (draws == draws[:, :1]).all() and (draws[:3, 0].sum(axis=0) == 3).all() and (draws[3:, 0].sum(axis=0) == 3).all()


def test_no_interval_has_no_width():
    rng = np.random.default_rng(0)
    table = [{"x": x, "gap": rng.normal(), "a": rng.normal()} for x in range(3) for _ in range(8)]
    row = one(table, axes=["x"], same=[("x",)])
    assert row["tau_same_x_low"] < row["tau_same_x"] < row["tau_same_x_high"]
    row = one(table[:8], axes=["x"])
    assert math.isnan(one([row | {"model": row["x"]} for row in table], axes=["model"])["tau_same_model_low"])
    assert math.isfinite(row["tau"]) and math.isnan(row["tau_low"]) and math.isnan(row["tau_high"])


def test_the_gap_of_another_seed():
    """Against loops over all ordered pairs of seeds; a setting with one seed has none, nor have two seeds of one setting."""
    table = noisy(3, ties=True, holes=9)
    assert "baseline_other_seed" not in [row["measure"] for row in correlate(noisy(), AXES, "gap", ["a"], resamples=9)]
    _, row = correlate(table, AXES, "gap", ["a"], same=[("model",), tuple(AXES)], resamples=9)
    seeds = {}
    for model in table:
        seeds.setdefault(tuple(model[axis] for axis in AXES), []).append(model["gap"])
    values = {"tau": [], "tau_same_model": []}
    for (a, of_a), (b, of_b) in itertools.combinations(seeds.items(), 2):
        orders = itertools.product(itertools.permutations(of_a, 2), itertools.permutations(of_b, 2))
        signs = [sign(x - y) * sign(x_other - y_other) for (x, x_other), (y, y_other) in orders]
        for name in ("tau", "tau_same_model") if signs and a[0] == b[0] else ("tau",) if signs else ():
            values[name] += [np.mean(signs)] * len(of_a) * len(of_b)  # each of their models' pairs
    for name, expected in values.items():
        assert row[name] == pytest.approx(np.mean(expected), abs=1e-6) and row[name.replace("tau", "pairs")] == len(expected)
    assert row["measure"] == "baseline_other_seed" and row["pairs_same_" + "_".join(AXES)] == 0
    assert row["models"] == sum(len(of_setting) for of_setting in seeds.values() if len(of_setting) > 1)


def test_srr_against_its_rivals():
    """srr ranks like the gap, `near` has two neighbours the wrong way round; parts of SRR and baselines are no rivals."""
    names = ["srr", "srr_rate", "baseline_x", "params", "near", "params_far"]
    table = [row | dict.fromkeys(names[:4], row["gap"]) for row in noisy()]
    order = np.argsort([row["gap"] for row in table])
    for rank, k in enumerate(order):
        table[k] |= {"near": rank, "params_far": -rank}
    table[order[0]]["near"], table[order[1]]["near"] = 1, 0
    srr, *_, near, far = correlate(table, AXES, "gap", names, resamples=400)
    assert srr["lead"] == pytest.approx(2 / math.comb(32, 2)) and srr["lead_rival"] == "near"
    assert srr["lead_low"] == 0 and srr["lead_high"] > srr["lead"] and "lead" not in near
    assert srr["share_first"] == pytest.approx((1 - (1 - 1 / 32) ** 32) ** 2, abs=0.08)  # both neighbours are drawn
    assert srr["lead_same_model"] == pytest.approx(1 - near["tau_same_model"])
    assert srr["lead_psi_model"] == pytest.approx(1 - near["psi_model"])
    srr, far = correlate(table, AXES, "gap", ["srr", "params_far"], resamples=9)
    assert srr["lead"] == 2 and srr["share_first"] == 1


@pytest.mark.parametrize("same", SHARED.values())
@pytest.mark.parametrize("ties", (False, True))
def test_spread_is_that_of_permuted_gaps(same, ties):
    table, rng = pd.DataFrame(noisy(ties=ties)), np.random.default_rng(0)
    i, j = ranks.matched(table, same, np.arange(len(table)))
    a, taus = table["a"].to_numpy(), []
    place = table.groupby([*same]).ngroup().to_numpy() if same else np.zeros(len(table))
    for _ in range(4000):
        gap = np.empty(len(table))
        gap[np.argsort(place, kind="stable")] = np.lexsort((rng.random(len(table)), place))  # random inside what is shared
        taus.append(np.mean(np.sign(a[i] - a[j]) * np.sign(gap[i] - gap[j])))
    assert ranks.spread(table, "a", i, j) == pytest.approx(np.std(taus), rel=0.05)
    if not same and not ties:
        assert ranks.spread(table, "a", i, j) ** 2 == pytest.approx(2 * (2 * 32 + 5) / (9 * 32 * 31))


def test_pooled():
    rng = np.random.default_rng(0)
    taus, spreads = rng.normal(0.3, 0.1, (3, 1001)), np.array([0.1, 0.2, 0.4])
    taus[2, 5] = math.nan
    weights = np.array([16, 4, 1]) / 21
    tau, low, high, p = ranks.pooled(taus, spreads)
    assert tau == pytest.approx(weights @ taus[:, 0])
    assert high - low == pytest.approx(2 * 1.96 * 0.1 * math.sqrt(weights @ weights), rel=0.1)
    assert p == pytest.approx(stats.chi2.sf(sum((taus[:, 0] - tau) ** 2 / spreads**2), 2))
    assert ranks.pooled(taus[:1], spreads[:1])[0] == taus[0, 0]


def test_constant_and_missing_measures():
    table = [row | {"constant": 0.3 if k % 2 else 0.1 + 0.2, "none": None, "srr": None} for k, row in enumerate(noisy())]
    table[5]["gap"] = math.nan
    constant, none, srr, a = correlate(table, AXES, "gap", ["constant", "none", "srr", "a"], resamples=100)
    assert constant["tau"] == constant["tau_low"] == constant["Psi"] == 0 and constant["models"] == a["models"] == 31
    assert none["models"] == none["pairs"] == 0 and math.isnan(none["tau"]) and math.isnan(srr["lead"])


@pytest.mark.slow
@pytest.mark.parametrize("seeds", (1, 3))
def test_intervals_cover_about_as_often_as_they_claim(seeds):
    """Bivariate normals, of settings with correlation 0.6 and of seeds with 0.3: tau is 2/pi arcsin of the correlation."""
    rng, repeats, everything = np.random.default_rng(0), 400, "tau_same_" + "_".join(AXES)
    table, noise = noisy(seeds), seeds > 1  # the variance of seeds, that of settings being 1

    def true(of_both, variance):
        return 2 / math.pi * math.asin(of_both / variance)

    expected = {"tau_same_model": true(0.6 + 0.3 * noise, 1 + noise)}
    if seeds > 1:
        expected |= {everything: true(0.3, 1), "other": true(1, 2), "means": true(0.6 + 0.3 / seeds, 1 + 1 / seeds)}
    else:
        expected |= dict.fromkeys(("tau", "Psi"), expected["tau_same_model"])
    covered = dict.fromkeys(expected, 0)
    settings, own = ([[1, rho], [rho, 1]] for rho in (0.6, 0.3))
    for _ in range(repeats):
        values = np.repeat(rng.multivariate_normal([0, 0], settings, len(table) // seeds), seeds, axis=0)
        values = values + noise * rng.multivariate_normal([0, 0], own, len(table))
        for row, (x, y) in zip(table, values):
            row |= {"gap": x, "a": y}
        options = dict(same=[("model",), tuple(AXES)], resamples=1000)
        row, *other = correlate(table, AXES, "gap", ["a"], **options)
        found = {name: (row, name) for name in expected if name in row}
        if other:
            found["other"] = other[0], "tau_same_model"
            found["means"] = correlate(table, AXES, "gap", ["a"], means=True, **options)[0], "tau_same_model"
        for name, (row, column) in found.items():
            covered[name] += row[f"{column}_low"] <= expected[name] <= row[f"{column}_high"]
    for name, count in covered.items():
        # A resample loses groups of Psi's pairs; eight settings a type are few.
        low = {"tau": 0.91, "Psi": 0.93}.get(name, 0.85)
        assert low <= count / repeats <= (1.0 if name == "Psi" else 0.98), covered
