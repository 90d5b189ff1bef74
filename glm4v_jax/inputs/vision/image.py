"""Images to patches: `Glm4vImageProcessor` and `Glm4vImageProcessorFast`, of every member of the family.

The numbers of both are those of transformers 4.57.1, bit for bit for images of bytes; see `pixels` for other types.
5.24 calls GLM-4.6V's and GLM-GA's that resize as Pillow does `...Pil`, and those that do as torchvision by a name
without suffix.
"""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import PIL.Image

from glm4v_jax.config.family import Processors
from glm4v_jax.errors import MediaError
from glm4v_jax.inputs.batch_feature import BatchFeature, check_return_tensors
from glm4v_jax.inputs.media.array_layout import FIRST, LAST, channel_format, to_channels_last
from glm4v_jax.inputs.media.load import decode_pillow, is_array, is_path_like, load_image, naming_media, warn_if_clipped
from glm4v_jax.inputs.media.threads import map_threads
from glm4v_jax.inputs.vision.patches import (
    cut_patches,
    is_scaled,
    normalization_of,
    resize_as_image,
    resize_planes,
)
from glm4v_jax.inputs.vision.settings import (
    AREA_OPTIONS,
    GENERAL_DEFAULTS,
    MediaProcessor,
    MediaWithOptions,
    area_of,
    check_sides,
)

logger = logging.getLogger(__name__)


def flatten_images(images: Any) -> list[Any]:
    """One image, a batch of them, or lists of either, however nested -> a flat list of images.

    An image is a path, an address, bytes, a Pillow image, or an array [H, W, C], [C, H, W] or [H, W]; an array of four
    axes is a batch.

    Raises:
        MediaError: something that is not an image, such as None or an array of other axes.
    """
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item)]
    if isinstance(images, (PIL.Image.Image, MediaWithOptions)) or is_path_like(images):
        return [images]
    if is_array(images):
        array = np.asarray(images)
        if array.ndim in (2, 3):
            return [array]
        if array.ndim == 4:
            return list(array)
        raise MediaError(f"Could not make a flat list of images from an array of shape {array.shape}")
    taken = "a path, an address, bytes, a Pillow image, an array, or a list of these"
    raise MediaError(f"Could not make a flat list of images from {images!r}; expected {taken}")


class _ImageProcessor(MediaProcessor):
    """What both processors do; they differ in how they resize and round."""

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_grid_thw"]
    config_files = ("preprocessor_config.json",)
    nested_key = "image_processor"
    type_key = "image_processor_type"
    # Whether to do the fast processor's arithmetic, in resizing and in normalising.
    _fused: ClassVar[bool]

    @classmethod
    def _class_names(cls, row: Processors) -> tuple[str, ...]:
        return row.torchvision if cls._fused else row.pillow

    def prepare_with_sizes(
        self, images: Any, overrides: Mapping[str, Any]
    ) -> tuple[BatchFeature, list[tuple[int, int]]]:
        """What a call returns, and (width, height) of each image as it was given, in pixels.

        Args:
            images: an image or lists of images.
            overrides: settings for this call; also `data_format` and `input_data_format`, see `preprocess`.

        Raises:
            MediaError: an image cannot be loaded or prepared; the message says which.
            TypeError: an unknown setting, where the processor does not ignore them.
        """
        if self.is_general:
            overrides = self.known(overrides)
        elif unknown := set(overrides) - {*self.defaults, *AREA_OPTIONS, "data_format", "input_data_format"}:
            raise TypeError(f"preprocess() got an unexpected keyword argument {min(unknown)!r}")
        settings = self.resolve(overrides)
        channel_format(settings.get("data_format"), "data_format")
        input_data_format = channel_format(settings.get("input_data_format"), "input_data_format")
        normalization = normalization_of(settings, fused=self._fused)

        def resized(item: tuple[int, Any]) -> tuple[np.ndarray, tuple[int, int]]:
            index, source = item
            with naming_media("image", index, source):
                return self._resized(source, {**settings, **own[index]}, input_data_format)

        items = [MediaWithOptions.split(image) for image in flatten_images(images)]
        sources, own = [source for source, _ in items], [options for _, options in items]
        for index, source in enumerate(sources):
            # Pillow decodes lazily and not thread-safely, and one image may stand twice in the batch.
            if isinstance(source, PIL.Image.Image):
                with naming_media("image", index, source):
                    decode_pillow(source)
        loaded = map_threads(resized, enumerate(sources))
        frames = [frame for frame, _ in loaded]

        for index, (source, frame) in enumerate(zip(sources, frames, strict=True)):
            with naming_media("image", index, source):
                normalization.out_channels(frame.shape[2])
        patches, grids = cut_patches([[frame] for frame in frames], settings, normalization, "image")
        return BatchFeature(pixel_values=patches, image_grid_thw=grids), [size for _, size in loaded]

    def _resized(
        self, source: Any, settings: Mapping[str, Any], input_data_format: str | None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """An image [H, W, C] of the size it is cut in, and the width and height it came in."""
        if is_path_like(source):
            source = load_image(source)
        if isinstance(source, PIL.Image.Image):
            if settings["do_convert_rgb"] and source.mode != "RGB":
                warn_if_clipped(source)
                source = source.convert("RGB")
            if source.mode == "RGB" and settings["do_resize"] and not self._fused:
                height, width = area_of(settings, settings["temporal_patch_size"], source.height, source.width)
                return resize_as_image(source, height, width, settings["resample"]), source.size
            # Pillow's arrays have their channels last, whatever the arrays of the same batch have.
            image = to_channels_last(np.asarray(source), LAST)
        else:
            image = to_channels_last(source, input_data_format)
        if settings["do_rescale"] and is_scaled(image):
            logger.warning(
                "It looks like you are trying to rescale already rescaled images. If the input images have pixel "
                "values between 0 and 1, set `do_rescale=False` to avoid rescaling them again."
            )
        height, width = image.shape[:2]
        size = (width, height)
        if settings["do_resize"]:
            height, width = area_of(settings, settings["temporal_patch_size"], height, width)
            resize = resize_planes if self._fused else resize_as_image
            return resize(image, height, width, settings["resample"]), size
        check_sides(settings, height, width)
        return image, size

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """Patches of an image of this size, before merging.

        Args:
            height: rows, in pixels.
            width: columns, in pixels.
            images_kwargs: settings that override the processor's; entries that are None do not.

        Raises:
            MediaError: a size that cannot be prepared.
        """
        return self._num_patches(None, height, width, images_kwargs)


class Glm4vImageProcessor(_ImageProcessor):
    """The default image processor, `transformers.Glm4vImageProcessor` of 4.57.1 bit for bit.

    >>> inputs = Glm4vImageProcessor()(np.zeros((448, 336, 3), np.uint8))
    >>> inputs.pixel_values.shape, inputs.image_grid_thw.tolist()
    ((768, 1176), [[1, 32, 24]])

    See `MediaProcessor` for the settings, which are its arguments.
    """

    _fused = False

    def preprocess(
        self,
        images: Any,
        videos: Any = None,
        do_resize: bool | None = None,
        size: Mapping[str, int] | None = None,
        resample: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        patch_size: int | None = None,
        temporal_patch_size: int | None = None,
        merge_size: int | None = None,
        do_convert_rgb: bool | None = None,
        return_tensors: str | None = None,
        data_format: str | None = FIRST,
        input_data_format: str | None = None,
    ) -> BatchFeature:
        """Resize, normalise and cut images into patches, on all cores.

        Args:
            images: an image, or lists of images; see `flatten_images`. Paths, addresses and bytes are turned as
                their EXIF data says and converted to RGB; Pillow images are converted to RGB if `do_convert_rgb`.
            videos: not used, as in the reference, which has `Glm4vVideoProcessor` for them.
            do_resize, size, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std, patch_size,
                temporal_patch_size, merge_size, do_convert_rgb: in place of the settings of `MediaProcessor`.
            return_tensors: None or "np".
            data_format: the reference's layout between two of its steps; patches are the same for either.
            input_data_format: "channels_first", "channels_last", or "none" for grey arrays [H, W]; None guesses, for
                each image.

        Returns:
            pixel_values [sum of patches, C * temporal_patch_size * patch_size**2] float32 and image_grid_thw [N, 3]
            int64, in patches. Empty for `images=None`.

        Raises:
            MediaError: an image cannot be loaded or prepared; the message says which.
            ConfigError: a setting has an impossible value, or `return_tensors` is not "np".
        """
        names = {*self.defaults, "data_format", "input_data_format"}
        overrides = {name: value for name, value in locals().items() if name in names}
        check_return_tensors(return_tensors)
        if videos is not None:
            logger.warning("`videos` has no effect on Glm4vImageProcessor; use Glm4vVideoProcessor.")
        if images is None:
            return BatchFeature()
        return self.prepare_with_sizes(images, overrides)[0]


class Glm4vImageProcessorFast(_ImageProcessor):
    """`transformers.Glm4vImageProcessorFast` of 4.57.1 without torch: rescaling and normalisation in one float32 step.

    Besides the settings of `MediaProcessor` it takes the fast processor's general ones. As in the reference, GLM-4.1V
    has no use for `do_center_crop`, `crop_size`, `do_pad`, `pad_size`, `default_to_square` and `disable_grouping`: they
    do not change the result, and asking for a crop or padding is logged as a warning.
    """

    defaults: Mapping[str, Any] = {
        **MediaProcessor.defaults,
        **GENERAL_DEFAULTS,
        "do_pad": None,
        "pad_size": None,
        "disable_grouping": None,
    }
    is_general = True
    _fused = True

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Resize, normalise and cut images into patches, on all cores.

        Args:
            images: see `Glm4vImageProcessor.preprocess`. Arrays of one channel spread over those of `image_mean`.
            **kwargs: settings for this call; `return_tensors` (None or "np") and `input_data_format` ("channels_first",
                "channels_last", or "none" for grey arrays [H, W]; None guesses, for each image). Unknown ones are
                logged and ignored.

        Returns:
            As `Glm4vImageProcessor.preprocess`.

        Raises:
            MediaError: an image cannot be loaded or prepared; the message says which.
            ConfigError: a setting has an impossible value, or `device` or `return_tensors` is one of torch's.
        """
        return self.prepare_with_sizes(images, kwargs)[0]
