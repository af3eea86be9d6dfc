"""What a pipeline will cost, and whether it can run at all, before anything runs."""
