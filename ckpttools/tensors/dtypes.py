"""Element types, and what torch, the command line and safetensors call them."""

from __future__ import annotations

from msgspec import Struct


class DType(Struct, frozen=True, kw_only=True, eq=False):
    """An element type. `name` is torch's (`bfloat16`), `short` the command line's (`bf16`).

    There is one of each, known by its identity: refs are compared and hashed by the hundred thousand.
    """

    name: str
    short: str
    itemsize: int
    safetensors: str | None  # the code in a safetensors header; None where that format has none
    storage: str | None  # torch's typed storage class; None for types that only UntypedStorage holds

    @property
    def is_float(self) -> bool:
        return self.name.startswith(("float", "bfloat"))

    def __deepcopy__(self, memo: object) -> DType:
        return self

    def __str__(self) -> str:
        return self.name


def _dtype(name: str, short: str, itemsize: int, safetensors: str | None, storage: str | None) -> DType:
    return DType(name=name, short=short, itemsize=itemsize, safetensors=safetensors, storage=storage)


FLOAT64 = _dtype("float64", "fp64", 8, "F64", "DoubleStorage")
FLOAT32 = _dtype("float32", "fp32", 4, "F32", "FloatStorage")
FLOAT16 = _dtype("float16", "fp16", 2, "F16", "HalfStorage")
BFLOAT16 = _dtype("bfloat16", "bf16", 2, "BF16", "BFloat16Storage")
INT64 = _dtype("int64", "int64", 8, "I64", "LongStorage")
UINT8 = _dtype("uint8", "uint8", 1, "U8", "ByteStorage")

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        FLOAT64,
        FLOAT32,
        FLOAT16,
        BFLOAT16,
        INT64,
        _dtype("int32", "int32", 4, "I32", "IntStorage"),
        _dtype("int16", "int16", 2, "I16", "ShortStorage"),
        _dtype("int8", "int8", 1, "I8", "CharStorage"),
        UINT8,
        _dtype("bool", "bool", 1, "BOOL", "BoolStorage"),
        _dtype("uint16", "uint16", 2, "U16", None),
        _dtype("uint32", "uint32", 4, "U32", None),
        _dtype("uint64", "uint64", 8, "U64", None),
        _dtype("complex64", "complex64", 8, "C64", "ComplexFloatStorage"),
        _dtype("complex128", "complex128", 16, None, "ComplexDoubleStorage"),
        _dtype("float8_e4m3fn", "fp8_e4m3", 1, "F8_E4M3", None),
        _dtype("float8_e5m2", "fp8_e5m2", 1, "F8_E5M2", None),
        _dtype("float8_e4m3fnuz", "fp8_e4m3fnuz", 1, "F8_E4M3FNUZ", None),
        _dtype("float8_e5m2fnuz", "fp8_e5m2fnuz", 1, "F8_E5M2FNUZ", None),
        _dtype("float8_e8m0fnu", "fp8_e8m0", 1, "F8_E8M0", None),
    )
}
BY_STORAGE: dict[str, DType] = {d.storage: d for d in DTYPES.values() if d.storage}
BY_SAFETENSORS: dict[str, DType] = {d.safetensors: d for d in DTYPES.values() if d.safetensors}
# conversions that lose nothing, by name
EXACT = {(a, b) for a in ("float16", "bfloat16") for b in ("float32", "float64")} | {("float32", "float64")}
