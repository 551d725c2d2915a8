"""What the README says is so: commands parse, its Python runs, line counts and names are true."""

import re
import shlex
import shutil

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


def commands(*texts):
    """(script, flags) of every command line of ours in code blocks and docstrings."""
    text = re.sub(r"\\\n\s*", " ", "\n".join(texts))
    for line in text.splitlines():
        found = re.search(r"(?:python|--nproc-per-node \d) ((?:tests/)?\w+\.py)(?=\s|$)(.*)", line)
        if found and found[1] in SCRIPTS:
            yield found[1], re.split(r"\s{3,}|  #| > ", found[2])[0]


def blocks(text, language="bash"):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_every_command_parses():
    """Of README, BENCHMARKS.md and docstrings: accepted by the script it names, flags and all."""
    docs = [module.__doc__ for module in SCRIPTS.values()]
    seen = list(commands(*blocks(README), *blocks(BENCHMARKS), *docs))
    assert len(seen) >= 30 and {name for name, _ in seen} == set(SCRIPTS)
    for name, flags in seen:
        words = shlex.split(flags)
        if name == "train.py" and not words:
            continue  # the door to tests/demo.py
        SCRIPTS[name].parse_args(words)


def test_two_commands_are_those_that_ci_runs():
    """The first screen's commands, and nothing else, make up the CI run."""
    first = re.findall(r"^pip install .*$", README, re.M)[:2]
    ran = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in ran if line.startswith("pip install")] == first


def test_line_counts_are_true():
    """The table of the four files; and the README is one sitting."""
    table = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    true = {p.name: str(len(p.read_text().splitlines())) for p in ROOT.glob("*.py")}
    assert table == true
    assert len(README.splitlines()) <= 220


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


def test_departures_are_numbered_in_one_place_and_pointed_to():
    """mulcot.py opens with the list; the README points there."""
    listed = re.findall(r"^ ?(\d+)\. ", mulcot.__doc__, re.M)
    assert listed == [str(n) for n in range(1, len(listed) + 1)] and len(listed) >= 10
    assert "numbered departures open [mulcot.py](mulcot.py)" in README
