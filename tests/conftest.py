"""Every test starts from one seed, in deterministic mode, with fresh memory filled with NaN."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import micro_config
from hub_server import HubServer
from huggingface_hub import close_session, constants, hf_api
from small_runs import make_images, small_run

from flashkat_hf import FlashKATForImageClassification, make_image_processor
from flashkat_hf.checkpoints.remote_code import write_code
from flashkat_hf.hub.card import write_card
from flashkat_hf.training import train

# Deterministic matrix products; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[HubServer]:
    """Serve a Hub to which the clients in this process talk as alice, with an empty cache and no waits."""
    with HubServer() as server:
        home = tmp_path / "hf_home"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made at its first use
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
        waits: list[float] = []
        for module in (
            "huggingface_hub.utils._http",
            "huggingface_hub.file_download",
            "flashkat_hf.hub.upload",
        ):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=waits.append))
        server.waits = waits
        close_session()
        yield server
        close_session()


@pytest.fixture(scope="session")
def _saved(tmp_path_factory):
    """Save a micro model as a training run leaves it: weights, config, image processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "model"
    FlashKATForImageClassification(micro_config()).save_pretrained(path)
    make_image_processor(32).save_pretrained(path)
    for code in path.glob("*.py"):
        code.unlink()
    return path


@pytest.fixture(scope="session")
def _complete(_saved, tmp_path_factory):
    """Save the same model with code and card."""
    path = shutil.copytree(_saved, tmp_path_factory.mktemp("complete") / "model")
    write_code(path)
    write_card(path, repo_id="alice/micro")
    return path


@pytest.fixture
def bare_folder(_saved, tmp_path):
    """Copy a micro model's folder without code and card."""
    return shutil.copytree(_saved, tmp_path / "model")


@pytest.fixture
def model_folder(_complete, tmp_path):
    """Copy a micro model's folder with code and card."""
    return shutil.copytree(_complete, tmp_path / "model")


@pytest.fixture
def _one_run(request, monkeypatch) -> Iterator[None]:
    """Train on the CPU unless marked, in one thread, and put back all that a run seeds and sets."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(request.node.get_closest_marker("gpu") is None).lower())
    num_threads, states = torch.get_num_threads(), (random.getstate(), numpy.random.get_state())
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of a test before
    yield
    torch.set_num_threads(num_threads)
    random.setstate(states[0])
    numpy.random.set_state(states[1])


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(images, tmp_path, _one_run):
    """Return a function that trains on the images, or on `data`, and returns the folder of the run."""

    def run(name: str = "run", **settings) -> Path:
        output = tmp_path / name
        values = {"data": images, **settings}
        callback = values.pop("on_model", None)
        try:
            train(small_run(values.pop("data"), output, **values), callback)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return output

    return run
