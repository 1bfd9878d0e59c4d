"""What `auto` runs on CPU tensors where the formula of fusedmlp/reference would cost more than it
has to: the same mathematics in PyTorch's operations, tested against that formula."""
