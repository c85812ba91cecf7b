"""Predictions on disk: ``predictions.jsonl``, one row per answer, and the summary ``predictions.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vlm.errors import DataError
from vlm.summary import Summary

ROWS_FILE = "predictions.jsonl"
SUMMARY_FILE = "predictions.json"
# Where `vlm.data.mapping` keeps them.
ANSWERS = "answers"


@dataclass(frozen=True)
class Prediction:
    """One generated answer beside the expected one."""

    id: str
    """Name of the row in the prepared dataset."""
    group: str | None
    """Rows with the same group are not independent; intervals take that into account."""
    prompt: str
    """The last user turn's words, for reading; images are not in it."""
    target: str
    """The expected answer."""
    prediction: str
    """The generated answer, without control tokens."""
    num_new_tokens: int
    """Generated tokens, the stop token included."""
    finish_reason: Literal["stop", "length"]
    """Whether the model ended its turn, or ran into `max_new_tokens`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Plain values that the source carried along; a list under ``answers`` holds all that are right."""

    @property
    def references(self) -> list[str]:
        """Every right answer: those of the metadata, or else the target."""
        answers = self.metadata.get(ANSWERS)
        return answers if isinstance(answers, list) and answers else [self.target]


@dataclass(frozen=True)
class PredictionsSummary(Summary):
    """What ``predictions.json`` holds."""

    split: str
    """The split that was answered."""
    num_rows: int
    """Number of answers."""
    use_adapter: bool
    """False for the untuned model."""
    num_new_tokens: int
    """Generated tokens of all rows."""
    num_finished: int
    """Answers that the model ended itself."""


def summarise_predictions(rows: Sequence[Prediction], split: str, *, use_adapter: bool) -> PredictionsSummary:
    """Counts what ``predictions.json`` holds.

    Args:
        rows: All answers.
        split: That was answered.
        use_adapter: False for the untuned model.
    """
    return PredictionsSummary(
        split=split,
        num_rows=len(rows),
        use_adapter=use_adapter,
        num_new_tokens=sum(row.num_new_tokens for row in rows),
        num_finished=sum(row.finish_reason == "stop" for row in rows),
    )


def write_predictions(rows: Iterable[Prediction], summary: PredictionsSummary, output_dir: Path) -> None:
    """Writes both files.

    Args:
        rows: Answers in row order.
        summary: Their summary.
        output_dir: An existing folder.
    """
    with (output_dir / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) + "\n")
    text = json.dumps(asdict(summary), indent=2, sort_keys=True) + "\n"
    (output_dir / SUMMARY_FILE).write_text(text, encoding="utf-8", newline="\n")


def read_predictions(predictions_dir: Path) -> tuple[PredictionsSummary, list[Prediction]]:
    """Reads what ``write_predictions`` wrote.

    Args:
        predictions_dir: The folder of a predictions artifact.

    Returns:
        The summary and the rows in order.

    Raises:
        DataError: A file is missing, or the number of rows is not the one in the summary.
    """
    missing = [name for name in (SUMMARY_FILE, ROWS_FILE) if not (predictions_dir / name).is_file()]
    if missing:
        raise DataError(f"{predictions_dir} has no {missing[0]}; give the folder of a predictions artifact")
    summary = PredictionsSummary(**json.loads((predictions_dir / SUMMARY_FILE).read_text(encoding="utf-8")))
    with (predictions_dir / ROWS_FILE).open(encoding="utf-8", newline="\n") as handle:
        rows = [Prediction(**json.loads(line)) for line in handle]
    if len(rows) != summary.num_rows:
        raise DataError(
            f"{predictions_dir / ROWS_FILE} has {len(rows)} rows but its summary says {summary.num_rows};"
            " the file was cut short: generate the predictions again"
        )
    return summary, rows


def write_common_rows(first_dir: Path, second_dir: Path, first_out: Path, second_out: Path) -> int:
    """Keeps of two folders the rows that both answered: those with the same id and the same expected answer.

    Args:
        first_dir: The folder of a predictions artifact, whose order of rows is kept.
        second_dir: Another one.
        first_out: An existing folder that receives the first one's answers to these rows.
        second_out: The same for the second one.

    Returns:
        The number of rows that both answered.

    Raises:
        DataError: A file is missing or cut short.
    """
    (first, first_rows), (second, second_rows) = read_predictions(first_dir), read_predictions(second_dir)
    theirs = {(row.id, row.target): row for row in second_rows}
    pairs = [(row, theirs[row.id, row.target]) for row in first_rows if (row.id, row.target) in theirs]
    for summary, rows, folder in (
        (first, [pair[0] for pair in pairs], first_out),
        (second, [pair[1] for pair in pairs], second_out),
    ):
        kept = replace(
            summary,
            num_rows=len(rows),
            num_new_tokens=sum(row.num_new_tokens for row in rows),
            num_finished=sum(row.finish_reason == "stop" for row in rows),
        )
        write_predictions(rows, kept, folder)
    return len(pairs)
