"""Kernels and their custom operators: one file per operation, read top to bottom from the mathematics to the registration."""
