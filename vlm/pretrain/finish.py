"""From the last checkpoint to a checkpoint folder in bfloat16 with its card. Loads torch and transformers."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm.config.pretrain import PretrainConfig
from vlm.loading.device import detect_device
from vlm.pretrain import state
from vlm.pretrain.card import card
from vlm.pretrain.measure import measure
from vlm.pretrain.train import TrainingState

_OWN = "pretraining.json"
_PACKAGES = ("torch", "transformers", "pillow", "numpy")


def finish(trained: TrainingState, config: PretrainConfig) -> dict[str, Any]:
    """Writes the model, measures it, and writes its card.

    Args:
        trained: A finished training.
        config: Its settings.

    Returns:
        What ``pretraining.json`` says.
    """
    import torch

    from vlm.pretrain.model import new_model, write_model

    assert trained.is_finished, "an unfinished training is gone on with"
    output_dir = Path(config.output_dir)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True)
    model: Any = new_model(config.architecture, config.seed)
    state.load_weights(trained.checkpoint, model)
    write_model(model.to(torch.bfloat16), output_dir)
    # The weights are measured as they are stored.
    readings = measure(output_dir, config, device=detect_device(config.device))
    progress = asdict(trained.progress)
    history = progress.pop("history")
    content = {
        "config": config.model_dump(mode="json", exclude={"work_dir", "output_dir", "real_data"}),
        "progress": {**progress, "seconds": round(trained.progress.seconds, 1)},
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "readings": readings,
        "last_figures": history[-1] if history else {},
    }
    (output_dir / _OWN).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (output_dir / "README.md").write_text(card(content), encoding="utf-8")
    return content
