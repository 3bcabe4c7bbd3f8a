"""AdamW against torch's, and the copies it keeps against casts."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from fastformer import AdamW, _library, backend, ops
from fastformer.ops import weight_copies

BF16 = torch.bfloat16
SHAPES = ((300, 127), (50,), (3, 3, 5), (1,), (0, 4), (70_001,), ())
BACKENDS = ["reference"] + ["cpu"] * (_library.WHY_NOT is None)


def parameters(**options):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(**options)) for s in SHAPES]


def groups(params):
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 3e-3}]


def train(optimiser, steps=20, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimiser.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimiser.step()


def assert_within_ulps(found, expected, count=8):
    """Equal within `count` roundings of numbers as large as the largest."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if other.numel():
            allowed = count * torch.finfo(other.dtype).eps * other.abs().max().clamp_min(1e-3)
            assert (one - other).abs().max() <= allowed


def states(optimiser, params, key):
    return [optimiser.state[p][key] for p in params]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("copies", [None, BF16], ids=["plain", "copies"])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)], ids=str)
def test_twenty_steps_equal_torch(name, betas, copies):
    ours, theirs = parameters(), parameters()
    with backend(name):
        found = AdamW(groups(ours), betas=betas, low_precision_copies=copies)
        train(found)
    expected = torch.optim.AdamW(groups(theirs), betas=betas, fused=True)
    train(expected)
    assert_within_ulps(ours, theirs)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert_within_ulps(states(found, ours, key), states(expected, theirs, key))


@pytest.mark.skipif(_library.WHY_NOT is not None, reason=str(_library.WHY_NOT))
def test_threads_do_not_show_in_the_bits(threads):
    found = []
    for count in (1, 2, 5):
        threads(count)
        params = parameters()
        optimiser = AdamW(params, low_precision_copies=BF16)
        train(optimiser, steps=3)
        found.append([*params, *states(optimiser, params, "exp_avg_sq")])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_state_moves_between_torch_and_ours():
    """In both directions, in the middle of a run."""
    for first, second in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)):
        params, steady = parameters(), parameters()
        begin = first(groups(params))
        train(begin, steps=5)
        end = second(groups(params))
        end.load_state_dict(begin.state_dict())
        train(end, steps=5, seed=3)
        expected = torch.optim.AdamW(groups(steady))
        train(expected, steps=5)
        train(expected, steps=5, seed=3)
        assert_within_ulps(params, steady)
        assert end.state_dict().keys() == expected.state_dict().keys()
        assert end.state_dict()["param_groups"] == expected.state_dict()["param_groups"]


OTHERS = {
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "tensor-lr": {"lr": torch.tensor(1e-2)},
    "float64": {},
    "strided": {},
    "one-of-many": {},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_the_kernel_cannot_do_is_done_by_torch(case):
    def make():
        params = parameters(dtype=torch.float64 if case == "float64" else torch.float32)
        if case == "strided":
            params[0] = nn.Parameter(params[0].detach().t())
        if case == "one-of-many":
            params[1] = nn.Parameter(params[1].detach().double())
        return params

    ours, theirs = make(), make()
    options = {"lr": 1e-2, "foreach": False} | OTHERS[case]
    train(AdamW(ours, **options, low_precision_copies=BF16))
    train(torch.optim.AdamW(theirs, **options))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_wrong_dtype_of_copies_is_an_error():
    with pytest.raises(ValueError, match=r"low_precision_copies must be .* got torch.float16"):
        AdamW(parameters(), low_precision_copies=torch.float16)


def test_parameters_without_a_gradient_are_left_alone():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimiser = AdamW(params, low_precision_copies=BF16)
    optimiser.step()
    params[1].grad = torch.ones(50)
    optimiser.step()
    changed = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert changed == [i == 1 for i in range(len(params))]


def test_a_strided_gradient_is_read_in_order():
    ours, theirs = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    for p, optimiser in ((ours, AdamW([ours])), (theirs, torch.optim.AdamW([theirs]))):
        p.grad = torch.arange(24.0).view(6, 4).t()
        optimiser.step()
    assert_within_ulps([ours], [theirs])


def test_closure_and_hooks_run_once():
    for options in ({}, {"maximize": True}):
        torch.optim.AdamW(parameters())  # wraps torch's own step in a runner of hooks
        params, calls = parameters(), []
        optimiser = AdamW(params, **options)
        optimiser.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimiser.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))

        def closure(params=params, optimiser=optimiser, calls=calls):
            calls.append("closure")
            optimiser.zero_grad()
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        expected = sum(p.detach().square().sum() for p in params)
        assert torch.equal(optimiser.step(closure), expected)
        assert calls == ["before", "closure", "after"]


def test_a_step_after_forward_is_seen_by_autograd():
    weight = nn.Parameter(torch.randn(3, 4))
    optimiser = AdamW([weight])
    loss = (torch.randn(2, 4, requires_grad=True) @ weight.t()).sum()
    weight.grad = torch.ones(3, 4)
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def is_copied(weight):
    found = weight_copies.cast(weight, BF16)
    assert torch.equal(found, weight.detach().to(BF16))
    return found is weight_copies.cast(weight, BF16)


def test_copies_follow_their_masters():
    params = parameters()
    optimiser = AdamW(params, low_precision_copies=BF16)
    assert not any(map(is_copied, params))
    for _ in range(3):
        train(optimiser, steps=1)
        assert [is_copied(p) for p in params] == [p.dim() >= 2 for p in params]
    # A load makes them stale, the next step fresh again.
    with torch.no_grad():
        params[0].copy_(torch.randn(300, 127))
    assert not is_copied(params[0])
    train(optimiser, steps=1)
    assert is_copied(params[0])
    # A step that torch takes, with or without autograd's knowledge.
    optimiser.param_groups[0].update(maximize=True, fused=True)
    train(optimiser, steps=1)
    assert not any(map(is_copied, params))
    optimiser.param_groups[0].update(maximize=False)
    train(optimiser, steps=1)
    assert is_copied(params[0])
    # Another optimiser may go on when this one is gone.
    del optimiser
    gc.collect()
    assert not any(map(is_copied, params))


def test_the_choice_of_copies_survives_a_round_trip():
    params = parameters()
    optimiser = AdamW(params, low_precision_copies=BF16)
    train(optimiser, steps=1)
    for twin in (copy.deepcopy(optimiser), pickle.loads(pickle.dumps(optimiser))):
        weight = twin.param_groups[0]["params"][0]
        assert not is_copied(weight)
        train(twin, steps=1)
        assert is_copied(weight)
    assert is_copied(params[0])


def test_copies_change_no_bit_of_a_run():
    def run(copies):
        torch.manual_seed(0)
        w1, b1, w2, b2 = (
            nn.Parameter(torch.randn(s) / 4) for s in ((32, 16), (32,), (16, 32), (16,))
        )
        head = nn.Parameter(torch.randn(50, 16))
        optimiser = AdamW([w1, b1, w2, b2, head], lr=1e-2, low_precision_copies=copies)
        losses = []
        for _ in range(5):
            x, targets = torch.randn(40, 16), torch.randint(50, (40,))
            with torch.autocast("cpu", BF16):
                x = ops.mlp(ops.linear(x, w2.t()[:16], b2), w1, b1, w2, b2)
                loss = ops.linear_cross_entropy(x, head, targets)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses), w1, b1, w2, b2, head

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(BF16), strict=True))


def test_a_compiled_step_equals_torch():
    params, theirs = ([nn.Parameter(torch.ones(5, 3))] for _ in range(2))
    for ps, cls in ((params, AdamW), (theirs, torch.optim.AdamW)):
        optimiser = cls(ps, lr=1e-2)
        step = torch.compile(optimiser.step, backend="aot_eager")
        for number in range(3):
            ps[0].grad = torch.full((5, 3), 1.0 + number)
            step()
    assert_within_ulps(params, theirs)
