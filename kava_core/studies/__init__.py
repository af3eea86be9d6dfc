"""Studies: one pipeline run with many seeds and settings, and what all of that says together."""
