"""Which form of `Mamba2LM.step` runs: prepared for one text, or recorded as a CUDA graph on a GPU.

Importing this module registers both. They go around the model's modules, so they take a model only while all of its
modules are plain (models/bypass.py); otherwise `step` is the ordinary forward.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor

from mamba2_min.inference.cuda_graph import GraphDecoder, is_recordable
from mamba2_min.inference.decoding import Decoder, takes
from mamba2_min.models.mamba2 import Mamba2LM, State, register_stepper

# A text's decoder is deleted with its state. It is kept outside of the state, so that copies and files stay small.
_decoders: WeakKeyDictionary[State, Decoder | GraphDecoder] = WeakKeyDictionary()


def step(model: Mamba2LM, ids: Tensor, state: State) -> Tensor | None:
    """A `Stepper` (models/mamba2.py): the next logits (b, padded_vocab_size), the state changed in place."""
    decoder = _decoders.get(state)
    if decoder is None or not decoder.fits(model, state):
        _decoders.pop(state, None)
        if not takes(model):
            return None
        recorded = ids.is_cuda and is_recordable(model)
        decoder = GraphDecoder(model, state, *model.compiled_steps) if recorded else Decoder(model, state)
        _decoders[state] = decoder
    logits = decoder(ids)
    state.conv[:] = decoder.conv
    return logits


register_stepper(step)
