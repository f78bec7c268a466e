"""On which images the best epoch is chosen: the test images are to be looked at once, when it is."""

from dataclasses import dataclass

from ..data.holding_out import hold_out
from ..data.samples import Examples, ImageData
from .recipe import Settings

HOLDOUT = 0.1  # of the training images, where nothing else is said


@dataclass(frozen=True)
class Selection:
    """How a run chooses its best epoch.

    Attributes:
        kind: "val", the images of a third folder; "held-out", training images that are held out; "test", the
            test images, which then say too much of how good the model is; "last", the last epoch is taken.
        reason: a line for the user.
    """

    kind: str
    reason: str

    @property
    def images(self) -> str:
        """What the images are called on which epochs are compared."""
        return {"val": "validation images", "held-out": "held-out training images"}.get(
            self.kind, "test images"
        )

    @property
    def every_epoch(self) -> bool:
        """Whether epochs are compared."""
        return self.kind != "last"

    @property
    def tests_at_the_end(self) -> bool:
        """Whether the test images are looked at once, when the epoch has been chosen."""
        return self.kind != "test"

    @property
    def text(self) -> str:
        """How the epoch was chosen, as summary.json says it."""
        return f"on {self.images}" if self.every_epoch else "the last one"


def select(settings: Settings, data: ImageData) -> tuple[ImageData, Selection]:
    """Return the data with the images on which the best epoch is chosen, and how it is."""
    once = "the test images are looked at once, at the end"
    if data.val is not None:
        unused = "; --holdout is not used" if settings.holdout else ""
        return data, Selection("val", f"the epoch is chosen on the third folder's images{unused}; {once}")
    fraction = HOLDOUT if settings.holdout is None else settings.holdout
    if not fraction:
        return data, Selection("test", "--holdout 0: the epoch is chosen on the test images")
    if not isinstance(data.train, Examples):
        text = "the epoch is chosen on the test images, since of a stream no images can be held out"
        return data, Selection("test", text)
    held = hold_out(data, fraction, settings.seed)
    if held.val is None:
        text = f"too few training images to hold any out ({len(data.train)}): the last epoch is taken; {once}"
        return data, Selection("last", text)
    text = f"the epoch is chosen on {len(held.val):,} training images, --holdout {fraction:g}; {once}"
    return held, Selection("held-out", text)
