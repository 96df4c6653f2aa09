"""The built-in kinds of documents, and the lists that a user's own kind may use too."""

from __future__ import annotations

from collections.abc import Mapping

from mamba2_min.datagen.kinds import Kind
from mamba2_min.datagen.lists import read_list

_ONLY_TEXT = "Write only the text itself: no title, no heading, no preface and no comment."

# Fields of these names may be used in a user's own template without a list of their own.
SHARED_LISTS: Mapping[str, tuple[str, ...]] = {
    "word": read_list("words"),
    "name": read_list("names"),
    "theme": read_list("themes"),
    "character": read_list("characters"),
    "place": read_list("places"),
    "style": read_list("styles"),
    "opening": read_list("openings"),
    "ending": read_list("endings"),
    "view": read_list("views"),
    "length": read_list("lengths"),
    "subject": read_list("subjects"),
    "audience": read_list("audiences"),
    "tone": read_list("tones"),
}

STORIES = Kind(
    "stories",
    (
        "Write a short story of about {length} words in which these three words occur: {word}, {word_2}, {word_3}. "
        "The main character is {character}, called {name}. It takes place {place}. At its heart: {theme}. "
        "The manner of telling: {style}. {view} {opening} {ending} " + _ONLY_TEXT,
        "A story, please: {character}, by the name of {name}, {place}. What it is really about is {theme}, though it "
        "must not say so. Use the words {word}, {word_2} and {word_3}. Tell it in about {length} words, {style}. "
        "{opening} {ending} " + _ONLY_TEXT,
        "{opening} That is how your story is to start. It happens {place}; {name} is in it, {character}, and so is "
        "another person, called {name_2}. Between them stands this: {theme}. Somewhere the words {word}, {word_2} and "
        "{word_3} are needed. {view} Keep to about {length} words, {style}. " + _ONLY_TEXT,
    ),
    {
        name: SHARED_LISTS[name]
        for name in ("word", "name", "theme", "character", "place", "style", "opening", "ending", "view", "length")
    },
)

EXPLANATIONS = Kind(
    "explanations",
    (
        "Explain {subject}. The reader is {audience}. Explain it {angle}, in about {length} words of plain prose, "
        "correct in every detail. {opening} Do not announce what you are going to do; do it. " + _ONLY_TEXT,
        "In about {length} words, and {angle}, make this clear to {audience}: {subject}. {opening} No lists, no "
        "headings, no summary at the end; say nothing that is not true. " + _ONLY_TEXT,
    ),
    {
        "subject": read_list("subjects"),
        "audience": read_list("audiences"),
        "angle": read_list("angles"),
        "opening": read_list("explanation_openings"),
        "length": read_list("lengths"),
    },
)

DIALOGUES = Kind(
    "dialogues",
    (
        "Write a conversation between {speakers}, {moment}. Their names are {name} and {name_2}. They talk about "
        "{matter}. {turn} {opening} Use the word {word} in passing. Put each speech on a line of its own, as the "
        "name, a colon and what is said, without stage directions; about {length} words in all. " + _ONLY_TEXT,
        "{name} and {name_2} are {speakers}. They talk, {moment}, and it comes to be about {matter}. Write down what "
        "they say and nothing else, in about {length} words. {opening} {turn} Each speech has a line of its own: the "
        "name, a colon, the words. One of them says the word {word}. " + _ONLY_TEXT,
    ),
    {
        "speakers": read_list("speakers"),
        "matter": read_list("matters"),
        "turn": read_list("turns"),
        "opening": read_list("dialogue_openings"),
        "moment": read_list("moments"),
        "name": read_list("names"),
        "word": read_list("words"),
        "length": read_list("lengths"),
    },
)

LETTERS = Kind(
    "letters",
    (
        "Write a letter of about {length} words. It is written by {writer}, who signs as {name}, to {recipient}; it "
        "is written {occasion}. The tone: {tone}. These two things come up in it: {detail}, and the word {word}. "
        "{opening} No placeholders in brackets: invent names, dates and places. " + _ONLY_TEXT,
        "{name}, {writer}, writes to {recipient}, {occasion}. Write that letter, {length} words or so, in a tone that "
        "is {tone}. {opening} Work in {detail} and the word {word}. Invent whatever has to be known; leave no gaps "
        "and no brackets to be filled in. " + _ONLY_TEXT,
        "{name}, {writer}, has to write to {office}, {business}. Write the letter that is sent, of about {length} "
        "words, courteous, {tone}, and exact: with names, dates, places and sums that you invent, and no brackets to "
        "be filled in. Somewhere in it: {detail}, and the word {word}. " + _ONLY_TEXT,
    ),
    {
        "writer": read_list("writers"),
        "recipient": read_list("recipients"),
        "occasion": read_list("occasions"),
        "office": read_list("offices"),
        "business": read_list("business"),
        "tone": read_list("tones"),
        "detail": read_list("details"),
        "opening": read_list("letter_openings"),
        "name": read_list("names"),
        "word": read_list("words"),
        "length": read_list("lengths"),
    },
)

INSTRUCTIONS = Kind(
    "instructions",
    (
        "Write one request that {asker} might send to a helpful expert. The subject is {subject}; what is wanted is "
        "{task}. {manner} The request has to be complete in itself: whatever it refers to is in it. Write only the "
        "request, without quotation marks and without an answer.",
        "Somebody ({asker}) wants {task}; it has to do with {subject}. Put that into words as they would write it to "
        "an expert. {manner} Nothing may be missing that is needed to answer. Write the request alone, without "
        "quotation marks, and do not answer it.",
    ),
    {
        "subject": read_list("instruction_subjects"),
        "task": read_list("tasks"),
        "asker": read_list("askers"),
        "manner": read_list("manners"),
        "length": read_list("lengths"),
    },
    answer="{request}\n\n(Answer at once, without a preface and without repeating the question, in at most {length} "
    "words.)",
    min_words=3,  # "What is seven times eight?" has a good answer of one line
)

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (STORIES, EXPLANATIONS, DIALOGUES, LETTERS, INSTRUCTIONS)}
