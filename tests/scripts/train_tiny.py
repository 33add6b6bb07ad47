"""A Trainer script as people have them: it knows nothing of hf_lamb and takes its optimizer from the command line.

Each process leaves what it trained with in OUTPUT_DIR/rank<N>.json.
"""

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, Trainer, TrainingArguments


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    ids = torch.randint(4, 64, (16, 16))
    trainer = Trainer(BertForMaskedLM(config), args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    report = {
        "optimizer": f"{type(trainer.optimizer.optimizer).__module__}.{type(trainer.optimizer.optimizer).__name__}",
        "max_trust_ratio": trainer.optimizer.param_groups[0]["max_trust_ratio"],
        "world_size": args.world_size,
        "steps": trainer.state.global_step,
        "weights": sum(param.double().sum().item() for param in trainer.model.parameters()),
    }
    Path(args.output_dir, f"rank{args.process_index}.json").write_text(json.dumps(report))
    trainer.model_wrapped = trainer.model  # see recipes.lib.processes.leave_process_group
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
