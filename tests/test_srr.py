"""The SRR measure of every layer (Eq. 11) and the regulariser's gradients (Eq. 14), against tests/reference.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from crate.model import VARIANTS, build_model
from crate.srr import add_srr_gradients, layer_srr, operator_rates
from tests import reference
from tests.reference import assert_close, copies

DEPTH, HEADS, PATCH = 3, 3, 4
SIZES = dict(image_size=8, patch_size=PATCH, channels=1, classes=5, width=12, depth=DEPTH, heads=HEADS)
LAYERS = {"last": [2], "first": [0], "middle": [1], "all": [0, 1, 2], "several": [2, 0]}
PARTS = ["l0", "rate_subspaces", "rate", "srr"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(14)


def small_model(variant="crate", dtype=torch.float64, **changes):
    model = build_model(variant, **SIZES | changes).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def images_for(count=6, dtype=torch.float64):
    return torch.randn(count, 1, 8, 8, dtype=dtype)


def expected_outputs(model, variant, images):
    """The textbook's weights, logits and [Z^0 .. Z^L], in float64."""
    weights = {name: tensor.detach().double().requires_grad_() for name, tensor in copies(model).items()}
    return weights, *reference.forward(images.double(), weights, variant, HEADS, PATCH, DEPTH)


def expected_gradients(model, variant, images, layers, **options):
    """Eq. 14's measure and {parameter name: its gradient or None}, from layers run again on detached inputs."""
    weights, _, outputs = expected_outputs(model, variant, images)
    measure = reference.stop_gradient_srr(outputs, weights, variant, HEADS, layers, **options)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(measure, [weights[name] for name in names], allow_unused=True)
    return measure, dict(zip(names, gradients))


def in_layers(name, layers):
    return any(name.startswith(f"layers.{layer}.") for layer in layers)


# The measure


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.7, "gamma": 0.4}], ids=["default", "other"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_measure_of_every_layer(variant, options):
    model, images = small_model(variant), images_for()
    _, _, outputs = expected_outputs(model, variant, images)
    measured = layer_srr(model, images, **options)
    assert len(measured) == DEPTH
    for index, row in enumerate(measured):
        U = model.layers[index].mssa.U.weight.mT
        expected = reference.srr_parts(outputs[index + 1], U, HEADS, **options)  # outputs[0] is Z^0
        assert list(row) == PARTS and all(type(value) is float for value in row.values())
        assert 0 < row["l0"] < outputs[1][0].numel() or variant == "vit"  # which has no ReLU
        for part in PARTS:
            assert_close(row[part], expected[part], 1e-10)
    narrow = layer_srr(model.float(), images.float(), **options)
    for row, wide in zip(narrow, measured):
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
    for chunk in (1, 3, 7, 100):
        for row, expected in zip(layer_srr(model, images, chunk=chunk), whole, strict=True):
            assert row == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(training):
    model, images = small_model(dropout=0.5).train(training), images_for()
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    measured = layer_srr(model, images)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)  # no dropout in the measure; a run goes on as if unmeasured
    assert layer_srr(model.eval(), images) == measured


@pytest.mark.parametrize("matrix", ["key", "value"])
def test_other_matrices_of_a_standard_transformer_as_subspaces(matrix):
    model, images = small_model("vit"), images_for()
    _, _, outputs = expected_outputs(model, "vit", images)
    for index, row in enumerate(layer_srr(model, images, matrix=matrix)):
        U = getattr(model.layers[index].mssa, matrix).weight.mT
        assert_close(row["srr"], reference.srr_parts(outputs[index + 1], U, HEADS)["srr"], 1e-10)
    assert layer_srr(model, images, matrix=matrix)[0]["srr"] != layer_srr(model, images)[0]["srr"]


@pytest.mark.parametrize("variant", ["crate-n", "crate-e", "vit"])
def test_rates_around_the_operators(variant):
    model, images = small_model(variant), images_for()
    weights, _, outputs = expected_outputs(model, variant, images)
    rows = operator_rates(model, images, sparsity=0.3, gamma=0.8, chunk=4)
    for index, points in enumerate(rows):
        own, U = reference.of_layer(weights, index), model.layers[index].mssa.U.weight.mT
        before, normed = outputs[index], reference.layer_norm(outputs[index], own, "norm1")
        if variant == "crate-n":
            step = -reference.output_projection(
                reference.attention(normed, own["mssa.U.weight"].mT, HEADS, 2**-1), own, variant
            )
        elif variant == "crate-e":
            step = reference.update("a", normed, own["mssa.U.weight"].mT, HEADS) - normed
        else:
            step = reference.output_projection(reference.standard_attention(normed, own, HEADS), own, variant)
        tokens = {"input": before, "compressed": before + step, "output": outputs[index + 1]}
        if variant != "vit":
            tokens["normalised"] = reference.layer_norm(before + step, own, "norm2")
        assert points.keys() == tokens.keys()
        for point, value in tokens.items():
            expected = reference.srr_parts(value, U, HEADS, sparsity=0.3, gamma=0.8)
            for part in PARTS:
                assert_close(points[point][part], expected[part], 1e-10)
    assert [points["output"] for points in rows] == [pytest.approx(row) for row in layer_srr(model, images, 0.3, 0.8)]


def spoil(model, layer):
    model.layers[layer].ista.D.data[0, 0] = math.nan


@pytest.mark.parametrize("layer", range(DEPTH))
def test_measure_of_tokens_that_are_not_finite(layer):
    model = small_model().train()
    spoil(model, layer)
    with pytest.raises(ValueError, match=f"layer {layer + 1}: "):
        layer_srr(model, images_for())
    assert model.training


# Eq. 14


@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_layers_run_again_on_detached_tokens(variant, layers, norm):
    model, images = small_model(variant), images_for()
    options = dict(sparsity=0.3, gamma=0.8, norm=norm)
    expected_measure, expected = expected_gradients(model, variant, images, layers, **options)
    measure = add_srr_gradients(model, model.layer_outputs(images), layers, 2.5, **options)
    assert not measure.requires_grad and measure.ndim == 0
    assert_close(measure, expected_measure, 1e-10)
    for name, parameter in model.named_parameters():
        assert (expected[name] is None) == (not in_layers(name, layers))
        if expected[name] is None:
            assert parameter.grad is None
        else:
            assert expected[name].any()
            assert_close(parameter.grad, 2.5 * expected[name], 1e-10)
            assert parameter.grad.stride() == parameter.stride()  # fused Adam on CUDA wants one layout


def test_defaults():
    model, images = small_model(), images_for()
    outputs = model.layer_outputs(images)
    measure = add_srr_gradients(model, outputs, [1], 1.0)
    default = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert torch.equal(add_srr_gradients(model, outputs, [1], 1.0, sparsity=0.1, gamma=1.0, norm="l0"), measure)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, default[name]) if default[name] is not None else parameter.grad is None


def test_float32():
    model, images = small_model(dtype=torch.float32), images_for()
    expected_measure, expected = expected_gradients(model, "crate", images, [0, 2], norm="l1")
    measure = add_srr_gradients(model, model.layer_outputs(images.float()), [0, 2], 1.0, norm="l1")
    assert_close(measure, expected_measure, 1e-4)
    for name, parameter in model.named_parameters():
        if in_layers(name, [0, 2]):
            assert parameter.grad.dtype == torch.float32
            assert_close(parameter.grad, expected[name], 1e-4)


def test_l0_has_no_gradient_and_l1_the_gradient_of_the_surrogate():
    model, images = small_model(), images_for()
    outputs = model.layer_outputs(images)

    def gradient(sparsity, norm):
        model.zero_grad()
        add_srr_gradients(model, outputs, [1], 1.0, sparsity=sparsity, norm=norm)
        return model.layers[1].ista.D.grad

    rates = gradient(0.0, "l0")
    assert torch.equal(gradient(5.0, "l0"), rates) and torch.equal(gradient(0.0, "l1"), rates)
    (surrogate,) = torch.autograd.grad(outputs[1].abs().sum() / len(images), model.layers[1].ista.D, retain_graph=True)
    assert_close(gradient(5.0, "l1") - rates, 5.0 * surrogate, 1e-10)


@pytest.mark.parametrize("weight", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), 65536.0, 0.0], ids=str)
def test_weight(weight):
    model, images = small_model(), images_for()
    outputs = model.layer_outputs(images)
    measure = add_srr_gradients(model, outputs, [0, 1], 1.0)
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert torch.equal(add_srr_gradients(model, outputs, [0, 1], weight), measure)  # the measure is without the weight
    for name, gradient in plain.items():
        assert_close(model.get_parameter(name).grad, float(weight) * gradient, 1e-12)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_the_measure_is_the_mean_of_those_layers(layers):
    model, images = small_model("crate-n"), images_for()
    measure = add_srr_gradients(model, model.layer_outputs(images), layers, 1.0, sparsity=0.3)
    rows = layer_srr(model, images, sparsity=0.3)
    assert measure.item() == pytest.approx(sum(rows[layer]["srr"] for layer in layers) / len(layers), rel=1e-12)


@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("layer", range(DEPTH))
def test_nothing_but_the_layer_is_touched(layer, norm):
    model, images = small_model("crate-fix"), images_for()
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn_like(parameter) if i % 2 else None
    before = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = model.layer_outputs(images)
    tokens = [output.detach().clone() for output in outputs]
    add_srr_gradients(model, outputs, [layer], 1.0, norm=norm)
    assert {"cls_token", "pos_embedding", "patch_embedding.1.weight", "head.1.bias"} <= before.keys()
    for name, parameter in model.named_parameters():
        gradient, value = before[name]
        if in_layers(name, [layer]):
            assert not torch.equal(parameter.grad, torch.zeros_like(parameter) if value is None else value)
        else:
            assert parameter.grad is gradient
            assert gradient is None or torch.equal(gradient, value)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(output, token) for output, token in zip(outputs, tokens))
    assert model.layers[layer].mssa.fixed.grad is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_cross_entropy_and_regulariser_add_up(variant):
    model, images, labels, layers = small_model(variant), images_for(), torch.tensor([0, 1, 2, 3, 4, 0]), [0, 2]
    weights, logits, _ = expected_outputs(model, variant, images)
    F.cross_entropy(logits, labels).backward()
    _, regulariser = expected_gradients(model, variant, images, layers, norm="l1")
    earlier = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = earlier[name].clone()

    logits, outputs = model.forward_with_outputs(images)
    add_srr_gradients(model, outputs, layers, 0.7, norm="l1")
    F.cross_entropy(logits, labels).backward()
    for name, parameter in model.named_parameters():
        term = 0.0 if regulariser[name] is None else 0.7 * regulariser[name]
        assert_close(parameter.grad, earlier[name] + weights[name].grad + term, 1e-10)


def test_dropout_masks_are_those_of_the_training_pass():
    """With dropout, the layer's own second run would need the same masks: compare with a run under the same seed."""
    model, images, layer = small_model("crate-c", dropout=0.4), images_for(), 1
    torch.manual_seed(3)
    tokens = model.embed(images)
    for index in range(DEPTH):
        inputs, random = tokens, torch.get_rng_state()
        tokens = model.layers[index](inputs)
        if index == layer:
            output = tokens
            torch.set_rng_state(random)
            again = model.layers[index](inputs.detach())
    assert torch.equal(output, again)
    U = model.layers[layer].mssa.U.weight.mT
    reference.srr_parts(again, U, HEADS)["srr"].backward()
    expected = {name: p.grad for name, p in model.layers[layer].named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    add_srr_gradients(model, model.layer_outputs(images), [layer], 1.0)
    for name, parameter in model.layers[layer].named_parameters():
        assert_close(parameter.grad, expected[name], 1e-10)


@pytest.mark.parametrize("frozen", ["mssa.U.weight", "mssa.W.bias", "norm1.weight", "norm1.bias", "ista.D"])
def test_frozen_parameter(frozen):
    model, images = small_model(), images_for()
    _, expected = expected_gradients(model, "crate", images, [1])
    model.get_parameter(f"layers.1.{frozen}").requires_grad_(False)
    add_srr_gradients(model, model.layer_outputs(images), [1], 1.0)
    for name, parameter in model.layers[1].named_parameters():
        if name == frozen:
            assert parameter.grad is None
        else:
            assert_close(parameter.grad, expected[f"layers.1.{name}"], 1e-10)


@pytest.mark.parametrize("everything", [False, True])
def test_frozen_layer(everything):
    """Layer 2, or all but the head, does not train: its term has nothing to reach, the measure is still that of both."""
    model, images = small_model(), images_for()
    expected_measure, expected = expected_gradients(model, "crate", images, [0, 1])
    for module in [model.layers, model.patch_embedding] if everything else [model.layers[1]]:
        module.requires_grad_(False)
    model.cls_token.requires_grad_(not everything)
    model.pos_embedding.requires_grad_(not everything)
    measure = add_srr_gradients(model, model.layer_outputs(images), [0, 1], 1.0)
    assert_close(measure, expected_measure, 1e-10)
    for name, parameter in model.named_parameters():
        if in_layers(name, [0]) and not everything:
            assert_close(parameter.grad, expected[name], 1e-10)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("layer", range(DEPTH))
def test_gradients_of_tokens_that_are_not_finite(layer):
    model = small_model()
    spoil(model, layer)
    with pytest.raises(ValueError, match=f"layer {layer + 1}: "):
        add_srr_gradients(model, model.layer_outputs(images_for()), [layer], 1.0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, norm, inside):
    model, images = small_model("crate-n", torch.float32), images_for(dtype=torch.float32)
    measure = add_srr_gradients(model, model.layer_outputs(images), [1, 2], 1.0, norm=norm)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        outputs = model.layer_outputs(images)
        assert outputs[0].dtype == dtype
        if inside:
            half = add_srr_gradients(model, outputs, [1, 2], 1.0, norm=norm)
    if not inside:
        half = add_srr_gradients(model, outputs, [1, 2], 1.0, norm=norm)
    assert half.dtype == torch.float32
    rate = layer_srr(model, images)[2]["rate"]  # the measure is a difference of such terms, and may be near 0
    assert abs(half - measure) < 1e-2 * rate
    for name, parameter in model.named_parameters():
        if in_layers(name, [1, 2]):
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
            assert F.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0) > 0.9  # ReLUs flip
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_measure_of_half_tokens_is_summed_in_float32(dtype, norm):
    """The measure on half tokens is the textbook's on the same tokens: no rounding, and no overflow, of the sum over them."""
    model = small_model("crate-c", torch.float32)
    scale = (torch.rand(64, 5, 12) * 200).requires_grad_()
    with torch.autocast("cpu", dtype):
        tokens = model.layers[0](scale).to(dtype) * 300
    assert tokens.sum(dtype=torch.float64) > 65504  # the largest float16
    measure = add_srr_gradients(model, [tokens], [0], 1.0, norm=norm)
    U, wide = model.layers[0].mssa.U.weight.mT.double(), tokens.detach().double()
    parts = reference.srr_parts(wide, U, HEADS)
    size = parts["l0"] if norm == "l0" else wide.abs().sum() / len(wide)
    assert_close(measure, 0.1 * size + parts["rate_subspaces"] - parts["rate"], 1e-4)
