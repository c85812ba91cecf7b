"""LaTeX, captions and boxes; every expected number is worked by hand in a comment."""

import pytest

from vlm.errors import DataError
from vlm.evaluation.metrics.captions import chrf, rouge_l
from vlm.evaluation.metrics.grounding import boxes_in, found_boxes, iou, mean_iou
from vlm.evaluation.metrics.latex import latex_edits, latex_tokens


def test_latex_tokens() -> None:
    assert latex_tokens(r"$ \frac{a}{ b } $") == [r"\frac", "{", "a", "}", "{", "b", "}"]
    assert latex_tokens(r"\[x\,=\ 5\%\]") == ["x", r"\,", "=", "5", r"\%"]  # a command that is a space goes
    assert latex_tokens("$") == ["$"]


def test_latex_edits() -> None:
    # x ^ 2 against x ^ { 2 }: two tokens more among five.
    assert latex_edits(["$x^2$"], "x^{2}", str.upper) == (2, 5)
    assert latex_edits([r"\alpha + 1", r"\beta"], r"\beta", str) == (0, 1)
    assert latex_edits([r"\Alpha"], r"\alpha", str.lower) == (1, 1)  # case is not taken away
    assert latex_edits(["$$$$"], "", str) == (0, 0)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    # The example of Lin's paper (section 3.1): candidates 2 and 3 for "police killed the gunman".
    [("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4)],
)
def test_the_example_of_rouge_l(prediction: str, expected: float) -> None:
    assert rouge_l("police killed the gunman", prediction) == (pytest.approx(expected), 1)


def test_rouge_l() -> None:
    assert rouge_l("A dog, running.", "a dog") == (pytest.approx(2 * 2 / 5), 1)
    assert rouge_l("...", "!") == (1, 1)
    assert rouge_l("...", "word") == (0, 1)


def test_chrf() -> None:
    # n = 1: three of "abcd" in "abc", precision 1, recall 3/4; n = 2: 2/2 and 2/3; n = 3: 1/1 and 1/2. No longer n-gram
    # is in both texts' counts. Means: precision 1, recall 23/36; F2 = 5 · P · R / (4 · P + R).
    precision, recall = 1.0, (3 / 4 + 2 / 3 + 1 / 2) / 3
    expected = 5 * precision * recall / (4 * precision + recall)
    assert chrf(["abcd"], "abc", str) == (pytest.approx(expected), 1)
    assert chrf(["xyz", "abc"], "abc", str) == (pytest.approx(1), 1)


def test_boxes_are_read_in_every_way_of_writing() -> None:
    assert boxes_in('[{"bbox_2d": [1, 2, 3.5, 4], "label": "a"}, {"bbox_2d": [5,6,7,8]}]') == [
        (1, 2, 3.5, 4),
        (5, 6, 7, 8),
    ]
    assert boxes_in("<|box_start|>(1,2),(3,4)<|box_end|>") == [(1, 2, 3, 4)]
    assert boxes_in("<|det|>[[1, 2, 3, 4], [5, 6, 7, 8]]<|/det|>") == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert boxes_in("<loc0002><loc0001><loc0004><loc0003> cat") == [(1, 2, 3, 4)]
    assert boxes_in("[1, 2, 3] and (4, 5)") == []


def test_iou() -> None:
    # 2 × 2 boxes that share one quarter each: 1 / (4 + 4 − 1).
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0
    assert iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0  # corners the wrong way round
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_grounding() -> None:
    target = "[0, 0, 4, 4] [10, 0, 14, 4]"
    # The first overlaps by one half, the second is exact; order does not matter.
    assert mean_iou([target], "[10, 0, 14, 4] [0, 0, 2, 4]", str) == (pytest.approx(1.5), 2)
    assert found_boxes([target], "[10, 0, 14, 4] [0, 0, 2, 4]", str) == (2, 2)  # one half is enough
    assert found_boxes([target], "[0, 0, 4, 4] [0, 0, 4, 4] [1, 1, 2, 2]", str) == (1, 3)  # each box is paired once
    assert mean_iou([target], "none", str) == (0, 2)
    with pytest.raises(DataError, match="has no box"):
        mean_iou(["nowhere"], "[0, 0, 1, 1]", str)
