"""Numbers equal to the trusted libraries' and honest counting."""

import html
import json
import random
import re

import numpy as np
import pytest
import sacrebleu
import sklearn.metrics as sk
from rouge import Rouge

import eval as scores
from eval import bleu4, chain_metrics, classification_metrics, distinct_n, rouge_l
from mulcot import FIELDS, LABELS, render_reasoning


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


def test_classification_by_hand():
    """Four posts on paper: one right of each polar label, one missed, one unparsed."""
    m = classification_metrics(["positive", "positive", "negative", "neutral"],
                               ["positive", "negative", "negative", None])
    assert (m["accuracy"], m["unparsed"]) == (0.5, 1)
    assert m["per_class"]["positive"] == dict(precision=1, recall=0.5, f1=pytest.approx(2 / 3),
                                              support=2)
    assert m["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert m["confusion"] == [[1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]]


@pytest.mark.parametrize("gold, predicted", [([], []), (["neutral"], [])])
def test_classification_needs_equal_lists(gold, predicted):
    """No posts, or lists of different lengths, are a broken invariant."""
    with pytest.raises(AssertionError):
        classification_metrics(gold, predicted)


# ---- text metrics

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
    """Sentence BLEU-4 without smoothing, for texts, entities, numbers, punctuation, nothing."""
    empty = [("", ""), ("", "a b c d"), ("a b c d", ""), (" \n", "a b c d e")]
    empty += [("a b c d \n", "a b c d"), ("a & b <c> \"", "a &amp; b &lt;c&gt; &quot;")]
    values = []
    for ours, theirs in PAIRS + empty:
        true = sacrebleu.sentence_bleu(ours, [theirs], smooth_method="none",
                                       use_effective_order=False).score / 100
        values.append(bleu4(ours, theirs))
        assert values[-1] == pytest.approx(true, abs=1e-6), (ours, theirs)
    assert max(values) == pytest.approx(1) and min(values) == 0
    assert sum(0.01 < v < 0.99 for v in values) > 100


def test_rouge_equals_rouge():
    """ROUGE-L F of the package the authors use, with ties and several sentences."""
    judge, values = Rouge(metrics=["rouge-l"]), []
    pairs = PAIRS + [mixed_words(seed) for seed in range(300)]
    for ours, theirs in (p for p in pairs if all(text.strip(".") for text in p)):
        true = judge.get_scores(ours, theirs)[0]["rouge-l"]["f"]
        values.append(rouge_l(ours, theirs))
        assert values[-1] == pytest.approx(true, abs=1e-6), (ours, theirs)
    assert sum(0.01 < v < 0.99 for v in values) > 300


def mixed_words(seed):
    """Two short texts over few words, so that common subsequences tie."""
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(["a", "b", "c", "d.", "e ."], k=rng.randint(1, 12)))
    return text(), text()


@pytest.mark.parametrize("ours, theirs", [("", "a"), ("a", ""), ("", ""), ("..", "a"), ("a", "..")])
def test_rouge_of_nothing(ours, theirs):
    """Where the package raises, we score 0."""
    assert rouge_l(ours, theirs) == 0.0


def test_real_chains_score_alike(twitter):
    """The first real chains against their neighbours: both libraries agree with us."""
    rows = json.loads((twitter / "dev_chains.json").read_text(encoding="utf-8"))[:25]
    judge = Rouge(metrics=["rouge-l"])
    for a, b in zip(rows, rows[1:]):
        bleu = sacrebleu.sentence_bleu(a["cot"], [b["cot"]], smooth_method="none",
                                       use_effective_order=False).score / 100
        assert bleu4(a["cot"], b["cot"]) == pytest.approx(bleu, abs=1e-6)
        f = judge.get_scores(a["cot"], b["cot"])[0]["rouge-l"]["f"]
        assert rouge_l(a["cot"], b["cot"]) == pytest.approx(f, abs=1e-6)


@pytest.mark.parametrize("texts, n, value", [
    (["a b a", "c"], 1, (2 / 3 + 1) / 2), (["a b a b", "c d"], 2, (2 / 3 + 1) / 2),
    (["A a"], 1, 0.5), (["c"], 2, 0.0), (["", "a"], 1, 0.5), ([], 1, 0.0),
    (["So, so, so."], 1, 3 / 6),  # so , so , so .
    (["It's it's"], 1, 2 / 4), (["It's it's"], 2, 2 / 3),  # it 's it 's
    (["cannot (cannot)"], 1, 4 / 6)])  # can not ( can not )
def test_distinct_by_hand(texts, n, value):
    """A mean over texts of Treebank tokens; case does not matter; too short a text scores 0."""
    assert distinct_n(texts, n) == pytest.approx(value)


# ---- chains


def chain(label, words="one two three four five"):
    return render_reasoning({k: f"{k[:4]} {words}" for k in FIELDS} | {"Prediction": label})


def test_chains_are_compared_as_they_came():
    """Names, quotes and form count; an unparsed chain is a text as any other; a missing one is
    empty, scores 0 and counts in every mean."""
    whole, broken = chain("positive"), chain("positive").replace("Image_analysis", "Picture")
    rows = [dict(raw=whole), dict(raw=broken), {}]
    m, values = chain_metrics(rows, [whole] * 3)
    assert (m["parse_rate"], m["referenced"]) == (pytest.approx(1 / 3), 3)
    for name, of_pair in (("bleu4", bleu4), ("rouge_l", rouge_l), ("meteor", scores.meteor)):
        assert values[name].tolist() == [of_pair(whole, whole), of_pair(broken, whole), 0]
        assert 0.5 < values[name][1] < values[name][0]
        assert m[name] == pytest.approx(values[name].mean())
    assert m["distinct_1"] == pytest.approx(distinct_n([whole, broken], 1) * 2 / 3)
    assert m["distinct_2_references"] == distinct_n([whole], 2)
    fields = json.dumps({k: f"{k[:4]} one two three four five" for k in FIELDS})
    assert chain_metrics([dict(raw=fields)], [whole])[0]["bleu4"] < 0.9


def test_floor_is_of_the_next_tweet(gold, tmp_path):
    """Each post's reference exchanged for the next one's, wrapping round, but not for one of the
    same tweet; posts without a reference are no one's next."""
    posts = [dict(id=f"p{i}", text=text, label="neutral", cot=cot) for i, (text, cot) in enumerate(
        [("one", "a b c d e"), ("one", "v w x y z"), ("none", None), ("two", "a b c d f")])]
    write(gold, posts)
    raws = ["a b c d f", "a b c d e", "a b", "v w x y"]
    rows = [dict(id=f"p{i}", prediction="neutral", raw=raw) for i, raw in enumerate(raws)]
    m = evaluate(gold, write(tmp_path / "s.jsonl", rows))[1]["s"]
    pairs = [("a b c d f", "a b c d f"), ("a b c d e", "a b c d f"), ("v w x y", "a b c d e")]
    assert m["bleu4_floor"] == pytest.approx(np.mean([bleu4(*pair) for pair in pairs]))
    assert m["rouge_l_floor"] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    write(gold, [post | dict(text="one") for post in posts])  # one tweet alone: just the next
    pairs[0] = ("a b c d f", "v w x y z")
    m = evaluate(gold, tmp_path / "s.jsonl")[1]["s"]
    assert m["bleu4_floor"] == pytest.approx(np.mean([bleu4(*pair) for pair in pairs]))


def test_agreement_by_hand():
    """Share of chains whose own label is the predicted one; no label never agrees."""
    labels = [("positive", "positive"), ("negative", "positive"), ("neutral", "neutral")]
    rows = [dict(raw=chain(c), prediction=p) for c, p in labels] + [dict(raw="", prediction=None)]
    m, values = chain_metrics(rows, [None] * 4)
    assert m["agreement"] == 0.5 and values["agreement"].tolist() == [1, 0, 1, 0]
    assert "bleu4" not in m


# ---- the program


@pytest.fixture
def gold(tmp_path):
    """Six labelled test posts (three positive), two of them with a chain, and one train post."""
    labels = ["positive", "positive", "positive", "negative", "negative", "neutral"]
    rows = [dict(id=f"p{i}", text=f"text {i}", label=x, split="test") for i, x in enumerate(labels)]
    rows += [dict(id="q", text="other", label="neutral", split="train")]
    rows[0]["cot"], rows[1]["cot"] = chain("positive"), chain("positive")
    return write(tmp_path / "gold.jsonl", rows)


def write(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def predictions(path, labels, **more):
    return write(path, [dict(id=f"p{i}", prediction=x) | more for i, x in enumerate(labels)])


ALL = ["positive", "positive", "negative", "negative", None, "neutral"]


def evaluate(gold, *files, more=()):
    """(exit code, metrics, report) of eval.py on gold and prediction files."""
    out = gold.parent / "out"
    code = scores.main([*map(str, files), "--gold", str(gold), "--out", str(out), *more])
    if code:
        return code, None, None
    return code, json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


def test_baseline(gold, tmp_path, capsys):
    """p of each other run's accuracy and macro F1 against the named one; an unknown name is refused."""
    same = predictions(tmp_path / "same.jsonl", ALL)
    none = predictions(tmp_path / "none.jsonl", [None] * 6)
    files = [f"a={same}", same, none]
    code, metrics, _ = evaluate(gold, *files, more=["--baseline", "a"])
    assert code == 0 and not {"p_accuracy", "p_macro_f1"} & metrics["a"].keys()
    assert metrics["same"]["p_accuracy"] == metrics["same"]["p_macro_f1"] == 1
    assert metrics["none"]["p_accuracy"] < 0.1 and metrics["none"]["p_macro_f1"] < 0.1
    assert evaluate(gold, *files, more=["--baseline", "x"])[0] == 2
    assert "--baseline 'x' is none of the runs" in capsys.readouterr().err


def test_how_it_was_made_is_kept(gold, tmp_path):
    """The command line as typed, the versions and the date: in metrics.json and the report."""
    path = predictions(tmp_path / "s.jsonl", ALL)
    _, metrics, page = evaluate(gold, path, more=["--cards", "3"])
    assert metrics["date"] in page
    assert f"{path} --gold {gold}" in metrics["command"] and "--cards 3" in metrics["command"]
    assert set(metrics["versions"]) == {"python", "torch", "transformers", "numpy"}


def test_program(gold, tmp_path, capsys):
    """Numbers against the gold posts, beside always saying the commonest label."""
    code, metrics, _ = evaluate(gold, predictions(tmp_path / "s.jsonl", ALL, raw=chain("positive")))
    m = metrics["s"]
    assert code == 0 and (m["n"], m["missing"], m["unparsed"]) == (6, 0, 1)
    assert m["accuracy"] == pytest.approx(4 / 6) and m["parse_rate"] == 1
    assert m["agreement"] == pytest.approx(2 / 6) and m["referenced"] == 2 and m["bleu4"] == 1
    assert metrics["majority"]["label"] == "positive" and metrics["majority"]["accuracy"] == 0.5
    assert {"bleu4", "rouge_l"} <= set(metrics["signatures"])
    out = capsys.readouterr().out
    assert "judged: 6 gold posts, split test; 1 left out" in out and "0.667" in out
    assert "s.jsonl: rows of 6 of 6 judged posts" in out
    assert out.strip().split("\n")[-1].endswith("out/report.html")


def test_raw_text_is_parsed_anew(gold, tmp_path):
    """What a row claims about its chain is not believed."""
    path = predictions(tmp_path / "s.jsonl", ALL, raw="prose", chain_prediction="positive",
                       problem=None)
    assert evaluate(gold, path)[1]["s"]["parse_rate"] == 0


def test_runs_of_one_name_do_not_hide_each_other(gold, tmp_path):
    """Two files called alike are refused unless they are named apart; the report is the first's."""
    for folder, step in (("a", 1), ("b", -1)):
        predictions(tmp_path / folder / "s.jsonl", ALL[::step])
    files = tmp_path / "a" / "s.jsonl", tmp_path / "b" / "s.jsonl"
    assert evaluate(gold, *files)[0] == 2
    _, metrics, page = evaluate(gold, f"base/a={files[0]}", f"b={files[1]}")
    assert metrics["base/a"]["accuracy"] != metrics["b"]["accuracy"]
    assert "<h1>MulCoT-RD: base/a</h1>" in page


@pytest.mark.parametrize("name", ["majority", "signatures", "versions", ""])
def test_names_that_are_taken_are_refused(gold, tmp_path, name):
    """A run cannot stand where another entry of metrics.json stands."""
    path = predictions(tmp_path / "s.jsonl", ALL)
    assert evaluate(gold, f"s={path}", f"{name}={path}")[0] == 2


def test_missing_predictions_count_as_unparsed(gold, tmp_path, capsys):
    """A post without a row is wrong; how many there are is said."""
    path = predictions(tmp_path / "s.jsonl", ALL[:2])
    m = evaluate(gold, path)[1]["s"]
    assert (m["n"], m["missing"], m["unparsed"]) == (6, 4, 4)
    assert m["accuracy"] == pytest.approx(2 / 6)
    assert f"{path}: rows of 2 of 6 judged posts, others count as wrong" in capsys.readouterr().out


def test_split(gold, tmp_path, capsys):
    """Test posts are judged unless --split says otherwise; how many posts are of split train is
    said below the table."""
    rows = [dict(id=i, prediction="neutral") for i in ("p0", "p5", "q")]
    path = write(tmp_path / "s.jsonl", rows)
    _, metrics, _ = evaluate(gold, path)
    assert (metrics["split"], metrics["n"], metrics["s"]["n"]) == ("test", 6, 6)
    assert "of split test (0 training posts)" in metrics["signatures"]["n"]
    _, metrics, page = evaluate(gold, path, more=["--split", "all"])
    assert metrics["split"] == "all" and metrics["s"]["n"] == 7
    assert "of split all (1 training posts)" in page and "(1 train" in capsys.readouterr().out
    _, metrics, _ = evaluate(gold, path, more=["--split", "train"])
    assert metrics["s"]["n"] == 1 and metrics["s"]["accuracy"] == 1
    assert evaluate(gold, path, more=["--split", "dev"])[0] == 2
    assert "no labelled post of split 'dev'" in capsys.readouterr().err


def test_gold_without_test_posts_is_judged_whole(tmp_path):
    """Of a dev.tsv, or rows without a split, all."""
    for split in ("dev", None):
        gold = write(tmp_path / "gold.jsonl", [dict(id="p0", text="t", label="neutral",
                                                    split=split)])
        metrics = evaluate(gold, predictions(tmp_path / "s.jsonl", ["neutral"]))[1]
        assert (metrics["split"], metrics["n"]) == ("all", 1)


def test_gold_labels_come_from_gold(gold, tmp_path):
    """A label in a prediction row changes nothing."""
    path = predictions(tmp_path / "s.jsonl", ALL, label="neutral")
    assert evaluate(gold, path)[1]["s"]["accuracy"] == pytest.approx(4 / 6)


def test_unreadable_gold_rows_are_reported(gold, tmp_path, capsys):
    """A gold post that cannot be read is left out of the numbers, not in silence."""
    gold.write_text(gold.read_text() + '{"id": "z", "label": "neutral", "split": "test"}\n')
    assert evaluate(gold, predictions(tmp_path / "s.jsonl", ALL))[0] == 0
    printed = capsys.readouterr()
    assert "gold.jsonl:8" in printed.out + printed.err


def test_references_and_teacher_rows(gold, tmp_path, capsys):
    """--references adds chains to compare with; --chains counts the teacher's stages, and judges
    what it said unaided, over all rows that have it, kept or set aside, null being wrong."""
    rows = [dict(id="p2", cot=chain("positive"), stage=1),
            dict(id="p3", cot=chain("negative"), stage=2)]
    chains = write(tmp_path / "c.jsonl", rows)
    tried = [dict(stage=1, problem="predicts neutral, label is negative"),
             dict(stage=2, problem="predicts neutral, label is negative"),
             dict(stage=2, problem="truncated")]
    rejects = [dict(id="p4", attempts=tried), dict(where="x", problem="y")]
    write(tmp_path / "c.rejects.jsonl", rejects)
    path = predictions(tmp_path / "s.jsonl", ALL, raw=chain("positive"))
    more = ["--references", str(chains), "--chains", str(chains)]
    metrics = evaluate(gold, path, more=more)[1]
    assert metrics["s"]["referenced"] == 4
    counts = dict(kept=2, unaided=1, label_conditioned=1, set_aside=2, contradictions=1 / 3)
    assert metrics["teacher"] == counts
    assert "teacher: contradictions 0.333" in capsys.readouterr().out
    said = [("positive", "positive"), ("negative", "neutral"), ("negative", None)]
    judged = [row | dict(label=label, unaided_prediction=told)
              for row, (label, told) in zip([*rows, rejects[0]], said)]
    write(chains, [*judged[:2], dict(id="old", cot=chain("neutral"), label="neutral", stage=1)])
    write(tmp_path / "c.rejects.jsonl", [judged[2], rejects[1]])
    teacher = evaluate(gold, path, more=more)[1]["teacher"]
    assert teacher["unaided_n"] == 3 and teacher["kept"] == 3
    assert teacher["unaided_accuracy"] == pytest.approx(1 / 3)
    assert teacher["unaided_macro_f1"] == pytest.approx(1 / 3)  # 1, 0 and 0
    write(tmp_path / "c.rejects.jsonl", [judged[2] | dict(label="good")])
    assert evaluate(gold, path, more=more)[0] == 2


BAD = {
    "foreign ids": (b'{"id": "x", "prediction": "neutral"}', "wrong --gold"),
    "unknown label": (b'{"id": "p0", "prediction": "happy"}', "s.jsonl:1"),
    "label as list": (b'{"id": "p0", "prediction": ["neutral"]}', "s.jsonl:1"),
    "no prediction": (b'{"id": "p0"}', "s.jsonl:1"),
    "no id": (b'{"prediction": "neutral"}', "s.jsonl:1"),
    "a list": (b"[1]", "s.jsonl:1"), "not JSON": (b'{"id": "p0", ', "s.jsonl:1"),
    "not UTF-8": (b'{"id": "p0", "prediction": null, "raw": "\xff"}', "s.jsonl"),
    "empty": (b"", "s.jsonl"),
    "one id twice": (b'{"id": "p0", "prediction": null}\n{"id": "p0", "prediction": null}',
                     "s.jsonl:2: duplicate id 'p0'"),
    "probs as words": (b'{"id": "p0", "prediction": null, "probs": ["a", "b", "c"]}', "s.jsonl:1"),
    "probs as number": (b'{"id": "p0", "prediction": null, "probs": 7}', "s.jsonl:1"),
}


@pytest.mark.parametrize("content, reason", BAD.values(), ids=BAD)
def test_bad_prediction_file(gold, tmp_path, capsys, content, reason):
    """One line that says where and what, exit code 2, and nothing written."""
    (tmp_path / "s.jsonl").write_bytes(content + b"\n" if content else b"")
    assert evaluate(gold, tmp_path / "s.jsonl")[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_files(gold, tmp_path, capsys):
    """Predictions, gold, references and teacher rows that are not there: exit code 2 each."""
    path = predictions(tmp_path / "s.jsonl", ALL)
    none = str(tmp_path / "none.jsonl")
    assert evaluate(gold, none)[0] == 2
    assert evaluate(tmp_path / "none.jsonl", path)[0] == 2
    assert evaluate(gold, path, more=["--references", none])[0] == 2
    assert evaluate(gold, path, more=["--chains", none])[0] == 2
    assert capsys.readouterr().err.count("none.jsonl") == 4


@pytest.mark.parametrize("row", [[1], dict(cot="c"), dict(id="p0", cot=5)])
def test_bad_references(gold, tmp_path, row):
    """Reference rows of a wrong shape are the user's mistake, not a crash."""
    path = predictions(tmp_path / "s.jsonl", ALL, raw=chain("neutral"))
    refs = write(tmp_path / "r", [row])
    assert evaluate(gold, path, more=["--references", str(refs)])[0] == 2


def test_unlabelled_gold(tmp_path, capsys):
    """Gold posts without labels cannot judge anything."""
    gold = write(tmp_path / "gold.jsonl", [dict(id="p0", text="t")])
    assert evaluate(gold, predictions(tmp_path / "s.jsonl", ALL))[0] == 2
    assert "no post with label or score" in capsys.readouterr().err


def test_scores_alone(tmp_path, capsys):
    """Runs that predict scores are judged by these; the sign's accuracy and F1, the majority's and
    the confusion are gone, and MAE and Corr lead."""
    values = [1.5, -2.0, 0.0, 0.4]
    gold = write(tmp_path / "gold.jsonl", [dict(id=f"p{i}", text="t", score=x)
                                           for i, x in enumerate(values)])
    rows = [dict(id=f"p{i}", score=x) for i, x in enumerate([1.0, 1.0, 0.0, None])]
    path = write(tmp_path / "s.jsonl", rows)
    code, metrics, page = evaluate(gold, path)
    m = metrics["s"]
    assert code == 0 and m["mae"] == pytest.approx(3.5 / 3) and m["unparsed"] == 1
    assert not {"accuracy", "macro_f1", "confusion"} & m.keys() and "majority" not in metrics
    printed = capsys.readouterr().out
    assert "|run| n|  MAE|  Corr|Acc-2|Acc-7|" in printed
    text = re.sub("<[^>]*>", "", page)
    assert f"MAE\xa01.167 Corr\xa0{m['corr']:.3f}  n\xa04" in html.unescape(text.replace("&nbsp;", "\xa0"))
    assert "confusion" not in page
    other = write(tmp_path / "t.jsonl", [dict(id="p0", score=1.0)])
    _, metrics, _ = evaluate(gold, f"a={path}", f"a={other}", f"b={path}", more=["--baseline", "b"])
    assert metrics["a"]["mae"] == pytest.approx((3.5 / 3 + 0.5) / 2)
    rows = [dict(id="p0", prediction="positive", predicted_score=2.0, score=9.0)]
    assert evaluate(gold, write(tmp_path / "u.jsonl", rows))[1]["u"]["mae"] == pytest.approx(0.5)


def test_a_readouts_number_is_no_chain(tmp_path):
    """Rows of a generative readout: their raw text is not parsed; labels alone are judged by the
    side of gold's score."""
    gold = write(tmp_path / "gold.jsonl", [dict(id="p0", text="t", score=0.4)])
    metrics = evaluate(gold, write(tmp_path / "s.jsonl", [dict(id="p0", score=0.4, raw="0.4")]))[1]
    assert metrics["s"]["mae"] == 0 and "parse_rate" not in metrics["s"]
    rows = [dict(id="p0", prediction="positive")]
    assert evaluate(gold, write(tmp_path / "l.jsonl", rows))[1]["l"]["accuracy"] == 1


def test_few_posts_are_never_significant(tmp_path):
    """Four posts, all right against all wrong: a sign test's 1/8, not the bootstrap's 1/1001."""
    gold = write(tmp_path / "gold.jsonl", [dict(id=f"p{i}", text="t", label="positive")
                                           for i in range(4)])
    right = predictions(tmp_path / "a.jsonl", ["positive"] * 4)
    wrong = predictions(tmp_path / "b.jsonl", ["negative"] * 4)
    metrics = evaluate(gold, right, wrong, more=["--baseline", "a"])[1]
    assert metrics["b"]["p_accuracy"] == 1 / 8
    assert "**" not in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("more", [dict(raw=chain("neutral")), dict(probs=[0.2, 0.6, 0.2])])
def test_seeds_of_one_run_may_differ_in_what_they_have(gold, tmp_path, more):
    """One seed with chains (or probabilities), one without: no number of both, and no crash."""
    labels = ["neutral"] * 6
    whole = predictions(tmp_path / "a.jsonl", labels, **more)
    bare = predictions(tmp_path / "b.jsonl", labels)
    refs = write(tmp_path / "refs.jsonl", [dict(id=f"p{i}", cot=chain("neutral")) for i in range(6)])
    for files in ((f"x={whole}", f"x={bare}"), (f"x={bare}", f"x={whole}")):
        code, metrics, _ = evaluate(gold, *files, more=["--references", str(refs)])
        assert code == 0 and metrics["x"].get("meteor") is metrics["x"].get("ece") is None


def test_an_empty_reference_is_none(gold, tmp_path):
    """It would count as a chain that every model misses; references of no judged post are
    refused."""
    path = predictions(tmp_path / "s.jsonl", ["neutral"] * 6, raw=chain("neutral"))
    refs = write(tmp_path / "r.jsonl", [dict(id=f"p{i}", cot=cot) for i, cot in enumerate(
        [chain("neutral"), "", chain("neutral")])])
    metrics = evaluate(gold, path, more=["--references", str(refs)])[1]["s"]
    assert metrics["referenced"] == 2 and metrics["meteor"] > 0.99
    refs = write(tmp_path / "other.jsonl", [dict(id="dev-0", cot=chain("neutral"))])
    assert evaluate(gold, path, more=["--references", str(refs)])[0] == 2


def test_two_references_are_never_significant(tmp_path):
    """p of METEOR is of the posts that have a reference, not of all that are judged."""
    gold = write(tmp_path / "gold.jsonl", [dict(id=f"p{i}", text="t", label="neutral")
                                           for i in range(60)])
    refs = write(tmp_path / "r.jsonl", [dict(id=f"p{i}", cot=chain("neutral")) for i in range(2)])
    good = predictions(tmp_path / "a.jsonl", ["neutral"] * 60, raw=chain("neutral"))
    bad = predictions(tmp_path / "b.jsonl", ["neutral"] * 60, raw="")
    assert evaluate(gold, good, bad, more=["--references", str(refs)])[0] == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "**1.000**" in table and "**0.999**" not in table  # of 60 parse rates, not of METEOR


def test_probabilities_of_some_posts_alone_are_not_judged(gold, tmp_path):
    """Right answers for half of the posts would have an AURC of 0."""
    probs = [dict(id=f"p{i}", prediction="positive", probs=[0.1, 0.1, 0.8]) for i in range(6)]
    assert "aurc" in evaluate(gold, write(tmp_path / "a.jsonl", probs))[1]["a"]
    assert "aurc" not in evaluate(gold, write(tmp_path / "b.jsonl", probs[:3]))[1]["b"]


def test_usage_error():
    """Without --gold the parser itself exits with 2."""
    with pytest.raises(SystemExit) as error:
        scores.main(["x.jsonl"])
    assert error.value.code == 2
