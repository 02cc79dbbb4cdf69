"""Attention with its own gradient and dropout, against tests/reference.py and statistics."""

import math

import pytest
import torch

from crate.kernels import LARGE, dropout, dropout_factors, self_attention
from crate.rates import merge_heads, split_heads
from tests import reference
from tests.reference import assert_close

WIDTH, HEADS, TOKENS = 12, 3, 7
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-4)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(12)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def narrowed(tensor, dtype):
    return tensor.detach().to(dtype).requires_grad_()


def factors(shape, p):
    """The next dropout mask to be drawn, as factors 0 and 1 / (1 - p)."""
    return dropout_factors(torch.empty(shape, dtype=torch.float64), p)


def reseeded(function, seed=5):
    """`function`, with the same dropout masks at every call."""

    def call(*arguments):
        torch.manual_seed(seed)
        return function(*arguments)

    return call


# Attention (Eq. 4)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("N", [1, TOKENS, LARGE, LARGE + 1])  # both sides of the switch to the fused kernel
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_attention_and_its_gradient(N, scale, dtype, tolerance):
    Z, upstream = randn(2, N, WIDTH), torch.randn(2, N, WIDTH, dtype=torch.float64)
    narrow = narrowed(Z, dtype)
    expected = reference.attention(Z, torch.eye(WIDTH, dtype=torch.float64), HEADS, scale)
    output = merge_heads(self_attention(split_heads(narrow, HEADS), scale))
    assert output.dtype == dtype
    assert_close(output, expected, tolerance)
    with torch.no_grad():
        assert_close(merge_heads(self_attention(split_heads(narrow, HEADS), scale)), expected, tolerance)
    (gradient,) = torch.autograd.grad(output, narrow, upstream.to(dtype))
    assert_close(gradient, torch.autograd.grad(expected, Z, upstream)[0], tolerance)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 5, 4), (2, 1, 3, 5, 4)], ids=str)
def test_attention_takes_any_leading_shape(shape):
    V = randn(*shape)
    weights = torch.softmax(0.5 * V @ V.mT, dim=-1)
    assert_close(self_attention(V, 0.5), weights @ V, 1e-12)
    assert_close(self_attention(V), torch.softmax(V @ V.mT, dim=-1) @ V, 1e-12)  # without temperature by default


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 1, 3, 4), (1, 1, 4)], ids=str)
def test_attention_gradcheck(shape, p):
    V = randn(*shape)
    assert torch.autograd.gradcheck(reseeded(lambda V: self_attention(V, 0.7, p)), V)


@pytest.mark.parametrize("N", [TOKENS, LARGE + 1])
def test_attention_weights_of_a_token_sum_to_one(N):
    V = torch.randn(2, HEADS, N, 4, dtype=torch.float64)
    V[..., 0] = 1.0  # every token's: a weighted mean of ones is one
    output = self_attention(V, 0.5)
    assert_close(output[..., 0], torch.ones(2, HEADS, N), 1e-12)
    assert (output[..., 1:].amax(-2) <= V[..., 1:].amax(-2)).all()
    assert_close(self_attention(torch.ones(1, 2, N, 4)), torch.ones(1, 2, N, 4), 1e-6)


def test_attention_at_large_logits():
    V = torch.randn(2, HEADS, TOKENS, 4) * 1e3  # a token's own logit is the largest, by far: softmax = argmax
    nearest = (V @ V.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, 4)
    assert_close(self_attention(V), V.gather(-2, nearest), 1e-6)


@pytest.mark.parametrize("N", [64, LARGE + 1])
def test_dropped_attention_weights(N):
    p, c = 0.3, 1.5
    V = c * torch.eye(N, dtype=torch.float64).expand(2, 1, N, N)  # the output is c times the weights
    weights = torch.softmax(0.5 * V @ V.mT, dim=-1)
    ratio = self_attention(V, 0.5, p) / (c * weights)
    kept = ratio != 0
    assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - p)), 1e-4)  # p is rounded to 2^-16
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation
    assert (kept[0] != kept[1]).any()


def test_mean_over_dropout_is_attention_without_it():
    V, draws = torch.randn(1, 2, 6, 4, dtype=torch.float64), 20000
    outputs = self_attention(V.expand(draws, -1, -1, -1), 0.5, 0.3)
    deviations = outputs.std(0) / math.sqrt(draws)
    assert (outputs.std(0) > 0.01).all()
    assert ((outputs.mean(0) - self_attention(V, 0.5)[0]).abs() < 5 * deviations).all()


def test_gradient_uses_the_masks_of_the_forward_pass():
    Z, upstream, p = randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64), 0.4
    output = reseeded(lambda: merge_heads(self_attention(split_heads(Z, HEADS), 0.5, p)))()
    torch.manual_seed(5)
    keep = factors((2, HEADS, TOKENS, TOKENS), p).mT  # a column per token of the output
    expected = reference.attention(Z, torch.eye(WIDTH, dtype=torch.float64), HEADS, 0.5, keep)
    assert_close(output, expected, 1e-10)
    gradient, gradient_expected = (torch.autograd.grad(value, Z, upstream)[0] for value in (output, expected))
    assert_close(gradient, gradient_expected, 1e-10)


# Dropout


@pytest.mark.parametrize("p", [2**-16, 0.01, 0.1, 0.5, 0.9])
def test_dropout_factors(p):
    tensor = torch.empty(3, 333, 401)
    factors = dropout_factors(tensor, p)
    mask, factor = factors > 0, factors.max().item()
    assert factors.shape == tensor.shape and factors.dtype == tensor.dtype and set(factors.unique().tolist()) == {0, factor}
    rounded = round(p * 2**16) / 2**16
    assert factor == pytest.approx(1 / (1 - rounded), rel=1e-6)
    assert not torch.equal(factors, dropout_factors(tensor, p))
    # four elements come from one 64-bit draw: each of the four places is as likely, and independent of the others
    places = mask.flatten()[: mask.numel() // 4 * 4].view(-1, 4).double()
    deviation = math.sqrt(rounded * (1 - rounded) / len(places))
    assert ((places.mean(0) - (1 - rounded)).abs() < 5 * deviation).all()
    together = (1 - places).T @ (1 - places) / len(places)
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert abs(together[i, j].item() - rounded**2) < 5 * math.sqrt(rounded**2 / len(places)) + 5 / len(places)


@pytest.mark.parametrize("count", range(1, 10))
def test_dropout_factors_of_any_size(count):
    assert dropout_factors(torch.empty(count), 0.5).shape == (count,)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_dropout(dtype, tolerance):
    tensor = torch.randn(100, 1000, dtype=dtype).abs() + 1
    dropped = dropout(tensor, 0.25)
    kept = dropped != 0
    assert dropped.dtype == dtype
    assert_close(dropped[kept], tensor[kept].double() / 0.75, tolerance)
    assert abs(kept.double().mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    before = torch.get_rng_state()
    assert dropout(tensor, 0) is tensor and dropout(tensor, 0.0) is tensor
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_of_dropout():
    tensor = randn(50, 50)
    dropped = dropout(tensor, 0.5)
    (gradient,) = torch.autograd.grad(dropped.sum(), tensor)
    assert torch.equal(gradient, torch.where(dropped != 0, 2.0, 0.0))
