"""Conversations: how they are written as text, and which of their tokens the loss counts.

    User: What floats?\nAssistant:   Ice floats on water. <end>   User: Why?\nAssistant:   It is lighter. <end>
    read, not learnt                 learnt                       read, not learnt         learnt

The markers are plain text, so that no table of the model grows. A model whose documents were written as
`request<start>answer` has a word for that border already, and its conversations are written that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.ops.loss import IGNORE

ROLES = ("system", "user", "assistant")
START = "<start>"  # between a request and its answer, in documents of the data generator


@dataclass(frozen=True)
class Message:
    """What one side says: `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in turns, the last of them an answer. `where` says which line of which file they come from."""

    messages: tuple[Message, ...]
    where: str = ""

    @property
    def request_key(self) -> str:
        """A digest of all that is not an answer: equal requests are on the same side of a split."""
        asked = [(m.role, m.content) for m in self.messages if m.role != "assistant"]
        return sha256(repr(asked).encode()).hexdigest()

    @property
    def key(self) -> str:
        """A digest of everything that is said."""
        return sha256(repr([(m.role, m.content) for m in self.messages]).encode()).hexdigest()


def conversation(record: Any, where: str) -> Conversation:
    """The conversation that a record holds, told by its keys:

        messages                       a list of {"role", "content"}
        prompt, completion             a request and its answer (`response` and `answer` are read as `completion`)
        instruction, input, output     a task, what it is about (may be empty), and the answer
        text                           request<start>answer

    Raises UserError, naming `where`, for anything else.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record must be an object, not {str(record)[:40]!r}")
    if "messages" in record:
        messages = _messages(record["messages"], where)
    elif "instruction" in record and "output" in record:
        task, about = _text(record, "instruction", where), _text(record, "input", where) if record.get("input") else ""
        request = f"{task}\n\n{about}" if about else task
        messages = [Message("user", request), Message("assistant", _text(record, "output", where))]
    elif "prompt" in record:
        answer = next((key for key in ("completion", "response", "answer") if key in record), "completion")
        messages = [Message("user", _text(record, "prompt", where)), Message("assistant", _text(record, answer, where))]
    elif "text" in record:
        request, border, answer = _text(record, "text", where).partition(START)
        if not border:
            raise UserError(f"{where}: its text has no {START} between a request and an answer")
        if not request.strip() or not answer.strip():
            raise UserError(f"{where}: its text has nothing before or after {START}")
        messages = [Message("user", request.strip()), Message("assistant", answer.strip())]
    else:
        known = "messages, prompt and completion, instruction and output, or text"
        raise UserError(f"{where}: a record needs the keys {known}; it has {_names(record)}")
    _check(messages, where)
    return Conversation(tuple(messages), where)


def _messages(values: Any, where: str) -> list[Message]:
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise UserError(f"{where}: messages must be a list of objects with role and content")
    messages = []
    for value in values:
        role = value.get("role", value.get("from"))
        if role not in ROLES:
            raise UserError(f"{where}: the role {str(role)[:40]!r} is unknown; there are {', '.join(ROLES)}")
        messages.append(Message(role, _text(value, "content", where)))
    return messages


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} is {'missing' if value is None else 'empty or not a text'}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key} holds a lone surrogate, which is not text") from None
    return value.strip()


def _names(record: dict[str, Any]) -> str:
    return ", ".join(str(key)[:30] for key in list(record)[:8]) or "none"


def _check(messages: Sequence[Message], where: str) -> None:
    """A system message may come first; then user and assistant take turns, and the last word is an answer."""
    turns = [m.role for m in messages if m.role != "system"]
    if any(m.role == "system" for m in messages[1:]):
        raise UserError(f"{where}: a system message must come first")
    if "assistant" not in turns:
        raise UserError(f"{where}: it has no answer")
    if turns[0] != "user":
        raise UserError(f"{where}: it begins with an answer, without a request")
    if any(a == b for a, b in pairwise(turns)):
        raise UserError(f"{where}: two messages of one side follow each other")
    if turns[-1] != "assistant":
        raise UserError(f"{where}: it ends with a request, without an answer")


@dataclass(frozen=True)
class ChatTemplate:
    """How turns are written: `user` and `system` have {content} in them; the answer follows `before_answer`."""

    system: str
    user: str
    before_answer: str

    def written(self, role: str, content: str) -> str:
        """One message as text, without the end token that follows an answer."""
        form = {"system": self.system, "user": self.user, "assistant": self.before_answer + "{content}"}[role]
        return form.replace("{content}", content)


TURNS = ChatTemplate(system="{content}\n\n", user="User: {content}\nAssistant:", before_answer=" ")
REQUEST = ChatTemplate(system="{content}\n\n", user="{content}" + START, before_answer="")
TEMPLATES = {"turns": TURNS, "request": REQUEST}


def template_for(tokenizer: WordTokenizer) -> str:
    """The name of the template that fits a tokenizer: "request" where it has a word for <start>."""
    return "request" if START in tokenizer.special_words else "turns"


@dataclass(frozen=True)
class Example:
    """A conversation as tokens: `ids` (l + 1,) begins with the end of whatever came before; `learnt` (l,) bool says
    which of ids[1:] the loss counts; `n_bytes` is what those stand for."""

    ids: Tensor
    learnt: Tensor
    n_bytes: int

    def __len__(self) -> int:
        return len(self.learnt)

    @property
    def targets(self) -> Tensor:
        """ids[1:], with IGNORE where nothing is learnt: (l,) int64."""
        return self.ids[1:].masked_fill(~self.learnt, IGNORE)


def tokenize(talk: Conversation, template: ChatTemplate, tokenizer: WordTokenizer) -> Example:
    """Tokens and mask of a conversation. Each answer ends in the end token, which is always learnt."""
    ids, learnt, n_bytes = [tokenizer.eos_id], [], 0
    system = ""
    for message in talk.messages:
        if message.role == "system":
            system = message.content
        elif message.role == "user":
            part = prompt_ids(tokenizer, template, message.content, system)
            ids += part
            learnt += [False] * len(part)
            system = ""
        else:
            text = template.written("assistant", message.content)
            part = [*tokenizer.encode(text), tokenizer.eos_id]
            ids += part
            learnt += [True] * len(part)
            n_bytes += len(text.encode()) + 1
    return Example(torch.tensor(ids), torch.tensor(learnt), n_bytes)


def prompt_ids(tokenizer: WordTokenizer, template: ChatTemplate, content: str, system: str = "") -> list[int]:
    """The tokens that are read for one turn of the user, in training and in a chat alike.

    The template's own <start> is a word of the vocabulary; what a user types never becomes one.
    """
    text = (template.written("system", system) if system else "") + template.written("user", content)
    if template.user.endswith(START):
        return [*tokenizer.encode(text.removesuffix(START)), *tokenizer.encode(START, allow_special=True)]
    return tokenizer.encode(text)
