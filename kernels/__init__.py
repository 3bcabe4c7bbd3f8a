"""Triton kernels; installed as `fastformer.kernels`, never as a top-level package."""

if __name__ == "kernels":
    # The root of a checkout is on sys.path. Do not pose as Hugging Face's `kernels` package, which
    # other libraries try to import.
    raise ImportError(
        "this folder is fastformer.kernels; the package `kernels` itself is not installed here"
    )
