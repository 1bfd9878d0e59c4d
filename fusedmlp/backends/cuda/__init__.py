"""The CUDA extension: whether it is there, and a launcher for each of its kernels."""
