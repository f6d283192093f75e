"""Recognizers that come with the package, packed: trained by the project, measured in the README.

``AN4`` is the path of a streaming RNN transducer that spells and counts: letters, numbers and a few commands in
American English, trained on synthetic voices and then on the 42 minutes of CMU's AN4 database. Its 2.9 million weights
have 2 bits each; ``benchmarks/recognition.py --data an4`` trains it anew, and its word error rate is in that record.
"""

from pathlib import Path

__all__ = ["AN4"]

AN4 = Path(__file__).parent / "an4.safetensors"
