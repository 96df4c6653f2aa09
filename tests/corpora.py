"""Folders of documents as tests want them."""

from mamba2_min.data.documents import Document


def write(folder, files):
    """Writes {relative path: text or bytes} below `folder`, and returns it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts(documents):
    return [document.text for document in documents]


def many(n):
    return [Document(f"Document {i} tells of thing {i * i}.", f"{i}.md#1") for i in range(n)]


def prose(seed, size):
    """About `size` characters in paragraphs of sentences, which are the same for the same seed."""
    import random

    draw = random.Random(seed)
    words = ["the", "a", "old", "young", "owl", "fox", "sea", "house", "letter", "boat", "saw", "found", "lost", "kept"]
    paragraphs = []
    while sum(map(len, paragraphs)) < size:
        sentences = [" ".join(draw.choices(words, k=draw.randint(4, 12))).capitalize() + "." for _ in range(4)]
        paragraphs.append(" ".join(sentences) + f" That was {seed}-{len(paragraphs)}.")
    return "\n\n".join(paragraphs)
