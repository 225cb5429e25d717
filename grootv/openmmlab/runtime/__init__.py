"""What runs of every task use: the runner, checkpoints, hooks, the end on SIGTERM, distributed training, optimizers.

Nothing here depends on a task: any model, data set and config of mmengine can use it.
"""

from . import (
    checkpoints,
    data_errors,
    distributed,
    finite,
    hooks,
    learning_curve,
    optim,
    runner,
    termination,
    work_dir_lock,
)

__all__ = [
    "checkpoints",
    "data_errors",
    "distributed",
    "finite",
    "hooks",
    "learning_curve",
    "optim",
    "runner",
    "termination",
    "work_dir_lock",
]
