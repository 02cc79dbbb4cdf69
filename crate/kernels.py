"""Speed and precision alone: nothing here changes what is computed. Read it last, or never.

Full precision inside autocast; log det and the gradient of R^c in float32 or float64; dropout that is fast on a CPU; attention
with a gradient of its own; a training step as one CUDA graph. The gradients by hand use what forward has saved. Where their own
graph is asked for (create_graph=True: second derivatives), it is computed again, within that graph.
"""

from collections import Counter
from contextlib import contextmanager
from functools import wraps
from warnings import warn

import torch
import torch.nn.functional as F

TOLERANCE = 1e-4  # of half a log det in float32: relative, or absolute where that is below 1
LARGE = 80  # beyond so many tokens, and always on CUDA, the fused kernel that never writes the N x N weights is faster


@contextmanager
def full_precision(device_type):
    """A context with autocast and TF32 off."""
    precision = torch.get_float32_matmul_precision()
    if precision == "highest" and not torch.is_autocast_enabled(device_type):
        yield  # they are off, and switching takes longer than asking
        return
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def in_full_precision(function):
    """`function` with autocast and TF32 off, its tensors in float32, or all of them in float64 where one is."""

    @wraps(function)
    def call(*arguments, **options):
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32

        def cast(value):
            return value.to(dtype) if isinstance(value, torch.Tensor) else value

        with full_precision(tensors[0].device.type):
            return function(*map(cast, arguments), **{name: cast(value) for name, value in options.items()})

    return call


def _gram(A, coefficient):
    """I + c A A^T of A (..., n, m): (..., n, n)."""
    gram = coefficient * (A @ A.mT)
    gram.diagonal(dim1=-2, dim2=-1).add_(1)
    return gram


def _cholesky(A, coefficient):
    """The Cholesky factor L of I + c A A^T, whether it failed, and the estimated error of log det L.

    Rounding the Gram matrix g moves the squared pivot L_ii^2 by about eps g_ii.
    """
    gram = _gram(A, coefficient)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    failed = (info != 0) | pivots.isinf().any(-1)  # an infinite 1 x 1 Gram matrix has a root
    error = torch.finfo(gram.dtype).eps / 2 * (gram.diagonal(dim1=-2, dim2=-1) / pivots.square()).sum(-1)
    return factor, failed, error


def _factor(A, coefficient):
    """The Cholesky factor of I + c A A^T, in float32 where that is accurate, else in float64.

    Nearly equal tokens of a large norm need float64, and on CUDA, where asking would mean to wait for the device, everything
    is float64: these matrices are small.
    """
    if A.dtype == torch.float32 and not A.is_cuda:
        factor, failed, error = _cholesky(A, coefficient)
        half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if not (failed | (error > TOLERANCE * half_log_det.clamp(min=1))).any():
            return factor
    factor, failed, _ = _cholesky(A.double(), coefficient)
    if A.is_cuda:  # let NaN travel to the loss, which is checked once an epoch
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


class _LogDet(torch.autograd.Function):
    """The gradient 2 c Z (I + c Z^T Z)^{-1} needs the factor that the value needed, and nothing else; autograd would redo the
    work. An inverse and a product: solving for every token takes up to five times as long, at the same accuracy.
    """

    @staticmethod
    def forward(context, tokens, coefficient):
        factor = _factor(tokens if tokens.shape[-2] <= tokens.shape[-1] else tokens.mT, coefficient)  # the smaller side
        context.save_for_backward(tokens, factor)
        context.coefficient = coefficient
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(tokens.dtype)

    @staticmethod
    @in_full_precision
    def backward(context, upstream):
        (tokens, factor), c, upstream = context.saved_tensors, context.coefficient, upstream[..., None, None]
        if torch.is_grad_enabled():
            return 2 * upstream * subspace_gradient(tokens, c), None
        inverse, Z = _inverse(factor), tokens.to(factor.dtype)
        gradient = inverse @ Z if tokens.shape[-2] <= tokens.shape[-1] else Z @ inverse
        return (2 * c * upstream * gradient).to(tokens.dtype), None


@in_full_precision
def log_det(tokens, coefficient):
    """log det(I + c Z^T Z) of tokens (..., N, d): (...), float32 or float64. Raises ValueError as rates.coding_rate does."""
    return _LogDet.apply(tokens, coefficient)


@in_full_precision
def subspace_gradient(V, gamma=1.0):
    """gamma (I + gamma V_k V_k^T)^{-1} V_k (inside Eq. 6) of V (..., K, N, p): the same shape, float32 or float64.

    A p x p solve per head: linear in N. Raises ValueError as rates.coding_rate does.
    """
    return gamma * V @ _inverse(_factor(V.mT, gamma)).to(V.dtype)


def dropout_factors(tensor, drop):
    """Dropout's random factors, of the tensor's shape and type: 0 with probability `drop`, else 1 / (1 - drop).

    Sixteen bits of a 64-bit draw decide on an element: many times faster than F.dropout on a CPU, as are whole numbers in the
    place of truth values. `drop` is rounded to a multiple of 2^-16, and the factor is that of the rounded one.
    """
    dropped = min(max(round(drop * 2**16), 1), 2**16 - 1)
    draws = torch.empty(tensor.numel() // 4 + 1, dtype=torch.int64, device=tensor.device).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: tensor.numel()].view(tensor.shape)
    threshold = dropped - 2**15
    kept = bits.clamp(threshold - 1, threshold).sub_(threshold - 1)  # 0 or 1
    return kept.to(tensor.dtype).mul_(1 / (1 - dropped / 2**16))


def dropout(tensor, drop):
    """Zero each element with probability `drop`, scale the others by 1 / (1 - drop)."""
    if tensor.is_cuda or drop == 0:  # one fused kernel, or the tensor itself
        return F.dropout(tensor, drop)
    return tensor * dropout_factors(tensor, drop)


def _attend(V, scale, drop, factors=None):
    """The output of self-attention of V (b, N, p), its weights (b, N, N), and these after dropout by new or given factors."""
    gram = torch.baddbmm(V.new_zeros(1, 1, 1), V, V.mT, beta=0, alpha=scale)
    weights = gram.softmax(dim=-1).to(V.dtype)  # a row per token of the output
    dropped = dropout(weights, drop) if factors is None else weights * factors
    return torch.bmm(dropped, V), weights, dropped


class _SelfAttention(torch.autograd.Function):
    """Attention whose query, key and value are one tensor, by hand because its gradient then needs less work than autograd's:
    the softmax's sum comes from the output, and the three parts are added up in place.
    """

    @staticmethod
    def forward(context, V, scale, drop):
        output, weights, dropped = _attend(V, scale, drop)
        context.save_for_backward(V, output, weights, dropped)
        context.scale = scale
        return output

    @staticmethod
    def backward(context, upstream):
        (V, output, weights, dropped), scale = context.saved_tensors, context.scale
        if torch.is_grad_enabled():
            factors = (dropped / weights).nan_to_num()  # of the same mask; where a weight is 0, so are its derivatives
            output, weights, dropped = _attend(V, scale, None, factors)
        inner = (upstream * output).sum(-1, keepdim=True)  # (b, N, 1): the softmax's sum of weight times its gradient
        gram = torch.bmm(upstream, V.mT).mul_(dropped).addcmul_(weights, inner, value=-1)
        gradient = torch.bmm(dropped.mT, upstream)  # of V as value, then as query and as key
        gradient.baddbmm_(gram, V, alpha=scale).baddbmm_(gram.mT, V, alpha=scale)
        return gradient, None, None


def self_attention(V, scale=1.0, drop=0.0):
    """V_k softmax(scale V_k^T V_k) per head (inside Eq. 4) of V (..., K, N, p): the same shape.

    drop: the probability with which an attention weight is dropped. torch's fused kernels, here for many tokens and on CUDA,
    have no second derivative and say so; inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` there is one.
    """
    if V.is_cuda or V.shape[-2] > LARGE:
        return F.scaled_dot_product_attention(V, V, V, dropout_p=drop, scale=scale)
    flat = V.flatten(0, -3)  # (b, N, p)
    if torch.is_grad_enabled():
        return _SelfAttention.apply(flat, scale, drop).view(V.shape)
    return _attend(flat, scale, drop)[0].view(V.shape)


WARM_UP = 3  # steps before a capture: they fill the optimizer's state and the caches of the libraries


def graphed(step):
    """`step(images, labels, *constants)`, a training step on CUDA, as one CUDA graph for each shape and choice of constants.

    Launching a step's hundreds of small kernels takes the host longer than the GPU needs to run them; a graph is one launch.
    The step returns one tensor, waits for nothing, and reads from the device what changes between steps, such as the learning
    rate. All run on one stream: libraries keep handles and memory for each. A step that can't be captured runs as it is.
    """
    graphs, warm, capturing = {}, Counter(), True
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # one pool: no two graphs run at the same time

    def graphed_step(images, labels, *constants):
        nonlocal capturing
        key, outside = (images.shape, constants), torch.cuda.current_stream()
        warm[key] += 1
        if capturing and key not in graphs and warm[key] > WARM_UP:
            graph, inputs = torch.cuda.CUDAGraph(), (images.clone(), labels.clone())
            try:  # "thread_local": another thread may pin memory meanwhile
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    result = step(*inputs, *constants)
                graphs[key] = graph, inputs, result
            except RuntimeError as error:
                torch.cuda.set_stream(outside)  # a capture that can't be ended stays on its own
                capturing = False
                warn(f"no CUDA graph, steps are slower: {str(error.__context__ or error).splitlines()[0]}")
        if key in graphs:
            graph, inputs, result = graphs[key]
            for static, new in zip(inputs, (images, labels)):
                static.copy_(new)
            graph.replay()
            return result.clone()
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            result = step(images, labels, *constants)
        outside.wait_stream(stream)
        return result.clone()

    return graphed_step
