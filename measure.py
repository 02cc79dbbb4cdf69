"""Complexity measures of trained models (Section 5), a row per run in one table.

    python measure.py runs/laptop --out measures.csv           every finished run in the folder
    python measure.py runs/laptop/*_stop0.01 --jobs 2          these runs, two at a time
    python measure.py runs/laptop --groups norms srr           cheap measures only
    python measure.py checkpoint.pth --heads 6 --dataset cifar10    a released CRATE checkpoint

SRR's parts per layer go to a second table beside the first, measures_layers.csv. Both are written after every model, and what
they hold already is skipped unless its checkpoint or --images changed. Measures stand right of the gaps, all else left of them.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

from crate.cli import InputError, Parser, number, one_line, output_folder, run
from crate.config import DATASETS
from crate.files import read_csv, read_json, write_csv
from crate.parallel import gpus_of, parallel

# What can be asked for, and a measure that the group always has.
GROUPS = {
    "norms": "l2", "path-norm": "path_norm", "pac-bayes": "pacbayes_flatness", "sharpness": "sharpness_flatness", "srr": "srr",
}  # fmt: skip
IMAGES_HELP = "training images for PAC-Bayes and sharpness, the same for all models (default: 10000 on CUDA, 250 on CPU)"


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN_OR_FOLDER", help="run folder, folder of run folders, or released CRATE checkpoint")
    add("--out", default="measures.csv", metavar="TABLE.csv", help="default: measures.csv")
    add("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS), help="default: all; norms are always there")
    add("--images", type=number(int, 1, 10_000), metavar="N", help=IMAGES_HELP)
    add("--jobs", type=number(int, 1), default=1, help="runs at the same time, each a process of one thread (default: 1)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where present)")
    add("--data-dir", help="where data sets are (default: as the run says)")
    add("--only", action="store_true", help="drop the rows of other runs than these from the table")
    add("--redo", action="store_true", help="measure again what the table holds already")
    add("--heads", type=number(int, 1), metavar="K", help="of a released checkpoint")
    add("--dataset", choices=tuple(DATASETS), help="of a released checkpoint")
    return parser.parse_args()


def find_runs(paths):
    """The finished runs and checkpoints at `paths`, {name: path}, and the names of unfinished runs."""
    found, unfinished = {}, []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path}: no such folder")
        if path.is_file() or (path / "config.json").exists() or (path / "result.json").exists():
            runs = [path]
        else:
            runs = sorted({file.parent for name in ("config", "result") for file in path.glob(f"*/{name}.json")})
        if not runs:
            raise InputError(f"{path}: holds no run; name a folder that train.py made, or the folder above it")
        for one in runs:
            if one.is_dir() and not (one / "result.json").exists():
                unfinished.append(one.name)
            elif found.setdefault(one.name, one).resolve() != one.resolve():
                raise InputError(f"{one}: there is also {found[one.name]}; measure runs of one name into two tables")
    return found, unfinished


def read_table(path, columns):
    """The rows that a table holds already, {run: [row, ...]}; none where there is no table."""
    table = {}
    for row in read_csv(path) if path.exists() else ():
        if not columns <= row.keys():
            raise InputError(f"{path}: not a table that measure.py made; name another --out")
        table.setdefault(row["run"], []).append(row)
    return table


def check_data(paths, data_dir, released):
    """Load every data set once, so that a missing one is reported at once and downloads don't collide."""
    from crate.data import load_data

    wanted = {(released, data_dir or "data") for path in paths if released and path.is_file()}
    for path in paths:
        with suppress(InputError, OSError, KeyError):  # reported when its turn comes
            config = read_json(path / "config.json")
            wanted.add((config["dataset"], data_dir or config["data_dir"]))
    for dataset, folder in wanted:
        load_data(dataset, folder)


def measure_one(path, options):
    """A run's row, its layers' rows, seconds and error message: a broken run doesn't end the others."""
    import torch

    from crate.measures import measure_run

    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        row, layers = measure_run(path, **options)
    except (ValueError, RuntimeError, OSError) as error:
        return None, [], 0, one_line(error, path)
    return row, layers, time.perf_counter() - began, None


def main():
    arguments = parse_arguments()
    found, unfinished = find_runs(arguments.runs)
    if unfinished:
        print(f"{len(unfinished)} unfinished runs are left out: {', '.join(unfinished)}")
    if not found:
        raise InputError("no finished run: train.py ends a run with result.json")
    out = Path(arguments.out)
    layers_out = out.with_name(f"{out.stem}_layers.csv")
    rows = {name: same[-1] for name, same in read_table(out, {"run", "checksum", "images", "gap"}).items()}
    layers = read_table(layers_out, {"run", "layer"})
    if arguments.only:
        rows, layers = ({name: table[name] for name in table if name in found} for table in (rows, layers))
    output_folder(out.parent)

    import torch
    from tqdm import tqdm

    from crate.measures import COLUMNS, checksum
    from crate.training import resolve_device

    device = str(resolve_device(arguments.device))
    images = arguments.images or (10_000 if device.startswith("cuda") else 250)

    def is_done(name, path):
        try:
            known = (rows[name]["checksum"], rows[name]["images"]) == (checksum(path), str(images))
            return known and all(rows[name].get(GROUPS[group]) for group in arguments.groups)
        except (KeyError, OSError):
            return False  # a file that can't be read is reported when its turn comes

    pending = {name: path for name, path in found.items() if arguments.redo or not is_done(name, path)}
    check_data(pending.values(), arguments.data_dir, arguments.dataset)
    print(f"{len(found)} runs, {len(found) - len(pending)} measured already; on {device}, searches on {images} images")
    options = {"images": images, "device": device} | {key: getattr(arguments, key) for key in ("data_dir", "heads", "dataset")}
    tasks = []
    for name, path in pending.items():  # a row is replaced as a whole: what it has stays in it
        groups = [group for group in GROUPS if group in arguments.groups or rows.get(name, {}).get(GROUPS[group])]
        tasks.append((path, options | {"groups": groups}))

    def write():
        of_layers = [line for name in sorted(layers) for line in layers[name]]
        of_runs = [dict.fromkeys(COLUMNS, "") | rows[name] for name in sorted(rows)]
        for path, table in ((layers_out, of_layers), (out, of_runs)):
            write_csv(path, table) if table else path.unlink(missing_ok=True)

    if arguments.only:  # what was dropped goes even if nothing is to be measured
        write()
    jobs, gpus = min(arguments.jobs, len(tasks) or 1), gpus_of(device, torch.cuda.device_count())
    failures = 0
    with tqdm(total=len(pending), desc="models", unit="model") as bar:
        for row, parts, seconds, error in parallel(measure_one, tasks, jobs, gpus):
            bar.update()
            if error:
                failures += 1
                tqdm.write(f"measure.py: error: {error}", file=sys.stderr)
                continue
            rows[row["run"]], layers[row["run"]] = row, parts
            write()
            tqdm.write(f"{row['run']}: {seconds:.1f} s" + (f", doubtful: {row['flags']}" if row["flags"] else ""))
    return 2 if failures else 0


if __name__ == "__main__":
    run(main)
