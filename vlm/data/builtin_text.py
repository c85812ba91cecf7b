"""Words of the built-in dataset: invented shops and what their receipts and forms say."""

from __future__ import annotations

import random

_FIRST = (
    "Alder",
    "Birch",
    "Cedar",
    "Copper",
    "Daily",
    "Ember",
    "Fair",
    "Golden",
    "Harbor",
    "Juniper",
    "Linden",
    "Maple",
    "North",
    "Orchard",
    "Pine",
    "River",
)
_SECOND = (
    "Bakery",
    "Books",
    "Cafe",
    "Market",
    "Hardware",
    "Pharmacy",
    "Stationers",
    "Grocer",
    "Garage",
    "Flowers",
    "Cycles",
    "Kitchen",
)
_FORMS = ("Ltd", "& Co", "& Sons", "Inc.", "", "")
_STREETS = (
    "Mill Lane",
    "Station Road",
    "High Street",
    "Garden Way",
    "Quay Street",
    "Church Hill",
    "Market Square",
    "Elm Avenue",
)
_TOWNS = ("Ashford", "Brookfield", "Clayton", "Dunmore", "Easton", "Fairview", "Greenhill", "Halton")
_ITEMS = (
    "Rye bread",
    "Espresso",
    "Notebook A5",
    "Blue pen",
    "Apple juice",
    "Screws 4x30",
    "Bike tube",
    "Tulips",
    "Olive oil",
    "Green tea",
    "Soap bar",
    "Lamp 60W",
)
_LABELS = ("TOTAL", "SUBTOTAL", "CASH", "CHANGE", "VAT 20%", "Amount due", "Balance")
_MARKS = ("$", "£", "€", "")


class Shop:
    """One invented shop; all lines of one shop belong to one group.

    Args:
        number: Which one; also its group.
    """

    def __init__(self, number: int) -> None:
        rng = random.Random(f"shop {number}")
        form = rng.choice(_FORMS)
        self.group = f"shop-{number:03d}"
        self.name = f"{rng.choice(_FIRST)} {rng.choice(_SECOND)}{' ' + form if form else ''}"
        self.address = f"{rng.randint(1, 240)} {rng.choice(_STREETS)}, {rng.choice(_TOWNS)}"
        self.phone = f"Tel {rng.randint(100, 999)}-{rng.randint(1000, 9999)}"
        self.mark = rng.choice(_MARKS)
        self.is_loud = rng.random() < 0.3
        self.day_first = rng.random() < 0.5

    def line(self, rng: random.Random) -> str:
        """One line of a receipt or form of this shop."""
        kind = rng.choice((self._item, self._item, self._total, self._date, self._number, self._head))
        text = kind(rng)
        return text.upper() if self.is_loud else text

    def _money(self, rng: random.Random, most: int) -> str:
        return f"{self.mark}{rng.randint(0, most)}.{rng.randint(0, 99):02d}"

    def _item(self, rng: random.Random) -> str:
        return f"{rng.randint(1, 9)} x {rng.choice(_ITEMS)}  {self._money(rng, 40)}"

    def _total(self, rng: random.Random) -> str:
        return f"{rng.choice(_LABELS)}: {self._money(rng, 400)}"

    def _date(self, rng: random.Random) -> str:
        day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(2015, 2026)
        date = f"{day:02d}/{month:02d}/{year}" if self.day_first else f"{year}-{month:02d}-{day:02d}"
        return f"Date {date} {rng.randint(7, 21):02d}:{rng.randint(0, 59):02d}"

    def _number(self, rng: random.Random) -> str:
        label = rng.choice(("Invoice No.", "Receipt #", "Order", "Customer"))
        return f"{label} {rng.choice('ABCDEFGH')}{rng.randint(1000, 99999)}"

    def _head(self, rng: random.Random) -> str:
        return rng.choice((self.name, self.address, self.phone))
