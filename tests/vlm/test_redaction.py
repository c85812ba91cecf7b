"""Passwords and tokens are hidden wherever something is shown or kept; what is not one stays readable."""

from __future__ import annotations

import pytest

from vlm.data.rows import RowError
from vlm.errors import ConfigError, shown
from vlm.redaction import without_secrets


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://user:hunter2@host/a", "https://***@host/a"),
        ("https://hunter2@host/a", "https://***@host/a"),
        ("https://user:hun@ter2@host/a", "https://***@host/a"),
        ("see 'postgresql+psycopg2://me:hunter2@db:5432/mlflow' there", "see 'postgresql+psycopg2://me:***@db:5432/mlflow' there"),
        ("https://h/a?X-Amz-Credential=hunter2&x=1&X-Amz-Signature=hunter2", "https://h/a?X-Amz-Credential=***&x=1&X-Amz-Signature=***"),
        ("https://a.blob.core/x?sv=1&sig=hunter2", "https://a.blob.core/x?sv=1&sig=***"),
        ("https://h/?access_token=hunter2", "https://h/?access_token=***"),
        ("Bearer hf_abcdefghijklmnopqrst!", "Bearer ***!"),
        ("key AKIAABCDEFGHIJKLMNOP", "key ***"),
    ],
)  # fmt: skip
def test_what_is_secret_by_its_form(text: str, hidden: str) -> None:
    assert without_secrets(text) == hidden
    assert without_secrets(hidden) == hidden
    assert str(ConfigError(text)) == hidden
    error = RowError("x", text, url=text, count=3)
    assert (error.message, error.details) == (hidden, {"url": hidden, "count": 3})
    assert text not in repr(error)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b.png", "abfss://container@account.dfs.core.windows.net/a", "hf://datasets/some/set@main/a.png",
        "https://host/a@b?page=3&design=1", "write to me@host.org: at 10:30", "/home/me/data:2@x", "sqlite:////tmp/mlflow.db",
        "data.split.seed 3 = 4", "zip://a.png::s3://bucket/x.zip",
    ],
)  # fmt: skip
def test_what_is_no_secret(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "AZURE_STORAGE_CONNECTION_STRING"]
)
def test_what_is_secret_in_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "a value 1234")
    assert str(ConfigError("login with 'a value 1234' failed")) == "login with '***' failed"
    monkeypatch.setenv(name, "short")
    assert without_secrets("a short text") == "a short text"


def test_values_in_messages_are_cut_short() -> None:
    deep: list[object] = []
    deep.append(deep)
    assert shown("a" * 10_000).startswith("'aaa")
    assert len(shown("a" * 10_000)) <= 200
    assert len(shown([[["a" * 1000] * 100] * 100] * 100)) <= 300
    assert shown(deep)
