"""Metrics and a report from prediction files; parses the raw text anew, runs no language model.

    python eval.py predictions.jsonl --gold test.tsv --images img --out results
    python eval.py student=s.jsonl assistant=a.jsonl --gold posts.jsonl --out results \\
        --references references.jsonl --wordnet /usr/share/wordnet --embedder all-MiniLM-L6-v2
    python eval.py full=1.jsonl full=2.jsonl less=3.jsonl less=4.jsonl --gold test.tsv --out table

Last line: `wrote results/metrics.json, results/table.md and results/report.html`. A prediction row
needs id and prediction; with `raw` (the chain) the chain is judged too, with `probs` its
confidence, with `score` the number. Gold labels come from --gold, never from prediction rows. The
only network that may run is Sim's sentence embedder. Files of one NAME are its seeds, shown as mean
± deviation; NAME may be GROUP/NAME and is the file's without its ending if none is given. The
report shows the first file's posts.
"""

import argparse
import base64
import hashlib
import re
from collections import Counter, defaultdict
from functools import cache
from html import escape
from pathlib import Path

import numpy as np
import torch

from mulcot import (
    FIELDS, LABELS, Help, InputError, confusion_scores, confusion_table, data_url, parse_reasoning,
    read_posts, read_rows, regression_metrics, report_rejects, run_info, run_stage, sibling,
    write_json, write_text)


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    p.add_argument("predictions", nargs="+", metavar="[NAME=]FILE", help="rows of generate.py")
    p.add_argument("--gold", required=True, help="labelled posts: a file or an MVSA folder")
    p.add_argument("--images", help="images folder (default: images/ beside the posts or theirs)")
    p.add_argument("--references", nargs="*", default=[], metavar="ROWS", help="rows with cot")
    p.add_argument("--chains", help="the teacher's rows, for their statistics")
    p.add_argument("--logs", nargs="*", default=[], metavar="[NAME=]FILE", help="train.py's logs")
    p.add_argument("--cards", type=int, default=200, help="posts in the report, wrong ones first")
    p.add_argument("--baseline", metavar="NAME", help="column p: accuracy against this run's")
    p.add_argument("--wordnet", metavar="DIR", help="WordNet 3.0's files, for METEOR's synonyms")
    p.add_argument("--embedder", help="all-MiniLM-L6-v2, folder or hub name, for Sim")
    p.add_argument("--out", required=True, help="folder for metrics.json, table.md, report.html")
    return p.parse_args(argv)


def require(condition, message):
    """Raises InputError where the user's input does not hold what it must."""
    if not condition:
        raise InputError(message)


def is_number(value):
    """Whether a JSON value is a finite number (True is none)."""
    return type(value) in (int, float) and np.isfinite(value)


def checked_rows(path, stage):
    """("FILE:LINE", row) of each JSON object in a file that `stage` wrote."""
    require(Path(path).exists(), f"{path} does not exist: run {stage} first")
    for n, row in enumerate(read_rows(path), 1):
        require(isinstance(row, dict), f"{path}:{n}: not a JSON object")
        yield f"{path}:{n}", row


# ---- classification and calibration ------------------------------------------------------------


def classification_metrics(gold, predicted):
    """Metrics of n labels against n gold ones: accuracy, macro and weighted F1; per class
    precision, recall, F1 and support; confusion (rows gold, columns LABELS + unparsed). A None
    prediction is unparsed and wrong for every class. Equal to scikit-learn's with labels=LABELS
    and zero_division=0. Raises AssertionError unless both lists hold as many labels, and some."""
    assert len(gold) == len(predicted) and gold, (len(gold), len(predicted))
    table = confusion_table(gold, predicted)  # (3, 4)
    metrics = dict(n=len(gold), unparsed=predicted.count(None), confusion=table.tolist())
    for name, value in confusion_scores(table).items():
        metrics[name] = float(value)
    metrics["per_class"] = {}
    counts = np.stack([np.diagonal(table), table.sum(0)[:3], table.sum(1)]).tolist()
    for label, right, predictions, support in zip(LABELS, *counts):
        metrics["per_class"][label] = dict(
            precision=right / max(predictions, 1), recall=right / max(support, 1), support=support,
            f1=2 * right / max(predictions + support, 1))
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
    reliability, ece = [], 0.0
    for b in np.unique(bin_of):
        inside = bin_of == b
        point = float(confidence[inside].mean()), float(1 - wrong[inside].mean())
        reliability.append([*point, int(inside.sum())])
        ece += float(inside.mean()) * abs(point[0] - point[1])
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


def p_value(a, b, posts=np.inf):
    """Two-sided p of the paired bootstrap (Berg-Kirkpatrick et al. 2012) from two runs' samples of
    one metric (SAMPLES,): how often their difference strays from its mean by as much as that is
    from 0; never below the least p of a sign test over so many `posts`."""
    difference = (a - b)[~np.isnan(a - b)]
    center = difference.mean()
    strays = (abs(difference - center) >= abs(center)).sum()
    return max(float(1 + strays) / (1 + len(difference)), 0.5 ** (posts - 1))


def group_seeds(runs):
    """[(metrics, samples), …] of one setting's seeds -> one such pair. Numbers become means (None
    where a seed lacks it); `deviation` holds their sample deviations, `seeds` the seeds' own
    metrics; what is no number is the first seed's. A grouped sample is the mean of as many seeds,
    drawn with replacement, over the same posts."""
    if len(runs) == 1:
        return runs[0]
    seeds, samples = zip(*runs)
    grouped, deviation, mixed = dict(seeds[0]), {}, {}
    for name, value in seeds[0].items():
        values = [seed.get(name) for seed in seeds]
        if is_number(value) and None in values:
            grouped[name] = None
        elif is_number(value):
            grouped[name] = value if len(set(values)) == 1 else float(np.mean(values))
            deviation[name] = float(np.std(values, ddof=1))
    pick = np.random.default_rng(0).integers(len(runs), size=(len(runs), SAMPLES))
    for name in sorted(deviation.keys() & samples[0].keys()):
        of_seeds = np.stack([sample[name] for sample in samples])  # (seeds, SAMPLES)
        mixed[name] = np.take_along_axis(of_seeds, pick, axis=0).mean(0)
    return grouped | dict(deviation=deviation, seeds=list(seeds), intervals=intervals(mixed)), mixed


# ---- BLEU, ROUGE, Distinct ---------------------------------------------------------------------

# sacrebleu's default tokenizer, mteval-v13a, and nltk's TreebankWordTokenizer
_13A = [("<skipped>|-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"),
        ("&gt;", ">"), (r"\A|\Z", " "), (r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 "),
        (r"([^0-9])([\.,])", r"\1 \2 "), (r"([\.,])([^0-9])", r" \1 \2"), ("([0-9])(-)", r"\1 \2 ")]
_TREEBANK = [
    ('^"', "``"), ("``", " `` "), (r"""([ ([{<])("|'')""", r"\1 `` "), (r"([:,])(\D)", r" \1 \2"),
    ("[:,]$", r" \g<0> "), (r"\.\.\.|[;@#$%&]", r" \g<0> "), ("[?!]", r" \g<0> "),
    (r"""([^.])(\.)([])}>"']*)[^\S\x1c-\x1f]*$""", r"\1 \2\3 "), ("([^'])' ", r"\1 ' "),
    (r"[][(){}<>]|--", r" \g<0> "), (r"\A|\Z", " "), ("''|\"", " '' "),
    ("([^' ])('[smd]|') ", r"\1 \2 "), ("([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    (r"\b(can(?=not)|gim(?=me)|lem(?=me)|gon(?=na)|wan(?=na\s)|got(?=ta)|d(?='ye)|more(?='n))"
     r"(not|me|na|ta|'ye|'n)\b", r" \1 \2 "), (r" ('t)(is|was)\b", r" \1 \2 ")]


def tokenize(text, rules):
    """Words of a text after one substitution [(pattern, replacement), …] after the other."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text.split()


def treebank_tokens(text):
    """Penn Treebank tokens of the lower-cased text."""
    return tokenize(text.lower(), _TREEBANK)


def ngrams(tokens, n):
    """All n-grams of a list of tokens, in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def bleu_counts(prediction, reference):
    """What BLEU is made of, (10,): common 1- to 4-grams, the prediction's, both lengths. Sums of
    it over posts give the corpus' BLEU."""
    prediction = tokenize(prediction.rstrip(), _13A)
    reference = tokenize(reference.rstrip(), _13A)
    common, total = [], []
    for n in range(1, 5):
        common.append((Counter(ngrams(prediction, n)) & Counter(ngrams(reference, n))).total())
        total.append(len(ngrams(prediction, n)))
    return np.array([*common, *total, len(prediction), len(reference)], float)


def bleu_score(counts, smooth=False):
    """BLEU-4 in [0, 1] (Papineni et al. 2002) from bleu_counts (10,). `smooth`: the k-th order
    without a common n-gram counts as 1 / 2^k of one (sacrebleu's default)."""
    common, total, lengths = np.split(counts, (4, 8))
    if not common[0] or not total.all() or not (smooth or common.all()):
        return 0.0
    common = np.where(common, common, 0.5 ** np.cumsum(common == 0))
    brevity = min(0.0, 1 - lengths[1] / lengths[0])
    return float(np.exp(brevity + np.log(common / total).mean()))


def bleu4(prediction, reference):
    """Sentence BLEU-4 in [0, 1]: 13a tokens, no smoothing, no effective order (the authors' way: a
    pair without a common 4-gram scores 0). Equal to sacrebleu's sentence BLEU with
    smooth_method="none"."""
    return bleu_score(bleu_counts(prediction, reference))


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


def rouge_l_plain(prediction, reference):
    """ROUGE-L F in [0, 1] (Lin 2004) as Google's `rouge-score`: one LCS over whole texts,
    lower-cased ASCII letters and digits, no stemming."""
    prediction = re.findall("[a-z0-9]+", prediction.lower())
    reference = re.findall("[a-z0-9]+", reference.lower())
    return 2 * lcs(prediction, reference)[0] / max(len(prediction) + len(reference), 1)


def distinct_n(texts, n):
    """Distinct-n (Li et al. 2016): mean over texts of different / all n-grams of lower-cased
    Treebank tokens; a text shorter than n tokens scores 0."""
    values = []
    for text in texts:
        grams = ngrams(treebank_tokens(text), n)
        values.append(len(set(grams)) / max(len(grams), 1))
    return float(np.mean(values or 0))


# ---- METEOR ------------------------------------------------------------------------------------

_IRREGULAR = dict(skies="sky", dying="die", lying="lie", tying="tie", innings="inning",
                  outings="outing", cannings="canning")
_UNCHANGED = "sky news inning outing canning howe proceed exceed succeed".split()
# Porter's steps 2 to 4: (the measure to exceed, "ending:replacement …")
_PORTER = [
    (0, "alli:al"),
    (0, "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble entli:ent eli:e ousli:ous "
     "ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al "
     "iviti:ive biliti:ble fulli:ful (?<=l)ogi:og"),
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
        found = re.search(f"{ending}$", word)
        if found:
            start = word[: found.start()]
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
    form of it, from WordNet 3.0's dictionary files (index.*, data.*, *.exc), as nltk finds them.
    Raises InputError where the folder lacks one."""
    def rows(name):
        path = Path(folder, name)
        require(path.is_file(), f"--wordnet {folder} lacks {name}: Debian's wordnet-base has it")
        for line in path.read_text("utf-8").splitlines():
            if not line.startswith(" "):  # a line of the licence
                yield line.split()

    related, irregular = defaultdict(set), {}
    for part in _BASE_FORMS:
        names = {}  # of each meaning, by its offset
        for offset, _, _, count, *rest in rows(f"data.{part}"):
            names[offset] = rest[: 2 * int(count, 16) : 2]
        for word, _, count, *rest in rows(f"index.{part}"):
            for offset in rest[-int(count) :]:
                related[part, word].update(names[offset])
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
    pairs = []
    for i in list(reversed(prediction)):
        words = alternatives(prediction[i])
        for j in reversed(reference):
            if reference[j] in words:
                pairs.append((i, j))
                del prediction[i], reference[j]
                break
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
        for position, word in words.items():
            words[position] = stem(word)
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
    folder or a hub name. Equal to sentence-transformers'. Raises InputError if it cannot be
    loaded."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as e:
        raise InputError(f"--embedder {name}: no all-MiniLM-L6-v2 ({str(e)[:80]!r})") from None

    @torch.no_grad()
    def similarity(prediction, reference):
        means = []
        for text in (prediction, reference):
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            means.append(model(**inputs).last_hidden_state[0].mean(0))  # (D,)
        return torch.cosine_similarity(*means, dim=0).item() if prediction else 0.0

    return similarity


# ---- chains ------------------------------------------------------------------------------------

SIGNATURES = {  # how each text metric is computed: its name is not enough to compare papers by
    "bleu4": "BLEU-4|13a|per post, unsmoothed, mean|= sacrebleu sentence BLEU, smoothing none",
    "bleu4_corpus": "BLEU-4|13a|corpus, exp smoothing|= sacrebleu's default",
    "rouge_l": "ROUGE-L F|sentences at full stops, union LCS, distinct words|= rouge 1.0.1",
    "rouge_l_plain": "ROUGE-L F|whole text, a-z0-9 in lower case, no stemmer|= rouge-score 0.1.2",
    "meteor": "METEOR|Treebank tokens in lower case|exact, Porter, {synonyms}|= nltk 3.10",
    "sim": "Sim|cosine, mean-pooled {embedder}|first 256 pieces|= sentence-transformers",
    "distinct_1": "Distinct-1|Treebank tokens in lower case|per text, mean",
    "distinct_2": "Distinct-2|Treebank tokens in lower case|per text, mean"}


def chain_text(parsed):
    """What the text metrics compare: the fields' texts, in order, without names and quotes."""
    return " ".join(parsed.fields[name] for name in FIELDS if name in parsed.fields)


def names_only(parsed, label):
    """Whether Final_conclusion names that label and no other."""
    conclusion = parsed.fields.get("Final_conclusion", "").lower()
    return set(re.findall(rf"\b({'|'.join(LABELS)})\b", conclusion)) == {label}


def means(values):
    """{metric: (n,), nan where a post has none} -> {metric: mean}."""
    return {name: float(np.nanmean(of_posts)) for name, of_posts in values.items()}


def chain_metrics(rows, references, wordnet=None, similarity=None):
    """(metrics, values {metric: (n,), nan where a post has none}) of n prediction rows beside n
    reference chains (texts, or None). parse_rate: `raw`, the row's chain, has five fields and a
    label; agreement: its Prediction is the row's label; concludes: its Final_conclusion names that
    label alone. A chain that is unparsed or not there scores 0 against its reference and counts in
    `unparsed_chains`."""
    values = defaultdict(lambda: np.full(len(rows), np.nan))
    texts, reference_texts, corpus_counts = [], [], 0
    for i, (row, reference) in enumerate(zip(rows, references)):
        parsed = parse_reasoning(row.get("raw", ""))
        texts.append(chain_text(parsed) if parsed.complete else "")
        label = row.get("prediction")
        values["parse_rate"][i] = parsed.complete
        values["agreement"][i] = label is not None and parsed.prediction == label
        values["concludes"][i] = names_only(parsed, label)
        if reference is not None:
            reference = chain_text(parse_reasoning(reference))
            reference_texts.append(reference)
            counts = bleu_counts(texts[i], reference)
            corpus_counts += counts
            values["bleu4"][i] = bleu_score(counts)
            values["rouge_l"][i] = rouge_l(texts[i], reference)
            values["rouge_l_plain"][i] = rouge_l_plain(texts[i], reference)
            values["meteor"][i] = meteor(texts[i], reference, wordnet)
            if similarity:
                values["sim"][i] = similarity(texts[i], reference)
    metrics = dict(chains=len(texts), unparsed_chains=texts.count(""))
    texts = [text for text in texts if text]
    metrics |= dict(distinct_1=distinct_n(texts, 1), distinct_2=distinct_n(texts, 2))
    if reference_texts:
        # choice: Distinct is of the predictions; the authors' script measures the references.
        metrics |= dict(referenced=len(reference_texts),
                        bleu4_corpus=bleu_score(corpus_counts, smooth=True),
                        distinct_1_references=distinct_n(reference_texts, 1),
                        distinct_2_references=distinct_n(reference_texts, 2))
    return metrics | means(values), values


def add_faithfulness(values, rows, posts):
    """Adds whether each post's label is right, under what its chain is: it names that label or not;
    the teacher's chain for the post came about unaided (stage 1) or label-conditioned (2). The
    latter are the posts that the teacher got wrong: harder ones, whatever the chain's worth."""
    of_stage = {1: "accuracy_unaided", 2: "accuracy_conditioned"}
    for i, (row, post) in enumerate(zip(rows, posts)):
        right = row.get("prediction") == post.label
        values["accuracy_agree" if values["agreement"][i] else "accuracy_disagree"][i] = right
        if post.columns.get("stage") in of_stage:
            values[of_stage[post.columns["stage"]]][i] = right


def teacher_chains(path):
    """{id: row} of rows that hold a chain, checked."""
    rows = {}
    for where, row in checked_rows(path, "generate.py teacher"):
        require("id" in row and isinstance(row.get("cot"), str), f"{where}: needs id and cot")
        rows[str(row["id"])] = row
    return rows


def teacher_metrics(path):
    """How the teacher's kept chains came about. They were kept for being right; nobody chose them
    for a Final_conclusion that names the label alone, so `concludes` compares the unaided with the
    label-conditioned. `contradictions`: part of the stage-2 answers that contradict the label they
    were given, at least: what came before a kept one is not on file."""
    rows = teacher_chains(path).values()
    rejects = read_rows(sibling(path, "rejects.jsonl"))
    tries, concludes = [], defaultdict(list)  # the latter by stage
    for row in rows:
        tries.append(row.get("tries", 1))
        parsed = parse_reasoning(row["cot"])
        concludes[row.get("stage")].append(names_only(parsed, parsed.prediction))
    rejected = [str(attempt["problem"]).startswith("predicts ") for row in rejects
                for attempt in row.get("attempts", ()) if attempt["stage"] == 2]
    return dict(kept=len(rows), unaided=len(concludes[1]), label_conditioned=len(concludes[2]),
                set_aside=len(rejects), answers_per_kept_chain=float(np.mean(tries or 0)),
                concludes_unaided=float(np.mean(concludes[1] or 0)),
                concludes_conditioned=float(np.mean(concludes[2] or 0)),
                contradictions=sum(rejected) / max(len(concludes[2]) + len(rejected), 1))


def diagnose(runs, teacher={}):
    """What the metrics of the runs {name: metrics} and of the teacher point to, in plain words, by
    the paper's failure signatures; only what applies. choice: METEOR below 0.40 is low (two real
    chains about different posts score 0.33), Distinct-2 as high as the references' is high, more
    than 5 % contradictions are many."""
    found = []
    for name, m in runs.items():
        assistant = runs.get(name.removesuffix("student") + "assistant", m)
        gap = 100 * (assistant["accuracy"] - m["accuracy"])
        if m.get("sim", 1) < 0.85:
            found.append(f"{name}: Sim {m['sim']:.1%} is below 85 %: prompts unlike the task?")
        if name.endswith("student") and gap > 5 and m.get("source") != "base":
            found.append(f"{name}: {gap:.1f} points below its assistant: λ too high? Try 0.1")
        if m.get("meteor", 1) < 0.4 and m["distinct_2"] >= m["distinct_2_references"]:
            found.append(f"{name}: METEOR is low, Distinct-2 high: fluent but ungrounded chains")
    if teacher.get("contradictions", 0) > 0.05:
        found.append("teacher: stage-2 answers contradict their label: weak, or noisy labels")
    return found


# ---- runs and table ----------------------------------------------------------------------------

COLUMNS = dict(
    accuracy="accuracy", intervals="95 %", p="p", macro_f1="macro F1", weighted_f1="weighted F1",
    unparsed="unparsed", mae="MAE", corr="Corr", acc7="Acc-7", acc2_non0="Acc-2", ece="ECE",
    aurc="AURC", bleu4="BLEU-4", rouge_l="ROUGE-L", meteor="METEOR", sim="Sim", parse_rate="parsed",
    agreement="chain = label", accuracy_agree="accuracy there", accuracy_disagree="elsewhere")
# Names of no run, because metrics.json has its own entries of these names.
RESERVED = {"", *"majority teacher command versions signatures comparisons diagnosis".split()}


def sign_label(score):
    """The label that a sentiment score stands for: its sign, in the order of LABELS."""
    return LABELS[1 + int(np.sign(score))]


def prediction_rows(path):
    """{id: row} of a prediction file, checked: prediction is a label or None, score a number or
    None, probs three numbers where given, raw a text where given."""
    rows = {}
    for where, row in checked_rows(path, "generate.py predict"):
        require("id" in row and row.keys() & {"prediction", "score"},
                f"{where}: a prediction row needs id and prediction (or score)")
        require(str(row["id"]) not in rows, f"{where}: duplicate id {row['id']!r}: one row a post")
        score = row.get("predicted_score", row.get("score"))  # the former of a cascade or UBM
        require(score is None or is_number(score), f"{where}: score {score!r} is no number")
        if "prediction" not in row or not isinstance(row.get("raw"), str):
            row.pop("raw", None)  # a readout's raw text is a number and no chain
        if "prediction" not in row or "predicted_score" in row:  # as for gold posts with scores
            row["prediction"] = None if score is None else sign_label(score)
        require(row["prediction"] in (*LABELS, None), f"{where}: prediction is no label nor null")
        probs = row.get("probs") or [0, 0, 0]
        is_valid = isinstance(probs, list) and [is_number(p) for p in probs] == [True] * 3
        require(is_valid, f"{where}: probs must be three numbers")
        rows[str(row["id"])] = row | dict(score=score)
    return rows


def read_gold(path, images, reference_files):
    """Gold posts {id: post} that have a label; `cot` is their reference chain, from the reference
    files or their own, and `columns["stage"]` the teacher's stage that it came from."""
    references, rejects, gold = {}, [], {}
    for file in reference_files:
        references |= teacher_chains(file)
    for post in read_posts(path, images, rejects):
        if post.id in references:
            post.cot = references[post.id]["cot"]
            post.columns["stage"] = references[post.id].get("stage")
        if post.score is not None:  # MOSI and MOSEI have scores and no labels
            post.label = post.label or sign_label(post.score)
        if post.label:
            gold[post.id] = post
    report_rejects(rejects, "gold rows cannot be read and are in no number below")
    require(gold, f"{path} has no post with label or score")
    return gold


def read_specs(specs):
    """[NAME=]FILE … -> {name: files}. Several files of one NAME are the seeds of one setting."""
    files = {}
    for spec in specs:
        *given, path = spec.split("=", 1)
        name = given[0] if given else Path(path).stem
        nests = any(x.startswith(f"{name}/") or name.startswith(f"{x}/") for x in files)
        require(not nests and name.split("/")[0] not in RESERVED and (given or name not in files),
                f"run name {name!r} is taken: name the files apart, NAME=FILE")
        files.setdefault(name, []).append(path)
    return files


def covered_posts(path, rows, gold):
    """The gold posts {id: post} of the splits that prediction rows cover, as a list."""
    splits = {gold[i].split for i in rows.keys() & gold.keys()}
    require(splits, f"{path}: no id occurs among the labelled gold posts: wrong --gold?")
    posts = [post for post in gold.values() if post.split in splits]
    missing = sum(post.id not in rows for post in posts)
    foreign = len(rows.keys() - gold.keys())
    print(f"{path}: {len(posts)} gold posts, {missing} lack a row (unparsed); {foreign} other rows")
    return posts


def run_metrics(rows, posts, wordnet=None, similarity=None):
    """(metrics, bootstrap samples) of prediction rows {id: row} against gold posts: a post without
    a row counts as unparsed, and its chain as empty."""
    own = [rows.get(post.id, {}) for post in posts]
    labels = [post.label for post in posts]
    predictions = [row.get("prediction") for row in own]
    metrics = classification_metrics(labels, predictions)
    metrics |= dict(missing=own.count({}), source=next(iter(rows.values())).get("source"))
    values, probs, scores = {}, [], []
    if any("raw" in row for row in own):
        of_chains, values = chain_metrics(own, [post.cot for post in posts], wordnet, similarity)
        add_faithfulness(values, own, posts)
        metrics |= of_chains | means(values)
    for post, row in zip(posts, own):
        if row.get("probs"):
            probs.append((post.label, row["probs"]))
        if post.score is not None:
            scores.append((post.score, row.get("score")))
    if probs:
        metrics |= calibration_metrics(*zip(*probs))
    if any(score is not None for _, score in scores):
        metrics["scores"] = regression_metrics(*zip(*scores))
        for name in ("mae", "corr", "acc7", "acc2_non0"):
            metrics[name] = metrics["scores"][name]
    samples = bootstrap(labels, predictions, values)
    return metrics | dict(intervals=intervals(samples)), samples


def best_against_next(runs, samples):
    """{metric: best run, next best, difference, p} over the runs of `samples`, which cover the same
    posts."""
    tests = {}
    for key in COLUMNS:
        names = [name for name in samples if key in samples[name]]
        if len(names) > 1 and not key.startswith("accuracy_"):  # those are of other posts
            names.sort(key=lambda name: -runs[name][key])
            best, after = names[:2]
            tests[key] = dict(best=best, next=after, difference=runs[best][key] - runs[after][key],
                              p=p_value(samples[best][key], samples[after][key], runs[best]["n"]))
    return tests


def cell(metrics, key):
    """How a run's metric looks in a table."""
    value = metrics.get(key)
    if value is None:
        return ""
    if key == "intervals":
        return "–".join(f"{x:.2f}" for x in value["accuracy"])
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if key in metrics.get("deviation", {}):
        text += f" ± {metrics['deviation'][key]:.3f}"
    return text


def table(runs, tests):
    """{name: metrics} -> columns of cells, their titles first; **bold** is a best value that is
    significantly better than the next."""
    columns = [["run", *runs]]
    for key, title in COLUMNS.items():
        cells = [cell(metrics, key) for metrics in runs.values()]
        if key in tests and tests[key]["p"] < 0.05:
            best = list(runs).index(tests[key]["best"])
            cells[best] = f"**{cells[best]}**"
        if any(cells):
            columns.append([title, *cells])
    return columns


def markdown(columns, notes):
    """A table of columns, padded so that it reads well as plain text too, and notes under it."""
    padded = []
    for column in columns:
        cells = [cell.replace("|", "&#124;") for cell in column]
        width = max(len(cell) for cell in cells)
        cells.insert(1, "-" * (width - 1) + ":")
        padded.append([cell.rjust(width) for cell in cells])
    lines = ["| " + " | ".join(row) + " |" for row in zip(*padded)]
    return "\n- ".join(["\n".join(lines) + "\n", *notes]) + "\n"


def evaluate(args):
    """Table, metrics.json, table.md and report.html of the given runs."""
    specs = read_specs(args.predictions)
    charts = training_charts(args.logs)
    gold = read_gold(args.gold, args.images, args.references)
    similarity = load_embedder(args.embedder) if args.embedder else None
    runs, samples, shown, comparable = {}, {}, None, True
    for name, paths in specs.items():
        seeds = []
        for path in paths:
            rows = prediction_rows(path)
            posts = covered_posts(path, rows, gold)
            shown = shown or (name, posts, rows)  # in the report
            comparable &= posts == shown[1]
            seeds.append(run_metrics(rows, posts, args.wordnet, similarity))
        runs[name], samples[name] = group_seeds(seeds)
    tests = best_against_next(runs, samples) if comparable else {}
    if args.baseline:
        require(args.baseline in runs, f"--baseline {args.baseline!r} must be one of the runs")
        require(comparable, "--baseline: all runs must cover the same posts")
        base = samples[args.baseline]["accuracy"]
        for name in runs.keys() - {args.baseline}:
            runs[name]["p"] = p_value(samples[name]["accuracy"], base, runs[name]["n"])
    labels = [post.label for post in shown[1]]
    commonest = Counter(labels).most_common(1)[0][0]
    majority = classification_metrics(labels, [commonest] * len(labels))
    runs = dict(majority=majority | dict(label=commonest)) | runs
    metrics = args.info | dict(signatures={}, comparisons=tests, teacher={})
    for key, text in SIGNATURES.items():
        if any(key in of_run for of_run in runs.values()):
            synonyms = "WordNet 3.0 synonyms" if args.wordnet else "no synonyms"
            metrics["signatures"][key] = text.format(synonyms=synonyms, embedder=args.embedder)
    if args.chains:
        metrics["teacher"] = teacher_metrics(args.chains)
        print(f"teacher: {metrics['teacher']}")
    metrics["diagnosis"] = diagnose(runs, metrics["teacher"])
    # The same lines stand under the table in the console, in table.md and in the report.
    notes = ["bold: better than the next best (paired bootstrap over posts, p < 0.05)"]
    notes += [*metrics["signatures"].values(), *metrics["diagnosis"]]
    text = markdown(table(runs, tests), notes)
    print(text)
    write_text(Path(args.out, "table.md"), text)
    write_text(Path(args.out, "report.html"), report(runs, text, shown, charts, args))
    for name, of_run in runs.items():  # base/student becomes {"base": {"student": …}}
        *groups, leaf = name.split("/")
        place = metrics
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = of_run
    write_json(Path(args.out, "metrics.json"), metrics)
    print(f"wrote {args.out}/metrics.json, {args.out}/table.md and {args.out}/report.html")


# ---- report ------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--page:light-dark(#f4f5f7,#14161a);--card:light-dark(#fff,#1e2127);
--text:light-dark(#1c2026,#eee);--good:light-dark(#1e7a3e,#6cca8c);--bad:light-dark(#b93a30,#f98)}
body{max-width:76rem;margin:auto;padding:0 1rem;background:var(--page);color:var(--text);
font:15px/1.5 system-ui;overflow-wrap:anywhere}p{margin:.2rem 0}label{white-space:nowrap}
.wide,figure,form,article{background:var(--card);border-radius:.6rem;padding:.7rem;margin:.7rem 0}
.wide{overflow-x:auto}.chain{white-space:pre-wrap;font:inherit;margin:.5rem 0}img{width:9rem}
figure{display:inline-block}svg{width:12rem;height:6rem;display:block}
polyline{fill:none;stroke:var(--good);stroke-width:2;vector-effect:non-scaling-stroke}
article{border-left:.4rem solid var(--good);content-visibility:auto}[hidden]{display:none}
.wrong{border-color:var(--bad)}.flags{color:var(--bad)}@media(min-width:46rem){
article:not([hidden]){display:grid;grid:auto 1fr/10rem 1fr 1fr;gap:.5rem 1rem}
article>div{grid-row:span 2}.text{grid-column:2/-1}form{position:sticky;top:0;z-index:1}}
"""

SCRIPT = """
const all = query => [...document.querySelectorAll(query)], form = document.forms[0];
form.onreset = () => setTimeout(form.oninput);
form.oninput = () => {
  const words = form.search.value.toLowerCase().split(/\\s+/);
  const wanted = all("input:checked").map(box => box.value);
  for (const post of all("article")) {
    const text = post.textContent.toLowerCase(), marks = post.dataset.marks.split(" ");
    post.hidden = !words.every(x => text.includes(x)) || !wanted.every(x => marks.includes(x));
  }
  form.left.value = `${all("article:not([hidden])").length} of ${all("article").length} posts`;
};
form.oninput();
"""

# The label is not gold's; chain and label differ; there is no label, or the chain lacks a field;
# the chain and the teacher's chain name different labels.
FLAGS = ("wrong", "conflict", "unparsed", "disagree")


def training_charts(specs):
    """The curves of training logs [NAME=]FILE, each from 0 to its last step and its largest value.
    A row that names its `run` belongs to that one."""
    curves = defaultdict(list)
    for spec in specs:
        *given, path = spec.split("=", 1)
        name = given[0] if given else Path(path).absolute().parent.name
        for where, row in checked_rows(path, "train.py"):
            require(is_number(row.get("step")), f"{where}: a log row needs a step")
            for key, value in row.items():
                if is_number(value) and re.match("(loss|dev_accuracy)$|ce_|kl_", key):
                    curves[f"{row.get('run', name)}: {key}"].append((row["step"], value))
    html = ""
    for name, curve in curves.items():
        right, top = np.maximum(np.max(curve, axis=0), 1e-9)
        points = " ".join(f"{x / right:.4f},{1 - y / top:.4f}" for x, y in curve)
        html += (f'<figure>{escape(name)}<svg viewBox="0 0 1 1" preserveAspectRatio=none role=none>'
                 f'<polyline points="{points}"/></svg>to step {right:g}, {top:.4g}</figure>')
    return html


def card(post, row):
    """A post as HTML: image, verdicts and probabilities; its text with the aspect marked; its chain
    and the teacher's."""
    chain = parse_reasoning(row.get("raw", ""))
    teacher = parse_reasoning(post.cot or "")
    label = row.get("prediction")
    holds = dict(wrong=label != post.label,
                 conflict=len({label, chain.prediction} - {None}) == 2,
                 unparsed=label is None or "raw" in row and not chain.complete,
                 disagree=len({teacher.prediction, chain.prediction} - {None}) == 2)
    flags = " ".join(flag for flag in FLAGS if holds[flag])
    side = f"<small>{escape(post.id)}</small> <b class=flags>{flags}</b>"
    if post.image:
        side += f'<img alt="the post\'s image" src="{data_url(post.image, 160, 75)}">'
    for who, verdict in dict(gold=post.label, label=label, chain=chain.prediction,
                             teacher=teacher.prediction).items():
        side += f"<p>{who} <b>{verdict}</b>"
    side += f"<p><small>{' '.join(f'{p:.1%}' for p in row.get('probs') or ())}</small>"
    pieces = post.text.split(post.aspect) if post.aspect else [post.text]
    text = f"<mark>{escape(str(post.aspect))}</mark>".join(escape(piece) for piece in pieces)
    return (f'<article class="{flags}" data-marks="{flags} gold:{post.label} label:{label}"><div>'
            f"{side}</div><p class=text>{text}<pre class=chain>{escape(row.get('raw', ''))}</pre>"
            f"<pre class=chain>{escape(post.cot or '')}</pre></article>\n")


def filters():
    """The form above the posts: boxes for FLAGS, gold and predicted labels, and a text search."""
    html = "<label>search <input type=search name=search></label>"
    for mark in (*FLAGS, *(f"gold:{x}" for x in LABELS), *(f"label:{x}" for x in LABELS)):
        html += f" <label><input type=checkbox value={mark}> {mark}</label>"
    return f"<form>{html} <button type=reset>clear</button> <output name=left></output></form>"


def report(runs, table_text, shown, charts, args):
    """The self-contained page. runs: {name: metrics}; table_text: their table; shown: (name, gold
    posts, {id: row}) of the run whose posts are shown; charts: HTML. Every string from data is
    escaped, and the page's policy lets nothing run but SCRIPT, and nothing load."""
    name, posts, rows = shown
    posts = sorted(posts, key=lambda post: rows.get(post.id, {}).get("prediction") == post.label)
    cards = "".join(card(post, rows.get(post.id, {})) for post in posts[: args.cards])
    confusion = [["gold", *LABELS]]
    for label, counts in zip((*LABELS, "unparsed"), np.transpose(runs[name]["confusion"])):
        confusion.append([label, *counts.astype(str)])
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=\
device-width"><meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<title>MulCoT-RD: {escape(name)}</title><style>{STYLE}</style><h1>MulCoT-RD: {escape(name)}</h1>
<pre class=wide tabindex=0>{escape(table_text)}</pre>
<pre class=wide tabindex=0>{escape(markdown(confusion, []))}</pre>{charts}
<h2>{len(posts):,} posts, wrong ones first</h2>{filters()}{cards}<script>{SCRIPT}</script></html>
"""
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair fits into no file


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    args.info = run_info("eval.py", argv)  # {"command": …, "versions": …}
    return run_stage(evaluate, args)


if __name__ == "__main__":
    raise SystemExit(main())
