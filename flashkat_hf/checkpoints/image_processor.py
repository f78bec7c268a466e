"""The image processor that a FlashKAT checkpoint carries: ViT's, with KAT's evaluation transform."""

from PIL.Image import Resampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.import_utils import is_torchvision_available

IMAGE_PROCESSOR_CLASSES: dict[str, type] = {"pil": ViTImageProcessorPil}
if is_torchvision_available():
    from transformers.models.vit.image_processing_vit import ViTImageProcessor

    IMAGE_PROCESSOR_CLASSES["torchvision"] = ViTImageProcessor


def make_image_processor(
    image_size: int = 224,
    crop: float = 0.875,
    image_mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN),
    image_std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD),
):
    """Make ViT's image processor: shorter side to `image_size / crop` pixels, bicubic, centre crop, RGB.

    The defaults are KAT's evaluation: shorter side 256, crop 224, ImageNet statistics. With torchvision the
    processor works on tensors, without it on PIL images.

    Args:
        image_size: height and width of the result in pixels.
        crop: part of the shorter side that the crop keeps, in (0, 1].
        image_mean: mean of each channel, of pixels scaled to [0, 1].
        image_std: standard deviation of each channel.

    Raises:
        ValueError: `crop` is not in (0, 1].
    """
    if not 0 < crop <= 1:
        raise ValueError(f"crop ({crop}) must be in (0, 1]")
    processor_class = IMAGE_PROCESSOR_CLASSES.get("torchvision", ViTImageProcessorPil)
    return processor_class(
        do_convert_rgb=True,
        size={"shortest_edge": round(image_size / crop)},
        resample=Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(image_mean),
        image_std=list(image_std),
    )
