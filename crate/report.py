"""REPORT.md out of run folders: `python -m crate.report runs/laptop`.

First the runs, RUNS/EXPERIMENT/RUN, become the tables runs.csv, layers.csv and operators.csv in --results. Then the tables
there, those of the other scripts too, and nothing else, become REPORT.md, claims.csv and figures/. Without RUNS the second half
alone is done: a report rebuilt from its tables. What the report wrote before goes. An experiment's folder says what it is:

    grid      Section 5's models (Table 4)             table2, table2-..   SRR in the loss, one data set each (Figs. 2, 3)
    table3    other output matrices                    table6              the SRR of other layers
    layers    twelve layers at initialisation          intervention        eta, --srr-layer, seed alone differ
    study     random settings
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from crate import claims, figures
from crate.cli import InputError, Parser, one_line, path, run
from crate.compression import RULES
from crate.files import markdown_table, write_text
from crate.model import VARIANTS
from crate.runs import DEFAULTS, read_log, read_run
from crate.statistics import holm

RUN = ["experiment", "run"]
COLUMNS = {  # that the report needs of a table
    "runs": "experiment run model dataset width depth batch_size lr dropout srr_reg srr_layer seed parameters epochs "
    "reached_target val_accuracy gap srr seconds command commit torch device processor",
    "layers": "experiment run epoch images layer rate_subspaces rate srr",
    "operators": "experiment run epoch layer point rate_subspaces rate_subspaces_equal_norm",
    "rates": "rule seed layer before after after_equal_norm overflow",
    "measures": "model",
    "study_measures": "model",
    "correlation": "measure models tau tau_low tau_high p_value",
    "claims": "section claim note claimed number low high verdict",
}
CLAIM = {"section": "section", "claim": "claim: the number that decides it", "claimed": "claimed"}  # as headed in the report
SRR = r"SRR measure, $\lambda ||Z||_0 + R^c - R$"
OPERATORS = {"compressed": "attention step", "normalised": "LayerNorm", "output": "ISTA (vit: MLP)"}

NORMS = """Raw R^c grows with the tokens' norm, so a step that only stretches them raises it; the paper's numbers are raw. At
equal norm the tokens are scaled back to the Frobenius norm that they had before the step: their arrangement alone counts.
"""
ACCURACY = "Validation accuracy in % after the last epoch, mean ± standard deviation over seeds; differences paired by seed.\n"
# What the paper says, beside what the runs say.
PAPER = {
    "4.1": "The paper: the exact gradient (a) lowers R^c at every layer, (b), (d) and (e) raise it.\n",
    "4.3": """The paper: at initialisation SRR falls over about the first 9 of 12 layers, then rises; with training it rises at
every layer, but for a rare exception in the last layers of CRATE-C. That the ReLU compresses is its conjecture.
""",
    "5": """The paper: at the smaller width SRR has the highest tau (0.445) and wins on the model-type axis; products and sums
of norms and path-norm correlate negatively, 1/margin and PAC-Bayes flatness positively and strongly. At the larger width SRR
is slightly best, below PAC-Bayes flatness on dropout and model type.
""",
    "study": "Beyond the paper: settings drawn at random, each run with a seed of its own, ranked within model types.\n",
    "intervention": "Beyond the paper: only eta differs, and moves SRR. If SRR is what makes the gap, the gap follows it.\n",
    "2": "The paper: every variant gains on both data sets with SRR of the last layer alone, at eta = 0.001.\n",
    "3": "The paper: CRATE-N beats CRATE-C; CRATE-T nearly closes the gap to CRATE with no extra parameter.\n",
    "6": "The paper: a random layer is worse than a fixed one; shallower layers may gain more.\n",
}


def rows_of(folder):
    """What a finished run adds to the tables, {table: rows}; layer-wise rates only without SRR in the loss."""
    (config, result), log = read_run(folder), read_log(folder)
    where = {"experiment": folder.parent.name, "run": folder.name}
    row = where | {key: config[key] for key in (*DEFAULTS, "preset", "device", "amp", "parameters", "commit", "command")}
    row["max_epochs"] = row["epochs"]  # the result's epochs are those that it took
    row |= {key: value for key, value in result.items() if not isinstance(value, (str, list))}
    row |= {"torch": config["versions"]["torch"], "processor": "{processor}, {cores} cores".format(**config["versions"])}
    row["srr"] = pd.Series([parts["srr"] for parts in log[-1].get("srr") or []], dtype=float).mean()  # Eq. 11, at the end
    tables = {"runs": [row], "layers": [], "operators": []}
    if config["srr_reg"] or not folder.parent.name.startswith(("table2", "table3", "layers")):
        return tables
    for epoch in log:
        here = where | {"epoch": epoch["epoch"]}
        for images, key in (("train", "srr"), ("val", "srr_val")):
            for layer, parts in enumerate(epoch.get(key) or [], start=1):
                tables["layers"].append(here | {"images": images, "layer": layer} | parts)
        for layer, points in enumerate(epoch.get("operators") or [], start=1):
            tables["operators"] += [here | {"layer": layer, "point": point} | parts for point, parts in points.items()]
    return tables


def collect(runs, results):
    """Write runs.csv (a row per finished run), layers.csv and operators.csv to `results`.

    A run that can't be read is named on stderr and left out. Raises InputError where none is left.
    """
    tables = {"runs": [], "layers": [], "operators": []}
    for folder in sorted(file.parent for file in runs.glob("*/*/result.json")):
        try:
            for name, rows in rows_of(folder).items():
                tables[name] += rows
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"no {error} in its files" if isinstance(error, KeyError) else error
            print(f"left out: {one_line(reason, folder)}", file=sys.stderr)
    if not tables["runs"]:
        raise InputError(f"{runs}: no finished run there; name the folder above the experiments, such as runs/laptop")
    results.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        table = pd.DataFrame(rows, columns=None if rows else COLUMNS[name].split())
        digits = None if name == "runs" else "%.7g"  # float32 has no more
        write_text(results / f"{name}.csv", table.to_csv(index=False, float_format=digits))


def read_table(file):
    """The CSV `file`, or a table without rows where there is none. Raises InputError where columns are missing."""
    columns = COLUMNS[file.stem].split()
    if not file.exists():
        return pd.DataFrame(columns=columns)
    table = pd.read_csv(file, dtype=dict.fromkeys(("srr_layer", "commit", "section", "note"), str))
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{file}: has no column {', '.join(missing)}; make it anew")
    return table


def section(title, about, *parts):
    """A section in Markdown, a list; an empty one where all its parts are empty. `about` says what the paper says."""
    return [f"## {title}\n", *filter(None, (about, *parts))] if any(parts) else []


def image(results, name, caption):
    """Markdown of the figure `name` in `results`, or nothing where it wasn't drawn."""
    return f"![{caption}]({name})\n\n*{caption}*\n" if (results / name).exists() else ""


def markdown(table, order):
    """A DataFrame in Markdown, its index first, whose first level is brought in order; nothing where it has no rows."""
    table = table.loc[[name for name in order if name in table.index.get_level_values(0)]].reset_index()
    return markdown_table(table.columns, table.itertuples(index=False)) if len(table) else ""


def spread(values):
    """Mean and standard deviation of a Series with one value per seed, as text."""
    values = values.dropna()
    if len(values) < 2:
        return f"{values.iloc[0]:.2f} (n = 1)" if len(values) else "-"
    return f"{values.mean():.2f} ± {values.std():.2f} (n = {len(values)})"


def with_interval(number, low, high, form="+.2f"):
    """A number and its interval, if it has one, as text."""
    if not np.isfinite(low):
        return f"{number:{form}}" if np.isfinite(number) else "-"
    return f"{number:{form}} [{low:{form}}, {high:{form}}]"


def attention_table(rates):
    """R^c around the steps of each update rule, raw and at equal norm, mean ± standard deviation over seeds (Figs. 1, 5)."""
    rates, lines = rates.astype(dict.fromkeys(("before", *claims.NORMS), float)), []
    for rule, (title, _) in RULES.items():
        own = rates[rates["rule"] == rule]
        first, last = own[own["layer"] == 1], own.dropna(subset="after").groupby("seed").last()
        cells = [spread(first[column]) for column in ("before", *claims.NORMS)] + [spread(last["after"])]
        for norm in claims.NORMS:
            change = own[norm] - own["before"]
            cells.append(f"{(change > claims.ROUNDING * own['before']).sum()} of {change.count()}")
        overflow = own.loc[own["overflow"].astype(bool), "layer"]
        lines.append([title, *cells, overflow.min() if len(overflow) else "never"])
    header = ["update", "R^c before layer 1", "after it", "at equal norm", "after the last layer"]
    return markdown_table([*header, "steps that raise R^c", "at equal norm", "overflow at layer"], lines) + "\n" + NORMS


def attention_section(results):
    """Section 4.1: (claims, Markdown)."""
    rates = read_table(results / "attention_only/rates.csv")
    parts = [attention_table(rates) if len(rates) else ""]
    parts.append(image(results, "attention_only/fig_1a.png", "R^c around CRATE-C's attention step, by layer (Fig. 1a)"))
    parts.append(image(results, "attention_only/fig_1b.png", "The logarithm and its expansions (Fig. 1b)"))
    parts.append(image(results, "attention_only/fig_5.png", "R^c around each update, by layer (Fig. 5, and CRATE-N)"))
    text = section("Does a compression step lower R^c? (Section 4.1)", PAPER["4.1"], *parts)
    return claims.attention_claims(rates), text


def data_sets(runs):
    """{experiment: (words for it, experiments that belong together)} of table2 and those such as table2-cifar100."""
    others = sorted(name for name in set(runs["experiment"]) if name.startswith("table2") and name != "table2")
    others = {name: (", " + name.removeprefix("table2").strip("-_"), [name]) for name in others}
    return {"table2": ("", ["table2", "table3"])} | others


def layers_section(results, runs):
    """Section 4.3: (claims, Markdown)."""
    about, found, parts = runs[[*RUN, "model", "seed", "width", "depth"]], [], []
    layers, operators = (about.merge(read_table(results / f"{name}.csv"), on=RUN) for name in ("layers", "operators"))
    layers["when"] = [f"epoch {epoch}" if epoch else "at initialisation" for epoch in layers["epoch"]]
    layers["size"] = [f"d = {d}, L = {L}" for d, L in zip(layers["width"], layers["depth"])]

    def draw(name, caption, rows, panel, line, value="srr", **options):
        groups = rows.groupby([panel, line, "layer"], sort=False)[value]
        means = [(*key, *claims.mean_interval(values)) for key, values in groups]
        means = pd.DataFrame(means, columns=["panel", "line", "layer", "mean", "low", "high"])
        figures.by_layer(means, results / f"figures/{name}.png", **options)
        parts.append(image(results, f"figures/{name}.png", f"{caption}; mean over seeds, 95 % interval"))

    initial = layers.query("epoch == 0 and images == 'train'")
    start = initial.query("experiment == 'layers'")
    draw("layers", "SRR of every layer's output at initialisation", start, "size", "model", label=SRR, colours=figures.COLOURS)
    start = start if len(start) else initial.query("experiment == 'table2'")
    start = start.query("width == width.min() and model in @claims.MAIN")
    if len(start):
        found += claims.initial_claims(start, "{size}, {experiment}".format(**start.iloc[0]))
    for experiment, (which, together) in data_sets(runs).items():
        own = layers.query("experiment == @experiment and model in @claims.MAIN")
        train, val = own.query("images == 'train'"), own.query("images == 'val'")
        name = "fig_2" + experiment.removeprefix("table2")
        draw(name, f"SRR of every layer's output on training images{which} (Figs. 2, 3)", train, "model", "when", label=SRR)
        draw(f"{name}_validation", f"The same on validation images{which}", val, "model", "when", label=SRR)
        three = {r"$\lambda ||Z||_0$": train["srr"] - train["rate_subspaces"] + train["rate"]}
        three |= {"$R^c$": train["rate_subspaces"], "$R$": train["rate"]}
        three = pd.concat(train.assign(part=part + ", " + train["model"], nats=nats) for part, nats in three.items())
        caption = f"The parts of SRR on training images{which}"
        draw(f"{name}_parts", caption, three, "part", "when", "nats", label="nats", columns=train["model"].nunique())
        trained = operators.query("epoch > 0 and experiment in @together")
        changes = claims.operator_changes(trained[trained["epoch"] == trained.groupby(RUN)["epoch"].transform("max")])
        found += claims.course_claims(train, which) + claims.operator_claims(changes, which)
        table = changes.groupby(level=[0, 1], sort=False).agg(spread).rename_axis(["trained model", "operator"])
        table = table.set_axis([f"change of R^c in nats{which}, mean over layers", "at equal norm"], axis=1)
        parts += [markdown(table.rename(OPERATORS), VARIANTS), NORMS if len(table) else ""]
    return found, section("Layer-wise SRR (Section 4.3)", PAPER["4.3"], *parts)


def table_4(grid):
    """The grid of Section 5, and how its runs ended (Table 4)."""
    lines = [["model", ", ".join(grid["model"].unique())]]
    lines += [[axis, ", ".join(map(str, sorted(grid[axis].unique())))] for axis in ("batch_size", "lr", "width", "dropout")]
    missed = grid.loc[~grid["reached_target"].eq(True), "run"]
    lines += [["runs", len(grid)], ["reached the target", len(grid) - len(missed)]]
    for key in ("epochs", "val_accuracy", "gap"):
        lines.append([key, "{min:.4g} to {max:.4g}, median {50%:.4g}".format(**grid[key].describe())])
    return markdown_table(["", "values"], lines) + (f"\nMissed the target: {', '.join(missed)}\n" if len(missed) else "")


def ranks(results, places):
    """What correlate.py left in `results`: (claims, Markdown). places: (folder, words for it, claims to look for, width)."""
    found, parts = [], []
    for folder, what, wanted, width in places:
        found += claims.rank_claims(read_table(results / folder / "correlation.csv"), wanted, what, width)
        text = results / folder / "correlation.md"
        if text.exists():
            parts.append(f"### {what}\n\n{text.read_text()}")
        for name, caption in {
            "srr": "The gap against SRR",
            "forest": "Kendall's tau of every measure: all pairs, within and between model types; 95 % bootstrap intervals",
            "scatter": "The gap against every measure (Figs. 4, 6)",
        }.items():
            parts.append(image(results, f"{folder}/{name}.png", f"{caption}, {what}"))
    return found, parts


def complexity_section(results, runs):
    """Section 5, the study and the intervention: (claims, Markdown)."""
    widths = sorted(int(folder.name.removeprefix("width=")) for folder in results.glob("correlation/width=*"))
    places = [(f"correlation/width={width}", f"d = {width}", claims.OF_THE_LARGER_WIDTH, "larger width") for width in widths]
    places.append(("correlation", "all models", claims.ACROSS_WIDTHS if len(widths) > 1 else [], ""))
    places[0] = (*places[0][:2], claims.OF_THE_SMALLER_WIDTH, "smaller width")  # also where there is only one
    found, parts = ranks(results, places)
    grid = runs[runs["experiment"] == "grid"]
    text = section("The models of Section 5 (Table 4)", "", table_4(grid) if len(grid) else "")
    text += section("SRR as a complexity measure (Section 5; Tables 1, 5)", PAPER["5"], *parts)
    of_study, parts = ranks(results, [("study_correlation", "random settings", claims.OF_THE_STUDY, "")])
    text += section("Does SRR rank models of one type? (study)", PAPER["study"], *parts)
    about, parts = intervention(results, runs)
    text += section("Does the gap follow SRR? (intervention)", PAPER["intervention"], *parts)
    return found + of_study + about, text


def intervention(results, runs):
    """The runs in which eta moves SRR, beside the models that nobody pushed: (claims, Markdown)."""
    moved = runs_of(runs, ["intervention"], ["model", "seed", "srr_reg", "srr_layer"]).dropna(subset=["srr", "gap"])
    moved, observed, found, parts = moved[~moved["reached_target"].eq(False)], [], [], []
    if moved.empty:
        return found, parts
    for name, what in ("measures", "grid"), ("study_measures", "random settings"):
        models = read_table(results / f"{name}.csv").reindex(columns=["model", "width", "reached_target", "srr", "gap"])
        models = models.query("model in @claims.MAIN and reached_target != False").dropna(subset=["width", "srr", "gap"])
        models = models[models["width"] == models["width"].min()]
        observed += claims.observed_slopes(models, f"{what}, d = {models['width'].min()}")
    best_known = min(observed, key=lambda row: row["high"] - row["low"], default={"number": None})
    for which, own in claims.by_lever(moved).items():
        by_model = claims.slopes(own).dropna().groupby("model")
        slopes = {model: with_interval(*claims.mean_interval(values), ".2g") for model, values in by_model}
        name = f"figures/intervention{which.replace(', ', '_').replace(' ', '_')}.png"
        figures.intervention(own, slopes, best_known["number"], results / name)
        caption = f"The gap against SRR where eta alone differs{which}, a line per seed; slope: mean over seeds, 95 % interval"
        caption += f"; dashed: the slope among models of one type ({best_known['note']})" if observed else ""
        parts.append(image(results, name, caption))
        found += claims.intervention_claims(own, which)
    return observed + found, parts


def runs_of(runs, experiments, columns):
    """The runs of the experiments. Raises InputError where two agree in all `columns`: one of them doesn't belong there."""
    own = runs[runs["experiment"].isin(experiments)]
    twice = own.loc[own.duplicated(columns, keep=False), "run"]
    if len(twice):
        raise InputError(f"{experiments[0]}: {', '.join(twice[:2])}: same {', '.join(columns)}; move one to another experiment")
    return own


def accuracies(runs, experiments, rows):
    """Validation accuracies in % of the experiments' runs: index (`rows`, seed), a column per eta, also for eta = 0."""
    own = runs_of(runs, experiments, [rows, "seed", "srr_reg"])
    table = 100 * own.pivot(index=[rows, "seed"], columns="srr_reg", values="val_accuracy").astype(float)
    return table.reindex(columns=table.columns.union([0.0]))


def accuracy_table(accuracy, gains, names, order):
    """Tables 2 and 6: a row per (model or layer, eta). gains: differences to eta = 0, paired by seed."""
    differences = gains.groupby(level=0).agg(lambda values: with_interval(*claims.mean_interval(values.dropna())))
    table = pd.DataFrame({"validation accuracy": accuracy.groupby(level=0).agg(spread).unstack()})
    table["difference to eta = 0, 95 % interval"] = differences.unstack()
    table = table.swaplevel().rename_axis(names).fillna("")
    return markdown(table[table["validation accuracy"] != "-"], order)


def regularisation_section(runs):
    """Section 6: (claims, Markdown)."""
    found, text, plain = [], [], {}
    for experiment, (which, together) in data_sets(runs).items():
        accuracy = accuracies(runs, together, "model")
        plain[experiment] = accuracy[0.0].unstack(0)  # a row per seed, a column per model
        gains = accuracy.drop(columns=0.0).sub(accuracy[0.0], axis=0).dropna(how="all")
        found += claims.gain_claims(gains, which) + claims.model_claims(plain[experiment], which)
        table = accuracy_table(accuracy.loc[gains.index], gains, ["model", "eta"], VARIANTS)
        text += section(f"SRR of the last layer in the loss (Section 6, Table 2{which})", ACCURACY + PAPER["2"], table)
        table = runs[runs["experiment"].isin(together)].groupby("model")[["parameters"]].first()
        table["validation accuracy"] = accuracy[0.0].groupby("model").agg(spread)
        table["compression step"] = [VARIANTS[model].description for model in table.index]
        title = f"Output matrices (Table 3{which}), and models beyond the paper"
        text += section(title, ACCURACY + PAPER["3"], markdown(table, VARIANTS))
    accuracy = accuracies(runs, ["table6"], "srr_layer").drop(columns=0.0)
    gains = accuracy.sub(plain["table2"].reindex(columns=["crate-c"])["crate-c"], axis=0, level="seed")
    table = accuracy_table(accuracy, gains, ["layer", "eta"], claims.in_depth(accuracy.index.unique(0)))
    text += section("Which layer's SRR (Section 6, Table 6)", ACCURACY + PAPER["6"], table)
    return found + claims.layer_choice_claims(accuracy), text


def provenance_section(runs):
    """Which commands made the runs, on what, and how long that took."""
    runs = runs.assign(command="`" + runs["command"] + "`", commit=runs["commit"].fillna("unknown").str[:10])
    columns = ["experiment", "dataset", "command", "commit", "torch", "device", "processor"]
    lines = [(*key, len(values), round(values.sum())) for key, values in runs.groupby(columns, sort=False)["seconds"]]
    table = markdown_table([*columns, "runs", "seconds, summed"], lines) if lines else ""
    return section("Where the numbers come from", "", table)


def claim_cells(row):
    """What both tables of claims say of a row of claims.csv: its number, with a note, and its interval."""
    number = f"{row['number']:+.3g} ({row['note']})" if row["note"] else f"{row['number']:+.3g}"
    return [number, f"[{row['low']:+.3g}, {row['high']:+.3g}]" if np.isfinite(row["low"]) else "-"]


def claims_table(rows):
    """The rows of claims.csv in Markdown."""
    lines = []
    for row in rows:
        p_value = f"{row['p_holm']:.2g}" if np.isfinite(row["p_holm"]) else "-"
        about = [row[key] for key in CLAIM]
        lines.append([*about, *claim_cells(row), f"{row['n']} {row['of']}", p_value, f"**{row['verdict']}**"])
    return markdown_table([*CLAIM.values(), "number", "95 % interval", "n", "p (Holm)", "verdict"], lines)


def side_by_side(folders):
    """The claims of several folders in Markdown: first what any contradicts or finds without effect, then disagreements."""
    by_claim = {}  # {claim: {folder: row of its claims.csv}}
    for folder in folders:
        table = read_table(folder / "claims.csv").fillna({"note": "", "claimed": ""})
        if table.empty:
            raise InputError(f"--claims {folder}: no claims.csv there; name a folder that --results had")
        for row in table.to_dict("records"):
            by_claim.setdefault(tuple(row[key] for key in CLAIM), {})[folder] = row

    def rank(claim):
        verdicts = {row["verdict"].split(" (")[0] for row in by_claim[claim].values()}
        return "contradicted" not in verdicts, "no effect" not in verdicts, len(verdicts) == 1, "holds" in verdicts

    lines = []
    for claim in sorted(by_claim, key=rank):
        cells = {folder: " ".join([*claim_cells(row), f"**{row['verdict']}**"]) for folder, row in by_claim[claim].items()}
        lines.append([*claim, *(cells.get(folder, "-") for folder in folders)])
    return markdown_table([*CLAIM.values(), *(folder.name for folder in folders)], lines)


def write_report(results):
    """REPORT.md, claims.csv and figures/, from the tables in `results`. Raises InputError where there are none."""
    runs = read_table(results / "runs.csv")
    of_section_6 = regularisation_section(runs)  # first: it refuses runs that don't belong together
    for pattern in ("fig_2*.png", "layers.png", "intervention*.png"):  # of an earlier report
        for figure in results.glob(f"figures/{pattern}"):
            figure.unlink()
    sections = attention_section(results), layers_section(results, runs), complexity_section(results, runs), of_section_6
    text = sum((parts for _, parts in sections), []) + provenance_section(runs)
    if not text:
        raise InputError(f"--results {results}: no table there to report; name RUNS, or run the earlier stages")
    (results / "claims.csv").unlink(missing_ok=True)
    claimed = pd.DataFrame([row for found, _ in sections for row in found if row["n"]])
    if len(claimed):
        ours = claimed["claim"].str.contains("beyond the paper", case=False)  # they don't make tests of the paper stricter
        claimed["p_holm"] = claimed.groupby(["section", ours])["p_value"].transform(holm)
        claimed.loc[claimed["verdict"].isin(["holds", "contradicted"]) & (claimed["p_holm"] >= 0.05), "verdict"] += (
            " (unadjusted)"
        )
        write_text(results / "claims.csv", claimed.to_csv(index=False, float_format="%.6g"))
        text = section("The paper's claims on these runs", claims.RULE, claims_table(claimed.to_dict("records"))) + text
    title = "# Report: " + (", ".join(Path(name).name for name in runs["dataset"].unique()) or "no runs")
    write_text(results / "REPORT.md", "\n".join([title + "\n", *text]))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="?", type=path, metavar="RUNS", help="the folder above the experiments, such as runs/laptop")
    add("--results", type=path, metavar="FOLDER", help="of the tables and the report (default: RUNS/results)")
    add("--claims", type=path, nargs="+", metavar="FOLDER", help="print the claims of several such folders side by side")
    arguments = parser.parse_args()
    runs, results = arguments.runs, arguments.results
    if bool(runs or results) == bool(arguments.claims):
        raise InputError("name RUNS, such as runs/laptop, or --results with its tables, or else --claims")
    if arguments.claims:
        print(side_by_side(arguments.claims), end="")
        return
    results = results or runs / "results"
    if runs:
        collect(runs, results)
    write_report(results)
    print(f"written to {results / 'REPORT.md'}")


if __name__ == "__main__":
    run(main)
