"""The pretraining as a flow: two runs, the second of which goes on and finishes."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.pretrain_cli import describe, main, parse
from tests.support.tiny_pretraining import smallest_settings
from vlm.config.pretrain import PretrainConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_settings_come_from_the_command_line_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pretrain.yaml"
    file.write_text("minutes: 3\ncurriculum: {end: 0.5}\n")
    config, _ = parse(["--config", str(file), "--minutes", "4", "--architecture.vision_layers", "4"])
    assert (config.minutes, config.curriculum.end, config.architecture.vision_layers) == (4, 0.5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curriculum.start", "0.5"], "curriculum.end 0.35 is not after curriculum.start 0.5"),
        (["--architecture.vision_width", "100"], "multiple of 64"),
        (["--minuts", "3"], "--minutes"),
    ],
)
def test_wrong_settings_are_named_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_flow_goes_on_and_finishes(prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("font_roboto", reason="the extra 'pretrain' is not installed")
    pytest.importorskip("spellchecker", reason="the extra 'pretrain' is not installed")
    from flows.pretrain_builtin import pretrain_builtin
    from vlm.pretrain import train

    config = PretrainConfig.model_validate(smallest_settings(tmp_path) | {"num_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(train, "_is_over", lambda *_: True)
        first = pretrain_builtin(config)
    assert (first["is_finished"], first["step"]) == (False, 1)
    assert "goes on from here" in describe(first)
    second = pretrain_builtin(config)
    assert (second["is_finished"], second["step"]) == (True, 2)
    assert "CER" in describe(second)
    assert (tmp_path / "model" / "README.md").is_file()
