"""Complexity measures: golden values, float64 numpy versions, path-norm by hand, searches, what measuring must not touch."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crate import measures
from crate.data import load_data
from crate.model import VARIANTS, build_model
from crate.srr import layer_srr

GROUPS = ("path-norm", "pac-bayes", "sharpness", "srr")
W = [[[1, 2], [3, 4], [-1, 0.5]], [[2, -1, 0.5], [0, 1, -2]]]
W0 = [[[0.5, 1], [1, 1], [0, 0]], [[1, 0, 0], [0, 0, 1]]]
GOLDEN = {
    "l2": 6.442049363, "l2_dist": 5.267826876, "params": 12, "inverse_margin": 0.25,
    "log_prod_of_spec": 5.361857584, "log_prod_of_spec_over_margin": 3.975563223,
    "log_sum_of_spec": 3.374075972, "log_sum_of_spec_over_margin": 2.680928792,
    "sum_of_spec_literal": 37.02417311, "fro_over_spec": 2.483124828,
    "log_spec_init_main": 4.780624579, "log_spec_orig_main": 4.885081001,
    "log_prod_of_fro": 5.769297082, "log_prod_of_fro_over_margin": 4.383002721,
    "log_sum_of_fro": 3.577795721, "log_sum_of_fro_over_margin": 2.884648541,
    "fro_dist": 27.75, "dist_spec_init": 24.98646669, "param_norm": 41.5,
    "pacbayes_init": 708.3551702, "pacbayes_orig": 1052.10517, "pacbayes_flatness": 100,
    "pacbayes_mag_init": 32.86220384, "pacbayes_mag_orig": 34.06957617, "pacbayes_mag_flatness": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load_data("digits", train_subset=300)


def small_model(name="crate-c", seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = dict(image_size=8, patch_size=4, channels=1, classes=10, width=12, depth=2, heads=3) | sizes
    return build_model(name, **sizes)


@pytest.fixture(scope="module")
def trained(data):
    """A model that classifies most of the 300 training images, at initialisation and afterwards."""
    model = small_model("crate")
    initial = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images), data.train_labels).backward()
        optimizer.step()
    model.zero_grad()
    assert (model(data.train_images).argmax(1) == data.train_labels).float().mean() > 0.9
    return initial, model


def test_golden_values():
    for form in (list, torch.tensor):
        result = measures.weight_measures(list(map(form, W)), list(map(form, W0)), 2, 10, 0.1, 0.1)
        assert result.keys() == GOLDEN.keys()
        for name, value in GOLDEN.items():
            assert result[name] == pytest.approx(value, rel=1e-9, abs=1e-8), name


def textbook(weights, initial, gamma, m, sigma, sigma_mag):
    """The measures of measures.md 2, 3, 4 and 5, in numpy, formula by formula."""
    fro = [sum(x**2 for x in w.ravel()) for w in weights]
    spec = [np.linalg.svd(w, compute_uv=False).max() ** 2 for w in weights]
    moved = [w - w0 for w, w0 in zip(weights, initial)]
    dfro = [sum(x**2 for x in w.ravel()) for w in moved]
    dspec = [np.linalg.svd(w, compute_uv=False).max() ** 2 for w in moved]
    d, omega = len(weights), sum(w.size for w in weights)
    w, u = np.concatenate([x.ravel() for x in weights]), np.concatenate([x.ravel() for x in moved])
    out = {"params": omega, "inverse_margin": 1 / gamma**2, "l2": np.linalg.norm(w), "param_norm": sum(fro)}
    for name, squares in (("fro", fro), ("spec", spec)):
        out[f"log_prod_of_{name}"] = np.log(np.prod(squares))
        out[f"log_prod_of_{name}_over_margin"] = np.log(np.prod(squares) / gamma**2)
        out[f"log_sum_of_{name}"] = np.log(d * np.prod(squares) ** (1 / d))
        out[f"log_sum_of_{name}_over_margin"] = np.log(d * (np.prod(squares) / gamma**2) ** (1 / d))
    out["sum_of_spec_literal"] = sum(spec)
    out["fro_over_spec"] = sum(a / b for a, b in zip(fro, spec))
    out["log_spec_init_main"] = np.log(np.prod(spec) / gamma**2 * sum(a / b for a, b in zip(dfro, spec)))
    out["log_spec_orig_main"] = np.log(np.prod(spec) / gamma**2 * sum(a / b for a, b in zip(fro, spec)))
    out |= {"l2_dist": np.linalg.norm(u), "fro_dist": sum(dfro), "dist_spec_init": sum(dspec)}
    for name, vector in (("init", u), ("orig", w)):
        out[f"pacbayes_{name}"] = vector @ vector / (4 * sigma**2) + np.log(m / sigma) + 10
        terms = [np.log((1e-6 + (sigma_mag**2 + 1) * (vector @ vector) / omega) / (1e-6 + sigma_mag**2 * x**2)) for x in u]
        out[f"pacbayes_mag_{name}"] = sum(terms) / 4 + np.log(m / sigma_mag) + 10
    return out | {"pacbayes_flatness": sigma**-2, "pacbayes_mag_flatness": sigma_mag**-2}


@pytest.mark.parametrize("seed", range(3))
def test_weight_measures_match_numpy(seed):
    random = np.random.default_rng(seed)
    shapes = [(4, 3), (4, 4), (4, 4), (2, 4)]
    weights, initial = ([random.normal(size=shape) for shape in shapes] for _ in range(2))
    scalars = (random.uniform(0.1, 5), 321, random.uniform(0.01, 0.2), random.uniform(0.01, 0.5))
    expected = textbook(weights, initial, *scalars)
    result = measures.weight_measures(
        {str(i): torch.tensor(w) for i, w in enumerate(weights)},
        {str(i): torch.tensor(w) for i, w in reversed(list(enumerate(initial)))}, *scalars,
    )  # fmt: skip
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-10), name


def test_missing_scalars_leave_measures_out_and_a_margin_below_zero_is_no_number():
    needs_initial = {"l2_dist", "fro_dist", "dist_spec_init", "log_spec_init_main"}
    needs_initial |= {"pacbayes_init", "pacbayes_mag_init", "pacbayes_mag_orig"}
    tensors = list(map(torch.tensor, W))
    assert measures.weight_measures(tensors, None, 2, 10, 0.1, 0.1).keys() == GOLDEN.keys() - needs_initial
    without_noise = measures.weight_measures(tensors, W0, 2, 10, None, None)
    assert without_noise.keys() == {name for name in GOLDEN if not name.startswith("pacbayes")}
    of_margin = {name for name in GOLDEN if "margin" in name or name.endswith("_main")}
    assert measures.weight_measures(tensors, W0, None, 10, 0.1, 0.1).keys() == GOLDEN.keys() - of_margin
    for gamma in (-2, 0):
        result = measures.weight_measures(tensors, W0, gamma, 10, 0.1, 0.1)
        bad = {name for name, value in result.items() if math.isnan(value)}
        assert bad == of_margin


def golden_classifier():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (W[0], [0.1, -0.2, 0.3], W[1], [0.5, -0.5])):
            parameter.copy_(torch.tensor(value))
    points = [(1, 0), (2, -1), (-3, 2), (4, 1), (0, -2), (-1, -1), (3, 3), (-2, 4), (1, -4), (2, 2)]
    return model, torch.tensor(points).double() / 4, torch.tensor([0, 0, 0, 1, 0, 0, 1, 0, 0, 1])


def test_margin_golden_values():
    model, images, labels = golden_classifier()
    expected = [0.725, 0.6, 4.95, 3.4, 1.125, 2.0625, 4.4, 2.85, 1.0, 2.275]
    np.testing.assert_allclose(measures.margins(model(images), labels).detach(), expected, atol=1e-6)
    assert measures.margin(model, images, labels) == pytest.approx(0.6)


def test_margin_is_the_kth_smallest():
    logits = torch.tensor([[3.0, 1.0, -1.0]]).repeat(29, 1)
    logits[:, 1] = torch.linspace(2.9, -4, 29).flip(0)  # margins 4 ... 0.1
    labels, model = torch.zeros(29, dtype=torch.int64), nn.Identity()
    margins = np.sort([3 - max(row[1:]) for row in logits.tolist()])
    assert measures.margin(model, logits, labels, chunk=4) == pytest.approx(margins[1])  # floor(29 / 10) = 2
    assert measures.margin(model, logits[-5:], labels[-5:]) == pytest.approx(margins[0])  # k is at least 1
    assert measures.margin(model, logits, labels + 1) < 0


@pytest.mark.parametrize("name", VARIANTS)
def test_which_parameters_count(name):
    model = small_model(name, depth=3)
    counted = measures.counted_weights(model)
    matrices, squares = {"crate": (3, 3), "vit": (6, 12)}.get(name, (2, 2))  # per layer, and their entries in d^2
    assert len(counted) == 3 * matrices + 2
    assert sum(w.numel() for w in counted.values()) == 16 * 12 + 3 * squares * 144 + 120
    moved = measures.perturbed_parameters(model)
    norms = {name for name, _ in model.named_parameters() if "norm" in name or name.split(".")[:2] in (
        ["patch_embedding", "0"], ["patch_embedding", "2"], ["head", "0"])}  # fmt: skip
    assert len(norms) == 2 * (3 + 2 * 3)
    assert moved.keys() == dict(model.named_parameters()).keys() - norms
    assert {"cls_token", "pos_embedding", "head.1.bias"} <= moved.keys()


def path_norm_by_hand(model, name, effective):
    """Token by token in numpy: all-ones image, everything squared, no LayerNorm, positions or CLS."""
    p = {key: value.double().numpy() for key, value in model.state_dict().items()}
    d, heads = 12, 3
    rows = zip(p["patch_embedding.1.weight"], p["patch_embedding.1.bias"])
    patch = np.array([sum(w**2 for w in row) + b**2 for row, b in rows])
    tokens = [np.zeros(d)] + [patch] * 4
    for l in range(2):
        U = p[f"layers.{l}.mssa.U.weight"].T
        key, value = (p[f"layers.{l}.mssa.{which}.weight"].T if name == "vit" else U for which in ("key", "value"))
        new = []
        for position, query in enumerate(tokens):
            merged = np.zeros(d)
            for k in range(heads):
                columns = slice(k * d // heads, (k + 1) * d // heads)
                Q, K, V = (matrix[:, columns] ** 2 for matrix in (U, key, value))
                scores = np.array([(Q.T @ query) @ (K.T @ other) / math.sqrt(d / heads) for other in tokens])
                weights = np.exp(scores - scores.max())
                merged[columns] = sum(w * (V.T @ other) for w, other in zip(weights / weights.sum(), tokens))
                if name == "crate-e":
                    stacked = np.stack([Q.T @ other for other in tokens], axis=1)  # (p, N)
                    exact = np.linalg.solve(np.eye(len(stacked)) + stacked @ stacked.T, stacked)
                    merged[columns] = exact[:, position]
            out = {
                "crate-c": lambda: U**2 @ merged, "crate-n": lambda: U**2 @ merged, "crate-t": lambda: U.T**2 @ merged,
                "crate": lambda: p[f"layers.{l}.mssa.W.weight"] ** 2 @ merged + p[f"layers.{l}.mssa.W.bias"] ** 2,
                "crate-e": lambda: U**2 @ merged,
                "crate-fix": lambda: p[f"layers.{l}.mssa.fixed"] ** 2 @ merged, "crate-identity": lambda: merged,
            }["crate" if name == "vit" else name]()  # fmt: skip
            y = query - out if name in ("crate-n", "crate-e") and not effective else query + out
            if name == "vit":
                hidden = p[f"layers.{l}.mlp.0.weight"] ** 2 @ y + p[f"layers.{l}.mlp.0.bias"] ** 2
                hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
                new.append(y + p[f"layers.{l}.mlp.2.weight"] ** 2 @ hidden + p[f"layers.{l}.mlp.2.bias"] ** 2)
                continue
            D = p[f"layers.{l}.ista.D"]
            if effective:
                M = np.eye(d) + 0.1 * (D.T - D.T @ D)
                z = M**2 @ y
            else:
                z = y + 0.1 * (D.T**2 @ (y - D**2 @ y)) - 0.01
            new.append(np.maximum(z, 0))
        tokens = new
    return (p["head.1.weight"] ** 2 @ tokens[0] + p["head.1.bias"] ** 2).sum()


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_path_norm_matches_numpy(name, effective):
    model = small_model(name, seed=3)
    result = measures.path_norm(model, (1, 8, 8), effective)
    assert result == pytest.approx(path_norm_by_hand(model, name, effective), rel=1e-10)
    assert result > 0


def test_effective_path_norm_sums_the_squares_of_all_paths():
    """One layer, whose CLS token attends uniformly: every path is a product of single weights."""
    model = small_model("crate", seed=1, width=4, heads=2, depth=1, classes=2)
    for bias in (model.patch_embedding[1].bias, model.layers[0].mssa.W.bias, model.head[1].bias):
        nn.init.zeros_(bias)
    layer = model.layers[0]
    matrices = (model.patch_embedding[1].weight, layer.mssa.U.weight, layer.mssa.W.weight, model.head[1].weight)
    patch, U, W, head = (w.detach().double() for w in matrices)
    M = model.double().layers[0].ista.matrix().detach()
    total = 0.0
    for token, pixel, i, j, k, l, label in itertools.product(range(4), range(16), *[range(4)] * 4, range(2)):
        total += (1 / 5) * (patch[i, pixel] * U[j, i] * W[k, j] * M[l, k] * head[label, l]).item() ** 2
    assert measures.path_norm(model, (1, 8, 8)) == pytest.approx(total, rel=1e-10)


def test_path_norm_ignores_signs_and_scales_with_the_head():
    negative, conceptual = small_model("crate-n"), small_model("crate-c")
    assert measures.path_norm(negative, (1, 8, 8)) == measures.path_norm(conceptual, (1, 8, 8))
    assert measures.path_norm(negative, (1, 8, 8), False) < measures.path_norm(conceptual, (1, 8, 8), False)
    before = measures.path_norm(conceptual, (1, 8, 8))
    with torch.no_grad():
        conceptual.head[1].weight.mul_(-3)
        conceptual.head[1].bias.mul_(3)
    assert measures.path_norm(conceptual, (1, 8, 8)) == pytest.approx(9 * before, rel=1e-6)


def bisection(drop, low, high):
    low, high = math.log(low), math.log(high)
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if drop(math.exp(middle)) > 0.1 else (middle, high)
    return math.exp(low)


@pytest.mark.parametrize("crossing", [2e-4, 3e-3, 0.011, 0.05, 0.7])
@pytest.mark.parametrize("guess", [0.04, 0.002])
@pytest.mark.parametrize("shape", ["steep", "flat", "logistic", "line", "step", "rounded"])
def test_find_scale_agrees_with_bisection(crossing, shape, guess):
    drop = {
        "steep": lambda s: 0.9 * -math.expm1(math.log(8 / 9) * (s / crossing) ** 4),
        "flat": lambda s: 0.9 * -math.expm1(math.log(8 / 9) * (s / crossing) ** 0.7),
        "logistic": lambda s: 0.9 / (1 + 8 * (crossing / s) ** 3),
        "line": lambda s: min(0.9, 0.1 * s / crossing),
        "step": lambda s: 0.9 * (s > crossing),
        "rounded": lambda s: round(300 * min(0.9, 0.1005 * (s / crossing) ** 2)) / 300,
    }[shape]
    scale, reached = measures.find_scale(drop, guess)
    assert reached == pytest.approx(drop(scale), abs=1e-9)
    assert drop(scale * 0.989) <= 0.1 <= drop(scale * 1.011)  # a crossing lies within PRECISION
    if shape != "rounded":  # where 0.1 itself is a plateau, any point of it will do
        assert scale == pytest.approx(bisection(drop, 1e-4, 1), rel=0.011)


def test_find_scale_without_a_crossing_ends_at_an_end():
    assert measures.find_scale(lambda s: 0.02 * s, 0.04) == (pytest.approx(1, rel=0.02), pytest.approx(0.02, rel=0.02))
    assert measures.find_scale(lambda s: 0.5, 0.04) == (pytest.approx(1e-4, rel=0.02), 0.5)


def test_find_scale_ends_where_the_drop_is_a_tenth_but_for_rounding():
    seen = []

    def drop(scale):  # 1 - 0.9 is less than 0.1
        seen.append(scale)
        return 1 - (1.0 if scale < 0.03 else 0.9 if scale < 0.05 else 0.5)

    scale, reached = measures.find_scale(drop, 0.04)
    assert 0.03 <= scale < 0.05 and reached == pytest.approx(0.1) and len(seen) == 1


def displaced(model, images, labels, generator, std):
    """Drop of accuracy of one copy whose weights, LayerNorm's aside, got noise of standard deviation std(weights)."""
    copied = copy.deepcopy(model).eval()
    layernorm = [p for module in copied.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()]
    with torch.no_grad():
        before = (copied(images).argmax(1) == labels).double().mean()
        for p in copied.parameters():
            if not any(p is q for q in layernorm):
                p.add_(torch.randn(p.shape, generator=generator) * std(p))
        return (before - (copied(images).argmax(1) == labels).double().mean()).item()


@pytest.mark.parametrize("magnitude_aware", [False, True])
def test_noise_scale_costs_a_tenth_of_the_accuracy(trained, data, magnitude_aware):
    _, model = trained
    images, labels = data.train_images, data.train_labels
    sigma, reached = measures.noise_scale(model, images, labels, magnitude_aware)

    def std(p):
        return (sigma**2 * p**2 + 1e-6).sqrt() if magnitude_aware else sigma

    assert 0.09 <= reached <= 0.11
    generator = torch.Generator().manual_seed(0)
    same_draws = [displaced(model, images, labels, generator, std) for _ in range(10)]
    assert np.mean(same_draws) == pytest.approx(reached, abs=2 / 3000)  # a prediction or two may flip by rounding
    fresh = [displaced(model, images, labels, torch.Generator().manual_seed(7 + i), std) for i in range(40)]
    spread = np.std(fresh, ddof=1) * math.sqrt(1 / 10 + 1 / 40)
    assert abs(np.mean(fresh) - 0.1) < 4 * spread


def test_sharpness_climbs_inside_the_box_and_costs_a_tenth_of_the_accuracy(trained, data, monkeypatch):
    _, model = trained
    images, labels = data.train_images, data.train_labels
    climbed, real = [], measures.accuracy
    monkeypatch.setattr(measures, "accuracy", lambda m, w, *rest: climbed.append(w) or real(m, w, *rest))
    alpha, reached = measures.sharpness_radius(model, images, labels)
    assert 0.09 <= reached <= 0.11

    def distance(weights):
        return max((weights[name] - p).abs().max().item() for name, p in model.named_parameters() if name in weights)

    at_alpha = min(climbed[1:], key=lambda w: abs(distance(w) - alpha))
    assert distance(at_alpha) == pytest.approx(alpha, rel=1e-3)  # on the box's surface, up to float32's rounding
    there = copy.deepcopy(model)
    there.load_state_dict(model.state_dict() | at_alpha)
    accuracy = [(m(images).argmax(1) == labels).double().mean().item() for m in (model, there)]
    assert accuracy[0] - accuracy[1] == pytest.approx(reached, abs=1e-9)
    at_random = displaced(model, images, labels, torch.Generator().manual_seed(0), lambda p: alpha)
    assert at_random < reached / 2  # ascent costs far more than noise of the same size


def test_srr_is_the_mean_over_layers_with_and_without_layernorm(trained, data, monkeypatch):
    _, model = trained
    layers = layer_srr(model, data.train_images)
    result, parts = measures.srr(model, data)
    for name, key in (("srr", "srr"), ("srr_l0", "l0"), ("srr_rate_subspaces", "rate_subspaces"), ("srr_rate", "rate")):
        assert result[name] == pytest.approx(np.mean([layer[key] for layer in layers]), rel=1e-12)
    assert result["srr"] == pytest.approx(0.1 * result["srr_l0"] + result["srr_rate_subspaces"] - result["srr_rate"])
    with monkeypatch.context() as patch:
        patch.setattr(nn.LayerNorm, "forward", lambda self, tokens: tokens)
        bare = layer_srr(copy.deepcopy(model).double(), data.train_images.double())
    assert result["srr_no_layernorm"] == pytest.approx(np.mean([layer["srr"] for layer in bare]), rel=1e-12)
    assert abs(result["srr_no_layernorm"] - result["srr"]) > 0.01
    for l, part in enumerate(parts):
        assert part["layer"] == l + 1
        for key in layers[l]:
            assert part[key] == pytest.approx(layers[l][key])
            assert part[f"{key}_no_layernorm"] == pytest.approx(bare[l][key])


def test_what_is_doubtful_is_flagged(data):
    model = small_model("crate", depth=12)
    with torch.no_grad():
        for layer in model.layers:
            layer.mssa.W.weight.mul_(1e15)  # LayerNorm makes up for it; without it tokens overflow
    values, details, layers = measures.measure(model, None, data, GROUPS, images=20)
    assert math.isnan(values["srr_no_layernorm"])
    assert math.isfinite(values["srr"])
    assert math.isnan(layers[1]["rate_no_layernorm"])
    flags = details["flags"].split()
    assert details["margin"] < 0 and {"margin", "inverse_margin", "srr_no_layernorm"} <= set(flags)
    assert {"path_norm", "sigma"} <= set(flags)  # an untrained model's accuracy has no 0.1 to lose
    assert not {"srr", "params", "l2"} & set(flags)


def test_measuring_changes_nothing(trained, data):
    initial, model = trained
    model = copy.deepcopy(model)
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
    identities = [id(p) for p in model.parameters()]
    random = torch.get_rng_state()
    measures.measure(model, initial, data, GROUPS, images=60)
    assert torch.equal(torch.get_rng_state(), random)
    assert [tensor.numpy().tobytes() for tensor in model.state_dict().values()] == before
    assert [id(p) for p in model.parameters()] == identities
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error():
    model = small_model().train()
    model.layers[0].eval()
    with pytest.raises(RuntimeError):
        measures.margin(model, torch.zeros(4, 1, 9, 9), torch.zeros(4, dtype=torch.int64))
    assert model.training and not model.layers[0].training


def test_order_of_models_and_global_seed_do_not_matter(trained, data):
    initial, model = trained
    other = small_model("crate-n", seed=5)
    first = measures.measure(model, initial, data, GROUPS, images=60)
    torch.manual_seed(99)
    second = measures.measure(other, None, data, GROUPS, images=60)
    again = measures.measure(other, None, data, GROUPS, images=60), measures.measure(model, initial, data, GROUPS, images=60)
    assert repr(again) == repr((second, first))  # by text: NaN is not equal to itself


def test_chunk_size_does_not_matter(trained, data):
    _, model = trained
    images, labels = data.train_images[:100], data.train_labels[:100]
    for function in (measures.margin, measures.noise_scale):
        small, large = (np.array(function(model, images, labels, chunk=chunk)) for chunk in (7, 100))
        np.testing.assert_allclose(small, large, rtol=1e-5)
    small, large = (measures.sharpness_radius(model, images, labels, chunk) for chunk in (7, 100))
    assert small[0] == pytest.approx(large[0], rel=0.02)  # the sign of a gradient near 0 may flip


def test_subset_is_the_same_for_all_models_and_no_larger_than_asked(trained, data, monkeypatch):
    initial, model = trained
    seen = []
    monkeypatch.setattr(measures, "noise_scale", lambda m, images, labels, **_: seen.append((images, labels)) or (0.1, 0.1))
    for m in (model, small_model("crate-n")):
        measures.measure(m, None, data, ["pac-bayes"], images=40)
    everything = measures.measure(model, None, data, ["pac-bayes"], images=10_000) and seen[-1]
    batches = [next(iter(images.split(1000))) for images, _ in seen]
    assert len(batches[0]) == len(seen[0][1]) == 40
    assert all(torch.equal(batches[0], batch) for batch in batches[1:4])
    assert torch.equal(everything[1], data.train_labels)
