"""The files' shape: sections run alone with what their rulers name, and are used so; clean imports;
short lines."""

import ast
import builtins
import re
import subprocess
import symtable
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("mulcot.py", "train.py", "generate.py", "eval.py")
TOP = {*SCRIPTS, "README.md", "LICENSE", ".gitignore", ".ci", "requirements.txt", "tests"}
SOURCE = (ROOT / "mulcot.py").read_text(encoding="utf-8")


# ---- sections

RULER = re.compile(r"^# §(\d+) [^\[\n]+(?:\[needs:([^\]]*)\])?\n((?:# (?:import|from) .*\n)*)# =",
                   re.M)


def split(source):
    """{"§n": (needs, text)}, {"§n": import lines} and the text above the first section."""
    rulers = list(RULER.finditer(source))
    ends = [m.start() for m in rulers[1:]] + [len(source)]
    sections = {f"§{m[1]}": (re.findall(r"[^,\s#]+", m[2] or ""), source[m.start():end])
                for m, end in zip(rulers, ends)}
    lines = {f"§{m[1]}": m[3].replace("# ", "") for m in rulers}
    return sections, lines, source[: rulers[0].start()]


SECTIONS, IMPORTS, HEAD = split(SOURCE)


def head_parts():
    """The top of the file: {name: its import}, {name: its definition}."""
    imports, parts = {}, {}
    for node in ast.parse(HEAD).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                spelt = alias.name + (f" as {alias.asname}" if alias.asname else "")
                where = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                imports[alias.asname or alias.name.partition(".")[0]] = f"{where}import {spelt}"
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            parts[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign):
            parts[node.targets[0].id] = ast.unparse(node)
    del imports["annotations"]
    return imports, parts


IMPORTED, PARTS = head_parts()


def defined(text):
    """Names that a section's top level binds."""
    return {s.get_name() for s in symtable.symtable(text, "section", "exec").get_symbols()
            if s.is_assigned() or s.is_namespace() or s.is_imported()}


def used(text):
    """Global names that a text reads: at its top level, within functions and in annotations."""
    names, tables = set(), [symtable.symtable(text, "section", "exec")]
    while tables:
        table = tables.pop()
        top = table.get_type() == "module"
        names |= {s.get_name() for s in table.get_symbols()
                  if s.is_referenced() and (s.is_global() or top)}
        tables += table.get_children()
    for node in ast.walk(ast.parse(text)):
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if isinstance(annotation, ast.AST):
            names |= {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    return names


def least_needs(number):
    """The shortest true list: every import, name and section that the section's text touches."""
    text = SECTIONS[number][1]
    foreign = used(text) - defined(text)
    sections = [n for n, (_, other) in SECTIONS.items() if n != number and defined(other) & foreign]
    return [name for name in PARTS if name in foreign] + sections


def alone(number):
    """Source of a module with the section, what its ruler names, and what those name in turn."""
    wanted, todo = set(), [number]
    while todo:
        name = todo.pop()
        if name not in wanted:
            assert name in PARTS or name in SECTIONS, name
            wanted.add(name)
            todo += SECTIONS[name][0] if name in SECTIONS else used(PARTS[name]) & PARTS.keys()
    texts = [lines for name, lines in IMPORTS.items() if name in wanted]
    for name in wanted & PARTS.keys():
        texts += [IMPORTED[x] for x in used(PARTS[name]) & IMPORTED.keys()]
    texts += [text for name, text in PARTS.items() if name in wanted]
    texts += [text for name, (_, text) in SECTIONS.items() if name in wanted]
    return "from __future__ import annotations\n" + "\n".join(texts)


def run_page(source, name="page"):
    """A new module in which this source was executed."""
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, name, "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module


@pytest.mark.parametrize("number", SECTIONS, ids=lambda number: number[1:])
def test_section_runs_alone(number):
    """With nothing but what its ruler names it executes, and no function lacks a global name."""
    source = alone(number)
    unknown = used(source) - set(vars(run_page(source))) - set(vars(builtins))
    assert not unknown, f"add to the ruler of {number}: {unknown}"


@pytest.mark.parametrize("number", SECTIONS, ids=lambda number: number[1:])
def test_ruler_names_just_what_is_used(number):
    """Nothing is missing and nothing superfluous; the message holds the right ruler."""
    needs, right = SECTIONS[number][0], least_needs(number)
    assert set(needs) == set(right), f"[needs: {', '.join(right)}]"
    assert len(needs) == len(set(needs))
    assert defined(IMPORTS[number]) <= used(SECTIONS[number][1]), "an import too many"


def test_all_sections_are_found():
    """Every ruler is read, in order, and every global name has its place."""
    numbers = [int(n) for n in re.findall(r"^# §(\d+)", SOURCE, re.M)]
    assert [f"§{n}" for n in numbers] == list(SECTIONS) and numbers == sorted(set(numbers))
    named = {name for needs, _ in SECTIONS.values() for name in needs}
    named = named.union(*map(used, PARTS.values()))
    assert PARTS.keys() <= named, PARTS.keys() - named  # an import that nothing names is dead


# ---- components to copy


# title of a section that needs no other one -> the packages that its page wants
PAGES = {"Prompts": set(), "LoRA": {"torch", "safetensors"}, "Losses": {"torch", "numpy"},
         "NF4": {"torch"}}


def section(title):
    """The number of the section whose title begins so."""
    return next(number for number, (_, text) in SECTIONS.items()
                if re.match(rf"# §\d+ {title}\b", text))


@pytest.mark.parametrize("title", PAGES)
def test_a_page_to_copy(title):
    """With the imports that its ruler names alone: of packages just these."""
    number = section(title)
    assert not [need for need in SECTIONS[number][0] if need.startswith("§")]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
               for node in ast.walk(ast.parse(alone(number)))
               if isinstance(node, (ast.Import, ast.ImportFrom))}
    outside = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert outside == PAGES[title]


def test_the_lora_layer_to_copy():
    """Two classes of §5, with torch alone; the section's files want safetensors."""
    classes = [ast.unparse(node) for node in ast.parse(SECTIONS[section("LoRA")][1]).body
               if getattr(node, "name", None) in ("Dropout", "LoRALinear")]
    page = run_page("\n".join([*map(IMPORTED.get, ("math", "torch", "F", "nn")), *classes]))
    layer = page.LoRALinear(page.nn.Linear(6, 5), 2, 4, dropout=0.5)
    assert layer(page.torch.randn(2, 3, 6)).shape == (2, 3, 5)


# ---- the scripts

@pytest.mark.parametrize("name", SCRIPTS)
def test_house_rules(name):
    """From mulcot only public names, one by one, never a script, nothing for nothing; every public
    function and class says what it is; lines of at most 100 columns."""
    text, imported = (ROOT / name).read_text(encoding="utf-8"), set()
    module = ast.parse(text)
    for node in ast.walk(module):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module]
            assert not {"train", "generate", "eval"} & set(modules) and "*" not in names
            assert "mulcot" not in names and not [n for n in names if n.startswith("_")]
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    read = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    assert imported - {"annotations"} <= read, imported - read
    mute = [node.name for node in module.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert ast.get_docstring(module) and not mute, mute
    long = [n for n, line in enumerate(text.split("\n"), 1)
            if len(line) > 100 or line != line.rstrip()]
    assert not long, long


def test_top_level():
    """The four scripts, requirements, readme, tests and their runner; nothing else."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    there = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert set(SCRIPTS) <= there <= TOP, there - TOP
