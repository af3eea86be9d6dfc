"""The making of targets: a teacher's caches, what is kept of them, and both anew in a step."""
