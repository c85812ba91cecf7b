"""MLflow's model registry: a version per run, and the alias of the best one.

A version holds no copy: its source is where the export lies, its tags are digests and figures. The store's index notes
that a result was registered, so a rerun with nothing to do registers nothing, and needs no MLflow; that note also keeps
the registered artifacts from garbage collection.

The alias moves by itself only to what is significantly better than its present holder on the rows that both answered
(where data grows, so does its test split; rows stay in the split that they are in), and by hand with
``python -m flows.promote``. Every move is written into the registered model's history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from artifacts.errors import StoreError
from artifacts.keys import canonical_digest, step_key
from artifacts.refs import ArtifactRef
from tasks.comparison import compare_common_answers
from tasks.graph import Json
from tasks.session import Session, open_store
from tasks.tracking_database import first_use
from vlm.config.evaluation import ExportType
from vlm.errors import ConfigError
from vlm.evaluation.verdicts import verdict
from vlm.redaction import without_secrets

CHAMPION = "champion"
HISTORY = "champion_history"
_MAX_HISTORY = 20
_STEP = "evaluate_and_save"


@dataclass(frozen=True)
class Candidate:
    """What is registered.

    Attributes:
        source: Where it can be fetched from.
        predictions: Its answers.
        metrics: Their scores.
        artifacts: What makes it up, by name: the adapter, exports.
    """

    source: str
    predictions: ArtifactRef
    metrics: ArtifactRef
    artifacts: Mapping[str, ArtifactRef]


@dataclass(frozen=True)
class Version:
    """A version as people see it.

    Attributes:
        number: Its number.
        is_champion: Whether it holds the alias.
        created: UTC, to the minute.
        figures: Metrics by name.
        source: Where it can be fetched from.
        note: Why it holds the alias, or not.
    """

    number: int
    is_champion: bool
    created: str
    figures: dict[str, float]
    source: str
    note: str


def source_of(session: Session, exports: Mapping[ExportType, ArtifactRef], fallback: ArtifactRef) -> str:
    """Where the result of a run can be fetched from: its copy, or its folder in a store on this machine.

    Args:
        session: The run.
        exports: Its exports by type.
        fallback: What stands for the model where nothing was exported.
    """
    export = session.config.export
    kind = "lora" if "lora" in exports else next(iter(exports), None)
    if kind is not None and export.destination is not None:
        return without_secrets(f"{export.destination.rstrip('/')}/{kind}")
    ref = fallback if kind is None else exports[kind]
    if session.local_root is not None:
        return session.local(ref).as_uri()
    return without_secrets(f"{session.config.runtime.store}#{ref.digest}")


def register(session: Session, candidate: Candidate) -> Json:
    """Registers a result once, and moves the alias to it where it is significantly better.

    Args:
        session: The run, with a tracker and the name of a registered model.
        candidate: What is registered.

    Returns:
        `model`, `version`, whether it is the `champion`, and the `reason`.

    Raises:
        ConfigError: The registry refuses the version.
    """
    name = session.config.tracking.registered_model
    assert name is not None
    assert session.tracker is not None
    inputs = {"predictions": candidate.predictions, "metrics": candidate.metrics, **candidate.artifacts}
    document = {
        "unit": "register_model",
        "version": 1,
        "code": "",
        "config": {"model": name, "tracking": without_secrets(session.tracker.uri)},
        "inputs": {which: ref.digest for which, ref in inputs.items()},
        "sources": {},
    }
    key = step_key(document)
    # One unit per result: however few records of each unit garbage collection keeps, registered artifacts stay.
    unit = f"register_model.{candidate.metrics.digest[:16]}"
    with session.store.lock("register_model", canonical_digest([session.tracker.uri, name])):
        record = None if _STEP in session.forced else session.store.lookup(unit, key)
        if record is not None:
            return dict(record.info)
        registered = _register(session, name, candidate)
        session.store.record(unit, key, document, inputs, registered)
        return registered


def list_versions(uri: str, name: str) -> list[Version]:
    """The versions of a registered model, newest first.

    Args:
        uri: Tracking address.
        name: Of the registered model.

    Raises:
        ConfigError: There is no such model.
    """
    client = _client(uri)
    champion = _champion(client, _model(client, uri, name))
    return [
        Version(
            number=int(version.version),
            is_champion=int(version.version) == champion,
            created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).strftime("%Y-%m-%d %H:%M"),
            figures={
                tag.removeprefix("metric."): float(value)
                for tag, value in version.tags.items()
                if tag.startswith("metric.")
            },
            source=version.source,
            note=version.tags.get("note", ""),
        )
        for version in sorted(_versions(client, name), key=lambda found: -int(found.version))
    ]


def promote(uri: str, name: str, version: int, why: str) -> int | None:
    """Moves the alias to a version.

    Args:
        uri: Tracking address.
        name: Of the registered model.
        version: Its new holder.
        why: For the history.

    Returns:
        The version that held it before, or None.

    Raises:
        ConfigError: There is no such model or version.
    """
    client = _client(uri)
    model = _model(client, uri, name)
    numbers = sorted(int(found.version) for found in _versions(client, name))
    if version not in numbers:
        listed = ", ".join(map(str, numbers)) or "none"
        raise ConfigError(f"{name!r} has no version {version}; its versions: {listed}")
    before = _champion(client, model)
    _move(client, model, version, why)
    return before


def earlier_champion(uri: str, name: str) -> int:
    """The version that held the alias before the present one, by the history.

    Args:
        uri: Tracking address.
        name: Of the registered model.

    Raises:
        ConfigError: There is no such model, or nobody held the alias before.
    """
    client = _client(uri)
    model = _model(client, uri, name)
    champion = _champion(client, model)
    holders = [entry["version"] for entry in _history(model)]
    # Back from where it came the first time: going back twice goes back two, not to and fro.
    first = holders.index(champion) if champion in holders else len(holders)
    if first == 0:
        raise ConfigError(f"{name!r} has had no other champion; choose one with --version")
    return int(holders[first - 1])


def _register(session: Session, name: str, candidate: Candidate) -> Json:
    metrics = json.loads(session.store.read_text(candidate.metrics, "metrics.json"))
    run_id = session.tracker.start()
    uri = session.tracker.uri
    client = _client(uri)
    from mlflow.exceptions import MlflowException

    champion = None
    try:
        model = client.get_registered_model(name)
        holder = _champion(client, model)
        champion = None if holder is None else client.get_model_version(name, str(holder))
    except MlflowException:
        model = client.create_registered_model(name)
    tags = {
        "store": _store_address(session),
        "artifact.predictions": candidate.predictions.digest,
        "artifact.metrics": candidate.metrics.digest,
        **{f"artifact.{which}": ref.digest for which, ref in candidate.artifacts.items()},
        **{f"metric.{metric}": f"{entry['tuned']['value']:.6g}" for metric, entry in metrics["metrics"].items()},
    }
    is_better, reason = _judge(session, candidate, champion)
    # MLflow's page shows the description beside each version, and cuts tags short.
    figures = ", ".join(f"{metric} {entry['tuned']['value']:.4f}" for metric, entry in metrics["metrics"].items())
    try:
        version = client.create_model_version(
            name, candidate.source, run_id=run_id, tags={**tags, "note": reason}, description=f"{figures}. {reason}"
        )
    except MlflowException as error:
        raise ConfigError(
            f"tracking.registered_model {name!r}: {uri} refuses a version with source {candidate.source!r}"
            f" ({error.message}); set export.destination to an address that it can read, or drop registered_model"
        ) from error
    number = int(version.version)
    if is_better:
        _move(client, model, number, reason)
    return {"model": name, "version": number, "champion": is_better, "reason": reason}


def _store_address(session: Session) -> str:
    """Where the run's artifacts are, for the registry: without a password, which whoever reads it has to have."""
    return without_secrets(session.config.runtime.store) if session.local_root is None else str(session.local_root)


def _judge(session: Session, candidate: Candidate, champion: Any) -> tuple[bool, str]:
    """Whether the alias moves, and why."""
    if champion is None:
        return True, "the first version"
    holder = f"version {champion.version}"
    try:
        address = champion.tags["store"]
        store = session.store if address == _store_address(session) else open_store(address, session.cache_dir)
        answers = store.materialize(champion.tags["artifact.predictions"])
    except (KeyError, StoreError) as error:
        return False, f"{holder}'s answers are not to be had ({error}), so nothing could be compared"
    compared = compare_common_answers(session.local(candidate.predictions), answers, session.config.evaluation)
    if compared is None:
        return False, f"{holder} answered other rows, so nothing could be compared"
    entry = next(iter(compared["metrics"].values()))
    difference = entry["difference"]
    judged = verdict(entry)
    figures = f"{difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    if "p_value" in difference:
        figures += f", p = {difference['p_value']:.3g}"
    figures += f", on the {compared['num_rows']} rows that both answered"
    return judged == "better", f"{entry['title']} against {holder}: {judged} ({figures})"


def _client(uri: str) -> Any:
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        # MLflow would make an empty one, and then say that there is no such model.
        raise ConfigError(f"{uri} is not there; give the tracking address that the runs were logged to")
    import mlflow

    with first_use(uri):
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def _model(client: Any, uri: str, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        known = ", ".join(repr(model.name) for model in client.search_registered_models()[:5]) or "none"
        raise ConfigError(f"{uri} has no registered model {name!r}; it has: {known}") from error


def _versions(client: Any, name: str) -> list[Any]:
    return list(client.search_model_versions(f"name='{name}'"))


def _champion(client: Any, model: Any) -> int | None:
    version = model.aliases.get(CHAMPION)
    return None if version is None else int(version)


def _history(model: Any) -> list[Json]:
    history: list[Json] = json.loads(model.tags.get(HISTORY, "[]"))
    return history


def _move(client: Any, model: Any, version: int, why: str) -> None:
    client.set_registered_model_alias(model.name, CHAMPION, str(version))
    entry = {"version": version, "at": datetime.now(UTC).isoformat(timespec="seconds"), "why": why[:150]}
    history = [*_history(model), entry][-_MAX_HISTORY:]
    client.set_registered_model_tag(model.name, HISTORY, json.dumps(history))


def format_versions(versions: list[Version]) -> str:
    """Versions as lines of text.

    Args:
        versions: Newest first.
    """
    lines = []
    for version in versions:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in version.figures.items())
        mark = "  champion" if version.is_champion else ""
        lines.append(f"version {version.number}  {version.created} UTC  {figures}{mark}")
        lines += [f"    {text}" for text in (version.note, version.source) if text]
    return "\n".join(lines) or "no version yet"
