"""Slow textbook versions, written from the paper and not from the code: what the tests compare with, and the benchmark times.

Tokens come in and go out as rows, (..., N, d). Inside, Z = tokens.mT is the paper's (..., d, N), and formulas read as printed.
All of it is differentiable by autograd, in float32 or float64. Weights are plain dicts {parameter name: tensor}.
"""

import math

import torch

from crate.model import VARIANTS as TABLE

# What the paper (and we, of the last two) say of each variant: size of the step, attention, output matrix, sparsification.
PAPER = {
    "crate-c": (+1, "U", "U", "ISTA"), "crate-n": (-1, "U", "U", "ISTA"), "crate-t": (+1, "U", "U^T", "ISTA"),
    "crate": (+1, "U", "W", "ISTA"), "crate-fix": (+1, "U", "random", "ISTA"), "crate-identity": (+1, "U", "I", "ISTA"),
    "crate-e": (-1, "exact", "U", "ISTA"), "vit": (+1, "QKV", "W", "MLP"),
}  # fmt: skip
# All variants that can be checked here: a new row of the table is one of them unless its step is new.
VARIANTS = [name for name, row in TABLE.items() if all(row[i] in {known[i] for known in PAPER.values()} for i in (1, 2, 3))]


def fields(variant):
    """Size of the step, attention, output matrix and sparsification of a variant."""
    return PAPER.get(variant, TABLE[variant][:4])


# Rates (Eqs. 1, 5) and the SRR measure (Eq. 11)


def eye(n, like):
    return torch.eye(n, dtype=like.dtype, device=like.device)


def coding_rate(tokens, c):
    """R(Z) = 1/2 logdet(I + c Z Z^T), on the d x d side whatever N is: (...)."""
    Z = tokens.mT
    return torch.logdet(eye(Z.shape[-2], Z) + c * Z @ Z.mT) / 2


def subspaces(U, heads):
    """U = [U_1 .. U_K], each (d, p)."""
    return U.chunk(heads, dim=1)


def subspace_coding_rate(tokens, U, heads, gamma=1.0):
    """R^c(Z; U) = sum_k R of U_k^T Z: (...)."""
    return sum(coding_rate(tokens @ U_k, gamma) for U_k in subspaces(U, heads))


def taylor_bound(tokens, U, heads, gamma=1.0):
    """Eq. 5 through the eigenvalues x of I + gamma V_k^T V_k: sum of 1/2 (x - 1 - (x - 1)^2 / 2)."""
    total = 0
    for U_k in subspaces(U, heads):
        V = U_k.mT @ tokens.mT
        x = torch.linalg.eigvalsh(eye(V.shape[-1], V) + gamma * V.mT @ V)
        total = total + ((x - 1) - (x - 1) ** 2 / 2).sum(-1) / 2
    return total


def srr_parts(tokens, U, heads, sparsity=0.1, gamma=1.0):
    """||Z||_0, R^c, R and the measure sparsity ||Z||_0 + R^c - R of tokens (B, N, d), each averaged over the images."""
    l0 = torch.stack([(image != 0).sum().to(tokens.dtype) for image in tokens]).mean()
    compressed = subspace_coding_rate(tokens, U, heads, gamma).mean()
    rate = coding_rate(tokens, heads * gamma).mean()
    return {"l0": l0, "rate_subspaces": compressed, "rate": rate, "srr": sparsity * l0 + compressed - rate}


# The update rules of Fig. 5 and CRATE-N's


def update(rule, tokens, U, heads, alpha=1.0, gamma=1.0):
    """One layer of the attention-only experiment. Rules: Fig. 5 "a" .. "e", and "n" for Eq. 9."""
    Z, step = tokens.mT, 0
    for U_k in subspaces(U, heads):
        V = U_k.mT @ Z  # (..., p, N)
        gram = V.mT @ V
        step = step + U_k @ {
            "a": -gamma * V @ torch.linalg.inv(eye(gram.shape[-1], Z) + gamma * gram),
            "b": -gamma * V + gamma**2 * V @ gram,
            "c": -gamma * V,
            "d": gamma**2 * V @ gram,
            "e": gamma**2 * V @ torch.softmax(gram, dim=-2),
            "n": -(gamma**2) * V @ torch.softmax(gram, dim=-2),
        }[rule]  # fmt: skip
    return (Z + alpha * step).mT


# One layer (Eqs. 2-4, 8-10)


def attention(tokens, U, heads, scale=1.0, keep=None):
    """The heads of Eq. 4, V_k softmax(scale V_k^T V_k) with V_k = U_k^T Z, stacked: (..., N, d).

    Column n of the softmax holds output token n's weights. `keep` (..., K, N, N) multiplies the weights (dropout).
    """
    stacked = []
    for k, U_k in enumerate(subspaces(U, heads)):
        V = U_k.mT @ tokens.mT
        weights = torch.softmax(scale * V.mT @ V, dim=-2)
        if keep is not None:
            weights = weights * keep[..., k, :, :]
        stacked.append(V @ weights)
    return torch.cat(stacked, dim=-2).mT


def ista(tokens, D, beta=0.1, sparsity=0.1):
    """Eq. 3: ReLU(Y + beta D^T (Y - D Y) - beta sparsity 1), with its three products per token."""
    Y = tokens.mT
    return torch.relu(Y + beta * (D.mT @ Y - D.mT @ (D @ Y)) - beta * sparsity).mT


def layer_norm(tokens, weights, name):
    centred = tokens - tokens.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return scaled * weights[name + ".weight"] + weights[name + ".bias"]


def linear(tokens, weights, name):
    return (weights[name + ".weight"] @ tokens.mT).mT + weights[name + ".bias"]


def output_projection(stacked, weights, variant):
    """What each variant makes of its stacked heads: Eqs. 8 to 10 and Table 3."""
    U, output = weights["mssa.U.weight"].mT, fields(variant)[2]
    if output == "U":
        return (U @ stacked.mT).mT
    if output == "U^T":
        return (U.mT @ stacked.mT).mT
    if output == "random":
        return (weights["mssa.fixed"] @ stacked.mT).mT
    return linear(stacked, weights, "mssa.W") if output == "W" else stacked


def standard_attention(tokens, weights, heads):
    """A standard transformer's heads, softmax(Q K^T / sqrt(p)) V with tokens as rows, stacked: (..., N, d)."""
    stacked = []
    for Q, K, V in zip(*(subspaces(weights[f"mssa.{name}.weight"].mT, heads) for name in ("U", "key", "value"))):
        scores = (tokens @ Q) @ (tokens @ K).mT / Q.shape[-1] ** 0.5
        stacked.append(torch.softmax(scores, dim=-1) @ (tokens @ V))
    return torch.cat(stacked, dim=-1)


def mlp(tokens, weights):
    """GELU between two linear maps."""
    x = linear(tokens, weights, "mlp.0")
    return linear(x * (1 + torch.erf(x / 2**0.5)) / 2, weights, "mlp.2")


def compression_step(normed, weights, variant, heads, keep=None):
    """The step before its size, such as +1 or -1: (..., N, d), from LayerNormed tokens."""
    U, kind = weights["mssa.U.weight"].mT, fields(variant)[1]
    if kind == "exact":
        return normed - update("a", normed, U, heads)
    if kind == "QKV":
        return output_projection(standard_attention(normed, weights, heads), weights, variant)
    return output_projection(attention(normed, U, heads, (U.shape[0] / heads) ** -0.5, keep), weights, variant)


def layer(tokens, weights, variant, heads, keep=None, keep_output=1.0):
    """One layer's output, from that layer's weights; `keep` and `keep_output` are dropout's factors."""
    size, _, _, sparsification = fields(variant)
    step = compression_step(layer_norm(tokens, weights, "norm1"), weights, variant, heads, keep)
    tokens = tokens + size * step * keep_output
    normed = layer_norm(tokens, weights, "norm2")
    return tokens + mlp(normed, weights) if sparsification == "MLP" else ista(normed, weights["ista.D"])


# The classifier


def patches(images, size):
    """(B, C, H, W) -> (B, N, size size C): patches row by row, each flattened as (row, column, channel)."""
    rows, columns = range(0, images.shape[2], size), range(0, images.shape[3], size)
    cut = [images[:, :, i : i + size, j : j + size].permute(0, 2, 3, 1).flatten(1) for i in rows for j in columns]
    return torch.stack(cut, dim=1)


def with_cls(tokens, weights):
    cls = weights["cls_token"].repeat(len(tokens), 1, 1)
    return torch.cat([cls, tokens], dim=1) + weights["pos_embedding"]


def of_layer(weights, index, prefix="layers"):
    """The weights of one layer, by the names that they have inside it."""
    prefix = f"{prefix}.{index}."
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def forward(images, weights, variant, heads, patch_size, depth):
    """Logits (B, classes) and [Z^0, Z^1 .. Z^L], from our model's weights."""
    tokens = layer_norm(patches(images, patch_size), weights, "patch_embedding.0")
    tokens = layer_norm(linear(tokens, weights, "patch_embedding.1"), weights, "patch_embedding.2")
    outputs = [with_cls(tokens, weights)]
    for index in range(depth):
        outputs.append(layer(outputs[-1], of_layer(weights, index), variant, heads))
    return linear(layer_norm(outputs[-1][:, 0], weights, "head.0"), weights, "head.1"), outputs


def released_forward(images, state_dict, heads, patch_size, depth):
    """Logits of the released CRATE, from its state_dict."""
    tokens = layer_norm(patches(images, patch_size), state_dict, "to_patch_embedding.1")
    tokens = layer_norm(linear(tokens, state_dict, "to_patch_embedding.2"), state_dict, "to_patch_embedding.3")
    tokens = with_cls(tokens, state_dict)
    for index in range(depth):
        weights = of_layer(state_dict, index, "transformer.layers")
        U = weights["0.fn.qkv.weight"].mT
        stacked = attention(layer_norm(tokens, weights, "0.norm"), U, heads, (U.shape[1] / heads) ** -0.5)
        tokens = tokens + linear(stacked, weights, "0.fn.to_out.0")
        tokens = ista(layer_norm(tokens, weights, "1.norm"), weights["1.fn.weight"])
    return linear(layer_norm(tokens[:, 0], state_dict, "mlp_head.0"), state_dict, "mlp_head.1")


def at_norm_of(tokens, like):
    """Each image's tokens (B, N, d) scaled to the Frobenius norm of `like`."""
    return torch.stack([image * wanted.norm() / image.norm() for image, wanted in zip(tokens, like)])


def stop_gradient_srr(outputs, weights, variant, heads, layers, sparsity=0.1, gamma=1.0, norm="l0"):
    """Eq. 14's mean measure of `layers` (0-based): each runs again on its detached input, out of [Z^0 .. Z^L]."""
    total = 0
    for index in layers:
        own = of_layer(weights, index)
        tokens = layer(outputs[index].detach(), own, variant, heads)
        parts = srr_parts(tokens, own["mssa.U.weight"].mT, heads, sparsity, gamma)
        term = parts["srr"]
        if norm == "l1":
            term = parts["rate_subspaces"] - parts["rate"] + sparsity * tokens.abs().sum((1, 2)).mean()
        total = total + term / len(layers)
    return total


def noise_scale(accuracy, weights, drop=0.1, draws=10, low=1e-4, high=1.0, precision=0.01):
    """PAC-Bayes sigma by bisection on its logarithm, draws in a loop; accuracy(weights) -> float, weights {name: tensor}."""
    unperturbed = accuracy(weights)
    while math.log(high / low) > precision:
        sigma, total = math.sqrt(low * high), 0.0
        for draw in range(draws):
            generator = torch.Generator().manual_seed(draw)
            total += accuracy({name: w + sigma * torch.randn(w.shape, generator=generator) for name, w in weights.items()})
        low, high = (low, sigma) if unperturbed - total / draws > drop else (sigma, high)
    return math.sqrt(low * high)


# For the tests


def copies(module):
    """{name: copy} of a module's parameters (as leaves that require gradients) and buffers."""
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in module.named_parameters()}
    return weights | {name: tensor.clone() for name, tensor in module.named_buffers()}


def assert_close(actual, expected, tolerance):
    """Same shape, and nowhere further apart than `tolerance` times the largest expected value (or 1e-3, if that is larger)."""
    actual, expected = (torch.as_tensor(values, dtype=torch.float64, device="cpu").detach() for values in (actual, expected))
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * max(expected.abs().max().item(), 1e-3)  # a NaN fails too
