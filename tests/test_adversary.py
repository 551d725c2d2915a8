"""Held against an adversary: two runs at once, hostile replies, numbers without meaning, damaged
files, hostile rows, full disks and signals."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import eval as scores
import generate
import mulcot
import train
from mulcot import (LABELS, Endpoint, InputError, Post, Request, Unreachable, build_messages,
                    read_posts, read_rows, write_rows)
from toy import tiny_encoders

# ---- one run per --out, and signals


@contextlib.contextmanager
def another_run(out):
    """A process that is at work on this --out."""
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import mulcot, argparse\n"
            "def stage(args): print('on', flush=True); time.sleep(60)\n"
            f"sys.exit(mulcot.run_stage(stage, argparse.Namespace(out={str(out)!r})))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_is_refused(tmp_path, capsys, monkeypatch):
    """One line, exit 2 and nothing done while another process runs, also through a link; after its
    kill -9 the stage runs, within another stage too. Dry runs lock nothing; a system without locks
    says so."""
    out, link, ran = tmp_path / "new/out", tmp_path / "link", []
    link.symlink_to(out)
    with another_run(out):
        assert mulcot.run_stage(ran.append, Namespace(out=str(link))) == 2 and not ran
        assert capsys.readouterr().err.startswith("error: another run is at work on --out")
        assert mulcot.run_stage(ran.append, Namespace(out=str(out), dry_run=True)) == 0 and ran
    nested = lambda args: mulcot.run_stage(ran.append, args)  # as tests/demo.py runs stages
    assert mulcot.run_stage(nested, Namespace(out=str(out))) == 0 and len(ran) == 2
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert mulcot.run_stage(ran.append, Namespace(out=str(out))) == 0 and len(ran) == 3
    assert "nothing keeps a second run from --out" in capsys.readouterr().out


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_is_as_ctrl_c(tmp_path, number, status):
    with another_run(tmp_path / "out") as process:
        process.send_signal(number)
        err = process.communicate(timeout=20)[1]
    assert process.returncode == status
    assert err == "\ninterrupted; run the same command again to go on\n"


# ---- replies

KEY = "sk-secret-0123456789"
GOOD = dict(choices=[dict(message=dict(content="fine"), finish_reason="stop")])
QUESTION = Request(Post("1", "t", label="neutral"), build_messages(Post("1", "t"), "label"), 0, 9)


def http(body, *headers, status="200 OK"):
    """A reply as bytes. This server answers once a connection, which a client must know: it would
    ask again on one that is just being closed."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def drip(start, piece):
    """A start, then one piece after the other for ever, each before any read's time-out."""
    yield start
    while True:
        time.sleep(0.05)
        yield piece


@pytest.fixture
def serve(monkeypatch):
    """serve(replies, …) -> Endpoint of a raw server; the reply of each connection: bytes or an
    iterator. endpoint.seen: what was sent to it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(mulcot.random, "uniform", lambda *_: 0.0)

    def start(*replies):
        left, seen = iter(replies), []

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                reply, head = next(left), b"".join(iter(self.rfile.readline, b"\r\n"))
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                seen.append(head + self.rfile.read(length))
                with contextlib.suppress(OSError):
                    for piece in [reply] if isinstance(reply, bytes) else reply:
                        self.connection.sendall(piece)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", "m", timeout=0.5,
                            max_retries=len(replies) - 1)
        endpoint.seen = seen
        return endpoint

    return start


def with_logprob(token="positive", likely="positive", logprob=-0.1):
    choice = GOOD["choices"][0] | dict(logprobs=dict(content=[
        dict(token=token, top_logprobs=[dict(token=likely, logprob=logprob)])]))
    return dict(choices=[choice])


BOMB = gzip.compress(bytes(2**27))
BROKEN = {
    "tokens 1e999": http(b'{"usage": {"prompt_tokens": 1e999}, ' + json.dumps(GOOD).encode()[1:]),
    "tokens -1": http(GOOD | dict(usage=dict(prompt_tokens=-1))),
    "tokens of 400 digits": http(GOOD | dict(usage=dict(completion_tokens=10**400))),
    "logprob of 400 digits": http(with_logprob(logprob=-(10**400))),
    "logprob 1000": http(with_logprob(logprob=1000)),
    "logprob NaN": http(with_logprob(logprob=float("nan"))),
    "token a number": http(with_logprob(token=5)), "likely a list": http(with_logprob(likely=[])),
    "finish_reason a list": http(dict(choices=[GOOD["choices"][0] | dict(finish_reason=[1])])),
    "deep nesting": http(b"[" * 100_000), "9 MiB": http(b" " * (9 * 2**20) + b"{}"),
    "a header without end": b"HTTP/1.1 200 OK\r\nA: " + 2**17 * b"a",
    "year 99999999999": http({}, "Retry-After: Wed, 01 Jan 99999999999 00:00:00 GMT", status="503 x"),
    "odd Retry-After": http({}, "Retry-After: \xd9\xa3", status="503 x"),
    "a gzip bomb": http(BOMB, "Content-Encoding: gzip"), "not HTTP": b"\x00\xff" * 100,
    "odd status": http(GOOD, status="abc x"),
    "a length of text": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
    "a dripping body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b" "),
    "dripping headers": drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "dripping chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "endless 100 Continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n")}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_a_reply_can_only_fail_itself(serve, reply):
    """It is asked again, within the time of a call."""
    began = time.time()
    endpoint = serve(reply, http(GOOD))
    assert endpoint(QUESTION).text == "fine" and time.time() - began < 2
    assert sum(endpoint.retries.values()) == 1


@pytest.mark.parametrize("reply, error, message", [
    (drip(b"", b"H"), Unreachable, "no whole reply in 0.5 s; run again"),
    (http(BOMB, "Location: http://127.0.0.1:9/", "Content-Encoding: gzip", status="302 x"),
     InputError, "refused: HTTP 302")], ids=["for ever", "a bomb in a redirect"])
def test_the_last_reply(serve, reply, error, message):
    with pytest.raises(error, match=message):
        serve(reply)(QUESTION)


def test_no_key_and_no_control_character_comes_back(serve, monkeypatch):
    """Not in a 200's text, tokens or an error; broken up by control characters neither. A key like
    vLLM's EMPTY or x is no secret."""
    echo = f"\x1b]0;x\x07{KEY[:5]}\x00{KEY[5:]} and \u009b{KEY}\r\n\tso"
    reply = with_logprob(token=echo, likely=echo)
    reply["choices"][0]["message"] = dict(content=echo)
    answer = serve(http(reply))(QUESTION)
    assert answer.text == "]0;x*** and ***\n\tso"
    assert answer.logprobs == [(answer.text, {answer.text: -0.1})]
    for status in ("401 x", "503 x", f"200 {KEY}"):
        with pytest.raises(InputError) as error:
            serve(http(b"\x1b[31m" + echo.encode(), status=status))(QUESTION)
        assert KEY not in str(error.value) and str(error.value).isprintable()
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert serve(http(dict(choices=[dict(message=dict(content="exact"))])))(QUESTION).text == "exact"


def test_the_environment_gives_no_proxy_and_no_netrc(serve, monkeypatch, tmp_path):
    """The key is sent to the endpoint alone, two questions over one connection; --proxy is used."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login evil password evil\n")
    proxy = serve(http(GOOD))
    url = proxy.url.removesuffix("/v1/chat/completions")
    for name, value in dict(HOME=str(tmp_path), HTTP_PROXY=url, http_proxy=url, ALL_PROXY=url).items():
        monkeypatch.setenv(name, value)

    def both():
        kept_open = http(GOOD).replace(b"Connection: close\r\n", b"")
        yield kept_open
        time.sleep(0.1)
        yield kept_open

    endpoint = serve(both())
    assert endpoint(QUESTION) == endpoint(QUESTION) and proxy.seen == []
    assert f"Authorization: Bearer {KEY}".encode() in endpoint.seen[0] and len(endpoint.seen) == 1
    through = Endpoint("http://host.invalid/v1", "m", allow_http=True, proxy=url)
    assert through(QUESTION).text == "fine"
    assert proxy.seen[0].startswith(b"POST http://host.invalid/v1/chat/completions")


def test_a_broken_answer_is_in_no_journal(serve, tmp_path, monkeypatch):
    """A rerun does not meet it again."""
    write_rows(tmp_path / "p.jsonl", [dict(id="1", text="t", label="neutral")])
    endpoint = serve(http(with_logprob(logprob=1000)), http(GOOD), http(GOOD))
    monkeypatch.setattr(generate, "Endpoint", lambda *_, **__: endpoint)
    assert generate.main(["teacher", "--data", f"{tmp_path}/p.jsonl", "--endpoint", "https://x/v1",
                          "--model", "m", "--max-tries", "1", "--out", f"{tmp_path}/c.jsonl"]) == 0
    texts = [row["answer"]["text"] for row in read_rows(tmp_path / "c.calls.jsonl")]
    assert texts == ["fine", "fine"]


# ---- numbers


def test_no_file_holds_nan(tmp_path):
    """Rows name their post; the file is as it was."""
    file, row = tmp_path / "x.jsonl", dict(id="7", probs=[float("nan")])
    writer = mulcot.RowWriter(file)
    for write in (writer.write, lambda row: write_rows(file, [row])):
        with pytest.raises(InputError, match="x.jsonl.*post 7 .*is a model damaged"):
            write(row)
    with pytest.raises(InputError, match="x.jsonl"):
        mulcot.write_json(file, row)
    assert file.read_bytes() == b""


@pytest.mark.parametrize("how", [["--no-chain"], ["--max-new-tokens", "2"],
                                 ["--decode", "greedy", "--max-new-tokens", "2"]])
def test_a_model_that_yields_nan_stops(how, toy, tmp_path, capsys, monkeypatch):
    """Never "negative" and exit 0; the post or its batch is named."""
    model, processor = mulcot.load_model(toy / "student")
    model.get_input_embeddings().weight.data[:] = torch.nan
    monkeypatch.setattr(generate, "load_trained", lambda *_: (model, processor))
    out, argv = tmp_path / "p.jsonl", ["predict", "--model", "x", *how]
    assert generate.main([*argv, "--data", str(toy / "posts.jsonl"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "damaged?" in error and read_rows(out) == []
    assert "x on the posts" in error or "a row of post" in error
    assert generate.main([*argv, "--text", "so dismal"]) == 2


@pytest.mark.parametrize("problem, cases", [
    ("no distribution", [([0.2, 0.2, 0.2], "neutral"), ([-0.1, 0.6, 0.5], "neutral"),
                         ([0.5, 0.5], "neutral"), ([0, 1, 10**400], "neutral"),
                         ([True, 0, 0], "negative"), ("abc", "neutral")]),
    ("contradict the prediction", [([0.2, 0.3, 0.5], "neutral"), ([0.4, 0.3, 0.3], "positive")]),
    (None, [([0.4, 0.4, 0.2], "neutral"), ([0.3334, 0.3333, 0.3334], "positive"),
            ([0.1, 0.2, 0.7], None), (None, None)])])
def test_probs_that_are_no_distribution(problem, cases, tmp_path):
    """Refused by eval.py, as are those that contradict their prediction; ties do not."""
    for probs, prediction in cases:
        write_rows(tmp_path / "p.jsonl", [dict(id="1", prediction=prediction, probs=probs)])
        wrong = pytest.raises(InputError, match=f"p.jsonl:1: probs .*{problem}")
        with wrong if problem else contextlib.nullcontext():
            scores.prediction_rows(tmp_path / "p.jsonl")


ODD = dict(
    prediction=[dict(id={}), dict(score=10**400), dict(score="1"), dict(model=[1]), dict(route={}),
                dict(source=5), dict(model="x" * 5000), dict(score=5e-324), dict(prediction=[]),
                dict(raw={}), dict(stage={})],
    chain=[dict(tries="3"), dict(stage={}), dict(cot=7), dict(tries=10**400), dict(id=[])],
    reject=[dict(attempts=value) for value in (
        [5], 7, [{}], [dict(stage={}, problem="x")], [dict(stage=2, problem=None)])],
    gold=[dict(stage={}), dict(score=10**400), dict(stage="x")],
    settings=[b"[1]", b'{"seed": {}}', b"[" * 100_000, b"\xff", b""],
    config=[b'{"data": 3}', b"[]", b'{"data": "x.jsonl"}', b'{"data": [5, {}, "\\u0000.jsonl"]}'])


@pytest.mark.parametrize("where", ODD)
def test_eval_ends_in_one_line_or_runs(where, tmp_path, capsys):
    """Whatever stands in a row or beside it: numbers or one line, no traceback."""
    for n, odd in enumerate(ODD[where]):
        o = tmp_path / str(n)
        rows = dict(gold=dict(id="1", text="t", label="neutral", cot="x"), reject=dict(id="2"),
                    prediction=dict(id="1", prediction="neutral", raw="x", model=f"{o}/m/best"),
                    chain=dict(id="1", cot="x", stage=1, tries=1))
        (o / "m").mkdir(parents=True)
        if isinstance(odd, dict):
            rows[where] |= odd
        else:
            (o / dict(settings="prediction.settings.json", config="m/config.json")[where]).write_bytes(odd)
        rows["chain.rejects"] = rows.pop("reject")
        for name, row in rows.items():
            write_rows(o / f"{name}.jsonl", [row])
        code = scores.main([f"{o}/prediction.jsonl", "--gold", f"{o}/gold.jsonl", "--chains",
                            f"{o}/chain.jsonl", "--references", f"{o}/chain.jsonl", "--out", f"{o}/x"])
        err = capsys.readouterr().err
        assert code == 0 or (code == 2 and err.startswith("error: ") and err.count("\n") == 1), odd


# ---- files


def flip(file, at):
    """One bit of a byte."""
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 4
    file.write_bytes(data)


def damages(file):
    """What it may hold instead: cut, empty, foreign, of another shape."""
    data = file.read_bytes()
    return [data[: len(data) // 2], b"", b"[1]", b"[" * 100_000, b"hello", bytes(len(data))]


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """(a finished run of a readout of labels, its command)."""
    folder, data = tmp_path_factory.mktemp("run") / "run", str(toy / "posts.jsonl")
    argv = ["readout", "--data", data, "--dev", data, "--model", str(toy / "student"), "--target",
            "label", "--epochs", "1", "--batch", "6", "--accumulate", "1", "--log-every", "1"]
    assert train.main([*argv, "--out", str(folder)]) == 0
    return folder, argv


@pytest.fixture(scope="module")
def sources(run, posts, tmp_path_factory):
    """{file: (its folder, what reads that)}."""
    folder = tmp_path_factory.mktemp("ubm")
    tiny_encoders(folder, posts)
    mulcot.save_ubm(mulcot.new_ubm(str(folder / "text")), folder / "ubm")
    of_run = "adapter_config.json adapter_model.safetensors mulcot.json head.json head.safetensors"
    return (dict.fromkeys(of_run.split(), (run[0] / "best", mulcot.load_trained))
            | dict.fromkeys(("ubm.json", "ubm.safetensors"), (folder / "ubm", mulcot.load_ubm)))


NAN = float("nan")
TAMPERED = {
    "adapter_config.json": [
        dict(lora_alpha="much"), dict(r=None), dict(lora_alpha=None), dict(r=5), dict(r="x"),
        dict(target_modules=None), dict(target_modules=["q_proj", "lm_head"]),
        dict(target_modules=["q_proj"]), dict(target_modules=[])],
    "head.json": [dict(mean="0"), dict(deviation=0), dict(mean=NAN), dict(target="score")],
    "ubm.json": [dict(temperature=NAN), dict(temperature=-1), dict(temperature="x"),
                 dict(classes=["a"]), dict(classes=5), dict(classes=LABELS[::-1]),
                 dict(members=10**9), dict(members=2)]}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "mulcot.json",
                                  "head.json", "head.safetensors", "ubm.json", "ubm.safetensors"])
def test_damaged_files_are_one_line(sources, tmp_path, name):
    """Every file of an adapter folder and of a UBM, in every way: damaged, of other types and
    ranges, or not fitting the weights beside it; one bit in tensors."""
    source, load = sources[name]
    folder = shutil.copytree(source, tmp_path / "copy")
    config = json.loads((source / name).read_text()) if name.endswith(".json") else {}
    tampered = [json.dumps(config | change).encode() for change in TAMPERED.get(name, ())]
    for data in damages(source / name) + tampered:
        (folder / name).write_bytes(data)
        with pytest.raises(InputError) as error:
            load(folder)
        assert "copy" in str(error.value) or "neither a folder" in str(error.value), data[:200]
        assert "\n" not in str(error.value)
    size = 0 if config else (source / name).stat().st_size
    for at in range(0, size, size // 40 + 1):
        shutil.copy(source / name, folder)
        flip(folder / name, at)
        with contextlib.suppress(InputError):
            got, whole = mulcot.read_tensors(folder / name), mulcot.read_tensors(source / name)
            assert all(torch.equal(got[key], whole[key]) for key in whole), at


def test_half_an_adapter_is_refused(run, tmp_path):
    """Layers left out whole, both halves; also without a digest."""
    folder = shutil.copytree(run[0] / "best", tmp_path / "copy")
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="half a file"):
        mulcot.load_trained(folder)


def test_a_damaged_state_is_seen(run, tmp_path):
    """state.pt is read as it was written, or refused with what to do."""
    out = shutil.copytree(run[0], tmp_path / "run")
    model, _ = mulcot.load_trained(out / "best")
    for name, p in model.named_parameters():
        p.requires_grad = ".lora_" in name or name.startswith("readout.")
    args, file, refused = train.parse_args([*run[1], "--out", str(out)]), out / "state.pt", 0
    whole, read = file.read_bytes(), lambda: str(vars(train.TrainingState(args, model).optimizer))
    values, tried = read(), damages(file)
    for at in torch.randint(len(whole), (40,)).tolist():
        tried.append(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    for data in tried:
        file.write_bytes(data)
        try:
            assert read() == values
        except InputError as e:
            refused += "state.pt is damaged: delete it" in str(e)
    assert refused > 35  # the others are in the archive's own padding


@pytest.mark.parametrize("name, data, code", [
    ("best", None, 2), ("best/adapter_model.safetensors", b"", 2), ("best/head.json", None, 2),
    ("best/adapter_config.json", b"{}", 2), ("log.jsonl", b"[1]\n", 2), ("log.jsonl", None, 0),
    ("log.jsonl", b'{"step": 1}\n{"step": 2, "lo', 0)], ids=lambda x: str(x)[:25])
def test_a_finished_run_must_be_whole(run, tmp_path, capsys, name, data, code):
    """Without its best/ it is not; without its log, or with a torn last line in it, it is."""
    out = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(out / name) if name == "best" else (out / name).unlink()
    if data is not None:
        (out / name).write_bytes(data)
    assert train.main([*run[1], "--out", str(out)]) == code
    printed = capsys.readouterr()
    if code and "best" in name:
        assert f"delete {out} to train anew" in printed.out and str(out / "best") in printed.err
    elif code == 0:
        assert read_rows(out / name) == [dict(step=1)] * bool(data)


def test_damaged_soft_labels(tmp_path):
    """A flipped bit, a cut part, a soft.json of another shape: one line."""
    mulcot.write_json(tmp_path / "soft.json", dict(stage="soft"))
    soft = mulcot.SoftLabels(tmp_path)
    soft.write_part({"a": torch.randn(9, 8)}), soft.write_head(torch.randn(5, 8))
    (part,) = tmp_path.glob("part-*")
    assert mulcot.SoftLabels(tmp_path).read("a").shape == (9, 8)
    flip(tmp_path / "head.safetensors", -5), flip(part, -5)
    with pytest.raises(InputError, match="head.safetensors"):
        soft.read_head()
    odd = damages(part)
    for file, tried in ((part, [part.read_bytes(), *odd]), (tmp_path / "soft.json", odd)):
        for data in tried:
            file.write_bytes(data)
            with pytest.raises(InputError, match=f"{file.name} is missing or damaged"):
                mulcot.SoftLabels(tmp_path)
        part.unlink(missing_ok=True)


@pytest.mark.parametrize("text, problem", [
    ("5", "a:1: "), ("[]", "a:1: "), ("null", "a:1: "), ("[" * 100_000, "a:1: "),
    ('{"where": 1}\n{"where": 1}\n{"id": "x"}\n{"id": "x"}', "a holds id 'x' more than once")],
    ids=lambda x: x[:9])
def test_foreign_row_files(tmp_path, text, problem):
    """Rows that are no objects, and what two runs at once have left."""
    (tmp_path / "a").write_text(text + "\n")
    with pytest.raises(InputError, match=problem):
        mulcot.RowWriter(tmp_path / "a")


# ---- rows and disks


def test_one_row_costs_one_row(tmp_path):
    """Over-long names, a FIFO, a folder in a file's place, a way out of the folder: each is set
    aside, and the good row stays; in an MVSA folder a `../` in an id opens nothing outside."""
    data = tmp_path / "mvsa/data"
    data.mkdir(parents=True), (data / "f.txt").mkdir(), os.mkfifo(data / "p.txt")
    (tmp_path / "secret.txt").write_text("secret"), (data / "1.txt").write_text("fine")
    mulcot.Image.new("RGB", (28, 28)).save(data / "1.jpg")
    names = ["../../secret", f"{tmp_path}/secret", "x" * 5000, "f", "p", "1"]
    (tmp_path / "mvsa/labelResultAll.txt").write_text(
        "ID\tlabel\n" + "".join(f"{name}\tpositive,positive\n" for name in names))
    bad = [dict(image="x" * 5000), dict(image="p.txt"), dict(image="f.txt"), dict(audio="p.txt"),
           dict(audio="x" * 5000), dict(frames="x" * 5000), dict(frames=["p.txt"]),
           dict(image="a\0b"), dict(image="/dev/zero")]
    rows = [dict(id=str(n), text="t") | each for n, each in enumerate(bad, 2)]
    write_rows(data / "posts.jsonl", [*rows, dict(id="1", text="t")])
    for source, count in ((tmp_path / "mvsa", 5), (data / "posts.jsonl", 9)):
        rejects = []
        assert [p.id for p in read_posts(source, rejects=rejects)] == ["1"]
        assert len(rejects) == count


def test_csv_rows(tmp_path):
    """An over-long id costs its row, line ends of CR alone are read, a header that csv refuses is
    named."""
    head, file = "video_id,clip_id,text,label,mode", tmp_path / "a.csv"
    for text in (f"{head}\n{'v' * 5000},1,t,1.0,train\nv,2,t,1.0,train\n", f"{head}\rv,2,t,1.0,train\r"):
        file.write_bytes(text.encode())
        assert [p.id for p in read_posts(file, rejects=[])] == ["v$_$2"]
    file.write_bytes(b"a\rb\nc\n")
    with pytest.raises(InputError, match="a.csv"):
        read_posts(file, rejects=[])


def test_a_single_post_is_checked_as_one_in_a_file(toy, capsys):
    for argv in (["x" * 10_001], [" "], ["\udcff"], ["$T$ " * 99, "--aspect", "y" * 200],
                 ["t", "--image", "nowhere.png"]):
        assert generate.main(["predict", "--model", str(toy / "student"), "--text", *argv]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_full_gpu_is_one_line(tmp_path, capsys):
    """What to lower stands beside torch's own words."""
    def stage(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert mulcot.run_stage(stage, Namespace(out=str(tmp_path / "x"))) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: CUDA out of memory") and "lower --batch" in err


def test_a_full_disk_is_one_line(toy, tmp_path, monkeypatch, capsys):
    """Also where a library calls it something else; and a path that cannot be written."""
    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    argv = ["--model", str(toy / "student"), "--out"]
    assert generate.main(["export", *argv, str(tmp_path / "out")]) == 2
    assert "cannot be written: No space left" in capsys.readouterr().err
    argv += ["/proc/nowhere/x.jsonl", "--data", str(toy / "posts.jsonl"), "--no-chain"]
    assert generate.main(["predict", *argv]) == 2 and "error: " in capsys.readouterr().err
