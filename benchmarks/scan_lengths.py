"""Three ways to mix a sequence, by its length: the scan, attention, and S4's convolution by FFT.

    mamba2_min   ssd_chunked, the fastest scan for the device                       time linear in the length
    attention    causal scaled_dot_product_attention, on a GPU the flash kernel     quadratic
    fft          y = irfft(rfft(u) rfft(k)), in float32 and with twice the length   l log l
                 so that it does not wrap around: how S4 convolves (arXiv:2111.00396)

All have as many heads and channels. They compute different functions: only attention and the scan choose by the input
what they keep, and the FFT is given its kernel k, which S4 would have to compute first. A crossing point is the length
from which on the scan is the fastest of the two, between the measured lengths on straight lines in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, scan
from benchmarks.beside_transformer import Clock, take_turns
from benchmarks.harness import OURS, Measurement, Options, Unavailable

PEERS = (OURS, "attention", "fft")
_LENGTHS = [512 * 2**i for i in range(9)]  # to 131,072
SETTINGS = {
    "cpu": {s.name: s for s in (scan.Setting(1, l, 8, backward=False) for l in _LENGTHS[:6])},
    "cuda": {
        s.name: s
        for backward in (False, True)
        for s in (scan.Setting(1, l, 24, n=128, q=128, backward=backward) for l in _LENGTHS)
    },
}
QUICK = {s.name: s for s in (scan.Setting(1, l, 2, p=8, n=8, q=32, backward=False) for l in (64, 128))}


@dataclass(frozen=True)
class Crossing:
    """Where the scan overtakes a peer: at `length` tokens; None where it never does. `always`: at all lengths."""

    peer: str
    length: float | None
    always: bool = False

    def __str__(self) -> str:
        if self.always:
            return f"the scan is faster than {self.peer} at every length measured"
        if self.length is None:
            return f"the scan does not overtake {self.peer} up to the longest length measured"
        return f"the scan overtakes {self.peer} at about {float(f'{self.length:.2g}'):,.0f} tokens"


def crossing(peer: str, lengths: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> Crossing:
    """From which length on `ours` stays below `theirs`; the lengths rise."""
    gaps = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    behind = [k for k, gap in enumerate(gaps) if gap >= 0]
    if not behind:
        return Crossing(peer, None, always=True)
    k = behind[-1]
    if k == len(gaps) - 1:
        return Crossing(peer, None)
    share = gaps[k] / (gaps[k] - gaps[k + 1])
    return Crossing(peer, math.exp(math.log(lengths[k]) * (1 - share) + math.log(lengths[k + 1]) * share))


def crossings(results: Sequence[Measurement]) -> list[Crossing]:
    """The crossing point with each peer, from the lengths at which both were measured."""
    found = []
    for peer in [name for name in results[0]["peers"] if name != OURS]:
        both = [r for r in results if all("median" in r["peers"].get(name, {}) for name in (OURS, peer))]
        both.sort(key=lambda r: r["about"]["l"])
        times = [[r["peers"][name]["median"] for r in both] for name in (OURS, peer)]
        if both:
            found.append(crossing(peer, [r["about"]["l"] for r in both], *times))
    return found


def convolve(u: Tensor, k: Tensor) -> Tensor:
    """Causal convolution of u (b, l, h, p) with a kernel (h, p, l) per channel, by FFT in float32: (b, l, h, p)."""
    l = u.shape[1]
    signal = torch.fft.rfft(u.permute(0, 2, 3, 1).float(), n=2 * l)
    return torch.fft.irfft(signal * torch.fft.rfft(k, n=2 * l), n=2 * l)[..., :l].permute(0, 3, 1, 2)


def work_of(name: str, setting: scan.Setting, options: Options) -> Callable[[], None]:
    """A round of a peer: forward, and with `setting.backward` also backward."""
    if name != "fft":
        return scan.run_of(name, setting, options)[0]
    s = setting
    generator = torch.Generator(options.device).manual_seed(0)
    u = torch.randn(s.b, s.l, s.h, s.p, generator=generator, device=options.device, requires_grad=s.backward)
    k = torch.randn(s.h, s.p, s.l, generator=generator, device=options.device, requires_grad=s.backward)

    def run() -> None:
        if s.backward:
            y = convolve(u, k)
            torch.autograd.grad(y, (u, k), torch.ones_like(y))
        else:
            with torch.no_grad():
                convolve(u, k)

    return run


def measure(
    settings: dict[str, scan.Setting], names: Sequence[str], options: Options, seconds: float, folder: Path | None
) -> list[Measurement]:
    """A measurement per length, written to `folder` as soon as it is there.

    A peer's longer lengths are left out once one would take more time than is left.
    """
    clock, results = Clock(seconds), []
    last: dict[tuple[str, bool], tuple[int, float]] = {}
    for name, setting in settings.items():
        entries: dict[str, dict[str, Any]] = {peer: {} for peer in names}
        works: dict[str, Callable[[], None]] = {}
        for peer in names:
            try:
                clock.need(0)
                if before := last.get((peer, setting.backward)):
                    clock.need(2 * before[1] * (setting.l / before[0]) ** 2)  # a warm-up and one round, at most
                works[peer] = harness.in_this_process(work_of, peer, setting, options)
            except Unavailable as reason:
                entries[peer]["skipped"] = str(reason)
        for peer, times in take_turns(works, options, clock).items() if works else ():
            entries[peer] |= harness.timed(times, tokens=setting.b * setting.l)
            last[peer, setting.backward] = setting.l, entries[peer]["median"]
        works.clear()
        result = harness.measurement("scan_lengths", name, asdict(setting), options, entries)
        results.append(result)
        harness.show(result)
        if folder:
            harness.save(result, folder)
    return results


def main() -> None:
    parser = harness.parser("scan_lengths", __doc__, PEERS)
    parser.add_argument("--seconds", type=float, default=60, help="for everything together (default: 60)")
    args = parser.parse_args()
    options = replace(harness.options(args), memory=False)
    options.prepare()
    settings = harness.choose(QUICK if args.quick else SETTINGS[args.device], args)
    results = measure(settings, args.peers, options, args.seconds, None if args.quick else args.out)
    for backward in (False, True):
        series = [r for r in results if r["about"]["backward"] is backward]
        for found in crossings(series) if series else ():
            print(f"{'forward and backward' if backward else 'forward'}: {found}")


if __name__ == "__main__":
    main()
