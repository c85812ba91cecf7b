"""What the lines of the pretraining say: running words, what stands on receipts and forms, and strings without sense.

The senseless ones keep the model from guessing: half of what it sees cannot be known without reading it.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from vlm.pretrain.words import SYMBOLS, names, word

ACCENTED = "áàâäãåæçčćďéèêëěęíìîïıłñňńóòôöõőøœřšśşßťúùûüůűýžźżÁÀÂÄÃÅÆÇČÉÈÊËĘÍÎŁÑÓÖÔÕØŒŘŠŚŞÚÜŰÝŽŻ"
_LABELS = (
    "Total", "Subtotal", "Sum", "Tax", "VAT", "GST", "MwSt", "TVA", "IVA", "Cash", "Change", "Card", "Paid", "Due",
    "Qty", "Price", "Item", "Discount", "Rounding", "Amount", "Net", "Gross", "Betrag", "Summe", "Montant", "Importe",
    "Invoice", "Rechnung", "Facture", "Bill", "Order", "Ref", "Account", "IBAN", "Phone", "Tel", "Fax", "Date", "Time",
    "Cashier", "Table", "Member", "Points", "Terminal", "Slip", "No", "Nr", "N°", "ID", "Reg", "Doc",
)  # fmt: skip
_CURRENCIES = ("$", "€", "£", "EUR ", "USD ", "RM ", "CHF ", "kr ", "zł ", "Kč ", "Fr. ")
_STREETS = (
    "Street",
    "Road",
    "Rue",
    "rue de la",
    "Via",
    "Calle",
    "Avenida",
    "straat",
    "Weg",
    "Lane",
    "Jalan",
    "Place",
    "Ul.",
)
_PREFIXES = ("Dr.", "Mr", "Mrs", "Mme", "M.", "Herr", "Frau", "Sra.", "St.")


def words(choose: random.Random) -> str:
    """Running words of mixed languages, with punctuation."""
    pieces = []
    for _ in range(choose.randint(1, 9)):
        piece = word(choose)
        if choose.random() < 0.15:
            piece = piece.capitalize()
        chance = choose.random()
        if chance < 0.12:
            piece += choose.choice(",,,.;:!?")
        elif chance < 0.14:
            piece = choose.choice(("({})", '"{}"', "«{}»", "'{}'", "“{}”", "[{}]")).format(piece)
        pieces.append(piece)
    text = " ".join(pieces)
    return text[0].upper() + text[1:] if choose.random() < 0.5 else text


def number(choose: random.Random) -> str:
    """Figures, prices and amounts."""
    kind = choose.randrange(6)
    if kind == 0:
        return str(choose.randrange(10 ** choose.randint(1, 12)))
    if kind == 1:
        return f"{choose.choice(_CURRENCIES)}{money(choose)}"
    if kind == 2:
        return f"{money(choose)} {choose.choice(_CURRENCIES).strip()}"
    if kind == 3:
        return f"{choose.randint(0, 100)}{choose.choice(('', '.5', ',25'))}{choose.choice(('%', ' %', ' kg', ' g', 'x', ' m²', ' km'))}"
    if kind == 4:
        return " ".join(str(choose.randint(0, 9999)) for _ in range(choose.randint(2, 5)))
    return f"{choose.choice('+-')}{choose.randint(0, 9999)}{choose.choice(('', '.0', '.75', '/2'))}"


def money(choose: random.Random) -> str:
    """An amount, with or without separators."""
    amount = choose.randrange(10 ** choose.randint(1, 5))
    decimals = f"{choose.randrange(100):02d}"
    mark = choose.choice("..,")
    whole = f"{amount:,}" if choose.random() < 0.3 else str(amount)
    if mark == ",":
        whole = whole.replace(",", ".")
    return f"{whole}{mark}{decimals}"


def date(choose: random.Random) -> str:
    """A date, a time, or both."""
    day, month, year = choose.randint(1, 31), choose.randint(1, 12), choose.randint(1890, 2035)
    mark = choose.choice(("/", "-", ".", " "))
    forms = (
        f"{day:02d}{mark}{month:02d}{mark}{year}",
        f"{year}{mark}{month:02d}{mark}{day:02d}",
        f"{day}{mark}{month}{mark}{year % 100:02d}",
        f"{day} {choose.choice(names())} {year}",
        f"{choose.choice(names())} {day}, {year}",
    )
    text = choose.choice(forms)
    clock = f"{choose.randint(0, 23):02d}:{choose.randint(0, 59):02d}"
    if choose.random() < 0.3:
        clock += f":{choose.randint(0, 59):02d}"
    if choose.random() < 0.2:
        clock += choose.choice((" AM", " PM", " h", " Uhr"))
    chance = choose.random()
    return clock if chance < 0.2 else f"{text} {clock}" if chance < 0.5 else text


def address(choose: random.Random) -> str:
    """A part of an address, or a way to reach somebody."""
    place = word(choose).capitalize()
    kind = choose.randrange(6)
    if kind == 0:
        return f"{choose.randint(1, 999)}{choose.choice(('', 'a', 'B', ' bis'))}, {choose.choice(_STREETS)} {place}"
    if kind == 1:
        return f"{choose.randint(10000, 99999)} {place} {choose.choice(names())}"
    if kind == 2:
        return (
            f"{word(choose)}.{word(choose)}@{word(choose)}.{choose.choice(('com', 'org', 'fr', 'de', 'net', 'com.my'))}"
        )
    if kind == 3:
        return (
            f"www.{word(choose)}{choose.choice(('', '-' + word(choose)))}.{choose.choice(('com', 'org', 'it', 'nl'))}"
        )
    if kind == 4:
        groups = choose.choice(((2, 2, 2, 2, 2), (3, 3, 4), (4, 6), (2, 4, 4)))
        mark = choose.choice((" ", "-", "."))
        figures = mark.join("".join(choose.choices(string.digits, k=length)) for length in groups)
        return choose.choice(("", "Tel: ", "Tel. ", "Fax : ", "+")) + figures
    return f"{choose.choice(_PREFIXES)} {place} {word(choose).capitalize()}"


def entry(choose: random.Random) -> str:
    """A line of a receipt or a form: a label and what belongs to it."""
    label = choose.choice(_LABELS) if choose.random() < 0.6 else word(choose).capitalize()
    if choose.random() < 0.3:
        label = f"{label} {word(choose)}"
    value = choose.choice((money, money, number, date, code, name))(choose)
    if choose.random() < 0.2:
        return f"{choose.randint(1, 20)} {choose.choice(('x ', '× ', '', '@ '))}{label} {value}"
    return f"{label}{choose.choice((':', ' :', '', '', '.', ' =', '#', ' -'))} {value}"


def code(choose: random.Random) -> str:
    """An identifier."""
    letters = string.ascii_uppercase if choose.random() < 0.7 else string.ascii_letters
    alphabet = letters + string.digits * 3
    parts = ["".join(choose.choices(alphabet, k=choose.randint(1, 6))) for _ in range(choose.randint(1, 4))]
    return choose.choice(("-", "", "/", ".", " ")).join(parts)


def nonsense(choose: random.Random) -> str:
    """Characters at random: of all kinds, or of letters that words seldom have."""
    letters = string.ascii_letters
    alphabet = choose.choice(
        (
            letters,
            letters + string.digits,
            letters + ACCENTED,
            letters + string.digits + SYMBOLS,
            letters + ACCENTED + SYMBOLS,
        )
    )
    if choose.random() < 0.3:
        alphabet = alphabet.upper() if choose.random() < 0.5 else alphabet.lower()
    return " ".join("".join(choose.choices(alphabet, k=choose.randint(1, 8))) for _ in range(choose.randint(1, 5)))


def figures(choose: random.Random) -> str:
    """Digits alone: ten shapes, on which a model that cannot see yet finds out where to look."""
    return "".join(choose.choices(string.digits, k=choose.randint(1, 12)))


def name(choose: random.Random) -> str:
    """Names of places, months, currencies in languages with many accents."""
    return " ".join(choose.choice(names()) for _ in range(choose.randint(1, 2)))


KINDS: dict[str, tuple[Callable[[random.Random], str], float]] = {
    "words": (words, 0.30),
    "entry": (entry, 0.17),
    "number": (number, 0.09),
    "date": (date, 0.06),
    "address": (address, 0.08),
    "code": (code, 0.06),
    "nonsense": (nonsense, 0.14),
    "name": (name, 0.10),
    # Drawn on purpose only, at the beginning of a training.
    "figures": (figures, 0.0),
}


def make_text(choose: random.Random, longest: int, kind: str | None = None) -> str:
    """One line.

    Args:
        choose: Source of chance.
        longest: Most characters.
        kind: One of `KINDS`; None draws one.

    Returns:
        Text without white space at its ends and with single spaces, never empty.
    """
    if kind is None:
        kind = choose.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
    if kind == "figures":
        return figures(choose)[: choose.randint(1, longest)]
    text = KINDS[kind][0](choose)
    chance = choose.random()
    if chance < 0.22:
        text = text.upper()
    elif chance < 0.27:
        text = text.lower()
    if len(text) > longest:
        # A crop of a document begins and ends anywhere, but mostly between words.
        start = choose.randint(0, len(text) - longest)
        text = text[start : start + longest]
        if choose.random() < 0.7 and " " in text.strip():
            text = text[text.index(" ") :] if start and choose.random() < 0.5 else text[: text.rindex(" ")]
    text = " ".join(text.split())
    return text or choose.choice(string.ascii_letters)
