"""Readers of the forms in which people have images."""
