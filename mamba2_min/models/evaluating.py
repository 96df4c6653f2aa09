"""A model in evaluation mode, temporarily."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
_inside: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; afterwards each of its modules is in the mode that it was in.

    Several threads may do so at once: the first one switches, and the last one switches back.
    """
    with _lock:
        count, trained = _inside.get(model, (0, []))
        if not count:
            trained = [module for module in model.modules() if module.training]
            for module in trained:
                module.training = False
        _inside[model] = count + 1, trained
    try:
        yield
    finally:
        with _lock:
            count, trained = _inside[model]
            if count > 1:
                _inside[model] = count - 1, trained
            else:
                del _inside[model]
                for module in trained:
                    module.training = True
