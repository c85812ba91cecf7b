"""What a training reports to MLflow while it runs. It goes on where MLflow cannot be reached, and sends later what it could not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger("flows")


@contextmanager
def unheard() -> Iterator[None]:
    """Warns where MLflow cannot be reached, in which case nothing is lost but its own view of the training."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        _log.warning(
            "MLflow cannot be reached, and lacks a part of this training, whose figures are all in its artifact (metrics.jsonl): %s",
            error,
        )


def logged(run_id: str) -> Set[tuple[str, int]]:
    """Which figures of which steps a run has.

    A training that was killed goes on from its last checkpoint, and so repeats the steps after it to the same figures.

    Args:
        run_id: MLflow's id of the training's run.
    """
    import mlflow

    client = mlflow.MlflowClient()
    names = client.get_run(run_id).data.metrics
    return {(name, entry.step) for name in names for entry in client.get_metric_history(run_id, name)}


def metric_callback(known: Set[tuple[str, int]]) -> Any:
    """A `TrainerCallback` that sends every figure to the active MLflow run.

    Once that fails, figures wait for `send_waiting`: each attempt at a server that is gone may take minutes.

    Args:
        known: Figures that the run has already, by name and step.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from transformers import TrainerCallback

    class LogMetrics(TrainerCallback):
        def __init__(self) -> None:
            self._waiting: list[tuple[int, dict[str, float]]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            step = state.global_step
            figures = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
            figures = {name: value for name, value in figures.items() if (name, step) not in known}
            if not self._waiting:
                try:
                    mlflow.log_metrics(figures, step=step)
                    return
                except MlflowException as error:
                    _log.warning("MLflow cannot be reached; figures are sent when the training ends: %s", error)
            self._waiting.append((step, figures))

        def send_waiting(self) -> None:
            """Sends what waits.

            Raises:
                MlflowException: MLflow still cannot be reached.
            """
            while self._waiting:
                step, figures = self._waiting[0]
                mlflow.log_metrics(figures, step=step)
                del self._waiting[0]

    return LogMetrics()
