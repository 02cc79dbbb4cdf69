"""Files that are written whole or not at all, tables, and checkpoints that are checked when they are read."""

import io
import json
import os
import zipfile
from pathlib import Path

import torch

from crate.cli import InputError


def write_bytes(path, content):
    """Write bytes to a temporary file beside `path`, flush it to disk, then rename it: a reader sees the old file or the new
    one, never half of one. Raises OSError that names `path`.
    """
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
    write_bytes(path, text.encode(errors="surrogateescape"))  # a path may hold other bytes than UTF-8's


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The JSON object in `path`. Raises InputError where it is missing or malformed."""
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})")
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def markdown_table(header, rows):
    """A table in Markdown: `header` and each row are sequences of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def save_checkpoint(path, content):
    """Write `content`, a dict of tensors and plain types, to `path`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path):
    """The dict in a checkpoint, on the CPU. Raises InputError where the file is missing, damaged, or holds something else."""
    try:
        # The file is a zip archive with a CRC-32 of each of its parts, which torch.load doesn't compare.
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except Exception as error:  # whatever zipfile and the unpickler make of arbitrary bytes
        what = "damaged, or not a checkpoint of tensors and plain types alone, such as a state_dict"
        raise InputError(f"{path}: {what} ({type(error).__name__})")
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return content
