"""The SRR measure of tokens and of layers, and its gradient in Eq. 14, against tests/reference.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crate.srr import layer_srr, operator_rates, parts, record, srr
from tests import reference
from tests.reference import assert_close
from tests.test_model import expected_forward, images_for, of_variants, small_model

HEADS = 3
PARTS = ["l0", "rate_subspaces", "rate", "srr"]


@pytest.mark.parametrize("norm", ["l0", "l1"])
@pytest.mark.parametrize("N", [5, 20])
def test_measure_of_tokens_and_its_gradients(N, norm):
    Z = F.hardshrink(torch.randn(4, N, 12, dtype=torch.float64)).requires_grad_()
    U = torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    expected = reference.subspace_coding_rate(Z, U, HEADS, 0.8) - reference.coding_rate(Z, HEADS * 0.8)
    expected = expected + 0.3 * (Z.abs() if norm == "l1" else (Z != 0).double()).sum((1, 2))
    measure = srr(Z, U, HEADS, sparsity=0.3, gamma=0.8, norm=norm)
    assert_close(measure, expected, 1e-10)
    for actual, wanted in zip(torch.autograd.grad(measure.sum(), (Z, U)), torch.autograd.grad(expected.sum(), (Z, U))):
        assert_close(actual, wanted, 1e-10)
    assert_close(srr(Z, U, HEADS), srr(Z, U, HEADS, sparsity=0.1, gamma=1.0, norm="l0"), 1e-12)
    with pytest.raises(ValueError, match="l0 or l1"):
        srr(Z, U, HEADS, norm="l2")


class Encoder(nn.Module):
    """As other libraries' models take and return tokens."""

    def forward(self, *, hidden_states):
        return SimpleNamespace(attentions=None, last_hidden_state=-hidden_states)


def test_record_any_modules_and_leave_no_trace():
    layers = [nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(3)]  # they return a tuple
    Z = torch.randn(2, 5, 4)
    with record(reversed(layers)) as (inputs, outputs):  # the list's order, not that of the calls
        first = layers[0](Z, Z, Z)[0]
        last = layers[2](query=first, key=Z, value=Z)[0]  # by keyword; one isn't called
        middle = layers[1](last, Z, Z)[0]
    for recorded, expected in zip([*inputs, *outputs], [first, last, Z, last, middle, first], strict=True):
        assert torch.equal(recorded, expected)
    with pytest.raises(ZeroDivisionError), record(layers) as (inputs, _):
        raise ZeroDivisionError
    layers[0](Z, Z, Z)
    assert inputs == [None] * 3
    with record([]) as lists:
        assert lists == ([], [])
    encoder = Encoder()
    with record([encoder]) as (inputs, outputs):
        encoder(hidden_states=Z)
    assert torch.equal(inputs[0], Z) and torch.equal(outputs[0], -Z)


class Residual(nn.Module):
    """A block that adds to its input, in place or not."""

    def __init__(self, inplace=False):
        super().__init__()
        self.linear, self.inplace = nn.Linear(4, 4), inplace

    def forward(self, tokens):
        step = self.linear(tokens.clone())
        return tokens.add_(step) if self.inplace else tokens + step


def test_what_is_recorded_was_there_at_that_moment():
    """Also where a block, or a later one, writes in place; and it is in the graph."""
    plain, inplace = (nn.Sequential(*[Residual(inplace) for _ in range(3)], nn.ReLU(inplace)) for inplace in (False, True))
    inplace.load_state_dict(plain.state_dict())
    Z, everything = torch.randn(2, 5, 4), []
    for network in (plain, inplace):
        with record(network) as (inputs, outputs):
            network(Z.clone())
        srr(outputs[1], torch.eye(4), 2).sum().backward()
        everything.append([*inputs, *outputs, *(network[l].linear.weight.grad for l in (0, 1))])
        assert network[2].linear.weight.grad is None
    assert all(map(torch.equal, *everything))


def test_what_record_refuses():
    one, other, Z = Residual(), Residual(), torch.randn(2, 5, 4)
    for wrong in (one, [one, "other"], nn.ModuleDict({"one": one})):
        with pytest.raises(ValueError, match=r"a list of modules: record\(\[module\]\)"), record(wrong):
            pass
    with pytest.raises(ValueError, match="called twice"), record([one]):
        one(one(Z))
    with pytest.raises(ValueError, match=r"layers\[1\] \(Residual\) is .* listed twice"), record([one, one]):
        one(Z)
    reason = r"layers\[3\] \(Identity\) takes a dict, .* returns a dict, layers\[0\] \(Residual\) wasn't called, layers\[2\] .*"
    reason += r"compiled before"
    with pytest.raises(ValueError, match=reason), record([one, other, nn.Identity(), same := nn.Identity()]):
        same({"tokens": other(Z)})
    assert torch.equal(one(one(Z)), one(one(Z)))  # the hooks are gone


def test_record_says_what_hides_tensors():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder, mask = nn.TransformerEncoder(layer, 2).eval(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with pytest.raises(ValueError, match="takes a nested tensor, .*set_fastpath_enabled"), torch.no_grad():
        with record(encoder.layers):
            encoder(torch.randn(2, 5, 4), src_key_padding_mask=mask)
    network, Z = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5, 4)
    compiled = torch.compile(network, backend="eager")
    compiled(Z)
    with pytest.raises(ValueError, match=r"\(Linear\) wasn't called\. .* compiled before"), record(network):
        compiled(Z)


@pytest.mark.parametrize("function", [srr, parts])
def test_shapes_that_do_not_fit(function):
    with pytest.raises(ValueError, match=r"tokens must be \(B, N, d\), .*\(2, 4, 4, 12\): .* tokens.flatten\(1, 2\)"):
        function(torch.randn(2, 4, 4, 12), torch.randn(12, 12), 3)
    with pytest.raises(ValueError, match=r"U must be \(d, d\)"):  # and all that the rates refuse
        function(torch.randn(2, 16, 12), torch.randn(12, 36), 3)


def test_tokens_and_U_of_different_types():
    Z, U = torch.randn(2, 16, 12), torch.randn(12, 12)
    wide = srr(Z.double(), U.double(), HEADS)
    for measure in (srr(Z.double(), U, HEADS), srr(Z, U.double(), HEADS)):
        assert measure.dtype == torch.float64
        assert_close(measure, wide, 1e-12)
    assert srr(Z.bfloat16(), U, HEADS).dtype == torch.float32
    assert srr(Z[0], U, HEADS).shape == ()


@of_variants
def test_measure_of_every_layer_and_around_its_operators(variant):
    model, images = small_model(variant), images_for(6)
    weights, _, outputs = expected_forward(model, variant, images)
    rows = operator_rates(model, images, sparsity=0.3, gamma=0.8, chunk=4)
    for row, points in zip(layer_srr(model, images, sparsity=0.3, gamma=0.8, chunk=4), rows, strict=True):
        assert row == pytest.approx({part: points["output"][part] for part in PARTS}, rel=1e-10)
    size, _, _, sparsification = reference.fields(variant)
    for l, points in enumerate(rows):
        own, U, before = reference.of_layer(weights, l), model.layers[l].mssa.U.weight.mT, outputs[l]
        step = reference.compression_step(reference.layer_norm(before, own, "norm1"), own, variant, HEADS)
        tokens = {"input": before, "compressed": before + size * step}
        if sparsification == "ISTA":
            tokens["normalised"] = reference.layer_norm(tokens["compressed"], own, "norm2")
        tokens["output"] = outputs[l + 1]
        assert list(points) == list(tokens)
        for point, value in tokens.items():
            expected = reference.srr_parts(value, U, HEADS, sparsity=0.3, gamma=0.8)
            for part in PARTS:
                assert_close(points[point][part], expected[part], 1e-10)
            if point != "input":
                scaled = reference.subspace_coding_rate(reference.at_norm_of(value, before), U, HEADS, 0.8).mean()
                assert_close(points[point]["rate_subspaces_equal_norm"], scaled, 1e-10)
            before = value
    default = layer_srr(model, images, sparsity=0.1, gamma=1.0)
    for row, wide in zip(layer_srr(model.float(), images.float()), default):
        assert row == pytest.approx(wide, rel=1e-4, abs=1e-3)
