"""Streams a dataset of the Hugging Face Hub; nothing is downloaded ahead of the rows that are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlm.config.data import SourceConfig
from vlm.data.locations import split_from_name
from vlm.data.ranges import PartSize, RowRange
from vlm.data.rows import Row
from vlm.errors import DataError
from vlm.hub import network_errors


@dataclass(frozen=True)
class HubSplit:
    """One split as the Hub names it, and the split of ours that the name gives."""

    name: str
    split: str | None
    num_rows: int | None


# A split, its columns, its rows, and how they are divided; the last two as `RowStream` takes them.
HubStream = tuple[
    HubSplit, tuple[str, ...], Callable[..., Iterator[Row]], Callable[[PartSize, bool], Iterator[RowRange]] | None
]


def open_hub_dataset(source: SourceConfig) -> list[HubStream]:
    """Opens every split of a Hub dataset for streaming, images left encoded.

    A split is divided by its files; one of which only the first rows are taken is not.

    Raises:
        DataError: If the dataset cannot be found, reached or opened.
    """
    # Slow to import, and needed for this kind of source only.
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.path, name=source.subset, revision=source.revision)
        check_files(source.path, builder.config.data_files)
        splits = builder.as_streaming_dataset()
    except DataError:
        raise
    except network_errors(ValueError, OSError, RuntimeError) as error:
        raise DataError(
            f"the Hub dataset {source.path!r} (subset {source.subset!r}, revision {source.revision!r}) cannot be opened: {error}. "
            "Check its name, subset and revision, your network and, for a private one, HF_TOKEN; or give a local path."
        ) from error
    opened: list[HubStream] = []
    for name, dataset in splits.items():
        features = dataset.features if dataset.features is not None else dataset._resolve_features().features
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                dataset = dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))
        labels = {
            column: feature.names for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)
        }
        known = (dataset.info.splits or {}).get(name)
        split = HubSplit(str(name), split_from_name(str(name)), known.num_examples if known is not None else None)
        cut = None if source.max_rows is not None else partial(_cut, dataset.num_shards)
        opened.append((split, tuple(features), partial(_rows, dataset, labels), cut))
    return opened


def check_files(name: str, data_files: Mapping[Any, Iterable[Any]] | None) -> None:
    """Checks that a dataset's files are on the Hub: its card may name any path of this machine, and any address.

    Args:
        name: Of the dataset.
        data_files: Addresses by split; an archive's members are chained to its address by ``::``.

    Raises:
        DataError: One is elsewhere.
    """
    for files in (data_files or {}).values():
        for file in files:
            if not str(file).rpartition("::")[2].startswith("hf://"):
                raise DataError(
                    f"the Hub dataset {name!r} names the file {str(file)[:200]!r}, which is not on the Hub; use a dataset that brings"
                    " its files, or give that file as a source of its own"
                )


def _cut(num_shards: int, size: PartSize, counted: bool) -> Iterator[RowRange]:
    for shard in range(num_shards):
        yield RowRange(at=shard)


def _rows(dataset: Any, labels: dict[str, list[str]], part: RowRange | None = None) -> Iterator[Row]:
    for row in dataset if part is None else dataset.shard(dataset.num_shards, part.at):
        for column, names in labels.items():
            if isinstance(row[column], int) and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
        yield row
