"""Every command line of the project: a dataclass becomes flags, config files become flags before them.

A config file is Python that assigns to the names of the flags, as nanoGPT's are. It is turned into
`--name=value`, so a value from a file meets the same checks and the same messages as one from the shell.
"""

import ast
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def parse(config_class: type[Config], args: Sequence[str], prog: str, presets: Path | None = None) -> Config:
    """Reads `[config.py ...] [--key=value ...]`, later ones winning. Bad flags: prints why and exits with 2.

    A config file is found by its path or, in the folder `presets`, by its name.
    """
    return parse_given(config_class, args, prog, presets)[0]


def parse_given(
    config_class: type[Config], args: Sequence[str], prog: str, presets: Path | None = None
) -> tuple[Config, dict[str, list[str]]]:
    """`parse`, and of each flag that was set, by a file or on the command line, its values in order."""
    try:
        import tyro
    except ImportError:
        raise ValueError("the command line needs the package tyro: pip install tyro") from None

    known, scope = flag_names(config_class), _defaults(config_class)
    flags: list[str] = []
    for i, arg in enumerate(args):
        is_value = i > 0 and args[i - 1].startswith("-") and "=" not in args[i - 1]  # of `--key value`
        if arg.startswith("-") or is_value:
            flags.append(arg)
        else:
            flags += _flags_of_file(_find(arg, presets), known, scope)
    options = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)
    config = tyro.cli(config_class, args=flags, prog=prog, config=options, use_underscores=True)
    given: dict[str, list[str]] = {}
    for flag, after in zip(flags, [*flags[1:], ""]):
        name, equals, value = flag.partition("=")
        if (name := name.removeprefix("--").replace("-", "_")) in known:
            given.setdefault(name, []).append(value if equals else after)
    return config, given


def flag_names(config_class: type) -> list[str]:
    """The flat list of flags of a dataclass, those of the dataclasses nested in it included."""
    names = []
    for field in fields(config_class):
        nested = is_dataclass(field.type) and isinstance(field.type, type)
        names += flag_names(field.type) if nested else [field.name]  # type: ignore[arg-type]
    return names


def run(main: Callable[[], None]) -> None:
    """Runs a command; what the user can mend is one sentence on stderr and exit code 1, not a traceback."""
    try:
        main()
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
        tree = ast.parse(path.read_text(), str(path))
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
