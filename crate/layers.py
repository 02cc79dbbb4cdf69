"""One CRATE layer: compression by MSSA (Eqs. 2, 4, 8-10), then sparsification by ISTA (Eq. 3). Tokens are (B, N, d)."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from crate.config import VARIANT_TABLE
from crate.rates import full_precision, merge_heads, split_heads


LARGE = 256  # tokens from which on, and CUDA where, the N x N weights are better not written to memory


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
    """The output of self-attention of V (b, N, p), with its transposed weights (b, N, N) before and after dropout."""
    gram = torch.baddbmm(V.new_empty(1, 1, 1), V, V.mT, beta=0, alpha=scale)
    # The Gram matrix is symmetric: its softmax over columns is the transposed attention, and a faster kernel.
    weights = gram.softmax(dim=-2).to(V.dtype)
    dropped = dropout(weights, p)
    return torch.bmm(dropped.mT, V), weights, dropped


class _SelfAttention(torch.autograd.Function):
    """Attention whose query, key and value are one tensor: its gradient takes four products where autograd takes six."""

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
        inner = (upstream * output).sum(-1).unsqueeze(-2)  # (b, 1, N): the softmax's sum of weight times its gradient
        gram = torch.bmm(V, upstream.mT).mul_(dropped).addcmul_(weights, inner, value=-1)  # gradient, transposed
        gradient = torch.bmm(dropped, upstream)
        return gradient.baddbmm_(gram + gram.mT, V, alpha=context.scale), None, None


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

    `output` is the output matrix: "U" (tied), "U^T" (tied), "W" (learned), "random" (fixed) or "I".
    `temperature` of the softmax: "sqrt-p", as in the released CRATE, or "none", as Eq. 4 is written.
    """

    def __init__(self, *, width, heads, output, dropout=0.0, temperature="sqrt-p"):
        super().__init__()
        self.heads, self.output, self.dropout = heads, output, dropout
        self.scale = (width // heads) ** -0.5 if temperature == "sqrt-p" else 1.0
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
        p = self.dropout if self.training else 0.0
        V = split_heads(self.U(tokens), self.heads)  # (B, K, N, p)
        heads = merge_heads(subspace_attention(V, self.scale, p))
        return dropout(self.merge(heads), p)


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


class Layer(nn.Module):
    """Y = Z + sign MSSA(LN(Z)) (Eq. 8; Eq. 9 with sign -1), Z' = ISTA(LN(Y)) (Eq. 3); alpha = gamma = 1."""

    def __init__(self, variant, *, width, heads, dropout=0.0, temperature="sqrt-p", beta=0.1, sparsity=0.1):
        super().__init__()
        self.sign, output, _ = VARIANT_TABLE[variant]
        self.norm1 = nn.LayerNorm(width)
        self.mssa = MSSA(width=width, heads=heads, output=output, dropout=dropout, temperature=temperature)
        self.norm2 = nn.LayerNorm(width)
        self.ista = ISTA(width, beta, sparsity)

    def compress(self, tokens):
        return torch.add(tokens, self.mssa(self.norm1(tokens)), alpha=self.sign)

    def forward(self, tokens):
        return self.ista(self.norm2(self.compress(tokens)))
