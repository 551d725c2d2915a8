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
import html
import io
import math
import os
import re
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

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


def bleu_counts(prediction, reference):
    """What BLEU is made of (10,): common 1- to 4-grams, those of the prediction, both lengths."""
    p, r = tokens_13a(prediction.rstrip()), tokens_13a(reference.rstrip())
    common = np.zeros(10)
    common[4:8] = [max(0, len(p) - n) for n in range(4)]
    common[8:] = len(p), len(r)
    for n in range(4):
        ours, theirs = (Counter(zip(*(words[i:] for i in range(n + 1)))) for words in (p, r))
        common[n] = sum(min(k, theirs[gram]) for gram, k in ours.items() if gram in theirs)
        if not common[n]:
            break
    return common


def bleu_score(counts, smooth=False):
    """BLEU-4 in [0, 1] of bleu_counts, one post's or their sum. `smooth`: the k-th order without a
    common n-gram counts as 1 / 2^k (NIST, sacrebleu's default), but not if no word is common."""
    common, (ours, theirs) = counts[:4].copy(), counts[8:]
    if not common[0] or not counts[4:8].all() or not (smooth or common.all()):
        return 0.0
    common[common == 0] = 0.5 ** np.arange(1, 5)[: (common == 0).sum()]
    return math.exp(min(0.0, 1 - theirs / ours) + np.log(common / counts[4:8]).mean())


def bleu4(prediction, reference):
    """Sentence BLEU-4 in [0, 1]: 13a tokens, no smoothing, no effective order (the authors' way: a
    pair without a common 4-gram scores 0). Equal to sacrebleu's sentence BLEU with
    smooth_method="none"."""
    return bleu_score(bleu_counts(prediction, reference))


def corpus_bleu(pairs):
    """BLEU-4 in [0, 1] of all (prediction, reference) pairs at once, as sacrebleu's default."""
    return bleu_score(sum(bleu_counts(*pair) for pair in pairs), smooth=True)


def _places(words):
    """{word: bits of the positions where it stands}."""
    bits = defaultdict(int)
    for j, word in enumerate(words):
        bits[word] |= 1 << j
    return bits


def _lcs_rows(x, places):
    """Rows of the table of longest common subsequences of x and the words y of `places`, as bits
    (Hyyrö 2004): bit j of row i is 0 where length(i + 1, j + 1) = length(i + 1, j) + 1."""
    row, rows = (1 << sum(map(int.bit_count, places.values()))) - 1, []
    for word in x:
        both = row & places.get(word, 0)
        row = (row + both) | (row - both)
        rows.append(row)
    return rows


def _lcs_words(x, y, places):
    """The words of one longest common subsequence, ties broken as `rouge` 1.0.1 breaks them: go up
    where length(i - 1, j) > length(i, j - 1), which is where row i grows at j."""
    rows, i, j, words = _lcs_rows(x, places), len(x) - 1, len(y) - 1, set()
    while i >= 0 and j >= 0:
        if x[i] == y[j]:
            words.add(x[i])
            i, j = i - 1, j - 1
        elif rows[i] >> j & 1:
            j -= 1
        else:
            i -= 1
    return words


def rouge_l(prediction, reference):
    """ROUGE-L F in [0, 1] as the `rouge` 1.0.1 package has it (the authors' way): sentences split
    at full stops, union of sentence LCS, counted over distinct words."""
    ours, theirs = ([" ".join(s.split()).split(" ") for s in text.split(".") if s]
                    for text in (prediction, reference))
    if not ours or not theirs:
        return 0.0
    placed = [(p, _places(p)) for p in ours]
    union = set().union(*(_lcs_words(r, *p) for r in theirs for p in placed))
    precision, recall = len(union) / len(set().union(*ours)), len(union) / len(set().union(*theirs))
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_plain(prediction, reference):
    """ROUGE-L F in [0, 1] as Google's `rouge-score`: one LCS over the lower-cased letters and
    digits of the whole texts, no stemming."""
    ours, theirs = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    if not ours or not theirs:
        return 0.0
    rows = _lcs_rows(theirs, _places(ours))
    return 2 * sum(not rows[-1] >> j & 1 for j in range(len(ours))) / (len(ours) + len(theirs))


def distinct_n(texts, n, pooled=False):
    """Distinct / all n-grams of lower-cased words: mean over texts (one shorter than n words scores
    0), or of all texts `pooled`. Of the *predictions*: the authors' script measures the
    references."""
    shares, seen, total = [], set(), 0
    for text in texts:
        words = text.lower().split()
        grams = list(zip(*(words[i:] for i in range(n))))
        shares.append(len(set(grams)) / len(grams) if grams else 0.0)
        if pooled:
            seen.update(grams)
            total += len(grams)
    if pooled:
        return len(seen) / max(total, 1)
    return sum(shares) / len(shares) if shares else 0.0


# ---- METEOR ----------------------------------------------------------------------------------

_TREEBANK = [(re.compile(pattern), by) for pattern, by in (
    ('^"', "``"), ("``", " `` "), (r"""([ ([{<])("|'')""", r"\1 `` "),
    (r"([:,])(\D)", r" \1 \2"), ("[:,]$", r" \g<0> "), (r"\.\.\.|[;@#$%&]", r" \g<0> "),
    (r"""([^.])(\.)([])}>"']*)[^\S\x1c-\x1f]*$""", r"\1 \2\3 "), ("[?!]", r" \g<0> "), ("([^'])' ", r"\1 ' "),
    (r"[][(){}<>]|--", r" \g<0> "), (r"\A|\Z", " "), ("''|\"", " '' "),
    ("([^' ])('[smd]|') ", r"\1 \2 "), ("([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    *((rf"\b({a})({b})\b", r" \1 \2 ") for a, b in (
        ("can", "not"), ("d", "'ye"), ("gim", "me"), ("gon", "na"), ("got", "ta"), ("lem", "me"),
        ("more", "'n"))), (r"\b(wan)(na)(?=\s)", r" \1 \2 "), (r" ('t)(is|was)\b", r" \1 \2 "))]


def treebank_tokens(text):
    """Penn Treebank tokens of the lower-cased text, as nltk's TreebankWordTokenizer."""
    text = text.lower()
    for pattern, by in _TREEBANK:
        text = pattern.sub(by, text)
    return text.split()


def _endings(**rules):
    """A pattern of the endings and what replaces them. An ending of several fits as the longest."""
    return re.compile(f"({'|'.join(rules)})$"), rules


_STEP_2 = [_endings(alli="al"), _endings(
    ational="ate", tional="tion", enci="ence", anci="ance", izer="ize", bli="ble", entli="ent",
    eli="e", ousli="ous", ization="ize", ation="ate", ator="ate", alism="al", iveness="ive",
    fulness="ful", ousness="ous", aliti="al", iviti="ive", biliti="ble", fulli="ful")]
_STEP_3 = _endings(icate="ic", ative="", alize="al", iciti="ic", ical="ic", ful="", ness="")
_STEP_4 = _endings(**dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate "
                                   "iti ous ive ize".split(), ""))
_IRREGULAR = dict(skies="sky", dying="die", lying="lie", tying="tie", innings="inning",
                  outings="outing", cannings="canning") | {w: w for w in (
                      "sky news inning outing canning howe proceed exceed succeed".split())}


def _shape(word):
    """c and v for consonants and vowels; y is a vowel behind a consonant."""
    shape = ""
    for letter in word:
        vowel = letter in "aeiou" or letter == "y" and shape.endswith("c")
        shape += "v" if vowel else "c"
    return shape


def _measure(word):
    """Porter's m: how often a consonant follows a vowel."""
    return _shape(word).count("vc")


def _short(word):
    """Whether it ends consonant, vowel, consonant but w, x, y; or is a vowel and a consonant."""
    shape = _shape(word)
    return shape == "vc" or shape.endswith("cvc") and word[-1] not in "wxy"


def _replace(word, endings, above):
    """Replaces the word's ending if what stands before it has a measure above that."""
    pattern, rules = endings
    found = pattern.search(word)
    if not found or _measure(word[: found.start()]) <= above:
        return word
    return word[: found.start()] + rules[found[0]]


@lru_cache(100_000)
def stem(word):
    """Porter's stemmer with nltk's extensions (its default mode), for a lower-cased word."""
    if word in _IRREGULAR or len(word) <= 2:
        return _IRREGULAR.get(word, word)
    if word.endswith(("sses", "ies")):
        word = word[: -1 if word.endswith("ies") and len(word) == 4 else -2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    ending = re.search("ied$|eed$|ed$|ing$", word)
    start = word[: ending.start()] if ending else ""
    if ending and ending[0] == "ied":
        word = word[: -1 if len(word) == 4 else -2]
    elif ending and ending[0] == "eed":
        word = word[:-1] if _measure(start) else word
    elif "v" in _shape(start):
        word = start
        if word.endswith(("at", "bl", "iz")):
            word += "e"
        elif word[-1] == word[-2:-1] and _shape(word)[-1] == "c":
            word = word if word[-1] in "lsz" else word[:-1]
        elif _measure(word) == 1 and _short(word):
            word += "e"
    if word.endswith("y") and len(word) > 2 and _shape(word[:-1])[-1] == "c":
        word = word[:-1] + "i"
    for endings in _STEP_2:
        word = _replace(word, endings, 0)
    if word.endswith("logi") and _measure(word[:-3]):
        word = word[:-1]
    word = _replace(word, _STEP_3, 0)
    if not re.search("(^|[^st])ion$", word):
        word = _replace(word, _STEP_4, 1)
    if word.endswith("e") and _measure(word[:-1]) > _short(word[:-1]):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


class WordNet:
    """Synonyms from the plain dictionary files of WordNet 3.0 (index.*, data.*, *.exc), a word's
    base forms found as nltk finds them."""

    ENDINGS = dict(
        noun="s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y", adv="",
        verb="s: ies:y es:e es: ed:e ed: ing:e ing:", adj="er: est: er:e est:e")

    def __init__(self, folder):
        self.index, self.data, self.exceptions, self.known = {}, {}, {}, {}
        for part in self.ENDINGS:
            try:
                index, exceptions, self.data[part] = (
                    Path(folder, name).read_bytes()
                    for name in (f"index.{part}", f"{part}.exc", f"data.{part}"))
            except OSError as e:
                raise InputError(f"--wordnet {folder}: {e.strerror}: {e.filename}: give the folder "
                                 "of WordNet's dictionary files (Debian: wordnet-base)") from None
            lines = (line.split() for line in index.decode().splitlines() if line[0] != " ")
            self.index[part] = {word: rest[-int(rest[1]) :] for word, *rest in lines}
            lines = (line.split() for line in exceptions.decode().splitlines())
            self.exceptions[part] = {word: forms for word, *forms in lines}

    def synonyms(self, word):
        """The word and every single word that shares a meaning with it or its base forms."""
        if word not in self.known:
            self.known[word] = {word}
            for part, endings in self.ENDINGS.items():
                forms = self.exceptions[part].get(word)
                if forms is None:
                    rules = (rule.split(":") for rule in endings.split())
                    forms = [word.removesuffix(a) + b for a, b in rules if word.endswith(a)]
                for form in {word, *forms}:
                    for offset in self.index[part].get(form, ()):
                        self.known[word] |= self.meaning(part, int(offset))
        return self.known[word]

    def meaning(self, part, offset):
        """The single words of the meaning at a byte offset."""
        line = self.data[part][offset : self.data[part].index(b"\n", offset)].decode().split()
        words = line[4 : 4 + 2 * int(line[3], 16) : 2]
        return {word.partition("(")[0] for word in words if "_" not in word}


open_wordnet = lru_cache(1)(WordNet)


def _match(ours, theirs, synonyms=lambda word: (word,)):
    """Pairs of positions of equal words or synonyms, each used once, from the end; removes them
    from the {position: word} given."""
    places, pairs = defaultdict(list), []
    for j, word in theirs.items():
        places[word].append(j)
    for i in reversed(ours):
        free = [places[word] for word in synonyms(ours[i]) if places.get(word)]
        if free:
            pairs.append((i, max(free, key=lambda place: place[-1]).pop()))
    for i, j in pairs:
        del ours[i], theirs[j]
    return pairs


def meteor(prediction, reference, wordnet=None):
    """METEOR in [0, 1] (Lavie and Agarwal 2007; α 0.9, β 3, γ 0.5) on lower-cased Treebank tokens:
    equal words, then equal stems, then, with `wordnet` (the folder of its dictionary files),
    synonyms. Equal to nltk 3.10's single_meteor_score."""
    ours, theirs = (dict(enumerate(treebank_tokens(text))) for text in (prediction, reference))
    lengths = len(ours), len(theirs)
    pairs = _match(ours, theirs)
    ours, theirs = ({i: stem(word) for i, word in words.items()} for words in (ours, theirs))
    pairs += _match(ours, theirs)
    if wordnet:  # trap: nltk looks up synonyms of the stems, not of the words
        pairs += _match(ours, theirs, open_wordnet(str(wordnet)).synonyms)
    if not pairs:
        return 0.0
    precision, recall = (len(pairs) / n for n in lengths)
    pairs.sort()
    chunks = 1 + sum((i + 1, j + 1) != after for (i, j), after in zip(pairs, pairs[1:]))
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


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
    page = report(runs, rows, shown, references, args.cards)
    write_atomic(Path(args.out, "report.html"), lambda part: Path(part).write_text(page, "utf-8"))
    print(f"wrote {args.out}/metrics.json and {args.out}/report.html")


# ---- the report ------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>MulCoT-RD report</title><style>
:root{color-scheme:light dark;--line:#8884;--good:#2a8f4d;--bad:#c8453b;--card:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}.wide{overflow-x:auto}small{opacity:.75}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(21rem,100%),1fr))}
.card{background:var(--card);border-left:4px solid var(--good);border-radius:.6rem;padding:.8rem;
overflow-wrap:anywhere}.card.wrong{border-color:var(--bad)}
.card img{float:right;max-width:7rem;border-radius:.4rem;margin-left:.6rem}
mark{background:#fc08;color:inherit;border-radius:.2rem}
dl{margin:.5rem 0 0;clear:both;font-size:.88rem}dt{font-weight:600}dd{margin:0 0 .3rem}
.say b{padding:0 .3rem;border-radius:.3rem;background:var(--card)}
.bar{display:flex;height:.5rem;border-radius:.25rem;overflow:hidden;margin:.3rem 0}
.negative{background:#c8453b}.neutral{background:#999}.positive{background:#2a8f4d}
</style>"""


def html_table(rows):
    """Rows of cells, the first a header."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = (f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def report(runs, rows, shown, references, most):
    """The self-contained page. Every string that comes from data goes through html.escape."""
    (name, predictions, posts), majority = shown, runs["majority"]
    values, title = runs[name], html.escape(name)
    said = lambda p: predictions.get(p.id, {})
    posts = sorted(posts, key=lambda p: (said(p).get("prediction") == p.label, p.id))
    cards = [card(p, said(p), references.get(p.id)) for p in posts[:most]]
    confusion = [["", *LABELS, "unparsed"]]
    confusion += [[f"gold {x}", *line] for x, line in zip(LABELS, values["confusion"])]
    notes = "".join(f"<li>{html.escape(v)}</li>" for k, v in SIGNATURES.items() if k in values)
    return "\n".join([
        PAGE, f"<h1>MulCoT-RD: {title}</h1>",
        f"<p>{values['n']} posts, accuracy {values['accuracy']:.1%}, macro F1 "
        f"{values['macro_f1']:.1%}; always saying {majority['label']}: "
        f"{majority['accuracy']:.1%}.</p>", html_table(rows),
        f"<h2>Confusion of {title}</h2>", html_table(confusion), f"<ul>{notes}</ul>",
        f"<h2>Posts, wrong ones first ({len(cards)} of {len(posts)})</h2>",
        f"<div class=cards>{''.join(cards)}</div></html>\n"])


def card(post, row, reference):
    """One post: image, text with the aspect marked, verdicts, probabilities and chains."""
    esc, prediction = html.escape, row.get("prediction")
    pieces = post.text.split(post.aspect) if post.aspect else [post.text]
    text = f"<mark>{esc(post.aspect or '')}</mark>".join(map(esc, pieces))
    image = f'<img alt="" loading=lazy src="{thumbnail(post.image)}">' if post.image else ""
    bar = "".join(f'<i class={x} style="width:{p:.1%}" title="{x} {p:.1%}"></i>'
                  for x, p in zip(LABELS, row.get("probs") or []))
    verdict, chain = f"gold <b>{post.label}</b> · label <b>{esc(str(prediction))}</b>", ""
    if isinstance(row.get("raw"), str):
        parsed = parse_reasoning(row["raw"])
        verdict += f" · chain says <b>{esc(str(parsed.prediction))}</b>"
        chain = field_list(parsed) or f"<p>unparsed: {esc(row['raw'][:2000])}</p>"
    if reference:
        told = field_list(parse_reasoning(reference))
        chain += f"<details><summary>the teacher's chain</summary>{told}</details>"
    return (f'<article class="card{"" if prediction == post.label else " wrong"}">{image}'
            f"<small>{esc(post.id)}</small><p>{text}</p><div class=say>{verdict}</div>"
            f"<div class=bar>{bar}</div>{chain}</article>\n")


def field_list(parsed):
    """A chain's fields as a definition list, or nothing."""
    items = (f"<dt>{name}</dt><dd>{html.escape(parsed.fields[name])}</dd>"
             for name in FIELDS if name in parsed.fields)
    return f"<dl>{''.join(items)}</dl>" if parsed.fields else ""


def thumbnail(path, side=112):
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
