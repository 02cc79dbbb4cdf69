"""Complexity measures: golden values, numpy and textbook versions, searches, and what measuring must not touch."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crate import measures
from crate.data import load_data
from crate.model import build_model
from crate.srr import layer_srr
from tests import reference

W = [[[1, 2], [3, 4], [-1, 0.5]], [[2, -1, 0.5], [0, 1, -2]]]
W0 = [[[0.5, 1], [1, 1], [0, 0]], [[1, 0, 0], [0, 0, 1]]]
GOLDEN = {  # measures.md 8
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


@pytest.fixture(scope="module")
def examples(data):
    """The training set as the model sees it."""
    return data.prepare(data.train_images), data.train_labels


def small_model(name="crate-c", seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = dict(image_size=8, patch_size=4, channels=1, classes=10, width=12, depth=2, heads=3) | sizes
    return build_model(name, **sizes)


@pytest.fixture(scope="module")
def trained(examples):
    """A model that classifies most of the 300 training images, at initialisation and afterwards."""
    images, labels = examples
    model = small_model("crate")
    initial = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.zero_grad()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9
    return initial, model


# Norms, distances and bounds


@pytest.mark.parametrize("form", [list, torch.tensor])
def test_golden_values(form):
    result = measures.weight_measures(list(map(form, W)), list(map(form, W0)), 2, 10, 0.1, 0.1)
    assert result == pytest.approx(GOLDEN, rel=1e-9, abs=1e-8)


def test_names_scales_and_number_of_matrices():
    by_name = {"a": W[0], "b": W[1]}, {"b": W0[1], "a": W0[0]}
    result = measures.weight_measures(*by_name, 2, 10, 0.1, 0.2)
    assert {name: mu for name, mu in result.items() if "mag" not in name} == pytest.approx(
        {name: mu for name, mu in GOLDEN.items() if "mag" not in name}, rel=1e-9
    )
    assert result["pacbayes_mag_flatness"] == pytest.approx(25) and result["pacbayes_mag_init"] < GOLDEN["pacbayes_mag_init"]
    three = measures.weight_measures([torch.eye(2)] * 3, [torch.zeros(2, 2)] * 3, 1, 10, None, None)
    expected = {"log_sum_of_fro": math.log(6), "log_sum_of_spec": math.log(3), "log_prod_of_fro": 3 * math.log(2)}
    expected |= {"fro_over_spec": 6, "fro_dist": 6, "dist_spec_init": 3, "log_spec_init_main": math.log(6)}
    assert {name: three[name] for name in expected} == pytest.approx(expected)
    with pytest.raises(ValueError):
        measures.weight_measures(W, W0[:1], 2, 10, 0.1, 0.1)


def test_missing_scalars_leave_measures_out():
    needs_initial = {"l2_dist", "fro_dist", "dist_spec_init", "log_spec_init_main"}
    needs_initial |= {"pacbayes_init", "pacbayes_mag_init", "pacbayes_mag_orig"}
    of_margin = {name for name in GOLDEN if "margin" in name or name.endswith("_main")}
    assert measures.weight_measures(W, None, 2, 10, 0.1, 0.1).keys() == GOLDEN.keys() - needs_initial
    assert measures.weight_measures(W, W0, None, 10, 0.1, 0.1).keys() == GOLDEN.keys() - of_margin
    without_noise = measures.weight_measures(W, W0, 2, 10, None, None)
    assert without_noise.keys() == {name for name in GOLDEN if not name.startswith("pacbayes")}
    for gamma in (-2, 0, math.nan):
        result = measures.weight_measures(W, W0, gamma, 10, 0.1, 0.1)
        assert {name for name, value in result.items() if math.isnan(value)} == of_margin


@pytest.mark.parametrize("gamma", [1e-100, 1e-155, 5e-324, 1e300])
def test_margins_at_the_ends_of_float64(gamma):
    result = measures.weight_measures(W, W0, gamma, 10, 0.1, 0.1)
    assert result["inverse_margin"] == (math.inf if gamma < 1e-154 else pytest.approx(10 ** (-2 * math.log10(gamma))))
    assert result["log_prod_of_spec_over_margin"] == pytest.approx(5.361857584 - 2 * math.log(gamma))


# Margin


def test_margin_golden_values():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (W[0], [0.1, -0.2, 0.3], W[1], [0.5, -0.5])):
            parameter.copy_(torch.tensor(value))
    points = [(1, 0), (2, -1), (-3, 2), (4, 1), (0, -2), (-1, -1), (3, 3), (-2, 4), (1, -4), (2, 2)]
    images, labels = torch.tensor(points).double() / 4, torch.tensor([0, 0, 0, 1, 0, 0, 1, 0, 0, 1])
    expected = [0.725, 0.6, 4.95, 3.4, 1.125, 2.0625, 4.4, 2.85, 1.0, 2.275]
    np.testing.assert_allclose(measures.margins(model(images), labels).detach(), expected, atol=1e-6)
    assert measures.margin(model, images, labels) == pytest.approx(0.6)


def test_margin_is_the_kth_smallest():
    logits = torch.tensor([[3.0, 1.0, -1.0]]).repeat(29, 1)
    logits[:, 1] = torch.linspace(2.9, -4, 29).flip(0)
    labels, model = torch.zeros(29, dtype=torch.int64), nn.Identity()
    margins = np.sort([3 - max(row[1:]) for row in logits.tolist()])
    assert measures.margin(model, logits, labels, chunk=4) == pytest.approx(margins[1])  # floor(29 / 10) = 2
    assert measures.margin(model, logits[-5:], labels[-5:]) == pytest.approx(margins[0])  # k is at least 1
    assert measures.margin(model, logits, labels + 1) < 0


# Which parameters count, and path-norm


@pytest.mark.parametrize("name", reference.VARIANTS)
def test_which_parameters_count(name):
    model = small_model(name, depth=3)
    _, heads, output, sparsification = reference.fields(name)
    per_layer = {"U": 1, "QKV": 3, "exact": 1}[heads] + (output == "W") + {"ISTA": 1, "MLP": 2}[sparsification]
    squares = per_layer + (6 if sparsification == "MLP" else 0)  # its two matrices are 4 d x d
    counted = measures.counted_weights(model)
    assert len(counted) == 3 * per_layer + 2
    assert sum(w.numel() for w in counted.values()) == 16 * 12 + 3 * squares * 144 + 120
    norms = {f"{place}.{kind}" for place in ("patch_embedding.0", "patch_embedding.2", "head.0") for kind in ("weight", "bias")}
    norms |= {f"layers.{l}.norm{n}.{kind}" for l in range(3) for n in (1, 2) for kind in ("weight", "bias")}
    assert measures.perturbed_parameters(model).keys() == dict(model.named_parameters()).keys() - norms


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("name", reference.VARIANTS)
def test_path_norm_is_the_textbook_forward_pass_of_squares(name, effective, monkeypatch):
    model = small_model(name, seed=3)
    weights = {key: tensor.double() ** 2 for key, tensor in reference.copies(model).items()}
    weights |= {key: torch.zeros_like(weights[key]) for key in ("cls_token", "pos_embedding")}
    monkeypatch.setattr(reference, "layer_norm", lambda tokens, weights, name: tokens)
    if effective:
        weights |= {key: p.double() for key, p in model.named_parameters() if key.endswith("ista.D")}
        fields = reference.fields

        def squared_ista(tokens, D):
            M = torch.eye(12) + 0.1 * (D.mT - D.mT @ D)
            return torch.relu(tokens @ (M * M).mT)

        monkeypatch.setattr(reference, "ista", squared_ista)
        monkeypatch.setattr(reference, "fields", lambda variant: (+1, *fields(variant)[1:]))
    expected, _ = reference.forward(torch.ones(1, 1, 8, 8).double(), weights, name, heads=3, patch_size=4, depth=2)
    assert measures.path_norm(model, (1, 8, 8), effective) == pytest.approx(expected.sum().item(), rel=1e-10)


# Scales of noise and of ascent


def bisection(drop, low, high):
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if drop(middle) > 0.1 else (middle, high)
    return low


@pytest.mark.parametrize("crossing", [2e-4, 0.011, 0.7])
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


def test_find_scale_without_a_crossing_or_with_a_drop_of_exactly_a_tenth():
    assert measures.find_scale(lambda s: 0.02 * s, 0.04) == (pytest.approx(1, rel=0.02), pytest.approx(0.02, rel=0.02))
    assert measures.find_scale(lambda s: 0.5, 0.04) == (pytest.approx(1e-4, rel=0.02), 0.5)
    seen = []
    scale, reached = measures.find_scale(lambda s: seen.append(s) or 1 - 0.9, 0.04)  # less than 0.1, by rounding
    assert reached == 0.1 and seen == [scale]


def displaced(model, images, labels, generator, std):
    """Drop of accuracy of a copy whose weights, LayerNorm's aside, got noise of standard deviation std(weights)."""
    copied = copy.deepcopy(model).eval()
    layernorm = {p for module in copied.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    with torch.no_grad():
        before = (copied(images).argmax(1) == labels).double().mean()
        for p in copied.parameters():
            if p not in layernorm:
                p.add_(torch.randn(p.shape, generator=generator) * std(p))
        return (before - (copied(images).argmax(1) == labels).double().mean()).item()


@pytest.mark.parametrize("magnitude_aware", [False, True])
def test_noise_scale_costs_a_tenth_of_the_accuracy(trained, examples, magnitude_aware):
    _, model = trained
    sigma, reached = measures.noise_scale(model, *examples, magnitude_aware)

    def std(p):
        return (sigma**2 * p**2 + 1e-6).sqrt() if magnitude_aware else sigma

    assert 0.09 <= reached <= 0.11
    generator = torch.Generator().manual_seed(0)
    same_draws = [displaced(model, *examples, generator, std) for _ in range(10)]
    assert np.mean(same_draws) == pytest.approx(reached, abs=2 / 3000)  # a prediction or two may flip by rounding
    fresh = [displaced(model, *examples, torch.Generator().manual_seed(7 + i), std) for i in range(40)]
    assert abs(np.mean(fresh) - 0.1) < 4 * np.std(fresh, ddof=1) * math.sqrt(1 / 10 + 1 / 40)


def test_sharpness_climbs_inside_the_box_and_costs_a_tenth_of_the_accuracy(trained, examples):
    _, model = trained
    images, labels = examples
    alpha, reached = measures.sharpness_radius(model, images, labels)
    there = copy.deepcopy(model).eval()
    layernorm = {p for module in there.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for _ in range(4):  # signed steps of half the radius, each clipped to the box
        there.zero_grad()
        F.cross_entropy(there(images), labels).backward()
        with torch.no_grad():
            for p, start in zip(there.parameters(), model.parameters()):
                if p not in layernorm:
                    p.copy_((p + alpha / 2 * p.grad.sign()).clamp(start - alpha, start + alpha))
    before, after = ((m(images).argmax(1) == labels).double().mean().item() for m in (model, there))
    assert 0.09 <= reached <= 0.11 and before - after == pytest.approx(reached, abs=2 / 300)  # one may flip by rounding
    at_random = displaced(model, images, labels, torch.Generator().manual_seed(0), lambda p: alpha)
    assert at_random < reached / 2  # ascent costs far more than noise of the same size


# SRR


def released_by_hand(model, images, heads=3):
    """R^c of what enters each layer, image by image and head by head, as the released CRATE's hook takes it."""
    weights = {name: tensor.double() for name, tensor in reference.copies(model).items()}
    _, tokens = reference.forward(images.double(), weights, "crate", heads, model.patch_size, len(model.layers))
    rates = []
    for l in range(len(model.layers)):
        own, total = reference.of_layer(weights, l), 0.0
        for image in reference.layer_norm(tokens[l], own, "norm1").detach().numpy():
            for U_k in np.split(own["mssa.U.weight"].detach().numpy(), heads):  # (p, d)
                V = image @ U_k.T  # (N, p)
                V /= np.linalg.norm(V, axis=1, keepdims=True)
                total += np.linalg.slogdet(np.eye(len(V)) + V.shape[1] / (len(V) * 0.01) * V @ V.T)[1] / 2
        rates.append(total / len(images))
    return rates


def test_srr_is_the_mean_over_layers(trained, examples, monkeypatch):
    initial, model = trained
    images, _ = examples
    layers = layer_srr(model, images)
    result, parts = measures.srr_measures(model, initial, images)
    for name, key in (("srr", "srr"), ("srr_l0", "l0"), ("srr_rate_subspaces", "rate_subspaces"), ("srr_rate", "rate")):
        assert result[name] == pytest.approx(np.mean([layer[key] for layer in layers]), rel=1e-12)
    assert result["srr"] == pytest.approx(0.1 * result["srr_l0"] + result["srr_rate_subspaces"] - result["srr_rate"])
    assert result["baseline_srr_init"] == pytest.approx(np.mean([layer["srr"] for layer in layer_srr(initial, images)]))
    for name, settings in (
        ("srr_lambda_0.5", {"sparsity": 0.5}),
        ("srr_lambda_0", {"sparsity": 0}),
        ("srr_gamma_10", {"gamma": 10}),
    ):
        expected = np.mean([layer["srr"] for layer in layer_srr(model, images, **settings)])
        assert result[name] == pytest.approx(expected, rel=1e-9)
    released = released_by_hand(model, images)
    assert result["rate_subspaces_released"] == pytest.approx(np.mean(released), rel=1e-5)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, tokens: tokens)
    bare = layer_srr(copy.deepcopy(model).double(), images.double())
    assert result["srr_no_layernorm"] == pytest.approx(np.mean([layer["srr"] for layer in bare]), rel=1e-12)
    for l, part in enumerate(parts):
        without = {f"{key}_no_layernorm": value for key, value in bare[l].items()}
        assert part == pytest.approx({"layer": l + 1, "rate_subspaces_released": released[l]} | layers[l] | without, rel=1e-5)


# All of them


def test_every_group_and_what_is_doubtful(trained, data):
    initial, model = trained
    result = measures.measure(model, initial, data, measures.GROUPS, images=100)
    assert result["measures"].keys() >= GOLDEN.keys() | set(measures.GROUPS.values())
    assert not result["failed"] and len(result["layers"]) == 2
    assert result["measures"]["pacbayes_flatness"] == pytest.approx(result["details"]["sigma"] ** -2)
    over_margin = result["measures"]["path_norm"] / result["details"]["margin"] ** 2
    assert result["measures"]["path_norm_over_margin"] == pytest.approx(over_margin)
    assert measures.doubtful(result["measures"], result["details"]) == []
    assert measures.doubtful({"path_norm_literal": -1.0, "pacbayes_mag_init": -1.0}, {}) == ["path_norm_literal"]
    untrained = measures.measure(small_model(), None, data, measures.GROUPS, images=100)
    assert untrained["details"]["margin"] < 0 and untrained["measures"]["inverse_margin"] is None
    flags = measures.doubtful(untrained["measures"], untrained["details"])
    assert {"margin", "inverse_margin", "path_norm_over_margin", "sigma", "alpha"} <= set(flags)  # there is no 0.1 to lose
    assert not {"srr", "params", "l2", "path_norm"} & set(flags)


@pytest.mark.faults
def test_what_can_not_be_computed_leaves_the_rest(data, faults):
    model = small_model("crate", depth=12)
    for layer in model.layers:
        layer.mssa.W.weight.data *= 1e15  # LayerNorm makes up for it; without it tokens overflow
    result = measures.measure(model, None, data, ["srr"])
    assert result["measures"]["srr_no_layernorm"] is None and result["layers"][1]["rate_no_layernorm"] is None
    assert math.isfinite(result["measures"]["srr"]) and not result["failed"]
    model.layers[2].ista.D.data *= 1e20  # tokens overflow with it
    result = measures.measure(model, None, data, ["norms", "path-norm", "srr"])
    assert "layer 3" in result["failed"]["srr"] and result["failed"].keys() == {"srr"}
    assert result["measures"]["srr"] is None and math.isfinite(result["measures"]["l2"])
    assert {"margin", "srr", "path_norm"} <= set(measures.doubtful(result["measures"], result["details"]))
    model.layers[2].ista.D.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        measures.measure(model, None, data, ["norms"])
    faults("tokens or weights that are not finite, measured", 3, "NaN and a flag, or refused; other groups kept")


def test_measuring_changes_nothing_and_depends_on_nothing_else(trained, data):
    initial, model = copy.deepcopy(trained)
    model.train().layers[1].eval()

    def state():
        modules = [(module, module.training) for module in model.modules()]
        parameters = [(id(p), p.grad is None, p.requires_grad, p.detach().numpy().tobytes()) for p in model.parameters()]
        return modules, parameters, torch.get_rng_state().tolist(), torch.is_grad_enabled()

    before = state()
    first = measures.measure(model, initial, data, measures.GROUPS, images=40)
    assert state() == before
    torch.manual_seed(99)
    measures.measure(small_model("crate-n", seed=5), None, data, ["pac-bayes"], images=40)
    assert measures.measure(model, initial, data, measures.GROUPS, images=40) == first
    some = measures.measure(model, initial, data, ["srr", "pac-bayes"], images=40)
    assert some["measures"].items() <= first["measures"].items() and some["details"].items() <= first["details"].items()
    assert all(name.startswith(("pacbayes", "srr", "baseline", "rate")) for name in some["measures"])


def test_images_are_prepared_chunk_by_chunk_and_chunks_do_not_matter(trained, data, examples):
    initial, model = trained
    sizes = []
    recording = dataclasses.replace(data)
    recording.prepare = lambda images: sizes.append(len(images)) or data.prepare(images)
    measures.measure(model, initial, recording, ["path-norm", "sharpness", "srr"])
    assert max(sizes) == 256  # of 300
    images, labels = (tensor[:100] for tensor in examples)
    for function in (measures.margin, measures.noise_scale):
        small, large = (np.array(function(model, images, labels, chunk=chunk)) for chunk in (7, 100))
        np.testing.assert_allclose(small, large, rtol=1e-5)
    small, large = (measures.sharpness_radius(model, images, labels, chunk=chunk) for chunk in (7, 100))
    assert small[0] == pytest.approx(large[0], rel=0.02)  # the sign of a gradient near 0 may flip


def test_searches_see_the_same_images_for_all_models(trained, data, monkeypatch):
    seen = []
    monkeypatch.setattr(measures, "sharpness_radius", lambda m, images, labels: seen.append((images, labels)) or (1, 0.1))
    for model, count in ((trained[1], 40), (small_model("crate-n"), 40), (trained[1], 10_000)):
        measures.measure(model, None, data, ["sharpness"], images=count)
    batches = [next(iter(images.split(1000))) for images, _ in seen]
    assert len(batches[0]) == len(seen[0][1]) == 40 and torch.equal(batches[0], batches[1])
    assert torch.equal(seen[2][1], data.train_labels) and torch.equal(batches[2], data.prepare(data.train_images))
