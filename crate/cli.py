"""What the scripts share: errors in one line with exit code 2, checked numbers, several processes at once."""

import argparse
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

COPY = "CRATE_COPY" in os.environ  # this process was started by `copies`: another one plans, and writes what is common


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what is wrong, and what would be right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help begins with the script's docstring."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def one_line(error, path=""):
    """An exception or a message in one line that names `path`; a failed file operation names its file."""
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    line = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    if str(path) in line:
        return line
    return f"{path}: {line}"


def _terminated(number, frame):
    raise KeyboardInterrupt(number)


def run(main):
    """Call `main()` and exit with the code that it returns.

    InputError, failed file operations and lack of memory become one line on stderr and code 2, SIGINT and SIGTERM a line and
    code 130 or 143.
    """
    # SIGINT too: a shell script starts what it puts into the background with SIGINT ignored.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, _terminated)
    code, message = 0, None
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
        code, message = 128 + number, f"stopped by {number.name}; run the same command again to go on"
    except (InputError, OSError, MemoryError) as error:
        code, message = 2, f"error: {one_line(error)}"
    if message:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")  # in one piece, where several processes write
    sys.exit(code)


def number(kind, low=-math.inf, high=math.inf, *, above=-math.inf, below=math.inf):
    """An argparse `type`: a finite int or float in [low, high] and in (above, below)."""
    bounds = {">=": low, ">": above, "<=": high, "<": below}
    wanted = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items() if math.isfinite(bound)) or "finite"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}")
        if not (low <= value <= high and above < value < below and abs(value) < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {wanted}")
        return value

    return parse


def path(text):
    """An argparse `type`: a path, `~` included, which the shell leaves alone in --out=~/runs."""
    return Path(text).expanduser()


@contextmanager
def copies(jobs, gpus):
    """Start this script's command jobs - 1 more times, and wait for these processes at the end of the block.

    The runs' locks divide the work between them. Each process takes its share of the CPU's threads, or as many as
    OMP_NUM_THREADS says. gpus: how many GPUs to spread them and this process over, 0 for none. Yields a list of their exit
    codes, which is filled at the end of the block.
    """
    import torch  # takes two seconds, which correlate.py doesn't need

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    common = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CRATE_COPY": "1"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    processes, codes = [], []
    for job in range(1, 1 if COPY else jobs):
        own = {"CUDA_VISIBLE_DEVICES": visible[job % gpus]} if gpus else {}
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | common | own))
    try:
        yield codes
        ended = [process.wait() for process in processes]
        codes += [128 - code if code < 0 else code for code in ended]  # as a shell says that a signal ended it
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
