"""Complexity measures of a trained classifier (Section 5, Tables 1 and 5 of the SRR paper).

J-eq. numbers are those of Jiang et al. 2019, "Fantastic Generalization Measures and Where to Find Them". Norms are taken in
float64. Measuring changes no parameter, mode or random state: perturbed weights enter by `torch.func.functional_call`, noise
comes from generators of its own. `chunk`, the images of one forward pass, bounds memory and changes results by rounding alone.
"""

import copy
import functools
import hashlib
import math
from pathlib import Path

import torch
from scipy.optimize import brentq
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from crate.checkpoint import load_checkpoint, load_run, load_weights
from crate.cli import InputError
from crate.data import data_of, load_data
from crate.model import from_released_crate
from crate.runs import finished_run
from crate.srr import evaluating, layer_srr
from crate.training import evaluate

DROP = 0.1  # training accuracy that PAC-Bayes noise and sharpness may cost
DROP_RANGE = (0.09, 0.11)  # a drop outside is flagged
EPS = 1e-3  # of the magnitude-aware bounds
DIRECTIONS = 10  # noise directions, drawn once per model
PRECISION = 1e-2  # relative, of the scales found; ten directions leave a noise of several per cent
STEEPNESS = 3.0  # typical, of the logit of the drop over the logarithm of the scale
ASCENT_STEPS = 4  # of sharpness

# The columns of the table of measures that stand left of the measures.
SETTINGS = ("model", "dataset", "train_subset", "width", "depth", "heads", "batch_size", "lr", "dropout",
            "weight_decay", "srr_reg", "srr_layer", "seed")  # fmt: skip
RESULTS = ("reached_target", "steps", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
DETAILS = ("margin", "sigma", "sigma_drop", "sigma_mag", "sigma_mag_drop", "alpha", "alpha_drop", "flags")
COLUMNS = ("run", *SETTINGS, *RESULTS, "checksum", "images", *DETAILS, "gap", "gap_accuracy")


def counted_weights(model):
    """P_mat of the norms, {name: parameter}: the trainable matrices (patch embedding, U, W, D, head), each once.

    No biases and LayerNorm (vectors), no positions and CLS (three axes), no fixed output matrix (a buffer).
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2}


def perturbed_parameters(model):
    """P_all without LayerNorm, {name: parameter}: what noise and ascent move."""
    fixed = {p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and p not in fixed}


def weight_measures(weights, initial, margin, examples, sigma, sigma_mag):
    """The measures that need only weights and these scalars: {name: float}, raw values (no sqrt(mu / m)), float64.

    weights: the counted matrices W_1..W_d, a sequence or {name: matrix}; initial: the same matrices at initialisation;
    margin: gamma, <= 0 makes the measures over the margin NaN; examples: m; sigma, sigma_mag: the noise scales at which
    training accuracy has dropped by 0.1. None for initial, margin or a scale leaves out the measures that need it.
    """
    if isinstance(weights, dict):
        initial = None if initial is None else [initial[name] for name in weights]
        weights = list(weights.values())
    weights = [torch.as_tensor(w).double() for w in weights]
    d, omega = len(weights), sum(w.numel() for w in weights)

    def fro(matrices):
        return torch.stack([w.square().sum() for w in matrices])

    def spec(matrices):
        return torch.stack([torch.linalg.svdvals(w)[0].square() for w in matrices])

    fro_w, spec_w = fro(weights), spec(weights)
    log_margin = math.log(margin) if margin is not None and margin > 0 else math.nan
    measures = {
        "params": omega,  # J-eq. 20
        "l2": fro_w.sum().sqrt(),
        "param_norm": fro_w.sum(),  # J-eq. 42
        "log_prod_of_fro": fro_w.log().sum(),  # J-eq. 37
        "log_sum_of_fro": math.log(d) + fro_w.log().mean(),  # J-eq. 39: d times the geometric mean
        "log_prod_of_spec": spec_w.log().sum(),  # J-eq. 32
        "log_sum_of_spec": math.log(d) + spec_w.log().mean(),  # J-eq. 35
        "sum_of_spec_literal": spec_w.sum(),
        "fro_over_spec": (fro_w / spec_w).sum(),  # J-eq. 33
        "inverse_margin": math.exp(-2 * log_margin),  # J-eq. 22
    }
    for norm in ("fro", "spec"):  # J-eqs. 36, 31 and 38, 34
        over_margin = measures[f"log_prod_of_{norm}"] - 2 * log_margin
        measures[f"log_prod_of_{norm}_over_margin"] = over_margin
        measures[f"log_sum_of_{norm}_over_margin"] = math.log(d) + over_margin / d
    squares = {"orig": fro_w}  # of the norms that the bounds are made of
    if initial is not None:
        moved = [w - torch.as_tensor(w0).double() for w, w0 in zip(weights, initial, strict=True)]
        squares = {"init": fro(moved), "orig": fro_w}
        measures["l2_dist"] = squares["init"].sum().sqrt()
        measures["fro_dist"] = squares["init"].sum()  # J-eq. 40
        measures["dist_spec_init"] = spec(moved).sum()  # J-eq. 41
    for name, square in squares.items():  # J-eqs. 29, 30
        measures[f"log_spec_{name}_main"] = measures["log_prod_of_spec_over_margin"] + (square / spec_w).sum().log()
    if sigma is not None:
        rest = math.log(examples / sigma) + 10
        for name, square in squares.items():  # J-eqs. 48, 49
            measures[f"pacbayes_{name}"] = square.sum() / (4 * sigma**2) + rest
        measures["pacbayes_flatness"] = 1 / sigma**2  # J-eq. 53
    if sigma_mag is not None:
        if initial is not None:
            rest = math.log(examples / sigma_mag) + 10
            denominators = sum((EPS**2 + sigma_mag**2 * w.square()).log().sum() for w in moved)
            for name, square in squares.items():  # J-eqs. 56, 57
                numerator = (EPS**2 + (sigma_mag**2 + 1) * square.sum() / omega).log()
                measures[f"pacbayes_mag_{name}"] = (omega * numerator - denominators) / 4 + rest
        measures["pacbayes_mag_flatness"] = 1 / sigma_mag**2  # J-eq. 61
    of_margin = ("margin", "_main")
    return {name: float(mu) for name, mu in measures.items() if margin is not None or not name.endswith(of_margin)}


def logits(model, weights, images, chunk):
    """f(x) of all the images, (m, classes), with `weights` ({name: tensor}) in the place of the model's own."""
    return torch.cat([functional_call(model, weights, (part,)) for part in images.split(chunk)])


def margins(outputs, labels):
    """f(x)_y - max_{j != y} f(x)_j of logits f(x) (m, classes), labels (m,): (m,)."""
    own = labels[:, None]
    others = outputs.scatter(1, own, -math.inf).amax(1)
    return outputs.gather(1, own)[:, 0] - others


def margin(model, images, labels, chunk=256):
    """gamma: the k-th smallest margin over the images, k = floor(m / 10) and at least 1. It may be negative."""
    with evaluating(model):
        of_images = margins(logits(model, {}, images, chunk).double(), labels)
    return of_images.kthvalue(max(1, len(labels) // 10)).values.item()


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
    are included. effective=False squares the parameters in an otherwise unchanged forward pass (so ISTA and CRATE-N keep
    their minus signs, and it may be zero or negative). effective=True squares each *effective* matrix: ISTA becomes
    ReLU((M * M) z) with M = I + beta (D^T - D^T D), without threshold, and every residual adds.
    """
    squared = without_layernorm(model)
    with evaluating(squared):
        steps = [layer.ista and layer.ista.matrix().square() for layer in squared.layers]
        for tensor in (*squared.parameters(), *squared.buffers()):
            tensor.square_()
        squared.cls_token.zero_()
        squared.pos_embedding.zero_()
        if effective:
            for layer, step in zip(squared.layers, steps):
                layer.sign = 1
                if layer.ista:
                    layer.ista.forward = lambda tokens, step=step: F.relu(F.linear(tokens, step))
        return squared(squared.cls_token.new_ones(1, *image_shape)).sum().item()


def accuracy(model, weights, images, labels, chunk=256):
    """Accuracy of the model with `weights` ({name: tensor}) in the place of its own."""
    return (logits(model, weights, images, chunk).argmax(1) == labels).sum().item() / len(labels)


def find_scale(drop, guess, low=1e-4, high=1.0):
    """The scale between `low` and `high` at which drop(scale), a loss of accuracy, crosses 0.1, and the drop there: two floats.

    Brent's method on the logarithm of the scale and the logit of the drop narrows the bracket to PRECISION in half the steps
    of a bisection; nothing ends it early but a drop of exactly 0.1. The two ends are taken for a bracket, with heights that
    make it start at `guess`, a typical scale: where nothing crosses between, an end is returned, and the drop there tells.
    """
    ends = math.log(low), math.log(high)

    @functools.cache
    def drop_at(x):
        return round(drop(math.exp(x)), 9)  # 1 - 0.9 is 0.1

    def height(x):
        if x in ends:
            return STEEPNESS * (x - math.log(guess))
        p = min(max(drop_at(x), 1e-3), 1 - 1e-3)
        return math.log(p / (1 - p)) - math.log(DROP / (1 - DROP))

    x = brentq(height, *ends, xtol=PRECISION)
    return math.exp(x), drop_at(x)


def noise_scale(model, images, labels, magnitude_aware=False, chunk=256):
    """The noise scale at which mean training accuracy has dropped by 0.1, and the drop there: two floats.

    sigma: the standard deviation of noise on P_all without LayerNorm; with `magnitude_aware` sigma', where weight w_i gets
    noise of standard deviation sqrt(sigma'^2 w_i^2 + eps^2). The mean is over ten directions, drawn from a fixed seed on the
    CPU and shared by all scales, so that it is one function of sigma. Searched by find_scale.
    """
    weights = perturbed_parameters(model)
    generator = torch.Generator().manual_seed(0)
    directions = [
        {name: torch.randn(w.shape, generator=generator).to(w) for name, w in weights.items()} for _ in range(DIRECTIONS)
    ]

    def drop(scale):
        spread = {name: (scale**2 * w.square() + EPS**2).sqrt() if magnitude_aware else scale for name, w in weights.items()}
        copies = ({name: w + spread[name] * z[name] for name, w in weights.items()} for z in directions)
        return unperturbed - math.fsum(accuracy(model, noisy, images, labels, chunk) for noisy in copies) / DIRECTIONS

    with evaluating(model):
        unperturbed = accuracy(model, {}, images, labels, chunk)
        return find_scale(drop, 0.3 if magnitude_aware else 0.04)


def gradient_signs(model, weights, images, labels, chunk=256):
    """The signs of the gradient of the cross-entropy over all the images at `weights`, {name: tensor}."""
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    sums = [torch.zeros_like(w) for w in weights.values()]
    for x, y in zip(images.split(chunk), labels.split(chunk)):
        with torch.enable_grad():
            loss = F.cross_entropy(functional_call(model, weights, (x,)), y, reduction="sum")
        for total, gradient in zip(sums, torch.autograd.grad(loss, list(weights.values()))):
            total += gradient
    return dict(zip(weights, (total.sign() for total in sums)))


def sharpness_radius(model, images, labels, chunk=256):
    """alpha of J-eq. 54: the radius of the box around the weights in which gradient ascent costs 0.1 training accuracy.

    Ascent on the cross-entropy over the images, in P_all without LayerNorm: ASCENT_STEPS signed steps (steepest for a box)
    of half the radius, each clipped to the box. Returns alpha and the drop there, two floats, searched by find_scale.
    """
    weights = perturbed_parameters(model)

    def drop(radius):
        moved = weights
        for step in range(ASCENT_STEPS):
            signs = gradient_signs(model, moved, images, labels, chunk) if step else first
            moved = {
                name: w + (moved[name] - w + radius / 2 * signs[name]).clamp(-radius, radius) for name, w in weights.items()
            }
        return unperturbed - accuracy(model, moved, images, labels, chunk)

    with evaluating(model):
        unperturbed = accuracy(model, {}, images, labels, chunk)
        first = gradient_signs(model, weights, images, labels, chunk)  # the same for every radius
        return find_scale(drop, 1.5e-3, 1e-5, 0.1)


class Images:
    """Images with a tensor's `split`, whose parts are transformed as they are read: all at once might not fit in memory."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def split(self, chunk):
        return map(self.transform, self.images.split(chunk))


def srr(model, data):
    """Eq. 11 on the training set: {measure: float}, and the parts per layer, a list of dicts.

    `srr` is the measure of the model as it was trained. `srr_no_layernorm` has the identity for LayerNorm in the forward pass
    (of a float64 copy); NaN where the tokens then grow beyond what can be factorised. vit, whose U is the query matrix, has
    `srr_key` and `srr_value` besides.
    """

    def mean(layers, key="srr"):
        return math.fsum(layer[key] for layer in layers) / len(layers)

    images = Images(data.train_images, data.resize)
    layers = layer_srr(model, images)
    try:
        bare = layer_srr(without_layernorm(model), Images(data.train_images, lambda part: data.resize(part).double()))
    except ValueError:
        bare = [dict.fromkeys(layers[0], math.nan)] * len(layers)
    measures = {"srr": mean(layers)} | {f"srr_{key}": mean(layers, key) for key in ("l0", "rate_subspaces", "rate")}
    measures["srr_no_layernorm"] = mean(bare)
    if hasattr(model.layers[0].mssa, "key"):
        measures |= {f"srr_{matrix}": mean(layer_srr(model, images, matrix=matrix)) for matrix in ("key", "value")}
    parts = [
        {"layer": l, **layer, **{f"{key}_no_layernorm": value for key, value in without.items()}}
        for l, (layer, without) in enumerate(zip(layers, bare), start=1)
    ]
    return measures, parts


def measure(model, initial, data, groups, images=10_000):
    """All measures of a trained model: {measure: float}, {detail: value} for DETAILS, and SRR's parts per layer.

    initial: the model at initialisation, or None. data: crate.data.Data. groups: of "path-norm", "pac-bayes", "sharpness" and
    "srr"; norms are always there. images: how many training images the searches over accuracy use, the same for all models.
    """
    labels = data.train_labels
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:images].sort().values.to(labels.device)
    subset = Images(data.train_images[chosen], data.resize), labels[chosen]
    details = dict.fromkeys(DETAILS)
    details["margin"] = margin(model, Images(data.train_images, data.resize), labels)
    if "pac-bayes" in groups:
        details["sigma"], details["sigma_drop"] = noise_scale(model, *subset)
        details["sigma_mag"], details["sigma_mag_drop"] = noise_scale(model, *subset, magnitude_aware=True)
    measures = weight_measures(
        counted_weights(model), initial and counted_weights(initial), details["margin"],
        len(labels), details["sigma"], details["sigma_mag"],
    )  # fmt: skip
    if "path-norm" in groups:
        shape = data.resize(data.train_images[:1]).shape[1:]
        measures["path_norm"] = path_norm(model, shape)
        measures["path_norm_over_margin"] = measures["path_norm"] * measures["inverse_margin"]  # J-eq. 43
        measures["path_norm_literal"] = path_norm(model, shape, effective=False)
    if "sharpness" in groups:
        details["alpha"], details["alpha_drop"] = sharpness_radius(model, *subset)
        measures["sharpness_flatness"] = 1 / details["alpha"] ** 2  # J-eq. 54
    layers = []
    if "srr" in groups:
        values, layers = srr(model, data)
        measures |= values
    flags = ["margin"] if details["margin"] <= 0 else []  # what is doubtful, by the name of its column
    searched = [name for name in ("sigma", "sigma_mag", "alpha") if details[name] is not None]
    flags += [name for name in searched if not DROP_RANGE[0] <= details[f"{name}_drop"] <= DROP_RANGE[1]]
    flags += [name for name, mu in measures.items() if not math.isfinite(mu) or name.startswith("path_norm") and mu <= 0]
    return measures, details | {"flags": " ".join(flags)}, layers


def checksum(path):
    """The first 16 digits of the SHA-256 of a checkpoint: `path`, or last.pt in the run folder `path`."""
    file = path / "last.pt" if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def load_released(path, heads, dataset, data_dir, device):
    """The model in a released CRATE checkpoint, with the config, data and result that a run folder would have held."""
    if heads is None or dataset is None:
        raise InputError(f"{path}: a released CRATE checkpoint needs --heads and --dataset")
    model = from_released_crate(load_checkpoint(path), heads).to(device).eval()
    tokens, width = model.pos_embedding.shape[1:]
    size = model.patch_size * math.isqrt(tokens - 1)
    data = load_data(dataset, data_dir, image_size=size, device=device)
    channels = model.patch_embedding[1].in_features // model.patch_size**2
    if channels != data.train_images.shape[1] or len(model.head[1].weight) <= data.train_labels.max():
        raise InputError(f"{path}: --dataset {dataset} has other channels or more classes than the checkpoint")
    train_loss, train_accuracy = evaluate(model, data, data.train_images, data.train_labels)
    val_loss, val_accuracy = evaluate(model, data, data.val_images, data.val_labels)
    config = {"model": "crate", "dataset": dataset, "width": width, "depth": len(model.layers), "heads": heads}
    result = {
        "train_loss": train_loss, "train_accuracy": train_accuracy, "val_loss": val_loss, "val_accuracy": val_accuracy,
        "gap": val_loss - train_loss, "gap_accuracy": train_accuracy - val_accuracy,
    }  # fmt: skip
    return model, config, data, result


def measure_run(path, *, groups, images, device="cpu", data_dir=None, heads=None, dataset=None):
    """Measure a finished run folder, or a released CRATE checkpoint: its row of the table, and a row per layer.

    data_dir: instead of the run's own. heads, dataset: of a released checkpoint, which has no initial weights. Raises
    InputError or OSError where a file is missing or malformed, ValueError where the trained model's tokens are not finite.
    """
    path = Path(path)
    if path.is_file():
        model, config, data, result = load_released(path, heads, dataset, data_dir or "data", device)
        initial = None
    else:
        config, model = load_run(path, device)
        initial = copy.deepcopy(model)
        load_weights(initial, path / "init.pt", config)
        _, result = finished_run(path)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise InputError(f"{path / 'last.pt'}: its weights are not finite")
        missing = {"dataset", "image_size", "train_subset", "hold_out", "data_dir"} - config.keys()
        if missing := missing | {"gap", "gap_accuracy"} - result.keys():
            raise InputError(f"{path}: config.json or result.json lacks {', '.join(sorted(missing))}")
        data = data_of(config, data_dir, device)
    measures, details, layers = measure(model, initial, data, groups, images)
    values = config | result | details | {"run": path.name, "checksum": checksum(path), "images": images}
    row = {column: values.get(column) for column in COLUMNS} | measures
    return row, [{"run": path.name, **layer} for layer in layers]
