"""REPORT.md out of run folders: `python -m crate.report --runs runs/laptop --results results/digits`.

First the run folders become tables, runs.csv, layers.csv and operators.csv; then the tables in --results and --attention, and
nothing else, become REPORT.md and figures/. Without --runs the second half alone is done: a report rebuilt from its tables.
"""

import json
import os
from pathlib import Path

import numpy as np

from crate import claims, tables
from crate.claims import nested
from crate.cli import InputError, Parser, output_folder, run
from crate.config import DEFAULTS, VARIANT_TABLE
from crate.files import markdown_table, read_csv, write_csv, write_text
from crate.runs import finished_run

COLUMNS = (*DEFAULTS, "preset", "device", "amp", "parameters", "commit", "command")
RESULTS = (
    "reached_target", "epochs", "steps", "train_loss", "train_accuracy",
    "val_loss", "val_accuracy", "gap", "gap_accuracy", "seconds",
)  # fmt: skip

CLAIMS = """A claim *holds* where the whole 95 % interval of its number is on the claimed side, is *contradicted* where it is on
the other side, and is *undecided* else (crate/claims.py). Intervals are t intervals over seeds; those of rank correlations are
bootstraps.
"""
HELD_OUT = "Bold: the best above 0 by mean accuracy on held-out training images; validation images play no part in it.\n"
ACCURACY = "Validation accuracy in % after the last epoch, mean ± standard deviation over seeds; differences paired by seed.\n"
# What the paper says, beside what the runs say.
PAPER = {
    "4.1": "The paper: (a) falls at every layer, (b), (d) and (e) rise.\n",
    "4.3": """The paper: at initialisation SRR falls over about the first 9 of 12 layers, then rises; with training it rises at
every layer, but for a rare exception in the last layers of CRATE-C. That the ReLU compresses is its conjecture.
""",
    "5": """The paper: at the smaller width SRR has the highest tau (0.445) and wins on the model-type axis; products and sums
of norms and path-norm correlate negatively, 1/margin and PAC-Bayes flatness positively and strongly. At the larger width SRR
is slightly best, below PAC-Bayes flatness on dropout and model type.
""",
    "Table 2": "The paper: every variant gains on both data sets with SRR of the last layer alone, at eta = 0.001.\n",
    "Table 3": "The paper: CRATE-N beats CRATE-C; CRATE-T nearly closes the gap to CRATE with no extra parameter.\n",
    "Table 6": "The paper: a random layer is worse than a fixed one; shallower layers may gain more.\n",
}

# The points of crate.srr.operator_rates before and after every operator.
STEPS = {"attention step": ("input", "compressed"), "LayerNorm": ("compressed", "normalised"), "ISTA": ("normalised", "output")}
STEPS_OF_VIT = {"attention step": ("input", "compressed"), "MLP": ("compressed", "output")}


def collect(runs, results):
    """Write runs.csv (a row per finished run), layers.csv (layer-wise SRR by epoch) and operators.csv from the run folders.

    The last two hold the unregularised runs alone, which the figures compare, with 7 digits: float32 has no more.
    """
    rows, layers, operators = [], [], []

    def parts(where, values):
        return where | {key: float(f"{value:.7g}") for key, value in values.items()}

    for path in sorted(Path(runs).glob("*/result.json")):
        config, result = finished_run(path.parent)
        row = {"run": path.parent.name} | {key: config.get(key, "") for key in COLUMNS}
        row["max_epochs"] = row.pop("epochs")
        row |= {key: result[key] for key in RESULTS} | {"torch": config["versions"]["torch"]}
        row["processor"] = "{processor}, {cores} cores".format(**config["versions"])
        rows.append(row)
        if any(config[key] for key in ("hold_out", "srr_reg", "weight_decay", "dropout")):
            continue
        for epoch in map(json.loads, path.with_name("log.jsonl").read_text().splitlines()):
            where = {"run": path.parent.name, "epoch": epoch["epoch"]}
            for images, key in (("train", "srr"), ("val", "srr_val")):
                layers += [parts(where | {"images": images, "layer": l}, of) for l, of in enumerate(epoch.get(key, []), 1)]
            for l, points in enumerate(epoch.get("operators", []), 1):
                operators += [parts(where | {"layer": l, "point": point}, of) for point, of in points.items()]
    if not rows:
        raise InputError(f"--runs {runs}: no finished run there; train first")
    for name, table in (("runs", rows), ("layers", layers), ("operators", operators)):
        path = Path(results) / f"{name}.csv"
        write_csv(path, table) if table else path.unlink(missing_ok=True)  # one from other runs would be mixed in


def read_typed(path):
    """The rows of a CSV, with ints, floats, True, False and None (an empty cell) for their text; none where it is missing."""

    def typed(text):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return {"True": True, "False": False, "": None}.get(text, text)

    rows = read_csv(path) if path.exists() else []
    return [{key: typed(text) for key, text in row.items()} for row in rows]


def with_run(table, rows):
    """The rows of layers.csv or operators.csv of the runs `rows`, with model, seed and depth, ordered by model and epoch."""
    runs = {row["run"]: {key: row[key] for key in ("model", "seed", "depth")} for row in rows}
    own = [row | runs[row["run"]] for row in table if row["run"] in runs]
    models = list(VARIANT_TABLE)
    return sorted(own, key=lambda row: (models.index(row["model"]), row["epoch"]))


def layer_figures(layers, operators, folder):
    """Layer-wise SRR by epoch, its parts (Figs. 2, 3), and what each operator changes, drawn to `folder`."""
    from crate import figures

    layers = [
        row | {"when": f"epoch {row['epoch']}" if row["epoch"] else "at initialisation"}
        for row in layers
        if row["model"] in (*claims.MAIN, "crate-e")
    ]
    train, val = ([row for row in layers if row["images"] == images] for images in ("train", "val"))
    label = r"SRR measure, $\lambda ||Z||_0 + R^c - R$"
    for name, rows in (("fig_2", train), ("fig_2_validation", val)):
        panels = nested(rows, "model", "when", "layer", "srr")
        figures.by_layer(panels, folder / f"{name}.png", label=label, sequential=True)

    rows = []
    for row in train:
        if row["model"] in claims.MAIN:
            sparsity = row["srr"] - row["rate_subspaces"] + row["rate"]
            parts = {r"$\lambda ||Z||_0$": sparsity, "$R^c$": row["rate_subspaces"], "$R$": row["rate"]}
            rows += [row | {"panel": f"{row['model']}: {part}", "nats": nats} for part, nats in parts.items()]
    panels = nested(rows, "panel", "when", "layer", "nats")
    figures.by_layer(panels, folder / "fig_2_parts.png", label="nats", sequential=True, share=False)

    def change(points, before, after):
        return {layer: np.subtract(points[after][layer], values) for layer, values in points[before].items()}

    last = max((row["epoch"] for row in operators), default=0)
    trained = [row | {"sparse_rate": row["srr"] - row["rate_subspaces"]} for row in operators if row["epoch"] == last]
    for name, column, part in (
        ("operators_rate", "rate_subspaces", "$R^c$"),
        ("operators_sparse_rate", "sparse_rate", r"$\lambda ||Z||_0 - R$"),
    ):
        panels = {}
        for model, points in nested(trained, "model", "point", "layer", column).items():
            steps = STEPS if "normalised" in points else STEPS_OF_VIT
            panels[model] = {step: change(points, *between) for step, between in steps.items()}
        figures.by_layer(panels, folder / f"{name}.png", label=f"change of {part} (nats)")


def depth_section(fixed, layers, results):
    """Accuracy by depth, and SRR along the layers of trained models of every depth."""
    from crate import figures

    depths, lines = tables.values_of(fixed, "depth"), []
    for model in tables.names(fixed):
        by_depth = [tables.accuracies(fixed, model, depth=depth).values() for depth in depths]
        if sum(map(bool, by_depth)) > 1:
            lines.append([model, *map(tables.spread, by_depth)])
    if not lines:
        return []
    rows = sorted(with_run(layers, tables.at_preset(fixed, ("depth",))), key=lambda row: int(row["depth"]))
    last = max((row["epoch"] for row in rows), default=0)
    rows = [row | {"L": f"L = {row['depth']}"} for row in rows if row["images"] == "train" and row["epoch"] == last]
    panels = nested(rows, "model", "L", "layer", "srr")
    panels = {model: panels[model] for model, *_ in lines if model in panels}
    figures.by_layer(panels, results / "figures/depth.png", label="SRR measure after training", sequential=True)
    caption = "SRR along the layers of trained models of every depth, mean over seeds, 95 % intervals"
    table = markdown_table(["validation accuracy, %", *(f"L = {depth}" for depth in depths)], lines)
    return [table, image(results, "figures/depth.png", caption)]


def by_width(folder):
    """{"d = 48": folder/width=48, ...}: where correlate.py left the statistics of each width."""
    widths = sorted(int(path.name.removeprefix("width=")) for path in folder.glob("width=*"))
    return {f"d = {width}": folder / f"width={width}" for width in widths}


def correlations(results, name, what):
    """The rank statistics that correlate.py left in results/`name`: tables and figures, for each width and over all runs."""
    parts = []
    for which, folder in (by_width(results / name) | {"all widths": results / name}).items():
        if (folder / "correlation.md").exists():
            path = folder.relative_to(results)
            parts += [
                f"### {what}, {which}\n\n" + (folder / "correlation.md").read_text(),
                image(results, path / "forest.png", f"Kendall's tau with its 95 % bootstrap interval, {what}, {which}"),
                image(results, path / "scatter.png", f"{what} against each measure, {which} (Figs. 4, 6)"),
                image(results, path / "heatmap.png", f"Rank correlation between the measures, {which}"),
            ]
    return parts


def image(results, path, caption):
    """Markdown of the figure at results/`path`, or nothing where it wasn't drawn."""
    return f"![{caption}]({path})\n\n*{caption}*\n" if (results / path).exists() else ""


def section(title, above, *parts):
    """A section of the report, `above` before its parts without the empty ones, or nothing where all are empty."""
    parts = [part for part in parts if part]
    return list(filter(None, (f"## {title}\n", above, *parts))) if parts else []


def all_claims(results, rates, fixed, layers, operators):
    """The claims table's rows, from whatever tables there are (crate/claims.py)."""
    rows = claims.attention_claims(rates)
    rows += claims.layer_claims([row for row in layers if row["images"] == "train"])
    rows += claims.operator_claims(operators)
    for k, (which, folder) in enumerate(by_width(results / "correlation").items()):
        rows += claims.correlation_claims(read_typed(folder / "correlation.csv"), which, first=k == 0)

    def accuracy(model, layer=None, among_layers=False):
        if model not in tables.names(fixed):
            return {}
        eta = tables.eta_of_layers(fixed, model) if among_layers else tables.chosen(fixed, model, "srr_reg")
        return tables.accuracies(fixed, model, **({"srr_reg": eta, "srr_layer": layer} if layer else {}))

    return rows + claims.regularisation_claims(accuracy)


def write_report(results, attention):
    """REPORT.md and its figures, from the tables in `results` and the attention-only tables in `attention`."""

    rows = read_csv(results / "runs.csv") if (results / "runs.csv").exists() else []
    grid, fixed, base = [row for row in rows if row["stop_at_loss"]], tables.at_preset(rows), tables.at_preset(rows, ())
    rates, every_layer = read_typed(Path(attention) / "rates.csv"), read_typed(results / "layers.csv")
    layers, operators = with_run(every_layer, base), with_run(read_typed(results / "operators.csv"), base)
    claimed = all_claims(results, rates, fixed, layers, operators)
    if claimed:
        write_csv(results / "claims.csv", claimed)
    text = section("The paper's claims on these data", CLAIMS, tables.claims_table(claimed))
    if rates:
        folder = os.path.relpath(attention, results)
        text += section(
            "Does a compression step lower R^c? (Section 4.1)",
            PAPER["4.1"],
            tables.attention_table(rates),
            image(results, f"{folder}/fig_1a.png", "R^c before and after CRATE-C's attention step, by layer (Fig. 1a)"),
            image(results, f"{folder}/fig_1b.png", "The logarithm and its expansions (Fig. 1b)"),
            image(results, f"{folder}/fig_5.png", "R^c before and after each update, by layer (Fig. 5, and CRATE-N)"),
        )
    if layers:
        layer_figures(layers, operators, results / "figures")
        what = "of every layer's output, by epoch, mean over seeds, 95 % intervals"
        text += section(
            "Layer-wise SRR (Section 4.3)",
            PAPER["4.3"],
            image(results, "figures/fig_2.png", f"SRR measure {what}, on up to 512 training images (Figs. 2, 3)"),
            image(results, "figures/fig_2_validation.png", f"SRR measure {what}, on up to 512 validation images"),
            image(results, "figures/fig_2_parts.png", f"The parts of SRR {what}, on training images"),
            image(results, "figures/operators_rate.png", "What each operator of trained models adds to R^c, by layer"),
            image(results, "figures/operators_sparse_rate.png", "What each operator adds to the sparse rate"),
        )
    ranks = correlations(results, "correlation", "gap in cross-entropy")
    ranks += correlations(results, "correlation_accuracy", "gap in accuracy")
    for title, above, *parts in (
        ("The models of Section 5 (Table 4)", "", grid and tables.table_4(grid)),
        ("SRR as a complexity measure (Section 5; Tables 1, 5)", PAPER["5"], *ranks),
        ("SRR in the loss, last layer (Section 6, Table 2)", ACCURACY + PAPER["Table 2"], tables.table_2(fixed)),
        ("Choosing eta", HELD_OUT, tables.table_choices(fixed)),
        ("SRR against weight decay and dropout", ACCURACY, tables.table_regularisers(fixed)),
        ("Output matrices (Table 3), and models beyond the paper", ACCURACY + PAPER["Table 3"], tables.table_3(fixed)),
        ("Which layer's SRR (Table 6)", ACCURACY + PAPER["Table 6"], tables.table_6(fixed)),
        ("SRR of a standard transformer", "", tables.table_matrices(read_typed(results / "srr.csv"), base)),
        ("Depth", "", *depth_section(fixed, every_layer, results)),
        ("Where the numbers come from", "", rows and tables.provenance_table(rows)),
    ):
        text += section(title, above, *parts)
    if not text:
        raise InputError(f"--results {results}: no table there to report; name --runs, or run the earlier stages")
    write_text(results / "REPORT.md", "\n".join([f"# Report: {results.name}\n", *text]))


def main():
    parser = Parser(__doc__)
    add, what = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("--runs", help="folder of run folders, such as runs/laptop; without it, --results is reported as it is")
    what.add_argument("--results", help="folder of the tables, such as results/digits")
    what.add_argument("--claims", nargs="+", metavar="FOLDER", help="print the claims of several such folders side by side")
    add("--attention", default="results/attention_only", help="what attention_only.py wrote (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.claims:
        if arguments.runs or len({Path(folder).name for folder in arguments.claims}) < len(arguments.claims):
            raise InputError("--claims: name folders of different names, and no --runs")
        of_data = {Path(folder).name: read_typed(Path(folder) / "claims.csv") for folder in arguments.claims}
        for folder, rows in zip(arguments.claims, of_data.values()):
            if not rows:
                raise InputError(f"--claims {folder}: no claims.csv there; name a folder that --results had")
        return print(tables.claims_side_by_side(of_data), end="")
    if not (arguments.runs or Path(arguments.results).is_dir()):
        raise InputError(f"--results {arguments.results}: no such folder; name one, or --runs to make it from")
    results = output_folder(arguments.results, "--results")
    if arguments.runs:
        collect(arguments.runs, results)
    write_report(results, arguments.attention)
    print(f"written to {results / 'REPORT.md'}")


if __name__ == "__main__":
    run(main)
