"""The SRR measure, its gradient in Eq. 14, and both on other people's networks, against tests/reference.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crate.model import build_model
from crate.srr import evaluating, layer_srr, operator_rates, parts, record, srr
from tests import reference
from tests.reference import assert_close, copies, orthonormal

DEPTH, HEADS, PATCH = 3, 3, 4
SIZES = dict(image_size=8, patch_size=PATCH, channels=1, classes=5, width=12, depth=DEPTH, heads=HEADS)
PARTS = ["l0", "rate_subspaces", "rate", "srr"]
of_variants = pytest.mark.parametrize("variant", reference.VARIANTS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(14)


def small_model(variant="crate", **changes):
    model = build_model(variant, **SIZES | changes).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def images_for(count=6):
    return torch.randn(count, 1, 8, 8, dtype=torch.float64)


def expected_outputs(model, variant, images):
    """The textbook's weights, logits and [Z^0 .. Z^L], in float64."""
    weights = {name: tensor.detach().double().requires_grad_() for name, tensor in copies(model).items()}
    return weights, *reference.forward(images.double(), weights, variant, HEADS, PATCH, DEPTH)


# The function of tokens


def sparse_tokens(*shape):
    return F.relu(torch.randn(shape, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("N", [5, 20])
def test_measure_of_tokens_and_its_gradients(N):
    Z, U = sparse_tokens(4, N, 12), torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([reference.srr_parts(z[None], U, HEADS, 0.3, 0.8)["srr"] for z in Z])
    measure = srr(Z, U, HEADS, sparsity=0.3, gamma=0.8)
    assert_close(measure, expected, 1e-10)
    for actual, wanted in zip(torch.autograd.grad(measure.sum(), (Z, U)), torch.autograd.grad(expected.sum(), (Z, U))):
        assert_close(actual, wanted, 1e-10)
    assert_close(srr(Z, U, HEADS), srr(Z, U, HEADS, sparsity=0.1, gamma=1.0, norm="l0"), 1e-12)
    l0, rate_subspaces, rate = parts(Z, U, HEADS, 0.8)
    assert_close(0.3 * l0 + rate_subspaces - rate, measure, 1e-12)
    assert l0.tolist() == [int((z > 0).sum()) for z in Z]


def test_l1_is_a_surrogate_with_a_gradient():
    Z, U = sparse_tokens(4, 5, 12), orthonormal(12)
    rates = srr(Z, U, HEADS, sparsity=0.0)
    surrogate = srr(Z, U, HEADS, sparsity=0.5, norm="l1")
    assert_close(surrogate - rates, 0.5 * Z.abs().sum((1, 2)), 1e-12)
    gradients = [torch.autograd.grad(x.sum(), Z, retain_graph=True)[0] for x in (surrogate, rates)]
    assert_close(gradients[0] - gradients[1], 0.5 * Z.sign(), 1e-12)
    with pytest.raises(ValueError, match="l0 or l1"):
        srr(Z, U, HEADS, norm="l2")


def test_half_precision_tokens_and_bad_ones():
    Z, U = torch.randn(2, 5, 12), torch.randn(12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        inside = srr(Z, U, HEADS)
    assert inside.dtype == torch.float32 and torch.equal(inside, srr(Z, U, HEADS))
    assert torch.equal(srr(Z.bfloat16(), U, HEADS), srr(Z.bfloat16().float(), U, HEADS))
    Z[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        srr(Z, U, HEADS)


# Recording


class Block(nn.Module):
    """A module that takes a keyword, and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens, mask=None):
        return self.linear(tokens), "weights"


def test_record_any_modules_and_leave_no_trace():
    blocks = [Block() for _ in range(3)]
    Z = torch.randn(2, 5, 4)
    with record(blocks) as (inputs, outputs):
        first = blocks[0](Z)[0]
        last = blocks[2](tokens=first, mask=None)[0]  # one that isn't called, one by keyword
    assert inputs[0] is Z and outputs[0] is first and inputs[2] is first and outputs[2] is last
    assert len(inputs) == len(outputs) == 3 and inputs[1] is outputs[1] is None
    with record(reversed(blocks[:2])) as (inputs, outputs):  # the list's order, not that of the calls
        middle = blocks[1](blocks[0](Z)[0])[0]
    assert inputs[1] is Z and outputs[0] is middle
    with pytest.raises(RuntimeError), record(blocks) as (inputs, _):
        blocks[0](torch.randn(2, 5, 7))
    blocks[0](Z)
    assert inputs == [None] * 3 and all(not block._forward_hooks for block in blocks)


# Every layer of our models


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.7, "gamma": 0.4}], ids=["default", "other"])
@of_variants
def test_measure_of_every_layer(variant, options):
    model, images = small_model(variant), images_for()
    _, _, outputs = expected_outputs(model, variant, images)
    measured = layer_srr(model, images, **options)
    assert len(measured) == DEPTH
    for l, row in enumerate(measured):
        expected = reference.srr_parts(outputs[l + 1], model.layers[l].mssa.U.weight.mT, HEADS, **options)  # outputs[0] is Z^0
        assert list(row) == PARTS and all(type(value) is float for value in row.values())
        for part in PARTS:
            assert_close(row[part], expected[part], 1e-10)
    for row, wide in zip(layer_srr(model.float(), images.float(), **options), measured):
        assert all(row[part] == pytest.approx(wide[part], rel=1e-4, abs=1e-3) for part in PARTS)


def test_l0_counts_all_tokens_of_one_image():
    model = small_model("crate-c")
    model.layers[1].norm2.weight.data.zero_()
    model.layers[1].norm2.bias.data.copy_(torch.tensor([1.0, -1.0] * 6))
    model.layers[1].ista.D.data.zero_()  # ISTA is then a threshold at 0.01: half of the features are left
    assert layer_srr(model, images_for())[1]["l0"] == (4 + 1) * 6  # four patches and CLS


def test_chunks_do_not_matter():
    model, images = small_model(), images_for(7)
    whole = layer_srr(model, images)
    for chunk in (1, 3, 100):
        for row, expected in zip(layer_srr(model, images, chunk=chunk), whole, strict=True):
            assert row == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(training):
    model, images = small_model(dropout=0.5).train(training), images_for()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    measured = layer_srr(model, images)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)  # no dropout in the measure; a run goes on as if unmeasured
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training == training and layer_srr(model, images) == measured


@pytest.mark.parametrize("matrix", ["key", "value"])
def test_other_matrices_of_a_standard_transformer_as_subspaces(matrix):
    model, images = small_model("vit"), images_for()
    _, _, outputs = expected_outputs(model, "vit", images)
    for l, row in enumerate(layer_srr(model, images, matrix=matrix)):
        U = getattr(model.layers[l].mssa, matrix).weight.mT
        assert_close(row["srr"], reference.srr_parts(outputs[l + 1], U, HEADS)["srr"], 1e-10)


@of_variants
def test_rates_around_the_operators(variant):
    model, images = small_model(variant), images_for()
    weights, _, outputs = expected_outputs(model, variant, images)
    rows = operator_rates(model, images, sparsity=0.3, gamma=0.8, chunk=4)
    sign, _, _, sparsification = reference.fields(variant)
    for l, points in enumerate(rows):
        own, U, before = reference.of_layer(weights, l), model.layers[l].mssa.U.weight.mT, outputs[l]
        step = reference.compression_step(reference.layer_norm(before, own, "norm1"), own, variant, HEADS)
        tokens = {"input": before, "compressed": before + sign * step}
        if sparsification == "ISTA":
            tokens["normalised"] = reference.layer_norm(tokens["compressed"], own, "norm2")
        tokens["output"] = outputs[l + 1]
        assert list(points) == list(tokens)
        for point, value in tokens.items():
            expected = reference.srr_parts(value, U, HEADS, sparsity=0.3, gamma=0.8)
            for part in PARTS:
                assert_close(points[point][part], expected[part], 1e-10)
            if point != "input":
                scaled = reference.subspace_coding_rate(reference.at_norm_of(value, before), U, HEADS, 0.8).mean()
                assert_close(points[point]["rate_subspaces_equal_norm"], scaled, 1e-10)
            before = value
    assert [points["output"]["srr"] for points in rows] == pytest.approx([r["srr"] for r in layer_srr(model, images, 0.3, 0.8)])


@pytest.mark.parametrize("layer", range(DEPTH))
def test_measure_of_tokens_that_are_not_finite(layer):
    model = small_model().train()
    model.layers[layer].ista.D.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=f"layer {layer + 1}: "):
        layer_srr(model, images_for())
    assert model.training


# Eq. 14 as one expression


def eq_14(model, images, labels, layers, eta, **options):
    """Cross-entropy + eta times the mean SRR of `layers` (0-based), each run again on what entered it, as a user writes it."""
    with record([model.layers[l] for l in layers]) as (inputs, _):
        loss = F.cross_entropy(model(images), labels)
    for l, Z in zip(layers, inputs, strict=True):
        layer = model.layers[l]
        loss = loss + eta / len(layers) * srr(layer(Z.detach()), layer.mssa.U.weight.mT, model.heads, **options).mean()
    return loss


@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("layers", [[2], [0], [0, 1, 2]], ids=["last", "first", "all"])
@of_variants
def test_gradients_of_eq_14(variant, layers, norm):
    model, images, labels = small_model(variant), images_for(), torch.tensor([0, 1, 2, 3, 4, 0])
    options = dict(sparsity=0.3, gamma=0.8, norm=norm)
    weights, logits, outputs = expected_outputs(model, variant, images)
    regulariser = reference.stop_gradient_srr(outputs, weights, variant, HEADS, layers, **options)
    expected = F.cross_entropy(logits, labels) + 0.7 * regulariser
    loss = eq_14(model, images, labels, layers, 0.7, **options)
    assert_close(loss, expected, 1e-10)
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, weights[name].grad, 1e-10)
    plain = small_model(variant)
    plain.load_state_dict(model.state_dict())
    F.cross_entropy(plain(images), labels).backward()
    for name, parameter in plain.named_parameters():  # what lies outside these layers feels cross-entropy alone
        if not any(name.startswith(f"layers.{l}.") for l in layers):
            assert_close(model.get_parameter(name).grad, parameter.grad, 1e-10)


# Other people's networks: the README's examples. tests/test_readme.py runs them as they stand.


def vision_transformer():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=3, num_heads=3, hidden_dim=12, mlp_dim=24, num_classes=5
    ).double()


def query_matrix(block):
    return block.self_attention.in_proj_weight[: block.self_attention.embed_dim].mT


def test_every_layer_of_a_torchvision_network():
    network, images = vision_transformer(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    blocks = list(network.encoder.layers)
    with evaluating(network), record(blocks) as (_, outputs):
        network(images)
        tokens = network._process_input(images)
        tokens = torch.cat([network.class_token.expand(4, -1, -1), tokens], 1) + network.encoder.pos_embedding
        for block, output in zip(blocks, list(outputs), strict=True):  # the same, one block after the other
            tokens = block(tokens)
            assert_close(output, tokens, 1e-10)
            expected = reference.srr_parts(tokens, query_matrix(block), 3)["srr"]
            assert_close(srr(output, query_matrix(block), 3).mean(), expected, 1e-10)


def test_eq_14_on_a_torchvision_network_reaches_one_block():
    network, images = vision_transformer(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    last = network.encoder.layers[-1]
    with record([last]) as (inputs, _):
        network(images)
    srr(last(inputs[0].detach()), query_matrix(last), 3).mean().backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and all(name.startswith("encoder.layers.encoder_layer_2.") for name in reached)
