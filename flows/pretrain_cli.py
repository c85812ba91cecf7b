"""The command line of the built-in model's pretraining."""

from __future__ import annotations

import argparse
import logging
import sys

from flows.cli import complain, quieten, run
from flows.embedded_server import keep_server_apart
from flows.settings import COMMAND_LINE, CommandLine, Parser, read_settings
from tasks.graph import Json
from vlm.config.pretrain import PretrainConfig


class Arguments(CommandLine, PretrainConfig):
    """The settings of the pretraining."""

    model_config = COMMAND_LINE


def parse(arguments: list[str]) -> tuple[PretrainConfig, argparse.Namespace]:
    """Reads the command line and the YAML file it names.

    Args:
        arguments: Words after the program's name.

    Returns:
        The configuration, and the options that are not part of it.

    Raises:
        ConfigError: If a setting or the YAML file is wrong.
    """
    parser = Parser(
        prog="python -m flows.pretrain_builtin",
        usage="%(prog)s [--config FILE.yaml] [--SECTION.SETTING VALUE ...]",
        description="Pretrains the built-in model on drawn lines of text. The same command again goes on from the last"
        " checkpoint. Lists are written as JSON or with commas, no value as null.",
        allow_abbrev=False,
    )
    return read_settings(arguments, parser, Arguments, PretrainConfig)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0 when it worked, 1 when it failed, 2 when a setting is wrong.
    """
    try:
        config, _ = parse(sys.argv[1:] if arguments is None else arguments)
    except Exception as error:
        return complain(error, status=2)
    return run(lambda: run_flow(config), describe)


def run_flow(config: PretrainConfig) -> Json:
    """Runs the flow in this process, quietly but for the pretraining's own lines.

    Args:
        config: All settings.

    Returns:
        The summary of the run.
    """
    quieten()
    keep_server_apart()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("vlm.pretrain").setLevel(logging.INFO)
    from flows.pretrain_builtin import pretrain_builtin

    return pretrain_builtin(config)


def describe(summary: Json) -> str:
    """The last lines of a run.

    Args:
        summary: What the flow returned.
    """
    lines = [f"{summary['step']} steps, {summary['seconds'] / 60:.1f} minutes of training"]
    if not summary["is_finished"]:
        return "\n".join([*lines, "not finished: the same command goes on from here"])
    lines += [
        f"CER {reading['cer']:.3f}  WER {reading['wer']:.3f}  {origin}"
        for origin, reading in summary["readings"].items()
    ]
    return "\n".join([*lines, f"model and card: {summary['output_dir']}"])
