"""Triton kernels; installed as `fastformer.kernels`, never as a top-level package."""

if __name__ == "kernels":
    # The root of a checkout is on sys.path, and somebody asks for Hugging Face's package of this
    # name: step aside for it, or else be an empty package of a version that nobody accepts.
    import importlib.machinery
    import importlib.util
    import sys
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _root]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:
        __version__ = "0"
