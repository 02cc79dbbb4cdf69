"""What the scripts share: errors in one line with exit code 2, checked numbers, several processes, files written whole."""

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path


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
    line = " ".join(str(error).split()) or type(error).__name__
    return line if str(path) in line else f"{path}: {line}"


def run(main):
    """Call `main()` and exit with the code that it returns.

    InputError, failed file operations and lack of memory become one line on stderr and code 2; a signal that asks to end, from
    a keyboard, a terminal that closes (but for nohup) or a cluster, a line and code 128 + its number.
    """
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]  # a shell script's jobs start without SIGINT
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)

    def stop(number, frame):
        for name in signals:  # a second one would come in the middle of the clean-up
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    for name in signals:
        signal.signal(name, stop)
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt as interrupt:
        number = signal.Signals(interrupt.args[0])
        code, message = 128 + number, f"stopped by {number.name}; run the same command again to go on"
    except (InputError, OSError, MemoryError) as error:
        code, message = 2, f"error: {one_line(error)}"
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")  # in one piece, where several processes write
    sys.exit(code)


def number(kind, low=-math.inf, *, above=-math.inf, below=math.inf):
    """An argparse `type`: a finite int or float, at least `low`, and between `above` and `below`."""

    def parse(text):
        value = kind(text)
        if not (low <= value and above < value < below):
            bounds = {">=": low, ">": above, "<": below}
            wanted = [f"{sign} {bound}" for sign, bound in bounds.items() if math.isfinite(bound)] or ["finite"]
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {' and '.join(wanted)}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid float value"
    return parse


def path(text):
    """An argparse `type`: a path, `~` included, which the shell leaves alone in --out=~/runs."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user")


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(jobs, work, *arguments):
    """work(job, *arguments) in `jobs` processes, this one being job 0: the largest exit code. The others end with this one,
    however it ends. Each takes its share of the cores as threads at most, whatever OMP_NUM_THREADS says.
    """
    import torch  # takes two seconds, which correlate.py doesn't need

    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // jobs)))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the others inherit it
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_other, args=(work, job, *arguments), daemon=True) for job in range(1, jobs)]
    for process in others:
        process.start()
    code = work(0, *arguments)
    for process in others:
        process.join()
    return max(code, *(abs(process.exitcode) for process in others), 0)


def _other(work, *arguments):
    def end_with_the_first():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_the_first, daemon=True).start()
    run(lambda: work(*arguments))


def write_bytes(path, content):
    """Write to a temporary file, flush it to disk, rename it: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path))
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_bytes(path, text.encode(errors="surrogateescape"))  # a path may hold other bytes than UTF-8's


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})")


def markdown_table(header, rows):
    """A table in Markdown: `header` and each row are sequences of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)
