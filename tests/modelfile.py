"""What Ollama makes of a Modelfile: the few directives and the part of Go's template language that exports use."""

import re
from itertools import pairwise

_TAG = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_TEST = re.compile(r'(eq|ne) (\.\w+|\(printf "%\.1s" \.\w+\)) "(.*)"')


def parameters(text):
    """{name: its values, as written} of a Modelfile's PARAMETER lines."""
    found = {}
    for name, value in re.findall(r"^PARAMETER (\w+) (.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def template(text):
    """The template of a Modelfile."""
    return re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]


def render(template, messages=(), prompt=""):
    """The text that a template makes of messages, {"role", "content"} each, or of a prompt."""
    parts = _TAG.split(template)  # text and tags in turn
    return _run(parts, 0, len(parts), {"Messages": messages, "Prompt": prompt})


def _run(parts, start, end, fields):
    written, at = "", start
    while at < end:
        tag = parts[at]
        if at % 2 == 0:
            written += tag
        elif tag == "range .Messages":
            stop = _branches(parts, at)[-1]
            for message in fields["Messages"]:
                written += _run(parts, at + 1, stop, {"Role": message["role"], "Content": message["content"]})
            at = stop
        elif tag.startswith("if "):
            marks = _branches(parts, at)
            for mark, following in pairwise(marks):
                condition = parts[mark].removeprefix("else").strip()
                if not condition or _holds(condition.removeprefix("if "), fields):
                    written += _run(parts, mark + 1, following, fields)
                    break
            at = marks[-1]
        else:
            written += fields[tag.removeprefix(".")]
        at += 1
    return written


def _branches(parts, at):
    """Where a block's tags are: its first, each `else` of its own, and its end."""
    found, depth = [at], 0
    for k in range(at + 2, len(parts), 2):
        if parts[k].startswith(("if ", "range ")):
            depth += 1
        elif depth == 0 and parts[k].startswith("else"):
            found.append(k)
        elif parts[k] == "end":
            if depth == 0:
                return [*found, k]
            depth -= 1
    raise ValueError("a block has no end")


def _holds(condition, fields):
    kind, left, right = _TEST.fullmatch(condition).groups()
    value = fields[left.split(".")[-1].rstrip(")")]
    return ((value[:1] if left.startswith("(") else value) == right) is (kind == "eq")
