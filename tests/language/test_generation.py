"""Generation from the cache in every mode against full forward passes, token by token."""

import pytest
import torch
from language_helpers import PAD, pad, random_ids, small_model
from transformers import TextStreamer

NEW = 9
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": PAD}


@pytest.fixture(params=["next", "own"])
def model(request):
    return small_model(edge_decay=request.param)


def greedy_by_forward(model, prompt, new=NEW, prompt_length=None):
    """One row's greedy continuation, each token from a forward pass over all before it."""
    tokens = prompt.unsqueeze(0)
    with torch.no_grad():
        for _ in range(new):
            logits = model(tokens, prompt_length=prompt_length or len(prompt), use_cache=False).logits[:, -1]
            logits[:, model.config.eos_token_id] = -float("inf")
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    return tokens[0]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 14])
def test_greedy(model, length, use_cache):
    prompt = random_ids(length, seed=length)
    found = model.generate(prompt.unsqueeze(0), do_sample=False, use_cache=use_cache, **OPTIONS)[0]
    assert found.tolist() == greedy_by_forward(model, prompt).tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_batches_with_padding_on_the_left(model, use_cache):
    rows = [random_ids(length, seed=length) for length in (13, 7, 1)]
    ids, mask = pad(rows, "left", extra=1)
    found = model.generate(ids, attention_mask=mask, do_sample=False, use_cache=use_cache, **OPTIONS)
    for row, prompt in enumerate(rows):
        assert found[row, ids.shape[1] :].tolist() == greedy_by_forward(model, prompt)[len(prompt) :].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_shorter_than_the_input(model, use_cache):
    """An input that holds the beginning of the answer."""
    ids = random_ids(12)
    found = model.generate(ids.unsqueeze(0), prompt_length=5, do_sample=False, use_cache=use_cache, **OPTIONS)[0]
    assert found.tolist() == greedy_by_forward(model, ids, prompt_length=5).tolist()
    rows = [random_ids(12, seed=4), random_ids(8, seed=5)]
    batch, mask = pad(rows, "left")
    found = model.generate(
        batch, attention_mask=mask, prompt_length=torch.tensor([5, 3]), do_sample=False, use_cache=use_cache, **OPTIONS
    )
    for row, prompt in enumerate((5, 3)):
        expected = greedy_by_forward(model, rows[row], prompt_length=prompt)
        assert found[row, 12:].tolist() == expected[len(rows[row]) :].tolist()


@torch.no_grad()
def test_sampling_with_a_seed(model):
    prompt, found = random_ids(1, 10), []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(model.generate(prompt, do_sample=True, top_k=20, temperature=5.0, use_cache=use_cache, **OPTIONS))
    assert torch.equal(*found)
    # The same draws from full forward passes
    torch.manual_seed(5)
    tokens = prompt
    for _ in range(NEW):
        logits = model(tokens, prompt_length=10).logits[:, -1] / 5.0
        logits[:, model.config.eos_token_id] = -float("inf")
        logits = logits.masked_fill(logits < logits.topk(20).values[:, -1:], -float("inf"))
        tokens = torch.cat((tokens, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    assert torch.equal(found[0], tokens)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_beams(model, use_cache):
    """Each step of the beam search from full forward passes, in a batch with padding on the left."""
    rows, beams = [random_ids(11, seed=1), random_ids(6, seed=2)], 3
    ids, mask = pad(rows, "left")
    options = {**OPTIONS, "num_beams": beams, "do_sample": False, "use_cache": use_cache}
    found = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate(rows):
        candidates = [(0.0, prompt)]
        for _ in range(NEW):
            longer = []
            for score, tokens in candidates:
                logits = model(tokens.unsqueeze(0), prompt_length=len(prompt)).logits[0, -1]
                logs = logits.log_softmax(-1)
                logs[model.config.eos_token_id] = -float("inf")
                for value, token in zip(*logs.topk(beams), strict=True):
                    longer.append((score + value.item(), torch.cat((tokens, token.view(1)))))
            candidates = sorted(longer, key=lambda candidate: -candidate[0])[:beams]
        assert found[row, 11:].tolist() == candidates[0][1][len(prompt) :].tolist()


def test_several_samples_and_beam_samples(model):
    prompt = random_ids(2, 8)
    for options in ({"num_return_sequences": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        torch.manual_seed(0)
        cached = model.generate(prompt, do_sample=True, use_cache=True, **options, **OPTIONS)
        torch.manual_seed(0)
        whole = model.generate(prompt, do_sample=True, use_cache=False, **options, **OPTIONS)
        assert torch.equal(cached, whole)


def test_streaming(model):
    class Tokenizer:
        def decode(self, tokens, **_):
            return "".join(chr(200 + int(token)) for token in tokens)

    class Collect(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    prompt, tokenizer = random_ids(7), Tokenizer()
    streamer = Collect(tokenizer, skip_prompt=True)
    model.generate(prompt.unsqueeze(0), streamer=streamer, do_sample=False, **OPTIONS)
    assert streamer.text == tokenizer.decode(greedy_by_forward(model, prompt)[7:])


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 8, [8], [3, 1, 4]], ids=str)
def test_logits_from_a_cache_are_those_of_the_whole(model, parts):
    """Also several tokens at a time, and with padding on either side of the prompt."""
    rows, rest = [random_ids(9, seed=1), random_ids(2, seed=2)], random_ids(2, sum(parts), seed=3)
    for side in ("left", "right"):
        ids, mask = pad(rows, side, extra=1)
        output = model(ids, attention_mask=mask, use_cache=True)
        found, at = [], 0
        for part in parts:
            output = model(rest[:, at : at + part], cache=output.cache, use_cache=True)
            found.append(output.logits)
            at += part
        found = torch.cat(found, dim=1)
        for row, prompt in enumerate(rows):
            whole = torch.cat((prompt, rest[row])).unsqueeze(0)
            expected = model(whole, prompt_length=len(prompt)).logits[0, len(prompt) :]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_has_the_size_of_mambas():
    """One state of (D, N) and one window of inputs for each layer, whatever the length of the prompt."""
    model = small_model()
    for length in (1, 30):
        cache = model(random_ids(2, length), use_cache=True).cache
        for layer in cache.layers:
            assert layer.recurrent_states[0].shape == (2, 96, 4)
            assert layer.conv_states[0].shape == (2, 96, 4)
    assert model(random_ids(2, 5), use_cache=False).cache is None


def test_a_static_cache_and_embeddings_as_inputs(model):
    ids, mask = pad([random_ids(9, seed=1), random_ids(4, seed=2)], "left")
    options = {**OPTIONS, "attention_mask": mask, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    embeddings = model.get_input_embeddings()(ids).detach()
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), expected[:, 9:])


def test_a_cache_that_generate_returned_continues(model):
    """Greedy decoding in two calls gives the tokens of one."""
    prompt, options = random_ids(1, 9), {"do_sample": False, "pad_token_id": PAD, "eos_token_id": -1}
    first = model.generate(prompt, max_new_tokens=4, return_dict_in_generate=True, **options)
    second = model.generate(first.sequences[:, -1:], cache=first.cache, max_new_tokens=5, **options)
    whole = model.generate(prompt, max_new_tokens=9, **options)
    assert torch.cat((first.sequences, second[:, 1:]), dim=1).tolist() == whole.tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", [None, "left"])
def test_a_cache_that_was_reset_takes_another_prompt(model, side):
    """As if it were new, with a tree."""
    prompts = random_ids(2, 9, seed=1), random_ids(2, 11, seed=2)
    mask = None if side is None else pad([random_ids(11), random_ids(6)], side)[1]
    cache = model(prompts[0], use_cache=True).cache
    cache.reset()
    again = model(prompts[1], attention_mask=mask, cache=cache, use_cache=True)
    new = model(prompts[1], attention_mask=mask, use_cache=True)
    for ours, expected in zip(again.cache.layers, new.cache.layers, strict=True):
        assert torch.equal(ours.recurrent_states[0], expected.recurrent_states[0])
        assert torch.equal(ours.conv_states[0], expected.conv_states[0])
    assert torch.equal(again.logits, new.logits)


def test_a_prompt_in_chunks_raises():
    with pytest.raises(ValueError, match="prefill_chunk_size must be None"):
        small_model().generate(random_ids(1, 12), prefill_chunk_size=4, **OPTIONS)


@torch.no_grad()
def test_half_precision_decodes():
    model = small_model().bfloat16()
    ids, mask = pad([random_ids(9, seed=1), random_ids(4, seed=2)], "left")
    found = model.generate(ids, attention_mask=mask, do_sample=False, **OPTIONS)
    assert found.shape == (2, 9 + NEW)
