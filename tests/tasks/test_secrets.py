"""A password in an address reaches the driver that needs it, and nothing that is kept or shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.refs import ArtifactRef
from tasks.registry import source_of
from tasks.session import Session
from tasks.summary import linked
from tasks.tracking import Tracker, flat
from vlm.config import RunConfig
from vlm.errors import ConfigError

CONFIG = RunConfig.model_validate(
    {
        "data": {"sources": [{"path": "https://user:hunter2@host/rows.jsonl?sig=hunter2"}]},
        "export": {"destination": "sftp://user:hunter2@host/exports"},
        "runtime": {"store": "memory://user:hunter2@host/store"},
        "tracking": {"uri": "https://user:hunter2@mlflow.invalid"},
    }
)
REF = ArtifactRef("report", "a" * 64, 1, 1)


def test_passwords_are_in_no_key_parameter_or_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISION_FINETUNE_CACHE", str(tmp_path))
    session = Session.open(CONFIG)
    kept = [unit.settings(session.resolved) for unit in session.units]
    kept += [
        flat(CONFIG.model_dump(mode="json")),
        linked(session, {"report": REF}),
        source_of(session, {"lora": REF}, REF),
    ]
    kept += [source_of(session, {}, REF), session.store.url]  # the report shows what its key has
    text = json.dumps(kept, default=str)
    assert "hunter2" not in text
    assert "https://***@host/rows.jsonl?sig=***" in text
    assert "sftp://user:***@host/exports/lora" in text
    # The drivers still get them.
    assert session.config.export.destination == "sftp://user:hunter2@host/exports"
    assert session.config.tracking.uri == "https://user:hunter2@mlflow.invalid"
    session.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_an_unreachable_tracking_server_is_one_error_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    def unreachable(name: str) -> None:
        raise MlflowException(f"API request to {CONFIG.tracking.uri}/api failed")

    monkeypatch.setattr(mlflow, "set_experiment", unreachable)
    before = mlflow.get_tracking_uri()
    try:
        with pytest.raises(ConfigError, match=r"tracking.uri 'https://\*\*\*@mlflow.invalid' cannot be used") as caught:
            Tracker(Session.open(CONFIG), None).start()
    finally:
        mlflow.set_tracking_uri(before)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
