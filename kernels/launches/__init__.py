"""How each launcher is called at given sizes, one file a family: what the gate compiles and the
tile search times. Rows of kernels name them."""
