"""Typefaces of the pretraining: text faces from font packages on PyPI.

All are under the SIL Open Font License, Apache 2.0 or the Ubuntu Font Licence.
None of them ships with matplotlib: those draw the built-in dataset, and stay unseen until a fine-tuning.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ImageFont

from vlm.errors import DataError

# Family, module of the package, files (patterns below the package) or submodules, how often it is drawn.
_FAMILIES: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
    ("Roboto", "font_roboto", ("files/*.ttf",), 1.0),
    ("Source Sans", "font_source_sans_pro", ("files/*.ttf",), 1.0),
    ("Source Serif", "font_source_serif_pro", ("files/*.ttf",), 1.5),
    ("Caladea", "font_caladea", ("files/*.ttf",), 1.5),
    ("Hanken Grotesk", "font_hanken_grotesk", ("files/*.otf",), 1.0),
    ("Manrope", "font_manrope", ("files/Manrope-[!V]*.ttf",), 0.7),
    ("Fredoka", "font_fredoka_one", ("files/*.ttf",), 0.3),
    ("Intuitive", "font_intuitive", ("files/*.ttf",), 0.5),
    ("Open Sans", "fontpkg_open_sans", ("files/*.ttf",), 1.0),
    ("Inter", "fontpkg_inter", ("files/*.ttf",), 1.0),
    ("Inconsolata", "fontpkg_inconsolata", ("files/*.ttf",), 1.5),
    ("Caveat", "fontpkg_caveat", ("files/*.ttf",), 0.8),
    ("Dancing Script", "fontpkg_dancing_script", ("files/*.ttf",), 0.8),
    ("FiraGO", "pymupdf_fonts", ("FiraGO_*",), 1.0),
    ("Fira Mono", "pymupdf_fonts", ("FiraMono_*",), 1.0),
    ("Noto Sans", "pymupdf_fonts", ("NotoSans_*",), 1.0),
    ("Space Mono", "pymupdf_fonts", ("SpaceMono_*",), 1.0),
    ("Ubuntu", "pymupdf_fonts", ("Ubuntu_*",), 1.0),
    ("Ubuntu Mono", "pymupdf_fonts", ("UbuntuMono_*",), 1.0),
    ("Cascadia Mono", "pymupdf_fonts", ("CascadiaMono_*",), 1.0),
)
# Hairlines vanish at the sizes of text lines.
_TOO_THIN = ("Thin", "ExtraLight")
# Points in the weight axis of a variable font.
_WEIGHTS = (400, 550, 700)
_ABSENT = "\U0010fffe"


@dataclass(frozen=True, eq=False)
class Glyph:
    """A drawn character.

    Attributes:
        coverage: How much of each pixel is covered, uint8 array of shape [height, width].
        left: Columns from the pen to the array.
        top: Rows from the baseline to the array's first row; negative above it.
        advance: Pixels that the pen moves on.
    """

    coverage: npt.NDArray[np.uint8]
    left: int
    top: int
    advance: float


@dataclass(eq=False)
class Face:
    """One weight and slope of a family.

    Attributes:
        family: Name of the family.
        content: The font file.
        axes: Position on the axes of a variable font; None for a static one.
    """

    family: str
    content: bytes
    axes: tuple[float, ...] | None = None
    _fonts: dict[int, ImageFont.FreeTypeFont] = field(default_factory=dict, repr=False)
    _glyphs: dict[tuple[int, str], Glyph] = field(default_factory=dict, repr=False)
    _known: dict[str, bool] = field(default_factory=dict, repr=False)

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        """The face at a size in pixels, without ligatures or kerning tables of other layout engines."""
        font = self._fonts.get(size)
        if font is None:
            font = ImageFont.truetype(io.BytesIO(self.content), size, layout_engine=ImageFont.Layout.BASIC)
            if self.axes is not None:
                font.set_variation_by_axes(list(self.axes))
            self._fonts[size] = font
        return font

    def glyph(self, size: int, character: str) -> Glyph:
        """One character, drawn once and then kept: outlines cost most of what a line costs."""
        glyph = self._glyphs.get((size, character))
        if glyph is None:
            font = self.font(size)
            mask, (left, top) = font.getmask2(character, anchor="ls")
            coverage = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1])
            glyph = Glyph(coverage, left, top, font.getlength(character))
            self._glyphs[size, character] = glyph
        return glyph

    def covers(self, text: str) -> bool:
        """Whether the face has a glyph for every character."""
        return all(self._has(character) for character in set(text))

    def _has(self, character: str) -> bool:
        known = self._known.get(character)
        if known is None:
            font = self.font(24)
            known = character == " " or bytes(font.getmask(character)) != bytes(font.getmask(_ABSENT))
            self._known[character] = known
        return known


@lru_cache(maxsize=1)
def faces() -> tuple[tuple[tuple[Face, ...], float], ...]:
    """All faces by family, with how often the family is drawn.

    Raises:
        DataError: A font package is not installed.
    """
    return tuple((tuple(_faces_of(*family[:3])), family[3]) for family in _FAMILIES)


def _faces_of(family: str, module: str, patterns: tuple[str, ...]) -> Iterator[Face]:
    folder = package_folder(module)
    contents: list[bytes] = []
    for pattern in patterns:
        if pattern.endswith("_*"):
            for path in sorted(folder.glob(f"{pattern}.py")):
                buffer: Any = importlib.import_module(f"{module}.{path.stem}").fontbuffer
                contents.append(bytes(buffer))
        else:
            contents += [
                path.read_bytes()
                for path in sorted(folder.glob(pattern))
                if not any(thin in path.name for thin in _TOO_THIN)
            ]
    if not contents:
        raise DataError(f"the package {module!r} has no fonts {patterns[0]!r}; install the versions of constraints.txt")
    for content in contents:
        font = ImageFont.truetype(io.BytesIO(content), 16, layout_engine=ImageFont.Layout.BASIC)
        try:
            axes = font.get_variation_axes()
        except OSError:
            yield Face(family, content)
            continue
        for weight in _WEIGHTS:
            yield Face(family, content, tuple(_on_axis(axis, weight) for axis in axes))


def _on_axis(axis: Any, weight: int) -> float:
    """A place on one axis of a variable font: the weight on its axis, and the default on all others."""
    if b"eight" not in (axis["name"] or b""):
        return float(axis["default"])
    return float(min(max(weight, axis["minimum"]), axis["maximum"]))


def package_folder(module: str) -> Path:
    """Folder of an installed package.

    Raises:
        DataError: It is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the pretraining draws with fonts and words from packages, of which {module!r} is not installed; install the"
            " extra: pip install -c constraints.txt 'vision-finetune[pretrain]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))
