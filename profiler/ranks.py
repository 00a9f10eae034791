"""Several processes profiling one set of prompts: started by torchrun, talking over gloo."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from flowmm.errors import InputError
from flowmm.profiler.sources import STDIN

# A slow prompt on one rank keeps the others waiting; a dead rank is torchrun's business.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`; a single process is rank 0 of 1 and exchanges nothing."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def takes(self, index: int) -> bool:
        """Whether sample `index` is this rank's: ``index % size == rank``."""
        return index % self.size == self.rank

    def gather(self, text: str) -> list[str]:
        """The `text` of every rank, by rank; all ranks must call it."""
        if self.size == 1:
            return [text]
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(content)]))
        widest = max(int(length) for length in lengths)
        padded = torch.nn.functional.pad(content, (0, widest - len(content)))
        gathered = [torch.empty(widest, dtype=torch.uint8) for _ in range(self.size)]
        distributed.all_gather(gathered, padded)
        pairs = zip(gathered, lengths, strict=True)
        return [bytes(part[: int(length)].numpy()).decode() for part, length in pairs]

    def from_first(self, text: str) -> str:
        """The `text` of rank 0; all ranks must call it, and none sends an empty one."""
        return self.gather(text)[0]


@contextmanager
def joined_ranks() -> Generator[Ranks]:
    """The ranks that torchrun's environment names, connected for the duration of the block."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    joined_here = not distributed.is_initialized()
    if joined_here:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        if joined_here:
            distributed.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this process writes the plan and talks to the user; also before any rank has joined."""
    return os.environ.get("RANK", "0") == "0"


def refuse_shared_stdin(data: Sequence[str]) -> None:
    """Raise InputError if several ranks would read one stdin."""
    if STDIN in data and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--data - : several ranks cannot read one stdin; write the prompts to a file")


def rank_device(device: str) -> str:
    """``auto`` becomes this rank's own GPU where there are several ranks and GPUs; anything else stays."""
    local = os.environ.get("LOCAL_RANK")
    if device != "auto" or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"
