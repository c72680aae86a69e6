"""Linear layers that add the low-rank update of each token's own adapter."""
