"""Runs and their folders: presets, configs, names, what made a run, who works on it, and what state it is in.

A run folder holds config.json, init.pt, log.jsonl (a row per epoch), last.pt, .lock (its holder, while it runs), error.txt (the
last failure, until the run is started again), and result.json, written last: without it a run is unfinished.
"""

import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from crate.cli import InputError, one_line, read_json, write_bytes, write_json
from crate.data import check_images, data_of
from crate.model import build_model

# What a run is unless a preset or a flag says otherwise: the paper's settings. None is "off" or "the data set's own".
DEFAULTS = dict(
    model="crate-c", dataset="cifar10", train_subset=None, hold_out=0.0, augment="none",
    image_size=None, patch_size=4, width=384, depth=12, heads=6, dropout=0.0,
    epochs=200, batch_size=128, lr=1e-4, schedule="cosine", weight_decay=0.0, clip_norm=None, stop_at_loss=None,
    srr_reg=0.0, srr_layer="last", srr_norm="l0", srr_lambda=0.1, srr_gamma=1.0,
    log_srr_every=0, validate_every=1, seed=0, amp="auto",
    # What the paper leaves open, as in the released CRATE: step size and lambda of ISTA, the softmax's temperature.
    ista_beta=0.1, ista_lambda=0.1, temperature="sqrt-p",
)  # fmt: skip

PRESETS = {
    # Section 6: CRATE-Tiny on CIFAR-10 with the paper's augmentation.
    "paper": dict(augment="basic", log_srr_every=20, validate_every=10),
    # The shipped 8x8 digits, and a model that trains in seconds on one CPU core.
    "laptop": dict(dataset="digits", patch_size=2, width=48, depth=4, epochs=30, lr=2e-3, batch_size=32,
                   log_srr_every=10, validate_every=10),
    # CIFAR-10 on two CPU cores: nearly all models of all types reach a training loss of 0.01 within 200 epochs.
    "cifar": dict(train_subset=2000, patch_size=8, width=96, depth=6, epochs=100, lr=2e-3, batch_size=64,
                  log_srr_every=20, validate_every=20),
}  # fmt: skip

# The flags that take several values: a sweep is their Cartesian product.
AXES = "width depth batch_size lr dropout weight_decay model srr_reg srr_layer seed".split()
# The other settings are in a run's name where they are not the preset's, behind these words.
WORDS = {
    "dataset": "", "train_subset": "n", "hold_out": "hold", "augment": "augment-", "image_size": "size", "patch_size": "patch",
    "heads": "K", "epochs": "e", "schedule": "", "clip_norm": "clip", "stop_at_loss": "stop", "srr_lambda": "lambda",
    "srr_gamma": "gamma", "ista_beta": "beta", "ista_lambda": "threshold", "temperature": "temperature-",
    "log_srr_every": "log", "validate_every": "val", "amp": "amp-",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
MODEL_SETTINGS = "image_size patch_size channels classes width depth heads dropout temperature ista_beta ista_lambda".split()


def resolve_device(name):
    """The torch.device for --device; "auto" is CUDA where torch can use it. Raises InputError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: can't be used here ({str(error).splitlines()[0]}); use --device cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def settings(sweep, draw=None):
    """The combinations of a sweep, {axis: values}, as dicts; with `draw`, that many random ones for each model type instead,
    each with all the seeds.

    Random ones take lr (evenly on a logarithmic scale), dropout and weight decay between the smallest and the largest value
    given, and any of the values of the other axes. The seed "own" is one that no other setting has.
    """
    if draw is None:
        chosen = [dict(zip(sweep, values)) for values in itertools.product(*sweep.values())]
    else:
        chosen = []
        for model, i in itertools.product(sweep["model"], range(draw)):
            random = np.random.default_rng([i, *model.encode()])
            one = {axis: values[random.integers(len(values))] for axis, values in (sweep | {"seed": [None]}).items()}
            for axis, scale, back in (("dropout", float, float), ("weight_decay", float, float), ("lr", math.log, math.exp)):
                low, high = min(sweep[axis]), max(sweep[axis])
                value = back(random.uniform(scale(low), scale(high)))
                one[axis] = float(f"{value:.3g}") if low < high else low
            chosen += [one | {"model": model, "seed": seed} for seed in sweep["seed"]]
    for one in chosen:
        if not one["srr_reg"]:  # then the run is the same whatever its other SRR flags say
            one["srr_layer"] = DEFAULTS["srr_layer"]
        if one["seed"] == "own":
            one["seed"] = int(hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()[:8], 16)
    return chosen


def resolve(flags, *, preset, device, amp, data_dir, draw=None, **others):
    """The configs of all runs that the flags ask for, {name: config}, in every detail. Raises InputError where they don't fit.

    flags: {key of DEFAULTS: value or, for AXES, list of values}, what was given; others: stored as they are.
    """
    usual = DEFAULTS | PRESETS[preset]
    base = {"preset": preset, **usual, **flags, "device": str(device), "data_dir": str(data_dir), **others}
    unusual = {key: base[key] for key in WORDS if base[key] != usual[key]}
    data = data_of(base)
    base |= {"amp": amp, "image_size": data.image_size, "channels": data.train_images.shape[1], "classes": data.classes}
    base |= {"data": data.checksum, "code": code_checksum(), "commit": commit()}
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = dict(python=platform.python_version(), torch=str(torch.__version__), processor=processor, cores=os.cpu_count())
    base |= {"versions": versions, "command": shlex.join(["python", "train.py", *sys.argv[1:]])}
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
        except (ValueError, RuntimeError, TypeError) as error:  # the last two of a size that overflows
            raise InputError(f"{one_line(error)}; see --width, --heads, --image-size, --patch-size, --depth")
        name = run_name(config, unusual)
        if configs.setdefault(name, config) != config:
            raise InputError(f"{name}: two runs of the sweep have this name; their values are too close")
    return configs


def srr_layers(choice, depth, steps):
    """The 0-based layers that --srr-layer regularises in each of `steps` steps; "random" draws one for each."""
    if choice == "random":
        return [(layer,) for layer in torch.randint(depth, (steps,)).tolist()]
    if choice == "all":
        return [tuple(range(depth))] * steps
    number = depth if choice == "last" else int(choice) if str(choice).isdecimal() else 0
    if not 1 <= number <= depth:
        raise InputError(f"--srr-layer {choice}: must be last, all, random or a layer from 1 to {depth}")
    return [(number - 1,)] * steps


def run_name(config, unusual):
    """The run folder's name: the settings that can take several values, then what else is not as in the preset."""
    name = "{model}_d{width}_L{depth}_b{batch_size}_lr{lr:g}_p{dropout:g}"
    if config["weight_decay"]:
        name += "_wd{weight_decay:g}"
    if config["srr_reg"]:
        name += "_eta{srr_reg:g}_{srr_layer}_{srr_norm}"
    name = name.format(**config)
    for key, value in unusual.items():
        text = f"{value:g}" if isinstance(value, float) else re.sub(r"[^\w.-]+", "-", Path(str(value)).name)[:40]
        name += f"_{WORDS[key]}{text}"
    return f"{name}_s{config['seed']}"


def make_folders(configs, out, again):
    """Make the folder of each run, {name: config}, below `out`, and its config.json.

    Raises InputError where a folder holds another run, be it that its images have changed, which `again` allows.
    """
    for name, config in configs.items():
        file = out / name / "config.json"
        if file.exists():
            check_same_run(read_json(file), config | ({"data": None} if again else {}), file)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, config)


@lru_cache(1)
def code_checksum():
    """Of crate/*.py and train.py: the code that makes a run."""
    files = [*sorted(ROOT.glob("crate/*.py")), ROOT / "train.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def made_by(folder, config, again):
    """The config with the checksums of all code that made what `folder` holds; that is removed first if `again` is true and
    other code or other images made it.
    """
    file = folder / "config.json"
    there = read_json(file) if file.exists() else config
    if again and any(there.get(key) != config[key] for key in ("code", "data")):
        for name in ("result.json", "last.pt"):
            (folder / name).unlink(missing_ok=True)
    elif (folder / "last.pt").exists():
        made = dict.fromkeys([*str(there.get("code")).split(), config["code"]])
        config = config | {"code": " ".join(made)}
    return config


def say_other_code(what, files, cure):
    """One line where other code than this wrote some of the files, {name: config.json or measures.json}."""
    others = []
    for name, file in files.items():
        with suppress(OSError, InputError):
            if read_json(file).get("code") != code_checksum():
                others.append(name)
    if others:
        print(f"{what} by other code: {len(others)} of {len(files)}, such as {others[0]}; {cure}", flush=True)


def commit():
    """The commit of the checkout whose top is this folder, with -dirty where files differ from it; else None."""
    git = ["git", "-C", ROOT, "--git-dir=.git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def model_of(config):
    """The model that a config describes, newly initialised."""
    return build_model(config["model"], **{key: config[key] for key in MODEL_SETTINGS})


def check_same_run(there, now, where):
    """Raise InputError where two configs are of different runs: a setting or the images; `where` says where the first is from.

    Where the images lie, and what made the run, is free to change.
    """
    for key in [*DEFAULTS, "processes"]:
        if key != "dataset" and there.get(key) != now.get(key):
            raise InputError(f"{where}: another run, {key} is {there.get(key)} there but {now.get(key)} now; change --out")
    check_images(there.get("data"), now.get("data"), where)


def save_checkpoint(path, content):
    """Write `content`, a dict of tensors and plain types, to `path`."""
    torch.save(content, buffer := io.BytesIO())
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path):
    """The dict in a checkpoint, on the CPU. Raises InputError where the file is no checkpoint, or cut off."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the unpickler makes of arbitrary bytes
        raise InputError(f"{path}: damaged, or not a checkpoint of tensors and plain types alone ({type(error).__name__})")
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return content


def load_weights(model, path, config):
    """Load a run's checkpoint into `model` and return all that it holds. Raises InputError where it is another run's."""
    content = load_checkpoint(path)
    check_same_run(content.get("config", {}), config, path)
    model.load_state_dict(content["model"])
    return content


def read_run(folder):
    """config.json and result.json of a finished run."""
    return read_json(Path(folder) / "config.json"), read_json(Path(folder) / "result.json")


def read_log(folder):
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text("utf-8").splitlines()]


def load_run(folder, device="cpu"):
    """Config, result, trained model and model at initialisation (both in eval mode) of a finished run."""
    config, result = read_run(folder)
    trained, initial = model_of(config), model_of(config)
    load_weights(trained, Path(folder) / "last.pt", config)
    load_weights(initial, Path(folder) / "init.pt", config)
    return config, result, trained.to(device).eval(), initial.to(device).eval()


class Busy(InputError):
    """Another process works on the folder."""


def locked(folder):
    """A file that holds `folder` for this process until it is closed, or the process ends, however it does: a POSIX lock.
    Raises Busy where another one has it, on this machine or on one that shares the file system.
    """
    stream = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        raise Busy(f"{folder}: another process works on it ({stream.read().strip()})")
    stream.truncate(0)
    stream.write(f"host {platform.node()}, process {os.getpid()}\n")
    stream.flush()
    return stream


def lock_holder(folder):
    """Who holds `folder` ("host .., process .."), or None."""
    with suppress(FileNotFoundError), open(folder / ".lock") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip()


def find_runs(folders):
    """All run folders at or below `folders`, links included, each once, in order. Raises InputError where one holds none."""
    found = {}
    for folder in folders:
        below, seen = [], set()
        for path, inside, files in os.walk(folder.resolve(), followlinks=True):
            if (real := os.path.realpath(path)) in seen:  # a link to what has been seen, or to a folder above
                inside.clear()
            elif "config.json" in files:
                below.append((Path(path), real))
            seen.add(real)
        if not below:
            raise InputError(f"{folder}: no such folder, or no run in it; name one that train.py made, or one above it")
        for path, real in sorted(below):
            found.setdefault(real, path)
    return list(found.values())


def status(folder):
    """A run's state and what there is to say of it: ("finished" | "running" | "failed" | "unfinished" | "waiting", str)."""
    failure = folder / "error.txt"
    try:
        if (folder / "result.json").exists():
            _, result = read_run(folder)
            return "finished", "{epochs} epochs, val accuracy {val_accuracy:.2%}, {seconds:.0f} s".format(**result)
        rows = read_log(folder) if (folder / "log.jsonl").exists() else []
        progress = f"{rows[-1]['epoch'] if rows else 0} of {read_json(folder / 'config.json')['epochs']} epochs"
        if holder := lock_holder(folder):
            return "running", f"{progress}; {holder}"
        if failure.exists():
            return "failed", f"{progress}; {failure.read_text('utf-8', 'surrogateescape').strip()}"
        return ("unfinished", progress) if rows else ("waiting", "nobody has started it")
    except (ValueError, KeyError, OSError) as error:
        return "failed", one_line(error, folder)
