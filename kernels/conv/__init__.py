"""Member-batched convolutions: forward, input gradient, weight gradient, and the forms of their kernels."""
