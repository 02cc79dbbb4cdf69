"""The tables of the report, as Markdown, out of the rows of runs.csv (dicts of text, a row per finished run).

Compared are the runs at their preset's own settings, but for VARIED, at the strengths that held-out training images chose.
A table without lines is an empty list.
"""

import numpy as np

from crate.claims import mean_interval
from crate.config import DATASETS, DEFAULTS, PRESETS, VARIANT_TABLE
from crate.files import markdown_table

VARIED = ("srr_reg", "srr_layer", "srr_sparsity", "weight_decay", "dropout", "hold_out", "depth")  # by the tables' comparisons


def settings_of(row):
    """{column of runs.csv: what it says for a run with the settings of the row's preset and data set}."""
    settings = DEFAULTS | PRESETS[row["preset"]] | {"dataset": row["dataset"]}
    settings |= {"max_epochs": settings.pop("epochs"), "image_size": settings["image_size"] or DATASETS[row["dataset"]][0]}
    return {key: "" if value is None else str(value) for key, value in settings.items()}


def at_preset(rows, varied=VARIED, **changes):
    """The runs of fixed length at their preset's own settings but for `changes`, with any model, seed and value of `varied`."""
    free = {"model", "seed", "log_srr_every", *varied} - changes.keys()

    def matches(row):
        settings = settings_of(row) | changes
        return all(row[key] == settings[key] for key in settings.keys() - free)

    return [row for row in rows if matches(row)]


def accuracies(rows, model, **changes):
    """{seed: validation accuracy in %} of a model's runs that differ from their preset's settings in `changes` alone."""
    return {row["seed"]: 100 * float(row["val_accuracy"]) for row in at_preset(rows, (), model=model, **changes)}


def values_of(rows, axis):
    """The values of a column of numbers that occur, as text, in order."""
    return sorted({row[axis] for row in rows}, key=float)


def held_out(rows, model, axis, value):
    """{seed: accuracy in % on held-out training images} with `value` of `axis`."""
    shares = [share for share in values_of(rows, "hold_out") if float(share)]
    return {seed: a for h in shares for seed, a in accuracies(rows, model, hold_out=h, **{axis: value}).items()}


def chosen(rows, model, axis):
    """The value of `axis` (srr_reg, weight_decay or dropout) above 0 with the best mean accuracy on held-out training images.

    As text, the smallest of the best; the paper's 0.001 for srr_reg, and None for the others, where nothing was held out.
    """
    held = {value: list(held_out(rows, model, axis, value).values()) for value in values_of(rows, axis) if float(value)}
    means = {value: np.mean(accuracy) for value, accuracy in held.items() if accuracy}
    return max(means, key=means.get) if means else "0.001" if axis == "srr_reg" else None


def eta_of_layers(rows, model):
    """The eta at which most layers have been regularised, as text: the one that Table 6 compares them at."""

    def layers(eta):
        return {row["srr_layer"] for row in rows if (row["model"], row["srr_reg"]) == (model, eta)}

    return max(values_of(rows, "srr_reg"), key=lambda eta: (float(eta) > 0, len(layers(eta))))


def names(rows):
    """The model types that occur, in the order of the table of variants."""
    return [name for name in VARIANT_TABLE if any(row["model"] == name for row in rows)]


def spread(values):
    """Mean and standard deviation over seeds, as text."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.2f} (n = 1)" if values else "-"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (n = {len(values)})"


def paired(with_srr, without):
    """Mean difference over the seeds that both have, with its 95 % t interval, as text."""
    seeds = sorted(with_srr.keys() & without.keys())
    if not seeds:
        return "-"
    mean, low, high = mean_interval([with_srr[seed] - without[seed] for seed in seeds])
    return f"{mean:+.2f}" + f" [{low:+.2f}, {high:+.2f}]" * bool(low < high)


def claim_cells(row):
    """What a claims table says of a row of claims.csv: its number and interval, rounded, with the measure that decides."""
    bounds = f"[{row['low']:+.3g}, {row['high']:+.3g}]" if np.isfinite(row["low"]) else "-"
    return [f"{row['number']:+.3g}" + f" ({row['measure']})" * bool(row["measure"]), bounds]


def claims_table(rows):
    """The rows of claims.csv."""
    lines = [
        [row["section"], row["claim"], row["claimed"], *claim_cells(row), f"{row['n']} {row['of']}", f"**{row['verdict']}**"]
        for row in rows
    ]
    header = ("section", "claim: the number that decides it", "claimed", "number", "95 % interval", "n", "verdict")
    return lines and markdown_table(header, lines)


def claims_side_by_side(of_data):
    """The rows of claims.csv of several data sets, {data set: rows}: first what any contradicts, then what they disagree on."""
    by_claim = {}
    for data, rows in of_data.items():
        for row in rows:
            by_claim.setdefault((row["section"], row["claim"], row["claimed"]), {})[data] = row

    def rank(item):
        verdicts = {row["verdict"] for row in item[1].values()}
        return "contradicted" not in verdicts, len(verdicts) == 1, "holds" in verdicts

    def cell(row):
        return " ".join([*claim_cells(row), f"**{row['verdict']}**"]) if row else "-"

    lines = [[*claim, *(cell(rows.get(data)) for data in of_data)] for claim, rows in sorted(by_claim.items(), key=rank)]
    return markdown_table(("section", "claim: the number that decides it", "claimed", *of_data), lines)


def attention_table(rows):
    """R^c around the steps of each update rule, mean ± standard deviation over seeds (Figs. 1, 5)."""
    from crate.compression import RULES

    lines = []
    for rule, (title, _) in RULES.items():
        own = [row for row in rows if row["rule"] == rule]
        finite = [row for row in own if not row["overflow"]]
        first = [row for row in finite if row["layer"] == 1]
        last = {row["seed"]: row for row in finite}.values()  # in the order of layers: the last one stays
        rates = [spread(row[when] for row in part) for part, when in ((first, "before"), (first, "after"), (last, "after"))]
        rises = sum(row["after"] > row["before"] for row in finite)
        overflow = min((row["layer"] for row in own if row["overflow"]), default="never")
        lines.append([title, *rates, f"{rises} of {len(finite)}", overflow])
    columns = ("R^c before layer 1", "after layer 1", "after its last layer", "steps that raise R^c", "overflow at layer")
    return markdown_table(("update", *columns), lines)


def table_2(rows):
    """Cross-entropy against cross-entropy + SRR on the last layer, validation accuracy by model type (Table 2)."""
    lines = []
    for model in names(rows):
        eta = chosen(rows, model, "srr_reg")
        plain, with_srr = accuracies(rows, model), accuracies(rows, model, srr_reg=eta)
        if plain and with_srr:
            lines.append([model, eta, spread(plain.values()), spread(with_srr.values()), paired(with_srr, plain)])
    header = ("model", "eta", "cross-entropy", "cross-entropy + SRR", "difference, 95 % interval")
    return lines and markdown_table(header, lines)


def table_choices(rows):
    """Every eta: accuracy on held-out training images, which chooses, and on validation images."""
    lines = []
    for model in names(rows):
        plain, best = accuracies(rows, model), chosen(rows, model, "srr_reg")
        for eta in values_of(rows, "srr_reg"):
            held, full = held_out(rows, model, "srr_reg", eta), accuracies(rows, model, srr_reg=eta)
            if held and full:
                difference = paired(full, plain) if float(eta) else ""
                choice = f"**{eta}**" if eta == best else eta
                lines.append([model, choice, spread(held.values()), spread(full.values()), difference])
    header = ("model", "eta", "held-out images", "validation images", "difference to 0, 95 % interval")
    return lines and markdown_table(header, lines)


def table_regularisers(rows):
    """SRR beside what people already have, each at the strength chosen on held-out training images."""
    lines = []
    for model in names(rows):
        plain = accuracies(rows, model)
        best = {axis: chosen(rows, model, axis) for axis in ("srr_reg", "weight_decay", "dropout")}
        if all(best.values()):
            cells = [f"{value}: {paired(accuracies(rows, model, **{axis: value}), plain)}" for axis, value in best.items()]
            lines.append([model, spread(plain.values()), *cells])
    header = ("model", "none", "SRR, eta: difference", "weight decay: difference", "dropout: difference")
    return lines and markdown_table(header, lines)


def table_3(rows):
    """Output matrices, and models beyond the paper: parameters and validation accuracy without SRR in the loss (Table 3)."""
    lines = []
    for model in names(rows):
        own = at_preset(rows, (), model=model)
        if own:
            description = VARIANT_TABLE[model][-1].split(": ", 1)[1]
            parameters = int(own[0]["parameters"])
            lines.append([model, description, f"{parameters:,}", spread(accuracies(own, model).values())])
    return lines and markdown_table(("model", "compression step", "parameters", "validation accuracy"), lines)


def table_4(rows):
    """The grid of Section 5 and how its runs ended (Table 4)."""
    lines = [["model", ", ".join(names(rows))]]
    for axis in ("batch_size", "lr", "width", "dropout"):
        lines.append([axis.replace("_", " "), ", ".join(values_of(rows, axis))])
    missed = [row["run"] for row in rows if row["reached_target"] != "True"]
    lines += [["runs", len(rows)], ["reached the target", len(rows) - len(missed)]]
    for name, key, scale in ("epochs", "epochs", 1), ("validation accuracy, %", "val_accuracy", 100), ("gap (loss)", "gap", 1):
        values = [scale * float(row[key]) for row in rows]
        lines.append([name, f"{min(values):.4g} to {max(values):.4g}, median {np.median(values):.4g}"])
    return markdown_table(["", "values"], lines) + ("\nMissed the target: " + ", ".join(missed) + "\n" if missed else "")


def table_6(rows):
    """Which layer's SRR is in the loss, and with which norm (Table 6)."""
    lines = []
    for model in names(rows):
        plain, eta = accuracies(rows, model), eta_of_layers(rows, model)
        own = {(row["srr_layer"], row["srr_sparsity"]) for row in rows if row["model"] == model and row["srr_reg"] == eta}
        if not plain or len(own) < 2:
            continue
        lines.append([model, "none", "", "", spread(plain.values()), ""])
        for layer, norm in sorted(own, key=lambda c: (not c[0].isdecimal(), c[0].zfill(4), c[1])):
            by_seed = accuracies(rows, model, srr_reg=eta, srr_layer=layer, srr_sparsity=norm)
            if by_seed:
                lines.append([model, layer, norm, eta, spread(by_seed.values()), paired(by_seed, plain)])
    header = ("model", "layer", "norm of Z", "eta", "validation accuracy", "difference to none, 95 % interval")
    return lines and markdown_table(header, lines)


def table_matrices(measured, rows):
    """Eq. 11 of trained models; a standard transformer's with its query, key and value matrices in the place of U."""
    runs, lines = {row["run"] for row in rows}, []
    for model in names(rows):
        own = [row for row in measured if row["model"] == model and row["run"] in runs]
        if own:
            columns = ("srr", "srr_key", "srr_value")
            lines.append([model, *(spread(float(row[key]) for row in own if row.get(key)) for key in columns)])
    header = ("model", "SRR with U (in vit the query matrix)", "with the key matrix", "with the value matrix")
    return lines and markdown_table(header, lines)


def provenance_table(rows):
    """Who made the runs, with what and in which time."""
    groups = {}
    for row in rows:
        key = (f"`{row['command']}`", (row["commit"] or "unknown")[:10], row["torch"], f"{row['device']} ({row['processor']})")
        groups.setdefault(key, []).append(float(row["seconds"]))
    lines = [[*key, len(seconds), f"{sum(seconds):.0f}"] for key, seconds in groups.items()]
    return markdown_table(["command", "commit", "torch", "device", "runs", "seconds of training, summed"], lines)
