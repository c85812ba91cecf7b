"""The runs of one evaluation: that of the subject and, where it is a whole model, one of the base model beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tasks.evaluation_graph import (
    BASE_RUN,
    EVALUATION_STEPS,
    EvaluationStepName,
    base_units,
    evaluation_units,
    model_run_config,
    run_config,
)
from tasks.plan import HIT, Planned, plan_run
from tasks.session import Session
from vlm.config import EvaluateConfig
from vlm.errors import ConfigError
from vlm.evaluation.subject import Subject, find_subject, prediction_lines


@dataclass(frozen=True)
class EvaluationRuns:
    """What an evaluation works with.

    Attributes:
        config: All settings.
        subject: What was found at the subject's path.
        session: The run in which the subject is scored.
        base: The run in which the base model answers; None where the subject's run does that, or nobody asks for it.
    """

    config: EvaluateConfig
    subject: Subject
    session: Session
    base: Session | None

    @classmethod
    def open(cls, config: EvaluateConfig, *, rerun_from: EvaluationStepName | None = None) -> EvaluationRuns:
        """Finds the subject and opens the store.

        Args:
            config: All settings.
            rerun_from: Step that must run, with all after it, although its result is there.

        Raises:
            VlmError: There is nothing usable at the subject's path, or the device is not there.
            StoreError: The store cannot be opened.
        """
        subject = find_subject(config.subject)
        if subject.kind == "predictions" and config.tracking.registered_model is not None:
            raise ConfigError(
                f"tracking.registered_model {config.tracking.registered_model!r} registers a model, but subject.path"
                f" {config.subject.path!r} holds answers only; drop registered_model"
            )
        run = (model_run_config if subject.kind == "model" else run_config)(config, subject)
        units = evaluation_units(run, subject, config.subject)
        session = Session.open(run, rerun_from=rerun_from, steps=EVALUATION_STEPS, units=units, subject=subject)
        base = None
        if subject.kind == "model" and config.generation.evaluate_base_model:
            run = run_config(config, subject)
            base = Session.open(run, rerun_from=rerun_from, steps=EVALUATION_STEPS, units=base_units(run))
        return cls(config, subject, session, base)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Both runs, in the order in which they work."""
        return (self.session,) if self.base is None else (self.base, self.session)

    def plan(self) -> Iterator[Planned]:
        """What would become of each unit; those of the base model's own run are marked."""
        if self.base is not None:
            for entry in plan_run(self.base):
                yield replace(entry, unit=f"{BASE_RUN}.{entry.unit}")
        yield from plan_run(self.session)

    def check_inputs(self) -> None:
        """Refuses a subject, model or data that are not there, before any step spends time.

        Raises:
            VlmError: What is wrong, and the remedy.
        """
        if self.subject.kind == "predictions":
            for _ in prediction_lines(self.subject):
                pass
        for session in self.sessions:
            session.check_sources()
        prepared = [entry for entry in plan_run(self.session) if entry.unit == "prepare_dataset"]
        if prepared and prepared[0].status != HIT:
            from vlm.data.check import check_sources

            check_sources(self.config.data)

    def close(self) -> None:
        """Gives back what the runs hold."""
        for session in self.sessions:
            session.close()
