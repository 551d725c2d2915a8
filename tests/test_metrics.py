"""METEOR, BLEU, ROUGE and Sim equal to the libraries; scores, intervals, calibration by hand; the
table of several runs and what it says in words."""

import functools
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
import torch
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.stem import PorterStemmer
from nltk.tokenize import TreebankWordTokenizer
from nltk.translate.meteor_score import single_meteor_score

import eval as scores
from eval import (
    bootstrap, calibration_metrics, diagnose, group_seeds, intervals,
    lcs, load_embedder, meteor, names_only, p_value, read_wordnet, regression_metrics, stem,
    treebank_tokens, welch)
from mulcot import FIELDS, LABELS, InputError, parse_reasoning, render_reasoning

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
PAIRS = [pair(seed) for seed in range(200)] + ODD


def real_chains(folder, n):
    rows = json.loads((folder / "dev_chains.json").read_text(encoding="utf-8"))[:n]
    return [row["cot"] for row in rows]


# ---- METEOR


def test_tokens_equal_nltk():
    """Penn Treebank tokens of random punctuation, contractions, spaces of all kinds."""
    theirs, rng = TreebankWordTokenizer(), random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 14))) for _ in range(4000)]
    for text in texts + ["a.\x1c", "a.\x85 "]:  # nltk's regular expressions see no space in \x1c
        assert treebank_tokens(text) == theirs.tokenize(text.lower()), repr(text)


def test_stems_equal_nltk():
    """Porter with nltk's extensions, on made-up words and on nltk's irregular ones."""
    theirs = PorterStemmer()
    words = words_of(random.Random(1), 20000) + [*theirs.pool, "yyyyying", "xyying", "toyed",
                                                 "flies", "dies", "died", "spied", "ies", "ied",
                                                 "ieds", "ss", "as", "geologi", "employee"]
    assert [w for w in words if stem(w) != theirs.stem(w)] == []
    assert len({stem(w) for w in words}) > 5000


def test_real_chains_have_nltk_tokens_and_stems(twitter):
    """The same on what teachers write."""
    tokens, stems = TreebankWordTokenizer(), PorterStemmer()
    texts = real_chains(twitter, 150)
    assert [t for t in texts if treebank_tokens(t) != tokens.tokenize(t.lower())] == []
    words = {w for t in texts for w in treebank_tokens(t)}
    assert len(words) > 1000 and [w for w in words if stem(w) != stems.stem(w)] == []


def nltk_meteor(ours, theirs, wordnet):
    tokens = TreebankWordTokenizer().tokenize
    return single_meteor_score(tokens(theirs.lower()), tokens(ours.lower()), wordnet=wordnet)


NO_SYNONYMS = SimpleNamespace(synsets=lambda word: [])


def test_meteor_equals_nltk():
    """Exact and Porter stages, for random, odd and empty texts."""
    values = []
    for ours, theirs in PAIRS:
        values.append(meteor(ours, theirs))
        assert values[-1] == pytest.approx(nltk_meteor(ours, theirs, NO_SYNONYMS), abs=1e-9)
    assert sum(0.05 < v < 0.95 for v in values) > 100 and min(values) == 0


@pytest.mark.parametrize("ours, theirs, value", [
    ("a b c", "a b c", 1 - 0.5 * (1 / 3) ** 3), ("a b c d", "c d a b", 1 - 0.5 * (2 / 4) ** 3),
    ("a x", "a", 0.5 / (0.9 * 0.5 + 0.1) * 0.5), ("dogs", "dog", 0.5), ("a", "b", 0.0)])
def test_meteor_by_hand(ours, theirs, value):
    """Chunks, the mean that favours recall, stems."""
    assert meteor(ours, theirs) == pytest.approx(value)


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
    for ours, theirs in PAIRS + [*zip(texts, texts[1:]), several]:
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
    texts = real_chains(twitter, 30)[:30]
    words = {w + end for t in texts for w in treebank_tokens(t) for end in ("", "s", "er")}
    assert len(words) > 2000
    assert [w for w in words if ours(w) != nltk_synonyms(reader, w)] == []
    for a, b in zip(texts, texts[15:]):
        value = meteor(a, b, folder)
        assert value == pytest.approx(nltk_meteor(a, b, reader), abs=1e-9) and value > meteor(a, b)


def test_missing_wordnet(tmp_path):
    """A folder without the files says which one, and where to get them."""
    with pytest.raises(InputError, match="data.noun.*wordnet-base"):
        meteor("a", "b", tmp_path)


# ---- BLEU, ROUGE, Distinct


@pytest.mark.parametrize("letters, longest", [("ab", 9), ("abcd", 30), ("abcdefghijkl", 90)])
def test_lcs_is_longest(letters, longest):
    """No common subsequence is longer (as by recursion), and the words found are in one."""
    rng = random.Random(longest)
    for _ in range(60):
        x, y = (rng.choices(letters, k=rng.randint(1, longest)) for _ in range(2))

        @functools.cache
        def longest_of(i, j):
            if not i or not j:
                return 0
            if x[i - 1] == y[j - 1]:
                return longest_of(i - 1, j - 1) + 1
            return max(longest_of(i - 1, j), longest_of(i, j - 1))

        length, words = lcs(x, y)
        assert length == longest_of(len(x), len(y)) >= len(words)
        assert words <= set(x) & set(y)


# ---- Sim


@pytest.fixture(scope="session")
def embedder(tmp_path_factory):
    """A random tiny BERT with a word-piece tokenizer, in a folder like all-MiniLM-L6-v2's."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the dog runs ##s happy glad big a b . ,".split()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2,
                         num_attention_heads=2, intermediate_size=64, initializer_range=0.5,
                         max_position_embeddings=256)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    kinds = dict(enumerate(("Transformer", "Pooling")))
    modules = [dict(idx=i, name=str(i), path="1_Pooling" * i,
                    type=f"sentence_transformers.models.{kind}") for i, kind in kinds.items()]
    for name, content in (
            ("modules.json", modules), ("sentence_bert_config.json", dict(max_seq_length=256)),
            ("1_Pooling/config.json", dict(word_embedding_dimension=32,
                                           pooling_mode_mean_tokens=True))):
        (folder / name).write_text(json.dumps(content))
    return folder


def lines_of_words(seed, n):
    return " ".join(random.Random(seed).choices(["the", "dog", "runs", "happy", "big", "zzz", "."],
                                                k=n))


SIM_PAIRS = [(lines_of_words(i, n), lines_of_words(-i - 1, m)) for i, (n, m) in enumerate(
    ((3, 5), (40, 1), (254, 254), (255, 300), (700, 10), (520, 800), (1, 1), (9, 254)))]


def plain_vector(folder, text):
    """The mean over the last hidden states of [CLS], the first 254 pieces, [SEP]."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))[:254]
    with torch.no_grad():
        return model.eval()(torch.tensor([[2, *ids, 3]])).last_hidden_state[0].mean(0)


def test_sim_equals_plain_mean_pooling(embedder):
    """Also of texts longer than 256 pieces; an empty prediction scores 0."""
    similarity = load_embedder(str(embedder))
    for ours, theirs in SIM_PAIRS:
        a, b = plain_vector(embedder, ours), plain_vector(embedder, theirs)
        true = torch.cosine_similarity(a, b, 0).item()
        assert similarity(ours, theirs) == pytest.approx(true, abs=1e-5)
    assert similarity("", "the dog") == 0 and similarity("the dog", "the dog") == pytest.approx(1)


def test_sim_equals_sentence_transformers(embedder):
    """Where that library is installed."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(embedder), device="cpu")
    a, b = (model.encode(list(texts), convert_to_tensor=True) for texts in zip(*SIM_PAIRS))
    similarity = load_embedder(str(embedder))
    ours = [similarity(*pair) for pair in SIM_PAIRS]
    assert ours == pytest.approx(torch.cosine_similarity(a, b).numpy(), abs=1e-5)


# ---- scores


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


# ---- calibration


def test_calibration_by_hand():
    """Two bins; the surest answer is wrong, so risk starts at 1."""
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


def test_calibration_of_many():
    """At most 101 points, from the surest post to all; the order of the rows does not matter."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1, 1, 1], 3000).round(2)
    gold = [LABELS[rng.choice(3, p=p / p.sum())] for p in probs]
    got = calibration_metrics(gold, probs.tolist())
    back = calibration_metrics(gold[::-1], probs[::-1].tolist())
    assert got["ece"] == pytest.approx(back["ece"]) and got["aurc"] == pytest.approx(back["aurc"])
    assert got["ece"] < 0.03 and len(got["risk_coverage"]) == 101
    assert got["risk_coverage"][0][0] == 1 / 3000 and got["risk_coverage"][-1][0] == 1
    wrong = np.mean([LABELS[p.argmax()] != g for p, g in zip(probs, gold)])
    assert got["risk_coverage"][-1][1] == pytest.approx(wrong)
    assert sum(count for *_, count in got["reliability"]) == 3000
    json.dumps(got)


# ---- chance


def random_labels(n, seed, right):
    rng = random.Random(seed)
    gold = [LABELS[i % 3] for i in range(n)]
    return gold, [g if rng.random() < right else rng.choice((*LABELS, None)) for g in gold]


def test_intervals_equal_a_plain_bootstrap():
    """Percentiles of accuracy, F1 and a mean with gaps as from posts drawn one by one."""
    gold, predicted = random_labels(150, 1, 0.6)
    rng = np.random.default_rng(1)
    extra = np.array([np.nan if i % 3 else i / 150 for i in range(150)])
    got, plain = intervals(bootstrap(gold, predicted, {"extra": extra})), []
    for _ in range(1000):
        pick = rng.integers(150, size=150)
        m = scores.classification_metrics([gold[i] for i in pick], [predicted[i] for i in pick])
        plain.append((m["accuracy"], m["macro_f1"], m["weighted_f1"],
                      np.nanmean(extra[pick])))
    for name, values in zip(("accuracy", "macro_f1", "weighted_f1", "extra"), zip(*plain)):
        assert got[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.02), name
    one = np.array([0.7] + [np.nan] * 149)
    alone = intervals(bootstrap(gold, predicted, {"one": one}))["one"]
    assert alone == pytest.approx([0.7, 0.7])  # draws without that post say nothing


def setting(gold, *runs):
    """(metrics, samples) of one run's predictions, or of several seeds'."""
    return group_seeds([(scores.classification_metrics(gold, predicted),
                         bootstrap(gold, predicted, {})) for predicted in runs])


def test_paired_bootstrap():
    """The same answers: p = 1. Better on the same posts: small. The posts are drawn in pairs, so
    a gain on 8 posts of 200 is seen although each interval covers both runs."""
    gold, predicted = random_labels(200, 2, 0.5)
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
        gold, one = random_labels(90, seed, 0.6)
        _, two = random_labels(90, seed + 1000, 0.6)
        small += p_value(setting(gold, one), setting(gold, two), "accuracy") < 0.05
    assert small <= 9


@pytest.mark.parametrize("seeds", [([0.70, 0.71, 0.75], [0.60, 0.66, 0.68]), ([1, 2], [5, 5.5, 9]),
                                   ([0.1, 0.2, 0.3, 0.4], [0.3, 0.3]), ([1, 2], [1, 2])])
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
    print(f"deviation {deviation}: p < .05 in {small / worlds:.3f}, coverage {covered / worlds:.3f}")
    assert small / worlds <= 0.07 and covered / worlds >= 0.92


def test_p_of_seeds():
    """Welch's on the seeds and the posts' samples; none of one run against several; bold and
    --baseline ask the same function."""
    gold, one = random_labels(300, 3, 0.8)
    _, two = random_labels(300, 4, 0.75)
    _, three = random_labels(300, 5, 0.3)
    a, b = setting(gold, one, two), setting(gold, two, three)
    assert p_value(a, setting(gold, one), "accuracy") is None
    assert p_value(setting(gold, one), a, "accuracy") is None
    drawn = [bootstrap(gold, run, {})["accuracy"] for run in (one, two, three)]
    right = [np.mean([g == p for g, p in zip(gold, run)]) for run in (one, two, three)]
    variance = ((drawn[0] + drawn[1]) / 2 - (drawn[1] + drawn[2]) / 2).var()
    p, _ = welch((right[0] - right[2]) / 2, [right[:2], right[1:]], variance)
    assert p_value(a, b, "accuracy") == pytest.approx(p) and 0.05 < p < 0.8


def test_seeds_are_grouped():
    """Means and sample deviations; the interval knows seeds are few, and stays within [0, 1]."""
    gold, one = random_labels(300, 3, 0.9)
    _, two = random_labels(300, 4, 0.3)
    both, samples = setting(gold, one, two)
    seeds = both["seeds"]
    values = [seed["accuracy"] for seed in seeds]
    assert both["accuracy"] == pytest.approx(np.mean(values))
    assert both["deviation"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert both["n"] == 300 and seeds[0] == scores.classification_metrics(gold, one)
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


# ---- chains


def chain(label, conclusion=None, words="one two three four five"):
    fields = {k: f"{k[:4]} {words}" for k in FIELDS}
    fields["Final_conclusion"] = conclusion or f"So it is {label}."
    return render_reasoning(fields | {"Prediction": label})


@pytest.mark.parametrize("conclusion, alone", [
    ("It is positive.", True), ("It is POSITIVE, truly positive", True), ("It is good.", False),
    ("positive, not negative", False), ("positively great", False), ("neutral", False)])
def test_conclusion_names_the_label_alone(conclusion, alone):
    """Words, not parts of words; a second label spoils it."""
    assert names_only(parse_reasoning(chain("positive", conclusion)), "positive") is alone


# ---- the program


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def gold(tmp_path):
    """60 labelled test posts with chains; the second half label-conditioned."""
    return write(tmp_path / "gold.jsonl", [
        dict(id=f"p{i}", text=f"text {i}", label=LABELS[i % 3], split="test", score=i % 3 - 1,
             stage=1 + i // 30, cot=chain(LABELS[i % 3])) for i in range(60)])


def predictions(path, wrong, **more):
    """Predictions that miss the first `wrong` posts."""
    label = lambda i: LABELS[(i + (i < wrong)) % 3]
    return write(path, [dict(id=f"p{i}", prediction=label(i)) | {
        k: v(i) if callable(v) else v for k, v in more.items()} for i in range(60)])


def evaluate(gold, *files, more=()):
    """(exit code, metrics.json, table.md)"""
    out = gold.parent / "out"
    code = scores.main([*map(str, files), "--gold", str(gold), "--out", str(out), *more])
    if code:
        return code, None, None
    return code, json.loads((out / "metrics.json").read_text()), (out / "table.md").read_text()


def cells(markdown):
    """{run: its row's cells} of table.md."""
    rows = [line.strip("| ").split("|") for line in markdown.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row] for row in rows}


def test_best_is_bold_only_if_significant(gold, tmp_path, capsys):
    """40 wrong against 5: bold, in the terminal as in table.md. 6 against 5: not."""
    five, six, forty = (predictions(tmp_path / f"{n}.jsonl", n) for n in (5, 6, 40))
    _, _, markdown = evaluate(gold, f"a={forty}", f"b={five}")
    assert cells(markdown)["b"][2].startswith("**0.917** 0.8")
    assert "**0.917**" in capsys.readouterr().out
    _, _, markdown = evaluate(gold, f"a={six}", f"b={five}")
    assert "**" not in markdown and "**" not in capsys.readouterr().out


def test_seeds_share_a_name(gold, tmp_path, capsys):
    """Files of one name become one row, mean ± deviation, with each run kept in metrics.json."""
    files = [predictions(tmp_path / f"{n}.jsonl", n) for n in (6, 12, 3)]
    _, metrics, markdown = evaluate(gold, f"x/a={files[0]}", f"x/a={files[1]}", f"x/b={files[2]}")
    a = metrics["x/a"]
    assert a["accuracy"] == pytest.approx(0.85) and len(a["seeds"]) == 2
    assert a["deviation"]["accuracy"] == pytest.approx(0.1 / 2**0.5)
    assert "0.850 ± 0.071" in markdown and "0.850 ± 0.071" in capsys.readouterr().out
    assert "deviation" not in metrics["x/b"]


def test_file_with_an_equals_sign(gold, tmp_path):
    """lr=0.1.jsonl needs a NAME= before it."""
    path = predictions(tmp_path / "lr=0.1.jsonl", 3)
    assert "low" in evaluate(gold, f"low={path}")[1]


def test_all_runs_are_judged_on_the_same_posts(gold, tmp_path):
    """A run that lacks half of them is wrong on these."""
    whole = predictions(tmp_path / "a.jsonl", 0)
    half = write(tmp_path / "b.jsonl", [dict(id=f"p{i}", prediction=LABELS[i % 3])
                                        for i in range(30)])
    _, metrics, _ = evaluate(gold, whole, half)
    assert metrics["b"]["n"] == 60 and metrics["b"]["accuracy"] == 0.5


def test_columns(gold, tmp_path, embedder, capsys):
    """The terminal shows as many as fit into 100 characters, floors beside their numbers; table.md
    has all of them."""
    raw = lambda i: chain(LABELS[i % 3]) if i % 2 else None
    probs = [1 / 3] * 3
    files = [f"shuffled_images={predictions(tmp_path / 's.jsonl', 9, raw=raw, probs=probs)}",
             f"assistant={predictions(tmp_path / 'a.jsonl', 5, raw=raw, probs=probs)}"]
    _, metrics, markdown = evaluate(gold, *files, more=["--embedder", str(embedder)])
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if line.startswith("|")) <= 100
    assert cells(printed)["run"] == ["run", "n", "accuracy, 95 %", "macro F1", "parsed",
                                     "chain=label", "METEOR", "ROUGE-L"]
    table = cells(markdown)
    assert {"weighted F1", "unparsed", "ECE", "AURC", "BLEU-4", "Sim"} < set(table["run"])
    value, floor = (metrics["assistant"][name] for name in ("meteor", "meteor_floor"))
    assert floor < value and f"{value:.3f} ({floor:.3f})" in table["assistant"]


def test_faithfulness(gold, tmp_path):
    """Accuracy where chain and label agree and where not."""
    raw = lambda i: chain(LABELS[i % 3])  # the chain is right, the label of the first ten is not
    m = evaluate(gold, predictions(tmp_path / "s.jsonl", 10, raw=raw))[1]["s"]
    assert m["agreement"] == m["concludes"] == pytest.approx(50 / 60)
    assert (m["accuracy_agree"], m["accuracy_disagree"]) == (1, 0)
    half = predictions(tmp_path / "h.jsonl", 10, raw=lambda i: chain(LABELS[(i + (i < 30)) % 3]))
    m = evaluate(gold, half)[1]["h"]  # ten agree and are wrong, 20 do not, 30 agree
    assert (m["accuracy_agree"], m["accuracy_disagree"]) == (pytest.approx(30 / 40), 1)
    assert 0.5 < m["intervals"]["accuracy_agree"][0] < 0.75
    all_agree = predictions(tmp_path / "r.jsonl", 0, raw=raw)
    assert "accuracy_disagree" not in evaluate(gold, all_agree)[1]["r"]


def test_a_lost_chain_is_an_empty_one(gold, tmp_path):
    """Half of the chains missing halve every score; they cannot be left out of the mean."""
    raw = lambda i: chain(LABELS[i % 3]) if i % 2 else None
    m = evaluate(gold, predictions(tmp_path / "s.jsonl", 0, raw=raw))[1]["s"]
    assert m["parse_rate"] == 0.5 and m["bleu4"] == 0.5 == pytest.approx(m["rouge_l"])


def test_probabilities(gold, tmp_path):
    """Rows with `probs` give calibration beside the labels."""
    path = predictions(tmp_path / "s.jsonl", 0, probs=lambda i: [float(k == i % 3) for k in range(3)])
    _, metrics, markdown = evaluate(gold, path)
    m = metrics["s"]
    assert m["ece"] == m["aurc"] == 0 and m["reliability"] == [[1, 1, 60]]
    assert "AURC" in markdown and "ece" not in metrics["majority"]


@pytest.mark.parametrize("score", ["good", True, [1]])
def test_bad_score(gold, tmp_path, capsys, score):
    assert evaluate(gold, predictions(tmp_path / "s.jsonl", 0, score=score))[0] == 2
    assert "s.jsonl:1" in capsys.readouterr().err


def test_sim_in_the_program(gold, tmp_path, embedder, capsys):
    """With an embedder a number and a signature; a wrong one is an error."""
    path = predictions(tmp_path / "s.jsonl", 0, raw=chain("positive"))
    m = evaluate(gold, path)[1]
    assert "sim" not in m["s"] and "sim" not in m["signatures"]
    m = evaluate(gold, path, more=["--embedder", str(embedder)])[1]
    assert 0 < m["s"]["sim"] <= 1 and embedder.name in m["signatures"]["sim"]
    assert evaluate(gold, path, more=["--embedder", str(tmp_path / "none")])[0] == 2
    assert "all-MiniLM-L6-v2" in capsys.readouterr().err


def test_signatures(gold, tmp_path, small_wordnet, capsys):
    """Every text metric has one, printed with it; METEOR's says whether synonyms count."""
    path = predictions(tmp_path / "s.jsonl", 0, raw=chain("positive"))
    _, metrics, markdown = evaluate(gold, path)
    printed = capsys.readouterr().out
    assert "WordNet: None" in metrics["signatures"]["meteor"]
    assert metrics["signatures"].keys() >= {"parse_rate", "bleu4", "meteor_floor", "rouge_l",
                                            "meteor", "distinct_1"}
    for text in metrics["signatures"].values():
        assert text in markdown and text in printed
    metrics = evaluate(gold, path, more=["--wordnet", str(small_wordnet)])[1]
    assert f"WordNet: {small_wordnet}" in metrics["signatures"]["meteor"]
    assert evaluate(gold, path, more=["--wordnet", str(tmp_path)])[0] == 2


# ---- the diagnosis

FINE = dict(accuracy=0.8, sim=0.9, meteor=0.5, meteor_floor=0.4, distinct_2=0.8,
            distinct_2_references=0.8, source="student")


@pytest.mark.parametrize("change, word", [
    (dict(sim=0.84), "prompts"), (dict(accuracy=0.74), "λ"),
    (dict(meteor=0.44), "ungrounded"), (dict(meteor_floor=0.46), "ungrounded")])
def test_diagnosis_of_a_student(change, word):
    """Each failure signature speaks when it applies, and alone."""
    runs = {"x/student": FINE | change, "x/assistant": FINE, "student": FINE}
    (line,) = diagnose(runs, {})
    assert word in line and line.startswith("x/student: ")


@pytest.mark.parametrize("runs", [
    {"student": FINE, "assistant": FINE | dict(accuracy=0.84)}, {"majority": dict(accuracy=0.3)},
    {"base/student": dict(accuracy=0.3, source="base"), "base/assistant": dict(accuracy=0.5)},
    {"blank_text": FINE | dict(accuracy=0.4), "assistant": FINE}, {"student": dict(mae=1.0)},
    {"student": FINE | dict(meteor=0.3, meteor_floor=0.24)},
    {"student": FINE | dict(meteor=0.4, distinct_2=0.7)}])
def test_no_false_diagnosis(runs):
    """Models before training, controls, chains above their floor, dull but honest ones."""
    assert diagnose(runs, dict(contradictions=0.05)) == []


def test_diagnosis_of_a_teacher():
    assert "noisy labels" in diagnose({}, dict(contradictions=0.06))[0]


def test_diagnosis_is_printed(gold, tmp_path, capsys):
    """Under the table, in metrics.json and in table.md."""
    bad, good = predictions(tmp_path / "b.jsonl", 9), predictions(tmp_path / "g.jsonl", 0)
    _, metrics, markdown = evaluate(gold, f"student={bad}", f"assistant={good}")
    (line,) = metrics["diagnosis"]
    assert "15.0 points below" in line and f"- diagnosis: {line}" in markdown
    assert f"- diagnosis: {line}" in capsys.readouterr().out
