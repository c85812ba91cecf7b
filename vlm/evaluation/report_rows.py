"""The rows of a report: the worst ones, with pictures and marked differences."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from rapidfuzz.distance import Levenshtein

from vlm.errors import DataError
from vlm.evaluation.differences import text_difference, visible
from vlm.evaluation.scores import worst_first
from vlm.families.video import Video

MAX_ROWS = 200
MAX_PICTURE_SIDE_PX = 640
# All pictures together, as files; past this the page would be too heavy to mail, and rows are shown without.
MAX_PICTURES_BYTES = 12_000_000
# PNG is exact and small for text on white; photographs are not, and get JPEG.
_LARGE_PNG_BYTES = 60_000

MODELS = (("tuned", "Tuned model"), ("base", "Base model"))


class ImageRows(Protocol):
    """What the report needs of a prepared split."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int, /) -> Any:
        """A row with `id` and `images`."""


def shown_rows(
    scored: Sequence[Mapping[str, Any]], rows: ImageRows | None, metrics: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Lays out the worst rows for the template.

    Args:
        scored: The rows of ``rows.jsonl``.
        rows: The evaluated split, for its pictures, or None.
        metrics: The content of ``metrics.json``.

    Raises:
        DataError: `rows` are not the rows that were scored.
    """
    room_bytes = MAX_PICTURES_BYTES
    shown = []
    for position in worst_first(scored, metrics["metrics"])[:MAX_ROWS]:
        row = scored[position]
        pictures = [picture(image) for image in _images(row, position, rows)]
        needed_bytes = sum(len(entry["uri"]) for entry in pictures)
        fits = needed_bytes <= room_bytes
        room_bytes -= needed_bytes if fits else 0
        shown.append(
            {
                "id": row["id"],
                "position": position,
                "target": row["target"],
                "also_right": references(row)[1:],
                "pictures": pictures if fits else [],
                "num_left_out": 0 if fits else len(pictures),
                "answers": [_answer(row, who, label, metrics) for who, label in MODELS if who in row],
                "kinds": row_kinds(row),
                "gain": _gain(row, metrics),
            }
        )
    return shown


def row_kinds(row: Mapping[str, Any], who: str = "tuned") -> list[str]:
    """The names by which an answer can be filtered: whether it is right, and failure kinds.

    Args:
        row: A line of ``rows.jsonl``.
        who: ``tuned`` or ``base``.
    """
    answer = row[who]
    kinds = ["right" if answer["prediction"] in references(row) else "wrong"]
    kinds += [str(kind) for kind in answer.get("failures", ())]
    if answer["finish_reason"] == "length" and "truncated" not in kinds:
        kinds.append("truncated")
    return kinds


def references(row: Mapping[str, Any]) -> list[str]:
    """Every right answer to a row, its target first.

    Args:
        row: A line of ``rows.jsonl``.
    """
    return list(dict.fromkeys([row["target"], *row.get("references", ())]))


def picture(pixels: Any) -> dict[str, Any]:
    """A picture as a data address, small enough for a page.

    Args:
        pixels: Array of shape [height, width, 3], uint8.

    Returns:
        Its `uri`, and `width` and `height` in pixels.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((MAX_PICTURE_SIDE_PX, MAX_PICTURE_SIDE_PX))
    kind, content = "png", _encoded(image, "PNG", optimize=True)
    if len(content) > _LARGE_PNG_BYTES:
        photograph = _encoded(image, "JPEG", quality=85, optimize=True)
        if len(photograph) < len(content):
            kind, content = "jpeg", photograph
    encoded = base64.b64encode(content).decode("ascii")
    return {"uri": f"data:image/{kind};base64,{encoded}", "width": image.width, "height": image.height}


def _encoded(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _images(row: Mapping[str, Any], position: int, rows: ImageRows | None) -> Iterable[Any]:
    if rows is None:
        return ()
    source = rows[position] if position < len(rows) else None
    if source is None or source.id != row["id"]:
        found = "nothing" if source is None else repr(source.id)
        raise DataError(
            f"row {position} of the metrics is {row['id']!r} but the dataset has {found} there;"
            " give the report the dataset that the predictions were made from"
        )
    # Of a video, the first frame.
    return [image.frames[0] if isinstance(image, Video) else image for image in source.images]


def _answer(row: Mapping[str, Any], who: str, label: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    answer = row[who]
    prediction = answer["prediction"]
    # Marked against the right answer that it comes closest to.
    nearest = min(references(row), key=lambda right: Levenshtein.normalized_distance(right, prediction))
    segments = text_difference(nearest, prediction)
    return {
        "label": label,
        "segments": [(kind, text if kind == "same" else visible(text)) for kind, text in segments],
        "empty": not prediction,
        "cut": answer["finish_reason"] == "length",
        "values_shown": [(entry["title"], answer[name]) for name, entry in metrics["metrics"].items()],
    }


def _gain(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> float | None:
    """By how much the tuned model's answer is better than the base model's, by the leading metric."""
    if "base" not in row:
        return None
    name, entry = next(iter(metrics["metrics"].items()))
    gain = float(row["tuned"][name] - row["base"][name])
    return -gain if entry["better"] == "lower" else gain
