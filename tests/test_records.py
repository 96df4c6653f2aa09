"""Records: what their fields mean, and what is told about those that cannot be read."""

import json
import re

import pytest
from corpora import texts, write

from mamba2_min.data.documents import Reader, read_documents
from mamba2_min.data.records import read_records, read_rows
from mamba2_min.errors import UserError

USER, ASSISTANT = "user", "assistant"


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def only(record, suffix=".jsonl"):
    (found,) = read_records(json.dumps(record), suffix)
    return found


class TestShapes:
    @pytest.mark.parametrize(
        ("record", "document"),
        [
            ({"text": "A story.", "id": 7}, "A story."),
            ({"Text ": "A story."}, "A story."),
            ({"prompt": "Ask ", "completion": " Answer"}, "Ask<start>Answer"),
            ({"prompt": "2 + 2", "completion": 4}, "2 + 2<start>4"),
            ({"question": "Ask", "answer": "Answer"}, "Ask<start>Answer"),
            ({"instruction": "Do", "input": "", "output": "Done"}, "Do<start>Done"),
            ({"instruction": "Do", "input": "this", "output": "Done"}, "Do\n\nthis<start>Done"),
            ({"instruction": "Do", "context": "this", "response": "Done"}, "Do\n\nthis<start>Done"),
            (
                {"prompt": [{"role": USER, "content": "Hi"}], "completion": [{"role": ASSISTANT, "content": "Ho"}]},
                "Hi<start>Ho",
            ),
            (messages((USER, "Hi"), (ASSISTANT, "Ho")), "Hi<start>Ho"),
            (
                messages(("system", "Be kind."), (USER, "Hi"), (ASSISTANT, "Ho"), (USER, "Why?"), (ASSISTANT, "So.")),
                "Be kind.\n\nHi<start>Ho\n\nWhy?<start>So.",
            ),
            (messages((ASSISTANT, "Hello!"), (USER, "Hi"), (ASSISTANT, "Ho"), (USER, "Bye")), "Hello!\n\nHi<start>Ho"),
            (messages((USER, "One"), (USER, "two"), (ASSISTANT, "A"), (ASSISTANT, "b")), "One\n\ntwo<start>A\n\nb"),
            (messages((USER, "Hi"), (ASSISTANT, None), ("tool", "42"), (ASSISTANT, "Ho")), "Hi<start>Ho"),
            (
                messages((USER, [{"type": "text", "text": "Hi"}, {"type": "image_url"}]), (ASSISTANT, "Ho")),
                "Hi<start>Ho",
            ),
            ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "Hi<start>Ho"),
        ],
    )
    def test_a_record_becomes_a_document(self, record, document):
        found = only(record)
        assert (found.text, found.problem) == (document, "")

    @pytest.mark.parametrize(
        ("record", "problem"),
        [
            ({"id": 1, "title": "x"}, "it needs text, messages, .*; it has id, title"),
            ({}, "it has no field"),
            ({"text": ""}, "text is empty"),
            ({"text": ["a"]}, "is not a text"),
            ({"prompt": "Ask"}, "it needs"),
            ({"prompt": "Ask", "completion": ""}, "completion is empty"),
            (messages((USER, "Hi")), "no answer"),
            (messages(("Anna", "Hi"), ("Ben", "Ho")), "the role Anna is unknown"),
            ({"messages": "Hi"}, "messages are not JSON"),
            ({"messages": {"role": USER}}, "messages are not a list"),
            ({"messages": ["Hi"]}, "a message is not an object"),
            ("words", "not an object"),
            (7, "not an object"),
        ],
    )
    def test_a_record_of_another_kind_has_a_problem(self, record, problem):
        found = only(record)
        assert not found.text and re.search(problem, found.problem), found
        assert "\n" not in found.problem and len(found.problem) < 200


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "suffix"),
        [
            ('{"text": "one"}\n\n{"text": "two"}\n', ".jsonl"),
            ('{"text": "one"}\n{"text": "two"}', ".json"),
            ('[\n  {"text": "one"},\n  {"text": "two"}\n]', ".json"),
            ('[{"text": "one"}, {"text": "two"}]', ".jsonl"),
            ('{"version": 1, "data": [{"text": "one"}, {"text": "two"}]}', ".json"),
            ("id,text\n1,one\n\n2,two\n", ".csv"),
            ('id;Text\n1;"one"\n2;two', ".csv"),
            ("id\ttext\n1\tone\n2\ttwo\n", ".tsv"),
        ],
    )
    def test_one_value_or_one_on_each_line(self, content, suffix):
        assert [record.text for record in read_records(content, suffix)] == ["one", "two"]

    def test_cells(self):
        records = list(read_records('text,n\n"a, ""b""\nc",1\nshort\n', ".csv"))
        assert [(r.where, r.text) for r in records] == [("line 2", 'a, "b"\nc'), ("line 4", "short")]
        assert [r.text for r in read_records('text\nsay "so\n', ".tsv")] == ['say "so']  # nothing is quoted there
        large = "x" * 200_000  # more than Python's csv takes
        assert next(read_records(f"text\n{large}\n", ".csv")).text == large

    def test_a_cell_of_messages(self):
        content = (
            'messages\n"[{""role"": ""user"", ""content"": ""Hi""}, {""role"": ""assistant"", ""content"": ""Ho""}]"'
        )
        assert [r.text for r in read_records(content, ".csv")] == ["Hi<start>Ho"]

    def test_problems_name_the_line(self):
        content = '{"text": "one"}\n{"text": "two"\n\n{"id": 3}\n' + "[" * 100_000
        found = {r.where: r.problem for r in read_records(content, ".jsonl")}
        assert list(found) == ["line 1", "line 2", "line 4", "line 5"]
        assert "not JSON" in found["line 2"] and "nested too deeply" in found["line 5"]
        (broken,) = read_records('{\n "a": 1,,\n}', ".json")
        assert broken.where == "line 2" and "not JSON" in broken.problem
        rows = {r.where: r.problem for r in read_records('prompt,completion\na,b,c\n,x\nq,"never\nclosed', ".csv")}
        assert "3 cells" in rows["line 2"] and "prompt is empty" in rows["line 3"] and "never closed" in rows["line 4"]
        (last,) = read_records('text\n"open\n', ".csv")
        assert last.where == "line 2" and "never closed" in last.problem
        (header,) = read_records("id,name\n1,x\n", ".csv")
        assert "it has id,name" in header.problem

    def test_rows_of_other_columns(self):
        found = list(read_rows('label;"text"\nx;"a;b"\n', ".csv", columns=("text", "label")))
        assert [(row.where, row.value) for row in found] == [("line 2", {"label": "x", "text": "a;b"})]
        (missing,) = read_rows("id\ttext\n1\ta\n", ".tsv", columns=("text", "label"))
        assert missing.problem == "no column is called 'label'; its first row has id\ttext"

    def test_documents_and_notes(self, tmp_path):
        talk = messages((USER, "Hi"), (ASSISTANT, "Ho"))
        rows = [talk, {"text": "A \0 text.<end>Another."}, {"id": 1}, talk, {"text": "half \ud83d"}]
        write(tmp_path, {"chat.jsonl": "\n".join(map(json.dumps, rows)).encode("utf-8-sig") + b"\r\n{bad}\r\n"})
        reader = Reader(tmp_path)
        assert texts(reader) == ["Hi<start>Ho", "A  text.", "Another.", "Hi<start>Ho", "half \ufffd"]
        notes = reader.notes()
        assert notes[0] == "4 records of 1 file read as documents: 2 by messages, 2 by text"
        assert notes[1].startswith("2 records of 1 file skipped: chat.jsonl, line 3: it needs text")
        assert "chat.jsonl, line 6: not JSON" in notes[1] and "docs/preparing_documents.md" in notes[1]
        assert notes[2] == "2 control characters replaced or left out: chat.jsonl"
        assert texts(read_documents(tmp_path / "chat.jsonl")) == texts(read_documents(tmp_path))

    def test_two_hundred_files_of_other_records_take_one_line(self, tmp_path):
        write(tmp_path, {f"{i}.jsonl": '{"id": 1}\n' for i in range(200)} | {f"t{i}.txt": "Text." for i in range(3)})
        reader = Reader(tmp_path)
        assert len(list(reader)) == 3
        (note,) = reader.notes()
        assert note.startswith("200 records of 200 files skipped: 0.jsonl, line 1 and 199 more: it needs text")

    def test_nothing_but_other_records(self, tmp_path):
        write(tmp_path, {"chat.jsonl": '{"id": 1}\n'})
        for path in (tmp_path, tmp_path / "chat.jsonl"):
            with pytest.raises(UserError, match=r"no documents in .*line 1: it needs .*preparing_documents"):
                read_documents(path)
        write(tmp_path, {"empty.csv": ""})
        with pytest.raises(UserError, match="no documents"):
            read_documents(tmp_path / "empty.csv")
