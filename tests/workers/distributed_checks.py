"""Run by test_distributed.py on two processes: every function of gep.distributed against known numbers."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gep import distributed
from gep.logs import Meters


def main() -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method="env://")
    assert (distributed.rank(), distributed.world_size()) == (rank, 2)
    assert distributed.is_main() == (rank == 0)

    local = torch.tensor([[1.0, 2.0]]) + 10 * rank
    everyone = torch.tensor([[1.0, 2.0], [11.0, 12.0]])
    assert torch.equal(distributed.gather(local), everyone)
    assert torch.equal(distributed.sum_over_ranks(local), everyone.sum(0, keepdim=True))
    assert torch.equal(distributed.max_over_ranks(local), everyone[1:])
    assert torch.equal(local, everyone[rank : rank + 1])  # nothing was modified
    assert distributed.all_agree(rank == 1) and not distributed.all_agree(False)
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]

    # The mean over ranks of each rank's gradient equals the gradient of the whole batch on one process.
    torch.manual_seed(0)
    data = torch.randn(6, 4, dtype=torch.float64)
    model = nn.Linear(4, 3).double()

    def rank_loss(rows: torch.Tensor, features: torch.Tensor, gathered: torch.Tensor) -> torch.Tensor:
        logits = features @ gathered.tanh().T
        return nn.functional.cross_entropy(logits, rows)

    features = model(data)
    rank_loss(torch.arange(6), features, features).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rows = torch.arange(3) + 3 * rank
    mine = model(data[rows])
    rank_loss(rows, mine, distributed.gather_with_grad(mine)).backward()
    for parameter, reference in zip(model.parameters(), expected):
        mean = distributed.sum_over_ranks(parameter.grad) / 2
        torch.testing.assert_close(mean, reference, rtol=1e-12, atol=1e-12)

    try:
        distributed.gather(torch.zeros(1 + rank, 2))
    except ValueError as error:
        assert "(1, 2)" in str(error) and "(2, 2)" in str(error)
    else:
        raise AssertionError("unequal sizes were not refused")

    distributed.seed_all(7)
    same = torch.rand(())
    distributed.seed_all(7, per_rank=True)
    own = torch.rand(())
    assert distributed.gather(same[None]).unique().numel() == 1
    assert distributed.gather(own[None]).unique().numel() == 2
    assert rank == 1 or own == same

    # Ranks may report different names and counts.
    meters = Meters()
    meters.add({"loss": torch.tensor(1.0 + rank)})
    if rank == 1:
        meters.add({"loss": torch.tensor(6.0), "extra": 4.0})
    assert meters.means_and_reset() == {"loss": 3.0, "extra": 4.0}
    assert meters.means_and_reset() == {}
    distributed.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} agrees")


if __name__ == "__main__":
    main()
