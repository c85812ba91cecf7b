"""Scores an adapter, a whole model or a predictions file against a dataset, without training.

python -m flows.evaluate --config my.yaml --subject.path runs/latest/adapter    an adapter or an export of one
python -m flows.evaluate --config my.yaml --subject.path merged/                a whole model, beside the base model
python -m flows.evaluate --config my.yaml --subject.path answers.jsonl          answers from anywhere, matched by id
python -m flows.evaluate --config my.yaml --subject.path … --plan               what would run, and why
"""

if __name__ == "__main__":
    # Prefect takes seconds to import; a plan, the help or a wrong setting should not wait for it.
    from flows.evaluate_cli import main

    raise SystemExit(main())

from prefect import flow
from prefect.runtime import flow_run

from flows.shared import (
    all_cached,
    cancelled_when_interrupted,
    failures_tracked,
    finish_tracking,
    publish_to_prefect,
    run_mending,
    value_of,
)
from tasks.evaluation_graph import EvaluationStepName
from tasks.evaluation_runs import EvaluationRuns
from tasks.graph import Json
from tasks.import_subject import import_subject
from tasks.inference_mode import Predicted, inference_mode
from tasks.load_model import load_model
from tasks.prepare_dataset import prepare_dataset
from tasks.score_subject import Scored, answer_bare, score, summarise_evaluation
from tasks.tracking import Tracker
from vlm.config import EvaluateConfig


@flow(name="evaluate", persist_result=False, validate_parameters=True, on_crashed=[cancelled_when_interrupted])
def evaluate(config: EvaluateConfig, rerun_from: EvaluationStepName | None = None) -> Json:
    """Scores an adapter, a whole model or a predictions file against a dataset.

    Args:
        config: All settings.
        rerun_from: Step that must run, with all after it, although its result is there.

    Returns:
        What ran and what was cached, the metrics, and where everything is.
    """
    runs = EvaluationRuns.open(config, rerun_from=rerun_from)
    runs.check_inputs()
    session = runs.session
    if config.tracking.enabled:
        session.tracker = Tracker(session, str(flow_run.id) if flow_run.id else None, shown=config)
    try:
        with failures_tracked(session):
            scored, summary = run_mending(lambda: run_and_summarise(runs))
            if session.tracker is not None:
                finish_tracking(session.tracker, session, summary, scored.metrics, scored.report)
            if not all_cached(summary):
                publish_to_prefect(summary)
            return summary
    finally:
        runs.close()


def run_and_summarise(runs: EvaluationRuns) -> tuple[Scored, Json]:
    """Runs all steps and sums up, for which their artifacts are read."""
    scored = run_steps(runs)
    return scored, summarise_evaluation(runs, scored)


def run_steps(runs: EvaluationRuns) -> Scored:
    """Runs the steps one after the other, in this thread."""
    session, kind = runs.session, runs.subject.kind
    dataset = adapter = None
    if runs.config.subject.targets == "file":
        given = value_of(import_subject(session, None, return_state=True))
        predicted = Predicted(given, None)
    else:
        base = None
        if runs.base is not None:
            checkpoint = value_of(load_model(runs.base, return_state=True))
            dataset = value_of(prepare_dataset(runs.base, checkpoint, return_state=True))
            base = value_of(answer_bare(runs.base, checkpoint, dataset, return_state=True))
        checkpoint = value_of(load_model(session, return_state=True))
        dataset = value_of(prepare_dataset(session, checkpoint, return_state=True))
        if kind == "model":
            predicted = Predicted(value_of(answer_bare(session, checkpoint, dataset, return_state=True)), base)
        else:
            given = value_of(import_subject(session, dataset, return_state=True))
            if kind == "adapter":
                adapter = given
                predicted = value_of(inference_mode(session, checkpoint, dataset, adapter, return_state=True))
            else:
                if session.config.generation.evaluate_base_model:
                    base = value_of(answer_bare(session, checkpoint, dataset, return_state=True))
                predicted = Predicted(given, base)
    scored: Scored = value_of(score(session, predicted, dataset, adapter, return_state=True))
    return scored
