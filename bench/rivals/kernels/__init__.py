"""A published kernel of a rival, for timing beside ours."""
