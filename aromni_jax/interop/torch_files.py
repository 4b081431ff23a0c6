"""Torch checkpoints (`.ckpt`, `.pt`, `.th`) without torch, read in a way that cannot run what a file tells it to run.

A file of `torch.save` is a zip archive: `data.pkl`, a pickle that describes objects, and `data/N`, the bytes of one
storage each. Python's unpickler calls whatever a pickle names. The one here is a small interpreter of its own: it knows
how torch describes tensors and containers, and a name it does not know can be held but never called; to call one is an
error that gives the name. Storages stay on disk until a tensor is asked for.

Source: the pickle opcodes of the standard library's `pickletools`; the layout that `torch.save` of 1.6 to 2.13 writes.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SUFFIXES = (".ckpt", ".pt", ".pth", ".th", ".bin")
"""What torch files are called."""

_STORAGES: dict[str, np.dtype] = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_UNREAD = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "torch.device",
    }
)
"""Calls that stand around weights in training checkpoints (a best score, a setting). They are not made: what they would
have returned is kept as an inert `Named`."""


@dataclasses.dataclass(frozen=True)
class Named:
    """Something a pickle refers to by name; it is never imported or called."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that still lies in a torch file."""

    path: Path
    entry: str
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Its values, as a new array.

        Raises:
          ValueError: the file ends too early or fails its checksum.
        """
        count = 0 if 0 in self.shape else 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.entry) as storage:
                storage.seek(self.offset * self.dtype.itemsize)
                content = storage.read(count * self.dtype.itemsize)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path}: {self.entry} is damaged: {error}") from error
        flat = np.frombuffer(content, self.dtype, count)
        steps = tuple(step * self.dtype.itemsize for step in self.strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False).copy()


def read_torch_file(path: str | Path) -> Any:
    """The object in a file of `torch.save`: containers, numbers and text as they are, tensors as `StoredTensor`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a zip file of torch, damaged, or a pickle that calls anything but what builds tensors: named.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            pickles = [name for name in sizes if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1 or packed:
                trouble = f"the compressed entry {packed[0]}" if packed else f"{len(pickles)} entries data.pkl"
                raise ValueError(f"{path} is not a file of torch.save: it has {trouble}")
            root = pickles[0].removesuffix("data.pkl")
            order = archive.read(root + "byteorder") if root + "byteorder" in sizes else b"little"
            if order.strip() != b"little":
                raise ValueError(f"{path} was written on a big-endian machine; save it again on a little-endian one")
            content = archive.read(pickles[0])
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        remedy = (
            "it is cut short, fetch it again" if is_zip else "load one from before torch 1.6 there and save it again"
        )
        raise ValueError(f"{path} is not a zip file of torch.save ({error}); {remedy}") from error
    try:
        return _Interpreter(path, root, sizes).run(content)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: data.pkl is damaged: {error!r}") from error
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def read_state_dict(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name: those under `state_dict` (Lightning, taming), else the top level.

    Raises:
      FileNotFoundError: no such file.
      ValueError: as `read_torch_file`, or there is no dictionary of tensors in it.
    """
    content = read_torch_file(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise ValueError(f"{path} holds no dictionary of tensors: {name!r} is a {type(value).__name__}")
    return content


def write_state_dict(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes {"state_dict": tensors} as `torch.save` would; `torch.load(weights_only=True)` reads it.

    Raises:
      ValueError: a tensor of a type torch has no storage for.
    """
    pieces, storages = [b"\x80\x02}", _text("state_dict"), b"}("], []
    names = {dtype: name for name, dtype in _STORAGES.items()}
    for key, (name, value) in enumerate(tensors.items()):
        if value.dtype not in names:
            raise ValueError(f"tensor {name!r} is {value.dtype}, which a torch file cannot hold")
        strides = [math.prod(value.shape[i + 1 :]) for i in range(value.ndim)]
        pieces += [_text(name), _global("torch._utils._rebuild_tensor_v2"), b"(("]
        pieces += [_text("storage"), _global(names[value.dtype]), _text(str(key)), _text("cpu"), _integer(value.size)]
        pieces += [b"tQ", _integer(0), _tuple(value.shape), _tuple(strides), b"\x89"]
        pieces += [_global("collections.OrderedDict"), b")RtR"]
        storages.append(np.ascontiguousarray(value))
    pieces.append(b"us.")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, content: Any) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), content)

        write("data.pkl", b"".join(pieces))
        write("byteorder", b"little")
        for key, storage in enumerate(storages):
            write(f"data/{key}", storage.reshape(-1).view(np.uint8).data)
        write("version", b"3\n")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _global(name: str) -> bytes:
    module, attribute = name.rsplit(".", 1)
    return f"c{module}\n{attribute}\n".encode()


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def _tuple(values: Any) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


@dataclasses.dataclass(frozen=True)
class _Storage:
    entry: str
    dtype: np.dtype
    size: int


class _Interpreter:
    """Runs a pickle over a stack of plain Python objects; `calls` is everything it can do beside that."""

    def __init__(self, path: Path, root: str, sizes: Mapping[str, int]) -> None:
        self._path, self._root, self._sizes = path, root, sizes
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._calls: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
            "collections.OrderedDict": lambda items=(): dict(items),
            "collections.defaultdict": lambda factory=None, items=(): dict(items),
            "builtins.set": lambda items=(): list(items),
            "torch.Size": lambda items=(): tuple(items),
        }

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in self._opcodes(pickle):
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                self._stack.append(argument)
            elif name not in _IGNORED:
                step = getattr(self, f"_op_{name.lower()}", None)
                if step is None:
                    raise ValueError(f"data.pkl uses the opcode {name}, which no file of weights needs")
                step(argument)
        raise ValueError("data.pkl ends too early")

    @staticmethod
    def _opcodes(pickle: bytes) -> Iterator[Any]:
        try:
            yield from pickletools.genops(pickle)
        except ValueError as error:
            raise ValueError(f"data.pkl is damaged: {error}") from error

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _op_mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _op_pop(self, _: Any) -> None:
        self._stack.pop()

    def _op_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _op_tuple1(self, _: Any) -> None:
        self._pack(1)

    def _op_tuple2(self, _: Any) -> None:
        self._pack(2)

    def _op_tuple3(self, _: Any) -> None:
        self._pack(3)

    def _pack(self, count: int) -> None:
        if count > len(self._stack):
            raise IndexError("empty stack")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _op_append(self, _: Any) -> None:
        item = self._stack.pop()
        self._stack[-1].append(item)

    def _op_appends(self, _: Any) -> None:
        items = self._since_mark()
        self._stack[-1].extend(items)

    _op_additems = _op_appends

    def _op_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._stack[-1][key] = value

    def _op_setitems(self, _: Any) -> None:
        items = self._since_mark()
        self._stack[-1].update(zip(items[::2], items[1::2]))

    def _op_memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _op_binput(self, argument: int) -> None:
        self._memo[argument] = self._stack[-1]

    _op_long_binput = _op_put = _op_binput

    def _op_binget(self, argument: int) -> None:
        self._stack.append(self._memo[argument])

    _op_long_binget = _op_get = _op_binget

    def _op_global(self, argument: str) -> None:
        self._stack.append(_named(*argument.split(" ", 1)))

    def _op_stack_global(self, _: Any) -> None:
        attribute, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_named(module, attribute))

    def _op_reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _op_newobj(self, _: Any) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(kind, arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, Named) else type(function).__name__
        if name in self._calls:
            return self._calls[name](*arguments)
        if name in _UNREAD:
            return Named(f"{name}(...)")
        raise ValueError(
            f"data.pkl asks to call {name!r}, which is not part of a file of weights; do not open this file elsewhere "
            "unless you trust it, and save only its state_dict if you do"
        )

    def _op_build(self, _: Any) -> None:
        """Attributes of an object (`_metadata` of a state_dict) are dropped: no object here has any."""
        self._stack.pop()
        if not isinstance(self._stack[-1], (dict, list, Named)):
            raise TypeError(f"a {type(self._stack[-1]).__name__} has no state")

    def _op_binpersid(self, _: Any) -> None:
        kind, storage_type, key, _, size = self._stack.pop()
        name = str(storage_type)
        if kind != "storage" or name not in _STORAGES:
            raise ValueError(f"data.pkl refers to a {kind} of type {name}; known are {', '.join(_STORAGES)}")
        entry, dtype = f"{self._root}data/{key}", _STORAGES[name]
        if self._sizes.get(entry, -1) < size * dtype.itemsize:
            raise ValueError(f"the storage {entry} is missing or shorter than its {size} {dtype.name} values")
        self._stack.append(_Storage(entry, dtype, size))

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
    ) -> StoredTensor:
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"a tensor has offset {offset}, shape {shape} and strides {strides}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
        if 0 not in shape and last >= storage.size:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage {storage.entry}")
        return StoredTensor(self._path, storage.entry, storage.dtype, tuple(shape), tuple(strides), offset)


def _named(module: str, attribute: str) -> Named:
    """Protocol 2 calls `builtins` what Python 2 did."""
    return Named(f"{'builtins' if module == '__builtin__' else module}.{attribute}")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINSTRING SHORT_BINSTRING".split()
)
_IGNORED = frozenset({"PROTO", "FRAME"})
