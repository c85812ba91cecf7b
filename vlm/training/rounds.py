"""Rounds of answers during a training: a few validation rows, answered and scored. Loads torch and transformers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from vlm.config import EvaluationConfig, GenerationConfig, TrainingConfig
from vlm.config.evaluation import MetricName
from vlm.data.prepared import PreparedDataset
from vlm.evaluation.predictions import Prediction
from vlm.evaluation.scores import corpus_values, score_rows
from vlm.generate import longest_answer, predict
from vlm.training.results import ROUND_PREFIX

if TYPE_CHECKING:
    from vlm.processing import Processing
    from vlm.training.callbacks import Pace
    from vlm.training.distributed.ranks import Ranks


class AnswerRounds(TrainerCallback):
    """Answers the same validation rows every few steps. Leaves the model and all random states as they were.

    Args:
        model: The PEFT model in training.
        processing: Its processor.
        dataset_dir: Prepared dataset.
        training: How often, and how many rows.
        generation: Batch size and longest answer.
        evaluation: Metrics and normalisation.
        pace: Does not count the time spent here.
        ranks: This process among several, which share the rows; None where it is alone.
    """

    def __init__(
        self,
        model: Any,
        processing: Processing,
        dataset_dir: Path,
        training: TrainingConfig,
        generation: GenerationConfig,
        evaluation: EvaluationConfig,
        pace: Pace,
        ranks: Ranks | None = None,
    ) -> None:
        assert training.generate_every_steps is not None
        self._model, self._processing = model, processing
        self._rows = PreparedDataset(dataset_dir, "validation")
        self._numbers = spread_rows(len(self._rows), training.generate_max_rows)
        self._every = training.generate_every_steps
        self._batch_size = generation.batch_size
        self._max_new_tokens = generation.max_new_tokens or longest_answer(dataset_dir)
        self._evaluation = evaluation
        self._names = round_metrics(training, evaluation)
        self._pace = pace
        self._ranks = ranks
        self._log: Callable[[dict[str, float]], None] | None = None
        self._autocast: Callable[[], AbstractContextManager[Any]] | None = None

    def connect(
        self, log: Callable[[dict[str, float]], None], autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Says where figures go.

        Args:
            log: The trainer's.
            autocast: Gives the precision that the trainer computes in: what it wraps around the model's forward, generation
                goes past.
        """
        self._log, self._autocast = log, autocast

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Has a round where one is due."""
        if state.global_step % self._every == 0:
            # Logging a round would take the place of logging the step's loss.
            should_log = control.should_log
            self.run()
            control.should_log = should_log
        return control

    def run(self) -> None:
        """Answers, scores and logs."""
        assert self._log is not None
        assert self._autocast is not None
        started = time.perf_counter()
        own = self._numbers if self._ranks is None else self._numbers[self._ranks.rank :: self._ranks.size]
        with self._autocast():
            answers = predict(
                self._model,
                self._processing,
                self._rows,
                own,
                batch_size=self._batch_size,
                max_new_tokens=self._max_new_tokens,
            )
        if self._ranks is not None:
            parts = [
                [Prediction(**answer) for answer in part] for part in self._ranks.gather(list(map(asdict, answers)))
            ]
            answers = [parts[place % len(parts)][place // len(parts)] for place in range(len(self._numbers))]
        values = corpus_values(score_rows(answers, self._evaluation, self._names))
        self._log({ROUND_PREFIX + name: value for name, value in zip(self._names, values, strict=True)})
        self._pace.leave_out(time.perf_counter() - started)


def round_metrics(training: TrainingConfig, evaluation: EvaluationConfig) -> tuple[MetricName, ...]:
    """The metrics of a round: those of the evaluation, and the one that decides which adapter is kept.

    Args:
        training: With `keep_best`.
        evaluation: With metrics.
    """
    names, kept = evaluation.metric_names, training.keep_best
    if kept == "none" or kept == "loss" or kept in names:
        return names
    return (*names, kept)


def spread_rows(num_rows: int, most: int) -> list[int]:
    """Row numbers spread evenly over a split.

    Args:
        num_rows: Of the split.
        most: How many to take.

    Returns:
        Rising row numbers, the first and the last row among them where there are two or more.
    """
    return np.linspace(0, num_rows - 1, min(num_rows, most)).round().astype(int).tolist()
