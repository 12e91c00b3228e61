"""Files that appear whole or not at all, and caches that are made again when they do not fit."""

import os
import resource
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest
from torch import nn

from kit import artifact
from kit.core.store import atomic, cache_dir, cached, read_json, write_json
from kit.data import load_corpus


@contextmanager
def full_disk(size=1000):
    """No file may grow beyond `size` bytes meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def one_sentence(error, *names):
    text = str(error.value)
    assert "\n" not in text and all(str(name) in text for name in names), text


@pytest.mark.parametrize("write", [
    lambda path: artifact.save(nn.Linear(100, 100), path),
    lambda path: write_json(path, list(range(10_000))),
])  # fmt: skip
def test_a_full_disk_leaves_the_old_file_and_no_other(write, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(OSError) as error:
        write(path)
    one_sentence(error, path, "could not be written")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_places_that_take_no_file_are_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in ("/proc/none/a.kit", tmp_path / "file" / "a.kit", tmp_path / "folder"):
        with pytest.raises(OSError) as error:
            artifact.save(nn.Linear(2, 2), path)
        one_sentence(error, str(path).removesuffix("/a.kit"))
    artifact.save(nn.Linear(2, 2), tmp_path / "new" / "folder" / "a.kit")
    artifact.save(nn.Linear(2, 2), tmp_path / ("a" * 240 + ".kit"))
    assert sorted(p.name[:6] for p in tmp_path.iterdir()) == ["aaaaaa", "file", "folder", "new"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "a.json"
    code = "import sys, os; from kit.core.store import atomic; work = atomic(sys.argv[1]);"
    code += "open(work.__enter__(), 'w').write('{'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    with atomic(path) as first:
        assert [*tmp_path.iterdir()] == [first]
        first.write_text("1")
        write_json(path, 2)
        assert first.exists() and read_json(path, int) == 2
    assert read_json(path, int) == 1 and [*tmp_path.iterdir()] == [path]


def test_errors_of_other_files_tell_of_these(tmp_path):
    with pytest.raises(FileNotFoundError, match="'/none/at/all'"):
        with atomic(tmp_path / "a"):
            open("/none/at/all")
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_or_a_place_for_the_cache_there_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    for place in ("/proc/none", str(tmp_path / "file"), "~nobody-of-this-name/x"):
        monkeypatch.setenv("KIT_CACHE", place)
        with pytest.raises(OSError, match="set KIT_CACHE") as error:
            cache_dir()
        one_sentence(error)
    code = "from kit.core.store import cache_dir; print(cache_dir())"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 or "set KIT_CACHE" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[1]", b'{"a": "b"}', b"[" * 100_000])
def test_json_that_is_none_or_of_another_type_names_the_file(data, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "a.json", dict[str, int])
    one_sentence(error, tmp_path / "a.json")


def test_what_cannot_be_read_is_made_again_with_a_warning(tmp_path):
    path, built = tmp_path / "a.json", []

    def build(temporary):
        built.append(1)
        write_json(temporary, {"a": 1})

    for damaged in (None, b"{", b'{"a": "b"}'):
        if damaged is not None:
            path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert cached(path, build, lambda p: read_json(p, dict[str, int])) == {"a": 1}
        assert [str(path) in str(w.message) for w in said] == [True] * (damaged is not None)
    assert cached(path, build, read_json) == {"a": 1} and len(built) == 3


def test_of_several_one_builds(tmp_path):
    path, built = tmp_path / "a.json", []

    def build(temporary):
        built.append(1)
        write_json(temporary, {"a": 1})

    found, threads = [], []
    for _ in range(4):
        work = lambda: found.append(cached(path, build, read_json))
        threads.append(threading.Thread(target=work))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"a": 1}] * 4 and built == [1]


def test_a_damaged_cache_of_tokens_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("one two three four five six seven\n" * 200)
    corpus = load_corpus(f"text:{tmp_path / 'a.txt'}", 265)
    (file,) = (tmp_path / "cache").rglob("*.tokens")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="made again"):
        again = load_corpus(f"text:{tmp_path / 'a.txt'}", 265)
    assert (again.train == corpus.train).all()
