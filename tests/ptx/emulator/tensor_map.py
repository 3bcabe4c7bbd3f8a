"""TMA descriptors: which box of a tensor in global memory a bulk copy moves.

The hardware's 128 bytes are not documented. These have a layout of our own, made to be edited in
place by tensormap.replace, in memory that was zeroed before.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.ptx.emulator.errors import PtxError

BYTES = 128
_MAGIC = b"TMAP"
# Offset and format of the first item of each field, and how many there are.
_FIELDS = {
    "rank": (4, "B", 1),
    "elemtype": (5, "B", 1),  # one more than PTX's number, 0 where only the size is known
    "swizzle_mode": (6, "B", 1),
    "fill_mode": (7, "B", 1),
    "global_address": (8, "Q", 1),
    "global_stride": (16, "Q", 4),
    "global_dim": (48, "I", 5),
    "box_dim": (68, "I", 5),
    "element_stride": (88, "I", 5),
    "item_size": (108, "B", 1),
    "interleave_layout": (109, "B", 1),
}
# By PTX's numbers (tensormap.replace, field elemtype).
ELEMENT_TYPES = (
    *("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32.ftz", "f64", "bf16"),
    *("tf32", "tf32.ftz"),
)
_SIZES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
# The largest value that tensormap.replace may give to these.
_LARGEST = {
    "rank": 4,
    "elemtype": len(ELEMENT_TYPES) - 1,
    "swizzle_mode": 3,
    "fill_mode": 1,
    "interleave_layout": 0,
}


@dataclass(frozen=True)
class TensorMap:
    """A descriptor. Dimensions are those of PTX, the contiguous one first, up to five.

    `strides` are bytes of dimension 1 and up. `swizzle` is 0 (none), 1 (32 bytes), 2 (64) or 3
    (128). `nan_fill`: elements outside the tensor read as NaN instead of 0. `type` is one of
    ELEMENT_TYPES; only reductions need it.
    """

    address: int
    item_size: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0
    nan_fill: bool = False
    element_strides: tuple[int, ...] = (1, 1, 1, 1, 1)
    type: str = ""

    def __post_init__(self) -> None:
        rank = len(self.sizes)
        if not (1 <= rank <= 5 and len(self.box) == rank and len(self.strides) == rank - 1):
            raise PtxError("launch", f"a tensor map of rank 1 to 5 with its strides, got {self}")
        if self.item_size not in (1, 2, 4, 8) or min(self.sizes) < 1:
            raise PtxError("launch", f"a tensor map of sizes and items of 1 to 8 bytes: {self}")
        if self.address % 16 or any(stride % 16 for stride in self.strides):
            raise PtxError("alignment", f"a tensor map whose address and strides are / 16: {self}")
        if any(not 0 <= stride < 1 << 40 for stride in self.strides):
            raise PtxError("launch", f"a tensor map's strides are below 2^40, got {self.strides}")
        if any(not 1 <= extent <= 256 for extent in self.box):
            raise PtxError("launch", f"a tensor map's box is 1 to 256 long, got {self.box}")
        row = self.box[0] * self.item_size
        if row % 16 or (self.swizzle and row > 16 << self.swizzle):
            raise PtxError("launch", f"box rows of {row} bytes with swizzle {self.swizzle}")
        if self.type and (
            self.type not in ELEMENT_TYPES
            or _SIZES[ELEMENT_TYPES.index(self.type)] != self.item_size
        ):
            raise PtxError("launch", f"elements of {self.item_size} bytes and type {self.type}")
        if any(step != 1 for step in self.element_strides[:rank]):
            raise PtxError("unsupported", f"element strides {self.element_strides[:rank]}")

    def encode(self) -> bytes:
        kind = ELEMENT_TYPES.index(self.type) + 1 if self.type else 0
        fields = {
            "rank": (len(self.sizes),),
            "elemtype": (kind,),
            "swizzle_mode": (self.swizzle,),
            "fill_mode": (int(self.nan_fill),),
            "global_address": (self.address,),
            "global_stride": self.strides,
            "global_dim": self.sizes,
            "box_dim": self.box,
            "element_stride": self.element_strides,
            "item_size": (self.item_size,),
        }
        data = bytearray(BYTES)
        data[: len(_MAGIC)] = _MAGIC
        for name, values in fields.items():
            offset, code, _ = _FIELDS[name]
            struct.pack_into(f"<{len(values)}{code}", data, offset, *values)
        return bytes(data)

    @staticmethod
    def decode(data: bytes) -> TensorMap:
        if data[: len(_MAGIC)] != _MAGIC:
            raise PtxError("launch", "this memory holds no tensor map")

        def field(name: str) -> tuple[int, ...]:
            offset, code, count = _FIELDS[name]
            return struct.unpack_from(f"<{count}{code}", data, offset)

        (rank,), (kind,) = field("rank"), field("elemtype")
        return TensorMap(
            field("global_address")[0],
            field("item_size")[0],
            field("global_dim")[:rank],
            field("global_stride")[: max(rank - 1, 0)],
            field("box_dim")[:rank],
            field("swizzle_mode")[0],
            bool(field("fill_mode")[0]),
            field("element_stride"),
            ELEMENT_TYPES[kind - 1] if kind else "",
        )


def replace(data: bytes, name: str, index: int, value: int) -> bytes:
    """Do tensormap.replace: `value` is PTX's number, `index` the dimension where there are more."""
    if data[: len(_MAGIC)] != _MAGIC and any(data):
        raise PtxError("launch", "tensormap.replace: this memory holds no tensor map, nor zeros")
    offset, code, count = _FIELDS[name]
    if not 0 <= index < count:
        raise PtxError("launch", f"tensormap.replace: dimension {index} of {name}")
    if value > _LARGEST.get(name, value):
        raise PtxError("unsupported", f"tensormap.replace: {name} {value}")
    edited = bytearray(data)
    edited[: len(_MAGIC)] = _MAGIC
    if name == "elemtype":
        struct.pack_into("<B", edited, _FIELDS["item_size"][0], _SIZES[value])
    stored = value + 1 if name in ("rank", "elemtype") else value
    struct.pack_into(f"<{code}", edited, offset + index * struct.calcsize(code), stored)
    return bytes(edited)
