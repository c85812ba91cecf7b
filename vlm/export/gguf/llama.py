"""Both GGUF files in llama.cpp itself, through the package llama_cpp: what its users get from an export. Loads llama_cpp.

A conversation goes in as llama.cpp takes one: rendered text with a mark in the place of each image, which llama.cpp cuts
into tokens and images by itself. Its tokens must be those that the model was trained with; then the text is decoded
token by token of the training's own, and images are encoded from the pixels of the prepared row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm.errors import ExportError
from vlm.export.gguf.metadata import puts_bos
from vlm.families.gguf import GgufLayout
from vlm.processing import Processing

# Stands for an image in text that is handed over; nobody writes private-use characters.
_MARK = "\ue000image\ue000"
# Images were resized when the dataset was prepared, within limits of its own.
_MAX_IMAGE_TOKENS = 2**16
_BATCH_TOKENS = 512
# ggml's number of errors among its log levels.
_ERROR = 4
# Held-out rows need not have what tokenizers differ in: groups of digits, capitals within words, contractions, runs of
# white space and of signs.
_TEXT = "Total: 1234567.89 EUR\n\n  iPhone and HTMLParser don't, WE'LL see\t(x+1)^2 //\r\n \n{caf\u00e9}  \u6771\u4eac 2026-11-23..."


class LlamaCpp:
    """A language model and its mmproj file, loaded, computing in float32 where llama.cpp lets one choose.

    Args:
        export_dir: Folder with both files.
        layout: Of the family.
        processing: The model's processor.
        context_length_tokens: Longest sequence that will be asked for.
        device: ``cpu`` or ``cuda``; a llama_cpp that was built without CUDA stays on the CPU.

    Raises:
        ExportError: llama.cpp refuses a file, in its own words.
    """

    def __init__(
        self, export_dir: Path, layout: GgufLayout, processing: Processing, context_length_tokens: int, device: str
    ) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._llama, self._mtmd = llama_cpp, mtmd_cpp
        self._layout, self._processing = layout, processing
        self._errors: list[str] = []
        self._on_log = llama_cpp.llama_log_callback(self._log)
        nothing = ctypes.c_void_p(0)
        llama_cpp.llama_log_set(self._on_log, nothing)
        mtmd_cpp.mtmd_helper_log_set(self._on_log, nothing)
        paths = {part: next(export_dir.glob(f"{part}-*.gguf")) for part in ("model", "mmproj")}
        on_gpu = device == "cuda"
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = -1 if on_gpu else 0
        self._model = self._loaded(
            paths["model"], llama_cpp.llama_model_load_from_file(str(paths["model"]).encode(), model_settings)
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = context_length_tokens
        settings.n_batch = settings.n_ubatch = _BATCH_TOKENS
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Its threads wait for each other in busy loops, so there must not be more than torch was given.
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.offload_kqv = settings.op_offload = on_gpu
        self._context = self._loaded(paths["model"], llama_cpp.llama_init_from_model(self._model, settings))
        images = mtmd_cpp.mtmd_context_params_default()
        images.use_gpu = on_gpu
        images.warmup = False
        images.print_timings = False
        images.n_threads = torch.get_num_threads()
        images.media_marker = _MARK.encode()
        images.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        images.image_min_tokens, images.image_max_tokens = 1, _MAX_IMAGE_TOKENS
        self._vision = self._loaded(
            paths["mmproj"], mtmd_cpp.mtmd_init_from_file(str(paths["mmproj"]).encode(), self._model, images)
        )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self._check_tokenizer()

    def close(self) -> None:
        """Frees everything."""
        self._mtmd.mtmd_free(self._vision)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def logits(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[np.ndarray],
        ids: Sequence[int],
        start: int,
        *,
        add_generation_prompt: bool = False,
    ) -> tuple[torch.Tensor, int]:
        """Logits behind each token of a conversation from one on; the cache then holds the conversation.

        Args:
            messages: The conversation.
            images: Its images, uint8 of shape [height, width, 3], at target size.
            ids: Its token ids as the model was trained with them, or their beginning.
            start: The first token whose logits are wanted, behind the last image.
            add_generation_prompt: Whether `ids` end with the start of an answer that is not in `messages`.

        Returns:
            Tensor of shape [tokens from start on, vocabulary], float32, and the next position.

        Raises:
            ExportError: llama.cpp cuts the conversation into other tokens, or fails.
        """
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        position = at = 0
        with self._tokenised(messages, images, add_generation_prompt) as chunks:
            self._check_tokens(chunks, messages, images, add_generation_prompt)
            for chunk in chunks:
                if self._mtmd.mtmd_input_chunk_get_type(chunk) == self._mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    continue
                begin = list(ids).index(self._processing.image_token_id, at)
                _, position = self._decode(ids[at:begin], position, begin - at)
                position = self._decode_image(chunk, position)
                at = begin + self._mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if at > start or self._processing.image_token_id in ids[at:]:
                raise ExportError(
                    f"llama.cpp makes {at} tokens of a conversation's beginning up to its last image, the model was trained"
                    f" with another number; please report this with the model's name (images of shapes"
                    f" {[list(image.shape) for image in images]})"
                )
            found, position = self._decode(ids[at:], position, start - at)
        return torch.from_numpy(np.stack(found)), position

    def answer(self, messages: Sequence[Mapping[str, Any]], images: Sequence[np.ndarray], max_new_tokens: int) -> str:
        """A greedy answer to a conversation.

        Args:
            messages: Turns up to the last question.
            images: Their images, as for `logits`.
            max_new_tokens: Longest answer.
        """
        sizes = [image.shape[:2] for image in images]
        ids = self._processing.encode(messages, sizes, add_generation_prompt=True).input_ids
        logits, position = self.logits(messages, images, ids, len(ids) - 1, add_generation_prompt=True)
        new: list[int] = []
        token = int(logits[-1].argmax())
        while token not in self._processing.stop_token_ids:
            new.append(token)
            if len(new) == max_new_tokens:
                break
            (last,), position = self._decode([token], position, 0)
            token = int(last.argmax())
        return self._processing.decode(new)

    def _log(self, level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            self._errors.append(text.decode("utf-8", "replace").strip())

    def _check_tokenizer(self) -> None:
        text = _TEXT.encode()
        room = (self._llama.llama_token * len(text))()
        count = self._llama.llama_tokenize(self._vocab, text, len(text), room, len(room), False, False)
        tokenizer = self._processing.tokenizer
        found, expected = list(room[: max(count, 0)]), tokenizer(_TEXT, add_special_tokens=False).input_ids
        if found != expected:
            first = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), 0)
            here, there = (tokenizer.convert_ids_to_tokens(ids[first : first + 4]) for ids in (found, expected))
            raise ExportError(
                f"llama.cpp cuts text into other tokens than the model's tokenizer, such as {here} in place of {there}; please"
                " report this with the model's name"
            )

    def _loaded(self, path: Path, handle: Any) -> Any:
        if not handle:
            words = "; ".join(self._errors[-3:]) or "it gives no reason"
            raise ExportError(f"llama.cpp does not load {path.name}: {words}. Please report this with the model's name")
        return handle

    @contextmanager
    def _tokenised(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[np.ndarray], add_generation_prompt: bool
    ) -> Iterator[list[Any]]:
        """llama.cpp's own pieces of text and image."""
        text = self._processing.render(messages, add_generation_prompt)
        if puts_bos(self._processing):
            text = text.removeprefix(self._processing.tokenizer.bos_token)
        normalizer = self._processing.tokenizer.backend_tokenizer.normalizer
        if normalizer is not None:
            # llama.cpp has no normaliser; whoever hands text over composes its letters.
            text = normalizer.normalize_str(text)
        handed = text.replace(self._layout.image_text, _MARK).encode()
        request = self._mtmd.mtmd_input_text(text=handed, text_len=len(handed), add_special=True, parse_special=True)
        bitmaps = [self._bitmap(image) for image in images]
        holder = self._mtmd.mtmd_input_chunks_init()
        try:
            array = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
            failed = self._mtmd.mtmd_tokenize(self._vision, holder, ctypes.byref(request), array, len(bitmaps))
            if failed:
                raise ExportError(
                    f"llama.cpp does not take a conversation with {len(images)} images (code {failed}:"
                    f" {'; '.join(self._errors[-2:])}); please report this with the model's name"
                )
            size = self._mtmd.mtmd_input_chunks_size(holder)
            yield [self._mtmd.mtmd_input_chunks_get(holder, number) for number in range(size)]
        finally:
            self._mtmd.mtmd_input_chunks_free(holder)
            for bitmap in bitmaps:
                self._mtmd.mtmd_bitmap_free(bitmap)

    def _bitmap(self, image: np.ndarray) -> Any:
        pixels = np.ascontiguousarray(image)  # copied by the call
        height, width = pixels.shape[:2]
        return self._mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))

    def _check_tokens(
        self,
        chunks: Sequence[Any],
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[np.ndarray],
        add_generation_prompt: bool,
    ) -> None:
        """Compares llama.cpp's tokens with those of the model's tokenizer, both of which see control tokens in the text."""
        text = self._processing.render(messages, add_generation_prompt)
        expected = self._processing.encode_text(text, [image.shape[:2] for image in images]).input_ids
        found: list[int | None] = []
        for chunk in chunks:
            if self._mtmd.mtmd_input_chunk_get_type(chunk) != self._mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                found += [None] * self._mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                continue
            count = ctypes.c_size_t()
            tokens = self._mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            found += tokens[: count.value]
        media = self._processing.media_token_ids
        same = len(found) == len(expected) and all(
            own in media if token is None else own == token for token, own in zip(found, expected, strict=True)
        )
        if not same:
            shown = "".join(self._processing.tokenizer.convert_ids_to_tokens([t for t in found if t is not None])[:40])
            raise ExportError(
                f"llama.cpp cuts a conversation into other tokens ({len(found)}) than the model was trained with"
                f" ({len(expected)}), beginning with {shown!r}; please report this with the model's name"
            )

    def _decode_image(self, chunk: Any, position: int) -> int:
        after = self._llama.llama_pos(0)
        failed = self._mtmd.mtmd_helper_eval_chunk_single(
            self._vision, self._context, chunk, position, 0, _BATCH_TOKENS, False, ctypes.byref(after)
        )
        if failed:
            raise ExportError(
                f"llama.cpp fails on an image (code {failed}: {'; '.join(self._errors[-2:])}); please report this with the"
                " model's name"
            )
        return int(after.value)

    def _decode(self, ids: Sequence[int], position: int, wanted: int) -> tuple[list[np.ndarray], int]:
        """Feeds tokens; gives the logits behind each from `wanted` on, and the next position."""
        found = []
        for first in range(0, len(ids), _BATCH_TOKENS):
            part = ids[first : first + _BATCH_TOKENS]
            batch = self._llama.llama_batch_init(len(part), 0, 1)
            try:
                batch.n_tokens = len(part)
                for number, token in enumerate(part):
                    batch.token[number] = int(token)
                    batch.pos[number] = position + first + number
                    batch.n_seq_id[number] = 1
                    batch.seq_id[number][0] = 0
                    batch.logits[number] = first + number >= wanted
                failed = self._llama.llama_decode(self._context, batch)
                if failed:
                    raise ExportError(
                        f"llama.cpp does not decode {len(part)} tokens (code {failed}: {'; '.join(self._errors[-2:])});"
                        " please report this with the model's name"
                    )
                for number in range(len(part)):
                    if first + number >= wanted:
                        row = self._llama.llama_get_logits_ith(self._context, number)
                        found.append(np.ctypeslib.as_array(row, (self._vocab_size,)).copy())
            finally:
                self._llama.llama_batch_free(batch)
        return found, position + len(ids)
