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


def read(folder, **options):
    """The documents, and what is told."""
    reader = Reader(folder, **options)
    return list(reader), reader.notes()


class TestTypes:
    """What is not prose is not trained on in silence."""

    def test_other_files_are_counted_and_named_by_their_type(self, tmp_path):
        write(tmp_path, {"a.md": "text", "p.pdf": "%PDF", "Makefile": "all:"} | {f"h{i}.html": "<p>" for i in range(9)})
        documents, notes = read(tmp_path)
        assert texts(documents) == ["text"]
        assert notes == [
            "9 .html files not read: h0.html, h1.html, h2.html and 6 more (docs/preparing_documents.md)",
            "1 file without an ending not read: Makefile (docs/preparing_documents.md)",
            "1 .pdf file not read: p.pdf (docs/preparing_documents.md)",
        ]

    def test_many_types_take_few_lines(self, tmp_path):
        write(tmp_path, {"a.md": "text"} | {f"x.t{i}": "x" for i in range(30)})
        _, notes = read(tmp_path)
        assert len(notes) == 9 and "1 .t9" in notes[-1]

    def test_a_folder_without_documents_tells_what_it_has(self, tmp_path):
        write(tmp_path, {f"{i}.pdf": b"%PDF" for i in range(200)})
        with pytest.raises(
            UserError, match=r"no documents in .*; 200 \.pdf files not read: 0\.pdf.*preparing_documents"
        ):
            read_documents(tmp_path)

    @pytest.mark.parametrize("name", ["page.html", "a.HTM", "letter.rtf", "notebook.ipynb"])
    def test_markup_by_itself_is_refused(self, tmp_path, name):
        write(tmp_path, {name: "<p>text</p>"})
        with pytest.raises(UserError, match=r"is (HTML|HTM|RTF|IPYNB), which is not read; docs/preparing"):
            read_documents(tmp_path / name)

    def test_markup_under_another_name_is_noticed(self, tmp_path):
        write(tmp_path, {"a.txt": "<!DOCTYPE html>\n<p>text", "b.md": '{"text": "x"}', "c.md": "{braces} in prose"})
        _, notes = read(tmp_path)
        assert len(notes) == 1 and notes[0].startswith("2 files of markup or data instead of prose read as text: a.txt")

    def test_pipes_and_devices_are_skipped_and_never_waited_for(self, tmp_path):
        write(tmp_path, {"a.md": "text"})
        os.mkfifo(tmp_path / "b.md")
        assert read(tmp_path)[1] == ["1 pipe or device skipped: b.md"]
        for path in (tmp_path / "b.md", "/dev/zero"):
            with pytest.raises(UserError, match="neither a file nor a folder"):
                read_documents(path)

    def test_a_file_that_became_a_link_or_a_pipe_since(self, tmp_path):
        write(tmp_path, {"a.md": "text", "secret": "there"})
        reader = Reader(tmp_path)
        (tmp_path / "a.md").unlink()
        os.mkfifo(tmp_path / "a.md")
        with pytest.raises(UserError, match="a pipe"):
            list(reader)

    @pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", ""])
    def test_odd_paths(self, tmp_path, name):
        with pytest.raises(UserError) as caught:
            read_documents(tmp_path / name if name else tmp_path / "absent" / "a")
        assert "\n" not in str(caught.value)

    def test_a_loop_of_links(self, tmp_path):
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        with pytest.raises(UserError, match=r"cannot read .*: Too many levels"):
            read_documents(tmp_path / "a")


ENGLISH = "The café was closed. “Why?” she asked; it’s naïve.\nA second line.\n" * 5
RUSSIAN = "Мама мыла раму, а папа читал книгу.\nВторая строка.\n" * 5
CHINESE = "这是一个测试文件。\n第二行在这里。\n" * 20


class TestEncodings:
    @pytest.mark.parametrize("text", [ENGLISH, RUSSIAN, CHINESE, "a"])
    @pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_with_a_mark_any_unicode_is_read(self, text, codec):
        assert decode(text.encode(codec)) == text
        assert decode(text.encode(codec), "cp1252") == text
        big_endian = {"utf-16": b"\xfe\xff", "utf-32": b"\0\0\xfe\xff"}
        if codec in big_endian:
            assert decode(big_endian[codec] + text.encode(codec + "-be")) == text

    @pytest.mark.parametrize(
        ("text", "codec", "name"),
        [
            (text, f"{codec}-{order[0]}e", f"{codec.upper()} ({order}-endian) without a mark")
            for text in (ENGLISH, RUSSIAN, CHINESE, "hi")
            for codec in ("utf-16", "utf-32")
            for order in ("little", "big")
            if (text, codec) != ("hi", "utf-32") or order == "little"
        ]
        + [(ENGLISH, "cp1252", "Windows-1252"), (RUSSIAN, "cp1251", "Windows-1251"), (RUSSIAN, "koi8-r", "KOI8-R")],
    )
    def test_what_a_file_is_is_said_and_then_read(self, text, codec, name):
        with pytest.raises(Undecodable) as caught:
            decode(text.encode(codec))
        assert (caught.value.guess.name, caught.value.guess.codec) == (name, codec)
        assert decode(text.encode(codec), codec) == text

    @pytest.mark.parametrize(
        ("content", "name"),
        [
            (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF"),
            (b"PK\x03\x04\xff\xfe\xff", "a ZIP archive, such as EPUB or DOCX"),
            (random.Random(0).randbytes(5000), "a binary file"),
            ("é".encode() * 50 + b"\xff", "damaged UTF-8"),
            (CHINESE.encode("gb18030"), "an encoding other than UTF-8, such as Shift-JIS or GB18030"),
        ],
    )
    def test_what_cannot_be_read_by_a_name_is_said_too(self, content, name):
        with pytest.raises(Undecodable) as caught:
            decode(content)
        assert caught.value.guess == (name, "", name.startswith(("damaged", "an encoding")))

    def test_utf8_stays_utf8_whatever_encoding_is_named(self):
        for codec in ("cp1252", "utf-16-le", "shift_jis"):
            assert decode(ENGLISH.encode(), codec) == ENGLISH
        assert decode("日本語 text".encode("iso2022_jp"), "iso2022_jp") == "日本語 text"

    def test_all_files_that_are_no_text_are_named_at_once(self, tmp_path):
        names = [f"w{i:02}.txt" for i in range(30)]
        write(tmp_path, {name: f"Le café {name}.".encode("cp1252") for name in names} | {"good.md": "good"})
        write(tmp_path, {"u.txt": "Sixteen bits".encode("utf-16-le"), "p.md": b"%PDF-1.4 \xff"})
        with pytest.raises(UserError) as caught:
            read_documents(tmp_path)
        error = str(caught.value)
        assert "\n" not in error and error.startswith("32 files in ") and "docs/preparing_documents.md" in error
        assert all(name in error for name in [*names, "u.txt", "p.md"]) and "good.md" not in error
        assert "30 look like Windows-1252 (add --encoding cp1252, or save as UTF-8): w00.txt" in error
        assert "1 looks like UTF-16 (little-endian) without a mark (add --encoding utf-16-le" in error
        assert "1 looks like a PDF (convert to text, or take out of the folder)" in error

    def test_an_encoding_reads_them_beside_utf8(self, tmp_path):
        write(tmp_path, {f"{i}.txt": f"café {i}".encode("cp1252") for i in range(30)} | {"u.md": "naïve"})
        assert "café 7" in texts(read_documents(tmp_path, encoding="cp1252"))
        assert "naïve" in texts(read_documents(tmp_path, encoding="cp1252"))

    @pytest.mark.parametrize("encoding", [None, "cp1252", "latin-1"])
    def test_what_is_no_text_is_none_in_any_encoding(self, tmp_path, encoding):
        """Any bytes are text in latin-1, and a PDF or a ZIP archive may have ASCII characters alone."""
        write(tmp_path, {"a.md": "good", "book.txt": b"%PDF-1.4\n1 0 obj\n", "x.md": b"PK\x03\x04abc"})
        with pytest.raises(UserError, match=r"2 files in .*a PDF \(convert to text") as caught:
            read_documents(tmp_path, encoding=encoding)
        assert "a ZIP archive, such as EPUB or DOCX" in str(caught.value)
        with pytest.raises(UserError, match="a PDF"):
            read_documents(tmp_path / "book.txt", encoding=encoding)

    def test_an_encoding_that_does_not_fit(self, tmp_path):
        write(tmp_path, {"a.txt": b"caf\xe9", "u.txt": "café".encode("utf-16-le")})
        with pytest.raises(UserError, match=r"2 files in .* are not UTF-8 or ascii"):
            read_documents(tmp_path, encoding="ascii")
        with pytest.raises(UserError, match=r"u\.txt is not UTF-8 or cp1252: .*UTF-16"):  # zeros between the letters
            read_documents(tmp_path, encoding="cp1252")

    @pytest.mark.parametrize("name", ["foo", "rot13", "base64", "undefined", "", "a\0b"])
    def test_no_encoding_of_text(self, tmp_path, name):
        write(tmp_path, {"a.md": "text"})
        with pytest.raises(UserError, match="there is no encoding"):
            read_documents(tmp_path, encoding=name)


PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ" * 40


class TestCleaning:
    @pytest.mark.parametrize(
        ("text", "folded", "count"),
        [
            ("one\ntwo\tthree", "one\ntwo\tthree", 0),
            ("one\r\ntwo\rthree", "one\ntwo\nthree", 0),
            ("page one \n\fpage two\f", "page one\n\npage two\n\n", 2),
            ("\f\n", "\n\n\n", 1),
            ("a\vb\0c\x01\x7fd", "a\nbcd", 4),
            ("\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x07link", "red link", 3),
            ("N\bNA\bAME", "NAME", 2),
            ("don\x92t \x93so\x94 \x85 \x81", "don’t “so” … ", 5),
            ("half \ud83d", "half \ufffd", 1),
        ],
    )
    def test_control_characters(self, text, folded, count):
        assert clean.fold_controls(text) == (folded, count)
        assert clean.fold_controls(folded) == (folded, 0)

    @pytest.mark.parametrize(
        ("text", "body"),
        [
            ("---\ntitle: A\ntags:\n  - b\n- c\n# comment\n\nlist: [a,\n  b]\n---\nBody", "Body"),
            ("---\ntitle: A\n...\nBody", "Body"),
            ("---\nempty:\n---", ""),
            ("+++\ntitle = 'A'\n+++\nBody", "Body"),
            ("---\n\nProse between rules.\n\n---\nBody", None),
            ("---\n\n  indented verse\n\n---\nBody", None),
            ("---\nAnd then he said:\nnothing.\n---\n", None),
            ("---\n---\nBody", None),
            ("Body\n---\ntitle: A\n---\n", None),
            ("---\ntitle: never closed\n", None),
        ],
    )
    def test_front_matter(self, text, body):
        assert clean.strip_front_matter(text) == (text if body is None else body)

    @pytest.mark.parametrize(
        ("text", "rest"),
        [
            (f"See ![a cat](data:image/png;base64,{PICTURE}) here.", "See  here."),
            (f"See ![a cat][1].\n\n[1]: <data:image/png;base64,{PICTURE}>\nEnd.", "See ![a cat][1].\n\nEnd."),
            (f'<img alt="x" src="data:image/gif;base64,{PICTURE}=="> end', " end"),
            (f"data:application/pdf;name=a.pdf;base64,{PICTURE}", ""),
            (f"Raw {PICTURE} end", "Raw  end"),
            ("Mail:\n" + (PICTURE[:76] + "\n") * 9 + "after\n\nBye.", "Mail:\nafter\n\nBye."),
            ("Mail:\n" + (PICTURE[:76] + "\n") * 9 + PICTURE[:36] + "==\n\nBye.", "Mail:\n\n\nBye."),
        ],
    )
    def test_pictures_in_base64(self, text, rest):
        assert clean.drop_base64(text)[:2] == (rest, 1)
        assert clean.drop_base64(text)[2] == len(text) - len(rest)

    @pytest.mark.parametrize(
        "text", ["-" * 2000, "ACGT" * 500, "word" * 500, "https://x.org/" + "a%20" * 300, "长" * 999]
    )
    def test_other_long_strings_stay(self, text):
        assert clean.drop_base64(text) == (text, 0, 0)

    def test_notes(self, tmp_path):
        write(
            tmp_path,
            {
                "a.md": f"---\ntitle: A\n---\nText ![](data:image/png;base64,{PICTURE}) end.",
                "b.md": "---\ntitle: only\n---\n",
                "b.txt": "---\ntitle: A\n---\nNot Markdown.\0",
                "c.txt": "A page.\fAnother. " + "ACGT" * 500,
            },
        )
        documents, notes = read(tmp_path)
        assert texts(documents)[:2] == ["Text  end.", "---\ntitle: A\n---\nNot Markdown."]
        assert notes == [
            "1 file without text skipped",
            "front matter left out of 2 files",
            f"1 picture or other data in base64 left out, {len(PICTURE) + 27:,} bytes: a.md",
            "1 very long string without a space, which no vocabulary has: c.txt",
            "2 control characters replaced or left out: b.txt, c.txt",
        ]

    @pytest.mark.parametrize(
        "text",
        [
            "---\n" + "a: b\n" * 100_000,
            "<img " * 50_000 + "base64,",
            "data:a/b;" * 50_000 + "base64,",
            "![x](data:" * 50_000 + "base64,",
            "[a]: " * 50_000 + "base64,",
            ("A" * 76 + "\n") * 10_000,
            "data:a/b;base64," + (" " + "A" * 60) * 10_000 + "!",
            "\x1b]" * 100_000,
            "\n \t" * 100_000 + "\0",
        ],
        ids=range(9),
    )
    def test_time_is_linear(self, text):
        for function in (clean.fold_controls, clean.strip_front_matter, clean.drop_base64):
            function(text)  # pytest-timeout ends what is not


class TestPart:
    def folder(self, tmp_path):
        return write(tmp_path, {f"{i:03}.txt": f"Text {i}. " * 100 for i in range(100)})

    def test_a_part_is_of_that_size_the_same_each_time_and_said(self, tmp_path):
        folder = self.folder(tmp_path)
        documents, notes = read(folder, max_bytes=20_000)
        assert sum(len(d.text) for d in documents) in range(19_000, 20_001)
        assert documents == read(folder, max_bytes=20_000)[0]
        assert [d.source for d in documents] == sorted(d.source for d in documents)
        assert documents[0].source != "000.txt#1" or documents[-1].source != "020.txt#1"  # by a hash, not from the top
        assert len(notes) == 1 and notes[0].startswith("a part of the documents: 20,000 of ")

    def test_more_only_adds(self, tmp_path):
        folder = self.folder(tmp_path)
        small, large = ({f.name for f in Reader(folder, max_bytes=n).files} for n in (10_000, 30_000))
        assert small < large

    def test_enough_is_everything(self, tmp_path):
        assert read(self.folder(tmp_path), max_bytes=10**9) == read(self.folder(tmp_path))

    @pytest.mark.parametrize("codec", ["utf-8", "utf-16", "utf-16-le"])
    def test_a_file_is_cut_between_paragraphs(self, tmp_path, codec):
        write(tmp_path, {"a.txt": "\n\n".join(f"Абзац {i} из текста." for i in range(999)).encode(codec)})
        for size in range(3000, 3008):
            (document,), _ = read(tmp_path, max_bytes=size, encoding="utf-16-le" if codec == "utf-16-le" else None)
            assert document.text.endswith("из текста.") and len(document.text) > 1200

    @pytest.mark.parametrize(("name", "head"), [("a.jsonl", ""), ("a.csv", "text\n")])
    def test_a_record_that_is_cut_is_left_out(self, tmp_path, name, head):
        row = '{{"text": "Record {}."}}\n' if name == "a.jsonl" else '"Record {}."\n'
        write(tmp_path, {name: head + "".join(row.format(i) for i in range(1000))})
        documents, notes = read(tmp_path, max_bytes=2000)
        assert 50 < len(documents) < 200 and all(text.endswith(".") for text in texts(documents))
        assert not any("skipped" in note for note in notes)

    def test_one_json_value_cannot_be_cut(self, tmp_path):
        write(tmp_path, {"a.json": '[{"text": "Record."}]'})
        with pytest.raises(UserError, match=r"a\.json .*make it \.jsonl"):
            read(tmp_path, max_bytes=10)
        with pytest.raises(UserError, match="at least 1 byte"):
            Reader(tmp_path, max_bytes=0)
