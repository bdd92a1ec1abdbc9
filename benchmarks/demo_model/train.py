"""Train the demo model, or go on.    python -m benchmarks.demo_model.train TOKENS OUT

TOKENS is a folder that prepare.py wrote.  OUT gets checkpoint.pt every ten minutes and at the end,
log.jsonl, and, where checkpoint.pt lies there already, the run goes on from it as if it had never
stopped.  SIGTERM writes a checkpoint and ends; SIGKILL costs what came after the last.

Counts in tokens, never in time: a run may be stopped for a night.
"""

import argparse
import dataclasses
import json
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.demo_model.asked import asking_words
from benchmarks.demo_model.documents import (
    MIXTURE,
    Batch,
    Documents,
    Epoch,
    Frame,
    load_documents,
)
from benchmarks.demo_model.heldout import heldout_losses, load_heldout
from benchmarks.demo_model.mixtral import Mixtral
from benchmarks.demo_model.optimizer import Optimizer
from benchmarks.demo_model.schedule import Schedule
from benchmarks.demo_model.shape import Shape

BALANCE, Z = 0.01, 1e-3  # weights of the router's losses
DROPOUT, DROPOUT_FROM_EPOCH = 0.1, 4
CHECKPOINT_S = 600
LOG_STEPS, HELDOUT_STEPS = 10, 250
HELDOUT_TOKENS = 16384  # of each set, for the log


@dataclass(slots=True, kw_only=True)
class Position:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    epoch_tokens: int = 0  # of this epoch, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run's result depends on."""

    tokens: int
    lr: float
    step_tokens: int
    seed: int


class Run:
    """A model on its way, in one of the processes that train it."""

    def __init__(
        self,
        options: Options,
        shape: Shape,
        sets: dict[str, Documents],
        frame: Frame,
        *,
        micro_tokens: int,
        device: str,
    ) -> None:
        self.options, self.sets, self.frame = options, sets, frame
        self.micro_tokens, self.device = micro_tokens, device
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        torch.manual_seed(options.seed)
        self.model = Mixtral(shape).to(device)
        self.optimizer = Optimizer(self.model)
        self.schedule = Schedule(tokens=options.tokens, peak=options.lr)
        self.position = Position()
        self.epoch = self.open_epoch()

    @property
    def done_tokens(self) -> int:
        return self.position.step * self.options.step_tokens

    @property
    def finished(self) -> bool:
        return self.done_tokens >= self.options.tokens

    def open_epoch(self) -> Epoch:
        """The one that the position is in."""
        epoch = Epoch(
            self.sets,
            self.frame,
            context=self.model.shape.context,
            number=self.position.epoch,
            seed=self.options.seed,
        )
        if len(epoch) < self.options.step_tokens:
            raise SystemExit(
                f"an epoch has {len(epoch)} tokens, but a step takes {self.options.step_tokens}. "
                "Give a smaller --step-tokens."
            )
        return epoch

    def next_batches(self) -> list[Batch]:
        """This process's part of a step."""
        size, place = self.options.step_tokens, self.position
        if place.epoch_tokens + size > len(self.epoch):
            place.epoch, place.epoch_tokens = place.epoch + 1, 0
            self.epoch = self.open_epoch()
        mine = size // self.world
        first = place.epoch_tokens + self.rank * mine
        place.epoch_tokens += size
        return self.epoch.batch(first, mine).split(self.micro_tokens)

    def step(self, *, stop: bool = False) -> tuple[float, bool]:
        """Take one.  Returns its loss, nats a token times what each counts, and whether any process
        wants to stop after it.
        """
        batches = self.next_batches()
        rate = self.schedule.rate(self.done_tokens)
        dropout = DROPOUT if self.position.epoch >= DROPOUT_FROM_EPOCH else 0.0
        # Drawn from the step alone: nothing to keep in a checkpoint.
        torch.manual_seed((self.options.seed * 1_000_003 + self.position.step) * 64 + self.rank)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            ids, targets = (self.tensor(x) for x in (batch.ids, batch.targets))
            weights = torch.from_numpy(batch.weights).to(self.device)
            loss = self.model.loss(ids, targets, batch.lengths, weights=weights, dropout=dropout)
            balance, z = self.model.router_losses()
            share = len(ids) * self.world / self.options.step_tokens
            ((loss + BALANCE * balance + Z * z) * share).backward()
            total += loss.detach() * share
        loss, stop = self.exchange(total, stop)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(rate)
        self.position.step += 1
        return loss, stop

    def exchange(self, loss: Tensor, stop: bool) -> tuple[float, bool]:
        """Average gradients and loss over processes; any that stops, stops all."""
        if self.world == 1:
            return loss.item(), stop
        grads = [p.grad for p in self.model.parameters()]
        flat = torch.cat([*(g.view(-1) for g in grads), loss.view(1), loss.new_tensor([stop])])
        dist.all_reduce(flat)
        flat /= self.world
        for g, part in zip(grads, flat.split([g.numel() for g in grads] + [2])[:-1], strict=True):
            g.copy_(part.view_as(g))
        return flat[-2].item(), flat[-1].item() > 0

    def tensor(self, ids) -> Tensor:
        return torch.from_numpy(ids.astype("int64")).to(self.device)

    def save(self, path: Path) -> None:
        """Write a checkpoint: there is always a whole one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": dataclasses.asdict(self.position),
            "options": dataclasses.asdict(self.options),
            "shape": dataclasses.asdict(self.model.shape),
        }
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.  Raises SystemExit for one that counts steps otherwise."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        for name in ("step_tokens", "seed"):
            found, asked = state["options"][name], getattr(self.options, name)
            if found != asked:
                option = f"--{name.replace('_', '-')} {found}"
                raise SystemExit(f"{path}: learnt with {option}, not {asked}. Give that.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        self.epoch = self.open_epoch()


def train(run: Run, out: Path, heldout: dict[str, list[Batch]], *, until: int) -> None:
    """Step until `until` tokens are done or somebody says stop; keep a log and checkpoints."""
    checkpoint, asked = out / "checkpoint.pt", []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    if checkpoint.exists():
        run.load(checkpoint)
    begun, begun_tokens, saved, stop = time.monotonic(), run.done_tokens, time.monotonic(), False
    log = (out / "log.jsonl").open("a") if run.rank == 0 else None
    while not stop and run.done_tokens < until:
        loss, stop = run.step(stop=bool(asked))
        stop = stop or run.done_tokens >= until
        if log is None:
            continue
        if run.position.step % LOG_STEPS == 0 or stop:
            shares = run.model.shares()
            line = {
                "step": run.position.step,
                "tokens": run.done_tokens,
                "epoch": run.position.epoch,
                "loss": round(loss, 4),
                "lr": run.schedule.rate(run.done_tokens - run.options.step_tokens),
                "tokens_per_s": round(
                    (run.done_tokens - begun_tokens) / (time.monotonic() - begun)
                ),
                "expert_shares": [round(shares.min().item(), 3), round(shares.max().item(), 3)],
            }
            if run.position.step % HELDOUT_STEPS == 0 or run.finished:
                line["heldout"] = heldout_losses(run.model, heldout)
            print(json.dumps(line), file=log, flush=True)
        if time.monotonic() - saved > CHECKPOINT_S or stop:
            run.save(checkpoint)
            saved = time.monotonic()


def leave() -> NoReturn:
    """End this process, together with the others and all being written.

    Not through the interpreter's end, where gloo's threads, still there, abort now and then
    ("terminate called without an active exception", torch 2.13).
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def frame_of(tokenizer: Path) -> Frame:
    """Its tokens around a message."""
    encode = Tokenizer.from_file(str(tokenizer)).encode
    user, assistant, newline = (encode(s).ids for s in ("user\n", "assistant\n", "\n"))
    asking = {token for words in asking_words() for token in encode(words).ids}
    return Frame(user=user, assistant=assistant, newline=newline, asking=asking)


def work(rank: int, arguments: argparse.Namespace) -> None:
    """One process."""
    if arguments.processes > 1:
        store = dist.FileStore(str(arguments.out / "processes"), arguments.processes)
        # A run may be stopped as a whole (SIGSTOP) for long while one process waits for another.
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=arguments.processes,
            timeout=timedelta(days=30),
        )
    torch.set_num_threads(arguments.threads)
    shape, frame = Shape(), frame_of(arguments.data / "tokenizer.json")
    sets = {
        name: load_documents(arguments.data / "train" / f"{name}.safetensors") for name in MIXTURE
    }
    heldout = load_heldout(
        arguments.data / "heldout", frame, context=shape.context, at_most=HELDOUT_TOKENS
    )
    options = Options(
        tokens=arguments.tokens,
        lr=arguments.lr,
        step_tokens=arguments.step_tokens,
        seed=arguments.seed,
    )
    run = Run(
        options, shape, sets, frame, micro_tokens=arguments.micro_tokens, device=arguments.device
    )
    train(run, arguments.out, heldout, until=arguments.until or arguments.tokens)
    if arguments.processes > 1:
        leave()


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="TOKENS")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=80_000_000, help="to learn from in all")
    parser.add_argument("--until", type=int, help="stop there, to go on another time")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--step-tokens", type=int, default=16384)
    parser.add_argument("--micro-tokens", type=int, default=2048, help="at once, in a process")
    parser.add_argument("--processes", type=int, default=2, help="on the CPU")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with one process")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        arguments.processes = 1
    # Experts get other numbers of tokens each time, and oneDNN makes code for every shape; with its
    # default of 1024 it makes much of it again.  Read when the first product is computed.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "processes").unlink(missing_ok=True)
    if arguments.processes == 1:
        work(0, arguments)
    else:
        processes = torch.multiprocessing.spawn(work, (arguments,), arguments.processes, join=False)

        def pass_on(*_: object) -> None:
            for pid in processes.pids():
                os.kill(pid, signal.SIGTERM)

        signal.signal(signal.SIGTERM, pass_on)
        while not processes.join():
            pass


if __name__ == "__main__":
    main()
