"""Step 6: greedy answers of the tuned or the base model to held-out rows. Loads torch and transformers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm import progress
from vlm.config import GenerationConfig
from vlm.data.prepared import PreparedDataset, PreparedRow
from vlm.data.splits import SPLITS
from vlm.errors import DataError, ResourceError
from vlm.evaluation.predictions import Prediction, PredictionsSummary, summarise_predictions, write_predictions
from vlm.families.pixels import PixelBytes
from vlm.generation_batches import RowCosts, batches, memory_budget
from vlm.lora.attach import attached
from vlm.lora.peft_model import base_model
from vlm.packing.model import packed

if TYPE_CHECKING:
    from vlm.loading.checkpoint import LoadedModel
    from vlm.processing import Processing


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    """Without control tokens."""
    num_new_tokens: int
    """Generated tokens, the stop token included."""
    stopped: bool
    """Whether the model ended its turn."""


def generate_predictions(
    loaded: LoadedModel,
    dataset_dir: Path,
    generation: GenerationConfig,
    output_dir: Path,
    *,
    adapter_dir: Path | None = None,
) -> PredictionsSummary:
    """Answers the rows of a split.

    Args:
        loaded: The base model; as before when this returns.
        dataset_dir: Prepared dataset.
        generation: Split, batch size and longest answer.
        output_dir: Receives ``predictions.jsonl`` and ``predictions.json``; made if it is not there.
        adapter_dir: The trained adapter, or None for the base model's answers.

    Returns:
        The content of ``predictions.json``.

    Raises:
        DataError: A row has no assistant turn to leave out.
        ResourceError: A single row does not fit into GPU memory.
    """
    rows = PreparedDataset(dataset_dir, generation.split)
    num_rows = len(rows) if generation.max_rows is None else min(len(rows), generation.max_rows)
    bar = progress.bar("answering" if adapter_dir else "answering (base model)", num_rows)
    try:
        done = answer_some(
            loaded, dataset_dir, generation, range(num_rows), adapter_dir=adapter_dir, advance=bar.update
        )
    finally:
        bar.close()
    summary = summarise_predictions(done, generation.split, use_adapter=adapter_dir is not None)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_predictions(done, summary, output_dir)
    return summary


def answer_some(
    loaded: LoadedModel,
    dataset_dir: Path,
    generation: GenerationConfig,
    numbers: Sequence[int],
    *,
    adapter_dir: Path | None,
    advance: Callable[[int], Any],
) -> list[Prediction]:
    """Answers some rows of a split.

    Args:
        loaded: The base model; as before when this returns.
        dataset_dir: Prepared dataset.
        generation: Split, batch size and longest answer.
        numbers: Row numbers.
        adapter_dir: The trained adapter, or None for the base model's answers.
        advance: Called with the number of rows that were just answered.

    Returns:
        Predictions in the order of `numbers`.

    Raises:
        DataError: A row has no assistant turn to leave out.
        ResourceError: A single row does not fit into GPU memory.
    """
    with attached(loaded, adapter_dir) as model, _images_apart(loaded):
        return predict(
            model,
            loaded.processing,
            PreparedDataset(dataset_dir, generation.split),
            numbers,
            batch_size=generation.batch_size,
            max_new_tokens=generation.max_new_tokens or longest_answer(dataset_dir),
            advance=advance,
        )


def _images_apart(loaded: LoadedModel) -> AbstractContextManager[None]:
    """Has a vision tower that takes all images of a batch in one row attend within each, as training does.

    Some would make a mask of all patches against all patches otherwise, or go from image to image.
    """
    packing = loaded.family.packing
    return nullcontext() if packing is None or not packing.tower_segments else packed(loaded.model, loaded.family)


def predict(
    model: Any,
    processing: Processing,
    rows: PreparedDataset,
    numbers: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[Prediction]:
    """Answers some rows of a split.

    Args:
        model: A live model, with or without adapter; as before when this returns.
        processing: Its processor.
        rows: The split.
        numbers: Row numbers.
        batch_size: Rows answered at once, at most; fewer where memory asks for it.
        max_new_tokens: Longest answer.
        advance: Called with the number of rows that were just answered.

    Returns:
        Predictions in the order of `numbers`.

    Raises:
        DataError: A row has no assistant turn to leave out.
        ResourceError: A single row does not fit into GPU memory.
    """
    picked = np.asarray(numbers, dtype=np.int64)
    base = base_model(model)
    costs = RowCosts.of(base.config.to_dict(), processing.family, base.get_input_embeddings().weight.element_size())
    done: dict[int, Prediction] = {}
    with generating(model):
        for places in batches(
            (rows.num_tokens - rows.num_supervised_tokens)[picked].tolist(),
            rows.num_visual_tokens[picked].tolist(),
            costs,
            most_rows=batch_size,
            max_new_tokens=max_new_tokens,
            budget_bytes=memory_budget(base.device),
        ):
            batch = [rows[numbers[place]] for place in places]
            answers = answer_rows(model, processing, batch, max_new_tokens)
            done |= {place: _prediction(row, answer) for place, row, answer in zip(places, batch, answers, strict=True)}
            advance(len(batch))
    return [done[place] for place in range(len(numbers))]


def longest_answer(dataset_dir: Path) -> int:
    """Bound on the length of an answer where none is set: half as much again as the longest of the training rows.

    Where there are no training rows, because a dataset serves evaluation only, it is the longest of all rows.

    Without a bound of this kind, a model that has not learnt to end its turn (every untuned one, at first) spends
    minutes on words that cannot be right. Rows that reach it are marked ``length``.

    Args:
        dataset_dir: Prepared dataset.

    Returns:
        A number of tokens; several answers of one conversation count together.
    """
    lengths = PreparedDataset(dataset_dir, "train").num_supervised_tokens
    if not len(lengths):
        lengths = np.concatenate([PreparedDataset(dataset_dir, split).num_supervised_tokens for split in SPLITS])
    longest = lengths.max(initial=1)
    return math.ceil(1.5 * int(longest))


def answer_rows(model: Any, processing: Processing, rows: Sequence[PreparedRow], max_new_tokens: int) -> list[Answer]:
    """Answers a batch; halves it where the GPU's memory does not hold it, which changes no answer.

    Args:
        model: In the state that ``generating`` gives it.
        processing: Its processor.
        rows: Prepared rows; their last assistant turn is left out.
        max_new_tokens: Longest answer.

    Returns:
        One answer per row.

    Raises:
        ResourceError: A single row does not fit.
    """
    try:
        return _answer(model, processing, rows, max_new_tokens)
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise ResourceError(
                f"row {rows[0].id!r} ({len(rows[0].input_ids)} tokens) does not fit into the GPU's memory for generation;"
                " lower data.max_pixels, generation.max_new_tokens, or take a larger GPU"
            ) from error
    # Outside the handler: the exception holds the tensors of the failed attempt.
    torch.cuda.empty_cache()
    half = len(rows) // 2
    return [
        answer for part in (rows[:half], rows[half:]) for answer in answer_rows(model, processing, part, max_new_tokens)
    ]


def prompt_of(row: PreparedRow) -> tuple[list[dict[str, Any]], int]:
    """The conversation before the last assistant turn.

    Args:
        row: A prepared row.

    Returns:
        Its messages, and how many of the row's images and videos are in them.

    Raises:
        DataError: There is no assistant turn.
    """
    last = max((number for number, message in enumerate(row.messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise DataError(f"row {row.id!r} has no assistant turn, so there is no answer to compare with; drop the row")
    messages = row.messages[:last]
    return messages, sum(part["type"] in ("image", "video") for message in messages for part in _parts(message))


def _answer(model: Any, processing: Processing, rows: Sequence[PreparedRow], max_new_tokens: int) -> list[Answer]:
    prompts, images = [], []
    for row in rows:
        messages, num_images = prompt_of(row)
        images.append(list(row.images[:num_images]))
        sizes = [image.shape[:-1] for image in images[-1]]
        prompts.append(processing.encode(messages, sizes, add_generation_prompt=True).input_ids)
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(rows), length), processing.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        ids[number, length - len(prompt) :] = torch.tensor(prompt)
        mask[number, length - len(prompt) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, **processing.model_inputs(ids, processing.pixel_bytes(images))}
    inputs = {name: _placed(value, model) for name, value in inputs.items()}
    generated = model.generate(**inputs, generation_config=_greedy(model.generation_config, processing, max_new_tokens))
    return [_finish(new, processing) for new in generated[:, length:].tolist()]


def _placed(value: Any, model: Any) -> Any:
    """On the model's device, pixels in its precision: some vision towers take no other."""
    if isinstance(value, PixelBytes):
        return value.to(model.device).values(model.dtype)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _greedy(own: Any, processing: Processing, max_new_tokens: int) -> Any:
    """The model's own generation settings without chance.

    The repetition penalty goes too: it would also punish padding, so that an answer would depend on its batch.
    """
    config = copy.deepcopy(own)
    config.update(
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        num_beams=1,
        use_cache=True,
        max_length=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(processing.stop_token_ids),
        pad_token_id=processing.pad_token_id,
    )
    return config


def _finish(new: list[int], processing: Processing) -> Answer:
    stops = set(processing.stop_token_ids)
    end = next((position for position, token in enumerate(new) if token in stops), None)
    if end is None:
        return Answer(processing.decode(new), len(new), stopped=False)
    return Answer(processing.decode(new[:end]), end + 1, stopped=True)


def _prediction(row: PreparedRow, answer: Answer) -> Prediction:
    return Prediction(
        id=row.id,
        group=row.group,
        prompt=words_of_prompt(row),
        target=row.target,
        prediction=answer.text,
        num_new_tokens=answer.num_new_tokens,
        finish_reason="stop" if answer.stopped else "length",
        metadata=row.metadata,
    )


def words_of_prompt(row: PreparedRow) -> str:
    """The text of the last user turn.

    Args:
        row: A prepared row.
    """
    messages, _ = prompt_of(row)
    users = [message for message in messages if message["role"] == "user"]
    return "\n".join(part["text"] for part in _parts(users[-1]) if part["type"] == "text") if users else ""


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients and without recomputation; everything is as before afterwards.

    Generating in training mode with gradient checkpointing gives wrong words without any error, since recomputation
    switches the cache off.

    Args:
        model: A live model, with or without adapter.
    """
    modes = [(module, module.training) for module in model.modules()]
    recomputing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    model.eval()
    for module in recomputing:
        module.gradient_checkpointing = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module in recomputing:
            module.gradient_checkpointing = True
