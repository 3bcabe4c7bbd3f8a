"""Two numbers of the definition of dropout (`fastformer/ops/dropout.py`), for every layer."""


def dropout_threshold(dropout_p: float) -> int:
    """The 16-bit number below which an element is dropped."""
    return min(65535, round(dropout_p * 65536))


def dropout_scale(dropout_p: float) -> float:
    """The factor of kept elements: the inverse of the exact probability of being kept."""
    return 65536 / (65536 - dropout_threshold(dropout_p))
