"""Print what a shell needs to complete kvmpy's words: verbs, options, names of machines, files.

    bash    eval "$(kvmpy completion bash)"                    in ~/.bashrc
    zsh     eval "$(kvmpy completion zsh)"                     in ~/.zshrc, behind compinit
    fish    kvmpy completion fish | source                     in ~/.config/fish/config.fish

The shell then asks kvmpy itself, through the library argcomplete.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, KvmpyError
from . import parser

if TYPE_CHECKING:
    from types import ModuleType

SHELLS = ("bash", "zsh", "fish")
ALIVE = ("starting", "running")
CHOICES = {  # of options, by where their values are kept: names, or the module and the constant that has them
    "boot": ("boot.loader", "PROTOCOLS"),
    "console": ("config", "CONSOLES"),
    "devices": ("catalogue", "CATALOGUE"),
    "net": ("sandbox", "NETWORKS"),
    "sandbox": ("jail.lock", "LEVELS"),
    "transport": ("config", "TRANSPORTS"),
}
OF_BOOT = {"nets": ("user", "tap=", "socket="), "serial": ("stdio", "null", "pty", "file=", "unix=")}

Completer = Callable[..., Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    if args.shell not in SHELLS:
        raise ConfigError(f'no completion for "{args.shell}"', f"use {', '.join(SHELLS)}")
    print(_library().shellcode(["kvmpy"], shell=args.shell))
    return 0


def complete(verbs: dict[str, str], load: Callable[[str], ModuleType]) -> None:
    """Answer the shell, which has put what was typed into the environment, and end this process."""
    typed = os.environ.get("COMP_LINE", "").split()[1:2]
    whole = argparse.ArgumentParser("kvmpy", add_help=False)
    every = whole.add_subparsers()
    for verb, text in verbs.items():
        of_verb = every.add_parser(verb, help=text)
        if [verb] == typed:
            parser.fill(of_verb, load(verb))
            for action in of_verb._actions:
                action.completer = completer(verb, action)  # type: ignore[attr-defined]
    _library().autocomplete(whole, always_complete_options=False)


def completer(verb: str, action: argparse.Action) -> Completer:
    """What can stand where `action` takes a word."""
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    meaning = str(action.metavar or "").partition("[")[0].partition(":")[0]
    if action.dest in ("name", "names") and not action.option_strings:
        return _machines if verb in ("rm", "wait", "logs") else _live_machines
    if meaning in ("SRC", "DST"):
        return _places
    if meaning == "SHELL":
        return _among(SHELLS)
    if action.nargs != 0 and action.dest in CHOICES:
        module, constant = CHOICES[action.dest]
        return _among(sorted(getattr(import_module(f"..{module}", __package__), constant)))
    if action.dest in OF_BOOT:
        return _among(OF_BOOT[action.dest])
    if meaning == "NAME" and action.dest == "env":
        return _among(sorted(os.environ))
    if meaning == "CMD" and action.nargs == argparse.REMAINDER:
        return _command_words
    if meaning in ("FILE", "KERNEL"):
        return FilesCompleter()
    if meaning in ("DIR", "WHAT", "HOST") and action.dest != "publish":
        return DirectoriesCompleter()
    return _among(())


def _among(words: Iterable[str]) -> Completer:
    return lambda **typed: list(words)


def _machines(**typed: Any) -> dict[str, str]:
    """Names of machines, with what they are."""
    from .. import named

    try:
        return {machine.name: machine.state for machine in named.all_of()}
    except KvmpyError:  # nobody to tell
        return {}


def _live_machines(**typed: Any) -> dict[str, str]:
    return {name: state for name, state in _machines().items() if state in ALIVE}


def _places(prefix: str, **typed: Any) -> list[str]:
    """What `kvmpy cp` takes."""
    from argcomplete.completers import FilesCompleter

    return [*(f"{name}:" for name in _live_machines()), *FilesCompleter()(prefix)]


def _command_words(prefix: str, parsed_args: argparse.Namespace, **typed: Any) -> list[str]:
    """A program first, then files."""
    from argcomplete.completers import FilesCompleter

    if [word for word in parsed_args.command or () if word != "--"] or "/" in prefix:
        return list(FilesCompleter()(prefix))
    found = set()
    for folder in os.environ.get("PATH", "").split(":"):
        if os.path.isdir(folder):  # noqa: PTH112
            found |= {name for name in os.listdir(folder) if name.startswith(prefix)}
    return sorted(found)


def _library() -> Any:
    try:
        import argcomplete
    except ImportError:
        raise ConfigError("completion needs argcomplete", "pip install argcomplete") from None
    return argcomplete
