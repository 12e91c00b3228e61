"""The corpora `text:<file, folder or glob>`: the user's own texts."""

import codecs
import glob
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kit.data.corpus import SPLITS, Texts, register_corpus

SHARES = (0.90, 0.95)  # where validation and test begin in a file
BLOCK = 2**20  # bytes that are read at a time


@dataclass(frozen=True)
class Parts:
    """A text of characters `start` to `end` of each file, in blocks."""

    spans: list[tuple[Path, int, int]]

    def __iter__(self) -> Iterator[str]:
        for file, start, end in self.spans:
            at = 0
            for block in _blocks(file):
                yield block[max(0, start - at) : max(0, end - at)]
                at += len(block)
                if at >= end:
                    break


@register_corpus("text:")
def texts(place: str) -> Texts:
    """The first 90 % of each file, then 5 % and 5 %, cut at line ends, joined split by split.

    place: a UTF-8 file, a folder (of `.txt` files, at any depth) or a glob.
    """
    spans = {split: [] for split in SPLITS}
    for file in _files(place):
        length = _length(file)
        cuts = _cuts(file, [int(share * length) for share in SHARES])
        for split, start, end in zip(SPLITS, (0, *cuts), (*cuts, length)):
            spans[split].append((file, start, end))
    return {split: Parts(found) for split, found in spans.items()}


def _blocks(file: Path) -> Iterator[str]:
    """The text of a file, which ends in a line end. Raises ValueError for what is not UTF-8."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), True)
    at, last, data = 0, "", True
    with open(file, "rb") as opened:
        while data:
            data = opened.read(BLOCK)
            at += len(data)
            try:
                block = decoder.decode(data, not data)
            except UnicodeDecodeError as error:
                byte, place = error.object[error.start], at - len(error.object) + error.start
                fix = f"(byte {byte:#04x} at {place}): convert it first, for example with iconv"
                raise ValueError(f"{file} is not UTF-8 {fix}.") from error
            yield block
            last = block[-1:] or last
    if last != "\n":
        yield "\n"


def _cuts(file: Path, wanted: list[int]) -> list[int]:
    """The ends of the last lines before the characters `wanted`; these where there is none."""
    found, at = [0] * len(wanted), 0
    for block in _blocks(file):
        for i, cut in enumerate(wanted):
            if end := block.rfind("\n", 0, max(0, cut - at)) + 1:
                found[i] = at + end
        at += len(block)
    return [end or cut for end, cut in zip(found, wanted)]


def _files(place: str) -> list[Path]:
    path = Path(place).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found, wrong = path.rglob("*.txt"), "holds no .txt file: name its files by a glob"
    else:
        names = glob.glob(str(path), recursive=True)
        found = [Path(name) for name in names if Path(name).is_file()]
        wrong = "matches no file: give a UTF-8 text file, a folder of .txt files, or a glob"
    if not (files := sorted(found)):
        raise FileNotFoundError(f"'text:{place}' {wrong} (looked in {Path.cwd()}).")
    return files


def _length(file: Path) -> int:
    """Characters of a file. Raises ValueError for one that is empty or not UTF-8."""
    found = [(len(block), bool(block.strip())) for block in _blocks(file)]
    if not any(filled for _, filled in found):
        raise ValueError(f"{file} is empty: leave it out, or give a file with text.")
    return sum(count for count, _ in found)
