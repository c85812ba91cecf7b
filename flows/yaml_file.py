"""Reads a file of settings, and refuses what YAML allows but no settings need.

A key that is written twice would win silently, an alias that stands for others many times over would fill the memory as soon
as anybody prints it, and a list in a list in a list would end in Python's own recursion limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vlm.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
# With every alias written out. The whole tree of settings has a few hundred.
MAX_NODES = 100_000
MAX_DEPTH = 50


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads settings from a YAML file.

    Args:
        path: The file.

    Raises:
        ConfigError: If there is no such file, or it does not hold a mapping of settings.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give the path of a YAML file") from error
    except ValueError as error:
        raise ConfigError(f"--config {str(path)!r} is no path ({error}); give the path of a YAML file") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"--config {path} is over {MAX_FILE_BYTES >> 10} KiB; give a file of settings, not of data")
    try:
        loader = yaml.SafeLoader(raw.decode("utf-8-sig"))
        try:
            node = loader.get_single_node()
            if node is not None:
                _check(node, path)
            content = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: text that is not UTF-8, a date that does not exist, a number of thousands of digits.
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"--config {path} is nested too deeply; settings need {MAX_DEPTH} levels at most") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds a {type(content).__name__}; it must be a mapping of sections")
    return content


def _check(root: yaml.Node, path: Path) -> None:
    """Looks through a document before anything is made of it.

    Raises:
        ConfigError: If it is too large or too deep with its aliases written out, contains itself, has a key twice, or
            holds characters that no path and no text can have.
    """
    measured: dict[int, tuple[int, int]] = {}  # (number of values, levels) by node, since aliases share nodes
    open_nodes: set[int] = set()

    def measure(node: yaml.Node, depth: int) -> tuple[int, int]:
        place = f"--config {path}, line {node.start_mark.line + 1}"
        if id(node) in open_nodes:
            raise ConfigError(f"{place}: an alias stands for what it is in; write the value out")
        if depth + measured.get(id(node), (1, 1))[1] > MAX_DEPTH:
            raise ConfigError(f"{place}: nested over {MAX_DEPTH} levels deep, which no setting is")
        if id(node) in measured:
            return measured[id(node)]
        if isinstance(node, yaml.ScalarNode):
            if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
                raise ConfigError(
                    f"{place}: the value {node.value[:80]!r} has a NUL or half a character, which no text has; remove it"
                )
            return 1, 1
        open_nodes.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, path)
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value
        size, levels = 1, 0
        for child in children:
            child_size, child_levels = measure(child, depth + 1)
            size, levels = size + child_size, max(levels, child_levels)
            if size > MAX_NODES:
                raise ConfigError(
                    f"{place}: over {MAX_NODES} values with all aliases written out; write fewer aliases of aliases"
                )
        open_nodes.discard(id(node))
        measured[id(node)] = size, levels + 1
        return measured[id(node)]

    measure(root, 0)


def _check_keys(node: yaml.MappingNode, path: Path) -> None:
    keys: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # refused when a mapping is made of it
        line = key.start_mark.line + 1
        if (key.tag, key.value) in keys:
            raise ConfigError(f"--config {path}, line {line}: {key.value[:80]!r} is there already; keep one of them")
        keys.add((key.tag, key.value))
