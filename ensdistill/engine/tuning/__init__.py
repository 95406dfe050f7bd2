"""Which implementation of an operation is fastest on this GPU: candidates, measurements, and the table of choices."""
