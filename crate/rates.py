"""Coding rates R and R^c (Eq. 1), their gradients (Eq. 6) and the second-order expansion (Eqs. 5, 7).

Tokens are rows, `(..., N, d)`: the transpose of the paper's Z in R^{d x N}. U is `(d, d)`, its columns [U_1 .. U_K].
All of it runs in float32 or float64 with autocast and TF32 off: half-precision Gram matrices lose positive definiteness. Call
backward outside autocast, as torch advises.
"""

import torch
from torch.autograd.function import once_differentiable

from crate.kernels import full_precision

TOLERANCE = 1e-4  # of a rate in float32, relative, or in nats where the rate is below 1


def full(tensor):
    """The tensor in float32, or float64 if it is that already."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.float()


def split_heads(tokens, heads):
    """(..., N, d) -> (..., K, N, p)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(tokens):
    """(..., K, N, p) -> (..., N, d)."""
    return tokens.transpose(-3, -2).flatten(-2)


def subspaces(tokens, U, heads):
    """V_k = U_k^T Z of tokens (..., N, d) and U (d, d): (..., K, N, p), float32 or float64."""
    with full_precision(tokens.device.type):
        return split_heads(full(tokens) @ full(U), heads)


def _cholesky(tokens, coefficient, side):
    """The Cholesky factor L of I + coefficient Z^T Z (..., n, n), n = N ("tokens") or d ("features"), and whether it failed.

    Also the estimated error of log det L: rounding the Gram matrix g moves the squared pivot L_ii^2 by about eps g_ii.
    """
    rows, columns = (tokens, tokens.mT) if side == "tokens" else (tokens.mT, tokens)
    gram = coefficient * (rows @ columns)
    gram.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    failed = (info != 0) | pivots.isinf().any(-1)  # an infinite 1 x 1 Gram matrix has a root
    error = torch.finfo(gram.dtype).eps / 2 * (gram.diagonal(dim1=-2, dim2=-1) / pivots.square()).sum(-1)
    return factor, failed, error


def _factor(tokens, coefficient, side=None):
    """The Cholesky factor of I + coefficient Z^T Z on the smaller side, or on `side`, in float32 or float64.

    float32 where that is accurate. Nearly equal tokens of a large norm need float64, and on CUDA, where asking would mean to
    wait for the device, and in compiled code, everything is float64: these matrices are small.
    """
    side = side or ("tokens" if tokens.shape[-2] <= tokens.shape[-1] else "features")
    never_ask = tokens.is_cuda or torch.compiler.is_compiling()
    if tokens.dtype == torch.float32 and not never_ask:
        factor, failed, error = _cholesky(tokens, coefficient, side)
        rate = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if not (failed | (error > TOLERANCE * rate.clamp(min=1))).any():
            return factor
    factor, failed, _ = _cholesky(tokens.double(), coefficient, side)
    if never_ask:  # let NaN travel to the loss, which is checked once an epoch
        return factor.masked_fill(failed[..., None, None], torch.nan)
    if failed.any():
        raise ValueError("I + c Z^T Z can't be factorised: the tokens are not finite, or too large and too alike")
    return factor


def _inverse(factor):
    """(L L^T)^{-1} of the factor L. On CUDA torch.cholesky_inverse may wait for the device (MAGMA, torch 2.11)."""
    if not factor.is_cuda:
        return torch.cholesky_inverse(factor)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    half = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return half.mT @ half


class _CodingRate(torch.autograd.Function):
    """The closed-form gradient c Z (I + c Z^T Z)^{-1} needs the factor that the value needed, and nothing else; autograd would
    redo the work. An inverse and a product: solving for every token takes up to five times as long, at the same accuracy.
    """

    @staticmethod
    def forward(context, tokens, coefficient):
        with full_precision(tokens.device.type):
            factor = _factor(tokens, coefficient)
        context.save_for_backward(tokens, factor)
        context.coefficient = coefficient
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(context, upstream):
        tokens, factor = context.saved_tensors
        with full_precision(tokens.device.type):
            inverse, Z = _inverse(factor), tokens.to(factor.dtype)
            gradient = inverse @ Z if tokens.shape[-2] <= tokens.shape[-1] else Z @ inverse
            return (context.coefficient * upstream[..., None, None] * gradient).to(tokens.dtype), None


def coding_rate(tokens, coefficient):
    """R(Z) = 1/2 logdet(I + c Z^T Z) (Eq. 1) of tokens (..., N, d), in nats: (...), float32 or float64.

    `coefficient` is c = d / (N eps^2), a float. Differentiable once in the tokens.
    Raises ValueError where tokens are not finite, or too large and too alike for float64 (on CUDA, which is not waited for, the
    rate is NaN instead).
    """
    return _CodingRate.apply(full(tokens), coefficient)


def subspace_coding_rate(tokens, U, heads, gamma=1.0):
    """R^c(Z; U) = sum_k 1/2 logdet(I + gamma (U_k^T Z)^T U_k^T Z) (Eq. 1) of tokens (..., N, d): (...), in nats.

    Differentiable once in tokens and U (d, d). Raises ValueError as coding_rate does.
    """
    return coding_rate(subspaces(tokens, U, heads), gamma).sum(-1)


class _SubspaceGradient(torch.autograd.Function):
    """S = gamma V M^{-1}, M = I + gamma V^T V, is as smooth as R^c: its own gradient needs M^{-1} and S, no factorisation.

    dM^{-1} = -gamma M^{-1} (dV^T V + V^T dV) M^{-1}, so a gradient G of S becomes H - S (V^T H + G^T S), H = gamma G M^{-1}.
    """

    @staticmethod
    def forward(context, V, gamma):
        with full_precision(V.device.type):
            inverse = _inverse(_factor(V, gamma, side="features")).to(V.dtype)
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
    S = subspace_gradient(subspaces(tokens, U, heads), gamma)
    with full_precision(tokens.device.type):
        return merge_heads(S) @ full(U).mT


def expansion_gradient(tokens, U, heads, gamma=1.0, orders=(1, 2)):
    """Gradient of the second-order expansion of R^c (Eq. 7), or of its first- or second-order term only: (..., N, d).

    sum_k U_k (gamma V_k - gamma^2 V_k V_k^T V_k) with V_k = U_k^T Z.
    """
    V = subspaces(tokens, U, heads)
    with full_precision(tokens.device.type):
        terms = {1: gamma * V, 2: -(gamma**2) * V @ (V.mT @ V)}
        return merge_heads(sum((terms[order] for order in orders), torch.zeros_like(V))) @ full(U).mT


def taylor_bound(tokens, U, heads, gamma=1.0):
    """The lower bound sum_k gamma/2 ||V_k||_F^2 - gamma^2/4 ||V_k^T V_k||_F^2 on R^c(Z; U) (Eq. 5): (...), in nats."""
    V = subspaces(tokens, U, heads)
    with full_precision(tokens.device.type):
        gram = V.mT @ V
        return gamma / 2 * V.square().sum((-3, -2, -1)) - gamma**2 / 4 * gram.square().sum((-3, -2, -1))


def norm_ratio(reference, tokens):
    """What to scale tokens (..., N, d) by, per image, to give them the Frobenius norm of `reference`: (..., 1, 1).

    Rates grow with the tokens' norm: this separates how they are arranged from how large they are. Zero tokens stay zero.
    """
    norms = [torch.linalg.matrix_norm(full(Z))[..., None, None] for Z in (reference, tokens)]
    return norms[0] / norms[1].clamp(min=torch.finfo(norms[1].dtype).tiny)


def log_approximations(x):
    """log x beside its expansions at 1 (Fig. 1b): {name: values}, each of x's shape."""
    return {
        "log x": x.log(),
        "first order": x - 1,
        "second order": (x - 1) - (x - 1) ** 2 / 2,
        "second-order term only": -((x - 1) ** 2) / 2,
    }
