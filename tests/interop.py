"""Libraries that some tests compare with, and that may be absent."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch


def optional(name: str) -> ModuleType:
    """Import a library that may be absent, beside a torch that it was not built for."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")
    if importlib.util.find_spec("torchvision") is not None and "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            # Its C++ ops do not load under another build of torch. No model here uses them.
            for op in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{op}", schema)
            importlib.import_module("torchvision")
    return importlib.import_module(name)
