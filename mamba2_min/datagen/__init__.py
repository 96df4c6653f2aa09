"""Training data from a local model: `generate` asks, `Store` keeps, and what comes between has a file each.

what is asked     words/, lists.py    the lists that prompts are drawn from
                  kinds.py            a kind of documents, and the prompt of attempt i
                  builtin.py          the kinds that come with the program
                  templates.py        the user's own kinds and topics
who is asked      address.py          where a server is; the `ollama` client, which goes there and nowhere else
                  client.py           one server: timeouts, retries, its own words
                  pool.py             several servers in parallel
what is kept      cleaning.py         talk, titles and invisible characters go
                  thoughts.py         so do thoughts
                  judging.py          whether a text is kept, and if not, why
                  languages.py        whether it is in the language asked for
                  duplicates.py       whether another like it is there already: MinHash
how it is stored  store.py            the folder, safe to be killed over
                  lines.py            its files, and their lines
                  recovery.py         what a kill or a hand left is put right, or said
the run           generator.py        the loop that puts them together
                  progress.py         how far it has come
                  report.py           the figures at the end
                  arguments.py        the command line
                  screen.py           what is seen
"""
