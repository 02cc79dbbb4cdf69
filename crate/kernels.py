"""Speed and precision alone: nothing here changes what is computed. Read it last.

Full precision inside autocast, dropout that is fast on a CPU, attention with a gradient of its own, and a training step as one
CUDA graph.
"""

from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LARGE = 80  # beyond so many tokens, and always on CUDA, the fused kernel that never writes the N x N weights is faster


def full_precision(device_type):
    """A context with autocast and TF32 off."""
    if torch.compiler.is_compiling():  # the compiler can't trace the TF32 setting; it is off unless somebody turned it on
        return torch.autocast(device_type, enabled=False)
    return _full_precision(device_type)


@contextmanager
def _full_precision(device_type):
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def dropout_factors(tensor, p):
    """Dropout's random factors, of the tensor's shape and type: 0 with probability p, else 1 / (1 - p).

    Sixteen bits of a 64-bit draw decide on an element: many times faster than F.dropout on a CPU, as are whole numbers in the
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
    if p == 0:
        return tensor
    return tensor * dropout_factors(tensor, p)


def _attend(V, scale, p):
    """The output of self-attention of V (b, N, p), with its weights (b, N, N) before and after dropout."""
    gram = torch.baddbmm(V.new_zeros(1, 1, 1), V, V.mT, beta=0, alpha=scale)
    weights = gram.softmax(dim=-1).to(V.dtype)  # a row per token of the output
    dropped = dropout(weights, p)
    return torch.bmm(dropped, V), weights, dropped


class _SelfAttention(torch.autograd.Function):
    """Attention whose query, key and value are one tensor, by hand because its gradient then needs less work than autograd's:
    the softmax's sum comes from the output, and the three parts are added up in place.
    """

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


def self_attention(V, scale=1.0, p=0.0):
    """V_k softmax(scale V_k^T V_k) per head (inside Eq. 4) of V (..., K, N, p): the same shape.

    Attention weights are dropped with probability p.
    """
    if V.is_cuda or V.shape[-2] > LARGE or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(V, V, V, dropout_p=p, scale=scale)
    flat = V.flatten(0, -3)  # (b, N, p)
    if torch.is_grad_enabled():
        return _SelfAttention.apply(flat, scale, p).view(V.shape)
    return _attend(flat, scale, p)[0].view(V.shape)


WARM_UP = 3  # steps before a capture: they fill the optimizer's state and the caches of the libraries


def graphed(step):
    """`step(images, labels, *constants)`, a training step on CUDA, as one CUDA graph for each choice of constants.

    Launching a step's hundreds of small kernels takes the host longer than the GPU needs to run them; a graph is one launch.
    The step returns one tensor, waits for nothing, and reads from the device what changes between steps, such as the learning
    rate. A batch of another size than the first, such as an epoch's last, runs without a graph, on the same stream: libraries
    keep handles and memory for each.
    """
    graphs, pool, first_shape = {}, torch.cuda.graph_pool_handle(), None  # one pool: no two graphs run at the same time
    warm, stream = Counter(), torch.cuda.Stream()

    def eager(*arguments):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = step(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        return result.clone()

    def replayed(images, labels, *constants):
        nonlocal first_shape
        first_shape = first_shape or images.shape
        if images.shape != first_shape or warm[constants] < WARM_UP:
            warm[constants] += images.shape == first_shape
            return eager(images, labels, *constants)
        if constants not in graphs:
            graph, inputs = torch.cuda.CUDAGraph(), (images.clone(), labels.clone())
            # "thread_local": another thread may pin memory meanwhile.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                graphs[constants] = graph, inputs, step(*inputs, *constants)
        graph, inputs, result = graphs[constants]
        for static, new in zip(inputs, (images, labels)):
            static.copy_(new)
        graph.replay()
        return result.clone()

    return replayed
