"""Kernels of the convolutions, by how they load what they read: pointers, boxes, rows of images, programs that stay."""
