"""Complexity measures of trained models (Section 5), a row per run in one table.

    python measure.py runs/laptop/grid --out measures.csv           every finished run below the folder
    python measure.py runs/laptop/grid --groups norms srr           cheap measures alone
    python measure.py checkpoint.pth --heads 6 --dataset cifar10    a released CRATE checkpoint; one with another data
                                                                    set's classes: --groups norms srr

A run's measures are kept in its folder, in measures.json, and made again where its checkpoint or --images changed. The table is
put together from these files and replaces what lay at --out; measures stand right of the gaps, all else left of them. Beside
it: measures_layers.csv, SRR's parts per layer, and measures_val_losses.npz, the loss of each validation image. The same
command, started again here or on another machine that shares the file system, helps.
"""

import hashlib
import io
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from crate.cli import COPY, InputError, Parser, copies, number, one_line, path, run
from crate.data import DATASETS, data_of, load_data
from crate.files import load_checkpoint, read_json, write_bytes, write_json
from crate.measures import GROUPS, doubtful, measure
from crate.released import MEAN, STD, from_released_crate, sizes
from crate.runs import Busy, find_runs, load_run, locked, read_run, resolve_device
from crate.training import evaluate_both

# The columns left of the measures.
SETTINGS = ("model", "dataset", "train_subset", "width", "depth", "heads", "batch_size", "lr", "dropout",
            "weight_decay", "srr_reg", "srr_layer", "seed")  # fmt: skip
RESULTS = ("reached_target", "steps", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
DETAILS = ("margin", "sigma", "sigma_drop", "sigma_mag", "sigma_mag_drop", "alpha", "alpha_drop", "flags")
COLUMNS = ("run", *SETTINGS, *RESULTS, *DETAILS, "gap", "gap_accuracy")


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    runs = "run folder, folder above some, or released CRATE checkpoint"
    add("runs", nargs="+", type=path, metavar="RUN_OR_FOLDER", help=runs)
    add("--out", type=path, default=Path("measures.csv"), metavar="TABLE.csv", help="(default: measures.csv)")
    groups = f"some of {' '.join(GROUPS)} (default: all)"
    add("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS), metavar="GROUP", help=groups)
    images = "training images for pac-bayes and sharpness, the same for all models (default: 10000 on CUDA, 250 on a CPU)"
    add("--images", type=number(int, 1), metavar="N", help=images)
    add("--jobs", type=number(int, 1), default=1, help="processes that share the work (default: 1)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where present)")
    add("--data-dir", type=path, help="where data sets are (default: as the run says; of a released checkpoint, data)")
    add("--heads", type=number(int, 1), metavar="K", help="of a released checkpoint (default: none)")
    add("--dataset", metavar="D", help=f"for a released checkpoint: {', '.join(DATASETS)} or a folder (default: none)")
    return parser.parse_args()


def find_models(arguments):
    """Finished run folders, checkpoint files, and {path: name} of both, below their common parent. Raises InputError."""
    files = list(dict.fromkeys(one.resolve() for one in arguments.runs if one.is_file()))
    folders = find_runs([one for one in arguments.runs if not one.is_file()])
    parent = os.path.commonpath([one.parent for one in folders + files])
    names = {one: str(one.relative_to(parent)) for one in folders + files}
    # A run of no epoch is finished, but has no checkpoint.
    finished = [folder for folder in folders if (folder / "result.json").exists() and list(folder.glob("*.pt"))]
    others = [names[folder] for folder in folders if folder not in finished]
    if others:
        print(f"{len(others)} runs that are unfinished or of no epoch are left out: {', '.join(others)}")
    if not finished + files:
        raise InputError("no finished run: train.py ends a run with result.json")
    if files and None in (arguments.heads, arguments.dataset):
        raise InputError(f"{files[0]}: a released CRATE checkpoint needs --heads and --dataset")
    return finished, files, names


def checksum(file):
    """The first 16 digits of the SHA-256 of a file; None where it isn't there."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.exists() else None


def measured(folder, groups, images):
    """What measures.json holds, or None where it lacks a group, is damaged, or is of another checkpoint or --images."""
    with suppress(InputError, KeyError):
        saved = read_json(folder / "measures.json")
        current = (saved["checksum"], saved["images"]) == (checksum(folder / "last.pt"), images)
        if current and set(groups) <= set(saved["groups"]):
            return saved
    return None


def measure_run(folder, groups, images, device, data_dir):
    """Measure a run and write measures.json, unless it is there. Returns what is said of it, or None.

    Raises Busy where another process has the folder; InputError, OSError or ValueError where a file is missing or malformed.
    """
    with locked(folder):
        saved = measured(folder, (), images) or {"groups": [], "measures": {}, "details": {}, "layers": [], "failed": {}}
        missing = [group for group in groups if group not in saved["groups"]]
        if not missing:  # another process was faster
            return None
        began, (config, _, model, initial) = time.perf_counter(), load_run(folder, device)
        new = measure(model, initial, data_of(config, data_dir, device), missing, images)
        merged = {"checksum": checksum(folder / "last.pt"), "images": images, "groups": saved["groups"] + missing}
        merged |= {key: saved[key] | new[key] for key in ("measures", "details", "failed")}
        write_json(folder / "measures.json", merged | {"layers": new["layers"] or saved["layers"]})
        return describe(new, began)


def describe(new, began):
    """What is said of a model that has been measured: seconds, and what is doubtful."""
    text, flags = f"{time.perf_counter() - began:.1f} s", doubtful(new["measures"], new["details"])
    if flags:
        text += f", doubtful: {' '.join(flags)}"
    return text + "".join(f"; {group} can't be computed: {why}" for group, why in new["failed"].items())


def measure_released(file, arguments, images, device):
    """The config, result, measures and validation losses of a released CRATE checkpoint.

    Raises InputError where it isn't one, or doesn't fit the data set.
    """
    content = load_checkpoint(file)
    try:
        model = from_released_crate(content, arguments.heads).to(device).eval()
    except ValueError as error:
        raise InputError(f"{file}: {error} (with --heads {arguments.heads})")
    size, channels, classes = sizes(model)
    data = load_data(arguments.dataset, arguments.data_dir or Path("data"), image_size=size, device=device)
    if channels == 3:
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
        data = replace(data, mean=mean, std=std)
    result, losses = {}, None
    if (channels, classes) == (data.train_images.shape[1], data.classes):
        result, losses = evaluate_both(model, data)
    else:
        possible = ["norms", "srr"] if channels == data.train_images.shape[1] else ["norms"]
        if not set(arguments.groups) <= set(possible):
            theirs = f"{channels} channels and {classes} classes"
            ours = f"{arguments.dataset} {data.train_images.shape[1]} and {data.classes}"
            raise InputError(f"{file}: has {theirs}, {ours}; choose another --dataset, or --groups {' '.join(possible)}")
        data = replace(data, train_labels=None)
    config = {"model": "crate", "dataset": arguments.dataset, "heads": model.heads}
    config |= {"width": model.pos_embedding.shape[-1], "depth": len(model.layers)}
    return config, result, measure(model, None, data, arguments.groups, images), losses


def entry(name, config, result, new, losses):
    """What a model adds to the tables: its row, its layers' rows, the losses (n,) of its validation images, or None."""
    values = config | result | new["details"] | {"run": name, "flags": " ".join(doubtful(new["measures"], new["details"]))}
    row = {column: values.get(column) for column in COLUMNS} | new["measures"] | {"baseline_steps": result.get("steps")}
    return row, [{"run": name, **layer} for layer in new["layers"]], losses


def write_tables(out, entries):
    """Replace the three files by what these entries hold; a file for which they hold nothing is removed."""
    rows, layers, losses = zip(*sorted(entries, key=lambda entry: entry[0]["run"]))
    archive = io.BytesIO()
    if len({np.shape(of_model) for of_model in losses}) == 1 and losses[0] is not None:
        np.savez_compressed(archive, run=np.array([row["run"] for row in rows]), losses=np.stack(losses))
    tables = {"_layers.csv": csv_of(sum(layers, [])), "_val_losses.npz": archive.getvalue(), out.suffix: csv_of(rows)}
    for ending, content in tables.items():
        file = out.with_name(out.stem + ending)
        if content:
            write_bytes(file, content)
        else:
            file.unlink(missing_ok=True)


def csv_of(rows):
    return pd.DataFrame(rows, dtype=object).to_csv(index=False).encode() if rows else b""


def measure_all(folders, names, measure_one):
    """Measure the runs that nobody else works on: {folder: error} of those where it failed."""
    failures = {}
    for folder in tqdm(folders, desc="models", unit="model", leave=False, disable=COPY or len(folders) < 2):
        try:
            if text := measure_one(folder):
                tqdm.write(f"{names[folder]}: {text}")
        except Busy:
            continue
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            failures[folder] = error
    return failures


def collect(finished, files, names, arguments, images, device):
    """What stands in the runs' folders, and measures of the checkpoint files: entries, and {path: error} where it failed."""
    entries, failures = [], {}
    for one in finished + files:
        try:
            if one in finished:
                new, losses = measured(one, arguments.groups, images), one / "val_losses.npy"
                if new:
                    losses = np.load(losses) if losses.exists() else None
                    entries.append(entry(names[one], *read_run(one), new, losses))
            else:
                began, (config, result, new, losses) = time.perf_counter(), measure_released(one, arguments, images, device)
                tqdm.write(f"{names[one]}: {describe(new, began)}")
                entries.append(entry(names[one], config, result, new, losses))
        except (ValueError, EOFError, RuntimeError, OSError) as error:
            failures[one] = error
    return entries, failures


def main():
    arguments = parse_arguments()
    finished, files, names = find_models(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.is_dir():
        raise InputError(f"--out {arguments.out}: is a folder; name a file")
    device = resolve_device(arguments.device)
    images = arguments.images or (10_000 if device.type == "cuda" else 250)
    groups = [group for group in GROUPS if group in arguments.groups]
    todo = [folder for folder in finished if not measured(folder, groups, images)]
    counts = f"{len(finished + files)} models, {len(finished + files) - len(todo)} measured already"
    if not COPY:
        print(f"{counts}; on {device}, searches on {images} images", flush=True)
    jobs, gpus = min(arguments.jobs, len(todo) or 1), torch.cuda.device_count() if device == torch.device("cuda") else 0
    with copies(jobs, gpus) as codes:
        failures = measure_all(todo, names, lambda folder: measure_run(folder, groups, images, device, arguments.data_dir))
    if not COPY:
        entries, more = collect(finished, files, names, arguments, images, device)
        failures |= more
        if entries:
            write_tables(arguments.out, entries)
        elsewhere = len(finished + files) - len(entries) - len(failures)
        print(f"{arguments.out}: {len(entries)} models" + (f", {elsewhere} left to other processes" if elsewhere else ""))
    for where, error in failures.items():
        print(f"measure.py: error: {one_line(error, where)}", file=sys.stderr)
    return max([2 if failures else 0, *codes])


if __name__ == "__main__":
    run(main)
