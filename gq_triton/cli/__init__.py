"""The command line `gq-triton`."""
