"""Numbers and a report from prediction files. Loads no language model; re-parses the raw text it is given.

    python eval.py predictions.jsonl --gold test.tsv --images img --out results
    python eval.py student=s.jsonl assistant=a.jsonl --gold posts.jsonl --references chains.jsonl --out results
    python eval.py predictions.jsonl --gold posts.jsonl --out results --cards 1000

Last line: `wrote results/metrics.json and results/report.html`. A prediction row needs id and prediction; with
`raw` (the chain) the chain is judged too. Gold labels come from --gold, never from the prediction rows.
"""

import argparse
import base64
import html
import io
import math
import os
import re
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

from mulcot import (FIELDS, LABELS, InputError, load_image, parse_reasoning, read_posts, read_rows,
                    run_stage,
                    write_atomic, write_json)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("predictions", nargs="+", metavar="[NAME=]FILE",
                   help="rows of generate.py predict; the first is shown in the report; "
                        "GROUP/NAME nests")
    p.add_argument("--gold", required=True,
                   help="labelled posts: .jsonl, .json, .tsv or an MVSA folder")
    p.add_argument("--images",
                   help="folder of the images (default: images/ beside the posts, else their "
                        "folder)")
    p.add_argument("--references", nargs="*", default=[], metavar="ROWS",
                   help="rows with cot to compare chains with (default: the gold rows' cot)")
    p.add_argument("--chains", help="the teacher's rows, for their statistics")
    p.add_argument("--cards", type=int, default=200,
                   help="posts shown in the report, wrong ones first")
    p.add_argument("--out", required=True, help="folder for metrics.json and report.html")
    return p.parse_args(argv)


# ---- classification
# ------------------------------------------------------------------------------------


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


# ---- chains
# --------------------------------------------------------------------------------------------

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


SIGNATURES = {"bleu4": "BLEU-4, 13a tokens, per post, unsmoothed, mean over posts (= sacrebleu "
                       "smooth_method none)",
              "rouge_l": "ROUGE-L F, sentences at full stops, union LCS of distinct words (= "
                         "rouge 1.0.1)",
              "distinct_1": "distinct / all words of the predictions, mean over posts",
              "distinct_2": "distinct / all word pairs of the predictions, mean over posts"}


def chain_metrics(rows, references):
    """What the chains of prediction rows are worth; an unparsed chain scores 0 against its
    reference."""
    parsed = {i: parse_reasoning(row["raw"]) for i, row in rows.items()}
    out = dict(chains=len(rows), parse_rate=sum(r.complete for r in parsed.values()) / len(rows),
               agreement=sum(r.prediction is not None and r.prediction == rows[i].get("prediction")
                             for i, r in parsed.items()) / len(rows))
    texts = [" ".join(r.fields.values()) for r in parsed.values() if r.complete]
    out |= dict(distinct_1=distinct_n(texts, 1), distinct_2=distinct_n(texts, 2))
    pairs = []
    for i, r in parsed.items():
        if i in references:
            told = parse_reasoning(references[i])
            pairs.append((" ".join(r.fields.values()) if r.complete else "",
                          " ".join(told.fields.values())))
    if pairs:
        out |= dict(referenced=len(pairs), bleu4=sum(bleu4(*p) for p in pairs) / len(pairs),
                    rouge_l=sum(rouge_l(*p) for p in pairs) / len(pairs))
    return out


# ---- all of it
# -----------------------------------------------------------------------------------------


def run_metrics(path, gold, references):
    """(metrics, rows by id) of one prediction file against the gold posts of the splits it
    covers."""
    rows = {}
    for n, row in enumerate(read_rows(path), 1):
        if not isinstance(row, dict) or "id" not in row or row.get("prediction") not in (*LABELS,
                                                                                         None):
            raise InputError(f"{path}:{n}: needs id and a prediction among {', '.join(LABELS)} or "
                             "null")
        rows[str(row["id"])] = row
    hit = [gold[i] for i in rows if i in gold]
    if not hit:
        raise InputError(f"{path}: no id occurs among the labelled gold posts: wrong --gold?")
    splits = {p.split for p in hit}
    wanted = [p for p in gold.values() if p.split in splits]
    missing = [p.id for p in wanted if p.id not in rows]
    if missing:
        print(f"warning: {path} lacks {len(missing)} of {len(wanted)} gold posts, first "
              f"{missing[0]}: counted as unparsed")
    predicted = [rows.get(p.id, {}).get("prediction") for p in wanted]
    metrics = classification_metrics([p.label for p in wanted],
                                     predicted) | dict(missing=len(missing))
    chained = {i: row for i, row in rows.items() if i in gold and isinstance(row.get("raw"), str)}
    if chained:
        metrics |= chain_metrics(chained, references)
    return metrics, rows, wanted


def teacher_metrics(path):
    """How the teacher's kept chains came about."""
    rows = read_rows(path)
    stages = Counter(row.get("stage") for row in rows)
    return dict(kept=len(rows), unaided=stages[1], label_conditioned=stages[2],
                set_aside=len(read_rows(f"{path}.rejects.jsonl")),
                answers_per_post=sum(row.get("tries", 1) for row in rows) / max(len(rows), 1))


def flat(metrics, prefix=""):
    """(name, metrics) of every run in the nested dict, in order."""
    for name, value in metrics.items():
        if "accuracy" in value:
            yield prefix + name, value
        elif all(isinstance(v, dict) for v in value.values()):
            yield from flat(value, f"{prefix}{name}/")


COLUMNS = {"accuracy": "accuracy", "macro_f1": "macro F1", "weighted_f1": "weighted F1",
           "unparsed": "unparsed",
           "parse_rate": "chains parsed", "agreement": "chain = label", "bleu4": "BLEU-4",
           "rouge_l": "ROUGE-L",
           "distinct_1": "Distinct-1", "distinct_2": "Distinct-2"}


def table(metrics):
    """[(name, [cell, …])] with a header, for terminal and report."""
    runs = list(flat(metrics))
    keys = [k for k in COLUMNS if any(k in m for _, m in runs)]
    cell = lambda v: "" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)
    return [("run", [COLUMNS[k] for k in keys])] + [(name, [cell(m.get(k)) for k in keys])
                                                    for name, m in runs]


def evaluate(args):
    aside = []
    gold = {p.id: p for p in read_posts(args.gold, args.images, aside) if p.label}
    if not gold:
        raise InputError(f"{args.gold} has no labelled post")
    references = {p.id: p.cot for p in gold.values() if p.cot}
    for path in args.references:
        references |= {str(row["id"]): row["cot"] for row in read_rows(path) if row.get("cot")}
    metrics, shown = {"majority": None}, None
    for spec in args.predictions:
        name, _, path = spec.rpartition("=") if "=" in spec else (Path(spec).stem, "", spec)
        if not os.path.exists(path):
            raise InputError(f"{path} does not exist: run generate.py predict first")
        values, rows, wanted = run_metrics(path, gold, references)
        group, _, leaf = name.rpartition("/")
        (metrics.setdefault(group, {}) if group else metrics)[leaf] = values
        if shown is None:
            shown = (name, rows, wanted, values)
            metrics["majority"] = majority_metrics([p.label for p in wanted])
    if args.chains:
        metrics["teacher"] = teacher_metrics(args.chains)
    rows = table(metrics)
    widths = [max(len(r[1][c]) for r in rows) for c in range(len(rows[0][1]))]
    first = max(len(r[0]) for r in rows)
    for name, cells in rows:
        print(name.ljust(first) + "  " + "  ".join(c.rjust(w) for c, w in zip(cells, widths)))
    if args.chains:
        t = metrics["teacher"]
        print(f"teacher: {t['kept']} chains kept, {t['unaided']} unaided, "
              f"{t['label_conditioned']} label-conditioned, {t['set_aside']} set aside")
    write_json(Path(args.out, "metrics.json"), metrics | dict(signatures=SIGNATURES))
    page = report(metrics, rows, shown, references, args.cards)
    write_atomic(Path(args.out, "report.html"),
                 lambda part: Path(part).write_text(page, encoding="utf-8"))
    print(f"wrote {args.out}/metrics.json and {args.out}/report.html")


# ---- the report
# ----------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>MulCoT-RD report</title><style>
:root{color-scheme:light dark;--line:#8884;--good:#2a8f4d;--bad:#c8453b;--card:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(21rem,100%),1fr));gap:1rem}
.card{background:var(--card);border-radius:.6rem;padding:.8rem;border-left:4px solid var(--good);overflow-wrap:anywhere}
.card.wrong{border-color:var(--bad)}.card img{float:right;max-width:7rem;border-radius:.4rem;margin-left:.6rem}
mark{background:#fc08;color:inherit;border-radius:.2rem}dl{margin:.5rem 0 0;clear:both;font-size:.88rem}dt{font-weight:600}dd{margin:0 0 .3rem}
.say b{padding:0 .3rem;border-radius:.3rem;background:var(--card)}.bar{display:flex;height:.5rem;border-radius:.25rem;overflow:hidden;margin:.3rem 0}
.negative{background:#c8453b}.neutral{background:#999}.positive{background:#2a8f4d}small{opacity:.75}
</style>"""


def report(metrics, rows, shown, references, most):
    """The self-contained page. Every string from data goes through html.escape."""
    esc, (name, predictions, posts, values) = html.escape, shown
    cells = lambda items, tag="td": "".join(f"<{tag}>{esc(str(c))}</{tag}>" for c in items)
    head, *body = [f"<tr>{cells([n, *c], 'th' if i == 0 else 'td')}</tr>" for i,
                   (n, c) in enumerate(rows)]
    confusion = "".join(f"<tr>{cells([f'gold {label}', *line])}</tr>" for label,
                        line in zip(LABELS, values["confusion"]))
    order = sorted(posts, key=lambda p: (predictions.get(p.id, {}).get("prediction") == p.label,
                                         p.id))
    cards = "\n".join(_card(p, predictions.get(p.id, {}), references.get(p.id))
                      for p in order[:most])
    notes = "".join(f"<li>{esc(COLUMNS[k])}: {esc(v)}</li>" for k,
                    v in SIGNATURES.items() if k in values)
    return (f"{PAGE}<h1>MulCoT-RD: {esc(name)}</h1><p>{len(posts)} posts, accuracy "
            f"{values['accuracy']:.1%}, macro F1 "
            f"{values['macro_f1']:.1%}; always saying {metrics['majority']['label']}: "
            f"{metrics['majority']['accuracy']:.1%}.</p>"
            f"<div class=wide><table>{head}{''.join(body)}</table></div>"
            f"<h2>Confusion of "
            f"{esc(name)}</h2><table><tr>{cells(['', *LABELS, 'unparsed'], 'th')}</tr>{confusion}</table>"
            f"<ul>{notes}</ul><h2>Posts, wrong ones first ({min(most, len(posts))} of "
            f"{len(posts)})</h2><div class=cards>{cards}</div></html>\n")


def _card(post, row, reference):
    esc, said = html.escape, row.get("prediction")
    text = esc(post.text)
    if post.aspect:
        text = text.replace(esc(post.aspect), f"<mark>{esc(post.aspect)}</mark>")
    image = f'<img alt="" loading=lazy src="{thumbnail(post.image)}">' if post.image else ""
    bar = "".join(f'<i class={label} style="width:{p:.1%}" title="{label} {p:.1%}"></i>' for label,
                  p in zip(LABELS, row.get("probs") or []))
    chain, listed = "", ""
    if isinstance(row.get("raw"), str):
        parsed = parse_reasoning(row["raw"])
        chain = f" · chain says <b>{esc(str(parsed.prediction))}</b>"
        listed = "".join(f"<dt>{f}</dt><dd>{esc(parsed.fields[f])}</dd>" for f in FIELDS
                         if f in parsed.fields)
        listed = listed or f"<dt>unparsed</dt><dd>{esc(row['raw'][:2000])}</dd>"
    if reference:
        fields = parse_reasoning(reference).fields
        told = "".join(f"<dt>{f}</dt><dd>{esc(fields[f])}</dd>" for f in FIELDS if f in fields)
        listed += f"<details><summary>teacher's chain</summary><dl>{told}</dl></details>"
    return (f'<article class="card{"" if said == post.label else " wrong"}">{image}<small>{esc(post.id)}</small><p>{text}</p>'
            f"<div class=say>gold <b>{post.label}</b> · label "
            f"<b>{esc(str(said))}</b>{chain}</div><div "
            f"class=bar>{bar}</div><dl>{listed}</dl></article>")


def thumbnail(path, side=112):
    """A small JPEG data URL."""
    image = load_image(path)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(argv=None):
    return run_stage(evaluate, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
