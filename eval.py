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


def evaluate(args):
    """Table, metrics.json and report.html of the given runs."""
    aside, logs = [], training_logs(args.logs)
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
    used = {k: v for k, v in SIGNATURES.items() if any(k in m for m in runs.values())}
    page = report(runs, rows, shown, references, args.cards, used, logs)
    write_atomic(Path(args.out, "report.html"), lambda part: Path(part).write_bytes(page))
    print(f"wrote {args.out}/metrics.json and {args.out}/report.html")


# ---- the report ------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--page:light-dark(#f4f5f7,#14161a);--card:light-dark(#fff,#1e2127);
--text:light-dark(#1c2026,#e6e8ec);--dim:light-dark(#5b6370,#a3abb8);
--line:light-dark(#dcdfe5,#343943);--mark:light-dark(#ffe08a,#6b5410);
--c0:light-dark(#3b5bdb,#8da2fb);--c1:light-dark(#c2570c,#f2a365);
--c2:light-dark(#0b7f6b,#4fd1b5);--c3:light-dark(#a8328f,#e58ad2);
--c4:light-dark(#8a7500,#d9c64a);--c5:light-dark(#5b6370,#a3abb8);
--c6:light-dark(#c22f46,#ff8090);--c7:light-dark(#0c7ca8,#5cc4f0)}
.positive,.hit,article{--c:light-dark(#1e7a3e,#6cca8c)}.neutral{--c:var(--dim)}
.negative,.miss,.wrong,.badge{--c:light-dark(#b93a30,#f2857b)}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
body>*{max-width:76rem;margin:auto;padding:.5rem 1rem}p{margin:.3rem 0}a{color:var(--c0)}
h1{font-size:1.5rem;margin:.5rem 0 0}h2{font-size:1.15rem;margin:1.8rem 0 .7rem}
small,dt,th,legend,.dim{color:var(--dim);font-size:.88em}ul{list-style:none;padding:0;margin:0}
nav{display:flex;flex-wrap:wrap;gap:0 1rem}
.skip{position:absolute;left:-99rem}.skip:focus{position:static}
:focus-visible{outline:3px solid var(--c0);outline-offset:2px;border-radius:.2rem}
.tiles li,.diagnosis,.wide,figure,form,article{background:var(--card);border-radius:.7rem;
border:1px solid var(--line);padding:.7rem .9rem;margin:0}
.tiles,.plots{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(19rem,100%),1fr))}
.tiles b,.tiles small{display:block;line-height:1.3}.tiles b{font-size:1.6rem}
.diagnosis{border-left:.35rem solid var(--c1)}summary{margin:.5rem 0}
.wide{overflow-x:auto;padding:.3rem .4rem .3rem 0;width:fit-content;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
td,th{padding:.3rem .55rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child{text-align:left;padding-left:.9rem;position:sticky;left:0;background:var(--card)}
tbody th{color:inherit}tbody tr:last-child>*{border-bottom:0}
td[class]{background:color-mix(in srgb,var(--c) calc(var(--s)*45%),transparent)}
figcaption{font-weight:600}svg{width:100%;display:block}svg text{fill:var(--dim);font-size:10px}
.grid{stroke:var(--line)}.ideal{stroke:var(--dim);stroke-dasharray:3 4}circle{fill:var(--c)}
polyline{fill:none;stroke:var(--c);stroke-width:1.8}.ideal~g polyline{opacity:.4}
.legend li{display:inline-block;margin-right:1rem;font-size:.85em}
.legend i{display:inline-block;width:1.1rem;height:.25rem;margin-right:.35rem;background:var(--c)}
fieldset{border:0;padding:0;margin:.35rem 0 0;display:flex;flex-wrap:wrap;gap:.25rem .5rem}
legend{min-width:3.2rem;padding:0}input,button{font:inherit;accent-color:var(--c0)}
fieldset label{border:1px solid var(--line);border-radius:2rem;padding:.05rem .7rem .05rem .5rem}
label:has(:checked){background:color-mix(in srgb,var(--c0) 16%,transparent)}
[type=search]{width:min(24rem,100%);padding:.2rem .6rem}
article{margin-top:.8rem;display:grid;gap:.2rem 1.2rem;padding-left:1.2rem;
content-visibility:auto;contain-intrinsic-size:auto 20rem;box-shadow:inset .35rem 0 var(--c)}
article[hidden]{display:none}.text{font-size:1.08rem}mark{background:var(--mark);color:inherit}
article img{border-radius:.5rem;min-width:5rem;max-width:10rem;max-height:14rem}
li>span{display:inline-block;width:4.2rem;color:var(--dim)}.told::before{content:"teacher: "}
.badge{border:1px solid;border-radius:2rem;padding:0 .5rem;font-size:.8rem}
li>b,.badge{color:var(--c)}.bar i{background:var(--c)}
.bar{display:flex;height:.55rem;border-radius:.3rem;overflow:hidden;max-width:13rem;margin:.3rem 0}
dl{margin:.4rem 0 0;display:grid;gap:.1rem 1.2rem;font-size:.92rem}
dt{font-weight:600;margin-top:.3rem}dd{margin:0}.told{border-left:2px solid var(--line);
padding-left:.6rem}.told::before,.same::after{color:var(--dim);font-size:.85em}
.same::after{content:"  = teacher"}pre{white-space:pre-wrap;margin:.3rem 0}
@media(min-width:46rem){article{grid-template-columns:13rem 1fr}dl{grid-template-columns:1fr 1fr}
legend{float:left}dt,.same,.only dd{grid-column:1/-1}.told{grid-column:2}}
@media(min-width:46rem)and (min-height:40rem){form{position:sticky;top:0;z-index:1}}
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
    text: [...node.querySelectorAll(".id, .text, .route, dd, pre")]
      .map(part => part.textContent).join("\\n").toLowerCase()}));
  const boxes = all("form [type=checkbox]");
  function update() {
    const words = one("#search").value.toLowerCase().split(/\\s+/), asked = {};
    for (const box of boxes) if (box.checked) (asked[box.name] ??= []).push(box.value);
    // Boxes of one name are alternatives; different names and all words must hold.
    const passes = (card, skipped) => words.every(word => card.text.includes(word)) &&
      Object.entries(asked).every(([name, values]) =>
        name == skipped || values.some(value => card.is.has(value)));
    for (const box of boxes)  // how many posts it would leave
      box.nextElementSibling.textContent =
        cards.filter(card => card.is.has(box.value) && passes(card, box.name)).length;
    const left = cards.filter(card => !(card.node.hidden = !passes(card)));
    one("#left").textContent = `${left.length} of ${cards.length} posts`;
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
    "accuracy": ("accuracy", ".1%", "labels that are right"),
    "macro_f1": ("macro F1", ".1%", "mean of the three classes"),
    "unparsed": ("unparsed", "g", "no label found; counted wrong"),
    "ece": ("calibration error", ".1%", "ECE: confidence against accuracy"),
    "aurc": ("AURC", ".3f", "mean error rate over coverages"),
    "parse_rate": ("chains parsed", ".1%", "five fields and a label"),
    "agreement": ("chain = label", ".1%", "the chain's own prediction"),
    **{k: (title, ".3f", "against the teacher's chains") for k, title in dict(
        bleu4="BLEU-4", rouge_l="ROUGE-L", meteor="METEOR", sim="Sim").items()}}

FLAGS = {"wrong": "label is not gold", "conflict": "chain and label differ",
         "unparsed": "no label, or a chain that lacks a field",
         "disagree": "chain and teacher's chain name different labels"}


def html_table(rows, what, shares=None):
    """Rows of cells, the first a header, **bold** ones so, in a box called `what` that scrolls
    sideways. shares: of a confusion matrix's cells in their row, to shade them."""
    lines = []
    for i, (head, *cells) in enumerate(rows):
        line = f"<th scope={'row' if i else 'col'}>{escape(str(head))}"
        for j, cell in enumerate(cells):
            tag = "td" if i else "th scope=col"
            if shares and i:
                tag = f'td class={"hit" if i == j + 1 else "miss"} style="--s:{shares[i - 1][j]}"'
            line += f"<{tag}>" + re.sub(r"\*\*(.+)\*\*", r"<b>\1</b>", escape(str(cell)))
        lines.append(f"{'' if i else '<thead>'}<tr>{line}{'' if i else '<tbody>'}")
    return (f'<div class=wide tabindex=0 role=region aria-label="{escape(what)}">'
            f"<table>{''.join(lines)}</table></div>")


def confusion_table(counts):
    """Rows gold, columns said: counts and shares of the row."""
    shares = [[round(n / max(sum(row), 1), 2) for n in row] for row in counts]
    rows = [[gold, *(f"{n} · {s:.0%}" for n, s in zip(*line))]
            for gold, *line in zip(LABELS, counts, shares)]
    return html_table([["gold", *LABELS, "unparsed"], *rows], "confusion", shares)


def ticks(top):
    """Round steps from 0 to at least top > 0, at most five."""
    power = 10.0 ** math.floor(math.log10(top))
    step = power * next(s for s in (0.25, 0.5, 1, 2, 2.5) if 4 * s * power >= top)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def plot(title, lines, x_name, y_name, log=False, diagonal=False):
    """A chart as inline SVG, or nothing. lines: {name: [(x, y, weight)]}, weight in [0, 1] the area
    of a point, x and y >= 0. log: y in powers of ten, zeros left out."""
    kept = [[p for p in line if math.isfinite(p[0] + p[1]) and p[1] >= 0 and (p[1] or not log)]
            for line in lines.values()]
    points = [p for line in kept for p in line]
    if not points:
        return ""
    xs, ys = (ticks(max(1 if diagonal else p[k] for p in points) or 1) for k in (0, 1))
    scale = math.log10 if log else float
    if log:
        low, high = (math.floor(scale(y)) for y in (min(p[1] for p in points), ys[-1]))
        ys = [10.0 ** k for k in range(low, high + 2, (high - low) // 6 + 1)]
    bottom, top = scale(ys[0]), max(scale(y) for y in (ys[-1], *(p[1] for p in points)))
    px = lambda x: 38 + 272 * x / xs[-1]
    py = lambda y: 176 - 156 * (scale(y) - bottom) / (top - bottom)
    art = [f'<path class=grid d="M38 {py(y):.1f}H310"/><text x=34 y={py(y) + 3:.1f} '
           f"text-anchor=end>{y:g}</text>" for y in ys]
    art += [f"<text x={px(x):.1f} y=189 text-anchor=middle>{x:g}</text>" for x in xs]
    art += ['<path class=ideal d="M38 176L310 20"/>'] if diagonal else []
    legend = []
    for i, (name, line) in enumerate(zip(lines, kept)):
        if line:
            color = f'style="--c:var(--c{i % 8})"'
            legend.append(f"<li {color}><i></i>{escape(name)}")
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in line)
            dots = [f"<circle cx={px(x):.1f} cy={py(y):.1f} r={1.5 + 4 * w ** 0.5:.1f} />"
                    for x, y, w in line if len(line) <= 20]
            art.append(f'<g {color}><polyline points="{path}"/>{"".join(dots)}</g>')
    return (f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 320 206" role=img '
            f'aria-label="{escape(f"{title}: {y_name} by {x_name}")}">{"".join(art)}'
            f"<text x=174 y=203 text-anchor=middle>{x_name}</text><text x=4 y=9>{y_name}</text>"
            f"</svg><ul class=legend>{''.join(legend)}</ul></figure>")


def training_logs(specs):
    """{run: rows} of [NAME=]FILE specs, checked. A row that names its `run` belongs to that one."""
    logs = {}
    for spec in specs:
        name, path = spec.split("=", 1) if "=" in spec else ("", spec)
        if not os.path.exists(path):
            raise InputError(f"{path} does not exist: give log.jsonl files of train.py")
        for n, row in enumerate(read_rows(path), 1):
            step = row.get("step") if isinstance(row, dict) else None
            if not isinstance(step, int) or step < 0:
                raise InputError(f"{path}:{n}: a log row needs a step, 0 or above")
            run = row.get("run", name or Path(path).absolute().parent.name)
            logs.setdefault(str(run), []).append(row)
    return logs


def training_plots(logs):
    """Loss terms of each run {name: log rows}, then the dev accuracy of all."""
    terms = dict.fromkeys(k for rows in logs.values() for row in rows for k in row
                          if k == "loss" or k.startswith(("ce_", "kl_")))
    points = lambda rows, key: [(row["step"], row[key], 0) for row in rows
                                if isinstance(row.get(key), (int, float))]
    plots = [plot(name, {term: points(rows, term) for term in terms}, "step",
                  "loss, nats per token", log=True) for name, rows in logs.items()]
    dev = {name: points(rows, "dev_accuracy") for name, rows in logs.items()}
    return "".join(plots) + plot("dev accuracy", dev, "step", "accuracy")


def trust_plots(runs):
    """Reliability and risk by coverage of the first eight runs that hold probabilities."""
    bins, curves = {}, {}
    for name, m in [item for item in runs.items() if item[1].get("reliability")][:8]:
        total, curve = sum(n for *_, n in m["reliability"]), m["risk_coverage"]
        bins[f"{name} (ECE {m['ece']:.3f})"] = [(c, a, n / total) for c, a, n in m["reliability"]]
        thin = curve[:: len(curve) // 50 + 1] + curve[-1:]
        curves[f"{name} (AURC {m['aurc']:.3f})"] = [(c, r, 0) for c, r in thin]
    return (plot("reliability", bins, "mean confidence", "accuracy", diagonal=True)
            + plot("risk by coverage", curves, "share of posts answered, surest first",
                   "error rate"))


def report(runs, rows, shown, references, most, signatures, logs, diagnosis=()):
    """The self-contained page, bytes. runs: {name: metrics}; rows: their table; shown: (name, {id:
    row}, gold posts) of the run whose posts are shown, at most `most`; references: {id: chain};
    signatures, diagnosis: sentences; logs: {run: log rows}. Every string from data is escaped."""
    name, predictions, posts = shown
    values, images, cards = runs[name], {}, []
    cases = [judge(p, predictions.get(p.id, {}), references.get(p.id)) for p in posts]
    cases.sort(key=lambda case: ("wrong" not in case[0], not case[0], case[1].id))
    for case in cases[:most]:
        path = case[1].image
        number = images.setdefault(thumbnail(path), len(images)) if path else None
        cards.append(card(*case, number))
    tiles, notes = "", "".join(f"<li>{escape(v)}" for v in signatures.values())
    for key, (title, form, hint) in TILES.items():
        if values.get(key) is not None:
            if key in values.get("intervals", ()):
                low, high = values["intervals"][key]
                hint = f"95 %: {low:{form}} to {high:{form}}"
            tiles += f"<li>{title}<b>{values[key]:{form}}</b><small>{hint}</small>"
    sections = {
        "Summary": ("ul class=tiles", tiles),
        "Diagnosis": ("ul class=diagnosis", "".join(f"<li>{escape(x)}" for x in diagnosis)),
        "Runs": ("div", f"{html_table(rows, 'runs')}<details><summary>how the numbers are computed"
                        f"</summary><ul>{notes}</ul></details>"),
        "Errors": ("div", confusion_table(values["confusion"])),
        "Trust": ("div class=plots", trust_plots(runs)),
        "Training": ("div class=plots", training_plots(logs)),
        "Posts": ("div", f"<p class=dim>{len(cards):,} of {len(posts):,}, wrong ones first, then "
                         f"flagged ones</p>{filters()}<div id=cards></div>")}
    about = f"{len(posts):,} posts, {len(runs) - 1} runs"
    if "seeds" in values:
        about += f"; means of {len(values['seeds'])} seeds, confusion and posts of the first"
    return page(name, about, {k: v for k, v in sections.items() if v[1]}, "".join(cards), images)


def page(name, about, sections, cards, images):
    """The document, bytes. sections: {title: (tag, HTML)}. The cards travel deflated, a fifth of
    their size; the browser unpacks them. The policy lets nothing run but SCRIPT, and nothing
    load."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    packed = base64.b64encode(zlib.compress(cards.encode("utf-8", "replace"), 9)).decode()
    links = "".join(f"<a href=#{x.lower()}>{x}</a>" for x in sections)
    body = "\n".join(
        f"<section id={x.lower()} aria-label={x}><h2>{x}</h2><{tag}>{content}</{tag.split()[0]}>"
        "</section>" for x, (tag, content) in sections.items())
    text = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width"><title>{escape(name)}: MulCoT-RD report</title>
<style>{STYLE}</style></head><body><header><a class=skip href=#posts>skip to the posts</a>
<h1>MulCoT-RD: {escape(name)}</h1><p class=dim>{about}</p><nav aria-label="sections">{links}</nav>
</header><main>
{body}
</main><footer><noscript>The posts are packed: to see them, allow this page its script.</noscript>
</footer><script type="application/json" id=images>{json.dumps(list(images))}</script>
<script type="text/plain" id=packed>{packed}</script>
<script>{SCRIPT}</script></body></html>
"""
    return text.encode("utf-8", "replace")  # half a surrogate pair fits into no file


def filters():
    """The form above the posts; SCRIPT fills in its counts."""
    boxes = {"only": {flag: flag for flag in FLAGS},
             "gold": {f"gold-{x}": x for x in LABELS},
             "label": {f"label-{x}": x for x in (*LABELS, "none")}}
    sets = ""
    for legend, members in boxes.items():
        inner = (f'<label title="{FLAGS.get(value, "")}"><input type=checkbox value={value} name='
                 f"{value if legend == 'only' else legend}> {said} <b></b></label>"
                 for value, said in members.items())
        sets += f"<fieldset><legend>{legend}</legend>{''.join(inner)}</fieldset>"
    return ('<form role=search aria-label="filter the posts"><label>search <input type=search '
            f"id=search></label> <button type=reset>clear</button> <output id=left></output>{sets}"
            "</form>")


def judge(post, row, reference):
    """(those of FLAGS that hold, post, its prediction row, parsed chain or None, the teacher's)."""
    label, raw = row.get("prediction"), row.get("raw")
    chain = parse_reasoning(raw) if isinstance(raw, str) else None
    told = parse_reasoning(reference) if reference else None
    named, theirs = (x.prediction if x else None for x in (chain, told))
    holds = {"wrong": label != post.label, "conflict": label and named and label != named,
             "unparsed": label is None or chain and not chain.complete,
             "disagree": named and theirs and named != theirs}
    return [flag for flag in FLAGS if holds[flag]], post, row, chain, told


def card(flags, post, row, chain, told, image):
    """A judged post: image (the number of its thumbnail), text with the aspect marked, verdicts,
    probabilities, and its chain beside the teacher's."""
    label, side, body = row.get("prediction"), "", ""
    if image is not None:
        side = f'<img alt="the post\'s image" data-n={image}>'
    verdicts = {"gold": post.label, "label": label} | ({"chain": chain.prediction} if chain else {})
    verdicts |= {"teacher": told.prediction} if told else {}
    items = (f"<li><span>{who}</span> <b class={said}>{said or 'none'}</b>"
             for who, said in verdicts.items())
    side += f"<ul class=said>{''.join(items)}</ul>"
    if row.get("probs"):
        probs = list(zip(LABELS, row["probs"]))
        bar = "".join(f'<i class={x} style="width:{p:.1%}"></i>' for x, p in probs)
        said = " · ".join(f"{x}&nbsp;{p:.1%}" for x, p in probs)
        side += f"<div class=bar>{bar}</div><small>{said}</small>"
    if row.get("route") is not None:
        why = "" if row.get("reason") is None else f": {escape(str(row['reason']))}"
        body = f"<p class=route>decided by <b>{escape(str(row['route']))}</b>{why}</p>"
    if chain and not chain.complete:
        body += f"<p>unparsed: {escape(chain.problem)}</p>"
        body += "" if chain.fields else f"<pre>{escape(row['raw'][:2000])}</pre>"
    badges = "".join(f" <span class=badge>{flag}</span>" for flag in flags)
    pieces = post.text.split(post.aspect) if post.aspect else [post.text]
    text = f"<mark>{escape(post.aspect or '')}</mark>".join(map(escape, pieces))
    marks = " ".join([*flags, f"gold-{post.label}", f"label-{label or 'none'}"])
    return (f'<article class="{" ".join(flags)}" data-is="{marks}"><div>{side}</div>'
            f"<div><small class=id>{escape(post.id)}</small>{badges}<p class=text>{text}</p>{body}"
            f"{chain_list(chain, told)}</div></article>\n")


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
