"""The page of examples/demo: what it reads and refuses, and, where a browser is installed, the page itself.

The browser is Debian's chromium or another one on the PATH, driven by Playwright. CI has neither that nor
gradio, which wants an older Pillow than constraints.txt names: pip install '.[demo]' pytest playwright.
"""

import importlib.util
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from helpers import ROOT
from PIL import Image

APP = ROOT / "examples/demo/app.py"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [
    *(name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None),
    *([] if BROWSER else ["a browser"]),
]


@pytest.fixture(scope="module")
def app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_app", APP)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def file(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    """Return an image that is dark on the left and light on the right."""
    row = numpy.linspace(0, 255, width).astype("uint8")
    return Image.fromarray(numpy.tile(row, (height, 1))).convert("RGB")


def test_unusual_files_are_read_right(app):
    plain = numpy.asarray(gradient()).astype(int)
    deep = Image.fromarray((plain[..., 0] * 257).astype("uint16"))
    turned = Image.Exif()
    turned[274] = 6  # shown turned by 90 degrees clockwise
    for name, content, tolerance in (
        ("cmyk", file(gradient().convert("CMYK"), "JPEG", quality=100), 8),
        ("16 bit", file(deep), 1),
        ("turned", file(gradient().rotate(90, expand=True), "PNG", exif=turned), 0),
    ):
        image = app.read(content)
        assert (image.mode, image.size) == ("RGB", (40, 30)), name
        assert numpy.abs(numpy.asarray(image).astype(int) - plain).max() <= tolerance, name


def test_fifty_megapixels_are_read_and_more_refused(app):
    """The header is enough: nothing of that size is decoded twice."""
    assert app.read(file(Image.new("1", (7100, 7100)))).size == (7100, 7100)
    with pytest.raises(ValueError, match="9000 x 9000 pixels are too many here: 60 million at most"):
        app.read(file(Image.new("1", (9000, 9000))))


def test_what_is_no_image_is_refused(app):
    frames = [Image.new("RGB", (8, 8), (40 * index, 0, 0)) for index in range(3)]
    for content, message in (
        (None, "upload an image first"),
        (b"not an image", "not a known image format"),
        (file(gradient())[:60], "cannot read the image"),
        (file(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated, with 3 images"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            app.read(content)
        assert "\n" not in str(caught.value)


def test_what_the_page_shows(app, bare_folder):
    image, names, functions, maps = app.answer(file(gradient(2000, 1500)), str(bare_folder), 1)
    assert image.size == (640, 480)
    assert sum(names.values()) == pytest.approx(1)
    model, processor = app.load(str(bare_folder))
    pixels = processor(gradient(2000, 1500), return_tensors="pt")["pixel_values"]
    best = max(names, key=names.__getitem__)
    assert best == model.config.id2label[model(pixels).logits.argmax().item()]
    panels = [axes for axes in functions.axes if axes.axison]
    assert [panel.get_title() for panel in panels] == ["layer 1 act1", "layer 1 act2"]
    met = app.model_functions(model, [pixels], layer=1)
    rugs = list(panels[0].collections)
    assert len(rugs) == model.config.num_groups
    for rug, function in zip(rugs, met, strict=False):
        numpy.testing.assert_allclose([segment[0, 0] for segment in rug.get_segments()], function.inputs.x)
    assert len(maps.axes) >= 3
    assert not torch.is_grad_enabled() or all(p.grad is None for p in model.parameters())


def test_of_a_long_thin_image_the_middle_is_resized(app, bare_folder):
    """The whole would be resized to 37 x 2,220,000 pixels, which a large model's memory does not hold."""
    processor = app.load(str(bare_folder))[1]
    sizes = []

    class Spy:
        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, image, **options):
            sizes.append(image.size)
            return processor(image, **options)

    assert app.prepare(Image.new("RGB", (60_000, 1)), Spy()).shape == (1, 3, 32, 32)
    assert sizes == [(10, 1)]


def test_one_line_where_it_cannot_start(app, bare_folder, tmp_path, capsys, monkeypatch):
    def problem(*arguments: str) -> str:
        assert app.main(list(arguments)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "has no config.json" in problem(str(tmp_path))
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert problem(str(bare_folder)).startswith(
        "demo: the page needs gradio: pip install 'flashkat_hf[demo]'"
    )


@pytest.fixture
def page(bare_folder, tmp_path) -> Iterator[str]:
    """Serve the page on a free port and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(APP), str(bare_folder), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while "Running on" not in (tmp_path / "log").read_text():
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert again.returncode == 1
            assert again.stderr.splitlines()[-1] == f"demo: port {port} is in use: --port names another"
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()
    assert uploads(port) == []


def uploads(port: int | str) -> list[Path]:
    """Return the pictures that a page on this port keeps in memory."""
    return list(Path("/dev/shm").glob(f"*/*/picture{port}.png"))


@pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Playwright's event loop
def test_in_a_browser(page, tmp_path):
    """Upload an image, read its label, change the layer and see the plot change; what is no image is told."""
    from playwright.sync_api import expect, sync_playwright

    port = page.rpartition(":")[2]
    picture, text = tmp_path / f"picture{port}.png", tmp_path / "text.png"
    picture.write_bytes(file(gradient()))
    text.write_text("not an image")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1500})
        tab.goto(page)
        upload = tab.locator("input[type=file]")
        upload.set_input_files(text)
        expect(tab.get_by_text("not a known image format")).to_be_visible(timeout=60_000)
        tab.reload()
        tab.locator("input[type=file]").set_input_files(picture)
        expect(tab.get_by_test_id("label-output-value")).to_contain_text("LABEL_", timeout=60_000)
        plot = tab.locator(
            ".gradio-container img[src^='data:image'], .gradio-container .matplotlib img"
        ).first
        assert uploads(port) or not Path("/dev/shm").is_dir()
        before = plot.get_attribute("src")
        tab.get_by_label("Layer").click()
        tab.get_by_role("option", name="1", exact=True).click()
        expect(plot).not_to_have_attribute("src", before, timeout=60_000)
        if destination := os.environ.get("DEMO_SCREENSHOT"):
            tab.screenshot(path=destination)
        browser.close()
