"""Words of the pretraining, from packages on PyPI.

Frequency lists of seven languages, and names of places, languages, months and currencies in two dozen.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from functools import lru_cache

import numpy as np

from vlm.pretrain.fonts import package_folder

# Languages of the frequency lists.
LANGUAGES = ("en", "fr", "de", "es", "it", "pt", "nl")
# Locales of the names; all in Latin script, most with letters that the seven languages do not have.
LOCALES = (
    "en", "fr", "de", "es", "it", "pt", "nl", "pl", "cs", "sk", "hu", "ro", "tr", "sv", "da", "nb", "fi", "hr", "sl",
    "et", "lv", "lt", "is", "ca", "ga",
)  # fmt: skip
_MOST_WORDS = 40_000
_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|['’-](?=[^\W\d_])){0,17}")
SYMBOLS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~£€°§«»–—…“”‘’·×©®№²"
_DRAWABLE = re.compile(rf"[A-Za-zÀ-ÖØ-öø-ſȘ-ț0-9 {re.escape(SYMBOLS)}]+")


@lru_cache(maxsize=len(LANGUAGES))
def words_of(language: str) -> tuple[str, ...]:
    """Up to 40,000 words of a language in lower case, the commonest first.

    Args:
        language: One of `LANGUAGES`.

    Raises:
        DataError: The package with the lists is not installed.
    """
    path = package_folder("spellchecker") / "resources" / f"{language}.json.gz"
    counts: dict[str, int] = json.loads(gzip.decompress(path.read_bytes()))
    listed = list(counts)
    ranking = np.argsort(-np.fromiter(counts.values(), np.int64, len(counts)), kind="stable")
    usual = (word for word in (listed[place] for place in ranking) if _WORD.fullmatch(word) and is_drawable(word))
    return tuple(itertools.islice(usual, _MOST_WORDS))


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Names of countries, languages, currencies, months and days in `LOCALES`.

    Raises:
        DataError: Babel is not installed.
    """
    package_folder("babel")
    from babel import Locale

    found: set[str] = set()
    for code in LOCALES:
        locale = Locale.parse(code)
        groups = [locale.territories.values(), locale.languages.values(), locale.currencies.values()]
        for table in (locale.months, locale.days):
            groups += [table["format"]["wide"].values(), table["format"]["abbreviated"].values()]
        found |= {name for group in groups for name in group if len(name) <= 40 and is_drawable(name)}
    return tuple(sorted(found))


def is_drawable(text: str) -> bool:
    """Whether a text is made of Latin letters, digits, spaces and the symbols drawn here."""
    return _DRAWABLE.fullmatch(text) is not None


def word(choose: random.Random) -> str:
    """A word of some language, common ones more often."""
    known = words_of(choose.choice(LANGUAGES))
    return known[int(len(known) * choose.random() ** 2.5)]
