"""The units of an evaluation without training: those of a training run wherever they are the same work.

Same unit, settings and inputs mean the same key, so a model that a training run loaded, a dataset that it prepared, and
the base model's answers are found again, and a sweep over many subjects pays for them once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from tasks.graph import BASE, DATASET, METRICS, Input, Json, Resolved, Unit, units_for
from vlm.config import EvaluateConfig, RunConfig
from vlm.config.evaluate import SubjectConfig
from vlm.config.evaluation import ExportConfig
from vlm.evaluation.subject import Subject
from vlm.redaction import settings_without_secrets

EvaluationStepName = Literal["load_model", "import_subject", "prepare_dataset", "inference_mode", "evaluate_and_save"]
EVALUATION_STEPS: tuple[EvaluationStepName, ...] = get_args(EvaluationStepName)

# Stands for the run in which the base model answers, where the subject is a whole model and has a run of its own.
BASE_RUN = "base_model"

_GIVEN = Input("import_subject.predictions", "predictions")


def run_config(config: EvaluateConfig, subject: Subject) -> RunConfig:
    """The settings of the run in which the base model answers and adapters are put on it.

    Args:
        config: The evaluation.
        subject: What was found at its path.
    """
    sections = {name: getattr(config, name) for name in EvaluateConfig.model_fields if name != "subject"}
    lora = {"full_finetuning": subject.full_finetuning} if subject.full_finetuning else {}
    return RunConfig(**sections, lora=lora, export=ExportConfig(types=()))


def model_run_config(config: EvaluateConfig, subject: Subject) -> RunConfig:
    """The settings of the run in which a whole model answers: its own weights, in the precision they are stored in.

    Args:
        config: The evaluation.
        subject: A whole model.
    """
    own = {"name": config.subject.path, "revision": None, "quantization": "none", "keep_unquantized": ()}
    return run_config(config.model_copy(update={"model": config.model.model_copy(update=own)}), subject)


def evaluation_units(config: RunConfig, subject: Subject, chosen: SubjectConfig) -> tuple[Unit, ...]:
    """The units of the run that scores the subject.

    Args:
        config: What ``run_config`` or ``model_run_config`` gave.
        subject: What was found.
        chosen: The subject's settings.
    """
    units = {unit.name: unit for unit in units_for(config)}
    settings = _report_settings(subject)
    metrics = units["evaluate_and_save.metrics"]
    report = replace(
        units["evaluate_and_save.report"], settings=settings, inputs={"metrics": METRICS, "dataset": DATASET}
    )
    shared = (units["load_model"], units["prepare_dataset"])
    base = tuple(units[name] for name in ("inference_mode.base",) if name in units)
    compared = {"base": BASE} if base else {}
    if subject.kind == "model":
        # A bare checkpoint's answers are what is called the base model's answers in a training run. Those of the model
        # that it is compared with come from a run of their own.
        own = _bare(config, subject)
        compared = {"base": Input(BASE_RUN, "predictions")} if base else {}
        return (*shared, own, replace(metrics, inputs={"tuned": BASE, **compared}), report)
    if subject.kind == "adapter":
        adapter = Unit(
            "import_subject.adapter", ("adapter",), ("vlm.evaluation.subject",), lambda run: {}, sources="subject"
        )
        answered = units["inference_mode.tuned"]
        inputs = {**answered.inputs, "adapter": Input(adapter.name, "adapter")}
        return (*shared, adapter, *base, replace(answered, inputs=inputs), metrics, report)
    given = Unit(
        _GIVEN.unit, ("predictions",), ("vlm.evaluation.outside_predictions",), _given_settings, sources="subject"
    )
    if chosen.targets == "file":
        report = replace(report, inputs={"metrics": METRICS})
        return (given, replace(metrics, inputs={"tuned": _GIVEN}), report)
    given = replace(given, inputs={"dataset": DATASET})
    return (*shared, *base, given, replace(metrics, inputs={"tuned": _GIVEN, **compared}), report)


def base_units(config: RunConfig) -> tuple[Unit, ...]:
    """The units of the run in which only the base model answers.

    Args:
        config: What ``run_config`` gave.
    """
    wanted = ("load_model", "prepare_dataset", "inference_mode.base")
    return tuple(unit for unit in units_for(config) if unit.name in wanted)


def _bare(config: RunConfig, subject: Subject) -> Unit:
    with_base = config.generation.model_copy(update={"evaluate_base_model": True})
    units = units_for(config.model_copy(update={"generation": with_base}))
    return next(unit for unit in units if unit.name == "inference_mode.base")


def _given_settings(run: Resolved) -> Json:
    generation = run.config.generation
    return {"split": generation.split, "max_rows": generation.max_rows}


def _report_settings(subject: Subject) -> Callable[[Resolved], Json]:
    def settings(run: Resolved) -> Json:
        sections = {"data", "generation", "evaluation"} | ({"model"} if subject.kind != "predictions" else set())
        on_processes: Any = {"data": {"distributed"}, "generation": {"num_processes"}}
        shown = settings_without_secrets(run.config.model_dump(mode="json", include=sections, exclude=on_processes))
        return {"subject": {"kind": subject.kind, "name": subject.name}, **shown}

    return settings
