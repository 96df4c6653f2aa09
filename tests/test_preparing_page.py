"""docs/preparing_documents.md: what it claims, run."""

import json
import re
from pathlib import Path

import pytest
from corpora import prose, texts, write

from mamba2_min.data import records, repeats, room, split
from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.documents import PROSE, read_documents
from mamba2_min.errors import UserError

PAGE = (Path(__file__).parent.parent / "docs" / "preparing_documents.md").read_text(encoding="utf-8")


def test_the_table_of_files_is_what_is_read():
    rows = re.findall(r"^\| ((?:`\.\w+`,? ?)+) \|", PAGE, re.M)
    assert [tuple(re.findall(r"`(\.\w+)`", row)) for row in rows] == [PROSE, records.SUFFIXES]


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "a text", "id": 1}, "a text"),
        (
            {"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "abcd", strict=True)]},
            "a<start>b\n\nc<start>d",
        ),
        ({"prompt": "p", "completion": "c"}, "p<start>c"),
        ({"prompt": "p", "response": "c"}, "p<start>c"),
        ({"question": "p", "answer": "c"}, "p<start>c"),
        ({"instruction": "i", "input": "about", "output": "o"}, "i\n\nabout<start>o"),
        ({"instruction": "i", "output": "o"}, "i<start>o"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a<start>b"),
    ],
)
def test_what_a_record_becomes(tmp_path, record, document):
    assert texts(read_documents(write(tmp_path, {"a.jsonl": json.dumps(record)}))) == [document]


@pytest.mark.parametrize("delimiter", ",;\t|")
def test_a_csv_may_be_separated_by(tmp_path, delimiter):
    write(tmp_path, {"a.csv": f"id{delimiter}text\n1{delimiter}owl\n"})
    assert texts(read_documents(tmp_path)) == ["owl"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"%PDF-1.4\n", "a PDF"),
        (b"PK\x03\x04", "EPUB"),
        (b"\x89PNG\r\n", "a picture"),
        (b"\xff\xd8\xff\xe0", "a picture"),
    ],
)
def test_a_file_that_is_named_but_is_no_text(tmp_path, content, what):
    with pytest.raises(UserError, match=what):
        read_documents(write(tmp_path, {"a": content}) / "a")


def test_the_figures_are_those_of_the_code():
    assert f"of {repeats.LENGTH} characters or more that stand in three documents" in PAGE and repeats.DOCUMENTS == 3
    assert f"about {room.BYTES_PER_BYTE} bytes per byte of text, and {room.BYTES_PER_BYTE_OF_LARGEST} more" in PAGE
    assert "more than a twentieth of all text" in PAGE and split.LARGE_PARTS == 20


def test_start_is_one_token_where_the_documents_have_it(tmp_path):
    documents = {f"{k}.md": f"Request {k}<start>{prose(k, 300)}" for k in range(12)}
    corpus = load_corpus(write(tmp_path, documents))
    assert len(corpus.tokenizer.encode("<start>", allow_special=True)) == 1
    assert len(corpus.tokenizer.encode("<start>")) > 1  # what is typed is no border unless it is asked for


def test_every_flag_that_is_named_is_one(capsys, monkeypatch):
    import runpy
    import sys

    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(Path(__file__).parent.parent / "train.py"), run_name="__main__")
    said = capsys.readouterr().out
    for flag in set(re.findall(r"`(--[a-z][a-z-]+)", PAGE)):
        assert f"{flag} " in said or f"{flag}," in said, flag
