"""Costs of a run, predicted: time, memory, and the floor that no program goes below."""
