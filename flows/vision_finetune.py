"""The pipeline: seven steps from a model and a dataset to an evaluated, exported adapter.

python -m flows.vision_finetune                          the built-in model on the built-in receipts
python -m flows.vision_finetune --config my.yaml         your own
python -m flows.vision_finetune --config my.yaml --plan  what would run, and why
"""

if __name__ == "__main__":
    # Prefect takes seconds to import; a plan, the help or a wrong setting should not wait for it.
    from flows.cli import main

    raise SystemExit(main())

from prefect import flow
from prefect.runtime import flow_run

from flows.shared import (
    all_cached,
    announce_champion,
    cancelled_when_interrupted,
    failures_tracked,
    finish_tracking,
    publish_to_prefect,
    run_mending,
    value_of,
)
from tasks.configure_lora import configure_lora
from tasks.evaluate_and_save import Saved, evaluate_and_save
from tasks.graph import Json, StepName
from tasks.inference_mode import inference_mode
from tasks.load_model import load_model
from tasks.plan import check_inputs
from tasks.prepare_dataset import prepare_dataset
from tasks.session import Session
from tasks.summary import summarise
from tasks.tracking import Tracker
from tasks.train import train
from tasks.training_mode import training_mode
from vlm.config import RunConfig

DEFAULTS = RunConfig()


@flow(name="vision-finetune", persist_result=False, validate_parameters=True, on_crashed=[cancelled_when_interrupted])
def vision_finetune(config: RunConfig = DEFAULTS, rerun_from: StepName | None = None) -> Json:
    """Fine-tunes a vision-language model on image-text conversations.

    Args:
        config: All settings; without any, the built-in model learns the built-in receipts.
        rerun_from: Step that must run, with all after it, although its result is there.

    Returns:
        What ran and what was cached, the metrics, and where everything is.
    """
    session = Session.open(config, rerun_from=rerun_from)
    check_inputs(session)
    # Of several machines that train together, the first one tells of it.
    if session.config.tracking.enabled and session.config.training.distributed.machine_rank == 0:
        session.tracker = Tracker(session, str(flow_run.id) if flow_run.id else None)
    try:
        with failures_tracked(session):
            saved, summary = run_mending(lambda: run_and_summarise(session))
            if session.tracker is not None:
                finish_tracking(session.tracker, session, summary, saved.metrics, saved.report)
            if not all_cached(summary):
                publish_to_prefect(summary)
                announce_champion(summary)
            return summary
    finally:
        session.close()


def run_and_summarise(session: Session) -> tuple[Saved, Json]:
    """Runs all steps and sums up, for which their artifacts are read."""
    saved = run_steps(session)
    return saved, summarise(session, *saved)


def run_steps(session: Session) -> Saved:
    """Runs the seven steps one after the other, in this thread.

    Long GPU work stays in the main thread, where signals arrive and MLflow's active run is visible.
    """
    checkpoint = value_of(load_model(session, return_state=True))
    adapter = value_of(configure_lora(session, checkpoint, return_state=True))
    dataset = value_of(prepare_dataset(session, checkpoint, return_state=True))
    plan = value_of(training_mode(session, checkpoint, adapter, dataset, return_state=True))
    trained = value_of(train(session, checkpoint, adapter, dataset, plan, return_state=True))
    predicted = value_of(inference_mode(session, checkpoint, dataset, trained.adapter, return_state=True))
    state = evaluate_and_save(session, checkpoint, dataset, plan, trained, predicted, return_state=True)
    saved: Saved = value_of(state)
    return saved
