"""torchrun: one model on several processes becomes the model that one process makes."""

import os
import signal
import socket
import sys
import time

import pytest
import torch

from crate.files import load_checkpoint
from crate.runs import read_run
from tests.processes import ROOT, SMALL, Train, children, command, environment, outcome, wait_until

pytestmark = pytest.mark.faults

# Batches of 50, 50, 50, 50 and 1: at the last one, a rank has no image.
SWEEP = ("--train-subset", 223, "--srr-reg", 0, 0.01, "--srr-layer", "random", "--epochs", 2, "--clip-norm", 5, "--dropout", 0)
FLAGS = {
    "crate-c": (*SWEEP, "--model", "crate-c"),
    "variants": (*SWEEP, "--model", "crate-e", "crate-fix", "vit", "crate-n", "--validate-every", 2),
    "augmented": ("--augment", "basic", "--epochs", 2, "--srr-reg", 0.01, "--srr-layer", "all"),
    "stopping": ("--stop-at-loss", 1.5, "--schedule", "constant", "--epochs", 60, "--lr", 1e-2),
    # Not in fp16: a rank that has the whole batch scales its loss by the number of ranks, and may overflow where one does not.
    "batches of one": ("--batch-size", 1, "--train-subset", 6, "--hold-out", 0.2, "--epochs", 2),
}


def start_ranks(out, *flags):
    """train.py as torchrun starts it, but in processes that have torch loaded: rank 0 and rank 1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    faults = [(environment, job | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    return [Train(out, *flags, output=out / f"text{rank}", fault=fault) for rank, fault in enumerate(faults)]


def numbers(row):
    return {key: value for key, value in row.items() if isinstance(value, float) and key != "seconds"}


@pytest.mark.parametrize("name", [name if name == "crate-c" else pytest.param(name, marks=pytest.mark.slow) for name in FLAGS])
def test_weights_equal_those_of_one_process(tmp_path, name, faults):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    ended = [script.wait() for script in (Train(one, *FLAGS[name]), *start_ranks(two, *FLAGS[name]))]
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert ["train loss" in text for _, text in ended] == [True, True, False]  # rank 0 alone talks
    names = [path.parent.name for path in sorted(one.glob("*/result.json"))]
    assert names == [path.parent.name for path in sorted(two.glob("*/result.json"))] != []
    for run in names:
        a, b = (load_checkpoint(out / run / "last.pt") for out in (one, two))
        assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
        for key, weight in a["model"].items():
            torch.testing.assert_close(b["model"][key], weight, rtol=0, atol=1e-5, msg=lambda m: f"{run} {key}: {m}")
        rows = [[*content["rows"], read_run(out / run)[1]] for content, out in ((a, one), (b, two))]
        for row, row2 in zip(*rows, strict=True):
            assert numbers(row2) == pytest.approx(numbers(row), abs=1e-4)
    faults("two processes for a model, instead of one", len(names), "weights equal to 1e-5")


@pytest.mark.parametrize("flags, words", [((), "processes is 1 there but 2 now"), (("--jobs", 2), "--jobs: torchrun")])
def test_what_does_not_go_with_several_processes(tmp_path, flags, words):
    assert Train(tmp_path, "--epochs", 1).wait()[0] == 0
    for path in tmp_path.glob("*/result.json"):
        path.unlink()
    for rank in start_ranks(tmp_path, "--epochs", 1, *flags):
        code, text = rank.wait()
        assert code == 2 and words in text and "Traceback" not in text, text


@pytest.mark.slow
def test_torchrun(tmp_path, faults):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", *SMALL)
    torchrun += ("--epochs", 60, "--dropout", 0.1, "--srr-reg", 0.01, "--srr-layer", "random", "--log-srr-every", 0, "--out")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with command(ROOT, tmp_path / "text", *torchrun, whole) as job:
        assert job.wait(120) == 0, (tmp_path / "text").read_text()

    def saved():
        return [path.stat().st_mtime_ns for path in cut.glob("*/last.pt")]

    for victim in ("rank 0", "rank 1", "torchrun"):
        with command(ROOT, tmp_path / "text", *torchrun, cut) as job:
            before = saved()
            wait_until(lambda: saved() != before)
            time.sleep(0.2)
            if victim == "torchrun":
                job.terminate()
            else:
                os.kill(sorted(children(job.pid))[victim == "rank 1"], signal.SIGKILL)
            assert job.wait(60) != 0 and not list(cut.glob("*/result.json"))
        faults(f"{victim} ended", 1, "all processes end with an error; resumed, bit for bit the same")
    assert "stopped by SIGTERM" in (tmp_path / "text").read_text()
    with command(ROOT, tmp_path / "text", *torchrun, cut) as job:
        assert job.wait(120) == 0, (tmp_path / "text").read_text()
    assert outcome(cut) == outcome(whole)
