"""Which steps make up the programs of a converted model, and in which order everything runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mlframework.quantization import QATConfig, convert, kernels, prepare
from mlframework.quantization.conversion.planned_calls import Planned
from mlframework.quantization.graph.generated_forward import source_of
from mlframework.quantization.int8.views import View

needs_programs = pytest.mark.skipif(kernels.active_path() != "native", reason="programs need compiled integer layers")


def converted(model: nn.Module, *inputs: Tensor) -> nn.Module:
    prepared = prepare(model, QATConfig(), inputs)
    prepared(*inputs)
    return convert(prepared.eval())


def planned(model: nn.Module) -> Planned:
    form = source_of(model).form
    assert isinstance(form, Planned)
    return form


def test_a_sequence_is_one_program() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    plan = planned(converted(model, torch.randn(2, 3, 4, 4)))
    (program,) = plan.programs
    assert program.inputs == 1
    # The input's quantization, then what the sequence holds but for the normalization, which is folded in.
    assert [step.target for step in program.steps][1:] == ["0", "3", "4"]
    assert [step.reads for step in program.steps] == [(0,), (1,), (2,), (3,)]
    assert program.outputs == (len(program.steps),)


def test_what_has_no_integer_form_lies_between_programs() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    plan = planned(converted(model, torch.randn(4, 8)))
    assert len(plan.programs) == 2
    assert not any("norm" in module for module in plan.modules)


def test_nothing_to_quantize_leaves_no_plan() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embedding(tokens).relu()

    model = converted(Alone(), torch.tensor([0, 1]))
    assert source_of(model).form is None or not any(
        isinstance(step.target, View) for program in planned(model).programs for step in program.steps
    )


class Branching(nn.Module):
    """Reads a tensor on codes before another operation changes it in place."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        first = self.one(x)
        x = self.change(x)
        return first + self.other(x)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.add_(3.0), lambda x: torch.relu_(x), nn.Hardswish(inplace=True)],
    ids=["method", "function", "module"],
)
def test_what_is_changed_in_place_was_read_before(change: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4)
    prepared = prepare(Branching(change), QATConfig(), (x,))
    prepared(x)
    prepared.eval()
    with torch.no_grad():
        assert torch.equal(convert(prepared)(x), prepared(x))


def test_random_numbers_are_drawn_in_the_order_of_the_code() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x + torch.rand(4)).sigmoid()
            return x * torch.rand(1) + torch.rand(4)

    x = torch.randn(3, 4)
    model = Noisy()
    prepared = prepare(model, QATConfig(), (x,))
    prepared(x)
    prepared.eval()
    model = convert(prepared)
    given = []
    with torch.no_grad():
        for each in (model, prepared):
            torch.manual_seed(3)
            given.append(each(x))
    assert torch.equal(*given)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, 2),
    "function": lambda x: torch.transpose(x, dim0=-1, dim1=1),
    "permute": lambda x: x.permute(0, 2, 1),
    "axes in a tuple": lambda x: torch.permute(x, (0, 2, 1)),
    "flatten": lambda x: x.flatten(1),
    "keywords": lambda x: x.flatten(start_dim=0, end_dim=1),
    "reshape": lambda x: x.reshape(-1, 3, 8),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "parts": lambda x: torch.cat([part.transpose(1, 2) for part in x.chunk(3, dim=-1)], 1),
    "part of a part": lambda x: x.chunk(2, -1)[1].chunk(2, -1)[0].flatten(1),
    "fewer parts": lambda x: x.chunk(4, 1)[2].flatten(1),
    "index": lambda x: x[:, 1],
    "index from the end": lambda x: x[..., -1] if False else x[:, :, -1],
    "contiguous": lambda x: x.transpose(1, 2).contiguous().flatten(1),
}


@needs_programs
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_between_layers_are_steps(view: Callable[[Tensor], Tensor]) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 12)
            self.last = nn.Linear(view(torch.zeros(2, 6, 12)).shape[-1], 3)
            self.other = nn.Linear(12, 1)  # without which parts that are put together would not be on one grid

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.last(view(y)), self.other(y)

    x = torch.randn(2, 6, 5)
    prepared = prepare(Viewing(), QATConfig(), (x,))
    prepared(x)
    prepared.eval()
    model = convert(prepared)
    with torch.no_grad():
        assert all(map(torch.equal, model(x), prepared(x)))
    assert len(planned(model).programs) == 1
