"""The pixels of image files as 8-bit RGB."""

import numpy as np
from PIL import ExifTags, Image

__all__ = ["to_rgb"]

# Formats whose integers of more than 8 bits have 16.
_SIXTEEN_BIT = {"PNG", "PPM"}


# By EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, turn: bool = True) -> Image.Image:
    """The pixels of an image as 8-bit RGB.

    Values of 16 bits are divided by 256, as OpenCV does: their range is 0 to 65535, however much of it an image uses.

    Args:
        image: of any mode.
        turn: turn and mirror the image as its EXIF orientation says.

    Raises:
        ValueError: the image has floating-point or 32-bit pixels, whose range the file does not tell.
    """
    kind = image.format
    image.load()  # which turns some formats already, and then forgets their orientation
    if turn and (method := _TURNS.get(_orientation(image) or 1)) is not None:
        image = image.transpose(method)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in _SIXTEEN_BIT):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are {'32-bit integers' if image.mode == 'I' else 'floating-point numbers'} of an unknown "
            f"range; convert it to 8 or 16 bits"
        )
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data do not damage the pixels
        return None
