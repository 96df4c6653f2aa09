"""Records: JSON Lines, JSON, CSV and TSV files, such as an export of chats or a data set.

    read_rows     the rows of a file, whatever their fields are
    turns_of      who says what in a record, for fine-tuning
    document_of   the document that it is, for training; read_records does that for a whole file

    text                          the document itself
    messages                      a list of {"role", "content"}: request<start>answer, an empty line, request<start>...
    prompt, completion            prompt<start>completion
    instruction, input, output    instruction, an empty line, input (where there is one)<start>output

Other spellings that are common are read too (PAIRS, MESSAGES). All other fields are left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
START = "<start>"  # between a request and its answer
MESSAGES = ("messages", "conversations", "conversation")
PAIRS = (  # request, answers; the first pair that a record has counts
    ("instruction", ("output", "response", "completion", "answer")),
    ("prompt", ("completion", "response", "answer", "output")),
    ("question", ("answer", "response", "completion", "output")),
    ("input", ("output", "response", "completion")),
    ("user", ("assistant",)),
)
ABOUT = ("input", "context")  # what an instruction is about
FIELDS = "text, messages, prompt and completion, or instruction and output"

_ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "ai", "chatgpt"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "ipython"),  # what a program answered to the model
}
_FIELD_LIMIT = 2**31 - 1  # characters in a field of CSV; Python's own limit is 131,072


Turns = list[tuple[str, str]]  # (role, what it says); a role is system, user, assistant or tool


class Row(NamedTuple):
    """One row of a file: its `value`, an object unless something is wrong, or its `problem`, and `where`."""

    where: str  # "line 7", or "record 7" where a file is one JSON value
    value: Any = None
    problem: str = ""


class Record(NamedTuple):
    """One record of a file: its `text` and the `shape` of its fields, or the `problem` that it has, and `where`."""

    where: str  # "line 7", or "record 7" where a file is one JSON value
    text: str = ""
    shape: str = ""
    problem: str = ""


def read_records(content: str, suffix: str, partial: bool = False) -> Iterator[Record]:
    """The records in a file's text, in order. `suffix` is one of SUFFIXES.

    With `partial`, the text was cut off somewhere, and its last record is left out. A record that cannot be read has a
    `problem`.
    """
    records = (
        Record(row.where, problem=row.problem) if row.problem else _record(row) for row in read_rows(content, suffix)
    )
    if not partial:
        yield from records
        return
    before = next(records, None)
    for record in records:
        assert before is not None
        yield before
        before = record


def read_rows(content: str, suffix: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows in a file's text, in order. `suffix` is one of SUFFIXES; a row that cannot be read has a `problem`.

    A file of JSON may hold one list, one object or an object on each line, whatever its name is. `columns`: names that
    the first row of a table must have, instead of those that make a record.
    """
    if suffix in (".csv", ".tsv"):
        return _table(content, "\t" if suffix == ".tsv" else "", columns)
    return _json(content, is_lines=suffix in (".jsonl", ".ndjson"))


def document_of(record: Any) -> tuple[str, str]:
    """The document that a record holds, and the name of its shape. Raises ValueError that says what is missing."""
    turns, shape = turns_of(record)
    if shape in MESSAGES:
        return _conversation(turns), shape
    return START.join(said for _, said in turns), shape


def turns_of(record: Any) -> tuple[Turns, str]:
    """Who says what in a record, and the name of its shape; a "text" is one turn of no role, as it is.

    Messages may be empty. Raises ValueError that says what is missing.
    """
    if isinstance(record, list):
        return _messages(record), "messages"
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {_short(record)}")
    fields = {str(name).strip().lower(): value for name, value in record.items()}
    for name in MESSAGES:
        if fields.get(name):
            return _messages(fields[name]), name
    for asked, answers in PAIRS:
        answered = next((name for name in answers if name in fields), None)
        if asked in fields and answered:
            request, answer = fields[asked], fields[answered]
            if isinstance(request, list) and isinstance(answer, list):
                return _messages([*request, *answer]), "messages"
            return _pair(fields, asked, answered), f"{asked}/{answered}"
    if "text" not in fields:
        raise ValueError(f"it needs {FIELDS}; it has {_short(', '.join(map(str, record)) or 'no field')}")
    text = _string(fields["text"])
    if not text.strip():
        raise ValueError("its text is empty")
    return [("", text)], "text"


def _pair(fields: dict[str, Any], asked: str, answered: str) -> Turns:
    request, answer = _string(fields[asked]).strip(), _string(fields[answered]).strip()
    if asked == "instruction":
        about = next((_string(fields[name]).strip() for name in ABOUT if fields.get(name)), "")
        request = f"{request}\n\n{about}" if about else request
    for name, value in ((asked, request), (answered, answer)):
        if not value:
            raise ValueError(f"its {name} is empty")
    return [("user", request), ("assistant", answer)]


def _messages(messages: Any) -> Turns:
    if isinstance(messages, str):  # a cell of a table
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise ValueError("its messages are not JSON") from None
    if not isinstance(messages, list):
        raise ValueError(f"its messages are not a list but {_short(messages)}")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"a message is not an object but {_short(message)}")
        name = message.get("role", message.get("from"))
        role = next((role for role, names in _ROLES.items() if str(name).lower() in names), None)
        said = _content(message.get("content", message.get("value"))).strip()
        if role is None and said:
            raise ValueError(f"the role {_short(name)} is unknown")
        turns.append((role or "tool", said))
    return turns


def _conversation(turns: Turns) -> str:
    """Every request with its answer, with an empty line between them. What comes before the first request, such as a
    system message or a greeting, begins it; a last request without an answer is left out."""
    pairs: list[tuple[list[str], list[str]]] = [([], [])]  # (request, answer), each in parts
    for role, said in turns:
        request, answer = pairs[-1]
        if not said or role == "tool":
            continue
        if role == "assistant":
            (answer if request else pairs[0][0]).append(said)
        elif answer:
            pairs.append(([said], []))
        else:
            request.append(said)
    parts = ["\n\n".join(request) + START + "\n\n".join(answer) for request, answer in pairs if answer]
    if not parts:
        raise ValueError("its messages have no answer to a request")
    return "\n\n".join(parts)


def _content(content: Any) -> str:
    """The text of a message, which may be a list of parts, some of them pictures."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "\n\n".join(part for part in parts if isinstance(part, str))
    return _string(content)


def _string(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{_short(value)} is not a text")
    return str(value)


def _short(value: Any) -> str:
    """A value's beginning, on one line."""
    text = (
        value if isinstance(value, str) else repr(value) if not isinstance(value, (list, dict)) else json.dumps(value)
    )
    return f"{text[:57]}..." if len(text) > 60 else text


def _record(row: Row) -> Record:
    try:
        text, shape = document_of(row.value)
    except ValueError as error:
        return Record(row.where, problem=str(error))
    return Record(row.where, text, shape)


def _json(content: str, is_lines: bool) -> Iterator[Row]:
    """Rows of a file that is one JSON value, or has one on each line. `is_lines`: its name says the latter."""
    head = content.lstrip().partition("\n")[0]
    by_lines = _is_json(head)
    if not (is_lines and by_lines):
        value, problem, line = _parse(content)
        if not problem:
            yield from (Row(f"record {number}", row) for number, row in enumerate(_rows_of(value), start=1))
            return
        if not (is_lines or by_lines):
            yield Row(f"line {line}", problem=problem)
            return
    for number, text in enumerate(content.split("\n"), start=1):
        if text.strip():
            value, problem, _ = _parse(text)
            if problem:
                yield Row(f"line {number}", problem=problem)
            else:
                rows = _rows_of(value) if isinstance(value, list) else [value]
                yield from (Row(f"line {number}", row) for row in rows)


def _is_json(text: str) -> bool:
    return not _parse(text)[1]


def _parse(text: str) -> tuple[Any, str, int]:
    """The value of a JSON text, or None, the problem and its line."""
    try:
        return json.loads(text), "", 0
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}", error.lineno
    except RecursionError:
        return None, "not JSON that can be read: nested too deeply", 1
    except ValueError as error:  # an integer of thousands of digits
        return None, f"not JSON that can be read: {str(error).splitlines()[0][:60]}", 1


def _rows_of(value: Any) -> Sequence[Any]:
    """The records in a JSON value: a list of them, an object that holds one such list, or one record."""
    if isinstance(value, list):
        is_conversation = value and all(isinstance(v, dict) and ("role" in v or "from" in v) for v in value)
        return [value] if is_conversation else value
    if isinstance(value, dict) and not {name.strip().lower() for name in value} & {"text", *MESSAGES}:
        lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
        if len(lists) == 1:
            return lists[0]
    return [value]


def _table(content: str, delimiter: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a table whose first row names its columns.

    In a .tsv file, whose `delimiter` is given, a quotation mark is a character like any other. In a .csv file it may
    stand around a cell, and the first row shows the delimiter.
    """
    head = content.lstrip("\n").partition("\n")[0]
    quoted = not delimiter
    if quoted:
        delimiter = max(",;\t|", key=lambda sign: (len(_known(head, sign, columns)), head.count(sign) > 0))
    known = _known(head, delimiter, columns)
    missing = next((name for name in columns if name not in known), None)
    if missing is not None:
        yield Row("line 1", problem=f"no column is called {missing!r}; its first row has {_short(head) or 'nothing'}")
        return
    if not known:
        yield Row("line 1", problem=f"its first row must name {FIELDS}; it has {_short(head)}")
        return
    limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        yield from _cells(content, delimiter, quoted)
    finally:
        csv.field_size_limit(limit)


def _cells(content: str, delimiter: str, quoted: bool) -> Iterator[Row]:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, quoting=quoting)
    names: list[str] = []
    lines, last = content.count("\n") + (not content.endswith("\n")), 0
    try:
        for row in reader:
            first, last = last + 1, reader.line_num
            where = f"line {first}"
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = [name.strip() for name in row]
            elif len(row) > len(names):
                yield Row(where, problem=f"{len(row)} cells, where there are {len(names)} columns")
            elif quoted and last >= lines and _never_closed(content, first, delimiter):
                yield Row(where, problem="a quotation mark that is never closed")
            else:
                yield Row(where, dict(zip(names, row, strict=False)))
    except csv.Error as error:
        yield Row(f"line {reader.line_num}", problem=f"not a table: {error}")


def _never_closed(content: str, first: int, delimiter: str) -> bool:
    """Whether a quotation mark opened on line `first` or later is never closed."""
    rest = content.split("\n", first - 1)[-1]
    try:
        for _ in csv.reader(io.StringIO(rest, newline=""), delimiter=delimiter, strict=True):
            pass
    except csv.Error as error:
        return "end of data" in str(error)
    return False


def _known(head: str, delimiter: str, columns: Sequence[str]) -> set[str]:
    """The columns that are asked for, of a table's first row, or where none are, those that make records."""
    try:
        found = {name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])}
    except csv.Error:
        return set()
    if columns:
        return found & set(columns)
    names = {name.lower() for name in found}
    known = names & {"text", *MESSAGES}
    for asked, answers in PAIRS:
        if asked in names and names & set(answers):
            known |= {asked}
    return known
