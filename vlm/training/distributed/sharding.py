"""A model spread over several GPUs with FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023). Loads torch.

Each process keeps a slice of every layer of the language model, which is nine tenths of a model, and puts a layer together while
it computes. An NF4 weight is spread as the bytes that it is stored in, four to a number; its scales, a thirtieth of it, stay
whole. Matrices that are trained whole in those layers have their gradients summed into slices and the optimiser working on these.

The rest stays whole in every process: LoRA matrices, and what does not run in every pass, which are the vision tower and layers for
image features. All processes must put the same layers together in the same order, or they wait for each other for ever; with
what always runs, and equally many micro-batches for each, they do, whoever has images. Gradients of the rest are summed as
without FSDP2, once per step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from vlm.families import Family
from vlm.lora.peft_model import WHOLE_ATTRIBUTE, adapter_parameters, base_model, check_shapes
from vlm.training.distributed.ranks import Ranks, is_spread
from vlm.training.flat import scale_down


class Sharded:
    """A model whose language layers are spread over all processes, for the rest of this process's life.

    Args:
        model: With its adapter, in the host's memory or on the device.
        family: Row of the family table.
        device: ``cpu`` or ``cuda``; the model moves there, layer by layer.
        dtype: Name of the torch dtype of computation.
        ranks: This process among the others.
    """

    def __init__(self, model: Any, family: Family, device: str, dtype: str, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        mesh = init_device_mesh(device, (ranks.size,))
        base = base_model(model)
        layers = _layers(base, family)
        _require_gradients(layers[0])
        whole = hasattr(model, WHOLE_ATTRIBUTE)
        adapter = set() if whole else set(adapter_parameters(model).values())
        for layer in layers:
            _move(layer, device)
            _unwrap_quantized(layer)
            learns = whole and any(parameter.requires_grad for parameter in layer.parameters())
            kept = {own for own in layer.parameters() if own in adapter or (learns and own.ndim == 1)}
            policy = _policy(layer, dtype) if learns else MixedPrecisionPolicy()
            fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=kept)
            # The loss is divided by the tokens of all processes, so gradients are sums.
            layer.set_gradient_divide_factor(1.0)
            layer.set_force_sum_reduction_for_comms(True)
        _move(model, device)
        rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
        # A root without parameters: it lets one layer be fetched while another one computes.
        fully_shard(model, mesh=mesh, ignored_params=rest)
        if whole:
            trained = getattr(model, WHOLE_ATTRIBUTE)
            live = dict(model.named_parameters())
            setattr(model, WHOLE_ATTRIBUTE, {name: live[name] for name in trained})

    @property
    def trains_slices(self) -> bool:
        """Whether what is spread learns itself, and is not only adapted."""
        return any(is_spread(own) and own.requires_grad for own in self._model.parameters())

    def load(self, path: Path) -> None:
        """Copies a file's tensors into the live parameters that learn.

        Args:
            path: The safetensors file that `save` or a training on one process wrote.
        """
        tensors = load_file(path)
        places = adapter_parameters(self._model)
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        check_shapes(found, {key: tuple(parameter.shape) for key, parameter in places.items()}, path.name)
        with torch.no_grad():
            for key, parameter in places.items():
                local_part(parameter).copy_(self.cut(tensors[key]) if isinstance(parameter, DTensor) else tensors[key])

    def gathered(self) -> dict[str, Tensor]:
        """What learns, whole and in the host's memory; nothing but in process 0. All processes must call it."""
        found = {}
        for key, parameter in adapter_parameters(self._model).items():
            tensor = whole_tensor(parameter.detach())
            if self._ranks.rank == 0:
                found[key] = tensor.to("cpu", torch.float32).contiguous().clone()
        return found

    def save(self, path: Path) -> None:
        """Writes what learns, in process 0. All processes must call it.

        Args:
            path: The safetensors file.
        """
        tensors = self.gathered()
        if self._ranks.rank == 0:
            save_file(tensors, path, metadata={"format": "pt"})

    def cut(self, tensor: Tensor) -> Tensor:
        """This process's slice of a whole tensor.

        Args:
            tensor: Of any shape.
        """
        parts = tensor.chunk(self._ranks.size)
        return parts[self._ranks.rank] if self._ranks.rank < len(parts) else tensor[:0]


class LocalShards:
    """Makes an optimiser work on plain tensors, the slices that this process keeps, and not on DTensors.

    AdamW is elementwise, so it computes the same; and its lists may mix slices with whole parameters.

    Args:
        optimizer: Without state yet; its groups are changed in place.
        sharded: The model.
        ranks: This process among the others.

    Attributes:
        places: What the optimiser works on, by the model's parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, sharded: Sharded, ranks: Ranks) -> None:
        assert not optimizer.state, "parameters become slices before the first step"
        self._optimizer, self._sharded, self._ranks = optimizer, sharded, ranks
        self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        self.places = {
            parameter: torch.nn.Parameter(local_part(parameter)) if isinstance(parameter, DTensor) else parameter
            for parameters in self._parameters
            for parameter in parameters
        }
        for group, parameters in zip(optimizer.param_groups, self._parameters, strict=True):
            # A process may have nothing of a tensor with few rows.
            group["params"] = [self.places[parameter] for parameter in parameters if self.places[parameter].numel()]
        # The model lets go of gradients after a step, and so must what holds the same memory.
        optimizer.register_step_post_hook(lambda *_: self.release())

    def take(self) -> None:
        """Hands the slices' gradients to the optimiser."""
        for parameter, place in self.places.items():
            if isinstance(parameter, DTensor):
                place.grad = None if parameter.grad is None else local_part(parameter.grad)

    def release(self) -> None:
        """Lets go of the slices' gradients; whole parameters are the model's, and keep theirs."""
        for parameter, place in self.places.items():
            if isinstance(parameter, DTensor):
                place.grad = None

    def clip(self, max_norm: float) -> Tensor:
        """Scales gradients down to a norm over all processes.

        Args:
            max_norm: The norm; infinite for none.

        Returns:
            The norm before, a scalar.
        """
        gradients = [
            (place.grad, isinstance(parameter, DTensor))
            for parameter, place in self.places.items()
            if place.grad is not None
        ]
        device = next(iter(self.places)).device
        squares = torch.zeros(2, dtype=torch.float32, device=device)
        for gradient, is_part in gradients:
            squares[int(is_part)] += torch.linalg.vector_norm(gradient.float()) ** 2
        self._ranks.add([squares[1:]])
        norm = squares.sum().sqrt()
        scale_down((gradient for gradient, _ in gradients), norm, max_norm)
        return norm

    def without_state(self, names: Mapping[str, Any]) -> list[str]:
        """Names of parameters for which no process's optimiser keeps anything. All processes must call it.

        Args:
            names: Parameters by name.
        """
        having = self._ranks.sum([float(bool(self._optimizer.state.get(self.places[own]))) for own in names.values()])
        return [name for name, count in zip(names, having, strict=True) if not count]

    def gathered(self) -> dict[str, Any]:
        """The optimiser's state as one process would have it; nothing but in process 0. All processes must call it."""
        state: dict[int, dict[str, Any]] = {}
        names = self._state_names()
        for number, parameter in enumerate(self._all()):
            own = self._optimizer.state.get(self.places[parameter], {})
            entry: dict[str, Any] = {}
            for name in names[number]:
                value = own.get(name)
                if isinstance(parameter, DTensor) and name != "step":
                    local = torch.zeros_like(self.places[parameter]) if value is None else value
                    value = DTensor.from_local(
                        local.detach(),
                        parameter.device_mesh,
                        [Shard(0)],
                        run_check=False,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    ).full_tensor()
                if self._ranks.rank == 0:
                    entry[name] = value.to("cpu") if isinstance(value, Tensor) else value
            if entry:
                state[number] = entry
        groups, first = [], 0
        for group, parameters in zip(self._optimizer.param_groups, self._parameters, strict=True):
            numbers = list(range(first, first + len(parameters)))
            groups.append({name: value for name, value in group.items() if name != "params"} | {"params": numbers})
            first += len(parameters)
        return {"state": state, "param_groups": groups}

    def load(self, whole: dict[str, Any]) -> None:
        """Takes a state that `gathered` or one process's optimiser gave.

        Args:
            whole: For whole tensors.
        """
        mine = self._optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        kept = 0
        for number, parameter in enumerate(self._all()):
            if not self.places[parameter].numel():
                continue
            entry = whole["state"].get(number)
            if entry:
                state[kept] = {
                    name: self._sharded.cut(value) if isinstance(parameter, DTensor) and value.ndim else value
                    for name, value in entry.items()
                }
            kept += 1
        groups = [
            {**loaded, "params": own["params"]}
            for own, loaded in zip(mine["param_groups"], whole["param_groups"], strict=True)
        ]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _all(self) -> Iterator[Any]:
        for parameters in self._parameters:
            yield from parameters

    def _state_names(self) -> list[list[str]]:
        """Names of each parameter's state, also where this process has nothing of it."""
        own = [sorted(self._optimizer.state.get(self.places[parameter], {})) for parameter in self._all()]
        everybody = self._ranks.gather(own)
        return [max(names, key=len) for names in zip(*everybody, strict=True)]


def restore_groups(
    optimizer: torch.optim.Optimizer, model: Any, decaying: Collection[str], weight_decay: float
) -> None:
    """Gives an optimiser the two groups that it has on one process: what decays, and what does not.

    Args:
        optimizer: Without state yet; its groups are changed in place.
        model: Whose parameters it works on.
        decaying: Names of those that decay.
        weight_decay: Of these.
    """
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    learning = [(name, own) for name, own in model.named_parameters() if own.requires_grad]
    optimizer.param_groups[:] = [
        {
            **settings,
            "params": [own for name, own in learning if (name in decaying) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]


def local_part(tensor: Any) -> Tensor:
    """What this process keeps of a tensor, in the same memory.

    Args:
        tensor: Spread or whole.
    """
    part: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data
    return part


def whole_tensor(tensor: Any) -> Tensor:
    """A tensor put together. All processes must call it.

    Args:
        tensor: Spread or whole.
    """
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _layers(base: Any, family: Family) -> list[Any]:
    """The language model's layers that run in every pass."""
    layers = [module for name, module in base.named_modules() if re.fullmatch(family.language_layer, name)]
    skipped: tuple[int, ...] = ()
    if family.cross_attention is not None:
        skipped = tuple(family.cross_attention(base.config.to_dict()).layers)
    return [layer for number, layer in enumerate(layers) if number not in skipped]


def _policy(layer: Any, dtype: str) -> MixedPrecisionPolicy:
    """Has matrices that learn, in float32, arrive in the precision that products are computed in.

    Autocast would round them to the same bits, but put together twice as many bytes, and keep its copies of them until the layer's
    way back. Gradients are summed in float32, and what runs between layers stays as it is. Routed experts, in three dimensions,
    are none of autocast's business and compute in float32, so layers that have some are put together in it.

    Args:
        layer: Whose own weights learn.
        dtype: Name of the torch dtype of computation.
    """
    has_experts = any(parameter.ndim > 2 for parameter in layer.parameters())
    return MixedPrecisionPolicy(
        param_dtype=torch.float32 if has_experts else getattr(torch, dtype),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )


def _move(module: Any, device: str) -> None:
    """To the device, what learns in float32, with the scales of 4-bit weights, which are no parameters."""
    import bitsandbytes as bnb

    module.to(device)
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    for inner in module.modules():
        if isinstance(inner, bnb.nn.Linear4bit) and inner.quant_state is not None:
            inner.quant_state.to(next(inner.parameters()).device)


def _unwrap_quantized(layer: Any) -> None:
    """Turns 4-bit weights into plain tensors, which can be cut anywhere; their scales stay whole.

    FSDP2 of torch before 2.12 spreads nothing but floating-point numbers, so four bytes at a time go by the name of one. They are
    moved and never computed with; bitsandbytes stores weights in this way, too (``bnb_4bit_quant_storage``).
    """
    import bitsandbytes as bnb

    states: list[tuple[Any, Any]] = []
    for module in layer.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight: Any = module.weight
            states.append((module, weight.quant_state))
            words = weight.data.view(torch.uint8).view(-1).view(torch.float32)
            module.weight = torch.nn.Parameter(words.view(-1, 1), requires_grad=False)

    def give_states(*_: Any) -> None:
        # A weight that was put together is the same object every time, so this has something to do in the first pass only.
        for module, state in states:
            if getattr(module.weight, "quant_state", None) is None:
                module.weight.quant_state = state

    # It comes after FSDP2's own, which puts itself first.
    layer.register_forward_pre_hook(give_states)


def _require_gradients(layer: Any) -> None:
    """Has every backward pass go through all layers, whether or not what is before them learns something from this batch."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        if args:
            return (_with_gradient(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _with_gradient(kwargs["hidden_states"])}

    layer.register_forward_pre_hook(before, with_kwargs=True)


def _with_gradient(hidden: Tensor) -> Tensor:
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_()
