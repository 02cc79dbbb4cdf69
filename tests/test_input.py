"""Any command line of train.py: correct runs, in folders that say what they are, or exit code 2 and one line that says why not."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from crate import cli, training
from crate.model import VARIANTS
from crate.runs import DEFAULTS, resolve, run_name
from tests.conftest import assert_refused
from tests.processes import ROOT, SMALL, environment, outcome, start

TINY = (*SMALL, "--hold-out", 0.1, "--epochs", 1, "--log-srr-every", 0)


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


# Folders and their files


def test_every_run_of_a_sweep_has_a_name_of_its_own():
    base = DEFAULTS | {"srr_reg": 0.1}
    changes = dict(model="vit", width=12, depth=3, batch_size=7, lr=0.5, dropout=0.2, weight_decay=0.1)
    changes |= dict(srr_reg=0.2, srr_layer="all", srr_norm="l1", seed=5)
    assert len({run_name(base), *(run_name(base | {key: value}) for key, value in changes.items())}) == 1 + len(changes)


def test_config_holds_every_flag(script, tmp_path):
    flags = dict(
        preset="paper", model="vit", dataset="digits", train_subset=50, hold_out=0.5, augment="basic", image_size=4, patch_size=2,
        width=4, depth=1, heads=2, dropout=0.25, epochs=1, batch_size=5, lr=0.125, schedule="constant", weight_decay=0.5,
        clip_norm=2.0, stop_at_loss=0.5, srr_reg=0.25, srr_layer="1", srr_norm="l1", srr_lambda=0.75, srr_gamma=2.5,
        ista_beta=0.2, ista_lambda=0.3, temperature="none", log_srr_every=1, validate_every=3, seed=4, save_every=1.5,
        device="cpu", amp="bf16", data_dir=str(tmp_path),
    )  # fmt: skip
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", value)]
    assert script("train", *words, "--out", tmp_path / "out")[0] == 0
    (path,) = tmp_path.glob("out/*/config.json")
    stored = json.loads(path.read_text())
    assert {key: stored[key] for key in flags} == flags
    assert flags.keys() >= DEFAULTS.keys() and stored["parameters"] > 0 and stored["versions"]["torch"] == torch.__version__


def test_other_flags_than_the_folder_was_made_with(script, tmp_path):
    assert script("train", *TINY, "--out", tmp_path)[0] == 0
    before = contents(tmp_path)
    for flag, now in (("--epochs", 9), ("--clip-norm", 1.0), ("--srr-gamma", 2.0)):
        outcome = script("train", *TINY, "--out", tmp_path, flag, now)
        assert_refused(
            outcome, "config.json", f"{flag[2:].replace('-', '_')} is ", f"{now} now", f"match {flag} or change --out"
        )
    assert before == contents(tmp_path)
    code, out, _ = script("train", *TINY, "--out", tmp_path, "--save-every", 5, "--data-dir", tmp_path)  # these may differ
    assert code == 0 and "1 finished" in out and outcome[0] == 2


def test_a_run_without_srr_is_the_same_run_whatever_its_srr_flags(script, tmp_path):
    sweep = ("--srr-reg", 0, 0.1, "--srr-layer", 1, 2, "--srr-norm", "l1")
    for seed in (0, "own"):
        code, out, _ = script("train", *TINY, *sweep, "--seed", seed, "--out", tmp_path / str(seed))
        assert code == 0 and "3 runs" in out


def runs_of(draw=None, **flags):
    base = dict(width=12, heads=3, train_subset=20) | flags
    where = dict(preset="laptop", device="cpu", amp="off", data_dir=Path("data"))
    return resolve(base, **where, compile=False, save_every=0.0, draw=draw)


def test_a_seed_of_its_own_for_every_setting():
    flags = dict(model=["crate", "vit"], lr=[1e-3, 2e-3], dropout=[0.0, 0.1])
    seeds = [run["seed"] for run in runs_of(**flags, seed=["own"]).values()]
    assert len(set(seeds)) == 8 and seeds == [run["seed"] for run in runs_of(**flags, seed=["own"]).values()]


def test_drawn_settings():
    flags = dict(model=["crate", "vit"], lr=[1e-3, 1e-1], dropout=[0.0, 0.5], weight_decay=[0.0, 0.1], batch_size=[8, 16])
    runs = list(runs_of(draw=20, **flags).values())
    assert [run["model"] for run in runs] == ["crate"] * 20 + ["vit"] * 20
    assert runs == list(runs_of(draw=20, **flags).values()) and runs[:3] == list(runs_of(draw=3, **flags).values())[:3]
    for key in ("lr", "dropout", "weight_decay"):
        values = [run[key] for run in runs]
        assert len(set(values)) == 40 and min(flags[key]) <= min(values) < max(values) <= max(flags[key])
    assert 0.2 < sum(run["lr"] < 1e-2 for run in runs) / 40 < 0.8  # evenly on a logarithmic scale
    assert {run["batch_size"] for run in runs} == {8, 16}
    same = runs_of(draw=3, lr=[0.0012345], dropout=[0.012345])
    assert {(run["lr"], run["dropout"]) for run in same.values()} == {(0.0012345, 0.012345)}  # one value is that value


def test_status(script, tmp_path):
    assert script("train", *TINY, "--seed", *range(7), "--out", tmp_path)[0] == 0
    folders = sorted(path for path in tmp_path.iterdir())
    for folder in folders[1:4]:
        (folder / "result.json").unlink()
    (folders[2] / "error.txt").write_text("the dog ate it\n")
    (folders[3] / "log.jsonl").unlink()
    (folders[4] / "result.json").write_text("{}")
    (folders[5] / "result.json").unlink()
    (folders[5] / "log.jsonl").write_text('{"epoch": 0}\n{"epo')
    (folders[6] / "config.json").unlink()
    code, out, error = script("train", "--status", tmp_path)
    lines = {line.split()[0]: line for line in out.splitlines()}
    words = ["finished", "unfinished", "failed", "waiting", "failed", "failed", "failed"]
    assert code == 0 and error == "" and list(lines)[:-1] == [folder.name for folder in folders], out
    assert [line.split()[1] for line in lines.values()][:-1] == words
    assert "1 of 1 epochs; the dog ate it" in lines[folders[2].name]
    assert "epochs missing" in lines[folders[4].name].replace(",", "") or "result.json" in lines[folders[4].name]
    assert "log.jsonl: line 2" in lines[folders[5].name]
    assert out.splitlines()[-1] == "7 runs: 4 failed, 1 finished, 1 unfinished, 1 waiting"
    assert_refused(script("train", "--status", tmp_path / "none"), "no such folder")


@pytest.mark.parametrize("file, content", [("result.json", "{}"), ("result.json", "[1]"), ("last.pt", "")])
def test_a_broken_file_fails_its_run_alone(script, tmp_path, file, content):
    sweep = (*TINY, "--out", tmp_path, "--seed", 0, 1, 2)
    assert script("train", *sweep)[0] == 0
    right, folders = outcome(tmp_path), sorted(tmp_path.iterdir())
    for folder in folders[1:]:
        (folder / "result.json").unlink()
    (folders[1] / file).write_text(content)
    code, _, error = script("train", *sweep)
    (line,) = [line for line in error.splitlines() if "error: " in line]
    assert code == 2 and folders[1].name in line and file in line and "Traceback" not in error
    (folders[1] / "result.json").unlink(missing_ok=True)
    assert outcome(tmp_path) == {name: runs for name, runs in right.items() if name != folders[1].name}


def test_an_error_of_torch_fails_its_run_alone(script, tmp_path, monkeypatch):
    real = training.finish

    def fail_once(config, *rest):
        if config["seed"] == 1:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return real(config, *rest)

    monkeypatch.setattr(training, "finish", fail_once)
    code, _, error = script("train", *TINY, "--out", tmp_path, "--seed", 0, 1, 2)
    assert code == 2 and "_s1: CUDA error: out of memory more" in error and "Traceback" not in error
    assert len(list(tmp_path.glob("*/result.json"))) == 2


# What surrounds the process


def test_home_in_out(script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script("train", *TINY, "--out=~/x")[0] == 0
    assert len(list(tmp_path.glob("x/*/result.json"))) == 1


@pytest.mark.parametrize("value, threads", [(None, 2), ("", 2), ("3", 3), ("4,2", 4)])
def test_threads(monkeypatch, value, threads):
    monkeypatch.setattr(cli, "cores", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert cli.threads_of(2) == threads


@pytest.mark.parametrize("value", ["0", "many"])
def test_threads_that_make_no_sense(script, tmp_path, monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    code, _, error = script("train", *TINY, "--out", tmp_path)
    assert code == 0 or code == 2 and "OMP_NUM_THREADS" in error


def test_ranks_without_torchrun(tmp_path):
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    code, text = start(tmp_path, "--epochs", 1, fault=(environment, ranks)).wait()
    assert code == 0 and len(outcome(tmp_path)) == 1, text


def test_a_reader_that_leaves(script, tmp_path, monkeypatch):
    """train.py ... | head -1: it stops without a word, and no run has failed."""
    reader, writer = os.pipe()
    monkeypatch.setattr("sys.stdout", os.fdopen(writer, "w"))
    leave = threading.Thread(target=lambda: (os.read(reader, 1), os.close(reader)))
    leave.start()
    code, _, error = script("train", *TINY, "--seed", 0, 1, 2, 3, "--out", tmp_path)
    leave.join()
    assert code == 128 + signal.SIGPIPE and "error" not in error
    assert not list(tmp_path.glob("*/error.txt"))


def test_a_terminal_that_knows_ascii_alone(tmp_path):
    """And a backend for matplotlib that doesn't exist. Trains, says why it can't, and says so again to --status."""
    out, ascii_alone = tmp_path / "ü", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MPLBACKEND": "nonsense"}
    program = "import runpy, sys\nfor sys.argv in ARGV:\n    try:\n        runpy.run_path('train.py', run_name='__main__')\n"
    program += "    except SystemExit as stop:\n        print('code', stop.code)\n    BREAK"
    breaks = f"import pathlib; [path.write_text('') for path in pathlib.Path({str(tmp_path)!r}).rglob('last.pt')]"
    breaks += f"; [path.unlink() for path in pathlib.Path({str(tmp_path)!r}).rglob('result.json')]"
    lines = [["train.py", *map(str, TINY), "--out", str(out)]] * 2 + [["train.py", "--status", str(out)]]
    program = program.replace("ARGV", ascii(lines)).replace("BREAK", breaks)
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"} | ascii_alone
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True)
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert "Traceback" not in done.stderr and codes == ["code 0", "code 2", "code None"], done.stderr
    assert "last.pt" in done.stderr.splitlines()[-1] and "last.pt" in done.stdout.splitlines()[-3]


# Flags


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--hold-out", 1), ("--hold-out",)),
        (("--hold-out", 0.001), ("--hold-out 0.001", "leaves 0 of 250")),
        (("--weight-decay", -1), ("--weight-decay",)),
        (("--temperature", "two"), ("--temperature", "sqrt-p")),
        (("--ista-beta", 0), ("--ista-beta",)),
        (("--srr-gamma", "inf"), ("--srr-gamma",)),
        (("--dataset", "mnist"), ("--dataset", "digits")),
        (("--model", "resnet"), ("--model", "crate-c")),
        (("--width", 97), ("width 97", "heads 3", "--width", "--heads")),
        (("--patch-size", 3), ("image size 8", "patch size 3", "--image-size")),
        (("--width", 3 * 10**10), ("--width",)),
        (("--seed", 10**30), ()),
        (("--seed", "mine"), ("--seed", "mine")),
        (("--srr-layer", 13), ("--srr-layer 13", "1 to 2")),
        (("--srr-layer", "first"), ("--srr-layer first", "last", "random")),
        (("--srr-reg", "x"), ("--srr-reg", "x")),
        (("--lr", "nan"), ("--lr",)),
        (("--lr", 0), ("--lr",)),
        (("--lr", 1e-3, 1.0000001e-3), ("crate-c_d12", "too close")),
        (("--dropout", 1), ("--dropout",)),
        (("--batch-size", 2.5), ("--batch-size",)),
        (("--draw", 0), ("--draw",)),
        (("--device", "warp"), ("--device warp", "cpu")),
        (("--device", "cuda"), ("--device cuda", "cpu")),
        (("--train-subset", 5000), ("--train-subset 5000", "500")),
        (("--out", "/proc/nowhere"), ("--out /proc/nowhere",)),
        (("--no-such-flag",), ("--no-such-flag",)),
    ],
)
def test_bad_flags(script, tmp_path, flags, words):
    out = () if "--out" in flags else ("--out", tmp_path)
    assert_refused(script("train", *SMALL, "--epochs", 1, *out, "--srr-reg", 0.1, *flags), *words)


GOOD = {
    "--model": list(VARIANTS), "--preset": ["auto", "laptop", "paper"], "--train-subset": range(1, 60),
    "--hold-out": [0.0, 0.1, 0.9], "--augment": ["none", "basic"], "--image-size": [4, 8, 12], "--patch-size": [2, 4, 5, 8],
    "--width": [4, 6, 8], "--depth": [1, 2], "--heads": [1, 2, 4], "--dropout": [0, 0.1, 0.99], "--epochs": [0, 1, 2],
    "--batch-size": range(1, 40), "--lr": [1e-6, 1e-3, 0.1, 10.0], "--schedule": ["cosine", "constant"],
    "--weight-decay": [0, 0.1, 10], "--clip-norm": [1e-3, 1], "--stop-at-loss": [1e-3, 2.3, 5],
    "--srr-reg": [-1, 0, 1e-3, 10], "--srr-layer": ["last", "all", "random", 1, 2], "--srr-norm": ["l0", "l1"],
    "--srr-lambda": [0, 0.1, 10], "--srr-gamma": [1e-3, 1, 10], "--ista-beta": [1e-3, 10], "--ista-lambda": [0, 10],
    "--temperature": ["sqrt-p", "none"], "--log-srr-every": [0, 1, 2], "--validate-every": [1, 2], "--seed": [0, 2**40, "own"],
    "--draw": [1, 2], "--save-every": [0, 10], "--device": ["auto", "cpu"], "--amp": ["auto", "off", "bf16", "fp16"],
    "--jobs": [1],
}  # fmt: skip
BAD = ["", " ", "-1", "nan", "inf", "-inf", "1e400", "0", "0.5", "2.5", "1/2", "../x", "--", "-", "None", "ü", "\udcff", "a\nb"]


@pytest.mark.faults
@pytest.mark.parametrize("cases", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_generated_command_lines(script, tmp_path, faults, cases):
    draw, codes = random.Random(cases), []
    for case in range(cases):
        arguments = ["--dataset", "digits", "--width", 8, "--heads", 2, "--depth", 2, "--patch-size", 4, "--train-subset", 20]
        arguments += ["--epochs", 1, "--log-srr-every", 0]
        for flag in draw.choices(list(GOOD), k=draw.randint(1, 5)):
            values = BAD if draw.random() < 0.15 else GOOD[flag]
            arguments += [flag, *draw.choices(values, k=draw.choice([1, 1, 1, 2]))]
        out = tmp_path / "runs" / str(case)
        code, _, error = script("train", *arguments, "--out", out)
        assert code in (0, 2) and "Traceback" not in error, (arguments, error)
        codes.append(code)
        results = [json.loads(path.read_text()) for path in out.glob("*/result.json")]
        assert all(math.isfinite(result["train_loss"]) and 0 <= result["val_accuracy"] <= 1 for result in results)
        if code == 2:
            assert "train.py: error: " in error and "usage:" not in error, (arguments, error)
        else:
            assert results, arguments
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "something was written elsewhere"
    assert min(codes.count(0), codes.count(2)) > cases / 10
    counts = f"{codes.count(0)} trained, {codes.count(2)} refused in one line"
    faults("command lines of train.py, generated", len(codes), counts)
