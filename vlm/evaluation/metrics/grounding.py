"""How well boxes in an answer lie on those of the target.

Source: Yu et al., "Modeling Context in Referring Expressions" (ECCV 2016): a box is found where the intersection over
union (IoU) reaches one half. With several boxes in a row, predicted ones are paired with expected ones, best pairs
first, and boxes left over on either side count as misses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vlm.errors import DataError
from vlm.evaluation.metrics.metric import Clean, Score, best_of

Box = tuple[float, float, float, float]

FOUND_IOU = 0.5
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(
    # [x1, y1, x2, y2] or the same in round brackets, as JSON and DeepSeek-OCR have it; (x1, y1), (x2, y2) as Qwen2-VL;
    # <loc…> four times as PaliGemma, which gives y before x.
    rf"[\[(]{','.join([_NUMBER] * 4)}[\])]"
    rf"|\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)"
    r"|<loc(\d+)>\s*<loc(\d+)>\s*<loc(\d+)>\s*<loc(\d+)>"
)


def boxes_in(text: str) -> list[Box]:
    """Reads the boxes of an answer; whatever else is in the text is passed over.

    Args:
        text: Any text.

    Returns:
        Corners (x1, y1, x2, y2) in the text's own units.
    """
    boxes = []
    for match in _BOX.finditer(text):
        a, b, c, d = (float(group) for group in match.groups() if group is not None)
        boxes.append((b, a, d, c) if match[0].startswith("<loc") else (a, b, c, d))
    return boxes


def iou(left: Box, right: Box) -> float:
    """Intersection over union of two boxes; 0 for boxes without area or with corners the wrong way round."""
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    areas = [
        (box[2] - box[0]) * (box[3] - box[1]) if box[2] > box[0] and box[3] > box[1] else 0 for box in (left, right)
    ]
    if width <= 0 or height <= 0 or 0 in areas:
        return 0.0
    return width * height / (sum(areas) - width * height)


def mean_iou(references: Sequence[str], prediction: str, clean: Clean) -> Score:
    """IoU summed over pairs, over the number of boxes (expected or predicted, whichever is more)."""
    return _score(references, prediction, lambda overlap: overlap)


def found_boxes(references: Sequence[str], prediction: str, clean: Clean) -> Score:
    """Pairs with an IoU of at least one half, over the number of boxes as in `mean_iou`."""
    return _score(references, prediction, lambda overlap: float(overlap >= FOUND_IOU))


def _score(references: Sequence[str], prediction: str, worth: Callable[[float], float]) -> Score:
    predicted = boxes_in(prediction)
    scores = []
    for reference in references:
        expected = boxes_in(reference)
        if not expected:
            raise DataError(
                f"the target {reference[:80]!r} has no box, which grounding metrics compare; take other evaluation.metrics,"
                " or write targets as [x1, y1, x2, y2]"
            )
        scores.append((sum(map(worth, pairs(expected, predicted))), float(max(len(expected), len(predicted)))))
    return best_of(scores, "higher")


def pairs(expected: Sequence[Box], predicted: Sequence[Box]) -> list[float]:
    """Pairs boxes, best overlaps first.

    Args:
        expected: The target's boxes.
        predicted: The answer's boxes.

    Returns:
        IoU of each pair that overlaps at all.
    """
    overlaps = sorted(
        ((iou(left, right), -i, -j) for i, left in enumerate(expected) for j, right in enumerate(predicted)),
        reverse=True,
    )
    used: tuple[set[int], set[int]] = (set(), set())
    found = []
    for overlap, i, j in overlaps:
        if overlap > 0 and i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
            found.append(overlap)
    return found
