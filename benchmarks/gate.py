"""No figure without a correct result: what has to be passed before anything is timed.

An op obeys the rule of numerics of the tests: no output and no gradient may be further from float64
than twice the error of eager PyTorch in the same dtype, plus 1e-6. A model's first step, ours or a
rival's, is compared with that of the naive model in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]

# Relative distance (in the 2-norm) of a model's loss, logits and gradients from those of the naive
# float32 model. In bfloat16 the gradients of queries and keys are the noisiest, at 0.055.
TOLERANCE = {
    torch.float32: {"loss": 1e-5, "logits": 1e-4, "gradient": 1e-3},
    torch.bfloat16: {"loss": 2e-3, "logits": 5e-2, "gradient": 0.1},
}


class WrongResult(Exception):
    """A variant does not compute what it should, so its speed means nothing."""


def _evaluate(
    function: Function, values: dict[str, Tensor], upstream: list[Tensor]
) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    outputs = function(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    torch.autograd.backward(outputs, grads)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"gradient of {n}": leaf.grad for n, leaf in leaves.items()}  # type: ignore


def _error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0


class OpGate:
    """What an op computes in float64, and how far from it eager PyTorch is."""

    def __init__(self, eager: Function, values: dict[str, Tensor], upstream: list[Tensor]) -> None:
        self._values, self._upstream = values, upstream
        doubled = {name: value.double() for name, value in values.items()}
        self._exact = _evaluate(eager, doubled, upstream)
        found = _evaluate(eager, values, upstream)
        self._errors = {name: _error(found[name], exact) for name, exact in self._exact.items()}

    def check(self, function: Function, factor: float = 2.0) -> None:
        """Raise WrongResult if `function` errs by more than `factor` times what eager does."""
        found = _evaluate(function, self._values, self._upstream)
        for name, expected in self._exact.items():
            error, allowed = _error(found[name], expected), factor * self._errors[name] + 1e-6
            if not error <= allowed:
                raise WrongResult(f"{name}: error {error:.3g}, allowed {allowed:.3g}")


def check_close(found: dict[str, Tensor], true: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise WrongResult unless `found` ("loss", "logits", gradients) agrees with naive float32."""
    for name, expected in true.items():
        kind = name if name in ("loss", "logits") else "gradient"
        distance = ((found[name] - expected).norm() / expected.norm()).item()
        allowed = TOLERANCE[dtype][kind]
        if not distance <= allowed:
            label = f"gradient of {name}" if kind == "gradient" else name
            raise WrongResult(
                f"{label}: relative distance {distance:.2g} from naive float32,"
                f" allowed {allowed:.2g}"
            )
