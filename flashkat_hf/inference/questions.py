"""What a model is asked about each picture: columns of a Parquet file, computed on a device."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..graphs import GraphedForward, graphed_forward
from ..messages import extra, warn

Answers = dict[str, Tensor]


class Question(NamedTuple):
    """A question.

    Attributes:
        types: pyarrow types of the columns that answer it.
        compute: answers, on the device, of pixel values there; nothing waits for a GPU.
        columns: arrays of pyarrow, by column, of the answers on the CPU.
    """

    types: dict[str, Any]
    compute: Callable[[Tensor], Answers]
    columns: Callable[[Answers], dict[str, Any]]


class Forward:
    """The forward pass of a model without gradients; on a GPU full batches are replays of a CUDA graph.

    Args:
        model: in evaluation mode; a transformers model where `graphs` is true.
        batch_size: pictures in a full batch.
        context: makes the context of autocast.
        graphs: whether CUDA graphs are wanted, on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        context: Callable[[], Any],
        graphs: bool = True,
    ):
        self.model = model
        self.batch_size = batch_size
        self.context = context
        self.wanted = graphs
        self.graph: GraphedForward | None = None

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Any:
        with self.context():
            if not (self.wanted and pixels.is_cuda and len(pixels) == self.batch_size):
                return self.model(pixels)
            if self.graph is None:
                try:
                    self.graph = graphed_forward(self.model, {"pixel_values": pixels})
                except ValueError as error:
                    warn(f"{error}: launching kernels")
                    self.wanted = False
                    return self.model(pixels)
            return self.graph(pixel_values=pixels)


def predictions(forward: Forward, labels: Sequence[str], top_k: int) -> Question:
    """Ask for the columns `labels` and `probabilities`, best first."""
    pyarrow = extra("pyarrow")
    types = {"labels": pyarrow.list_(pyarrow.string()), "probabilities": pyarrow.list_(pyarrow.float32())}
    names = pyarrow.array(list(labels))

    def compute(pixels: Tensor) -> Answers:
        output = forward(pixels)
        best = getattr(output, "logits", output).float().softmax(-1).topk(top_k)
        return {"labels": best.indices, "probabilities": best.values}

    def columns(answers: Answers) -> dict[str, Any]:
        if not answers["probabilities"].isfinite().all():
            raise ValueError("the model's outputs are not finite")
        ids, chances = (answers[name].flatten().numpy() for name in types)
        lists = {"labels": names.take(pyarrow.array(ids)), "probabilities": pyarrow.array(chances)}
        return {name: in_lists(values, top_k) for name, values in lists.items()}

    return Question(types, compute, columns)


def features(forward: Forward, patches: bool) -> Question:
    """Ask a `FlashKATModel` for the column `pooled`, with `patches` also for `patches`.

    `pooled` is what the classifier sees, `(hidden_size,)`; `patches` the tokens of the grid after the last
    layer, `(rows * columns, hidden_size)`.
    """
    pyarrow, model = extra("pyarrow"), cast(Any, forward.model)
    width, embeddings = model.config.hidden_size, model.embeddings
    height, columns_ = embeddings.grid(*embeddings.image_size)
    vector = pyarrow.list_(pyarrow.float32())
    types = {"pooled": vector}
    if patches:
        types["patches"] = pyarrow.list_(vector)

    def compute(pixels: Tensor) -> Answers:
        output = forward(pixels)
        answers = {"pooled": output.pooler_output.float()}
        if patches:
            answers["patches"] = output.last_hidden_state[:, embeddings.num_prefix_tokens :].float()
        return answers

    def columns(answers: Answers) -> dict[str, Any]:
        vectors = {
            name: in_lists(pyarrow.array(answer.flatten().numpy()), width) for name, answer in answers.items()
        }
        if patches:
            vectors["patches"] = in_lists(vectors["patches"], height * columns_)
        return vectors

    return Question(types, compute, columns)


def in_lists(values: Any, length: int) -> Any:
    """Return a pyarrow array cut into lists of one length.

    Their type has no fixed length: before version 26, pyarrow reads no null, the row of an unreadable
    picture, among lists that have one (https://github.com/apache/arrow/issues/35692).
    """
    pyarrow = extra("pyarrow")
    offsets = pyarrow.array(range(0, len(values) + 1, length), pyarrow.int32())
    return pyarrow.ListArray.from_arrays(offsets, values)
