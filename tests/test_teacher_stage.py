"""The teacher stage against a real HTTP server on this machine that fails on a seeded plan."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

import generate
from mulcot import Endpoint, Post, Request, parse_reasoning, read_rows, sibling, write_rows
from toy import ToyTeacher, toy_posts

KEY = "sk-very-secret-0123456789"


class Teacher(BaseHTTPRequestHandler):
    """Answers as the toy teacher would, after a seeded share of faults of every kind."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"][-1]["text"]
        with server.lock:
            server.calls.append((text, body["temperature"], body["max_tokens"]))
            fault = server.fault(text)
        if fault == "reset":
            self.connection.close()
            return
        time.sleep(server.delay)
        if isinstance(fault, int):
            return self.send(fault, f"no, says {fault}; key {self.headers['Authorization']}",
                             {"Retry-After": "0.05"} if fault == 429 else {})
        post = server.posts[next(t for t in server.posts if f"Text: {t}\n" in text)]
        request = Request(post, body["messages"], body["temperature"], body["max_tokens"])
        chain = post.columns.get("chain") or ToyTeacher().answer(request).text
        content = {"null": None, "html": "<html>"}.get(fault, chain)
        reply = dict(choices=[dict(message=dict(content=content), finish_reason="stop")])
        if fault != "uncounted":
            reply["usage"] = dict(prompt_tokens=100, completion_tokens=50)
        self.send(200, "<html>busy</html>" if fault == "html" else json.dumps(reply),
                  half=fault == "half")

    def send(self, status, text, headers={}, half=False):
        data = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)
        self.close_connection = half

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 toy posts with texts of their own, without facts, as a user's file."""
    folder = tmp_path_factory.mktemp("world")
    rows, by_text = [], {}
    for n, post in enumerate(toy_posts(folder / "images", {"train": 40, "test": 2}, seed=5)):
        post.text += f" no{n}"
        by_text[post.text] = post
        rows.append(post.row())
        del rows[-1]["facts"]
    write_rows(folder / "posts.jsonl", rows)
    return folder, by_text


@pytest.fixture
def serve(world, monkeypatch):
    """serve(fault=function of the prompt, delay) -> (server, URL)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers, real = [], Endpoint.pause
    monkeypatch.setattr(Endpoint, "pause", lambda self, s: real(self, min(s, 0.05)))

    def start(fault=lambda text: None, delay=0.0):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
        server.posts, server.calls, server.lock = world[1], [], threading.Lock()
        server.fault, server.delay, server.daemon_threads = fault, delay, True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def command(world, url, out, *more):
    return ["teacher", "--data", f"{world[0]}/posts.jsonl", "--endpoint", url, "--model", "big",
            "--out", str(out), *more]


def kept(out):
    return [row["id"] for row in read_rows(out)]


def aside(out):
    return kept(sibling(out, "rejects.jsonl"))


def test_every_fault_at_once_loses_no_post_and_shows_no_key(serve, world, tmp_path, capsys):
    """A fifth of the calls fail in every way; each post ends kept or set aside, once; the key is in
    no file and no line; the summary counts the retries by cause."""
    rng = random.Random(1)
    kinds = ["reset", "half", "html", "null", 408, 409, 429, 500, 502, 503]
    server, url = serve(lambda text: rng.choice(kinds) if rng.random() < 0.2 else None)
    out = tmp_path / "c.jsonl"
    assert generate.main(command(world, url, out, "--workers", "8")) == 0
    ids = kept(out) + aside(out)
    assert len(ids) == 40 == len(set(ids)) and len(kept(out)) > 36
    printed = capsys.readouterr()
    files = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert KEY not in printed.out + printed.err and KEY.encode() not in files
    assert "retries: HTTP 429" in printed.out and "answers a minute" in printed.out
    for row in read_rows(out):
        assert {"stage", "tries", "model", "tokens_in", "seconds", "prompt"} <= row.keys()
        assert row["label_conditioned"] == (row["stage"] == 2) and "attempts" not in row


def test_killed_and_rerun_pays_for_nothing_twice(serve, world, tmp_path):
    """SIGKILL in the middle: rerun, every post is there once, no line is torn, and no call is made
    a second time but those in flight."""
    server, url = serve(delay=0.05)
    out = tmp_path / "c.jsonl"
    process = subprocess.Popen([sys.executable, str(ROOT / "generate.py"),
                                *command(world, url, out, "--workers", "4")],
                               env=os.environ, stderr=subprocess.DEVNULL)
    while len(server.calls) < 25:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    assert generate.main(command(world, url, out, "--workers", "4")) == 0
    ids = kept(out) + aside(out)
    assert len(ids) == 40 == len(set(ids))
    twice = [call for call, n in Counter(server.calls).items() if n > 1]
    assert len(twice) <= 4
    before = len(server.calls)
    assert generate.main(command(world, url, out)) == 0 and len(server.calls) == before


def test_ctrl_c_finishes_what_is_in_flight(serve, world, tmp_path):
    """SIGINT: exit code 130, a word on how to go on, and every answered call is on disk."""
    server, url = serve(delay=0.1)
    out = tmp_path / "c.jsonl"
    process = subprocess.Popen([sys.executable, str(ROOT / "generate.py"),
                                *command(world, url, out, "--workers", "4")],
                               env=os.environ, stderr=subprocess.PIPE, text=True)
    while len(server.calls) < 12:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 130 and "run the same command again" in printed
    assert len(read_rows(sibling(out, "calls.jsonl"))) == len(server.calls)


def test_refused_post_is_set_aside_and_bad_key_stops(serve, world, tmp_path, capsys):
    """400 costs one post, with the server's words; 401 stops the stage at once."""
    bad = next(iter(world[1]))
    server, url = serve(lambda text: 400 if f"Text: {bad}\n" in text else None)
    assert generate.main(command(world, url, tmp_path / "a.jsonl")) == 0
    (row,) = [r for r in read_rows(tmp_path / "a.rejects.jsonl") if r["text"] == bad]
    assert "no, says 400" in row["problem"]
    server, url = serve(lambda text: 401)
    assert generate.main(command(world, url, tmp_path / "b.jsonl", "--workers", "2")) == 2
    printed = capsys.readouterr().err
    assert "no, says 401" in printed and KEY not in printed and len(server.calls) <= 4


def test_a_server_that_refuses_every_post_stops_the_stage(serve, world, tmp_path, capsys):
    """Real servers answer 400 to a wrong model name: no post may be set aside for that."""
    server, url = serve(lambda text: 400)
    for more in ((), ("--max-posts", "3")):
        assert generate.main(command(world, url, tmp_path / "a.jsonl", *more)) == 2
        assert "no, says 400" in capsys.readouterr().err
        assert aside(tmp_path / "a.jsonl") == []


def test_a_server_that_is_down_stops_the_stage_and_a_rerun_asks_again(serve, world, tmp_path):
    """No post is set aside for a dead server; when it is back the same command completes."""
    answering = []
    server, url = serve(lambda text: None if answering else 503)
    assert generate.main(command(world, url, tmp_path / "a.jsonl", "--workers", "2")) == 2
    assert kept(tmp_path / "a.jsonl") == aside(tmp_path / "a.jsonl") == []
    answering.append(True)
    assert generate.main(command(world, url, tmp_path / "a.jsonl", "--workers", "2")) == 0
    assert len(kept(tmp_path / "a.jsonl")) > 36


def test_budget_posts_and_dry_run(serve, world, tmp_path, capsys):
    """--budget-tokens and --max-posts stop early and go on later; --dry-run sends nothing and
    leaves no file."""
    server, url = serve()
    out = tmp_path / "a.jsonl"
    assert generate.main(command(world, url, out, "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "---- explain ----" in printed and "tokens in all" in printed
    assert server.calls == [] == list(tmp_path.iterdir())
    assert generate.main(command(world, url, out, "--max-posts", "5")) == 0
    assert len(kept(out) + aside(out)) == 5
    assert generate.main(command(world, url, out, "--budget-tokens", "3000", "--workers", "1")) == 0
    spent = 150 * len(server.calls)
    assert 3000 <= spent <= 3000 + 150 * 8 and "--budget-tokens 3000" in capsys.readouterr().out
    assert generate.main(command(world, url, out)) == 0
    assert len(kept(out) + aside(out)) == 40


def test_a_budget_needs_a_server_that_counts(serve, world, tmp_path, capsys):
    """A reply without usage would be free for ever: told at the first one, which is kept."""
    server, url = serve(lambda text: "uncounted")
    budget = command(world, url, tmp_path / "a.jsonl", "--budget-tokens", "9", "--workers", "1")
    assert generate.main(budget) == 2 and "counts no tokens" in capsys.readouterr().err
    assert len(server.calls) == len(read_rows(tmp_path / "a.calls.jsonl")) <= 2
    assert generate.main(command(world, url, tmp_path / "a.jsonl")) == 0


def test_answers_to_other_requests_are_not_taken(serve, world, tmp_path):
    """Another --extra-body, the rows deleted as the refusal says: all is asked anew."""
    server, url = serve()
    out = tmp_path / "a.jsonl"
    first = command(world, url, out, "--extra-body", '{"tag": "A"}')
    other = command(world, url, out, "--extra-body", '{"tag": "B"}')
    assert generate.main(first) == 0
    asked = len(server.calls)
    assert generate.main(other) == 2
    out.unlink()
    assert generate.main(other) == 0 and len(server.calls) == 2 * asked


def test_labels_of_test_posts_are_not_sent_unasked(serve, world, tmp_path, capsys):
    """Split test needs a flag; by default only split train is asked about."""
    server, url = serve()
    assert generate.main(command(world, url, tmp_path / "a.jsonl", "--split", "test")) == 2
    printed, errors = capsys.readouterr()
    assert "--allow-test" in errors and "left out   40 of split train" in printed
    assert server.calls == []
    assert generate.main(command(world, url, tmp_path / "a.jsonl", "--split", "test",
                                 "--allow-test")) == 0
    assert len(server.calls) >= 2


def test_retry_after_holds_back_every_worker(serve, world, tmp_path, monkeypatch):
    """After one 429 with Retry-After no thread calls before the time is over."""
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server, url = serve(delay=0.02)
    times, first = [], []

    def fault(text):
        times.append(time.monotonic())
        if len(times) == 10:
            first.append(times[-1])
            return 429
        return None

    server.fault = fault
    monkeypatch.setattr("mulcot._retry_after", lambda header: 1.0 if header else 0.0)
    assert generate.main(command(world, url, tmp_path / "a.jsonl", "--workers", "4")) == 0
    assert not [t for t in times if first[0] + 0.15 < t < first[0] + 0.95]


def test_real_chains_are_accepted_and_contradicting_ones_asked_again(serve, twitter, tmp_path):
    """Real chains in all their forms, served by the endpoint: kept after one call each, but for
    those that contradict their label, which are asked for again in both stages and set aside."""
    rows = json.loads((twitter / "dev_chains.json").read_text())
    whole = [r for r in rows if parse_reasoning(r["cot"]).complete]
    odd = {r["id"] for r in whole if parse_reasoning(r["cot"]).prediction != r["label"]}
    fair = [r for r in whole if r["id"] not in odd]
    rows = [r for r in whole if r["id"] in odd][:10] + fair[:150]
    server, url = serve()
    server.posts = {}
    for row in rows:
        row["text"] = " ".join(f"{row['text']} no{row['id']}".split())
        server.posts[row["text"]] = Post("1", "x", columns={"chain": row["cot"]})
    write_rows(tmp_path / "posts.jsonl", [{k: r[k] for k in ("id", "text", "label")} for r in rows])
    out = tmp_path / "c.jsonl"
    assert generate.main(command([tmp_path], url, out)) == 0
    refused = read_rows(sibling(out, "rejects.jsonl"))
    assert len(kept(out)) == 150 and {int(r["id"]) for r in refused} <= odd and len(refused) == 10
    assert all(r["tries"] == 4 and len(r["attempts"]) == 4 for r in refused)
    assert len(server.calls) == 150 + 4 * 10
