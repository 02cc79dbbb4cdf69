"""Does a measure rank models as their generalisation gap does? Agreement over matched pairs (Section 5: Eqs. 12, 13). No torch.

For a set of pairs of models, tau is the mean of sign(mu_a - mu_b) sign(g_a - g_b), mu being a measure and g the gap. All pairs
give Kendall's tau, pairs that differ in one hyperparameter alone psi, pairs that share the model type tau of one type. What the
models of every pair share can't explain the agreement that is left.

A bootstrap draws models: a pair counts the product of its models' draws, and copies of one model make no pair. Draws are
(n, 1 + R), ones in the first column: column 0 of what comes out is the statistic, the R others are its resamples.
"""

import math

import numpy as np
import pandas as pd
from scipy.stats import chi2

EQUAL, ROUNDING = 1e-6, 1e-12  # hyperparameters, and measures and gaps, that differ by no more, relatively, are equal
CLOSE = 1.25  # learning rates drawn at random are never equal: they are the same within this factor
FEWEST = 20  # pairs that share something give no number if they are fewer
SAME = (("model",), ("model", "lr"))
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


def matched(table, same=()):
    """The pairs of rows that share the columns `same`: indices (P,), (P,), and whether rates were the same within CLOSE.

    That is so where fewer than half of the models have a partner at exactly their rate.
    """
    i, j = np.triu_indices(len(table), 1)
    for column in sorted(same, key="lr".__eq__):  # the rate last
        code = np.nan_to_num(levels(table[column]), nan=-1)
        kept = code[i] == code[j]
        random = column == "lr" and len(np.union1d(i[kept], j[kept])) < len(table) / 2
        if random and pd.api.types.is_numeric_dtype(rate := table["lr"]):
            rate = rate.to_numpy()
            kept = np.maximum(rate[i], rate[j]) <= CLOSE * (1 + EQUAL) * np.minimum(rate[i], rate[j])
            return i[kept], j[kept], True
        i, j = i[kept], j[kept]
    return i, j, False


def draw(setting, stratum, resamples, rng):
    """How often each model is drawn, (n, 1 + R): settings (n,) inside each stratum (n,), each with all its seeds."""
    draws = np.ones((len(setting), 1 + resamples), np.float32)
    if len(np.unique(setting)) == 1:  # no interval
        draws[:, 1:] = math.nan
        return draws
    for own in (stratum == level for level in np.unique(stratum)):
        names, place = np.unique(setting[own], return_inverse=True)
        draws[own, 1:] = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples).T[place]
    return draws


def signs(table, column, i, j):
    """sign(x_i - x_j) of a column over pairs, (P,); NaN where one of the two is missing."""
    x = levels(table[column], ROUNDING)
    return np.sign(x[i] - x[j]).astype(np.float32)


def agreement(table, gap, measures, i, j):
    """sign(mu_i - mu_j) sign(g_i - g_j), (m, P)."""
    return np.array([signs(table, measure, i, j) for measure in measures]) * signs(table, gap, i, j)


@np.errstate(invalid="ignore")
def tau(agreed, i, j, draws, group=None):
    """The mean of agreed (m, P) over pairs, in each group (P,), then over groups: (m, 1 + R), NaN where there is no pair."""
    known, row = np.unique(np.isfinite(agreed).astype(np.float32), axis=0, return_inverse=True)  # most measures lack none
    agreed, row = np.nan_to_num(agreed), row.ravel()
    groups = [slice(None)] if group is None else [group == level for level in np.unique(group)]
    means, size = np.full((len(agreed), draws.shape[1]), math.nan), 1 + 20_000_000 // (1 + len(i))
    for block in (slice(start, start + size) for start in range(0, draws.shape[1] if groups else 0, size)):
        copies = draws[i, block] * draws[j, block]  # (P, block); whole numbers, exact in float32
        totals = [(agreed[:, own] @ copies[own]).astype(float) / (known[:, own] @ copies[own])[row] for own in groups]
        means[:, block] = finite_mean(np.array(totals))
    return means


def spread(table, measure, i, j):
    """The standard deviation of tau over these pairs if the gaps were in random order, also inside what the pairs share.

    Two pairs with one model in common agree in sign with probability 2/3, two others with 1/2. So the variance of the sum is
    (pairs + sum_i r_i^2) / 3, r_i the sum of the signs of model i against its partners; n (n - 1) (2 n + 5) / 18 for all pairs.
    """
    sign = np.nan_to_num(signs(table, measure, i, j)).astype(float)
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
    weights, taus = np.power(spreads, -2.0), np.array(taus)
    taus = np.where(np.isfinite(taus), taus, taus[:, :1])  # a resample without a pair
    together = weights @ taus / weights.sum()
    Q = weights @ (taus[:, 0] - together[0]) ** 2
    return together[0], *interval(together[1:]), chi2.sf(Q, len(taus) - 1) if len(taus) > 1 else math.nan


def correlate(table, hyperparameters, gap, measures, same=SAME, *, resamples=10_000, rng=0):
    """One row (dict) for each measure: its agreement with the column `gap` over all pairs and over matched ones.

    table: a DataFrame or a list of dicts, a row per model. Rows with equal hyperparameters are the seeds of one setting. A
    measure or gap that isn't finite drops the model for this measure. same: columns that pairs share, for each tau_same_*; of
    the default what consists of hyperparameters. lead: tau of srr minus the highest of its rivals, chosen anew in every
    resample; share_first: in how many of them srr is above all. Raises ValueError for fewer than three models.
    """
    measures, rng = [*measures], np.random.default_rng(rng)
    table = pd.DataFrame(table).astype({name: float for name in (gap, *measures)})
    table = table[np.isfinite(table[gap])].reset_index(drop=True)
    if len(table) < 3:
        raise ValueError(f"{len(table)} models with a finite {gap}; ranks need 3 or more")
    axes = list(dict.fromkeys(hyperparameters))
    same = [columns for columns in same if same is not SAME or set(columns) <= set(axes)]
    codes = np.nan_to_num([levels(table[axis]) for axis in axes], nan=-1).T  # (n, axes)
    setting = np.unique(codes, axis=0, return_inverse=True)[1].ravel()
    if len(np.unique(setting)) < len(table):  # the gap of another seed
        table["baseline_other_seed"] = table.groupby(setting)[gap].transform(
            lambda g: np.roll(g, 1) if len(g) > 1 else math.nan
        )
        measures.append("baseline_other_seed")
    samples, counts = {}, {}  # {statistic: (m, 1 + R)}, {statistic: (m,)}

    def add(statistic, i, j, draws, group=None):
        agreed = agreement(table, gap, measures, i, j)
        if measures[-1] == "baseline_other_seed":
            agreed[-1, setting[i] == setting[j]] = math.nan
        counts[statistic], samples[statistic] = np.isfinite(agreed).sum(axis=1), tau(agreed, i, j, draws, group)

    everyone = draw(setting, np.zeros(len(table)), resamples, rng)
    i, j, _ = matched(table)
    add("tau", i, j, everyone)
    for columns in same:
        name, stratum = "tau_same_" + "_".join(columns), np.zeros(len(table))
        if columns[0] != "lr" and table[columns[0]].nunique() < len(np.unique(setting)):  # no type is lost
            stratum = np.nan_to_num(levels(table[columns[0]]), nan=-1)
        add(name, *matched(table, columns)[:2], draw(setting, stratum, resamples, rng))
        samples[name][counts[name] < FEWEST] = math.nan
    for k, axis in enumerate(axes):
        group = np.unique(np.delete(codes, k, axis=1), axis=0, return_inverse=True)[1].ravel()
        alone = (group[i] == group[j]) & (codes[i, k] != codes[j, k])
        add(f"psi_{axis}", i[alone], j[alone], everyone, group[i[alone]])
    samples["Psi"] = finite_mean(np.array([samples[f"psi_{axis}"] for axis in axes]))  # Eq. 13

    rows = []
    for m, name in enumerate(measures):
        rows.append({"gap": gap, "measure": name, "models": int(np.isfinite(table[name]).sum())})
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
