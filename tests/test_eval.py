"""eval.py as a program: what it reads, refuses, prints and writes; chains, floors and Sim."""

import html
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import chain, write

import eval as scores
from eval import bleu4, chain_metrics, diagnose, distinct_n, load_embedder, rouge_l
from mulcot import FIELDS, LABELS


def predictions(path, labels, **more):
    return write(path, [dict(id=f"p{i}", prediction=x) | more for i, x in enumerate(labels)])


@pytest.fixture
def gold(tmp_path):
    """Six labelled test posts (three positive), two of them with a chain, and one train post."""
    labels = ["positive", "positive", "positive", "negative", "negative", "neutral"]
    rows = [dict(id=f"p{i}", text=f"text {i}", label=x, split="test") for i, x in enumerate(labels)]
    rows += [dict(id="q", text="other", label="neutral", split="train")]
    rows[0]["cot"], rows[1]["cot"] = chain("positive"), chain("positive")
    return write(tmp_path / "gold.jsonl", rows)


@pytest.fixture
def many(tmp_path):
    """60 labelled test posts with chains."""
    return write(tmp_path / "gold.jsonl", [
        dict(id=f"p{i}", text=f"text {i}", label=LABELS[i % 3], split="test",
             cot=chain(LABELS[i % 3])) for i in range(60)])


def many_predictions(path, wrong, **more):
    """Predictions that miss the first `wrong` posts."""
    label = lambda i: LABELS[(i + (i < wrong)) % 3]
    return write(path, [dict(id=f"p{i}", prediction=label(i)) | {
        k: v(i) if callable(v) else v for k, v in more.items()} for i in range(60)])


ALL = ["positive", "positive", "negative", "negative", None, "neutral"]


def evaluate(gold, *files, more=()):
    """(exit code, metrics.json, the text of table.md and report.html) of gold and prediction
    files."""
    out = gold.parent / "out"
    code = scores.main([*map(str, files), "--gold", str(gold), "--out", str(out), *more])
    if code:
        return code, None, None
    text = (out / "table.md").read_text() + (out / "report.html").read_text()
    return code, json.loads((out / "metrics.json").read_text()), text


def table_of(text):
    """{run: its row's cells} of the table in a text."""
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row] for row in rows}


# ---- chains and Sim


def test_chains_are_compared_as_they_came():
    """Names, quotes and form count; an unparsed chain is a text as any other; a missing one is
    empty, scores 0 and counts in every mean."""
    whole, broken = chain("positive"), chain("positive").replace("Image_analysis", "Picture")
    rows = [dict(raw=whole), dict(raw=broken), {}]
    m, values = chain_metrics(rows, [whole] * 3)
    assert (m["parse_rate"], m["referenced"]) == (pytest.approx(1 / 3), 3)
    assert m["agreement"] == 0  # no label is none that a chain could name
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
    raws = ["a b c d f", "a b c d e", "a b", "a b c d e"]
    rows = [dict(id=f"p{i}", prediction="neutral", raw=raw) for i, raw in enumerate(raws)]
    m = evaluate(gold, write(tmp_path / "s.jsonl", rows))[1]["s"]
    pairs = [("a b c d f", "a b c d f"), ("a b c d e", "a b c d f"), ("a b c d e", "a b c d e")]
    assert m["bleu4_floor"] == pytest.approx(np.mean([bleu4(*pair) for pair in pairs]))
    assert m["rouge_l_floor"] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))
    write(gold, [post | dict(text="one") for post in posts])  # one tweet alone: just the next
    pairs[0] = ("a b c d f", "v w x y z")
    m = evaluate(gold, tmp_path / "s.jsonl")[1]["s"]
    assert m["bleu4_floor"] == pytest.approx(np.mean([bleu4(*pair) for pair in pairs]))
    write(gold, posts[:1])  # a single reference has no floor
    _, metrics, _ = evaluate(gold, tmp_path / "s.jsonl")
    assert "bleu4" in metrics["s"] and "bleu4_floor" not in metrics["s"]
    assert metrics["diagnosis"] == []


@pytest.mark.parametrize("conclusion, alone", [
    ("It is positive.", True), ("It is POSITIVE, truly positive", True), ("It is good.", False),
    ("positive, not negative", False), ("positively great", False), ("neutral", False)])
def test_conclusion_names_the_label_alone(conclusion, alone):
    """Words, not parts of words; a second label spoils it."""
    rows = [dict(raw=chain("positive", conclusion=conclusion), prediction="positive")]
    assert chain_metrics(rows, [None])[0]["concludes"] == alone


@pytest.fixture
def embedder(encoders, tmp_path):
    """A folder of its own name with a random tiny BERT."""
    return shutil.copytree(encoders / "text", tmp_path / "my-bert")


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


def test_sim_in_the_program(many, tmp_path, embedder, capsys):
    """With an embedder a number and a signature; a wrong one is an error."""
    path = many_predictions(tmp_path / "s.jsonl", 0, raw=chain("positive"))
    m = evaluate(many, path)[1]
    assert "sim" not in m["s"] and "sim" not in m["signatures"]
    m = evaluate(many, path, more=["--embedder", str(embedder)])[1]
    assert 0 < m["s"]["sim"] <= 1 and embedder.name in m["signatures"]["sim"]
    assert evaluate(many, path, more=["--embedder", str(tmp_path / "none")])[0] == 2
    assert "all-MiniLM-L6-v2" in capsys.readouterr().err


# ---- runs and table


def test_baseline(gold, tmp_path, capsys):
    """p of each other run's accuracy and macro F1 against the named; an unknown name is refused."""
    same = predictions(tmp_path / "same.jsonl", ALL)
    none = predictions(tmp_path / "none.jsonl", [None] * 6)
    files = [f"a={same}", same, none]
    code, metrics, _ = evaluate(gold, *files, more=["--baseline", "a"])
    assert code == 0 and not {"p_accuracy", "p_macro_f1"} & metrics["a"].keys()
    assert metrics["same"]["p_accuracy"] == metrics["same"]["p_macro_f1"] == 1
    assert metrics["none"]["p_accuracy"] < 0.1 and metrics["none"]["p_macro_f1"] < 0.1
    assert evaluate(gold, *files, more=["--baseline", "x"])[0] == 2
    assert "--baseline 'x' is none of the runs" in capsys.readouterr().err
    (tmp_path / "lr=1").mkdir()  # a file's path may hold a =
    assert evaluate(gold, predictions(tmp_path / "lr=1" / "b.jsonl", ALL))[1]["b"]["n"] == 6


def test_best_is_bold_only_if_significant(many, tmp_path, capsys):
    """40 wrong against 5: bold, in the terminal as in table.md. 6 against 5: not."""
    five, six, forty = (many_predictions(tmp_path / f"{n}.jsonl", n) for n in (5, 6, 40))
    _, _, markdown = evaluate(many, f"a={forty}", f"b={five}")
    assert table_of(markdown)["b"][2].startswith("**0.917** 0.8")
    assert "**0.917**" in capsys.readouterr().out
    _, _, markdown = evaluate(many, f"a={six}", f"b={five}")
    assert "**" not in markdown and "**" not in capsys.readouterr().out


def test_seeds_share_a_name(many, tmp_path, capsys):
    """Files of one name become one row, mean ± deviation, with each run kept in metrics.json."""
    files = [many_predictions(tmp_path / f"{n}.jsonl", n) for n in (6, 12, 3)]
    _, metrics, markdown = evaluate(many, f"x/a={files[0]}", f"x/a={files[1]}", f"x/b={files[2]}")
    a = metrics["x/a"]
    assert a["accuracy"] == pytest.approx(0.85) and len(a["seeds"]) == 2
    assert a["deviation"]["accuracy"] == pytest.approx(0.1 / 2**0.5)
    assert "0.850 ± 0.071" in markdown and "0.850 ± 0.071" in capsys.readouterr().out
    assert table_of(markdown)["x/a"][1] == "60"  # a count that all share has no deviation
    assert "deviation" not in metrics["x/b"]


def test_columns(many, tmp_path, embedder, capsys):
    """The terminal shows as many as 100 characters hold, floors by their numbers; table.md all."""
    raw = lambda i: chain(LABELS[i % 3]) if i % 2 else None
    probs = [1 / 3] * 3
    files = [f"shuffled_images={many_predictions(tmp_path / 's.jsonl', 9, raw=raw, probs=probs)}",
             f"assistant={many_predictions(tmp_path / 'a.jsonl', 5, raw=raw, probs=probs)}"]
    _, metrics, markdown = evaluate(many, *files, more=["--embedder", str(embedder)])
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if line.startswith("|")) <= 100
    assert table_of(printed)["run"] == ["run", "n", "accuracy, 95 %", "macro F1", "parsed",
                                     "chain=label", "METEOR", "ROUGE-L"]
    table = table_of(markdown)
    assert {"weighted F1", "unparsed", "ECE", "AURC", "BLEU-4", "Sim"} < set(table["run"])
    value, floor = (metrics["assistant"][name] for name in ("meteor", "meteor_floor"))
    assert floor < value and f"{value:.3f} ({floor:.3f})" in table["assistant"]


def test_faithfulness(many, tmp_path):
    """Accuracy where chain and label agree and where not."""
    raw = lambda i: chain(LABELS[i % 3])  # the chain is right, the label of the first ten is not
    m = evaluate(many, many_predictions(tmp_path / "s.jsonl", 10, raw=raw))[1]["s"]
    assert m["agreement"] == m["concludes"] == pytest.approx(50 / 60)
    assert (m["accuracy_agree"], m["accuracy_disagree"]) == (1, 0)
    raw_of_half = lambda i: chain(LABELS[(i + (i < 30)) % 3])
    half = many_predictions(tmp_path / "h.jsonl", 10, raw=raw_of_half)
    m = evaluate(many, half)[1]["h"]  # ten agree and are wrong, 20 do not, 30 agree
    assert (m["accuracy_agree"], m["accuracy_disagree"]) == (pytest.approx(30 / 40), 1)
    assert 0.5 < m["intervals"]["accuracy_agree"][0] < 0.75
    all_agree = many_predictions(tmp_path / "r.jsonl", 0, raw=raw)
    assert "accuracy_disagree" not in evaluate(many, all_agree)[1]["r"]


def test_probabilities(many, tmp_path):
    """Rows with `probs` give calibration beside the labels, unless some posts have none: right
    answers for half of them would have an AURC of 0."""
    rows = [dict(id=f"p{i}", prediction=LABELS[i % 3], probs=[float(k == i % 3) for k in range(3)])
            for i in range(60)]
    whole, half = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:30])
    _, metrics, text = evaluate(many, whole, half)
    m = metrics["a"]
    assert m["ece"] == m["aurc"] == 0 and m["reliability"] == [[1, 1, 60]]
    assert "AURC" in text and "ece" not in metrics["majority"] and "aurc" not in metrics["b"]


def test_signatures_and_diagnosis(many, tmp_path, capsys):
    """Every text metric has a signature; with what the numbers point to they stand below the table,
    in the terminal too."""
    path = many_predictions(tmp_path / "s.jsonl", 9, raw=chain("positive"))
    good = many_predictions(tmp_path / "g.jsonl", 0)
    _, metrics, text = evaluate(many, f"student={path}", f"assistant={good}")
    assert metrics["signatures"].keys() >= {"parse_rate", "bleu4", "meteor_floor", "rouge_l",
                                            "meteor", "distinct_1"}
    assert "15.0 points below" in metrics["diagnosis"][0]
    printed = capsys.readouterr().out
    for line in [*metrics["signatures"].values(), *metrics["diagnosis"]]:
        assert line in text and line in printed
    assert evaluate(many, path, more=["--wordnet", str(tmp_path)])[0] == 2
    assert "lacks data.noun: Debian's wordnet-base has it" in capsys.readouterr().err


def test_program(gold, tmp_path, capsys):
    """Numbers against the gold posts, beside always saying the commonest label; what a row claims
    about its chain or gold label is not believed; how it was made is kept."""
    path = predictions(tmp_path / "s.jsonl", ALL, raw=chain("positive"), label="neutral",
                       chain_prediction="negative", problem="missing")
    code, metrics, text = evaluate(gold, path)
    m = metrics["s"]
    assert code == 0 and (m["n"], m["missing"], m["unparsed"]) == (6, 0, 1)
    assert m["accuracy"] == pytest.approx(4 / 6) and m["parse_rate"] == 1
    assert m["agreement"] == pytest.approx(2 / 6) and m["referenced"] == 2 and m["bleu4"] == 1
    assert metrics["majority"]["label"] == "positive" and metrics["majority"]["accuracy"] == 0.5
    out = capsys.readouterr().out
    assert "judged: 6 gold posts, split test; 1 left out" in out and "0.667" in out
    assert "s.jsonl: 6 of 6 judged posts have a row" in out
    assert out.strip().split("\n")[-1].endswith("out/report.html")
    assert f"{path} --gold {gold}" in metrics["command"] and metrics["date"] in text
    assert set(metrics["versions"]) == {"python", "torch", "transformers", "numpy"}


def test_runs_of_one_name_do_not_hide_each_other(gold, tmp_path):
    """Two files called alike are refused unless they are named apart; the report is the first's. A
    run cannot stand where another entry of metrics.json stands."""
    for folder, step in (("a", 1), ("b", -1)):
        predictions(tmp_path / folder / "s.jsonl", ALL[::step])
    files = tmp_path / "a" / "s.jsonl", tmp_path / "b" / "s.jsonl"
    assert evaluate(gold, *files)[0] == 2
    _, metrics, page = evaluate(gold, f"base/a={files[0]}", f"b={files[1]}")
    assert metrics["base/a"]["accuracy"] != metrics["b"]["accuracy"]
    assert "<h1>MulCoT-RD: base/a</h1>" in page
    for name in ["", *metrics.keys() - {"base/a", "b"}]:
        assert evaluate(gold, f"b={files[1]}", f"{name}={files[0]}")[0] == 2


def test_missing_predictions_count_as_unparsed(gold, tmp_path, capsys):
    """A post without a row is wrong; how many there are is said."""
    path = predictions(tmp_path / "s.jsonl", ALL[:2])
    m = evaluate(gold, path)[1]["s"]
    assert (m["n"], m["missing"], m["unparsed"]) == (6, 4, 4)
    assert m["accuracy"] == pytest.approx(2 / 6)
    assert f"{path}: 2 of 6 judged posts have a row, others are wrong" in capsys.readouterr().out


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
    assert evaluate(gold, path, more=["--split", "dev"])[0] == 2
    assert "no labelled post of split 'dev'" in capsys.readouterr().err
    for split in ("dev", None):  # gold without test posts is judged whole
        write(gold, [dict(id="p0", text="t", label="neutral", split=split)])
        assert evaluate(gold, path)[1]["split"] == "all"


def test_gold_rows_that_cannot_judge(gold, tmp_path, capsys):
    """A post that cannot be read is left out, not in silence; without any label nothing runs."""
    gold.write_text(gold.read_text() + '{"id": "z", "label": "neutral", "split": "test"}\n')
    path = predictions(tmp_path / "s.jsonl", ALL)
    assert evaluate(gold, path)[0] == 0 and "gold.jsonl:8" in capsys.readouterr().out
    assert evaluate(write(gold, [dict(id="p0", text="t")]), path)[0] == 2
    assert "no post with label or score" in capsys.readouterr().err


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
    assert "contradictions 0.333" in capsys.readouterr().out
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
}
for probs in ("abc", 7, [0.5, 0.5], [0.2, 0.2, 0.2], [-0.1, 0.6, 0.5], [0.2, 0.3, 0.5]):
    row = dict(id="p0", prediction="neutral", probs=probs)  # the last contradict the prediction
    BAD[f"probs {probs}"] = json.dumps(row).encode(), "s.jsonl:1: probs "


@pytest.mark.parametrize("content, reason", BAD.values(), ids=BAD)
def test_bad_prediction_file(gold, tmp_path, capsys, content, reason):
    """One line that says where and what, exit code 2, and nothing written."""
    (tmp_path / "s.jsonl").write_bytes(content + b"\n" if content else b"")
    assert evaluate(gold, tmp_path / "s.jsonl")[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_and_bad_files(gold, tmp_path, capsys):
    """Predictions, gold, references and teacher rows that are not there, or rows of a wrong shape:
    exit code 2 each."""
    path = predictions(tmp_path / "s.jsonl", ALL, raw=chain("neutral"))
    none = str(tmp_path / "none.jsonl")
    assert evaluate(gold, none)[0] == evaluate(tmp_path / "none.jsonl", path)[0] == 2
    assert evaluate(gold, path, more=["--references", none])[0] == 2
    assert evaluate(gold, path, more=["--chains", none])[0] == 2
    assert capsys.readouterr().err.count("none.jsonl") == 4
    for row in ([1], dict(cot="c"), dict(id="p0", cot=5)):
        refs = write(tmp_path / "r", [row])
        assert evaluate(gold, path, more=["--references", str(refs)])[0] == 2


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
    lead = html.unescape(re.sub("<[^>]*>", "", re.search("<p class=lead>.*", page)[0]))
    assert lead.startswith(f"MAE\xa01.167 Corr\xa0{m['corr']:.3f} ") and "confusion" not in page
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


@pytest.mark.parametrize("more", [dict(raw=chain("neutral")), dict(probs=[0.2, 0.6, 0.2])])
def test_seeds_of_one_run_may_differ_in_what_they_have(gold, tmp_path, more):
    """One seed with chains (or probabilities), one without: no number of both, and no crash."""
    labels = ["neutral"] * 6
    whole = predictions(tmp_path / "a.jsonl", labels, **more)
    bare = predictions(tmp_path / "b.jsonl", labels)
    refs = write(tmp_path / "r.jsonl", [dict(id=f"p{i}", cot=chain("neutral")) for i in range(6)])
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


def test_few_posts_are_never_significant(tmp_path):
    """Four posts, all right against all wrong: a sign test's 1/8, not the bootstrap's 1/1001. Two
    references: their METEOR is not bold, as the parse rate of all posts is."""
    gold = write(tmp_path / "gold.jsonl", [dict(id=f"p{i}", text="t", label="positive")
                                           for i in range(60)])
    good = predictions(tmp_path / "a.jsonl", ["positive"] * 60, raw=chain("neutral"))
    bad = predictions(tmp_path / "b.jsonl", ["positive"] * 60, raw="")
    refs = write(tmp_path / "r.jsonl", [dict(id=f"p{i}", cot=chain("neutral")) for i in range(2)])
    _, _, text = evaluate(gold, good, bad, more=["--references", str(refs)])
    assert "**1.000**" in text and "**1.000 (" not in text
    write(gold, [dict(id=f"p{i}", text="t", label="positive") for i in range(4)])
    wrong = predictions(tmp_path / "c.jsonl", ["negative"] * 4)
    assert evaluate(gold, good, wrong, more=["--baseline", "a"])[1]["c"]["p_accuracy"] == 1 / 8


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
    assert "noisy labels" in diagnose(runs, dict(contradictions=0.06))[0]
