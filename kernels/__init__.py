"""Kernels and their custom operators: one file per operation, from the mathematics down to the registration."""
