"""The claims of the paper and our own questions, the numbers that decide them on our runs, and a verdict by RULE. No torch."""

import math
import re
from collections import Counter

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

MAIN = ["crate-c", "crate-n", "crate-t", "crate"]  # the model types of Sections 4.3, 5 and 6
TYPES = [*MAIN, "crate-fix", "crate-identity", "crate-e"]  # all that a claim speaks of
NORMS = ["log_prod_of_fro", "log_sum_of_fro", "log_prod_of_spec", "log_sum_of_spec", "path_norm"]
FLATNESS = ["inverse_margin", "pacbayes_flatness"]
# Those of Tables 1 and 5, and baselines: what is shown. The other measures stand in correlation.csv.
MEASURES = ["srr", "srr_lambda_0", *NORMS, "inverse_margin", "pacbayes_init", "pacbayes_flatness", "sharpness_flatness"]
MEASURES += ["baseline_type", "baseline_lr", "baseline_steps", "baseline_other_seed"]
BEYOND = "Beyond the paper: "
BEST_ETA = 1e-3  # of the paper's search from 1e-4 to 1 (Section 6)
VERDICTS = ["contradicted", "contradicted in part", "no effect", "undecided", "holds in part", "holds"]
RULE = """A claim is that all its numbers are positive, or negative. A number *holds* where its interval is on the claimed side,
is *contradicted* where it is on the other, else *undecided*. Accuracy gains have *no effect* where all their 90 % intervals lie
within 0.5 points (two one-sided tests). Intervals over seeds are t intervals, 95 % for a row (Bonferroni, over all steps where
the worst is shown); of rank correlations 95 % each (bootstrap over models). Rows are not adjusted for each other: with nothing
to find, about {chance:.1f} of {rows} would be decided by chance, at least in part.
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
    counts = {"contradicted": (bounds[:, 1] < 0).sum(), "holds": (bounds[:, 0] > 0).sum()}
    every = len(numbers)
    verdict = [word if count == every else f"{word} in {count} of {every}" for word, count in counts.items() if count]
    shown, before = [], ""
    for name, number in numbers.items():  # what two in a row are of, "d = 96: ", is said once
        words = name[: name.find(": ") + 2] if ": " in name else ""
        shown.append(f"{name.removeprefix(words) if words == before else name} {with_interval(*number)}".strip())
        before = words
    row = {"section": section, "claim": text, "claimed": "> 0" if side > 0 else "< 0", "numbers": "; ".join(shown), "n": n}
    return [row | {"verdict": ", ".join(verdict) or "undecided"}]


def over_seeds(section, text, side, values, *, tests=None, margin=None):
    """The row of a claim about means over seeds. values: for each name a Series with a value per seed, in a dict or a DataFrame
    (levels of its columns, such as sets and types, are joined); tests: how many numbers share the 5 % (default: those of the
    row); margin: within which there is no effect, in points.
    """
    values = {name if isinstance(name, str) else ": ".join(name): own.dropna() for name, own in values.items()}
    values = {name: own for name, own in values.items() if len(own)}
    numbers = {name: mean_interval(own, 1 - 0.05 / (tests or len(values))) for name, own in values.items()}
    rows = claim(section, text, side, numbers, " or ".join(map(str, sorted({len(own) for own in values.values()}))) + " seeds")
    if margin and rows and rows[0]["verdict"] == "undecided":
        _, lows, highs = zip(*(mean_interval(own, 0.90) for own in values.values()))
        if min(lows) > -margin and max(highs) < margin:
            rows[0]["verdict"] = "no effect"
    return rows


def by_verdict(rows):
    """{heading: rows, disagreements first} of the paper's claims and of those beyond it; the heading counts verdicts."""
    parts = {}
    for what, beyond in ("The paper's", False), ("Beyond the paper,", True):
        own = [row for row in rows if row["claim"].startswith(BEYOND) == beyond]
        kinds = [VERDICTS.index(re.sub(" in .*", " in part", row["verdict"])) for row in own]
        counts = ", ".join(f"{VERDICTS[kind]} {number}" for kind, number in sorted(Counter(kinds).items()))
        if own:
            parts[f"{what} {len(own)} claims: {counts}"] = [own[i] for i in np.argsort(kinds, kind="stable")]
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


def initial_claims(layers):
    """Section 4.3 at initialisation, from rows {of, width, model, seed, layer, srr, rate_subspaces, rate}: mean of the main
    types of the smallest width.
    """
    layers = layers[layers["model"].isin(MAIN)]
    layers = layers[layers["width"] == layers["width"].min()]
    layers = layers.assign(rates=layers["rate_subspaces"] - layers["rate"])
    curves, rates = (layers.pivot_table(of, ["of", "seed"], "layer") for of in ("srr", "rates"))  # (seeds, layers)
    if curves.empty:
        return []
    depth = max(curves)
    turn = max(1, 3 * depth // 4)
    text = "At initialisation SRR falls over the first three quarters of the layers (9 of 12)"
    rows = over_seeds("4.3", text, -1, (curves[turn] - curves[1]).unstack("of"))
    text = f"{BEYOND}R^c - R, SRR without its sparsity, falls over the same layers at initialisation"
    rows += over_seeds("4.3", text, -1, (rates[turn] - rates[1]).unstack("of"))
    text = "At initialisation SRR rises over the last quarter of the layers"
    return rows + over_seeds("4.3", text, +1, (curves[depth] - curves[turn]).unstack("of"))


def course_claims(layers):
    """Section 4.3 along training, from rows {of, model, seed, epoch, layer, srr}: SRR rises from a logged epoch to the next."""
    worst, tests = {}, 0
    for (of, model), own in layers[layers["model"].isin(MAIN)].groupby(["of", "model"], sort=False):
        if model == "crate-c":  # the paper excepts its last few layers
            own = own[own["layer"] <= 3 * own["layer"].max() / 4]
        curves = own.pivot(index=["layer", "epoch"], columns="seed", values="srr").sort_index()
        steps = curves.groupby("layer").diff().dropna(how="all")  # a row per layer and step, a column per seed
        if len(steps):
            share = (steps > 0).sum().sum() / steps.count().sum()
            worst[f"{of}: {model} ({share:.0%} rise)"] = steps.loc[steps.mean(axis=1).idxmin()]
            tests += len(steps)
    text = "Training raises SRR at every layer (but CRATE-C's last quarter), epoch after logged epoch: worst step"
    return over_seeds("4.3", text, +1, worst, tests=tests)


def operator_changes(operators):
    """What attention and ISTA change R^c by in trained models, mean over layers: columns after, after_equal_norm, index
    (of, model, point, seed). operators: rows of operators.csv, `of` what they are of."""
    run = ["experiment", "run"]
    own = operators[operators["epoch"] == operators.groupby(run)["epoch"].transform("max")].query("epoch > 0")
    # The points are in the order in which tokens pass them: an operator is named by the point behind it.
    before = own.groupby([*run, "layer"])["rate_subspaces"].shift()
    own = own.assign(after=own["rate_subspaces"] - before, after_equal_norm=own["rate_subspaces_equal_norm"] - before)
    keys = ["of", "model", "point", "seed"]
    return own.dropna(subset="after").groupby(keys, sort=False)[["after", "after_equal_norm"]].mean()


def operator_claims(changes):
    """What compresses in trained models (Section 4.3). changes: see operator_changes."""
    rows = []
    for text, side, models, point, rate in (
        ("Attention raises R^c", +1, ["crate-c", "crate-t", "crate"], "compressed", "after"),
        ("CRATE-N's negated step, and crate-e's exact one, lower R^c", -1, ["crate-n", "crate-e"], "compressed", "after"),
        ("ISTA with its ReLU lowers R^c (conjecture)", -1, MAIN, "output", "after"),
        (BEYOND + "at equal norm of the tokens attention lowers R^c", -1, [*MAIN, "crate-e"], "compressed", "after_equal_norm"),
    ):
        values = changes.loc[changes.index.isin([point], level="point") & changes.index.isin(models, level="model"), rate]
        values = values.droplevel("point").unstack(["of", "model"])
        rows += over_seeds("4.3", f"{text} in trained models", side, values)
    return rows


def rank_claims(widths, others):
    """Section 5, from correlation.csv tables: {words: table} of each width; of all widths together and of random settings."""
    rows, every, smallest, larger = [], widths | others, dict([*widths.items()][:1]), dict([*widths.items()][1:])
    for text, side, column, tables, measures, gap in (
        ("SRR correlates with the gap: tau", +1, "tau", widths, ["srr"], "gap"),
        ("SRR has the highest tau: its lead over the closest rival", +1, "lead", widths, ["srr"], "gap"),
        ("SRR wins on model types: its lead in psi over the closest rival", +1, "lead_psi_model", smallest, ["srr"], "gap"),
        ("Norms and path-norm correlate negatively: tau", -1, "tau", smallest, NORMS, "gap"),
        ("1/margin and PAC-Bayes flatness correlate positively: tau", +1, "tau", smallest, FLATNESS, "gap"),
        ("SRR is not the best on dropout: its lead in psi", -1, "lead_psi_dropout", larger, ["srr"], "gap"),
        ("SRR is not the best on model types: its lead in psi", -1, "lead_psi_model", larger, ["srr"], "gap"),
        (BEYOND + "SRR correlates over all widths, and at random settings: tau", +1, "tau", others, ["srr"], "gap"),
        (BEYOND + "SRR ranks models of one type: tau", +1, "tau_same_model", every, ["srr"], "gap"),
        (BEYOND + "SRR ranks models of one type and rate: tau", +1, "tau_same_model_lr", every, ["srr"], "gap"),
        (BEYOND + "SRR correlates with the gap in accuracy: tau", +1, "tau", every, ["srr"], "gap_accuracy"),
    ):
        numbers, models = {}, {}
        for where, table in tables.items():
            for row in table[table["measure"].isin(measures) & table["gap"].eq(gap)].to_dict("records"):
                if np.isfinite(row.get(column, math.nan)):
                    numbers[where if len(measures) == 1 else f"{where}: {row['measure']}"] = interval_of(row, column)
                    models[row["models"]] = True
        rows += claim("5", text, side, numbers, " / ".join(map(str, models)) + " models")
    return rows


def slopes(runs):
    """The least-squares slope of the gap over SRR, along eta: (seeds, models). runs: {model, seed, srr, gap}."""
    keys = [runs["model"], runs["seed"]]
    srr, gap = (runs[name] - runs[name].groupby(keys).transform("mean") for name in ("srr", "gap"))
    return ((srr * gap).groupby(keys).sum() / (srr**2).groupby(keys).sum()).unstack("model")


def changes(plain, pushed):
    """What eta changes SRR and the gap by, paired by seed, in % of their type's mean without.

    plain, pushed: rows {model, seed, srr_reg, srr, gap} of eta = 0 and of others. Returns such rows.
    """
    own = pushed.merge(plain[["model", "seed", "srr", "gap"]], on=["model", "seed"], suffixes=("", "_0"))
    means = plain.groupby("model")[["srr", "gap"]].mean().loc[own["model"]]
    return own.assign(**{name: 100 * (own[name] - own[f"{name}_0"]) / means[name].to_numpy() for name in means})


@np.errstate(invalid="ignore")
def observed_slope(results):
    """The least-squares slope of the gap over SRR where no loss moves it, with a constant for each type; NaN if there is none.

    Of the main types' smallest models in the folder's tables: of random settings, or else of the grid.
    """
    for table in (results / "study_measures.csv", results / "measures.csv"):
        if table.exists():
            models = pd.read_csv(table).query("model in @MAIN and reached_target != False and width == width.min()")
            models = models.dropna(subset=["srr", "gap"])
            srr, gap = (models[name] - models.groupby("model")[name].transform("mean") for name in ("srr", "gap"))
            return srr @ gap / (srr @ srr)
    return math.nan


def accuracy_claims(points, gains):
    """Section 6. points: accuracies in % without SRR in the loss (Table 3), a Series of index (seed, of, model); gains: what it
    adds (Table 2), of index (srr_reg, seed, of, model).
    """
    gains, rows = gains[gains.index.isin(MAIN, level="model")].unstack(["srr_reg", "of", "model"]), []  # a row per seed
    gains = gains.sort_index(axis=1, level="srr_reg", sort_remaining=False)
    best = gains.columns.get_level_values("srr_reg") == BEST_ETA
    for which, own in (f"eta = {BEST_ETA:g}", gains.loc[:, best]), ("any other eta", gains.loc[:, ~best]):
        own = {f"eta = {eta:g}, {of}: {model}": values for (eta, of, model), values in own.items()}
        rows += over_seeds("6", f"SRR of the last layer in the loss helps, {which}: points", +1, own, margin=0.5)
    plain = points.unstack("model").reindex(columns=TYPES)  # a row per seed and set
    C, N, T, W, fix, identity, _ = (plain[model].unstack("of") for model in TYPES)  # (seeds, sets)
    leads = pd.concat({"to C": T - C, "to Fix": T - fix, "to Identity": T - identity}, axis=1).swaplevel(axis=1)
    for text, side, values in (
        ("CRATE-N beats CRATE-C: points", +1, N - C),
        ("CRATE-N falls behind CRATE-T: points", -1, N - T),
        ("CRATE-T is nearer to CRATE than to CRATE-C: (T - C) - (CRATE - T)", +1, 2 * T - C - W),
        ("The transpose is the best fixed output matrix: its lead in points", +1, leads.sort_index(axis=1)),
    ):
        rows += over_seeds("6", text, side, values)
    return rows


def layer_choice_claims(points):
    """Which layer's SRR (Table 6)? points: accuracies in %, a Series of index (seed, srr_layer)."""
    by_layer = points.unstack("srr_layer")
    fixed = by_layer.drop(columns=["all", "random"], errors="ignore").mean(axis=1, skipna=False)
    gain = fixed - by_layer.get("random", math.nan)
    return over_seeds("6", "A fixed layer's SRR is better than a random one's: points", +1, {"": gain})
