"""Bad input gets one line that says what is wrong and what to do, and leaves nothing half-done or half-written.

A table for each door: the optimizer, its parameters and their groups, state dicts, training arguments, configuration
files, the launcher, the pretraining recipe's command line, its files, checkpoints, and a full disk. Options out of
their range are in test_lamb_contract.py, misspelt `optim_args` in test_registration.py, damaged checkpoints in
test_checkpoints.py.
"""

import copy
import errno
import gzip
import importlib.machinery
import json
import lzma
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import recipes.lib.corpus
from hf_lamb import Lamb, LambTrainingArguments, convert_state_dict, lamb_param_groups, run
from recipes.lib.report import append_json_line, plot_training
from recipes.lib.tokenizer import load_or_train_tokenizer, train_tokenizer
from tests.helpers import BACKENDS, SMALL, one_line, pretrain, says

NAN = float("nan")


def refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """One line, of this type, with the value and the remedy."""
    with one_line(error, message):
        call()


# -- options of Lamb ------------------------------------------------------------------------------------------------

NUMBER = "expected a number that is not negative"
NO_TENSOR = r".*, not a tensor, which only lr may be: pass its \.item\(\)"
OPTIONS = [
    ({"lr": "1e-3"}, f"Invalid learning rate: '1e-3': {NUMBER}, not text .in YAML, write 1.0e-3"),
    ({"lr": None}, f"Invalid learning rate: None: {NUMBER}"),
    ({"lr": True}, f"Invalid learning rate: True: {NUMBER}"),
    ({"lr": [1e-3]}, rf"Invalid learning rate: \[0.001\]: {NUMBER}"),
    ({"lr": 1j}, f"Invalid learning rate: 1j: {NUMBER}"),
    ({"lr": torch.tensor(NAN)}, rf"Invalid learning rate: tensor\(nan\): {NUMBER}"),
    ({"lr": torch.tensor(-1.0)}, rf"Invalid learning rate: tensor\(-1.\): {NUMBER}"),
    ({"betas": None}, r"Invalid betas: None: expected two numbers, \(beta1, beta2\)"),
    ({"betas": torch.tensor([0.9, 0.99])}, r"Invalid betas: tensor.*: expected two numbers"),
    ({"betas": 0.9}, "Invalid betas: 0.9: expected two numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, r"Invalid betas: \(0.9, 0.99, 0.999\): expected two numbers"),
    ({"betas": "99"}, "Invalid betas: 99: expected two numbers"),
    ({"betas": ("0.9", 0.999)}, r"Invalid beta parameter at index 0: '0.9': expected a number in \[0, 1\), not text"),
    ({"betas": (0.9, None)}, r"Invalid beta parameter at index 1: None: expected a number in \[0, 1\)"),
    ({"betas": (NAN, 0.999)}, r"Invalid beta parameter at index 0: nan: expected a number in \[0, 1\)"),
    *[
        ({name: (value, 0.99) if name == "betas" else value}, rf"tensor\(.*: expected .*number{NO_TENSOR}")
        for name in ("betas", "eps", "weight_decay", "min_trust_ratio", "max_trust_ratio", "max_grad_norm")
        for value in (torch.tensor(0.9), torch.tensor([0.9]))
    ],
    ({"lr": 10**400}, f"Invalid learning rate: 1000.*: {NUMBER}"),
    ({"maximize": torch.tensor(True)}, r"Invalid maximize: tensor\(True\): expected True or False"),
    ({"bias_correction": np.array([True, False])}, r"Invalid bias_correction: array\(.*: expected True or False"),
    ({"fused": torch.tensor(True)}, r"Invalid fused: tensor\(True\): expected True, False or None"),
    ({"eps": None}, f"Invalid eps value: None: {NUMBER}"),
    ({"eps": NAN}, f"Invalid eps value: nan: {NUMBER}"),
    ({"weight_decay": "0.01"}, f"Invalid weight_decay value: '0.01': {NUMBER}, not text"),
    ({"weight_decay": (0.1,)}, rf"Invalid weight_decay value: \(0.1,\): {NUMBER}"),
    ({"min_trust_ratio": "1"}, "Invalid min_trust_ratio: '1': expected None or a number that is not negative"),
    ({"max_trust_ratio": NAN}, "Invalid max_trust_ratio: nan: expected None or a positive number"),
    ({"max_trust_ratio": True}, "Invalid max_trust_ratio: True: expected None or a positive number"),  # as trust_clip
    ({"max_grad_norm": NAN}, "Invalid max_grad_norm: nan: expected a positive number, or None for no clipping"),
    ({"bias_correction": "no"}, "Invalid bias_correction: 'no': expected True or False"),
    ({"layer_adaptation": "false"}, "Invalid layer_adaptation: 'false': expected True or False"),
    ({"fixed_norm": 1.5}, "Invalid fixed_norm: 1.5: expected True or False"),
    ({"skip_nonfinite": None}, "Invalid skip_nonfinite: None: expected True or False"),
    ({"maximize": "false"}, "Invalid maximize: 'false': expected True or False"),
    ({"foreach": "yes"}, "Invalid foreach: 'yes': expected True, False or None"),
    ({"fused": "auto"}, "Invalid fused: 'auto': expected True, False or None"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_options_of_another_kind(options: dict[str, Any], message: str) -> None:
    """For the optimizer, for a group of it, and for a group added later, which is then not there."""
    refused(lambda: Lamb([torch.ones(2)], **options), ValueError, message)
    refused(lambda: Lamb([{"params": [torch.ones(2)], **options}]), ValueError, message)
    optimizer = Lamb([torch.ones(2)])
    refused(lambda: optimizer.add_param_group({"params": [torch.ones(2)], **options}), ValueError, message)
    assert len(optimizer.param_groups) == 1


@BACKENDS
def test_what_torch_takes_is_taken(backend: dict[str, bool]) -> None:
    """Zeros, a tensor lr, NumPy's numbers, lists, integers and infinity are no mistakes."""
    for options in [
        {"lr": 0, "eps": 0, "weight_decay": 0, "betas": [0, 0.5]},
        {"lr": torch.tensor(1e-3), "min_trust_ratio": 0},
        {"lr": torch.tensor([1e-3])},
        {"lr": np.float32(1e-3), "eps": np.float64(1e-6), "betas": (np.float32(0.9), 0.999)},
        {"max_trust_ratio": float("inf"), "max_grad_norm": np.int64(1)},
        {"maximize": 0, "bias_correction": np.bool_(True)},
    ]:
        param = torch.ones(2, requires_grad=True)
        param.grad = torch.ones(2)
        Lamb([param], **backend, **options).step()
        assert bool(param.isfinite().all())


# -- parameters and groups --------------------------------------------------------------------------------------------


def linear() -> nn.Linear:
    return nn.Linear(3, 2)


def with_sparse_gradient() -> list[Any]:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    return list(embedding.named_parameters())


def sharded(flag: str) -> list[Any]:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    setattr(param, flag, True)
    return [("0.weight", param)]


def resized() -> None:
    """A larger vocabulary put into the parameter that the optimizer already has."""
    param = nn.Parameter(torch.ones(2))
    optimizer = Lamb([("embedding.weight", param)])
    param.data = torch.ones(3)
    param.grad = torch.ones(3)
    optimizer.step()


PARAMS = r"pass lamb_param_groups\(model\) or model.parameters\(\)"
REAL = "it takes real floating-point tensors that hold data"
PARAMETERS = [
    ("none", lambda: Lamb([]), ValueError, "optimizer got an empty parameter list"),
    (
        "a tensor",
        lambda: Lamb(torch.ones(2)),
        TypeError,
        r"should be an iterable of Tensors or dicts, but got torch\.",
    ),
    ("a model", lambda: Lamb(linear()), TypeError, f"got Linear: {PARAMS}"),
    ("a model of models", lambda: Lamb(nn.Sequential(linear())), TypeError, f"got Sequential: {PARAMS}"),
    ("a method", lambda: Lamb(linear().parameters), TypeError, f"got method: {PARAMS}"),
    ("nothing", lambda: Lamb(None), TypeError, f"got NoneType: {PARAMS}"),
    ("a state dict", lambda: Lamb(linear().state_dict()), TypeError, f"got OrderedDict: {PARAMS}"),
    ("one group", lambda: Lamb({"params": [torch.ones(1)]}), TypeError, "got dict: pass a list of such dicts"),
    ("a model in a group", lambda: Lamb([{"params": linear()}]), TypeError, f"got Linear: {PARAMS}"),
    (
        "lazy",
        lambda: Lamb(nn.LazyLinear(2).named_parameters()),
        ValueError,
        r"parameter weight is not initialised yet \(a lazy module's\): run the model on a batch before",
    ),
    (
        "sparse",
        lambda: Lamb([torch.ones(2).to_sparse()]),
        ValueError,
        r"is of layout torch.sparse_coo.*: make it dense",
    ),
    ("numbers", lambda: Lamb([1, 2]), TypeError, "can only optimize Tensors, but one of the params is int"),
    ("no leaf", lambda: Lamb([nn.Parameter(torch.ones(2)) * 2]), ValueError, "can't optimize a non-leaf Tensor"),
    ("complex", lambda: Lamb([("w", torch.ones(2) * 1j)]), ValueError, f"w is of dtype torch.complex64: {REAL}"),
    ("integer", lambda: Lamb([("w", torch.arange(2))]), ValueError, f"w is of dtype torch.int64: {REAL}"),
    ("meta", lambda: Lamb([("w", torch.ones(2, device="meta"))]), ValueError, f"w is on the meta device: {REAL}"),
    (
        "a group without parameters",
        lambda: Lamb([{"lr": 0.1, "weight": []}]),
        ValueError,
        'put the parameters of a group under "params": this one has only lr, weight',
    ),
    (
        "a group that is a list",
        lambda: Lamb(linear().parameters()).add_param_group([torch.ones(2)]),
        TypeError,
        "param_group must be a dict, but got <class 'list'>",
    ),
    (
        "in two groups",
        lambda: (lambda p: Lamb([{"params": [p]}, {"params": [p]}]))(torch.ones(2)),
        ValueError,
        "some parameters appear in more than one parameter group",
    ),
    (
        "unknown option",
        lambda: Lamb([torch.ones(2)], momentum=0.9),
        TypeError,
        "unexpected keyword argument 'momentum'",
    ),
    (
        "sparse gradient",
        lambda: Lamb(with_sparse_gradient()).step(),
        RuntimeError,
        "the gradient of weight is sparse.*: use sparse=False in the embedding",
    ),
    (
        "FSDP1 view",
        lambda: Lamb(sharded("_fsdp_flattened")).step(),
        RuntimeError,
        r"0\.weight is an FSDP1 shard.*: call optimizer\.attach\(model\)",
    ),
    (
        "FSDP1 flat",
        lambda: Lamb(sharded("_is_flat_param")).step(),
        RuntimeError,
        r"0\.weight is an FSDP1 shard.*: call optimizer\.attach\(model\)",
    ),
    (
        "resized",
        resized,
        RuntimeError,
        r"embedding\.weight has shape \(3,\).*: .*build a new optimizer",
    ),
    (
        "lamb_param_groups of parameters",
        lambda: lamb_param_groups(linear().parameters()),
        ValueError,
        r"pass model, not model\.parameters\(\): expected a module, got generator",
    ),
    (
        "lamb_param_groups of a frozen model",
        lambda: lamb_param_groups(linear().requires_grad_(False)),
        ValueError,
        "unfreeze some parameters: Linear has no trainable one",
    ),
    (
        "a pattern that is no list",  # each of its letters would be a pattern
        lambda: lamb_param_groups(linear(), exclude_from_weight_decay="weight"),
        ValueError,
        "exclude_from_weight_decay: expected a list of regular expressions, such as .*, got 'weight'",
    ),
    (
        "no patterns",
        lambda: lamb_param_groups(linear(), exclude_from_layer_adaptation=None),
        ValueError,
        "exclude_from_layer_adaptation: expected a list of regular expressions, such as .*, got None",
    ),
    (
        "a number for a pattern",
        lambda: lamb_param_groups(linear(), exclude_from_weight_decay=[1]),
        ValueError,
        r"expected a list of regular expressions, such as .*, got \[1\]",
    ),
    (
        "a pattern for nothing",
        lambda: lamb_param_groups(linear(), exclude_from_weight_decay=["embed"]),
        ValueError,
        "exclude_from_weight_decay: 'embed' matches no trainable parameter, such as weight",
    ),
    (
        "half a pattern",
        lambda: lamb_param_groups(linear(), exclude_from_weight_decay=["(bias"]),
        ValueError,
        r"'\(bias' is no regular expression: missing \)",
    ),
    (
        "weight_decay of the groups",
        lambda: Lamb(lamb_param_groups(linear(), weight_decay="0.1")),
        ValueError,
        f"Invalid weight_decay value: '0.1': {NUMBER}, not text",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [row[1:] for row in PARAMETERS], ids=[row[0] for row in PARAMETERS]
)
def test_parameters_and_groups(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """torch's own words where they are clear."""
    refused(call, error, message)


# -- state dicts ------------------------------------------------------------------------------------------------------


def stepped(kind: type[torch.optim.Optimizer] = Lamb, **options: Any) -> Any:
    """An optimizer of one named parameter of shape [2], after a step."""
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = kind([("w", param)], **options)
    optimizer.step()
    return optimizer


def changed(**state: Any) -> dict[str, Any]:
    """A state dict of Lamb in which the parameter's state has other values; ... leaves one out."""
    state_dict = copy.deepcopy(stepped().state_dict())
    merged = {**state_dict["state"][0], **state}
    state_dict["state"][0] = {key: value for key, value in merged.items() if value is not ...}
    return state_dict


def with_group(**options: Any) -> dict[str, Any]:
    state_dict = copy.deepcopy(stepped().state_dict())
    state_dict["param_groups"][0] |= options
    return state_dict


OTHER = r"convert_state_dict.* another optimizer's.* has "
NONE = r"pass what optimizer\.state_dict\(\) returned: this has "
DAMAGED = "use another checkpoint: this state dict is damaged"
STATE_DICTS = [
    ("None", lambda: None, "expected an optimizer's state dict, got NoneType: torch.load the file first"),
    ("a path", lambda: "checkpoint-4/optimizer.pt", "expected an optimizer's .*, got str: torch.load the file first"),
    ("a list", lambda: [stepped().state_dict()], "expected an optimizer's .*, got list: torch.load the file first"),
    ("empty", dict, f"{NONE}nothing"),
    ("a model's", lambda: linear().state_dict(), f"{NONE}weight, bias"),
    ("a wrapped one", lambda: {"optimizer": stepped().state_dict()}, f"{NONE}optimizer"),
    (
        "ZeRO's",
        lambda: {"zero_stage": 2, "base_optimizer_state": {}},
        "this has zero_stage, .*make a full checkpoint first",
    ),
    ("without groups", lambda: {"state": {}}, f"{NONE}state"),
    ("without state", lambda: {"param_groups": []}, f"{NONE}param_groups"),
    ("state in a list", lambda: {**changed(), "state": [{}]}, DAMAGED),
    ("a state that is none", lambda: {**changed(), "state": {0: None}}, DAMAGED),
    ("a group without params", lambda: {**changed(), "param_groups": [{"lr": 1.0}]}, DAMAGED),
    (
        "a moment in a list",
        lambda: changed(exp_avg=[0.1, 0.1]),
        "use another checkpoint: exp_avg of w is of type list, expected a floating-point",
    ),
    (
        "a quantised moment",
        lambda: changed(exp_avg_sq=torch.ones(2, dtype=torch.int8)),
        "use another checkpoint: exp_avg_sq of w is a tensor of torch.int8, expected a floating-point tensor",
    ),
    (
        "another model's",
        lambda: changed(exp_avg=torch.ones(3)),
        r"exp_avg of w has shape \(3,\), the parameter \(2,\): load a state dict of this model.*ZeRO, FSDP",
    ),
    (
        "a step of two",
        lambda: changed(step=torch.ones(2)),
        r"the step of w is tensor\(\[1., 1.\]\), expected one number",
    ),
    (
        "a step in words",
        lambda: changed(step="four"),
        "use another checkpoint: the step of w is 'four', expected one number",
    ),
]
LOADED_ONLY = [
    ("a moment less", lambda: changed(exp_avg_sq=...), f"{OTHER}step, exp_avg"),
    ("no step", lambda: changed(step=...), f"{OTHER}exp_avg, exp_avg_sq"),
    ("SGD's", lambda: stepped(torch.optim.SGD, lr=0.1, momentum=0.9).state_dict(), f"{OTHER}momentum_buffer"),
    # Its keys are LAMB's, so its rate would be taken over, which is 50 times too low.
    (
        "AdamW's",
        lambda: stepped(torch.optim.AdamW).state_dict(),
        "convert_state_dict.* is an Adam's .its groups have",
    ),
    (
        "a group more",
        lambda: (lambda s: {**s, "param_groups": s["param_groups"] * 2})(changed()),
        "number of parameter gr",
    ),
    (
        "a parameter more",
        lambda: with_group(params=[0, 1]),
        "parameter group that doesn't match the size of optimizer's",
    ),
    ("a negative lr", lambda: with_group(lr=-1.0), f"Invalid learning rate: -1.0: {NUMBER}"),
    (
        "betas of three",
        lambda: with_group(betas=(0.9, 0.9, 0.9)),
        r"Invalid betas: \(0.9, 0.9, 0.9\): expected two num",
    ),
]
CONVERTED_ONLY = [
    ("a moment less", lambda: changed(exp_avg_sq=...), "w has exp_avg, step: start with fresh moments"),
    (
        "no step",
        lambda: changed(step=...),
        "put the step into the state or the group.*: w has none",
    ),
    (
        "SGD's",
        lambda: stepped(torch.optim.SGD, lr=0.1, momentum=0.9).state_dict(),
        "w has momentum_buffer: start with fresh moments: this is SGD's",
    ),
    (
        "AMSGrad's",
        lambda: stepped(torch.optim.AdamW, amsgrad=True).state_dict(),
        "start with fresh moments: this is AMSGrad's",
    ),
    ("other names", lambda: with_group(param_names=["v"]), "same parameters: v is on one side only"),
    (
        "a parameter more",
        lambda: with_group(params=[0, 1]),
        r"build Lamb with the same groups: .* groups of \[2\] parameters, Lamb of \[1\]",
    ),
]


@pytest.mark.parametrize(("kind", "make", "message"), STATE_DICTS + LOADED_ONLY)
def test_state_dicts_that_are_loaded(kind: str, make: Callable[[], Any], message: str) -> None:
    """Nothing of them is in the optimizer afterwards."""
    optimizer = stepped()
    before = str(optimizer.state_dict())
    refused(lambda: optimizer.load_state_dict(make()), ValueError, message)
    assert str(optimizer.state_dict()) == before
    optimizer.step()


@pytest.mark.parametrize(("kind", "make", "message"), STATE_DICTS + CONVERTED_ONLY)
def test_state_dicts_that_are_converted(kind: str, make: Callable[[], Any], message: str) -> None:
    refused(lambda: convert_state_dict(make(), stepped()), ValueError, f"^convert_state_dict: .*{message}")


def test_a_state_dict_is_converted_for_lamb_only() -> None:
    other = stepped(torch.optim.AdamW)
    message = "expected the Lamb that will load it, got AdamW: unwrap it"
    refused(lambda: convert_state_dict(other.state_dict(), other), ValueError, message)


def test_parameters_that_share_a_name_are_matched_by_position() -> None:
    """Two models in one optimizer: by name, the moments of one would go to both."""

    def two(scale: float) -> Lamb:
        params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
        for factor, param in enumerate(params, 1):
            param.grad = torch.full((2,), factor * scale)
        optimizer = Lamb([("weight", param) for param in params])
        optimizer.step()
        return optimizer

    converted = convert_state_dict(two(1.0).state_dict(), two(0.0))
    moments = [converted["state"][index]["exp_avg"] for index in (0, 1)]
    torch.testing.assert_close(moments, [torch.full((2,), 0.1), torch.full((2,), 0.2)])


# -- training arguments and configuration files -----------------------------------------------------------------------

ARGUMENTS = [
    ({"learning_rate": -1.0}, f"Invalid learning rate: -1.0: {NUMBER}"),
    ({"learning_rate": "1e-3"}, r"Invalid learning rate: '1e-3': .*not text \(in YAML, write 1.0e-3 for 1e-3\)"),
    ({"weight_decay": NAN}, f"Invalid weight_decay value: nan: {NUMBER}"),
    ({"adam_beta2": 1.0}, r"Invalid beta parameter at index 1: 1.0: expected a number in \[0, 1\)"),
    ({"adam_epsilon": -1e-8}, f"Invalid eps value: -1e-08: {NUMBER}"),
    ({"optim_args": "max_trust_ratio=0"}, "Invalid max_trust_ratio: 0.0: expected None or a positive number"),
    (
        {"optim_args": "min_trust_ratio=2,max_trust_ratio=1"},
        "min_trust_ratio 2.0 is above max_trust_ratio 1.0: exchange them",
    ),
    ({"optim_args": "foreach=1,fused=1"}, "optim_args: `fused` and `foreach` cannot be `True` together"),
    ({"optim_args": "trust_ratio=1"}, r"optim_args: unknown option 'trust_ratio' \(did you mean \w+_trust_ratio\?\)"),
]
# A stock Trainer answers the first and the last with another example, and the name as soon as it is given.
LAMB_ARGUMENTS = [
    ({"optim_args": {"eps": 1e-6}}, r"optim_args: \{'eps': 1e-06\} is no string; write for example \"eps=1e-06"),
    ({"optim": "lamp"}, "lamp is not a valid OptimizerNames, please select one of .*'lamb'"),
    ({"optim_args": "eps=1e-6;beta1=0.9"}, "'eps=1e-6;beta1=0.9' is not key=value; write for example"),
]


@pytest.mark.parametrize(("options", "message"), ARGUMENTS + LAMB_ARGUMENTS, ids=str)
def test_lamb_training_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """At once, not when model and data have been loaded."""
    refused(lambda: LambTrainingArguments(str(tmp_path), use_cpu=True, **options), ValueError, message)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "message"), ARGUMENTS, ids=str)
def test_training_arguments_under_a_stock_trainer(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """When the stock Trainer makes its optimizer: the first that it hears of LAMB's options."""
    args = TrainingArguments(str(tmp_path), optim="lamb", use_cpu=True, **options)
    refused(lambda: Trainer.get_optimizer_cls_and_kwargs(args, linear()), ValueError, message)


def parse_file(path: Path) -> Any:
    parser = HfArgumentParser(LambTrainingArguments)
    return parser.parse_json_file(path) if path.suffix == ".json" else parser.parse_yaml_file(path)


CONFIGS = [
    (
        "rate.yaml",
        "output_dir: out\nuse_cpu: true\nlearning_rate: 1e-3\n",
        ValueError,
        "'1e-3': .*in YAML, write 1.0e-3",
    ),
    ("optim.yaml", "output_dir: out\nuse_cpu: true\noptim: lamp\n", ValueError, "lamp is not a valid OptimizerNames"),
    ("key.json", '{"output_dir": "out", "otpim": "lamb"}', ValueError, r"Some keys are not used .*\['otpim'\]"),
    ("comma.json", '{"output_dir": "out",}', ValueError, "line 1 column 22"),
    ("missing.json", None, OSError, "No such file or directory: .*missing.json"),
]


@pytest.mark.parametrize(("name", "text", "error", "message"), CONFIGS, ids=[row[0] for row in CONFIGS])
def test_configuration_files(
    name: str, text: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(lambda: parse_file(tmp_path / name), error, message)


# -- the launcher -----------------------------------------------------------------------------------------------------

LAUNCHES = [
    (["missing.py"], r"can't open file '.*/missing\.py': \[Errno 2\] No such file or directory"),
    (["locked.py"], r"can't open file '.*/locked\.py': \[Errno 13\] Permission denied"),
    (["folder"], "can't find '__main__' module in '.*/folder'"),
    (["-m", "no_such_module"], "No module named no_such_module"),
    (["-m", "json"], r"No module named json\.__main__; 'json' is a package and cannot be directly executed"),
]


@pytest.mark.parametrize(("arguments", "message"), LAUNCHES, ids=str)
def test_nothing_to_launch(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2 and Python's own words after the launcher's name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked.py").touch()
    get_data = importlib.machinery.SourceFileLoader.get_data
    monkeypatch.setattr(importlib.machinery.SourceFileLoader, "get_data", no_permission(get_data, "locked.py", at=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"hf_lamb\.run: {message}", line), line


def no_permission(function: Callable[..., Any], name: str, at: int = 0) -> Callable[..., Any]:
    """`function`, but refused what has this name: root, as which tests may run, is allowed to read everything."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if os.path.basename(str(args[at])) == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(args[at]))
        return function(*args, **kwargs)

    return wrapper


# -- the recipe's command line and files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bad files of every kind, as the rows below name them."""
    root = tmp_path_factory.mktemp("files")
    contents = {
        "one.txt": b"one document " * 500,
        "blank.txt": b" \n",
        "invisible.txt": "=== a ===\n\u200b\n=== b ===\n\u200b\n".encode(),  # the tokenizer drops this character
        "latin1.txt": "caf\u00e9 noir".encode("latin-1"),
        "utf16.txt": "text".encode("utf-16"),
        "cut.txt.xz": lzma.compress(b"text" * 99)[:-9],
        "cut.txt.gz": gzip.compress(b"text" * 99, mtime=0)[:-9],
        "not.txt.gz": b"plain text",
        "cut.jsonl": b'{"text": "a"}\n{"text": "b',
        "column.jsonl": b'{"body": "a"}',
        "table.csv": b"text\na",
        "locked.txt": b"text",
        "locked/a.txt": b"text",
        "empty/notes.md": b"text",
        "part/a.txt": b"text",
        "part/locked/b.txt": b"text",
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)

    train_tokenizer(["some text"], 60).save_pretrained(root / "bert")
    shutil.copytree(root / "bert", root / "cut")
    (root / "cut/tokenizer.json").write_text((root / "cut/tokenizer.json").read_text()[:200])
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    special = {"unk_token": "[UNK]", "pad_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(root / "gpt")
    special |= {"cls_token": "[UNK]", "sep_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(root / "unmasked")

    numbers = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    tokenizer = BertTokenizer.from_pretrained(root / "bert")
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **numbers))
    for name, saved in {"model": model, "headless": model.bert, "untokenized": model}.items():
        saved.save_pretrained(root / name)
        if name != "untokenized":
            tokenizer.save_pretrained(root / name)
    train_tokenizer(["some text, and more of it"], 80).save_pretrained(root / "larger")
    tokenizer.pad_token = "[UNK]"
    tokenizer.save_pretrained(root / "padded")
    (root / "gpt2.json").write_text('{"model_type": "gpt2"}')
    return root


# {files} is the folder above. With a message that starts with "usage:" the exit status is 2.
COMMANDS = [
    ("--size huge", "usage: --size 'huge'.*: expected one of smoke"),
    ("--optim lamp", "usage: --optim 'lamp' .did you mean lamb"),
    ("--vocab_size many", "usage: --vocab_size 'many': expected a whole number"),
    ("--learning_rate fast", "usage: --learning_rate 'fast': expected a number"),
    ("--max_seq_length 1e2", "usage: --max_seq_length '1e2': expected a whole number"),
    ("--corpus", "usage: --corpus: expected at least one argument"),
    ("--no_such_option 3", "usage: unknown option '--no_such_option': --help lists all options"),
    ("--learning_rate -1", f"Invalid learning rate: -1.0: {NUMBER}"),
    ("--learning_rate nan", f"Invalid learning rate: nan: {NUMBER}"),
    ("--optim sgd --learning_rate nan", "--learning_rate nan: expected at least 0"),
    ("--optim adamw_torch --learning_rate -1", "--learning_rate -1.0: expected at least 0"),
    ("--optim_args eps=-1", f"Invalid eps value: -1.0: {NUMBER}"),
    ("--max_steps 0", "--max_steps 0: expected at least 1"),
    ("--max_steps -1 --num_train_epochs -1", "--num_train_epochs -1.0: expected at least 0.001"),
    ("--seed -1", r"--seed -1: expected at least 0, and less than 2\*\*32"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers -1: expected at least 0"),
    ("--global_batch_size 0", "--global_batch_size 0: expected at least 1"),
    (
        "--global_batch_size 65536",
        r"65536 is more than the corpus' \d+ training sequences.*: lower it, or give a larger",
    ),
    (
        "--global_batch_size 10 --per_device_train_batch_size 4",
        "--global_batch_size 10 is no multiple of 4 = 4 .--per_dev",
    ),
    ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: expected at least 1"),
    ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0: expected at least 1"),
    ("--gradient_accumulation_steps 3", "_steps 3: leave it out, it follows from --global_batch_size and is 1"),
    ("--vocab_size 10", r"vocab_size=10 is below the \d+ special tokens and characters .*: raise vocab_size"),
    ("--max_seq_length 2", r"block_size=2 has no room between \[CLS\] and \[SEP\]: give 3 or more"),
    ("--mlm_probability 1.5", r"mlm_probability must lie in \(0, 1\], got 1.5"),
    ("--mlm_probability nan", r"mlm_probability must lie in \(0, 1\], got nan"),
    ("--bf16 --fp16", "At most one of fp16 and bf16 can be True"),
    ("--report_to abacus", "abacus is not supported, only .*tensorboard"),
    ("--save_strategy best", "metric_for_best_model. must be provided"),
    (
        "--load_best_model_at_end --save_strategy no",
        "--load_best_model_at_end requires the save and eval strategy to match",
    ),
    ("--corpus {files}/missing.txt", "there is no file '.*/missing.txt': check the path, or use 'embedded'"),
    ("--corpus {files}/*.text", r"there is no file '.*/\*.text': check the path, or use 'embedded'"),
    (
        "--corpus wikipdeia",
        "'wikipdeia' is no local file, and the hub gave no such dataset .*: name text files, a hub",
    ),
    ("--corpus {files}/one.txt", "cannot hold out one of 1 document.s.: give --validation_file, more files, or put a"),
    ("--corpus {files}/blank.txt", "the corpus .*blank.txt.* holds no text: name files with text in them"),
    ("--corpus {files}/invisible.txt", "the documents hold no token: check that their text is not blank"),
    ("--corpus {files}/latin1.txt", "'.*/latin1.txt' is not UTF-8 at byte 3: convert it"),
    ("--corpus {files}/utf16.txt", "'.*/utf16.txt' is not UTF-8 at byte 0: convert it"),
    ("--corpus {files}/cut.txt.xz", "cannot read '.*/cut.txt.xz' .*: check the file"),
    ("--corpus {files}/cut.txt.gz", "cannot read '.*/cut.txt.gz' .*: check the file"),
    ("--corpus {files}/not.txt.gz", "cannot read '.*/not.txt.gz' .Not a gzipped file.*: check the file"),
    ("--corpus {files}/cut.jsonl", "cut.jsonl:2 is not JSON .*: give one object a line"),
    ("--corpus {files}/column.jsonl", 'column.jsonl:1 has no string "text": give lines like'),
    ("--corpus {files}/table.csv", "cannot read '.*/table.csv': give .txt"),
    (
        "--corpus {files}/locked.txt",
        "cannot read '.*/locked.txt' .*Permission denied.*: check the file and its permissions",
    ),
    ("--corpus {files}/locked", "cannot read the folder '.*/locked' .Permission denied.: check its permissions"),
    ("--corpus {files}/part", "cannot read the folder '.*/part/locked' .Permission denied.: check its permissions"),
    ("--corpus {files}/empty", "the folder '.*/empty' holds no .txt, .* file: name another"),
    ("--validation_file {files}/missing.txt", "there is no file '.*/missing.txt': check the path"),
    ("--validation_file {files}/invisible.txt", "the documents hold no token: check that their text is not blank"),
    (
        "--streaming --corpus embedded",
        "--streaming takes one hub dataset, got --corpus embedded: leave --streaming out",
    ),
    ("--streaming --corpus some/set", "'some/set' is no local file, and the hub gave no such dataset"),
    ("--tokenizer_name {files}/gpt", "the tokenizer .*/gpt has no cls and no sep token: use a BERT one"),
    ("--tokenizer_name {files}/unmasked", "has no mask token: use a BERT-like tokenizer"),
    (
        "--tokenizer_name {files}/cut",
        "--tokenizer_name .*/cut cannot be loaded .*: name a folder that save_pretrained wr",
    ),
    (
        "--tokenizer_name {files}/empty",
        "--tokenizer_name .*/empty cannot be loaded .*: name a folder that save_pretrain",
    ),
    (
        "--tokenizer_name bert-base-uncased",
        "bert-base-uncased cannot be loaded .*or a hub tokenizer that can be reached",
    ),
    ("--output_dir {files}/one.txt", "cannot write to --output_dir .*/one.txt .File exists.: name another"),
    (
        "--output_dir {files}/one.txt/runs",
        "cannot write to --output_dir .*/one.txt/runs .Not a directory.: name another",
    ),
    ("--resume_from_checkpoint latest", "--resume_from_checkpoint latest: there is no checkpoint in .*/out"),
    ("--resume_from_checkpoint {files}/part", ".*/part is no checkpoint: it has no trainer_state.json"),
]

ONE_MODEL = ": give one of them, each names a model of its own"
MODELS = [
    ("--size smoke --model_type bert", f"--size smoke and --model_type bert{ONE_MODEL}"),
    (
        "--model_name_or_path {files}/model --config_name {files}/model",
        f"--model_name_or_path .*/model and --config_name .*/model{ONE_MODEL}",
    ),
    (
        "--model_name_or_path {files}/model --model_type bert",
        f"--model_name_or_path .*/model and --model_type bert{ONE_MODEL}",
    ),
    (
        "--model_type modernbrt",
        r"--model_type modernbrt \(did you mean modernbert\?\).*no masked LM of this type: expected one of albert, b",
    ),
    ("--model_type gpt2", "--model_type gpt2: transformers has no masked LM of this type: expected one of albert"),
    ("--model_type bart", "--model_type bart is of type bart, which is no encoder .*: name one such as bert, roberta"),
    ("--config_name {files}/gpt2.json", "--config_name .*gpt2.json is of type gpt2, which is no encoder .*: name one"),
    (
        "--config_overrides hidden_size=8",
        "--config_overrides hidden_size=8: it changes the numbers of --model_type: give that, or write them into a fi",
    ),
    (
        "--model_name_or_path {files}/model --config_overrides hidden_size=8",
        "--config_overrides hidden_size=8: it changes the numbers of --model_type: give that, or write them into a fi",
    ),
    (
        "--model_type bert --config_overrides hiden_size=8",
        "--config_overrides hiden_size=8 .key hiden_size isn't in .*: give name=value,name=value with names of BertC",
    ),
    ("--model_type bert --config_overrides hidden_size", "--config_overrides hidden_size .*: give name=value,name=v"),
    (
        "--model_type bert --config_overrides hidden_size=31",
        "--model_type bert --config_overrides hidden_size=31: transformers cannot build this model .*31.*: change one",
    ),
    (
        "--model_type bert --config_overrides vocab_size=50",
        r"has \d+ tokens, --model_type bert embeddings for 50: leave vocab_size out of --config_overrides, or write",
    ),
    (
        "--model_type roberta --config_overrides max_position_embeddings=64",
        "--max_seq_length 64: --model_type roberta has positions for 63 tokens: lower it, or set max_position_em.* 65",
    ),
    (
        "--model_type bert --attn_implementation fast",
        "--model_type bert --attn_implementation fast: transformers cannot build this model .*fast.*: change one of",
    ),
    (
        "--model_type albert --config_overrides hidden_size=8,num_attention_heads=2 --gradient_checkpointing",
        "--gradient_checkpointing: leave it out, transformers' AlbertForMaskedLM has none",
    ),
    ("--size smoke --attn_implementation fast", "--size smoke --attn_implementation fast: transformers cannot build"),
    ("--config_name {files}/nowhere", "--config_name .*/nowhere cannot be loaded .*: name a folder that save_pretra"),
    ("--model_name_or_path {files}/empty", "--model_name_or_path .*/empty cannot be loaded .*: name a folder that sa"),
    (
        "--model_name_or_path bert-base-uncased",
        "--model_name_or_path bert-base-uncased cannot be loaded .*: name .* or a model of the hub that can be reache",
    ),
    (
        "--model_name_or_path {files}/untokenized",
        "--model_name_or_path .*/untokenized: its tokenizer cannot be loaded .*: give --tokenizer_name",
    ),
    (
        "--model_name_or_path {files}/headless --max_seq_length 32",
        r"--model_name_or_path .*/headless has no weights for cls\.predictions\.bias.* and \d more of Bert.*: "
        "give a checkpoint that was saved with its masked-LM head",
    ),
    (
        "--model_name_or_path {files}/model --max_seq_length 64",
        "--max_seq_length 64: --model_name_or_path .*/model has positions for 32 tokens: lower it",
    ),
    (
        "--model_name_or_path {files}/model --tokenizer_name {files}/larger",
        r"the tokenizer .*/larger has \d+ tokens, --model_name_or_path .*/model embeddings for \d+: leave --tokeniz",
    ),
    (
        "--model_name_or_path {files}/model --tokenizer_name {files}/padded",
        "the tokenizer .*/padded pads with id 1, --model_name_or_path .*/model with 0: leave --tokenizer_name out",
    ),
    (
        "--model_name_or_path {files}/model --carry_over moments",
        "--carry_over moments: .*/model is no checkpoint: it has no trainer_state.json: leave --carry_over out",
    ),
    (
        "--model_type bert --tokenizer_name {files}/unmasked",
        "has no mask token: use a BERT-like tokenizer",
    ),
]


@pytest.mark.parametrize(
    ("small", "command", "message"),
    [*((SMALL, *row) for row in COMMANDS), *((SMALL[2:], *row) for row in MODELS)],
    ids=[row[0] for row in COMMANDS + MODELS],
)
def test_commands_of_the_recipe(
    small: list[str],
    command: str,
    message: str,
    files: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The recipe ends before it trains, and the output directory holds nothing."""
    if "the hub gave no such dataset" in message:
        pytest.importorskip("datasets")
    monkeypatch.setitem(recipes.lib.corpus.OPENERS, ".txt", no_permission(open, "locked.txt"))
    monkeypatch.setattr(os, "scandir", no_permission(os.scandir, "locked"))
    output = tmp_path / "out"
    arguments = command.format(files=files).split()
    with pytest.raises(SystemExit) as stopped:
        pretrain(monkeypatch, *small, "--corpus", str(texts), "--output_dir", str(output), *arguments)
    if message.startswith("usage: "):
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        message = message.replace("usage: ", "^pretrain_bert: ")
    else:
        line = str(stopped.value.code)
        assert line.startswith("pretrain_bert: ")
    says(line, message)
    assert not list(output.rglob("*"))
    assert (files / "one.txt").read_bytes() == b"one document " * 500


# -- checkpoints of others --------------------------------------------------------------------------------------------


def save(state_dict: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(state_dict, path)


def other_shapes(path: Path) -> None:
    state_dict = torch.load(path)
    state_dict["state"][0]["exp_avg"] = torch.ones(3)
    torch.save(state_dict, path)


def as_adamw(path: Path) -> None:
    state_dict = torch.load(path)
    for group in state_dict["param_groups"]:
        group["amsgrad"] = False
    torch.save(state_dict, path)


OPTIMIZER_FILES = [
    (
        "of another model",
        other_shapes,
        r"exp_avg of bert\..* has shape \(3,\), the parameter .*: load a state dict of this model",
    ),
    ("of AdamW", as_adamw, "convert_state_dict.* is an Adam's .its groups have amsgrad"),
    ("of fewer groups", save(changed()), "has a different number of parameter groups"),
    ("a model", save({"weight": torch.ones(2)}), f"{NONE}weight"),
    ("truncated", lambda path: os.truncate(path, path.stat().st_size // 2), r"optimizer\.pt"),
    ("a text", lambda path: path.write_text("404: not found"), r"optimizer\.pt"),
]


@pytest.mark.parametrize(
    ("damage", "message"), [row[1:] for row in OPTIMIZER_FILES], ids=[row[0] for row in OPTIMIZER_FILES]
)
def test_optimizer_files_that_a_run_cannot_go_on_from(
    damage: Callable[[Path], None],
    message: str,
    finished: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends where it would have resumed; the checkpoint stays as it was."""
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", checkpoint)
    damage(checkpoint / "optimizer.pt")
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    arguments = ["--corpus", str(texts), "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(checkpoint)]
    with pytest.raises(SystemExit) as stopped:
        pretrain(monkeypatch, *SMALL, *arguments)
    says(str(stopped.value.code), f"^pretrain_bert: checkpoint-4.*{message}")
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert not list(tmp_path.glob("results*"))


# -- a full disk ------------------------------------------------------------------------------------------------------


def full_disk(path: Path, *_: Any, **__: Any) -> None:
    """Writes the beginning, then fails as the kernel does: without a file name."""
    with open(path, "w") as file:
        file.write('{"half": ')
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


HISTORY = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}]
WRITERS = [
    ("results.jsonl", lambda path: append_json_line(path, {"score": 2})),
    ("training.png", lambda path: plot_training(HISTORY, path, "title")),
]


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[row[0] for row in WRITERS])
@pytest.mark.parametrize("there", [True, False], ids=["again", "first"])
def test_a_full_disk_leaves_the_old_file_whole(
    name: str, write: Callable[[Path], None], there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing beside it; the message has the file's name."""
    path = tmp_path / name
    if there:
        write(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full_disk)
        disk.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: full_disk(path))
        refused(lambda: write(path), OSError, f"No space left on device; not written: '.*{name}'")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    write(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_somebody_left_unfinished_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"score": 1}\n{"sco')
    append_json_line(path, {"score": 2})
    lines = path.read_text().splitlines()
    assert (lines[0], lines[1], json.loads(lines[2])) == ('{"score": 1}', '{"sco', {"score": 2})


def test_a_full_disk_leaves_no_half_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be taken from the cache by every later run."""

    def save_pretrained(tokenizer: BertTokenizer, folder: Path) -> None:
        folder.mkdir(parents=True)
        full_disk(folder / "tokenizer.json")

    monkeypatch.setattr(BertTokenizer, "save_pretrained", save_pretrained)
    message = f"cannot keep a tokenizer in '{tmp_path}' .*No space left on device.*: set HF_HOME"
    refused(lambda: load_or_train_tokenizer(["some text"], 60, tmp_path), ValueError, message)
    assert not list(tmp_path.iterdir())
