"""One CRATE layer: compression by MSSA (Eqs. 2, 4, 8-10), then sparsification by ISTA (Eq. 3). Tokens are (B, N, d).

Beyond the paper: compression by the exact gradient (Eq. 6), and a standard transformer's layer.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from crate.config import VARIANT_TABLE
from crate.rates import full_precision, merge_heads, split_heads, subspace_gradient

LARGE = 80  # beyond so many tokens, and always on CUDA, the fused kernel that never writes the N x N weights is faster


def dropout_factors(tensor, p):
    """Dropout's random factors, of the tensor's shape and type: 0 with probability p, else 1 / (1 - p).

    Sixteen bits of a 64-bit draw decide on an element: many times faster than F.dropout on CPU, as are whole numbers in the
    place of truth values. p is rounded to a multiple of 2^-16, and the factor is that of the rounded p.
    """
    dropped = min(max(round(p * 2**16), 1), 2**16 - 1)
    draws = torch.empty(tensor.numel() // 4 + 1, dtype=torch.int64, device=tensor.device).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: tensor.numel()].view(tensor.shape)
    threshold = dropped - 2**15
    kept = bits.clamp(threshold - 1, threshold).sub_(threshold - 1)  # 0 or 1
    return kept.to(tensor.dtype).mul_(1 / (1 - dropped / 2**16))


def dropout(tensor, p):
    """Zero each element with probability p, scale the others by 1 / (1 - p)."""
    if tensor.is_cuda:  # one fused kernel there
        return F.dropout(tensor, p)
    return tensor * dropout_factors(tensor, p) if p else tensor


def _attend(V, scale, p):
    """The output of self-attention of V (b, N, p), with its weights (b, N, N) before and after dropout."""
    gram = torch.baddbmm(V.new_zeros(1, 1, 1), V, V.mT, beta=0, alpha=scale)
    weights = gram.softmax(dim=-1).to(V.dtype)  # a row per token of the output
    dropped = dropout(weights, p)
    return torch.bmm(dropped, V), weights, dropped


class _SelfAttention(torch.autograd.Function):
    """Attention whose query, key and value are one tensor: its gradient has the softmax's sum from the output, and is added up
    in place."""

    @staticmethod
    def forward(context, V, scale, p):
        output, weights, dropped = _attend(V, scale, p)
        context.save_for_backward(V, output, weights, dropped)
        context.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(context, upstream):
        V, output, weights, dropped = context.saved_tensors
        inner = (upstream * output).sum(-1, keepdim=True)  # (b, N, 1): the softmax's sum of weight times its gradient
        gram = torch.bmm(upstream, V.mT).mul_(dropped).addcmul_(weights, inner, value=-1)
        gradient = torch.bmm(dropped.mT, upstream)  # of V as value, then as query and as key
        gradient.baddbmm_(gram, V, alpha=context.scale).baddbmm_(gram.mT, V, alpha=context.scale)
        return gradient, None, None


def subspace_attention(V, scale=1.0, p=0.0):
    """V_k softmax(scale V_k^T V_k) per head (inside Eq. 4) of V (..., K, N, p): the same shape.

    `p` is the probability with which an attention weight is dropped.
    """
    if V.is_cuda or V.shape[-2] > LARGE or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(V, V, V, dropout_p=p, scale=scale)
    flat = V.flatten(0, -3)  # (b, N, p)
    output = _SelfAttention.apply(flat, scale, p) if torch.is_grad_enabled() else _attend(flat, scale, p)[0]
    return output.view(V.shape)


class MSSA(nn.Module):
    """Multi-head subspace self-attention (Eq. 4): heads V_k = U_k^T Z attend to themselves, an output matrix merges them.

    `heads_from` tells what the heads are: "U" (Eq. 4), "exact" (their part of the gradient of R^c, Eq. 6, which has no softmax,
    so none of its dropout) or "QKV" (standard attention, where U is the query matrix Q).
    `output` is the output matrix: "U" (tied), "U^T" (tied), "W" (learned), "random" (fixed) or "I".
    `temperature` of the softmax: "sqrt-p", as in the released CRATE, or "none", as Eq. 4 is written.
    """

    def __init__(self, *, width, heads, output, heads_from="U", dropout=0.0, temperature="sqrt-p"):
        super().__init__()
        self.heads, self.output, self.heads_from, self.dropout = heads, output, heads_from, dropout
        self.scale = (width // heads) ** -0.5 if temperature == "sqrt-p" else 1.0
        self.U = nn.Linear(width, width, bias=False)  # weight = [U_1 .. U_K]^T
        if heads_from == "QKV":
            self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
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

    def forward(self, tokens, first=None):
        """(B, N, d) -> (B, N, d), or (B, first, d): the first tokens alone, which still attend to all."""
        p = self.dropout if self.training else 0.0
        key = value = V = split_heads(self.U(tokens), self.heads)  # (B, K, N, p)
        if self.heads_from == "QKV":
            key, value = split_heads(self.key(tokens), self.heads), split_heads(self.value(tokens), self.heads)
        if self.heads_from == "exact":
            heads = subspace_gradient(V)[..., :first, :]
        elif self.heads_from == "U" and first is None:
            heads = subspace_attention(V, self.scale, p)
        else:
            heads = F.scaled_dot_product_attention(V[..., :first, :], key, value, dropout_p=p, scale=self.scale)
        return dropout(self.merge(merge_heads(heads)), p)


class ISTA(nn.Module):
    """One step of ISTA (Eq. 3): ReLU(Y + beta D^T (Y - D Y) - beta lambda 1).

    Y + beta D^T (Y - D Y) = M Y with M = I + beta D^T (I - D): one matrix per step, one product per token.
    """

    def __init__(self, width, beta=0.1, sparsity=0.1):  # step size beta and lambda of the released CRATE
        super().__init__()
        self.beta, self.sparsity = beta, sparsity
        self.D = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(width, width)))

    def matrix(self):
        """M = I + beta D^T (I - D), (d, d), in the parameter's precision whatever autocast says."""
        identity = torch.eye(len(self.D), dtype=self.D.dtype, device=self.D.device)
        with full_precision(self.D.device.type):
            return identity + self.beta * (self.D.mT @ (identity - self.D))

    def forward(self, tokens):
        threshold = self.D.new_full((len(self.D),), -self.beta * self.sparsity)
        return F.relu(F.linear(tokens, self.matrix(), threshold))


class MLP(nn.Sequential):
    """A standard transformer's second half: Linear, GELU, Linear with four times the width in between."""

    def __init__(self, width):
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Layer(nn.Module):
    """Y = Z + sign MSSA(LN(Z)) (Eq. 8; Eq. 9 with sign -1), Z' = ISTA(LN(Y)) (Eq. 3); alpha = gamma = 1.

    In vit, Z' = Y + MLP(LN(Y)).
    """

    def __init__(self, variant, *, width, heads, dropout=0.0, temperature="sqrt-p", beta=0.1, sparsity=0.1):
        super().__init__()
        self.sign, heads_from, output, sparsification, _ = VARIANT_TABLE[variant]
        self.norm1 = nn.LayerNorm(width)
        options = {"dropout": dropout, "temperature": temperature}
        self.mssa = MSSA(width=width, heads=heads, output=output, heads_from=heads_from, **options)
        self.norm2 = nn.LayerNorm(width)
        self.ista, self.mlp = (ISTA(width, beta, sparsity), None) if sparsification == "ISTA" else (None, MLP(width))

    def compress(self, tokens, first=None):
        return torch.add(tokens[..., :first, :], self.mssa(self.norm1(tokens), first), alpha=self.sign)

    def sparsify(self, tokens):
        if self.mlp is not None:
            return tokens + self.mlp(self.norm2(tokens))
        return self.ista(self.norm2(tokens))

    def forward(self, tokens, first=None):
        """(B, N, d) -> (B, N, d), or the first tokens of that alone, (B, first, d)."""
        return self.sparsify(self.compress(tokens, first))
