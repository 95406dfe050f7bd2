"""Choices of a user: the configuration, the methods, the recipes."""
