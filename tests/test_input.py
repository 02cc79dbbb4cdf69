"""Any command line of train.py: correct runs, in folders that say what they are, or exit code 2 and one line that says why."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from crate import cli, runs, training
from crate.data import decode, load_data
from crate.model import VARIANTS
from crate.runs import DEFAULTS, load_run, read_log, resolve, run_name, srr_layers
from tests.conftest import assert_refused
from tests.processes import ROOT, SMALL, outcome
from tests.test_data import write_classes

TINY = ("train", *SMALL, "--epochs", 1, "--log-srr-every", 0)


WHERE = dict(preset="laptop", device=torch.device("cpu"), amp="off", data_dir=Path("data"), graph=True, save_every=0.0)


def runs_of(draw=None, **flags):
    return list(resolve(dict(width=12, heads=3, train_subset=20) | flags, **WHERE, draw=draw).values())


# Runs, their names and their folders


def test_config_holds_every_flag(script, tmp_path):
    flags = {flag: values[-1] for flag, values in GOOD.items()} | {"--dataset": "digits", "--data-dir": str(tmp_path)}
    words = [word for pair in flags.items() for word in pair]
    assert script("train", *words, "--out", tmp_path / "out")[0] == 0
    (path,) = tmp_path.glob("out/*/config.json")
    stored = json.loads(path.read_text())
    flags = {flag.removeprefix("--").replace("-", "_"): value for flag, value in flags.items()}
    assert {key: stored[key] for key in flags} == flags and flags.keys() >= DEFAULTS.keys()
    assert stored["parameters"] > 0 and stored["processes"] == 1 and stored["versions"]["torch"] == torch.__version__


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_setting_is_another_run(script, tmp_path):
    assert script(*TINY, "--out", tmp_path)[0] == 0
    (folder,) = tmp_path.iterdir()
    before = contents(folder)
    for flag, value, name in (("--epochs", 2, "_e2_"), ("--clip-norm", 0.5, "_clip0.5_"), ("--amp", "bf16", "_amp-bf16_")):
        assert script(*TINY, flag, value, "--out", tmp_path)[0] == 0
        assert len(list(tmp_path.glob(f"*{name}*"))) == 1
    code, out, _ = script(*TINY, "--out", tmp_path, "--save-every", 5, "--data-dir", tmp_path)  # these may differ
    assert code == 0 and "1 finished" in out and "code" not in out
    assert before == contents(folder) and len(list(tmp_path.iterdir())) == 4


def test_names():
    """Those of the published tables, where settings are the preset's; else what differs; they are names of folders."""
    for flags, name in (
        ({}, "crate-c_d48_L4_b32_lr0.002_p0_s0"),
        ({"epochs": 30, "lr": [1e-3], "srr_reg": [0.1], "weight_decay": [0.01]}, "lr0.001_p0_wd0.01_eta0.1_last_l0_s0"),
        ({"epochs": 400, "schedule": "constant", "stop_at_loss": 0.01}, "_p0_e400_constant_stop0.01_s0"),
    ):
        (found,) = resolve(flags, **WHERE)
        assert found.endswith(name)
    name = run_name(runs_of()[0], {"dataset": "/photos/a b:c\n" + 99 * "x"})
    assert "_a-b-c-xxx" in name and len(name) < 99


# What made a run


def test_what_other_code_made_is_said_and_made_anew_when_asked(script, tmp_path, monkeypatch):
    """A finished run, one that goes on, and one from before there were checksums."""
    sweep = (*TINY, "--epochs", 2, "--out", tmp_path, "--seed", 0, 1, 2)
    assert "made by" not in script(*sweep)[1]
    files = [folder / "config.json" for folder in sorted(tmp_path.iterdir())]
    right, config = outcome(tmp_path), json.loads(files[2].read_text())
    (files[1].parent / "result.json").unlink()
    files[2].write_text(json.dumps({key: config[key] for key in config if key not in ("code", "data")}))

    def made():
        return [json.loads(file.read_text()).get("code") for file in files]

    monkeypatch.setattr(runs, "code_checksum", lambda: "edited")
    said = f"made by other code: 3 of 3, such as {files[0].parent.name}; "
    assert said + "--again" in script(*sweep)[1] and made() == [config["code"], f"{config['code']} edited", None]
    assert said + "--again" in script(*sweep)[1] and said + "trained anew now" in script(*sweep, "--again")[1]
    assert made() == ["edited"] * 3 and outcome(tmp_path) == right and "made by" not in script(*sweep)[1]


def test_the_checksum_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "crate").mkdir()
    (tmp_path / "train.py").touch()
    for file in ("crate/a.py", "crate/b.py", "train.py", "README.md"):
        before = runs.code_checksum.__wrapped__()
        (tmp_path / file).write_text("new")
        assert (runs.code_checksum.__wrapped__() == before) == (file == "README.md")


def test_the_commit_is_that_of_this_folder_alone(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True).stdout  # noqa: E731
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x")
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.commit() == git("rev-parse", "HEAD").strip()
    (tmp_path / "file").write_text("2")
    assert runs.commit() == git("rev-parse", "HEAD").strip() + "-dirty"
    monkeypatch.setattr(runs, "ROOT", tmp_path / "inside")
    assert runs.commit() is None


def test_images(script, tmp_path, monkeypatch):
    """Other ones are refused, also in measure.py, and leave all as it is; where they lie, and how that is written, is free."""
    monkeypatch.chdir(write_classes(tmp_path / "photos", size=(8, 8)).parent)
    command = ("train", *SMALL[: SMALL.index("--train-subset")], "--epochs", 2, "--out", "runs", "--dataset")
    assert script(*command, "photos")[0] == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    for same in ("./photos/", tmp_path / "photos", "~/photos"):
        assert "1 finished" in script(*command, same)[1]
    Path("elsewhere").mkdir()
    Path("photos").rename(moved := Path("elsewhere/photos"))
    measure = ("measure", "runs", "--out", "m.csv", "--dataset", moved, "--groups")
    assert "1 finished" in script(*command, moved)[1] and script(*measure, "norms")[0] == 0
    (folder,) = Path("runs").iterdir()
    finished = contents(folder)
    (moved / "train/a/1.png").unlink()
    load_data.cache_clear(), decode.cache_clear()
    assert_refused(script(*command, moved), "config.json", "not the run's (6 + 4", "--dataset", "--again")
    code, _, error = script(*measure, "srr")
    assert code == 2 and "its images (5 + 4 images, " in error and "are not the run's" in error
    assert contents(folder) == finished
    code, out, _ = script(*command, moved, "--again")
    assert code == 0 and "2 epochs" in out and "0 measured already" in script(*measure, "norms")[1]
    assert json.loads((folder / "config.json").read_text())["data"].startswith("5 + 4 images")


@pytest.mark.parametrize("seed", [0, "own"])
def test_one_run_without_srr_and_a_seed_of_its_own(seed):
    """Without SRR in the loss a run is the same whatever its other SRR flags say."""
    flags = dict(srr_reg=[0.0, 0.1], srr_layer=["1", "random"], srr_norm="l1", lr=[1e-3, 2e-3], model=["crate", "vit"])
    found = runs_of(**flags, seed=[seed])
    assert [run["srr_reg"] for run in found] == [0.0, 0.1, 0.1] * 4 and found == runs_of(**flags, seed=[seed])
    assert len({run["seed"] for run in found}) == (12 if seed == "own" else 1)
    assert set(srr_layers("random", 3, 100)) == {(0,), (1,), (2,)}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["crate-c", "crate-e"])
def test_the_papers_preset_at_full_size(script, tmp_path, model):
    write_classes(tmp_path / "cifar10", "abcdefghij", size=(32, 32))
    run = ("train", "--preset", "paper", "--data-dir", tmp_path, "--amp", "bf16", "--batch-size", 10, "--log-srr-every", 1)
    run += ("--model", model, "--epochs", 2, "--srr-reg", 1e-3, "--srr-layer", "random", "--out", tmp_path / "runs")
    assert script(*run)[0] == 0
    (folder,) = tmp_path.glob("runs/*")
    config, *_ = load_run(folder)
    settings = dict(width=384, depth=12, heads=6, patch_size=4, augment="basic", schedule="cosine", lr=1e-4)
    assert {key: config[key] for key in settings} == settings
    assert len(read_log(folder)[-1]["srr"]) == 12 and read_log(folder)[-1]["step"] == 6


def test_the_device_decides_the_preset(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "preset laptop: digits, on cpu" in script("train", "--device", "cpu", "--epochs", 0, "--out", tmp_path)[1]


DRAWN = dict(model=["crate", "vit"], lr=[1e-3, 1e-1], dropout=[0.0, 0.5], weight_decay=[0.0, 0.1], batch_size=[8, 16])


@pytest.mark.parametrize("seeds", [[0], ["own"], [0, 5, "own"]])
def test_drawn_settings_are_those_of_the_published_tables_with_each_seed(seeds):
    known = [("crate", 16, 0.0198, 0.22, 0.0401, 3077828531), ("crate", 16, 0.0058, 0.352, 0.0415, 1784097937)]
    known += [("vit", 8, 0.0013, 0.31, 0.0824, 686205360), ("vit", 8, 0.0047, 0.0929, 0.053, 2609479139)]
    expected = [(*one, own if seed == "own" else seed) for *one, own in known for seed in seeds]
    keys = "model batch_size lr dropout weight_decay seed".split()
    assert [tuple(run[key] for key in keys) for run in runs_of(draw=2, **DRAWN, seed=seeds)] == expected
    (same,) = runs_of(draw=1, lr=[0.0012345], dropout=[0.012345])
    assert (same["lr"], same["dropout"]) == (0.0012345, 0.012345)  # between one value and itself


def test_status_and_several_processes(script, tmp_path):
    """They share the runs; one that fails is an exit code."""
    sweep = (*TINY, "--seed", *range(6), "--out", tmp_path, "--jobs", 2)
    assert script(*sweep)[0] == 0
    folders = sorted(tmp_path.iterdir())
    for i in (1, 2, 3, 5):
        (folders[i] / "result.json").unlink()
    (folders[2] / "error.txt").write_text("the dog ate it\n")
    (folders[3] / "log.jsonl").unlink()
    (folders[4] / "result.json").write_text("{")
    (folders[5] / "log.jsonl").write_text('{"epoch": 0}\n{"epo')
    code, out, error = script("train", "--status", tmp_path)
    *lines, total = out.splitlines()
    assert code == 0 and error == "" and [line.split()[0] for line in lines] == [folder.name for folder in folders], out
    words = ["finished", "unfinished", "failed", "waiting", "failed", "failed"]
    assert [line.split()[1] for line in lines] == words and total == "6 runs: 3 failed, 1 finished, 1 unfinished, 1 waiting"
    for line, remark in zip(lines[2:], ["the dog ate it", "", "result.json", "Unterminated"]):
        assert remark in line
    assert_refused(script("train", "--status", tmp_path / "none"), "no such folder")
    assert script(*sweep)[0] == 2 and (folders[4] / "result.json").read_text() == "{"
    (folders[4] / "result.json").unlink()
    assert len(outcome(tmp_path)) == 5


def test_a_run_that_fails_fails_alone(script, tmp_path, monkeypatch):
    """Of broken and foreign files and of what torch raises there is one line each, which names the run."""
    monkeypatch.chdir(tmp_path)
    sweep, real = (*TINY, "--out", "runs", "--seed", *range(6)), training.finish
    assert script(*sweep)[0] == 0
    right, folders = outcome(Path("runs")), sorted(Path("runs").iterdir())
    other = (folders[0] / "last.pt").read_bytes()
    broken = [("result.json", b"{"), ("last.pt", b""), ("last.pt", other)]
    for folder in folders[1:]:
        (folder / "result.json").unlink()
    for folder, (name, content) in zip(folders[1:], broken):
        (folder / name).write_bytes(content)

    def out_of_memory(config, *rest):
        if config["seed"] == 4:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return real(config, *rest)

    monkeypatch.setattr(training, "finish", out_of_memory)
    code, _, error = script(*sweep)
    lines = sorted(line for line in error.splitlines() if "error: " in line)
    words = ["result.json", "last.pt", "another run, seed is 0 there but 3 now", "CUDA error: out of memory more"]
    for folder, word, line in zip(folders[1:5], words, lines, strict=True):
        assert code == 2 and folder.name in line and word in line and "Traceback" not in error
    for folder, (name, content) in zip(folders[1:], broken):
        assert (folder / name).read_bytes() == content
    (folders[1] / "result.json").unlink()
    assert outcome(Path("runs")) == {folder.name: right[folder.name] for folder in (folders[0], folders[5])}
    (folders[5] / "config.json").write_bytes(b"{")
    assert_refused(script(*sweep), f"{folders[5]}/config.json")


# What surrounds the process


def test_threads(monkeypatch):
    """Together no more than the cores, whatever OMP_NUM_THREADS says; of fewer, so many."""
    monkeypatch.setattr(cli, "cores", lambda: 6)
    monkeypatch.setattr(cli.multiprocessing, "get_context", lambda _: Mock(Process=lambda **_: Mock(exitcode=0)))
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    for wanted, jobs, threads in ((16, 1, 6), (16, 2, 3), (1, 2, 1), (16, 7, 1)):
        torch.set_num_threads(wanted)
        assert cli.in_processes(jobs, lambda job: torch.get_num_threads()) == threads
        assert os.environ["OMP_NUM_THREADS"] == str(threads)


def test_cores_are_those_that_the_process_may_use():
    one = "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); from crate.cli import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", one], cwd=ROOT, capture_output=True, text=True).stdout == "1\n"


def test_progress_off_a_terminal(script, tmp_path, monkeypatch):
    """A line an epoch, not more often than SAY_EVERY; at the end SRR of one layer of all runs, be it in their loss or not."""
    sweep = (*TINY, "--out", tmp_path, "--srr-reg", 0, 0.1, "--log-srr-every", 1, "--epochs", 2, "--srr-layer", 1)
    code, out, error = script(*sweep)
    assert code == 0 and error == ""
    folders = sorted(tmp_path.iterdir(), key=lambda folder: "_eta" in folder.name)
    for line, folder in zip(out.splitlines()[1:], folders, strict=True):
        start, *_, end = (row["srr"][0]["srr"] for row in read_log(folder))
        assert line.endswith(f"; SRR of training images (layer 1): {start:.1f} at the start, {end:.1f} at the end")
    monkeypatch.setattr(training, "SAY_EVERY", 0)
    lines = script(*sweep, "--seed", 1)[2].split("\n")
    assert [line.partition(": ")[2][:12] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"] * 2 + [""]


# Flags


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--hold-out 0.001", "--hold-out 0.001; leaves 0 of 250"),
        ("--dataset mnist", "--dataset mnist; digits"),
        ("--width 97", "width 97; heads 3; --width; --heads"),
        ("--patch-size 3", "image size 8; patch size 3; --image-size"),
        ("--srr-layer first", "--srr-layer first; last, all, random"),
        ("--lr 1e-3 1.0000001e-3", "crate-c_d12; too close"),
        ("--device warp", "--device warp; cpu"),
        ("--device cuda", "--device cuda: can't be used here (; cpu"),  # and torch's reason
        ("--train-subset 5000", "--train-subset 5000; 500"),
        ("--out /proc/nowhere", "/proc/nowhere"),
        ("--out ~nosuchuser/x", "--out; ~nosuchuser/x; no such user"),
    ],
)
def test_bad_flags(script, tmp_path, flags, words):
    assert_refused(script(*TINY, "--srr-reg", 0.1, "--out", tmp_path, *flags.split()), *words.split("; "))


GOOD = {  # the last values go together
    "--model": list(VARIANTS), "--preset": ["auto", "laptop", "paper"], "--train-subset": range(1, 60),
    "--hold-out": [0.0, 0.1, 0.9], "--augment": ["none", "basic"], "--image-size": [8, 12, 4], "--patch-size": [4, 5, 8, 2],
    "--width": [6, 8, 4], "--depth": [2, 1], "--heads": [1, 4, 2], "--dropout": [0, 0.1, 0.99], "--epochs": [0, 2, 1],
    "--batch-size": range(1, 40), "--lr": [1e-6, 1e-3, 10.0, 0.1], "--schedule": ["cosine", "constant"],
    "--weight-decay": [0, 0.1, 10], "--clip-norm": [1, 1e-3], "--stop-at-loss": [1e-3, 2.3, 5],
    "--srr-reg": [-1, 0, 10, 1e-3], "--srr-layer": ["last", "all", "random", "2", "1"], "--srr-norm": ["l0", "l1"],
    "--srr-lambda": [0, 0.1, 10], "--srr-gamma": [1e-3, 1, 10], "--ista-beta": [10, 1e-3], "--ista-lambda": [10, 0],
    "--temperature": ["sqrt-p", "none"], "--log-srr-every": [0, 2, 1], "--validate-every": [1, 2], "--seed": [0, "own", 2**40],
    "--save-every": [0, 1.5], "--device": ["auto", "cpu"], "--amp": ["auto", "off", "fp16", "bf16"],
}  # fmt: skip
BAD = ["", " ", "-1", "nan", "inf", "-inf", "1e400", "0", "0.5", "2.5", "1/2", "../x", "--", "-", "None", "ü", "\udcff", "a\nb"]


@pytest.mark.faults
@pytest.mark.parametrize("cases", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_generated_command_lines(script, tmp_path, cases):
    draw, codes = random.Random(cases), []
    for case in range(cases):
        out = tmp_path / "runs" / str(case)
        arguments = ["--dataset", "digits", "--width", 8, "--heads", 2, "--train-subset", 20]
        for flag in draw.choices([*GOOD, "--draw"], k=draw.randint(1, 5)):
            values = BAD if draw.random() < 0.15 else GOOD.get(flag, [1, 2])
            arguments += [flag, *draw.choices(values, k=draw.choice([1, 1, 1, 2]))]
        code, _, error = script(*TINY, *arguments, "--out", out)
        codes.append(code)
        assert code in (0, 2) and "Traceback" not in error and "usage:" not in error, (arguments, error)
        assert "train.py: error: " in error if code else list(out.glob("*/result.json")), arguments
        for path in out.glob("*/result.json"):
            result = json.loads(path.read_text())
            assert math.isfinite(result["train_loss"]) and 0 <= result["val_accuracy"] <= 1, arguments
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "something was written elsewhere"
    assert min(codes.count(0), codes.count(2)) > cases / 10
