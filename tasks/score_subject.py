"""The steps of an evaluation that a training run does in another way: answering and scoring, and the last lines."""

from __future__ import annotations

import json

from artifacts.refs import ArtifactRef
from tasks.evaluate_and_save import save_metrics, save_report
from tasks.evaluation_graph import EVALUATION_STEPS
from tasks.evaluation_runs import EvaluationRuns
from tasks.graph import Json
from tasks.inference_mode import Predicted, answers
from tasks.session import Session
from tasks.step import finish, named_step
from tasks.summary import linked, step_outcomes


@named_step("inference_mode")
def answer_bare(session: Session, checkpoint: ArtifactRef, dataset: ArtifactRef) -> ArtifactRef:
    """Answers the held-out rows with a model as it is, without any adapter."""
    return finish(session, "inference_mode", answers(session, checkpoint, dataset))


@named_step("evaluate_and_save")
def score(
    session: Session, subject_name: str, predicted: Predicted, dataset: ArtifactRef | None
) -> tuple[ArtifactRef, ArtifactRef]:
    """Scores the answers and writes the report."""
    metrics = save_metrics(session, predicted)
    refs = {"metrics": metrics} | ({} if dataset is None else {"dataset": dataset})
    report = save_report(session, f"{subject_name}: evaluation report", refs)
    return finish(session, "evaluate_and_save", (metrics, report))


def summarise_evaluation(runs: EvaluationRuns, metrics: ArtifactRef, report: ArtifactRef) -> Json:
    """Everything that the last lines say, as plain values.

    Args:
        runs: The finished runs.
        metrics: The metrics artifact.
        report: The report artifact.
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
    locations = linked(session, {"evaluation": report})
    if session.tracker is not None:
        locations["runs"] = f"mlflow ui --backend-store-uri {session.tracker.uri}"
    return {
        "subject": {"kind": runs.subject.kind, "name": runs.subject.name},
        "steps": {name: steps[name] for name in EVALUATION_STEPS if name in steps},
        "metrics": json.loads(session.store.read_text(metrics, "metrics.json")),
        "locations": locations,
        "artifacts": {
            f"{unit}.{output}": ref.digest
            for unit, result in session.results.items()
            for output, ref in result.outputs.items()
        },
    }
