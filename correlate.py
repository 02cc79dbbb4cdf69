"""Does a measure rank models as their generalisation gap does? Rank statistics (Section 5: Tables 1, 5; Figs. 4, 6).

    python correlate.py measures.csv --hyperparameters model batch_size lr dropout --gap gap --by width --out correlation

TABLE.csv has a header and a row per model; it need not come from this project. Rows whose `reached_target` is False are left
out. Writes correlation.csv, correlation.md and plots to --out, and with --by COLUMN, for the rows of each value alone, to
OUT/COLUMN=VALUE/. They replace what an earlier correlate.py left there.
"""

import math
import zipfile
from contextlib import contextmanager
from urllib.parse import quote

import numpy as np
import pandas as pd

from crate import statistics
from crate.cli import InputError, Parser, number, one_line, path, run

FILES = "correlation.csv correlation.md reliability.csv scatter.png forest.png srr.png".split()


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("table", metavar="TABLE.csv")
    add("--hyperparameters", nargs="+", required=True, metavar="COLUMN", help="what the models differ in, seeds apart")
    add("--gap", required=True, metavar="COLUMN", help="the generalisation gap")
    add("--measures", nargs="+", metavar="COLUMN", help="default: the columns of numbers to the right of --gap, but gap*")
    add("--seed-column", metavar="COLUMN", help="statistics per seed, then averaged (default: seed, if there is one; or: none)")
    add("--by", metavar="COLUMN", help="also each value alone; one more hyperparameter of all rows (default: none)")
    add("--strata", metavar="COLUMN", help="tau within and between them (default: model, if a hyperparameter; or: none)")
    controls = "partial rank correlation given these; may be given several times (default: none)"
    add("--controls", nargs="+", action="append", default=[], metavar="COLUMN", help=controls)
    add("--val-losses", metavar="FILE.npz", help="run (names), losses (runs, images): how reliable the gap is (default: none)")
    add("--resamples", type=number(int, 1), default=10_000, help="and permutations (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of resamples and permutations (default: %(default)s)")
    add("--out", type=path, required=True, metavar="FOLDER")
    return parser.parse_args()


@contextmanager
def flagged():
    """A ValueError of crate.statistics begins with the name of an argument: refuse the flag of that name."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise InputError(f"--{name.replace('_', '-')} {rest}")


def read_table(file):
    """A CSV file with commas, semicolons or tabs; the index is the line in the file. Raises InputError."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            header = stream.readline()
        separator = max(",;\t", key=header.count)
        table = pd.read_csv(file, sep=separator, skipinitialspace=True, index_col=False, dtype={"run": str})
    except ValueError as error:  # all errors of pandas and of decoding are
        raise InputError(f"{file}: not a CSV table in UTF-8 ({one_line(error)})")
    table.index += 2
    return table.dropna(how="all")


def check_columns(arguments, columns):
    """Fill in the default seed column and strata. Raises InputError at a column that isn't there, or can't play its part."""
    axes = [*arguments.hyperparameters, arguments.by]
    if arguments.seed_column is None and "seed" in columns and "seed" not in axes:
        arguments.seed_column = "seed"
    if arguments.strata is None and "model" in axes:
        arguments.strata = "model"
    for argument in ("seed_column", "strata"):
        if getattr(arguments, argument) == "none":
            setattr(arguments, argument, None)
    flags = {"--hyperparameters": arguments.hyperparameters, "--measures": arguments.measures or []}
    flags |= {"--gap": [arguments.gap], "--by": [arguments.by], "--controls": sum(arguments.controls, [])}
    flags |= {"--seed-column": [arguments.seed_column], "--strata": [arguments.strata]}
    for flag, names in flags.items():
        for name in filter(None, names):
            if name not in columns:
                raise InputError(f"{flag} {name}: no such column; the table has {', '.join(columns)}")
            if flag in ("--gap", "--seed-column") and name in axes:
                raise InputError(f"{flag} {name}: it is also a hyperparameter; it can't be both")
    if arguments.hyperparameters == [arguments.by]:
        raise InputError(f"--by {arguments.by}: it is the only hyperparameter; name another with --hyperparameters")


def default_measures(table, arguments):
    """The columns of numbers right of the gap, but other gaps and what plays another part."""
    taken = {*arguments.hyperparameters, arguments.by, arguments.strata, arguments.seed_column, "run", "reached_target"}
    right = table.loc[:, arguments.gap :].iloc[:, 1:].dropna(axis=1, how="all")
    right = right[[name for name in right if name not in taken and not name.startswith("gap")]]
    measures = list(right.select_dtypes("number"))
    for name in right.columns.difference(measures, sort=False):
        print(f"{name} is taken for no measure: it holds text")
    if not measures:
        raise InputError(f"--gap {arguments.gap}: no column of numbers to the right of it; name the measures with --measures")
    return measures


def without(table, left_out, reason):
    """The table without the rows of the mask `left_out`, which are counted and named."""
    names = table["run"] if "run" in table else table.index.to_series().map("row {}".format)
    if left_out.any():
        print(f"{left_out.sum()} models left out, {reason}: {', '.join(names[left_out])}")
    return table[~left_out].copy()


def read_losses(path, table):
    """The validation losses (rows, images) of the table's runs, a DataFrame with the table's index."""
    try:
        with np.load(path) as file:
            losses = pd.DataFrame(file["losses"].astype(float), file["run"].astype(str))
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"--val-losses {path}: not an .npz file with arrays run (names) and losses (runs, images): {error}")
    if "run" not in table:
        raise InputError("--val-losses: the table has no column run, which tells whose losses they are")
    losses = losses[~losses.index.duplicated(keep=False) & np.isfinite(losses).all(axis=1)]
    missing = table["run"][~table["run"].isin(losses.index)].tolist()
    if missing:
        raise InputError(f"--val-losses {path}: {len(missing)} runs of the table have no losses there, such as {missing[0]}")
    return losses.loc[table["run"]].set_axis(table.index)


def analyse(table, axes, measures, losses, arguments):
    """(table, axes, strata, rows, reliability of the gap) of the rows of `table`; nothing is written yet."""
    strata, noise = arguments.strata, None
    if strata and table[strata].nunique() < 2:
        strata = None
    if strata and "srr" in measures and "baseline_type" not in table:
        srr = table["srr"].where(np.isfinite(table["srr"]))
        table = table.assign(baseline_type=srr.groupby(table[strata]).transform("mean"))
        measures = [*measures, "baseline_type"]
    if losses is not None:
        noise = statistics.reliability(table[arguments.gap], losses.loc[table.index], table[strata] if strata else None)
    with flagged():
        rows = statistics.correlate(
            table, axes, arguments.gap, measures, seed_column=arguments.seed_column, strata=strata,
            controls=arguments.controls, resamples=arguments.resamples, rng=arguments.seed,
        )  # fmt: skip
    if not any(math.isfinite(row["tau"]) for row in rows):
        raise InputError("--measures: none is finite for 3 models or more")
    rows.sort(key=lambda row: -row["tau"] if math.isfinite(row["tau"]) else math.inf)
    return table, axes, strata, rows, noise


def value(row, column, form="+.3f"):
    """A number and its interval, as text."""
    text = format(row[column], form) if math.isfinite(row[column]) else "-"
    low, high = row.get(f"{column}_low", math.nan), row.get(f"{column}_high", math.nan)
    return text + (f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "")


def markdown(table, axes, strata, rows, gap, controls):
    """The statistics in the layout of Tables 1 and 5, with intervals, and what they are."""
    from crate.files import markdown_table  # takes a second to import

    columns = {f"psi_{axis}": axis for axis in axes} | {"Psi": "Psi", "tau": "tau"}
    if strata:
        columns |= {"tau_within": f"tau within {strata}", "tau_between": "tau between"}
    columns |= {"_".join(["rho_given", *given]): f"Spearman's rho given {', '.join(given)}" for given in controls}
    forms = {"p_value": ("p", ".2g"), "p_holm": ("p (Holm)", ".2g"), "K": ("K", ".3f")}
    if strata:
        forms["K_within"] = f"K given {strata}", ".3f"
    forms["sign_error_mean"] = "sign error, mean", ".3f"
    header = ["measure", *columns.values(), *(heading for heading, _ in forms.values()), "models", "note"]
    lines = []
    for row in rows:
        numbers = [value(row, column) for column in columns] + [value(row, column, form) for column, (_, form) in forms.items()]
        lines.append([row["measure"], *numbers, row["models"], row["note"]])
    text = markdown_table(header, lines)

    seeds = max(row["seeds"] for row in rows)
    text += f"\nKendall's tau with `{gap}`; under each hyperparameter the granulated psi, Psi their mean. In brackets 95 %\n"
    text += f"intervals, {rows[0]['resamples']} bootstrap resamples of the settings; p: as many permutations, two-sided.\n"
    if seeds > 1:
        text += f"All but rho are means over {seeds} seeds.\n"
    if strata:
        levels = table[strata].nunique()
        text += f"Intervals and p are about these {levels} levels of `{strata}`. For new ones the level is the unit, and no\n"
        text += f"permutation of {levels} levels gives a p below 1/{math.factorial(levels)}.\n"
    for row in rows:
        if math.isfinite(row.get("share_first", math.nan)):
            text += f"tau of srr minus that of its closest rival, {row['lead_rival']}: {value(row, 'lead')}. The rival is\n"
            text += "chosen anew in every resample, which lowers the interval a little; srr is above all rivals in\n"
            text += f"{row['share_first']:.0%} of them.\n"
    return text


def csv_text(rows):
    return pd.DataFrame(rows).to_csv(index=False, na_rep="nan", lineterminator="\n")


def write(folder, table, axes, strata, rows, noise, gap, controls):
    """Write and draw what `analyse` found, and say it in one line."""
    from crate import figures  # both take a second to import
    from crate.files import write_text

    best = rows[0]
    write_text(folder / "correlation.csv", csv_text(rows))
    write_text(folder / "correlation.md", markdown(table, axes, strata, rows, gap, controls))
    line = f"{folder}: {len(table)} models, {len(rows)} measures, {best['resamples']} resamples; "
    line += f"highest tau: {best['measure']} {value(best, 'tau')}"
    if noise:
        write_text(folder / "reliability.csv", csv_text({"run": table["run"], "gap": table[gap]} | noise))
        line += f"; reliability of the gap {noise['reliability']:.3f}"
        line += f", within {strata} {noise['reliability_within']:.3f}" if strata else ""
    if best["note"]:
        line += f"; {best['note']}"
    print(line)

    rows = [row for row in rows if math.isfinite(row["tau"])]
    levels = table[strata].astype(str) if strata else pd.Series("", table.index)
    panels = {row["measure"]: (f"τ = {row['tau']:.2f}", table[row["measure"]]) for row in rows}
    figures.scatter(panels, table[gap], levels, folder / "scatter.png", gap_name=gap, legend=strata)
    if "srr" in panels:
        figures.srr_scatter(table["srr"], table[gap], levels, folder / "srr.png", gap_name=gap, legend=strata)

    def lines(statistic):
        return [(row["measure"], row[statistic], row[f"{statistic}_low"], row[f"{statistic}_high"]) for row in rows]

    taus = {"all pairs": lines("tau")}
    if strata:
        taus |= {f"within {strata}": lines("tau_within"), "between": lines("tau_between")}
    figures.forest(taus, folder / "forest.png", label=f"Kendall's τ with {gap}, 95 % interval")


def remove_earlier(out):
    """Remove what an earlier correlate.py left in `out` and in its folders COLUMN=VALUE, and nothing else."""
    for folder in (out, *(file.parent for file in out.glob("*=*/correlation.csv"))):
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        if folder != out and not any(folder.iterdir()):
            folder.rmdir()


def main():
    arguments = parse_arguments()
    table = read_table(arguments.table)
    check_columns(arguments, list(table))
    gap, by = arguments.gap, arguments.by
    if "reached_target" in table:
        missed = table["reached_target"].astype(str).str.lower().isin(["false", "0", "0.0"])
        table = without(table, missed, "they did not reach the target")
    if table.empty:
        raise InputError(f"{arguments.table}: reached_target is False in every row; rank statistics need 3 models or more")
    with flagged():
        table[gap] = statistics.numbers(table, gap, "gap")
    measures = arguments.measures or default_measures(table, arguments)
    table = without(table, ~np.isfinite(table[gap]), "their gap is missing or not finite")
    with flagged():
        for name in measures:
            table[name] = statistics.numbers(table, name)
    if arguments.seed_column and table[arguments.seed_column].is_unique:
        print(f"every run has a {arguments.seed_column} of its own: all pairs of models count")
    losses = read_losses(arguments.val_losses, table) if arguments.val_losses else None

    # All is computed before anything is written, so that bad input leaves no half of a result.
    out, results = arguments.out, {}
    axes = [axis for axis in arguments.hyperparameters if axis != by]
    for level, part in table.groupby(by, sort=False) if by else ():
        folder = f"{quote(by, safe='')}={quote(str(level), safe='')}"
        try:
            results[out / folder] = analyse(part, axes, measures, losses, arguments)
        except InputError as error:  # too few models, for one; what is wrong with all rows is refused below
            print(f"{folder}: left out: {error}")
    results[out] = analyse(table, [*axes, by] if by else axes, measures, losses, arguments)
    remove_earlier(out)
    for folder, result in results.items():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, *result, gap, arguments.controls)


if __name__ == "__main__":
    run(main)
