"""Training: the loop, its tasks and its data. Needs the extra `fastformer[train]`."""

from fastformer.train.config import RunError, TrainConfig, default_config
from fastformer.train.loop import train

__all__ = ["RunError", "TrainConfig", "default_config", "train"]
