"""Numbers and a report from prediction files. Runs no language model; parses the raw text anew.

    python eval.py predictions.jsonl --gold test.tsv --images img --out results
    python eval.py student=s.jsonl assistant=a.jsonl --gold posts.jsonl --out results \\
        --references references.jsonl
    python eval.py predictions.jsonl --gold posts.jsonl --out results --cards 1000

Last line: `wrote results/metrics.json and results/report.html`. A prediction row needs id and
prediction; with `raw` (the chain) the chain is judged too. Gold labels come from --gold, never
from the prediction rows.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from functools import lru_cache
from html import escape
from pathlib import Path

from mulcot import (
    FIELDS, LABELS, Help, InputError, beside, load_image, parse_reasoning, read_posts, read_rows,
    run_stage, tell_aside, write_atomic, write_json)


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=Help)
    flag = p.add_argument
    flag("predictions", nargs="+", metavar="[NAME=]FILE",
         help="rows of generate.py predict; the report shows the first; NAME may be GROUP/NAME")
    flag("--gold", required=True, help="labelled posts: .jsonl, .json, .tsv or an MVSA folder")
    flag("--images", help="images folder (default: images/ beside the posts, else their folder)")
    flag("--references", nargs="*", default=[], metavar="ROWS",
         help="rows with cot to compare chains with, beside the cot of the gold posts")
    flag("--chains", help="the teacher's rows, for their statistics")
    flag("--logs", nargs="*", default=[], metavar="[NAME=]FILE",
         help="log.jsonl files of train.py, for the report's curves; NAME: default its folder")
    flag("--cards", type=int, default=200, help="posts shown in the report, wrong ones first")
    flag("--out", required=True, help="folder for metrics.json and report.html")
    return p.parse_args(argv)


# ---- classification --------------------------------------------------------------------------


def classification_metrics(gold, predicted):
    """Accuracy, macro and weighted F1, per class precision / recall / F1 / support, confusion
    (rows gold, columns LABELS + unparsed), unparsed. A None prediction is wrong for every class.
    Equal to scikit-learn's with labels=LABELS and zero_division=0."""
    assert len(gold) == len(predicted) and gold, (len(gold), len(predicted))
    pairs, columns = Counter(zip(gold, predicted)), (*LABELS, None)
    per_class = {}
    for label in LABELS:
        right = pairs[label, label]
        said, support = sum(pairs[g, label] for g in LABELS), sum(pairs[label, c] for c in columns)
        precision, recall = right / said if said else 0.0, right / support if support else 0.0
        f1 = 2 * right / (said + support) if said + support else 0.0
        per_class[label] = dict(precision=precision, recall=recall, f1=f1, support=support)
    n = len(gold)
    return dict(n=n, accuracy=sum(pairs[x, x] for x in LABELS) / n,
                macro_f1=sum(c["f1"] for c in per_class.values()) / len(LABELS),
                weighted_f1=sum(c["f1"] * c["support"] for c in per_class.values()) / n,
                per_class=per_class, confusion=[[pairs[g, c] for c in columns] for g in LABELS],
                unparsed=sum(p is None for p in predicted))


def majority_metrics(gold):
    """What always saying the commonest gold label scores."""
    label = Counter(gold).most_common(1)[0][0]
    return dict(label=label) | classification_metrics(gold, [label] * len(gold))


# ---- chains ----------------------------------------------------------------------------------

_13A = [(re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
        (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
        (re.compile(r"([\.,])([^0-9])"), r" \1 \2"), (re.compile(r"([0-9])(-)"), r"\1 \2 ")]


@lru_cache(4096)
def tokens_13a(text):
    """mteval-v13a tokens, as sacrebleu's default."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    text = f" {text} "
    for pattern, by in _13A:
        text = pattern.sub(by, text)
    return text.split()


def bleu4(prediction, reference):
    """Sentence BLEU-4 in [0, 1]: 13a tokens, no smoothing, no effective order (the authors' way: a
    pair without a common 4-gram scores 0). Equal to sacrebleu's sentence BLEU with
    smooth_method="none"."""
    p, r = tokens_13a(prediction.rstrip()), tokens_13a(reference.rstrip())
    if not p or not r:
        return 0.0
    total = 0.0
    for n in range(1, 5):
        ours, theirs = (Counter(zip(*(words[i:] for i in range(n)))) for words in (p, r))
        common = sum((ours & theirs).values())
        if common == 0:
            return 0.0
        total += math.log(common / (len(p) - n + 1))
    return math.exp(min(0.0, 1 - len(r) / len(p)) + total / 4)


def _lcs_words(x, y):
    """The words of one longest common subsequence, ties broken as `rouge` 1.0.1 breaks them."""
    table = [[0] * (len(y) + 1)]
    for a in x:
        row, above = [0], table[-1]
        for j, b in enumerate(y):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
        table.append(row)
    i, j, words = len(x), len(y), set()
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(prediction, reference):
    """ROUGE-L F in [0, 1] as the `rouge` 1.0.1 package has it (the authors' way): sentences split
    at full stops, union of sentence LCS, counted over distinct words."""
    ours, theirs = ([" ".join(s.split()).split(" ") for s in text.split(".") if s]
                    for text in (prediction, reference))
    if not ours or not theirs:
        return 0.0
    union = set().union(*(_lcs_words(r, p) for r in theirs for p in ours))
    precision, recall = len(union) / len(set().union(*ours)), len(union) / len(set().union(*theirs))
    return 2 * precision * recall / (precision + recall + 1e-8)


def distinct_n(texts, n):
    """Mean over texts of distinct / all n-grams of lower-cased words; a text shorter than n words
    scores 0. Of the *predictions*: the authors' script measures the references."""
    shares = []
    for text in texts:
        grams = list(zip(*(text.lower().split()[i:] for i in range(n))))
        shares.append(len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


SIGNATURES = {
    "bleu4": "BLEU-4: 13a tokens, per post, unsmoothed, mean over posts (= sacrebleu, none)",
    "rouge_l": "ROUGE-L F: sentences at full stops, union LCS of distinct words (= rouge 1.0.1)",
    "distinct_1": "Distinct-1: distinct / all words of the predictions, mean over posts",
    "distinct_2": "Distinct-2: distinct / all word pairs of the predictions, mean over posts"}


def chain_text(parsed):
    """What the text metrics compare: the fields' texts, in order, without names and quotes."""
    return " ".join(parsed.fields[name] for name in FIELDS if name in parsed.fields)


def chain_metrics(rows, references):
    """What the chains of prediction rows {id: row} are worth. parse_rate: share of chains with five
    fields and a label; agreement: share whose Prediction is the row's label; an unparsed chain
    scores 0 against its reference {id: text}."""
    parsed = {i: parse_reasoning(row["raw"]) for i, row in rows.items()}
    agree = [r.prediction is not None and r.prediction == rows[i].get("prediction")
             for i, r in parsed.items()]
    texts = {i: chain_text(r) if r.complete else "" for i, r in parsed.items()}
    whole = [text for text in texts.values() if text]
    out = dict(chains=len(rows), parse_rate=len(whole) / len(rows),
               agreement=sum(agree) / len(rows), distinct_1=distinct_n(whole, 1),
               distinct_2=distinct_n(whole, 2))
    pairs = [(texts[i], chain_text(parse_reasoning(references[i])))
             for i in rows if i in references]
    if pairs:
        out |= dict(referenced=len(pairs), bleu4=sum(bleu4(*p) for p in pairs) / len(pairs),
                    rouge_l=sum(rouge_l(*p) for p in pairs) / len(pairs))
    return out


# ---- runs ------------------------------------------------------------------------------------


def prediction_rows(path):
    """{id: row} of a prediction file, checked."""
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: run generate.py predict first")
    rows = {}
    for n, row in enumerate(read_rows(path), 1):
        if not isinstance(row, dict) or "id" not in row or "prediction" not in row:
            raise InputError(f"{path}:{n}: a prediction row needs id and prediction")
        if row["prediction"] not in (*LABELS, None):
            raise InputError(f"{path}:{n}: prediction {row['prediction']!r} is none of "
                             f"{', '.join(LABELS)} or null")
        probs = row.get("probs") or [0, 0, 0]
        numbers = isinstance(probs, list) and all(isinstance(p, (int, float)) for p in probs)
        if not numbers or len(probs) != 3:
            raise InputError(f"{path}:{n}: probs must be three numbers")
        rows[str(row["id"])] = row
    return rows


def run_metrics(path, gold, references):
    """(metrics, rows, gold posts) of one prediction file, against all gold posts {id: post} of the
    splits that it covers: a post without a row counts as unparsed."""
    rows = prediction_rows(path)
    splits = {gold[i].split for i in rows if i in gold}
    if not splits:
        raise InputError(f"{path}: no id occurs among the labelled gold posts: wrong --gold?")
    wanted = [p for p in gold.values() if p.split in splits]
    missing, foreign = [p.id for p in wanted if p.id not in rows], rows.keys() - gold.keys()
    if foreign:
        print(f"warning: {path}: {len(foreign)} rows have no labelled gold post: left out")
    if missing:
        print(f"warning: {path} lacks {len(missing)} of {len(wanted)} gold posts, first "
              f"{missing[0]}: counted as unparsed")
    predicted = [rows.get(p.id, {}).get("prediction") for p in wanted]
    metrics = classification_metrics([p.label for p in wanted], predicted)
    metrics["missing"] = len(missing)
    chained = {i: row for i, row in rows.items() if i in gold and isinstance(row.get("raw"), str)}
    if chained:
        metrics |= chain_metrics(chained, references)
    return metrics, rows, wanted


def chain_rows(path):
    """Rows that hold an id and a chain, checked."""
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: run generate.py teacher first")
    rows = read_rows(path)
    for n, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and "id" in row and isinstance(row.get("cot"), str)):
            raise InputError(f"{path}:{n}: needs id and cot")
    return rows


def teacher_metrics(path):
    """How the teacher's kept chains came about."""
    rows = chain_rows(path)
    stages, tries = Counter(row.get("stage") for row in rows), [row.get("tries", 1) for row in rows]
    return dict(kept=len(rows), unaided=stages[1], label_conditioned=stages[2],
                set_aside=len(read_rows(beside(path, "rejects.jsonl"))),
                answers_per_kept_chain=sum(tries) / max(len(rows), 1))


COLUMNS = {"accuracy": "accuracy", "macro_f1": "macro F1", "weighted_f1": "weighted F1",
           "unparsed": "unparsed", "parse_rate": "chains parsed", "agreement": "chain = label",
           "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "distinct_1": "Distinct-1",
           "distinct_2": "Distinct-2"}


def table(runs):
    """{name: metrics} -> rows of cells with a header row, for terminal and report."""
    keys = [k for k in COLUMNS if any(k in m for m in runs.values())]
    rows = [["run", *(COLUMNS[k] for k in keys)]]
    for name, metrics in runs.items():
        values = [metrics.get(k, "") for k in keys]
        rows.append([name, *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)])
    return rows


def training_logs(specs):
    """{run: log rows} of [NAME=]FILE specs, checked; rows that say `run` belong to that run."""
    logs = {}
    for spec in specs:
        name, path = spec.split("=", 1) if "=" in spec else (Path(spec).absolute().parent.name, spec)
        if not os.path.exists(path):
            raise InputError(f"{path} does not exist: give log.jsonl files of train.py")
        for n, row in enumerate(read_rows(path), 1):
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise InputError(f"{path}:{n}: a log row needs a step")
            logs.setdefault(str(row.get("run", name)), []).append(row)
    return logs


def evaluate(args):
    """Table, metrics.json and report.html of the given runs."""
    aside = []
    gold = {p.id: p for p in read_posts(args.gold, args.images, aside) if p.label}
    tell_aside(aside, "gold rows cannot be read and are in no number below")
    if not gold:
        raise InputError(f"{args.gold} has no labelled post")
    references = {p.id: p.cot for p in gold.values() if p.cot}
    for path in args.references:
        told = {str(row["id"]): row["cot"] for row in chain_rows(path)}
        references |= told
        if not told.keys() & gold.keys():
            print(f"warning: no row of {path} has the id of a gold post: not compared")
    runs, shown = {}, None
    for spec in args.predictions:
        name, path = spec.split("=", 1) if "=" in spec else (Path(spec).stem, spec)
        if name in ("", "majority", "signatures", "teacher", *runs):
            raise InputError(f"run name {name!r} is taken: name the files apart, NAME=FILE")
        runs[name], rows, wanted = run_metrics(path, gold, references)
        shown = shown or (name, rows, wanted)
    runs = {"majority": majority_metrics([p.label for p in shown[2]])} | runs
    rows = table(runs)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        line = (c.rjust(w) for c, w in zip(cells, widths[1:]))
        print(name.ljust(widths[0]), *line, sep="  ")
    metrics = dict(signatures=SIGNATURES)
    for name, values in runs.items():  # base/student becomes {"base": {"student": …}}
        *groups, leaf = name.split("/")
        place = metrics
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = values
    if args.chains:
        metrics["teacher"] = t = teacher_metrics(args.chains)
        print(f"teacher: {t['kept']} chains kept, {t['unaided']} unaided, "
              f"{t['label_conditioned']} label-conditioned, {t['set_aside']} set aside")
    write_json(Path(args.out, "metrics.json"), metrics)
    page = report(runs, rows, shown, references, args.cards, training_logs(args.logs))
    write_atomic(Path(args.out, "report.html"), lambda part: Path(part).write_text(page, "utf-8"))
    print(f"wrote {args.out}/metrics.json and {args.out}/report.html")


# ---- the report ------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--text:#1c2026;--dim:#5b6370;
--line:#dcdfe5;--accent:#3b5bdb;--negative:#b93a30;--neutral:#656c78;--positive:#1e7a3e;
--mark:#ffe08a;--c0:#3b5bdb;--c1:#c2570c;--c2:#0b7f6b;--c3:#a8328f;--c4:#7a6a00;--c5:#5b6370}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1e2127;--text:#e6e8ec;
--dim:#a3abb8;--line:#343943;--accent:#8da2fb;--negative:#f2857b;--neutral:#a9b0bd;
--positive:#6cca8c;--mark:#6b5410;--c0:#8da2fb;--c1:#f2a365;--c2:#4fd1b5;--c3:#e58ad2;
--c4:#d9c64a;--c5:#a3abb8}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,sans-serif}main,header,footer{max-width:76rem;margin:auto;padding:0 1rem}
header{padding-top:1.5rem}h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .7rem}
p{margin:.3rem 0}a{color:var(--accent)}small,.dim{color:var(--dim);font-size:.85em}
nav a{margin-right:1rem}.skip{position:absolute;left:-99rem}.skip:focus{position:static}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px;border-radius:.2rem}
.tiles,.plots{display:grid;gap:.8rem;padding:0;list-style:none;
grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(19rem,100%),1fr))}
.tiles li,figure,.wide,article,form,.diagnosis{background:var(--card);border-radius:.7rem;
border:1px solid var(--line);padding:.7rem .9rem;margin:0}.tiles b{display:block;font-size:1.6rem;
line-height:1.25;font-variant-numeric:tabular-nums}.tiles small{display:block;line-height:1.3}
.diagnosis{border-left:.35rem solid var(--c1);padding-left:2rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
td,th{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right}
th{font-weight:600;color:var(--dim)}tbody th{text-align:left;color:inherit}
tr:last-child>*{border-bottom:0}.two{display:flex;flex-wrap:wrap;gap:.8rem}.two>*{max-width:100%}
.hit,.miss{background:color-mix(in srgb,var(--tint) calc(var(--share)*45%),transparent)}
.hit{--tint:var(--positive)}.miss{--tint:var(--negative)}
figcaption{font-weight:600}svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);
font-size:10px}.grid{stroke:var(--line)}.ideal{stroke:var(--dim);stroke-dasharray:3 4}
polyline{fill:none;stroke:var(--c);stroke-width:1.8}circle{fill:var(--c)}
.legend{list-style:none;padding:0;margin:.3rem 0 0;font-size:.85em}.legend li{display:inline-block;
margin-right:1rem}.legend i{display:inline-block;width:1.1rem;height:.25rem;background:var(--c);
margin-right:.35rem;vertical-align:middle}
fieldset{border:0;padding:0;margin:.35rem 0 0;display:flex;flex-wrap:wrap;gap:.2rem .5rem}
legend{float:left;min-width:3.4rem;color:var(--dim);margin-right:.4rem}fieldset label{border:1px
solid var(--line);border-radius:2rem;padding:.05rem .7rem .05rem .5rem}
label:has(:checked){border-color:var(--accent);background:color-mix(in srgb,var(--accent) 16%,
transparent)}label b{font-variant-numeric:tabular-nums;font-weight:600}input[type=search]{
font:inherit;width:min(26rem,100%);padding:.3rem .6rem}button{font:inherit}input{accent-color:
var(--accent)}#posts article{margin-top:.8rem;display:grid;gap:.2rem 1.2rem;
content-visibility:auto;contain-intrinsic-size:auto 18rem;overflow-wrap:anywhere;
border-left:.35rem solid var(--positive)}#posts article.wrong{border-left-color:var(--negative)}
#posts article[hidden]{display:none}.text{font-size:1.08rem}mark{background:var(--mark);
color:inherit;border-radius:.2rem;padding:0 .15rem}article img{border-radius:.5rem;
max-width:10rem}.side ul{list-style:none;margin:.4rem 0;padding:0}
.badge{border:1px solid;border-radius:2rem;padding:0 .5rem;font-size:.8rem;color:var(--negative)}
b.negative{color:var(--negative)}b.neutral{color:var(--neutral)}b.positive{color:var(--positive)}
.bar{display:flex;height:.55rem;border-radius:.3rem;overflow:hidden;margin:.3rem 0 .1rem;
max-width:14rem;background:var(--line)}i.negative{background:var(--negative)}
i.neutral{background:var(--neutral)}i.positive{background:var(--positive)}
dl{margin:.5rem 0 0;display:grid;gap:.1rem 1.2rem;font-size:.92rem}dt{font-weight:600;
color:var(--dim);font-size:.85rem;margin-top:.3rem}dd{margin:0}.told{border-left:2px solid
var(--line);padding-left:.6rem}.told::before,.same::after{content:"teacher: ";color:var(--dim);
font-size:.85em}.same::after{content:"  = teacher"}pre{white-space:pre-wrap;margin:.3rem 0}
@media(min-width:46rem){#posts article{grid-template-columns:14rem 1fr}
dl{grid-template-columns:1fr 1fr}dt,.same,.only dd{grid-column:1/-1}
form{position:sticky;top:0;z-index:1}}
"""

SCRIPT = """
"use strict";
const one = q => document.querySelector(q), all = q => [...document.querySelectorAll(q)];

async function start() {
  const packed = Uint8Array.from(atob(one("#packed").textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  one("#cards").innerHTML = await new Response(stream).text();
  const images = JSON.parse(one("#images").textContent);
  for (const img of all("#cards img")) img.src = images[img.dataset.n];
  const cards = all("#cards article").map(node => ({
    node, is: new Set(node.dataset.is.split(" ")),
    text: [...node.querySelectorAll("small, .text, .route, dd, pre")]
      .map(part => part.textContent).join("\\n").toLowerCase()}));
  const boxes = all("form [type=checkbox]");

  // Boxes of one name are alternatives; different names and the words must all hold.
  function passes(card, skipped) {
    const asked = {};
    for (const box of boxes)
      if (box.checked && box.name != skipped) (asked[box.name] ??= []).push(box.value);
    return Object.values(asked).every(values => values.some(value => card.is.has(value)));
  }
  function update() {
    const words = one("#search").value.toLowerCase().split(/\\s+/);
    const found = cards.filter(card => words.every(word => card.text.includes(word)));
    for (const name of new Set(boxes.map(box => box.name))) {
      const open = found.filter(card => passes(card, name));  // what each box would leave
      for (const box of boxes.filter(box => box.name == name))
        box.parentNode.querySelector("b").textContent =
          open.filter(card => card.is.has(box.value)).length;
    }
    const left = new Set(found.filter(card => passes(card)));
    for (const card of cards) card.node.hidden = !left.has(card);
    one("#left").textContent = `${left.size} of ${cards.length} posts`;
  }
  one("form").addEventListener("input", update);
  one("form").addEventListener("reset", () => setTimeout(update));
  one("form").addEventListener("submit", event => event.preventDefault());
  update();
  document.body.dataset.ready = cards.length;
}
start().catch(error => { one("#cards").textContent = `Posts cannot be shown: ${error}`; });
"""

TILES = {  # metric: (title, format, what it says)
    "accuracy": ("accuracy", ".1%", "always {majority}: {floor:.1%}"),
    "macro_f1": ("macro F1", ".1%", "mean of the three classes"),
    "unparsed": ("unparsed", "d", "no label found; counted wrong"),
    "ece": ("calibration error", ".1%", "ECE: confidence against accuracy"),
    "aurc": ("AURC", ".3f", "mean risk over all coverages"),
    "parse_rate": ("chains parsed", ".1%", "five fields and a label"),
    "agreement": ("chain = label", ".1%", "the chain's own prediction"),
    "bleu4": ("BLEU-4", ".3f", "against the teacher's chains"),
    "rouge_l": ("ROUGE-L", ".3f", "against the teacher's chains")}

FLAGS = {"wrong": "label is not gold", "conflict": "chain and label differ",
         "unparsed": "no label, or a chain without all fields",
         "disagree": "the chain and the teacher's name different labels"}


def html_table(rows, what):
    """Rows of cells, the first a header, in a box that scrolls sideways. what: its name."""
    lines = []
    for i, row in enumerate(rows):
        cells = [f"<{'td' if i else 'th scope=col'}>{escape(str(c))}" for c in row]
        cells[0] = f"<th scope={'row' if i else 'col'}>{escape(str(row[0]))}"
        lines.append(f"{'' if i else '<thead>'}<tr>{''.join(cells)}{'' if i else '<tbody>'}")
    return (f'<div class=wide tabindex=0 role=region aria-label="{escape(what)}">'
            f"<table>{''.join(lines)}</table></div>")


def confusion_table(confusion):
    """Rows gold, columns said; the share of its row shades a cell."""
    lines = []
    for gold, counts in zip(LABELS, confusion):
        cells = []
        for said, n in zip((*LABELS, None), counts):
            share = n / max(sum(counts), 1)
            cells.append(f"<td class={'hit' if said == gold else 'miss'} "
                         f'style="--share:{share:.2f}">{n} <small>{share:.0%}</small>')
        lines.append(f"<tr><th scope=row>gold {gold}{''.join(cells)}")
    heads = "".join(f"<th scope=col>{x}" for x in (*LABELS, "unparsed"))
    return ("<div class=wide tabindex=0 role=region aria-label='confusion matrix'><table><thead>"
            f"<tr><td>{heads}<tbody>{''.join(lines)}</table></div>")


def ticks(top):
    """Round steps from 0 to at least top > 0, four or five of them."""
    power = 10.0 ** math.floor(math.log10(top))
    step = power * next(s for s in (0.25, 0.5, 1, 2, 2.5) if 4 * s * power >= top)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def plot(title, lines, x_name, y_name, log=False, diagonal=False):
    """A chart as inline SVG with its legend. lines: {name: [(x, y, weight)]}, weight in [0, 1] the
    area of a point; x and y >= 0. log: y on a logarithmic scale, values <= 0 left out."""
    kept = [[p for p in line if math.isfinite(p[0] + p[1]) and (p[1] > 0 or not log)]
            for line in lines.values()]
    points = [p for line in kept for p in line]
    if not points:
        return ""
    xs, ys = ticks(max(p[0] for p in points) or 1), ticks(max(p[1] for p in points) or 1)
    scale = lambda y: y
    if log:
        low, high = (f(math.log10(g(p[1] for p in points)))
                     for f, g in ((math.floor, min), (math.ceil, max)))
        ys, scale = [10.0 ** k for k in range(low, max(high, low + 1) + 1)], math.log10
    if diagonal:
        xs = ys = ticks(1)
    bottom, top = scale(ys[0]), scale(ys[-1])
    px = lambda x: 38 + 272 * x / xs[-1]
    py = lambda y: 176 - 166 * (scale(y) - bottom) / (top - bottom)
    art = [f'<path class=grid d="M38 {py(y):.1f}H310"/><text x=34 y={py(y) + 3:.1f} '
           f"text-anchor=end>{y:g}</text>" for y in ys]
    art += [f"<text x={px(x):.1f} y=189 text-anchor=middle>{x:g}</text>" for x in xs]
    art += ['<path class=ideal d="M38 176L310 10"/>'] if diagonal else []
    legend = []
    for i, (name, line) in enumerate(zip(lines, kept)):
        if line:
            color = f'style="--c:var(--c{i % 6})"'
            legend.append(f"<li {color}><i></i>{escape(name)}")
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in line)
            dots = [f"<circle cx={px(x):.1f} cy={py(y):.1f} r={1.5 + 4 * w ** 0.5:.1f} />"
                    for x, y, w in line if len(line) <= 40]
            art.append(f'<g {color}><polyline points="{path}"/>{"".join(dots)}'
                       f"<title>{escape(name)}</title></g>")
    return (f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 320 206" role=img '
            f'aria-label="{escape(f"{title}: {y_name} by {x_name}")}">{"".join(art)}'
            f"<text x=174 y=203 text-anchor=middle>{x_name}</text>"
            f"<text x=4 y=8>{y_name}</text></svg>"
            f"<ul class=legend>{''.join(legend)}</ul></figure>")


def training_plots(logs):
    """Loss terms of each run {name: log rows}, then the dev accuracy of all."""
    terms = dict.fromkeys(k for rows in logs.values() for row in rows for k in row
                          if k == "loss" or k.startswith(("ce_", "kl_")))
    points = lambda rows, key: [(row["step"], row[key], 0) for row in rows if key in row]
    plots = [plot(name, {term: points(rows, term) for term in terms}, "step",
                  "loss, nats per token", log=True) for name, rows in logs.items()]
    dev = {name: points(rows, "dev_accuracy") for name, rows in logs.items()}
    return [*plots, plot("dev accuracy", dev, "step", "accuracy")]


def trust_plots(runs):
    """Reliability and risk–coverage of every run whose rows hold probabilities."""
    reliable = {n: m for n, m in runs.items() if m.get("reliability")}
    risky = {n: m for n, m in runs.items() if m.get("risk_coverage")}
    bins, curves = {}, {}
    for name, m in reliable.items():
        total = sum(n for *_, n in m["reliability"])
        bins[f"{name} (ECE {m['ece']:.3f})"] = [(c, a, n / total)
                                                for c, a, n in m["reliability"] if n]
    for name, m in risky.items():
        curve = m["risk_coverage"]
        thin = curve[::max(1, len(curve) // 60)] + curve[-1:]
        curves[f"{name} (AURC {m['aurc']:.3f})"] = [(c, r, 0) for c, r in thin]
    return [plot("reliability", bins, "mean confidence", "accuracy", diagonal=True),
            plot("risk by coverage", curves, "coverage: share of posts answered, surest first",
                 "error rate")]


def report(runs, rows, shown, references, most, logs, diagnosis=()):
    """The self-contained page. runs: {name: metrics}; rows: their table; shown: (name, {id: row},
    gold posts) of the run whose posts are shown; references: {id: chain}; most: posts shown; logs:
    {name: log rows}; diagnosis: sentences. Every string from data goes through html.escape."""
    (name, predictions, posts), majority = shown, runs["majority"]
    values, said = runs[name], lambda p: predictions.get(p.id, {})
    words = dict(majority=majority["label"], floor=majority["accuracy"])
    tiles = [f"<li>{title}<b>{values[k]:{form}}</b><small>{hint.format(**words)}</small>"
             for k, (title, form, hint) in TILES.items() if k in values]
    posts = sorted(posts, key=lambda p: (said(p).get("prediction") == p.label, p.id))
    images, cards = {}, []
    for p in posts[:most]:
        image = images.setdefault(thumbnail(p.image), len(images)) if p.image else None
        cards.append(card(p, said(p), references.get(p.id), image))
    per_class = [["class", "precision", "recall", "F1", "posts"]]
    per_class += [[x, *(f"{c[k]:.3f}" for k in ("precision", "recall", "f1")), c["support"]]
                  for x, c in values["per_class"].items()]
    notes = "".join(f"<li>{escape(v)}" for k, v in SIGNATURES.items() if k in values)
    parts = {
        "Summary": f"<ul class=tiles>{''.join(tiles)}</ul>",
        "Diagnosis": "".join(f"<li>{escape(line)}" for line in diagnosis),
        "Runs": html_table(rows, "runs") + (notes and "<details><summary>how the chain metrics are "
                                            f"computed</summary><ul>{notes}</ul></details>"),
        "Errors": f"<div class=two>{confusion_table(values['confusion'])}"
                  f"{html_table(per_class, 'classes')}</div>",
        "Trust": "".join(trust_plots(runs)), "Training": "".join(training_plots(logs)),
        "Posts": f"<p class=dim>{len(cards)} of {len(posts)}, wrong ones first</p>"
                 f"{filters()}<div id=cards></div>"}
    for part, kind in (("Diagnosis", "ul class=diagnosis"), ("Trust", "div class=plots"),
                       ("Training", "div class=plots")):
        parts[part] = parts[part] and f"<{kind}>{parts[part]}</{kind.split()[0]}>"
    return page(name, f"{values['n']} posts", parts, "".join(cards), list(images))


def page(name, about, parts, cards, images):
    """The document of sections {title: HTML or nothing}. The cards travel deflated, a fifth of
    their size, and the browser unpacks them; the policy lets nothing run but SCRIPT, and nothing
    load at all."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    packed = base64.b64encode(zlib.compress(cards.encode("utf-8", "replace"), 9)).decode()
    links = "".join(f"<a href=#{x.lower()}>{x}</a>" for x in parts if parts[x])
    body = "\n".join(f"<section id={x.lower()} aria-label={x}><h2>{x}</h2>{content}</section>"
                     for x, content in parts.items() if content)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width"><title>{escape(name)}: MulCoT-RD report</title>
<style>{STYLE}</style></head><body><header><a class=skip href=#posts>skip to the posts</a>
<h1>MulCoT-RD: {escape(name)}</h1><p class=dim>{about}</p><nav aria-label="sections">{links}</nav>
</header><main>
{body}
</main><footer><noscript>The posts are packed: to see them, allow this page its script.</noscript>
</footer><script type="application/json" id=images>{json.dumps(images)}</script>
<script type="text/plain" id=packed>{packed}</script>
<script>{SCRIPT}</script></body></html>
"""


def filters():
    """The form above the posts; its counts are filled in by SCRIPT."""
    box = lambda name, value, said: (f"<label title='{FLAGS.get(value, '')}'><input type=checkbox "
                                     f"name={name} value={value}> {said} <b></b></label>")
    groups = {"only": [box(flag, flag, flag) for flag in FLAGS],
              "gold": [box("gold", f"gold-{x}", x) for x in LABELS],
              "label": [box("label", f"label-{x}", x) for x in (*LABELS, "none")]}
    sets = (f"<fieldset><legend>{k}</legend>{''.join(v)}</fieldset>" for k, v in groups.items())
    return ('<form role=search aria-label="filter the posts"><label>search <input type=search '
            f"id=search></label> <button type=reset>clear</button> <output id=left></output>"
            f"{''.join(sets)}</form>")


def card(post, row, reference, image):
    """One post: image (the number of its thumbnail), text with the aspect marked, verdicts,
    probabilities, and its chain beside the teacher's."""
    label, raw = row.get("prediction"), row.get("raw")
    chain = parse_reasoning(raw) if isinstance(raw, str) else None
    told = parse_reasoning(reference) if reference else None
    named, told_label = chain and chain.prediction, told and told.prediction
    holds = {"wrong": label != post.label, "conflict": label and named and label != named,
             "unparsed": label is None or chain and not chain.complete,
             "disagree": named and told_label and named != told_label}
    flags = [flag for flag in FLAGS if holds[flag]]
    marks = " ".join([*flags, f"gold-{post.label}", f"label-{label or 'none'}"])
    verdicts = {"gold": post.label, "label": label} | ({"chain": named} if chain else {})
    verdicts |= {"teacher": told_label} if told else {}
    verdict = "".join(f"<li>{who} <b class={said}>{said or 'none'}</b>"
                      for who, said in verdicts.items())
    badges = " ".join(f"<span class=badge>{flag}</span>" for flag in flags)
    pieces = post.text.split(post.aspect) if post.aspect else [post.text]
    text = f"<mark>{escape(post.aspect or '')}</mark>".join(map(escape, pieces))
    probs = list(zip(LABELS, row.get("probs") or []))
    bar = "".join(f'<i class={x} style="width:{p:.1%}"></i>' for x, p in probs)
    bar = f"<div class=bar>{bar}</div><small>" + " · ".join(f"{x} {p:.1%}" for x, p in probs)
    route = ""
    if row.get("route") is not None:
        route = f"<p class=route>decided by <b>{escape(str(row['route']))}</b>"
        route += f": {escape(str(row['reason']))}" if row.get("reason") is not None else ""
    if chain and not chain.complete:
        route += f"<p>unparsed, {escape(chain.problem)}:<pre>{escape(raw[:2000])}</pre>"
    picture = f'<img alt="the post\'s image" data-n={image}>' if image is not None else ""
    return (f'<article class="{" ".join(flags)}" data-is="{marks}"><div class=side>{picture}'
            f"<ul>{verdict}</ul>{bar if probs else ''}</small></div><div><small>{escape(post.id)}"
            f"</small> {badges}<p class=text>{text}</p>{route}{chain_list(chain, told)}</div>"
            "</article>\n")


def chain_list(chain, told):
    """Field by field, a chain and the teacher's; where both say the same it stands once."""
    ours, theirs = (x.fields if x else {} for x in (chain, told))
    lines = []
    for name in FIELDS:
        a, b = ours.get(name), theirs.get(name)
        if a or b:
            lines.append(f"<dt>{name.replace('_', ' ')}</dt>")
            lines += [f"<dd{' class=same' if a == b else ''}>{escape(a)}</dd>"] if a else []
            lines += [f"<dd class=told>{escape(b)}</dd>"] if b and a != b else []
    kind = "" if ours and theirs else " class=only"
    return f"<dl{kind}>{''.join(lines)}</dl>" if lines else ""


@lru_cache(maxsize=None)
def thumbnail(path, side=160):
    """A small JPEG data URL."""
    image, buffer = load_image(path), io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(argv=None):
    """Runs the command line; returns the exit code."""
    return run_stage(evaluate, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
