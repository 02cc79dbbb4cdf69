"""Coding rates R and R^c (Eq. 1), their gradients (Eq. 6) and the second-order expansion (Eqs. 5, 7).

Tokens are rows, `(..., N, d)`: the transpose of the paper's Z in R^{d x N}. U is `(d, d)`, its columns [U_1 .. U_K].
All of it runs in float32 or float64 with autocast and TF32 off: half-precision Gram matrices lose positive definiteness.
"""

from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable


@contextmanager
def full_precision(device_type):
    """Autocast and TF32 off."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def full(tensor):
    """The tensor in float32, or float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def split_heads(tokens, heads):
    """(..., N, d) -> (..., K, N, p)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(tokens):
    """(..., K, N, p) -> (..., N, d)."""
    return tokens.transpose(-3, -2).flatten(-2)


def _factor(tokens, coefficient, features=False):
    """Cholesky factor of I + coefficient Z^T Z on the smaller side or that of the features, (..., n, n), n = min(N, d) or d."""
    N, d = tokens.shape[-2:]
    rows, columns = (tokens.mT, tokens) if features or N > d else (tokens, tokens.mT)
    gram = coefficient * (rows @ columns)
    gram.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, info = torch.linalg.cholesky_ex(gram)
    failed = (info != 0) | factor.diagonal(dim1=-2, dim2=-1).isinf().any(-1)  # an infinite 1 x 1 Gram has a root
    if gram.is_cuda:  # a check here would wait for the device: let NaN travel to the loss, which is checked per epoch
        return factor.masked_fill(failed[..., None, None], torch.nan)
    if failed.any():
        raise ValueError("I + c Z^T Z is not positive definite: the tokens are not finite or far too large")
    return factor


def _gradient(tokens, factor, coefficient):
    """c Z (I + c Z^T Z)^{-1}, from the factor of either side.

    The inverse and a product: solving for every token takes up to five times as long, at the same accuracy.
    """
    inverse = torch.cholesky_inverse(factor)
    return coefficient * (inverse @ tokens if tokens.shape[-2] <= tokens.shape[-1] else tokens @ inverse)


class _CodingRate(torch.autograd.Function):
    """The closed-form gradient needs the factor that the value needed, and nothing else; autograd would redo the work."""

    @staticmethod
    def forward(context, tokens, coefficient):
        with full_precision(tokens.device.type):
            factor = _factor(tokens, coefficient)
        context.save_for_backward(tokens, factor)
        context.coefficient = coefficient
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    @once_differentiable
    def backward(context, upstream):
        tokens, factor = context.saved_tensors
        with full_precision(tokens.device.type):
            return upstream[..., None, None] * _gradient(tokens, factor, context.coefficient), None


def coding_rate(tokens, coefficient):
    """R(Z) = 1/2 logdet(I + c Z^T Z) (Eq. 1) of tokens (..., N, d), in nats: (...), float32 or float64.

    `coefficient` is c = d / (N eps^2), a float. Differentiable once in the tokens.
    Raises ValueError where tokens are not finite (on CUDA, which is not waited for, the rate is NaN instead).
    """
    return _CodingRate.apply(full(tokens), coefficient)


def subspace_coding_rate(tokens, U, heads, gamma=1.0):
    """R^c(Z; U) = sum_k 1/2 logdet(I + gamma (U_k^T Z)^T U_k^T Z) (Eq. 1) of tokens (..., N, d): (...), in nats."""
    with full_precision(tokens.device.type):
        V = full(tokens) @ full(U)
    return coding_rate(split_heads(V, heads), gamma).sum(-1)


class _SubspaceGradient(torch.autograd.Function):
    """S = gamma V M^{-1}, M = I + gamma V^T V, is as smooth as R^c: its own gradient needs M^{-1} and S, no factorisation.

    dM^{-1} = -gamma M^{-1} (dV^T V + V^T dV) M^{-1}, so a gradient G of S becomes H - S (V^T H + G^T S), H = gamma G M^{-1}.
    """

    @staticmethod
    def forward(context, V, gamma):
        with full_precision(V.device.type):
            inverse = torch.cholesky_inverse(_factor(V, gamma, features=True))
            gradient = gamma * V @ inverse
        context.save_for_backward(V, inverse, gradient)
        context.gamma = gamma
        return gradient

    @staticmethod
    @once_differentiable
    def backward(context, upstream):
        V, inverse, gradient = context.saved_tensors
        with full_precision(V.device.type):
            H = context.gamma * upstream @ inverse
            return H - gradient @ (V.mT @ H + upstream.mT @ gradient), None


def subspace_gradient(V, gamma=1.0):
    """gamma (I + gamma V_k V_k^T)^{-1} V_k (inside Eq. 6) of V (..., K, N, p): the same shape, float32 or float64.

    A p x p solve per head: linear in N. Differentiable once. Raises ValueError as coding_rate does.
    """
    return _SubspaceGradient.apply(full(V), gamma)


def exact_gradient(tokens, U, heads, gamma=1.0):
    """grad_Z R^c = sum_k gamma U_k (I + gamma V_k V_k^T)^{-1} V_k with V_k = U_k^T Z (Eq. 6): (..., N, d)."""
    with full_precision(tokens.device.type):
        V = split_heads(full(tokens) @ full(U), heads)
        return merge_heads(subspace_gradient(V, gamma)) @ full(U).mT


def expansion_gradient(tokens, U, heads, gamma=1.0, orders=(1, 2)):
    """Gradient of the second-order expansion of R^c (Eq. 7), or of its first- or second-order term only: (..., N, d).

    sum_k U_k (gamma V_k - gamma^2 V_k V_k^T V_k) with V_k = U_k^T Z.
    """
    with full_precision(tokens.device.type):
        V = split_heads(full(tokens) @ full(U), heads)  # (..., K, N, p)
        first, second = gamma * V, gamma**2 * V @ (V.mT @ V)
        return merge_heads((1 in orders) * first - (2 in orders) * second) @ full(U).mT


def taylor_bound(tokens, U, heads, gamma=1.0):
    """The lower bound sum_k gamma/2 ||V_k||_F^2 - gamma^2/4 ||V_k^T V_k||_F^2 on R^c(Z; U) (Eq. 5): (...), in nats."""
    with full_precision(tokens.device.type):
        V = split_heads(full(tokens) @ full(U), heads)
        gram = V.mT @ V
        return gamma / 2 * V.square().sum((-3, -2, -1)) - gamma**2 / 4 * gram.square().sum((-3, -2, -1))


def log_approximations(x):
    """log x beside its expansions at 1 (Fig. 1b): {name: values}, each of x's shape."""
    return {
        "log x": x.log(),
        "first order": x - 1,
        "second order": (x - 1) - (x - 1) ** 2 / 2,
        "second-order term only": -((x - 1) ** 2) / 2,
    }
