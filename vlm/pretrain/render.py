"""Draws lines of text as scanners and cameras may see them, in grey, about a thousand a second on one core.

    ink (how much of each pixel is covered) ── turn, shear ── paper and ink ── wear ── grey image

Everything random comes from the generators that are passed in. What is cheap on a GPU (grain, contrast, inversion) comes
later and there, see `vlm.pretrain.batch`.
"""

from __future__ import annotations

import io
import math
import random
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from vlm.pretrain.fonts import Face, Glyph, faces
from vlm.pretrain.text import make_text

Grey = npt.NDArray[np.uint8]

WIDEST = 900
# Few sizes, so that glyphs are found again; stretching and the fit to whole patches give all that lie between.
_SIZES = (10, 11, 12, 14, 16, 18, 20, 23, 26, 30, 36, 44)
_TEXTURES, _TEXTURE_SIDE = 8, 1024


def draw_face(choose: random.Random, text: str) -> tuple[Face, str]:
    """A face that has all characters of a text, and the text; without accents where no face was found soon."""
    families = faces()
    for _ in range(6):
        family = choose.choices([family for family, _ in families], [share for _, share in families])[0]
        face = choose.choice(family)
        if face.covers(text):
            return face, text
    plain = " ".join("".join(letter for letter in text if letter.isascii()).split())
    return families[0][0][0], plain or "?"


def draw_sample(
    choose: random.Random, noise: np.random.Generator, *, longest: int, wear: float, kind: str | None = None
) -> tuple[Image.Image, str]:
    """One image of a line, or at times of a few lines, and what it says.

    Args:
        choose: Source of chance.
        noise: Source of chance for pixels.
        longest: Most characters of a line.
        wear: From 0 (large, clean, straight) to 1.
        kind: Kind of text, of `vlm.pretrain.text.KINDS`; None draws one.

    Returns:
        Image of mode L, and the text with lines parted by line breaks.
    """
    num_lines = choose.randint(2, 4) if wear > 0.5 and choose.random() < 0.06 else 1
    text = make_text(choose, longest, kind)
    face, text = draw_face(choose, text)
    lines = [text]
    for _ in range(num_lines - 1):
        more = make_text(choose, min(longest, 28), kind)
        if face.covers(more):
            lines.append(more)
    image = _ink(lines, face, _draw_size(choose, wear, len(lines) > 1), choose, wear)
    image = _bent(image, choose, wear)
    return _worn(_on_paper(image, choose, noise, wear), choose, noise, wear), "\n".join(lines)


def _draw_size(choose: random.Random, wear: float, is_small: bool) -> int:
    smallest = 24 - 14 * wear
    largest = 28 if is_small or choose.random() < 0.6 else _SIZES[-1]  # most documents are set small
    return choose.choice([size for size in _SIZES if smallest <= size <= largest])


def _ink(lines: list[str], face: Face, size: int, choose: random.Random, wear: float) -> Image.Image:
    """Coverage by ink, mode L, 255 where it is full."""
    loose = choose.random() * wear
    spacing = max(-0.03, choose.gauss(0, 0.04)) * size * wear if choose.random() < 0.4 else 0.0
    # Receipts have columns: some gaps between words are wide.
    shown = [_spread(line, choose) if choose.random() < 0.15 * wear else line for line in lines]
    rows = [_set(line, face, size, spacing) for line in shown]
    while max(row[-1][0] for row in rows) > WIDEST and size > _SIZES[0]:
        size = _SIZES[_SIZES.index(size) - 1]
        rows = [_set(line, face, size, 0.0) for line in shown]
    pitch = round(size * choose.uniform(1.05, 1.5))
    above, below = (round(choose.uniform(0, 0.1 + 0.4 * loose) * size) for _ in range(2))
    left, right = (round(choose.uniform(0.1, 0.3 + 0.8 * loose) * size) for _ in range(2))
    top = max(round(0.55 * size), -min(glyph.top for _, glyph in rows[0]))
    bottom = max(round(0.1 * size), max(glyph.top + len(glyph.coverage) for _, glyph in rows[-1]))
    width = (
        left + right + max(max(int(pen) + glyph.left + glyph.coverage.shape[1] for pen, glyph in row) for row in rows)
    )
    baseline = above + top
    ink = np.zeros((max(12, baseline + pitch * (len(rows) - 1) + bottom + below), width), np.uint8)
    for number, row in enumerate(rows):
        _stamp(ink, row, left, baseline + number * pitch)
    chance = choose.random()
    if chance < 0.06 * wear:
        y = min(len(ink) - 2, baseline + round(choose.uniform(0.05, 0.3) * size))
        ink[y : y + choose.randint(1, 2)] = choose.randint(80, 255)
    elif chance < 0.16 * wear:
        # The neighbours' lines reach into a tight crop.
        other = make_text(choose, 40)
        if face.covers(other):
            row, step = _set(other, face, size, spacing), round(size * choose.uniform(1.0, 1.25))
            for side in choose.choice(((-1,), (1,), (-1, 1))):
                last = len(rows) - 1 if side > 0 else 0
                _stamp(ink, row, left + choose.randint(-10, 10), baseline + last * pitch + side * step)
    elif chance < 0.19 * wear:
        ink[:, choose.choice((0, 1, -2))] = 255
    return Image.fromarray(ink)


def _set(line: str, face: Face, size: int, spacing: float) -> list[tuple[float, Glyph]]:
    """Where the pen stands for each character of a line."""
    row, pen = [], 0.0
    for character in line:
        glyph = face.glyph(size, character)
        row.append((pen, glyph))
        pen += glyph.advance + spacing
    return row


def _stamp(ink: Grey, row: list[tuple[float, Glyph]], left: int, baseline: int) -> None:
    """Draws a line; what lies outside is cut off."""
    height, width = ink.shape
    for pen, glyph in row:
        rows, columns = glyph.coverage.shape
        if not rows or not columns:
            continue
        y, x = baseline + glyph.top, left + round(pen) + glyph.left
        y0, x0, y1, x1 = max(y, 0), max(x, 0), min(y + rows, height), min(x + columns, width)
        if y0 < y1 and x0 < x1:
            place = ink[y0:y1, x0:x1]
            np.maximum(place, glyph.coverage[y0 - y : y1 - y, x0 - x : x1 - x], out=place)


def _spread(line: str, choose: random.Random) -> str:
    words = line.split(" ")
    if len(words) < 2 or len(line) > 40:
        return line
    place = choose.randrange(1, len(words))
    return " ".join(words[:place]) + " " * choose.randint(2, 9) + " ".join(words[place:])


def _bent(image: Image.Image, choose: random.Random, wear: float) -> Image.Image:
    """Turned, sheared or stretched a little."""
    if choose.random() > 0.6 * wear:
        return image
    width, height = image.size
    stretch = choose.uniform(0.8, 1.25) if choose.random() < 0.5 else 1.0
    # No turn lifts the end of a line by more than a share of its height.
    turn = choose.gauss(0, 0.4) * min(0.05, 0.5 * height / width)
    shear = choose.uniform(-0.3, 0.3) if choose.random() < 0.3 else choose.gauss(0, 0.03)
    lift = abs(turn) * width
    size = (math.ceil(width * stretch + abs(shear) * height), math.ceil(height + lift))
    # Output pixel (x, y) is taken from (a x + b y + c, d x + e y + f).
    a, b, d, e = 1 / stretch, shear, turn, 1.0
    c = -shear * (size[1] if shear > 0 else 0)
    f = -lift if turn > 0 else 0.0
    return image.transform(size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)


def _on_paper(image: Image.Image, choose: random.Random, noise: np.random.Generator, wear: float) -> Image.Image:
    """Paper where there is no ink, with uneven light and texture."""
    chance = choose.random()
    if chance < 0.1 * wear:
        image = image.filter(ImageFilter.MaxFilter(3)) if image.height > 30 else image
    elif chance < 0.16 * wear:
        image = image.filter(ImageFilter.BoxBlur(0.7)).point(_threshold(choose.randint(90, 170)))
    contrast = choose.uniform(0.25, 1.0) if choose.random() < wear else 1.0
    paper = choose.uniform(255 - 110 * wear, 255)
    ink = paper * (1 - contrast * choose.uniform(0.75, 1.0))
    values = np.asarray(image, np.float32) * ((ink - paper) / 255)
    values += paper
    if choose.random() < 0.4 * wear:
        values += np.linspace(0, choose.uniform(-45, 45), values.shape[1], dtype=np.float32)
    if choose.random() < 0.35 * wear:
        y, x = (choose.randrange(_TEXTURE_SIDE - size) if size < _TEXTURE_SIDE else 0 for size in values.shape)
        texture = choose.choice(_textures())[y : y + values.shape[0], x : x + values.shape[1]]
        values[:, : texture.shape[1]] += texture * np.float32(choose.uniform(4, 25))
    if choose.random() < 0.3 * wear:
        values += noise.standard_normal(values.shape, np.float32) * np.float32(choose.uniform(2, 14))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


@lru_cache(maxsize=512)
def _threshold(level: int) -> list[int]:
    return [255 if value > level else 0 for value in range(256)]


@lru_cache(maxsize=1)
def _textures() -> list[npt.NDArray[np.float32]]:
    """Clouds of several grains, of mean 0 and deviation 1, side `_TEXTURE_SIDE`."""
    noise = np.random.default_rng(0)
    textures = []
    for number in range(_TEXTURES):
        cells = _TEXTURE_SIDE // (2 << number % 5)
        coarse = Image.fromarray(noise.standard_normal((cells, cells)).astype(np.float32))
        texture = np.asarray(coarse.resize((_TEXTURE_SIDE, _TEXTURE_SIDE), Image.Resampling.BICUBIC))
        textures.append(texture / texture.std())
    return textures


def _worn(image: Image.Image, choose: random.Random, noise: np.random.Generator, wear: float) -> Image.Image:
    """Blurred, scanned at a low resolution, or compressed."""
    chance = choose.random()
    if chance < 0.25 * wear:
        image = image.filter(ImageFilter.GaussianBlur(choose.uniform(0.3, 0.035 * min(image.height, 40))))
    elif chance < 0.42 * wear:
        factor = choose.uniform(max(0.45, 14 / image.height) if image.height > 14 else 1.0, 1.0)
        small = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(
            small, choose.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX))
        )
        if choose.random() < 0.3:
            image = image.resize((round(small[0] / factor), round(small[1] / factor)), Image.Resampling.BILINEAR)
    elif chance < 0.52 * wear:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=choose.randint(15, 70))
        image = Image.open(buffer)
        image.load()
    return image
