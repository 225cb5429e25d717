"""The language model on a GPU: outputs and gradients of the CPU, and no wait for the device."""

import pytest
import torch
from language_helpers import GOLDEN, pad, random_ids, small_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def full_precision():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def batch():
    ids, mask = pad([random_ids(40), random_ids(23), random_ids(3)], "right", extra=1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :20] = -100
    labels[2, 2] = ids[2, 2]
    return ids, mask, labels


@torch.no_grad()
def test_golden_logits():
    logits = small_model().cuda()(GOLDEN["ids"].cuda(), prompt_length=9).logits.cpu()
    assert (logits - GOLDEN["logits_P9"]).abs().max() < 1e-4 * GOLDEN["logits_P9"].abs().max()


@pytest.mark.parametrize("edge_decay", ["next", "own"])
def test_outputs_and_gradients_are_those_of_the_cpu(edge_decay):
    inputs, results = batch(), []
    for device in ("cpu", "cuda"):
        model = small_model(edge_decay=edge_decay).to(device).train()
        ids, mask, labels = (value.to(device) for value in inputs)
        output = model(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        results.append((output.logits.detach().cpu(), [value.grad.cpu() for value in model.parameters()]))
    (expected, gradients), (found, on_gpu) = results
    real = inputs[1].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(on_gpu, gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-6


def test_nothing_waits_for_the_device():
    model = small_model().cuda().train()
    ids, mask, labels = (value.cuda() for value in batch())
    model(ids, attention_mask=mask, labels=labels).loss.backward()  # what is done once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        model(ids, labels=ids, prompt_length=9).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("edge_decay", ["next", "own"])
def test_generation_is_that_of_full_passes(edge_decay):
    model = small_model(edge_decay=edge_decay).cuda()
    ids, mask = (value.cuda() for value in pad([random_ids(13, seed=1), random_ids(6, seed=2)], "left"))
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_half_precision_trains():
    model = small_model().cuda().bfloat16().train()
    ids, mask, labels = (value.cuda() for value in batch())
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())
    exact = small_model().cuda()(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss.float(), exact, rtol=0.1, atol=0)
