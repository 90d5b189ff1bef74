"""Antialiased resizing of 8-bit frames, bit for bit as torch does it and with it the reference's video processor.

Pillow's filters are the same, but it may take the columns first, and it rounds weights to 22 bits where torch rounds
them to 16: up to seven steps of 255 apart on photographs. The formulas are those of torch's `UpSampleKernel.cpp`
(`compute_index_ranges_int16_weights`): weights in float64, normalised, rounded to 16 bits; rows first, then columns,
with a rounding to bytes between.
"""

import functools

import numpy as np
import PIL.Image

# Outputs computed by one matrix product: enough to be fast, few enough to skip most zeros of the band.
_OUTPUTS = 16
# Rows of an image resampled together: their temporaries stay in the processor's cache.
_LINES = 128
# OpenBLAS keeps products of at most this many multiplications on the calling thread. Images are spread over threads
# already, and waiting for each other inside BLAS as well made them a hundred times slower on a busy machine.
_PRODUCT = 2**18


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5."""
    x = np.abs(x)
    a = -0.5
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


# Half the width of each filter at scale 1, in pixels, and its value at a distance.
_FILTERS = {
    PIL.Image.Resampling.BILINEAR: (1.0, _triangle),
    PIL.Image.Resampling.BICUBIC: (2.0, _cubic),
    PIL.Image.Resampling.LANCZOS: (3.0, _lanczos),
}
FILTERS = frozenset(_FILTERS)


@functools.lru_cache(maxsize=128)
def _bands(size: int, new_size: int, resample: int) -> list[tuple[int, int, np.ndarray]]:
    """The resampling as matrices, each for the next `_OUTPUTS` outputs.

    Returns:
        (low, high, weights [outputs, high - low]) for each, to multiply inputs low..high with: multiples of 2**-bits in
        floating point.
    """
    support, kernel = _FILTERS[PIL.Image.Resampling(resample)]
    scale = size / new_size
    stretch = max(scale, 1.0)
    center = scale * (np.arange(new_size) + 0.5)
    first = np.maximum((center - support * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support * stretch + 0.5).astype(np.int64), size)
    taps = first[:, None] + np.arange((last - first).max())
    weights = kernel((taps - center[:, None] + 0.5) * (1.0 / stretch))
    weights = np.where(taps < last[:, None], weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    weights *= 1 << bits
    weights = np.trunc(np.where(weights < 0, weights - 0.5, weights + 0.5))

    # Sums of products of whole numbers are exact in floating point up to 24 bits, or 53; also divided by 2**bits.
    exact = np.abs(weights).sum(axis=1).max() * 255 + (1 << bits) < 2**24
    bands = []
    for start in range(0, new_size, _OUTPUTS):
        outputs = slice(start, start + _OUTPUTS)
        low, high = int(first[outputs].min()), int(last[outputs].max())
        # Taps past the end have no weight; one spare column takes them.
        band = np.zeros((len(first[outputs]), high - low + 1), np.float32 if exact else np.float64)
        columns = np.minimum(taps[outputs] - low, high - low)
        band[np.arange(len(band))[:, None], columns] = weights[outputs] / (1 << bits)
        bands.append((low, high, np.ascontiguousarray(band[:, :-1])))
    return bands


def _resize_lines(lines: np.ndarray, new_size: int, resample: int) -> np.ndarray:
    """Resample [size, N] bytes along the first axis to [new_size, N]."""
    bands = _bands(lines.shape[0], new_size, resample)
    values = lines.astype(bands[0][2].dtype)
    resized = np.empty((new_size, lines.shape[1]), np.uint8)
    for index, (low, high, weights) in enumerate(bands):
        target = resized[index * _OUTPUTS : (index + 1) * _OUTPUTS]
        step = max(1, _PRODUCT // weights.size)
        for start in range(0, lines.shape[1], step):
            sums = weights @ values[low:high, start : start + step]
            sums += 0.5
            target[:, start : start + step] = sums.clip(0, 255, out=sums)  # as bytes, the fraction is dropped
    return resized


def resize_bytes(image: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resize [H, W, C] uint8 like `torchvision.transforms.v2.functional.resize(..., antialias=True)` on the CPU.

    `resample` is one of `FILTERS`: bilinear, bicubic or Lanczos. Returns [height, width, C] uint8.
    """
    rows, columns, channels = image.shape
    if columns != width:
        narrowed = np.empty((rows, width, channels), np.uint8)
        for start in range(0, rows, _LINES):
            part = image[start : start + _LINES]
            lines = _resize_lines(part.transpose(1, 0, 2).reshape(columns, -1), width, resample)
            narrowed[start : start + _LINES] = lines.reshape(width, -1, channels).transpose(1, 0, 2)
        image = narrowed
    if rows != height:
        flat = image.reshape(rows, -1)
        resized = np.empty((height, flat.shape[1]), np.uint8)
        for start in range(0, flat.shape[1], 16 * _LINES):
            stop = start + 16 * _LINES
            resized[:, start:stop] = _resize_lines(flat[:, start:stop], height, resample)
        image = resized.reshape(height, width, channels)
    return image
