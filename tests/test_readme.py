"""What the README says is so: commands parse, line counts and the list of departures are true."""

import re
import shlex

import eval as evaluation
import generate
import mulcot
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = {"train.py": train, "generate.py": generate, "eval.py": evaluation}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    docs = [module.__doc__ for module in SCRIPTS.values()]
    text = re.sub(r"\\\n\s*", " ", "\n".join(blocks + docs))
    for line in text.splitlines():
        found = re.search(r"(?:python|\bnode \d) (train|generate|eval)\.py(?=\s|$)(.*)", line)
        if found:
            yield f"{found[1]}.py", re.split(r"\s{6,}", found[2])[0]


def test_every_command_of_readme_and_docstrings_parses():
    """Each is accepted by the script it names, flags and all."""
    seen = list(commands())
    assert len(seen) >= 20 and {name for name, _ in seen} == set(SCRIPTS)
    for name, flags in seen:
        SCRIPTS[name].parse_args(shlex.split(flags))


def test_two_commands_are_those_that_ci_runs():
    """The first screen's commands, and nothing else, make up the CI run."""
    first = re.findall(r"^pip install .*$", README, re.M)[:2]
    ran = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in ran if line.startswith("pip install")] == first


def test_line_counts_are_true():
    """The table of the four files."""
    table = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    true = {p.name: str(len(p.read_text().splitlines())) for p in ROOT.glob("*.py")}
    assert table == true


def departures(text):
    """{number: words} of a numbered list, however it is wrapped."""
    items = re.findall(r"^ {0,2}(\d+)\. (.*?)(?=^ {0,2}\d+\. |^\S|\Z)", text, re.M | re.S)
    return {n: " ".join(words.split()) for n, words in items}


def test_departures_are_the_same_list_in_both_places():
    """README and mulcot.py number and word them alike."""
    start = README.index("## What differs")
    here = departures(README[start : README.index("\n## ", start + 5)].partition("\n\n")[2])
    there = departures(mulcot.__doc__[mulcot.__doc__.index("Departures") :].partition("\n")[2])
    assert here == there and len(here) >= 10
