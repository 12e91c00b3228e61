"""The header of a file: what it may state, of which types and sizes, and the bytes around it."""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta, field

from kit.artifact.layouts import ArtifactError
from kit.core.steps import Stored

MAGIC, EARLIER = b"KIT4", (b"KIT1", b"KIT2")
READABLE = MAGIC, b"KIT3"
CHECKSUM = 32
BLOCK = 2**20  # bytes that are checked at a time
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


def sealed(header: dict, blobs: Sequence[bytes]) -> Iterator[bytes]:
    """The parts of a file of this header and these blobs."""
    pack, check = zlib.compressobj(9, zdict=SAID), hashlib.sha256()
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text = pack.compress(text) + pack.flush()
    for part in (MAGIC + struct.pack("<I", len(text)) + text, *blobs):
        check.update(part)
        yield part
    yield check.digest()


def unsealed(file: BinaryIO, path) -> dict:
    """The JSON of the header, not yet checked, of a file that is whole; it is at the blobs then."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic = file.read(8)
    if magic[:4] in EARLIER:
        raise ArtifactError(f"{path} was written by an earlier version of the kit: make it again")
    if magic[:4] not in READABLE:
        raise ArtifactError(f"{path} is not a kit artifact: it begins with {magic[:4]!r}")
    check = hashlib.sha256()
    file.seek(0)
    for at in range(0, size - CHECKSUM, BLOCK):
        check.update(file.read(min(BLOCK, size - CHECKSUM - at)))
    if size < 8 + CHECKSUM or check.digest() != file.read():
        raise ArtifactError(f"{path} is damaged (its checksum differs): copy or write it again")
    length, unpack = int.from_bytes(magic[4:], "little"), zlib.decompressobj(zdict=SAID)
    if (held := size - 8 - length - CHECKSUM) < 0:
        raise ValueError(f"it is said to have {length} bytes in a file of {size}")
    file.seek(8)
    text = unpack.decompress(file.read(length), EXPANSION * length + 2**20)
    if not unpack.eof or unpack.unused_data:
        raise ValueError("its text is longer or shorter than it may be")
    header = msgspec.json.decode(text)
    sizes = [size for entry in header["tensors"] for size in entry["sizes"]]
    if sum(sizes) != held or min(sizes, default=0) < 0:
        raise ValueError(f"it announces {sum(sizes)} bytes of tensors but there are {held}")
    return header
