"""Coding rates (Eq. 1), the gradient of R^c (Eq. 6), and the second-order expansion of R^c with its gradient (Eqs. 5, 7).

Tokens are rows, (..., N, d): the transpose of the paper's Z in R^{d x N}. U is (d, d), its columns [U_1 .. U_K]. So the paper's
Z^T Z is `tokens @ tokens.mT`, V_k = U_k^T Z is the k-th block of `tokens @ U`, and U_k V_k is `V_k @ U_k.mT`. Formulas in
docstrings have the paper's V_k, (p, N); variables are its transpose.

Rates are in nats. Everything runs in float32, or in float64 where an argument is, with autocast and TF32 off: a Gram matrix in
half precision need not be positive definite. Call backward outside autocast, as torch advises.
"""

import torch

from crate.kernels import in_full_precision, log_det, subspace_gradient


def split_heads(tokens, heads):
    """(..., N, d) -> (..., K, N, p)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(tokens):
    """(..., K, N, p) -> (..., N, d)."""
    return tokens.transpose(-3, -2).flatten(-2)


def subspaces(tokens, U, heads):
    """V_k = U_k^T Z of tokens (..., N, d) and U (d, d): (..., K, N, p). Raises ValueError where a shape doesn't fit."""
    if U.ndim != 2 or U.shape[0] != U.shape[1]:
        raise ValueError(f"U must be (d, d), its columns [U_1 .. U_K], not {tuple(U.shape)}; of a qkv.weight: weight[:d].mT")
    if tokens.ndim < 2 or tokens.shape[-1] != len(U):
        raise ValueError(f"tokens must be (..., N, d) with d = {len(U)} as in U, not {tuple(tokens.shape)}")
    if heads < 1 or len(U) % heads:
        raise ValueError(f"width {len(U)} is not divisible by heads {heads}")
    return split_heads(tokens @ U, heads)


def coding_rate(tokens, coefficient):
    """R(Z) = 1/2 logdet(I + c Z^T Z) (in Eq. 1) of tokens (..., N, d): (...).

    `coefficient` is c = d / (N eps^2), a float: K gamma of Z, gamma of V_k. Raises ValueError where tokens have no token axis,
    are not finite, or too large and too alike for float64 (the last two on CUDA, which is not waited for: NaN instead).
    """
    if tokens.ndim < 2:
        raise ValueError(f"tokens must be (..., N, d), not {tuple(tokens.shape)}")
    return log_det(tokens, coefficient) / 2


@in_full_precision
def subspace_coding_rate(tokens, U, heads, gamma=1.0):
    """R^c(Z; U) = sum_k 1/2 logdet(I + gamma (U_k^T Z)^T U_k^T Z) (in Eq. 1) of tokens (..., N, d): (...).

    Differentiable in tokens and U (d, d). Raises ValueError as coding_rate does, and where shapes don't fit.
    """
    return coding_rate(subspaces(tokens, U, heads), gamma).sum(-1)


@in_full_precision
def exact_gradient(tokens, U, heads, gamma=1.0):
    """grad_Z R^c = sum_k gamma U_k (I + gamma V_k V_k^T)^{-1} V_k with V_k = U_k^T Z (Eq. 6): (..., N, d)."""
    V = subspaces(tokens, U, heads)
    return merge_heads(subspace_gradient(V, gamma)) @ U.mT  # the sum over heads is U times the heads, stacked


@in_full_precision
def expansion_gradient(tokens, U, heads, gamma=1.0, orders=(1, 2)):
    """Gradient of the second-order expansion of R^c (Eq. 7), or of its first- or second-order term only: (..., N, d).

    sum_k U_k (gamma V_k - gamma^2 V_k V_k^T V_k) with V_k = U_k^T Z.
    """
    V = subspaces(tokens, U, heads)
    terms = {1: gamma * V, 2: -(gamma**2) * V @ (V.mT @ V)}
    return merge_heads(sum((terms[order] for order in orders), torch.zeros_like(V))) @ U.mT


@in_full_precision
def taylor_bound(tokens, U, heads, gamma=1.0):
    """The lower bound sum_k gamma/2 ||V_k||_F^2 - gamma^2/4 ||V_k^T V_k||_F^2 on R^c(Z; U) (Eq. 5): (...)."""
    V = subspaces(tokens, U, heads)
    gram = V.mT @ V  # V_k V_k^T, (p, p), has the norm of V_k^T V_k, (N, N)
    return gamma / 2 * V.square().sum((-3, -2, -1)) - gamma**2 / 4 * gram.square().sum((-3, -2, -1))


@in_full_precision
def norm_ratio(reference, tokens):
    """What to scale tokens (..., N, d) by, per image, to give them the Frobenius norm of `reference`: (..., 1, 1).

    Rates grow with the tokens' norm: this separates how they are arranged from how large they are. Zero tokens stay zero.
    """
    wanted, actual = torch.linalg.matrix_norm(reference), torch.linalg.matrix_norm(tokens)
    return torch.where(actual > 0, wanted / actual, 1)[..., None, None]


def log_approximations(x):
    """log x beside its expansions at 1 (Fig. 1b): {name: values}, each of x's shape."""
    return {
        "log x": x.log(),
        "first order": x - 1,
        "second order": (x - 1) - (x - 1) ** 2 / 2,
        "second-order term only": -((x - 1) ** 2) / 2,
    }
