"""Runs and their folders: presets, configs, names, who works on a folder, and what state it is in.

A run folder holds config.json, init.pt, log.jsonl (a row per epoch), last.pt, .lock (its holder, while it runs), error.txt (the
last failure, until the run is started again), val_losses.npy (of each validation image, at the end), and result.json, written
last: without it a run is unfinished.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from crate.cli import InputError, one_line
from crate.data import load_data
from crate.files import load_checkpoint, read_json
from crate.model import build_model

# What a run is unless a preset or a flag says otherwise: the paper's settings. None is "off" or "the data set's own".
DEFAULTS = dict(
    model="crate-c", dataset="cifar10", train_subset=None, hold_out=0.0, augment="none",
    image_size=None, patch_size=4, width=384, depth=12, heads=6, dropout=0.0,
    epochs=200, batch_size=128, lr=1e-4, schedule="cosine", weight_decay=0.0, clip_norm=None, stop_at_loss=None,
    srr_reg=0.0, srr_layer="last", srr_norm="l0", srr_lambda=0.1, srr_gamma=1.0,
    log_srr_every=0, validate_every=1, seed=0,
    # What the paper leaves open, as in the released CRATE: step size and lambda of ISTA, the softmax's temperature.
    ista_beta=0.1, ista_lambda=0.1, temperature="sqrt-p",
)  # fmt: skip

PRESETS = {
    # Section 6: CRATE-Tiny on CIFAR-10 with the paper's augmentation.
    "paper": dict(augment="basic", log_srr_every=20),
    # The shipped 8x8 digits, and a model that trains in seconds on one CPU core.
    "laptop": dict(dataset="digits", patch_size=2, width=48, depth=4, epochs=30, lr=2e-3, batch_size=32,
                   log_srr_every=10, validate_every=10),
    # CIFAR-10 on two CPU cores: nearly all models of all types reach a training loss of 0.01 within 200 epochs.
    "cifar": dict(train_subset=2000, patch_size=8, width=96, depth=6, epochs=100, lr=2e-3, batch_size=64,
                  log_srr_every=20, validate_every=20),
}  # fmt: skip

# The flags that take several values: a sweep is their Cartesian product.
AXES = "width depth batch_size lr dropout weight_decay model srr_reg srr_layer seed".split()
# What may differ between a run and its resumption.
FREE_TO_CHANGE = {"device", "data_dir", "save_every", "graph", "versions", "commit", "command"}
MODEL_SETTINGS = (
    "image_size", "patch_size", "channels", "classes", "width", "depth", "heads", "dropout",
    "temperature", "ista_beta", "ista_lambda",
)  # fmt: skip


def resolve_device(name):
    """The torch.device for --device; "auto" is CUDA where present. Raises InputError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: no such device here; use --device cpu")
    return device


def resolve_amp(amp, device):
    """ "off", "bf16" or "fp16" for --amp; "auto" is bf16 on a GPU that has it, else off."""
    if amp != "auto":
        return amp
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"


def provenance():
    """Where a result comes from: versions, machine, git commit, command."""
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"processor": processor, "cores": os.cpu_count()}
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {"versions": versions, "commit": commit, "command": shlex.join(["python", "train.py", *sys.argv[1:]])}


def settings(sweep, draw=None):
    """The combinations of a sweep, {axis: values}, as dicts; with `draw`, that many random ones for each model type instead.

    Random ones take lr between the smallest and the largest value given (evenly on a logarithmic scale), so too, on a linear
    scale, dropout and weight decay, and any of the values of the other axes. The seed "own" is one that no other setting has.
    """
    if draw is None:
        chosen = [dict(zip(sweep, values)) for values in itertools.product(*sweep.values())]
    else:
        chosen = []
        for model, i in itertools.product(sweep["model"], range(draw)):
            random = np.random.default_rng([i, *model.encode()])
            one = {axis: values[random.integers(len(values))] for axis, values in sweep.items()} | {"model": model}
            for axis, scale, back in (("dropout", float, float), ("weight_decay", float, float), ("lr", math.log, math.exp)):
                low, high = min(sweep[axis]), max(sweep[axis])
                value = back(random.uniform(scale(low), scale(high)))
                one[axis] = float(f"{value:.3g}") if low < high else low
            chosen.append(one)
    for one in chosen:
        if not one["srr_reg"]:  # then the run is the same whatever its other SRR flags say
            one["srr_layer"] = DEFAULTS["srr_layer"]
        if one["seed"] == "own":
            one["seed"] = int(hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:8], 16)
    return chosen


def resolve(flags, *, preset, device, amp, data_dir, draw=None, **others):
    """The configs of all runs that the flags ask for, {name: config}, in every detail that config.json shows.

    flags: {key of DEFAULTS: value or, for AXES, list of values}, what was given; draw: see `settings`; others: stored as they
    are. Raises InputError where they don't fit each other.
    """
    base = {"preset": preset, **DEFAULTS, **PRESETS[preset], **flags, "device": str(device), "amp": amp, **others}
    data = load_data(base["dataset"], data_dir, image_size=base["image_size"])
    base |= {"data_dir": str(data_dir), "image_size": data.image_size, "classes": data.classes, **provenance()}
    base["channels"] = data.train_images.shape[1]
    sweep = {axis: base[axis] if isinstance(base[axis], list) else [base[axis]] for axis in AXES}
    configs = {}
    for one in settings(sweep, draw):
        config = base | one
        if not config["srr_reg"]:
            config["srr_norm"] = DEFAULTS["srr_norm"]
        srr_layers(config["srr_layer"], config["depth"], 1)  # refuses a layer that isn't there
        try:
            with torch.device("meta"):
                config["parameters"] = sum(p.numel() for p in model_of(config).parameters())
        except ValueError as error:
            raise InputError(f"{error}; see --width, --heads, --image-size, --patch-size, --depth")
        except (RuntimeError, TypeError):  # a size that overflows
            raise InputError("no tensor can be as large as this model's; choose a smaller --width or --image-size")
        if configs.setdefault(run_name(config), config) != config:
            raise InputError(f"{run_name(config)}: two runs of the sweep have this name; their values are too close")
    return configs


def srr_layers(choice, depth, steps):
    """The 0-based layers that --srr-layer regularises in each of `steps` steps; "random" draws one for each."""
    if choice == "random":
        return [[layer] for layer in torch.randint(depth, (steps,)).tolist()]
    if choice == "all":
        return [list(range(depth))] * steps
    if choice == "last":
        return [[depth - 1]] * steps
    if not (str(choice).isdecimal() and 1 <= int(choice) <= depth):
        raise InputError(f"--srr-layer {choice}: must be last, all, random or a layer from 1 to {depth}")
    return [[int(choice) - 1]] * steps


def run_name(config):
    """The run folder's name: the settings that can take several values."""
    name = "{model}_d{width}_L{depth}_b{batch_size}_lr{lr:g}_p{dropout:g}"
    if config["weight_decay"]:
        name += "_wd{weight_decay:g}"
    if config["srr_reg"]:
        name += "_eta{srr_reg:g}_{srr_layer}_{srr_norm}"
    return (name + "_s{seed}").format(**config)


def model_of(config):
    """The model that a run's config.json describes, newly initialised."""
    return build_model(config["model"], **{key: config[key] for key in MODEL_SETTINGS})


def identity(config):
    """The part of a config that the run's result depends on."""
    return {key: value for key, value in config.items() if key not in FREE_TO_CHANGE}


def check_same_run(there, now, where):
    """Raise InputError where two configs are of different runs; `where` says where the first one is from."""
    there, now = identity(there), identity(now)
    for key in sorted(there.keys() | now.keys()):
        if there.get(key) != now.get(key):
            cure = f"match --{key.replace('_', '-')} or change --out" if key in DEFAULTS else "change --out"
            raise InputError(f"{where}: {key} is {there.get(key)} there but {now.get(key)} now; {cure}")


def read_run(folder):
    """config.json and result.json of a finished run. Raises InputError where either is missing or malformed."""
    config, result = (read_json(Path(folder) / name) for name in ("config.json", "result.json"))
    needed = {"epochs", "steps", "reached_target", "gap", "gap_accuracy", "val_accuracy", "seconds"}
    if missing := needed - result.keys():
        raise InputError(f"{folder}/result.json: {', '.join(sorted(missing))} missing; delete the file and train again")
    return config, result


def read_log(folder):
    """The rows of a run's log.jsonl. Raises InputError where a line is damaged."""
    rows = []
    for k, line in enumerate((Path(folder) / "log.jsonl").read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise InputError(f"{folder}/log.jsonl: line {k} is damaged; train the run again")
    return rows


def load_weights(model, path, config):
    """Load a run's checkpoint `path` (init.pt or last.pt) into `model` and return all that it holds.

    Raises InputError where it is damaged or belongs to another run than that of `config`.
    """
    content = load_checkpoint(path)
    if not isinstance(content.get("config"), dict):
        raise InputError(f"{path}: not a checkpoint of this project, or of an older version of it; choose another --out")
    check_same_run(content["config"], config, path)
    try:
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError):
        raise InputError(f"{path}: its weights don't fit the model in config.json")
    return content


def load_run(folder, device="cpu"):
    """Config, result, trained model and model at initialisation (both in eval mode) of a finished run.

    Raises InputError where a file is missing, damaged or of another run.
    """
    folder = Path(folder)
    config, result = read_run(folder)
    try:
        trained, initial = model_of(config), model_of(config)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'}: {error}; restore the file")
    if load_weights(trained, folder / "last.pt", config).get("epoch") != result["epochs"]:
        raise InputError(f"{folder / 'last.pt'}: not of the epoch that result.json says; restore either")
    load_weights(initial, folder / "init.pt", config)
    return config, result, trained.to(device).eval(), initial.to(device).eval()


class Busy(InputError):
    """Another process works on the folder."""


@contextmanager
def locked(folder):
    """Hold `folder` for this process alone. Raises Busy where a living process holds it, on this machine or on another one
    that shares the file system.

    A POSIX lock: it ends with the process, however that ends, and processes started from this one don't inherit it.
    """
    path = Path(folder) / ".lock"
    with open(path, "a+") as stream:
        for _ in range(10):  # `lock_holder` may have it for an instant
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                time.sleep(0.02)
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; name an --out on a file system that can lock files")
        else:
            raise Busy(f"{folder}: another process works on it ({path.read_text().strip()})")
        stream.truncate(0)
        stream.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
        stream.flush()
        yield


def lock_holder(folder):
    """Who holds `folder` ("host .., process .."), or None."""
    with suppress(FileNotFoundError), open(Path(folder) / ".lock") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return stream.read().strip()


def find_runs(folders):
    """All run folders at or below `folders`, in order. Raises InputError where there are none."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        below = sorted(path.parent for path in folder.resolve().rglob("config.json"))
        if not below:
            raise InputError(f"{folder}: holds no run; name a folder that train.py made, or one above it")
        found += [path for path in below if path not in found]
    return found


def status(folder):
    """A run's state and what there is to say of it: ("finished" | "running" | "failed" | "unfinished" | "waiting", str)."""
    try:
        if (folder / "result.json").exists():
            _, result = read_run(folder)
            return "finished", "{epochs} epochs, val accuracy {val_accuracy:.2%}, {seconds:.0f} s".format(**result)
        log, failure = folder / "log.jsonl", folder / "error.txt"
        epochs = read_log(folder)[-1]["epoch"] if log.exists() and log.stat().st_size else 0
        progress = f"{epochs} of {read_json(folder / 'config.json')['epochs']} epochs"
        if holder := lock_holder(folder):
            return "running", f"{progress}; {holder}"
        if failure.exists():
            reason = failure.read_text("utf-8", "surrogateescape").strip()
            return "failed", f"{progress}; {reason}"
        return ("unfinished", progress) if log.exists() else ("waiting", "nobody has started it")
    except (ValueError, TypeError, KeyError, OSError) as error:
        return "failed", one_line(error)
