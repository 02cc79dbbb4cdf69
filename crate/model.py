"""The image classifier built from CRATE layers, and the import of released CRATE checkpoints."""

import math
import re

import torch
from torch import nn
from torch.nn import functional as F

from crate.cli import InputError
from crate.config import VARIANT_TABLE
from crate.layers import Layer, dropout

VARIANTS = {name: row[-1] for name, row in VARIANT_TABLE.items()}


class CRATE(nn.Module):
    """Patches -> tokens (LayerNorm, Linear, LayerNorm), CLS token, learnable positions, L layers, head on CLS.

    Dropout sits after the positions, after the softmax and after MSSA's output projection (Section 5).
    Images are (B, C, H, W) with H = W = image_size; a patch is flattened as (row, column, channel).
    `options` are those of crate.layers.Layer.
    """

    def __init__(self, name, *, image_size, patch_size, channels, classes, width, depth, heads, dropout=0.0, **options):
        super().__init__()
        patch_dim, tokens = patch_size**2 * channels, (image_size // patch_size) ** 2
        self.patch_size, self.heads, self.dropout = patch_size, heads, dropout
        self.patch_embedding = nn.Sequential(nn.LayerNorm(patch_dim), nn.Linear(patch_dim, width), nn.LayerNorm(width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.layers = nn.ModuleList([Layer(name, width=width, heads=heads, dropout=dropout, **options) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def embed(self, images):
        """(B, C, H, W) -> Z^0 (B, N + 1, d), the CLS token first."""
        patches = F.pixel_unshuffle(images, self.patch_size)  # (B, C p p, H/p, W/p), channel slowest
        patches = patches.unflatten(1, (images.shape[1], -1)).flatten(3)  # (B, C, p p, N)
        patches = patches.permute(0, 3, 2, 1).flatten(2)  # (B, N, p p C)
        tokens = self.patch_embedding(patches)
        cls = self.cls_token.expand(len(tokens), -1, -1)
        tokens = torch.cat([cls, tokens], dim=1) + self.pos_embedding
        return dropout(tokens, self.dropout if self.training else 0.0)

    def forward_with_outputs(self, images):
        """Logits (B, classes) and the L layer outputs Z^1..Z^L, each (B, N + 1, d), in one pass."""
        tokens, outputs = self.embed(images), []
        for layer in self.layers:
            tokens = layer(tokens)
            outputs.append(tokens)
        return self.head(tokens[:, 0]), outputs

    def layer_outputs(self, images):
        """Z^1..Z^L, each (B, N + 1, d)."""
        return self.forward_with_outputs(images)[1]

    def forward(self, images):
        """Logits (B, classes). The head reads CLS alone, so the last layer makes no other token."""
        tokens = self.embed(images)
        for layer in self.layers[:-1]:
            tokens = layer(tokens)
        return self.head(self.layers[-1](tokens, first=1)[:, 0])


def build_model(name, *, image_size, patch_size, channels, classes, width, depth, heads, dropout=0.0, **options):
    """A randomly initialised model of VARIANTS. Raises InputError where the name is unknown or sizes don't fit.

    `options`: temperature of the softmax, step size beta and sparsity lambda of ISTA (crate.layers.Layer).
    """
    if name not in VARIANTS:
        raise InputError(f"--model {name}: unknown; choose from {', '.join(VARIANTS)}")
    if heads < 1 or width % heads:
        raise InputError(f"--width {width} is not divisible by --heads {heads}")
    if patch_size < 1 or image_size % patch_size:
        raise InputError(f"--image-size {image_size} is not divisible by --patch-size {patch_size}")
    if not 0 <= dropout < 1:
        raise InputError(f"--dropout {dropout}: must be at least 0 and below 1")
    return CRATE(
        name, image_size=image_size, patch_size=patch_size, channels=channels, classes=classes,
        width=width, depth=depth, heads=heads, dropout=dropout, **options,
    )  # fmt: skip


def model_from_config(config):
    """The model that a run's config.json describes."""
    sizes = ("image_size", "patch_size", "channels", "classes", "width", "depth", "heads", "dropout")
    options = {"temperature": config["temperature"], "beta": config["ista_beta"], "sparsity": config["ista_lambda"]}
    return build_model(config["model"], **{key: config[key] for key in sizes}, **options)


# The released CRATE's parameter names, in terms of ours.
RELEASED = {
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


def from_released_crate(state_dict, heads):
    """The model a released CRATE checkpoint describes; its sizes are read off the weights.

    `state_dict` maps the released names to tensors; an entry "state_dict" is unwrapped, a prefix "module." dropped.
    Raises InputError where a name is missing or unknown or a shape doesn't fit.
    """
    renamed = {}
    for name, tensor in state_dict.get("state_dict", state_dict).items():
        name = name.removeprefix("module.")
        for pattern, ours in RELEASED.items():
            name = re.sub("^" + pattern, ours, name)
        renamed[name] = tensor
    try:
        _, patch_dim = renamed["patch_embedding.1.weight"].shape
        _, tokens, width = renamed["pos_embedding"].shape
        classes, _ = renamed["head.1.weight"].shape
        if min(patch_dim, width, classes, tokens - 1) < 1:
            raise ValueError("a size")
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"not a released CRATE checkpoint: {error} is missing or malformed")
    channels = 3 if math.isqrt(patch_dim // 3) ** 2 * 3 == patch_dim else 1  # 3 p^2 is never a square
    patch_size = math.isqrt(patch_dim // channels)
    depth = len({name.split(".")[1] for name in renamed if name.startswith("layers.")})
    model = build_model(
        "crate", image_size=patch_size * math.isqrt(tokens - 1), patch_size=patch_size, channels=channels,
        classes=classes, width=width, depth=depth, heads=heads,
    )  # fmt: skip
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise InputError("not a released CRATE checkpoint: " + " ".join(str(error).split()))
    return model
