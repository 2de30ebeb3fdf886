"""A run that kill -9 ends in the middle of writing its third checkpoint. python -m tests.training.killed_run FOLDER"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from orthrus_triton.training.trainer import ViewTrainer
from tests.training.view_runs import make_model, make_trainer

STEPS = 8
OPTIONS = {"save_steps": 2}


def die_in_third_checkpoint(trainer: ViewTrainer) -> None:
    save = trainer._save_rng_state

    def save_or_die(output_dir: str) -> None:
        if trainer.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    trainer._save_rng_state = save_or_die


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = make_trainer(make_model(), Path(sys.argv[1]), STEPS, **OPTIONS)
    die_in_third_checkpoint(trainer)
    trainer.train()
