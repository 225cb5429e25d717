"""GrootL for transformers: Mamba's network with a mixer that also scans a tree over the prompt (paper, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.mamba.modeling_mamba import (
    MambaCausalLMOutput,
    MambaMixer,
    MambaOutput,
    MambaPreTrainedModel,
    MambaRMSNorm,
)
from transformers.utils.deprecation import deprecate_kwarg

from grootvl_ops import Tree

from .configuration_grootl import GrootLConfig
from .scans import MASKED_STEP, StateReaders, continue_scan, continued_length, prefix_scan, state_readers
from .trees import chain_tree, prompt_edges

__all__ = ["GrootLCausalLMOutput", "GrootLForCausalLM", "GrootLMixer", "GrootLModel", "GrootLPreTrainedModel"]

_IGNORED = -100

# The name of the cache before transformers 5.24, which would otherwise be ignored silently.
_renamed_cache = deprecate_kwarg("cache_params", "5.40.0", new_name="cache")


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


class Prompts(NamedTuple):
    """Where the tokens and the prompts of a batch's rows are."""

    real: Tensor | None
    """(B, L) bool: tokens, not padding; None if there is no padding."""
    start: Tensor
    """(B,), or (1,) if all rows are alike: the position of the first token."""
    length: Tensor
    """(B,), or (1,) if all rows are alike: the number of tokens of the prompt."""


def locate_prompts(
    shape: torch.Size,
    device: torch.device,
    attention_mask: Tensor | None,
    prompt_length: int | Tensor | None,
    labels: Tensor | None,
) -> Prompts:
    """The prompts of a batch; see `GrootLForCausalLM.forward` for the arguments, of which `shape` is (B, L)."""
    real = None
    start = torch.zeros(1, dtype=torch.long, device=device)
    count = torch.full_like(start, shape[1])
    if attention_mask is not None:
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask must be {list(shape)}, got {list(attention_mask.shape)}")
        _check_device("attention_mask", attention_mask, device)
        real = attention_mask != 0
        start, count = real.int().argmax(1), real.sum(1)
    if prompt_length is not None:
        tokens = None if real is None else count
        return Prompts(real, start, _checked_prompt_length(prompt_length, shape, device, tokens))
    if labels is None:
        return Prompts(real, start, count.clamp(min=1))
    if labels.shape != shape:
        raise ValueError(f"labels must be {list(shape)}, got {list(labels.shape)}")
    _check_device("labels", labels, device)
    labelled = labels != _IGNORED if real is None else (labels != _IGNORED) & real
    leading = torch.where(labelled.any(1), labelled.int().argmax(1) - start, count)
    return Prompts(real, start, leading.clamp(min=1))


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of input_ids, {device}, got {tensor.device}")


def _checked_prompt_length(
    prompt_length: int | Tensor, shape: torch.Size, device: torch.device, count: Tensor | None
) -> Tensor:
    """(B,) or (1,) lengths on the device. `count`: the number of tokens of each row, or None if no row has padding."""
    batch, length = shape
    if isinstance(prompt_length, bool) or not isinstance(prompt_length, (int, Tensor)):
        raise TypeError(f"prompt_length must be an int or a tensor, got {type(prompt_length).__name__}")
    if isinstance(prompt_length, int):
        if not 1 <= prompt_length <= length:
            raise ValueError(f"prompt_length must be from 1 to the row's {length} tokens, got {prompt_length}")
        lengths = torch.full((1,), prompt_length, dtype=torch.long, device=device)
        if count is None:
            return lengths
    else:
        if prompt_length.dtype.is_floating_point or prompt_length.dtype == torch.bool:
            raise TypeError(f"prompt_length must hold integers, got {prompt_length.dtype}")
        if prompt_length.device.type == "meta" and device.type != "meta":
            raise ValueError("prompt_length must be on a device that holds values, got meta")
        if prompt_length.dim() > 1 or (prompt_length.dim() == 1 and prompt_length.shape[0] != batch):
            raise ValueError(f"prompt_length must be one number or ({batch},), got {list(prompt_length.shape)}")
        lengths = prompt_length.long().reshape(-1)
    if count is not None:
        lengths = lengths.to(device)
    if not torch.compiler.is_compiling() and device.type != "meta":
        # A row of padding alone has no prompt, so any length will do for it.
        fits = lengths <= length if count is None else (lengths <= count) | (count == 0)
        if not bool((fits & (lengths >= 1)).all()):
            tokens = length if count is None else count.tolist()
            raise ValueError(f"prompt_length must be from 1 to the row's {tokens} tokens, got {lengths.tolist()}")
    return lengths.to(device)


class Layout(NamedTuple):
    """What all layers of a forward pass need to know of its tokens, computed once; see `lay_out`."""

    continues: bool
    """Whether the tokens continue a cache."""
    padding: Tensor | None
    """(B, L, 1) bool, which tokens are padding; None if none is."""
    last_inputs: Tensor | None
    """(B, 1, kernel) int64, where each row's last inputs of the convolution are among those before the first token,
    which are as many, and those of the L tokens. None without padding."""
    chain: Tree
    """Of `grootl.trees.chain_tree`, as long as the scans need it."""
    edges: Tensor | None
    """Of `grootl.trees.prompt_edges`; None for no tree, and for tokens that continue a cache."""
    readers: StateReaders | None
    """What reads the states after a prompt; None if no cache wants them."""


def lay_out(config: GrootLConfig, inputs: Tensor, real: Tensor | None, prompts: Prompts | None, caches: bool) -> Layout:
    """The layout of a forward pass.

    Args:
        config: of the model.
        inputs: (B, L, ...), for its size and device.
        real: (B, L) bool, which tokens are not padding; None if all.
        prompts: None for tokens that continue a cache.
        caches: whether the states after the last token are wanted.
    """
    batch, length = inputs.shape[:2]
    device, num_states = inputs.device, config.state_size
    padding = last_inputs = edges = readers = None
    if real is not None:
        padding = ~real.unsqueeze(-1)
        if caches:
            right_padding = real.flip(1).int().argmax(1).where(real.any(1), length)
            last_inputs = (length - right_padding).view(-1, 1, 1) + torch.arange(config.conv_kernel, device=device)
    if prompts is None:
        chain = chain_tree(continued_length(length, num_states), device)
        return Layout(True, padding, last_inputs, chain, edges, readers)
    end = (prompts.start + prompts.length).clamp(max=length).expand(batch)
    if caches:
        readers = state_readers(batch, config.intermediate_size, num_states, device)
        length += num_states
    if config.tree_scale != 0:
        edges = prompt_edges(prompts.start.expand(batch), end, length, config.neighbours)
    return Layout(False, padding, last_inputs, chain_tree(length, device), edges, readers)


class GrootLRMSNorm(MambaRMSNorm):
    """Mamba's norm as one operation of PyTorch. It rounds to the dtype of its input once, Mamba's twice."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


class StepProjection(nn.Linear):
    """A linear layer that adds its bias, and returns its result, in float32: decays are exponential in it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + _wide(self.bias)


class GrootLMixer(MambaMixer):
    """Mamba's mixer with the tree beside the chain; the parameters are Mamba's.

    It calls the `forward` of each of its layers and reads none of their weights, so that adapters, hooks and
    quantisation of these layers work.
    """

    def __init__(self, config: GrootLConfig, layer_idx: int, initialize_mixer_weights: bool = True) -> None:
        super().__init__(config, layer_idx, initialize_mixer_weights=False)
        self.dt_proj = StepProjection(self.time_step_rank, self.intermediate_size)
        if initialize_mixer_weights and self.dt_proj.weight.device.type != "meta":
            self.init_mamba_weights()

    def forward(self, hidden_states: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """
        Args:
            hidden_states: (B, L, hidden size).
            layout: of these tokens, see `lay_out`.
            cache: the states of the tokens before, if there are any, are read from it, those after the last token
                written to it.

        Returns:
            (B, L, hidden size).
        """
        config, num_states = self.config, self.ssm_state_size
        padding, readers = layout.padding, layout.readers

        u, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        if padding is not None:
            u = u.masked_fill(padding, 0)
        u = self.act(self._convolve(u, cache, layout.last_inputs)).contiguous()
        if padding is not None:
            u = u.masked_fill(padding, 0)
        dt, B_and_C = self.x_proj(u).split([self.time_step_rank, 2 * num_states], dim=-1)
        dt = self.dt_proj(dt)
        if padding is not None:
            dt = dt.masked_fill(padding, MASKED_STEP)
        x = u
        if readers is not None:
            x, dt, B_and_C = readers.append_to(x, dt, B_and_C)
        x, dt, B_and_C, A_log = (_wide(value) for value in (x, dt, B_and_C, self.A_log))
        B, C = B_and_C.chunk(2, dim=-1)

        state = cache.get_recurrent_state(self.layer_idx) if cache is not None and layout.continues else None
        operands, scale, decay = (x, dt, A_log, B, C), config.tree_scale, config.edge_decay
        if state is not None:
            y, state = continue_scan(*operands, state, layout.chain, scale, decay)
        else:
            num_readers = 0 if readers is None else num_states
            y, state = prefix_scan(*operands, layout.chain, layout.edges, config.neighbours, scale, decay, num_readers)
        if cache is not None and state is not None:
            cache.update_recurrent_state(state, self.layer_idx)

        y = torch.addcmul(y, x if readers is None else u, _wide(self.D)) * F.silu(_wide(gate))
        return self.out_proj(y.to(hidden_states.dtype))

    def _convolve(self, u: Tensor, cache: Cache | None, last_inputs: Tensor | None) -> Tensor:
        """The causal convolution of u (B, L, D) behind what the cache holds, which is brought up to date."""
        length, kernel = u.shape[1], self.conv_kernel_size
        # As the convolution wants it: in its backward pass, PyTorch would copy another layout several times.
        inputs = u.transpose(1, 2).contiguous()
        if cache is not None and last_inputs is None:
            inputs = cache.update_conv_state(inputs, self.layer_idx, conv_kernel_size=kernel).to(u.dtype)
        elif cache is not None and last_inputs is not None:
            before = cache.get_conv_state(self.layer_idx)
            inputs = F.pad(inputs, (kernel, 0)) if before is None else torch.cat((before.to(u.dtype), inputs), dim=-1)
            last = inputs.gather(-1, last_inputs.expand(-1, inputs.shape[1], -1))
            cache.update_conv_state(last, self.layer_idx, conv_kernel_size=kernel)
        width = inputs.shape[-1]
        return self.conv1d(inputs)[..., width - length : width].transpose(1, 2)


class GrootLBlock(GradientCheckpointingLayer):
    """Norm, mixer and residual connection."""

    def __init__(self, config: GrootLConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = GrootLRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = GrootLMixer(config, layer_idx, initialize_mixer_weights=False)

    def forward(self, hidden_states: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """See `GrootLMixer.forward`."""
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        hidden_states = self.norm(hidden_states.to(self.norm.weight.dtype))
        return residual + self.mixer(hidden_states, layout, cache=cache)


class GrootLPreTrainedModel(MambaPreTrainedModel):
    """What both models share: loading and initialising of weights, which are those of Mamba."""

    config: GrootLConfig
    config_class = GrootLConfig
    _no_split_modules = ["GrootLBlock"]

    def __init__(self, config: GrootLConfig, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, GrootLConfig):
            raise TypeError(f"config must be a GrootLConfig, got {type(config).__name__}")
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, of GrootL's or Mamba's folders and hub names.

        Raises:
            ValueError: the model is of another architecture, or its weights lack parameters.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"the weights of {pretrained_model_name_or_path} lack {len(missing)} of the parameters of "
                f"{cls.__name__}, such as {missing[0]}: they belong to another architecture, or are damaged"
            )
        return (model, info) if wants_info else model


class GrootLModel(GrootLPreTrainedModel):
    """Embeddings, blocks, and a final norm. `transformers.MambaModel` with trees."""

    def __init__(self, config: GrootLConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GrootLBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm_f = GrootLRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the tokens."""
        return self.embeddings

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the embeddings of the tokens."""
        self.embeddings = new_embeddings

    @_renamed_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_length: int | Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MambaOutput | tuple:
        """See `GrootLForCausalLM.forward`, whose arguments have the same names."""
        inputs = _one_of(input_ids, inputs_embeds)
        prompts = None
        if not _continues(cache):
            prompts = locate_prompts(inputs.shape[:2], inputs.device, attention_mask, prompt_length, None)
        output = self._forward(inputs, attention_mask, prompts, cache, use_cache, output_hidden_states)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        prompts: Prompts | None,
        cache: Cache | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
    ) -> MambaOutput:
        """As `forward`, of token numbers (B, L) or embeddings (B, L, hidden size)."""
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=config)

        if inputs.dim() == 2:
            _check_vocabulary(inputs, config.vocab_size)
            inputs = self.embeddings(inputs)
        real = None
        if prompts is not None:
            real = prompts.real
        elif attention_mask is not None:
            # The mask may cover the tokens that the cache has seen.
            real = attention_mask[:, -inputs.shape[1] :] != 0
        layout = lay_out(config, inputs, real, prompts, cache is not None)

        hidden_states = inputs
        all_hidden_states = ()
        for block in self.layers:
            hidden_states = block(hidden_states, layout, cache=cache)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
        hidden_states = self.norm_f(hidden_states)

        return MambaOutput(
            last_hidden_state=hidden_states,
            cache=cache if use_cache else None,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
        )


def _one_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if input_ids is not None and inputs_embeds is None:
        inputs, rank = input_ids, 2
    elif inputs_embeds is not None and input_ids is None:
        inputs, rank = inputs_embeds, 3
    else:
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if inputs.dim() != rank or inputs.shape[1] < 1:
        name = "inputs_embeds must be (B, L, hidden size)" if rank == 3 else "input_ids must be (B, L)"
        raise ValueError(f"{name} with L at least 1, got {list(inputs.shape)}")
    return inputs


def _continues(cache: Cache | None) -> bool:
    return cache is not None and cache.has_previous_state()


def _check_vocabulary(input_ids: Tensor, vocab_size: int) -> None:
    """On the CPU alone: elsewhere, to look would mean to wait for the device."""
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or input_ids.numel() == 0:
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids must be from 0 to {vocab_size - 1}, the vocabulary of the model, got {low} to {high}. "
            "Does the tokenizer belong to the model?"
        )


@dataclass
class GrootLCausalLMOutput(MambaCausalLMOutput):
    """Mamba's output, and the prompts.

    Attributes:
        prompt_length: (B,), the number of tokens of each row's prompt. None for tokens that continue a cache.
    """

    prompt_length: Tensor | None = None


class GrootLForCausalLM(GrootLPreTrainedModel, GenerationMixin):
    """The language model: `GrootLModel` and a head, whose weights are those of the embeddings unless the configuration
    says otherwise.

    It is a prefix language model. Tokens of the prompt see the whole prompt, so their logits are no predictions; from
    the last token of the prompt on, the logits are.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: GrootLConfig) -> None:
        super().__init__(config)
        self.backbone = GrootLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the tokens."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the embeddings of the tokens."""
        self.backbone.set_input_embeddings(new_embeddings)

    @_renamed_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_length: int | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> GrootLCausalLMOutput | tuple:
        """
        Args:
            input_ids: (B, L), or `inputs_embeds`, (B, L, hidden size).
            attention_mask: (B, L), 0 for padding, which may be on either side of a row and changes no logits of its
                tokens. With a cache, it may also cover the tokens before.
            labels: (B, L), the token at each position, or -100 where no loss is wanted. A prediction of a prompt's
                token counts in no loss.
            prompt_length: how many tokens of each row are its prompt, padding not counted: an int for all rows, or a
                tensor (B,). Without it, the leading labels of -100, at least one token; without labels, the whole row,
                as `generate` wants it. Its values are checked. With padding, or with a tensor on a GPU, this waits for
                the device. While `torch.compile` traces, they are not checked: longer prompts count as the whole row.
            cache: of an earlier call. Then the tokens continue its prompt, and `prompt_length` is not used.
            use_cache: whether to return a cache.
            logits_to_keep: how many of the last logits to compute; 0 for all. Or the positions.
            kwargs: for the loss, such as `num_items_in_batch`.

        Returns:
            `GrootLCausalLMOutput`. Only logits from a row's last prompt token on are predictions. The loss is 0 where
            no label counts.

        Raises:
            ValueError: sizes, devices or values that are not allowed. TypeError: likewise, types.
        """
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        inputs = _one_of(input_ids, inputs_embeds)
        prompts = None
        if not _continues(cache):
            prompts = locate_prompts(inputs.shape[:2], inputs.device, attention_mask, prompt_length, labels)
        if labels is not None and use_cache is None:
            use_cache = False
        output = self.backbone._forward(inputs, attention_mask, prompts, cache, use_cache, output_hidden_states)
        last_hidden_state: Any = output.last_hidden_state
        hidden_states = slice_logits_to_keep(last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states.to(self.lm_head.weight.dtype))
        logits = _wide(logits)

        loss = None
        if labels is not None:
            counted = labels if prompts is None else _without_prompts(labels, prompts)
            if kwargs.get("num_items_in_batch") is None:
                kwargs["num_items_in_batch"] = (counted[:, 1:] != _IGNORED).sum().clamp(min=1)
            loss = self.loss_function(logits=logits, labels=counted, vocab_size=config.vocab_size, **kwargs)

        result = GrootLCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=output.cache,
            hidden_states=output.hidden_states,
            prompt_length=None if prompts is None else prompts.length.expand(inputs.shape[0]),
        )
        return result if return_dict else result.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' method. Once a cache holds the prompt, no token that is decoded is padding."""
        parent: Any = super()  # whose protocol for `self` transformers' own models do not fulfil either
        inputs = parent.prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if use_cache and not is_first_iteration:
            inputs["attention_mask"] = None
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: GrootLCausalLMOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' method. The prompt is what it was at the first token, also where no cache says so."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("prompt_length") is None:
            model_kwargs["prompt_length"] = outputs.prompt_length
        return model_kwargs

    def _prefill(self, input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' method, for whole prompts only: a tree has no parts."""
        if generation_config.prefill_chunk_size is not None and self.config.tree_scale != 0:
            raise ValueError(
                "prefill_chunk_size must be None, because the tree needs the whole prompt, "
                f"got {generation_config.prefill_chunk_size}"
            )
        parent: Any = super()
        return parent._prefill(input_ids, generation_config, *args, **kwargs)


def _without_prompts(labels: Tensor, prompts: Prompts) -> Tensor:
    positions = torch.arange(labels.shape[1], device=labels.device)
    in_prompt = positions < (prompts.start + prompts.length).unsqueeze(-1)
    if prompts.real is not None:
        in_prompt = in_prompt | ~prompts.real
    return labels.masked_fill(in_prompt, _IGNORED)
