"""The classifier of every variant and the import of released CRATE checkpoints, against tests/reference.py."""

import math

import pytest
import torch
from torch import nn

from crate.cli import InputError
from crate.config import DATASETS, DEFAULTS, VARIANT_TABLE
from crate.layers import dropout_factors
from crate.model import VARIANTS, build_model, from_released_crate, model_from_config
from tests import reference
from tests.reference import assert_close, copies

SMALL = dict(image_size=8, patch_size=4, channels=3, classes=5, width=12, depth=3, heads=3)
CRATE_TINY = dict(image_size=32, patch_size=4, channels=3, classes=10, width=384, depth=12, heads=6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(13)


def small_model(variant, **changes):
    """A small model in float64, no parameter of it at a special value (LayerNorm's start at ones and zeros)."""
    model = build_model(variant, **SMALL | changes).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def images_for(sizes=SMALL, count=2, dtype=torch.float64):
    return torch.randn(count, sizes["channels"], sizes["image_size"], sizes["image_size"], dtype=dtype)


def expected_forward(model, variant, images, sizes=SMALL):
    """Logits and [Z^0 .. Z^L] of the textbook, in float64."""
    weights = {name: tensor.double() for name, tensor in copies(model).items()}
    return reference.forward(images.double(), weights, variant, sizes["heads"], sizes["patch_size"], sizes["depth"])


# Sizes


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_parameter_counts():
    counts = {variant: trainable(build_model(variant, **CRATE_TINY)) for variant in VARIANTS}
    assert counts.pop("crate") == 5_381_098
    assert counts.pop("vit") == 5_381_098 + 12 * (9 * 384**2 + 5 * 384)  # key, value and an MLP in the place of D
    assert set(counts.values()) == {5_381_098 - 12 * (384**2 + 384)}
    assert len(counts) == 6


def test_variants_and_their_descriptions():
    paper = ["crate-c", "crate-n", "crate-t", "crate", "crate-fix", "crate-identity"]
    assert list(VARIANTS) == [*paper, "crate-e", "vit"]
    assert all(VARIANTS[name] == row[-1] for name, row in VARIANT_TABLE.items())


def test_names_and_shapes():
    model = build_model("crate", **SMALL)
    layer = model.layers[2]
    assert len(model.layers) == 3 and model.heads == 3
    assert isinstance(layer.mssa.U, nn.Linear) and layer.mssa.U.bias is None and layer.mssa.U.weight.shape == (12, 12)
    assert isinstance(layer.mssa.W, nn.Linear) and layer.mssa.W.bias.shape == (12,)
    assert isinstance(layer.norm1, nn.LayerNorm) and isinstance(layer.norm2, nn.LayerNorm)
    assert isinstance(layer.ista.D, nn.Parameter) and layer.ista.D.shape == (12, 12)
    for variant in VARIANTS.keys() - {"crate", "vit"}:
        assert build_model(variant, **SMALL).layers[0].mssa.W is None
    assert model.cls_token.shape == (1, 1, 12) and model.pos_embedding.shape == (1, 5, 12)


# The forward pass


@pytest.mark.parametrize("changes", [{}, {"channels": 1, "patch_size": 2, "heads": 1, "depth": 1}], ids=["colour", "grey"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward(variant, changes):
    sizes = SMALL | changes
    model, images = small_model(variant, **changes), images_for(sizes)
    logits, outputs = model.forward_with_outputs(images)
    expected, tokens = expected_forward(model, variant, images, sizes)
    assert logits.shape == (2, 5) and len(outputs) == sizes["depth"]
    assert_close(logits, expected, 1e-10)
    assert_close(model(images), expected, 1e-10)
    for actual, wanted in zip([model.embed(images), *outputs], tokens, strict=True):
        assert_close(actual, wanted, 1e-10)
    narrow = model.float()
    assert_close(narrow(images.float()), expected_forward(narrow, variant, images, sizes)[0], 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_every_parameter(variant):
    model, images = small_model(variant), images_for()
    weights = copies(model)
    logits, _ = reference.forward(images, weights, variant, SMALL["heads"], SMALL["patch_size"], SMALL["depth"])
    labels = torch.tensor([1, 4])
    nn.functional.cross_entropy(logits, labels).backward()
    nn.functional.cross_entropy(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any()
        assert_close(parameter.grad, weights[name].grad, 1e-10)


def test_many_tokens():
    sizes = SMALL | {"image_size": 34, "patch_size": 2, "depth": 1}  # 289 tokens + CLS: the fused kernel
    model, images = small_model("crate-c", **sizes), images_for(sizes, 1)
    assert_close(model(images), expected_forward(model, "crate-c", images, sizes)[0], 1e-10)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_flattened_as_row_column_channel(channels):
    size, patch = 6, 2
    sizes = dict(image_size=size, patch_size=patch, channels=channels, classes=2, width=4 * channels, depth=1, heads=1)
    model = build_model("crate", **sizes)
    model.patch_embedding = nn.Identity()
    model.pos_embedding.data.zero_()
    row, column = torch.arange(size).view(1, size, 1), torch.arange(size).view(1, 1, size)
    image = 100 * row + 10 * column + torch.arange(channels).view(channels, 1, 1)  # the pixel (c, i, j) is the number ijc
    tokens = model.embed(image[None].float())[0]
    assert torch.equal(tokens[0], model.cls_token[0, 0])
    for n, patch_tokens in enumerate(tokens[1:].tolist()):
        corner_row, corner_column = patch * (n // 3), patch * (n % 3)
        assert patch_tokens == [
            100 * i + 10 * j + c
            for i in (corner_row, corner_row + 1)
            for j in (corner_column, corner_column + 1)
            for c in range(channels)
        ]


@pytest.mark.parametrize("variant", ["crate-n", "crate"])
def test_outputs_in_one_pass_or_one_by_one(variant):
    model, images = small_model(variant), images_for()
    logits, outputs = model.forward_with_outputs(images)
    assert_close(model(images), logits, 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.layer_outputs(images), outputs, strict=True))
    tokens = model.embed(images)
    for layer, output in zip(model.layers, outputs, strict=True):
        tokens = layer(tokens)
        assert torch.equal(tokens, output)
    assert torch.equal(model.head(tokens[:, 0]), logits)


def test_the_head_reads_the_cls_token():
    model, images = small_model("crate-c"), images_for()
    logits, outputs = model.forward_with_outputs(images)
    (gradient,) = torch.autograd.grad(logits.sum(dim=0)[1], outputs[-1])
    assert gradient[:, 0].any() and not gradient[:, 1:].any()


def test_images_do_not_mix():
    model, images = small_model("crate"), images_for(count=3)
    assert_close(model(images), torch.cat([model(image[None]) for image in images]), 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_mode_has_no_dropout(variant):
    model, images = small_model(variant, dropout=0.5), images_for()
    assert not torch.equal(model(images), model(images))
    expected, _ = expected_forward(model, variant, images)
    assert_close(model.eval()(images), expected, 1e-10)


def test_dropout_after_the_positions():
    model, images = small_model("crate-c", dropout=0.3), images_for(count=50)
    plain = model.eval().embed(images)
    torch.manual_seed(5)
    dropped = model.train().embed(images)
    torch.manual_seed(5)
    assert_close(dropped, plain * dropout_factors(dropped, 0.3), 1e-6)
    kept = (dropped != 0).double().mean().item()
    assert abs(kept - 0.7) < 5 * math.sqrt(0.3 * 0.7 / dropped.numel())


def test_initialisations_differ():
    model = build_model("crate", **SMALL)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    assert all(p.std() > 0 for p in matrices)
    assert not torch.equal(model.layers[0].ista.D, model.layers[1].ista.D)
    assert not torch.equal(model.layers[0].mssa.U.weight, model.layers[1].mssa.U.weight)


def test_model_from_config():
    size, channels, classes = DATASETS["digits"]
    config = DEFAULTS | dict(model="crate-t", image_size=size, channels=channels, classes=classes, patch_size=2, dropout=0.25)
    options = dict(temperature="none", ista_beta=0.2, ista_lambda=0.3)
    model = model_from_config(config | options | dict(width=12, heads=2, depth=4))
    layer = model.layers[3]
    assert (layer.mssa.scale, layer.ista.beta, layer.ista.sparsity) == (1.0, 0.2, 0.3)
    assert len(model.layers) == 4 and model.heads == 2 and model.dropout == 0.25 and model.layers[3].mssa.dropout == 0.25
    assert model.layers[0].mssa.output == "U^T"
    assert model(torch.randn(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "resnet"}, ("resnet", "crate-c")),
        ({"heads": 5}, ("--width 12", "--heads 5")),
        ({"patch_size": 3}, ("--image-size 8", "--patch-size 3")),
        ({"patch_size": 16}, ("--image-size 8", "--patch-size 16")),
        ({"dropout": 1.0}, ("--dropout 1.0",)),
        ({"dropout": -0.1}, ("--dropout -0.1",)),
        ({"dropout": math.nan}, ("--dropout nan",)),
    ],
)
def test_sizes_that_do_not_fit(changes, words):
    sizes = {"name": "crate", **SMALL, **changes}
    with pytest.raises(InputError) as error:
        build_model(sizes.pop("name"), **sizes)
    assert_one_line(error, *words)


def assert_one_line(error, *words):
    message = str(error.value)
    assert message and "\n" not in message
    for word in words:
        assert word in message


# Released CRATE checkpoints


def released_state(*, channels=3, patch=4, grid=2, width=12, depth=2, classes=5):
    """A random state_dict in the released names, of (grid patch) x (grid patch) images."""
    patch_dim = patch**2 * channels

    def norm(name, n):
        return {f"{name}.weight": 1 + 0.1 * torch.randn(n), f"{name}.bias": 0.1 * torch.randn(n)}

    def affine(name, rows, columns):
        return {f"{name}.weight": torch.randn(rows, columns) / math.sqrt(columns), f"{name}.bias": 0.1 * torch.randn(rows)}

    state = {"pos_embedding": torch.randn(1, grid**2 + 1, width), "cls_token": torch.randn(1, 1, width)}
    state |= norm("to_patch_embedding.1", patch_dim) | affine("to_patch_embedding.2", width, patch_dim)
    state |= norm("to_patch_embedding.3", width)
    for i in range(depth):
        name = f"transformer.layers.{i}"
        state |= norm(f"{name}.0.norm", width) | affine(f"{name}.0.fn.to_out.0", width, width)
        state |= {f"{name}.0.fn.qkv.weight": torch.randn(width, width) / math.sqrt(width)}
        state |= norm(f"{name}.1.norm", width) | {f"{name}.1.fn.weight": torch.randn(width, width) / math.sqrt(width)}
    return state | norm("mlp_head.0", width) | affine("mlp_head.1", classes, width)


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "module": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
}
RELEASED_SIZES = [
    dict(channels=3, patch=4, grid=2), dict(channels=1, patch=4, grid=2), dict(channels=3, patch=1, grid=3),
    dict(channels=1, patch=6, grid=1), dict(channels=3, patch=2, grid=4, depth=12), dict(channels=1, patch=3, grid=2),
]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("sizes", RELEASED_SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_released_checkpoint(sizes, wrapper):
    state = released_state(**sizes)
    before = {name: tensor.clone() for name, tensor in state.items()}
    depth = sizes.get("depth", 2)
    images = images_for(dict(channels=sizes["channels"], image_size=sizes["patch"] * sizes["grid"]))
    wide = {name: tensor.double() for name, tensor in state.items()}
    expected = reference.released_forward(images, wide, heads=3, patch_size=sizes["patch"], depth=depth)
    model = from_released_crate(WRAPPERS[wrapper](state), heads=3)
    assert len(model.layers) == depth
    assert_close(model(images.float()), expected, 1e-4)
    assert_close(model.double()(images), expected, 1e-10)
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


def test_heads_of_a_released_checkpoint_matter():
    state, images = released_state(), images_for(dtype=torch.float32)
    assert not torch.allclose(from_released_crate(state, 2)(images), from_released_crate(state, 3)(images), atol=1e-3)


def assert_not_imported(state, heads=3):
    with pytest.raises(InputError) as error:
        from_released_crate(state, heads)
    assert_one_line(error)
    return str(error.value)


@pytest.mark.parametrize("name", released_state(depth=1))
def test_malformed_entry(name):
    state = released_state()
    tensor = state[name]
    assert_not_imported({other: value for other, value in state.items() if other != name})
    flat = tensor.flatten()
    empty = [tensor.narrow(axis, 0, 0) for axis in range(tensor.ndim)]
    for wrong in (tensor[None], flat[1:], flat[0], tensor[..., :-1], torch.cat([tensor, tensor]), *empty, None):
        assert_not_imported(state | {name: wrong})


EXTRA = ["mlp_head.2.weight", "transformer.layers.0.0.fn.qkv.bias", "transformer.layers.7.1.fn.weight", "x"]


@pytest.mark.parametrize("name", EXTRA)
def test_extra_entry(name):
    assert_not_imported(released_state() | {name: torch.randn(12, 12)})


def test_other_malformed_checkpoints():
    state = released_state()
    for heads in (5, 24):
        assert f"--heads {heads}" in assert_not_imported(state, heads)
    assert_not_imported({})
    assert_not_imported({"state_dict": {}})
    assert_not_imported({"model": state})
    assert_not_imported(state | {"pos_embedding": torch.randn(1, 4, 12)})  # 3 patches are not a square
    assert_not_imported({name.replace("layers.1", "layers.2"): tensor for name, tensor in state.items()})
