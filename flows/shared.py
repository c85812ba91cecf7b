"""What the flows share: repeating after damage, the tracked run's end, and what the Prefect UI shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from prefect import Flow, State, get_client, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.states import Cancelled

from artifacts.errors import CorruptObjectError, NotFoundError
from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.session import Session
from tasks.summary import format_summary, metric_figures, metric_rows, report_markdown
from tasks.tracking import Tracker

R = TypeVar("R")

CHAMPION_EVENT = "vision-finetune.champion"


def run_mending(run_steps: Callable[[], R]) -> R:
    """Runs steps, and again whenever an artifact proved damaged while it was read.

    The store has removed the damaged part by then, so the step that made it runs anew and all others are cached. Damage
    is met one artifact at a time, so this goes on for as long as it is always another one.

    Args:
        run_steps: Runs all of them.
    """
    met: set[str] = set()
    while True:
        try:
            return run_steps()
        except (CorruptObjectError, NotFoundError) as error:
            if str(error) in met:
                raise
            met.add(str(error))
            get_run_logger().warning("%s Making it again.", error)


def value_of(state: State[Any]) -> Any:
    """What a step returned, or the error it ended in."""
    return state.result()


def all_cached(summary: Json) -> bool:
    """Whether a run found everything and did nothing.

    Args:
        summary: Of the finished run.
    """
    return all(step["cached"] for step in summary["steps"].values())


def publish_to_prefect(summary: Json) -> None:
    """Shows metrics and the last lines on the run's page in the Prefect UI.

    Args:
        summary: Of the finished run.
    """
    create_table_artifact(metric_rows(summary), key="metrics", description="Tuned and base model on held-out rows")
    create_markdown_artifact(f"```text\n{format_summary(summary)}\n```", key="summary", description="Last lines")
    create_markdown_artifact(report_markdown(summary), key="report", description="The report in short")


def announce_champion(summary: Json) -> None:
    """Emits an event where this run's result became champion, for automations to send on (``flows/notify.py``).

    Args:
        summary: Of the finished run.
    """
    registered = summary.get("registered")
    if registered and registered["champion"]:
        name = registered["model"]
        emit_event(
            CHAMPION_EVENT,
            resource={"prefect.resource.id": f"vision-finetune.model.{name}", "prefect.resource.name": name},
            payload={which: registered[which] for which in ("model", "version", "reason")},
        )


def cancelled_when_interrupted(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Marks a run that Ctrl-C or SIGTERM ended as cancelled, which Prefect takes for a crash; an ``on_crashed`` hook.

    Under a worker, which also ends runs for reasons of its own, the worker says what a signal meant.

    Args:
        flow: The flow.
        flow_run: The run that ended.
        state: The state that Prefect found for it.
    """
    owned = os.environ.get("PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS", "true").lower() != "true"
    if owned or "signal" not in (state.message or ""):
        return
    message = "Interrupted; the same run goes on from the last finished step or training checkpoint."
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, Cancelled(message=message), force=True)


@contextmanager
def failures_tracked(session: Session) -> Iterator[None]:
    """Marks the tracked run as failed, or as killed, when its steps end in an error.

    Args:
        session: The run.
    """
    try:
        yield
    except BaseException as error:
        if session.tracker is not None:
            session.tracker.fail(killed=not isinstance(error, Exception))
        raise


def finish_tracking(
    tracker: Tracker, session: Session, summary: Json, metrics: ArtifactRef, report: ArtifactRef
) -> None:
    """Writes what came out into the tracked run and ends it; there is none where nothing ran.

    Args:
        tracker: Of the run.
        session: The run, with the results of all its steps.
        summary: Of the run.
        metrics: Its metrics.
        report: Its report.
    """
    tracker.start_if_due(did_something=not all_cached(summary))
    if tracker.run_id is not None:
        tracker.log_report(session.local(metrics), session.local(report))
    refs = {f"{n}.{o}": ref for n, result in session.results.items() for o, ref in result.outputs.items()}
    tracker.finish(refs, metric_figures(summary))
