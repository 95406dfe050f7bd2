"""One training: the step, its optimizer, its capture as a CUDA graph, the loop and its checkpoints."""
