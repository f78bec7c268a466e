"""CUDA graphs of steps and forward passes: the bits of launches, and launches where something has changed."""

import copy

import pytest
import torch

import flashkat_hf
from flashkat_hf import FlashKATConfig, FlashKATForImageClassification
from flashkat_hf.graphs import GraphedCall, _State

needs_gpu = pytest.mark.gpu


def make_model(**changes) -> FlashKATForImageClassification:
    torch.manual_seed(0)
    config = FlashKATConfig.from_size("micro", num_labels=5, **changes)
    return FlashKATForImageClassification(config)


def make_batch(seed: int = 0, images: int = 4, device: str = "cuda") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    edge = FlashKATConfig.from_size("micro").image_size
    return {
        "pixel_values": torch.randn(images, 3, edge, edge, generator=generator).to(device),
        "labels": torch.randint(5, (images,), generator=generator).to(device),
    }


def in_bfloat16(enabled: bool = True):
    return torch.autocast("cuda", torch.bfloat16, enabled=enabled)


def launched(model, batches, autocast=False) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Losses and the gradients that batches add up to, each batch with random numbers of its own."""
    model.zero_grad()
    losses = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        with in_bfloat16(autocast):
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    return losses, [parameter.grad for parameter in model.parameters()]


def replayed(model, step, batches, autocast=False):
    model.zero_grad()
    losses = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        with in_bfloat16(autocast):
            losses.append(step(**batch))
    return losses, [parameter.grad for parameter in model.parameters()]


def assert_equal(first, second):
    for some, others in zip(first, second, strict=True):
        for one, other in zip(some, others, strict=True):
            assert torch.equal(one, other)


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("changes", [{}, {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.2}])
def test_replays_give_the_bits_of_launches(autocast, changes):
    """With random numbers, from one batch and from three that add up, twice, after an update."""
    model = make_model(**changes).cuda().train()
    twin = copy.deepcopy(model)
    batches = [make_batch(seed) for seed in range(3)]
    state = torch.cuda.get_rng_state()
    with in_bfloat16(autocast):
        step = flashkat_hf.graphed_step(model, batches[0])
    assert torch.equal(torch.cuda.get_rng_state(), state)
    for part in (batches[:1], batches, batches[1:], batches):
        assert_equal(replayed(model, step, part, autocast), launched(twin, part, autocast))
        for one in (model, twin):
            torch.optim.SGD(one.parameters(), 0.1).step()
    assert not step.warned


@needs_gpu
def test_the_loss_stays_the_callers():
    model = make_model().cuda().train()
    step = flashkat_hf.graphed_step(model, make_batch())
    first = step(**make_batch(1))
    value = first.item()
    assert step(**make_batch(2)).item() != value == first.item()


@needs_gpu
def test_batches_of_other_shapes_are_launched():
    """Before, between and after the captured shape, into the same gradients."""
    model = make_model().cuda().train()
    twin = copy.deepcopy(model)
    step = flashkat_hf.graphed_step(model, make_batch())
    batches = [make_batch(1, images=2), make_batch(2), make_batch(3, images=3), make_batch(4)]
    for part in (batches, batches[1:], batches[1:2]):
        assert_equal(replayed(model, step, part), launched(twin, part))


CHANGES = {
    "evaluation mode": lambda model: model.eval(),
    "another rate of dropping": lambda model: setattr(model.flashkat.layers[1].drop_path, "rate", 0.9),
    "a frozen weight": lambda model: model.classifier.weight.requires_grad_(False),
    "moved weights": lambda model: setattr(
        model.classifier.weight, "data", model.classifier.weight.detach().clone()
    ),
    "another module": lambda model: setattr(model, "classifier", copy.deepcopy(model.classifier)),
    "a hook": lambda model: model.flashkat.norm.register_forward_hook(lambda *given: given[2] * 2) and None,
    "another forward": lambda model: setattr(
        model.flashkat.norm, "forward", lambda x: 2 * torch.nn.LayerNorm.forward(model.flashkat.norm, x)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name):
    model = make_model(drop_path_rate=0.5)
    state = _State(model)
    assert state.holds()
    CHANGES[name](model)
    assert not state.holds()


@needs_gpu
def test_modes_are_noticed():
    state = _State(make_model())
    with torch.no_grad():
        assert not state.holds()
    with in_bfloat16():
        assert not state.holds()
    assert state.holds()


@pytest.mark.parametrize("new", [True, False])
def test_the_precision_of_products_is_noticed(new):
    """PyTorch has two ways to set the precision; after the newer one, reading it by the older one raises."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "none"
        state = _State(make_model())
        torch.set_float32_matmul_precision("highest")
        assert matmul.fp32_precision != "none"
        assert state.holds()  # another name of the same
        if new:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert not state.holds()
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


@needs_gpu
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_launched(name, capsys):
    """It is said once; the numbers are right."""
    model = make_model(drop_path_rate=0.5).cuda().train()
    step = flashkat_hf.graphed_step(model, make_batch())
    CHANGES[name](model)
    batches = [make_batch(1), make_batch(2)]
    losses, gradients = replayed(model, step, batches)
    gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
    expected, wanted = launched(model, batches)
    assert all(map(torch.equal, losses, expected))
    assert all(
        (one is None and other is None) or torch.equal(one, other)
        for one, other in zip(gradients, wanted, strict=True)
    )
    assert capsys.readouterr().err.count("has changed since its CUDA graph was captured") == 1


@needs_gpu
def test_a_forward_pass_gives_the_bits_of_launches():
    model = make_model().cuda().eval()
    images = {"pixel_values": make_batch()["pixel_values"]}
    forward = flashkat_hf.graphed_forward(model, images)
    for seed, number in ((1, 4), (2, 4), (3, 2)):
        images = {"pixel_values": make_batch(seed, number)["pixel_values"]}
        with torch.no_grad():
            expected = model(**images).logits
        first = forward(**images).logits
        assert torch.equal(first, expected)
    assert not first.requires_grad
    model.classifier.weight.data.mul_(2)  # a weight may change where it stands
    with torch.no_grad():
        assert torch.equal(forward(**images).logits, model(**images).logits)


@needs_gpu
def test_what_a_graph_cannot_hold():
    model = make_model().cuda().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing of FlashKATForImageClassification"):
        flashkat_hf.graphed_step(model, make_batch())
    model.gradient_checkpointing_disable()
    model.classifier.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match="runs no Python, but classifier has hooks"):
        flashkat_hf.graphed_step(model, make_batch())
    with pytest.raises(ValueError, match="on one GPU, not on cpu, cuda:0"):
        flashkat_hf.graphed_step(make_model().cuda(), make_batch(device="cpu"))

    class Waiting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), device="cuda"))

        def forward(self, x):
            return self.weight * x if x.sum().item() else self.weight

    with pytest.raises(ValueError, match="a CUDA graph cannot hold this step of Waiting"):
        flashkat_hf.graphed_forward(Waiting().eval(), {"x": torch.ones(3, device="cuda")})
    batch = make_batch()
    step = flashkat_hf.graphed_step(make_model().cuda().train(), batch)  # the device is well after that
    assert torch.isfinite(step(**batch))


def test_a_graph_needs_a_gpu():
    with pytest.raises(
        ValueError, match=r"needs FlashKATForImageClassification and its batch on one GPU, not on cpu"
    ):
        flashkat_hf.graphed_step(make_model(), make_batch(device="cpu"))


@needs_gpu
def test_an_optimisers_update_is_replayed():
    def updated(wrap) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(7, device="cuda"))
        rate = torch.zeros((), device="cuda")
        optimizer = torch.optim.AdamW([weight], fused=True, capturable=True)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.zeros_like(weight)
        call = wrap(lambda: optimizer.step() and None)
        for step in range(5):
            rate.fill_(0.1 / (step + 1))
            weight.grad.fill_(step - 1.5)
            call()
        return weight.detach()

    graphs = []

    def replaying(call):
        graphs.append(GraphedCall(call, lambda: True))
        return graphs[-1]

    assert torch.equal(updated(replaying), updated(lambda call: call))
    assert graphs[0].graph is not None


def test_a_batch_with_tensors_inside_of_others_is_refused():
    batch = {"pixel_values": torch.zeros(1, 3, 32, 32), "labels": [{"boxes": torch.zeros(2, 4)}]}
    with pytest.raises(ValueError, match="reads tensors, but labels of the batch is a list of them"):
        flashkat_hf.graphed_step(make_model(), batch)
