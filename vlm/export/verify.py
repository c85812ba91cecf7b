"""The round-trip gate: an export must give what the trained model gives, or the step fails and says by how much.

Three things are asked of it, on a few held-out rows (`Bounds` has the figures and their reasons):

    logits    at the answers' tokens, within a bound for the type, relative to the trained model's
    training  what training changed is in them: the base model's own outputs would not pass, however small the change
    metric    the leading metric of generated answers is that of the trained model

Imports nothing heavy; the process that it starts loads torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm.config import EvaluationConfig
from vlm.config.evaluation import ExportType, GgufType, MetricName
from vlm.errors import ExportError
from vlm.evaluation.metrics import METRICS, cleaner, value
from vlm.summary import Summary

VERIFICATION_FILE = "verification.json"
# Distance between neighbouring numbers at 1.
_EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# llama.cpp rounds activations as well, each matrix's input to 16 or 8 bits. Two to four times what was measured in tiny
# random models, which have nothing that would even it out: 0.002, 0.01, 0.027, 0.14 and 0.25.
_GGUF_DISTANCE = {"f16": 0.01, "bf16": 0.03, "q8_0": 0.1, "q5_1": 0.35, "q5_0": 0.35, "q4_1": 0.6, "q4_0": 0.6}


@dataclass(frozen=True)
class Bounds:
    """How far an export may be from the trained model."""

    distance: float
    """Of the logits, relative."""
    metric: float
    """Of the metric, absolute."""


@dataclass(frozen=True)
class Verification(Summary):
    """Content of ``verification.json``, and the card's figures."""

    num_rows: int
    """Rows compared."""
    distance: float
    """Relative distance of the logits."""
    max_distance: float
    """What was allowed."""
    kept: float
    """Share of the trained change that is in the export."""
    metric: MetricName
    """Name of the metric."""
    metric_value: float
    """Of the export's answers."""
    metric_reference: float
    """Of the trained model's answers."""
    max_metric_difference: float
    """What was allowed."""


def bounds_for(
    kind: ExportType, dtype: str, quantization: str, num_rows: int, gguf_type: GgufType | None = None
) -> Bounds:
    """What is allowed for a type of export.

    Args:
        kind: Type of the export.
        dtype: Of the model's computation and 16-bit weights.
        quantization: Of the base model during training.
        num_rows: Rows of the comparison.
        gguf_type: How a GGUF file stores matrices.
    """
    eps = _EPS[dtype]
    # The same arithmetic in another process: 0 where it was measured (tiny models of all families, float32 on a CPU). Only
    # the order of sums may differ, or TF32 units with 10 bits be used in one of them. In 16 bit, that may tip over a token
    # on which two answers are about equally likely: one row's worth.
    distance, metric = 1e-3 + 4 * eps, 0.0 if dtype == "float32" else 1 / num_rows
    if kind != "lora":
        # Every merged weight is rounded once, layers add up like a random walk; a few units in the last place (10^-6 in
        # float32 where it was measured).
        distance, metric = 1e-3 + 8 * eps, 0.02 + 1 / num_rows
        if quantization == "int8":
            # The trained model rounds its activations to 8 bits, a merged one does not (0.02 where it was measured).
            distance += 0.05
    if kind == "merged_8bit":
        # Weights and activations are rounded to 8 bits (0.03 where it was measured).
        distance, metric = distance + 0.1, 0.05 + 1 / num_rows
    elif kind == "merged_4bit":
        # NF4 moves a weight by 9 % of its spread on average, and layers add up (0.25 to 0.38 in tiny random models, which
        # have nothing that would even it out).
        distance, metric = distance + 0.5, 0.10 + 1 / num_rows
    elif kind == "gguf":
        assert gguf_type is not None, "a GGUF file without its type"
        distance += _GGUF_DISTANCE[gguf_type]
        if gguf_type.startswith("q"):
            metric = (0.05 if gguf_type == "q8_0" else 0.10) + 1 / num_rows
    return Bounds(distance, metric)


def verify_export(
    kind: ExportType,
    export_dir: Path,
    checkpoint_dir: Path,
    dataset_dir: Path,
    reference_dir: Path,
    evaluation: EvaluationConfig,
    *,
    device: str,
    gguf_type: GgufType | None = None,
    runner: Callable[[dict[str, str]], dict[str, Any]] | None = None,
) -> Verification:
    """Loads an export in a fresh process and compares it with the trained model.

    Args:
        kind: Type of the export; for ``gguf``, llama.cpp has to be there (`vlm.export.gguf.support.llama_cpp_is_there`).
        export_dir: Its folder, which receives ``verification.json`` and a line on the card.
        checkpoint_dir: Base model.
        dataset_dir: Prepared dataset.
        reference_dir: What `make_reference` wrote.
        evaluation: Its first metric is compared.
        device: ``cpu`` or ``cuda``.
        gguf_type: How a GGUF file stores matrices.
        runner: Turns a request into what `roundtrip.main` would write; None starts a fresh process.

    Raises:
        ExportError: The export does not load, or is not what was trained.
    """
    reference = json.loads((reference_dir / "reference.json").read_text(encoding="utf-8"))
    description = json.loads((checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
    request = {
        "kind": kind,
        "export_dir": str(export_dir),
        "checkpoint_dir": str(checkpoint_dir),
        "dataset_dir": str(dataset_dir),
        "reference_dir": str(reference_dir),
        "device": device,
    }
    result = (runner or _in_fresh_process)(request)
    if "error" in result:
        raise ExportError(f"the export {kind!r} does not load again: {result['error']}")
    measured = result["measured"]
    rows = measured["rows"]
    num_rows = len(rows)
    bounds = bounds_for(kind, description["dtype"], description["quantization"], num_rows, gguf_type)
    targets, answers = ([reference[name][row] for row in rows] for name in ("targets", "answers"))
    found, expected = (_metric(targets, those, evaluation) for those in (measured["answers"], answers))
    name = evaluation.metric_names[0]
    verification = Verification(
        num_rows=num_rows,
        distance=_rounded(measured["distance"]),
        max_distance=_rounded(bounds.distance),
        kept=_rounded(measured["kept"]),
        metric=name,
        metric_value=_rounded(found),
        metric_reference=_rounded(expected),
        max_metric_difference=_rounded(bounds.metric),
    )
    where = f"on {num_rows} held-out rows; the files are not published. Please report this with the model's name"
    if not measured["distance"] <= bounds.distance:
        raise ExportError(
            f"the export {kind!r} gives logits that are {measured['distance']:.3g} away from the trained model's (relative;"
            f" allowed {bounds.distance:.3g}) {where}"
        )
    lost = abs(measured["kept"] - 1)
    # Noise that is large beside the change has a part along it; half of it would be much for thousands of logits.
    noise = measured["distance"] / measured["change"] if measured["change"] else 0.0
    if measured["change"] and not lost <= 0.25 + 0.5 * noise:
        raise ExportError(
            f"the export {kind!r} has {measured['kept']:.0%} of what training changed in the logits (100 % expected, give or"
            f" take {0.25 + 0.5 * noise:.0%}) {where}"
        )
    if not abs(found - expected) <= bounds.metric + 1e-9:
        raise ExportError(
            f"the export {kind!r} has {METRICS[name].title} {found:.4f}, the trained model {expected:.4f} (allowed difference"
            f" {bounds.metric:.3g}) {where}"
        )
    text = json.dumps(asdict(verification), indent=2, sort_keys=True) + "\n"
    (export_dir / VERIFICATION_FILE).write_text(text, encoding="utf-8", newline="\n")
    with (export_dir / "README.md").open("a", encoding="utf-8", newline="\n") as card:
        card.write(f"\n{_sentence(kind, verification)}\n")
    return verification


def _metric(targets: list[str], answers: list[str], evaluation: EvaluationConfig) -> float:
    """The leading metric, at most 1: an error rate above that says no more than that nothing is right."""
    metric, clean = METRICS[evaluation.metric_names[0]], cleaner(evaluation)
    scores = [metric.score([target], answer, clean) for target, answer in zip(targets, answers, strict=True)]
    return min(1.0, value((sum(score[0] for score in scores), sum(score[1] for score in scores))))


def _rounded(number: float) -> float:
    """Digits that mean something; the rest depends on the machine."""
    return float(f"{number:.3g}")


def _sentence(kind: str, verification: Verification) -> str:
    loader = {"lora": "plain transformers and PEFT", "gguf": "llama.cpp"}.get(kind, "plain transformers")
    return (
        f"Loaded again in a fresh process with {loader} and compared with the trained model on"
        f" {verification.num_rows} held-out rows: logits differ by {verification.distance:.2%} (allowed"
        f" {verification.max_distance:.2%}); {METRICS[verification.metric].title}"
        f" {verification.metric_value:.4f} ({verification.metric_reference:.4f} in training's own code)."
    )


def _in_fresh_process(request: dict[str, str]) -> dict[str, Any]:
    import vlm

    root = str(Path(vlm.__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    with tempfile.TemporaryDirectory() as folder:
        request_path, result_path = Path(folder) / "request.json", Path(folder) / "result.json"
        request_path.write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "vlm.export.roundtrip", str(request_path), str(result_path)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0 and result_path.is_file():
            result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
            return result
    last = done.stdout.strip().splitlines()[-1:] or ["no message"]
    if done.returncode < 0:
        last = [f"it was ended by signal {-done.returncode}; where that is 9, memory ran out", *last]
    return {"error": f"the process that loads it failed ({': '.join(last)})"}
