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
from typing import Any

from artifacts.errors import StoreError
from artifacts.keys import canonical_digest, step_key
from artifacts.refs import ArtifactRef
from tasks.comparison import compare_common_answers
from tasks.graph import Json
from tasks.model_versions import champion_history, champion_of, move_champion, registry_client
from tasks.session import Session, open_store
from vlm.config.evaluation import ExportType
from vlm.errors import ConfigError
from vlm.evaluation.verdicts import verdict
from vlm.redaction import without_secrets

_STEP = "evaluate_and_save"
# The key under which the store notes a registration.
_KEY_TAG = "vision_finetune.key"


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
        forced = _STEP in session.forced
        if not forced and (record := session.store.lookup(unit, key)) is not None:
            return dict(record.info)
        with session.tracker.reached():
            # A version by a run that was killed before it had noted this.
            registered = None if forced else _finish_registering(session, name, candidate, key)
            registered = registered or _register(session, name, candidate, key)
        session.store.record(unit, key, document, inputs, registered)
        return registered


def _finish_registering(session: Session, name: str, candidate: Candidate, key: str) -> Json | None:
    """Takes up the version that a registration which was cut short has made; None where there is none."""
    assert session.tracker is not None
    session.tracker.start()
    client = registry_client(session.tracker.uri)
    address = _store_address(session)
    left = [
        version
        for version in client.search_model_versions(f"name='{name}' and tags.`{_KEY_TAG}`='{key}'")
        if version.tags.get("store") == address
    ]
    if not left:
        return None
    version = max(left, key=lambda version: int(version.version))
    number = int(version.version)
    model = client.get_registered_model(name)
    holder = champion_of(model)
    if holder == number:
        is_better, reason = True, version.tags["note"]
    else:
        champion = None if holder is None else client.get_model_version(name, str(holder))
        is_better, reason = _judge(session, candidate, champion)
    if is_better and (holder != number or number not in [entry["version"] for entry in champion_history(model)]):
        move_champion(client, model, number, reason)
    return {"model": name, "version": number, "champion": is_better, "reason": reason}


def _register(session: Session, name: str, candidate: Candidate, key: str) -> Json:
    metrics = json.loads(session.store.read_text(candidate.metrics, "metrics.json"))
    run_id = session.tracker.start()
    uri = session.tracker.uri
    client = registry_client(uri)
    from mlflow.exceptions import MlflowException

    champion = None
    try:
        model = client.get_registered_model(name)
        holder = champion_of(model)
        champion = None if holder is None else client.get_model_version(name, str(holder))
    except MlflowException:
        model = client.create_registered_model(name)
    tags = {
        _KEY_TAG: key,
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
        move_champion(client, model, number, reason)
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
