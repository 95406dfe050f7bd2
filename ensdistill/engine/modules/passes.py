"""Forward passes of teachers and student by their own modules: as they are, with members named by tensors, compiled.

A captured step and a compiled pass serve every draw of the members, so that both want them chosen on the device. One
graph for each of the E (E − 1) pairs would hold the memory of a step's nodes, and take a capture's or a compiler's
time, twelve times over at E = 4; copying one network's weights costs megabytes a pass. So teachers of one architecture
lie in one table, a row a network, and the row that is asked for is copied out by one launch a type. A BatchEnsemble
student selects among factors, and hydra among the weights of its heads (see models/students.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.models.ensembles import Teachers, call_with, slots
from ensdistill.models.students import Student

Member = int | Tensor
"""A member: a number, or int64 (1,) on the device."""

_ALIGNED = 64
"""Elements to whose multiples tensors are aligned in a row: what reads them counts on 16 bytes and likes 128."""
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype)
"""Types of attributes that must be equal for two modules to compute alike; and tuples of them. None is not: what is
made at the first call is None in a network that was not called yet."""
_RECOMPILED = 64
"""Forms of one function that may be compiled: for every teacher, with a gradient and without."""


class ModulePasses:
    """Teachers' and student's logits by the modules.

    `choose` says how: by default as they are, with members that the host names.
    """

    def __init__(self, teachers: Teachers | None, student: Student) -> None:
        self._teachers, self._student = teachers, student
        self.on_device = False
        """True where members are named by tensors."""
        self.compiled = False
        """True where torch.compile computes the passes."""
        self._why_host: tuple[str | None] | None = None
        self._table: NetworkTable | None = None
        self._made: dict[str, Callable[..., Tensor]] = {}

    def why_host(self) -> str | None:
        """Say why teachers have to be chosen by the host; None where a tensor can choose them."""
        if self._why_host is None:
            self._why_host = (None if self._teachers is None else differing(list(self._teachers.classifiers)),)
        return self._why_host[0]

    def choose(self, *, on_device: bool, compiled: bool) -> None:
        """Set how passes are computed from here on. What was compiled before is forgotten, and compiled anew."""
        self.on_device, self.compiled = on_device, compiled
        self._made = {}
        if compiled:
            dynamo: Any = torch._dynamo
            dynamo.reset()  # what an earlier training compiled counts to the limit, beyond which nothing is, unsaid
            dynamo.config.recompile_limit = _RECOMPILED
        needs_table = on_device and self._teachers is not None and self.why_host() is None
        self._table = NetworkTable(list(self._teachers.classifiers)) if needs_table and self._teachers else None

    def all_teachers(self, x_BCHW: Tensor) -> Tensor:
        """Logits (E, B, K) of all teachers."""
        assert self._teachers is not None, "no teachers"
        if not self.compiled:
            return self._teachers(x_BCHW)
        return torch.stack([self.teacher(m, x_BCHW) for m in range(self._teachers.E)])

    def teacher(self, m: Member, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of teacher `m`."""
        assert self._teachers is not None, "no teachers"
        if isinstance(m, Tensor):
            assert self._table is not None, "choose(on_device=True) comes first"
            return self._teacher(0)(self._table.row(m), x_BCHW)
        if not self.compiled:
            return self._teachers.member(m, x_BCHW)
        own: Any = self._teachers.classifiers[m]
        return self._teacher(m if self.why_host() else 0)(slots(own), x_BCHW)

    def student(self, x_BCHW: Tensor) -> Tensor:
        """Logits (M, B, K) of the student."""
        student = self._student
        return self._pass("student", lambda: lambda x: student(x))(x_BCHW)

    def member(self, m: Member, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of the student's member `m`, to be differentiated in the images alone."""
        student = self._student
        if not self.compiled:
            return student(x_BCHW, members=m if isinstance(m, Tensor) else (m,))[0]

        def member(own: dict[str, Tensor], m_1: Tensor, x: Tensor) -> Tensor:
            return call_with(student, own, x, members=m_1)[0]

        # a compiled backward computes the gradient of whatever may have one: of detached weights none
        own = {name: tensor.detach() for name, tensor in slots(student).items() if isinstance(tensor, nn.Parameter)}
        m_1 = m if isinstance(m, Tensor) else torch.arange(m, m + 1, device=x_BCHW.device)
        return self._pass("member", lambda: member)(own, m_1, x_BCHW)

    def _teacher(self, m: int) -> Callable[..., Tensor]:
        """The pass of teacher `m`, or of all that are like it, by its tensors and the images."""
        assert self._teachers is not None
        classifier: Any = self._teachers.classifiers[m]

        def make() -> Callable[..., Tensor]:
            # called with its own tensors, or with another's, it would be two functions to a compiler
            code = _without_values(classifier) if self.compiled else classifier
            return lambda own, x: call_with(code, own, x)

        return self._pass(f"teacher {m}", make)

    def _pass(self, name: str, make: Callable[[], Callable[..., Tensor]]) -> Callable[..., Tensor]:
        if name not in self._made:
            self._made[name] = compiled(make()) if self.compiled else make()
        return self._made[name]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile `function` for the shapes that it is called with; what modules draw stays PyTorch's own draw."""
    return torch.compile(function, dynamic=False, options={"fallback_random": True})


class NetworkTable:
    """Networks of one architecture, a row each: of every type a tensor (E, elements), which their own tensors view."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        """Move the tensors of `networks` into the table, where they hold what they held."""
        self._places: dict[str, tuple[torch.dtype, int, torch.Size, tuple[int, ...]]] = {}
        sizes: dict[torch.dtype, int] = {}
        names: dict[int, str] = {}
        for name, tensor in slots(networks[0]).items():
            if id(tensor) in names:  # tied
                self._places[name] = self._places[names[id(tensor)]]
                continue
            names[id(tensor)] = name
            start = sizes.get(tensor.dtype, 0)
            strides = torch.empty_like(tensor).stride()  # dense, in the order of its own
            self._places[name] = tensor.dtype, start, tensor.shape, strides
            sizes[tensor.dtype] = start + math.ceil(tensor.numel() / _ALIGNED) * _ALIGNED
        device = next(iter(slots(networks[0]).values())).device
        self._rows = {
            dtype: torch.zeros((len(networks), size), dtype=dtype, device=device) for dtype, size in sizes.items()
        }
        for m, network in enumerate(networks):
            views, own = self._views({dtype: table[m] for dtype, table in self._rows.items()}), slots(network)
            for name in names.values():
                own[name].data = views[name].copy_(own[name].detach())

    def row(self, m_1: Tensor) -> dict[str, Tensor]:
        """Copy the tensors of network `m_1`, int64 (1,) on the device, by name."""
        return self._views({dtype: table.index_select(0, m_1)[0] for dtype, table in self._rows.items()})

    def _views(self, rows: dict[torch.dtype, Tensor]) -> dict[str, Tensor]:
        return {
            name: rows[dtype].as_strided(shape, strides, rows[dtype].storage_offset() + start)
            for name, (dtype, start, shape, strides) in self._places.items()
        }


def _without_values(module: nn.Module) -> nn.Module:
    """Copy `module` with its tensors on `meta`: its code alone."""
    memo: dict[int, Any] = {}
    for tensor in slots(module).values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


def differing(networks: Sequence[nn.Module]) -> str | None:
    """Say in what `networks` differ beside the values of their tensors; None where one's code serves all of them."""
    for m, network in enumerate(networks[1:], start=1):
        for (name, ours), (other_name, theirs) in zip(*(_parts(one) for one in (networks[0], network)), strict=False):
            if name != other_name or ours != theirs:
                return f"teacher {m + 1} differs from teacher 1 in {other_name or name}"
        if len(list(network.modules())) != len(list(networks[0].modules())):
            return f"teacher {m + 1} has other layers than teacher 1"
    return None


def _parts(network: nn.Module) -> Iterator[tuple[str, object]]:
    """Whatever of a network decides what it computes, but for the values of its tensors."""
    for name, module in network.named_modules():
        where = name or type(network).__name__
        yield where, type(module)
        yield where, {key: value for key, value in vars(module).items() if _is_plain(value)}
    first: dict[int, str] = {}
    for name, tensor in slots(network).items():
        yield name, (tensor.shape, tensor.dtype, tensor.device, first.setdefault(id(tensor), name))


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))
