"""The training loop: Adam, AMP, cross-entropy plus SRR (Eq. 14), the stopping criterion of Section 5, logs, exact resume."""

import functools
import json
import math
import signal
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from crate import distributed
from crate.checkpoint import load_weights, save_checkpoint
from crate.cli import InputError, Interrupted, deferred_signals, one_line
from crate.data import DROPOUT, AugmentedBatches, batches, data_of, mixed_seed
from crate.distributed import LOCAL_RANK, RANK, WORLD
from crate.files import locked, write_json, write_text
from crate.model import model_from_config
from crate.runs import check_config, config_sha256, finished_run, identity
from crate.srr import add_srr_gradients, layer_srr, operator_rates

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SRR_IMAGES = 512  # layer-wise SRR is logged on the first so many training and validation images
# Below a loss of x the stopping criterion is checked n times an epoch, so that fast runs don't overshoot (RGM's rule).
CHECKS_PER_EPOCH = ((0.015, 8), (0.025, 4), (0.05, 2))
# What last.pt holds of a Run besides its weights, optimizer and scaler.
STATE = ("epoch", "step", "train_loss", "rows", "hardest_first", "partial")


def learning_rate(step, total_steps, initial, schedule):
    """The rate of step `step` (0-based) of `total_steps`: `initial` throughout, or its cosine decay to zero."""
    return initial if schedule == "constant" else initial * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def resolve_device(name):
    """The device of the flag's value; "auto" is CUDA where present, else the CPU. Raises InputError where there is no such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:  # a GPU for each process
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: no such device here; use --device cpu")
    return device


def resolve_amp(amp, device):
    """Return "off", "bf16" or "fp16" for the flag's value. Raises InputError where the device can't multiply in that type."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    if amp != "off":
        try:
            ones = torch.ones(2, 2, dtype=AMP_DTYPES[amp], device=device)
            ones @ ones
        except RuntimeError:
            raise InputError(f"--amp {amp}: {device} has no support for it; use --amp off")
    return amp


def srr_layers(choice, depth, steps):
    """The 0-based layers that `--srr-layer` regularises, for each of `steps` steps."""
    if choice == "random":
        return [[layer] for layer in torch.randint(depth, (steps,)).tolist()]
    layers = {"all": list(range(depth)), "last": [depth - 1]}.get(choice) or [int(choice) - 1]
    return [layers] * steps


@torch.no_grad()
def evaluate(model, data, images, labels, chunk=256):
    """Mean cross-entropy and accuracy in eval mode and full precision, un-augmented: two floats, one synchronisation."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=labels.device)
    for part, truth in zip(images[RANK::WORLD].split(chunk), labels[RANK::WORLD].split(chunk)):
        if len(part):  # else there are fewer images than ranks
            logits = model(data.resize(part))
            sums += torch.stack([F.cross_entropy(logits.double(), truth, reduction="sum"), (logits.argmax(1) == truth).sum()])
    loss, accuracy = (distributed.total(sums) / len(labels)).tolist()
    return loss, accuracy


class Run:
    """One training run and all of its state: what a checkpoint holds, and what one epoch does to it."""

    def __init__(self, config, folder):
        self.config, self.folder = config, Path(folder)
        self.device = torch.device(config["device"])
        self.data = data_of(config, device=self.device)
        torch.manual_seed(config["seed"])
        self.model = model_from_config(config).to(self.device)
        # Adam; weight decay, if any, is decoupled (AdamW) and on matrices alone.
        matrices = {"params": [p for p in self.model.parameters() if p.ndim == 2], "weight_decay": config["weight_decay"]}
        others = {"params": [p for p in self.model.parameters() if p.ndim != 2], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([matrices, others], lr=config["lr"], fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config["amp"] == "fp16")
        self.epoch = self.step = 0
        self.train_loss = math.inf  # cross-entropy over the training set at the last check of the stopping criterion
        self.hardest_first = torch.arange(len(self.data.train_labels), device=self.device)  # by the last check's losses
        self.rows = []  # of log.jsonl
        self.partial = None  # of an epoch that a signal interrupted: what to go on from
        self.steps_per_epoch = math.ceil(len(self.data.train_labels) / config["batch_size"])
        self.total_steps = config["epochs"] * self.steps_per_epoch
        if config["compile"]:
            from torch._functorch import config as functorch_config

            # The gradient of Eq. 14 keeps the graph for cross-entropy's, which donated buffers forbid.
            functorch_config.donated_buffer = False
            for layer in self.model.layers:  # in place: the checkpoint's names stay those of the plain module
                layer.compile()
        settings = self.data, config["batch_size"], config["seed"]
        augmented = config["augment"] == "basic"
        self.batches = AugmentedBatches(*settings).epoch if augmented else functools.partial(batches, *settings)

    @property
    def reached_target(self):
        target = self.config["stop_at_loss"]
        return None if target is None else self.train_loss < target

    @property
    def finished(self):
        return not self.partial and (self.epoch >= self.config["epochs"] or bool(self.reached_target))

    def start(self):
        """Resume from last.pt, or begin: init.pt, and layer-wise SRR at initialisation."""
        last = self.folder / "last.pt"
        if distributed.agree(last.exists()):
            state = load_weights(self.model, last, self.config)
            try:
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
                for name in STATE:
                    setattr(self, name, state[name])
                self.hardest_first = self.hardest_first.to(self.device)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"{last}: no checkpoint to go on from ({error}); delete it to start the run again")
        else:
            self.write("init.pt", {"model": self.model.state_dict()})
            self.log(time.perf_counter())
        if RANK == 0:  # a kill between logging and saving leaves a row too many: the checkpoint's rows are the log
            write_text(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def save(self):
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        self.write("last.pt", parts | {name: getattr(self, name) for name in STATE})

    def write(self, name, content):
        if RANK == 0:
            save_checkpoint(self.folder / name, content | {"config": identity(self.config)})

    def log(self, started, **training):
        """Append the epoch's row: validation loss and accuracy, layer-wise SRR if it is due, seconds since `started`."""
        loss, accuracy = evaluate(self.model, self.data, self.data.val_images, self.data.val_labels)
        if not math.isfinite(loss):
            self.fail(self.step, f"the validation loss is {loss}")
        row = {"epoch": self.epoch, "step": self.step, **training, "val_loss": loss, "val_accuracy": accuracy}
        every = self.config["log_srr_every"]
        if RANK == 0 and every and (self.epoch % every == 0 or self.epoch == self.config["epochs"]):
            train, val = (self.data.resize(x[:SRR_IMAGES]) for x in (self.data.train_images, self.data.val_images))
            coefficients = self.config["srr_lambda"], self.config["srr_gamma"]
            row["srr"], row["srr_val"] = (layer_srr(self.model, images, *coefficients) for images in (train, val))
            if self.epoch in (0, self.config["epochs"]):
                row["operators"] = operator_rates(self.model, train, *coefficients)
        row["seconds"] = round(time.perf_counter() - started, 3)
        self.rows.append(row)
        if RANK == 0:
            with open(self.folder / "log.jsonl", "a") as stream:
                stream.write(json.dumps(row) + "\n")

    def gradients(self, images, labels, layers, share):
        """Gradients of cross-entropy + eta SRR (Eq. 14), both times `share`: this rank's part of the batch.

        Returns loss, number correct and SRR on the device, the means times `share`.
        """
        config, model = self.config, self.model
        if not share:  # a batch of fewer images than ranks; the scaler starts with its first `scale`
            return self.scaler.scale(torch.zeros(3, device=self.device))
        with torch.autocast(self.device.type, AMP_DTYPES.get(config["amp"]), enabled=config["amp"] != "off"):
            logits, outputs = model.forward_with_outputs(images) if config["srr_reg"] else (model(images), None)
            loss = F.cross_entropy(logits, labels)
        srr = loss.new_zeros(())
        if config["srr_reg"]:
            weight = self.scaler.scale(torch.ones_like(srr)) * config["srr_reg"] * share
            coefficients = config["srr_lambda"], config["srr_gamma"]
            srr = add_srr_gradients(model, outputs, layers, weight, *coefficients, norm=config["srr_sparsity"])
        self.scaler.scale(loss * share).backward()
        return torch.stack([loss.detach() * share, (logits.detach().argmax(1) == labels).sum(), srr * share])

    def train_step(self, images, labels, layers, share=1.0):
        """One step of Adam on Eq. 14. Returns what `gradients` returns."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, config["lr"], config["schedule"])
        self.optimizer.zero_grad()
        result = self.gradients(images, labels, layers, share)
        distributed.sum_gradients(self.model.parameters())
        if config["clip_norm"] is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config["clip_norm"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return result

    def begin_epoch(self):
        """Count the epoch, or return to the one that a signal stopped. Returns what it has so far (as in `partial`: how often
        the stopping criterion is checked, results of the steps, seconds) and the layers that each of its steps regularises.

        Dropout and random layers are functions of (seed, epoch), dropout of the rank too.
        """
        partial, self.partial = self.partial, None
        if partial is None:
            self.epoch += 1
            checks = next((n for below, n in CHECKS_PER_EPOCH if self.train_loss < below), 1)
            partial = {"checks": checks, "steps": [], "seconds": 0.0}
        seeds = DROPOUT, self.config["seed"], self.epoch
        torch.manual_seed(mixed_seed(*seeds))
        layers = srr_layers(self.config["srr_layer"], self.config["depth"], self.steps_per_epoch)
        if "random" in partial:
            cpu, *cuda = partial["random"][RANK]
            torch.set_rng_state(cpu)
            for state in cuda:
                torch.cuda.set_rng_state(state, self.device)
        elif RANK:
            torch.manual_seed(mixed_seed(*seeds, RANK))
        return partial, layers

    def train_epoch(self, bar, stop=()):
        """One epoch, or what is left of it, or its part up to the stopping criterion, or, where `stop` fills, to the next step.

        Returns whether it was stopped. Nothing in it waits for the device but the stopping criterion.
        """
        started, size, target = time.perf_counter(), self.config["batch_size"], self.config["stop_at_loss"]
        partial, layers = self.begin_epoch()
        checks = 0 if target is None else partial["checks"]
        check_at = {math.ceil(self.steps_per_epoch * (i + 1) / checks) for i in range(checks)}
        self.model.train()
        steps = [step.to(self.device) * (RANK == 0) for step in partial["steps"]]  # sums over the ranks
        stopped, total = False, len(self.data.train_labels)
        for i, (images, labels) in enumerate(self.batches(self.epoch, len(steps)), len(steps)):
            try:
                steps.append(self.train_step(images, labels, layers[i], len(labels) / min(size, total - i * size)))
            except ValueError as error:  # from the coding rates
                self.fail(self.step + 1, error)
            bar.update()
            if i + 1 in check_at:
                # How far above the target it is matters at the epoch's end alone, and up to 0.05: that decides the checks.
                enough = target if i + 1 < self.steps_per_epoch else max(target, 0.05)
                self.train_loss = self.training_loss(enough)
                self.model.train()
                if self.reached_target:
                    break
            stopped = distributed.anywhere(bool(stop))
            if stopped:
                break
        sums = distributed.total(torch.stack(steps))
        losses, correct, srr = sums.double().cpu().T
        finite = (losses + srr).isfinite()
        if not finite.all():
            i = int(finite.logical_not().nonzero()[0])
            self.fail(self.step - len(steps) + i + 1, f"the loss is {losses[i] + srr[i]}")
        if stopped and len(steps) < self.steps_per_epoch:
            states = [torch.get_rng_state()]
            if self.device.type == "cuda":
                states.append(torch.cuda.get_rng_state(self.device))
            seconds = partial["seconds"] + time.perf_counter() - started
            self.partial = partial | {"steps": sums, "random": distributed.gather(states), "seconds": seconds}
            return True
        means = {"train_loss": losses.mean().item(), "train_accuracy": correct.sum().item() / min(total, len(steps) * size)}
        if self.config["srr_reg"]:
            means["train_srr"] = srr.mean().item()
        self.log(started - partial["seconds"], **means, lr=self.optimizer.param_groups[0]["lr"])
        bar.set_postfix(loss=f"{means['train_loss']:.4f}", val=f"{100 * self.rows[-1]['val_accuracy']:.1f}%")
        return stopped

    @torch.no_grad()
    def training_loss(self, enough, chunk=256):
        """Mean cross-entropy over the training set as `evaluate` has it, or a lower bound of at least `enough`.

        The images that were hardest at the last check come first: where few of them make up most of the loss, the rest need
        not be looked at to know that it is too high.
        """
        self.model.eval()
        total, losses = 0.0, []
        for index in self.hardest_first.split(chunk):
            part, mine = torch.zeros(len(index), dtype=torch.float64, device=self.device), index[RANK::WORLD]
            if len(mine):
                logits = self.model(self.data.resize(self.data.train_images[mine]))
                part[RANK::WORLD] = F.cross_entropy(logits.double(), self.data.train_labels[mine], reduction="none")
            losses.append(distributed.total(part))
            total += losses[-1].sum().item() / len(self.hardest_first)
            if total >= enough:
                break
        seen = torch.cat(losses)
        self.hardest_first[: len(seen)] = self.hardest_first[: len(seen)][seen.argsort(descending=True)]
        return total

    def fail(self, step, reason):
        raise InputError(f"{self.folder}: epoch {self.epoch}, step {step}: {reason}; try a smaller --lr or --amp off")

    def finish(self):
        """Evaluate, write result.json and return what it says."""
        train_loss, train_accuracy = evaluate(self.model, self.data, self.data.train_images, self.data.train_labels)
        val_loss, val_accuracy = (self.rows[-1][key] for key in ("val_loss", "val_accuracy"))
        result = {
            "reached_target": self.reached_target, "epochs": self.epoch, "steps": self.step,
            "train_loss": train_loss, "train_accuracy": train_accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy,
            "gap": val_loss - train_loss, "gap_accuracy": train_accuracy - val_accuracy,
            "seconds": round(sum(row["seconds"] for row in self.rows), 3), "config_sha256": config_sha256(self.config),
        }  # fmt: skip
        if RANK == 0:
            write_json(self.folder / "result.json", result)
        return result


def train(config, folder, show_progress=True):
    """Train the run that `config` describes in `folder`, from where it stands. Returns its result (of result.json).

    Raises InputError where the folder holds another run or is in use, a checkpoint can't be read, or the loss is not
    finite (naming epoch and step; the last saved epoch stays), and leaves the reason in error.txt. Raises
    Interrupted on SIGINT and SIGTERM, after the step that they came in has been saved.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with deferred_signals() as stop, locked(folder) if RANK == 0 else nullcontext():
        check_config(config, folder)
        if distributed.agree((folder / "result.json").exists()):
            return finished_run(folder)[1]
        if RANK == 0:
            for leftover in [folder / "error.txt", *folder.glob(".*.tmp")]:
                leftover.unlink(missing_ok=True)
            if not (folder / "config.json").exists():
                write_json(folder / "config.json", config)
        try:
            run = Run(config, folder)
            run.start()
            progress = dict(total=run.total_steps, initial=run.step, desc=folder.name, unit="step", leave=False)
            with tqdm(**progress, disable=not show_progress) as bar:
                saved = time.monotonic()
                while not run.finished:
                    stopped = run.train_epoch(bar, stop)
                    if stopped or run.finished or time.monotonic() >= saved + config["save_every"]:
                        run.save()
                        saved = time.monotonic()
                    if stopped:
                        raise Interrupted(stop[0] if stop else signal.SIGTERM)  # that another rank got
            return run.finish()
        except (ValueError, RuntimeError, OSError) as error:
            if stop:  # the same signal may have ended a worker before it could ignore it
                raise Interrupted(stop[0])
            with suppress(OSError):
                if not (folder / "error.txt").exists():  # the first rank to fail knows why; the others lose their connection
                    write_text(folder / "error.txt", one_line(error) + "\n")
            raise
