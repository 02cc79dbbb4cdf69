"""Real processes for the tests: train.py started as a user would, in children that are forked from a server which has torch
loaded, so that each starts in a tenth of a second and can be killed; and the faults that befall them."""

import ctypes
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import train
from crate import training
from crate.cli import run
from crate.files import load_checkpoint
from crate.runs import lock_holder, read_log, read_run

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
    """train.py with SMALL and these flags; what it prints is in `output`, or out/text.

    fault: a function and its arguments, called in the process before it begins.
    """

    def __init__(self, out, *flags, output=None, fault=()):
        self.output = output or out / "text"
        self.process = CONTEXT.Process(target=_child, args=((*SMALL, *flags, "--out", out), self.output, fault))
        self.process.start()

    def kill(self, number=signal.SIGKILL):
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait(self, seconds=60):
        """Exit code and what it printed. A process that does not end is a failure."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"a hang: not ended after {seconds} s: {self.output.read_text()}")
        return self.process.exitcode, self.output.read_text()


@contextmanager
def command(cwd, output, *words, **environment):
    """Any process, in a group of its own; what it prints is in the file `output`."""
    with open(output, "w") as text:
        settings = dict(cwd=cwd, stdout=text, stderr=text, start_new_session=True, env=os.environ | environment)
        process = subprocess.Popen([*map(str, words)], **settings)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


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


def all_ended(out):
    return not any(lock_holder(path.parent) for path in out.rglob("config.json"))


def children(pid):
    """The processes that process `pid` started."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Faults


def environment(changes):
    os.environ.update(changes)


def kill_at_write(n, point):
    """The n-th write of a file ends in SIGKILL: half written, whole but not renamed ("before"), or just renamed ("after")."""
    fsync, replace, writes = os.fsync, os.replace, itertools.count(1)
    current = None

    def die_if(here):
        if current == n and here == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync_or_die(descriptor):
        nonlocal current
        current = next(writes)
        if current == n and point == "half":
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        die_if("half")
        fsync(descriptor)

    def replace_or_die(source, target):
        die_if("before")
        replace(source, target)
        die_if("after")

    os.fsync, os.replace = fsync_or_die, replace_or_die


def limit_file_size(size):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def give_up_privileges():
    """Give up root's capabilities, so that file permissions bind it as they bind anybody."""
    version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version, nothing) == 0


def nan_in_batch(n):
    """The n-th batch, counted over all epochs, is not numbers."""
    real, count = training.batches, itertools.count(1)

    def batches(*arguments):
        for images, labels, weight in real(*arguments):
            yield images * (float("nan") if next(count) == n else 1.0), labels, weight

    training.batches = batches
