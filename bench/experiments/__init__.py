"""Layers trained: mlp_utils' toy task, and a small language model. Needs a checkout."""
