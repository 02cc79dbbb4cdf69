"""What only a GPU can tell, in about five minutes on an H100: python tests/gpu_check.py [kernel numerics nan steps waits time]

Prints ok or FAIL a line, then a table of milliseconds a step. Without a GPU it compares the CPU with itself.
"""

import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from crate.kernels import self_attention  # noqa: E402
from crate.model import VARIANTS, build_model  # noqa: E402
from crate.rates import coding_rate, exact_gradient, split_heads, subspace_coding_rate  # noqa: E402
from crate.runs import DEFAULTS, model_of  # noqa: E402
from crate.srr import record, srr  # noqa: E402
from crate.training import step_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAILED = []
CASES = {  # name: changes to the paper's setting (d = 384, L = 12, K = 6, N = 65, batch 128, bf16), layers with SRR
    "crate-c": ({}, ()),
    "crate-c, SRR last layer": ({"srr_reg": 1e-3}, (11,)),
    "crate-c, SRR all layers": ({"srr_reg": 1e-3}, tuple(range(12))),
    "crate-c, dropout 0.1": ({"dropout": 0.1}, ()),
    "crate-c, fp16, clipped": ({"amp": "fp16", "clip_norm": 1.0}, ()),
    "crate-c, float32": ({"amp": "off"}, ()),
    "crate-e": ({"model": "crate-e"}, ()),
    "vit": ({"model": "vit"}, ()),
    "crate, d = 768": ({"model": "crate", "width": 768}, ()),
}


def report(name, passed, detail=""):
    FAILED.extend([] if passed else [name])
    print(f"{'ok  ' if passed else 'FAIL'} {name} {detail}", flush=True)


def close(name, actual, expected, tolerance):
    actual, expected = actual.double().cpu(), expected.double().cpu()
    error = ((actual - expected).norm() / expected.norm()).item()
    report(name, error < tolerance, f"relative error {error:.1e} (< {tolerance:g})")


def new_step(device=DEVICE, graph=True, **changes):
    """A model and its training step at the paper's setting, and a random batch."""
    config = DEFAULTS | {"image_size": 32, "channels": 3, "classes": 10, "amp": "bf16" if device == "cuda" else "off"}
    config |= {"graph": graph} | changes
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(0)
    model = model_of(config).to(device)
    batch = torch.randn(config["batch_size"], 3, 32, 32), torch.randint(10, (config["batch_size"],))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=device == "cuda")
    if device == "cuda":
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-4, device=device)
    scaler = torch.amp.GradScaler(device, enabled=config["amp"] == "fp16")
    return model.train(), step_of(config, model, optimizer, scaler), [tensor.to(device) for tensor in batch]


def kernel():
    """Which attention kernel is chosen, and how many weights its dropout really drops."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    for dtype in (torch.bfloat16, torch.float32):
        for p in (0.0, 0.02, 0.1):
            zeros = torch.zeros(512, 6, 64, 64, device=DEVICE, dtype=dtype)
            one = torch.eye(64, device=DEVICE, dtype=dtype).expand(512, 6, 64, 64).contiguous()
            chosen = names[torch._fused_sdp_choice(zeros, zeros, one, None, p, False)]
            output = F.scaled_dot_product_attention(zeros, zeros, one, dropout_p=p)  # every weight is 1/64
            dropped, mean = (output == 0).double().mean().item(), 64 * output.double().mean().item()
            coarse = 1 / 256 if dtype == torch.bfloat16 else 0.002  # flash draws eight bits for each weight
            right = abs(dropped - p) < coarse and abs(mean - 1) < 0.01
            report(f"attention, {dtype}, p = {p}: {chosen},", right, f"dropped {dropped:.4f}, mean weight {mean:.4f}")


def value_and_gradient(function, tokens):
    tokens = tokens.clone().requires_grad_()
    output = function(tokens)
    weights = torch.sin(torch.arange(output.numel(), device=tokens.device)).view(output.shape).to(output)
    return output.detach(), torch.autograd.grad((output * weights).sum(), tokens)[0]


def numerics():
    """Float32 on this device against float64 on the CPU: rates, attention, every variant with SRR in its loss."""
    torch.manual_seed(0)
    Z, U = torch.randn(32, 65, 384, dtype=torch.float64), torch.linalg.qr(torch.randn(384, 384, dtype=torch.float64))[0]
    functions = {
        "R": lambda z: coding_rate(z, 6.0),
        "R^c": lambda z: subspace_coding_rate(z, U.to(z), 6),
        "exact gradient": lambda z: exact_gradient(z, U.to(z), 6),
        "attention": lambda z: self_attention(split_heads(z, 6), 0.125),
    }
    for name, function in functions.items():
        here, there = value_and_gradient(function, Z.float().to(DEVICE)), value_and_gradient(function, Z)
        for part, actual, expected in zip(("value", "gradient"), here, there):
            close(f"{name}: {part}", actual, expected, 1e-4)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for name in VARIANTS:
        torch.manual_seed(0)
        wide = build_model(name, image_size=32, patch_size=4, channels=3, classes=10, width=96, depth=4, heads=6).double()
        narrow, results = copy.deepcopy(wide).float().to(DEVICE), []
        for model, device, dtype in ((narrow, DEVICE, torch.float32), (wide, "cpu", torch.float64)):
            layer = model.layers[2]
            with record([layer]) as (inputs, _):
                logits = model(images.to(device, dtype))
            loss = F.cross_entropy(logits, labels.to(device))
            (loss + 0.1 * srr(layer(inputs[0].detach()), layer.mssa.U.weight.mT, 6).mean()).backward()
            results.append((logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        for part, actual, expected in zip(("logits", "gradients of Eq. 14"), *results):
            close(f"{name}: {part}", actual, expected, 1e-3)
        if DEVICE == "cuda":
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                close(f"{name}: logits in bf16", narrow(images.to(DEVICE)), results[1][0], 0.05)


def nan():
    """Tokens that are not finite become NaN, and only they; nothing is waited for."""
    if DEVICE == "cpu":
        return report("NaN travels: only on CUDA, a CPU raises", True)
    Z = torch.randn(5, 65, 384, device=DEVICE)
    Z[1, 3, 4], Z[3] = math.nan, Z[3] * 1e30
    U = torch.eye(384, device=DEVICE)
    for name, function in {"R": lambda z: coding_rate(z, 6.0), "R^c": lambda z: subspace_coding_rate(z, U, 6)}.items():
        value, gradient = value_and_gradient(function, Z)
        report(f"NaN travels, {name}", value.isfinite().tolist() == [True, False, True, True, True], str(value.tolist()))


def steps():
    """Twenty steps in float32 here and on the CPU, from the same weights: crate-c, small, SRR on both layers."""
    losses = []
    for device in (DEVICE, "cpu"):
        changes = dict(amp="off", width=48, depth=2, batch_size=64, srr_reg=0.01)
        _, step, (images, labels) = new_step(device, **changes)
        losses.append(torch.stack([step(images, labels, 1.0, (0, 1)) for _ in range(20)]).cpu())
    close("20 steps: cross-entropy", losses[0][:, 0], losses[1][:, 0], 1e-4)
    close("20 steps: SRR", losses[0][:, 2], losses[1][:, 2], 1e-3)


def waits():
    """Launches and waits of a step before the capture and of a replay, as the profiler sees them."""
    if DEVICE == "cpu":
        return report("waits in a step: only on CUDA", True)
    for name, (changes, layers) in CASES.items():
        _, step, batch = new_step(**changes)
        for kind, before in (
            ("a step without graph", 2),
            ("a replay", 2),
        ):  # 3 steps, the last one profiled, before the capture
            for _ in range(before):
                step(*batch, 1.0, layers)
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                step(*batch, 1.0, layers)
            calls = {e.key: e.count for e in profile.key_averages() if e.key.startswith("cu")}
            waiting = sum(calls.get(key, 0) for key in ("cudaStreamSynchronize", "cudaFree", "cudaMemcpy"))
            launches = sum(count for key, count in calls.items() if "Launch" in key)
            report(f"waits in {kind}, {name}", waiting == 0, f"{waiting} waits, {launches} launches")


def timing():
    """Milliseconds a step, the host alone, seconds of the first ten, peak memory: eager and graphed."""
    count = 50 if DEVICE == "cuda" else 2
    print("| case | step | ms a step | host alone | first 10, s | peak MiB |\n| --- | --- | --- | --- | --- | --- |")
    for name, (changes, layers) in CASES.items():
        for kind in ("eager", "graph") if DEVICE == "cuda" else ("eager",):
            _, step, batch = new_step(graph=kind != "eager", **changes)
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            for _ in range(10 if DEVICE == "cuda" else 1):
                result = step(*batch, 1.0, layers)
            result.sum().item()
            first, host, began = time.perf_counter() - began, 0.0, time.perf_counter()
            for _ in range(count):
                called = time.perf_counter()
                result = step(*batch, 1.0, layers)
                host += time.perf_counter() - called
            result.sum().item()
            ms, peak = 1e3 * (time.perf_counter() - began) / count, 0
            if DEVICE == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**20
            print(f"| {name} | {kind} | {ms:.2f} | {1e3 * host / count:.2f} | {first:.1f} | {peak:.0f} |", flush=True)


CHECKS = {"kernel": kernel, "numerics": numerics, "nan": nan, "steps": steps, "waits": waits, "time": timing}

if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}")
    for name in sys.argv[1:] or CHECKS:
        print("==", name)
        CHECKS[name]()
    print(f"{len(FAILED)} failed: {', '.join(FAILED)}" if FAILED else "all ok")
    sys.exit(bool(FAILED))
