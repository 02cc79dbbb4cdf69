"""Sparse Rate Reduction as a function of tokens, of any network's layers (Eqs. 1, 11), and what each operator does to it.

Eq. 14, in any training loop, is then one expression; the tokens that enter the layer are constant:

    loss = cross_entropy + eta * srr(layer(Z_in.detach()), U, heads).mean()
"""

import math
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from crate.rates import coding_rate, norm_ratio, subspace_coding_rate


class Parts(NamedTuple):
    """The three parts of SRR, each (B,): non-zeros, R^c and R (in nats)."""

    l0: torch.Tensor
    rate_subspaces: torch.Tensor
    rate: torch.Tensor


def parts(tokens, U, heads, gamma=1.0):
    """||Z||_0, R^c(Z; U) and R(Z) (Eq. 1) of tokens (B, N, d), per image. One eps for both rates: R's coefficient is K gamma.

    U: (d, d), its columns [U_1 .. U_K]. gamma = p / (N eps^2) with p = d / K; the paper sets it to 1, whatever N. In float64
    where tokens or U are, else in float32. Raises ValueError where shapes don't fit, or tokens are not finite (NaN instead on
    CUDA).
    """
    if tokens.ndim > 3:
        raise ValueError(f"tokens must be (B, N, d), not {tuple(tokens.shape)}: of (B, H, W, d) take tokens.flatten(1, 2)")
    if U.dtype == torch.float64:
        tokens = tokens.double()
    rate = coding_rate(tokens, heads * gamma)
    return Parts((tokens != 0).sum((-2, -1)).to(rate.dtype), subspace_coding_rate(tokens, U, heads, gamma), rate)


def srr(tokens, U, heads, *, sparsity=0.1, gamma=1.0, norm="l0"):
    """The SRR measure of tokens (B, N, d), per image: (B,), lower is better (Eq. 1, negated).

    sparsity ||Z|| + R^c(Z; U) - R(Z), `sparsity` being lambda; gamma: see `parts`. norm "l0" counts non-zeros, which has no
    gradient; "l1" is its convex surrogate. Differentiable in tokens and U (d, d). Raises ValueError as `parts` does.
    """
    if norm not in ("l0", "l1"):
        raise ValueError(f"norm {norm!r} is unknown; choose l0 or l1")
    l0, rate_subspaces, rate = parts(tokens, U, heads, gamma)
    size = l0 if norm == "l0" else tokens.abs().sum((-2, -1), dtype=rate.dtype)
    return sparsity * size + rate_subspaces - rate


@contextmanager
def record(layers):
    """What enters and leaves each of `layers`, a list of modules, in the next forward pass of the network that owns them.

        with record(layers) as (inputs, outputs):
            network(images)

    fills both lists, one tensor a layer, in the order of `layers`: copies, so that they are what was there at that moment,
    whoever writes in place, with their graph. Of a layer that takes or returns several things the first counts, or what is
    called last_hidden_state. The hooks are gone after the block, also after an error.
    Raises ValueError where a layer occurs or is called twice, and, after the block, where one has no tensor: it says why.
    """
    layers = list(layers) if hasattr(layers, "__iter__") else [None]
    if not all(isinstance(layer, nn.Module) for layer in layers):
        raise ValueError("record takes a list of modules: record([module])")
    names = [f"layers[{place}] ({type(layer).__name__})" for place, layer in enumerate(layers)]
    inputs, outputs, handles, called, wrong = [None] * len(layers), [None] * len(layers), [], set(), []

    def keep(tensors, place, value, verb):
        value = getattr(value, "last_hidden_state", value)
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if isinstance(value, torch.Tensor) and not value.is_nested:
            tensors[place] = value.clone()
        else:
            kind = "nested tensor" if isinstance(value, torch.Tensor) else type(value).__name__
            wrong.append(f"{names[place]} {verb} a {kind}")

    def enter(place, module, arguments, keywords):
        if module in called:
            raise ValueError(f"record: {names[place]} is called twice in the block, or listed twice: which one is meant?")
        called.add(module)
        keep(inputs, place, (*arguments, *keywords.values()), "takes")

    def leave(place, module, arguments, result):
        keep(outputs, place, result, "returns")

    try:
        for place, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(partial(enter, place), with_kwargs=True))
            handles.append(layer.register_forward_hook(partial(leave, place)))
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()
    wrong += [f"{name} wasn't called" for name, layer in zip(names, layers) if layer not in called]
    if wrong:
        raise ValueError(f"record found no tensor: {', '.join(wrong)}. {ADVICE}")


ADVICE = (
    "A network that was compiled before doesn't see new hooks: run the original. nn.TransformerEncoder passes nested tensors "
    "where there is a padding mask: torch.backends.mha.set_fastpath_enabled(False)."
)


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


@contextmanager
def _naming(layer):
    """A ValueError of the coding rates names the layer (0-based here)."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer + 1}: {error}")


def _means(sums, images, layer, sparsity):
    """The measure and its parts, a dict of floats, from the sums of `parts` over that many images."""
    l0, rate_subspaces, rate = (sums / images).tolist()
    if not math.isfinite(rate_subspaces + rate):  # on CUDA, where a rate is NaN rather than an error
        raise ValueError(f"layer {layer + 1}: the rates are not finite: the tokens are not finite")
    return {"l0": l0, "rate_subspaces": rate_subspaces, "rate": rate, "srr": sparsity * l0 + rate_subspaces - rate}


def layer_srr(model, images, sparsity=0.1, gamma=1.0, chunk=256):
    """The SRR measure of every layer's output on images (B, C, H, W), averaged over them, in eval mode (Eq. 11).

    model: of crate.model; in vit U is the query matrix.
    Returns a list over the L layers of {"l0": non-zeros per image, "rate_subspaces": R^c, "rate": R,
    "srr": sparsity * l0 + R^c - R}, rates in nats. Raises ValueError naming the layer whose tokens are not finite.
    """
    sums = [0.0] * len(model.layers)
    with evaluating(model):
        for some in images.split(chunk):
            for l, tokens in enumerate(model.layer_outputs(some)):
                U = model.layers[l].mssa.U.weight.mT
                with _naming(l):
                    sums[l] += torch.stack(parts(tokens, U, model.heads, gamma)).double().sum(1)
    return [_means(total, len(images), l, sparsity) for l, total in enumerate(sums)]


def operator_rates(model, images, sparsity=0.1, gamma=1.0, chunk=256):
    """The same parts around the operators of every layer l, all with its U^l: which operator lowers what?

    Returns a list over the layers of {"input": Z^{l-1}, "compressed": Z^{l-1} with MSSA's step, "normalised": LayerNorm of
    that (missing in vit), "output": Z^l after ISTA}, each a dict as layer_srr gives it. All but the input have
    "rate_subspaces_equal_norm" besides: R^c once the tokens are scaled back to the norm that they had before the operator.
    Raises ValueError as layer_srr does.
    """
    sums = [{} for _ in model.layers]
    with evaluating(model):
        for some in images.split(chunk):
            tokens = model.embed(some)
            for l, layer in enumerate(model.layers):
                compressed = layer.compress(tokens)
                points = {"input": tokens, "compressed": compressed}
                if layer.ista:
                    points["normalised"] = layer.norm2(compressed)
                points["output"] = layer.sparsify(compressed)
                before = tokens
                for point, after in points.items():
                    U, rescaled = layer.mssa.U.weight.mT, norm_ratio(before, after) * after
                    with _naming(l):
                        rates = *parts(after, U, model.heads, gamma), subspace_coding_rate(rescaled, U, model.heads, gamma)
                    sums[l][point] = sums[l].get(point, 0.0) + torch.stack(rates).double().sum(1)
                    before = after
                tokens = points["output"]
    means = [{} for _ in model.layers]
    for l, of_points in enumerate(sums):
        for point, total in of_points.items():
            means[l][point] = _means(total[:3], len(images), l, sparsity)
            if point != "input":
                means[l][point]["rate_subspaces_equal_norm"] = total[3].item() / len(images)
    return means
