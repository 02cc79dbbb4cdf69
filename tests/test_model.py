"""ISTA, the layer and the classifier of every variant, against tests/reference.py."""

import math

import pytest
import torch
from torch import nn

from crate.model import ATTENTION, ISTA, MSSA, VARIANTS, Variant, build_model
from crate.rates import split_heads
from crate.srr import srr
from tests import reference
from tests.reference import assert_close, copies
from tests.test_kernels import factors, randn

WIDTH, K, TOKENS = 12, 3, 7
SMALL = dict(image_size=8, patch_size=4, channels=3, classes=5, width=WIDTH, depth=3, heads=K)
CRATE_TINY = dict(image_size=32, patch_size=4, channels=3, classes=10, width=384, depth=12, heads=6)
of_variants = pytest.mark.parametrize("variant", reference.VARIANTS)
WITHOUT_VIT = [name for name in reference.VARIANTS if name != "vit"]


def test_released_step_sizes_and_initialisation():
    bound = math.sqrt(6 / 400)  # Kaiming-uniform
    D = ISTA(400).D.detach()
    assert 0.99 * bound < D.abs().max() <= bound and abs(D.mean()) < 1e-3
    ista = ISTA(4)
    ista.D.data.zero_()  # M = I: what remains is the threshold beta lambda = 0.01
    assert_close(ista(torch.tensor([[-1.0, 0.005, 0.02, 1.0]])), torch.tensor([[0, 0, 0.01, 0.99]]), 1e-6)


def test_conceptual_layer_as_eqs_4_and_3_print_it():
    """MSSA is sum_k U_k U_k^T Z softmax((U_k^T Z)^T U_k^T Z), without a temperature."""
    layer, Z = small_model("crate-c", temperature="none", ista_beta=0.3, ista_lambda=0.7).layers[0], randn(2, TOKENS, WIDTH)
    weights = copies(layer)
    columns, U, mssa = reference.layer_norm(Z, weights, "norm1").mT, weights["mssa.U.weight"].mT, 0
    for U_k in reference.subspaces(U, K):
        mssa = mssa + U_k @ U_k.mT @ columns @ torch.softmax((U_k.mT @ columns).mT @ (U_k.mT @ columns), dim=-2)
    assert_close(layer.compress(Z) - Z, mssa.mT, 1e-10)
    expected = reference.ista(reference.layer_norm(Z + mssa.mT, weights, "norm2"), weights["ista.D"], 0.3, 0.7)
    assert_close(layer(Z), expected, 1e-10)


def test_fixed_output_matrix_is_random_and_kept_in_the_state():
    layer, other = small_model("crate-fix").layers[0], small_model("crate-fix").layers[0]
    assert not torch.equal(layer.mssa.fixed, other.mssa.fixed) and not layer.mssa.fixed.requires_grad
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.mssa.fixed, other.mssa.fixed)


@pytest.mark.parametrize("variant", WITHOUT_VIT)  # its mask is the kernel's own
def test_dropout_sits_after_the_softmax_and_after_the_projection(variant):
    p, layer, Z = 0.4, small_model(variant, dropout=0.4).layers[0], randn(2, TOKENS, WIDTH)
    torch.manual_seed(5)
    output = layer(Z)
    torch.manual_seed(5)
    keep = None if reference.fields(variant)[1] == "exact" else factors((2, K, TOKENS, TOKENS), p).mT
    expected = reference.layer(Z, copies(layer), variant, K, keep, factors((2, TOKENS, WIDTH), p))
    assert_close(output, expected, 1e-10)


def test_layer_under_autocast():
    layer, Z = small_model("crate-c").float().layers[0], torch.randn(2, TOKENS, WIDTH)
    plain, matrix = layer(Z), layer.ista.matrix()
    (expected,) = torch.autograd.grad(plain.sum(), layer.mssa.U.weight)
    with torch.autocast("cpu", torch.bfloat16):
        half, inside = layer(Z), layer.ista.matrix()
    (gradient,) = torch.autograd.grad(half.float().sum(), layer.mssa.U.weight)
    assert half.dtype == torch.bfloat16 and gradient.dtype == torch.float32 and torch.equal(inside, matrix)
    assert_close(half, plain, 3e-2)
    assert_close(gradient, expected, 0.1)


def small_model(variant, **changes):
    """A small model in float64, no parameter of it at a special value."""
    model = build_model(variant, **SMALL | changes).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def images_for(count=2, channels=3):
    return torch.randn(count, channels, 8, 8, dtype=torch.float64)


def expected_forward(model, variant, images):
    """The textbook's weights, logits and [Z^0 .. Z^L]."""
    weights = copies(model)
    return weights, *reference.forward(images, weights, variant, model.heads, model.patch_size, len(model.layers))


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in build_model(name, **CRATE_TINY).parameters()) for name in reference.PAPER}
    assert counts.pop("crate") == 5_381_098
    assert counts.pop("vit") == 5_381_098 + 12 * (9 * 384**2 + 5 * 384)  # key, value and an MLP in the place of D
    assert set(counts.values()) == {5_381_098 - 12 * (384**2 + 384)}


@pytest.mark.parametrize("changes", [{}, {"channels": 1, "patch_size": 2, "heads": 1, "depth": 1}], ids=["colour", "grey"])
@of_variants
def test_forward_and_the_gradient_of_every_parameter(variant, changes):
    """In eval mode, without dropout."""
    model, labels = small_model(variant, dropout=0.5, **changes).eval(), torch.tensor([1, 4])
    images = images_for(2, changes.get("channels", 3))
    weights, expected, tokens = expected_forward(model, variant, images)
    logits = model(images)
    assert_close(logits, expected, 1e-10)
    for actual, wanted in zip([model.embed(images), *model.layer_outputs(images)], tokens, strict=True):
        assert_close(actual, wanted, 1e-10)
    nn.functional.cross_entropy(expected, labels).backward()
    nn.functional.cross_entropy(logits, labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any()
        assert_close(parameter.grad, weights[name].grad, 1e-10)
    assert_close(model.float()(images.float()), expected, 1e-4)


def test_dropout_after_the_positions():
    model, images = small_model("vit", dropout=0.5), images_for()
    _, _, tokens = expected_forward(model, "vit", images)
    torch.manual_seed(5)
    dropped = model.embed(images)
    torch.manual_seed(5)
    assert_close(dropped, tokens[0] * factors(dropped.shape, 0.5), 1e-10)
    assert not torch.equal(model.layers[1](dropped), model.layers[1](dropped))


@pytest.mark.parametrize("key, value", [("heads", 5), ("patch_size", 3), ("dropout", 1.0)])
def test_sizes_that_do_not_fit(key, value):
    with pytest.raises(ValueError, match=f"{key.replace('_', ' ')} {value}"):
        build_model("crate", **SMALL | {key: value})
    with pytest.raises(ValueError, match="output matrix V is unknown"):
        MSSA(width=WIDTH, heads=K, output="V")


@pytest.mark.parametrize("variant", WITHOUT_VIT)  # torch's kernel says that it can't
def test_hessian_vector_product(variant):
    """By autograd, against central differences of the gradient of training, with SRR and dropout in the loss."""
    model, images, labels = small_model(variant, dropout=0.3), images_for(), torch.tensor([1, 4])
    parameters = list(model.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()
    direction = torch.randn_like(start)

    def gradient(step, create_graph=False):
        nn.utils.vector_to_parameters(start + step * direction, parameters)
        torch.manual_seed(5)
        tokens, U = model.layer_outputs(images)[-1], model.layers[-1].mssa.U.weight.mT
        loss = nn.functional.cross_entropy(model(images), labels) + 0.1 * srr(tokens, U, K).mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph)
        return torch.cat([gradient.flatten() for gradient in gradients])

    expected = (gradient(1e-6) - gradient(-1e-6)) / 2e-6
    products = torch.autograd.grad(gradient(0, True), parameters, direction, allow_unused=True, materialize_grads=True)
    assert_close(torch.cat([product.flatten() for product in products]), expected, 1e-5)


def test_a_new_row_and_a_new_step_are_a_new_variant(monkeypatch):
    def linear_attention(mssa, tokens, p):
        V = split_heads(mssa.U(tokens), mssa.heads)
        return V @ (V.mT @ V)

    monkeypatch.setitem(ATTENTION, "linear", linear_attention)
    monkeypatch.setitem(VARIANTS, "mine", Variant(-0.5, "linear", "U", "ISTA", "half the second-order term"))
    layer, Z = small_model("mine").layers[0], randn(2, TOKENS, WIDTH)
    weights = copies(layer)
    normed = reference.layer_norm(Z, weights, "norm1")
    step = reference.update("d", normed, weights["mssa.U.weight"].mT, K) - normed
    assert_close(layer.compress(Z) - Z, -0.5 * step, 1e-10)
    assert small_model("mine")(images_for()).shape == (2, 5)
