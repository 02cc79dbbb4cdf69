"""The SRR measure of every layer (Eqs. 1, 11) and the regulariser with its stop-gradient (Eq. 14)."""

import math
from contextlib import contextmanager

import torch

from crate.rates import coding_rate, full, subspace_coding_rate


def _rates(model, tokens, layer, gamma):
    """R^c and R of the output (B, N, d) of `layer` (0-based), per image: (B,), (B,)."""
    try:
        compressed = subspace_coding_rate(tokens, model.layers[layer].mssa.U.weight.mT, model.heads, gamma)
        return compressed, coding_rate(tokens, model.heads * gamma)  # one eps for both rates: R's coefficient is K gamma
    except ValueError as error:
        raise ValueError(f"layer {layer + 1}: {error}")


@contextmanager
def evaluating(model):
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def layer_srr(model, images, sparsity=0.1, gamma=1.0, chunk=256):
    """The SRR measure of every layer's output on images (B, C, H, W), averaged over them, in eval mode.

    Returns a list over the L layers of {"l0": non-zeros per image, "rate_subspaces": R^c, "rate": R,
    "srr": sparsity * l0 + R^c - R} (the rates in nats). Raises ValueError naming the layer whose tokens are not finite.
    """
    sums = torch.zeros(len(model.layers), 3, dtype=torch.float64, device=images.device)
    with evaluating(model):
        for part in images.split(chunk):
            for layer, tokens in enumerate(model.layer_outputs(part)):
                compressed, rate = _rates(model, tokens, layer, gamma)
                parts = tokens.count_nonzero().double(), compressed.double().sum(), rate.double().sum()
                sums[layer] += torch.stack(parts)
    means = (sums / len(images)).tolist()
    for layer, parts in enumerate(means, start=1):
        if not all(map(math.isfinite, parts)):  # on CUDA, where a rate is NaN rather than an error
            raise ValueError(f"layer {layer}: the rates are not finite: the tokens are not finite or far too large")
    return [
        {"l0": l0, "rate_subspaces": compressed, "rate": rate, "srr": sparsity * l0 + compressed - rate}
        for l0, compressed, rate in means
    ]


def add_srr_gradients(model, outputs, layers, weight, sparsity=0.1, gamma=1.0, norm="l0"):
    """Add `weight` times the gradient of the mean SRR measure of `layers` (0-based) to `.grad`, as Eq. 14 wants it.

    The term of layer l reaches layer l's own parameters and nothing else: what enters the layer is constant. Asking
    autograd for just those parameters stops it at the layer's input, so the layer need not run again on detached tokens.
    `outputs` are Z^1..Z^L of the training forward pass, whose graph is kept: call this before `loss.backward()`.
    `weight` is eta, a float or a 0-d tensor (times the scale of a GradScaler, if there is one).
    `norm` "l0" has no gradient, as autograd gives; "l1" is its convex surrogate. Returns the mean measure, detached.
    """
    total = 0.0
    for layer in layers:
        tokens = outputs[layer]
        compressed, rate = _rates(model, tokens, layer, gamma)
        objective = (compressed - rate).mean()
        if norm == "l1":
            objective = objective + sparsity * full(tokens).abs().sum() / len(tokens)
            measure = objective.detach()
        else:
            measure = objective.detach() + sparsity * tokens.count_nonzero().to(rate.dtype) / len(tokens)
        parameters = [p for p in model.layers[layer].parameters() if p.requires_grad]
        gradients = []  # of a frozen layer
        if parameters:
            gradients = torch.autograd.grad(objective * (weight / len(layers)), parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        total = total + measure / len(layers)
    return total
