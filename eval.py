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
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mulcot import (
    FIELDS, LABELS, Help, InputError, beside, load_image, parse_reasoning, read_posts, read_rows,
    run_stage, tell_aside, write_atomic, write_json)


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=Help)
    flag = p.add_argument
    flag("predictions", nargs="+", metavar="[NAME=]FILE",
         help="rows of generate.py predict; the report shows the first; NAME may be GROUP/NAME; "
              "files of one NAME are its seeds, shown as mean ± deviation")
    flag("--gold", required=True, help="labelled posts: .jsonl, .json, .tsv or an MVSA folder")
    flag("--images", help="images folder (default: images/ beside the posts, else their folder)")
    flag("--references", nargs="*", default=[], metavar="ROWS",
         help="rows with cot to compare chains with, beside the cot of the gold posts")
    flag("--chains", help="the teacher's rows, for their statistics")
    flag("--cards", type=int, default=200, help="posts shown in the report, wrong ones first")
    flag("--wordnet", metavar="DIR", help="WordNet 3.0's dictionary files, for METEOR's synonyms "
                                          "(Debian's wordnet-base: /usr/share/wordnet)")
    flag("--embedder", help="all-MiniLM-L6-v2, folder or hub name, for Sim")
    flag("--out", required=True, help="folder for metrics.json, table.md and report.html")
    return p.parse_args(argv)


# ---- labels and scores -----------------------------------------------------------------------


def cross_table(gold, said, classes=LABELS):
    """How often each was said for each gold class: (C, C + 1) counts, None in the last column."""
    place = {c: i for i, c in enumerate((*classes, None))}
    table = np.zeros((len(classes), len(place)), int)
    np.add.at(table, ([place[g] for g in gold], [place[p] for p in said]), 1)
    return table


def table_scores(table):
    """Accuracy, macro and weighted F1 (…) of cross tables (…, C, C + 1)."""
    right = np.diagonal(table, axis1=-2, axis2=-1)  # (…, C)
    support, said = table.sum(-1), table.sum(-2)[..., :-1]
    f1, n = 2 * right / np.maximum(support + said, 1), np.maximum(support.sum(-1), 1)
    return dict(accuracy=right.sum(-1) / n, macro_f1=f1.mean(-1),
                weighted_f1=(f1 * support).sum(-1) / n)


def classification_metrics(gold, predicted):
    """Accuracy, macro and weighted F1, per class precision / recall / F1 / support, confusion
    (rows gold, columns LABELS + unparsed), unparsed. A None prediction is wrong for every class.
    Equal to scikit-learn's with labels=LABELS and zero_division=0."""
    assert len(gold) == len(predicted) and gold, (len(gold), len(predicted))
    table, per_class = cross_table(gold, predicted), {}
    for i, label in enumerate(LABELS):
        right, said, support = (int(x) for x in (table[i, i], table[:, i].sum(), table[i].sum()))
        per_class[label] = dict(precision=right / max(said, 1), recall=right / max(support, 1),
                                f1=2 * right / max(said + support, 1), support=support)
    scores = {name: float(value) for name, value in table_scores(table).items()}
    return dict(n=len(gold), **scores, per_class=per_class, confusion=table.tolist(),
                unparsed=sum(p is None for p in predicted))


def regression_metrics(gold, predicted):
    """MAE and Pearson's r of unclipped numbers; Acc-7 and Acc-5 (clipped to ±3 and ±2, rounded half
    to even); Acc-2 and weighted F1 of the signs, `has0` (>= 0 or not) and `non0` (> 0 or not, gold
    zeros dropped). Equal to MMSA's. choice: None, and what is not finite, is wrong in all but MAE
    and r, which cover the numbers there are, and counts in `unparsed`; `out_of_range` counts
    numbers beyond ±3. A value that is not defined (no numbers, r of a constant) is None."""
    assert len(gold) == len(predicted) and len(gold), (len(gold), len(predicted))
    gold, said = (np.array([np.nan if x is None else x for x in xs], float)
                  for xs in (gold, predicted))
    told = np.isfinite(said)
    g, s = gold[told], said[told]
    varies = len(s) and np.ptp(g) and np.ptp(s)
    out = dict(mae=abs(g - s).mean() if len(s) else None,
               corr=np.corrcoef(g, s)[0, 1] if varies else None)
    for name, edge in (("acc7", 3), ("acc5", 2)):
        rounded = (np.round(np.clip(x, -edge, edge)) for x in (gold, said))
        out[name] = np.equal(*rounded).mean()
    for name, keep, sign in (("has0", told | True, np.greater_equal),
                             ("non0", gold != 0, np.greater)):
        signs = [bool(x) if ok else None for x, ok in zip(sign(said, 0)[keep], told[keep])]
        table = table_scores(cross_table(sign(gold, 0)[keep].tolist(), signs, (False, True)))
        out |= {f"acc2_{name}": table["accuracy"], f"f1_{name}": table["weighted_f1"]}
    out = {name: None if value is None else float(value) for name, value in out.items()}
    return out | dict(unparsed=int((~told).sum()), out_of_range=int((abs(s) > 3).sum()))


def calibration_metrics(gold, probs, bins=15):
    """Whether probabilities (in the order of LABELS, a row per gold label) can be trusted. `ece`:
    expected calibration error over equal-width bins of the confidence, the largest probability;
    `reliability`: [mean confidence, accuracy, count] of each bin that is not empty;
    `risk_coverage`: [coverage, risk], the share of wrong answers among the most confident posts, at
    101 points or fewer; `aurc`: its mean over all n coverages, equal confidences in any order."""
    probs = np.array(probs, float)  # (n, C)
    sure, wrong = probs.max(-1), probs.argmax(-1) != [LABELS.index(g) for g in gold]
    place = np.digitize(sure, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    members = [place == b for b in range(bins) if (place == b).any()]
    reliability = [[float(sure[m].mean()), float(1 - wrong[m].mean()), int(m.sum())]
                   for m in members]
    ece = sum(count * abs(p - right) for p, right, count in reliability) / len(sure)
    _, tied, counts = np.unique(-sure, return_inverse=True, return_counts=True)
    risk = np.repeat(np.bincount(tied, wrong) / counts, counts).cumsum() / np.arange(1, len(sure) + 1)
    shown = np.unique(np.linspace(0, len(sure) - 1, 101).round().astype(int))
    curve = [[float((k + 1) / len(sure)), float(risk[k])] for k in shown]
    return dict(ece=ece, reliability=reliability, aurc=float(risk.mean()), risk_coverage=curve)


def majority_metrics(gold):
    """What always saying the commonest gold label scores."""
    label = Counter(gold).most_common(1)[0][0]
    return dict(label=label) | classification_metrics(gold, [label] * len(gold))


# ---- chance ----------------------------------------------------------------------------------

RESAMPLES = 1000


def resample(gold, predicted, values={}, seed=0):
    """{metric: its (RESAMPLES,) values when n posts are drawn from these n with replacement}, of
    accuracy, both F1 and the means of `values` {metric: n numbers, nan where a post has none}.
    The draws depend on n and the seed alone: runs over the same posts are drawn alike, in pairs."""
    n, rng = len(gold), np.random.default_rng(seed)
    cells = [4 * LABELS.index(g) + (*LABELS, None).index(p) for g, p in zip(gold, predicted)]
    numbers = np.array(list(values.values()), float).reshape(len(values), n).T  # (n, V)
    there = ~np.isnan(numbers)
    posts = np.hstack([np.eye(12)[cells], np.where(there, numbers, 0), there])
    sums = np.concatenate([rng.multinomial(n, np.full(n, 1 / n), 50) @ posts
                           for _ in range(RESAMPLES // 50)])  # (RESAMPLES, 12 + 2 V)
    means = sums[:, 12 : 12 + len(values)] / np.maximum(sums[:, 12 + len(values) :], 1)
    return table_scores(sums[:, :12].reshape(-1, 3, 4)) | dict(zip(values, means.T))


def interval(values):
    """The middle 95 % of resampled values."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def p_value(ours, theirs):
    """Two-sided p of the paired bootstrap (Berg-Kirkpatrick et al. 2012) from the resampled values
    of one metric: how often the difference strays from its mean by as much as that is from 0."""
    difference = ours - theirs
    mean = difference.mean()
    return float((1 + (abs(difference - mean) >= abs(mean)).sum()) / (1 + len(difference)))


def group(seeds):
    """(metrics, resamples) of the runs of one setting as one: numbers become means, `deviation`
    holds their sample deviations, `seeds` each run's own; what is no number is the first run's. A
    resample draws posts, and seeds among those there are."""
    (first, drawn), rng = seeds[0], np.random.default_rng(0)
    if len(seeds) == 1:
        return seeds[0]
    all_metrics = [metrics for metrics, _ in seeds]
    number = lambda x: isinstance(x, (int, float))
    shared = [k for k in first if all(number(m.get(k)) for m in all_metrics)]
    values = {k: [m[k] for m in all_metrics] for k in shared}
    means = {k: v[0] if len(set(v)) == 1 else float(np.mean(v)) for k, v in values.items()}
    deviation = {k: float(np.std(v, ddof=1)) for k, v in values.items()}
    pick = rng.integers(len(seeds), size=(len(seeds), RESAMPLES)), np.arange(RESAMPLES)
    drawn = {k: np.array([d[k] for _, d in seeds])[pick].mean(0)
             for k in drawn if all(k in d for _, d in seeds)}
    out = first | means | dict(deviation=deviation, seeds=all_metrics)
    return out | dict(intervals={k: interval(v) for k, v in drawn.items()}), drawn


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


# ---- Sim -------------------------------------------------------------------------------------


def load_embedder(name):
    """embed(texts) -> two (n, D) tensors: the mean of the last hidden states over a text's first
    256 word pieces (as all-MiniLM-L6-v2 is used, and the authors do), and over all its pieces, read
    in windows of 256. `name`: a folder or a name on the hub."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as e:
        raise InputError(f"--embedder {name} cannot be loaded ({str(e).splitlines()[0]}): give the "
                         "folder of all-MiniLM-L6-v2, or its name where the hub can be "
                         "reached") from None

    @torch.no_grad()
    def embed(texts):
        windows = tokenizer(texts, truncation=True, max_length=256, padding=True,
                            return_overflowing_tokens=True, return_tensors="pt")
        text = windows.pop("overflow_to_sample_mapping")  # (W,) which text a window is from
        real = windows["attention_mask"][..., None].float()  # (W, T, 1)
        sums = (model(**windows).last_hidden_state * real).sum(1)  # (W, D)
        first, counts = torch.searchsorted(text, torch.arange(len(texts))), real.sum(1)
        whole = [torch.zeros(len(texts), x.shape[1]).index_add(0, text, x) for x in (sums, counts)]
        return sums[first] / counts[first], whole[0] / whole[1]

    return embed


def similarities(pairs, embed):
    """Cosines of (prediction, reference) texts -> two lists: first 256 pieces, whole texts. An
    empty prediction scores 0."""
    order = sorted((i for i, (ours, _) in enumerate(pairs) if ours.strip()),
                   key=lambda i: len(pairs[i][0]))
    out = np.zeros((2, len(pairs)))
    for a in range(0, len(order), 16):
        batch = order[a : a + 16]
        ours, theirs = (embed([pairs[i][side] for i in batch]) for side in (0, 1))
        for k in (0, 1):
            out[k, batch] = torch.cosine_similarity(ours[k], theirs[k]).numpy()
    return out.tolist()


# ---- chains ----------------------------------------------------------------------------------

SIGNATURES = {
    "bleu4": "BLEU-4|13a|per post|no smoothing|mean = sacrebleu sentence, none",
    "bleu4_corpus": "BLEU-4|13a|corpus|exp smoothing = sacrebleu default",
    "rouge_l": "ROUGE-L F|split at full stops|union LCS|distinct words|mean = rouge 1.0.1",
    "rouge_l_plain": "ROUGE-L F|one LCS|a-z 0-9, lower case|no stemmer|mean = rouge-score",
    "meteor": "METEOR|treebank, lower case|exact + Porter|no synonyms|mean = nltk 3.10",
    "meteor_other": "as METEOR, against another post's reference: what form alone earns",
    "sim": "Sim|cosine of mean-pooled {embedder}|first 256 pieces|mean = sentence-transformers",
    "sim_whole": "Sim|cosine of mean-pooled {embedder}|whole chain in windows of 256|mean",
    "distinct_1": "Distinct-1|of predictions|lower case, spaces|per text, mean",
    "distinct_2": "Distinct-2|of predictions|lower case, spaces|per text, mean",
    "distinct_1_pooled": "Distinct-1|of predictions|lower case, spaces|all texts as one",
    "distinct_2_pooled": "Distinct-2|of predictions|lower case, spaces|all texts as one",
    "distinct_1_references": "Distinct-1|of references, as the authors' script|per text, mean",
    "distinct_2_references": "Distinct-2|of references, as the authors' script|per text, mean"}


def signatures(wordnet=None, embedder=None):
    """SIGNATURES with what the command line chose."""
    synonyms = "WordNet 3.0 synonyms" if wordnet else "no synonyms"
    return {k: v.replace("no synonyms", synonyms).replace("{embedder}", Path(embedder or "").name)
            for k, v in SIGNATURES.items()}


def chain_text(parsed):
    """What the text metrics compare: the fields' texts, in order, without names and quotes."""
    return " ".join(parsed.fields[name] for name in FIELDS if name in parsed.fields)


def names_only(parsed, label):
    """Whether Final_conclusion names that label and no other."""
    named = re.findall(rf"\b({'|'.join(LABELS)})\b", parsed.fields.get("Final_conclusion", "").lower())
    return set(named) == {label}


def chain_metrics(rows, references, wordnet=None, embed=None, per_post=None):
    """What the chains of prediction rows {id: row} are worth, against references {id: text}.

    parse_rate: share with five fields and a label; agreement: share whose Prediction is the row's
    label; concludes: share whose Final_conclusion names the row's label and no other. An empty or
    unparsed chain scores 0 in everything but Distinct, and `unparsed_chains` counts them. What has
    one value per post goes into `per_post` {metric: {id: value}} too."""
    values = {} if per_post is None else per_post
    parsed = {i: parse_reasoning(row["raw"]) for i, row in rows.items()}
    said = {i: row.get("prediction") for i, row in rows.items()}
    texts = {i: chain_text(r) if r.complete else "" for i, r in parsed.items()}
    values["parse_rate"] = {i: float(r.complete) for i, r in parsed.items()}
    values["agreement"] = {i: float(r.prediction is not None and r.prediction == said[i])
                           for i, r in parsed.items()}
    values["concludes"] = {i: float(names_only(r, said[i])) for i, r in parsed.items()}
    told = {i: chain_text(parse_reasoning(references[i])) for i in rows if i in references}
    pairs = {i: (texts[i], text) for i, text in told.items()}
    if pairs:
        counts = {i: bleu_counts(*pair) for i, pair in pairs.items()}
        values["bleu4"] = {i: bleu_score(c) for i, c in counts.items()}
        values["rouge_l"] = {i: rouge_l(*pair) for i, pair in pairs.items()}
        values["rouge_l_plain"] = {i: rouge_l_plain(*pair) for i, pair in pairs.items()}
        values["meteor"] = {i: meteor(*pair, wordnet) for i, pair in pairs.items()}
    if pairs and embed:
        for name, cosines in zip(("sim", "sim_whole"), similarities([*pairs.values()], embed)):
            values[name] = dict(zip(pairs, cosines))
    out = {name: sum(v.values()) / len(v) for name, v in values.items()}
    out |= dict(chains=len(rows), unparsed_chains=sum(not text for text in texts.values()))
    whole = [text for text in texts.values() if text]
    for n in (1, 2):
        out |= {f"distinct_{n}": distinct_n(whole, n),
                f"distinct_{n}_pooled": distinct_n(whole, n, pooled=True)}
        if pairs:
            out[f"distinct_{n}_references"] = distinct_n(told.values(), n)
    if pairs:
        others = [*told.values()]  # choice: the reference half the list away, at most 200 of them
        others = zip(pairs, others[len(others) // 2 :] + others[: len(others) // 2])
        others = [meteor(texts[i], text, wordnet) for i, text in islice(others, 200)]
        out |= dict(referenced=len(pairs), meteor_other=sum(others) / len(others),
                    bleu4_corpus=bleu_score(sum(counts.values()), smooth=True))
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
        probs, score = row.get("probs") or [0, 0, 0], row.get("score")
        number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
        if not (isinstance(probs, list) and len(probs) == 3
                and all(number(p) and 0 <= p <= 1 for p in probs)):
            raise InputError(f"{path}:{n}: probs must be three numbers from 0 to 1")
        if not (score is None or number(score)):
            raise InputError(f"{path}:{n}: score {score!r} is no number")
        rows[str(row["id"])] = row
    return rows


def run_metrics(path, gold, references, stages={}, wordnet=None, embed=None):
    """(metrics, resamples, rows, gold posts) of one prediction file, against all gold posts
    {id: post} of the splits that it covers: a post without a row counts as unparsed."""
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
    own, values = {p.id: rows.get(p.id, {}) for p in wanted}, {}
    labels, predicted = [p.label for p in wanted], [r.get("prediction") for r in own.values()]
    metrics = classification_metrics(labels, predicted)
    metrics |= dict(missing=len(missing), source=next(iter(rows.values())).get("source"))
    chains = {i: row for i, row in own.items() if isinstance(row.get("raw"), str)}
    if chains:  # a post without a chain has an empty one, as one without a label is unparsed
        chains = {i: row if i in chains else row | dict(raw="") for i, row in own.items()}
        metrics |= chain_metrics(chains, references, wordnet, embed, values)
        right = {i: float(a == b) for i, a, b in zip(own, labels, predicted)}
        parts = faithfulness(right, values["agreement"], stages)
        metrics |= {name: sum(v.values()) / len(v) for name, v in parts.items()}
        values |= parts
    sure = [p for p in wanted if own[p.id].get("probs")]
    if sure:
        metrics |= calibration_metrics([p.label for p in sure], [own[p.id]["probs"] for p in sure])
    if any(p.score is not None and own[p.id].get("score") is not None for p in wanted):
        scored = [p for p in wanted if p.score is not None]
        metrics["scores"] = regression_metrics([p.score for p in scored],
                                               [own[p.id].get("score") for p in scored])
        metrics |= {k: metrics["scores"][k] for k in ("mae", "corr", "acc7", "acc2_non0")}
    drawn = resample(labels, predicted, {name: [v.get(p.id, math.nan) for p in wanted]
                                         for name, v in values.items()})
    metrics["intervals"] = {name: interval(v) for name, v in drawn.items()}
    return metrics, drawn, rows, wanted


def faithfulness(right, agreement, stages):
    """{name: {id: 0 or 1}} of the label's accuracy where chain and label agree and where not, and
    of accuracy and agreement on the posts whose reference came about unaided (stage 1) and
    label-conditioned (stage 2); parts without posts are left out."""
    ids = dict(agree=[i for i, a in agreement.items() if a],
               disagree=[i for i, a in agreement.items() if not a],
               unaided=[i for i in right if stages.get(i) == 1],
               conditioned=[i for i in right if stages.get(i) == 2])
    parts = {f"accuracy_{part}": {i: right[i] for i in ids[part]} for part in ids}
    parts |= {f"agreement_{part}": {i: agreement[i] for i in ids[part]}
              for part in ("unaided", "conditioned")}
    return {name: part for name, part in parts.items() if part}


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
    """How the teacher's kept chains came about. They are right by the way they were chosen; what was
    not chosen for is whether Final_conclusion names the label and no other (`concludes`).
    `contradictions`: share of stage-2 answers whose Prediction was not the label they were given;
    at least, since the answers before a kept one are not on file."""
    rows, rejects = chain_rows(path), read_rows(beside(path, "rejects.jsonl"))
    stages, tries = Counter(row.get("stage") for row in rows), [row.get("tries", 1) for row in rows]
    failed = [str(a["problem"]) for row in rejects for a in row.get("attempts", ())
              if a["stage"] == 2]
    wrong = sum(problem.startswith("predicts ") for problem in failed)
    concludes = {1: [], 2: []}
    for row in rows:
        parsed = parse_reasoning(row["cot"])
        concludes.get(row.get("stage"), []).append(names_only(parsed, parsed.prediction))
    return dict(kept=len(rows), unaided=stages[1], label_conditioned=stages[2],
                set_aside=len(rejects), answers_per_kept_chain=sum(tries) / max(len(rows), 1),
                concludes={name: sum(concludes[stage]) / max(len(concludes[stage]), 1)
                           for stage, name in ((1, "unaided"), (2, "label_conditioned"))},
                contradictions=wrong / max(stages[2] + len(failed), 1))


def diagnose(runs, teacher=None):
    """What the numbers of runs {name: metrics} and of the teacher point to, in plain words, by the
    paper's failure signatures; only what applies. choice: high Distinct is that of the references;
    low METEOR hardly exceeds that against another post's reference; many is above 5 %."""
    said = []
    for name, m in runs.items():
        if m.get("sim", 1) < 0.85:
            said.append(f"{name}: Sim {m['sim']:.1%} is below 85 %: the prompts may be out of line "
                        "with the task")
        above = runs.get(name.removesuffix("student") + "assistant", m)
        gap = above["accuracy"] - m["accuracy"]
        if name.endswith("student") and gap > 0.05 and m.get("source") != "base":
            said.append(f"{name}: {100 * gap:.1f} points below its assistant: λ may be too high, "
                        "try train.py student --lam 0.1 to 0.2")
        if (m.get("distinct_2", 0) >= m.get("distinct_2_references", 1)
                and m.get("meteor", 1) < m.get("meteor_other", 0) + 0.05):
            said.append(f"{name}: Distinct-2 {m['distinct_2']:.2f} is as high as the references', "
                        f"yet METEOR {m['meteor']:.2f} hardly exceeds the {m['meteor_other']:.2f} "
                        "against another post's reference: fluent but ungrounded chains")
    if teacher and teacher["contradictions"] > 0.05:
        said.append(f"teacher: {teacher['contradictions']:.1%} of its stage-2 answers contradict "
                    "the label they were given: a weak teacher or noisy labels")
    return said


COLUMNS = {"accuracy": "accuracy", "intervals": "95 %", "macro_f1": "macro F1",
           "weighted_f1": "weighted F1", "mae": "MAE", "corr": "Corr", "acc7": "Acc-7",
           "acc2_non0": "Acc-2", "unparsed": "unparsed", "parse_rate": "chains parsed",
           "agreement": "chain = label", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L",
           "meteor": "METEOR", "sim": "Sim"}
MORE = {"bleu4_corpus": "BLEU-4 corpus", "rouge_l_plain": "ROUGE-L plain", "sim_whole": "Sim whole",
        "distinct_1": "Distinct-1", "distinct_2": "Distinct-2",
        "distinct_1_pooled": "Distinct-1 pooled", "distinct_2_pooled": "Distinct-2 pooled",
        "concludes": "conclusion = label", "accuracy_agree": "acc. where chain = label",
        "accuracy_disagree": "acc. where not", "ece": "ECE", "aurc": "AURC"}


def table(runs, columns=COLUMNS, best=(), bold="{}*"):
    """{name: metrics} -> rows of cells with a header row. `best`: (name, key) of cells in `bold`."""
    keys = [k for k in columns if any(k in m for m in runs.values())]
    rows = [["run", *(columns[k] for k in keys)]]
    for name, metrics in runs.items():
        cells = []
        for k in keys:
            value, spread = metrics.get(k), metrics.get("deviation", {}).get(k)
            cell = f"{value:.3f}" if isinstance(value, float) else str("" if value is None else value)
            if k == "intervals":
                cell = "–".join(f"{x:.2f}" for x in value["accuracy"]) if value else ""
            cell += "" if spread is None else f" ± {spread:.3f}"
            cells.append(bold.format(cell) if (name, k) in best else cell)
        rows.append([name, *cells])
    return rows


def compare(runs, drawn):
    """{metric: best, next, difference, p of the paired bootstrap} over the runs of `drawn`
    {name: resamples}, which must be of the same posts."""
    out = {}
    for key in (k for k in COLUMNS if k != "unparsed"):
        order = sorted((name for name in drawn if key in drawn[name]), key=lambda n: -runs[n][key])
        if len(order) > 1:
            best, after = order[:2]
            out[key] = dict(best=best, next=after, difference=runs[best][key] - runs[after][key],
                            p=p_value(drawn[best][key], drawn[after][key]))
    return out


def read_specs(specs):
    """[NAME=]FILE … -> {name: files}. A name given with several files is one setting's seeds."""
    files = {}
    for spec in specs:
        named = "=" in spec and not os.path.exists(spec)
        name, path = spec.split("=", 1) if named else (Path(spec).stem, spec)
        if not name or name.split("/")[0] in ("majority", "signatures", "teacher", "comparisons",
                                              "diagnosis"):
            raise InputError(f"run name {name!r} is taken: name the files apart, NAME=FILE")
        for other, paths in files.items():
            if name == other and (not named or path in paths):
                raise InputError(f"run name {name!r} is taken: name the files apart, NAME=FILE")
            if f"{name}/".startswith(f"{other}/") != f"{other}/".startswith(f"{name}/"):
                raise InputError(f"run name {name!r} is a group of {other!r}, or the other way")
        files.setdefault(name, []).append(path)
    return files


def evaluate(args):
    """Table, metrics.json, table.md and report.html of the given runs."""
    aside = []
    gold = {p.id: p for p in read_posts(args.gold, args.images, aside) if p.label}
    tell_aside(aside, "gold rows cannot be read and are in no number below")
    if not gold:
        raise InputError(f"{args.gold} has no labelled post")
    references = {p.id: p.cot for p in gold.values() if p.cot}
    stages = {p.id: p.extra.get("stage") for p in gold.values()}
    for path in args.references:
        told = {str(row["id"]): row for row in chain_rows(path)}
        references |= {i: row["cot"] for i, row in told.items()}
        stages |= {i: row.get("stage") for i, row in told.items()}
        if not told.keys() & gold.keys():
            print(f"warning: no row of {path} has the id of a gold post: not compared")
    embed = load_embedder(args.embedder) if args.embedder else None
    runs, drawn, covered, shown = {}, {}, set(), None
    for name, paths in read_specs(args.predictions).items():
        seeds = []
        for path in paths:
            metrics, resamples, rows, wanted = run_metrics(path, gold, references, stages,
                                                           args.wordnet, embed)
            seeds.append((metrics, resamples))
            covered.add(tuple(p.id for p in wanted))
            shown = shown or (name, rows, wanted)
        runs[name], drawn[name] = group(seeds)
    runs = {"majority": majority_metrics([p.label for p in shown[2]])} | runs
    teacher = teacher_metrics(args.chains) if args.chains else None
    compared = compare(runs, drawn) if len(covered) == 1 else {}
    told = dict(signatures={k: v for k, v in signatures(args.wordnet, args.embedder).items()
                            if any(k in m for m in runs.values())},
                comparisons=compared, diagnosis=diagnose(runs, teacher))
    tell(runs, teacher, embed, told)
    write_metrics(args.out, runs, teacher, told)
    page = report(runs, table(runs, COLUMNS | MORE), shown, references, args.cards)
    write_atomic(Path(args.out, "report.html"), lambda part: Path(part).write_text(page, "utf-8"))
    print(f"wrote {args.out}/metrics.json, {args.out}/table.md and {args.out}/report.html")


def tell(runs, teacher, embed, told):
    """Prints the table with what belongs under it."""
    best = {(c["best"], key) for key, c in told["comparisons"].items() if c["p"] < 0.05}
    rows = table(runs, best=best)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        line = (c.rjust(w) for c, w in zip(cells, widths[1:]))
        print(name.ljust(widths[0]), *line, sep="  ")
    if best:
        print(SIGNIFICANT.format("*"))
    if teacher:
        print(f"teacher: {teacher['kept']} chains kept, {teacher['unaided']} unaided, "
              f"{teacher['label_conditioned']} label-conditioned, {teacher['set_aside']} set aside")
    for name in (k for k in COLUMNS if k in told["signatures"]):
        print(f"  {told['signatures'][name]}")
    if not embed and "meteor" in told["signatures"]:
        print("  Sim is left out: --embedder names all-MiniLM-L6-v2 or its folder")
    for line in told["diagnosis"]:
        print(f"diagnosis: {line}")


SIGNIFICANT = "{}: best, and better than the next best (paired bootstrap over posts, p < 0.05)"


def write_metrics(out, runs, teacher, told):
    """metrics.json, and table.md with all columns."""
    metrics = dict(told)
    for name, values in runs.items():  # base/student becomes {"base": {"student": …}}
        *groups, leaf = name.split("/")
        place = metrics
        for group_name in groups:
            place = place.setdefault(group_name, {})
        place[leaf] = values
    if teacher:
        metrics["teacher"] = teacher
    write_json(Path(out, "metrics.json"), metrics)
    best = {(c["best"], key) for key, c in told["comparisons"].items() if c["p"] < 0.05}
    rows = table(runs, COLUMNS | MORE, best, bold="**{}**")
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    lines += ["", SIGNIFICANT.format("bold"), "", *(f"- {x}" for x in told["diagnosis"]), "",
              *(f"- `{k}`: {v}" for k, v in told["signatures"].items()), ""]
    write_atomic(Path(out, "table.md"), lambda part: Path(part).write_text("\n".join(lines), "utf-8"))


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
