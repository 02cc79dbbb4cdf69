"""Small text files, written atomically: a reader sees the old file or the new one, never half of one. No torch."""

import csv
import fcntl
import json
import os
import socket
import time
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

from crate.cli import InputError


def atomic_write(path, content):
    """Write bytes to a temporary file beside `path`, flush it to disk, then rename it. Raises OSError that names `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, for one, which names no file
        raise OSError(error.errno, error.strerror, str(path))
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    atomic_write(path, text.encode())


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def locked(folder):
    """Hold `folder` for this process alone. Raises InputError where another holds it, on this machine or, where the file
    system is shared, on another.

    A POSIX lock: it ends with the process, however that ends, and workers forked from the process don't inherit it.
    """
    path = Path(folder) / ".lock"
    with open(path, "a+") as stream:
        for attempt in range(10):  # `lock_holder` may have it for an instant
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                time.sleep(0.05)
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; name an --out on a file system that can lock files")
        else:
            raise InputError(f"{folder}: another process works on it ({path.read_text().strip()}); wait or stop it")
        stream.truncate(0)
        stream.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
        stream.flush()
        yield


def lock_holder(folder):
    """Who holds `folder` ("host .., process .."), or None."""
    with suppress(FileNotFoundError), open(Path(folder) / ".lock") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return stream.read().strip()


def read_json(path):
    """The JSON object in `path`. Raises InputError if it is missing or malformed."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})")
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def write_csv(path, rows):
    """Rows (dicts) as CSV; the columns are the union of the keys in order of first appearance; floats keep every digit."""
    text, columns = StringIO(newline=""), dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")  # what a row lacks is an empty cell
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path):
    """The rows of a CSV file with a header, as dicts of strings. Raises InputError if there is no such table."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns, rows = reader.fieldnames, list(reader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV table ({error})")
    if not columns or not rows:
        raise InputError(f"{path}: the table is empty; expected a header line and at least one row")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {line} has another number of fields than the header's {len(columns)}")
    return rows


def markdown_table(header, rows):
    """A table in Markdown: `header` and each row are sequences of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
