"""Pretrains the built-in model from random weights on drawn lines of text.

python -m flows.pretrain_builtin                     trains until this run's time is over, or all is done
python -m flows.pretrain_builtin                     again: goes on from the checkpoint; at the end measures and writes the model
python -m flows.pretrain_builtin --num_steps 12000   by steps and not by time: the same training wherever it runs

Needs the extra `pretrain`, whose packages have the typefaces and words, and for the whole of it a GPU.
"""

if __name__ == "__main__":
    # Prefect takes seconds to import; the help or a wrong setting should not wait for it.
    from flows.pretrain_cli import main

    raise SystemExit(main())

from prefect import flow

from flows.shared import cancelled_when_interrupted
from tasks.graph import Json
from tasks.pretrain import finish_model, train_from_scratch
from vlm.config.pretrain import PretrainConfig

DEFAULTS = PretrainConfig()


@flow(name="pretrain-builtin", persist_result=False, validate_parameters=True, on_crashed=[cancelled_when_interrupted])
def pretrain_builtin(config: PretrainConfig = DEFAULTS) -> Json:
    """Trains the built-in model, or goes on with it, and measures it when it is done.

    Args:
        config: All settings.

    Returns:
        Whether it is finished, steps so far, and, of a finished one, what it reads.
    """
    trained = train_from_scratch(config)
    progress = trained.progress
    summary: Json = {"is_finished": trained.is_finished, "step": progress.step, "seconds": round(progress.seconds, 1)}
    if trained.is_finished:
        summary |= {"readings": finish_model(trained, config)["readings"], "output_dir": config.output_dir}
    return summary
