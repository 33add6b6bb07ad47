"""`optim="lamb"` in transformers: the name, whoever is imported first, and the options that reach `Lamb`."""

import copy
import dataclasses
import enum
import importlib
import inspect
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_lamb
from hf_lamb import Lamb, LambTrainer, LambTrainingArguments, lamb_param_groups, registration
from hf_lamb.optim_args import parse_optim_args
from hf_lamb.registration import register
from tests.helpers import one_line, says


def python(program: str, *args: object) -> str:
    """Run a program in a fresh interpreter that can import hf_lamb; its standard output."""
    paths = [str(Path(hf_lamb.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def arguments(tmp_path: Path, **options: object) -> TrainingArguments:
    return TrainingArguments(
        **{"output_dir": str(tmp_path), "optim": "lamb", "use_cpu": True, "report_to": "none", **options}
    )


# ---- The name, in every import order --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(
            """
            import hf_lamb
            assert "transformers" not in sys.modules, "import hf_lamb must not import transformers"
            import transformers.trainer_optimizer
            """,
            id="hf_lamb first",
        ),
        pytest.param(
            """
            import transformers.trainer_optimizer
            import hf_lamb
            """,
            id="transformers first",
        ),
        pytest.param(
            """
            import transformers.training_args
            assert "transformers.trainer_optimizer" not in sys.modules
            import hf_lamb
            import transformers.trainer_optimizer
            """,
            id="hf_lamb between the two",
        ),
    ],
)
def test_lamb_is_an_optimizer_of_transformers_in_any_import_order(imports: str) -> None:
    program = f"""
import sys
finders = list(sys.meta_path)
{textwrap.dedent(imports)}
from transformers.training_args import OptimizerNames
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS

assert OptimizerNames("lamb") is OptimizerNames.LAMB
assert _OPTIMIZER_HANDLERS[OptimizerNames.LAMB].__module__ == "hf_lamb.optim_args"
assert [m.value for m in OptimizerNames].count("lamb") == 1
left = [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_lamb")]
assert not left, f"{{left}} stays in sys.meta_path"
print("done")
"""
    assert python(program) == "done\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a small stand-in for transformers in the place of the real one: `fake(module=source)` writes it."""

    def write(**modules: str) -> None:
        sources = {
            "__init__": "__version__ = '7.7'",
            "training_args": """
                import enum
                class OptimizerNames(str, enum.Enum):
                    SGD = "sgd"
            """,
            "trainer_optimizer": """
                from .training_args import OptimizerNames
                _OPTIMIZER_HANDLERS = {OptimizerNames.SGD: "theirs"}
            """,
        }
        package = tmp_path / "transformers"
        package.mkdir()
        for name, source in (sources | modules).items():
            if source:
                (package / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        register()

    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        yield write
    register()  # where the real one is not loaded yet, wait for it again


def test_registering_leaves_the_import_system_as_it_was(fake) -> None:
    """find_spec, the loaders and sys.meta_path: nothing of the hook stays once both modules are patched."""
    fake()
    assert importlib.util.find_spec("transformers.trainer_optimizer").origin.endswith("trainer_optimizer.py")

    import transformers.trainer_optimizer as handlers
    import transformers.training_args as names

    for module in (handlers, names):
        assert "exec_module" not in vars(module.__spec__.loader)
        assert Path(inspect.getsourcefile(module)) == Path(module.__file__)
    assert registration._FINDER not in sys.meta_path
    assert handlers._OPTIMIZER_HANDLERS[names.OptimizerNames.SGD] == "theirs"


def test_registering_again_changes_nothing_and_mends_a_reload(fake) -> None:
    fake()
    import transformers.trainer_optimizer as handlers
    import transformers.training_args as names

    lamb, table = names.OptimizerNames.LAMB, dict(handlers._OPTIMIZER_HANDLERS)
    register()
    assert names.OptimizerNames.LAMB is lamb
    assert len(names.OptimizerNames) == 2
    assert table == handlers._OPTIMIZER_HANDLERS

    importlib.reload(names)
    assert len(names.OptimizerNames) == 1
    register()
    assert names.OptimizerNames("lamb") is names.OptimizerNames.LAMB


def test_an_import_that_failed_can_be_repeated(fake) -> None:
    """The hook waits until the module's code has run to its end."""
    fake(trainer_optimizer="import missing_on_purpose\n_OPTIMIZER_HANDLERS = {}")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformers.trainer_optimizer")
    with mock.patch.dict(sys.modules, missing_on_purpose=mock.Mock()):
        handlers = importlib.import_module("transformers.trainer_optimizer")
    assert "lamb" in handlers._OPTIMIZER_HANDLERS


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        pytest.param(
            {
                "training_args": """
                    import enum
                    class OptimizerNames(str, enum.Enum):
                        LAMB = "lamb"
                """,
                "trainer_optimizer": "_OPTIMIZER_HANDLERS = {'lamb': 'theirs'}",
            },
            "has a LAMB of its own, which stays in place",
            id="a LAMB of its own",
        ),
        pytest.param({"trainer_optimizer": ""}, "has no table of optimizer handlers (added in 5.2)", id="before 5.2"),
        pytest.param(
            {"training_args": "x = 1", "trainer_optimizer": "_OPTIMIZER_HANDLERS = {}"},
            "differs from what hf_lamb knows (no OptimizerNames)",
            id="an unknown future",
        ),
    ],
)
def test_a_transformers_that_cannot_be_served_is_left_alone_with_one_warning(
    fake, caplog: pytest.LogCaptureFixture, modules: dict[str, str], reason: str
) -> None:
    """Never a silent takeover of somebody else's LAMB, and never a transformers that no longer imports."""
    fake(**modules)
    names = importlib.import_module("transformers.training_args")
    if modules["trainer_optimizer"]:
        table = importlib.import_module("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
        handler = table.get("lamb")
        assert handler == "theirs" or handler.__module__ == "hf_lamb.optim_args"
    register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    says(record.getMessage(), f"{re.escape(f'transformers 7.7 {reason}')}.*optimizer_cls_and_kwargs=.*hf_lamb.Lamb")
    ours = [m for m in getattr(names, "OptimizerNames", ()) if "__reduce_ex__" in vars(m)]
    assert not ours


def test_an_added_member_is_a_member_in_every_respect() -> None:
    class Colour(str, enum.Enum):  # noqa: UP042 - these are the bases of transformers' ExplicitEnum
        RED = "red"

    green = registration.add_member(Colour, "GREEN", "green")
    assert list(Colour) == [Colour.RED, green]
    assert Colour("green") is Colour["GREEN"] is Colour.GREEN is green
    assert (green.name, green.value, str.__str__(green)) == ("GREEN", "green", "green")
    assert isinstance(green, Colour)
    assert hash(green) == hash("green")
    assert {"green": 1}[green] == 1
    assert copy.copy(green) is copy.deepcopy(green) is green
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert type(pickle.loads(pickle.dumps(green, protocol))) is str
    assert "__reduce_ex__" not in vars(Colour.RED)


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_adding_a_member_works_on_other_pythons(version: str) -> None:
    """The insides of enum differ between versions; this runs on whichever of them are installed."""
    interpreter = shutil.which(f"python{version}")
    if interpreter is None or subprocess.run([interpreter, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no python{version} here")
    functions = (registration.add_member, test_an_added_member_is_a_member_in_every_respect)
    sources = "".join(inspect.getsource(function) for function in functions).replace("registration.", "")
    program = f"import copy, enum, pickle\n{sources}\n{functions[-1].__name__}()"
    done = subprocess.run([interpreter, "-I", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- The name, in every way to give it ------------------------------------------------------------------------------


def from_json(path: Path, options: dict[str, object]) -> TrainingArguments:
    (path / "args.json").write_text(json.dumps(options))
    return HfArgumentParser(TrainingArguments).parse_json_file(path / "args.json")[0]


def from_yaml(path: Path, options: dict[str, object]) -> TrainingArguments:
    (path / "args.yaml").write_text(json.dumps(options))  # JSON is YAML
    return HfArgumentParser(TrainingArguments).parse_yaml_file(path / "args.yaml")[0]


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda path, options: TrainingArguments(**options), id="constructor"),
        pytest.param(lambda path, options: HfArgumentParser(TrainingArguments).parse_dict(options)[0], id="dict"),
        pytest.param(from_json, id="json"),
        pytest.param(from_yaml, id="yaml"),
        pytest.param(
            lambda path, options: TrainingArguments(str(path), use_cpu=True).set_optimizer(name="lamb"),
            id="set_optimizer",
        ),
    ],
)
def test_lamb_is_accepted_wherever_an_optimizer_is_named(build, tmp_path: Path) -> None:
    args = build(tmp_path, {"output_dir": str(tmp_path), "use_cpu": True, "optim": "lamb"})
    assert args.optim is OptimizerNames.LAMB
    assert args.to_dict()["optim"] == "lamb"
    assert json.loads(args.to_json_string())["optim"] == "lamb"
    assert args.to_sanitized_dict()["optim"] == "lamb"
    assert copy.deepcopy(args).optim is OptimizerNames.LAMB
    assert dataclasses.replace(args, learning_rate=1e-2).optim is OptimizerNames.LAMB


def test_the_command_line_lists_lamb_and_refuses_its_misspelling(capsys: pytest.CaptureFixture[str]) -> None:
    parser = HfArgumentParser(TrainingArguments)
    assert "lamb" in next(action for action in parser._actions if action.dest == "optim").choices
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", "unused", "--optim", "lamp"])
    assert re.search(r"--optim: invalid choice: 'lamp' \(choose from .*\blamb\b", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["LAMB", "Lamb", " lamb ", "OptimizerNames.LAMB", "hf_lamb"])
@pytest.mark.parametrize("cls", [TrainingArguments, LambTrainingArguments])
def test_a_lamb_in_other_letters_is_answered_with_the_name(cls, name: str, tmp_path: Path) -> None:
    """In one line, where transformers lists all its optimizers."""
    wanted = re.escape(f'optim={name!r}: write optim="lamb" (--optim lamb)')
    for build in (cls, HfArgumentParser(cls).parse_dict):
        options = {"output_dir": str(tmp_path), "optim": name}
        with pytest.raises(ValueError, match=f"^{wanted}$"):
            build(**options) if build is cls else build(options)


def test_other_misspelt_optimizers_get_transformers_own_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^lamp is not a valid OptimizerNames, please select one of"):
        TrainingArguments(str(tmp_path), optim="lamp")


# ---- The options ----------------------------------------------------------------------------------------------------


def test_optim_args_takes_every_option_of_lamb_typed() -> None:
    text = (
        "beta1=0.8,beta2=0.99, eps=1e-7, bias_correction=false, layer_adaptation=yes, min_trust_ratio=0.1,"
        "max_trust_ratio=10, fixed_norm=1, max_grad_norm=none, skip_nonfinite=0, maximize=True,"
        "foreach=1, fused=None, adapt_all=no, split=no"
    )
    assert parse_optim_args(text) == {
        "beta1": 0.8,
        "beta2": 0.99,
        "eps": 1e-7,
        "bias_correction": False,
        "layer_adaptation": True,
        "min_trust_ratio": 0.1,
        "max_trust_ratio": 10.0,
        "fixed_norm": True,
        "max_grad_norm": None,
        "skip_nonfinite": False,
        "maximize": True,
        "foreach": True,
        "fused": None,
        "adapt_all": False,
        "split": False,
    }
    own = set(inspect.signature(Lamb).parameters) - {"params", "lr", "betas", "weight_decay"}
    assert set(parse_optim_args(text)) == own | {"beta1", "beta2", "adapt_all", "split"}
    assert parse_optim_args(None) == parse_optim_args("") == {}


ALL = (
    "beta1, beta2, eps, bias_correction, layer_adaptation, min_trust_ratio, max_trust_ratio, fixed_norm, "
    "max_grad_norm, skip_nonfinite, maximize, foreach, fused, adapt_all, split"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_trust=10", f"unknown option 'max_trust' (did you mean max_trust_ratio?); LAMB has {ALL}"),
        ("momentum=0.9", f"unknown option 'momentum'; LAMB has {ALL}"),
        ("lr=1e-3", "lr is not set here; use --learning_rate"),
        ("learning_rate=1e-3", "learning_rate is not set here; use --learning_rate"),
        ("weight_decay=0.1", "weight_decay is not set here; use --weight_decay"),
        ("betas=(0.9,0.99)", "betas is not set here; use --adam_beta1 and --adam_beta2 (a value holds no comma)"),
        (
            "max_trust_ratio:10",
            "'max_trust_ratio:10' is not key=value; write for example \"eps=1e-6,max_trust_ratio=10\"",
        ),
        ("eps=1;foreach=1", "'eps=1;foreach=1' is not key=value; write for example \"eps=1e-6,max_trust_ratio=10\""),
        ('{"eps": 1}', '\'{"eps":1}\' is not key=value; write for example "eps=1e-6,max_trust_ratio=10"'),
        ("eps='1e-6'", "eps='1e-6': expected a number"),
        ("EPS=1e-6", f"unknown option 'EPS' (did you mean eps?); LAMB has {ALL}"),
        (
            {"eps": 1e-6, "foreach": True},
            "{'eps': 1e-06, 'foreach': True} is no string; write for example \"eps=1e-06,foreach=True\"",
        ),
        (
            {"betas": (0.9, 0.98)},
            "{'betas': (0.9, 0.98)} is no string; write for example \"eps=1e-6,max_trust_ratio=10\"",
        ),
        (["eps=1e-6"], "['eps=1e-6'] is no string; write for example \"eps=1e-6,max_trust_ratio=10\""),
        ("eps=small", "eps=small: expected a number"),
        ("eps=none", "eps=none: expected a number"),
        ("max_trust_ratio=ten", "max_trust_ratio=ten: expected a number or none"),
        ("bias_correction=off", "bias_correction=off: expected true or false"),
        ("bias_correction=none", "bias_correction=none: expected true or false"),
        ("foreach=maybe", "foreach=maybe: expected true or false or none"),
        ("eps=1e-6,eps=1e-7", "eps is given twice"),
        ("eps", "'eps' is not key=value; write for example \"eps=1e-6,max_trust_ratio=10\""),
        ("eps=1e-6,", "'' is not key=value; write for example \"eps=1e-6,max_trust_ratio=10\""),
        ("eps=", "'eps=' is not key=value; write for example \"eps=1e-6,max_trust_ratio=10\""),
        ("=1", "'=1' is not key=value; write for example \"eps=1e-6,max_trust_ratio=10\""),
        ("eps=1=2", "'eps=1=2' is not key=value; write for example \"eps=1e-6,max_trust_ratio=10\""),
    ],
)
def test_bad_optim_args_are_refused_by_name_with_a_way_out(text: str, message: str) -> None:
    with one_line(ValueError, re.escape(f"optim_args: {message}")):
        parse_optim_args(text)


MALFORMED = [
    ("betas=(0.9,0.98)", "betas is not set here; use --adam_beta1 and --adam_beta2 (a value holds no comma)"),
    ("max_trust_ratio:10", "'max_trust_ratio:10' is not key=value; write for example"),
    ("eps=1e-6;max_trust_ratio=10", "'eps=1e-6;max_trust_ratio=10' is not key=value; write for example"),
    ("eps=1e-6,", "'' is not key=value; write for example"),
    ({"max_trust_ratio": 10}, "{'max_trust_ratio': 10} is no string; write for example \"max_trust_ratio=10\""),
    (10, "10 is no string; write for example"),
]


@pytest.mark.parametrize("optim", ["lamb", "adamw_torch"])
@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_the_stock_trainer_names_what_it_cannot_read(tmp_path: Path, model, optim: str, text, message: str) -> None:
    """It splits the text itself, before it looks for LAMB, with "not enough values to unpack" or an AttributeError."""
    trainer = Trainer(model, arguments(tmp_path, optim_args=text, optim=optim))
    with one_line(ValueError, re.escape(f"optim_args: {message}")):
        trainer.create_optimizer()


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_lamb_training_arguments_name_it_before_anything_is_loaded(tmp_path: Path, text, message: str) -> None:
    with one_line(ValueError, re.escape(f"optim_args: {message}")):
        LambTrainingArguments(str(tmp_path), optim_args=text)


@pytest.mark.parametrize(
    "imports", ["import hf_lamb, transformers.trainer", "import transformers.trainer, hf_lamb", "import transformers"]
)
def test_it_is_named_in_any_import_order(imports: str) -> None:
    program = f"""
        {imports}
        import hf_lamb, transformers
        for text in ("eps:1", "eps=1,b=2"):
            try:
                print(transformers.trainer._parse_optim_args(text))
            except ValueError as error:
                print(error)
    """
    said = "optim_args: 'eps:1' is not key=value; write for example \"key=value,key=value\"\n"
    assert python(program) == said + "{'eps': '1', 'b': '2'}\n"


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}


def tiny_bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES))


@pytest.fixture(scope="module")
def model() -> BertForMaskedLM:
    return tiny_bert()


def test_the_trainer_gets_lamb_with_the_arguments_it_was_given(tmp_path: Path, model: BertForMaskedLM) -> None:
    args = arguments(
        tmp_path,
        learning_rate=4e-3,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.98,
        adam_epsilon=1e-5,
        optim_args="beta2=0.95,max_trust_ratio=10",
    )
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert issubclass(kind, Lamb)
    assert kwargs == {"lr": 4e-3, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1, "max_trust_ratio": 10.0}

    optimizer = Trainer(model, args).create_optimizer()
    assert type(optimizer) is Lamb
    groups = optimizer.param_groups
    assert {group["name"]: (group["weight_decay"], group["layer_adaptation"]) for group in groups} == {
        "decay, adapt": (0.1, True),
        "no_decay, no_adapt": (0.0, False),
    }
    assert {name for group in groups for name in group["param_names"]} == {
        name for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("optim_args", "adapting"),
    [
        pytest.param(None, {"decay": True, "no_decay": False}, id="default"),
        pytest.param("adapt_all=true", {"decay": True, "no_decay": True}, id="adapt_all"),
        # The groups hold an option of the same name, which must not overrule it.
        pytest.param("layer_adaptation=false", {"decay": False, "no_decay": False}, id="no layer_adaptation"),
    ],
)
def test_what_adapts_follows_optim_args(tmp_path: Path, model, optim_args: str | None, adapting) -> None:
    trainer = Trainer(model, arguments(tmp_path, optim_args=optim_args, weight_decay=0.1))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, Lamb)
    found = {"decay" if g["weight_decay"] else "no_decay": g["layer_adaptation"] for g in optimizer.param_groups}
    assert found == adapting


def test_fixed_norm_in_optim_args_is_for_hidden_matrices(tmp_path: Path, model) -> None:
    trainer = Trainer(model, arguments(tmp_path, optim_args="fixed_norm=true", weight_decay=0.1))
    optimizer = trainer.create_optimizer()
    expected = {
        name for g in lamb_param_groups(model, fixed_norm=True) if g["fixed_norm"] for name in g["param_names"]
    }
    assert expected
    assert {name for g in optimizer.param_groups if g["fixed_norm"] for name in g["param_names"]} == expected


def flags_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


class NoDecayOfEmbeddings(Trainer):
    """What a subclass may say since transformers 4.35."""

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if "embeddings" not in name]


class RateOfEmbeddings(Trainer):
    """Takes groups apart as sentence-transformers' `learning_rate_mapping` does: plain tensors, no names."""

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: torch.nn.Module | None = None):
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        decaying = self.get_decay_parameter_names(model)
        named = dict(model.named_parameters())
        chosen = {name: p for name, p in named.items() if "embeddings" in name}
        key = "params" if "params" in kwargs else "optimizer_dict"
        groups = kwargs.setdefault(
            key,
            [
                {
                    "params": [p for name, p in named.items() if (name in decaying) == decays],
                    "weight_decay": 0.1 * decays,
                }
                for decays in (True, False)
            ],
        )
        for group in groups:
            group["params"] = [p for p in group["params"] if all(p is not other for other in chosen.values())]
        for decays in (True, False):
            members = [p for name, p in chosen.items() if (name in decaying) == decays]
            groups.append({"params": members, "lr": 1e-4, "weight_decay": 0.1 * decays})
        return cls, kwargs


@pytest.mark.parametrize("cls", [Trainer, NoDecayOfEmbeddings, RateOfEmbeddings])
@pytest.mark.parametrize("own", [False, True])
def test_decay_and_rates_are_those_of_adamw_and_adaptation_goes_by_the_rule(tmp_path: Path, cls, own: bool) -> None:
    """What a subclass of Trainer says of decay and rates holds for LAMB as for AdamW, under LambTrainer too."""
    lamb_cls, lamb_args = (LambTrainer, LambTrainingArguments) if own else (Trainer, TrainingArguments)
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "weight_decay": 0.1}
    adamw = cls(tiny_bert(), TrainingArguments(**options, learning_rate=1e-3, optim="adamw_torch"))
    mixed = cls if cls in (Trainer, lamb_cls) else type(cls.__name__, (cls, lamb_cls), {})
    lamb = (lamb_cls if cls is Trainer else mixed)(tiny_bert(), lamb_args(**options, learning_rate=1e-3, optim="lamb"))
    optimizer = lamb.create_optimizer()
    assert type(optimizer) is Lamb
    assert flags_of(optimizer, lamb.model) == flags_of(adamw.create_optimizer(), adamw.model)

    names = {param: name for name, param in lamb.model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[param] for param in group["params"]]
        assert group["layer_adaptation"] == (not any("bias" in n or "LayerNorm" in n for n in group["param_names"]))


def test_groups_without_names_or_with_too_many_are_never_mislabelled(model: BertForMaskedLM) -> None:
    """Whoever filters "params" must filter "param_names" too."""
    groups = lamb_param_groups(model)
    del groups[0]["params"][1]
    count = len(groups[0]["params"])
    with pytest.raises(ValueError, match=f"has {count} parameters and {count + 1} param_names: remove the same"):
        Lamb(groups)


def test_sentence_transformers_learning_rate_mapping(tmp_path: Path) -> None:
    """Where it is installed: its own Trainer with LAMB takes apart and adds groups as with AdamW."""
    pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses, models
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from transformers import BertModel

    from recipes.lib.tokenizer import train_tokenizer

    words = ["one two three four five six seven eight"]
    tokenizer = train_tokenizer(words * 4, 100)
    tokenizer.save_pretrained(tmp_path / "bert")
    config = BertConfig(**SIZES | {"vocab_size": len(tokenizer)})
    BertModel(config).save_pretrained(tmp_path / "bert")
    rows = Dataset.from_dict({"anchor": ["one two", "three four"] * 4, "positive": ["two", "four"] * 4})

    flags = []
    for optim in ("adamw_torch", "lamb"):
        modules = [models.Transformer(str(tmp_path / "bert")), models.Pooling(32)]
        encoder = SentenceTransformer(modules=modules, device="cpu")
        args = Arguments(
            output_dir=str(tmp_path / optim),
            optim=optim,
            learning_rate=1e-3,
            weight_decay=0.1,
            learning_rate_mapping={"embeddings": 1e-4},
            max_steps=1,
            use_cpu=True,
            report_to=[],
        )
        loss = losses.MultipleNegativesRankingLoss(encoder)
        trainer = SentenceTransformerTrainer(model=encoder, args=args, train_dataset=rows, loss=loss)
        flags.append(flags_of(trainer.create_optimizer(), encoder))
        trainer.train()
    assert flags[0] == flags[1]
    assert {rate for rate, _ in flags[1].values()} == {1e-3, 1e-4}


class Poisoned(torch.nn.Module):
    """NaN gradients in its first steps."""

    def __init__(self, bad_steps: int) -> None:
        super().__init__()
        self.weight, self.left = torch.nn.Parameter(torch.ones(4)), bad_steps

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.left -= 1
        loss = self.weight.sum() + 0 * (input_ids.sum() + labels.sum())
        return {"loss": loss * float("nan") if self.left >= 0 else loss}


@pytest.mark.parametrize(
    ("bad_steps", "steps", "warned", "raised"),
    [
        pytest.param(0, 25, None, False, id="no step"),
        pytest.param(1, 3, "1 of the first 1 steps skipped", False, id="the first"),
        pytest.param(3, 3, "1 of the first 1 steps skipped", False, id="all of a short run"),
        pytest.param(100, 30, "1 of the first 1 steps skipped", True, id="all of a long run"),
    ],
)
def test_a_stock_trainer_tells_of_skipped_steps_and_ends_a_run_that_only_skips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad_steps: int, steps: int, warned: str | None, raised: bool
) -> None:
    """It would log a loss of 0.0 and end as if all were well."""
    args = arguments(tmp_path, learning_rate=1e-3, max_steps=steps, save_strategy="no", disable_tqdm=True)
    trainer = Trainer(Poisoned(bad_steps), args, train_dataset=batches())
    with pytest.raises(RuntimeError, match="the last 20 steps were skipped") if raised else nullcontext():
        trainer.train()
    lines = [line for line in caplog.messages if "skipped" in line]
    assert len(lines) == (warned is not None), "said once, or not at all"
    assert all(warned in line for line in lines)
    assert pickle.loads(pickle.dumps(trainer.optimizer.optimizer)).state_dict().keys() == {"state", "param_groups"}


def test_frozen_parameters_stay_out(tmp_path: Path) -> None:
    """What a PEFT model looks like to the handler: most parameters do not require a gradient."""
    model = tiny_bert().requires_grad_(False)
    model.cls.predictions.transform.dense.weight.requires_grad_(True)
    optimizer = Trainer(model, arguments(tmp_path)).create_optimizer()
    assert [group["param_names"] for group in optimizer.param_groups] == [["cls.predictions.transform.dense.weight"]]


def test_without_a_model_the_caller_brings_the_groups(tmp_path: Path) -> None:
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, weight_decay=0.1))
    assert "params" not in kwargs
    optimizer = Lamb([torch.nn.Parameter(torch.ones(2))], **kwargs)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("options", "eps", "said"),
    [
        pytest.param({}, None, "eps is 1e-06, LAMB's default, because adam_epsilon is at Trainer's", id="default"),
        pytest.param({"adam_epsilon": 1e-7}, 1e-7, None, id="adam_epsilon"),
        pytest.param({"optim_args": "eps=1e-8"}, 1e-8, None, id="optim_args"),
        pytest.param({"adam_epsilon": 1e-7, "optim_args": "eps=1e-8"}, 1e-8, None, id="both"),
    ],
)
def test_eps_is_lambs_unless_somebody_chose_one(
    tmp_path: Path, model, caplog: pytest.LogCaptureFixture, options, eps: float | None, said: str | None
) -> None:
    """Trainer's adam_epsilon defaults to 1e-8, a hundredth of LAMB's: a default must not pass for a choice."""
    args = arguments(tmp_path, learning_rate=1e-3, **options)
    for _ in range(2):
        _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert kwargs.get("eps") == eps
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_lamb.optim_args"]
    assert len(lines) == (said is not None), "said once, or not at all"
    assert all(said in line for line in lines)


def test_the_inflated_loss_of_a_model_with_adapters_is_remarked_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT's model passes the arguments on; Trainer looks at the one inside, and multiplies its loss."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"]))
    Trainer(model, arguments(tmp_path, learning_rate=1e-3, gradient_accumulation_steps=4)).create_optimizer()
    assert [
        line
        for line in caplog.messages
        if "BertForMaskedLM.accepts_loss_kwargs = False: the model ignores num_items_in_batch" in line
    ]


def test_matrices_that_start_at_zero_are_remarked_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A trust ratio keeps them small: LoRA would seem to learn nothing."""
    peft = pytest.importorskip("peft")
    for model in (tiny_bert(), peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"]))):
        caplog.clear()
        Trainer(model, arguments(tmp_path, learning_rate=1e-3, adam_epsilon=1e-6)).create_optimizer()
        said = [line for line in caplog.messages if "matrices start at 0" in line]
        assert len(said) == isinstance(model, peft.PeftModel)
    assert ".lora_B.default.weight, and a trust ratio" in said[0]


@pytest.mark.parametrize(
    "options",
    [
        {"base_learning_rate": 1e-2, "base_batch_size": 64},
        {"batch_size_schedule": "0:8 2:16"},
        {"decay_power": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_stock_trainer_ignores_no_option_of_lambs_arguments(options: dict[str, Any], tmp_path: Path) -> None:
    """Another rate, decay or batch than was asked for; LambTrainer takes them."""
    args = LambTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)
    name = next(iter(options))
    with one_line(ValueError, f"{name} .*: use hf_lamb.LambTrainer in place of this trainer.*leave {name} out"):
        Trainer(tiny_bert(), args).create_optimizer()
    if "batch_size_schedule" not in options:  # which needs data
        assert isinstance(LambTrainer(tiny_bert(), args).create_optimizer(), Lamb)
    Trainer(tiny_bert(), LambTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])).create_optimizer()


def test_a_subclass_of_lambtrainer_may_create_its_optimizer(tmp_path: Path) -> None:
    """With `get_optimizer_cls_and_kwargs`, as Trainer's documentation has it."""

    class Own(LambTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(self.model.parameters(), **kwargs)
            return self.optimizer

    options = {"decay_power": 0.5, "batch_size_schedule": "0:2 1:4", "per_device_train_batch_size": 2, "max_steps": 2}
    args = LambTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", **options)
    run = Own(tiny_bert(), args, train_dataset=batches())
    run.train()
    assert run.state.global_step == 2


@pytest.mark.parametrize(("learning_rate", "warned"), [(5e-5, True), (1e-4, False)])
def test_a_learning_rate_made_for_adamw_is_remarked_on(
    tmp_path: Path, model, caplog: pytest.LogCaptureFixture, learning_rate: float, warned: bool
) -> None:
    args = arguments(tmp_path, learning_rate=learning_rate, adam_epsilon=1e-6)
    Trainer.get_optimizer_cls_and_kwargs(args, model)
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_lamb.optim_args"]
    assert len(lines) == warned
    assert all("learning_rate is 5e-05: use about 1e-3" in line for line in lines)


def test_only_the_process_that_logs_speaks(
    tmp_path: Path, model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "should_log", False)
    Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path), model)
    assert not [record for record in caplog.records if record.name == "hf_lamb.optim_args"]


# ---- Training under the stock Trainer -------------------------------------------------------------------------------


def batches() -> list[dict[str, torch.Tensor]]:
    """Sixteen fixed sequences with fixed masks: the same data in every run."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 64, (16, 16), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.3
    return [
        {"input_ids": row.masked_fill(mask, 3), "labels": row.masked_fill(~mask, -100)}
        for row, mask in zip(ids, masked, strict=True)
    ]


def train(path: Path, resume: Path | None = None) -> Trainer:
    args = arguments(
        path,
        learning_rate=1e-2,
        weight_decay=0.01,
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        optim_args="max_trust_ratio=10",
    )
    trainer = Trainer(tiny_bert(), args, train_dataset=batches())
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Four steps without interruption, checkpoints at 2 and 4."""
    return train(tmp_path_factory.mktemp("run"))


def checkpoint(trainer: Trainer, step: int) -> Path:
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


def test_the_stock_trainer_trains_with_lamb(trained: Trainer) -> None:
    optimizer = trained.optimizer.optimizer
    assert isinstance(optimizer, Lamb)
    assert {group["max_trust_ratio"] for group in optimizer.param_groups} == {10.0}
    start = dict(tiny_bert().named_parameters())
    moved = [name for name, param in trained.model.named_parameters() if not torch.equal(param, start[name])]
    # The only parameter that gets no gradient in masked language modelling would be a pooler, and there is none.
    assert moved == list(start)
    assert set(optimizer.layer_stats()) == set(start)


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(trained: Trainer, tmp_path: Path) -> None:
    resumed = train(tmp_path, resume=checkpoint(trained, 2))
    for (name, param), (_, expected) in zip(
        resumed.model.named_parameters(), trained.model.named_parameters(), strict=True
    ):
        assert torch.equal(param, expected), name
    optimizers = [trainer.optimizer.state_dict() for trainer in (resumed, trained)]
    torch.testing.assert_close(*[o["state"] for o in optimizers], rtol=0, atol=0)
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]


def test_the_optimizer_file_holds_tensors_and_plain_values_only(trained: Trainer) -> None:
    state = torch.load(checkpoint(trained, 4) / "optimizer.pt", weights_only=True)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    assert set(names) == {name for name, _ in trained.model.named_parameters()}
    assert len(state["state"]) == len(names)


def test_training_args_load_where_there_is_no_hf_lamb(trained: Trainer) -> None:
    """`training_args.bin` travels with a model to people who have never heard of LAMB."""
    program = """
        import sys
        sys.modules["hf_lamb"] = None  # any import of it now fails
        import torch
        args = torch.load(sys.argv[1], weights_only=False)
        print(type(args).__name__, type(args.optim).__name__, args.optim, args.to_dict()["optim"])
    """
    assert python(program, checkpoint(trained, 4) / "training_args.bin") == "TrainingArguments str lamb lamb\n"
