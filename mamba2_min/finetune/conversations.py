"""Conversations: how they are written as text, and which of their tokens the loss counts.

    User: What floats?\nAssistant:   Ice floats on water. <end>   User: Why?\nAssistant:   It is lighter. <end>
    read, not learnt                 learnt                       read, not learnt         learnt

The markers are plain text, so that no table of the model grows. A model whose documents were written as
`request<start>answer` has a word for that border already, and its conversations are written that way.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mamba2_min.data.records import START, Turns, turns_of
from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.errors import UserError
from mamba2_min.ops.loss import IGNORE

ROLES = ("system", "user", "assistant")


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
    """The conversation that a record holds, told by its keys (data/records.py), such as

        messages                       a list of {"role", "content"}
        prompt, completion             a request and its answer
        instruction, input, output     a task, what it is about (may be empty), and the answer
        text                           request<start>answer

    Raises UserError, naming `where`, for anything else.
    """
    try:
        turns, shape = turns_of(record)
        if shape == "text":
            turns = _around_the_border(turns[0][1])
        for role, said in turns:
            if role not in ROLES:
                raise ValueError(f"the role {role!r} cannot be learnt; there are {', '.join(ROLES)}")
            if not said:
                raise ValueError(f"what the {role} says is empty")
            _check_text(said)
        _check(turns)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return Conversation(tuple(Message(role, said) for role, said in turns), where)


def _around_the_border(text: str) -> Turns:
    request, border, answer = text.partition(START)
    if not border:
        raise ValueError(f"its text has no {START} between a request and an answer")
    if not request.strip() or not answer.strip():
        raise ValueError(f"its text has nothing before or after {START}")
    return [("user", request.strip()), ("assistant", answer.strip())]


def _check_text(said: str) -> None:
    try:
        said.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is not text") from None


def _check(turns: Turns) -> None:
    """A system message may come first; then user and assistant take turns, and the last word is an answer."""
    roles = [role for role, _ in turns if role != "system"]
    if any(role == "system" for role, _ in turns[1:]):
        raise ValueError("a system message must come first")
    if "assistant" not in roles:
        raise ValueError("it has no answer")
    if roles[0] != "user":
        raise ValueError("it begins with an answer, without a request")
    if any(a == b for a, b in pairwise(roles)):
        raise ValueError("two messages of one side follow each other")
    if roles[-1] != "assistant":
        raise ValueError("it ends with a request, without an answer")


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
