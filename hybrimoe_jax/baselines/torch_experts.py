"""Routed experts in torch: how they lie in memory, and the forms in which torch computes some of them.

All experts of a layer, or all slots, lie behind one another as rows of one buffer of bytes (`Bank`), so a transfer is
one copy and torch's grouped and batched products can take them as they lie. Which form is the fastest depends on the
load, the size and the machine, so it is measured at load (`choose_forms`) and remembered by load.

Shapes: E experts of a bank, D model width, F expert width, N rows of x, n experts computed at once.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hybrimoe_jax.baselines.torch_linear import (
    PANEL,
    Int4Matrix,
    Tensor,
    fits_int4,
    int4_product,
    int4_widened,
    rounded,
    tensor_of,
    unpacks_int4,
)
from hybrimoe_jax.formats.layout import Format, PackedExpert, is_format
from hybrimoe_jax.formats.packing import HostExpert, plain_expert

ALIGNED = 64
LOADS = (1, 4, 16, 64, 256)
"""Load classes: a form is chosen for loads up to each, and the last one's for all above."""
REPEATS = 4

Rows = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExpertKind:
    """What an expert is made of, here.

    Attributes:
      width, hidden: D and F.
      dtype: of plain matrices and of activations.
      int4: the quantised format that torch's int4 kernel computes; None for plain matrices.
      rounds: the group of activations that are rounded (`-a8`); 0: they are not.
    """

    width: int
    hidden: int
    dtype: torch.dtype
    int4: Format | None = None
    rounds: int = 0

    @classmethod
    def of(cls, format: str, width: int, hidden: int, precision: str, device: torch.device) -> ExpertKind:
        """Of a checkpoint's format; see `torch_linear` for what the precision means."""
        dtype = getattr(torch, precision)
        if not is_format(format):
            return cls(width, hidden, dtype)
        parsed = Format.parse(format)
        if dtype == torch.float32:
            return cls(width, hidden, dtype, rounds=parsed.group if parsed.a8 else 0)
        fits = fits_int4(2 * hidden, width, parsed) and fits_int4(width, hidden, parsed) and device.type == "cpu"
        return cls(width, hidden, dtype, int4=parsed if fits else None)

    @property
    def note(self) -> str:
        """What becomes of quantised experts, in words."""
        if self.int4 is not None:
            halves = ", two of its matrices for each of 8 bits" if self.int4.bits == 8 else ""
            return f"{self.int4} experts by torch's int4 kernel{halves}, activations and scales in bfloat16"
        return f"experts in {str(self.dtype).removeprefix('torch.')}"

    def parts(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of an expert's tensors: gate_up and down, or codes and scales of each."""
        inward, outward = (2 * self.hidden, self.width), (self.width, self.hidden)
        if self.int4 is None:
            return [(inward, self.dtype), (outward, self.dtype)]
        twice, parts = 1 + (self.int4.bits == 8), []
        for rows, columns in (inward, outward):
            parts.append(((rows, twice * columns // 2), torch.uint8))
            parts.append(((twice * columns // self.int4.group, rows, 2), self.dtype))
        return parts

    def tensors(self, expert: HostExpert) -> list[Tensor]:
        """The parts of one expert of a checkpoint."""
        if self.int4 is not None:
            assert isinstance(expert, PackedExpert)
            gate, up, down = expert.matrices
            return [*Int4Matrix([gate, up], self.dtype).tensors, *Int4Matrix([down], self.dtype).tensors]
        whole = plain_expert(expert)
        return [tensor_of(matrix, self.dtype) for matrix in whole]


class Bank:
    """Places for `count` experts of a kind, rows of one buffer `data` uint8 [count, bytes].

    Attributes: `parts`: the kind's tensors, each [count, ...]; `views`: of each place, its tensors.
    """

    def __init__(self, kind: ExpertKind, count: int, device: torch.device, pinned: bool = False):
        self.kind, self.count = kind, count
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in kind.parts()]
        starts = np.cumsum([0, *(-(-size // ALIGNED) * ALIGNED for size in sizes)]).tolist()
        self.expert_bytes = sum(sizes)
        self.data = torch.zeros((count, starts[-1]), dtype=torch.uint8, device=device, pin_memory=pinned)
        self.parts = [
            self.data[:, start : start + size].view(dtype).unflatten(1, shape)
            for start, size, (shape, dtype) in zip(starts, sizes, kind.parts())
        ]
        self.views = list(zip(*(part.unbind() for part in self.parts))) if count else []

    def fill(self, place: int, expert: HostExpert) -> None:
        for view, tensor in zip(self.views[place], self.kind.tensors(expert), strict=True):
            view.copy_(tensor)


@dataclasses.dataclass
class Work:
    """Experts of one layer to compute: places of a bank, and by each its rows of x and their weights.

    `rows` and `weights` are numpy; x [N, D] lies on the bank's device.
    """

    bank: Bank
    places: list[int]
    x: Tensor
    rows: Rows
    weights: Rows

    @property
    def most(self) -> int:
        """The largest load."""
        return max(map(len, self.rows), default=0)


def one_token(work: Work, out: Tensor) -> None:
    """`out` [1, D] plus all experts of a single token: matrix-vector products into rows of one buffer."""
    kind, views, count = work.bank.kind, work.bank.views, len(work.places)
    x = rounded(work.x, kind.rounds)[0] if kind.rounds else work.x[0]
    weights = torch.from_numpy(np.concatenate(work.weights))[:, None]
    if x.device.type != "cpu":
        weights = weights.to(x.device, non_blocking=True)
    both = torch.empty((count, 2 * kind.hidden), dtype=kind.dtype, device=x.device)
    for place, row in zip(work.places, both.unbind()):
        torch.mv(views[place][0], x, out=row)
    gate, up = both.chunk(2, 1)
    inner = functional.silu(gate).mul_(up)
    if kind.rounds:
        inner = rounded(inner, kind.rounds)
    if kind.dtype == torch.float32:
        total = out[0]
        for place, row in zip(work.places, inner.mul_(weights).unbind()):
            total.addmv_(views[place][1], row)
        return
    parts = torch.empty((count, kind.width), dtype=kind.dtype, device=x.device)
    for place, row, part in zip(work.places, inner.unbind(), parts.unbind()):
        torch.mv(views[place][1], row, out=part)
    out.addmm_(weights.t(), parts.float())


def loop(work: Work, out: Tensor, product: Callable[..., Tensor] = int4_product) -> None:
    """`out` [N, D] plus one expert behind the other. Args: product: of int4 matrices."""
    kind, whole = work.bank.kind, work.x.shape[0]
    for place, rows, weights in zip(work.places, work.rows, work.weights):
        index, mix = (torch.from_numpy(part).to(out.device, non_blocking=True) for part in (rows, weights))
        x = work.x if len(rows) == whole else work.x[index]
        y = forward(kind, work.bank.views[place], x, product).float() * mix[:, None]
        if len(rows) == whole:  # in order, as routing is read
            out.add_(y)
        else:
            out.index_add_(0, index, y)


def widened(work: Work, out: Tensor) -> None:
    """The same with each int4 matrix unpacked first."""
    loop(work, out, int4_widened)


def forward(kind: ExpertKind, parts: Sequence[Tensor], x: Tensor, product: Callable[..., Tensor]) -> Tensor:
    """One expert of x [N, D] -> [N, D]."""
    if kind.int4 is not None:
        group, twice = kind.int4.group, kind.int4.bits == 8
        gate, up = product(x, parts[0], parts[1], group, twice).chunk(2, -1)
        return product(functional.silu(gate) * up, parts[2], parts[3], group, twice)
    if kind.rounds:
        x = rounded(x, kind.rounds)
    gate, up = functional.linear(x, parts[0]).chunk(2, -1)
    inner = functional.silu(gate) * up
    return functional.linear(rounded(inner, kind.rounds) if kind.rounds else inner, parts[1])


def grouped(work: Work, out: Tensor) -> None:
    """`out` [N, D] plus all experts in torch's grouped product, over the bank as it lies."""
    bank, device = work.bank, out.device
    order = sorted(range(len(work.places)), key=work.places.__getitem__)
    counts = np.zeros(bank.count, np.int32)
    for i in order:
        counts[work.places[i]] = len(work.rows[i])
    ends = torch.from_numpy(np.cumsum(counts, dtype=np.int32)).to(device)
    index = torch.from_numpy(np.concatenate([work.rows[i] for i in order])).to(device)
    mix = torch.from_numpy(np.concatenate([work.weights[i] for i in order])).to(device)
    inward, outward = (part.transpose(1, 2) for part in bank.parts)
    gate, up = torch._grouped_mm(work.x[index], inward, offs=ends).chunk(2, -1)
    y = torch._grouped_mm(functional.silu(gate) * up, outward, offs=ends)
    out.index_add_(0, index, y.float() * mix[:, None])


def batched(work: Work, out: Tensor) -> None:
    """`out` [N, D] plus all experts in batched products; loads are padded to the largest, and matrices gathered."""
    bank, device, most = work.bank, out.device, work.most
    rows, weights = (np.zeros((len(work.places), most), dtype) for dtype in (np.int64, np.float32))
    for i, (own, mix) in enumerate(zip(work.rows, work.weights)):
        rows[i, : len(own)], weights[i, : len(mix)] = own, mix
    index, mix = (torch.from_numpy(part.ravel()).to(device) for part in (rows, weights))
    every = work.places == list(range(bank.count))
    inward, outward = bank.parts if every else [part[torch.tensor(work.places, device=device)] for part in bank.parts]
    x = work.x[index].view(len(work.places), most, -1)
    gate, up = torch.bmm(x, inward.transpose(1, 2)).chunk(2, -1)
    y = torch.bmm(functional.silu(gate) * up, outward.transpose(1, 2)).flatten(0, 1)
    out.index_add_(0, index, y.float() * mix[:, None])


Form = Callable[[Work, Tensor], None]
TOGETHER: dict[str, Callable[[Work], int]] = {
    "grouped": lambda work: sum(map(len, work.rows)),
    "batched": lambda work: work.most * len(work.rows),
}
"""Forms that compute all experts together, and how many rows they then have, padding included."""
FORMS: dict[str, Form] = {"loop": loop, "grouped": grouped, "batched": batched, "widened": widened}


def forms_of(kind: ExpertKind) -> dict[str, Form]:
    """Those that compute such experts."""
    if kind.int4 is None:
        names = ("loop",) if kind.rounds else ("loop", "grouped", "batched")
    else:
        whole = 2 * kind.hidden % PANEL == 0 and kind.width % PANEL == 0
        names = ("loop", "widened") if whole and unpacks_int4() else ("loop",)
    return {name: FORMS[name] for name in names}


class Experts:
    """Computes experts in the form that was the fastest for their load.

    Attributes: `forms`: by load class, the name of a form; `measured`: by load class and form, seconds; `most_rows`:
    that may be computed together, as memory allows; more are computed one expert behind the other.
    """

    most_rows: float = math.inf

    def __init__(self, kind: ExpertKind):
        self.kind = kind
        self.forms: dict[int, str] = dict.fromkeys(LOADS, "loop")
        self.measured: dict[int, dict[str, float]] = {}

    def describe(self) -> dict[str, Any]:
        """For statistics: the form of each load class."""
        return {"experts": self.kind.note, "forms": {str(load): form for load, form in self.forms.items()}}

    def form(self, load: int) -> str:
        return self.forms[next((most for most in LOADS if load <= most), LOADS[-1])]

    def __call__(self, work: Work, out: Tensor) -> None:
        """Adds them to `out` float32 [N, D]."""
        if not work.places:
            return
        if work.x.shape[0] == 1 and self.kind.int4 is None:
            one_token(work, out)
        else:
            form = self.form(work.most)
            if form in TOGETHER and TOGETHER[form](work) > self.most_rows:
                form = "loop"
            FORMS[form](work, out)

    def choose_forms(self, bank: Bank, budget_s: float) -> None:
        """Measures each form on a bank's experts at each load; a class that would take too long has the one below's."""
        forms = forms_of(self.kind)
        if len(forms) == 1 or not bank.count:
            return
        began = time.perf_counter()
        for before, load in zip((LOADS[0], *LOADS), LOADS):
            if time.perf_counter() - began > budget_s:
                self.forms[load] = self.forms[before]
                continue
            self.measured[load] = {name: self._seconds(form, bank, load) for name, form in forms.items()}
            self.forms[load] = min(self.measured[load], key=self.measured[load].__getitem__)

    def _seconds(self, form: Form, bank: Bank, load: int) -> float:
        """The best of a few runs; of a form that this torch has not, infinity."""
        count = min(bank.count, 4)
        rows = max(2, load)
        x = torch.full((rows, self.kind.width), 0.01, dtype=self.kind.dtype, device=bank.data.device)
        ids, mix = np.arange(load), np.full(load, 0.1, np.float32)
        best = float("inf")
        for turn in range(REPEATS):
            places = [(turn * count + i) % bank.count for i in range(count)]
            work = Work(bank, sorted(places), x, [ids] * count, [mix] * count)
            out = torch.zeros((rows, self.kind.width), device=bank.data.device)
            start = time.perf_counter()
            try:
                form(work, out)
            except (RuntimeError, AttributeError, NotImplementedError):
                return float("inf")
            if out.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                best = min(best, time.perf_counter() - start)
        return best
