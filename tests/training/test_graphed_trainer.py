"""transformers' Trainer with graphs: what the stock trainer gives, bit for bit."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from flashkat_hf import FlashKATConfig, FlashKATForImageClassification, GraphedTrainer
from flashkat_hf.training import graphed_trainer


@pytest.fixture(autouse=True)
def _accelerator_of_its_own():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Images(Dataset):
    """22 images of the model's size, with labels."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> dict:
        edge = FlashKATConfig.from_size("micro").image_size
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, edge, edge, generator=generator), "labels": index % 5}


class Truncated(Images):
    """Images of which one, the sixteenth that is read, cannot be read."""

    def __getitem__(self, index: int) -> dict:
        if index == 1:
            raise OSError("truncated")
        return super().__getitem__(index)


class Augmented(Images):
    """Images with noise of this process's generator."""

    def __getitem__(self, index: int) -> dict:
        image = super().__getitem__(index)
        return image | {"pixel_values": image["pixel_values"] + torch.randn(1)}


def trained(kind, folder, resume=None, data=None, **changes):
    """Losses, gradient norms and weights of two epochs of batches of 4, with a smaller last one."""
    options = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    torch.manual_seed(0)
    config = FlashKATConfig.from_size("micro", num_labels=5, drop_path_rate=0.3)
    model = FlashKATForImageClassification(config)
    arguments = TrainingArguments(**{**options, **changes})
    trainer = kind(model=model, args=arguments, train_dataset=data or Images(), eval_dataset=Images())
    trainer.train(resume_from_checkpoint=resume)
    logged = [
        {name: value for name, value in line.items() if "runtime" not in name and "per_second" not in name}
        for line in trainer.state.log_history[:-1]
    ]
    return trainer, logged, {name: value.cpu() for name, value in model.state_dict().items()}


def assert_alike(first, second):
    assert json.dumps(first[1]) == json.dumps(second[1])
    assert all(torch.equal(value, second[2][name]) for name, value in first[2].items())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}, {"fp16": True}],
)
def test_it_trains_as_the_stock_trainer(changes, tmp_path):
    trainer, *rest = trained(GraphedTrainer, tmp_path / "graphed", **changes)
    assert_alike((trainer, *rest), trained(Trainer, tmp_path / "stock", **changes))
    assert (trainer.graphed is None) == ("fp16" in changes)
    assert trainer.graphed is None or not trainer.graphed.warned


@pytest.mark.gpu
def test_it_goes_on_from_a_checkpoint(tmp_path):
    whole = trained(GraphedTrainer, tmp_path / "whole", max_steps=9)
    resumed = trained(
        GraphedTrainer, tmp_path / "again", str(tmp_path / "whole" / "checkpoint-6"), max_steps=9
    )
    assert all(torch.equal(value, resumed[2][name]) for name, value in whole[2].items())


@pytest.fixture
def ahead(monkeypatch) -> list:
    """Let GraphedTrainer run its GPU code on a CPU, with launches in place of replays.

    The list gets an entry for each batch that was read ahead and then used.
    """
    noted = []

    class Stream:
        def record_event(self) -> None: ...
        def wait_event(self, event) -> None: ...
        def wait_stream(self, stream) -> None:
            noted.append(stream)

    class Step:
        warned = False

        def __init__(self, module, batch, step):
            self.module, self.step = module, step

        def __call__(self, **batch):
            return self.step(batch)

    monkeypatch.setattr(graphed_trainer, "GraphedStep", Step)
    monkeypatch.setattr(graphed_trainer, "batch_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(GraphedTrainer, "_may_replay", lambda trainer: True)
    return noted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
        {"dataloader_num_workers": 1, "max_steps": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("data", [Images, Augmented])
def test_batches_made_ahead_are_those_of_the_stock_trainer(data, changes, ahead, tmp_path):
    """The trainer reads no batch ahead if augmentation draws random numbers in the main process.

    An evaluation before that batch draws from the same generators, so that its augmentation would differ.
    """
    changes = {"use_cpu": True, **changes}
    trainer, *rest = trained(GraphedTrainer, tmp_path / "graphed", data=data(), **changes)
    assert_alike((trainer, *rest), trained(Trainer, tmp_path / "stock", data=data(), **changes))
    assert bool(ahead) == (data is Images or "dataloader_num_workers" in changes)
    assert trainer.ahead is None


def test_an_image_that_cannot_be_read_ends_it_where_it_ends_the_stock_trainer(ahead, tmp_path):
    options = {"data": Truncated(), "save_strategy": "steps", "save_steps": 1, "use_cpu": True}
    for kind in (GraphedTrainer, Trainer):
        with pytest.raises(OSError, match="truncated"):
            trained(kind, tmp_path / kind.__name__, **options)
    graphed, stock = (sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir())
    assert graphed == stock != []
    assert ahead


def test_the_optimiser_is_put_into_training_mode(ahead, monkeypatch, tmp_path):
    """A replay does not run the stock step, which does it; schedule-free optimisers need it."""
    calls = []
    monkeypatch.setattr(graphed_trainer.GraphedStep, "__call__", lambda step, **batch: torch.zeros(()))

    class Switching(torch.optim.SGD):
        def train(self) -> None:
            calls.append("train")

    model = FlashKATForImageClassification(FlashKATConfig.from_size("micro", num_labels=5))
    arguments = TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True)
    optimizers = Switching(model.parameters(), lr=1e-3), None
    GraphedTrainer(model, arguments, train_dataset=Images(), optimizers=optimizers).train()
    assert calls.count("train") >= 3


def test_operations_are_those_of_the_model_at_hand(tmp_path):
    inputs = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    small, large = (
        FlashKATForImageClassification(FlashKATConfig.from_size("micro", num_labels=labels))
        for labels in (5, 500)
    )
    trainer = GraphedTrainer(small, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    found = [trainer.floating_point_ops(inputs)]
    trainer.model = large
    found.append(trainer.floating_point_ops(inputs))
    assert found == [6 * 2 * 3 * 32 * 32 * model.num_parameters() for model in (small, large)]


@pytest.mark.gpu
def test_what_graphs_do_not_serve_is_launched(tmp_path, capsys):
    trainer, *rest = trained(GraphedTrainer, tmp_path / "graphed", gradient_checkpointing=True)
    assert trainer.refused
    assert "gradient checkpointing of FlashKATForImageClassification; launching" in capsys.readouterr().err
    assert_alike((trainer, *rest), trained(Trainer, tmp_path / "stock", gradient_checkpointing=True))


def test_without_a_gpu_it_is_the_stock_trainer(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    graphed = trained(GraphedTrainer, tmp_path / "graphed", max_steps=2)
    assert_alike(graphed, trained(Trainer, tmp_path / "stock", max_steps=2))
    assert graphed[0].graphed is None
