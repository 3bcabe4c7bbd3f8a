"""Low-precision copies: used exactly as long as they are what a cast would give."""

import copy
import gc

import pytest
import torch
from torch import nn

from fastformer import ops
from fastformer.ops import weight_copies

BF16 = torch.bfloat16


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def register(weight):
    kept = weight_copies.WeightCopy(weight, BF16)
    kept.tensor.copy_(weight.detach())
    kept.is_written(weight)
    return kept


def is_used(weight, kept):
    return weight_copies.cast(weight, BF16) is kept.tensor


def test_a_registered_copy_stands_for_its_weight():
    weight = parameter(3, 4)
    assert weight_copies.cast(None, BF16) is None
    assert weight_copies.cast(weight, torch.float32) is weight
    assert torch.equal(weight_copies.cast(weight, BF16), weight.to(BF16))
    unwritten = weight_copies.WeightCopy(weight, BF16)
    assert not is_used(weight, unwritten)
    kept = register(weight)
    assert is_used(weight, kept)
    assert weight_copies.cast(weight, torch.float32) is weight
    assert weight_copies.cast(weight, torch.float16).dtype == torch.float16


def changes():
    """Ways in which a weight stops being what its copy was made of."""

    def in_place(weight):
        with torch.no_grad():
            weight.mul_(2.0)

    def load(weight):
        module = nn.Linear(4, 3, bias=False)
        module.weight = weight
        module.load_state_dict({"weight": torch.randn(3, 4)})

    def another_memory(weight):
        weight.data = torch.randn(3, 4)

    def another_shape(weight):
        weight.data = weight.data[:2]

    def by_an_optimiser(weight):
        weight.grad = torch.randn(3, 4)
        torch.optim.SGD([weight], lr=0.1).step()

    return [in_place, load, another_memory, another_shape, by_an_optimiser]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_a_changed_weight_is_cast_again(change):
    weight = parameter(3, 4)
    kept = register(weight)
    change(weight)
    assert not is_used(weight, kept)
    assert torch.equal(weight_copies.cast(weight, BF16), weight.to(BF16))


def test_copies_belong_to_one_tensor_and_die_with_it_or_their_owner():
    weight = parameter(3, 4)
    tensor = register(weight).tensor  # whose owner is gone
    assert weight_copies.cast(weight, BF16) is not tensor
    kept = register(weight)
    assert not is_used(copy.deepcopy(weight), kept)
    assert not is_used(weight.detach(), kept)
    before = len(weight_copies._copies)
    del weight
    gc.collect()
    assert len(weight_copies._copies) == before - 1


def test_a_compiled_graph_holds_no_copy():
    weight = parameter(3, 4)
    x = torch.randn(2, 4)
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", BF16), torch.no_grad():
        for _ in range(2):
            kept = register(weight)
            assert is_used(weight, kept)
            assert torch.equal(compiled(x, weight), ops.linear(x, weight))
            weight.mul_(2.0)


def linear(x, weight, bias):
    return ops.linear(x, weight, bias).float().square().sum()


def mlp(x, w1, b1, w2, b2):
    return ops.mlp(x, w1, b1, w2, b2).float().square().sum()


def linear_cross_entropy(x, weight, bias):
    return ops.linear_cross_entropy(x, weight, torch.arange(x.shape[0]) % 3, bias=bias)


OPS = {
    "linear": (linear, ((5, 8), (6, 8), (6,))),
    "mlp": (mlp, ((5, 8), (16, 8), (16,), (8, 16), (8,))),
    "linear_cross_entropy": (linear_cross_entropy, ((5, 8), (9, 8), (9,))),
}
each_op = pytest.mark.parametrize(("function", "shapes"), OPS.values(), ids=OPS)


@each_op
def test_copies_change_no_bit(function, shapes):
    leaves = [parameter(*shape) for shape in shapes]
    results = []
    for copies in (False, True):
        if copies:
            kept = [register(leaf) for leaf in leaves[1:]]
        with torch.autocast("cpu", BF16):
            loss = function(*leaves)
            without_grad = function(*(leaf.detach() for leaf in leaves))
        results.append((loss, without_grad, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(grad.dtype == torch.float32 for grad in results[0][2:])
    for one in kept:
        one.tensor.zero_()  # unseen by the registry, so whatever uses the copies now finds zeros
    with torch.autocast("cpu", BF16), torch.no_grad():
        loss = function(*leaves)
    expected = torch.tensor(9.0).log() if function is linear_cross_entropy else torch.tensor(0.0)
    torch.testing.assert_close(loss, expected)


@each_op
def test_a_step_between_forward_and_backward_is_an_error(function, shapes):
    """As it is for any saved weight that is changed in place."""
    leaves = [parameter(*shape) for shape in shapes]
    kept = [register(leaf) for leaf in leaves[1:]]
    with torch.autocast("cpu", BF16):
        loss = function(*leaves)
    for one in kept:
        one.tensor.mul_(2.0)
    if function is linear_cross_entropy:  # which has computed its gradients
        loss.backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_op
def test_a_float32_weight_beside_bfloat16_is_an_error_without_autocast(function, shapes):
    x, *weights = [parameter(*shape) for shape in shapes]
    kept = [register(weight) for weight in weights]
    with pytest.raises(TypeError, match="dtypes must match"):
        function(x.to(BF16), *weights)
    assert all(map(is_used, weights, kept))
