"""Weights that are no plain tensor: masks as bits, one-bit weights, and their file format."""
