"""Attention with its own gradient and dropout, against tests/reference.py and statistics."""

import math

import pytest
import torch

from crate.kernels import LARGE, dropout, dropout_factors, graphed, self_attention
from crate.rates import merge_heads, split_heads
from tests import reference
from tests.reference import assert_close

WIDTH, HEADS, TOKENS = 12, 3, 7
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def factors(shape, p):
    """The next dropout mask to be drawn, as factors 0 and 1 / (1 - p)."""
    return dropout_factors(torch.empty(shape, dtype=torch.float64), p)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-10), (F32, 1e-4)])
@pytest.mark.parametrize("N", [1, TOKENS, LARGE, LARGE + 1])  # both sides of the switch to the fused kernel
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_attention_and_its_gradient(N, scale, dtype, tolerance):
    Z, upstream = randn(2, N, WIDTH), torch.randn(2, N, WIDTH, dtype=torch.float64)
    narrow = Z.detach().to(dtype).requires_grad_()
    expected = reference.attention(Z, torch.eye(WIDTH, dtype=torch.float64), HEADS, scale)
    output = merge_heads(self_attention(split_heads(narrow, HEADS), scale))
    assert output.dtype == dtype
    assert_close(output, expected, tolerance)
    with torch.no_grad():
        assert_close(merge_heads(self_attention(split_heads(narrow, HEADS), scale)), expected, tolerance)
    (gradient,) = torch.autograd.grad(output, narrow, upstream.to(dtype))
    assert_close(gradient, torch.autograd.grad(expected, Z, upstream)[0], tolerance)


@pytest.mark.parametrize("N", [64, LARGE + 1])
def test_dropped_attention_weights(N):
    p, c = 0.3, 1.5
    V = c * torch.eye(N, dtype=torch.float64).expand(2, 1, N, N)  # the output is c times the weights
    weights = torch.softmax(0.5 * V @ V.mT, dim=-1)
    ratio = self_attention(V, 0.5, p) / (c * weights)
    kept = ratio != 0
    assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - p)), 1e-4)  # p is rounded to 2^-16
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    assert (kept[0] != kept[1]).any()


@pytest.mark.parametrize("p, dtype", [(2**-16, F32), (0.01, F64), (0.1, BF16), (0.5, F32), (0.9, F32)])
def test_dropout_factors(p, dtype):
    tensor = torch.ones(3, 333, 401, dtype=dtype)  # a number of elements that 4 doesn't divide
    factors = dropout_factors(tensor, p)
    mask, factor = factors > 0, factors.max().item()
    assert factors.shape == tensor.shape and factors.dtype == dtype and set(factors.unique().tolist()) == {0, factor}
    rounded = round(p * 2**16) / 2**16
    assert factor == pytest.approx(1 / (1 - rounded), rel=torch.finfo(dtype).eps)
    assert not torch.equal(factors, dropout_factors(tensor, p))
    places = mask.flatten()[: mask.numel() // 4 * 4].view(-1, 4).double()  # four from one draw: equally likely, independent
    assert ((places.mean(0) - (1 - rounded)).abs() < 5 * math.sqrt(rounded * (1 - rounded) / len(places))).all()
    together = (1 - places).T @ (1 - places) / len(places)
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert abs(together[i, j].item() - rounded**2) < 5 * math.sqrt(rounded**2 / len(places)) + 5 / len(places)
    before = torch.get_rng_state()
    assert dropout(tensor, 0.0) is tensor and torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
def test_a_step_that_cant_be_captured_runs_as_it_is():
    weights, calls, stream = torch.tensor([2.0], device="cuda"), [], torch.cuda.current_stream()

    def step(images, labels):
        calls.append((images * weights).sum().item())  # waits, which a capture forbids
        return images * weights

    with pytest.warns(UserWarning, match="no CUDA graph.*capturing") as warnings:
        run = graphed(step)
        results = [run(image, image) for image in torch.arange(9.0, device="cuda").split(1)]
    assert len(warnings) == 1 and len(calls) == 9 and torch.cuda.current_stream() == stream
    assert torch.cat(results).tolist() == [2.0 * i for i in range(9)]
