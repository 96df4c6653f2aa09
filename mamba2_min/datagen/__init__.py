"""Training data from a local model: `generate` asks, `Store` saves, and every step between has its own file.

what is asked     words/, lists.py    the lists that prompts are drawn from
                  kinds.py            a kind of documents, and the prompt of attempt i
                  builtin.py          the kinds that come with the program
                  templates.py        the user's own kinds and topics
who is asked      address.py          where a server is; the `ollama` client, which goes there and nowhere else
                  client.py           one server: timeouts, retries, its own words
                  pool.py             several servers in parallel
what is kept      cleaning.py         removes talk about the text, titles and invisible characters
                  thoughts.py         removes a model's thoughts
                  judging.py          whether a text is kept, and if not, why
                  languages.py        whether it is in the language asked for
                  duplicates.py       whether a similar one is there already: MinHash
how it is stored  store.py            the folder, which survives a kill at any moment
                  lines.py            its files, and their lines
                  recovery.py         repairs, or reports, what a kill or an edit left behind
the run           generator.py        the main loop
                  progress.py         the counts so far
                  report.py           the figures at the end
                  arguments.py        the command line
                  screen.py           the output while it runs
"""
