"""The models that are compared, each behind the same few methods.

    name                   what it is
    mamba2_min             this package's Mamba2LM
    transformer            this package's TransformerLM with as many parameters: half the layers, a full SwiGLU
    transformer-deep       the same with as many layers as the Mamba-2 and a narrow SwiGLU
    transformers-mamba2    Mamba2ForCausalLM of the `transformers` package
    mamba_ssm              MambaLMHeadModel of the `mamba_ssm` package, where it can be imported

A name may end in "+compile" (every block by torch.compile), "+recompute" (blocks computed again in the backward pass
instead of kept) and "+graph" (forward and backward pass as one CUDA graph), all for this package's models only, and
mamba2_min in "+int8" or "+bf16" (narrow matrices, mamba2_min/quantize.py; for decoding on a CPU), or in "+bf16state"
(steps on a GPU that keep the state in bf16).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Unavailable
from mamba2_min.config import Mamba2Config
from mamba2_min.inference.quantize import KINDS, quantize
from mamba2_min.models.mamba2 import Mamba2LM
from mamba2_min.models.transformer import KVCache, TransformerConfig, TransformerLM

SMALL = Mamba2Config(vocab_size=13_148, d_model=256, n_layer=4, d_state=64)  # 5 million parameters
BASE = Mamba2Config(vocab_size=50_288, d_model=768, n_layer=24, d_state=128, chunk_size=128)  # 130 million
LARGE = Mamba2Config(vocab_size=50_288, d_model=2048, n_layer=48, d_state=128, chunk_size=128)  # 1.3 billion
TINY = Mamba2Config(vocab_size=499, d_model=64, n_layer=2, d_state=16, headdim=16)  # for --quick

MODELS = {"small": SMALL, "base": BASE, "tiny": TINY}

_HOW = ("compile", "recompute", "bf16state", "graph")
_OWN = ("mamba2_min", "transformer", "transformer-deep")
DEFAULT = ("mamba2_min", "transformer", "transformers-mamba2", "mamba_ssm")


class Own:
    """A model of this package."""

    def __init__(self, model: Mamba2LM | TransformerLM, how: set[str]):
        self.model = model
        self.graph = "graph" in how
        model.recompute = "recompute" in how
        if "compile" in how:
            model.compile_blocks()
        if isinstance(model, Mamba2LM):
            model.compile_steps("compile" in how, torch.bfloat16 if "bf16state" in how else None)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of ids and targets (b, l)."""
        return self.model.loss(ids, targets)

    def prefill(self, prompt: Tensor) -> tuple[Tensor, Any]:
        """Reads (b, l): the last logits (b, vocab_size) and a state."""
        return self.model.prefill(prompt)

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token a row, ids (b,): the next logits (b, vocab_size) and the state, changed in place."""
        return self.model.step(ids, state)

    def rewind(self, state: Any, length: int) -> None:
        """Forgets what came after `length` tokens, where the cost of a step depends on it: in a cache."""
        if isinstance(state, KVCache):
            state.length = length

    def state_bytes(self, state: Any) -> int:
        """Memory that the state takes."""
        return state.nbytes


class TransformersMamba2:
    """Mamba2ForCausalLM as its users call it: logits of all tokens, then cross-entropy."""

    _CHUNK = 64  # its default of 256 is slower and takes more memory at these sizes
    _SLICE = 512  # it forms the (chunk, chunk) matrices of all chunks at once; slices of a prompt bound them

    def __init__(self, config: Mamba2Config):
        try:
            import transformers
        except ImportError:
            raise Unavailable('not installed: pip install "mamba2-min[bench]"') from None
        transformers.logging.set_verbosity_error()  # that its own kernels are missing is known
        sizes = transformers.Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            state_size=config.d_state,
            num_heads=config.nheads,
            head_dim=config.headdim,
            n_groups=config.ngroups,
            conv_kernel=config.d_conv,
            expand=config.expand,
            chunk_size=self._CHUNK,
            tie_word_embeddings=True,
        )
        self.model = transformers.Mamba2ForCausalLM(sizes)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(ids).logits.flatten(0, 1), targets.flatten())

    def prefill(self, prompt: Tensor) -> tuple[Tensor, Any]:
        state = None
        for part in prompt.split(self._SLICE, dim=1):
            out = self.model(part, cache_params=state, use_cache=True, logits_to_keep=1)
            state = out.cache_params
        return out.logits[:, -1], state

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = self.model(ids[:, None], cache_params=state, use_cache=True)
        return out.logits[:, -1], out.cache_params

    def rewind(self, state: Any, length: int) -> None:
        """Nothing to do: its state is of constant size."""

    def state_bytes(self, state: Any) -> int:
        return sum(_tensor_bytes(vars(layer)) for layer in state.layers)


class MambaSsm:
    """The official package: its fused training path where causal_conv1d is there, its CUDA graph for decoding."""

    _LONGEST = 1 << 20  # tokens that its decoding cache is told to expect; a Mamba-2's does not depend on it

    def __init__(self, config: Mamba2Config):
        try:
            from mamba_ssm.models.config_mamba import MambaConfig
            from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
        except Exception as error:  # besides a missing package: a GPU library or a version that it cannot do without
            raise Unavailable(f"cannot be imported here: {str(error).splitlines()[0]}") from None
        try:
            import causal_conv1d  # noqa: F401
        except ImportError:
            fused = False
        else:
            fused = True
        mixer = {
            "layer": "Mamba2",
            "d_state": config.d_state,
            "headdim": config.headdim,
            "ngroups": config.ngroups,
            "expand": config.expand,
            "d_conv": config.d_conv,
            "use_mem_eff_path": fused,
        }
        self.model = MambaLMHeadModel(
            MambaConfig(
                d_model=config.d_model,
                d_intermediate=0,
                n_layer=config.n_layer,
                vocab_size=config.vocab_size,
                ssm_cfg=mixer,
                pad_vocab_size_multiple=1,
            ),
            device="cuda",
        )

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(ids).logits.flatten(0, 1), targets.flatten())

    def prefill(self, prompt: Tensor) -> tuple[Tensor, Any]:
        from mamba_ssm.utils.generation import update_graph_cache

        cache = update_graph_cache(self.model, None, prompt.shape[0], prompt.shape[1], self._LONGEST)
        cache.inference_params.reset(self._LONGEST, prompt.shape[0])
        logits = self.model(prompt, inference_params=cache.inference_params, num_last_tokens=1).logits[:, -1]
        cache.inference_params.seqlen_offset = prompt.shape[1]
        return logits, cache

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        offset = state.inference_params.seqlen_offset
        positions = torch.full((len(ids), 1), offset, dtype=torch.long, device=ids.device)
        logits = state.run(ids[:, None], positions, offset)[:, -1]
        state.inference_params.seqlen_offset += 1
        return logits, state

    def rewind(self, state: Any, length: int) -> None:
        state.inference_params.seqlen_offset = length

    def state_bytes(self, state: Any) -> int:
        return _tensor_bytes(state.inference_params.key_value_memory_dict)


Peer = Own | TransformersMamba2 | MambaSsm


def build(name: str, config: Mamba2Config, device: str, dtype: torch.dtype = torch.float32) -> Peer:
    """The peer of that name and of that Mamba-2's size. Raises Unavailable, or ValueError for an unknown name."""
    base, *suffixes = name.split("+")
    how, kind = set(_HOW).intersection(suffixes), [s for s in suffixes if s in KINDS]
    if unknown := set(suffixes) - how - set(kind):
        raise ValueError(f"unknown suffix +{', +'.join(sorted(unknown))}; there are +{', +'.join([*_HOW, *KINDS])}")
    if ((kind or "bf16state" in how) and base != "mamba2_min") or (how and base not in _OWN):
        raise ValueError(f"{name}: {base} has no such suffix")
    if "graph" in how and device != "cuda":
        raise Unavailable("runs on a GPU only")
    if kind and device != "cpu":
        raise Unavailable("runs on a CPU only")
    if "bf16state" in how and device != "cuda":
        raise Unavailable("runs on a GPU only")
    if base == "mamba2_min":
        peer = Own(Mamba2LM(config, seed=0), how)
    elif base == "transformer":
        peer = Own(TransformerLM(TransformerConfig.matching(config), seed=0), how)
    elif base == "transformer-deep":
        peer = Own(TransformerLM(TransformerConfig.matching(config, config.n_layer), seed=0), how)
    elif base == "transformers-mamba2":
        peer = TransformersMamba2(config)
    elif base == "mamba_ssm":
        if device != "cuda":
            raise Unavailable("runs on a GPU only")
        peer = MambaSsm(config)
    else:
        raise ValueError(f"unknown peer {name}; the names are in benchmarks/peers.py")
    peer.model.to(device=device, dtype=dtype)
    if kind:
        quantize(peer.model, kind[0])
    return peer


def parameters(model: nn.Module) -> int:
    """Numbers that were or could be trained, however wide each is kept."""
    if isinstance(model, Mamba2LM):
        return model.config.num_parameters()
    return sum(p.numel() for p in model.parameters())


def _tensor_bytes(value: Any) -> int:
    """Of all tensors in a nest of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_tensor_bytes, value))
    return 0
