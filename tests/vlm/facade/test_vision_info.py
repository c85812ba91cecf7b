from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm
from tests.support.tiny_models import tiny_image
from vlm.errors import DataError


def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Read."}]}]


def test_images_come_in_order(tmp_path: Path) -> None:
    first, second = tiny_image(20, 30, 1), tiny_image(40, 20, 2)
    Image.fromarray(second).save(tmp_path / "b.png")
    parts = {"type": "image", "image": Image.fromarray(first)}, {"type": "image", "image": str(tmp_path / "b.png")}
    images, videos = vlm.process_vision_info(ask(*parts))
    assert videos is None
    assert images is not None
    assert [np.array_equal(np.asarray(image), pixels) for image, pixels in zip(images, (first, second), strict=True)]
    several, _ = vlm.process_vision_info([ask(parts[1]), ask(), ask(parts[0])])
    assert several is not None
    assert [image.size for image in several] == [(20, 40), (30, 20)]
    assert vlm.process_vision_info(ask()) == (None, None)


def test_videos_come_as_frames(tmp_path: Path) -> None:
    frames = [Image.fromarray(tiny_image(20, 30, number)) for number in range(6)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=250, lossless=True)
    forms = [frames, np.stack([np.asarray(frame) for frame in frames]), tmp_path, str(tmp_path / "a.webp")]
    (tmp_path / "a.webp").rename(tmp_path.parent / f"{tmp_path.name}.webp")  # not among the folder's frames
    forms[3] = str(tmp_path.parent / f"{tmp_path.name}.webp")
    parts = [{"type": "video", "video": form} for form in forms]
    parts[0] |= {"fps": 8, "resized_height": 10, "resized_width": 12}
    images, videos, options = vlm.process_vision_info(ask(*parts), return_video_kwargs=True, max_video_frames=3)
    assert images is None
    assert [[frame.size for frame in video] for video in videos] == [[(12, 10)] * 3] + [[(30, 20)] * 3] * 3
    for video in videos[1:]:
        # Of frames 0 to 5: 0, 2 (two and a half, rounded to even) and 5.
        for number, frame in zip((0, 2, 5), video, strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(frames[number]))
    assert options["fps"] == pytest.approx([8 / 2.5, 2 / 2.5, 2 / 2.5, 4 / 2.5])


@pytest.mark.parametrize(
    ("wish", "size"),
    [
        ({"resized_height": 10, "resized_width": 12}, (12, 10)),
        ({"max_pixels": 200}, (20, 10)),
        ({"min_pixels": 3200}, (80, 40)),
        ({"min_pixels": 1, "max_pixels": 10_000}, (40, 20)),
    ],
)
def test_sizes_that_a_part_asks_for(wish: dict[str, int], size: tuple[int, int]) -> None:
    images, _ = vlm.process_vision_info(ask({"type": "image", "image": tiny_image(20, 40), **wish}))
    assert images is not None
    assert images[0].size == size
    assert images[0].mode == "RGB"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": "a.mp4"}, "no decoder here"),
        ({"type": "video", "video": "/nowhere"}, "give a list of frames"),
        ({"type": "video"}, "without a list of frames"),
        ({"type": "image"}, "has no image"),
        ({"type": "image", "image": tiny_image(), "resized_height": 5}, "only one of resized_height"),
        ({"type": "image", "image": "http://example.com/a.png"}, "allow_urls"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(part: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        vlm.process_vision_info(ask(part))
