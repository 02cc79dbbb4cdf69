"""Every figure. Drawn with matplotlib's object interface, which needs no display and leaves no state behind."""

import itertools
import math
import os
from io import BytesIO
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # a notebook's backend, inherited, isn't installed everywhere

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from crate.claims import mean_interval

matplotlib.rcdefaults()  # whatever a matplotlibrc says

# Okabe and Ito's colours, told apart with any colour vision; one per model type, the same in every figure.
COLOURS = {
    "crate-c": "#0072B2", "crate-n": "#D55E00", "crate-t": "#009E73", "crate": "#CC79A7",
    "crate-fix": "#E69F00", "crate-identity": "#56B4E9", "crate-e": "#000000", "vit": "#882255",
}  # fmt: skip
OTHERS = ["#999933", "#44AA99", "#332288", "#AA4499"]  # of other types
GREY = "#555555"


def grid(panels=1, columns=1, width=4.2, height=3.2, **settings):
    """A figure of panels of `width` x `height` inches, row by row, and their axes."""
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, axes.flat[:panels]


def colours_of(names):
    """{name: colour}: model types have their own, and those beside them others; other names go from dark to light, in order."""
    if not COLOURS.keys() & set(names):
        return dict(zip(names, colormaps["viridis"](np.linspace(0, 0.9, len(names)))))
    others = itertools.cycle(OTHERS)
    return {name: COLOURS.get(name) or next(others) for name in names}


def plain(name):
    """A name of a user's, in which $ begins no formula and _ hides no line of a legend."""
    return ("\u200b" if str(name).startswith("_") else "") + str(name).replace("$", "\\$")


def legend_above(figure, axis, title=None):
    """One legend for all panels, above them; none for more names than colours can tell apart."""
    handles, names = axis.get_legend_handles_labels()
    if 1 < len(names) <= 12:
        place = dict(loc="outside upper center", frameon=False, fontsize=8, title_fontsize=8)
        figure.legend(handles, names, title=title, ncols=math.ceil(len(names) / math.ceil(len(names) / 6)), **place)


def save(figure, path):
    """Write the figure as PNG to `path`, whose folder is made if need be, in 256 colours: a third of the size."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def rates_by_layer(rates, titles, path):
    """R^c before and after every compression step, mean over seeds with the range shaded (Figs. 1a, 5).

    rates: rows of crate.compression.rates_along; titles: {rule: title}, a panel each.
    """
    figure, axes = grid(len(titles), min(len(titles), 3))
    shown = {"before": ("before the step", GREY, dict(marker="o", markersize=8, markerfacecolor="none"))}  # seen below others
    shown["after"] = ("after the step", COLOURS["crate-n"], dict(marker="s", markersize=4))
    shown["after_equal_norm"] = ("after it, at equal norm", COLOURS["crate-c"], dict(marker="^", markersize=4, linestyle="--"))
    for axis, (rule, title) in zip(axes, titles.items()):
        own = rates[rates["rule"] == rule]
        for when, (label, colour, style) in shown.items():
            values = own[when].astype(float).groupby(own["layer"]).agg(["min", "max", "mean"]).dropna()
            axis.fill_between(values.index, values["min"], values["max"], color=colour, alpha=0.25, linewidth=0)
            axis.plot(values["mean"], color=colour, label=label, **style)
        overflow = own.loc[own["overflow"].astype(bool), "layer"].min()  # NaN without
        if math.isfinite(overflow):
            axis.set_yscale("symlog")
            title += f"; overflow at layer {overflow:.0f}"
        first = own[own["layer"] == 1][["before", "after"]].astype(float).mean()
        if first["after"] < 1e-3 * first["before"]:  # no line of the panel can be read
            text = f"layer 1: from {first['before']:.0f} nats to {first['after']:.1g};\nthen nothing is left"
            axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", fontsize=9)
        axis.set(xlabel="layer", ylabel="$R^c$ (nats)", xlim=(0.5, rates["layer"].max() + 0.5))
        axis.set_title(title, fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def log_curves(curves, path):
    """log x and its expansions at 1 (Fig. 1b). curves: a column x, and one for each curve."""
    figure, (axis,) = grid()
    for name, style in zip(curves.columns.drop("x"), ("-", "--", "-.", ":")):
        axis.plot(curves["x"], curves[name], style, label=name)
    axis.axhline(0, color=GREY, linewidth=0.5)
    axis.set(xlabel="$x$", ylabel="value", title="$\\log x$ and its expansions at $x = 1$")
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def by_layer(rows, panel, line, path):
    """SRR over the layers, mean over seeds and its interval (Figs. 2, 3). rows: {layer, srr}, one a seed; panel, line: columns
    of them, each level of which has a panel or a line.
    """
    panels, colours = rows[panel].unique(), colours_of(rows[line].unique())
    columns = min(4, len(panels))
    figure, axes = grid(len(panels), columns, width=max(8 / columns, 2.6), height=2.5)
    for axis, title in zip(axes, panels):
        for (label, colour), marker in zip(colours.items(), "os^Dv<>ph*" * len(colours)):
            seeds = rows[(rows[panel] == title) & (rows[line] == label)].groupby("layer")["srr"]
            mean, low, high = np.array([mean_interval(values) for _, values in seeds]).reshape(-1, 3).T
            axis.plot([*seeds.groups], mean, marker + "-", color=colour, markersize=3.5, linewidth=1.2, label=plain(label))
            axis.fill_between([*seeds.groups], low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel("layer")
        axis.set_title(title, fontsize=9 if len(title) * columns < 90 else 6.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(r"SRR measure, $\lambda ||Z||_0 + R^c - R$", fontsize=10)
    legend_above(figure, axes[0])
    save(figure, path)


def scatter(panels, levels, path, *, label, legend=None, columns=6, width=2.3, sharey=True):
    """y against x, a panel each (Figs. 4, 6); an x over more than two decades on a log axis.

    panels: {label of x: (title, x (models,), y (models,))}; levels (models,): their colours, levels of the column `legend`.
    """
    figure, axes = grid(len(panels), min(columns, len(panels)), width=width, height=0.87 * width, sharey=sharey)
    for axis, (name, (title, x, y)) in zip(axes, panels.items()):
        x = x.where(np.isfinite(x))
        if x.min() > 0 and x.max() > 100 * x.min():
            axis.set_xscale("log")
        else:
            axis.locator_params(axis="x", nbins=4)
        for level, colour in colours_of(sorted(set(levels))).items():
            own = levels[x.index] == level
            axis.scatter(x[own], y[own], s=4 * width, color=colour, linewidths=0, alpha=0.8, label=plain(level))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(plain(name), fontsize=8 if len(name) < 24 * width / 2.3 else 6.5)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_offset_text().set_size(7)
    figure.supylabel(plain(label), fontsize=9)
    legend_above(figure, axes[0], title=legend and plain(legend))
    save(figure, path)


def forest(taus, path, *, label):
    """tau of each measure with its 95 % interval, a line a measure. taus: {series: rows (measure, tau, low, high)}."""
    names = [row[0] for row in next(iter(taus.values()))]
    figure, (axis,) = grid(width=6.4, height=1.4 + (0.12 + 0.06 * len(taus)) * len(names))
    for k, ((name, rows), marker, colour) in enumerate(zip(taus.items(), "osD", COLOURS.values())):
        height = np.arange(len(names)) + 0.26 * (k - (len(taus) - 1) / 2)
        _, numbers, lows, highs = zip(*rows)
        axis.hlines(height, lows, highs, color=colour, linewidth=1.5)
        name = plain(name) if np.isfinite(numbers).any() else f"{plain(name)}: too few pairs"
        axis.plot(numbers, height, marker, color=colour, markersize=4, label=name)
    if "srr" in names:
        axis.axhspan(names.index("srr") - 0.5, names.index("srr") + 0.5, color="0.92", zorder=0)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set(xlim=(-1.03, 1.03), ylim=(len(names) - 0.4, -0.6))
    axis.set_xlabel(plain(label))
    axis.set_yticks(range(len(names)), map(plain, names), fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    legend_above(figure, axis)
    save(figure, path)


def pushed(changes, path):
    """The gap when SRR is pushed through the loss, in % of eta = 0: each type, and their mean.

    changes: {title: (rows {model, srr_reg, seed, srr, gap}, % of gap per % of SRR where nobody pushed)}.
    """
    figure, axes = grid(len(changes), len(changes), width=4.6, height=4, sharey=True)
    for axis, (title, (rows, slope)) in zip(axes, changes.items()):
        models = sorted(rows["model"].unique(), key=lambda model: [*COLOURS, model].index(model))
        for model, colour in colours_of(models).items():
            own = rows[rows["model"] == model]
            line = sorted((of_eta["srr"].mean(), *mean_interval(of_eta["gap"])) for _, of_eta in own.groupby("srr_reg"))
            x, y, low, high = np.array([*line, (0, 0, 0, 0)]).T
            order = np.argsort(x)
            axis.plot(x[order], y[order], color=colour, linewidth=1.2)
            axis.errorbar(x, y, [y - low, high - y], fmt="o", color=colour, markersize=4, label=model)
        gaps = rows.pivot(index=["srr_reg", "seed"], columns="model", values="gap").mean(axis=1, skipna=False)
        srr = rows.groupby(["srr_reg", "model"])["srr"].mean().groupby("srr_reg").mean()
        for name, (eta, own) in zip(["mean of the types", *[None] * len(srr)], gaps.groupby("srr_reg")):
            mean, low, high = mean_interval(own)
            diamond = dict(fmt="D", color="black", markersize=6, linewidth=2, label=name)
            axis.errorbar(srr[eta], mean, [[mean - low], [high - mean]], **diamond)
        for line in axis.axhline, axis.axvline:
            line(0, color=GREY, linewidth=0.8)
        dashed = dict(color=GREY, linestyle="--", linewidth=1, label="slope among models of one type that nobody pushed")
        axis.axline((0, 0), slope=slope, **dashed)
        axis.set_title(f"{title}: {rows['seed'].nunique()} seeds", fontsize=10)
        axis.set_xlabel("change of SRR through the loss (%)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("change of the gap (%)")
    legend_above(figure, axes[0])
    save(figure, path)
