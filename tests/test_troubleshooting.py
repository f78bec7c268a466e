"""docs/troubleshooting.md has each message that the source can give its users, and no other.

A new message needs an entry there: its words, with `...` for what differs, in a line of its own above the
answer. A message that no user can meet is listed here, with the reason.
"""

import re
from functools import cache
from itertools import takewhile

import pytest
from helpers import ROOT
from source_messages import HOLE, Message, Source, is_sentence

PAGE = ROOT / "docs/troubleshooting.md"
OTHERS = "## Messages of other programs"  # where what is not of our source stands
FILLS = "a noun in a message that has an entry"
INTERNAL = {
    "{} failed with nvJPEG's status {}": "caught where it is raised: torchvision decodes instead",
    "{} is not one chain in the graph: from {} to {}": "of a graph that the package itself has just built",
    "a stream does not know its number of batches": "len() of an internal loader; callers ask length_hint",
    "the package triton": FILLS,
    "output {} in config.json": FILLS,
    "a file or folder in {}": FILLS,
    "an image in {}": FILLS,
    "it has none": FILLS,
    "--resume with --skip_nonfinite": FILLS,
    "{}, and {} more": FILLS,
}


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(ROOT, [*ROOT.glob("flashkat_hf/**/*.py"), *ROOT.glob("examples/**/*.py")])


def entries(text: str) -> list[str]:
    """Return the messages of a page: code in lines of its own that an answer follows."""
    lines, found = text.splitlines(), []
    for index, line in enumerate(lines):
        if line.startswith(":   "):
            above = takewhile(lambda line: line.startswith("`"), reversed(lines[:index]))
            found += [entry.strip("`") for entry in above]
    return found


def core(text: str) -> str:
    """Return a text without what differs at its ends."""
    return re.sub(r"^(\{\}|[ ,:;.])+|(\{\}|[ ,:;.])+$", "", text)


@cache
def pattern(entry: str) -> re.Pattern[str]:
    return re.compile(".+".join(map(re.escape, core(entry).split("..."))), re.DOTALL)


def fits(entry: str, text: str) -> bool:
    """Whether an entry is the message of a text: its words in their order, and most of them."""
    enough = len(entry.replace("...", "")) >= 0.6 * len(core(text).replace(HOLE, ""))
    return enough and pattern(entry).fullmatch(core(text)) is not None


def without_entry(messages: list[Message], page: str) -> list[str]:
    found = entries(page)
    return [
        f"{message.path}:{message.line}: {message.text}"
        for message in messages
        if is_sentence(message.text) and message.text not in INTERNAL
        if not any(fits(entry, message.text) for entry in found)
    ]


def test_each_message_has_an_entry(source):
    assert len(source.messages) > 500
    assert without_entry(source.messages, PAGE.read_text()) == []


def test_each_entry_is_a_message(source):
    texts = [message.text for message in source.messages]
    found = entries(PAGE.read_text().partition(OTHERS)[0])
    assert [entry for entry in found if len(re.findall("[A-Za-z]{2,}", entry)) < 2] == []  # it would fit any
    assert [entry for entry in found if not any(fits(entry, text) for text in texts)] == []
    assert sorted({entry for entry in found if found.count(entry) > 1}) == []
    assert [text for text in INTERNAL if text not in texts] == []


def test_every_way_to_say_something_is_seen(tmp_path):
    """What is raised by itself, a name, a parameter, a table, a helper or a constant, and what is warned."""
    (tmp_path / "module.py").write_text(
        """
ADVICE = "look into the manual of it"
def check(value, problem):
    if value > 3: raise ValueError(f"a value of {value} is too large; {ADVICE}")
    for wrong, message in ((value < 0, "it may not be negative"), (value == 1, f"{value} may not be one")):
        if wrong: raise DataError(message)
    raise OSError(5, problem)
def call(parser):
    check(2, "the disk is not there")
    text = reason(parser)
    parser.error("--value: " + text)
    warn(f"the value {parser.value} is old")
def reason(parser):
    return {1: "one is not two"}[1] if parser else f"{1} is not {2}"
"""
    )
    found = {message.text for message in Source(tmp_path, [tmp_path / "module.py"]).messages}
    assert found == {
        "a value of {} is too large; {}",
        "look into the manual of it",
        "it may not be negative",
        "{} may not be one",
        "the disk is not there",
        "--value: one is not two",
        "{} is not {}",
        "the value {} is old",
    }
    page = "`a value of ... is too large; ...`\n`it may not be negative`\n:   Take another.\n"
    assert len(without_entry(Source(tmp_path, [tmp_path / "module.py"]).messages, page)) == 6
