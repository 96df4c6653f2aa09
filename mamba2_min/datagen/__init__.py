"""Training data from a local model: `generate` asks, `Store` keeps, and what comes between has a file each.

lists.py        what prompts are drawn from
kinds.py        kinds of documents and the prompt of attempt i; the user's own templates
asking.py       the Ollama server: timeouts, retries, clear words when it is not there
cleaning.py     thinking, talk and unprintable characters go
judging.py      whether a text is kept, and if not, why
languages.py    whether it is in the language asked for
duplicates.py   whether another like it is there already: MinHash
store.py        the folder and its manifest, safe to be killed over
generator.py    the loop that puts them together
progress.py     how far it has come
report.py       the figures at the end
"""
