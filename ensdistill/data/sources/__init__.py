"""Readers: the forms in which people have images."""
