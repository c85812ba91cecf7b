"""What a file of settings must not hold is refused in one line, before anything is made of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.cli import parse
from flows.settings import describe
from flows.yaml_file import read_yaml
from vlm.config import RunConfig
from vlm.errors import ConfigError

# Nine values, nine times nine, …: 9 ** 8 values in a few lines.
BOMB = 'data:\n  a: &a ["x", "x", "x", "x", "x", "x", "x", "x", "x"]\n' + "".join(
    f"  {new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "values with all aliases written out"),
        (CHAIN, "nested over 50 levels"),
        ("data: &a [*a]", "an alias stands for what it is in"),
        ("[" * 1200, "nested too deeply"),
        ("a: " + "{a: " * 60 + "}" * 60, "nested over 50 levels"),
        ("data: {prompt: a, prompt: b}", "line 1: 'prompt' is there already"),
        ("data: {prompt: a}\ndata: {prompt: b}", "line 2: 'data' is there already"),
        ("training: {seed: " + "1" * 5000 + "}", "is not valid YAML: Exceeds the limit"),
        ("data: {prompt: 2024-02-31}", "is not valid YAML: day"),
        ("data: !!python/object/apply:os.system ['true']", "is not valid YAML: could not determine a constructor"),
        ('data: {prompt: "a\\0b"}', "NUL or half a character"),
        ('data: {prompt: "\\ud800"}', "NUL or half a character"),
        ("- a", "holds a list; it must be a mapping"),
        ("#" * (1 << 20) + "\n", "is over 1024 KiB"),
    ],
)
def test_what_no_settings_need(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert len(str(caught.value)) < 600


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("data: {prompt: é}".encode("latin-1"))
    for name, message in (("latin.yaml", "utf-8"), ("nothing.yaml", "No such file"), ("", "directory"), ("\0", "null")):
        with pytest.raises(ConfigError, match=message):
            read_yaml(tmp_path / name)


def test_anchors_and_merges_are_for_people(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("\ufeffa: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2", "1: there is no such setting"),
        ("_env_file: /tmp/x", "'_env_file': there is no such setting"),
        ("_cli_settings_source: 3", "'_cli_settings_source': there is no such setting"),
        ("data: {1: 2}", "Keys should be strings"),
        ("training: {weight_decay: .inf}", "finite number"),
        ("training: {epochs: .nan}", "finite number"),
        ("training: {epochs: 1e999}", "finite number"),
        ("lora: {alpha: .inf}", "finite number"),
        ("training: {seed: 4294967296}", "less than or equal to 4294967295"),
        ("tracking: 'https://user:hunter2@host'", r"'https://\*\*\*@host': Input should be a valid dictionary"),
        (
            "data: {distributed: {dask_scheduler: node0}}",
            r"data.distributed.dask_scheduler 'node0': String should match pattern .* It is: Address of a Dask scheduler, such as"
            " tcp://host:8786",
        ),
        ("tracking: {registered_model: '" + "/" * 100_000 + "'}", "should match pattern"),
    ],
)
def test_settings_that_no_run_can_have(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        parse(["--config", str(path)])
    assert len(str(caught.value)) < 1000


SECTIONS = sorted(RunConfig.model_fields)
FIELDS = sorted({name for section in RunConfig.model_fields.values() for name in section.annotation.model_fields})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from([2**80, "auto", "s3://a"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(SECTIONS), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)))
def test_any_tree_is_a_configuration_or_described(tree: dict[str, object]) -> None:
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        text = describe(error, RunConfig)
    else:
        text = ""
        assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert len(text) < 20_000


@given(st.text(alphabet="ab:*&[]{}<-!|>'\"\\#,\n 0.~", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    from flows import yaml_file

    class File:
        def open(self, mode: str) -> object:
            import io

            return io.BytesIO(text.encode())

    with contextlib.suppress(ConfigError):
        assert isinstance(yaml_file.read_yaml(File()), dict)  # type: ignore[arg-type]
