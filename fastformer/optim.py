"""AdamW that updates every parameter in one pass over memory, with bfloat16 copies if asked for.

The copies spare autocast its casts: see `fastformer.ops.weight_copies`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastformer.ops.adamw import adamw_step
from fastformer.ops.weight_copies import WeightCopy

# Settings of a group that the kernel does not know.
_FOREIGN = ("amsgrad", "maximize", "capturable", "differentiable")


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, whose arguments and state_dict it has, with a kernel of its own on CPUs.

    The kernel updates contiguous float32 parameters on the CPU; when any parameter is another,
    or amsgrad, maximize, capturable, differentiable, a Tensor as a setting or a GradScaler is in
    use, torch's own implementation takes the step.

    low_precision_copies: torch.bfloat16 keeps such a copy of every matrix, written in the same
    pass, which ops under torch.autocast then use in place of a cast, with the same bits. With
    copies, do not change parameters behind autograd's back: writes through `parameter.data`, and
    steps of torch's fused optimisers while this one lives, go unnoticed until its next step.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        low_precision_copies: torch.dtype | None = None,
    ) -> None:
        if low_precision_copies not in (None, torch.bfloat16):
            raise ValueError(
                "AdamW: low_precision_copies must be torch.bfloat16 or None,"
                f" got {low_precision_copies}"
            )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._copy_dtype = low_precision_copies
        self._copies: dict[Tensor, WeightCopy] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_copy_dtype": self._copy_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._copies = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure`, if given, computes the loss anew, which is returned."""
        if torch.compiler.is_compiling():
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if not self._step_in_one_pass():
                self._copies.clear()
                # Past the wrapper around torch's own step, which would run the hooks a second time.
                inspect.unwrap(torch.optim.AdamW.step)(self)
        return loss

    def _step_in_one_pass(self) -> bool:
        """Run the kernel on all parameters, or return False when it does not suit them all."""
        if hasattr(self, "found_inf"):  # set by a GradScaler for the time of a step
            return False
        work = []
        for group in self.param_groups:
            settings: dict[str, Any] = {name: group[name] for name in ("lr", "eps", "weight_decay")}
            settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
            if any(group[name] for name in _FOREIGN):
                return False
            if any(map(torch.is_tensor, settings.values())):
                return False
            lists: list[list[Tensor]] = [[] for _ in range(5)]
            params, grads, exp_avgs, exp_avg_sqs, steps = lists
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            written = (*params, *exp_avgs, *exp_avg_sqs)
            if not all(map(_is_plain, (*grads, *written))):
                return False
            if not all(t.is_contiguous() for t in written):
                return False
            work.append((lists, settings))
        for lists, settings in work:
            self._run_kernel(lists, settings)
        return True

    def _run_kernel(self, lists: list[list[Tensor]], settings: dict[str, Any]) -> None:
        wanted = [self._copy_dtype is not None and p.dim() >= 2 for p in lists[0]]
        for with_copy in (True, False):
            if with_copy not in wanted:
                continue
            chosen = [
                [t for t, wants in zip(tensors, wanted, strict=True) if wants == with_copy]
                for tensors in lists
            ]
            copies = [self._copy_of(p) for p in chosen[0]] if with_copy else []
            adamw_step(*chosen, copies=[copy.tensor for copy in copies], **settings)
            for copy, param in zip(copies, chosen[0], strict=False):
                copy.is_written(param)

    def _copy_of(self, param: Tensor) -> WeightCopy:
        copy = self._copies.get(param)
        if copy is None or copy.tensor.shape != param.shape:
            assert self._copy_dtype is not None
            copy = self._copies[param] = WeightCopy(param, self._copy_dtype)
        return copy


def _is_plain(t: Tensor) -> bool:
    return type(t) in (nn.Parameter, Tensor) and t.is_cpu and t.dtype == torch.float32
