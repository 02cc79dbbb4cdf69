"""The claims of the paper and our own questions, the numbers that decide them on our runs, and a verdict by RULE. No torch."""

import math

import numpy as np
import pandas as pd
from scipy.stats import t, ttest_1samp

MAIN = ["crate-c", "crate-n", "crate-t", "crate"]  # the model types of Sections 4.3, 5 and 6
NORM_MEASURES = ["log_prod_of_fro", "log_sum_of_fro", "log_prod_of_spec", "log_sum_of_spec", "path_norm"]
MATCHED = {"tau_same_model": "same type", "tau_same_model_lr": "same type and rate"}
RULE = """A claim is that all numbers of its row are positive, or negative. A number *holds* where its interval is on the
claimed side and is *contradicted* where it is on the other; else it is *undecided*. Gains of accuracy have *no effect* where
all their 90 % intervals lie within 0.5 points (two one-sided tests). Intervals over seeds are t intervals, together of 95 % for
the row (Bonferroni, over all steps where the worst of them is shown). Rank correlations have bootstrap intervals over models
(crate/ranks.py) of 95 % each; tau over all pairs decides, in brackets stands that of pairs of one type, and of one type and
learning rate. Rows are not adjusted for each other: of thirty, one or two may be decided by chance.
"""


def mean_interval(values, confidence=0.95):
    """The mean of one value per seed, and its t interval; NaN bounds where there are fewer than two values or all are equal."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    mean = values.mean() if len(values) else math.nan
    if len(values) < 2 or np.ptp(values) <= 1e-9 * np.abs(values).max():  # equal values of coarse accuracies: no certainty
        return mean, math.nan, math.nan
    return mean, *ttest_1samp(values, 0).confidence_interval(confidence)


def with_interval(number, low, high, form="+.3g"):
    """A number and its interval, if it has one, as text."""
    if not np.isfinite(low):
        return f"{number:{form}}" if np.isfinite(number) else "-"
    return f"{number:{form}} [{low:{form}}, {high:{form}}]"


def interval_of(row, column):
    """(number, low, high) of a statistic in a row of correlation.csv."""
    return row[column], row[f"{column}_low"], row[f"{column}_high"]


def claim(section, text, side, numbers, n, beside={}):
    """A row of the claims table, in a list; none without numbers, {name: (number, low, high)}, which are claimed to be > 0
    (side +1) or < 0 (-1). n: how many seeds or models, as text; beside: text behind a number.
    """
    if not numbers:
        return []
    bounds = np.array([sorted((side * low, side * high)) for _, low, high in numbers.values()])
    counts = {"holds": (bounds[:, 0] > 0).sum(), "contradicted": (bounds[:, 1] < 0).sum()}
    some = [f"{word} in {count} of {len(numbers)}" for word, count in counts.items() if count]
    every = [word for word, count in counts.items() if count == len(numbers)]
    shown = "; ".join(f"{name} {with_interval(*number)}".strip() + beside.get(name, "") for name, number in numbers.items())
    row = {"section": section, "claim": text, "claimed": "> 0" if side > 0 else "< 0", "numbers": shown, "n": n}
    return [row | {"verdict": ", ".join(every or some or ["undecided"])}]


def over_seeds(section, text, side, values, *, tests=None, margin=None):
    """The row of a claim about means over seeds. values: {name: a Series with a value per seed}; tests: how many numbers
    share the 5 % (default: those of the row); margin: within which there is no effect, in points.
    """
    values = {name: own.dropna() for name, own in values.items() if own.notna().any()}
    numbers = {name: mean_interval(own, 1 - 0.05 / (tests or len(values))) for name, own in values.items()}
    rows = claim(section, text, side, numbers, " or ".join(map(str, sorted({len(own) for own in values.values()}))) + " seeds")
    if margin and rows and rows[0]["verdict"] == "undecided":
        _, lows, highs = zip(*(mean_interval(own, 0.90) for own in values.values()))
        if min(lows) > -margin and max(highs) < margin:
            rows[0]["verdict"] = f"no effect (within {margin:g} points)"
    return rows


def attention_claims(rates):
    """Section 4.1, from the rates.csv of the attention-only experiment."""
    rates = rates.assign(change=rates["after"] - rates["before"])
    change = rates.pivot(index="seed", columns=["rule", "layer"], values="change")  # (seeds, rules and layers)
    exact, raises = change["exact"].max(axis=1), {rule: change[rule][1] for rule in ("expansion", "second-order")}
    rows = over_seeds("4.1", "The exact gradient step (Eq. 6) lowers R^c at every layer: largest change", -1, {"": exact})
    rows += over_seeds("4.1", "The expansion's step (Eq. 7), and its second-order term's, raise R^c at layer 1", +1, raises)
    text = "CRATE-C's attention (Eq. 8) raises R^c at every layer: smallest change"
    return rows + over_seeds("4.1", text, +1, {"": change["softmax"].min(axis=1)})


def initial_claims(layers, where):
    """Section 4.3 at initialisation, from rows {seed, layer, srr} of the main types, over which the mean is taken."""
    curves = layers.groupby(["seed", "layer"])["srr"].mean().unstack()  # (seeds, layers)
    depth = max(curves)
    first, turn, last = curves[1], curves[max(1, 3 * depth // 4)], curves[depth]
    lowest = with_interval(*mean_interval(curves.idxmin(axis=1)), ".1f")
    text = "At initialisation SRR falls over the first three quarters of the layers (9 of 12)"
    rows = over_seeds("4.3", text, -1, {where: turn - first})
    text = f"At initialisation SRR rises over the last quarter of the layers; it is lowest at layer {lowest}"
    return rows + over_seeds("4.3", text, +1, {where: last - turn})


def course_claims(layers, which):
    """Section 4.3 along training, from rows {model, seed, epoch, layer, srr}: SRR rises from any logged epoch to the next."""
    worst, share, tests = {}, [], 0
    for model in MAIN:
        own = layers[layers["model"] == model]
        if model == "crate-c":  # the paper excepts its last few layers
            own = own[own["layer"] <= 3 * own["layer"].max() / 4]
        curves = own.pivot(index=["layer", "epoch"], columns="seed", values="srr").sort_index()
        steps = curves.groupby("layer").diff().dropna(how="all")  # a row per layer and step, a column per seed
        if len(steps):
            worst[model], tests = steps.loc[steps.mean(axis=1).idxmin()], tests + len(steps)
            share.append(f"{(steps > 0).sum().sum() / steps.count().sum():.0%} of {model}'s")
    text = f"Training raises SRR at every layer, but CRATE-C's last quarter, from logged epoch to epoch{which}: worst step"
    return over_seeds("4.3", f"{text}; {', '.join(share)} steps rise", +1, worst, tests=tests)


def operator_claims(changes, which):
    """What compresses in trained models (Section 4.3). changes: of R^c, mean over layers, columns after, after_equal_norm,
    index (model, point, seed)."""
    beyond, rows = "Beyond the paper: at equal norm of the tokens attention lowers R^c", []
    for text, side, models, point, rate in (
        ("Attention raises R^c", +1, ["crate-c", "crate-t", "crate"], "compressed", "after"),
        ("CRATE-N's negated step, and crate-e's exact one, lower R^c", -1, ["crate-n", "crate-e"], "compressed", "after"),
        ("ISTA with its ReLU lowers R^c (conjecture)", -1, MAIN, "output", "after"),
        (beyond, -1, [*MAIN, "crate-e"], "compressed", "after_equal_norm"),
    ):
        own = changes[rate].xs(point, level="point").unstack("model")
        own = {model: own[model] for model in models if model in own}
        rows += over_seeds("4.3", f"{text} in trained models{which}", side, own)
    return rows


def rank_claims(widths, whole, study):
    """Section 5, from correlation.csv tables: {words: table} of each width, of all widths together, of random settings.

    Beside tau over all pairs, which the paper's claims are about, stands that over matched pairs (crate/ranks.py).
    """
    smaller, larger, every = dict([*widths.items()][:1]), dict([*widths.items()][1:]), widths | whole | study
    rows, beyond = [], "Beyond the paper: "
    flatness, wins = ["inverse_margin", "pacbayes_flatness"], "SRR wins on the axis of model types: its lead in psi"
    for text, side, column, tables, measures, *gap in (
        ("SRR correlates with the gap: tau", +1, "tau", widths, ["srr"]),
        ("SRR has the highest tau: its lead over the closest rival", +1, "lead", widths, ["srr"]),
        (f"{wins} over the closest rival", +1, "lead_psi_model", smaller, ["srr"]),
        ("Norms and path-norm correlate negatively: tau", -1, "tau", smaller, NORM_MEASURES),
        ("1/margin and PAC-Bayes flatness correlate positively: tau", +1, "tau", smaller, flatness),
        ("SRR is not the best on dropout: its lead in psi over the closest rival", -1, "lead_psi_dropout", larger, ["srr"]),
        ("SRR is not the best on model types: its lead in psi over the closest rival", -1, "lead_psi_model", larger, ["srr"]),
        (beyond + "SRR correlates over all widths, and at random settings: tau", +1, "tau", whole | study, ["srr"]),
        (beyond + "SRR ranks models of one type: tau", +1, "tau_same_model", every, ["srr"]),
        (beyond + "SRR ranks models of one type and learning rate: tau", +1, "tau_same_model_lr", every, ["srr"]),
        (beyond + "SRR correlates with the gap in accuracy: tau", +1, "tau", every, ["srr"], "gap_accuracy"),
    ):
        numbers, beside, models = {}, {}, {}
        for where, table in tables.items():
            for row in table[table["measure"].isin(measures) & table["gap"].eq(*gap or ["gap"])].to_dict("records"):
                if np.isfinite(row.get(column, math.nan)):
                    name = f"{row['measure']}, {where}" if len(measures) > 1 else where
                    numbers[name], models[row["models"]] = interval_of(row, column), True
                    matched = [
                        f"{words} {with_interval(*interval_of(row, same))}" for same, words in MATCHED.items() if same in row
                    ]
                    beside[name] = f" ({', '.join(matched)})" if column == "tau" and matched else ""
        rows += claim("5", text, side, numbers, " / ".join(map(str, models)) + " models", beside)
    return rows


def slopes(runs):
    """The least-squares slope of the gap over SRR, along eta: (seeds, models). runs: {model, seed, srr, gap}."""
    keys = [runs["model"], runs["seed"]]
    srr, gap = (runs[name] - runs[name].groupby(keys).transform("mean") for name in ("srr", "gap"))
    return ((srr * gap).groupby(keys).sum() / (srr**2).groupby(keys).sum()).unstack("model")


def observed_slope(models):
    """How the gap goes with SRR where no loss moves it: (slope, low, high), least squares with a constant for each type.

    models: rows {model, srr, gap}; NaN for too few.
    """
    srr, gap = (models[name] - models.groupby("model")[name].transform("mean") for name in ("srr", "gap"))
    freedom = len(models) - models["model"].nunique() - 1  # a mean per type, and the slope
    if freedom < 1:
        return math.nan, math.nan, math.nan
    slope = (srr @ gap) / (srr @ srr)
    half = t.ppf(0.975, freedom) * math.sqrt(((gap - slope * srr) ** 2).sum() / freedom / (srr @ srr))
    return slope, slope - half, slope + half


def observed_slopes(results):
    """observed_slope of the main types' smallest models in the folder's tables: {words: (slope, low, high)}."""
    found = {}
    for name, what in ("measures", "the grid"), ("study_measures", "random settings"):
        if (results / f"{name}.csv").exists():
            models = pd.read_csv(results / f"{name}.csv").dropna(subset=["srr", "gap"])
            models = models.query("model in @MAIN and reached_target != False and width == width.min()")
            found[f"nobody pushed: {what}, d = {models['width'].min()}"] = observed_slope(models)
    return found


def narrowest(slopes):
    """The slope whose interval is narrowest; NaN without any."""
    return min(slopes.values(), key=lambda slope: slope[2] - slope[1], default=[math.nan])[0]


def accuracy_claims(gains, plain, which):
    """Section 6. gains: points of accuracy that SRR in the loss adds (Table 2), index (model, seed), a column per eta; plain:
    accuracies in % without (Table 3), a row per seed, a column per model type.
    """
    rows = []
    for eta, values in gains.items():
        of_models = {model: values[model] for model in MAIN if model in values.index}
        text = f"SRR of the last layer in the loss helps, eta = {eta:g}{which}: points"
        rows += over_seeds("6", text, +1, of_models, margin=0.5)
    plain = plain.reindex(columns=[*MAIN, "crate-fix", "crate-identity"])
    C, N, T, W, fix, identity = (plain[model] for model in plain)
    rows += over_seeds("6", f"CRATE-N beats CRATE-C{which}: points", +1, {"": N - C})
    rows += over_seeds("6", f"CRATE-N falls behind CRATE-T{which}: points", -1, {"": N - T})
    text = f"CRATE-T is nearer to CRATE than to CRATE-C{which}: (T - C) - (CRATE - T) in points"
    rows += over_seeds("6", text, +1, {"": 2 * T - C - W})
    best = {"to C": T - C, "to Fix": T - fix, "to Identity": T - identity}
    return rows + over_seeds("6", f"The transpose is the best fixed output matrix{which}: its lead in points", +1, best)


def layer_choice_claims(by_layer):
    """Which layer's SRR (Table 6)? by_layer: accuracies in %, a row per seed, a column per --srr-layer, in order."""
    fixed = by_layer.drop(columns=["all", "random"], errors="ignore")
    half = fixed.shape[1] // 2
    every, shallow, deep = (own.mean(axis=1, skipna=False) for own in (fixed, fixed.iloc[:, :half], fixed.iloc[:, -half:]))
    random = by_layer.get("random", pd.Series(dtype=float))
    rows = over_seeds("6", "A fixed layer's SRR is better than a random one's: points", +1, {"": every - random})
    text = "Shallower layers gain more: first half of the layers minus second half, points"
    return rows + over_seeds("6", text, +1, {"": shallow - deep})
