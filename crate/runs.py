"""Run folders: what their configs and names are, what makes two runs the same, what state each is in.

A folder holds config.json, init.pt, log.jsonl (a row per epoch; train_loss is the mean over its steps), last.pt, .lock (its
holder, while it runs), error.txt (the last failure, until the run is started again) and result.json, written last: without it
a run is unfinished. torch is loaded by `resolve` alone: `train.py --status` answers at once.
"""

import hashlib
import itertools
import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from crate.cli import InputError, one_line
from crate.config import DATASETS, DEFAULTS, PRESETS
from crate.files import lock_holder, read_json

# The flags whose values a sweep is the Cartesian product of. --srr-sparsity has one value, but another one where eta is 0.
AXES = "width batch_size lr dropout weight_decay depth model srr_reg srr_layer srr_sparsity seed".split()
# What may differ between a run and its resumption.
FREE_TO_CHANGE = {"device", "data_dir", "save_every", "versions", "commit", "command", "sweep"}


def resolve(arguments):
    """The preset's name and the configs of all runs, {name: config}, in every detail that config.json shows.

    `arguments` are train.py's. Raises InputError where they don't fit each other or this machine.
    """
    import torch

    from crate.distributed import WORLD
    from crate.model import model_from_config
    from crate.provenance import provenance
    from crate.training import resolve_amp, resolve_device

    preset, device = arguments.preset, resolve_device(arguments.device)
    if preset == "auto":
        preset = "paper" if torch.cuda.is_available() else "laptop"
    flags = {key: value for key, value in vars(arguments).items() if key in DEFAULTS and value is not None}
    base = {"preset": preset, **DEFAULTS, **PRESETS[preset], **flags}
    base |= {"data_dir": arguments.data_dir, "device": str(device), "amp": resolve_amp(arguments.amp, device)}
    base |= {"compile": arguments.compile, "save_every": arguments.save_every, "processes": WORLD, **provenance()}
    base["command"] = shlex.join(["python", "train.py", *sys.argv[1:]])
    native_size, base["channels"], base["classes"] = DATASETS[base["dataset"]]
    base["image_size"] = base["image_size"] or native_size

    sweep = {axis: base[axis] if isinstance(base[axis], list) else [base[axis]] for axis in AXES}
    least = min(sweep["depth"])
    for layer in sweep["srr_layer"]:
        if layer not in ("last", "all", "random") and not (layer.isdecimal() and 1 <= int(layer) <= least):
            raise InputError(f"--srr-layer {layer}: must be last, all, random or a layer from 1 to {least}")
    configs = expand(base, sweep)
    for name, config in configs.items():
        try:
            with torch.device("meta"):
                config["parameters"] = sum(p.numel() for p in model_from_config(config).parameters())
        except (RuntimeError, TypeError):  # a size that overflows
            raise InputError(f"{name}: no tensor can be as large as this model's; choose smaller sizes")
    return preset, configs


def run_name(config):
    """The run folder's name: the flags that may take several values, and those in which run_all.sh's runs differ."""
    name = "{model}_d{width}_L{depth}_b{batch_size}_lr{lr:g}_p{dropout:g}"
    name += "_wd{weight_decay:g}" * bool(config["weight_decay"])
    name += "_hold{hold_out:g}" * bool(config["hold_out"])
    if config["srr_reg"]:
        name += "_eta{srr_reg:g}_{srr_layer}" + "_l1" * (config["srr_sparsity"] == "l1")
    name += "_s{seed}" + "_stop{stop_at_loss:g}" * bool(config["stop_at_loss"])
    return name.format(**config)


def expand(base, sweep):
    """The configs of a sweep, {name: config}. sweep: the values of each of AXES, where missing that of `base`, as all else."""
    configs = {}
    for combination in itertools.product(*(sweep.get(axis, [base[axis]]) for axis in AXES)):
        config = base | dict(zip(AXES, combination)) | {"sweep": sweep}
        if not config["srr_reg"]:  # the run is the same whatever its SRR flags say
            config |= {"srr_layer": DEFAULTS["srr_layer"], "srr_sparsity": DEFAULTS["srr_sparsity"]}
        if configs.setdefault(run_name(config), config) != config:
            raise InputError(f"{run_name(config)}: two runs of the sweep have this name; their values are too close")
    return configs


def identity(config):
    """The part of a config that the run's result depends on."""
    return {key: value for key, value in config.items() if key not in FREE_TO_CHANGE}


def first_difference(a, b):
    """(key, a's value, b's value) of the first setting in which two configs differ, or None where they are of one run."""
    a, b = identity(a), identity(b)
    return next(((key, a.get(key), b.get(key)) for key in sorted(a | b) if a.get(key) != b.get(key)), None)


def config_sha256(config):
    """What result.json repeats of the config that the run was trained with."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def finished_run(folder):
    """config.json and result.json. Raises InputError where either is missing or malformed, or the config was changed."""
    config, result = (read_json(Path(folder) / name) for name in ("config.json", "result.json"))
    if result.get("config_sha256", config_sha256(config)) != config_sha256(config):
        raise InputError(f"{folder}/config.json: not what this run was trained with; restore it, or delete the folder")
    return config, result


def check_config(config, folder):
    """Raise InputError where `folder` holds a run with other settings than `config`."""
    path = Path(folder) / "config.json"
    if path.exists() and (difference := first_difference(read_json(path), config)):
        key, there, now = difference
        flag = "--nproc-per-node" if key == "processes" else "--" + key.replace("_", "-")
        raise InputError(f"{path}: {key} is {there} there but {now} now; match {flag} or change --out")


def state(folder):
    """A run's state, and what there is to say of it: ("finished" | "running" | "failed" | "unfinished", str)."""
    try:
        if (folder / "result.json").exists():
            _, result = finished_run(folder)
            return "finished", "{epochs} epochs, val accuracy {val_accuracy:.2%}, {seconds:.0f} s".format(**result)
        log, failure = folder / "log.jsonl", folder / "error.txt"
        rows = log.read_text().count("\n") if log.exists() else 0  # the first is that of epoch 0
        progress = f"{max(rows - 1, 0)} of {read_json(folder / 'config.json')['epochs']} epochs"
        if holder := lock_holder(folder):
            return "running", f"{progress}; {holder}"
        return ("failed", f"{progress}; {failure.read_text().strip()}") if failure.exists() else ("unfinished", progress)
    except (ValueError, TypeError, KeyError, OSError) as error:
        return "failed", one_line(error)


def status(out):
    """[(run, state, remark)] of all runs in the folder `out`, those of its sweeps that nobody has started yet among them."""
    folders = {path.parent.name: path.parent for path in Path(out).glob("*/config.json")}
    names, seen = set(folders), set()
    for folder in folders.values():
        with suppress(ValueError, TypeError, KeyError, AttributeError):  # a broken config; `state` says so
            config = read_json(folder / "config.json")
            rest = {key: value for key, value in identity(config).items() if key not in (*AXES, "parameters")}
            sweep = json.dumps([rest, config["sweep"]], sort_keys=True)
            if sweep not in seen:
                seen.add(sweep)
                names |= expand(config, config["sweep"]).keys()
    return [(name, *state(folders[name])) if name in folders else (name, "missing", "") for name in sorted(names)]
