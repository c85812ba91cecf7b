from collections.abc import Callable
from pathlib import Path

from vlm.config import GenerationConfig, LoraConfig
from vlm.evaluation.predictions import read_predictions
from vlm.generate import generate_predictions
from vlm.generate_on_processes import generate_on_processes
from vlm.lora.build import build_adapter


def test_two_processes_answer_what_one_does(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    build_adapter(run.loaded, LoraConfig(rank=4), tmp_path / "adapter")
    generation = GenerationConfig(max_new_tokens=6)
    expected = generate_predictions(
        run.loaded, run.dataset_dir, generation, tmp_path / "one", adapter_dir=tmp_path / "adapter"
    )

    summary = generate_on_processes(
        run.checkpoint_dir,
        run.dataset_dir,
        generation,
        tmp_path / "two",
        work_dir=tmp_path / "work",
        device="cpu",
        num_processes=2,
        adapter_dir=tmp_path / "adapter",
    )
    assert summary == expected
    assert read_predictions(tmp_path / "two") == read_predictions(tmp_path / "one")
    parts = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "work").glob("answers-*.jsonl"))]
    assert parts == [3, 2]
