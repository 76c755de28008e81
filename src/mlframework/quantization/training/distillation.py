"""The distance of a student's outputs from a teacher's: of logits, of anything else, and of what is inside."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..qat.layer_types import Clip, clip_of
from ..qat.qat_module_wrapper import QATModuleWrapper
from ..qat.qat_operation import QATOperation


def distillation_loss(student_outputs: Any, teacher_outputs: Any, *, temperature: float | None = None) -> Tensor:
    r"""How far a student's outputs are from its teacher's; no gradient goes to the teacher.

    With a temperature :math:`T`, outputs are logits along their last axis (Hinton et al., 2015, arXiv:1503.02531,
    section 2: :math:`T^2` keeps gradients at the size that they have for :math:`T = 1`):

    .. math:: L = T^2\, \frac{1}{N} \sum_n \mathrm{KL}\big(\mathrm{softmax}(t_n / T)\ \|\ \mathrm{softmax}(s_n / T)\big)

    Without one they are any real numbers, and the loss is the squared error relative to the teacher's power, which is
    the inverse of a signal-to-noise ratio:

    .. math:: L = \sum (s - t)^2 \,/\, \sum t^2

    Args:
        student_outputs: floating-point tensors: one, or several in tuples, lists and dictionaries.
        teacher_outputs: the same structure; what holds no floating-point values is ignored.
        temperature: softens the distributions; None for outputs that are not logits.

    Returns:
        A float32 scalar: the mean over the tensors.

    Raises:
        TypeError: the two structures do not hold as many floating-point tensors, or none.
        ValueError: shapes differ, or the temperature is not positive.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> distillation_loss(teacher, teacher, temperature=4.0)
        tensor(0.)
        >>> distillation_loss(torch.zeros(2, 2), teacher)
        tensor(1.)
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive or None, got {temperature!r}")
    students, teachers = _tensors(student_outputs), _tensors(teacher_outputs)
    if not students or len(students) != len(teachers):
        raise TypeError(
            "student_outputs and teacher_outputs must hold the same floating-point tensors, "
            f"got {len(students)} and {len(teachers)}"
        )
    for student, teacher in zip(students, teachers, strict=True):
        if student.shape != teacher.shape:
            raise ValueError(
                "student_outputs must have the shape of teacher_outputs, "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
    pairs = [(student.float(), teacher.detach().float()) for student, teacher in zip(students, teachers, strict=True)]
    if temperature is None:
        return torch.stack([_relative_error(*pair) for pair in pairs]).mean()
    return torch.stack([_divergence(*pair, temperature) for pair in pairs]).mean()


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    power = teacher.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (student - teacher).square().sum() / power


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    divergence = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * divergence.sum(-1).mean()


class FeatureMatching:
    """Compares what modules inside two models return, by their names: the mean of :func:`distillation_loss` over them.

    Both models run first; then :meth:`loss` compares what they computed last, and forgets it. As a context manager, it
    takes its hooks off at the end.

    A layer of a prepared model returns what the batch normalization and the activation that it took in return, and so
    does a container that ends in it, also where these come after the container in the teacher. The output is then
    compared with that of the teacher's batch normalization, and an activation that only clips (ReLU, ReLU6, Hardtanh)
    is applied to the teacher's output; one that was clipped already stays as it is.

    Args:
        student: the model in training.
        teacher: the model that it is to be like.
        names: of modules in both, as ``named_modules()`` has them.

    Raises:
        ValueError: a name is not in both models, or the student's layer takes in a batch normalization that is no
            module of the teacher.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> student = prepare(copy.deepcopy(teacher), QATConfig(), (torch.randn(2, 4),))
        >>> with FeatureMatching(student, teacher, ("0",)) as features:
        ...     outputs, targets = student(x := torch.randn(2, 4)), teacher(x)
        ...     loss = distillation_loss(outputs, targets) + features.loss()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> None:
        if isinstance(names, str) or not names:
            raise ValueError(f"names must be a sequence of at least one module name, got {names!r}")
        pairs = [_modules_to_compare(student, teacher, name) for name in names]
        self._names = tuple(names)
        self._student: dict[str, Any] = {}
        self._teacher: dict[str, Any] = {}
        self._clips: dict[str, list[Clip]] = {}
        self._handles: list[RemovableHandle] = []
        for name, (own, other) in zip(names, pairs, strict=True):
            self._handles += _keep_clips(own, self._clips, name)
            self._handles += [_keep_output(own, self._student, name), _keep_output(other, self._teacher, name)]

    def leave_out_idle(self) -> tuple[str, ...]:
        """Goes on without the modules that did not run in both models since the last :meth:`loss`.

        Returns:
            Their names.

        Raises:
            ValueError: none did.
        """
        idle = tuple(name for name in self._names if name not in self._student or name not in self._teacher)
        if len(idle) == len(self._names):
            raise ValueError(f"names must be of modules that both models call, got {', '.join(idle)}")
        self._names = tuple(name for name in self._names if name not in idle)
        return idle

    def loss(self) -> Tensor:
        """The mean over the modules of the squared error relative to the teacher's power.

        Raises:
            RuntimeError: a module has not run in both models since the last call.
        """
        missing = [name for name in self._names if name not in self._student or name not in self._teacher]
        if missing:
            raise RuntimeError(f"run both models before loss(): {', '.join(missing)} did not run in both")
        losses = [distillation_loss(self._student[name], self._expected(name)) for name in self._names]
        self._student.clear()
        self._teacher.clear()
        return torch.stack(losses).mean()

    def _expected(self, name: str) -> Any:
        """The teacher's output, clipped as the student's is."""
        outputs, clips = self._teacher[name], self._clips[name]
        tensors = _tensors(outputs)
        if len(tensors) != len(clips):
            return outputs
        return [tensor.clamp(*clip) for tensor, clip in zip(tensors, clips, strict=True)]

    def remove(self) -> None:
        """Takes the hooks off both models."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> FeatureMatching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _keep_output(module: nn.Module, outputs: dict[str, Any], name: str) -> RemovableHandle:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = output

    return module.register_forward_hook(keep)


def _keep_clips(module: nn.Module, clips: dict[str, list[Clip]], name: str) -> list[RemovableHandle]:
    """Notes, for every tensor that a student's module returns, what the layer or operation that made it clips it to."""
    none: Clip = (-math.inf, math.inf)
    made: list[tuple[weakref.ref[Tensor], Clip]] = []

    def note(producer: QATModuleWrapper | QATOperation, args: Any, output: Tensor) -> None:
        made.append((weakref.ref(output), producer._clip))

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        clips[name] = [next((clip for ref, clip in made if ref() is tensor), none) for tensor in _tensors(output)]
        made.clear()

    producers = [each for each in module.modules() if isinstance(each, (QATModuleWrapper, QATOperation))]
    clipping = [each for each in producers if each._clip != none]
    return [*(each.register_forward_hook(note) for each in clipping), module.register_forward_hook(keep)]


def _modules_to_compare(student: nn.Module, teacher: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """The modules of both models whose outputs are to be the same, but for clipping."""
    own, other = (
        dict(student.named_modules(remove_duplicate=False)),
        dict(teacher.named_modules(remove_duplicate=False)),
    )
    for modules, which in ((own, "student"), (other, "teacher")):
        if name not in modules:
            raise ValueError(f"names must be of modules in both models, got {name!r}, which the {which} does not have")
    module, inside = own[name], f"{name}." if name else ""
    for wrapper in module.modules():
        for norm in wrapper.following if isinstance(wrapper, QATModuleWrapper) else ():
            if clip_of(norm) is not None:
                continue
            found = [path for path, each in own.items() if each is norm and path in other]
            if found and not any(path.startswith(inside) for path in found):
                return module, other[found[0]]
            if not found and wrapper is module:
                raise ValueError(
                    f"names must be of modules that compute the same in both models, got {name!r}: the student takes "
                    f"in the {type(norm).__name__} that follows it, which is no module of the teacher; name the "
                    "container of both"
                )
    return module, other[name]
