"""Complexity measures of trained models (Section 5), a row per run in one table.

    python measure.py runs/laptop/grid --out measures.csv           every finished run below the folder
    python measure.py runs/laptop/grid --groups norms srr           cheap measures alone
    python measure.py checkpoint.pth --heads 6 --dataset cifar10    a released CRATE checkpoint; one with another data
                                                                    set's classes: --groups norms srr

A run's measures are kept in its folder, in measures.json, and made again where its checkpoint or --images changed; where other
code made them, one line says so, and --again makes them again. The table is put together from these files and replaces what lay
at --out; measures stand right of the gaps, all else left of them. Beside it: measures_layers.csv, SRR's parts per layer.
"""

import hashlib
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from crate.cli import InputError, Parser, in_processes, number, one_line, path, read_json, run, write_json, write_text
from crate.data import DATASETS, data_of, dataset, load_data
from crate.measures import GROUPS, doubtful, measure
from crate.released import MEAN, STD, from_released_crate, sizes
from crate.runs import code_checksum, find_runs, load_checkpoint, load_run, read_run, resolve_device, say_other_code
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
    data = f"{', '.join(DATASETS)} or a folder (default: as the run says; of a released checkpoint, none)"
    add("--dataset", metavar="D", type=dataset, help=data)
    add("--again", action="store_true", help="measure anew what other code than this measured")
    return parser.parse_args()


def measured(folder, arguments):
    """What measures.json holds, or no measure where it is missing, damaged, of another checkpoint or other --images."""
    key = {"checksum": hashlib.sha256((folder / "last.pt").read_bytes()).hexdigest()[:16], "images": arguments.images}
    code = {"code": code_checksum()}
    with suppress(InputError, FileNotFoundError):
        saved = read_json(folder / "measures.json")
        if (key | (code if arguments.again else {})).items() <= saved.items():
            return saved
    return key | code | {"groups": [], "measures": {}, "details": {}, "layers": [], "failed": {}}


def measure_run(folder, name, arguments, device):
    """Measure what measures.json lacks, and write it."""
    saved, began = measured(folder, arguments), time.perf_counter()
    missing = [group for group in arguments.groups if group not in saved["groups"]]
    config, _, model, initial = load_run(folder, device)
    config["dataset"] = arguments.dataset or config["dataset"]
    new = measure(model, initial, data_of(config, arguments.data_dir, device), missing, arguments.images)
    merged = {key: saved[key] | new[key] for key in ("measures", "details", "failed")}
    merged |= {"groups": saved["groups"] + missing, "layers": new["layers"] or saved["layers"]}
    write_json(folder / "measures.json", saved | merged)
    describe(name, new, began)


def describe(name, new, began):
    flags = " ".join(["", *doubtful(new["measures"], new["details"])])
    failed = "".join(f"; {group} can't be computed: {why}" for group, why in new["failed"].items())
    tqdm.write(f"{name}: {time.perf_counter() - began:.1f} s{', doubtful:' + flags if flags else ''}{failed}")


def measure_all(job, jobs, todo, arguments, device, gpus):
    """Measure every `jobs`-th of the runs `todo`, (folder, name); job k on GPU k. Returns the exit code."""
    code, device = 0, resolve_device(f"cuda:{job % gpus}") if gpus else device
    hidden = job > 0 or len(todo) < 2 or None  # None: off a terminal
    for folder, name in tqdm(todo[job::jobs], desc="models", unit="model", leave=False, disable=hidden):
        try:
            measure_run(folder, name, arguments, device)
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            code = 2
            tqdm.write(f"measure.py: error: {one_line(error, folder)}", file=sys.stderr)
    return code


def measure_released(file, arguments, device):
    """Config, result and measures of a released CRATE checkpoint. Raises ValueError where it isn't one, or doesn't fit."""
    if None in (arguments.heads, arguments.dataset):
        raise InputError(f"{file}: a released CRATE checkpoint needs --heads and --dataset")
    try:
        model = from_released_crate(load_checkpoint(file), arguments.heads).to(device).eval()
    except ValueError as error:
        raise InputError(f"{one_line(error, file)} (with --heads {arguments.heads})")
    size, channels, classes = sizes(model)
    data = load_data(arguments.dataset, arguments.data_dir or Path("data"), image_size=size, device=device)
    if channels == 3:
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
        data = replace(data, mean=mean, std=std)
    result, ours = {}, (data.train_images.shape[1], data.classes)
    if (channels, classes) == ours:
        result = evaluate_both(model, data)
    else:
        possible = ["norms", "srr"] if channels == ours[0] else ["norms"]
        if not set(arguments.groups) <= set(possible):
            theirs = f"has {channels} channels and {classes} classes, {arguments.dataset} {ours[0]} and {ours[1]}"
            raise InputError(f"{file}: {theirs}; choose another --dataset, or --groups {' '.join(possible)}")
        data = replace(data, train_labels=None)
    config = {"model": "crate", "dataset": arguments.dataset, "heads": model.heads}
    config |= {"width": model.pos_embedding.shape[-1], "depth": len(model.layers)}
    return config, result, measure(model, None, data, arguments.groups, arguments.images)


def write_tables(out, entries):
    """Replace both tables by what these models' (name, config, result, measures) hold; an empty one is removed."""
    rows, layers = [], []
    for name, config, result, new in entries:
        values = config | result | new["details"] | {"run": name, "flags": " ".join(doubtful(new["measures"], new["details"]))}
        rows.append({column: values.get(column) for column in COLUMNS} | new["measures"])
        rows[-1]["baseline_steps"] = result.get("steps")
        layers += [{"run": name, **layer} for layer in new["layers"]]
    for file, table in ((out, rows), (out.with_name(f"{out.stem}_layers.csv"), layers)):
        if table:
            write_text(file, pd.DataFrame(table, dtype=object).to_csv(index=False))
        else:
            file.unlink(missing_ok=True)


def main():
    arguments = parse_arguments()
    files = [one.resolve() for one in arguments.runs if one.is_file()]
    folders = find_runs([one for one in arguments.runs if not one.is_file()])
    parent = os.path.commonpath([one.parent for one in folders + files])
    names = {one: str(one.relative_to(parent)) for one in folders + files}
    # A run of no epoch is finished, but has no checkpoint.
    finished = [one for one in folders if (one / "result.json").exists() and (one / "last.pt").exists()]
    if others := [names[one] for one in folders if one not in finished]:
        print(f"{len(others)} runs that are unfinished or of no epoch are left out: {', '.join(others)}")
    if not finished + files:
        raise InputError("no finished run: train.py ends a run with result.json")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.is_dir():
        raise InputError(f"--out {arguments.out}: is a folder; name a file")
    device = resolve_device(arguments.device)
    arguments.images = arguments.images or (10_000 if device.type == "cuda" else 250)
    arguments.groups = [group for group in GROUPS if group in arguments.groups]

    def complete(folder):
        return set(arguments.groups) <= set(measured(folder, arguments)["groups"])

    done = [folder for folder in finished if complete(folder)]
    todo = [(folder, names[folder]) for folder in finished if folder not in done]
    counts = f"{len(finished + files)} models, {len(done)} measured already"
    print(f"{counts}; on {device}, searches on {arguments.images} images", flush=True)
    say_other_code("made", {names[one]: one / "config.json" for one in finished}, "train.py --again trains them anew")
    gpus = torch.cuda.device_count() if device == torch.device("cuda") else 0
    jobs = min(arguments.jobs, len(todo) or 1)
    code, entries = in_processes(jobs, measure_all, jobs, todo, arguments, device, gpus), []
    for one in sorted(finished + files, key=names.get):
        try:
            if one in files:
                began, entry = time.perf_counter(), measure_released(one, arguments, device)
                describe(names[one], entry[2], began)
                entries.append((names[one], *entry))
            elif complete(one):
                entries.append((names[one], *read_run(one), measured(one, arguments)))
        except (ValueError, RuntimeError, OSError) as error:
            code = 2
            print(f"measure.py: error: {one_line(error, one)}", file=sys.stderr)
    say_other_code("measured", {names[one]: one / "measures.json" for one in finished}, "--again measures them anew")
    if entries:
        write_tables(arguments.out, entries)
    print(f"{arguments.out}: {len(entries)} models")
    return code


if __name__ == "__main__":
    run(main)
