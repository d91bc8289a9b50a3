"""Files that are no safetensors files, or lie about what they hold."""

import json
import struct


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "empty": b"",
    "a length alone": struct.pack("<Q", 2),
    "a header of a petabyte": struct.pack("<Q", 10**15) + b"{}",
    "a header beyond the file": struct.pack("<Q", 5000) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"abcd",
    "tensors that overlap": header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
    "a shape that its bytes do not fill": header({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
    "a shape that overflows": header({"a": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(8)),
    "four terabytes": header({"a": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}, bytes(8)),
    "a pickle": b"\x80\x04\x95" + bytes(100),
}
