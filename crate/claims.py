"""Every claim of the paper, the number that decides it on our data, and a verdict by rule.

A claim is that a number is positive or negative. It *holds* where the number's whole 95 % interval is on the claimed side, is
*contradicted* where it is on the other side, and *undecided* else, also where one seed alone leaves no interval. Intervals are
t intervals over seeds, but for rank correlations, whose intervals come from resampling models (crate/statistics.py).
"""

import math

import numpy as np

MAIN = ("crate-c", "crate-n", "crate-t", "crate")  # the model types of Sections 4.3, 5 and 6
NORM_MEASURES = (
    "log_prod_of_fro", "log_sum_of_fro", "log_prod_of_spec", "log_sum_of_spec", "log_prod_of_fro_over_margin",
    "log_sum_of_fro_over_margin", "log_prod_of_spec_over_margin", "log_sum_of_spec_over_margin",
)  # fmt: skip


def verdict(low, high, side):
    """Return "holds", "contradicted" or "undecided" for the interval of a number claimed to be > 0 (side +1) or < 0 (-1)."""
    if side < 0:
        low, high = -high, -low
    return "holds" if low > 0 else "contradicted" if high < 0 else "undecided"


def deciding(rows, key, side):
    """The row that decides a claim about all rows: one whose interval of `key` contradicts it, else the closest to doing so."""
    against = [row for row in rows if verdict(row[f"{key}_low"], row[f"{key}_high"], side) == "contradicted"]
    return min(against or rows, key=lambda row: row[f"{key}_low"] if side > 0 else -row[f"{key}_high"])


def interval(values):
    """Mean of one value per seed, and its 95 % t interval; NaN bounds where there are fewer than two."""
    from scipy.stats import ttest_1samp

    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), math.nan, math.nan
    if np.ptp(values) == 0:
        return (values[0],) * 3
    bounds = ttest_1samp(values, 0).confidence_interval()
    return values.mean(), bounds.low, bounds.high


def claim(section, text, side, number, low, high, n, of="seeds"):
    """A row of the claims table."""
    row = {"section": section, "claim": text, "claimed": "> 0" if side > 0 else "< 0"}
    return row | {"number": number, "low": low, "high": high, "n": n, "of": of, "verdict": verdict(low, high, side)}


def over_seeds(section, text, side, values):
    """The claim about the mean of `values`, one per seed; no row where there are none."""
    values = list(values)
    return [claim(section, text, side, *interval(values), len(values))] if values else []


def attention_claims(rates):
    """Section 4.1, from rows {rule, seed, layer, before, after, overflow} of the attention-only experiment."""
    changes = {}  # {rule: {seed: change of R^c by layer}}
    for row in rates:
        if not row["overflow"]:
            changes.setdefault(row["rule"], {}).setdefault(row["seed"], []).append(row["after"] - row["before"])

    def row(text, side, rule, of_layers):
        return over_seeds("4.1", text, side, map(of_layers, changes.get(rule, {}).values()))

    return [
        *row("The exact gradient step (Eq. 6) lowers R^c at every layer: its largest change", -1, "exact", max),
        *row("The second-order expansion's step (Eq. 7) raises R^c: change at layer 1", +1, "expansion", lambda c: c[0]),
        *row("CRATE-C's attention (Eq. 8) raises R^c at every layer: its smallest change", +1, "softmax", min),
    ]


def layer_claims(layers):
    """Section 4.3, from rows {model, seed, epoch, layer, srr} of layer-wise SRR on training images."""
    curves = {}  # {seed: {model: {epoch: [SRR by layer]}}}
    for row in sorted(layers, key=lambda row: row["layer"]):
        by_epoch = curves.setdefault(row["seed"], {}).setdefault(row["model"], {})
        by_epoch.setdefault(row["epoch"], []).append(row["srr"])

    def means(number, models=MAIN):  # over the model types, one per seed
        chosen = [[number(by_model[m]) for m in models if m in by_model] for by_model in curves.values()]
        return [np.mean(values) for values in chosen if values]

    def turn(curve):  # the paper's layer 9 of 12
        return 3 * len(curve) // 4 - 1

    rows = over_seeds(
        "4.3", "At initialisation SRR falls over the first three quarters of the layers: its change", -1,
        means(lambda epochs: epochs[0][turn(epochs[0])] - epochs[0][0]),
    )  # fmt: skip
    rows += over_seeds(
        "4.3", "... and rises after them: its change", +1, means(lambda epochs: epochs[0][-1] - epochs[0][turn(epochs[0])])
    )
    for model in MAIN:
        rows += over_seeds(
            "4.3", f"Training raises SRR at every layer, {model}: the smallest change over layers", +1,
            means(lambda epochs: min(np.subtract(epochs[max(epochs)], epochs[0])), [model]),
        )  # fmt: skip
    return rows


def operator_claims(operators):
    """What compresses, from rows {model, seed, epoch, layer, point, rate_subspaces} at the last epoch (operator_rates)."""
    last = max((row["epoch"] for row in operators), default=0)
    rates = {}  # {model: {seed: {point: [R^c by layer]}}}
    for row in operators:
        if row["epoch"] == last:
            by_point = rates.setdefault(row["model"], {}).setdefault(row["seed"], {})
            by_point.setdefault(row["point"], []).append(row["rate_subspaces"])

    def change(text, side, first, second, models):
        rows = []
        for model in models:
            values = [
                np.mean(np.subtract(by[second], by[first]))
                for by in rates.get(model, {}).values()
                if first in by and second in by
            ]
            rows += over_seeds("4.3", text.format(model), side, values)
        return rows

    return [
        *change(
            "Trained {}: the attention step raises R^c, mean over layers",
            +1,
            "input",
            "compressed",
            ["crate-c", "crate-t", "crate"],
        ),
        *change("Trained {}: its negated step lowers R^c, mean over layers", -1, "input", "compressed", ["crate-n"]),
        *change("Trained {}: ISTA with its ReLU lowers R^c (conjecture), mean over layers", -1, "normalised", "output", MAIN),
        *change(
            "Trained {}, beyond the paper: its exact step lowers R^c, mean over layers", -1, "input", "compressed", ["crate-e"]
        ),
    ]


def correlation_claims(rows, which, first):
    """Section 5, from the rows of one correlation.csv, as numbers. `first`: the smaller width, the paper's Table 1."""
    by_name = {row["measure"]: row for row in rows}
    if "srr" not in by_name:
        return []
    others = [
        row for name, row in by_name.items() if not name.startswith("srr") and math.isfinite(row.get("diff_srr", math.nan))
    ]
    models, claims = by_name["srr"]["models"], []

    def add(text, side, number, low, high):
        claims.append(claim("5", f"{text}, {which}", side, number, low, high, int(models), "models"))

    def tau(text, side, names):
        own = [by_name[name] for name in names if name in by_name and math.isfinite(by_name[name]["tau"])]
        if own:
            row = deciding(own, "tau", side)
            add(f"{text}: tau" + f" of {row['measure']}" * (len(names) > 1), side, row["tau"], row["tau_low"], row["tau_high"])

    def srr_minus(text, side, row, key):
        add(text, side, row[key], row[f"{key}_low"], row[f"{key}_high"])

    tau("SRR correlates with the gap", +1, ["srr"])
    if others:
        rival = deciding(others, "diff_srr", +1)
        srr_minus(f"SRR has the highest tau: tau minus that of its closest rival, {rival['measure']}", +1, rival, "diff_srr")
    if first:
        contested = [row for row in others if math.isfinite(row.get("diff_srr_psi_model", math.nan))]
        if contested:
            rival = deciding(contested, "diff_srr_psi_model", +1)
            text = f"SRR wins on the model-type axis: psi minus that of its closest rival, {rival['measure']}"
            srr_minus(text, +1, rival, "diff_srr_psi_model")
        tau("Products and sums of norms all correlate negatively", -1, NORM_MEASURES)
        tau("Path-norm correlates negatively", -1, ["path_norm"])
        tau("1/margin correlates positively", +1, ["inverse_margin"])
        tau("PAC-Bayes flatness correlates positively", +1, ["pacbayes_flatness"])
    elif math.isfinite(by_name.get("pacbayes_flatness", {}).get("diff_srr_psi_model", math.nan)):
        for axis in ("dropout", "model"):
            text = f"SRR is below PAC-Bayes flatness on the {axis} axis: difference of psi"
            srr_minus(text, -1, by_name["pacbayes_flatness"], f"diff_srr_psi_{axis}")
    return claims


def regularisation_claims(accuracy):
    """Section 6. accuracy(model, layer=None, among_layers=False) -> {seed: validation accuracy in %}.

    Without SRR where `layer` is None, else with it on that layer, at the eta chosen for the model or that of Table 6.
    """

    def difference(*terms):  # (factor, {seed: accuracy}): the sum, for the seeds that all have
        seeds = set.intersection(*(set(values) for _, values in terms))
        return [sum(factor * values[seed] for factor, values in terms) for seed in sorted(seeds)]

    def mean_of(by_layer, factor):
        return [(factor / len(by_layer), values) for values in by_layer]

    plain, rows = {model: accuracy(model) for model in MAIN}, []
    for model in MAIN:
        gain = difference((1, accuracy(model, "last")), (-1, plain[model]))
        rows += over_seeds("6", f"SRR of the last layer in the loss helps {model}: gain in points", +1, gain)
    better = difference((1, plain["crate-n"]), (-1, plain["crate-c"]))
    rows += over_seeds("6", "CRATE-N beats CRATE-C: difference in points", +1, better)
    nearer = difference((2, plain["crate-t"]), (-1, plain["crate-c"]), (-1, plain["crate"]))
    rows += over_seeds("6", "CRATE-T is nearer to CRATE than to CRATE-C: (T - C) - (CRATE - T) in points", +1, nearer)

    better = difference((1, accuracy("crate-e")), (-1, plain["crate-c"]))
    rows += over_seeds("6", "crate-e, beyond the paper, whose step is the exact gradient, beats CRATE-C: in points", +1, better)

    choices = [accuracy("crate-c", layer, among_layers=True) for layer in [*map(str, range(1, 100)), "last"]]
    fixed, random = [values for values in choices if values], accuracy("crate-c", "random", among_layers=True)
    if len(fixed) > 1 and random:
        better = difference(*mean_of(fixed, 1), (-1, random))
        rows += over_seeds("6", "A fixed layer is better than a random one: mean over layers minus random", +1, better)
        half = len(fixed) // 2
        better = difference(*mean_of(fixed[:half], 1), *mean_of(fixed[half:], -1))
        rows += over_seeds("6", "Shallower layers gain more: first half of the layers minus second half", +1, better)
    return rows
