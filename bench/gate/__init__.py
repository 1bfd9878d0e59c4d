"""The ahead-of-time gate: every kernel compiled, without a GPU, and looked into."""
