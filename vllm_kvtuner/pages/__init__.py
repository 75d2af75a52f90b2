"""Packed pages: their bytes, the codes in them, and the transforms before them."""
