"""What the scripts share: one-line errors with exit code 2, checked numbers, output folders.

Imports no torch, so that `--help` and every complaint about a flag answer at once.
"""

import argparse
import math
import os
import sys
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that says what, and what would be right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and whose help shows the script's docstring as it is written."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def cores():
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(main):
    """Call `main()`; turn an InputError or a failed file operation into one line on stderr and exit code 2."""
    try:
        sys.exit(main())
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def number(kind, low=-math.inf, high=math.inf, *, above=-math.inf, below=math.inf):
    """An argparse `type`: a finite int or float in [low, high] and in (above, below)."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}")
        bounds = [f">= {low}" * (low > -math.inf), f"> {above}" * (above > -math.inf)]
        bounds += [f"<= {high}" * (high < math.inf), f"< {below}" * (below < math.inf)]
        if not (math.isfinite(value) and low <= value <= high and above < value < below):
            wanted = " and ".join(filter(None, bounds)) or "finite"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {wanted}")
        return value

    return parse


def output_folder(path, flag="--out"):
    """Create the folder `path` if need be and return it as a Path. Raises InputError where it can't be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}; name a folder that can be written")
    if not writable:
        raise InputError(f"{flag} {path}: no permission to write; name a folder that can be written")
    return path
