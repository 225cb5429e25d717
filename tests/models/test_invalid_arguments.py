"""Wrong arguments of the models: an error of a usual kind with a message, or a model that computes."""

import math
import random

import pytest
import timm
import torch

import grootv  # noqa: F401  registers the models

NAN, INF = math.nan, math.inf
WRONG = {
    "in_chans": [0, -1, 2.5, "3", 10**30],
    "num_classes": [-1, -5, 2.5, "x", 10**30],
    "global_pool": ["median", 3],
    "dims": [(), (8,), (8, 0), (8, -16), (8, 16, 32), "ab", 8, (8, 2.5), (8, "x")],
    "depths": [(), (1, -1), (1, 1.5), (1, 1, 1), "ab", 1],
    "mlp_ratio": [0, -1, NAN, INF, "x", 1e30],
    "scan": ["x", "", 3],
    "metric": ["x", "", 3],
    "root": ["x", -1],
    "tree_per": ["x", 1],
    "drop_rate": [-0.1, 2, NAN, "x"],
    "drop_path_rate": [-0.1, 1, 2, NAN, "x"],
    "d_state": [0, -1, 1.5, "x"],
    "mixer": [3, "x"],
    "norm_layer": ["nonsense", 3],
    "act_layer": ["nonsense", 3],
    "unknown": [1],
    "device": ["nowhere"],
    "dtype": ["x", torch.int64],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_each_wrong_argument_raises(name: str, value: object) -> None:
    arguments = {"dims": (8, 16), "depths": (1, 1), "num_classes": 3, name: value}
    with pytest.raises((ValueError, TypeError, RuntimeError), match="."):
        timm.create_model("grootv_nano", **arguments)


@pytest.mark.slow
def test_several_wrong_arguments_raise() -> None:
    generator = random.Random(0)
    for number in range(300):
        names = generator.sample(sorted(WRONG), generator.randint(2, 4))
        arguments = {"dims": (8, 16), "depths": (1, 1), "num_classes": 3}
        arguments.update({name: generator.choice(WRONG[name]) for name in names})
        try:
            timm.create_model("grootv_nano", **arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            assert str(error), arguments
        else:
            raise AssertionError(f"case {number}: {arguments} made a model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"drop_path_rate": NAN}, "drop_path_rate must be at least 0 and less than 1, got nan"),
        ({"global_pool": "median"}, "timm knows no global_pool 'median'"),
        ({"norm_layer": "nonsense"}, "timm knows no norm_layer 'nonsense'"),
    ],
)
def test_messages_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("grootv_nano", **arguments)
