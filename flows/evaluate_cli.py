"""The command line of the evaluation."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from flows.cli import add_run_options, complain, quieten, run
from flows.embedded_server import keep_server_apart
from flows.settings import COMMAND_LINE, CommandLine, Parser, read_settings
from tasks.evaluation_graph import EVALUATION_STEPS, EvaluationStepName
from vlm.config import EvaluateConfig

# A training run's file serves as it is: these sections say how the adapter was made, which is past.
OF_TRAINING = ("lora", "training", "export")


class Arguments(CommandLine, EvaluateConfig):
    """The settings of an evaluation."""

    model_config = COMMAND_LINE


def parse(arguments: list[str]) -> tuple[EvaluateConfig, argparse.Namespace]:
    """Reads the command line and the YAML file it names.

    Args:
        arguments: Words after the program's name.

    Returns:
        The configuration, and the options that are not part of it: ``plan`` and ``rerun_from``.

    Raises:
        ConfigError: If a setting or the YAML file is wrong.
    """
    parser = Parser(
        prog="python -m flows.evaluate",
        usage="%(prog)s --subject.path PATH [--config FILE.yaml] [--plan] [--rerun-from STEP] [--SECTION.SETTING VALUE ...]",
        description="Scores an adapter, a whole model or a predictions file against a dataset, without training. The file"
        f" of a training run serves as it is; of its sections, {', '.join(OF_TRAINING)} are not read. Lists are written"
        " as JSON or with commas, no value as null.",
        allow_abbrev=False,
    )
    add_run_options(parser, EVALUATION_STEPS)
    return read_settings(arguments, parser, Arguments, EvaluateConfig, not_read=OF_TRAINING)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0 when it worked, 1 when a step failed, 2 when a setting is wrong.
    """
    from tasks.evaluation_runs import EvaluationRuns
    from tasks.plan import format_plan

    try:
        config, options = parse(sys.argv[1:] if arguments is None else arguments)
        runs = EvaluationRuns.open(config, rerun_from=options.rerun_from)
        if options.plan:
            sys.stdout.write(format_plan(list(runs.plan())) + "\n")
            return 0
        runs.check_inputs()
    except Exception as error:
        return complain(error, status=2)
    return run(lambda: run_flow(config, options.rerun_from))


def run_flow(config: EvaluateConfig, rerun_from: EvaluationStepName | None) -> dict[str, Any]:
    """Runs the flow in this process, quietly.

    Args:
        config: All settings.
        rerun_from: Step that must run, with all after it.

    Returns:
        The summary of the run.
    """
    quieten()
    keep_server_apart()
    from flows.evaluate import evaluate

    return evaluate(config, rerun_from)
