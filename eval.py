"""Metrics and a report from prediction files; parses the raw text anew, runs no language model.

    python eval.py predictions.jsonl --gold test.tsv --images img --out results
    python eval.py student=s.jsonl assistant=a.jsonl --gold posts.jsonl --out results \\
        --references references.jsonl --wordnet /usr/share/wordnet --embedder all-MiniLM-L6-v2
    python eval.py full=1.jsonl full=2.jsonl less=3.jsonl less=4.jsonl --gold test.tsv --out table

Last line: `wrote results/metrics.json, results/table.md and results/report.html`. A prediction row
needs id and prediction; with `raw` (the chain) the chain is judged too, with `probs` its
confidence, with `score` the number alone. Gold labels come from --gold, never from prediction rows;
all runs are judged on the same gold posts, those of --split. The only network that may run is Sim's
sentence embedder. Files of one NAME are its seeds, shown as mean ± deviation; a file's NAME is its
own without ending if none is given. The report shows the posts and the calibration of the first
run, its posts beside the second's.
"""

import argparse
import math
import re
import secrets
import time
from collections import Counter, defaultdict
from functools import cache
from html import escape
from pathlib import Path

import numpy as np
import torch

from mulcot import (
    LABEL_WORD, LABELS, POLARITY, Help, InputError, confusion_scores, confusion_table, data_url,
    explaining, parse_reasoning, read_posts, read_rows, report_rejects, run_info, run_stage,
    select_split, sibling, write_json, write_text)


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    p.add_argument("predictions", nargs="+", metavar="[NAME=]FILE", help="rows of generate.py")
    p.add_argument("--gold", required=True, help="labelled posts: a file")
    p.add_argument("--images", help="images folder (default: images/ beside the posts or theirs)")
    p.add_argument("--split", help="judged posts (default: test where gold has such, else all)")
    p.add_argument("--references", nargs="*", default=[], metavar="ROWS", help="rows with cot")
    p.add_argument("--chains", help="the teacher's rows, for their statistics")
    p.add_argument("--title", default="", help="what is judged, in words above the table")
    p.add_argument("--cards", type=int, default=200, help="posts in the report, wrong ones first")
    p.add_argument("--baseline", metavar="NAME", help="columns p: accuracy, F1 against this run's")
    p.add_argument("--wordnet", metavar="DIR", help="WordNet 3.0's files, for METEOR's synonyms")
    p.add_argument("--embedder", help="all-MiniLM-L6-v2, folder or hub name, for Sim")
    p.add_argument("--out", required=True, help="folder for metrics.json, table.md, report.html")
    return p.parse_args(argv)


def require(condition, message):
    """Raises InputError where the user's input does not hold what it must."""
    if not condition:
        raise InputError(message)


def is_number(value):
    """Whether a JSON value is a number to reckon with (True, NaN and 1e300 are none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def is_distribution(value):
    """Whether a JSON value holds a probability of each label."""
    return (isinstance(value, list) and len(value) == len(LABELS)
            and all(map(is_number, value)) and min(value) >= 0 and abs(sum(value) - 1) < 1e-3)


def checked_rows(path, stage):
    """("FILE:LINE", row) of each JSON object with an id in a file that `stage` wrote."""
    require(Path(path).exists(), f"{path} does not exist: run {stage} first")
    for n, row in enumerate(read_rows(path), 1):
        require("id" in row, f"{path}:{n}: a row needs an id")
        yield f"{path}:{n}", row


# ---- classification and calibration ------------------------------------------------------------


def classification_metrics(gold, predicted):
    """Metrics of n labels against n gold ones: accuracy, macro and weighted F1; per class
    precision, recall, F1 and support; confusion (rows gold, columns LABELS + unparsed). A None
    prediction is unparsed and wrong for every class. Equal to scikit-learn's with labels=LABELS
    and zero_division=0. Raises AssertionError unless both lists hold as many labels, and some."""
    assert len(gold) == len(predicted) and gold, (len(gold), len(predicted))
    table = confusion_table(gold, predicted)  # (3, 4)
    per_class = {}
    for label, right, row, column in zip(LABELS, table.diagonal(), table, table.T):
        support, predictions = int(row.sum()), max(int(column.sum()), 1)
        per_class[label] = dict(precision=right / predictions, recall=right / max(support, 1),
                                f1=2 * right / (predictions + support), support=support)
    return dict(n=len(gold), unparsed=predicted.count(None), confusion=table.tolist(),
                per_class=per_class, **confusion_scores(table))


def regression_metrics(gold, predicted):
    """MMSA's metrics of scores in [-3, 3]: MAE and Pearson's r of unclipped numbers; Acc-7 and
    Acc-5, clipped to ±3 and ±2 and rounded half to even; Acc-2 and weighted F1 of the signs, `has0`
    (>= 0 or not) and `non0` (> 0 or not, gold zeros dropped). choice: None, or a number that is not
    finite, is wrong in all but MAE and r, which are of the other posts, and counts in `unparsed`;
    an answer beyond ±3 counts as any other, and in `out_of_range`. None where undefined."""
    assert len(gold) == len(predicted) and len(gold), (len(gold), len(predicted))
    gold = np.array(gold, float)
    predicted = np.array([math.nan if p is None else p for p in predicted], float)
    parsed = np.isfinite(predicted)
    g, p = gold[parsed], predicted[parsed]
    metrics = dict(mae=None, corr=None, unparsed=int((~parsed).sum()),
                   out_of_range=int((np.abs(p) > 3).sum()))
    if parsed.any():
        metrics["mae"] = float(np.abs(g - p).mean())
        if np.ptp(g) > 0 and np.ptp(p) > 0:
            metrics["corr"] = float(np.corrcoef(g, p)[0, 1])
    for name, limit in (("acc7", 3), ("acc5", 2)):
        same = np.round(np.clip(g, -limit, limit)) == np.round(np.clip(p, -limit, limit))
        metrics[name] = float(same.sum() / len(gold))
    everywhere = np.ones(len(gold), bool)
    for name, judged, sign in (("has0", everywhere, np.greater_equal),
                               ("non0", gold != 0, np.greater)):
        metrics[f"acc2_{name}"] = metrics[f"f1_{name}"] = None
        if judged.any():
            signs = np.where(parsed, sign(predicted, 0), -1)[judged].tolist()  # -1: neither class
            table = confusion_table(sign(gold, 0)[judged].tolist(), signs, classes=(False, True))
            scores = confusion_scores(table)
            metrics[f"acc2_{name}"] = float(scores["accuracy"])
            metrics[f"f1_{name}"] = float(scores["weighted_f1"])
    return metrics


def calibration_metrics(gold, probs, bins=15):
    """Whether probabilities (n, 3), in the order of LABELS, can be trusted. `ece`: expected
    calibration error (Guo et al. 2017) over equal-width bins of the confidence, the largest
    probability; `reliability`: [mean confidence, accuracy, count] of each bin that is not empty;
    `risk_coverage`: [coverage, error rate of the so many most confident posts], at most 101
    points; `aurc`: the mean risk over all n coverages (Geifman and El-Yaniv 2017)."""
    probs = np.array(probs, float)
    confidence = probs.max(-1)
    wrong = np.array(LABELS)[probs.argmax(-1)] != gold
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    _, bin_of, sizes = np.unique(bin_of, return_inverse=True, return_counts=True)
    points = np.stack([np.bincount(bin_of, confidence), np.bincount(bin_of, ~wrong)]) / sizes
    ece = float(abs(points[0] - points[1]) @ sizes / len(gold))
    reliability = [*map(list, zip(*points.tolist(), sizes.tolist()))]
    # Posts of equal confidence have no order: each takes the mean error of its tie.
    _, tie, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors = np.repeat(np.bincount(tie, wrong) / counts, counts)  # the most confident first
    risk = errors.cumsum() / np.arange(1, len(gold) + 1)
    shown = np.linspace(0, len(gold) - 1, min(len(gold), 101)).round().astype(int)
    curve = np.stack([(shown + 1) / len(gold), risk[shown]], axis=1).tolist()
    return dict(ece=ece, reliability=reliability, aurc=float(risk.mean()), risk_coverage=curve)


# ---- bootstrap and p ---------------------------------------------------------------------------

SAMPLES = 1000  # choice: bootstrap samples of a run's posts; intervals move by about 0.01


def bootstrap(gold, predicted, values, seed=0):
    """{metric: (SAMPLES,) its values when n posts are drawn from these n with replacement}, for
    accuracy, both F1 and the means of `values` {metric: (n,), nan where a post has none}. The draws
    depend on n and the seed alone, so that runs over the same posts are drawn in pairs."""
    n = len(gold)
    # draws (SAMPLES, n): how often a sample holds a post
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), SAMPLES).astype(float)
    cells = np.array([confusion_table([g], [p]) for g, p in zip(gold, predicted)])  # (n, 3, 4)
    samples = confusion_scores(np.tensordot(draws, cells, 1))
    for name, of_posts in values.items():
        present = ~np.isnan(of_posts)
        with np.errstate(invalid="ignore"):  # a sample without such a post has no mean: nan
            samples[name] = (draws @ np.nan_to_num(of_posts)) / (draws @ present)
    return samples


def intervals(samples):
    """{metric: [low, high]}, the middle 95 % of its bootstrap samples."""
    return {k: np.nanpercentile(values, [2.5, 97.5]).tolist() for k, values in samples.items()}


def welch(value, seeds, variance):
    """(p, margin) of a mean over seeds, or of the difference of two such means: the two-sided p
    that it is 0 in truth, and half the width of its 95 % interval, by Welch's t with the variance
    of the posts added.

    value: that mean or difference; seeds: for each setting its seeds' values, two at least;
    variance: of `value` when other posts are drawn, taken as known, with infinitely many degrees of
    freedom. With variance 0 equal to scipy's ttest_ind(equal_var=False)."""
    parts = [np.var(values, ddof=1) / len(values) for values in seeds]
    total = sum(parts) + variance
    if total == 0:
        return float(value == 0), 0.0
    # Welch-Satterthwaite: 1 / df; 10,000 degrees of freedom are as good as any more
    inverse = sum(part**2 / (len(values) - 1) for part, values in zip(parts, seeds)) / total**2
    df = 1 / max(inverse, 1e-4)
    # t = √df tan(angle) has a density in proportion to cos(angle)^(df - 1)
    angle = np.linspace(np.pi / 2, 0, 4001)
    density = np.cos(angle) ** (df - 1)
    tail = np.append(0, np.cumsum(density[1:] + density[:-1]))  # of |T|, by the trapezoidal rule
    tail /= tail[-1]
    p = np.interp(-np.arctan(abs(value) / (df * total) ** 0.5), -angle, tail)
    limit = np.tan(np.interp(0.05, tail, angle)) * df**0.5
    return float(p), float(limit * total**0.5)


def p_value(a, b, key):
    """Two-sided p of a metric's difference between two settings (metrics, samples) over the same
    posts. Of two runs the paired bootstrap's (Berg-Kirkpatrick et al. 2012): how often their
    difference strays from its mean by as much as that is from 0. Of two settings of several seeds
    `welch`'s; None of a run against several seeds, since its deviation is not known, and where a
    setting lacks the metric. Never below the least p of a sign test over the posts."""
    (first, first_samples), (second, second_samples) = a, b
    comparable = key in first_samples and key in second_samples
    if not comparable or ("seeds" in first) != ("seeds" in second):
        return None
    difference = first_samples[key] - second_samples[key]
    difference = difference[~np.isnan(difference)]
    if "seeds" in first:
        seeds = [[seed[key] for seed in metrics["seeds"]] for metrics in (first, second)]
        p, _ = welch(first[key] - second[key], seeds, difference.var())
    else:
        strays = (abs(difference - difference.mean()) >= abs(difference.mean())).sum()
        p = float(1 + strays) / (1 + len(difference))
    posts = first["referenced" if f"{key}_floor" in first else "n"]
    return max(p, 0.5 ** (posts - 1))


def group_seeds(runs):
    """[(metrics, samples), …] of one setting's seeds -> one such pair. Numbers become means (None
    where a seed lacks it); `deviation` holds their sample deviations, `seeds` the seeds' own
    metrics; what is no number is the first seed's. A grouped sample is the mean of the seeds' over
    the same posts; intervals are `welch`'s, within [0, 1]."""
    if len(runs) == 1:
        return runs[0]
    seeds, samples = zip(*runs)
    grouped, deviation, means_of, limits = dict(seeds[0]), {}, {}, {}
    for name, value in seeds[0].items():
        values = [seed.get(name) for seed in seeds]
        if is_number(value) and None in values:
            grouped[name] = None
        elif is_number(value):
            grouped[name] = value if len(set(values)) == 1 else float(np.mean(values))
            deviation[name] = float(np.std(values, ddof=1))
            if name in samples[0]:
                means_of[name] = np.mean([sample[name] for sample in samples], axis=0)
                _, margin = welch(grouped[name], [values], np.nanvar(means_of[name]))
                limits[name] = np.clip(grouped[name] + margin * np.array([-1, 1]), 0, 1).tolist()
    return grouped | dict(deviation=deviation, seeds=list(seeds), intervals=limits), means_of


# ---- BLEU, ROUGE, Distinct ---------------------------------------------------------------------

# sacrebleu's default tokenizer, mteval-v13a, and nltk's TreebankWordTokenizer
_13A = (("<skipped>|-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"),
        ("&gt;", ">"), (r"\A|\Z", " "), (r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "),
        (r"([^0-9])([\.,])", r"\1 \2 "), (r"([\.,])([^0-9])", r" \1 \2"), ("([0-9])(-)", r"\1 \2 "))
_TREEBANK = (
    ('^"', "``"), ("``", " `` "), (r"""([ ([{<])("|'')""", r"\1 `` "), (r"([:,])(\D)", r" \1 \2"),
    (r"[:,]$|\.\.\.|[;@#$%&?!]", r" \g<0> "), (r"""([^.])(\.)([])}>"']*)[^\S\x1c-\x1f]*$""",
    r"\1 \2\3 "), ("([^'])' ", r"\1 ' "), (r"[][(){}<>]|--", r" \g<0> "), (r"\A|\Z", " "),
    ("''|\"", " '' "), ("([^' ])('[smd]|') ", r"\1 \2 "), ("([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    (r"\b(can(?=not)|gim(?=me)|lem(?=me)|gon(?=na)|wan(?=na\s)|got(?=ta)|d(?='ye)|more(?='n))"
     r"(not|me|na|ta|'ye|'n)\b", r" \1 \2 "), (r" ('t)(is|was)\b", r" \1 \2 "))


@cache
def tokenize(text, rules):
    """Words of a text after one substitution ((pattern, replacement), …) after the other."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text.split()


def treebank_tokens(text):
    """Penn Treebank tokens of the lower-cased text."""
    return tokenize(text.lower(), _TREEBANK)


def ngrams(tokens, n):
    """All n-grams of a list of tokens, in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def bleu4(prediction, reference):
    """Sentence BLEU-4 in [0, 1] (Papineni et al. 2002): 13a tokens, no smoothing, no effective
    order (the authors' way: a pair without a common 4-gram scores 0). Equal to sacrebleu's sentence
    BLEU with smooth_method="none", use_effective_order=False."""
    prediction = tokenize(prediction.rstrip(), _13A)
    reference = tokenize(reference.rstrip(), _13A)
    precisions = []
    for n in range(1, 5):
        common = Counter(ngrams(prediction, n)) & Counter(ngrams(reference, n))
        precisions.append(common.total() / max(len(ngrams(prediction, n)), 1))
    if not precisions[3]:
        return 0.0
    brevity = min(0.0, 1 - len(reference) / len(prediction))
    return float(np.exp(brevity + np.log(precisions).mean()))


def lcs(x, y):
    """(length, set of words) of a longest common subsequence of two lists of words. Of several the
    one that the `rouge` package finds: it drops a word of y rather than of x."""
    row = [(0, frozenset())] * (len(y) + 1)  # for each y[:j]
    for word in x:
        above, row = row, row[:1]
        for j, other in enumerate(y):
            if word == other:
                row.append((above[j][0] + 1, above[j][1] | {word}))
            else:
                row.append(above[j + 1] if above[j + 1][0] > row[j][0] else row[j])
    return row[-1]


def sentences(text):
    """`rouge` 1.0.1's sentences, split at full stops, as lists of words."""
    return [" ".join(s.split()).split(" ") for s in text.split(".") if s]


def rouge_l(prediction, reference):
    """ROUGE-L F in [0, 1] as the `rouge` 1.0.1 package has it (the authors' way): union of sentence
    LCS, counted over distinct words. 0 where the package raises, for lack of a sentence."""
    prediction, reference = sentences(prediction), sentences(reference)
    common = set()
    for of_reference in reference:
        for of_prediction in prediction:
            common |= lcs(of_reference, of_prediction)[1]
    precision = len(common) / max(len(set().union(*prediction)), 1)
    recall = len(common) / max(len(set().union(*reference)), 1)
    return 2 * precision * recall / (precision + recall + 1e-8)


def distinct_n(texts, n):
    """Distinct-n (Li et al. 2016): mean over texts of different / all n-grams of lower-cased
    Treebank tokens; a text shorter than n tokens scores 0."""
    shares = []
    for text in texts:
        grams = ngrams(treebank_tokens(text), n)
        shares.append(len(set(grams)) / max(len(grams), 1))
    return float(np.mean(shares or 0))


# ---- METEOR ------------------------------------------------------------------------------------

_IRREGULAR = dict(skies="sky", dying="die", lying="lie", tying="tie", innings="inning",
                  outings="outing", cannings="canning")
_UNCHANGED = "sky news inning outing canning howe proceed exceed succeed".split()
# Porter's steps 2 to 4: (the measure to exceed, "ending:replacement …")
_PORTER = [
    (0, "alli:al"), (0, "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble entli:ent "
     "eli:e ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous "
     "aliti:al iviti:ive biliti:ble fulli:ful (?<=l)ogi:og"),
    (0, "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"),
    (1, "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: (?<=[st])ion: ou: ism: ate: "
     "iti: ous: ive: ize:")]


def measure(word):
    """Porter's m: how often a consonant follows a vowel."""
    return len(re.findall("[aeiouy][^aeiouy]", word))


def is_short(word):
    """Whether it is a vowel and a consonant, or ends consonant, vowel, consonant but w, x, y."""
    return bool(re.search("^[aeiouy][^aeiouy]$|[^aeiouy][aeiouy][^aeiouywxY]$", word))


def replace_ending(word, rules, above):
    """The first ending of "ending:replacement …" that fits acts, if the measure of what stands
    before it is above that."""
    for rule in rules.split():
        ending, replacement = rule.split(":")
        start = re.sub(f"{ending}$", "", word)
        if start != word:
            return start + replacement if measure(start) > above else word
    return word


@cache
def stem(word):
    """Porter's stem (1980) of a lower-cased word with nltk's extensions (its default mode)."""
    if len(word) <= 2 or word in _UNCHANGED or word in _IRREGULAR:
        return _IRREGULAR.get(word, word)
    word = re.sub("(^|[aeiouy])y", r"\1Y", word)  # Y is a consonant, any other y a vowel
    word = re.sub("^(.ie)s$|(ss)es$|(i)es$|(ss)$|s$", r"\1\2\3\4", word)
    word = re.sub("^(.ie)d$|(i)ed$", r"\1\2", word)
    start = re.sub("(ed|ing)$", "", word)
    if word.endswith("eed"):
        word = replace_ending(word, "eed:ee", 0)
    elif start != word and re.search("[aeiouy]", start):
        word = re.sub(r"([^aeiouylsz])\1$|(y)Y$", r"\1\2", start)  # hopp(ing) -> hop
        if re.search("(at|bl|iz)$", start) or measure(start) == 1 and is_short(start):
            word = start + "e"  # hop(ing) -> hope
    word = re.sub("(?<=..)y$", "i", word)
    for above, rules in _PORTER:
        word = replace_ending(word, rules, above)
    word = replace_ending(word, "e:", int(is_short(word[:-1])))
    return replace_ending(word, "(?<=l)l:", 1).lower()


# WordNet's rules from inflected words to base forms
_BASE_FORMS = dict(noun="s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y", adv="",
                   verb="s: ies:y es:e es: ed:e ed: ing:e ing:", adj="er: est: er:e est:e")


@cache
def read_wordnet(folder):
    """synonyms(word) -> the word and every single word that shares a meaning with it or with a base
    form of it, from WordNet 3.0's dictionary files (data.*, *.exc), as nltk finds them. Raises
    InputError where the folder lacks one."""
    def rows(name):
        path = Path(folder, name)
        require(path.is_file(), f"--wordnet {folder} lacks {name}: Debian's wordnet-base has it")
        for line in path.read_text("utf-8").splitlines():
            if not line.startswith(" "):  # a line of the licence
                yield line.split()

    related, irregular = defaultdict(set), {}
    for part in _BASE_FORMS:
        for _, _, _, count, *rest in rows(f"data.{part}"):  # one meaning a row
            names = rest[: 2 * int(count, 16) : 2]
            for name in names:
                related[part, name.partition("(")[0].lower()].update(names)
        for word, *forms in rows(f"{part}.exc"):
            irregular[part, word] = forms

    @cache
    def synonyms(word):
        found = set()
        for part, rules in _BASE_FORMS.items():
            forms = [word, *irregular.get((part, word), ())]
            for rule in rules.split():
                ending, replacement = rule.split(":")
                if word.endswith(ending) and (part, word) not in irregular:
                    forms.append(word.removesuffix(ending) + replacement)
            for form in forms:
                found |= related.get((part, form), set())
        return {word} | {name.partition("(")[0] for name in found if "_" not in name}  # glad(p)

    return synonyms


def match(prediction, reference, alternatives=lambda word: (word,)):
    """Pairs of positions (i, j) where alternatives(prediction[i]) hold reference[j], from the end,
    each position once; removes them from both {position: word}."""
    places = defaultdict(list)  # of each word of the reference, rising
    for j, word in reference.items():
        places[word].append(j)
    pairs = []
    for i in list(reversed(prediction)):
        free = [places[word][-1] for word in alternatives(prediction[i]) if places.get(word)]
        if free:
            pairs.append((i, max(free)))
            places[reference.pop(max(free))].pop()
            del prediction[i]
    return pairs


def meteor(prediction, reference, wordnet=None):
    """METEOR in [0, 1] (Lavie and Agarwal 2007; α 0.9, β 3, γ 0.5) on lower-cased Treebank tokens:
    equal words, then equal stems, then, with `wordnet` (the folder of its dictionary files),
    synonyms. Equal to nltk 3.10's single_meteor_score. Raises InputError as read_wordnet does."""
    prediction = dict(enumerate(treebank_tokens(prediction)))
    reference = dict(enumerate(treebank_tokens(reference)))
    length = 0.1 * len(prediction) + 0.9 * len(reference)  # recall weighs 9 times precision
    pairs = match(prediction, reference)
    for words in (prediction, reference):
        for place in words:
            words[place] = stem(words[place])
    pairs += match(prediction, reference)
    if wordnet:  # trap: nltk looks up synonyms of the stems, not of the words
        pairs += match(prediction, reference, read_wordnet(str(wordnet)))
    pairs.sort()
    chunks = 1  # runs of words that stand side by side in both texts
    for (i, j), after in zip(pairs, pairs[1:]):
        chunks += after != (i + 1, j + 1)
    return len(pairs) / max(length, 1) * (1 - 0.5 * (chunks / max(len(pairs), 1)) ** 3)


# ---- Sim ---------------------------------------------------------------------------------------


def load_embedder(name):
    """similarity(prediction, reference) -> Sim: the cosine of two texts' mean-pooled last hidden
    states, of their first 256 pieces (the authors' limit); 0 of an empty prediction. `name`: a
    folder or a hub name. Raises InputError if it cannot be
    loaded."""
    from transformers import AutoModel, AutoTokenizer

    with explaining(f"--embedder {name}: no all-MiniLM-L6-v2"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name).eval()

    @torch.no_grad()
    def similarity(prediction, reference):
        means = []
        for text in (prediction, reference):
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            means.append(model(**inputs).last_hidden_state[0].mean(0))  # (D,)
        return torch.cosine_similarity(*means, dim=0).item() if prediction else 0.0

    return similarity


# ---- chains ------------------------------------------------------------------------------------

SIGNATURES = {  # how a metric is computed: its name is not enough to compare papers by
    "n": "n: gold posts of split {split} ({trained} training posts); bold: beats the next, p < .05",
    "seeds": "seeds: mean ± deviation; p and interval by Welch's t, the posts' variance added",
    "p_accuracy": "p: against {baseline}; none of seeds beside one run, nor of scores",
    "accuracy_agree": "acc. =, ≠: accuracy where chain=label, and where not",
    "parse_rate": "chains: raw text against raw reference, names and quotes included; missing "
                  "chain = empty text",
    "meteor_floor": "(…): floor, against the next post's reference, of another tweet if any",
    "bleu4": "BLEU-4|13a|per post, unsmoothed, mean|= sacrebleu sentence BLEU, smoothing none",
    "rouge_l": "ROUGE-L F|sentences at full stops, union LCS, distinct words|= rouge 1.0.1",
    "meteor": "METEOR|Treebank tokens in lower case|exact, Porter, WordNet: {wordnet}|= nltk 3.10",
    "sim": "Sim|cosine, mean-pooled {embedder}|first 256 pieces",
    "distinct_1": "Distinct-1, -2|Treebank tokens in lower case|per text, mean"}


def names_only(parsed, label):
    """Whether Final_conclusion names that label and no other."""
    conclusion = parsed.fields.get("Final_conclusion", "").lower()
    return set(LABEL_WORD.findall(conclusion)) == {label}


def means(values):
    """{metric: (n,), nan where a post has none, but not of all} -> {metric: mean}."""
    return {name: float(np.nanmean(of_posts)) for name, of_posts in values.items()}


def exchanged_references(posts):
    """For each post with a chain (`cot`) the chain of the next such post, in their order and
    wrapping round, that is of another tweet (has another text); of the next one where all are of
    one tweet. None for a post without a chain, and for the only one with a chain."""
    own = [post for post in posts if post.cot]
    chains = {}
    for i, post in enumerate(own):
        others = own[i + 1 :] + own[:i]
        of_tweets = (other for other in others if other.text != post.text)
        exchanged = next(of_tweets, others[0] if others else None)
        chains[post.id] = exchanged and exchanged.cot
    return [chains.get(post.id) for post in posts]


def text_metrics(texts, references, wordnet=None, similarity=None):
    """{metric: (n,) values} of n generated texts against n references (texts, or None), nan where
    there is no reference. paper: the released script compares the text as it came with the chain
    as it stands in the file."""
    values = defaultdict(lambda: np.full(len(texts), np.nan))
    for i, (text, reference) in enumerate(zip(texts, references)):
        if reference:
            values["bleu4"][i] = bleu4(text, reference)
            values["rouge_l"][i] = rouge_l(text, reference)
            values["meteor"][i] = meteor(text, reference, wordnet)
            if similarity:
                values["sim"][i] = similarity(text, reference)
    return values


def chain_metrics(rows, references, others=(), wordnet=None, similarity=None):
    """(metrics, values {metric: (n,), nan where a post has none}) of n prediction rows beside n
    reference chains (texts, or None). parse_rate: `raw`, the row's chain, has five fields and a
    label; agreement: its Prediction is the row's label; concludes: its Final_conclusion names that
    label alone. The text metrics take every chain as it came, a missing one as an empty text; their
    floors (`meteor_floor`, …) are the same against the `others`, references of other posts."""
    texts = [row.get("raw", "") for row in rows]
    own_references = list(filter(None, references))
    values = text_metrics(texts, references, wordnet, similarity)
    floors = means(text_metrics(texts, others, wordnet, similarity))
    for i, row in enumerate(rows):
        parsed = parse_reasoning(texts[i])
        label = row.get("prediction")
        values["parse_rate"][i] = parsed.complete
        values["agreement"][i] = label is not None and parsed.prediction == label
        values["concludes"][i] = names_only(parsed, label)
    metrics = dict(distinct_1=distinct_n(texts, 1), distinct_2=distinct_n(texts, 2))
    if own_references:
        # choice: Distinct is of the predictions; the authors' script measures the references.
        metrics |= dict(referenced=len(own_references),
                        distinct_2_references=distinct_n(own_references, 2))
    for name, value in floors.items():
        metrics[f"{name}_floor"] = value
    return metrics | means(values), values


def teacher_chains(path):
    """{id: row} of rows that hold a chain, checked."""
    rows = {}
    for where, row in checked_rows(path, "generate.py teacher"):
        require(isinstance(row.get("cot"), str), f"{where}: needs cot, the chain")
        rows[str(row["id"])] = row
    return rows


def teacher_metrics(path):
    """How the teacher's kept chains came about: unaided (stage 1) or told the label (stage 2).
    `contradictions`: part of the stage-2 answers that contradict the label they were given, at
    least: what came before a kept one is not on file. `unaided_accuracy`, `unaided_macro_f1`: of
    what the teacher said before it was told the label, null being wrong, over the `unaided_n` rows
    that hold it, kept or set aside."""
    rows = list(teacher_chains(path).values())
    rejects = read_rows(sibling(path, "rejects.jsonl"))
    stages = [row.get("stage") for row in rows]
    labels, unaided, contradicts = [], [], [False] * stages.count(2)
    with explaining(f"the rows or rejects of {path} are damaged"):
        for row in [*rows, *rejects]:
            if "unaided_prediction" in row:
                labels.append(row["label"])
                unaided.append(row["unaided_prediction"])
            for attempt in row.get("attempts", ()):
                if attempt["stage"] == 2:
                    contradicts.append(attempt["problem"].startswith("predicts "))
        metrics = dict(kept=len(rows), unaided=stages.count(1), label_conditioned=stages.count(2),
                       set_aside=len(rejects), contradictions=float(np.mean(contradicts or 0)))
        if labels:
            scores = classification_metrics(labels, unaided)
            for key in ("n", "accuracy", "macro_f1"):
                metrics[f"unaided_{key}"] = scores[key]
    return metrics


def diagnose(runs, teacher):
    """What the metrics of the runs {name: metrics} and of the teacher point to, in plain words, by
    failure signatures; only what applies. choice: METEOR not 0.05 above its floor is
    low, Distinct-2 as high as the references' is high, more than 5 % contradictions are many."""
    found = []
    for name, m in runs.items():
        sim, meteor = m.get("sim"), m.get("meteor")  # None where a seed has none
        if sim is not None and sim < 0.85:
            found.append(f"{name}: Sim {sim:.1%} is below 85 %: prompts unlike the task?")
        assistant = runs.get(name.removesuffix("student") + "assistant", {})
        gap = 100 * (assistant.get("accuracy", 0) - m.get("accuracy", 1))
        if name.endswith("student") and gap > 5 and not name.startswith("base/"):
            found.append(f"{name}: {gap:.1f} points below its assistant: λ too high? Try 0.1")
        floor = m.get("meteor_floor")  # None where there is one reference
        ungrounded = None not in (meteor, floor) and meteor < floor + 0.05
        if ungrounded and m["distinct_2"] >= m["distinct_2_references"]:
            found.append(f"{name}: METEOR is low, Distinct-2 high: fluent but ungrounded chains")
    if teacher.get("contradictions", 0) > 0.05:
        found.append("teacher: stage-2 answers contradict their label: weak, or noisy labels")
    return found


# ---- runs and table ----------------------------------------------------------------------------

COLUMNS = dict(  # the most wanted first: a terminal shows as many as fit
    n="n", accuracy="accuracy, 95 %", p_accuracy="p acc.", macro_f1="macro F1", p_macro_f1="p F1",
    mae="MAE", corr="Corr", acc2_non0="Acc-2", acc7="Acc-7", parse_rate="parsed",
    agreement="chain=label", meteor="METEOR", rouge_l="ROUGE-L", sim="Sim", bleu4="BLEU-4",
    weighted_f1="weighted F1", accuracy_agree="acc. =", accuracy_disagree="acc. ≠",
    unparsed="unparsed", missing="no row", referenced="references", ece="ECE", aurc="AURC")
# Names of no run, because metrics.json has its own entries of these names.
RESERVED = {"", *"majority teacher command versions signatures diagnosis date split n".split()}


def sign_label(score):
    """The label that a sentiment score stands for: its sign."""
    if score is None:
        return None
    require(LABELS == POLARITY, f"a score's sign is none of the labels {', '.join(LABELS)}")
    return LABELS[1 + int(np.sign(score))]


def prediction_rows(path):
    """{id: row} of a prediction file, checked: prediction is a label or None, score a number or
    None, probs a distribution whose largest is the prediction's, raw a text where given."""
    rows = {}
    for where, row in checked_rows(path, "generate.py predict"):
        require(row.keys() & {"prediction", "score"}, f"{where}: needs prediction (or score)")
        require(str(row["id"]) not in rows, f"{where}: duplicate id {row['id']!r}: one row a post")
        score = row.get("predicted_score", row.get("score"))  # the former of a cascade or UBM
        require(score is None or is_number(score), f"{where}: score {score!r} is no number")
        if "prediction" not in row or not isinstance(row.get("raw"), str):
            row.pop("raw", None)  # a readout's raw text is a number and no chain
        if "prediction" not in row or "predicted_score" in row:  # as for gold posts with scores
            row["prediction"] = sign_label(score)
        require(row["prediction"] in (*LABELS, None), f"{where}: prediction is no label nor null")
        probs = row.get("probs")
        require(probs is None or is_distribution(probs), f"{where}: probs is no distribution")
        if row["prediction"] and probs:
            likeliest = probs[LABELS.index(row["prediction"])] > max(probs) - 1e-6
            require(likeliest, f"{where}: probs contradict the prediction")
        rows[str(row["id"])] = row | dict(score=score)
    return rows


def read_gold(args):
    """(gold posts of --split that have a label, the split); the default is test where there are
    such posts, else all. `cot` is a post's reference chain, from the reference files or its
    own."""
    references, rejects, gold = {}, [], []
    for file in args.references:
        references |= teacher_chains(file)
    for post in read_posts(args.gold, args.images, rejects):
        if post.id in references:
            post.cot = references[post.id]["cot"]
        post.label = post.label or sign_label(post.score)  # MOSI and MOSEI have scores alone
        if post.label:
            gold.append(post)
    report_rejects(rejects, "gold rows cannot be read and are in no number below")
    require(gold, f"{args.gold} has no post with label or score")
    split = args.split or ("test" if any(post.split == "test" for post in gold) else "all")
    posts = select_split(gold, split)
    require(posts, f"{args.gold} has no labelled post of split {split!r}: try --split all")
    own = [post for post in posts if post.id in references]
    require(own or not args.references, "--references hold no judged post: other ids or --split?")
    print(f"judged: {len(posts)} gold posts, split {split}; {len(gold) - len(posts)} left out")
    return posts, split


def read_specs(specs):
    """[NAME=]FILE … -> {name: files}. Several files of one NAME are the seeds of one setting."""
    files = {}
    for spec in specs:
        *given, path = [spec] if Path(spec).exists() else spec.split("=", 1)
        name = given[0] if given else Path(path).stem
        is_free = name not in RESERVED and (given or name not in files)
        require(is_free, f"run name {name!r} is taken: name the files apart, NAME=FILE")
        files.setdefault(name, []).append(path)
    return files


def run_metrics(rows, posts, wordnet=None, similarity=None):
    """(metrics, bootstrap samples) of prediction rows {id: row} against gold posts: a post without
    a row counts as unparsed, and its chain as empty. Rows with scores, where the posts have them,
    are judged by these alone."""
    own = [rows.get(post.id, {}) for post in posts]
    about = dict(missing=own.count({}))
    labels = [post.label for post in posts]
    predictions = [row.get("prediction") for row in own]
    scores = [(p.score, row.get("score")) for p, row in zip(posts, own) if p.score is not None]
    if any(score is not None for _, score in scores):
        # choice: a score's sign is judged as no label, for neutral would be exactly 0.0
        return about | dict(n=len(scores)) | regression_metrics(*zip(*scores)), {}
    metrics, values = about | classification_metrics(labels, predictions), {}
    if any("raw" in row for row in own):
        of_chains, values = chain_metrics(own, [post.cot for post in posts],
                                          exchanged_references(posts), wordnet, similarity)
        right = np.array(labels, object) == np.array(predictions, object)
        values["accuracy_agree"] = np.where(values["agreement"] == 1, right, np.nan)
        values["accuracy_disagree"] = np.where(values["agreement"] == 0, right, np.nan)
        values = {key: of_posts for key, of_posts in values.items() if not np.isnan(of_posts).all()}
        metrics |= of_chains | means(values)
    probs = [row["probs"] for row in own if row.get("probs")]
    if len(probs) == len(posts):  # of some posts alone they would flatter
        metrics |= calibration_metrics(labels, probs)
    samples = bootstrap(labels, predictions, values)
    return metrics | dict(intervals=intervals(samples)), samples


def best_of(settings, key):
    """The setting {name: (metrics, samples)} whose metric beats the next best's with p < 0.05, if
    there is one; all cover the same posts."""
    names = [name for name, (_, samples) in settings.items() if key in samples]
    if len(names) < 2 or key.startswith("accuracy_"):  # those are of other posts
        return None
    names.sort(key=lambda name: -settings[name][0][key])
    p = p_value(settings[names[0]], settings[names[1]], key)
    return names[0] if p is not None and p < 0.05 else None


def cell(metrics, key, is_best=False):
    """How a run's metric looks in a table."""
    value = metrics.get(key)
    if value is None:
        return ""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if isinstance(value, float) and key in metrics.get("deviation", {}):
        text += f" ± {metrics['deviation'][key]:.3f}"
    if f"{key}_floor" in metrics:
        text += f" ({metrics[f'{key}_floor']:.3f})"
    if is_best:
        text = f"**{text}**"
    if key == "accuracy" and "intervals" in metrics:
        text += " {:.2f}–{:.2f}".format(*metrics["intervals"]["accuracy"])
    return text


def table(runs, settings):
    """{name: metrics} -> columns of cells, their titles first, but the empty ones; **bold** is a
    best value that is significantly better than the next."""
    columns = [["run", *runs]]
    for key, title in COLUMNS.items():
        best = best_of(settings, key)
        cells = [cell(metrics, key, name == best) for name, metrics in runs.items()]
        if any(cells):
            columns.append([title, *cells])
    return columns


def markdown(columns, width=np.inf):
    """A table of columns, padded so that it reads well as plain text too; the first of them alone
    that fit into so many characters."""
    lines = ["|"] * (1 + len(columns[0]))
    for column in columns:
        cells = [text.replace("|", "&#124;") for text in column]
        longest = max(2, *map(len, cells))
        cells.insert(1, "-" * (longest - 1) + ":")
        if len(lines[0]) + longest + 1 > width:
            break
        lines = [f"{line}{text.rjust(longest)}|" for line, text in zip(lines, cells)]
    return "\n".join(lines) + "\n"


def evaluate(args):
    """Table, metrics.json, table.md and report.html of the given runs."""
    specs = read_specs(args.predictions)
    require(args.baseline in (None, *specs), f"--baseline {args.baseline!r} is none of the runs")
    posts, split = read_gold(args)
    similarity = args.embedder and load_embedder(args.embedder)
    runs, settings, rows_of = {}, {}, {}
    for name, paths in specs.items():
        seeds = []
        for path in paths:
            rows = prediction_rows(path)
            covered = sum(post.id in rows for post in posts)
            require(covered, f"{path}: no id is that of a judged post: wrong --gold or --split?")
            print(f"{path}: {covered} of {len(posts)} judged posts have a row, others are wrong")
            seeds.append(run_metrics(rows, posts, args.wordnet, similarity))
            rows_of.setdefault(name, rows)
        settings[name] = group_seeds(seeds)
        runs[name], _ = settings[name]
    if args.baseline:
        for name in settings.keys() - {args.baseline}:
            for key in ("accuracy", "macro_f1"):
                runs[name][f"p_{key}"] = p_value(settings[name], settings[args.baseline], key)
    used = set().union(*runs.values())  # names of metrics
    if "accuracy" in used:
        labels = [post.label for post in posts]
        commonest = Counter(labels).most_common(1)[0][0]
        majority = classification_metrics(labels, [commonest] * len(labels))
        runs = dict(majority=majority | dict(label=commonest)) | runs
    facts = vars(args) | dict(split=split, trained=sum(post.split == "train" for post in posts))
    signatures = {key: text.format(**facts) for key, text in SIGNATURES.items() if key in used}
    teacher = teacher_metrics(args.chains) if args.chains else {}
    about = args.info | dict(date=time.strftime("%Y-%m-%d %H:%M"), split=split, n=len(posts),
                             signatures=signatures, teacher=teacher,
                             diagnosis=diagnose(runs, teacher))
    write_results(about, runs, table(runs, settings), posts, rows_of, args)


def write_results(about, runs, columns, posts, rows_of, args):
    """The table in the console and in table.md, report.html, metrics.json. about: metrics.json's
    entries that are no run; rows_of: {name: {id: row} of its first file}."""
    notes = list(about["signatures"].values())
    lines = list(map("diagnosis: {}".format, about["diagnosis"]))
    if about["teacher"]:
        shown = (f"{name.replace('_', ' ')} {cell(about['teacher'], name)}"
                 for name in about["teacher"])
        lines.append(f"teacher: {', '.join(shown)}")
    below = "\n- ".join(["", *notes, *lines]) + "\n"
    title = args.title and args.title + "\n\n"
    print(title + markdown(columns, width=100) + below)
    write_text(Path(args.out, "table.md"), title + markdown(columns) + below)
    page = report(about | dict(title=args.title), runs, columns, notes, lines, posts, rows_of,
                  args.cards)
    write_text(Path(args.out, "report.html"), page)
    write_json(Path(args.out, "metrics.json"), about | runs)
    print(f"wrote {args.out}/metrics.json, {args.out}/table.md and {args.out}/report.html")


# ---- report ------------------------------------------------------------------------------------

STYLE = """:root{color-scheme:light dark;--dim:light-dark(#59606c,#a7aebb)}*{box-sizing:border-box;
margin:0}body{background:Canvas;max-width:78rem;margin:auto;padding:1rem;font:15px/1.5 system-ui;
overflow-wrap:anywhere}h2,p{margin:.5rem 0}a,mark{color:inherit}.lead b{white-space:nowrap}
.lead b{font-size:1.7rem;
margin-right:1rem}img{width:9rem;float:left;margin:0 1rem 1rem 0}small,dt,th{color:var(--dim);
font-size:.87rem;font-weight:400}mark{background:light-dark(#fd8,#654)}
span,small[class]{color:var(--c,var(--dim));font-weight:600}.note,article{border-left-width:.4rem}
.wide,.note,figure,form,article{border:1px solid var(--c,var(--dim));margin:.5rem 0;padding:.6rem}
.pair,dl{display:flex;flex-wrap:wrap;gap:0 1rem}figure,dd{flex:1 1 17rem}figure{max-width:27rem}
.wide{overflow-x:auto;width:fit-content;max-width:100%}table{border-collapse:collapse}
td,th{padding:.2rem .5rem;text-align:right;white-space:nowrap}th:first-child{text-align:left}
path{stroke:var(--dim);opacity:.4}text{fill:var(--dim);font-size:11px}polyline{fill:none;
stroke:CanvasText;stroke-width:2}circle{fill:CanvasText}dt{width:100%}
circle~polyline,[hidden]{display:none}dd{white-space:pre-wrap}article{content-visibility:auto;
contain-intrinsic-size:auto 20rem}label{white-space:nowrap}"""
COLORS = ("light-dark(#ad3d0c,#ff9e73)", "var(--dim)", "light-dark(#1b5cc8,#8cb6ff)",
          "light-dark(#1a7f37,#7ee08f)", "light-dark(#7a35b8,#d2a6ff)")  # of LABELS, in their order

SCRIPT = """const all = query => [...document.querySelectorAll(query)], form = document.forms[0];
form.onreset = () => setTimeout(form.oninput);
(form.oninput = () => {
  const words = form.search.value.toLowerCase().split(/\\s+/);
  const wanted = all("input:checked").map(box => box.value);
  for (const post of all("article")) {
    const text = post.textContent.toLowerCase(), marks = post.dataset.marks.split("|");
    post.hidden = !words.every(x => text.includes(x)) || !wanted.every(x => marks.includes(x));
  }
  form.left.value = `${all("article:not([hidden])").length} of ${all("article").length} posts`;
})();"""

# Of the first run's label and chain; the last is of two runs.
FLAGS = ("wrong", "chain ≠ label", "unparsed", "chain ≠ teacher's", "only one of them right")


def css_class(label):
    """The name that a label's colour goes by."""
    return re.sub(r"\W", "-", label or "none")


def in_color(label, gold=None):
    """A label in its class's colour; where gold is given, ✓ or ✗ beside it."""
    mark = {None: "", label: " ✓"}.get(gold, " ✗")
    return f"<span class={css_class(label)}>{escape(label or 'none')}</span>{mark}"


def html_table(rows, title):
    """Rows of cells in a box that scrolls sideways: the first row and column are headings, labels
    have their class's colour, **bold** is bold."""
    html = f'<div class=wide tabindex=0 role=region aria-label="{title}"><b>{title}</b><table>'
    for i, row in enumerate(rows):
        html += "<tr>"
        for j, text in enumerate(row):
            tag = "td" if i and j else "th"
            bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(str(text)))
            html += f"<{tag}>{in_color(text) if text in LABELS else bold}"
    return html + "</table></div>"


def error_table(metrics):
    """The confusion matrix with each class's precision, recall, F1 and support."""
    table = [["gold", *LABELS, "unparsed", "precision", "recall", "F1", "n"]]
    for counts, (label, scores) in zip(metrics["confusion"], metrics["per_class"].items()):
        table.append([label, *counts, *(cell(scores, name) for name in scores)])
    return html_table(table, "gold and predicted labels")


def chart(title, across, up, points, n):
    """The points of a run over n posts as inline SVG, with the names of both axes: [[x, y, count],
    …] as dots of that area, [[x, y], …] as a line; x from 0 to 1."""
    # quarters of a multiple of 0.04 are short numbers
    top = max(1, np.ceil(25 * np.max(points, axis=0)[1])) / 25
    art = f"<text x=40 y=8>{up}</text><text x=300 y=206 text-anchor=end>{across}</text>"
    line = ""
    for k in range(5):
        y = 174 - 40 * k
        art += (f'<path d="M40 {y}H300"/><text x=34 y={y + 4} text-anchor=end>{top * k / 4:g}'
                f"</text><text x={40 + 65 * k} y=190 text-anchor=middle>{k / 4:g}</text>")
    for x, y, *count in points:
        place = 40 + 260 * x, 174 - 160 * y / top
        line += "{:.1f},{:.1f} ".format(*place)
        radius = 2 + 10 * (sum(count) / n) ** 0.5
        art += "<circle cx={:.1f} cy={:.1f} r={:.1f} />".format(*place, radius) * len(count)
    return (f'<figure>{title}<svg viewBox="0 0 310 210" role=img aria-label="{title}">{art}'
            f'<polyline points="{line}"/></svg></figure>')


def chain_fields(texts):
    """Chains {name: text} field by field, equal fields once; one that lacks a field as it is."""
    whose = {}  # {heading: {text: names}}
    for name, text in texts.items():
        chain = parse_reasoning(text)
        parts = chain.fields if chain.complete else {chain.problem: text}
        for heading, part in parts.items():
            whose.setdefault(heading, {}).setdefault(part, []).append(name)
    whose.pop("Prediction", None)
    html = ""
    for heading, parts in whose.items():
        html += f"<dt>{escape(heading.replace('_', ' '))}"
        for part, names in parts.items():
            html += f"<dd><small>{escape(' = '.join(names))}:</small> {escape(part)}"
    return f"<dl>{html}</dl>"


def card(post, shown):
    """A post as HTML with its rows {run: row}: of each run the label and the chain's, ✓ or ✗, its
    probabilities, score and route; then the chains beside the teacher's."""
    lines, texts, right = f"<p><b>gold</b> {in_color(post.label)}", {}, set()
    for name, row in shown.items():
        lines += f"<p><b>{escape(name)}</b> label {in_color(row.get('prediction'), post.label)}"
        right.add(row.get("prediction") == post.label)
        for label, p in zip(LABELS, row.get("probs") or ()):
            lines += f" <small class={css_class(label)}>{p:.1%}</small>"
        if "raw" in row:
            texts[name] = row["raw"]
            lines += f" · chain {in_color(parse_reasoning(row['raw']).prediction, post.label)}"
        if row.get("score") is not None:
            lines += f" · score {row['score']:.2f}"
        if "route" in row:
            lines += escape(f" · route {row['route']}: {row.get('reason')}")
    if post.cot:
        texts["teacher"] = post.cot
    name, row = next(iter(shown.items()))
    label = row.get("prediction")
    chain = parse_reasoning(row.get("raw", ""))
    teacher = parse_reasoning(post.cot or "")
    holds = (label != post.label, len({label, chain.prediction} - {None}) == 2,
             label is None or name in texts and not chain.complete,
             len({teacher.prediction, chain.prediction} - {None}) == 2, len(right) == 2)
    flags = [flag for flag, is_so in zip(FLAGS, holds) if is_so]
    marks = "|".join([*flags, f"gold {post.label}", f"label {label}"])
    image = "".join(f'<img alt=image src="{data_url(x, 160, 75)}">' for x in post.images[:1])
    pieces = post.text.split(post.aspect) if post.aspect else [post.text]
    text = f"<mark>{escape(str(post.aspect))}</mark>".join(map(escape, pieces))
    name = escape(post.id)
    return (f'<article class={css_class(post.label)} id="{name}" data-marks="{marks}">'
            f'<div>{image}</div><div><a href="#{name}">{name}</a> '
            f'<b>{" · ".join(flags)}</b><p class=text>{text}{lines}'
            f"{chain_fields(texts)}</div></article>\n")


def report(about, runs, columns, notes, lines, posts, rows_of, most):
    """The self-contained page. runs: {name: metrics}; columns: of their table; about:
    metrics.json's other entries; notes: how numbers are computed; lines: what they point to;
    rows_of: {name: {id: row}}, of the first two so many posts are shown. Every string from data is
    escaped, and the page's policy lets nothing run but SCRIPT, and nothing load."""
    pair = dict(list(rows_of.items())[:2])
    name = next(iter(pair))
    metrics = runs[name]

    cards, charts, boxes = "", "", ""
    wrong_first = lambda post: pair[name].get(post.id, {}).get("prediction") == post.label
    for post in sorted(posts, key=wrong_first)[:most]:
        cards += card(post, {run: rows.get(post.id, {}) for run, rows in pair.items()})
    marks = [*FLAGS[: 3 + len(pair)], *map("gold {}".format, LABELS),
             *map("label {}".format, LABELS)]
    for mark in marks:
        shown = escape(mark.replace("them", " and ".join(pair)))
        boxes += f' <label><input type=checkbox value="{mark}"> {shown}</label>'
    if metrics.get("ece") is not None:  # of seeds each needs one
        charts += chart(f"calibration, area: posts; ECE {cell(metrics, 'ece')}", "confidence",
                        "accuracy", metrics["reliability"], metrics["n"])
        charts += chart(f"surest posts alone; AURC {cell(metrics, 'aurc')}", "coverage",
                        "error rate", metrics["risk_coverage"], metrics["n"])
    computed = "<p class=note>".join(["", *map(escape, notes)])
    lines = "<p class=note>".join(["", *map(escape, lines)])
    seeds = metrics.get("seeds", [metrics])
    errors = error_table(seeds[0]) if "confusion" in metrics else ""
    # paper: macro F1 on Twitter-2015 and -2017, weighted F1 on MVSA
    lead = ""
    for key in ("accuracy", "macro_f1", "weighted_f1", "mae", "corr"):
        if key in metrics:
            lead += f"{COLUMNS[key].replace(' ', '&nbsp;')}&nbsp;<b>{cell(metrics, key)}</b> "
    colors = ""
    for label, color in zip(LABELS, COLORS):
        colors += f".{css_class(label)}{{--c:{color}}}"
    made = [about["date"], *map(" ".join, about["versions"].items())]
    nonce = secrets.token_urlsafe()
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=\
device-width"><meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'">
<title>MulCoT-RD: {escape(name)}</title><style>{STYLE}{colors}</style>
<h1>MulCoT-RD: {escape(name)}</h1>
<p>{escape(about["title"])}<p class=lead>{lead} n&nbsp;<b>{about["n"]}</b> split&nbsp;<b>\
{escape(about["split"])}</b>
<p><small>{escape(" · ".join(made))}<br><code>{escape(about["command"])}</code></small>{lines}
{html_table(zip(*columns), "all runs")}<details><summary>how the columns are computed</summary>
{computed}</details>{errors}<div class=pair>{charts}</div>
<h2>{min(most, len(posts))} of {len(posts)} posts (--cards shows more; file 1 of {len(seeds)}), \
wrong ones first</h2>
<form><label>search <input type=search name=search></label>{boxes}<button type=reset>clear</button>
<output name=left></output></form>{cards}<script nonce={nonce}>{SCRIPT}</script></html>
"""


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    args.info = run_info("eval.py", argv)  # {"command": …, "versions": …}
    return run_stage(evaluate, args)


if __name__ == "__main__":
    raise SystemExit(main())
