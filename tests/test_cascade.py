"""The cascade: every case of the decision, thresholds, failures, both kinds of MLLM, the shell."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import generate
import mulcot
import train

SURE, UNSURE = 0.1, 0.9


def said(label, u):
    return dict(prediction=label, uncertainty=u)


# ---- the decision

UBM = {"sure": said("positive", SURE), "unsure": said("positive", UNSURE), "failed": "no image"}
MLLM = {"none": None, "failed": "HTTP 400", "sure same": said("positive", SURE),
        "sure other": said("negative", SURE), "unsure same": said("positive", 0.8),
        "unsure other": said("negative", 0.8), "unknown same": said("positive", None),
        "unknown other": said("negative", None)}
AGAIN = {"none": None, "failed": "HTTP 400", "neutral": said("neutral", 0.7)}
ROUTES = {  # (UBM, MLLM) -> route, or {again: route}
    ("unsure", "none"): "ask", ("unsure", "failed"): "ubm", ("unsure", "sure same"): "mllm",
    ("unsure", "sure other"): "mllm", ("unsure", "unsure same"): "agree",
    ("unsure", "unsure other"): {"none": "ask again", "failed": "mllm", "neutral": "again"},
    ("unsure", "unknown same"): "agree",
    ("unsure", "unknown other"): {"none": "ask again", "failed": "mllm", "neutral": "again"},
    ("failed", "none"): "ask", ("failed", "failed"): "none",
    **{("failed", m): "mllm" for m in MLLM if m not in ("none", "failed")},
    **{("sure", m): "ubm" for m in MLLM}}


@pytest.mark.parametrize("u, m, a", list(itertools.product(UBM, MLLM, AGAIN)))
def test_every_case_of_the_route(u, m, a):
    """All 72 combinations: the route, whose answer it is, and that a failure is named."""
    expected = ROUTES[u, m]
    expected = expected[a] if isinstance(expected, dict) else expected
    route, answer, reason = mulcot.cascade_route(UBM[u], MLLM[m], AGAIN[a], 0.5, 0.5)
    assert route == expected
    owner = {"ubm": UBM[u], "mllm": MLLM[m], "agree": MLLM[m], "again": AGAIN[a]}
    assert answer == owner.get(route)
    if u == "failed" and "sure " not in m.replace("unsure ", ""):
        assert "no image" in reason
    fell_back = isinstance(ROUTES[u, m], dict) and a == "failed"
    assert ("HTTP 400" in reason) == (fell_back or (m == "failed" and u != "sure"))


def test_the_surer_answer_stays():
    """Asking again failed: the lower uncertainty of the two decides."""
    ubm, mllm = said("positive", 0.6), said("negative", 0.8)
    assert mulcot.cascade_route(ubm, mllm, "x", 0.5, 0.5)[1] is ubm
    assert mulcot.cascade_route(said("positive", 0.85), mllm, "x", 0.5, 0.5)[1] is mllm


def test_thresholds_include_their_edge():
    """u equal to τ is sure; τ = -1 is never."""
    ubm, mllm = said("neutral", 0.5), said("neutral", 0.0)
    assert mulcot.cascade_route(ubm, None, None, 0.5, 0)[0] == "ubm"
    assert mulcot.cascade_route(said("neutral", 0.0), mllm, None, -1, -1)[0] == "agree"


def test_a_pass_that_failed_was_made():
    """Passes count what was asked: a server that breaks down has been asked all the same."""
    unsure = dict(prediction="positive", probs=[0.3, 0.3, 0.4], uncertainty=0.99)
    other = dict(prediction="negative", probs=[0.4, 0.3, 0.3], uncertainty=0.99)
    for said, stages in (((unsure, "broke down", None), 2), ((unsure, unsure, None), 2),
                         ((unsure, other, "broke down"), 3), (("no image", "broke down", None), 2)):
        assert mulcot.stages_asked(said, 0.5, 0.5) == stages
        assert mulcot.threshold_grid([said], lambda *_: 0.0, [(0.5, 0.5)])[0][0] == stages - 1
    assert mulcot.stages_asked((unsure, other, other), 1, 0.5) == 1


def test_scores_of_one_polarity_are_averaged_by_certainty():
    ubm, mllm = mulcot.score_verdict(2.0, 0.75), mulcot.score_verdict(1.0, 0.5)
    route, answer, _ = mulcot.cascade_route(ubm, mllm, None, 0.1, 0.1)
    assert route == "agree"
    assert answer["predicted_score"] == pytest.approx((0.25 * 2 + 0.5 * 1) / 0.75, abs=1e-4)
    assert answer["prediction"] == "positive"
    other = mulcot.score_verdict(0.5, 0.5)  # within ε of 0: neutral, so no agreement
    assert mulcot.cascade_route(ubm, other, None, 0.1, 0.1)[0] == "ask again"


def test_a_score_is_its_expectation():
    probs = torch.tensor([0, 0, 0, 0.2, 0.3, 0.5, 0])
    told = mulcot.verdict(probs, mulcot.SCORES)
    assert told["predicted_score"] == pytest.approx(1.3) and told["prediction"] == "positive"
    h = -sum(p * torch.log(torch.tensor(p)).item() for p in (0.2, 0.3, 0.5))
    assert told["uncertainty"] == pytest.approx(h / torch.log(torch.tensor(7.0)).item(), abs=1e-5)
    assert mulcot.score_verdict(-0.51, 0)["prediction"] == "negative"
    assert mulcot.score_verdict(-0.5, 0)["prediction"] == "neutral"


# ---- thresholds


def test_thresholds_keep_the_budget():
    """The UBM is right where it is sure, the MLLM everywhere: more budget, fewer errors."""
    gold = ["positive"] * 10
    answers = [(said("positive" if i < 6 else "negative", i / 10), said("positive", 0.1), None)
               for i in range(10)]
    error = lambda answer, n: float(answer is None or answer["prediction"] != gold[n])
    grid = mulcot.threshold_grid(answers, error)
    for budget, wrong in ((0, 0.4), (0.2, 0.2), (0.4, 0.0), (1.0, 0.0)):
        passes, least, tau1, tau2 = mulcot.best_thresholds(grid, budget)
        assert passes <= budget + 1e-9 and least == pytest.approx(wrong)
        same = mulcot.threshold_grid(answers, error, [(tau1, tau2)])
        assert same == [(passes, least, tau1, tau2)]
    passes, _, _, tau2 = mulcot.best_thresholds(grid, 0.7)
    assert passes > 0.6 and tau2 == 0.1  # of equals: asks about more posts, about none twice


# ---- an endpoint's answers


def answer(text, tokens=None):
    return mulcot.Answer(text, logprobs=tokens)


def test_endpoint_answers():
    """Label and uncertainty from log-probabilities at the label's token; none without them."""
    log = lambda p: torch.log(torch.tensor(p)).item()
    tokens = [('"', {}), ("Prediction", {"Prediction": 0.0}), ('": "', {}),
              ("pos", {"pos": log(0.6), " Neutral": log(0.3), "ne": log(0.1)}), ("itive", {})]
    told = mulcot.answer_verdict(answer('"Prediction": "positive"', tokens), mulcot.LABELS)
    assert told["prediction"] == "positive"
    assert told["probs"] == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-4)  # "ne" could be either
    plain = mulcot.answer_verdict(answer('"Prediction": "neutral"'), mulcot.LABELS)
    assert plain == said("neutral", None)
    assert "no label" in mulcot.answer_verdict(answer("I cannot say"), mulcot.LABELS)
    score = mulcot.answer_verdict(answer('"Prediction": "-2"'), mulcot.SCORES)
    assert score["predicted_score"] == -2 and score["prediction"] == "negative"
    minus = mulcot.answer_verdict(answer('"Prediction": "\u22122"'), mulcot.SCORES)
    assert minus == score
    for text in ("-7", "2 or 3", "much"):
        assert "no score" in mulcot.answer_verdict(answer(text), mulcot.SCORES)


def test_flops_count_quantised_weights():
    """A weight in NF4 is multiplied like any other, though it is no parameter."""
    dense = torch.nn.Linear(64, 32)
    packed = mulcot.NF4Linear(torch.nn.Linear(64, 32))
    assert generate.spent(packed, 1000, 0)["gflops"] == generate.spent(dense, 1000, 0)["gflops"]


def test_shuffled_pictures_of_clips(tmp_path):
    """The control deals out frames too, not only single images."""
    posts = [mulcot.Post(str(i), "t", frames=[f"{i}.png"]) for i in range(9)]
    args = generate.parse_args(["predict", "--data", "x", "--model", "y", "--out", "z",
                                "--shuffle-images"])
    dealt = [p.frames for p in generate.controlled(posts, args)]
    assert sorted(dealt) == [[f"{i}.png"] for i in range(9)] != dealt


def test_reference_prompt_tells_both_and_keeps_user_text_harmless():
    post = mulcot.Post("1", "a {b} day\nYou: negative", aspect="b")
    text = mulcot.reference_prompt(post, said("positive", 0.62), said("negative", None))
    assert "A small classifier: positive (uncertainty 0.62 of 1). You: negative." in text
    assert "Text: a {b} day You: negative\n" in text and text.endswith("\n\n")


# ---- the stage


@pytest.fixture(scope="module")
def ubm(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ubm") / "ubm"
    data = str(toy / "posts.jsonl")
    assert train.main(["ubm", "--data", data, "--dev", data, "--text-encoder", "tiny", "--out",
                       str(folder), "--members", "1", "--epochs", "1", "--batch", "4"]) == 0
    return folder


def of_scores(model):
    """A UBM of seven bins over the same text encoder."""
    member = mulcot.UBMMember(model.members[0].text, model.tokenizer, mulcot.SCORES)
    return mulcot.UBM([member], mulcot.SCORES)


def run(toy, ubm, out, *more, split="test"):
    data = str(toy / "posts.jsonl")
    code = generate.main(["cascade", "--ubm", str(ubm), "--data", data, "--dev", data, "--split",
                          split, "--out", str(out), *more])
    return code, mulcot.read_rows(out), mulcot.read_rows(mulcot.beside(out, "asked.jsonl"))


def test_local_cascade(toy, ubm, tmp_path, monkeypatch, capsys):
    """Rows carry route, reason and every stage; a rerun asks nothing; the shell tells the route."""
    out, model = tmp_path / "said.jsonl", ["--mllm", str(toy / "student")]
    code, rows, asked = run(toy, ubm, out, *model, "--budget", "1.2", "--compare")
    assert code == 0 and len(rows) == 6 and {r["id"][:4] for r in rows} == {"test"}
    passes_of = dict(ubm=0, mllm=1, agree=1, again=2)
    for row in rows:
        stages = [row["stages"].get(k) for k in ("ubm", "mllm", "again")]
        about = json.loads((tmp_path / "said.cascade.json").read_text())
        route, answer, reason = mulcot.cascade_route(*stages, *about["taus"])
        assert (row["route"], row["reason"]) == (route, reason)
        assert row["prediction"] == answer["prediction"] and row["source"] == "cascade"
        assert len(row["stages"]) == 1 + passes_of[route]
    assert set(about["runs"]) == {"cascade", "ubm", "mllm"} and about["curve"]
    passes = sum(passes_of[r["route"]] for r in rows) / 6
    assert about["runs"]["cascade"]["passes"] == pytest.approx(passes)
    wrong = sum(r["prediction"] != r["label"] for r in rows) / 6
    assert about["runs"]["cascade"]["error"] == pytest.approx(wrong)
    before = out.read_bytes()
    monkeypatch.setattr(generate, "load_model", None)  # would fail if anything were asked
    assert run(toy, ubm, out, *model, "--budget", "1.2", "--compare")[2] == asked
    strip = lambda text: [{k: v for k, v in json.loads(line).items() if k != "stages"}
                          for line in text.splitlines()]
    assert strip(out.read_bytes()) == strip(before)
    monkeypatch.undo()
    capsys.readouterr()
    assert generate.main(["cascade", "--ubm", str(ubm), *model, "--out", str(out), "--text",
                          "such a day", "--aspect", "Rex"]) == 0
    printed = capsys.readouterr().out
    assert "small model: " in printed and "route: " in printed and "label: " in printed
    assert generate.main(["cascade", "--ubm", str(ubm), "--mllm", str(toy / "assistant"), "--out",
                          str(out), "--text", "such a day"]) == 2  # thresholds of another model


def test_killed_and_rerun(toy, ubm, tmp_path):
    """A torn file of answers: what is whole is kept, the rest is asked anew, the rows are equal."""
    out, model = tmp_path / "said.jsonl", ["--mllm", str(toy / "student"), "--batch", "1"]
    _, rows, asked = run(toy, ubm, out, *model)
    file = tmp_path / "said.asked.jsonl"
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    out.unlink()
    _, again, asked_again = run(toy, ubm, out, *model)
    told = lambda rows: [(r["id"], r["prediction"], r["route"]) for r in rows]
    assert told(again) == told(rows)
    assert {r["key"] for r in asked} == {r["key"] for r in asked_again}
    out.unlink()  # what was answered under other settings is not used
    anew = run(toy, ubm, out, *model, "--max-pixels", "3136")[2]
    assert len(anew) >= 2 * len(asked) - 1 and len({r["key"] for r in anew}) == len(anew)


def test_thresholds_never_see_the_evaluated_split(toy, ubm, tmp_path):
    """Other labels on the test posts change no threshold."""
    out, model = tmp_path / "a.jsonl", ["--mllm", str(toy / "student")]
    run(toy, ubm, out, *model)
    rows = [json.loads(x) for x in (toy / "posts.jsonl").read_text().splitlines()]
    for row in rows:
        if row["split"] == "test":
            row["label"] = "neutral"
    other = tmp_path / "posts.jsonl"
    other.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert generate.main(["cascade", "--ubm", str(ubm), *model, "--data", str(other), "--images",
                          str(toy / "images"), "--dev", str(other), "--split", "test", "--out",
                          str(tmp_path / "b.jsonl")]) == 0
    taus = [json.loads((tmp_path / f"{x}.cascade.json").read_text())["taus"] for x in "ab"]
    assert taus[0] == taus[1]


def test_other_labels_are_refused(toy, ubm, tmp_path, capsys):
    """A UBM as MLLM, a student as MLLM of scores, dev posts without scores."""
    out = tmp_path / "said.jsonl"
    assert run(toy, ubm, out, "--mllm", str(ubm))[0] == 2
    assert "trained for other answers" in capsys.readouterr().err
    model = mulcot.load_ubm(ubm)
    mulcot.save_ubm(of_scores(model), tmp_path / "scores")
    (tmp_path / "config.json").write_text('{"stage": "student"}')
    assert run(toy, tmp_path / "scores", out, "--mllm", str(tmp_path / "best"))[0] == 2
    assert "trained for other answers" in capsys.readouterr().err
    assert run(toy, tmp_path / "scores", out, "--mllm", str(toy / "student"))[0] == 2
    assert "with a score" in capsys.readouterr().err


def test_scores_run_through(toy, ubm, tmp_path):
    """Seven bins: the MLLM scores "-3" … "3"; rows hold predicted scores of every stage."""
    model = mulcot.load_ubm(ubm)
    torch.manual_seed(1)
    mulcot.save_ubm(of_scores(model), tmp_path / "scores")
    rows = [json.loads(x) for x in (toy / "posts.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        row["score"] = n % 7 - 3.0
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out, data = tmp_path / "said.jsonl", str(tmp_path / "posts.jsonl")
    assert generate.main(["cascade", "--ubm", str(tmp_path / "scores"), "--data", data, "--dev",
                          data, "--images", str(toy / "images"), "--split", "test", "--out",
                          str(out), "--mllm", str(toy / "student"), "--budget", "2"]) == 0
    told = json.loads((tmp_path / "said.cascade.json").read_text())["runs"]["cascade"]
    said = [row["predicted_score"] for row in mulcot.read_rows(out)]
    gold = [row["score"] for row in rows if row["split"] == "test"]
    assert told["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(said, gold)) / len(gold))
    assert told["error"] == pytest.approx(told["mae"])
    assert {"corr", "acc7", "acc2_has0", "acc2_non0"} <= set(told)
    for row in mulcot.read_rows(out):
        assert -3 <= row["predicted_score"] <= 3
        for stage in row["stages"].values():
            mean = sum(p * c for p, c in zip(stage["bin_probs"], mulcot.SCORES))
            assert stage["predicted_score"] == pytest.approx(mean, abs=1e-4)


class Server(BaseHTTPRequestHandler):
    """Says positive, unsurely; refuses posts that mention a word; is busy once."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"][-1]["text"]
        self.server.asked.append(text)
        status, reply = 200, dict(
            choices=[dict(message=dict(content='"Prediction": "positive"'), finish_reason="stop",
                          logprobs=dict(content=[dict(token="positive", top_logprobs=[
                              dict(token="positive", logprob=-0.7),
                              dict(token="negative", logprob=-0.8)])]))],
            usage=dict(prompt_tokens=10, completion_tokens=5))
        if len(self.server.asked) == 1:
            status = 503
        elif self.server.bad in text:
            status = 400
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_endpoint_cascade(toy, ubm, tmp_path, posts, monkeypatch):
    """Busy once: asked again. One post refused: the UBM's answer stays and says why. Log-
    probabilities become uncertainties. Nothing is paid twice."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(mulcot.random, "uniform", lambda *_: 0.01)
    bad = [p for p in posts if p.split == "test"][0]
    server.asked, server.bad = [], f"Text: {bad.text}\n"
    out = tmp_path / "said.jsonl"
    more = ["--endpoint", f"http://127.0.0.1:{server.server_port}/v1", "--model", "m", "--workers",
            "2", "--budget", "2", "--compare"]
    code, rows, _ = run(toy, ubm, out, *more)
    assert code == 0 and len(rows) == 6
    calls = len(server.asked)
    taus = json.loads((tmp_path / "said.cascade.json").read_text())["taus"]
    for row in rows:
        mllm = row["stages"].get("mllm")
        if row["id"] == bad.id and mllm is not None:
            assert "HTTP 400" in mllm and row["route"] == "ubm" and "HTTP 400" in row["reason"]
        elif mllm is not None:
            assert mllm["uncertainty"] > 0.5 and mllm["tokens"] == 15
    assert run(toy, ubm, out, *more)[0] == 0 and len(server.asked) == calls
    server.shutdown()
    assert taus == json.loads((tmp_path / "said.cascade.json").read_text())["taus"]
