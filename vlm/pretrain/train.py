"""The pretraining's loop. Loads torch and transformers.

It runs the core's packed model and loss, but not TRL's trainer: that takes prepared rows from a disk and pixels as
floats from four processes, which would feed a model of this size a tenth of what it can learn from, and nothing here is
an epoch. All weights are trained, in float32 under bfloat16 autocast.
"""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm.config import TrainingConfig
from vlm.config.pretrain import PretrainConfig
from vlm.errors import ConfigError
from vlm.families import family_for_config
from vlm.kernels.head_loss import head_loss
from vlm.loading.device import detect_device
from vlm.packing.model import packed
from vlm.pretrain import state
from vlm.pretrain.batch import Tensors, model_inputs, to_device
from vlm.pretrain.feed import Feed
from vlm.pretrain.model import new_model, patches_by_product, write_model
from vlm.pretrain.schedule import learning_rate
from vlm.training.collator import IGNORED
from vlm.training.interrupt import StopFlag, TrainingInterrupted
from vlm.training.self_check import check_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGGER = logging.getLogger(__name__)
_BLOCK = 16
"""Packs that are held on the device, so that the uses of one lie apart."""


@dataclass(frozen=True)
class TrainingState:
    """Where a run left the training.

    Attributes:
        progress: How far it is.
        is_finished: Whether nothing is left to train.
        checkpoint: Folder of the weights.
    """

    progress: state.Progress
    is_finished: bool
    checkpoint: Path


def pack_of_step(step: int, uses: int) -> int:
    """Number of the pack that a step trains on: blocks of packs, each gone through several times."""
    block, place = divmod(step, _BLOCK * uses)
    return block * _BLOCK + place % _BLOCK


class Clock:
    """The share of the training that is done, by steps or by time.

    Args:
        config: Says which.
        before: Seconds of earlier runs.
    """

    def __init__(self, config: PretrainConfig, before: float) -> None:
        self._config = config
        self._before = before
        self._started: float | None = None

    def start(self) -> None:
        """Time counts from here."""
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent on training, over all runs."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def done(self, step: int) -> float:
        """Share at a step, from 0 to 1."""
        if self._config.num_steps is not None:
            return min(1.0, step / self._config.num_steps)
        return min(1.0, self.seconds / (60 * self._config.minutes))


def pretrain(config: PretrainConfig) -> TrainingState:
    """Trains until all is done, the run's time is over, or a signal comes; goes on from the newest checkpoint.

    Args:
        config: Settings.

    Returns:
        Where it stands; its checkpoint is written.

    Raises:
        ConfigError: The loss became infinite.
    """
    began = time.perf_counter()
    device = torch.device(detect_device(config.device))
    work_dir = Path(config.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    name = state.identity(config)
    model: Any = new_model(config.architecture, config.seed)
    skeleton = work_dir / "processor"
    skeleton.mkdir(exist_ok=True)
    write_model(model, skeleton)  # for the processes that draw
    found = state.newest(work_dir, name)
    progress = state.Progress() if found is None else found[1]
    if found is not None:
        state.load_weights(found[0], model)
    clock = Clock(config, progress.seconds)
    if found is not None and clock.done(progress.step) >= 1:
        return TrainingState(progress, True, found[0])
    first_block = pack_of_step(progress.step, config.uses_per_pack) // _BLOCK * _BLOCK
    with ExitStack() as stack:
        flag = stack.enter_context(StopFlag())
        feed = stack.enter_context(
            Feed(skeleton, config, first_block, lambda pack: clock.done(pack * config.uses_per_pack))
        )
        if device.type == "cuda":
            check_kernels(
                TrainingConfig(fused_kernels=False), device="cuda", dtype=torch.bfloat16, packing=True, quantized=False
            )
        model.to(device).train()
        stack.enter_context(patches_by_product(model))
        stack.enter_context(packed(model, family_for_config(model.config.to_dict())))
        loop = _Loop(config, model, device, feed, progress, clock)
        if found is not None:
            state.load_averages(found[0], model, loop.optimizer)
        progress.num_runs += 1
        progress.device = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        feed.wait()
        is_finished = loop.run(
            lambda: _is_over(config, began, flag), lambda: state.save(work_dir, progress, model, loop.optimizer, name)
        )
        if flag.signum is not None:
            raise TrainingInterrupted(progress.step, flag.signum)
    (work_dir / "history.json").write_text(json.dumps(progress.history, indent=1), encoding="utf-8")
    return TrainingState(progress, is_finished, work_dir / f"checkpoint-{progress.step}")


def _is_over(config: PretrainConfig, began: float, flag: StopFlag) -> bool:
    return flag.signum is not None or time.perf_counter() - began > 60 * config.run_minutes


class _Loop:
    def __init__(
        self,
        config: PretrainConfig,
        model: PreTrainedModel,
        device: torch.device,
        feed: Feed,
        progress: state.Progress,
        clock: Clock,
    ) -> None:
        self.config, self.model, self.device = config, model, device
        self.feed, self.progress, self.clock = feed, progress, clock
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            fused=device.type == "cuda",
        )
        self.block: list[tuple[Tensors, torch.Tensor, torch.Tensor, int]] = []
        self.sums = torch.zeros(3, device=device)

    def run(self, is_over: Any, save: Any) -> bool:
        """Trains; whether all is done."""
        config, progress, clock = self.config, self.progress, self.clock
        place = progress.step % (_BLOCK * config.uses_per_pack)
        # A resumed training has the packs of its block drawn again, those behind it included.
        for _ in range(min(_BLOCK, place)):
            self._draw()
        clock.start()
        saved, logged = clock.seconds, (progress.step, clock.seconds, progress.num_lines)
        waits = 0
        while clock.done(progress.step) < 1:
            place = progress.step % (_BLOCK * config.uses_per_pack)
            if place == 0:
                self.block.clear()
            if place < _BLOCK:
                waits += self.feed.is_late
                self._draw()
            self._step(*self.block[place % _BLOCK])
            progress.step += 1
            progress.seconds = clock.seconds
            if progress.step % config.log_every_steps == 0:
                self._log(logged, waits)
                logged, waits = (progress.step, clock.seconds, progress.num_lines), 0
            if is_over():
                break
            if clock.seconds - saved > 60 * config.checkpoint_minutes:
                self._check()
                save()
                saved = clock.seconds
        self._check()
        save()
        return clock.done(progress.step) >= 1

    def _draw(self) -> None:
        pack = next(self.feed)
        labelled = np.flatnonzero(pack["labels"][0, 1:] != IGNORED)
        targets = pack.pop("labels")[0, 1:][labelled]
        tensors = to_device(pack, self.device)
        rows, words = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in (labelled, targets))
        self.block.append((tensors, rows, words, len(pack["image_grid_thw"])))

    def _step(self, tensors: Tensors, rows: torch.Tensor, words: torch.Tensor, num_lines: int) -> None:
        progress = self.progress
        rate = learning_rate(self.config, progress.step, self.clock.done(progress.step))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        chance = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + progress.step)
        inputs = model_inputs(tensors, chance)
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            # Each position answers for the word after it.
            total, num_right = head_loss(hidden[0].index_select(0, rows), self.model.get_output_embeddings(), words)
        (total / len(words)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums += torch.stack([total.detach() / len(words), num_right / len(words), norm])
        progress.num_lines += num_lines
        progress.num_tokens += len(words)

    def _log(self, before: tuple[int, float, int], waits: int) -> None:
        progress, (step, seconds, num_lines) = self.progress, before
        loss, right, norm = (self.sums / (progress.step - step)).tolist()
        self.sums.zero_()
        now = self.clock.seconds
        done = self.clock.done(progress.step)
        entry = {
            "step": progress.step,
            "done": round(done, 4),
            "seconds": round(now, 1),
            "loss": round(loss, 4),
            "letters_right": round(right, 4),
            "grad_norm": round(norm, 3),
            "learning_rate": learning_rate(self.config, progress.step, done),
            "lines_per_second": round((progress.num_lines - num_lines) / max(now - seconds, 1e-9), 1),
            "steps_waited": waits,
        }
        progress.history.append(entry)
        _LOGGER.info("%s", json.dumps(entry))
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss became {loss} by step {progress.step}; lower learning_rate {self.config.learning_rate} and run again, from"
                " the last checkpoint"
            )

    def _check(self) -> None:
        """No checkpoint of weights that are spoilt."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise ConfigError(
                f"weights became infinite by step {self.progress.step}; lower learning_rate {self.config.learning_rate} and run again"
            )
