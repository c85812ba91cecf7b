"""``python -m artifacts {ls,show,verify,gc} --store URL``: looks into a store and tidies it up."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from artifacts.errors import NotFoundError, StoreError
from artifacts.gc import collect
from artifacts.store import Store

_LISTED_FILES = 20
_LISTED_PROBLEMS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0 done, 1 the store has problems, 2 the command failed."""
    options = _parser().parse_args(arguments)
    try:
        store = Store.open(options.store)
        return options.run(store, options)
    except (StoreError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m artifacts", description="Looks into an artifact store and tidies it up."
    )
    commands = parser.add_subparsers(required=True, metavar="{ls,show,verify,gc}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", default="runs/store", help="path or fsspec address (default: %(default)s)")

    ls = commands.add_parser("ls", parents=[common], help="list what the steps have recorded, newest first")
    ls.add_argument("--limit", type=int, default=30, help="number of records (default: %(default)s)")
    ls.set_defaults(run=_ls)

    show = commands.add_parser("show", parents=[common], help="show one artifact")
    show.add_argument("digest", help="the first digits of its digest")
    show.set_defaults(run=_show)

    check = commands.add_parser("verify", parents=[common], help="read every byte and report what is wrong")
    check.add_argument("--remove", action="store_true", help="remove what is corrupt, so that its step runs again")
    check.set_defaults(run=_verify)

    gc = commands.add_parser("gc", parents=[common], help="remove what no recorded step needs")
    gc.add_argument("--dry-run", action="store_true", help="remove nothing, only report")
    gc.add_argument("--older-than-days", type=float, help="drop records older than this")
    gc.add_argument("--keep-last", type=int, help="drop all but the newest so many records of each step")
    gc.add_argument(
        "--grace-hours", type=float, default=24.0, help="never remove what is younger (default: %(default)s)"
    )
    gc.set_defaults(run=_gc)
    return parser


def _ls(store: Store, options: argparse.Namespace) -> int:
    records = store.index.records()
    rows = [
        (
            record.created[:16].replace("T", " "),
            record.unit,
            name,
            ref.digest[:12],
            _size(ref.size_bytes),
            str(ref.num_files),
        )
        for record in records[: options.limit]
        for name, ref in sorted(record.outputs.items())
    ]
    if not rows:
        _say(f"{store.url}: no step has recorded anything.")
        return 0
    _table(("recorded (UTC)", "step", "output", "digest", "size", "files"), rows, right=(4, 5))
    hidden = len(records) - options.limit
    if hidden > 0:
        _say(f"… and {hidden} older records (--limit {len(records)} shows all)")
    return 0


def _show(store: Store, options: argparse.Namespace) -> int:
    matches = sorted(digest for digest in store.digests() if digest.startswith(options.digest.lower()))
    if not matches:
        raise NotFoundError(f"{store.url}: no artifact's digest starts with {options.digest!r}; 'ls' lists them.")
    if len(matches) > 1:
        raise NotFoundError(
            f"{store.url}: {len(matches)} digests start with {options.digest!r}; give more digits: "
            f"{', '.join(digest[:16] for digest in matches[:5])}."
        )
    manifest = store.manifest(matches[0])
    _say(f"{manifest.kind}  {manifest.digest}")
    _say(f"{_size(manifest.size_bytes)} in {len(manifest.files)} file{'s' if len(manifest.files) > 1 else ''}\n")
    for title, part in (("metadata", manifest.metadata), ("provenance", manifest.provenance)):
        if part:
            _say(title)
            _say(
                "\n".join(f"  {line}" for line in json.dumps(part, indent=2, ensure_ascii=False).splitlines()[1:-1])
                + "\n"
            )
    rows = [(entry.path, _size(entry.size_bytes), entry.sha256[:12]) for entry in manifest.files[:_LISTED_FILES]]
    _table(("file", "size", "sha256"), rows, right=(1,))
    if len(manifest.files) > _LISTED_FILES:
        _say(f"… and {len(manifest.files) - _LISTED_FILES} more files")
    return 0


def _verify(store: Store, options: argparse.Namespace) -> int:
    from tqdm import tqdm

    with tqdm(desc="reading", unit="B", unit_scale=True, unit_divisor=1024, leave=False, disable=None) as progress:
        report = store.verify(on_bytes=progress.update, remove=options.remove)
    _say(
        f"{store.url}: {_count(report.num_records, 'record')}, {_count(report.num_manifests, 'artifact')}, "
        f"{_count(report.num_objects, 'object')}, {_size(report.size_bytes)}"
    )
    if not report.problems:
        _say("Everything is whole.")
        return 0
    for problem in report.problems[:_LISTED_PROBLEMS]:
        _say(f"  {problem.path}: {problem.what}")
    if len(report.problems) > _LISTED_PROBLEMS:
        _say(f"  … and {len(report.problems) - _LISTED_PROBLEMS} more")
    done = "What was corrupt is removed" if report.removed else "--remove takes away what is corrupt"
    _say(f"{_count(len(report.problems), 'problem')}. {done}; the steps concerned run again when they are next needed.")
    return 1


def _gc(store: Store, options: argparse.Namespace) -> int:
    report = collect(
        store,
        dry_run=options.dry_run,
        older_than_days=options.older_than_days,
        keep_last=options.keep_last,
        grace_seconds=options.grace_hours * 3600,
    )
    _say(f"{store.url}: {'would remove' if report.dry_run else 'removed'} {_size(report.freed_bytes)}")
    rows = [
        ("index records", len(report.records)),
        ("artifacts", len(report.manifests)),
        ("objects", len(report.objects)),
        ("folders of artifacts", len(report.materialized)),
        ("cached downloads", len(report.cached)),
        ("unfinished work of dead processes", len(report.scratch)),
        ("interrupted runs not picked up for a week", len(report.abandoned)),
        ("old locks, pins, uploads", len(report.leftovers)),
    ]
    for title, number in rows:
        if number:
            _say(f"  {number:6} {title}")
    _say(
        f"kept: {_count(report.kept_records, 'record')}, {_count(report.kept_manifests, 'artifact')}, {_size(report.kept_bytes)}"
    )
    return 0


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> None:
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    for row in [titles, *rows]:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        _say("  ".join(cells).rstrip())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
