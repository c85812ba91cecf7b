"""Results of several runs in one table: what was measured, what differs in their settings, and paired tests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts.errors import StoreError
from artifacts.index import IndexRecord
from artifacts.store import Store
from tasks.comparison import compare_answers
from tasks.graph import Json
from vlm.config import EvaluationConfig
from vlm.errors import ConfigError, DataError
from vlm.evaluation.comparison_page import Compared, Difference
from vlm.evaluation.verdicts import verdict

METRICS_UNIT = "evaluate_and_save.metrics"
# Which part of the configuration each unit's settings are.
_SECTIONS = {
    "load_model": "model",
    "configure_lora": "lora",
    "prepare_dataset": "data",
    "train": "training",
    "inference_mode": "generation",
    "import_subject": "subject",
    "evaluate_and_save": "evaluation",
}
_DIGITS = re.compile(r"(?:[a-z_]+@)?([0-9a-f]{6,64})")


@dataclass(frozen=True)
class Result:
    """One result to compare.

    Attributes:
        name: What it is called in the table.
        metrics: Content of ``metrics.json``.
        digest: Of the metrics artifact, where it is known.
        predictions: Digest of the answers, where they are in the store.
        settings: Settings that led to it by dotted name, as far as the store knows.
    """

    name: str
    metrics: Json
    digest: str | None = None
    predictions: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Results:
    """Finds results in a store, in files, and by MLflow's run ids.

    Args:
        store: Where artifacts are.
        tracking: MLflow tracking address, for runs and model versions.
    """

    def __init__(self, store: Store, tracking: str) -> None:
        self.store = store
        self.tracking = tracking
        self._records = store.index.records()
        self._made_by: dict[str, IndexRecord] = {}
        # Newest first. What a step made is better known by that step than by an evaluation that brought it in again; what
        # was registered was not made by that.
        made = [record for record in self._records if record.unit.split(".", 1)[0] in _SECTIONS]
        for record in sorted(made, key=lambda record: record.unit.startswith("import_subject")):
            for ref in record.outputs.values():
                self._made_by.setdefault(ref.digest, record)

    def latest(self, limit: int) -> list[Result]:
        """The newest results of the store, each once.

        Args:
            limit: How many at most.

        Raises:
            ConfigError: There is none.
        """
        digests = dict.fromkeys(
            record.outputs["metrics"].digest for record in self._records if record.unit == METRICS_UNIT
        )
        if not digests:
            raise ConfigError(f"{self.store.url} has no results yet; run the pipeline first, or name another --store")
        return [self._of_artifact(digest, digest[:12]) for digest in list(digests)[:limit]]

    def find(self, word: str) -> Result:
        """The result that a word names.

        Args:
            word: A folder with ``metrics.json``, a report page or its folder, the first digits of a digest, ``run:ID`` or
                ``models:/NAME/VERSION``.

        Raises:
            ConfigError: It names none.
        """
        if word.startswith(("run:", "models:/")):
            return self._of_artifact(self._tracked(word), word)
        path = Path(word)
        if path.exists():
            return self._of_path(path, word)
        match = _DIGITS.fullmatch(word)
        if match is None:
            raise ConfigError(
                f"{word!r} is no file or folder here; give a folder with metrics.json, a report.html, the first digits of an"
                " artifact's digest, run:ID or models:/NAME/VERSION"
            )
        found = [digest for digest in sorted(self.store.digests()) if digest.startswith(match[1])]
        if len(found) != 1:
            what = "no artifact's digest starts" if not found else f"{len(found)} digests start"
            raise ConfigError(f"{self.store.url}: {what} with {match[1]!r}; `python -m artifacts ls` lists them")
        return self._of_artifact(found[0], word)

    def compare(self, results: Sequence[Result], against: int = 0) -> Compared:
        """Puts results side by side.

        Args:
            results: Two or more; or one, to look at.
            against: Number of the one that the others are tested against.
        """
        reference = results[against]
        names = list(dict.fromkeys(name for result in results for name in result.metrics["metrics"]))
        settings = {result.name: result.settings for result in results}
        differing = [
            name
            for name in sorted({name for known in settings.values() for name in known})
            if len({json.dumps(known.get(name), sort_keys=True) for known in settings.values()}) > 1
        ]
        rows = []
        for result in results:
            differences, notes = self._against(result, reference)
            rows.append(
                {
                    "name": result.name,
                    "is_reference": result is reference,
                    "num_rows": result.metrics["num_rows"],
                    "split": result.metrics["split"],
                    "digest": result.digest,
                    "figures": {name: _tuned(result.metrics, name) for name in names},
                    "differences": differences,
                    "settings": {name: result.settings.get(name) for name in differing},
                    "notes": notes,
                }
            )
        described = {
            name: next(r.metrics["metrics"][name] for r in results if name in r.metrics["metrics"]) for name in names
        }
        better = {name: entry["better"] for name, entry in described.items()}
        titles = {name: entry["title"] for name, entry in described.items()}
        lead = names[0]
        sign = 1 if better[lead] == "lower" else -1
        rows.sort(
            key=lambda row: (row["figures"][lead] is None, sign * (row["figures"][lead] or {"value": 0})["value"])
        )
        return Compared(reference.name, titles, better, tuple(differing), tuple(rows))

    def _against(self, result: Result, reference: Result) -> tuple[dict[str, Difference], list[str]]:
        """Paired differences to the reference by metric, and what stands in the way of a comparison."""
        if result is reference:
            return {}, []
        compared_by = ("split", "normalization")
        notes = [f"other {what}" for what in compared_by if result.metrics[what] != reference.metrics[what]]
        if result.predictions is None or reference.predictions is None:
            return {}, [*notes, "answers not in the store"]
        metrics = list(reference.metrics["metrics"])
        evaluation = EvaluationConfig.model_validate({**reference.metrics["normalization"], "metrics": metrics})
        try:
            folders = [self.store.materialize(found.predictions) for found in (result, reference) if found.predictions]
            compared = compare_answers(folders[0], folders[1], evaluation)
        except DataError:
            return {}, [*notes, "other rows"]
        except StoreError:
            return {}, [*notes, "answers damaged"]
        differences = {
            name: Difference(
                value=entry["difference"]["value"],
                low=entry["difference"]["low"],
                high=entry["difference"]["high"],
                p_value=entry["difference"].get("p_value"),
                verdict=verdict(entry) or "",
            )
            for name, entry in compared["metrics"].items()
        }
        return differences, notes

    def _of_path(self, path: Path, name: str) -> Result:
        from vlm.evaluation.report_data import read_report

        if (path / "metrics.json").is_file():
            try:
                found = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"the metrics.json of {name!r} is no JSON ({error}); give one that the pipeline wrote"
                ) from error
            metrics = _checked(found, name)
            # A folder of the store is named by its digest.
            folder = path.resolve().name
            digest = folder if re.fullmatch(r"[0-9a-f]{64}", folder) else None
        else:
            page = path / "report.html" if path.is_dir() else path
            if not page.is_file():
                raise ConfigError(f"{name!r} has neither metrics.json nor report.html; give the folder of a result")
            metrics, digest = read_report(page)
        if digest is not None and digest in self._made_by:
            return self._of_artifact(digest, name)
        return Result(name, metrics, digest)

    def _of_artifact(self, digest: str, name: str) -> Result:
        manifest = self.store.manifest(digest)
        inputs: Mapping[str, str] = manifest.provenance.get("inputs", {})
        if manifest.kind == "report":
            return self._of_artifact(inputs["metrics"], name)
        if manifest.kind != "metrics":
            raise ConfigError(f"{name!r} is an artifact of kind {manifest.kind!r}; give one of kind metrics or report")
        metrics = _checked(json.loads(self.store.read_text(digest, "metrics.json")), name)
        settings: dict[str, Any] = {}
        self._collect(digest, settings)
        return Result(name, metrics, digest, inputs.get("tuned"), settings)

    def _collect(self, digest: str, settings: dict[str, Any]) -> None:
        """Gathers the settings of an artifact and of all that it was made from."""
        record = self._made_by.get(digest)
        if record is None:
            return
        step = record.unit.split(".", 1)[0]
        section = _SECTIONS.get(step)
        if section is not None:
            for name, value in _flat(record.document["config"]):
                settings.setdefault(f"{section}.{name}", value)
            if sources := record.document["sources"]:
                content = " ".join(str(source)[:8] for source in sources.values())
                settings.setdefault(f"{section}.content", content)
        for name, source in record.document["inputs"].items():
            if name != "base":  # the base model's answers are not what the result was made from
                self._collect(source, settings)

    def _tracked(self, word: str) -> str:
        """Digest of the metrics of an MLflow run or model version."""
        if self.tracking.startswith("sqlite:///") and not Path(self.tracking.removeprefix("sqlite:///")).is_file():
            raise ConfigError(f"{self.tracking} is not there; give the tracking address with --tracking")
        import mlflow
        from mlflow.exceptions import MlflowException

        client = mlflow.MlflowClient(tracking_uri=self.tracking, registry_uri=self.tracking)
        try:
            if word.startswith("run:"):
                tag = client.get_run(word.removeprefix("run:")).data.tags.get(f"artifact.{METRICS_UNIT}.metrics")
            else:
                name, separator, version = re.fullmatch(r"models:/([^/@]+)([/@])(.+)", word).groups()  # type: ignore[union-attr]
                found = (
                    client.get_model_version(name, version)
                    if separator == "/"
                    else client.get_model_version_by_alias(name, version)
                )
                tag = found.tags.get("artifact.metrics")
        except (MlflowException, AttributeError) as error:
            raise ConfigError(
                f"{word!r} is not in {self.tracking}; give run:ID, models:/NAME/VERSION or models:/NAME@ALIAS"
            ) from error
        if tag is None:
            raise ConfigError(f"{word!r} has no metrics: it did not finish, or was logged by something else")
        return str(tag)


def _tuned(metrics: Json, name: str) -> Json | None:
    entry = metrics["metrics"].get(name)
    return None if entry is None else entry["tuned"]


def _checked(metrics: Json, name: str) -> Json:
    if not isinstance(metrics, dict):
        raise ConfigError(f"the metrics.json of {name!r} is no JSON object; give one that the pipeline wrote")
    missing = [key for key in ("metrics", "num_rows", "split", "normalization") if key not in metrics]
    if missing:
        raise ConfigError(f"the metrics.json of {name!r} has no {missing[0]!r}; give one that the pipeline wrote")
    return metrics


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves += _flat(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", value))
    return leaves
