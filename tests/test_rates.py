"""Coding rates, their closed-form gradients and the second-order expansion, against tests/reference.py."""

import math

import pytest
import torch

from crate import rates
from crate.kernels import subspace_gradient
from crate.rates import coding_rate, exact_gradient, expansion_gradient, subspace_coding_rate, taylor_bound
from tests import reference
from tests.reference import assert_close

SHAPES = [(5, 12), (20, 12), (12, 12), (1, 12), (3, 5, 12), (2, 3, 20, 12)]  # N < d, N > d, N = d, one token, batches
HEADS = 3


def tokens_of(shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


ON_CUDA = pytest.param("cuda", torch.float32, 1e-4, marks=pytest.mark.cuda)


@pytest.mark.parametrize("device, dtype, tolerance", [("cpu", torch.float64, 1e-10), ("cpu", torch.float32, 1e-4), ON_CUDA])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 65, 384)], ids=str)
def test_rates_and_their_gradients(shape, device, dtype, tolerance):
    Z, U = tokens_of(shape), (torch.randn(2 * shape[-1:], dtype=torch.float64) / shape[-1] ** 0.5).requires_grad_()
    narrow, narrow_U = (tensor.detach().to(device, dtype).requires_grad_() for tensor in (Z, U))
    upstream = torch.rand(shape[:-2], dtype=torch.float64)

    expected, rate = reference.coding_rate(Z, 0.7), coding_rate(narrow, 0.7)
    assert rate.dtype == dtype
    assert_close(rate, expected, tolerance)
    (gradient,) = torch.autograd.grad(rate, narrow, upstream.to(narrow))
    assert_close(gradient, torch.autograd.grad(expected, Z, upstream)[0], tolerance)

    expected = reference.subspace_coding_rate(Z, U, HEADS, 1.3)
    compressed = subspace_coding_rate(narrow, narrow_U, HEADS, 1.3)
    assert_close(compressed, expected, tolerance)
    gradients = torch.autograd.grad(compressed, (narrow, narrow_U), upstream.to(narrow))
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, (Z, U), upstream)):
        assert_close(actual, wanted, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_forms(shape):
    """Eqs. 5 to 7: the exact gradient, the Taylor bound, and the gradients of its terms."""
    Z, U = tokens_of(shape), torch.randn(12, 12, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference.subspace_coding_rate(Z, U, HEADS, 1.3).sum(), Z)
    assert_close(exact_gradient(Z, U, HEADS, 1.3), expected, 1e-10)
    assert_close(exact_gradient(Z.float(), U.float(), HEADS, 1.3), expected, 1e-4)

    bound = taylor_bound(Z, U, HEADS, 1.3)
    assert_close(bound, reference.taylor_bound(Z, U, HEADS, 1.3), 1e-10)
    first = 1.3 / 2 * (Z @ U).square().sum((-2, -1))  # all K heads together: a Frobenius norm
    for orders, value in (((1, 2), bound), ((1,), first), ((2,), bound - first)):
        (expected,) = torch.autograd.grad(value.sum(), Z, retain_graph=True)
        assert_close(expansion_gradient(Z, U, HEADS, 1.3, orders), expected, 1e-10)
    for function in (subspace_coding_rate, exact_gradient, expansion_gradient, taylor_bound):
        assert torch.equal(function(Z, U, HEADS), function(Z, U, HEADS, 1.0))  # gamma is 1 by default


def all_rates(Z, U):
    """Everything that multiplies matrices."""
    closed = [exact_gradient(Z, U, HEADS), expansion_gradient(Z, U, HEADS), taylor_bound(Z, U, HEADS)]
    return [coding_rate(Z, 0.7), subspace_coding_rate(Z, U, HEADS), *closed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [5, 20])
def test_autocast_tf32_and_half_tokens_change_nothing(N, dtype):
    Z, U = tokens_of((2, N, 12), dtype), torch.randn(12, 12, requires_grad=True)
    plain, before = all_rates(Z.float(), U), torch.get_float32_matmul_precision()
    (wanted,) = torch.autograd.grad(plain[0].sum(), Z)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            inside = all_rates(Z, U)
            (gradient,) = torch.autograd.grad(inside[0].sum(), Z)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for actual, expected in zip(inside, plain):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    assert gradient.dtype == dtype and torch.equal(gradient, wanted)


def near_equal(norm, spread, N, d):
    """float32 tokens (2, N, d) of that norm, apart from each other by `spread` of it."""
    Z = torch.randn(1, 1, d, dtype=torch.float64) + spread * torch.randn(2, N, d, dtype=torch.float64)
    return (Z * norm / Z.norm(dim=-1).mean()).float()


@pytest.mark.parametrize("N, d", [(65, 384), (17, 48), (65, 8)])
def test_float32_rates_of_nearly_equal_and_of_large_tokens(N, d):
    """In float32 alone they are wrong, or there is no Cholesky factor."""
    for exponent in range(-3, 7):
        for spread in (1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            Z = near_equal(10.0**exponent, spread, N, d)
            expected = torch.linalg.svdvals(Z.double()).square().mul(6).log1p().sum(-1) / 2
            error = (coding_rate(Z, 6.0) - expected).abs() / expected.clamp(min=1)
            assert error.max() < (2e-4 if exponent < 6 else 2e-3), (exponent, spread)
    Z = near_equal(1e2, 1e-3, N, d).requires_grad_()
    wide = Z.detach().double().requires_grad_()
    coding_rate(Z, 6.0).sum().backward()
    coding_rate(wide, 6.0).sum().backward()
    assert_close(Z.grad, wide.grad, 1e-3)


def test_tokens_at_another_norm():
    Z, other = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 7, 12, dtype=torch.float64)
    assert_close(rates.norm_ratio(other, Z) * Z, reference.at_norm_of(Z, other), 1e-12)
    assert torch.equal(rates.norm_ratio(torch.full((2, 3), 10.0), torch.zeros(2, 3)) * torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rate", [lambda Z: coding_rate(Z, 0.7), subspace_gradient], ids=["rate", "gradient"])
def test_tokens_that_are_not_finite(rate, shape, value):
    Z = torch.randn(shape)
    Z[(-1,) * len(shape)] = value
    with pytest.raises(ValueError, match="not finite"):
        rate(Z)


@pytest.mark.cuda
@pytest.mark.parametrize("rate", [lambda Z: coding_rate(Z, 6.0), subspace_gradient], ids=["rate", "gradient"])
def test_on_cuda_what_is_not_finite_becomes_nan_and_only_that(rate):
    Z = torch.randn(5, 65, 384, device="cuda")
    Z[1, 3, 4], Z[3] = math.nan, Z[3] * 1e30
    assert rate(Z).isfinite().view(5, -1).all(1).tolist() == [True, False, True, True, True]


def test_log_approximations():
    h = 1e-3
    log, first, second, term = rates.log_approximations(torch.tensor([1 - h, 1, 1 + h], dtype=torch.float64)).values()
    for values, order in ((first, 2), (second, 3)):  # the error's order at 1
        assert values[1] == 0 < (values - log)[[0, 2]].abs().max() < h**order
    assert_close(term, second - first, 1e-12)


@pytest.mark.parametrize("function", [rates.subspaces, subspace_coding_rate, exact_gradient, expansion_gradient, taylor_bound])
def test_shapes_that_do_not_fit(function):
    Z, U = torch.randn(2, 16, 12), torch.randn(12, 12)
    for tokens, matrix, heads, reason in [
        (Z, torch.randn(12, 36), 3, r"U must be \(d, d\).* not \(12, 36\)"),
        (Z, torch.randn(12), 3, r"U must be \(d, d\).* not \(12,\)"),
        (torch.randn(12), U, 3, r"tokens must be \(..., N, d\)"),
        (torch.randn(2, 16, 8), U, 2, r"d = 12 as in U, not \(2, 16, 8\)"),
        (Z, U, 5, "width 12 is not divisible by heads 5"),
        (Z, U, 0, "heads 0"),
    ]:
        with pytest.raises(ValueError, match=reason):
            function(tokens, matrix, heads)
    with pytest.raises(ValueError, match=r"tokens must be .* not \(12,\)"):
        coding_rate(Z[0, 0], 1.0)
