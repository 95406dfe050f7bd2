"""Losses with their gradients, the divergence's seeds, weight decay, and the record of measures."""
