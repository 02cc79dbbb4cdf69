"""The paper preset's code paths at the full model size, a few steps each on a CPU: python -m pytest -m slow -k paper."""

import pytest

from crate.runs import load_run, read_log
from tests.test_data import write_classes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["crate-c", "crate-e"])
def test_paper_preset(script, tmp_path, model):
    write_classes(tmp_path / "cifar10", "abcdefghij", size=(32, 32))
    run = ("train", "--preset", "paper", "--data-dir", tmp_path, "--amp", "bf16", "--batch-size", 10, "--log-srr-every", 1)
    run += ("--model", model, "--epochs", 2, "--srr-reg", 1e-3, "--srr-layer", "random", "--out", tmp_path / "runs")
    assert script(*run)[0] == 0
    (folder,) = tmp_path.glob("runs/*")
    config, *_ = load_run(folder)
    settings = dict(width=384, depth=12, heads=6, patch_size=4, augment="basic", schedule="cosine", lr=1e-4)
    assert {key: config[key] for key in settings} == settings
    assert len(read_log(folder)[-1]["srr"]) == 12 and read_log(folder)[-1]["step"] == 6
