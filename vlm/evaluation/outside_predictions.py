"""Answers that somebody else generated, brought beside the expected ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.errors import DataError, near_names, shown
from vlm.evaluation.predictions import Prediction, PredictionsSummary, write_predictions
from vlm.evaluation.subject import Subject, prediction_lines


def import_predictions(
    subject: Subject, output_dir: Path, *, dataset_dir: Path | None, split: str, max_rows: int | None
) -> PredictionsSummary:
    """Writes a predictions file as ``predictions.jsonl`` and ``predictions.json``, in the order of the dataset.

    Args:
        subject: Predictions: `id`, `prediction`, and perhaps `finish_reason` and `num_new_tokens`; without a dataset
            also `target`, and perhaps `group`, `prompt` and `metadata`.
        output_dir: An existing folder.
        dataset_dir: Prepared dataset with the expected answers; None takes those of the file.
        split: The split that was answered.
        max_rows: Only the first rows of the split count; None takes all.

    Returns:
        The content of ``predictions.json``.

    Raises:
        DataError: A row lacks what is needed, two rows have one id, an id is not in the dataset, or a row of the
            dataset has no prediction.
    """
    given = _by_id(subject)
    if dataset_dir is None:
        done = [_own(number, row, subject) for number, row in given.values()][:max_rows]
    else:
        done = _joined(given, subject, dataset_dir, split, max_rows)
    summary = PredictionsSummary(
        split=split,
        num_rows=len(done),
        use_adapter=True,
        num_new_tokens=sum(row.num_new_tokens for row in done),
        num_finished=sum(row.finish_reason == "stop" for row in done),
    )
    write_predictions(done, summary, output_dir)
    return summary


def _by_id(subject: Subject) -> dict[str, tuple[int, dict[str, Any]]]:
    given: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, row in prediction_lines(subject):
        row_id = str(row["id"])
        if row_id in given:
            raise DataError(
                f"{subject.name} has id {row_id!r} on lines {given[row_id][0]} and {number}; give each row one prediction"
            )
        given[row_id] = (number, row)
    if not given:
        raise DataError(f"{subject.name} has no predictions; write one JSON object with `id` and `prediction` per line")
    return given


def _own(number: int, row: dict[str, Any], subject: Subject) -> Prediction:
    if not isinstance(row.get("target"), str):
        raise DataError(
            f"{subject.name} line {number} has {shown(row.get('target'))} as its target; add the expected text, or set"
            " subject.targets to 'dataset'"
        )
    group, metadata = row.get("group"), row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise DataError(
            f"{subject.name} line {number} has metadata {shown(metadata)}; write an object, or leave it out"
        )
    return Prediction(
        id=str(row["id"]),
        group=None if group is None else str(group),
        prompt=str(row.get("prompt", "")),
        target=row["target"],
        metadata=metadata,
        **_answer(number, row, subject),
    )


def _answer(number: int, row: dict[str, Any], subject: Subject) -> dict[str, Any]:
    reason = row.get("finish_reason", "stop")
    if reason not in ("stop", "length"):
        raise DataError(
            f"{subject.name} line {number} has finish_reason {reason!r}; write 'stop', or 'length' for an answer that was cut"
        )
    num_new_tokens = row.get("num_new_tokens", 0)
    if type(num_new_tokens) is not int or not 0 <= num_new_tokens < 2**63:
        raise DataError(
            f"{subject.name} line {number} has num_new_tokens {shown(num_new_tokens)}; write a whole number, or leave it out"
        )
    return {
        "prediction": row["prediction"],
        "num_new_tokens": num_new_tokens,
        "finish_reason": reason,
    }


def _joined(
    given: dict[str, tuple[int, dict[str, Any]]], subject: Subject, dataset_dir: Path, split: str, max_rows: int | None
) -> list[Prediction]:
    from vlm.data.prepared import PreparedDataset
    from vlm.generate import words_of_prompt

    rows = PreparedDataset(dataset_dir, split)
    ids = rows.ids
    known = set(ids)
    unknown = next((row_id for row_id in given if row_id not in known), None)
    if unknown is not None:
        raise DataError(
            f"{subject.name} line {given[unknown][0]} has id {unknown!r}, which the {split} split does not have."
            f" {near_names(unknown, ids)}"
        )
    wanted = ids[:max_rows]
    missing = [row_id for row_id in wanted if row_id not in given]
    if missing:
        raise DataError(
            f"{subject.name} has no prediction for {len(missing)} of {len(wanted)} rows of the {split} split, first"
            f' {missing[0]!r}; add them ("" counts as an empty answer), or score fewer rows with generation.max_rows'
        )
    done = []
    for position, row_id in enumerate(wanted):
        row = rows[position]
        done.append(
            Prediction(
                id=row.id,
                group=row.group,
                prompt=words_of_prompt(row),
                target=row.target,
                metadata=row.metadata,
                **_answer(*given[row_id], subject),
            )
        )
    return done
