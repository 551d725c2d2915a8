"""The teacher: two stages with retries, the toy teacher, a real local server, resumed runs."""

import base64
import io
import json
import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image, PngImagePlugin

import generate
import toy
from mulcot import (FIELDS, Answer, Endpoint, InputError, Post, Refused, Request, build_messages,
                    data_url, parse_reasoning, read_rows, render_reasoning, sibling, two_stage_cot)

POST = Post("1", "so lovely", None, "Rex", "positive")


def chain(label):
    return render_reasoning({k: f"{k} says so" for k in FIELDS} | {"Prediction": label})


RIGHT, WRONG, PART = chain("positive"), chain("negative"), '"Text_analysis": "x"'


def drive(answers, **options):
    """Plays a scripted teacher of one post -> (the requests it got, the row)."""
    asked, script = [], iter(answers)

    def ask(requests):
        asked.extend(requests)
        answer = next(script)
        return [answer if isinstance(answer, Answer) else Answer(answer)]

    (row,) = two_stage_cot([POST], ask, **options)
    assert next(script, None) is None, "the script has answers left"
    return asked, row


def stages(asked):
    """1 or 2 per request: 2 where the prompt holds the label."""
    prompts = [r.messages[-1]["content"][-1]["text"] for r in asked]
    return [2 if "Given sentiment: positive" in p else 1 for p in prompts]


# ---- the dialogue


def test_right_at_once():
    """A right answer is kept after one question, and the question does not hold the label."""
    asked, row = drive([RIGHT])
    assert stages(asked) == [1] and asked[0].temperature == 0.0 and asked[0].post is POST
    assert (row["stage"], row["tries"], row["problem"]) == (1, 1, None)
    assert row["cot"] == row["raw"] == RIGHT and row["prediction"] == "positive"


def test_wrong_goes_to_stage_two_at_once():
    """A whole but wrong answer is not asked for again; the label is then given."""
    asked, row = drive([WRONG, RIGHT])
    assert stages(asked) == [1, 2] and [r.temperature for r in asked] == [0.0, 0.0]
    assert (row["stage"], row["tries"], row["cot"]) == (2, 2, RIGHT)
    assert row["attempts"][0]["problem"] == "predicts negative, label is positive"


def test_incomplete_is_asked_again_with_more_heat():
    """A retry changes something, and each stage has its own max_tries."""
    asked, row = drive([PART, "", "no", PART, PART, RIGHT], max_tries=3)
    assert stages(asked) == [1, 1, 1, 2, 2, 2]
    assert [r.temperature for r in asked] == [0.0, 0.4, 0.8] * 2
    assert (row["stage"], row["tries"], row["cot"]) == (2, 6, RIGHT)


def test_truncated_gets_twice_the_budget():
    """A cut answer counts as bad even if it parses, right or wrong; the next may be longer."""
    for cut in (RIGHT, WRONG, PART):
        asked, row = drive([Answer(cut, "length"), Answer(cut, "length"), RIGHT], max_tokens=100)
        assert stages(asked) == [1, 1, 1] and [r.max_tokens for r in asked] == [100, 200, 400]
        assert all("truncated" in a["problem"] for a in row["attempts"][:2])
        assert (row["cot"], row["stage"], row["tries"]) == (RIGHT, 1, 3)


def test_a_refused_retry_loses_nothing():
    """A server may not know twice the budget: stage 2 follows, and what was paid stays on record;
    a refused first question is the post's own fault."""
    def ask(requests):
        if requests[0].max_tokens > 100:
            raise Refused("HTTP 400: max_tokens is too large")
        return answers.pop(0)

    answers = [[Answer(PART, "length", 9, 9)], [Answer(RIGHT, "stop", 1, 1)]]
    (row,) = two_stage_cot([POST], ask, max_tokens=100)
    assert (row["cot"], row["stage"], row["tries"], row["tokens_in"]) == (RIGHT, 2, 2, 10)
    with pytest.raises(Refused):
        two_stage_cot([POST], ask, max_tokens=101)


def test_budget_starts_anew_in_stage_two():
    """The doubled budget is for the answers of one stage."""
    asked, _ = drive([Answer(PART, "length"), WRONG, RIGHT], max_tokens=64)
    assert [r.max_tokens for r in asked] == [64, 128, 64]


def test_stage_two_contradiction_is_asked_again_then_set_aside():
    """A chain that contradicts its given label is never kept; every attempt stays on record."""
    asked, row = drive([WRONG, WRONG, chain("neutral"), PART], max_tries=3)
    assert stages(asked) == [1, 2, 2, 2] and [r.temperature for r in asked[1:]] == [0.0, 0.4, 0.8]
    assert row["cot"] is None and row["prediction"] is None and row["tries"] == 4
    assert [a["raw"] for a in row["attempts"]] == [WRONG, WRONG, chain("neutral"), PART]
    assert [a["stage"] for a in row["attempts"]] == [1, 2, 2, 2]
    assert [a["temperature"] for a in row["attempts"]] == [0.0, 0.0, 0.4, 0.8]
    assert [a["problem"] for a in row["attempts"][:3]] == [
        f"predicts {x}, label is positive" for x in ("negative", "negative", "neutral")]
    assert row["problem"] == row["attempts"][-1]["problem"] and "Image" in row["problem"]


def test_without_stage_two():
    """The ablation stops after stage 1 and never gives the label."""
    asked, row = drive([WRONG], stage2=False)
    assert stages(asked) == [1] and row["cot"] is None and row["stage"] == 1
    assert drive([PART, RIGHT], stage2=False)[1]["cot"] == RIGHT


def test_tokens_are_added_up():
    """What failed attempts cost counts too."""
    costs = ((PART, 10, 1), (WRONG, 20, 2), (RIGHT, 40, 4))
    row = drive([Answer(text, "stop", *cost) for text, *cost in costs])[1]
    assert (row["tokens_in"], row["tokens_out"]) == (70, 7)
    row = drive([Answer(WRONG, "stop", 5, 3)], stage2=False)[1]
    assert (row["tokens_in"], row["tokens_out"]) == (5, 3)


def test_kept_chain_has_the_one_written_form():
    """A chain in Markdown is kept as trained on, its raw text untouched."""
    raw = "\n\n".join(f"### {k}\n{v}" for k, v in parse_reasoning(RIGHT).fields.items())
    row = drive([raw])[1]
    assert row["cot"] == RIGHT and row["raw"] == raw


# ---- the toy teacher


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return toy.toy_posts(tmp_path_factory.mktemp("many"), dict(train=500), seed=2)


def ask_toy(teacher, posts, task="predict"):
    """The texts of its answers."""
    golds = [post.label if task == "explain" else None for post in posts]
    answers = teacher([Request(post, build_messages(post, task, gold), 0.0, 512)
                       for post, gold in zip(posts, golds)])
    return [answer.text for answer in answers]


def test_batched_equals_one_by_one(many):
    """Many posts at once give the rows of each alone, and are asked about in batches."""
    posts, teacher, sizes = many[:60], toy.ToyTeacher(seed=1), []

    def ask(requests):
        sizes.append(len(requests))
        return teacher(requests)

    together = two_stage_cot(posts, ask)
    assert sizes[0] == 60 > sizes[1] > 0
    assert together == [row for post in posts for row in two_stage_cot([post], ask)]


def test_one_answer_for_each_request():
    """A teacher that answers too few requests is a broken invariant, not a shifted row."""
    with pytest.raises(ValueError, match="shorter"):
        two_stage_cot([POST, Post("2", "t", label="positive")], lambda requests: [Answer(RIGHT)])


def test_toy_teacher_is_right_as_its_skill_says(many):
    """About 60 % right unaided; some answers are malformed."""
    parsed = [parse_reasoning(text) for text in ask_toy(toy.ToyTeacher(), many)]
    right = sum(r.complete and r.prediction == p.label for r, p in zip(parsed, many)) / len(many)
    assert 0.52 < right < 0.68
    assert 5 < sum(not r.complete for r in parsed) < 60


def test_toy_teacher_sometimes_contradicts_the_given_label(many):
    """Given the label it nearly always follows it, but not always."""
    parsed = [parse_reasoning(text) for text in ask_toy(toy.ToyTeacher(), many, "explain")]
    odd = sum(r.complete and r.prediction != p.label for r, p in zip(parsed, many))
    assert 5 < odd < 60


def test_toy_teacher_is_deterministic(many):
    """The same seed answers alike, another seed or skill does not."""
    texts = {key: ask_toy(toy.ToyTeacher(*key), many[:50])
             for key in ((0.6, 0), (0.6, 1), (1.0, 0))}
    assert texts[0.6, 0] == ask_toy(toy.ToyTeacher(0.6, 0), many[:50])
    assert len(set(map(tuple, texts.values()))) == 3
    labels = [parse_reasoning(text).prediction for text in texts[1.0, 0]]
    assert all(x in (p.label, None) for x, p in zip(labels, many))


def test_toy_teacher_refuses_other_posts():
    """It can only answer for posts whose drawn facts it knows."""
    with pytest.raises(InputError, match="post 1: .*--endpoint"):
        ask_toy(toy.ToyTeacher(), [POST])


# ---- a server on this machine

KEY = "sk-secret-123456"
GOOD = dict(choices=[dict(message=dict(content=RIGHT), finish_reason="stop")],
            usage=dict(prompt_tokens=9, completion_tokens=4))


def reply(content, finish="stop"):
    return dict(choices=[dict(message=dict(content=content), finish_reason=finish)])


class Handler(BaseHTTPRequestHandler):
    """Answers with the next item of server.script: (status, body[, headers]), "reset" or "half"."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, dict(self.headers), body))
        item = self.server.script.pop(0)
        if item == "reset":
            self.connection.close()
            return
        status, body, headers = (200, GOOD, {}) if item == "half" else (*item, {})[:3]
        body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if item == "half" else body)
        self.close_connection = item == "half"

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(*script) -> (Endpoint, server); server.seen holds requests, server.waits pauses."""
    servers, waits = [], []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def start(*script, **options):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.script, server.seen, server.waits = list(script), [], waits
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/v1/"
        endpoint = Endpoint(url, "big-model", timeout=5, **options)
        endpoint.pause = waits.append
        return endpoint, server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def question(post=POST):
    return Request(post, build_messages(post, "predict"), 0.4, 77)


def test_endpoint_request_and_answer(serve):
    """One POST to chat/completions with the model, the prompt and the budget; tokens come back."""
    endpoint, server = serve((200, GOOD))
    assert endpoint(question()) == Answer(RIGHT, "stop", 9, 4)
    (path, headers, body), = server.seen
    sent = json.loads(body)
    assert path == "/v1/chat/completions" and server.waits == []
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("big-model", 0.4, 77)
    assert sent["messages"] == question().messages


TROUBLE = {
    "too many": (429, "slow down"), "server error": (500, "oops"), "bad gateway": (502, "<html>"),
    "conflict": (409, ""), "time-out": (408, ""), "reset": "reset", "half a body": "half",
    "html page": (200, "<html>hello</html>"), "body twice": (200, json.dumps(GOOD) * 2),
    "no body": (200, ""), "no choices": (200, {}),
    "empty choices": (200, dict(choices=[])), "a list": (200, []), "null": (200, None),
    "error with 200": (200, dict(error=dict(message="busy"))),
    "null choice": (200, dict(choices=[None])),
    "null message": (200, dict(choices=[dict(message=None)])),
    "content as object": (200, reply(dict(a=1))), "content as number": (200, reply(5)),
    "odd content parts": (200, reply([1, "a"])), "odd usage": (200, reply("x") | dict(usage=[1])),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_endpoint_asks_again(serve, trouble):
    """A passing trouble costs one pause and one more request, nothing else."""
    endpoint, server = serve(trouble, (200, GOOD))
    assert endpoint(question()).text == RIGHT
    assert len(server.seen) == 2 and len(server.waits) == 1 and 0.4 < server.waits[0] <= 1


def test_endpoint_backs_off_and_gives_up(serve):
    """Pauses grow, their number is bounded, and the error says how to go on."""
    endpoint, server = serve(*[(503, "full")] * 4, max_retries=3)
    with pytest.raises(InputError, match="failed 4 times, last: HTTP 503: full; run again"):
        endpoint(question())
    assert len(server.seen) == 4 and len(server.waits) == 3
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(server.waits))


def test_endpoint_honours_retry_after(serve):
    """The server's wish in seconds, or as a date, is the least that we wait."""
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    wishes = ["17", "2.5", date, "soon"]
    endpoint, server = serve(*[(429, "", {"Retry-After": w}) for w in wishes], (200, GOOD))
    assert endpoint(question()).text == RIGHT
    assert all(wait > least - 0.1 for wait, least in zip(server.waits, [17, 2.5, 80, 4]))
    assert len(server.waits) == 4


@pytest.mark.parametrize("sent, text, finish", [
    (reply(None), "", "stop"), (reply("cut", "length"), "cut", "length"),
    (reply([dict(type="text", text="a"), dict(type="text", text="b")]), "ab", "stop"),
    (reply("x", None), "x", "stop"), (dict(choices=[dict(message={})]), "", "stop")])
def test_endpoint_reads_odd_replies(serve, sent, text, finish):
    """Null content is an empty answer, parts are joined, and truncation is reported."""
    answer = serve((200, sent))[0](question())
    assert (answer.text, answer.finish, answer.tokens_in) == (text, finish, 0)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 302])
def test_endpoint_refusals_are_final(serve, status):
    """A refusal ends the run with the server's words and without the key."""
    words = f"no model big-model for key {KEY}"
    endpoint, server = serve((status, dict(error=words), {"Location": "http://example.invalid"}))
    with pytest.raises(InputError) as error:
        endpoint(question())
    assert f"HTTP {status}" in str(error.value) and "no model big-model" in str(error.value)
    assert KEY not in str(error.value) and len(server.seen) == 1 and server.waits == []


def test_extra_body_is_merged_and_null_removes(serve):
    """What a reasoning model wants: other keys, and none of those it refuses."""
    extra = {"max_tokens": None, "max_completion_tokens": 900, "temperature": None,
             "chat_template_kwargs": {"enable_thinking": False}}
    endpoint, server = serve((200, GOOD), extra_body=extra)
    endpoint(question())
    sent = json.loads(server.seen[0][2])
    assert sent.keys() == {"model", "messages", "max_completion_tokens", "chat_template_kwargs"}
    assert sent["max_completion_tokens"] == 900


@pytest.mark.parametrize("words", [
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    "Unsupported value: 'temperature' does not support 0.4 with this model."])
def test_what_a_reasoning_model_refuses_names_the_remedy(serve, words):
    """All posts would be refused alike, so the stage ends at the first, with what to type."""
    endpoint, server = serve((400, dict(error=dict(message=words))))
    with pytest.raises(InputError, match="max_completion_tokens.*temperature") as error:
        endpoint(question())
    assert type(error.value) is InputError and "--extra-body" in str(error.value)


def test_a_server_without_logprobs_is_not_told_of_reasoning_models(serve):
    """The flag that helps depends on the parameter that the server does not know."""
    words = "Unsupported parameter: 'logprobs' is not supported with this model."
    endpoint, server = serve((400, dict(error=dict(message=words))))
    with pytest.raises(InputError, match="--no-logprobs") as error:
        endpoint(question())
    assert "--extra-body" not in str(error.value)


def test_key_travels_in_its_header_only(serve):
    """Authorization and nothing else: no other header, path or body."""
    endpoint, server = serve((200, GOOD))
    endpoint(question())
    (path, headers, body), = server.seen
    assert headers.pop("Authorization") == f"Bearer {KEY}"
    assert KEY not in path + repr(headers) + body.decode()


def test_no_key_no_header(serve, monkeypatch):
    """Local servers need no key, and then none is sent."""
    monkeypatch.delenv("OPENAI_API_KEY")
    endpoint, server = serve((200, GOOD))
    endpoint(question())
    assert "Authorization" not in server.seen[0][1]


@pytest.mark.parametrize("before", [285, 290, 297])
def test_a_cut_error_text_shows_no_part_of_the_key(serve, before):
    """The server's words are shortened after the key is removed, not before."""
    endpoint, _ = serve((401, "." * before + KEY))
    with pytest.raises(InputError) as error:
        endpoint(question())
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize("key", [KEY + "\n", " " + KEY, KEY[:6] + "\n" + KEY[6:], KEY + "\u2026"])
def test_malformed_key_is_not_shown(serve, monkeypatch, key):
    """A key with a line break or an odd character never ends up in an error text."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    try:
        serve((200, GOOD), max_retries=1)[0](question())
    except InputError as error:
        assert "sk-se" not in str(error) and "123456" not in str(error)


def test_images_travel_upright_and_bare(serve, tmp_path):
    """A data URL of the upright picture, without its EXIF (and so without GPS), shrunk."""
    exif, image = Image.Exif(), Image.new("RGB", (2000, 1000), "blue")
    image.paste("red", (0, 0, 1000, 1000))
    exif[0x0112], exif[0x010F] = 6, "CameraMaker"
    exif.get_ifd(0x8825)[1] = "N"
    image.save(tmp_path / "x.jpg", exif=exif)
    assert Image.open(tmp_path / "x.jpg").getexif().get_ifd(0x8825)
    endpoint, server = serve((200, GOOD))
    endpoint(question(Post("1", "t", str(tmp_path / "x.jpg"))))
    part, words = json.loads(server.seen[0][2])["messages"][0]["content"]
    start, _, data = part["image_url"]["url"].partition(",")
    raw = base64.b64decode(data)
    got = Image.open(io.BytesIO(raw))
    assert (part["type"], words["type"], start) == ("image_url", "text", "data:image/jpeg;base64")
    assert got.size == (560, 1120)
    assert got.getpixel((280, 9))[0] > 200 > got.getpixel((280, 1100))[0]
    assert not got.getexif() and b"Exif" not in raw and b"CameraMaker" not in raw


@pytest.mark.parametrize("url", ["http://10.0.0.1/v1", "http://host.example/v1", "ftp://host/v1",
                                 "http://localhost.evil.example/v1", "host/v1", "",
                                 "http://127.0.0.1@evil.example/v1", "file:///etc/hostname",
                                 "https://[half", "https://", "http://localhost:port/v1",
                                 "http://evil.example\\@127.0.0.1/v1"])
def test_plain_http_to_others_is_refused(url):
    """Posts and key go in the clear only to this machine, or when asked for."""
    with pytest.raises(InputError, match="--endpoint"):
        Endpoint(url, "m")


@pytest.mark.parametrize("url", ["https://host.example/v1", "http://localhost:8000/v1",
                                 "http://127.0.0.1/v1", "http://[::1]:8000/v1"])
def test_allowed_urls(url):
    """https anywhere, http on this machine; --allow-http lifts the rule."""
    assert Endpoint(url, "m").url == f"{url}/chat/completions"
    assert Endpoint("http://10.0.0.1/v1", "m", allow_http=True).url.startswith("http://10.")


# ---- the stage


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """posts.jsonl with 150 training and 10 test posts, and one bad row."""
    folder = tmp_path_factory.mktemp("data")
    posts = toy.toy_posts(folder / "images", dict(train=150, test=10), seed=4)
    lines = [json.dumps(p.row()) for p in posts]
    (folder / "posts.jsonl").write_text("\n".join([*lines, '{"id": "bad"}']) + "\n")
    return folder / "posts.jsonl"


def teach(data, out, *more):
    return toy.main(["teacher", "--data", str(data), "--out", str(out), "--max-tries", "1",
                     "--batch", "16", *more])


def untimed(path):
    """The rows without their seconds, order and key order included."""
    return [json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in read_rows(path)]


def test_stage_writes_chains_and_rejects(data, tmp_path, capsys):
    """Every training post ends in one of the two files, whole; test posts are never sent."""
    out = tmp_path / "chains.jsonl"
    assert teach(data, out) == 0
    kept, aside = read_rows(out), read_rows(sibling(out, "rejects.jsonl"))
    unread, refused = aside[0], aside[1:]
    assert unread["where"].endswith(":161") and "empty text" in unread["problem"]
    assert {r["id"] for r in kept + refused} == {f"train-{i:04d}" for i in range(150)}
    assert len(kept) + len(refused) == 150 and refused
    for row in kept:
        assert parse_reasoning(row["cot"]).prediction == row["prediction"] == row["label"]
        assert (row["source"], row["model"], row["problem"]) == ("teacher", "toy-0.6", None)
        assert row["stage"] in (1, 2) and row["tries"] == row["stage"] and row["raw"]
    assert all(a["raw"] and a["problem"] for r in refused for a in r["attempts"])
    assert all("cot" not in r and r["problem"] for r in refused)
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last == f"wrote {len(kept)} rows to {out} ({len(aside)} set aside)"


def test_stage_all_splits_and_single_stage(data, tmp_path):
    """--split all takes every post, --no-stage2 keeps only unaided chains."""
    assert teach(data, tmp_path / "all", "--split", "all") == 0
    assert teach(data, tmp_path / "one", "--no-stage2") == 0
    rows = read_rows(tmp_path / "all") + read_rows(tmp_path / "all.rejects.jsonl")[1:]
    assert len(rows) == 160 and any(r["split"] == "test" for r in rows)
    assert {r["stage"] for r in read_rows(tmp_path / "one")} == {1}


def test_stage_resumes(data, tmp_path):
    """Run again it adds nothing; cut anywhere and run again it ends with the same rows."""
    out, aside = tmp_path / "c.jsonl", tmp_path / "c.rejects.jsonl"
    assert teach(data, out) == 0
    whole, refused, raw = untimed(out), untimed(aside), out.read_bytes()
    assert teach(data, out) == 0
    assert out.read_bytes() == raw and untimed(aside) == refused
    for cut in (len(raw) // 3, len(raw) - 1, 10, 0):
        out.write_bytes(raw[:cut])
        assert teach(data, out) == 0
        assert untimed(out) == whole and untimed(aside) == refused


def test_stage_resumes_lost_rejects(data, tmp_path):
    """A run killed before its first reject was on disk writes the same rejects again."""
    out, aside = tmp_path / "c.jsonl", tmp_path / "c.rejects.jsonl"
    assert teach(data, out) == 0
    whole, refused, raw = untimed(out), untimed(aside), aside.read_bytes()
    aside.write_bytes(raw[: len(raw) // 2])
    assert teach(data, out) == 0
    assert untimed(out) == whole and untimed(aside) == refused


def test_stage_keeps_ids_unique(data, tmp_path):
    """Files that share ids give each id one row (or are refused): ids name posts later on."""
    out = tmp_path / "c.jsonl"
    code = toy.main(["teacher", "--data", str(data), str(data), "--out", str(out)])
    ids = [r["id"] for r in read_rows(out)]
    assert code == 2 or (code == 0 and len(ids) == len(set(ids)) > 100)


def test_stage_needs_posts_it_can_use(data, tmp_path, capsys):
    """No post of the split, or posts that the toy teacher cannot know: one line, exit code 2."""
    assert teach(data, tmp_path / "c", "--split", "dev") == 2
    assert "no post of split 'dev'" in capsys.readouterr().err
    own = tmp_path / "own.jsonl"
    own.write_text('{"id": 1, "text": "t", "label": "neutral"}\n')
    assert teach(own, tmp_path / "d") == 2
    assert "the toy teacher only knows toy posts" in capsys.readouterr().err


def test_stage_over_the_wire(serve, tmp_path):
    """The whole stage against a server: a wrong answer, then the label is sent and explained."""
    endpoint, server = serve((200, reply(WRONG)), (429, "wait"), (200, GOOD))
    own = tmp_path / "own.jsonl"
    own.write_text('{"id": 1, "text": "t", "label": "positive"}\n')
    url = endpoint.url.removesuffix("/chat/completions")
    args = ["teacher", "--data", str(own), "--model", "m", "--out", str(tmp_path / "c")]
    assert generate.main([*args, "--endpoint", url]) == 0
    row, = read_rows(tmp_path / "c")
    assert (row["stage"], row["tries"], row["tokens_in"], row["tokens_out"]) == (2, 2, 9, 4)
    assert [b"Given sentiment" in body for _, _, body in server.seen] == [False, True, True]
    assert KEY not in (tmp_path / "c").read_text()


def test_no_comment_travels_with_an_image(tmp_path):
    """A JPEG's comment, a PNG's chunk behind the pixels."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", comment=b"at home")
    text = PngImagePlugin.PngInfo()
    text.add(b"teXt", b"Comment\0at home", after_idat=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png", pnginfo=text)
    for name in ("a.jpg", "b.png"):
        assert b"at home" in (tmp_path / name).read_bytes()
        sent = data_url(tmp_path / name).partition("base64,")[2]
        assert b"at home" not in base64.b64decode(sent)
