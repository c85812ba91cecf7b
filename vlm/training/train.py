"""Step 5: trains the adapter as planned, from the newest complete checkpoint where there is one.

Loads torch, transformers, trl and peft.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm.config import EvaluationConfig, GenerationConfig, TrainingConfig
from vlm.errors import ConfigError, ResourceError
from vlm.lora.attach import attach_adapter, detach_adapter
from vlm.lora.peft_model import (
    CONFIG_FILE,
    TARGETS_FILE,
    WEIGHTS_FILE,
    base_model,
    save_tensors,
)
from vlm.training import checkpoints
from vlm.training.activation import ActivationPlan
from vlm.training.collator import IGNORED
from vlm.training.distributed.dealing import dealt_batches, dealt_packs, shares
from vlm.training.interrupt import StopFlag, TrainingInterrupted
from vlm.training.plan import BATCHES_FILE, PLAN_FILE, PlanSummary, read_plan
from vlm.training.results import ROUND_PREFIX, TrainingSummary, write_results

if TYPE_CHECKING:
    from peft import PeftModel

    from vlm.data.prepared import PreparedDataset
    from vlm.loading.checkpoint import LoadedModel
    from vlm.training.best import KeepBest
    from vlm.training.distributed.ranks import Ranks
    from vlm.training.distributed.sharding import Sharded
    from vlm.training.rounds import AnswerRounds
    from vlm.training.trainer import AdapterTrainer

# 8-bit states come in blocks that slices do not follow, and a loss scale must be the same in all processes.
_ON_SLICES = (("adamw", "float32"), ("adamw", "bfloat16"))
_DESCRIPTION_FILES = (WEIGHTS_FILE, CONFIG_FILE, TARGETS_FILE)


def train_adapter(
    loaded: LoadedModel,
    adapter_dir: Path,
    dataset_dir: Path,
    plan_dir: Path,
    training: TrainingConfig,
    output_dir: Path,
    *,
    work_dir: Path,
    generation: GenerationConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    callbacks: Sequence[Any] = (),
    report_to: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> TrainingSummary:
    """Trains.

    Args:
        loaded: The base model; as before when this returns or raises.
        adapter_dir: The initial adapter.
        dataset_dir: Prepared dataset.
        plan_dir: The plan.
        training: Settings, the ones that the plan was made with.
        output_dir: Receives ``adapter/`` and ``training/``.
        work_dir: Keeps checkpoints between runs; made if it is not there.
        generation: How rows are answered during training, where they are; None for the defaults.
        evaluation: How those answers are scored; None for the defaults.
        callbacks: More transformers `TrainerCallback`s.
        report_to: Names of transformers' own integrations.
        ranks: This process among several that train together, all of which call this and the first of which writes; None
            where it is alone.

    Returns:
        The content of ``training.json``.

    Raises:
        TrainingInterrupted: SIGTERM or Ctrl-C came; the last finished step is in a checkpoint in `work_dir`.
        ConfigError: The plan was made for another device or precision, or the loss became infinite.
        ResourceError: A kernel gives wrong results on this GPU.
    """
    plan = read_plan(plan_dir)
    if (plan.device, plan.dtype) != (loaded.device, loaded.dtype):
        raise ConfigError(
            f"the plan is for {plan.device} in {plan.dtype} but the model is loaded on {loaded.device} in {loaded.dtype};"
            " plan again, or load the model as planned"
        )
    if loaded.device == "cuda":
        from vlm.training.self_check import check_kernels

        quantized = bool(getattr(loaded.model, "is_loaded_in_4bit", False))
        dtype = getattr(torch, plan.dtype)
        check_kernels(
            training,
            device=loaded.device,
            dtype=dtype,
            packing=bool(plan.packing),
            quantized=quantized,
            embedding_on_host=ActivationPlan(**plan.activations).embedding_on_host,
        )
    started = time.perf_counter()
    work_dir.mkdir(parents=True, exist_ok=True)
    generation, evaluation = generation or GenerationConfig(), evaluation or EvaluationConfig()
    answering = {
        "generation": generation.model_dump_json(include={"batch_size", "max_new_tokens"}),
        "evaluation": evaluation.model_dump_json(exclude={"slice_by"}),
    }
    identity = checkpoints.training_identity(
        {
            **(answering if training.generate_every_steps is not None else {}),
            "plan": plan_dir / PLAN_FILE,
            "batches": plan_dir / BATCHES_FILE,
            **{name: adapter_dir / name for name in _DESCRIPTION_FILES if (adapter_dir / name).is_file()},
            "training": training.model_dump_json(exclude={"checkpoint_every_steps", "log_every_steps", "distributed"}),
        }
    )
    if loaded.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    resume = _checkpoint(work_dir, identity, ranks)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        flag = stack.enter_context(StopFlag() if ranks is None else ranks.stop)
        peft_model = attach_adapter(loaded, adapter_dir, trainable=True)
        sharded = None
        if ranks is not None and training.distributed.strategy == "fsdp2":
            from vlm.training.distributed.sharding import Sharded

            # For the rest of this process's life.
            sharded = Sharded(peft_model, loaded.family, loaded.device, loaded.dtype, ranks)
            if sharded.trains_slices and (plan.optimizer, plan.dtype) not in _ON_SLICES:
                raise ConfigError(
                    f"optimizer {plan.optimizer!r} in {plan.dtype} does not work on slices of weights, which"
                    " training.distributed.strategy 'fsdp2' makes; set training.optimizer to 'adamw' and model.precision to 'bfloat16'"
                )
        else:
            stack.callback(detach_adapter, peft_model)
        trainer, rounds, best = _trainer(
            loaded,
            peft_model,
            dataset_dir,
            plan_dir,
            plan,
            training,
            generation,
            evaluation,
            work_dir=work_dir,
            identity=identity,
            flag=flag,
            callbacks=callbacks,
            report_to=report_to,
            stack=stack,
            first_step=resume[0] if resume else 0,
            ranks=ranks,
            sharded=sharded,
        )
        if best is not None and resume is not None:
            best.restore(resume[1])
        if best is not None and resume is not None and best.is_exhausted:
            trainer.take_over(resume[1])
        else:
            trainer.train(resume_from_checkpoint=str(resume[1]) if resume else None)
        last_step = trainer.state.global_step
        if flag.signum is None and plan.num_validation_rows:
            if not _logged(trainer.state.log_history, last_step, "eval_loss"):
                trainer.evaluate()
            if rounds is not None and not _logged(trainer.state.log_history, last_step, ROUND_PREFIX):
                rounds.run()
        if flag.signum is not None:
            raise TrainingInterrupted(last_step, flag.signum)
        writes = ranks is None or ranks.rank == 0
        if writes:
            for name in ("adapter", "training"):
                (output_dir / name).mkdir(parents=True, exist_ok=True)
        if best is None:
            # All processes have a part in putting spread tensors together.
            _save(peft_model, ranks, sharded, output_dir / "adapter" / WEIGHTS_FILE)
        elif writes:
            best.copy_to(output_dir / "adapter" / WEIGHTS_FILE)
        for name in (CONFIG_FILE, TARGETS_FILE):
            # Full fine-tuning has no configuration of an adapter.
            if writes and (adapter_dir / name).is_file():
                shutil.copyfile(adapter_dir / name, output_dir / "adapter" / name)
        return write_results(
            trainer.state.log_history,
            output_dir / "training" if writes else None,
            num_steps=last_step,
            stopped_early=last_step < plan.num_steps,
            best_step=None if best is None else best.step,
            best_value=None if best is None else best.value,
            resumed_from_step=resume[0] if resume else None,
            wall_seconds=time.perf_counter() - started,
            device=loaded.device,
            parameters_without_gradient=trainer.parameters_without_gradient(),
        )


def _save(peft_model: PeftModel, ranks: Ranks | None, sharded: Sharded | None, path: Path) -> None:
    """Writes what learns, in the first process."""
    if sharded is not None:
        sharded.save(path)
    elif ranks is None or ranks.rank == 0:
        save_tensors(peft_model, path)


def _checkpoint(work_dir: Path, identity: str, ranks: Ranks | None) -> tuple[int, Path] | None:
    """The checkpoint to go on from, as its step and folder; all others are removed."""
    resume = None
    if ranks is None or ranks.rank == 0:
        resume = checkpoints.newest_complete(work_dir, identity)
        checkpoints.remove_others(work_dir, keep=resume[1] if resume else None)
    if ranks is None:
        return resume
    found = ranks.gather(None if resume is None else (resume[0], resume[1].name))[0]
    if found is None:
        return None
    folder = work_dir / found[1]
    if not folder.is_dir():
        raise ResourceError(
            f"process {ranks.rank} does not see the checkpoint {folder} that process 0 goes on from; give all machines the same"
            " store on a file system that they share"
        )
    return int(found[0]), folder


def _trainer(
    loaded: LoadedModel,
    peft_model: PeftModel,
    dataset_dir: Path,
    plan_dir: Path,
    plan: PlanSummary,
    training: TrainingConfig,
    generation: GenerationConfig,
    evaluation: EvaluationConfig,
    *,
    work_dir: Path,
    identity: str,
    flag: StopFlag,
    callbacks: Sequence[Any],
    report_to: Sequence[str],
    stack: ExitStack,
    first_step: int,
    ranks: Ranks | None,
    sharded: Sharded | None,
) -> tuple[AdapterTrainer, AnswerRounds | None, KeepBest | None]:
    import datasets

    from vlm.data.prepared import PreparedDataset
    from vlm.kernels.host_embedding import embedding_on_host
    from vlm.kernels.install import fused
    from vlm.training.arguments import training_arguments
    from vlm.training.best import KeepBest
    from vlm.training.callbacks import Pace, ProgressBar, StopAtStepBoundary
    from vlm.training.capture import graph_stacks
    from vlm.training.collator import VisionDataCollator
    from vlm.training.memory import towers
    from vlm.training.rates import check_rates, rates_by_part, split_groups
    from vlm.training.recompute import recomputed
    from vlm.training.rounds import AnswerRounds
    from vlm.training.trainer import AdapterTrainer, forward_restored
    from vlm.training.walks import short_walks

    base = base_model(peft_model)
    trained_parts = {
        loaded.family.part_of(name) for name, parameter in base.named_parameters() if parameter.requires_grad
    }
    check_rates(training, trained_parts)
    rates = rates_by_part(training)
    stack.enter_context(forward_restored(base))
    stack.enter_context(short_walks(peft_model))
    if training.fused_kernels:
        stack.enter_context(fused(base, loaded.family))
    collator = VisionDataCollator(
        loaded.processing,
        train_on_prompts=training.train_on_prompts,
        model_config=base.config.to_dict(),
        pixels_as_bytes=True,
    )
    collate: Callable[..., dict[str, Any]] = collator
    if plan.packing:
        from vlm.packing.model import packed

        stack.enter_context(packed(base, loaded.family))
        collate = collator.pack
    rows = PreparedDataset(dataset_dir, "train")
    validation = PreparedDataset(dataset_dir, "validation")
    batches = datasets.Dataset.from_file(str(plan_dir / BATCHES_FILE))
    lengths = np.asarray(rows.num_tokens)
    activations = ActivationPlan(**plan.activations)
    if activations.embedding_on_host:
        stack.enter_context(embedding_on_host(base))
    stacks = None
    # Spread weights have no fixed address.
    if activations.cuda_graphs and sharded is None:
        patches = towers(base.config.to_dict(), loaded.family)[2] * np.asarray(rows.num_visual_tokens)
        stacks = graph_stacks(
            peft_model,
            activations,
            most_patches=max(int(patches[batch].sum()) for batch in batches["rows"]),
            most_tokens=plan.largest_micro_batch_tokens,
        )
    stack.enter_context(recomputed(base, loaded.family, activations, stacks=stacks))
    pace = Pace(*_work_of_steps(batches, lengths, plan.num_steps))
    pace.start(first_step)
    own_callbacks = []
    if ranks is None:
        # Whoever started several processes shows one bar for all.
        own_callbacks.append(ProgressBar())
        stack.callback(own_callbacks[0].close)
    stack.callback(peft_model.eval)
    rounds = best = None
    if training.generate_every_steps is not None:
        rounds = AnswerRounds(peft_model, loaded.processing, dataset_dir, training, generation, evaluation, pace, ranks)
    if training.keep_best != "none":
        save = partial(_save, peft_model, ranks, sharded)
        best = KeepBest(training, work_dir, save, writes=ranks is None or ranks.rank == 0)
    validation_lengths = np.asarray(validation.num_tokens)
    to_validate = validation_batches(validation_lengths, training.batch_size, plan)
    if ranks is not None:
        taken = shares(to_validate, validation_lengths, ranks.size)
        dealt = [[to_validate[place] for place in places] for places in taken]
        to_validate = _with_fillers(dealt, validation, sharded)[ranks.rank]
    trainer = AdapterTrainer(
        peft_model,
        training_arguments(training, plan, work_dir, report_to),
        steps=_steps(batches, plan, rows, ranks, sharded),
        collate=partial(_collate, collate, rows),
        lengths=lengths,
        tokenizer=loaded.processing.tokenizer,
        validation=to_validate,
        collate_validation=partial(_collate, collate, validation),
        identity=identity,
        pace=pace,
        split_groups=partial(split_groups, family=loaded.family, rates=rates) if rates else None,
        stacks=stacks or (),
        best=best,
        ranks=ranks,
        sharded=sharded,
        # A round's figures come before they are compared, and the stop flag is looked at last, so that nothing else of
        # the step is left out.
        callbacks=[*own_callbacks, *callbacks, *filter(None, (rounds, best)), StopAtStepBoundary(flag)],
    )
    if rounds is not None:
        rounds.connect(trainer.log, trainer.accelerator.autocast)
    return trainer, rounds, best


def _collate(collate: Callable[..., dict[str, Any]], rows: PreparedDataset, numbers: Sequence[int]) -> dict[str, Any]:
    if numbers[0] >= 0:
        return collate([rows[number] for number in numbers])
    # Complements stand for rows that are only there to be computed.
    batch = collate([rows[~number] for number in numbers])
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def _steps(batches: Any, plan: PlanSummary, rows: PreparedDataset, ranks: Ranks | None, sharded: Sharded | None) -> Any:
    """The plan's micro-batches by step, or this process's part of them, as the trainer's dataset."""
    import datasets

    steps: list[list[list[int]]] = [[] for _ in range(plan.num_steps)]
    for step, numbers in zip(batches["step"], batches["rows"], strict=True):
        steps[step].append(list(numbers))
    if ranks is not None:
        deal = dealt_packs if plan.packing else dealt_batches
        lengths, visual = np.asarray(rows.num_tokens), np.asarray(rows.num_visual_tokens)
        steps = [_with_fillers(deal(parts, lengths, visual, ranks.size), rows, sharded)[ranks.rank] for parts in steps]
    feature = datasets.List(datasets.List(datasets.Value("int64")))
    return datasets.Dataset.from_dict({"micro_batches": steps}, datasets.Features({"micro_batches": feature}))


def _with_fillers(
    dealt: list[list[list[int]]], rows: PreparedDataset, sharded: Sharded | None
) -> list[list[list[int]]]:
    """Equally many micro-batches for each process, where all must put the same layers together: with rows that do not count."""
    if sharded is None or not any(dealt):
        return dealt
    # Without images where there is such a row, then the shortest.
    order = np.lexsort((np.asarray(rows.num_tokens), np.asarray(rows.num_visual_tokens)))
    most = max(map(len, dealt))
    return [parts + [[~int(order[0])]] * (most - len(parts)) for parts in dealt]


def validation_batches(lengths: np.ndarray, batch_size: int, plan: PlanSummary) -> list[list[int]]:
    """Puts the validation rows into packs no larger than the training's, or into padded batches of like length.

    Args:
        lengths: Array of shape [rows]: tokens of each row.
        batch_size: Rows in a padded batch.
        plan: Whether to pack, and the training's largest pack.

    Returns:
        Row numbers of each batch.
    """
    if plan.packing:
        from vlm.packing.bins import first_fit_decreasing

        sizes, limit = lengths[:, None].astype(np.float64), np.array([float(plan.largest_micro_batch_tokens)])
        return [sorted(items) for items in first_fit_decreasing(sizes, limit)]
    order = np.argsort(-lengths, kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _work_of_steps(batches: Any, lengths: np.ndarray, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    rows_of_batch = [np.asarray(rows) for rows in batches["rows"]]
    steps = np.repeat(np.asarray(batches["step"]), [len(rows) for rows in rows_of_batch])
    rows = np.concatenate(rows_of_batch)
    tokens = np.bincount(steps, weights=lengths[rows], minlength=num_steps).astype(np.int64)
    return tokens, np.bincount(steps, minlength=num_steps)


def _logged(history: Sequence[dict[str, Any]], step: int, prefix: str) -> bool:
    return any(entry["step"] == step and any(name.startswith(prefix) for name in entry) for entry in history)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' advice out of the terminal; errors are raised anyway."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
