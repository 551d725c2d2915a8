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
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("mulcot.py", "train.py", "generate.py", "eval.py")
TOP = {*SCRIPTS, "README.md", "LICENSE", ".gitignore", ".ci", "requirements.txt", "tests"}
SOURCE = (ROOT / "mulcot.py").read_text(encoding="utf-8")


# ---- sections

RULER = re.compile(r"^# §(\d+) ([^\[\n]+?)\s*(?:\n# *)?\[needs:([^\]]*)\]", re.M)


def split(source):
    """{"§n": (needs, text)} and the text above the first section."""
    rulers = list(RULER.finditer(source))
    ends = [m.start() for m in rulers[1:]] + [len(source)]
    return {f"§{m[1]}": ([n for n in re.split(r"[,\s#]+", m[3]) if n], source[m.start():end])
            for m, end in zip(rulers, ends)}, source[: rulers[0].start()]


SECTIONS, HEAD = split(SOURCE)


def head_parts():
    """What a ruler may name from the top of the file: {name: its import or definition}."""
    parts = {}
    for node in ast.parse(HEAD).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                spelt = alias.name + (f" as {alias.asname}" if alias.asname else "")
                where = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                parts[alias.asname or alias.name.partition(".")[0]] = f"{where}import {spelt}"
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            parts[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign):
            parts[node.targets[0].id] = ast.unparse(node)
    parts.pop("annotations", None)
    return parts


PARTS = head_parts()


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
    texts = [text for name, text in PARTS.items() if name in wanted]
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
    """No need is missing and none is superfluous; the message holds the right list."""
    needs, right = SECTIONS[number][0], least_needs(number)
    assert set(needs) == set(right), f"[needs: {', '.join(right)}]"
    assert len(needs) == len(set(needs))


def test_all_sections_are_found():
    """Every ruler is read, in order, and every global name has its place."""
    numbers = [int(n) for n in re.findall(r"^# §(\d+)", SOURCE, re.M)]
    assert [f"§{n}" for n in numbers] == list(SECTIONS) and numbers == sorted(set(numbers))
    named = {name for needs, _ in SECTIONS.values() for name in needs}
    named = named.union(*map(used, PARTS.values()))
    assert PARTS.keys() <= named, PARTS.keys() - named  # an import that nothing names is dead


# ---- components to copy


def copied(number, packages):
    """The module of a section's page, copied with the imports that its ruler names: no other
    section is needed, and of packages just these."""
    assert not [need for need in SECTIONS[number][0] if need.startswith("§")]
    source = alone(number)
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
               for node in ast.walk(ast.parse(source))
               if isinstance(node, (ast.Import, ast.ImportFrom))}
    outside = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert outside == packages
    return run_page(source)


def section(title):
    """The number of the section whose title begins so."""
    return next(number for number, (_, text) in SECTIONS.items()
                if re.match(rf"# §\d+ {title}\b", text))


def test_parser_from_a_page():
    """§2, without any package."""
    page = copied(section("Prompts"), set())
    fields = dict(zip(page.FIELDS, ("Words.", 'A "face".', "Fine.", "So.", "neutral")))
    parsed = page.parse_reasoning("<think>hm</think>\n" + page.render_reasoning(fields))
    assert (parsed.fields, parsed.prediction, parsed.complete) == (fields, "neutral", True)
    markdown = "\n".join(f"## {name}\n{value}" for name, value in fields.items())
    assert page.check_answer(markdown, "positive")[1] == "predicts neutral, label is positive"


def test_losses_from_a_page():
    """§6, with torch (numpy counts the confusion table, safetensors holds the soft labels): KL by
    hand, and a gradient in chunks."""
    page = copied(section("Losses"), {"torch", "numpy"})
    teacher, student = torch.tensor([2.1, 0.3, -1.5]), torch.tensor([1.0, 0.8, 0.2])
    assert page.distill_kl(student, teacher).item() == pytest.approx(0.1395, abs=5e-5)
    assert page.student_loss(page.multitask_loss(1.0, 2.0), 1.0) == pytest.approx(0.7 * 1.2 + 0.3)
    hidden, head = torch.randn(7, 4, requires_grad=True), torch.randn(3, 4)
    sums_of = lambda h, rows: dict(loss=page.distill_kl(
        h @ head.T, teacher.expand(len(h), 3), reduction="sum"))
    page.in_chunks(sums_of, hidden, 2)["loss"].backward()
    (want,) = torch.autograd.grad(sums_of(hidden, slice(0, 7))["loss"], hidden)
    assert torch.allclose(hidden.grad, want, atol=1e-6)


def test_nf4_from_a_page():
    """§9, with torch alone: levels come back exactly, a layer multiplies by what it stands for."""
    page = copied(section("NF4"), {"torch"})
    weight = 0.5 * page.NF4.repeat(4, 4)  # (4, 64): whole blocks of levels
    codes, absmax = page.nf4_quantize(weight)
    assert codes.numel() == weight.numel() / 2 and absmax.tolist() == [0.5] * 4
    assert torch.equal(page.nf4_dequantize(codes, absmax, weight.shape, torch.float32), weight)
    model = torch.nn.Sequential(torch.nn.Linear(64, 4))
    model[0].weight.data = weight
    x = torch.randn(3, 64)
    want = model(x)
    page.quantize_linears(model, ["0"])
    assert isinstance(model[0], page.NF4Linear) and torch.allclose(model(x), want, atol=1e-6)


def test_lora_from_a_page():
    """The layer itself, two classes of §5, with torch alone; the section's files want
    safetensors."""
    assert copied(section("LoRA"), {"torch", "safetensors"}).add_lora
    classes = [ast.unparse(node) for node in ast.parse(SECTIONS[section("LoRA")][1]).body
               if getattr(node, "name", None) in ("Dropout", "LoRALinear")]
    page = run_page("\n".join([*(PARTS[name] for name in ("math", "torch", "F", "nn")), *classes]))
    base, x = torch.nn.Linear(6, 5), torch.randn(2, 3, 6)
    layer = page.LoRALinear(base.requires_grad_(False), 2, 4, dropout=0.5)
    assert torch.equal(layer.eval()(x), base(x))
    layer.lora_B.data.normal_()
    want = base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), want, atol=1e-5) and not torch.allclose(layer.train()(x), want)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B"}


# ---- the scripts

def tree(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_house_rules(name):
    """From mulcot only public names, one by one, never a script, nothing for nothing; every public
    function and class says what it is; lines of at most 100 columns."""
    module = tree(name)
    imported = set()
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
    long = [n for n, line in enumerate((ROOT / name).read_text("utf-8").split("\n"), 1)
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
