"""One run's surroundings: the settled configuration, the store, and the way every unit is looked up or built."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.code_digest import code_digest
from artifacts.errors import StoreError, StoreWriteError, full_disk
from artifacts.keys import step_key
from artifacts.manifest import subtree_digest
from artifacts.pins import Pin
from artifacts.refs import ArtifactRef
from artifacts.store import Store
from tasks.graph import STEPS, Json, Resolved, Unit, units_for
from vlm.cache import cache_directory
from vlm.config import ModelConfig, RunConfig
from vlm.errors import ResourceError, VlmError
from vlm.loading.device import detect_device, resolve_precision, resolve_quantization
from vlm.progress import counting_bytes

if TYPE_CHECKING:
    from vlm.evaluation.subject import Subject

_log = logging.getLogger("artifacts")

Outputs = dict[str, ArtifactRef]
Build = Callable[[Path, Mapping[str, Path]], Json]

# How long a machine that took part waits for another one to publish what came out.
_PUBLISHING_SECONDS = 1800

VERSIONED_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "pillow", "vision-finetune")


def open_store(url: str, cache_dir: Path) -> Store:
    """Opens an artifact store; downloads from a remote one go below the cache folder, one folder per address."""
    remote = "://" in url and not url.startswith(("file://", "memory://"))
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Store.open(url, cache_dir=cache_dir / "artifacts" / name if remote else None)


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit.

    Attributes:
        unit: Its name.
        key: The key of its inputs, settings and code.
        outputs: Its artifacts by name.
        cached: Whether they were there already.
        wall_seconds: Time it took, including publishing.
        info: The summary that the core returned when it was built.
    """

    unit: str
    key: str
    outputs: Outputs
    cached: bool
    wall_seconds: float
    info: Json


class Session:
    """Everything that the steps of one run share.

    A plain class on purpose: Prefect looks into dataclasses and models that are passed to tasks, and this one holds
    the store. It is no part of any key and never leaves the process.

    Attributes:
        resolved: Configuration and machine.
        store: Where artifacts live.
        forced: Steps that run although their result is there.
        results: What became of each unit so far.
        tracker: Experiment tracking, or None.
        cache_dir: Folder for what can always be made again.
        units: The units of this run, in order.
        subject: What an evaluation scores; None in a training run.
    """

    def __init__(
        self,
        resolved: Resolved,
        store: Store,
        *,
        forced: frozenset[str],
        cache_dir: Path,
        units: tuple[Unit, ...] | None = None,
        subject: Subject | None = None,
    ) -> None:
        self.resolved = resolved
        self.store = store
        self.forced = forced
        self.cache_dir = cache_dir
        self.units = units_for(resolved.config) if units is None else units
        self.subject = subject
        self.results: dict[str, UnitResult] = {}
        self.tracker: Any = None
        self._sources: dict[str, dict[str, str]] = {}
        self._exit = ExitStack()
        self._pin: Pin | None = None

    @classmethod
    def open(
        cls,
        config: RunConfig,
        *,
        rerun_from: str | None = None,
        steps: Sequence[str] = STEPS,
        units: tuple[Unit, ...] | None = None,
        subject: Subject | None = None,
    ) -> Session:
        """Settles the configuration on this machine and opens the store.

        Args:
            config: The configuration.
            rerun_from: Name of the first step that must run even if its result is there.
            steps: The steps of the flow, in order.
            units: The units of the run; None takes those of a training run.
            subject: What an evaluation scores.

        Raises:
            ResourceError: If the asked-for device is not there.
            StoreError: If the store cannot be opened.
        """
        forced: frozenset[str] = frozenset()
        if rerun_from is not None:
            forced = frozenset(steps[steps.index(rerun_from) :])
        device = detect_device(config.runtime.device)
        if device == "cpu":
            # Forward and backward passes run in two threads, each with its own OpenMP pool. Pools that spin while they
            # wait take the cores from each other: eight times slower on two cores. Read when torch is loaded.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        quantization = resolve_quantization(
            config.model.quantization, device, full_finetuning=bool(config.lora.full_finetuning)
        )
        config = config.model_copy(
            update={
                "model": config.model.model_copy(update={"quantization": quantization}),
                "training": config.training.settled(config.model.name),
            }
        )
        resolved = Resolved(config, device, resolve_precision(config.model.precision, device))
        cache_dir = cache_directory()
        store = open_store(config.runtime.store, cache_dir)
        return cls(resolved, store, forced=forced, cache_dir=cache_dir, units=units, subject=subject)

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Leaves the run behind where Prefect sends a task's surroundings to another process along with a task."""
        return object, ()

    @property
    def config(self) -> RunConfig:
        """The configuration of this run."""
        return self.resolved.config

    @property
    def local_root(self) -> Path | None:
        """The folder of a store on this machine, or None for a remote one."""
        return self.store.work_dir if self.store.backend.is_local else None

    @cached_property
    def model(self) -> ModelConfig:
        """The model's settings, with a Hub revision pinned to the commit that it stands for at first use.

        Key and download must speak of the same commit, even when the branch moves in between.
        """
        from vlm.loading.identity import pin_revision

        return pin_revision(self.config.model)

    @property
    def needed_splits(self) -> tuple[str, ...]:
        """Splits that must not be empty."""
        answered = self.config.generation.split
        return ("train", answered) if any(unit.step == "train" for unit in self.units) else (answered,)

    def unit(self, name: str) -> Unit:
        """The unit of that name."""
        return next(unit for unit in self.units if unit.name == name)

    def close(self) -> None:
        """Gives back what the run holds."""
        self._exit.close()

    def check_sources(self) -> None:
        """Looks for the model and the data; their digests are computed once per run.

        Raises:
            VlmError: If one is not there.
        """
        for unit in self.units:
            self._source_digests(unit.sources)

    def document(self, unit: Unit, inputs: Mapping[str, ArtifactRef]) -> Json:
        """The document whose hash is the unit's key.

        Args:
            unit: The unit.
            inputs: The artifacts that it reads, by name.
        """
        digests = {}
        for name, source in unit.inputs.items():
            ref = inputs[name]
            part = source.subtree
            digests[name] = subtree_digest(self.store.manifest(ref), part) if part else ref.digest
        return {
            "unit": unit.name,
            "version": unit.version,
            "code": code_digest(unit.code, cache_dir=self.cache_dir),
            "config": unit.settings(self.resolved),
            "inputs": digests,
            "sources": self._source_digests(unit.sources),
        }

    def key(self, name: str, inputs: Mapping[str, ArtifactRef]) -> str:
        """The key of a unit, given what it reads."""
        return step_key(self.document(self.unit(name), inputs))

    def local(self, ref: ArtifactRef) -> Path:
        """A verified, read-only folder with the artifact's files."""
        with counting_bytes("reading artifact", ref.size_bytes) as advance:
            return self.store.materialize(ref, on_bytes=advance)

    def run(self, name: str, inputs: Mapping[str, ArtifactRef], build: Build) -> UnitResult:
        """Looks a unit up and, if it is not there, builds, publishes and records it.

        Args:
            name: The unit.
            inputs: The artifacts that it reads, by name.
            build: Called with an empty folder per output (below one parent) and the verified local folders of the
                inputs; returns a small summary that is kept with the record.

        Returns:
            The unit's result, also kept in ``results``.
        """
        unit = self.unit(name)
        document = self.document(unit, inputs)
        key = step_key(document)
        started = time.monotonic()
        forced = unit.step in self.forced
        result = None if forced else self._lookup(unit, key)
        if result is None:
            with self.store.lock(unit.name, key):
                # Another process may have built it while this one waited.
                result = None if forced else self._lookup(unit, key)
                if result is None:
                    result = self._build(unit, key, document, inputs, build, started)
                    shutil.rmtree(self.store.resumable(key), ignore_errors=True)
        if result.cached:
            self._tidy(unit, key)
        earlier = self.results.get(unit.name)
        # A run that starts over, to mend what proved damaged, finds what it has made itself; that was no cached result.
        if earlier is None or not result.cached or earlier.outputs != result.outputs:
            self.results[unit.name] = result
        return self.results[unit.name]

    def _tidy(self, unit: Unit, key: str) -> None:
        """Removes what a run left that was killed after its record and before it had tidied up itself."""
        if not self.store.has_resumable(key):
            return
        with suppress(_BusyError, StoreWriteError), self.store.lock(unit.name, key, on_wait=_give_up):
            shutil.rmtree(self.store.resumable(key), ignore_errors=True)

    def _hold(self, outputs: Outputs) -> None:
        """Keeps artifacts from garbage collection until the run ends."""
        if self._pin is None:
            self._pin = self._exit.enter_context(self.store.pin())
        self._pin.add(*outputs.values())

    def take_part(
        self, name: str, inputs: Mapping[str, ArtifactRef], work: Callable[[Path, Mapping[str, Path]], object]
    ) -> UnitResult:
        """Does this machine's part of a unit that another one publishes, and waits for the result.

        Args:
            name: The unit.
            inputs: The artifacts that it reads, by name.
            work: As `build` of `run`; what it leaves behind is not kept.

        Returns:
            The unit's result.

        Raises:
            ResourceError: The result did not come, as when the machines have different stores.
        """
        unit = self.unit(name)
        key = step_key(self.document(unit, inputs))
        started = time.monotonic()
        result = None if unit.step in self.forced else self._lookup(unit, key)
        if result is None:
            before = self.store.lookup(unit.name, key)
            with self.store.staging() as stage:
                work(stage, {name: self.local(ref) for name, ref in inputs.items()})
            done = time.monotonic()
            while (record := self.store.lookup(unit.name, key)) is None or record == before:
                if time.monotonic() - done > _PUBLISHING_SECONDS:
                    raise ResourceError(
                        f"this machine did its part of {name}, but within {_PUBLISHING_SECONDS} s no result came into"
                        f" {self.config.runtime.store!r}; give all machines the same runtime.store, and look at machine 0's log"
                    )
                time.sleep(1)
            wall_seconds = time.monotonic() - started
            result = UnitResult(unit.name, key, dict(record.outputs), False, wall_seconds, dict(record.info))
        self._hold(result.outputs)
        self.results[unit.name] = result
        return result

    def _lookup(self, unit: Unit, key: str) -> UnitResult | None:
        record = self.store.lookup(unit.name, key)
        if record is None:
            return None
        try:
            self._hold(dict(record.outputs))
        except StoreWriteError as error:
            # A store that this user may only read still answers; who may write to it may also collect its garbage.
            _log.debug("Not held: %s", error)
        if not self.store.is_recorded(unit.name, key):
            return None  # garbage collection came in between
        return UnitResult(unit.name, key, dict(record.outputs), cached=True, wall_seconds=0.0, info=dict(record.info))

    def _build(
        self,
        unit: Unit,
        key: str,
        document: Json,
        inputs: Mapping[str, ArtifactRef],
        build: Build,
        started: float,
    ) -> UnitResult:
        folders = {name: self.local(ref) for name, ref in inputs.items()}
        provenance = {
            "producer": unit.name,
            "key": key,
            "inputs": {name: ref.digest for name, ref in inputs.items()},
            "versions": package_versions(),
        }
        with self.store.staging() as stage:
            for output in unit.outputs:
                (stage / output).mkdir()
            try:
                info = build(stage, folders)
            except (StoreError, VlmError):
                raise
            except Exception as error:
                if (full := full_disk(stage, error)) is not None:
                    raise full from error
                raise
            size_bytes = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
            with counting_bytes("publishing", size_bytes) as advance:
                outputs = {
                    output: self.store.publish(
                        stage / output,
                        kind=output,
                        metadata={},
                        provenance=provenance,
                        consume=True,
                        on_bytes=advance,
                    )
                    for output in unit.outputs
                }
        wall_seconds = time.monotonic() - started
        self._hold(outputs)  # first, so that garbage collection never sees the record without it
        self.store.record(unit.name, key, document, outputs, {"wall_seconds": round(wall_seconds, 3), **info})
        return UnitResult(unit.name, key, outputs, cached=False, wall_seconds=wall_seconds, info=info)

    def _source_digests(self, which: str | None) -> dict[str, str]:
        if which is None:
            return {}
        if which not in self._sources:
            self._sources[which] = self._read_sources(which)
        return self._sources[which]

    def _read_sources(self, which: str) -> dict[str, str]:
        with counting_bytes(f"hashing {which}") as advance:
            if which == "model":
                from vlm.loading.identity import model_digest

                return {"model": model_digest(self.model, cache_dir=self.cache_dir, on_bytes=advance)}
            if which == "subject":
                from vlm.evaluation.subject import subject_digest

                assert self.subject is not None
                return subject_digest(self.subject, cache_dir=self.cache_dir, on_bytes=advance)
            from vlm.data.fingerprint import source_digest

            return {
                f"data.sources[{number}]": source_digest(
                    source,
                    follow_links=self.config.data.follow_links,
                    cache_dir=self.cache_dir,
                    on_bytes=advance,
                )
                for number, source in enumerate(self.config.data.sources)
            }


class _BusyError(Exception):
    """Another process works on it."""


def _give_up(seconds: float) -> None:
    raise _BusyError


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a result, of those that are installed."""
    found = {}
    for name in VERSIONED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
