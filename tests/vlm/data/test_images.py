"""Bad images are dropped with their reason; good ones come out upright, opaque and 8 bits deep."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib

import fsspec
import numpy as np
import pytest
from PIL import Image

from vlm.data.images import ImageFolder, load_image_bytes, open_image, pillow_limit, upright_image
from vlm.data.rows import RowError


def load(data, max_source_pixels=100_000_000):
    with pillow_limit(max_source_pixels):
        return upright_image(open_image(data, max_source_pixels))


def reason_of(call):
    with pytest.raises(RowError) as caught:
        call()
    return caught.value.reason


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size whose pixels are not there: decoding it would fail."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


def test_a_bomb_is_dropped_by_its_header_without_pillows_own_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(lambda: load(png_header(50_000, 50_000))) == "image_too_many_pixels"
        assert reason_of(lambda: load(png_header(101, 100), 10_000)) == "image_too_many_pixels"


def test_pillows_limit_is_put_back():
    before = Image.MAX_IMAGE_PIXELS

    def fail():
        with pillow_limit(1000):
            assert Image.MAX_IMAGE_PIXELS == 1000
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert before == Image.MAX_IMAGE_PIXELS


def test_too_narrow_images_are_dropped(make_image):
    assert reason_of(lambda: load(make_image(0, (201, 1)))) == "image_aspect_ratio"
    assert load(make_image(0, (200, 1))).size == (200, 1)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "PPM", "BMP"])
def test_allowed_formats(file_format, make_image, encode_image):
    data = encode_image(make_image(1), file_format)
    assert load(data).size == (60, 40)
    if file_format != "BMP":
        assert reason_of(lambda: load(data[: len(data) // 2])) in ("image_truncated", "image_damaged", "image_format")


def test_what_is_no_allowed_image(make_image, encode_image):
    assert reason_of(lambda: load(b"")) == "image_empty"
    assert reason_of(lambda: load(b"<svg xmlns='http://www.w3.org/2000/svg'/>")) == "image_format"
    assert reason_of(lambda: load(encode_image(make_image(0), "ICO"))) == "image_format"
    assert reason_of(lambda: load(encode_image(make_image(0), "JPEG")[:-200])) == "image_truncated"


def test_a_gif_gives_its_first_frame(make_image):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert load(buffer.getvalue()).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, encode_image):
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:8, :8, 0] = 255
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image(Image.fromarray(np.ascontiguousarray(undo(upright))), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load(data)), upright)


def test_transparency_is_laid_over_white(encode_image):
    values = np.zeros((2, 2, 4), np.uint8)
    values[..., 3] = [[0, 255], [128, 0]]
    assert np.asarray(load(encode_image(Image.fromarray(values))))[..., 0].tolist() == [[255, 0], [127, 255]]
    grey = load(encode_image(Image.fromarray(values).convert("LA")))
    assert (grey.mode, np.asarray(grey).tolist()) == ("L", [[255, 0], [127, 255]])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putdata([0, 1])
    assert np.asarray(load(encode_image(palette))).tolist() == [[[10, 20, 30], [200, 100, 0]]]
    assert np.asarray(load(encode_image(palette, transparency=0))).tolist() == [[[255, 255, 255], [200, 100, 0]]]
    keyed = Image.new("RGB", (1, 1), (1, 2, 3))
    assert np.asarray(load(encode_image(keyed, transparency=(1, 2, 3)))).tolist() == [[[255, 255, 255]]]


def test_deep_grey_is_scaled_not_clipped(encode_image):
    sixteen = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    for file_format in ("PNG", "TIFF", "PPM"):
        got = load(encode_image(sixteen, file_format))
        assert (got.mode, np.asarray(got).tolist()) == ("L", [[0, 1, 128, 255]])
    wide = Image.fromarray(np.array([[-100, 0, 100]], np.int32))
    assert np.asarray(load(encode_image(wide, "TIFF"))).tolist() == [[0, 128, 255]]
    for values in ([[0.0, 0.5, 1.0]], [[-10.0, 0.0, 10.0]]):
        assert np.asarray(load(encode_image(Image.fromarray(np.array(values, np.float32)), "TIFF"))).tolist() == [
            [0, 128, 255]
        ]


def test_other_modes_become_grey_or_colour(make_image, encode_image):
    black_and_white = make_image(0).convert("1")
    np.testing.assert_array_equal(
        np.asarray(load(encode_image(black_and_white))), np.asarray(black_and_white.convert("L"))
    )
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert load(encode_image(cmyk, "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    assert load(encode_image(make_image(0).convert("YCbCr"), "JPEG")).mode == "RGB"


@pytest.fixture
def folder(folder_address, make_png):
    fs, path = fsspec.core.url_to_fs(folder_address)
    for name in ("set/a.png", "set/sub/b.png", "outside.png", "set/notes.txt"):
        fs.makedirs(fs._parent(f"{path}/{name}"), exist_ok=True)
        fs.pipe_file(f"{path}/{name}", make_png())
    return ImageFolder(fs, f"{path}/set", f"{path}/set")


def test_paths_stay_in_the_folder(folder):
    def read(path):
        return load_image_bytes(path, folder, allow_urls=False)

    assert (
        read("a.png")
        == read("./sub/../a.png")
        == read(f"{folder.base}/sub/b.png")
        == read({"bytes": None, "path": "a.png"})
    )
    parent = folder.base.removesuffix("/set")
    for path in (
        "../outside.png",
        "sub/../../outside.png",
        f"{parent}/outside.png",
        f"{parent}/set-2/a.png",
        "/etc/a.png",
        "file:///etc/a.png",
    ):
        assert reason_of(lambda path=path: read(path)) == "image_outside", path
    assert reason_of(lambda: read("missing.png")) == "image_not_found"
    assert reason_of(lambda: read("notes.txt")) == "image_suffix"
    assert reason_of(lambda: read("sub")) == "image_suffix"


def test_paths_without_a_folder():
    assert reason_of(lambda: load_image_bytes("a.png", None, allow_urls=True)) == "image_outside"


def test_data_uris(make_png):
    data = make_png()
    assert load_image_bytes("data:image/png;base64," + base64.b64encode(data).decode(), None, allow_urls=False) == data
    for uri in ("data:image/png;base64,@@@", "data:image/svg+xml,<svg/>", "data:"):
        assert reason_of(lambda uri=uri: load_image_bytes(uri, None, allow_urls=False)) == "image_data_uri"


def test_other_values_are_no_images():
    assert reason_of(lambda: load_image_bytes(7, None, allow_urls=False)) == "image_type"
