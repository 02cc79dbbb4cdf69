"""Complexity measures of a trained classifier (Section 5, Tables 1, 5): a model and images in, numbers out.

J-eq. numbers are those of Jiang et al. 2019, "Fantastic Generalization Measures and Where to Find Them". Values mu are raw,
without the sqrt(mu / m) of that paper, which changes no rank. Measuring changes no parameter, mode or random state: perturbed
weights enter by `torch.func.functional_call`, noise comes from a generator of its own. `chunk`, the images of one forward pass,
bounds memory and changes results by rounding alone.
"""

import copy
import functools
import math
from statistics import fmean

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import nn
from torch.func import functional_call

from crate.srr import evaluating, layer_srr

# What can be asked for, and a measure that each group has of every model.
GROUPS = {
    "norms": "l2", "path-norm": "path_norm", "pac-bayes": "pacbayes_flatness", "sharpness": "sharpness_flatness", "srr": "srr",
}  # fmt: skip

DROP = 0.1  # training accuracy that noise and ascent may cost
DROP_RANGE = (0.09, 0.11)  # a drop outside is flagged
PRECISION = 1e-2  # relative, of the scales found; ten directions leave a noise of several per cent
STEEPNESS = 3.0  # typical, of the drop's logit over the scale's logarithm
DIRECTIONS = 10  # of noise, drawn once per model
EPS = 1e-3  # of the magnitude-aware noise and bounds
ASCENT_STEPS = 4  # of sharpness


class Prepared:
    """Images (m, C, H, W) with a tensor's `len` and `split`, whose parts go through `prepare` only as they are read."""

    def __init__(self, images, prepare):
        self.images, self.prepare = images, prepare

    def __len__(self):
        return len(self.images)

    def split(self, chunk):
        return map(self.prepare, self.images.split(chunk))


# Norms, distances and bounds


def counted_weights(model):
    """What the norms count, {name: parameter}: the trainable matrices (patch embedding, U, W, D, head), each once.

    No biases and LayerNorm (vectors), no positions and CLS (three axes), no fixed output matrix (a buffer).
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2}


def perturbed_parameters(model):
    """What noise and ascent move, {name: parameter}: all that is trained but LayerNorm."""
    fixed = {p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and p not in fixed}


def weight_measures(weights, initial, margin, examples, sigma, sigma_mag):
    """The measures that need only weights and these scalars: {name: float}.

    weights: the counted matrices W_1..W_d, a sequence or {name: matrix}; initial: the same matrices at initialisation, W0_i;
    margin: J's gamma, <= 0 makes the measures over it NaN; examples: m; sigma, sigma_mag: the noise scales at which
    training accuracy has dropped by 0.1. None for initial, margin or a scale leaves out the measures that need it.
    In float64 on the CPU, where singular values take less time than on a GPU. Norms are squared before every use, as in the
    code of Dziugaite et al. 2020: fro is ||W_i||_F^2, spec ||W_i||_2^2.
    """

    def matrices(source):
        values = [source[name] for name in weights] if isinstance(source, dict) else source
        return [torch.as_tensor(w).cpu().double() for w in values]

    def squared_fro(matrices):
        return torch.stack([w.square().sum() for w in matrices])

    def squared_spec(matrices):
        return torch.stack([torch.linalg.svdvals(w)[0].square() for w in matrices])

    trained = matrices(weights)
    d, omega = len(trained), sum(w.numel() for w in trained)
    fro, spec = squared_fro(trained), squared_spec(trained)
    measures = {
        "params": omega,  # J-eq. 20
        "l2": fro.sum().sqrt(),
        "param_norm": fro.sum(),  # J-eq. 42
        "log_prod_of_fro": fro.log().sum(),  # J-eq. 37
        "log_sum_of_fro": math.log(d) + fro.log().mean(),  # J-eq. 39: d times the geometric mean
        "log_prod_of_spec": spec.log().sum(),  # J-eq. 32
        "log_sum_of_spec": math.log(d) + spec.log().mean(),  # J-eq. 35
        "sum_of_spec_literal": spec.sum(),  # the sum itself: at equal d "sum" and "prod" rank alike
        "fro_over_spec": (fro / spec).sum(),  # J-eq. 33
    }
    numerators = {"orig": fro}  # of the bounds: ||W_i||_F^2, ||W_i - W0_i||_F^2
    if initial is not None:
        moved = [w - w0 for w, w0 in zip(trained, matrices(initial), strict=True)]
        numerators["init"] = squared_fro(moved)
        measures["l2_dist"] = numerators["init"].sum().sqrt()
        measures["fro_dist"] = numerators["init"].sum()  # J-eq. 40
        measures["dist_spec_init"] = squared_spec(moved).sum()  # J-eq. 41
    if margin is not None:
        margin = margin if margin > 0 else math.nan
        measures["inverse_margin"] = 1 / margin / margin  # J-eq. 22
        for norm in ("fro", "spec"):
            over_margin = measures[f"log_prod_of_{norm}"] - 2 * math.log(margin)
            measures[f"log_prod_of_{norm}_over_margin"] = over_margin  # J-eqs.: fro 36, spec 31
            measures[f"log_sum_of_{norm}_over_margin"] = math.log(d) + over_margin / d  # fro 38, spec 34
        for name, square in numerators.items():  # J-eqs.: orig 30, init 29
            measures[f"log_spec_{name}_main"] = measures["log_prod_of_spec_over_margin"] + (square / spec).sum().log()
    if sigma is not None:
        for name, square in numerators.items():  # J-eqs.: orig 49, init 48
            measures[f"pacbayes_{name}"] = square.sum() / (4 * sigma**2) + math.log(examples / sigma) + 10
        measures["pacbayes_flatness"] = 1 / sigma**2  # J-eq. 53
    if sigma_mag is not None:
        if initial is not None:
            denominators = sum((EPS**2 + sigma_mag**2 * w.square()).log().sum() for w in moved)
            for name, square in numerators.items():  # J-eqs.: orig 57, init 56
                numerator = (EPS**2 + (sigma_mag**2 + 1) * square.sum() / omega).log()
                bound = (omega * numerator - denominators) / 4
                measures[f"pacbayes_mag_{name}"] = bound + math.log(examples / sigma_mag) + 10
        measures["pacbayes_mag_flatness"] = 1 / sigma_mag**2  # J-eq. 61
    return {name: float(mu) for name, mu in measures.items()}


# Logits, accuracy, margin


def logits(model, weights, images, chunk):
    """f(x) of all the images, (m, classes), with `weights` ({name: tensor}) in the place of the model's own."""
    return torch.cat([functional_call(model, weights, (part,)) for part in images.split(chunk)])


def accuracy(model, weights, images, labels, chunk=256):
    """Accuracy of the model with `weights` ({name: tensor}) in the place of its own: a float64 scalar, not waited for."""
    return (logits(model, weights, images, chunk).argmax(1) == labels).double().mean()


def margin(model, images, labels, chunk=256):
    """J's gamma: the k-th smallest of f(x)_y - max_{j != y} f(x)_j over the images, k = floor(m / 10) and at least 1.

    It may be negative.
    """
    with evaluating(model):
        outputs = logits(model, {}, images, chunk).double()
    own = labels[:, None]
    margins = outputs.gather(1, own)[:, 0] - outputs.scatter(1, own, -math.inf).amax(1)
    return margins.kthvalue(max(1, len(labels) // 10)).values.item()


# Path-norm


def without_layernorm(model):
    """A copy of the model in float64 with the identity in the place of every LayerNorm."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = lambda tokens: tokens
    return model


def path_norm(model, image_shape, effective=True):
    """Path-norm (J-eq. 44): the logits of an all-ones image (C, H, W), summed, in float64, with everything squared.

    LayerNorm is the identity, positions and CLS are zero, the softmax stays; squares of biases and of a fixed output matrix
    are included. effective=True squares what multiplies the tokens: the variant's step size, and in ISTA the matrix M, not D:
    ReLU((M * M) z) without threshold. effective=False squares the parameters alone, so that ISTA and CRATE-N keep their minus
    signs, and it may be zero or negative.
    """
    squared = without_layernorm(model)
    with evaluating(squared):
        if effective:
            for layer in squared.layers:
                layer.step = layer.step**2
                if layer.ista:
                    step = layer.ista.matrix().square()
                    layer.ista.forward = lambda tokens, step=step: F.relu(F.linear(tokens, step))
        for tensor in (*squared.parameters(), *squared.buffers()):
            tensor.square_()
        squared.cls_token.zero_()
        squared.pos_embedding.zero_()
        return squared(squared.cls_token.new_ones(1, *image_shape)).sum().item()


# Scales of noise and of ascent. On CUDA a search waits for the device once per drop.


def _logit(p):
    p = min(max(p, 1e-3), 1 - 1e-3)
    return math.log(p / (1 - p))


def find_scale(drop, guess, low=1e-4, high=1.0):
    """The scale between `low` and `high` at which drop(scale), a loss of accuracy, crosses 0.1, and the drop there: two floats.

    Brent's method on the logarithm of the scale and the logit of the drop, where a typical drop is a straight line, narrows the
    bracket to PRECISION in half the steps of a bisection; nothing ends it early but a drop of exactly 0.1. The ends are not
    evaluated but lie on a line of typical slope through `guess`, where the search thus starts: where nothing crosses between,
    an end is returned, and the drop there tells.
    """
    ends = math.log(low), math.log(high)

    @functools.cache
    def drop_at(x):
        return round(drop(math.exp(x)), 9)  # so that 1 - 0.9 is DROP

    def height(x):
        if x in ends:
            return STEEPNESS * (x - math.log(guess))
        return _logit(drop_at(x)) - _logit(DROP)

    x = brentq(height, *ends, xtol=PRECISION)
    return math.exp(x), drop_at(x)


def noise_scale(model, images, labels, magnitude_aware=False, chunk=256):
    """The noise scale at which mean training accuracy has dropped by 0.1, and the drop there: two floats.

    sigma: the standard deviation of noise on `perturbed_parameters`; with `magnitude_aware` sigma', where weight w_i gets
    noise of standard deviation sqrt(sigma'^2 w_i^2 + eps^2). The mean is over ten directions, drawn from a fixed seed on the
    CPU and shared by all scales, so that it is one function of sigma. Searched by find_scale.
    """
    weights = perturbed_parameters(model)
    generator = torch.Generator().manual_seed(0)
    directions = [
        {name: torch.randn(w.shape, generator=generator).to(w) for name, w in weights.items()} for _ in range(DIRECTIONS)
    ]

    def drop(scale):
        total, spread = 0.0, dict.fromkeys(weights, scale)
        if magnitude_aware:
            spread = {name: (scale**2 * w.square() + EPS**2).sqrt() for name, w in weights.items()}
        for z in directions:
            noisy = {name: w + spread[name] * z[name] for name, w in weights.items()}
            total += accuracy(model, noisy, images, labels, chunk)
        return (unperturbed - total / DIRECTIONS).item()

    with evaluating(model):
        unperturbed = accuracy(model, {}, images, labels, chunk)
        return find_scale(drop, guess=0.3 if magnitude_aware else 0.04)


def gradient_signs(model, weights, images, labels, chunk=256):
    """The signs of the gradient of the cross-entropy over all the images at `weights`, {name: tensor}."""
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    sums = [torch.zeros_like(w) for w in weights.values()]
    for x, y in zip(images.split(chunk), labels.split(chunk)):
        with torch.enable_grad():
            loss = F.cross_entropy(functional_call(model, weights, (x,)), y, reduction="sum")
        for total, gradient in zip(sums, torch.autograd.grad(loss, list(weights.values()))):
            total += gradient
    return {name: total.sign() for name, total in zip(weights, sums)}


def sharpness_radius(model, images, labels, chunk=256):
    """alpha of J-eq. 54: the radius of the box around the weights in which gradient ascent costs 0.1 training accuracy.

    Ascent on the cross-entropy over the images, in `perturbed_parameters`: ASCENT_STEPS signed steps (steepest for a box)
    of half the radius, each clipped to the box. Returns alpha and the drop there, two floats, searched by find_scale.
    """
    weights = perturbed_parameters(model)

    def drop(radius):
        moved, signs = weights, first
        for step in range(ASCENT_STEPS):
            if step > 0:
                signs = gradient_signs(model, moved, images, labels, chunk)
            away = {name: moved[name] - w + radius / 2 * signs[name] for name, w in weights.items()}
            moved = {name: w + away[name].clamp(-radius, radius) for name, w in weights.items()}
        return (unperturbed - accuracy(model, moved, images, labels, chunk)).item()

    with evaluating(model):
        unperturbed = accuracy(model, {}, images, labels, chunk)
        first = gradient_signs(model, weights, images, labels, chunk)  # the same for every radius
        return find_scale(drop, 1.5e-3, 1e-5, 0.1)


# SRR (Eq. 11)


def srr_measures(model, initial, images):
    """SRR (Eq. 11) on the images: {measure: float}, and its parts per layer, a list of dicts.

    `srr`: of the model as it was trained, lambda = 0.1 and gamma = 1; beside it its parts, `srr_lambda_0` = R^c - R, and
    `srr_no_layernorm`, with the identity for LayerNorm in the forward pass (of a float64 copy), NaN where tokens then grow
    beyond what can be factorised. `baseline_srr_init`: `srr` of the initial model, unless that is None. Raises ValueError where
    the trained or the initial model's tokens are not finite.
    """

    def mean(layers, key="srr"):
        return fmean(layer[key] for layer in layers)

    layers = layer_srr(model, images)
    try:
        bare = layer_srr(without_layernorm(model), Prepared(images, lambda part: part.double()))
    except ValueError:
        bare = [dict.fromkeys(layers[0], math.nan)] * len(layers)
    measures = {"srr": mean(layers)} | {f"srr_{key}": mean(layers, key) for key in ("l0", "rate_subspaces", "rate")}
    measures["srr_lambda_0"] = measures["srr_rate_subspaces"] - measures["srr_rate"]
    measures["srr_no_layernorm"] = mean(bare)
    if initial is not None:
        measures["baseline_srr_init"] = mean(layer_srr(initial, images))
    parts = []
    for l, (layer, without) in enumerate(zip(layers, bare), start=1):
        parts.append({"layer": l} | layer | {f"{key}_no_layernorm": value for key, value in without.items()})
    return measures, parts


# All of them


def measure(model, initial, data, groups, images=10_000):
    """All measures of a trained model: {"measures": {name: float}, "details": {name: float}, "layers": [dict], "failed": dict}.

    details: the margin, the scales found and the drops there. layers: SRR's parts. What is not finite is None. failed: {group:
    reason} of those that can't be computed; their measures are None, or missing.

    initial: the model at initialisation, or None. data: of crate.data; without labels (None) there are the groups "srr" and
    "norms", this without a margin. groups: of GROUPS. images: how many training images the searches over accuracy use, the same
    for all models. Raises ValueError where a weight is not finite.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("the weights of the trained model are not finite")
    everything, labels = Prepared(data.train_images, data.prepare), data.train_labels
    matrices = [None if network is None else counted_weights(network) for network in (model, initial)]
    measures, details, layers, failed = {}, {}, [], {}
    if labels is not None:
        some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:images].sort().values.to(labels.device)
        subset = Prepared(data.train_images[some], data.prepare), labels[some]
        if not {"norms", "path-norm"}.isdisjoint(groups):
            details["margin"] = margin(model, everything, labels)

    def norms():
        return weight_measures(*matrices, details.get("margin"), len(everything), sigma=None, sigma_mag=None)

    def path_norms():
        shape, gamma = data.prepare(data.train_images[:1]).shape[1:], details["margin"]
        effective, literal = path_norm(model, shape), path_norm(model, shape, effective=False)
        over_margin = effective / gamma / gamma if gamma > 0 else math.nan  # J-eq. 43
        return {"path_norm": effective, "path_norm_over_margin": over_margin, "path_norm_literal": literal}

    def pac_bayes():
        details["sigma"], details["sigma_drop"] = noise_scale(model, *subset)
        details["sigma_mag"], details["sigma_mag_drop"] = noise_scale(model, *subset, magnitude_aware=True)
        values = weight_measures(*matrices, None, len(labels), details["sigma"], details["sigma_mag"])
        return {name: mu for name, mu in values.items() if name.startswith("pacbayes")}

    def sharpness():
        details["alpha"], details["alpha_drop"] = sharpness_radius(model, *subset)
        return {"sharpness_flatness": 1 / details["alpha"] ** 2}  # J-eq. 54

    def srr():
        values, parts = srr_measures(model, initial, everything)
        layers.extend(parts)
        return values

    functions = {"norms": norms, "path-norm": path_norms, "pac-bayes": pac_bayes, "sharpness": sharpness, "srr": srr}
    for group in groups:
        try:
            measures |= functions[group]()
        except ValueError as error:
            measures[GROUPS[group]] = math.nan
            failed[group] = str(error)

    def finite(values):
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    layers = [finite(layer) for layer in layers]
    return {"measures": finite(measures), "details": finite(details), "layers": layers, "failed": failed}


def doubtful(measures, details):
    """The names of what is doubtful in what `measure` returns: a margin that is not positive, a scale whose drop is not near
    0.1, a measure that is not finite, a path-norm that is not positive.
    """
    flags = []
    if "margin" in details and not (details["margin"] or 0) > 0:
        flags.append("margin")
    for name in ("sigma", "sigma_mag", "alpha"):
        if name in details and not DROP_RANGE[0] <= details[f"{name}_drop"] <= DROP_RANGE[1]:
            flags.append(name)
    return flags + [name for name, mu in measures.items() if mu is None or (name.startswith("path_norm") and mu <= 0)]
