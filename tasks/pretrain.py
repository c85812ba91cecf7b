"""The steps of the built-in model's pretraining, as Prefect tasks. They keep their own checkpoints, so nothing is cached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.graph import Json
from vlm.config.pretrain import PretrainConfig

if TYPE_CHECKING:
    from vlm.pretrain.train import TrainingState


@task(name="pretrain", cache_policy=NO_CACHE, persist_result=False)
def train_from_scratch(config: PretrainConfig) -> TrainingState:
    """Trains until all is done or this run's time is over.

    Args:
        config: Settings.
    """
    from vlm.pretrain.train import pretrain

    return pretrain(config)


@task(name="finish", cache_policy=NO_CACHE, persist_result=False)
def finish_model(trained: TrainingState, config: PretrainConfig) -> Json:
    """Writes the finished model, measured and with its card.

    Args:
        trained: A finished training.
        config: Its settings.
    """
    from vlm.pretrain.finish import finish

    return finish(trained, config)
