"""The paper preset's code paths at the full model size, a few steps each on a CPU: python -m pytest -m slow -k paper."""

import numpy as np
import pytest
from PIL import Image

from crate.runs import load_run, read_log

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "flags, settings",
    [
        (("--srr-reg", 1e-3, "--srr-layer", "random"), dict(model="crate-c", augment="basic", schedule="cosine", lr=1e-4)),
        (("--model", "crate-e", "--augment", "none", "--stop-at-loss", 0.01), dict(model="crate-e", augment="none")),
    ],
)
def test_paper_preset(script, tmp_path, flags, settings):
    pixels, out = np.random.default_rng(0).integers(0, 256, (2, 10, 32, 32, 3), dtype=np.uint8), tmp_path / "runs"
    for part, pictures in zip(("train", "test"), pixels):
        for label, picture in enumerate(pictures):
            folder = tmp_path / "cifar10" / part / str(label)
            folder.mkdir(parents=True)
            Image.fromarray(picture).save(folder / "0.png")
    run = ("train", "--preset", "paper", "--data-dir", tmp_path, "--amp", "bf16", "--batch-size", 4, "--log-srr-every", 1)
    run += ("--epochs", 2, *flags, "--out", out)
    assert script(*run)[0] == 0
    (folder,) = (path.parent for path in out.glob("*/result.json"))
    rows = read_log(folder)
    assert len(rows) == 3 and len(rows[-1]["srr"]) == 12 and rows[-1]["step"] == 6
    (folder / "result.json").unlink()
    assert script(*run)[0] == 0 and read_log(folder) == rows  # resumed after its last epoch
    config, *_ = load_run(folder)
    settings = dict(dataset="cifar10", width=384, depth=12, heads=6, patch_size=4, **settings)
    assert {key: config[key] for key in settings} == settings
