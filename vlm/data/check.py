"""What can be known of the sources before anything is prepared: that they are there and have the columns asked for."""

from __future__ import annotations

from vlm.config import DataConfig
from vlm.data.mapping import resolve_columns
from vlm.data.sources import open_streams


def check_sources(data: DataConfig) -> None:
    """Opens every source and looks for the mapped columns; reads no rows beyond what a format needs to know its columns.

    Args:
        data: Sources and columns.

    Raises:
        DataError: A source is missing or unreadable, or has no such column.
    """
    for stream in open_streams(data.sources, follow_links=data.follow_links):
        resolve_columns(data.columns, stream)
