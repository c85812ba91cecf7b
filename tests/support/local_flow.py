"""The real flow without Prefect's server, for tests that run it many times over: its steps are called as functions."""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack
from typing import Any
from unittest import mock

from artifacts.code_digest import code_digest
from vlm.config import RunConfig

# The code stays as it is while the tests run.
code_digest_once = functools.cache(code_digest)

# What a run must give to the bit, however often it was disturbed. Left out is what tells of the run itself: its seconds
# are in the metrics of the training, and in the report and the model card that quote them.
EXACT = (
    "load_model.checkpoint",
    "configure_lora.adapter",
    "prepare_dataset.dataset",
    "training_mode.plan",
    "train.adapter",
    "inference_mode.tuned.predictions",
    "inference_mode.base.predictions",
    "evaluate_and_save.metrics.metrics",
)


def run_flow_locally(config: RunConfig, rerun_from: str | None = None) -> dict[str, Any]:
    """Runs the flow in this thread and returns its summary.

    Args:
        config: All settings.
        rerun_from: Step that must run, with all after it.
    """
    from prefect import Task

    from flows.vision_finetune import vision_finetune

    def call(task: Task[Any, Any], *arguments: Any, return_state: bool, **named: Any) -> Any:
        assert return_state
        return task.fn(*arguments, **named)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("tasks.session.code_digest", code_digest_once))
        stack.enter_context(mock.patch.object(Task, "__call__", call))
        stack.enter_context(mock.patch("flows.vision_finetune.publish_to_prefect"))
        stack.enter_context(mock.patch("flows.shared.get_run_logger", return_value=logging.getLogger("flows")))
        return vision_finetune.fn(config, rerun_from)


def exact_artifacts(summary: dict[str, Any]) -> dict[str, str]:
    """The digests that no disturbance may change, by the name of the artifact."""
    return {name: summary["artifacts"][name] for name in EXACT}
