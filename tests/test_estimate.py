"""What --dry-run says of a run, against counts by hand."""

import pytest

from crate import estimate
from crate.config import DATASETS, DEFAULTS, PRESETS


def config(**changes):
    sizes = dict(zip(("image_size", "channels", "classes"), DATASETS["cifar10"]))
    return DEFAULTS | PRESETS["paper"] | sizes | {"amp": "bf16"} | changes


def test_steps():
    assert estimate.estimate(config())["steps"] == 200 * 391
    assert estimate.estimate(config(train_subset=100, hold_out=0.2, batch_size=32, epochs=3))["steps"] == 3 * 3


@pytest.mark.parametrize("depth, width", [(3, 48), (12, 384)])
def test_operations_of_a_step(depth, width):
    """Three times the forward pass' products, of which the last layer makes the CLS token alone; attention's backward is 2.5
    times its forward, by its own kernel 2 times."""
    N, batch, patch = 65, 128, 48
    d = width
    one_token, attention = 3 * 2 * d * d, 4 * N * d  # U, U again, M; V_k^T V_k and what it weighs
    full, cls = N * (one_token + attention), 2 * N * d * d + 2 * 2 * d * d + attention
    forward = batch * ((depth - 1) * full + cls + 2 * (N - 1) * patch * d + 2 * 10 * d)
    assert estimate.step_flop(config(depth=depth, width=width)) == pytest.approx(3 * forward, rel=0.15)


def test_what_is_more_takes_more():
    plain = estimate.step_flop(config(depth=4, width=96))
    last = estimate.step_flop(config(depth=4, width=96, srr_reg=0.1))
    everywhere = estimate.step_flop(config(depth=4, width=96, srr_reg=0.1, srr_layer="all"))
    assert plain < last < everywhere
    assert estimate.step_flop(config(depth=4, width=96, srr_reg=0.1, srr_layer="2")) == last
    hours = [estimate.estimate(config(**changes))["hours"] for changes in ({"augment": "none"}, {}, {"amp": "off"})]
    assert hours[0] < hours[1] <= hours[2]
