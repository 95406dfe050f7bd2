"""The operations of the step, one a file: formula, shapes, bytes and FLOPs, and the plain PyTorch definition."""
