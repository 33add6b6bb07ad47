"""Write what a later version must still load: python -m tests.scripts.write_fixtures FOLDER

A checkpoint of LambTrainer with its training_args.bin, a state dict of Lamb, and a pickled Lamb. Those in
tests/fixtures/0.1.0 are of the version before the backends became objects; test_fixtures.py loads them.
"""

import pickle
import shutil
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import torch

from hf_lamb import Lamb
from tests.scripts.checkpointed_run import trainer


def stepped() -> Lamb:
    """Two named parameters in two groups, one of them bf16, after three steps."""
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4).bfloat16())
    groups = [
        {"params": [weight], "param_names": ["weight"]},
        {"params": [bias], "param_names": ["bias"], "weight_decay": 0.0, "layer_adaptation": False},
    ]
    optimizer = Lamb(groups, lr=0.1, max_trust_ratio=10.0)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(4, 3), torch.randn(4).bfloat16()
        optimizer.step()
    return optimizer


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    optimizer = stepped()
    torch.save(optimizer.state_dict(), folder / "state_dict.pt")
    (folder / "lamb.pickle").write_bytes(pickle.dumps(optimizer))
    with tempfile.TemporaryDirectory() as run:
        saved = trainer(Path(run))
        saved.args.output_dir = "run"  # the name of a folder of this machine has no place in the fixture
        saved.train()
    shutil.move("run/checkpoint-2", folder / "checkpoint-2")
    shutil.rmtree("run")


if __name__ == "__main__":
    options = ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path, help="a folder that is not there yet")
    main(options.parse_args().folder)
