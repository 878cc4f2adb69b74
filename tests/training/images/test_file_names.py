"""Names of files in two tensors: the same as a sorted list of strings, in less memory, shared by processes."""

import hashlib
import logging
import multiprocessing
import os
import re
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest

from hf_vicreg.training.images.files import file_names
from hf_vicreg.training.images.files.file_names import FileNames
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.run.places import files_below

ODD = [
    "b.png",
    "a.png",
    "a/z.png",
    "a-b/z.png",
    "a/b/c.PNG",
    "ä.png",
    "日本.png",
    "😀.png",
    "\ue000.png",
    "new\nline.png",
]


def plain(folder):
    """The names as lists of strings had them."""
    paths = sorted(path for path in files_below(folder) if path.lower().endswith(".png"))
    return paths, [os.path.relpath(path, folder) for path in paths]


@pytest.mark.parametrize("ending", ["", "/", "/../images", "//"], ids=["folder", "slash", "dots", "slashes"])
def test_names_are_what_a_sorted_list_holds(tmp_path, monkeypatch, ending):
    folder = f"{tmp_path}/images{ending}"
    for name in [*map(os.fsencode, ODD), b"\xff\xfe.png", b"\x80.png", b"text.txt"]:
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(b"")
    paths, expected = plain(folder)
    monkeypatch.setattr(file_names, "BLOCK", 5)
    names = FileNames.of(files_below(folder), folder, {".png"})
    assert len(names) == len(expected) == 12
    assert list(names) == [names[index] for index in range(12)] == names[:] == expected
    assert list(names.below(folder)) == paths
    assert names[-1] == expected[-1]
    assert names[1:9:3] == expected[1:9:3]
    assert names.index("a/z.png") == expected.index("a/z.png")
    assert "text.txt" not in names
    with pytest.raises(IndexError):
        names[12]
    digest = hashlib.sha256()
    names.update(digest)  # checkpoints hold the digest of the joined list
    assert digest.digest() == hashlib.sha256("\n".join(expected).encode(errors="surrogateescape")).digest()


def test_no_names_are_an_empty_list(tmp_path):
    names = FileNames.of(files_below(str(tmp_path)), str(tmp_path), {".png"})
    assert not names
    assert list(names) == []


def own_memory():
    """Bytes of this process that it shares with no other."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+)", rollup, re.MULTILINE))


def look_at_all(names, answer):
    before = own_memory()
    for name in names:
        assert name
    answer.put(own_memory() - before)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's account of memory")
def test_a_process_that_looks_at_names_has_no_copy_of_them():
    listed = [f"some/folder/with/images/{index:08d}.jpeg" for index in range(300_000)]
    grown = []
    context = multiprocessing.get_context("fork")
    for names in (listed, FileNames.of(listed, "some", {".jpeg"})):
        answer = context.SimpleQueue()
        process = context.Process(target=look_at_all, args=(names, answer))
        process.start()
        grown.append(answer.get())
        process.join(60)
    assert grown[0] > 20e6  # each string's count of references is written
    assert grown[1] < 0.7 * grown[0]  # what the interpreter writes of its own, up to 14 MB under other tests


def test_a_process_that_is_not_forked_is_sent_no_copy():
    names = FileNames.of([f"images/{index}.png" for index in range(100_000)], "images", {".png"})
    assert len(bytes(ForkingPickler.dumps(names))) < 10_000
    assert names.packed.is_shared()


def test_a_long_scan_says_how_far_it_is(image_folder, monkeypatch, caplog):
    monkeypatch.setattr(file_names, "CLOCK_EVERY", 4)
    monkeypatch.setattr(file_names, "SAID_EVERY_S", 0.0)
    folder = image_folder(10)
    with caplog.at_level(logging.INFO, logger="hf_vicreg"):
        source, _ = load_sources(train_dir=str(folder))
    assert [line for line in caplog.messages if "files so far" in line] == [
        f"4 files so far, {folder} the last of them",
        f"8 files so far, {folder} the last of them",
    ]
    assert source.describe(3) == "0003.png"
