"""Communication between the learner's ranks: gradients, short texts, and shards of a large base.

One process and several give the same numbers; ``rl_edit/method/update.py`` describes the order in
which gradients are added.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from learner import rendezvous


class Alone:
    """The only rank: it has everything already."""

    rank = 0
    world = 1

    def broadcast(self, value: Tensor, source: int) -> Tensor:
        return value

    def total(self, value: Tensor) -> Tensor:
        return value

    def exchange(self, text: str) -> list[str]:
        return [text]


class Ranks:
    """One rank of several, in torch.distributed.

    Construction waits for all of them.

    Args:
        address: of the place where the ranks meet, which rank 0 has opened.
        device: where this rank's gradients are. It decides between gloo and NCCL.
        timeout_s: longest wait for the other ranks in any call. Past it the call raises.
    """

    def __init__(
        self, rank: int, world: int, address: str, *, device: torch.device, timeout_s: float
    ) -> None:
        self.rank, self.world, self.device = rank, world, device
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=rendezvous.store_at(address, world=world, timeout_s=timeout_s),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )

    def broadcast(self, value: Tensor, source: int) -> Tensor:
        received = value if source == self.rank else torch.empty_like(value)
        dist.broadcast(received, src=source)
        return received

    def total(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def exchange(self, text: str) -> list[str]:
        """Gathers every rank's text, as padded bytes.

        torch's own way to exchange objects unpickles what it receives.
        """
        sent = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)
        # gloo and NCCL gather tensors of one shape only: sizes first, then texts of one length.
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(sent)], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.cat([sent, sent.new_zeros(longest - len(sent))])
        received = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(received, padded)
        return [
            part[: int(size)].cpu().numpy().tobytes().decode()
            for part, size in zip(received, sizes, strict=True)
        ]

    def shard(self, module: nn.Module, *, unsharded: Collection[nn.Parameter]) -> None:
        """Shards a frozen module over the ranks (FSDP2).

        It is sharded block by block. From then on a forward is a collective: every rank must make
        it, each on its own data.

        Args:
            unsharded: parameters that every rank keeps completely.
        """
        # It warns of in-place operations on a block's output. Transformers of diffusers and our
        # editors make none.
        warnings.filterwarnings(
            "ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning
        )
        mesh, ignored = init_device_mesh(self.device.type, (self.world,)), set(unsharded)
        # Blocks before the module: then only one block at a time is gathered in a forward.
        for child in module.children():
            for block in child if isinstance(child, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh, ignored_params=ignored)
        fully_shard(module, mesh=mesh, ignored_params=ignored)
