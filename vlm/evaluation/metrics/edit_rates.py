"""Error rates by edit distance: CER, WER and MER, counted by jiwer.

Sources: Levenshtein, "Binary codes capable of correcting deletions, insertions and reversals" (1966), for the distance;
Morris, Maier and Green, "From WER and RIL to MER and WIL" (Interspeech 2004), for the match error rate.
"""

from __future__ import annotations

import jiwer

from vlm.evaluation.metrics.metric import Score

# jiwer's default transforms also strip the ends; here only the declared normalisation changes a text.
_CHARACTERS = jiwer.Compose([jiwer.ReduceToListOfListOfChars()])
_WORDS = jiwer.Compose([jiwer.ReduceToListOfListOfWords()])


def character_edits(reference: str, prediction: str) -> Score:
    """Levenshtein distance in Unicode code points, over the reference's length in code points."""
    return _over_reference(jiwer.process_characters(reference, prediction, _CHARACTERS, _CHARACTERS))


def word_edits(reference: str, prediction: str) -> Score:
    """Levenshtein distance in words (split at white space), over the reference's number of words."""
    return _over_reference(_words(reference, prediction))


def word_mismatches(reference: str, prediction: str) -> Score:
    """Levenshtein distance in words over the length of their alignment, so that no row is worse than 1."""
    output = _words(reference, prediction)
    edits = output.substitutions + output.deletions + output.insertions
    return float(edits), float(output.hits + edits)


def _words(reference: str, prediction: str) -> jiwer.WordOutput:
    reference, prediction = " ".join(reference.split()), " ".join(prediction.split())
    return jiwer.process_words(reference, prediction, _WORDS, _WORDS)


def _over_reference(output: jiwer.WordOutput | jiwer.CharacterOutput) -> Score:
    edits = output.substitutions + output.deletions + output.insertions
    return float(edits), float(output.hits + output.substitutions + output.deletions)
