"""What one does with a trained recognizer: `evaluate`, `convert`, `transcribe` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from tqdm import tqdm

import gq_triton as gq
from gq_triton.files import write_atomically
from gq_triton.pretrained import AN4
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.streaming import Endpointing, StreamingRecognizer
from gq_triton.training.data import SpeechSet
from gq_triton.training.distributed import training_device
from gq_triton.training.evaluation import Evaluation
from gq_triton.training.evaluation import evaluate as measure

from .datasets import data_options, load_utterances
from .output import emit, json_option
from .quantization import allocation, given_options, quantization_options
from .streaming import transcribe_files, transcribe_microphone

__all__ = [
    "convert",
    "evaluate",
    "load_float_recognizer",
    "load_recognizer",
    "recognizer_file",
    "report",
    "transcribe",
]

MODEL = click.argument("model", type=click.Path(path_type=Path))
BEAM = click.option(
    "--beam", "beam_width", type=click.IntRange(min=1), default=1, show_default=True, help="beam width; 1 is greedy"
)


def recognizer_file(path: Path) -> Path:
    """A recognizer's file, given itself or as the folder of the run that trained it."""
    return path / "recognizer.safetensors" if path.is_dir() else path


def load_recognizer(path: Path) -> Recognizer:
    """Reads a recognizer from its file, or from the folder of the run that trained it; its model goes to the GPU."""
    recognizer = Recognizer.load(recognizer_file(path))
    recognizer.model.to(training_device())
    return recognizer


def load_float_recognizer(path: Path) -> Recognizer:
    """:func:`load_recognizer`; raises click.UsageError where it is quantized."""
    recognizer = load_recognizer(path)
    if recognizer.stage != "float":
        raise click.UsageError(f"{path} is {recognizer.stage} already; a float recognizer is needed")
    return recognizer


@click.command()
@MODEL
@data_options
@BEAM
@click.option(
    "--hypotheses",
    type=click.Path(path_type=Path, dir_okay=False),
    help="also write id, reference and hypothesis as a TSV file",
)
@json_option
def evaluate(
    model: Path,
    data: str,
    root: Path | None,
    splits: Sequence[str],
    beam_width: int,
    hypotheses: Path | None,
    as_json: bool,
) -> None:
    """Word error rate of MODEL, with its 95 % interval; a model from `qat` is measured packed."""
    recognizer = load_recognizer(model)
    utterances = load_utterances(data, root, splits, training=False)
    speech = SpeechSet(utterances, recognizer.front_end, recognizer.tokenizer)
    result = measure(recognizer, speech, beam_width=beam_width)
    if hypotheses:
        write_hypotheses(hypotheses, speech, result)
    low, high = result.interval
    text = (
        f"WER {100 * result.wer:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f}) "
        f"on {result.utterances} utterances, {result.words} words; "
        f"{result.audio_seconds / result.seconds:.0f} times real time"
    )
    emit(result.to_dict(), text, as_json)


def write_hypotheses(path: Path, speech: SpeechSet, result: Evaluation) -> None:
    rows = zip(speech.utterances, result.hypotheses, strict=True)
    lines = [f"{utterance.id}\t{utterance.text}\t{hypothesis}" for utterance, hypothesis in rows]
    text = "\n".join(["id\treference\thypothesis", *lines]) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@click.command()
@MODEL
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="file to write")
@quantization_options
@json_option
def convert(
    model: Path,
    output: Path,
    as_json: bool,
    **quantization,
) -> None:
    """Pack the weights of MODEL into a self-contained file.

    A model from `qat` keeps what it was trained for; a float one is quantized without training, as --bits and --layer
    or --config, and the options beside them, say.
    """
    recognizer = load_recognizer(model)
    if recognizer.stage == "packed":
        raise click.UsageError(f"{model} is packed already")
    if recognizer.stage == "qat" and (given := given_options()):
        raise click.UsageError(f"{model} keeps what it was trained for: {', '.join(given)} does not go with it")
    if recognizer.stage == "float":
        recognizer.prepare(allocation(**quantization))
    recognizer.convert().save(output)
    sizes = gq.report(recognizer.model)
    size, ratio = sizes.packed_bytes, sizes.ratio
    result = {"file": str(output), "bytes": size, "file_bytes": output.stat().st_size, "ratio": ratio}
    emit(result, f"{output}: {size:,} bytes of weights, {ratio:.2f} times smaller than float32", as_json)


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=AN4,
    help="recognizer: a file or a run's folder  [default: one for letters and numbers, which comes with gq-triton]",
)
@BEAM
@click.option("--stream", is_flag=True, help="decode in chunks and print texts as they grow; with --json, a line each")
@click.option("--microphone", is_flag=True, help="stream what the microphone hears, until Ctrl-C, in place of FILES")
@click.option("--chunk-ms", type=click.IntRange(min=1), help="of a stream, decoded at a time  [default: 240]")
@click.option("--endpointing", is_flag=True, help="end a stream's segments where nothing is said for a while")
@json_option
def transcribe(
    files: Sequence[Path],
    model: Path,
    beam_width: int,
    stream: bool,
    microphone: bool,
    chunk_ms: int | None,
    endpointing: bool,
    as_json: bool,
) -> None:
    """Transcribe audio FILES of any rate and format that soundfile reads, or what the microphone hears.

    What cannot be read is named at the end, and the others are transcribed all the same.
    """
    if microphone == bool(files):
        raise click.UsageError("either FILES or --microphone is needed")
    if (chunk_ms or endpointing) and not (stream or microphone):
        raise click.UsageError("--chunk-ms and --endpointing go with --stream or --microphone")
    recognizer = load_recognizer(model)
    if recognizer.stage == "qat":
        recognizer.convert()
    if not (stream or microphone):
        _transcribe(files, recognizer, beam_width, as_json)
        return
    rules = Endpointing() if endpointing else None
    streaming = StreamingRecognizer(recognizer, chunk_ms=chunk_ms or 240, beam_width=beam_width, endpointing=rules)
    if microphone:
        transcribe_microphone(streaming, as_json)
    else:
        transcribe_files(streaming, files, as_json)


def _transcribe(files: Sequence[Path], recognizer: Recognizer, beam_width: int, as_json: bool) -> None:
    bar = tqdm(files, desc="transcribing", unit="file", leave=False, disable=len(files) == 1)
    result, failures = [], []
    for file in bar:
        try:
            result.append({"file": str(file), "text": recognizer.transcribe(file, beam_width=beam_width)})
        except (OSError, ValueError) as error:
            failures.append(str(error))
    if result:
        lines = [row["text"] if len(files) == 1 else f"{row['file']}: {row['text']}" for row in result]
        emit(result, "\n".join(lines), as_json)
    if failures:
        raise click.ClickException("\n".join(failures))


@click.command()
@MODEL
@json_option
def report(model: Path, as_json: bool) -> None:
    """Bits, parameters and bytes of every layer of MODEL, and in total."""
    result = gq.report(load_recognizer(model).model)
    emit(result.to_dict(), str(result), as_json)
