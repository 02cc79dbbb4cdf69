"""REPORT.md out of run folders: `python -m crate.report --runs runs/laptop --results results/digits`.

First the run folders become tables, runs.csv, layers.csv and operators.csv; then everything in --results, and nothing else,
becomes REPORT.md and figures/. Without --runs the second half alone is done, so a report can be rebuilt from committed tables.
"""

import json
import os
from pathlib import Path

import numpy as np

from crate import claims, tables
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
HELD_OUT = "Bold: chosen by mean accuracy on training images that were held out; validation images play no part in it.\n"
ACCURACY = """Validation accuracy in % after the last epoch, mean ± standard deviation over seeds; differences paired by seed.
"""
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
        row["processor"] = f"{config['versions']['processor']}, {config['versions']['cores']} cores"
        rows.append(row)
        if any(config[key] for key in ("hold_out", "srr_reg", "weight_decay", "dropout")):
            continue
        for line in path.with_name("log.jsonl").read_text().splitlines():
            epoch = json.loads(line)
            where = {"run": path.parent.name, "epoch": epoch["epoch"]}
            for images, key in (("train", "srr"), ("val", "srr_val")):
                layers += [parts(where | {"images": images, "layer": l}, of) for l, of in enumerate(epoch.get(key, []), 1)]
            for l, points in enumerate(epoch.get("operators", []), 1):
                operators += [parts(where | {"layer": l, "point": point}, of) for point, of in points.items()]
    if not rows:
        raise InputError(f"--runs {runs}: no finished run there; train first")
    write_csv(Path(results) / "runs.csv", rows)
    for name, table in (("layers", layers), ("operators", operators)):
        if table:
            write_csv(Path(results) / f"{name}.csv", table)


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
        rows = [row for row in layers if row["images"] == images and row["model"] in (*claims.MAIN, "crate-e")]
        own = ordered(nested(rows, parts["SRR"], "model", "epoch", "layer"))
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


def depth_section(fixed, layers, results):
    """Accuracy by depth, and SRR along the layers of trained models of every depth."""
    from crate import figures

    depths = sorted({row["depth"] for row in fixed}, key=int)
    if len(depths) < 2:
        return []
    models = tables.names(fixed)
    by_depth = {model: {depth: tables.accuracies(fixed, model, depth=depth) for depth in depths} for model in models}
    lines = [
        [model, *(tables.spread(a.values()) for a in own.values())]
        for model, own in by_depth.items()
        if sum(map(bool, own.values())) > 1
    ]
    others = [key for key in tables.VARIED if key != "depth"]
    plain = {row["run"]: row["depth"] for row in fixed if all(row[k] == tables.settings_of(row)[k] for k in others)}
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


def section(title, *parts):
    """A section of the report without its empty parts, or nothing where all are empty."""
    parts = [part for part in parts if part]
    return [f"## {title}\n", *parts] if parts else []


def image(caption, path, results):
    """Markdown of the figure at `path`, or nothing where it wasn't drawn."""
    return f"![{caption}]({path})\n\n*{caption}*\n" if (Path(results) / path).exists() else ""


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
        if model not in tables.names(fixed):
            return {}
        eta = tables.eta_of_layers(fixed, model) if among_layers else tables.chosen(fixed, model, "srr_reg")
        return tables.accuracies(fixed, model, **({"srr_reg": eta, "srr_layer": layer} if layer else {}))

    return rows + claims.regularisation_claims(accuracy)


def write_report(results, attention):
    """REPORT.md and its figures, from the tables in `results` and the attention-only tables in `attention`."""
    results, text = Path(results), []

    def table(name):
        return read_csv(results / name) if (results / name).exists() else []

    rows = table("runs.csv")
    grid, fixed = [row for row in rows if row["stop_at_loss"]], tables.at_preset(rows)
    base = [row for row in fixed if all(row[key] == tables.settings_of(row)[key] for key in tables.VARIED)]
    rates = read_rates(Path(attention) / "rates.csv") if (Path(attention) / "rates.csv").exists() else []
    every_layer = table("layers.csv")
    layers, operators = with_run(every_layer, base), with_run(table("operators.csv"), base)
    claimed = all_claims(results, rates, base, fixed, layers, operators)
    if claimed:
        write_csv(results / "claims.csv", claimed)
        text += section("The paper's claims on these data", CLAIMS, tables.claims_table(claimed))
    if rates:
        folder = os.path.relpath(attention, results)
        text += section(
            "Does a compression step lower R^c? (Section 4.1)",
            PAPER["4.1"],
            tables.attention_table(rates),
            image("R^c before and after CRATE-C's attention step, by layer (Fig. 1a)", f"{folder}/fig_1a.png", results),
            image("The logarithm and its expansions (Fig. 1b)", f"{folder}/fig_1b.png", results),
            image("R^c before and after each update, by layer (Fig. 5, and CRATE-N)", f"{folder}/fig_5.png", results),
        )
    if layers:
        layer_figures(layers, operators, results)
        what = "of every layer's output, by epoch, mean over seeds, 95 % intervals"
        text += section(
            "Layer-wise SRR (Section 4.3)",
            PAPER["4.3"],
            image(f"SRR measure {what}, on training images (Figs. 2, 3)", "figures/fig_2.png", results),
            image(f"SRR measure {what}, on validation images", "figures/fig_2_validation.png", results),
            image(f"The parts of SRR {what}, on training images", "figures/fig_2_parts.png", results),
            image("What each operator of trained models adds to R^c, by layer", "figures/operators_rate.png", results),
            image("What each operator adds to the sparse rate", "figures/operators_sparse_rate.png", results),
        )
    if grid:
        text += section("The models of Section 5 (Table 4)", tables.table_4(grid))
    ranks = correlations(results, "correlation", "gap in cross-entropy")
    ranks += correlations(results, "correlation_accuracy", "gap in accuracy")
    text += section("SRR as a complexity measure (Section 5; Tables 1, 5)", ranks and PAPER["5"], *ranks)
    if fixed:
        for title, above, of_section in (
            ("SRR in the loss, last layer (Section 6, Table 2)", ACCURACY + PAPER["Table 2"], tables.table_2(fixed)),
            ("Choosing eta", HELD_OUT, tables.table_choices(fixed)),
            ("SRR against weight decay and dropout", ACCURACY, tables.table_regularisers(fixed)),
            ("Output matrices (Table 3), and models beyond the paper", ACCURACY + PAPER["Table 3"], tables.table_3(fixed)),
            ("Which layer's SRR (Table 6)", ACCURACY + PAPER["Table 6"], tables.table_6(fixed)),
        ):
            text += section(title, of_section and above, of_section)
        text += section("SRR of a standard transformer", tables.table_matrices(table("srr.csv"), base))
        text += section("Depth", *depth_section(fixed, with_run(every_layer, fixed), results))
    if rows:
        text += section("Where the numbers come from", tables.provenance_table(rows))
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
