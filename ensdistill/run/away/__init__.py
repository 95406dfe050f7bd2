"""Networks away from their training data: corrupted images, and images of something else."""
