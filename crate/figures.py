"""Every figure. Drawn with matplotlib's object interface, which needs no display and leaves no state behind."""

import math
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; one per model type, the same in every figure.
COLOURS = {
    "crate-c": "#0072B2", "crate-n": "#D55E00", "crate-t": "#009E73", "crate": "#CC79A7",
    "crate-fix": "#E69F00", "crate-identity": "#56B4E9",
}  # fmt: skip
GREY = "#555555"


def canvas(rows=1, columns=1, width=4.2, height=3.2, **settings):
    """A figure of rows x columns panels of `width` x `height` inches, and its axes."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, **settings)


def save(figure, path):
    """Write the figure as PNG to `path`, whose folder is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


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
            axis.plot(layers, [sum(v) / len(v) for v in values], marker + "-", color=colour, markersize=4, label=f"{when} the step")
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


def layerwise(values, path):
    """SRR by layer, a line per epoch, a panel per model type, mean over seeds (Figs. 2, 3).

    values: {model: {epoch: {layer: [SRR of each seed]}}}.
    """
    figure, axes = canvas(1, len(values), width=3.4, squeeze=False, sharey=True)
    for axis, (model, by_epoch) in zip(axes[0], values.items()):
        epochs = sorted(by_epoch)
        for i, epoch in enumerate(epochs):
            layers = sorted(by_epoch[epoch])
            means = [sum(by_epoch[epoch][layer]) / len(by_epoch[epoch][layer]) for layer in layers]
            colour = colormaps["viridis"](0.9 * i / max(len(epochs) - 1, 1))
            axis.plot(layers, means, "o-", color=colour, markersize=4, label="at initialisation" if epoch == 0 else f"epoch {epoch}")
        axis.set(title=model, xlabel="layer", xticks=layers)
    axes[0, 0].set_ylabel("SRR measure, $\\lambda ||Z||_0 + R^c - R$")
    axes[0, -1].legend(frameon=False, fontsize=8)
    save(figure, path)
