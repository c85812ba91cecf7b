"""The figures inside a report page, so that a page alone can be compared with others."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import DataError

# Of the element that holds them.
DATA_ID = "report-data"


def data_block(metrics: Mapping[str, Any], provenance: Mapping[str, str]) -> str:
    """The text of the element: JSON that cannot end the element it stands in.

    Args:
        metrics: Content of ``metrics.json``.
        provenance: Versions and digests by name.
    """
    data = {"metrics": metrics, "provenance": dict(provenance)}
    # Keys stay in their order: the first metric leads.
    return json.dumps(data).replace("<", "\\u003c")


def read_report(page: Path) -> tuple[dict[str, Any], str | None]:
    """The metrics inside a report page.

    Args:
        page: What ``render_report`` wrote.

    Returns:
        The content of ``metrics.json``, and the digest of its artifact where the page names one.

    Raises:
        DataError: The page is none of ours.
    """
    reader = _DataBlock()
    try:
        reader.feed(page.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{page} is no page in UTF-8 ({error}); give a report.html that the pipeline wrote") from error
    if not reader.text:
        raise DataError(f"{page} holds no metrics; give a report.html that the pipeline wrote")
    try:
        data = json.loads(reader.text)
        metrics, digest = dict(data["metrics"]), data["provenance"].get("metrics")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"the metrics inside {page} are not what the pipeline writes ({error!r}); give a report.html as it was"
        ) from error
    return metrics, None if digest is None else str(digest)


class _DataBlock(html.parser.HTMLParser):
    """Finds the data of a report page."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script" and dict(attrs).get("id") == DATA_ID

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.text += data
