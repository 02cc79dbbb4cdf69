"""Does a measure rank models as their generalisation gap does? Agreement over matched pairs (Section 5: Eqs. 12, 13). No torch.

For a set of pairs of models, tau is the mean of sign(mu_a - mu_b) sign(g_a - g_b), mu being a measure and g the gap. All pairs
give Kendall's tau, pairs that differ in one hyperparameter alone psi (Jiang et al. 2019), pairs that share the model type tau
of one type. What the models of every pair share can't explain the agreement that is left.

A bootstrap draws settings with all their seeds: a pair counts the product of its settings' draws, and copies of one setting
make no pair. Draws are (n, 1 + R), ones in the first column: column 0 of what comes out is the statistic, the R others are its
resamples. Pairs are two arrays of row numbers, i and j, (P,).
"""

import math

import numpy as np
import pandas as pd
from scipy.stats import chi2

EQUAL, ROUNDING = 1e-6, 1e-12  # hyperparameters, and measures and gaps, that differ by no more, relatively, are equal
CLOSE = 1.25  # learning rates drawn at random are never equal: they are the same within this factor
FEWEST = 20  # pairs that share something give no number if they are fewer
SAME = (("model",), ("model", "lr"))
OTHER_SEED = "baseline_other_seed"
NO_RIVALS = ("srr", "rate_subspaces", "baseline_")  # SRR, its variants and parts, and baselines; params is one, too


@np.errstate(invalid="ignore")
def finite_mean(values):
    """The mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    return np.where(finite, values, 0).sum(axis=0) / finite.sum(axis=0)


def levels(values, equal=EQUAL):
    """0, 1, 2, .. (n,) in the order of numbers, of text in that of appearance; NaN for numbers that aren't finite."""
    if not pd.api.types.is_numeric_dtype(values := pd.Series(values)):
        return pd.factorize(values, use_na_sentinel=False)[0].astype(float)
    values = values.to_numpy(float)
    values = np.where(np.isfinite(values), values, math.nan)
    order = np.argsort(values)  # NaN last
    low, high = values[order][:-1], values[order][1:]
    codes = np.full(len(values), math.nan)
    codes[order] = np.cumsum(np.append(0, high - low > equal * np.fmax(abs(low), abs(high))))
    return np.where(np.isfinite(values), codes, math.nan)


def settings_of(table, columns):
    """0, 1, 2, .. for equal rows of hyperparameters, (n,): models of one setting are its seeds."""
    codes = np.nan_to_num([levels(table[column]) for column in columns], nan=-1)  # missing is a level, too
    return np.unique(codes.reshape(len(columns), len(table)), axis=1, return_inverse=True)[1].ravel()


def random_rates(table, setting):
    """Whether learning rates are numbers of which fewer than half of the settings share theirs with another one."""
    _, count = np.unique(levels(table["lr"])[np.unique(setting, return_index=True)[1]], return_counts=True)
    return pd.api.types.is_numeric_dtype(table["lr"]) and count[count > 1].sum() < count.sum() / 2


def matched(table, same, setting):
    """The pairs of rows that share the columns `same`; learning rates within CLOSE where they were drawn at random."""
    i, j = np.triu_indices(len(table), 1)
    for column in same:
        if column == "lr" and random_rates(table, setting):
            rate = table["lr"].to_numpy(float)
            kept = np.maximum(rate[i], rate[j]) <= CLOSE * (1 + EQUAL) * np.minimum(rate[i], rate[j])
        else:
            code = settings_of(table, [column])
            kept = code[i] == code[j]
        i, j = i[kept], j[kept]
    return i, j


def draw(setting, stratum, resamples, rng):
    """How often each row is drawn, (n, 1 + R): settings (n,) inside each stratum (n,), each with all its seeds."""
    draws = np.ones((len(setting), 1 + resamples), np.float32)
    if len(np.unique(setting)) == len(np.unique(stratum)):  # nothing to draw: no interval
        draws[:, 1:] = math.nan
        return draws
    for own in (stratum == level for level in np.unique(stratum)):
        names, place = np.unique(setting[own], return_inverse=True)
        draws[own, 1:] = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples).T[place]
    return draws


def agreement(table, gap, measures, i, j):
    """sign(mu_i - mu_j) sign(g_i - g_j) of each measure over pairs, (m, P); NaN where one of the four is missing."""
    order = np.array([levels(table[name], ROUNDING) for name in (gap, *measures)])
    signs = np.sign(order[:, i] - order[:, j]).astype(np.float32)
    return signs[1:] * signs[0]


@np.errstate(invalid="ignore")
def other_seed(gap, setting):
    """How well the gap of one seed ranks that of another, for each two settings, (settings, settings): what they are worth.

    The mean of sign(g_a - g_b) sign(g_a' - g_b') over all seeds a and a' != a of the one setting, b and b' != b of the other.
    NaN for a setting with itself, and for one that has no other seed.
    """
    gap = levels(gap, ROUNDING)
    sign = np.sign(gap[:, None] - gap)
    own = (np.unique(setting)[:, None] == setting).astype(float)  # (settings, n)
    others = own.T @ own - np.eye(len(gap))  # (n, n): another seed of the same setting
    choices = own.sum(axis=1) * (own.sum(axis=1) - 1)
    means = own @ (sign * (others @ sign @ others)) @ own.T / np.outer(choices, choices)
    np.fill_diagonal(means, math.nan)
    return means


@np.errstate(invalid="ignore")
def tau(agreed, i, j, draws, setting, group=None):
    """The mean of agreed (m, P) over pairs, in each group (P,), then over groups: (m, 1 + R), NaN where there is no pair."""
    low, high = np.sort([setting[i], setting[j]], axis=0)  # all pairs of the same two settings are drawn alike: sum them first
    _, first, place = np.unique(low * len(setting) + high, return_index=True, return_inverse=True)
    known, agreed = (np.array([np.bincount(place, values) for values in rows], np.float32)
                     for rows in (np.isfinite(agreed), np.nan_to_num(agreed)))  # fmt: skip
    known, row = np.unique(known, axis=0, return_inverse=True)  # most measures lack none
    i, j, seeds = i[first], j[first], (low == high)[first, None]  # seeds of one setting: drawn twice, they have two such pairs
    groups = [slice(None)] if group is None else [group[first] == level for level in np.unique(group)]
    means, size = np.full((len(agreed), draws.shape[1]), math.nan), 1 + 20_000_000 // (1 + len(i))
    for block in (slice(start, start + size) for start in range(0, draws.shape[1], size)):
        copies = draws[i, block] * np.where(seeds, 1, draws[j, block])  # (settings' pairs, block); whole numbers, exact
        totals = [(agreed[:, own] @ copies[own]).astype(float) / (known[:, own] @ copies[own])[row.ravel()] for own in groups]
        means[:, block] = finite_mean(np.array(totals))
    return means


def spread(table, measure, i, j):
    """The standard deviation of tau over these pairs if the gaps were in random order, also inside what the pairs share.

    It is too small where the gaps of a setting's seeds are alike: no weight for such sets.
    Two pairs with one model in common agree in sign with probability 2/3, two others with 1/2. So the variance of the sum is
    (pairs + sum_i r_i^2) / 3, r_i the sum of the signs of model i against its partners; n (n - 1) (2 n + 5) / 18 for all pairs.
    """
    order = levels(table[measure], ROUNDING)
    sign = np.nan_to_num(np.sign(order[i] - order[j]))
    r = np.bincount(i, sign, len(table)) - np.bincount(j, sign, len(table))
    return math.sqrt((abs(sign).sum() + r @ r) / 3) / len(i)


def interval(values):
    """The 95 % percentile interval of resamples, NaN without any."""
    values = values[np.isfinite(values)]
    return np.quantile(values, (0.025, 0.975)) if len(values) else (math.nan, math.nan)


def pooled(taus, spreads):
    """One tau out of several sets of models that share no pairs: (tau, low, high, p of Cochran's Q that the sets are alike).

    taus (sets, 1 + R): each set's tau and its resamples; spreads (sets,): see `spread`. Weights are 1 / spread^2.
    """
    weights, taus = np.power(spreads, -2.0) if len(taus) > 1 else np.ones(1), np.array(taus)
    taus = np.where(np.isfinite(taus), taus, taus[:, :1])  # a resample without a pair
    together = weights @ taus / weights.sum()
    Q = weights @ (taus[:, 0] - together[0]) ** 2
    return together[0], *interval(together[1:]), chi2.sf(Q, len(taus) - 1) if len(taus) > 1 else math.nan


def mean_over_seeds(table, hyperparameters, columns):
    """A row a setting, in the order of settings_of: of `columns` the mean over its seeds that are finite, else the first."""
    seeds = table.replace([math.inf, -math.inf], math.nan).groupby(settings_of(table, hyperparameters))
    return seeds.first().assign(**seeds[columns].mean())


def statistics(table, hyperparameters, gap, measures, same=SAME, *, means=False, resamples=10_000, rng=0):
    """What `correlate` tabulates: {statistic: (m + 1, 1 + R)} and {statistic: pairs, or "models": models, (m + 1,)}.

    The last row is OTHER_SEED. With `means`, each model is the mean of a setting over its seeds.
    """
    table, rng = pd.DataFrame(table).astype({name: float for name in (gap, *measures)}), np.random.default_rng(rng)
    table = table[np.isfinite(table[gap])].reset_index(drop=True)
    axes = list(dict.fromkeys(hyperparameters))
    setting = settings_of(table, axes)
    reference = other_seed(table[gap].to_numpy(), setting)
    if means:
        table = mean_over_seeds(table, axes, [gap, *measures])
        setting = np.arange(len(table))
    if len(table) < 3:
        raise ValueError(f"{len(table)} {'settings' if means else 'models'} with a finite {gap}; ranks need 3 or more")
    finite = [*np.isfinite(table[measures]).T.to_numpy(), np.isfinite(reference).any(axis=1)[setting]]
    samples, counts = {}, {"models": np.sum(finite, axis=1)}

    def add(statistic, i, j, draws, group=None):
        agreed = np.vstack([agreement(table, gap, measures, i, j), reference[setting[i], setting[j]]])
        counts[statistic], samples[statistic] = np.isfinite(agreed).sum(axis=1), tau(agreed, i, j, draws, setting, group)

    everyone = draw(setting, np.zeros(len(table)), resamples, rng)
    i, j = matched(table, (), setting)
    add("tau", i, j, everyone)
    for columns in same if same is not SAME else [columns for columns in SAME if set(columns) <= set(axes)]:
        name = "tau_same_" + "_".join(columns)
        stratum = settings_of(table, ["model"]) if "model" in columns else np.zeros(len(table))  # no type is lost
        add(name, *matched(table, columns, setting), draw(setting, stratum, resamples, rng))
        samples[name][counts[name] < FEWEST] = math.nan
    for axis in axes:
        group = settings_of(table, [name for name in axes if name != axis])
        alone = (group[i] == group[j]) & (setting[i] != setting[j])
        add(f"psi_{axis}", i[alone], j[alone], everyone, group[i[alone]])
    samples["Psi"] = finite_mean(np.array([samples[f"psi_{axis}"] for axis in axes]))
    return samples, counts


def correlate(table, hyperparameters, gap, measures, same=SAME, **options):
    """One row (dict) for each measure: its agreement with the column `gap` over all pairs and over matched ones.

    table: a DataFrame or a list of dicts, a row per model. Rows with equal hyperparameters are the seeds of one setting; where
    there are any, OTHER_SEED is one more row. A measure or gap that isn't finite drops the model for this measure. same:
    columns that pairs share, for each tau_same_*; of the default what consists of hyperparameters. lead: tau of srr minus the
    highest of its rivals, chosen anew in every resample; share_first: in how many of them srr is above all. options: those of
    `statistics`. Raises ValueError for fewer than three models.
    """
    measures = [*measures]
    samples, counts = statistics(table, hyperparameters, gap, measures, same, **options)
    rows = []
    for m, name in enumerate([*measures, OTHER_SEED] if counts["models"][-1] else measures):
        rows.append({"gap": gap, "measure": name, "models": int(counts["models"][m])})
        for statistic, values in samples.items():
            rows[m][statistic] = values[m, 0]
            if not statistic.startswith("psi_"):
                rows[m][f"{statistic}_low"], rows[m][f"{statistic}_high"] = interval(values[m, 1:])
            if statistic.startswith("tau"):
                rows[m][statistic.replace("tau", "pairs")] = int(counts[statistic][m])
    rivals = [m for m, name in enumerate(measures) if not name.startswith(NO_RIVALS) and name != "params"]
    if "srr" in measures and rivals:
        row = rows[srr := measures.index("srr")]
        closest = max(rivals, key=lambda m: np.nan_to_num(samples["tau"][m, 0], nan=-2))
        for statistic, values in samples.items():
            lead, name = np.round(values[srr] - np.fmax.reduce(values[rivals]), 12), f"lead_{statistic}".replace("_tau", "")
            row[name], (row[f"{name}_low"], row[f"{name}_high"]) = lead[0], interval(lead[1:])
            if statistic == "tau":
                row |= {"lead_rival": measures[closest], "share_first": np.mean(lead[1:] > 0)}
    return rows
