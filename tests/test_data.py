import hashlib
import random
import re
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from kit.core.store import atomic
from kit.data import cache_dir, docs, files, load_corpus, register_corpus, wikitext
from kit.data.corpus import CORPORA
from kit.data.tokenization import BPETokenizer, _pieces

SPLITS = ("train", "validation", "test")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lines(count, seed=0):
    draw = random.Random(seed)
    words = (
        "the resolvent of a chain is a continued fraction and each level pays one division".split()
    )
    return "".join(" ".join(draw.choices(words, k=12)) + ".\n" for _ in range(count))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "chain.txt"
    path.write_text(lines(400), encoding="utf-8")
    return path


# ---- tokenizers

BPE = BPETokenizer.train(lines(100), 300)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_gives_back_any_text(text):
    tokens = BPE.encode(text)
    assert tokens.dtype == np.int32 and BPE.decode(tokens) == text


LLAMA = (  # how Llama 3 parts words: newlines go with spaces and punctuation before them
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    pre_tokenizers.ByteLevel(add_prefix_space=False),
    pre_tokenizers.Split(tokenizers.Regex(LLAMA), "isolated"),
]


@settings(max_examples=400)
@given(st.text("abs  .!1é_\n\n\t\r\x1c\x85\xa0'"), st.integers(1, 8))
def test_pieces_tokenize_as_the_whole(text, size):
    pieces = list(_pieces(text, size))
    assert "".join(pieces) == text
    for words in WORDS:
        parts = [word for piece in pieces for word, _ in words.pre_tokenize_str(piece)]
        assert parts == [word for word, _ in words.pre_tokenize_str(text)]


@given(st.text("abs .!1é\n\t\r\x1c\x85\xa0'"), st.integers(1, 8), st.integers(1, 5))
def test_a_text_in_blocks_is_the_text(text, size, length):
    parts = [text[at : at + length] for at in range(0, len(text), length)]
    assert list(_pieces(parts, size, 3 * size)) == list(_pieces(text, size, 3 * size))
    assert (BPE.encode(parts) == BPE.encode(text)).all()


@pytest.mark.parametrize("long", ["xy" * 5000, "x " * 5000])
def test_no_piece_of_a_long_line_is_long(long):
    pieces = list(_pieces(long, 100, 1000))
    assert "".join(pieces) == long
    assert max(map(len, pieces)) == (1000 if " " not in long else 101)
    assert BPE.decode(np.concatenate([BPE.encode(piece) for piece in pieces])) == long


def test_bpe_learns_the_most_frequent_pair_first():
    assert BPETokenizer.train("xyxyxy ab", 257).encode("xy").size == 1


def test_bpe_reloads_from_json():
    again = BPETokenizer.from_json(BPE.to_json())
    assert again.vocab_size == BPE.vocab_size == 300
    assert (again.encode(lines(3)) == BPE.encode(lines(3))).all()


# ---- text:


def test_a_file_is_cut_in_contiguous_blocks_at_line_ends(text, cache):
    loaded = load_corpus(f"text:{text}", 300)
    parts = [loaded.tokenizer.decode(getattr(loaded, split)) for split in SPLITS]
    whole = text.read_text()
    assert "".join(parts) == whole and all(part.endswith("\n") for part in parts)
    assert [len(part) / len(whole) for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=0.01)
    assert loaded.utf8_bytes == {split: len(part.encode()) for split, part in zip(SPLITS, parts)}
    assert loaded.sha256 == hashlib.sha256("\0".join(parts).encode()).hexdigest()
    assert loaded.token_counts.sum() == len(loaded.train) and loaded.token_counts.shape == (300,)
    assert loaded.train.dtype == loaded.test.dtype == np.int32


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_the_splits_do_not_depend_on_how_files_are_read(block, tmp_path, monkeypatch):
    text = (
        "\ufeffshort\r\n" + "straße 東京 " * 30 + "\n" + "".join(f"line {i}\r" for i in range(40))
    )
    (tmp_path / "a.txt").write_bytes(text.encode() + b"end")
    (tmp_path / "b.txt").write_text("one line\n")
    monkeypatch.setattr(files, "BLOCK", block)
    found = {split: "".join(text) for split, text in files.texts(str(tmp_path)).items()}
    whole = text[1:].replace("\r\n", "\n").replace("\r", "\n") + "end\n"
    a, b = (whole.rfind("\n", 0, int(share * len(whole))) + 1 for share in (0.9, 0.95))
    assert found["train"] == whole[:a] + "one line"[:8] and found["validation"] == whole[a:b]
    assert found["test"] == whole[b:] + "\n"


def test_a_byte_that_is_no_text_is_named_with_its_place(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffstraße\n".encode() * 3 + b"and \xff here")
    with pytest.raises(ValueError, match=f"not UTF-8 .byte 0xff at {3 * 11 + 4}.: convert"):
        load_corpus(f"text:{tmp_path}")


def test_a_text_that_changes_while_it_is_read_leaves_no_tokens(text, cache, monkeypatch):
    encoded = BPETokenizer.encoded

    def edited(self, parts):
        yield from encoded(self, parts)
        text.write_text(lines(400).replace("chain", "train"))

    monkeypatch.setattr(BPETokenizer, "encoded", edited)
    with pytest.raises(ValueError, match="^The text changed while it was read: call again"):
        load_corpus(f"text:{text}", 300)
    assert not [*cache.rglob("*.tokens")]


def test_too_little_memory_is_one_sentence(monkeypatch):
    def none():
        raise MemoryError

    monkeypatch.setattr("kit.data.corpus.CORPORA", {"docs": none})
    with pytest.raises(MemoryError, match="^Corpus 'docs' takes more memory than there is: give"):
        load_corpus("docs")


def test_folder_and_glob_give_each_file_to_every_split(tmp_path, cache):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a a a a\n" * 200)
    (tmp_path / "deep" / "b.txt").write_text("b b b b\n" * 200)
    (tmp_path / "notes.md").write_text("not taken\n")
    by_folder = load_corpus(f"text:{tmp_path}", 258)
    assert load_corpus(f"text:{tmp_path}/**/*.txt", 258).sha256 == by_folder.sha256
    for split in SPLITS:
        assert set(by_folder.tokenizer.decode(getattr(by_folder, split))) == set("ab \n")


def test_the_tokenizer_learns_from_the_training_split_alone(tmp_path, cache):
    path = tmp_path / "late.txt"
    path.write_text("ab ab ab ab\n" * 300 + "zq zq zq zq\n" * 30)
    tokenizer = load_corpus(f"text:{path}", 258).tokenizer
    assert tokenizer.encode("ab").size == 1 and tokenizer.encode("zq").size == 2


def test_train_bytes_shortens_all_splits(text, cache):
    whole, short = (
        load_corpus(f"text:{text}", 300),
        load_corpus(f"text:{text}", 300, train_bytes=5000),
    )
    assert short.utf8_bytes["train"] == 5000
    assert short.utf8_bytes["test"] == min(625, whole.utf8_bytes["test"])
    assert short.sha256 != whole.sha256


def test_train_bytes_may_fall_within_a_character(tmp_path, cache):
    path = tmp_path / "accents.txt"
    path.write_text("é" * 3000, encoding="utf-8")
    assert load_corpus(f"text:{path}", 258, train_bytes=1001).utf8_bytes["train"] == 1000


def test_tokens_come_from_the_cache_the_second_time(text, cache, monkeypatch):
    first = load_corpus(f"text:{text}", 300)
    monkeypatch.setattr(BPETokenizer, "train", None)
    again = load_corpus(f"text:{text}", 300)
    assert (
        again.train == first.train
    ).all() and again.tokenizer.to_json() == first.tokenizer.to_json()
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".tokens", ".lock"}
    text.write_text(lines(400, seed=1))
    with pytest.raises(TypeError):
        load_corpus(f"text:{text}", 300)


def test_of_two_that_need_the_same_tokens_one_makes_them(text, cache, monkeypatch):
    made, train = [], BPETokenizer.train

    def slow(*args):
        made.append(args)
        time.sleep(0.2)
        return train(*args)

    monkeypatch.setattr(BPETokenizer, "train", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: load_corpus(f"text:{text}", 300), range(2))
    assert len(made) == 1 and (first.train == second.train).all()


def test_a_new_corpus_is_one_function(cache, monkeypatch):
    monkeypatch.setattr("kit.data.corpus.CORPORA", dict(CORPORA))
    splits = {split: lines(100, seed) for seed, split in enumerate(SPLITS)}
    register_corpus("chains")(lambda: splits)
    register_corpus("repeat:")(lambda place: {split: lines(100) + place for split in SPLITS})
    loaded = load_corpus("chains", 300)
    assert [loaded.tokenizer.decode(getattr(loaded, split)) for split in SPLITS] == [
        *splits.values()
    ]
    again = load_corpus("repeat:this: and that", 300)
    assert again.tokenizer.decode(again.test).endswith("this: and that")


def test_a_failed_write_leaves_nothing(cache):
    with pytest.raises(RuntimeError), atomic(cache_dir() / "x.json") as path:
        path.write_text("half")
        raise RuntimeError
    assert list(cache.iterdir()) == []


BAD = [
    ("wikitext-3", {}, "Unknown corpus 'wikitext-3'.*docs, text:, wikitext-2"),
    (None, {}, "name is None; it must be a text"),
    ("docs:pandas", {}, "Unknown corpus 'docs:pandas'"),
    ("text:{folder}/no.txt", {}, "no.txt' matches no file"),
    ("text:{folder}/*.nothing", {}, r"\*.nothing' matches no file"),
    ("text:{folder}/bare", {}, "bare' holds no .txt file"),
    ("text:{folder}/empty.txt", {}, "empty.txt is empty"),
    ("text:{folder}/short.txt", {}, "split of corpus .*short.txt' is empty"),
    ("text:{folder}/latin.txt", {}, "latin.txt is not UTF-8 .byte 0xe9 at 3."),
    (
        "text:{folder}/good.txt",
        {"vocab_size": 256},
        "vocab_size is 256; it must be a whole number from 257",
    ),
    (
        "text:{folder}/good.txt",
        {"vocab_size": 30000},
        r"vocab_size=30000 is larger.*reaches \d+ tokens",
    ),
    (
        "text:{folder}/good.txt",
        {"train_bytes": 0},
        "train_bytes is 0; it must be a whole number from 1",
    ),
]


@pytest.mark.parametrize("name, settings, message", BAD)
def test_bad_input_is_one_clear_sentence(tmp_path, cache, name, settings, message):
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "good.txt").write_text(lines(100))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_corpus(name and name.format(folder=tmp_path), **settings)
    assert "\n" not in str(error.value)


def test_what_the_text_supports_is_named_and_works(text, cache):
    with pytest.raises(ValueError, match="larger") as error:
        load_corpus(f"text:{text}", 10_000)
    supported = int(re.search(r"reaches (\d+)", str(error.value))[1])
    assert load_corpus(f"text:{text}", supported).tokenizer.vocab_size == supported


# ---- wikitext-2


@pytest.fixture
def hub(tmp_path, cache, monkeypatch):
    rows = {
        split: ["", " = chain = \n", "", *lines(120, seed).splitlines(keepends=True)]
        for seed, split in enumerate(SPLITS)
    }
    (tmp_path / "hub").mkdir()
    sha256 = {}
    for split in SPLITS:
        path = tmp_path / "hub" / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": rows[split]}), path)
        sha256[split] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(wikitext, "SHA256", sha256)
    monkeypatch.setattr(wikitext, "FOLDER", (tmp_path / "hub").as_uri())


def test_wikitext_is_fetched_once_and_keeps_its_lines(hub, tmp_path):
    loaded = load_corpus("wikitext-2", 280)
    text = loaded.tokenizer.decode(loaded.test)
    assert text.startswith(" \n = chain = \n \n") and text.count("\n") == 123  # a line a row
    for path in (tmp_path / "hub").iterdir():
        path.unlink()
    assert load_corpus("wikitext-2", 290).sha256 == loaded.sha256


def test_wikitext_offline_says_which_file_goes_where(hub, tmp_path, cache):
    (tmp_path / "hub" / "test-00000-of-00001.parquet").unlink()
    name = "test-00000-of-00001.parquet"
    with pytest.raises(FileNotFoundError) as error:
        load_corpus("wikitext-2")
    assert str(error.value).endswith(
        f"put the file {wikitext.FOLDER}/{name} at {cache / 'wikitext-2' / name}."
    )
    assert "\n" not in str(error.value)


def test_wikitext_with_other_bytes_is_refused(hub, cache):
    wikitext.texts()
    path = cache / "wikitext-2" / "validation-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(
        ValueError, match=f"validation-.* expected {wikitext.SHA256['validation']}: delete it"
    ):
        load_corpus("wikitext-2")


# ---- docs


def test_strings_of_a_source():
    source = textwrap.dedent('''
        """Module.

            kept  indent"""
        x = 1
        """About x."""
        if x:
            class C:
                async def f(self):
                    r"""Of f."""
        add_docstr(C.f, """Of C f.
          More.""".format(a=1))
        print("""Not a doc.""")
        C.f.__doc__ = """Applies f.""" + "to {x}"
        ''')
    assert list(docs.strings(source)) == [
        "Module.\n\nkept  indent",
        "About x.",
        "Of f.",
        "Of C f.\nMore.",
        "Applies f.",
        "to {x}",
    ]
    assert list(docs.strings('def f[T](: """No python."""')) == []


def test_near_duplicates_are_seen():
    seen = docs.Seen()
    text = "Returns the resolvent of a tridiagonal matrix, one value per site, in {} operations."
    assert seen.is_new(text.format("O(N)")) and not seen.is_new(text.format("O(N^2)"))
    assert not seen.is_new(text.upper()) and seen.is_new(
        "The bandwidth of a matrix decides its spectrum."
    )
    assert seen.is_new("1 2 3") and seen.is_new("1 2 4") and not seen.is_new(" 1  2 4")


def test_a_source_is_in_one_split_with_the_shares_meant():
    names = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(5000)]
    shares = [np.mean([docs.split_of(name) == split for name in names]) for split in SPLITS]
    assert shares == pytest.approx([0.88, 0.06, 0.06], abs=0.015)


def test_docs_name_the_package_that_is_missing(cache, monkeypatch):
    monkeypatch.setattr(docs, "PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(
        ModuleNotFoundError, match="'docs' reads 'no_such_package', which is not installed"
    ):
        load_corpus("docs")


@pytest.fixture(scope="module")
def docs_texts():
    return docs.texts()  # in the cache of the session: building takes half a minute


def test_docs_are_about_ten_megabytes_of_documentation(docs_texts):
    sizes = {split: len(docs_texts[split].encode()) for split in SPLITS}
    assert 8e6 < sum(sizes.values()) < 14e6
    assert 0.8 < sizes["train"] / sum(sizes.values()) < 0.93 and min(sizes.values()) > 2.5e5
    everything = "".join(docs_texts.values())
    for phrase in ("`cross-correlation`_", "ndarray", "DataFrame", "Axes", "Assert statements are"):
        assert phrase in everything


def test_no_near_duplicate_paragraph_crosses_the_splits_of_docs(docs_texts):
    """Jaccard similarity of 5-grams of words: held-out paragraphs (a sample) against all training
    text."""
    held_out = docs.paragraphs(docs_texts["validation"]) + docs.paragraphs(docs_texts["test"])
    sample = random.Random(0).sample(held_out, 500)
    grams = [docs.shingles(docs.normalized(paragraph)) for paragraph in sample]
    owners = {}
    for i, found in enumerate(grams):
        for gram in found:
            owners.setdefault(gram, []).append(i)
    for paragraph in docs.paragraphs(docs_texts["train"]):
        found = docs.shingles(docs.normalized(paragraph))
        for i in {i for gram in found if gram in owners for i in owners[gram]}:
            similarity = len(found & grams[i]) / len(found | grams[i])
            assert similarity < 0.5, (paragraph, sample[i])
