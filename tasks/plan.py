"""Says what a run would do and why, without running or importing anything heavy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from artifacts.keys import diff_documents, step_key
from artifacts.refs import ArtifactRef
from tasks.graph import Unit, export_unit
from tasks.session import Session
from vlm.training.device import check_device, num_local_processes

HIT, MISS, FORCED, PENDING = "hit", "miss", "forced", "pending"


@dataclass(frozen=True)
class Planned:
    """What would become of one unit.

    Attributes:
        unit: The unit's name.
        status: ``hit``, ``miss``, ``forced`` (its result is there and it runs all the same), or ``pending``: it reads
            an artifact that will be made first, and is a hit if that one comes out as it was.
        reasons: What changed since it was last built, or what it waits for.
        key: Its key, or None while that depends on an artifact that is not there yet.
    """

    unit: str
    status: str
    reasons: tuple[str, ...] = ()
    key: str | None = None


def plan_run(session: Session) -> Iterator[Planned]:
    """Looks every unit of a run up, in order.

    Args:
        session: The run.

    Yields:
        One entry per unit.
    """
    known: dict[tuple[str, str], ArtifactRef] = {}
    for unit in session.units:
        missing = sorted({source.unit for source in unit.inputs.values() if (source.unit, source.output) not in known})
        if missing:
            yield Planned(unit.name, PENDING, (*_own_changes(session, unit), f"waits for {', '.join(missing)}"))
            continue
        inputs = {name: known[source.unit, source.output] for name, source in unit.inputs.items()}
        document = session.document(unit, inputs)
        key = step_key(document)
        found = session.store.check(unit.name, key)
        record = found.record
        if unit.step in session.forced:
            yield Planned(unit.name, FORCED, ("--rerun-from",), key)
        elif record is None:
            yield Planned(unit.name, MISS, found.problems or _changes(session, unit, document), key)
        else:
            known |= {(unit.name, output): ref for output, ref in record.outputs.items()}
            yield Planned(unit.name, HIT, (), key)


def check_inputs(session: Session) -> None:
    """Refuses what cannot work before a step runs.

    That is a model or data that are not there, or lack a column, a device that does not do, and exports that nobody can
    make of the model, or cannot be sent where they should go.

    Args:
        session: The run.

    Raises:
        VlmError: What is wrong, and the remedy.
    """
    check_device(session.config.training, session.resolved.device)
    num_local_processes(session.config.generation.num_processes, session.resolved.device, "generation.num_processes")
    session.check_sources()
    export = session.config.export
    if export.types and export.destination is not None and export.destination.startswith("hf://"):
        from vlm.export.hub import parse_address

        parse_address(export.destination)
    statuses = {entry.unit: entry.status for entry in plan_run(session)}
    if statuses.get(export_unit("gguf"), HIT) != HIT:
        from vlm.export.gguf.support import check_model
        from vlm.families import family_for_config
        from vlm.loading.source import local_folder
        from vlm.processing.files import read_json

        folder = local_folder(session.model)
        if folder is not None:  # what is on the Hub, or made on the fly, is looked at after step 1
            check_model(family_for_config(read_json(folder / "config.json")), folder, folder)
    if statuses["prepare_dataset"] != HIT:
        from vlm.data.check import check_sources

        check_sources(session.config.data)


def format_plan(planned: list[Planned]) -> str:
    """A plan as lines of text, one per unit and one per reason."""
    width = max(len(entry.unit) for entry in planned)
    lines = []
    for entry in planned:
        first, *more = entry.reasons or ("",)
        lines.append(f"{entry.unit:<{width}}  {entry.status:<7}  {first}".rstrip())
        lines += [f"{'':<{width + 11}}{reason}" for reason in more]
    hits = sum(entry.status == HIT for entry in planned)
    lines.append(f"{hits} of {len(planned)} are there.")
    return "\n".join(lines)


def _changes(session: Session, unit: Unit, document: dict[str, object]) -> tuple[str, ...]:
    """The differences to the most similar earlier build: what the user changed, not what some other run had."""
    differences: list[list[str]] = [
        diff_documents(record.document, document) for record in session.store.records(unit.name)
    ]
    if not differences:
        return ("never built in this store",)
    closest: list[str] = min(differences, key=len)
    return tuple(closest) or ("its record is gone",)


def _own_changes(session: Session, unit: Unit) -> tuple[str, ...]:
    """Changes of the unit's own settings, while its inputs are not known yet."""
    settings = unit.settings(session.resolved)
    earlier = [record.document["config"] for record in session.store.records(unit.name)]
    if not earlier:
        return ()
    differences: list[list[str]] = [diff_documents({"config": old}, {"config": settings}) for old in earlier]
    closest: list[str] = min(differences, key=len)
    return tuple(closest)
