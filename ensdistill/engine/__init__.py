"""Networks over the kernels: their structure, frozen and training passes, and who computes each operation."""
