"""torchrun: one model on several processes gives the model that one process gives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crate.checkpoint import load_checkpoint
from crate.runs import finished_run, status
from tests.processes import wait_until
from tests.test_faults import ROOT, SMALL, outcome

pytestmark = pytest.mark.faults

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(out, *flags, launcher=TORCHRUN):
    stream = open(Path(out).with_suffix(".txt"), "w")
    command = [*launcher, "train.py", *SMALL, *flags, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=stream, stderr=stream, env=environment)


def text_of(out):
    return Path(out).with_suffix(".txt").read_text()


# Batches of 50, 50, 50, 50 and 1: at the last one, a rank has no image.
SWEEP = ("--model", "crate-c", "crate-e", "crate-fix", "vit", "--srr-reg", 0, 0.01, "--srr-layer", "random", "--epochs", 2)
SWEEP += ("--train-subset", 201, "--clip-norm", 5.0, "--lr", 2e-3)
# A rank has no image in the last chunk of 256 that the stopping criterion looks at, or in any batch.
STOPPING = ("--stop-at-loss", 1.5, "--schedule", "constant", "--epochs", 60, "--lr", 1e-2, "--train-subset", 257)
SINGLE = ("--batch-size", 1, "--train-subset", 5, "--amp", "fp16", "--epochs", 2)
AUGMENTED = ("--augment", "basic", "--epochs", 2, "--srr-reg", 0.01)


@pytest.mark.parametrize(
    "flags, runs",
    [
        pytest.param(SWEEP, 8, id="sweep"),
        pytest.param(AUGMENTED, 1, id="augmented", marks=pytest.mark.slow),
        pytest.param(STOPPING, 1, id="stopping", marks=pytest.mark.slow),
        pytest.param(SINGLE, 1, id="single", marks=pytest.mark.slow),
    ],
)
def test_weights_equal_those_of_one_process(tmp_path, flags, runs, faults):
    two, one = start(tmp_path / "two", *flags), start(tmp_path / "one", *flags, launcher=(sys.executable,))
    assert (two.wait(120), one.wait(120)) == (0, 0), text_of(tmp_path / "two") + text_of(tmp_path / "one")
    assert "and 1 other processes" in text_of(tmp_path / "two")
    folders = sorted(path.parent for path in tmp_path.glob("one/*/result.json"))
    assert len(folders) == runs
    for folder in folders:
        a, b = (load_checkpoint(path / "last.pt") for path in (folder, tmp_path / "two" / folder.name))
        assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
        for key, weight in a["model"].items():
            torch.testing.assert_close(b["model"][key], weight, rtol=0, atol=1e-5, msg=lambda m: f"{folder} {key}: {m}")
        (_, result), (_, result2) = finished_run(folder), finished_run(tmp_path / "two" / folder.name)
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert result2[key] == pytest.approx(result[key], abs=1e-4)
        for row, row2 in zip(a["rows"], b["rows"], strict=True):
            numbers, numbers2 = ({k: v for k, v in r.items() if isinstance(v, float) and k != "seconds"} for r in (row, row2))
            assert numbers2 == pytest.approx(numbers, abs=2e-3)
        faults("two processes for a model, instead of one", 1, "weights equal to 1e-5")


def children(pid):
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


@pytest.mark.slow
def test_a_rank_dies_and_the_job_is_resumed(tmp_path, faults):
    flags = ("--epochs", 60, "--dropout", 0.1, "--srr-reg", 0.01, "--srr-layer", "random", "--log-srr-every", 0)
    whole = start(tmp_path / "whole", *flags)
    assert whole.wait(120) == 0, text_of(tmp_path / "whole")
    for rank in (0, 1):
        job = start(tmp_path / "cut", *flags)
        wait_until(lambda: list(tmp_path.glob("cut/*/last.pt")) and len(children(job.pid)) == 2)
        time.sleep(0.5)
        os.kill(sorted(children(job.pid))[rank], signal.SIGKILL)
        assert job.wait(60) != 0
        faults("a rank dies", 1, "the job ends with an error; resumed, bit for bit the same")
    job = start(tmp_path / "cut", *flags)
    wait_until(lambda: len(children(job.pid)) == 2)
    time.sleep(8)  # torch is loaded, and the run goes on
    if job.poll() is None:
        job.terminate()
        job.wait(60)
        assert "stopped by SIGTERM" in text_of(tmp_path / "cut") or status(tmp_path / "cut")[0][1] == "finished"
    job = start(tmp_path / "cut", *flags)
    assert job.wait(120) == 0, text_of(tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    faults("SIGTERM to torchrun", 1, "all ranks save the same step; resumed, bit for bit the same")


@pytest.mark.slow
def test_other_number_of_processes_is_refused(tmp_path):
    """Dropout draws other masks on two processes than on one."""
    assert start(tmp_path / "out", "--epochs", 1, launcher=(sys.executable,)).wait(60) == 0
    for path in tmp_path.glob("out/*/result.json"):
        path.unlink()
    assert start(tmp_path / "out", "--epochs", 1).wait(60) != 0
    assert "processes is 1 there but 2 now; match --nproc-per-node" in text_of(tmp_path / "out")


@pytest.mark.slow
def test_jobs_and_torchrun(tmp_path):
    assert start(tmp_path / "out", "--jobs", 2).wait(60) != 0
    assert "--jobs: torchrun" in text_of(tmp_path / "out")
