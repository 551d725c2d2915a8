"""MulCoT-RD in one file: a large teacher's reasoning chains, distilled into a small vision-language
model that reads a social-media post (text + image), writes a reasoning chain and labels its
sentiment (arXiv 2508.05234, teacher -> assistant -> student). The programs are the three scripts.

One paper after the other. §1 to §8 are MulCoT-RD, from a post's file to its loss (a training step
runs the model of §8 first, then §7 and §6). Its two neighbours come after it:

  §1 Posts      files -> Post                      §5 LoRA         adapters in PEFT's format
  §2 Prompts    Post -> messages, text -> fields   §6 Losses       the equations, dev metrics
  §3 Teacher    two-stage chains with retries      §7 Soft labels  the assistant's, as files
  §4 Tokens     Post -> Example -> Batch           §8 Model        branches, labels, chains
  §9 NF4        a frozen base in 4 bits            §11 UBM and cascade   arXiv 2509.04459
  §10 Readout   arXiv 2606.05713                   §12 Files             rows, processes

Every section runs alone with the needs and imports of its heading, and what those need in turn.
Remarks have three tags: `# paper:` it stands there, `# choice:` the sources are silent, `# trap:`
what breaks otherwise. Shapes trail the lines that change them: B rows, P prefix tokens, T tokens,
V vocabulary, D width (V', D' the assistant's), R rank, N positions, n a chunk of them, C classes.

Departures of MulCoT-RD from the paper and from the authors' released scripts ("theirs"), with the
way back to theirs where there is one
  Chains
 1. Chains are brought into one written form, references too. Theirs stay as they came.
 2. Chains that are incomplete or contradict their label are set aside, after all retries and again
    before training; so are answers that were cut off. Theirs filter stage 1 and the assistant's
    chains by the label alone, stage 2 by nothing.
 3. A teacher is asked three times a stage at most (`--max-tries`), each time at a higher
    temperature, after a cut answer with twice the tokens; the paper asks until the chain is whole.
 4. A training row with a chain of over 512 tokens is set aside. Theirs cap generation alone:
    `--max-answer 8192` in train.py and in generate.py soft.
 5. The prompts are our own wording; field names and their order are the paper's. Ours ask the
    teacher for two to four sentences an analysis and nothing behind the Prediction; theirs say when
    to call an aspect neutral. In ours white space is joined, and control tokens in a post are text.
 6. MVSA is read in CLMLF's split, the one in print. Their files of it are not released. Of rows
    with one id the first is read: give the teacher's chains and the assistant's as two files.
  Tokens
 7. An answer ends in the chat template's end of turn, <|im_end|>. Theirs ends in <|endoftext|>.
 8. The label's answer is quoted, `"Prediction": "positive"`. Theirs is not, only in their prompt.
 9. Images keep their shape under a pixel cap (the model's own, unless `--max-pixels` says another),
    are turned upright, and lie on white where they are transparent. `--max-pixels 78400` gives
    mostly 80 to 100 visual tokens. Theirs resize to 280 x 280, always 100:
    `mogrify -resize '280x280!' images/*` beforehand does that.
  Training
10. One forward pass serves both tasks: image and post are one prefix, the prompts are branches of
    it. Equal to two (tested), but LoRA's dropout is drawn once for the prefix. Qwen3.5 takes two.
11. Task weights 0.8 / 0.2 as the paper says. Theirs sum the tasks 1 : 1, 0.8 / 0.2 is a comment:
    `--reasoning-weight 1 --label-weight 1`.
12. The KL term covers response tokens. Theirs averages it over every position whose label is not 0
    (the token "!"): prompt, image, and padding to the longest row of all, which are most of them.
13. Each task's loss is a mean over its answer tokens in the whole optimiser step. Theirs add up,
    undivided, the means of its 20 micro-batches, so that a token of a short chain weighs more.
14. Posts that fill no step make a smaller one. Theirs are dropped, but counted in the next step.
15. The posts of a step are of like length (sorted within four steps). Theirs are drawn freely.
16. Soft labels come from the assistant in eval mode, before the student trains: its last hidden
    states (in float16) and its output matrix. Theirs runs at each step, its LoRA dropout left on.
17. For the KL both vocabularies are cut to the tokenizer's ids (151,665 in Qwen2.5-VL; rows beyond
    are padding). Theirs resize the student's output layer to the assistant's 152,064 rows.
18. LoRA adapts the language model only. Theirs also the vision tower's MLPs: `--scope all`.
19. LoRA's factors are held in fp32 and multiplied in the base's dtype. Theirs multiply in fp32.
20. Gradients are clipped at norm 1. Theirs are not: `--clip 0`.
21. Macro F1 breaks ties in dev accuracy; on MVSA theirs take weighted F1. The rate falls where dev
    is not better at all; theirs where it is not better by 0.01 %.
  Answers and metrics
22. Labels are decided by scoring the three answers, on dev too. Theirs generate them, in at most
    512 tokens; `--decode greedy` of generate.py predict does that for test posts, in at most 32.
23. Generation is plain: the largest logit, or all tokens at a temperature, control tokens never.
    Theirs use the model's own defaults (Qwen2.5-VL: repetition penalty 1.05, top-k in sampling).
24. A generated answer is read behind its last `Prediction`; two different labels there are none.
    Theirs take the first label word behind the first "Prediction", else the last label word.
25. METEOR looks up synonyms only with `--wordnet`, theirs always. Distinct is of the predictions,
    theirs of the references (metrics.json has Distinct-2 of both). Sim of a missing chain is 0.

Departures of the readout (§10) from arXiv 2606.05713
R1. A clip's frames are separate pictures. Theirs go through Omni's video path: pairs of frames,
    positions aligned in time, audio between them.
R2. NF4 is of the linears that LoRA adapts in the language model, its block scales in float32 and
    not quantised again. bitsandbytes takes every linear but the output head, the towers' too.
R3. `--nf4` and `--scope all` are the paper's and no defaults. Prompt, epochs, batch, schedule,
    clipping and selection are ours, as is `--target label`.

Departures of U-ACS (§11) from arXiv 2509.04459, of which little more than the abstract is known
U1. A score is learned as weights of its two neighbouring whole numbers, so that u measures how
    fractional it is, too: of 0.5 known exactly u is 0.36, of 1 it is 0.
U2. u is entropy over its maximum; the MLLM's distribution is that of its scored answers, thresholds
    are those of least error on dev within `--budget` MLLM passes a post.
U3. The UBM (several short runs of a text encoder, adversarial steps, averaged weights, a fitted
    temperature), the prompt of the second pass and what happens when a pass fails are ours. So is
    that of two answers with one label the MLLM's distribution stands, that scores within 0.5 of 0
    take no side, and that agreeing scores are averaged by 1 - u (0.5 where u is unknown).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import wave
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

LABELS = ("negative", "neutral", "positive")  # change them here, in lower case (README)
DEFINITIONS = dict(positive="the author shows joy, praise, support or hope.",
                   neutral="the author states facts or shows no clear feeling.",
                   negative="the author shows anger, sadness, criticism or mockery.")
POLARITY = ("negative", "neutral", "positive")  # the LABELS that scores go with
REMEDY = "is this the right folder? Else delete the file and run its stage again"


class InputError(ValueError):
    """A user's mistake: what is wrong, where, and how to fix it. Scripts print it and exit 2."""


@contextlib.contextmanager
def explaining(what):
    """In the block, what a damaged file raises becomes an InputError that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # trap: broken EXIF and PNG chunks raise SyntaxError, struct.error, …
        why = " ".join(str(e).split())[:300] or "cut off"
        raise InputError(f"{what}: {why}") from None


def write_atomic(path, write):
    """`write(temporary path)` in the same folder, fsync, then rename: the file is whole or not
    there. Raises InputError when the disk is full."""
    path = str(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with explaining(f"{path} cannot be written"):  # a full disk is another error in each library
        write(path + ".part")
    with open(path + ".part", "rb+") as f:
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


def write_text(path, text):
    """A UTF-8 text file, atomically; half of a surrogate pair becomes "?"."""
    write_atomic(path, lambda part: Path(part).write_bytes(text.encode("utf-8", "replace")))


def to_json(value, what, indent=None):
    """JSON text. A number in it that is NaN or infinite is an InputError that begins with `what`:
    it has no meaning to whoever reads it, and comes from a damaged model."""
    with explaining(f"{what} cannot be written, is a model damaged?"):
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path, value):
    """A JSON file, atomically."""
    write_text(path, to_json(value, path, indent=1) + "\n")


def read_json(path):
    """The object in a JSON file. Raises InputError that names it."""
    with explaining(f"{path} is missing or damaged, {REMEDY}"):
        return {} | json.loads(Path(path).read_text(encoding="utf-8"))


def digest(*parts):
    """A short hex name of strings, bytes, numbers, lists and tensors."""
    h = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            part = part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        h.update(part if isinstance(part, bytes) else repr(part).encode())
        h.update(b"|")
    return h.hexdigest()[:24]


def write_tensors(path, tensors):
    """A .safetensors file of {name: tensor}, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda part: save_file(tensors, part))


def read_tensors(path):
    """{name: tensor} of a .safetensors file. Raises InputError that names it."""
    with explaining(f"{path} is missing or damaged, {REMEDY}"):
        return load_file(path)


# ================================================================================================
# §1 Posts [needs: LABELS, POLARITY, InputError, explaining]
# import base64, csv, io, json, os, re, wave, torch
# from dataclasses import dataclass, field, replace; from pathlib import Path
# from PIL import Image, ImageOps
# ================================================================================================

IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_IMAGE_PIXELS = 50_000_000  # choice: a decompression bomb is an error, not an out-of-memory kill
MAX_TEXT = 10_000  # choice: characters; the mask of a batch grows with the square of its longest
SCORE_RANGE = 3.0  # scores lie in [-3, 3], as in MOSI and MOSEI
MAX_FRAMES = 16  # paper: arXiv 2606.05713
WORDS = ("id", "text", "aspect", "label", "split", "cot")  # columns that hold strings
FILES = ("image", "image_path", "image_id", "frames", "audio")  # columns that name files
SPLITS = dict.fromkeys(["valid", "val", "validation"], "dev")  # other names of a split
AUDIO_RATE, MAX_SECONDS = 16_000, 300  # what Qwen2.5-Omni's feature extractor takes


@dataclass
class Post:
    """One social-media post. `image`, `frames` (of a clip) and `audio` are resolved paths inside
    the images folder, or None and [] for text alone. `cot` is a model's chain; `columns` is the
    row it was read from, with the columns we do not know and the files' own names."""

    id: str
    text: str
    image: str | None = None
    aspect: str | None = None
    label: str | None = None
    score: float | None = None
    split: str | None = None
    cot: str | None = None
    frames: list = field(default_factory=list)
    audio: str | None = None
    columns: dict = field(default_factory=dict)

    @property
    def images(self):
        """Paths of all images in the order in which a model sees them."""
        return [self.image, *self.frames] if self.image else self.frames

    def row(self):
        """The post as a JSON row, its files by the names that they came with."""
        files = {key: self.columns.get(key) for key in FILES}
        row = {key: vars(self)[key] for key in WORDS + ("score",)} | files
        return {key: value for key, value in row.items() if value is not None}


def read_posts(path, images=None, rejects=None, allow_empty=False):
    """Posts from a `.jsonl`, the authors' `.json`, a TomBERT `.tsv` or MMSA's `label.csv`.

    images: the folder of images, frames and audio (default: of a .csv its own folder, else
    `images/` beside the file or its own folder). Bad rows go to `rejects` as (where, reason), else
    the first raises InputError, as does a file without a good row, unless `allow_empty`."""
    rows, parse, images = _open_rows(Path(path), images)
    posts = {}  # by id
    checked = set()
    for where, raw in rows:
        try:
            post = to_post(parse(raw), images)
            if post.id in posts:
                raise InputError(f"duplicate id {post.id!r}: ids name posts in every later file")
            for image in set(post.images) - checked:
                load_image(image, check=True)  # choice: now; no run shall die on image 9,000
                checked.add(image)
            if post.audio:
                load_audio(post.audio)
            posts[post.id] = post
        except (ValueError, OSError, RecursionError, csv.Error) as e:  # InputError is a ValueError
            reason = str(e) if isinstance(e, InputError) else f"not a row: {e}"
            if rejects is None:
                raise InputError(f"{where}: {reason}") from None
            rejects.append((where, reason))
    if not posts and not allow_empty:
        why = f"; {len(rejects)} bad rows, first {': '.join(rejects[0])}" if rejects else ""
        raise InputError(f"{path} holds no usable post{why}")
    return list(posts.values())


def select_split(posts, split):
    """The posts of a split ("all": every one), or all where the rows have none."""
    if split == "all" or not any(post.split for post in posts):
        return posts
    return [post for post in posts if post.split == SPLITS.get(split, split)]


def report_rejects(rejects, what):
    """Prints the first of the rows set aside [(where, reason)], and how many there are."""
    for where, reason in rejects[:5]:
        print(f"set aside  {where}: {reason}")
    if rejects:
        print(f"set aside  {len(rejects)} {what}")


def read_dev_posts(path, images, target):
    """Posts that have the `target` ("label" or "score") to select or calibrate on: of split dev,
    or all where no row has a split. Others are counted and reported."""
    rejects = []
    posts = select_split(read_posts(path, images, rejects), "dev")
    usable = [post for post in posts if getattr(post, target) is not None]
    rejects += [(post.id, f"no {target}") for post in posts if getattr(post, target) is None]
    report_rejects(rejects, "of the dev rows")
    if not usable:
        raise InputError(f"{path} has no post of split dev with a {target} to select or fit on")
    return usable


# ---- files: what a manifest may name, and whether it can be read


def safe_path(name, folder):
    """A manifest's file name as a path inside `folder`, or None; no path leads outside."""
    if not name:
        return None
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))  # trap: a link inside may lead outside
    if os.path.commonpath([root, path]) != root:
        raise InputError(f"file {name!r} leads outside {folder}: it must be a name inside")
    return path


def load_image(path, check=False):
    """RGB image, upright (EXIF), first frame of an animation. Raises InputError with the reason.
    `check` reads a JPEG at an eighth of its size: as good a test of the file, and quicker."""
    with (explaining(f"image {path} cannot be read"),
          Image.open(path, formats=IMAGE_FORMATS) as image):
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise InputError(f"image {path} has {image.width} x {image.height} pixels, the cap is "
                             f"{MAX_IMAGE_PIXELS:,}: shrink it")
        if max(image.size) > 200 * min(image.size):
            raise InputError(f"image {path} is {image.width} x {image.height}: image processors "
                             "refuse shapes beyond 200 : 1, crop it")
        if check:
            image.draft("RGB", (image.width // 8 + 1, image.height // 8 + 1))
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # on white, as the model's own processor has it
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def data_url(path, max_side=1120, quality=92):
    """The image as a data URL, written anew as JPEG: upright, its longer side at most max_side,
    without metadata (GPS!), wherever the file hid it."""
    image = load_image(path)
    image.info = {}  # trap: Pillow writes a comment found there
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def load_audio(path):
    """A 16-bit PCM WAV of 16 kHz as floats (samples,) in [-1, 1), channels averaged."""
    fix = "`ffmpeg -i IN -ac 1 -ar 16000 -sample_fmt s16 OUT.wav` writes what is read here"
    with explaining(f"audio {path} is no PCM WAV ({fix})"), wave.open(str(path)) as file:
        channels, width, rate, count = file.getparams()[:4]
        data = file.readframes(count)
    if width != 2 or rate != AUDIO_RATE:
        raise InputError(f"audio {path} has {8 * width} bits at {rate} Hz: {fix}")
    length = len(data) // (2 * channels)
    if not 0.05 <= length / rate <= MAX_SECONDS:
        raise InputError(f"audio {path} lasts {length / rate:.2f} s, not 0.05 to {MAX_SECONDS}: is "
                         "the clip empty, or uncut?")
    samples = torch.frombuffer(bytearray(data[: length * 2 * channels]), dtype=torch.int16)
    return samples.reshape(-1, channels).float().mean(1) / 32768


# ---- rows: a dict of any source -> Post


def to_post(columns, folder):
    """A row dict of any source -> a checked Post; its files lie in `folder`."""
    if not isinstance(columns, dict) or columns.get("id") is None:
        raise InputError("expected an object with at least id and text: every row needs an id")
    row = columns | dict(id=str(columns["id"]))
    if row.get("image_id") is not None:  # the authors' rows name the image in one of three ways
        row["image_id"] = f"{row['image_id']}.jpg"
    for key in WORDS + ("image", "image_path", "image_id", "audio"):
        if not isinstance(row.get(key), (str, type(None))):
            raise InputError(f"{key} must be a string, got {row[key]!r}")
    text = row.get("text") or ""
    if not text.strip():
        raise InputError("empty text: every post needs words")
    aspect = (row.get("aspect") or "").strip()
    text = text.replace("$T$", aspect or "$T$")
    if len(text) + len(aspect) > MAX_TEXT:
        raise InputError(f"text and aspect have more than {MAX_TEXT:,} characters: shorten them")
    label = (row.get("label") or "").strip().lower() or None
    if label not in (*LABELS, None):
        raise InputError(f"unknown label {label!r}: use one of {', '.join(LABELS)}")
    score = row.get("score")
    if score is not None and LABELS != POLARITY:
        raise InputError(f"a score, whose sign is none of the labels {', '.join(LABELS)}")
    if score is not None and not (isinstance(score, (int, float)) and abs(score) <= SCORE_RANGE):
        raise InputError(f"score must be a number in [-3, 3], got {score!r}: rescale it")
    split = (row.get("split") or "").strip().lower() or None
    # trap: half of a surrogate pair and NaN, which JSON can spell, raise here and not when written
    json.dumps(columns, ensure_ascii=False, allow_nan=False).encode()
    image = row.get("image") or row.get("image_path") or row.get("image_id")
    return Post(row["id"], text, safe_path(image, folder), aspect or None, label, score,
                SPLITS.get(split, split), row.get("cot"), clip_frames(row.get("frames"), folder),
                safe_path(row.get("audio"), folder), columns)


# ---- formats: each gives rows [(where, raw)], parse(raw) -> dict, and the folder of images


def _open_rows(path, images):
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a .jsonl, .json, .tsv or .csv file")
    if path.suffix == ".csv":
        return _csv_rows(path, Path(images or path.parent))
    if not images:
        images = path.parent
        if (images / "images").is_dir():
            images = images / "images"
    if path.suffix == ".jsonl":
        return _lines(path), json.loads, images
    if path.suffix == ".json":
        return _json_rows(path), lambda row: _json_row(path.stem, row), images
    if path.suffix == ".tsv":
        rows = [line for line in _lines(path) if not line[1].lower().startswith(b"index\t")]
        return rows, lambda line: _tsv_row(path.stem, line), images
    raise InputError(f"{path}: unknown format {path.suffix!r}: use .jsonl, .json, .tsv or .csv")


def _lines(path):
    """[(where, line)] of lines that hold something; as bytes, so that bad UTF-8 costs one line."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]


def _json_rows(path):
    """A list of rows: the authors' release, or a file of CLMLF's split of MVSA."""
    with explaining(f"{path} is not JSON (one object per line belongs into a .jsonl)"):
        rows = json.loads(path.read_bytes())
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a list of rows")
    known = {"label", "emotion_label", "score", *FILES}
    if not any(known & row.keys() for row in rows if isinstance(row, dict)):
        print(f"note       {path}: no row has a label or an image ({', '.join(sorted(known))})")
    return [(f"{path}[{n}]", row) for n, row in enumerate(rows)]


def _json_row(stem, row):
    """A row of the authors' release as it is; of MVSA with its label (0 positive, 1 neutral, 2
    negative), its picture and the split, which is the file's name."""
    if not isinstance(row, dict) or "emotion_label" not in row:
        return row
    if row["emotion_label"] not in (0, 1, 2):
        raise InputError(f"emotion_label must be 0, 1 or 2, got {row['emotion_label']!r}")
    label = ("positive", "neutral", "negative")[int(row["emotion_label"])]
    return row | dict(label=label, image=f"{row.get('id')}.jpg", split=stem)


def _tsv_row(stem, line):
    """TomBERT: header, then index, label (its place in LABELS), image, text with $T$, aspect."""
    cells = line.decode().strip("\r\n").split("\t")  # trap: csv would join lines at a stray quote
    if len(cells) != 5 or cells[1] not in map(str, range(len(LABELS))):
        raise InputError(f"expected index, label 0-{len(LABELS) - 1}, image, text, aspect; got "
                         f"{len(cells)} cells, label {cells[1:2]}")
    index, label, image, text, aspect = cells
    return dict(id=f"{stem}-{index}", label=LABELS[int(label)], image=image, text=text,
                aspect=aspect, split=stem if stem in ("train", "dev", "test") else None)


# ---- clips (§10 reads them): frames, a voice and a score


def without_inputs(post, names):
    """The post less some of its inputs: "frames" (all pictures), "audio"."""
    if "frames" in names:
        post = replace(post, image=None, frames=[])
    return replace(post, audio=None) if "audio" in names else post


def clip_frames(value, folder):
    """At most 16 paths, evenly spaced, of a clip's frames: a folder or a list of image names."""
    if value in (None, ""):
        return []
    names = value
    if isinstance(value, str):
        files = os.listdir(safe_path(value, folder))
        files = [name for name in files if name.lower().endswith(IMAGE_ENDINGS)]
        names = [f"{value}/{name}" for name in sorted(files, key=_by_number)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"frames must be a folder or a list of image names, got {value!r}")
    if not names:
        raise InputError(f"frames {value!r} holds no image: extract some, or leave frames out")
    if len(names) > MAX_FRAMES:  # the middles of 16 equal spans
        names = [names[(2 * i + 1) * len(names) // (2 * MAX_FRAMES)] for i in range(MAX_FRAMES)]
    return [safe_path(name, folder) for name in names]


def _by_number(name):
    """A sort key that puts 2.jpg before 10.jpg."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _csv_rows(path, folder):
    """MMSA's label.csv of MOSI or MOSEI: video_id, clip_id, text, label (a score), mode (train,
    valid, test). frames/<video>/<clip>/ and audio/<video>/<clip>.wav are used where they exist."""
    lines = _lines(path) or [("", b"")]
    with explaining(f"{path} has no header"):
        header = next(csv.reader([lines[0][1].decode("utf-8", "replace")]), [])
    if {"video_id", "clip_id", "text", "label", "mode"} - set(header):
        raise InputError(f"{path} must have the columns video_id, clip_id, text, label, mode, as "
                         "MMSA's label.csv")

    def parse(line):
        cells = next(csv.reader([line.decode()]))
        if len(cells) != len(header):
            raise InputError(f"expected {len(header)} cells, got {len(cells)}")
        clip = dict(zip(header, cells))
        if clip.get("label_T"):  # scores of each modality, which MOSI's file leaves empty
            raise InputError("a row of CH-SIMS, whose scores lie in [-1, 1], not [-3, 3]: multiply "
                             "its column label by 3 and empty label_T")
        name = f"{clip['video_id']}/{clip['clip_id']}"
        row = dict(id=name.replace("/", "$_$"), text=clip["text"], score=float(clip["label"]),
                   split=clip["mode"])
        if (folder / "frames" / name).is_dir():
            row["frames"] = f"frames/{name}"
        if (folder / "audio" / f"{name}.wav").exists():
            row["audio"] = f"audio/{name}.wav"
        return row

    return lines[1:], parse, folder


# ================================================================================================
# §2 Prompts and parser [needs: LABELS, DEFINITIONS]
# import json, re; from dataclasses import dataclass
# ================================================================================================

FIELDS = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion",
          "Prediction")

# choice: the wording is ours; sections, field names and their order are the paper's. A prompt is
# a prefix (instruction, post) + a format, a branch's question: the tasks share all up to there.
# trap: the prefix ends in line breaks and a format starts with a letter, so that no token of the
# tokenizer spans the seam and the shared prefix equals the start of either whole prompt.
TASK = "Judge the sentiment of a social-media post from its text and its image together."
TASK_ASPECT = ("Judge the sentiment that the author of a social-media post shows toward the "
               "target aspect, from text and image together.")
TASK_EXPLAIN = ("Explain why the sentiment of a social-media post is the given one, from text and "
                "image together.")
TOWARD_ASPECT = " The sentiment meant is the one toward the target aspect."
DEFINED = [f"{label}: {text}" for label, text in DEFINITIONS.items() if label in LABELS]
CHOICE = f"{', '.join(LABELS[:-1])} or {LABELS[-1]}"
NO_IMAGE = "No image is given."
REASON_FORMAT = f"""Answer with these five fields, each on its own line:
"Text_analysis": what the words express
"Image_analysis": what the image shows and expresses
"Conflict_resolution": whether they agree, and which one counts if not
"Final_conclusion": the sentiment that follows
"Prediction": {CHOICE}"""
LABEL_FORMAT = f"""Answer with this field only:
"Prediction": {CHOICE}"""
TEACHER_RULES = """
Write two to four full sentences in each analysis. Quote the words and name the parts of the image \
you rely on. \
Give exactly one word as the Prediction and write nothing after it."""
FORMATS = dict(reason=REASON_FORMAT, label=LABEL_FORMAT, unaided=REASON_FORMAT + TEACHER_RULES,
               explained=REASON_FORMAT + TEACHER_RULES)


def post_prompt(post, task="reason", gold=None):
    """The shared part of a prompt: task, definitions (teacher only), post, and a blank line."""
    lines = [TASK_ASPECT if post.aspect else TASK]
    if task == "explained":
        lines = [TASK_EXPLAIN + (TOWARD_ASPECT if post.aspect else "")]
    if task in ("unaided", "explained") and DEFINED:
        lines += ["Sentiment definitions:", *DEFINED]
    lines.append("Text: " + " ".join(post.text.split()))  # trap: line breaks could fake our layout
    if post.aspect:
        lines.append("Target aspect: " + " ".join(post.aspect.split()))
    if not post.images:
        lines.append(f'{NO_IMAGE} The Image_analysis is "{NO_IMAGE}"')
    if task == "explained":
        lines.append(f"Given sentiment: {gold}")
    return "\n".join(lines) + "\n\n"


def build_messages(post, task, gold=None):
    """Messages as OpenAI's, but with the files' paths. task: "reason" | "label" of trained models,
    "unaided" | "explained" of the teacher's stages; only "explained" takes the gold label."""
    assert task in FORMATS and (gold in LABELS) == (task == "explained"), (task, gold)
    content = [{"type": "image", "image": path} for path in post.images]
    if post.audio:
        content.append({"type": "audio", "audio": post.audio})
    content.append({"type": "text", "text": post_prompt(post, task, gold) + FORMATS[task]})
    return [{"role": "user", "content": content}]


@dataclass
class Reasoning:
    """A parsed answer. `fields`: those found, cleaned. `prediction`: a label or None. `complete`:
    all five fields hold text and the last one a label. `problem`: what is missing, or None."""

    fields: dict
    prediction: str | None
    complete: bool
    problem: str | None


# models write `Text_Analysis`, `text analysis` or `Text-analysis` as well
_NAME = "(?i:" + "|".join(name.replace("_", "[_ -]") for name in FIELDS) + ")"
_FIELD_OF = {name.lower(): name for name in FIELDS}
# A field opens at the start of a line, in Markdown, list or JSON markup, or behind { or , when its
# name is quoted. Within a sentence its name is text. Bounded repeats keep this linear on any input.
_HEADING = re.compile(
    rf"""^[ \t>#*\-{{"'`\d.]{{0,16}}({_NAME})"""
    r"""(?:["'`*\]]{0,4}[ \t]{0,4}[:\uff1a][*]{0,2}|["'`*#:]{0,4}[ \t]{0,4}$)"""
    rf"""|[{{,]\s{{0,8}}"({_NAME})"\s{{0,4}}:""", re.M)
_LABELS = "|".join(map(re.escape, sorted(LABELS, key=len, reverse=True)))  # the longest first
LABEL_WORD = re.compile(rf"\b({_LABELS})\b")


def parse_reasoning(text):
    """Any text a model wrote -> Reasoning. Reads quoted paragraphs, Markdown headings, (fenced)
    JSON and plain `Field: …`, behind a reasoning model's <think>…</think>. The last Prediction
    wins; one that names several labels names none. Never raises."""
    text = text.replace("\r\n", "\n")
    if text.lstrip().startswith("<think>"):
        text = text.partition("</think>")[2] or text
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    fields = {}
    for heading, end in zip(headings, ends):
        name = _FIELD_OF[re.sub("[ -]", "_", (heading[1] or heading[2]).lower())]
        value = _clean(text[heading.end() : end], quoted='"' in heading[0])
        fields[name] = value or fields.get(name, "")  # an empty heading takes nothing back
    answer = fields.get("Prediction", "")
    if not fields and re.fullmatch(r"\W*\w+\W*", text.strip().split("\n", 1)[0][:40]):
        answer = text.strip()  # a bare label word; one within prose would not count
    line = re.split(r'\n|",\s*"\w+"\s*:', answer, maxsplit=1)[0]  # a line, or to JSON's next key
    labels = set(LABEL_WORD.findall(line.lower()))
    prediction = next(iter(labels)) if len(labels) == 1 else None
    if prediction and "Prediction" in fields:
        fields["Prediction"] = prediction  # what a model adds behind it is not to be learned
    problem = None
    missing = [name for name in FIELDS if not fields.get(name)]
    if missing:
        problem = "missing " + ", ".join(missing)
    elif len(labels) > 1:
        problem = "Prediction names several labels"
    elif prediction is None:
        problem = "Prediction names no label"
    return Reasoning(fields, prediction, problem is None, problem)


def _clean(value, quoted):
    """A field's text without the quotes, commas, braces, fences, rules and hashes around it."""
    value = re.sub(r"```\w{0,10}", "", value).strip().strip("*").strip()
    value = value.rstrip("#-*}],; \t\r\n")
    # trap: behind a Markdown heading a first quote may open a quotation; then it stays
    if value.startswith('"') and (quoted or value.find('"', 1) in (-1, len(value) - 1)):
        value = value[1:]
        if value.endswith('"') and not value.endswith('\\"'):
            value = value[:-1]
    try:
        value = json.loads(f'"{value}"', strict=False)
    except ValueError:
        value = value.replace('\\"', '"').replace("\\n", "\n")
    return value.encode("utf-8", "replace").decode().strip()  # UTF-8 has no lone surrogates


def check_answer(text, label, finish="stop"):
    """(Reasoning of an answer, why it is unfit to train on or None): cut off, incomplete, wrong."""
    parsed = parse_reasoning(text)
    if finish == "length":  # trap: a cut answer may parse well and lack its end
        return parsed, "truncated"
    if parsed.problem is None and parsed.prediction != label:
        return parsed, f"predicts {parsed.prediction}, label is {label}"
    return parsed, parsed.problem


def render_reasoning(fields):
    """The one written form that models are trained on: a quoted paragraph per field, in order. A
    quote within a value stays as it is, as teachers write it."""
    return "\n".join(f'"{name}": "{fields[name]}"' for name in FIELDS)


def render_label(label):
    """The answer to the label prompt: the last field alone."""
    return f'"Prediction": "{label}"'


# ================================================================================================
# §3 Teacher [needs: InputError, §1, §2]
# import hashlib; from dataclasses import dataclass, field
# ================================================================================================


@dataclass
class Request:
    """One question to a teacher: the post, the messages, and what a retry changes."""

    post: Post
    messages: list
    temperature: float
    max_tokens: int
    logprobs: bool = False

    @property
    def prompt(self):
        """The words of the question, which build_messages puts last."""
        return self.messages[-1]["content"][-1]["text"]


@dataclass
class Answer:
    """What came back. `finish`: "length" if it was cut off; tokens as the teacher counts them;
    `logprobs`, if asked for: [(token, {likely token: its log-probability}), …]."""

    text: str
    finish: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0
    logprobs: list = field(default_factory=list)
    seconds: float = 0.0


def two_stage_cot(posts, ask, max_tries=3, max_tokens=512, stage2=True):
    """Asks a teacher for a chain of each labelled post. `ask` takes a list of Requests and returns
    their Answers in the same order (a local model answers a batch at once). Returns a row per post:
    `cot` (None if every try failed), `prediction`, `unaided_prediction` (what stage 1 said, right
    or wrong), `stage`, `tries`, `problem`, `attempts`, tokens, and the seconds of an endpoint.

    paper: stage 1 (task "unaided") asks without the label and is kept if right; stage 2
    ("explained") is given the label and explains it."""
    attempts = {post.id: [] for post in posts}
    ask_until_valid(posts, "unaided", ask, attempts, max_tries, max_tokens)
    if stage2:
        failed = [post for post in posts if attempts[post.id][-1]["problem"]]
        ask_until_valid(failed, "explained", ask, attempts, max_tries, max_tokens)
    rows = []
    for of_post in attempts.values():
        unaided = [each["prediction"] for each in of_post if each["stage"] == 1]
        row = of_post[-1] | dict(tries=len(of_post), attempts=of_post,
                                 unaided_prediction=unaided[-1])
        for name in ("tokens_in", "tokens_out", "seconds"):
            row[name] = sum(each[name] for each in of_post)
        rows.append(row)
    return rows


def ask_until_valid(posts, task, ask, attempts, max_tries, max_tokens):
    """One stage: asks about each post until its answer is valid, at most `max_tries` times. Every
    try is appended to `attempts` {post id: tries}.

    paper: the adaptive retry controller (ARC) asks again while the structure is incomplete.
    choice: each retry is at a higher temperature (0, 0.4, 0.8, 1.2), and after an answer that was
    cut off with twice as many tokens. Stage 1: an answer that is whole but wrong goes on to stage
    2. Stage 2: an answer against the label is asked for again. A refused first question raises."""
    allowed = dict.fromkeys(attempts, max_tokens)
    pending = posts
    for retry in range(max_tries):
        if not pending:
            break
        temperature = min(0.4 * retry, 1.2)
        requests = []
        for post in pending:
            gold = post.label if task == "explained" else None
            requests.append(Request(post, build_messages(post, task, gold), temperature,
                                    allowed[post.id]))
        try:
            answers = ask(requests)
        except Refused as error:  # of the label's prompt, say, or of the doubled max_tokens
            if not all(attempts[post.id] for post in pending):
                raise
            for post in pending:  # earlier answers stand
                attempts[post.id][-1]["problem"] += f"; then refused: {error}"
            break
        pending = []
        for request, answer in zip(requests, answers, strict=True):
            post = request.post
            parsed, problem = check_answer(answer.text, post.label, answer.finish)
            attempts[post.id].append(_attempt(task, request, answer, parsed, problem))
            cut_off = answer.finish == "length"
            if cut_off:
                allowed[post.id] *= 2
            if cut_off or (problem and (task == "explained" or not parsed.complete)):
                pending.append(post)


def _attempt(task, request, answer, parsed, problem):
    """One try as it is kept; a try without a problem holds the chain in its one written form."""
    prompt = request.prompt
    cot = render_reasoning(parsed.fields) if problem is None else None
    return dict(cot=cot, raw=answer.text, prediction=parsed.prediction, problem=problem,
                stage=1 if task == "unaided" else 2, label_conditioned=task == "explained",
                prompt_sha256=hashlib.sha256(prompt.encode()).hexdigest()[:16],
                temperature=request.temperature, max_tokens=request.max_tokens,
                tokens_in=answer.tokens_in, tokens_out=answer.tokens_out, seconds=answer.seconds)


class Refused(InputError):
    """The server will not answer this one request (400, 413, 422 …); others may fare better."""


# ================================================================================================
# §4 Tokens [needs: InputError, explaining, §1, §2]
# import math, torch; from dataclasses import dataclass
# ================================================================================================


# How a post becomes a row of tokens, of Qwen2.5-VL (| is where one piece ends):
#
#   prefix     <|im_start|>system⏎You are a helpful assistant.<|im_end|>⏎<|im_start|>user⏎
#              <|vision_start|><|image_pad|> … <|vision_end|> | Judge … Text: so dismal …
#   branch 1   Answer with these five fields … | <|im_end|>⏎<|im_start|>assistant⏎ |
#              "Text_analysis": … "Prediction": "positive"<|im_end|>
#   branch 2   Answer with this field only … | <|im_end|>⏎<|im_start|>assistant⏎ |
#              "Prediction": "positive"<|im_end|>
#
# A *turn* is what the chat template writes around the user's words and the answer; a *branch* is a
# question with its answer behind the shared prefix. The *shift*: the position before a token is
# where that token is predicted, so the answer's targets stand one position before the answer.


# ---- model families: how an image enters the prompt; all else is common code

# placeholder: stands once for an image in the chat template, once for each of its features in the
# prompt; grid: are positions 3-D (M-RoPE); options: for the image processor, whose result for one
# image is `out`; inputs(out): the model's tensors; image_text(out): what replaces the placeholder;
# limit(image processor, max_pixels): caps an image's pixels.


class QwenVL:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: a placeholder for each merged patch."""

    placeholder, grid, options = "<|image_pad|>", True, {}

    def inputs(self, out):  # patches (n, C t p²) and their grid (1, 3)
        return dict(pixel_values=out["pixel_values"], image_grid_thw=out["image_grid_thw"])

    def image_text(self, out, processor):
        merged = processor.image_processor.merge_size**2
        return self.placeholder * (int(out["image_grid_thw"].prod()) // merged)

    def limit(self, image_processor, max_pixels):
        floor = min(image_processor.size["shortest_edge"], max_pixels)
        image_processor.size = dict(shortest_edge=floor, longest_edge=max_pixels)


class QwenOmni(QwenVL):
    """Qwen2.5-Omni's Thinker, which hears too."""

    placeholder, audio_placeholder = "<|IMAGE|>", "<|AUDIO|>"


class SmolVLM:
    """Square tiles row by row, where the image is split, then the whole of it as one more."""

    placeholder, grid, options = "<image>", False, dict(return_row_col_info=True)

    def inputs(self, out):  # (1, tiles, …) -> (tiles, 1, …), so that images join along the first
        return dict(pixel_values=out["pixel_values"].transpose(0, 1),
                    pixel_attention_mask=out["pixel_attention_mask"].transpose(0, 1))

    def image_text(self, out, processor):
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        vision = processor.config.vision_config
        side = vision.image_size // vision.patch_size // processor.config.scale_factor
        rows, cols = out["rows"][0][0], out["cols"][0][0]  # 0 of an image in one piece
        return get_image_prompt_string(rows, cols, side**2, "<fake_token_around_image>",
                                       self.placeholder, "<global-img>")

    def limit(self, image_processor, max_pixels):
        edge = image_processor.max_image_size["longest_edge"]
        side = max(1, math.isqrt(max_pixels) // edge)  # in tiles
        image_processor.do_image_splitting = side > 1
        image_processor.size = dict(longest_edge=side * edge)


class InternVL:
    """As many square tiles as suit the image's shape, then the whole of it as one more."""

    placeholder, grid, options = "<IMG_CONTEXT>", False, {}

    def inputs(self, out):  # (tiles, 3, H, W)
        return dict(pixel_values=out["pixel_values"])

    def image_text(self, out, processor):
        n = int(out["num_patches"][0]) * processor.config.image_seq_length
        return f"<img>{self.placeholder * n}</img>"

    def limit(self, image_processor, max_pixels):
        tile = image_processor.size["height"] * image_processor.size["width"]
        image_processor.max_patches = max(1, max_pixels // tile)


FAMILIES = {"qwen2_vl": QwenVL(), "qwen2_5_vl": QwenVL(), "qwen3_vl": QwenVL(),
            "qwen3_5": QwenVL(), "qwen2_5_omni": QwenOmni(), "qwen2_5_omni_thinker": QwenOmni(),
            "smolvlm": SmolVLM(), "internvl": InternVL()}
PLACEHOLDERS = {QwenOmni.audio_placeholder, *(f.placeholder for f in FAMILIES.values())}


def layer_types(config):
    """Which kinds of layers the language model has, by its configuration."""
    return set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])


def family_of(config):
    """The entry of FAMILIES. Raises InputError for a model whose layout would be wrong here: the
    branch mask is exact for full attention alone; with recurrent layers (linear_attention) each
    branch is a row of its own; windows, convolutions and other classes are refused."""
    layers = layer_types(config)
    if config.model_type not in FAMILIES or layers - {"full_attention", "linear_attention"}:
        raise InputError(f"model {config._name_or_path!r} is a {config.model_type} with layers of "
                         f"{', '.join(sorted(layers))}; here are {', '.join(FAMILIES)}, with "
                         "layers of full_attention and linear_attention alone")
    return FAMILIES[config.model_type]


@dataclass(frozen=True)
class Turn:
    """How a chat template writes a question and its answer: `head`, up to the last control token
    before the user's words, `opening`, plain text that still comes before them, `tail` from the
    question to where a model goes on, `lead`, what it writes before its words, `end` after them."""

    head: str
    opening: str
    tail: str
    lead: str
    end: str


class Processor:
    """Tokenizer, PIL image processor and, of models that hear, feature extractor of a model folder,
    with its config. (AutoProcessor would need torchvision.)"""

    def __init__(self, config, tokenizer, image_processor, extractor=None):
        self.config, self.family = config, family_of(config)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.extractor = extractor
        self.placeholder_id = tokenizer.convert_tokens_to_ids(self.family.placeholder)
        self.end_id = self.template_ids(self.turn(images=0, sounds=0).end)[0]
        self.pad_id = self.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.never_generated = [i for i, token in tokenizer.added_tokens_decoder.items()
                                if token.special and i not in (self.end_id, self.pad_id)]

    def turn(self, images, sounds):
        """The Turn of a post with so many images and sounds, by the tokenizer's own template."""
        user, answer = "@@user@@", "@@answer@@"
        content = [dict(type="image")] * images + [dict(type="audio")] * sounds
        messages = [dict(role="user", content=[*content, dict(type="text", text=user)]),
                    dict(role="assistant", content=[dict(type="text", text=answer)])]
        options = dict(tokenize=False, enable_thinking=False)
        render = self.tokenizer.apply_chat_template
        with explaining("the tokenizer's chat template cannot be used"):
            asked = render(messages[:1], add_generation_prompt=True, **options)
            before, tail = asked.split(user)
            answered, end = render(messages, **options).split(answer)
            tokens = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
            cut = max(before.rfind(token) + len(token) for token in tokens if token in before)
        if before.count(self.family.placeholder) != images:
            raise InputError(f"the tokenizer's chat template writes no {self.family.placeholder}")
        # the lead is SmolVLM2's space after "Assistant:". trap: some templates end `asked` in an
        # empty <think></think>, which `answered` lacks: no lead
        lead = answered.removeprefix(asked) if answered.startswith(asked) else ""
        return Turn(before[:cut], before[cut:], tail, lead, end)

    def text_ids(self, text):
        """Ids of plain text. trap: a tweet's <|im_end|> must not become the special token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def template_ids(self, text):
        """Ids of what the chat template wrote, control tokens among it."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def audio(self, path):
        """Log-mel features (10 ms frames, mel bins) of a WAV file: those of the model's own
        processor, which pads to 300 s first; 25 ms of silence give the same."""
        samples = load_audio(path).numpy()
        out = self.extractor(samples, sampling_rate=AUDIO_RATE, return_attention_mask=True,
                             max_length=len(samples) + self.extractor.n_fft, return_tensors="pt")
        return out["input_features"][0, :, out["attention_mask"][0].bool()].T


@dataclass
class Example:
    """Token ids of one post. `prefix` (P,), its position_ids (3, P); per branch the ids of
    prompt and answer, and how many of them (from the end) are supervised answer tokens; `media`:
    what the model is given beside ids, of all its images: pixel_values, image_grid_thw (images, 3),
    pixel_attention_mask, each where the family has it; audio (frames, mel bins)."""

    prefix: list
    position_ids: torch.Tensor
    branches: list  # of (ids, number of answer tokens)
    post: Post
    media: dict

    def __len__(self):
        return len(self.prefix) + sum(len(ids) for ids, _ in self.branches)


def join_media(parts):
    """[{name: tensor}, …] -> {name: the tensors of all that have it, one after another}."""
    joined = {}
    for part in parts:
        for name, tensor in part.items():
            joined.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in joined.items()}


def encode(post, branches, processor, shared=None):
    """One post and its branches [(question, answer or None), …] -> Example. `shared`: the text
    that stands before all questions (default `post_prompt(post)`). Ids equal those of the model's
    chat template. trap: where pad is eos, targets masked by its id would never teach to stop."""
    turn = processor.turn(len(post.images), sounds=int(bool(post.audio)))
    family = processor.family
    head, *rest = turn.head.split(family.placeholder)
    images = []
    for path, after in zip(post.images, rest):
        out = processor.image_processor([load_image(path)], return_tensors="pt", **family.options)
        images.append(family.inputs(out))
        head += family.image_text(out, processor) + after
    media = join_media(images)
    if post.audio:
        if processor.extractor is None:
            raise InputError(f"post {post.id} has audio, and this model hears nothing: take "
                             "Qwen2.5-Omni, or leave audio out (train.py readout --without audio)")
        media["audio"] = processor.audio(post.audio)
        pooled = (len(media["audio"]) + 1) // 2 // 2  # as the audio tower pools
        sound = family.audio_placeholder
        head = head.replace(sound, sound * pooled)
    if shared is None:
        shared = post_prompt(post)
    text = turn.opening + shared
    if branches[0][0]:  # empty where `shared` is the whole prompt (a local teacher's)
        # trap: some tokenizers (SmolVLM2's) split line breaks otherwise at the end of a text; a
        # question begins with a letter, so one is put there and its token taken away again
        text_ids = processor.text_ids(text + "A")[:-1]
    else:
        text_ids = processor.text_ids(text)
    prefix = processor.template_ids(head) + text_ids
    position_ids = rope_positions(
        prefix, processor.placeholder_id, media.get("image_grid_thw", ()),
        getattr(processor.image_processor, "merge_size", 1))
    example = Example(prefix, position_ids, [], post, media)
    tail_ids = processor.template_ids(turn.tail)
    for question, answer in branches:
        answer_ids = []
        if answer is not None:
            answer_ids = processor.text_ids(turn.lead + answer) + [processor.end_id]
        ids = processor.text_ids(question) + tail_ids + answer_ids
        example.branches.append((ids, len(answer_ids)))
    return example


def rope_positions(ids, placeholder, grids, merge_size):
    """Qwen-VL's 3-D (time, height, width) positions (3, T): text and audio count up on all three
    axes; an image spans a grid and text goes on after its longer side. trap: without these (or
    mm_token_type_ids) transformers 5 silently uses text positions. Equal to the model's own
    get_rope_index (tested). Without grids all three count up, as other families have it."""
    if not len(grids):
        return torch.arange(len(ids)).expand(3, -1)
    positions, grids, next_position = [], iter(grids), 0
    while len(positions) < len(ids):
        start = next_position
        if ids[len(positions)] != placeholder:
            positions.append((start, start, start))
            next_position += 1
            continue
        _, height, width = next(grids).tolist()  # one frame
        height, width = height // merge_size, width // merge_size
        for h in range(height):
            positions += [(start, start + h, start + w) for w in range(width)]
        next_position += max(height, width)
    return torch.tensor(positions, dtype=torch.long).reshape(-1, 3).T


@dataclass
class Batch:
    """Rows of [prefix | branch 1 | branch 2 … | padding], a row per example. `branch_ids`: 0 in the
    prefix, 1, 2 … in the branches, -1 on padding. `targets[b, t]` is the id to predict *at* t (the
    shift is done), -100 where nothing is supervised. `media`: of all images and sounds."""

    input_ids: torch.Tensor  # (B, T)
    position_ids: torch.Tensor  # (3, B, T)
    branch_ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T)
    media: dict

    def supervised(self, branch):
        """Where an answer token of this branch is to be predicted (B, T)."""
        return (self.targets != -100) & (self.branch_ids == branch)

    def attended(self, branch):
        """Which tokens this branch sees: the prefix's and its own (B, T)."""
        return (self.branch_ids == 0) | (self.branch_ids == branch)

    def alone(self, branch):
        """Rows of [padding | prefix | this branch]: where in the packed rows their tokens stand
        (B, T'), and which of them are no padding (B, T')."""
        attended = self.attended(branch)
        width = int(attended.sum(1).max())
        order = attended.int().argsort(dim=1, stable=True)  # the unattended stand first
        places = order[:, -width:]
        return places, attended.gather(1, places)

    def to(self, device):
        media = {name: tensor.to(device) for name, tensor in self.media.items()}
        return Batch(self.input_ids.to(device), self.position_ids.to(device),
                     self.branch_ids.to(device), self.targets.to(device), media)


def collate(examples, pad_id):
    """Examples -> Batch: all branches of a post behind one copy of its prefix."""
    B, T = len(examples), max(len(example) for example in examples)
    input_ids, position_ids = torch.full((B, T), pad_id), torch.zeros(3, B, T, dtype=torch.long)
    branch_ids, targets = torch.full((B, T), -1), torch.full((B, T), -100)
    for b, example in enumerate(examples):
        start = len(example.prefix)
        input_ids[b, :start] = torch.tensor(example.prefix)
        position_ids[:, b, :start] = example.position_ids
        branch_ids[b, :start] = 0
        position = int(example.position_ids.max()) + 1  # where every branch begins
        for branch, (ids, n_answer) in enumerate(example.branches, 1):
            end = start + len(ids)
            input_ids[b, start:end] = torch.tensor(ids)
            position_ids[:, b, start:end] = torch.arange(position, position + len(ids))
            branch_ids[b, start:end] = branch
            # the only place where targets are shifted: position t learns to predict token t + 1
            targets[b, end - n_answer - 1 : end - 1] = input_ids[b, end - n_answer : end]
            start = end
    media = join_media(example.media for example in examples)
    if media.pop("audio", None) is not None:  # sounds are padded instead
        clips = [example.media["audio"] for example in examples if "audio" in example.media]
        pad = torch.nn.utils.rnn.pad_sequence
        heard = [torch.ones(len(clip), dtype=torch.long) for clip in clips]
        media["input_features"] = pad(clips, batch_first=True).mT  # (clips, mel bins, frames)
        media["feature_attention_mask"] = pad(heard, batch_first=True)  # (clips, frames)
    return Batch(input_ids, position_ids, branch_ids, targets, media)


def branch_mask(branch_ids, dtype):
    """branch_ids (B, T) -> additive mask (B, 1, T, T): a token sees the prefix and its own branch
    up to itself, never a sister. trap: eager attention would add a bool mask as 0 / 1."""
    T = branch_ids.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=branch_ids.device).tril()
    key, query = branch_ids[:, None, :], branch_ids[:, :, None]  # (B, 1, T), (B, T, 1)
    visible = causal & ((key == 0) | (key == query))  # padding (-1) sees itself: no row turns NaN
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


# ---- what a post is trained on


def training_branches(post, processor, max_answer=512, need_chain=True):
    """The training tasks of a labelled post as branches: reasoning, then label; without
    `need_chain` the label task alone. The chain is brought into the one written form. Raises
    InputError that says why a post is unfit; choice: so is a chain that contradicts its label."""
    if post.label is None:
        raise InputError("no label")
    label_task = (LABEL_FORMAT, render_label(post.label))
    if not need_chain:
        return [label_task]
    if not post.cot:
        raise InputError("no cot: run generate.py teacher first")
    parsed, problem = check_answer(post.cot, post.label)
    if problem:
        raise InputError(f"chain unfit: {problem}")
    chain = render_reasoning(parsed.fields)
    if len(processor.text_ids(chain)) >= max_answer:  # with <|im_end|>
        raise InputError(f"chain longer than --max-answer {max_answer} tokens")
    return [(REASON_FORMAT, chain), label_task]


def training_items(paths, images, branches_of):
    """([(post, branches)], [(where, why it was set aside)]) of rows. branches_of(post) -> branches;
    it raises InputError to set a row aside with that reason, and returns [] to leave it out."""
    items, rejects = [], []
    for path in paths:
        for post in read_posts(path, images, rejects, allow_empty=len(paths) > 1):
            try:
                branches = branches_of(post)
                if branches:
                    items.append((post, branches))
            except InputError as e:
                rejects.append((f"{path}: {post.id}", str(e)))
    report_rejects(rejects, "rows in all")
    if not items:
        raise InputError(f"{', '.join(paths)}: no row that this stage can use")
    return items, rejects


# ================================================================================================
# §5 LoRA [needs: InputError, explaining, write_json, read_json, write_tensors, read_tensors]
# import math, os, re, torch; from pathlib import Path; import torch.nn.functional as F
# from torch import nn
# ================================================================================================

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWERS = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower)\.")


class Dropout(nn.Module):
    """nn.Dropout; on a CPU p is a multiple of 1 / 65,536. choice: there torch's draws would take a
    fifth of a training step; these, of 64 bits cut into four, take a quarter of that."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return torch.native_dropout(x, self.p, True)[0]  # one kernel
        draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        bits = draws.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= round(self.p * 2**16) - 2**15).to(x.dtype)
        return (x * kept).div_(1 - self.p)


class LoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) B A dropout(x). `lora_A` (R, in) starts as Kaiming, `lora_B`
    (out, R) at zero, so training begins at the base model. `base`: any frozen module with
    in_features and out_features. paper: Hu et al. 2021, arXiv 2106.09685, §4.1."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
        device = next(iter(base.state_dict().values())).device
        # choice: held and trained in fp32 over any base, multiplied in the base's dtype
        like = dict(device=device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        self.dropout = Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)  # trap: in a model in eval mode dropout would stay on

    def forward(self, x):
        flat = x.flatten(0, -2)  # (N, in)
        low = F.linear(self.dropout(flat), self.lora_A.to(x.dtype))  # (N, R)
        # product, scale and sum in one call
        y = torch.addmm(self.base(flat), low, self.lora_B.to(x.dtype).T, alpha=self.scale)
        return y.view(*x.shape[:-1], y.shape[-1])


def lora_layers(model):
    """{name: LoRALinear} of a model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def linear_names(model, targets=TARGETS, scope="language"):
    """Names of the linear layers whose last part is one of `targets`. scope "language" leaves
    vision and audio towers alone; "all" is the authors' suffix matching."""
    assert scope in ("language", "all"), scope
    names = []
    for name, module in model.named_modules():
        wanted = name.rpartition(".")[2] in targets and hasattr(module, "in_features")
        if wanted and (scope == "all" or not TOWERS.search(name)):
            names.append(name)
    if not names:
        raise InputError(f"no linear layer ends in {', '.join(targets)}: nothing to adapt here")
    return names


def add_lora(model, rank=16, alpha=32, dropout=0.05, targets=TARGETS, scope="language"):
    """Wraps the linears whose name ends in one of `targets` and freezes everything else; returns
    their full names. A new layer is in the mode (train or eval) of the one it wraps."""
    names = linear_names(model, targets, scope)
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha, dropout))
    return names


@torch.no_grad()
def merge_lora(model):
    """Adds every adapter to its base weight, in fp32, and removes the wrappers. Explicit, once,
    for serving. trap: merging in bf16 inside eval() / train() loses bits on every round trip.
    choice: a quantised model becomes dense; quantising the sum would round most adapters away."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "to_linear"):
            model.set_submodule(name, module.to_linear())
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        delta = layer.scale * (layer.lora_B.float() @ layer.lora_A.float())  # (out, in)
        weight.copy_((weight.float() + delta).to(weight.dtype))
        model.set_submodule(name, layer.base)
    return model


def save_adapter(model, folder):
    """`adapter_model.safetensors` + `adapter_config.json` as PEFT writes and reads them, and
    `mulcot.json`, which tells whether the base was in NF4 (PEFT warns of keys it does not know)."""
    layers = lora_layers(model)
    assert layers, "save_adapter on a model without adapters"
    settings = {(layer.rank, layer.alpha, layer.dropout.p) for layer in layers.values()}
    assert len(settings) == 1, f"the file holds one rank, alpha and dropout for all: {settings}"
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
    base = model.config._name_or_path
    if os.path.isdir(base):
        base = os.path.abspath(base)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=layer.rank, lora_alpha=layer.alpha,
                  lora_dropout=layer.dropout.p, bias="none", target_modules=sorted(layers),
                  base_model_name_or_path=base, inference_mode=True)
    write_tensors(os.path.join(folder, "adapter_model.safetensors"), tensors)
    write_json(os.path.join(folder, "adapter_config.json"), config)
    nf4 = any(hasattr(module, "to_linear") for module in model.modules())  # some layer of §9
    write_json(os.path.join(folder, "mulcot.json"), {"nf4": nf4})


def adapter_nf4(folder):
    """Whether an adapter was trained over NF4; PEFT's own do not say, and are taken as not."""
    file = Path(folder, "mulcot.json")
    return file.exists() and read_json(file)["nf4"]


def load_adapter(model, folder):
    """Wraps and fills the layers that the file names; returns their names. Every key must find its
    layer, every layer both its halves, and the layers must be those that the config names, by whole
    names (ours) or endings (PEFT's). trap: elsewhere half a file loads in silence."""
    config = read_json(Path(folder, "adapter_config.json"))
    tensors = read_tensors(Path(folder, "adapter_model.safetensors"))
    unknown = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern",
                               "fan_in_fan_out", "modules_to_save", "lora_bias") if config.get(key)]
    if unknown or config.get("bias", "none") != "none" or config.get("peft_type") != "LORA":
        raise InputError(f"{folder} uses {', '.join(unknown) or 'another adapter type'}: only "
                         "plain LoRA is read here")
    modules = dict(model.named_modules())
    state = {_current_key(key, modules): tensor for key, tensor in tensors.items()}
    names = sorted({key.removesuffix(".lora_A").removesuffix(".lora_B") for key in state})
    with explaining(f"{folder} does not fit: half a file, or wrong base model?"):
        for name in names:
            base = modules.get(name)
            if isinstance(base, LoRALinear):
                base = base.base
            if not hasattr(base, "in_features"):
                raise ValueError(f"{name} fits no linear layer here")
            model.set_submodule(name, LoRALinear(base, config["r"], config["lora_alpha"],
                                                 config.get("lora_dropout", 0.0)))
        report = model.load_state_dict(state, strict=False)
        unfilled = [key for key in report.missing_keys if ".lora_" in key]
        if unfilled or report.unexpected_keys:
            raise ValueError(f"unfilled {unfilled[:1]}, unknown {report.unexpected_keys[:1]}")
        # with these, PEFT adapts fewer layers than target_modules match
        fewer = config.get("exclude_modules") or config.get("layers_to_transform")
        if not fewer and names != _targeted(config["target_modules"], modules):
            raise ValueError("its layers are not those that target_modules names")
    return names


def _targeted(targets, modules):
    """The sorted names of the linear layers that an adapter's target_modules stand for: endings of
    names, or, in a string, an expression for whole names."""
    if not isinstance(targets, str):
        targets = rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    names = []
    for name, module in modules.items():
        linear = hasattr(module, "in_features") or isinstance(module, LoRALinear)
        if linear and re.fullmatch(targets, name):
            names.append(name)
    return sorted(names)


def _current_key(key, modules):
    """PEFT's key as ours; also as older checkpoints spell it (`model.layers.*`, `visual.*`)."""
    key = key.removeprefix("base_model.model.").removesuffix(".weight")
    name, _, part = key.rpartition(".")
    if name not in modules:
        name = re.sub(r"^model\.layers\.", "model.language_model.layers.", name)
        name = re.sub(r"^visual\.", "model.visual.", name)
    return f"{name}.{part}"


# ================================================================================================
# §6 Losses [needs: LABELS]
# import torch; import numpy as np; import torch.nn.functional as F
# ================================================================================================


def multitask_loss(reasoning, label, reasoning_weight=0.8, label_weight=0.2):
    """paper: L_multi = λ_rea L_rea + λ_cls L_cls, λ_rea = 0.8 and λ_cls = 0.2."""
    return reasoning_weight * reasoning + label_weight * label


def student_loss(hard, soft, lam=0.3):
    """paper: L_student = (1 - λ) L_multi^hard + λ L_multi^soft, λ = 0.3. train.py mixes hard and
    soft within each task and then adds the tasks: the same sum."""
    return (1 - lam) * hard + lam * soft


def distill_kl(student_logits, teacher_logits, temperature=2.0, t_squared=False, reduction="mean"):
    """KL(teacher || student) of the distributions softened by τ (MulCoT-RD's assistant is the
    teacher here). Logits (…, V) each, of the same leading dimensions -> scalar, or (…) with
    reduction "none"; "mean" and "sum" are over all positions.

    paper: L^soft at τ = 2, without a factor τ²; `t_squared` is Hinton et al. 2015 (arXiv
    1503.02531, §2), who have it. The longer side is cut to the shorter before the softmax; in
    training to the tokenizer's ids, to which SoftLabels.head is cut (departure 17)."""
    assert reduction in ("mean", "sum", "none"), reduction
    assert student_logits.shape[:-1] == teacher_logits.shape[:-1], (
        student_logits.shape, teacher_logits.shape)
    V = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_p = F.log_softmax(teacher_logits[..., :V].float() / temperature, dim=-1)
    log_q = F.log_softmax(student_logits[..., :V].float() / temperature, dim=-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # (…)
    if t_squared:
        kl = kl * temperature**2
    if reduction == "none":
        return kl
    total = kl.sum()
    return total / max(kl.numel(), 1) if reduction == "mean" else total


def in_chunks(sums_of, hidden, size):
    """The loss of an output layer without its (N, V) logits. `sums_of(hidden[a:b], slice(a, b))`
    -> {"loss": scalar, …} is called on `size` positions of hidden (N, D) each; returns the sums.

    "loss" is differentiable, value and gradient are those of `sums_of(hidden, slice(0, N))`, but
    only one chunk's (size, V) logits exist at a time. The gradient of each chunk is computed
    here, in the forward pass, and reaches `hidden` through the returned loss. Weights that sums_of
    uses (an output head) must be frozen: their gradient would be lost."""
    sums = sums_of(hidden[:0].detach(), slice(0, 0))  # on no positions: zeros under their names
    assert not sums["loss"].requires_grad, "sums_of uses weights that are not frozen"
    gradient = torch.zeros_like(hidden)
    for start in range(0, len(hidden), size):
        positions = slice(start, start + size)
        chunk = hidden[positions].detach().requires_grad_()
        terms = sums_of(chunk, positions)
        (gradient[positions],) = torch.autograd.grad(terms["loss"], chunk)
        for name, value in terms.items():
            sums[name] = sums[name] + value.detach()
    link = (hidden * gradient).sum()  # its gradient with respect to hidden is `gradient`
    sums["loss"] = sums["loss"] + (link - link.detach())  # adds 0 to the value
    return sums


# ---- dev metrics


def confusion_table(gold, predicted, classes=LABELS):
    """Counts (C, C + 1) of gold (rows) by predicted classes (columns); the last is of others."""
    column = {name: k for k, name in enumerate(classes)}
    table = np.zeros((len(classes), len(classes) + 1), dtype=np.int64)
    for g, p in zip(gold, predicted, strict=True):
        table[column[g], column.get(p, -1)] += 1
    return table


def confusion_scores(table):
    """Accuracy, macro and weighted F1 of confusion tables (…, C, C + 1) -> {name: (…)}; others are
    wrong predictions. Equal to scikit-learn's with labels=classes, zero_division=0."""
    correct = np.diagonal(table, axis1=-2, axis2=-1)  # (…, C)
    support = table.sum(-1)
    predicted = table.sum(-2)[..., :-1]
    f1 = 2 * correct / np.maximum(support + predicted, 1)
    n = np.maximum(support.sum(-1), 1)
    return dict(accuracy=correct.sum(-1) / n, macro_f1=f1.mean(-1),
                weighted_f1=(f1 * support).sum(-1) / n)


# ================================================================================================
# §7 Soft labels [needs: InputError, read_json, digest, write_tensors, read_tensors]
# import torch; from pathlib import Path; from safetensors import safe_open
# ================================================================================================


class SoftLabels:
    """The assistant's last hidden states at the supervised positions, in `folder`, and its output
    matrix `head` (V', D'): their product are its logits. part-*.safetensors hold an entry (n, D')
    in float16 for each branch of each example, named by a hash of its token ids, prefix and pixels:
    none is found for another post, prompt or picture. generate.py soft writes `settings`, by which
    it keeps a second assistant out of the folder, and train.py another tokenizer."""

    def __init__(self, folder):
        self.folder, self.head = Path(folder), None
        self.settings = read_json(self.folder / "settings.json")
        self.parts = {}  # the open file of each entry
        for path in sorted(self.folder.glob("part-*.safetensors")):
            file = safe_open(path, "pt")
            self.parts.update(dict.fromkeys(file.keys(), file))

    @staticmethod
    def names(example):
        """The entry name of each of an example's branches."""
        prefix = digest(example.prefix, *example.media.values())
        return [digest(prefix, ids, n_answer) for ids, n_answer in example.branches]

    def write_part(self, entries):
        """{name: hidden (n, D')} -> one more file, named by content: none collide."""
        tensors = {name: hidden.to(torch.float16) for name, hidden in entries.items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise InputError("the assistant's hidden states do not fit 16 bits: train --no-soft")
        write_tensors(self.folder / f"part-{digest(*sorted(entries))}.safetensors", tensors)

    def write_head(self, weight):
        """The assistant's output matrix, cut to the tokenizer's ids (V', D')."""
        write_tensors(self.folder / "head.safetensors", dict(weight=weight))

    def load_head(self, device):
        """Reads the assistant's output matrix."""
        self.head = read_tensors(self.folder / "head.safetensors")["weight"].to(device)

    def hidden(self, examples, branch):
        """The assistant's hidden states (N, D') at the supervised positions of this branch, example
        after example, in the head's dtype and on its device."""
        entries = []
        for example in examples:
            name = self.names(example)[branch - 1]
            if name not in self.parts:
                raise InputError(f"{self.folder} has no soft labels for this post, prompt and "
                                 "image: take the assistant's --max-pixels, or rerun generate.py "
                                 "soft with this --data, or train with --no-soft")
            entries.append(self.parts[name].get_tensor(name))
        return torch.cat(entries).to(self.head)


# ================================================================================================
# §8 Model [needs: LABELS, InputError, explaining, read_json, §1, §2, §4, §5, §9]
# import os, torch; from pathlib import Path; import torch.nn.functional as F
# ================================================================================================


def default_dtype(device):
    """Of a base on this device: bfloat16 where it is a GPU that has it, else float32."""
    if not str(device).startswith("cuda"):
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    print("note       this GPU has no bfloat16, so the default is float32")
    return "float32"


def load_model(name, device="cpu", dtype=None, max_pixels=None, nf4=None):
    """(model in eval mode, Processor) from a hub name, a model folder or an adapter folder (whose
    base is read first). dtype: "float32", "bfloat16" or "auto" (the file's), default
    `default_dtype`; max_pixels: image cap; nf4: whether the language model's linears are in 4 bits
    (default: as the adapter was trained). `load_trained` of §10 also loads a readout's head."""
    from transformers import AutoModelForImageTextToText, Qwen2_5OmniThinkerForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = base_of(name)
    processor = load_processor(name, max_pixels)
    dtype = dtype or default_dtype(device)
    model_class = AutoModelForImageTextToText
    if processor.extractor:  # the whole Omni is no such model, its Thinker is
        model_class = Qwen2_5OmniThinkerForConditionalGeneration
    with explaining(f"model {base!r} cannot be loaded"):
        model, report = model_class.from_pretrained(
            base, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    missing = report["missing_keys"]
    if missing:  # trap: saved with LoRA wrappers it reloads with random layers
        raise InputError(f"model {base!r} lacks {len(missing)} weights, first {min(missing)}: was "
                         "it saved before merge_lora?")
    if nf4 or nf4 is None and adapter_nf4(name):
        quantize_linears(model, linear_names(model), device)
    if base != str(name):
        load_adapter(model, name)
    return model.to(device).eval(), processor


def load_processor(name, max_pixels=None):
    """Tokenizer and image processor of a hub name, model folder or adapter folder."""
    from transformers import (
        AutoConfig, AutoImageProcessor, AutoTokenizer, WhisperFeatureExtractor)
    from transformers.utils import cached_file

    base = base_of(name)
    with explaining(f"model {base!r} cannot be loaded"):
        config = AutoConfig.from_pretrained(base)
        family = family_of(config)
        tokenizer = AutoTokenizer.from_pretrained(base)
        if tokenizer.chat_template is None:  # older folders keep it beside the processor
            file = cached_file(base, "chat_template.json")
            tokenizer.chat_template = read_json(file)["chat_template"]
        # the image size of training is kept beside an adapter
        trained = Path(name, "preprocessor_config.json").exists()
        folder = name if trained else base
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        extractor = None
        if isinstance(family, QwenOmni):
            extractor = WhisperFeatureExtractor.from_pretrained(base)
    if isinstance(family, InternVL):
        image_processor.crop_to_patches = True  # as its own processor, whatever the file says
    if max_pixels:
        family.limit(image_processor, max_pixels)
    return Processor(config, tokenizer, image_processor, extractor)


def base_of(name):
    """The model that a hub name or folder stands for: itself, or the base of an adapter folder."""
    base, config = str(name), Path(name, "adapter_config.json")
    if config.exists():
        base = str(read_json(config).get("base_model_name_or_path"))
        if os.path.realpath(base) == os.path.realpath(name):
            raise InputError(f"{name} holds a model and its adapter: give each its own folder")
    if Path(name, "best", "adapter_config.json").exists():
        raise InputError(f"{name} is a training run: use {name}/best")
    return base


CACHE_ROOM = 64  # tokens


def new_cache(model):
    """An empty key-value cache for `forward_branches` to fill and `decode_branch` to extend."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """`keys` and `values` (B, H, T, D) are views of buffers with room for more. choice: to copy
        the cache for each token would be two thirds of the time of 64 chains on a CPU."""

        def update(self, keys, values, *_, **__):
            """The cached keys and values with the new ones behind them."""
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.keys, self.values = keys[:, :, :0], values[:, :, :0]
                self.buffers = self.keys, self.values
            start = self.keys.shape[2]
            end = start + keys.shape[2]
            if end > self.buffers[0].shape[2]:
                room = (0, 0, 0, end + CACHE_ROOM - start)  # none along D, this behind T
                self.buffers = F.pad(self.keys, room), F.pad(self.values, room)
            self.buffers[0][:, :, start:end] = keys
            self.buffers[1][:, :, start:end] = values
            self.keys, self.values = self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]
            return self.keys, self.values

        def reorder_cache(self, kept):
            """Keeps these rows (indices); `update` makes room for them anew."""
            super().reorder_cache(kept)
            self.buffers = self.keys, self.values

    cache = DynamicCache(config=model.config)
    for n, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # recurrent layers have caches of their own
            cache.layers[n] = RoomyLayer()
    return cache


def run_model(model, input_ids, position_ids, mask, cache=None, **media):
    """Hidden states (B, T, D) of the last layer: the class's own forward pass, images and all, with
    our positions (3, B, T) and mask: additive (B, 1, T, T and the cached). Recurrent models take
    1 and 0 (B, T), but for a single new token the additive one, for their attention layers."""
    if not FAMILIES[model.config.model_type].grid:
        position_ids = position_ids[0]
    # transformers 5.24 calls past_key_values `cache`; the old name is taken until 5.40
    out = model.model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask,
                      past_key_values=cache, use_cache=cache is not None, **media)
    return out.last_hidden_state


def forward_branches(model, batch, cache=None):
    """Hidden states (B, T, D) of the last layer: one pass over image, sound and prefix for all
    branches (of recurrent layers a pass for each). `cache` is filled for `decode_branch`."""
    if "flash" in (model.config._attn_implementation or ""):
        raise InputError("flash attention cannot take the branch mask: load the model with sdpa "
                         "or eager")
    assert not (batch.branch_ids[:, 0] == -1).any(), "padding must stand at the end of each row"
    if "linear_attention" in layer_types(model.config):  # a state runs on, whatever the mask
        return _branch_by_branch(model, batch, cache)
    mask = branch_mask(batch.branch_ids, model.get_input_embeddings().weight.dtype)
    return run_model(model, batch.input_ids, batch.position_ids, mask, cache, **batch.media)


def _branch_by_branch(model, batch, cache):
    """`forward_branches` for recurrent layers: a pass for each branch, the prefix with it; the
    hidden states are put where they stand in the packed rows. The cache is of the last branch.
    trap: such layers ignore a 4-D mask silently."""
    last = int(batch.branch_ids.max())
    hidden = None  # (B, T, D)
    for branch in range(1, last + 1):
        places, real = batch.alone(branch)  # (B, T')
        positions = batch.position_ids.gather(2, places.expand(3, -1, -1))
        alone = run_model(model, batch.input_ids.gather(1, places), positions, real.long(),
                          cache if branch == last else None, **batch.media)  # (B, T', D)
        if hidden is None:
            hidden = alone.new_zeros(*batch.input_ids.shape, alone.shape[-1])
        packed = torch.zeros_like(hidden).scatter(1, places[..., None].expand_as(alone), alone)
        hidden = torch.where(batch.attended(branch)[..., None], packed, hidden)
    return hidden


def encode_batch(posts, branches, model, processor):
    """The posts, each with these branches, as a Batch on the model's device."""
    examples = [encode(post, branches, processor) for post in posts]
    return collate(examples, processor.pad_id).to(model.device)


# ---- labels

CHUNK_LOGITS = 2**26  # of one (n, V) tensor: 256 MiB in fp32, 440 positions of Qwen's vocabulary


def label_branches(classes=LABELS, question=LABEL_FORMAT):
    """The label prompt with each of its answers, as branches."""
    return [(question, render_label(label)) for label in classes]


@torch.no_grad()
def score_labels(model, batch, hidden=None):
    """Log-probabilities (B, C) of a batch whose first C branches are answers, `label_branches()`:
    the sum over all tokens of an answer, `"Prediction": "…"` and its end of turn, then normalised
    over the C. One forward pass (`hidden` (B, T, D), if it has been made)."""
    if hidden is None:
        hidden = forward_branches(model, batch)
    supervised = batch.targets != -100  # (B, T)
    targets = batch.targets[supervised]  # (N,)
    log_p = []
    size = max(1, CHUNK_LOGITS // model.lm_head.out_features)
    head = model.lm_head.weight.float()  # trap: logits in bf16 move a probability by up to 0.04
    for h, ids in zip(hidden[supervised].float().split(size), targets.split(size)):
        log_p.append(-F.cross_entropy(h @ head.T, ids, reduction="none"))
    row = supervised.nonzero()[:, 0]  # (N,)
    branch = batch.branch_ids[supervised]  # (N,); a branch without an answer has no column
    sums = hidden.new_zeros(len(supervised), int(branch.max()), dtype=torch.float32)
    sums.index_put_((row, branch - 1), torch.cat(log_p), accumulate=True)
    return sums.log_softmax(-1)


# ---- chains


@torch.no_grad()
def generate_text(model, processor, batch, max_new_tokens, temperature=0.0):
    """[(text, "stop" or "length"), …] for a batch's last branch, without an answer; 0 is greedy."""
    cache = new_cache(model)
    hidden = forward_branches(model, batch, cache)
    return decode_branch(model, processor, batch, hidden, cache, max_new_tokens, temperature)


@torch.no_grad()
def decode_branch(model, processor, batch, hidden, cache, max_new_tokens, temperature=0.0):
    """Goes on where `forward_branches` left the last branch of each row: hidden (B, T, D) and its
    cache -> [(text, finish), …]. New tokens see the prefix and their own branch, so one pass over
    a post can serve its labels and its chain. A row that has ended leaves the batch. Equal to
    transformers' generate (tested), which is slower. Special ids never come out."""
    B, T = batch.input_ids.shape
    device = hidden.device
    branch = int(batch.branch_ids.max())
    in_branch = batch.branch_ids == branch  # (B, T)
    rows = torch.arange(B, device=device)
    last = (in_branch * torch.arange(T, device=device)).argmax(1)  # (B,)
    h = hidden[rows, last]  # (B, D)
    if not h.isfinite().all():  # else the text of whatever token is the largest of NaNs
        raise InputError(f"{model.config._name_or_path} or its adapter yields NaN: is it damaged?")
    position = batch.position_ids[:, rows, last]  # (3, B)
    visible = batch.attended(branch)  # (B, T)
    if "linear_attention" in layer_types(model.config):  # each branch was a row of its own
        visible = batch.alone(branch)[1]
    dtype = model.get_input_embeddings().weight.dtype
    never = torch.tensor(processor.never_generated, device=device)
    stop_ids = (processor.end_id, processor.pad_id)
    generated_ids = [[] for _ in range(B)]
    finish = ["length"] * B
    alive = list(range(B))  # which rows are still in the batch
    for _ in range(max_new_tokens):
        logits = model.lm_head(h).float().index_fill(1, never, -torch.inf)  # (B, V)
        token = logits.argmax(-1)  # (B,)
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        going = []
        for n, (row, t) in enumerate(zip(alive, token.tolist())):  # the step's only wait for a GPU
            if t in stop_ids:
                finish[row] = "stop"
            else:
                generated_ids[row].append(t)
                going.append(n)
        if not going:
            break
        if len(going) < len(alive):
            alive = [alive[n] for n in going]
            kept = torch.tensor(going, device=device)
            token, position, visible = token[kept], position[:, kept], visible[kept]
            cache.reorder_cache(kept)
        position = position + 1
        visible = torch.cat([visible, visible.new_ones(len(alive), 1)], 1)
        mask = torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None]
        h = run_model(model, token[:, None], position[..., None], mask, cache)[:, 0]  # (B, D)
    return list(zip(processor.tokenizer.batch_decode(generated_ids), finish))


# ---- a post from Python


@torch.no_grad()
def predict(model, processor, posts, chain=True, decode="score", max_new_tokens=512):
    """What the model says of a Post (-> dict) or of a list of Posts (-> list of dicts):
    `prediction` and `probs` (in the order of LABELS) by the label prompt; with `chain` also `raw`
    (the chain), its `fields` {name: text}, `chain_prediction`, `problem` (or None) and `tokens`.

    paper: the label comes from the label prompt, the chain from the reason prompt. choice: the
    answers are scored; decode="greedy" generates one (`raw_label`, no `probs`; departure 22)."""
    if isinstance(posts, Post):
        return predict(model, processor, [posts], chain, decode, max_new_tokens)[0]
    answers = []
    if decode == "score" and chain:  # one pass over image and post serves the labels and the chain
        batch = encode_batch(posts, [*label_branches(), (REASON_FORMAT, None)], model, processor)
        cache = new_cache(model)
        hidden = forward_branches(model, batch, cache)
        rows = label_rows(score_labels(model, batch, hidden).exp())
        answers = decode_branch(model, processor, batch, hidden, cache, max_new_tokens)
    elif decode == "score":
        batch = encode_batch(posts, label_branches(), model, processor)
        rows = label_rows(score_labels(model, batch).exp())
    else:
        batch = encode_batch(posts, [(LABEL_FORMAT, None)], model, processor)
        rows = []
        for text, _ in generate_text(model, processor, batch, max_new_tokens=32):
            rows.append(dict(prediction=parse_reasoning(text).prediction, raw_label=text))
        if chain:
            batch = encode_batch(posts, [(REASON_FORMAT, None)], model, processor)
            answers = generate_text(model, processor, batch, max_new_tokens)
    for row, (text, finish) in zip(rows, answers):
        row |= chain_row(text, finish) | dict(tokens=len(processor.text_ids(text)))
    return rows


def chain_row(text, finish):
    """A generated chain as fields of a row; finish "length": it was cut off."""
    parsed = parse_reasoning(text)
    return dict(raw=text, fields=parsed.fields, chain_prediction=parsed.prediction,
                problem="truncated" if finish == "length" else parsed.problem)


def label_rows(probs):
    """Probabilities (B, C) as fields of rows: prediction and probs."""
    return [dict(prediction=LABELS[p.index(max(p))], probs=p) for p in rounded(probs)]


def rounded(tensor):
    """Nested lists of 6 decimals, for JSON."""
    return (tensor.double() * 1e6).round().div(1e6).tolist()


# ---- MulCoT-RD ends here; what follows are the two neighbours and the files -------------------


# ================================================================================================
# §9 NF4 (arXiv 2305.14314)
# import functools, torch; import torch.nn.functional as F; from torch import nn
# ================================================================================================

# paper: QLoRA, arXiv 2305.14314, appendix E: the 16 levels of NF4, as float32
NF4 = torch.tensor([-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036,
                    0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617,
                    0.72295684, 1], dtype=torch.float32)
# both levels of each byte, two float32 in one int64: one look-up per byte
NF4_PAIRS = torch.cartesian_prod(NF4, NF4).view(torch.int64).flatten()


@functools.cache
def nf4_pairs(device):
    """NF4_PAIRS, moved there once."""
    return NF4_PAIRS.to(device)


def nf4_quantize(weight, block=64):
    """n weights, n a multiple of `block` -> codes (n / 2,) uint8, two a byte, the first in its high
    half, and absmax (n / block,) float32. Bit for bit what bitsandbytes 0.50 makes on CPU: float32
    inside, a weight midway between levels takes the lower, a block of zeros has absmax 0."""
    assert weight.numel() % block == 0, (tuple(weight.shape), block)
    blocks = weight.detach().reshape(-1, block).float()
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    midpoints = ((NF4[1:] + NF4[:-1]) / 2).to(weight.device)
    code = torch.bucketize(scaled.flatten(), midpoints, out_int32=True).to(torch.uint8)
    return code[::2] << 4 | code[1::2], absmax


def nf4_dequantize(codes, absmax, shape, dtype, block=64):
    """The weights (shape): level x absmax in float32, rounded once to `dtype`."""
    assert absmax.dtype == torch.float32, absmax.dtype  # trap: model.half() would have rounded it
    pairs = nf4_pairs(codes.device).index_select(0, codes.int())
    levels = pairs.view(torch.float32).view(-1, block)
    return (levels * absmax[:, None]).to(dtype).view(shape)


class _NF4Matmul(torch.autograd.Function):
    """x Wᵀ + b; W is dequantised here and again in backward, so that no graph holds it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight(layer.dtype), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.weight(grad.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer in blocks of 64: 4.5 bits a weight. `dtype`: of the weight it stands
    for. Neither weight nor bias gets a gradient; adapters on top do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        codes, absmax = nf4_quantize(linear.weight)
        self.codes, self.absmax = nn.Buffer(codes), nn.Buffer(absmax)
        self.requires_grad_(False)

    def weight(self, dtype):
        """The weight (out, in)."""
        return nf4_dequantize(self.codes, self.absmax, (self.out_features, self.in_features), dtype)

    def forward(self, x):
        flat = _NF4Matmul.apply(x.reshape(-1, self.in_features), self)
        return flat.view(*x.shape[:-1], self.out_features)

    def to_linear(self):
        """An ordinary linear layer of the same weights."""
        dense = nn.Linear(self.in_features, self.out_features, device="meta")
        dense.weight = nn.Parameter(self.weight(self.dtype), requires_grad=False)
        dense.bias = self.bias
        return dense


def quantize_linears(model, names, device=None):
    """Turns the linear layers of these names into NF4, one by one, in place, on the device."""
    for name in names:
        model.set_submodule(name, NF4Linear(model.get_submodule(name).to(device)))


def count_parameters(model):
    """All weights, those in 4 bits too."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    weights = sum(2 * module.codes.numel() for module in packed)  # two a byte
    return weights + sum(p.numel() for p in model.parameters())


# ================================================================================================
# §10 Readout (arXiv 2606.05713) [needs: LABELS, explaining, read_json, read_tensors, §1, §2, §8]
# import re, torch; from pathlib import Path; import torch.nn.functional as F; from torch import nn
# ================================================================================================

SCORE_FORMAT = "Answer with one number from -3 (very negative) to 3 (very positive)."


def render_score(score):
    """The answer to the score prompt: a number with one decimal."""
    return f"{round(score, 1) + 0.0:.1f}"  # + 0.0: no "-0.0"


def parse_score(text):
    """The first number in a model's answer, in range or not, or None. Never raises."""
    found = re.search(r"[-+\u2212]?(?:[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})", text)
    return float(found[0].replace("\u2212", "-")) if found else None


# ---- the readout: a score or label read off the last hidden state


class Readout(nn.Module):
    """Reads a score or a label off the last token's hidden state. `config` is its head.json:
    target "score" | "label"; readout "discriminative", or "generative" for its rival, which has no
    layers and writes the score as text; mean and deviation of the training scores; without: inputs
    left out. paper: Linear D -> 256, LayerNorm, ReLU, Dropout 0.2, Linear 256 -> 1."""

    def __init__(self, width, config):
        super().__init__()
        defaults = dict(readout="discriminative", mean=0.0, deviation=1.0, without=[])
        self.config = defaults | config
        self.discriminative = self.config["readout"] == "discriminative"
        if self.discriminative:
            outputs = 1 if config["target"] == "score" else len(LABELS)
            self.layers = nn.Sequential(nn.Linear(width, 256), nn.LayerNorm(256), nn.ReLU(),
                                        nn.Dropout(0.2), nn.Linear(256, outputs))

    def forward(self, hidden, attended):
        """Hidden states (B, T, D), attended tokens (B, T) -> a z-score (B, 1) or logits (B, 3)."""
        return self.layers(last_hidden(hidden, attended).float())


def last_hidden(hidden, attended):
    """The hidden state (B, D) of each row's last attended token; hidden (B, T, D), attended (B, T).
    trap: under left padding "count of tokens - 1" is another token."""
    B, T = attended.shape
    at = T - 1 - attended.int().flip(1).argmax(1)  # (B,)
    return hidden[torch.arange(B, device=hidden.device), at]


def readout_loss(out, gold, mean=0.0, deviation=1.0):
    """Sum over the posts. paper: L1 between a readout's z-scores (B, 1) and the gold scores (B,)
    z-scored by the training posts; of classes (B,), a long tensor, the cross-entropy."""
    if gold.is_floating_point():
        return F.l1_loss(out[:, 0], (gold - mean) / deviation, reduction="sum")
    return F.cross_entropy(out, gold, reduction="sum")


def readout_branches(target):
    """The prompt of a readout: one branch, without an answer."""
    return [(SCORE_FORMAT if target == "score" else LABEL_FORMAT, None)]


@torch.no_grad()
def read_out(model, processor, posts):
    """What a model with a readout says of posts, one dict each: `score`, within [-3, 3], or
    `prediction` and `probs`. A generated score is as written, or None, with `raw`, `problem`."""
    config = model.readout.config
    posts = [without_inputs(post, config["without"]) for post in posts]
    batch = encode_batch(posts, readout_branches(config["target"]), model, processor)
    if not model.readout.discriminative:
        rows = []
        for text, _ in generate_text(model, processor, batch, max_new_tokens=8):
            score = parse_score(text)
            rows.append(dict(score=score, raw=text, problem="no number" if score is None else None))
        return rows
    out = model.readout(forward_branches(model, batch), batch.branch_ids >= 0)  # (B, 1) or (B, 3)
    if config["target"] == "label":
        return label_rows(out.softmax(-1))
    scores = (out[:, 0] * config["deviation"] + config["mean"]).clamp(-SCORE_RANGE, SCORE_RANGE)
    return [dict(score=score) for score in rounded(scores)]


def load_readout(model, folder):
    """Puts the head that train.py readout wrote on the model."""
    with explaining(f"{folder} holds a damaged or foreign readout head"):
        readout = Readout(model.lm_head.in_features, read_json(Path(folder, "head.json")))
        if readout.discriminative:
            readout.load_state_dict(read_tensors(Path(folder, "head.safetensors")))
    model.readout = readout.to(model.device).eval()


def load_trained(name, device="cpu", dtype=None, max_pixels=None, nf4=None):
    """`load_model` and the readout head that lies beside an adapter."""
    model, processor = load_model(name, device, dtype, max_pixels, nf4)
    if Path(name, "head.json").exists():
        load_readout(model, name)
    return model, processor


# ================================================================================================
# §11 UBM and cascade (arXiv 2509.04459) [needs: LABELS, explaining, §1]
# import math, re, torch; from dataclasses import dataclass; import numpy as np
# from PIL import Image; from torch import nn
# ================================================================================================

SCORE_BINS = tuple(range(-3, 4))  # choice: a score as seven classes, so that it has entropy


# ---- the UBM: a small classifier


def clean_tweet(text):
    """A tweet without links and RT prefix, `@name` as `@ user`, hashtags split at capitals."""
    text = re.sub(r"https?:\S*|www\.\S+", " ", text)
    text = re.sub(r"^\s*RT @ ?[^:]{1,30}: ", " ", text)
    text = re.sub(r"@ ?\w+", "@ user", text)

    def split_hashtag(found):
        return "# " + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", found[1])

    return " ".join(re.sub(r"# ?(\w+)", split_hashtag, text).split())


def mark_aspect(post):
    """(clean text with `* aspect *` marked in place, clean aspect or "", where in the text the
    aspect stands: (start, end), of the whole text if it is not found)."""
    text = clean_tweet(post.text)
    aspect = clean_tweet(post.aspect or "")
    found = re.search(rf"(?<!\w){re.escape(aspect)}(?!\w)", text) if aspect else None
    if found is None:
        return text, aspect, (0, len(text))
    marked = f"{text[: found.start()]}* {aspect} *{text[found.end() :]}"
    start = found.start() + len("* ")
    return marked, aspect, (start, start + len(aspect))


class UBM(nn.Module):
    """Small classifiers of posts into `classes` (LABELS or SCORE_BINS), alike but for their seeds,
    that answer together: the mean of their probabilities. Lakshminarayanan et al. 2017,
    arXiv 1612.01474. `temperature` divides the logits of `probs`. `new_ubm` builds it."""

    def __init__(self, members, classes):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.classes = tuple(classes)
        self.target = "label" if self.classes == LABELS else "score"
        self.tokenizer = members[0].tokenizer
        self.temperature = 1.0

    def inputs(self, posts):
        """What all members read of B posts."""
        return self.members[0].inputs(posts)

    def forward(self, inputs):
        """`inputs` of B posts -> log of the mean probabilities (B, C), without the temperature."""
        log_p = [member(inputs).log_softmax(-1) for member in self.members]
        return torch.stack(log_p).logsumexp(0) - math.log(len(log_p))

    @torch.no_grad()
    def probs(self, posts):
        """Calibrated probabilities (B, C) on the CPU; in eval mode."""
        return (self.eval()(self.inputs(posts)) / self.temperature).softmax(-1).cpu()


class UBMMember(nn.Module):
    """One small classifier into C classes: any Hugging Face text encoder and, if given, an image
    encoder; a linear layer reads the first token and the means over aspect and image."""

    def __init__(self, text, tokenizer, classes, image=None, image_processor=None):
        super().__init__()
        self.text, self.tokenizer = text, tokenizer
        self.image, self.image_processor, self.image_width = image, image_processor, 0
        if image is not None:  # how wide the encoder's output is, it says itself
            blank = self._pixels([Image.new("RGB", (64, 64))])
            self.image_width = self._mean_features(blank).shape[1]
        width = 2 * text.config.hidden_size + self.image_width
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, len(classes)))

    def inputs(self, posts):
        """What every member reads of B posts: token tensors, where the aspect's pieces are
        (B, T, 1), which posts have an image, and the pixels of those."""
        texts, aspects, spans = zip(*[mark_aspect(post) for post in posts])
        longest = min(256, self.tokenizer.model_max_length)
        tokens = self.tokenizer(list(texts), list(aspects), padding=True, truncation=True,
                                max_length=longest, split_special_tokens=True, return_tensors="pt",
                                return_offsets_mapping=True)
        start, end = tokens.pop("offset_mapping").unbind(-1)  # (B, T) each, in characters
        span_start, span_end = torch.tensor(spans)[..., None].unbind(1)  # (B, 1) each
        in_aspect = (start < span_end) & (end > span_start)
        for b in range(len(posts)):  # the text is sequence 0, the aspect behind it 1
            in_aspect[b] &= torch.tensor([part == 0 for part in tokens.sequence_ids(b)])
        device, pixels = self.head[1].weight.device, None
        with_image = [b for b, post in enumerate(posts) if post.image and self.image is not None]
        if with_image:
            pixels = self._pixels([load_image(posts[b].image) for b in with_image]).to(device)
        return tokens.to(device), in_aspect[..., None].to(device), with_image, pixels

    def forward(self, inputs):
        """`inputs` of B posts -> logits (B, C)."""
        tokens, in_aspect, with_image, pixels = inputs
        hidden = self.text(**tokens).last_hidden_state.float()  # (B, T, D)
        aspect = (hidden * in_aspect).sum(1) / in_aspect.sum(1).clamp(min=1)  # (B, D)
        features = [hidden[:, 0], aspect]
        if self.image is not None:
            image = hidden.new_zeros(len(hidden), self.image_width)  # zero for a post without image
            if with_image:
                image[with_image] = self._mean_features(pixels).float()
            features.append(image)
        return self.head(torch.cat(features, 1))

    def _pixels(self, images):
        """PIL images -> (B, 3, H, W) as the encoder wants them."""
        return self.image_processor(images=images, return_tensors="pt").pixel_values

    def _mean_features(self, pixels):
        """(B, 3, H, W) -> (B, W), over positions of a map or tokens of a sequence."""
        out = self.image(pixels).last_hidden_state
        return out.flatten(2).mean(2) if out.dim() == 4 else out.mean(1)


def new_ubm(text, classes=LABELS, image=None, members=1, weights=True):
    """A UBM over encoders given by hub name or folder; the members' heads are random.
    weights=False: shapes only, the encoders are random too."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    def encoder(name):
        options = dict(attn_implementation="eager", dtype=torch.float32)
        if weights:
            return AutoModel.from_pretrained(name, **options)
        return AutoModel.from_config(AutoConfig.from_pretrained(name), **options)

    with explaining(f"encoder {text!r} or {image!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(text)
        assert tokenizer.is_fast, "a slow tokenizer does not tell where words stand"
        processor = AutoImageProcessor.from_pretrained(image, backend="pil") if image else None
        ensemble = []
        for _ in range(members):
            image_encoder = encoder(image) if image else None
            ensemble.append(UBMMember(encoder(text), tokenizer, classes, image_encoder, processor))
    return UBM(ensemble, classes)


# ---- verdicts: what a pass of the cascade says, and how sure it is

POLARITY_EPSILON = 0.5  # choice: a score nearer to 0 than half a bin takes no side


@dataclass
class Verdict:
    """What a pass says of a post, and its cost: the label, of scores the polarity, as `prediction`;
    `uncertainty` from 0 to 1, None where unknown; of labels `probs` in their order, of scores the
    expectation `predicted_score` and the bins' `bin_probs`; `failed`: why it says nothing."""

    prediction: str | None = None
    uncertainty: float | None = None
    probs: list | None = None
    predicted_score: float | None = None
    bin_probs: list | None = None
    failed: str | None = None
    tokens: int = 0
    seconds: float = 0.0

    def row(self, cost=True):
        """The fields that are known, for a row; without what it cost if asked so."""
        left_out = () if cost else ("tokens", "seconds")
        return {name: value for name, value in vars(self).items()
                if value is not None and name not in left_out}


def uncertainty(probs):
    """u = H(p) / log C of (B, C) -> (B,), 0 to 1. paper: entropy; choice: over its maximum."""
    return torch.special.entr(probs).sum(-1) / math.log(probs.shape[-1])


def score_verdict(score, u, bin_probs=None):
    """The Verdict of a score with uncertainty u (None where unknown)."""
    polarity = "neutral"
    if abs(score) > POLARITY_EPSILON:
        polarity = "positive" if score > 0 else "negative"
    return Verdict(polarity, u, predicted_score=round(score, 6), bin_probs=bin_probs)


# ---- the cascade: which pass settles a post


def cascade_route(ubm, mllm, second_pass, tau1, tau2):
    """How far a post is settled -> (route, Verdict or None, reason). `ubm`, `mllm`, `second_pass`:
    the passes' Verdicts, None where a pass was not asked yet. Routes "ask mllm" and "ask
    second_pass" want the next pass; "ubm", "mllm", "agree" and "second_pass" settle the post.

    paper: keep what the UBM is sure of; accept the MLLM if it is sure or of the UBM's polarity;
    else ask it a second time. choice: sure is u <= τ, an unknown u never is; where a pass failed
    the surest earlier answer stands."""
    if ubm.uncertainty <= tau1:
        return "ubm", ubm, f"sure: uncertainty {ubm.uncertainty:.2f} <= {tau1:.2f}"
    if mllm is None:
        return "ask mllm", None, "the UBM is unsure"
    if mllm.failed:
        return "ubm", ubm, f"unsure, but the MLLM failed: {mllm.failed}"
    if mllm.uncertainty is not None and mllm.uncertainty <= tau2:
        return "mllm", mllm, f"sure: uncertainty {mllm.uncertainty:.2f} <= {tau2:.2f}"
    if mllm.prediction == ubm.prediction:
        return "agree", _mean_verdict(ubm, mllm), "the MLLM is unsure and agrees with the UBM"
    if second_pass is None:
        return "ask second_pass", None, "the MLLM is unsure and contradicts the UBM"
    if not second_pass.failed:
        return "second_pass", second_pass, "asked again with both answers in the prompt"
    reason = f"the surer of two; the second pass failed: {second_pass.failed}"
    if mllm.uncertainty is not None and ubm.uncertainty < mllm.uncertainty:
        return "ubm", ubm, reason
    return "mllm", mllm, reason  # choice: also where its uncertainty is unknown


def _mean_verdict(ubm, mllm):
    """Two answers of one polarity as one: for scores their mean, weighted by 1 - u (paper: v1; an
    unknown u counts as 0.5); the label is the same."""
    if mllm.predicted_score is None:
        return mllm
    u = np.array([0.5 if x.uncertainty is None else x.uncertainty for x in (ubm, mllm)])
    scores = np.array([ubm.predicted_score, mllm.predicted_score])
    weights = 1 - u + 1e-6
    return score_verdict(float(np.average(scores, weights=weights)),
                         float(np.average(u, weights=weights)))


# ================================================================================================
# §12 Files, settings and processes [needs: InputError, explaining, write_text, to_json, write_json,
#    read_json, digest]
# import argparse, contextlib, json, os, re, shlex, signal, sys, torch
# from datetime import timedelta; from importlib.metadata import version; from pathlib import Path
# import numpy as np; from tqdm import tqdm
# ================================================================================================


# ---- rows


def read_rows(path):
    """Rows of a .jsonl that one of our stages wrote; [] if there is none yet."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            with explaining(f"{path}:{n}: not a JSON row, delete the line and run again"):
                rows.append({} | json.loads(line))
    return rows


def row_line(path, row):
    """A row as a line of that file."""
    return to_json(row, f"{path}: a row of post {row.get('id')}") + "\n"


def write_rows(path, rows):
    """A .jsonl of these rows, atomically."""
    write_text(path, "".join(row_line(path, row) for row in rows))


def sibling(path, name):
    """The companion of a row file: ("chains.jsonl", "rejects.jsonl") -> chains.rejects.jsonl."""
    return f"{str(path).removesuffix('.jsonl')}.{name}"


# ---- what a stage was started with


def tokenizer_hash(tokenizer):
    """Names a vocabulary. trap: ids of two tokenizers look alike and mean other words."""
    return digest(sorted(tokenizer.get_vocab().items()))


def run_info(script, argv=None):
    """The command line as typed and the versions that it ran with."""
    command = shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])
    versions = dict(python=sys.version.split()[0], numpy=np.__version__, torch=torch.__version__,
                    transformers=version("transformers"))  # not imported: half a second
    return dict(command=command, versions=versions)


def settings_file(out):
    """Where a folder keeps what its stage was started with."""
    return Path(out, "settings.json")


def settings_of(args, free):
    """What a rerun onto an --out must share: all flags but those that are `free`."""
    return {key: value for key, value in vars(args).items() if key not in free}


def check_settings(file, settings, begun, run=None):
    """Writes what a stage was started with (and `run`, which may differ). A rerun with other
    settings onto the same --out is refused. `begun`: whether there is something to go on with. A
    file of that name that no stage wrote is never written over."""
    settings = json.loads(json.dumps(settings))
    previous = {}
    with contextlib.suppress(InputError):  # missing or foreign
        previous = read_json(file)
    if "stage" not in previous and (begun or os.path.exists(file)):  # ours all have args.stage
        raise InputError(f"{file} is missing or not of this program (a model's?), so that nobody "
                         "knows what this --out was begun with: choose another --out")
    for key, value in settings.items():
        old = previous.get(key)
        if begun and value != old:
            raise InputError(f"this --out was begun with {key} = {old!r}, not {value!r} ({file}): "
                             "delete the --out itself or choose another")
    write_json(file, settings | (run or {}))


# ---- processes of torchrun


def get_rank():
    """The number of this process under torchrun; 0 without."""
    return int(os.environ.get("RANK", 0))


def get_world_size():
    """How many processes torchrun started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(device):
    """Under torchrun: meets the others, returns this one's device; all but the first are silent."""
    if get_world_size() == 1:
        with explaining(f"--device {device} cannot be used"):
            torch.empty(0, device=device)
        return device
    on_gpu = str(device).startswith("cuda")
    if on_gpu:
        count, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if found < count:  # all processes refuse, so that none waits for the others
            raise InputError(f"{count} processes need {count} GPUs here, {found} found: lower "
                             "--nproc-per-node")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo",
                                         timeout=timedelta(days=7))  # work may be uneven
    if get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def barrier():
    """Goes on when all processes are here."""
    if get_world_size() > 1:
        torch.distributed.barrier()


def gather(value):
    """[value of each process], in all processes."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


# ---- command lines


def chunks(items, size):
    """A list in parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def row_text(row):
    """A row for the terminal."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds a flag's default to its help text where it is not the paper's value named there."""

    def _get_help_string(self, action):
        papers = re.search(r"(?:MulCoT-RD|paper): ([\d.e-]+)", action.help)
        default = action.default
        if not default or default is True or papers and float(papers[1]) == default:
            return action.help
        return super()._get_help_string(action)


def flag_groups(parser, script):
    """{title: add_argument} of the four groups of a stage's flags. Under them the help shows the
    stage's commands, as the script's docstring has them."""
    stage = parser.prog.split()[-1]
    commands = re.findall(rf"^    (python \S+ {stage} (?:.*\\\n)*.*)$", script, re.M)
    parser.epilog = "\n".join(["example:", *commands])
    titles = ("data", "model", "method", "run")
    return {title: parser.add_argument_group(title).add_argument for title in titles}


def check_at_least(parser, args, minimum, *names):
    """A usage error for a flag below its minimum."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and not value >= minimum:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least {minimum}")


def progress(total, name, unit, done=0):
    """A progress bar of the first process; a line a minute where stderr is no terminal."""
    quiet = {}
    if not sys.stderr.isatty():
        quiet = dict(delay=60, mininterval=60, bar_format="{desc} {n_fmt}/{total_fmt} {elapsed}\n")
    return tqdm(total=total, initial=done, desc=name, unit=unit, disable=get_rank() > 0, **quiet)


def say(line):
    """A line that does not cut through a progress bar."""
    tqdm.write(line) if sys.stderr.isatty() else print(line)


def lock_out(out):
    """Keeps a second run from --out while the file that it returns is open: a lock on .NAME.lock
    beside it, which the system takes back however the process ends. Raises InputError if another
    process has it. trap: flock would refuse tests/demo.py's own stages, in one process."""
    out = Path(os.path.realpath(out))
    try:
        import fcntl  # not on every system

        os.makedirs(out.parent, exist_ok=True)
        file = open(out.with_name(f".{out.name}.lock"), "a")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise InputError(f"another run is at work on --out {out}: wait for its end") from None
    except (ImportError, OSError) as e:
        print(f"note       nothing keeps a second run from --out {out}: {e}")


def _interrupted(number, frame):
    raise KeyboardInterrupt(number)


def run_stage(stage, args):
    """Runs stage(args), alone on its --out, and returns the exit code: 2 and one line of a user's
    mistake, a full disk or GPU; 130 (Ctrl-C) or 143 (SIGTERM) and how to go on."""
    try:
        signal.signal(signal.SIGINT, _interrupted)
        signal.signal(signal.SIGTERM, _interrupted)
        if args.out and get_rank() == 0 and not getattr(args, "dry_run", False):
            lock = lock_out(args.out)  # noqa: F841, held until this function ends
        stage(args)
        return 0
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
    except torch.OutOfMemoryError as e:
        print(f"error: {e}; lower --batch or --max-pixels, in training also "
              "--gradient-checkpointing or --nf4", file=sys.stderr)
    except OSError as e:
        print(f"error: {e}; what was written before is whole: mend this and run the same command "
              "again", file=sys.stderr)
    except KeyboardInterrupt as e:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 128 + (e.args[0] if e.args else signal.SIGINT)
    return 2
