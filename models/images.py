"""Images from anywhere to what every family takes: a loaded RGB image, or an error that says what is wrong with it."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flowmm.errors import InputError

ImageSource = str | Path | bytes | Image.Image


def open_image(source: ImageSource) -> Image.Image:
    """Open, check and normalise one image.

    Args:
        source: path, ``file:`` or ``data:image/...;base64,`` URL, the bytes of an image file, or a PIL image (which
            is not modified).

    Returns:
        A loaded 8-bit RGB image, turned upright by its EXIF orientation, transparency laid on white; of an animated
        image the first frame; 16-bit grey levels reduced to 8 bits.

    Raises:
        InputError: missing file, directory, unreadable, not an image, truncated or corrupt, empty, too large to
            decode safely (Pillow's decompression-bomb limit), a web address, or floating-point pixels.
    """
    label = describe_image(source)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_open_bytes(source, label))
        if 0 in image.size:
            raise InputError(f"{label}: the image is empty ({image.width} x {image.height} pixels)")
        if not isinstance(source, Image.Image):
            image.seek(0)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), label)
    except UnidentifiedImageError as error:
        raise InputError(f"{label}: not an image Pillow can read; expected PNG, JPEG, WebP or the like") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{label}: too many pixels to decode safely ({error}); scale the image down first") from error
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise InputError(f"{label}: the image is corrupt or truncated ({error}); export or copy it again") from error


def describe_image(source: object) -> str:
    """How messages name an image: its path, or what kind of object it is."""
    if isinstance(source, (str, Path)):
        text = str(source)
        return f"image {text[:40] + '...' if text.startswith('data:') else text!r}"
    return f"image given as {'bytes' if isinstance(source, bytes) else type(source).__name__}"


def _open_bytes(source: object, label: str) -> io.BytesIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        raise InputError(f"{label}: expected a path, bytes or a PIL image")
    if isinstance(source, str) and source.startswith("data:"):
        return io.BytesIO(_decode_data_url(source, label))
    return io.BytesIO(_read_file(_local_path(source, label), label))


def _decode_data_url(url: str, label: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise InputError(f"{label}: expected data:image/<type>;base64,<data>")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise InputError(f"{label}: the base64 data is damaged ({error})") from error


def _local_path(source: str | Path, label: str) -> Path:
    if isinstance(source, Path):
        return source
    scheme = urlsplit(source).scheme.lower() if "://" in source else ""
    if scheme in ("http", "https"):
        raise InputError(f"{label}: flowmm does not download images; save it to a file and pass the path")
    if scheme == "file":
        return Path(unquote(urlsplit(source).path))
    return Path(source).expanduser()


def _read_file(path: Path, label: str) -> bytes:
    try:
        if path.is_dir():
            raise InputError(f"{label}: is a directory; expected an image file")
        if not path.exists():
            raise InputError(f"{label}: no such file")
        if not path.is_file():
            raise InputError(f"{label}: not a regular file; expected an image file")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{label}: cannot be read ({error})") from error
    if not content:
        raise InputError(f"{label}: the file is empty")
    return content


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode == "F":
        raise InputError(f"{label}: has floating-point pixels of unknown range; save it with 8 bits per channel")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((levels // 256 if levels.max() > 255 else levels).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")
