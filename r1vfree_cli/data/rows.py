"""The row: what a row of training data holds, and what a raw record must pass to become one.

A row is `id, images, problem, solution, thinking, source`; images are the bytes of PNG or JPEG files. Everything
that cannot become a row raises `RowProblem`, whose reason is counted: nothing is repaired by guessing, and nothing
is dropped without being counted.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..core import prompts

SCHEMA_VERSION = 1
COLUMNS = ("id", "images", "problem", "solution", "thinking", "source")

MIN_SIDE = 28  # pixels; the patch grid of Qwen-VL processors is 14, merged 2 x 2
MAX_ASPECT = 200  # long side / short side; Qwen-VL's resizing refuses more
MAX_PIXELS = 64_000_000  # an image, decoded: 192 MB as RGB
MAX_FILE_BYTES = 256 * 2**20
# Pillow would start Ghostscript for EPS, and few people have tried to break its rarer formats.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
# How JPEG, PNG, GIF, WEBP, BMP and TIFF files begin in base64.
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK)[A-Za-z0-9+/=\s]{60,}")
# Markers that datasets put into a question to say where the image goes. The prompt puts images first, itself.
_IMAGE_MARKER = re.compile(r"<image(?:_?\d+)?>", re.IGNORECASE)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class RowProblem(Exception):
    """A record that cannot become a row.

    `reason` is one of a few fixed texts, so that reasons can be counted; `detail` stands beside the record's place.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Drops:
    """How many records were dropped, by reason, with the first few places of each."""

    def __init__(self, keep_places: int = 5):
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self._keep = keep_places

    def add(self, reason: str, place: str) -> None:
        """Count one record; `place` says where it was, like `questions.jsonl:12`."""
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < self._keep:
            places.append(place)

    @property
    def total(self) -> int:
        return self.counts.total()

    def lines(self) -> list[str]:
        """A line a reason, most frequent first: `12 x missing image (questions.jsonl:3, ...)`."""
        found = []
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            more = ", ..." if count > len(self.places[reason]) else ""
            found.append(f"{count} x {reason} ({', '.join(self.places[reason])}{more})")
        return found


@dataclass(frozen=True)
class RawRow:
    """A record in the row's terms, not yet checked; any field may hold anything.

    images: a list of bytes, paths, base64 texts, data URLs or {"bytes", "path"}; or one of these.
    layout: the layout that it was read as, for the summary.
    left_out: reasons to count for what is not part of the row, such as later turns of a conversation.
    """

    id: Any = None
    images: Any = None
    problem: Any = None
    solution: Any = None
    thinking: Any = None
    layout: str = "rows"
    left_out: list[str] = field(default_factory=list)


# --- images ----------------------------------------------------------------------------------------------------


def normalise_image(data: bytes) -> bytes:
    """Make an image file into one that every later stage reads alike: 8-bit RGB, upright, one frame.

    8-bit RGB PNG and JPEG files without rotation pass through byte for byte. Others are decoded (first frame of an
    animation, transparent parts on white, 16-bit grey scaled by its full range, other deep grey by its own) and
    written as JPEG (quality 95, no chroma subsampling) when they came from JPEG, else as PNG. Metadata that cannot be
    read (EXIF, text, colour profile) is left out.

    Raises:
        RowProblem: not an image, truncated or corrupt, a side under 28 pixels, over 200 times longer than wide,
            over 64 million pixels (a decompression bomb), or a colour space that cannot become RGB.
    """
    if len(data) > MAX_FILE_BYTES:
        raise RowProblem("image file too large")
    try:
        return _normalise(data)
    except RowProblem:
        stripped = _png_without_metadata(data)
        if stripped == data:
            raise
        return _normalise(stripped)


def _normalise(data: bytes) -> bytes:
    try:
        # Only the header is read here: a bomb is refused before it is decoded.
        image = Image.open(io.BytesIO(data), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowProblem("image has too many pixels") from None
    except Exception:  # Pillow's parsers raise many kinds on hostile bytes
        raise RowProblem("not an image") from None
    with image:
        short, long = sorted(image.size)
        if short < MIN_SIDE:
            raise RowProblem(f"image side under {MIN_SIDE} px")
        if short * long > MAX_PIXELS:
            raise RowProblem("image has too many pixels")
        if long > MAX_ASPECT * short:
            raise RowProblem("image too elongated")
        try:
            image.load()
        except Exception:
            raise RowProblem("truncated or corrupt image") from None
        try:
            turn, readable = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1)), True
        except Exception:  # every reader of the stored file would stumble too: it is written again without
            turn, readable = None, False
        plain = image.mode == "RGB" and turn is None and readable and not image.has_transparency_data
        if plain and (image.format == "JPEG" or (_is_8bit_png(data) and getattr(image, "n_frames", 1) == 1)):
            return data
        rgb = _to_rgb(image)
        rgb = rgb if turn is None else rgb.transpose(turn)
        rgb.info.clear()
        out = io.BytesIO()
        if image.format in ("JPEG", "MPO"):
            rgb.save(out, "JPEG", quality=95, subsampling=0)
        else:
            rgb.save(out, "PNG", compress_level=3)
        return out.getvalue()


def _png_without_metadata(data: bytes) -> bytes:
    """A PNG with its pixels, palette, transparency and EXIF alone: Pillow refuses the file for a broken text chunk."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # WEBP and AVIF can be missing from a build


def _is_8bit_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG") and data[24] == 8  # the IHDR chunk comes first; byte 24 is its bit depth


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        if image.mode.startswith("I;16"):
            grey = np.asarray(image, dtype=np.uint16) // 257
            return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            return _stretch(np.asarray(image, dtype=np.float64))
        if image.has_transparency_data:
            above = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
        return image.convert("RGB")
    except (ValueError, OSError):
        raise RowProblem("image mode cannot become RGB") from None


def _stretch(values: np.ndarray) -> Image.Image:
    """(H, W) of any range -> RGB grey, the smallest value black and the largest white."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise RowProblem("truncated or corrupt image")
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


def read_image(roots: Sequence[Path], name: str) -> bytes:
    """The bytes of an image file inside one of `roots`; nothing outside is ever opened, and no URL is fetched.

    A relative name is looked for in each root in turn. An absolute name or a link may lead to any of the roots.

    Raises:
        RowProblem: a URL, a path that leaves the roots, no such file.
    """
    if _URL.match(name):
        raise RowProblem("image is a URL", name[:80])
    if not roots:
        raise RowProblem("image is a path, and image bytes are needed", name[:80])
    outside = None
    try:
        tops = [root.resolve() for root in roots]
        for top in tops:
            path = (top / name).resolve()
            if not any(path.is_relative_to(other) for other in tops):
                outside = path
            elif path.is_file():  # not a pipe or a device, which could block for ever
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise RowProblem("image file too large", name)
                return path.read_bytes()
    except (OSError, RuntimeError, ValueError):  # no permission, name too long, a loop of links, not encodable
        raise RowProblem("unreadable image") from None
    if outside is not None:
        raise RowProblem("image path leaves the root", f"{outside} is outside of {', '.join(map(str, tops))}")
    raise RowProblem("missing image", name)


def _image_bytes(item: Any, roots: Sequence[Path]) -> bytes:
    if isinstance(item, dict) and item.keys() & {"bytes", "path"}:
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
        if item is None:
            raise RowProblem("missing image")
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str):
        raise RowProblem("image is neither bytes nor a path")
    head = _DATA_URL.match(item)
    if head is None and not _BASE64.fullmatch(item):
        return read_image(roots, item)
    try:
        return base64.b64decode("".join(item[head.end() if head else 0 :].split()), validate=True)
    except ValueError:
        raise RowProblem("image is not valid base64") from None


# --- texts -----------------------------------------------------------------------------------------------------


def clean_problem(value: Any) -> str:
    """The question without image markers (`<image>`, `<image_1>`) and outer white space.

    Control tokens of chat templates (`<|im_end|>` and the like) are left as they are: a row is data. Making sure
    that a tokenizer reads them as text is the prompt's work.

    Raises:
        RowProblem: not a string, empty, or not encodable.
    """
    if not isinstance(value, str):
        raise RowProblem("question missing" if value is None else "question is not a string")
    parts = [part.strip() for part in _IMAGE_MARKER.split(value)]
    text = _encodable(" ".join(part for part in parts if part))
    if not text:
        raise RowProblem("empty question")
    return text


def clean_solution(value: Any) -> str | None:
    """The bare reference answer: `<answer> 3 </answer>` becomes `3`; None when there is none, as for NaN.

    Raises:
        RowProblem: neither text nor a finite number, or an answer with tags in it.
    """
    value = _known(value)
    if isinstance(value, float) and math.isinf(value):
        raise RowProblem("solution is not finite")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowProblem("solution is neither text nor a number")
    parsed = prompts.parse(value)
    return _untagged(value if parsed.answer is None and parsed.problem != "empty" else parsed.answer or "")


def clean_thinking(value: Any) -> str | None:
    """The reasoning without its `<think>` tags; None when there is none.

    Raises:
        RowProblem: not text, or other tags in it, which would teach a wrong format.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowProblem("thinking is not text")
    return _untagged(value.strip().removeprefix("<think>").removesuffix("</think>"))


def _untagged(text: str) -> str | None:
    text = _encodable(text.strip())
    if any(tag in text for tag in _TAGS):
        raise RowProblem("tags inside the reference answer")
    return text or None


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can carry and UTF-8 cannot
        raise RowProblem("text is not valid Unicode") from None
    return text


# --- the row ---------------------------------------------------------------------------------------------------


def clean_id(value: Any, fallback: str) -> str:
    """The record's id as text; `fallback` when it has none. Whole floats are integers: tables with gaps hold such.

    Raises:
        RowProblem: neither a string nor a number.
    """
    if value is None or value == "":
        return fallback
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowProblem("id is neither a string nor a number")
    return _encodable(str(int(value) if isinstance(value, float) and value.is_integer() else value))


def make_row(
    raw: RawRow, *, source: str, fallback_id: str, roots: Sequence[Path] = (), text_only: bool = False
) -> dict:
    """Check and normalise one record.

    Args:
        raw: the record; NaN anywhere in it, as tables with gaps hold, is none.
        source: name of the source, kept in the row.
        fallback_id: the id of a record without one.
        roots: folders that image paths are looked for in, none when images must come as bytes.
        text_only: whether a row may have no image (HallusionBench has such questions; training data has not).

    Returns:
        A dict with the keys of `COLUMNS`; `images` is a list of bytes.

    Raises:
        RowProblem: with the reason to count.
    """
    items = _known(raw.images)
    if items is None:
        items = []
    elif isinstance(items, str | bytes | dict) or not isinstance(items, Sequence):
        items = [items]
    row = {
        "id": clean_id(_known(raw.id), fallback_id),
        "problem": clean_problem(_known(raw.problem)),
        "solution": clean_solution(_known(raw.solution)),
        "thinking": clean_thinking(_known(raw.thinking)),
        "source": source,
    }
    if not items and not text_only:
        raise RowProblem("no image")
    return row | {"images": [normalise_image(_image_bytes(item, roots)) for item in items]}


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
