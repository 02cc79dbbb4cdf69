"""Checkpoints: atomic save, checked load."""

import pickle
import zipfile
from pathlib import Path

import torch

from crate.cli import InputError
from crate.files import atomic_write, read_json
from crate.model import model_from_config


def save_checkpoint(path, content):
    """Write `content` (tensors and plain types) to `path`: the old file stays until the new one is whole."""
    atomic_write(path, lambda stream: torch.save(content, stream))


def load_checkpoint(path, device="cpu"):
    """What save_checkpoint wrote. Raises InputError where the file is missing, truncated or foreign."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except PermissionError:
        raise
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise InputError(f"{path}: truncated or not a checkpoint ({type(error).__name__}); delete it to start the run again")
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint of this project: it holds no dict")
    return content


def load_weights(model, path, device="cpu"):
    """Load the entry "model" of the checkpoint `path` into `model`. Returns the checkpoint; raises InputError."""
    content = load_checkpoint(path, device)
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
    load_weights(model, folder / "last.pt", device)
    return config, model.to(device).eval()
