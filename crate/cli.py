"""What the scripts share: one-line errors with exit code 2, signals, checked numbers, output folders.

Imports no torch, so that `--help` and every complaint about a flag answer at once.
"""

import argparse
import errno
import math
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that says what, and what would be right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and whose help shows the script's docstring as it is written."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Interrupted(KeyboardInterrupt):
    """A SIGINT or SIGTERM, `signal`, that came at a moment where nothing was lost by it."""

    def __init__(self, number):
        super().__init__(number)
        self.signal = signal.Signals(number)


def _interrupt(number, frame):
    raise Interrupted(number)


@contextmanager
def deferred_signals():
    """Hold back SIGINT and SIGTERM: yields the list of those that came, and raises Interrupted at the end if there are any."""
    received = []
    # No other thread than the main one may set a handler.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(received[0])


def one_line(error, path=""):
    """An exception or a message, in one line that names `path`; that of a failed file operation names the file."""
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    line = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    return line if str(path) in line else f"{path}: {line}"


def run(main):
    """Call `main()` and exit: with code 2 and one line on stderr for an InputError or a failed file operation, with 130 or
    143 and a line for SIGINT or SIGTERM."""
    name = Path(sys.argv[0]).name
    # Of SIGINT too: a shell script starts what it puts into the background with SIGINT ignored.
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code, message = main(), None
    except BrokenPipeError:  # `train.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = 128 + signal.SIGPIPE, None
    except (InputError, OSError) as error:
        code, message = 2, f"error: {one_line(error)}"
    except KeyboardInterrupt as error:
        number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        code, message = 128 + number, f"stopped by {number.name}; run the same command again to go on"
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if message:
        sys.stderr.write(f"{name}: {message}\n")  # in one piece, where several processes write
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


def output_folder(path, flag="--out"):
    """Create the folder `path` if need be and return it as a Path. Raises InputError where it can't be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write")
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}; name a folder that can be written")
    return path
