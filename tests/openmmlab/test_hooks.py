"""Hooks of runs of every task."""

import random
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine")

import numpy as np
import torch

from grootv.openmmlab.runtime.hooks import IterationSeedHook


class RandomItems(torch.utils.data.Dataset):
    """Items as OpenMMLab's pipelines make them: random by the generators of the loading process."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([np.random.rand(), random.random(), torch.rand(1).item()])


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_any_data_set_are_repeatable_and_differ(workers: int) -> None:
    loader = torch.utils.data.DataLoader(RandomItems(), batch_size=1, num_workers=workers)
    hook = IterationSeedHook()

    def epoch(iteration: int, rank: int) -> torch.Tensor:
        hook.before_train_epoch(
            SimpleNamespace(train_dataloader=loader, train_loop=None, seed=3, iter=iteration, rank=rank)
        )
        return torch.cat(list(loader))

    first = epoch(6, 0)
    assert torch.equal(first, epoch(6, 0)) and len(first.unique()) == first.numel()
    for other in (epoch(12, 0), epoch(6, 1)):
        assert not torch.isin(first, other).any()
