"""What happens to images: augmentation, noise, and perturbation."""
