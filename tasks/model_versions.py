"""The versions of a model in MLflow's registry, and the alias of the best one with its history."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.graph import Json
from tasks.tracking_database import first_use
from vlm.errors import ConfigError

CHAMPION = "champion"
HISTORY = "champion_history"
_MAX_HISTORY = 20


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


def list_versions(uri: str, name: str) -> list[Version]:
    """The versions of a registered model, newest first.

    Args:
        uri: Tracking address.
        name: Of the registered model.

    Raises:
        ConfigError: There is no such model.
    """
    client = registry_client(uri)
    champion = champion_of(_model(client, uri, name))
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
    client = registry_client(uri)
    model = _model(client, uri, name)
    numbers = sorted(int(found.version) for found in _versions(client, name))
    if version not in numbers:
        listed = ", ".join(map(str, numbers)) or "none"
        raise ConfigError(f"{name!r} has no version {version}; its versions: {listed}")
    before = champion_of(model)
    move_champion(client, model, version, why)
    return before


def earlier_champion(uri: str, name: str) -> int:
    """The version that held the alias before the present one, by the history.

    Args:
        uri: Tracking address.
        name: Of the registered model.

    Raises:
        ConfigError: There is no such model, or nobody held the alias before.
    """
    client = registry_client(uri)
    model = _model(client, uri, name)
    champion = champion_of(model)
    holders = [entry["version"] for entry in champion_history(model)]
    # Back from where it came the first time: going back twice goes back two, not to and fro.
    first = holders.index(champion) if champion in holders else len(holders)
    if first == 0:
        raise ConfigError(f"{name!r} has had no other champion; choose one with --version")
    return int(holders[first - 1])


def registry_client(uri: str) -> Any:
    """MLflow's client of a registry.

    Args:
        uri: Tracking address.

    Raises:
        ConfigError: It is a file that is not there.
    """
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


def champion_of(model: Any) -> int | None:
    """The version that holds the alias, if one does.

    Args:
        model: A registered model.
    """
    version = model.aliases.get(CHAMPION)
    return None if version is None else int(version)


def champion_history(model: Any) -> list[Json]:
    """The latest moves of the alias, as `version`, `at` and `why`, oldest first.

    Args:
        model: A registered model.
    """
    history: list[Json] = json.loads(model.tags.get(HISTORY, "[]"))
    return history


def move_champion(client: Any, model: Any, version: int, why: str) -> None:
    """Gives the alias to a version and writes that into the history.

    Args:
        client: MLflow's.
        model: The registered model, as it was before.
        version: Its new holder.
        why: For the history.
    """
    client.set_registered_model_alias(model.name, CHAMPION, str(version))
    entry = {"version": version, "at": datetime.now(UTC).isoformat(timespec="seconds"), "why": why[:150]}
    history = [*champion_history(model), entry][-_MAX_HISTORY:]
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
