"""A frozen input embedding in the host's memory, of which a GPU reads the rows it needs.

    yᵢ = W[tᵢ]        Legend: t [M] ids, W [V, H] the table, frozen, y [M, H] the embeddings

A table of its own, not shared with the head, is a gigabyte in Qwen2.5-VL-7B, of which a step reads a few thousand rows:
some 20 MB, half a millisecond over the bus. The host's pages are pinned and mapped, so a kernel reads them by their
address, and nobody waits for anybody. Without such a kernel, rows are gathered on the host, which then waits for the ids.

The table is moved for the length of a training. The module's ``weight`` is meanwhile an attribute and no parameter:
whoever moves a model's parameters to a device, or asks where they are, does not come across it. Where the device has no room
for it when the training is over, as after an error that holds on to its tensors, it stays until the end of the next one.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm.errors import ResourceError
from vlm.kernels.triton_use import use_triton

_LOGGER = logging.getLogger(__name__)
# `cudaHostRegisterPortable | cudaHostRegisterMapped`.
_REGISTER_FLAGS = 3
# In a module's attributes: the device of a table that could not go back.
_HOME = "_home_of_weight"


def host_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Looks ids up.

    Args:
        ids: Integer tensor of any shape [...].
        weight: Tensor of shape [V, H] in the host's memory. It has no gradient here.

    Returns:
        Tensor of shape [..., H] on the ids' device.
    """
    flat, weight = ids.reshape(-1), weight.detach()
    if use_triton(flat) and (weight.is_pinned() or not flat.is_cuda):
        from vlm.kernels import host_embedding_triton

        y = host_embedding_triton.gather(flat, weight)
    else:
        y = weight.index_select(0, flat.to(weight.device)).to(flat.device)
    return y.view(*ids.shape, weight.shape[1])


def host_embedding_eager(ids: Tensor, weight: Tensor) -> Tensor:
    """The same with the whole table on the ids' device, as oracle.

    Args:
        ids: As above.
        weight: As above, anywhere.
    """
    return torch.nn.functional.embedding(ids, weight.detach().to(ids.device))


def why_not(model: Any) -> str | None:
    """Why a model's input embedding stays where it is; None if it can go to the host.

    Args:
        model: The base model, with or without an adapter on it.
    """
    module = model.get_input_embeddings()
    if _HOME in module.__dict__:
        return None
    # The exact type: what is derived from it, or wraps it for an adapter, computes something else.
    if type(module) is not torch.nn.Embedding:
        return f"the module is a {type(module).__name__}"
    if module.weight.requires_grad or module.max_norm is not None or module.sparse:
        return "the weight learns, or changes where it is read"
    if "forward" in module.__dict__ or any(hooks for name, hooks in module.__dict__.items() if name.endswith("_hooks")):
        return "the module has hooks or a forward of its own"
    holders = [name for name, own in model.named_parameters(remove_duplicate=False) if own is module.weight]
    if len(holders) != 1:
        return "the weight is another module's, too"
    return None


@contextmanager
def embedding_on_host(model: Any) -> Iterator[bool]:
    """Keeps the input embedding in the host's memory for the length of a block, if nothing is in the way.

    On a CPU it is there anyway; all else is as on a GPU.

    Args:
        model: The base model, with or without an adapter on it.

    Yields:
        Whether it is there.

    Raises:
        ResourceError: The host does not give the memory.
    """
    reason = why_not(model)
    if reason is not None:
        # The plan counted on it.
        _LOGGER.warning("the input embedding stays on the device: %s", reason)
        yield False
        return
    module = model.get_input_embeddings()
    if _HOME not in module.__dict__:
        parameter = module.weight
        module.__dict__[_HOME] = parameter.device
        try:
            if parameter.device.type != "cpu":
                parameter.data = copy_on_host(parameter.data)
                # Or the memory would stay with PyTorch, where graphs cannot use it.
                torch.cuda.empty_cache()
        except BaseException:
            del module.__dict__[_HOME]
            raise
        del module._parameters["weight"]
        module.__dict__ |= {"weight": parameter, "forward": partial(_forward, module)}
    try:
        yield True
    finally:
        _bring_back(module)


def _bring_back(module: Any) -> None:
    parameter, device = module.weight, module.__dict__[_HOME]
    try:
        parameter.data = _returned(parameter.data, device)
    except torch.OutOfMemoryError:
        _LOGGER.warning("the input embedding stays in the host's memory: the device has no room for it")
        return
    for name in ("weight", "forward", _HOME):
        del module.__dict__[name]
    module._parameters["weight"] = parameter


def _returned(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return host
    torch.cuda.empty_cache()
    table = host.to(device)
    unpin(host)
    return table


def _forward(module: Any, ids: Tensor) -> Tensor:
    return host_embedding(ids, module.weight)


def copy_on_host(table: Tensor) -> Tensor:
    """Copies a table to where a GPU can read it, which is to be undone with `unpin`.

    Not to PyTorch's pinned memory, which comes in powers of two (2 GiB for 1.02) and is not given back; and shared with the
    processes that a data loader forks, which would otherwise get a copy each.

    Args:
        table: Tensor on any device.

    Returns:
        Tensor of the same shape and values in the host's memory; pinned if the table is on an NVIDIA GPU.

    Raises:
        ResourceError: The host does not give the memory.
    """
    # Page by page, since that is how memory is pinned.
    size_bytes = -(-table.numel() * table.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        pages = mmap.mmap(-1, size_bytes)
    except OSError as error:
        raise _refused(size_bytes, str(error)) from error
    host = torch.frombuffer(pages, dtype=table.dtype, count=table.numel()).view(table.shape)
    # What is called CUDA may be another make's; there, rows are gathered on the host.
    if table.is_cuda and torch.version.hip is None:
        code = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size_bytes, _REGISTER_FLAGS))
        if code != 0:
            raise _refused(size_bytes, f"CUDA error {code}")
    host.copy_(table)
    return host


def _refused(size_bytes: int, error: str) -> ResourceError:
    return ResourceError(
        f"the host does not give {size_bytes / 1e9:.1f} GB of pinned memory for the input embedding ({error}); free some of its"
        " memory, or set training.activation_memory to 'recompute', which leaves the embedding on the GPU"
    )


def unpin(host: Tensor) -> None:
    """Ends what `copy_on_host` began; the values stay as long as the tensor.

    Args:
        host: What it returned.
    """
    if not host.is_pinned():
        return
    # Kernels may still read it.
    torch.cuda.synchronize()
    code = int(torch.cuda.cudart().cudaHostUnregister(host.data_ptr()))
    assert code == 0, f"CUDA error {code} while unpinning"
