"""The masked gated linear (FlashMGLU)."""
