"""Putting adapters on a live model and taking them off again, exactly.

peft's own loader only warns when a tensor of the file finds no place, and leaves that layer random. Here every tensor
must find its place, and every place its tensor.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlm.errors import LoraError, near_names, shown
from vlm.loading.source import check_safetensors
from vlm.lora.file_keys import file_keys
from vlm.processing.files import read_json

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
TARGETS_FILE = "targets.json"
# Where a model whose own weights are trained, without an adapter, keeps them by name.
WHOLE_ATTRIBUTE = "trained_whole_parameters"
_ADAPTER = "default"
_ORDER = "_vlm_parameter_order"


def wrap(model: Any, config: PeftLoraConfig) -> PeftModel:
    """Puts a fresh adapter on a model.

    Args:
        model: A transformers model without adapter.
        config: With exact full names as targets.

    Returns:
        The adapted model, which holds the given one inside.

    Raises:
        LoraError: A module to be trained whole is stored quantised.
    """
    import peft

    for name in config.modules_to_save or []:
        for inner, parameter in model.get_submodule(name).named_parameters():
            if not parameter.is_floating_point():
                raise LoraError(
                    f"lora.modules_to_save has {name!r}, whose {inner} is stored in {parameter.dtype} and cannot be trained;"
                    " adapt it with lora.target_modules, or keep its part in 16 bit with model.keep_unquantized"
                )
    if config.use_dora and any(type(parameter).__name__ == "Int8Params" for parameter in _cpu_parameters(model)):
        raise LoraError(
            "lora.use_dora over model.quantization 'int8' does not run on a CPU: peft's dequantisation there drops the"
            " weights' scales after the first pass; use 'nf4' or 'none', or a GPU"
        )
    # peft shortens a long list of targets in place; the exact names are what goes on record.
    targets, base_name = config.target_modules, config.base_model_name_or_path
    order = _parameter_order(model, config.target_parameters or [])
    config.base_model_name_or_path = None
    with warnings.catch_warnings():
        # peft asks under a name that transformers renamed, and warns of tied weights, which the export unties.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        if config.target_parameters:
            # It looks for the patterns among modules only, but applies them to parameters too.
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        peft_model = peft.get_peft_model(model, config, adapter_name=_ADAPTER)
    # The folder that the base was loaded from would go on record otherwise.
    config.target_modules, config.base_model_name_or_path = targets, base_name
    object.__setattr__(peft_model, _ORDER, order)
    return peft_model


def _parameter_order(model: Any, targets: Sequence[str]) -> dict[str, list[str]]:
    """Names of the parameters of each module that one of the targets is in, in their order."""
    owners = dict.fromkeys(target.rpartition(".")[0] for target in targets)
    return {owner: list(model.get_submodule(owner)._parameters) for owner in owners}


def _cpu_parameters(model: Any) -> Iterator[torch.nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.device.type == "cpu")


def run_whole_modules_in_own_precision(peft_model: PeftModel, dtype: torch.dtype) -> None:
    """Lets modules that are trained whole, in float32, stand in a 16-bit model: inputs are cast to their weights' type.

    LoRA layers do so by themselves. Under autocast nothing changes, since it casts both sides anyway.

    Args:
        peft_model: What ``wrap`` gave, changed in place; the hooks go when the adapter does.
        dtype: What the model around them computes in; their outputs are cast back to it.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in peft_model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            module = wrapper.modules_to_save[_ADAPTER]
            module.register_forward_pre_hook(_cast_input)
            module.register_forward_hook(partial(_cast_output, dtype))


def _cast_input(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args[0].is_floating_point() or torch.is_autocast_enabled(args[0].device.type):
        return None
    return (args[0].to(next(module.parameters()).dtype), *args[1:])


def _cast_output(dtype: torch.dtype, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, torch.Tensor) or torch.is_autocast_enabled(output.device.type):
        return None
    return output.to(dtype)


def unwrap(peft_model: PeftModel) -> Any:
    """Takes the adapter off.

    Args:
        peft_model: What ``wrap`` gave.

    Returns:
        The model as it was before, module for module.
    """
    from peft.utils.other import ModulesToSaveWrapper

    base = peft_model.get_base_model()
    # peft's unload() would leave the *trained* copies of whole modules in the model.
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.original_module)
    model = peft_model.unload()
    # Every pass takes adapted expert parameters out of their module and puts them back at its end. Their order decides
    # under which of two names peft stores the next adapter of each.
    for owner, names in getattr(peft_model, _ORDER, {}).items():
        parameters = model.get_submodule(owner)._parameters
        for name in names:
            parameters[name] = parameters.pop(name)
    return model


def adapter_parameters(peft_model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's live parameters under the names that they have in a file.

    Args:
        peft_model: A model with an adapter, or one whose own weights are trained; those go by their full names.

    Returns:
        Parameters by file key, sorted.
    """
    whole: dict[str, torch.nn.Parameter] | None = getattr(peft_model, WHOLE_ATTRIBUTE, None)
    if whole is not None:
        return whole
    live = _live_parameters(peft_model)
    keys = file_keys(peft_model, list(live))
    return dict(sorted((keys[name], parameter) for name, parameter in live.items()))


def _live_parameters(peft_model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters under the names that peft would write."""
    found = {}
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        if f".modules_to_save.{_ADAPTER}." in name:
            found[name.replace(f".modules_to_save.{_ADAPTER}.", ".")] = parameter
        elif f".lora_magnitude_vector.{_ADAPTER}." in name:
            found[name.replace(f".{_ADAPTER}.weight", "")] = parameter
        elif re.search(rf"\.lora_\w+\.{_ADAPTER}(\.|$)", name):
            found[re.sub(rf"\.{_ADAPTER}(?=\.|$)", "", name)] = parameter
    return found


def base_model(model: Any) -> Any:
    """The transformers model inside an adapted one; a model without adapter is its own.

    Args:
        model: With or without adapter.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save_tensors(peft_model: PeftModel, path: Path) -> None:
    """Writes the adapter's tensors in float32, as they are trained.

    Args:
        peft_model: A model with an adapter.
        path: The safetensors file.
    """
    tensors = {
        key: parameter.detach().to("cpu", torch.float32).contiguous().clone()
        for key, parameter in adapter_parameters(peft_model).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def load_tensors(peft_model: PeftModel, path: Path) -> None:
    """Copies a file's tensors into the live adapter, all or nothing.

    Args:
        peft_model: A model with an adapter of the same configuration.
        path: The safetensors file.

    Raises:
        LoraError: A tensor of the file has no place in the model, a place has no tensor, or a shape differs. The model
            is then as before.
        ModelError: The file is cut short, or its header does not fit it.
    """
    check_safetensors(path)
    places = adapter_parameters(peft_model)
    with safe_open(path, framework="pt") as file:
        live = _live_parameters(peft_model)
        if live.keys() != places.keys() and live.keys() == set(file.keys()):
            places = live  # written by peft itself, which cannot read it back (see `file_keys`)
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, a file, not a dict
    check_shapes(shapes, {key: tuple(parameter.shape) for key, parameter in places.items()}, str(path.name))
    tensors = load_file(path)
    with torch.no_grad():
        for key, parameter in places.items():
            parameter.copy_(tensors[key])


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compares an adapter file with the places in a model.

    Args:
        found: Shapes in the file.
        expected: Shapes in the model.
        what: The file's name, for messages.

    Raises:
        LoraError: They differ.
    """
    homeless = sorted(set(found) - set(expected))
    if homeless:
        raise LoraError(
            f"{what} has {len(homeless)} tensors that have no place in the model, first {homeless[0]!r};"
            f" use the base model that the adapter was made for. {near_names(homeless[0], expected)}"
        )
    empty = sorted(set(expected) - set(found))
    if empty:
        raise LoraError(
            f"{what} lacks {len(empty)} of {len(expected)} tensors, first {empty[0]!r}; it is cut short or belongs to another"
            " adapter: make it again"
        )
    for key, shape in expected.items():
        if found[key] != shape:
            raise LoraError(
                f"{what} has {key!r} in shape {list(found[key])} but the model needs {list(shape)};"
                " use the base model and rank that the adapter was made with"
            )


def write_config(config: PeftLoraConfig, directory: Path) -> None:
    """Writes ``adapter_config.json`` byte for byte the same for the same adapter.

    Args:
        config: peft's configuration.
        directory: An existing folder.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        return getattr(value, "value", value)

    content = {key: plain(value) for key, value in config.to_dict().items()}
    content["inference_mode"] = True  # what plain peft expects of a saved adapter
    text = json.dumps(content, indent=2, sort_keys=True, default=plain) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8", newline="\n")


def read_config(adapter_dir: Path) -> PeftLoraConfig:
    """Reads ``adapter_config.json``.

    Args:
        adapter_dir: The folder of an adapter.

    Raises:
        LoraError: There is none.
    """
    import peft

    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (adapter_dir / name).is_file()]
    if missing:
        raise LoraError(f"{adapter_dir} has no {missing[0]}; give the folder of an adapter")
    peft_type = read_json(adapter_dir / CONFIG_FILE).get("peft_type")
    if peft_type != "LORA":
        raise LoraError(f"{adapter_dir / CONFIG_FILE} has peft_type {shown(peft_type)}; give a LoRA adapter")
    try:
        return peft.LoraConfig.from_pretrained(str(adapter_dir))
    except (ValueError, TypeError, AttributeError) as error:
        raise LoraError(
            f"{adapter_dir / CONFIG_FILE} is no LoRA configuration ({error}); make the adapter again"
        ) from error
