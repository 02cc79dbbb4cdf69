"""Tables and figures out of run folders: `python -m crate.report --runs runs/laptop --results results/digits`.

First the run folders become tables, runs.csv, layers.csv and operators.csv; then everything in --results, and nothing else,
becomes REPORT.md and figures/. Without --runs the second half alone is done, so a report can be rebuilt from committed tables.
"""

import json
import os
from pathlib import Path

import numpy as np

from crate import claims
from crate.cli import InputError, Parser, output_folder, run
from crate.config import DATASETS, DEFAULTS, PRESETS, VARIANT_TABLE
from crate.files import markdown_table, read_csv, write_csv, write_text
from crate.runs import finished_run

COLUMNS = (*DEFAULTS, "preset", "device", "amp", "parameters", "commit", "command")
VARIED = ("srr_reg", "srr_layer", "srr_sparsity", "weight_decay", "dropout", "hold_out", "depth")  # by the tables' comparisons
RESULTS = (
    "reached_target", "epochs", "steps", "train_loss", "train_accuracy",
    "val_loss", "val_accuracy", "gap", "gap_accuracy", "seconds",
)  # fmt: skip


CLAIMS_TEXT = """A claim *holds* where the whole 95 % interval of its number is on the claimed side, is *contradicted* where it
is on the other side, and is *undecided* else (crate/claims.py). Intervals are t intervals over seeds; those of rank
correlations are bootstraps.
"""
HELD_OUT_TEXT = """Bold: chosen by mean accuracy on training images that were held out; validation images play no part in it.
"""


def collect(runs, results):
    """Write runs.csv (a row per finished run), layers.csv (layer-wise SRR by epoch) and operators.csv from the run folders."""
    rows, layers, operators = [], [], []
    for path in sorted(Path(runs).glob("*/result.json")):
        config, result = finished_run(path.parent)
        row = {"run": path.parent.name} | {key: config.get(key, "") for key in COLUMNS}
        row["max_epochs"] = row.pop("epochs")
        row |= {key: result[key] for key in RESULTS} | {"torch": config["versions"]["torch"]}
        row["processor"] = f"{config['versions']['processor']}, {config['versions']['cores']} cores"
        rows.append(row)
        for line in path.with_name("log.jsonl").read_text().splitlines():
            epoch = json.loads(line)
            where = {"run": path.parent.name, "epoch": epoch["epoch"]}
            for images, key in (("train", "srr"), ("val", "srr_val")):
                layers += [where | {"images": images, "layer": l, **parts} for l, parts in enumerate(epoch.get(key, []), 1)]
            for l, points in enumerate(epoch.get("operators", []), 1):
                operators += [where | {"layer": l, "point": point, **parts} for point, parts in points.items()]
    if not rows:
        raise InputError(f"--runs {runs}: no finished run there; train first")
    write_csv(Path(results) / "runs.csv", rows)
    for name, table in (("layers", layers), ("operators", operators)):
        if table:
            write_csv(Path(results) / f"{name}.csv", table)


def settings_of(preset):
    """{column of runs.csv: what it says for a run with the preset's own settings}."""
    settings = DEFAULTS | PRESETS[preset]
    settings |= {"max_epochs": settings.pop("epochs"), "image_size": settings["image_size"] or DATASETS[settings["dataset"]][0]}
    return {key: "" if value is None else str(value) for key, value in settings.items()}


def at_preset(rows):
    """The runs of fixed length at their preset's own settings, but for VARIED: what Tables 2, 3, 6 and Fig. 2 compare."""

    def matches(row):
        settings = settings_of(row["preset"]) | {"image_size": str(DATASETS[row["dataset"]][0])}
        return all(
            settings[key] == row[key] for key in settings.keys() - {"dataset", "model", "seed", "log_srr_every", *VARIED}
        )

    return [row for row in rows if matches(row)]


def accuracies(rows, model, **changes):
    """{seed: validation accuracy in %} of a model's runs that differ from their preset's settings in `changes` alone."""

    def matches(row):
        settings = settings_of(row["preset"]) | {"model": model} | changes
        return all(row[key] == settings[key] for key in ("model", *VARIED))

    return {row["seed"]: 100 * float(row["val_accuracy"]) for row in rows if matches(row)}


def values_of(rows, axis):
    """The values of a column of numbers that occur, as text, in order."""
    return sorted({row[axis] for row in rows}, key=float)


def held_out(rows, model, axis, value):
    """{seed: accuracy in % on held-out training images} with `value` of `axis`."""
    shares = [share for share in values_of(rows, "hold_out") if float(share)]
    return {seed: a for h in shares for seed, a in accuracies(rows, model, hold_out=h, **{axis: value}).items()}


def chosen(rows, model, axis):
    """The value of `axis` (srr_reg, weight_decay or dropout) with the best mean accuracy on held-out training images, as text.

    The smallest of the best; the paper's 0.001 for srr_reg, and None for the others, where nothing was held out.
    """
    held = {v: list(held_out(rows, model, axis, v).values()) for v in values_of(rows, axis) if float(v)}
    held = {v: np.mean(accuracy) for v, accuracy in held.items() if accuracy}
    return max(held, key=held.get) if held else "0.001" if axis == "srr_reg" else None


def spread(values):
    """Mean and standard deviation over seeds, as text."""
    values = list(values)
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (
        f" ± {np.std(values, ddof=1):.2f} (n = {len(values)})" if len(values) > 1 else " (n = 1)"
    )


def paired(with_srr, without):
    """Mean difference over the seeds that both have, with its 95 % t interval, as text."""
    seeds = sorted(with_srr.keys() & without.keys())
    if not seeds:
        return "-"
    mean, low, high = claims.interval([with_srr[seed] - without[seed] for seed in seeds])
    return f"{mean:+.2f}" + f" [{low:+.2f}, {high:+.2f}]" * bool(low < high)


def names(rows):
    """The model types that occur, in the order of the table of variants."""
    return [name for name in VARIANT_TABLE if any(row["model"] == name for row in rows)]


def table_2(rows):
    """Cross-entropy against cross-entropy + SRR on the last layer, validation accuracy by model type (Table 2)."""
    lines = []
    for model in names(rows):
        eta = chosen(rows, model, "srr_reg")
        plain, regularised = accuracies(rows, model), accuracies(rows, model, srr_reg=eta)
        if plain and regularised:
            lines.append([model, eta, spread(plain.values()), spread(regularised.values()), paired(regularised, plain)])
    return lines and markdown_table(
        ["model", "eta", "cross-entropy", "cross-entropy + SRR", "difference, 95 % interval"], lines
    )


def table_choices(rows, axis, name):
    """Every strength of a regulariser: accuracy on held-out training images, which chooses, and on validation images."""
    lines = []
    for model in names(rows):
        plain, best = accuracies(rows, model), chosen(rows, model, axis)
        for value in values_of(rows, axis):
            held, full = held_out(rows, model, axis, value), accuracies(rows, model, **{axis: value})
            if held and full:
                difference = paired(full, plain) if float(value) else ""
                lines.append(
                    [
                        model,
                        f"**{value}**" if value == best else value,
                        spread(held.values()),
                        spread(full.values()),
                        difference,
                    ]
                )
    return lines and markdown_table(
        ["model", name, "held-out images", "validation images", "difference to 0, 95 % interval"], lines
    )


def table_regularisers(rows):
    """SRR beside what people already have, each at the strength chosen on held-out training images."""
    lines = []
    for model in names(rows):
        plain = accuracies(rows, model)
        best = {axis: chosen(rows, model, axis) for axis in ("srr_reg", "weight_decay", "dropout")}
        if not all(best.values()):
            continue
        cells = [f"{best[axis]}: {paired(accuracies(rows, model, **{axis: best[axis]}), plain)}" for axis in best]
        lines.append([model, spread(plain.values()), *cells])
    header = ["model", "none", "SRR, eta: difference", "weight decay: difference", "dropout: difference"]
    return lines and markdown_table(header, lines)


def table_3(rows):
    """Output matrices, and models beyond the paper: parameters and validation accuracy without SRR in the loss (Table 3)."""
    lines = []
    for model in names(rows):
        plain = accuracies(rows, model)
        if plain:
            own = (row for row in rows if row["model"] == model and row["depth"] == settings_of(row["preset"])["depth"])
            parameters = int(next(own)["parameters"])
            lines.append([model, VARIANT_TABLE[model][-1].split(": ", 1)[1], f"{parameters:,}", spread(plain.values())])
    return lines and markdown_table(["model", "compression step", "parameters", "validation accuracy"], lines)


def table_4(rows):
    """The grid of Section 5 and how its runs ended (Table 4)."""
    axes = ("model", "batch_size", "lr", "width", "dropout")
    lines = [
        [axis.replace("_", " "), ", ".join(sorted({row[axis] for row in rows}, key=lambda v: (len(v), v)))] for axis in axes
    ]
    missed = [row["run"] for row in rows if row["reached_target"] != "True"]
    lines += [["runs", len(rows)], ["reached the target", len(rows) - len(missed)]]
    for name, key, scale in (
        ("epochs", "epochs", 1),
        ("validation accuracy, %", "val_accuracy", 100),
        ("gap (loss)", "gap", 1),
    ):
        values = [scale * float(row[key]) for row in rows]
        lines.append([name, f"{min(values):.4g} to {max(values):.4g}, median {np.median(values):.4g}"])
    return markdown_table(["", "values"], lines) + ("\nMissed the target: " + ", ".join(missed) + "\n" if missed else "")


def table_matrices(measured, rows):
    """Eq. 11 of trained models; a standard transformer's with its query, key and value matrices in the place of U."""
    runs = {row["run"] for row in rows}
    lines = []
    for model in names(rows):
        own = [row for row in measured if row["model"] == model and row["run"] in runs]
        if own:
            columns = ("srr", "srr_key", "srr_value")
            lines.append([model, *(spread([float(row[key]) for row in own if row.get(key)]) for key in columns)])
    return lines and markdown_table(
        ["model", "SRR with U (in vit the query matrix)", "with the key matrix", "with the value matrix"], lines
    )


def eta_of_layers(rows, model):
    """The eta at which most layers have been regularised, as text: the one that Table 6 compares them at."""
    tried = {
        eta: {row["srr_layer"] for row in rows if (row["model"], row["srr_reg"]) == (model, eta)}
        for eta in values_of(rows, "srr_reg")
    }
    return max(tried, key=lambda eta: (float(eta) > 0, len(tried[eta])))


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
    return lines and markdown_table(
        ["model", "layer", "norm of Z", "eta", "validation accuracy", "difference to none, 95 % interval"], lines
    )


def with_run(table, rows):
    """The rows of layers.csv or operators.csv that belong to `rows`, as numbers, with the run's model and seed."""
    runs, text = {row["run"]: row for row in rows}, ("run", "images", "point")
    return [
        {key: value if key in text else float(value) for key, value in row.items()}
        | {key: runs[row["run"]][key] for key in ("model", "seed")}
        for row in table if row["run"] in runs
    ]  # fmt: skip


def nested(rows, value, *keys):
    """{first key: {second key: .. {last key: [value of every row]}}}."""
    result = {}
    for row in rows:
        level = result
        for key in keys[:-1]:
            level = level.setdefault(row[key], {})
        level.setdefault(row[keys[-1]], []).append(value(row))
    return result


def layer_figures(layers, operators, results):
    """Layer-wise SRR by epoch, its parts (Figs. 2, 3), and what each operator changes, drawn to results/figures."""
    from crate import figures

    def ordered(by_model):
        return {name: by_model[name] for name in VARIANT_TABLE if name in by_model}

    def by_epoch(panel):
        return {"at initialisation" if epoch == 0 else f"epoch {epoch:g}": panel[epoch] for epoch in sorted(panel)}

    parts = {
        "SRR": lambda row: row["srr"], r"$\lambda ||Z||_0$": lambda row: row["srr"] - row["rate_subspaces"] + row["rate"],
        "$R^c$": lambda row: row["rate_subspaces"], "$R$": lambda row: row["rate"],
    }  # fmt: skip
    for images, name in (("train", "fig_2"), ("val", "fig_2_validation")):
        own = ordered(nested([row for row in layers if row["images"] == images], parts["SRR"], "model", "epoch", "layer"))
        panels = {model: by_epoch(panel) for model, panel in own.items()}
        label = "SRR measure, $\\lambda ||Z||_0 + R^c - R$"
        figures.by_layer(panels, results / "figures" / f"{name}.png", label=label, sequential=True)
    panels = {}
    train = [row for row in layers if row["images"] == "train"]
    by_part = {part: nested(train, value, "model", "epoch", "layer") for part, value in parts.items() if part != "SRR"}
    for model in (name for name in ordered(by_part["$R$"]) if name in claims.MAIN):
        panels |= {f"{model}: {part}": by_epoch(by_model[model]) for part, by_model in by_part.items()}
    figures.by_layer(panels, results / "figures" / "fig_2_parts.png", label="nats", sequential=True, share=False)

    if operators:
        last = max(row["epoch"] for row in operators)
        steps = {
            "attention step": ("input", "compressed"),
            "LayerNorm": ("compressed", "normalised"),
            "ISTA": ("normalised", "output"),
        }
        values = {("$R^c$", "rate"): lambda row: row["rate_subspaces"],
                  (r"$\lambda ||Z||_0 - R$", "sparse_rate"): lambda row: row["srr"] - row["rate_subspaces"]}  # fmt: skip
        for (label, name), value in values.items():
            own = nested([row for row in operators if row["epoch"] == last], value, "model", "point", "layer")
            panels = {
                model: {
                    step if "normalised" in points else {"LayerNorm": "MLP"}.get(step, step): {
                        layer: np.subtract(points.get(after, points["output"])[layer], points[before][layer])
                        for layer in points[before]
                    }
                    for step, (before, after) in steps.items() if before in points
                }
                for model, points in ordered(own).items()
            }  # fmt: skip
            figures.by_layer(panels, results / "figures" / f"operators_{name}.png", label=f"change of {label} (nats)")


def provenance_table(rows):
    """Who made the runs, with what and in which time."""
    groups = {}
    for row in rows:
        key = (row["command"], (row["commit"] or "unknown")[:10], row["torch"], f"{row['device']} ({row['processor']})")
        groups.setdefault(key, []).append(float(row["seconds"]))
    lines = [[f"`{key[0]}`", *key[1:], len(s), f"{sum(s):.0f}"] for key, s in groups.items()]
    return markdown_table(["command", "commit", "torch", "device", "runs", "seconds of training, summed"], lines)


def attention_table(rows):
    """R^c around the steps of each update rule, mean ± standard deviation over seeds (Figs. 1, 5)."""
    from crate.compression import RULES

    lines = []
    for rule, (title, _) in RULES.items():
        own = [row for row in rows if row["rule"] == rule]
        finite = [row for row in own if not row["overflow"]]
        first = [row for row in finite if row["layer"] == 1]
        last = {row["seed"]: row for row in finite}.values()  # in the order of layers: the last one stays
        rises = sum(row["after"] > row["before"] for row in finite)
        overflow = min((row["layer"] for row in own if row["overflow"]), default="never")
        rates = [spread(row[when] for row in part) for part, when in ((first, "before"), (first, "after"), (last, "after"))]
        lines.append([title, *rates, f"{rises} of {len(finite)}", overflow])
    header = [
        "update",
        "R^c before layer 1",
        "after layer 1",
        "after its last layer",
        "steps that raise R^c",
        "overflow at layer",
    ]
    return markdown_table(header, lines)


def section(title, *parts):
    """A section of the report without its empty parts, or nothing where all are empty."""
    parts = [part for part in parts if part]
    return [f"## {title}\n", *parts] if parts else []


def image(caption, path, results):
    """Markdown of the figure at `path`, or nothing where it wasn't drawn."""
    return f"![{caption}]({path})\n\n*{caption}*\n" if (Path(results) / path).exists() else ""


def correlations(results, gap, what):
    """The rank statistics that correlate.py left in results/`gap`: tables and figures, over all runs and for each width."""
    parts = []
    folders = [*sorted(Path(results).glob(f"{gap}/width=*"), key=lambda f: int(f.name.split("=")[1])), Path(results) / gap]
    for folder in folders:
        if not (folder / "correlation.md").exists():
            continue
        path = folder.relative_to(results)
        which = f"d = {path.name.split('=')[1]}" if "=" in path.name else "all widths"
        parts.append(f"### {what}, {which}\n\n" + (folder / "correlation.md").read_text())
        parts.append(image(f"Kendall's tau with its 95 % bootstrap interval, {what}, {which}", f"{path}/forest.png", results))
        parts.append(image(f"{what} against each measure, {which} (Figs. 4, 6)", f"{path}/scatter.png", results))
        parts.append(image(f"Rank correlation between the measures, {which}", f"{path}/heatmap.png", results))
    return parts


def all_claims(results, rates, base, fixed, layers, operators):
    """The claims table's rows, from whatever tables there are (crate/claims.py)."""
    rows = claims.attention_claims(rates)
    rows += claims.layer_claims([row for row in layers if row["images"] == "train"])
    rows += claims.operator_claims(operators)
    folders = sorted(Path(results).glob("correlation/width=*"), key=lambda folder: int(folder.name.split("=")[1]))
    for folder in folders:
        table = [
            {key: value if key in ("measure", "note") else float(value) for key, value in row.items()}
            for row in read_csv(folder / "correlation.csv")
        ]
        rows += claims.correlation_claims(table, f"d = {folder.name.split('=')[1]}", folder == folders[0])

    def accuracy(model, layer=None, among_layers=False):
        if model not in names(fixed):
            return {}
        eta = eta_of_layers(fixed, model) if among_layers else chosen(fixed, model, "srr_reg")
        return accuracies(fixed, model, **({"srr_reg": eta, "srr_layer": layer} if layer else {}))

    return rows + claims.regularisation_claims(accuracy)


def claims_table(rows):
    """The claims table as Markdown."""

    def line(row):
        bounds = f"[{row['low']:+.3g}, {row['high']:+.3g}]" if np.isfinite(row["low"]) else "-"
        return [
            row["section"],
            row["claim"],
            row["claimed"],
            f"{row['number']:+.3g}",
            bounds,
            f"{row['n']} {row['of']}",
            f"**{row['verdict']}**",
        ]

    header = ["section", "claim: the number that decides it", "claimed", "number", "95 % interval", "n", "verdict"]
    return markdown_table(header, map(line, rows))


def depth_section(fixed, layers, results):
    """Accuracy by depth, and SRR along the layers of trained models of every depth."""
    from crate import figures

    depths = sorted({row["depth"] for row in fixed}, key=int)
    if len(depths) < 2:
        return []
    by_depth = {model: {depth: accuracies(fixed, model, depth=depth) for depth in depths} for model in names(fixed)}
    lines = [
        [model, *(spread(a.values()) for a in own.values())]
        for model, own in by_depth.items()
        if sum(map(bool, own.values())) > 1
    ]
    plain = {row["run"]: row["depth"] for row in fixed if row["srr_reg"] == "0.0" and row["hold_out"] == "0.0"}
    last = max((row["epoch"] for row in layers), default=0)
    rows = [
        row | {"depth": plain[row["run"]]}
        for row in layers
        if row["run"] in plain and row["images"] == "train" and row["epoch"] == last
    ]
    curves = nested(rows, lambda row: row["srr"], "model", "depth", "layer")
    panels = {
        model: {f"L = {d}": curves[model][d] for d in depths if d in curves[model]} for model, *_ in lines if model in curves
    }
    if panels:
        label = "SRR measure after training"
        figures.by_layer(panels, Path(results) / "figures" / "depth.png", label=label, sequential=True)
    return [
        markdown_table(["validation accuracy, %", *(f"L = {depth}" for depth in depths)], lines),
        image(
            "SRR along the layers of trained models of every depth, mean over seeds, 95 % intervals",
            "figures/depth.png",
            results,
        ),
    ]


def write_report(results, attention):
    """REPORT.md and its figures, from the tables in `results` and the attention-only tables in `attention`."""
    results, text = Path(results), []

    def table(name):
        return read_csv(results / name) if (results / name).exists() else []

    rows = table("runs.csv")
    grid, fixed = [row for row in rows if row["stop_at_loss"]], at_preset(rows)
    base = [row for row in fixed if all(row[key] == settings_of(row["preset"])[key] for key in VARIED)]
    rates = read_rates(Path(attention) / "rates.csv") if (Path(attention) / "rates.csv").exists() else []
    every_layer = table("layers.csv")
    layers, operators = with_run(every_layer, base), with_run(table("operators.csv"), base)
    claimed = all_claims(results, rates, base, fixed, layers, operators)
    if claimed:
        write_csv(results / "claims.csv", claimed)
        text += section("The paper's claims on these data", CLAIMS_TEXT, claims_table(claimed))
    if rates:
        folder = os.path.relpath(attention, results)
        text += section(
            "Does a compression step lower R^c? (Section 4.1)",
            attention_table(rates),
            image("R^c before and after CRATE-C's attention step, by layer (Fig. 1a)", f"{folder}/fig_1a.png", results),
            image("The logarithm and its expansions (Fig. 1b)", f"{folder}/fig_1b.png", results),
            image("R^c before and after each update, by layer (Fig. 5, and CRATE-N)", f"{folder}/fig_5.png", results),
        )
    if layers:
        layer_figures(layers, operators, results)
        what = "of every layer's output, by epoch, mean over seeds, 95 % intervals"
        text += section(
            "Layer-wise SRR (Section 4.3)",
            image(f"SRR measure {what}, on training images (Figs. 2, 3)", "figures/fig_2.png", results),
            image(f"SRR measure {what}, on validation images", "figures/fig_2_validation.png", results),
            image(f"The parts of SRR {what}, on training images", "figures/fig_2_parts.png", results),
            image("What each operator of trained models adds to R^c, by layer", "figures/operators_rate.png", results),
            image("What each operator adds to the sparse rate", "figures/operators_sparse_rate.png", results),
        )
    if grid:
        text += section("The models of Section 5 (Table 4)", table_4(grid))
    text += section(
        "SRR as a complexity measure (Section 5; Tables 1, 5)",
        *correlations(results, "correlation", "gap in cross-entropy"),
        *correlations(results, "correlation_accuracy", "gap in accuracy"),
    )
    if fixed:
        what = (
            "Validation accuracy in % after the last epoch, mean ± standard deviation over seeds; differences paired by seed.\n"
        )
        for title, above, of_section in (
            ("SRR in the loss, last layer (Section 6, Table 2)", what, table_2(fixed)),
            ("Choosing eta", HELD_OUT_TEXT, table_choices(fixed, "srr_reg", "eta")),
            ("SRR against weight decay and dropout", what, table_regularisers(fixed)),
            ("Output matrices (Table 3), and models beyond the paper", what, table_3(fixed)),
            ("Which layer's SRR (Table 6)", what, table_6(fixed)),
        ):
            text += section(title, of_section and above, of_section)
        text += section("SRR of a standard transformer", table_matrices(table("srr.csv"), base))
        text += section("Depth", *depth_section(fixed, with_run(every_layer, fixed), results))
    if rows:
        text += section("Where the numbers come from", provenance_table(rows))
    if not text:
        raise InputError(f"--results {results}: no table there to report; name --runs, or run the earlier stages")
    write_text(results / "REPORT.md", "\n".join([f"# Report: {results.name}\n", *text]))


def read_rates(path):
    """The rows that attention_only.py wrote, as numbers."""
    return [
        {key: row[key] for key in ("rule", "seed")}
        | {"layer": int(row["layer"]), "overflow": row["overflow"] == "True"}
        | {when: float(row[when]) if row[when] else None for when in ("before", "after")}
        for row in read_csv(path)
    ]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--runs", help="folder of run folders, such as runs/laptop; without it, --results is reported as it is")
    parser.add_argument("--results", required=True, help="folder of the tables, such as results/digits")
    parser.add_argument(
        "--attention", default="results/attention_only", help="what attention_only.py wrote (default: %(default)s)"
    )
    arguments = parser.parse_args()
    results = output_folder(arguments.results, "--results")
    if arguments.runs:
        collect(arguments.runs, results)
    write_report(results, arguments.attention)
    print(f"written to {results / 'REPORT.md'}")


if __name__ == "__main__":
    run(main)
