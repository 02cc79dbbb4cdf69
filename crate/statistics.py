"""Rank statistics of complexity measures against the generalisation gap (Section 5: Eqs. 12, 13, Tables 1, 5). No torch.

tau and psi: Eqs. 12, 13. K: Jiang et al. 2019, "Fantastic Generalization Measures and Where to Find Them". Robust sign error:
Dziugaite et al. 2020, "In Search of Robust Measures of Generalization". A *setting* is one combination of hyperparameters, a
model is a setting with a seed. Values are arrays (settings, seeds), NaN where a model is missing. Everything is computed per
seed and then averaged, so no pair ever joins two seeds.
"""

import itertools
import math

import numpy as np
from scipy.special import entr
from scipy.stats import kendalltau

from crate.cli import InputError

CHUNK = 1_000_000  # pairs in memory at once, roughly
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
    levels, settings, seeds, seen = [{} for _ in hyperparameters], {}, {}, {}
    index = np.empty((2, len(table)), int)
    for k, row in enumerate(table):
        values = [number_or_text(row[name]) for name in hyperparameters]
        setting = tuple(codes.setdefault(value, len(codes)) for codes, value in zip(levels, values))
        seed = number_or_text(row[seed_column]) if seed_column else None
        index[:, k] = model = settings.setdefault(setting, len(settings)), seeds.setdefault(seed, len(seeds))
        if seen.setdefault(model, k) != k:
            named = ", ".join(f"{name} {row[name]}" for name in hyperparameters)
            cure = f"with {seed_column} {row[seed_column]}" if seed_column else "and no --seed-column tells the models apart"
            raise InputError(f"--hyperparameters: the combination {named} occurs twice {cure}")
    return *index, np.array(list(settings), int)


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


def axis_groups(levels, axis):
    """The group of each setting, (settings,): those that share all hyperparameters but `axis`."""
    return np.unique(np.delete(levels, axis, axis=1), axis=0, return_inverse=True)[1].ravel()


def pairs(group):
    """Yield the pairs within groups as index arrays (i, j), each pair once, sorted by group, about CHUNK at a time."""
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    later = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(group)) - 1  # members of its group behind each
    for block in np.split(np.arange(len(group)), np.flatnonzero(np.diff(np.cumsum(later) // CHUNK)) + 1):
        i = np.repeat(block, later[block])
        first = np.repeat(np.cumsum(later[block]) - later[block], later[block])
        yield order[i], order[i + 1 + np.arange(len(i)) - first]


def blocks(rows, width):
    """Cut `rows` rows of `width` numbers into index arrays, so that one of them takes little memory."""
    return np.array_split(np.arange(rows), max(1, min(rows, rows * width // (4 * CHUNK))))


def agreement(mu, g, i, j):
    """sign(mu_i - mu_j) sign(g_i - g_j), NaN where a model is missing."""
    return np.sign(mu[i] - mu[j]) * np.sign(g[i] - g[j])


def mean_over_groups(sums, counts):
    """sums / counts, averaged over the groups (axis 0) that have pairs; NaN where none has."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, 0).sum(0) / (counts > 0).sum(0)


def mean_of_finite(values):
    """The mean over axis 0 of what is finite; NaN where nothing is."""
    return mean_over_groups(np.nan_to_num(values), np.isfinite(values))


def noise_weights(difference, points):
    """Dziugaite et al.'s weight of a pair from its difference of accuracy gaps, each measured on `points` images."""
    confidence = np.maximum(0, 1 - 2 * np.exp(-2 * points * (np.abs(difference) / 2) ** 2)) ** 2
    return np.maximum(0, confidence - 0.5)


def along_axis(mu, g, group, accuracy_gap=None, points=None):
    """psi of each seed (seeds,), and the sign errors of the environments of one axis as a histogram.

    An environment is a pair that differs on this axis alone; its error is the mean of (1 - agreement) / 2 over seeds. With
    `points`, the mean is weighted, and environments of effective sample size below 12 are left out. The histogram is over
    errors in steps of 1e-4, (10001,), followed by their sum and maximum: enough for any quantile without a list of pairs.
    """
    sums, counts = np.zeros((2, group.max() + 1, mu.shape[1]))
    histogram, total, highest = np.zeros(10_001), 0.0, -math.inf
    for i, j in pairs(group):
        agree = agreement(mu, g, i, j)  # (pairs, seeds)
        present = np.isfinite(agree)
        agree = np.where(present, agree, 0)
        for seed in range(mu.shape[1]):
            sums[:, seed] += np.bincount(group[i], agree[:, seed], len(sums))
            counts[:, seed] += np.bincount(group[i], present[:, seed], len(sums))
        weight = present if points is None else np.where(present, noise_weights(accuracy_gap[i] - accuracy_gap[j], points), 0)
        mass = weight.sum(1)
        keep = mass > 0 if points is None else mass**2 >= np.maximum(EFFECTIVE_SEEDS * (weight**2).sum(1), 1e-300)
        error = (1 - (weight * agree)[keep].sum(1) / mass[keep]) / 2
        histogram += np.bincount(np.rint(error * 10_000).astype(int), minlength=10_001)
        total, highest = total + error.sum(), max(highest, error.max(initial=-math.inf))
    return mean_over_groups(sums, counts), histogram, total, highest


def summarise(errors):
    """Mean, 90th percentile (to four digits) and maximum of the sign errors that `along_axis` gave for some axes."""
    histogram, total = sum(h for h, _, _ in errors), sum(t for _, t, _ in errors)
    count = histogram.sum()
    if not count:
        return math.nan, math.nan, math.nan
    p90 = np.searchsorted(np.cumsum(histogram), 0.9 * count - 1e-9) / 10_000
    return float(total / count), float(p90), float(max(h for _, _, h in errors))


def cells_by_subset(levels):
    """For every S of at most two axes, the empty set included: its cell (settings,), an index of the levels on S."""
    subsets = [list(S) for size in range(3) for S in itertools.combinations(range(levels.shape[1]), size)]
    constant = np.zeros((len(levels), 1), int)  # the one cell of the empty set
    return [np.unique(levels[:, S] if S else constant, axis=0, return_inverse=True)[1].ravel() for S in subsets]


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


def bootstrap_tau(draws, mu, g):
    """tau of every resample, (R,); draws (settings, R) says how often each setting was drawn, mu and g (settings, seeds).

    Copies of one model make no pair: else they would be ties and pull every resample towards 0.
    """
    taus = []
    for x, y in zip(mu.T, g.T):
        present = np.isfinite(x)
        x, y = (np.unique(v[present], return_inverse=True)[1].astype(np.float32) for v in (x, y))
        w = draws[present]
        total = 0
        for block in blocks(len(x), len(x)):
            agree = np.sign(x[block, None] - x) * np.sign(y[block, None] - y)
            total = total + np.einsum("nr,nr->r", agree @ w, w[block])
        with np.errstate(invalid="ignore"):
            taus.append(total / (w.sum(0) ** 2 - (w**2).sum(0)))  # NaN where one model alone was drawn
    return np.mean(taus, axis=0)


def bootstrap_psi(draws, mu, g, groups):
    """psi along every axis of every resample, (axes, R); groups is the list of the axes' groups.

    A group counts where the resample holds two of its levels; inside it a pair counts as often as its copies can be paired.
    A two-valued group survives with probability 0.4, so the spread of psi is that of 0.4 G groups drawn from G without
    replacement, sqrt(0.6 / 0.4) = 1.2 times the true one: the interval is somewhat wide rather than narrow.
    """
    by_seed = np.full((mu.shape[1], len(groups), draws.shape[1]), np.nan, np.float32)
    for seed in range(mu.shape[1]):
        for axis, group in enumerate(groups):
            i, j = next(pairs(group))
            agree = agreement(mu[:, seed], g[:, seed], i, j).astype(np.float32)
            i, j, agree = (values[np.isfinite(agree)] for values in (i, j, agree))
            if not len(i):
                continue
            starts = np.flatnonzero(np.diff(group[i], prepend=-1))
            for some in blocks(draws.shape[1], len(i)):
                copies = draws[i[:, None], some] * draws[j[:, None], some]  # (pairs, R)
                counts = np.add.reduceat(copies, starts)
                by_seed[seed, axis, some] = mean_over_groups(np.add.reduceat(copies * agree[:, None], starts), counts)
    return mean_of_finite(by_seed)


def permutation_p_values(mus, g, permutations, rng):
    """Two-sided p-values of tau, (measures,); mus (measures, settings, seeds) and g (settings, seeds) without gaps.

    Whole settings are permuted, all their seeds alike, because the seeds of a setting are no independent evidence. The given
    order counts as one of the permutations (Davison and Hinkley's + 1), so that p is never 0.
    """

    def signs(ranks):  # (..., settings, seeds) -> (..., settings^2 * seeds)
        return np.sign(ranks[..., :, None, :] - ranks[..., None, :, :]).reshape(*ranks.shape[:-2], -1)

    def ranks(values):  # small whole numbers, exact in float32
        columns = [np.unique(column, return_inverse=True)[1] for column in values.T]
        return np.array(columns, np.float32).T

    fixed, g = signs(np.array([ranks(mu) for mu in mus])), ranks(g)
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
    values = np.asarray(values, float)
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else math.nan


def interval(values):
    """The 95 % percentile interval of the finite values; two NaN if there are none."""
    values = values[np.isfinite(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else (math.nan, math.nan)


def srr_minus(key, value, resampled, name):
    """Columns `key`, `key`_low, `key`_high: `value`, with the interval of srr's resamples minus those of the measure `name`."""
    both = {"srr", name} <= resampled.keys()
    low, high = interval(resampled["srr"] - resampled[name]) if both else (math.nan, math.nan)
    return {key: value, f"{key}_low": low, f"{key}_high": high}


def affordable(levels, groups, seeds, measures, resamples):
    """What the table's size allows: resamples, whether Psi's interval and K are included, permutations, notes."""
    n, notes = len(levels), []
    work = n**2 * seeds * measures
    in_groups = [sum(math.comb(size, 2) for size in np.bincount(group).tolist()) for group in groups]
    psi_resamples = int(PSI_WORK / (seeds * measures * max(1, sum(in_groups)))) if max(in_groups) < CHUNK else 0
    drawn, fewest = min(resamples, int(MATRIX_WORK / work)), min(FEWEST, resamples)
    with_psi = min(drawn, psi_resamples) >= fewest
    if drawn < fewest:
        drawn, notes = 0, notes + ["intervals left out: too many models"]
    elif with_psi:
        drawn = min(drawn, psi_resamples)
    else:
        notes.append("interval of Psi left out: too many pairs")
    permutations = min(resamples, int(PERMUTATION_WORK / (n**2 * seeds)))
    if permutations < min(FEWEST_PERMUTATIONS, resamples):
        permutations = 0
        notes += ["p-value left out: too many models"] if seeds > 1 else []
    with_k = 2 * work * sum(int(cell.max()) + 1 for cell in cells_by_subset(levels)) <= MATRIX_WORK
    notes += [] if with_k else ["K left out: too many pairs and levels"]
    return drawn, with_psi, with_k, permutations, notes


def point_statistics(mu, g, levels, groups, hyperparameters, with_k, weighing):
    """The row of one measure, in the order of its columns, but for what resampling adds (NaN until then)."""
    by_seed = [(x[keep], y[keep], keep) for x, y, keep in zip(mu.T, g.T, np.isfinite(mu.T))]
    tau, tau_b, ties, p_value = np.array([kendall(x, y) for x, y, _ in by_seed]).reshape(-1, 4).T
    along = [along_axis(mu, g, group, *weighing) for group in groups]
    psi = np.array([axis[0] for axis in along])  # (axes, seeds)
    Psi = mean_of_finite(psi)
    K = [conditional_information(x, y, levels[keep]) for x, y, keep in by_seed] if with_k else []
    errors = summarise([axis[1:] for axis in along])
    if not by_seed:
        note = "too few models"
    elif all(np.ptp(x) == 0 for x, _, _ in by_seed):
        note = "constant"
    else:
        note = "" if np.isfinite(psi).any() else "no two models differ in one hyperparameter alone"

    row = {"models": int(np.isfinite(mu).sum()), "tau": mean(tau), "tau_low": math.nan, "tau_high": math.nan}
    row |= {"p_value": mean(p_value), "tau_b": mean(tau_b), "ties": int(ties.sum())}
    row |= {f"psi_{axis}": mean(values) for axis, values in zip(hyperparameters, psi)}
    row |= {"Psi": mean(Psi), "K": mean(K), "sign_error_mean": errors[0], "sign_error_max": errors[2]}
    row |= {"p_holm": math.nan, "Psi_low": math.nan, "Psi_high": math.nan, "sign_error_p90": errors[1]}
    for axis, parts in zip(hyperparameters, along):
        row |= zip((f"sign_error_{what}_{axis}" for what in ("mean", "p90", "max")), summarise([parts[1:]]))
    row |= {"seeds": len(by_seed)}
    for key, values in (("tau", tau), ("Psi", Psi), ("K", K)):
        row[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return row | {"note": note}


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
    what it means for Psi). diff_srr: tau of `srr` minus this one's, interval from the same resamples; diff_srr_psi_<axis>: the
    same for psi. p_value: two-sided
    permutation test of tau over settings that have all seeds; p_holm: adjusted for the number of measures.

    Cost: tau is O(n log n). The bootstrap costs n^2 a resample, so `resamples` and `permutations` say how many were afforded:
    10,000 up to 800 settings with 30 measures, 200 at 10,000 settings with ten. Where fewer than 1000 permutations are
    affordable, p_value is the normal limit (permutations 0). K takes n^2 times the number of cells and is left out of a table
    of more than about 3000 models. `note` says what was left out. Raises InputError.
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
    groups = [axis_groups(levels, axis) for axis in range(len(hyperparameters))]
    drawn, with_psi, with_k, permutations, left_out = affordable(levels, groups, seeds, len(measures), resamples)
    draws = np.random.default_rng(rng).multinomial(len(levels), np.full(len(levels), 1 / len(levels)), drawn)
    draws = draws.T.astype(np.float32)

    rows, resampled, resampled_psi, complete = {}, {}, {}, {}
    for name in progress(measures):
        mu = by_setting(numbers(table, name))
        present = np.isfinite(mu) & np.isfinite(gaps)
        used = present.sum(0) >= 3  # the seeds that have enough models
        mu, g = (np.where(present, values, np.nan)[:, used] for values in (mu, gaps))
        weighing = (accuracy[:, used], validation_points) if weigh else ()
        row = point_statistics(mu, g, levels, groups, hyperparameters, with_k, weighing)
        rows[name] = row = {"measure": name} | row
        row |= {"dropped": len(table) - row["models"], "resamples": drawn, "permutations": permutations}
        row["note"] = "; ".join(filter(None, [row.pop("note"), *left_out]))
        if permutations or seeds > 1:
            row["p_value"] = math.nan
        if used.any() and drawn:
            resampled[name] = bootstrap_tau(draws, mu, g)
            row["tau_low"], row["tau_high"] = interval(resampled[name])
        if used.any() and with_psi:
            resampled_psi[name] = bootstrap_psi(draws, mu, g, groups)
            row["Psi_low"], row["Psi_high"] = interval(mean_of_finite(resampled_psi[name]))
        whole = np.isfinite(mu).all(1)
        if used.any() and permutations and whole.sum() >= 3:
            complete.setdefault((whole.tobytes(), used.tobytes()), []).append((name, mu[whole], g[whole]))

    for same in complete.values():  # the measures of the same models share their permutations
        names, mus, gs = zip(*same)
        for name, p_value in zip(names, permutation_p_values(np.array(mus), gs[0], permutations, np.random.default_rng(rng))):
            rows[name]["p_value"] = float(p_value)
    for (name, row), p_holm in zip(rows.items(), holm([row["p_value"] for row in rows.values()])):
        row["p_holm"] = float(p_holm)
        if "srr" in rows:
            row |= srr_minus("diff_srr", rows["srr"]["tau"] - row["tau"], resampled, name)
            for k, axis in enumerate(hyperparameters):
                of_axis = {measure: psi[k] for measure, psi in resampled_psi.items()}
                row |= srr_minus(f"diff_srr_psi_{axis}", rows["srr"][f"psi_{axis}"] - row[f"psi_{axis}"], of_axis, name)
    return list(rows.values())
