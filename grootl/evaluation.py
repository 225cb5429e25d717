"""GrootL in lm-evaluation-harness: importing this module registers the model `grootl` there.

    python -m grootl.evaluation run --model grootl --model_args pretrained=FOLDER --tasks piqa --batch_size 16

is the harness's own command line with that model. Models of Mamba load, too; `tree_scale=0` in `--model_args` evaluates
them without the tree.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from tqdm import tqdm

from .configuration_grootl import GrootLConfig
from .modeling_grootl import GrootLForCausalLM

__all__ = ["GrootLLM"]


@register_model("grootl")
class GrootLLM(HFLM):
    """The harness's model for transformers, with the context of a log-likelihood as the prompt.

    Requests of one batch have contexts of their own lengths, and any batch size gives the result of batch size one.
    """

    AUTO_MODEL_CLASS = GrootLForCausalLM

    # Of HFLM, whose decorator hides them from type checkers.
    batch_size: Any
    device: Any
    max_length: int
    mixed_precision_dtype: torch.dtype | None
    model: Any
    softmax_dtype: torch.dtype | None
    _batch_scheduler: Any

    def _get_config(self, pretrained: str, *, revision: str = "main", subfolder: str = "", **_: Any) -> None:
        self._config = GrootLConfig.from_pretrained(pretrained, revision=revision, subfolder=subfolder)

    def _get_backend(self, *_: Any, **__: Any) -> None:
        self.backend = "causal"

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(Log-likelihood of the continuation after the context, whether greedy decoding gives it) of each request.

        Contexts that are too long lose tokens at their beginning. The harness would group requests by their whole text.
        Here the boundary between context and continuation matters, so that only requests with both in common are alike.
        """

        def longest_first(request: tuple) -> tuple:
            return -len(request[1]) - len(request[2]), request[1] + request[2]

        ordered = Collator(requests, sort_fn=longest_first)
        automatic = self.batch_size == "auto" and override_bs is None
        if automatic:
            self.batch_sizes = {}
        batches = ordered.get_batched(
            n=0 if automatic else int(override_bs or self.batch_size),
            batch_fn=self._batch_scheduler if automatic else None,
        )
        results: list[tuple[float, bool]] = []
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Log-likelihoods")
        for batch in batches:
            for (text, _, _), result in zip(batch, self._batch_log_likelihoods(batch), strict=True):
                results.append(result)
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, result)
            progress.update(len(batch))
        progress.close()
        return ordered.get_original(results)

    @torch.no_grad()
    def _batch_log_likelihoods(self, batch: list[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        # The last token predicts nothing that is asked for.
        rows = [(context + continuation)[-self.max_length - 1 : -1] for _, context, continuation in batch]
        prompts = [len(row) + 1 - len(continuation) for row, (_, _, continuation) in zip(rows, batch, strict=True)]
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt < 1:
                raise ValueError(
                    f"a continuation must leave room for one token of context in max_length, {self.max_length}, "
                    f"got {len(row) + 1 - prompt} tokens"
                )
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            logits = self.model(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                prompt_length=torch.tensor(prompts),
                use_cache=False,
            ).logits
        results = []
        for row, prompt, of_row, (_, _, continuation) in zip(rows, prompts, logits, batch, strict=True):
            logs = of_row[prompt - 1 : len(row)].log_softmax(-1, dtype=self.softmax_dtype or torch.float32)
            tokens = torch.tensor(continuation, device=logs.device)
            total = logs.gather(1, tokens.unsqueeze(1)).sum().item()
            results.append((total, bool((logs.argmax(-1) == tokens).all())))
        return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
