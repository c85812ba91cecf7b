"""What differs between a target and a prediction, character by character."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

# The table of the alignment takes the product of both lengths in bits: 50 MB for two texts of this length.
MAX_CHARACTERS = 20_000
# Texts with less in common than this share are shown apart: letters that happen to agree would only confuse.
MIN_COMMON = 0.3

Segments = list[tuple[str, str]]


def text_difference(target: str, prediction: str) -> Segments:
    """Aligns a prediction with its target by the fewest edits, which are those that the character error rate counts.

    Args:
        target: Expected text.
        prediction: Generated text.

    Returns:
        Pairs ``(kind, text)`` with kind ``same``, ``missing`` (in the target only) or ``extra`` (in the prediction
        only). The texts of ``same`` and ``extra`` together spell the prediction, those of ``same`` and ``missing``
        the target; very long texts that differ are one ``missing`` and one ``extra``.
    """
    if target == prediction:
        return [("same", target)] if target else []
    longest = max(len(target), len(prediction))
    apart = longest > MAX_CHARACTERS
    if not apart:
        distance = Levenshtein.distance(target, prediction)
        apart = distance > (1 - MIN_COMMON) * longest
    if apart:
        return [(kind, text) for kind, text in (("missing", target), ("extra", prediction)) if text]
    segments: Segments = []
    missing = extra = ""
    for step in Levenshtein.opcodes(target, prediction):
        if step.tag != "equal":
            missing += target[step.src_start : step.src_end]
            extra += prediction[step.dest_start : step.dest_end]
            continue
        segments += [(kind, text) for kind, text in (("missing", missing), ("extra", extra)) if text]
        missing = extra = ""
        segments.append(("same", prediction[step.dest_start : step.dest_end]))
    segments += [(kind, text) for kind, text in (("missing", missing), ("extra", extra)) if text]
    return segments


def visible(text: str) -> str:
    """White space made visible, for marked text: an added space or line break would otherwise show as nothing.

    Args:
        text: A missing or extra piece.
    """
    if text.strip():
        return text.replace("\n", "⏎\n")
    return text.replace(" ", "␣").replace("\n", "⏎\n").replace("\t", "⇥")
