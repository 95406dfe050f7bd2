"""PyTorch's modules as a step asks them: their passes, and trials of capturing and compiling these."""
