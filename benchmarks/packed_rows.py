"""Processor time of a micro-batch of packed rows, and of one of separate documents, on the same corpus.

    python -m benchmarks.packed_rows --corpus glosses.jsonl [--max_seq_length 64] [--repeats 12]

Forward and backward passes of a new model of the pretraining recipe, the two kinds alternately, 32 rows each. Prints
the share of padding, the median of the processor time (other programs may use the machine meanwhile), and how many
tokens that are no padding it trains on per second of that time.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from hf_lamb.packed_rows import PackedRowsCollator
from recipes.lib.models import new_model
from recipes.lib.pretraining import PretrainingArguments, load_data

ROWS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", nargs="+", required=True, help="as the pretraining recipe's")
    parser.add_argument("--size", default="tiny", help="as the pretraining recipe's")
    parser.add_argument("--max_seq_length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=12, help="micro-batches of each kind that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {packing: Batches(options, packing) for packing in (False, True)}
    for _ in range(1 + options.repeats):
        for kind in kinds.values():
            kind.train_one()
    for packing, kind in kinds.items():
        seconds = statistics.median(kind.seconds[1:])
        tokens = ROWS * options.max_seq_length * (1 - kind.padding)
        print(
            f"{'packed' if packing else 'separate':8} padding {kind.padding:6.1%}   {1e3 * seconds:5.0f} ms   "
            f"{tokens / seconds:,.0f} tokens/s"
        )


class Batches:
    """Micro-batches of one kind, the model that trains on them, and how long that took."""

    def __init__(self, options: argparse.Namespace, packing: bool) -> None:
        arguments = PretrainingArguments(
            corpus=options.corpus, size=options.size, max_seq_length=options.max_seq_length, packing=packing
        )
        data = load_data(arguments, seed=0)
        torch.manual_seed(0)
        self.model = new_model(arguments, data.tokenizer, options.max_seq_length)
        collator: Any = PackedRowsCollator(self.model, options.max_seq_length) if packing else default_collate
        self.batches = iter(DataLoader(data.train, batch_size=ROWS, shuffle=True, collate_fn=collator))
        self.padding, self.seconds = data.padding, []

    def train_one(self) -> None:
        start = time.process_time()
        self.model(**next(self.batches)).loss.backward()
        self.model.zero_grad()
        self.seconds.append(time.process_time() - start)


if __name__ == "__main__":
    main()
