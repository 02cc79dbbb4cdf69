"""The training loop against steps made by hand, and what a run logs, stops at and refuses to go on with."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from crate import training
from crate.cli import InputError
from crate.data import data_of
from crate.kernels import full_precision
from crate.runs import load_checkpoint, load_run, read_log, resolve, srr_layers
from crate.training import begin, fit, reached_target, train
from tests import reference

BAR = training.tqdm(disable=True)
ONE_BATCH = dict(train_subset=44, batch_size=64)  # 40 images


def config(amp="off", device="cpu", **flags):
    """The config of a tiny run: three steps an epoch, the last of 25 images."""
    small = dict(train_subset=250, hold_out=0.1, patch_size=4, width=12, heads=3, depth=3, epochs=3, batch_size=100, lr=1e-2)
    where = dict(preset="laptop", device=torch.device(device), amp=amp, data_dir=Path("data"))
    (one,) = resolve(small | dict(log_srr_every=0) | flags, **where, graph=True, save_every=0.0).values()
    return one


# Steps by hand


def recorded_steps(folder, **flags):
    """Config, data, the log's rows, and (weights, gradients) before each step of the optimizer and after the last one."""
    folder.mkdir(exist_ok=True)
    one, seen = config(**flags), []
    data, model, optimizer, scaler, state = begin(one, folder)

    def keep(*_):
        seen.append((reference.copies(model), {name: p.grad.clone() for name, p in model.named_parameters()}))

    optimizer.register_step_pre_hook(keep)
    fit(one, folder, data, model, optimizer, scaler, state, BAR)
    keep()
    return one, data, state["rows"], seen


def by_hand(one, data, weights, layers):
    """Eq. 14 on the whole training set, by the reference in float64: cross-entropy, measure, {parameter: gradient}."""
    weights = {name: w.detach().double().requires_grad_(w.requires_grad) for name, w in weights.items()}
    images, sizes = data.prepare(data.train_images).double(), (one["model"], one["heads"], one["patch_size"], one["depth"])
    logits, outputs = reference.forward(images, weights, *sizes)
    loss, measure = F.cross_entropy(logits, data.train_labels), torch.zeros(())
    if one["srr_reg"]:
        options = one["srr_lambda"], one["srr_gamma"], one["srr_norm"]
        measure = reference.stop_gradient_srr(outputs, weights, one["model"], one["heads"], layers, *options)
    (loss + one["srr_reg"] * measure).backward()
    gradients = {name: w.grad for name, w in weights.items() if w.requires_grad}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    factor = min(1.0, (one["clip_norm"] or math.inf) / norm)
    return loss.item(), measure.item(), {name: factor * g for name, g in gradients.items()}


def adamw(weight, gradients, rates, decay):
    """The weight after steps with these gradients and learning rates."""
    mean, square, weight = 0.0, 0.0, weight.detach().double()
    for t, (g, rate) in enumerate(zip(gradients, rates), start=1):
        mean, square = 0.9 * mean + 0.1 * g.double(), 0.999 * square + 0.001 * g.double() ** 2
        step = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        weight = weight * (1 - rate * decay) - rate * step
    return weight


STEPS = {
    **{name: dict(model=name, srr_reg=0.1, srr_layer="all") for name in reference.VARIANTS},
    "plain": {},
    "last layer": dict(srr_reg=0.1),
    "random layer": dict(srr_reg=1.0, srr_layer="random"),
    "first layer": dict(srr_reg=-0.1, srr_layer="1"),
    "l1": dict(srr_reg=0.1, srr_norm="l1", srr_lambda=0.02, srr_gamma=0.5),
    "clipped": dict(srr_reg=0.1, clip_norm=0.1),
    "decay": dict(weight_decay=3.0, schedule="constant"),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_equal_those_by_hand(tmp_path, name):
    one, data, rows, seen = recorded_steps(tmp_path, **ONE_BATCH, epochs=3, **STEPS[name])
    choices = [[0], [1], [2]] if name == "random layer" else srr_layers(one["srr_layer"], one["depth"], 1)
    for (before, gradients), row in zip(seen, rows[1:], strict=False):  # one step an epoch
        hands = [by_hand(one, data, before, layers) for layers in choices]
        loss, measure, expected = min(hands, key=lambda hand: abs(hand[1] - row.get("train_srr", 0.0)))
        assert row["train_loss"] == pytest.approx(loss, rel=1e-5)
        assert row.get("train_srr", 0.0) == pytest.approx(measure, rel=1e-5)
        for key, gradient in gradients.items():
            reference.assert_close(gradient, expected[key], 2e-4)
    rates = [1e-2 if one["schedule"] == "constant" else 1e-2 * math.cos(math.pi * step / 6) ** 2 for step in range(3)]
    assert [row["lr"] for row in rows[1:]] == pytest.approx(rates)
    for key, weight in seen[0][0].items():
        expected = weight.double()
        if weight.requires_grad:
            decay = one["weight_decay"] * (weight.ndim == 2)  # on matrices alone
            expected = adamw(weight, [gradients[key] for _, gradients in seen[:3]], rates, decay)
        torch.testing.assert_close(seen[3][0][key].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amp, clip_norm, tolerance", [("bf16", 0.1, 0.1), ("fp16", 0.1, 0.02), ("fp16", 100.0, 0.02)])
def test_amp(tmp_path, amp, clip_norm, tolerance):
    """The optimizer gets the gradient unscaled and clipped."""
    one, data, _, seen = recorded_steps(tmp_path, amp=amp, clip_norm=clip_norm, **ONE_BATCH, epochs=1, srr_reg=0.01)
    for key, gradient in by_hand(one, data, seen[0][0], [2])[2].items():
        assert (seen[0][1][key] - gradient).norm() < tolerance * min(clip_norm, 1), key


@pytest.mark.cuda
def test_a_gpu_gives_what_the_cpu_gives(tmp_path, monkeypatch):
    """Also where six CUDA graphs take turns: three layers, two sizes of a batch. The learning rate changes, too."""
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(graph), replay(graph)))
    flags = dict(epochs=20, clip_norm=1.0, srr_reg=1e-3, srr_layer="random", weight_decay=0.1)
    for device in ("cpu", "cuda"):
        with full_precision("cuda"):
            train(config(device=device, **flags), tmp_path / device, False)
    assert len(set(replayed)) == 6 and sum(one is not other for one, other in zip(replayed, replayed[1:])) > 20
    for cpu, gpu in zip(read_log(tmp_path / "cpu"), read_log(tmp_path / "cuda"), strict=True):
        for key in ("train_loss", "train_srr", "val_loss"):
            assert gpu.get(key, 0.0) == pytest.approx(cpu.get(key, 0.0), rel=1e-3), cpu["epoch"]


def test_log_result_and_files(tmp_path):
    flags = dict(srr_reg=1e-3, dropout=0.1, log_srr_every=2)
    result, rows = train(config(epochs=5, validate_every=2, **flags), tmp_path, False), read_log(tmp_path)
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12), (5, 15)]
    assert [len(row.get("srr", [])) for row in rows] == [3, 0, 3, 0, 3, 3] and rows[-1]["srr_val"] != rows[-1]["srr"]
    assert [row["epoch"] for row in rows if "val_loss" in row] == [0, 2, 4, 5]
    assert result["gap"] == result["val_loss"] - result["train_loss"] and result["reached_target"] is None
    assert result["gap_accuracy"] == result["train_accuracy"] - result["val_accuracy"]
    weights_alone = {"config", "model", "epoch", "step", "loss_bound", "rows"}
    assert load_checkpoint(tmp_path / "last.pt").keys() == weights_alone
    one, _, trained, initial = load_run(tmp_path)
    data = data_of(one)
    for model, row in ((trained, rows[5]), (trained, result), (initial, rows[0])):
        loss = F.cross_entropy(model(data.prepare(data.val_images)), data.val_labels).item()
        assert row["val_loss"] == pytest.approx(loss, rel=1e-5)
    for seed in (0, 1):
        train(config(epochs=0, seed=seed, **flags), tmp_path / str(seed), False)
        (row,) = read_log(tmp_path / str(seed))
        assert (row["val_loss"] == rows[0]["val_loss"]) == (seed == 0)


def test_means_of_an_epoch_weigh_every_image_alike(tmp_path):
    """Also the one image of the last batch. At such a learning rate the model stays what it is."""
    flags = dict(train_subset=112, batch_size=50, lr=1e-12, epochs=1, srr_reg=1e-3, log_srr_every=1)
    result, row = train(config(**flags), tmp_path, False), read_log(tmp_path)[-1]
    assert row["train_loss"] == pytest.approx(result["train_loss"], rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(result["train_accuracy"])
    assert row["train_srr"] == pytest.approx(row["srr"][-1]["srr"], rel=1e-5)


def test_stops_at_the_loss(tmp_path):
    flags = dict(stop_at_loss=1.5, epochs=80, lr=2e-2, schedule="constant", validate_every=100)
    result, row = train(config(**flags), tmp_path / "stop", False), read_log(tmp_path / "stop")[-1]
    assert result["reached_target"] is True and 1.2 < result["train_loss"] < 1.5 and result["epochs"] < 80
    assert result["steps"] == row["step"] and result["val_loss"] == row["val_loss"]
    result = train(config(stop_at_loss=1e-6, epochs=2), tmp_path / "miss", False)
    assert result["reached_target"] is False and result["epochs"] == 2


@pytest.mark.parametrize("before, checks", [(math.inf, 1), (0.04, 2), (0.02, 4), (0.012, 8)])
def test_checks_are_more_often_near_the_target(tmp_path, before, checks):
    """before: the training loss at the last check. An epoch has 25 steps."""
    one, modes = config(batch_size=9, stop_at_loss=1e-9, epochs=2, validate_every=2), []
    data, model, optimizer, scaler, state = begin(one, tmp_path)
    state["loss_bound"] = before
    model.register_forward_hook(lambda *_: modes.append(model.training))
    fit(one, tmp_path, data, model, optimizer, scaler, state, BAR)
    steps = sorted({sum(modes[:i]) for i, in_training in enumerate(modes) if not in_training})
    assert steps == [math.ceil(25 * (i + 1) / checks) for i in range(checks)] + [50]  # the loss is high again


def test_the_stopping_criterion_is_the_training_loss(tmp_path):
    """Without dropout."""
    data, model, _, _, state = begin(config(dropout=0.5), tmp_path)
    loss = F.cross_entropy(model.eval()(data.prepare(data.train_images)), data.train_labels).item()
    for target, below, bound in ((math.inf, True, loss), (1.001 * loss, True, loss), (loss / 2, False, loss / 2)):
        assert reached_target({"stop_at_loss": target}, data, model, state, epoch_ends=False) == below
        assert state["loss_bound"] == pytest.approx(bound) and model.training


# Nothing is lost


def test_a_rate_that_can_not_be_computed_ends_no_run(tmp_path, monkeypatch, capsys):
    """It is null in the log, with a warning."""

    def fail(*_, **__):
        raise ValueError("layer 2: too large and too alike")

    monkeypatch.setattr(training, "operator_rates", fail)
    result, rows = train(config(epochs=2, log_srr_every=1), tmp_path, False), read_log(tmp_path)
    assert [row.get("operators", 0) for row in rows] == [None, 0, None] and len(rows[2]["srr"]) == 3
    assert math.isfinite(result["gap"]) and capsys.readouterr().err.count("is null in the log: layer 2: too large") == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss of the step before was."""
    one = config(epochs=3)
    data, model, optimizer, scaler, state = begin(one, tmp_path)
    fit(one | {"epochs": 1}, tmp_path, data, model, optimizer, scaler, state, BAR)
    before = (tmp_path / "last.pt").read_bytes()
    optimizer.register_step_post_hook(lambda *_: model.layers[1].ista.D.data.fill_(math.inf) if state["step"] == 5 else None)
    with pytest.raises(InputError, match="epoch 2: the weights or the validation loss are not finite"):
        fit(one, tmp_path, data, model, optimizer, scaler, state, BAR)
    assert (tmp_path / "last.pt").read_bytes() == before
