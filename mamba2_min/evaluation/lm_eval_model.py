"""A Mamba-2 as a model of the lm-evaluation-harness: log-likelihoods through the state, with no window.

A context is read once, in slices, whatever its length; each of its continuations starts from a copy of the state that
it leaves. Two of the harness's habits are kept, so that figures compare with those of `lm_eval --model hf`: a space at
the end of a context belongs to the continuation, and a document begins after the end token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mamba2_min.data.tokenizer import WordTokenizer
from mamba2_min.models.mamba2 import Mamba2LM, State
from mamba2_min.ops.sampling import Sampler

_SLICE = 2048  # tokens of a context that are read at a time
_PART = 256  # tokens of which the logits exist at a time

Request = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation), and the tokens of each


class Mamba2Eval(TemplateLM):
    """What `lm_eval.simple_evaluate(model=...)` takes. `batch_size`: continuations of one context at a time."""

    def __init__(self, model: Mamba2LM, tokenizer: WordTokenizer, batch_size: int = 8, max_gen_toks: int = 256):
        super().__init__()
        self.model, self.words = model.eval(), tokenizer
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self._torch_device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"mamba2_min-{self.words.digest()[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, after the end token of the document before it, unless that is not wanted."""
        ids = self.words.encode(string)
        return ids if add_special_tokens is False else [self.words.eos_id, *ids]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of its continuation, and whether that is what greedy writing gives."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods")
        for context, group in itertools.groupby(order, key=lambda i: requests[i][1]):
            members = list(group)
            first, state = self._read(context or [self.words.eos_id])
            for start in range(0, len(members), self.batch_size):
                part = members[start : start + self.batch_size]
                found = self._continuations(first, state, [requests[i][2] for i in part])
                for i, result in zip(part, found, strict=True):
                    results[i] = result
                bar.update(len(part))
        bar.close()
        return results

    def _read(self, ids: list[int]) -> tuple[Tensor, State]:
        """Reads a context: the log-probabilities (v,) of what follows it, and the state."""
        state: State | None = None
        hidden = torch.empty(0)
        for start in range(0, len(ids), _SLICE):
            part = torch.tensor([ids[start : start + _SLICE]], device=self._torch_device)
            hidden, state = self.model.hidden(part, state)
        assert state is not None
        return self._log_probabilities(hidden[0, -1:])[0], state

    def _continuations(self, first: Tensor, state: State, texts: list[list[int]]) -> list[tuple[float, bool]]:
        """Scores continuations that follow one context, all at once."""
        length = max(len(text) for text in texts)
        ids = torch.zeros(len(texts), length, dtype=torch.long, device=self._torch_device)
        inside = torch.zeros_like(ids, dtype=torch.bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            inside[row, : len(text)] = True
        scores, greedy = torch.zeros(ids.shape, dtype=torch.float64), torch.ones(ids.shape, dtype=torch.bool)
        if length:
            scores[:, 0] = first[ids[:, 0]].double().cpu()
            greedy[:, 0] = (first.argmax() == ids[:, 0]).cpu()
        if length > 1:
            rows = len(texts)
            expanded = State(
                [t.expand(rows, *t.shape[1:]).clone() for t in state.conv],
                [t.expand(rows, *t.shape[1:]).clone() for t in state.ssm],
            )
            for start in range(0, length - 1, _PART):  # the inputs of this part predict the tokens after them
                end = min(start + _PART, length - 1)
                hidden, expanded = self.model.hidden(ids[:, start:end], expanded)
                wanted = ids[:, start + 1 : end + 1]
                logs = self._log_probabilities(hidden)
                scores[:, start + 1 : end + 1] = logs.gather(-1, wanted[..., None])[..., 0].double().cpu()
                greedy[:, start + 1 : end + 1] = (logs.argmax(-1) == wanted).cpu()
        keep = inside.cpu()
        sums, same = (scores * keep).sum(1).tolist(), (greedy | ~keep).all(1).tolist()
        return list(zip(sums, same, strict=True))

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)[..., : self.model.config.vocab_size]
        return F.log_softmax(logits.float(), dim=-1)

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, every token given all before it; the first given the end token."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm, desc="texts"):
            ids = torch.tensor([self.words.eos_id, *self.words.encode(request.args[0])], device=self._torch_device)
            state: State | None = None
            total = 0.0
            for start in range(0, len(ids) - 1, _PART):
                end = min(start + _PART, len(ids) - 1)
                hidden, state = self.model.hidden(ids[None, start:end], state)
                logs = self._log_probabilities(hidden[0])
                total += float(logs.gather(-1, ids[start + 1 : end + 1, None]).double().sum())
            results.append(total)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context until one of the stop texts, which is left out."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm, desc="texts"):
            context, options = request.args
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            sampled = bool(options.get("do_sample")) and options.get("temperature", 1.0) > 0
            sampler = Sampler(
                temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
                top_p=float(options.get("top_p", 1.0)),
                seed=0,
            )
            results.append(self._write(context, int(options.get("max_gen_toks", self.max_gen_toks)), sampler, stops))
        return results

    @torch.inference_mode()
    def _write(self, context: str, limit: int, sampler: Sampler, stops: list[str]) -> str:
        ids = self.tok_encode(context)
        written: list[int] = []
        for token in self._tokens(ids, limit, sampler):
            if token == self.words.eos_id:
                break
            written.append(token)
            text = self.words.decode(written)
            found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
            if found:
                return text[: min(found)]
        return self.words.decode(written)

    def _tokens(self, ids: list[int], limit: int, sampler: Sampler) -> Iterator[int]:
        logits, state = self._read(ids)
        history = list(ids)
        for _ in range(limit):
            token = sampler.pick(logits, history)
            yield token
            history.append(token)
            step, state = self.model.step(torch.tensor([token], device=self._torch_device), state)
            logits = step[0]
