"""One CRATE layer: compression by MSSA (Eqs. 2, 4, 8-10), then sparsification by ISTA (Eq. 3). Tokens are (B, N, d)."""

import torch
import torch.nn.functional as F
from torch import nn

from crate.config import VARIANT_TABLE
from crate.rates import full_precision, merge_heads, split_heads


def subspace_attention(V, scale=1.0, dropout=0.0):
    """V_k softmax(scale V_k^T V_k) per head (inside Eq. 4) of V (..., K, N, p): the same shape.

    Query, key and value are the same V. `dropout` is the probability with which an attention weight is dropped.
    """
    weights = torch.softmax((scale * V) @ V.mT, dim=-1)  # (..., K, N, N); row n holds the weights of output token n
    return F.dropout(weights, dropout) @ V if dropout else weights @ V


class MSSA(nn.Module):
    """Multi-head subspace self-attention (Eq. 4): heads V_k = U_k^T Z attend to themselves, an output matrix merges them.

    `output` is the output matrix: "U" (tied), "U^T" (tied), "W" (learned), "random" (fixed) or "I".
    The softmax has temperature p^{-1/2}, as in the released CRATE.
    """

    def __init__(self, *, width, heads, output, dropout=0.0):
        super().__init__()
        self.heads, self.output, self.dropout = heads, output, dropout
        self.scale = (width // heads) ** -0.5
        self.U = nn.Linear(width, width, bias=False)  # weight = [U_1 .. U_K]^T
        self.W = nn.Linear(width, width) if output == "W" else None
        if output == "random":
            self.register_buffer("fixed", nn.Linear(width, width, bias=False).weight.detach())

    def merge(self, heads):  # (B, N, d), heads side by side
        if self.output == "U":
            return heads @ self.U.weight
        if self.output == "U^T":
            return self.U(heads)
        if self.output == "W":
            return self.W(heads)
        return F.linear(heads, self.fixed) if self.output == "random" else heads

    def forward(self, tokens):
        dropout = self.dropout if self.training else 0.0
        V = split_heads(self.U(tokens), self.heads)  # (B, K, N, p)
        heads = merge_heads(subspace_attention(V, self.scale, dropout))
        return F.dropout(self.merge(heads), dropout, self.training)


class ISTA(nn.Module):
    """One step of ISTA (Eq. 3): ReLU(Y + beta D^T (Y - D Y) - beta lambda 1).

    Y + beta D^T (Y - D Y) = M Y with M = I + beta D^T (I - D): one matrix per step, one product per token.
    """

    beta = sparsity = 0.1  # step size beta and lambda of the released CRATE

    def __init__(self, width):
        super().__init__()
        self.D = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(width, width)))

    def matrix(self):
        """M = I + beta D^T (I - D), (d, d), in the parameter's precision whatever autocast says."""
        identity = torch.eye(len(self.D), dtype=self.D.dtype, device=self.D.device)
        with full_precision(self.D.device.type):
            return identity + self.beta * (self.D.mT @ (identity - self.D))

    def forward(self, tokens):
        threshold = self.D.new_full((len(self.D),), -self.beta * self.sparsity)
        return F.relu(F.linear(tokens, self.matrix(), threshold))


class Layer(nn.Module):
    """Y = Z + sign MSSA(LN(Z)) (Eq. 8; Eq. 9 with sign -1), Z' = ISTA(LN(Y)) (Eq. 3); alpha = gamma = 1."""

    def __init__(self, variant, *, width, heads, dropout=0.0):
        super().__init__()
        self.sign, output, _ = VARIANT_TABLE[variant]
        self.norm1 = nn.LayerNorm(width)
        self.mssa = MSSA(width=width, heads=heads, output=output, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.ista = ISTA(width)

    def compress(self, tokens):
        return torch.add(tokens, self.mssa(self.norm1(tokens)), alpha=self.sign)

    def forward(self, tokens):
        return self.ista(self.norm2(self.compress(tokens)))
