"""The SRR measure of every layer (Eqs. 1, 11) and the regulariser with its stop-gradient (Eq. 14)."""

import math
from contextlib import contextmanager

import torch

from crate.rates import coding_rate, full, subspace_coding_rate


def _rates(model, tokens, layer, gamma, matrix="U"):
    """R^c and R of the output (B, N, d) of `layer` (0-based), per image: (B,), (B,)."""
    try:
        U = getattr(model.layers[layer].mssa, matrix).weight.mT
        compressed = subspace_coding_rate(tokens, U, model.heads, gamma)
        return compressed, coding_rate(tokens, model.heads * gamma)  # one eps for both rates: R's coefficient is K gamma
    except ValueError as error:
        raise ValueError(f"layer {layer + 1}: {error}")


def _sums(model, tokens, layer, gamma, matrix="U"):
    """Non-zeros, R^c and R of the tokens of `layer`, summed over the images: (3,) float64."""
    compressed, rate = _rates(model, tokens, layer, gamma, matrix)
    return torch.stack([(tokens != 0).sum().double(), compressed.double().sum(), rate.double().sum()])


def _parts(sums, images, layer, sparsity):
    """The measure and its parts from `_sums`, averaged over `images` images."""
    l0, compressed, rate = (sums / images).tolist()
    if not math.isfinite(compressed + rate):  # on CUDA, where a rate is NaN rather than an error
        raise ValueError(f"layer {layer + 1}: the rates are not finite: the tokens are not finite or far too large")
    return {"l0": l0, "rate_subspaces": compressed, "rate": rate, "srr": sparsity * l0 + compressed - rate}


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


def layer_srr(model, images, sparsity=0.1, gamma=1.0, chunk=256, matrix="U"):
    """The SRR measure of every layer's output on images (B, C, H, W), averaged over them, in eval mode.

    `matrix` names the subspaces: "U", in vit the query matrix, or vit's "key" or "value".
    Returns a list over the L layers of {"l0": non-zeros per image, "rate_subspaces": R^c, "rate": R,
    "srr": sparsity * l0 + R^c - R} (the rates in nats). Raises ValueError naming the layer whose tokens are not finite.
    """
    sums = [0.0] * len(model.layers)
    with evaluating(model):
        for part in images.split(chunk):
            for layer, tokens in enumerate(model.layer_outputs(part)):
                sums[layer] += _sums(model, tokens, layer, gamma, matrix)
    return [_parts(total, len(images), layer, sparsity) for layer, total in enumerate(sums)]


def operator_rates(model, images, sparsity=0.1, gamma=1.0, chunk=256):
    """The same parts around the operators of every layer l, all with its U^l: which operator lowers what?

    Returns a list over the layers of {"input": Z^{l-1}, "compressed": Z^{l-1} with MSSA's step, "normalised": LayerNorm of
    that (missing in vit), "output": Z^l after ISTA}, each a dict as layer_srr gives it. Raises ValueError as layer_srr does.
    """
    sums = [{} for _ in model.layers]
    with evaluating(model):
        for part in images.split(chunk):
            tokens = model.embed(part)
            for index, layer in enumerate(model.layers):
                compressed = layer.compress(tokens)
                points = {"input": tokens, "compressed": compressed}
                if layer.ista:
                    points["normalised"] = layer.norm2(compressed)
                points["output"] = tokens = layer.sparsify(compressed)
                for point, value in points.items():
                    sums[index][point] = sums[index].get(point, 0.0) + _sums(model, value, index, gamma)
    return [
        {point: _parts(total, len(images), layer, sparsity) for point, total in points.items()}
        for layer, points in enumerate(sums)
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
            measure = objective.detach() + sparsity * (tokens != 0).sum().to(rate.dtype) / len(tokens)
        total = total + measure / len(layers)
        parameters = [p for p in model.layers[layer].parameters() if p.requires_grad]
        if not parameters:  # a frozen layer
            continue
        gradients = torch.autograd.grad(objective * (weight / len(layers)), parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return total
