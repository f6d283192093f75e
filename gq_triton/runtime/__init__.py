"""Running packed recognizers without torch, on numpy and the native kernels alone: for devices.

    from gq_triton.runtime import Runner

    runner = Runner.load("model.safetensors")
    print(runner.transcribe("recording.wav"))

    stream = runner.stream(chunk_ms=240)
    for samples in microphone:  # float32, 16 kHz, any number at a time
        print(stream.push(samples))
    print(stream.finish())

``python -m gq_triton.runtime`` does the same from the command line.
"""

from .runner import Runner, Stream

__all__ = ["Runner", "Stream"]
