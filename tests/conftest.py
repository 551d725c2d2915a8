"""Shared by all tests: the project on the path, no network, toy posts and random tiny models, and
the one fake server."""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # loaders must not wait for a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers are those of a CPU in fp32
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import mulcot  # noqa: E402
from toy import TINY, tiny_encoders, tiny_model, tiny_tokenizer, toy_posts  # noqa: E402

# a shell's background jobs ignore Ctrl-C, and so would the stages that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = ROOT.parent / "shared" / "data" / "twitter2015"


def noise_image(path, size, seed=0):
    """Writes a picture of random pixels: it compresses badly, and no other seed gives it."""
    width, height = size
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.numpy()).save(path)
    return str(path)


def tone(hertz, seconds, rate=16_000):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path, rows):
    """A .jsonl of these rows, also of those that write_rows would refuse."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chain(label, words="one two three", conclusion=None):
    """A whole chain that names its label once, in its conclusion and as its Prediction."""
    fields = {k: f"{k[:4]} {words}" for k in mulcot.FIELDS}
    fields["Final_conclusion"] = conclusion or f"So it is {label}."
    return mulcot.render_reasoning(fields | {"Prediction": label})


def pass_inputs(processor, example, branch):
    """What a Qwen2.5-VL's own forward takes for an example's prefix and one of its branches."""
    ids = torch.tensor([example.prefix + example.branches[branch - 1][0]])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **example.media,
                mm_token_type_ids=(ids == processor.placeholder_id).int())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def twitter():
    """The folder of real posts, where it exists."""
    if not SHARED.is_dir():
        pytest.skip("the real Twitter-2015 folder is not here")
    return SHARED


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with 24 toy posts (train/dev/test) and two random tiny model folders."""
    folder = tmp_path_factory.mktemp("toy")
    posts = toy_posts(folder / "images", {"train": 12, "dev": 6, "test": 6}, seed=3)
    texts = [mulcot.post_prompt(p) + mulcot.FORMATS[task]
             for p in posts for task in ("reason", "label")]
    tokenizer = tiny_tokenizer(texts, 500)
    for size in TINY:
        tiny_model(folder / size, size, tokenizer, seed=1)
    mulcot.write_rows(folder / "posts.jsonl", [p.columns | p.row() for p in posts])
    return folder


@pytest.fixture(scope="session")
def posts(toy):
    return mulcot.read_posts(toy / "posts.jsonl")


@pytest.fixture(scope="session")
def student(toy):
    """(random tiny student in eval mode, its Processor); tests must leave it as they found it."""
    return mulcot.load_model(toy / "student")


@pytest.fixture(scope="session")
def encoders(posts, tmp_path_factory):
    """A folder with a random tiny BERT that knows the toy posts' words, and a ResNet."""
    folder = tmp_path_factory.mktemp("encoders")
    tiny_encoders(folder, posts)
    return folder


# ---- the fake server

KEY = "sk-secret-0123456789"


def chat(content, finish="stop", tokens=None, **choice):
    """The body of a chat-completions reply; `choice`: more of its only choice."""
    choice |= dict(message=dict(content=content), finish_reason=finish)
    usage = dict(zip(("prompt_tokens", "completion_tokens"), tokens or ()))
    return dict(choices=[choice], usage=usage)


def torn(body):
    """A reply that ends before the length that it announces."""
    return 200, body, {"Content-Length": "99999"}


class Handler(BaseHTTPRequestHandler):
    """Answers as server.plan says."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True  # else each answer waits for the client's acknowledgement

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = SimpleNamespace(path=self.path, headers=dict(self.headers), body=body,
                                prompt=body["messages"][-1]["content"][-1]["text"],
                                connection=self.client_address, at=time.monotonic())
        with self.server.lock:
            self.server.asked.append(asked)
            plan = self.server.plan
            reply = plan if callable(plan) else plan.pop(0)
        if callable(reply):
            reply = reply(asked)
        if reply is None:
            self.close_connection = True
            return
        status, text, headers = (200, reply, {}) if isinstance(reply, dict) else (*reply, {})[:3]
        data = text.encode() if isinstance(text, str) else json.dumps(text).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = "Content-Length" in headers

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(plan) -> a server on this machine; server.url ends in /v1, server.asked holds what was
    asked. plan: a list of replies in turn, or one function for all. A reply: a body (an object),
    (status, body, headers), None (the connection closes without a word) or a function of what was
    asked, which gives one of these and may sleep. The environment holds KEY."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(plan):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.plan, server.asked, server.lock = plan, [], threading.Lock()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
