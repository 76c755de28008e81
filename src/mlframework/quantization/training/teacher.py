"""A teacher's parameters are its own: what trains the student must not change them."""

from __future__ import annotations

from torch import nn


def require_own_parameters(teacher: nn.Module, model: nn.Module) -> None:
    """Refuses a teacher whose weights are those that are trained: it would follow its student.

    Raises:
        ValueError: the two share a Parameter.
    """
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in trained:
            raise ValueError(
                f"teacher must have parameters of its own, but its {name} is the model's {trained[id(parameter)]} (a "
                "prepared model shares its Parameters with the float model): make teacher = copy.deepcopy(model) "
                "before prepare"
            )
