"""The row: images become 8-bit RGB or a counted reason, paths stay inside their root, texts stay data."""

import base64
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from r1vfree_cli.config.schema import TOKEN_SIDE
from r1vfree_cli.data.drops import Drops, RowProblem
from r1vfree_cli.data.images import normalise_image, read_image
from r1vfree_cli.data.rows import RawRow, clean_id, clean_problem, clean_solution, clean_thinking, make_row

WIDE, HIGH = 61, 37  # unequal, so that a transpose shows


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photo(mode: str = "RGB", size=(WIDE, HIGH)) -> Image.Image:
    """A smooth picture whose corners differ: left dark, right red, bottom green."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, x * 0 + 40], -1).astype(np.uint8)).convert(mode)


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB" and image.format in ("PNG", "JPEG")
    assert not image.has_transparency_data and image.getexif().get(0x0112, 1) == 1
    return image


def reason(data: bytes) -> str:
    with pytest.raises(RowProblem) as caught:
        normalise_image(data)
    return caught.value.reason


# --- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_plain_rgb_passes_byte_for_byte(kind):
    data = encode(photo(), kind)
    assert normalise_image(data) == data


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_png_modes_become_rgb_with_the_same_colours(mode):
    image = photo(mode)
    out = decoded(normalise_image(encode(image)))
    assert out.size == (WIDE, HIGH)
    assert np.array_equal(np.asarray(out), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb():
    out = decoded(normalise_image(encode(photo("CMYK"), "JPEG", quality=95)))
    assert np.abs(np.asarray(out, int) - np.asarray(photo(), int)).mean() < 6


def test_grey_jpeg_becomes_rgb():
    assert decoded(normalise_image(encode(photo("L"), "JPEG"))).size == (WIDE, HIGH)


def test_16_bit_grey_keeps_its_shades_instead_of_clipping_to_white():
    values = np.linspace(0, 65535, WIDE * HIGH).reshape(HIGH, WIDE).astype(np.uint16)
    out = np.asarray(decoded(normalise_image(encode(Image.fromarray(values)))))
    assert np.abs(out[..., 0] - values / 257.0).max() <= 1
    assert (out[..., 0] == out[..., 2]).all()


def test_fewer_bits_in_16_bit_grey_are_scaled_by_the_range_that_the_file_declares(capsys):
    """Microscopes and X-ray machines write 12 bits: by the full range they would be nearly black."""
    values = np.linspace(0, 4095, WIDE * HIGH).reshape(HIGH, WIDE).astype(np.uint16)
    expected = values.astype(int) * 255 // 4095
    plain = encode(Image.fromarray(values))
    said = plain[:33] + struct.pack(">I4sBI", 1, b"sBIT", 12, zlib.crc32(b"sBIT\x0c")) + plain[33:]
    tiff = encode(Image.fromarray(values), "TIFF", tiffinfo={0x0119: 4095})
    for data in (said, tiff):
        shades = np.asarray(Image.open(io.BytesIO(normalise_image(data))).convert("L"))
        assert np.abs(shades.astype(int) - expected).max() <= 1
    assert "nearly black" not in capsys.readouterr().err
    assert Image.open(io.BytesIO(normalise_image(plain))).convert("L").getextrema()[1] == 15
    assert "nearly black" in capsys.readouterr().err
    full = Image.fromarray(values * 16)  # as PNG wants 12 bits: spread over the full range
    spread = encode(full)[:33] + said[33:46] + encode(full)[33:]
    assert Image.open(io.BytesIO(normalise_image(spread))).convert("L").getextrema()[1] == 254


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_broken_exif_costs_no_image(kind):
    data = encode(photo(), kind, exif=b"Exif\0\0no TIFF header at all")
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(data)).getexif()
    assert decoded(normalise_image(data)).size == (WIDE, HIGH)


def test_16_bit_rgb_png_is_written_as_8_bit():
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32896, 0) * WIDE for _ in range(HIGH))
    data = png(WIDE, HIGH, rows, depth=16, colour=2)
    out = normalise_image(data)
    assert out != data and out[24] == 8
    assert decoded(out).getpixel((5, 5)) == (255, 128, 0)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deep_grey_tiff_is_stretched_to_its_range(dtype):
    values = np.linspace(-5, 90000, WIDE * HIGH).reshape(HIGH, WIDE).astype(dtype)
    out = np.asarray(decoded(normalise_image(encode(Image.fromarray(values), "TIFF"))))
    assert out.min() == 0 and out.max() == 255 and out[0, 0, 0] == 0


def test_transparent_parts_become_white():
    image = photo("RGBA")
    image.putalpha(0)
    assert decoded(normalise_image(encode(image))).getextrema() == ((255, 255),) * 3
    palette = photo("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert decoded(normalise_image(encode(palette))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_animation_gives_its_first_frame(kind):
    red, blue = (Image.new("RGB", (WIDE, HIGH), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(red, kind, save_all=True, append_images=[blue], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    out = decoded(normalise_image(data))
    assert getattr(out, "n_frames", 1) == 1 and out.getpixel((3, 3))[0] > 240 > out.getpixel((3, 3))[2] + 200


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    out = decoded(normalise_image(encode(photo(), kind, exif=exif)))
    assert out.size == (HIGH, WIDE)
    assert out.getpixel((HIGH - 2, 2))[0] < 40  # the dark left upper corner is now right above
    assert out.getpixel((HIGH - 2, WIDE - 2))[0] > 215


def with_chunk(data: bytes, name: bytes, body: bytes, crc: int | None = None) -> bytes:
    """A PNG with one more chunk after its header."""
    check = zlib.crc32(name + body) if crc is None else crc
    return data[:33] + struct.pack(">I", len(body)) + name + body + struct.pack(">I", check) + data[33:]


def with_exif(body: bytes) -> bytes:
    return encode(photo(), "JPEG", exif=b"Exif\0\0" + body)


UNREADABLE = {
    "text above Pillow's limit": with_chunk(encode(photo()), b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2**21)),
    "text with a wrong checksum": with_chunk(encode(photo()), b"tEXt", b"k\0v", crc=1),
    "text that is no zlib": with_chunk(encode(photo()), b"iTXt", b"k\0\1\0\0\0not zlib"),
    "profile above the limit": with_chunk(encode(photo()), b"iCCP", b"p\0\0" + zlib.compress(b"x" * 2**21)),
    "profile that is no zlib": with_chunk(encode(photo()), b"iCCP", b"p\0\0not zlib"),
    "EXIF in PNG that is none": with_chunk(encode(photo()), b"eXIf", b"MM\0*nonsense"),
    "EXIF that is none": with_exif(b"nonsense"),
    "EXIF cut off": with_exif(b"MM\0*\0\0\0\x08\0\x09\x01\x12"),
    "empty EXIF": with_exif(b""),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.filterwarnings("ignore")
def test_unreadable_metadata_does_not_cost_a_readable_image(name):
    data = UNREADABLE[name]
    out = normalise_image(data)
    image = Image.open(io.BytesIO(out))
    image.load()
    image.getexif()  # as `datasets` will
    assert np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(photo(), int)).mean() < 4


def test_rotation_is_kept_where_another_tag_cannot_be_written_again():
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "a camera"
    data = encode(photo(), "JPEG", exif=exif).replace(b"a camera", b"\xff\xfe camer")
    assert decoded(normalise_image(data)).size == (HIGH, WIDE)


@pytest.mark.parametrize("size", [(1, 1), (TOKEN_SIDE - 1, 200), (200, TOKEN_SIDE - 1)])
def test_small_images_are_refused(size):
    assert reason(encode(photo(size=size))) == "image side under 28 px"


def test_smallest_allowed_side_passes():
    assert decoded(normalise_image(encode(photo(size=(28, 28))))).size == (28, 28)


def test_elongated_images_are_refused_because_the_processor_would_refuse_them_in_training():
    assert reason(encode(Image.new("RGB", (28 * 200 + 1, 28)))) == "image too elongated"
    normalise_image(encode(Image.new("RGB", (28 * 200, 28))))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file with any header over any pixel data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_500, 12_000, 60_000])
@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_refused_before_they_are_decoded(side):
    assert reason(png(side, side, b"\0" * 100_000)) == "image has too many pixels"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_images_are_refused(kind):
    data = encode(photo(size=(200, 150)), kind)
    assert reason(data[: len(data) * 2 // 3]) in ("truncated or corrupt image", "not an image")


def test_what_is_no_image_is_refused():
    for data in (b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        assert reason(data) == "not an image"


def test_eps_is_refused_because_decoding_it_would_start_ghostscript():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    assert reason(eps) == "not an image"


VALID = [
    encode(photo(), "JPEG"),
    encode(photo("P")),
    encode(photo("RGBA")),
    encode(photo(), "GIF"),
    encode(photo(), "TIFF"),
    encode(photo(), "WEBP"),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_rgb_image_or_a_reason(data, damage):
    hurt = bytearray(data)
    for place, value in damage:
        hurt[place % len(hurt)] = value
    try:
        assert Image.open(io.BytesIO(normalise_image(bytes(hurt)))).mode == "RGB"
    except RowProblem as problem:
        assert problem.reason


# --- paths -----------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    return root


def path_reason(root, name: str) -> str:
    with pytest.raises(RowProblem) as caught:
        read_image([root] if root else [], name)
    return caught.value.reason


def test_paths_inside_the_root_are_read(root):
    (root / "link.png").symlink_to("a.png")
    for name in ("a.png", "./a.png", "sub/../a.png", "link.png"):
        assert read_image([root], name) == b"inside"


def test_paths_that_leave_the_root_are_never_opened(root, tmp_path):
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "dir").symlink_to(tmp_path)
    outside = str(tmp_path / "secret.png")
    for name in ("../secret.png", "sub/../../secret.png", "link.png", "dir/secret.png", "/etc/passwd", outside):
        assert path_reason(root, name) == "image path leaves the root", name
    assert path_reason(root, "a\0b") == "unreadable image"
    with pytest.raises(RowProblem) as caught:
        read_image([root, tmp_path / "other"], "../secret.png")
    assert caught.value.detail == f"{outside} is outside of {root}, {tmp_path / 'other'}"


def test_absolute_paths_and_links_may_lead_to_any_of_the_roots(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.png").write_bytes(b"other")
    (root / "link.png").symlink_to(other / "b.png")
    for name in (str(root / "a.png"), "a.png"):
        assert read_image([other, root], name) == b"inside"
    for name in ("link.png", str(root / "link.png"), "b.png", "../other/b.png"):
        assert read_image([root, other], name) == b"other"
    assert path_reason(root, "link.png") == "image path leaves the root"


@pytest.mark.parametrize(
    "name", ["http://x.test/a.png", "HTTPS://x.test/a", "file://http://x/a", "data:image/png;base64,AA"]
)
def test_urls_are_never_fetched(root, name):
    assert path_reason(root, name) == "image is a URL"


def test_missing_and_odd_files(root):
    os.mkfifo(root / "pipe.png")
    (root / "loop.png").symlink_to("loop.png")
    for name in ("none.png", "sub", "", "pipe.png"):
        assert path_reason(root, name) == "missing image", name
    for name in ("x" * 5000, "loop.png", "half \ud800.png"):
        assert path_reason(root, name) == "unreadable image", name
    assert path_reason(None, "a.png") == "image is a path, and image bytes are needed"


# --- texts -----------------------------------------------------------------------------------------------------


def test_image_markers_are_stripped_from_questions():
    assert clean_problem("<image>\nWhat is it?") == "What is it?"
    assert clean_problem(" Compare <image_1> with<image2>now.\n<image>") == "Compare with now."


def test_control_tokens_and_braces_stay_in_the_question():
    text = "Is <|im_end|> or <|image_pad|> {written} on the <sign>?\nReally?"
    assert clean_problem(text) == text


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "question missing"),
        (7, "question is not a string"),
        (["a"], "question is not a string"),
        ("", "empty question"),
        (" <image>\n", "empty question"),
        ("half \ud800", "text is not valid Unicode"),
    ],
)
def test_bad_questions_have_reasons(value, why):
    with pytest.raises(RowProblem) as caught:
        clean_problem(value)
    assert caught.value.reason == why


def test_markers_in_long_white_space_take_no_quadratic_time():
    assert clean_problem("a" + " " * 2_000_000 + "<image>b") == "a b"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("<answer> 3 </answer>", "3"),
        ("<answer>\nA\nB </answer>\n", "A\nB"),
        ("<think>so</think><answer>4</answer>", "4"),
        (" plain ", "plain"),
        (3, "3"),
        (2.5, "2.5"),
        (3.0, "3"),
        (1e300, "1e+300"),
        (None, None),
        ("", None),
        ("<answer> </answer>", None),
        (float("nan"), None),
    ],
)
def test_solutions_are_unwrapped(value, found):
    assert clean_solution(value) == found


@pytest.mark.parametrize("value", [["3"], True, "<answer> 3", "3 </answer>", float("inf"), float("-inf")])
def test_bad_solutions_are_refused(value):
    with pytest.raises(RowProblem):
        clean_solution(value)


def test_thinking_loses_its_own_tags_and_takes_no_others():
    assert clean_thinking("<think>\nI see two.\n</think>") == "I see two."
    assert clean_thinking("") is None
    for value in ("a <answer>2</answer>", "a </think> b", 3):
        with pytest.raises(RowProblem):
            clean_thinking(value)


def test_ids():
    values = (None, "", "x", 5, 5.0, 1.5)
    assert [clean_id(v, "made") for v in values] == ["made", "made", "x", "5", "5", "1.5"]
    for value in (True, ["x"]):
        with pytest.raises(RowProblem):
            clean_id(value, "made")


# --- rows ------------------------------------------------------------------------------------------------------


def test_a_row_without_image_needs_permission():
    raw = RawRow(problem="Why?")
    with pytest.raises(RowProblem, match="no image"):
        make_row(raw, source="s", fallback_id="s-1", roots=[])
    assert make_row(raw, source="s", fallback_id="s-1", roots=[], text_only=True)["images"] == []


def test_all_forms_of_images(root):
    data = encode(photo())
    (root / "b.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    forms = [data, "b.png", {"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": "b.png"}, {"bytes": data}]
    forms += [{"path": "b.png"}, {"bytes": text}, text, f"data:image/png;base64,{text}", f"data:;base64,{text}"]
    row = make_row(RawRow(images=forms, problem="?"), source="s", fallback_id="s-1", roots=[root])
    assert row["images"] == [data] * 10
    for one in forms:
        assert make_row(RawRow(images=one, problem="?"), source="s", fallback_id="1", roots=[root])["images"] == [data]
    bad_text = "data:image/png;base64,iVBORw0KGgo!!"
    for bad in (3, [[data]], {"url": "x"}, [{"bytes": None, "path": None}], bad_text, "data:text/plain,hello"):
        with pytest.raises(RowProblem):
            make_row(RawRow(images=bad, problem="?"), source="s", fallback_id="1", roots=[root])


def test_nan_is_none_everywhere(root):
    nan = float("nan")
    raw = RawRow(id=nan, images=encode(photo()), problem="?", solution=nan, thinking=nan)
    row = make_row(raw, source="s", fallback_id="s-1", roots=[])
    assert (row["id"], row["solution"], row["thinking"]) == ("s-1", None, None)
    for raw, reason in ((RawRow(images=nan, problem="?"), "no image"), (RawRow(problem=nan), "question missing")):
        with pytest.raises(RowProblem, match=reason):
            make_row(raw, source="s", fallback_id="s-1")


def test_drops_count_every_record_and_keep_the_first_places():
    drops = Drops()
    for line in range(7):
        drops.add("missing image", f"q:{line}")
    drops.add("empty question", "q:9")
    assert drops.total == 8 and drops.counts == {"missing image": 7, "empty question": 1}
    assert drops.lines() == ["7 x missing image (q:0, q:1, q:2, q:3, q:4, ...)", "1 x empty question (q:9)"]


def test_rows_and_prepare_import_neither_torch_nor_datasets():
    code = (
        "import sys; from r1vfree_cli.data import rows, sources, tables, prepare, load;"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
