"""Writing text with a model. Importing this package makes `Mamba2LM.step` fast."""

from mamba2_min.inference import stepping
from mamba2_min.models.mamba2 import register_stepper

register_stepper(stepping.step)
