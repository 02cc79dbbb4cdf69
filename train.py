"""Train CRATE models, one or a whole grid, with or without SRR in the loss.

    python train.py --model crate-c --srr-reg 0.1             one model, Eq. 14 on the last layer
    python train.py --model crate-c crate-n --seed 0 1 2      six models: the Cartesian product
    python train.py --stop-at-loss 0.01 --schedule constant   stop as Section 5 does
    python train.py --status runs                             what is finished, running, unfinished, failed, waiting

    torchrun --nproc-per-node 2 train.py --model crate-c      each model on two GPUs

Every run has its own folder below --out. Finished runs are skipped, those that another process works on too, and unfinished
ones go on after their last saved epoch: the same command, started again here or on another machine that shares the file
system, helps.
"""

import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from crate import runs
from crate.cli import InputError, Parser, in_processes, number, one_line, path, run
from crate.data import DATASETS, dataset
from crate.model import VARIANTS
from crate.training import rank_and_world, train


def parse_arguments():
    parser = Parser(__doc__)
    rows = [f"  {name:8}" + ", ".join(f"{key} {value}" for key, value in runs.PRESETS[name].items()) for name in runs.PRESETS]
    models = [f"  {name:16}{variant.description}" for name, variant in VARIANTS.items()]
    parser.epilog = "\n".join(["models:", *models, "", "presets, which change these defaults:", *rows])
    count, positive = number(int, 0), number(int, 1, below=10**18)
    not_negative, above_0, share = number(float, 0), number(float, above=0), number(float, 0, below=1)

    def seed(text):
        return text if text == "own" else count(text)

    def add(group, flag, help="", **options):
        key = flag.removeprefix("--").replace("-", "_")
        if key in runs.AXES:
            options |= {"nargs": "+", "metavar": options.get("metavar", "VALUE")}
            help += ", one or more"
        if key in runs.DEFAULTS:
            help += f" (default: {'none' if runs.DEFAULTS[key] is None else runs.DEFAULTS[key]})"
        group.add_argument(flag, help=help.lstrip(" ,"), **options)

    model, training, srr, command = map(parser.add_argument_group, ("data and model", "training", "SRR", "runs"))
    folder = "or a folder of images: FOLDER/train/CLASS/*, FOLDER/test/CLASS/*"
    add(model, "--dataset", f"{', '.join(DATASETS)}, {folder}", type=dataset, metavar="D")
    add(model, "--data-dir", "where data sets are, or are downloaded to (default: data)", type=path, default=Path("data"))
    add(model, "--train-subset", "train on a fixed random choice of N training images", type=positive, metavar="N")
    add(model, "--hold-out", "validate on this share of the training images instead", type=share, metavar="SHARE")
    add(model, "--augment", "basic: random resized crop, flip, RandAugment(2, 14)", choices=("none", "basic"))
    add(model, "--image-size", "resize images to this; none: the data set's own size", type=positive)
    add(model, "--model", "those below", choices=tuple(VARIANTS), metavar="MODEL")
    add(model, "--patch-size", type=positive)
    add(model, "--width", "d", type=positive)
    add(model, "--depth", "L", type=positive)
    add(model, "--heads", "K", type=positive)
    add(model, "--dropout", type=share)
    add(model, "--ista-beta", "step size of ISTA, Eq. 3", type=above_0)
    add(model, "--ista-lambda", "lambda of ISTA's threshold, Eq. 3", type=not_negative)
    add(model, "--temperature", "of the softmax", choices=("sqrt-p", "none"))

    add(training, "--epochs", "with --stop-at-loss: at most so many; 0: log the model at initialisation alone", type=count)
    add(training, "--batch-size", type=positive)
    add(training, "--lr", "Adam's (initial) learning rate", type=above_0)
    add(training, "--schedule", choices=("cosine", "constant"))
    add(training, "--weight-decay", "decoupled, on matrices (AdamW)", type=not_negative)
    add(training, "--clip-norm", "clip the gradient's norm to this", type=above_0)
    add(training, "--stop-at-loss", "stop once cross-entropy over the training set is below this (paper: 0.01)", type=above_0)
    add(training, "--validate-every", "and after the last epoch", type=positive, metavar="EPOCHS")
    add(training, "--seed", "own: one that no other setting has", type=seed)

    add(srr, "--srr-reg", "eta of Eq. 14; 0: cross-entropy alone", type=number(float))
    add(srr, "--srr-layer", "whose SRR is in the loss: last, all, random (one per step) or 1..L", metavar="LAYER")
    add(srr, "--srr-norm", "||Z||_0, which has no gradient, or its convex surrogate", choices=("l0", "l1"))
    add(srr, "--srr-lambda", "lambda of SRR, in the loss and in the log", type=not_negative)
    gamma = "gamma of R^c, K gamma is R's, in the loss and in the log; the layers' own step keeps 1"
    add(srr, "--srr-gamma", gamma, type=above_0)
    add(srr, "--log-srr-every", "log layer-wise SRR of 512 images; 0: never", type=count, metavar="EPOCHS")

    presets = ("auto", *runs.PRESETS)
    add(command, "--preset", "auto: paper on a GPU, else laptop (default: auto)", choices=presets, default="auto")
    add(command, "--out", "folder of the run folders (default: runs/PRESET/single)", type=path)
    add(command, "--again", "train anew what other code than this, or other images, made", action="store_true")
    draw = "N random settings for each model, each with all seeds: lr, dropout, weight decay between the values given"
    add(command, "--draw", draw, type=positive, metavar="N")
    add(command, "--jobs", "processes that share the work (default: 1)", type=positive, default=1)
    add(command, "--device", "cpu, cuda, cuda:1 ... (default: cuda where present)", default="auto")
    amp = ("auto", "off", "bf16", "fp16")
    add(command, "--amp", "auto: bf16 on CUDA, off on CPU", choices=amp)
    add(command, "--no-graph", "on CUDA, launch each kernel of a step, not one CUDA graph", action="store_false", dest="graph")
    saving = "save after an epoch if the last time is so long ago (default: 60 on CUDA, 10 on a CPU)"
    add(command, "--save-every", saving, type=not_negative, metavar="SECONDS")
    add(command, "--status", "print the state of every run in FOLDER, and train nothing", type=path, metavar="FOLDER")
    return parser.parse_args()


def print_status(folder):
    found = [(str(path.relative_to(folder.resolve())), *runs.status(path)) for path in runs.find_runs([folder])]
    width, counts = max(len(name) for name, *_ in found), Counter(word for _, word, _ in found)
    for name, word, remark in found:
        print(f"{name:{width}}  {word:10}  {remark}")
    print(f"{len(found)} runs: " + ", ".join(f"{n} {word}" for word, n in sorted(counts.items())))


def describe(folder, config, result, choice):
    """The line that a finished run ends with. choice: of whose SRR it says how it changed, as in --srr-layer."""
    line = "{epochs} epochs, train loss {train_loss:.4f}, val loss {val_loss:.4f}, val accuracy {val_accuracy:.2%}"
    line = f"{folder.name}: {line}, {{seconds:.0f}} s".format(**result)
    (layers,), log = runs.srr_layers(choice if choice != "random" else "all", config["depth"], 1), runs.read_log(folder)
    if log[0].get("srr") and log[-1].get("srr"):
        start, end = (sum(row["srr"][l]["srr"] for l in layers) / len(layers) for row in (log[0], log[-1]))
        whose = f"layer {layers[0] + 1}" if len(layers) == 1 else "all layers, mean"
        line += f"; SRR of training images ({whose}): {start:.1f} at the start, {end:.1f} at the end"
    return line


def train_all(job, configs, out, again, show_progress, gpus):
    """Train the runs that nobody else works on, the largest first; job k on GPU k. Returns the exit code."""
    code, rank = 0, rank_and_world()[0]
    choice = next((config["srr_layer"] for config in configs.values() if config["srr_reg"]), "last")
    device = runs.resolve_device(f"cuda:{job % gpus}") if gpus else None
    names = sorted(configs, key=lambda name: -configs[name]["parameters"] / configs[name]["batch_size"])
    for name in tqdm(names, desc="runs", unit="run", disable=job > 0 or rank > 0 or len(names) == 1 or None):
        finished = (out / name / "result.json").exists() and not again
        config = configs[name] | ({"device": str(device)} if gpus else {})
        try:
            result = train(config, out / name, show_progress and rank == 0, again)
            if rank == 0 and (not finished or len(names) == 1):
                tqdm.write(describe(out / name, config, result, config["srr_layer"] if config["srr_reg"] else choice))
        except (ValueError, RuntimeError, OSError) as error:
            if dist.is_initialized():  # the other ranks would wait for this one
                raise InputError(one_line(error, out / name))
            if not isinstance(error, runs.Busy):
                code = 2
                tqdm.write(f"train.py: error: {one_line(error, out / name)}", file=sys.stderr)
            elif len(names) == 1:
                tqdm.write(f"{error}; left to it")
    return code


def main():
    arguments = vars(parse_arguments())
    if arguments["status"]:
        return print_status(arguments["status"])
    jobs, device = arguments["jobs"], arguments["device"]
    if dist.is_torchelastic_launched():
        if jobs > 1:
            raise InputError("--jobs: torchrun runs one model at a time on all its processes; leave --jobs out")
        if device == "auto" and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    device, preset, amp = runs.resolve_device(device), arguments["preset"], arguments["amp"] or "auto"
    rank, world = rank_and_world()
    if preset == "auto":
        preset = "paper" if device.type == "cuda" else "laptop"
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    if arguments["save_every"] is None:
        arguments["save_every"] = 60.0 if device.type == "cuda" else 10.0
    flags = {key: value for key, value in arguments.items() if key in runs.DEFAULTS and value is not None}
    others = {key: arguments[key] for key in ("data_dir", "draw", "graph", "save_every")}
    configs = runs.resolve(flags, preset=preset, device=device, amp=amp, processes=world, **others)
    out = arguments["out"] or Path("runs") / preset / "single"
    again = arguments["again"]
    runs.make_folders(configs, out, again)
    if rank == 0:
        dataset, done = next(iter(configs.values()))["dataset"], sum((out / name / "result.json").exists() for name in configs)
        counted = f"{len(configs)} runs" if len(configs) > 1 else "1 run"
        print(f"preset {preset}: {dataset}, on {device}; {counted} in {out}, {done} finished", flush=True)
        begun = {name: out / name / "config.json" for name in configs if (out / name / "log.jsonl").exists()}
        runs.say_other_code("made", begun, "trained anew now" if again else "--again trains them anew")
    gpus = torch.cuda.device_count() if device == torch.device("cuda") else 0
    code = in_processes(jobs, train_all, configs, out, again, jobs == 1, gpus)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run(main)
