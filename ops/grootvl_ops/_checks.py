"""What the public functions ask of their arguments."""

import torch
from torch import Tensor


def check_parameter(name: str, parameter: Tensor, like: Tensor, shape: list[int]) -> None:
    """That a layer's parameter has the shape, any floating dtype, and the device of the map that it is applied to."""
    if list(parameter.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {list(parameter.shape)}")
    if not parameter.is_floating_point() or not like.is_floating_point():
        raise TypeError(f"{name} and its map must be floating point, got {parameter.dtype} and {like.dtype}")
    if parameter.device != like.device:
        raise ValueError(f"{name} must be on the device of its map, got {parameter.device} and {like.device}")


def check_operand(name: str, operand: Tensor, like: Tensor, shape: list[int]) -> None:
    """That an operand has the shape, and the dtype and device of the map that it is used with."""
    check_parameter(name, operand, like, shape)
    if operand.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of the other maps, {like.dtype}, got {operand.dtype}")


def dtype_of_products(x: Tensor) -> torch.dtype:
    """In which the products of a map with weights are computed: x's dtype, or under autocast autocast's."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
