"""Rank statistics of complexity measures against the generalisation gap (Section 5: Eqs. 12, 13, Tables 1, 5). No torch.

A *setting* is one combination of hyperparameters, a *model* a setting with a seed, a *stratum* the models of one type, say.
n models, m measures, P pairs, R resamples. tau, psi, Psi are means of sign(mu_a - mu_b) sign(g_a - g_b) over pairs of models:
`pair_groups` says which, `averages` takes the means: of 32 models in the paper's grid, psi_lr has 16 groups of one pair. A
bootstrap changes how often each model counts, so that a pair counts the product of its models' draws; a permutation changes
whose gap is whose. K is from Jiang et al. 2019, sign errors from Dziugaite et al. 2020.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import entr
from scipy.stats import kendalltau, rankdata

MOST_WORK = 1e10  # pairs times resamples: about a minute on one core
NO_RIVALS = ("srr_", "rate_subspaces", "baseline_", "params")  # SRR's variants and parts, and baselines
PIECE = 200_000  # numbers at once, so that they stay in the cache


class Models(NamedTuple):
    """What the models are, as codes; only models of one `seed` make pairs."""

    levels: np.ndarray  # (n, axes)
    setting: np.ndarray  # (n,)
    seed: np.ndarray  # (n,)
    replicate: np.ndarray  # (n,), tells the models of one setting apart: the seed, or a count where all seeds differ
    stratum: np.ndarray  # (n,)


def numbers(table, column, argument="measures"):
    """A column as floats (n,), NaN where missing. Raises ValueError at text."""
    values = pd.to_numeric(table[column], errors="coerce")
    wrong = values.isna() & table[column].notna()
    if wrong.any():
        row = table.loc[wrong.idxmax()]
        run = f" (run {row['run']})" if "run" in table else ""
        raise ValueError(f"{argument} {column}: row {row.name}{run}: {row[column]!r} is not a number like 1234.5 or 1e-3")
    return values.to_numpy(float)


def cells(columns):
    """An index (n,) that rows of `columns` (n, k) share where they are equal."""
    return np.unique(columns, axis=0, return_inverse=True)[1].ravel()


def arrange(table, hyperparameters, seed_column=None, strata=None):
    """The Models of a table. Where no two models share a seed, all of them make pairs.

    Raises ValueError where a combination occurs twice with one seed, or where a setting lies in several strata.
    """

    def codes(column):
        return np.zeros(len(table), int) if column is None else pd.factorize(table[column], use_na_sentinel=False)[0]

    axes = np.stack([codes(axis) for axis in hyperparameters], axis=1)
    models = pd.DataFrame({"setting": cells(axes), "seed": codes(seed_column), "stratum": codes(strata)})
    twice = models.duplicated(["setting", "seed"])
    if twice.any():
        row = table.iloc[twice.argmax()]
        named = ", ".join(f"{axis} {row[axis]}" for axis in hyperparameters)
        raise ValueError(f"hyperparameters: the combination {named} occurs twice; a seed column can tell models apart")
    if (models.groupby("setting")["stratum"].nunique() > 1).any():
        raise ValueError(f"strata {strata}: models that share all hyperparameters differ in it; name a hyperparameter")
    models["replicate"] = models["seed"]
    if models["seed"].is_unique:
        models["replicate"] = models.groupby("setting").cumcount()
        models["seed"] = np.zeros(len(table), int)
    return Models(axes, *(models[name].to_numpy() for name in Models._fields[1:]))


def all_pairs(models):
    """The pairs of models, two index arrays (P,); each pair once."""
    i, j = np.triu_indices(len(models.seed), 1)
    same = models.seed[i] == models.seed[j]
    return i[same], j[same]


def pair_groups(models, i, j, hyperparameters, strata):
    """Which of the pairs i, j each statistic takes: {statistic: for each seed a list of groups}, a group an index array.

    tau takes all, psi_<axis> those that differ on this axis alone: a group shares all else (Eq. 12).
    """

    def split(chosen, group):
        seeds = []
        for seed in range(models.seed.max() + 1):
            own = np.flatnonzero(chosen & (models.seed[i] == seed))
            own = own[np.argsort(group[i[own]], kind="stable")]
            seeds.append(np.split(own, np.flatnonzero(np.diff(group[i[own]])) + 1))
        return seeds

    one = np.zeros_like(models.seed)
    differ = models.levels[i] != models.levels[j]  # (P, axes)
    alone = differ.sum(axis=1) == 1
    groups = {"tau": split(np.ones(len(i), bool), one)}
    for axis, name in enumerate(hyperparameters):
        groups[f"psi_{name}"] = split(alone & differ[:, axis], cells(np.delete(models.levels, axis, axis=1)))
    if len(strata):
        within = models.stratum[i] == models.stratum[j]
        groups |= {"tau_within": split(within, one), "tau_between": split(~within, one)}
        groups |= {f"tau_in_{name}": split(within & (models.stratum[i] == k), one) for k, name in enumerate(strata)}
    return groups


def agreement(mu, gaps, draws, i, j):
    """The sum of sign(mu_i - mu_j) sign(g_i - g_j) over the pairs i, j, and their count, both (m, R).

    mu (m, n), NaN where missing; gaps and draws (n, R) or (n, 1): how often each model was drawn. Copies of one model make
    no pair: they would be ties and pull every resample towards 0.
    """
    total = count = 0
    width, kind = max(gaps.shape[1], draws.shape[1]), draws.dtype
    for piece in np.array_split(np.arange(len(i)), len(i) * width // PIECE + 1):
        a, b = i[piece], j[piece]
        signs = np.sign(mu[:, a] - mu[:, b]).astype(kind)  # (m, pairs)
        present = np.isfinite(signs)
        copies = draws[a] * draws[b]  # (pairs, R)
        total = total + np.where(present, signs, 0) @ (copies * np.sign(gaps[a] - gaps[b]).astype(kind, copy=False))
        count = count + present.astype(kind) @ copies
    return total, count


@np.errstate(invalid="ignore")
def averages(mu, g, draws, i, j, groups):
    """{statistic: (seeds, m, R)}: agreement averaged over the pairs of a group, then over the groups; NaN without pairs.

    Psi is the mean over axes (Eq. 13). A resample keeps a two-valued group with probability 0.4, so the spread of psi is
    sqrt(0.6 / 0.4) = 1.2 times the true one: its interval is somewhat wide.
    """
    result = {statistic: [] for statistic in groups}
    for statistic, seeds in groups.items():
        for of_seed in seeds:
            means = present = 0  # the sum over groups, and how many have a pair
            for group in of_seed:
                total, count = agreement(mu, g[:, None], draws, i[group], j[group])
                means, present = means + total / np.maximum(count, 1), present + (count > 0)
            result[statistic].append(means / present)
    result = {statistic: np.array(values) for statistic, values in result.items()}
    psi = [values for statistic, values in result.items() if statistic.startswith("psi_")]
    if psi:
        result["Psi"] = mean_of_finite(np.array(psi))
    return result


@np.errstate(invalid="ignore")
def mean_of_finite(values):
    """The mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    return np.where(finite, values, 0).sum(axis=0) / finite.sum(axis=0)


def conditional_information(mu, g, levels, sizes=(0, 1, 2)):
    """K of Jiang et al.: the minimum over sets S of axes of I(V_mu; V_g | U_S) / H(V_g | U_S); mu, g (n,), levels (n, axes).

    sizes: of the sets. Over ordered pairs tied in neither; V are the signs, U_S both models' levels on S. An S that leaves V_g
    no entropy is passed over; NaN if all are.
    """
    i, j = np.nonzero((mu[:, None] != mu) & (g[:, None] != g))
    signs = 2 * (mu[i] > mu[j]) + (g[i] > g[j])
    ratios = []
    for S in itertools.chain(*(itertools.combinations(range(levels.shape[1]), size) for size in sizes)):
        cell = cells(levels[:, list(S)])
        U, known = pd.factorize(cell[i] * len(cell) + cell[j])
        p = np.bincount(4 * U + signs, minlength=4 * len(known)).reshape(-1, 2, 2) / max(1, len(i))  # (U_S, V_mu, V_g)
        h_u, h_g, h_mu, h_all = (entr(p.sum(axes)).sum() for axes in ((1, 2), 1, 2, ()))
        if h_g - h_u > 1e-9:
            ratios.append(max(0.0, float((h_mu + h_g - h_all - h_u) / (h_g - h_u))))
    return min(ratios, default=math.nan)


def sign_errors(agree, i, j, setting, seeds):
    """Errors (1 - agreement) / 2 along one axis, mean over seeds: one for every pair of settings that differ on it alone."""
    chosen = np.concatenate([group for groups in seeds for group in groups])
    chosen = chosen[np.isfinite(agree[chosen])]
    pair = cells(np.sort(np.stack([setting[i[chosen]], setting[j[chosen]]], axis=1), axis=1))
    return (1 - np.bincount(pair, agree[chosen]) / np.bincount(pair)) / 2


def point_statistics(mu, g, models, i, j, groups, hyperparameters):
    """{column: value} of one measure mu (n,), NaN where missing: what needs no resampling and is no mean over pairs."""
    present = np.isfinite(mu)
    agree = np.sign(mu[i] - mu[j]) * np.sign(g[i] - g[j])
    seeds = [present & (models.seed == seed) for seed in np.unique(models.seed[present])]
    K = pd.Series([conditional_information(mu[own], g[own], models.levels[own]) for own in seeds], dtype=float)
    given = pd.Series([conditional_information(mu[own], g[own], models.stratum[own, None], [1]) for own in seeds], dtype=float)
    tau_b = pd.Series([kendalltau(mu[own], g[own]).statistic for own in seeds], dtype=float)
    row = {"tau_b": tau_b.mean(), "ties": int((agree == 0).sum()), "K": K.mean(), "K_sd": K.std()}
    row["K_within"] = given.mean()
    row |= {"models": int(present.sum()), "seeds": len(seeds), "note": ""}
    errors = [sign_errors(agree, i, j, models.setting, groups[f"psi_{axis}"]) for axis in hyperparameters]
    pooled = np.concatenate(errors)
    row |= {"sign_error_mean": float(mean_of_finite(pooled)), "sign_error_max": math.nan, "sign_error_p90": math.nan}
    if len(pooled):
        row["sign_error_max"] = float(pooled.max())
        row["sign_error_p90"] = float(np.quantile(pooled, 0.9, method="inverted_cdf"))
    for axis, of_axis in zip(hyperparameters, errors):
        row[f"sign_error_mean_{axis}"] = float(mean_of_finite(of_axis))
    if not seeds:
        row["note"] = "too few models"
    elif all(np.ptp(mu[own]) == 0 for own in seeds):
        row["note"] = "constant"
    elif not len(pooled):
        row["note"] = "no two models differ in one hyperparameter alone"
    return row


def partial_correlation(mu, g, controls, weights):
    """Spearman's rank correlation of mu and g (n,) given the controls (c, n), NaN where missing: (R,).

    weights (n, R): how often each model counts; a resample keeps the ranks among the models that lack nothing.
    """
    values = np.stack([mu, g, *controls])
    present = np.isfinite(values).all(axis=0)
    values, weights = rankdata(values[:, present], axis=1), weights[present].astype(float)
    weights /= np.maximum(weights.sum(axis=0), 1)
    means = values @ weights  # (2 + c, R)
    covariance = np.einsum("an,bn,nr->rab", values, values, weights, optimize=True) - np.einsum("ar,br->rab", means, means)
    pair, with_controls = covariance[:, :2, :2], covariance[:, :2, 2:]
    left = pair - with_controls @ np.linalg.pinv(covariance[:, 2:, 2:], 1e-9, hermitian=True) @ with_controls.swapaxes(1, 2)
    mine, gap = np.where(left > 1e-6 * pair, left, math.nan).diagonal(axis1=1, axis2=2).T  # of a control nothing is left
    return left[:, 0, 1] / np.sqrt(mine * gap)


def interval(values):
    """The 95 % percentile interval of the finite values; two NaN if there are none."""
    values = values[np.isfinite(values)]
    return np.quantile(values, (0.025, 0.975)).tolist() if len(values) else (math.nan, math.nan)


def draw(stratum, resamples, rng):
    """How often each setting is drawn inside its stratum (settings,): (settings, R)."""
    draws = np.empty((len(stratum), resamples), np.float32)
    for own in (np.flatnonzero(stratum == level) for level in np.unique(stratum)):
        draws[own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), resamples).T
    return draws


def permutation_p_values(mu, g, models, resamples, rng):
    """Two-sided p-values (m,) of tau over the pairs inside strata; mu (m, n), NaN where missing, g (n,), ranks.

    Whole settings are permuted inside strata, all their seeds alike: the seeds of a setting are no independent evidence.
    A setting that lacks a seed takes turns with those that lack the same ones, and seeds are pooled. The given order is one of
    the permutations, so that p is never 0.
    """
    kept = np.flatnonzero(np.isfinite(mu).any(axis=0))
    kept = kept[np.lexsort((models.replicate[kept], models.setting[kept]))]  # setting by setting
    mu, g, models = mu[:, kept], g[kept], Models(*(values[kept] for values in models))
    settings = np.split(np.arange(len(kept)), np.flatnonzero(np.diff(models.setting)) + 1)  # the places of their models
    if len(settings) < 3 or not resamples:
        return np.full(len(mu), math.nan)
    alike = {}  # {stratum and replicates: the settings with these}
    for places in settings:
        alike.setdefault((models.stratum[places[0]], *models.replicate[places]), []).append(places)
    order = np.tile(np.arange(len(kept))[:, None], resamples + 1)  # (models, 1 + R), the first as given
    for _, places in sorted(alike.items()):
        places = np.array(places)  # (settings, replicates)
        turns = rng.permuted(np.tile(np.arange(len(places))[:, None], resamples), axis=0)  # (settings, R)
        order[places, 1:] = places[turns].swapaxes(1, 2)
    i, j = all_pairs(models)
    inside = models.stratum[i] == models.stratum[j]
    total, count = agreement(mu, g.astype(np.float32)[order], np.ones((len(kept), 1), np.float32), i[inside], j[inside])
    return np.where(count[:, 0] > 0, np.mean(np.abs(total) >= np.abs(total[:, :1]), axis=1), math.nan)


def holm(p_values):
    """Holm's adjustment for several tests; NaN stays and counts as no test."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]
    adjusted = np.full(len(p_values), np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)))
    return adjusted


def reliability(gaps, val_losses, strata=None):
    """How much of the variance of gaps (n,) over models is no noise of the validation images; val_losses (n, images).

    {"standard_error": (n,), of each gap, "reliability": 1 - noise / variance, "reliability_within": the same inside strata
    (n,), NaN without strata}. All models share the images, so what their losses have in common moves no gap against another:
    the noise is the squared standard error of a model's losses minus the mean over models, or over those of its stratum.
    """
    gaps, val_losses = pd.DataFrame(np.asarray(gaps, float)), pd.DataFrame(np.asarray(val_losses, float))

    def share(strata):
        gap, own = (values - values.groupby(strata).transform("mean") for values in (gaps, val_losses))
        return 1 - (own.var(axis=1) / own.shape[1]).sum() / (gap**2).sum().item()

    within = math.nan if strata is None else share(np.asarray(strata))
    overall = share(np.zeros(len(gaps)))
    return {"standard_error": val_losses.sem(axis=1).to_numpy(), "reliability": overall, "reliability_within": within}


def compare_with_srr(rows, point, samples):
    """Add to `rows` how `srr` compares with each measure; point {statistic: (m, 1)}, samples {statistic: (m, R)}.

    diff_srr: tau of srr minus the measure's. On the row of srr, lead: minus its closest rival's, which is chosen anew in
    every resample; share_first: in how many of them it leads. Neither parts of SRR nor baselines are rivals.
    """
    names = [row["measure"] for row in rows]
    srr = names.index("srr")
    others = [k for k, name in enumerate(names) if name != "srr" and not name.startswith(NO_RIVALS)]
    rivals = [k for k in others if math.isfinite(rows[k]["tau"])]

    def ahead(values, others):
        return values[srr] - np.fmax.reduce(values[others])

    for statistic in samples:
        if statistic not in ("tau", "tau_within") and not statistic.startswith("psi_"):
            continue
        suffix = f"_{statistic}".removeprefix("_tau")
        compared = [(row, f"diff_srr{suffix}", [k]) for k, row in enumerate(rows)]
        if rivals:
            compared.append((rows[srr], f"lead{suffix}", rivals))
        for row, column, others in compared:
            row[column] = float(ahead(point[statistic], others)[0])
            row[f"{column}_low"], row[f"{column}_high"] = interval(ahead(samples[statistic], others))
    if rivals:
        rows[srr]["lead_rival"] = names[max(rivals, key=lambda k: rows[k]["tau"])]
        rows[srr]["share_first"] = pd.Series(ahead(samples["tau"], rivals)).dropna().gt(0).mean()


def ranked(table, measures, seed):
    """The measures (m, n) as ranks, NaN where they aren't finite, and where a seed (n,) has fewer than 3 models that are."""
    mu = np.stack([numbers(table, name) for name in measures])
    mu[~np.isfinite(mu)] = math.nan
    for own in (seed == one for one in np.unique(seed)):
        mu[np.ix_(np.isfinite(mu[:, own]).sum(axis=1) < 3, own)] = math.nan
    return rankdata(mu, axis=1, nan_policy="omit")


def correlate(table, hyperparameters, gap, measures, *, seed_column=None, strata=None, controls=(), resamples=10_000, rng=0):
    """One row (dict) per measure, in the given order: its rank statistics against the column `gap`.

    table: a DataFrame or a list of dicts, a row per model; a missing gap drops it, a measure that isn't finite for this
    measure. With a seed_column statistics are per seed, then averaged. strata: a column, such as the model type. controls:
    lists of columns, numbers or text; `rho_given_a_b`, for the list [a, b], is Spearman's correlation given these, over all
    models and seeds.

    tau is tau-a; `ties` counts pairs tied in the measure or the gap; K_within is K given the stratum alone. *_low, *_high:
    95 % percentile bootstrap over settings, for tau_within and tau_between inside strata. p_value, p_within: permutation
    tests; p_holm: for the number of measures, of which SRR's variants and parts and the baselines are none.

    Raises ValueError; its message begins with the name of the argument that is wrong.
    """
    table = pd.DataFrame(table)
    g = numbers(table, gap, "gap")
    kept, given = np.isfinite(g), len(table)
    table, g = table[kept], g[kept]
    models = arrange(table, hyperparameters, seed_column, strata)
    if np.bincount(models.seed, minlength=1).max() < 3:
        raise ValueError(f"gap {gap}: {len(g)} models; rank statistics need 3 or more of one seed")
    mu = ranked(table, measures, models.seed)

    i, j = all_pairs(models)
    note, generator = "", np.random.default_rng(rng)
    if len(i) * resamples > MOST_WORK:
        resamples, note = 0, "intervals and p-values left out: too many pairs; ask for fewer resamples"
    g = rankdata(g)
    groups = pair_groups(models, i, j, hyperparameters, table[strata].unique() if strata else ())
    by_seed = averages(mu, g, np.ones((len(g), 1)), i, j, groups)
    point = {statistic: mean_of_finite(values) for statistic, values in by_seed.items()}  # (m, 1)

    def resampled(stratum, statistics):
        """Settings are drawn and permuted inside strata (n,): {statistic: (m, R)}, p-values (m,), the draws (n, R)."""
        inside = models._replace(stratum=stratum)
        draws = draw(stratum[np.unique(models.setting, return_index=True)[1]], resamples, generator)[models.setting]
        drawn = averages(mu, g, draws, i, j, {statistic: groups[statistic] for statistic in statistics})
        drawn = {statistic: mean_of_finite(values) for statistic, values in drawn.items()}
        return drawn, permutation_p_values(mu, g, inside, resamples, generator), draws

    psi, p = [f"psi_{axis}" for axis in hyperparameters], {}
    samples, p["p_value"], draws = resampled(np.zeros_like(models.stratum), ["tau", *psi])
    for columns in controls:
        others = pd.get_dummies(table[list(columns)], dtype=float)  # a column for each level of a text
        z, name = ranked(others, others.columns, models.seed), "_".join(["rho_given", *columns])
        for into, weights in ((point, np.ones((len(g), 1))), (samples, draws)):
            into[name] = np.array([partial_correlation(of_measure, g, z, weights) for of_measure in mu])
    if strata:
        within, p["p_within"], _ = resampled(models.stratum, ["tau_within", "tau_between"])
        samples |= within
    counted = [name == "srr" or not name.startswith(NO_RIVALS) for name in measures]
    p["p_holm"] = holm(np.where(counted, p["p_value"], math.nan))

    first = ["measure", "models", "tau", "tau_low", "tau_high", "p_value", "tau_b", "ties", *psi, "Psi", "K"]
    first += ["sign_error_mean", "sign_error_max", "p_holm", "Psi_low", "Psi_high"]
    rows = []
    for k, name in enumerate(measures):
        row = point_statistics(mu[k], g, models, i, j, groups, hyperparameters)
        row |= {"measure": name, "dropped": given - row["models"], "resamples": resamples}
        row |= {f"{key}_sd": pd.Series(by_seed[key][:, k, 0]).std() for key in ("tau", "Psi")}
        row["note"] = "; ".join(filter(None, [row.pop("note"), note]))
        row |= {statistic: float(values[k, 0]) for statistic, values in point.items()}
        row |= {column: float(values[k]) for column, values in p.items()}
        for statistic in samples:
            if statistic not in psi:
                row[f"{statistic}_low"], row[f"{statistic}_high"] = interval(samples[statistic][k])
        rows.append({column: row[column] for column in first} | row)
    if "srr" in measures:
        compare_with_srr(rows, point, samples)
    return rows
