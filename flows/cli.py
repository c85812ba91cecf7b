"""The command line: one YAML file, any setting overridden by its dotted name, a plan, and the run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from flows.embedded_server import keep_server_apart
from flows.settings import COMMAND_LINE, CommandLine, Parser, read_settings
from tasks.graph import STEPS, StepName
from vlm.config import RunConfig

QUIET = {
    # Embedded server: slow to start on a loaded machine, otherwise silent and on its own.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Errors come back as exceptions and are printed once, here; the log would print them twice more.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_SERVER_LEVEL": "CRITICAL",
    # An interrupt from the keyboard ends the embedded server first, whose clients would print what they miss.
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


class Arguments(CommandLine, RunConfig):
    """The settings of the pipeline."""

    model_config = COMMAND_LINE


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
    add_run_options(parser, STEPS)
    return read_settings(arguments, parser, Arguments, RunConfig)


def add_run_options(parser: argparse.ArgumentParser, steps: Sequence[str]) -> None:
    """Adds the options that are not settings.

    Args:
        parser: Of a flow's command line.
        steps: The flow's, in order.
    """
    parser.add_argument("--plan", action="store_true", help="say what would run and why, then stop")
    parser.add_argument(
        "--rerun-from", metavar="STEP", choices=steps, help=f"run this step and all after it: {', '.join(steps)}"
    )


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
    return run(lambda: run_flow(config, options.rerun_from))


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


def run(flow: Callable[[], dict[str, Any]], describe: Callable[[dict[str, Any]], str] | None = None) -> int:
    """Runs a flow and prints its last lines.

    Args:
        flow: Runs it in this process and gives its summary.
        describe: The summary as lines of text; None for what runs with metrics and a report print.

    Returns:
        The exit status.
    """
    # Prefect sends SIGTERM on to this handler once the run is marked; by default it would end the process so abruptly
    # that its embedded server stays behind.
    signal.signal(signal.SIGTERM, end)
    try:
        summary = flow()
    except KeyboardInterrupt:
        end(signal.SIGINT)
    except Exception as error:
        return complain(error, status=1)
    if describe is None:
        from tasks.summary import format_summary

        describe = format_summary
    sys.stdout.write(describe(summary) + "\n")
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
    keep_server_apart()
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
