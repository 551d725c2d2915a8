"""The cascade: every case of the decision, thresholds, failures, both kinds of MLLM, the shell."""

import itertools
import json
import math

import pytest
import torch
from conftest import chat

import generate
import mulcot
import train

SURE, UNSURE = 0.1, 0.9
verdict = mulcot.Verdict  # of a label and its uncertainty
FAILED = verdict(failed="HTTP 400")


# ---- the decision

UBM = {"sure": verdict("positive", SURE), "unsure": verdict("positive", UNSURE)}
MLLM = {"none": None, "failed": FAILED, "sure same": verdict("positive", SURE),
        "sure other": verdict("negative", SURE), "unsure same": verdict("positive", 0.8),
        "unsure other": verdict("negative", 0.8), "unknown same": verdict("positive", None),
        "unknown other": verdict("negative", None)}
SECOND_PASS = {"none": None, "failed": FAILED, "neutral": verdict("neutral", 0.7)}
CONTRADICTS = {"none": "ask second_pass", "failed": "mllm", "neutral": "second_pass"}
ROUTES = {  # (UBM, MLLM) -> route, or {second pass: route}
    ("unsure", "none"): "ask mllm", ("unsure", "failed"): "ubm", ("unsure", "sure same"): "mllm",
    ("unsure", "sure other"): "mllm", ("unsure", "unsure same"): "agree",
    ("unsure", "unsure other"): CONTRADICTS, ("unsure", "unknown same"): "agree",
    ("unsure", "unknown other"): CONTRADICTS,
    **{("sure", m): "ubm" for m in MLLM}}


@pytest.mark.parametrize("u, m, a", list(itertools.product(UBM, MLLM, SECOND_PASS)))
def test_every_case_of_the_route(u, m, a):
    """All 48 combinations: the route, whose answer it is, and that a failure is named."""
    expected = ROUTES[u, m]
    expected = expected[a] if isinstance(expected, dict) else expected
    route, answer, reason = mulcot.cascade_route(UBM[u], MLLM[m], SECOND_PASS[a], 0.5, 0.5)
    assert route == expected
    owner = {"ubm": UBM[u], "mllm": MLLM[m], "agree": MLLM[m], "second_pass": SECOND_PASS[a]}
    assert answer == owner.get(route)
    fell_back = isinstance(ROUTES[u, m], dict) and a == "failed"
    assert ("HTTP 400" in reason) == (fell_back or (m == "failed" and u != "sure"))


def test_edges_of_the_route():
    """u equal to τ is sure; τ = -1 is never. Asking again failed: the lower uncertainty decides."""
    ubm, mllm = verdict("neutral", 0.5), verdict("neutral", 0.0)
    assert mulcot.cascade_route(ubm, None, None, 0.5, 0)[0] == "ubm"
    assert mulcot.cascade_route(verdict("neutral", 0.0), mllm, None, -1, -1)[0] == "agree"
    mllm = verdict("negative", 0.8)
    for u, surer in ((0.6, "positive"), (0.85, "negative")):
        answer = mulcot.cascade_route(verdict("positive", u), mllm, FAILED, 0.5, 0.5)[1]
        assert answer.prediction == surer


def test_a_pass_that_failed_was_made():
    """Passes count what was asked: a server that breaks down has been asked all the same."""
    unsure, other = verdict("positive", 0.99), verdict("negative", 0.99)
    for verdicts, passes in (((unsure, FAILED, None), 2), ((unsure, unsure, None), 2),
                             ((unsure, other, FAILED), 3)):
        assert generate.passes_asked(verdicts, 0.5, 0.5) == passes
    assert generate.passes_asked((unsure, other, other), 1, 0.5) == 1


def test_scores_of_one_polarity_are_averaged_by_certainty():
    ubm, mllm = mulcot.score_verdict(2.0, 0.75), mulcot.score_verdict(1.0, 0.5)
    route, answer, _ = mulcot.cascade_route(ubm, mllm, None, 0.1, 0.1)
    assert route == "agree" and answer.prediction == "positive"
    assert answer.predicted_score == pytest.approx((0.25 * 2 + 0.5 * 1) / 0.75, abs=1e-4)
    other = mulcot.score_verdict(0.5, 0.5)  # within ε of 0: neutral, so no agreement
    assert mulcot.cascade_route(ubm, other, None, 0.1, 0.1)[0] == "ask second_pass"


def test_a_score_is_its_expectation():
    probs = torch.tensor([0, 0, 0, 0.1, 0.5, 0.4, 0])
    got = generate.verdict(probs, mulcot.SCORE_BINS)
    assert got.predicted_score == pytest.approx(1.3) and got.prediction == "positive"
    h = -sum(p * torch.log(torch.tensor(p)).item() for p in (0.1, 0.5, 0.4))
    assert got.uncertainty == pytest.approx(h / torch.log(torch.tensor(7.0)).item(), abs=1e-5)
    assert got.uncertainty == 0.484785  # of 0.4847852
    assert mulcot.score_verdict(-0.51, 0).prediction == "negative"
    assert mulcot.score_verdict(-0.5, 0).prediction == "neutral"


# ---- thresholds


def test_an_mllm_without_uncertainty_is_never_sure():
    """Its only threshold is -1."""
    grid = generate.threshold_grid([(UBM["unsure"], MLLM["unknown other"], SECOND_PASS["neutral"])],
                                   lambda answer, n: 0.0)
    assert {tau2 for *_, tau2 in grid} == {-1.0} and {tau1 for _, _, tau1, _ in grid} > {-1.0}


def test_thresholds_keep_the_budget():
    """The UBM is right where it is sure, the MLLM everywhere: more budget, fewer errors."""
    gold = ["positive"] * 10
    answers = [(verdict("positive" if i < 6 else "negative", i / 10), verdict("positive", 0.1),
                verdict("positive", 0.1)) for i in range(10)]
    error = lambda answer, n: float(answer.prediction != gold[n])
    grid = generate.threshold_grid(answers, error)
    for budget, wrong in ((0, 0.4), (0.2, 0.2), (0.4, 0.0), (1.0, 0.0)):
        passes, least, tau1, tau2 = generate.best_thresholds(grid, budget)
        assert passes <= budget + 1e-9 and least == pytest.approx(wrong)
        assert (passes, least, tau1, tau2) in grid
        asked = [generate.passes_asked(v, tau1, tau2) - 1 for v in answers]
        assert passes == pytest.approx(sum(asked) / 10)
    passes, _, _, tau2 = generate.best_thresholds(grid, 0.7)
    assert passes > 0.6 and tau2 == 1.0  # of equals: asks about more posts, about none twice


def test_endpoint_answers():
    """Label and uncertainty from log-probabilities at the label's token; none without them."""
    def read(text, classes=mulcot.LABELS, tokens=()):
        return generate.answer_verdict(mulcot.Answer(text, logprobs=list(tokens)), classes)

    likely = {"pos": math.log(0.6), " Neutral": math.log(0.3), "ne": math.log(0.1)}
    tokens = [('"', {}), ("Prediction", {"Prediction": 0.0}), ('": "', {}), ("pos", likely),
              ("itive", {})]
    got = read('"Prediction": "positive"', tokens=tokens)
    assert got.prediction == "positive"
    assert got.probs == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-4)  # "ne" could be either
    assert read('"Prediction": "neutral"') == verdict("neutral", None)
    assert "no label" in read("I cannot say").failed
    for minus in ("-", "\u2212"):
        score = read(f'"Prediction": "{minus}2"', mulcot.SCORE_BINS)
        assert (score.predicted_score, score.prediction) == (-2, "negative")
    assert all("no score" in read(x, mulcot.SCORE_BINS).failed for x in ("-7", "much"))


def test_second_pass_prompt_names_both_and_keeps_user_text_harmless():
    post = mulcot.Post("1", "a {b} day\nYou: negative", aspect="b")
    text = generate.second_pass_prompt(post, verdict("positive", 0.62), verdict("negative", None))
    assert "A small classifier: positive (uncertainty 0.62 of 1). You: negative." in text
    assert "Text: a {b} day You: negative\n" in text and text.endswith("\n\n")


# ---- the stage

@pytest.fixture(scope="module")
def ubm(toy, encoders, tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("ubm"), str(toy / "posts.jsonl")
    assert train.main(["ubm", "--data", data, "--dev", data, "--text-encoder", f"{encoders}/text",
                       "--out", f"{folder}/ubm", "--members", "1", "--epochs", "1", "--batch",
                       "4"]) == 0
    return folder / "ubm"


def run(toy, ubm, out, *more, data=None):
    """(exit code, rows) of a cascade over split test."""
    data = str(data or toy / "posts.jsonl")
    code = generate.main(["cascade", "--ubm", str(ubm), "--data", data, "--dev", data, "--images",
                          str(toy / "images"), "--split", "test", "--out", str(out), *more])
    return code, mulcot.read_rows(out)


def essence(rows):
    return [(row["id"], row["prediction"], row["route"], row["reason"]) for row in rows]


def summary_of(out):
    return json.loads(out.with_suffix(".cascade.json").read_text())


def test_local_cascade(toy, ubm, tmp_path, monkeypatch, capsys):
    """Rows carry route, reason and every pass asked; a rerun asks nothing, with another budget
    neither; other flags are refused."""
    out, model = tmp_path / "rows.jsonl", ["--mllm", str(toy / "student"), "--budget", "1.2"]
    code, rows = run(toy, ubm, out, *model)
    assert code == 0 and len(rows) == 6 and {r["id"][:4] for r in rows} == {"test"}
    passes_of = dict(ubm=0, mllm=1, agree=1, second_pass=2)
    summary = summary_of(out)
    for row in rows:
        passes = [mulcot.Verdict(**row["passes"][k]) if k in row["passes"] else None
                  for k in ("ubm", "mllm", "second_pass")]
        route, answer, reason = mulcot.cascade_route(*passes, *summary["taus"])
        assert (row["route"], row["reason"]) == (route, reason)
        assert row["prediction"] == answer.prediction and row["source"] == "cascade"
        assert len(row["passes"]) == 1 + passes_of[route]
    monkeypatch.setattr(mulcot, "score_labels", None)  # would fail if anything were asked
    monkeypatch.setattr(generate, "score_labels", None)
    assert essence(run(toy, ubm, out, *model)[1]) == essence(rows)
    assert run(toy, ubm, out, *model, "--budget", "0")[0] == 0
    capsys.readouterr()
    assert run(toy, ubm, out, *model, "--max-pixels", "3136")[0] == 2
    assert "begun with max_pixels = 0, not 3136" in capsys.readouterr().err


def test_killed_and_rerun(toy, ubm, tmp_path):
    """A torn file of answers: what is whole is kept, the rest is asked anew, the rows are equal.
    What was answered under other settings is not used."""
    out, model = tmp_path / "rows.jsonl", ["--mllm", str(toy / "student"), "--batch", "1"]
    rows, file = run(toy, ubm, out, *model)[1], tmp_path / "rows.asked.jsonl"
    asked = mulcot.read_rows(file)
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    out.unlink()
    assert essence(run(toy, ubm, out, *model)[1]) == essence(rows)
    again = mulcot.read_rows(file)
    assert {row["key"] for row in again} == {row["key"] for row in asked}
    out.unlink()
    assert run(toy, ubm, out, *model, "--max-pixels", "3136")[0] == 0
    anew = mulcot.read_rows(file)
    assert len(anew) >= 2 * len(asked) - 1 and len({row["key"] for row in anew}) == len(anew)


def relabelled(toy, tmp_path, change):
    """A copy of the toy posts, each row changed by change(number, row)."""
    rows, file = mulcot.read_rows(toy / "posts.jsonl"), tmp_path / "posts.jsonl"
    mulcot.write_rows(file, [row | change(n, row) for n, row in enumerate(rows)])
    return file


def test_thresholds_never_see_the_evaluated_split(toy, ubm, tmp_path, capsys):
    """Other labels on the test posts change no threshold; an unsplit file as both --data and --dev
    is refused."""
    a, b, model = tmp_path / "a.jsonl", tmp_path / "b.jsonl", ["--mllm", str(toy / "student")]
    neutral = dict(train={}, dev={}, test=dict(label="neutral"))
    data = relabelled(toy, tmp_path, lambda n, row: neutral[row["split"]])
    assert run(toy, ubm, a, *model)[0] == run(toy, ubm, b, *model, data=data)[0] == 0
    assert summary_of(a)["taus"] == summary_of(b)["taus"]
    mulcot.write_rows(tmp_path / "p.jsonl", [dict(id="1", text="a day", label="neutral")])
    assert generate.main(["cascade", "--ubm", str(ubm), *model, "--data", f"{tmp_path}/p.jsonl",
                          "--dev", f"{tmp_path}/p.jsonl", "--out", f"{tmp_path}/c.jsonl"]) == 2
    assert "post 1 is in --dev and in --data" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ubm_of_scores(ubm, tmp_path_factory):
    """A UBM of seven bins over the same text encoder."""
    torch.manual_seed(1)
    folder, model = tmp_path_factory.mktemp("scores"), generate.load_ubm(ubm)
    member = mulcot.UBMMember(model.members[0].text, model.tokenizer, mulcot.SCORE_BINS)
    train.save_ubm(mulcot.UBM([member], mulcot.SCORE_BINS), folder)
    return folder


def test_scores_run_through(toy, ubm, ubm_of_scores, tmp_path, capsys):
    """Seven bins: the MLLM scores "-3" … "3"; rows hold predicted scores of every stage. Dev posts
    without scores are refused, as is a UBM as MLLM."""
    out, model = tmp_path / "rows.jsonl", ["--mllm", str(toy / "student"), "--budget", "2"]
    assert run(toy, ubm, out, "--mllm", str(ubm))[0] == run(toy, ubm_of_scores, out, *model)[0] == 2
    errors = capsys.readouterr().err
    assert "cannot be loaded" in errors and "with a score" in errors
    data = relabelled(toy, tmp_path, lambda n, row: dict(score=n % 7 - 3.0))
    code, rows = run(toy, ubm_of_scores, out, *model, data=data)
    assert code == 0 and len(rows) == 6
    for row in rows:
        assert -3 <= row["predicted_score"] <= 3
        assert all(len(stage["bin_probs"]) == 7 for stage in row["passes"].values())


def test_endpoint_cascade(toy, ubm, tmp_path, posts, serve, monkeypatch):
    """Busy once: asked again. One post refused: the UBM's answer stays and says why. Log-
    probabilities become uncertainties. Nothing is paid or kept twice; half of dev gives no
    thresholds."""
    monkeypatch.setattr("random.uniform", lambda *_: 0.01)
    bad, down = next(p for p in posts if p.split == "test"), []
    likely = [dict(token="positive", logprob=-0.7), dict(token="negative", logprob=-0.8)]
    answer = chat('"Prediction": "positive"', tokens=(10, 5), logprobs=dict(
        content=[dict(token="positive", top_logprobs=likely)]))

    def plan(request):
        if len(server.asked) == 1 or any(text in request.prompt for text in down):
            return 503, ""
        return (400, "") if f"Text: {bad.text}\n" in request.prompt else answer

    server, out = serve(plan), tmp_path / "rows.jsonl"
    more = ["--endpoint", server.url, "--model", "m", "--workers", "2", "--budget", "2"]
    code, rows = run(toy, ubm, out, *more)
    assert code == 0 and len(rows) == 6
    calls = len(server.asked)
    assert {request.body["max_tokens"] for request in server.asked} == {32}
    assert len(mulcot.read_rows(tmp_path / "rows.calls.jsonl")) >= 11
    assert not (tmp_path / "rows.asked.jsonl").exists()
    for row in rows:
        mllm = row["passes"].get("mllm")
        if row["id"] == bad.id and mllm is not None:
            assert "HTTP 400" in mllm["failed"] and "HTTP 400" in row["reason"]
            assert row["route"] == "ubm"
        elif mllm is not None:
            assert mllm["uncertainty"] > 0.5 and mllm["tokens"] == 15
    taus = summary_of(out)["taus"]
    code, again = run(toy, ubm, out, *more)
    refused = [request for request in server.asked[calls:] if bad.text in request.prompt]
    assert code == 0 and len(server.asked) - calls == len(refused) <= 1
    assert essence(again) == essence(rows) and summary_of(out)["taus"] == taus
    down += [f"Text: {p.text}\n" for p in posts if p.split == "dev"][:1]
    assert run(toy, ubm, tmp_path / "b.jsonl", *more) == (2, [])
