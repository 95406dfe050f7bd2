"""Measure which implementation of a convolution is fastest on this GPU: candidates, measurements, table of choices."""
