"""What `accelerate launch` asks for, setting by setting: obeyed, or refused in one line."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from small_runs import losses

from flashkat_hf.training.launch import check_launch, local_gpu
from flashkat_hf.training.plan import resolve
from flashkat_hf.training.recipe import Settings
from flashkat_hf.training.run import make_accelerator

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
QUIET = {  # what the launcher sets where nothing is asked for
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ACCELERATE_DYNAMO_BACKEND": "EAGER"},
            "dynamo_backend eager is not supported: no and inductor are",
        ),
        ({"ACCELERATE_DYNAMO_MODE": "max"}, "dynamo_mode max is not supported: default, reduce-overhead,"),
        ({"ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"}, "dynamo_use_fullgraph true is not supported"),
        ({"ACCELERATE_DYNAMO_USE_DYNAMIC": "True"}, "dynamo_use_dynamic true is not supported"),
        ({"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "1"}, "dynamo_use_regional_compilation true is not"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM true is not supported: use DDP or FSDP2"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config true is not supported"),
        ({"ACCELERATE_DOWNCAST_BF16": "true"}, "downcast_bf16 true is not supported"),
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version 1 is not supported: 2 is"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1 is not supported: 2 is"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params true is not supported"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient_checkpointing"),
        ({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading true is not"),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "zero_stage 3 is not supported: 0, 1 and 2 are",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            "offload_param_device cpu is not",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "offload_optimizer_device cpu",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            "deepspeed_config_file ds.json is not",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
            "gradient_clipping 1.0 is not --clip_norm None",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "two"},
            "gradient_accumulation_steps two must be a number",
        ),
    ],
)
def test_what_is_refused(variables, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_launch(Settings(), environment=QUIET | variables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        QUIET,
        QUIET | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "max-autotune"},
        QUIET | FSDP | {"FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
        QUIET | DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "0.0"},
        {"FSDP_OFFLOAD_PARAMS": "true"},  # of a run that is not sharded
    ],
)
def test_what_is_let_pass(variables):
    check_launch(Settings(), environment=variables)


@pytest.mark.parametrize("told", [True, False])
def test_deepspeed_is_refused_on_the_cpu(monkeypatch, told):
    """Told to use it, or with nothing else: accelerate would leave DeepSpeed out without a word."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(told))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: told)
    with pytest.raises(ValueError, match=r"^DeepSpeed is for GPUs, but this run is on the CPU$"):
        make_accelerator(Settings())


def planned(monkeypatch, device: str = "cpu", kind=DistributedType.NO, settings=None, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    values = {"device": torch.device(device), "distributed_type": kind, "mixed_precision": "no"}
    return resolve(
        Settings(fit_defaults=False, **(settings or {})), SimpleNamespace(num_processes=2, **values)
    )


@pytest.mark.parametrize(
    ("device", "kind", "mode", "expected"),
    [
        ("cpu", DistributedType.NO, "default", None),
        ("cpu", DistributedType.NO, "max-autotune", "max-autotune-no-cudagraphs"),
        ("cuda", DistributedType.NO, "default", None),
        ("cuda", DistributedType.NO, "reduce-overhead", None),
        ("cuda", DistributedType.MULTI_GPU, "max-autotune", "max-autotune-no-cudagraphs"),
        ("cuda", DistributedType.FSDP, "max-autotune", "max-autotune-no-cudagraphs"),
    ],
)
def test_compilation_is_as_accelerate_was_told(monkeypatch, device, kind, mode, expected):
    plan = planned(monkeypatch, device, kind, DYNAMO_BACKEND="INDUCTOR", DYNAMO_MODE=mode)
    assert (plan.compiled, plan.compile_mode) == (True, expected)
    assert not planned(monkeypatch, device, kind, {"compile": False}, DYNAMO_MODE="default").compiled


def test_a_mode_that_does_not_serve(monkeypatch):
    with pytest.raises(
        ValueError, match=r"dynamo_mode reduce-overhead replays CUDA graphs, which need a GPU"
    ):
        planned(monkeypatch, DYNAMO_BACKEND="INDUCTOR", DYNAMO_MODE="reduce-overhead")
    with pytest.raises(
        ValueError, match=r"dynamo_mode max-autotune is for a compiled run, which this is not"
    ):
        planned(monkeypatch, DYNAMO_BACKEND="NO", DYNAMO_MODE="max-autotune")


def test_gradients_accumulate_as_accelerate_was_told(monkeypatch):
    steps = {"GRADIENT_ACCUMULATION_STEPS": "4"}
    plan = planned(monkeypatch, settings={"batch_size": 48}, **steps)
    assert (plan.micro_batch, plan.accumulate) == (6, 4)
    assert planned(monkeypatch, settings={"batch_size": 48, "micro_batch": 6}).accumulate == 4
    for settings in ({"batch_size": 48, "micro_batch": 3}, {"batch_size": 44}):
        with pytest.raises(
            ValueError, match=r"--batch_size: 4\d is not accelerate's gradient_accumulation_st"
        ):
            planned(monkeypatch, settings=settings)
    with pytest.raises(ValueError, match="gradient_accumulation_steps many must be a number"):
        planned(monkeypatch, GRADIENT_ACCUMULATION_STEPS="many")


def test_a_run_by_inductor_with_accumulation(run, monkeypatch):
    """Compiled once, by the run; accelerate compiles nothing. The result is the plain one's to rounding."""
    compiled, compile = [], torch.compile
    plain = run("plain", max_steps=3)
    options = {"backend": "aot_eager"}  # inductor takes a minute
    monkeypatch.setattr(
        torch, "compile", lambda *given, **named: compiled.append(named) or compile(*given, **named | options)
    )
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    output = run(max_steps=3)
    assert compiled == [{"dynamic": False, "mode": None}]
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["compile"], settings["micro_batch"]) == (True, 4)
    assert losses(output) == pytest.approx(losses(plain), rel=1e-3)


def test_mixed_precision_is_as_accelerate_was_told(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    output = run(max_steps=1)
    assert json.loads((output / "settings.json").read_text())["precision"] == "bf16"
    for precision in ("fp16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        with pytest.raises(ValueError, match=f"--precision: {precision} is not supported, no or bf16 are"):
            run("other")


@pytest.mark.parametrize(
    ("variables", "index"),
    [({}, 0), ({"LOCAL_RANK": "3"}, 3), (QUIET, 0), ({"ACCELERATE_USE_CPU": "1", "LOCAL_RANK": "3"}, None)],
)
def test_the_gpu_of_a_process(variables, index):
    assert local_gpu(variables) == index
