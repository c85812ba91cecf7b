"""Answers in another language, and all that is none."""

import itertools
import random

import pytest

from vlm.data.builtin_text import Shop
from vlm.evaluation.languages import is_wrong_language, language

# One thing said in each: a bill that nobody has paid.
SENTENCES = {
    "de": "Wir haben die Rechnung für die neuen Stühle schon zweimal geschickt, aber niemand hat sie bisher bezahlt.",
    "en": "We have already sent the bill for the new chairs twice, but nobody has paid it so far.",
    "es": "Ya hemos enviado dos veces la factura de las sillas nuevas, pero nadie la ha pagado hasta ahora.",
    "fr": "Nous avons déjà envoyé deux fois la facture des nouvelles chaises, mais personne ne l'a payée jusqu'ici.",
    "it": "Abbiamo già mandato due volte il conto delle nuove sedie, ma nessuno lo ha ancora pagato.",
    "nl": "We hebben de rekening voor de nieuwe stoelen al twee keer gestuurd, maar niemand heeft die tot nu toe betaald.",
    "pt": "Já enviámos duas vezes a conta das cadeiras novas, mas ninguém a pagou até agora.",
}
ENGLISH, GERMAN = SENTENCES["en"], SENTENCES["de"]


def misread(text: str, share: float, rng: random.Random) -> str:
    return "".join(rng.choice("aceilmnorstuvéßü1. ") if rng.random() < share else char for char in text)


def test_each_language_against_each_other() -> None:
    for expected, found in itertools.permutations(SENTENCES, 2):
        assert language(SENTENCES[expected]) == expected
        assert is_wrong_language(SENTENCES[found], [SENTENCES[expected]]), (expected, found)


def test_an_answer_in_the_language_of_any_reference_is_none() -> None:
    question = "A dog and a cat are lying next to each other on the sofa."
    assert is_wrong_language(question, [GERMAN, SENTENCES["fr"]])
    assert not is_wrong_language(question, [GERMAN, ENGLISH])
    # One reference too short to tell could be in any language.
    assert not is_wrong_language(question, [GERMAN, "no"])


@pytest.mark.parametrize(
    "answer",
    [
        "Sofa",
        "die alte Katze",
        "wo ist das nun",  # German at first sight, and too short to be sure
        "KATZEN UND HUNDE SIND IN DIESEM HAUS NICHT ERLAUBT",  # signs and receipts: too little is sure without case
        "Hauptstraße 14, 80331 München, Deutschland",
        "Dr. Heinrich Müller, Maria Schneider, Anna von der Heide",
        "3 x Brötchen 1,20  2 x Kaffee 5,80  Summe 7,00  MwSt 19 %",
        "XJ-4821-KLQ 99812 AA-B12 Z77 IBAN DE89 3704 0044 0532 0130 00",
        '{"notiz": "bitte bis zum Ende der nächsten Woche bezahlen, danach wird es teurer"}',
        r"\text{wenn der Wert kleiner als null ist, dann gilt } x \leq \frac{1}{2}",
        "<table><tr><td>wenn der Wert kleiner als null ist, dann gilt das nicht</td></tr></table>",
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor",
        "Espresso, cappuccino, latte macchiato, croissant, brioche, baguette",
        "ibuprofen paracetamol amoxicillin diazepam omeprazole",
        "select name, price from items where total > 100 order by price desc",
        "猫が好きです。犬も好きです。",
    ],
)
def test_what_no_language_is_told_of(answer: str) -> None:
    for reference in SENTENCES.values():
        assert not is_wrong_language(answer, [reference])
        assert not is_wrong_language(reference, [answer])


def test_a_foreign_passage_of_a_document_is_not_in_another_language() -> None:
    document = f"{GERMAN} {GERMAN} {ENGLISH}"
    assert language(document) == "de"
    assert language(ENGLISH) == "en"
    assert not is_wrong_language(ENGLISH, [document])


def test_misreadings_are_not_in_another_language() -> None:
    rng = random.Random(0)
    for text, share in itertools.product(SENTENCES.values(), (0.05, 0.1, 0.2, 0.3, 0.5)):
        for _ in range(5):
            assert not is_wrong_language(misread(text, share, rng), [text])


def test_a_nearly_equal_sentence_is_taken_for_a_misreading() -> None:
    portuguese = "Uma fatura antiga contém muitos dados importantes do cliente."
    spanish = "Una factura antigua contiene muchos datos importantes del cliente."
    assert (language(portuguese), language(spanish)) == ("pt", "es")
    assert not is_wrong_language(portuguese, [spanish])
    assert is_wrong_language(portuguese, [SENTENCES["es"]])


def test_lines_of_the_builtin_data_are_never_in_another_language() -> None:
    rng = random.Random(0)
    lines = [Shop(number).line(rng) for number in range(80)]
    for line in lines:
        for other in rng.sample(lines, 10):
            assert not is_wrong_language(misread(line, 0.2, rng), [other])
    # Nor are whole receipts, each against another's misreading.
    receipts = ["\n".join(Shop(number).line(rng) for _ in range(20)) for number in range(20)]
    for receipt, other in itertools.permutations(receipts, 2):
        assert not is_wrong_language(misread(receipt, 0.1, rng), [other])
