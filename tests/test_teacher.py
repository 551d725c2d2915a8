"""The teacher: the dialogue of its two stages, the client against a server on this machine, the
stage with the toy teacher, resumed runs."""

import base64
import io
import json
import shutil
import time
from functools import partial

import pytest
from conftest import KEY, chain, chat, torn
from PIL import Image, PngImagePlugin

import toy
from generate import Endpoint
from mulcot import (Answer, InputError, Post, Refused, Request, build_messages, parse_reasoning,
                    read_rows, two_stage_cot)

POST = Post("1", "so lovely", None, "Rex", "positive")
cut = partial(Answer, finish="length")
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


# ---- the dialogue

# answers, options -> per request: stage, temperature, token budget; what was said unaided
DIALOGUES = {
    "right at once": ([RIGHT], {}, [1], [0], [512], "positive"),
    "wrong: the label is given": ([WRONG, RIGHT], {}, [1, 2], [0, 0], [512] * 2, "negative"),
    "incomplete: asked again with more heat": (
        [PART, "", "no", PART, PART, RIGHT], {}, [1, 1, 1, 2, 2, 2], [0, 0.4, 0.8] * 2, [512] * 6,
        None),
    "cut off, though it parses: twice the budget": (
        [cut(RIGHT), cut(WRONG), RIGHT], dict(max_tokens=100), [1] * 3, [0, 0.4, 0.8],
        [100, 200, 400], "positive"),
    "the budget of stage 2 starts anew": (
        [cut(PART), WRONG, RIGHT], dict(max_tokens=64), [1, 1, 2], [0, 0.4, 0], [64, 128, 64],
        "negative"),
    "stage 2 contradicts its label: asked again, set aside": (
        [WRONG, WRONG, chain("neutral"), PART], {}, [1, 2, 2, 2], [0, 0, 0.4, 0.8], [512] * 4,
        "negative"),
    "each stage has its tries": ([PART, WRONG], dict(max_tries=1), [1, 2], [0, 0], [512] * 2, None),
    "never hotter than 1.2": ([PART] * 4 + ["no"], dict(max_tries=5, stage2=False), [1] * 5,
                              [0, 0.4, 0.8, 1.2, 1.2], [512] * 5, None),
    "no stage 2": ([WRONG], dict(stage2=False), [1], [0], [512], "negative"),
    "no stage 2, asked again": (
        [PART, RIGHT], dict(stage2=False), [1, 1], [0, 0.4], [512] * 2, "positive")}


@pytest.mark.parametrize("answers, options, stages, temperatures, budgets, unaided",
                         DIALOGUES.values(), ids=DIALOGUES)
def test_dialogue(answers, options, stages, temperatures, budgets, unaided):
    """What is asked, with what, and what is kept: only stage 2's questions hold the label, and
    every attempt stays on record with what it predicted, right or wrong."""
    asked, row = drive(answers, **options)
    prompts = [request.messages[-1]["content"][-1]["text"] for request in asked]
    assert [1 + ("Given sentiment: positive" in prompt) for prompt in prompts] == stages
    assert [request.temperature for request in asked] == temperatures
    assert [request.max_tokens for request in asked] == budgets
    kept = answers[-1] == RIGHT
    assert row["cot"] == (RIGHT if kept else None) and (row["problem"] is None) == kept
    assert (row["stage"], row["tries"]) == (stages[-1], len(answers))
    assert row["unaided_prediction"] == unaided
    problems = {WRONG: "predicts negative, label is positive", PART: "missing Image_analysis"}
    for attempt, answer, stage, heat in zip(row["attempts"], answers, stages, temperatures):
        text = getattr(answer, "text", answer)
        problem = "truncated" if isinstance(answer, Answer) else problems.get(text, "")
        assert (attempt["problem"] or "").startswith(problem)
        assert (attempt["raw"], attempt["stage"], attempt["temperature"]) == (text, stage, heat)
        assert attempt["prediction"] == parse_reasoning(text).prediction


def test_a_refused_retry_loses_nothing():
    """A server may not know twice the budget: stage 2 follows, and what was paid stays on record,
    as where it refuses stage 2; a refused first question is the post's own fault."""
    def ask(requests):
        if requests[0].max_tokens > 100:
            raise Refused("HTTP 400: max_tokens is too large")
        return answers.pop(0)

    answers = [[Answer(PART, "length", 9, 9)], [Answer(RIGHT, "stop", 1, 1)]]
    (row,) = two_stage_cot([POST], ask, max_tokens=100)
    assert (row["cot"], row["stage"], row["tries"], row["tokens_in"]) == (RIGHT, 2, 2, 10)
    with pytest.raises(Refused):
        two_stage_cot([POST], ask, max_tokens=101)

    def ask(requests):
        if "Given sentiment" in requests[0].prompt:
            raise Refused("HTTP 400: filtered")
        return [Answer(WRONG, "stop", 1, 1)]

    (row,) = two_stage_cot([POST], ask)
    assert (row["cot"], row["stage"], row["tries"], row["tokens_in"]) == (None, 1, 1, 1)
    assert row["unaided_prediction"] == "negative"
    assert row["problem"].endswith("label is positive; then refused: HTTP 400: filtered")


def test_kept_chain_has_the_one_written_form():
    """A chain in Markdown is kept as trained on, its raw text untouched. What failed attempts cost
    counts too."""
    raw = "\n\n".join(f"### {k}\n{v}" for k, v in parse_reasoning(RIGHT).fields.items())
    costs = ((PART, 10, 1), (WRONG, 20, 2), (raw, 40, 4))
    row = drive([Answer(text, "stop", *cost) for text, *cost in costs])[1]
    assert row["cot"] == RIGHT and row["raw"] == raw
    assert (row["tokens_in"], row["tokens_out"]) == (70, 7)


def test_batched_equals_one_by_one(tmp_path):
    """Many posts at once give the rows of each alone, and are asked about in batches; a teacher
    that answers too few requests is a broken invariant, not a shifted row."""
    posts, teacher, sizes = toy.toy_posts(tmp_path, dict(train=60)), toy.ToyTeacher(seed=1), []

    def ask(requests):
        sizes.append(len(requests))
        return teacher(requests)

    together = two_stage_cot(posts, ask)
    assert sizes[0] == 60 > sizes[1] > 0
    assert together == [row for post in posts for row in two_stage_cot([post], ask)]
    with pytest.raises(ValueError, match="shorter"):
        two_stage_cot(posts, lambda requests: teacher(requests)[1:])


# ---- a server on this machine

GOOD = chat(RIGHT, tokens=(9, 4))


def question(post=POST):
    return Request(post, build_messages(post, "unaided"), 0.4, 77)


@pytest.fixture
def connect(serve):
    """connect(plan) -> (Endpoint, its server); endpoint.waits holds the pauses, none is made."""
    def start(plan, **options):
        server = serve(plan)
        endpoint = Endpoint(server.url, "big-model", timeout=2, **options)
        endpoint.waits = []
        endpoint.pause = endpoint.waits.append
        return endpoint, server

    return start


@pytest.mark.parametrize("key, extra, sent", [
    (KEY, {}, dict(temperature=0.4, max_tokens=77)),
    ("", {"max_tokens": None, "max_completion_tokens": 900, "temperature": None, "tag": {"a": 1}},
     {"max_completion_tokens": 900, "tag": {"a": 1}})])
def test_request_and_answer(connect, monkeypatch, key, extra, sent):
    """One POST to chat/completions with the model, the prompt and the budget; tokens come back. The
    key travels in its header and nowhere else; a local server needs none. --extra-body is merged,
    and its nulls remove what a reasoning model refuses."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    endpoint, server = connect([GOOD], extra_body=extra)
    assert endpoint(question()) == Answer(RIGHT, "stop", 9, 4)
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions" and endpoint.waits == []
    assert asked.body == sent | dict(model="big-model", messages=question().messages)
    assert asked.headers.pop("Authorization", "") == (f"Bearer {key}" if key else "")
    assert KEY not in str(vars(asked))


TROUBLE = {
    "too many": (429, "slow down"), "server error": (500, "oops"), "bad gateway": (502, "<html>"),
    "conflict": (409, ""), "time-out": (408, ""), "silent": lambda asked: time.sleep(3),
    "connection closed": None, "half a body": torn(GOOD), "no body": (200, ""),
    "html page": (200, "<html>hello</html>"),
    "no choices": (200, {}), "empty choices": chat("") | dict(choices=[]), "null": (200, None),
    "error with 200": (200, dict(error=dict(message="busy"))),
    "null message": dict(choices=[dict(message=None)])}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_asked_again(connect, trouble):
    """A passing trouble costs one pause and one more request, nothing else."""
    endpoint, server = connect([trouble, GOOD])
    assert endpoint(question()).text == RIGHT and sum(endpoint.retries.values()) == 1
    assert len(server.asked) == 2 and len(endpoint.waits) == 1 and 0.4 < endpoint.waits[0] <= 1


def test_back_off_and_giving_up(connect):
    """Pauses grow, their number is bounded, and the error says how to go on."""
    endpoint, server = connect([(503, "full")] * 4, max_retries=3)
    with pytest.raises(InputError, match="failed 4 times, last: HTTP 503: full"):
        endpoint(question())
    assert len(server.asked) == 4 and len(endpoint.waits) == 3
    assert all(2**i / 2 - 0.1 <= wait <= 2**i for i, wait in enumerate(endpoint.waits))


def test_retry_after(connect):
    """The server's wish in seconds is the least that we wait, of any other wish the pause is ours;
    hours are not waited for."""
    plan = [(429, "", {"Retry-After": wish}) for wish in ("17", "Wed, 21 Oct", "soon", "7200")]
    endpoint, _ = connect([*plan[:3], GOOD])
    assert endpoint(question()).text == RIGHT and len(endpoint.waits) == 3
    assert all(wait > least - 0.1 for wait, least in zip(endpoint.waits, [17, 1, 2]))
    with pytest.raises(InputError, match="asks to wait 7200 s"):
        connect(plan[3:])[0](question())


@pytest.mark.parametrize("sent, text, finish", [
    (chat(None), "", "stop"), (chat("cut", "length"), "cut", "length"),
    (chat("ab", None), "ab", "stop"),
    (chat([dict(type="text", text="a"), dict(type="x"), dict(text="b")]), "ab", "stop"),
    (dict(choices=[dict(message={})]), "", "stop")])
def test_odd_replies(connect, sent, text, finish):
    """Null content is an empty answer, parts are joined, and truncation is reported."""
    answer = connect([sent])[0](question())
    assert (answer.text, answer.finish, answer.tokens_in) == (text, finish, 0)


@pytest.mark.parametrize("status, kind", [
    (400, Refused), (403, Refused), (401, InputError), (402, InputError), (404, InputError),
    (302, InputError)])
def test_refusals_are_final(connect, status, kind):
    """The server's words come back; what no other post would change ends the run."""
    refusal = (status, dict(error="no model big-model"), {"Location": "http://example.invalid"})
    endpoint, server = connect([refusal])
    with pytest.raises(InputError, match=f"HTTP {status}.*no model big-model") as error:
        endpoint(question())
    assert type(error.value) is kind and len(server.asked) == 1 and endpoint.waits == []


def test_the_key_comes_back_in_no_text(connect, monkeypatch):
    """Not in an answer, its tokens or an error, which is shortened after the key is taken out. A
    key like vLLM's EMPTY or x is no secret."""
    token = dict(token=KEY, top_logprobs=[dict(token=KEY, logprob=-0.1)])
    answer = connect([chat(f"key {KEY}", logprobs=dict(content=[token]))])[0](question())
    assert answer.text == "key ***" and answer.logprobs == [("***", {"***": -0.1})]
    for status, before in ((503, 0), (401, 0), (401, 285), (401, 290), (401, 297)):
        with pytest.raises(InputError) as error:
            connect([(status, "." * before + KEY)], max_retries=0)[0](question())
        assert "sk-" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert connect([chat("exact")])[0](question()).text == "exact"
    for key in (KEY[:6] + "\n" + KEY[6:], KEY + "\u2026"):  # no header takes it
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(InputError, match="OPENAI_API_KEY") as error:
            Endpoint("https://host.example/v1", "m")
        assert "sk-" not in str(error.value)


def test_the_environment_gives_no_proxy_and_no_netrc(serve, monkeypatch, tmp_path):
    """The key is sent to the endpoint alone, two questions over one connection; --proxy is used."""
    proxy, server = serve([GOOD]), serve([GOOD, GOOD])
    url = proxy.url.removesuffix("/v1")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login evil password evil\n")
    for name, value in dict(HOME=str(tmp_path), HTTP_PROXY=url, http_proxy=url, ALL_PROXY=url,
                            OPENAI_API_KEY=f" {KEY}\n").items():
        monkeypatch.setenv(name, value)
    endpoint = Endpoint(server.url, "m")
    assert endpoint(question()) == endpoint(question()) and proxy.asked == []
    first, second = server.asked
    assert first.headers["Authorization"] == f"Bearer {KEY}"
    assert first.connection == second.connection
    through = Endpoint("http://host.invalid/v1", "m", allow_http=True, proxy=url)
    assert through(question()).text == RIGHT
    assert proxy.asked[0].path == "http://host.invalid/v1/chat/completions"


def test_images_travel_upright_and_bare(connect, tmp_path):
    """Data URLs of the upright pictures, shrunk, without EXIF (and so GPS), a JPEG's comment or a
    PNG's chunk behind the pixels; then the sound, then the words."""
    exif, image = Image.Exif(), Image.new("RGB", (2000, 1000), "blue")
    image.paste("red", (0, 0, 1000, 1000))
    exif[0x0112], exif[0x010F] = 6, "at home"
    exif.get_ifd(0x8825)[1] = "N"
    image.save(tmp_path / "a.jpg", exif=exif, comment=b"at home")
    text = PngImagePlugin.PngInfo()
    text.add(b"teXt", b"Comment\0at home", after_idat=True)
    image.save(tmp_path / "b.png", pnginfo=text)
    files = [tmp_path / "a.jpg", tmp_path / "b.png"]
    assert all(b"at home" in file.read_bytes() for file in files)
    endpoint, server = connect([GOOD])
    (tmp_path / "c.wav").write_bytes(b"RIFF")
    endpoint(question(Post("1", "t", frames=list(map(str, files)), audio=f"{tmp_path}/c.wav")))
    *parts, sound, words = server.asked[0].body["messages"][0]["content"]
    assert words["type"] == "text"
    assert sound["input_audio"] == dict(data=base64.b64encode(b"RIFF").decode(), format="wav")
    urls = [part["image_url"]["url"].partition(",") for part in parts]
    assert {start for start, _, _ in urls} == {"data:image/jpeg;base64"}
    raw = [base64.b64decode(data) for _, _, data in urls]
    assert not any(b"at home" in data or b"Exif" in data for data in raw)
    upright, wide = (Image.open(io.BytesIO(data)) for data in raw)
    assert upright.size == (560, 1120) and wide.size == (1120, 560)
    assert upright.getpixel((280, 9))[0] > 200 > upright.getpixel((280, 1100))[0]


def test_addresses():
    """https anywhere, http on this machine: posts and key go in the clear only when asked for."""
    for url in ("https://host.example/v1", "http://localhost:8000/v1", "http://127.0.0.1/v1/",
                "http://[::1]:8000/v1"):
        whole = f"{url.rstrip('/')}/chat/completions"
        assert Endpoint(url, "m").url == Endpoint(whole, "m").url == whole
    for url in ("http://10.0.0.1/v1", "http://localhost.example/v1", "host/v1", "ftp://host/v1",
                "", "https://", "https://[half", "http://localhost:port/v1"):
        with pytest.raises(InputError, match="--endpoint"):
            Endpoint(url, "m")
    assert Endpoint("http://10.0.0.1/v1", "m", allow_http=True).url.startswith("http://10.")


# ---- the stage

def teach(folder, out, *more):
    return toy.main(["teacher", "--data", f"{folder}/posts.jsonl", "--out", str(out),
                     "--max-tries", "1", "--batch", "16", *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """posts.jsonl with 150 training and 10 test posts and one bad row, and a whole run's rows."""
    folder = tmp_path_factory.mktemp("whole")
    posts = toy.toy_posts(folder / "images", dict(train=150, test=10), seed=4)
    lines = [json.dumps(p.columns | p.row()) for p in posts]
    (folder / "posts.jsonl").write_text("\n".join([*lines, '{"id": "bad"}']) + "\n")
    assert teach(folder, folder / "c.jsonl") == 0
    return folder


def test_stage_writes_chains_and_rejects(whole):
    """Every training post ends in one of the two files, whole; test posts are never sent."""
    kept, (unread, *refused) = (read_rows(whole / name) for name in ("c.jsonl", "c.rejects.jsonl"))
    assert unread["where"].endswith(":161") and "empty text" in unread["problem"]
    assert {r["id"] for r in kept + refused} == {f"train-{i:04d}" for i in range(150)}
    assert len(kept) + len(refused) == 150 and refused
    for row in kept:
        assert parse_reasoning(row["cot"]).prediction == row["prediction"] == row["label"]
        assert (row["source"], row["model"], row["problem"]) == ("teacher", "toy-0.6", None)
        assert (row["unaided_prediction"] == row["label"]) == (row["stage"] == 1) and row["raw"]
        assert row["tries"] == row["stage"]  # as --max-tries 1 has it
    assert all(a["raw"] and a["problem"] for r in refused for a in r["attempts"])
    assert all("cot" not in r and r["problem"] and "unaided_prediction" in r for r in refused)


def test_stage_all_splits_and_single_stage(whole, tmp_path):
    """--split all takes every post, --no-stage2 keeps unaided chains only. Rows have any name."""
    assert teach(whole, tmp_path / "all", "--split", "all", "--no-stage2") == 0
    kept, (_, *aside) = (read_rows(tmp_path / name) for name in ("all", "all.rejects.jsonl"))
    assert len(kept + aside) == 160 and any(row["split"] == "test" for row in kept)
    assert {row["stage"] for row in kept} == {1}


@pytest.mark.parametrize("name, share", [("c.jsonl", 1.0), ("c.jsonl", 0.3), ("c.jsonl", 0.999),
                                         ("c.jsonl", 0.0), ("c.rejects.jsonl", 0.5)])
def test_stage_resumes(whole, tmp_path, capsys, name, share):
    """Run again it adds nothing; either file cut anywhere it ends with the same rows."""
    for file in whole.glob("c.*"):
        shutil.copy(file, tmp_path)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(share * len(raw))])
    assert teach(whole, tmp_path / "c.jsonl") == 0
    rows, aside = (len(read_rows(whole / file)) for file in ("c.jsonl", "c.rejects.jsonl"))
    assert capsys.readouterr().out.endswith(
        f"\nwrote {rows} rows to {tmp_path}/c.jsonl ({aside} set aside)\n")
    for file in ("c.jsonl", "c.rejects.jsonl"):
        want, got = ([dict(r, seconds=0) for r in read_rows(folder / file)]
                     for folder in (whole, tmp_path))
        assert json.dumps(got) == json.dumps(want)  # key order too
    assert share < 1 or (tmp_path / name).read_bytes() == raw


def test_stage_needs_posts_it_can_use(whole, tmp_path, capsys):
    """No post of the split, ids that two files share, posts that the toy teacher cannot know: one
    line, exit code 2."""
    data, own = whole / "posts.jsonl", tmp_path / "own.jsonl"
    own.write_text('{"id": 1, "text": "t", "label": "neutral"}\n')
    for files, more, problem in (([data], ["--split", "dev"], "no post of split 'dev'"),
                                 ([data, data], [], "occurs in two --data files"),
                                 ([own], [], "the toy teacher only knows toy posts")):
        argv = ["teacher", "--data", *map(str, files), "--out", f"{tmp_path}/c", *more]
        assert toy.main(argv) == 2 and problem in capsys.readouterr().err
