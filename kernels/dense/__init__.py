"""Gated and plain linears, and the elementwise gate."""
