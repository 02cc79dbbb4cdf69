"""Complexity measures of trained models (Section 5), a row per run in one table.

    python measure.py runs/laptop                                   every finished run below the folder
    python measure.py runs/laptop/*_p0_* --out some.csv --jobs 2    these runs, two at a time
    python measure.py runs/laptop --groups norms srr                cheap measures alone
    python measure.py checkpoint.pth --heads 6 --dataset cifar10    a released CRATE checkpoint

A run's measures are kept in its folder, in measures.json, and computed again only where its checkpoint or --images changed. The
table is put together from these files and replaces what lay at --out; measures stand right of the gaps, all else left of them.
Beside it: measures_layers.csv, SRR's parts per layer, and measures_val_losses.npz, the loss of each validation image. The same
command, started again here or on another machine that shares the file system, helps.
"""

import functools
import hashlib
import io
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from crate.cli import InputError, Parser, copies, number, one_line, output_folder, path, run, threads_of
from crate.data import DATASETS, data_of, load_data
from crate.files import load_checkpoint, read_json, write_bytes, write_json
from crate.measures import GROUPS, doubtful, measure
from crate.released import MEAN, STD, from_released_crate, sizes
from crate.runs import Busy, find_runs, load_run, locked, read_run, resolve_device
from crate.training import evaluate

# The columns left of the measures.
SETTINGS = ("model", "dataset", "train_subset", "width", "depth", "heads", "batch_size", "lr", "dropout",
            "weight_decay", "srr_reg", "srr_layer", "seed")  # fmt: skip
RESULTS = ("reached_target", "steps", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
DETAILS = ("margin", "sigma", "sigma_drop", "sigma_mag", "sigma_mag_drop", "alpha", "alpha_drop", "flags")
COLUMNS = ("run", *SETTINGS, *RESULTS, "checksum", "images", *DETAILS, "gap", "gap_accuracy")

SEARCHES = {"pac-bayes", "sharpness"}  # the groups that depend on --images
# What measures.json holds: of which checkpoint, --images and groups, then what crate.measures.measure returned.
NOTHING = {"checksum": None, "images": None, "groups": [], "measures": {}, "details": {}, "layers": [], "failed": {}}


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
    add("--redo", action="store_true", help="measure again what is measured (default: off)")
    helper = "help another process, which writes the table and says what is wrong (default: off)"
    add("--no-table", action="store_true", help=helper)
    add("--heads", type=number(int, 1), metavar="K", help="of a released checkpoint (default: none)")
    add("--dataset", metavar="D", help=f"for a released checkpoint: {', '.join(DATASETS)} or a folder (default: none)")
    return parser.parse_args()


def find_models(arguments):
    """Finished run folders, checkpoint files, and {path: name} of both. Raises InputError where there are none.

    A name is the last part of a path, or, where several have the same, all that is below the common parent.
    """
    files = list(dict.fromkeys(Path(os.path.abspath(one)) for one in arguments.runs if one.is_file()))
    folders = find_runs([one for one in arguments.runs if not one.is_file()])
    counts = Counter(one.name for one in folders + files)
    parent = os.path.commonpath([one.parent for one in folders + files])
    names = {one: one.name if counts[one.name] == 1 else str(one.relative_to(parent)) for one in folders + files}
    finished = [folder for folder in folders if (folder / "result.json").exists()]
    unfinished = [names[folder] for folder in folders if folder not in finished]
    if unfinished and not arguments.no_table:
        print(f"{len(unfinished)} unfinished runs are left out: {', '.join(unfinished)}")
    if not finished + files:
        raise InputError("no finished run: train.py ends a run with result.json")
    if files and None in (arguments.heads, arguments.dataset):
        raise InputError(f"{files[0]}: a released CRATE checkpoint needs --heads and --dataset")
    return finished, files, names


def check_data(folders, data_dir, device):
    """Load each data set of these runs, so that one that isn't there is told once, before the work. Raises InputError."""
    configs = {}
    for folder in folders:
        with suppress(InputError, OSError, KeyError):  # told when its turn comes
            config, _ = read_run(folder)
            configs[config["dataset"], config["data_dir"], config["image_size"]] = config
    for config in configs.values():
        data_of(config, data_dir, device)


# A run's measures


@functools.cache
def _digest(file, size, modified):
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def checksum(file):
    """The first 16 digits of the SHA-256 of a file; None where it can't be read."""
    try:
        return _digest(file, file.stat().st_size, file.stat().st_mtime_ns)
    except OSError:
        return None


def read_measures(folder):
    """What measures.json holds; NOTHING where it is missing or damaged: it can be made again."""
    with suppress(InputError):
        saved = read_json(folder / "measures.json")
        if saved.keys() == NOTHING.keys():
            return saved
    return NOTHING


def due(folder, groups, images):
    """The groups to measure: those asked for that are not there, and those there that are of another checkpoint or --images."""
    saved = read_measures(folder)
    missing, outdated = set(groups).difference(saved["groups"]), set()
    if saved["checksum"] != checksum(folder / "last.pt"):
        outdated = set(saved["groups"])
    elif saved["images"] != images:
        outdated = SEARCHES.intersection(saved["groups"])
    return [group for group in GROUPS if group in missing | outdated]


def measure_run(folder, groups, images, device, data_dir):
    """Measure what is due in a run folder and write it to measures.json. Returns what there is to say of it, or None.

    Raises Busy where another process has the folder; InputError, OSError or ValueError where a file is missing or malformed.
    """
    with locked(folder):
        began, groups, saved = time.perf_counter(), due(folder, groups, images), read_measures(folder)
        if not groups:  # another process was faster
            return None
        config, _, model, initial = load_run(folder, device)
        new = measure(model, initial, data_of(config, data_dir, device), groups, images)
        digest = checksum(folder / "last.pt")
        if saved["checksum"] != digest:
            saved = NOTHING
        merged = {"checksum": digest, "images": images, "groups": [*saved["groups"], *groups]}
        merged |= {key: saved[key] | new[key] for key in ("measures", "details")}
        merged["layers"] = new["layers"] or saved["layers"]
        merged["failed"] = {group: why for group, why in saved["failed"].items() if group not in groups} | new["failed"]
        write_json(folder / "measures.json", merged)
        return describe(new, began)


def describe(measured, began):
    """What is said of a model that has been measured: seconds, and what is doubtful."""
    text, flags = f"{time.perf_counter() - began:.1f} s", doubtful(measured["measures"], measured["details"])
    if flags:
        text += f", doubtful: {' '.join(flags)}"
    return text + "".join(f"; {group} can't be computed: {why}" for group, why in measured["failed"].items())


def measure_runs(folders, names, arguments, images, device, failures):
    """Measure runs one after the other. Returns those that another process works on; adds to failures, {path: error}."""
    busy = []
    for folder in tqdm(folders, desc="models", unit="model", leave=False, disable=len(folders) < 2):
        try:
            text = measure_run(folder, arguments.groups, images, device, arguments.data_dir)
            if text:
                tqdm.write(f"{names[folder]}: {text}")
        except Busy:
            busy.append(folder)
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            failures[folder] = error
    return busy


# A released checkpoint: its measures exist in the table alone


def evaluate_both(model, data):
    """What result.json says of a run's losses and accuracies, and the loss of each validation image, (n,) float32."""
    train_losses, train_accuracy = evaluate(model, data, data.train_images, data.train_labels)
    val_losses, val_accuracy = evaluate(model, data, data.val_images, data.val_labels)
    train_loss, val_loss = train_losses.mean().item(), val_losses.mean().item()
    result = {"train_loss": train_loss, "train_accuracy": train_accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy}
    result |= {"gap": val_loss - train_loss, "gap_accuracy": train_accuracy - val_accuracy}
    return result, val_losses.float().cpu().numpy()


def measure_released(file, name, arguments, images, device):
    """A released CRATE checkpoint's entry. Raises InputError or ValueError where it isn't one, or doesn't fit the data set."""
    began, content = time.perf_counter(), load_checkpoint(file)
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
    measured = measure(model, None, data, [group for group in GROUPS if group in arguments.groups], images)
    tqdm.write(f"{name}: {describe(measured, began)}")
    config = {"model": "crate", "dataset": arguments.dataset, "heads": model.heads}
    config |= {"width": model.pos_embedding.shape[-1], "depth": len(model.layers)}
    return entry(name, config, result, measured | {"checksum": checksum(file), "images": images}, losses)


def measure_files(files, names, arguments, images, device, failures):
    """Measure released checkpoints one after the other. Returns their entries; adds to failures, {path: error}."""
    entries = []
    for file in files:
        try:
            entries.append(measure_released(file, names[file], arguments, images, device))
        except (ValueError, RuntimeError, OSError) as error:
            failures[file] = error
    return entries


# The tables


def entry(name, config, result, measured, losses):
    """What a model adds to the tables: its row, its layers' rows, the losses (n,) of its validation images, or None."""
    values = config | result | measured["details"] | {key: measured[key] for key in ("checksum", "images")}
    values |= {"run": name, "flags": " ".join(doubtful(measured["measures"], measured["details"]))}
    row = {column: values.get(column) for column in COLUMNS} | measured["measures"] | {"baseline_steps": result.get("steps")}
    return row, [{"run": name, **layer} for layer in measured["layers"]], losses


def entries_of_runs(folders, names, images, failures):
    """The entries of the runs that are measured; adds to failures, {path: error}."""
    entries = []
    for folder in folders:
        try:
            measured, losses = read_measures(folder), None
            if measured["groups"] and not due(folder, (), images):
                with suppress(FileNotFoundError):
                    losses = np.load(folder / "val_losses.npy")
                entries.append(entry(names[folder], *read_run(folder), measured, losses))
        except (ValueError, EOFError, OSError) as error:
            failures[folder] = error
    return entries


def write_tables(out, entries):
    """Replace the three files by what these entries hold; a file for which they hold nothing is removed."""
    rows, layers, losses = zip(*sorted(entries, key=lambda entry: entry[0]["run"]))
    shapes, archive = {np.shape(of_model) for of_model in losses}, io.BytesIO()
    if len(shapes) == 1 and losses[0] is not None:
        np.savez(archive, run=np.array([row["run"] for row in rows]), losses=np.stack(losses))
    contents = {"_layers.csv": csv_of(sum(layers, [])), "_val_losses.npz": archive.getvalue(), out.suffix: csv_of(rows)}
    for ending, content in contents.items():
        file = out.with_name(out.stem + ending)
        if content:
            write_bytes(file, content)
        else:
            file.unlink(missing_ok=True)


def csv_of(rows):
    return pd.DataFrame(rows, dtype=object).to_csv(index=False).encode() if rows else b""


def main():
    arguments = parse_arguments()
    finished, files, names = find_models(arguments)
    output_folder(arguments.out.parent)
    if arguments.out.is_dir():
        raise InputError(f"--out {arguments.out}: is a folder; name a file")
    device = resolve_device(arguments.device)
    images = arguments.images or (10_000 if device.type == "cuda" else 250)
    if arguments.redo and not arguments.no_table:
        for folder in finished:
            if (folder / "measures.json").exists():
                write_json(folder / "measures.json", read_measures(folder) | {"checksum": "outdated"})
    todo, failures = [folder for folder in finished if due(folder, arguments.groups, images)], {}
    jobs = min(arguments.jobs, len(todo) or 1)
    if not arguments.no_table:
        check_data(todo, arguments.data_dir, device)
        counts = f"{len(finished + files)} models, {len(finished) - len(todo)} measured already"
        print(f"{counts}; on {device}, searches on {images} images", flush=True)
        sys.argv.append("--no-table")  # for the copies
    with copies(jobs, torch.cuda.device_count() if device == torch.device("cuda") else 0):
        torch.set_num_threads(threads_of(jobs))
        busy = measure_runs(todo, names, arguments, images, device, failures)
        if arguments.no_table:
            return 2 if failures else 0
        released = measure_files(files, names, arguments, images, device, failures)
    busy = measure_runs(busy, names, arguments, images, device, failures)  # what a process that was stopped has left
    if busy:
        print(f"{len(busy)} runs are left to another process: {', '.join(names[folder] for folder in busy)}")
    entries, written = released + entries_of_runs(finished, names, images, failures), None
    while entries and repr(entries) != repr(written):  # again where another process has measured a run meanwhile
        write_tables(arguments.out, entries)
        entries, written = released + entries_of_runs(finished, names, images, failures), entries
    for where, error in failures.items():
        print(f"measure.py: error: {one_line(error, where)}", file=sys.stderr)
    print(f"{arguments.out}: {len(entries)} of {len(finished + files)} models")
    return 2 if failures else 0


if __name__ == "__main__":
    run(main)
