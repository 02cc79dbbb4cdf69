"""The training loop and train.py: schedules, determinism, resume, stopping, AMP, bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crate import training
from crate.checkpoint import load_checkpoint
from crate.cli import InputError
from crate.config import DATASETS, DEFAULTS
from crate.files import lock_holder
from crate.runs import run_name
from crate.training import Run, learning_rate, resolve_amp, srr_layers, train
from tests.conftest import assert_refused
from tests.processes import wait_until

SMALL = ("--width", 12, "--heads", 3, "--depth", 2, "--patch-size", 4, "--epochs", 2, "--batch-size", 100)
SMALL += ("--train-subset", 250, "--device", "cpu", "--save-every", 0)


def config(**changes):
    base = DEFAULTS | dict(zip(("image_size", "channels", "classes"), DATASETS["digits"])) | dict(
        dataset="digits", train_subset=250, patch_size=4, width=12, heads=3, depth=2, dropout=0.1,
        epochs=3, batch_size=100, lr=1e-2, srr_reg=1e-3, srr_layer="random",
        log_srr_every=2, data_dir="data", device="cpu", amp="off", compile=False, save_every=0,
    )  # fmt: skip
    return base | changes


def log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(folder):
    return load_checkpoint(folder / "last.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_learning_rate_is_a_cosine_of_the_step():
    steps = np.arange(101)
    expected = 0.3 * np.cos(np.pi * steps / 200) ** 2  # the half-angle form
    np.testing.assert_allclose([learning_rate(s, 100, 0.3, "cosine") for s in steps], expected, atol=1e-12)
    assert {learning_rate(s, 100, 0.3, "constant") for s in steps} == {0.3}


def test_srr_layers():
    assert srr_layers("last", 4, 2) == [[3], [3]]
    assert srr_layers("all", 3, 1) == [[0, 1, 2]]
    assert srr_layers("1", 4, 1) == [[0]]
    drawn = [layer for (layer,) in srr_layers("random", 4, 4000)]
    assert np.all(np.abs(np.bincount(drawn, minlength=4) - 1000) < 150)  # about 5.5 standard deviations


def test_same_seed_same_run_and_other_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(seed=seed), tmp_path / name, False)
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert log(tmp_path / "a") != log(tmp_path / "c")


@pytest.mark.parametrize("changes", [{}, {"amp": "fp16"}, {"augment": "basic", "srr_reg": 0.0}], ids=["srr", "fp16", "augment"])
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path, changes, monkeypatch):
    train(config(**changes), tmp_path / "whole", False)

    real, saves = Run.save, []

    def save_then_die(self):
        real(self)
        saves.append(self.epoch)
        # the next epoch's row is in the log when the process dies, its checkpoint isn't
        with open(self.folder / "log.jsonl", "a") as stream:
            stream.write('{"epoch": 99, "val_loss"')
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_then_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config(**changes), tmp_path / "cut", False)
    monkeypatch.setattr(Run, "save", real)
    train(config(**changes), tmp_path / "cut", False)
    assert saves == [1, 2]
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("save_every, epochs", [(0, [1, 2, 3]), (1e9, [3])])
def test_save_every(tmp_path, monkeypatch, save_every, epochs):
    real, saved = Run.save, []
    monkeypatch.setattr(Run, "save", lambda self: (real(self), saved.append(self.epoch)))
    train(config(save_every=save_every), tmp_path, False)
    assert saved == epochs


def test_log_rows_and_result(tmp_path):
    result = train(config(), tmp_path / "run", False)
    rows = log(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows] == [0, 3, 6, 9]  # the last, partial batch is used
    assert [("srr" in row) for row in rows] == [("srr_val" in row) for row in rows] == [True, False, True, True]
    assert [("operators" in row) for row in rows] == [True, False, False, True]
    assert rows[-1]["operators"][1]["output"] == pytest.approx(rows[-1]["srr"][1])
    assert rows[-1]["srr_val"] != rows[-1]["srr"]
    assert set(rows[0]["srr"][0]) == {"l0", "rate_subspaces", "rate", "srr"} and len(rows[0]["srr"]) == 2
    assert rows[-1]["val_loss"] == result["val_loss"]
    assert result["gap"] == result["val_loss"] - result["train_loss"] and result["reached_target"] is None
    assert not same(weights(tmp_path / "run"), load_checkpoint(tmp_path / "run" / "init.pt")["model"])


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch):
    first = train(config(), tmp_path / "run", False)
    monkeypatch.setattr(training, "Run", None)
    assert train(config(), tmp_path / "run", False) == first


def test_stop_at_loss(tmp_path):
    result = train(config(stop_at_loss=1.5, epochs=50, srr_reg=0.0, dropout=0.0), tmp_path / "stop", False)
    assert result["reached_target"] is True and result["train_loss"] < 1.5 and result["epochs"] < 50
    result = train(config(stop_at_loss=1e-6, epochs=2), tmp_path / "miss", False)
    assert result["reached_target"] is False and result["epochs"] == 2


@pytest.mark.parametrize("before, checks", [(1.0, 1), (0.04, 2), (0.02, 4), (0.012, 8)])
def test_stopping_criterion_is_checked_more_often_near_the_target(tmp_path, monkeypatch, before, checks):
    run = Run(config(batch_size=10, stop_at_loss=1e-9), tmp_path)  # 25 steps an epoch
    run.start()
    run.train_loss = before
    evaluated = []
    monkeypatch.setattr(Run, "training_loss", lambda self, enough: evaluated.append((run.step, enough)) or before)
    run.train_epoch(training.tqdm(disable=True))
    assert [step for step, _ in evaluated] == [math.ceil(25 * (i + 1) / checks) for i in range(checks)]
    assert [enough for _, enough in evaluated] == [1e-9] * (checks - 1) + [0.05]


def test_evaluation_and_the_training_loss_agree(tmp_path):
    run = Run(config(dropout=0.5), tmp_path)
    images, labels = run.data.train_images, run.data.train_labels
    loss, accuracy = training.evaluate(run.model, run.data, images, labels, chunk=100)
    with torch.no_grad():
        logits = run.model.eval()(images).double()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert loss == pytest.approx(losses.mean().item())
    assert accuracy == (logits.argmax(1) == labels).double().mean()
    for chunk in (10, 1000):
        run = Run(config(dropout=0.5), tmp_path)
        for enough in (math.inf, 1.001 * loss):
            assert run.training_loss(enough, chunk) == pytest.approx(loss)
    assert losses[run.hardest_first].diff().max() < 1e-5  # hardest first
    seen = []
    run.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    bound = run.training_loss(loss / 2, 10)
    assert loss / 2 <= bound < 0.7 * loss and sum(seen) < 0.5 * len(labels)
    assert sorted(run.hardest_first.tolist()) == list(range(len(labels)))


def test_non_finite_loss_names_epoch_and_step_and_keeps_the_last_epoch(tmp_path, monkeypatch):
    real = Run.train_step

    def poisoned(self, images, *rest):
        return real(self, images * math.nan if self.step == 4 else images, *rest)

    monkeypatch.setattr(Run, "train_step", poisoned)
    with pytest.raises(InputError, match=r"epoch 2, step 5: the loss is nan"):
        train(config(srr_reg=0.0), tmp_path / "ce", False)
    assert load_checkpoint(tmp_path / "ce" / "last.pt")["epoch"] == 1
    with pytest.raises(InputError, match=r"epoch 2, step 5: layer \d: I \+ c Z\^T Z is not positive definite"):
        train(config(), tmp_path / "srr", False)


def test_weights_that_diverge_at_the_last_step_are_not_saved(tmp_path, monkeypatch):
    real = Run.train_step

    def poisoned(self, images, *rest):
        losses = real(self, images, *rest)
        if self.step == 6:  # the losses of the epoch are finite, what comes after isn't
            self.model.cls_token.data.fill_(math.nan)
        return losses

    monkeypatch.setattr(Run, "train_step", poisoned)
    with pytest.raises(InputError, match=r"epoch 2, step 6: the validation loss is nan"):
        train(config(), tmp_path, False)
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_trains(tmp_path, amp):
    result = train(config(amp=amp, epochs=10, dropout=0.0), tmp_path / "run", False)
    assert result["train_loss"] < log(tmp_path / "run")[0]["val_loss"] - 0.3
    scaler = load_checkpoint(tmp_path / "run" / "last.pt")["scaler"]
    assert ("scale" in scaler) == (amp == "fp16")


def test_srr_in_the_loss_lowers_srr(tmp_path):
    srr = {}
    for eta in (0.0, 0.1):
        train(config(srr_reg=eta, srr_layer="all", epochs=15, log_srr_every=15), tmp_path / str(eta), False)
        srr[eta] = np.mean([layer["srr"] for layer in log(tmp_path / str(eta))[-1]["srr"]])
    assert srr[0.1] < srr[0.0]


def test_amp_without_support(monkeypatch):
    assert resolve_amp("auto", torch.device("cpu")) == "off"

    def refuse(*_):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)
    with pytest.raises(InputError, match="--amp fp16: cpu has no support"):
        resolve_amp("fp16", torch.device("cpu"))


def test_nothing_in_an_epoch_waits_for_the_device(tmp_path, monkeypatch):
    run = Run(config(batch_size=10), tmp_path)
    run.start()
    counts = {"item": 0, "cpu": 0, "tolist": 0, "__bool__": 0, "__float__": 0, "nonzero": 0}
    for name in counts:
        real = getattr(torch.Tensor, name)

        def counted(self, *a, _name=name, _real=real, **k):
            counts[_name] += 1
            return _real(self, *a, **k)

        monkeypatch.setattr(torch.Tensor, name, counted)
    run.train_epoch(training.tqdm(disable=True))
    assert run.step == 25
    assert counts.pop("__bool__") <= 1 + 2 * 25  # the loss of the epoch; on CPU alone, each Cholesky factor's success
    assert sum(counts.values()) < 12, counts  # per epoch, not per step


def test_grid_shards_and_skipping(script, tmp_path):
    grid = ("--model", "crate-c", "crate", "--seed", 0, 1, "--srr-reg", 0, 0.1, *SMALL)
    for shard in ("1/2", "2/2", "2/2"):
        assert script("train", *grid, "--out", tmp_path / "shards", "--shard", shard)[0] == 0
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert len(names) == 8 and "crate_d12_L2_b100_lr0.002_p0_eta0.1_last_s1" in names
    code, out, _ = script("train", *grid, "--out", tmp_path / "shards")
    assert code == 0 and "8 runs" in out and "8 finished" in out
    assert script("train", *grid, "--out", tmp_path / "jobs", "--jobs", 2)[0] == 0
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == names
    for name in names:
        assert log(tmp_path / "jobs" / name) == log(tmp_path / "shards" / name)


def test_workers_end_with_a_killed_parent(tmp_path):
    flags = (*SMALL, "--epochs", 100_000, "--seed", 0, 1, "--jobs", 2, "--out", tmp_path)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parent = subprocess.Popen([sys.executable, "train.py", *map(str, flags)], cwd=Path(training.__file__).parents[1], **quiet)
    try:
        wait_until(lambda: len(list(tmp_path.glob("*/last.pt"))) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(lock_holder, tmp_path.iterdir())))


def test_config_holds_every_flag(script, tmp_path):
    assert script("train", *SMALL, "--out", tmp_path)[0] == 0
    (folder,) = tmp_path.iterdir()
    stored = json.loads((folder / "config.json").read_text())
    assert stored.keys() >= DEFAULTS.keys() | {"preset", "parameters", "versions", "commit", "channels", "classes"}
    assert stored["preset"] == "laptop" and stored["width"] == 12 and stored["dataset"] == "digits"


def test_every_run_of_a_grid_has_a_name_of_its_own():
    base = DEFAULTS | {"srr_reg": 0.1}
    changes = dict(model="vit", width=12, depth=3, batch_size=7, lr=0.5, dropout=0.2, weight_decay=0.1)
    changes |= dict(srr_reg=0.2, srr_layer="all", srr_sparsity="l1", seed=5, hold_out=0.3, stop_at_loss=0.1)
    names = [run_name(base)] + [run_name(base | {key: value}) for key, value in changes.items()]
    assert len(set(names)) == 1 + len(changes)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--hold-out", 1), ("--hold-out",)),
        (("--hold-out", 0.001), ("--hold-out 0.001", "leaves 0 of 250")),
        (("--weight-decay", -1), ("--weight-decay",)),
        (("--temperature", "two"), ("--temperature", "sqrt-p")),
        (("--ista-beta", 0), ("--ista-beta",)),
        (("--srr-gamma", "inf"), ("--srr-gamma",)),
        (("--dataset", "mnist"), ("--dataset", "digits")),
        (("--model", "resnet"), ("--model", "crate-c")),
        (("--width", 97), ("--width 97", "--heads 3")),
        (("--patch-size", 3), ("--image-size 8", "--patch-size 3")),
        (("--width", 3 * 10**10), ("crate-c_d30000000000", "smaller sizes")),
        (("--epochs", 10**400), ("--epochs", "out of range")),
        (("--srr-layer", 13), ("--srr-layer 13", "1 to 2")),
        (("--srr-layer", "first"), ("--srr-layer first", "last")),
        (("--srr-reg", -1), ("--srr-reg",)),
        (("--lr", "nan"), ("--lr",)),
        (("--lr", 0), ("--lr",)),
        (("--dropout", 1), ("--dropout",)),
        (("--batch-size", 2.5), ("--batch-size",)),
        (("--shard", "3/2"), ("--shard 3/2",)),
        (("--shard", "x"), ("--shard x",)),
        (("--device", "warp"), ("--device warp", "cpu")),
        (("--train-subset", 5000), ("--train-subset", "1437")),
        (("--out", "/proc/nowhere"), ("--out /proc/nowhere",)),
        (("--dataset", "cifar10", "--data-dir", "/proc/nowhere", "--train-subset", 10), ("/proc/nowhere", "--dataset digits")),
    ],
)
def test_bad_flags(script, tmp_path, flags, words):
    out = () if "--out" in flags else ("--out", tmp_path)
    assert_refused(script("train", *SMALL, *out, *flags), *words)


def test_other_flags_than_the_folder_was_made_with(script, tmp_path):
    assert script("train", *SMALL, "--out", tmp_path)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert_refused(script("train", *SMALL, "--out", tmp_path, "--epochs", 9), "config.json", "--epochs", "--out")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("content", [b"", b"PK\3\4 nonsense", "half", "other model"])
def test_broken_checkpoint(script, tmp_path, content):
    assert script("train", *SMALL, "--out", tmp_path)[0] == 0
    (folder,) = tmp_path.iterdir()
    (folder / "result.json").unlink()
    last = folder / "last.pt"
    if content == "half":
        content = last.read_bytes()[: last.stat().st_size // 2]
    if content == "other model":
        assert script("train", *SMALL, "--out", tmp_path, "--model", "crate")[0] == 0
        content = next(tmp_path.glob("crate_*/last.pt")).read_bytes()
    last.write_bytes(content)
    assert_refused(script("train", *SMALL, "--out", tmp_path), "last.pt")
    assert last.read_bytes() == content


def test_one_failing_run_does_not_stop_the_others(script, tmp_path):
    assert script("train", *SMALL, "--out", tmp_path, "--seed", 0, 1, 2)[0] == 0
    for path in tmp_path.glob("*_s[012]/result.json"):
        path.unlink()
    next(tmp_path.glob("*_s1/last.pt")).write_bytes(b"")
    for jobs in (1, 2):
        code, out, error = script("train", *SMALL, "--out", tmp_path, "--seed", 0, 1, 2, "--jobs", jobs)
        assert code == 2 and "_s1/last.pt" in out + error
        assert len(list(tmp_path.glob("*/result.json"))) == 2


def test_an_unexpected_error_in_one_run_does_not_stop_the_others(script, tmp_path, monkeypatch):
    real = Run.finish

    def fail_once(self):
        if self.config["seed"] == 1:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return real(self)

    monkeypatch.setattr(Run, "finish", fail_once)
    code, _, error = script("train", *SMALL, "--out", tmp_path, "--seed", 0, 1, 2)
    assert code == 2 and "_s1: CUDA error: out of memory more" in error and "Traceback" not in error
    assert len(list(tmp_path.glob("*/result.json"))) == 2


def test_a_run_without_srr_is_the_same_run_whatever_its_srr_flags(script, tmp_path):
    assert script("train", *SMALL, "--out", tmp_path)[0] == 0
    code, out, _ = script("train", *SMALL, "--out", tmp_path, "--srr-reg", 0, 0.1, "--srr-layer", 1, 2, "--srr-sparsity", "l1")
    assert code == 0 and "3 runs" in out and "1 finished" in out


def test_weight_decay_is_decoupled_and_on_matrices_alone(tmp_path, monkeypatch):
    run = Run(config(weight_decay=0.5, lr=0.1, schedule="constant", srr_reg=0.0), tmp_path)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    monkeypatch.setattr(training.F, "cross_entropy", lambda logits, labels: 0.0 * logits.sum())
    run.train_step(run.data.train_images[:8], run.data.train_labels[:8], [])
    for name, p in run.model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if p.ndim == 2 else 1.0), atol=1e-7), name


def test_lambda_and_gamma_of_srr(tmp_path):
    """With both coefficients chosen, the logged measure and the loss's are lambda l0 + R^c - R at that gamma."""
    settings = config(epochs=1, srr_layer="last", dropout=0.0, log_srr_every=1)
    train(settings, tmp_path / "a", False)
    train(settings | {"srr_lambda": 0.5, "srr_gamma": 0.01}, tmp_path / "b", False)
    a, b = log(tmp_path / "a"), log(tmp_path / "b")
    for layer, other in zip(a[0]["srr"], b[0]["srr"], strict=True):  # the same model, at initialisation
        assert layer["l0"] == other["l0"] and layer["rate"] > 2 * other["rate"] > 0
        assert other["srr"] == pytest.approx(0.5 * other["l0"] + other["rate_subspaces"] - other["rate"])
    assert b[1]["train_srr"] == pytest.approx(b[1]["srr"][-1]["srr"], rel=0.2)  # the mean over the epoch, and at its end


@pytest.mark.slow
@pytest.mark.parametrize("srr_reg, dropout", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1)])
def test_compile(tmp_path, srr_reg, dropout):
    if not shutil.which("g++"):
        pytest.skip("torch.compile on CPU needs g++")
    settings = config(dropout=dropout, srr_reg=srr_reg, srr_layer="all")
    plain = train(settings, tmp_path / "plain", False)
    compiled = train(settings | {"compile": True}, tmp_path / "compiled", False)
    if dropout:  # the masks are others
        assert math.isfinite(compiled["train_loss"])
        return
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
