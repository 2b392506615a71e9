"""Every command line of the project: a dataclass becomes flags, config files become flags before them.

A config file is Python that assigns to the names of the flags, as nanoGPT's are. It is turned into
`--name=value`, so a value from a file meets the same checks and the same messages as one from the shell.
"""

import ast
import codecs
import difflib
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from io import BytesIO, TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

Config = TypeVar("Config")


def parse(config_class: type[Config], args: Sequence[str], prog: str, presets: Path | None = None) -> Config:
    """Reads `[config.py ...] [--key=value ...]`, later ones winning. Bad flags: prints why and exits with 2.

    A config file is found by its path or, in the folder `presets`, by its name. `--key` alone says True.
    `--help` prints `help_text` and exits with 0.
    """
    return parse_given(config_class, args, prog, presets)[0]


def parse_given(
    config_class: type[Config], args: Sequence[str], prog: str, presets: Path | None = None
) -> tuple[Config, dict[str, list[str]]]:
    """`parse`, and of each flag that was set, by a file or on the command line, its values in order."""
    if {"-h", "--help"}.intersection(args):
        print(help_text(config_class, prog, presets))
        sys.exit(0)
    try:
        import tyro
    except ImportError:
        raise ValueError("the command line needs the package tyro: pip install tyro") from None

    described = {flag.name: flag for flag in describe(config_class)}
    known, scope = list(described), _defaults(config_class)
    flags: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        flag = described.get(arg.removeprefix("--").replace("-", "_"))
        if not arg.startswith("-"):
            flags += _flags_of_file(_find(arg, presets), known, scope)
        elif "=" in arg:
            flags.append(arg)
        elif flag and flag.is_switch and "".join(rest[:1]).lower() not in ("true", "false", "auto"):
            flags.append(f"{arg}=True")
        else:  # `--key value`
            flags += [arg, *rest[:1]]
            rest = rest[1:]
    options = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)
    config = tyro.cli(config_class, args=flags, prog=prog, config=options, use_underscores=True)
    given: dict[str, list[str]] = {}
    for word, after in zip(flags, [*flags[1:], ""]):
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if word.startswith("-") and name in known:
            given.setdefault(name, []).append(value if equals else after)
    return config, given


def text_encoding(head: bytes) -> str:
    """How a text that begins with these bytes is read: by its byte-order mark, else as UTF-8.

    Editors on Windows put the mark there; both encodings leave it out of the text.
    """
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_text(path: Path) -> str:
    """The text of a file that somebody wrote, without a byte-order mark. Raises ValueError, OSError."""
    content = path.read_bytes()
    encoding = text_encoding(content)
    try:
        return TextIOWrapper(BytesIO(content), encoding).read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start:,} cannot be read") from None


class Flag(NamedTuple):
    name: str
    group: str  # the heading that it stands under
    help: str
    default: Any  # MISSING where a value must be given
    is_switch: bool  # takes True and False, and alone means True


def describe(config_class: type, group: str = "flags") -> list[Flag]:
    """The flags of a dataclass, those of the dataclasses nested in it included.

    What they are for is the comment behind each field; a comment on a line of its own is the heading of the
    fields below it.
    """
    headings: dict[str, str] = {}
    helps: dict[str, str] = {}
    heading = name = ""
    for line in inspect.getsource(config_class).splitlines():
        if match := re.match("    # (.*)", line):
            heading, name = match[1], ""
        elif match := re.match(r"    (\w+): ", line):
            name = match[1]
            headings[name] = heading
        elif line.startswith(("    def ", "    @")):
            break
        if name not in helps and (
            match := re.search("  # (.*)", line)
        ):  # in the next line, where it was long
            helps[name] = match[1]
    found = []
    for field in fields(config_class):
        group = headings[field.name] or group
        if is_dataclass(field.type) and isinstance(field.type, type):
            values = vars(field.default_factory())  # type: ignore[misc, operator]
            found += [flag._replace(default=values[flag.name]) for flag in describe(field.type, group)]
            continue
        is_switch = bool in (field.type, *get_args(field.type))
        found.append(Flag(field.name, group, helps.get(field.name, ""), field.default, is_switch))
    return found


def help_text(config_class: type, prog: str, presets: Path | None = None) -> str:
    """What --help prints, as wide as the terminal, from 60 to 120 columns."""
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    files = " [PRESET or FILE.py ...]" if presets else ""
    lines = [f"usage: {prog}{files} [--flag=value ...]", ""]
    for paragraph in inspect.cleandoc(config_class.__doc__ or "").split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width), ""]
    if presets:
        lines += ["presets"]
        for path in sorted(presets.glob("*.py")):
            first = path.read_text().partition("\n")[0].removeprefix("# ").partition(". ")[0].rstrip(".:")
            lines += _row(path.stem, first, width)
        lines += [""]
    for group, flags in groupby(describe(config_class), lambda flag: flag.group):
        lines += [f"{group}, with defaults" if group == "flags" else group]
        for flag in flags:
            required = flag.default is MISSING
            shown = "..." if required else repr(flag.default) if flag.default in ("", "\n") else flag.default
            lines += _row(f"--{flag.name}={shown}", flag.help + required * " (required)", width)
        lines += [""]
    return "\n".join(lines[:-1])


def config_text(config_class: type, values: Mapping[str, Any]) -> str:
    """`values` as a config file, under the headings of --help. `parse` reads the same values from it."""
    lines = []
    for group, flags in groupby(describe(config_class), lambda flag: flag.group):
        kept = [(flag.name, values[flag.name]) for flag in flags if flag.name in values]
        lines += ["", f"# {group}", *(f"{name} = {_literal(value)}" for name, value in kept)]
    return "\n".join(lines[1:]) + "\n"


def _literal(value: Any) -> str:
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


def _row(left: str, text: str, width: int, column: int = 34) -> list[str]:
    """Two columns; what is too long for the first has a line of its own."""
    right = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
    fits = len(left) <= column - 4
    first = [f"  {left:<{column - 2}}{right[0]}".rstrip()] if fits else [f"  {left}", " " * column + right[0]]
    return first + [" " * column + line for line in right[1:]]


def run(main: Callable[[], None]) -> None:
    """Runs a command; what the user can mend is one sentence on stderr and exit code 1, not a traceback."""
    try:
        main()
    except BrokenPipeError:  # nobody reads on, as after `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it at its end
        sys.exit(141)
    except (ValueError, OSError) as error:
        if os.environ.get("TRITONGPT_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _find(name: str, presets: Path | None) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    known = {p.stem: p for p in sorted(presets.glob("*.py"))} if presets else {}
    if path.stem in known and path.parent == Path():
        return known[path.stem]
    close = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"presets: {', '.join(known)}" if known else ""
    raise ValueError(f"{name!r} is neither a config file nor a preset; {hint}")


def _flags_of_file(path: Path, known: list[str], scope: dict[str, Any]) -> list[str]:
    """`--name=value` for what the file assigns. It sees, as nanoGPT's do, what was set before it."""
    try:
        tree = ast.parse(read_text(path), str(path))
        exec(compile(tree, str(path), "exec"), scope)
    except Exception as error:  # whatever the file does
        line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    assigned = {
        n.id: None for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    for name in assigned.keys() - set(known):
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            print(f"{path}: {name!r} is no flag and is ignored; did you mean {close[0]!r}?", file=sys.stderr)
    return [f"--{name}={scope[name]}" for name in assigned if name in known and name in scope]


def _defaults(config_class: type) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in fields(config_class):
        value = field.default if field.default_factory is MISSING else field.default_factory()
        if is_dataclass(value):
            values |= vars(value)
        elif value is not MISSING:
            values[field.name] = value
    return values
