r"""Boxes and points written in texts, so that they still lie where they lay once their image has been resized.

Three ways of writing are known, and nothing else in a text is touched:

    {"bbox_2d": [x1, y1, x2, y2]}                     JSON keys (`data.boxes.json_keys`), also within other text
    <|box_start|>(x1,y1),(x2,y2)<|box_end|>           as Qwen2-VL
    <|det|>[[x1, y1, x2, y2], …]<|/det|>              as DeepSeek-OCR

A text that is a list of boxes and nothing else counts, too. Two numbers are a point, four a box, six or more a polygon;
lists of these may be nested. x runs to the right and y down, from the upper left corner of the upright image.

A box belongs to the images of its own turn or, if that has none, of the nearest turn before it that has some. If these
are several of different size, only coordinates that are relative to the image's sides can be converted to other relative
ones; pixels could be meant in any of them, and such a row is dropped.

Only the numbers in the text are written anew: its layout stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm.config.data import BoxConfig, BoxConvention
from vlm.data.rows import RowError

Size = tuple[int, int]  # (height, width) in pixels

# Each of these can match a text in one way only, so that a long text that is none costs no more than its length.
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_PAIR = rf"\(\s*{_NUMBER.pattern}\s*,\s*{_NUMBER.pattern}\s*\)"
_PAIRS = re.compile(rf"\s*{_PAIR}(?:(?:\s*,\s*|\s*){_PAIR})*\s*")
_MARKS = {"<|box_start|>": "<|box_end|>", "<|det|>": "<|/det|>"}
# The largest coordinate by convention; pixels have none of their own.
_SCALES: dict[str, float] = {"normalized_1": 1, "normalized_999": 999, "normalized_1000": 1000}
# Of coordinates from 0 to 1: finer than a pixel of any image that a model takes.
_DECIMALS = 4
_ABSURD = 1e12


class ResizedImage(NamedTuple):
    """One image's sizes."""

    before: Size
    """Upright, as it came."""
    after: Size
    """As the model sees it."""


@dataclass(frozen=True)
class _Region:
    """Where coordinates stand in a text.

    Attributes:
        start: First character.
        end: Character behind the last.
        shapes: Coordinates of each point, box or polygon, in the order of the text.
        has_layout: Whether four numbers are written as `data.boxes.layout` says; marks only know corners.
    """

    start: int
    end: int
    shapes: list[list[float]]
    has_layout: bool


class BoxWriter:
    """Rewrites the coordinates of a conversation. Safe to use from several threads.

    Args:
        settings: Conventions of the source and of the answers to learn.
        family_convention: What the model's family is used to.
    """

    def __init__(self, settings: BoxConfig, family_convention: BoxConvention) -> None:
        self._settings = settings
        self._source = settings.source
        self._target = family_convention if settings.target == "auto" else settings.target
        keys = "|".join(map(re.escape, sorted(settings.json_keys, key=len, reverse=True)))
        marks = "|".join(map(re.escape, _MARKS))
        self._opening = re.compile(
            rf"(?P<mark>{marks})" + (rf"|(?P<quote>[\"'])(?:{keys})(?P=quote)\s*:\s*" if keys else "")
        )

    def __call__(
        self, messages: Sequence[dict[str, Any]], images: Sequence[ResizedImage]
    ) -> tuple[list[dict[str, Any]], int]:
        """Rewrites all texts of a conversation.

        Args:
            messages: Turns whose contents are lists of parts.
            images: Sizes of the images in the order of the image parts.

        Returns:
            The turns, and how many shapes were clipped to their image.

        Raises:
            RowError: Coordinates are no box, leave their image, or do not tell which image they are in.
        """
        if self._source == "none":
            return list(messages), 0
        left = iter(images)
        nearest: list[ResizedImage] = []
        clipped = 0
        written = []
        for message in messages:
            own = [next(left) for part in message["content"] if part["type"] in ("image", "video")]
            nearest = own or nearest
            parts = []
            for part in message["content"]:
                if part["type"] == "text":
                    text, count = self.text(part["text"], nearest)
                    part = {**part, "text": text}
                    clipped += count
                parts.append(part)
            written.append({**message, "content": parts})
        return written, clipped

    def text(self, text: str, images: Sequence[ResizedImage]) -> tuple[str, int]:
        """Rewrites one text.

        Args:
            text: With coordinates or without.
            images: Those that it may be about.

        Returns:
            The text, and how many shapes were clipped.

        Raises:
            RowError: As in a call.
        """
        if self._source == "none":
            return text, 0
        pieces = []
        position = clipped = 0
        for region in self._regions(text):
            numbers = []
            for shape in region.shapes:
                moved, was_clipped = self._moved(shape, region.has_layout, images)
                numbers += moved
                clipped += was_clipped
            left = iter(numbers)
            pieces.append(text[position : region.start])
            pieces.append(_NUMBER.sub(lambda _, left=left: _written(next(left)), text[region.start : region.end]))  # type: ignore[misc]
            position = region.end
        pieces.append(text[position:])
        return "".join(pieces), clipped

    def _regions(self, text: str) -> Iterator[_Region]:
        bare = text.strip()
        if bare.startswith("[") and bare.endswith("]"):
            shapes = _shapes(_parsed(bare))
            if shapes and all(len(shape) == 4 for shape in shapes):
                start = text.index("[")
                yield _Region(start, start + len(bare), shapes, True)
                return
        position = 0
        while match := self._opening.search(text, position):
            start = match.end()
            mark = match["mark"]
            if mark is None:
                position = start
                if text.startswith("null", start):
                    continue
                end = _end_of_list(text, start)
                value = _parsed(text[start:end]) if end is not None else None
                if isinstance(value, list) and any(isinstance(item, dict) for item in value):
                    continue  # a list of objects under that name; what they hold is looked at next
            else:
                closing = text.find(_MARKS[mark], start)
                end = closing if closing >= 0 else None
                content = text[start:end]
                if mark == "<|det|>":
                    value = _parsed(content)
                else:
                    value = (
                        [float(number) for number in _NUMBER.findall(content)] if _PAIRS.fullmatch(content) else None
                    )
            shapes = _shapes(value) if end is not None else None
            if shapes is None or end is None:
                shown = text[match.start() : match.start() + 80]
                raise RowError(
                    "bad_box",
                    f"{shown!r} does not give coordinates as a list of 2 (a point), 4 (a box) or more pairs of numbers; mend"
                    " it, or take the key out of data.boxes.json_keys",
                )
            yield _Region(start, end, shapes, mark is None)
            position = end

    def _moved(self, shape: list[float], has_layout: bool, images: Sequence[ResizedImage]) -> tuple[list[float], bool]:
        """Coordinates in the target's convention, and whether they were clipped."""
        image = self._image(images)
        sides = _sides(self._source, image.before)
        targets = _sides(self._target, image.after)
        corners = list(shape)
        if len(shape) == 4 and has_layout and self._settings.layout == "xywh":
            corners = [shape[0], shape[1], shape[0] + shape[2], shape[1] + shape[3]]
        leaves = self._check(corners, shape, sides, image)
        inside = [min(max(value, 0.0), sides[index % 2]) for index, value in enumerate(corners)]
        moved = [
            _rounded(value / sides[index % 2] * targets[index % 2], self._target) for index, value in enumerate(inside)
        ]
        return moved, leaves

    def _image(self, images: Sequence[ResizedImage]) -> ResizedImage:
        if self._source in _SCALES and self._target in _SCALES:
            return ResizedImage((1, 1), (1, 1))  # neither depends on the size
        different = set(images)
        if len(different) == 1:
            return images[0]
        if not different:
            raise RowError(
                "box_without_image",
                "a box stands before the first image, so its coordinates are in no image; remove it, or add the image",
            )
        raise RowError(
            "box_image_unknown",
            f"a box could be in any of {len(images)} images of different size; put each image into a turn of its own, or give"
            " relative coordinates (data.boxes.source) to a model that takes such (data.boxes.target)",
            num_images=len(images),
        )

    def _check(self, corners: list[float], shape: list[float], sides: tuple[float, float], image: ResizedImage) -> bool:
        """Whether a box leaves its image and is to be clipped; what else is wrong with it is an error."""
        shown = [_written(value) for value in shape]
        text = f"[{', '.join(shown)}]"
        limits = f"0 … {sides[0]:g} and 0 … {sides[1]:g}"
        if len(corners) == 4 and (corners[2] < corners[0] or corners[3] < corners[1]):
            raise RowError(
                "box_reversed",
                f"box {text} ends before it starts, read as {self._settings.layout}; mend it, or set data.boxes.layout",
                box=shape,
            )
        if len(corners) == 4 and max(corners) <= 1 < min(sides):
            raise RowError(
                "box_too_small",
                f"box {text} lies in the very corner of {limits}; it looks like coordinates from 0 to 1, for which"
                " data.boxes.source is 'normalized_1'",
                box=shape,
            )
        # Sums of floats may end a hair outside.
        slack = [side * 1e-9 for side in sides]
        outside = any(
            not -slack[index % 2] <= value <= sides[index % 2] + slack[index % 2] for index, value in enumerate(corners)
        )
        if not outside:
            return False
        beyond = any(
            all(value < 0 for value in corners[axis::2]) or all(value > sides[axis] for value in corners[axis::2])
            for axis in (0, 1)
        )
        if self._settings.on_outside == "drop" or beyond or len(corners) == 2:
            raise RowError(
                "box_outside",
                f"{'point' if len(corners) == 2 else 'box'} {text} leaves its image, whose coordinates are {limits}; mend it,"
                " or check data.boxes.source"
                + ("" if beyond or len(corners) == 2 else ", or set data.boxes.on_outside to 'clip'"),
                box=shape,
                image_size=image.before,
            )
        return True


def _sides(convention: str, size: Size) -> tuple[float, float]:
    """Largest x and y."""
    scale = _SCALES.get(convention)
    return (float(size[1]), float(size[0])) if scale is None else (scale, scale)


def _rounded(value: float, convention: str) -> float:
    return round(value, _DECIMALS) if convention == "normalized_1" else float(round(value))


def _written(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _parsed(text: str) -> Any:
    """A list of JSON; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _end_of_list(text: str, start: int) -> int | None:
    """The character behind a list that starts here; None where none does."""
    if not text.startswith("[", start):
        return None
    depth = 0
    for match in re.compile(r"[\[\]]").finditer(text, start):
        depth += 1 if match[0] == "[" else -1
        if depth == 0:
            return match.end()
    return None


def _shapes(value: Any, depth: int = 3) -> list[list[float]] | None:
    """Points, boxes and polygons of a list of numbers, or of such lists; None if it is something else."""
    if not isinstance(value, list) or depth == 0:
        return None
    if all(isinstance(item, list) for item in value):
        nested = [_shapes(item, depth - 1) for item in value]
        return None if None in nested else [shape for shapes in nested for shape in shapes or ()]
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        return None
    if not all(-_ABSURD < item < _ABSURD for item in value):  # nor infinite
        return None
    return (
        [[float(item) for item in value]] if len(value) in (2, 4) or (len(value) > 4 and len(value) % 2 == 0) else None
    )
