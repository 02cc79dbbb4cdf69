"""MSSA with its output matrices, ISTA, dropout and the Layer of every variant, against tests/reference.py."""

import math

import pytest
import torch
from torch.func import functional_call

from crate.config import VARIANT_TABLE
from crate.layers import ISTA, LARGE, Layer, dropout, dropout_factors, subspace_attention
from crate.rates import merge_heads, split_heads
from tests import reference
from tests.reference import assert_close, copies

VARIANTS = list(VARIANT_TABLE)
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
    output = merge_heads(subspace_attention(split_heads(narrow, HEADS), scale))
    assert output.dtype == dtype
    assert_close(output, expected, tolerance)
    with torch.no_grad():
        assert_close(merge_heads(subspace_attention(split_heads(narrow, HEADS), scale)), expected, tolerance)
    (gradient,) = torch.autograd.grad(output, narrow, upstream.to(dtype))
    assert_close(gradient, torch.autograd.grad(expected, Z, upstream)[0], tolerance)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 5, 4), (2, 1, 3, 5, 4)], ids=str)
def test_attention_takes_any_leading_shape(shape):
    V = randn(*shape)
    weights = torch.softmax(0.5 * V @ V.mT, dim=-1)
    assert_close(subspace_attention(V, 0.5), weights @ V, 1e-12)
    assert_close(subspace_attention(V), torch.softmax(V @ V.mT, dim=-1) @ V, 1e-12)  # without temperature by default


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 1, 3, 4), (1, 1, 4)], ids=str)
def test_attention_gradcheck(shape, p):
    V = randn(*shape)
    assert torch.autograd.gradcheck(reseeded(lambda V: subspace_attention(V, 0.7, p)), V)


@pytest.mark.parametrize("N", [TOKENS, LARGE + 1])
def test_attention_weights_of_a_token_sum_to_one(N):
    V = torch.randn(2, HEADS, N, 4, dtype=torch.float64)
    V[..., 0] = 1.0  # every token's: a weighted mean of ones is one
    output = subspace_attention(V, 0.5)
    assert_close(output[..., 0], torch.ones(2, HEADS, N), 1e-12)
    assert (output[..., 1:].amax(-2) <= V[..., 1:].amax(-2)).all()
    assert_close(subspace_attention(torch.ones(1, 2, N, 4)), torch.ones(1, 2, N, 4), 1e-6)


def test_attention_at_large_logits():
    V = torch.randn(2, HEADS, TOKENS, 4) * 1e3  # a token's own logit is the largest, by far: softmax = argmax
    nearest = (V @ V.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, 4)
    assert_close(subspace_attention(V), V.gather(-2, nearest), 1e-6)


@pytest.mark.parametrize("N", [64, LARGE + 1])
def test_dropped_attention_weights(N):
    p, c = 0.3, 1.5
    V = c * torch.eye(N, dtype=torch.float64).expand(2, 1, N, N)  # the output is c times the weights
    weights = torch.softmax(0.5 * V @ V.mT, dim=-1)
    ratio = subspace_attention(V, 0.5, p) / (c * weights)
    kept = ratio != 0
    assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - p)), 1e-4)  # p is rounded to 2^-16
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation
    assert (kept[0] != kept[1]).any()


def test_mean_over_dropout_is_attention_without_it():
    V, draws = torch.randn(1, 2, 6, 4, dtype=torch.float64), 20000
    outputs = subspace_attention(V.expand(draws, -1, -1, -1), 0.5, 0.3)
    deviations = outputs.std(0) / math.sqrt(draws)
    assert (outputs.std(0) > 0.01).all()
    assert ((outputs.mean(0) - subspace_attention(V, 0.5)[0]).abs() < 5 * deviations).all()


def test_gradient_uses_the_masks_of_the_forward_pass():
    Z, upstream, p = randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64), 0.4
    output = reseeded(lambda: merge_heads(subspace_attention(split_heads(Z, HEADS), 0.5, p)))()
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


# ISTA (Eq. 3)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_ista_and_its_gradients(dtype, tolerance):
    ista, Y, upstream = ISTA(WIDTH).to(dtype), randn(2, TOKENS, WIDTH), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    D, narrow = narrowed(ista.D, torch.float64), narrowed(Y, dtype)
    expected, output = reference.ista(Y, D), ista(narrow)
    assert output.dtype == dtype and (output == 0).any() and (output > 0).any()
    assert_close(output, expected, tolerance)
    gradients = torch.autograd.grad(output, (narrow, ista.D), upstream.to(dtype))
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, (Y, D), upstream)):
        assert_close(actual, wanted, tolerance)


def test_ista_gradcheck():
    ista = ISTA(5).double()
    inputs = randn(2, 3, 5), narrowed(ista.D, torch.float64)
    assert torch.autograd.gradcheck(lambda Y, D: functional_call(ista, {"D": D}, Y), inputs)


def test_ista_takes_a_descent_step_on_its_objective():
    """Eq. 3 is a proximal gradient step on 1/2 ||y - D z||^2 + lambda ||z||_1, z >= 0, from z = y."""
    ista, y = ISTA(WIDTH).double(), torch.rand(50, 1, WIDTH, dtype=torch.float64)  # y >= 0: a feasible start

    def objective(z):
        return (y.mT - ista.D @ z.mT).square().sum((-2, -1)) / 2 + ista.sparsity * z.sum((-2, -1))

    ista.D.data *= 0.9 * ista.beta**-0.5 / torch.linalg.matrix_norm(ista.D.data, ord=2)  # beta below 1 / Lipschitz
    assert (objective(ista(y)) < objective(y)).all()


def test_released_step_sizes():
    ista = ISTA(4)
    assert (ista.beta, ista.sparsity) == (0.1, 0.1)
    bound = math.sqrt(6 / 400)  # Kaiming-uniform
    D = ISTA(400).D.detach()
    assert 0.99 * bound < D.abs().max() <= bound and abs(D.mean()) < 1e-3
    ista = ISTA(4)
    ista.D.data.zero_()  # M = I: what remains is the threshold beta lambda = 0.01
    assert_close(ista(torch.tensor([[-1.0, 0.005, 0.02, 1.0]])), torch.tensor([[0, 0, 0.01, 0.99]]), 1e-6)


def test_ista_matrix_under_autocast():
    ista, tokens = ISTA(WIDTH), torch.randn(2, TOKENS, WIDTH)
    plain, output = ista.matrix(), ista(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        inside, half = ista.matrix(), ista(tokens)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)
    assert half.dtype == torch.bfloat16
    assert_close(half, output, 2e-2)


# The variants


def build(variant, dtype=torch.float64, **options):
    """A layer with no parameter at a special value (LayerNorm's start at ones and zeros)."""
    layer = Layer(variant, width=WIDTH, heads=HEADS, **options).to(dtype)
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_and_its_gradients(variant, dtype, tolerance):
    layer, Z = build(variant, dtype), randn(2, TOKENS, WIDTH)
    narrow, upstream = narrowed(Z, dtype), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    weights = {name: narrowed(tensor, torch.float64) for name, tensor in copies(layer).items()}
    expected, output = reference.layer(Z, weights, variant, HEADS), layer(narrow)
    assert_close(output, expected, tolerance)
    names = [name for name, _ in layer.named_parameters()]
    assert len(names) == (13 if variant == "vit" else 6 + 2 * (variant == "crate"))
    gradients = torch.autograd.grad(output, (narrow, *layer.parameters()), upstream.to(dtype))
    wanted = torch.autograd.grad(expected, (Z, *(weights[name] for name in names)), upstream)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert gradient.any()
        assert_close(actual, gradient, tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compression_step_of_the_table(variant):
    layer, Z = build(variant), randn(2, TOKENS, WIDTH)
    weights = copies(layer)
    normed = reference.layer_norm(Z, weights, "norm1")
    U, scale = weights["mssa.U.weight"].mT, (WIDTH / HEADS) ** -0.5
    step = layer.compress(Z) - Z
    stacked = reference.attention(normed, U, HEADS, scale)
    if variant in ("crate-c", "crate-n"):  # Eq. 4 as printed: sum_k U_k U_k^T Z softmax((U_k^T Z)^T U_k^T Z)
        mssa, columns = 0, normed.mT
        for U_k in reference.subspaces(U, HEADS):
            mssa = mssa + U_k @ U_k.mT @ columns @ torch.softmax(scale * (U_k.mT @ columns).mT @ (U_k.mT @ columns), dim=-2)
        assert_close(step, mssa.mT if variant == "crate-c" else -mssa.mT, 1e-10)
    elif variant == "crate-t":
        assert_close(step, stacked @ U, 1e-10)  # rows: U^T h
    elif variant == "crate-e":  # Eq. 6, with the inverse on the tokens' side
        assert_close(step, reference.update("a", normed, U, HEADS) - normed, 1e-10)
        Z = normed.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(reference.subspace_coding_rate(Z, U, HEADS).sum(), Z)
        assert_close(step, -gradient, 1e-10)
    elif variant == "vit":
        queries, keys, values = (
            (normed @ weights[f"mssa.{name}.weight"].mT).unflatten(-1, (HEADS, -1)) for name in ("U", "key", "value")
        )
        scores = torch.einsum("bnkp,bmkp->bknm", queries, keys) * scale
        stacked = torch.einsum("bknm,bmkp->bnkp", scores.softmax(-1), values).flatten(-2)
        assert_close(step, stacked @ weights["mssa.W.weight"].mT + weights["mssa.W.bias"], 1e-10)
    elif variant == "crate":
        assert_close(step, stacked @ weights["mssa.W.weight"].mT + weights["mssa.W.bias"], 1e-10)
    elif variant == "crate-fix":
        assert_close(step, stacked @ layer.mssa.fixed.mT, 1e-10)
    else:
        assert_close(step, stacked, 1e-10)


def share_weights(layer, other):
    """Give `layer` the parameters of `other`."""
    assert not layer.load_state_dict(other.state_dict(), strict=False).unexpected_keys


def test_negative_is_conceptual_with_the_other_sign():
    conceptual, negative, Z = build("crate-c"), build("crate-n"), randn(2, TOKENS, WIDTH)
    share_weights(negative, conceptual)
    assert_close(conceptual.compress(Z) + negative.compress(Z), 2 * Z, 1e-12)
    assert (conceptual.compress(Z) - negative.compress(Z)).abs().max() > 0.1


TIED = {"crate-c": lambda U: U, "crate-t": lambda U: U.mT, "crate-identity": lambda U: torch.eye(WIDTH)}


@pytest.mark.parametrize("variant", TIED)
def test_crate_with_the_tied_matrix_is_the_tied_variant(variant):
    tied, crate, Z = build(variant), build("crate"), randn(2, TOKENS, WIDTH)
    share_weights(crate, tied)
    assert not torch.allclose(crate(Z), tied(Z))
    crate.mssa.W.weight.data.copy_(TIED[variant](tied.mssa.U.weight.mT))
    crate.mssa.W.bias.data.zero_()
    assert_close(crate(Z), tied(Z), 1e-10)


def test_fixed_output_matrix():
    layer, other = build("crate-fix"), build("crate-fix")
    assert dict(layer.named_buffers()).keys() == {"mssa.fixed"} and "mssa.fixed" in layer.state_dict()
    assert not layer.mssa.fixed.requires_grad and layer.mssa.W is None
    assert not torch.equal(layer.mssa.fixed, other.mssa.fixed)
    before = layer.mssa.fixed.clone()
    layer(randn(2, TOKENS, WIDTH)).sum().backward()
    assert layer.mssa.fixed.grad is None
    torch.optim.Adam(layer.parameters()).step()
    assert torch.equal(layer.mssa.fixed, before)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.mssa.fixed, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_tokens_alone_are_those_of_all(variant):
    layer, Z = build(variant), randn(2, TOKENS, WIDTH)
    some, upstream = layer(Z, first=2), torch.randn(2, 2, WIDTH, dtype=torch.float64)
    assert some.shape == (2, 2, WIDTH)
    whole = layer(Z)[:, :2]
    assert_close(some, whole, 1e-10)
    arguments = (Z, *layer.parameters())
    gradients = [torch.autograd.grad(output, arguments, upstream) for output in (some, whole)]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-10)
    dropping = build(variant, dropout=0.5)
    share_weights(dropping, layer)
    assert not torch.equal(dropping(Z, first=2), some)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_mode_has_no_dropout(variant):
    dropping, plain, Z = build(variant, dropout=0.5), build(variant), randn(2, TOKENS, WIDTH)
    share_weights(plain, dropping)
    assert torch.equal(dropping.eval()(Z), plain(Z))
    assert not torch.equal(dropping.train()(Z), plain(Z))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "vit"])  # whose mask is drawn inside the kernel
def test_dropout_sits_after_the_softmax_and_after_the_projection(variant):
    p, layer, Z = 0.4, build(variant, dropout=0.4), randn(2, TOKENS, WIDTH)
    upstream = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    output = reseeded(layer)(Z)
    torch.manual_seed(5)
    weights = copies(layer)
    keep = None if variant == "crate-e" else factors((2, HEADS, TOKENS, TOKENS), p).mT
    keep_output = factors((2, TOKENS, WIDTH), p)
    expected = reference.layer(Z, weights, variant, HEADS, keep, keep_output)
    assert_close(output, expected, 1e-10)
    gradients = torch.autograd.grad(output, (Z, *layer.parameters()), upstream)
    wanted = torch.autograd.grad(expected, (Z, *(weights[name] for name, _ in layer.named_parameters())), upstream)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert_close(actual, gradient, 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_gradcheck(variant):
    layer, Z = Layer(variant, width=4, heads=2, dropout=0.3).double(), randn(1, 3, 4)
    names = [name for name, _ in layer.named_parameters()]

    def call(Z, *parameters):
        return functional_call(layer, dict(zip(names, parameters)), Z)

    assert torch.autograd.gradcheck(reseeded(call), (Z, *(narrowed(p, torch.float64) for p in layer.parameters())))


def test_layer_under_autocast():
    layer, Z = build("crate-c", torch.float32), torch.randn(2, TOKENS, WIDTH)
    plain = layer(Z)
    expected = torch.autograd.grad(plain.sum(), layer.mssa.U.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(Z)
    (gradient,) = torch.autograd.grad(half.float().sum(), layer.mssa.U.weight)
    assert half.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    assert_close(half, plain, 3e-2)
    assert_close(gradient, expected, 0.1)


@pytest.mark.parametrize("temperature, scale", [("sqrt-p", (WIDTH / HEADS) ** -0.5), ("none", 1.0)])
def test_temperature_step_size_and_threshold_are_options(temperature, scale):
    layer, Z = build("crate-n", temperature=temperature, beta=0.3, sparsity=0.7), randn(2, TOKENS, WIDTH)
    weights = copies(layer)
    U = weights["mssa.U.weight"].mT
    V = reference.attention(reference.layer_norm(Z, weights, "norm1"), U, HEADS, scale)
    Y = Z - V @ U.mT
    expected = reference.ista(reference.layer_norm(Y, weights, "norm2"), weights["ista.D"], 0.3, 0.7)
    assert_close(layer(Z), expected, 1e-10)
