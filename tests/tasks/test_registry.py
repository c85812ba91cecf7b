"""The registry on a store and an MLflow database of the test's own, with hand-made answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.refs import ArtifactRef
from artifacts.store import Store
from flows.promote import main
from tasks.model_versions import HISTORY, earlier_champion, list_versions, promote
from tasks.registry import Candidate, register
from tasks.session import Session
from tasks.tracking import Tracker
from vlm.config import RunConfig
from vlm.errors import ConfigError
from vlm.evaluation.evaluate import evaluate_predictions
from vlm.evaluation.predictions import Prediction, PredictionsSummary, write_predictions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

NUM_ROWS = 30


class KilledError(Exception):
    pass


class Registry:
    """Registers runs whose answers have a given number of wrong characters of ten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = {
            "runtime": {"store": str(folder / "store")},
            "tracking": {"registered_model": "receipts"},
            "evaluation": {"metrics": ["cer"]},
        }
        self.config = RunConfig.model_validate(config)
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"

    def add(self, num_wrong: int, *, first: int = 0, forced: bool = False) -> dict[str, Any]:
        session = Session.open(self.config, rerun_from="evaluate_and_save" if forced else None)
        session.tracker = Tracker(session, None)
        try:
            return register(session, self.candidate(session, num_wrong, first))
        finally:
            session.tracker.finish({}, {})
            session.close()

    def candidate(self, session: Session, num_wrong: int, first: int) -> Candidate:
        with session.store.staging() as stage:
            for name in ("predictions", "metrics", "adapter"):
                (stage / name).mkdir()
            rows = [
                # One row of three is wrong in one more place, so that there is a spread between rows.
                Prediction(
                    f"{first + i}",
                    None,
                    "",
                    "a" * 10,
                    "b" * (w := num_wrong + (i % 3 == 0)) + "a" * (10 - w),
                    1,
                    "stop",
                )
                for i in range(NUM_ROWS)
            ]
            summary = PredictionsSummary("test", len(rows), True, len(rows), len(rows))
            write_predictions(rows, summary, stage / "predictions")
            evaluate_predictions(stage / "predictions", None, self.config.evaluation, stage / "metrics")
            (stage / "adapter" / "weights").write_text(f"{num_wrong} {first}")

            def published(name: str) -> ArtifactRef:
                return session.store.publish(stage / name, kind=name, consume=True)

            return Candidate(
                "memory://exports/lora",
                published("predictions"),
                published("metrics"),
                {"adapter": published("adapter")},
            )


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, which take seconds to make."""
    registry = Registry(tmp_path_factory.mktemp("database"))
    registry.add(5)
    return registry.folder


@pytest.fixture
def registry(database: Path, tmp_path: Path) -> Registry:
    """A registry with version 1, champion, with five wrong characters of ten."""
    import shutil

    shutil.copytree(database, tmp_path / "registry", symlinks=True)
    return Registry(tmp_path / "registry")


def champion(registry: Registry) -> int:
    (number,) = (version.number for version in list_versions(registry.uri, "receipts") if version.is_champion)
    return number


def test_the_first_version_is_champion_with_digests_and_figures(registry: Registry) -> None:
    import mlflow

    (version,) = list_versions(registry.uri, "receipts")
    assert version.is_champion
    assert version.figures == {"cer": pytest.approx(0.5 + 0.1 / 3, abs=1e-5)}
    stored = mlflow.MlflowClient(registry.uri).get_model_version("receipts", "1")
    assert stored.source == "memory://exports/lora"
    assert stored.run_id
    assert stored.description == "cer 0.5333. the first version"
    assert len(stored.tags["artifact.adapter"]) == 64


def test_the_alias_moves_only_to_what_is_significantly_better(registry: Registry) -> None:
    worse = registry.add(6)
    assert (worse["version"], worse["champion"]) == (2, False)
    assert "worse" in worse["reason"]
    same = registry.add(5, forced=True)
    assert (same["version"], same["champion"]) == (3, False)
    assert "no clear difference" in same["reason"]
    better = registry.add(3)
    assert (better["version"], better["champion"]) == (4, True)
    assert "against version 1: better (-0.2000" in better["reason"]
    assert champion(registry) == 4


def test_answers_to_other_rows_move_nothing(registry: Registry) -> None:
    other = registry.add(0, first=1000)
    assert not other["champion"]
    assert "answered other rows" in other["reason"]
    assert champion(registry) == 1


def test_where_data_grew_the_rows_that_both_answered_decide(registry: Registry) -> None:
    # Rows 21 to 50 against the champion's 0 to 29.
    worse = registry.add(6, first=21)
    assert not worse["champion"]
    assert "worse (+0.1000" in worse["reason"]
    better = registry.add(3, first=21)
    assert better["champion"], better["reason"]
    assert "on the 9 rows that both answered" in better["reason"]
    # Three rows, each better: by chance in a quarter of all cases.
    few = registry.add(1, first=48)
    assert not few["champion"]
    assert "no clear difference" in few["reason"]
    assert "on the 3 rows" in few["reason"]


def test_a_result_is_registered_once_and_kept_from_collection(registry: Registry) -> None:
    from artifacts.gc import collect

    first = registry.add(3)
    assert registry.add(3) == first
    assert len(list_versions(registry.uri, "receipts")) == 2
    store = Session.open(registry.config).store
    before = set(store.digests())
    report = collect(store, dry_run=False, keep_last=1, grace_seconds=0)
    assert report.manifests == []
    assert set(store.digests()) == before


@pytest.mark.parametrize("cut_short_at", ["record", "set_registered_model_alias", "set_registered_model_tag"])
@pytest.mark.parametrize("num_wrong", [3, 6])
def test_a_registration_that_was_cut_short_is_finished_and_not_repeated(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, num_wrong: int, cut_short_at: str
) -> None:
    import mlflow

    def kill(*args: Any, **kwargs: Any) -> None:
        raise KilledError

    owner = Store if cut_short_at == "record" else mlflow.MlflowClient
    with monkeypatch.context() as patch:
        patch.setattr(owner, cut_short_at, kill)
        if num_wrong == 3 or cut_short_at == "record":
            with pytest.raises(KilledError):
                registry.add(num_wrong)
        else:
            registry.add(num_wrong)
    again = registry.add(num_wrong)
    assert (again["version"], again["champion"]) == (2, num_wrong == 3)
    assert ("better" if num_wrong == 3 else "worse") in again["reason"]
    assert len(list_versions(registry.uri, "receipts")) == 2
    assert champion(registry) == (2 if num_wrong == 3 else 1)
    history = mlflow.MlflowClient(registry.uri).get_registered_model("receipts").tags[HISTORY]
    assert [entry["version"] for entry in json.loads(history)] == ([1, 2] if num_wrong == 3 else [1])


def test_a_champion_whose_answers_are_gone_stays(registry: Registry) -> None:
    import mlflow

    mlflow.MlflowClient(registry.uri).set_model_version_tag("receipts", "1", "artifact.predictions", "0" * 64)
    outcome = registry.add(1)
    assert not outcome["champion"]
    assert "are not to be had" in outcome["reason"]


def test_promoting_by_hand_goes_back_and_forth(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.add(3)
    registry.add(1)
    assert champion(registry) == 3
    arguments = ["receipts", "--tracking", registry.uri]
    assert main([*arguments, "--back"]) == 0
    assert champion(registry) == 2
    assert main([*arguments, "--back"]) == 0
    assert champion(registry) == 1
    assert main([*arguments, "--back"]) == 2
    assert "has had no other champion" in capsys.readouterr().err
    assert main([*arguments, "--version", "3", "--why", "checked by eye"]) == 0
    assert "version 3 (it was version 1)" in capsys.readouterr().out
    assert main(arguments) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].startswith("version 3")
    assert listed[0].endswith("champion")
    assert earlier_champion(registry.uri, "receipts") == 2


def test_versions_and_runs_can_be_compared(registry: Registry) -> None:
    import mlflow

    from tasks.run_table import Results

    results = Results(Session.open(registry.config).store, registry.uri)
    version = mlflow.MlflowClient(registry.uri).get_model_version("receipts", "1")
    by_alias, by_number = results.find("models:/receipts@champion"), results.find("models:/receipts/1")
    assert by_alias.digest == by_number.digest == version.tags["artifact.metrics"]
    with pytest.raises(ConfigError, match="is not in sqlite"):
        results.find("models:/receipts/7")
    with pytest.raises(ConfigError, match="has no metrics: it did not finish"):
        results.find(f"run:{version.run_id}")


def test_what_is_not_there_is_named(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no version 9; its versions: 1"):
        promote(registry.uri, "receipts", 9, "")
    with pytest.raises(ConfigError, match="no registered model 'recipes'; it has: 'receipts'"):
        list_versions(registry.uri, "recipes")
    with pytest.raises(ConfigError, match="is not there"):
        list_versions(f"sqlite:///{tmp_path}/none.db", "receipts")
    assert not (tmp_path / "none.db").exists()


def test_a_registry_without_tracking_is_refused() -> None:
    with pytest.raises(ValueError, match="has no effect while tracking is off"):
        RunConfig.model_validate({"tracking": {"enabled": False, "registered_model": "x"}})
