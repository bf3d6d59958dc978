"""files.write_folder(): a folder that is there whole, the old one or the new one."""

import pytest

from nanodiff.files import write_folder


def put(text):
    def fill(folder):
        folder.mkdir()
        (folder / "a").write_text(text)

    return fill


def test_old_or_new_and_nothing_beside(tmp_path):
    for text in ("one", "two", "three"):
        write_folder(tmp_path / "m", put(text))
        assert (tmp_path / "m" / "a").read_text() == text and [p.name for p in tmp_path.iterdir()] == ["m"]

    def breaks(folder):
        put("half")(folder)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_folder(tmp_path / "m", breaks)
    assert (tmp_path / "m" / "a").read_text() == "three"
    write_folder(tmp_path / "m", put("four"))
    assert (tmp_path / "m" / "a").read_text() == "four" and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    """Such as out/model on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "disk" / "m", put("zero"))
    (tmp_path / "out" / "m").symlink_to(tmp_path / "disk" / "m")
    for text in ("one", "two", "three"):
        write_folder(tmp_path / "out" / "m", put(text))
        assert (tmp_path / "out" / "m").is_symlink() and (tmp_path / "disk" / "m" / "a").read_text() == text
        assert [p.name for p in (tmp_path / "disk").iterdir()] == ["m"]
