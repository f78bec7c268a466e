"""Uses the repository of the operators where the package is not, and then beside it.

Run by test_kernel_repository.py.

python -I -S isolated_kernel.py JSON_ARGUMENTS
"""

import json
import re
import sys
from pathlib import Path

TEST = json.loads(sys.argv[1])
sys.path += TEST["path"]

import torch  # noqa: E402
from kernels import (  # noqa: E402
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from safetensors.torch import load_file  # noqa: E402

REPOSITORY = Path(TEST["repository"])
CASE = {name: load_file(TEST["data"])[f"{TEST['case']}/{name}"] for name in TEST["names"]}


def check(function) -> None:
    """Hold `function(x, numerator, denominator)` and its gradients against the stored float64 numbers."""
    inputs = [CASE[name].clone().requires_grad_() for name in ("x", "numerator", "denominator")]
    y = function(*inputs)
    results = [y, *torch.autograd.grad(y, inputs, CASE["grad_output"])]
    exact = [CASE[name] for name in ("y", "dx", "d_numerator", "d_denominator")]
    for result, true in zip(results, exact, strict=True):
        error = (result.double() - true).abs().max()
        assert error <= 2e-6 * true.abs().max()  # float32's rounding, a few times


@use_kernel_forward_from_hub("Rational")
class Rational(torch.nn.Module):
    def __init__(self, numerator, denominator):
        super().__init__()
        self.numerator, self.denominator = numerator, denominator

    def forward(self, x):
        raise NotImplementedError


def kernelized(x, numerator, denominator):
    module = Rational(numerator, denominator)
    mapping = {"Rational": {"cpu": LocalLayerRepository(repo_path=REPOSITORY, layer_name="GroupRational")}}
    with use_kernel_mapping(mapping):
        return kernelize(module, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")(x)


assert not any("flashkat" in name for name in sys.modules)
kernel = get_local_kernel(REPOSITORY, backend="cpu")
check(kernel.rational)
check(kernelized)
example = re.search("```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]
exec(example.replace('"flashkat-rational"', repr(str(REPOSITORY))), {})

sys.path.append(TEST["package"])
import flashkat_hf  # noqa: E402
from flashkat_hf.model import operators  # noqa: E402

copies = [module for name, module in sys.modules.items() if re.search(r"flashkat.*\.operators$", name)]
namespaces = [module.NAMESPACE for module in copies]
assert operators.NAMESPACE == "flashkat"
assert len(namespaces) == len(set(namespaces)) >= 2, namespaces
for function in (flashkat_hf.rational, kernel.rational):
    check(function)
print("done")
