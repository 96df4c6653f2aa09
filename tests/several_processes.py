"""Several processes of train.py, as torchrun starts them."""

import socket
import time

from small_runs import Training

from mamba2_min.training.metrics import read_metrics

SHAPE = "--d-model 16 --n-layer 1 --d-state 4 --headdim 8 --chunk-size 8 --dropout 0.1 --min-count 1"
STEPS = "--context 16 --batch-size 8 --micro-batch 2 --eval-every 4 --save-every 3 --log-every 2"
FLAGS = [*SHAPE.split(), *STEPS.split(), "--ema-decay", "0.9", "--carry-state"]


class Processes:
    """`count` processes of train.py, as torchrun starts them; what each says is in a file."""

    def __init__(self, count, data, out, *more, max_steps=12, limits=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out.parent.mkdir(exist_ok=True, parents=True)
        self.out, self.all = out, []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = ("--data", data, "--out", out, "--max-steps", max_steps, *FLAGS, *more)
            environment = {name: str(value) for name, value in place.items()} if count > 1 else {}
            said = out.parent / f"{out.name}.{rank}.txt"
            self.all.append(Training(*arguments, said=said, environment=environment, limits=limits))

    def wait(self, timeout=120):
        return [process.wait(timeout) for process in self.all]

    def after(self, step):
        """Returns when the run's metrics.jsonl has reached a step."""
        while not any(r["step"] >= step for r in read_metrics(self.out / "metrics.jsonl")):
            assert self.all[0].process.is_alive(), self.all[0].text()
            time.sleep(0.01)
