"""One-bit weights."""
