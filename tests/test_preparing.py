"""Documents as new users have them, through train.py: three corpora of their own, and what it says about the rest."""

import base64
import json
import os
import random

import pytest
from corpora import prose, write
from small_runs import Training

from mamba2_min.checkpoints import checkpoint
from mamba2_min.data.corpus import load_corpus
from mamba2_min.data.tokenizer import WordTokenizer

LICENCE = "This book is for the use of anyone anywhere, at no cost and with almost no restrictions."
SMALL = ("--d-model", 16, "--n-layer", 1, "--d-state", 4, "--headdim", 8, "--context", 16, "--max-steps", 1)


def books(folder):
    """A shelf: files of Windows, with a mark, CRLF, curly quotes, form feeds, and a licence in each."""
    for i in range(4):
        chapters = f"\n\n{LICENCE}\n\n\f".join(prose(f"book {i}.{k}", 20_000) for k in range(2))
        text = f"{LICENCE}\n\n“It’s mine,” she said.\n\n{chapters}".replace("\n", "\r\n")
        write(folder, {f"Book {i}.txt": b"\xef\xbb\xbf" + text.encode()})
    return folder


def vault(folder):
    """Notes of Obsidian: front matter, links, code, pictures in files and in the text, templates, hidden folders."""
    picture = base64.b64encode(random.Random(0).randbytes(100_000)).decode()
    for i in range(25):
        text = f"{prose(f'note {i}', 600)}\n\n[[Note {i + 1}]] ![[picture.png]]"
        body = f"# Note {i}\n\n{text}\n\n```python\nprint({i})\n```\n"
        write(folder, {f"notes/Note {i}.md": f"---\ntags: [a, b]\naliases:\n  - n{i}\n---\n{body}"})
    return write(
        folder,
        {
            "pasted.md": f"# A picture\n\n![cat](data:image/png;base64,{picture})\n\nThat was it.\n",
            "templates/daily.md": "---\ndate: <% tp.date.now() %>\n---\n# {{title}}\n",
            "empty.md": "---\ntags: []\n---\n",
            "picture.png": b"\x89PNG" + b"\0" * 1000,
            "board.canvas": "{}",
            "saved.html": "<html><body>text",
            ".obsidian/app.json": "{}",
            ".trash/old.md": "thrown away",
        },
    )


def chats(folder):
    """An export of conversations, one a line, with a few lines that are none."""
    draw, lines = random.Random(0), []
    for i in range(60):
        said = [{"role": "system", "content": "You are a helpful assistant, and you answer in few words."}]
        for k in range(draw.randint(1, 3)):
            said += [{"role": "user", "content": f"What about the owl {i}.{k}?"}]
            said += [{"role": "assistant", "content": prose(f"{i}.{k}", 80)}]
        lines.append(json.dumps({"id": i, "messages": said}))
    lines[7:7] = ['{"id": 7, "messages": [', '{"id": 8, "title": "no messages"}']
    return write(folder, {"chat.jsonl": "\n".join(lines)})


def text_of(corpus):
    return corpus.tokenizer.decode(corpus.train.tolist() + corpus.validation.tolist())


def share(corpus):
    return corpus.validation_bytes / (corpus.train_bytes + corpus.validation_bytes)


class TestThreeCorpora:
    def test_books(self, tmp_path):
        corpus = load_corpus(books(tmp_path))
        text = text_of(corpus)
        assert not set("\ufeff\r\f") & set(text) and "“It’s mine,” she said." in text
        assert 0.05 <= share(corpus) <= 0.2
        (note,) = [note for note in corpus.notes if "--drop-repeats" in note]
        assert note.startswith("1 paragraph in 3 or more documents") and note.endswith("leaves them out")
        assert LICENCE not in text_of(load_corpus(tmp_path, drop_repeats=True))

    def test_a_vault(self, tmp_path):
        corpus = load_corpus(vault(tmp_path))
        text, told = text_of(corpus), "; ".join(corpus.notes)
        assert "tags:" not in text and "aliases" not in text and "base64" not in text and "thrown away" not in text
        assert "print(7)" in text and "[[Note 8]]" in text and "That was it." in text and "{{title}}" in text
        assert len(corpus.train) + len(corpus.validation) < 20_000  # the picture alone would be 130,000
        for part in (
            "1 .canvas file not read: board.canvas (docs/preparing_documents.md)",
            "1 .html file not read: saved.html",
            "1 .png file not read: picture.png",
            "1 file without text skipped",
            "front matter left out of 27 files",
            "1 picture or other data in base64 left out, 133,",
        ):
            assert part in told

    def test_a_chat_export(self, tmp_path):
        folder = chats(tmp_path)
        corpus = load_corpus(folder)
        text = text_of(corpus)
        assert corpus.tokenizer.special_words == ("<start>",)
        assert corpus.documents == 60 and '"role"' not in text and "{" not in text
        assert "few words.\n\nWhat about the owl 3.0?<start>" in text and text.count("<start>") > 60
        assert load_corpus(folder / "chat.jsonl").digest == corpus.digest
        told = "; ".join(corpus.notes)
        assert "60 records of 1 file read as documents: 60 by messages" in told
        assert "2 records of 1 file skipped: " in told and "chat.jsonl, line 8: not JSON" in told
        assert "chat.jsonl, line 9: it needs text, messages" in told and "it has id, title" in told


class TestCommand:
    def train(self, tmp_path, *arguments, status=0):
        training = Training("--out", tmp_path / "run", *SMALL, *arguments, said=tmp_path / "said")
        assert training.wait() == status, training.text()
        assert "Traceback" not in training.text()
        return training.text()

    def test_a_file_of_chats(self, tmp_path):
        said = self.train(tmp_path, "--data", chats(tmp_path) / "chat.jsonl")
        assert "% of the bytes are outside the vocabulary, most of all in chat.jsonl" in said
        assert "chat.jsonl, line 8: not JSON" in said
        words = WordTokenizer.load(tmp_path / "run" / checkpoint.TOKENIZER).words
        assert " owl" in words and not any("role" in word or "{" in word for word in words)
        resumed = self.train(tmp_path, "--resume", "--max-steps", 2, "--accept", "max-steps")
        assert "from step 1" in resumed

    def test_windows_files_a_part_of_them_without_repeats(self, tmp_path):
        folder = write(
            tmp_path / "data", {f"{i}.txt": f"{LICENCE}\n\nCafé {prose(i, 900)}".encode("cp1252") for i in range(30)}
        )
        said = self.train(tmp_path, "--data", folder, status=2)
        assert len(said.splitlines()) == 1 and all(f" {i}.txt" in said for i in range(30))
        assert "--encoding cp1252" in said and "docs/preparing_documents.md" in said
        flags = ("--encoding", "cp1252", "--max-documents-bytes", 9000, "--drop-repeats")
        said = self.train(tmp_path, "--data", folder, *flags)
        assert "a part of the documents: 9,000 of " in said and "documents each" in said and "left out" in said
        saved = json.loads((tmp_path / "run" / "settings.json").read_text())["data"]
        assert (saved["encoding"], saved["max_documents_bytes"], saved["drop_repeats"]) == ("cp1252", 9000, True)
        assert "from step 1" in self.train(tmp_path, "--resume", "--max-steps", 2, "--accept", "max-steps")

    @pytest.mark.parametrize("kind", ["pipe", "page.html", "pictures", "encoding", "loop", "long"])
    def test_what_is_no_document_is_one_line(self, tmp_path, kind):
        path, flags = tmp_path / kind, ()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "page.html":
            write(tmp_path, {kind: "<html>"})
        elif kind == "pictures":
            write(path, {f"{i}.png": b"\x89PNG" for i in range(3)})
        elif kind == "encoding":
            write(path, {"a.md": "text"})
            flags = ("--encoding", "utf-99")
        elif kind == "loop":
            path.symlink_to(path)
        else:
            path = tmp_path / ("x" * 300)
        said = self.train(tmp_path, "--data", path, *flags, status=2)
        assert len(said.splitlines()) == 1 and said.startswith("error: ")
