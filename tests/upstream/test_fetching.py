"""Fetching the mixins fails with one line that says what is needed; runs without an index and without the mixins."""

import io
import tarfile

import pytest
import upstream_sources


def test_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream_sources, "CACHE", tmp_path / "cache")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FileNotFoundError, match=r"expected the source distribution of transformers .* from a package"):
        upstream_sources.fetch()
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_archive_without_the_mixins(tmp_path):
    archive = tmp_path / "transformers-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.addfile(tarfile.TarInfo("transformers-1.0/setup.py"), io.BytesIO())
    with pytest.raises(FileNotFoundError, match=r"expected `tests/test_backbone_common.py` in transformers-1.0"):
        upstream_sources._unpack(archive, tmp_path / "unpacked")


def test_nothing_but_the_mixins_is_unpacked(tmp_path):
    archive = tmp_path / "transformers-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        for name in [*(f"tests/{mixin}.py" for mixin in upstream_sources.MIXINS), "tests/test_other.py", "../out.py"]:
            opened.addfile(tarfile.TarInfo(f"transformers-1.0/{name}"), io.BytesIO())
    upstream_sources._unpack(archive, tmp_path / "unpacked")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py"))
    assert names == sorted(f"unpacked/{name}.py" for name in ("__init__", *upstream_sources.MIXINS))
