"""Every figure. Drawn with matplotlib's object interface, which needs no display and leaves no state behind."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from crate.claims import mean_interval, nested

# Okabe and Ito's colours, told apart with any colour vision; one per model type, the same in every figure.
COLOURS = {
    "crate-c": "#0072B2", "crate-n": "#D55E00", "crate-t": "#009E73", "crate": "#CC79A7",
    "crate-fix": "#E69F00", "crate-identity": "#56B4E9", "crate-e": "#000000", "vit": "#F0E442",
}  # fmt: skip
GREY = "#555555"
MOST_BYTES = 200_000  # of a PNG in all its colours


def canvas(rows=1, columns=1, width=4.2, height=3.2, **settings):
    """A figure of rows x columns panels of `width` x `height` inches, and its axes."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def grid(panels, columns, **settings):
    """A canvas of that many panels, row by row, and the list of their axes."""
    figure, axes = canvas(math.ceil(panels / columns), columns, squeeze=False, **settings)
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, axes.flat[:panels]


def in_order(names):
    """{name: colour} from dark to light."""
    return {name: colormaps["viridis"](0.9 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)}


def save(figure, path):
    """Write the figure as PNG to `path`, whose folder is made if need be, and as PDF beside it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=120)
    if buffer.tell() < MOST_BYTES:
        Path(path).write_bytes(buffer.getvalue())
    else:  # in 256 colours it is a third of the size
        Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)
    figure.set_layout_engine("none")  # it is laid out, and that takes most of the time
    figure.savefig(Path(path).with_suffix(".pdf"), metadata={"CreationDate": None})


def rates_by_layer(rows, titles, path):
    """R^c before and after every compression step, mean over seeds with the range shaded, a panel per rule of `titles`.

    rows: of crate.compression.compress. A layer at which any seed has overflowed is marked, and not drawn.
    """
    figure, axes = grid(len(titles), min(len(titles), 3), sharex=True)
    for axis, (rule, title) in zip(axes, titles.items()):
        own = [row for row in rows if row["rule"] == rule]
        overflow = min((row["layer"] for row in own if row["overflow"]), default=math.inf)
        drawn = [row for row in own if row["layer"] < overflow]
        for when, colour, marker in (("before", GREY, "o"), ("after", COLOURS["crate-n"], "s")):
            values = nested(drawn, "layer", when)
            low, high, mean = ([*map(of, values.values())] for of in (min, max, np.mean))
            axis.fill_between([*values], low, high, color=colour, alpha=0.25, linewidth=0)
            axis.plot([*values], mean, marker + "-", color=colour, markersize=4, label=f"{when} the step")
        if overflow < math.inf:
            axis.set_yscale("log" if drawn else "linear")
            axis.axvline(overflow, color=GREY, linestyle=":")
            axis.annotate(f"overflow at layer {overflow}", (overflow, 0.5), xycoords=("data", "axes fraction"), rotation=90,
                          xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)  # fmt: skip
        axis.set(title=title, xlabel="layer", ylabel="$R^c$ (nats)", xlim=(0.5, max(row["layer"] for row in rows) + 0.5))
        axis.tick_params(labelbottom=True)
    axes[0].legend(frameon=False)
    save(figure, path)


def log_curves(curves, path):
    """log x and its expansions at 1 (Fig. 1b). curves: {"x": values, name: values, ...}."""
    figure, axis = canvas()
    for (name, values), style in zip(list(curves.items())[1:], ("-", "--", "-.", ":")):
        axis.plot(curves["x"], values, style, label=name)
    axis.axhline(0, color=GREY, linewidth=0.5)
    axis.set(xlabel="$x$", ylabel="value", title="$\\log x$ and its expansions at $x = 1$")
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def by_layer(panels, path, *, label, sequential=False, share=True):
    """Lines over the layers, mean over seeds with its 95 % interval shaded, a panel each (Figs. 2, 3); no file without panels.

    panels: {title: {line: {layer: [value of each seed]}}}; sequential: the lines have an order, such as epochs; share: the
    panels have one vertical axis.
    """
    if not panels:
        return
    columns = min(len(panels), 3)
    figure, axes = grid(len(panels), columns, width=8 / columns, height=2.5, sharey=share)
    lines = dict.fromkeys(line for panel in panels.values() for line in panel)
    colours = in_order(lines) if sequential else dict(zip(lines, COLOURS.values()))
    markers = dict(zip(lines, "os^Dv<>ph*" * len(lines)))
    handles = {}
    for axis, (title, panel) in zip(axes, panels.items()):
        for line, by in panel.items():
            layers = sorted(by)
            mean, low, high = zip(*(mean_interval(by[layer]) for layer in layers))
            (handles[line],) = axis.plot(layers, mean, markers[line] + "-", color=colours[line], markersize=3.5, linewidth=1.2)
            axis.fill_between(layers, low, high, color=colours[line], alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(label, fontsize=10)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 6), frameon=False, fontsize=8)
    save(figure, path)


def scatter(panels, gap, levels, path, *, gap_name, legend=None):
    """The gap against every measure, a small panel each (Figs. 4, 6).

    panels: {measure: (title, values (models,))}; gap (models,); levels: each model's level of the hyperparameter `legend`, or
    one and the same. A measure that is positive and spans more than a factor of 100 gets a logarithmic axis.
    """
    columns = min(6, math.ceil(len(panels) ** 0.5))
    figure, axes = grid(len(panels), columns, width=2.3, height=2.0, sharey=True)
    others = sorted(set(levels) - set(COLOURS), key=_number_first)
    colours = {name: colour for name, colour in COLOURS.items() if name in levels} | in_order(others)
    gap, levels = np.asarray(gap), np.asarray(levels)
    size = max(1.0, min(14.0, 3000 / len(gap)))
    for axis, (name, (title, values)) in zip(axes, panels.items()):
        values = np.asarray(values)
        finite = values[np.isfinite(values)]
        if len(finite) and finite.min() > 0 and finite.max() > 100 * finite.min():
            axis.set_xscale("log")
        else:
            axis.locator_params(axis="x", nbins=4)
        for level, colour in colours.items():
            own = levels == level
            axis.scatter(values[own], gap[own], s=size, color=colour, alpha=0.8, linewidths=0, label=level)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(name, fontsize=8 if len(name) < 24 else 6.5)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_offset_text().set_size(7)
    figure.supylabel(gap_name, fontsize=9)
    if legend:
        place = dict(loc="outside upper center", ncols=min(len(colours), 2 * columns), fontsize=8, title_fontsize=8)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, title=legend, frameon=False, markerscale=(25 / size) ** 0.5, **place)
    save(figure, path)


def _number_first(level):
    try:
        return (0, float(level), level)
    except ValueError:
        return (1, 0.0, level)


def forest(rows, path, *, label, highlight=(), limits=None):
    """A number with its 95 % interval on every line. rows: (name, number, low, high), from top to bottom; highlight: names."""
    figure, axis = canvas(width=6.4, height=1.1 + 0.21 * len(rows))
    for k, (name, number, low, high) in enumerate(rows):
        colour = COLOURS["crate-n"] if name in highlight else COLOURS["crate-c"]
        axis.plot([low, high], [k, k], color=colour, linewidth=1.5)
        axis.plot(number, k, "o", color=colour, markersize=4)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set(xlim=limits, ylim=(len(rows) - 0.4, -0.6), xlabel=label)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def rank_heatmap(names, matrix, path, *, label):
    """Rank correlations between measures, a (names, names) matrix, with the value written in each cell."""
    inches = 1.2 + 0.29 * len(names)
    figure, axis = canvas(width=inches + 2, height=inches + 1)
    shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for (a, b), value in np.ndenumerate(matrix):
        if math.isfinite(value):
            text = f"{value:.2f}".replace("0.", ".").replace("-.00", ".00")
            axis.text(b, a, text, ha="center", va="center", fontsize=5.5, color="white" if abs(value) > 0.6 else "black")
    axis.set_facecolor("#DDDDDD")  # where a constant measure has no correlation
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(shown, ax=axis, shrink=0.8, label=label)
    save(figure, path)
