"""Numbers and a report from prediction files; parses the raw text anew, runs no language model.

    python eval.py predictions.jsonl --gold test.tsv --images img --out results
    python eval.py student=s.jsonl assistant=a.jsonl --gold posts.jsonl --out results \\
        --references references.jsonl --wordnet /usr/share/wordnet --embedder all-MiniLM-L6-v2
    python eval.py full=1.jsonl full=2.jsonl less=3.jsonl less=4.jsonl --gold test.tsv --out table

Last line: `wrote results/metrics.json, results/table.md and results/report.html`. A prediction row
needs id and prediction; with `raw` (the chain) the chain is judged too, with `probs` its
confidence, with `score` the number. Gold labels come from --gold, never from prediction rows. The
only network that may run is Sim's sentence embedder.
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
    """Accuracy, macro and weighted F1, (…) each, of cross tables (…, C, C + 1)."""
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


def majority_metrics(gold):
    """What always saying the commonest gold label scores."""
    label = Counter(gold).most_common(1)[0][0]
    return dict(label=label) | classification_metrics(gold, [label] * len(gold))


def regression_metrics(gold, predicted):
    """MMSA's: MAE and Pearson's r of unclipped numbers; Acc-7 and Acc-5, clipped to ±3 and ±2 and
    rounded half to even; Acc-2 and weighted F1 of the signs, `has0` (>= 0 or not) and `non0` (> 0
    or not, gold zeros dropped). choice: None, or a number that is not finite, is wrong in all but
    MAE and r, which are of the other posts (None where undefined), and counts in `unparsed`; an
    answer beyond ±3 counts as any other, and in `out_of_range`."""
    assert len(gold) == len(predicted) and len(gold), (len(gold), len(predicted))
    gold, said = (np.array(numbers, float) for numbers in (gold, predicted))  # None becomes nan
    told = np.isfinite(said)
    g, s = gold[told], said[told]
    out = dict(mae=float(abs(g - s).mean()) if len(s) else None, corr=None,
               unparsed=int((~told).sum()), out_of_range=int((abs(s) > 3).sum()))
    if len(s) and np.ptp(g) and np.ptp(s):
        out["corr"] = float(np.corrcoef(g, s)[0, 1])
    for name, edge in (("acc7", 3), ("acc5", 2)):
        right = np.round(np.clip(gold, -edge, edge)) == np.round(np.clip(said, -edge, edge))
        out[name] = float((right & told).mean())
    for name, among, sign in (("has0", gold == gold, np.greater_equal),
                              ("non0", gold != 0, np.greater)):
        signs = [bool(x) if ok else None for x, ok in zip(sign(said, 0)[among], told[among])]
        scores = table_scores(cross_table(sign(gold, 0)[among].tolist(), signs, (False, True)))
        out |= {f"acc2_{name}": float(scores["accuracy"]),
                f"f1_{name}": float(scores["weighted_f1"])}
    return out


def calibration_metrics(gold, probs, bins=15):
    """Whether probabilities (n, 3), in the order of LABELS, can be trusted. `ece`: expected
    calibration error over equal-width bins of the confidence (the largest probability);
    `reliability`: [mean confidence, accuracy, count] of each bin that is not empty;
    `risk_coverage`: [coverage, share of wrong answers among so many most confident posts], at most
    101 points; `aurc`: the mean risk over all n coverages, equal confidences in random order."""
    probs = np.array(probs, float)
    sure, wrong = probs.max(-1), probs.argmax(-1) != [LABELS.index(g) for g in gold]
    place = np.digitize(sure, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    reliability = [[float(sure[place == b].mean()), float(1 - wrong[place == b].mean()),
                    int((place == b).sum())] for b in np.unique(place)]
    ece = sum(count * abs(p - right) for p, right, count in reliability) / len(sure)
    _, tied, counts = np.unique(-sure, return_inverse=True, return_counts=True)
    wrong = np.repeat(np.bincount(tied, wrong) / counts, counts)  # the most confident first
    risk = wrong.cumsum() / np.arange(1, len(sure) + 1)
    shown = np.unique(np.linspace(0, len(sure) - 1, 101).round().astype(int))
    curve = [[float(k + 1) / len(sure), float(risk[k])] for k in shown]
    return dict(ece=ece, reliability=reliability, aurc=float(risk.mean()), risk_coverage=curve)


# ---- chance ----------------------------------------------------------------------------------

RESAMPLES = 1000


def resample(gold, predicted, values={}, seed=0):
    """{metric: (RESAMPLES,) what it is when n posts are drawn from these n with replacement}, for
    accuracy, both F1 and the means of `values` {metric: n numbers, nan where a post has none}.
    The draws depend on n and the seed alone, so runs over the same posts are drawn in pairs."""
    n, rng = len(gold), np.random.default_rng(seed)
    cells = [4 * LABELS.index(g) + (*LABELS, None).index(p) for g, p in zip(gold, predicted)]
    numbers = np.array([*values.values()], float).reshape(-1, n).T  # (n, V)
    there = ~np.isnan(numbers)
    posts = np.hstack([np.eye(12)[cells], np.where(there, numbers, 0), there])
    draws = (rng.multinomial(n, np.full(n, 1 / n), 50) @ posts for _ in range(RESAMPLES // 50))
    tables, sums, counts = np.split(np.concatenate([*draws]), (12, 12 + len(values)), axis=1)
    means = sums / np.where(counts, counts, np.nan)
    return table_scores(tables.reshape(-1, 3, 4)) | dict(zip(values, means.T))


def intervals(drawn):
    """{metric: [low, high]}, the middle 95 % of its resamples."""
    return {name: np.nanpercentile(values, [2.5, 97.5]).tolist() for name, values in drawn.items()}


def p_value(ours, theirs):
    """Two-sided p of the paired bootstrap (Berg-Kirkpatrick et al. 2012) from one metric's
    resamples: how often the difference strays from its mean by as much as that is from 0."""
    difference = (ours - theirs)[~np.isnan(ours - theirs)]
    mean = difference.mean()
    return float((1 + (abs(difference - mean) >= abs(mean)).sum()) / (1 + len(difference)))


def group_seeds(runs):
    """[(metrics, resamples), …] of one setting's runs -> one such pair. Numbers become means,
    `deviation` holds their sample deviations, `seeds` the runs' own metrics, the rest is the first
    run's. A resample draws posts, and which of the runs counts."""
    (first, drawn), everyone = runs[0], [metrics for metrics, _ in runs]
    if len(runs) == 1:
        return runs[0]
    numbers = {k: [m.get(k) for m in everyone] for k in first}
    numbers = {k: v for k, v in numbers.items() if all(isinstance(x, (int, float)) for x in v)}
    pick = np.random.default_rng(0).integers(len(runs), size=(len(runs), RESAMPLES))
    drawn = {k: np.array([d[k] for _, d in runs])[pick, np.arange(RESAMPLES)].mean(0)
             for k in drawn if all(k in d for _, d in runs)}
    mean = {k: v[0] if len({*v}) == 1 else float(np.mean(v)) for k, v in numbers.items()}
    deviation = {k: float(np.std(v, ddof=1)) for k, v in numbers.items()}
    return first | mean | dict(deviation=deviation, seeds=everyone,
                               intervals=intervals(drawn)), drawn


# ---- BLEU, ROUGE, Distinct -------------------------------------------------------------------

_13A = [(re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
        (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
        (re.compile(r"([\.,])([^0-9])"), r" \1 \2"), (re.compile(r"([0-9])(-)"), r"\1 \2 ")]


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
    """What BLEU is made of (10,): common 1- to 4-grams, the prediction's, both lengths."""
    p, r = tokens_13a(prediction.rstrip()), tokens_13a(reference.rstrip())
    common, total = [], [max(0, len(p) - n) for n in range(4)]
    for n in range(1, 5):
        ours, theirs = (Counter(zip(*(words[i:] for i in range(n)))) for words in (p, r))
        common.append(sum((ours & theirs).values()))
    return np.array([*common, *total, len(p), len(r)], float)


def bleu_score(counts, smooth=False):
    """BLEU-4 in [0, 1] from the bleu_counts of a post, or from their sum over a corpus. `smooth`:
    the k-th order without a common n-gram counts as 1 / 2^k of one (sacrebleu's default)."""
    common, total, (ours, theirs) = np.split(counts, (4, 8))
    if not common[0] or not total.all() or not (smooth or common.all()):
        return 0.0
    common = np.where(common, common, 0.5 ** np.cumsum(common == 0))
    return math.exp(min(0.0, 1 - theirs / ours) + np.log(common / total).mean())


def bleu4(prediction, reference):
    """Sentence BLEU-4 in [0, 1]: 13a tokens, no smoothing, no effective order (the authors' way: a
    pair without a common 4-gram scores 0). Equal to sacrebleu's sentence BLEU with
    smooth_method="none"."""
    return bleu_score(bleu_counts(prediction, reference))


def _lcs_rows(x, y):
    """The table of the lengths of longest common subsequences, a row of bits per word of x (Hyyrö
    2004): bit j of row i is 0 where length(i, j) = length(i, j - 1) + 1."""
    places, row, rows = {}, (1 << len(y)) - 1, []
    for j, word in enumerate(y):
        places[word] = places.get(word, 0) | 1 << j
    for word in x:
        both = row & places.get(word, 0)
        row = (row + both) | (row - both)
        rows.append(row)
    return rows


def _lcs_words(x, y):
    """The words of one longest common subsequence, ties broken as `rouge` 1.0.1 breaks them: up a
    row where length(i - 1, j) > length(i, j - 1), which is where row i grows at j."""
    rows, i, j, words = _lcs_rows(x, y), len(x) - 1, len(y) - 1, set()
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
    union = set().union(*(_lcs_words(r, p) for r in theirs for p in ours))
    precision, recall = len(union) / len(set().union(*ours)), len(union) / len(set().union(*theirs))
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_plain(prediction, reference):
    """ROUGE-L F in [0, 1] as Google's `rouge-score`: one LCS over whole texts, lower-cased ASCII
    letters and digits, no stemming."""
    ours, theirs = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    if not ours or not theirs:
        return 0.0
    common = len(ours) - (_lcs_rows(theirs, ours)[-1] & (1 << len(ours)) - 1).bit_count()
    return 2 * common / (len(ours) + len(theirs))


def _ngrams(text, n):
    """n-grams of the lower-cased words."""
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n))))


def distinct_n(texts, n):
    """Mean over texts of distinct / all n-grams of lower-cased words; a text shorter than n words
    scores 0. Of the *predictions*: the authors' script measures the references."""
    shares = [len({*g}) / max(len(g), 1) for g in (_ngrams(text, n) for text in texts)]
    return sum(shares) / max(len(shares), 1)


def distinct_n_pooled(texts, n):
    """Distinct / all n-grams of all texts together."""
    seen = Counter(gram for text in texts for gram in _ngrams(text, n))
    return len(seen) / max(seen.total(), 1)


# ---- METEOR ----------------------------------------------------------------------------------

_TREEBANK = [(re.compile(pattern), by) for pattern, by in (
    ('^"', "``"), ("``", " `` "), (r"""([ ([{<])("|'')""", r"\1 `` "),
    (r"([:,])(\D)", r" \1 \2"), ("[:,]$", r" \g<0> "), (r"\.\.\.|[;@#$%&]", r" \g<0> "),
    (r"""([^.])(\.)([])}>"']*)[^\S\x1c-\x1f]*$""", r"\1 \2\3 "), ("[?!]", r" \g<0> "),
    ("([^'])' ", r"\1 ' "), (r"[][(){}<>]|--", r" \g<0> "), (r"\A|\Z", " "), ("''|\"", " '' "),
    ("([^' ])('[smd]|') ", r"\1 \2 "), ("([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    *((rf"\b({a})({b})", r" \1 \2 ") for a, b in (
        ("can", r"not\b"), ("d", r"'ye\b"), ("gim", r"me\b"), ("gon", r"na\b"), ("got", r"ta\b"),
        ("lem", r"me\b"), ("more", r"'n\b"), ("wan", r"na(?=\s)"))),
    (r" ('t)(is|was)\b", r" \1 \2 "))]


def treebank_tokens(text):
    """Penn Treebank tokens of the lower-cased text, as nltk's TreebankWordTokenizer."""
    text = text.lower()
    for pattern, by in _TREEBANK:
        text = pattern.sub(by, text)
    return text.split()


def _endings(above, rules):
    """One of Porter's steps: a pattern of endings, {ending: what replaces it}, and the measure
    that the word before it must exceed."""
    rules = dict(rule.split(":") for rule in rules.split())
    pattern = re.compile(f"({'|'.join(rules)})$")
    return pattern, {ending.partition(")")[2] or ending: by for ending, by in rules.items()}, above


_STEPS_2_TO_4 = [
    _endings(0, "alli:al"),
    _endings(0, "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble entli:ent eli:e "
                "ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful "
                "ousness:ous aliti:al iviti:ive biliti:ble fulli:ful (?<=l)ogi:og"),
    _endings(0, "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"),
    _endings(1, "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: (?<=[st])ion: ou: ism: "
                "ate: iti: ous: ive: ize:")]
_IRREGULAR = dict(skies="sky", dying="die", lying="lie", tying="tie", innings="inning",
                  outings="outing", cannings="canning") | {w: w for w in (
                      "sky news inning outing canning howe proceed exceed succeed".split())}


def _shape(word):
    """c and v for consonants and vowels; y is a vowel behind a consonant."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or letter == "y" and shape.endswith("c") else "c"
    return shape


def _measure(word):
    """Porter's m: how often a consonant follows a vowel."""
    return _shape(word).count("vc")


def _short(word):
    """Whether it ends consonant, vowel, consonant but w, x, y; or is a vowel and a consonant."""
    shape = _shape(word)
    return shape == "vc" or shape.endswith("cvc") and word[-1] not in "wxy"


@lru_cache(100_000)
def stem(word):
    """Porter's stem of a lower-cased word with nltk's extensions (its default mode)."""
    if word in _IRREGULAR or len(word) <= 2:
        return _IRREGULAR.get(word, word)
    word = re.sub("^(.ie)s$|(ss)es$|(i)es$|(ss)$|s$", r"\1\2\3\4", word)
    word = re.sub("^(.ie)d$|(i)ed$", r"\1\2", word)
    start = re.sub("(ed|ing)$", "", word)
    if word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) else word
    elif start != word and "v" in _shape(start):
        word = start
        if re.search("(at|bl|iz)$", word) or _measure(word) == 1 and _short(word):
            word += "e"
        elif word[-1] == word[-2:-1] and word[-1] not in "lsz" and _shape(word)[-1] == "c":
            word = word[:-1]
    if re.search("..y$", word) and _shape(word[:-1])[-1] == "c":
        word = word[:-1] + "i"
    for pattern, rules, above in _STEPS_2_TO_4:
        found = pattern.search(word)
        if found and _measure(word[: found.start()]) > above:
            word = word[: found.start()] + rules[found[0]]
    if word.endswith("e") and _measure(word[:-1]) > _short(word[:-1]):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


_BASE_FORMS = dict(
    noun="s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y", adv="",
    verb="s: ies:y es:e es: ed:e ed: ing:e ing:", adj="er: est: er:e est:e")


@lru_cache(1)
def read_wordnet(folder):
    """synonyms(word) -> the word and every single word that shares a meaning with it or with a base
    form of it, from WordNet 3.0's dictionary files (index.*, data.*, *.exc), as nltk finds them."""
    def read(name):
        try:
            return Path(folder, name).read_text("utf-8")
        except (OSError, ValueError) as e:
            raise InputError(f"--wordnet {folder}: {name} cannot be read ({e}): give the folder of "
                             "WordNet's dictionary files (Debian: wordnet-base)") from None

    parts = {}
    for part in _BASE_FORMS:
        index = (line.split() for line in read(f"index.{part}").splitlines() if line[0] != " ")
        exceptions = (line.split() for line in read(f"{part}.exc").splitlines())
        parts[part] = ({word: rest[-int(rest[1]) :] for word, *rest in index},
                       {word: forms for word, *forms in exceptions}, read(f"data.{part}").encode())

    @lru_cache(None)
    def synonyms(word):
        found = {word}
        for part, (index, exceptions, data) in parts.items():
            rules = (rule.split(":") for rule in _BASE_FORMS[part].split())
            forms = exceptions.get(word) or [word.removesuffix(old) + new for old, new in rules
                                             if word.endswith(old)]
            for offset in {int(o) for form in (word, *forms) for o in index.get(form, ())}:
                line = data[offset : data.index(b"\n", offset)].decode().split()
                names = line[4 : 4 + 2 * int(line[3], 16) : 2]
                found |= {name.partition("(")[0] for name in names if "_" not in name}
        return found

    return synonyms


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
        pairs += _match(ours, theirs, read_wordnet(str(wordnet)))
    if not pairs:
        return 0.0
    precision, recall = (len(pairs) / n for n in lengths)
    pairs.sort()
    chunks = 1 + sum((i + 1, j + 1) != after for (i, j), after in zip(pairs, pairs[1:]))
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


# ---- Sim -------------------------------------------------------------------------------------


def load_embedder(name):
    """embed(texts) -> two (n, D): the last hidden states summed over each text's first 256 pieces
    (the authors' limit), and over all its pieces, read in windows of 256; a cosine is the same of
    sums as of means. `name`: a folder or a hub name."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, model = (kind.from_pretrained(name) for kind in (AutoTokenizer, AutoModel))
    except (OSError, ValueError) as e:
        raise InputError(f"--embedder {name} cannot be loaded ({str(e).splitlines()[0]}): give a "
                         "folder with all-MiniLM-L6-v2, or its hub name where there is a "
                         "network") from None

    @torch.no_grad()
    def embed(texts):
        windows = tokenizer(texts, truncation=True, max_length=256, padding=True,
                            return_overflowing_tokens=True, return_tensors="pt")
        text = windows.pop("overflow_to_sample_mapping")  # (W,): which text a window is of
        real = windows["attention_mask"][..., None].float()  # (W, T, 1)
        sums = (model.eval()(**windows).last_hidden_state * real).sum(1)  # (W, D)
        first = sums[torch.searchsorted(text, torch.arange(len(texts)))]
        return first, torch.zeros_like(first).index_add(0, text, sums)

    return embed


def similarities(pairs, embed):
    """Cosines of (prediction, reference) texts (2, n): of the first 256 pieces, of whole texts. An
    empty prediction scores 0."""
    order = [i for i, (ours, _) in enumerate(pairs) if ours]
    order.sort(key=lambda i: len(pairs[i][0]))  # like lengths need little padding
    cosines = np.zeros((2, len(pairs)))
    for a in range(0, len(order), 16):
        batch = order[a : a + 16]
        ours, theirs = (embed([pairs[i][side] for i in batch]) for side in (0, 1))
        for row, x, y in zip(cosines, ours, theirs):
            row[batch] = torch.cosine_similarity(x, y).numpy()
    return cosines


# ---- chains ----------------------------------------------------------------------------------

SIGNATURES = {
    "bleu4": "BLEU-4|13a|per post, unsmoothed, mean|= sacrebleu sentence BLEU, smoothing none",
    "bleu4_corpus": "BLEU-4|13a|corpus, exp smoothing|= sacrebleu's default",
    "rouge_l": "ROUGE-L F|sentences at full stops, union LCS, distinct words|= rouge 1.0.1",
    "rouge_l_plain": "ROUGE-L F|whole text, a-z0-9 in lower case, no stemmer|= rouge-score 0.1.2",
    "meteor": "METEOR|Treebank tokens in lower case|exact, Porter, no synonyms|= nltk 3.10",
    "sim": "Sim|cosine of mean-pooled EMBEDDER|first 256 pieces|= sentence-transformers",
    "sim_whole": "Sim|cosine of mean-pooled EMBEDDER|whole chain in windows of 256 pieces"} | {
    f"distinct_{n}{which}": f"Distinct-{n}|lower case, words between spaces|{how}"
    for n in (1, 2) for which, how in (
        ("", "predictions, per text, mean"), ("_pooled", "predictions, all as one"),
        ("_references", "references, per text, mean|as the authors' script"))}


def signatures(wordnet=None, embedder=None):
    """SIGNATURES with what the command line chose."""
    synonyms = "WordNet 3.0 synonyms" if wordnet else "no synonyms"
    return {k: v.replace("no synonyms", synonyms).replace("EMBEDDER", str(embedder))
            for k, v in SIGNATURES.items()}


def chain_text(parsed):
    """What the text metrics compare: the fields' texts, in order, without names and quotes."""
    return " ".join(parsed.fields[name] for name in FIELDS if name in parsed.fields)


def names_only(parsed, label):
    """Whether Final_conclusion names that label and no other."""
    conclusion = parsed.fields.get("Final_conclusion", "").lower()
    return set(re.findall(rf"\b({'|'.join(LABELS)})\b", conclusion)) == {label}


def chain_metrics(rows, references, wordnet=None, embed=None, per_post=None):
    """What the chains of prediction rows {id: row} are worth, beside references {id: text}.
    parse_rate: share with five fields and a label; agreement: share whose Prediction is the row's
    label; concludes: share whose Final_conclusion names that label alone. An empty or unparsed
    chain scores 0 against its reference; `unparsed_chains` counts them. What each post has a value
    of goes into `per_post` {metric: {id: value}} too."""
    values, texts = {} if per_post is None else per_post, {}
    for i, row in rows.items():
        parsed, label = parse_reasoning(row["raw"]), row.get("prediction")
        texts[i] = chain_text(parsed) if parsed.complete else ""
        for name, value in (("parse_rate", parsed.complete),
                            ("agreement", parsed.prediction == label is not None),
                            ("concludes", names_only(parsed, label))):
            values.setdefault(name, {})[i] = float(value)
    told = {i: chain_text(parse_reasoning(references[i])) for i in rows if i in references}
    counts = {i: bleu_counts(texts[i], told[i]) for i in told}
    if told:
        values["bleu4"] = {i: bleu_score(c) for i, c in counts.items()}
        values["rouge_l"] = {i: rouge_l(texts[i], told[i]) for i in told}
        values["rouge_l_plain"] = {i: rouge_l_plain(texts[i], told[i]) for i in told}
        values["meteor"] = {i: meteor(texts[i], told[i], wordnet) for i in told}
    if told and embed:
        cosines = similarities([(texts[i], told[i]) for i in told], embed).tolist()
        values["sim"], values["sim_whole"] = (dict(zip(told, row)) for row in cosines)
    out = {name: sum(each.values()) / len(each) for name, each in values.items()}
    whole = [text for text in texts.values() if text]
    out |= dict(chains=len(rows), unparsed_chains=len(rows) - len(whole))
    for n in (1, 2):
        out[f"distinct_{n}"] = distinct_n(whole, n)
        out[f"distinct_{n}_pooled"] = distinct_n_pooled(whole, n)
    if told:
        out |= {f"distinct_{n}_references": distinct_n(told.values(), n) for n in (1, 2)}
        out |= dict(referenced=len(told), bleu4_corpus=bleu_score(sum(counts.values()), True))
    return out


# ---- runs ------------------------------------------------------------------------------------


def prediction_rows(path):
    """{id: row} of a prediction file, checked."""
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: run generate.py predict first")
    rows, number = {}, lambda x: type(x) in (int, float) and math.isfinite(x)
    for n, row in enumerate(read_rows(path), 1):
        if not isinstance(row, dict) or "id" not in row or "prediction" not in row:
            raise InputError(f"{path}:{n}: a prediction row needs id and prediction")
        if row["prediction"] not in (*LABELS, None):
            raise InputError(f"{path}:{n}: prediction {row['prediction']!r} is none of "
                             f"{', '.join(LABELS)} or null")
        probs = row.get("probs") or [0, 0, 0]
        if not (isinstance(probs, list) and len(probs) == 3 and all(map(number, probs))):
            raise InputError(f"{path}:{n}: probs must be three numbers")
        if not (row.get("score") is None or number(row["score"])):
            raise InputError(f"{path}:{n}: score {row['score']!r} is no number")
        rows[str(row["id"])] = row
    return rows


def run_metrics(path, gold, references, stages={}, wordnet=None, embed=None):
    """(metrics, resamples, rows, gold posts) of one prediction file, against all gold posts
    {id: post} of the splits that it covers: a post without a row counts as unparsed, and its chain
    as empty."""
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
    raw = {i: r["raw"] for i, r in own.items() if isinstance(r.get("raw"), str)}
    if raw:
        chains = {i: r | dict(raw=raw.get(i, "")) for i, r in own.items()}
        metrics |= chain_metrics(chains, references, wordnet, embed, values)
        values |= faithfulness(own, labels, values["agreement"], stages)
        metrics |= {name: sum(each.values()) / len(each) for name, each in values.items()}
    sure = [p for p in wanted if own[p.id].get("probs")]
    if sure:
        metrics |= calibration_metrics([p.label for p in sure], [own[p.id]["probs"] for p in sure])
    scored = [p for p in wanted if p.score is not None]
    if any(own[p.id].get("score") is not None for p in scored):
        metrics["scores"] = regression_metrics([p.score for p in scored],
                                               [own[p.id].get("score") for p in scored])
        metrics |= {k: metrics["scores"][k] for k in ("mae", "corr", "acc7", "acc2_non0")}
    drawn = resample(labels, predicted, {name: [each.get(i, math.nan) for i in own]
                                         for name, each in values.items()})
    return metrics | dict(intervals=intervals(drawn)), drawn, rows, wanted


def faithfulness(own, labels, agreement, stages):
    """{metric: {id: 0 or 1}}: accuracy where the chain names the row's label and where not, and
    where the teacher's chain for the post came about unaided (stage 1) or label-conditioned (2).
    The latter are the posts that the teacher got wrong: harder ones, whatever the chain's worth."""
    right = {i: float(own[i].get("prediction") == label) for i, label in zip(own, labels)}
    among = dict(accuracy_agree=[i for i in right if agreement[i]],
                 accuracy_disagree=[i for i in right if not agreement[i]],
                 accuracy_unaided=[i for i in right if stages.get(i) == 1],
                 accuracy_conditioned=[i for i in right if stages.get(i) == 2])
    return {name: {i: right[i] for i in ids} for name, ids in among.items() if ids}


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
    """How the teacher's kept chains came about. They were kept for being right; nobody chose them
    for a Final_conclusion that names the label alone, so `concludes` compares the unaided with the
    label-conditioned. `contradictions`: share of stage-2 answers that contradict the label they
    were given, at least: what came before a kept one is not on file."""
    rows, rejects = chain_rows(path), read_rows(beside(path, "rejects.jsonl"))
    tries, concludes = [row.get("tries", 1) for row in rows], {1: [], 2: []}
    for row in rows:
        parsed = parse_reasoning(row["cot"])
        concludes.setdefault(row.get("stage"), []).append(names_only(parsed, parsed.prediction))
    failed = [a["problem"] for row in rejects for a in row.get("attempts", ()) if a["stage"] == 2]
    wrong = sum(str(problem).startswith("predicts ") for problem in failed)
    share = lambda each: sum(each) / max(len(each), 1)
    return dict(kept=len(rows), unaided=len(concludes[1]), label_conditioned=len(concludes[2]),
                set_aside=len(rejects), answers_per_kept_chain=share(tries),
                concludes_unaided=share(concludes[1]), concludes_conditioned=share(concludes[2]),
                contradictions=wrong / max(len(concludes[2]) + len(failed), 1))


def diagnose(runs, teacher=None):
    """What the metrics of the runs {name: metrics} and of the teacher point to, in plain words, by
    the paper's failure signatures; only what applies. choice: METEOR below 0.40 is low (two real
    chains about different posts score 0.33), Distinct-2 as high as the references' is high, more
    than 5 % contradictions are many."""
    said = []
    for name, m in runs.items():
        above = runs.get(name.removesuffix("student") + "assistant", m)
        gap = 100 * (above["accuracy"] - m["accuracy"])
        if m.get("sim", 1) < 0.85:
            said.append(f"{name}: Sim {m['sim']:.1%} is below 85 %: its prompts may be out of line "
                        "with the task")
        if name.endswith("student") and gap > 5 and m.get("source") != "base":
            said.append(f"{name}: {gap:.1f} points below its assistant: λ may be too high, try "
                        "--lam 0.1 to 0.2")
        if m.get("meteor", 1) < 0.4 and m["distinct_2"] >= m["distinct_2_references"]:
            said.append(f"{name}: METEOR {m['meteor']:.2f} is low while Distinct-2 "
                        f"{m['distinct_2']:.2f} is high: fluent but ungrounded chains")
    if teacher and teacher["contradictions"] > 0.05:
        said.append(f"teacher: {teacher['contradictions']:.1%} of the stage-2 answers contradict "
                    "the label they were given: a weak teacher or noisy labels")
    return said


# ---- the table -------------------------------------------------------------------------------

COLUMNS = {"accuracy": "accuracy", "intervals": "95 %", "macro_f1": "macro F1",
           "weighted_f1": "weighted F1", "mae": "MAE", "corr": "Corr", "acc7": "Acc-7",
           "acc2_non0": "Acc-2", "unparsed": "unparsed", "parse_rate": "chains parsed",
           "agreement": "chain = label", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L",
           "meteor": "METEOR", "sim": "Sim"}
ALL_COLUMNS = COLUMNS | {
    "bleu4_corpus": "corpus BLEU-4", "rouge_l_plain": "plain ROUGE-L", "sim_whole": "whole Sim",
    "distinct_1": "Distinct-1", "distinct_2": "Distinct-2", "distinct_1_pooled": "pooled D-1",
    "distinct_2_pooled": "pooled D-2", "concludes": "conclusion = label", "ece": "ECE",
    "aurc": "AURC", "accuracy_agree": "accuracy where chain = label",
    "accuracy_disagree": "accuracy elsewhere"}
BOLD = "better than the next best (paired bootstrap over posts, p < 0.05)"


def compare(runs, drawn):
    """{metric: best run, next best, difference, p} over the runs of `drawn` {name: resamples}."""
    out = {}
    for key in COLUMNS:
        order = sorted((name for name in drawn if key in drawn[name]), key=lambda n: -runs[n][key])
        if len(order) > 1:
            best, after = order[:2]
            out[key] = dict(best=best, next=after, difference=runs[best][key] - runs[after][key],
                            p=p_value(drawn[best][key], drawn[after][key]))
    return out


def table(runs, columns=COLUMNS, compared={}, bold="{}"):
    """{name: metrics} -> rows of cells with a header row; `bold` is how a best cell looks that is
    significantly better than the next."""
    keys = [k for k in columns if any(k in m for m in runs.values())]
    rows = [["run", *(columns[k] for k in keys)]]
    for name, metrics in runs.items():
        rows.append([name])
        for k in keys:
            value, test = metrics.get(k, ""), compared.get(k, dict(best=None, p=1))
            cell = f"{value:.3f}" if isinstance(value, float) else str(value)
            if k == "intervals" and value:
                cell = "–".join(f"{x:.2f}" for x in value["accuracy"])
            if k in metrics.get("deviation", ()):
                cell += f" ± {metrics['deviation'][k]:.3f}"
            best = test["best"] == name and test["p"] < 0.05
            rows[-1].append(bold.format(cell) if best else cell)
    return rows


def read_specs(specs):
    """[NAME=]FILE … -> {name: files}. Several files of one NAME are the seeds of one setting."""
    files = {}
    for spec in specs:
        named = "=" in spec and not os.path.exists(spec)
        name, path = spec.split("=", 1) if named else (Path(spec).stem, spec)
        taken = name.split("/")[0] in ("", "majority", "teacher", "signatures", "comparisons",
                                       "diagnosis")
        taken |= name in files and (not named or path in files[name])
        if taken or any(f"{a}/".startswith(f"{b}/") for other in files if other != name
                        for a, b in ((name, other), (other, name))):
            raise InputError(f"run name {name!r} is taken: name the files apart, NAME=FILE")
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
            *result, rows, wanted = run_metrics(path, gold, references, stages, args.wordnet, embed)
            seeds.append(result)
            covered.add(tuple(p.id for p in wanted))
            shown = shown or (name, rows, wanted)
        runs[name], drawn[name] = group_seeds(seeds)
    runs = {"majority": majority_metrics([p.label for p in shown[2]])} | runs
    teacher = teacher_metrics(args.chains) if args.chains else None
    used = {k: v for k, v in signatures(args.wordnet, args.embedder).items()
            if any(k in m for m in runs.values())}
    about = dict(signatures=used, diagnosis=diagnose(runs, teacher),
                 comparisons=compare(runs, drawn) if len(covered) == 1 else {})
    tell(runs, teacher, about)
    write_tables(args.out, runs, teacher, about)
    page = report(runs, table(runs, ALL_COLUMNS), shown, references, args.cards, used)
    write_atomic(Path(args.out, "report.html"), lambda part: Path(part).write_text(page, "utf-8"))
    print(f"wrote {args.out}/metrics.json, {args.out}/table.md and {args.out}/report.html")


def tell(runs, teacher, about):
    """Prints the table and what belongs under it."""
    rows, used = table(runs, COLUMNS, about["comparisons"], "*{}"), about["signatures"]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        line = (c.rjust(w) for c, w in zip(cells, widths[1:]))
        print(name.ljust(widths[0]), *line, sep="  ")
    if any(test["p"] < 0.05 for test in about["comparisons"].values()):
        print(f"* {BOLD}")
    for name in (k for k in COLUMNS if k in used):
        print(f"  {used[name]}")
    if "meteor" in used and "sim" not in used:
        print("  Sim is left out: --embedder takes all-MiniLM-L6-v2")
    if teacher:
        print(f"teacher: {teacher['kept']} chains kept, {teacher['unaided']} unaided, "
              f"{teacher['label_conditioned']} label-conditioned, {teacher['set_aside']} set aside")
    for line in about["diagnosis"]:
        print(f"diagnosis: {line}")


def write_tables(out, runs, teacher, about):
    """metrics.json, and table.md with all columns."""
    rows = table(runs, ALL_COLUMNS, about["comparisons"], "**{}**")
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    notes = [f"Bold: {BOLD}.", *about["diagnosis"], *about["signatures"].values()]
    text = "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])
    write_atomic(Path(out, "table.md"), lambda part: Path(part).write_text(text, "utf-8"))
    metrics = about | (dict(teacher=teacher) if teacher else {})
    for name, values in runs.items():  # base/student becomes {"base": {"student": …}}
        *groups, leaf = name.split("/")
        place = metrics
        for each in groups:
            place = place.setdefault(each, {})
        place[leaf] = values
    write_json(Path(out, "metrics.json"), metrics)


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


def report(runs, rows, shown, references, most, signatures):
    """The self-contained page. Every string that comes from data goes through html.escape."""
    (name, predictions, posts), majority = shown, runs["majority"]
    values, title = runs[name], html.escape(name)
    said = lambda p: predictions.get(p.id, {})
    posts = sorted(posts, key=lambda p: (said(p).get("prediction") == p.label, p.id))
    cards = [card(p, said(p), references.get(p.id)) for p in posts[:most]]
    confusion = [["", *LABELS, "unparsed"]]
    confusion += [[f"gold {x}", *line] for x, line in zip(LABELS, values["confusion"])]
    notes = "".join(f"<li>{html.escape(v)}</li>" for k, v in signatures.items() if k in values)
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
