"""Does a compression step lower the coding rate R^c? Attention alone on Gaussian tokens (Section 4.1; Figs. 1 and 5).

    python attention_only.py                    the paper's setting, five seeds
    python attention_only.py --scale 0.05       tokens small enough for the second-order expansion: rule (b) compresses

Writes rates.csv (R^c around every step), log.csv (the curves of Fig. 1b), fig_1a.png, fig_1b.png and fig_5.png to --out.
"""

from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from crate import figures
from crate.cli import InputError, Parser, number, path, run, write_text
from crate.compression import RULES, rates_along
from crate.rates import log_approximations


def parse_arguments():
    parser = Parser(__doc__)
    positive, above_0 = number(int, 1), number(float, above=0)
    add = parser.add_argument
    add("--tokens", type=positive, default=196, help="N (default: 196)")
    add("--depth", type=positive, default=12, help="L (default: 12)")
    add("--width", type=positive, default=384, help="d (default: 384)")
    add("--heads", type=positive, default=6, help="K (default: 6)")
    add("--alpha", type=above_0, default=1.0, help="step size (default: 1)")
    add("--gamma", type=above_0, default=1.0, help="p / (N eps^2) (default: 1)")
    add("--scale", type=above_0, default=1.0, help="standard deviation of Z^0 (default: 1)")
    add("--seed", type=number(int, 0), nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED", help="default: 0 1 2 3 4")
    add("--dtype", choices=("float64", "float32"), default="float64", help="default: float64")
    add("--out", type=path, default=Path("runs/attention_only"), help="default: runs/attention_only")
    return parser.parse_args()


def main():
    settings = vars(parse_arguments())
    out, seeds = settings.pop("out"), settings.pop("seed")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seed {' '.join(map(str, seeds))}: a seed occurs twice; give each once")
    settings["dtype"] = getattr(torch, settings["dtype"])
    rules = tqdm(RULES, unit="rule", leave=False)
    try:
        rows = [row for rule in rules for seed in seeds for row in rates_along(rule, seed, **settings)]
    except ValueError as error:
        raise InputError(f"--width, --heads: {error}")
    out.mkdir(parents=True, exist_ok=True)
    rates = pd.DataFrame(rows)
    write_text(out / "rates.csv", rates.to_csv(index=False))
    x = torch.linspace(1, 4, 121, dtype=torch.float64)
    curves = pd.DataFrame({"x": x} | log_approximations(x))
    write_text(out / "log.csv", curves.to_csv(index=False))

    titles = {rule: title for rule, (title, _) in RULES.items()}
    figures.rates_by_layer(rates, {"softmax": titles["softmax"]}, out / "fig_1a.png")
    figures.log_curves(curves, out / "fig_1b.png")
    figures.rates_by_layer(rates, titles, out / "fig_5.png")
    first = rates[rates["layer"] == 1].groupby("rule", sort=False)[["before", "after", "after_equal_norm"]]
    print(f"R^c in nats around the first step, mean and standard deviation over {len(seeds)} seeds")
    print(first.agg(["mean", "std"]).rename(titles).to_string(float_format="{:.2f}".format, na_rep="-"))
    print(f"written to {out}")


if __name__ == "__main__":
    run(main)
