"""The variants, one CRATE layer (Eqs. 2-4, 8-10), and the image classifier made of such layers.

A layer compresses by MSSA, then sparsifies by ISTA. Tokens are rows, (B, N, d): the transpose of the paper's Z.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from crate.kernels import dropout, full_precision, self_attention, subspace_gradient
from crate.rates import merge_heads, split_heads


class Variant(NamedTuple):
    """A model type, Y = Z + step (output matrix) (attention), then Z' = sparsification of Y, LayerNorm before each."""

    step: float  # its size, and its sign
    attention: str  # a key of ATTENTION
    output: str  # "U" or "U^T" (tied), "W" (learned), "random" (fixed) or "I"
    sparsification: str  # "ISTA" or "MLP"
    description: str


VARIANTS = {
    "crate-c": Variant(+1, "U", "U", "ISTA", "CRATE-C(onceptual), Eq. 8: Z + MSSA(Z; U), output matrix U, tied"),
    "crate-n": Variant(-1, "U", "U", "ISTA", "CRATE-N(egative), Eq. 9: Z - MSSA(Z; U), output matrix U, tied"),
    "crate-t": Variant(+1, "U", "U^T", "ISTA", "CRATE-T(ranspose), Eq. 10: output matrix U^T, tied"),
    "crate": Variant(+1, "U", "W", "ISTA", "CRATE: output matrix W, learned (with bias, as released)"),
    "crate-fix": Variant(+1, "U", "random", "ISTA", "CRATE-Fix, Table 3: output matrix random and fixed"),
    "crate-identity": Variant(+1, "U", "I", "ISTA", "CRATE-Identity, Table 3: output matrix I"),
    "crate-e": Variant(-1, "exact", "U", "ISTA", "CRATE-E(xact), not in the paper: the gradient step on R^c of Eq. 6"),
    "vit": Variant(+1, "QKV", "W", "MLP", "ViT, not in the paper: a standard pre-norm transformer, MLP ratio 4"),
}


# What attends: functions of (mssa, tokens (B, N, d), drop) that give the K heads' results (B, K, N, p). An attention weight is
# dropped with probability `drop`.


def subspace_attention(mssa, tokens, drop):
    """Eq. 4: V_k softmax(V_k^T V_k) with V_k = U_k^T Z."""
    return self_attention(split_heads(mssa.U(tokens), mssa.heads), mssa.scale, drop)


def exact_step(mssa, tokens, drop):
    """What the exact gradient of R^c has in its place (Eq. 6): gamma (I + gamma V_k V_k^T)^{-1} V_k. No softmax, no dropout."""
    return subspace_gradient(split_heads(mssa.U(tokens), mssa.heads))


def standard_attention(mssa, tokens, drop):
    """A standard transformer's, whose query matrix is U. Second derivatives: see kernels.self_attention."""
    query, key, value = (split_heads(matrix(tokens), mssa.heads) for matrix in (mssa.U, mssa.key, mssa.value))
    return F.scaled_dot_product_attention(query, key, value, dropout_p=drop, scale=mssa.scale)


ATTENTION = {"U": subspace_attention, "exact": exact_step, "QKV": standard_attention}


class MSSA(nn.Module):
    """Multi-head subspace self-attention (Eq. 4): V_k = U_k^T Z attends to itself, an output matrix merges the heads.

    attention: a key of ATTENTION. output: as in Variant. temperature: what divides the argument of the softmax, "sqrt-p" as in
    the released CRATE, or "none" as Eq. 4 is written.
    """

    def __init__(self, *, width, heads, output, attention="U", dropout=0.0, temperature="sqrt-p"):
        super().__init__()
        if output not in ("U", "U^T", "W", "random", "I"):
            raise ValueError(f"output matrix {output} is unknown; choose from U, U^T, W, random, I")
        self.heads, self.output, self.dropout = heads, output, dropout
        self.attend = ATTENTION[attention]
        self.scale = (width // heads) ** -0.5 if temperature == "sqrt-p" else 1.0
        # nn.Linear applies its weight to each token, and the weight is U^T, its rows grouped by head: self.U(tokens) is the
        # paper's U^T z, and `stacked @ self.U.weight`, the other way round, is U times the stacked heads.
        self.U = nn.Linear(width, width, bias=False)
        if attention == "QKV":
            self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.W = nn.Linear(width, width) if output == "W" else None
        if output == "random":
            self.register_buffer("fixed", nn.Linear(width, width, bias=False).weight.detach())

    def project(self, stacked):
        """The output matrix times the heads side by side, (B, N, d)."""
        if self.output == "U":
            return stacked @ self.U.weight
        if self.output == "U^T":
            return self.U(stacked)
        if self.output == "W":
            return self.W(stacked)
        if self.output == "random":
            return F.linear(stacked, self.fixed)
        return stacked

    def forward(self, tokens):
        """(B, N, d) -> (B, N, d)."""
        drop = self.dropout if self.training else 0.0
        attended = self.attend(self, tokens, drop)  # (B, K, N, p)
        return dropout(self.project(merge_heads(attended)), drop)


class ISTA(nn.Module):
    """One step of ISTA (Eq. 3): ReLU(Y + beta D^T (Y - D Y) - beta lambda 1), with beta and lambda of the released CRATE.

    Y + beta D^T (Y - D Y) = M Y with M = I + beta D^T (I - D): one matrix per step, one product per token.
    """

    def __init__(self, width, ista_beta=0.1, ista_lambda=0.1):
        super().__init__()
        self.beta, self.threshold = ista_beta, ista_beta * ista_lambda
        self.D = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(width, width)))

    def matrix(self):
        """M (d, d), in the parameter's precision whatever autocast says."""
        identity = torch.eye(len(self.D), dtype=self.D.dtype, device=self.D.device)
        with full_precision(self.D.device.type):
            return identity + self.beta * (self.D.mT @ (identity - self.D))

    def forward(self, tokens):
        return F.relu(F.linear(tokens, self.matrix(), self.D.new_full((len(self.D),), -self.threshold)))


class Layer(nn.Module):
    """Y = Z + step MSSA(LN(Z)) (Eq. 8: step 1; Eq. 9: step -1), Z' = ISTA(LN(Y)) (Eq. 3); alpha = gamma = 1.

    In vit, Z' = Y + MLP(LN(Y)).
    """

    def __init__(self, variant, *, width, heads, dropout=0.0, temperature="sqrt-p", **ista):
        super().__init__()
        self.step = variant.step
        self.norm1 = nn.LayerNorm(width)
        self.mssa = MSSA(
            width=width, heads=heads, output=variant.output, attention=variant.attention,
            dropout=dropout, temperature=temperature,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(width)
        self.ista = ISTA(width, **ista) if variant.sparsification == "ISTA" else None
        if variant.sparsification == "MLP":
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def compress(self, tokens):
        """Z -> Y (Eq. 2), (B, N, d)."""
        return torch.add(tokens, self.mssa(self.norm1(tokens)), alpha=self.step)

    def sparsify(self, tokens):
        """Y -> Z' (Eq. 3), (B, N, d)."""
        if self.ista:
            return self.ista(self.norm2(tokens))
        return tokens + self.mlp(self.norm2(tokens))

    def forward(self, tokens):
        """(B, N, d) -> (B, N, d)."""
        return self.sparsify(self.compress(tokens))


class Classifier(nn.Module):
    """Patches -> tokens (LayerNorm, Linear, LayerNorm), CLS token, learnable positions, L layers, head on CLS.

    Dropout sits after the positions, after the softmax and after MSSA's output projection (Section 5).
    Images are (B, C, H, W) with H = W = image_size; a patch is flattened as (row, column, channel).
    """

    def __init__(self, variant, *, image_size, patch_size, channels, classes, width, depth, heads, dropout=0.0, **options):
        super().__init__()
        patch_dim, tokens = patch_size**2 * channels, (image_size // patch_size) ** 2
        self.patch_size, self.heads, self.dropout = patch_size, heads, dropout
        self.patch_embedding = nn.Sequential(nn.LayerNorm(patch_dim), nn.Linear(patch_dim, width), nn.LayerNorm(width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.layers = nn.ModuleList(
            [Layer(variant, width=width, heads=heads, dropout=dropout, **options) for _ in range(depth)]
        )
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

    def layer_outputs(self, images):
        """Z^1..Z^L, each (B, N + 1, d)."""
        outputs = [self.embed(images)]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return outputs[1:]

    def forward(self, images):
        """Logits (B, classes), from the CLS token."""
        tokens = self.embed(images)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens[:, 0])


def build_model(name, *, image_size, patch_size, channels, classes, width, depth, heads, dropout=0.0, **options):
    """A randomly initialised model of VARIANTS.

    options: temperature of the softmax ("sqrt-p" or "none"), ista_beta and ista_lambda, the step size and lambda of ISTA.
    Raises ValueError where the name is unknown or sizes don't fit.
    """
    if name not in VARIANTS:
        raise ValueError(f"model {name} is unknown; choose from {', '.join(VARIANTS)}")
    if heads < 1 or width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}")
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(f"image size {image_size} is not divisible by patch size {patch_size}")
    if depth < 1:
        raise ValueError(f"depth {depth}: there must be at least one layer")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: must be at least 0 and below 1")
    return Classifier(
        VARIANTS[name], image_size=image_size, patch_size=patch_size, channels=channels, classes=classes,
        width=width, depth=depth, heads=heads, dropout=dropout, **options,
    )  # fmt: skip
