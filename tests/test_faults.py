"""Whatever happens to a run, nothing is lost and nothing changes: kills, signals, full disks, broken files.

Every resumed run is compared with one that nothing happened to: log.jsonl (times aside), final weights, result.json.
"""

import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from crate.runs import load_checkpoint, lock_holder, read_log, read_run, status
from tests import processes
from tests.conftest import assert_refused
from tests.processes import ROOT, SMALL, SRR, Train, environment, outcome, wait_until

pytestmark = pytest.mark.faults
FP16 = ("--amp", "fp16", "--dropout", 0.1)
UNTIL_LOW = ("--stop-at-loss", 1, "--schedule", "constant")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def trained(out, flags):
    code, text = Train(out, *flags, output=out.with_suffix(".end")).wait(120)
    assert code == 0, text
    return outcome(out)


@pytest.fixture(scope="module")
def finish(tmp_path_factory):
    """finish(out, *flags): start the run again, without any fault; it ends as if nothing had happened."""
    whole = functools.cache(lambda flags: trained(tmp_path_factory.mktemp("whole"), flags))

    def end(out, *flags):
        assert trained(out, flags) == whole(flags)

    return end


def assert_stopped(ended, number):
    """Exit code 130 or 143, and one line."""
    code, text = ended
    assert code == 128 + number and "Traceback" not in text, text
    assert text.splitlines()[-1] == f"train.py: stopped by {number.name}; run the same command again to go on"


@pytest.mark.parametrize("flags", [SRR, slow((*FP16, "--clip-norm", 1)), slow(UNTIL_LOW)])
def test_killed_and_stopped_at_random(tmp_path, finish, flags):
    flags, draw = (*flags, "--epochs", 60), random.Random(0)

    def saved():
        return sum(load_checkpoint(path)["epoch"] for path in tmp_path.glob("*/last.pt"))

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before, script = saved(), Train(tmp_path, *flags)
        wait_until(lambda: saved() > before)
        time.sleep(draw.uniform(0, 0.05))
        script.kill(number)
        ended, (folder,) = script.wait(30), tmp_path.glob("*/")
        if number == signal.SIGKILL:
            assert ended[0] == -number
        else:
            assert_stopped(ended, number)
            assert not (folder / "error.txt").exists()
            assert len(read_log(folder)) - 1 - saved() in (0, 1)  # at most the epoch that ran is lost
    finish(tmp_path, *flags)


def test_killed_inside_each_write(tmp_path, finish):
    for write in range(1, 7):  # config.json twice, init.pt, log.jsonl, last.pt, result.json
        out = tmp_path / str(write)
        out.mkdir()
        code, text = Train(out, "--epochs", 1, *SRR, fault=(processes.kill_at_write, write)).wait()
        assert code == -signal.SIGKILL, text
        finish(out, "--epochs", 1, *SRR)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_run_all(tmp_path, number):
    for name in ("requirements.txt", "train.py", "crate"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "run_all.sh", tmp_path)  # which follows links to itself
    settings = {"PYTHON": sys.executable, "PRESET": "laptop", "JOBS": "2"}
    with open(tmp_path / "text", "w") as text:
        outputs = dict(stdout=text, stderr=text, start_new_session=True)
        shell = subprocess.Popen(["bash", "run_all.sh", "train"], cwd=tmp_path, env=os.environ | settings, **outputs)
    wait_until(lambda: len(list(tmp_path.glob("runs/laptop/*/*/init.pt"))) == 2)
    os.killpg(shell.pid, number) if number == signal.SIGINT else shell.send_signal(number)
    assert_stopped((shell.wait(30), (tmp_path / "text").read_text()), number)
    assert not any(lock_holder(path.parent) for path in tmp_path.rglob("config.json"))


def test_processes_share_a_sweep(tmp_path, finish):
    flags = ("--epochs", 4, "--seed", *range(4))
    ranks = [{"RANK": i, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"} for i in "01"]  # no torchrun
    scripts = [Train(tmp_path, *flags, output=tmp_path / f"text{i}", fault=(environment, ranks[i])) for i in range(2)]
    codes, texts = zip(*(script.wait() for script in scripts))
    assert codes == (0, 0) and all("train loss" in text for text in texts), texts
    finish(tmp_path, *flags)  # had two trained a run, its log would have rows twice


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL])
def test_however_the_first_process_ends_the_others_end(tmp_path, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as nohup does: runs go on")
    script = Train(tmp_path, "--epochs", 10**4, "--seed", *range(4), "--jobs", 2)

    def holders():
        return {holder for path in tmp_path.glob("*/config.json") if (holder := lock_holder(path.parent))}

    wait_until(lambda: len(holders()) == 2)
    script.kill(number)
    ended = script.wait(30)
    wait_until(lambda: not holders())
    if number != signal.SIGKILL:
        assert ended[0] == 128 + number and f"stopped by {number.name}; run the same command again to go on" in ended[1]


def test_two_processes_on_one_run(tmp_path, finish):
    flags = ("--epochs", 12, *SRR)
    first = Train(tmp_path, *flags)
    wait_until(lambda: list(tmp_path.glob("*/last.pt")))
    first.kill(signal.SIGSTOP)
    (folder,), holder = tmp_path.glob("*/"), f"process {first.process.pid}"
    code, text = Train(tmp_path, *flags, output=tmp_path / "second").wait()
    assert code == 0 and "another process works on it" in text and holder in text, text
    assert status(folder)[0] == "running" and holder in status(folder)[1]
    first.kill()
    first.wait()
    finish(tmp_path, *flags)  # the lock of the dead process is taken over


DISK_FULL, NAN = (processes.limit_file_size, 40_000), (processes.nan_in_batch, 8)
REFUSED = [(SRR, DISK_FULL, "last.pt: File too large"), (SRR, NAN, "epoch 2, step 8"), ((), NAN, "epoch 2, step 8")]


@pytest.mark.parametrize("flags, fault, words", [*REFUSED, slow(FP16, NAN, "epoch 2, step 8")])
def test_refused_in_one_line_and_resumed(tmp_path, finish, flags, fault, words):
    out = tmp_path / "runs"
    out.mkdir()
    code, text = Train(out, "--epochs", 3, *flags, output=tmp_path / "text", fault=fault).wait()
    assert_refused((code, "", text), words)
    (folder,) = out.iterdir()
    assert words in (folder / "error.txt").read_text() and status(folder)[0] == "failed"
    finish(out, "--epochs", 3, *flags)


# torchrun: one model on several processes becomes the model that one process makes

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
