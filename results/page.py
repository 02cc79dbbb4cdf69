"""The numbers and figures of the README.md beside this file, from the tables of all data sets: `python -m results.page`.

page.csv has a row for every number of the page, by the page's three questions: mean over seeds with its t interval, or tau with
its bootstrap interval; n: how many seeds or models.
"""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from crate import claims, figures, ranks
from crate.claims import MAIN, mean_interval
from crate.cli import InputError, Parser, path, run, write_text

DATA = {"digits": "digits", "cifar10": "CIFAR-10"}  # folder: name
ONE_RATE = "one rate"  # settings at one learning rate, with several seeds each
FILES = {"measures": "grid", "study_measures": "random", "one_lr_measures": ONE_RATE}
GAPS = {"gap": "gap", "gap_accuracy": "gap in accuracy"}
PANELS = [("gap", "all pairs"), ("gap", "same type"), ("gap", "same type and learning rate"), ("gap in accuracy", "same type")]
MEASURES = {
    "srr": "SRR", "srr_lambda_0": "R^c - R", "path_norm": "path-norm", "pacbayes_init": "PAC-Bayes, distance",
    "pacbayes_flatness": "PAC-Bayes flatness", "baseline_lr": "learning rate", "baseline_batch_size": "batch size",
    "baseline_dropout": "dropout", "baseline_steps": "steps", "baseline_type": "mean of type",
}  # fmt: skip
LEADS = {"lead over mean of type": "mean of type", "lead over learning rate": "learning rate"}
OTHER_SEED = "gap of another seed"
BOTH = "both widths"  # the sets of one width again, in one
AXES = ["model", "width", "batch_size", "lr", "dropout", "weight_decay"]
PAIRS = {
    "all pairs": (), "same type": ("model",), "same type and learning rate": ("model", "lr"),
    "same type and batch size": ("model", "batch_size"), "same setting": tuple(AXES),
}  # fmt: skip
RUN = ["experiment", "run"]


def row(question, quantity, of, where, n, number, low=None, high=None):
    """A row of page.csv."""
    return dict(question=question, quantity=quantity, of=of, where=where, number=number, low=low, high=high, n=n)


def means(question, quantity, where, values):
    """Rows of means over seeds. values: {of: a Series with a value per seed}."""
    return [row(question, quantity, of, where, own.count(), *mean_interval(own)) for of, own in values.items()]


def means_by_type(question, quantity, where, values):
    """Rows of each type's mean over seeds, and of the mean of the types. values: a Series, index (seed, model)."""
    values = values.unstack("model")
    columns = {model.upper(): values[model] for model in MAIN if model in values}
    return means(question, quantity, where, columns | {"mean": pd.DataFrame(columns).mean(axis=1, skipna=False)})


def layer_rows(layers, data):
    """Question 1: how SRR and its two terms change from layer 1 to 5 at initialisation, mean over types."""
    start, rows = layers.query("experiment == 'layers' and epoch == 0 and images == 'train' and model in @MAIN"), []
    rates = start["rate_subspaces"] - start["rate"]
    terms = {"SRR": start["srr"], "0.1 ||Z||_0": start["srr"] - rates, "R^c - R": rates}
    for (width, depth), own in start.assign(**terms).groupby(["width", "depth"]):
        where = f"{data}, d = {width}, L = {depth}"
        curves = {of: own.pivot_table(of, "seed", "layer") for of in terms}
        rows += means(1, "layer 5 minus layer 1", where, {of: curve[5] - curve[1] for of, curve in curves.items()})
        rows += means(1, "lowest layer", where, {"SRR": curves["SRR"].idxmin(axis=1)})
    return rows


def attention_rows(operators, data):
    """Question 1: the change of R^c by trained attention, raw and at the norm that tokens had before, mean over layers."""
    own, rows = operators[operators["experiment"].str.startswith("table2")], []
    changes = claims.operator_changes(own.assign(of=[f"{data}, d = {width}" for width in own["width"]]))
    for where, values in changes.query("point == 'compressed'").droplevel("point").groupby("of"):
        for norm, rate in ("raw", "after"), ("equal", "after_equal_norm"):
            rows += means_by_type(1, f"change of R^c by attention, {norm} norm", where, values[rate].droplevel("of"))
    return rows


def sets_of_models(results):
    """({name: models that reached the target}, rows) of each table and width, which share no model, and of all widths together.

    Those at one learning rate are there twice, as models and, ", means", to be ranked by the means of settings over seeds.
    """
    sets, rows = {}, []
    for (folder, data), (file, what) in product(DATA.items(), FILES.items()):
        table = results / folder / f"{file}.csv"
        parts = {f"d = {width}": own for width, own in pd.read_csv(table).groupby("width")} if table.exists() else {}
        for size, every in (parts | ({BOTH: pd.concat(parts.values())} if len(parts) > 1 else {})).items():
            every = every.assign(**{f"baseline_{axis}": every.get(axis) for axis in ("lr", "batch_size", "dropout")})
            every = every.reindex(columns=[*AXES, *GAPS, *MEASURES, "reached_target"])
            name, models = f"{data}, {what}, {size}", every[every["reached_target"].eq(True)]
            models = models.assign(baseline_type=models.groupby("model")["srr"].transform("mean"))
            sets |= {name: models, f"{name}, means": models} if what == ONE_RATE else {name: models}
            (tau,) = ranks.finite_mean(ranks.agreement(every, "gap", ["srr"], *np.triu_indices(len(every), 1)).T)
            rows.append(row(2, "models that reached the target", "", name, len(every), len(models)))
            rows.append(row(2, "tau, gap, all pairs, with those that missed", "SRR", name, len(every), tau))
            if what != "random":
                deviation = np.sqrt(models.groupby(["model", "lr"])["gap"].var().mean())
                rows.append(row(2, "standard deviation of the gap", "one type and rate", name, len(models), deviation))
    return {name: sets[name] for name in sorted(sets, key=lambda name: (ONE_RATE in name, BOTH in name))}, rows


def tau_rows(sets):
    """Question 2: tau of each measure in each set of models, and in the sets together, weighted alike for all measures."""
    found = {}  # (set, gap, pairs, measure): (tau (1 + R,), its spread, models, pairs)
    for gap, (seed, (where, models)) in product(GAPS, enumerate(sets.items())):
        options = dict(means=where.endswith("means"), rng=seed)
        try:
            samples, counts = ranks.statistics(models, AXES, gap, [*MEASURES], [*PAIRS.values()][1:], **options)
        except ValueError:  # too few models
            continue
        setting = ranks.settings_of(models, AXES)
        for pairs, columns in PAIRS.items():
            statistic = "_".join(["tau", "same", *columns]) if columns else "tau"
            taus = dict(zip([*MEASURES.values(), OTHER_SEED], zip(samples[statistic], counts["models"], counts[statistic])))
            srr, *of_srr = taus["SRR"]
            if np.isfinite(srr[0]):
                taus |= {lead: (srr - taus[rival][0], *of_srr) for lead, rival in LEADS.items()}
                spread = ranks.spread(models, "srr", *ranks.matched(models, columns, setting))
                found |= {(where, gap, pairs, of): (tau, spread, *n) for of, (tau, *n) in taus.items()}
    apart = [name for name in sets if ONE_RATE not in name and BOTH not in name]  # that share no models
    groups = {name: [name] for name in apart}
    groups |= {f"{data} together".strip(): [name for name in apart if name.startswith(data)] for data in ("", *DATA.values())}
    groups |= {name: [name] for name in sets}
    rows = []
    for gap, pairs, of, (where, names) in product(GAPS, PAIRS, [*MEASURES.values(), OTHER_SEED, *LEADS], groups.items()):
        known = [found[name, gap, pairs, of] for name in names if (name, gap, pairs, of) in found]
        if known:
            taus, spreads, n, count = zip(*known)
            tau, low, high, p = ranks.pooled(taus, spreads)
            if low < high:  # not of what all pairs share
                own = row(2, f"tau, {GAPS[gap]}, {pairs}", of, where, sum(n), tau, low, high)
                rows.append(own | {"pairs": sum(count), "p_alike": p})
    return rows


def agreement(taus, file, *, label):
    """tau with its interval for several sets of models, and together.

    taus: {title of panel: {set: two rows of page.csv, each None where there is none}}; the second is hollow.
    """
    lines = [*next(iter(taus.values()))]
    figure, axes = figures.grid(len(taus), len(taus), width=2.6, height=0.9 + 0.36 * len(lines), sharex=True, sharey=True)
    for axis, (title, numbers) in zip(axes, taus.items()):
        for y, line in enumerate(lines):
            together = line.startswith("together")
            colour = "black" if together else figures.COLOURS["crate-n" if line.startswith("CIFAR") else "crate-c"]
            for estimate, place, face in zip(numbers[line], (y, y + 0.28), (colour, "white")):
                if estimate:
                    ends = [estimate["low"], estimate["high"]]
                    axis.plot(ends, [place, place], color=colour, linewidth=2 if face == colour else 1)
                    axis.plot(estimate["number"], place, "D" if together else "o", color=colour, markerfacecolor=face)
            if numbers[line][0] is None:
                axis.text(0, y, " too few pairs", va="center", fontsize=8, color=figures.GREY)
            elif together:
                text = "{number:.2f} [{low:.2f}, {high:.2f}]".format(**numbers[line][0]).replace("-", "−")
                axis.text(0.15, y + 0.25, text, ha="center", va="top", fontsize=9, fontweight="bold")
                axis.axhline(y - 0.5, color="0.8", linewidth=0.8)
                axis.axhline(y + 0.75, color="0.8", linewidth=0.8)
        axis.axvline(0, color=figures.GREY, linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set(xlim=(-0.75, 1.05), xticks=(-0.5, 0, 0.5, 1), ylim=(len(lines) - 0.2, -0.6))
    axes[0].set_yticks(range(len(lines)), lines, fontsize=9)
    figure.supxlabel(label, fontsize=9)
    figures.save(figure, file)


def draw_taus(rows, file):
    """SRR and the gap in each set of models and together; where settings have several seeds, the gap of another seed, too."""
    taus = {(own["quantity"], own["of"], own["where"]): own for own in rows}
    names = {
        where: own["n"]
        for (quantity, of, where), own in taus.items()
        if (quantity, of) == ("tau, gap, all pairs", "SRR") and BOTH not in where
    }
    lines = {where: f"{where} ({n})" for where, n in names.items() if where == "together" or "together" not in where}
    panels = {}
    for gap, pairs in PANELS:
        of_lines = [[taus.get((f"tau, {gap}, {pairs}", of, where)) for of in ("SRR", OTHER_SEED)] for where in lines]
        panels[f"{gap}:\n{pairs}"] = dict(zip(lines.values(), of_lines))
    label = "Kendall's τ of SRR with the gap, 95 % intervals; in brackets the number of models; CIFAR-10: a JPEG copy"
    several = any(own["of"] == OTHER_SEED for own in rows)
    agreement(panels, file, label=label + "; hollow: of the gap of another seed" * several)


def eta_rows(runs, data, observed):
    """Questions 2 and 3: what SRR of the last layer in the loss (Table 2), or of all layers (pushed), changes, paired by seed.

    Also what `figures.pushed` draws; `observed`: the slope where nobody pushed.
    """
    rows, pushed, keys = [], {}, ["srr_reg", "seed", "model"]
    runs = runs[runs["experiment"].str.startswith(("table2", "intervention")) & ~runs["reached_target"].eq(False)]
    runs = runs.query("model in @MAIN").assign(points=100 * runs["val_accuracy"])
    for (experiment, width), every in runs.groupby(["experiment", "width"]):
        what, layer = ("pushed", "all") if experiment == "intervention" else ("Table 2", "last")
        plain, own = every[every["srr_reg"] == 0], every.query("srr_reg != 0 and srr_layer == @layer")
        where, share = f"{data}, d = {width}", claims.changes(plain, own)
        change = own.set_index(keys)[["gap", "points"]].sub(plain.set_index(keys[1:])[["gap", "points"]])
        for eta, of_eta in share.set_index(keys)["srr"].groupby("srr_reg"):
            for of, part in {"SRR, %": of_eta, "gap": change["gap"], "points": change["points"]}.items():
                rows += means_by_type(3, f"{what}, eta = {eta:g}: {of}", where, part.loc[eta])
        if layer == "all" and len(share):
            srr, gap = plain.groupby("model")[["srr", "gap"]].mean().mean()
            pushed[where] = share.dropna(subset=["srr", "gap"]), observed * srr / gap
            rows += [row(2, "standard deviation of the gap", f"seeds, {model.upper()}", where, gaps.count(), gaps.std())
                     for model, gaps in plain.groupby("model")["gap"]]  # fmt: skip
    return rows, pushed


def main():
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="?", type=path, default=Path(__file__).parent, help="default: the folder of this file")
    results = parser.parse_args().results
    sets, rows = sets_of_models(results)
    taus = tau_rows(sets)
    if not taus:
        where = f"no measures.csv in {' or '.join(DATA)}"
        raise InputError(f"{results}: {where} there, or too few models in it that reached the target and have srr")
    draw_taus(taus, results / "figures/srr_ranks.png")
    rows += taus
    pushed = {}
    for folder, data in ((results / name, data) for name, data in DATA.items() if (results / name / "runs.csv").exists()):
        runs = pd.read_csv(folder / "runs.csv", dtype={"srr_layer": str})
        for name, rows_of in ("layers", layer_rows), ("operators", attention_rows):
            if (folder / f"{name}.csv").exists():
                table = pd.read_csv(folder / f"{name}.csv")
                rows += rows_of(runs[[*RUN, "model", "seed", "width", "depth"]].merge(table, on=RUN), data)
        changes, drawn = eta_rows(runs, data, claims.observed_slope(folder))
        rows, pushed = rows + changes, pushed | drawn
    if pushed:
        figures.pushed(pushed, results / "figures/srr_pushed.png")
    table = pd.DataFrame(rows).sort_values("question", kind="stable")
    write_text(results / "page.csv", table.to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    run(main)
