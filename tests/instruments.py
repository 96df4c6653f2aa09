"""Instruments of the tests: relative errors, the largest tensor of a computation, the memory that it holds."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in the Euclidean norm, in float64.

    Where |expected| is below 1e-20, as of a state that has been forgotten, it is |got - expected|.
    """
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    scale = float(expected.norm())
    error = float((got - expected).norm())
    return error / scale if scale > 1e-20 else error


class Recorded(TorchDispatchMode):
    """Records in `outputs` (operation, elements of storage, dtype) of every tensor that an operation returns.

    This includes what runs inside a `torch.autograd.Function`, forward and backward.
    """

    def __init__(self):
        super().__init__()
        self.outputs: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                elements = t.untyped_storage().nbytes() // t.element_size()
                self.outputs.append((func.overloadpacket.__name__, elements, t.dtype))
        return result

    @property
    def largest(self) -> int:
        """The number of elements of the largest storage."""
        return max(elements for _, elements, _ in self.outputs)


class Allocated:
    """Records every allocation and release of PyTorch's CPU memory; `peak` and `kept` are bytes.

    Both count from what was held on entry. peak: the most that was held at one time; kept: what is still held on exit.
    """

    def __init__(self, folder: Path):
        self._trace = folder / "trace.json"

    def __enter__(self):
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._profiler.__enter__()
        return self

    def __exit__(self, *exception):
        self._profiler.__exit__(*exception)
        self._profiler.export_chrome_trace(str(self._trace))
        events = json.loads(self._trace.read_text())["traceEvents"]
        changes = sorted(
            ((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"), key=lambda change: change[0]
        )
        held = self.peak = 0
        for _, change in changes:
            held += change
            self.peak = max(self.peak, held)
        self.kept = held
