"""REPORT.md out of run folders: `python -m crate.report runs/laptop`.

First the runs, RUNS/EXPERIMENT/RUN, become the tables runs.csv, layers.csv and operators.csv in --results. Then the tables
there, those of the other scripts too, and nothing else, become REPORT.md, claims.csv and figures/. Without RUNS the second half
alone is done: a report rebuilt from its tables. An experiment's folder says what it is:

    grid      Section 5's models (Table 4)             table2, table2-..   SRR in the loss, one data set each (Figs. 2, 3)
    table3    other output matrices                    table6              the SRR of other layers
    layers    twelve layers at initialisation          intervention        eta, --srr-layer, seed alone differ
    study     random settings                          rate                random settings at one learning rate
    any other name: single runs, whose layer-wise SRR is drawn

What a data set is called in title and captions, if not by the name of its --dataset: datasets.json in --results.
"""

import sys
from pathlib import Path

import pandas as pd

from crate import claims, figures
from crate.claims import mean_interval, with_interval
from crate.cli import InputError, Parser, markdown_table, one_line, path, read_json, run, write_text
from crate.compression import RULES
from crate.model import VARIANTS
from crate.page import write_page
from crate.runs import read_log, read_run

RUN = ["experiment", "run"]
WITHOUT_LAYERS = ("grid", "study", "rate", "table6", "intervention")  # whose SRR of single layers nothing shows
OPERATORS = {"compressed": "attention step", "output": "ISTA (vit: MLP)"}  # by the point behind them
SHOWN = 12  # single runs of an experiment that are drawn
NORMS = """R^c grows with the tokens' norm, so a step that only stretches them raises it. At equal norm they are scaled back to
the Frobenius norm that they had before the step: their arrangement alone counts.
"""
RANKS = """Kendall's tau with the gap: psi of pairs of models that differ in one hyperparameter alone, Psi their mean, tau of
all pairs. What the models of a pair share can't explain their agreement: hence, in the plots, tau of pairs of one type, and of
one type and learning rate (within a factor of 1.25 where it is random). `srr_lambda_0` is R^c - R; the baselines are the mean
SRR of the type, the learning rate, the number of steps.
"""
INTERVENTION = """Only eta differs, and moves SRR. If SRR is what makes the gap, the gap follows it along eta. Slope where
nobody pushed (the surest is dashed): """
ACCURACY = "Validation accuracy in % after the last epoch, mean ± standard deviation over seeds; differences paired by seed.\n"


def is_single(experiment):
    """Whether no section is about this experiment, so that its runs are shown one by one."""
    return not experiment.startswith("table2") and experiment not in ("table3", "layers", *WITHOUT_LAYERS)


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
        if experiment in WITHOUT_LAYERS or (config["srr_reg"] and not is_single(experiment)):
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
    """runs.csv, with `data_set` and `size` in words; empty where there is none. Raises InputError for two runs of a setting."""
    runs = pd.DataFrame(columns=["experiment", "run", "dataset", "model", "seed", "width", "depth", "srr_reg", "srr_layer"])
    if (results / "runs.csv").exists():
        runs = pd.read_csv(results / "runs.csv", dtype={"experiment": str, "srr_layer": str, "commit": str})
    names = read_json(results / "datasets.json") if (results / "datasets.json").exists() else {}
    if not isinstance(names, dict):
        raise InputError(f'{results / "datasets.json"}: must be like {{"cifar10": "CIFAR-10, a copy"}}')
    runs["data_set"] = [names.get(name, Path(name).name) for name in runs["dataset"]]
    runs["size"] = [f"d = {width}" for width in runs["width"]]
    compared = runs[runs["experiment"].str.startswith(("table", "intervention"))]
    compared = compared.assign(experiment=compared["experiment"].replace("table3", "table2"))  # they share a table
    twice = compared[compared.duplicated(["experiment", "model", "seed", "srr_reg", "srr_layer"], keep=False)]
    if len(twice):
        names = f"{twice['experiment'].iloc[0]}: {', '.join(twice['run'][:2])}"
        raise InputError(f"{names}: same model, seed, srr_reg and srr_layer; move one to another experiment")
    return runs


def read_rows(results, name, runs):
    """layers.csv or operators.csv, with what their runs say of themselves; empty where there is none."""
    file = results / f"{name}.csv"
    rows = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=[*RUN, "epoch", "images"])
    rows = runs[[*RUN, "model", "seed", "width", "size"]].merge(rows, on=RUN)
    return rows.assign(when=[f"epoch {epoch}" if epoch else "at initialisation" for epoch in rows["epoch"]])


def about(runs):
    """What runs are of, in words."""
    return ", ".join([*runs["data_set"].unique(), *runs["size"].unique()])


def data_sets(runs):
    """(runs that belong together, words where there are several such sets, end of file names): table2 and table3, table2-.."""
    sets = {name: runs[runs["experiment"] == name] for name in sorted(set(runs["experiment"])) if name.startswith("table2")}
    told = [key for key in ("data_set", "size") if len({own[key].iloc[0] for own in sets.values()}) > 1]
    for name, own in sets.items():
        words = ", ".join(own[key].iloc[0] for key in told) or name * (len(sets) > 1)
        together = [name, "table3"] if name == "table2" else [name]
        yield runs[runs["experiment"].isin(together)], words, name.removeprefix("table2")


def section(title, *parts):
    return [f"## {title}\n", *parts] if parts else []


def image(file, caption):
    return f"![{Path(file).stem}]({file})\n\n*{caption}*\n"


def in_order(names):
    """Names in VARIANTS' order, those of other types behind them."""
    return sorted(set(names), key=lambda name: ([*VARIANTS, name].index(name), name))


def markdown(table, order):
    """A DataFrame in Markdown, its index first, whose first level is brought in order."""
    table = table.loc[[name for name in order if name in table.index.get_level_values(0)]].fillna("").reset_index()
    return markdown_table(table.columns, table.itertuples(index=False))


def spread(values):
    """Mean and standard deviation of a Series with one value per seed, as text."""
    values = values.dropna().astype(float)
    return f"{values.mean():.2f} ± {values.std():.2f}".removesuffix(" ± nan") if len(values) else "-"


def estimate(values, form="+.2f"):
    """Mean and 95 % interval of a Series with one value per seed, as text."""
    return with_interval(*mean_interval(values), form)


def attention_table(rates):
    """R^c around the first step of each update rule, mean ± standard deviation over seeds, and after the last (Figs. 1, 5)."""
    first, titles = rates[rates["layer"] == 1], {rule: title for rule, (title, _) in RULES.items()}
    columns = {"after": "R^c after layer 1", "after_equal_norm": "at equal norm"}
    table = first.groupby("rule")[[*columns]].agg(spread).rename(columns=columns)
    table["after the last layer"] = rates.groupby(["rule", "seed"])["after"].last().groupby("rule").agg(spread)
    before = first.groupby("seed")["before"].mean()
    text = f"Before layer 1 R^c is {spread(before)} nats ({len(before)} seeds). {NORMS}\n"
    return text + markdown(table.rename(titles).rename_axis("update"), titles.values())


def attention_section(results, runs):
    """Section 4.1: (claims, Markdown), as of all sections."""
    if not (results / "attention_only/rates.csv").exists():
        return [], []
    rates = pd.read_csv(results / "attention_only/rates.csv")
    return claims.attention_claims(rates), section(
        "Does a compression step lower R^c? (Section 4.1)", attention_table(rates),
        image("attention_only/fig_1a.png", "Fig. 1a. R^c around CRATE-C's attention step"),
        image("attention_only/fig_1b.png", "Fig. 1b. The logarithm and its expansions"),
        image("attention_only/fig_5.png", "Fig. 5. R^c around each update, and CRATE-N's"),
    )  # fmt: skip


def operator_table(changes, runs):
    """What attention and ISTA change R^c by in trained models. changes: see claims.operator_claims."""
    table = changes.groupby(level=[0, 1]).agg(estimate).unstack()
    table = pd.DataFrame({
        words + end: table[norm, point]
        for point, words in OPERATORS.items() for norm, end in (("after", ""), ("after_equal_norm", ", equal norm"))
    })  # fmt: skip
    text = f"Change of R^c, nats, mean over layers, {about(runs)} (LayerNorm's: operators.csv)\n\n"
    return text + markdown(table.rename_axis("trained"), in_order(table.index))


def layers_section(results, runs):
    """Section 4.3."""
    layers, operators = (read_rows(results, name, runs) for name in ("layers", "operators"))
    found, parts, course, changed = [], [], {}, {}

    def draw(name, caption, rows, panel, line, **options):
        figures.by_layer(rows.assign(panel=rows[panel], line=rows[line]), results / f"figures/{name}.png", **options)
        parts.append(image(f"figures/{name}.png", caption))

    layers = layers[layers["images"] == "train"]
    layers = layers.sort_values("model", key=lambda names: names.map(in_order(names).index), kind="stable")
    start = layers.query("experiment == 'layers' and epoch == 0")
    if len(start):
        what = about(runs[runs["experiment"] == "layers"])
        caption = f"Fig. 2, at initialisation. SRR of every layer's output, {what}; shaded: 95 % intervals"
        draw("layers", caption, start, "size", "model", sharey=False)
        start = start.query("width == width.min() and model in @claims.MAIN")
        found += claims.initial_claims(start, start["size"].iloc[0]) if len(start) else []
    for of_set, words, suffix in data_sets(runs):
        own = layers.merge(of_set[RUN])
        if len(own):
            course[words], figure = claims.course_claims(own), "Fig. 3" if "cifar100" in suffix else "Fig. 2"
            caption = f"{figure}. SRR of every layer's output on training images, {about(of_set)}"
            draw(f"fig_2{suffix}", caption, own, "model", "when", columns=4, sharey=False)
            ends = own[own["epoch"].isin([0, own["epoch"].max()]) & (own["model"] != "vit")]
            parts_of_srr = {r"$\lambda ||Z||_0$": ends["srr"] - ends["rate_subspaces"] + ends["rate"]}
            parts_of_srr |= {"$R^c$": ends["rate_subspaces"], "$R$": ends["rate"]}
            ends = pd.concat(ends.assign(part=f"{part}, " + ends["when"], srr=nats) for part, nats in parts_of_srr.items())
            if len(ends):
                draw(f"fig_2{suffix}_parts", f"{figure}: the parts, without vit", ends, "part", "model", label="nats")
        own = operators.merge(of_set[RUN]).query("epoch > 0")
        own = own[own["epoch"] == own.groupby(RUN)["epoch"].transform("max")]
        if len(own):
            # The points are in the order in which tokens pass them: an operator is named by the point behind it.
            before = own.groupby(["model", "seed", "layer"])["rate_subspaces"].shift()
            own = own.assign(after=own["rate_subspaces"] - before, after_equal_norm=own["rate_subspaces_equal_norm"] - before)
            changes = own.dropna(subset="after").groupby(["model", "point", "seed"])[["after", "after_equal_norm"]].mean()
            changed[words] = claims.operator_claims(changes)
            parts.append(operator_table(changes, of_set))
    return found + claims.over_sets(course) + claims.over_sets(changed), section("Layer-wise SRR (Section 4.3)", *parts)


def single_section(results, runs):
    """Runs of experiments that no other section is about."""
    text, layers = [], read_rows(results, "layers", runs).query("images == 'train'")
    for name, own in runs[runs["experiment"].map(is_single).eq(True)].groupby("experiment"):
        table = own.set_index("run")[["epochs", "val_accuracy", "gap", "gap_accuracy", "srr"]].map("{:.4g}".format)
        text += section(f"Runs of `{name}`", markdown(table.replace("nan", "-"), own["run"]))
        shown = layers.merge(own[RUN]).assign(panel=lambda rows: rows["run"], line=lambda rows: rows["when"])
        names = shown["run"].unique()
        if len(names):
            figures.by_layer(shown[shown["run"].isin(names[:SHOWN])], results / f"figures/runs_{name}.png")
            caption = f"SRR of every layer's output, {about(own)}; {len(names[:SHOWN])} of {len(names)} runs, all in layers.csv"
            text.append(image(f"figures/runs_{name}.png", caption))
    return [], text


def table_4(grid):
    """The grid of Section 5, and how its runs ended (Table 4)."""
    axes = ["model", "batch_size", "lr", "width", "dropout"]
    lines = [[axis, ", ".join(map(str, sorted(grid[axis].unique())))] for axis in axes]
    missed = grid.loc[~grid["reached_target"].eq(True), "run"]
    lines += [["runs", len(grid)], ["missed the target", f"{len(missed)}: {', '.join(missed)}" if len(missed) else "none"]]
    for key in ("epochs", "val_accuracy", "gap"):
        lines.append([key, "{min:.4g} to {max:.4g}, median {50%:.4g}".format(**grid[key].describe())])
    return f"**Table 4.** The models, {', '.join(grid['data_set'].unique())}\n\n" + markdown_table(["", "values"], lines)


def rank_table(table):
    """Tables 1 and 5: psi of every axis, Psi and tau of the paper's measures and the baselines, for the first gap."""
    table = table[table["gap"].eq(table["gap"].iloc[0])].set_index("measure")
    columns = [name for name in table if name.startswith("psi_")]
    return markdown(table[[*columns, "Psi", "tau"]].map("{:+.2f}".format), claims.MEASURES)


def complexity_section(results, runs):
    """Section 5, and the study: what correlate.py left in `results`."""
    widths = sorted(int(folder.name.removeprefix("width=")) for folder in results.glob("correlation/width=*"))
    places = {f"d = {width}": f"correlation/width={width}" for width in widths}
    places |= {"all widths" if widths else "all models": "correlation"}
    places |= {"random settings": "study_correlation", "one learning rate": "rate_correlation"}
    one_width, others, parts, grid = {}, {}, [], runs[runs["experiment"] == "grid"]
    data = ", ".join(grid["data_set"].unique())
    for what, folder in places.items():
        if not (results / folder / "correlation.csv").exists():
            continue
        table = pd.read_csv(results / folder / "correlation.csv")
        if "gap" not in table:
            raise InputError(f"{results / folder}/correlation.csv: no column gap; run correlate.py again")
        captions = {"forest": "tau of all pairs and of matched ones, 95 % intervals"}
        if what == "all models" or what in [f"d = {width}" for width in widths]:
            number, figure = (5, 6) if one_width else (1, 4)
            parts.append(f"**Table {number}.** {what}\n\n{rank_table(table)}")
            captions["scatter"], one_width[what] = f"Fig. {figure}. The gap against each measure, {data}", table
        else:
            captions["srr"], others[what] = "SRR and the gap", table
        if what == "one learning rate":  # there pairs of one type are also of one rate
            others[what] = table.rename(columns=lambda name: name.replace("tau_same_model", "tau_same_model_lr"))
        parts += [image(f"{folder}/{name}.png", f"{caption}, {what}") for name, caption in captions.items()
                  if (results / folder / f"{name}.png").exists()]  # fmt: skip
        parts.append(f"[All measures]({folder}/correlation.md)\n")
    parts = ([table_4(grid)] if len(grid) else []) + ([RANKS] if parts else []) + parts
    return claims.rank_claims(one_width, others), section("SRR as a complexity measure (Section 5)", *parts)


def accuracies(runs, rows):
    """Validation accuracies in %: index (`rows`, seed), a column per eta, also for eta = 0."""
    table = 100 * runs.pivot(index=[rows, "seed"], columns="srr_reg", values="val_accuracy")
    return table.reindex(columns=table.columns.union([0.0]))


def accuracy_table(accuracy, gains, order):
    """Tables 2 and 6: a row per model or layer. gains: differences to eta = 0, paired by seed."""
    table = accuracy.groupby(level=0).agg(spread).add_prefix("eta = ")
    table = table.join(gains.groupby(level=0).agg(estimate).add_prefix("difference, eta = "))
    return markdown(table.assign(seeds=gains.groupby(level=0).size()), order)


def in_depth(layers):
    """Values of --srr-layer in order: 1, 2, .. 10, .. all, last, random."""
    return sorted(layers, key=lambda layer: (not layer.isdecimal(), layer.zfill(4)))


def regularisation_section(results, runs):
    """Section 6."""
    decided, second, third, own = {}, [], [], runs[runs["experiment"] == "table6"]
    for of_set, words, _ in data_sets(runs):
        accuracy = accuracies(of_set, "model")
        plain = accuracy[0.0].unstack(0)  # a row per seed, a column per model
        gains = accuracy.drop(columns=0.0).sub(accuracy[0.0], axis=0).dropna(how="all")
        decided[words] = claims.accuracy_claims(gains, plain)
        if len(gains):
            table = accuracy_table(accuracy.loc[gains.index], gains, in_order(gains.index.get_level_values(0)))
            second.append(f"**Table 2.** SRR of the last layer in the loss, {about(of_set)}\n\n{table}")
        table = of_set.groupby("model")[["parameters"]].first()
        table.insert(0, "output matrix", [VARIANTS[model].output if model in VARIANTS else "" for model in table.index])
        table = table.assign(**{"validation accuracy": plain.agg(spread), "seeds": plain.count()})
        third.append(f"**Table 3.** Output matrices, {about(of_set)}\n\n{markdown(table, in_order(table.index))}")
    found, parts = claims.over_sets(decided), [*second, *third]
    if len(own):
        plain = runs.query("experiment == 'table2' and srr_reg == 0 and model == 'crate-c'").set_index("seed")["val_accuracy"]
        accuracy = accuracies(own, "srr_layer").drop(columns=0.0)
        order, gains = in_depth(accuracy.index.unique(0)), accuracy.sub(100 * plain, axis=0, level="seed")
        parts.append(f"**Table 6.** The SRR of other layers, {about(own)}\n\n{accuracy_table(accuracy, gains, order)}")
        for _, values in accuracy.items():
            found += claims.layer_choice_claims(values.unstack(0)[order])
    return found, section("SRR in the loss (Section 6)", *[ACCURACY] * bool(parts), *parts)


def intervention_section(results, runs):
    """The runs in which eta moves SRR, beside the models that nobody pushed."""
    everyone = runs[runs["experiment"] == "intervention"]
    if everyone.empty:
        return [], []
    moved = everyone[~everyone["reached_target"].eq(False)].dropna(subset=["srr", "gap"])
    observed = claims.observed_slopes(results)
    words = "; ".join(f"{with_interval(*slope, '+.2g')} ({what})" for what, slope in observed.items())
    left_out = len(everyone) - len(moved)  # missed the target, or have no SRR
    found, parts = [], [INTERVENTION + (words or "-") + (f". Left out: {left_out} runs.\n" if left_out else ".\n")]
    for layer in in_depth(moved.loc[moved["srr_reg"] != 0, "srr_layer"].unique()):
        own, figure = moved[(moved["srr_reg"] == 0) | (moved["srr_layer"] == layer)], f"figures/intervention_{layer}.png"
        slopes = claims.slopes(own)
        in_title = slopes.agg(estimate, form="+.2g").to_dict()
        figures.intervention(own, in_title, claims.narrowest(observed), results / figure)
        parts.append(image(figure, f"The gap against SRR where eta alone differs, {about(own)}, --srr-layer {layer}"))
        slopes["mean over types"] = slopes.mean(axis=1, skipna=False)
        text = f"{claims.BEYOND}the gap follows SRR when the loss moves it, --srr-layer {layer}: slope"
        found += claims.over_seeds("5", text, +1, slopes)
    return found, section("Beyond the paper: does the gap follow SRR? (intervention)", *parts)


def claims_section(runs, found):
    """The claims and their verdicts, and who is in none."""
    others = in_order(runs.loc[~runs["model"].isin(claims.TYPES), "model"])
    text = f"In tables and figures, but in no claim: {', '.join(others)}.\n" if others else ""
    parts = [claims.RULE.format(chance=0.05 * len(found), rows=len(found)) + text]
    for heading, rows in claims.in_order(found).items():
        lines = [
            [f"**{row['verdict']}**", f"{row['claim'].removeprefix(claims.BEYOND)} ({row['section']})",
             f"{row['numbers']} ({row['n']})"] for row in rows
        ]  # fmt: skip
        parts += [f"**{heading}.**\n", markdown_table(["verdict", "claim (section)", "numbers"], lines)]
    return section("The claims on these runs", *parts)


def provenance(runs):
    """What made the runs of each experiment."""
    made = (runs["torch"] + ", " + runs["device"] + ", " + runs["processor"]).unique()
    text = f"Each run: [runs.csv](runs.csv); its SRR on validation images: layers.csv. Made with torch {'; '.join(made)}.\n"
    rows = []
    for keys, own in runs.groupby(["experiment", "dataset"], sort=False):
        made = own["commit"].fillna("unknown").str.replace(r"^(\w{10})\w*", r"\1", regex=True)
        made = made + " / " + own["code"].fillna("unknown") if "code" in own else made
        rows.append([*keys, len(own), f"{own['seconds'].sum() / 3600:.2f}", ", ".join(made.unique())])
    table = markdown_table(["experiment", "--dataset", "runs", "hours", "commit / checksum of the code"], rows)
    return section("Where the numbers come from", text, table)


def write_report(results):
    """REPORT.md, claims.csv and figures/, from the tables in `results`. Raises InputError where there are none."""
    runs, found, text = read_runs(results), [], []
    sections = [attention_section, layers_section, complexity_section, regularisation_section, intervention_section]
    for part in (*sections, single_section):
        rows, of_part = part(results, runs)
        found, text = found + rows, text + of_part
    if not text:
        raise InputError(f"--results {results}: no table there to report; name RUNS, or run the earlier stages")
    table = pd.DataFrame(found, columns=["section", "claim", "claimed", "numbers", "n", "verdict"])
    write_text(results / "claims.csv", table.to_csv(index=False))
    title = "# Report: " + (", ".join(runs["data_set"].unique()) or "no runs") + "\n"
    before, behind = claims_section(runs, found) if found else [], provenance(runs) if len(runs) else []
    write_text(results / "REPORT.md", "\n".join([title, *before, *text, *behind]))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="?", type=path, metavar="RUNS", help="the folder above the experiments, such as runs/laptop, or of runs")
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
