"""The same short run on two gloo processes, by DDP, FSDP2 or DeepSpeed. A process of its own: it forks before torch
threads. python -m tests.training.distributed_run FOLDER ddp|fsdp2|zero1|zero2 ..."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import accelerate.state
import torch
import torch.multiprocessing as multiprocessing

from tests.training.view_runs import make_model, make_trainer, saved_view

STEPS = 4
MODEL = {"anchor_view": "ar", "chain_width": 8}
COMMON = {"eval_rows": 3, "per_device_train_batch_size": 1, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}


def allow_fsdp_on_cpu() -> None:
    """accelerate chooses FSDP for GPUs only; torch's FSDP2 itself runs on gloo as well."""
    plain_init = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options):
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = accelerate.state.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = init


def work(rank: int, folder: Path, mode: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    options = {}
    if mode == "fsdp2":
        allow_fsdp_on_cpu()
        options = {"fsdp": True, "fsdp_config": {"version": 2}}
    elif mode in ("zero1", "zero2"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        options = {"deepspeed": {"zero_optimization": {"stage": int(mode[-1])}, **dict.fromkeys(automatic, "auto"),
                                 "zero_allow_untested_optimizer": True}}  # fmt: skip
    trainer = make_trainer(make_model(**MODEL), folder, STEPS, **COMMON, **options)
    trainer.watch.deferred = True  # as on GPUs; FSDP's norm is a DTensor
    trainer.train()
    if mode == "fsdp2":
        sharded = [p for p in trainer.model.parameters() if isinstance(p, torch.distributed.tensor.DTensor)]
        assert sharded, "nothing was sharded"
    if rank == 0:
        metrics = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        (folder / "metrics.json").write_text(json.dumps(metrics))
    _resume(folder, options)
    torch.distributed.destroy_process_group()


def _resume(folder: Path, options: dict) -> None:
    """On as many processes, a resumed run ends with the same bits."""
    unbroken = saved_view(folder, STEPS)
    torch.distributed.barrier()
    trainer = make_trainer(make_model(**MODEL), folder, STEPS, **COMMON, **options)
    trainer.train(str(folder / "run" / "checkpoint-2"))
    resumed = saved_view(folder, STEPS)
    different = [name for name in unbroken if not torch.equal(unbroken[name], resumed[name])]
    assert not different, different


if __name__ == "__main__":
    for number, mode in enumerate(sys.argv[2:]):
        target = Path(sys.argv[1]) / mode
        target.mkdir()
        port = 20000 + (os.getpid() * 7 + number) % 20000
        multiprocessing.start_processes(work, (target, mode, port), nprocs=2, start_method="fork")
