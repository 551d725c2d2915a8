"""Reading posts in every format, bad rows set aside one by one, and the drawn toy posts."""

import json
import os
import struct
from collections import Counter
from pathlib import Path

import pytest
from conftest import noise_image, tone
from PIL import Image

from mulcot import LABELS, InputError, load_image, parse_reasoning, read_posts, select_split
from toy import TOY_TEST_TEMPLATES, toy_posts, toy_warmup, write_wav


@pytest.fixture
def folder(tmp_path):
    """An empty data folder with images/good.png in it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "good.png")
    return tmp_path


def jsonl(path, *rows):
    """A file of rows; a row may also be given as raw bytes."""
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# ---- the formats

def test_jsonl_columns(folder):
    """Known columns become fields, unknown ones stay with the post and in no row that it writes,
    and nothing missing is invented."""
    row = dict(id=7, text="hi", image="good.png", aspect=" Rex ", label=" Positive ", score=0.5,
               split="dev", cot="why")
    odd = dict(likes=3, tags=["a"], folder="f", raw="what a model said")
    post, bare = read_posts(jsonl(folder / "p.jsonl", row | odd, b"", dict(id="b", text="t")))
    assert (post.id, post.aspect, post.label, post.score) == ("7", "Rex", "positive", 0.5)
    assert (post.split, post.cot) == ("dev", "why")
    assert post.columns == row | odd
    assert post.image == os.path.realpath(folder / "images" / "good.png")
    assert post.row() == row | dict(id="7", aspect="Rex", label="positive")
    assert bare.row() == dict(id="b", text="t")
    again = read_posts(jsonl(folder / "again.jsonl", post.row()))[0]
    assert again.row() == post.row() and again.image == post.image


def test_line_ends(folder):
    """A file saved by a Windows editor reads like any other."""
    lines = [b'{"id": 1, "text": "a"}', b'{"id": 2, "text": "b"}']
    (folder / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert [p.text for p in read_posts(folder / "p.jsonl")] == ["a", "b"]


def test_images_default_to_the_folder_beside_the_file(tmp_path):
    """Without an images/ folder the file's own folder is meant; --images overrides both."""
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    path = jsonl(tmp_path / "p.jsonl", dict(id=1, text="t", image="x.png"))
    image = os.path.realpath(tmp_path / "x.png")
    assert read_posts(path)[0].image == image
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="No such file"):
        read_posts(path)
    assert read_posts(path, images=tmp_path)[0].image == image


def test_splits(tmp_path):
    """valid, Validation and Test are not trained on by mistake; rows without a split are taken
    where no row has one."""
    names = dict(a="valid", b=" Validation", c="Test", d="train", e=None)
    rows = [dict(id=i, text="t", split=split) for i, split in names.items()]
    posts = read_posts(jsonl(tmp_path / "p.jsonl", *rows))
    assert [post.split for post in posts] == ["dev", "dev", "test", "train", None]
    assert select_split(posts, "dev") == select_split(posts, "valid") == posts[:2]
    assert select_split(posts[4:], "dev") == posts[4:]


def test_authors_json(folder):
    """The list that the authors released: image_path or image_id names the picture."""
    Image.new("RGB", (4, 4)).save(folder / "images" / "27.jpg")
    row = dict(text="t", label="neutral", aspect="A", image_id="27", id=1, image_path="27.jpg",
               cot="c")
    less = {k: v for k, v in row.items() if k != "image_path"} | dict(id=2)
    (folder / "p.json").write_text(json.dumps([row, less]))
    one, two = read_posts(folder / "p.json")
    assert one.image == two.image and one.image.endswith("27.jpg")
    assert (one.id, one.label, one.aspect, one.cot) == ("1", "neutral", "A", "c")
    assert one.row() == row | dict(id="1")


def test_tsv(folder):
    """$T$ is filled in, 0/1/2 are the labels, and a stray quote joins no lines; a line with a cell
    too few or a foreign label is set aside."""
    lines = ["index\t#1 ImageID\t#2 String\t#2 String", '1\t0\tgood.png\t"so $T$ !\tRex',
             "2\t1\tgood.png\tb $T$ $T$\tMia Ray", '3\t2\tgood.png\tc" $T$\tNova',
             "4\t5\tgood.png\tb\tR", "5\t1\tgood.png", ""]
    for name, split, first in (("dev", "dev", 0), ("mine", None, 0), ("headless", None, 1)):
        (folder / f"{name}.tsv").write_text("\n".join(lines[first:]))
        rejects = []
        posts = read_posts(folder / f"{name}.tsv", rejects=rejects)
        assert [p.text for p in posts] == ['"so Rex !', "b Mia Ray Mia Ray", 'c" Nova']
        assert [p.label for p in posts] == list(LABELS) and {p.split for p in posts} == {split}
        assert [p.id for p in posts] == [f"{name}-{n}" for n in (1, 2, 3)]
        assert [int(where.rsplit(":", 1)[1]) + first for where, _ in rejects] == [5, 6]


@pytest.mark.parametrize("name, rows, counts", [
    ("train", 3179, None), ("dev", 1122, None), ("test", 1037, (113, 607, 317))])
def test_real_posts(twitter, name, rows, counts):
    """The real files read without a reject and with the published label counts."""
    rejects = []
    posts = read_posts(twitter / f"{name}.tsv", rejects=rejects)
    assert len(posts) == rows and rejects == []
    assert all("$T$" not in p.text and p.aspect in p.text and p.split == name for p in posts)
    found = Counter(p.label for p in posts)
    assert counts is None or tuple(found[x] for x in LABELS) == counts


# ---- bad rows

WRONG = {
    "endless text": (dict(text="a" * 10_001), "more than 10,000 characters"),
    "text that grows": (dict(text="$T$" * 3000, aspect="a" * 900), "more than 10,000 characters"),
    "not a number": (dict(weight=float("nan")), "Out of range float"),
    "missing image": (dict(image="none.png"), "No such file"),
    "garbage image": (dict(image="garbage.jpg"), "cannot be read: cannot identify"),
    "truncated image": (dict(image="cut.jpg"), "cannot be read: image file is truncated"),
    "image is a folder": (dict(image="."), "cannot be read"),
    "too many pixels": (dict(image="bomb.png"), "shrink it"),
    "absolute path": (dict(image="/etc/hostname"), "leads outside"),
    "url": (dict(image="http://h/x.png"), "No such file"),
    "dots": (dict(image="../secret.png"), "leads outside"),
    "link": (dict(image="link.png"), "leads outside"),
    "endless name": (dict(image="x" * 5000), "cannot be read"),
    "image number": (dict(image=5), "image must be a string"),
    "8-bit audio": (dict(audio="eight.wav"), "8 bits at 16000 Hz: `ffmpeg"),
    "audio rate": (dict(audio="fast.wav"), "16 bits at 44100 Hz: `ffmpeg"),
    "empty audio": (dict(audio="empty.wav"), "lasts 0.00 s"),
    "short audio": (dict(audio="blink.wav"), "lasts 0.02 s"),
    "uncut audio": (dict(audio="long.wav"), "lasts 301.00 s"),
    "no audio": (dict(audio="garbage.jpg"), "no PCM WAV (`ffmpeg"),
    "missing audio": (dict(audio="none.wav"), "No such file"),
    "audio outside": (dict(audio="../up.wav"), "leads outside"),
    "audio number": (dict(audio=7), "audio must be a string"),
    "empty clip": (dict(frames="clip"), "holds no image"),
    "no frames": (dict(frames=[]), "holds no image"),
    "missing clip": (dict(frames="nowhere"), "No such file"),
    "frame number": (dict(frames=["good.png", 7]), "list of image names"),
    "frame outside": (dict(frames=["../x.png"]), "leads outside"),
    "label": (dict(label="happy"), "use one of negative, neutral, positive"),
    "half an emoji": (dict(text="so \ud83d sad"), "surrogates not allowed"),
    "empty text": (dict(text=" \n"), "empty text"),
    "text number": (dict(text=4), "text must be a string"),
    "aspect": (dict(aspect=["a"]), "aspect must be a string"),
    "score": (dict(score="high"), "score must be a number"),
    "no id": (dict(id=None), "every row needs an id"),
    "id twice": (dict(id="a"), "duplicate id 'a'"),
    "object for a chain": (dict(cot={"Prediction": "neutral"}), "cot"),
    "list": ([1, 2], "expected an object"),
    "not JSON": (b'{"id": "x", "text": ', "not a row"),
    "not UTF-8": (b'{"id": "x", "text": "caf\xe9"}', "not a row: 'utf-8' codec"),
}


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory):
    """A folder with one good image and every kind of bad file."""
    root = tmp_path_factory.mktemp("wrong")
    images = root / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "good.png")
    Image.new("RGB", (8, 8)).save(root / "secret.png")
    (images / "link.png").symlink_to(root / "secret.png")
    (images / "garbage.jpg").write_bytes(b"not a picture" * 9)
    whole = Path(noise_image(images / "cut.jpg", (64, 48))).read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (9000, 8000)).save(images / "bomb.png")
    write_wav(images / "eight.wav", tone(300, 0.2), width=1)
    write_wav(images / "fast.wav", tone(300, 0.2, 44_100), rate=44_100)
    for name, seconds in (("empty", 0), ("blink", 0.02), ("long", 301)):
        write_wav(images / f"{name}.wav", tone(300, seconds))
    (images / "clip").mkdir()
    return root


@pytest.mark.parametrize("change, reason", WRONG.values(), ids=WRONG)
def test_bad_row(wrong_files, tmp_path, change, reason):
    """The row is set aside with its line and the reason, its neighbours stay; strict reading says
    the same as an InputError."""
    bad = dict(id="x", text="t") | change if isinstance(change, dict) else change
    good = [dict(id=i, text="t", image="good.png") for i in "ab"]
    path, rejects = jsonl(tmp_path / "p.jsonl", good[0], bad, good[1]), []
    posts = read_posts(path, wrong_files / "images", rejects)
    assert [p.id for p in posts] == ["a", "b"]
    assert [where for where, _ in rejects] == [f"{path}:2"] and reason in rejects[0][1]
    with pytest.raises(InputError) as error:
        read_posts(path, wrong_files / "images")
    assert f"{path}:2" in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize("name, content, reason", [
    ("none.jsonl", None, "does not exist"), ("p.txt", b"a,b", "use .jsonl, .json, .tsv or .csv"),
    ("p.csv", b"a,b", "must have the columns"),
    ("p.jsonl", b"", "holds no usable post"), ("p.tsv", b"head\n", "holds no usable post"),
    ("p.json", b"", "is not JSON"), ("p.json", b"{}", "must be a list"),
    ("p.json", b'{"id": 1}\n{"id": 2}', "belongs into a .jsonl"), ("p.json", b"5", "must be a list"),
    ("p.json", b"[null, 1]", "2 bad rows"), ("p.jsonl", b"oops\n", "p.jsonl:1")])
def test_bad_file(tmp_path, name, content, reason):
    """A file of which nothing can be used is one error that names it."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_posts(tmp_path / name, rejects=[])
    assert reason in str(error.value) and name in str(error.value)


# ---- images

def test_broken_exif_costs_at_most_its_row(tmp_path):
    """EXIF whose entries have the wrong type: the picture is read or set aside, never a crash."""
    entries = struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    entries += struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    tiff = b"II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=b"Exif\0\0" + tiff)
    rows = [dict(id="x", text="t", image="x.jpg"), dict(id="y", text="t")]
    posts = read_posts(jsonl(tmp_path / "p.jsonl", *rows), rejects=[])
    assert posts[-1].id == "y"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    """Grey, palette, transparent and print colours; of an animation the first frame."""
    name = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 6)).save(name)
    assert (load_image(name).mode, load_image(name).size) == ("RGB", (8, 6))
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "x.gif").getpixel((4, 4)) == (255, 0, 0)


def test_transparent_is_white(tmp_path):
    """As the model's own processor has it, whatever colour hides below; half is half."""
    for alpha, seen in ((0, 255), (128, 127), (255, 0)):
        Image.new("RGBA", (8, 6), (0, 0, 0, alpha)).save(tmp_path / "x.png")
        assert load_image(tmp_path / "x.png").getpixel((1, 1)) == (seen, seen, seen)


# ---- toy posts

def test_toy_test_split_is_unseen(tmp_path):
    """No word stands with the same aspect as in training, and half the sentences are new. The same
    seed draws the same texts and pictures, whatever the noise of the labels."""
    sizes, fresh = dict(train=300, dev=50, test=100), Counter()
    posts, noisy = toy_posts(tmp_path / "a", sizes), toy_posts(tmp_path / "b", sizes, noise=0.2)
    assert 60 < sum(a.label != b.label for a, b in zip(posts, noisy)) < 120
    for a, b in zip(posts, noisy):
        assert a.text == b.text and Path(a.image).read_bytes() == Path(b.image).read_bytes()
        fill = dict(a=a.aspect, w=a.columns["facts"]["word"])
        fresh[a.split] += any(a.text.startswith(t.format(**fill)) for t in TOY_TEST_TEMPLATES)
    assert fresh == dict(train=0, dev=0, test=50)
    seen, unseen = ({(p.columns["facts"]["word"], p.aspect) for p in posts
                     if (p.split == "test") == test} for test in (False, True))
    assert not seen & unseen


def best_lookup(pairs):
    """Accuracy of the best rule from (what it sees, what it says)."""
    best = Counter()
    for (key, _), n in Counter(pairs).items():
        best[key] = max(best[key], n)
    return best.total() / len(pairs)


def test_toy_posts_need_words_and_picture(tmp_path):
    """Words alone and picture alone leave a third unsolved; both together solve everything."""
    posts = toy_posts(tmp_path, dict(train=2000), seed=5)
    for names, least, most in ((["words"], 0.6, 0.7), (["mood"], 0.6, 0.7), (["word"], 0.6, 0.7),
                               (["scene"], 0.6, 0.7), ([], 0.35, 0.5), (["words", "mood"], 1, 1)):
        pairs = [(tuple(p.columns["facts"][name] for name in names), p.label) for p in posts]
        assert least <= best_lookup(pairs) <= most
    assert all(p.columns["facts"]["word"] in p.text and p.aspect in p.text for p in posts)


def test_warmup_says_nothing_about_sentiment(tmp_path):
    """No label, and the verdicts, words and moods to write up are independent of the truth."""
    size = 1500
    warm = toy_warmup(tmp_path / "w", size, seed=3)
    true = toy_posts(tmp_path / "t", dict(warm=size), seed=3)
    assert [p.text for p in warm] == [p.text for p in true]
    assert all(p.label is None and "facts" not in p.columns for p in warm)
    stated = [p.columns["branches"][1][0].rstrip(".").split(": ", 1)[1].split("; ") for p in warm]
    truth = [("words " + p.columns["facts"]["words"], "image " + p.columns["facts"]["mood"],
              "verdict " + p.label) for p in true]
    for said, true in zip(zip(*stated), zip(*truth)):
        by_chance = best_lookup([("", value) for value in true])
        assert best_lookup(list(zip(said, true))) < by_chance + 0.04
    written = [parse_reasoning(p.columns["branches"][1][1]).prediction for p in warm]
    assert written == [verdict.split()[1] for _, _, verdict in stated]
