"""A model with its data and optimiser, ready to train or to infer: ours and every rival.

The products of its linear layers alone are one more variant, the bound that no step can beat
while it leaves the products to the same libraries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastformer
from benchmarks.cases import TrainingCase
from benchmarks.harness import OURS, compiled
from benchmarks.library_models import (
    LIBRARIES,
    Classifier,
    HuggingFace,
    gradients,
    library_model,
)
from benchmarks.rivals import Rival, load_ours, plain_names
from fastformer.transformer import ImageConfig, TextConfig


@dataclass(frozen=True)
class Variant:
    """One way to run a model: whose, in which precision, compiled or not."""

    kind: str  # "ours", "naive", "eager", "gemm" or one of LIBRARIES
    dtype: torch.dtype = torch.float32
    compile: bool = False

    @property
    def is_rival(self) -> bool:
        return self.kind in ("naive", "eager") or self.is_library

    @property
    def is_library(self) -> bool:
        return self.kind in LIBRARIES


def _variants() -> dict[str, Variant]:
    kinds = {
        OURS: ("ours", False),
        "naive": ("naive", False),
        "eager": ("eager", False),
        "compile-naive": ("naive", True),
        "compile-eager": ("eager", True),
        **{library: (library, False) for library in LIBRARIES},
        "gemm": ("gemm", False),
    }
    both = ((torch.float32, ""), (torch.bfloat16, "-bf16"))
    variants = {
        name + suffix: Variant(kind, dtype, compile)
        for name, (kind, compile) in kinds.items()
        for dtype, suffix in both
    }
    del variants["hugging-face-flash-attn"]  # flash-attn takes no float32
    return variants


VARIANTS = _variants()


def _optimizer(variant: Variant, model: nn.Module) -> torch.optim.Optimizer:
    """Torch's default for naive code, its fused one for experts, ours with copies for autocast."""
    if variant.kind == "ours":
        copies = torch.bfloat16 if variant.dtype == torch.bfloat16 else None
        fused = next(model.parameters()).is_cuda or None  # there the step is torch's
        return fastformer.AdamW(
            model.parameters(), lr=1e-4, fused=fused, low_precision_copies=copies
        )
    return torch.optim.AdamW(
        model.parameters(), lr=1e-4, fused=None if variant.kind == "naive" else True
    )


class Trainer:
    """One variant with its batch; `step` trains it once, `infer` returns the logits."""

    def __init__(
        self,
        variant: Variant,
        case: TrainingCase,
        *,
        dropout: float = 0.0,
        learns: bool = True,
        device: str = "cpu",
    ) -> None:
        self.variant, self.dropout, self.device = variant, dropout, device
        with torch.device(device):
            ours = case.model(dropout)
            self.batch = case.batch()
            self.model: nn.Module = ours
            if variant.is_library:
                weights = dict(ours.named_parameters())
                self.model = library_model(variant.kind, case.kind, ours.config, weights)
            elif variant.kind != "ours":
                self.model = Rival(ours.config, naive=variant.kind == "naive")
                load_ours(self.model, ours.state_dict())
        self.model.train(learns)
        self.optimizer = _optimizer(variant, self.model) if learns else None
        self._call = compiled(self.model) if variant.compile else self.model
        lengths = self.batch.key_lengths
        self._options = {} if lengths is None else {"key_lengths": lengths}

    def _run(self, *inputs: Tensor) -> Tensor:
        bfloat16 = self.variant.dtype == torch.bfloat16
        with torch.autocast(self.device, torch.bfloat16, enabled=bfloat16):
            return self._call(*inputs, **self._options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self._run(self.batch.inputs, self.batch.targets).backward()
        self.optimizer.step()

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self._run(self.batch.inputs)

    def first_step(self) -> dict[str, Tensor]:
        """The loss and the gradients of all matrices, under the names of the naive model.

        No weight moves. Dropout is off, since every variant draws masks of its own.
        """
        if self.dropout:
            self.model.eval()
        loss = self._run(self.batch.inputs, self.batch.targets)
        loss.backward()
        if isinstance(self.model, HuggingFace | Classifier):
            grads = gradients(self.model)
        else:
            grads = {n: p.grad for n, p in self.model.named_parameters()}
        grads = {name: grad for name, grad in grads.items() if grad.dim() > 1}
        self.model.train().zero_grad()
        return {"loss": loss.detach()} | plain_names(grads, split_qkv=True)


class LinearProducts:
    """The matrix products of a model's linear layers alone, each in the best case for its library:
    contiguous operands of one dtype, results written to memory that exists.

    Forward, and for a training step the gradients of input and weight; the head on the counted rows
    only. The patches of an image are a linear layer whose input has no gradient.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        case: TrainingCase,
        *,
        learns: bool = True,
        device: str = "cpu",
    ) -> None:
        self.learns, self.layers = learns, []
        buffers: dict[tuple[int, int], Tensor] = {}

        def buffer(*shape: int) -> Tensor:
            # Activations of one shape share memory; weights do not, as in a model.
            if shape not in buffers:
                buffers[shape] = torch.randn(shape, device=device).to(dtype)
            return buffers[shape]

        for rows, inputs, outputs, input_learns in linear_layers(case, learns):
            weight = torch.randn(outputs, inputs, device=device).to(dtype)
            grad_weight = torch.empty_like(weight) if learns else None
            grad_x = torch.empty_like(buffer(rows, inputs)) if input_learns else None
            x, out = buffer(rows, inputs), buffer(rows, outputs)
            self.layers.append((x, weight, out, grad_x, grad_weight))

    def run(self) -> None:
        for x, weight, out, _, _ in self.layers:
            torch.mm(x, weight.t(), out=out)
        if not self.learns:
            return
        for x, weight, out, grad_x, grad_weight in reversed(self.layers):
            if grad_x is not None:
                torch.mm(out, weight, out=grad_x)
            torch.mm(out.t(), x, out=grad_weight)


def linear_layers(case: TrainingCase, learns: bool = True) -> list[tuple[int, int, int, bool]]:
    """(rows, inputs, outputs, whether the input has a gradient) of each linear layer."""
    config, N, C = case.config, case.B * case.T, case.C
    layers = []
    if isinstance(config, ImageConfig):
        patches = case.B * (case.T - 1)
        layers.append((patches, config.channels * config.patch_size**2, C, False))
    for _ in range(config.layers):
        layers += [(N, C, 3 * C, learns), (N, C, C, learns)]
        layers += [(N, C, config.hidden_dim, learns), (N, config.hidden_dim, C, learns)]
    batch = case.batch()
    rows = int(batch.counted.sum()) if learns else N
    if isinstance(config, TextConfig) and config.head_transform:
        layers.append((rows, C, C, learns))
    layers.append((case.B if case.kind == "vit" else rows, C, case.V, learns))
    return layers
