"""The one live model of the process, shared by the steps that need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from artifacts.refs import ArtifactRef
from tasks.session import Session

if TYPE_CHECKING:
    from vlm.loading.checkpoint import LoadedModel


def held_model(session: Session, checkpoint: ArtifactRef) -> LoadedModel:
    """The base model of a checkpoint, loaded at most once in a row of steps.

    Live models never cross a task boundary; tasks ask here with the checkpoint's reference instead.
    """
    from vlm.loading.checkpoint import load_checkpoint
    from vlm.loading.holder import hold

    device = session.resolved.device

    def load() -> LoadedModel:
        return load_checkpoint(session.local(checkpoint), device=device, digest=checkpoint.digest)

    return hold(f"{checkpoint.digest}:{device}", load)
