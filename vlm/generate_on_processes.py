"""Step 6 on several GPUs: every process answers a share of the rows with a whole model of its own.

``python -m vlm.generate_on_processes JOB.json`` is one such process. The one that starts them imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from vlm import progress
from vlm.config import GenerationConfig
from vlm.data.prepared import PreparedDataset
from vlm.evaluation.predictions import Prediction, PredictionsSummary, summarise_predictions, write_predictions
from vlm.processes.events import Event, EventWriter
from vlm.processes.plan import Launch
from vlm.processes.run import run_processes
from vlm.processes.worker import forget_others, listen, run_worker, share_cores

_WORKER = "vlm.generate_on_processes"


def generate_on_processes(
    checkpoint_dir: Path,
    dataset_dir: Path,
    generation: GenerationConfig,
    output_dir: Path,
    *,
    work_dir: Path,
    device: str,
    num_processes: int,
    adapter_dir: Path | None = None,
    digest: str | None = None,
) -> PredictionsSummary:
    """Answers the rows of a split, as `vlm.generate.generate_predictions` does.

    This process must have let go of its own model: the others take the GPUs.

    Args:
        checkpoint_dir: The base model.
        dataset_dir: Prepared dataset.
        generation: Split, batch size and longest answer.
        output_dir: Receives ``predictions.jsonl`` and ``predictions.json``; made if it is not there.
        work_dir: For files of the processes; emptied first.
        device: ``cpu`` or ``cuda``.
        num_processes: How many share the rows.
        adapter_dir: The trained adapter, or None for the base model's answers.
        digest: Of the checkpoint, where known.

    Returns:
        The content of ``predictions.json``.

    Raises:
        VlmError: What a process ended with, or that it was killed.
    """
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    rows = PreparedDataset(dataset_dir, generation.split)
    num_rows = len(rows) if generation.max_rows is None else min(len(rows), generation.max_rows)
    job = {
        "checkpoint_dir": str(checkpoint_dir.absolute()),
        "digest": digest,
        "adapter_dir": None if adapter_dir is None else str(adapter_dir.absolute()),
        "dataset_dir": str(dataset_dir.absolute()),
        "work_dir": str(work_dir.absolute()),
        "device": device,
        "generation": generation.model_dump(mode="json"),
        "shares": _shares(rows, num_rows, num_processes),
    }
    path = work_dir / "job.json"
    path.write_text(json.dumps(job) + "\n", encoding="utf-8")
    bar = progress.bar("answering" if adapter_dir else "answering (base model)", num_rows)

    def take(number: int, event: Event) -> None:
        bar.update(event.get("answered", 0))

    try:
        run_processes(Launch(worker=_WORKER, job=path, events_dir=work_dir, num_processes=num_processes), take)
    finally:
        bar.close()
    done: dict[int, Prediction] = {}
    for number in range(num_processes):
        for line in _part(work_dir, number).read_text(encoding="utf-8").splitlines():
            row, answer = json.loads(line)
            done[row] = Prediction(**answer)
    answers = [done[row] for row in range(num_rows)]
    summary = summarise_predictions(answers, generation.split, use_adapter=adapter_dir is not None)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_predictions(answers, summary, output_dir)
    return summary


def _shares(rows: PreparedDataset, num_rows: int, num_processes: int) -> list[list[int]]:
    """Row numbers for each process: of like length in turn, forth and back, so that all have long and short ones."""
    order = sorted(range(num_rows), key=lambda row: -int(rows.num_tokens[row]))
    turn = [*range(num_processes), *reversed(range(num_processes))]
    taken: list[list[int]] = [[] for _ in range(num_processes)]
    for place, row in enumerate(order):
        taken[turn[place % len(turn)]].append(row)
    return [sorted(own) for own in taken]


def _part(work_dir: Path, number: int) -> Path:
    return work_dir / f"answers-{number}.jsonl"


def _answer(job: dict[str, Any], number: int, events: EventWriter) -> None:
    import torch

    from vlm.generate import answer_some
    from vlm.loading.checkpoint import load_checkpoint

    if job["device"] == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(share_cores(len(job["shares"])))
    listen(lambda: None)
    forget_others()
    numbers = job["shares"][number]
    answers = answer_some(
        load_checkpoint(Path(job["checkpoint_dir"]), device=job["device"], digest=job["digest"]),
        Path(job["dataset_dir"]),
        GenerationConfig.model_validate(job["generation"]),
        numbers,
        adapter_dir=None if job["adapter_dir"] is None else Path(job["adapter_dir"]),
        advance=lambda count: events.tell({"answered": count}),
    )
    with _part(Path(job["work_dir"]), number).open("w", encoding="utf-8") as handle:
        for row, answer in zip(numbers, answers, strict=True):
            handle.write(json.dumps([row, asdict(answer)]) + "\n")


def main() -> None:
    """Answers its share."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    number = int(os.environ["LOCAL_RANK"])
    run_worker(Path(job["work_dir"]), job["device"], partial(_answer, job, number))


if __name__ == "__main__":
    main()
