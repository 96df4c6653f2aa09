"""A conversation at a terminal: turn after turn, the state carried on and nothing read twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba2_min.errors import UserError
from mamba2_min.inference.dialogue import ACTIONS, Dialogue, how_it_ended, reading
from mamba2_min.inference.terminal import remark

if TYPE_CHECKING:
    from mamba2_min.finetune.conversations import ChatTemplate
    from mamba2_min.inference.completer import Completer
    from mamba2_min.ops.sampling import Sampler

COMMANDS = {
    "/reset": "forgets the conversation",
    "/save": "FILE: writes what the model remembers of the conversation",
    "/load": "FILE: goes on from what was saved",
}


class Chat(Dialogue):
    """As `Dialogue`, but a line is a turn of a conversation, and what follows is the answer."""

    actions = ACTIONS | COMMANDS
    greeting = "Ask something, or /help. /reset begins anew. Ctrl-C stops an answer, Ctrl-D leaves."
    any_other_line = "Any other line is a request."

    def __init__(
        self, completer: Completer, sampler: Sampler, max_tokens: int, stop: Sequence[str], template: ChatTemplate
    ):
        super().__init__(completer, sampler, max_tokens, stop)
        self.template = template

    def answer(self, line: str) -> None:
        """Does what one line asks for. Raises UserError, FloatingPointError or KeyboardInterrupt; the state stays."""
        command, _, value = line.strip().partition(" ")
        value = value.strip()
        if command == "/reset":
            self.completer.remember(None)
            remark("forgotten")
        elif command in ("/save", "/load"):
            if not value:
                raise UserError(f"{command} needs the name of a file")
            save(self.completer, value) if command == "/save" else load(self.completer, value)
            remark("saved" if command == "/save" else "loaded: the conversation goes on from there")
        elif command == "/continue" and self.completer.memory and self.completer.stopped_by == "end":
            remark("the answer is complete; ask something else")
        elif line.startswith("/") and "\n" not in line:
            super().answer(line)
        elif line.strip():
            sampler = dataclasses.replace(self.sampler)
            with reading(self.completer):
                pieces = self.reply(line, self.max_tokens, sampler, self.stop)
            self.sampler = sampler
            self._write(pieces)

    def _how_it_ended(self) -> str:
        stats, cut = self.completer.stats, self.completer.stopped_by != "end"
        speed = f"{stats.tokens:,} tokens at {stats.tokens_per_second:,.0f} a second"
        return f"{how_it_ended(self.completer)}; /continue goes on" if cut else speed

    def reply(self, request: str, max_tokens: int, sampler: Sampler, stop: Sequence[str]) -> Iterator[str]:
        """What the model answers to a request, after all that was said before. Raises UserError for an empty one."""
        from mamba2_min.finetune.conversations import prompt_ids

        if not request.strip():
            raise UserError("a chat needs a request")
        try:
            ids = prompt_ids(self.completer.tokenizer, self.template, request.strip())
        except ValueError as error:
            raise UserError(f"the request is not text: {error}") from None
        return self.completer.reply(ids, max_tokens, sampler, stop, drop_space=self.template.before_answer == " ")


def save(completer: Completer, path: str | Path) -> None:
    """Writes the state of a conversation. Raises UserError where there is none, or the file cannot be written."""
    from mamba2_min.checkpoints import checkpoint

    memory = completer.memory
    if memory is None:
        raise UserError("there is no conversation yet")
    state, unread = memory
    values = {
        "conv": [t.cpu() for t in state.conv],
        "ssm": [t.cpu() for t in state.ssm],
        "unread": unread,
        "tokenizer": completer.tokenizer.digest(),
    }
    checkpoint.save_tensors(path, values)


def load(completer: Completer, path: str | Path) -> None:
    """Goes on from what `save` wrote. Raises UserError where the file is damaged or of another model."""
    import torch

    from mamba2_min.checkpoints import checkpoint
    from mamba2_min.models.mamba2 import State

    saved: Any = checkpoint.load_tensors(path)
    empty = completer.model.initial_state(1)
    fine = isinstance(saved, dict) and saved.keys() == {"conv", "ssm", "unread", "tokenizer"}
    for name, tensors in (("conv", empty.conv), ("ssm", empty.ssm)):
        found = saved[name] if fine else None
        fine = (
            fine
            and isinstance(found, list)
            and len(found) == len(tensors)
            and all(
                isinstance(t, torch.Tensor)
                and t.shape == own.shape
                and t.dtype.is_floating_point
                and t.isfinite().all()
                for t, own in zip(found, tensors, strict=True)
            )
        )
    unread = saved["unread"] if fine else None
    if not fine or type(unread) is not int or not 0 <= unread < completer.model.config.vocab_size:
        raise UserError(f"{path} is not a conversation with this model")
    if saved["tokenizer"] != completer.tokenizer.digest():
        raise UserError(f"{path} is a conversation with a model of another vocabulary")
    moved = [[t.to(own) for t, own in zip(saved[name], getattr(empty, name), strict=True)] for name in ("conv", "ssm")]
    completer.remember(State(*moved), unread)
