"""`time` and `tune`: samples on a GPU, and what is made of them."""
