"""Zip members: their bytes up to a limit, whatever the headers claim; one member a name."""

import struct
import warnings
import zipfile

import pytest

from r1vfree_cli.core.errors import DataError, UsageError
from r1vfree_cli.data import archives
from r1vfree_cli.data.archives import zip_members


def make(path, members, **options):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        warnings.simplefilter("ignore")
        for name, data in members:
            archive.writestr(name, data)
    return path


def claim_size(path, size: int):
    """Write another unpacked size into all headers of a zip of one member."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(bytes(data))


def test_members_by_name_without_folders(tmp_path):
    members = zip_members(make(tmp_path / "a.zip", [("VD/", b""), ("VD/a.png", b"one"), ("./VS/b.png", b"two")]))
    assert {name: read() for name, read in members.items()} == {"VD/a.png": b"one", "VS/b.png": b"two"}


def test_a_member_without_a_name_is_one_like_any_other(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"x")
        archive.writestr("a.png", b"y")
    assert zip_members(tmp_path / "a.zip")["a.png"]() == b"y"


@pytest.mark.parametrize(
    "names", [("a.png", "a.png"), ("a.png", "./a.png"), ("x/a.png", "x\\a.png"), ("a.png", "a.png/")]
)
def test_one_name_twice_is_refused_by_name(tmp_path, names):
    with pytest.raises(DataError, match=r"several members called .*a\.png"):
        zip_members(make(tmp_path / "a.zip", [(name, name.encode()) for name in names]))


@pytest.mark.parametrize("size", [3, 10_000, 2**32 - 2])
def test_a_bomb_is_cut_off_whatever_its_header_claims(tmp_path, monkeypatch, size):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 50_000)
    path = make(tmp_path / "a.zip", [("a.png", bytes(60_000))])
    claim_size(path, size)
    with pytest.raises(DataError, match=r"larger than|cannot read"):
        zip_members(path)["a.png"]()


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UsageError, match="no zip"):
        zip_members(tmp_path / "a.zip")
    path = make(tmp_path / "b.zip", [("a.png", b"0123456789" * 100)])
    path.write_bytes(path.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05", 1))
    with pytest.raises(DataError, match=r"cannot read a\.png"):
        zip_members(path)["a.png"]()
