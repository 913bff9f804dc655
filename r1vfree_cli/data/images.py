"""Image files of raw records: found inside the given folders, checked, and made alike for every later stage."""

import base64
import functools
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..config.schema import TOKEN_SIDE
from ..core import console
from .drops import RowProblem

MAX_ASPECT = 200  # long side / short side; Qwen-VL's resizing refuses more
MAX_PIXELS = 64_000_000  # an image, decoded: 192 MB as RGB
MAX_FILE_BYTES = 256 * 2**20
# Pillow would start Ghostscript for EPS, and few people have tried to break its rarer formats.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
# How JPEG, PNG, GIF, WEBP, BMP and TIFF files begin in base64.
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK)[A-Za-z0-9+/=\s]{60,}")


def normalise_image(data: bytes) -> bytes:
    """Make an image file into one that every later stage reads alike: 8-bit RGB, upright, one frame.

    8-bit RGB PNG and JPEG files without rotation pass through byte for byte. Others are decoded (first frame of an
    animation, transparent parts on white, 16-bit grey scaled by the range that its file declares, other deep grey by
    its own) and written as JPEG (quality 95, no chroma subsampling) when they came from JPEG, else as PNG.

    Raises RowProblem: not an image, corrupt, a side under 28 pixels, over 200 times longer than wide, over 64 million
    pixels (a decompression bomb), or a colour space that cannot become RGB.
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
        if short < TOKEN_SIDE:
            raise RowProblem(f"image side under {TOKEN_SIDE} px")
        if short * long > MAX_PIXELS:
            raise RowProblem("image has too many pixels")
        if long > MAX_ASPECT * short:
            raise RowProblem("image too elongated")
        try:
            image.load()
        except Exception:
            raise RowProblem("truncated or corrupt image") from None
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
            upright = ImageOps.exif_transpose(image) if turned else image
        except Exception:  # every reader of the stored file would stumble too: it is written again without
            upright = image.copy()
        plain = image.mode == "RGB" and upright is image and not image.has_transparency_data
        # PNG's first chunk is IHDR, whose bit depth is byte 24 of the file.
        still_png = data.startswith(b"\x89PNG") and data[24] == 8 and getattr(image, "n_frames", 1) == 1
        if plain and (image.format == "JPEG" or still_png):
            return data
        rgb = _to_rgb(upright, _declared_white(image, data))
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


def _to_rgb(image: Image.Image, white: int) -> Image.Image:
    try:
        if image.mode.startswith("I;16"):
            grey = np.asarray(image, dtype=np.uint16)
            if white == 65535 and 0 < grey.max() < 4096:
                _warn_dark()
            white = white if max(1, grey.max()) <= white <= 65535 else 65535
            scaled = grey // 257 if white == 65535 else grey * (255.0 / white)
            return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            return _stretch(np.asarray(image, dtype=np.float64))
        if image.has_transparency_data:
            above = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
        return image.convert("RGB")
    except (ValueError, OSError, AssertionError):  # the last: a palette image without its palette
        raise RowProblem("image mode cannot become RGB") from None


def _declared_white(image: Image.Image, data: bytes) -> int:
    """White in a 16-bit grey image: what PNG's sBIT or TIFF's MaxSampleValue says, else the full range."""
    head = data[: max(0, data.find(b"IDAT"))] if image.format == "PNG" else b""
    if (at := head.find(b"sBIT")) > 0:
        return 2 ** data[at + 4] - 1
    return int(np.max(getattr(image, "tag_v2", {}).get(ExifTags.Base.MaxSampleValue, 65535)))


@functools.cache
def _warn_dark() -> None:
    console.warn("16-bit grey images with 12 bits or less come out nearly black: their files do not say what white is")


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

    Raises RowProblem: a URL, a path that leaves the roots, no such file.
    """
    if _URL.match(name.removeprefix("file://")):
        raise RowProblem("image is a URL", name[:80])
    if not roots:
        raise RowProblem("image is a path, and image bytes are needed", name[:80])
    outside = None
    try:
        tops = [root.resolve() for root in roots]
        for top in tops:
            path = (top / name.removeprefix("file://")).resolve()
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


def image_bytes(item: Any, roots: Sequence[Path]) -> bytes:
    names = ("bytes", "path", "image", "url")  # as `datasets` has it; verl's {"image"}, OpenAI's {"url"}
    while isinstance(item, dict) and item.keys() & set(names):
        item = next((item[name] for name in names if item.get(name) not in (None, b"", "")), None)
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
