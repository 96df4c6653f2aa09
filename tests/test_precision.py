"""Which precision `auto` is: what the hardware multiplies, not what PyTorch can emulate."""

import pytest
import torch

from mamba2_min import devices
from mamba2_min.errors import UserError


@pytest.mark.parametrize(("emulated", "hardware", "expected"), [(1, 0, "float32"), (1, 1, "bf16"), (0, 0, "float32")])
def test_auto_is_bf16_where_a_gpu_multiplies_it(monkeypatch, emulated, hardware, expected):
    """A T4 (compute capability 7.5) emulates bf16: PyTorch says that it is supported unless asked otherwise."""

    def supported(including_emulation=True):
        return bool(emulated if including_emulation else hardware)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert devices.pick_precision("auto", torch.device("cuda")) == expected
    assert devices.pick_precision("bf16", torch.device("cuda")) == "bf16"  # who asks for it by name gets it


@pytest.mark.parametrize("amx", [False, True])
def test_auto_is_bf16_where_a_cpu_multiplies_it(monkeypatch, amx):
    monkeypatch.setattr(devices, "has_amx", lambda: amx)
    assert devices.pick_precision("auto", torch.device("cpu")) == ("bf16" if amx else "float32")
    assert devices.pick_precision("auto", torch.device("mps")) == "float32"
    with pytest.raises(UserError, match="unknown precision 'int4'"):
        devices.pick_precision("int4", torch.device("cpu"))
