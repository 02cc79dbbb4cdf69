"""torchrun: one model on several processes becomes the model that one process makes."""

import socket
import subprocess
import sys

import pytest
import torch

from crate.runs import load_checkpoint, read_run
from tests.processes import ROOT, SMALL, SRR, Train, environment, outcome, wait_until

pytestmark = pytest.mark.faults

# Batches of 50, 50, 50, 50 and 1: at the last one, a rank has no image.
SWEEP = ("--train-subset", 223, "--srr-reg", 0, 0.01, "--srr-layer", "random", "--epochs", 2, "--clip-norm", 5)
FLAGS = [
    (*SWEEP, "--model", "crate-c"),
    (*SWEEP, "--model", "crate-e", "crate-fix", "vit", "crate-n", "--validate-every", 2),
    ("--augment", "basic", "--epochs", 2, "--srr-reg", 0.01, "--srr-layer", "all"),
    ("--stop-at-loss", 1.5, "--schedule", "constant", "--epochs", 60, "--lr", 1e-2),
    ("--batch-size", 1, "--train-subset", 6, "--hold-out", 0.2, "--epochs", 2),
]


def start_ranks(out, *flags):
    """train.py as torchrun starts it, but in processes that have torch loaded: rank 0 and rank 1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    faults = [(environment, job | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    return [Train(out, *flags, output=out / f"text{rank}", fault=fault) for rank, fault in enumerate(faults)]


@pytest.mark.parametrize("flags", [FLAGS[0], *(pytest.param(flags, marks=pytest.mark.slow) for flags in FLAGS[1:])])
def test_weights_equal_those_of_one_process(tmp_path, flags):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    ended = [script.wait() for script in (Train(one, *flags), *start_ranks(two, *flags))]
    assert [code for code, _ in ended] == [0, 0, 0], ended
    names = [path.parent.name for path in sorted(one.glob("*/result.json"))]
    assert names == [path.parent.name for path in sorted(two.glob("*/result.json"))] != []
    for run in names:
        a, b = (load_checkpoint(out / run / "last.pt") for out in (one, two))
        for key, weight in a["model"].items():
            torch.testing.assert_close(b["model"][key], weight, rtol=0, atol=1e-5, msg=lambda m: f"{run} {key}: {m}")
        rows = [[*content["rows"], read_run(out / run)[1]] for content, out in ((a, one), (b, two))]
        for row, row2 in zip(*rows, strict=True):
            for key in ("train_loss", "train_accuracy", "train_srr", "val_loss", "gap"):
                assert row2.get(key) == pytest.approx(row.get(key), abs=1e-4)


def test_killed_ranks_resume(tmp_path):
    flags, cut, whole = ("--epochs", 20, *SRR), tmp_path / "cut", tmp_path / "whole"
    cut.mkdir(), whole.mkdir()
    ranks = start_ranks(cut, *flags)
    wait_until(lambda: list(cut.glob("*/last.pt")))
    ranks[1].kill()
    ranks[0].wait(), ranks[1].wait()
    assert not list(cut.glob("*/result.json"))
    for out in (cut, whole):
        assert [rank.wait()[0] for rank in start_ranks(out, *flags)] == [0, 0]
    assert outcome(cut) == outcome(whole)


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", *SMALL]
    subprocess.run([*map(str, command), "--epochs", "1", "--out", tmp_path], cwd=ROOT, check=True)
    assert len(outcome(tmp_path)) == 1
