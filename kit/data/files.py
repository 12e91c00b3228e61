"""The corpora `text:<file, folder or glob>`: the user's own texts."""

import glob
from pathlib import Path

from kit.data.corpus import SPLITS, Texts, register_corpus

SHARES = (0.90, 0.95)  # where validation and test begin in a file


@register_corpus("text:")
def texts(place: str) -> Texts:
    """The first 90 % of each file, then 5 % and 5 %, cut at line ends, joined split by split.

    place: a UTF-8 file, a folder (of `.txt` files, at any depth) or a glob.
    """
    parts = {split: [] for split in SPLITS}
    for file in _files(place):
        text = _utf8(file)
        at = [int(share * len(text)) for share in SHARES]
        cuts = [text.rfind("\n", 0, cut) + 1 or cut for cut in at]
        for split, start, end in zip(SPLITS, (0, *cuts), (*cuts, len(text))):
            parts[split].append(text[start:end])
    return {split: "".join(blocks) for split, blocks in parts.items()}


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


def _utf8(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at {error.start}"
        fix = "convert it first, for example with iconv"
        raise ValueError(f"{file} is not UTF-8 ({where}): {fix}.") from error
    if not text.strip():
        raise ValueError(f"{file} is empty: leave it out, or give a file with text.")
    return text if text.endswith("\n") else text + "\n"
