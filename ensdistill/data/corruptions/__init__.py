"""Corrupted images at five severities: made here of any data (`made`), or read as CIFAR-10-C has them (`stored`)."""
