"""The paper preset's code paths at the full model size, a few steps each on a CPU: python -m pytest -m slow -k paper."""

import numpy as np
import pytest
from PIL import Image

from crate.runs import load_run, read_log


@pytest.mark.slow
@pytest.mark.parametrize("model", ["crate-c", "crate-e"])
def test_paper_preset(script, tmp_path, model):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 10, 32, 32, 3), dtype=np.uint8)
    for part, pictures in zip(("train", "test"), pixels):
        for label, picture in enumerate(pictures):
            folder = tmp_path / "cifar10" / part / str(label)
            folder.mkdir(parents=True)
            Image.fromarray(picture).save(folder / "0.png")
    run = ("train", "--preset", "paper", "--data-dir", tmp_path, "--amp", "bf16", "--batch-size", 4, "--log-srr-every", 1)
    run += ("--model", model, "--epochs", 2, "--srr-reg", 1e-3, "--srr-layer", "random", "--out", tmp_path / "runs")
    assert script(*run)[0] == 0
    (folder,) = tmp_path.glob("runs/*")
    config, *_ = load_run(folder)
    settings = dict(width=384, depth=12, heads=6, patch_size=4, augment="basic", schedule="cosine", lr=1e-4)
    assert {key: config[key] for key in settings} == settings
    assert len(read_log(folder)[-1]["srr"]) == 12 and read_log(folder)[-1]["step"] == 6
