"""The numbers and figures of results/README.md, from the tables of all data sets: `python -m crate.report --page results`."""

from itertools import product

import numpy as np
import pandas as pd

from crate import claims, figures, ranks
from crate.cli import InputError, write_text

DATA = {"digits": "digits", "cifar10": "CIFAR-10"}  # folder: name
FILES = {"measures": "grid, d = {}", "study_measures": "random settings"}
GAPS = {"gap": "gap in the loss", "gap_accuracy": "gap in accuracy"}
MEASURES = ["srr", "srr_lambda_0", "path_norm", "sum_of_spec_literal", "pacbayes_init", "pacbayes_flatness"]
MEASURES += ["sharpness_flatness", "inverse_margin", "baseline_type", "baseline_lr", "baseline_steps"]
LEAD = "srr - baseline_type"
SHOWN = (("gap", ()), ("gap", ("model",)), ("gap", ("model", "lr")), ("gap_accuracy", ("model",)))


def sets_of_models(results):
    """{name: table}: of each data set the grid's models of each width, and those at random settings. No two share a model."""
    sets = {}
    for (folder, data), (file, what) in product(DATA.items(), FILES.items()):
        if (results / folder / f"{file}.csv").exists():
            table = pd.read_csv(results / folder / f"{file}.csv").query("reached_target == True")
            for width, own in table.assign(baseline_lr=table["lr"]).groupby("width"):
                own = own.assign(baseline_type=own.groupby("model")["srr"].transform("mean"))
                sets[f"{data}, {what.format(width)}"] = own.reset_index(drop=True)
    return sets


def taus_of(table, gap, same, resamples, rng):
    """(taus of MEASURES and LEAD (m, 1 + R), their spread, models, pairs) of one set of models; None for too few pairs."""
    setting = np.arange(len(table))
    i, j = ranks.matched(table, same, setting)
    if len(i) < ranks.FEWEST:
        return None
    stratum = ranks.levels(table["model"]) if same else np.zeros(len(table))
    draws = ranks.draw(setting, stratum, resamples, rng)
    taus = ranks.tau(ranks.agreement(table, gap, MEASURES, i, j), i, j, draws, setting)
    taus = np.vstack([taus, taus[0] - taus[MEASURES.index("baseline_type")]])
    return taus, ranks.spread(table, "srr", i, j), len(table), len(i)


def pooled_taus(sets, resamples=10_000):
    """A row for each gap, `same`, measure and set of models, and for sets together, weighted alike for all measures."""
    rows, rng = [], np.random.default_rng(0)
    for gap, same in product(GAPS, ((), *ranks.SAME)):
        found = {name: taus_of(table, gap, same, resamples, rng) for name, table in sets.items()}
        found = {name: of_set for name, of_set in found.items() if of_set}
        groups = {name: [name] for name in found} | {"together": [*found]}
        groups |= {f"{data}, together": [name for name in found if name.startswith(data)] for data in DATA.values()}
        for where, names in groups.items():
            taus, spreads, models, pairs = zip(*(found[name] for name in names)) if names else ((),) * 4
            for m, measure in enumerate([*MEASURES, LEAD] if names else []):
                row = {"gap": gap, "same": ", ".join(same), "measure": measure, "models": where, "n": sum(models)}
                tau, low, high, p = ranks.pooled([own[m] for own in taus], spreads)
                rows.append(row | {"pairs": sum(pairs), "tau": tau, "low": low, "high": high, "p_alike": p})
    return pd.DataFrame(rows)


def draw_taus(sets, table, path):
    """SRR and the gap in each set of models and together."""
    table, panels = table[table["measure"] == "srr"].set_index(["gap", "same", "models"]), {}
    for gap, same in SHOWN:
        own = table.loc[gap, ", ".join(same)]
        lines = {f"{name} ({len(sets[name])})" if name in sets else name: name for name in [*sets, "together"]}
        numbers = {
            line: tuple(own.loc[name, ["tau", "low", "high"]]) if name in own.index else None for line, name in lines.items()
        }
        panels[f"{GAPS[gap]}:\n" + ("same " + ", ".join(same) if same else "all pairs")] = numbers
    figures.agreement(panels, path, label="Kendall's τ of SRR with the gap, 95 % intervals; in brackets the number of models")


def changes(runs):
    """What SRR of all layers in the loss changes, in % of the type's mean at eta = 0: rows {model, seed, srr_reg, srr, gap}."""
    runs = runs.query("experiment == 'intervention' and (srr_reg == 0 or srr_layer == 'all')").dropna(subset=["srr", "gap"])
    values = runs.set_index(["srr_reg", "model", "seed"]).sort_index()[["srr", "gap"]]
    plain = values.loc[0.0]
    change = values.drop(0.0).sub(plain).dropna()
    return change.div(plain.groupby("model").mean()).mul(100).reset_index(), plain.groupby("model").mean().mean()


def write_page(results):
    """page.csv and figures/ in `results`. Raises InputError where no data set has measures.csv."""
    if not (sets := sets_of_models(results)):
        raise InputError(f"--page {results}: no measures.csv in {' or '.join(DATA)} there")
    table = pooled_taus(sets)
    pushed, slopes = {}, {}
    for folder, data in DATA.items():
        if (results / folder / "runs.csv").exists():
            found, plain = changes(pd.read_csv(results / folder / "runs.csv", dtype={"srr_layer": str}))
            if len(found):
                slope = claims.narrowest(claims.observed_slopes(results / folder))
                pushed[data], slopes[data] = found, slope * plain["srr"] / plain["gap"]
    draw_taus(sets, table, results / "figures/srr_ranks.png")
    if pushed:
        figures.pushed(pushed, slopes, results / "figures/srr_pushed.png")
    write_text(results / "page.csv", table.to_csv(index=False, float_format="%.4f"))
