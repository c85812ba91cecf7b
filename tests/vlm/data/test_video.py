"""Videos come from lists, folders and animated files; only some of their frames are kept, and nothing is lost silently."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlm.data.images import load_image_bytes
from vlm.data.rows import RowError
from vlm.data.video import chosen_frames, load_video, video_reference
from vlm.errors import DataError
from vlm.families.video import Video


def frames(count, size=(60, 40)):
    """Frames that tell their number by their brightness."""
    return [Image.new("RGB", size, (10 * number,) * 3) for number in range(count)]


def animated(pictures, file_format="GIF", **options):
    buffer = io.BytesIO()
    pictures[0].save(buffer, file_format, save_all=True, append_images=pictures[1:], **options)
    return buffer.getvalue()


def levels(medium):
    return [round(np.asarray(frame).mean() / 10) for frame in medium.frames]


def load(value, fps=None, *, max_frames=16, names=()):
    reference = video_reference({"type": "video", "video": value, "fps": fps})
    assert reference is not None
    return load_video(
        reference,
        load=lambda item: load_image_bytes(item, None, allow_urls=False) if not isinstance(item, int) else names[item],
        list_folder=lambda path: list(names),
        max_frames=max_frames,
        max_source_pixels=10_000,
        max_pixels=None,
        max_total_pixels=80_000,
    )


@pytest.mark.parametrize(
    ("num_frames", "max_frames", "expected"),
    [
        (3, 16, [0, 1, 2]),
        (9, 5, [0, 2, 4, 6, 8]),
        (10, 4, [0, 3, 6, 9]),
        (100, 1, [0]),
        (7, 2, [0, 6]),
    ],
)
def test_frames_are_evenly_spaced_from_first_to_last(num_frames, max_frames, expected):
    assert chosen_frames(num_frames, max_frames) == expected


@pytest.mark.parametrize(("file_format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_animated_files_know_their_pace(file_format, options):
    film = animated(frames(9), file_format, duration=100, **options)
    whole = load(film)
    assert (levels(whole), whole.frames_per_second) == (list(range(9)), pytest.approx(10))
    thinned = load({"bytes": film, "path": None}, max_frames=5)
    assert (levels(thinned), thinned.frames_per_second) == ([0, 2, 4, 6, 8], pytest.approx(5))
    assert load(film, fps=30).frames_per_second == 30


def test_lists_have_the_pace_they_are_given():
    assert load(frames(9)).frames_per_second == 2
    thinned = load(frames(9), fps=4, max_frames=3)
    assert (levels(thinned), thinned.frames_per_second) == ([0, 4, 8], 1)
    still = load([animated(frames(1), "PNG")])
    assert (levels(still), still.frames_per_second) == ([0], 2)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("film.mp4", "video_format"),
        ([frames(1)[0], frames(1, (40, 60))[0]], "video_frame_sizes"),
        ([frames(1, (200, 60))[0]], "image_too_many_pixels"),
        (animated(frames(5))[:200], "image_damaged"),
        (b"no film", "image_format"),
        ("folder", "video_empty"),
    ],
)
def test_what_is_no_video_is_an_error(value, reason):
    with pytest.raises(RowError) as raised:
        load(value)
    assert raised.value.reason == reason


def conversation(*parts, answer="It moves."):
    content = [*parts, {"type": "text", "text": "What happens?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.fixture
def source(tmp_path):
    """Rows with a folder of frames, an animated file, and a list beside an image."""
    folder = tmp_path / "source"
    (folder / "clip").mkdir(parents=True)
    for number, frame in enumerate(frames(12)):
        frame.save(folder / "clip" / f"frame_{number}.png")
    (folder / "clip" / "readme.txt").write_text("no frame")
    (folder / "a.gif").write_bytes(animated(frames(4), duration=500))
    frames(1)[0].save(folder / "still.png")
    rows = [
        {"id": "folder", "messages": conversation({"type": "video", "video": "clip", "fps": 6})},
        {"id": "file", "messages": conversation({"type": "video", "video": "a.gif"})},
        {
            "id": "both",
            "messages": conversation(
                {"type": "image", "image": "still.png"},
                {"type": "video", "video": ["clip/frame_3.png", "clip/frame_10.png"]},
                answer='{"bbox": [0, 0, 60, 40]}',
            ),
        },
        {"id": "film", "messages": conversation({"type": "video", "video": "b.mp4"})},
        {"id": "nothing", "messages": conversation({"type": "video"})},
        {"id": "outside", "messages": conversation({"type": "video", "video": "../elsewhere"})},
        {"id": "missing", "messages": conversation({"type": "video", "video": "nowhere"})},
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prepared_videos(source, prepare, processing):
    prepared = prepare(source, max_video_frames=4)
    assert [(entry["id"], entry["reason"]) for entry in prepared.ledger] == [
        ("film", "video_format"),
        ("nothing", "bad_part_type"),
        ("outside", "image_outside"),
        ("missing", "video_not_found"),
    ]
    rows = prepared.all_rows()
    (video,) = rows["folder"].images
    assert isinstance(video, Video)
    assert video.shape == (4, 28, 56, 3)
    # Frames 0, 4, 7 and 11 of twelve, by number and not by name; at 6 per second, the mean distance is 11 / 18 s.
    assert [round(frame.mean() / 10) for frame in video.frames] == [0, 4, 7, 11]
    assert video.frames_per_second == pytest.approx(18 / 11)
    assert rows["file"].images[0].frames_per_second == pytest.approx(2)
    still, video = rows["both"].images
    assert still.shape == (28, 56, 3)
    assert [round(frame.mean() / 10) for frame in video.frames] == [3, 10]
    assert [part["type"] for part in rows["both"].messages[0]["content"]] == ["image", "video", "text"]
    dataset = prepared.split("train")
    number = dataset.ids.index("both")
    assert dataset.image_sizes(number) == [(28, 56), (2, 28, 56)]
    assert dataset.num_pixels[number] == 3 * 28 * 56
    assert dataset.num_visual_tokens[number] == 2 + 4
    for row in rows.values():
        sizes = [medium.shape[:-1] for medium in row.images]
        assert row.input_ids.tolist() == processing.encode(row.messages, sizes).input_ids


def test_frames_have_a_limit_of_their_own(source, prepare):
    rows = prepare(source, max_video_pixels=28 * 28, min_pixels=50 * 50).all_rows()
    still, video = rows["both"].images
    assert still.shape[0] * still.shape[1] >= 50 * 50
    assert video.shape == (2, 28, 28, 3)


def test_boxes_in_a_video(source, prepare):
    boxes = {"source": "absolute"}
    assert prepare(source, boxes=boxes).all_rows()["both"].target == '{"bbox": [0, 0, 56, 28]}'


def test_videos_are_shrunk_like_images(tmp_path, prepare, write_jsonl, processing):
    (tmp_path / "a.gif").write_bytes(animated(frames(4, (300, 200))))
    part = {"type": "video", "video": "a.gif"}
    prepared = prepare(
        write_jsonl([{"id": "a", "messages": conversation(part)}]), max_length_tokens=150, on_too_long="shrink_images"
    )
    assert prepared.reasons == [("shrunk", "too_long")]
    row = prepared.all_rows()["a"]
    (video,) = row.images
    assert prepared.ledger[0]["details"]["image_sizes_before"] == [[4, 196, 308]]
    assert prepared.ledger[0]["details"]["image_sizes_after"] == [list(video.shape[:3])]
    assert row.input_ids.tolist() == processing.encode(row.messages, [video.shape[:3]]).input_ids
    assert 100 < len(row.input_ids) <= 150


def test_frames_as_images(source, prepare, processing):
    processing.video_problem = "Pixtral takes no videos; use a model of Qwen2-VL"
    with pytest.raises(
        DataError, match=r"6 x video_unsupported.*use a model of Qwen2-VL; or set data\.video_as_images"
    ):
        prepare(source)
    rows = prepare(source, video_as_images=True, max_video_frames=3).all_rows()
    assert [image.shape for image in rows["folder"].images] == [(28, 56, 3)] * 3
    assert [part["type"] for part in rows["both"].messages[0]["content"]] == ["image", "image", "image", "text"]
    assert [round(image.mean() / 10) for image in rows["both"].images] == [0, 3, 10]


def test_grey_videos_take_one_channel_and_come_back_with_three(tmp_path, prepare, write_jsonl):
    for number in range(2):
        Image.new("L", (56, 28), 40 * number + 10).save(tmp_path / f"{number}.png")
    part = {"type": "video", "video": ["0.png", "1.png"]}
    prepared = prepare(write_jsonl([{"id": "a", "messages": conversation(part)}]))
    (video,) = prepared.all_rows()["a"].images
    assert video.shape == (2, 28, 56, 3)
    assert video.frames[:, 0, 0].tolist() == [[10] * 3, [50] * 3]
    assert (prepared.folder / "train" / "data-00000.arrow").stat().st_size < 2 * 28 * 56 * 3
