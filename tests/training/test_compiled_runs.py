"""Training in mixed precision, by torch.compile and by CUDA graphs: what they may change, and what not."""

import json
import os
import signal

import pytest
import torch
from helpers import micro_config
from small_runs import after_step, losses, weights
from torch._dynamo.testing import CompileCounterWithBackend

from flashkat_hf.model.modeling_flashkat import FlashKATModel
from flashkat_hf.training import run as assembly
from flashkat_hf.training.prepared_model import compile_blocks


def test_training_is_in_mixed_precision_and_evaluation_is_not(run, monkeypatch):
    dtypes = []
    build = assembly.build_model

    def built(settings, class_names):
        model, processor = build(settings, class_names)
        model.classifier.register_forward_hook(lambda *given: dtypes.append((model.training, given[2].dtype)))
        return model, processor

    monkeypatch.setattr(assembly, "build_model", built)
    run(precision="bf16", max_steps=1)
    assert set(dtypes) == {(True, torch.bfloat16), (False, torch.float32)}


def test_a_compiled_run(run, monkeypatch):
    """The training pass goes through torch.compile; the result is the plain one's to rounding."""
    compiled = []
    compile = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *given, **named: compiled.append(1) or compile(*given, **named, backend="aot_eager"),
    )
    output = run("compiled", compile=True, max_steps=3)
    assert compiled == [1]
    assert losses(output) == pytest.approx(losses(run("plain", max_steps=3)), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch looks for that of the blocks' inputs
def test_compiled_blocks_share_their_code_whatever_their_rate_of_dropping(device):
    """If the rates were numbers, PyTorch 2.11 would compile each block for itself, though only on a GPU."""
    torch.compiler.reset()
    code = CompileCounterWithBackend("aot_eager")
    model = FlashKATModel(micro_config(num_hidden_layers=12, drop_path_rate=0.1)).to(device).train()
    compile_blocks(model, backend=code)
    with torch.autocast(device, torch.bfloat16):
        output = model(torch.randn(2, 3, 32, 32, device=device)).last_hidden_state
    output.sum().backward()
    assert code.frame_count == 2  # one drops nothing
    rates = [layer.drop_path.rate for layer in model.layers]
    assert all(isinstance(rate, torch.Tensor) for rate in rates[1:])
    assert list(map(float, rates)) == pytest.approx(torch.linspace(0, 0.1, 12).tolist())


@pytest.mark.gpu
def test_on_a_gpu_a_run_is_in_bfloat16_and_measured(run):
    output = run(max_steps=3, ema_decay=0.5, mixup=0.8, compile=True)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["precision"], summary["compiled"], summary["device"]) == (
        "bf16",
        True,
        torch.cuda.get_device_name(),
    )
    assert summary["peak_memory_gib"] > 0
    assert 0 < summary["images_per_second"] <= summary["step_images_per_second"] * 1.01
    plain = run("plain", max_steps=3, ema_decay=0.5, mixup=0.8, compile=False)
    assert losses(output) == pytest.approx(losses(plain), rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch": 4}, {"clip_norm": 0.5, "skip_nonfinite": True}, {"compile": True}]
)
def test_cuda_graphs_give_the_bits_of_launches(run, monkeypatch, changes):
    """After a resume too, and where gradients accumulate."""
    settings = {"epochs": 3, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3, "ema_decay": 0.8, **changes}
    launched = run("launched", **settings, cuda_graphs=False)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
        after_step(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run("replayed", **settings)
    assert len(replays) >= 5 + 4  # of the updates' passes, and of all but the first one's new weights
    replayed = run("replayed", resume=True, **settings)
    assert losses(replayed) == losses(launched)
    assert all(torch.equal(tensor, weights(replayed)[name]) for name, tensor in weights(launched).items())


@pytest.mark.gpu
def test_a_step_that_a_graph_cannot_hold_is_launched(run, monkeypatch, capsys):
    build = assembly.build_model

    def built(settings, class_names):
        model, processor = build(settings, class_names)
        model.classifier.register_forward_hook(lambda *given: None)
        return model, processor

    monkeypatch.setattr(assembly, "build_model", built)
    hooked = run("hooked", max_steps=3)
    assert "classifier has hooks; launching kernels" in capsys.readouterr().err
    monkeypatch.setattr(assembly, "build_model", build)
    assert losses(hooked) == losses(run("plain", max_steps=3))
