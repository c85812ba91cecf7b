import pytest
from PIL import Image

import vlm
from tests.support.tiny_models import tiny_image
from vlm.errors import DataError


def test_rows_are_looked_up_and_not_copied() -> None:
    pictures = [Image.fromarray(tiny_image(seed=seed)) for seed in range(3)]
    rows = [
        {"messages": [{"role": "user", "content": picture}], "id": number} for number, picture in enumerate(pictures)
    ]
    dataset = vlm.to_dataset(rows)
    assert len(dataset) == 3
    assert dataset[1]["messages"][0]["content"] is pictures[1]
    assert [item["id"] for item in dataset.__getitems__([2, 0])] == [2, 0]
    assert vlm.to_dataset([row["messages"] for row in rows])[2] == {"messages": rows[2]["messages"]}
    with pytest.raises(DataError, match="no rows"):
        vlm.to_dataset([])
