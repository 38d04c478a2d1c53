"""Writes GGUF files for tests."""

import struct
from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(file: Path, metadata: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> None:
    """Writes strings, bools, ints, floats, and lists of strings or ints; and (shape, type, bytes) of every tensor."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for name, x in metadata.items():
        header += _string(name) + _value(x)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        header += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(body))
        body += data + bytes(-len(data) % 32)
    file.write_bytes(header + bytes(-len(header) % 32) + body)


def plain(x: np.ndarray) -> tuple[tuple[int, ...], int, bytes]:
    """A tensor of float32."""
    return x.shape, 0, x.astype("<f4").tobytes()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(x: Any) -> bytes:
    match x:
        case str():
            return struct.pack("<I", 8) + _string(x)
        case bool():
            return struct.pack("<I?", 7, x)
        case int():
            return struct.pack("<II", 4, x)
        case float():
            return struct.pack("<If", 6, x)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(x)) + b"".join(_string(each) for each in x)
        case _:
            return struct.pack(f"<IIQ{len(x)}i", 9, 5, len(x), *x)
