"""Lists the versions of a registered model, and moves the alias 'champion' by hand.

python -m flows.promote receipts                 the versions, newest first, and who is champion
python -m flows.promote receipts --version 4     make version 4 the champion
python -m flows.promote receipts --back          make the one before the present champion the champion again
"""

from __future__ import annotations

import sys

from flows.cli import complain, quieten
from flows.settings import Parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0 when it worked, 2 when something is wrong.
    """
    parser = Parser(
        prog="python -m flows.promote",
        description="Lists the versions of a model in MLflow's registry, and moves the alias 'champion' by hand.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="name of the registered model (tracking.registered_model)")
    move = parser.add_mutually_exclusive_group()
    move.add_argument("--version", type=int, metavar="N", help="make this version the champion")
    move.add_argument("--back", action="store_true", help="make the champion before the present one champion again")
    parser.add_argument("--why", default="by hand", help="reason, for the history (default: %(default)s)")
    parser.add_argument(
        "--tracking",
        metavar="URI",
        default="sqlite:///runs/mlflow.db",
        help="MLflow tracking address (default: %(default)s)",
    )
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    quieten()
    from tasks.model_versions import earlier_champion, format_versions, list_versions, promote

    try:
        version = earlier_champion(options.tracking, options.model) if options.back else options.version
        if version is None:
            sys.stdout.write(format_versions(list_versions(options.tracking, options.model)) + "\n")
            return 0
        before = promote(options.tracking, options.model, version, options.why)
    except Exception as error:
        return complain(error, status=2)
    was = "there was none before" if before is None else f"it was version {before}"
    sys.stdout.write(f"champion of {options.model}: version {version} ({was})\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
