"""Which implementation runs, how ops are registered with torch, and the CUDA extension."""
