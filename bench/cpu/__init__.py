"""What layers and experts cost on a CPU, beside what others compute the same with."""
