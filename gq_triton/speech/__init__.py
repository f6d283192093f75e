"""Speech recognition around the quantizer: audio, features, tokens, datasets and error rates.

Import from the modules, such as ``from gq_triton.speech.features import LogMel``. Packages beyond torch and numpy come
with the extra ``gq_triton[speech]`` and are imported where they are first needed.
"""
