"""The language model: golden outputs, Mamba, batches and padding, losses, loading and saving, dtypes, compilation."""

import json

import pytest
import torch
import torch.nn.functional as F
from language_helpers import GOLDEN, VOCABULARY, filled, pad, random_ids, small_config, small_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.models.mamba.modeling_mamba import MambaRMSNorm

from grootl import GrootLConfig, GrootLForCausalLM, GrootLModel, reference
from grootl.modeling_grootl import GrootLMixer, GrootLRMSNorm, Prompts, lay_out

CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def mamba(**changes) -> MambaForCausalLM:
    return filled(MambaForCausalLM(MambaConfig(**{**GOLDEN["config"], **changes})))


def relative(found, expected) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Outputs


@torch.no_grad()
def test_golden_logits():
    model = small_model()
    assert relative(model(GOLDEN["ids"], prompt_length=9).logits, GOLDEN["logits_P9"]) < 1e-4
    assert {name: list(value.shape) for name, value in model.named_parameters()} == GOLDEN["names"]


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"use_bias": True, "use_conv_bias": False}, {"residual_in_fp32": False}], ids=str
)
def test_without_tree_it_is_mamba(changes):
    ids = random_ids(2, 19)
    expected = mamba(**changes)(ids).logits
    assert relative(small_model(tree_scale=0, **changes)(ids).logits, expected) < 1e-5
    assert relative(small_model(**changes)(ids).logits, expected) > 1e-2


class DefinitionMixer(nn.Module):
    """Mamba's mixer for one sequence around the definition of the scan."""

    def __init__(self, mixer, prompt_length):
        super().__init__()
        self.mixer, self.prompt_length = mixer, prompt_length

    def forward(self, hidden_states, *_, **__):
        mixer, config = self.mixer, self.mixer.config
        u, gate = F.linear(hidden_states[0], mixer.in_proj.weight).chunk(2, dim=-1)
        taps = F.pad(u, (0, 0, config.conv_kernel - 1, 0)).unfold(0, config.conv_kernel, 1)
        u = F.silu((taps * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias)
        dt, B, C = (u @ mixer.x_proj.weight.T).split([config.time_step_rank, config.state_size, config.state_size], -1)
        delta = F.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
        options = {name: getattr(config, name) for name in ("neighbours", "tree_scale", "edge_decay")}
        y, _, _ = reference.prefix_scan(u, delta, -mixer.A_log.exp(), B, C, self.prompt_length, **options)
        return (((y + mixer.D * u) * F.silu(gate)) @ mixer.out_proj.weight.T).unsqueeze(0)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"edge_decay": "own", "neighbours": 2, "tree_scale": 1.5}], ids=str)
@pytest.mark.parametrize("prompt_length", [1, 2, 3, 6, 23])
def test_other_prompts_and_settings_meet_the_definition(prompt_length, changes):
    ids = random_ids(1, 23)
    found = small_model(**changes)(ids, prompt_length=prompt_length).logits
    model = small_model(**changes)
    for block in model.backbone.layers:
        block.mixer = DefinitionMixer(block.mixer, prompt_length)
    assert relative(found, model(ids).logits) < 1e-5


@torch.no_grad()
def test_later_tokens_do_not_change_predictions():
    """Causal from the last token of the prompt on; before it, the prompt sees later tokens of the prompt only."""
    model, ids = small_model(), random_ids(1, 20)
    changed = ids.clone()
    changed[:, 13:] = random_ids(1, 7, seed=9)
    before, after = (model(tokens, prompt_length=8).logits for tokens in (ids, changed))
    torch.testing.assert_close(before[:, :13], after[:, :13], **CLOSE)
    assert (before[:, 13:] - after[:, 13:]).abs().max() > 1e-2


# Batches


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("edge_decay", ["next", "own"])
def test_rows_of_a_batch_are_as_alone(side, edge_decay):
    """Rows of other lengths, with prompts of their own, and with padding on either side."""
    model = small_model(edge_decay=edge_decay, use_bias=True)
    rows = [random_ids(length, seed=length) for length in (24, 17, 9, 3, 1)]
    prompts = torch.tensor([11, 17, 2, 1, 1])
    ids, mask = pad(rows, side, extra=2)
    logits = model(ids, attention_mask=mask, prompt_length=prompts).logits
    assert logits.isfinite().all()
    for row, tokens, prompt in zip(range(5), rows, prompts, strict=True):
        alone = model(tokens.unsqueeze(0), prompt_length=int(prompt)).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, **CLOSE)


@torch.no_grad()
def test_the_prompt_is_what_the_labels_leave_out():
    model, rows = small_model(), [random_ids(18, seed=1), random_ids(12, seed=2), random_ids(7, seed=3)]
    for side in ("left", "right"):
        ids, mask = pad(rows, side)
        labels = ids.masked_fill(mask == 0, -100)
        for row, prompt in enumerate((6, 9, 0)):
            first = int(mask[row].argmax())
            labels[row, first : first + prompt] = -100
        explicit = model(ids, attention_mask=mask, prompt_length=torch.tensor([6, 9, 1]), use_cache=False)
        output = model(ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(output.logits, explicit.logits, rtol=0, atol=0)
        assert output.prompt_length.tolist() == [6, 9, 1]
        counted = labels[:, 1:] != -100
        if side == "left":
            counted[2, 18 - 7 - 1] = False  # the first token of the last row has nothing before it but padding
        nll = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:].clamp(min=0), reduction="none")
        torch.testing.assert_close(output.loss, nll[counted].mean())


@torch.no_grad()
def test_without_labels_the_prompt_is_the_row():
    model, ids = small_model(), random_ids(2, 15)
    torch.testing.assert_close(model(ids).logits, model(ids, prompt_length=15).logits, rtol=0, atol=0)
    _, mask = pad([ids[0], ids[1, :9]], "right")
    whole = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(
        whole, model(ids, attention_mask=mask, prompt_length=torch.tensor([15, 9])).logits, rtol=0, atol=0
    )


@torch.no_grad()
def test_no_loss_counts_tokens_of_the_prompt():
    model, ids = small_model(), random_ids(2, 14)
    output = model(ids, labels=ids, prompt_length=torch.tensor([5, 9]))
    nll = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(output.loss, torch.cat((nll[0, 4:], nll[1, 8:])).mean())


def test_loss_of_labels_without_tree_is_that_of_mamba():
    ids = random_ids(2, 14)
    labels = ids.clone()
    labels[0, :5] = -100
    ours, theirs = small_model(tree_scale=0)(ids, labels=labels).loss, mamba()(ids, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# Faults


@pytest.mark.parametrize("prompt", [0, -3, 11, torch.tensor([4, 0]), torch.tensor([11, 4]), torch.tensor(-1)], ids=str)
def test_prompts_that_no_row_has_raise(prompt):
    with pytest.raises(ValueError, match=r"prompt_length must be from 1 to the row's"):
        small_model()(random_ids(2, 10), prompt_length=prompt)


def test_a_prompt_longer_than_its_row_without_padding_raises():
    ids, mask = pad([random_ids(10), random_ids(6)], "left")
    with pytest.raises(ValueError, match=r"from 1 to the row's \[10, 6\] tokens, got \[7\]"):
        small_model()(ids, attention_mask=mask, prompt_length=7)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (torch.tensor([1, 2, 3]), ValueError, r"one number or \(2,\), got \[3\]"),
        (torch.tensor([1.0, 2.0]), TypeError, "integers, got torch.float32"),
        (2.5, TypeError, "an int or a tensor, got float"),
        (True, TypeError, "an int or a tensor, got bool"),
        (torch.ones(2, dtype=torch.long, device="meta"), ValueError, "holds values, got meta"),
    ],
    ids=str,
)
def test_prompts_of_another_kind_raise(prompt, error, message):
    with pytest.raises(error, match=message):
        small_model()(random_ids(2, 10), prompt_length=prompt)


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_prompt_lengths_may_be_on_the_cpu_on_cuda():
    model, ids, prompts = small_model().cuda(), random_ids(2, 10).cuda(), torch.tensor([4, 7])
    found = model(ids, prompt_length=prompts).logits
    torch.testing.assert_close(found, model(ids, prompt_length=prompts.cuda()).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="attention_mask must be on the device of input_ids"):
        model(ids, attention_mask=torch.ones(2, 10))


def test_masks_and_labels_on_another_device_raise():
    ids = random_ids(2, 10)
    with pytest.raises(ValueError, match="attention_mask must be on the device of input_ids, cpu, got meta"):
        small_model()(ids, attention_mask=torch.ones(2, 10, device="meta"))
    with pytest.raises(ValueError, match="labels must be on the device of input_ids, cpu, got meta"):
        small_model()(ids, labels=ids.to("meta"))


def test_inputs_of_other_shapes_raise():
    model, ids = small_model(), random_ids(2, 10)
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 10\], got \[2, 9\]"):
        model(ids, attention_mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"labels must be \[2, 10\], got \[1, 10\]"):
        model(ids, labels=ids[:1])
    with pytest.raises(ValueError, match=r"input_ids must be \(B, L\) with L at least 1, got \[2, 0\]"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_padding_changes_nothing(side):
    model = small_model().train()
    rows = [random_ids(9), random_ids(0), random_ids(6)]
    ids, mask = pad(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    prompts = torch.tensor([4, 4, 4])
    output = model(ids, attention_mask=mask, labels=labels, prompt_length=prompts)
    assert output.logits.isfinite().all()
    output.loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    two = [0, 2]
    without = model(ids[two], attention_mask=mask[two], labels=labels[two], prompt_length=prompts[two])
    without.loss.backward()
    torch.testing.assert_close(output.loss, without.loss)
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-4, atol=1e-5)


def test_labels_that_count_nowhere_give_no_loss_and_no_gradient():
    model, ids = small_model().train(), random_ids(2, 8)
    output = model(ids, labels=torch.full_like(ids, -100))
    assert output.loss.item() == 0
    assert output.prompt_length.tolist() == [8, 8]
    output.loss.backward()
    assert all(value.grad.abs().max() == 0 for value in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_rows(length):
    """Up to two tokens of prompt leave the tree no choice: it is the chain, and the state is 1.3 times Mamba's."""
    ids = random_ids(2, length)
    logits = small_model()(ids).logits
    assert logits.shape == (2, length, VOCABULARY) and logits.isfinite().all()
    chain = small_model(neighbours=1)(ids).logits
    if length <= 2:
        torch.testing.assert_close(logits, chain, **CLOSE)


@torch.no_grad()
def test_weights_of_nan_give_logits_of_nan():
    model, ids = small_model(), random_ids(2, 12)
    model.backbone.layers[1].mixer.x_proj.weight[0, 0] = float("nan")
    assert model(ids).logits.isnan().all()


def test_tokens_beyond_the_vocabulary_raise():
    ids = random_ids(1, 5)
    ids[0, 2] = VOCABULARY
    with pytest.raises(ValueError, match=rf"from 0 to {VOCABULARY - 1}, .* to {VOCABULARY}. Does the tokenizer belong"):
        small_model()(ids)


@pytest.mark.parametrize(
    "settings",
    [{"tree_scale": -0.1}, {"tree_scale": float("nan")}, {"neighbours": 0}, {"edge_decay": "parent"}],
    ids=str,
)
def test_settings_that_are_not_allowed_raise(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GrootLConfig(**settings)


# Loading and saving


@torch.no_grad()
def test_a_folder_of_mamba_loads(tmp_path):
    mamba().save_pretrained(tmp_path)
    model = GrootLForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == "grootl" and model.config.tree_scale == 0.3
    ids = GOLDEN["ids"]
    assert relative(model(ids, prompt_length=9).logits, GOLDEN["logits_P9"]) < 1e-4
    plain = GrootLForCausalLM.from_pretrained(tmp_path, tree_scale=0)
    assert relative(plain(ids).logits, GOLDEN["logits_stock"]) < 1e-5
    base = GrootLModel.from_pretrained(tmp_path)
    assert torch.equal(base.layers[0].mixer.A_log, model.backbone.layers[0].mixer.A_log)


@torch.no_grad()
def test_save_and_load_round_trip(tmp_path):
    model = small_model(tree_scale=0.5, neighbours=2, edge_decay="own")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["edge_decay"] == "own"
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, GrootLConfig) and (config.tree_scale, config.neighbours) == (0.5, 2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, GrootLForCausalLM)
    assert again.lm_head.weight.data_ptr() == again.backbone.embeddings.weight.data_ptr()
    ids = random_ids(2, 11)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert isinstance(AutoModel.from_pretrained(tmp_path), GrootLModel)


def test_another_architecture_raises(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="model_type 'grootl' or 'mamba', got 'gpt2'"):
        GrootLForCausalLM.from_pretrained(tmp_path / "gpt2")
    # Its weights under a configuration of Mamba
    mamba().config.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="belong to another architecture"):
        GrootLForCausalLM.from_pretrained(tmp_path / "gpt2")
    with pytest.raises(TypeError, match="config must be a GrootLConfig, got MambaConfig"):
        GrootLForCausalLM(MambaConfig(**GOLDEN["config"]))


def test_another_vocabulary_raises(tmp_path):
    mamba().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        GrootLForCausalLM.from_pretrained(tmp_path, vocab_size=VOCABULARY + 3)


def test_new_models_are_initialised_as_mamba():
    torch.manual_seed(3)
    ours = GrootLForCausalLM(small_config())
    torch.manual_seed(3)
    theirs = MambaForCausalLM(MambaConfig(**GOLDEN["config"]))
    for (name, value), (other, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(value.mean(), expected.mean(), rtol=0.5, atol=0.05)
        torch.testing.assert_close(value.std(), expected.std(), rtol=0.5, atol=0.05)
    assert torch.equal(ours.backbone.layers[0].mixer.A_log, theirs.backbone.layers[0].mixer.A_log)


# Training and precision


def test_checkpointing_changes_no_gradient():
    ids, mask = pad([random_ids(16), random_ids(11)], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    gradients = []
    for checkpointing in (False, True):
        model = small_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for name, value in gradients[0].items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], value, rtol=0, atol=0)


def test_gradients_by_finite_differences():
    model = small_model().double()
    mixer = model.backbone.layers[0].mixer
    hidden = torch.randn(1, 8, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(None, torch.tensor([0]), torch.tensor([6]))
    layout = lay_out(model.config, hidden, None, prompts, caches=False)
    # The choice of the tree has no derivative; these steps are too small to change it.
    assert torch.autograd.gradcheck(lambda x: mixer(x, layout).sum(-1), hidden.requires_grad_(), eps=1e-6, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Of a model with smaller activations than the golden one, which a different tree would change as well."""
    torch.manual_seed(0)
    ids = random_ids(2, 20)
    model = GrootLForCausalLM(small_config()).eval()
    expected = model(ids, prompt_length=12).logits
    half = model.to(dtype)(ids, prompt_length=12).logits
    assert half.dtype == torch.float32
    assert (half - expected).norm() < 0.05 * expected.norm()


def test_norms_are_those_of_mamba_and_round_once():
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, theirs = GrootLRMSNorm(48, eps=1e-5), MambaRMSNorm(48, eps=1e-5)
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
        norm.bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * ours.weight.double()
    half_step = torch.finfo(torch.bfloat16).eps / 2 * 1.001
    assert ((ours(x) - exact).abs() <= half_step * exact.abs()).all()
    assert not ((theirs(x) - exact).abs() <= half_step * exact.abs()).all()
    # The last norm takes float32, and gives it.
    torch.testing.assert_close(ours(x.float()), theirs(x.float()))


def test_autocast_trains():
    model, ids = small_model().train(), random_ids(2, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, prompt_length=7).loss
    loss.backward()
    assert all(value.grad.isfinite().all() and value.grad.dtype == torch.float32 for value in model.parameters())
    torch.testing.assert_close(loss, small_model()(ids, labels=ids, prompt_length=7).loss, rtol=0.05, atol=0)


@pytest.mark.slow
def test_torch_compile():
    torch._dynamo.reset()
    model = small_model(num_hidden_layers=1).train()
    ids, mask = pad([random_ids(16), random_ids(11)], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    losses, gradients = [], []
    for function in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = function(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([value.grad.clone() for value in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_layers_share_their_code():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = small_model(num_hidden_layers=4), random_ids(2, 14)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for layer in model.backbone.layers:
            layer.compile(dynamic=False, fullgraph=True)
        found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_no_layer_is_bypassed():
    """Each layer of a mixer runs by its own `forward`, in training and in decoding."""
    model = small_model()
    called = []
    for block in model.backbone.layers:
        assert isinstance(block.mixer, GrootLMixer)
        for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
            getattr(block.mixer, name).register_forward_hook(lambda *_, name=name: called.append(name))
    ids = random_ids(1, 6)
    for training in (True, False):
        model.train(training)
        called.clear()
        output = model(ids, use_cache=True)
        assert sorted(called) == sorted(["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"] * 3)
    called.clear()
    model(ids[:, :1], cache=output.cache)
    assert sorted(called) == sorted(["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"] * 3)


def test_no_tensor_has_a_value_for_each_token_channel_and_state():
    """Where no cache is asked for, forward and backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    length, config = 50, GOLDEN["config"]
    forbidden = length * config["hidden_size"] * config["expand"] * config["state_size"]
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return result

    model, ids = small_model().train(), random_ids(1, length)
    with Largest():
        model(ids, labels=ids, prompt_length=30).loss.backward()
    assert largest < forbidden
