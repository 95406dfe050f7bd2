"""The operations of the step, one a file: formula, shapes, bytes and FLOPs, plain PyTorch definition, Triton kernel."""
