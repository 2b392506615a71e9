"""Flags, config files and presets, as a user types them, and their error messages."""

import io
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args

import pytest
import torch

from gpt import cli, sample
from tests.runs import TINY, run, surroundings
from train import __main__ as training
from train import distributed, evaluate, plot
from train.config import MODEL_FIELDS, PRESETS, TrainConfig, config_file, parse, resolve
from train.loop import train
from train.prepare import __main__ as prepare


def command(main, monkeypatch, capsys, *args):
    """Runs a command line. Returns (exit code, stdout, stderr)."""
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


def complaint(main, monkeypatch, capsys, *args):
    """Runs a command line that fails. Returns its error message, which is one line."""
    code, _, err = command(main, monkeypatch, capsys, *args)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, (args, err)
    return err


# ---- flags

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
        "wandb_run_name = 'ft-' + str(time.time())\nlearning_rat = 3\ncompile = False\nvocab_size = None\n"
    )
    config, given = parse(["--n_layer=2", "--n_embd=96", str(file), "--n_head", "3", "--min_lr=1e-5"])
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head) == (6, 96, 3)
    assert config.out_dir == "a=b" and config.model.dropout == 0.0 and config.model.bias is True
    assert config.wandb_run_name.startswith("ft-1") and config.compile is False and config.min_lr == 1e-5
    assert config.model.vocab_size is None and given["n_layer"] == ["2", "6"]
    assert given.keys() == {
        "n_layer", "n_embd", "n_head", "min_lr", "out_dir", "dropout", "bias", "wandb_run_name", "compile",
        "vocab_size",
    }  # fmt: skip
    message = capsys.readouterr().err
    assert "'learning_rat'" in message and "did you mean 'learning_rate'?" in message
    assert "layers" not in message.replace("n_layer", "")


def test_a_switch_alone_is_true_and_values_may_be_spelled_in_many_ways(workplace):
    Path("mine.py").write_text("n_layer = 3\nmax_iters = 6e5\nvocab_size = 640 / 2\ndecay_lr = 'false'\n")
    flags = "--eval_only --compile mine.py --wandb_log False --bias=TRUE --warmup_iters 2E5 --batch-size=1e1"
    config, _ = parse(flags.split())
    switches = (config.eval_only, config.compile, config.wandb_log, config.decay_lr, config.model.bias)
    assert switches == (True, True, False, False, True)
    numbers = (config.max_iters, config.warmup_iters, config.batch_size, config.model.vocab_size)
    assert numbers == (600000, 200000, 10, 320) and {type(n) for n in numbers} == {int}
    assert config.model.n_layer == 3
    for text, value in (("auto", "auto"), ("0", False), ("true", True)):
        assert parse(["--compile", text])[0].compile == value
    assert parse([f"--seed={2**64 - 1}"])[0].seed == 2**64 - 1


def test_every_preset_parses_by_name_and_assigns_only_flags(capsys):
    for preset in PRESETS.glob("*.py"):
        config = parse([preset.stem])[0]
        assert config == parse([str(preset)])[0]
        assigned: dict = {}
        exec(preset.read_text(), assigned)
        del assigned["__builtins__"]
        assert assigned.items() <= config.flat().items(), preset
    assert capsys.readouterr().err == ""


COMMANDS = {
    "train": (training.main, TrainConfig),
    "sample": (sample.main, sample.SampleConfig),
    "evaluate": (evaluate.main, evaluate.EvaluateConfig),
    "prepare text": (prepare.main, prepare.PrepareConfig),
    "prepare tokenizer": (prepare.main, prepare.TokenizerConfig),
    "prepare plays_char": (prepare.main, prepare.CorpusConfig),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_flag_with_its_default_within_the_screen(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "80")
    main, config_class = COMMANDS[name]
    code, out, _ = command(main, monkeypatch, capsys, *name.split()[1:], "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for flag in cli.describe(config_class):
        default = "..." if flag.default is MISSING else flag.default
        default = repr(default) if default in ("", "\n") else default
        assert len(flag.help) > 5 and f"--{flag.name}={default} {flag.help}" in words, flag
    if config_class is TrainConfig:
        assert {flag.name: flag.default for flag in cli.describe(TrainConfig)} == TrainConfig().flat()
        choices = [value for f in fields(TrainConfig) for value in get_args(f.type) if isinstance(value, str)]
        assert len(choices) >= 6 and all(re.search(rf"\b{value}\b", words) for value in choices)
        sections = {section.split("\n")[0]: section for section in out.split("\n\n")}
        for group, flag in (("data", "dataset"), ("model", "n_layer"), ("machine", "dtype")):
            assert f"\n  --{flag}=" in sections[group]
        assert all(re.search(rf"\n  {p.stem}\s+\S.{{20}}", sections["presets"]) for p in PRESETS.glob("*.py"))


PATHS = "out_dir init_from dataset prompts data hellaswag input name tokenizer output out".split()


def test_a_tilde_in_a_flag_that_names_a_file_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for config_class in (*(config_class for _, config_class in COMMANDS.values()), plot.PlotConfig):
        for flag in cli.describe(config_class):
            assert (flag.type is cli.UserPath) == (flag.name in PATHS), flag
    config = parse(["--wandb_run_name=~/x", "--out_dir=~/b", "--init_from=~", "--dataset=a~/b"])[0]
    assert (config.out_dir, config.init_from, config.dataset) == ("/home/me/b", "/home/me", "a~/b")
    assert config.wandb_run_name == "~/x"
    assert cli.parse_with_paths(plot.PlotConfig, ["~/run", "--x", "tokens"], "")[1] == ["/home/me/run"]


# ---- the configuration as a file


def test_a_configuration_comes_back_from_its_file(tmp_path):
    for text in ('it\'s "so"', "a=b c", "", " \t", "line\nline", "None", "True", "-x", "--n_layer=3", "ü\\"):
        flags = [f"--out_dir={text}", f"--wandb_run_name={text}", "--grad_clip=inf", "--min_lr=1e-07"]
        config, _ = parse([*flags, "--bias", "--compile=False", "--vocab_size=300", "--optimizer=muon"])
        assert config.wandb_run_name == text
        (tmp_path / "mine.py").write_text(config_file(config))
        assert parse([str(tmp_path / "mine.py")])[0] == config


def test_print_config_prints_a_config_file_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without data
    flags = ["quickstart", "--n_layer=3", "--dataset=it's", "--device=cpu"]
    code, out, err = command(training.main, monkeypatch, capsys, *flags, "--print_config")
    assert code == 0 and err == "" and not list(tmp_path.iterdir())
    Path("mine.py").write_text(out)
    resolved = {"dtype": "float32", "compile": False, "kernels": "torch"}
    assert parse(["mine.py"])[0].flat() == parse(flags)[0].flat() | resolved


def test_a_printed_config_leaves_out_what_the_checkpoint_supplies():
    for source, absent in (
        ("scratch", set()),
        ("auto", {"dataset", "n_embd"}),
        ("first/ckpt.pt", {"n_embd"}),
        ("resume", {"dataset", "n_embd"}),
    ):
        config, given = parse([f"--init_from={source}", "--n_layer=2"])
        names = re.findall(r"^(\w+) = ", config_file(config, given), re.MULTILINE)
        assert {"dataset", "n_embd", "n_layer"}.difference(names) == absent, source


def test_the_config_file_beside_a_resumed_checkpoint_gives_the_same_run(workplace):
    run("--dropout=0.2", "--optimizer=muon", "--max_iters=4", out_dir="it's")
    first = run("--dropout=0.2", "--optimizer=muon", "--init_from=resume", out_dir="it's")
    config, given = parse(["it's/config.py", "--out_dir=again"])
    assert (config.init_from, config.max_iters, config.model.vocab_size) == ("scratch", 8, 21)
    train(config, distributed.start("auto", config.device), given)
    again = torch.load("again/ckpt.pt", weights_only=True)
    assert all(torch.equal(weight, again["model"][name]) for name, weight in first["model"].items())
    # nanoGPT records how its last process began
    first["config"]["init_from"] = "resume"
    torch.save(first, "it's/ckpt.pt")
    run("--dropout=0.2", "--optimizer=muon", "--init_from=resume", "--max_iters=9", out_dir="it's")
    assert parse(["it's/config.py"])[0].init_from == "scratch"


# ---- errors


def test_an_error_of_training_is_one_line_with_the_numbers(workplace, monkeypatch, capsys):
    for flag, *words in (
        ("quickstrat", "'quickstrat'", "did you mean 'quickstart'?"),
        ("--dropout=x", "dropout=x", "a number"),
        ("--compile=maybe", "compile=maybe", "True or False", "auto"),
        ("--backend=mpi", "backend=mpi", "auto or nccl or gloo"),
        *((f"--max_iters={value}", "a whole number") for value in ("6.5", "inf", "nan", "1e30", "x")),
        (f"--seed={2**64}", f"seed={2**64}", "64 bits"),
        ("--n_embd=33", "n_embd=33", "n_head=2"),
        ("--kernels=tritn", "'tritn'"),
        ("--kernels=torch,atention=torch", "did you mean 'attention'?"),
        ("--device=gpu", "device='gpu'", "cpu, mps, cuda"),
        ("--dtype=int8", "dtype='int8'", "float32, bfloat16, float16"),
        ("--batch_size=0", "batch_size=0", "at least 1"),
        ("--learning_rate=nan", "learning_rate=nan must be at least 0"),
        ("--min_lr=inf", "min_lr=inf must be at most"),
        ("--lr_decay_iters=-1", "lr_decay_iters=-1 must be at least 0"),
        ("--n_embd=9000000000000000000", "must be at most 536870912"),
        ("--dropout=1.0", "dropout=1.0", "below 1"),
        ("--init_from=gpt2-medum", "did you mean 'gpt2-medium'"),
        ("--dataset=missing", "data/missing/train.bin", "python -m train.prepare"),
        ("--block_size=90000", "49,801 tokens", "block_size=90000"),
        ("--vocab_size=5", "data/tiny/train.bin", "21", "5"),
        ("--out_dir=data/tiny/train.bin", "out_dir='data/tiny/train.bin'"),
        ("--init_from=resume", "out/ckpt.pt"),
    ):
        err = complaint(training.main, monkeypatch, capsys, *TINY, flag)
        assert all(word in err for word in words), (flag, err)


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        ({"RANK": "0"}, ["auto", "cpu"], "WORLD_SIZE expected, but not set; .* torchrun, or unset RANK"),
        ({"RANK": "x"}, ["auto", "cpu"], "'x'; start the run with torchrun, or unset RANK"),
        ({"RANK": "0"}, ["nccl", "cpu"], "backend='nccl' needs GPUs"),
        ({"RANK": "1"}, ["auto", "cuda:0"], "device='cuda:0' would put every rank on one GPU"),
        pytest.param(
            {}, ["auto", "cuda"], "device='cuda' .*--device=auto",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_a_wrong_environment_or_device_is_explained(monkeypatch, environment, flags, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        distributed.start(*flags)


def test_accumulation_must_be_a_multiple_of_the_ranks():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=40 .* multiple of their number, 3"):
        resolve(TrainConfig(), distributed.Ranks(0, 3, "cpu", "gloo"))
    assert resolve(TrainConfig(eval_only=True), distributed.Ranks(0, 3, "cpu", "gloo")), "it makes no steps"


@pytest.mark.parametrize(("seed", "of_rank_1"), [(1337, 1338), (2**64 - 1, 0), (-1, 0)])
def test_every_rank_has_its_own_seed(workplace, monkeypatch, seed, of_rank_1):
    config, given = parse([*TINY, f"--seed={seed}"])
    monkeypatch.setattr("train.checkpoint.find_start", lambda *args: sys.exit("started"))
    with pytest.raises(SystemExit, match="started"):
        train(config, distributed.Ranks(1, 2, "cpu", None), given)
    assert torch.initial_seed() == of_rank_1


def test_another_package_called_kernels_is_reported(tmp_path):
    """Hugging Face publishes one. Python takes the first that it finds."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): pass")
    program = f"import sys, runpy; sys.path[:0] = [{str(tmp_path)!r}]; "
    result = subprocess.run(
        [sys.executable, "-c", program + "runpy.run_module('train', run_name='__main__')"],
        cwd=tmp_path, env=surroundings(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert f"{tmp_path}/kernels" in result.stderr and "pip uninstall kernels" in result.stderr


def test_a_character_that_the_console_lacks_is_printed_as_its_code(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline=""))

    def main():
        print("é\u0416")
        print("\u4e2d", file=sys.stderr, flush=True)

    cli.run(main)
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"\xe9\\u0416\n"
    assert sys.stderr.buffer.getvalue() == b"\\u4e2d\n"


# ---- config files


def test_an_error_in_a_config_file_names_the_file_and_the_line(workplace, monkeypatch, capsys):
    Path("base.py").write_text("n_layer = None")
    Path("worse.py").write_text("n_layer = 2\nn_head = x")
    Path("worst.py").write_text("n_layer = 2\n\nn_head = = 3")
    for content, where, words in (
        ("n_layer = 2\nn_head = = 3", "mine.py, line 2", "SyntaxError"),
        ("n_layer = 2\nn_head = layers", "mine.py, line 2", "'layers' is not defined"),
        ("n_layer = 2\nexit(0)", "mine.py, line 2", ""),
        ("n_layer = 2\n\nmax_iters = 6.5", "mine.py, line 3", "max_iters=6.5 must be a whole number"),
        ("seed = 7\nwandb_run_name = None", "mine.py, line 2", "wandb_run_name=None must be text"),
        ("optimizer = 'sgd'", "mine.py, line 1", "adamw or muon"),
        ("n_head = 2\nexec(open('base.py').read())", "mine.py, line 2", "n_layer=None"),
        ("import json\njson.loads('{')", "mine.py, line 2", "JSONDecodeError"),
        ("\nfrom worse import *", "worse.py, line 2", "'x' is not defined"),
        ("\nfrom worst import *", "worst.py, line 3", "SyntaxError"),
    ):
        Path("mine.py").write_text(content)
        err = complaint(training.main, monkeypatch, capsys, "mine.py")
        assert where in err and words in err, (content, err)


WAYS = {
    "exec": "import os\nexec(open(os.path.join(os.path.dirname(__file__), 'base.py')).read())",
    "import": "from base import *",
    "globals": "globals().update(n_layer=3, dataset='plays_char')",
    "function": "def small():\n    global n_layer, dataset\n    n_layer, dataset = 3, 'plays_char'\nsmall()",
    "module": "import base\nn_layer = base.n_layer\ndataset = base.dataset",
    "main": "if __name__ == '__main__':\n    n_layer: int = 3\n    dataset = 'plays_char'",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_config_file_sets_what_it_leaves_in_its_namespace(tmp_path, monkeypatch, capsys, way):
    """As nanoGPT's configurator, which executes the file among train.py's own names."""
    monkeypatch.chdir(tmp_path)
    Path("base.py").write_text("n_layer = 3\ndataset = 'plays_char'\n")
    Path("mine.py").write_text(f"{WAYS[way]}\nlearning_rate = 1e-3\n")
    search_path = sys.path[:]
    config, given = parse(["mine.py", "--min_lr=1e-5"])
    assert (config.model.n_layer, config.dataset, config.learning_rate) == (3, "plays_char", 1e-3)
    assert given.keys() == {"n_layer", "dataset", "learning_rate", "min_lr"}
    assert sys.path == search_path and "base" not in sys.modules
    assert capsys.readouterr().err == ""


def test_modules_beside_two_config_files_may_share_a_name_even_with_our_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = {key: module for key, module in sys.modules.items() if key.startswith("train")}
    for folder, name in (("a", "layer"), ("b", "head")):
        Path(folder).mkdir()
        Path(folder, "train.py").write_text(f"n_{name} = 2")
        Path(folder, "c.py").write_text("from train import *\n")
    Path("d.py").write_text("from train.config import MODEL_FIELDS\nn_embd = len(MODEL_FIELDS)\n")
    given = parse(["a/c.py", "b/c.py", "d.py"])[1]
    assert given == {"n_layer": ["2"], "n_head": ["2"], "n_embd": [str(len(MODEL_FIELDS))]}
    assert ours == {key: module for key, module in sys.modules.items() if key.startswith("train")}


def test_a_config_file_sees_earlier_settings_and_sets_only_flags(tmp_path, capsys):
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    files[0].write_text("min_lr = learning_rate / 10\nout_dir = out_dir + '-a'\nwidth = 32\nbeta1 = 0.9\n")
    files[1].write_text(
        "total = sum(seed for seed in (1, 2))\nclass Small:\n    n_layer = 2\n"
        "def twice(n_head):\n    batch_size = n_head\n    return 2 * batch_size\n"
        "n_embd = twice(width) if decay_lr else 0\nmax_iters = max_iters * 2\n_learning_rate = 3\n"
    )
    flags = ["--learning_rate=1e-2", "--out_dir", "x", "--max_iters=1e3", "--seed=7"]
    config, given = parse([*flags, *map(str, files)])
    assert (config.min_lr, config.out_dir, config.model.n_embd, config.max_iters) == (1e-3, "x-a", 64, 2000)
    assert (config.seed, config.model.n_layer, config.batch_size) == (7, 12, 12)
    # beta1 counts as set, although it has its default: a resumed run must not take the checkpoint's.
    assert given.keys() == {
        "learning_rate", "out_dir", "max_iters", "seed", "min_lr", "beta1", "n_embd",
    }  # fmt: skip
    assert capsys.readouterr().err == ""


def test_the_encoding_of_a_prompt_or_a_config_file_is_recognized(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_text("né\nto be\n", encoding=encoding)
        assert sample._prompts(sample.SampleConfig(start=f"FILE:{tmp_path}/a.txt")) == ["né\nto be\n"]
        assert sample._prompts(sample.SampleConfig(prompts=f"{tmp_path}/a.txt")) == ["né", "to be"]
        (tmp_path / "a.py").write_text("max_iters = 7\nout_dir = 'né'\n", encoding=encoding)
        config, _ = parse([str(tmp_path / "a.py")])
        assert (config.max_iters, config.out_dir) == (7, "né")
    (tmp_path / "a.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text: byte 1"):
        sample._prompts(sample.SampleConfig(prompts=f"{tmp_path}/a.txt"))


def test_prompts_come_from_a_pipe():
    def prompts(content):
        reading_end, writing_end = os.pipe()  # as --prompts=<(command)
        os.write(writing_end, content)
        os.close(writing_end)
        try:
            return sample._prompts(sample.SampleConfig(prompts=f"/dev/fd/{reading_end}"))
        finally:
            os.close(reading_end)

    assert prompts("né\nto be\n".encode("utf-8-sig")) == ["né", "to be"]
    with pytest.raises(ValueError, match=r"/dev/fd/\d+ is not UTF-8 text: byte 2 cannot be read"):
        prompts(b"to\xff")


def test_a_typed_line_is_utf8_or_has_the_encoding_of_the_locale():
    for typed in ("größe", "größe".encode().decode("latin-1")):
        assert cli.typed_text(typed, "latin-1") == "größe"
    assert cli.typed_text("größe", "utf-8") == cli.typed_text("größe", "ascii") == "größe"
