"""Runs each way that a scan takes on a GPU once, for compute-sanitizer, which is slow:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --kernel-name kns=grootvl \\
        python ops/tests/sanitize.py

For the tool initcheck leave out the kernel names: it takes what other kernels write for uninitialised otherwise.
Sums on chip, whole trees, runs, sections of runs; rows that are copied in chunks of 16 bytes, and rows that cannot be.
"""

import torch

import grootvl_ops

SIZES = [
    (2, 7, 7, 40, torch.float32),
    (20, 17, 16, 864, torch.float32),
    (2, 20, 21, 40, torch.float32),
    (1, 96, 97, 33, torch.float32),
    (2, 20, 21, 40, torch.float16),
    (1, 96, 97, 40, torch.float16),
]


def main() -> None:
    torch.manual_seed(0)
    for batch, height, width, channels, dtype in SIZES:
        tree = grootvl_ops.build_tree(torch.randn(batch, height, width, 8, device="cuda"))

        def leaf(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=like, requires_grad=True)

        maps = (batch, height * width, channels)
        x, decay, dt = leaf(*maps), leaf(*maps), leaf(*maps[:2], 4)
        parameters = [leaf(*shape, like=torch.float32) for shape in ((channels, 4), (channels,), (channels,))]
        input_weight = leaf(*maps[:2])
        for up_only in (False, True):
            grootvl_ops.tree_scan(x, decay.sigmoid(), tree, up_only).sum().backward()
            grootvl_ops.selective_scan(x, dt, *parameters, input_weight, tree, up_only).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
