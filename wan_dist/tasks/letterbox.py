"""Images scaled to fit into a size, black around them, with OpenCV's arithmetic, as the references use it."""

import math

import numpy as np

_WEIGHT_BITS = 11
"""Of the fixed-point weights of `resize_bilinear`."""
_MIN_OVERLAP = 1e-3
"""Share of a pixel from which on it counts in `resize_by_area`."""


def compute_fitted_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of an image scaled to fit into ``size``."""
    (image_width, image_height), (width, height) = image_size, size
    if image_height / image_width > height / width:
        return int(height / image_height * image_width), height
    return width, int(width / image_width * image_height)


def fit_on_black(
    image: np.ndarray, size: tuple[int, int], *, shrinks_by_area: bool = False
) -> np.ndarray:
    """Return an image (h, w, 3) in 8 bits scaled to fit into ``size`` (width, height), black around it.

    Bilinear; with ``shrinks_by_area`` by the mean of areas where ``size`` has fewer pixels than the image.
    """
    width, height = size
    image_height, image_width = image.shape[:2]
    fitted_size = compute_fitted_size((image_width, image_height), size)
    is_shrunk = shrinks_by_area and width * height < image_width * image_height
    resize = resize_by_area if is_shrunk else resize_bilinear
    left, top = (width - fitted_size[0]) // 2, (height - fitted_size[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + fitted_size[1], left : left + fitted_size[0]] = resize(image, fitted_size)
    return canvas


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an image (h, w, 3) in 8 bits scaled to ``size`` (width, height).

    Bilinear without antialiasing, in fixed point as OpenCV's INTER_LINEAR: the references' images are
    enlarged by it, and rounding floats instead changes every eighth pixel.
    """
    if (image.shape[1], image.shape[0]) == size:
        return image
    pixels = image.astype(np.int64)
    (left, right, left_weights, right_weights) = _list_taps(image.shape[1], size[0])
    rows = (
        pixels[:, left] * left_weights[:, None] + pixels[:, right] * right_weights[:, None]
    ) >> 4
    (upper, lower, upper_weights, lower_weights) = _list_taps(image.shape[0], size[1])
    sums = (rows[upper] * upper_weights[:, None, None] >> 16) + (
        rows[lower] * lower_weights[:, None, None] >> 16
    )
    return ((sums + 2) >> 2).clip(0, 255).astype(np.uint8)


def _list_taps(length: int, new_length: int) -> tuple[np.ndarray, ...]:
    """Return for each new pixel the indices of two pixels, and their fixed-point weights."""
    positions = (np.arange(new_length) + 0.5) * (length / new_length) - 0.5
    first = np.floor(positions).astype(np.int64)
    fraction = (positions - first).astype(np.float32)
    weights = [
        np.rint(part * 2**_WEIGHT_BITS).astype(np.int64) for part in (1 - fraction, fraction)
    ]
    return first.clip(0, length - 1), (first + 1).clip(0, length - 1), *weights


def resize_by_area(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an image (h, w, 3) in 8 bits shrunk to ``size`` (width, height), as OpenCV's INTER_AREA.

    Each new pixel is the mean of the area that it covers.
    """
    if (image.shape[1], image.shape[0]) == size:
        return image
    columns = _list_area_weights(image.shape[1], size[0])
    rows = _list_area_weights(image.shape[0], size[1])
    pixels = image.astype(np.float32)
    shrunk = np.einsum("yh,hxc->yxc", rows, np.einsum("xw,hwc->hxc", columns, pixels))
    return np.rint(shrunk).clip(0, 255).astype(np.uint8)


def _list_area_weights(length: int, new_length: int) -> np.ndarray:
    """Return (new_length, length) float32: the share of each pixel in each new one."""
    weights = np.zeros((new_length, length), np.float32)
    scale = length / new_length
    for index in range(new_length):
        start, stop = index * scale, (index + 1) * scale
        width = min(scale, length - start)
        first, last = math.ceil(start), min(math.floor(stop), length - 1)
        first = min(first, last)
        if first - start > _MIN_OVERLAP:
            weights[index, first - 1] = (first - start) / width
        weights[index, first:last] = 1 / width
        if stop - last > _MIN_OVERLAP:
            weights[index, last] = min(stop - last, 1.0, width) / width
    return weights
