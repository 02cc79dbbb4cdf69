"""The import of released CRATE checkpoints."""

import math
import re

import torch

from crate.model import build_model

# ImageNet's, by which the released CRATE standardises colour images whatever the data set (its main.py, finetune.py).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The released CRATE's parameter names, in terms of ours.
RENAMED = {
    r"to_patch_embedding\.1\.": "patch_embedding.0.",
    r"to_patch_embedding\.2\.": "patch_embedding.1.",
    r"to_patch_embedding\.3\.": "patch_embedding.2.",
    r"transformer\.layers\.(\d+)\.0\.norm\.": r"layers.\1.norm1.",
    r"transformer\.layers\.(\d+)\.0\.fn\.qkv\.": r"layers.\1.mssa.U.",
    r"transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.": r"layers.\1.mssa.W.",
    r"transformer\.layers\.(\d+)\.1\.norm\.": r"layers.\1.norm2.",
    r"transformer\.layers\.(\d+)\.1\.fn\.weight$": r"layers.\1.ista.D",
    r"mlp_head\.": "head.",
}


def unwrap(checkpoint):
    """The weights in a checkpoint as training scripts save it, {name: tensor}.

    They are the dict itself, its entry "state_dict" or "model", or the only entry that has tensors; the prefixes "module."
    (DataParallel) and "_orig_mod." (torch.compile) are dropped. Raises ValueError where there are no weights, or several.
    """

    def tensors(entry):
        return {name: value for name, value in entry.items() if isinstance(value, torch.Tensor)}

    for entry in ("state_dict", "model"):
        if isinstance(checkpoint.get(entry), dict):
            checkpoint = checkpoint[entry]
    within = [tensors(entry) for entry in checkpoint.values() if isinstance(entry, dict) and tensors(entry)]
    weights = within[0] if len(within) == 1 and not tensors(checkpoint) else tensors(checkpoint)
    if not weights:
        raise ValueError(f"no weights in it, only {', '.join(map(str, list(checkpoint)[:5])) or 'an empty dict'}")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): tensor for name, tensor in weights.items()}


def from_released_crate(state_dict, heads):
    """The model that a released CRATE checkpoint describes; its sizes are read off the weights.

    state_dict: the released names -> tensors, or a checkpoint that holds it (see `unwrap`). Raises ValueError where a name is
    missing or unknown, or a shape doesn't fit.
    """
    weights = {}
    for name, tensor in unwrap(state_dict).items():
        for released, ours in RENAMED.items():
            name = re.sub("^" + released, ours, name)
        weights[name] = tensor
    try:
        _, patch_dim = weights["patch_embedding.1.weight"].shape
        _, tokens, width = weights["pos_embedding"].shape
        classes, _ = weights["head.1.weight"].shape
    except KeyError as error:
        raise ValueError(f"not a released CRATE checkpoint: it has no {error}, but {', '.join(list(weights)[:3])} ...")
    except ValueError:
        raise ValueError("not a released CRATE checkpoint: its patch embedding, positions or head have other shapes")
    if min(patch_dim, width, classes, tokens - 1) < 1:
        raise ValueError("not a released CRATE checkpoint: one of its weights is empty")
    channels = 3 if math.isqrt(patch_dim // 3) ** 2 * 3 == patch_dim else 1  # 3 p^2 is never a square
    patch_size = math.isqrt(patch_dim // channels)
    depth = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    model = build_model(
        "crate", image_size=patch_size * math.isqrt(tokens - 1), patch_size=patch_size, channels=channels,
        classes=classes, width=width, depth=depth, heads=heads,
    )  # fmt: skip
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError("not a released CRATE checkpoint: " + " ".join(str(error).split()))
    return model


def sizes(model):
    """Image size, channels and classes of a model of crate.model: three whole numbers."""
    tokens, patch_dim = model.pos_embedding.shape[1], model.patch_embedding[1].in_features
    return model.patch_size * math.isqrt(tokens - 1), patch_dim // model.patch_size**2, model.head[1].out_features
