"""A spawned DataLoader worker whose dataset holds TrainingArguments and builds some of its own."""

import dataclasses
import sys

from torch.utils.data import DataLoader, Dataset
from transformers import HfArgumentParser, TrainingArguments


class Names(Dataset):
    def __init__(self, args):
        self.args = args

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return f"{self.args.optim} {dataclasses.replace(self.args).optim.value}"


if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    loader = DataLoader(Names(args), num_workers=1, multiprocessing_context="spawn")
    sys.stdout.write(f"worker: {next(iter(loader))[0]}\n")
