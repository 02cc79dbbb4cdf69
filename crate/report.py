"""REPORT.md out of run folders: `python -m crate.report runs/laptop`.

First the runs, RUNS/EXPERIMENT/RUN, become the tables runs.csv, layers.csv and operators.csv in --results. Then the tables
there, those of the other scripts too, and nothing else, become REPORT.md, claims.csv and figures/. Without RUNS the second half
alone is done: a report rebuilt from its tables. An experiment's folder says what it is:

    grid      Section 5's models (Table 4)             table2, table2-..   SRR in the loss, one data set each (Figs. 2, 3)
    table3    other output matrices                    table6              the SRR of other layers
    layers    twelve layers at initialisation          intervention        eta, --srr-layer, seed alone differ
    study     random settings
"""

import sys
from pathlib import Path

import pandas as pd

from crate import claims, figures
from crate.claims import mean_interval, with_interval
from crate.cli import InputError, Parser, markdown_table, one_line, path, run, write_text
from crate.compression import RULES
from crate.model import VARIANTS
from crate.page import write_page
from crate.runs import read_log, read_run

RUN = ["experiment", "run"]
NORMS = """Raw R^c grows with the tokens' norm, so a step that only stretches them raises it; the paper's numbers are raw. At
equal norm the tokens are scaled back to the Frobenius norm that they had before the step: their arrangement alone counts.
"""
ACCURACY = "Validation accuracy in % after the last epoch, mean ± standard deviation over seeds; differences paired by seed.\n"
RANKED = ["srr", "srr_lambda_0", *claims.NORM_MEASURES, "sum_of_spec_literal", "inverse_margin", "pacbayes_init"]
RANKED += ["pacbayes_flatness", "sharpness_flatness", "baseline_type", "baseline_lr", "baseline_steps"]
RANKS = """Kendall's tau with the gap in the loss (`gap`) and in accuracy: over all pairs of models, over those of one type, and
of one type and learning rate (within a factor of 1.25 where it is random). What the models of a pair share can't explain
the agreement that is left. In brackets 95 % bootstrap intervals over the models.
"""
INTERVENTION = """Only eta differs, and moves SRR. If SRR is what makes the gap, the gap follows it. SRR by eta: its difference
to eta = 0; slope: of the gap over SRR, along eta and, for comparison, among models of one type that nobody pushed.
"""


def collect(runs, results):
    """Write runs.csv, a row per finished run, to `results`; and of runs without SRR in the loss layers.csv and operators.csv.

    A run that can't be read is named on stderr and left out. Raises InputError where none is left.
    """
    tables = {"runs": [], "layers": [], "operators": []}
    for folder in sorted(file.parent for file in runs.glob("*/*/result.json")):
        where = {"experiment": folder.parent.name, "run": folder.name}
        try:
            (config, result), log = read_run(folder), read_log(folder)
            row = where | config | {"max_epochs": config["epochs"]} | result  # the result's epochs are those that it took
            row |= {
                "torch": config["versions"]["torch"],
                "processor": "{processor}, {cores} cores".format(**config["versions"]),
            }
            row["srr"] = pd.Series([parts["srr"] for parts in log[-1].get("srr") or []], dtype=float).mean()  # Eq. 11
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"left out: {one_line(error, folder)}", file=sys.stderr)
            continue
        tables["runs"].append({key: value for key, value in row.items() if not isinstance(value, (dict, list))})
        if config["srr_reg"] or not folder.parent.name.startswith(("table2", "table3", "layers")):
            continue
        for epoch in log:
            here = where | {"epoch": epoch["epoch"]}
            for images, key in (("train", "srr"), ("val", "srr_val")):
                for layer, parts in enumerate(epoch.get(key) or [], start=1):
                    tables["layers"].append(here | {"images": images, "layer": layer} | parts)
            for layer, points in enumerate(epoch.get("operators") or [], start=1):
                tables["operators"] += [here | {"layer": layer, "point": point} | parts for point, parts in points.items()]
    if not tables["runs"]:
        raise InputError(f"{runs}: no finished run there; name the folder above the experiments, such as runs/laptop")
    results.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (results / f"{name}.csv").unlink(missing_ok=True)
        if rows:
            digits = None if name == "runs" else "%.7g"  # float32 has no more
            write_text(results / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False, float_format=digits))


def section(title, *parts):
    return [f"## {title}\n", *parts]


def image(file, caption):
    return f"![{caption}]({file})\n\n*{caption}*\n"


def markdown(table, order):
    """A DataFrame in Markdown, its index first, whose first level is brought in order."""
    table = table.loc[[name for name in order if name in table.index.get_level_values(0)]].fillna("").reset_index()
    return markdown_table(table.columns, table.itertuples(index=False))


def spread(values):
    """Mean and standard deviation of a Series with one value per seed, as text."""
    values = values.dropna().astype(float)
    return f"{values.mean():.2f} ± {values.std():.2f} (n = {len(values)})".replace("± nan ", "") if len(values) else "-"


def estimate(values, form="+.2f"):
    """Mean and 95 % interval of a Series with one value per seed, as text."""
    return with_interval(*mean_interval(values), form)


def attention_table(rates):
    """R^c around the first step of each update rule, mean ± standard deviation over seeds, and after the last (Figs. 1, 5)."""
    columns = {"before": "R^c before layer 1", "after": "after it", "after_equal_norm": "after it, at equal norm"}
    table = rates[rates["layer"] == 1].groupby("rule")[[*columns]].agg(spread).rename(columns=columns)
    table["after the last layer"] = rates.groupby(["rule", "seed"])["after"].last().groupby("rule").agg(spread)
    titles = {rule: title for rule, (title, _) in RULES.items()}
    return markdown(table.rename(titles).rename_axis("update"), titles.values()) + "\n" + NORMS


def attention_section(results, runs):
    """Section 4.1: (claims, Markdown), as of all sections."""
    if not (results / "attention_only/rates.csv").exists():
        return [], []
    rates = pd.read_csv(results / "attention_only/rates.csv")
    return claims.attention_claims(rates), section(
        "Does a compression step lower R^c? (Section 4.1)", attention_table(rates),
        image("attention_only/fig_1a.png", "R^c around CRATE-C's attention step, by layer (Fig. 1a)"),
        image("attention_only/fig_1b.png", "The logarithm and its expansions (Fig. 1b)"),
        image("attention_only/fig_5.png", "R^c around each update, by layer (Fig. 5, and CRATE-N)"),
    )  # fmt: skip


def data_sets(runs):
    """(runs that belong together, words for them): table2 with table3, then table2-cifar100 and such alone."""
    for name in sorted(name for name in runs["experiment"].unique() if name.startswith("table2")):
        together = [name, "table3"] if name == "table2" else [name]
        yield runs[runs["experiment"].isin(together)], name.removeprefix("table2").replace("-", ", ", 1)


def layers_section(results, runs):
    """Section 4.3."""
    if not (results / "layers.csv").exists():
        return [], []
    found, parts, about = [], [], runs[[*RUN, "model", "seed", "width", "depth"]]
    layers, operators = (about.merge(pd.read_csv(results / f"{name}.csv"), on=RUN) for name in ("layers", "operators"))
    layers["when"] = [f"epoch {epoch}" if epoch else "at initialisation" for epoch in layers["epoch"]]
    layers["size"] = [f"d = {d}, L = {L}" for d, L in zip(layers["width"], layers["depth"])]

    def draw(name, caption, rows, panel, line, **options):
        figures.by_layer(rows.rename(columns={panel: "panel", line: "line"}), results / f"figures/{name}.png", **options)
        parts.append(image(f"figures/{name}.png", f"{caption}; mean over seeds, 95 % interval"))

    start = layers.query("experiment == 'layers' and epoch == 0 and images == 'train'")
    if len(start):
        draw("layers", "SRR of every layer's output at initialisation", start, "size", "model")
        start = start.query("width == width.min() and model in @claims.MAIN")
        found += claims.initial_claims(start, start["size"].iloc[0])
    for of_set, which in data_sets(runs):
        own = layers.merge(of_set[RUN]).query("experiment != 'table3'")
        main = own["model"].isin(claims.MAIN)
        own = own[main | ~main.any()]  # other types where none of the paper's are there
        train, val, name = own.query("images == 'train'"), own.query("images == 'val'"), "fig_2" + which.replace(", ", "-")
        draw(name, f"SRR of every layer's output on training images{which} (Figs. 2, 3)", train, "model", "when")
        draw(f"{name}_validation", f"The same on validation images{which}", val, "model", "when")
        three = {r"$\lambda ||Z||_0$": train["srr"] - train["rate_subspaces"] + train["rate"]}
        three |= {"$R^c$": train["rate_subspaces"], "$R$": train["rate"]}
        three = pd.concat(train.assign(part=part + ", " + train["model"], srr=nats) for part, nats in three.items())
        caption, columns = f"The parts of SRR on training images{which}", train["model"].nunique()
        draw(f"{name}_parts", caption, three, "part", "when", label="nats", columns=columns)

        own = operators.merge(of_set[RUN]).query("epoch > 0")
        own = own[own["epoch"] == own.groupby(RUN)["epoch"].transform("max")]
        # The points are in the order in which tokens pass them: an operator is named by the point behind it.
        before = own.groupby(["model", "seed", "layer"])["rate_subspaces"].shift()
        own = own.assign(after=own["rate_subspaces"] - before, after_equal_norm=own["rate_subspaces_equal_norm"] - before)
        own = own.dropna(subset="after").groupby(["model", "point", "seed"], sort=False)
        changes = own[["after", "after_equal_norm"]].mean()
        found += claims.course_claims(train, which) + claims.operator_claims(changes, which)
        table = changes.groupby(level=[0, 1], sort=False).agg(estimate).rename_axis(["trained model", "operator"])
        table.columns = [f"change of R^c in nats{which}, mean over layers and seeds, 95 % interval", "at equal norm"]
        named = {"compressed": "attention step", "normalised": "LayerNorm", "output": "ISTA (vit: MLP)"}
        parts += [markdown(table.rename(named), VARIANTS), NORMS]
    return found, section("Layer-wise SRR (Section 4.3)", *parts)


def table_4(grid):
    """The grid of Section 5, and how its runs ended (Table 4)."""
    axes = ["model", "batch_size", "lr", "width", "dropout"]
    lines = [[axis, ", ".join(map(str, sorted(grid[axis].unique())))] for axis in axes]
    missed = grid.loc[~grid["reached_target"].eq(True), "run"]
    lines += [["runs", len(grid)], ["missed the target", f"{len(missed)}: {', '.join(missed)}" if len(missed) else "none"]]
    for key in ("epochs", "val_accuracy", "gap"):
        lines.append([key, "{min:.4g} to {max:.4g}, median {50%:.4g}".format(**grid[key].describe())])
    return markdown_table(["", "values"], lines)


def rank_table(table):
    """tau of the measures that the paper speaks of, for both gaps: over all pairs and over matched ones."""
    columns = {"tau": "all pairs"} | claims.MATCHED
    lines = {}
    for row in table[table["measure"].isin(RANKED)].to_dict("records"):
        cells = lines.setdefault(row["measure"], {})
        cells |= {f"{row['gap']}: {words}": with_interval(*claims.interval_of(row, column), "+.2f")
                  for column, words in columns.items() if column in row}  # fmt: skip
    return markdown(pd.DataFrame.from_dict(lines, orient="index").rename_axis("measure"), RANKED)


def complexity_section(results, runs):
    """Section 5, and the study: what correlate.py left in `results`."""
    widths = sorted(int(folder.name.removeprefix("width=")) for folder in results.glob("correlation/width=*"))
    places = {f"d = {width}": f"correlation/width={width}" for width in widths}
    places |= {"all widths" if widths else "all models": "correlation", "random settings": "study_correlation"}
    tables, pages, grid = {}, [], runs[runs["experiment"] == "grid"]
    text = section("The models of Section 5 (Table 4)", table_4(grid)) if len(grid) else []
    captions = {"srr": "The gap against SRR", "forest": "tau of every measure: all pairs, and matched ones; 95 % intervals"}
    captions["scatter"] = "The gap against every measure (Figs. 4, 6)"
    for what, folder in places.items():
        if (results / folder / "correlation.csv").exists():
            tables[what] = pd.read_csv(results / folder / "correlation.csv")
            if "gap" not in tables[what]:
                raise InputError(f"{results / folder}/correlation.csv: no column gap; run correlate.py again")
            pages += [
                f"### {what}\n",
                rank_table(tables[what]),
                f"[All measures; psi of every axis]({folder}/correlation.md)\n",
            ]
            pages += [image(f"{folder}/{name}.png", f"{caption}, {what}") for name, caption in captions.items()
                      if (results / folder / f"{name}.png").exists()]  # fmt: skip
    if pages:
        text += section(
            "SRR as a complexity measure (Section 5; Tables 1, 5; beyond the paper, random settings)", RANKS, *pages
        )
    study, whole = ({name: tables.pop(name)} if name in tables else {} for name in ("random settings", "all widths"))
    return claims.rank_claims(tables, whole, study), text


def intervention_section(results, runs):
    """The runs in which eta moves SRR, beside the models that nobody pushed."""
    moved = runs[runs["experiment"] == "intervention"]
    found, parts = [], []
    if moved.empty:
        return [], []
    moved = moved[~moved["reached_target"].eq(False)].dropna(subset=["srr", "gap"])
    observed = claims.observed_slopes(results)
    best_known = claims.narrowest(observed)
    for layer in in_depth(moved.loc[moved["srr_reg"] != 0, "srr_layer"].unique()):
        own, figure = moved[(moved["srr_reg"] == 0) | (moved["srr_layer"] == layer)], f"figures/intervention_{layer}.png"
        srr, slopes = own.pivot(index=["model", "seed"], columns="srr_reg", values="srr"), claims.slopes(own)
        table = srr.drop(columns=0.0).sub(srr[0.0], axis=0).groupby("model").agg(estimate, "+.1f").add_prefix("SRR by eta = ")
        table["slope"] = slopes.agg(estimate, form="+.2g")
        figures.intervention(own, table["slope"].to_dict(), best_known, results / figure)
        caption = f"The gap against SRR where eta alone differs, --srr-layer {layer}; dashed: the slope where nobody pushed"
        slopes["mean over types"] = slopes.mean(axis=1, skipna=False)
        table.loc["mean over types", "slope"] = estimate(slopes["mean over types"], "+.2g")
        for what, slope in observed.items():
            table.loc[what, "slope"] = with_interval(*slope, "+.2g")
        parts += [f"### --srr-layer {layer}\n", markdown(table, table.index), image(figure, caption)]
        text = f"Beyond the paper: the gap follows SRR when the loss moves it, --srr-layer {layer}: slope"
        found += claims.over_seeds("5", text, +1, slopes)
    return found, section("Beyond the paper: does the gap follow SRR? (intervention)", INTERVENTION, *parts)


def in_depth(layers):
    """Values of --srr-layer in order: 1, 2, .. 10, .. all, last, random."""
    return sorted(layers, key=lambda layer: (not layer.isdecimal(), layer.zfill(4)))


def accuracies(runs, rows):
    """Validation accuracies in %: index (`rows`, seed), a column per eta, also for eta = 0."""
    table = 100 * runs.pivot(index=[rows, "seed"], columns="srr_reg", values="val_accuracy")
    return table.reindex(columns=table.columns.union([0.0]))


def accuracy_table(accuracy, gains, names, order):
    """Tables 2 and 6: a row per (model or layer, eta). gains: differences to eta = 0, paired by seed."""
    table = pd.DataFrame({"validation accuracy": accuracy.groupby(level=0).agg(spread).unstack()})
    table["difference to eta = 0, 95 % interval"] = gains.groupby(level=0).agg(estimate).unstack()
    table = table.swaplevel().rename_axis(names)
    return markdown(table[table["validation accuracy"] != "-"], order)


def regularisation_section(results, runs):
    """Section 6."""
    found, text = [], []
    for own, which in data_sets(runs):
        accuracy = accuracies(own, "model")
        plain = accuracy[0.0].unstack(0)  # a row per seed, a column per model
        gains = accuracy.drop(columns=0.0).sub(accuracy[0.0], axis=0).dropna(how="all")
        found += claims.accuracy_claims(gains, plain, which)
        if len(gains):
            table = accuracy_table(accuracy.loc[gains.index], gains, ["model", "eta"], VARIANTS)
            text += section(f"SRR of the last layer in the loss (Section 6, Table 2{which})", ACCURACY, table)
        table = own.groupby("model")[["parameters"]].first()
        table["validation accuracy"] = plain.agg(spread)
        table["difference to crate-c, 95 % interval"] = plain.sub(plain.get("crate-c", float("nan")), axis=0).agg(estimate)
        table["compression step"] = [VARIANTS[model].description for model in table.index]
        title = f"Output matrices (Table 3{which}), and models beyond the paper"
        text += section(title, ACCURACY, markdown(table, VARIANTS))
    own = runs[runs["experiment"] == "table6"]
    if len(own):
        plain = runs.query("experiment == 'table2' and srr_reg == 0 and model == 'crate-c'").set_index("seed")["val_accuracy"]
        accuracy = accuracies(own, "srr_layer").drop(columns=0.0)
        order, gains = in_depth(accuracy.index.unique(0)), accuracy.sub(100 * plain, axis=0, level="seed")
        table = accuracy_table(accuracy, gains, ["layer", "eta"], order)
        text += section("Which layer's SRR (Section 6, Table 6)", ACCURACY, table)
        for _, values in accuracy.items():
            found += claims.layer_choice_claims(values.unstack(0)[order])
    return found, text


def write_report(results):
    """REPORT.md, claims.csv and figures/, from the tables in `results`. Raises InputError where there are none."""
    runs = pd.DataFrame(columns=["experiment", "dataset", "model", "seed", "srr_reg", "srr_layer"])
    if (results / "runs.csv").exists():
        runs = pd.read_csv(results / "runs.csv", dtype={"srr_layer": str, "commit": str})
    compared = runs[runs["experiment"].astype(str).str.startswith(("table", "intervention"))]
    twice = compared[compared.duplicated(["experiment", "model", "seed", "srr_reg", "srr_layer"], keep=False)]
    if len(twice):
        names = f"{twice['experiment'].iloc[0]}: {', '.join(twice['run'][:2])}"
        raise InputError(f"{names}: same model, seed, srr_reg and srr_layer; move one to another experiment")
    found, text = [], []
    for part in attention_section, layers_section, complexity_section, intervention_section, regularisation_section:
        rows, of_part = part(results, runs)
        found, text = found + rows, text + of_part
    if not text:
        raise InputError(f"--results {results}: no table there to report; name RUNS, or run the earlier stages")
    table = pd.DataFrame(found, columns=["section", "claim", "claimed", "numbers", "n", "verdict"])
    write_text(results / "claims.csv", table.to_csv(index=False))
    table["verdict"] = "**" + table["verdict"] + "**"
    text = section("The claims on these runs", claims.RULE, markdown_table(table.columns, table.itertuples(index=False))) + text
    if len(runs):
        runs["command"], runs["commit"] = "`" + runs["command"] + "`", runs["commit"].fillna("unknown").str[:10]
        columns = ["experiment", "dataset", "command", "commit", "torch", "device", "processor"]
        table = runs.groupby(columns, sort=False)["seconds"].agg(["count", "sum"]).round().astype(int)
        table = table.set_axis(["runs", "seconds, summed"], axis=1).reset_index()
        text += section("Where the numbers come from", markdown_table(table.columns, table.itertuples(index=False)))
    title = "# Report: " + (", ".join(Path(name).name for name in runs["dataset"].unique()) or "no runs")
    write_text(results / "REPORT.md", "\n".join([title + "\n", *text]))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="?", type=path, metavar="RUNS", help="the folder above the experiments, such as runs/laptop")
    add("--results", type=path, metavar="FOLDER", help="of the tables and the report (default: RUNS/results)")
    add("--page", type=path, metavar="FOLDER", help="results/: write the numbers and figures of its README.md instead")
    arguments = parser.parse_args()
    if arguments.page:
        return write_page(arguments.page)
    if not (arguments.runs or arguments.results):
        raise InputError("name RUNS, such as runs/laptop, or --results with its tables")
    results = arguments.results or arguments.runs / "results"
    if arguments.runs:
        collect(arguments.runs, results)
    write_report(results)
    print(f"written to {results / 'REPORT.md'}")


if __name__ == "__main__":
    run(main)
