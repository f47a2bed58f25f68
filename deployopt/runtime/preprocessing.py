"""The one evaluation preprocessing: evaluation, calibration, predict and devices all decode, resize and crop here.

NumPy, and Pillow only where an image is really decoded or resized. Normalisation is not here: it is inside the network.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Mapping, NamedTuple, Optional, Tuple, Union

from deployopt.errors import ArtifactError, MissingDependency, UsageError

if TYPE_CHECKING:
    import numpy as np

    Image = np.ndarray
else:
    Image = Any  # naming a type is no reason to load NumPy

PREPROCESSING_KEY = "deployopt.preprocessing"  # in an ONNX file, written by the export stage


class Preprocessing(NamedTuple):
    """How a stored image becomes the network's input.

    Attributes:
        image_size: height and width of the input.
        channels: 3 (RGB) or 1; a grey image is repeated to 3.
        resize: shorter side before the centre crop; None resizes straight to image_size × image_size.
        mean, std: of 0–1 values, per channel; applied inside the network.
    """

    image_size: int
    channels: int = 3
    resize: Optional[int] = None
    mean: Tuple[float, ...] = (0.0, 0.0, 0.0)
    std: Tuple[float, ...] = (1.0, 1.0, 1.0)

    def to_json(self) -> Dict[str, Any]:
        return {**self._asdict(), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Preprocessing":
        return Preprocessing(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})


def decode(source: Union[str, Path, bytes], channels: int = 3) -> Image:
    """Decode an image file, upright (its EXIF orientation is applied).

    Args:
        source: a path, or the file's bytes.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma, as Pillow's mode "L").

    Returns:
        uint8 [h, w, channels].

    Raises:
        ArtifactError: not an image, or a truncated one; names the file.
    """
    import numpy as np

    pillow = _pillow("to decode images")
    name = "the given bytes" if isinstance(source, bytes) else str(source)
    try:
        with pillow.Image.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as opened:
            upright = pillow.ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16-bit grey, which `convert` clips at 255 instead of scaling
                upright = pillow.Image.fromarray(np.rint(np.clip(np.asarray(upright) / 257.0, 0, 255)).astype(np.uint8))
            pixels = np.array(upright.convert("RGB" if channels == 3 else "L"))
    except FileNotFoundError as exc:
        raise ArtifactError("{}: no such image".format(name)) from exc
    except (OSError, SyntaxError, ValueError, pillow.Image.DecompressionBombError) as exc:
        raise ArtifactError("{}: cannot be decoded as an image ({})".format(name, exc), "remove or replace this file") from exc
    return pixels.reshape(pixels.shape[0], pixels.shape[1], channels)


def apply(image: Image, preprocessing: Preprocessing) -> Image:
    """Resize and centre-crop one image as torchvision's `Resize` (antialiased bilinear) and `CenterCrop` do on a PIL image.

    Args:
        image: uint8 [h, w, 1 or 3].

    Returns:
        uint8 [image_size, image_size, channels].

    Raises:
        UsageError: `resize` is smaller than `image_size`.
    """
    import numpy as np

    size = preprocessing.image_size
    if preprocessing.resize is not None and preprocessing.resize < size:
        raise UsageError("resize {} is smaller than image_size {}: nothing to crop from".format(preprocessing.resize, size), "raise data.resize")
    image = with_channels(_resize(image, *_resized_shape(image.shape[0], image.shape[1], preprocessing)), preprocessing.channels)
    top, left = round((image.shape[0] - size) / 2.0), round((image.shape[1] - size) / 2.0)
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def to_feed(images: Image) -> np.ndarray:
    """Images uint8 [n, H, W, C] as the network's input: float32 [n, C, H, W] in 0–1, contiguous."""
    import numpy as np

    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def with_channels(images: Image, channels: int) -> Image:
    """Images uint8 [..., 1 or 3] with 1 or 3 channels: grey is repeated, RGB becomes ITU-R 601 luma."""
    import numpy as np

    found = images.shape[-1]
    if found == channels:
        return images
    if found == 1 and channels == 3:
        return np.repeat(images, 3, axis=-1)
    if found == 3 and channels == 1:
        luma = images @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        grey: Image = np.rint(luma).astype(np.uint8)[..., None]
        return grey
    raise UsageError("images have {} channels, wanted {}; only 1 and 3 convert into each other".format(found, channels), "set data.channels to 1 or 3")


def _resized_shape(height: int, width: int, preprocessing: Preprocessing) -> Tuple[int, int]:
    if preprocessing.resize is None:
        return preprocessing.image_size, preprocessing.image_size
    short, long = min(height, width), max(height, width)
    longer = int(preprocessing.resize * long / short)  # truncated, as torchvision's `_compute_resized_output_size`
    return (preprocessing.resize, longer) if height <= width else (longer, preprocessing.resize)


def _resize(image: Image, height: int, width: int) -> Image:
    import numpy as np

    if image.shape[:2] == (height, width):
        return image
    pillow = _pillow("to resize images")
    picture = pillow.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    # Pillow widens its bilinear filter when shrinking, which is torchvision's antialias=True
    resized = np.asarray(picture.resize((width, height), pillow.Image.Resampling.BILINEAR))
    return resized.reshape(height, width, image.shape[2])


def _pillow(purpose: str) -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as exc:
        raise MissingDependency("PIL", "runtimes", purpose) from exc
    return PIL
