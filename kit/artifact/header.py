"""The header of a file: what it may state, of which types and sizes, and the bytes around it."""

import hashlib
import itertools
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, field

from kit.artifact.layouts import ArtifactError
from kit.core.steps import Stored

MAGIC, EARLIER = b"KIT4", (b"KIT1", b"KIT2")
READABLE = MAGIC, b"KIT3"
CHECKSUM = 32
SAME = "="  # in place of a step: the one that was written as the n-th
EXPANSION = 100  # of a header's text at most, over the bytes it is compressed to, and a megabyte
Count = Annotated[int, Meta(ge=0, lt=2**48)]
# What headers say, as zlib's preset dictionary: files need it as it is, to the byte.
SAID = (
    b'{"model":{"class":"ResNetBK","config":{"vocab_size":30000,"d_model":64,"layers":4,"experts":'
    b'4,"d_ff":128,"channels":48,"top_k":1,"conv":4,"tied":true,"embedding_rank":null,"dropout":0.'
    b'1}},"modules":{"layers.0.mixer.quantize_v":{"class":"ActivationQuantizer","bits":8,"symmetri'
    b'c":false,"channels":null,"bounds":null},"layers.0.mixer.quantize_g":{"class":"ComplexQuantiz'
    b'er","bits":8,"channels":null,"mode":"separate"}},"tensors":[{"name":"output_bias","row_order'
    b'",{"parts":"embedding.weight","shape":[64],"steps":[["fake_quantize",{"format":{"granularity'
    b'":"rows","scale":"log8"},"learned":2.0}],["=",1],["composition",{"basis":{"bits":4}}}]],"in"'
    b':"ddeddde"},{"granularity":"tensor"},"rows":64,"norm_mixer.bias","norm_moe.weight","mixer.en'
    b'ergy","raw_eta","convolution.bias","input.weight","gate.output.moe.router.b_in","b_out","w_i'
    b'n","w_out","shape":[4,128,64],"group_size":quantize_v.low","shape":[1],"sizes":[4]},{"name":'
    b'"layers.0.mixer.quantize_g.first.high","second.'
)


class Model(Stored):
    kind: str = field(name="class")
    config: dict[str, Any]


class Entry(Stored):
    """A tensor: its parts are of `sizes` bytes in the layouts of `letters`, those of the stored
    value before those of its steps."""

    name: Annotated[str, Meta(max_length=1000)]
    shape: Annotated[list[Count], Meta(max_length=64)]
    sizes: Annotated[list[Count], Meta(min_length=1)]
    dtype: str | None = "float32"  # None: as the model has it, in files of earlier versions
    steps: list[tuple[str, int | dict[str, Any]]] = []
    letters: str = field(name="in", default="d")

    def __post_init__(self):
        if len(self.letters) != len(self.sizes):
            raise ValueError(f"{self.name!r} has {len(self.sizes)} parts, {self.letters!r} layouts")


class Header(Stored):
    model: Model | None
    modules: dict[str, dict[str, Any]]
    tensors: list[Entry]
    extra: dict[str, Any] = {}


def sealed(header: dict, blobs: Sequence[bytes]) -> bytes:
    """A file of this header and these blobs."""
    text, pack = (
        json.dumps(header, separators=(",", ":"), allow_nan=False),
        zlib.compressobj(9, zdict=SAID),
    )
    text = pack.compress(text.encode()) + pack.flush()
    body = MAGIC + struct.pack("<I", len(text)) + text + b"".join(blobs)
    return body + hashlib.sha256(body).digest()


def unsealed(data: memoryview, path) -> tuple[dict, list[memoryview]]:
    """The JSON of the header, not yet checked, and the blobs of a file that is whole."""
    if data[:4] in EARLIER:
        raise ArtifactError(f"{path} was written by an earlier version of the kit: make it again")
    if data[:4] not in READABLE:
        raise ArtifactError(f"{path} is not a kit artifact: it begins with {bytes(data[:4])!r}")
    if len(data) < 8 + CHECKSUM or hashlib.sha256(data[:-CHECKSUM]).digest() != data[-CHECKSUM:]:
        raise ArtifactError(f"{path} is damaged (its checksum differs): copy or write it again")
    start, unpack = 8 + int.from_bytes(data[4:8], "little"), zlib.decompressobj(zdict=SAID)
    text = unpack.decompress(data[8:start], EXPANSION * start + 2**20)
    if not unpack.eof or unpack.unused_data:
        raise ValueError("its text is longer or shorter than it may be")
    header = msgspec.json.decode(text)
    sizes = [size for entry in header["tensors"] for size in entry["sizes"]]
    held = len(data) - CHECKSUM - start
    if sum(sizes) != held or min(sizes, default=0) < 0:
        raise ValueError(f"it announces {sum(sizes)} bytes of tensors but there are {held}")
    ends = [*itertools.accumulate(sizes, initial=start)]
    return header, [data[a:b] for a, b in itertools.pairwise(ends)]
