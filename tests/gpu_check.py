"""What only a GPU can tell, in about eight minutes on an H100:   python tests/gpu_check.py [CHECK ...] [--device cpu]

Prints ok or FAIL a line, the milliseconds of a step, the hours that PRESET=paper takes on this card, and a verdict: text to
paste. Where there is no GPU, and with --device cpu, models are small, and the CPU is compared with itself.
"""

import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import crate.training  # noqa: E402
from crate.cli import Parser, one_line, run  # noqa: E402
from crate.data import DATASETS, batches, data_of  # noqa: E402
from crate.kernels import WARM_UP  # noqa: E402
from crate.measures import GROUPS, measure  # noqa: E402
from crate.model import VARIANTS, build_model  # noqa: E402
from crate.runs import DEFAULTS, load_run, model_of, read_log, resolve, resolve_device, save_checkpoint, srr_layers  # noqa: E402
from crate.srr import record, srr  # noqa: E402

DEVICE, SMALL = "cpu", {"width": 48, "depth": 2, "batch_size": 16}  # on a GPU: "cuda", and the paper's sizes
FAILED, MS, HOURS = [], {}, {}  # of the cases below, milliseconds a step
CASES = {  # changes to the paper's setting: d = 384, L = 12, K = 6, N = 65, batch 128, bf16
    "crate-c": {},
    "crate-c, SRR last layer": {"srr_reg": 1e-3},
    "crate-c, SRR all layers": {"srr_reg": 1e-3, "srr_layer": "all"},
    "crate-c, dropout 0.1": {"dropout": 0.1},
    "crate-c, fp16, clipped": {"amp": "fp16", "clip_norm": 1.0},
    "crate-c, batch 64": {"batch_size": 64},
    "crate-e": {"model": "crate-e"},
    "vit": {"model": "vit"},
    "crate, d = 768": {"model": "crate", "width": 768},
    "crate, d = 768, batch 64": {"model": "crate", "width": 768, "batch_size": 64},
}
TINY, GRID = 12 * 200 * 391, 16 * 400 / 3 * 391  # steps of twelve runs of Section 6, and of sixteen of the grid: see main()
STAGES = {  # steps of each case that PRESET=paper takes
    "Table 2, for each data set": {"crate-c": TINY, "crate-c, SRR last layer": TINY},
    "Table 3": {"crate-c": TINY / 2, "crate-e": TINY / 4, "vit": TINY / 4},
    "Table 6": {"crate-c, SRR last layer": 7 / 4 * TINY},
    "grid": {"crate-c": GRID, "crate-c, batch 64": 2 * GRID, "crate, d = 768": GRID, "crate, d = 768, batch 64": 2 * GRID},
}
NOISE = [np.random.default_rng(n).integers(0, 256, (n, 3, 32, 32), np.uint8) for n in (1340, 100)]
DATASETS["noise"] = lambda data_dir: [x for images in NOISE for x in (images, images[:, 0, 0, 0] % 10)]


def report(name, passed, detail=""):
    FAILED.extend([] if passed else [name])
    print(f"{'ok  ' if passed else 'FAIL'} {name} {detail}", flush=True)


def new_step(device, rate=1e-4, **changes):
    """A training step at the paper's setting, and what it takes."""
    config = DEFAULTS | {"image_size": 32, "channels": 3, "classes": 10, "amp": "bf16", "graph": True} | changes | SMALL
    config["amp"] = config["amp"] if device == "cuda" else "off"
    torch.manual_seed(0)
    model = model_of(config).to(device).train()
    images, labels = torch.randn(config["batch_size"], 3, 32, 32), torch.randint(10, (config["batch_size"],))
    layers = srr_layers(config["srr_layer"], config["depth"], 1)[0] if config["srr_reg"] else ()
    rate = torch.tensor(rate, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=config["amp"] == "fp16")
    step = crate.training.step_of(config, model, optimizer, scaler)
    return step, (images.to(device), labels.to(device), 1.0, layers)


def dropout():
    """How many attention weights each kernel really drops; and a step's losses at a learning rate of 0."""
    for dtype, coarse in ((torch.bfloat16, 1 / 256), (torch.float32, 0.002)):  # flash draws eight bits for each weight
        zeros = torch.zeros(512, 6, 64, 64, device=DEVICE, dtype=dtype)
        one = torch.eye(64, device=DEVICE, dtype=dtype).expand(512, 6, 64, 64).contiguous()
        for p in (0.0, 0.02, 0.1):
            chosen = ("math", "flash", "efficient", "cudnn")[torch._fused_sdp_choice(zeros, zeros, one, None, p, False)]
            output = F.scaled_dot_product_attention(zeros, zeros, one, dropout_p=p)  # every weight is 1/64
            dropped, mean = (output == 0).double().mean().item(), 64 * output.double().mean().item()
            right = abs(dropped - p) < coarse and abs(mean - 1) < 0.01
            report(f"attention, {dtype}, p = {p}, {chosen}:", right, f"dropped {dropped:.4f}, mean weight {mean:.4f}")
    step, arguments = new_step(DEVICE, rate=0.0, dropout=0.1)
    losses = [step(*arguments)[0].item() for _ in range(WARM_UP + 1)]
    for seed in (1, 1):
        torch.manual_seed(seed)
        losses += [step(*arguments)[0].item() for _ in range(2)]
    report("dropout: replays differ, and agree after reseeding", losses[-4] != losses[-3] and losses[-4:-2] == losses[-2:])


def numerics():
    """Float32 on this device against float64 on the CPU: every variant at d = 384, with SRR in its loss."""
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for name in VARIANTS:
        results = []
        for device, dtype in ((DEVICE, torch.float32), ("cpu", torch.float64)):
            torch.manual_seed(0)
            model = build_model(name, image_size=32, patch_size=4, channels=3, classes=10, width=384, depth=4, heads=6)
            layer = model.to(device, dtype).layers[2]
            with record([layer]) as (inputs, _):
                logits = model(images.to(device, dtype))
            loss = F.cross_entropy(logits, labels.to(device))
            (loss + 0.1 * srr(layer(inputs[0].detach()), layer.mssa.U.weight.mT, 6).mean()).backward()
            results.append((logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        for part, actual, expected in zip(("logits", "gradients of Eq. 14"), *results):
            error = ((actual.double().cpu() - expected).norm() / expected.norm()).item()
            report(f"{name}: {part}", error < 1e-3, f"relative error {error:.1e} (< 0.001)")


def save_and_stop(path, content):
    save_checkpoint(path, content)
    if path.name == "last.pt":
        raise InterruptedError


def training():
    """Two epochs: augmentation, random layers with SRR, the stopping criterion; stopped and resumed; then all measures."""
    flags = {"dataset": "noise", "epochs": 2, "batch_size": 32, "srr_reg": 1e-3, "srr_layer": "random", "stop_at_loss": 1e-9}
    where = {"preset": "paper", "device": torch.device(DEVICE), "amp": "bf16" if DEVICE == "cuda" else "off"}
    (config,) = resolve(flags | SMALL, **where, data_dir=Path("data"), graph=True, save_every=0.0, processes=1).values()
    with tempfile.TemporaryDirectory() as name:
        folder, data, reserved = Path(name), data_of(config, device=DEVICE), []
        with patch("crate.training.save_checkpoint", save_and_stop), suppress(InterruptedError):
            crate.training.train(config, folder, show_progress=False)
        stopped = len(read_log(folder))
        crate.training.train(config, folder, show_progress=False)
        losses = [row.get("train_loss", 0.0) for row in read_log(folder)]
        report(
            "training, stopped after an epoch and resumed",
            stopped == 2 and len(losses) == 3 and 0 < sum(losses) < float("inf"),
            f"losses {losses[1:]}",
        )
        for epoch in range(9):
            list(batches(data, 128, 0, epoch, augment=True))
            reserved.append(torch.cuda.memory_reserved() // 2**20)
        report("training, memory of nine epochs' augmentation", reserved[8] == reserved[1], f"{reserved} MiB reserved")
        began, (_, _, model, initial) = time.perf_counter(), load_run(folder, DEVICE)
        failed = measure(model, initial, data, list(GROUPS), 10_000 if DEVICE == "cuda" else 20)["failed"]
        HOURS["measures of 64 models"] = (time.perf_counter() - began) * 64 * 10_000 / 1340 / 3600
        report("training, measures", not failed, str(failed or ""))


def timing():
    """Of a step, eager and graphed: milliseconds, peak memory, launches, and how often it waits for the device."""
    print("| case | step | ms a step | peak MiB | launches | waits |\n|" + " --- |" * 6)
    for name, kind in ((name, kind) for name in CASES for kind in ("eager", "graph")):
        step, arguments = new_step(DEVICE, **CASES[name], graph=kind == "graph")
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for count in (10, 50):
            began = time.perf_counter()
            for _ in range(count):
                result = step(*arguments)
            result.sum().item()
            MS[name] = 1000 / count * (time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() / 2**20
        with torch.profiler.profile() as profile:
            step(*arguments)
        calls = {e.key: e.count for e in profile.key_averages() if e.key.startswith("cu")}
        waiting = sum(calls.get(key, 0) for key in ("cudaStreamSynchronize", "cudaFree", "cudaMemcpy"))
        launches = sum(count for key, count in calls.items() if "Launch" in key)
        print(f"| {name} | {kind} | {MS[name]:.2f} | {peak:.0f} | {launches} | {waiting} |", flush=True)
        FAILED.extend([f"{name}, {kind}: {waiting} waits in a step"] if waiting else [])


CHECKS = {check.__name__: check for check in (dropout, numerics, training, timing)}


def main():
    global DEVICE
    parser, began = Parser(__doc__), time.perf_counter()
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"some of {' '.join(CHECKS)} (default: all)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where present)")
    arguments = parser.parse_args()
    DEVICE = resolve_device(arguments.device).type
    torch.backends.cuda.enable_cudnn_sdp(False)  # as training does
    card = "no GPU, or not asked for: small models on the CPU, compared with the CPU"
    if DEVICE == "cuda":
        SMALL.clear()
        card = torch.cuda.get_device_name()
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty 2>&1")
    print(f"{card}; torch {torch.__version__}, CUDA {torch.version.cuda}; commit {commit}")
    for name in arguments.checks or CHECKS:
        print("==", name)
        try:
            CHECKS[name]()
        except Exception as error:  # whatever it is, the other checks go on
            line = traceback.extract_tb(error.__traceback__)[-1]
            report(f"{name}: {type(error).__name__} in {line.filename}, line {line.lineno}:", False, one_line(error))
    if len(MS) == len(CASES):
        HOURS.update({stage: sum(MS[case] * count for case, count in cases.items()) / 3.6e6 for stage, cases in STAGES.items()})
    # Of the grid 100 of at most 300 epochs, and a third more: a forward pass of all training images an epoch.
    for stage, hours in HOURS.items() if DEVICE == "cuda" else ():
        print(f"PRESET=paper, {stage}: {hours:.1f} hours")
    print(f"{time.perf_counter() - began:.0f} s in all")
    print(f"VERDICT: {len(FAILED)} failed: {'; '.join(FAILED)}" if FAILED else "VERDICT: ok")
    return int(bool(FAILED))


if __name__ == "__main__":
    run(main)
