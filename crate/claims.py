"""Every claim of the paper, the number that decides it on our data, and a verdict by rule.

A claim is that a number is positive or negative. It *holds* where the number's whole 95 % interval is on the claimed side, is
*contradicted* where it is on the other side, and *undecided* else, also where one seed alone leaves no interval. Intervals are
t intervals over seeds, but for rank correlations, whose intervals come from resampling models (crate/statistics.py).
"""

import math

import numpy as np

MAIN = ("crate-c", "crate-n", "crate-t", "crate")  # the model types of Sections 4.3, 5 and 6


def verdict(low, high, side):
    """Return "holds", "contradicted" or "undecided" for the interval of a number claimed to be > 0 (side +1) or < 0 (-1)."""
    if side < 0:
        low, high = -high, -low
    return "holds" if low > 0 else "contradicted" if high < 0 else "undecided"


def mean_interval(values):
    """Mean of one value per seed, and its 95 % t interval; NaN bounds where there are fewer than two."""
    from scipy.stats import ttest_1samp

    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), math.nan, math.nan
    if np.ptp(values) == 0:
        return (values[0],) * 3
    bounds = ttest_1samp(values, 0).confidence_interval()
    return values.mean(), bounds.low, bounds.high


def nested(rows, *columns):
    """{value of the first column: {of the second: .. [values of the last column, in the order of the rows]}}."""
    *outer, inner, last = columns
    result = {}
    for row in rows:
        level = result
        for column in outer:
            level = level.setdefault(row[column], {})
        level.setdefault(row[inner], []).append(row[last])
    return result


def claim(section, text, side, number, low, high, n, of, measure=""):
    """A row of the claims table. measure: the one that decides, where the claim is about several."""
    row = {"section": section, "claim": text, "measure": measure, "claimed": "> 0" if side > 0 else "< 0"}
    return row | {"number": number, "low": low, "high": high, "n": n, "of": of, "verdict": verdict(low, high, side)}


def over_seeds(section, claims):
    """The rows of claims about means. claims: (text, side, [a value per seed]); one without values is left out."""
    return [claim(section, text, side, *mean_interval(values), len(values), "seeds") for text, side, values in claims if values]


def attention_claims(rates):
    """Section 4.1, from rows {rule, seed, layer, before, after, overflow} of the attention-only experiment."""
    finite = [row | {"change": row["after"] - row["before"]} for row in rates if not row["overflow"]]
    changes = nested(finite, "rule", "seed", "change")  # of R^c, [by layer]

    def by_seed(number, rule):
        return [number(by_layer) for by_layer in changes.get(rule, {}).values()]

    first = by_seed(lambda by_layer: by_layer[0], "expansion")
    return over_seeds("4.1", [
        ("The exact gradient step (Eq. 6) lowers R^c at every layer: its largest change", -1, by_seed(max, "exact")),
        ("The second-order expansion's step (Eq. 7) raises R^c: change at layer 1", +1, first),
        ("CRATE-C's attention (Eq. 8) raises R^c at every layer: its smallest change", +1, by_seed(min, "softmax")),
    ])  # fmt: skip


def layer_claims(layers):
    """Section 4.3, from rows {model, seed, epoch, layer, srr} of layer-wise SRR on training images."""
    curves = nested(sorted(layers, key=lambda row: row["layer"]), "seed", "model", "epoch", "srr")  # [by layer]

    def means(number, models=MAIN):  # over the model types, one per seed
        chosen = [[number(by_model[m]) for m in models if m in by_model] for by_model in curves.values()]
        return [np.mean(values) for values in chosen if values]

    def turn(curve):  # the paper's layer 9 of 12
        return curve[3 * len(curve) // 4 - 1]

    def smallest_change(epochs):
        return min(np.subtract(epochs[max(epochs)], epochs[0]))

    falls = means(lambda epochs: turn(epochs[0]) - epochs[0][0])
    rises = means(lambda epochs: epochs[0][-1] - turn(epochs[0]))
    return over_seeds("4.3", [
        ("At initialisation SRR falls over the first three quarters of the layers: its change", -1, falls),
        ("At initialisation SRR rises over the last quarter of the layers: its change", +1, rises),
        *((f"Training raises SRR at every layer, {model}: the smallest change over layers", +1, means(smallest_change, [model]))
          for model in MAIN),
    ])  # fmt: skip


def operator_claims(operators):
    """What compresses, from rows {model, seed, epoch, layer, point, rate_subspaces} at the last epoch (operator_rates)."""
    last = max((row["epoch"] for row in operators), default=0)
    trained = [row for row in operators if row["epoch"] == last]
    rates = nested(trained, "model", "seed", "point", "rate_subspaces")  # [by layer]
    attention, ista = ("input", "compressed"), ("normalised", "output")

    def change(model, before, after):
        return [np.mean(np.subtract(points[after], points[before])) for points in rates.get(model, {}).values()]

    return over_seeds("4.3", [
        (f"Trained {model}{text}, mean over layers", side, change(model, *step))
        for text, side, step, models in (
            (": the attention step raises R^c", +1, attention, ("crate-c", "crate-t", "crate")),
            (": its negated step lowers R^c", -1, attention, ("crate-n",)),
            (": ISTA with its ReLU lowers R^c (conjecture)", -1, ista, MAIN),
            (", beyond the paper: its exact step lowers R^c", -1, attention, ("crate-e",)),
        )
        for model in models
    ])  # fmt: skip


def deciding(rows, key, side):
    """The row that decides a claim about all rows: of those with the worst verdict on `key`, the one with the worst number."""

    def rank(row):
        of_row = verdict(row[f"{key}_low"], row[f"{key}_high"], side)
        return ("contradicted", "undecided", "holds").index(of_row), side * row[key]

    return min(rows, key=rank)


def correlation_claims(rows, which, first):
    """Section 5, from the rows of one correlation.csv, as numbers. `first`: the smaller width, the paper's Table 1."""
    by_name = {row["measure"]: row for row in rows}
    if "srr" not in by_name:
        return []
    rivals = [name for name in by_name if not name.startswith("srr")]
    norms = [f"log_{what}_of_{norm}" for what in ("prod", "sum") for norm in ("fro", "spec")]
    claims = [  # text; side; number; measures that the claim is about
        ("SRR correlates with the gap: tau", +1, "tau", ["srr"]),
        ("SRR has the highest tau: tau minus that of its closest rival", +1, "diff_srr", rivals),
    ]
    if first:
        claims += [
            ("SRR wins on the model-type axis: psi minus that of its closest rival", +1, "diff_srr_psi_model", rivals),
            ("Products and sums of norms all correlate negatively: tau", -1, "tau", norms),
            ("Path-norm correlates negatively: tau", -1, "tau", ["path_norm"]),
            ("1/margin correlates positively: tau", +1, "tau", ["inverse_margin"]),
            ("PAC-Bayes flatness correlates positively: tau", +1, "tau", ["pacbayes_flatness"]),
        ]
    else:
        below = "SRR is below PAC-Bayes flatness on the {} axis: difference of psi"
        claims += [(below.format(axis), -1, f"diff_srr_psi_{axis}", ["pacbayes_flatness"]) for axis in ("dropout", "model")]
    table = []
    for text, side, key, names in claims:
        own = [by_name[name] for name in names if name in by_name and math.isfinite(by_name[name].get(key, math.nan))]
        if own:
            row, models = deciding(own, key, side), int(by_name["srr"]["models"])
            values = row[key], row[f"{key}_low"], row[f"{key}_high"], models, "models"
            table.append(claim("5", f"{text}, {which}", side, *values, row["measure"] if len(names) > 1 else ""))
    return table


def regularisation_claims(accuracy):
    """Section 6. accuracy(model, layer=None, among_layers=False) -> {seed: validation accuracy in %}.

    Without SRR where `layer` is None, else with it on that layer, at the eta chosen for the model or that of Table 6.
    """

    C, N, T, learned, exact = (accuracy(model) for model in (*MAIN, "crate-e"))
    claims = {  # {text: terms (factor, {seed: accuracy}), whose sum is claimed to be positive}
        f"SRR of the last layer in the loss helps {model}: gain in points": [(1, accuracy(model, "last")), (-1, plain)]
        for model, plain in zip(MAIN, (C, N, T, learned))
    } | {
        "CRATE-N beats CRATE-C: difference in points": [(1, N), (-1, C)],
        "CRATE-T is nearer to CRATE than to CRATE-C: (T - C) - (CRATE - T) in points": [(2, T), (-1, C), (-1, learned)],
        "crate-e, beyond the paper, whose step is the exact gradient, beats CRATE-C: in points": [(1, exact), (-1, C)],
    }  # fmt: skip
    layers = (accuracy("crate-c", layer, among_layers=True) for layer in [*map(str, range(1, 100)), "last"])
    fixed, random = [values for values in layers if values], accuracy("crate-c", "random", among_layers=True)

    def mean(choices, sign=1):
        return [(sign / len(choices), values) for values in choices]

    if len(fixed) > 1 and random:
        claims["A fixed layer is better than a random one: mean over layers minus random"] = [*mean(fixed), (-1, random)]
        shallow, deep = mean(fixed[: len(fixed) // 2]), mean(fixed[len(fixed) // 2 :], -1)
        claims["Shallower layers gain more: first half of the layers minus second half"] = shallow + deep

    def by_seed(terms):
        seeds = set.intersection(*(set(values) for _, values in terms))
        return [sum(factor * values[seed] for factor, values in terms) for seed in sorted(seeds)]

    return over_seeds("6", [(text, +1, by_seed(terms)) for text, terms in claims.items()])
