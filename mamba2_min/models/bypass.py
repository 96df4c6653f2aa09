"""Is a module plain? A fast path that reads its parameters asks this first: would calling the module do the same?

Adapters, hooks, quantized or offloaded weights change what a call does. A fast path would miss all of them without an
error. It therefore asks at each use, and calls the module if the answer is no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mamba2_min.ops.autograd import is_traced

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, "_global" + name) for name in _HOOKS]

Forwards = Mapping[type[nn.Module], Callable[..., Any]]


def forwards(*classes: type[nn.Module]) -> Forwards:
    """Each class with its present `forward`, so that `is_plain` notices one that is exchanged later."""
    return {cls: cls.forward for cls in classes}


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of `module` runs more than its class's forward: hooks, also global ones, or its own forward."""
    own = module.__dict__
    return "forward" in own or any(own[name] for name in _HOOKS) or any(_GLOBAL_HOOKS)


def is_plain(module: nn.Module, known: Forwards) -> bool:
    """Whether a call of `module` does what one of the `known` classes does, with ordinary tensors, and nothing else.

    False for a subclass (parametrizations make one), for a hook, for a forward that the instance or its class was
    given, and for parameters that are not plain tensors in memory (meta, sharded, quantised). False as well where
    PyTorch looks into the computation (torch.func, torch.export): it shall see what the module itself computes.
    """
    return (
        known.get(type(module)) is type(module).forward
        and not is_hooked(module)
        and all(p is None or (type(p) in (nn.Parameter, Tensor) and not p.is_meta) for p in module._parameters.values())
        and not is_traced()
    )


class Watch:
    """Tells within microseconds whether a model that was plain has changed.

    The values of parameters may change. These may not: classes, hooks, forwards, a module's children and tensors, their
    place in memory, and the epsilon of a norm.
    """

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._own = [module.__dict__ for module in self._modules]
        self._norms = [own for own in self._own if "eps" in own]
        holders = [own[name] for own in self._own for name in ("_modules", "_parameters", "_buffers")]
        self._holders = [holder.values() for holder in holders if holder]  # live views
        self._tensors = [*model.parameters(), *model.buffers()]
        self._held = list(self._all_held())
        self._types, self._places, self._eps = self._look()

    def sees_no_change(self, model: nn.Module) -> bool:
        return (
            model is self._modules[0]
            and all(map(is_, self._all_held(), self._held))
            and (self._types, self._places, self._eps) == self._look()
            and not any(map(_PRE_HOOKS, self._own))
            and not any(map(_HOOKS_AFTER, self._own))
            and not any("forward" in own for own in self._own)
            and not any(_GLOBAL_HOOKS)
        )

    def _all_held(self) -> Iterator[Any]:
        return chain(*self._holders, [_END])

    def _look(self) -> tuple[list[Any], ...]:
        types = list(map(type, self._modules))
        return types, list(map(Tensor.data_ptr, self._tensors)), list(map(_EPS, self._norms))


_END = object()
_PRE_HOOKS, _HOOKS_AFTER, _EPS = itemgetter("_forward_pre_hooks"), itemgetter("_forward_hooks"), itemgetter("eps")
