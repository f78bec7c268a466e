"""A web page to try a FlashKAT: an image's classes, the learned functions, where the model looked.

    python examples/demo/app.py                      # the model that the README's first command trained
    python examples/demo/app.py MODEL --port 7861    # another folder or Hub id

The page needs the extra `demo`. It can also run as a Space on the Hub, where it takes the model from the
folder `model` beside this file.
"""

import argparse
import io
import os
import signal
import sys
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub.utils import logging as hub_logging
from matplotlib.figure import Figure
from PIL import Image
from transformers.utils import logging

from flashkat_hf.checkpoints import load_checkpoint
from flashkat_hf.checkpoints.explain import explain
from flashkat_hf.checkpoints.functions import LearnedFunction, model_functions
from flashkat_hf.checkpoints.functions_drawing import COLORS, draw_functions
from flashkat_hf.checkpoints.functions_inputs import Inputs
from flashkat_hf.data.augmentation import middle
from flashkat_hf.data.samples import open_image
from flashkat_hf.messages import one_line

LARGEST = 60_000_000  # pixels: about 180 MB when decoded
SHOWN = 640  # pixels of the preview's longer edge
MEMORY = Path("/dev/shm")  # where uploads are kept, if there is such a place: Gradio writes them as files


@lru_cache(maxsize=2)
def load(name: str) -> tuple[Any, Any]:
    """Load a checkpoint and its image processor; code that it brings is not run."""
    if not name.strip():
        raise ValueError("name a checkpoint: a folder or a Hub id")
    return load_checkpoint(name.strip())


def read(content: bytes | None) -> Image.Image:
    """Return an uploaded image, upright and as RGB.

    Raises:
        ValueError: nothing was uploaded, it is no image, it is animated, or it is too large.
    """
    if not content:
        raise ValueError("upload an image first")
    try:
        size, frames = _header(content)
    except Exception:  # whatever Pillow's readers raise; `open_image` says it in words
        size, frames = (0, 0), 1
    if size[0] * size[1] > LARGEST:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels are too many here: {LARGEST / 1e6:.0f} million at most"
        )
    if frames > 1:
        raise ValueError(f"the file is animated, with {frames} images: upload one of them")
    return open_image(content, "file")


def _header(content: bytes) -> tuple[tuple[int, int], int]:
    with Image.open(io.BytesIO(content)) as image:
        return image.size, getattr(image, "n_frames", 1)


def answer(
    content: bytes | None, checkpoint: str, layer: int
) -> tuple[Image.Image, dict[str, float], Figure, Figure]:
    """Return what the page shows of an image: the image, its classes, a layer's functions, two maps."""
    image = read(content)
    model, processor = load(checkpoint)
    pixels = prepare(image, processor)
    with torch.no_grad():
        scores = model(pixels).logits[0].float().softmax(-1).tolist()
    names = {model.config.id2label[index]: score for index, score in enumerate(scores)}
    maps = explain(model, pixels).plot(processor.image_mean, processor.image_std)
    return _preview(image), names, draw_layer(model, layer, pixels), maps


def prepare(image: Image.Image, processor: Any) -> torch.Tensor:
    """Return what the model sees of an image, of a thin one its middle: `(1, channels, height, width)`."""
    return processor(middle(image, processor), return_tensors="pt")["pixel_values"]


def _preview(image: Image.Image) -> Image.Image:
    """Return an image small enough to be sent back; tiny ones are shown larger, pixel by pixel."""
    preview = image.copy()
    preview.thumbnail((SHOWN, SHOWN))
    factor = SHOWN // (2 * max(preview.size))
    sharp = Image.Resampling.NEAREST
    return preview.resize([factor * edge for edge in preview.size], sharp) if factor > 1 else preview


def layers(checkpoint: str) -> list[int]:
    """Return the numbers of a checkpoint's layers."""
    return list(range(load(checkpoint)[0].config.num_hidden_layers))


def draw_layer(model: Any, layer: int, pixels: torch.Tensor | None = None) -> Figure:
    """Draw the functions of a layer over what they usually meet, and below what they meet in an image."""
    usual = model_functions(model, layer=layer)
    if pixels is None:
        return draw_functions(usual)
    met = model_functions(model, [pixels], layer=layer)
    figure = draw_functions([_over_both(*pair) for pair in zip(usual, met, strict=True)])
    panels = [axes for axes in figure.axes if axes.axison]
    for act, panel in zip(("act1", "act2"), panels, strict=True):
        functions = [function for function in met if function.act == act]
        low, high = panel.get_ylim()
        step = 0.35 * (high - low) / max(len(functions), 1)  # a row of the rug for each group
        for row, function in enumerate(functions, 1):
            color = COLORS["light"][function.group % len(COLORS["light"])]
            height = low - row * step
            panel.vlines(
                function.inputs.x, height, height + 0.8 * step, color=color, linewidth=0.6, alpha=0.5
            )
        panel.set_ylim(low - (len(functions) + 0.5) * step, high)
    return figure


def _over_both(usual: LearnedFunction, met: LearnedFunction) -> LearnedFunction:
    """Return a function over the usual range and an image's together."""
    ends = [*usual.range, *met.range]
    return replace(
        usual, inputs=Inputs(numpy.array([min(ends), max(ends)]), numpy.array([0.5, 0.5]), "range")
    )


def build(checkpoint: str) -> Any:
    """Return the page, a `gradio.Blocks`, that begins with a checkpoint."""
    import gradio

    def told(function):
        """Show an error that a visitor caused as its one line."""

        def run(*arguments):
            try:
                return function(*arguments)
            except (ValueError, OSError) as error:
                raise gradio.Error(
                    one_line(error), title="That did not work", print_exception=False
                ) from error

        return run

    def changed_model(content, name):
        choices = layers(name)
        shown = answer(content, name, 0) if content else (None, None, draw_layer(load(name)[0], 0), None)
        return (gradio.Dropdown(choices=choices, value=0), *shown)

    def changed_layer(content, name, layer):
        model, processor = load(name)
        pixels = prepare(read(content), processor) if content else None
        return draw_layer(model, layer, pixels)

    with gradio.Blocks(title="FlashKAT", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.Markdown(
            "# FlashKAT: a vision transformer that learns its activation functions\n"
            "Upload an image. Below: its classes, and the functions of one layer. Each curve is what the "
            "model learned for one group of channels, in place of a fixed GELU. The ticks under the curves "
            "are the numbers that this image sends through them."
        )
        with gradio.Row():
            with gradio.Column():
                content = gradio.File(label="Image", type="binary", height=140)
                name = gradio.Textbox(checkpoint, label="Checkpoint: a folder or a Hub id, then Enter")
                image = gradio.Image(label="As it was read", interactive=False, height=260)
            label = gradio.Label(label="Classes", num_top_classes=5)
        layer = gradio.Dropdown(choices=layers(checkpoint), value=0, label="Layer")
        functions = gradio.Plot(draw_layer(load(checkpoint)[0], 0), show_label=False)
        gradio.Markdown("### Where it looked")
        maps = gradio.Plot(show_label=False)
        shown = [image, label, functions, maps]
        alone: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "minimal",
        }
        content.upload(told(answer), [content, name, layer], shown, api_name="classify", **alone)
        name.submit(told(changed_model), [content, name], [layer, *shown], api_name=False, **alone)
        layer.change(told(changed_layer), [content, name, layer], functions, api_name="functions", **alone)
    return page


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until Ctrl-C; return 1 after one line of what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).with_name("model")
    default = str(beside) if beside.is_dir() else "runs/digits/best"
    parser.add_argument("model", nargs="?", default=default, help=f"folder or Hub id (default: {default})")
    parser.add_argument("--port", type=int, default=7860, help="of this machine (default: 7860)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # read when Gradio is imported
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        logging.disable_progress_bar()  # of loading weights
        hub_logging.set_verbosity_error()  # less its lines about each attempt to reach the network
        try:
            load(options.model)
            page = build(options.model)
            page.launch(server_port=options.port, ssr_mode=False, max_file_size="50mb")
        except ImportError as error:
            problem = f"the page needs gradio: pip install 'flashkat_hf[demo]' ({error})"
        except OSError as error:
            in_use = "empty port" in str(error)
            problem = f"port {options.port} is in use: --port names another" if in_use else one_line(error)
        except ValueError as error:
            problem = one_line(error)
        else:
            return 0
    print(f"demo: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the uploads are removed then, too
    sys.exit(main())
