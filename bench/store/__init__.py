"""What the store does, against the ways in which others do it."""
