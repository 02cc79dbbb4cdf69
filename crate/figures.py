"""Every figure. Drawn with matplotlib's object interface, which needs no display and leaves no state behind."""

import math
from io import BytesIO
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from crate.claims import interval

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
    figure, axes = canvas(math.ceil(len(titles) / 3), min(len(titles), 3), squeeze=False, sharex=True)
    for axis, (rule, title) in zip(axes.flat, titles.items()):
        own = [row for row in rows if row["rule"] == rule]
        overflow = min((row["layer"] for row in own if row["overflow"]), default=math.inf)
        layers = sorted({row["layer"] for row in own if row["layer"] < overflow})
        for when, colour, marker in (("before", GREY, "o"), ("after", COLOURS["crate-n"], "s")):
            values = [[row[when] for row in own if row["layer"] == layer] for layer in layers]
            axis.fill_between(layers, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.25, linewidth=0)
            axis.plot(
                layers, [sum(v) / len(v) for v in values], marker + "-", color=colour, markersize=4, label=f"{when} the step"
            )
        if overflow < math.inf:
            axis.set_yscale("log")
            axis.axvline(overflow, color=GREY, linestyle=":")
            axis.annotate(f"overflow at layer {overflow}", (overflow, 0.5), xycoords=("data", "axes fraction"), rotation=90,
                          xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)  # fmt: skip
        axis.set(title=title, xlabel="layer", ylabel="$R^c$ (nats)", xlim=(0.5, max(row["layer"] for row in rows) + 0.5))
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    axes.flat[0].legend(frameon=False)
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
    """Lines over the layers, mean over seeds with its 95 % interval shaded, a panel each (Figs. 2, 3).

    panels: {title: {line: {layer: [value of each seed]}}}, all with the same lines; sequential: the lines have an order, such
    as epochs; share: the panels have one vertical axis.
    """
    columns = min(len(panels), 3)
    figure, axes = canvas(math.ceil(len(panels) / 3), columns, width=8 / columns, height=2.5, squeeze=False, sharey=share)
    lines = list(dict.fromkeys(line for panel in panels.values() for line in panel))
    colours = (
        [colormaps["viridis"](0.9 * i / max(len(lines) - 1, 1)) for i in range(len(lines))]
        if sequential
        else list(COLOURS.values())
    )
    style = {line: dict(color=colour, marker=marker) for line, colour, marker in zip(lines, colours, "os^Dv<>ph*" * len(lines))}
    for axis, (title, panel) in zip(axes.flat, panels.items()):
        for line, by in panel.items():
            layers = sorted(by)
            mean, low, high = zip(*(interval(by[layer]) for layer in layers))
            axis.plot(layers, mean, markersize=3.5, linewidth=1.2, label=line, **style[line])
            axis.fill_between(layers, low, high, color=style[line]["color"], alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.supylabel(label, fontsize=10)
    handles = dict(pair[::-1] for axis in figure.axes for pair in zip(*axis.get_legend_handles_labels()))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 6), frameon=False, fontsize=8)
    save(figure, path)


def scatter(panels, gap, levels, path, *, gap_name, legend=None):
    """The gap against every measure, a small panel each (Figs. 4, 6).

    panels: {measure: (title, values (models,))}; gap (models,); levels: each model's level of the hyperparameter `legend`, or
    one and the same. A measure that is positive and spans more than a factor of 100 gets a logarithmic axis.
    """
    columns = min(6, math.ceil(len(panels) ** 0.5))
    figure, axes = canvas(math.ceil(len(panels) / columns), columns, width=2.3, height=2.0, squeeze=False, sharey=True)
    others = sorted(set(levels) - set(COLOURS), key=_number_first)
    names = [name for name in COLOURS if name in levels] + others
    colours = COLOURS | {name: colormaps["viridis"](0.9 * i / max(len(others) - 1, 1)) for i, name in enumerate(others)}
    size = max(1.0, min(14.0, 3000 / len(gap)))
    for axis, (name, (title, values)) in zip(axes.flat, panels.items()):
        finite = [v for v in values if math.isfinite(v)]
        if finite and min(finite) > 0 and max(finite) > 100 * min(finite):
            axis.set_xscale("log")
        for level in names:
            x, y = zip(*[(v, g) for v, g, own in zip(values, gap, levels) if own == level])
            axis.scatter(x, y, s=size, color=colours[level], alpha=0.8, linewidths=0, label=level)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(name, fontsize=8 if len(name) < 24 else 6.5)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_offset_text().set_size(7)
        if axis.get_xscale() == "linear":
            axis.locator_params(axis="x", nbins=4)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.supylabel(gap_name, fontsize=9)
    if legend:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        place = dict(loc="outside upper center", ncols=max(1, min(len(names), 2 * columns)), fontsize=8, title_fontsize=8)
        figure.legend(handles, labels, title=legend, frameon=False, markerscale=(25 / size) ** 0.5, **place)
    save(figure, path)


def _number_first(level):
    try:
        return (0, float(level), level)
    except ValueError:
        return (1, 0.0, level)


def forest(rows, path, *, label, highlight=(), limits=None):
    """A number with its 95 % interval on every line. rows: (name, number, low, high), from top to bottom; highlight: names."""
    figure, axis = canvas(1, 1, width=6.4, height=1.1 + 0.21 * len(rows))
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
    figure, axis = canvas(1, 1, width=inches + 2, height=inches + 1)
    shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for a, line in enumerate(matrix):
        for b, value in enumerate(line):
            if math.isfinite(value):
                text = f"{value:.2f}".replace("0.", ".").replace("-.00", ".00")
                axis.text(b, a, text, ha="center", va="center", fontsize=5.5, color="white" if abs(value) > 0.6 else "black")
    axis.set_facecolor("#DDDDDD")  # where a constant measure has no correlation
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(shown, ax=axis, shrink=0.8, label=label)
    save(figure, path)
