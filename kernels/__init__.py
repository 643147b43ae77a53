"""Hold the Triton kernels, one file per op; import them as `opensora.kernels` alone."""

if __name__ != "opensora.kernels":
    raise ImportError(
        f"this folder is the package opensora.kernels, not {__name__!r}: leave the repository's "
        "root, or put its parent behind site-packages on the path, to import another `kernels`"
    )
