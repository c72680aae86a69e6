"""What a new adapter starts from when that depends on the base: factors, first rows, residual bases."""
