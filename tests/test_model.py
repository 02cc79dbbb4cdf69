"""ISTA, the layer and the classifier of every variant, against tests/reference.py."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from crate import model as model_module
from crate.kernels import dropout_factors
from crate.model import HEADS, ISTA, VARIANTS, Layer, Variant, build_model
from tests import reference
from tests.reference import assert_close, copies
from tests.test_kernels import factors, narrowed, randn, reseeded

WIDTH, K, TOKENS = 12, 3, 7
SMALL = dict(image_size=8, patch_size=4, channels=3, classes=5, width=WIDTH, depth=3, heads=K)
CRATE_TINY = dict(image_size=32, patch_size=4, channels=3, classes=10, width=384, depth=12, heads=6)
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-4)]
of_variants = pytest.mark.parametrize("variant", reference.VARIANTS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(13)


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


def test_ista_takes_a_descent_step_on_its_objective():
    """Eq. 3 is a proximal gradient step on 1/2 ||y - D z||^2 + lambda ||z||_1, z >= 0, from z = y."""
    ista, y = ISTA(WIDTH).double(), torch.rand(50, 1, WIDTH, dtype=torch.float64)  # y >= 0: a feasible start

    def objective(z):
        return (y.mT - ista.D @ z.mT).square().sum((-2, -1)) / 2 + 0.1 * z.sum((-2, -1))

    ista.D.data *= 0.9 * ista.beta**-0.5 / torch.linalg.matrix_norm(ista.D.data, ord=2)  # beta below 1 / Lipschitz
    assert (objective(ista(y)) < objective(y)).all()


def test_released_step_sizes_and_initialisation():
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


# The layer


def build_layer(variant, dtype=torch.float64, **options):
    """A layer with no parameter at a special value (LayerNorm's start at ones and zeros)."""
    layer = Layer(VARIANTS[variant], width=WIDTH, heads=K, **options).to(dtype)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def share_weights(layer, other):
    """Give `layer` the parameters of `other`."""
    assert not layer.load_state_dict(other.state_dict(), strict=False).unexpected_keys


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@of_variants
def test_layer_and_its_gradients(variant, dtype, tolerance):
    layer, Z = build_layer(variant, dtype), randn(2, TOKENS, WIDTH)
    narrow, upstream = narrowed(Z, dtype), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    weights = {name: narrowed(tensor, torch.float64) for name, tensor in copies(layer).items()}
    expected, output = reference.layer(Z, weights, variant, K), layer(narrow)
    assert_close(output, expected, tolerance)
    names = [name for name, _ in layer.named_parameters()]
    gradients = torch.autograd.grad(output, (narrow, *layer.parameters()), upstream.to(dtype))
    wanted = torch.autograd.grad(expected, (Z, *(weights[name] for name in names)), upstream)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert gradient.any()
        assert_close(actual, gradient, tolerance)


def test_step_of_the_conceptual_variant_as_eq_4_prints_it():
    """sum_k U_k U_k^T Z softmax((U_k^T Z)^T U_k^T Z)."""
    layer, Z = build_layer("crate-c", temperature="none"), randn(2, TOKENS, WIDTH)
    weights = copies(layer)
    columns, U, mssa = reference.layer_norm(Z, weights, "norm1").mT, weights["mssa.U.weight"].mT, 0
    for U_k in reference.subspaces(U, K):
        mssa = mssa + U_k @ U_k.mT @ columns @ torch.softmax((U_k.mT @ columns).mT @ (U_k.mT @ columns), dim=-2)
    assert_close(layer.compress(Z) - Z, mssa.mT, 1e-10)
    negative = build_layer("crate-n", temperature="none")
    share_weights(negative, layer)
    assert_close(negative.compress(Z) - Z, -mssa.mT, 1e-10)


def test_step_of_the_exact_variant_is_the_gradient_of_the_rate():
    layer, Z = build_layer("crate-e"), randn(2, TOKENS, WIDTH)
    weights = copies(layer)
    normed = reference.layer_norm(Z, weights, "norm1").detach().requires_grad_()
    rate = reference.subspace_coding_rate(normed, weights["mssa.U.weight"].mT, K).sum()
    assert_close(layer.compress(Z) - Z, -torch.autograd.grad(rate, normed)[0], 1e-10)


def test_standard_attention_by_einsum():
    layer, Z = build_layer("vit"), randn(2, TOKENS, WIDTH)
    weights = copies(layer)
    normed = reference.layer_norm(Z, weights, "norm1")
    queries, keys, values = ((normed @ weights[f"mssa.{m}.weight"].mT).unflatten(-1, (K, -1)) for m in ("U", "key", "value"))
    scores = torch.einsum("bnkp,bmkp->bknm", queries, keys) * (WIDTH / K) ** -0.5
    stacked = torch.einsum("bknm,bmkp->bnkp", scores.softmax(-1), values).flatten(-2)
    assert_close(layer.compress(Z) - Z, stacked @ weights["mssa.W.weight"].mT + weights["mssa.W.bias"], 1e-10)


TIED = {"crate-c": lambda U: U, "crate-t": lambda U: U.mT, "crate-identity": lambda U: torch.eye(WIDTH)}


@pytest.mark.parametrize("variant", TIED)
def test_crate_with_the_tied_matrix_is_the_tied_variant(variant):
    tied, crate, Z = build_layer(variant), build_layer("crate"), randn(2, TOKENS, WIDTH)
    share_weights(crate, tied)
    assert not torch.allclose(crate(Z), tied(Z))
    crate.mssa.W.weight.data.copy_(TIED[variant](tied.mssa.U.weight.mT))
    crate.mssa.W.bias.data.zero_()
    assert_close(crate(Z), tied(Z), 1e-10)


def test_fixed_output_matrix():
    layer, other = build_layer("crate-fix"), build_layer("crate-fix")
    before = layer.mssa.fixed.clone()
    assert not torch.equal(before, other.mssa.fixed)
    layer(randn(2, TOKENS, WIDTH)).sum().backward()
    torch.optim.Adam(layer.parameters()).step()
    assert torch.equal(layer.mssa.fixed, before)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.mssa.fixed, before)


@of_variants
def test_first_tokens_alone_are_those_of_all(variant):
    layer, Z = build_layer(variant), randn(2, TOKENS, WIDTH)
    some, whole, upstream = layer(Z, first=2), layer(Z)[:, :2], torch.randn(2, 2, WIDTH, dtype=torch.float64)
    assert_close(some, whole, 1e-10)
    gradients = [torch.autograd.grad(output, (Z, *layer.parameters()), upstream) for output in (some, whole)]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-10)


@pytest.mark.parametrize("variant", [name for name in reference.VARIANTS if name != "vit"])  # its mask is the kernel's own
def test_dropout_sits_after_the_softmax_and_after_the_projection(variant):
    p, layer, Z = 0.4, build_layer(variant, dropout=0.4), randn(2, TOKENS, WIDTH)
    upstream = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    output = reseeded(layer)(Z)
    torch.manual_seed(5)
    weights = copies(layer)
    keep = None if reference.fields(variant)[1] == "exact" else factors((2, K, TOKENS, TOKENS), p).mT
    keep_output = factors((2, TOKENS, WIDTH), p)
    expected = reference.layer(Z, weights, variant, K, keep, keep_output)
    assert_close(output, expected, 1e-10)
    gradients = torch.autograd.grad(output, (Z, *layer.parameters()), upstream)
    wanted = torch.autograd.grad(expected, (Z, *(weights[name] for name, _ in layer.named_parameters())), upstream)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert_close(actual, gradient, 1e-10)


@of_variants
def test_layer_gradcheck(variant):
    layer, Z = Layer(VARIANTS[variant], width=4, heads=2, dropout=0.3).double(), randn(1, 3, 4)
    names = [name for name, _ in layer.named_parameters()]

    def call(Z, *parameters):
        return functional_call(layer, dict(zip(names, parameters)), Z)

    assert torch.autograd.gradcheck(reseeded(call), (Z, *(narrowed(p, torch.float64) for p in layer.parameters())))


def test_layer_under_autocast():
    layer, Z = build_layer("crate-c", torch.float32), torch.randn(2, TOKENS, WIDTH)
    plain = layer(Z)
    expected = torch.autograd.grad(plain.sum(), layer.mssa.U.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(Z)
    (gradient,) = torch.autograd.grad(half.float().sum(), layer.mssa.U.weight)
    assert half.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    assert_close(half, plain, 3e-2)
    assert_close(gradient, expected, 0.1)


@pytest.mark.parametrize("temperature, scale", [("sqrt-p", (WIDTH / K) ** -0.5), ("none", 1.0)])
def test_temperature_step_size_and_threshold_are_options(temperature, scale):
    layer = build_layer("crate-n", temperature=temperature, ista_beta=0.3, ista_lambda=0.7)
    weights, Z = copies(layer), randn(2, TOKENS, WIDTH)
    U = weights["mssa.U.weight"].mT
    V = reference.attention(reference.layer_norm(Z, weights, "norm1"), U, K, scale)
    expected = reference.ista(reference.layer_norm(Z - V @ U.mT, weights, "norm2"), weights["ista.D"], 0.3, 0.7)
    assert_close(layer(Z), expected, 1e-10)


# The classifier


def small_model(variant, **changes):
    """A small model in float64, no parameter of it at a special value."""
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


def test_the_table_is_the_papers():
    for name, row in reference.PAPER.items():
        assert VARIANTS[name][:4] == row and VARIANTS[name].description


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in build_model(name, **CRATE_TINY).parameters()) for name in reference.PAPER}
    assert counts.pop("crate") == 5_381_098
    assert counts.pop("vit") == 5_381_098 + 12 * (9 * 384**2 + 5 * 384)  # key, value and an MLP in the place of D
    assert set(counts.values()) == {5_381_098 - 12 * (384**2 + 384)}


def test_names_and_shapes():
    model = build_model("crate", **SMALL)
    layer = model.layers[2]
    assert len(model.layers) == 3 and model.heads == K
    assert isinstance(layer.mssa.U, nn.Linear) and layer.mssa.U.bias is None and layer.mssa.U.weight.shape == (12, 12)
    assert isinstance(layer.mssa.W, nn.Linear) and layer.mssa.W.bias.shape == (12,)
    assert isinstance(layer.norm1, nn.LayerNorm) and isinstance(layer.norm2, nn.LayerNorm)
    assert isinstance(layer.ista.D, nn.Parameter) and layer.ista.D.shape == (12, 12)
    assert build_model("crate-c", **SMALL).layers[0].mssa.W is None
    assert model.cls_token.shape == (1, 1, 12) and model.pos_embedding.shape == (1, 5, 12)


@pytest.mark.parametrize("changes", [{}, {"channels": 1, "patch_size": 2, "heads": 1, "depth": 1}], ids=["colour", "grey"])
@of_variants
def test_forward(variant, changes):
    sizes = SMALL | changes
    model, images = small_model(variant, **changes), images_for(sizes)
    expected, tokens = expected_forward(model, variant, images, sizes)
    assert expected.shape == (2, 5)
    assert_close(model(images), expected, 1e-10)
    for actual, wanted in zip([model.embed(images), *model.layer_outputs(images)], tokens, strict=True):
        assert_close(actual, wanted, 1e-10)
    narrow = model.float()
    assert_close(narrow(images.float()), expected_forward(narrow, variant, images, sizes)[0], 1e-4)


@of_variants
def test_gradient_of_every_parameter(variant):
    model, images, labels = small_model(variant), images_for(), torch.tensor([1, 4])
    weights = copies(model)
    logits, _ = reference.forward(images, weights, variant, SMALL["heads"], SMALL["patch_size"], SMALL["depth"])
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
        rows, columns = (range(patch * k, patch * k + patch) for k in divmod(n, 3))
        assert patch_tokens == [100 * i + 10 * j + c for i in rows for j in columns for c in range(channels)]


def test_images_do_not_mix():
    model, images = small_model("crate"), images_for(count=3)
    assert_close(model(images), torch.cat([model(image[None]) for image in images]), 1e-12)


@of_variants
def test_eval_mode_has_no_dropout(variant):
    model, images = small_model(variant, dropout=0.5), images_for()
    assert not torch.equal(model(images), model(images))
    assert_close(model.eval()(images), expected_forward(model, variant, images)[0], 1e-10)


def test_dropout_after_the_positions():
    model, images = small_model("crate-c", dropout=0.3), images_for(count=50)
    plain = model.eval().embed(images)
    dropped = reseeded(model.train().embed)(images)
    torch.manual_seed(5)
    assert_close(dropped, plain * dropout_factors(dropped, 0.3), 1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "resnet"}, ("resnet", "crate-c")),
        ({"heads": 5}, ("width 12", "heads 5")),
        ({"patch_size": 3}, ("image size 8", "patch size 3")),
        ({"patch_size": 16}, ("image size 8", "patch size 16")),
        ({"depth": 0}, ("depth 0",)),
        ({"dropout": 1.0}, ("dropout 1.0",)),
        ({"dropout": math.nan}, ("dropout nan",)),
    ],
)
def test_sizes_that_do_not_fit(changes, words):
    sizes = {"name": "crate", **SMALL, **changes}
    with pytest.raises(ValueError) as error:
        build_model(sizes.pop("name"), **sizes)
    assert all(word in str(error.value) for word in words) and "--" not in str(error.value)


# A variant of one's own: a row of the table, and a function where the step is new.


def test_a_new_row_is_a_new_variant(monkeypatch):
    monkeypatch.setitem(VARIANTS, "half", Variant(+0.5, "U", "U", "ISTA", "half of CRATE-C's step"))
    half, whole, Z = build_layer("half"), build_layer("crate-c"), randn(2, TOKENS, WIDTH)
    share_weights(half, whole)
    assert_close(half.compress(Z) - Z, 0.5 * (whole.compress(Z) - Z), 1e-10)


def test_a_new_step_is_a_function(monkeypatch):
    def linear_heads(mssa, tokens, first, p):
        V = model_module.split_heads(mssa.U(tokens), mssa.heads)
        return (V @ (V.mT @ V))[..., :first, :]

    monkeypatch.setitem(HEADS, "linear", linear_heads)
    monkeypatch.setitem(VARIANTS, "mine", Variant(-1, "linear", "U", "ISTA", "the second-order term, without softmax"))
    layer, Z = build_layer("mine"), randn(2, TOKENS, WIDTH)
    weights = copies(layer)
    normed = reference.layer_norm(Z, weights, "norm1")
    step = reference.update("d", normed, weights["mssa.U.weight"].mT, K) - normed
    assert_close(layer.compress(Z) - Z, -step, 1e-10)
    assert build_model("mine", **SMALL)(images_for(dtype=torch.float32)).shape == (2, 5)
