"""Tables and figures out of run folders: `python -m crate.report --runs runs/laptop --results results/digits`.

First the run folders become two tables, runs.csv and layers.csv; then everything in --results, and nothing else, becomes
REPORT.md and figures/. Without --runs the second half alone is done, so a report can be rebuilt from committed tables.
"""

import json
import os
from pathlib import Path

import numpy as np

from crate.cli import InputError, Parser, output_folder, run
from crate.config import DATASETS, DEFAULTS, PRESETS, VARIANT_TABLE
from crate.files import markdown_table, read_csv, read_json, write_csv, write_text

COLUMNS = (*DEFAULTS, "preset", "device", "amp", "parameters", "commit", "command")
RESULTS = (
    "reached_target", "epochs", "steps", "train_loss", "train_accuracy",
    "val_loss", "val_accuracy", "gap", "gap_accuracy", "seconds",
)  # fmt: skip


def collect(runs, results):
    """Write runs.csv (a row per finished run) and layers.csv (layer-wise SRR by epoch) from the run folders in `runs`."""
    rows, layers = [], []
    for path in sorted(Path(runs).glob("*/result.json")):
        config, result = read_json(path.with_name("config.json")), read_json(path)
        row = {"run": path.parent.name} | {key: config.get(key, "") for key in COLUMNS}
        row["max_epochs"] = row.pop("epochs")
        row |= {key: result[key] for key in RESULTS} | {"torch": config["versions"]["torch"]}
        row["processor"] = f"{config['versions']['processor']}, {config['versions']['cores']} cores"
        rows.append(row)
        for line in path.with_name("log.jsonl").read_text().splitlines():
            epoch = json.loads(line)
            for layer, parts in enumerate(epoch.get("srr", []), start=1):
                layers.append({"run": path.parent.name, "epoch": epoch["epoch"], "layer": layer} | parts)
    if not rows:
        raise InputError(f"--runs {runs}: no finished run there; train first")
    write_csv(Path(results) / "runs.csv", rows)
    if layers:
        write_csv(Path(results) / "layers.csv", layers)


def at_preset(rows):
    """The runs of fixed length at their preset's own settings: what Tables 2, 3, 6 and Fig. 2 compare."""
    def matches(row):
        settings = DEFAULTS | PRESETS[row["preset"]]
        settings |= {"max_epochs": settings.pop("epochs"), "image_size": DATASETS[row["dataset"]][0]}
        fixed = settings.keys() - {"dataset", "model", "seed", "srr_reg", "srr_layer", "log_srr_every"}
        return all(str(settings[key] if settings[key] is not None else "") == row[key] for key in fixed)

    return [row for row in rows if matches(row)]


def accuracies(rows, **chosen):
    """{seed: validation accuracy in %} of the runs that match `chosen`."""
    return {r["seed"]: 100 * float(r["val_accuracy"]) for r in rows if all(r[key] == value for key, value in chosen.items())}


def spread(values):
    """Mean and standard deviation over seeds, as text."""
    values = list(values)
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f} (n = {len(values)})" if len(values) > 1 else " (n = 1)")


def paired(with_srr, without):
    """Mean difference over the seeds that both have, with its 95 % t interval, as text."""
    from scipy.stats import ttest_rel

    seeds = sorted(with_srr.keys() & without.keys())
    if not seeds:
        return "-"
    a, b = np.array([with_srr[s] for s in seeds]), np.array([without[s] for s in seeds])
    if len(seeds) == 1 or np.ptp(a - b) == 0:
        return f"{np.mean(a - b):+.2f}"
    interval = ttest_rel(a, b).confidence_interval()
    return f"{np.mean(a - b):+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def names(rows):
    """The model types that occur, in the order of the table of variants."""
    return [name for name in VARIANT_TABLE if any(row["model"] == name for row in rows)]


def table_2(rows):
    """Cross-entropy against cross-entropy + SRR on the last layer, validation accuracy by model type (Table 2)."""
    etas = sorted({row["srr_reg"] for row in rows if row["srr_layer"] == "last"} - {"0.0"}, key=float)
    lines = []
    for model in names(rows):
        plain = accuracies(rows, model=model, srr_reg="0.0")
        for eta in etas:
            regularised = accuracies(rows, model=model, srr_reg=eta, srr_layer="last")
            if plain and regularised:
                lines.append([model, eta, spread(plain.values()), spread(regularised.values()), paired(regularised, plain)])
    return lines and markdown_table(["model", "eta", "cross-entropy", "cross-entropy + SRR", "difference, 95 % interval"], lines)


def table_3(rows):
    """Output matrices: parameters and validation accuracy without SRR in the loss (Table 3)."""
    lines = []
    for model in names(rows):
        plain = accuracies(rows, model=model, srr_reg="0.0")
        parameters = next(row["parameters"] for row in rows if row["model"] == model)
        lines.append([model, VARIANT_TABLE[model][2].split(": ", 1)[1], f"{int(parameters):,}", spread(plain.values())])
    return markdown_table(["model", "compression step", "parameters", "validation accuracy"], lines)


def table_4(rows):
    """The grid of Section 5 and how its runs ended (Table 4)."""
    axes = ("model", "batch_size", "lr", "width", "dropout")
    lines = [[axis.replace("_", " "), ", ".join(sorted({row[axis] for row in rows}, key=lambda v: (len(v), v)))] for axis in axes]
    missed = [row["run"] for row in rows if row["reached_target"] != "True"]
    lines += [["runs", len(rows)], ["reached the target", len(rows) - len(missed)]]
    for name, key, scale in (("epochs", "epochs", 1), ("validation accuracy, %", "val_accuracy", 100), ("gap (loss)", "gap", 1)):
        values = [scale * float(row[key]) for row in rows]
        lines.append([name, f"{min(values):.4g} to {max(values):.4g}, median {np.median(values):.4g}"])
    return markdown_table(["", "values"], lines) + ("\nMissed the target: " + ", ".join(missed) + "\n" if missed else "")


def table_6(rows):
    """Which layer's SRR is in the loss (Table 6)."""
    depth = int(rows[0]["depth"])
    lines = []
    for model in names(rows):
        plain = accuracies(rows, model=model, srr_reg="0.0")
        choices = {(row["srr_layer"], row["srr_reg"]) for row in rows if row["model"] == model and row["srr_reg"] != "0.0"}
        if len({layer for layer, _ in choices}) < 2:
            continue
        lines.append([model, "none", "-", spread(plain.values()), ""])
        for layer, eta in sorted(choices, key=lambda c: (c[1], not c[0].isdecimal(), c[0].zfill(4))):
            name = f"last ({depth})" if layer == "last" else layer
            chosen = accuracies(rows, model=model, srr_reg=eta, srr_layer=layer)
            lines.append([model, name, eta, spread(chosen.values()), paired(chosen, plain)])
    return lines and markdown_table(["model", "layer", "eta", "validation accuracy", "difference to none, 95 % interval"], lines)


def figure_2(rows, layers, path):
    """Layer-wise SRR by epoch, a panel per model type, mean over seeds (Figs. 2, 3); drawn to `path`."""
    from crate import figures

    chosen = {row["run"]: row["model"] for row in rows if row["srr_reg"] == "0.0"}
    values = {}  # {model: {epoch: {layer: [srr of each seed]}}}
    for row in layers:
        if row["run"] in chosen:
            by_epoch = values.setdefault(chosen[row["run"]], {}).setdefault(int(row["epoch"]), {})
            by_epoch.setdefault(int(row["layer"]), []).append(float(row["srr"]))
    figures.layerwise({name: values[name] for name in VARIANT_TABLE if name in values}, path)


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
    header = ["update", "R^c before layer 1", "after layer 1", "after its last layer", "steps that raise R^c", "overflow at layer"]
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


def write_report(results, attention):
    """REPORT.md and its figures, from the tables in `results` and the attention-only tables in `attention`."""
    results, text = Path(results), []
    rows = read_csv(results / "runs.csv") if (results / "runs.csv").exists() else []
    grid, fixed = [row for row in rows if row["stop_at_loss"]], at_preset(rows)
    if (Path(attention) / "rates.csv").exists():
        folder = os.path.relpath(attention, results)
        text += section(
            "Does a compression step lower R^c? (Section 4.1)",
            attention_table(read_rates(Path(attention) / "rates.csv")),
            image("R^c before and after CRATE-C's attention step, by layer (Fig. 1a)", f"{folder}/fig_1a.png", results),
            image("The logarithm and its expansions (Fig. 1b)", f"{folder}/fig_1b.png", results),
            image("R^c before and after each update, by layer (Fig. 5, and CRATE-N)", f"{folder}/fig_5.png", results),
        )
    if fixed and (results / "layers.csv").exists():
        figure_2(fixed, read_csv(results / "layers.csv"), results / "figures" / "fig_2.png")
        caption = "SRR measure of every layer's output on training images, by epoch, mean over seeds (Figs. 2, 3)"
        text += section("Layer-wise SRR (Section 4.3)", image(caption, "figures/fig_2.png", results))
    if grid:
        text += section("The models of Section 5 (Table 4)", table_4(grid))
    text += section(
        "SRR as a complexity measure (Section 5; Tables 1, 5)",
        *correlations(results, "correlation", "gap in cross-entropy"),
        *correlations(results, "correlation_accuracy", "gap in accuracy"),
    )
    if fixed:
        what = "Validation accuracy in % after the last epoch, mean ± standard deviation over seeds; differences are paired by seed."
        text += section("SRR in the loss, last layer (Section 6, Table 2)", what + "\n", table_2(fixed))
        text += section("Output matrices (Table 3)", table_3(fixed))
        text += section("Which layer's SRR (Table 6)", table_6(fixed))
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
    parser.add_argument("--attention", default="results/attention_only", help="what attention_only.py wrote (default: %(default)s)")
    arguments = parser.parse_args()
    results = output_folder(arguments.results, "--results")
    if arguments.runs:
        collect(arguments.runs, results)
    write_report(results, arguments.attention)
    print(f"written to {results / 'REPORT.md'}")


if __name__ == "__main__":
    run(main)
