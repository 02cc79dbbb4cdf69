"""The numbers and figures of results/README.md, from the tables of all data sets: `python -m crate.report --page results`.

page.csv has a row for every number of the page, by the page's three questions: mean over seeds with its t interval, or tau with
its bootstrap interval; n: how many seeds or models.
"""

from itertools import product

import numpy as np
import pandas as pd

from crate import claims, figures, ranks
from crate.claims import MAIN, mean_interval
from crate.cli import InputError, write_text

DATA = {"digits": "digits", "cifar10": "CIFAR-10"}  # folder: name
FILES = {"measures": "grid", "study_measures": "random", "rate_measures": "one rate"}
GAPS = {"gap": "gap", "gap_accuracy": "gap in accuracy"}
PANELS = [("gap", "all pairs"), ("gap", "same type"), ("gap", "same type and rate"), ("gap in accuracy", "same type")]
MEASURES = {
    "srr": "SRR", "srr_lambda_0": "R^c - R", "path_norm": "path-norm", "pacbayes_init": "PAC-Bayes, distance",
    "pacbayes_flatness": "PAC-Bayes flatness", "baseline_lr": "learning rate", "baseline_steps": "steps",
    "baseline_type": "mean of type",
}  # fmt: skip
LEAD, OTHER_SEED = "lead over mean of type", "gap of another seed"
AXES = ["model", "width", "batch_size", "lr", "dropout", "weight_decay"]
PAIRS = {"all pairs": (), "same type": ("model",), "same type and rate": ("model", "lr"), "same setting": tuple(AXES)}
RUN = ["experiment", "run"]


def row(question, quantity, of, where, n, number, low=None, high=None):
    """A row of page.csv."""
    return dict(question=question, quantity=quantity, of=of, where=where, number=number, low=low, high=high, n=n)


def by_type(question, quantity, where, values):
    """Rows of each type's mean over seeds, and of the mean of the types. values: a Series, index (seed, model)."""
    values = values.unstack("model")
    columns = {model.upper(): values[model] for model in MAIN if model in values}
    columns["mean"] = pd.DataFrame(columns).mean(axis=1, skipna=False)
    return [row(question, quantity, of, where, own.count(), *mean_interval(own)) for of, own in columns.items()]


def layer_rows(layers, data):
    """Question 1: how SRR and its two terms change from layer 1 to 5 at initialisation, mean over types."""
    start, rows = layers.query("experiment == 'layers' and epoch == 0 and images == 'train' and model in @MAIN"), []
    rates = start["rate_subspaces"] - start["rate"]
    start = start.assign(**{"SRR": start["srr"], "0.1 ||Z||_0": start["srr"] - rates, "R^c - R": rates})
    for (width, depth), own in start.groupby(["width", "depth"]):
        where = f"{data}, d = {width}, L = {depth}"
        for of in "SRR", "0.1 ||Z||_0", "R^c - R":
            curves = own.pivot_table(of, "seed", "layer")
            rows.append(row(1, "layer 5 minus layer 1", of, where, len(curves), *mean_interval(curves[5] - curves[1])))
        lowest = own.pivot_table("SRR", "seed", "layer").idxmin(axis=1)
        rows.append(row(1, "lowest layer", "SRR", where, len(lowest), *mean_interval(lowest)))
    return rows


def attention_rows(operators, data):
    """Question 1: the change of R^c by trained attention, raw and at the norm that tokens had before, mean over layers."""
    own, rows = operators[operators["experiment"].str.startswith("table2")], []
    own = own[own["epoch"] == own.groupby(RUN)["epoch"].transform("max")]
    before = own.groupby([*RUN, "layer"])["rate_subspaces"].shift()  # of the point before
    own = own.assign(raw=own["rate_subspaces"] - before, equal=own["rate_subspaces_equal_norm"] - before)
    for width, of_width in own.query("point == 'compressed' and epoch > 0").groupby("width"):
        for norm, values in of_width.groupby(["seed", "model"])[["raw", "equal"]].mean().items():
            rows += by_type(1, f"change of R^c by attention, {norm} norm", f"{data}, d = {width}", values)
    return rows


def sets_of_models(results):
    """({name: (models that reached the target, means)}, rows): of each table and width, which share no model.

    But those at one learning rate come twice, as models and, with `means`, as the means of their settings over seeds.
    """
    sets, rows = {}, []
    for (folder, data), (file, what) in product(DATA.items(), FILES.items()):
        table = results / folder / f"{file}.csv"
        for width, every in pd.read_csv(table).groupby("width") if table.exists() else ():
            every = every.assign(baseline_lr=every["lr"]).reindex(columns=[*AXES, *GAPS, *MEASURES, "reached_target"])
            name, models = f"{data}, {what}, d = {width}", every[every["reached_target"].eq(True)]
            models = models.assign(baseline_type=models.groupby("model")["srr"].transform("mean"))
            sets[name] = models, False
            if what == "one rate":
                sets[f"{name}, means"] = models, True
            i, j = np.triu_indices(len(every), 1)
            with_missed = np.nanmean(ranks.agreement(every, "gap", ["srr"], i, j))
            rows.append(row(2, "models that reached the target", "", name, len(every), len(models)))
            rows.append(row(2, "tau, gap, all pairs, with those that missed", "SRR", name, len(every), with_missed))
            if what != "random":
                deviation = np.sqrt(models.groupby(["model", "lr"])["gap"].var().mean())
                rows.append(row(2, "standard deviation of the gap", "one type and rate", name, len(models), deviation))
    return sets, rows


def taus_of(models, means, gap, rng):
    """{pairs: (tau of MEASURES, OTHER_SEED and LEAD, (m, 1 + R), its spread, models (m,), pairs (m,))} of one set of models."""
    samples, counts = ranks.statistics(models, AXES, gap, [*MEASURES], [*PAIRS.values()][1:], means=means, rng=rng)
    setting, found, of_type = ranks.settings_of(models, AXES), {}, [*MEASURES].index("baseline_type")
    for pairs, columns in PAIRS.items():
        statistic = "_".join(["tau", "same", *columns]) if columns else "tau"
        taus, row_of = samples[statistic], [*range(len(MEASURES) + 1), 0]  # the lead has the models and pairs of SRR
        if np.isfinite(taus[0, 0]):
            spread = ranks.spread(models, "srr", *ranks.matched(models, columns, setting))
            taus = np.vstack([taus, taus[0] - taus[of_type]])
            found[pairs] = taus, spread, counts["models"][row_of], counts[statistic][row_of]
    return found


def tau_rows(sets):
    """Question 2: tau of each measure in each set of models, and in the sets together, weighted alike for all measures."""
    rows = []
    for gap in GAPS:
        found = {name: taus_of(*models, gap, seed) for seed, (name, models) in enumerate(sets.items())}
        for pairs in PAIRS:
            known = [name for name in sets if pairs in found[name]]
            groups = {name: [name] for name in known}
            for data in "", *DATA.values():
                groups[f"{data} together".strip()] = [
                    name for name in known if name.startswith(data) and "one rate" not in name
                ]
            for where, names in ((where, names) for where, names in groups.items() if names):
                taus, spreads, n, count = zip(*(found[name][pairs] for name in names))
                for m, of in enumerate([*MEASURES.values(), OTHER_SEED, LEAD]):
                    tau, low, high, p = ranks.pooled([own[m] for own in taus], spreads)
                    if low < high:  # not of what all pairs share
                        own = row(2, f"tau, {GAPS[gap]}, {pairs}", of, where, sum(n)[m], tau, low, high)
                        rows.append(own | {"pairs": sum(count)[m], "p_alike": p})
    return rows


def draw_taus(sets, rows, path):
    """SRR and the gap in each set of models and together; where settings have several seeds, the gap of another seed, too."""
    numbers = {(own["quantity"], own["of"], own["where"]): (own["number"], own["low"], own["high"]) for own in rows}
    one_rate, panels = [name for name in sets if "one rate" in name], {}
    lines = {name: f"{name} ({len(models)})" for name, (models, means) in sets.items() if not means}
    for gap, pairs in PANELS:
        panel = panels[f"{gap}:\n{pairs}"] = {}
        for name in [*(name for name in sets if name not in one_rate), "together", *one_rate]:
            of_line = [numbers.get((f"tau, {gap}, {pairs}", of, name)) for of in ("SRR", OTHER_SEED)]
            panel[lines.get(name, name)] = of_line
    label = "Kendall's τ of SRR with the gap, 95 % intervals; in brackets the number of models"
    figures.agreement(panels, path, label=label + ("; hollow: of the gap of another seed" if one_rate else ""))


def eta_rows(runs, data):
    """Questions 2 and 3: what SRR of the last layer in the loss (Table 2), or of all layers (pushed), changes, paired by seed.

    Also {where: the changes of those pushed, in % of their type's mean without, columns srr, gap, model, seed, srr_reg}.
    """
    rows, pushed = [], {}
    runs = runs[runs["experiment"].str.startswith(("table2", "intervention")) & ~runs["reached_target"].eq(False)]
    for (experiment, width), own in runs.query("model in @MAIN").groupby(["experiment", "width"]):
        what, layer = ("pushed", "all") if experiment == "intervention" else ("Table 2", "last")
        if not own["srr_reg"].eq(0).any():
            continue
        where, own = f"{data}, d = {width}", own[(own["srr_reg"] == 0) | (own["srr_layer"] == layer)]
        values = own.assign(points=100 * own["val_accuracy"]).set_index(["srr_reg", "seed", "model"]).sort_index()
        values = values[["srr", "gap", "points"]]
        plain, change = values.loc[0.0], values.drop(0.0).sub(values.loc[0.0]).dropna(how="all")
        share = 100 * change.div(plain.groupby("model").mean())
        for eta in change.index.unique("srr_reg"):
            for of, part in {"SRR, %": share["srr"], "gap": change["gap"], "points": change["points"]}.items():
                rows += by_type(3, f"{what}, eta = {eta:g}: {of}", where, part.loc[eta])
        if layer == "all":
            rows += by_type(3, "pushed: slope of the gap over 100 of SRR", where, 100 * claims.slopes(own).stack())
            pushed[where] = share.dropna(subset=["srr", "gap"]).reset_index()
            for model, gaps in plain.groupby("model")["gap"]:
                of = f"seeds, {model.upper()}"
                rows.append(row(2, "standard deviation of the gap", of, where, gaps.count(), gaps.std()))
    return rows, pushed


def write_page(results):
    """page.csv and figures/ in `results`. Raises InputError where no data set has measures.csv."""
    sets, rows = sets_of_models(results)
    if not sets:
        raise InputError(f"--page {results}: no measures.csv in {' or '.join(DATA)} there")
    rows += tau_rows(sets)
    draw_taus(sets, rows, results / "figures/srr_ranks.png")
    pushed, slopes = {}, {}
    for folder, data in ((results / name, data) for name, data in DATA.items() if (results / name / "runs.csv").exists()):
        runs = pd.read_csv(folder / "runs.csv", dtype={"srr_layer": str})
        for name, rows_of in ("layers", layer_rows), ("operators", attention_rows):
            if (folder / f"{name}.csv").exists():
                table = pd.read_csv(folder / f"{name}.csv")
                rows += rows_of(runs[[*RUN, "model", "seed", "width", "depth"]].merge(table, on=RUN), data)
        found, changes = eta_rows(runs, data)
        observed = claims.observed_slopes(folder)
        found += [row(3, "slope of the gap over 100 of SRR", what, data, None, *(100 * x for x in slope))
                  for what, slope in observed.items()]  # fmt: skip
        rows, pushed = rows + found, pushed | changes
        plain = runs.query("experiment == 'intervention' and srr_reg == 0").groupby("model")[["srr", "gap"]].mean().mean()
        slopes |= dict.fromkeys(changes, claims.narrowest(observed) * plain["srr"] / plain["gap"])
    if pushed:
        figures.pushed(pushed, slopes, results / "figures/srr_pushed.png")
    table = pd.DataFrame(rows).sort_values("question", kind="stable")
    write_text(results / "page.csv", table.to_csv(index=False, float_format="%.5g"))
