"""Writes the README's tables from committed records, so that no figure in it is typed by hand.

    python plots/readme.py

Fills what lies between `<!-- table RECORD -->` and `<!-- end -->`, RECORD being the path of a benchmark's record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from studies import complete

from gq_triton.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
QUANTIZERS = {
    "gq": "GQ",
    "gq kernel": "of it, without building tables",
    "plain": "plain form",
    "plain compiled": "plain form, torch.compile",
    "lsq": "LSQ",
    "lsq compiled": "LSQ, torch.compile",
    "torchao": "torchao",
    "torchao compiled": "torchao, torch.compile",
    "uniform": "uniform, straight through",
}
LINEARS = {
    "torch": "dense",
    **{f"gq/{bits}": f"GQ, {bits} {'bit' if bits == 1 else 'bits'}" for bits in (8, 4, 2, 1)},
    "gq int8/8": "GQ, 8 bits, int8 activations",
    "gq int8/4": "GQ, 4 bits, int8 activations",
    "gq fp8/4": "GQ, 4 bits, fp8 activations",
    "torch int8/8": "torch int8",
    "torch int4/4": "torch int4",
    "gemlite int4/4": "gemlite int4",
    "bitsandbytes nf4/4": "bitsandbytes NF4",
}
LINEAR_MODES = {"turns": "", "cold": ", cold L2 cache", "warm graph": ", warm L2 cache, CUDA graph"}
LINEAR_TOKENS = (1, 16, 256)
CPU_LAYERS = {
    **{f"gq int8/{bits}": f"GQ, {bits} bits, int8 activations" for bits in (8, 5, 4, 3, 2)},
    "gq int8/1": "GQ, 1 bit, int8 activations",
    **{f"gq/{bits}": f"GQ, {bits} bits" for bits in (8, 4)},
    "torch fp32/32": "torch float32",
    "torch bf16/16": "torch bfloat16",
    "torch int8/8": "torch dynamic int8",
    "torch int4/4": "torch int4",
    "onnxruntime int8/8": "onnxruntime dynamic int8",
    "onnxruntime nbits/4": "onnxruntime MatMulNBits, 4 bits",
    "onnxruntime nbits/2": "onnxruntime MatMulNBits, 2 bits",
}
CPU_COLUMNS = (  # what cases of benchmarks/cpu_kernels.py are shown, as far as they were measured
    {"op": "linear", "place": "L2"},
    {"op": "linear", "place": "cache", "n": 4096, "k": 1024},
    {"op": "linear", "place": "memory"},
    {"op": "lstm", "n": 1024, "k": 1024},
)
CPU_PLACES = {"L2": "one", "cache": "{} in a cache", "memory": "out of memory"}
STREAMING_PEERS = {"torch fp32": "torch, float32", "torch bf16": "torch, bfloat16", "torch int8": "torch, dynamic int8"}
STEPS = {"float": "float", "gq": "GQ", "torchao": "torchao, linear layers only", "plain": "GQ in the plain form"}


def main() -> None:
    """Rewrite the README."""
    readme = ROOT / "README.md"
    text = filled(readme.read_text())
    write_atomically(readme, lambda temporary: temporary.write_text(text))


def filled(text: str) -> str:
    """The text with every table drawn anew."""
    return TABLE.sub(lambda match: match[1] + table(ROOT / match[2]) + match[3], text)


def table(path: Path) -> str:
    """A record as a Markdown table, with what it was measured on below it."""
    tables = {
        "quantizer": quantizer_table,
        "training_step": training_step_table,
        "packed_linear": packed_linear_table,
        "cpu_kernels": cpu_kernels_table,
        "streaming": streaming_table,
        "accuracy_an4-rnnt": accuracy_table,
        "accuracy_an4-conformer": accuracy_table,
    }
    return tables.get(path.stem, recognition_table)(json.loads(path.read_text()))


def recognition_table(record: dict) -> str:
    """Of benchmarks/recognition.py."""
    float_model, test = record["float"], record["test"]
    lines = [
        "| weights | WER, post-training quantization | WER, GQ training | bytes | times smaller |",
        "| --- | --- | --- | --- | --- |",
        f"| float32 | | {_percent(float_model['wer'], float_model['interval'])} | {float_model['bytes']:,} | 1.0 |",
    ]
    for row in record["rows"]:
        untrained = _percent(row["ptq_wer"], row["ptq_interval"])
        trained = _percent(row["qat_wer"], row["qat_interval"])
        lines.append(f"| {row['name']} | {untrained} | {trained} | {row['bytes']:,} | {row['ratio']:.1f} |")
    about = (
        f"{test['utterances']} utterances, {test['words']} words; 95 % bootstrap intervals over speakers; "
        f"{record['decoding']} decoding of packed weights; {record['device']}, torch {record['versions']['torch']}, "
        f"{record['date']}."
    )
    return "\n".join([*lines, "", about, ""])


def accuracy_table(record: dict) -> str:
    """Of benchmarks/accuracy.py: the rows of which all folds were run."""
    lines = [
        "| weights | times smaller | WER, speakers held out | points more than float | verdict | WER, test set |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in complete(record["lines"], len(record["measured"])):
        cells = [
            line["variant"],
            f"{line['ratio']:.1f}",
            _percent(line["wer"], line["interval"]),
            _points(line["difference"]),
            _within(line),
            f"{100 * line['test_wer']:.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"Folds {', '.join(map(str, record['measured']))} of the training speakers, together; 95 % bootstrap intervals "
        "over speakers. Points, with 90 % intervals: in pairs, trained rows against the float row trained on as long, "
        "others against the first; equivalent where both ends are within a point, no worse where the upper one is. "
        f"Test set: mean of the folds' recognizers. {_where(record)}."
    )
    return "\n".join([*lines, "", about, ""])


def _points(difference: dict | None) -> str:
    if difference is None:
        return ""
    low, high = (100 * end for end in difference["tested"])
    return f"{100 * difference['value']:+.1f} ({low:+.1f} to {high:+.1f})"


def _within(line: dict) -> str:
    if line["difference"] is None:
        return ""
    return "equivalent" if line["equivalent"] else "no worse" if line["no_worse"] else "not shown"


def quantizer_table(record: dict) -> str:
    """Of benchmarks/quantizer.py: the main size, at 4 and 8 bits."""
    size, dtype = 2 ** record["settings"]["main"], record["settings"]["dtypes"][0]
    passes = {
        entry["case"]["pass"]: entry["results"]
        for entry in record["cases"]
        if (entry["case"].get("size"), entry["case"].get("dtype")) == (size, dtype)
    }
    lines = [
        "| milliseconds at 4 / 8 bits | forward | backward of weight and scale | backward with centroids "
        "| peak memory of backward (MiB) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, label in QUANTIZERS.items():
        times = [_pair(results, name, lambda result: result["ms"]["median"]) for results in passes.values()]
        memory = _pair(passes["backward"], name, lambda result: result["peak_bytes"] / 2**20)
        if any(times):
            lines.append(f"| {label} | {' | '.join(times)} | {memory} |")
    copied = passes["forward"]["copy"]
    about = (
        f"A weight of {size:,} entries, {dtype} ({copied['bytes'] / 2**21:.3g} MiB), one scale per channel; medians; "
        f"a copy of it takes {copied['ms']['median']:.3g} ms ({copied['gb_per_s']:.3g} GB/s). {_where(record)}."
    )
    return "\n".join([*lines, "", about, ""])


def training_step_table(record: dict) -> str:
    """Of benchmarks/training_step.py."""
    lines = [
        "| model | training | step | frames/s | quantizer | longer than float | weights quantized |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in record["cases"]:
        for name, result in entry["results"].items():
            lines.append(f"| {entry['case']['model']} | {STEPS[name]} | {_step_columns(result)} |")
    batches = ", ".join(
        f"{work['batch']} x {work['frames'] / 100:g} s for {work['model']}" for work in record["settings"]["workloads"]
    )
    about = f"Weights of {record['settings']['bits']} bits; batches of {batches}; medians. {_where(record)}."
    return "\n".join([*lines, "", about, ""])


def packed_linear_table(record: dict) -> str:
    """Of benchmarks/packed_linear.py: the shapes shown, in the first suite's dtype."""
    shapes, dtype = record["settings"]["shown"], record["settings"]["suites"][0]["dtype"]
    found, modes = {}, {}
    for entry in record["cases"]:
        case = entry["case"]
        if case["dtype"] == dtype:  # of several ways of timing, the first
            mode = modes.setdefault((case["n"], case["k"]), case["mode"])
            if case["mode"] == mode:
                found[case["n"], case["k"], case["m"]] = entry["results"]
    tokens = " / ".join(map(str, LINEAR_TOKENS))
    columns = [f"{n} x {k}{LINEAR_MODES[modes[n, k]]}" for n, k in shapes]
    lines = [
        f"| microseconds at {tokens} tokens | bits a weight | error | {' | '.join(columns)} |",
        f"| --- | --- | --- |{' --- |' * len(columns)}",
    ]
    for name, label in LINEARS.items():
        times = [_times(found, n, k, name) for n, k in shapes]
        if any(times):
            lines.append(f"| {label} | {_size_and_error(found, *shapes[-1], name)} | {' | '.join(times)} |")
    about = f"Layers without bias, {dtype}; medians; error of the output from the Gaussian weight's. {_where(record)}."
    return "\n".join([*lines, "", about, ""])


def cpu_kernels_table(record: dict) -> str:
    """Of benchmarks/cpu_kernels.py: one token, by the number of threads."""
    threads = record["settings"]["threads"]
    columns = [cells for wanted in CPU_COLUMNS if (cells := _by_threads(record, wanted))]
    titles = [_cpu_title(cells[threads[0]]) for cells in columns]
    counts = f"{' / '.join(map(str, threads))} {'thread' if threads == [1] else 'threads'}"
    lines = [f"| microseconds, {counts} | {' | '.join(titles)} |", f"| --- |{' --- |' * len(columns)}"]
    for name, label in CPU_LAYERS.items():
        times = [_microseconds([cells[count]["results"].get(name, {}) for count in threads]) for cells in columns]
        if any(times):
            lines.append(f"| {label} | {' | '.join(times)} |")
    instructions = record["settings"]["instructions"]
    kernels = f"native kernels for {instructions}" if instructions else "no native kernels"
    about = f"One token; medians; GQ with {kernels}. {_where(record)}."
    return "\n".join([*lines, "", about, ""])


def _by_threads(record: dict, wanted: dict) -> dict[int, dict]:
    """The cases of one token that are as ``wanted``, by their number of threads."""
    wanted = wanted | {"m": 1}
    return {entry["case"]["threads"]: entry for entry in record["cases"] if entry["case"].items() >= wanted.items()}


def _cpu_title(entry: dict) -> str:
    case = entry["case"]
    where = CPU_PLACES[case["place"]].format(entry["results"]["read sum"]["layers"])
    layer = f"LSTM, {case['k']} to {case['n']}" if case["op"] == "lstm" else f"{case['n']} x {case['k']}"
    return f"{layer}, {where}"


def streaming_table(record: dict) -> str:
    """Of benchmarks/streaming.py: the first case."""
    entry = record["cases"][0]
    lines = [
        "| recognizer | weights (MiB) | in the process (MiB) | whole process (MiB) | wait P50 / P90 / P99 (ms) "
        "| P90, weights alone (ms) | first partial (ms) | real-time factor |",
        f"|{' --- |' * 8}",
    ]
    for name, result in entry["results"].items():
        if "upl_ms" in result:
            lines.append(f"| {_streaming_label(name)} | {_streaming_columns(result)} |")
    case, seconds = entry["case"], record["settings"]["played"].values()
    threads = f"{case['threads']} {'thread' if case['threads'] == 1 else 'threads'}"
    about = (
        f"Wait: from the end of speech to the final result; {len(seconds)} utterances of {min(seconds):.1f} to "
        f"{max(seconds):.1f} s, played at the pace they were spoken; chunks of {case['chunk_ms']} ms, {threads}. "
        f"{_where(record)}."
    )
    return "\n".join([*lines, "", about, ""])


def _streaming_label(name: str) -> str:
    if name in STREAMING_PEERS:
        return STREAMING_PEERS[name]
    kind, bits = name.removeprefix("runner ").split("/")
    width = "1-bit LSTMs, else 5 bits" if bits == "mixed" else f"{bits} bits"
    activations = ", int8 activations" if kind == "gq int8" else ""
    return f"GQ, {width}{activations}{', without torch' if name.startswith('runner ') else ''}"


def _streaming_columns(result: dict) -> str:
    sizes = [result[key] / 2**20 for key in ("weight_bytes", "model_bytes", "process_bytes")]
    waits = " / ".join(_number(result["upl_ms"][key]) for key in ("p50", "p90", "p99"))
    floor, first = _number(result["floor_ms"]["p90"]), _number(result["first_partial_ms"]["p50"])
    return " | ".join([*map(_number, sizes), waits, floor, first, f"{result['rtf']:.2g}"])


def _times(found: dict, n: int, k: int, name: str) -> str:
    """Microseconds of a contender at `LINEAR_TOKENS`; nothing where it has none."""
    return _microseconds([found.get((n, k, tokens), {}).get(name, {}) for tokens in LINEAR_TOKENS])


def _microseconds(results: list[dict]) -> str:
    """Of several results; nothing where none has a time."""
    shown = [_number(1e3 * result["ms"]["median"]) if "ms" in result else "-" for result in results]
    return " / ".join(shown) if any("ms" in result for result in results) else ""


def _size_and_error(found: dict, n: int, k: int, name: str) -> str:
    """Two columns, of the last number of tokens at which the contender was measured with this shape."""
    results = [found.get((n, k, tokens), {}).get(name, {}) for tokens in LINEAR_TOKENS]
    timed = [result for result in results if "ms" in result]
    if not timed:
        return " | "
    return f"{8 * timed[-1]['weight_bytes'] / n / k:.3g} | {100 * timed[-1]['error']:.2g} %"


def _step_columns(result: dict) -> str:
    if "ms" not in result:
        return f"not measured | | | | {result.get('absent') or result['wrong']}"
    share = result["quantized_weights"] / result["weights"]
    milliseconds = [result["ms"]["median"], result["quantizer_ms"], result["longer_than_float_ms"]]
    step, quantizer, longer = (f"{_number(value)} ms" for value in milliseconds)
    return f"{step} | {result['frames_per_s']:,.0f} | {quantizer} | {longer} | {share:.0%}"


def _pair(results: dict, name: str, value: Callable[[dict], float]) -> str:
    """A number of a contender at 4 and at 8 bits; nothing where it has neither."""
    both = [results.get(f"{name}/{bits}", {}) for bits in (4, 8)]
    shown = [_number(value(result)) if "ms" in result else "-" for result in both]
    return " / ".join(shown) if any("ms" in result for result in both) else ""


def _number(value: float) -> str:
    """Three digits, but no fewer than there are before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _where(record: dict) -> str:
    environment = record["environment"]
    return f"{environment['device']}, torch {environment['versions']['torch']}, {record['date']}"


def _percent(rate: float, interval: list[float]) -> str:
    low, high = (100 * end for end in interval)
    return f"{100 * rate:.1f} % ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
