r"""Chat template, image placeholders and tokens in one pass, with the spans of the assistant's words.

    messages --protect--> messages with private-use characters for control tokens that a person typed
             --render---> text                  "...<|im_start|>assistant\n" "The total is 7.<|im_end|>" "\n"
             --expand---> segments of text      one placeholder per run of media tokens
             --tokenise-> ids, then every run written out

The ids are those that the Hugging Face processor gives for the same conversation. A run of media tokens is written out
after tokenisation: the tokenizer cuts the text at such a token anyway, and a thousand copies of it cost a thousand
times as much to find as one.

Where the assistant's words are is read off prefixes of the rendered text: up to the words it equals the conversation
before them with a generation prompt, up to their end the conversation with them. So it works for every template that
renders a conversation from front to back, without a word about any single one. A template that writes no end behind an
answer, because the next turn's start is what ends it (`Family.answer_end`), gets that start behind a last answer, too:
a model that never sees its answers end would not learn to end them.

Most rows share their structure with the row before; `vlm.processing.skeleton` encodes those for a tenth of the cost. What it
cannot prove to come out the same takes the way above.

Imports neither torch nor transformers until an encoder is used.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError, ModelError
from vlm.families import Family, ImageLayout, Run
from vlm.processing.skeleton import TEMPLATE_ERRORS, Skeleton, Structure, cutting_tokens, make_skeleton, structure_of
from vlm.processing.time_limit import within

if TYPE_CHECKING:
    import tokenizers

# Stand-ins for control tokens in people's text while the template runs: one character each, so that no template can
# tear them apart, from a plane that only private fonts use.
_FIRST_SENTINEL, _LAST_SENTINEL = 0xF0000, 0xFFFFD
# A template takes less than a millisecond.
TEMPLATE_SECONDS = 20
# Structures remembered; chats of many lengths would otherwise pile up one skeleton per length.
_MAX_SKELETONS = 64
_SENTINEL_CLASS = f"[{chr(_FIRST_SENTINEL)}-{chr(_LAST_SENTINEL)}]"


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation.

    Attributes:
        input_ids: Token ids, image tokens written out.
        assistant_spans: Half-open ranges of positions in `input_ids`, in order: the assistant's words of each turn with
            the token that ends the turn, but no white space behind it.
        num_visual_tokens: How many of the ids are media tokens written for images and videos.
    """

    input_ids: list[int]
    assistant_spans: list[tuple[int, int]]
    num_visual_tokens: int


@dataclass(frozen=True)
class _Segment:
    text: str
    start: int
    plain: bool  # text of a person that must not become a control token


class ChatEncoder:
    """Encodes conversations with one tokenizer and chat template. Safe to use from several threads.

    Args:
        tokenizer: A transformers tokenizer with a `tokenizers` backend.
        chat_template: Jinja source.
        family: Row of the family table.
    """

    def __init__(self, tokenizer: Any, chat_template: str, family: Family) -> None:
        import tokenizers

        self._family = family
        self._chat_template = chat_template
        self._bos_token: str | None = tokenizer.bos_token
        self._template_variables = dict(tokenizer.special_tokens_map)
        serialised = tokenizer.backend_tokenizer.to_str()
        # An own copy: padding and truncation are state of a backend, which others may change while threads encode.
        self._backend = tokenizers.Tokenizer.from_str(serialised)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._serialised: str = serialised
        self._plain_backend: tokenizers.Tokenizer | None = None
        special = {
            token.content: id_
            for id_, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in family.markup_tokens
        }
        known = tokenizer.get_vocab()
        special |= {token: known[token] for token in family.media_tokens if token in known}
        self._control_ids = set(special.values())
        longest_first = sorted(special, key=lambda token: (-len(token), token))
        self._control_tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._control_or_sentinel = re.compile(f"{self._control_tokens.pattern}|{_SENTINEL_CLASS}")
        self._video_placeholder = family.video.placeholder if family.video is not None else None
        placeholder = "|".join(re.escape(text) for text in (family.image_placeholder, self._video_placeholder) if text)
        self._placeholder = re.compile(placeholder)
        self._placeholder_or_sentinel = re.compile(f"{placeholder}|{_SENTINEL_CLASS}")
        # A tokenizer that puts tokens of its own around the text does so once per text, not per section.
        self._cutting = cutting_tokens(self._backend) if self._backend.num_special_tokens_to_add(False) == 0 else {}
        self._skeletons: dict[Structure, Skeleton | None] = {}
        self._memo: dict[str, list[int]] = {}
        # Structures that the template has rendered in time; None, for those without one, is never among them.
        self._rendered: set[Structure | None] = set()

    def encode(
        self, messages: Sequence[Mapping[str, Any]], layouts: Sequence[ImageLayout], add_generation_prompt: bool
    ) -> Encoded:
        """Encodes one conversation.

        Args:
            messages: OpenAI-style messages; image parts are ``{"type": "image"}``.
            layouts: What stands for each image, in the order of the image parts.
            add_generation_prompt: End with the start of an assistant turn.

        Raises:
            DataError: The template refuses the conversation, does not render it from front to back, or writes another
                number of images than there are layouts.
        """
        return self._encode_by_skeleton(messages, layouts, add_generation_prompt) or self.encode_anew(
            messages, layouts, add_generation_prompt
        )

    def _encode_by_skeleton(
        self, messages: Sequence[Mapping[str, Any]], layouts: Sequence[ImageLayout], add_generation_prompt: bool
    ) -> Encoded | None:
        found = structure_of(messages, add_generation_prompt)
        if found is None or self._family.answer_end is not None:
            return None
        structure, texts = found
        search = self._control_tokens.search
        if any(search(text) for text in texts):
            return None
        counts = []
        for layout in layouts:
            if len(layout) != 1 or not isinstance(run := layout[0], Run) or run.token != self._family.image_placeholder:
                return None
            counts.append(run.count)
        if structure in self._skeletons:
            skeleton = self._skeletons[structure]
        elif len(self._skeletons) < _MAX_SKELETONS:
            skeleton = self._skeletons[structure] = self._make_skeleton(structure, messages)
        else:
            return None
        if skeleton is None or skeleton.num_images != len(counts):
            return None
        encoded = skeleton.encode(texts, counts, self._tokenise_section, self._memo)
        return None if encoded is None else Encoded(*encoded, sum(counts))

    def _make_skeleton(self, structure: Structure, messages: Sequence[Mapping[str, Any]]) -> Skeleton | None:
        try:
            return within(
                TEMPLATE_SECONDS,
                lambda: make_skeleton(
                    structure,
                    chat_template=self._chat_template,
                    variables=self._template_variables,
                    placeholder=self._family.image_placeholder,
                    cutting=self._cutting,
                    tokenise=self._tokenise_section,
                    render=self._render,
                ),
            )
        except TimeoutError as error:
            raise _too_slow(messages) from error

    def _tokenise_section(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_anew(
        self, messages: Sequence[Mapping[str, Any]], layouts: Sequence[ImageLayout], add_generation_prompt: bool
    ) -> Encoded:
        """Encodes one conversation without what was learnt from earlier ones: `encode` must give the same.

        Args and errors are those of `encode`.
        """
        messages, protected = self._protect(messages)
        text = self._render(messages, add_generation_prompt)
        turns = self._assistant_turns(messages, text, add_generation_prompt)
        if self._family.answer_end is not None:
            text, turns = _ended(text, turns, self._family.answer_end, not add_generation_prompt)
        segments, runs, turns = self._expand(text, turns, layouts, protected)
        ids, starts, ends = self._tokenise(segments)
        return _write_out(ids, starts, ends, turns, runs, self._backend.token_to_id)

    def encode_text(self, text: str, layouts: Sequence[ImageLayout]) -> Encoded:
        """Encodes text that a chat template has rendered already; control tokens in it count as such.

        Args:
            text: Rendered text with one placeholder per image.
            layouts: What stands for each image, in the order of the placeholders.

        Raises:
            DataError: The text has places for another number of images.
        """
        segments, runs, _ = self._expand(text, [], layouts, None)
        ids, starts, ends = self._tokenise(segments)
        return _write_out(ids, starts, ends, [], runs, self._backend.token_to_id)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as the chat template writes it, image placeholders not yet expanded.

        Raises:
            DataError: The template refuses the conversation.
            ModelError: The template takes too long.
        """
        return self._render(messages, add_generation_prompt)

    def _protect(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], list[str] | None]:
        """Puts one private-use character in place of each control token in people's text; None where there is none."""
        if not any(self._control_tokens.search(text) for message in messages for text in _texts(message)):
            return messages, None
        protected: list[str] = []

        def stand_in(match: re.Match[str]) -> str:
            if len(protected) > _LAST_SENTINEL - _FIRST_SENTINEL:
                raise DataError(
                    f"a conversation holds more than {len(protected)} control tokens such as {match[0]!r} as text; remove them"
                )
            protected.append(match[0])
            return chr(_FIRST_SENTINEL + len(protected) - 1)

        return [
            _map_texts(message, lambda text: self._control_or_sentinel.sub(stand_in, text)) for message in messages
        ], protected

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        def render() -> Any:
            return render_jinja_template(
                conversations=[messages],  # type: ignore[list-item]
                chat_template=self._chat_template,
                add_generation_prompt=add_generation_prompt,
                **self._template_variables,
            )

        found = structure_of(messages, add_generation_prompt)
        structure = None if found is None else found[0]
        try:
            if structure in self._rendered:
                rendered = render()
            else:
                rendered = within(TEMPLATE_SECONDS, render)
                if structure is not None and len(self._rendered) < _MAX_SKELETONS:
                    self._rendered.add(structure)
        except TimeoutError as error:
            raise _too_slow(messages) from error
        except (jinja2.TemplateError, *TEMPLATE_ERRORS) as error:
            roles = ", ".join(str(message.get("role")) for message in messages[:6])
            raise DataError(
                f"the model's chat template refuses a conversation with the roles [{roles}]: {str(error) or type(error).__name__};"
                " change the conversation to what the template takes"
            ) from error
        return str(rendered[0][0])

    def _assistant_turns(
        self, messages: Sequence[Mapping[str, Any]], text: str, add_generation_prompt: bool
    ) -> list[tuple[int, int]]:
        """Ranges of characters of `text` with the assistant's words."""
        turns = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:index], True)
            last = index == len(messages) - 1 and not add_generation_prompt
            through = text if last else self._render(messages[: index + 1], False)
            if not text.startswith(through) or not through.startswith(before):
                raise DataError(
                    f"the model's chat template does not render message {index + 1} of {len(messages)} the same with and without"
                    " what follows (or writes no generation prompt before it), so the assistant's words cannot be found;"
                    " split the conversation so that it has one assistant turn, at its end, or change the template"
                )
            turns.append((len(before), len(before) + len(through[len(before) :].rstrip())))
        return turns

    def _expand(
        self,
        text: str,
        turns: list[tuple[int, int]],
        layouts: Sequence[ImageLayout],
        protected: list[str] | None,
    ) -> tuple[list[_Segment], list[Run], list[tuple[int, int]]]:
        """Puts layouts and protected text in their places; moves the turns accordingly."""
        segments: list[_Segment] = []
        runs: list[Run] = []
        current: list[str] = []
        start = length = position = num_images = 0
        moved_at, moved_by = [0], [0]  # characters from moved_at[i] on lie moved_by[i] further right
        pattern = self._placeholder if protected is None else self._placeholder_or_sentinel

        def close(text_of_segment: str, plain: bool) -> None:
            nonlocal start
            if text_of_segment:
                segments.append(_Segment(text_of_segment, start, plain))
                start += len(text_of_segment)

        for match in pattern.finditer(text):
            between = text[position : match.start()]
            current.append(between)
            length += len(between)
            position = match.end()
            if protected is not None and match[0] not in (self._family.image_placeholder, self._video_placeholder):
                close("".join(current), False)
                current = []
                written = protected[ord(match[0]) - _FIRST_SENTINEL]
                close(written, True)
            else:
                layout = layouts[num_images] if num_images < len(layouts) else ()
                num_images += 1
                self._check_kind(match[0], layout)
                written = "".join(piece.token if isinstance(piece, Run) else piece for piece in layout)
                runs.extend(piece for piece in layout if isinstance(piece, Run))
                current.append(written)
            length += len(written)
            moved_at.append(position)
            moved_by.append(length - position)
        current.append(text[position:])
        close("".join(current), False)
        if num_images != len(layouts):
            raise DataError(
                f"the rendered conversation has places for {num_images} images but {len(layouts)} images came with it;"
                " give one image part per image (and one video part per video, which count here)"
            )

        def moved(character: int) -> int:
            return character + moved_by[bisect.bisect_right(moved_at, character) - 1]

        moved_turns = [(moved(first), moved(last)) for first, last in turns]
        if self._family.cut_before_answers:
            segments = [piece for segment in segments for piece in _cut(segment, [first for first, _ in moved_turns])]
        return segments, runs, moved_turns

    def _check_kind(self, placeholder: str, layout: ImageLayout) -> None:
        first = next((piece.token for piece in layout if isinstance(piece, Run)), None)
        if self._video_placeholder is None or first is None:
            return
        if (placeholder == self._video_placeholder) != (first == self._video_placeholder):
            raise DataError(
                f"the rendered conversation has {placeholder!r} where {first!r} belongs, so images and videos would change"
                " places; give them in the order of their parts"
            )

    def _tokenise(self, segments: Sequence[_Segment]) -> tuple[list[int], list[int], list[int]]:
        """Ids of all segments, and for each id the range of characters that it covers."""
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        for index, segment in enumerate(segments):
            # As in transformers: the tokenizer adds its own special tokens unless the template has written them.
            special = index == 0 and not (self._bos_token and segment.text.startswith(self._bos_token))
            if segment.plain:
                encoding = self._plain().encode(segment.text, add_special_tokens=False)
                forbidden = self._control_ids.intersection(encoding.ids)
                if forbidden:
                    raise DataError(
                        f"the text {segment.text!r} always becomes control token {min(forbidden)}; remove it from the row"
                    )
            else:
                encoding = self._backend.encode(segment.text, add_special_tokens=special)
            ids += encoding.ids
            for first, last in encoding.offsets:
                starts.append(first + segment.start)
                ends.append(last + segment.start)
        return ids, starts, ends

    def _plain(self) -> tokenizers.Tokenizer:
        """A tokenizer that knows no added tokens. Two threads may build it at once; both copies are the same."""
        if self._plain_backend is None:
            import tokenizers

            description = json.loads(self._serialised)
            description["added_tokens"] = []
            description["post_processor"] = None
            description["padding"] = description["truncation"] = None
            self._plain_backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        return self._plain_backend


def _too_slow(messages: Sequence[Mapping[str, Any]]) -> ModelError:
    return ModelError(
        f"the model's chat template has not rendered a conversation of {len(messages)} messages after {TEMPLATE_SECONDS}"
        " seconds; look at its loops, or take the template from a source that you trust"
    )


def _ended(
    text: str, turns: Sequence[tuple[int, int]], answer_end: str, at_its_end: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Moves the end of each turn behind the token that ends it; writes that token where the text ends with a turn.

    Args:
        text: Rendered conversation.
        turns: Ranges of characters with the assistant's words.
        answer_end: The token.
        at_its_end: Whether the text may be ended.
    """
    if at_its_end and turns and not text[turns[-1][1] :].strip() and not text.rstrip().endswith(answer_end):
        text += answer_end
    pattern = re.compile(rf"\s*{re.escape(answer_end)}")
    ends = [match.end() if (match := pattern.match(text, last)) else last for _, last in turns]
    return text, [(first, end) for (first, _), end in zip(turns, ends, strict=True)]


def _cut(segment: _Segment, places: Sequence[int]) -> list[_Segment]:
    """A segment in pieces, cut at those of some places that lie inside it."""
    end = segment.start + len(segment.text)
    bounds = [segment.start, *(place for place in places if segment.start < place < end), end]
    return [
        _Segment(segment.text[first - segment.start : last - segment.start], first, segment.plain)
        for first, last in itertools.pairwise(bounds)
    ]


def _write_out(
    ids: list[int],
    starts: list[int],
    ends: list[int],
    turns: Sequence[tuple[int, int]],
    runs: Sequence[Run],
    token_to_id: Any,
) -> Encoded:
    """Repeats each run's token and turns ranges of characters into ranges of tokens.

    A token belongs to a turn if it holds at least one of its characters.
    """
    # Tokens that a post-processor adds have the empty range (0, 0) wherever they stand; keep the order for bisection.
    starts = list(itertools.accumulate(starts, max))
    ends = list(itertools.accumulate(ends, max))
    token_spans = [(bisect.bisect_right(ends, first), bisect.bisect_left(starts, last)) for first, last in turns]
    if not runs:
        return Encoded(ids, token_spans, 0)
    run_ids = [token_to_id(run.token) for run in runs]
    wanted = frozenset(run_ids)
    written: list[int] = []
    new_position = []
    next_run = num_visual_tokens = 0
    for id_ in ids:
        new_position.append(len(written))
        if id_ in wanted:
            assert id_ == run_ids[next_run], "media tokens come in the order of the runs"
            written += [id_] * runs[next_run].count
            num_visual_tokens += runs[next_run].count
            next_run += 1
        else:
            written.append(id_)
    assert next_run == len(runs), "every run has its token in the text"
    new_position.append(len(written))
    return Encoded(
        written, [(new_position[first], new_position[last]) for first, last in token_spans], num_visual_tokens
    )


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if isinstance(part.get("text"), str)]


def _map_texts(message: Mapping[str, Any], change: Any) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = [
        {**part, "text": change(part["text"])} if isinstance(part.get("text"), str) else part for part in content or ()
    ]
    return {**message, "content": parts}
