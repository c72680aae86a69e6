"""Flat fp32 rows of adapters: row i of W, M, V, G is the adapter in slot i; everything else is a copy of a row."""
