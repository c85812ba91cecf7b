"""``to_dataset``: a list of conversations as the kind of dataset that TRL's trainer insists on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError

if TYPE_CHECKING:
    import datasets


def to_dataset(rows: Sequence[Any]) -> datasets.Dataset:
    """Wraps rows without copying them: images stay the objects that they are, and nothing is encoded anew.

    ``datasets.Dataset.from_list`` would write every image as a file in memory, JPEGs with a second loss.

    Args:
        rows: ``{"messages": […]}`` each, or just messages; read when a batch needs them.

    Returns:
        A dataset with the columns of the first row, or ``messages`` alone, for a collator that reads images itself.

    Raises:
        DataError: There are no rows.
    """
    import datasets

    if not len(rows):
        raise DataError("there are no rows to train on; give at least one conversation")

    columns = list(rows[0]) if isinstance(rows[0], Mapping) else None

    def look_up(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [rows[number] for number in batch["row"]]
        if columns is None:
            return {"messages": chosen}
        return {name: [row.get(name) for row in chosen] for name in columns}

    return datasets.Dataset.from_dict({"row": range(len(rows))}).with_transform(look_up)
