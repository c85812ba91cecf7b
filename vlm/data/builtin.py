"""The built-in dataset: receipt and form lines drawn with Pillow, so that a first run needs no download.

Fonts are those that matplotlib ships. Everything is seeded: the same Pillow and fonts give the same pixels.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vlm.data.builtin_text import Shop
from vlm.data.ranges import WHOLE, RowRange
from vlm.errors import DataError

COLUMNS = ("id", "group", "image", "prompt", "text")
NUM_SHOPS = 80
LINES_PER_SHOP = 4
NUM_ROWS = NUM_SHOPS * LINES_PER_SHOP
PROMPT = "Transcribe the text in the image."
MAX_WIDTH = 330

# Text faces only: the others that matplotlib ships hold symbols, or a subset of letters.
_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
)


def builtin_rows(part: RowRange = WHOLE) -> Iterator[dict[str, Any]]:
    """Yields rows, like any other source: columns id, group, image (Pillow), prompt and text.

    Args:
        part: Which of them.
    """
    for number in part.of(range(part.at, NUM_ROWS)):
        yield builtin_row(number)


def builtin_row(number: int) -> dict[str, Any]:
    """One row; it depends on its number alone."""
    shop = Shop(number // LINES_PER_SHOP)
    rng = random.Random(f"line {number}")
    text = shop.line(rng)
    return {
        "id": f"builtin-{number:04d}",
        "group": shop.group,
        "image": draw_line(text, shop.group, rng),
        "prompt": PROMPT,
        "text": " ".join(text.split()),
    }


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    # find_spec does not import matplotlib, which would take a second.
    spec = importlib.util.find_spec("matplotlib")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        fonts = Path(folder) / "mpl-data" / "fonts" / "ttf"
        if (fonts / _FONTS[0]).is_file():
            return fonts
    raise DataError(
        "the built-in dataset draws with the fonts that matplotlib ships, which were not found. Install matplotlib."
    )


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine: the other one is there on some machines only, and would draw other pixels.
    return ImageFont.truetype(str(_font_folder() / name), size, layout_engine=ImageFont.Layout.BASIC)


def draw_line(text: str, style: str, rng: random.Random) -> Image.Image:
    """Draws a line of a pre-printed form as a scanner might see it.

    Args:
        text: The words.
        style: Seeds what all lines of one origin share: the form, the font and the paper.
        rng: Seeds the rest: size, place, rotation, blur and noise.

    Returns:
        Image of mode L, 28 to 56 pixels high and at most `MAX_WIDTH` wide.
    """
    style_rng = random.Random(f"style {style}")
    name, paper, ink = style_rng.choice(_FONTS), style_rng.randint(200, 255), style_rng.randint(0, 70)
    form = style_rng.choices(list(_FORMS), [share for _, share in _FORMS.values()])[0]
    image = _FORMS[form][0](text, name, paper, ink, rng)
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-1.2, 1.2), Image.Resampling.BICUBIC, fillcolor=paper)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    return _with_paper(image, rng)


def _plain(text: str, name: str, paper: int, ink: int, rng: random.Random, *, most: int = MAX_WIDTH) -> Image.Image:
    """Letters on blank paper."""
    size = rng.randint(15, 26)
    while size > 9 and _font(name, size).getlength(text) > most - 16:
        size -= 1
    font = _font(name, size)
    height = min(56, max(28, size * 2 + rng.randint(-4, 6)))
    width = min(most, int(font.getlength(text)) + rng.randint(10, 16))
    image = Image.new("L", (width, height), paper)
    ImageDraw.Draw(image).text(
        (rng.randint(4, 7), height / 2 + rng.uniform(-2, 2)), text, font=font, fill=ink, anchor="lm"
    )
    return image


def _hatched(text: str, name: str, paper: int, ink: int, rng: random.Random) -> Image.Image:
    """Letters on paper with slanted lines, as of cheques and vouchers."""
    image = _plain(text, name, paper, ink, rng)
    draw, height = ImageDraw.Draw(image), image.height
    step, lean, shade = rng.randint(7, 10), rng.choice((-1, 1)) * height // 2, rng.randint(ink + 40, ink + 90)
    for left in range(-height, image.width + height, step):
        draw.line((left, 0, left + lean, height), fill=shade)
    return image


def _boxed(text: str, name: str, paper: int, ink: int, rng: random.Random) -> Image.Image:
    """A box for each letter, as on forms that machines were to read."""
    cell = min(rng.randint(15, 20), (MAX_WIDTH - 8) // len(text))
    font = _font(name, max(9, cell))
    height = max(28, cell * 2)
    image = Image.new("L", (cell * len(text) + 8, height), paper)
    draw, shade = ImageDraw.Draw(image), rng.randint(ink + 40, ink + 90)
    for place, letter in enumerate(text):
        left = 4 + place * cell
        draw.rectangle((left, 5, left + cell, height - 5), outline=shade)
        draw.text((left + cell / 2 + 0.5, height / 2), letter, font=font, fill=ink, anchor="mm")
    return image


def _narrow(text: str, name: str, paper: int, ink: int, rng: random.Random) -> Image.Image:
    """Letters of double height, as tills print totals."""
    image = _plain(text, name, paper, ink, rng, most=2 * MAX_WIDTH)
    return image.resize((max(28, int(image.width * rng.uniform(0.5, 0.6))), 56), Image.Resampling.BICUBIC)


# Of a shop's lines: how they are drawn, and the share of shops.
_FORMS: dict[str, tuple[Callable[..., Image.Image], float]] = {
    "boxed": (_boxed, 0.4),
    "hatched": (_hatched, 0.4),
    "narrow": (_narrow, 0.2),
}


def _with_paper(image: Image.Image, rng: random.Random) -> Image.Image:
    """Adds uneven light and grain."""
    noise = np.random.default_rng(rng.getrandbits(64))
    values = np.asarray(image).astype(np.int16)
    light = np.linspace(0, rng.randint(-25, 25), values.shape[1]).astype(np.int16)
    # Whole numbers, because rounding of normal deviates may differ between processors.
    strength = rng.randint(0, 9)
    grain = noise.integers(-strength, strength + 1, values.shape, dtype=np.int16)
    return Image.fromarray(np.clip(values + light[None, :] + grain, 0, 255).astype(np.uint8))
