from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main, parse
from vlm.config import RunConfig
from vlm.errors import ConfigError


def test_without_settings_the_defaults_apply() -> None:
    config, options = parse([])
    assert config == RunConfig()
    assert not options.plan
    assert options.rerun_from is None


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "training: {learning_rate: 0.5, batch_size: 7}\ndata: {sources: [a.parquet, {path: b.csv, split: test}]}\n"
    )
    config, _ = parse(
        ["--config", str(file), "--training.learning_rate", "0.1", "--lora.finetune_vision_layers", "false"]
    )
    assert (config.training.learning_rate, config.training.batch_size) == (0.1, 7)
    assert not config.lora.finetune_vision_layers
    assert [source.path for source in config.data.sources] == ["a.parquet", "b.csv"]
    assert config.data.sources[1].split == "test"


def test_lists_paths_and_null(tmp_path: Path) -> None:
    config, _ = parse(["--export.types", "lora,merged_16bit", "--data.sources", '["x.jsonl"]', "--data.system", "null"])
    assert config.export.types == ("lora", "merged_16bit")
    assert config.data.sources[0].path == "x.jsonl"
    assert config.data.system is None


def test_a_plain_path_is_a_source() -> None:
    config, _ = parse(["--data.sources", "../shared/receipts"])
    assert [source.path for source in config.data.sources] == ["../shared/receipts"]


def test_environment_variables_do_not_leak_into_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", '{"name": "from the environment"}')
    monkeypatch.setenv("EXPORT", '{"types": []}')
    assert parse([])[0] == RunConfig()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("lora: {rnak: 4}", r"lora\.rnak: there is no such setting\. Did you mean rank"),
        ("training: {learning_rate: -1}", r"training\.learning_rate -1: Input should be greater than 0"),
        ("trainig: {}", r"trainig: there is no such setting\. Did you mean training"),
        ("training: {max_steps: 3, epochs: 1}", "max_steps 3 and epochs 1.0 both set the length"),
        ("data: {min_pixels: 9, max_pixels: 4}", "min_pixels 9 is above max_pixels 4"),
        ("lora: {finetune_vision_layers: false, finetune_language_layers: false}", "leave nothing to train"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, yaml: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml)
    with pytest.raises(ConfigError, match=message):
        parse(["--config", str(file)])


def test_a_contradiction_between_sections_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^export\.types has 'lora' but lora\.full_finetuning makes no adapter"):
        parse(["--lora.full_finetuning", "vision,language"])
    config, _ = parse(["--lora.full_finetuning", "vision,language", "--export.types", "merged_16bit"])
    assert config.lora.full_finetuning == ("vision", "language")


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora.rnak", "4"], "Did you mean --lora.rank"),
        (["--rerun-from", "training"], "invalid choice: 'training'"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for option in ("--model.name", "--lora.use_dora", "--training.learning_rate", "--runtime.store"):
        assert option in text


def test_every_setting_has_a_description() -> None:
    def check(model: type, prefix: str) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            assert field.description, f"{prefix}{name}"
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation, f"{prefix}{name}.")

    check(RunConfig, "")


def test_plan_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom flows.cli import main\n"
        f"status = main(['--plan', '--runtime.store', {str(tmp_path / 'store')!r}])\n"
        "heavy = {'torch', 'transformers', 'prefect', 'mlflow', 'trl', 'peft', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\nraise SystemExit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "load_model" in done.stdout
    assert "never built in this store" in done.stdout
