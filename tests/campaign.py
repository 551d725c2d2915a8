"""An adversary at random, no part of the test suite (needs fork): kills at random moments in every
stage, hostile rows and replies, damaged files. Prints what was tried and what went wrong.

    python tests/campaign.py --kills 100 --fuzz 100000 --minutes 30

A killed stage, run again, must end as an unbroken one. A hostile row costs itself, a hostile reply
fails itself. With a damaged file a stage ends in one line or as without; posts and weights of the
user's (no digest tells) and JSON may read as other ones. Exit code 1 if anything differs.
"""

import argparse
import contextlib
import json
import os
import random
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OPENAI_API_KEY="sk-campaign-0123")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import mulcot  # noqa: E402
import toy  # noqa: E402

LOOP = "--dev {o}/posts.jsonl --epochs 2 --batch 4 --accumulate 1 --save-every 1 --out {t}/run"
CHAINS, SHORT = "--data {o}/teacher/rows.jsonl", "--batch 4 --max-new-tokens 16 --out {t}/rows.jsonl"
STAGES = {  # {o}: what stages before have left, {t}: where this one writes
    "teacher": "tests/toy.py teacher --data {o}/posts.jsonl --out {t}/rows.jsonl",
    "endpoint": "generate.py teacher --data {o}/posts.jsonl --endpoint http://127.0.0.1:{port}/v1 "
                "--model m --workers 4 --out {t}/rows.jsonl",
    "assistant": f"train.py assistant {CHAINS} --model {{o}}/assistant-base {LOOP}",
    "augment": f"generate.py augment {CHAINS} --model {{o}}/assistant/run/best --samples 2 {SHORT}",
    "soft": f"generate.py soft {CHAINS} --model {{o}}/assistant/run/best --batch 4 --out {{t}}/soft",
    "student": f"train.py student {CHAINS} --model {{o}}/student-base --soft {{o}}/soft/soft {LOOP}",
    "dpo": f"train.py dpo {CHAINS} --rejected {{o}}/wrong.jsonl --adapter {{o}}/student/run/best {LOOP}",
    "readout": "train.py readout --target label --data {o}/posts.jsonl --model {o}/student-base " + LOOP,
    "predict": "generate.py predict --data {o}/posts.jsonl --model {o}/student/run/best --split all "
               + SHORT,
    "ubm": "train.py ubm --data {o}/posts.jsonl --dev {o}/posts.jsonl --text-encoder {o}/text "
           "--epochs 2 --batch 8 --out {t}/run",
    "cascade": "generate.py cascade --ubm {o}/ubm/run --mllm {o}/student/run/best --data "
               "{o}/posts.jsonl --dev {o}/posts.jsonl --batch 4 --out {t}/rows.jsonl",
    "eval": "eval.py {o}/predict/rows.jsonl --gold {o}/posts.jsonl --chains {o}/teacher/rows.jsonl "
            "--out {t}/results"}
CLOCK = {"seconds", "tokens_per_s", "date", "command", "costs"}


class Server(BaseHTTPRequestHandler):
    """Answers with a chain whose label depends on the prompt alone."""

    def do_POST(self):
        label = int(mulcot.digest(self.rfile.read(int(self.headers["Content-Length"]))), 16) % 3
        fields = dict.fromkeys(mulcot.FIELDS, "so") | {"Prediction": mulcot.LABELS[label]}
        choice = dict(message=dict(content=mulcot.render_reasoning(fields)))
        self.send_response(200), self.end_headers()
        self.wfile.write(json.dumps(dict(choices=[choice])).encode())

    def log_message(self, *_):
        pass


def forked(work, log=os.devnull):
    """The id of a process that does this work: a fork imports nothing anew."""
    pid = os.fork()
    if pid == 0:
        code, err = 1, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(err, 2), os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with contextlib.suppress(KeyboardInterrupt):
            try:
                code = work()
            except Exception:
                sys.excepthook(*sys.exc_info())
        os._exit(code)
    return pid


def run(command, log, kill_after=None, number=signal.SIGKILL):
    """(exit code, seconds, stderr) of a command line in a process of its own."""
    began, (script, *argv) = time.time(), shlex.split(command)
    pid = forked(lambda: runpy.run_path(str(ROOT / script))["main"](argv), log)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, number)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, time.time() - began, Path(log).read_text(errors="replace")


def content(folder):
    """{file: what it says}, but for the clock; not of pages and resume points."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in sorted(value.items()) if k not in CLOCK}
        return [plain(v) for v in value] if isinstance(value, list) else value

    readers = {".safetensors": lambda path: mulcot.digest(path.read_bytes()),
               ".json": lambda path: plain(json.loads(path.read_text())),
               ".jsonl": lambda path: sorted(map(json.dumps, plain(mulcot.read_rows(path))))}
    return {path: readers[path.suffix](path) for path in folder.rglob("*") if path.suffix in readers}


def set_up(o):
    """Posts, random tiny models and encoders."""
    posts = toy.toy_posts(o / "images", dict(train=12, dev=4, test=4), seed=3)
    mulcot.write_rows(o / "posts.jsonl", [post.row() for post in posts])
    texts = [mulcot.post_prompt(p) + mulcot.FORMATS[task] for p in posts for task in mulcot.FORMATS]
    tokenizer = toy.tiny_tokenizer(texts, 500)
    for size in toy.TINY:
        toy.tiny_model(o / f"{size}-base", size, tokenizer, seed=1)
        mulcot.load_model(o / f"{size}-base")  # imports what the forked processes need
    toy.tiny_encoders(o, posts)


def wrong_chains(o):
    """wrong.jsonl: the teacher's chains with another label in them."""
    rows = mulcot.read_rows(o / "teacher/rows.jsonl")
    for row in rows:
        other = mulcot.LABELS[mulcot.LABELS.index(row["label"]) - 1]
        row["raw"] = row.pop("cot").replace(f'"{row["label"]}"', f'"{other}"')
    mulcot.write_rows(o / "wrong.jsonl", rows)


def damage(data, rng):
    """(how, the bytes after it)."""
    at, flipped = rng.randrange(max(1, len(data))), bytearray(data or b"x")
    flipped[at] ^= 1 << rng.randrange(8)
    return rng.choice([("cut", data[:at]), ("empty", b""), ("foreign", b"[1]\n"),
                       ("flipped", bytes(flipped))])


def break_a_file(stage, command, o, t, whole, rng, log):
    """Damages one file that a stage reads, or has left, and runs it (again) -> (what, verdict)."""
    shutil.rmtree(t, ignore_errors=True)
    shutil.copytree(o / stage, t)
    read = [Path(word) for word in shlex.split(command) if word.startswith(str(o))]
    chosen = rng.choice([path for path in [*read, t, t] if path.exists()])
    if chosen.is_dir():
        chosen = rng.choice([path for path in sorted(chosen.rglob("*")) if path.is_file()])
    if t not in chosen.parents:  # a first run over a damaged input
        shutil.rmtree(t), t.mkdir()
    before = chosen.read_bytes()
    how, after = damage(before, rng)
    chosen.write_bytes(after)
    code, _, err = run(command, log)
    if t not in chosen.parents:
        chosen.write_bytes(before)
    what = f"{stage}, {chosen.relative_to(o)} {how}"
    if code == 2 and err.count("error:") == 1 and "Traceback" not in err:
        return what, "one line"
    if code:
        return what, f"exit {code}: {err[-400:]}"
    written = chosen.relative_to(o).parts[0] in ("try", *STAGES)  # else the user's, without a digest
    weights = written and chosen.suffix in (".safetensors", ".pt")
    if weights or chosen == t / "rows.jsonl" and how in ("cut", "empty"):
        others = content(t) | {chosen: whole.get(chosen)}  # last/ may stay damaged, and is refused
        if (others if weights and chosen in whole else content(t)) != whole:
            return what, "another result, in silence"
    return what, "ran"


def fuzz(count, o, rng, deadline):
    """Hostile rows (files of 500 and as many sound ones) and replies; yields (kind, verdict)."""
    odd = [None, True, 5, -1, 1e308, 10**400, float("nan"), "", "x" * 20_000, "\ud83d", "\0", [], {},
           [1], {"a": 1}, "../x", "/etc/passwd", "$T$", "<|im_end|>", "\x1b[2J", "negative"]
    token = dict(token="neg", logprob=-0.1)
    choice = dict(message=dict(content='"Prediction": "negative"'), finish_reason="stop",
                  logprobs=dict(content=[token | dict(top_logprobs=[token])]))
    answer = dict(choices=[choice], usage=dict(prompt_tokens=1, completion_tokens=2))
    endpoint, reply = mulcot.Endpoint("http://127.0.0.1:9/v1", "m"), SimpleNamespace(headers={})
    endpoint.session = SimpleNamespace(post=lambda *_, **__: contextlib.nullcontext(reply))

    def mutated(value):
        if rng.random() < 0.02:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {key: mutated(v) for key, v in value.items() if rng.random() < 0.99}
        return [mutated(v) for v in value] if isinstance(value, list) else value

    for _ in range(count // 1000):
        lines = [json.dumps(dict(id=f"good {k}", text="so")).encode() for k in range(500)]
        for k in range(500):
            key = rng.choice("id text label image frames audio aspect score cot split x".split())
            line = json.dumps(dict(id=str(k), text="so") | {key: rng.choice(odd)}).encode()
            lines.append(damage(line, rng)[1].replace(b"\n", b" ") if k % 3 == 0 else line)
        rng.shuffle(lines)
        (o / "hostile.jsonl").write_bytes(b"\n".join(lines))
        try:
            posts = mulcot.read_posts(o / "hostile.jsonl", rejects=[])
            good = sum(post.id.startswith("good ") for post in posts)
            yield "rows", "as they should" if good == 500 else f"{500 - good} good rows lost"
        except Exception as e:
            yield "rows", f"{type(e).__name__}: {e}"
        for _ in range(500):
            data = json.dumps(mutated(answer)).encode()
            data = damage(data, rng)[1] if rng.random() < 0.3 else data
            reply.raw = SimpleNamespace(read=lambda *_, **__: data)
            reply.status_code = rng.choice([200, 200, 200, 429, 500, 503])
            try:
                found, _ = endpoint._post({})
                if found:
                    mulcot.to_json([vars(found), mulcot.answer_verdict(found, mulcot.LABELS)], "it")
                    mulcot.check_answer(found.text, "neutral", found.finish)
                yield "replies", "answer" if found else "asked again"
            except Exception as e:
                yield "replies", f"{type(e).__name__}: {e} from {data[:200]}"
        if time.time() > deadline:
            return


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--kills", type=int, default=100, help="stages killed, at random moments")
    p.add_argument("--fuzz", type=int, default=100_000, help="hostile rows and replies")
    p.add_argument("--minutes", type=float, default=30, help="in all; damaged files take the rest")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    o = Path(tempfile.mkdtemp(prefix="campaign"))
    t, log, rng, end = o / "try", o / "log", random.Random(args.seed), time.time() + 60 * args.minutes
    commands, whole, seconds, table = {}, {}, {}, Counter()

    def note(kind, what, verdict, fine="as unbroken, as they should, answer, asked again, one line, ran"):
        fine = verdict in fine.split(", ")
        table[kind, verdict if fine else "DIFFERS"] += 1
        fine or print(f"{kind} {what}: {verdict}", flush=True)

    with contextlib.redirect_stdout(open(os.devnull, "w")):
        set_up(o)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    serving = forked(server.serve_forever)
    for stage, command in STAGES.items():
        command = f"{command} --images {o}/images".format(o=o, t=t, port=server.server_port)
        t.mkdir()
        code, seconds[stage], err = run(command, log)
        assert code == 0, (stage, err)
        commands[stage], whole[stage] = command, content(t)
        t.rename(o / stage)
        if stage == "teacher":
            wrong_chains(o)
        print(f"unbroken   {stage}: {seconds[stage]:.1f} s, {len(whole[stage])} files", flush=True)
    for n in range(args.kills):
        stage, number = [*STAGES][n % len(STAGES)], rng.choice([signal.SIGKILL, signal.SIGTERM])
        t.mkdir()
        for _ in range(rng.choice([1, 1, 2])):
            run(commands[stage], log, rng.uniform(0, seconds[stage]), number)
        code, _, err = run(commands[stage], log)
        same = code == 0 and content(t) == whole[stage]
        note("kills", f"{stage}, {number!r}", "as unbroken" if same else f"exit {code} {err[-300:]}")
        shutil.rmtree(t)
    for kind, verdict in fuzz(args.fuzz, o, rng, time.time() + (end - time.time()) / 3):
        note(kind, "", verdict)
    while time.time() < end:
        stage = rng.choice([*STAGES])
        note("files", *break_a_file(stage, commands[stage], o, t, whole[stage], rng, log))
    os.kill(serving, signal.SIGKILL), shutil.rmtree(o)
    print("\n| what | how it ended | number |\n|---|---|---|")
    for (kind, verdict), n in sorted(table.items()):
        print(f"| {dict(rows='files of 1,000 rows').get(kind, kind)} | {verdict} | {n} |")
    return int(any(verdict == "DIFFERS" for _, verdict in table))


if __name__ == "__main__":
    sys.exit(main())
