"""What the README says is so: commands parse, its Python runs, it is one sitting; every flag that
the list of departures names is there."""

import re
import shlex
import shutil

import pytest

import demo
import eval as evaluation
import generate
import mulcot
import toy as toy_world
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "tests" / "BENCHMARKS.md").read_text(encoding="utf-8")
SCRIPTS = {"train.py": train, "generate.py": generate, "eval.py": evaluation,
           "tests/demo.py": demo, "tests/toy.py": toy_world}


def commands(text):
    """[(script, flags)] of every command line of ours, also where it is wrapped by backslashes or
    stands behind another command."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = re.split(r"  #| > |(?<=\S)\s{3,}", line)[0]  # a remark
        for part in re.split(r"&&|;", line):
            command = re.search(
                r"(?:python|torchrun|--nproc-per-node \d) ((?:tests/)?\w+\.py)(?=\s|$)(.*)", part)
            if command and command[1] in SCRIPTS:
                found.append((command[1], shlex.split(command[2])))
    return found


def blocks(text, language="bash"):
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("source", ["README", "BENCHMARKS", *SCRIPTS])
def test_every_command_parses(source):
    """Accepted by the script it names, flags and all."""
    texts = dict(README=blocks(README), BENCHMARKS=blocks(BENCHMARKS))
    seen = commands("\n".join(texts[source] if source in texts else [SCRIPTS[source].__doc__]))
    assert seen
    for name, words in seen:
        if (name, words) != ("train.py", []):  # the door to tests/demo.py
            SCRIPTS[name].parse_args(words)


def test_the_readme_is_one_sitting():
    """At most 1,500 words, code and all; commands wrapped at 90 columns; the list of departures
    pointed to."""
    assert len(README.split()) <= 1500
    wide = [line for block in blocks(README) for line in block.splitlines() if len(line) > 90]
    assert not wide, wide
    assert "departures" in README and "](mulcot.py)" in README


def test_two_commands_are_those_that_ci_runs():
    """The first screen's commands, and nothing else, make up the CI run."""
    first = re.findall(r"^pip install .*$", README, re.M)[:2]
    ran = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in ran if line.startswith("pip install")] == first


def test_python_of_the_readme_runs(toy, tmp_path, monkeypatch, capsys):
    """In a folder where the files that it names are a tiny student and a toy picture."""
    (code,) = blocks(README, "python")
    picture = next((toy / "images").iterdir())
    for path in re.findall(r'"(runs/[^"]+)"', code):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".png"):
            shutil.copy(picture, tmp_path / path)
        else:
            shutil.copytree(toy / "student", tmp_path / path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mulcot, "parse_reasoning", lambda text: mulcot.Reasoning(
        dict.fromkeys(mulcot.FIELDS, "x"), None, False, None))  # random weights write no chain
    exec(code, {})
    assert re.match(r"(negative|neutral|positive) \[0\.\d+, ", capsys.readouterr().out)
    assert len(code.splitlines()) <= 10


# ---- the departures


def flags_of(capsys):
    """Every flag that the help texts of the scripts show."""
    shown = ""
    for script in (train, generate, evaluation):
        for stage in getattr(script, "STAGES", [None]):
            with pytest.raises(SystemExit):
                script.parse_args([stage, "--help"] if stage else ["--help"])
            shown += capsys.readouterr().out
    return set(re.findall(r"--[a-z][a-z0-9-]*", shown))


def test_departures_are_numbered_and_their_flags_are_there(capsys):
    """mulcot.py opens with the list; a flag that brings back the authors' way exists."""
    _, departures = mulcot.__doc__.split("\nDepartures", 1)
    listed = [int(n) for n in re.findall(r"^ ?(\d+)\. ", departures, re.M)]
    starts = [n for n, number in enumerate(listed) if number == 1]
    for start, end in zip(starts, [*starts[1:], len(listed)]):  # a list for each paper
        assert listed[start:end] == list(range(1, end - start + 1))
    assert starts[:1] == [0] and len(listed) >= 10
    named = set(re.findall(r"--[a-z][a-z0-9-]*", departures))
    assert named and not named - flags_of(capsys), named - flags_of(capsys)
