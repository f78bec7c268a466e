"""Files of pictures of learned functions: .png, .svg, or a page .html with the formulas."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..files import write_text
from ..messages import one_line
from .command_options import SUFFIXES
from .functions import LearnedFunction
from .functions_drawing import INK, Theme, draw_functions
from .functions_formats import SOURCES, formula

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_functions(
    path: str | Path,
    functions: Sequence[LearnedFunction],
    others: Sequence[LearnedFunction] | None = None,
    *,
    theme: Theme | None = None,
    title: str = "",
    **options: Any,
) -> None:
    """Write a picture of functions: a .png, a .svg, or a page .html with a table of the formulas.

    Args:
        path: of the file.
        functions: of `model_functions`.
        others: another model's, to compare.
        theme: "light" or "dark"; default: light, and a page follows the reader's.
        title: above the picture.
        **options: of `draw_functions`.

    Raises:
        ValueError: the name ends otherwise, the file cannot be written, or as `draw_functions`.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end with {', '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".html":
            themes: Sequence[Theme] = [theme] if theme else get_args(Theme)
            pictures = {
                name: _svg(draw_functions(functions, others, theme=name, **options)) for name in themes
            }
            write_text(path, _page(functions, pictures, title or "Learned functions"))
        else:
            figure = draw_functions(functions, others, theme=theme or "light", title=title, **options)
            figure.savefig(path, dpi=200 if options.get("size") != "column" else 400)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {one_line(error)}") from error


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _page(functions: Sequence[LearnedFunction], pictures: Mapping[str, bytes], title: str) -> str:
    """Return a page of its own: the picture, light or dark as the reader likes it, and the formulas."""
    urls = {
        name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in pictures.items()
    }
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{urls["dark"]}">' if len(urls) > 1 else ""
    scheme = "light dark" if len(urls) > 1 else next(iter(urls))
    ground = f"light-dark({INK['light'][1]}, {INK['dark'][1]})"  # that of the pictures
    rows = "\n".join(
        f"<tr><td>{html.escape(function.label)}<td>{function.range[0]:.3g} .. {function.range[1]:.3g}"
        f"<td>{function.nearest[0]}<td>{function.distance_to_start:.3g}"
        f"<td><code>{html.escape(formula(function, 6))}</code>"
        for function in functions
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: {scheme}; }}
body {{ background: {ground}; font: 14px system-ui, sans-serif; margin: 1.5em; }}
img {{ width: 100%; max-width: 1600px; }}
td, th {{ text-align: left; padding: 2px 12px 2px 0; white-space: nowrap; }}
div {{ overflow-x: auto; }}
</style>
<h1>{html.escape(title)}</h1>
<picture>{dark}
<img src="{next(iter(urls.values()))}" alt="The functions of {len(functions)} groups">
</picture>
<p>The range of a panel is {SOURCES[functions[0].inputs.source]}.
A curve is a function of one channel of its group, not a formula of the network.</p>
<div><table><tr><th>function<th>range<th>nearest known<th>from its start<th>y =
{rows}
</table></div>
</html>
"""
