"""Members' weights W ∘ r sᵀ and their gradients, all layers in one launch."""
