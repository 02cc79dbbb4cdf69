"""The README and the help texts say what the code does."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import train
from crate import data
from crate.config import DATASETS, VARIANT_TABLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def rows(heading):
    """The cells of the first table below a heading of the README."""
    table = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_equation_map():
    found = 0
    for paper, where, what in rows("Where to find what"):
        paths = re.findall(r"`([\w/]+\.py)`", where)
        assert paths, paper
        modules = [importlib.import_module(path.removesuffix(".py").replace("/", ".")) for path in paths]
        for name in re.findall(r"`([\w.]+)`", what):
            owners = [module for module in modules if hasattr(module, name.split(".")[0])]
            assert owners, f"{paper}: {name} is not in {where}"
            for part in name.split("."):
                owners = [getattr(owners[0], part)]
            found += 1
    assert found > 30
    for equation in range(1, 15):
        assert any(re.search(rf"Eqs?\. [\d, ]*\b{equation}\b", paper) for paper, _, _ in rows("Where to find what")), equation


def test_links_and_commands():
    for target in re.findall(r"\]\(((?!http)[^)#]+)(?:#L\d+)?\)", README):
        assert (ROOT / target).exists(), target
    flags = {flag for action in train.make_parser()._actions for flag in action.option_strings}
    for command in re.findall(r"train\.py ((?:[^`\n]|\\\n)*)", README):
        for flag in re.findall(r"(?<![\w-])--[a-z-]+", command):
            assert flag in flags, flag


def test_reading_order_points_at_what_it_names():
    steps = re.findall(r"^\d+\. .*\[`([\w.]+)`\]\((\S+)#L(\d+)\)", README.split("## Reading order")[1].split("\n## ")[0], re.M)
    assert len(steps) == 12
    for name, path, line in steps:
        text = (ROOT / path).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b|{name} = ", text), f"{name} is not at {path}:{line}"


# A value for every flag, other than the laptop preset's, and the key of config.json that it changes.
CHANGES = {
    "--preset": ("fashion", "preset"), "--model": ("vit", "model"), "--dataset": ("fashion-mnist", "dataset"),
    "--data-dir": ("elsewhere", "data_dir"), "--train-subset": ("99", "train_subset"), "--hold-out": ("0.3", "hold_out"),
    "--augment": ("basic", "augment"), "--image-size": ("16", "image_size"), "--patch-size": ("4", "patch_size"),
    "--width": ("96", "width"), "--depth": ("3", "depth"), "--heads": ("3", "heads"), "--dropout": ("0.3", "dropout"),
    "--epochs": ("9", "epochs"), "--batch-size": ("9", "batch_size"), "--lr": ("0.5", "lr"),
    "--schedule": ("constant", "schedule"), "--weight-decay": ("0.5", "weight_decay"), "--clip-norm": ("2", "clip_norm"),
    "--stop-at-loss": ("0.5", "stop_at_loss"), "--srr-reg": ("0.5", "srr_reg"), "--srr-layer": ("2", "srr_layer"),
    "--srr-sparsity": ("l1", "srr_sparsity"), "--srr-lambda": ("0.5", "srr_lambda"), "--srr-gamma": ("0.5", "srr_gamma"),
    "--ista-beta": ("0.5", "ista_beta"), "--ista-lambda": ("0.5", "ista_lambda"), "--temperature": ("none", "temperature"),
    "--log-srr-every": ("3", "log_srr_every"), "--seed": ("7", "seed"), "--device": ("cpu:0", "device"),
    "--amp": ("bf16", "amp"), "--compile": (None, "compile"), "--save-every": ("7", "save_every"),
}  # fmt: skip
# These say what is done with the runs; their own tests show it.
NOT_OF_A_RUN = {"--help", "--out", "--shard", "--jobs", "--dry-run", "--status"}


def resolved(*arguments):
    _, configs = train.resolve(train.make_parser().parse_args(["--preset", "laptop", "--srr-reg", "0.1", *arguments]))
    (config,) = configs.values()
    return config


def test_every_flag_changes_the_config():
    flags = {action.option_strings[-1] for action in train.make_parser()._actions}
    assert flags == CHANGES.keys() | NOT_OF_A_RUN
    before = resolved()
    for flag, (value, key) in CHANGES.items():
        after = resolved(flag, *[value] * (value is not None))
        assert after[key] != before[key], flag
        if flag not in ("--preset", "--dataset"):
            changed = {k for k in before if before[k] != after[k]} - {"command", "sweep", "parameters", key}
            assert not changed, (flag, changed)


CHOICES = [
    (action.option_strings[-1], choice)
    for action in train.make_parser()._actions
    for choice in action.choices or ()
    if action.option_strings[-1] != "--preset"
]


@pytest.mark.parametrize("flag, choice", CHOICES)
def test_every_choice_trains(script, tmp_path, monkeypatch, flag, choice):
    for name, (size, channels, classes) in DATASETS.items():
        rng = np.random.default_rng(0)
        images, labels = rng.integers(0, 255, (20, channels, size, size), np.uint8), np.arange(20) % classes
        monkeypatch.setitem(data.LOADERS, name, lambda data_dir, parts=(images, labels, images, labels): list(parts))
    small = ("--preset", "laptop", "--patch-size", 4, "--width", 12, "--heads", 2, "--depth", 2, "--epochs", 1)
    code, _, error = script("train", *small, "--srr-reg", 0.1, "--log-srr-every", 1, flag, choice, "--out", tmp_path)
    assert code == 0, error
    (path,) = tmp_path.glob("*/config.json")
    key, expected = flag[2:].replace("-", "_"), {"auto": "off"}.get(choice, choice)
    assert json.loads(path.read_text())[key] == expected


def test_presets_and_variants_are_in_the_readme():
    for name in ("laptop", "fashion", "paper", *(set(VARIANT_TABLE) - {"crate-n", "crate-t", "crate-fix", "crate-identity"})):
        assert name in README


@pytest.mark.parametrize("name", ["attention_only", "train", "measure", "correlate"])
def test_help(script, name):
    code, out, _ = script(name, "--help")
    assert code == 0 and f"python {name}.py" in out and "%(" not in out
