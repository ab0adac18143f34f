"""Repack onnxruntime-gpu for one compute capability: 36 MB instead of 256.

    python slim.py WHEEL OUT.tar.xz [--arch 90]

The device code of the CUDA provider is in fat binaries, one entry per architecture. Entries of
other architectures are zeroed, so that they compress to nothing; headers and offsets remain, and
the driver finds its own entry. PTX is kept only where there is no machine code for the
architecture. Kernels of language models (attention, mixture of experts, weight-only products) are
zeroed too. The header layout is that of NVIDIA's fatbinary_section.h, as cuobjdump prints it.
"""

from __future__ import annotations

import argparse
import re
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

_MAGIC = b"\x50\xed\x55\xba"
_PTX, _MACHINE_CODE = 1, 2
_LZ4, _ZSTD = 0x2000, 0x8000
_LANGUAGE_MODELS = re.compile(
    "MainloopSm90ArrayTmaGmma|[Ff]lash|cutlass|fpA_intB|[Mm]o[Ee]|[Aa]ttention|fmha|GroupQuery|PagedKV"
    "|llm|[Bb]eam|Sampling|RotaryEmb|[Mm]amba|MatMulBnb|matmul_nbits|MatMul4Bits|MatMulFloat8b|lora"
)


def slim(library: Path, arch: int) -> None:
    """Zero the device code that a GPU of compute capability `arch` (90: 9.0) never loads."""
    data = bytearray(library.read_bytes())
    at = data.find(_MAGIC)
    while at >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        end = at + header + size
        if version != 1 or header != 16 or end > len(data):
            at = data.find(_MAGIC, at + 4)
            continue
        entries, entry = [], at + header
        while entry < end:
            kind, _, offset, length = struct.unpack_from("<HHIQ", data, entry)
            (target,) = struct.unpack_from("<I", data, entry + 28)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            entries.append((entry + offset, length, kind, target, flags, entry))
            entry += offset + length
        native = any(
            kind == _MACHINE_CODE and target == arch for _, _, kind, target, _, _ in entries
        )
        for start, length, kind, target, flags, entry in entries:
            keep = (
                target == arch
                if kind == _MACHINE_CODE
                else kind == _PTX and not native and target <= arch
            )
            if keep and kind == _MACHINE_CODE:
                body = _unpacked(bytes(data[start : start + length]), flags, data, entry)
                names = _kernels(body)
                keep = not (names and all(_LANGUAGE_MODELS.search(name) for name in names))
            if not keep:
                data[start : start + length] = bytes(length)
        at = data.find(_MAGIC, end)
    library.write_bytes(data)


def _unpacked(body: bytes, flags: int, data: bytearray, entry: int) -> bytes:
    if flags & _ZSTD:
        import zstandard

        return bytes(zstandard.ZstdDecompressor().decompressobj().decompress(body))
    if flags & _LZ4:
        import lz4.block

        (packed,) = struct.unpack_from("<I", data, entry + 16)
        (size,) = struct.unpack_from("<Q", data, entry + 56)
        return bytes(lz4.block.decompress(body[: packed or len(body)], uncompressed_size=size))
    return body


def _kernels(elf: bytes) -> list[str]:
    """Names of the sections `.text.NAME` of a cubin."""
    (sections,) = struct.unpack_from("<Q", elf, 40)
    count, names_at = struct.unpack_from("<HH", elf, 60)
    headers = [struct.unpack_from("<IIQQQQ", elf, sections + 64 * index) for index in range(count)]
    start, size = headers[names_at][4:6]
    table = elf[start : start + size]
    names = (table[header[0] : table.index(b"\0", header[0])] for header in headers)
    return [name[6:].decode() for name in names if name.startswith(b".text.")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Repack onnxruntime-gpu for one compute capability."
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        zipfile.ZipFile(arguments.wheel).extractall(root)
        capi = root / "onnxruntime" / "capi"
        (capi / "libonnxruntime_providers_tensorrt.so").unlink()
        slim(capi / "libonnxruntime_providers_cuda.so", arguments.arch)
        with tarfile.open(arguments.out, "w:xz", preset=3) as tar:
            for path in sorted(root.iterdir()):
                tar.add(path, arcname=path.name)


if __name__ == "__main__":
    main()
