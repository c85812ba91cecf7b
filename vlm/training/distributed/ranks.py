"""One process among those that train together: sums, agreements and the waits between them. Loads torch.

Every process runs the same trainer over the same steps and computes its own part of each; gradients are summed once per step,
before they are clipped, so that all processes take the same optimiser step on the same bits. The sums are torch's own
collectives. Its DistributedDataParallel is not used, since it sums while a backward pass runs, and takes for granted that
every process runs equally many and reaches the same parameters: here a process may have no pack in a step, or no image, may
start a step anew with smaller packs when memory runs out, and replays its layers as CUDA graphs.

Small agreements go between the hosts (gloo), so that a process that is lost or hung is an error here and no silence; gradients go
from GPU to GPU (NCCL).
"""

from __future__ import annotations

import datetime
import json
import os
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.errors import ResourceError
from vlm.processes.worker import forget_others
from vlm.training.distributed.watch import StepWatch
from vlm.training.interrupt import StopFlag

# Values of small tensors that are summed together.
_BUCKET_VALUES = 2**24
# For what may take long while others wait: checkpoints, validation, the first step with its compilations.
_PATIENCE = datetime.timedelta(hours=2)
_REMEDY = "run again to resume from the last checkpoint"


class LostProcessError(ResourceError):
    """Another process of the training ended."""


class HungProcessError(ResourceError):
    """Another process of the training kept this one waiting for too long."""


class Ranks:
    """This process among the others.

    Args:
        timeout_seconds: How long the others may keep it waiting within a step.

    Attributes:
        rank: Its number; 0 keeps checkpoints and writes results.
        size: How many there are.
        stop: Whether the training is to stop at the end of this step, once all know it.
        watch: Notices a step that hangs; None where nobody can be told.
    """

    watch: StepWatch | None = None

    def __init__(self, timeout_seconds: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._timeout_seconds = timeout_seconds
        self._quick = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
        self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.stop = AgreedStop()

    def within_step(self) -> AbstractContextManager[None]:
        """The part of a step in which processes wait for each other."""
        return nullcontext() if self.watch is None else self.watch.step()

    def hung(self, waited: str) -> HungProcessError:
        """The error of a process that another one keeps waiting.

        Args:
            waited: What this one did, and for how long.
        """
        return HungProcessError(
            f"process {self.rank} of {self.size} {waited}; look at its GPU, disk and network, or raise"
            f" training.distributed.timeout_seconds; {_REMEDY}"
        )

    def agree(self, values: Sequence[float]) -> list[float]:
        """Sums of some numbers over all processes, soon.

        Args:
            values: Equally many from each process.

        Raises:
            LostProcessError: Another process is gone.
            HungProcessError: It keeps this one waiting for too long.
        """
        return self._host_sum(values, self._quick)

    def sum(self, values: Sequence[float]) -> list[float]:
        """As `agree`, where others may be busy for long.

        Args:
            values: Equally many from each process.

        Raises:
            LostProcessError: Another process is gone.
        """
        return self._host_sum(values, self._patient)

    def wait(self) -> None:
        """Waits until all are here, however long it takes.

        Raises:
            LostProcessError: Another process is gone.
        """
        self._host_sum([0.0], self._patient)

    def wait_for_first(self) -> None:
        """Waits for process 0, however long it takes, and then for all others, who are to be here.

        Raises:
            LostProcessError: Another process is gone.
            HungProcessError: Another process than the first keeps this one waiting for too long.
        """
        try:
            dist.broadcast(torch.zeros(1), src=0, group=self._patient)
        except RuntimeError as error:
            self._lost(error)
        self.agree([0.0])

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in the order of ranks.

        Args:
            value: Anything that JSON can hold.

        Raises:
            LostProcessError: Another process is gone.
        """
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.sum([len(own) if rank == self.rank else 0 for rank in range(self.size)])]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        everybody = [torch.zeros_like(padded) for _ in sizes]
        try:
            dist.all_gather(everybody, padded, group=self._patient)
        except RuntimeError as error:
            self._lost(error)
        return [json.loads(bytes(data[:size].tolist()).decode()) for data, size in zip(everybody, sizes, strict=True)]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sums tensors over all processes, in place.

        Args:
            tensors: Of the same shapes in every process, on its device.

        Raises:
            LostProcessError: Another process is gone.
        """
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() >= _BUCKET_VALUES:
                self._add([tensor])
                continue
            bucket = small.setdefault(tensor.dtype, [])
            bucket.append(tensor)
            if sum(own.numel() for own in bucket) >= _BUCKET_VALUES:
                self._add(bucket)
                bucket.clear()
        for bucket in small.values():
            if bucket:
                self._add(bucket)

    def _add(self, tensors: list[Tensor]) -> None:
        try:
            if len(tensors) == 1 and tensors[0].is_contiguous():
                dist.all_reduce(tensors[0])
                return
            whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(whole)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._lost(error)
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def _host_sum(self, values: Sequence[float], group: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        try:
            dist.all_reduce(tensor, group=group)
        except RuntimeError as error:
            self._lost(error)
        found: list[float] = tensor.tolist()
        return found

    def _lost(self, error: Exception) -> NoReturn:
        if "imed out" in str(error):
            raise self.hung(
                f"waited {self._timeout_seconds:g} s for another one, which hangs or is slow ({error})"
            ) from error
        if "out of memory" in str(error):
            raise ResourceError(
                f"process {self.rank} of {self.size} had no GPU memory left for a sum over all processes ({error}); lower"
                f" training.max_tokens_per_pack, or end what else runs on its GPU; {_REMEDY}"
            ) from error
        raise LostProcessError(
            f"process {self.rank} of {self.size} lost another one ({error}); look at the log of the machine that it ran on;"
            f" {_REMEDY}"
        ) from error


class AgreedStop(StopFlag):
    """Stops all processes after the same step.

    A signal, or whoever started the processes, asks one of them; all learn of it in the agreement at the end of a step.

    Attributes:
        asked: The signal that this process was asked with, or None.
        signum: The signal once all know; None before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: int | None = None

    def ask(self, signum: int) -> None:
        """Asks for an end after this step.

        Args:
            signum: The signal to name.
        """
        self.asked = signum

    def agree(self, num_asked: float) -> None:
        """Takes in how many processes were asked.

        Args:
            num_asked: Over all of them.
        """
        if num_asked and self.signum is None:
            self.signum = self.asked or signal.SIGTERM

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A signal that came after the last agreement has nobody to go to: whoever started this process has it as well.
        self._restore()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.ask(signum)


def is_spread(tensor: Any) -> bool:
    """Whether a process keeps a slice of it only: a DTensor, whose class takes a second to import.

    Args:
        tensor: Of a model.
    """
    return hasattr(tensor, "device_mesh")


def join(device: str, timeout_seconds: float) -> Ranks:
    """Joins the processes that torch's launcher started with this one.

    To be called before CUDA is used; the process sees one GPU only.

    Args:
        device: ``cpu`` or ``cuda``.
        timeout_seconds: As of `Ranks`.
    """
    # A sum that timed out ends its process at once, and not after minutes in which all write down what they were doing.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_seconds))
    forget_others()
    return Ranks(timeout_seconds)
