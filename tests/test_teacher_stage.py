"""The teacher stage as a user pays for it: a server on this machine that fails by plan, kills,
stops and budgets."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import KEY, ROOT, chat, torn

import generate
from mulcot import LABEL_FORMAT, LABELS, REASON_FORMAT, Request, read_rows, sibling, write_rows
from toy import ToyTeacher, toy_posts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, {text: post}): 42 toy posts with texts of their own, in posts.jsonl as a user's."""
    folder, by_text = tmp_path_factory.mktemp("world"), {}
    for n, post in enumerate(toy_posts(folder / "images", {"train": 40, "test": 2}, seed=5)):
        post.text += f" no{n}"
        by_text[post.text] = post
    write_rows(folder / "posts.jsonl", [post.row() for post in by_text.values()])
    return folder, by_text


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    real = generate.Endpoint.pause
    monkeypatch.setattr(generate.Endpoint, "pause", lambda self, s: real(self, min(s, 0.05)))


def about(by_text, request):
    """The post that a request is about."""
    return by_text[next(text for text in by_text if f"Text: {text}\n" in request.prompt)]


def teacher(world, fault=lambda request: "", delay=0.0):
    """A plan: what the toy teacher says, or what is wrong by fault(request), a status or a word."""
    def plan(request):
        wrong = fault(request)
        if wrong == "closed":
            return None
        time.sleep(delay)
        if isinstance(wrong, int):
            headers = {"Retry-After": "0.05"} if wrong == 429 else {}
            return wrong, f"no, says {wrong}; {request.headers['Authorization']}", headers
        if wrong == "html":
            return 200, "<html>busy</html>"
        sent = request.body
        said = ToyTeacher().answer(Request(about(world[1], request), sent["messages"],
                                           sent["temperature"], sent["max_tokens"])).text
        reply = chat(None if wrong == "null" else said,
                     tokens=None if wrong == "uncounted" else (100, 50))
        return torn(reply) if wrong == "torn" else reply

    return plan


def command(world, server, out, *more):
    return ["teacher", "--data", f"{world[0]}/posts.jsonl", "--endpoint", server.url, "--model",
            "big", "--out", str(out), *more]


def background(argv):
    return subprocess.Popen([sys.executable, str(ROOT / "generate.py"), *argv], env=os.environ,
                            stderr=subprocess.PIPE, text=True)


def kept(out):
    return [row["id"] for row in read_rows(out)]


def aside(out):
    return kept(sibling(out, "rejects.jsonl"))


def test_every_fault_at_once_loses_no_post_and_shows_no_key(serve, world, tmp_path, capsys):
    """A fifth of the calls fail in every way; each post ends kept or set aside, once; the key is in
    no file and no line; the summary counts the retries by cause."""
    rng = random.Random(1)
    kinds = ["closed", "torn", "html", "null", 408, 409, 429, 500, 502, 503]
    server = serve(teacher(world, lambda _: rng.choice(kinds) if rng.random() < 0.2 else ""))
    out = tmp_path / "c.jsonl"
    assert generate.main(command(world, server, out, "--workers", "8")) == 0
    ids = kept(out) + aside(out)
    assert len(ids) == 40 == len(set(ids)) and len(kept(out)) > 36
    printed = capsys.readouterr()
    files = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert KEY not in printed.out + printed.err and KEY.encode() not in files
    assert "HTTP 429" in printed.out and "tokens out" in printed.out
    for row in read_rows(out):
        assert {"stage", "tries", "model", "tokens_in", "seconds", "prompt_sha256"} <= row.keys()
        assert row["label_conditioned"] == (row["stage"] == 2) and "attempts" not in row


def test_killed_and_rerun_pays_for_nothing_twice(serve, world, tmp_path, capsys):
    """SIGKILL in the middle: rerun, every post is there once, no line is torn, and no call is made
    a second time but those in flight. Other flags are refused after the kill and at the end."""
    server, out = serve(teacher(world, delay=0.05)), tmp_path / "c.jsonl"
    argv = command(world, server, out, "--workers", "4")
    process = background(argv)
    while len(server.asked) < 25:
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.2)
    assert generate.main([*argv, "--max-tries", "2"]) == 2
    assert "begun with max_tries = 3, not 2" in capsys.readouterr().err
    assert generate.main(argv) == 0
    ids = kept(out) + aside(out)
    assert len(ids) == 40 == len(set(ids))
    calls = Counter((r.prompt, r.body["temperature"], r.body["max_tokens"]) for r in server.asked)
    assert sum(n > 1 for n in calls.values()) <= 4
    before = len(server.asked)
    assert generate.main([*argv, "--seed", "7"]) == 2 and generate.main(argv) == 0
    assert len(server.asked) == before


def test_ctrl_c_finishes_what_is_in_flight(serve, world, tmp_path):
    """SIGINT: exit code 130, a word on how to go on, and every answered call is on disk."""
    server, out = serve(teacher(world, delay=0.1)), tmp_path / "c.jsonl"
    process = background(command(world, server, out, "--workers", "4"))
    while len(server.asked) < 12:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 130 and "run the same command again" in printed
    assert len(read_rows(sibling(out, "calls.jsonl"))) == len(server.asked)


def test_refusals(serve, world, tmp_path, capsys):
    """400 costs one post, with the server's words; 401 stops the stage at once. Real servers answer
    400 to a wrong model name: where all are refused, no post is set aside for that."""
    bad = next(iter(world[1].values()))
    server = serve(teacher(world, lambda request: 400 if about(world[1], request) is bad else ""))
    assert generate.main(command(world, server, tmp_path / "a.jsonl")) == 0
    (row,) = [r for r in read_rows(tmp_path / "a.rejects.jsonl") if r["id"] == bad.id]
    assert "no, says 400" in row["problem"]
    for status, more in ((401, ()), (400, ()), (400, ("--max-posts", "3"))):
        server = serve(teacher(world, lambda request: status))
        argv = command(world, server, tmp_path / "b.jsonl", "--workers", "2", *more)
        assert generate.main(argv) == 2 and aside(tmp_path / "b.jsonl") == []
        printed = capsys.readouterr().err
        assert f"no, says {status}" in printed and KEY not in printed
        assert status == 400 or len(server.asked) <= 4
        assert status == 400 or "OPENAI_API_KEY" in printed


def test_a_servers_own_words(serve, world, tmp_path, capsys):
    """The first error text of a kind is printed with its post; one post that stays unanswered is
    named with the reason and asked again by a rerun."""
    bad, busy = next(iter(world[1].values())), []

    def fault(request):
        if about(world[1], request) is bad:
            return 503
        busy.append(request)
        return 503 if len(busy) == 1 else ""  # asked again, this post is answered

    server, out = serve(teacher(world, fault)), tmp_path / "a.jsonl"
    assert generate.main(command(world, server, out, "--workers", "2")) == 0
    printed, bar = capsys.readouterr()
    assert bar == ""  # no terminal: a line a minute
    assert printed.count("asked again: post ") == 1 and "HTTP 503: no, says 503" in printed
    assert f"unanswered, run again: post {bad.id}: " in printed
    assert "unanswered 1 posts, run again" in printed
    assert bad.id not in kept(out) + aside(out) and len(kept(out) + aside(out)) == 39


def test_what_asking_again_never_helped_ends_the_stage(serve, world, tmp_path, capsys):
    """A server that is down, or a text-only one that answers pictures with HTTP 500: its words come
    back, few posts are tried, none is set aside; when it answers, the same command completes."""
    answering = []
    server = serve(teacher(world, lambda request: "" if answering else 500))
    argv = command(world, server, tmp_path / "a.jsonl", "--workers", "2")
    assert generate.main(argv) == 2
    error = capsys.readouterr().err
    assert "HTTP 500: no, says 500" in error and "asking again helped no post" in error
    assert len(server.asked) <= 3 * 7
    assert kept(tmp_path / "a.jsonl") == aside(tmp_path / "a.jsonl") == []
    answering.append(True)
    assert generate.main(argv) == 0 and len(kept(tmp_path / "a.jsonl")) > 36


def test_budget_posts_and_dry_run(serve, world, tmp_path, capsys):
    """--budget-tokens and --max-posts stop early and go on later; --dry-run sends nothing. A reply
    without usage would be free for ever: told at the first one, which is kept."""
    server, out = serve(teacher(world)), tmp_path / "a.jsonl"
    argv = command(world, server, out)
    assert generate.main([*argv, "--dry-run"]) == 0 and server.asked == []
    assert generate.main([*argv, "--max-posts", "5"]) == 0
    assert len(kept(out) + aside(out)) == 5
    # a call costs 150 tokens and is expected to cost 100 and its max_tokens, 512
    assert generate.main([*argv, "--budget-tokens", "3000", "--workers", "8"]) == 0
    spent = 150 * len(server.asked)
    assert 3000 - 612 < spent <= 3000
    assert f"{spent} tokens spent of --budget-tokens 3000" in capsys.readouterr().out
    assert generate.main(argv) == 0 and len(kept(out) + aside(out)) == 40
    server, out = serve(teacher(world, lambda request: "uncounted")), tmp_path / "b.jsonl"
    argv = command(world, server, out, "--workers", "1")
    assert generate.main([*argv, "--budget-tokens", "9999"]) == 2
    assert "counts no tokens" in capsys.readouterr().err
    assert len(server.asked) == len(read_rows(tmp_path / "b.calls.jsonl")) <= 2
    assert generate.main(argv) == 0


def test_answers_to_other_requests_are_not_taken(serve, world, tmp_path):
    """Another --extra-body, the rows deleted as the refusal says: all is asked anew, and the rows
    hold the temperature that was sent."""
    server, out = serve(teacher(world)), tmp_path / "a.jsonl"
    first, other = (command(world, server, out, "--extra-body", f'{{"temperature": 0.{x}}}')
                    for x in "35")
    assert generate.main(first) == 0
    asked = len(server.asked)
    assert generate.main(other) == 2
    out.unlink()
    assert generate.main(other) == 0 and len(server.asked) > asked
    assert {row["temperature"] for row in read_rows(out)} == {0.5}


def test_labels_of_test_posts_are_not_sent_unasked(serve, world, tmp_path, capsys):
    """Split test needs a flag; by default only split train is asked about."""
    server = serve(teacher(world))
    argv = command(world, server, tmp_path / "a.jsonl", "--split", "test")
    assert generate.main(argv) == 2
    printed, errors = capsys.readouterr()
    assert "--allow-test" in errors and "left out   40 posts that are not of split test" in printed
    assert server.asked == []
    assert generate.main([*argv, "--allow-test"]) == 0 and len(server.asked) >= 2


def test_a_zero_shot_baseline(serve, world, tmp_path):
    """predict asks a served model by the students' two prompts, which eval.py judges as theirs; a
    refused post is set aside, and a rerun asks nothing."""
    bad = list(world[1].values())[-1]  # one of two; the other is answered before
    server = serve(teacher(world, lambda request: 400 if about(world[1], request) is bad else ""))
    out = tmp_path / "z.jsonl"
    argv = ["predict", *command(world, server, out, "--workers", "1")[1:]]
    assert generate.main(argv) == 0 and aside(out) == [bad.id]
    (row,) = read_rows(out)
    formats = [r.prompt for r in server.asked if about(world[1], r) is not bad]
    assert [p.endswith(f) for p, f in zip(formats, (LABEL_FORMAT, REASON_FORMAT))] == [True, True]
    assert row["prediction"] in LABELS and row["raw"] and row["problem"] is None
    assert row["source"] == "endpoint" and not {"probs", "cot", "fields"} & row.keys()
    before = len(server.asked)
    assert generate.main(argv) == 0 and len(server.asked) == before
    argv[argv.index(str(out))] = str(tmp_path / "none.jsonl")
    assert generate.main([*argv, "--budget-tokens", "1"]) == 0 and len(server.asked) == before
    server = serve(teacher(world, lambda r: 400 if r.prompt.endswith(REASON_FORMAT) else ""))
    argv = ["predict", *command(world, server, tmp_path / "labels.jsonl")[1:]]
    assert generate.main(argv) == 0  # a refused chain takes no label with it
    rows = read_rows(tmp_path / "labels.jsonl")
    assert [row["prediction"] in LABELS for row in rows] == [True, True]
    assert not any("raw" in row for row in rows) and "HTTP 400" in rows[0]["problem"]


def test_retry_after_holds_back_every_worker(serve, world, tmp_path, monkeypatch):
    """After one 429 with Retry-After no thread calls before the time is over."""
    monkeypatch.undo()
    plan = teacher(world, delay=0.02)

    def busy_once(request):
        if request in server.asked[9:10]:
            return 429, "", {"Retry-After": "1"}
        return plan(request)

    server = serve(busy_once)
    assert generate.main(command(world, server, tmp_path / "a.jsonl", "--workers", "4")) == 0
    said = server.asked[9].at
    assert not [request for request in server.asked if said + 0.15 < request.at < said + 0.95]
