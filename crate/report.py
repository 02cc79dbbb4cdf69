"""REPORT.md out of run folders: `python -m crate.report runs/laptop`.

First the runs, RUNS/EXPERIMENT/RUN, become the tables runs.csv, layers.csv and operators.csv in --results. Then the tables
there, those of the other scripts too, and nothing else, become REPORT.md, claims.csv and figures/. Without RUNS the second half
alone is done: a report rebuilt from its tables. An experiment's folder says what it is:

    grid      Section 5's models (Table 4)             table2, table2-..   SRR in the loss (Figs. 2, 3)
    table3    other output matrices                    table6              the SRR of other layers
    layers    twelve layers at initialisation          intervention        eta, --srr-layer, seed alone differ
    study     random settings                          one-lr              random settings at one learning rate
    any other name: single runs, whose layer-wise SRR is drawn

What a data set is called, if not by the name of its --dataset, says datasets.json in --results: {"cifar10": "a copy of it"}.
"""

import re
import sys
from pathlib import Path

import pandas as pd

from crate import claims, figures
from crate.claims import mean_interval, with_interval
from crate.cli import InputError, Parser, markdown_table, one_line, path, read_json, run, write_text
from crate.model import VARIANTS
from crate.runs import read_log, read_run

RUN = ["experiment", "run"]
PARTS = ["rate_subspaces", "rate_subspaces_equal_norm", "rate", "srr"]
WITHOUT_LAYERS = ("grid", "study", "one-lr", "table6", "intervention")  # the SRR of their single layers is shown nowhere
SHOWN = 12  # single runs of an experiment that are drawn
RANKS = """Kendall's tau with the gap: psi of pairs of models that differ in one hyperparameter alone, Psi their mean, tau of
all pairs. What the models of a pair share can't explain their agreement: hence, in the plots, tau of pairs of one type, and of
one type and learning rate (within a factor of 1.25 where it is random). `srr_lambda_0` is R^c - R; the baselines are the mean
SRR of the type, the learning rate, the number of steps. All measures, with intervals: correlation.md beside each figure.
"""
INTERVENTION = """Only eta differs, and moves SRR: if SRR makes the gap, the gap follows. Dashed: the slope where nobody pushed,
{observed:+.2g}. Left out, since they missed the target or have no SRR: {lost} runs.
"""
ACCURACY = "Validation accuracy in % after the last epoch, mean ± standard deviation over seeds; differences paired by seed.\n"


def part_of(experiment):
    """The part of the report that shows an experiment: its own name, "compared" (Tables 2, 3; Figs. 2, 3) or "single"."""
    if experiment.startswith("table2") or experiment == "table3":
        return "compared"
    return experiment if experiment in ("layers", *WITHOUT_LAYERS) else "single"


def collect(runs, results):
    """Write runs.csv, a row per finished run, to `results`; and of runs without SRR in the loss, and of single ones, layers.csv
    and operators.csv. A run that can't be read is named on stderr and left out. Raises InputError where none is left.
    """
    tables = {"runs": [], "layers": [], "operators": []}
    files = [file for depth in ("*/*", "*", ".") for file in runs.resolve().glob(f"{depth}/result.json")]
    for folder in sorted(file.parent for file in files):
        experiment = folder.parent.name
        where = {"experiment": experiment, "run": folder.name}
        try:
            (config, result), log = read_run(folder), read_log(folder)
            row = where | config | {"max_epochs": config["epochs"]} | result  # the result's epochs are those that it took
            row["torch"] = config["versions"]["torch"]
            row["processor"] = "{processor}, {cores} cores".format(**config["versions"])
            srr = pd.Series([parts["srr"] for parts in log[-1].get("srr") or []], dtype=float)
            row["srr"] = srr.mean(skipna=False)  # Eq. 11
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            print(f"left out: {one_line(error, folder)}", file=sys.stderr)
            continue
        tables["runs"].append({key: value for key, value in row.items() if not isinstance(value, (dict, list))})
        if experiment in WITHOUT_LAYERS or (config["srr_reg"] and part_of(experiment) != "single"):
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


def read_runs(results):
    """runs.csv, types and layers in order, with what a run is of in words: `data_set`, `size`, and `of` as short as can be.

    Raises InputError where there is none, and where two runs would be one number.
    """
    if not (results / "runs.csv").exists():
        raise InputError(f"--results {results}: no runs.csv there; name RUNS, such as runs/laptop")
    runs = pd.read_csv(results / "runs.csv", dtype={"experiment": str, "srr_layer": str, "commit": str})
    names = read_json(results / "datasets.json") if (results / "datasets.json").exists() else {}
    if not isinstance(names, dict):
        raise InputError(f'{results / "datasets.json"}: must be like {{"cifar10": "CIFAR-10, a copy"}}')
    runs["part"] = runs["experiment"].map(part_of)
    runs["data_set"] = [names.get(name, Path(name).name) for name in runs["dataset"]]
    runs["size"] = [f"d = {width}" for width in runs["width"]]
    runs["of"] = runs["size"] if runs["data_set"].nunique() == 1 else runs["data_set"] + ", " + runs["size"]
    alike = runs.assign(srr_layer=runs["srr_layer"].where(runs["part"] != "compared"))
    alike = alike.duplicated(["part", "of", "model", "seed", "srr_reg", "srr_layer"], keep=False)
    twice = runs[alike & runs["part"].isin(["compared", "layers", "table6", "intervention"])]
    if len(twice):
        names = f"{twice['experiment'].iloc[0]}: {', '.join(twice['run'][:2])}"
        raise InputError(f"{names}: same model, seed, srr_reg and size; move one to another experiment")
    types = in_order(runs["model"])
    layer = [(not name.isdecimal(), name.zfill(4)) for name in runs["srr_layer"]]  # 1, 2, .. 10, .. all, last, random
    order = runs.assign(model=runs["model"].map(types.index), srr_layer=layer)
    return runs.loc[order.sort_values(["data_set", "width", "model", "srr_layer", "srr_reg"], kind="stable").index]


def read_rows(results, name, runs):
    """layers.csv or operators.csv, with what their runs say of themselves; empty where there is none."""
    file = results / f"{name}.csv"
    rows = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=[*RUN, "epoch", "images", "layer", "point", *PARTS])
    rows = runs[[*RUN, "part", "model", "seed", "width", "data_set", "size", "of"]].merge(rows, on=RUN)
    return rows.assign(when=[f"epoch {epoch}" if epoch else "at initialisation" for epoch in rows["epoch"]])


def about(runs):
    """What runs are of, in words."""
    return ", ".join([*runs["data_set"].unique(), *runs["size"].unique()])


def section(title, *parts):
    return [f"## {title}\n", *parts] if parts else []


def image(file, caption):
    return f"![{Path(file).stem}]({file})\n\n*{caption}*\n"


def in_order(names):
    """Names in VARIANTS' order, those of other types behind them."""
    return sorted(set(names), key=lambda name: ([*VARIANTS, name].index(name), name))


def markdown(table):
    """A DataFrame in Markdown, its index first."""
    table = table.reset_index().rename(columns={"of": "models of", "srr_reg": "eta"})
    return markdown_table(table.columns, table.itertuples(index=False))


def mean_and_deviation(values):
    """Mean and standard deviation of a Series with one value per seed, as text."""
    values = values.dropna().astype(float)
    return f"{values.mean():.2f} ± {values.std():.2f}".removesuffix(" ± nan") if len(values) else "-"


def estimate(values, form="+.2f"):
    """Mean and 95 % interval of a Series with one value per seed, as text."""
    return with_interval(*mean_interval(values), form)


def attention_section(results, runs):
    """Section 4.1: (claims, Markdown), as of all sections."""
    if not (results / "attention_only/rates.csv").exists():
        return [], []
    found = claims.attention_claims(pd.read_csv(results / "attention_only/rates.csv"))
    captions = {
        "fig_1a": "Fig. 1a. R^c around CRATE-C's attention step; at equal norm: tokens scaled back to the norm before it",
        "fig_1b": "Fig. 1b. The logarithm and its expansions",
        "fig_5": "Fig. 5. R^c around each update, and CRATE-N's",
    }
    parts = [image(f"attention_only/{name}.png", caption) for name, caption in captions.items()]
    return found, section("Does a compression step lower R^c? (Section 4.1)", *parts)


def layers_section(results, runs):
    """Section 4.3."""
    layers, operators = (read_rows(results, name, runs) for name in ("layers", "operators"))
    layers = layers[layers["images"] == "train"]
    start, trained = layers.query("part == 'layers' and epoch == 0"), layers[layers["part"] == "compared"]
    changes = claims.operator_changes(operators[operators["part"] == "compared"])
    figures_of = {"layers": ("Fig. 2, at initialisation", start, "of", "model")}
    for of, own in trained.groupby("of", sort=False):
        figures_of["fig_2_" + re.sub("[^0-9A-Za-z]+", "_", of)] = "Figs. 2, 3", own, "model", "when"
    parts = []
    for name, (figure, own, panel, line) in figures_of.items():
        if len(own):
            figures.by_layer(own, panel, line, results / f"figures/{name}.png")
            caption = f"{figure}. SRR of every layer's output on training images, {about(own)}; shaded: 95 % intervals"
            parts.append(image(f"figures/{name}.png", caption))
    if len(changes):
        table = changes.xs("compressed", level="point").groupby(["of", "model"], sort=False).agg(estimate)
        table = table.rename(columns={"after": "change", "after_equal_norm": "at equal norm"})
        parts.append(f"What attention changes R^c by in trained models, nats, mean over layers\n\n{markdown(table)}")
    found = claims.initial_claims(start) + claims.course_claims(trained) + claims.operator_claims(changes)
    return found, section("Layer-wise SRR (Section 4.3)", *parts)


def single_section(results, runs):
    """Runs of experiments that no other section is about."""
    text, layers = [], read_rows(results, "layers", runs).query("images == 'train'")
    for name, own in runs[runs["part"] == "single"].groupby("experiment"):
        table = own.set_index("run")[["epochs", "val_accuracy", "gap", "gap_accuracy", "srr"]].map("{:.4g}".format)
        table = table.rename(columns={"srr": "SRR, mean over layers"}).replace("nan", "-")
        text += section(f"Runs of `{name}`", markdown(table))
        shown = layers[layers["experiment"] == name]
        names = shown["run"].unique()
        if len(names):
            shown = shown[shown["run"].isin(names[:SHOWN])]
            figures.by_layer(shown, "run", "when", results / f"figures/runs_{name}.png")
            caption = f"SRR of every layer's output, {about(own)}; {len(names[:SHOWN])} of {len(names)} runs, all in layers.csv"
            text.append(image(f"figures/runs_{name}.png", caption))
    return [], text


def table_4(grid, data):
    """The grid of Section 5 (Table 4)."""
    axes = ("model", "batch_size", "lr", "width", "dropout")
    lines = [[axis, ", ".join(map(str, sorted(grid[axis].unique())))] for axis in axes]
    lines += [["runs", len(grid)], ["missed the target, left out", (~grid["reached_target"].eq(True)).sum()]]
    return f"**Table 4.** The models, {data}\n\n" + markdown_table(["", "values"], lines)


def rank_table(table):
    """Tables 1 and 5: psi of every axis, Psi and tau of the paper's measures and the baselines, for the first gap."""
    table = table[table["gap"].eq(table["gap"].iloc[0])].set_index("measure")
    columns = [name for name in table if name.startswith("psi_")]
    shown = [name for name in claims.MEASURES if name in table.index]
    return markdown(table.loc[shown, [*columns, "Psi", "tau"]].map("{:+.2f}".format))


def complexity_section(results, runs):
    """Section 5, and the study: what correlate.py left in `results`."""
    widths = sorted(int(folder.name.removeprefix("width=")) for folder in results.glob("correlation/width=*"))
    one_width = {f"d = {width}": f"correlation/width={width}" for width in widths} or {"all models": "correlation"}
    others = {"all widths": "correlation"} if widths else {}
    others |= {"random settings": "study_correlation", "one learning rate": "one_lr_correlation"}
    found, parts, grid = ({}, {}), [], runs[runs["part"] == "grid"]
    data = ", ".join(grid["data_set"].unique())
    for what, folder in (one_width | others).items():
        if not (results / folder / "correlation.csv").exists():
            continue
        table = pd.read_csv(results / folder / "correlation.csv")
        if what == "one learning rate":  # there pairs of one type are also of one rate
            table = table.rename(columns=lambda name: name.replace("tau_same_model", "tau_same_model_lr"))
        found[what in others][what] = table
        parts.append(image(f"{folder}/forest.png", f"tau of all pairs and of matched ones, {what}"))
        if what in one_width:
            number, figure = (1, 4) if len(found[0]) == 1 else (5, 6)
            parts.insert(-1, f"**Table {number}.** {what}\n\n{rank_table(table)}")
            parts.append(image(f"{folder}/scatter.png", f"Fig. {figure}. The gap against each measure, {data}, {what}"))
    parts = ([table_4(grid, data)] if len(grid) else []) + ([RANKS] if parts else []) + parts
    return claims.rank_claims(*found), section("SRR as a complexity measure (Section 5)", *parts)


def with_gains(own, runs):
    """Runs, their accuracy in % as `points`, and their `gain` on that of the same type and seed without SRR in the loss."""
    keys = ["of", "model", "seed"]
    plain = runs[(runs["part"] == "compared") & (runs["srr_reg"] == 0)].set_index(keys)["val_accuracy"].rename("plain")
    own = own.join(plain, on=keys)
    gain = (own["val_accuracy"] - own["plain"]).where(own["srr_reg"] != 0)
    return own.assign(points=100 * own["val_accuracy"], gain=100 * gain)


def regularisation_section(results, runs):
    """Section 6."""
    second, sixth = (with_gains(runs[runs["part"] == part], runs) for part in ("compared", "table6"))
    plain = second[second["srr_reg"] == 0].copy()
    gains = second.dropna(subset="gain").set_index(["srr_reg", "seed", "of", "model"])["gain"]
    found, parts = claims.accuracy_claims(plain.set_index(["seed", "of", "model"])["points"], gains), []
    pushed = second[second.groupby(["of", "model"])["srr_reg"].transform("any")]
    plain["output matrix"] = [VARIANTS[model].output if model in VARIANTS else "" for model in plain["model"]]
    for title, own, *keys in (
        ("Table 2.** SRR of the last layer in the loss", pushed, "model", "srr_reg"),
        ("Table 3.** Output matrices", plain, "model", "output matrix", "parameters"),
        ("Table 6.** The SRR of other layers in the loss", sixth, "model", "srr_reg", "srr_layer"),
    ):
        if len(own):
            table = own.groupby(["of", *keys], sort=False)
            table = table.agg(accuracy=("points", mean_and_deviation), difference=("gain", estimate), seeds=("seed", "size"))
            table = table if "srr_reg" in keys else table.drop(columns="difference")
            table = table if own["of"].nunique() > 1 else table.droplevel("of")
            parts.append(f"**{title}, {about(own)}\n\n{markdown(table)}")
    for _, own in sixth.groupby(["of", "model", "srr_reg"]):
        found += claims.layer_choice_claims(own.set_index(["seed", "srr_layer"])["points"])
    return found, section("SRR in the loss (Section 6)", *[ACCURACY] * bool(parts), *parts)


def intervention_section(results, runs):
    """The runs in which eta moves SRR, beside the models that nobody pushed."""
    everyone = runs[runs["part"] == "intervention"]
    moved = everyone[~everyone["reached_target"].eq(False)].dropna(subset=["srr", "gap"])
    observed, slopes, drawn = claims.observed_slope(results), {}, {}
    for (of, layer), own in moved[moved["srr_reg"] != 0].groupby(["of", "srr_layer"], sort=False):
        plain = moved[(moved["srr_reg"] == 0) & (moved["of"] == of)]
        of_types = claims.slopes(pd.concat([plain, own]))
        of_types["mean over types"] = of_types.mean(axis=1, skipna=False)
        title = f"{of}, --srr-layer {layer}"
        slopes |= {f"{title}: {model}": values for model, values in of_types.items()}
        means = plain.groupby("model")[["srr", "gap"]].mean().mean()
        drawn[title] = claims.changes(plain, own), observed * means["srr"] / means["gap"]
    if not drawn:
        return [], []
    figures.pushed(drawn, results / "figures/intervention.png")
    found = claims.over_seeds("5", claims.BEYOND + "the gap follows SRR when the loss moves it: slope", +1, slopes)
    return found, section(
        "Beyond the paper: does the gap follow SRR? (intervention)",
        INTERVENTION.format(observed=observed, lost=len(everyone) - len(moved)),
        image("figures/intervention.png", f"The gap against SRR where eta alone differs, {about(moved)}"),
    )


def claims_section(runs, found):
    """The claims and their verdicts, and who is in none."""
    others = in_order(runs.loc[~runs["model"].isin(claims.TYPES), "model"])
    text = f"Of all claims in those of rank correlations alone: {', '.join(others)}.\n" if others else ""
    numbers = [row["numbers"].count(";") + 1 if row["n"].endswith("models") else 1 for row in found]  # each, or all, at 95 %
    rule = claims.RULE.format(chance=sum(1 - 0.95**count for count in numbers), rows=len(found))
    parts = []
    for heading, rows in claims.by_verdict(found).items():
        lines = [
            [f"**{row['verdict']}**", f"{row['claim'].removeprefix(claims.BEYOND)} ({row['section']})",
             f"{row['numbers']} ({row['n']})"] for row in rows
        ]  # fmt: skip
        parts += [f"**{heading}.**\n", markdown_table(["verdict", "claim (section)", "numbers"], lines)]
    return section("The claims on these runs", *parts, rule + text)


def provenance(runs):
    """What made the runs."""
    made = (runs["torch"] + ", " + runs["device"] + ", " + runs["processor"]).unique()
    commits = sorted(runs["commit"].fillna("unknown").str.replace(r"^(\w{10})\w*", r"\1", regex=True).unique())
    text = f"{len(runs)} runs, {runs['seconds'].sum() / 3600:.1f} hours, torch {'; '.join(made)}; commits {', '.join(commits)}."
    text += " Each run and its command: [runs.csv](runs.csv); its SRR on validation images: layers.csv.\n"
    return section("Where the numbers come from", text)


def write_report(results):
    """REPORT.md, claims.csv and figures/, from the tables in `results`. Raises InputError where there are none."""
    runs, found, text = read_runs(results), [], []
    sections = [attention_section, layers_section, complexity_section, regularisation_section, intervention_section]
    for part in (*sections, single_section):
        rows, of_part = part(results, runs)
        found, text = found + rows, text + of_part
    table = pd.DataFrame(found, columns=["section", "claim", "claimed", "numbers", "n", "verdict"])
    write_text(results / "claims.csv", table.to_csv(index=False))
    title = "# Report: " + (", ".join(runs["data_set"].unique())) + "\n"
    before = claims_section(runs, found) if found else []
    write_text(results / "REPORT.md", "\n".join([title, *before, *text, *provenance(runs)]))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="?", type=path, metavar="RUNS", help="the folder above the experiments, such as runs/laptop, or of runs")
    add("--results", type=path, metavar="FOLDER", help="of the tables and the report (default: RUNS/results)")
    arguments = parser.parse_args()
    if not (arguments.runs or arguments.results):
        raise InputError("name RUNS, such as runs/laptop, or --results with its tables")
    results = arguments.results or arguments.runs / "results"
    if arguments.runs:
        collect(arguments.runs, results)
    write_report(results)
    print(f"written to {results / 'REPORT.md'}")


if __name__ == "__main__":
    run(main)
