"""Step 1's work: from a model's name to a checkpoint folder of ours. Imports torch and transformers when it runs.

<output>/model/           config and safetensors, quantised
<output>/processor/       tokenizer, image processor, chat template: the model's own files
<output>/checkpoint.json  family, quantisation, precision, size
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config.model import BUILTIN_MODEL, ModelConfig
from vlm.errors import ModelError
from vlm.families import family_for_config
from vlm.loading.checkpoint import (
    DESCRIPTION_FILE,
    MODEL_FOLDER,
    PROCESSOR_FOLDER,
    load_model,
    progress_where_seen,
    save_model,
)
from vlm.loading.device import resolve_quantization
from vlm.loading.source import check_weights, fetch_from_hub, is_builtin, local_folder
from vlm.processing import Processing
from vlm.processing.files import read_json

_MAX_SHARD_SIZE = "4GB"


@dataclass(frozen=True)
class CheckpointSummary:
    """What `checkpoint.json` says.

    Attributes:
        family: Name in the family table.
        source: Name of the model: built-in, Hub name, or the folder's own name without its path.
        quantization: ``"nf4"``, ``"int8"`` or ``"none"``.
        double_quantization: Whether NF4's block scales are quantised too.
        keep_unquantized: Parts kept in the precision below, besides the head.
        dtype: Name of the torch dtype of computation and of unquantised weights.
        num_parameters: Number of the model's weights, however they are stored.
        num_quantized_modules: Number of quantised linear layers.
        unquantized_experts: Names of the 3-D parameters of routed experts, which quantisation does not reach: they stay
            in the precision above. Empty without quantisation.
    """

    family: str
    source: str
    quantization: str
    double_quantization: bool
    keep_unquantized: tuple[str, ...]
    dtype: str
    num_parameters: int
    num_quantized_modules: int
    unquantized_experts: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("keep_unquantized", "unquantized_experts")}
        return {**dataclasses.asdict(self), **lists}


def build_checkpoint(model: ModelConfig, output_dir: Path, *, device: str, dtype: str) -> CheckpointSummary:
    """Fetches, quantises and saves a model with its processor. The same inputs give the same bytes.

    Args:
        model: Name and precision.
        output_dir: An empty folder, made if need be.
        device: ``"cpu"`` or ``"cuda"``, where the weights are quantised.
        dtype: Name of the torch dtype of computation and of unquantised weights.

    Raises:
        ModelError: The model cannot be found, is not whole, or is of no known family.
        ResourceError: The device's memory does not hold the model.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    model = model.model_copy(update={"quantization": resolve_quantization(model.quantization, device)})
    if is_builtin(model):
        from vlm.builtin import make_builtin_checkpoint

        with tempfile.TemporaryDirectory() as folder, progress_where_seen():
            return _build(make_builtin_checkpoint(Path(folder)), model.name, model, output_dir, device, dtype)
    source = local_folder(model)
    if source is None:
        return _build(fetch_from_hub(model), model.name, model, output_dir, device, dtype)
    return _build(
        source, model.name if model.name == BUILTIN_MODEL else source.resolve().name, model, output_dir, device, dtype
    )


def _build(
    source: Path, source_name: str, settings: ModelConfig, output_dir: Path, device: str, dtype: str
) -> CheckpointSummary:
    import torch

    from vlm.loading.model_config import model_config
    from vlm.loading.quantization import (
        blueprint,
        expert_parameters,
        is_quantized,
        quantization_config,
        stored_quantization,
        unquantized_modules,
    )

    raw_config = read_json(source / "config.json")
    family = family_for_config(raw_config)
    method = is_quantized(raw_config)
    stored = stored_quantization(raw_config)
    if method is not None and (stored is None or settings.quantization != "none"):
        remedy = "" if stored is None else ", or set model.quantization to 'none' to take it as it is stored"
        raise ModelError(
            f"model.name {settings.name!r} is quantised already ({method}), and quantising starts from 16-bit weights;"
            f" give the original model{remedy}"
        )
    check_weights(source)
    processing = Processing.from_dir(source)
    if family.translate_config is not None:
        raw_config = family.translate_config(raw_config)
    _check_image_token(raw_config, processing, source)
    bare = blueprint(family, model_config(source, family))
    skipped = unquantized_modules(bare, family, settings)
    quantization = quantization_config(settings, skipped, getattr(torch, dtype))
    model = load_model(source, family, device=device, dtype=dtype, quantization=quantization)
    if _settle_tying(model):
        bare = blueprint(family, model.config)
    if not (source / "generation_config.json").is_file():
        stop = {"eos_token_id": list(processing.stop_token_ids), "pad_token_id": processing.pad_token_id}
        model.generation_config.update(**stop, **family.generation_defaults)
    with progress_where_seen():
        save_model(model, output_dir / MODEL_FOLDER, max_shard_size=_MAX_SHARD_SIZE)
    processing.save(output_dir / PROCESSOR_FOLDER)
    summary = CheckpointSummary(
        family=family.model_type,
        source=source_name,
        quantization=settings.quantization if stored is None else stored[0],
        double_quantization=(settings.double_quantization and settings.quantization == "nf4")
        if stored is None
        else stored[1],
        keep_unquantized=tuple(sorted(settings.keep_unquantized)) if quantization is not None else (),
        dtype=dtype,
        num_parameters=sum(parameter.numel() for parameter in bare.parameters()),
        num_quantized_modules=_num_quantized(model),
        unquantized_experts=tuple(expert_parameters(bare, family)) if quantization or stored else (),
    )
    text = json.dumps(summary.to_json(), indent=2, sort_keys=True)
    (output_dir / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")
    return summary


def _settle_tying(model: Any) -> bool:
    """Has the config say so where head and embeddings differ; whether it said otherwise.

    Some configs leave it out and get a default that their weights contradict. transformers goes by the weights then,
    but whoever reads the config alone would share one weight for both.
    """
    apart = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    if not (apart and getattr(model.config, "tie_word_embeddings", False)):
        return False
    for section in (model.config, model.config.get_text_config()):
        section.tie_word_embeddings = False
    return True


def _num_quantized(model: Any) -> int:
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return sum(isinstance(module, kinds) for module in model.modules())


def _check_image_token(config: Any, processing: Processing, source: Path) -> None:
    """A tokenizer of another model would put image tokens where the model does not look for them."""
    for key in ("image_token_id", "image_token_index"):
        if key in config and config[key] != processing.image_token_id:
            raise ModelError(
                f"{source}: config.json says image token {config[key]}, the tokenizer's {processing.family.image_token!r} is"
                f" {processing.image_token_id}; use the tokenizer that belongs to the model"
            )
