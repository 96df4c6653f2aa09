"""Mamba-2 beside a Transformer of its size: time to the first token, tokens per second, memory, by the prompt's length.

    python -m benchmarks.beside_transformer --device cuda      # 1.1 billion parameters, TinyLlama's published shape
    python -m benchmarks.beside_transformer                    # on a CPU: 4 and 130 million
    python -m benchmarks.scan_lengths                          # the scan alone, beside attention and an FFT

Weights are random: neither speed nor memory depends on them. The peer is `LlamaForCausalLM` of the `transformers`
package, called as its `generate` calls it, with its growing cache; where that package is missing, it is our own
Transformer of the same shape, whose cache is larger where the shape has grouped queries. A round writes the same number
of tokens with each peer in turn, and caches are wound back.

A prompt of more than READ_AT_ONCE tokens in all rows together is read in one row, whose state is then copied to the
others: the time to the first token is that of one row, and is marked so.

--seconds bounds the whole. What is predicted to take longer than what is left is not begun, and a line says so.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, peers
from benchmarks.harness import OURS, MemoryMeter, Options, Unavailable
from mamba2_min import devices
from mamba2_min.config import Mamba2Config
from mamba2_min.inference.decoding import lay_out_columns
from mamba2_min.models.mamba2 import Mamba2LM, State
from mamba2_min.models.transformer import KVCache, TransformerConfig, TransformerLM

LLAMA = "transformers-llama"
READ_AT_ONCE = 400_000

# TinyLlama-1.1B's config.json, and the Mamba-2 that is closest to its 1,100,048,384 parameters.
TINY_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
MAMBA_1B = Mamba2Config(32_000, d_model=2048, n_layer=38, d_state=128, chunk_size=128, tie_embeddings=False)


def llama_like(mamba: Mamba2Config) -> dict[str, Any]:
    """The Llama of the same width and number of parameters, with half the layers, as the Mamba papers match sizes."""
    t = TransformerConfig.matching(mamba)
    return {
        "vocab_size": t.vocab_size,
        "hidden_size": t.d_model,
        "intermediate_size": t.d_ff,
        "num_hidden_layers": t.n_layer,
        "num_attention_heads": t.n_head,
        "num_key_value_heads": t.n_head,
        "tie_word_embeddings": t.tie_embeddings,
    }


@dataclass(frozen=True)
class Setting:
    """Two models of one size, rows, tokens of the prompt, and tokens that a round writes in each row."""

    mamba: Mamba2Config
    llama: dict[str, Any]
    batch: int
    context: int
    tokens: int = 32

    def about(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "context": self.context,
            "tokens": self.tokens,
            "model": self.mamba.to_dict(),
            "llama": self.llama,
        }


def _settings(
    name: str, mamba: Mamba2Config, llama: dict[str, Any], shapes: list[tuple[int, int]], tokens: int
) -> dict[str, Setting]:
    return {f"{name}-b{b}-after{l}": Setting(mamba, llama, b, l, tokens) for b, l in shapes}


_GPU = [(1, 1000), (32, 1000), (1, 10_000), (32, 10_000), (1, 100_000), (32, 100_000)]
SETTINGS = {
    "cuda": _settings("1.1b", MAMBA_1B, TINY_LLAMA, _GPU, 32),
    "cpu": {
        **_settings("4m", peers.SMALL, llama_like(peers.SMALL), [(1, 1000), (32, 1000), (1, 10_000)], 16),
        **_settings("130m", peers.BASE, llama_like(peers.BASE), [(1, 1000)], 8),
    },
}
QUICK = _settings("tiny", peers.TINY, llama_like(peers.TINY), [(1, 10), (2, 300)], 4)


class Llama:
    """LlamaForCausalLM behind the methods of benchmarks/peers.py, as its `generate` calls it."""

    def __init__(self, shape: dict[str, Any], device: str, dtype: torch.dtype):
        try:
            import transformers
        except ImportError:
            raise Unavailable('transformers is not installed: pip install "mamba2-min[bench]"') from None
        config = transformers.LlamaConfig(**shape, max_position_embeddings=1 << 18, attn_implementation="sdpa")
        with torch.device(device):
            self.model = transformers.LlamaForCausalLM(config).to(dtype).eval()

    def prefill(self, prompt: Tensor) -> tuple[Tensor, Any]:
        out = self.model(prompt, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = self.model(ids[:, None], past_key_values=state, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def rewind(self, state: Any, length: int) -> None:
        if written := state.get_seq_length() - length:
            state.crop(-written)

    def state_bytes(self, state: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in state.layers)


def build(name: str, setting: Setting, options: Options) -> Any:
    """The peer of that name, with random weights in the dtype of decoding."""
    device, dtype = options.device, options.weight_dtype
    if name == LLAMA:
        return Llama(setting.llama, device, dtype)
    if name == "transformer":
        s = setting.llama
        config = TransformerConfig(
            s["vocab_size"],
            s["hidden_size"],
            s["num_hidden_layers"],
            s["hidden_size"] // s["num_attention_heads"],
            s["intermediate_size"],
            tie_embeddings=s["tie_word_embeddings"],
        )
        model: nn.Module = with_copied_layers(TransformerLM, config, device, dtype)
    elif name == OURS:
        model = with_copied_layers(Mamba2LM, setting.mamba, device, dtype)
        if device == "cpu":
            lay_out_columns(model)  # as run.py has it
    else:
        raise ValueError(f"unknown peer {name}; there are {OURS}, {LLAMA}, transformer")
    return peers.Own(model.eval(), set())


def with_copied_layers(kind: type, config: Any, device: str, dtype: torch.dtype) -> Any:
    """A model whose layers all hold the first one's weights: drawing a billion numbers takes longer than the rest."""
    first = kind(replace(config, n_layer=1), seed=0).to(dtype).state_dict()
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = "0"
        tensor.copy_(first[".".join(parts)])
    return model


def copied_to_rows(state: Any, rows: int) -> Any:
    """A state of one row, copied to `rows` rows."""
    if isinstance(state, State):
        return State(*([t.repeat(rows, *[1] * (t.dim() - 1)) for t in part] for part in (state.conv, state.ssm)))
    if isinstance(state, KVCache):
        many = [[t.repeat(rows, 1, 1, 1) for t in part] for part in (state.keys, state.values)]
        return KVCache(many[0], many[1], state.length)
    state.batch_repeat_interleave(rows)
    return state


class Clock:
    """What is left of a number of seconds."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raises Unavailable where `seconds` are more than what is left."""
        if seconds > self.left:
            raise Unavailable(
                f"left out: about {seconds:,.0f} s were needed and {max(0.0, self.left):,.0f} s were left"
            )


class Reader:
    """Reads prompts of growing length with one peer, and predicts what the next will take."""

    def __init__(self, peer: Any, name: str, options: Options):
        self.peer, self._options = peer, options
        self._attends = name != OURS
        self._last: tuple[int, int, float] | None = None  # rows, tokens, seconds

    @torch.inference_mode()
    def read(self, setting: Setting, clock: Clock) -> tuple[Callable[[], None], dict[str, Any]]:
        """A round's writing after the prompt, and what is known of the prompt. Raises Unavailable."""
        rows = setting.batch if setting.batch * setting.context <= READ_AT_ONCE else 1
        if self._last:
            before, tokens, seconds = self._last
            clock.need(seconds * rows / before * self._operations(setting.context) / self._operations(tokens))
        prompt = torch.randint(setting.mamba.vocab_size, (rows, setting.context), device=self._options.device)
        began = self._now()
        self.peer.prefill(prompt)  # loads and compiles what has to be
        clock.need(self._now() - began)
        meter = MemoryMeter(self._options.device)
        meter.start()
        times: list[float] = []
        while not times or (len(times) < 3 and times[-1] < min(1.0, clock.left / 20)):
            state = logits = None  # the last one's memory
            started = self._now()
            logits, state = self.peer.prefill(prompt)
            first = logits.argmax(-1)
            times.append(self._now() - started)
        seconds = statistics.median(times)
        self._last = rows, setting.context, seconds
        if rows < setting.batch:
            state, first = copied_to_rows(state, setting.batch), first.repeat(setting.batch)
        state_bytes = self.peer.state_bytes(state)  # before room is made for more
        _, state = self.peer.step(first, state)
        facts = {
            "first_token_seconds": seconds,
            "first_token_rows": rows,
            "state_bytes": state_bytes,
            "peak_bytes": meter.peak(),
            "parameters": sum(p.numel() for p in self.peer.model.parameters()),
        }
        return self._writer(setting, state, first), facts

    def _operations(self, tokens: int) -> float:
        """Of a prompt: two per parameter and token, and those of attention over half of a square."""
        config = self.peer.model.config
        layers, width = (getattr(config, name, 0) for name in ("num_hidden_layers", "hidden_size"))
        if not layers:
            layers, width = config.n_layer, config.d_model
        parameters = sum(p.numel() for p in self.peer.model.parameters())
        return 2.0 * parameters * tokens + self._attends * 2.0 * tokens**2 * layers * width

    def _writer(self, setting: Setting, state: Any, first: Tensor) -> Callable[[], None]:
        @torch.inference_mode()
        def write() -> None:
            nonlocal state
            self.peer.rewind(state, setting.context)
            ids = first
            for _ in range(setting.tokens):
                logits, state = self.peer.step(ids, state)
                ids = logits.argmax(-1)

        return write

    def _now(self) -> float:
        self._options.synchronize()
        return time.perf_counter()


def take_turns(works: dict[str, Callable[[], None]], options: Options, clock: Clock) -> dict[str, list[float]]:
    """As `harness.take_turns`, but no round is begun that would not end in time."""
    first = harness.take_turns(works, replace(options, rounds=1, warmup=1))
    longest = sum(seconds[0] for seconds in first.values())
    rounds = max(0, min(options.rounds - 1, int(clock.left / max(longest, 1e-9))))
    more = harness.take_turns(works, replace(options, rounds=rounds, warmup=0)) if rounds else {}
    return {name: first[name] + more.get(name, []) for name in works}


def measure(
    settings: dict[str, Setting], names: list[str], options: Options, seconds: float
) -> Iterator[dict[str, Any]]:
    """A measurement per setting, as soon as it is there. All settings of one shape share their models, and what is left
    of the time is shared among the settings that are left."""
    whole = Clock(seconds)
    readers: dict[tuple[str, Mamba2Config], Reader | str] = {}
    for k, (name, setting) in enumerate(settings.items()):
        clock = Clock(whole.left / (len(settings) - k))
        entries: dict[str, dict[str, Any]] = {peer: {} for peer in names}
        works = {}
        for peer in names:
            with _noting(entries[peer]):
                reader = readers.get((peer, setting.mamba)) or _reader(peer, setting, options, clock)
                readers[peer, setting.mamba] = reader
                if isinstance(reader, str):
                    raise Unavailable(reader)
                works[peer], facts = reader.read(setting, clock)
                entries[peer] |= facts
        failure: dict[str, Any] = {}
        with _noting(failure):
            for peer, times in take_turns(works, options, clock).items():
                entries[peer] |= harness.timed(times, things=setting.tokens, tokens=setting.batch)
        for peer in works:
            entries[peer] |= failure
        works.clear()
        harness.forget(options)
        yield harness.measurement("beside_transformer", name, setting.about(), options, entries)


@contextmanager
def _noting(entry: dict[str, Any]) -> Iterator[None]:
    """Puts what goes wrong with one peer into its entry, whatever it is: the others are still worth the time."""
    try:
        yield
    except Unavailable as reason:
        entry["skipped"] = str(reason)
    except Exception as error:
        if devices.is_out_of_memory(error):
            entry["skipped"] = "out of memory"
        else:
            traceback.print_exc()
            entry["skipped"] = f"failed: {type(error).__name__}: {str(error)[:200]}"


def _reader(name: str, setting: Setting, options: Options, clock: Clock) -> Reader | str:
    """The peer, ready to read; or why it cannot be built."""
    try:
        clock.need(0)
        return Reader(build(name, setting, options), name, options)
    except Unavailable as reason:
        return str(reason)


def show(result: dict[str, Any]) -> None:
    about = result["about"]
    print(f"\n{result['setting']}  {about['device']} {about['precision']}")
    print(f"  {'':20} {'first token':>13} {'tokens/s':>10} {'x':>6} {'state MB':>9} {'peak MB':>8}")
    ours = result["peers"].get(OURS, {}).get("tokens_per_second")
    for name, peer in result["peers"].items():
        if "tokens_per_second" not in peer:
            print(f"  {name:20} {peer.get('skipped', '')}")
            continue
        first = f"{1e3 * peer['first_token_seconds']:,.0f} ms" + "*" * (peer["first_token_rows"] < about["batch"])
        times = f"{ours / peer['tokens_per_second']:.2f}" if ours else ""
        print(
            f"  {name:20} {first:>13} {peer['tokens_per_second']:10,.0f} {times:>6} {peer['state_bytes'] / 1e6:9,.1f} "
            f"{peer['peak_bytes'] / 1e6:8,.0f}"
        )


def main() -> None:
    parser = harness.parser("beside_transformer", __doc__, (OURS, LLAMA))
    parser.add_argument("--seconds", type=float, default=170, help="for everything together (default: 170)")
    args = parser.parse_args()
    options = harness.options(args)
    options.prepare()
    names = list(args.peers)
    if LLAMA in names and not _has_transformers():
        print("transformers is not installed; the peer is our own Transformer of the same shape")
        names[names.index(LLAMA)] = "transformer"
    settings = harness.choose(QUICK if args.quick else SETTINGS[args.device], args)
    for result in measure(settings, names, options, args.seconds):
        show(result)
        if not args.quick:
            harness.save(result, args.out)


def _has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
