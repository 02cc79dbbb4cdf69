"""Complexity measures: golden values, numpy and textbook versions, searches, and what measuring must not touch."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from crate import measures
from crate.data import load_data
from crate.model import VARIANTS, Variant, build_model
from crate.runs import load_run
from crate.srr import layer_srr
from crate.training import train
from tests import reference
from tests.test_training import config

W = [[[1, 2], [3, 4], [-1, 0.5]], [[2, -1, 0.5], [0, 1, -2]]]
W0 = [[[0.5, 1], [1, 1], [0, 0]], [[1, 0, 0], [0, 0, 1]]]
GOLDEN = {  # by an independent computation, of W and W0 with gamma = 2, m = 10, sigma = sigma' = 0.1
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


def small_model(name="crate-c", seed=0, depth=2):
    torch.manual_seed(seed)
    return build_model(name, image_size=8, patch_size=4, channels=1, classes=10, width=12, depth=depth, heads=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that classifies most of the 300 training images, at initialisation and afterwards."""
    folder = tmp_path_factory.mktemp("run")
    train(config(model="crate", depth=2, dropout=0.02, train_subset=300, hold_out=0.0, epochs=80), folder, show_progress=False)
    _, _, model, initial = load_run(folder)
    return initial, model


def test_golden_values():
    by_name = {"a": W[0], "b": W[1]}, {"b": W0[1], "a": W0[0]}
    assert measures.weight_measures(*by_name, 2, 10, 0.1, 0.1) == pytest.approx(GOLDEN, rel=1e-9, abs=1e-8)


def test_margin_is_the_kth_smallest():
    labels = torch.arange(29) % 3
    logits = torch.randn(29, 3, generator=torch.Generator().manual_seed(0)) + 5 * F.one_hot(labels)
    margins = [row.pop(y) - max(row) for row, y in zip(logits.tolist(), labels.tolist())]
    assert measures.margin(nn.Identity(), logits, labels, chunk=4) == pytest.approx(sorted(margins)[1])  # floor(29 / 10) = 2
    assert measures.margin(nn.Identity(), logits[:5], labels[:5]) == pytest.approx(min(margins[:5]))  # k is at least 1


@pytest.mark.parametrize("name", reference.VARIANTS)
def test_which_parameters_count(name):
    model = small_model(name)
    linear = {f"{module}.weight" for module, kind in model.named_modules() if isinstance(kind, nn.Linear)}
    names = {parameter for parameter, _ in model.named_parameters()}
    assert measures.counted_weights(model).keys() == linear | {name for name in names if name.endswith("ista.D")}
    moved = {name for name in names if not name.startswith(("patch_embedding.0", "patch_embedding.2", "head.0"))}
    assert measures.perturbed_parameters(model).keys() == {name for name in moved if "norm" not in name}


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("name", [*reference.VARIANTS, "half"])
def test_path_norm_is_the_textbook_forward_pass_of_squares(name, effective, monkeypatch):
    monkeypatch.setitem(VARIANTS, "half", Variant(+0.5, "U", "U^T", "ISTA", "half a step"))
    model, (size, *others) = small_model(name, seed=3), reference.fields(name)
    monkeypatch.setattr(reference, "fields", lambda variant: (size**2 if effective else size, *others))
    weights = {key: tensor.double() ** 2 for key, tensor in reference.copies(model).items()}
    weights |= {key: torch.zeros_like(weights[key]) for key in ("cls_token", "pos_embedding")}
    monkeypatch.setattr(reference, "layer_norm", lambda tokens, weights, name: tokens)
    if effective:
        weights |= {key: p.double() for key, p in model.named_parameters() if key.endswith("ista.D")}

        def squared_ista(tokens, D):
            M = torch.eye(12) + 0.1 * (D.mT - D.mT @ D)
            return torch.relu(tokens @ (M * M).mT)

        monkeypatch.setattr(reference, "ista", squared_ista)
    expected, _ = reference.forward(torch.ones(1, 1, 8, 8).double(), weights, name, heads=3, patch_size=4, depth=2)
    assert measures.path_norm(model, (1, 8, 8), effective) == pytest.approx(expected.sum().item(), rel=1e-10)


@pytest.mark.parametrize("crossing", [2e-4, 0.011, 0.7])
def test_find_scale_finds_the_crossing(crossing):
    for drop in (
        lambda s: 0.9 * -math.expm1(math.log(8 / 9) * (s / crossing) ** 4),
        lambda s: min(0.9, 0.1 * s / crossing),
        lambda s: 0.9 * (s > crossing),
    ):
        scale, reached = measures.find_scale(drop, 0.04)
        assert scale == pytest.approx(crossing, rel=0.011) and reached == pytest.approx(drop(scale), abs=1e-9)
    # Without a crossing, and with a drop of exactly a tenth.
    assert measures.find_scale(lambda s: 0.02 * s, 0.04) == (pytest.approx(1, rel=0.02), pytest.approx(0.02, rel=0.02))
    assert measures.find_scale(lambda s: 0.5, 0.04) == (pytest.approx(1e-4, rel=0.02), 0.5)
    assert measures.find_scale(lambda s: 1 - 0.9, 0.04) == (pytest.approx(0.04), 0.1)  # less than 0.1, by rounding


def accuracy(model, weights, images, labels):
    return (functional_call(model, weights, (images,)).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("magnitude_aware", [False, True])
def test_noise_scale_costs_a_tenth_of_the_accuracy(trained, examples, magnitude_aware):
    _, model = trained
    sigma, reached = measures.noise_scale(model, *examples, magnitude_aware)
    generator, noisy, accuracies = torch.Generator().manual_seed(0), {}, []
    for _ in range(10):
        for name, w in measures.perturbed_parameters(model).items():
            spread = (sigma**2 * w**2 + 1e-6).sqrt() if magnitude_aware else sigma
            noisy[name] = w + spread * torch.randn(w.shape, generator=generator)
        accuracies.append(accuracy(model, noisy, *examples))
    drop = accuracy(model, {}, *examples) - np.mean(accuracies)
    assert 0.09 <= reached <= 0.11 and drop == pytest.approx(reached, abs=2 / 3000)  # one or two may flip by rounding


def test_sharpness_climbs_inside_the_box_and_costs_a_tenth_of_the_accuracy(trained, examples):
    _, model = trained
    images, labels = examples
    alpha, reached = measures.sharpness_radius(model, images, labels)
    there, start = copy.deepcopy(model), dict(model.named_parameters())
    for _ in range(4):  # signed steps of half the radius, each clipped to the box
        there.zero_grad()
        F.cross_entropy(there(images), labels).backward()
        for name in measures.perturbed_parameters(model):
            w = there.get_parameter(name)
            w.data = (w + alpha / 2 * w.grad.sign()).clamp(start[name] - alpha, start[name] + alpha).detach()
    drop = accuracy(model, {}, *examples) - accuracy(there, {}, *examples)
    assert 0.09 <= reached <= 0.11 and drop == pytest.approx(reached, abs=2 / 300)  # one may flip by rounding


def test_srr_is_the_mean_over_layers(trained, examples, monkeypatch):
    (initial, model), (images, _) = trained, examples
    result, parts = measures.srr_measures(model, initial, images)
    layers = layer_srr(model, images)

    def mean(layers, key="srr"):
        return pytest.approx(np.mean([layer[key] for layer in layers]), rel=1e-9)

    assert result["srr"] == mean(layers) and result["baseline_srr_init"] == mean(layer_srr(initial, images))
    assert result["srr_lambda_0"] == mean(layer_srr(model, images, sparsity=0))
    for key in ("l0", "rate_subspaces", "rate"):
        assert result[f"srr_{key}"] == mean(layers, key)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, tokens: tokens)
    bare = layer_srr(copy.deepcopy(model).double(), images.double())
    assert result["srr_no_layernorm"] == mean(bare)
    expected = {"layer": 2} | layers[1] | {f"{key}_no_layernorm": value for key, value in bare[1].items()}
    assert parts[1] == pytest.approx(expected, rel=1e-5)


def test_every_group_and_what_is_doubtful(trained, data):
    initial, model = trained
    result = measures.measure(model, initial, data, measures.GROUPS, images=100)
    values, details = result["measures"], result["details"]
    assert values.keys() >= GOLDEN.keys() | set(measures.GROUPS.values())
    assert not result["failed"] and len(result["layers"]) == 2
    bound = values["param_norm"] / (4 * details["sigma"] ** 2) + math.log(300 / details["sigma"]) + 10  # m: all images
    assert values["pacbayes_orig"] == pytest.approx(bound)
    assert values["pacbayes_flatness"] == pytest.approx(details["sigma"] ** -2)
    assert values["sharpness_flatness"] == pytest.approx(details["alpha"] ** -2)
    assert values["path_norm_over_margin"] == pytest.approx(values["path_norm"] / details["margin"] ** 2)
    assert measures.doubtful(values, details) == []
    assert measures.doubtful({"path_norm_literal": -1.0, "pacbayes_mag_init": -1.0}, {}) == ["path_norm_literal"]
    untrained = measures.measure(small_model(), None, data, measures.GROUPS, images=100)
    assert untrained["details"]["margin"] < 0 and untrained["measures"]["inverse_margin"] is None
    flags = measures.doubtful(untrained["measures"], untrained["details"])
    assert {"margin", "inverse_margin", "path_norm_over_margin", "sigma", "alpha"} <= set(flags)  # there is no 0.1 to lose
    assert not {"srr", "params", "l2", "path_norm"} & set(flags)


@pytest.mark.faults
def test_srr_without_layernorm_that_can_not_be_computed_leaves_the_rest(data):
    model = small_model("crate", depth=12)
    for layer in model.layers:
        layer.mssa.W.weight.data *= 1e15  # LayerNorm makes up for it; without it tokens overflow
    result = measures.measure(model, None, data, ["srr"])
    assert result["measures"]["srr_no_layernorm"] is None and result["layers"][1]["rate_no_layernorm"] is None
    assert math.isfinite(result["measures"]["srr"]) and not result["failed"]
    assert measures.doubtful(result["measures"], result["details"]) == ["srr_no_layernorm"]


def test_measuring_changes_nothing_and_depends_on_nothing_else(trained, data, examples):
    initial, model = copy.deepcopy(trained)
    model.train().layers[1].eval()

    def state():
        modes = [module.training for module in model.modules()]
        parameters = [(p.grad is None, p.requires_grad, p.detach().numpy().tobytes()) for p in model.parameters()]
        return modes, parameters, torch.get_rng_state().tolist(), torch.is_grad_enabled()

    before = state()
    first = measures.measure(model, initial, data, measures.GROUPS, images=40)
    assert state() == before
    torch.manual_seed(99)
    measures.measure(small_model("crate-n", seed=5), None, data, ["pac-bayes"], images=40)
    assert measures.measure(model, initial, data, measures.GROUPS, images=40) == first
    everything = measures.measure(model, initial, data, ["pac-bayes"], images=10_000)
    assert everything["details"]["sigma"] == measures.noise_scale(model, *examples)[0] != first["details"]["sigma"]
    model.layers[1].ista.D.data.fill_(1e30)  # D^T D overflows float32
    assert "layer 2: " in measures.measure(model, None, data, ["srr"])["failed"]["srr"] and state()[0] == before[0]
