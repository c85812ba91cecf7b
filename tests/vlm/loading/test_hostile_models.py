"""Checkpoints, adapters and templates that somebody made to do harm: nothing of them runs, and each is one error."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.hostile import safetensors
from tests.support.tiny_models import make_tiny_checkpoint
from vlm.errors import DataError, LoraError, ModelError
from vlm.families import FAMILIES
from vlm.loading.model_config import model_config
from vlm.loading.source import check_weights
from vlm.lora.peft_model import read_config
from vlm.processing import Processing, encoding
from vlm.processing.time_limit import within

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("header", "size_bytes", "message"),
    [
        ({"a": {**A, "data_offsets": [0, 12]}}, 12, "has 12 bytes where its shape"),
        ({"a": {**A, "shape": [2, 2**62]}}, 8, "where its shape"),
        ({"a": {**A, "shape": [-2]}}, 8, "no whole numbers"),
        ({"a": {**A, "shape": [2.0]}}, 8, "no whole numbers"),
        ({"a": {**A, "shape": [True, 2]}}, 8, "no whole numbers"),
        ({"a": {**A, "data_offsets": [8, 0]}}, 8, "has -8 bytes"),
        ({"a": {**A, "dtype": "OBJECT"}}, 8, "its header cannot be read"),
        ({"a": A, "b": A}, 8, "'b' starts at byte 0, where the tensor before it ends at 8"),
        ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, 12, "starts at byte 4, where"),
        ({"a": A, "b": {**A, "data_offsets": [12, 20]}}, 20, "starts at byte 12, where"),
        ({"a": A}, 9, "9 bytes of 8"),
        ({"a": A}, 7, "7 bytes of 8"),
        (b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 7}', 0, "a name stands there twice"),
        (b"[" * 5000, 0, "its header cannot be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", 0, "its header cannot be read"),
    ],
)
def test_weights_that_are_not_what_their_header_says(
    header: dict[str, Any] | bytes, size_bytes: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(header, size_bytes))
    with pytest.raises(ModelError, match=message):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    "content", ["[", '{"weight_map": 7}', '{"weight_map": {"a": 7}}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_an_index_names_files_of_its_folder(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors({"a": A}, 8))
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index.json (is no valid JSON|has no weight_map|names '../x.safetensors')"):
        check_weights(tmp_path)


@pytest.mark.parametrize("content", ["[" * 5000, '{"a": ' * 5000, "1" * 5000, '"\\ud800"', "7", b"\xff"])
def test_a_config_that_is_no_json(content: str | bytes, folder: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ModelError, match=r"JSON|cannot be used"):
            Processing.from_dir(folder)
        (folder / name).write_bytes(before)


@pytest.mark.parametrize("content", ["{}", "[" * 5000, '{"version": "1.0", "model": {"type": "BPE", "vocab": 7}}'])
def test_a_damaged_tokenizer(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be opened"):
        Processing.from_dir(folder)


def test_code_that_a_folder_brings_is_not_run_nor_asked_about(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, asked = tmp_path / "mark", []
    # Whoever is asked on the terminal says yes.
    monkeypatch.setattr(builtins, "input", lambda question: asked.append(question) or "y")
    Processing.from_dir(folder).save(
        tmp_path / "processor"
    )  # has no config.json that tells a class of transformers' own
    for place, name, auto_map in (
        (tmp_path / "processor", "tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
        (folder, "tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
        (folder, "config.json", {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own"}),
        (folder, "preprocessor_config.json", {"AutoImageProcessor": "own.Own"}),
    ):
        (place / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own: pass\n")
        content = json.loads((place / name).read_text()) | {"auto_map": auto_map}
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "Own"
        (place / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="custom code"):
        Processing.from_dir(tmp_path / "processor")
    assert Processing.from_dir(folder).family.model_type == "qwen2_5_vl"
    assert type(model_config(folder, FAMILIES["qwen2_5_vl"])).__module__.startswith("transformers.")
    assert asked == []
    assert not mark.exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
        ("{{ (10 ** 5000) | string }}", "digits"),
        ("{{ 'a' * (10 ** 15) }}", "MemoryError"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ messages[0]['role'].format() if false else messages.nothing.more }}", "no attribute"),
    ],
)
def test_templates_are_programs_that_may_fail(template: str, message: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    processing = Processing.from_dir(folder)
    with pytest.raises(DataError, match=f"chat template refuses .*{message}"):
        processing.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], [])


def test_a_template_without_end_is_an_error_of_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "TEMPLATE_SECONDS", 0.005)
    # Long enough to be given up; with an end, so that no thread is left behind in the tests.
    loop = "{% for i in range(90) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loop)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    processing = Processing.from_dir(folder)
    for call in (lambda: processing.encode(messages, []), lambda: processing.render(messages)):
        with pytest.raises(ModelError, match=r"has not rendered a conversation of [12] messages after 0.005 seconds"):
            call()


def test_a_process_does_not_wait_for_what_has_no_end() -> None:
    code = "from vlm.processing.time_limit import within\ndef work():\n    while True: pass\nwithin(0.2, work)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "TimeoutError: over 0.2 seconds")


def test_work_within_a_time() -> None:
    assert within(10, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(10, lambda: {}[1])
    with pytest.raises(TimeoutError, match=r"over 0.01 seconds"):
        within(0.01, lambda: time.sleep(1))
    assert within(10, lambda: within(10, lambda: 8)) == 8
    assert encoding.TEMPLATE_SECONDS >= 10  # a machine may be busy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 5000, "is no valid JSON"),
        ('{"peft_type": "PROMPT_TUNING"}', "has peft_type 'PROMPT_TUNING'"),
        ("{}", "has peft_type None"),
    ],
)
def test_settings_of_adapters(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors({"a": A}, 8))
    with pytest.raises((LoraError, ModelError), match=message):
        read_config(tmp_path)


class Payload:
    """What a pickle runs when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_resumed_trainings_random_state_runs_nothing(tmp_path: Path) -> None:
    from transformers import Trainer

    mark = tmp_path / "mark"
    torch.save({"python": Payload(mark)}, tmp_path / "rng_state.pth")
    trainer: Any = SimpleNamespace(args=SimpleNamespace(world_size=1, process_index=0))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Trainer._load_rng_state(trainer, str(tmp_path))
    assert not mark.exists()


def test_all_that_a_trainer_loads_is_loaded_as_weights_only() -> None:
    """Optimizer, scheduler and scaler states lie beside the random state."""
    from transformers import trainer

    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(trainer)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) >= 4
    for call in calls:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only") == "True"
