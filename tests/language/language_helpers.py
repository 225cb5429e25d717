"""A small GrootL with parameters by name, and batches made from sequences."""

from pathlib import Path

import torch
from golden import grootl_fill
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from grootl import GrootLConfig, GrootLForCausalLM
from grootl.sample_data import train_tokenizer

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "grootl.pt", weights_only=True)
VOCABULARY = GOLDEN["config"]["vocab_size"]
PAD = 0


def small_config(**changes) -> GrootLConfig:
    return GrootLConfig(**{**GOLDEN["config"], **changes})


def filled(model):
    """The model in eval mode with the golden parameters."""
    grootl_fill.fill(dict(model.named_parameters()))
    return model.eval()


def small_model(**changes) -> GrootLForCausalLM:
    return filled(GrootLForCausalLM(small_config(**changes)))


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Tokens that are neither padding nor end of text."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    """A batch (B, L) of rows (L_i,) with padding on one side, `extra` positions longer than its longest row, and its
    attention mask."""
    length = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, after end of text, which is also padding."""
    return train_tokenizer([], 257)


def save_mamba(folder: Path, **changes) -> MambaForCausalLM:
    """A small Mamba for `byte_tokenizer` with random weights, in the folder beside its tokenizer, as transformers saves
    it."""
    settings = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 260, **changes}
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**settings)).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model
