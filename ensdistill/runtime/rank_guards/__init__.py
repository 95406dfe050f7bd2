"""Faults of a run of several processes: one that is silent, and ones that were started with something else."""
