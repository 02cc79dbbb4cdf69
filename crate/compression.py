"""The attention-only experiment (Section 4.1, Appendix A; Figs. 1 and 5): does one compression step lower R^c?

Tokens Z (N, d) pass through L steps without ISTA and LayerNorm, the softmax has no temperature, and every step has a fresh
orthonormal U. R^c is measured on that U before and after the step.
"""

import math

import torch

from crate.cli import InputError
from crate.layers import subspace_attention
from crate.rates import exact_gradient, expansion_gradient, merge_heads, split_heads, subspace_coding_rate


def mssa(tokens, U, heads, gamma):
    """MSSA(Z; U) = sum_k U_k V_k softmax(V_k^T V_k), V_k = U_k^T Z (Eq. 4), times gamma^2: (N, d)."""
    V = split_heads(tokens @ U, heads)
    return gamma**2 * merge_heads(subspace_attention(V)) @ U.mT


# name: (the update's panel and equation, the descent direction g of Z - alpha g)
RULES = {
    "exact": ("(a) exact gradient, Eq. 6", exact_gradient),
    "expansion": ("(b) gradient of the expansion, Eq. 7", expansion_gradient),
    "first-order": ("(c) its first-order term", lambda *arguments: expansion_gradient(*arguments, orders=(1,))),
    "second-order": ("(d) its second-order term", lambda *arguments: expansion_gradient(*arguments, orders=(2,))),
    "softmax": ("(e) softmax, CRATE-C, Eq. 8", lambda *arguments: -mssa(*arguments)),
    "negative": ("CRATE-N, Eq. 9", mssa),
}


def random_orthonormal(d, generator, dtype):
    """A uniformly random orthogonal matrix (d, d): the Q of a Gaussian matrix whose R has a positive diagonal."""
    Q, R = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=dtype))
    return Q * R.diagonal().sign()


def compress(rule, seed, *, tokens, depth, width, heads, alpha=1.0, gamma=1.0, scale=1.0, dtype=torch.float64):
    """Run `depth` steps of `rule` on Gaussian tokens of standard deviation `scale`: R^c, in nats, around each step.

    Returns rows {"rule", "seed", "layer" (from 1), "before", "after", "overflow"}. Numbers that overflow `dtype` are None,
    and end the run: its last row has "overflow" True. All rules see the same Z^0 and U for one seed.
    Raises InputError where heads don't divide the width.
    """
    if width % heads:
        raise InputError(f"--width {width} is not divisible by --heads {heads}")
    generator = torch.Generator().manual_seed(seed)
    direction, rows = RULES[rule][1], []
    Z = scale * torch.randn(tokens, width, generator=generator, dtype=dtype)
    for layer in range(1, depth + 1):
        U = random_orthonormal(width, generator, dtype)
        before = _rate(Z, U, heads, gamma)
        if before is not None:
            Z = Z - alpha * direction(Z, U, heads, gamma)
        after = None if before is None else _rate(Z, U, heads, gamma)
        rows.append({"rule": rule, "seed": seed, "layer": layer, "before": before, "after": after, "overflow": after is None})
        if after is None:
            break
    return rows


def _rate(Z, U, heads, gamma):
    """R^c(Z; U), or None where it is no longer a finite number."""
    try:
        rate = subspace_coding_rate(Z, U, heads, gamma).item()
    except ValueError:  # the Gram matrix has overflowed
        return None
    return rate if math.isfinite(rate) else None
