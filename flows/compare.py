"""Puts the results of several runs into one table, with paired tests where they answered the same rows.

python -m flows.compare                                         all results of runs/store, newest twenty
python -m flows.compare 3fa9c1 8b02de                           by the first digits of metrics or report artifacts
python -m flows.compare runs/latest/report other/report.html    by report pages
python -m flows.compare run:0a1b… models:/receipts@champion     by MLflow run or model version
python -m flows.compare --html sweep.html --csv sweep.csv       also as a page and for a spreadsheet
"""

from __future__ import annotations

import sys
from pathlib import Path

from flows.cli import complain, quieten
from flows.settings import Parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0 when it worked, 2 when something is wrong.
    """
    parser = Parser(
        prog="python -m flows.compare",
        description="Puts the results of several runs into one table, with paired tests against the first one where they"
        " answered the same rows, and the settings in which they differ.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULT",
        help="folder with metrics.json, report page, first digits of an artifact's digest, run:ID or models:/NAME/VERSION;"
        " none takes the newest of the store",
    )
    parser.add_argument("--store", default="runs/store", help="artifact store (default: %(default)s)")
    parser.add_argument(
        "--tracking",
        metavar="URI",
        default="sqlite:///runs/mlflow.db",
        help="MLflow tracking address, for run: and models: (default: %(default)s)",
    )
    parser.add_argument("--against", metavar="RESULT", help="test against this one of them instead of the first")
    parser.add_argument(
        "--limit", type=int, default=20, help="most results where none are named (default: %(default)s)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a CSV file")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    quieten()
    from artifacts.store import Store
    from tasks.run_table import Results
    from vlm.errors import ConfigError
    from vlm.evaluation.comparison_page import as_csv, as_html, as_text

    try:
        finder = Results(Store.open(options.store), options.tracking)
        words = list(dict.fromkeys(options.results))
        results = [finder.find(word) for word in words] or finder.latest(max(1, options.limit))
        names = [result.name for result in results]
        if options.against is not None and options.against not in names:
            raise ConfigError(f"--against {options.against!r} is none of the results; they are {', '.join(names)}")
        compared = finder.compare(results, names.index(options.against) if options.against else 0)
        for path, write in ((options.html, as_html), (options.csv, as_csv)):
            if path is not None:
                try:
                    path.write_text(write(compared), encoding="utf-8")
                except OSError as error:
                    raise ConfigError(f"{path} cannot be written: {error.strerror}; give another path") from error
    except Exception as error:
        return complain(error, status=2)
    sys.stdout.write(as_text(compared) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
