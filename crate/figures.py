"""Every figure. Drawn with matplotlib's object interface, which needs no display and leaves no state behind."""

from pathlib import Path

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
