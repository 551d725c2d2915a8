"""Text metrics, labels, scores, calibration and p: equal to trusted libraries' or by hand."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
import sacrebleu
import scipy.stats
import sklearn.metrics as sk
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.stem import PorterStemmer
from nltk.tokenize import TreebankWordTokenizer
from nltk.translate.meteor_score import single_meteor_score
from rouge import Rouge

from eval import (
    bleu4, bootstrap, calibration_metrics, classification_metrics, distinct_n, group_seeds,
    intervals, meteor, p_value, read_wordnet, regression_metrics, rouge_l, stem, treebank_tokens,
    welch)
from conftest import SHARED
from mulcot import LABELS

# ---- METEOR

PIECES = ['"', "'", "''", "``", "'s", "n't", "'ll", "can", "not", "cannot", "gimme", "wanna",
          "gonna", "'tis", "d'ye", "more'n", ".", "...", "..", ",", ":", ";", "?", "!", "--", "-",
          "(", ")",
          "[", "]", "<", ">", "{", "}", " ", " ", " ", "\n", "\t", "a", "b1", "3", "5.5", "1,000",
          "don't", "caf\u00e9", "\u0130", "\u00df", "\u03a3", "\U0001F600", "#tag", "@u", "$", "%",
          "&", "\xa0", "\u2028", "\x1c", "\x85", "\u2019", "\u201c", "\u4e2d\u6587", "i'm"]
ENDINGS = ("s es ed ing y ly ies ied eed ation ational alli entli logi ness ful fulli ment ion ive "
           "ize iviti biliti ously tion sion eli e ll er est sses yy").split()


def words_of(rng, n):
    """Made-up words with the endings that stemmers look at."""
    start = lambda: "".join(rng.choices("aeiouybcdlstnrgwx", k=rng.randint(1, 4)))
    return [start() + "".join(rng.choices(ENDINGS, k=rng.randint(0, 3))) for _ in range(n)]


def pair(seed):
    """A text and one that shares stems and places with it."""
    rng = random.Random(seed)
    known = ["the", "dogs", "dog", "running", "runs", "ran", "happy", "glad", "big", "."]
    words = rng.choices(known, k=rng.randint(1, 14)) + words_of(rng, 2)
    other = [w + rng.choice(["", "", "s", "ing"]) for w in words if rng.random() < 0.8]
    if rng.random() < 0.5:
        rng.shuffle(other)
    return " ".join(words), " ".join(other)


ODD = [("", ""), ("", "a b"), ("a b", ""), ("x", "x"), ("...", "."), ("\U0001F600", "\U0001F600 #"),
       ("Caf\u00e9 \u0130", "caf\u00e9 i\u0307"), (" \n", "a"), ("''\"``", "\"")]
METEOR_PAIRS = [pair(seed) for seed in range(200)] + ODD


def real_chains(n):
    """The first n teacher chains of the real posts; none where their folder is not here."""
    if not SHARED.is_dir():
        return []
    return [row["cot"] for row in json.loads((SHARED / "dev_chains.json").read_text("utf-8"))[:n]]


def neighbours():
    return [*zip(real_chains(25), real_chains(26)[1:])]


def test_tokens_equal_nltk():
    """Penn Treebank tokens of random punctuation, contractions, all kinds of space, real chains."""
    theirs, rng = TreebankWordTokenizer(), random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 14))) for _ in range(4000)]
    texts += ["a.\x1c", "a.\x85 "]  # nltk's regular expressions see no space in \x1c
    for text in texts + real_chains(150):
        assert treebank_tokens(text) == theirs.tokenize(text.lower()), repr(text)


def test_stems_equal_nltk():
    """Porter with nltk's extensions, on made-up words, nltk's irregular ones, and real ones."""
    theirs = PorterStemmer()
    words = words_of(random.Random(1), 20000) + [*theirs.pool, "yyyyying", "xyying", "toyed",
                                                 "flies", "dies", "died", "spied", "ies", "ied",
                                                 "ieds", "ss", "as", "geologi", "employee"]
    words += {w for text in real_chains(150) for w in treebank_tokens(text)}
    assert [w for w in words if stem(w) != theirs.stem(w)] == []
    assert len({stem(w) for w in words}) > 5000


def nltk_meteor(ours, theirs, wordnet):
    tokens = TreebankWordTokenizer().tokenize
    return single_meteor_score(tokens(theirs.lower()), tokens(ours.lower()), wordnet=wordnet)


NO_SYNONYMS = SimpleNamespace(synsets=lambda word: [])


def test_meteor_equals_nltk():
    """Exact and Porter stages, for random, odd and empty texts, and real chains."""
    values = []
    for ours, theirs in METEOR_PAIRS + neighbours():
        values.append(meteor(ours, theirs))
        assert values[-1] == pytest.approx(nltk_meteor(ours, theirs, NO_SYNONYMS), abs=1e-9)
    assert sum(0.05 < v < 0.95 for v in values) > 100 and min(values) == 0


SYNSETS = [("noun", ["dog", "hound", "Canis_familiaris"]), ("noun", ["joy", "gladness"]),
           ("verb", ["run", "race"]), ("verb", ["run", "function"]), ("adj", ["big", "large"]),
           ("adj", ["happy(a)", "glad(p)"]), ("adv", ["well", "good"]), ("noun", ["ox", "Bull"]),
           ("adj", ["good", "fine"]), ("noun", ["man", "fellow"])]


@pytest.fixture(scope="session")
def small_wordnet(tmp_path_factory):
    """A dictionary of ten meanings in WordNet's file format."""
    folder, index = tmp_path_factory.mktemp("wordnet"), {}
    data = {part: "  1 WordNet 3.0 Copyright\n" for part in ("noun", "verb", "adj", "adv")}
    for part, names in SYNSETS:
        offset = len(data[part])
        for name in names:
            index.setdefault((part, name.split("(")[0].lower()), []).append(f"{offset:08d}")
        names = " ".join(f"{name} 0" for name in names)
        kind, frames = dict(noun="n", verb="v", adj="a", adv="r")[part], "00 " * (part == "verb")
        count = len(names.split()) // 2
        data[part] += f"{offset:08d} 00 {kind} {count:02x} {names} 000 {frames}| x\n"
    for part, text in data.items():
        lines = ["  1 licence"] + [
            f"{word} {part[0]} {len(offsets)} 1 @ {len(offsets)} 0 {' '.join(offsets)}  "
            for (p, word), offsets in sorted(index.items()) if p == part]
        lines = [line.replace(" a ", " r ", 1) if part == "adv" else line for line in lines]
        (folder / f"index.{part}").write_text("\n".join(lines) + "\n")
        (folder / f"data.{part}").write_text(text)
        (folder / f"{part}.exc").write_text(dict(verb="ran run\n", noun="oxen ox\n").get(part, ""))
    return folder


class Reader(WordNetCorpusReader):
    """nltk's reader of a folder that lacks the sense index."""

    def map_wn(self, version="wordnet"):
        return None


@pytest.fixture
def nltk_reader(tmp_path, monkeypatch):
    """folder of dictionary files -> nltk's own reader of them."""

    def read(folder):
        for file in filter(Path.is_file, Path(folder).iterdir()):
            shutil.copy(file, tmp_path / file.name)  # it refuses links
        if not (tmp_path / "lexnames").exists():
            lines = "".join(f"{i:02d}\tx\t1\n" for i in range(45))
            (tmp_path / "lexnames").write_text(lines)
        monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
        with pytest.warns(UserWarning, match="multilingual"):
            return Reader(str(tmp_path), None)

    return read


def nltk_synonyms(reader, word):
    return {word} | {name for meaning in reader.synsets(word) for name in meaning.lemma_names()
                     if "_" not in name}


def test_synonyms_equal_nltk(small_wordnet, nltk_reader):
    """Base forms by rule and by exception, markers, many meanings, names with spaces."""
    reader, ours = nltk_reader(small_wordnet), read_wordnet(str(small_wordnet))
    words = {w.split("(")[0].lower() for _, names in SYNSETS for w in names} | {
        "dogs", "runs", "running", "ran", "oxen", "bigger", "men", "larger", "xyz", "", "races"}
    found = {w: ours(w) for w in words}
    assert found == {w: nltk_synonyms(reader, w) for w in words}
    assert found["ran"] == {"ran", "run", "race", "function"} and found["oxen"] >= {"ox", "Bull"}
    assert found["dogs"] == {"dogs", "dog", "hound"} and found["happy"] == {"happy", "glad"}


def test_meteor_with_synonyms_equals_nltk(small_wordnet, nltk_reader):
    """The third stage, which nltk applies to stems: `happi` has no synonyms, `dog` has."""
    reader = nltk_reader(small_wordnet)
    rng, words = random.Random(4), "run race function dog hound big large joy the".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(200)]
    several = ("run dog", "race function race hound")  # two synonyms are free: the later place
    for ours, theirs in METEOR_PAIRS + [*zip(texts, texts[1:]), several]:
        value = meteor(ours, theirs, small_wordnet)
        assert value == pytest.approx(nltk_meteor(ours, theirs, reader), abs=1e-9)
    assert meteor("hounds", "dog", small_wordnet) == 0.5 and meteor("hounds", "dog") == 0
    assert meteor("happy", "glad", small_wordnet) == 0


def test_real_wordnet(twitter, nltk_reader):
    """WordNet 3.0 as Debian has it: synonyms of many words, METEOR of real chains."""
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").exists():
        pytest.skip("no WordNet dictionary files here (apt-get install wordnet-base)")
    reader, ours = nltk_reader(folder), read_wordnet(str(folder))
    texts = real_chains(30)[:30]
    words = {w + end for t in texts for w in treebank_tokens(t) for end in ("", "s", "er")}
    assert len(words) > 2000
    assert [w for w in words if ours(w) != nltk_synonyms(reader, w)] == []
    for a, b in zip(texts, texts[15:]):
        value = meteor(a, b, folder)
        assert value == pytest.approx(nltk_meteor(a, b, reader), abs=1e-9) and value > meteor(a, b)


# ---- BLEU, ROUGE, Distinct

SENTENCES = ["The words call Rex 'great', which is praise.", "The image shows a smiling face.",
             "So Rex is seen as positive.", "They agree.", "No conflict is found here at all",
             "He scored 1,000.5 points on 3-4 days (U.S.A.) !", "It costs $5.00, i.e. 5%...",
             'Tom &amp; Ann say &quot;hi&quot; &lt;3 &gt;.<', "a--b -\nc well-\nknown 9-to-5 7-",
             "#tbt @user http://t.co/x1 :-) \U0001F4F7 caf\u00e9 \u4e2d\u6587 <skipped> \u2019s",
             "the the the cat the the", "A b. C d. . E", "x", "tab\there  two  spaces",
             "[x]{y}~`^_|"]


def mixed(seed):
    """A text and one that shares some of its pieces, in another order."""
    rng = random.Random(seed)
    ours = [rng.choice(SENTENCES) for _ in range(rng.randint(1, 6))]
    theirs = [s if rng.random() < 0.6 else rng.choice(SENTENCES) for s in ours]
    words = " ".join(theirs).split(" ")
    for _ in range(rng.randint(0, 4)):
        words[rng.randrange(len(words))] = rng.choice(["Rex", "the", "is", "", "negative.", "5"])
    return " ".join(ours), " ".join(words)


PAIRS = [mixed(seed) for seed in range(300)] + [(s, s) for s in SENTENCES] + [
    (a, b) for a in SENTENCES for b in SENTENCES[:4]]


def test_bleu_equals_sacrebleu():
    """Sentence BLEU-4 without smoothing, for texts, entities, numbers, punctuation, nothing, and
    real chains beside their neighbours."""
    pairs = [("", ""), ("", "a b c d"), ("a b c d", ""), (" \n", "a b c d e"), *PAIRS]
    pairs += [("a b c d \n", "a b c d"), ("a & b <c> \"", "a &amp; b &lt;c&gt; &quot;")]
    values = []
    for ours, theirs in pairs + neighbours():
        true = sacrebleu.sentence_bleu(ours, [theirs], smooth_method="none",
                                       use_effective_order=False).score / 100
        values.append(bleu4(ours, theirs))
        assert values[-1] == pytest.approx(true, abs=1e-6), (ours, theirs)
    assert max(values) == pytest.approx(1) and min(values) == 0
    assert sum(0.01 < v < 0.99 for v in values) > 100


def mixed_words(seed):
    """Two short texts over few words, so that common subsequences tie."""
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(["a", "b", "c", "d.", "e ."], k=rng.randint(1, 12)))
    return text(), text()


def test_rouge_equals_rouge():
    """ROUGE-L F of the package the authors use, with ties and several sentences; real chains; 0
    where the package raises."""
    judge, values = Rouge(metrics=["rouge-l"]), []
    pairs = PAIRS + [mixed_words(seed) for seed in range(300)] + neighbours()
    for ours, theirs in (p for p in pairs if all(text.strip(".") for text in p)):
        true = judge.get_scores(ours, theirs)[0]["rouge-l"]["f"]
        values.append(rouge_l(ours, theirs))
        assert values[-1] == pytest.approx(true, abs=1e-6), (ours, theirs)
    assert sum(0.01 < v < 0.99 for v in values) > 300
    for ours, theirs in (("", "a"), ("a", ""), ("", ""), ("..", "a"), ("a", "..")):
        assert rouge_l(ours, theirs) == 0.0


@pytest.mark.parametrize("texts, n, value", [
    (["a b a", "c"], 1, (2 / 3 + 1) / 2), (["a b a b", "c d"], 2, (2 / 3 + 1) / 2),
    (["A a"], 1, 0.5), (["c"], 2, 0.0), (["", "a"], 1, 0.5), ([], 1, 0.0),
    (["So, so, so."], 1, 3 / 6),  # so , so , so .
    (["It's it's"], 1, 2 / 4), (["It's it's"], 2, 2 / 3),  # it 's it 's
    (["cannot (cannot)"], 1, 4 / 6)])  # can not ( can not )
def test_distinct_by_hand(texts, n, value):
    """A mean over texts of Treebank tokens; case does not matter; too short a text scores 0."""
    assert distinct_n(texts, n) == pytest.approx(value)


# ---- labels and scores


def random_labels(n, seed, labels=LABELS, nones=0.15):
    """Random gold and predicted labels, right more often than not, some predictions None."""
    rng = random.Random(seed)
    gold = [rng.choice(labels) for _ in range(n)]
    predicted = [g if rng.random() < 0.5 else rng.choice(LABELS) for g in gold]
    return gold, [None if rng.random() < nones else p for p in predicted]


SIZES = ((1, 0), (2, 1), (7, 2), (50, 3), (400, 4), (1037, 5))
CASES = [random_labels(n, seed) for n, seed in SIZES] + [
    random_labels(40, 6, ("neutral",)), random_labels(40, 7, ("negative", "positive")),
    random_labels(60, 8, nones=0.0), random_labels(30, 9, nones=1.0),
    (["positive"] * 3, ["negative"] * 3), (["neutral"], [None]),
    (list(LABELS), list(LABELS)), (list(LABELS), ["neutral"] * 3)]


@pytest.mark.parametrize("gold, predicted", CASES)
def test_classification_equals_sklearn(gold, predicted):
    """Accuracy, both F1, every class and the confusion table, also in degenerate cases."""
    ours = classification_metrics(gold, predicted)
    names = [x or "unparsed" for x in predicted]
    p, r, f, n = sk.precision_recall_fscore_support(gold, names, labels=LABELS, zero_division=0)
    close = lambda x: pytest.approx(x, abs=1e-9)
    for i, label in enumerate(LABELS):
        theirs = dict(precision=p[i], recall=r[i], f1=f[i], support=n[i])
        assert ours["per_class"][label] == {k: close(v) for k, v in theirs.items()}
    for average in ("macro", "weighted"):
        f1 = sk.f1_score(gold, names, labels=LABELS, average=average, zero_division=0)
        assert ours[f"{average}_f1"] == close(f1)
    assert ours["accuracy"] == close(sk.accuracy_score(gold, names))
    table = sk.confusion_matrix(gold, names, labels=[*LABELS, "unparsed"])
    assert ours["confusion"] == table[:3].tolist()
    assert (ours["n"], ours["unparsed"]) == (len(gold), predicted.count(None))


def mmsa(gold, predicted):
    """MMSA's metricsTop, as published, for arrays without gaps."""
    def accuracy(edge):
        rounded = [np.round(np.clip(x, -edge, edge)) for x in (predicted, gold)]
        return np.sum(rounded[0] == rounded[1]) / float(len(gold))

    kept = gold != 0
    return dict(
        mae=np.mean(np.absolute(predicted - gold)), corr=np.corrcoef(predicted, gold)[0][1],
        acc7=accuracy(3.0), acc5=accuracy(2.0),
        acc2_has0=sk.accuracy_score(predicted >= 0, gold >= 0),
        f1_has0=sk.f1_score(gold >= 0, predicted >= 0, average="weighted"),
        acc2_non0=sk.accuracy_score(predicted[kept] > 0, gold[kept] > 0),
        f1_non0=sk.f1_score(gold[kept] > 0, predicted[kept] > 0, average="weighted"))


@pytest.mark.parametrize("seed", range(12))
def test_regression_equals_mmsa(seed):
    """Halves that round to even, zeros, answers beyond ±3."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(-6, 7, 3 + 20 * seed) / 2
    gold[:2] = 0, 1.5
    predicted = np.round(gold + rng.normal(0, 1.5, len(gold)), seed % 3)
    got = regression_metrics(gold.tolist(), predicted.tolist())
    true = mmsa(gold, predicted)
    assert {k: got[k] for k in true} == pytest.approx(true, abs=1e-9)
    assert (got["unparsed"], got["out_of_range"]) == (0, (abs(predicted) > 3).sum())


def test_no_answer_is_wrong():
    """None and nan are wrong in every accuracy and F1; MAE and r are of those who answered."""
    gold, predicted = [1.0, -2.0, 0.0, 2.0], [1.0, None, float("nan"), 4.0]
    got = regression_metrics(gold, predicted)
    assert (got["unparsed"], got["out_of_range"]) == (2, 1)
    assert got["mae"] == 1.0 and got["corr"] == pytest.approx(1)
    assert (got["acc7"], got["acc5"], got["acc2_has0"]) == (0.25, 0.5, 0.5)
    assert got["acc2_non0"] == pytest.approx(2 / 3)
    true = sk.f1_score([str(g >= 0) for g in gold], ["True", "none", "none", "True"],
                       average="weighted", zero_division=0)
    assert got["f1_has0"] == pytest.approx(true)


def test_scores_that_are_not_defined():
    """No answer at all, or a constant one: no MAE, no r, and valid JSON."""
    nothing, constant = regression_metrics([1.0], [None]), regression_metrics([1.0, 2.0], [3, 3])
    assert nothing["mae"] is nothing["corr"] is constant["corr"] is None
    assert constant["mae"] == 1.5
    json.dumps([nothing, constant, regression_metrics([0.0], [0.5])], allow_nan=False)


def test_calibration_by_hand():
    """Two bins; the surest answer is wrong, so risk starts at 1. A curve has at most 101 points."""
    probs = [[0.9, 0.05, 0.05], [0.1, 0.62, 0.28], [0.2, 0.2, 0.6], [0.3, 0.1, 0.6]]
    got = calibration_metrics(["neutral", "neutral", "positive", "negative"], probs, bins=10)
    assert got["ece"] == pytest.approx((2 * abs(0.6 - 0.5) + abs(0.62 - 1) + abs(0.9 - 0)) / 4)
    assert got["reliability"] == [pytest.approx([0.6, 0.5, 2]), pytest.approx([0.62, 1, 1]),
                                  pytest.approx([0.9, 0, 1])]
    assert got["risk_coverage"] == [pytest.approx(x) for x in (
        [0.25, 1], [0.5, 0.5], [0.75, 0.5], [1, 0.5])]  # the tie at 0.6 counts as half wrong each
    assert got["aurc"] == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    edge = calibration_metrics(["negative"] * 3, [[0.5, 0.5, 0], [0.6, 0.4, 0], [1, 0, 0]], bins=4)
    assert [count for *_, count in edge["reliability"]] == [1, 1, 1]  # 0.5 ends a bin, as does 1
    spread = [[c, 1 - c, 0] for c in np.arange(7.5, 15) / 15]  # a post in each of 8 of 15 bins
    assert len(calibration_metrics(["neutral"] * 8, spread)["reliability"]) == 8
    many = calibration_metrics(["neutral"] * 3000, [[0.2, 0.6, 0.2]] * 3000)["risk_coverage"]
    assert len(many) == 101 and many[0] == [1 / 3000, 0] and many[-1] == [1, 0]


# ---- chance


def guesses(n, seed, right):
    rng = random.Random(seed)
    gold = [LABELS[i % 3] for i in range(n)]
    return gold, [g if rng.random() < right else rng.choice((*LABELS, None)) for g in gold]


def test_intervals_equal_a_plain_bootstrap():
    """Percentiles of accuracy, F1 and a mean with gaps as from posts drawn one by one."""
    gold, predicted = guesses(150, 1, 0.6)
    rng = np.random.default_rng(1)
    extra = np.array([np.nan if i % 3 else i / 150 for i in range(150)])
    samples, plain = bootstrap(gold, predicted, {"extra": extra}), []
    got = intervals(samples)
    for _ in range(1000):
        pick = rng.integers(150, size=150)
        m = classification_metrics([gold[i] for i in pick], [predicted[i] for i in pick])
        plain.append((m["accuracy"], m["macro_f1"], m["weighted_f1"],
                      np.nanmean(extra[pick])))
    for name, values in zip(("accuracy", "macro_f1", "weighted_f1", "extra"), zip(*plain)):
        assert got[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.02), name
        assert got[name] == pytest.approx(np.percentile(samples[name], [2.5, 97.5])), name
    one = np.array([0.7] + [np.nan] * 149)
    alone = intervals(bootstrap(gold, predicted, {"one": one}))["one"]
    assert alone == pytest.approx([0.7, 0.7])  # draws without that post say nothing


def setting(gold, *runs):
    """(metrics, samples) of one run's predictions, or of several seeds'."""
    return group_seeds([(classification_metrics(gold, predicted),
                         bootstrap(gold, predicted, {})) for predicted in runs])


def test_paired_bootstrap():
    """The same answers: p = 1. Better on the same posts: small. The posts are drawn in pairs, so
    a gain on 8 posts of 200 is seen although each interval covers both runs."""
    gold, predicted = guesses(200, 2, 0.5)
    wrong = [i for i, (g, p) in enumerate(zip(gold, predicted)) if g != p]
    better = [g if i in wrong[:8] else p for i, (g, p) in enumerate(zip(gold, predicted))]
    a, b = setting(gold, predicted), setting(gold, better)
    assert p_value(a, a, "accuracy") == 1
    assert p_value(b, a, "accuracy") == p_value(a, b, "accuracy") < 0.02
    low, high = intervals(a[1])["accuracy"]
    assert low < sum(g == p for g, p in zip(gold, better)) / 200 < high


def test_p_is_fair():
    """Of runs that are equally good, about one in twenty differs with p < 0.05."""
    small = 0
    for seed in range(60):
        gold, one = guesses(90, seed, 0.6)
        _, two = guesses(90, seed + 1000, 0.6)
        small += p_value(setting(gold, one), setting(gold, two), "accuracy") < 0.05
    assert small <= 9


@pytest.mark.parametrize("seeds", [([0.70, 0.71, 0.75], [0.60, 0.66, 0.68]), ([1, 2], [5, 5.5, 9]),
                                   ([0.1, 0.2, 0.3, 0.4], [0.3, 0.31]), ([1, 2], [1, 2])])
def test_welch_equals_scipy(seeds):
    """Where the posts add no variance: two means and one mean's interval, with 1 to 5 degrees of
    freedom; with the posts' variance alone the normal distribution."""
    a, b = seeds
    p, margin = welch(np.mean(a) - np.mean(b), seeds, 0)
    theirs = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert p == pytest.approx(theirs.pvalue, abs=1e-4)
    assert margin == pytest.approx(np.ptp(theirs.confidence_interval(0.95)) / 2, rel=1e-3)
    _, margin = welch(np.mean(a), [a], 0)
    theirs = scipy.stats.t.ppf(0.975, len(a) - 1) * np.std(a, ddof=1) / len(a) ** 0.5
    assert margin == pytest.approx(theirs, rel=1e-3)
    p, margin = welch(0.3, [[0.5, 0.5], [0.2, 0.2]], 0.01)
    assert p == pytest.approx(2 * scipy.stats.norm.sf(3), abs=1e-4)
    assert margin == pytest.approx(0.196, abs=1e-3)


def test_welch_by_hand():
    """Variances of the means 0.0004 and 0.0009, of the posts 0.0012: deviation 0.05, and
    0.0025² / (0.0004² / 1 + 0.0009² / 1) = 6.44 degrees of freedom."""
    half_a, half_b = 0.02, 0.03  # two seeds, so far on either side of their mean
    seeds = [[0.7 - half_a, 0.7 + half_a], [0.6 - half_b, 0.6 + half_b]]
    p, margin = welch(0.1, seeds, 0.0012)
    df = 0.0025**2 / (0.0004**2 + 0.0009**2)
    assert p == pytest.approx(2 * scipy.stats.t.sf(0.1 / 0.05, df), abs=1e-4)
    assert margin == pytest.approx(0.05 * scipy.stats.t.ppf(0.975, df), rel=1e-3)
    assert welch(0.1, [[1, 1], [0.9, 0.9]], 0) == (0, 0) and welch(0.0, [[1, 1]], 0) == (1, 0)


@pytest.mark.parametrize("deviation", [0, 0.036, 0.10])
def test_p_and_interval_over_seeds_are_fair(deviation):
    """Two settings drawn from one distribution, three seeds each, 300 posts, accuracy near 0.7:
    p < 0.05 in at most 7 of 100 worlds, and one setting's interval holds its true accuracy over
    seeds and posts in at least 92. The posts' variance is a bootstrap's in the limit of many
    samples, that of the mean."""
    rng = np.random.default_rng(1)
    worlds, posts, small, covered = 3000, 300, 0, 0
    draw_easiness = lambda *shape: 0.45 + 0.5 * rng.random(shape)
    draw_shift = lambda *shape: deviation * rng.normal(size=shape)
    truth = np.clip(draw_easiness(400_000) + draw_shift(400_000), 0, 1).mean()
    for _ in range(worlds):
        chance = draw_easiness(posts) + draw_shift(2, 3, 1)  # (settings, seeds, posts)
        right = rng.random((2, 3, posts)) < chance
        seeds = right.mean(2)
        of_posts = right.mean(1)  # (settings, posts)
        p, _ = welch(seeds[0].mean() - seeds[1].mean(), seeds,
                     (of_posts[0] - of_posts[1]).var() / posts)
        small += p < 0.05
        _, margin = welch(seeds[0].mean(), seeds[:1], of_posts[0].var() / posts)
        covered += abs(seeds[0].mean() - truth) <= margin
    assert small / worlds <= 0.07 and covered / worlds >= 0.92


def test_p_of_seeds():
    """Welch's on the seeds and the posts' samples; none of one run against several; bold and
    --baseline ask the same function."""
    gold, one = guesses(300, 3, 0.8)
    _, two = guesses(300, 4, 0.75)
    _, three = guesses(300, 5, 0.3)
    a, b = setting(gold, one, two), setting(gold, two, three)
    alone = setting(gold, one)
    assert p_value(a, alone, "accuracy") is p_value(alone, a, "accuracy") is None
    drawn = [bootstrap(gold, run, {})["accuracy"] for run in (one, two, three)]
    right = [np.mean([g == p for g, p in zip(gold, run)]) for run in (one, two, three)]
    variance = ((drawn[0] + drawn[1]) / 2 - (drawn[1] + drawn[2]) / 2).var()
    p, _ = welch((right[0] - right[2]) / 2, [right[:2], right[1:]], variance)
    assert p_value(a, b, "accuracy") == pytest.approx(p) and 0.05 < p < 0.8


def test_seeds_are_grouped():
    """The interval knows seeds are few, and stays within [0, 1]."""
    gold, one = guesses(300, 3, 0.9)
    _, two = guesses(300, 4, 0.3)
    both, _ = setting(gold, one, two)
    assert both["n"] == 300 and both["seeds"][0] == classification_metrics(gold, one)
    assert both["intervals"]["accuracy"] == [0, 1]  # two seeds far apart say next to nothing
    close, samples = setting(gold, one, one[:150] + two[150:160] + one[160:])
    values = [seed["accuracy"] for seed in close["seeds"]]
    _, margin = welch(close["accuracy"], [values], samples["accuracy"].var())
    assert close["intervals"]["accuracy"] == pytest.approx(
        [close["accuracy"] - margin, close["accuracy"] + margin])
    assert "seeds" not in setting(gold, one)[0]
    runs = [(dict(corr=value, source="student"), {}) for value in (0.9, None)]
    metrics, _ = group_seeds(runs)  # the first one's number must not stand for both
    assert metrics["corr"] is None and metrics["source"] == "student"
