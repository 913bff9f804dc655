"""Pictures of a report's rollouts and questions: found where the run's or eval's data lies, shrunk, stored once."""

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..config.embedded import with_seed
from ..core.errors import R1VError
from ..data.drops import RowProblem
from ..data.images import normalise_image
from ..data.load import find_rows
from .plots import MARK

MAX_SIDE = 440  # px; twice the width that the page gives a picture
_PNG_BYTES = 24_000  # drawings are smaller as PNG and stay sharp; photographs become JPEG


Album = dict[str, bytes]  # file name -> the pictures of one report; the same image is there once


def add_picture(album: Album, data: bytes | None, alt: str) -> dict[str, Any] | None:
    """Shrink an encoded image and keep it: `file`, `uri`, `width` and `height` in px, `alt`; None when there is none or
    it cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(normalise_image(data or b"")))
    except RowProblem:  # the report goes on without the picture and says so
        return None
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    out, kind = io.BytesIO(), "png"
    image.save(out, "PNG", pnginfo=info, optimize=True)
    if out.tell() > _PNG_BYTES:
        out, kind = io.BytesIO(), "jpeg"
        image.save(out, "JPEG", quality=82, comment=MARK.encode())
    small = out.getvalue()
    name = f"report-image-{hashlib.sha256(small).hexdigest()[:10]}.{'jpg' if kind == 'jpeg' else kind}"
    album[name] = small
    uri = f"data:image/{kind};base64,{base64.b64encode(small).decode()}"
    return {"file": name, "uri": uri, "width": image.width, "height": image.height, "alt": alt}


def row_images(recipe: dict, ids: set[str]) -> tuple[dict[str, bytes], str | None]:
    """First image (encoded) of the rows with these ids in a recipe's data, and a note where some are not found. Nothing
    is downloaded or prepared: of a hub dataset only what is in the cache is read."""
    data = recipe.get("data") or {}
    path, split, without = str(data.get("path") or ""), data.get("split") or "train", "so its rollouts have no images"
    if not ids:
        return {}, None
    if not path:
        return {}, f"the recipe names no data, {without}"
    try:
        folder = find_rows(with_seed(path, (recipe.get("train") or {}).get("seed", 42)), split)
    except R1VError as e:
        return {}, f"the data {path} cannot be read, {without}: {e.message}"
    folder = folder or Path(path)  # not prepared yet; its ids and images are there all the same
    if not folder.exists():
        return {}, f"the data {path} is not on this machine, {without}"
    found = _scan(folder, split, ids)
    missing = len(ids - set(found))
    return found, f"{missing} of {len(ids)} images are not in the data {path}" if missing else None


def _scan(place: Path, split: str, ids: set[str]) -> dict[str, bytes]:
    """Read ids first and images only of the row groups that hold one of them: data can be many GB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [place] if place.is_file() else sorted(place.glob(f"{split}-*.parquet")) or sorted(place.glob("*.parquet"))
    found: dict[str, bytes] = {}
    for file in files:
        try:
            shard = pq.ParquetFile(file)
            names = shard.schema_arrow.names
            column = "images" if "images" in names else "image"
            for group in range(shard.num_row_groups):
                have = map(str, shard.read_row_group(group, columns=["id"])["id"].to_pylist())
                wanted = {i: row_id for i, row_id in enumerate(have) if row_id in ids - found.keys()}
                rows = shard.read_row_group(group, columns=[column])[column].take(list(wanted)) if wanted else []
                for row_id, row in zip(wanted.values(), rows):
                    value = row.as_py()
                    first = (value or [None])[0] if isinstance(value, list) else value
                    image = first.get("bytes") if isinstance(first, dict) else first
                    if isinstance(image, bytes):
                        found[row_id] = image
        except (pa.ArrowException, OSError, KeyError):
            continue  # a damaged shard, or one without such columns: its images are counted as not found
    return found
