"""Rank statistics of complexity measures against the generalisation gap (Section 5: Eqs. 12, 13, Tables 1, 5). No torch.

tau and psi: Eqs. 12, 13. K: Jiang et al. 2019, "Fantastic Generalization Measures and Where to Find Them". Robust sign error:
Dziugaite et al. 2020, "In Search of Robust Measures of Generalization". A *setting* is one combination of hyperparameters, a
model is a setting with a seed. Values are arrays (settings, seeds), NaN where a model is missing. Everything is computed per
seed and then averaged, so no pair ever joins two seeds.
"""

import itertools
import math
from collections import defaultdict

import numpy as np
from scipy.sparse import csr_array
from scipy.special import entr
from scipy.stats import kendalltau, rankdata

from crate.cli import InputError

CHUNK = 1_000_000  # numbers in memory at once, roughly
FEWEST = 50  # resamples, below which an interval is left out
FEWEST_PERMUTATIONS = 1000
# What a table may cost, ten or twenty seconds on one core each; beyond it there are fewer resamples, at last none and a note.
MATRIX_WORK, PSI_WORK, PERMUTATION_WORK = 2e11, 1e9, 4e9
EFFECTIVE_SEEDS = 12  # seeds, and effective sample size of an environment, from which sign errors are weighted


def number_or_text(value):
    """Two ways to write a number are one level of a hyperparameter: "1e-3" and "0.001"; every "nan" is the same."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return math.nan if math.isnan(number) else number


def numbers(table, column, flag="--measures", blank=math.nan):
    """A column as floats; empty fields are `blank`. Raises InputError at a text, and at an empty field if `blank` is None."""
    values = [blank if row[column] in ("", None) else number_or_text(row[column]) for row in table]
    for row, value in zip(table, values):
        if not isinstance(value, float):
            where = f" (run {row['run']})" if row.get("run") else ""
            raise InputError(f"{flag} {column}: {row[column]!r}{where} is not a number")
    return np.array(values)


def arrange(table, hyperparameters, seed_column=None):
    """Setting and seed of each row, two (rows,) index arrays, and the levels (settings, axes) of the settings, as indices.

    Raises InputError where a combination occurs twice with one seed.
    """

    def indices(values):  # in order of first appearance
        known = {}
        return [known.setdefault(value, len(known)) for value in values]

    combinations = list(zip(*(indices(number_or_text(row[name]) for row in table) for name in hyperparameters)))
    setting = indices(combinations)
    seed = indices(number_or_text(row[seed_column]) if seed_column else None for row in table)
    for k, model in enumerate(indices(zip(setting, seed))):
        if model < k:
            row = table[k]
            named = ", ".join(f"{name} {row[name]}" for name in hyperparameters)
            cure = f"with {seed_column} {row[seed_column]}" if seed_column else "and no --seed-column tells the models apart"
            raise InputError(f"--hyperparameters: the combination {named} occurs twice {cure}")
    return np.array(setting), np.array(seed), np.array(list(dict.fromkeys(combinations)))


def kendall(x, y):
    """Kendall's tau in O(n log n): tau-a (ties count 0, Eq. 12), tau-b, the number of tied pairs, and tau's normal p-value."""
    pairs = math.comb(len(x), 2)
    x, y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    counts = (np.unique(codes, return_counts=True)[1] for codes in (x, y, x * len(x) + y))
    tied_x, tied_y, tied_both = (int((c * (c - 1) // 2).sum()) for c in counts)
    tied = tied_x + tied_y - tied_both
    if pairs in (tied_x, tied_y):
        return 0.0, math.nan, tied, 1.0
    tau_b, p_value = kendalltau(x, y, method="asymptotic")
    difference = round(tau_b * math.sqrt((pairs - tied_x) * (pairs - tied_y)))  # concordant - discordant pairs
    return difference / pairs, float(tau_b), tied, float(p_value)


def cells(levels):
    """The cell of each setting, (settings,): an index that settings share where all their `levels` (settings, axes) agree."""
    return np.unique(levels, axis=0, return_inverse=True)[1].ravel()


def axis_groups(levels):
    """For every axis the group of each setting, (settings,): those that share all hyperparameters but this one."""
    return [cells(np.delete(levels, axis, axis=1)) for axis in range(levels.shape[1])]


def cells_by_subset(levels):
    """For every S of at most two axes, the empty set included: its cell (settings,), an index of the levels on S."""
    axes = range(levels.shape[1])
    return [cells(levels[:, list(S)]) for size in range(3) for S in itertools.combinations(axes, size)]


def pairs(group):
    """Yield the pairs within groups as index arrays (i, j), each pair once: first those of neighbours, then wider apart."""
    order = np.argsort(group, kind="stable")
    for step in range(1, np.bincount(group).max() + 1):
        i, j = order[:-step], order[step:]
        same = group[i] == group[j]
        yield i[same], j[same]


def by_group(group, groups):
    """The matrix (groups, pairs) that sums over the pairs of each group; `group` is that of each pair."""
    return csr_array((np.ones(len(group), np.float32), (group, np.arange(len(group)))), shape=(groups, len(group)))


def blocks(rows, width):
    """Cut `rows` rows of `width` numbers into index arrays, so that one of them takes little memory."""
    return np.array_split(np.arange(rows), max(1, min(rows, rows * width // (4 * CHUNK))))


def agreement(mu, g, i, j):
    """sign(mu_i - mu_j) sign(g_i - g_j), NaN where a model is missing."""
    return np.sign(mu[i] - mu[j]) * np.sign(g[i] - g[j])


@np.errstate(invalid="ignore")
def mean_of_finite(values):
    """The mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    return np.where(finite, values, 0).sum(0) / finite.sum(0)


def noise_weights(difference, points):
    """Dziugaite et al.'s weight of a pair from its difference of accuracy gaps, each measured on `points` images."""
    confidence = np.maximum(0, 1 - 2 * np.exp(-2 * points * (np.abs(difference) / 2) ** 2)) ** 2
    return np.maximum(0, confidence - 0.5)


@np.errstate(invalid="ignore")
def along_axis(mu, g, group, accuracy_gap=None, points=None):
    """psi of each seed (seeds,), and the sign errors of the environments of one axis, (environments,).

    An environment is a pair that differs on this axis alone; its error is the mean of (1 - agreement) / 2 over seeds. With
    `points`, the mean is weighted, and environments of effective sample size below 12 are left out.
    """
    sums, counts = np.zeros((2, group.max() + 1, mu.shape[1]))
    errors = []
    for i, j in pairs(group):
        agree = agreement(mu, g, i, j)  # (pairs, seeds)
        present = np.isfinite(agree)
        agree = np.where(present, agree, 0)
        of_group = by_group(group[i], len(sums))
        sums += of_group @ agree
        counts += of_group @ present
        noise = 1 if points is None else noise_weights(accuracy_gap[i] - accuracy_gap[j], points)
        weight = np.where(present, noise, 0)
        mass, fewest = weight.sum(1), 1 if points is None else EFFECTIVE_SEEDS
        keep = (mass > 0) & (mass**2 >= fewest * (weight**2).sum(1))
        errors.append((1 - (weight * agree)[keep].sum(1) / mass[keep]) / 2)
    return mean_of_finite(sums / counts), np.concatenate(errors)


def summarise(errors):
    """Mean, 90th percentile (to four digits) and maximum of sign errors; three NaN where there are none."""
    if not len(errors):
        return math.nan, math.nan, math.nan
    return float(errors.mean()), round(float(np.quantile(errors, 0.9, method="inverted_cdf")), 4), float(errors.max())


def conditional_information(mu, g, levels):
    """K of Jiang et al.: the minimum over S, |S| <= 2, of I(V_mu; V_g | U_S) / H(V_g | U_S); mu, g (n,), levels (n, axes).

    Over ordered pairs that are tied in neither; V are the signs, U_S is both models' levels on S, p(u) by count. An S that
    leaves V_g no entropy (such as all the axes of a table with two) is passed over. NaN if all are.
    """
    lowest = math.inf
    for cell in cells_by_subset(levels):
        one_hot = np.eye(cell.max() + 1, dtype=np.float32)[cell]
        agree, disagree = np.zeros((2, one_hot.shape[1], one_hot.shape[1]))  # pairs mu_a > mu_b, by the cells of a and b
        for block in blocks(len(mu), len(mu)):
            larger, difference = mu[block, None] > mu, g[block, None] - g
            agree += one_hot[block].T @ ((larger & (difference > 0)).astype(np.float32) @ one_hot)
            disagree += one_hot[block].T @ ((larger & (difference < 0)).astype(np.float32) @ one_hot)
        p = np.array([[agree, disagree], [disagree.T, agree.T]])  # (V_mu, V_g, u_a, u_b)
        p /= max(1, p.sum())
        h_u, h_mu, h_g, h_all = (entr(p.sum(axes)).sum() for axes in ((0, 1), 1, 0, ()))  # entropies of (U_S, ...)
        if h_g - h_u > 1e-9:
            lowest = min(lowest, max(0.0, float((h_mu + h_g - h_all - h_u) / (h_g - h_u))))
    return lowest if lowest < math.inf else math.nan


@np.errstate(invalid="ignore")
def bootstrap_tau(draws, mu, g):
    """tau of every resample, (R,); draws (settings, R) says how often each setting was drawn, mu and g (settings, seeds).

    Copies of one model make no pair: else they would be ties and pull every resample towards 0.
    """
    taus = []
    for x, y in zip(mu.T, g.T):
        present = np.isfinite(x)
        x, y = (rankdata(values[present]).astype(np.float32) for values in (x, y))
        w = draws[present]
        total = 0
        for block in blocks(len(x), len(x)):
            agree = np.sign(x[block, None] - x) * np.sign(y[block, None] - y)
            total = total + np.einsum("nr,nr->r", agree @ w, w[block])
        taus.append(total / (w.sum(0) ** 2 - (w**2).sum(0)))  # NaN where one model alone was drawn
    return np.mean(taus, axis=0)


@np.errstate(invalid="ignore")
def bootstrap_psi(draws, mu, g, groups):
    """psi along every axis of every resample, (axes, R); groups is the list of the axes' groups.

    A group counts where the resample holds two of its levels; inside it a pair counts as often as its copies can be paired.
    A two-valued group survives with probability 0.4, so the spread of psi is that of 0.4 G groups drawn from G without
    replacement, sqrt(0.6 / 0.4) = 1.2 times the true one: the interval is somewhat wide rather than narrow.
    """
    by_seed = np.full((mu.shape[1], len(groups), draws.shape[1]), np.nan, np.float32)
    for axis, group in enumerate(groups):
        i, j = np.hstack(list(pairs(group)))
        agree = agreement(mu, g, i, j).astype(np.float32)  # (pairs, seeds)
        present = np.isfinite(agree)
        agree = np.where(present, agree, 0)
        of_group = by_group(group[i], group.max() + 1)
        for some in blocks(draws.shape[1], len(i)):
            copies = draws[i[:, None], some] * draws[j[:, None], some]  # (pairs, R)
            for seed in range(mu.shape[1]):
                sums, counts = (of_group @ (copies * part[:, [seed]]) for part in (agree, present))
                by_seed[seed, axis, some] = mean_of_finite(sums / counts)
    return mean_of_finite(by_seed)


def permutation_p_values(mus, g, permutations, rng):
    """Two-sided p-values of tau, (measures,); mus (measures, settings, seeds) and g (settings, seeds) without gaps.

    Whole settings are permuted, all their seeds alike, because the seeds of a setting are no independent evidence. The given
    order counts as one of the permutations (Davison and Hinkley's + 1), so that p is never 0.
    """

    def signs(ranks):  # (..., settings, seeds) -> (..., settings^2 * seeds)
        return np.sign(ranks[..., :, None, :] - ranks[..., None, :, :]).reshape(*ranks.shape[:-2], -1)

    mus, g = rankdata(mus, axis=1).astype(np.float32), rankdata(g, axis=0).astype(np.float32)
    fixed = signs(mus)
    observed = np.abs(fixed @ signs(g))
    exceed = np.ones(len(mus))
    for block in blocks(permutations, fixed.shape[1]):
        order = rng.permuted(np.tile(np.arange(len(g)), (len(block), 1)), axis=1)
        exceed += (np.abs(signs(g[order]) @ fixed.T) >= observed).sum(0)
    return exceed / (permutations + 1)


def rank_correlations(columns, seed):
    """tau-b between columns, a symmetric matrix, mean over seeds: columns (k, rows), NaN where missing; seed (rows,)."""
    matrix, seed = np.eye(len(columns)), np.asarray(seed)
    for a, b in itertools.combinations(range(len(columns)), 2):
        both = np.isfinite(columns[a]) & np.isfinite(columns[b])
        parts = [both & (seed == one) for one in np.unique(seed)]
        matrix[a, b] = matrix[b, a] = mean([kendall(columns[a][part], columns[b][part])[1] for part in parts])
    return matrix


def holm(p_values):
    """Holm's adjustment for several tests; NaN stays and counts as no test."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]
    adjusted = np.full(len(p_values), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)))
    return adjusted


def mean(values):
    """The mean of the finite values; NaN if there are none."""
    return float(mean_of_finite(np.asarray(values, float)))


def interval(values):
    """The 95 % percentile interval of the finite values; two NaN if there are none."""
    values = values[np.isfinite(values)]
    return np.percentile(values, (2.5, 97.5)).tolist() if len(values) else (math.nan, math.nan)


def affordable(levels, groups, seeds, measures, resamples):
    """What the table's size allows: resamples, whether Psi's interval and K are included, permutations, notes."""

    def afford(budget, cost, fewest):
        count = min(resamples, int(budget / cost))
        return count if count >= min(fewest, resamples) else 0

    n = len(levels)
    in_groups = [sum(math.comb(size, 2) for size in np.bincount(group).tolist()) for group in groups]
    of_tau = afford(MATRIX_WORK, n**2 * seeds * measures, FEWEST)
    of_psi = afford(PSI_WORK, seeds * measures * max(1, sum(in_groups)), FEWEST) if max(in_groups) < CHUNK else 0
    permutations = afford(PERMUTATION_WORK, n**2 * seeds, FEWEST_PERMUTATIONS)
    cell_count = sum(int(cell.max()) + 1 for cell in cells_by_subset(levels))
    with_k = 2 * n**2 * seeds * measures * cell_count <= MATRIX_WORK
    left_out = {
        "intervals left out: too many models": not of_tau,
        "interval of Psi left out: too many pairs": not of_psi and of_tau,
        "p-value left out: too many models": not permutations and seeds > 1,
        "K left out: too many pairs and levels": not with_k,
    }
    notes = [note for note, applies in left_out.items() if applies]
    return min(of_tau, of_psi) or of_tau, min(of_tau, of_psi) > 0, with_k, permutations, notes


def columns(hyperparameters):
    """The columns that a row of `correlate` always has, in order."""
    return [
        "measure", "models", "tau", "tau_low", "tau_high", "p_value", "tau_b", "ties",
        *(f"psi_{axis}" for axis in hyperparameters), "Psi", "K", "sign_error_mean", "sign_error_max",
        "p_holm", "Psi_low", "Psi_high", "sign_error_p90",
        *(f"sign_error_{what}_{axis}" for axis in hyperparameters for what in ("mean", "p90", "max")),
        "seeds", "tau_sd", "Psi_sd", "K_sd", "dropped", "resamples", "permutations", "note",
    ]  # fmt: skip


def point_statistics(mu, g, levels, groups, hyperparameters, with_k, weighing):
    """What needs no resampling, {column: value}, of a measure mu and the gap g, (settings, seeds), NaN where one is missing."""
    by_seed = [(x[keep], y[keep], levels[keep]) for x, y, keep in zip(mu.T, g.T, np.isfinite(mu.T))]
    tau, tau_b, ties, p_value = np.array([kendall(x, y) for x, y, _ in by_seed]).T
    psi, errors = zip(*(along_axis(mu, g, group, *weighing) for group in groups))  # per axis: (seeds,), (environments,)
    K = [conditional_information(*model) for model in by_seed] if with_k else [math.nan]
    values = {"tau": tau, "tau_b": tau_b, "p_value": p_value, "Psi": mean_of_finite(np.array(psi)), "K": K}
    values |= {f"psi_{axis}": of_axis for axis, of_axis in zip(hyperparameters, psi)}

    row = {key: mean(of_seeds) for key, of_seeds in values.items()} | {"ties": int(ties.sum())}
    for key in ("tau", "Psi", "K"):
        row[f"{key}_sd"] = float(np.std(values[key], ddof=1)) if len(values[key]) > 1 else math.nan
    pooled = {"": np.concatenate(errors)} | {f"_{axis}": of_axis for axis, of_axis in zip(hyperparameters, errors)}
    for suffix, some in pooled.items():
        row |= zip((f"sign_error_{what}{suffix}" for what in ("mean", "p90", "max")), summarise(some))
    if all(np.ptp(x) == 0 for x, _, _ in by_seed):
        return row | {"note": "constant"}
    return row | {"note": "" if np.isfinite(psi).any() else "no two models differ in one hyperparameter alone"}


def correlate(
    table, hyperparameters, gap, measures, *, seed_column=None, resamples=10_000, rng=0,
    validation_points=None, accuracy_gap="gap_accuracy", progress=iter,
):  # fmt: skip
    """One row (dict) per measure, in the given order: its rank statistics against the column `gap`.

    table: rows as `crate.files.read_csv` gives them, dicts of strings or numbers, a row per model. hyperparameters, measures:
    column names. seed_column: where several models share their hyperparameters. validation_points: weight the sign error by
    the noise of the gaps (in the column `accuracy_gap`), from 12 seeds on. progress: wraps the loop over measures (tqdm).

    tau is tau-a over all pairs; `ties` counts pairs tied in the measure or in the gap. psi_<axis> averages tau over the
    groups of settings that differ on this axis alone, Psi averages over the axes that have such groups. A measure that isn't
    finite drops that model, for this measure. *_low, *_high: 95 % percentile bootstrap over settings (see `bootstrap_psi` for
    what it means for Psi). diff_srr, diff_srr_psi_<axis>: tau and psi of `srr` minus this measure's, intervals from the same
    resamples. p_value: two-sided permutation test of tau over settings that have all seeds; p_holm: adjusted for the number
    of measures.

    Cost: tau is O(n log n). The bootstrap costs n^2 a resample, so `resamples` and `permutations` say how many were afforded:
    10,000 up to 800 settings with 30 measures, 200 at 10,000 settings with ten. Where fewer than 1000 permutations are
    affordable (`permutations` 0), p_value is the normal limit with one seed, and left out with several. K takes n^2 times the
    number of cells and is left out of a table of more than about 3000 models. `note` says what was left out. Raises InputError.
    """
    setting, seed, levels = arrange(table, hyperparameters, seed_column)
    seeds = int(seed.max()) + 1

    def by_setting(values):  # (rows,) -> (settings, seeds)
        array = np.full((len(levels), seeds), np.nan)
        array[setting, seed] = np.where(np.isfinite(values), values, np.nan)
        return array

    gaps = by_setting(numbers(table, gap, "--gap", None))
    if max(np.isfinite(gaps).sum(0)) < 3:
        where = f", fewer than 3 in every {seed_column}" if seed_column else ""
        raise InputError(f"--gap {gap}: {np.isfinite(gaps).sum()} models{where}; rank statistics need 3 or more")
    weigh = validation_points is not None and seeds >= EFFECTIVE_SEEDS
    accuracy = by_setting(numbers(table, accuracy_gap, "--accuracy-gap")) if weigh else gaps
    groups = axis_groups(levels)
    drawn, with_psi, with_k, permutations, left_out = affordable(levels, groups, seeds, len(measures), resamples)
    draws = np.random.default_rng(rng).multinomial(len(levels), np.full(len(levels), 1 / len(levels)), drawn)
    draws = draws.T.astype(np.float32)

    rows, complete = {}, {}
    samples = defaultdict(lambda: np.array([math.nan]))  # (measure, column): its value in each resample, (R,)
    for name in progress(measures):
        mu = by_setting(numbers(table, name))
        present = np.isfinite(mu) & np.isfinite(gaps)
        used = present.sum(0) >= 3  # the seeds that have enough models
        mu, g = (np.where(present, values, np.nan)[:, used] for values in (mu, gaps))
        rows[name] = row = dict.fromkeys(columns(hyperparameters), math.nan)
        models = int(np.isfinite(mu).sum())
        row |= {"measure": name, "models": models, "ties": 0, "seeds": int(used.sum()), "dropped": len(table) - models}
        row |= {"resamples": drawn, "permutations": permutations, "note": "too few models"}
        if used.any():
            weighing = (accuracy[:, used], validation_points) if weigh else ()
            row |= point_statistics(mu, g, levels, groups, hyperparameters, with_k, weighing)
            if drawn:
                samples[name, "tau"] = bootstrap_tau(draws, mu, g)
            if with_psi:
                psi = bootstrap_psi(draws, mu, g, groups)
                samples[name, "Psi"] = mean_of_finite(psi)
                samples |= {(name, f"psi_{axis}"): of_axis for axis, of_axis in zip(hyperparameters, psi)}
        row["note"] = "; ".join(filter(None, [row["note"], *left_out]))
        for key in ("tau", "Psi"):
            row[f"{key}_low"], row[f"{key}_high"] = interval(samples[name, key])
        if permutations or seeds > 1:  # the normal limit is that of one seed
            row["p_value"] = math.nan
        whole = np.isfinite(mu).all(1)
        if used.any() and permutations and whole.sum() >= 3:
            complete.setdefault((whole.tobytes(), used.tobytes()), []).append((row, mu[whole], g[whole]))

    for same in complete.values():  # the measures of the same models share their permutations
        of_measures, mus, (g, *_) = zip(*same)
        p_values = permutation_p_values(np.array(mus), g, permutations, np.random.default_rng(rng))
        for row, p_value in zip(of_measures, p_values):
            row["p_value"] = float(p_value)
    for row, p_holm in zip(rows.values(), holm([row["p_value"] for row in rows.values()])):
        row["p_holm"] = float(p_holm)
    if "srr" in rows:
        differences = {"tau": "diff_srr"} | {f"psi_{axis}": f"diff_srr_psi_{axis}" for axis in hyperparameters}
        for (name, row), (key, column) in itertools.product(rows.items(), differences.items()):
            row[column] = rows["srr"][key] - row[key]
            row[f"{column}_low"], row[f"{column}_high"] = interval(samples["srr", key] - samples[name, key])
    return list(rows.values())
