"""What each step's key is made of, and which artifact comes from where.

A *unit* is the smallest thing that is cached: most steps are one unit; inference is two (tuned and base model) and
evaluation is several (metrics, report, one per export type), so that a second export does not repeat the first.
This module is read by the tasks, which run units, and by the plan, which only explains them; it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vlm.config import RunConfig
from vlm.config.evaluation import ExportType
from vlm.redaction import settings_without_secrets

StepName = Literal[
    "load_model", "configure_lora", "prepare_dataset", "training_mode", "train", "inference_mode", "evaluate_and_save"
]
STEPS: tuple[StepName, ...] = get_args(StepName)

Json = dict[str, Any]


@dataclass(frozen=True)
class Resolved:
    """A configuration with everything settled that depends on the machine.

    Attributes:
        config: The configuration, without 'auto' for the quantisation.
        device: ``"cpu"`` or ``"cuda"``.
        precision: Data type of computation, such as ``"bfloat16"``.
    """

    config: RunConfig
    device: str
    precision: str


@dataclass(frozen=True)
class Input:
    """An artifact that a unit reads.

    Attributes:
        unit: The unit that makes it.
        output: Which of that unit's outputs it is.
        subtree: Only this folder of it matters to the key ("" means all of it).
    """

    unit: str
    output: str
    subtree: str = ""


@dataclass(frozen=True)
class Unit:
    """One cached piece of work.

    Attributes:
        name: Unique name; its first part is the step.
        outputs: Names of the artifacts it makes, each also the artifact's kind.
        code: Core modules whose code, with all they import from the core, decides the result.
        settings: The part of the configuration that decides the result.
        inputs: The artifacts it reads, by the name used in the key.
        sources: Which outside content it reads: ``"model"``, ``"data"`` or nothing.
        version: Raised by hand when the result changes for a reason that is not in the code.
    """

    name: str
    outputs: tuple[str, ...]
    code: tuple[str, ...]
    settings: Callable[[Resolved], Json]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    sources: str | None = None
    version: int = 1

    @property
    def step(self) -> str:
        """The step this unit belongs to."""
        return self.name.split(".", 1)[0]


CHECKPOINT = Input("load_model", "checkpoint")
INITIAL_ADAPTER = Input("configure_lora", "adapter")
DATASET = Input("prepare_dataset", "dataset")
PLAN = Input("training_mode", "plan")
TRAINED_ADAPTER = Input("train", "adapter")
TRAINING = Input("train", "training")
TUNED = Input("inference_mode.tuned", "predictions")
BASE = Input("inference_mode.base", "predictions")
METRICS = Input("evaluate_and_save.metrics", "metrics")
FIGURES = Input("evaluate_and_save.metrics", "figures")
REFERENCE = Input("evaluate_and_save.reference", "reference")


def _model_settings(run: Resolved) -> Json:
    model = run.config.model
    settings = model.model_dump(mode="json", exclude={"name", "revision", "precision"})
    if model.quantization != "nf4":
        del settings["double_quantization"]
    if model.quantization == "none":
        del settings["keep_unquantized"]
    return settings | {"precision": run.precision}


def _data_settings(run: Resolved) -> Json:
    # Where a source lies does not matter, what it holds does: that is in the key's sources.
    # On how many processes and hosts rows are prepared changes no bit of them.
    settings = run.config.data.model_dump(mode="json", exclude={"distributed"})
    for source in settings["sources"]:
        del source["path"], source["revision"]
    return settings


def _lora_settings(run: Resolved) -> Json:
    lora = run.config.lora
    if lora.full_finetuning:
        return {"full_finetuning": sorted(lora.full_finetuning)}
    return lora.model_dump(mode="json", exclude={"full_finetuning"})


def _training_settings(run: Resolved) -> Json:
    # How often a checkpoint is written changes no result; on how many GPUs, none but for rounding.
    settings = run.config.training.model_dump(mode="json", exclude={"checkpoint_every_steps", "distributed"})
    if run.config.training.distributed.strategy == "fsdp2":
        # Packs and activations are planned for the part of the model that one GPU holds then.
        settings["strategy"] = "fsdp2"
    if run.config.training.tokens_per_step is not None:
        del settings["gradient_accumulation"]
    if run.config.training.generate_every_steps is None:
        del settings["generate_max_rows"]
    return settings | {"device": run.device, "precision": run.precision}


def _train_settings(run: Resolved) -> Json:
    settings = _training_settings(run)
    if run.config.training.generate_every_steps is not None:
        answering = run.config.generation.model_dump(mode="json", include={"batch_size", "max_new_tokens"})
        evaluation = _evaluation_settings(run)
        del evaluation["slice_by"]
        settings["rounds"] = answering | evaluation
    return settings


def _generation_settings(run: Resolved) -> Json:
    settings = run.config.generation.model_dump(mode="json", exclude={"evaluate_base_model", "num_processes"})
    return settings | {"device": run.device, "precision": run.precision}


def _evaluation_settings(run: Resolved) -> Json:
    # The task says no more than the metrics that it stands for.
    evaluation = run.config.evaluation
    return evaluation.model_dump(mode="json", exclude={"task"}) | {"metrics": list(evaluation.metric_names)}


def _report_settings(run: Resolved) -> Json:
    left_out: Any = {
        "runtime": True,
        "tracking": True,
        "export": True,
        "data": {"distributed"},
        "training": {"distributed"},
        "generation": {"num_processes"},
    }
    settings: Json = settings_without_secrets(run.config.model_dump(mode="json", exclude=left_out))
    return settings


def _reference_settings(run: Resolved) -> Json:
    settings = {name: getattr(run.config.generation, name) for name in ("split", "max_new_tokens")}
    return settings | {
        "num_rows": run.config.export.verify_rows,
        "device": run.device,
        "precision": run.precision,
    }


def _export_settings(kind: ExportType) -> Callable[[Resolved], Json]:
    def settings(run: Resolved) -> Json:
        found: Json = {"type": kind}
        if kind == "gguf":
            found["gguf_type"] = run.config.export.gguf_type
        elif kind != "lora":
            found["max_shard_size_mb"] = run.config.export.max_shard_size_mb
        if _is_verified_by_loading(kind, run.config):
            # The leading metric is compared, under its normalisation.
            evaluation = _evaluation_settings(run)
            del evaluation["slice_by"]
            found["verify"] = evaluation | {"metrics": evaluation["metrics"][:1]}
        return found

    return settings


def export_unit(kind: ExportType) -> str:
    """Name of the unit that makes an export."""
    return f"evaluate_and_save.export.{kind}"


def is_verified_by_loading(config: RunConfig) -> bool:
    """Whether any export is loaded again."""
    return any(_is_verified_by_loading(kind, config) for kind in config.export.types)


def _is_verified_by_loading(kind: ExportType, config: RunConfig) -> bool:
    """GGUF files are compared tensor by tensor as they are written, and loaded where llama.cpp is there."""
    if kind == "gguf" and config.export.verify:
        from vlm.export.gguf.support import llama_cpp_is_there

        return llama_cpp_is_there()
    return config.export.verify


def units_for(config: RunConfig) -> tuple[Unit, ...]:
    """The units of one run, in the order in which they run.

    Args:
        config: Decides whether the base model answers too, and which exports are made.
    """
    with_base = config.generation.evaluate_base_model
    predictions = {"tuned": TUNED} | ({"base": BASE} if with_base else {})
    units = [
        Unit("load_model", ("checkpoint",), ("vlm.loading.build",), _model_settings, sources="model"),
        Unit(
            "configure_lora",
            ("adapter",),
            ("vlm.lora.build", "vlm.loading.checkpoint"),
            _lora_settings,
            {"checkpoint": CHECKPOINT},
        ),
        Unit(
            "prepare_dataset",
            ("dataset",),
            # It is handed its processor, so its own imports do not lead there.
            ("vlm.data.prepare", "vlm.data.parts", "vlm.processing.processing"),
            _data_settings,
            # The tokenizer and the image processor decide lengths and sizes; the weights do not.
            {"processor": Input("load_model", "checkpoint", "processor")},
            sources="data",
        ),
        Unit(
            "training_mode",
            ("plan",),
            ("vlm.training.plan",),
            _training_settings,
            {"checkpoint": CHECKPOINT, "adapter": INITIAL_ADAPTER, "dataset": DATASET},
        ),
        Unit(
            "train",
            ("adapter", "training"),
            ("vlm.training.train", "vlm.processing.processing"),
            _train_settings,
            {"checkpoint": CHECKPOINT, "adapter": INITIAL_ADAPTER, "dataset": DATASET, "plan": PLAN},
        ),
    ]
    generation = ("vlm.generate", "vlm.lora.attach", "vlm.loading.checkpoint")
    if with_base:
        # Without the adapter among its inputs: a sweep over adapters pays for the base model once.
        units.append(
            Unit(
                "inference_mode.base",
                ("predictions",),
                generation,
                _generation_settings,
                {"checkpoint": CHECKPOINT, "dataset": DATASET},
            )
        )
    units += [
        Unit(
            "inference_mode.tuned",
            ("predictions",),
            generation,
            _generation_settings,
            {"checkpoint": CHECKPOINT, "dataset": DATASET, "adapter": TRAINED_ADAPTER},
        ),
        Unit(
            "evaluate_and_save.metrics",
            ("metrics", "figures"),
            ("vlm.evaluation.evaluate",),
            _evaluation_settings,
            predictions,
        ),
        Unit(
            "evaluate_and_save.report",
            ("report",),
            ("vlm.evaluation.report", "vlm.data.prepared"),
            _report_settings,
            {"metrics": METRICS, "training": TRAINING, "dataset": DATASET, "plan": PLAN},
        ),
    ]
    # The figures stand on each export's card. They are an artifact of their own, so that another slice exports nothing again.
    trained = {"checkpoint": CHECKPOINT, "adapter": TRAINED_ADAPTER, "figures": FIGURES}
    if is_verified_by_loading(config):
        units.append(
            Unit(
                "evaluate_and_save.reference",
                ("reference",),
                ("vlm.export.reference", *generation),
                _reference_settings,
                {"checkpoint": CHECKPOINT, "dataset": DATASET, "adapter": TRAINED_ADAPTER},
            )
        )
    for kind in config.export.types:
        verified = _is_verified_by_loading(kind, config)
        inputs = trained | ({"dataset": DATASET, "reference": REFERENCE} if verified else {})
        if kind == "gguf":
            inputs["dataset"] = DATASET  # whose longest conversation decides the context's length
        units.append(
            Unit(
                export_unit(kind),
                ("export",),
                ("vlm.export", "vlm.export.roundtrip") if verified else ("vlm.export",),
                _export_settings(kind),
                inputs,
            )
        )
    return tuple(units)
