"""What runs of every task use: the runner, checkpoints, hooks, distributed training on CPUs, and optimizers.

Nothing here depends on a task: any model, data set and config of mmengine can use it.
"""

from . import checkpoints, distributed, hooks, learning_curve, optim, runner

__all__ = ["checkpoints", "distributed", "hooks", "learning_curve", "optim", "runner"]
