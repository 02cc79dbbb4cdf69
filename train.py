"""Train CRATE models, one or a whole grid, with or without SRR in the loss.

    python train.py --model crate-c --srr-reg 0.1             one model, Eq. 14 on the last layer
    python train.py --model crate-c crate-n --seed 0 1 2      six models: the Cartesian product
    python train.py --stop-at-loss 0.01 --schedule constant   stop as Section 5 does

    torchrun --nproc-per-node 2 train.py --model crate-c      each model on two processes or GPUs
    python train.py --status runs/laptop                      what is finished, running, failed, missing

Every run has its own folder below --out. Finished runs are skipped, unfinished ones go on after their last saved epoch or,
stopped by SIGINT or SIGTERM, after their last step.
"""

import sys
from collections import Counter
from pathlib import Path

from crate.cli import InputError, Parser, cores, number, one_line, output_folder, run
from crate.config import DATASETS, PRESETS, VARIANT_TABLE
from crate.parallel import gpus_of, parallel
from crate.runs import check_config, resolve, status


def make_parser():
    parser = Parser(__doc__)
    parser.epilog = "models:\n" + "\n".join(f"  {name:16}{description}" for name, (*_, description) in VARIANT_TABLE.items())
    add, several = parser.add_argument, dict(nargs="+", metavar="VALUE")
    count, positive = number(int, 0), number(int, 1, 10**18)
    share, not_negative, above_0 = number(float, 0, below=1), number(float, 0), number(float, above=0)
    # The defaults of what has none here are the preset's or those of crate/config.py.
    add("--preset", choices=("auto", *PRESETS), default="auto", help="the flags' defaults (auto: paper on CUDA, else laptop)")
    add("--model", nargs="+", choices=tuple(VARIANT_TABLE), metavar="MODEL", help="one or more of those below")
    add("--dataset", choices=tuple(DATASETS))
    add("--data-dir", default="data", help="where data sets are looked for and downloaded to (default: data)")
    add("--train-subset", type=positive, metavar="N", help="train on a fixed random choice of N training images")
    add("--hold-out", type=share, metavar="SHARE", help="validate on this share of the training images, to choose settings by")
    add("--augment", choices=("none", "basic"), help="basic: random resized crop, horizontal flip, RandAugment(2, 14)")
    add("--image-size", type=positive, help="resize images to this (default: the data set's own)")
    add("--patch-size", type=positive)
    add("--width", type=positive, help="d, one or more", **several)
    add("--depth", type=positive, help="L, one or more", **several)
    add("--heads", type=positive, help="K")
    add("--dropout", type=share, help="one or more", **several)
    add("--epochs", type=positive, help="with --stop-at-loss: at most so many")
    add("--batch-size", type=positive, help="one or more", **several)
    add("--lr", type=above_0, help="Adam's (initial) learning rate, one or more", **several)
    add("--schedule", choices=("cosine", "constant"))
    add("--weight-decay", type=not_negative, help="decoupled, on matrices (AdamW), one or more", **several)
    add("--clip-norm", type=above_0, help="clip the gradient's norm to this")
    add("--stop-at-loss", type=above_0, help="stop once cross-entropy over the training set is below this (the paper: 0.01)")
    add("--srr-reg", type=not_negative, help="eta of Eq. 14, one or more; 0: cross-entropy alone", **several)
    add("--srr-layer", help="whose SRR: last, all, random (one per step) or 1..L; one or more", **several)
    add("--srr-sparsity", choices=("l0", "l1"), help="||Z||_0, which has no gradient, or its convex surrogate")
    add("--srr-lambda", type=not_negative, help="lambda of SRR, in the loss and in the log (default: 0.1)")
    add("--srr-gamma", type=above_0, help="gamma of R^c, K gamma is R's, in the loss and in the log (default: 1)")
    add("--ista-beta", type=above_0, help="step size of ISTA, Eq. 3 (default: 0.1)")
    add("--ista-lambda", type=not_negative, help="lambda of ISTA's threshold, Eq. 3 (default: 0.1)")
    add("--temperature", choices=("sqrt-p", "none"), help="of the trained models' softmax (default: sqrt-p, as released)")
    add("--log-srr-every", type=count, metavar="EPOCHS", help="log layer-wise SRR of 512 images; 0: never")
    add("--seed", type=count, help="one or more", **several)
    saving = "save after an epoch if the last time is so long ago; 0: after each (default: 10)"
    add("--save-every", type=not_negative, default=10.0, metavar="SECONDS", help=saving)
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where present)")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA, off on CPU")
    add("--compile", action="store_true", help="torch.compile each layer")
    add("--out", help="folder of the run folders (default: runs/PRESET)")
    add("--shard", default="1/1", metavar="i/n", help="run only every n-th run, starting with the i-th")
    add("--jobs", type=positive, default=1, help="runs at the same time, each in its own process (default: 1)")
    add("--dry-run", action="store_true", help="list the runs and what they would take on an H100, and train nothing")
    add("--status", metavar="FOLDER", help="print the state of every run of the sweeps in FOLDER, and train nothing")
    return parser


def print_status(folder):
    """The table of --status, and one line that counts the states."""
    runs = status(folder)
    if not runs:
        what = "holds no run" if Path(folder).is_dir() else "no such folder"
        raise InputError(f"--status {folder}: {what}; name a folder that --out had")
    width = max(len(name) for name, _, _ in runs)
    for name, state, remark in runs:
        print(f"{name:{width}}  {state:10}  {remark}")
    counts = Counter(state for _, state, _ in runs)
    states = ("finished", "running", "unfinished", "failed", "missing")
    print(f"{len(runs)} runs: " + ", ".join(f"{counts[state]} {state}" for state in states))


def print_plan(configs):
    """The table of --dry-run."""
    from crate.estimate import estimate

    width, total = max(map(len, configs)), 0.0
    for name, config in configs.items():
        plan = estimate(config)
        total += plan["hours"]
        work = f"{plan['steps']:>9,} steps  {plan['flop']:.2e} FLOP  {plan['hours']:6.2f} h"
        print(f"{name:{width}}  {config['parameters']:>12,} parameters  {work}")
    most = "at most " * any(config["stop_at_loss"] is not None for config in configs.values())
    print(f"{len(configs)} runs, {most}{total:.1f} hours on an H100: an estimate")


def train_one(config, folder, threads, show_progress):
    """Train one run: its folder's name, its result and None, or None and an error, so that the other runs go on."""
    import torch

    from crate.training import train

    torch.set_num_threads(threads)
    try:
        return folder.name, train(config, folder, show_progress), None
    except (ValueError, RuntimeError, OSError) as error:
        return folder.name, None, one_line(error, folder)


def main():
    arguments = make_parser().parse_args()
    if arguments.status is not None:
        return print_status(arguments.status)
    try:
        shard, shards = map(int, arguments.shard.split("/"))
        if not 1 <= shard <= shards:
            raise ValueError
    except ValueError:
        raise InputError(f"--shard {arguments.shard}: must be i/n with 1 <= i <= n, such as 2/8")

    import torch
    from tqdm import tqdm

    from crate import distributed
    from crate.data import data_of
    from crate.distributed import RANK, WORLD

    if WORLD > 1 and arguments.jobs > 1:
        raise InputError("--jobs: torchrun runs one model at a time on all its processes; leave --jobs out")
    preset, configs = resolve(arguments)
    configs = dict(list(configs.items())[shard - 1 :: shards])
    if not configs:
        raise InputError(f"--shard {arguments.shard}: there are fewer runs than shards")
    if arguments.dry_run:
        return print_plan(configs) if RANK == 0 else None
    distributed.start()
    out = output_folder(arguments.out or Path("runs") / preset)
    for name, config in configs.items():
        check_config(config, out / name)
    finished = distributed.agree([name for name in configs if (out / name / "result.json").exists()])
    pending = [name for name in configs if name not in finished]
    first = next(iter(configs.values()))
    if RANK == 0:
        where = f"on {first['device']}" + f" and {WORLD - 1} other processes" * (WORLD > 1)
        runs = f"{len(configs)} run{'s' * (len(configs) > 1)} in {out}, {len(finished)} finished"
        print(f"preset {preset}: {first['dataset']}, K = {first['heads']}, {where}; {runs}")
        if pending:  # once for all: a missing data set is reported at once, and downloads don't collide
            data_of(first)
    distributed.agree(None)
    jobs = min(arguments.jobs, len(pending) or 1)
    # By all runs, not by those left: with another number of threads a resumed run would round otherwise.
    threads = max(1, cores() // (min(arguments.jobs, len(configs)) * distributed.LOCAL_WORLD))
    # The largest models first: a long run that starts last would leave the other processes idle.
    pending.sort(key=lambda name: -configs[name]["parameters"] / configs[name]["batch_size"])
    tasks = [(configs[name], out / name, threads, jobs == 1 and RANK == 0) for name in pending]
    gpus, failures = gpus_of(first["device"], torch.cuda.device_count()), 0
    with tqdm(total=len(configs), initial=len(finished), desc="runs", unit="run", disable=len(configs) == 1 or RANK > 0) as bar:
        for name, result, error in parallel(train_one, tasks, jobs, gpus):
            if error and WORLD > 1:  # the other processes may not have it, and would wait
                raise InputError(error)
            if error:
                failures += 1
                tqdm.write(f"train.py: error: {error}", file=sys.stderr)
            elif RANK == 0:
                line = name + ": {epochs} epochs, train loss {train_loss:.4f}, val loss {val_loss:.4f}, "
                line += "val accuracy {:.2f} %, {seconds:.0f} s"
                tqdm.write(line.format(100 * result["val_accuracy"], **result))
            bar.update()
    distributed.end()
    return 2 if failures else 0


if __name__ == "__main__":
    run(main)
