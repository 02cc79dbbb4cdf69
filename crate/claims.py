"""The claims of the paper and our own questions, the numbers that decide them on our runs, and a verdict by RULE. No torch."""

import math

import numpy as np
import pandas as pd
from scipy.stats import t, ttest_1samp

MAIN = ["crate-c", "crate-n", "crate-t", "crate"]  # the model types of Sections 4.3, 5 and 6
TYPES = [*MAIN, "crate-fix", "crate-identity", "crate-e"]  # all that a claim speaks of
NORMS = ["log_prod_of_fro", "log_sum_of_fro", "log_prod_of_spec", "log_sum_of_spec", "path_norm"]
FLATNESS = ["inverse_margin", "pacbayes_flatness"]
# Those of Tables 1 and 5, and baselines: what is shown. The other measures stand in correlation.csv.
MEASURES = ["srr", "srr_lambda_0", *NORMS, "inverse_margin", "pacbayes_init", "pacbayes_flatness", "sharpness_flatness"]
MEASURES += ["baseline_type", "baseline_lr", "baseline_steps", "baseline_other_seed"]
BEYOND = "Beyond the paper: "
VERDICTS = ["contradicted", "contradicted in part", "no effect", "undecided", "holds in part", "holds"]
RULE = """A claim is that all its numbers are positive, or negative. A number *holds* where its interval is on the claimed side,
is *contradicted* where it is on the other, else *undecided*. Accuracy gains have *no effect* where all their 90 % intervals lie
within 0.5 points (two one-sided tests). Intervals over seeds are t intervals, 95 % for a row (Bonferroni, over all steps where
the worst is shown); of rank correlations 95 % each (bootstrap over models). Rows are not adjusted for each other: with nothing
to find, about {chance:.1f} of {rows} would be decided by chance.
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
    """A number and its interval, if it has one, as text; from 1,000 on without decimals."""
    number, low, high = (
        f"{x:+.0f}" if abs(x) >= 1000 else f"{x:{form}}" if np.isfinite(x) else "-" for x in (number, low, high)
    )
    return number if low == "-" else f"{number} [{low}, {high}]"


def interval_of(row, column):
    """(number, low, high) of a statistic in a row of correlation.csv."""
    return row[column], row[f"{column}_low"], row[f"{column}_high"]


def claim(section, text, side, numbers, n):
    """A row of the claims table, in a list; none without numbers, {name: (number, low, high)}, which are claimed to be > 0
    (side +1) or < 0 (-1). n: how many seeds or models, as text.
    """
    if not numbers:
        return []
    bounds = np.array([sorted((side * low, side * high)) for _, low, high in numbers.values()])
    counts = {"holds": (bounds[:, 0] > 0).sum(), "contradicted": (bounds[:, 1] < 0).sum()}
    some = [f"{word} in {count} of {len(numbers)}" for word, count in counts.items() if count]
    every = [word for word, count in counts.items() if count == len(numbers)]
    shown, before = [], ""
    for name, number in numbers.items():  # what two in a row are of, "d = 96: ", is said once
        words = name[: name.find(": ") + 2] if ": " in name else ""
        shown.append(f"{name.removeprefix(words) if words == before else name} {with_interval(*number)}".strip())
        before = words
    row = {"section": section, "claim": text, "claimed": "> 0" if side > 0 else "< 0", "numbers": "; ".join(shown), "n": n}
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


def over_sets(sets):
    """The rows of claims about several sets of runs: a row a claim, the sets side by side. sets: {words: [(section, text, side,
    values, tests, margin)]}, each as over_seeds takes them; the words go before the names of the values.
    """
    merged = {}
    for words, of_set in sets.items():
        for section, text, side, values, tests, margin in of_set:
            known, counted = merged.get((section, text, side, margin), ({}, 0))
            own = {": ".join(filter(None, (words, name))): series for name, series in values.items() if series.notna().any()}
            merged[section, text, side, margin] = known | own, counted + (tests or len(own))
    return [
        row for (section, text, side, margin), (values, tests) in merged.items()
        for row in over_seeds(section, text, side, values, tests=tests, margin=margin)
    ]  # fmt: skip


def kind(verdict):
    """The entry of VERDICTS that a verdict is an instance of."""
    if " in " in verdict:
        return "contradicted in part" if "contradicted" in verdict else "holds in part"
    return next(word for word in VERDICTS if verdict.startswith(word))


def in_order(rows):
    """{heading: rows, disagreements first} of the paper's claims and of those beyond it; the heading counts verdicts."""
    parts = {}
    for what, beyond in ("The paper's", False), ("Beyond the paper,", True):
        own = [row for row in rows if row["claim"].startswith(BEYOND) == beyond]
        own.sort(key=lambda row: VERDICTS.index(kind(row["verdict"])))
        count = {word: sum(kind(row["verdict"]) == word for row in own) for word in VERDICTS}
        heading = f"{what} {len(own)} claims: " + ", ".join(f"{word} {number}" for word, number in count.items() if number)
        parts |= {heading: own} if own else {}
    return parts


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
    lowest = f"{where} (lowest at layer {with_interval(*mean_interval(curves.idxmin(axis=1)), '.1f')})"
    text = "At initialisation SRR falls over the first three quarters of the layers (9 of 12)"
    rows = over_seeds("4.3", text, -1, {where: turn - first})
    text = "At initialisation SRR rises over the last quarter of the layers"
    return rows + over_seeds("4.3", text, +1, {lowest: last - turn})


def course_claims(layers):
    """Section 4.3 along training, from rows {model, seed, epoch, layer, srr}: SRR rises from any logged epoch to the next."""
    worst, tests = {}, 0
    for model in MAIN:
        own = layers[layers["model"] == model]
        if model == "crate-c":  # the paper excepts its last few layers
            own = own[own["layer"] <= 3 * own["layer"].max() / 4]
        curves = own.pivot(index=["layer", "epoch"], columns="seed", values="srr").sort_index()
        steps = curves.groupby("layer").diff().dropna(how="all")  # a row per layer and step, a column per seed
        if len(steps):
            share = (steps > 0).sum().sum() / steps.count().sum()
            worst[f"{model} ({share:.0%} rise)"] = steps.loc[steps.mean(axis=1).idxmin()]
            tests += len(steps)
    text = "Training raises SRR at every layer (but CRATE-C's last quarter), epoch after logged epoch: worst step"
    return [("4.3", text, +1, worst, tests, None)]


def operator_claims(changes):
    """What compresses in trained models (Section 4.3). changes: of R^c, mean over layers, columns after, after_equal_norm,
    index (model, point, seed)."""
    rows = []
    for text, side, models, point, rate in (
        ("Attention raises R^c", +1, ["crate-c", "crate-t", "crate"], "compressed", "after"),
        ("CRATE-N's negated step, and crate-e's exact one, lower R^c", -1, ["crate-n", "crate-e"], "compressed", "after"),
        ("ISTA with its ReLU lowers R^c (conjecture)", -1, MAIN, "output", "after"),
        (BEYOND + "at equal norm of the tokens attention lowers R^c", -1, [*MAIN, "crate-e"], "compressed", "after_equal_norm"),
    ):
        own = changes[rate].xs(point, level="point").unstack("model")
        own = {model: own[model] for model in models if model in own}
        rows.append(("4.3", f"{text} in trained models", side, own, None, None))
    return rows


def rank_claims(widths, others):
    """Section 5, from correlation.csv tables: {words: table} of each width; of all widths together and of random settings."""
    smaller, larger = dict([*widths.items()][:1]), dict([*widths.items()][1:])
    rows, psi = [], ["lead_psi_dropout", "lead_psi_model"]
    for text, side, columns, tables, measures, gap in (
        ("SRR correlates with the gap: tau", +1, ["tau"], widths, ["srr"], "gap"),
        ("SRR has the highest tau: its lead over the closest rival", +1, ["lead"], widths, ["srr"], "gap"),
        ("SRR wins on model types: its lead in psi over the closest rival", +1, psi[1:], smaller, ["srr"], "gap"),
        ("Norms and path-norm correlate negatively: tau", -1, ["tau"], smaller, NORMS, "gap"),
        ("1/margin and PAC-Bayes flatness correlate positively: tau", +1, ["tau"], smaller, FLATNESS, "gap"),
        ("SRR is not the best on dropout and model types: its lead in psi", -1, psi, larger, ["srr"], "gap"),
        (BEYOND + "SRR correlates over all widths, and at random settings: tau", +1, ["tau"], others, ["srr"], "gap"),
        (BEYOND + "SRR ranks models of one type: tau", +1, ["tau_same_model"], widths | others, ["srr"], "gap"),
        (BEYOND + "SRR ranks models of one type and rate: tau", +1, ["tau_same_model_lr"], widths | others, ["srr"], "gap"),
        (BEYOND + "SRR correlates with the gap in accuracy: tau", +1, ["tau"], widths | others, ["srr"], "gap_accuracy"),
    ):
        numbers, models = {}, {}
        for where, table in tables.items():
            for row in table[table["measure"].isin(measures) & table["gap"].eq(gap)].to_dict("records"):
                for column in columns:
                    if np.isfinite(row.get(column, math.nan)):
                        one = column.removeprefix("lead_psi_") if len(columns) > 1 else row["measure"]
                        numbers[where if len(columns) == len(measures) == 1 else f"{where}: {one}"] = interval_of(row, column)
                        models[row["models"]] = True
        rows += claim("5", text, side, numbers, " / ".join(map(str, models)) + " models")
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
            found[f"{what}, d = {models['width'].min()}"] = observed_slope(models)
    return found


def narrowest(slopes):
    """The slope whose interval is narrowest; NaN without any."""
    return min(slopes.values(), key=lambda slope: slope[2] - slope[1], default=[math.nan])[0]


def accuracy_claims(gains, plain):
    """Section 6. gains: points of accuracy that SRR in the loss adds (Table 2), index (model, seed), a column per eta; plain:
    accuracies in % without (Table 3), a row per seed, a column per model type.
    """
    rows = []
    for eta, values in gains.items():
        of_models = {model: values[model] for model in MAIN if model in values.index}
        rows.append(("6", f"SRR of the last layer in the loss helps, eta = {eta:g}: points", +1, of_models, None, 0.5))
    C, N, T, W, fix, identity, _ = (plain.get(model, pd.Series(dtype=float)) for model in TYPES)
    best = {"to C": T - C, "to Fix": T - fix, "to Identity": T - identity}
    for text, side, values in (
        ("CRATE-N beats CRATE-C: points", +1, {"": N - C}),
        ("CRATE-N falls behind CRATE-T: points", -1, {"": N - T}),
        ("CRATE-T is nearer to CRATE than to CRATE-C: (T - C) - (CRATE - T)", +1, {"": 2 * T - C - W}),
        ("The transpose is the best fixed output matrix: its lead in points", +1, best),
    ):
        rows.append(("6", text, side, values, None, None))
    return rows


def layer_choice_claims(by_layer):
    """Which layer's SRR (Table 6)? by_layer: accuracies in %, a row per seed, a column per --srr-layer, in order."""
    fixed = by_layer.drop(columns=["all", "random"], errors="ignore")
    half = fixed.shape[1] // 2
    every, shallow, deep = (own.mean(axis=1, skipna=False) for own in (fixed, fixed.iloc[:, :half], fixed.iloc[:, -half:]))
    random = by_layer.get("random", pd.Series(dtype=float))
    rows = over_seeds("6", "A fixed layer's SRR is better than a random one's: points", +1, {"": every - random})
    text = "Shallower layers gain more: first half minus second, points"
    return rows + over_seeds("6", text, +1, {"": shallow - deep})
