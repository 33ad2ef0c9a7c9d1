"""Plain command lines are read as argparse reads them, and all others are left to it."""

import argparse
from types import ModuleType

from hypothesis import given
from hypothesis import strategies as st

from kvmpy.cli import boot, parser
from kvmpy.cli.options import Option, read, switch
from kvmpy.core.errors import ConfigError

TABLE = (
    Option(("image",), "", "FILE"),
    Option(("-m", "--mem"), "", "SIZE"),
    Option(("--modules-dir",), "", "DIR"),
    Option(("-d", "--disk"), "", "FILE", "disks", many=True),
    Option(("--level",), "", "LEVEL", default="off"),
    switch("-q", "--quiet", help=""),
    switch("-v", "--verbose", help="", count=True),
)
WORDS = ["-m", "--mem", "--mem=1G", "--mem=", "-d", "--disk=a", "--modules-dir", "-q", "--quiet", "--quiet=1", "-v"]
WORDS += ["-vv", "-m1", "--verbose", "--level", "--lev", "--", "-", "-1", "", "a", "b c", "-x y", "--help", "--nothing"]


def by_argparse(words: list[str]) -> dict[str, object] | None:
    module = ModuleType("verb")
    module.OPTIONS = TABLE  # type: ignore[attr-defined]
    try:
        return vars(parser.make("verb", module).parse_args(words))
    except ConfigError:
        return None


@given(st.lists(st.sampled_from([word for word in WORDS if word != "--help"]), max_size=8))
def test_what_is_read_is_what_argparse_reads(words: list[str]) -> None:
    found = read(words, TABLE)
    assert found is None or vars(found) == by_argparse(words)


def test_plain_words_need_no_argparse() -> None:
    words = ["k", "--mem=1G", "-d", "a", "--disk", "b", "-q", "-v", "--verbose", "--modules-dir", "m"]
    found = read(words, TABLE)
    assert found is not None and vars(found) == {
        "image": "k",
        "mem": "1G",
        "disks": ["a", "b"],
        "quiet": True,
        "verbose": 2,
        "modules_dir": "m",
        "level": "off",
    }


def test_what_takes_an_explanation_is_left_to_argparse() -> None:
    for words in (["--help"], ["-h"], ["--nothing"], ["a", "b"], ["--mem"], ["--mem", "-1"], ["--quiet=1"], ["-vv"]):
        assert read(words, TABLE) is None, words


def test_every_option_of_boot_is_in_its_help() -> None:
    text = parser.make("boot", boot).format_help()
    assert [option for option in boot.OPTIONS if option.help.split("%")[0] not in " ".join(text.split())] == []
    assert isinstance(parser.make("boot", boot), argparse.ArgumentParser)
