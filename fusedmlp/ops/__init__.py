"""One file per op: shape rule, registered ops, autograd Function, public function."""
