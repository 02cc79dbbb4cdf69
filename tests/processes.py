"""Real processes for the tests of faults: scripts started as a user would, in children that are forked from a server which
has torch loaded, so that each starts in a tenth of a second and can be killed."""

import ctypes
import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from crate import data, training
from crate.cli import run

torch.set_num_threads(1)
CONTEXT = multiprocessing.get_context("forkserver")
# An optimizer imports torch._dynamo, which takes longer than these runs.
CONTEXT.set_forkserver_preload(["pytest", "tests.processes", "train", "crate.provenance", "torch._dynamo"])


def _child(script, arguments, output, fault):
    os.setsid()  # a group of its own: a signal can be sent to it and its workers together
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for standard in (1, 2):
        os.dup2(stream, standard)
    os.sched_getaffinity = lambda pid: {0}  # one thread
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [f"{script}.py", *map(str, arguments)]
    if fault:
        function, *its_arguments = fault
        function(*its_arguments)
    run(importlib.import_module(script).main)


class Script:
    """A started script; `fault`, a function and its arguments, is called in its process before it begins."""

    def __init__(self, script, *arguments, output, fault=()):
        self.output = Path(output)
        self.process = CONTEXT.Process(target=_child, args=(script, arguments, str(output), fault))
        self.process.start()

    def kill(self, number=signal.SIGKILL, group=False):
        try:
            (os.killpg if group else os.kill)(self.process.pid, number)
        except ProcessLookupError:
            pass

    def wait(self, seconds=60):
        """Exit code, standard output and error. A process that does not end is a failure."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"a hang: not ended after {seconds} s: {self.text()}")
        return self.process.exitcode, self.text()

    def text(self):
        return self.output.read_text() if self.output.exists() else ""


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Faults: called in the script's process before it begins, with the arguments that follow them in `fault`.


def kill_at_write(n, point):
    """The n-th write of a file ends in SIGKILL: half written, whole but not renamed ("before"), or just renamed."""
    fsync, replace, writes = os.fsync, os.replace, itertools.count(1)
    current = None

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def fsync_or_die(descriptor):
        nonlocal current
        current = next(writes)
        if current == n and point == "half":
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        fsync(descriptor)

    def replace_or_die(source, target):
        if current == n and point == "before":
            die()
        replace(source, target)
        if current == n:
            die()

    os.fsync, os.replace = fsync_or_die, replace_or_die


def limit_file_size(size):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def give_up_privileges():
    """Give up root's capabilities, so that file permissions bind it as they bind anybody."""
    version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version, nothing) == 0


def nan_in_batch(n):
    """The images of training step n are not numbers."""
    real = training.Run.train_step

    def step(run, images, *rest):
        return real(run, images * (float("nan") if run.step + 1 == n else 1.0), *rest)

    training.Run.train_step = step


def forget_an_error():
    """A training step raises what nobody foresaw."""

    def step(run, *rest):
        raise KeyError("unforeseen")

    training.Run.train_step = step


def kill_loader(n):
    """The process that augments images dies at its n-th batch."""
    real, batches = data._Augmentation.__getitem__, itertools.count(1)

    def item(augmentation, index):
        if next(batches) == n:
            os._exit(1)
        return real(augmentation, index)

    data._Augmentation.__getitem__ = item


def unsettle_clock():
    """The time of day jumps by years, back and forth."""
    jumps, real = itertools.cycle([-1e9, 5e8, 0.0, 1e9]), time.time
    time.time = lambda: real() + next(jumps)
