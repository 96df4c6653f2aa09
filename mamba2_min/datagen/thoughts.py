"""Thoughts that a model writes into its answer, in the marks of the many families of models that think aloud.

    in tags       <think>…</think>, thinking, thought, reasoning and more words; with a prefix, as <seed:think>; as
                  <|…|>, as [THINK]…[/THINK], as ◁think▷…◁/think▷; in pairs as <|begin_of_thought|>…<|end_of_thought|>,
                  <|START_THINKING|>…<|END_THINKING|> and <unused94>…<unused95>
    in channels   <|channel|>analysis<|message|>…<|end|>…<|channel|>final<|message|>, <|channel>thought…<channel|>,
                  and analysis…assistantfinal, where the server drops the marks
    in words      Here is my thought process: … Here is my response:

A thought without an end leaves no answer: a text that begins with one is empty, and a mark that is left in the middle
of a text (`THOUGHT_MARK`) is a reason not to keep it.
"""

from __future__ import annotations

import re

_WORD = (
    r"(?:[\w-]{1,20}[:_]|ant)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|scratch_?pad"
    r"|(?:inner|internal)_monologue|analysis|cot(?:_[a-z_]{1,20})?)(?:_(?:content|process|steps?))?"
)
# (opening, closing) of each form; a closing ends whatever opening of its form comes before it.
_FORMS = (
    (rf"<\s?{_WORD}\s?>", rf"<\s?/\s?{_WORD}\s?>"),
    (rf"<[|｜]{_WORD}[|｜]>", rf"<[|｜]/{_WORD}[|｜]>|<[|｜]end_?of_?{_WORD}[|｜]>"),
    (rf"<[|｜](?:begin|start)(?:_?of)?_?{_WORD}[|｜]>", rf"<[|｜]end(?:_?of)?_?{_WORD}[|｜]>"),
    (r"◁\s?think(?:ing)?\s?▷", r"◁\s?/\s?think(?:ing)?\s?▷"),
    (r"(?-i:\[(?:THINK(?:ING)?|THOUGHTS?|REASON(?:ING)?)\])", r"(?-i:\[/(?:THINK(?:ING)?|THOUGHTS?|REASON(?:ING)?)\])"),
    (r"<unused94>", r"<unused95>"),
)
_THOUGHTS = re.compile(
    "|".join(f"(?:{opening})(?:(?!{opening}).)*?(?:{closing})" for opening, closing in _FORMS),
    re.DOTALL | re.IGNORECASE,
)
_OPENING = re.compile(rf"\s*(?:{'|'.join(opening for opening, _ in _FORMS)})", re.IGNORECASE)
_CLOSING = re.compile("|".join(closing for _, closing in _FORMS), re.IGNORECASE)

_CHANNEL = re.compile(r"<\|channel\|?>|<channel\|>", re.IGNORECASE)
_NAMED_CHANNEL = re.compile(
    r"\s*(analysis|commentary|thoughts?|thinking|reasoning|final)\b(?:\s*<\|message\|>)?", re.IGNORECASE
)
# Thoughts and answer told apart by words alone: channels without their special tokens, and a model that says so.
_SPOKEN = re.compile(
    r"\Aanalysis(?=[A-Z])(?:.*?assistantfinal|.*)"
    r"|\A\s*(?i:here(?: is|['’]s) my (?:thought process|thinking|reasoning)\b"
    r"(?:.*?\bhere(?: is|['’]s) my (?:final )?(?:response|answer)\s*:?|.*))",
    re.DOTALL,
)

THOUGHT_MARK = re.compile(
    "|".join([*(f"{opening}|{closing}" for opening, closing in _FORMS), _CHANNEL.pattern]), re.IGNORECASE
)


def without_thoughts(text: str) -> str:
    """`text` without the thoughts in it; "" where it is nothing but a thought, such as one without an end."""
    text = _final_channel(_SPOKEN.sub("", text))
    text = _THOUGHTS.sub("", text)
    # Some templates open the thought themselves, so that only its end is sent.
    closings = list(_CLOSING.finditer(text))
    if closings:
        text = text[closings[-1].end() :]
    return "" if _OPENING.match(text) else text


def _final_channel(text: str) -> str:
    """What an answer in channels says outside of those for thoughts; "" where a thought is the last."""
    first, *channels = _CHANNEL.split(text)
    if not channels:
        return text
    kept = [] if re.fullmatch(r"\s*(?:<\|start\|>)?\s*assistant\s*", first, re.IGNORECASE) else [first]
    for number, channel in enumerate(channels, 1):
        named = _NAMED_CHANNEL.match(channel)
        if named and named[1].lower() != "final":
            if number == len(channels):
                return ""
            continue
        kept.append(channel[named.end() :] if named else channel)
    return "".join(kept)
