"""The speed benchmark: `python tests/bench_speed.py` prints one table, in about five minutes on two cores.

Every ratio is of two things measured in turn in this process: medians over rounds after a warm-up. "Textbook" is
tests/reference.py: ISTA with three products per token, attention with a materialised softmax and a loop over heads, logdet on
the d x d side, the stop-gradient by running layers again, and unfused Adam.

    python tests/bench_speed.py --json FILE     also writes the rows to FILE
    python tests/bench_speed.py --rounds 3 --width 96 --depth 2     smaller, to try it
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from crate.files import markdown_table, write_json
from crate.model import build_model
from crate.rates import coding_rate
from crate.srr import add_srr_gradients
from tests import reference

BATCH, IMAGE, PATCH, CHANNELS, CLASSES, HEADS = 64, 32, 4, 3, 10, 6
ETA = 1e-3


def interleaved(functions, rounds):
    """Median seconds of each function, called in turn `rounds` times after a warm-up of one."""
    times = [[] for _ in functions]
    for round in range(rounds + 1):
        for function, seconds in zip(functions, times):
            began = time.perf_counter()
            function()
            if round:
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in times]


def batch():
    torch.manual_seed(0)
    return torch.randn(BATCH, CHANNELS, IMAGE, IMAGE), torch.randint(CLASSES, (BATCH,))


def tiny(width, depth, variant="crate-c", image=IMAGE):
    torch.manual_seed(0)
    return build_model(
        variant, image_size=image, patch_size=PATCH, channels=CHANNELS, classes=CLASSES, width=width, depth=depth, heads=HEADS
    )


def our_step(model, layers=(), amp=False):
    """A training step of ours as a function, with SRR on `layers`."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images, labels = batch()

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits, outputs = model.forward_with_outputs(images)
            loss = F.cross_entropy(logits, labels)
        if layers:
            add_srr_gradients(model, outputs, layers, ETA)
        loss.backward()
        optimizer.step()

    return step


def textbook_step(model, variant="crate-c", layers=()):
    """The same in textbook form."""
    weights = reference.copies(model)
    optimizer = torch.optim.Adam([w for w in weights.values() if w.requires_grad], foreach=False, fused=False)
    images, labels = batch()

    def step():
        optimizer.zero_grad()
        logits, outputs = reference.forward(images, weights, variant, HEADS, PATCH, len(model.layers))
        loss = F.cross_entropy(logits, labels)
        if layers:
            loss = loss + ETA * reference.stop_gradient_srr(outputs, weights, variant, HEADS, layers)
        loss.backward()
        optimizer.step()

    return step


def gemm_rate(rounds):
    """Float32 operations per second of a large matrix product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    (seconds,) = interleaved([lambda: a @ b], max(rounds, 5))
    return 2 * 2048**3 / seconds


def rates(width):
    """Coding rate forward and backward: textbook and ours, as functions."""
    tokens = torch.randn(BATCH, (IMAGE // PATCH) ** 2 + 1, width, requires_grad=True)

    def of(rate):
        def run():
            torch.autograd.grad(rate(tokens, float(HEADS)).sum(), tokens)

        return run

    return of(reference.coding_rate), of(coding_rate)


def peak_memory(width, depth, all_layers):
    """Peak resident memory in bytes that a training step adds to a process of its own."""
    code = (
        "import resource, torch; from tests.bench_speed import *; "
        f"model = tiny({width}, {depth}); step = our_step(model, range({depth}) if {all_layers} else ()); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; step(); step(); "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    root = Path(__file__).parents[1]
    return int(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rounds, width, depth = arguments.rounds, arguments.width, arguments.depth
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, python {platform.python_version()}, "
          f"torch {torch.__version__}; d = {width}, L = {depth}, K = {HEADS}, {IMAGE}x{IMAGE} patch {PATCH}, batch {BATCH}, "
          f"float32, median of {rounds} rounds\n")  # fmt: skip
    rows = []

    def row(name, value, goal, first, second):
        rows.append({"row": name, "value": round(value, 3), "goal": goal, "first": first, "second": second})
        print(f"{name}: {value:.3f}", file=sys.stderr)

    def seconds(value):
        return f"{1e3 * value:.4g} ms"

    model = tiny(width, depth)
    step = our_step(model)
    with FlopCounterMode(display=False) as counter:
        step()
    flops = counter.get_total_flops()
    textbook, ours, amp, last, every = interleaved(
        [textbook_step(model), step, our_step(tiny(width, depth), amp=True), our_step(tiny(width, depth), [depth - 1]),
         our_step(tiny(width, depth), range(depth))], rounds,
    )  # fmt: skip
    rate = gemm_rate(rounds)
    row("training step, textbook / ours", textbook / ours, ">= 1.6", seconds(textbook), seconds(ours))
    row("its matrix products at the GEMM rate / step", flops / rate / ours, ">= 0.65",
        f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s", seconds(ours))  # fmt: skip
    row("step with SRR on the last layer / without", last / ours, "<= 1.12", seconds(last), seconds(ours))
    row("step with SRR on all layers / without", every / ours, "<= 2.3", seconds(every), seconds(ours))
    row("bf16 autocast step / float32 step", amp / ours, "-", seconds(amp), seconds(ours))
    slow, fast = interleaved(rates(width), 4 * rounds)
    row("coding rate forward + backward, textbook / ours", slow / fast, ">= 5", seconds(slow), seconds(fast))
    small = dict(width=48, depth=4, image=16)
    slow, fast = interleaved([textbook_step(tiny(**small)), our_step(tiny(**small))], 4 * rounds)
    row("laptop-sized step (17 tokens, d = 48, L = 4), textbook / ours", slow / fast, "-", seconds(slow), seconds(fast))
    with_srr, without = (peak_memory(width, depth, all_layers) for all_layers in (True, False))
    row("peak memory of the step with SRR on all layers / without", with_srr / without, "<= 2",
        f"{with_srr / 2**20:.0f} MiB", f"{without / 2**20:.0f} MiB")  # fmt: skip
    print(markdown_table(["row", "value", "goal", "first", "second"], [row.values() for row in rows]))
    if arguments.json:
        write_json(arguments.json, {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
