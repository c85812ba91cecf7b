"""The command line: one YAML file, any setting overridden by its dotted name, a plan, and the run."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from tasks.graph import STEPS, StepName
from vlm.config import RunConfig
from vlm.errors import ConfigError

QUIET = {
    # Embedded server: slow to start on a loaded machine, otherwise silent and on its own.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Errors come back as exceptions and are printed once, here; the log would print them twice more.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


class Arguments(BaseSettings, RunConfig):
    """The configuration as the command line reads it: neither the environment nor any file adds to it unasked."""

    model_config = SettingsConfigDict(
        cli_kebab_case=False,
        cli_implicit_flags=False,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        cli_use_class_docs_for_groups=True,
        nested_model_default_partial_update=True,
    )

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


def parse(arguments: list[str]) -> tuple[RunConfig, argparse.Namespace]:
    """Reads the command line and the YAML file it names.

    Args:
        arguments: Words after the program's name.

    Returns:
        The configuration, and the options that are not part of it: ``plan`` and ``rerun_from``.

    Raises:
        ConfigError: If a setting or the YAML file is wrong.
    """
    parser = Parser(
        prog="python -m flows.vision_finetune",
        usage="%(prog)s [--config FILE.yaml] [--plan] [--rerun-from STEP] [--SECTION.SETTING VALUE ...]",
        description="Fine-tunes a vision-language model in seven cached steps. Without any setting, the built-in"
        " model learns the built-in receipts. Lists are written as JSON or with commas, no value as null.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings; options below override it")
    parser.add_argument("--plan", action="store_true", help="say what would run and why, then stop")
    parser.add_argument(
        "--rerun-from", metavar="STEP", choices=STEPS, help=f"run this step and all after it: {', '.join(STEPS)}"
    )
    source: Any = CliSettingsSource(Arguments, root_parser=parser, cli_parse_args=arguments)
    options = parser.parse_args(arguments)
    from_file = read_yaml(Path(options.config)) if options.config else {}
    try:
        settings = Arguments(_cli_settings_source=source, **from_file)
        return RunConfig.model_validate(settings.model_dump()), options
    except ValidationError as error:
        raise ConfigError(describe(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads settings from a YAML file.

    Args:
        path: The file.

    Raises:
        ConfigError: If there is no such file, or it does not hold a mapping of settings.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds a {type(content).__name__}; it must be a mapping of sections")
    return content


def describe(error: ValidationError) -> str:
    """One line per wrong setting: its name, the value, the rule, and near names of a misspelt one."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(problem["loc"][-1]), _fields_at(problem["loc"][:-1]), n=2)
            hint = f" Did you mean {' or '.join(close)}?" if close else " --help lists every setting."
            lines.append(f"{name}: there is no such setting.{hint}")
        else:
            value = "" if isinstance(problem["input"], dict) else f" {problem['input']!r}"
            # What contradicts itself across sections has no name of its own; its message says all.
            place = f"{name}{value}: " if name else ""
            lines.append(f"{place}{problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the settings in a section."""
    section: Any = RunConfig
    for part in location:
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        if field is None:
            return []
        section = field.annotation
    return list(getattr(section, "model_fields", {}))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0 when it worked, 1 when a step failed, 2 when a setting is wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config, options = parse(arguments)
        if options.plan:
            return show_plan(config, options.rerun_from)
        check(config)
    except Exception as error:
        return complain(error, status=2)
    return run(config, options.rerun_from)


def show_plan(config: RunConfig, rerun_from: StepName | None) -> int:
    """Prints what a run would do."""
    from tasks.plan import format_plan, plan_run
    from tasks.session import Session

    session = Session.open(config, rerun_from=rerun_from)
    sys.stdout.write(format_plan(list(plan_run(session))) + "\n")
    return 0


def check(config: RunConfig) -> None:
    """Finds what is wrong with model and data in a second, before Prefect starts."""
    from tasks.plan import check_inputs
    from tasks.session import Session

    check_inputs(Session.open(config))


def run(config: RunConfig, rerun_from: StepName | None) -> int:
    """Runs the flow and prints its last lines."""
    # Prefect sends SIGTERM on to this handler once the run is marked; by default it would end the process so abruptly
    # that its embedded server stays behind.
    signal.signal(signal.SIGTERM, end)
    try:
        summary = run_flow(config, rerun_from)
    except KeyboardInterrupt:
        end(signal.SIGINT)
    except Exception as error:
        return complain(error, status=1)
    from tasks.summary import format_summary

    sys.stdout.write(format_summary(summary) + "\n")
    return 0


def end(signum: int, frame: FrameType | None = None) -> NoReturn:
    """Ends the process in order, with the exit status that shells expect after a signal."""
    sys.stderr.write("interrupted; the same command goes on from the last finished step or training checkpoint\n")
    raise SystemExit(128 + signum)


def run_flow(config: RunConfig, rerun_from: StepName | None) -> dict[str, Any]:
    """Runs the flow in this process, quietly, with an embedded Prefect server if no other is set up.

    Args:
        config: All settings.
        rerun_from: Step that must run, with all after it.

    Returns:
        The summary of the run.
    """
    quieten()
    from flows.vision_finetune import vision_finetune

    return vision_finetune(config, rerun_from)


def quieten() -> None:
    """Keeps everything but our own lines off the screen. Before Prefect and MLflow are imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Notes of these packages to their own callers; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def complain(error: Exception, *, status: int) -> int:
    """Prints an error that the user can mend, without a traceback; others pass through."""
    from artifacts.errors import StoreError
    from vlm.errors import VlmError

    if not isinstance(error, VlmError | StoreError):
        raise error
    sys.stderr.write(f"error: {error}\n")
    return status
