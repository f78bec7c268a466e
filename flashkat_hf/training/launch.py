"""The wishes of `accelerate launch` and its config, in environment variables: obeyed, or refused."""

import os
from collections.abc import Mapping

from .recipe import Settings

# What runs do not have: its variable, its name, the values that do not ask for it, and what to do instead.
UNSUPPORTED = (
    ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "dynamo_use_fullgraph", ("false",), "leave it out"),
    (
        "ACCELERATE_DYNAMO_USE_DYNAMIC",
        "dynamo_use_dynamic",
        ("false",),
        "batches have one size; leave it out",
    ),
    (
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
        "dynamo_use_regional_compilation",
        ("false",),
        "leave it out",
    ),
    ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", ("false",), "use DDP or FSDP2"),
    ("ACCELERATE_DOWNCAST_BF16", "downcast_bf16", ("false", "no", "0"), "it is for TPUs"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config", ("false",), "use DDP or FSDP2"),
)
UNSUPPORTED_FSDP = (
    ("FSDP_VERSION", "fsdp_version", ("2",), "2 is: --fsdp_version 2"),
    ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params", ("false",), "--micro_batch saves memory"),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "fsdp_activation_checkpointing",
        ("false",),
        "use --gradient_checkpointing",
    ),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading", ("false",), "set it to false"),
)
UNSUPPORTED_DEEPSPEED = (
    (
        "ACCELERATE_DEEPSPEED_CONFIG_FILE",
        "deepspeed_config_file",
        ("none",),
        "set zero_stage and mixed_precision",
    ),
    ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_stage", ("0", "1", "2"), "0, 1 and 2 are; or use FSDP2"),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", ("none",), "use FSDP2"),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload_param_device", ("none",), "use FSDP2"),
)
MODES = ("default", "reduce-overhead", "max-autotune")


def check_launch(
    settings: Settings, on_cpu: bool = False, environment: Mapping[str, str] = os.environ
) -> None:
    """Refuse what accelerate was told and a run, perhaps on the CPU, cannot do.

    Raises:
        ValueError: in one line, the setting, its value, and what to do instead.
    """
    deepspeed = _get(environment, "ACCELERATE_USE_DEEPSPEED") == "true"
    sharded = _get(environment, "ACCELERATE_USE_FSDP") == "true"
    table = UNSUPPORTED + UNSUPPORTED_FSDP * sharded + UNSUPPORTED_DEEPSPEED * deepspeed
    for variable, name, supported, advice in table:
        value = _get(environment, variable, "1" if variable == "FSDP_VERSION" else "")
        if value and value not in supported:
            raise ValueError(f"accelerate's {name} {value} is not supported: {advice}")
    dynamo(environment)
    accumulation(environment)
    clipping = _get(environment, "ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto", "") and float(clipping) != (settings.clip_norm or 0.0):
        raise ValueError(f"accelerate's gradient_clipping {clipping} is not --clip_norm {settings.clip_norm}")
    if deepspeed and settings.skip_nonfinite:
        raise ValueError("--skip_nonfinite does not see DeepSpeed's gradients; use DDP or FSDP2")
    if deepspeed and on_cpu:  # accelerate would leave it out without a word
        raise ValueError("DeepSpeed is for GPUs, but this run is on the CPU")


def dynamo(environment: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Return whether accelerate was told to compile, and torch.compile's mode.

    Raises:
        ValueError: by another compiler than inductor, or in an unknown mode.
    """
    backend = _get(environment, "ACCELERATE_DYNAMO_BACKEND", "no")
    mode = _get(environment, "ACCELERATE_DYNAMO_MODE", "default")
    if backend not in ("no", "inductor"):
        raise ValueError(f"accelerate's dynamo_backend {backend} is not supported: no and inductor are")
    if mode not in MODES:
        raise ValueError(f"accelerate's dynamo_mode {mode} is not supported: {', '.join(MODES)} are")
    return backend == "inductor", mode


def accumulation(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the micro-batches of an update that accelerate was told, or None.

    Raises:
        ValueError: it is no number of at least 1.
    """
    value = _get(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if value in ("auto", "1"):  # 1 is what it says when it was told nothing
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"accelerate's gradient_accumulation_steps {value} must be a number of at least 1")
    return int(value)


def local_gpu(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the index of this process among those of its machine, or None if it may use no GPU."""
    if _get(environment, "ACCELERATE_USE_CPU") == "true":
        return None
    rank = environment.get("LOCAL_RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _get(environment: Mapping[str, str], name: str, default: str = "") -> str:
    """Return a variable in lower case, its truth values as true and false."""
    value = environment.get(name, default).lower()
    return (
        {"1": "true", "yes": "true", "0": "false", "no": "false"}.get(value, value)
        if "_USE_" in name
        else value
    )
