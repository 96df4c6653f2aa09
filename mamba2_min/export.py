"""Writes a trained model as a GGUF file, for Ollama and llama.cpp, with the Modelfile that Ollama reads.

python -m mamba2_min.export --model runs/mine --out exported/mine --type q8_0
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba2_min import flags
from mamba2_min.errors import UserError, printable, run_script
from mamba2_min.inference.writing import TEMPERATURE, WRITING

if TYPE_CHECKING:  # importing torch takes seconds: not for --help
    from mamba2_min.data.corpus import Corpus
    from mamba2_min.data.tokenizer import WordTokenizer
    from mamba2_min.finetune.conversations import ChatTemplate
    from mamba2_min.models.mamba2 import Mamba2LM

GGUF, MODELFILE = "model.gguf", "Modelfile"
TYPES = ("f32", "f16", "q8_0")
TEMPLATES = {"text": "{{ .Prompt }}", "request": "{{ .Prompt }}<start>"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--out", type=flags.folder, required=True, metavar="DIR", help=f"folder for {GGUF} and {MODELFILE}"
    )
    parser.add_argument(
        "--type",
        choices=TYPES,
        default="f32",
        help="of the matrices: exact, half or a quarter of the size (%(default)s)",
    )
    parser.add_argument(
        "--template",
        choices=(*TEMPLATES, "chat"),
        help="what Ollama does with a prompt: text continues it; request answers it, for documents of the form "
        "request<start>answer; chat takes turns, for a model fine-tuned on them (chat for such a one, otherwise text)",
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="export also where llama.cpp would cut text into other tokens; prints how many and what it costs",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    export(args.model, args.out, args.type, args.template, args.approximate)


def export(model: str, out: str, kind: str = "f32", template: str | None = None, approximate: bool = False) -> None:
    """Writes `out`/model.gguf and `out`/Modelfile from the run in the folder `model`, and prints what to do next.

    kind: one of TYPES; template: one of TEMPLATES or "chat", by default "chat" for a run that was fine-tuned on turns
    and otherwise "text". With `approximate` also where the tokens of a text would differ.
    Raises UserError where llama.cpp has no such model or tokenizer, and where a file cannot be read or written.
    """
    from mamba2_min.checkpoints import checkpoint, gguf, llama_cpp
    from mamba2_min.data.tokenizer import WordTokenizer
    from mamba2_min.files import is_file, make_folder, write_atomically
    from mamba2_min.finetune.load import saved_template
    from mamba2_min.models.mamba2 import Mamba2LM

    source, folder = Path(model), Path(out)
    if is_file(source / "adapter_config.json"):
        raise UserError(f"{source} is an adapter; first: python -m mamba2_min.merge --adapter {source} --out MERGED")
    network = Mamba2LM.from_pretrained(source)
    tokenizer = WordTokenizer.load(source / checkpoint.TOKENIZER)
    if len(tokenizer) != network.config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the model {network.config.vocab_size}"
        )
    form = saved_template(source)
    template = template or ("chat" if form else "text")
    if template == "chat" and form is None:
        raise UserError(f"{source} was not fine-tuned on turns: its settings have no chat template")
    if template == "request" and "<start>" not in tokenizer.special_words:
        raise UserError("no document of this run has <start>: it has learnt to continue text, not to answer requests")
    llama_cpp.check_supported(network.config)
    jinja, go = chat_templates(form) if form and template == "chat" else ("", TEMPLATES[template])
    metadata = llama_cpp.metadata(network.config, tokenizer, kind, jinja)
    reason = llama_cpp.inexact(tokenizer)
    if reason and not approximate:
        raise UserError(
            f"{reason}; train with --pattern llama3 for an exact export, or add --approximate to see what it costs"
        )
    if reason:
        say("note", f"{reason}: an approximate export")
        say("cost", _cost(source, network, tokenizer))
    make_folder(folder)
    tensors = llama_cpp.tensors(network.config, network.state_dict(), kind)
    gguf.write_gguf(folder / GGUF, metadata, tensors)
    text = modelfile(go)
    write_atomically(folder / MODELFILE, lambda file: file.write(text.encode()))
    size = (folder / GGUF).stat().st_size
    say("written", f"{folder / GGUF}: {size / 1e6:,.1f} MB, {kind}; {folder / MODELFILE}")
    if template == "text" and "<start>" in tokenizer.special_words:
        say("note", "documents of this run have the form request<start>answer; --template request answers prompts")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "mine"  # as Ollama allows
    prompt = "Once upon a time"
    say("next", shlex.join(["ollama", "create", name, "-f", str(folder / MODELFILE)]))
    say("", shlex.join(["ollama", "run", name, prompt]))
    say("or", shlex.join(["llama-completion", "-m", str(folder / GGUF), "-no-cnv", *SAMPLING, "-p", prompt]))
    say("", "(in older builds of llama.cpp that program is llama-cli)")


SAMPLING = ["--temp", str(TEMPERATURE), "--top-k", "0", "--top-p", "1", "--min-p", str(WRITING["min_p"])]


def chat_templates(form: ChatTemplate) -> tuple[str, str]:
    """How turns are written, for programs that have messages: in Jinja for the GGUF file, in Go for the Modelfile.

    A message is trimmed, as fine-tuning reads it: a server's answer begins with the space before its first word, and
    comes back with it in the next turn. Go has no such function; there a space that is there is not written twice.
    """
    from mamba2_min.checkpoints.llama_cpp import END

    jinja, go = "{{ message.content | trim }}", "{{ .Content }}"
    space = form.before_answer
    once = f'{{{{ if ne (printf "%.1s" .Content) "{space}" }}}}{space}{{{{ end }}}}' if space else ""
    return (
        "{% for message in messages %}"
        f"{{% if message.role == 'system' %}}{form.written('system', jinja)}"
        f"{{% elif message.role == 'user' %}}{form.written('user', jinja)}"
        f"{{% else %}}{form.written('assistant', jinja)}{END}{{% endif %}}{{% endfor %}}",
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{form.written("system", go)}'
        f'{{{{ else if eq .Role "user" }}}}{form.written("user", go)}'
        f"{{{{ else }}}}{once}{go}{END}{{{{ end }}}}{{{{ end }}}}",
    )


def modelfile(template: str) -> str:
    """What `ollama create` reads: the file, the form of a prompt, and sampling as in run.py."""
    return f'''FROM ./{GGUF}
TEMPLATE """{template}"""
PARAMETER temperature {TEMPERATURE}
PARAMETER top_k 0
PARAMETER top_p 1
PARAMETER min_p {WRITING["min_p"]}
PARAMETER repeat_penalty 1
# The state has one size, so a long context costs no memory.
PARAMETER num_ctx 1048576
'''


def say(label: str, text: str) -> None:
    print(f"{label:<12}{printable(text)}", flush=True)


def _cost(source: Path, network: Mamba2LM, tokenizer: WordTokenizer) -> str:
    """What splitting the validation text into other tokens changes, in words."""
    from mamba2_min.data.corpus import corpus_of
    from mamba2_min.evaluation.perplexity import evaluate
    from mamba2_min.training.runs import read_plan

    try:
        data = read_plan(source).data
        ours, theirs = (corpus_of(data, cut) for cut in (tokenizer, tokenizer.recut("llama3")))
    except UserError as error:
        return f"not measured: {error}"
    before, after = (
        evaluate(network, corpus.validation, corpus.validation_bytes, tokenizer.eos_id).bits_per_byte
        for corpus in (ours, theirs)
    )
    share = different_share(tokenizer, ours, theirs)
    return f"{share:.1%} of the tokens of the validation text differ; {before:.4f} bits per byte become {after:.4f}"


def different_share(tokenizer: WordTokenizer, ours: Corpus, theirs: Corpus) -> float:
    """The share of the validation tokens of `theirs` that `ours` does not have at the same place of the text."""
    import numpy as np

    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(len(tokenizer))])

    def places(corpus: Corpus) -> Any:  # (l,): one integer for each token and the byte at which it ends
        ids = corpus.validation.numpy()
        return np.cumsum(lengths[ids]) * len(tokenizer) + ids

    return 1 - float(np.isin(places(theirs), places(ours)).mean())


if __name__ == "__main__":
    run_script(main)
