"""What a process of a sharded run keeps: started several times by tests/train/test_sharding.py.

    torchrun --nproc-per-node 2 -m tests.train.sharded_state CONFIG.yaml

The output has a checkpoint, from which it resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack, closing

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs.load import load
from configs.training import TrainConfig
from tests.train.helpers import Listener
from train.stopping import Stop
from train.trainer import Trainer


def share_of(tensors: Iterable[Tensor]) -> float:
    """Returns the share of the tensors' memory that this process keeps."""
    own, whole = dict[int, int](), 0  # several tensors may be parts of one piece of memory
    for tensor in tensors:
        assert isinstance(tensor, DTensor), tensor.shape
        memory = tensor.to_local().untyped_storage()
        own[memory.data_ptr()] = memory.nbytes()
        whole += tensor.numel() * tensor.element_size()
    return sum(own.values()) / whole


def main(path: str) -> None:
    with ExitStack() as stack:
        trainer = Trainer(load(TrainConfig, path), Listener(), stack)
        optimization = trainer.optimization
        states = optimization.optimizer.state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        assert len(moments) == 2 * len(optimization.parameters)
        frozen = [each for each in trainer.trained.unet.parameters() if not each.requires_grad]
        gradients = list[Tensor]()
        step = optimization.optimizer.step

        def look() -> None:
            gradients.extend(each.grad for each in optimization.parameters if each.grad is not None)
            step()

        optimization.optimizer.step = look
        with closing(trainer._batches()) as batches:
            trainer._step(batches, Stop())
        assert len(gradients) == len(optimization.parameters)
        for tensors in (optimization.parameters, frozen, moments, gradients):
            # a little more than half: groups are padded to equal parts
            assert 0.49 < share_of(tensors) < 0.53, share_of(tensors)

        # one process has a gradient that isn't finite: none changes its weights
        before = [each.to_local().clone() for each in optimization.parameters]  # type: ignore[attr-defined]
        for parameter in optimization.parameters:
            parameter.grad = torch.zeros_like(parameter)
        if not trainer.is_main:
            optimization.parameters[0].grad.to_local().fill_(float("nan"))  # type: ignore[union-attr]
        assert optimization.step(trainer.accelerator) == 1
        now = [each.to_local() for each in optimization.parameters]  # type: ignore[attr-defined]
        assert all(map(torch.equal, before, now))
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
