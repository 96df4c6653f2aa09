"""Reading: which files, which bytes, where a document ends, and what is told about the rest."""

import os
import random

import pytest
from corpora import texts, write

from mamba2_min.data import clean
from mamba2_min.data.documents import Document, Reader, read_documents
from mamba2_min.data.encodings import Undecodable, decode
from mamba2_min.errors import UserError


class TestRead:
    def test_md_and_txt_below_the_folder_by_relative_path(self, tmp_path):
        write(tmp_path, {"b.md": "two", "a/z.txt": "one", "c/d/e.MD": "three", "x.json": "{}", "y": "no suffix"})
        documents = read_documents(tmp_path)
        assert [(d.source, d.text) for d in documents] == [
            ("a/z.txt#1", "one"),
            ("b.md#1", "two"),
            ("c/d/e.MD#1", "three"),
        ]

    def test_one_file_of_any_name(self, tmp_path):
        write(tmp_path, {"story": "told", "README.md": "read"})
        assert read_documents(tmp_path / "story") == [Document("told", "story#1")]
        assert texts(read_documents(str(tmp_path / "README.md"))) == ["read"]

    def test_relative_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(write(tmp_path, {"data/a.md": "one", "README.md": "no", "b.md": "two"}))
        assert [d.source for d in read_documents(".")] == ["b.md#1", "data/a.md#1"]
        assert [d.source for d in read_documents("data/../data/")] == ["a.md#1"]

    def test_what_is_left_out(self, tmp_path):
        kept = {"a.md": "1", "sub/README.md": "2", "sub/license.txt": "3"}
        skipped = {"README.md": "x", "License.txt": "x", "LICENSE.md": "x", ".a.md": "x", ".git/b.md": "x"}
        write(tmp_path, {**kept, **skipped})
        (tmp_path / "folder.md").mkdir()
        assert texts(read_documents(tmp_path)) == ["1", "2", "3"]

    def test_symbolic_links_are_not_followed_and_counted(self, tmp_path):
        inside = write(tmp_path / "inside", {"a.md": "here"})
        outside = write(tmp_path / "outside", {"secret.md": "there"})
        (inside / "link.md").symlink_to(outside / "secret.md")
        (inside / "folder").symlink_to(outside, target_is_directory=True)
        (inside / "loop").symlink_to(inside, target_is_directory=True)
        notes = []
        assert texts(read_documents(inside, notes=notes)) == ["here"]
        assert notes == ["3 symbolic links not followed"]
        (tmp_path / "data").symlink_to(inside, target_is_directory=True)  # the folder itself may be one
        assert texts(read_documents(tmp_path / "data")) == ["here"]

    def test_bom_line_ends_and_white_space_at_the_ends(self, tmp_path):
        write(tmp_path, {"a.txt": b"\xef\xbb\xbf \r\n one\r\n\r\ntwo \r\n\r\n"})
        assert texts(read_documents(tmp_path)) == ["one\n\ntwo"]
        assert texts(read_documents(tmp_path, strip=False)) == [" \n one\n\ntwo \n\n"]

    @pytest.mark.parametrize(
        "content",
        [
            "one<end>two<end>",
            "one<end>\ntwo<end>\n\n",
            "one\n<end>\ntwo",
            "one\n\n  <|endoftext|>\ntwo\n<|endoftext|>\n",
            "<end>one<end> <end>\r\n<end>two",
        ],
    )
    def test_several_documents_in_a_file(self, tmp_path, content):
        write(tmp_path, {"a.md": content})
        assert read_documents(tmp_path) == [Document("one", "a.md#1"), Document("two", "a.md#2")]

    def test_other_markers_stay(self, tmp_path):
        write(tmp_path, {"a.md": "ask<start>answer <eos> < end > the end<end>"})
        assert texts(read_documents(tmp_path)) == ["ask<start>answer <eos> < end > the end"]

    def test_empty_files_are_skipped_and_counted(self, tmp_path):
        write(tmp_path, {"a.md": "", "b.md": " \n\t", "c.md": "<end>\n<end>", "d.md": "text", "e.md": "\ufeff"})
        notes = []
        assert texts(read_documents(tmp_path, notes=notes)) == ["text"]
        assert notes == ["4 files without text skipped"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"caf\xe9 au lait", r"bad\.md is not UTF-8: byte 0xE9 at offset 3"),
            ("text".encode("utf-16-le"), r"bad\.md is not UTF-8: .*UTF-16"),
            (b"\xef\xbb\xbfabc\xc3", r"bad\.md is not UTF-8: byte 0xC3 at offset 6"),
            (b"\xed\xa0\x80", r"bad\.md is not UTF-8"),  # a lone surrogate
        ],
    )
    def test_not_utf8(self, tmp_path, content, message):
        write(tmp_path, {"good.md": "good", "bad.md": content})
        with pytest.raises(UserError, match=message) as caught:
            read_documents(tmp_path)
        assert "\n" not in str(caught.value)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match="absent"):
            read_documents(tmp_path / "absent")
        with pytest.raises(UserError, match="no such file"):
            read_documents("a\0b")
        with pytest.raises(UserError, match=r"no documents in .*: looked for \.md and \.txt"):
            read_documents(tmp_path)
        write(tmp_path, {"a.json": "[]", "README.md": "read me"})
        with pytest.raises(UserError, match="no documents"):
            read_documents(tmp_path)
        write(tmp_path, {"blank.txt": "\n\n"})
        for path in (tmp_path, tmp_path / "blank.txt"):
            with pytest.raises(UserError, match="no documents"):
                read_documents(path)

    def test_a_file_or_a_folder_that_cannot_be_read(self, tmp_path, monkeypatch):
        write(tmp_path, {"a.md": "text", "sub/b.md": "text"})
        refuse = PermissionError(13, "Permission denied", str(tmp_path / "sub"))

        def deny(*_):
            raise refuse

        real_open = os.open
        with monkeypatch.context() as patch:  # not by mode bits, which do not stop root
            patch.setattr(os, "open", lambda path, *a: deny() if str(path).endswith("a.md") else real_open(path, *a))
            with pytest.raises(UserError, match=r"cannot read .*a\.md: Permission denied"):
                read_documents(tmp_path)
        scandir = os.scandir
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", lambda path: deny() if str(path).endswith("sub") else scandir(path))
            with pytest.raises(UserError, match=r"cannot read the folder .*sub: Permission denied"):
                read_documents(tmp_path)

    def test_key_is_of_the_text_alone(self):
        assert Document("a", "x.md#1").key == Document("a", "y.md#2").key != Document("b", "x.md#1").key
