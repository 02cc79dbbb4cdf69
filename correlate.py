"""Does a measure rank models as their generalisation gap does? Rank statistics (Section 5: Tables 1, 5; Figs. 4, 6).

    python correlate.py measures.csv --hyperparameters model batch_size lr dropout --gap gap --by width --out correlation

The table is a CSV with a header and a row per model; it need not come from this project. Rows whose `reached_target` is False
are left out. Writes to --out correlation.csv, correlation.md, scatter.png, forest.png and heatmap.png; with --by COLUMN also to
OUT/COLUMN=VALUE/, for the rows of each value alone.
"""

import math
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from crate.cli import InputError, Parser, number, output_folder, run
from crate.files import markdown_table, read_csv, write_csv, write_text

MOST_COLOURS = 12


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("table", metavar="TABLE.csv")
    add("--hyperparameters", nargs="+", required=True, metavar="COLUMN", help="what the models differ in, seeds apart")
    add("--gap", required=True, metavar="COLUMN", help="the generalisation gap")
    add("--measures", nargs="+", metavar="COLUMN", help="default: all columns of numbers to the right of --gap, but gap*")
    add("--seed-column", metavar="COLUMN", help="statistics per seed, then averaged (default: seed, if there is one; or: none)")
    add("--by", metavar="COLUMN", help="also each value of this column alone; one more hyperparameter where all rows are taken")
    add("--colour", metavar="COLUMN", help="of the scatter plots' points (default: model, if that is a hyperparameter)")
    add("--validation-points", type=number(int, 1), metavar="N", help="weight sign errors (12 seeds or more)")
    add("--accuracy-gap", default="gap_accuracy", metavar="COLUMN", help="for --validation-points (default: gap_accuracy)")
    add("--resamples", type=number(int, 1), default=10_000, help="and permutations; large tables get fewer (default: 10000)")
    add("--seed", type=number(int, 0), default=0, help="of resamples and permutations (default: 0)")
    add("--out", required=True, metavar="FOLDER")
    return parser.parse_args()


def is_false(text):
    return text.strip().lower() in ("false", "0")


def say_left_out(rows, reason):
    names = ", ".join(row.get("run") or " ".join(list(row.values())[:6]) for row in rows)
    if rows:
        print(f"{len(rows)} models left out, {reason}: {names}")


def check_columns(arguments, columns):
    """Raise InputError at a flag that names a column twice, or one that isn't there."""
    flags = {
        "--hyperparameters": arguments.hyperparameters, "--gap": [arguments.gap], "--measures": arguments.measures or [],
        "--seed-column": [arguments.seed_column], "--by": [arguments.by], "--colour": [arguments.colour],
        "--accuracy-gap": [arguments.accuracy_gap] if arguments.validation_points else [],
    }  # fmt: skip
    for flag, names in flags.items():
        for name in names:
            if name not in (*columns, None) and (flag, name) != ("--seed-column", "none"):
                raise InputError(f"{flag} {name}: no such column; the table has {', '.join(columns)}")
            if names.count(name) > 1:
                raise InputError(f"{flag}: {name} is named twice; name it once")
    for flag, name in (("--gap", arguments.gap), ("--seed-column", arguments.seed_column)):
        if name and name in [*arguments.hyperparameters, arguments.by]:
            raise InputError(f"{flag} {name}: it is also a hyperparameter; it can't be both")


def default_measures(rows, columns, arguments, seed_column):
    """The columns of numbers to the right of the gap that aren't another gap and play no other part."""
    from crate.statistics import numbers

    taken = {*arguments.hyperparameters, arguments.by, arguments.colour, seed_column, "run", "reached_target"}
    measures = []
    for name in columns[columns.index(arguments.gap) + 1 :]:
        with suppress(InputError):  # text
            if name not in taken and not name.startswith("gap") and any(map(math.isfinite, numbers(rows, name))):
                measures.append(name)
    if not measures:
        raise InputError(f"--gap {arguments.gap}: no column of numbers to the right of it; name the measures with --measures")
    return measures


def markdown(rows, axes, arguments):
    """The statistics in the layout of Tables 1 and 5, sorted by tau, with intervals."""

    def value(row, key, form="+.3f"):
        return format(row[key], form) if math.isfinite(row[key]) else "-"

    def p_value(row, key):
        return "< 1e-15" if row[key] < 1e-15 else value(row, key, ".2g")

    def with_interval(row, key):
        sd = f" ± {row[f'{key}_sd']:.3f}" if row["seeds"] > 1 and f"{key}_sd" in row else ""
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return value(row, key) + sd + (f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "")

    against_srr = ["tau(srr) - tau"] if "diff_srr" in rows[0] else []
    header = ["measure", *axes, "Psi", "tau", *against_srr, "p", "p (Holm)", "K", "sign error, mean", "max", "models", "note"]
    lines = [
        [
            row["measure"], *(value(row, f"psi_{axis}") for axis in axes), with_interval(row, "Psi"), with_interval(row, "tau"),
            *(with_interval(row, "diff_srr") if row["measure"] != "srr" else "" for _ in against_srr),
            p_value(row, "p_value"), p_value(row, "p_holm"), value(row, "K", ".3f"),
            value(row, "sign_error_mean", ".3f"), value(row, "sign_error_max", ".2f"), row["models"], row["note"],
        ]
        for row in rows
    ]  # fmt: skip
    first, seeds = rows[0], max(row["seeds"] for row in rows)
    p = f"{first['permutations']} permutations" if first["permutations"] else "normal limit of the permutation test"
    over_seeds = f"; {seeds} seeds, mean ± standard deviation" if seeds > 1 else ""
    return markdown_table(header, lines) + (
        f"\nKendall's tau with `{arguments.gap}`; under each hyperparameter the granulated psi, Psi their mean. In brackets "
        f"95 % intervals, {first['resamples']} bootstrap resamples of the models; p: {p}, two-sided{over_seeds}.\n"
    )


def analyse(rows, axes, measures, seed_column, arguments, label):
    """Everything that is written for one set of rows: statistics sorted by tau, and the rank correlations of the measures."""
    from tqdm import tqdm

    from crate.statistics import correlate, numbers, rank_correlations

    statistics = correlate(
        rows, axes, arguments.gap, measures, seed_column=seed_column, resamples=arguments.resamples, rng=arguments.seed,
        validation_points=arguments.validation_points, accuracy_gap=arguments.accuracy_gap,
        progress=lambda names: tqdm(names, desc=label, unit="measure", leave=False),
    )  # fmt: skip
    statistics.sort(key=lambda row: -row["tau"] if math.isfinite(row["tau"]) else math.inf)
    finite = [row["measure"] for row in statistics if math.isfinite(row["tau"])]
    if not finite:
        raise InputError(f"{label}: no measure is finite for 3 models or more")
    columns = {name: numbers(rows, name) for name in [arguments.gap, *finite]}
    seeds = [row[seed_column] if seed_column else "" for row in rows]
    return rows, axes, statistics, columns, rank_correlations(list(columns.values()), seeds)


def write(folder, rows, axes, statistics, columns, matrix, arguments):
    from crate import figures

    output_folder(folder)
    colour = arguments.colour
    drawn = [row for row in statistics if math.isfinite(row["tau"])]
    panels = {row["measure"]: (f"τ = {row['tau']:.2f}", columns[row["measure"]]) for row in drawn}
    figures.scatter(
        panels, columns[arguments.gap], [row[colour] if colour else "" for row in rows], folder / "scatter.png",
        gap_name=arguments.gap, legend=colour,
    )  # fmt: skip
    gap_label = f"Kendall's τ with {arguments.gap}, 95 % interval"
    lines = [(row["measure"], row["tau"], row["tau_low"], row["tau_high"]) for row in drawn]
    figures.forest(lines, folder / "forest.png", label=gap_label, highlight=("srr",), limits=(-1.03, 1.03))
    figures.rank_heatmap(list(columns), matrix, folder / "heatmap.png", label="Kendall's τ-b")
    write_csv(folder / "correlation.csv", statistics)
    write_text(folder / "correlation.md", markdown(statistics, axes, arguments))
    best, count = statistics[0], statistics[0]["resamples"]
    print(
        f"{folder}: {len(rows)} models, {len(statistics)} measures, {count} resamples; highest tau: {best['measure']} "
        f"{best['tau']:+.3f} [{best['tau_low']:+.2f}, {best['tau_high']:+.2f}]"
    )


def main():
    arguments = parse_arguments()
    rows = read_csv(arguments.table)
    columns = list(rows[0])
    check_columns(arguments, columns)

    from crate.statistics import numbers

    missed = [row for row in rows if is_false(row.get("reached_target", ""))]
    rows = [row for row in rows if not is_false(row.get("reached_target", ""))]
    if not rows:
        raise InputError(f"{arguments.table}: reached_target is False in every row; rank statistics need 3 models or more")
    say_left_out(missed, "they did not reach the target")
    seed_column = arguments.seed_column or ("seed" if "seed" in columns and "seed" not in arguments.hyperparameters else None)
    seed_column = None if seed_column == "none" else seed_column
    gaps = numbers(rows, arguments.gap, "--gap", None)
    say_left_out([row for row, gap in zip(rows, gaps) if not math.isfinite(gap)], "their gap is not finite")
    measures = arguments.measures or default_measures(rows, columns, arguments, seed_column)
    axes, by = [axis for axis in arguments.hyperparameters if axis != arguments.by], arguments.by
    arguments.colour = arguments.colour or ("model" if "model" in axes else None)
    levels = len({row[arguments.colour] for row in rows}) if arguments.colour else 1
    if levels > MOST_COLOURS:
        raise InputError(f"--colour {arguments.colour}: {levels} values; no more than {MOST_COLOURS} colours can be told apart")

    # All is computed before anything is written, so that bad input leaves no half of a result.
    out, results = Path(arguments.out), {}
    for value in dict.fromkeys(row[by] for row in rows) if by else ():
        part = [row for row in rows if row[by] == value]
        folder = f"{quote(by, safe='')}={quote(value, safe='')}"
        try:
            results[out / folder] = analyse(part, axes, measures, seed_column, arguments, folder)
        except InputError as error:  # too few models, for one; what is wrong with all rows is refused below
            print(f"{folder}: left out: {error}")
    results[out] = analyse(rows, axes + [by] * bool(by), measures, seed_column, arguments, "all models")
    output_folder(out)
    for folder, result in results.items():
        write(folder, *result, arguments)


if __name__ == "__main__":
    run(main)
