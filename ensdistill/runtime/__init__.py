"""The process and its machine: environment, files, errors, ranks, signals, streams."""
