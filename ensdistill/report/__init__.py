"""The report of a run: one HTML file, drawn from the run folder alone."""
