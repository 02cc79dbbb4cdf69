"""Train CRATE models, one or a whole grid, with or without SRR in the loss.

    python train.py --model crate-c --srr-reg 0.1             one model, Eq. 14 on the last layer
    python train.py --model crate-c crate-n --seed 0 1 2      six models: the Cartesian product
    python train.py --stop-at-loss 0.01 --schedule constant   stop as Section 5 does

Every run has its own folder below --out. Finished runs are skipped, unfinished ones go on after their last epoch.
"""

import itertools
import shlex
import sys
from pathlib import Path

from crate.cli import InputError, Parser, cores, number, output_folder, run
from crate.config import DATASETS, DEFAULTS, PRESETS, VARIANT_TABLE
from crate.parallel import gpus_of, parallel


def parse_arguments():
    parser = Parser(__doc__)
    positive, rate = number(int, 1), number(float, above=0)
    several = dict(nargs="+", metavar="VALUE")
    add = parser.add_argument
    add(
        "--preset",
        choices=("auto", *PRESETS),
        default="auto",
        help="settings that the other flags override (auto: paper on CUDA, else laptop)",
    )
    add("--model", nargs="+", choices=tuple(VARIANT_TABLE), help="one or more")
    add("--dataset", choices=tuple(DATASETS))
    add("--data-dir", default="data", help="where data sets are looked for and downloaded to (default: data)")
    add("--train-subset", type=positive, metavar="N", help="train on a fixed random choice of N training images")
    add(
        "--hold-out",
        type=number(float, 0, below=1),
        metavar="SHARE",
        help="validate on this share of the training images, to choose hyperparameters by",
    )
    add("--augment", choices=("none", "basic"), help="basic: random resized crop, horizontal flip, RandAugment(2, 14)")
    add("--image-size", type=positive, help="resize images to this (default: the data set's own)")
    add("--patch-size", type=positive)
    add("--width", type=positive, help="d, one or more", **several)
    add("--depth", type=positive, help="L, one or more", **several)
    add("--heads", type=positive, help="K")
    add("--dropout", type=number(float, 0, below=1), help="one or more", **several)
    add("--epochs", type=positive, help="with --stop-at-loss: at most so many")
    add("--batch-size", type=positive, help="one or more", **several)
    add("--lr", type=rate, help="Adam's (initial) learning rate, one or more", **several)
    add("--schedule", choices=("cosine", "constant"))
    add("--weight-decay", type=number(float, 0), help="decoupled, on matrices (AdamW), one or more", **several)
    add("--clip-norm", type=rate, help="clip the gradient's norm to this")
    add("--stop-at-loss", type=rate, help="stop once cross-entropy over the training set is below this (the paper: 0.01)")
    add("--srr-reg", type=number(float, 0), help="eta of Eq. 14, one or more; 0: cross-entropy alone", **several)
    add("--srr-layer", help="whose SRR: last, all, random (one per step) or 1..L; one or more", **several)
    add("--srr-sparsity", choices=("l0", "l1"), help="||Z||_0, which has no gradient, or its convex surrogate")
    add("--srr-lambda", type=number(float, 0), help="lambda of SRR, in the loss and in the log (default: 0.1)")
    add("--srr-gamma", type=rate, help="gamma of R^c, K gamma is R's, in the loss and in the log (default: 1)")
    add("--ista-beta", type=rate, help="step size of ISTA, Eq. 3 (default: 0.1)")
    add("--ista-lambda", type=number(float, 0), help="lambda of ISTA's threshold, Eq. 3 (default: 0.1)")
    add("--temperature", choices=("sqrt-p", "none"), help="of the trained models' softmax (default: sqrt-p, as released)")
    add("--log-srr-every", type=number(int, 0), metavar="EPOCHS", help="log layer-wise SRR; 0: never")
    add("--seed", type=number(int, 0), help="one or more", **several)
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where present)")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA, off on CPU")
    add("--compile", action="store_true", help="torch.compile each layer")
    add("--out", help="folder of the run folders (default: runs/PRESET)")
    add("--shard", default="1/1", metavar="i/n", help="run only every n-th run, starting with the i-th")
    add("--jobs", type=positive, default=1, help="runs at the same time, each in its own process (default: 1)")
    return parser.parse_args()


def run_name(config):
    """The run folder's name: every flag that may take several values."""
    name = "{model}_d{width}_L{depth}_b{batch_size}_lr{lr:g}_p{dropout:g}".format(**config)
    name += (f"_wd{config['weight_decay']:g}" if config["weight_decay"] else "") + (
        f"_hold{config['hold_out']:g}" if config["hold_out"] else ""
    )
    if config["srr_reg"]:
        name += "_eta{srr_reg:g}_{srr_layer}".format(**config) + "_l1" * (config["srr_sparsity"] == "l1")
    return name + f"_s{config['seed']}" + (f"_stop{config['stop_at_loss']:g}" if config["stop_at_loss"] else "")


def resolve(arguments, torch):
    """The preset's name and the configs of all runs, {name: config}, in every detail that config.json shows."""
    from crate.model import model_from_config
    from crate.provenance import provenance
    from crate.training import resolve_amp, resolve_device

    preset = arguments.preset
    if preset == "auto":
        preset = "paper" if torch.cuda.is_available() else "laptop"
    device = resolve_device(arguments.device)
    flags = {key: value for key, value in vars(arguments).items() if key in DEFAULTS and value is not None}
    base = {"preset": preset, **DEFAULTS, **PRESETS[preset], **flags}
    base |= {"data_dir": arguments.data_dir, "device": str(device), "amp": resolve_amp(arguments.amp, device)}
    base |= {"compile": arguments.compile, **provenance()}
    base["command"] = shlex.join(["python", "train.py", *sys.argv[1:]])
    native_size, base["channels"], base["classes"] = DATASETS[base["dataset"]]
    base["image_size"] = base["image_size"] or native_size

    axes = ("width", "batch_size", "lr", "dropout", "weight_decay", "depth", "model", "srr_reg", "srr_layer", "seed")
    values = [base[axis] if isinstance(base[axis], list) else [base[axis]] for axis in axes]
    configs = {}
    for combination in itertools.product(*values):
        config = base | dict(zip(axes, combination))
        layer, depth = config["srr_layer"], config["depth"]
        if layer not in ("last", "all", "random") and not (layer.isdecimal() and 1 <= int(layer) <= depth):
            raise InputError(f"--srr-layer {layer}: must be last, all, random or a layer from 1 to {depth}")
        with torch.device("meta"):
            config["parameters"] = sum(p.numel() for p in model_from_config(config).parameters())
        if not config["srr_reg"]:  # the run is the same whatever its SRR flags say
            config |= {"srr_layer": DEFAULTS["srr_layer"], "srr_sparsity": DEFAULTS["srr_sparsity"]}
        configs[run_name(config)] = config
    return preset, configs


def train_one(config, folder, threads, show_progress):
    """Train one run: its folder's name, its result and None, or None and an error, so that the other runs go on."""
    import torch

    from crate.training import train

    torch.set_num_threads(threads)
    try:
        return folder.name, train(config, folder, show_progress), None
    except InputError as error:
        return folder.name, None, str(error)
    except (ValueError, RuntimeError, OSError) as error:
        return folder.name, None, f"{folder}: {' '.join(str(error).split())}"


def main():
    arguments = parse_arguments()
    try:
        shard, shards = map(int, arguments.shard.split("/"))
        if not 1 <= shard <= shards:
            raise ValueError
    except ValueError:
        raise InputError(f"--shard {arguments.shard}: must be i/n with 1 <= i <= n, such as 2/8")

    import torch
    from tqdm import tqdm

    from crate.data import data_of
    from crate.training import check_config

    preset, configs = resolve(arguments, torch)
    out = output_folder(arguments.out or Path("runs") / preset)
    configs = dict(list(configs.items())[shard - 1 :: shards])
    if not configs:
        raise InputError(f"--shard {arguments.shard}: there are fewer runs than shards")
    for name, config in configs.items():
        check_config(config, out / name)
    pending = {name: config for name, config in configs.items() if not (out / name / "result.json").exists()}
    first = next(iter(configs.values()))
    print(
        f"preset {preset}: {first['dataset']}, K = {first['heads']}, on {first['device']}; "
        f"{len(configs)} runs in {out}, {len(configs) - len(pending)} finished"
    )
    if pending:  # once for all: a missing data set is reported at once, and downloads don't collide
        data_of(first)
    jobs = min(arguments.jobs, max(len(pending), 1))
    threads = max(1, cores() // jobs)
    # The largest models first: a long run that starts last would leave the other processes idle.
    order = sorted(pending, key=lambda name: -pending[name]["parameters"] / pending[name]["batch_size"])
    tasks = [(pending[name], out / name, threads, jobs == 1) for name in order]
    failures = 0
    with tqdm(
        total=len(configs), initial=len(configs) - len(pending), desc="runs", unit="run", disable=len(configs) == 1
    ) as bar:
        for name, result, error in parallel(train_one, tasks, jobs, gpus_of(first["device"], torch.cuda.device_count())):
            if error:
                failures += 1
                tqdm.write(f"train.py: error: {error}", file=sys.stderr)
            else:
                tqdm.write(
                    f"{name}: {result['epochs']} epochs, train loss {result['train_loss']:.4f}, val loss "
                    f"{result['val_loss']:.4f}, val accuracy {100 * result['val_accuracy']:.2f} %, {result['seconds']:.0f} s"
                )
            bar.update()
    return 2 if failures else 0


if __name__ == "__main__":
    run(main)
