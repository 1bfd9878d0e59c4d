"""Forward products by CUTLASS's collectives: whether they are there, and their launchers."""
