"""`python -m gq_triton.cli`, which is also what torchrun starts: `torchrun -m gq_triton.cli train ...`."""

from .main import main

main()
