"""The training loop: Adam on cross-entropy + eta SRR (Eq. 14), the stopping criterion of Section 5, logs, exact resume.

`step_of` and `fit` are the loop: batches, Eq. 14, step, stop, log, save. What an epoch draws at random depends on the config
and its number alone, and state is saved between epochs: a run that was killed and started again ends with the same bits (on a
CPU, with as many threads). With torchrun every process is a rank that takes its share of each batch; rank 0 alone writes.
"""

import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from crate.cli import InputError, one_line, read_json, write_json, write_text
from crate.data import DROPOUT, batches, data_of, mixed_seed
from crate.kernels import graphed
from crate.runs import load_weights, locked, made_by, model_of, save_checkpoint, srr_layers
from crate.srr import layer_srr, operator_rates, record, srr

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SRR_IMAGES = 512  # layer-wise SRR is logged on the first so many training and validation images
# Below a loss of x the stopping criterion is checked n times an epoch (Dziugaite et al. 2020): fast runs don't overshoot.
CHECKS_PER_EPOCH = ((0.015, 8), (0.025, 4), (0.05, 2))
SAY_EVERY = 10  # seconds between two lines of a run whose progress nobody sees as a bar
CURE = "try a smaller --lr or --amp off"


def rank_and_world():
    """This process' rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def step_of(config, model, optimizer, scaler):
    """One training step as a function: forward, Eq. 14, backward, Adam.

    step(images, labels, weight, regularised) takes the layers (0-based) whose SRR is in the loss, and this rank's weight in
    the batch. It returns cross-entropy, accuracy and SRR, (3,) float64 on the device, and waits for nothing.
    """
    device, (_, world) = model.cls_token.device, rank_and_world()
    network = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    autocast = torch.autocast(device.type, AMP_DTYPES.get(config["amp"]), enabled=config["amp"] != "off")
    coefficients = {"sparsity": config["srr_lambda"], "gamma": config["srr_gamma"], "norm": config["srr_norm"]}

    def step(images, labels, weight, regularised):
        layers = [model.layers[l] for l in regularised]
        with autocast:
            with record(layers) as (inputs, _):
                logits = network(images)
            loss, measure = F.cross_entropy(logits, labels), logits.new_zeros(())
            for layer, Z in zip(layers, inputs):  # Eq. 14: what enters layer l is constant, so its SRR trains layer l alone
                of_images = srr(layer(Z.detach()), layer.mssa.U.weight.mT, model.heads, **coefficients)
                measure = measure + of_images.mean() / len(layers)
        optimizer.zero_grad()
        scaler.scale((loss + config["srr_reg"] * measure) * weight).backward()
        if config["clip_norm"] is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
        scaler.step(optimizer)
        scaler.update()
        correct = (logits.argmax(1) == labels).double().mean()
        return torch.stack([loss.double(), correct, measure.double()]).detach() * weight

    return graphed(step) if config["graph"] and device.type == "cuda" and world == 1 else step


def fit(config, folder, data, model, optimizer, scaler, state, bar):
    """Train from `state` to the end, epoch by epoch. Raises InputError, naming epoch and step, where a number is not finite."""
    (rank, world), size, target = rank_and_world(), config["batch_size"], config["stop_at_loss"]
    steps, augment = math.ceil(len(data.train_labels) / size), config["augment"] == "basic"
    step = step_of(config, model, optimizer, scaler)
    saved_at = said_at = time.monotonic()
    while not finished(state, config):
        began, results = time.perf_counter(), []
        state["epoch"] += 1
        regularised = draw_layers(config, state["epoch"], steps)
        checks = next((n for below, n in CHECKS_PER_EPOCH if state["loss_bound"] < below), 1) if target else 0
        check_after = {math.ceil(steps * (i + 1) / checks) for i in range(checks)}
        model.train()
        for images, labels, weight in batches(data, size, config["seed"], state["epoch"], augment, rank, world):
            lr = config["lr"]
            if config["schedule"] == "cosine":
                lr *= 0.5 * (1 + math.cos(math.pi * state["step"] / (config["epochs"] * steps)))
            for group in optimizer.param_groups:  # on CUDA it stays one tensor, which a graph reads
                group["lr"] = group["lr"].fill_(lr) if images.is_cuda else lr
            try:
                results.append(step(images, labels, weight, regularised[len(results)]))
            except ValueError as error:  # from the coding rates
                raise InputError(f"epoch {state['epoch']}, step {state['step'] + 1}: {error}; {CURE}")
            state["step"] += 1
            bar.update()
            if len(results) in check_after and reached_target(config, data, model, state, epoch_ends=len(results) == steps):
                break
        row = {"epoch": state["epoch"], "step": state["step"], "lr": lr} | means(results, config, data, state)
        log(row, config, folder, data, model, state, began)
        bar.set_postfix(loss=f"{row['train_loss']:.4f}")
        if rank == 0 and not sys.stderr.isatty() and time.monotonic() >= said_at + SAY_EVERY:
            epochs, said_at = f"epoch {state['epoch']} of {config['epochs']}", time.monotonic()
            print(f"{folder.name}: {epochs}, train loss {row['train_loss']:.4f}", file=sys.stderr, flush=True)
        if rank == 0 and (finished(state, config) or time.monotonic() >= saved_at + config["save_every"]):
            save(folder, config, state, {"model": model, "optimizer": optimizer, "scaler": scaler})
            saved_at = time.monotonic()


def save(folder, config, state, parts):
    """Write last.pt: all that the run goes on from, or of a finished one the weights alone."""
    parts = {name: part.state_dict() for name, part in parts.items() if name == "model" or not finished(state, config)}
    save_checkpoint(folder / "last.pt", {"config": config, **parts, **state})


def finished(state, config):
    """Whether a run has come to its end: all epochs, or the stopping criterion (no loss is below 0)."""
    return state["epoch"] >= config["epochs"] or state["loss_bound"] < (config["stop_at_loss"] or 0)


def draw_layers(config, epoch, steps):
    """Seed what an epoch draws by (seed, epoch), dropout by the rank too. Returns whose SRR is in the loss, step by step."""
    seeds = DROPOUT, config["seed"], epoch
    torch.manual_seed(mixed_seed(*seeds))
    layers = srr_layers(config["srr_layer"], config["depth"], steps) if config["srr_reg"] else [()] * steps
    if rank := rank_and_world()[0]:
        torch.manual_seed(mixed_seed(*seeds, rank))
    return layers


@torch.no_grad()
def evaluate(model, data, images, labels):
    """Mean cross-entropy, in float64, and accuracy, in eval mode and full precision, without augmentation."""
    model.eval()
    parts = images.split(1024 if images.is_cuda else 256)  # more take 8 GB at d = 768
    logits = torch.cat([model(data.prepare(part)) for part in parts]).double()
    return F.cross_entropy(logits, labels, reduction="none").mean().item(), (logits.argmax(1) == labels).double().mean().item()


def reached_target(config, data, model, state, epoch_ends):
    """Whether cross-entropy over the training set is below the target, for all ranks alike whatever their rounding.

    state["loss_bound"] becomes the loss, or a ceiling once the sum shows that it is not below: the target, but at an epoch's
    end the largest loss of CHECKS_PER_EPOCH, to choose how often the next epoch checks.
    """
    target, examples, loss = config["stop_at_loss"], len(data.train_labels), torch.zeros((), dtype=torch.float64)
    ceiling = max(target, CHECKS_PER_EPOCH[-1][0]) if epoch_ends else target
    chunk = max(64, examples // 16)
    for images, labels in zip(data.train_images.split(chunk), data.train_labels.split(chunk)):
        loss += evaluate(model, data, images, labels)[0] * len(labels) / examples
        if loss >= ceiling:
            loss.fill_(ceiling)
            break
    if rank_and_world()[1] > 1:
        dist.broadcast(loss, 0)
    model.train()
    state["loss_bound"] = loss.item()
    return state["loss_bound"] < target


def means(results, config, data, state):
    """An epoch's means of what the steps returned, every image weighing alike: columns of its row."""
    results, size, (_, world) = torch.stack(results), config["batch_size"], rank_and_world()
    if world > 1:
        dist.all_reduce(results)
    results = results.cpu().numpy() / world  # here the host waits for the device
    for i in np.flatnonzero(~np.isfinite(results.sum(1)))[:1]:
        where = f"epoch {state['epoch']}, step {state['step'] - len(results) + i + 1}"
        raise InputError(f"{where}: the loss is {results[i, 0] + config['srr_reg'] * results[i, 2]}; {CURE}")
    weights = [min(size, len(data.train_labels) - i * size) for i in range(len(results))]
    loss, accuracy, measure = np.average(results, axis=0, weights=weights).tolist()
    return {"train_loss": loss, "train_accuracy": accuracy} | ({"train_srr": measure} if config["srr_reg"] else {})


def log(row, config, folder, data, model, state, began):
    """Complete the epoch's row by what is due, validation loss and layer-wise SRR, and append it to log.jsonl.

    Raises InputError where the weights or the validation loss are not finite. A rate that can't be computed is null, with a
    warning: a diagnostic ends no run.
    """
    epoch, last = state["epoch"], finished(state, config)
    if last or epoch % config["validate_every"] == 0:
        row["val_loss"], row["val_accuracy"] = evaluate(model, data, data.val_images, data.val_labels)
    finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    if not (finite and math.isfinite(row.get("val_loss", 0))):
        raise InputError(f"epoch {epoch}: the weights or the validation loss are not finite; {CURE}")
    if config["log_srr_every"] and (last or epoch % config["log_srr_every"] == 0):
        train, val = (data.prepare(images[:SRR_IMAGES]) for images in (data.train_images, data.val_images))
        due = [("srr", layer_srr, train), ("srr_val", layer_srr, val), ("operators", operator_rates, train)]
        for key, rates, images in due if last or epoch == 0 else due[:2]:
            row[key] = None
            try:
                row[key] = rates(model, images, sparsity=config["srr_lambda"], gamma=config["srr_gamma"])
            except ValueError as error:
                tqdm.write(f"warning: {folder}: epoch {epoch}: {key} is null in the log: {error}", file=sys.stderr)
    state["rows"].append(row | {"seconds": round(time.perf_counter() - began, 3)})
    if rank_and_world()[0] == 0:
        with open(folder / "log.jsonl", "a") as stream:
            stream.write(json.dumps(state["rows"][-1]) + "\n")


def begin(config, folder):
    """Data, model, optimizer, scaler and state of a run: as last.pt has them, or new, with init.pt and the log's first row.

    Adam; weight decay, if any, is decoupled (AdamW) and on matrices alone.
    """
    device, last, (rank, _) = torch.device(config["device"]), folder / "last.pt", rank_and_world()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its dropout is rounded to sixteenths in 16 bits (pytorch pull request 174245)
    data = data_of(config, device=device)
    torch.manual_seed(config["seed"])
    model = model_of(config).to(device)
    matrices = {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": config["weight_decay"]}
    others = {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, others], lr=config["lr"], fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=config["amp"] == "fp16")
    # loss_bound: cross-entropy over the training set at the last check of the stopping criterion, or what it is at least.
    state = {"epoch": 0, "step": 0, "loss_bound": math.inf, "rows": []}
    if last.exists():
        saved = load_weights(model, last, config)
        state = {key: saved[key] for key in state}
        if not finished(state, config):
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
    elif rank == 0 and config["epochs"]:
        save_checkpoint(folder / "init.pt", {"config": config, "model": model.state_dict()})
    if device.type == "cuda":  # a CUDA graph reads the learning rate from the device; the saved groups may come from a CPU
        for group in optimizer.param_groups:
            group |= {"lr": torch.tensor(config["lr"], device=device), "capturable": True}
    if rank == 0:  # a kill between logging and saving leaves a row too many: the checkpoint's rows are the log
        write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state["rows"]))
    if not state["rows"]:
        log({"epoch": 0, "step": 0}, config, folder, data, model, state, time.perf_counter())
    return data, model, optimizer, scaler, state


def evaluate_both(model, data):
    """Losses, accuracies and gaps of a trained model, a dict."""
    loss, accuracy = evaluate(model, data, data.train_images, data.train_labels)
    val_loss, val_accuracy = evaluate(model, data, data.val_images, data.val_labels)
    result = {"train_loss": loss, "train_accuracy": accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}
    return result | {"gap": val_loss - loss, "gap_accuracy": accuracy - val_accuracy}


def finish(config, folder, data, model, state):
    """Evaluate the trained model, write result.json and return what it says."""
    reached = None if config["stop_at_loss"] is None else state["loss_bound"] < config["stop_at_loss"]
    result = {"reached_target": reached, "epochs": state["epoch"], "steps": state["step"], **evaluate_both(model, data)}
    result["seconds"] = round(sum(row["seconds"] for row in state["rows"]), 3)
    if rank_and_world()[0] == 0:
        write_json(folder / "result.json", result)
    return result


def train(config, folder, show_progress=True, again=False):
    """Train the run that `config` describes in `folder`, from where it stands; `again`: anew, if other code or other images
    made what is there. Returns what result.json holds.

    Raises Busy where another process has the folder. After any other error the last saved epoch stays, and error.txt says why.
    """
    folder, (rank, world) = Path(folder), rank_and_world()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if rank == 0 else nullcontext():
        if rank == 0:
            config = made_by(folder, config, again)
        if world > 1:
            dist.barrier()  # all see what rank 0 wrote last
        if (folder / "result.json").exists():
            return read_json(folder / "result.json")
        if rank == 0:
            write_json(folder / "config.json", config)
            for leftover in [folder / "error.txt", *folder.glob(".*.tmp")]:
                leftover.unlink(missing_ok=True)
        try:
            data, model, optimizer, scaler, state = begin(config, folder)
            steps = config["epochs"] * math.ceil(len(data.train_labels) / config["batch_size"])
            progress = {"total": steps, "initial": state["step"], "desc": folder.name, "unit": "step", "leave": False}
            with tqdm(**progress, disable=None if show_progress else True) as bar:
                fit(config, folder, data, model, optimizer, scaler, state, bar)
            return finish(config, folder, data, model, state)
        except (ValueError, RuntimeError, OSError) as error:
            if rank == 0:
                write_text(folder / "error.txt", one_line(error) + "\n")
            raise
