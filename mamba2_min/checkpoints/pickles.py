"""What a checkpoint's pickle would build, found out without building it.

A pickle is a program for a stack machine. torch's own reader runs no foreign code, but it builds whatever the program
says: a thousand lists that share lists, which no walk would ever finish; a dictionary of 50,000 keys with one hash;
tensors that claim more numbers than there are. Here the program is followed with placeholders for values. It passes if
it builds a tree: numbers, texts, tuples, lists and dictionaries with texts or integers as keys, and tensors that lie
inside their storages. Then every walk takes time in proportion to the file's length.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Mapping
from typing import Any

MAX_VALUES = 1 << 20  # a model of 100 layers and its optimizer have some 60,000
_MAX_DEPTH = 32  # of containers in containers
_MAX_SHARED = 64  # entries of a tuple that is used in several places, such as the betas of two parameter groups

_ITEM_BYTES = {
    "torch DoubleStorage": 8,
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch LongStorage": 8,
    "torch IntStorage": 4,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
    "torch BoolStorage": 1,
    "torch.storage UntypedStorage": 1,
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_SCALARS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class ForeignObject(ValueError):
    """The pickle builds something other than tensors, numbers, texts and containers of them; the message names it."""


class _Mark:
    """The place of a value whose content does not matter."""

    depth = 1  # of nested containers, itself included


class _List(_Mark):
    pass


class _Dict(_Mark):
    def __init__(self) -> None:
        self.keys: list[Any] = []


class _Global(_Mark):
    def __init__(self, name: str):
        self.name = name


class _Storage(_Mark):
    def __init__(self, items: int):
        self.items = items


class _Tensor(_Mark):
    pass


_MARK = _Mark()


def check(data: bytes, sizes: Mapping[str, int]) -> None:
    """Follows the pickle `data` of an archive whose storages have `sizes` bytes, by key.

    Raises ForeignObject where it builds anything but a tree of tensors and plain values, ValueError where it is damaged
    or claims more than there is.
    """
    machine = _Machine(sizes)
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    if len(machine.stack) != 1:
        raise ValueError("its structure is damaged")
    _plain(machine.stack[0])


class _Machine:
    """The stack and the memo of a pickle, with placeholders for values that are not needed to judge it."""

    def __init__(self, sizes: Mapping[str, int]):
        self.sizes = sizes
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.values = 0

    def step(self, name: str, argument: Any) -> None:
        """Follows one instruction."""
        if name in ("BINPUT", "LONG_BINPUT"):
            if argument > MAX_VALUES:
                raise ValueError("its structure is damaged")
            self.memo[argument] = self._top()
            return
        if name == "PROTO":
            return
        self._count(1)
        if name in _SCALARS:
            if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63:
                raise ValueError("it holds an integer of more than 64 bits")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "EMPTY_LIST":
            self.stack.append(_List())
        elif name == "EMPTY_DICT":
            self.stack.append(_Dict())
        elif name == "TUPLE":
            self._push_tuple(self._to_mark())
        elif name in _TUPLES:
            self._push_tuple(self._pop(_TUPLES[name]))
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._shared(argument))
        elif name in ("APPEND", "APPENDS"):
            values = self._pop(1) if name == "APPEND" else self._to_mark()
            _put(self._expect(self._top(), _List), values)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._pop(2) if name == "SETITEM" else self._to_mark())
        elif name == "GLOBAL":
            if argument not in (_DICT, _TENSOR, _PARAMETER) and argument not in _ITEM_BYTES:
                raise ForeignObject(argument.replace(" ", "."))
            self.stack.append(_Global(argument))
        elif name == "BINPERSID":
            self.stack.append(self._storage(self._pop(1)[0]))
        elif name == "REDUCE":
            called, arguments = self._pop(2)
            self.stack.append(self._made(called, arguments))
        elif name == "BUILD":
            self._build(*self._pop(2))
        else:
            raise ForeignObject(f"the instruction {name}")

    def _push_tuple(self, parts: list[Any]) -> None:
        self.stack.append(tuple(parts))
        _depth(self.stack[-1])

    def _set_items(self, items: list[Any]) -> None:
        target = self._expect(self._top(), _Dict)
        if len(items) % 2:
            raise ValueError("its structure is damaged")
        for key in items[::2]:
            # Any number of other keys, such as tuples of -1 and -2, can have the same hash.
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise ForeignObject("a dictionary with keys other than texts and integers")
            target.keys.append(key)
        _put(target, items[1::2])

    def _shared(self, index: int) -> Any:
        """A value that is used in several places. Of containers only small tuples may be, as nothing can be added to
        them: then there are no cycles, and no structure is larger than what was counted."""
        value = self.memo.get(index, _MARK)
        if isinstance(value, tuple) and len(value) <= _MAX_SHARED and not any(isinstance(v, tuple) for v in value):
            self._count(len(value))
        elif isinstance(value, (_List, _Dict, tuple)):
            raise ForeignObject("a list, dictionary or tuple in several places at once")
        elif value is _MARK:
            raise ValueError("its structure is damaged")
        return value

    def _storage(self, identity: Any) -> _Storage:
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise ValueError("its structure is damaged")
        _, kind, key, location, items = identity
        if not isinstance(kind, _Global) or kind.name not in _ITEM_BYTES or not isinstance(location, str):
            raise ValueError("its structure is damaged")
        if not isinstance(key, str) or key not in self.sizes or type(items) is not int:
            raise ValueError("a storage is missing")
        if items * _ITEM_BYTES[kind.name] != self.sizes[key]:
            raise ValueError(f"a storage of {self.sizes[key]} bytes claims {items} numbers of {kind.name.split()[1]}")
        return _Storage(items)

    def _made(self, called: Any, arguments: Any) -> _Mark:
        name = called.name if isinstance(called, _Global) else ""
        if name == _DICT and arguments == ():
            return _Dict()
        if name == _TENSOR and isinstance(arguments, tuple) and len(arguments) == 6:
            storage, offset, shape, strides, grad, hooks = arguments
            self._expect(storage, _Storage)
            _check_extent(storage.items, offset, shape, strides)
        elif name == _PARAMETER and isinstance(arguments, tuple) and len(arguments) == 3:
            tensor, grad, hooks = arguments
            self._expect(tensor, _Tensor)
        else:
            raise ForeignObject(f"a call of {name or 'what is not a function'}")
        if not isinstance(grad, bool) or self._expect(hooks, _Dict).keys:
            raise ForeignObject("a tensor with hooks")
        return _Tensor()

    def _build(self, target: Any, state: Any) -> None:
        """The attributes of a module's state_dict. Any other attribute could take the place of a method."""
        if not isinstance(target, _Dict) or not isinstance(state, _Dict) or set(state.keys) != {"_metadata"}:
            raise ForeignObject("an object with attributes")
        self.stack.append(target)

    def _count(self, values: int) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")

    def _top(self) -> Any:
        if not self.stack:
            raise ValueError("its structure is damaged")
        return self.stack[-1]

    def _pop(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            raise ValueError("its structure is damaged")
        del self.stack[-count:]
        return values

    def _to_mark(self) -> list[Any]:
        values: list[Any] = []
        while self._top() is not _MARK:
            values.append(self.stack.pop())
        self.stack.pop()
        return values[::-1]

    def _expect(self, value: Any, kind: type[Any]) -> Any:
        if not isinstance(value, kind):
            raise ValueError("its structure is damaged")
        return value


def _put(container: _Mark, values: list[Any]) -> None:
    """Records what is put into a list or dictionary. A value that has left the stack cannot change afterwards."""
    for value in values:
        _plain(value)
        container.depth = max(container.depth, _depth(value) + 1)
    _depth(container)


def _depth(value: Any) -> int:
    """How deep containers are nested. Raises ValueError where it is too deep for a recursive walk."""
    inner = max(map(_depth, value), default=0) if isinstance(value, tuple) else 0
    depth = inner + 1 if isinstance(value, tuple) else value.depth if isinstance(value, _Mark) else 0
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} containers are in each other")
    return depth


def _plain(value: Any) -> None:
    """Raises ForeignObject for what may not stay in a container: a function, or a storage without a tensor."""
    if isinstance(value, tuple):
        for part in value:
            _plain(part)
    elif isinstance(value, (_Global, _Storage)) or value is _MARK:
        raise ForeignObject(value.name if isinstance(value, _Global) else "a storage without a tensor")


def _check_extent(items: int, offset: Any, shape: Any, strides: Any) -> None:
    """Raises ValueError unless a tensor lies inside a storage of `items` numbers and uses no number twice."""
    if not (_are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(strides) and len(shape) == len(strides)):
        raise ValueError("a tensor's shape or strides are not integers")
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if count and (count > items or last >= items):
        raise ValueError(f"a tensor claims {count} numbers of a storage of {items}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= 64 and all(type(v) is int and v >= 0 for v in values)
