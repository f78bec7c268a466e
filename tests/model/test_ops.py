"""The operator on every device: numbers, layouts, PyTorch's machinery around it, and its error messages."""

from functools import partial

import pytest
import torch
from helpers import (
    CASES,
    DTYPES,
    ROWS,
    SHAPES,
    assert_value_and_gradients,
    exact_value_and_gradients,
    random_inputs,
    reference_case,
    relative_error,
    value_and_gradients,
)
from torch.utils.checkpoint import checkpoint

from flashkat_hf import rational
from flashkat_hf.model.op_attention import packed_attention, packed_attention_operator
from flashkat_hf.model.op_norm_rational import add_norm_rational, norm_beside
from flashkat_hf.model.op_rational_mlp import rational_mlp
from flashkat_hf.model.reference import rational_reference


@pytest.mark.parametrize("case", CASES)
def test_stored_numbers(case, device):
    stored = reference_case(case)
    inputs = (stored[name].to(device) for name in ("x", "numerator", "denominator", "grad_output"))
    results = value_and_gradients(rational, *inputs)
    for actual, name in zip(results, ("y", "dx", "d_numerator", "d_denominator"), strict=True):
        assert relative_error(actual, stored[name]) <= 2e-5, name  # asked of float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, rows, dtype, device):
    inputs = random_inputs(shape, dtype, device, rows)
    assert_value_and_gradients(value_and_gradients(rational, *inputs), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_tables(dtype, device):
    """Gradients come back in the tables' dtype, the model's after `model.to(bfloat16)`."""
    x, numerator, denominator, grad_y = random_inputs((4, 5, 24), dtype, device)
    inputs = x, numerator.to(dtype), denominator.to(dtype), grad_y
    assert_value_and_gradients(value_and_gradients(rational, *inputs), *inputs)


def transposed(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x):
    return torch.cat((x, x), dim=-1)[..., : x.shape[-1]]


def unaligned(x):
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("layout", [transposed, sliced, unaligned])
def test_layouts(layout, device):
    x, numerator, denominator, grad_y = random_inputs((6, 7, 48), torch.float32, device)
    expected = value_and_gradients(rational, x, numerator, denominator, grad_y)

    def through_layout(x, numerator, denominator):
        return rational(layout(x), numerator, denominator)

    actual = value_and_gradients(through_layout, x, numerator, denominator, layout(grad_y))
    for result, whole in zip(actual[:2], expected[:2], strict=True):
        assert torch.equal(result, whole)
    for result, whole in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(result, whole)  # unaligned loads add up in another order


def test_expanded_input_and_gradient(device):
    """Tensors of stride 0 work, as broadcasting and `sum().backward()` make them.

    The original kernels read past such tensors.
    """
    x, numerator, denominator, _ = random_inputs((1, 1, 48), torch.float32, device)
    x = x.expand(5, 7, 48)
    plain = value_and_gradients(
        rational, x.contiguous(), numerator, denominator, torch.ones(5, 7, 48, device=device)
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (x[:1, :1], numerator, denominator)]
    y = rational(leaves[0].expand(5, 7, 48), *leaves[1:])
    y.sum().backward()
    assert torch.equal(y, plain[0])
    torch.testing.assert_close(leaves[0].grad, plain[1].sum((0, 1), keepdim=True))
    assert torch.equal(leaves[1].grad, plain[2])
    assert torch.equal(leaves[2].grad, plain[3])


def test_double_precision(device):
    inputs = [tensor.double() for tensor in random_inputs((4, 24), torch.float64, device)]
    for actual, exact in zip(
        value_and_gradients(rational, *inputs), exact_value_and_gradients(*inputs), strict=True
    ):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


def test_derivatives():
    """All kinds agree with finite differences, and the transforms with each other."""
    inputs = [tensor.double().requires_grad_() for tensor in random_inputs((3, 16), torch.float64, "cpu")[:3]]
    assert torch.autograd.gradcheck(rational, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(rational, inputs)
    values = tuple(tensor.detach() for tensor in inputs)
    tangents = tuple(torch.randn_like(value) for value in values)
    y, forward = torch.func.jvp(rational, values, tangents)
    reverse = torch.func.vjp(rational, *values)[1](torch.ones_like(y))
    total = sum((gradient * tangent).sum() for gradient, tangent in zip(reverse, tangents, strict=True))
    torch.testing.assert_close(forward.sum(), total)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_at_another_batch_size():
    x, numerator, denominator, _ = random_inputs((5, 16), torch.float32, "cpu")
    traced = torch.jit.trace(lambda x: rational(x, numerator, denominator), torch.randn(2, 16))
    torch.testing.assert_close(traced(x), rational(x, numerator, denominator))


def test_autocast_keeps_the_dtype_of_x(device):
    inputs = random_inputs((4, 24), torch.float32, device)
    expected = value_and_gradients(rational, *inputs)
    with torch.autocast(device, torch.bfloat16):
        actual = value_and_gradients(rational, *inputs)
    for result, whole in zip(actual, expected, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, whole)


def test_checkpointing(device):
    inputs = random_inputs((4, 24), torch.float32, device)
    expected = value_and_gradients(rational, *inputs)
    actual = value_and_gradients(partial(checkpoint, rational, use_reentrant=False), *inputs)
    for result, whole in zip(actual, expected, strict=True):
        assert torch.equal(result, whole)


def test_two_runs_agree_bit_for_bit(device):
    inputs = random_inputs((64, 197, 192), torch.float32, device)
    first, second = value_and_gradients(rational, *inputs), value_and_gradients(rational, *inputs)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # opcheck's own
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, device):
    x, numerator, denominator, grad_y = random_inputs((3, 5, 24), dtype, device)
    leaves = [tensor.requires_grad_() for tensor in (x, numerator, denominator)]
    torch.library.opcheck(torch.ops.flashkat.rational, leaves)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.flashkat.rational_backward,
            (grad_y, *(leaf.detach() for leaf in leaves)),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("function", [rational, torch.ops.flashkat.rational], ids=["rational", "operator"])
def test_compiles_without_a_graph_break(function, device):
    inputs = random_inputs((4, 5, 24), torch.float32, device)
    expected = value_and_gradients(function, *inputs)
    actual = value_and_gradients(torch.compile(function, fullgraph=True), *inputs)
    for result, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, plain)


@pytest.mark.parametrize("strict", [False, True])
def test_export_has_few_plain_operations_only(strict):
    class Layer(torch.nn.Module):
        def forward(self, x, numerator, denominator):
            return rational(x, numerator, denominator)

    x, numerator, denominator, _ = random_inputs((4, 24), torch.float32, "cpu")
    program = torch.export.export(
        Layer(),
        (x, numerator, denominator),
        dynamic_shapes=({0: torch.export.Dim("rows")}, {}, {}),
        strict=strict,
    )
    operations = [node for node in program.graph.nodes if node.op == "call_function"]
    assert "flashkat" not in str(program.graph)
    assert len(operations) == 31  # an exporter takes about a millisecond for each
    longer = torch.randn(9, 24)
    torch.testing.assert_close(
        program.module()(longer, numerator, denominator), rational(longer, numerator, denominator)
    )


def plain_rational_mlp(x, weight, bias, numerator, denominator, out_weight, out_bias):
    hidden = torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(
        rational_reference(hidden, numerator, denominator), out_weight, out_bias
    )


def plain_add_norm_rational(residual, branch, weight, bias, numerator, denominator):
    total = residual + branch
    normal = torch.nn.functional.layer_norm(total, weight.shape, weight, bias, 1e-6)
    return total, rational_reference(normal, numerator, denominator)


def fused_add_norm_rational(*inputs):
    return add_norm_rational(*inputs, 1e-6)


def plain_add_with_biases(residual, branch, weight, bias, numerator, denominator, branch_bias, later_bias):
    total, y = plain_add_norm_rational(residual, branch + branch_bias, weight, bias, numerator, denominator)
    return total + later_bias, y


def fused_add_with_biases(residual, branch, *parameters):
    *parameters, branch_bias, later_bias = parameters
    branch = branch + branch_bias.detach()
    total, y = add_norm_rational(residual, branch, *parameters, 1e-6, branch_bias, later_bias)
    return total + later_bias.detach(), y


def plain_norm_beside(x, weight, bias):
    return x * 1, torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-6)


def fused_norm_beside(x, weight, bias):
    return norm_beside(x, weight, bias, 1e-6, x.dtype)


FUSED = {
    "rational_mlp": (
        rational_mlp,
        plain_rational_mlp,
        ((3, 5, 12), (24, 12), (24,), (1, 6), (8, 4), (10, 24), (10,)),
    ),
    "add_norm_rational": (
        fused_add_norm_rational,
        plain_add_norm_rational,
        ((3, 5, 24), (3, 5, 24), (24,), (24,), (1, 6), (8, 4)),
    ),
    "add_norm_rational with biases": (
        fused_add_with_biases,
        plain_add_with_biases,
        ((3, 5, 24), (3, 5, 24), (24,), (24,), (1, 6), (8, 4), (24,), (24,)),
    ),
    "norm_beside": (fused_norm_beside, plain_norm_beside, ((3, 5, 24), (24,), (24,))),
}
COMPILED = [(name, False) for name in FUSED] + [
    (name, True) for name in FUSED if name != "norm_beside"
]  # eager's


def values_and_gradients(function, inputs, grads):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads[: len(outputs)])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "compiled"), COMPILED)
def test_fused_is_its_parts(name, dtype, compiled, device):
    fused, plain, shapes = FUSED[name]
    inputs = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    grads = [torch.randn_like(inputs[0]) for _ in range(2)]
    if name == "rational_mlp":
        grads = [torch.randn(3, 5, 10, dtype=dtype, device=device)]
    function = torch.compile(fused, fullgraph=True) if compiled else fused
    expected = values_and_gradients(plain, inputs, grads)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11  # of sums of partly cancelling terms
    for actual, true in zip(values_and_gradients(function, inputs, grads), expected, strict=True):
        torch.testing.assert_close(actual, true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FUSED)
def test_fused_gradcheck(name):
    fused, _, shapes = FUSED[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(fused, inputs)


@pytest.mark.parametrize("name", [name for name in FUSED if "biases" not in name])
def test_second_derivatives_of_the_fused(name):
    """A gradient's own gradient is that of the parts."""
    fused, plain, shapes = FUSED[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    seconds = []
    for function in (fused, plain):
        outputs = function(*inputs)
        total = sum(
            output.square().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))
        )
        gradients = torch.autograd.grad(total, inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs))
    for actual, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_second_derivative_of_attention():
    """The operator itself takes float64, which `packed_attention` refuses."""
    qkv = torch.randn(2, 5, 96, dtype=torch.float64, requires_grad=True)

    def attention(qkv):
        return packed_attention_operator(qkv, None, 2, 0.25)[0]

    assert torch.autograd.gradgradcheck(attention, [qkv], fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 17, 3 * 32), (1, 5, 3 * 64)], ids=str)
def test_packed_attention(shape, device):
    """The operator agrees with PyTorch's attention in float64, with the bias in front.

    The bound is one rounding of each factor to half precision.
    """
    heads, dtype = 2 if shape[2] == 96 else 1, torch.float16
    scale = (shape[2] // (3 * heads)) ** -0.5  # as models have it: scores of variance 1
    product, bias = torch.randn(shape, device=device).to(dtype), torch.randn(shape[2], device=device)

    def fused(product, bias):
        return packed_attention(product + bias.detach().to(dtype), heads, scale, bias)

    def plain(product, bias):
        query, key, value = (product + bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
        return y.transpose(1, 2).flatten(2)

    grad_y = torch.randn(*shape[:2], shape[2] // 3, device=device).to(dtype)
    exact = values_and_gradients(
        plain, [(product + bias.to(dtype)).double(), torch.zeros_like(bias).double()], [grad_y.double()]
    )
    for actual, true in zip(values_and_gradients(fused, [product, bias], [grad_y]), exact, strict=True):
        assert (actual.double() - true).norm() <= torch.finfo(dtype).eps * true.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # opcheck's own
def test_fused_opcheck(device):
    x, numerator, denominator, grad_y = random_inputs((3, 5, 24), torch.float32, device)
    weight, bias = torch.randn(2, 24, device=device)
    parameters = weight, bias, numerator, denominator
    leaves = [tensor.clone().requires_grad_() for tensor in (x, grad_y, *parameters)]
    for biases in ((None, None), torch.randn(2, 24, device=device).requires_grad_().unbind()):
        torch.library.opcheck(torch.ops.flashkat.add_norm_rational, (*leaves, 1e-6, *biases))
    qkv = torch.randn(2, 7, 3 * 32, device=device).half().requires_grad_()
    torch.library.opcheck(
        torch.ops.flashkat.packed_attention,
        (qkv, torch.randn(96, device=device, requires_grad=True), 2, 0.25),
    )
    backward = ("test_schema", "test_faketensor")
    with torch.no_grad():
        total, _, mean, rstd = torch.ops.flashkat.add_norm_rational(x, grad_y, *parameters, 1e-6, None, None)
        for totals in (False, True):
            arguments = (x, grad_y, total, mean, rstd, *parameters, totals)
            torch.library.opcheck(
                torch.ops.flashkat.add_norm_rational_backward, arguments, test_utils=backward
            )
        for keep in (False, True):
            arguments = (x, torch.randn(24, 24, device=device), weight, numerator, denominator, keep)
            torch.library.opcheck(torch.ops.flashkat.rational_mlp_forward, arguments, test_utils=backward)
        arguments = (grad_y, x, numerator, denominator)
        torch.library.opcheck(torch.ops.flashkat.rational_mlp_backward, arguments, test_utils=backward)
        y, lse = torch.ops.flashkat.packed_attention(qkv.detach(), None, 2, 0.25)
        arguments = (torch.randn_like(y), qkv.detach(), y, lse, 0.25)
        torch.library.opcheck(torch.ops.flashkat.packed_attention_backward, arguments, test_utils=backward)


@pytest.mark.parametrize("where", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_for_a_gpu_keeps_the_kernel(where):
    """The compiler gets the operator, although PyTorch 2.11 says under torch.compile that it is exporting."""
    graphs = []

    def backend(graph_module, _):
        graphs.append(str(graph_module.graph))
        return graph_module.forward

    x, numerator, denominator, _ = random_inputs((4, 24), torch.float32, where)
    torch.compile(rational, backend=backend, fullgraph=True)(x, numerator, denominator)
    assert "flashkat" in graphs[0]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            lambda *tensors: norm_beside(*tensors, 1e-6, torch.float32),
            [(2, 16), (16,), (8,)],
            r"weight and bias must have shape \(16,\), not \(16,\) and \(8,\)",
        ),
        (
            rational_mlp,
            [(2, 5), (16, 5), (3,), (1, 6), (8, 4), (3, 16), (3,)],
            r"shapes \[\(16, 5\), \(3,\), \(3, 16\), \(3,\)\] do not fit each other and x \(2, 5\)",
        ),
        (rational_mlp, [(2, 5), (12, 5), (12,), (1, 6), (8, 4), (3, 12), (3,)], "multiple of num_groups"),
        (
            add_norm_rational,
            [(2, 16), (3, 16), (16,), (16,), (1, 6), (8, 4), 1e-6],
            r"residual has shape \(2, 16\) but branch \(3, 16\)",
        ),
        (
            add_norm_rational,
            [(2, 16), (2, 16), (8,), (16,), (1, 6), (8, 4), 1e-6],
            r"weight and biases must have shape \(16,\), not \(8,\), \(16,\)",
        ),
        (
            add_norm_rational,
            [(2, 16), (2, 16), (16,), (16,), (1, 6), (8, 4), 1e-6, (16,), (8,)],
            r"weight and biases must have shape \(16,\), not \(16,\), \(16,\), \(16,\), \(8,\)",
        ),
        (
            add_norm_rational,
            [(2, 16), (2, 16), (16,), (16,), (1, 6), (8, 4), 1e-6, (16,)],
            "branch_bias and later_bias go together",
        ),
        (packed_attention, [(2, 5, 100), 2, 1.0], r"qkv must be .*not \(2, 5, 100\)"),
        (packed_attention, [(65_536, 1, 48), 1, 1.0], "qkv has 65536 samples"),
        (packed_attention, [(2, 5, 96), 2, 0.0], "scale must be positive, not 0.0"),
        (
            packed_attention,
            [(2, 5, 96), 2, 1.0],
            r"half precision and of at most 1088 tokens, not 5 torch.float32",
        ),
    ],
)
def test_bad_arguments_of_the_fused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*(torch.ones(entry) if isinstance(entry, tuple) else entry for entry in arguments))


@pytest.mark.parametrize(
    ("x", "numerator", "denominator", "message"),
    [
        (torch.ones(2, 16, dtype=torch.int64), (1, 6), (8, 4), "x must be float32.*int64"),
        (torch.ones(2, 16, dtype=torch.complex64), (1, 6), (8, 4), "x must be float32.*complex64"),
        (torch.ones(2, 16), (1, 5), (8, 4), r"numerator must have shape .*6.* not \(1, 5\)"),
        (torch.ones(2, 16), (1, 6), (8, 5), r"denominator must have shape .*4.* not \(8, 5\)"),
        (torch.ones(2, 16), (6,), (8, 4), r"numerator must have shape .* not \(6,\)"),
        (torch.ones(2, 16), (4, 6), (8, 4), "numerator has 4 rows and denominator 8"),
        (torch.ones(2, 12), (1, 6), (8, 4), r"hidden_size \(12\) must be a multiple of num_groups \(8\)"),
        (torch.ones(()), (1, 6), (8, 4), "at least one dimension"),
        (torch.ones(2, 0), (1, 6), (8, 4), "one channel"),
        (torch.ones(2, 16, device="meta"), (1, 6), (8, 4), "x is on meta but numerator is on cpu"),
    ],
)
def test_bad_arguments(x, numerator, denominator, message):
    with pytest.raises(ValueError, match=message):
        rational(x, torch.ones(numerator), torch.ones(denominator))


@pytest.mark.gpu
def test_autocast_on_the_model_path():
    """The output of a linear map under autocast is bfloat16, and stays so."""
    linear = torch.nn.Linear(32, 48, device="cuda")
    _, numerator, denominator, _ = random_inputs((1, 48), torch.float32, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert (
            rational(linear(torch.randn(4, 32, device="cuda")), numerator, denominator).dtype
            == torch.bfloat16
        )


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows, hidden_size = 2**20 + 3, 2048
    x = torch.empty(rows, hidden_size, dtype=torch.bfloat16, device="cuda").normal_()
    _, numerator, denominator, _ = random_inputs((1, hidden_size), torch.float32, "cuda")
    leaves = [tensor.requires_grad_() for tensor in (x, numerator, denominator)]
    y = rational(*leaves)
    y.backward(x.detach())
    for part in (slice(0, 5), slice(-5, None)):
        expected = value_and_gradients(
            rational_reference, x[part].detach(), numerator, denominator, x[part].detach()
        )
        torch.testing.assert_close(y[part].detach(), expected[0])
        torch.testing.assert_close(x.grad[part], expected[1])
    halves = [
        value_and_gradients(rational, part, numerator, denominator, part)[2:]
        for part in x.detach().split(rows // 2)
    ]
    for whole, *parts in zip((numerator.grad, denominator.grad), *halves, strict=True):
        scale = whole.abs().max().item()  # float32 sums of 2^31 terms, that partly cancel, in another order
        torch.testing.assert_close(whole, sum(parts), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    inputs = random_inputs((4, 5, 24), torch.float32, "cuda:1")
    assert torch.cuda.current_device() == 0
    results = value_and_gradients(rational, *inputs)
    assert {result.device for result in results} == {torch.device("cuda:1")}
    assert_value_and_gradients(results, *inputs)
