"""crate.statistics against loops over ordered pairs, scipy, and tables whose statistics are known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from crate import statistics
from crate.cli import InputError
from crate.statistics import correlate

MODELS = ["crate-c", "crate-n", "crate-t", "crate"]
AXES = {"model": MODELS, "lr": ["1e-3", "3e-3"], "batch_size": [64, 128], "dropout": [0, 0.1]}


def grid(seeds=(0,), axes=AXES):
    """A row per combination and seed, without gap and measures."""
    return [dict(zip(axes, values), seed=seed) for seed in seeds for values in itertools.product(*axes.values())]


def noisy(seeds=(0,), ties=False, holes=0, rng=0, axes=AXES):
    """A table with a gap, measures `a` and `b`, and an accuracy gap; rounded where it shall have ties; with missing models."""
    rng, table = np.random.default_rng(rng), grid(seeds, axes)
    table = [table[k] for k in sorted(rng.permutation(len(table))[holes:])]
    for row in table:
        gap = rng.normal() + (row["lr"] == "1e-3")
        row |= {"gap": gap, "a": gap + rng.normal(), "b": rng.normal(), "gap_accuracy": 0.2 * rng.random()}
        if ties:
            row |= {key: round(row[key], 0) for key in ("gap", "a", "b")}
    if holes:
        table[1]["a"] = math.nan
        table[4]["a"] = ""
    return table


def one(table, measure="a", **settings):
    (row,) = correlate(table, list(AXES), "gap", [measure], **{"resamples": 50} | settings)
    return row


def finite(table, measure):
    return [row for row in table if row[measure] != "" and math.isfinite(row[measure])]


def sign(x):
    return (x > 0) - (x < 0)


def slow_tau(rows, measure):
    """Eqs. 12, 13, as they stand."""
    pairs = list(itertools.permutations(rows, 2))
    return sum(sign(a[measure] - b[measure]) * sign(a["gap"] - b["gap"]) for a, b in pairs) / len(pairs)


def differ_on(a, b, axis):
    return [name for name in AXES if a[name] != b[name]] == [axis]


def slow_psi(rows, measure, axis):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in AXES if name != axis), []).append(row)
    return np.mean([slow_tau(group, measure) for group in groups.values() if len(group) > 1])


def slow_k(rows, measure):
    """min over S of I(V_mu; V_g | U_S) / H(V_g | U_S), by dictionaries of conditional probabilities."""
    ratios = []
    for S in (S for size in range(3) for S in itertools.combinations(AXES, size)):
        strata = {}
        for a, b in itertools.permutations(rows, 2):
            v = (sign(a[measure] - b[measure]), sign(a["gap"] - b["gap"]))
            if 0 not in v:
                strata.setdefault((tuple(a[s] for s in S), tuple(b[s] for s in S)), []).append(v)
        total, information, entropy = sum(map(len, strata.values())), 0, 0
        for values in strata.values():
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


def slow_errors(table, measure, axis, points=None):
    """Losses of the environments of one axis: ordered pairs of settings, the mean over seeds."""
    losses = {}
    for a, b in itertools.permutations(table, 2):
        if a["seed"] == b["seed"] and differ_on(a, b, axis):
            loss = (1 - sign(a[measure] - b[measure]) * sign(a["gap"] - b["gap"])) / 2
            dg = abs(a["gap_accuracy"] - b["gap_accuracy"])
            w = 1 if points is None else max(0, max(0, 1 - 2 * math.exp(-2 * points * (dg / 2) ** 2)) ** 2 - 0.5)
            losses.setdefault(tuple((a[name], b[name]) for name in AXES), []).append((w, loss))
    means = []
    for values in losses.values():
        w, loss = np.array(values).T
        if w.sum() > 0 and (points is None or w.sum() ** 2 / (w**2).sum() >= 12):
            means.append((w * loss).sum() / w.sum())
    return means


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("holes", (0, 7))
@pytest.mark.parametrize("seeds", ((0,), (3, 5, 8)))
def test_all_statistics_equal_loops_over_ordered_pairs(ties, holes, seeds):
    table = noisy(seeds, ties, holes)
    rows = finite(table, "a")
    by_seed = [[row for row in rows if row["seed"] == seed] for seed in seeds]
    result = one(table, seed_column="seed")
    assert result["models"] == len(rows) and result["dropped"] == len(table) - len(rows)
    taus = [slow_tau(part, "a") for part in by_seed]
    assert result["tau"] == pytest.approx(np.mean(taus), abs=1e-12)
    tau_b = [stats.kendalltau([row["a"] for row in part], [row["gap"] for row in part]).statistic for part in by_seed]
    assert result["tau_b"] == pytest.approx(np.mean(tau_b), abs=1e-12)
    tied = sum(x["a"] == y["a"] or x["gap"] == y["gap"] for part in by_seed for x, y in itertools.combinations(part, 2))
    assert result["ties"] == tied and (tied > 0) == ties
    psis = [[slow_psi(part, "a", axis) for axis in AXES] for part in by_seed]
    for axis, expected in zip(AXES, np.mean(psis, axis=0)):
        assert result[f"psi_{axis}"] == pytest.approx(expected, abs=1e-12)
    assert result["Psi"] == pytest.approx(np.mean(psis), abs=1e-12)
    assert result["K"] == pytest.approx(np.mean([slow_k(part, "a") for part in by_seed]), abs=1e-6)
    pooled = []
    for axis in AXES:
        losses = slow_errors(rows, "a", axis)
        pooled += losses
        assert result[f"sign_error_mean_{axis}"] == pytest.approx(np.mean(losses), abs=1e-12)
        assert result[f"sign_error_max_{axis}"] == pytest.approx(max(losses), abs=1e-12)
    assert result["sign_error_mean"] == pytest.approx(np.mean(pooled), abs=1e-12)
    assert result["sign_error_max"] == pytest.approx(max(pooled), abs=1e-12)
    assert result["sign_error_p90"] == pytest.approx(np.quantile(pooled, 0.9, method="inverted_cdf"), abs=1e-4)
    if len(seeds) > 1:
        assert result["seeds"] == len(seeds)
        assert result["tau_sd"] == pytest.approx(np.std(taus, ddof=1), abs=1e-12)
        assert result["Psi_sd"] == pytest.approx(np.std(np.mean(psis, axis=1), ddof=1), abs=1e-12)


def test_a_measure_equal_to_the_gap_and_its_negative():
    table = noisy()
    for row in table:
        row |= {"same": row["gap"], "negative": -row["gap"]}
    same, negative = correlate(table, list(AXES), "gap", ["same", "negative"], resamples=200)
    for row, value in ((same, 1), (negative, -1)):
        keys = ("tau", "tau_low", "tau_high", "tau_b", "Psi", "Psi_low", "Psi_high", *(f"psi_{axis}" for axis in AXES))
        assert [row[key] for key in keys] == pytest.approx([value] * len(keys))
        assert row["K"] == pytest.approx(1)
        assert row["sign_error_mean"] == row["sign_error_max"] == (1 - value) / 2
        assert row["p_value"] == pytest.approx(1 / 201) and row["p_holm"] == pytest.approx(2 / 201)
        assert row["ties"] == 0


def test_a_measure_that_follows_one_axis_alone():
    """lr sets both the gap's and the measure's large part; apart from that they have nothing to do with each other."""
    rng, table = np.random.default_rng(0), grid()
    for row in table:
        large = 100 * float(row["lr"] == "3e-3")
        row |= {"gap": large + rng.normal(), "noisy": large + rng.normal(), "lr_itself": large}
    noisy_row, exact = correlate(table, list(AXES), "gap", ["noisy", "lr_itself"], resamples=50)
    assert noisy_row["psi_lr"] == exact["psi_lr"] == 1
    assert exact["psi_model"] == exact["psi_batch_size"] == exact["psi_dropout"] == 0
    assert exact["Psi"] == 1 / 4
    assert exact["tau"] == pytest.approx(2 * 16 * 16 / (32 * 31))  # the pairs of different lr
    assert exact["ties"] == 2 * math.comb(16, 2)
    assert noisy_row["tau"] > 0.4 and noisy_row["K"] < 0.05  # given lr, the measure tells nothing: what K is for


def test_attainable_values_and_the_sign_error_identity():
    """At fixed width: multiples of 1/8 on a two-valued axis, 1/24 on the model axis; mean sign error (1 - psi) / 2."""
    psis = set()
    for rng in range(5):
        row = one(noisy(rng=rng))
        assert row["psi_model"] * 24 == pytest.approx(round(row["psi_model"] * 24))
        for axis in ("lr", "batch_size", "dropout"):
            assert row[f"psi_{axis}"] * 8 == pytest.approx(round(row[f"psi_{axis}"] * 8))
            psis.add(row[f"psi_{axis}"])
        for axis in AXES:
            assert row[f"sign_error_mean_{axis}"] == pytest.approx((1 - row[f"psi_{axis}"]) / 2)
    assert len(psis) > 3


def test_pairs_of_different_seeds_count_for_nothing():
    table = noisy((0, 1, 2))
    plain = one(table, seed_column="seed")
    for row in table:
        row["a"] += 1000 * row["seed"]
        row["gap"] -= 1000 * row["seed"]
    shifted = one(table, seed_column="seed")
    assert shifted["tau"] == pytest.approx(plain["tau"]) and shifted["K"] == pytest.approx(plain["K"])
    assert shifted["sign_error_mean"] == pytest.approx(plain["sign_error_mean"])
    assert shifted["p_value"] == plain["p_value"]
    assert [shifted[k] for k in ("tau_low", "Psi_high")] == pytest.approx([plain[k] for k in ("tau_low", "Psi_high")])


def test_seeds_of_few_models_are_left_out():
    table = noisy((0, 1))
    alone = one(table[:32])
    with_two = correlate(table[:34], list(AXES), "gap", ["a"], seed_column="seed", resamples=50)[0]
    assert with_two["seeds"] == 1 and with_two["models"] == 32 and with_two["dropped"] == 2
    assert with_two["tau"] == alone["tau"] and math.isnan(with_two["tau_sd"])


def test_weighted_sign_errors():
    seeds = range(14)
    table = noisy(seeds)
    row = one(table, seed_column="seed", validation_points=5000)
    losses = {axis: slow_errors(table, "a", axis, 5000) for axis in AXES}
    pooled = sum(losses.values(), [])
    assert 0 < len(pooled) < len(sum((slow_errors(table, "a", axis) for axis in AXES), []))  # some are left out, some stay
    assert row["sign_error_mean"] == pytest.approx(np.mean(pooled))
    assert row["sign_error_max"] == pytest.approx(max(pooled))
    assert row["sign_error_p90"] == pytest.approx(np.quantile(pooled, 0.9, method="inverted_cdf"), abs=1e-4)
    few = [row for row in table if row["seed"] < 11]
    assert one(few, seed_column="seed", validation_points=5000) == pytest.approx(one(few, seed_column="seed"), nan_ok=True)


def test_bootstrap_equals_loops_over_the_copies():
    table, rng = noisy(ties=True, holes=5), np.random.default_rng(1)
    rows = finite(table, "a")
    draws = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), 20).T.astype(np.float32)
    mu, g = (np.array([row[key] for row in rows])[:, None] for key in ("a", "gap"))
    _, _, levels = statistics.arrange(rows, list(AXES))
    groups = statistics.axis_groups(levels)
    taus = statistics.bootstrap_tau(draws, mu, g)
    Psis = statistics.mean_of_finite(statistics.bootstrap_psi(draws, mu, g, groups))
    for draw, tau, Psi in zip(draws.T.astype(int), taus, Psis):
        copies = [k for k, count in enumerate(draw) for _ in range(count)]
        pairs = [(k, j) for k, j in itertools.permutations(copies, 2) if k != j]
        signs = {(k, j): np.sign((mu[k, 0] - mu[j, 0]) * (g[k, 0] - g[j, 0])) for k, j in set(pairs)}
        assert tau == pytest.approx(np.mean([signs[pair] for pair in pairs]), abs=1e-6)
        psi = []
        for axis in AXES:
            groups_of_pairs = {}
            for k, j in pairs:
                if differ_on(rows[k], rows[j], axis):
                    groups_of_pairs.setdefault(tuple(rows[k][n] for n in AXES if n != axis), []).append(signs[k, j])
            psi += [np.mean([np.mean(values) for values in groups_of_pairs.values()])] if groups_of_pairs else []
        assert Psi == pytest.approx(np.mean(psi), abs=1e-6)


def test_p_values_under_the_null_are_uniform():
    rng, names = np.random.default_rng(0), [f"m{k}" for k in range(300)]
    table = [{"x": k} | {name: rng.normal() for name in ("gap", *names)} for k in range(20)]
    p_values = [row["p_value"] for row in correlate(table, ["x"], "gap", names, resamples=2000)]
    # uniform up to the steps of tau, and three standard deviations of 300 measures
    for t in (0.05, 0.2, 0.5, 0.8):
        assert np.mean(np.array(p_values) <= t) == pytest.approx(t, abs=0.08)


def test_p_values_equal_exact_ones():
    """All 24 orders of four models: a perfect tau, either way round, has 2 of them; with a tie the count is by hand, too."""
    table = [{"x": k, "gap": k, "up": k, "tied": min(k, 2)} for k in range(4)]
    up, tied = correlate(table, ["x"], "gap", ["up", "tied"], resamples=20_000)
    assert up["p_value"] == pytest.approx(2 / 24, abs=0.01)
    assert tied["p_value"] == pytest.approx(4 / 24, abs=0.01)
    assert tied["tau"] == pytest.approx(5 / 6) and tied["tau_b"] == pytest.approx(5 / math.sqrt(6 * 5))


def test_p_values_of_several_seeds_permute_whole_settings():
    """Seeds that repeat each other are no further evidence: the p-value is that of one of them."""
    table = noisy()
    copies = [row | {"seed": seed} for seed in range(4) for row in table]
    assert one(copies, "b", seed_column="seed", resamples=4000)["p_value"] == one(table, "b", resamples=4000)["p_value"]


def test_holm():
    assert statistics.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    assert statistics.holm([0.9, 0.8]).tolist() == [1, 1]


def test_constant_measures_missing_values_and_too_few_models():
    table = noisy()
    for k, row in enumerate(table):
        row |= {"constant": 3.0, "rare": row["gap"] if k < 2 else math.inf, "srr": row["a"]}
    table[5]["gap"] = math.nan
    constant, rare, a, srr = correlate(table, list(AXES), "gap", ["constant", "rare", "a", "srr"], resamples=100)
    assert constant["tau"] == constant["tau_low"] == constant["Psi"] == 0 and constant["p_value"] == 1
    assert constant["note"] == "constant" and math.isnan(constant["tau_b"]) and math.isnan(constant["K"])
    assert constant["models"] == 31 and constant["dropped"] == 1
    assert rare["note"] == "too few models" and math.isnan(rare["tau"]) and math.isnan(rare["p_holm"]) and rare["models"] == 0
    assert a["diff_srr"] == a["diff_srr_low"] == a["diff_srr_high"] == 0
    assert constant["diff_srr"] == srr["tau"]
    for axis in ("lr", "model"):
        assert a[f"diff_srr_psi_{axis}"] == a[f"diff_srr_psi_{axis}_low"] == a[f"diff_srr_psi_{axis}_high"] == 0
        assert constant[f"diff_srr_psi_{axis}"] == srr[f"psi_{axis}"]
        assert constant[f"diff_srr_psi_{axis}_low"] <= srr[f"psi_{axis}"] <= constant[f"diff_srr_psi_{axis}_high"]
    assert (constant["diff_srr_low"], constant["diff_srr_high"]) == pytest.approx((srr["tau_low"], srr["tau_high"]))


def test_first_columns_are_the_contract():
    first = "measure models tau tau_low tau_high p_value tau_b ties psi_model psi_lr psi_batch_size psi_dropout Psi K".split()
    assert list(one(noisy()))[: len(first) + 2] == [*first, "sign_error_mean", "sign_error_max"]


def test_pieces_of_a_large_table_give_the_same(monkeypatch):
    table = noisy(holes=3)
    whole = one(table)
    monkeypatch.setattr(statistics, "CHUNK", 7)
    pieces = one(table)
    assert pieces.pop("note") == "interval of Psi left out: too many pairs"
    same = {key: value for key, value in pieces.items() if key not in ("Psi_low", "Psi_high")}
    assert same == pytest.approx({key: whole[key] for key in same}, nan_ok=True)


def test_budgets_lower_the_resamples_and_say_so(monkeypatch):
    table = noisy()
    monkeypatch.setattr(statistics, "MATRIX_WORK", 80 * 32**2)
    monkeypatch.setattr(statistics, "PERMUTATION_WORK", 900 * 32**2)
    row = one(table, resamples=10_000)
    assert row["resamples"] == 80 and row["permutations"] == 0 and "K left out" in row["note"] and math.isnan(row["K"])
    assert row["p_value"] == pytest.approx(one(table, resamples=900)["p_value"], abs=0.02)  # the normal limit
    monkeypatch.setattr(statistics, "MATRIX_WORK", 10 * 32**2)
    row = one(table, resamples=10_000)
    assert row["resamples"] == 0 and "intervals left out" in row["note"] and math.isnan(row["tau_low"])
    assert row["tau"] == pytest.approx(slow_tau(table, "a"))


def test_the_same_level_written_in_two_ways():
    table = noisy()
    plain = one(table)
    for row in table[::3]:
        row |= {"lr": {"1e-3": "0.001", "3e-3": 0.003}[row["lr"]], "dropout": str(row["dropout"])}
    assert one(table) == plain


def test_rank_correlations():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40)).round(1)
    b[3] = math.nan
    seed = np.arange(40) % 2
    matrix = statistics.rank_correlations([a, b, -a], seed)
    expected = [stats.kendalltau(a[keep], b[keep]).statistic for keep in ((seed == s) & np.isfinite(b) for s in (0, 1))]
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(np.mean(expected))
    assert matrix[0, 2] == pytest.approx(-1) and matrix[1, 1] == 1


def test_bad_tables_raise():
    table = noisy()
    with pytest.raises(InputError, match="occurs twice"):
        one([*table, table[0]])
    with pytest.raises(InputError, match="'text' is not a number"):
        one([row | {"gap": "text"} for row in table])
    with pytest.raises(InputError, match="'' is not a number"):
        one([row | {"gap": ""} for row in table])
    with pytest.raises(InputError, match="3 or more"):
        one(table[:2])


@pytest.mark.slow
def test_intervals_cover_about_as_often_as_they_claim():
    """32 models of a bivariate normal: tau is 2/pi arcsin(rho), and so is every psi."""
    rng, rho, repeats = np.random.default_rng(0), 0.6, 400
    true, table = 2 / math.pi * math.asin(rho), grid()
    covered = {"tau": 0, "Psi": 0}
    for _ in range(repeats):
        for row, (x, y) in zip(table, rng.normal(size=(32, 2))):
            row |= {"gap": x, "a": rho * x + math.sqrt(1 - rho**2) * y}
        result = one(table, resamples=1000)
        for key in covered:
            covered[key] += result[f"{key}_low"] <= true <= result[f"{key}_high"]
    assert 0.91 <= covered["tau"] / repeats <= 0.98, covered
    assert 0.93 <= covered["Psi"] / repeats <= 1.0, covered  # somewhat wide, see bootstrap_psi
