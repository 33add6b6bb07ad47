"""Protects the choice of the model: any masked LM, new or from a checkpoint, with the loss and gradients it has."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
)

from recipes import pretrain_bert
from recipes.lib.labelled import compute_logits_at_labels
from recipes.lib.models import ModelArguments, longest_sequence, new_model
from recipes.lib.tokenizer import train_tokenizer
from tests.helpers import SMALL, one_line, pretrain, torchrun

# The names that configurations have for these numbers; each takes those that it has.
NUMBERS = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
NUMBERS |= {"hidden_dim": 64, "embedding_size": 16, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50}
NUMBERS |= {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("modernbert", {}),
    ("modernbert", {"sparse_prediction": True}),
    ("roberta", {}),
    ("xlm-roberta", {}),
    ("electra", {}),
    ("deberta-v2", {}),
    ("distilbert", {}),
    ("albert", {}),
    ("eurobert", {}),
]


def dense_model(kind: str, options: dict[str, Any]) -> PreTrainedModel:
    default = CONFIG_MAPPING[kind]()
    config = type(default)(**{name: value for name, value in (NUMBERS | options).items() if hasattr(default, name)})
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_prob")):
            setattr(config, name, 0.0)
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)


def batch() -> dict[str, torch.Tensor]:
    """Three rows of unequal length, with a label at every third token."""
    kept = (torch.arange(9) < torch.tensor([[9], [7], [4]])).long()
    ids = torch.randint(5, 50, (3, 9)) * kept
    return {
        "input_ids": ids,
        "attention_mask": kept,
        "labels": torch.where((torch.arange(9) % 3 == 1) & (kept == 1), ids, -100),
    }


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=str)
def test_logits_at_labels_give_the_same_loss_and_gradient(kind: str, options: dict[str, Any]) -> None:
    """As transformers' own forward on the same weights, whose logits are those of all positions."""
    dense = dense_model(kind, options)
    ours, inputs = copy.deepcopy(dense), batch()
    compute_logits_at_labels(ours)
    head_inputs = []
    ours.get_output_embeddings().register_forward_pre_hook(lambda _, args: head_inputs.append(args[0]))
    mine, theirs = ours(**inputs), dense(**inputs)
    torch.testing.assert_close(mine.loss, theirs.loss)
    mine.loss.backward()
    theirs.loss.backward()
    for (name, a), b in zip(ours.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-4, atol=1e-6)
    labels = inputs["labels"]
    assert head_inputs[0].numel() // head_inputs[0].shape[-1] == (labels != -100).sum()  # the work that is saved

    logits = dense.eval()(**inputs | {"labels": None}).logits
    assert torch.equal(ours.eval()(**inputs).guesses, logits.argmax(-1).where(labels != -100, -100))
    torch.testing.assert_close(ours(**inputs | {"labels": None}).logits, logits)  # nothing is kept from call to call


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FAMILIES}))
def test_a_checkpoint_of_each_family_is_complete(kind: str, tmp_path: Path) -> None:
    """Tied weights and biases, which are saved once, are not missed; what is saved again is the same."""
    tokenizer, before = train_tokenizer(["some text"], 50), dense_model(kind, {})
    before.save_pretrained(tmp_path)
    model = new_model(ModelArguments(model_name_or_path=str(tmp_path)), tokenizer, 16)
    assert type(model) is type(before)
    assert all(torch.equal(weight, before.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_number_of_items_divides_the_loss_where_the_model_takes_it() -> None:
    """Trainer's, of the global batch: ModernBERT's loss uses it."""
    dense = dense_model("modernbert", {})
    ours, inputs = copy.deepcopy(dense), batch()
    compute_logits_at_labels(ours)
    losses = [model(**inputs, num_items_in_batch=torch.tensor(100)).loss for model in (ours, dense)]
    torch.testing.assert_close(*losses)
    assert losses[0] < 0.5  # of some 4 nats, for 8 labels of 100


def test_a_model_that_is_its_own_base_computes_all_logits() -> None:
    dense = dense_model("bert", {})
    ours, inputs = copy.deepcopy(dense), batch()
    ours.base_model_prefix = ""
    compute_logits_at_labels(ours)
    torch.testing.assert_close(ours(**inputs).loss, dense(**inputs).loss)
    labels, logits = inputs["labels"], dense.eval()(**inputs).logits
    assert torch.equal(ours.eval()(**inputs).guesses, logits.argmax(-1).where(labels != -100, -100))


def test_a_base_model_that_does_not_keep_the_tokens_is_refused() -> None:
    ours = dense_model("bert", {})
    ours.bert.register_forward_hook(lambda _, args, output: (output[0][:, ::2],))
    compute_logits_at_labels(ours)
    with pytest.raises(ValueError, match=r"BertModel gives \(3, 5\) vectors for \(3, 9\) tokens: this recipe trains"):
        ours(**batch())


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("bert", {"max_position_embeddings": 64}, 64),
        ("roberta", {"max_position_embeddings": 64, "pad_token_id": 1}, 62),
        ("roberta", {"max_position_embeddings": 64, "pad_token_id": 0}, 63),
        ("modernbert", {"max_position_embeddings": 64}, 64),
    ],
)
def test_the_longest_sequence_is_the_longest_that_runs(kind: str, options: dict[str, Any], most: int) -> None:
    model = dense_model(kind, options)
    assert longest_sequence(model.config) == most
    model(input_ids=torch.full((1, most), 5))
    if kind != "modernbert":  # whose positions are rotations, of any number
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))


# -- the recipe -------------------------------------------------------------------------------------------------------

MODERNBERT = ["--model_type", "modernbert", "--config_overrides"]
MODERNBERT += ["num_hidden_layers=2,hidden_size=32,intermediate_size=48,num_attention_heads=2"]
RUN = [*SMALL[2:], "--max_seq_length", "32", "--learning_rate", "0.02", "--max_steps", "4", "--save_steps", "2"]


@pytest.fixture(scope="module")
def modern(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new ModernBERT of the recipe, after 4 steps."""
    output = tmp_path_factory.mktemp("modern")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretrain(monkeypatch, *MODERNBERT, *RUN, "--corpus", str(texts), "--output_dir", str(output))
    return output


def test_a_new_model_has_the_numbers_asked_for_and_the_tokenizers_vocabulary(modern: Path) -> None:
    """What is saved is transformers' own, with no trace of the recipe."""
    config, tokenizer = AutoConfig.from_pretrained(modern), AutoTokenizer.from_pretrained(modern)
    assert config.architectures == ["ModernBertForMaskedLM"]
    assert (config.num_hidden_layers, len(config.layer_types), config.hidden_size) == (2, 2, 32)
    assert config.vocab_size == len(tokenizer)
    assert [config.pad_token_id, config.cls_token_id, config.sep_token_id] == [
        tokenizer.pad_token_id,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    ]
    assert config.sparse_prediction is False
    assert AutoModelForMaskedLM.from_pretrained(modern).num_parameters() > 0
    (record,) = map(json.loads, (modern / "results.jsonl").read_text().splitlines())
    assert record["size"] is None
    assert record["model"]["architecture"] == "ModernBertForMaskedLM"
    assert record["model"]["config_overrides"] == MODERNBERT[-1]
    assert record["held_out_loss"] < 9


def test_it_resumes_to_the_same_bits(
    modern: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(modern / "checkpoint-2", tmp_path / "checkpoint-2")
    where = ["--corpus", str(texts), "--output_dir", str(tmp_path)]
    pretrain(monkeypatch, *MODERNBERT, *RUN, *where, "--resume_from_checkpoint", "latest")
    expected = load_file(modern / "model.safetensors")
    got = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in got.items())


@pytest.mark.distributed
def test_two_processes_train_the_same_model(modern: Path, texts: Path, tmp_path: Path) -> None:
    where = ["--corpus", str(texts), "--output_dir", str(tmp_path), "--per_device_train_batch_size", "4"]
    torchrun(2, "recipes.pretrain_bert", *MODERNBERT, *RUN, *where)
    expected = load_file(modern / "model.safetensors")
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (["--size", "smoke"], "its model_type is modernbert, this run's bert"),
        (
            [*MODERNBERT[:-1], MODERNBERT[-1].replace("layers=2", "layers=3")],
            r"its layer_types is \['full_attention', 'sliding_attention'\], this run's",
        ),
        (
            [*MODERNBERT[:-1], MODERNBERT[-1].replace("heads=2", "heads=4")],
            "its num_attention_heads is 2, this run's 4",
        ),
    ],
)
def test_a_run_of_another_architecture_does_not_resume(
    model: list[str], message: str, modern: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that share a name and a shape would be loaded, and the others would be new."""
    where = ["--corpus", str(texts), "--output_dir", str(tmp_path)]
    checkpoint = str(modern / "checkpoint-2")
    with pytest.raises(SystemExit, match=f"checkpoint-2 is of another model: {message}"):
        pretrain(monkeypatch, *model, *RUN, *where, "--resume_from_checkpoint", checkpoint)


@pytest.mark.parametrize("start", ["finished", "modern"])
def test_a_checkpoint_trains_on_with_its_own_tokenizer(
    start: str, texts: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins where the checkpoint ended, on the same held-out documents under the same masks."""
    folder = request.getfixturevalue(start)
    before = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    where = ["--corpus", str(texts), "--output_dir", str(tmp_path)]
    pretrain(monkeypatch, "--model_name_or_path", str(folder), *RUN, *where)
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["held_out_loss_at_start"] == pytest.approx(before["held_out_loss"], abs=1e-6)
    assert record["held_out_loss"] < record["held_out_loss_at_start"]
    assert record["model"]["model_name_or_path"] == str(folder)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    assert AutoConfig.from_pretrained(tmp_path).architectures == AutoConfig.from_pretrained(folder).architectures


@pytest.mark.parametrize("carry_over", ["moments", "optimizer", "weights"])
def test_a_checkpoint_of_lambtrainer_gives_what_is_asked_for(
    carry_over: str, modern: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate of zero the moments alone change, from where the checkpoint left them or from zero."""
    source = modern / "checkpoint-2"
    options = ["--model_name_or_path", str(source), "--carry_over", carry_over, *RUN, "--corpus", str(texts)]
    options += ["--learning_rate", "0", "--weight_decay", "0", "--max_steps", "1", "--output_dir", str(tmp_path)]
    pretrain(monkeypatch, *options)
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert (record["carry_over"], record["carried_over_from"]) == (carry_over, str(source))
    before, after = (torch.load(folder / "optimizer.pt") for folder in (source, tmp_path / "checkpoint-1"))
    steps = {int(state["step"]) for state in after["state"].values()}
    assert steps == ({3} if carry_over == "optimizer" else {1})
    second = [state["exp_avg_sq"].sum().item() for state in after["state"].values()]
    kept = [0.999 * state["exp_avg_sq"].sum().item() for state in before["state"].values()]
    enough = [new >= old * (1 - 1e-5) for new, old in zip(second, kept, strict=True)]
    assert all(enough) if carry_over != "weights" else not any(enough)


def test_moments_are_asked_of_the_folder_of_a_run(modern: Path) -> None:
    """Which holds the model alone: its newest checkpoint has them."""
    message = f"--carry_over moments: {modern} is no checkpoint: .*: give --model_name_or_path {modern}/checkpoint-4"
    with one_line(ValueError, message):
        pretrain_bert.parse(["--model_name_or_path", str(modern), "--carry_over", "moments"])


def test_a_checkpoint_in_half_precision_trains_in_float32(finished: Path, tmp_path: Path) -> None:
    """transformers 5 loads what it finds; weights in bf16 would lose LAMB's small steps."""
    AutoModelForMaskedLM.from_pretrained(finished, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    model = new_model(ModelArguments(model_name_or_path=str(tmp_path)), tokenizer, 32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_configuration_file_makes_a_new_model(
    modern: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many embeddings as it says, also where the tokenizer has fewer tokens."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(json.loads((modern / "config.json").read_text()) | {"vocab_size": 512}))
    output = tmp_path / "out"
    where = ["--corpus", str(texts), "--output_dir", str(output), "--attn_implementation", "eager"]
    pretrain(monkeypatch, "--config_name", str(file), *RUN, *where)
    assert AutoConfig.from_pretrained(output).vocab_size == 512
    assert len(AutoTokenizer.from_pretrained(output)) < 512


def test_the_defaults_of_another_model_are_those_of_tiny(finished: Path) -> None:
    """But for the folder; one that trains on is evaluated before it does."""
    recipe, args = pretrain_bert.parse(["--model_name_or_path", str(finished), "--use_cpu"])
    tiny, of_tiny = pretrain_bert.parse(["--use_cpu"])
    assert (recipe.size, tiny.size) == (None, "tiny")
    assert (args.max_steps, recipe.max_seq_length) == (of_tiny.max_steps, tiny.max_seq_length)
    assert (args.eval_on_start, of_tiny.eval_on_start) == (True, False)
    assert args.output_dir == f"runs/pretrain_bert/{finished.name}-lamb"
