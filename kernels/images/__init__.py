"""Operations on images: augmentation, noise, perturbation."""
