"""What a run will take, before it is started: steps, floating-point operations, and hours on an H100, an estimate.

The constants are assumptions (README, "GPU"); none was measured.
"""

import functools
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from crate.config import EXAMPLES
from crate.model import build_model
from crate.srr import add_srr_gradients
from crate.training import srr_layers

FLOP_PER_SECOND = {"bf16": 400e12, "fp16": 400e12, "off": 40e12}
BYTES_PER_SECOND, LAUNCH = 2.5e12, 5e-6  # of memory; seconds that starting a kernel takes
KERNELS, PASSES = 67, 30  # of a training step, per layer: kernels, and how often its tokens are read or written
AUGMENTATION = 0.5e-3 / 8  # seconds an image, with eight workers


@functools.cache
def _counted(regularised, batch, name, **sizes):
    """Floating-point operations of one training step, counted by running it on the CPU. regularised: "last", "all" or None."""
    model = build_model(name, **sizes).train()
    images = torch.zeros(batch, sizes["channels"], sizes["image_size"], sizes["image_size"])
    with FlopCounterMode(display=False) as counter:
        if regularised:
            logits, outputs = model.forward_with_outputs(images)
            add_srr_gradients(model, outputs, srr_layers(regularised, sizes["depth"], 1)[0], 1.0)
        else:
            logits = model(images)
        logits.sum().backward()
    return counter.get_total_flops()


def step_flop(config):
    """Floating-point operations of a training step, linear in the batch and in the depth: out of counts of 1 and 2 each."""
    sizes = {key: config[key] for key in ("image_size", "patch_size", "channels", "classes", "width", "heads")}
    regularised = ("all" if config["srr_layer"] == "all" else "last") if config["srr_reg"] else None

    def of_depth(depth):
        one, two = (_counted(regularised, images, config["model"], depth=depth, **sizes) for images in (1, 2))
        return one + (config["batch_size"] - 1) * (two - one)  # ISTA's matrix is made once a step, all else once an image

    return of_depth(1) + (config["depth"] - 1) * (of_depth(2) - of_depth(1))


def estimate(config):
    """{"steps", "flop" of all of them, "hours" on an H100} of a run's config. With a stopping criterion, at most that.

    The hours hold validation in float32 after every epoch and, with a stopping criterion, the pass over the training set.
    """
    batch, (examples, validated) = config["batch_size"], EXAMPLES[config["dataset"]]
    examples = config["train_subset"] or examples
    if config["hold_out"]:
        validated = round(config["hold_out"] * examples)
        examples -= validated
    steps = math.ceil(examples / batch)  # of an epoch
    flop = step_flop(config)
    tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1

    def memory(passes, images, width):
        return config["depth"] * passes * images * tokens * config["width"] * width / BYTES_PER_SECOND

    width = 4 if config["amp"] == "off" else 2
    seconds = max(flop / FLOP_PER_SECOND[config["amp"]] + memory(PASSES, batch, width), config["depth"] * KERNELS * LAUNCH)
    if config["augment"] == "basic":
        seconds = max(seconds, batch * AUGMENTATION)
    seen = validated + examples * (config["stop_at_loss"] is not None)  # forward alone: a third of the work
    evaluation = seen * flop / batch / 3 / FLOP_PER_SECOND["off"] + memory(PASSES / 3, seen, 4)
    epochs = config["epochs"]
    return {"steps": epochs * steps, "flop": epochs * steps * flop, "hours": epochs * (steps * seconds + evaluation) / 3600}
