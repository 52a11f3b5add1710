"""Ranks: on one process every function is the identity, on two the numbers are right."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gep import distributed
from tests import workers

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "accelerate" / "cpu_2.yaml"


def test_one_process_is_the_identity():
    tensor = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather_with_grad(tensor) is tensor
    assert torch.equal(distributed.gather(tensor), tensor) and not distributed.gather(tensor).requires_grad
    assert torch.equal(distributed.sum_over_ranks(tensor), tensor)
    assert torch.equal(distributed.max_over_ranks(tensor), tensor)
    assert distributed.all_agree(True) and not distributed.all_agree(False)
    assert distributed.gather_objects("x") == ["x"]
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()


def test_seed_all_seeds_every_generator():
    draws = []
    for _ in range(2):
        distributed.seed_all(3)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    distributed.seed_all(4)
    assert torch.rand(()).item() != draws[0][2]


def test_two_processes():
    processes = workers.start_ranks("distributed_checks.py")
    printed = workers.finish(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(printed)
    assert ["rank 0 agrees" in printed[0], "rank 1 agrees" in printed[1]] == [True, True]


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["python", "bin/accelerate", "launch", "--cpu", "--num_processes", "3", "run.py", "a=1"], 3),
        (["python", "bin/accelerate", "launch", "--cpu", "--num-processes=2", "run.py"], 2),
        (["python", "-m", "accelerate.commands.launch", "--cpu", "run.py"], 1),
        (["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "launch", "a=1"], 2),
        (["bash"], 1),
        (["python", "launch"], 1),
    ],
)
def test_number_of_processes_asked_of_accelerate(words, count):
    from gep.accelerator import _asked_processes

    assert _asked_processes(words) == count
    assert _asked_processes(["accelerate", "launch", "--config_file", "configs/accelerate/cpu_2.yaml", "x"]) == 2
    with pytest.raises(ValueError, match="--num_machines 2 with --cpu"):
        _asked_processes(["accelerate", "launch", "--cpu", "--num_machines", "2", "--num_processes", "2", "x"])
