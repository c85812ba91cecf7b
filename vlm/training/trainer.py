"""TRL's ``SFTTrainer``, made to follow a plan.

One item of the trainer's dataset is one planned step, taken in the plan's order; so a resumed run skips exactly what was
done. What differs from the stock trainer, and why:

- a step's micro-batches come together, since their number differs from step to step; where one does not fit into memory
  after all, the step starts anew with smaller ones.
- ``skip_prepare_dataset`` and our own batches: tokens, labels and images were settled in step 3.
- the loss is summed over the step's supervised tokens and divided by their number, whatever their distribution over
  micro-batches; logits are made a few rows at a time, and for supervised tokens only (`vlm.training.loss`).
- validation loss is weighted by tokens, not by batches.
- checkpoints are our own (`vlm.training.resumable`).
- several processes train as one (`vlm.training.distributed`): each is a trainer that knows of no other until a step's
  gradients are summed, so what runs on one GPU is what runs on many.
- a quantised base does not turn the adapter to bfloat16 (TRL's default), where small updates get lost.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import AutocastKwargs
from torch.utils.data import Sampler, SequentialSampler, get_worker_info
from transformers import PrinterCallback, ProgressCallback
from trl import SFTConfig

from vlm.errors import ConfigError, ResourceError
from vlm.families.pixels import PixelBytes
from vlm.lora.peft_model import adapter_parameters, base_model
from vlm.processes.signals import leave_to_parent
from vlm.training.best import KeepBest
from vlm.training.callbacks import Pace
from vlm.training.capture import Stack
from vlm.training.collator import IGNORED
from vlm.training.distributed.combine import combine_step
from vlm.training.distributed.ranks import Ranks, is_spread
from vlm.training.flat import FlatParameters
from vlm.training.loss import add_supervised_loss
from vlm.training.resumable import ResumableTrainer
from vlm.training.shrinking import Shrinking

if TYPE_CHECKING:
    from vlm.training.distributed.sharding import Sharded

Rows = Sequence[int]
_LOGGER = logging.getLogger(__name__)


class AdapterTrainer(ResumableTrainer):
    """Trains the adapter of a PEFT model along planned steps.

    Args:
        model: A PEFT model whose adapter's parameters are float32.
        args: Settings.
        steps: `datasets.Dataset` with a column `micro_batches`: for each step, the row numbers of each micro-batch.
        collate: Turns row numbers of the training split into a micro-batch.
        lengths: Array of shape [rows]: tokens of each row of the training split.
        tokenizer: The model's tokenizer.
        validation: Row numbers of each validation batch.
        collate_validation: As `collate`, for the validation split.
        identity: Of the training, for its checkpoints.
        pace: Counts tokens and samples.
        split_groups: Changes the optimiser's parameter groups before its first step, given their names.
        stacks: Where the model's layers keep CUDA graphs.
        best: Keeps the best adapter, and is one of the callbacks; its state goes into the checkpoints.
        ranks: This process among several, which have the same steps but for the micro-batches in them and the validation
            batches; None where it is alone.
        sharded: Set where the model is spread over the processes.
        callbacks: More `TrainerCallback`s.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        steps: Any,
        collate: Callable[[Rows], dict[str, Any]],
        lengths: npt.NDArray[np.int64],
        tokenizer: Any,
        validation: Sequence[Rows],
        collate_validation: Callable[[Rows], dict[str, Any]],
        identity: str,
        pace: Pace,
        split_groups: Callable[[list[dict[str, Any]], dict[Any, str]], list[dict[str, Any]]] | None = None,
        stacks: Sequence[Stack] = (),
        best: KeepBest | None = None,
        ranks: Ranks | None = None,
        sharded: Sharded | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self._best = best
        self._ranks = ranks
        self._sharded = sharded
        self._have_met = False
        self._stacks = stacks
        self._validation = validation
        self._collate_validation = collate_validation
        self._identity = identity
        self._steps = steps
        self._collate = collate
        self._shrinking = Shrinking(lengths)
        self._work_dir = Path(str(args.output_dir))
        self._peft_model = model
        self._pace = pace
        self._split_groups = split_groups
        self._right: list[tuple[torch.Tensor, torch.Tensor]] = []
        trained = [
            (parameter, parameter.data)
            for parameter in model.parameters()
            if parameter.requires_grad and not is_spread(parameter)
        ]
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(_collate_step, collate),
            train_dataset=steps,
            # Only its presence counts; `evaluate` below does the work.
            eval_dataset=steps.select(range(1)) if validation or args.eval_strategy != "no" else None,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        for parameter, data in trained:
            parameter.data = data
        if not self._is_adapter():
            # Or a copy of every weight would stay until the forward pass is over, of all layers, also where only a slice of
            # each is kept, or where they are recomputed.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        # Some models (Qwen2.5-VL) declare that they take no loss arguments, upon which the trainer would not count the
        # step's tokens and give every micro-batch the same weight. The loss is ours here, not the model's.
        self.model_accepts_loss_kwargs = True
        add_supervised_loss(base_model(model))
        # Our own bar shows what these print.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # With a tokenizer the trainer would write its ids into the model's configuration, and save it every time.
        self.processing_class = None

    def _send_telemetry(self) -> None:
        """A training reports to nobody but its user."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks over all parameters for every micro-batch."""
        return 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The usual optimiser; its groups are split where parts have learning rates of their own.

        On a GPU an adapter's parameters become slices of long ones. Full fine-tuning has few and large ones, and scaled
        float16 gradients are looked at one by one before the optimiser sees them.
        """
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self._sharded is not None:
            from vlm.training.distributed.sharding import restore_groups

            # Some versions of the stock trainer split them where some parameters are spread.
            restore_groups(
                optimizer, self._peft_model, self.get_decay_parameter_names(self._peft_model), self.args.weight_decay
            )
        if made and self._split_groups is not None:
            names = {parameter: name for name, parameter in self._peft_model.named_parameters()}
            optimizer.param_groups[:] = self._split_groups(optimizer.param_groups, names)
        if made and self.args.device.type == "cuda" and self._is_adapter() and not self.args.fp16:
            self._flat = FlatParameters(optimizer)
            for stack in self._stacks:
                stack.flat = self._flat
        if made and self._ranks is not None and self._sharded is not None and not self._is_adapter():
            from vlm.training.distributed.sharding import LocalShards

            self._shards = LocalShards(optimizer, self._sharded, self._ranks)
        return optimizer

    def _is_adapter(self) -> bool:
        names = [name for name, parameter in self._peft_model.named_parameters() if parameter.requires_grad]
        return any("lora_" in name for name in names) and not any(
            "embed" in name or "lm_head" in name for name in names
        )

    def parameters_without_gradient(self) -> list[str]:
        """Names of trained parameters that never had a gradient, over all of a resumed training."""
        parameters = adapter_parameters(self._peft_model)
        if self._flat is not None:
            if self._ranks is not None:
                self._flat.merge(self._ranks.sum)
            return self._flat.without_gradient(parameters)
        # Optimisers keep no state for them, and a resumed training gets the state back.
        assert self.optimizer is not None, "made when training began"
        if self._shards is not None:
            return self._shards.without_state(parameters)
        return [name for name, parameter in parameters.items() if not self.optimizer.state.get(parameter)]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices decay; norms, biases and DoRA's magnitudes do not.

        The stock rule goes by names, and takes some vision towers' RMSNorms for matrices.
        """
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy summed over the micro-batch's labelled positions, divided by the step's number of them."""
        outputs = model(**inputs, supervised=True)
        num_tokens = outputs.num_supervised if num_items_in_batch is None else num_items_in_batch
        loss = outputs.total / torch.as_tensor(num_tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The number is that of all processes, over which gradients are averaged.
            loss = loss * self.accelerator.num_processes
        # Kept on the device: reading them for every micro-batch would make the host wait for the GPU.
        self._right.append((outputs.num_right, outputs.num_supervised))
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self._steps)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        micro_batches = [micro_batch for step in batch_samples for micro_batch in step["micro_batches"]]
        if self._ranks is None:
            return super()._get_num_items_in_batch(micro_batches, device)
        if not self._have_met:
            # What is compiled or read first may take one process much longer than another.
            self._ranks.wait()
            self._have_met = True
        own = sum(int((micro_batch["labels"][:, 1:] != IGNORED).sum()) for micro_batch in micro_batches)
        num_tokens = torch.tensor(own, device=device)
        # From GPU to GPU, so that no host waits for another; at the end of the step they agree anyway.
        self._ranks.add([num_tokens])
        return num_tokens

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The next step's batch, and how long it was waited for."""
        return super().get_batch_samples(self._pace.timed(epoch_iterator), num_batches, device)

    def _prepare_input(self, data: Any) -> Any:
        """To the device, where bytes become the tensor that the model takes, in the precision that it computes in."""
        if isinstance(data, PixelBytes):
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            return data.to(self.args.device).values(dtype)
        return super()._prepare_input(data)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over all micro-batches of a step.

        Args:
            model: The wrapped model.
            inputs: `micro_batches` with the `rows` that each is made of.
            num_items_in_batch: Supervised tokens of the step.

        Returns:
            The step's loss.

        Raises:
            ResourceError: A single row does not fit into memory.
        """
        with nullcontext() if self._ranks is None else self._ranks.within_step():
            return self._all_passes(model, inputs, num_items_in_batch)

    def _all_passes(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        rows, micro_batches = inputs["rows"], inputs["micro_batches"]
        if self._ranks is not None:
            # Dropout that no two processes share, and that a resumed training draws again.
            seeds = np.random.SeedSequence([self.args.seed, self.state.global_step, self._ranks.rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))
        while True:
            parts = self._shrinking.parts(rows)
            if parts != rows:
                rows, micro_batches = parts, [self._collate(part) for part in parts]
            if self._flat is not None:
                self._flat.begin()
            failed, num_counts = None, len(self._right)
            total: Any = 0.0
            for number, micro_batch in enumerate(micro_batches):
                last = number == len(micro_batches) - 1
                try:
                    with nullcontext() if last else self.accelerator.no_sync(model):
                        total = total + super().training_step(model, dict(micro_batch), num_items_in_batch)
                except torch.OutOfMemoryError as error:
                    if self._sharded is not None:
                        # The others are in the middle of a pass that they cannot finish without this one.
                        raise ResourceError(
                            f"process {self._ranks.rank if self._ranks else 0} ran out of GPU memory in step"
                            f" {self.state.global_step + 1} ({error}); lower training.max_tokens_per_pack, or set"
                            " training.activation_memory to 'recompute' or 'offload'"
                        ) from error
                    # Left before anything else is done: the error holds the tensors of the failed pass.
                    failed = number
                    break
            if failed is None:
                return total if self._ranks is None else self._combined(self._ranks, total, num_counts)
            model.zero_grad(set_to_none=True)
            del self._right[num_counts:]
            if self._drop_graphs():
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._shrinking.halve(rows[failed], self.state.global_step)

    def _combined(self, ranks: Ranks, total: Any, num_counts: int) -> torch.Tensor:
        """Makes the step's gradients and figures those of all processes.

        Args:
            ranks: This process among the others.
            total: Its part of the step's loss.
            num_counts: Entries of `_right` before this step.

        Returns:
            The step's loss.
        """
        device = self.args.device
        if self.accelerator.scaler is not None:
            # It is made when it is first used, which in a process without a micro-batch would be too late.
            self.accelerator.scaler.scale(torch.zeros((), device=device))
        counts = [torch.stack([count.to(device) for count in pair]) for pair in self._right[num_counts:]]
        figures = torch.zeros(3, dtype=torch.float64, device=device)
        figures[0] = total
        figures[1:] = sum(counts, start=torch.zeros(2, dtype=torch.int64, device=device))
        combine_step(ranks, self._peft_model, figures, None if self._flat is None else self._flat.wholes)
        if self._shards is not None:
            self._shards.take()
        self._right[num_counts:] = [(figures[1], figures[2])]
        return figures[0].float()

    def _clip_grad_norm(self, model: Any) -> Any:
        own = self._shards or self._flat
        return super()._clip_grad_norm(model) if own is None else own.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        own = self._shards or self._flat
        if own is not None and grad_norm is None:
            return own.clip(math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _drop_graphs(self) -> bool:
        """Gives up CUDA graphs, whose memory nothing else can use; False where there are none."""
        holding = [stack for stack in self._stacks if stack.has_graphs]
        for stack in holding:
            stack.give_up(companions=True)
            stack.release()
        if holding:
            _LOGGER.warning("out of memory in step %d; going on without CUDA graphs", self.state.global_step + 1)
        return bool(holding)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Teacher-forced loss per supervised token over the validation split."""
        started = time.perf_counter()
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        total, num_tokens = 0.0, 0.0
        for batch in _one_ahead(self._collate_validation, self._validation) if self._validation else ():
            num_batch = int((batch["labels"][:, 1:] != IGNORED).sum())
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                mean = self.compute_loss(
                    model, inputs, num_items_in_batch=torch.tensor(num_batch, device=self.args.device)
                )
            total += float(mean) * num_batch
            num_tokens += num_batch
        if self._ranks is not None:
            total, num_tokens = self._ranks.sum([total, num_tokens])
        metrics = {f"{metric_key_prefix}_loss": total / max(num_tokens, 1)}
        self._right.clear()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        model.train(was_training)
        self._pace.leave_out(time.perf_counter() - started)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the pace to a training loss, and stops where the loss is no number."""
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ConfigError(
                    f"the {'training' if name == 'loss' else 'validation'} loss is {logs[name]} at step"
                    f" {self.state.global_step}, so nothing more can be learnt; lower training.learning_rate, raise"
                    " training.warmup_fraction, or set training.max_grad_norm to 1"
                )
        if "loss" in logs:
            num_right, num_tokens = (int(sum(counts)) for counts in zip(*self._right, strict=True))
            self._right.clear()
            logs = {**logs, "mean_token_accuracy": num_right / max(num_tokens, 1)}
            logs = {**logs, **self._pace.report(self.state.global_step)}
        super().log(logs, start_time)


def _collate_step(collate: Callable[[Rows], dict[str, Any]], items: Sequence[Any]) -> dict[str, Any]:
    if get_worker_info() is not None:
        leave_to_parent()
    (step,) = items
    rows = [list(part) for part in step["micro_batches"]]
    return {"rows": rows, "micro_batches": [collate(part) for part in rows]}


def _one_ahead(collate: Callable[[Rows], dict[str, Any]], batches: Sequence[Rows]) -> Iterator[dict[str, Any]]:
    """Collates the next batch while the last one is in use."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(collate, batches[0])
        for rows in batches[1:]:
            batch, waiting = waiting, pool.submit(collate, rows)
            yield batch.result()
        yield waiting.result()


@contextmanager
def forward_restored(model: Any) -> Iterator[None]:
    """Undoes, at the end of a block, what trainers patch into a model's ``forward``.

    Args:
        model: The base model.
    """
    own = model.__dict__.get("forward")
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        if own is not None:
            model.forward = own
