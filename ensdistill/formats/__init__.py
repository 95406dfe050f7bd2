"""Weights on disk: ours (safetensors), Flax's, PyTorch's."""
