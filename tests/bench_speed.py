"""The speed benchmark: `python tests/bench_speed.py` prints its tables in some three minutes on two cores.

Every ratio is of two things that are run in turn in this process: medians over rounds after a warm-up. "Textbook" is
tests/reference.py: ISTA with three products per token, attention with a materialised softmax and a loop over heads, logdet on
the d x d side, unfused Adam, noise drawn and evaluated direction by direction.

    python tests/bench_speed.py --out results/speed     also write the tables to a folder
    python tests/bench_speed.py --width 96 --depth 2 --rounds 2     smaller, to try it
"""

import argparse
import multiprocessing
import os
import platform
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from crate import measures  # noqa: E402
from crate.cli import markdown_table, write_text  # noqa: E402
from crate.data import batches, load_data  # noqa: E402
from crate.kernels import self_attention, subspace_gradient  # noqa: E402
from crate.model import build_model  # noqa: E402
from crate.rates import coding_rate, merge_heads, split_heads  # noqa: E402
from crate.runs import DEFAULTS  # noqa: E402
from crate.training import step_of  # noqa: E402
from tests import reference  # noqa: E402

PATCH, CHANNELS, CLASSES, HEADS, ETA = 4, 3, 10, 6, 1e-3
SIDES = {17: 16, 65: 32, 197: 56, 785: 112}  # tokens with CLS: side of the image


def interleaved(functions, rounds):
    """Median seconds of each function, called in turn `rounds` times after a warm-up of one."""
    times = []
    for _ in range(rounds + 1):
        times.append([])
        for function in functions:
            began = time.perf_counter()
            function()
            times[-1].append(time.perf_counter() - began)
    return np.median(times[1:], axis=0).tolist()


def model_of(width, depth, tokens=65):
    torch.manual_seed(0)
    sizes = dict(image_size=SIDES[tokens], patch_size=PATCH, channels=CHANNELS, classes=CLASSES)
    return build_model("crate-c", **sizes, width=width, depth=depth, heads=HEADS)


def random_batch(size, tokens=65):
    torch.manual_seed(0)
    return torch.randn(size, CHANNELS, SIDES[tokens], SIDES[tokens]), torch.randint(CLASSES, (size,))


def our_step(model, batch, layers=()):
    """A training step of ours as a function, with SRR on `layers` (Eq. 14)."""
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cpu", enabled=False)
    step = step_of(DEFAULTS | {"amp": "off", "graph": False, "srr_reg": ETA}, model, optimizer, scaler)
    return lambda: step(*batch, 1.0, layers)


def textbook_step(model, batch):
    weights = reference.copies(model)
    leaves = [w for w in weights.values() if w.requires_grad]
    optimizer, (images, labels) = torch.optim.Adam(leaves, foreach=False, fused=False), batch

    def step():
        optimizer.zero_grad()
        logits, _ = reference.forward(images, weights, "crate-c", HEADS, PATCH, len(model.layers))
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def rates_of(rate, width):
    """A coding rate forward and backward, as a function."""
    tokens = torch.randn(64, 65, width, requires_grad=True)
    return lambda: torch.autograd.grad(rate(tokens, float(HEADS)).sum(), tokens)


def peak_memory(**case):
    """Bytes that a training step adds at its peak to what a process holds before it: weights, gradients and Adam's state.

    In a process of its own, where the allocator gives every large tensor back when it is freed.
    """
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # read when a process starts
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(added_at_peak, kwds=case)


def added_at_peak(width, depth, batch, tokens=65, layers=()):
    def resident(key):  # VmRSS, or VmHWM: its highest value
        return int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    step = our_step(model_of(width, depth, tokens), random_batch(batch, tokens), layers)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def trained_on_digits():
    """A model of the laptop preset's size after some epochs, and 250 training images with their labels."""
    data = load_data("digits")
    torch.manual_seed(0)
    model = build_model("crate-c", image_size=8, patch_size=2, channels=1, classes=10, width=48, depth=4, heads=HEADS)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(20):
        for images, labels, _ in batches(data, 64, 0, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval(), data.prepare(data.train_images[:250]), data.train_labels[:250]


def ratios(width, depth, rounds):
    """The rows of the first table: what is divided by what, ratio, goal, both in words."""

    def row(name, goal, first, second):
        return [name, f"{first / second:.3f}", goal, f"{1e3 * first:.4g} ms", f"{1e3 * second:.4g} ms"]

    batch, last = random_batch(64), [depth - 1]
    ours = our_step(model_of(width, depth), batch)
    with FlopCounterMode(display=False) as counter:
        ours()
    steps = [textbook_step(model_of(width, depth), batch)]
    steps += [our_step(model_of(width, depth), batch, layers) for layers in (last, range(depth))]
    plain, textbook, last_layer, all_layers = interleaved([ours, *steps], rounds)
    yield row("training step, textbook / ours", ">= 1.6", textbook, plain)
    square = torch.randn(2048, 2048)
    (product,) = interleaved([lambda: square @ square], 9)
    products = counter.get_total_flops() / (2 * 2048**3) * product
    yield row("its matrix products at the rate of a large one / training step", ">= 0.65", products, plain)
    yield row("step with SRR on the last layer / without", "<= 1.15", last_layer, plain)
    yield row("step with SRR on all layers / without", "", all_layers, plain)

    slow, fast = interleaved([rates_of(reference.coding_rate, width), rates_of(coding_rate, width)], 3 * rounds)
    yield row("coding rate forward and backward, textbook / ours", ">= 5", slow, fast)

    small = random_batch(32, 17)
    slow, fast = interleaved([make(model_of(48, 4, 17), small) for make in (textbook_step, our_step)], 6 * rounds)
    yield row("step of the laptop preset's size (N = 17, d = 48, L = 4), textbook / ours", "", slow, fast)

    model, images, labels = trained_on_digits()
    weights = measures.perturbed_parameters(model)

    @torch.no_grad()
    def textbook_search():
        reference.noise_scale(lambda draw: measures.accuracy(model, draw, images, labels), weights)

    slow, fast = interleaved([textbook_search, lambda: measures.noise_scale(model, images, labels)], rounds)
    yield row("PAC-Bayes search for sigma (250 images), bisection / ours", ">= 2", slow, fast)

    with_srr, without = (peak_memory(width=width, depth=depth, batch=64, layers=layers) for layers in (last, []))
    memory = (f"{size / 2**20:.0f} MiB" for size in (with_srr, without))
    yield ["peak memory of the step with SRR on the last layer / without", f"{with_srr / without:.3f}", "<= 2", *memory]


def growth_table(rounds):
    """A training step's time and peak memory per image, and the exponents with which they grow along each of N, d, L."""
    base, batch, lines = dict(tokens=65, width=192, depth=4), 16, []
    axes = {"N": ("tokens", [17, 65, 197, 785]), "d": ("width", [96, 192, 384, 768]), "L": ("depth", [2, 4, 8, 16])}
    for axis, (key, values) in axes.items():
        cases = [base | {key: value} for value in values]
        seconds = interleaved([our_step(model_of(**case), random_batch(batch, case["tokens"])) for case in cases], rounds)
        memory = [peak_memory(batch=batch, **case) for case in cases]
        per_image = {"ms per image": np.array(seconds) * 1e3 / batch, "MiB per image": np.array(memory) / 2**20 / batch}
        lines.append([axis, *values, "exponent"])
        for what, ys in per_image.items():
            exponent, _ = np.polyfit(np.log(values), np.log(ys), 1)
            lines.append([what, *(f"{y:.2f}" for y in ys), f"{exponent:.2f}"])
    return markdown_table(["training step (N = 65, d = 192, L = 4 but for)", "", "", "", "", ""], lines)


def exact_step_times(rounds):
    """Rows N, ms of softmax attention and of crate-e's exact step, forward and backward, d = 192, K = 6, one image."""
    for N in (65, 197, 785, 2048, 4096):
        V = split_heads(torch.randn(1, N, 192), HEADS).requires_grad_()
        functions = [lambda f=f: torch.autograd.grad(merge_heads(f(V)).sum(), V) for f in (self_attention, subspace_gradient)]
        softmax, exact = interleaved(functions, 2 * rounds)
        yield [N, f"{1e3 * softmax:.3g}", f"{1e3 * exact:.3g}", f"{softmax / exact:.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--width", type=int, default=384, help="default: 384, CRATE-Tiny")
    parser.add_argument("--depth", type=int, default=12, help="default: 12")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    began = time.perf_counter()
    where = (
        f"{platform.machine()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch "
        f"{torch.__version__}; d = {arguments.width}, L = {arguments.depth}, K = {HEADS}, N = 65, batch 64, float32; "
        f"medians of {arguments.rounds} rounds."
    )
    text = "\n".join([
        where + "\n",
        markdown_table(["row", "ratio", "goal", "first", "second"], ratios(arguments.width, arguments.depth, arguments.rounds)),
        growth_table(max(2, arguments.rounds // 2)),
        markdown_table(["N", "softmax attention, ms", "exact step, ms", "ratio"], exact_step_times(arguments.rounds)),
    ])  # fmt: skip
    print(text, f"measured in {time.perf_counter() - began:.0f} s", sep="\n")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out / "speed.md", text)


if __name__ == "__main__":
    main()
