"""train.py in real processes that can be killed, forked from a server that has torch loaded; and faults that befall them."""

import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

import train
from crate import training
from crate.cli import run
from crate.runs import load_checkpoint, read_log, read_run

torch.set_num_threads(1)
CONTEXT = multiprocessing.get_context("forkserver")
# An optimizer imports torch._dynamo, which takes longer than these runs.
CONTEXT.set_forkserver_preload(["tests.processes", "torch._dynamo"])
ROOT = Path(__file__).parents[1]
# 225 images to train on: five steps an epoch.
SMALL = ("--preset", "laptop", "--width", 12, "--heads", 3, "--depth", 2, "--patch-size", 4, "--train-subset", 250)
SMALL += ("--hold-out", 0.1, "--batch-size", 50, "--log-srr-every", 2, "--save-every", 0)
SRR = ("--dropout", 0.1, "--srr-reg", 1e-3, "--srr-layer", "random")


def _child(arguments, output, fault):
    os.setsid()  # a group of its own, to which a signal can be sent
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for standard in (1, 2):
        os.dup2(stream, standard)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["train.py", *map(str, arguments)]
    if fault:
        fault[0](*fault[1:])
    run(train.main)


class Train:
    """train.py with SMALL and these flags. fault: a function and its arguments, called in the process before it begins."""

    def __init__(self, out, *flags, output=None, fault=()):
        self.output = output or out / "text"
        self.process = CONTEXT.Process(target=_child, args=((*SMALL, *flags, "--out", out), self.output, fault))
        self.process.start()

    def kill(self, number=signal.SIGKILL):
        os.kill(self.process.pid, number)

    def wait(self, seconds=60):
        """Exit code and what it printed. A process that does not end is a failure."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"a hang: not ended after {seconds} s: {self.output.read_text()}")
        return self.process.exitcode, self.output.read_text()


def outcome(out):
    """What must not change, of every finished run in the folder: log, result, weights; times aside."""
    runs = {}
    for folder in sorted(path.parent for path in out.glob("*/result.json")):
        log, (_, result) = read_log(folder), read_run(folder)
        for row in (*log, result):
            del row["seconds"]
        weights = load_checkpoint(folder / "last.pt")["model"]
        runs[folder.name] = log, result, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
        assert not list(folder.glob(".*.tmp")), "a file of an interrupted write is left"
    assert runs
    return runs


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def environment(changes):
    os.environ.update(changes)


def kill_at_write(n):
    """SIGKILL once the n-th file is half written."""
    fsync, writes = os.fsync, itertools.count(1)

    def fsync_or_die(descriptor):
        if next(writes) == n:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = fsync_or_die


def limit_file_size(size):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def nan_in_batch(n):
    """The n-th batch, counted over all epochs, is not numbers."""
    real, count = training.batches, itertools.count(1)

    def batches(*arguments):
        for images, labels, weight in real(*arguments):
            yield images * (float("nan") if next(count) == n else 1.0), labels, weight

    training.batches = batches
