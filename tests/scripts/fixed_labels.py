"""A Trainer script that does not name hf_lamb: no dropout, and from 1 to 12 labels a row, which never change."""

import torch
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, Trainer, TrainingArguments, set_seed

sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(0)
    model = BertForMaskedLM(BertConfig(**sizes, **no_dropout, intermediate_size=64))
    ids = torch.randint(4, 64, (64, 16))
    chosen = torch.arange(16) < torch.randint(1, 13, (64, 1))
    rows = [{"input_ids": row, "labels": labels} for row, labels in zip(ids, ids.where(chosen, -100), strict=True)]
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_state()
    trainer.model_wrapped = trainer.model  # see recipes.lib.processes.leave_process_group
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
