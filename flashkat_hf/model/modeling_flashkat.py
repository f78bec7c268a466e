"""The FlashKAT model.

A ViT whose MLPs are group-rational KANs, in the shape of today's transformers models.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .coefficients import second_moment
from .configuration_flashkat import FlashKATConfig
from .embeddings_flashkat import FlashKATEmbeddings, FlashKATPatchProjection
from .fusing import fused_attention, fused_block, fuses, fuses_attention, fusible, working_dtype
from .layers import GRKANMlp, GroupRational, SimplifiedActivation
from .mimetic import mimetic_weights
from .operators import decomposes, is_traced

AttentionInterface.register("packed", sdpa_attention_forward)  # the name that "sdpa" had here up to 5.2
FORWARD_ARGUMENTS = {"output_attentions", "output_hidden_states"}  # beside those that the signature names


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    weights = torch.matmul(query, key.transpose(-2, -1)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


@fusible
class FlashKATAttention(nn.Module):
    """Multi-head self-attention.

    Query, key and value come from one matrix product, whose rows are q, k, v.
    """

    is_causal = False

    def __init__(self, config: FlashKATConfig):
        super().__init__()
        self.config = config
        self.num_heads: int = config.num_attention_heads  # pyright: ignore[reportAttributeAccessIssue]
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens' mixture, projected, and its weights where the implementation gives them."""
        mixed, weights = self.mix(hidden_states, **kwargs)
        return self.dropout(self.proj(mixed)), weights

    def mix(
        self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the heads make of the tokens, before `proj`, and their weights."""
        if fuses_attention(self, hidden_states):
            return fused_attention(self, hidden_states), None
        heads = (3, self.num_heads, self.head_dim)
        packed = self.qkv(hidden_states).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        # compiled, unpacking would select each of the three, and pad each gradient with zeros
        query, key, value = packed.unbind()
        name = self.config._attn_implementation or "eager"
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            name if hidden_states.shape[0] else "eager",  # transformers' others take no empty batch
            eager_attention_forward,
        )
        mixed, weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return mixed.flatten(-2), weights


@fusible
class FlashKATDropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch of each sample with probability `rate`.

    The rate is a number, or a scalar tensor where blocks are compiled one by one.

    Source: Huang et al., Deep Networks with Stochastic Depth, ECCV 2016.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate: Tensor | float = rate

    @property
    def drops(self) -> bool:
        """True if a forward pass draws which branches it drops: in training, unless the rate is 0."""
        return self.training and (isinstance(self.rate, Tensor) or self.rate != 0.0)

    def forward(self, branch: Tensor) -> Tensor:
        if not self.drops:
            return branch
        factors = self.factors(branch).view(-1, *[1] * (branch.ndim - 1))
        return (branch * factors).to(branch.dtype)

    def factors(self, x: Tensor, branches: int = 1) -> Tensor:
        """Draw the factors of each sample's branches: 0 drops a branch, 1 / (1 - rate) keeps the mean.

        Returns:
            `(branches, len(x))` float32, on x's device.
        """
        # compared, since bernoulli_ would make torch.compile write code of its own for each block's rate
        uniform = torch.rand(branches, x.shape[0], dtype=torch.float32, device=x.device)
        return uniform.ge_(self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={float(self.rate):.3g}"


class FlashKATLayer(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: FlashKATConfig, drop_path_rate: float, index: int = 0):
        super().__init__()
        simplified = config.simplified_functions or {}
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = FlashKATAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GRKANMlp(
            config.hidden_size,
            config.intermediate_size,
            num_groups=config.num_groups,
            num_numerator_groups=config.num_numerator_groups,
            act1_init=config.act1_init,
            act2_init=config.act2_init,
            dropout=config.hidden_dropout_prob,
            act1_functions=simplified.get(f"{index}.act1"),
            act2_functions=simplified.get(f"{index}.act2"),
        )
        self.drop_path = FlashKATDropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        if fuses(hidden_states):
            return fused_block(self, hidden_states, **kwargs)
        attended, _ = self.attention(self.norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))


class FlashKATPreTrainedModel(PreTrainedModel):
    """Start values, and what transformers needs to know of every FlashKAT model."""

    config: FlashKATConfig
    base_model_prefix = "flashkat"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    model_tags = ["flashkat", "kat", "kan"]  # noqa: RUF012 - transformers declares it so
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = (
        False  # the loss is the micro-batch's mean: the trainer divides by the accumulation steps
    )
    _no_split_modules = ["FlashKATEmbeddings", "FlashKATLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FlashKATLayer, "attentions": FlashKATAttention}  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """Load as transformers does, but weights of another architecture are an error, not a random model.

        A FlashKAT's own folder or id (by the `model_type` in its config.json) and a `state_dict` that is
        passed may lack tensors: transformers fills these as at a start, and warns.

        Raises:
            ValueError: the checkpoint is none of a FlashKAT, and holds none of the tensors of its layers.
            OSError: transformers finds no weights in a form that it knows, or the Hub cannot be reached.
            RuntimeError: shapes differ from the config's.
        """
        loaded: tuple = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )  # pyright: ignore[reportAssignmentType]
        model, info = loaded
        layers = {name for name in model.state_dict() if "layers." in name}  # the originals have a norm, too
        if layers <= set(info["missing_keys"]) and not _is_ours(pretrained_model_name_or_path, kwargs):
            found = sorted(info["unexpected_keys"])
            raise ValueError(
                f"{pretrained_model_name_or_path} holds none of {cls.__name__}'s {len(layers)} layer "
                f"tensors; it has {len(found)} others, such as {', '.join(found[:3])}"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does, with the permissions of config.json; safetensors shuts others out."""
        super().save_pretrained(save_directory, *args, **kwargs)
        config = Path(save_directory, "config.json")
        for weights in Path(save_directory).glob("model*.safetensors"):
            with suppress(OSError):  # of another owner, or with no config beside it
                weights.chmod(config.stat().st_mode & 0o666)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Custom code's modules without parameters of their own are skipped, for models that would refill what
        # was loaded; ours fill through `initialization`, which does not, and attention starts as a whole.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill a module's parameters; what a checkpoint has filled is left alone and costs nothing.

        As the released weights started: linear maps and positions truncated normal, biases 0, patch
        projection as PyTorch's convolution, mimetic attention.
        """
        std = self.config.initializer_range
        if isinstance(module, FlashKATPatchProjection):
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.get_parameter("bias"), -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):  # subclasses too, which transformers does not know by name
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, FlashKATEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)
            for token in (module.cls_token, module.register_tokens):
                if token is not None:
                    init.normal_(token, std=1e-6)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
        elif isinstance(module, GroupRational):
            numerator, denominator = module.start()
            init.copy_(module.numerator, numerator)
            init.copy_(module.denominator, denominator)
        elif isinstance(module, SimplifiedActivation):
            for name, start in module.start().items():
                init.copy_(module.get_parameter(name), start)
        elif isinstance(module, GRKANMlp) and self.config.initializer == "variance_preserving":
            for act, linear in ((module.act1, module.fc1), (module.act2, module.fc2)):
                init.normal_(linear.weight, std=(linear.in_features * second_moment(act.init)) ** -0.5)
        elif isinstance(module, FlashKATAttention):
            parts = module.qkv.weight, module.proj.weight
            if not all(getattr(weight, "_is_hf_initialized", False) for weight in parts):
                draw = mimetic_weights(self.config.hidden_size, module.head_dim, parts[0].device)
                for weight, start in zip(parts, draw, strict=True):
                    init.copy_(weight, start)
        else:
            super()._init_weights(module)


def _is_ours(name_or_path: Any, loading: dict[str, Any]) -> bool:
    """Tell whether tensors were passed to `from_pretrained`, or its folder or id is a FlashKAT's."""
    if name_or_path is None or loading.get("state_dict") is not None:
        return True
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    options = {name: loading[name] for name in names if name in loading}
    try:
        values, _ = FlashKATConfig.get_config_dict(name_or_path, **options)
    except OSError:  # it has no config.json
        return False
    return values.get("model_type") == "flashkat"


class FlashKATModel(FlashKATPreTrainedModel):
    """The transformer without a head: tokens and one pooled vector for each image.

    Args:
        config: of the model.
        add_pooling_layer: whether there is a pooled vector. Without one the tokens are normalised with both
            poolings; the parameters are the same.
        use_mask_token: whether there is a mask token, which stands for the patches that are hidden.
    """

    def __init__(self, config: FlashKATConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.add_pooling_layer = add_pooling_layer
        self.embeddings = FlashKATEmbeddings(config, use_mask_token)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            FlashKATLayer(config, config.drop_path_rate * i / last, i)
            for i in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        bool_masked_pos: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            interpolate_pos_encoding: accept another image size, with positions interpolated to it.
            bool_masked_pos: `(batch, patches)`, true for the patches that the mask token stands for.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            `last_hidden_state` `(batch, 1 + registers + patches, hidden_size)` and `pooler_output` `(batch,
            hidden_size)`. With cls pooling the tokens are normalised, with mean pooling the pooled vector
            alone.

        Raises:
            ValueError: wrong number of channels, image size or mask; an argument that is not used.
        """
        hidden_states = self.embed(pixel_values, interpolate_pos_encoding, bool_masked_pos, kwargs)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        if not self.add_pooling_layer:
            return BaseModelOutputWithPooling(last_hidden_state=self.norm(hidden_states))
        if self.config.pooling == "mean":
            pooled = self.norm(hidden_states[:, self.embeddings.num_prefix_tokens :].mean(dim=1))
        else:
            hidden_states = self.norm(hidden_states)
            pooled = hidden_states[:, 0]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def embed(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool,
        bool_masked_pos: Tensor | None,
        others: Mapping[str, Any],
    ) -> Tensor:
        """Return the tokens that the first layer gets; under autocast in its dtype, as a model loaded in it.

        Raises:
            ValueError: as `forward`; `others` are the keyword arguments that no signature names.
        """
        unused = [
            name for name, value in others.items() if value is not None and name not in FORWARD_ARGUMENTS
        ]
        if unused:
            raise ValueError(f"{unused[0]} is no argument that {type(self).__name__} uses")
        tokens = self.embeddings(pixel_values, interpolate_pos_encoding, bool_masked_pos)
        return tokens.to(working_dtype(tokens))


class FlashKATForImageClassification(FlashKATPreTrainedModel):
    """FlashKATModel with a linear classifier on the pooled vector."""

    def __init__(self, config: FlashKATConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self._saw_probabilities = False
        self.flashkat = FlashKATModel(config)
        self.classifier = (
            nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        )
        self.loss_function = image_classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            labels: class indices `(batch,)`, or class probabilities `(batch, num_labels)` as mixup makes
                them, whose rows sum to 1; numbers `(batch,)` or `(batch, 1)` for a model with one label,
                which does regression. Multi-hot labels need `problem_type="multi_label_classification"` in
                the config, which trains by binary cross-entropy; without it they are an error in eager mode
                (on a GPU at a model's first floating point labels, since reading them waits for the device).
            interpolate_pos_encoding: accept another image size, with positions interpolated to it.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            `logits` `(batch, num_labels)` and, with labels, `loss`: the batch's mean, see
            `image_classification_loss`.

        Raises:
            ValueError: wrong number of channels, image size or labels; an argument that is not used.
        """
        self._refuse_multi_hot(labels)
        outputs = self.flashkat(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    @torch.no_grad()
    def _refuse_multi_hot(self, labels: Tensor | None) -> None:
        if labels is None or self.num_labels == 1:  # regression
            return
        if not labels.is_floating_point() or labels.shape[1:] != (self.num_labels,):
            return
        seen = self._saw_probabilities and labels.device.type != "cpu"
        if seen or self.config.problem_type is not None or is_traced(labels) or decomposes(labels):
            return
        sums = labels.sum(-1, dtype=torch.float32)
        far = (sums - 1).abs() > 0.1  # more than rounding, less than another label
        if far.any():
            raise ValueError(
                f"a row of labels sums to {sums[far][0]:g}, so they are no class probabilities; "
                'multi-hot labels need config.problem_type = "multi_label_classification"'
            )
        self._saw_probabilities = True


def image_classification_loss(labels: Tensor, logits: Tensor, config: FlashKATConfig) -> Tensor:
    """Return the loss that `problem_type` names; by default cross-entropy, with one label the squared error.

    Cross-entropy, in float32, takes class indices or class probabilities, as mixup makes them, where the
    stock loss takes probabilities for a multi-label problem, and notes so in the config.

    Raises:
        ValueError: labels of another shape.
    """
    if config.problem_type is None and config.num_labels == 1:
        return nn.functional.mse_loss(logits.squeeze(-1).float(), labels.reshape(logits.shape[0]).float())
    if config.problem_type not in (None, "single_label_classification"):
        return LOSS_MAPPING["ForImageClassification"](labels, logits, config)
    if labels.shape != (logits.shape if labels.is_floating_point() else logits.shape[:1]):
        raise ValueError(
            f"labels must be class indices ({logits.shape[0]},) or class probabilities "
            f"{tuple(logits.shape)}, not {labels.dtype} {tuple(labels.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(
        logits, labels.to(logits.dtype) if labels.is_floating_point() else labels
    )
