"""Every claim of the paper, the number that decides it on our runs, and a verdict by rule (RULE). No torch."""

import math

import numpy as np
from scipy.stats import linregress, t, ttest_1samp

MAIN = ["crate-c", "crate-n", "crate-t", "crate"]  # the model types of Sections 4.3, 5 and 6
ROUNDING = 1e-9  # what is nearer to 0 has no sign
POINTS = (0.5, "points")  # accuracies within this margin count as equal
RULE = """A claim is that a number is positive or negative. It *holds* where the number's whole 95 % interval is on the
claimed side and is *contradicted* where it is on the other side. Else there is *no effect* where the whole 90 % interval lies
within a margin (two one-sided tests): 0.5 points for SRR in the loss. What is left is *undecided*; an interval without width
decides nothing: equal values of coarse accuracies are no certainty. A *finding* is a number about which nothing is claimed,
rates at equal norm among them; what goes beyond the paper is expected by us. Of several numbers that must all be so, the
worst is shown; p is their largest, or, of a contradiction, their smallest times how many there are. Intervals and p-values are
those of the t test over seeds; a slope over models has least squares' interval, rank correlations have bootstrap intervals
over settings, and tau and tau within types p-values of permutations (crate/statistics.py). p is two-sided and adjusted within
each section (Holm), what goes beyond the paper apart from its claims; where that leaves it at 0.05 or more, the verdict is
called *unadjusted*. A number without p rests on its interval alone, which is not adjusted.
"""
NORMS = {"after": "R^c", "after_equal_norm": "R^c at equal norm"}  # what the paper measures, and what it doesn't


def verdict(low, high, side):
    """What the 95 % interval says of a number that is claimed to be > 0 (side +1) or < 0 (-1)."""
    if side < 0:
        low, high = -high, -low
    if low > ROUNDING:
        return "holds"
    return "contradicted" if high < -ROUNDING else "undecided"


def mean_interval(values, confidence=0.95):
    """The mean of one value per seed, and its t interval; NaN bounds where there are fewer than two values or all are equal."""
    values = np.asarray(values, float)
    mean = values.mean() if len(values) else math.nan
    if len(values) == 0 or np.ptp(values) <= ROUNDING * np.abs(values).max():
        return mean, math.nan, math.nan
    return mean, *ttest_1samp(values, 0).confidence_interval(confidence)


def claim(section, text, side, number, low, high, n, of, *, p_value=math.nan, note=""):
    """A row of the claims table. side: +1, -1, or 0 for a finding; n, of: how many seeds or models; note: beside the number."""
    if not high > low:
        low = high = math.nan
    row = {"section": section, "claim": text, "note": note, "claimed": {1: "> 0", -1: "< 0", 0: ""}[side], "number": number}
    row |= {"low": low, "high": high, "n": n, "of": of, "p_value": p_value if side else math.nan}
    return row | {"verdict": verdict(low, high, side) if side else "finding"}


def over_seeds(section, text, side, values, *, margin=None, note=""):
    """The row of a claim about the mean of `values`, a Series with one per seed. margin: (size, unit) of what is no effect."""
    values = values.dropna().to_numpy(float)
    number, low, high = mean_interval(values)
    p_value = ttest_1samp(values, 0).pvalue if math.isfinite(low) else math.nan
    row = claim(section, text, side, number, low, high, len(values), "seeds", p_value=p_value, note=note)
    if margin and row["verdict"] == "undecided":
        _, low, high = mean_interval(values, 0.90)
        if -margin[0] < low and high < margin[0]:
            row["verdict"] = "no effect (within {:g} {})".format(*margin)
    return row


def worst(rows, side):
    """What decides a claim about several numbers: the row with the worst verdict, of such that with the worst number.

    Its p is about all: the largest where they hold; where some contradict, their smallest times the number of all, since one
    of many soon does so by chance.
    """
    verdicts = ("contradicted", "undecided", "holds", "finding")
    row = min(rows, key=lambda row: (verdicts.index(row["verdict"]), side * row["number"]))
    p_values = np.array([other["p_value"] for other in rows if other["verdict"] == row["verdict"]])
    contradicted = row["verdict"] == "contradicted"
    return row | {"p_value": np.minimum(1, p_values.min() * len(rows)) if contradicted else p_values.max()}


def attention_claims(rates):
    """Section 4.1, from the rates.csv of the attention-only experiment."""
    rows = []
    for norm, rate in NORMS.items():
        changes = rates.assign(change=rates[norm] - rates["before"]).dropna(subset="change")
        for step, does, side, where, rule, number in (
            ("The exact gradient step (Eq. 6)", "lowers", -1, "at every layer: its largest change", "exact", "max"),
            ("The expansion's step (Eq. 7)", "raises", +1, "at layer 1", "expansion", "first"),
            ("The expansion's second-order term", "raises", +1, "at layer 1", "second-order", "first"),
            ("CRATE-C's attention (Eq. 8)", "raises", +1, "at every layer: its smallest change", "softmax", "min"),
        ):
            of_rule = changes[changes["rule"] == rule].sort_values("layer").groupby("seed")["change"].agg(number)
            does, side = (does, side) if norm == "after" else ("changes", 0)
            rows.append(over_seeds("4.1", f"{step} {does} {rate} {where}", side, of_rule))
    return rows


def initial_claims(layers, note):
    """Section 4.3 at initialisation, from rows {seed, layer, srr} of the main types, over which the mean is taken."""
    curves = layers.groupby(["seed", "layer"])["srr"].mean().unstack()  # (seeds, layers)
    depth = max(curves)
    first, turn, last = curves[1], curves[max(1, 3 * depth // 4)], curves[depth]
    return [
        over_seeds("4.3", f"At initialisation SRR {text}", side, values, note=note)
        for text, side, values in (
            ("falls over the first three quarters of the layers (9 of 12): change", -1, turn - first),
            ("rises over the last quarter of the layers: change", +1, last - turn),
            ("is optimised by the layers: change from the first to the last", -1, last - first),
            ("turns at about layer 9 of 12: its lowest layer", 0, curves.idxmin(axis=1)),
        )
    ]


def course_claims(layers, which):
    """Section 4.3 along training, from rows {model, seed, epoch, layer, srr}: SRR rises from any logged epoch to the next."""
    rows = []
    for model in MAIN:
        own, but = layers[layers["model"] == model], ""
        if model == "crate-c":  # the paper excepts its last few layers
            own, but = own[own["layer"] <= 3 * own["layer"].max() / 4], " but the last quarter"
        curves = own.pivot(index=["layer", "epoch"], columns="seed", values="srr").sort_index()
        steps = curves.groupby("layer").diff().dropna(how="all")  # a row per layer and step, a column per seed
        text = f"Training raises SRR at every layer{but}, from each logged epoch to the next, {model}{which}: worst step"
        if len(steps):
            note = f"{(steps > 0).sum().sum() / steps.count().sum():.0%} of {steps.count().sum()} steps rise"
            rows.append(worst([over_seeds("4.3", text, +1, step, note=note) for _, step in steps.iterrows()], +1))
    return rows


def operator_changes(operators):
    """What each operator, named by the point behind it, changes in R^c, mean over layers: columns NORMS, index (model, point,
    seed). operators: rows {model, seed, layer, point, ..} of one epoch, the points in the order in which tokens pass them.
    """
    before = operators.groupby(["model", "seed", "layer"])["rate_subspaces"].shift()
    rates = operators[["rate_subspaces", "rate_subspaces_equal_norm"]].set_axis([*NORMS], axis=1)
    changes = operators[["model", "point", "seed"]].join(rates.sub(before, axis=0)).dropna()
    return changes.groupby(["model", "point", "seed"]).mean()


def operator_claims(changes, which):
    """What compresses in trained models (Section 4.3), from `operator_changes`."""
    rows = []
    for step, does, side, point, models in (
        ("the attention step", "raises", +1, "compressed", ("crate-c", "crate-t", "crate")),
        ("its negated step", "lowers", -1, "compressed", ("crate-n",)),
        ("ISTA with its ReLU (conjecture)", "lowers", -1, "output", MAIN),
        ("beyond the paper, its exact step", "lowers", -1, "compressed", ("crate-e",)),
    ):
        for model in models:
            own = changes.query("model == @model and point == @point")
            for norm, rate in NORMS.items():
                said, claimed = (does, side) if norm == "after" else ("changes", 0)
                text = f"Trained {model}: {step} {said} {rate}, mean over layers{which}"
                rows.append(over_seeds("4.3", text, claimed, own[norm]))
    return rows


NORM_MEASURES = [f"log_{what}_of_{norm}" for what in ("prod", "sum") for norm in ("fro", "spec")]
P_VALUES = {"tau": "p_value", "tau_within": "p_within"}
# Claims about rank correlations (Section 5): text with a place for the width, side, column of correlation.csv, measures. The
# columns rho_given_.. are those of the --controls in run_all.sh.
OF_EACH_WIDTH = [
    ("SRR correlates with the gap, {}: tau", +1, "tau", ["srr"]),
    ("SRR ranks between implementations, {}: tau", +1, "tau_between", ["srr"]),
    ("Beyond the paper, SRR ranks within an implementation, {}: tau", +1, "tau_within", ["srr"]),
    ("Beyond the paper, SRR ranks given type, width and learning rate, {}: rho", +1, "rho_given_model_width_lr", ["srr"]),
    ("SRR has the highest tau, {}: its lead over the closest rival", +1, "lead", ["srr"]),
]
OF_THE_SMALLER_WIDTH = OF_EACH_WIDTH + [
    ("SRR wins on the axis of model types, {}: its lead in psi over the closest rival", +1, "lead_psi_model", ["srr"]),
    ("Products and sums of norms all correlate negatively, {}: tau", -1, "tau", NORM_MEASURES),
    ("Path-norm correlates negatively, {}: tau", -1, "tau", ["path_norm"]),
    ("1/margin correlates positively, {}: tau", +1, "tau", ["inverse_margin"]),
    ("PAC-Bayes flatness correlates positively, {}: tau", +1, "tau", ["pacbayes_flatness"]),
]
OF_THE_LARGER_WIDTH = OF_EACH_WIDTH + [
    ("SRR is below PAC-Bayes flatness on dropout, {}: psi minus its psi", -1, "diff_srr_psi_dropout", ["pacbayes_flatness"]),
    ("SRR is below PAC-Bayes flatness on model types, {}: psi minus its psi", -1, "diff_srr_psi_model", ["pacbayes_flatness"]),
]
ACROSS_WIDTHS = [("Beyond the paper, SRR across widths: tau", 0, "tau", ["srr"])]
OF_THE_STUDY = [
    ("Beyond the paper, the study: SRR ranks within types, tau", +1, "tau_within", ["srr"]),
    ("Beyond the paper, the study: SRR ranks given steps and parameters, rho", +1, "rho_given_baseline_steps_params", ["srr"]),
    (
        "Beyond the paper, the study: SRR ranks given type, width and learning rate, rho",
        +1,
        "rho_given_model_width_lr",
        ["srr"],
    ),
]


def rank_claims(table, claims, note, width=""):
    """Section 5, from a correlation.csv. claims: one of the lists above; those whose number the table lacks are left out."""
    rows = []
    for text, side, column, measures in claims:
        own = table[table["measure"].isin(measures)].dropna(subset=column) if column in table else table[:0]
        of_measures = []
        for row in own.to_dict("records"):
            about = [note, row["measure"]] if len(measures) > 1 else [note]
            if column == "lead":
                about.append(f"rival {row['lead_rival']}, first in {row['share_first']:.0%} of resamples")
            values = row[column], row[f"{column}_low"], row[f"{column}_high"], int(row["models"]), "models"
            p_value = row[P_VALUES[column]] if column in P_VALUES else math.nan
            of_measures.append(claim("5", text.format(width), side, *values, p_value=p_value, note=", ".join(about)))
        if of_measures:
            rows.append(worst(of_measures, side))
    return rows


def slopes(runs):
    """The least-squares slope of the gap over SRR, along eta: a Series (model, seed). runs: {model, seed, srr, gap}."""
    keys = [runs["model"], runs["seed"]]
    srr, gap = (runs[name] - runs[name].groupby(keys).transform("mean") for name in ("srr", "gap"))
    return (srr * gap).groupby(keys).sum() / (srr**2).groupby(keys).sum()


def by_lever(runs):
    """{words for the layers whose SRR was in the loss ("" for the last one): their runs and those with eta = 0}."""
    plain, words = runs["srr_reg"] == 0, {"last": "", "all": ", all layers", "random": ", a random layer"}
    layers = in_depth(runs.loc[~plain, "srr_layer"].unique())
    return {words.get(layer, f", layer {layer}"): runs[plain | (runs["srr_layer"] == layer)] for layer in layers}


def intervention_claims(runs, which):
    """Does the gap follow SRR where eta alone differs? From rows {model, srr_reg, seed, srr, gap} of one lever."""
    rows, follows = [], "the gap follows SRR, its slope over SRR along eta"
    for model, own in runs.groupby("model"):
        srr = own.pivot(index="seed", columns="srr_reg", values="srr")
        text = f"Beyond the paper, intervention on {model}{which}: "
        for eta, does, side in ((max(srr), "lowers", -1), (min(srr), "raises", +1)):
            if eta * side < 0 and 0 in srr:
                rows.append(over_seeds("5", f"{text}eta = {eta:g} in the loss {does} SRR", side, srr[eta] - srr[0]))
        rows.append(over_seeds("5", text + follows, +1, slopes(own)))
    if runs["model"].nunique() > 1:
        text = f"Beyond the paper, intervention, mean over types{which}: "
        rows.append(over_seeds("5", text + follows, +1, slopes(runs).unstack("model").mean(axis=1, skipna=False)))
    return rows


def observed_slopes(models, note):
    """How the gap goes with SRR where no loss moves it: one slope for the models of all types, each with a mean of its own.

    models: rows {model, srr, gap}. Least squares of the deviations from those means, t interval; [] for too few models.
    """
    deviations = models[["srr", "gap"]] - models.groupby("model")[["srr", "gap"]].transform("mean")
    freedom = len(models) - models["model"].nunique() - 1  # a mean per type, and the slope
    if freedom < 1:
        return []
    fit = linregress(deviations["srr"], deviations["gap"])
    half = t.ppf(0.975, freedom) * fit.stderr * math.sqrt((len(models) - 2) / freedom)
    text = "Beyond the paper, observed among models of one type: the gap's slope over SRR"
    return [claim("5", text, 0, fit.slope, fit.slope - half, fit.slope + half, len(models), "models", note=note)]


def gain_claims(gains, which):
    """Does SRR in the loss help (Table 2)? gains: points of accuracy that it adds, index (model, seed), a column per eta."""
    text = "SRR of the last layer in the loss helps {}, eta = {:g}{}: points"
    return [
        over_seeds("6", text.format(model, eta, which), +1, values[model], margin=POINTS)
        for eta, values in gains.items()
        for model in MAIN
        if model in values.index
    ]


def model_claims(plain, which):
    """Section 6 on models without SRR in the loss. plain: accuracies in %, a row per seed, a column per model type."""
    plain = plain.reindex(columns=[*MAIN, "crate-fix", "crate-identity", "crate-e"])
    C, N, T, W, fix, identity, exact = (plain[model] for model in plain)
    best = "The transpose is the best fixed output matrix, T - "
    differences = {
        "CRATE-N beats CRATE-C": N - C,
        "CRATE-N falls behind CRATE-T, T - N": T - N,
        "CRATE-T is nearer to CRATE than to CRATE-C, (T - C) - (CRATE - T)": 2 * T - C - W,
        best + "C": T - C,
        best + "Fix": T - fix,
        best + "Identity": T - identity,
        "Beyond the paper, crate-e, whose step is the exact gradient, beats CRATE-C": exact - C,
    }
    return [over_seeds("6", f"{text}{which}: points", +1, values) for text, values in differences.items()]


def in_depth(layers):
    """Values of --srr-layer in order: 1, 2, .. 10, .. all, last, random."""
    return sorted(layers, key=lambda layer: (not layer.isdecimal(), layer.zfill(4)))


def layer_choice_claims(by_layer):
    """Which layer's SRR (Table 6)? by_layer: accuracies in %, index (--srr-layer, seed), a column per eta."""
    rows, fixed = [], [layer for layer in in_depth(by_layer.index.unique(0)) if layer not in ("all", "random")]
    half = len(fixed) // 2
    for eta, values in by_layer.items():
        layers, note = values.unstack(0).reindex(columns=[*fixed, "random"]), f"eta = {eta:g}"
        every, shallow, deep = (layers[part].mean(axis=1, skipna=False) for part in (fixed, fixed[:half], fixed[-half:]))
        text = "A fixed layer is better than a random one: mean over layers minus random, points"
        rows.append(over_seeds("6", text, +1, every - layers["random"], note=note))
        text = "Shallower layers gain more: first half of the layers minus second half, points"
        rows.append(over_seeds("6", text, +1, shallow - deep, note=note))
    return rows
