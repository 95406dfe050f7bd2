"""The weight gradient of a member-batched convolution: the operation and its kernels."""
