"""Texts, typefaces and drawn lines."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vlm.errors import DataError
from vlm.pretrain.fonts import faces, package_folder
from vlm.pretrain.render import WIDEST, draw_face, draw_sample
from vlm.pretrain.text import KINDS, make_text
from vlm.pretrain.words import is_drawable, names


def test_figures_are_figures_and_come_only_when_asked_for() -> None:
    choose = random.Random(0)
    drawn = [make_text(choose, longest, "figures") for longest in (1, 5, 52) for _ in range(60)]
    assert all(text.isdecimal() for text in drawn)
    assert {len(text) for text in drawn[60:120]} == {1, 2, 3, 4, 5}
    assert sum(make_text(choose, 52).isdecimal() for _ in range(300)) < 30


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_short_enough_and_can_be_told_from_an_image(kind: str) -> None:
    choose = random.Random(0)
    texts = [make_text(choose, longest, kind) for longest in (1, 5, 52) for _ in range(60)]
    assert all(1 <= len(text) <= 52 for text in texts)
    # White space at the ends or in a row cannot be seen.
    assert all(text == " ".join(text.split()) for text in texts)
    assert all(is_drawable(text) for text in texts)
    assert len(set(texts[60:])) > 80  # of 120; a single character gives few


def test_names_have_letters_that_few_languages_have() -> None:
    letters = set("".join(names()))
    assert set("ąčďěğłňőřşțűžæøß") <= letters


def test_typefaces_of_the_built_in_dataset_are_not_among_these() -> None:
    families = [family[0].family for family, _ in faces()]
    assert len(families) == len(set(families)) == 20
    titles = {face.font(12).getname()[0] for family, _ in faces() for face in family}
    assert not [title for title in titles if title.startswith(("DejaVu", "STIX", "Bitstream Vera"))]


def test_weights_of_variable_fonts_differ() -> None:
    faces_of = {family[0].family: family for family, _ in faces()}
    light, _, bold = faces_of["Inconsolata"]
    assert bold.glyph(30, "n").coverage.sum() > 1.2 * light.glyph(30, "n").coverage.sum()


def test_a_face_without_a_character_is_not_drawn_with() -> None:
    face, text = draw_face(random.Random(0), "źdźbło")
    assert (face.covers("źdźbło"), text) == (True, "źdźbło")
    intuitive = next(family[0] for family, _ in faces() if family[0].family == "Intuitive")
    assert not intuitive.covers("ł")
    assert intuitive.covers("abc €")
    # No face at all has Hebrew: what remains is drawn.
    assert draw_face(random.Random(0), "שלום abc")[1] == "abc"


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"'no_such_fonts' is not installed.*\[pretrain\]"):
        package_folder("no_such_fonts")


def test_drawn_lines_hold_their_text_in_view() -> None:
    choose, noise = random.Random(1), np.random.default_rng(1)
    for longest, wear in ((4, 0.1), (52, 1.0)):
        for _ in range(40):
            image, text = draw_sample(choose, noise, longest=longest, wear=wear)
            assert image.mode == "L"
            assert 12 <= image.height <= 320
            assert image.width <= 1.4 * WIDEST
            assert all(0 < len(line) <= longest for line in text.split("\n"))
            assert np.ptp(np.asarray(image)) > 20, text  # there is something to see


def test_more_letters_take_more_room() -> None:
    def width(kind: str, longest: int) -> float:
        choose, noise = random.Random(2), np.random.default_rng(2)
        drawn = [draw_sample(choose, noise, longest=longest, wear=0.1, kind=kind) for _ in range(30)]
        return sum(image.width for image, _ in drawn) / sum(len(text) for _, text in drawn)

    # Pixels per character are those of a text of 20 to 30 pixels.
    assert 8 < width("words", 30) < 30


def test_chance_is_seeded() -> None:
    first, second = (draw_sample(random.Random(5), np.random.default_rng(5), longest=30, wear=1.0) for _ in range(2))
    assert first[1] == second[1]
    assert np.array_equal(np.asarray(first[0]), np.asarray(second[0]))
