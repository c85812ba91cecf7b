"""From a YAML file and dotted options to a checked configuration; the same for every flow's command line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from flows.yaml_file import read_yaml
from vlm.errors import ConfigError, shown

C = TypeVar("C", bound=BaseModel)


# Of every class that reads a command line. Each sets it itself: of several bases, the last one's would count.
COMMAND_LINE = SettingsConfigDict(
    cli_kebab_case=False,
    cli_implicit_flags=False,
    cli_hide_none_type=True,
    cli_parse_none_str="null",
    cli_use_class_docs_for_groups=True,
    nested_model_default_partial_update=True,
)


class CommandLine(BaseSettings):
    """A configuration as the command line reads it: neither the environment nor any file adds to it unasked."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leaves the YAML file (given as initial values) below the command line, and nothing else."""
        return (init_settings,)


class Parser(argparse.ArgumentParser):
    """Says what was wrong in two lines instead of a page of usage, and names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit status 2."""
        known = sorted(self._option_string_actions)
        wrong = [word.split("=", 1)[0] for word in message.split() if word.startswith("--")]
        near = [match for word in wrong for match in difflib.get_close_matches(word, known, n=2)]
        hint = f" Did you mean {' or '.join(near)}?" if near and "unrecognized" in message else ""
        sys.stderr.write(f"error: {message}.{hint}\n--help lists every setting.\n")
        raise SystemExit(2)


def read_settings(
    arguments: list[str],
    parser: argparse.ArgumentParser,
    command_line: type[CommandLine],
    config: type[C],
    *,
    not_read: Collection[str] = (),
) -> tuple[C, argparse.Namespace]:
    """Reads the command line and the YAML file it names.

    Args:
        arguments: Words after the program's name.
        parser: Has the options that are not settings, and gets one option per setting.
        command_line: The configuration as a ``CommandLine``.
        config: The configuration itself.
        not_read: Sections of the file that belong to another flow.

    Returns:
        The configuration and the other options.

    Raises:
        ConfigError: If a setting or the YAML file is wrong.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings; options below override it")
    source: Any = CliSettingsSource(command_line, root_parser=parser, cli_parse_args=arguments)
    options = parser.parse_args(arguments)
    from_file = read_yaml(Path(options.config)) if options.config else {}
    from_file = {name: value for name, value in from_file.items() if name not in not_read}
    for name in from_file:
        # Names with an underscore are pydantic's own way to be told where settings come from.
        if not isinstance(name, str) or name.startswith("_"):
            raise ConfigError(f"{shown(name)}: there is no such setting. --help lists every setting.")
    try:
        settings = command_line(_cli_settings_source=source, **from_file)
        return config.model_validate(settings.model_dump()), options
    except ValidationError as error:
        raise ConfigError(describe(error, config)) from error


def describe(error: ValidationError, config: type[BaseModel]) -> str:
    """One line per wrong setting: its name, the value, the rule, and near names of a misspelt one.

    Args:
        error: What pydantic found.
        config: The root of the configuration.
    """
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(problem["loc"][-1]), _fields_at(config, problem["loc"][:-1]), n=2)
            hint = f" Did you mean {' or '.join(close)}?" if close else " --help lists every setting."
            lines.append(f"{name}: there is no such setting.{hint}")
        elif problem["type"] == "missing":
            lines.append(
                f"{name} is missing: give --{_first_leaf(config, problem['loc'])} or set it in the --config file"
            )
        else:
            value = "" if isinstance(problem["input"], dict) else f" {shown(problem['input'])}"
            # What contradicts itself across sections has no name of its own; its message says all.
            place = f"{name}{value}: " if name else ""
            lines.append(f"{place}{problem['msg'].removeprefix('Value error, ')}{_remedy(config, problem)}")
    return "\n".join(lines)


def _remedy(config: type[BaseModel], problem: Any) -> str:
    """What to write in place of a text of the wrong form: few people read patterns."""
    if problem["type"] != "string_pattern_mismatch":
        return ""
    section = _at(config, problem["loc"][:-1])
    field = getattr(section, "model_fields", {}).get(problem["loc"][-1])
    return f". It is: {field.description}" if field is not None else ""


def _fields_at(config: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the settings in a section."""
    section = _at(config, location)
    return list(getattr(section, "model_fields", {}))


def _first_leaf(config: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Dotted name of the first setting at a place that has no default."""
    parts = [str(part) for part in location]
    section = _at(config, location)
    while fields := getattr(section, "model_fields", None):
        name, field = next((entry for entry in fields.items() if entry[1].is_required()), next(iter(fields.items())))
        parts.append(name)
        section = field.annotation
    return ".".join(parts)


def _at(config: type[BaseModel], location: tuple[int | str, ...]) -> Any:
    section: Any = config
    for part in location:
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        if field is None:
            return None
        section = field.annotation
    return section
