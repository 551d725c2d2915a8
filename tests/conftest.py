"""Shared by all tests: the project on the path, no network, toy posts and random tiny models."""

import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # loaders must not wait for a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers are those of a CPU in fp32
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import mulcot  # noqa: E402
from toy import TINY, tiny_model, tiny_tokenizer, toy_posts  # noqa: E402

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
