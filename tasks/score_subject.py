"""The steps of an evaluation that a training run does in another way: answering and scoring, and the last lines."""

from __future__ import annotations

import json
from typing import NamedTuple

from artifacts.refs import ArtifactRef
from tasks.evaluate_and_save import save_metrics, save_report
from tasks.evaluation_graph import EVALUATION_STEPS
from tasks.evaluation_runs import EvaluationRuns
from tasks.graph import Json
from tasks.inference_mode import Predicted, answers
from tasks.registry import Candidate, register, source_of
from tasks.session import Session
from tasks.step import finish, named_step
from tasks.summary import linked, step_outcomes
from tasks.tracking import viewer


@named_step("inference_mode")
def answer_bare(session: Session, checkpoint: ArtifactRef, dataset: ArtifactRef) -> ArtifactRef:
    """Answers the held-out rows with a model as it is, without any adapter."""
    return finish(session, "inference_mode", answers(session, checkpoint, dataset))


class Scored(NamedTuple):
    """What an evaluation leaves."""

    metrics: ArtifactRef
    report: ArtifactRef
    registered: Json | None


@named_step("evaluate_and_save")
def score(session: Session, predicted: Predicted, dataset: ArtifactRef | None, adapter: ArtifactRef | None) -> Scored:
    """Scores the answers and writes the report."""
    subject = session.subject
    assert subject is not None
    metrics, _ = save_metrics(session, predicted)
    refs = {"metrics": metrics} | ({} if dataset is None else {"dataset": dataset})
    report = save_report(session, f"{subject.name}: evaluation report", refs)
    registered = None
    if session.config.tracking.registered_model is not None:
        # A whole model is registered where it lies.
        source = session.model.name if adapter is None else source_of(session, {}, adapter)
        made = {} if adapter is None else {"adapter": adapter}
        registered = register(session, Candidate(source, predicted.tuned, metrics, made))
    return finish(session, "evaluate_and_save", Scored(metrics, report, registered))


def summarise_evaluation(runs: EvaluationRuns, scored: Scored) -> Json:
    """Everything that the last lines say, as plain values.

    Args:
        runs: The finished runs.
        scored: What they left.
    """
    session = runs.session
    steps: Json = {}
    for run in runs.sessions:
        for name, outcome in step_outcomes(run, EVALUATION_STEPS).items():
            earlier = steps.get(name, {"cached": True, "ran": [], "wall_seconds": 0.0})
            steps[name] = {
                "cached": earlier["cached"] and outcome["cached"],
                "ran": earlier["ran"] + outcome["ran"],
                "wall_seconds": round(earlier["wall_seconds"] + outcome["wall_seconds"], 1),
            }
    locations = linked(session, {"evaluation": scored.report})
    if session.tracker is not None:
        locations["runs"] = viewer(session.tracker.uri)
    return {
        "subject": {"kind": runs.subject.kind, "name": runs.subject.name},
        "steps": {name: steps[name] for name in EVALUATION_STEPS if name in steps},
        "metrics": json.loads(session.store.read_text(scored.metrics, "metrics.json")),
        "locations": locations,
        "registered": scored.registered,
        "artifacts": {
            f"{unit}.{output}": ref.digest
            for unit, result in session.results.items()
            for output, ref in result.outputs.items()
        },
    }
