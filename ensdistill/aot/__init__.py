"""Compile the kernels ahead of time, without a GPU: `python -m ensdistill.aot`."""
