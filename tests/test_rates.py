"""Coding rates, their closed-form gradients and the second-order expansion, against tests/reference.py."""

import math

import pytest
import torch

from crate.kernels import self_attention
from crate.rates import (
    coding_rate,
    exact_gradient,
    expansion_gradient,
    log_approximations,
    merge_heads,
    norm_ratio,
    split_heads,
    subspace_coding_rate,
    subspace_gradient,
    taylor_bound,
)  # fmt: skip
from tests import reference
from tests.reference import assert_close, orthonormal

SHAPES = [(5, 12), (20, 12), (12, 12), (1, 12), (3, 5, 12), (2, 3, 20, 12)]  # N < d, N > d, N = d, one token, batches
HEADS = 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)


def tokens_of(shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def weighted(values):
    """A scalar whose gradient is another one for every image."""
    return (values * torch.linspace(0.5, 2, values.numel(), dtype=values.dtype).view(values.shape)).sum()


@pytest.mark.parametrize("dtype, value, gradient", [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-4, 1e-4)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rates_and_their_gradients(shape, dtype, value, gradient):
    Z, U = tokens_of(shape), torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    narrow, narrow_U = (tensor.detach().to(dtype).requires_grad_() for tensor in (Z, U))
    c, gamma = 0.7, 1.3

    expected, rate = reference.coding_rate(Z, c), coding_rate(narrow, c)
    assert rate.dtype == dtype and rate.shape == shape[:-2]
    assert_close(rate, expected, value)
    (gradient_expected,) = torch.autograd.grad(weighted(expected), Z)
    (gradient_Z,) = torch.autograd.grad(weighted(rate), narrow)
    assert gradient_Z.dtype == dtype
    assert_close(gradient_Z, gradient_expected, gradient)

    expected = reference.subspace_coding_rate(Z, U, HEADS, gamma)
    compressed = subspace_coding_rate(narrow, narrow_U, HEADS, gamma)
    assert_close(compressed, expected, value)
    gradients = torch.autograd.grad(weighted(compressed), (narrow, narrow_U))
    for actual, wanted in zip(gradients, torch.autograd.grad(weighted(expected), (Z, U))):
        assert_close(actual, wanted, gradient)


def test_gamma_is_one_by_default():
    Z, U = tokens_of((5, 12)), orthonormal(12)
    assert torch.equal(subspace_coding_rate(Z, U, HEADS), subspace_coding_rate(Z, U, HEADS, 1.0))
    assert torch.equal(exact_gradient(Z, U, HEADS), exact_gradient(Z, U, HEADS, 1.0))
    assert torch.equal(expansion_gradient(Z, U, HEADS), expansion_gradient(Z, U, HEADS, 1.0, (1, 2)))
    assert torch.equal(taylor_bound(Z, U, HEADS), taylor_bound(Z, U, HEADS, 1.0))


@pytest.mark.parametrize("shape", [(3, 6), (7, 6), (2, 6, 6)], ids=str)
def test_gradcheck(shape):
    Z, U = tokens_of(shape), torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda Z: coding_rate(Z, 0.8), Z)
    assert torch.autograd.gradcheck(lambda Z, U: subspace_coding_rate(Z, U, 2, 0.8), (Z, U))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_gradient_is_that_of_the_subspace_rate(shape):
    Z, U = tokens_of(shape), torch.randn(12, 12, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference.subspace_coding_rate(Z, U, HEADS, 1.3).sum(), Z)
    assert_close(exact_gradient(Z, U, HEADS, 1.3), expected, 1e-10)
    assert_close(exact_gradient(Z.float(), U.float(), HEADS, 1.3), expected, 1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_taylor_bound_and_its_gradient(shape):
    Z, U = tokens_of(shape), torch.randn(12, 12, dtype=torch.float64)
    bound = taylor_bound(Z, U, HEADS, 1.3)
    assert_close(bound, reference.taylor_bound(Z, U, HEADS, 1.3), 1e-10)
    first = 1.3 / 2 * (Z @ U).square().sum((-2, -1))  # all K heads together: a Frobenius norm
    for orders, value in (((1, 2), bound), ((1,), first), ((2,), bound - first)):
        (expected,) = torch.autograd.grad(value.sum(), Z, retain_graph=True)
        assert_close(expansion_gradient(Z, U, HEADS, 1.3, orders), expected, 1e-10)
    assert not expansion_gradient(Z, U, HEADS, 1.3, ()).any()


@pytest.mark.parametrize("seed", range(3))
def test_bounds_on_the_subspace_rate(seed):
    torch.manual_seed(seed)
    for exponent in range(-5, 4):
        Z, U = torch.randn(4, 9, 12, dtype=torch.float64) * 10.0**exponent, orthonormal(12)
        gamma = torch.rand(()).item() + 0.1
        compressed, rate = subspace_coding_rate(Z, U, HEADS, gamma), coding_rate(Z, gamma)
        slack = 1e-12 * compressed + 1e-13  # rounding of log(1 + tiny)
        assert (taylor_bound(Z, U, HEADS, gamma) <= compressed + slack).all()
        assert (compressed <= gamma / 2 * Z.square().sum((-2, -1)) + slack).all()  # log x <= x - 1
        assert (compressed >= rate - slack).all()  # Fischer: a block-diagonal part has the larger determinant
        assert (compressed <= HEADS * rate + slack).all()  # a projection has the smaller one
    assert taylor_bound(Z, U, HEADS).max() < 0 < compressed.min()  # at large scales the bound is useless


def test_the_taylor_bound_is_tight_to_second_order():
    Z, U = torch.randn(9, 12, dtype=torch.float64), orthonormal(12)
    gaps = [subspace_coding_rate(s * Z, U, HEADS) - taylor_bound(s * Z, U, HEADS) for s in (2e-2, 1e-2)]
    assert gaps[0] / gaps[1] == pytest.approx(2**6, rel=0.05)  # the third-order term in Z^T Z


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_properties_of_the_coding_rate(shape):
    Z, (N, d) = torch.randn(shape, dtype=torch.float64), shape[-2:]
    rate = coding_rate(Z, 0.7)
    assert torch.equal(coding_rate(torch.zeros_like(Z), 0.7), torch.zeros(shape[:-2], dtype=torch.float64))
    assert_close(coding_rate(Z @ orthonormal(d), 0.7), rate, 1e-12)  # rotated features
    assert_close(coding_rate(orthonormal(N) @ Z, 0.7), rate, 1e-12)  # rotated tokens
    assert_close(coding_rate(Z[..., torch.randperm(N), :], 0.7), rate, 1e-12)
    assert (coding_rate(Z, 0.71) > rate).all() and (coding_rate(1.01 * Z, 0.7) > rate).all()
    assert_close(coding_rate(Z * 3, 0.7), coding_rate(Z, 0.7 * 9), 1e-12)
    more = torch.cat([Z, torch.randn(*shape[:-2], 1, d, dtype=torch.float64)], dim=-2)
    assert (coding_rate(more, 0.7) > rate).all()


@pytest.mark.parametrize("N", [4, 40])
def test_orthogonal_blocks_add_up(N):
    A, B = torch.randn(N, 5, dtype=torch.float64), torch.randn(N, 7, dtype=torch.float64)
    blocks = torch.block_diag(A, B)  # (2 N, 12)
    assert_close(coding_rate(blocks, 0.7), coding_rate(A, 0.7) + coding_rate(B, 0.7), 1e-12)


def test_rate_of_one_token():
    assert coding_rate(torch.tensor([[3.0, 4.0]]), 2.0).item() == pytest.approx(math.log(1 + 2 * 25) / 2, rel=1e-6)


def test_subspace_rate_takes_the_columns_of_U_head_by_head():
    Z = torch.zeros(1, 6, dtype=torch.float64)
    Z[0, 3] = 2.0
    U = torch.zeros(6, 6, dtype=torch.float64)
    U[3, 0] = U[3, 1] = U[3, 4] = 1.0  # U_1 = columns 0..2 sees (2, 2, 0), U_2 = columns 3..5 sees (0, 2, 0)
    assert subspace_coding_rate(Z, U, 2).item() == pytest.approx((math.log(1 + 8) + math.log(1 + 4)) / 2)


def test_split_and_merge_heads():
    tokens = torch.randn(2, 5, 12)
    heads = split_heads(tokens, HEADS)
    assert heads.shape == (2, HEADS, 5, 4)
    for k in range(HEADS):
        assert torch.equal(heads[:, k], tokens[..., 4 * k : 4 * k + 4])
    assert torch.equal(merge_heads(heads), tokens)


def all_rates(Z, U):
    """Everything in crate.rates that multiplies matrices."""
    closed = [exact_gradient(Z, U, HEADS), expansion_gradient(Z, U, HEADS), taylor_bound(Z, U, HEADS)]
    return [coding_rate(Z, 0.7), subspace_coding_rate(Z, U, HEADS), *closed]


def gradients(rates, Z, U):
    return torch.autograd.grad(sum(rate.sum() for rate in rates[:2]), (Z, U))


@pytest.mark.parametrize("N", [5, 20])
def test_autocast_changes_nothing(N):
    Z, U = tokens_of((2, N, 12), torch.float32), torch.randn(12, 12, requires_grad=True)
    plain = all_rates(Z, U)
    with torch.autocast("cpu", torch.bfloat16):
        inside = all_rates(Z, U)
        (alone,) = torch.autograd.grad(coding_rate(Z, 0.7).sum(), Z)
        assert (Z @ U).dtype == torch.bfloat16  # autocast is on, before and after
    (alone_plain,) = torch.autograd.grad(coding_rate(Z, 0.7).sum(), Z)
    inside, plain = [*inside, *gradients(inside, Z, U), alone], [*plain, *gradients(plain, Z, U), alone_plain]
    for actual, expected in zip(inside, plain, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tokens_are_measured_in_float32(dtype):
    Z, U = tokens_of((2, 20, 12), dtype), torch.randn(12, 12)
    for actual, expected in (
        (coding_rate(Z, 0.7), coding_rate(Z.float(), 0.7)),
        (subspace_coding_rate(Z, U, HEADS), subspace_coding_rate(Z.float(), U, HEADS)),
    ):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(coding_rate(Z, 0.7).sum(), Z)
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_tf32_setting_is_as_before_outside(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        Z, U = tokens_of((2, 5, 12), torch.float32), torch.randn(12, 12, requires_grad=True)
        gradients(all_rates(Z, U), Z, U)
        with pytest.raises(ValueError):
            coding_rate(Z * math.nan, 0.7)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def near_equal(norm, spread, N, d):
    """float32 tokens (2, N, d) of that norm, apart from each other by `spread` of it."""
    Z = torch.randn(1, 1, d, dtype=torch.float64) + spread * torch.randn(2, N, d, dtype=torch.float64)
    return (Z * norm / Z.norm(dim=-1).mean()).float()


@pytest.mark.parametrize("N, d", [(65, 384), (17, 48), (65, 8)])
def test_float32_rates_of_nearly_equal_and_of_large_tokens(N, d):
    """Where float32 would be wrong without saying so: 7.89 for 7.66, or no Cholesky factor at all."""
    for exponent in range(-3, 7):
        for spread in (1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            Z = near_equal(10.0**exponent, spread, N, d)
            expected = torch.linalg.svdvals(Z.double()).square().mul(6).log1p().sum(-1) / 2
            error = (coding_rate(Z, 6.0) - expected).abs() / expected.clamp(min=1)
            assert error.max() < (2e-4 if exponent < 6 else 2e-3), (exponent, spread)


def test_gradient_of_nearly_equal_tokens():
    Z = near_equal(1e2, 1e-3, 65, 384).requires_grad_()
    wide = Z.detach().double().requires_grad_()
    coding_rate(Z, 6.0).sum().backward()
    coding_rate(wide, 6.0).sum().backward()
    assert Z.grad.dtype == torch.float32
    assert_close(Z.grad, wide.grad, 1e-3)


def test_tokens_at_another_norm():
    Z, other = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 7, 12, dtype=torch.float64)
    assert_close(norm_ratio(other, Z) * Z, reference.at_norm_of(Z, other), 1e-12)
    assert torch.equal(norm_ratio(torch.ones(2, 3), torch.zeros(2, 3)) * torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_that_are_not_finite(shape, value):
    for position in ((0,) * len(shape), tuple(n - 1 for n in shape)):
        Z, U = torch.randn(shape), torch.eye(12)
        Z[position] = value
        with pytest.raises(ValueError, match="not finite"):
            coding_rate(Z, 0.7)
        with pytest.raises(ValueError, match="not finite"):
            subspace_coding_rate(Z, U, HEADS)


def test_log_approximations():
    x = torch.linspace(0.1, 3, 30, dtype=torch.float64)
    curves = log_approximations(x)
    assert list(curves) == ["log x", "first order", "second order", "second-order term only"]
    assert_close(curves["log x"], x.log(), 1e-12)
    assert_close(curves["first order"] + curves["second-order term only"], curves["second order"], 1e-12)
    assert (curves["first order"] >= curves["log x"]).all()
    h = 1e-3
    near = log_approximations(torch.tensor([1 - h, 1, 1 + h], dtype=torch.float64))
    assert all(values[1] == 0 for values in near.values())
    for name, order in (("first order", 2), ("second order", 3)):  # the error's order at 1
        assert 0 < (near[name] - near["log x"])[[0, 2]].abs().max() < h**order
    term = near["second-order term only"]
    assert (term[0] - 2 * term[1] + term[2]).item() / h**2 == pytest.approx(-1)


# Fig. 5's experiment: N = 196, d = 384, K = 6, orthonormal U, standard Gaussian tokens

PRINTED = {"a": 976.9, "b": 2935.0, "c": 0.0, "d": 2937.9, "e": 1244.9}  # R^c after one layer; 979.8 before


@pytest.mark.parametrize("seed", [0, 1])
def test_update_rules_of_figure_5(seed):
    torch.manual_seed(seed)
    Z, U, K = torch.randn(196, 384, dtype=torch.float64), orthonormal(384), 6
    attention = merge_heads(self_attention(split_heads(Z @ U, K))) @ U.mT
    moved = {
        "a": Z - exact_gradient(Z, U, K),
        "b": Z - expansion_gradient(Z, U, K),
        "c": Z - expansion_gradient(Z, U, K, orders=(1,)),
        "d": Z - expansion_gradient(Z, U, K, orders=(2,)),
        "e": Z + attention,
        "n": Z - attention,
    }
    for rule, tokens in moved.items():
        assert_close(tokens, reference.update(rule, Z, U, K), 1e-10)
    before = subspace_coding_rate(Z, U, K)
    assert before.item() == pytest.approx(979.8, rel=5e-3)
    after = {rule: subspace_coding_rate(tokens, U, K).item() for rule, tokens in moved.items()}
    for rule, printed in PRINTED.items():
        assert after[rule] == pytest.approx(printed, rel=5e-3, abs=1e-6)
    assert before - 4 < after["a"] < before - 2 and after["n"] < before < after["e"]


@pytest.mark.parametrize("N, p", [(5, 3), (3, 5), (1, 1), (1, 4), (7, 1)])
def test_subspace_gradient_and_its_own_gradient(N, p):
    V = torch.randn(2, 3, N, p, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(subspace_gradient, (V, 0.7))
    (wanted,) = torch.autograd.grad(coding_rate(V, 0.7).sum(), V)  # the gradient of R^c, on the other side of the identity
    assert_close(subspace_gradient(V, 0.7), wanted, 1e-10)


def test_subspace_gradient_under_autocast_and_of_bad_tokens():
    V = torch.randn(2, 3, 9, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = subspace_gradient(V)
    assert inside.dtype == torch.float32
    assert_close(inside, subspace_gradient(V.double()), 1e-4)
    V[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        subspace_gradient(V)
