"""Checkpoints: atomic save, checked load."""

import io
import zipfile
from pathlib import Path

import torch

from crate.cli import InputError
from crate.files import atomic_write, read_json
from crate.model import model_from_config
from crate.runs import first_difference


def save_checkpoint(path, content):
    """Write `content` (a dict of tensors and plain types) to `path`: the old file stays until the new one is whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. Raises InputError where the file is missing, damaged or foreign.

    The file is a zip archive with a CRC-32 of each of its parts; torch.load doesn't compare them, so it is done here.
    """
    try:
        stream = io.BytesIO(Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(stream) and zipfile.ZipFile(stream).testzip():
            raise zipfile.BadZipFile
        stream.seek(0)
        content = torch.load(stream, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever zipfile and the unpickler make of arbitrary bytes
        raise InputError(f"{path}: damaged or not a checkpoint ({type(error).__name__}); delete it to start the run again")
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint of this project: it holds no dict")
    return content


def load_weights(model, path, config):
    """Load the entry "model" of a run's checkpoint `path` into `model`. Returns the checkpoint.

    Raises InputError where it is broken or belongs to another run than that of `config`.
    """
    content = load_checkpoint(path)
    if not isinstance(content.get("config"), dict):
        raise InputError(f"{path}: not a checkpoint of this project, or made by an older version of it; choose another --out")
    if difference := first_difference(content["config"], config):
        key, there, here = difference
        raise InputError(f"{path}: {key} is {there} in it but {here} in config.json: one was changed, or is another run's")
    try:
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError):
        raise InputError(f"{path}: its weights don't fit the model in config.json")
    return content


def load_run(folder, device="cpu"):
    """A run's config and its trained model, in eval mode. Raises InputError where either file is missing or malformed."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    try:
        model = model_from_config(config)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: {error} is missing or malformed")
    epoch, result = load_weights(model, folder / "last.pt", config).get("epoch"), folder / "result.json"
    ended = read_json(result).get("epochs") if result.exists() else epoch
    if epoch is None or epoch != ended:
        raise InputError(f"{folder / 'last.pt'}: of epoch {epoch}, but result.json says {ended}; restore either")
    return config, model.to(device).eval()
