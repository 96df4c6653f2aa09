"""The pictures of notebooks 3 and 3b: the block, and what runs on its wires."""

from itertools import pairwise

from mamba2_min import plots
from mamba2_min.plots import plt


def draw_block(c):
    """One block of a model with config `c`: its parts, its wires, and how many channels each has."""
    _, ax = plt.subplots(figsize=(9.5, 3.6))
    ax.set(xlim=(0, 100), ylim=(4, 47))
    ax.axis("off")

    def box(x, y, width, text, colour):
        ax.add_patch(plt.Rectangle((x, y - 3), width, 6, facecolor=colour, alpha=0.25, edgecolor=colour))
        ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5)

    def wire(*points, text="", at=0):
        style = {"color": plots.INK, "shrinkA": 0, "shrinkB": 0, "linewidth": 1}
        for (x0, y0), (x1, y1) in pairwise(points):
            last = (x1, y1) == points[-1]
            ax.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->" if last else "-", **style})
        (x0, y0), (x1, y1) = points[at], points[at + 1]
        ax.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.6, text, ha="center", va="bottom", fontsize=8)

    box(4, 20, 9, "norm", plots.GREY)
    box(17, 20, 9, "in_proj", plots.BLUE)
    box(43, 26, 11, f"conv, {c.d_conv} taps\nSiLU", plots.BLUE)
    box(43, 10, 11, "+ dt_bias\nsoftplus", plots.ORANGE)
    box(61.5, 20, 13.5, "SSD\nA = −exp(A_log)", plots.GREEN)
    box(78, 28, 9, "× SiLU(z)\nnorm", plots.BLUE)
    box(90, 28, 8, "out_proj", plots.BLUE)
    wire((0, 42), (99, 42), text="the residual stream (b, l, d_model)")
    wire((2, 42), (2, 20), (4, 20))
    wire((13, 20), (17, 20))
    wire((26, 20), (30, 20), (30, 34), (82.5, 34), (82.5, 31), text=f"z ({c.d_inner}): the gate", at=2)
    wire((26, 20), (30, 20), (30, 26), (43, 26), text=f"x | B | C\n({c.d_inner} + 2 · {c.ngroups * c.d_state})", at=2)
    wire((26, 20), (30, 20), (30, 10), (43, 10), text=f"dt ({c.nheads})", at=2)
    wire((54, 27.5), (60, 27.5), (60, 21.5), (61.5, 21.5))
    ax.text(60.6, 24.6, "x, B, C", fontsize=8, va="center")
    wire((54, 10), (60, 10), (60, 18.5), (61.5, 18.5), text="dt > 0")
    wire((57, 27.5), (57, 30.5), (76.5, 30.5), (76.5, 28.6), (78, 28.6), text="D · x, the skip", at=1)
    wire((75, 20), (76.5, 20), (76.5, 27.4), (78, 27.4))
    ax.text(77.2, 21.5, "y", fontsize=8)
    wire((87, 28), (90, 28))
    wire((94, 31), (94, 42))
    ax.text(95, 36, "add", fontsize=8)
