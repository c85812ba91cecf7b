"""What the facade knows about a model that it handed out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm.errors import ConfigError

if TYPE_CHECKING:
    from vlm.loading.checkpoint import LoadedModel

_ATTRIBUTE = "vision_finetune_state"


@dataclass
class FacadeState:
    """Kept on the base model, where adapters put on top of it find it too.

    Attributes:
        loaded: The base model with what belongs to it.
        name: Name that the user gave: built-in, Hub name or path.
        max_seq_length: Longest conversation in tokens for the collator; None sets no limit.
        gradient_checkpointing: Whether training recomputes activations.
        full_finetuning: Whether all weights learn, rather than an adapter.
        adapter_files: Description files of the adapter or of the full fine-tuning by name; empty before there is one.
    """

    loaded: LoadedModel
    name: str
    max_seq_length: int | None
    gradient_checkpointing: bool
    full_finetuning: bool
    adapter_files: dict[str, bytes] = field(default_factory=dict)


def keep_state(model: Any, state: FacadeState) -> None:
    """Puts the state on a base model."""
    setattr(model, _ATTRIBUTE, state)


def state_of(model: Any) -> FacadeState:
    """The state of a model, with or without an adapter on it.

    Raises:
        ConfigError: The model was not made here.
    """
    state = getattr(model, _ATTRIBUTE, None)
    if not isinstance(state, FacadeState):
        raise ConfigError(
            f"this {type(model).__name__} does not come from vlm.FastVisionModel.from_pretrained, so nothing is known about"
            " its processor and base weights; load it with that"
        )
    return state
