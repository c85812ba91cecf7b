r"""What all conversations of one structure have in common, so that a row costs a few string joins and one tokenisation.

    structure: roles, kinds of parts, generation prompt or not      (no word of any text)
    rendered once with opaque texts:  <|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>◊<|im_end|>\n…◊<|im_end|>\n
    cut where a control token starts: sections; those without a text ◊ are tokenised once

Two things make this exact and not just likely:

- The template gets texts that it can write out and nothing else. Whoever trims, measures, compares or searches one ends
  the attempt (`_Opaque`), and templates with constructs through which a text could slip away (macros, joins, most filters
  and calls) are not attempted at all (`_is_transparent`). What such a template renders is the same for all texts but for
  the texts themselves.
- The tokenizer itself cuts at control tokens before it does anything else, so sections that start with one are tokenised
  alike on their own. Only tokens with which nothing else can overlap or take white space count (`cutting_tokens`).

Everything else is encoded as `ChatEncoder` always does. jinja2 is imported when a skeleton is made.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.errors import DataError

# One character per text, from a plane of private characters that no template contains (checked).
_FIRST_MARK, _LAST_MARK = 0x10F000, 0x10F8FF
_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")

# What a template raises besides jinja2's own errors. It is a program: it may divide by zero, call itself without end, or
# multiply a text by a billion.
TEMPLATE_ERRORS = (TypeError, LookupError, ValueError, ArithmeticError, AttributeError, RecursionError, MemoryError)

Structure = tuple[Any, ...]
# Tokenises a section: ids, and for each id the range of characters that it covers.
Tokenise = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]


def structure_of(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> tuple[Structure, list[str]] | None:
    """A conversation without its texts, and the texts in order; None where it has fields that only a template may judge."""
    shape: list[Any] = [add_generation_prompt]
    texts: list[str] = []
    for message in messages:
        content = message.get("content")
        if len(message) != 2 or type(message.get("role")) is not str:
            return None
        shape.append(message["role"])
        if type(content) is str:
            shape.append("text")
            texts.append(content)
            continue
        if type(content) is not list:
            return None
        kinds = 1  # its bits: one that ends the number, then a bit per part, 1 for a text
        for part in content:
            text = part.get("text")
            if type(text) is str and len(part) == 2 and part.get("type") == "text":
                texts.append(text)
                kinds = 2 * kinds + 1
            elif len(part) == 1 and part.get("type") == "image":
                kinds *= 2
            else:
                return None
        shape.append(kinds)
    return tuple(shape), texts


def cutting_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens at whose start a `tokenizers.Tokenizer` always cuts the text, whatever stands before and behind them."""
    added = tokenizer.get_added_tokens_decoder()
    strings = [token.content for token in added.values()]

    def covers_start(other: str, token: str) -> bool:
        """Whether `other` can match from before the start of `token` into it, or is longer from the same start."""
        return token in other or any(other.endswith(token[:length]) for length in range(1, len(token)))

    return {
        token.content: id_
        for id_, token in added.items()
        if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        and not any(character.isalnum() or character.isspace() or character == "_" for character in token.content[:1])
        and not any(covers_start(other, token.content) for other in strings if other != token.content)
        and not any(token.content.endswith(token.content[:length]) for length in range(1, len(token.content)))
    }


@dataclass(frozen=True)
class _Bound:
    """An end of an assistant's turn inside a section.

    Attributes:
        position: Literal characters of the section before it.
        texts: Numbers of the texts of the section before it.
        is_start: Whether it starts the turn.
    """

    position: int
    texts: tuple[int, ...]
    is_start: bool


@dataclass(frozen=True)
class _Section:
    """Text from one cut to the next.

    Attributes:
        pieces: Literal, text number, literal, text number, …, literal.
        bounds: Ends of turns in it, in order.
        is_image: Whether its first token stands for an image and is written out.
        ids: Token ids, if it has no texts.
        counts: Tokens before each bound, if it has no texts.
    """

    pieces: tuple[Any, ...]
    bounds: tuple[_Bound, ...]
    is_image: bool
    ids: list[int] | None = None
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Skeleton:
    """Encodes conversations of one structure.

    Attributes:
        sections: The rendered text, cut.
        num_images: Number of image parts.
        placeholder: What the template writes for an image.
        image_id: Token that stands for images.
    """

    sections: tuple[_Section, ...]
    num_images: int
    placeholder: str
    image_id: int

    def encode(
        self,
        texts: Sequence[str],
        image_counts: Sequence[int],
        tokenise: Tokenise,
        memo: dict[str, list[int]],
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Ids and the assistant's token spans; None where texts make up another image placeholder with what is around them.

        Args:
            texts: Texts in the order of `structure_of`; none of them holds a control token.
            image_counts: Tokens per image.
            tokenise: The tokenizer, adding nothing of its own.
            memo: Ids of earlier sections, such as the same prompt; grows.
        """
        ids: list[int] = []
        edges: list[int] = []
        image = 0
        for section in self.sections:
            section_ids, counts = section.ids, section.counts
            if section_ids is None:
                text = "".join([piece if type(piece) is str else texts[piece] for piece in section.pieces])
                if text.find(self.placeholder, section.is_image) >= 0:
                    return None
                section_ids, counts = _tokens(section, text, texts, tokenise, memo)
            base = len(ids)
            if section.is_image:
                count = image_counts[image]
                image += 1
                ids += [self.image_id] * count
                ids += section_ids[1:]
                edges += [base + number + count - 1 if number else base for number in counts]
            else:
                ids += section_ids
                if counts:
                    edges += [base + number for number in counts]
        return ids, list(zip(edges[::2], edges[1::2], strict=True))


_MEMO_ENTRIES, _MEMO_CHARACTERS = 256, 2048


def _tokens(
    section: _Section, text: str, texts: Sequence[str], tokenise: Tokenise, memo: dict[str, list[int]]
) -> tuple[list[int], tuple[int, ...]]:
    if not section.bounds:
        known = memo.get(text)
        if known is None:
            known = tokenise(text)[0]
            if len(text) <= _MEMO_CHARACTERS:
                if len(memo) >= _MEMO_ENTRIES:
                    memo.clear()
                memo[text] = known
        return known, ()
    ids, offsets = tokenise(text)
    counts = []
    for bound in section.bounds:
        position = bound.position + sum(len(texts[number]) for number in bound.texts)
        # A token belongs to a turn if it holds at least one of its characters.
        side, least = (1, position + 1) if bound.is_start else (0, position)
        counts.append(next((index for index, ends in enumerate(offsets) if ends[side] >= least), len(offsets)))
    return ids, tuple(counts)


def make_skeleton(
    structure: Structure,
    *,
    chat_template: str,
    variables: Mapping[str, Any],
    placeholder: str,
    cutting: Mapping[str, int],
    tokenise: Tokenise,
    render: Render,
) -> Skeleton | None:
    """The skeleton of a structure; None if the template or the tokenizer does not allow one.

    Args:
        structure: From `structure_of`.
        chat_template: Jinja source.
        variables: What the template sees beside the conversation.
        placeholder: What the template writes for an image.
        cutting: From `cutting_tokens`.
        tokenise: The tokenizer, adding nothing of its own.
        render: transformers' rendering, which ours must equal.
    """
    import jinja2

    add_generation_prompt, *_ = structure
    messages = _with_texts(structure, lambda number: _Opaque(chr(_FIRST_MARK + number)))
    if placeholder not in cutting or messages is None or _MARK.search(chat_template):
        return None
    template = _compile(chat_template)
    if template is None:
        return None
    plain = _with_texts(structure, lambda number: f" Probe {number} ")
    try:
        marked = _marked(template, messages, add_generation_prompt, variables)
        turns = _turns(template, messages, marked, add_generation_prompt, variables)
        rendered = render(plain or (), add_generation_prompt)
    except (_LookedAtError, jinja2.TemplateError, DataError, *TEMPLATE_ERRORS):
        return None  # the ordinary way renders it, or says what is wrong with the conversation
    if turns is None or rendered != _MARK.sub(lambda match: f" Probe {ord(match[0]) - _FIRST_MARK} ", marked):
        return None
    sections = _cut(marked, turns, placeholder, cutting, tokenise)
    if any(
        section.is_image and (section.ids or [cutting[placeholder]])[0] != cutting[placeholder] for section in sections
    ):
        return None
    num_images = sum(section.is_image for section in sections)
    return Skeleton(_merged(sections), num_images, placeholder, cutting[placeholder])


def _with_texts(structure: Structure, text_of: Callable[[int], str]) -> list[dict[str, Any]] | None:
    """Messages of a structure with made-up texts; None if it has more texts than there are marks."""
    numbers = itertools.count()
    messages: list[dict[str, Any]] = []
    for role, kinds in zip(structure[1::2], structure[2::2], strict=True):
        if kinds == "text":
            messages.append({"role": role, "content": text_of(next(numbers))})
            continue
        parts = [
            {"type": "text", "text": text_of(next(numbers))} if bit == "1" else {"type": "image"}
            for bit in f"{kinds:b}"[1:]
        ]
        messages.append({"role": role, "content": parts})
    return messages if next(numbers) <= _LAST_MARK - _FIRST_MARK else None


class _LookedAtError(Exception):
    """The template did something with a text other than to write it."""


class _Opaque(str):
    """A text that can be written and added to other text; everything else ends the attempt."""

    __slots__ = ()

    def __str__(self) -> str:
        return str.__str__(self)

    def __add__(self, other: str) -> _Opaque:
        return _Opaque(str.__add__(self, other))

    def __radd__(self, other: str) -> _Opaque:
        return _Opaque(str.__add__(other, self))


def _refuse(*_: Any, **__: Any) -> Any:
    raise _LookedAtError


_NEEDED = {name for name in dir(object) if name not in ("__eq__", "__ne__", "__hash__", "__format__", "__repr__")}
for _name in {*dir(str), "__bool__"} - (_NEEDED - {"__lt__", "__le__", "__gt__", "__ge__"}) - {"__add__"}:
    setattr(_Opaque, _name, _refuse)


def _compile(chat_template: str) -> Any:
    """The template in an environment like transformers', if texts cannot slip away in it; else None."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(chat_template) if _is_transparent(environment.parse(chat_template)) else None
    except (jinja2.TemplateError, *TEMPLATE_ERRORS):
        return None  # a tag of transformers' own, or an error that the ordinary way reports


_NODES = [
    "Template",
    "Output",
    "TemplateData",
    "For",
    "If",
    "CondExpr",
    "Assign",
    "NSRef",
    "Name",
    "Const",
    "Getattr",
    "Getitem",
    "Slice",
    "Compare",
    "Operand",
    "And",
    "Or",
    "Not",
    "Add",
    "Sub",
    "Mod",
    "Neg",
    "Call",
    "Keyword",
    "Test",
    "Filter",
    "List",
    "Tuple",
    "Break",
    "Continue",
]
_CALLS = ("namespace", "raise_exception")
_TESTS = (
    "string",
    "defined",
    "undefined",
    "none",
    "mapping",
    "iterable",
    "sequence",
    "number",
    "boolean",
    "true",
    "false",
)
_FILTERS = ("trim", "length", "default", "first", "last")


def _is_transparent(tree: Any) -> bool:
    """Whether the template is made of constructs only that write an `_Opaque`, pass it on, or wake it."""
    from jinja2 import nodes

    for node in tree.find_all(nodes.Node):
        if type(node).__name__ not in _NODES:
            return False
        if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Name) and node.node.name in _CALLS):
            return False
        if isinstance(node, nodes.Test) and node.name not in _TESTS:
            return False
        if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
            return False
        # '…' % (text, ) writes the text into an ordinary string; numbers may be divided.
        if isinstance(node, nodes.Mod) and not (isinstance(node.right, nodes.Const) and type(node.right.value) is int):
            return False
    return True


def _marked(
    template: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    return str(
        template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
        )
    )


def _turns(
    template: Any,
    messages: Sequence[Mapping[str, Any]],
    marked: str,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> list[tuple[int, int]] | None:
    """The assistant's words as positions in the marked text, by the same prefixes as in `ChatEncoder`."""
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _marked(template, messages[:index], True, variables)
        last = index == len(messages) - 1 and not add_generation_prompt
        through = marked if last else _marked(template, messages[: index + 1], False, variables)
        words = through[len(before) :].rstrip()
        # Where a turn ends with a text, the white space at its end decides where the words end.
        if not marked.startswith(through) or not through.startswith(before) or not words or _MARK.match(words[-1]):
            return None
        turns.append((len(before), len(before) + len(words)))
    return turns


def _cut(
    marked: str,
    turns: Sequence[tuple[int, int]],
    placeholder: str,
    cutting: Mapping[str, int],
    tokenise: Tokenise,
) -> list[_Section]:
    pattern = re.compile("|".join(re.escape(token) for token in sorted(cutting, key=len, reverse=True)))
    cuts = [match.start() for match in pattern.finditer(marked)]
    edges = [*([0] if not cuts or cuts[0] else []), *cuts, len(marked)]
    sections = []
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        # A turn that starts at a cut starts in the section behind it, one that ends there ends in the one before.
        behind = end if index < len(edges) - 2 else end + 1
        bounds = [
            _bound(marked[start:position], is_start)
            for turn in turns
            for position, is_start in zip(turn, (True, False), strict=True)
            if (start <= position < behind if is_start else start < position <= end)
        ]
        text = marked[start:end]
        pieces = [
            ord(piece) - _FIRST_MARK if _MARK.fullmatch(piece) else piece
            for piece in re.split(f"({_MARK.pattern})", text)
        ]
        section = _Section(tuple(pieces), tuple(bounds), text.startswith(placeholder))
        if len(pieces) == 1:
            ids, counts = _tokens(section, text, (), tokenise, {})
            section = _Section(section.pieces, section.bounds, section.is_image, ids, counts)
        sections.append(section)
    return sections


def _bound(before: str, is_start: bool) -> _Bound:
    texts = tuple(ord(mark) - _FIRST_MARK for mark in _MARK.findall(before))
    return _Bound(len(before) - len(texts), texts, is_start)


def _merged(sections: Sequence[_Section]) -> tuple[_Section, ...]:
    """Neighbours without texts and images become one."""
    merged: list[_Section] = []
    for section in sections:
        last = merged[-1] if merged else None
        if last is not None and last.ids is not None and section.ids is not None and not section.is_image:
            counts = (*last.counts, *(len(last.ids) + count for count in section.counts))
            merged[-1] = _Section(last.pieces, last.bounds, last.is_image, last.ids + section.ids, counts)
        else:
            merged.append(section)
    return tuple(merged)
