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
import hashlib
import json
import math
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
import torch

from mulcot import (
    FIELDS, LABELS, Help, InputError, beside, data_url, parse_reasoning, read_posts, read_rows,
    regression_metrics, run_stage, tell_aside, write_atomic, write_json)


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=Help)
    flag = p.add_argument
    flag("predictions", nargs="+", metavar="[NAME=]FILE",
         help="rows of generate.py predict; the report shows the first; NAME may be GROUP/NAME; "
              "files of one NAME are its seeds, shown as mean ± deviation")
    flag("--gold", required=True, help="labelled posts: .jsonl, .json, .tsv, .csv or an MVSA "
                                      "folder")
    flag("--images", help="images folder (default: images/ beside the posts, else their folder)")
    flag("--references", nargs="*", default=[], metavar="ROWS",
         help="rows with cot to compare chains with, beside the cot of the gold posts")
    flag("--chains", help="the teacher's rows, for their statistics")
    flag("--logs", nargs="*", default=[], metavar="[NAME=]FILE",
         help="log.jsonl files of train.py, for the report's curves; NAME: default its folder")
    flag("--cards", type=int, help="posts shown in the report, wrong ones first (default: 200, or "
                                   "as many as keep it near 100 KB plus thumbnails)")
    flag("--baseline", metavar="NAME", help="column p: accuracy against this run's, by bootstrap")
    flag("--wordnet", metavar="DIR", help="WordNet 3.0's dictionary files, for METEOR's synonyms "
                                          "(Debian's wordnet-base: /usr/share/wordnet)")
    flag("--embedder", help="all-MiniLM-L6-v2, folder or hub name, for Sim")
    flag("--out", required=True, help="folder for metrics.json, table.md and report.html")
    return p.parse_args(argv)


# ---- labels and scores -----------------------------------------------------------------------


def cells(gold, said):
    """Each post's place in the table of gold by said (3, 4), None in the last column."""
    return [4 * LABELS.index(g) + (*LABELS, None).index(s) for g, s in zip(gold, said)]


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
    table = np.bincount(cells(gold, predicted), minlength=12).reshape(3, 4)
    per_class = {}
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
    numbers = np.array([*values.values()], float).reshape(-1, n).T  # (n, V)
    there = ~np.isnan(numbers)
    posts = np.hstack([np.eye(12)[cells(gold, predicted)], np.where(there, numbers, 0), there])
    draws = (rng.multinomial(n, np.full(n, 1 / n), 50) @ posts for _ in range(RESAMPLES // 50))
    tables, sums, counts = np.split(np.concatenate([*draws]), (12, 12 + len(values)), axis=1)
    means = sums / np.where(counts, counts, np.nan)
    return table_scores(tables.reshape(-1, 3, 4)) | dict(zip(values, means.T))


def intervals(drawn):
    """{metric: [low, high]}, the middle 95 % of its resamples."""
    return {name: np.nanpercentile(values, [2.5, 97.5]).tolist() for name, values in drawn.items()}


def p_value(ours, theirs, posts=math.inf):
    """Two-sided p of the paired bootstrap (Berg-Kirkpatrick et al. 2012) from one metric's
    resamples: how often the difference strays from its mean by as much as that is from 0; never
    below a sign test's least p over so many `posts`."""
    difference = (ours - theirs)[~np.isnan(ours - theirs)]
    mean = difference.mean()
    p = (1 + (abs(difference - mean) >= abs(mean)).sum()) / (1 + len(difference))
    return max(float(p), 0.5 ** (posts - 1))


def group_seeds(runs):
    """[(metrics, resamples), …] of one setting's runs -> one such pair. Numbers become means,
    `deviation` holds their sample deviations, `seeds` the runs' own metrics; a number that a run
    lacks is left out, the rest is the first run's. A resample draws posts, and as many runs, with
    replacement."""
    (first, drawn), everyone = runs[0], [metrics for metrics, _ in runs]
    if len(runs) == 1:
        return runs[0]
    numbers = {k: [m.get(k) for m in everyone] for k in first}
    numbers = {k: v for k, v in numbers.items() if all(isinstance(x, (int, float)) for x in v)}
    first = {k: v for k, v in first.items() if k in numbers or not isinstance(v, (int, float))}
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


def side(score):
    """The label that a score stands for: its sign."""
    return LABELS[1 + (score > 0) - (score < 0)]


def prediction_rows(path):
    """{id: row} of a prediction file, checked. A `score` without prediction predicts its side; a
    cascade's or UBM's `predicted_score` is the score."""
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist: run generate.py predict first")
    rows, number = {}, lambda x: type(x) in (int, float) and math.isfinite(x)
    for n, row in enumerate(read_rows(path), 1):
        if not isinstance(row, dict) or "id" not in row or not row.keys() & {"prediction", "score"}:
            raise InputError(f"{path}:{n}: a prediction row needs id and prediction (or score)")
        if str(row["id"]) in rows:
            raise InputError(f"{path}:{n}: duplicate id {row['id']!r}: one row a post")
        row["score"] = row.get("predicted_score", row.get("score"))
        if not (row["score"] is None or number(row["score"])):
            raise InputError(f"{path}:{n}: score {row['score']!r} is no number")
        if "prediction" not in row:  # of a readout, whose raw text is a number and no chain
            row.pop("raw", None)
        if "prediction" not in row or "predicted_score" in row:  # a score's side, as for gold
            row["prediction"] = None if row["score"] is None else side(row["score"])
        if row["prediction"] not in (*LABELS, None):
            raise InputError(f"{path}:{n}: prediction {row['prediction']!r} is none of "
                             f"{', '.join(LABELS)} or null")
        probs = row.get("probs") or [0, 0, 0]
        if not (isinstance(probs, list) and len(probs) == 3 and all(map(number, probs))):
            raise InputError(f"{path}:{n}: probs must be three numbers")
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
        if len(sure) < len(wanted):
            print(f"warning: {path}: {len(sure)} of {len(wanted)} posts have probs: ECE and AURC "
                  "are of these alone")
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

COLUMNS = {"accuracy": "accuracy", "intervals": "95 %", "p": "p", "macro_f1": "macro F1",
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
                            p=p_value(drawn[best][key], drawn[after][key], runs[best]["n"]))
    return out


def table(runs, columns=COLUMNS, compared={}, bold="{}"):
    """{name: metrics} -> rows of cells with a header row; `bold` is how a best cell looks that is
    significantly better than the next."""
    keys = [k for k in columns if any(k in m for m in runs.values())]
    rows = [["run", *(columns[k] for k in keys)]]
    for name, metrics in runs.items():
        rows.append([name])
        for k in keys:
            value, test = metrics.get(k), compared.get(k, dict(best=None, p=1))
            cell = f"{value:.3f}" if isinstance(value, float) else str(value)
            cell = "" if value is None else cell
            if k == "intervals" and value:
                cell = "–".join(f"{x:.2f}" for x in value["accuracy"])
            if k in metrics.get("deviation", ()):
                cell += f" ± {metrics['deviation'][k]:.3f}"
            best = test["best"] == name and test["p"] < 0.05
            rows[-1].append(bold.format(cell) if best else cell)
    return rows


def name_and_path(spec):
    """[NAME=]FILE -> (NAME or None, FILE); a file that exists may hold "=" in its own name."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals and not os.path.exists(spec) else (None, spec)


def read_specs(specs):
    """[NAME=]FILE … -> {name: files}. Several files of one NAME are the seeds of one setting."""
    files = {}
    for spec in specs:
        given, path = name_and_path(spec)
        name = Path(spec).stem if given is None else given
        taken = name.split("/")[0] in ("", "majority", "teacher", "signatures", "comparisons",
                                       "diagnosis")
        taken |= name in files and (given is None or path in files[name])
        if taken or any(f"{a}/".startswith(f"{b}/") for other in files if other != name
                        for a, b in ((name, other), (other, name))):
            raise InputError(f"run name {name!r} is taken: name the files apart, NAME=FILE")
        files.setdefault(name, []).append(path)
    return files


def evaluate(args):
    """Table, metrics.json, table.md and report.html of the given runs."""
    aside, logs = [], training_logs(args.logs)
    gold = {p.id: p for p in read_posts(args.gold, args.images, aside)
            if p.label or p.score is not None}
    for post in gold.values():  # of MOSI and MOSEI
        post.label = post.label or side(post.score)
    tell_aside(aside, "gold rows cannot be read and are in no number below")
    if not gold:
        raise InputError(f"{args.gold} has no post with label or score")
    references = {p.id: p.cot for p in gold.values() if p.cot}
    stages = {p.id: p.extra.get("stage") for p in gold.values()}
    for path in args.references:
        told = {str(row["id"]): row for row in chain_rows(path)}
        references |= {i: row["cot"] for i, row in told.items()}
        stages |= {i: row.get("stage") for i, row in told.items()}
        if not told.keys() & gold.keys():
            print(f"warning: no row of {path} has the id of a gold post: not compared")
    specs = read_specs(args.predictions)  # before an embedder is loaded for nothing
    embed = load_embedder(args.embedder) if args.embedder else None
    runs, drawn, covered, shown = {}, {}, set(), None
    for name, paths in specs.items():
        seeds = []
        for path in paths:
            *result, rows, wanted = run_metrics(path, gold, references, stages, args.wordnet, embed)
            seeds.append(result)
            covered.add(tuple(p.id for p in wanted))
            shown = shown or (name, rows, wanted)
        runs[name], drawn[name] = group_seeds(seeds)
    if args.baseline and (args.baseline not in runs or len(covered) > 1):
        raise InputError(f"--baseline {args.baseline!r} must be one of the runs, "
                         f"{', '.join(runs)}, and all must cover the same posts")
    for name in runs.keys() - {args.baseline} if args.baseline else ():
        runs[name]["p"] = p_value(drawn[name]["accuracy"], drawn[args.baseline]["accuracy"],
                                  runs[name]["n"])
    runs = {"majority": majority_metrics([p.label for p in shown[2]])} | runs
    teacher = teacher_metrics(args.chains) if args.chains else None
    used = {k: v for k, v in signatures(args.wordnet, args.embedder).items()
            if any(k in m for m in runs.values())}
    about = dict(signatures=used, diagnosis=diagnose(runs, teacher),
                 comparisons=compare(runs, drawn) if len(covered) == 1 else {})
    tell(runs, teacher, about)
    rows = table(runs, ALL_COLUMNS, about["comparisons"], "**{}**")
    write_tables(args.out, runs, rows, teacher, about)
    page = report(runs, rows, shown, references, args.cards, used | dict(bold=f"Bold: {BOLD}"),
                  logs, about["diagnosis"], cascade_costs({k: v[0] for k, v in specs.items()}))
    write_atomic(Path(args.out, "report.html"), lambda part: Path(part).write_bytes(page))
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


def write_tables(out, runs, rows, teacher, about):
    """metrics.json, and table.md of the rows with all columns."""
    ruled = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in ruled]
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
.wide+.plots{margin-top:.8rem}
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

PACKED = 65_000  # bytes of posts in a report; the rest takes about 25,000

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
        (name, path), earlier = name_and_path(spec), set(logs)
        if not os.path.exists(path):
            raise InputError(f"{path} does not exist: give log.jsonl files of train.py")
        for n, row in enumerate(read_rows(path), 1):
            step = row.get("step") if isinstance(row, dict) else None
            if not isinstance(step, int) or step < 0:
                raise InputError(f"{path}:{n}: a log row needs a step, 0 or above")
            run = str(row.get("run", name or Path(path).absolute().parent.name))
            if run in earlier:
                raise InputError(f"{path}: run {run!r} has a log already: name the files apart, "
                                 "NAME=FILE")
            logs.setdefault(run, []).append(row)
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
    for name, m in [item for item in runs.items() if item[1].get("ece") is not None][:8]:
        total, curve = sum(n for *_, n in m["reliability"]), m["risk_coverage"]
        bins[f"{name} (ECE {m['ece']:.3f})"] = [(c, a, n / total) for c, a, n in m["reliability"]]
        thin = curve[:: len(curve) // 50 + 1] + curve[-1:]
        curves[f"{name} (AURC {m['aurc']:.3f})"] = [(c, r, 0) for c, r in thin]
    return (plot("reliability", bins, "mean confidence", "accuracy", diagonal=True)
            + plot("risk by coverage", curves, "share of posts answered, surest first",
                   "error rate"))


def cascade_costs(files):
    """HTML of what the cascades among {run: its first file} cost, and their error by MLLM passes;
    "" where no file has a NAME.cascade.json beside it."""
    told = {name: json.loads(about.read_text("utf-8")) for name, file in files.items()
            if (about := Path(beside(file, "cascade.json"))).exists()}
    rows, parts, lines = [["", "MLLM passes", "ms", "GFLOPs", "error"]], "", {}
    for name, about in told.items():
        sizes = Counter(about["routes"]).most_common()
        parts += f"<p>{escape(name)}: " + ", ".join(f"{n} by {escape(k)}" for k, n in sizes)
        lines[f"{name}: each budget"] = [(*point, 0.3) for point in about.get("curve", [])]
        for who, run in about["runs"].items():
            error = run.get("error")
            if error is not None:
                lines[f"{name}: {who}"] = [(run["passes"], error, 0.3)]
            rows.append([f"{name}: {who}", f"{run['passes']:.2f}", f"{1e3 * run['seconds']:.1f}",
                         f"{run['gflops']:.3f}", "" if error is None else f"{error:.3f}"])
    chart = plot("error by cost", lines, "MLLM passes a post", "error")
    return f"{parts}{html_table(rows, 'costs')}<div class=plots>{chart}</div>" if told else ""


def report(runs, rows, shown, references, most, signatures, logs, diagnosis=(), costs=""):
    """The self-contained page, bytes. runs: {name: metrics}; rows: their table; shown: (name, {id:
    row}, gold posts) of the run whose posts are shown, at most `most` (None: 200, or as many as
    PACKED holds); references: {id: chain}; signatures, diagnosis: sentences; logs: {run: log rows};
    costs: of cascades, HTML. Every string from data is escaped."""
    name, predictions, posts = shown
    values, images, cards = runs[name], {}, []
    cases = [judge(p, predictions.get(p.id, {}), references.get(p.id)) for p in posts]
    cases.sort(key=lambda case: ("wrong" not in case[0], not case[0], case[1].id))
    if most is None:
        most = 200
        while len(pack([card(*case, 0) for case in cases[:most]])) > PACKED:
            most = most * 19 // 20
    for case in cases[:most]:
        path = case[1].image
        number = images.setdefault(data_url(path, 160, 75), len(images)) if path else None
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
        "Cost": ("div", costs),
        "Training": ("div class=plots", training_plots(logs)),
        "Posts": ("div", f"<p class=dim>{len(cards):,} of {len(posts):,}, wrong ones first, then "
                         f"flagged ones</p>{filters()}<div id=cards></div>")}
    about = f"{len(posts):,} posts, {len(runs) - 1} runs"
    if "seeds" in values:
        about += f"; means of {len(values['seeds'])} seeds, confusion and posts of the first"
    return page(name, about, {k: v for k, v in sections.items() if v[1]}, cards, images)


def pack(cards):
    """The cards' HTML deflated, in base64: a fifth of its size. The browser unpacks it."""
    text = "".join(cards).encode("utf-8", "replace")
    return base64.b64encode(zlib.compress(text, 9)).decode()


def page(name, about, sections, cards, images):
    """The document, bytes. sections: {title: (tag, HTML)}. The policy lets nothing run but SCRIPT,
    and nothing load."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
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
<script type="text/plain" id=packed>{pack(cards)}</script>
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
        stages = row["stages"] if isinstance(row.get("stages"), dict) else {}
        said = (f"{k} {v.get('prediction')}, uncertainty {v.get('uncertainty')}"
                if isinstance(v, dict) else f"{k} failed" for k, v in stages.items())
        body = (f"<p class=route>decided by <b>{escape(str(row['route']))}</b>{why} "
                f"<small>{escape('; '.join(said))}</small></p>")
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


def main(argv=None):
    """Runs the command line; returns the exit code."""
    return run_stage(evaluate, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
