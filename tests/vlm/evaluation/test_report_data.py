"""What a page that somebody sends says of itself is read, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.errors import DataError
from vlm.evaluation.report_data import DATA_ID, data_block, read_report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html></html>", "holds no metrics"),
        (b"\xff", "no page in UTF-8"),
        *(
            (f'<script id="{DATA_ID}">{text}</script>'.encode(), "not what the pipeline writes")
            for text in (
                "[" * 5000,
                "7",
                "{}",
                '{"metrics": 7, "provenance": {}}',
                '{"metrics": {}, "provenance": 7}',
                "1" * 5000,
            )
        ),
    ],
)
def test_pages_of_others(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_report(tmp_path / "report.html")


def test_a_page_of_ours(tmp_path: Path) -> None:
    block = data_block({"cer": {"note": "</script><b>"}}, {"metrics": "abc"})
    (tmp_path / "report.html").write_text(f'<script id="{DATA_ID}">{block}</script>')
    assert read_report(tmp_path / "report.html") == ({"cer": {"note": "</script><b>"}}, "abc")
