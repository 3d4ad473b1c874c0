"""Operators: one file each, with the formula, its source and the pure torch reference."""
