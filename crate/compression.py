"""The attention-only experiment (Section 4.1, Appendix A; Figs. 1 and 5): does one compression step lower R^c?

Tokens Z (N, d) pass through L steps without ISTA and LayerNorm, the softmax has no temperature, and every step has a fresh
orthonormal U. R^c is measured on that U before and after the step.
"""

from functools import partial

import torch

from crate.kernels import self_attention
from crate.rates import exact_gradient, expansion_gradient, merge_heads, norm_ratio, subspace_coding_rate, subspaces


def mssa(tokens, U, heads, gamma):
    """MSSA(Z; U) = sum_k U_k V_k softmax(V_k^T V_k), V_k = U_k^T Z (Eq. 4), times gamma^2: (N, d)."""
    V = subspaces(tokens, U, heads)
    return gamma**2 * merge_heads(self_attention(V)) @ U.mT


# name: (the update's panel and equation, the g of Z - alpha g, in the place of grad R^c)
RULES = {
    "exact": ("(a) exact gradient, Eq. 6", exact_gradient),
    "expansion": ("(b) gradient of the expansion, Eq. 7", expansion_gradient),
    "first-order": ("(c) its first-order term", partial(expansion_gradient, orders=(1,))),
    "second-order": ("(d) its second-order term", partial(expansion_gradient, orders=(2,))),
    "softmax": ("(e) softmax, CRATE-C, Eq. 8", lambda *arguments: -mssa(*arguments)),
    "negative": ("CRATE-N, Eq. 9", mssa),
}


def random_orthonormal(d, generator, dtype):
    """A uniformly random orthogonal matrix (d, d)."""
    return torch.nn.init.orthogonal_(torch.empty(d, d, dtype=dtype), generator=generator)


# Z - step cancels where less of the norm is left: what remains is then rounding, in all tokens (the first-order rule, where it
# should be 0) or in all but a few (CRATE-N at unit variance: 1e-9 to 1e-6 of the norm, one to four tokens of 196).
LEAST_LEFT = 1e-3


def rates_along(rule, seed, *, tokens, depth, width, heads, alpha=1.0, gamma=1.0, scale=1.0, dtype=torch.float64):
    """Run `depth` steps of `rule` on Gaussian tokens of standard deviation `scale`: R^c, in nats, around each step.

    Returns rows {"rule", "seed", "layer" (from 1), "before", "after", "after_equal_norm", "overflow"}. "after_equal_norm" is
    R^c once the tokens are scaled back to the Frobenius norm that they had before the step, None where less than LEAST_LEFT of
    it is left; later layers then move rounding errors. Numbers that overflow `dtype` are None, and end the run: its last row
    has "overflow" True. All rules see the same Z^0 and U for one seed.
    Raises ValueError where heads don't divide the width.
    """
    if width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}")
    generator = torch.Generator().manual_seed(seed)
    _, gradient = RULES[rule]
    rows, Z = [], scale * torch.randn(tokens, width, generator=generator, dtype=dtype)
    for layer in range(1, depth + 1):
        U = random_orthonormal(width, generator, dtype)
        row = {"before": None, "after": None, "after_equal_norm": None, "overflow": True}
        rows.append({"rule": rule, "seed": seed, "layer": layer} | row)
        try:
            rows[-1]["before"] = subspace_coding_rate(Z, U, heads, gamma).item()
            moved = Z - alpha * gradient(Z, U, heads, gamma)
            rows[-1]["after"] = subspace_coding_rate(moved, U, heads, gamma).item()
            if moved.norm() > LEAST_LEFT * Z.norm():
                rows[-1]["after_equal_norm"] = subspace_coding_rate(norm_ratio(Z, moved) * moved, U, heads, gamma).item()
            rows[-1]["overflow"] = False
        except ValueError:  # a Gram matrix has overflowed
            break
        Z = moved
    return rows
