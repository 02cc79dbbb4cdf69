"""Does a measure rank models as their generalisation gap does? Rank statistics of a table (Section 5: Tables 1, 5; Figs. 4, 6).

    python correlate.py measures.csv --hyperparameters model batch_size lr dropout --by width --out correlation

TABLE.csv has a header and a row per model; it need not come from this project. Rows whose `reached_target` is False are left
out. Models with equal hyperparameters are taken for the seeds of one setting. Writes correlation.csv, correlation.md and plots
of the first gap to --out, and with --by COLUMN, for the rows of each value alone, to OUT/COLUMN=VALUE/.
"""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from crate import claims, figures, ranks
from crate.claims import with_interval
from crate.cli import InputError, Parser, markdown_table, number, path, run, write_bytes, write_text
from crate.tables import hyperparameter, numbers, read_cells, shown

FILES = ["correlation.csv", "correlation.md", "forest.png", "scatter.png", "srr.png"]
PAGE = """
Kendall's tau with `{gap}`: over all pairs of {what}, and over pairs that share something; under each hyperparameter psi, over
pairs that differ in it alone, Psi their mean. In brackets 95 % intervals, {resamples} bootstrap resamples of the settings:
about the types that were trained, not about new ones.
"""
LEAD = """tau of srr minus that of its closest rival, {lead_rival}: {lead}. The rival is chosen anew in every resample; srr is
above all rivals in {share_first:.0%} of them.
"""


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("table", metavar="TABLE.csv")
    add("--hyperparameters", nargs="+", required=True, metavar="COLUMN", help="what the models differ in, seeds apart")
    add("--gap", nargs="+", metavar="COLUMN", help="generalisation gaps (default: gap and gap_accuracy, where they are there)")
    same = "also tau of the pairs that share these (default: model and model,lr, where these are hyperparameters)"
    add("--same", nargs="+", metavar="COLUMN[,COLUMN]", help=same)
    add("--mean-over-seeds", action="store_true", help="rank the settings by their means over seeds (default: every model)")
    add("--measures", nargs="+", metavar="COLUMN", help="default: the columns of numbers to the right of the gap, but gap*")
    add("--by", metavar="COLUMN", help="also each value alone; one more hyperparameter of all rows (default: none)")
    add("--resamples", type=number(int, 1), default=10_000, help="default: %(default)s")
    add("--out", type=path, required=True, metavar="FOLDER")
    return parser.parse_args()


def read_table(arguments):
    """(cells, the columns that count, names of measures); fills in what the arguments leave open. Raises InputError."""
    cells = read_cells(arguments.table)
    arguments.axes = list(dict.fromkeys([*arguments.hyperparameters, *([arguments.by] if arguments.by else [])]))
    arguments.gap = [*dict.fromkeys(arguments.gap or [name for name in ("gap", "gap_accuracy") if name in cells])]
    same = ranks.SAME if arguments.same is None else [tuple(dict.fromkeys(names.split(","))) for names in arguments.same]
    arguments.same = [names for names in same if arguments.same or set(names) <= {*arguments.axes}]
    known = {"--hyperparameters": arguments.hyperparameters, "--by": arguments.axes, "--same": sum(arguments.same, ())}
    for flag, names in (known | {"--measures": arguments.measures or [], "--gap": arguments.gap or ["gap"]}).items():
        for name in names:
            if name not in cells:
                raise InputError(f"{flag} {name}: no such column; the table has {', '.join(cells)}")
            if name in arguments.gap and flag != "--gap":
                raise InputError(f"--gap {name}: it is also in {flag}; it can't be both")
    table = {name: hyperparameter(cells[name]) for name in dict.fromkeys([*arguments.axes, *known["--same"]])}
    ours = [*table, *arguments.gap, "seed", "run", "reached_target"]
    right = [name for name in cells.loc[:, arguments.gap[0] :] if not name.startswith("gap") and name not in ours]
    found = {name: numbers(cells[name], "--measures" if arguments.measures else None) for name in arguments.measures or right}
    if others := [name for name, values in found.items() if values is None]:
        print(f"not measures: {', '.join(others)}")
    found = {name: values for name, values in found.items() if values is not None}
    if not any(np.isfinite(values).any() for values in found.values()):
        raise InputError(f"--measures: none is finite; by default those right of --gap {arguments.gap[0]} that are numbers")
    return cells, pd.DataFrame(table | {name: numbers(cells[name], "--gap") for name in arguments.gap} | found), [*found]


def leave_out(cells, table, measures, arguments):
    """The rows that reached the target; says what is left out or missing. Refuses a setting that has one seed twice."""
    missed = cells.get("reached_target", pd.Series("", cells.index)).str.lower().isin(["false", "0", "0.0"])
    lost = {f"have no finite {gap}": ~missed & ~np.isfinite(table[gap]) for gap in arguments.gap}
    for why, out in ({"missed the target": missed} | lost).items():
        if out.any():
            names = cells.loc[out, "run"] if "run" in cells else [f"line {line}" for line in cells.index[out]]
            print(f"{out.sum()} models left out, which {why}: {', '.join(names)}")
    table, axes = table[~missed], arguments.axes
    if lacking := [f"{name} {count}" for name, count in (~np.isfinite(table[measures])).sum().items() if count]:
        print(f"without a number: {', '.join(lacking)}")
    if "seed" in cells and (twice := table[axes].assign(_=cells.loc[table.index, "seed"]).duplicated()).any():
        named = ", ".join(f"{axis} {shown(table.loc[twice.idxmax(), axis])}" for axis in axes)
        raise InputError(f"--hyperparameters: {named} occurs twice with one seed; what else do these models differ in?")
    if (twice := table[axes].duplicated()).any():
        print(f"{len(table)} models of {(~twice).sum()} settings: models of one setting are taken for its seeds")
    return table


def text(row, column):
    """A number and its interval, if it has one, as text."""
    return with_interval(row[column], row.get(f"{column}_low", np.nan), row.get(f"{column}_high", np.nan), "+.2f")


def analyse(folder, where, table, axes, measures, arguments):
    """Write and draw the statistics of the rows of `table` into `folder`, and say in one line what was found."""
    if "model" in axes and "srr" in measures and table["model"].nunique() > 1 and "baseline_type" not in table:
        table = table.assign(baseline_type=table.groupby("model")["srr"].transform("mean"))  # what SRR says of a type alone
    if "lr" in axes and table["lr"].dtype == float and table["lr"].nunique() > 1 and "baseline_lr" not in table:
        table = table.assign(baseline_lr=table["lr"])
    measures = [*measures, *(name for name in ("baseline_type", "baseline_lr") if name in table and name not in measures)]
    found, means = [], arguments.mean_over_seeds
    for gap in arguments.gap:
        try:
            rows = ranks.correlate(table, axes, gap, measures, arguments.same, means=means, resamples=arguments.resamples)
        except ValueError as error:
            raise InputError(f"--gap {gap}: {error}")
        found.append(pd.DataFrame(rows).sort_values("tau", ascending=False, kind="stable"))
    if means:
        table = ranks.mean_over_seeds(table, axes, [*arguments.gap, *measures])
    folder.mkdir(parents=True, exist_ok=True)
    plot(folder, table, found[0][np.isfinite(found[0]["tau"])], arguments)
    page = "\n".join(markdown(rows, table, axes, arguments) for rows in found)
    page += "".join(f"\n![{name}]({name})\n" for name in FILES[2:] if (folder / name).exists())
    write_text(folder / FILES[0], pd.concat(found).to_csv(index=False, na_rep="nan"))
    write_text(folder / FILES[1], page)
    best, what = found[0].iloc[0], "settings" if means else "models"
    print(f"{where}: {len(table)} {what}, {len(found[0])} measures; highest tau: {best['measure']} {text(best, 'tau')}")


def markdown(rows, table, axes, arguments):
    """The statistics for one gap in the layout of Tables 1 and 5, with intervals, and what they are."""
    columns = {f"psi_{axis}": axis for axis in axes} | {"Psi": "Psi", "tau": "tau"}
    for names in arguments.same:
        close = "lr" in names and ranks.random_rates(table, ranks.settings_of(table, axes))
        near = f" (lr within a factor of {ranks.CLOSE})" if close else ""
        columns["tau_same_" + "_".join(names)] = f"tau, same {', '.join(names)}{near}"
    records, what = rows.to_dict("records"), "settings" if arguments.mean_over_seeds else "models"
    lines = [[row["measure"], *(text(row, column) for column in columns), row["models"]] for row in records]
    page = markdown_table(["measure", *columns.values(), what], lines)
    page += PAGE.format(gap=records[0]["gap"], resamples=arguments.resamples, what=what)
    if others := [row["measure"] for row in records if row["measure"] not in drawn(rows["measure"], arguments)]:
        page += f"Not in the plots, unless --measures names them: {', '.join(others)}.\n"
    srr = next((row for row in records if row["measure"] == "srr" and "lead" in row), None)
    return page + LEAD.format(**srr | {"lead": text(srr, "lead")}) if srr else page


def drawn(measures, arguments):
    """What the plots show: of our own table the measures that the paper has, and baselines; else all."""
    return claims.MEASURES if "srr" in set(measures) and not arguments.measures else list(measures)


def plot(folder, table, rows, arguments):
    """The gap against every measure, against SRR, and tau of every measure (Figs. 4, 6)."""
    gap, kind, by = arguments.gap[0], "model" if "model" in arguments.axes else None, arguments.by
    rows = rows[rows["measure"].isin(drawn(rows["measure"], arguments))]
    kinds = table[kind].map(shown) if kind else pd.Series("", table.index)
    taus = {name: tau for name, tau in zip(rows["measure"], rows["tau"]) if name in table}
    panels = {name: (f"τ = {tau:.2f}", table[name], table[gap]) for name, tau in taus.items()}
    figures.scatter(panels, kinds, folder / "scatter.png", label=gap, legend=kind)
    if "srr" in panels and by and table[by].nunique() > 1:  # SRR grows with the width: each has a panel
        panels = {f"SRR, {by} {shown(level)}": ("", own["srr"], own[gap]) for level, own in table.groupby(by)}
    elif "srr" in panels:
        panels = {"SRR": panels["srr"]}
        if kind:
            inside = table[["srr", gap]] - table.groupby(kind)[["srr", gap]].transform("mean")
            panels[f"SRR, and {gap}, minus their mean in each {kind}"] = "", inside["srr"], inside[gap]
    if "srr" in taus:
        figures.scatter(panels, kinds, folder / "srr.png", label=gap, legend=kind, columns=2, width=4.2, sharey=False)
    series = {"all pairs": "tau"} | {f"same {', '.join(names)}": "tau_same_" + "_".join(names) for names in arguments.same}
    taus = {name: rows[["measure", tau, f"{tau}_low", f"{tau}_high"]].to_numpy() for name, tau in series.items()}
    figures.forest(taus, folder / "forest.png", label=f"Kendall's τ with {gap}, 95 % interval")


def publish(new, out, table):
    """Put the files below `new` in the place of those that an earlier call left in `out`; nothing else there is touched."""
    files = [file.relative_to(new) for file in new.rglob("*") if file.is_file()]
    earlier = {page.parent: page.read_text(errors="replace") for page in [*out.glob(FILES[1]), *out.glob(f"*=*/{FILES[1]}")]}
    ours = [folder / name for folder, page in earlier.items() for name in FILES if name in FILES[:2] or f"({name})" in page]
    stale = [file for file in ours if file.is_file() and file.relative_to(out) not in files]
    for file in [*stale, *(out / file for file in files)]:
        if file.exists() and file.parent not in earlier:
            raise InputError(f"--out {out}: {file} is there, and is not of an earlier call; name another folder")
        if file.exists() and Path(table).exists() and file.samefile(table):
            raise InputError(f"--out {out}: {file} would no longer be the table that is read")
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out / file, (new / file).read_bytes())
    for file in stale:
        file.unlink()
        if file.parent != out and not any(file.parent.iterdir()):
            file.parent.rmdir()


def main():
    arguments = parse_arguments()
    cells, table, measures = read_table(arguments)
    table = leave_out(cells, table, measures, arguments)
    by, out = arguments.by, arguments.out
    others = [axis for axis in arguments.axes if axis != by] or [by]
    with tempfile.TemporaryDirectory() as new:  # nothing in --out is touched before all is there
        for level, part in table.groupby(by) if by else ():
            name = f"{by}={shown(level)}"
            if Path(name).name != name:
                raise InputError(f"--by {by}: {name} can't be the name of a folder")
            try:
                analyse(Path(new, name), out / name, part, others, measures, arguments)
            except InputError as error:  # too few models, for one; what is wrong with all rows is refused below
                print(f"{name}: left out: {error}")
        analyse(Path(new), out, table, arguments.axes, measures, arguments)
        publish(Path(new), out, arguments.table)


if __name__ == "__main__":
    run(main)
