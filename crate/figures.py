"""Every figure. Drawn with matplotlib's object interface, which needs no display and leaves no state behind."""

import math
import os
from io import BytesIO
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # a notebook's backend, inherited, isn't installed everywhere

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, told apart with any colour vision; one per model type, the same in every figure.
COLOURS = {
    "crate-c": "#0072B2", "crate-n": "#D55E00", "crate-t": "#009E73", "crate": "#CC79A7",
    "crate-fix": "#E69F00", "crate-identity": "#56B4E9", "crate-e": "#000000", "vit": "#F0E442",
}  # fmt: skip
GREY = "#555555"


def canvas(rows=1, columns=1, width=4.2, height=3.2, **settings):
    """A figure of rows x columns panels of `width` x `height` inches, and its axes."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def grid(panels, columns, **settings):
    """A canvas of that many panels, row by row, and their axes."""
    figure, axes = canvas(math.ceil(panels / columns), columns, squeeze=False, **settings)
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, axes.flat[:panels]


def in_order(names):
    """{name: colour} from dark to light."""
    return {name: colormaps["viridis"](0.9 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)}


def save(figure, path):
    """Write the figure as PNG to `path`, whose folder is made if need be; a large one in 256 colours, a third of the size."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=120)
    if buffer.tell() < 200_000:
        Path(path).write_bytes(buffer.getvalue())
    else:
        Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def rates_by_layer(rates, titles, path):
    """R^c before and after every compression step, mean over seeds with the range shaded, up to where a seed overflows
    (Figs. 1a, 5). rates: rows of crate.compression.compress; titles: {rule: title}, a panel each.
    """
    figure, axes = grid(len(titles), min(len(titles), 3), sharex=True)
    shown = {"before": ("before the step", GREY, "o-", 5), "after": ("after the step", COLOURS["crate-n"], "s-", 4)}
    shown["after_equal_norm"] = ("after it, at equal norm", COLOURS["crate-c"], "^--", 3)
    for axis, (rule, title) in zip(axes, titles.items()):
        own = rates[rates["rule"] == rule]
        overflow = own.loc[own["overflow"].astype(bool), "layer"].min()  # NaN without
        drawn = own[~(own["layer"] >= overflow)]
        for when, (label, colour, style, size) in shown.items():
            values = drawn[when].astype(float).groupby(drawn["layer"]).agg(["min", "max", "mean"]).dropna()
            axis.fill_between(values.index, values["min"], values["max"], color=colour, alpha=0.25, linewidth=0)
            axis.plot(values["mean"], style, color=colour, markersize=size, label=label)
        if math.isfinite(overflow):
            axis.set_yscale("log" if len(drawn) else "linear")
            axis.axvline(overflow, color=GREY, linestyle=":")
            place = dict(xytext=(4, 0), textcoords="offset points", rotation=90, va="center", fontsize=8)
            axis.annotate(f"overflow at layer {overflow}", (overflow, 0.5), xycoords=("data", "axes fraction"), **place)
        axis.set(title=title, xlabel="layer", ylabel="$R^c$ (nats)", xlim=(0.5, rates["layer"].max() + 0.5))
        axis.tick_params(labelbottom=True)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def log_curves(curves, path):
    """log x and its expansions at 1 (Fig. 1b). curves: a column x, and one for each curve."""
    figure, axis = canvas()
    for name, style in zip(curves.columns.drop("x"), ("-", "--", "-.", ":")):
        axis.plot(curves["x"], curves[name], style, label=name)
    axis.axhline(0, color=GREY, linewidth=0.5)
    axis.set(xlabel="$x$", ylabel="value", title="$\\log x$ and its expansions at $x = 1$")
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def by_layer(curves, path, *, label, colours=None, columns=2):
    """Lines over the layers with a shaded interval, in panels (Figs. 2, 3); no file without curves.

    curves: rows {panel, line, layer, mean, low, high}; colours: {line: colour}, else from dark to light.
    """
    if curves.empty:
        return
    panels, lines = curves["panel"].unique(), curves["line"].unique()
    colours, columns = colours or in_order(lines), min(columns, len(panels))
    figure, axes = grid(len(panels), columns, width=8 / columns, height=2.5, sharey="row")
    handles = {}
    for axis, panel in zip(axes, panels):
        for line, marker in zip(lines, "os^Dv<>ph*" * len(lines)):
            own, style = curves[(curves["panel"] == panel) & (curves["line"] == line)], {"color": colours[line]}
            (handles[line],) = axis.plot(own["layer"], own["mean"], marker + "-", markersize=3.5, linewidth=1.2, **style)
            axis.fill_between(own["layer"], own["low"], own["high"], alpha=0.15, linewidth=0, **style)
        axis.set(title=panel, xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(label, fontsize=10)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 6), frameon=False, fontsize=8)
    save(figure, path)


def intervention(runs, slopes, observed_slope, path):
    """The gap against SRR along eta, a line per seed, and a dashed one of `observed_slope`, if any, through eta = 0.

    runs: {model, seed, srr_reg, srr, gap}; slopes: {model: text}.
    """
    figure, axes = grid(len(slopes), min(len(slopes), 2))
    colours = in_order(sorted(runs["srr_reg"].unique()))
    for axis, (model, slope) in zip(axes, slopes.items()):
        own = runs[runs["model"] == model].sort_values("srr_reg")
        for _, seed in own.groupby("seed"):
            axis.plot(seed["srr"], seed["gap"], color=GREY, linewidth=0.6, alpha=0.6, zorder=1)
        for eta, of_eta in own.groupby("srr_reg"):
            axis.scatter(of_eta["srr"], of_eta["gap"], s=16, color=colours[eta], label=f"{eta:g}")
        if observed_slope is not None:
            unmoved = own.loc[own["srr_reg"].abs() == own["srr_reg"].abs().min(), ["srr", "gap"]]
            axis.axline(unmoved.mean(), slope=observed_slope, color="black", linewidth=1, linestyle="--")
        axis.set(title=f"{model}: slope {slope}", xlabel="SRR measure of the trained model", ylabel="gap (nats)")
        axis.title.set_size(9)
    place = dict(loc="outside upper center", ncols=min(len(colours), 8), frameon=False, fontsize=8, title_fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), title="eta", **place)
    save(figure, path)


def short(name):
    """A column's name, cut to what fits beside a panel. Its `$` is a `$`, not a formula."""
    return (name if len(name) <= 40 else name[:39] + "…").replace("$", r"\$")


def points(axis, x, y, levels, size):
    """Points in the colours of their levels: model types have their own. x, y and levels are arrays (models,)."""
    for level, colour in (COLOURS | in_order(sorted(set(levels) - set(COLOURS)))).items():
        own = levels == level
        if own.any():
            axis.scatter(x[own], y[own], s=size, color=colour, alpha=0.8, linewidths=0, label=level)


def legend_above(figure, axis, title, columns):
    """A legend of the axis above the whole figure; none for more levels than colours can tell apart."""
    handles, labels = axis.get_legend_handles_labels()
    if not 1 < len(labels) <= 12:
        return
    place = dict(loc="outside upper center", ncols=min(len(labels), columns), fontsize=8, title_fontsize=8, frameon=False)
    legend = figure.legend(handles, map(short, labels), title=short(title), **place)
    for handle in legend.legend_handles:
        handle.set_sizes([25])


def scatter(panels, gap, levels, path, *, gap_name, legend=None):
    """The gap against every measure, a small panel each (Figs. 4, 6); a measure over more than two decades on a log axis.

    panels: {measure: (title, values (models,))}; gap (models,); levels: each model's level of the hyperparameter `legend`, or
    one and the same.
    """
    columns = min(6, math.ceil(len(panels) ** 0.5))
    figure, axes = grid(len(panels), columns, width=2.3, height=2.0, sharey=True)
    gap, levels = np.asarray(gap, float), np.asarray(levels)
    for axis, (name, (title, values)) in zip(axes, panels.items()):
        values = np.where(np.isfinite(values), values, math.nan)
        if np.nanmin(values) > 0 and np.nanmax(values) > 100 * np.nanmin(values):
            axis.set_xscale("log")
        else:
            axis.locator_params(axis="x", nbins=4)
        points(axis, values, gap, levels, max(1.0, min(14.0, 3000 / len(gap))))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(short(name), fontsize=8 if len(name) < 24 else 6.5)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_offset_text().set_size(7)
    figure.supylabel(short(gap_name), fontsize=9)
    if legend:
        legend_above(figure, axes[0], legend, 2 * columns)
    save(figure, path)


def srr_scatter(srr, gap, levels, path, *, gap_name, legend=None):
    """SRR against the gap, as in Fig. 4, and beside it, where `legend` is named, both minus their level's mean."""
    finite = np.isfinite(srr)
    srr, gap, levels = (np.asarray(values)[finite] for values in (srr, gap, levels))
    figure, axes = grid(2 if legend else 1, 2, width=4.2, height=3.6)
    size = max(3.0, min(24.0, 5000 / len(gap)))
    points(axes[0], srr, gap, levels, size)
    axes[0].set(xlabel="SRR", ylabel=short(gap_name))
    if legend:
        inside = np.zeros((2, len(gap)))
        for own in (levels == level for level in set(levels)):
            inside[:, own] = srr[own] - srr[own].mean(), gap[own] - gap[own].mean()
        points(axes[1], *inside, levels, size)
        axes[1].set(xlabel=f"SRR, minus its mean in each {short(legend)}", ylabel=f"{short(gap_name)}, minus its mean")
        legend_above(figure, axes[0], legend, 6)
    save(figure, path)


def forest(taus, path, *, label):
    """tau of each measure with its 95 % interval, a line a measure. taus: {series: rows (measure, tau, low, high)}."""
    names = [row[0] for row in next(iter(taus.values()))]
    figure, axis = canvas(width=6.4, height=1.4 + (0.12 + 0.06 * len(taus)) * len(names))
    for k, ((name, rows), marker) in enumerate(zip(taus.items(), "osD")):
        height, colour = np.arange(len(names)) + 0.26 * (k - (len(taus) - 1) / 2), list(COLOURS.values())[k]
        _, numbers, lows, highs = zip(*rows)
        axis.hlines(height, lows, highs, color=colour, linewidth=1.5)
        axis.plot(numbers, height, marker, color=colour, markersize=4, label=name)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set(xlim=(-1.03, 1.03), ylim=(len(names) - 0.4, -0.6))
    axis.set_xlabel(label, parse_math=False)
    axis.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    save(figure, path)
