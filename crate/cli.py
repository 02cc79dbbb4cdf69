"""What the scripts share: errors in one line with exit code 2, checked numbers, output folders, several processes at once."""

import argparse
import errno
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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
    # SIGINT too: a shell script starts what it puts into the background with SIGINT ignored.
    previous = {number: signal.signal(number, _terminated) for number in (signal.SIGINT, signal.SIGTERM)}
    code, message = 0, None
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
        code, message = 128 + number, f"stopped by {number.name}; run the same command again to go on"
    except (InputError, OSError, MemoryError) as error:
        code, message = 2, f"error: {one_line(error)}"
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        code, message = 2, f"error: {one_line(error)}"
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
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


def output_folder(folder, flag="--out"):
    """Create `folder` if need be and return it as a Path. Raises InputError where it can't be written."""
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write")
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}; name a folder that can be written")
    return folder


def cores():
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def threads_of(jobs):
    """How many threads each of `jobs` processes takes: OMP_NUM_THREADS where it is a number, else its share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, cores() // jobs)


@contextmanager
def copies(jobs, gpus):
    """Start this script's command jobs - 1 more times, and wait for these processes at the end of the block.

    The runs' locks divide the work between them. gpus: how many GPUs to spread them and this process over, 0 for none.
    Yields a list of their exit codes, which is filled at the end of the block.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    processes, codes = [], []
    for job in range(1, 1 if COPY else jobs):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads_of(jobs)), "TQDM_DISABLE": "1", "CRATE_COPY": "1"}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = visible[job % gpus]
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    try:
        yield codes
        ended = [process.wait() for process in processes]
        codes += [128 - code if code < 0 else code for code in ended]  # as a shell says that a signal ended it
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
