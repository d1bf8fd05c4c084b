"""Run by test_resume in a process of its own: fine-tune, and kill this process or have it told to stop."""

import os
import signal
import sys
from pathlib import Path

import torch

from pmod_cli.output.errors import PmodError
from pmod_cli.recipe import load_recipe
from pmod_cli.training.finetune import finetune

model, data, images, output, recipe, number, step = sys.argv[1:]
torch.set_num_threads(1)


def stop(done, total, latest):
    if done == int(step):
        os.kill(os.getpid(), int(number))


try:
    finetune(
        model, Path(data), Path(images), Path(output), recipe=load_recipe(recipe), resume=True, progress=stop
    )
except PmodError as error:
    print(error)
    sys.exit(error.exit_code)
finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
