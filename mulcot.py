"""MulCoT-RD in one file: a large teacher's reasoning chains, distilled into a small vision-language
model that reads a social-media post (text + image), writes a reasoning chain and labels its
sentiment.

The method is arXiv 2508.05234 (teacher -> assistant -> student). Nothing here is a program; the
three scripts beside this file are. Read the sections in order and you follow one post from file to
loss:

  §1 Posts      files -> Post                      §5 LoRA    adapters in PEFT's format; NF4 base
  §2 Prompts    Post -> messages, text -> fields   §6 Model   loading, branches, labels, chains
  §3 Teacher    two-stage chains with retries      §7 Losses  pure functions of tensors and floats
  §4 Tokens     Post -> Example -> Batch           §8 UBM     small classifier, cascade
                                                   §9 Files   rows, soft labels, fingerprints
                                                   §10 The embedded default: a toy world

Every section runs alone with the imports and sections that its ruler names (a test does that).
Remarks carry three tags: `# paper:` where it stands there, `# choice:` where the sources are
silent, `# trap:` what breaks otherwise. Shapes trail the lines that change them: B posts, P prefix,
T tokens, V vocabulary, D width, R rank, K cached entries, N supervised tokens, C classes.

Departures from the paper and from the authors' released scripts
 1. One forward pass serves both tasks: image and post are one prefix, the prompts are branches of
    it. Equal to two passes (tested); the authors run each task by itself.
 2. Task weights 0.8 / 0.2 as the paper says; the released scripts sum the tasks 1 : 1.
 3. The KL term covers response tokens; the released script also averages prompt, image and padding
    positions. `generate.py soft --kl-positions all` adds prompt and image, never padding.
 4. Losses are means over all supervised tokens of an optimiser step, not means of means of
    micro-batches.
 5. LoRA adapts the language model only; suffix matching, as the authors do, also hits the vision
    tower's MLPs. `--scope all` is theirs.
 6. Soft labels come from the assistant in eval mode, before the student trains: its last hidden
    states at the supervised positions and its output matrix, which is exact (`--top-k 64`: its 64
    likeliest tokens and one bin for the rest); the authors run it beside the student at each step.
 7. Chains are brought into one written form before training; those that contradict their label
    after all retries are set aside, label-conditioned ones too. The authors keep what came.
 8. Labels are decided by scoring the three answers, on dev too; `--decode greedy` generates them,
    as the authors do.
 9. The prompts are our own wording; field names and their order are the paper's.
10. Gradients are clipped at norm 1 (`--clip 0` for the authors' unclipped run).
11. Images keep their shape under a pixel cap; the paper resizes to 280 x 280. Give
    `--max-pixels 78400` for as many visual tokens; without it the model's own cap holds.
12. For the KL both vocabularies are cut to the tokenizer's ids (151,665 in Qwen2.5-VL), not to the
    smaller output layer (151,936): the rows between mean nothing.
13. The assistant's chain per post is sampled at temperature 0.7, for posts whose teacher chain was
    kept; the sources are silent on both.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import errno
import glob
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import sys
import tempfile
import threading
import time
import wave
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from datetime import timedelta
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path

import requests
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

LABELS = ("negative", "neutral", "positive")


class InputError(ValueError):
    """A user's mistake: what is wrong, where, and how to fix it. Each script prints it and exits
    2."""


# ================================================================================================
# §1 Posts [needs: csv, hashlib, json, math, os, re, wave, dataclass, field, replace, islice, Path,
#    torch, F, Image, ImageOps, LABELS, InputError]
# ================================================================================================

IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
SCORE_RANGE = 3.0  # scores lie in [-3, 3], as in MOSI and MOSEI
MAX_FRAMES = 16  # paper: arXiv 2606.05713
AUDIO_RATE, MAX_SECONDS = 16_000, 300  # what Qwen2.5-Omni's feature extractor takes
MAX_IMAGE_PIXELS = 50_000_000  # choice: a decompression bomb is an error, not an out-of-memory kill
MAX_TEXT = 10_000  # choice: characters; the mask of a batch grows with the square of its longest


@dataclass
class Post:
    """One social-media post. `image`, `frames` (of a clip) and `audio` are resolved paths inside
    `folder`, or None and [] for text alone. `cot` is a teacher's chain; `extra` holds the columns
    we do not know, kept as they came."""

    id: str
    text: str
    image: str | None = None
    aspect: str | None = None
    label: str | None = None
    score: float | None = None
    split: str | None = None
    cot: str | None = None
    folder: str | None = None
    frames: list = field(default_factory=list)
    audio: str | None = None
    extra: dict = field(default_factory=dict)

    @property
    def pictures(self):
        """All images in the order in which a model sees them."""
        return ([self.image] if self.image else []) + self.frames

    def row(self):
        """The post as a JSON row; files go back to names inside their folder."""
        name = lambda path: path and os.path.relpath(path, os.path.realpath(self.folder))
        known = dict(id=self.id, text=self.text, image=name(self.image),
                     frames=[name(f) for f in self.frames] or None, audio=name(self.audio),
                     aspect=self.aspect, label=self.label, score=self.score, split=self.split,
                     cot=self.cot)
        return {k: v for k, v in known.items() if v is not None} | self.extra


def without(post, inputs):
    """The post less some of its inputs: "frames" (all pictures), "audio"."""
    gone = dict(frames=dict(image=None, frames=[]), audio=dict(audio=None))
    return replace(post, **{k: v for name in inputs for k, v in gone[name].items()})


def safe_path(name, folder):
    """A manifest's file name as a path inside `folder`; anything that leads outside is refused."""
    root = os.path.realpath(folder)
    odd = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) or "\\" in name or "\0" in name
    if odd or os.path.isabs(name):
        raise InputError(f"file {name!r} must be a plain name inside {folder}: no URL, no "
                         "absolute path")
    path = os.path.realpath(os.path.join(root, name))  # trap: a link inside may lead outside
    if ".." in Path(name).parts or os.path.commonpath([root, path]) != root:
        raise InputError(f"file {name!r} leads outside {folder}")
    return path


def load_image(path, check=False):
    """RGB image, upright (EXIF), first frame of an animation. Raises InputError with the reason.
    `check` reads a JPEG at an eighth of its size: as good a test of the file, and quicker."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise InputError(f"image {path} has {image.width} x {image.height} pixels, the cap "
                                 f"is {MAX_IMAGE_PIXELS:,}: shrink it")
            if max(image.size) > 200 * min(image.size):
                raise InputError(f"image {path} is {image.width} x {image.height}: image "
                                 "processors refuse shapes beyond 200 : 1, crop it")
            if check:
                image.draft("RGB", (image.width // 8 + 1, image.height // 8 + 1))
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # on white, as the model's own processor has it
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} is missing: check --images") from None
    except InputError:
        raise
    except Exception as e:  # trap: broken EXIF alone raises struct.error or TypeError in Pillow
        raise InputError(f"image {path} cannot be read ({e}): replace it or drop its row") from None


def load_audio(path, check=False):
    """A 16-bit PCM WAV as floats (samples,) in [-1, 1) at 16 kHz, channels averaged; with `check`
    not yet resampled. Raises InputError with the reason."""
    fix = "`ffmpeg -i IN -ac 1 -ar 16000 -sample_fmt s16 OUT.wav` writes what is read here"
    try:
        with wave.open(str(path)) as file:
            channels, width, rate, count = file.getparams()[:4]
            data = file.readframes(count)
    except FileNotFoundError:
        raise InputError(f"audio {path} is missing: check --images") from None
    except (wave.Error, EOFError, OSError, RuntimeError) as e:  # a chunk that points nowhere
        raise InputError(f"audio {path} is no PCM WAV ({str(e) or 'cut off'}): {fix}") from None
    if width != 2 or rate < 4000 or rate % 25:
        raise InputError(f"audio {path} has {8 * width} bits at {rate} Hz: {fix}")
    whole = len(data) // (2 * channels)
    if not 0.05 <= whole / rate <= MAX_SECONDS:
        raise InputError(f"audio {path} lasts {whole / rate:.2f} s, not 0.05 to {MAX_SECONDS}: is "
                         "the clip empty, or uncut?")
    samples = torch.frombuffer(bytearray(data[: whole * 2 * channels]), dtype=torch.int16)
    samples = samples.reshape(-1, channels).float().mean(1) / 32768
    return samples if check else resample(samples, rate, AUDIO_RATE)


def resample(samples, old, new, zeros=16):
    """Samples (n,) at `old` Hz -> (ceil(n new / old),) at `new` Hz: a sinc under a cos² window of
    `zeros` zero crossings a side, cut off at the lower Nyquist frequency."""
    if old == new:
        return samples
    old, new = old // math.gcd(old, new), new // math.gcd(old, new)
    cut = min(1.0, new / old)
    half = math.ceil(zeros / cut)
    lag = torch.arange(-half, half + old) - torch.arange(new)[:, None] * old / new  # (new, taps)
    window = torch.cos((lag * cut / zeros).clamp(-1, 1) * math.pi / 2) ** 2
    kernel = cut * torch.sinc(lag * cut) * window  # one filter per output phase
    padded = F.pad(samples[None, None], (half, half + old))
    out = F.conv1d(padded, kernel[:, None], stride=old)[0]  # (new, periods)
    return out.T.reshape(-1)[: -(-len(samples) * new // old)]


def read_posts(path, images=None, rejects=None, may_be_empty=False):
    """The posts of `iter_posts` as a list."""
    return list(iter_posts(path, images, rejects, may_be_empty))


def iter_posts(path, images=None, rejects=None, may_be_empty=False):
    """Posts, one by one, from a `.jsonl` of rows, the authors' `.json` list, a TomBERT `.tsv`,
    MMSA's `label.csv`, or an MVSA folder as downloaded. `images`: the folder of images, frames and
    audio (default: of a .csv its own folder, of MVSA its `data/`, else `images/` beside the file or
    the file's own folder). Bad rows are appended to `rejects` as (where, reason); with rejects=None
    the first raises InputError."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give a .jsonl, .json, .tsv or .csv file or an "
                         "MVSA folder")
    if path.is_dir():
        rows, images = _mvsa_rows(path), images or path / "data"
    elif path.suffix == ".csv":
        images = images or path.parent
        rows = _csv_rows(path, Path(images))
    elif path.suffix in (".jsonl", ".json", ".tsv"):
        readers = {".jsonl": lambda path: _rows(_lines(path), json.loads), ".json": _json_rows,
                   ".tsv": _tsv_rows}
        rows = readers[path.suffix](path)
        beside = path.parent / "images"
        images = images or (beside if beside.is_dir() else path.parent)
    else:
        raise InputError(f"{path}: unknown format {path.suffix!r}: use .jsonl, .json, "
                         ".tsv or .csv")
    seen, good_images = set(), set()
    for where, row in rows:
        try:
            if isinstance(row, InputError):
                raise row
            post = _to_post(row, images)
            if post.id in seen:
                raise InputError(f"duplicate id {post.id!r}: ids name posts in every later file")
            for picture in set(post.pictures) - good_images:
                load_image(picture, check=True)  # choice: now; no run shall die on image 9,000
                good_images.add(picture)
            if post.audio:
                load_audio(post.audio, check=True)
            seen.add(post.id)
        except InputError as e:
            if rejects is None:
                raise InputError(f"{where}: {e}") from None
            rejects.append((where, str(e)))
        else:
            yield post
    if not seen and not may_be_empty:
        why = f"; {len(rejects)} bad rows, first {': '.join(rejects[0])}" if rejects else ""
        raise InputError(f"{path} holds no usable post{why}")


def of_split(posts, split):
    """The posts of a split, or all where the rows have none."""
    return [p for p in posts if p.split == split] if any(p.split for p in posts) else posts


def tell_aside(aside, what):
    """Prints the first of the rows that were set aside [(where, why)], and how many there are."""
    for where, why in aside[:5]:
        print(f"set aside  {where}: {why}")
    if aside:
        print(f"set aside  {len(aside)} {what}")


def dev_posts(path, images, target):
    """Posts that have the `target` ("label" or "score") to select or fit on: of split dev, or all
    where no row has a split. Others are counted and told."""
    aside = []
    chosen = of_split(read_posts(path, images, aside), "dev")
    aside += [(p.id, f"no {target}") for p in chosen if getattr(p, target) is None]
    tell_aside(aside, "of the dev rows")
    chosen = [p for p in chosen if getattr(p, target) is not None]
    if not chosen:
        raise InputError(f"{path} has no post of split dev with a {target} to select or fit on")
    return chosen


def _to_post(row, images):
    """A row dict of any source -> a checked Post."""
    if not isinstance(row, dict):
        raise InputError(f"expected an object with at least id and text, got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # trap: JSON can spell it, tokenizers and files refuse it
        raise InputError("half of a surrogate pair (\\ud8…): remove it") from None
    for key in ("aspect", "split", "cot"):
        if not isinstance(row.get(key), (str, type(None))):
            raise InputError(f"{key} must be a string, got {row[key]!r}")
    row = dict(row)
    text, aspect, label = row.pop("text", None), row.pop("aspect", None), row.pop("label", None)
    if not isinstance(text, str) or not text.strip():
        raise InputError("empty text: every post needs words")
    aspect = aspect.strip() or None if aspect else None
    length = len(text) + len(aspect or "") * (1 + text.count("$T$"))
    if length > MAX_TEXT:
        raise InputError(f"text with its aspect has {length:,} characters, the cap is {MAX_TEXT:,}")
    if label is not None:
        label = str(label).strip().lower()
        if label not in LABELS:
            raise InputError(f"unknown label {label!r}: use one of {', '.join(LABELS)}")
    # the authors' rows may name it in one of three ways
    name, path, number = (row.pop(k, None) for k in ("image", "image_path", "image_id"))
    name = name or path or (None if number is None else f"{number}.jpg")
    audio = row.pop("audio", None)
    for kind, value in (("image", name), ("audio", audio)):
        if not isinstance(value, (str, type(None))):
            raise InputError(f"{kind} must be a file name, got {value!r}")
    if row.get("id") is None:
        raise InputError("no id: every row needs one")
    score = row.pop("score", None)
    if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
        raise InputError(f"score must be a number, got {score!r}")
    if score is not None and not abs(score) <= SCORE_RANGE:  # catches NaN, too
        raise InputError(f"score {score} lies outside [-3, 3]: rescale it")
    return Post(id=str(row.pop("id")), text=text.replace("$T$", aspect or "$T$"), aspect=aspect,
                label=label,
                image=safe_path(name, images) if name else None, score=score,
                frames=_frames(row.pop("frames", None), images),
                audio=safe_path(audio, images) if audio else None,
                split=row.pop("split", None),
                cot=row.pop("cot", None), folder=str(images), extra=row)


def _frames(value, images):
    """At most 16 paths, evenly spaced, of a clip's frames: a folder or a list of image names."""
    if value is None:
        return []
    names = value
    if isinstance(value, str):
        folder = safe_path(value, images)
        if not os.path.isdir(folder):
            raise InputError(f"frames {value!r} is no folder in {images}")
        order = lambda name: [(int(x), "") if x.isdecimal() else (-1, x)
                              for x in re.split(r"(\d+)", name)]  # 2.jpg before 10.jpg
        names = [f"{value}/{name}" for name in sorted(os.listdir(folder), key=order)
                 if name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"frames must be a folder or a list of image names, got {value!r}")
    if not names:
        raise InputError(f"frames {value!r} holds no image: extract some, or leave frames out")
    n = len(names)
    kept = names if n <= MAX_FRAMES else [names[(2 * i + 1) * n // (2 * MAX_FRAMES)]
                                          for i in range(MAX_FRAMES)]  # mid of 16 equal spans
    return [safe_path(name, images) for name in kept]


def _lines(path):
    """(where, text or InputError) per line; a line that is not UTF-8 costs that line only."""
    with open(path, "rb") as f:
        for n, raw in enumerate(f, 1):
            try:
                yield f"{path}:{n}", raw.decode("utf-8-sig" if n == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as e:
                why = f"not UTF-8 (byte {e.start + 1} of the line): re-save it as UTF-8"
                yield f"{path}:{n}", InputError(why)


def _rows(lines, parse):
    """(where, parse(line), or the InputError that says why it is no row) of lines with text."""
    for where, line in lines:
        try:
            if isinstance(line, InputError):
                raise line
            if line.strip():
                yield where, parse(line)
        except InputError as e:
            yield where, e
        except (ValueError, RecursionError, csv.Error) as e:
            yield where, InputError(f"not a row: {e}")


def _json_rows(path):
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON ({e}); one object per line belongs into a "
                         ".jsonl") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a list of rows, as in the authors' release")
    return ((f"{path}[{n}]", row) for n, row in enumerate(rows))


def _tsv_rows(path):
    """TomBERT: header, then index, label (0 negative, 1 neutral, 2 positive), image, text with
    $T$, aspect."""
    split = path.stem if path.stem in ("train", "dev", "test") else None

    def parse(line):
        cells = line.split("\t")  # trap: csv would join lines at a stray quote
        if len(cells) != 5 or cells[1] not in ("0", "1", "2"):
            raise InputError(f"expected index, label 0-2, image, text, aspect; got {len(cells)} "
                             f"cells and label {cells[1] if len(cells) > 1 else None!r}")
        return dict(id=f"{path.stem}-{cells[0]}", label=LABELS[int(cells[1])], image=cells[2],
                    text=cells[3], aspect=cells[4], split=split)

    return _rows(islice(_lines(path), 1, None), parse)


def _csv_rows(path, folder):
    """MMSA's label.csv of MOSI or MOSEI: video_id, clip_id, text, label (a score), mode (train,
    valid, test). frames/<video>/<clip>/ and audio/<video>/<clip>.wav in `folder` are used where
    they exist."""
    lines = _lines(path)
    header = next(csv.reader([str(next(lines, ("", ""))[1])]), [])
    if {"video_id", "clip_id", "text", "label", "mode"} - set(header):
        raise InputError(f"{path} must have the columns video_id, clip_id, text, label, mode, as "
                         "MMSA's label.csv")

    def parse(line):
        cells = next(csv.reader([line]))
        if len(cells) != len(header):
            raise InputError(f"expected {len(header)} cells, got {len(cells)}")
        clip = dict(zip(header, cells))
        name, split = f"{clip['video_id']}/{clip['clip_id']}", clip["mode"]
        row = dict(id=name.replace("/", "$_$"), text=clip["text"], score=float(clip["label"]),
                   split="dev" if split == "valid" else split)
        if (folder / "frames" / name).is_dir():
            row["frames"] = f"frames/{name}"
        if (folder / "audio" / f"{name}.wav").exists():
            row["audio"] = f"audio/{name}.wav"
        return row

    return _rows(lines, parse)


def mvsa_label(pairs):
    """One label from annotators' (text, image) label pairs, or None where the post is dropped.
    The usual rule: majority per modality over annotators, then positive against negative is dropped
    and a neutral beside a polar label takes the polar one."""
    text, image = (max(LABELS, key=side.count) for side in zip(*pairs))
    for winner, side in ((text, [p[0] for p in pairs]), (image, [p[1] for p in pairs])):
        if 2 * side.count(winner) <= len(side):
            return None  # no majority
    if {text, image} == {"positive", "negative"}:
        return None
    return image if text == "neutral" else text


def _mvsa_rows(folder):
    """`labelResultAll.txt` and `data/<id>.txt|.jpg`. No official split exists; ours: ids in the
    order of sha256("mvsa:<id>"), first tenth test, second tenth dev, rest train."""
    table = folder / "labelResultAll.txt"
    if not table.exists():
        raise InputError(f"{folder} has no labelResultAll.txt: point at the MVSA folder as "
                         "downloaded")

    def parse(line):
        cells = line.split("\t")
        name, pairs = cells[0].strip(), [tuple(c.strip().lower().split(",")) for c in cells[1:]]
        if not pairs or any(len(p) != 2 or not set(p) <= set(LABELS) for p in pairs):
            raise InputError("expected an id and pairs of text,image labels")
        if (label := mvsa_label(pairs)) is None:
            raise InputError("annotators conflict or have no majority: dropped by the MVSA rule")
        try:
            text = (folder / "data" / f"{name}.txt").read_bytes().decode("utf-8-sig").strip()
        except FileNotFoundError:
            raise InputError(f"data/{name}.txt is missing") from None
        except UnicodeDecodeError:
            raise InputError(f"data/{name}.txt is not UTF-8: re-save it as UTF-8") from None
        return dict(id=name, image=f"{name}.jpg", label=label, text=text)

    rows = list(_rows(islice(_lines(table), 1, None), parse))
    good = [row for _, row in rows if isinstance(row, dict)]
    good.sort(key=lambda row: hashlib.sha256(f"mvsa:{row['id']}".encode()).digest())
    tenth = len(good) // 10
    for i, row in enumerate(good):
        row["split"] = "test" if i < tenth else "dev" if i < 2 * tenth else "train"
    return rows


# ================================================================================================
# §2 Prompts and parsing [needs: json, re, dataclass, LABELS]
# ================================================================================================

FIELDS = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion",
          "Prediction")

# choice: the wording is ours; sections, field names and their order are the paper's. A prompt is
# PREFIX (task, post) + a format (one of FORMATS): tasks of one post share everything up to the
# format. trap: the prefix ends in line breaks and a format starts with a letter, so that no token
# of the tokenizer spans the seam and the shared prefix equals the start of either whole prompt.
TASK = "Judge the sentiment of a social-media post from its text and its image together."
TASK_ASPECT = ("Judge the sentiment that the author of a social-media post shows toward the "
               "target aspect, from text and image together.")
TASK_EXPLAIN = ("Explain why the sentiment of a social-media post is the given one, from text and "
                "image together.")
DEFINITIONS = """Sentiment definitions:
positive: the author shows joy, praise, support or hope.
neutral: the author states facts or shows no clear feeling.
negative: the author shows anger, sadness, criticism or mockery."""
FORMATS = {
    "reason": """Answer with these five fields, each on its own line:
"Text_analysis": what the words express
"Image_analysis": what the image shows and expresses
"Conflict_resolution": whether they agree, and which one counts if not
"Final_conclusion": the sentiment that follows
"Prediction": negative, neutral or positive""",
    "label": """Answer with this field only:
"Prediction": negative, neutral or positive""",
    "score": "Answer with one number from -3 (very negative) to 3 (very positive).",
    "bin": """Answer with this field only:
"Prediction": a whole number from -3 (most negative) to 3 (most positive)""",
}
TEACHER_RULES = """
Write two to four full sentences in each analysis. Quote the words and name the parts of the image \
you rely on. \
Give exactly one word as the Prediction and write nothing after it."""
TASKS = ("reason", "label", "score", "bin", "predict", "explain")


def post_prompt(post, task="reason", gold=None):
    """The shared part of a prompt: task, definitions (teacher only), the post. Ends in a blank
    line."""
    about = TASK_ASPECT if post.aspect else TASK
    if task == "explain":
        about = TASK_EXPLAIN + (" The sentiment meant is the one toward the target aspect."
                                if post.aspect else "")
    lines = [about] + ([DEFINITIONS] if task in ("predict", "explain") else [])
    lines.append("Text: " + " ".join(post.text.split()))  # trap: line breaks could fake our layout
    if post.aspect:
        lines.append("Target aspect: " + " ".join(post.aspect.split()))
    if task == "explain":
        lines.append(f"Given sentiment: {gold}")
    return "\n".join(lines) + "\n\n"


def task_format(task):
    """The part of a prompt that differs between tasks of one post: how to answer."""
    return FORMATS[task] if task in FORMATS else FORMATS["reason"] + TEACHER_RULES


def build_messages(post, task, gold=None):
    """OpenAI-style messages. task: "reason" | "label" | "score" | "bin" for the trained models,
    "predict" | "explain" for the teacher's two stages; only "explain" takes (and needs) the gold
    label. paper: stage 1 / stage 2."""
    assert task in TASKS and (gold in LABELS) == (task == "explain"), (task, gold)
    files = [{"type": "image", "image": path} for path in post.pictures]
    files += [{"type": "audio", "audio": post.audio}] if post.audio else []
    text = post_prompt(post, task, gold) + task_format(task)
    return [{"role": "user", "content": files + [{"type": "text", "text": text}]}]


@dataclass
class Reasoning:
    """A parsed answer. `fields`: those found, cleaned. `prediction`: a label or None. `complete`:
    all five fields hold text and the last one a label. `problem`: what is missing, in words, or
    None."""

    fields: dict
    prediction: str | None
    complete: bool
    problem: str | None


_NAME = "|".join(FIELDS)
# A field opens at the start of a line, dressed as Markdown, a list item or JSON, or behind { or ,
# when its name is quoted. Within a sentence its name is text. Bounded repeats keep this linear on
# any input.
_HEADING = re.compile(
    rf"""^[ \t>#*\-{{"'`\d.]{{0,16}}({_NAME})"""
    r"""(?:["'`*\]]{0,4}[ \t]{0,4}[:\uff1a][*]{0,2}|["'`*#:]{0,4}[ \t]{0,4}$)"""
    rf"""|[{{,]\s{{0,8}}"({_NAME})"\s{{0,4}}:""", re.M)
_LABEL_WORD = re.compile(rf"\b({'|'.join(LABELS)})\b")


def parse_reasoning(text):
    """Any text a model wrote -> Reasoning. Reads quoted paragraphs, Markdown headings, (fenced)
    JSON and plain `Field: …`. The last Prediction wins; one that names several labels names none.
    Never raises."""
    text = text.replace("\r\n", "\n")
    opens = list(_HEADING.finditer(text))
    ends = [m.start() for m in opens[1:]] + [len(text)]
    fields = {}
    for m, end in zip(opens, ends):
        fields[m[1] or m[2]] = _clean(text[m.end():end], '"' in m[0])
    said = fields.get("Prediction", "" if fields else text.strip())
    first_line = said.split("\n", 1)[0].lower()
    named = set(_LABEL_WORD.findall(first_line))
    if not fields and not re.fullmatch(r"\W*\w+\W*", first_line[:40]):
        named = set()  # without any field only a bare label word counts, not one within prose
    prediction = named.pop() if len(named) == 1 else None
    missing = [name for name in FIELDS if not fields.get(name)]
    problem = None
    if missing:
        problem = "missing " + ", ".join(missing)
    elif prediction is None:
        problem = "Prediction names no label" if not named else "Prediction names several labels"
    return Reasoning(fields, prediction, problem is None, problem)


def _clean(value, quoted):
    """A field's text without its dress: quotes, commas, braces, fences, rules, the next heading's
    hashes."""
    value = re.sub(r"```\w{0,10}", "", value).strip().strip("*").strip()
    value = value.rstrip("#-*}],; \t\r\n")
    if value.startswith('"') and (quoted or value.find('"', 1) in (-1, len(value) - 1)):
        value = value[1:]  # trap: behind a Markdown heading a first quote may open a quotation
        value = value[:-1] if value.endswith('"') and not value.endswith('\\"') else value
    if "\\" in value:
        try:
            value = json.loads(f'"{value}"', strict=False)
        except ValueError:
            value = value.replace('\\"', '"').replace("\\n", "\n")
    return value.encode("utf-8", "replace").decode().strip()  # half a pair fits into no file


def check_answer(text, label, finish="stop"):
    """(Reasoning of a model's answer, why it is unfit to train on or None): cut off, incomplete, or
    contradicting its post's label."""
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


def render_score(score):
    """The answer to the score prompt: a number with one decimal."""
    return f"{round(score, 1) + 0.0:.1f}"  # + 0.0: no "-0.0"


def parse_score(text):
    """The first number in a model's answer, in range or not, or None. Never raises."""
    found = re.search(r"[-+\u2212]?(?:[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})", text)
    return float(found[0].replace("\u2212", "-")) if found else None


# ================================================================================================
# §3 Teacher [needs: base64, hashlib, io, os, random, re, threading, time, Counter, dataclass,
#    parsedate_to_datetime, Path, requests, InputError, §1, §2]
# ================================================================================================


@dataclass
class Request:
    """One question to a teacher: the post (for teachers that hold the picture themselves), the
    messages, and what a retry changes."""

    post: Post
    messages: list
    temperature: float
    max_tokens: int
    logprobs: bool = False


@dataclass
class Answer:
    """What came back. `finish` is "stop" or "length" (truncated); tokens as the teacher counts
    them; `logprobs`, if asked for and offered: [(token, {likely token: log-probability}), …]."""

    text: str
    finish: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0
    logprobs: list | None = None


def two_stage_cot(post, max_tries=3, max_tokens=512, stage2=True):
    """The teacher's two stages with an adaptive retry controller (ARC), as a generator: it yields
    a Request, is sent the Answer, and returns a row of `cot` (or None), `stage`, `tries`,
    `problem`, `attempts`, tokens.

    paper: stage 1 asks without the label and is kept if right; stage 2 gets the label and explains
    it; ARC repeats what is incomplete. choice: a retry raises the temperature (0, 0.4, 0.8 …), and
    doubles the token budget after a truncated answer; a stage-2 chain that contradicts its label
    is asked again too."""
    attempts, used = [], [0, 0]
    for stage, task in ((1, "predict"), (2, "explain"))[: 2 if stage2 else 1]:
        budget = max_tokens
        messages = build_messages(post, task, post.label if task == "explain" else None)
        prompt = hashlib.sha256(messages[-1]["content"][-1]["text"].encode()).hexdigest()[:16]
        for attempt in range(max_tries):
            answer = yield Request(post, messages, 0.4 * attempt, budget)
            used = [used[0] + answer.tokens_in, used[1] + answer.tokens_out]
            parsed, problem = check_answer(answer.text, post.label, answer.finish)
            attempts.append(dict(stage=stage, temperature=0.4 * attempt, max_tokens=budget,
                                 problem=problem, raw=answer.text))
            row = dict(raw=answer.text, stage=stage, label_conditioned=stage == 2,
                       tries=len(attempts), problem=problem, prompt=prompt, tokens_in=used[0],
                       tokens_out=used[1], attempts=attempts)
            if problem is None:
                return dict(cot=render_reasoning(parsed.fields), prediction=parsed.prediction) | row
            if answer.finish == "length":
                budget *= 2
            elif stage == 1 and parsed.complete:
                break  # a whole but wrong answer is what stage 2 is for
    return dict(cot=None, prediction=None) | row


def answer_all(dialogues, ask):
    """Drives many two_stage_cot generators at once: `ask(list of Requests) -> list of Answers`
    sees one pending request of each, so that a local model answers in batches. Yields (index, row)
    as they end."""
    pending = [(i, d, next(d)) for i, d in enumerate(dialogues)]
    while pending:
        answers, still = ask([request for _, _, request in pending]), []
        assert len(answers) == len(pending), (len(answers), len(pending))
        for (i, dialogue, _), answer in zip(pending, answers):
            try:
                still.append((i, dialogue, dialogue.send(answer)))
            except StopIteration as end:
                yield i, end.value
        pending = still


class Refused(InputError):
    """The server will not answer this one request (400, 413, 422 …); others may fare better."""


class Unreachable(InputError):
    """The server gave no usable answer, however often it was asked."""


class Stopped(InputError):
    """Asked to stop between two calls."""


class Endpoint:
    """An OpenAI-compatible chat-completions server (OpenAI, vLLM, SGLang, Ollama, llama.cpp) over
    requests; many threads may call it at once. The key is read from OPENAI_API_KEY and is cut out
    of every error text. `retries` counts what went wrong, `stop` ends all waiting."""

    RETRIED = {408, 409, 429} | set(range(500, 600))

    def __init__(self, url, model, timeout=120.0, max_retries=6, allow_http=False):
        try:  # trap: urlparse and requests read http://a\\@b differently
            sent = requests.Request("POST", url).prepare().url
            host = requests.utils.urlparse(sent).hostname
        except ValueError as e:
            raise InputError(f"--endpoint {url!r} is no address: {e}") from None
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--endpoint {url!r} must start with https:// (or http:// on this "
                             "machine)")
        local = host in ("localhost", "127.0.0.1", "::1")
        if url.startswith("http://") and not local and not allow_http:
            raise InputError(f"--endpoint {url!r} sends posts and key in the clear: use https, or "
                             "--allow-http")
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self.timeout, self.max_retries = timeout, max_retries
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # trap: requests would print it
            raise InputError("OPENAI_API_KEY holds a character that no header takes: set it anew")
        self.retries, self.stop = Counter(), threading.Event()
        self._own, self._open_at = threading.local(), 0.0  # a session per thread; shared pause

    def __call__(self, request):
        """Request -> Answer. 408/409/429/5xx, time-outs and broken replies are retried with
        jittered exponential back-off; Retry-After holds back all threads. Other statuses raise:
        401, 402, 404 InputError, the rest Refused; after the last retry Unreachable."""
        messages = [dict(m, content=[_wire(p) for p in m["content"]]) for m in request.messages]
        body = dict(model=self.model, messages=messages, temperature=request.temperature,
                    max_tokens=request.max_tokens)
        if request.logprobs:
            body |= dict(logprobs=True, top_logprobs=5)
        ready_at, problem = 0.0, None
        for attempt in range(self.max_retries + 1):
            delay = max(ready_at, self._open_at) - time.monotonic()
            if delay > 0:
                self.pause(delay)
            try:
                return self._post(body)
            except Unreachable as e:
                problem = str(e)
            except InputError:  # a ValueError too, but final
                raise
            except (requests.RequestException, ValueError, LookupError, TypeError,
                    AttributeError) as e:
                problem = f"{type(e).__name__}: {e}"
            self.retries[problem.split(":")[0]] += 1
            ready_at = time.monotonic() + min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)
        raise Unreachable(f"{self.url} failed {self.max_retries + 1} times, last: "
                          f"{self._clean(problem)}; run again to go on")

    def _post(self, body):
        """One call. Raises Unreachable for a status that is worth another try."""
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        reply = self._own.session.post(self.url, json=body, headers=headers, timeout=self.timeout,
                                       allow_redirects=False)
        if reply.status_code == 200:
            return _read_reply(reply.json())
        problem = f"HTTP {reply.status_code}: {self._clean(reply.text)[:300]}"
        if reply.status_code in self.RETRIED:
            after = _retry_after(reply.headers.get("Retry-After", ""))
            if after > 3600:
                raise InputError(f"{self.url} asks to wait {after:.0f} s: run again later")
            self._open_at = max(self._open_at, time.monotonic() + after)
            raise Unreachable(problem)
        final = reply.status_code in (401, 402, 404) or reply.status_code < 400
        raise (InputError if final else Refused)(f"{self.url} refused: {problem}")

    def pause(self, seconds):
        """Sleeps, unless told to stop."""
        if self.stop.wait(seconds):
            raise Stopped("stopped")

    def _clean(self, text):
        return text.replace(self._key, "***") if self._key else text


def _retry_after(said):
    """Seconds that a Retry-After header asks for, as a number or a date; 0 if it cannot be read."""
    if re.fullmatch(r"\d{1,9}(\.\d{0,9})?", said):
        return float(said)
    try:
        return parsedate_to_datetime(said).timestamp() - time.time()
    except ValueError:
        return 0.0


def _read_reply(reply):
    """A chat-completions reply -> Answer; a missing text (refusal, null content) is an empty
    answer."""
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    content = choice["message"].get("content") or ""
    if isinstance(content, list):  # some servers answer in content parts
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str):
        raise TypeError(f"content is a {type(content).__name__}")
    told = (choice.get("logprobs") or {}).get("content")
    told = told and [(t["token"], {x["token"]: float(x["logprob"]) for x in t["top_logprobs"]})
                     for t in told if t.get("top_logprobs")]
    return Answer(content, choice.get("finish_reason") or "stop",
                  int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0),
                  told)


def _wire(part):
    """A content part as it goes over the wire: images become data URLs, audio base64."""
    if part["type"] == "audio":
        data = base64.b64encode(Path(part["audio"]).read_bytes()).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    if part["type"] != "image":
        return part
    return {"type": "image_url", "image_url": {"url": data_url(part["image"])}}


def data_url(path, max_side=1120, quality=92):
    """The image as a data URL, written anew as JPEG: upright, its longer side at most max_side,
    without metadata (GPS!), wherever the file hid it."""
    image, buffer = load_image(path), io.BytesIO()
    image.info = {}  # trap: Pillow writes a comment found there
    image.thumbnail((max_side, max_side))
    image.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ================================================================================================
# §4 Tokens [needs: OrderedDict, dataclass, torch, InputError, §1, §2]
# ================================================================================================

IM_START, IM_END, PAD_TOKEN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_PAD, IMAGE_PAD, VIDEO_PAD = "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"
IMAGE_SEATS = (VISION_START, IMAGE_PAD, VISION_END)
OMNI_IMAGE_SEATS = ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>")  # as Qwen2.5-Omni names them
OMNI_AUDIO_SEATS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
SYSTEM = "You are a helpful assistant."  # what Qwen2.5-VL's own chat template puts first


class Processor:
    """Tokenizer, PIL image processor and, of models that hear, feature extractor of a model folder,
    with the few ids we place ourselves. (AutoProcessor would need torchvision.) What the last files
    turned into is kept, up to `cache_mb`."""

    def __init__(self, tokenizer, image_processor, extractor=None, cache_mb=256):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.extractor = extractor
        ids = tokenizer.convert_tokens_to_ids
        self.im_end, self.pad = ids(IM_END), ids(PAD_TOKEN)
        self.image_seats = ids(list(OMNI_IMAGE_SEATS if extractor else IMAGE_SEATS))
        self.audio_seats = ids(list(OMNI_AUDIO_SEATS)) if extractor else []
        self.image_pad, self.merge = self.image_seats[1], image_processor.merge_size
        other = ["<|VIDEO|>"] if extractor else [VISION_PAD, VIDEO_PAD]
        self.never = self.image_seats + self.audio_seats + ids(other)  # what no answer may hold
        fixed = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.head = fixed(f"{IM_START}system\n{SYSTEM}{IM_END}\n{IM_START}user\n")
        self.ready = fixed(f"{IM_END}\n{IM_START}assistant\n")
        self._files, self._room = OrderedDict(), cache_mb * 2**20

    def text_ids(self, text):
        """Ids of plain text. trap: a tweet may hold <|im_end|>; user text never becomes a special
        token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def image(self, path):
        """Patches (n, 1176) and grid (3,) of an image file."""
        def make():
            out = self.image_processor(images=[load_image(path)], return_tensors="pt")
            return out["pixel_values"], out["image_grid_thw"][0]
        return self._keep(path, make)

    def audio(self, path):
        """Log-mel features (10 ms frames, mel bins) of a WAV file: those of the model's own
        processor, which pads to 300 s first; 25 ms of silence give the same."""
        def make():
            samples = load_audio(path).numpy()
            out = self.extractor(samples, sampling_rate=AUDIO_RATE, return_attention_mask=True,
                                 max_length=len(samples) + self.extractor.n_fft,
                                 return_tensors="pt")
            return (out["input_features"][0, :, : int(out["attention_mask"].sum())].T,)
        return self._keep(path, make)[0]

    def _keep(self, path, make):
        """make(), done once for each of the last files."""
        if path not in self._files:
            self._files[path] = make()
            self._room -= self._files[path][0].nbytes
            while self._room < 0 and len(self._files) > 1:
                self._room += self._files.popitem(last=False)[1][0].nbytes
        self._files.move_to_end(path)
        return self._files[path]


@dataclass
class Example:
    """Token ids of one post. `prefix` (P,) and its 3-D positions (3, P); per branch the ids of
    prompt and answer, and how many of them (from the end) are supervised answer tokens."""

    prefix: list
    positions: torch.Tensor
    branches: list  # of (ids, number of answer tokens)
    pixels: torch.Tensor | None  # patches of all its images
    grid: torch.Tensor | None  # (images, 3)
    audio: torch.Tensor | None = None  # log-mel features (frames, mel bins)
    post: Post | None = None  # what it was made from: a readout's score or label stands there

    def __len__(self):
        return len(self.prefix) + sum(len(ids) for ids, _ in self.branches)


def encode(post, branches, processor, prompt=None):
    """One post and its branches [(prompt text, answer text or None), …] -> Example. `prompt`: the
    shared text before the branches (default `post_prompt(post)`). Ids equal those of the model's
    chat template. trap: train on <|im_end|> and mask by length; with pad == eos a model never
    learns to stop."""
    p, seats, pixels, grids, audio = processor, [], [], [], None
    for path in post.pictures:
        patches, grid = p.image(path)
        pixels.append(patches), grids.append(grid)
        start, pad, end = p.image_seats
        seats += [start] + [pad] * (int(grid.prod()) // p.merge**2) + [end]
    if post.audio:
        if p.extractor is None:
            raise InputError(f"post {post.id} has audio, and this model hears nothing: take "
                             "Qwen2.5-Omni, or leave audio out (train.py readout --without audio)")
        audio = p.audio(post.audio)
        start, pad, end = p.audio_seats
        seats += [start] + [pad] * ((len(audio) + 1) // 2 // 2) + [end]  # as the tower pools
    prefix = p.head + seats + p.text_ids(prompt if prompt is not None else post_prompt(post))
    tails = []
    for question, answer in branches:
        answer_ids = [] if answer is None else p.text_ids(answer) + [p.im_end]
        tails.append((p.text_ids(question) + p.ready + answer_ids, len(answer_ids)))
    return Example(prefix, rope_positions(prefix, p.image_pad, grids, p.merge), tails,
                   torch.cat(pixels) if pixels else None, torch.stack(grids) if grids else None,
                   audio, post)


def rope_positions(ids, image_pad, grids, merge):
    """Qwen-VL's 3-D (time, height, width) positions (3, T): text and audio count up on all three
    axes; an image spans a grid and text goes on after its longer side. trap: without these (or
    mm_token_type_ids) transformers 5 silently uses text positions. Equal to the model's own
    get_rope_index (tested)."""
    out, at, i, grids = [], 0, 0, list(grids)
    while i < len(ids):
        if ids[i] != image_pad:
            out.append((at, at, at))
            at, i = at + 1, i + 1
            continue
        t, h, w = (int(x) for x in grids.pop(0))
        h, w = h // merge, w // merge
        out += [(at + a, at + b, at + c) for a in range(t) for b in range(h) for c in range(w)]
        at, i = at + max(h, w), i + t * h * w
    return torch.tensor(out, dtype=torch.long).reshape(-1, 3).T


@dataclass
class Batch:
    """Rows of [prefix | branch 1 | branch 2 … | padding], or one row per branch ("rows" layout).
    `branch`: 0 in the prefix, 1, 2 … in the branches, -1 on padding. `targets[b, t]` is the id to
    predict *at* t (the shift is done), -100 where nothing is supervised. `example`: which example
    a row came from."""

    ids: torch.Tensor  # (B, T)
    position_ids: torch.Tensor  # (3, B, T)
    branch: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T)
    example: torch.Tensor  # (B,)
    pixels: torch.Tensor | None  # (patches of all distinct images, 1176)
    grid: torch.Tensor | None  # (images, 3)
    order: list | None = None  # which of them fill the rows' seats, in order
    audio: torch.Tensor | None = None  # (frames of all rows, mel bins)
    audio_lengths: torch.Tensor | None = None  # frames (clips,)

    def to(self, device):
        move = lambda x: x.to(device, non_blocking=True) if torch.is_tensor(x) else x
        return Batch(**{k: move(v) for k, v in vars(self).items()})


def collate(examples, pad_id, layout="shared"):
    """Examples -> Batch. "shared": all branches of a post behind one copy of its prefix. "rows": a
    row per branch, for models that carry state along the sequence; same results, nothing
    shared."""
    rows = []  # (example index, example, [(branch number, ids, answer length), …])
    for n, e in enumerate(examples):
        numbered = [(k, ids, answer) for k, (ids, answer) in enumerate(e.branches, 1)]
        rows += [(n, e, numbered)] if layout == "shared" else [(n, e, [b]) for b in numbered]
    length = max(len(e.prefix) + sum(len(ids) for _, ids, _ in tails) for _, e, tails in rows)
    B, T = len(rows), length
    ids = torch.full((B, T), pad_id)
    position_ids, branch = torch.zeros(3, B, T, dtype=torch.long), torch.full((B, T), -1)
    targets = torch.full((B, T), -100)
    for b, (_, e, tails) in enumerate(rows):
        at = len(e.prefix)
        ids[b, :at], branch[b, :at] = torch.tensor(e.prefix), 0
        position_ids[:, b, :at] = e.positions
        after = int(e.positions.max()) + 1  # every branch's positions start anew behind the prefix
        for k, tail, answer in tails:
            end = at + len(tail)
            ids[b, at:end], branch[b, at:end] = torch.tensor(tail), k
            position_ids[:, b, at:end] = torch.arange(after, after + len(tail))
            if answer:  # the only shift in the house: position t is trained to predict token t + 1
                targets[b, end - answer - 1 : end - 1] = ids[b, end - answer : end]
            at = end
    pixels, grid, order = _distinct_images([e for _, e, _ in rows])
    clips = [e.audio for _, e, _ in rows if e.audio is not None]
    audio = torch.cat(clips) if clips else None
    lengths = torch.tensor([len(clip) for clip in clips]) if clips else None
    example = torch.tensor([n for n, _, _ in rows])
    return Batch(ids, position_ids, branch, targets, example, pixels, grid, order, audio, lengths)


def _distinct_images(examples):
    """(patches, grids, order) of the examples' images, each file once: posts about several aspects,
    two chains of one post and the rows of one post share theirs."""
    known, kept, order = {}, [], []
    for e in examples:
        patches = [] if e.pixels is None else e.pixels.split(e.grid.prod(-1).tolist())
        for n, image in enumerate(patches):
            name = e.post.pictures[n] if e.post else (id(e), n)
            if name not in known:
                known[name] = len(kept)
                kept.append((image, e.grid[n]))
            order.append(known[name])
    if not kept:
        return None, None, None
    return torch.cat([image for image, _ in kept]), torch.stack([g for _, g in kept]), order


def branch_mask(branch, dtype):
    """branch (B, T) -> additive mask (B, 1, T, T): a token sees the prefix and its own branch up
    to itself, never a sister. trap: a bool mask is right under sdpa, but eager attention adds it
    as 0 / 1."""
    T = branch.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()
    key, query = branch[:, None, :], branch[:, :, None]  # (B, 1, T), (B, T, 1)
    seen = causal & ((key == 0) | (key == query))  # padding (-1) sees itself: no row turns NaN
    mask = torch.zeros(seen.shape, dtype=dtype, device=branch.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def show_tokens(batch, tokenizer, row=0):
    """One row of a batch as text for the terminal: supervised tokens green, prompts plain, a ruler
    per branch. A token is coloured where it is the target, so the colours prove shift and mask."""
    green, plain, lines, last, before = "\033[32m", "\033[0m", [], None, None
    pads = (IMAGE_PAD, OMNI_IMAGE_SEATS[1], OMNI_AUDIO_SEATS[1])
    for t, (i, k) in enumerate(zip(batch.ids[row].tolist(), batch.branch[row].tolist())):
        if k != last:
            name = {0: "prefix", -1: "padding"}.get(k, f"branch {k}")
            lines.append(f"\n{plain}---- {name} ----\n")
        supervised = t > 0 and k == last and batch.targets[row, t - 1] != -100
        piece = tokenizer.decode([i])
        shown = "" if piece == before and piece in pads else piece + "…" * (piece in pads)
        lines.append((green if supervised else plain) + shown)
        last, before = k, piece
        if k == -1:
            break
    return "".join(lines) + plain


# ================================================================================================
# §5 LoRA and NF4 [needs: contextlib, json, math, os, re, sys, Path, torch, F,
#    SafetensorError, load_file, save_file, nn, InputError, §9]
# ================================================================================================

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWERS = re.compile(r"(^|\.)(visual|vision_tower|vision_model|audio_tower)\.")

# paper: QLoRA, arXiv 2305.14314, appendix E: the 16 levels of NF4, as float32
NF4 = torch.tensor([-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036,
                    0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617,
                    0.72295684, 1])
# both levels of each byte, two float32 in one int64: one look-up per byte
NF4_PAIRS = torch.cartesian_prod(NF4, NF4).view(torch.int64).flatten()
SLICES = {"cpu": 2**18}  # weights handled at once: a CPU stays in its cache, others launch seldom


def nf4_quantize(weight, block=64):
    """n weights -> codes (ceil(n / 2),) uint8, two a byte, the first in its high half, and absmax
    (ceil(n / block),) float32. Bit for bit what bitsandbytes 0.50 makes on CPU: float32 inside, a
    weight midway between two levels takes the lower one, a block of zeros has absmax 0."""
    middles, codes, absmax = ((NF4[1:] + NF4[:-1]) / 2).to(weight.device), [], []
    size = SLICES.get(weight.device.type, 2**24) // block * block
    for part in weight.detach().flatten().split(size):
        rest = len(part) % block
        blocks = F.pad(part.float(), (0, -len(part) % block)).view(-1, block)
        top = blocks.abs().amax(1)
        scaled = blocks * (1 / top.clamp(min=1e-38))[:, None]
        if rest:  # trap: in a short last block bitsandbytes divides, which rounds differently
            top[-1].clamp_(min=1e-38)
            scaled[-1] = blocks[-1] / top[-1]
        scaled = scaled.flatten()[: len(part) + rest % 2]
        code = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
        codes.append(code[::2] << 4 | code[1::2])
        absmax.append(top)
    return torch.cat(codes), torch.cat(absmax)


def nf4_dequantize(codes, absmax, shape, dtype, block=64):
    """The weights (shape): level x absmax in float32, rounded once to `dtype`."""
    assert absmax.dtype == torch.float32, absmax.dtype  # trap: model.half() would have rounded it
    blocks = torch.empty(len(absmax), block, dtype=dtype, device=codes.device)
    codes = F.pad(codes, (0, blocks.numel() // 2 - len(codes)))  # of a short last block
    size = SLICES.get(codes.device.type, 2**24) // block * block
    pairs = NF4_PAIRS.to(codes.device)
    slices = codes.split(size // 2), absmax.split(size // block), blocks.split(size // block)
    for code, top, out in zip(*slices):
        levels = pairs.index_select(0, code.int()).view(torch.float32)
        torch.mul(levels.view(-1, block), top[:, None], out=out)
    return blocks.view(-1)[: math.prod(shape)].view(shape)


class _NF4Matmul(torch.autograd.Function):
    """x Wᵀ + b; W is dequantised here and again in backward, so that no graph holds it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense(layer.dtype), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dense(grad.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer in blocks of 64: 4.5 bits a weight. `dtype`: of the weight it stands
    for. Neither weight nor bias gets a gradient; adapters on top do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        self.codes, self.absmax = map(nn.Buffer, nf4_quantize(linear.weight))
        self.requires_grad_(False)

    def dense(self, dtype):
        """The weight (out, in)."""
        return nf4_dequantize(self.codes, self.absmax, (self.out_features, self.in_features), dtype)

    def forward(self, x):
        flat = _NF4Matmul.apply(x.reshape(-1, self.in_features), self)
        return flat.view(*x.shape[:-1], self.out_features)


class LoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) B A dropout(x). `lora_A` (R, in) starts as Kaiming, `lora_B`
    (out, R) at zero, so training begins at the base model. paper: Hu et al. 2021, arXiv
    2106.09685, §4.1."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        self.scale, self.on = alpha / rank, True
        device = next(t.device for t in base.state_dict().values())
        like = dict(device=device, dtype=torch.float32)  # choice: fp32 over any base
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        self.dropout = nn.Dropout(dropout)
        if not self.lora_A.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        low = F.linear(self.dropout(x).to(self.lora_A.dtype), self.lora_A)  # (…, R)
        y += F.linear(self.scale * low, self.lora_B).to(y.dtype)  # scaled where it is small
        return y


def _layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def _replace(model, name, new):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _linears(model, targets, scope):
    names = [name for name, m in model.named_modules() if name.rpartition(".")[2] in targets
             and isinstance(m, (nn.Linear, NF4Linear))
             and (scope == "all" or not TOWERS.search(name))]
    if not names:
        raise InputError(f"no linear layer ends in {', '.join(targets)}: nothing to adapt here")
    return names


def add_lora(model, rank=16, alpha=32, dropout=0.05, targets=TARGETS, scope="language"):
    """Wraps the linears whose name ends in one of `targets` and freezes everything else; returns
    their full names. scope "language" leaves vision and audio towers alone; "all" is the authors'
    suffix matching."""
    assert scope in ("language", "all"), scope
    model.requires_grad_(False)
    names = _linears(model, targets, scope)
    for name in names:
        _replace(model, name, LoRALinear(model.get_submodule(name), rank, alpha, dropout))
    return names


@contextlib.contextmanager
def adapters_off(model):
    """Within the block the model is its base."""
    layers = _layers(model).values()
    was = [m.on for m in layers]
    try:
        for m in layers:
            m.on = False
        yield model
    finally:
        for m, on in zip(layers, was):
            m.on = on


@torch.no_grad()
def merge_lora(model):
    """Adds every adapter to its base weight, in fp32, and removes the wrappers. Explicit, once,
    for serving. trap: merging in bf16 inside eval() / train() loses bits on every round trip.
    choice: an NF4 model becomes dense; quantising the sum would round most adapters away."""
    for name, m in list(model.named_modules()):
        if isinstance(m, NF4Linear):
            dense = nn.Linear(m.in_features, m.out_features, device="meta")
            dense.weight, dense.bias = nn.Parameter(m.dense(m.dtype), False), m.bias
            _replace(model, name, dense)
    for name, m in _layers(model).items():
        delta = m.scale * (m.lora_B.float() @ m.lora_A.float())  # (out, in)
        m.base.weight.copy_((m.base.weight.float() + delta).to(m.base.weight.dtype))
        _replace(model, name, m.base)
    return model


def adapter_tensors(model):
    """{PEFT's key: tensor} of every adapter; references, not copies."""
    return {f"base_model.model.{name}.{part}.weight": getattr(m, part)
            for name, m in _layers(model).items() for part in ("lora_A", "lora_B")}


def save_adapter(model, folder):
    """`adapter_model.safetensors` + `adapter_config.json` as PEFT writes and reads them, and
    `mulcot.json`, which tells whether the base was in NF4 (PEFT warns of keys it does not know)."""
    layers = _layers(model)
    assert layers, "save_adapter on a model without adapters"
    one, base = next(iter(layers.values())), model.config._name_or_path
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=one.rank, lora_alpha=one.alpha,
                  lora_dropout=one.dropout.p, bias="none", target_modules=sorted(layers),
                  base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
                  inference_mode=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_tensors(model).items()}
    write_atomic(os.path.join(folder, "adapter_model.safetensors"),
                 lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(os.path.join(folder, "adapter_config.json"), config)
    write_json(os.path.join(folder, "mulcot.json"), {"nf4": _is_nf4(model)})


def _is_nf4(model):
    return any(isinstance(m, NF4Linear) for m in model.modules())


def adapter_nf4(folder):
    """Whether an adapter was trained over an NF4 base; None where no file says so."""
    file = Path(folder, "mulcot.json")
    return json.loads(file.read_text()).get("nf4") if file.exists() else None


def load_adapter(model, folder):
    """Wraps and fills the layers that the file names; returns their names. Every key must find its
    layer and every layer both its halves. trap: keys that match nothing load as a silent no-op
    elsewhere."""
    file = os.path.join(folder, "adapter_model.safetensors")
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        tensors, over = load_file(file), adapter_nf4(folder)
    except FileNotFoundError as e:
        missing = e.filename or file
        raise InputError(f"{folder} is no adapter folder: {missing} is missing") from None
    except (ValueError, SafetensorError) as e:
        raise InputError(f"{folder} holds a damaged adapter: {e}") from None
    odd = [k for k in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
                       "modules_to_save", "lora_bias") if config.get(k)]
    if odd or config.get("bias", "none") != "none" or config.get("peft_type") != "LORA":
        raise InputError(f"{folder} uses {', '.join(odd) or 'another adapter type'}: only plain "
                         "LoRA is read here")
    pairs, modules = {}, dict(model.named_modules())
    for key, tensor in tensors.items():
        m = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight", key)
        name = m and next((n for n in _spellings(m[1]) if n in modules), None)
        if name is None:
            raise InputError(f"{folder}: {key} fits no layer of this model: wrong base model?")
        pairs.setdefault(name, {})[m[2]] = tensor
    for name, halves in pairs.items():
        base = modules[name].base if isinstance(modules[name], LoRALinear) else modules[name]
        if set(halves) != {"lora_A", "lora_B"}:
            raise InputError(f"{folder}: {name} has only {', '.join(halves)}")
        A, B = halves["lora_A"], halves["lora_B"]
        fits = isinstance(base, (nn.Linear, NF4Linear)) and A.shape == (len(A), base.in_features)
        if not fits or B.shape != (base.out_features, len(A)):
            raise InputError(f"{folder}: {name} has shapes {tuple(A.shape)}, {tuple(B.shape)}, the "
                             f"layer is {base}: wrong base model?")
        layer = LoRALinear(base, A.shape[0], config["lora_alpha"], config.get("lora_dropout", 0.0))
        layer.lora_A.data.copy_(A), layer.lora_B.data.copy_(B)
        _replace(model, name, layer)
    if over not in (None, here := _is_nf4(model)):
        print(f"note: {folder} was trained with nf4 {over}, here it is {here}", file=sys.stderr)
    unfilled = set(_layers(model)) - set(pairs)
    if unfilled:
        raise InputError(f"{folder} leaves {len(unfilled)} adapters unfilled, first "
                         f"{min(unfilled)}")
    return sorted(pairs)


def _spellings(name):
    """A layer's name now and as older checkpoints spell it (`model.layers.*`, `visual.*`)."""
    return (name, re.sub(r"^model\.layers\.", "model.language_model.layers.", name),
            re.sub(r"^visual\.", "model.visual.", name))


# ================================================================================================
# §6 Model [needs: json, os, re, Path, torch, SafetensorError, safe_open, load_file, save_file, nn,
#    LABELS, InputError, §1, §2, §4, §5, §9]
# ================================================================================================

def load_model(name, device="cpu", dtype=None, max_pixels=None, nf4=None):
    """(model in eval mode, Processor) from a hub name, a model folder or an adapter folder (whose
    base is read first). dtype: default float32 on CPU, bfloat16 on GPU; max_pixels: image cap;
    nf4: the language model's linears in 4 bits, by default as the adapter was trained."""
    from transformers import AutoModelForImageTextToText, Qwen2_5OmniThinkerForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_device(device)
    base, processor = base_of(name), load_processor(name, max_pixels)
    dtype = dtype or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    try:
        kind = AutoModelForImageTextToText  # the whole Omni is no such model, its Thinker is
        if processor.extractor:
            kind = Qwen2_5OmniThinkerForConditionalGeneration
        if nf4 is None:
            nf4 = base != str(name) and adapter_nf4(name)
        if nf4:
            model, missing = _load_nf4(kind, base, device, dtype)
        else:
            model, report = kind.from_pretrained(
                base, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
            missing = report["missing_keys"]
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise InputError(f"model {base!r} cannot be loaded: {str(e).splitlines()[0]}") from None
    if missing:  # trap: saved with LoRA wrappers it reloads with random layers
        raise InputError(f"model {base!r} lacks {len(missing)} weights, first {min(missing)}: was "
                         "it saved before merge_lora?")
    if base != str(name):
        load_adapter(model, name)
    if Path(name, "head.json").exists():
        model.readout = load_readout(name, model.lm_head.in_features).to(device)
    return model.to(device).eval(), processor


def _load_nf4(auto, base, device, dtype):
    """(model whose language model is in NF4, names of weights that the files lack). Built without
    memory, then filled tensor by tensor: memory peaks one layer above the result."""
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, GenerationConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import apply_renamings

    folder = base if os.path.isdir(base) else snapshot_download(
        base, allow_patterns=["*.json", "model*.safetensors"])
    config = AutoConfig.from_pretrained(base)
    build = getattr(auto, "from_config", getattr(auto, "_from_config", None))
    with torch.device("meta"):
        model = build(getattr(config, "thinker_config", config), dtype=dtype,
                      attn_implementation="sdpa")
    for name, buffer in list(model.named_non_persistent_buffers()):
        _replace(model, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # trap: rotary frequencies are in no file, this computes them
    seats, renamings = model.state_dict(), get_model_conversion_mapping(model)
    missing = set(seats) - set(model.all_tied_weights_keys)
    for name in _linears(model, TARGETS, "language"):  # those that LoRA adapts
        _replace(model, name, NF4Linear(model.get_submodule(name)))
    files = sorted(Path(folder).glob("model*.safetensors"))
    for file, key in [(file, key) for file in files for key in safe_open(file, "pt").keys()]:
        name = apply_renamings(key, renamings)  # `visual.*` of older files is `model.visual.*`, …
        if any(re.search(p, name) for p in model._keys_to_ignore_on_load_unexpected or ()):
            continue  # Omni's talker
        with safe_open(file, "pt") as f:  # trap: the pages read of an open file count as memory,
            value = f.get_tensor(key)  # and a tensor that is not copied keeps it open
        if name not in seats or seats[name].shape != value.shape:
            raise InputError(f"{key} {tuple(value.shape)} in {file.name} fits no weight")
        value = value.to(device, seats[name].dtype, copy=True)
        owner, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner)
        if isinstance(owner, NF4Linear) and leaf == "weight":
            owner.codes, owner.absmax = nf4_quantize(value)
        else:
            owner.load_state_dict({leaf: value}, strict=False, assign=True)
        missing.discard(name)
    model.tie_weights()
    if Path(folder, "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, missing


def load_processor(name, max_pixels=None):
    """Tokenizer and image processor of a hub name, model folder or adapter folder."""
    from transformers import (
        AutoConfig, AutoImageProcessor, AutoTokenizer, WhisperFeatureExtractor)

    base = base_of(name)
    try:
        kind = AutoConfig.from_pretrained(base).model_type
        if kind not in ("qwen2_5_vl", "qwen2_5_omni", "qwen2_5_omni_thinker"):
            raise InputError(f"model {base!r} is a {kind}: only Qwen2.5-VL and Qwen2.5-Omni are "
                             "laid out right here")
        tokenizer = AutoTokenizer.from_pretrained(base)
        trained = Path(name, "preprocessor_config.json").exists()  # the image size of training
        images = AutoImageProcessor.from_pretrained(name if trained else base, backend="pil")
        hears = OMNI_AUDIO_SEATS[1] in tokenizer.get_vocab()
        extractor = WhisperFeatureExtractor.from_pretrained(base) if hears else None
    except InputError:
        raise
    except (OSError, ValueError) as e:
        raise InputError(f"model {base!r} cannot be loaded: {str(e).splitlines()[0]}") from None
    if max_pixels:
        images.size = dict(shortest_edge=min(56 * 56, max_pixels), longest_edge=max_pixels)
    return Processor(tokenizer, images, extractor)


def base_of(name):
    """The model that a hub name or folder stands for: itself, or the base of an adapter folder."""
    base, config = str(name), Path(name, "adapter_config.json")
    if config.exists():
        try:
            base = str(json.loads(config.read_text())["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{config} does not name its base_model_name_or_path") from None
        if os.path.realpath(base) == os.path.realpath(name):
            raise InputError(f"{name} holds a model and its adapter: give each its own folder")
    if Path(name, "best", "adapter_config.json").exists():
        raise InputError(f"{name} is a training run: use {name}/best")
    if not os.path.isdir(base) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        raise InputError(f"model {base!r} is neither a folder nor a hub name such as "
                         "Qwen/Qwen2.5-VL-3B-Instruct")
    return base


def new_cache():
    """An empty key-value cache for `forward_branches` to fill and `write_branch` to go on from."""
    from transformers import DynamicCache

    return DynamicCache()


def forward_branches(model, batch, cache=None):
    """Hidden states (B, T, D) of the last layer: one vision pass, one audio pass and one language
    pass for all branches. The logits are left to the caller, who needs them at few positions."""
    core = model.model
    if "flash" in (model.config._attn_implementation or ""):
        raise InputError("flash attention cannot take the branch mask: load the model with sdpa "
                         "or eager")
    embeds = core.get_input_embeddings()(batch.ids)  # (B, T, D)
    if batch.pixels is not None:
        parts = core.get_image_features(batch.pixels.to(embeds.dtype), batch.grid).pooler_output
        seats = batch.ids == model.config.image_token_id
        found = torch.cat([parts[i] for i in batch.order])
        embeds = embeds.masked_scatter(seats[..., None], found.to(embeds.dtype))
    if batch.audio is not None:
        heard = core.audio_tower(batch.audio.T, feature_lens=batch.audio_lengths).last_hidden_state
        seats = batch.ids == model.config.audio_token_id
        embeds = embeds.masked_scatter(seats[..., None], heard.to(embeds.dtype))
    out = core.language_model(inputs_embeds=embeds, position_ids=batch.position_ids,
                              use_cache=cache is not None, past_key_values=cache,
                              attention_mask=branch_mask(batch.branch, embeds.dtype))
    return out.last_hidden_state


@torch.no_grad()
def score_labels(model, batch, hidden=None):
    """Log-probabilities (B, C) in the order of the branches, normalised over them, from a batch
    whose first branches are `label_branches()`, or of `label_example`s. One forward pass (`hidden`,
    if it has been made), exact, never unparsed."""
    hidden = forward_branches(model, batch) if hidden is None else hidden
    at = batch.targets != -100
    logits = model.lm_head(hidden[at]).float()  # (N, V)
    token = logits.log_softmax(-1).gather(1, batch.targets[at][:, None])[:, 0]  # (N,)
    row = torch.arange(len(batch.ids), device=at.device)[:, None].expand_as(at)[at]
    classes = int(batch.branch[at].max())  # an open branch behind them has no answer
    scores = token.new_zeros(int(batch.example.max()) + 1, classes)
    scores.index_put_((batch.example[row], batch.branch[at] - 1), token, accumulate=True)
    return scores.log_softmax(-1)


def label_branches(classes=LABELS):
    """The label (or score) prompt with each of its answers."""
    task = "label" if tuple(classes) == LABELS else "bin"
    return [(task_format(task), render_label(answer)) for answer in classes]


def label_example(post, processor):
    """The three answers to the label prompt as branches, for `score_labels` alone: what they share,
    the prompt and the answer's opening, belongs to the prefix, whose tokens cost once. Their
    log-probabilities are the same three times and cancel."""
    example = encode(post, label_branches(), processor)
    tails = [ids for ids, _ in example.branches]
    shared = len(os.path.commonprefix(tails)) - 1  # a branch opens with one token that predicts
    after = int(example.positions.max()) + 1 + torch.arange(shared)
    example.prefix = example.prefix + tails[0][:shared]
    example.positions = torch.cat([example.positions, after.expand(3, -1)], 1)
    example.branches = [(ids[shared:], len(ids) - shared - 1) for ids in tails]
    return example


def training_branches(post, processor, max_answer=512, reasoning=True):
    """(the training tasks of a labelled post: reasoning, then label; why it has none). The chain is
    brought into the one written form; choice: one that contradicts its label is unfit. Without
    `reasoning` the label task alone, whatever the chain."""
    if post.label is None:
        return None, "no label"
    label_task = (task_format("label"), render_label(post.label))
    if not reasoning:
        return [label_task], None
    if not post.cot:
        return None, "no cot: run generate.py teacher first"
    parsed, problem = check_answer(post.cot, post.label)
    if problem:
        return None, f"chain unfit: {problem}"
    chain = render_reasoning(parsed.fields)
    if len(processor.text_ids(chain)) >= max_answer:
        return None, f"chain longer than --max-answer {max_answer} tokens"
    return [(task_format("reason"), chain), label_task], None


@torch.no_grad()
def generate_text(model, processor, examples, max_new_tokens=512, temperature=0.0):
    """Answers [(text, finish), …] to examples whose last branch has no answer yet; finish is
    "stop" or "length". Greedy at temperature 0."""
    batch, cache = collate(examples, processor.pad).to(model.device), new_cache()
    hidden = forward_branches(model, batch, cache)
    return write_branch(model, processor, batch, hidden, cache, max_new_tokens, temperature)


@torch.no_grad()
def write_branch(model, processor, batch, hidden, cache, max_new_tokens=512, temperature=0.0):
    """Goes on where `forward_branches` left the last branch of each row: hidden (B, T, D) and its
    cache -> [(text, finish), …]. New tokens see the prefix and their own branch, so one pass over
    a post can serve its labels and its chain. A row that has ended leaves the batch. Equal to
    transformers' generate (tested), which is slower. Vision ids never come out."""
    T, k, ids = batch.ids.shape[1], int(batch.branch.max()), processor.tokenizer
    rows = torch.arange(len(batch.ids), device=hidden.device)
    at = (batch.branch == k).mul(torch.arange(T, device=hidden.device)).argmax(1)
    now, position = hidden[rows, at], batch.position_ids[:, rows, at]  # (B, D), (3, B)
    seen = (batch.branch == 0) | (batch.branch == k)  # (B, T)
    never = torch.tensor(processor.never, device=hidden.device)
    ends, said, finish = (processor.im_end, processor.pad), [[] for _ in rows], {}
    alive = list(range(len(rows)))  # the rows still in the batch
    for _ in range(max_new_tokens):
        logits = model.lm_head(now).float().index_fill(1, never, -torch.inf)  # (B, V)
        token = logits.argmax(-1)
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        going = []
        for n, (row, t) in enumerate(zip(alive, token.tolist())):  # the step's only wait for a GPU
            if t in ends:
                finish[row] = "stop"
            else:
                said[row].append(t)
                going.append(n)
        if not going:
            break
        if len(going) < len(alive):
            alive = [alive[n] for n in going]
            stay = torch.tensor(going, device=hidden.device)
            token, position, seen = token[stay], position[:, stay], seen[stay]
            cache.batch_select_indices(stay)
        position = position + 1
        seen = torch.cat([seen, seen.new_ones(len(alive), 1)], 1)
        embeds = model.model.get_input_embeddings()(token)[:, None]  # (B, 1, D)
        mask = embeds.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(embeds.dtype).min)
        now = model.model.language_model(
            inputs_embeds=embeds, position_ids=position[..., None], use_cache=True,
            attention_mask=mask[:, None, None], past_key_values=cache).last_hidden_state[:, 0]
    return [(ids.decode(t), finish.get(row, "length")) for row, t in enumerate(said)]


class Readout(nn.Module):
    """Reads a score or a label off the last token's hidden state. `about` is its head.json:
    target "score" | "label"; how "read", or "generate" for its rival, which has no layers and
    writes the score; mean and deviation of the training scores; without: inputs left out.
    paper: arXiv 2606.05713, Linear D -> 256, LayerNorm, ReLU, Dropout 0.2, Linear 256 -> 1."""

    def __init__(self, width, about):
        super().__init__()
        self.about = dict(how="read", mean=0.0, deviation=1.0, without=[]) | about
        outputs = 1 if about["target"] == "score" else len(LABELS)
        if self.about["how"] == "read":
            self.layers = nn.Sequential(nn.Linear(width, 256), nn.LayerNorm(256), nn.ReLU(),
                                        nn.Dropout(0.2), nn.Linear(256, outputs))

    def forward(self, hidden, attended):
        """Hidden states (B, T, D), attended tokens (B, T) -> a z-score (B, 1) or logits (B, 3)."""
        return self.layers(last_hidden(hidden, attended).float())


def last_hidden(hidden, attended):
    """The hidden state (B, D) of each row's last attended token; hidden (B, T, D), attended (B, T).
    trap: under left padding "count of tokens - 1" is another token."""
    T = attended.shape[1]
    at = T - 1 - attended.int().flip(1).argmax(1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def readout_branches(target):
    """The prompt of a readout: one branch, without an answer."""
    return [(task_format(target), None)]


@torch.no_grad()
def read_out(model, processor, posts):
    """What a model with a readout says of posts, one dict each, from one pass: `score`, within
    [-3, 3], or `prediction` and `probs`. A generated score is as it was written, with its `raw`
    text; None, with a `problem`, where that holds no number."""
    about, rows = model.readout.about, []
    examples = [encode(without(p, about["without"]), readout_branches(about["target"]), processor)
                for p in posts]
    if about["how"] == "generate":
        for text, _ in generate_text(model, processor, examples, max_new_tokens=8):
            score = parse_score(text)
            rows.append(dict(score=score, raw=text, problem="no number" if score is None else None))
        return rows
    batch = collate(examples, processor.pad).to(model.device)
    out = model.readout(forward_branches(model, batch), batch.branch >= 0)  # (B, 1) or (B, 3)
    if about["target"] == "score":
        scores = (out[:, 0] * about["deviation"] + about["mean"]).clamp(-SCORE_RANGE, SCORE_RANGE)
        return [dict(score=round(score, 4)) for score in scores.tolist()]
    return [label_row(probs) for probs in out.softmax(-1).tolist()]


def label_row(probs):
    """Three probabilities as the fields of a row."""
    return dict(prediction=LABELS[max(range(3), key=probs.__getitem__)],
                probs=[round(p, 6) for p in probs])


def save_readout(readout, folder):
    """`head.safetensors` (where it has layers), then `head.json`."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in readout.state_dict().items()}
    if tensors:
        write_atomic(Path(folder, "head.safetensors"), lambda part: save_file(tensors, part))
    write_json(Path(folder, "head.json"), readout.about)


def load_readout(folder, width):
    """The Readout that save_readout wrote, for hidden states of `width`."""
    try:
        readout = Readout(width, json.loads(Path(folder, "head.json").read_text()))
        if readout.about["how"] == "read":
            readout.load_state_dict(load_file(Path(folder, "head.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
        why = str(e).splitlines()[-1].strip()
        raise InputError(f"{folder} holds a damaged or foreign readout head: {why}") from None
    return readout


# ================================================================================================
# §7 Losses [needs: math, Counter, torch, F, LABELS]
# ================================================================================================


def multitask_loss(reasoning, label, reasoning_weight=0.8, label_weight=0.2):
    """paper: L_multi = λ_rea L_rea + λ_cls L_cls, 0.8 and 0.2."""
    return reasoning_weight * reasoning + label_weight * label


def student_loss(hard, soft, lam=0.3):
    """paper: L_student = (1 - λ) L_multi^hard + λ L_multi^soft, λ = 0.3."""
    return (1 - lam) * hard + lam * soft


def distill_kl(student_logits, teacher_logits, temperature=2.0, t_squared=False):
    """KL(teacher || student) of the softened distributions, (N, V) each, mean over N -> scalar.
    Both are cut to the ids they share first (Qwen2.5-VL-7B has 152,064 output rows, 3B 151,936).
    paper: no τ² factor; `t_squared` is Hinton et al. 2015 (arXiv 1503.02531, §2), who have it."""
    V = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q = (student_logits[:, :V].float() / temperature).log_softmax(-1)
    log_p = (teacher_logits[:, :V].float() / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean() if len(log_q) else log_q.sum()
    return kl * temperature**2 if t_squared else kl


def top_k_soft(logits, k=64, temperature=2.0):
    """Soft labels of logits (N, V): ids (N, K), their log-probabilities at τ (N, K), and the log
    of all the rest (N,), by logsumexp. choice: keep the tail as one more bin; a renormalised top-k
    is biased."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    top, ids = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return ids, top, log_p.scatter(1, ids, -torch.inf).logsumexp(-1)


def soft_kl(student_logits, soft, temperature=2.0):
    """KL(assistant || student) (N,) at τ. `soft` is exact: the assistant's last hidden states and
    its output matrix, ((N, D'), (V, D')); or short: (ids, log_p, tail) of `top_k_soft`, compared
    over the same K + 1 bins. The student's logits must be cut to the soft labels' vocabulary."""
    log_q = (student_logits.float() / temperature).log_softmax(-1)  # (N, V)
    if len(soft) == 2:
        log_p = (F.linear(*soft).float() / temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    ids, log_p, tail_p = soft
    tail_q = log_q.scatter(1, ids, -torch.inf).logsumexp(-1)  # (N,)
    kl = (log_p.exp() * (log_p - log_q.gather(1, ids))).sum(-1)
    whole = torch.isinf(tail_p) | torch.isinf(tail_q)  # K = V: there is no rest
    zero = torch.zeros_like(tail_p)
    return kl + torch.where(whole, zero, tail_p.exp() * (tail_p - torch.where(whole, zero, tail_q)))


def readout_loss(out, gold, mean=0.0, deviation=1.0):
    """Sum over the posts. paper: L1 between a readout's z-scores (B, 1) and the gold scores (B,)
    brought to them by mean and deviation of the training posts; for classes (B,), a long tensor,
    the cross-entropy of logits (B, C)."""
    if gold.is_floating_point():
        return F.l1_loss(out[:, 0], (gold - mean) / deviation, reduction="sum")
    return F.cross_entropy(out, gold, reduction="sum")


def dense_ce_kl(hidden, weight, targets, weights=None, soft=None, lam=0.0, temperature=2.0,
                kl_weights=None, vocab=None):
    """Σ_n w_n [(1 - λ) CE_n + λ KL_n] over the supervised positions -> (loss, {"ce", "kl"}
    detached sums).

    hidden (N, D), output weight (V, D), targets (N,); weights (N,) default 1/N; soft as `soft_kl`
    takes it, over the ids below `vocab`; kl_weights (N,) default `weights` (they differ with τ²
    and with positions "all"). The readable form of `chunked_ce_kl`: it holds the (N, V) logits of
    the positions it is given, and no others."""
    N = len(targets)
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()  # (N, V)
    weights = torch.full((N,), 1 / max(N, 1), device=hidden.device) if weights is None else weights
    ce = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
    if soft is None or lam == 0.0:
        return ce, {"ce": ce.detach(), "kl": torch.zeros_like(ce)}
    kl_weights = weights if kl_weights is None else kl_weights
    kl = (kl_weights * soft_kl(logits[:, :vocab], soft, temperature)).sum()
    return student_loss(ce, kl, lam), {"ce": ce.detach(), "kl": kl.detach()}


CHUNK = 2**26  # logits held at once: 256 MiB in fp32, 440 positions of Qwen's vocabulary


def chunked_ce_kl(hidden, weight, targets, weights=None, soft=None, lam=0.0, temperature=2.0,
                  kl_weights=None, vocab=None):
    """`dense_ce_kl` without its (N, V) logits: same arguments, same result (tested). Positions go
    by in chunks; the loss is the end of the graph, so each chunk's gradient is taken on the spot,
    in the buffer that held its logits, and backward only scales it."""
    N = len(targets)
    weights = torch.full((N,), 1 / max(N, 1), device=hidden.device) if weights is None else weights
    kl_weights = weights if kl_weights is None else kl_weights
    if lam == 0.0:
        soft = None
    loss, ce, kl = _ChunkedCEKL.apply(hidden, weight, targets, weights, soft, lam, temperature,
                                      kl_weights, vocab)
    return loss, {"ce": ce, "kl": kl}


class _ChunkedCEKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, soft, lam, temperature, kl_weights, vocab):
        N, V = len(targets), len(weight)
        chunks = max(1, math.ceil(N * V / CHUNK))
        size = max(1, math.ceil(N / chunks))
        W, share = weight.to(hidden.dtype), 1.0 if soft is None else 1 - lam
        d_hidden, d_weight = torch.zeros_like(hidden), None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight)
        buffer = hidden.new_empty(min(size, N), V)
        ce, kl = (torch.zeros((), device=hidden.device) for _ in range(2))
        for a in range(0, N, size):
            at = slice(a, a + size)
            h, t, w = hidden[at], targets[at, None], weights[at, None]
            logits = torch.mm(h, W.T, out=buffer[: len(h)]).float()  # (n, V)
            d_kl, target_logits = None, logits.gather(1, t)
            if soft is not None:
                mine = (soft[0][at], soft[1]) if len(soft) == 2 else [x[at] for x in soft]
                kl_n, d_kl = _soft_kl_gradient(logits[:, :vocab], mine, temperature)
                kl += (kl_weights[at] * kl_n).sum()
            # CE_n = logsumexp - logit of the target; its gradient is softmax - one-hot
            top = logits.amax(1, keepdim=True)
            d = logits.sub_(top).exp_()
            total = d.sum(1, keepdim=True)
            ce += (w * (total.log() + top - target_logits)).sum()
            d.mul_(share * w / total).scatter_add_(1, t, -share * w)
            if d_kl is not None:
                d[:, :vocab] += d_kl.mul_(lam * kl_weights[at, None])
            d = d.to(h.dtype)
            torch.mm(d, W, out=d_hidden[at])
            if d_weight is not None:
                d_weight += d.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(ce, kl)
        return share * ce + lam * kl, ce, kl

    @staticmethod
    def backward(ctx, scale, *_):
        d_hidden, d_weight = ctx.saved_tensors
        d_weight = None if d_weight is None else scale * d_weight
        return scale * d_hidden, d_weight, *[None] * 7


def _soft_kl_gradient(logits, soft, temperature):
    """(`soft_kl` (n,), its gradient in the logits (n, V)); written out, in the buffers it has."""
    log_q = (logits / temperature).log_softmax(-1)
    if len(soft) == 2:  # KL = Σ p (log p - log q); gradient (q - p) / τ
        log_p = F.linear(*soft).float().div_(temperature).log_softmax(-1)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(-1)
        return kl, log_q.exp_().sub_(p).div_(temperature)
    ids, log_p, tail_p = soft
    top = log_q.gather(1, ids)
    rest = log_q.scatter_(1, ids, -torch.inf)
    tail_q = rest.logsumexp(-1)
    whole = torch.isinf(tail_p) | torch.isinf(tail_q)
    p_rest, tail_q = tail_p.exp(), tail_q.masked_fill(whole, 0)
    kl = (log_p.exp() * (log_p - top)).sum(-1)
    kl += torch.where(whole, 0, p_rest * (tail_p - tail_q))
    # within the rest the student's own shares count: gradient share · (q_rest - p_rest) / τ
    d = rest.sub_(tail_q[:, None]).exp_().mul_((tail_q.exp() - p_rest)[:, None])
    return kl, d.scatter_(1, ids, top.exp() - log_p.exp()).div_(temperature)


def accuracy_f1(gold, said, classes=LABELS, weighted=False):
    """(accuracy, macro or weighted F1) of labels; what is none of `classes` is wrong."""
    right = Counter(g for g, s in zip(gold, said) if g == s)
    golds, saids, f1 = Counter(gold), Counter(said), 0.0
    for x in classes:
        share = golds[x] / len(gold) if weighted else 1 / len(classes)
        f1 += share * 2 * right[x] / max(1, golds[x] + saids[x])
    return right.total() / len(gold), f1


def regression_metrics(gold, predicted):
    """MMSA's metrics of scores in [-3, 3]: MAE and Pearson's r of unclipped numbers; Acc-7 and
    Acc-5, clipped to ±3 and ±2 and rounded half to even; Acc-2 and weighted F1 of the signs, `has0`
    (>= 0 or not) and `non0` (> 0 or not, gold zeros dropped). choice: None, or a number that is not
    finite, is wrong in all but MAE and r, which are of the other posts, and counts in `unparsed`;
    an answer beyond ±3 counts as any other, and in `out_of_range`. None where undefined."""
    assert len(gold) == len(predicted) and len(gold), (len(gold), len(predicted))
    said = [p if p is not None and math.isfinite(p) else None for p in predicted]
    pairs = [(g, p) for g, p in zip(gold, said) if p is not None]
    mean = lambda xs: sum(xs) / len(xs) if xs else None
    sides = [(side, mean(side)) for side in zip(*pairs)] or [([], 0), ([], 0)]
    centred = [[x - middle for x in side] for side, middle in sides]
    norm = math.sqrt(math.prod(sum(x * x for x in side) for side in centred))
    covariance = sum(a * b for a, b in zip(*centred))
    out = dict(mae=mean([abs(g - p) for g, p in pairs]),
               corr=covariance / norm if norm > 1e-12 else None,
               unparsed=len(gold) - len(pairs), out_of_range=sum(abs(p) > 3 for _, p in pairs))
    for name, top in (("acc7", 3), ("acc5", 2)):
        step = lambda x: None if x is None else round(min(max(x, -top), top))
        out[name] = mean([step(g) == step(p) for g, p in zip(gold, said)])
    for name, side, kept in (("has0", lambda x: x >= 0, lambda g: True),
                             ("non0", lambda x: x > 0, lambda g: g != 0)):
        sides = [(side(g), None if p is None else side(p)) for g, p in zip(gold, said) if kept(g)]
        out[f"acc2_{name}"], out[f"f1_{name}"] = accuracy_f1(
            *zip(*sides), (False, True), weighted=True) if sides else (None, None)
    return out


# ================================================================================================
# §8 Small model and cascade [needs: json, math, re, Path, torch, F, Image, SafetensorError,
#    load_file, save_file, nn, LABELS, InputError, §1, §2, §9]
# ================================================================================================

SCORES = tuple(range(-3, 4))  # choice: a score in [-3, 3] as seven classes, so that it has entropy


def clean_tweet(text):
    """A tweet for a small encoder: without links and RT prefix, `@name` as `@ user`, hashtags split
    at capitals."""
    text = re.sub(r"https?:\S*|www\.\S+", " ", text)
    text = re.sub(r"^\s*RT @ ?[^:]{1,30}: ", " ", text)
    text = re.sub(r"@ ?\w+", "@ user", text)
    words = lambda m: "# " + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", m[1])
    return " ".join(re.sub(r"# ?(\w+)", words, text).split())


def mark_aspect(post):
    """(clean text with `* aspect *` marked in place, clean aspect or "", where in the text the
    aspect stands: (start, end), of the whole text if it is not found)."""
    text, aspect = clean_tweet(post.text), clean_tweet(post.aspect or "")
    place = re.search(rf"(?<!\w){re.escape(aspect)}(?!\w)", text) if aspect else None
    if place is None:
        return text, aspect, (0, len(text))
    text = f"{text[:place.start()]}* {aspect} *{text[place.end():]}"
    return text, aspect, (place.start() + 2, place.start() + 2 + len(aspect))


class UBM(nn.Module):
    """Small classifiers of posts into `classes` (LABELS or SCORES), alike but for their seeds, that
    answer together: the mean of their probabilities. Lakshminarayanan et al. 2017,
    arXiv 1612.01474. `temperature` divides the logits where probabilities are wanted. Build it with
    `new_ubm` or `load_ubm`."""

    def __init__(self, members, classes):
        super().__init__()
        self.members, self.classes = nn.ModuleList(members), tuple(classes)
        self.target = "label" if self.classes == LABELS else "score"
        self.tokenizer, self.temperature = members[0].tokenizer, 1.0

    def inputs(self, posts):
        """What all members read of B posts."""
        return self.members[0].inputs(posts)

    def forward(self, inputs):
        """`inputs` of B posts -> log of the mean probabilities (B, C), without the temperature."""
        each = torch.stack([member(inputs).log_softmax(-1) for member in self.members])  # (M, B, C)
        return each.logsumexp(0) - math.log(len(each))

    @torch.no_grad()
    def probs(self, posts):
        """Calibrated probabilities (B, C) on the CPU; in eval mode."""
        return (self.eval()(self.inputs(posts)) / self.temperature).softmax(-1).cpu()


class UBMMember(nn.Module):
    """One small classifier into C classes: any Hugging Face text encoder and, if given, an image
    encoder ("small": four convolutions); one linear layer reads the first token, the mean over the
    aspect's pieces and the mean over the image."""

    def __init__(self, text, tokenizer, classes, images=None, image_processor=None):
        super().__init__()
        self.text, self.tokenizer = text, tokenizer
        self.images, self.image_processor = images, image_processor
        if images == "small":
            sizes = (3, 16, 32, 64, 64)
            layers = [(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.ReLU())
                      for a, b in zip(sizes, sizes[1:])]
            self.images = nn.Sequential(*(part for layer in layers for part in layer))
        self.seen = 0
        if images is not None:  # how wide the encoder's output is, it says itself
            with torch.no_grad():
                self.seen = self._mean(torch.zeros(self._pixels([Image.new("RGB", (64, 64))]).shape)
                                       ).shape[1]
        width = 2 * text.config.hidden_size + self.seen
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, len(classes)))

    def inputs(self, posts):
        """What every member reads of B posts: token tensors, where the aspect's pieces are
        (B, T, 1), which posts have an image, and the pixels of those."""
        device, (texts, aspects, places) = self.head[1].weight.device, zip(*map(mark_aspect, posts))
        ids = self.tokenizer(list(texts), list(aspects), padding=True, truncation=True,
                             max_length=256, split_special_tokens=True, return_tensors="pt",
                             return_offsets_mapping=True)
        start, end = ids.pop("offset_mapping").unbind(-1)  # (B, T) each, in characters
        first = torch.tensor([[s == 0 for s in ids.sequence_ids(b)] for b in range(len(posts))])
        place = torch.tensor(places)[..., None]  # (B, 2, 1)
        spot = (first & (start < place[:, 1]) & (end > place[:, 0]))[..., None].to(device)
        there = [b for b, p in enumerate(posts) if p.image and self.images is not None]
        pixels = self._pixels([load_image(posts[b].image) for b in there]) if there else None
        return ids.to(device), spot, there, pixels if pixels is None else pixels.to(device)

    def forward(self, inputs):
        """`inputs` of B posts -> logits (B, C)."""
        ids, spot, there, pixels = inputs
        hidden = self.text(**ids).last_hidden_state.float()  # (B, T, D)
        mean = (hidden * spot).sum(1) / spot.sum(1).clamp(min=1)
        parts = [hidden[:, 0], mean]
        if self.images is not None:
            view = hidden.new_zeros(len(hidden), self.seen)  # stays zero for a post without image
            if there:
                view[there] = self._mean(pixels).float()
            parts.append(view)
        return self.head(torch.cat(parts, 1))

    def _pixels(self, images):
        """PIL images -> (B, 3, H, W) as the encoder wants them."""
        if self.image_processor is not None:
            return self.image_processor(images=images, return_tensors="pt").pixel_values
        raw = [bytearray(image.resize((64, 64)).tobytes()) for image in images]
        flat = torch.stack([torch.frombuffer(r, dtype=torch.uint8) for r in raw])
        return flat.view(-1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1

    def _mean(self, pixels):
        """(B, 3, H, W) -> (B, W), over positions of a map or tokens of a sequence."""
        out = self.images(pixels)
        out = getattr(out, "last_hidden_state", out)
        return out.flatten(2).mean(2) if out.dim() == 4 else out.mean(1)


def new_ubm(text, classes=LABELS, images=None, members=1, weights=True):
    """A UBM over encoders given by hub name or folder (images: also "small"); the members' heads
    are random. weights=False: shapes only, the encoders are random too."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    def encoder(name):
        if not weights:
            return AutoModel.from_config(AutoConfig.from_pretrained(name),
                                         attn_implementation="eager")
        return AutoModel.from_pretrained(name, attn_implementation="eager", dtype=torch.float32)

    try:
        tokenizer, texts = AutoTokenizer.from_pretrained(text), [encoder(text)
                                                                 for _ in range(members)]
        processor, looks = None, [images] * members
        if images not in (None, "small"):
            processor = AutoImageProcessor.from_pretrained(images, backend="pil")
            looks = [encoder(images) for _ in range(members)]
    except (OSError, ValueError) as e:
        raise InputError(f"encoder {text!r}{f' or {images!r}' if images else ''} cannot be "
                         f"loaded: {str(e).splitlines()[0]}") from None
    if tokenizer.pad_token is None or not tokenizer.is_fast:
        raise InputError(f"encoder {text!r}: its tokenizer must be a fast one with a pad token")
    for part in (*texts, *looks):
        pooler = getattr(part, "pooler", None)
        if pooler is not None and list(pooler.parameters()):
            part.pooler = None  # unused here; without it no weight lacks a gradient
    return UBM([UBMMember(model, tokenizer, classes, look, processor)
                for model, look in zip(texts, looks)], classes)


def reinit_layers(encoder, count):
    """Draws the top `count` layers of a text encoder anew: they are made for the task that it was
    trained on, and on few posts a random start learns better (Zhang et al. 2021,
    arXiv 2006.05987)."""
    stacks = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]
    layers = max(stacks, key=len, default=())
    if not 0 <= count <= len(layers):
        raise InputError(f"the text encoder has {len(layers)} layers, not {count} to draw anew")
    if count and len(layers) != encoder.config.num_hidden_layers:  # ALBERT has one, used often
        raise InputError("the text encoder shares its layers: none can be drawn anew alone; use "
                         "--reinit-layers 0")
    for part in (m for layer in layers[len(layers) - count:] for m in layer.modules()):
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=encoder.config.initializer_range)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()


def save_ubm(model, folder):
    """ubm.safetensors, the encoders' configs and tokenizer, ubm.json last: a folder that needs no
    hub."""
    folder, member = Path(folder), model.members[0]
    member.text.config.save_pretrained(folder / "text")
    model.tokenizer.save_pretrained(folder / "text")
    if member.image_processor is not None:
        member.images.config.save_pretrained(folder / "image")
        member.image_processor.save_pretrained(folder / "image")
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomic(folder / "ubm.safetensors", lambda part: save_file(tensors, part))
    kind = member.images and ("image" if member.image_processor is not None else "small")
    write_json(folder / "ubm.json", dict(classes=model.classes, temperature=model.temperature,
                                         members=len(model.members), images=kind))


def load_ubm(folder, device="cpu"):
    """The UBM that `save_ubm` wrote, in eval mode."""
    try:
        about = json.loads(Path(folder, "ubm.json").read_text())
        tensors = load_file(Path(folder, "ubm.safetensors"))
        images = about["images"]  # None, "small" or a folder of its own
        images = str(Path(folder, "image")) if images == "image" else images
        model = new_ubm(str(Path(folder, "text")), about["classes"], images, about["members"],
                        weights=False)
        model.load_state_dict(tensors)
        model.temperature = float(about["temperature"])
    except FileNotFoundError:
        raise InputError(f"{folder} is no UBM folder: give the --out of train.py ubm") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
        raise InputError(f"{folder} holds a damaged UBM: {e}") from None
    return model.to(device).eval()


def class_targets(posts, classes):
    """What to learn (N, C): the label; a score's two neighbouring bins, so that the expectation is
    the score. Scores beyond the outer bins count as those."""
    if tuple(classes) == LABELS:
        return F.one_hot(torch.tensor([LABELS.index(p.label) for p in posts]), 3).float()
    scores = torch.tensor([float(p.score) for p in posts]).clamp(classes[0], classes[-1])
    return (1 - (scores[:, None] - torch.tensor(classes)).abs()).clamp(min=0)


def uncertainty(probs):
    """u = H(p) / log C of distributions (B, C) -> (B,): 0 is certain, 1 knows nothing. paper:
    entropy; choice: divided by its maximum."""
    return torch.special.entr(probs).sum(-1) / math.log(probs.shape[-1])


POLARITY_EPSILON = 0.5  # choice: a score nearer to 0 than half a bin takes no side


def verdict(probs, classes):
    """What a distribution (C,) over `classes` says, as entries of a row: prediction, probs and
    uncertainty; of a score the polarity, predicted_score (its expectation) and bin_probs."""
    u, probs = round(uncertainty(probs).item(), 6), [round(p, 6) for p in probs.tolist()]
    if tuple(classes) == LABELS:
        return dict(prediction=LABELS[probs.index(max(probs))], probs=probs, uncertainty=u)
    return score_verdict(sum(p * c for p, c in zip(probs, classes)), u) | dict(bin_probs=probs)


def answer_verdict(answer, classes):
    """What an endpoint's Answer says, as entries of a row, or a str: why it says nothing. Its
    uncertainty is None without log-probabilities, and for scores, whose signs are tokens apart."""
    parsed = parse_reasoning(answer.text)
    if tuple(classes) != LABELS:
        text = parsed.fields.get("Prediction", answer.text).replace("\u2212", "-")
        said = re.findall(r"[-+]?\d+(?:\.\d+)?", text)
        if len(said) != 1 or not classes[0] <= float(said[0]) <= classes[-1]:
            return f"no score in {answer.text[:80]!r}"
        return score_verdict(float(said[0]), None)
    if parsed.prediction is None:
        return f"no label in {answer.text[:80]!r}"
    fits = lambda token: [x for x in LABELS if (word := token.strip(' "').lower())
                          and x.startswith(word)]
    for token, likely in reversed(answer.logprobs or ()):
        if fits(token) == [parsed.prediction]:  # where the label begins
            mass = dict.fromkeys(LABELS, 1e-6)
            for other, log_p in likely.items():
                if len(found := fits(other)) == 1:
                    mass[found[0]] += math.exp(log_p)
            probs = torch.tensor(list(mass.values()))
            return verdict(probs / probs.sum(), LABELS) | dict(prediction=parsed.prediction)
    return dict(prediction=parsed.prediction, uncertainty=None)


def score_verdict(score, u):
    """The entries of a predicted score with uncertainty u (None where unknown)."""
    side = LABELS[1 + (score > POLARITY_EPSILON) - (score < -POLARITY_EPSILON)]
    return dict(prediction=side, predicted_score=round(score, 6), uncertainty=u)


def cascade_route(ubm, mllm, again, tau1, tau2):
    """How far a post is settled -> (route, answer, reason). `ubm`, `mllm`, `again`: the stages'
    verdicts, None where a stage was not asked, a str (why) where it failed. Routes "ask" and "ask
    again" want the next stage; "ubm", "mllm", "agree", "again" settle the post; "none": all failed.
    paper: keep what the UBM is sure of; accept the MLLM if it is sure or of the UBM's polarity;
    else ask it again. choice: sure is u <= τ, an unknown u never; a failed stage leaves the surest
    earlier answer."""
    asked = isinstance(mllm, dict)
    if isinstance(ubm, dict) and ubm["uncertainty"] <= tau1:
        return "ubm", ubm, f"sure: uncertainty {ubm['uncertainty']:.2f} <= {tau1:.2f}"
    if mllm is None:
        return "ask", None, "the UBM is unsure" if isinstance(ubm, dict) else f"UBM failed: {ubm}"
    if not isinstance(ubm, dict) and not asked:
        return "none", None, f"UBM failed: {ubm}; MLLM failed: {mllm}"
    if not asked:
        return "ubm", ubm, f"unsure, but the MLLM failed: {mllm}"
    if mllm["uncertainty"] is not None and mllm["uncertainty"] <= tau2:
        return "mllm", mllm, f"sure: uncertainty {mllm['uncertainty']:.2f} <= {tau2:.2f}"
    if not isinstance(ubm, dict):
        return "mllm", mllm, f"unsure, but the UBM failed: {ubm}"
    if mllm["prediction"] == ubm["prediction"]:
        return "agree", _mean_verdict(ubm, mllm), "the MLLM is unsure and agrees with the UBM"
    if again is None:
        return "ask again", None, "the MLLM is unsure and contradicts the UBM"
    if isinstance(again, dict):
        return "again", again, "asked again with both answers in the prompt"
    if mllm["uncertainty"] is None:  # choice: the larger one's
        return "mllm", mllm, f"asking again failed: {again}"
    surer = min(("mllm", mllm), ("ubm", ubm), key=lambda it: it[1]["uncertainty"])
    return *surer, f"the surer of two; asking again failed: {again}"


def stages_asked(said, tau1, tau2):
    """How many of a post's three stages (1 to 3) its route asks; `said` may hold more of them. The
    MLLM passes are one less."""
    asked = 1
    while asked < 3 and cascade_route(*said[:asked], *[None] * (3 - asked), tau1,
                                      tau2)[0].startswith("ask"):
        asked += 1
    return asked


def _mean_verdict(ubm, mllm):
    """Two answers of one polarity as one: for scores their mean, weighted by 1 - u (paper: v1; an
    unknown u counts as 0.5); the label is the same."""
    if "predicted_score" not in mllm:
        return mllm
    u = [0.5 if x["uncertainty"] is None else x["uncertainty"] for x in (ubm, mllm)]
    weights = [1 - x + 1e-6 for x in u]
    mean = lambda xs: sum(w * x for w, x in zip(weights, xs)) / sum(weights)
    return score_verdict(mean([ubm["predicted_score"], mllm["predicted_score"]]), mean(u))


def threshold_grid(said, error, taus=None):
    """[(passes per post, mean error, τ1, τ2), …] for `said`, a list of (ubm, mllm, again) of posts
    that were all asked, at given pairs `taus`, else at all pairs of the quantiles of u.
    error(answer or None, n) -> the cost of an answer to post n."""
    def levels(stage):
        u = sorted(x[stage]["uncertainty"] for x in said if isinstance(x[stage], dict)
                   and x[stage]["uncertainty"] is not None)
        return [-1.0] + sorted({u[len(u) * k // 20 - (k > 0)] for k in range(21)} if u else ())

    grid = []
    for tau1, tau2 in taus or [(a, b) for a in levels(0) for b in levels(1)]:
        passes = sum(stages_asked(x, tau1, tau2) - 1 for x in said) / len(said)
        answers = [cascade_route(*x, tau1, tau2)[1] for x in said]
        wrong = sum(error(answer, n) for n, answer in enumerate(answers)) / len(said)
        grid.append((passes, wrong, tau1, tau2))
    return grid


def best_thresholds(grid, budget):
    """The entry of least error whose passes stay within the budget (the UBM alone always does).
    choice: few dev posts leave many equals; of those the one that asks about most posts, then the
    one that asks again about fewest."""
    return min((g for g in grid if g[0] <= budget), default=min(grid),
               key=lambda g: (g[1], g[2], -g[3]))


def reference_prompt(post, ubm, mllm):
    """The shared part of the prompt that asks again: the post, then both answers and how sure."""
    def told(said):
        answer = f"{said['predicted_score']:+.1f}" if "predicted_score" in said \
            else said["prediction"]
        u = said["uncertainty"]
        return answer if u is None else f"{answer} (uncertainty {u:.2f} of 1)"

    return (post_prompt(post) + f"Two earlier answers disagree. A small classifier: {told(ubm)}. "
            f"You: {told(mllm)}. Look again and decide.\n\n")


def fit_temperature(logits, targets):
    """The temperature of least cross-entropy for logits and targets (N, C), to 1 %, between 0.5 and
    10. Guo et al. 2017, arXiv 1706.04599. Fit it on dev, never on test."""
    grid = 2.0 ** torch.linspace(-1, 3.5, 313)
    losses = [F.cross_entropy(logits / t, targets).item() for t in grid]
    return grid[losses.index(min(losses))].item()


# ================================================================================================
# §9 Files and command lines [needs: argparse, contextlib, errno, glob, hashlib, json, os, pickle,
#    re, sys, tempfile, array, timedelta, Path, torch, SafetensorError, safe_open, load_file,
#    save_file, InputError]
# ================================================================================================


def write_atomic(path, write):
    """`write(temporary path)` in the same folder, fsync, then rename: the file is whole or not
    there."""
    path = str(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = path + ".part"
    try:
        write(part)
    except (RuntimeError, SafetensorError) as e:  # how torch and safetensors say "disk full"
        if not re.search("No space left|File too large|PytorchStreamWriter|unexpected pos", str(e)):
            raise
        raise OSError(errno.ENOSPC, str(e).splitlines()[0]) from None
    with open(part, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(part, path)


def write_json(path, value):
    """A JSON file, atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def read_rows(path):
    """Rows of a .jsonl that one of our stages wrote; [] if there is none yet."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as e:
                raise InputError(f"{path}:{n}: not a JSON row ({e}): delete the line and run "
                                 "again") from None
    return rows


def beside(path, name):
    """The companion of a row file: ("chains.jsonl", "rejects.jsonl") -> chains.rejects.jsonl."""
    return f"{str(path).removesuffix('.jsonl')}.{name}"


class RowWriter:
    """Appends rows to a .jsonl, one whole line per call, flushed. Opening it cuts off a torn last
    line (the mark of a killed run), so that `done` (a set of `key` values) holds just what is safe
    to skip."""

    def __init__(self, path, key="id"):
        self.path = str(path)
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self.file, self.key, self.done, keep = open(self.path, "ab+"), key, set(), 0
        self.file.seek(0)
        for n, line in enumerate(self.file, 1):
            try:
                if line.endswith(b"\n"):
                    self.done.add(json.loads(line).get(key))
                    keep += len(line)
                elif not line.startswith(b"{") or not self.path.endswith(".jsonl"):
                    raise ValueError("neither a whole row nor the start of one")
            except (ValueError, AttributeError) as e:  # trap: truncating would eat a user's file
                raise InputError(f"{path}:{n} is no row of ours ({e}): choose another "
                                 "--out") from None
        self.file.truncate(keep)
        self.file.seek(0, os.SEEK_END)

    def write(self, row):
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        self.file.write(line)
        self.file.flush()
        self.done.add(row.get(self.key))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class Shelf:
    """A list on disk: values in an anonymous temporary file, 16 bytes of memory for each. `sizes`
    holds what was said of each when it was appended."""

    def __init__(self):
        self.file, self.starts, self.sizes = tempfile.TemporaryFile(), array("Q"), array("Q")

    def append(self, value, size=0):
        self.starts.append(self.file.seek(0, os.SEEK_END))
        self.sizes.append(size)
        pickle.dump(value, self.file)

    def __getitem__(self, i):
        self.file.seek(self.starts[i])  # an index past the end raises IndexError: loops end there
        return pickle.load(self.file)

    def __len__(self):
        return len(self.starts)


@contextlib.contextmanager
def shared_rows(path, key="id"):
    """A RowWriter. Under torchrun each process writes a file of its own and knows what all have
    done; in the end, or at the next start after a kill, their rows go into `path`."""
    if ranks()[0] == 0:
        _gather_rows(path, key)
    wait_for_ranks()
    done = {row.get(key) for row in read_rows(path)} if ranks()[0] else set()
    wait_for_ranks()
    rank = ranks()[0]
    with RowWriter(beside(path, f"of-process-{rank}.jsonl") if rank else path, key) as writer:
        writer.done |= done
        yield writer
    wait_for_ranks()
    if rank == 0:
        _gather_rows(path, key)
    wait_for_ranks()


def _gather_rows(path, key):
    with RowWriter(path, key) as rows:
        for part in shares_of(path):
            RowWriter(part, key).file.close()  # cuts off a torn last line
            for row in read_rows(part):
                if row.get(key) not in rows.done:
                    rows.write(row)
            os.unlink(part)


def shares_of(path):
    """The files that torchrun's other processes left beside a row file."""
    return sorted(glob.glob(glob.escape(beside(path, "of-process-")) + "[0-9]*.jsonl"))


def ranks():
    """(number of this process, number of processes) under torchrun; (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def refuse_ranks(what):
    """Raises InputError under torchrun with more than one process."""
    if ranks()[1] > 1:
        raise InputError(f"{what} needs one process: run it without torchrun")


def join_ranks(device):
    """Under torchrun: meets the other processes and returns this one's device. All but the first
    are silent; files that are no one's share are the first one's to write."""
    rank, world = ranks()
    if world == 1:
        return device
    on_gpu = str(device).startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo",
                                             timeout=timedelta(days=7))  # shares may be uneven
    if rank:
        sys.stdout = open(os.devnull, "w")
    return device


def wait_for_ranks():
    """Goes on when all processes are here."""
    if ranks()[1] > 1:
        torch.distributed.barrier()


def gather(value):
    """[value of each process], in all processes."""
    if ranks()[1] == 1:
        return [value]
    values = [None] * ranks()[1]
    torch.distributed.all_gather_object(values, value)
    return values


def sum_gradients(parameters):
    """Gradients summed over all processes, in one message. trap: DDP acts in its own forward,
    which we bypass; a parameter without a gradient (no image in this share) counts as zero."""
    if ranks()[1] == 1:
        return
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def digest(*parts):
    """A short hex name of strings, bytes, numbers, lists and tensors."""
    h = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            part = part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        h.update(part if isinstance(part, bytes) else repr(part).encode())
        h.update(b"|")
    return h.hexdigest()[:24]


def fingerprint(model):
    """Names a model with its adapter: every tensor's name, shape and 256 values spread over it.
    Seconds even for 7B; another training run gives another name."""
    parts = []
    for name, t in sorted(model.state_dict().items()):
        flat = t.reshape(-1)
        parts += [name, tuple(t.shape), flat[:: max(1, flat.numel() // 256)][:257].float()]
    return digest(*parts)


def tokenizer_hash(tokenizer):
    """Names a vocabulary. trap: between different tokenizers equal-looking ids give silent
    nonsense."""
    return digest(sorted(tokenizer.get_vocab().items()))


def check_settings(file, settings, begun):
    """Writes what a stage was started with; a rerun onto what others began is refused, since rows
    and weights of two settings would mix. `begun`: whether there is something to go on with. A file
    of that name that no stage wrote is never written over."""
    settings = json.loads(json.dumps(settings))
    exists, was = os.path.exists(file), {}
    if begun and not exists:
        raise InputError(f"{file} is missing, so that nobody knows what this --out was begun with, "
                         "or whether it is ours: choose another --out")
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        was = dict(json.loads(Path(file).read_text(encoding="utf-8")))
    if exists and "stage" not in was and not was.keys() >= settings.keys():
        raise InputError(f"{file} is not of this program (a model's?): choose another --out")
    if begun:
        for k in settings:
            if was.get(k) != settings[k]:
                raise InputError(f"this --out was begun with {k} = {was.get(k)!r}, not "
                                 f"{settings[k]!r} ({file}): delete the --out itself or choose "
                                 "another")
    write_json(file, settings)


class SoftLabels:
    """The assistant's distributions at the supervised positions, in `folder`: `soft.json` says
    what they are valid for, `part-*.safetensors` hold them, each written atomically. An entry is
    one branch of one post, named by a hash of its token ids, its prefix and its image, so that a
    stale or foreign one is not found. Exact (top_k 0): the assistant's last hidden states, 2 bytes
    x its width a position, and its output matrix, once. Short: K x (4-byte id + 2-byte
    log-probability) + 4 bytes for the rest."""

    def __init__(self, folder, about=None):
        """about: what to write these for (a dict); None opens them for reading."""
        self.folder, self.index, self.open_files, self.head = str(folder), {}, {}, None
        header = Path(folder, "soft.json")
        if about is not None:
            if not header.exists():
                if any(Path(folder).glob("*.safetensors")):
                    raise InputError(f"{folder} holds weights and no soft.json: choose another "
                                     "--out")
                write_json(header, about)
            was = json.loads(header.read_text())
            if was != about:
                odd = ", ".join(k for k in about if was.get(k) != about[k])
                raise InputError(f"{folder} holds soft labels of another {odd}: delete it or "
                                 "choose another --out")
        elif not header.exists():
            raise InputError(f"{folder} holds no soft labels: run generate.py soft first, or "
                             "train with --no-soft")
        self.about = json.loads(header.read_text())
        self.kinds = dict(ids=torch.int32, log_p=torch.float16, tail=torch.float32)
        if not self.about["top_k"]:
            self.kinds = dict(hidden=torch.float16)
        for part in sorted(Path(folder).glob("part-*.safetensors")):
            with safe_open(part, "pt") as f:
                for name, (start, end) in json.loads(f.metadata()["entries"]).items():
                    self.index[name] = (part, start, end)

    @staticmethod
    def names(example):
        """The entry names of an example: its prefix's, then one per branch."""
        seen = [b"" if example.pixels is None else example.pixels]
        prefix = digest(example.prefix, *seen, *([] if example.audio is None else [example.audio]))
        return [prefix] + [digest(prefix, ids, n) for ids, n in example.branches]

    def write_part(self, entries):
        """entries: {name: (hidden (n, D),) or (ids (n, K), log-probabilities (n, K), tail (n,))}
        -> one more file."""
        names = "".join(entries)  # choice: named by its content, so that processes do not collide
        part = Path(self.folder, f"part-{digest(names)}.safetensors")
        spans, at = {}, 0
        for name, entry in entries.items():
            spans[name] = (at, at + len(entry[0]))
            at += len(entry[0])
        columns = zip(self.kinds.items(), zip(*entries.values()))
        tensors = {name: torch.cat(parts).to(kind) for (name, kind), parts in columns}
        if not all(torch.isfinite(t).all() for k, t in tensors.items() if k == "hidden"):
            raise InputError("the assistant's hidden states do not fit 16 bits: use --top-k 64")
        write_atomic(part, lambda path: save_file(tensors, path,
                                                  metadata={"entries": json.dumps(spans)}))
        self.index.update({name: (part, *span) for name, span in spans.items()})

    def read(self, name):
        """One entry's tensors as `write_part` took them, floats in 32 bits."""
        if name not in self.index:
            raise InputError(f"{self.folder} has no soft labels for this post, prompt and image: "
                             "rerun generate.py soft with the same --data, chains and model "
                             "sizes, or train with --no-soft")
        part, start, end = self.index[name]
        if part not in self.open_files:
            self.open_files[part] = safe_open(part, "pt")
        tensors = (self.open_files[part].get_slice(kind)[start:end] for kind in self.kinds)
        return tuple(t.long() if t.dtype == torch.int32 else t.float() for t in tensors)

    def write_head(self, weight):
        """The assistant's output matrix (V, D), for exact soft labels."""
        write_atomic(Path(self.folder, "head.safetensors"),
                     lambda path: save_file({"weight": weight.detach().cpu().contiguous()}, path))

    def load_head(self, device):
        """Exact labels need the assistant's output matrix: `head` (V, D)."""
        if self.about["top_k"]:
            return
        file = Path(self.folder, "head.safetensors")
        if not file.exists():
            raise InputError(f"{file} is missing: delete {self.folder} and run generate.py soft")
        self.head = load_file(file)["weight"].to(device)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help text where there is one worth telling."""

    def _get_help_string(self, action):
        if not action.default:
            return action.help
        return super()._get_help_string(action)


def positive(text):
    """An argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text):
    """An argparse type: a whole number of at least 0."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def check_device(device):
    """Raises InputError where this torch cannot use the device."""
    if str(device).startswith("cuda") and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # the one that join_ranks will choose
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: {str(e).splitlines()[0]}; use cpu") from None


def run_stage(stage, args):
    """Runs stage(args) and returns the exit code: a user's mistake or a full disk is one line and
    2, Ctrl-C says how to go on and is 130."""
    try:
        check_device(getattr(args, "device", "cpu"))
        stage(args)
        return 0
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError,
            FileNotFoundError) as e:
        print(f"error: {e.strerror}: {e.filename!r}: choose another path", file=sys.stderr)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: no space left while writing ({e}); what was written before is whole: free "
              "some space and run the same command again", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 2


# ================================================================================================
# §10 The embedded default [needs: json, math, os, random, re, wave, Path, torch, Image, ImageDraw,
#    LABELS, InputError, §1, §2, §3, §4, §9]
# ================================================================================================

# A toy world in which a post's sentiment needs its words and its picture, its teacher, and tiny
# real models.

TOY_WORDS = {"praise": "glorious lovely superb brilliant charming splendid delightful "
                       "amazing".split(),
             "blame": "dreadful awful boring miserable broken rotten hopeless dismal".split(),
             "no side": "busy early new local weekly quiet annual late".split()}
TOY_ASPECTS = "Rex Mia Lisbon Arena Falcons Nova Otto Vienna Orchid Comet Luna Baxter".split()
TOY_TEMPLATES = ["{a} was {w} last night", "so {w} , that is {a} for you", "just saw {a} : {w}",
                 "RT @ {u} : {a} is {w} again", "{w} show by {a}", "{w} day with {a}",
                 "they call {a} {w}"]
TOY_TEST_TEMPLATES = ["everyone says {a} seems {w}", "{a} , how {w} !", "one more {w} story on {a}"]
TOY_TAILS = ["", "", "#tbt", "#{a}", "\U0001F4F7", "\U0001F697 #news", "http://t.co/x1", "@ {u}"]
TOY_SCENES = {"cheerful": ["smiling face", "sunny sky"], "gloomy": ["frowning face", "rainy sky"],
              "plain": ["calm face", "grey wall"]}
# (words, picture) -> share of the posts. Polar pictures decide, else the words do. The shares keep
# the best guess from words alone, or from the picture alone, at 66 %; the majority class is 40 %.
TOY_CELLS = {("praise", "plain"): 17, ("no side", "plain"): 20, ("blame", "plain"): 17,
             ("praise", "cheerful"): 6, ("no side", "cheerful"): 10, ("blame", "cheerful"): 7,
             ("praise", "gloomy"): 7, ("no side", "gloomy"): 10, ("blame", "gloomy"): 6}


def toy_label(words, mood):
    """The toy world's only law: a cheerful or gloomy picture decides (irony, banter), else the
    words."""
    by_mood = {"cheerful": "positive", "gloomy": "negative"}
    by_words = {"praise": "positive", "blame": "negative", "no side": "neutral"}
    return by_mood.get(mood) or by_words[words]


def toy_posts(folder, sizes, seed=0, noise=0.0):
    """Writes drawn 56 x 56 images into `folder` and returns posts; `sizes`: {"train": 700, "dev":
    60, …}. `extra["facts"]` keeps what was drawn, for the toy teacher. In the test split every
    (word, aspect) pair and half the sentence templates are ones that no other split shows. `noise`:
    share of posts of every split whose label is one of the two wrong ones."""
    rng, slips, posts = random.Random(seed), random.Random(f"{seed}|noise"), []
    os.makedirs(folder, exist_ok=True)
    held_out = {(w, a) for ws in TOY_WORDS.values() for i, w in enumerate(ws)
                for j, a in enumerate(TOY_ASPECTS) if (i + j) % 4 == 0}
    for split, size in sizes.items():
        cells = [cell for cell, share in TOY_CELLS.items() for _ in range(share)]
        for i in range(size):
            words, mood = rng.choice(cells)
            pairs = [(w, a) for w in TOY_WORDS[words] for a in TOY_ASPECTS
                     if ((w, a) in held_out) == (split == "test")]
            word, aspect = rng.choice(pairs)
            unseen = split == "test" and i % 2 == 0
            text = rng.choice(TOY_TEST_TEMPLATES if unseen
                              else TOY_TEMPLATES) + " " + rng.choice(TOY_TAILS)
            text = text.format(a=aspect, w=word, u=rng.choice(["ann", "bob", "kim"])).strip()
            scene = rng.choice(TOY_SCENES[mood])
            name = f"{split}-{i:04d}.png"
            _draw(scene, rng).save(os.path.join(folder, name))
            facts = dict(words=words, word=word, mood=mood, scene=scene)
            label = toy_label(words, mood)
            if slips.random() < noise:
                label = slips.choice([x for x in LABELS if x != label])
            posts.append(Post(f"{split}-{i:04d}", text, safe_path(name, folder), aspect,
                              label, split=split, folder=str(folder),
                              extra={"facts": facts}))
    return posts


def toy_warmup(folder, size, seed=7):
    """Posts with `extra["branches"]`, the tasks that stand where pre-training would. They say
    nothing about a post's sentiment: name what is there, and write up findings that the prompt
    states at random. Without them random weights have nothing for LoRA to adapt. Base models never
    see the test split's templates."""
    rng, posts = random.Random(seed), toy_posts(folder, {"warm": size}, seed)
    for post in posts:
        facts = post.extra.pop("facts")
        words, mood = rng.choice(list(TOY_WORDS)), rng.choice(list(TOY_SCENES))
        label = rng.choice(LABELS)
        named, value = rng.choice([("Image", facts["scene"]), ("Word", facts["word"])])
        found = toy_findings(post.aspect, facts["word"], facts["scene"], words, mood, label, rng)
        post.extra["branches"] = [
            ["Describe the post.",
             f"The words call {post.aspect} {facts['word']}. The image shows a {facts['scene']}."],
            [f"Write up these findings: words {words}; image {mood}; verdict {label}.",
             render_reasoning(found)],
            [f'Answer with this field only:\n"{named}": what the post shows',
             f'"{named}": "{value}"']]
        post.label = None
    return posts


def toy_findings(aspect, word, scene, words, mood, label, rng):
    """The five fields of a toy chain: what was seen, and `label` as what follows from it."""
    if (words, mood) == ("praise", "gloomy"):
        resolution = "The words praise but the image is gloomy, so it is irony."
    elif (words, mood) == ("blame", "cheerful"):
        resolution = "The words blame but the image is cheerful, so it is banter."
    elif words == "no side":
        resolution = ("Neither takes a side." if mood == "plain" else
                      "The words take no side, so the image counts.")
    else:
        resolution = ("The image is plain, so the words count." if mood == "plain" else
                      "Words and image agree.")
    end = rng.choice(["The author feels {l} about {a}.", "So {a} is seen as {l}."])
    return {"Text_analysis": f"The words call {aspect} {word}, which is {words}.",
            "Image_analysis": f"The image shows a {scene}, which is {mood}.",
            "Conflict_resolution": resolution,
            "Final_conclusion": end.format(l=label, a=aspect),
            "Prediction": label}


TOY_SIDES = {"praise": 1, "blame": -1, "cheerful": 1, "gloomy": -1}
TOY_PITCHES = ("very low", "low", "middle", "high", "very high")


def toy_clips(folder, sizes, seed=0):
    """Toy posts (of three words a side) as clips with scores in [-3, 3]: the side of the words
    (-1, 0, 1), of the two frames (-1, 0, 1) and the pitch of a voice (-1 to 1 in tenths, an octave
    below to one above 250 Hz) add up, so that each input is needed."""
    rng, posts = random.Random(seed + 1), toy_posts(folder, sizes, seed)
    for post in posts:
        facts, pitch = post.extra["facts"], rng.randint(-10, 10) / 10
        word = rng.choice(TOY_WORDS[facts["words"]][:3])
        post.text, facts["word"] = post.text.replace(facts["word"], word), word
        second, audio = (f"{post.image[:-4]}{end}" for end in ("-2.png", ".wav"))
        _draw(facts["scene"], rng).save(second)
        _voice(audio, 250 * 2**pitch, rng)
        post.frames, post.image, post.audio, post.label = [post.image, second], None, audio, None
        post.score = round(sum(TOY_SIDES.get(facts[k], 0) for k in ("words", "mood")) + pitch, 1)
        facts["pitch"] = TOY_PITCHES[round((pitch + 1) * 2)]
    return posts


def toy_clip_warmup(folder, size, seed=7):
    """toy_warmup's three tasks for clips: describe, write a number that the prompt states, name."""
    rng, posts = random.Random(seed), toy_clips(folder, {"warm": size}, seed)
    for post in posts:
        facts, post.score = post.extra.pop("facts"), None
        number = render_score(rng.randint(-30, 30) / 10)
        named, value = rng.choice([("Image", facts["scene"]), ("Word", facts["word"]),
                                   ("Voice", facts["pitch"])])
        post.extra["branches"] = [
            ["Describe the post.",
             f"The voice is {facts['pitch']}. The words call {post.aspect} {facts['word']}. "
             f"The frames show a {facts['scene']}."],
            [f"Write this number: {number}", number],
            [f'Answer with this field only:\n"{named}": what the post shows',
             f'"{named}": "{value}"']]
    return posts


def _voice(path, hertz, rng):
    """About 0.4 s of a voice-like tone: harmonics under a falling spectrum, vibrato, breath noise.
    Length, loudness and vibrato vary and mean nothing."""
    t = torch.arange(rng.randint(5600, 7200)) / AUDIO_RATE  # (samples,)
    turn = hertz * (t + 0.003 * torch.sin(2 * math.pi * (rng.uniform(4, 6) * t + rng.random())) / 5)
    tone = sum(torch.sin(2 * math.pi * k * turn) / k for k in range(1, 9))
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    sound = rng.uniform(0.1, 0.3) * (tone + 0.05 * noise) * torch.sin(math.pi * t / t[-1]).sqrt()
    with wave.open(path, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(AUDIO_RATE)
        file.writeframes((sound.clamp(-1, 1) * 32767).short().numpy().tobytes())


def _draw(scene, rng):
    """A 56 x 56 picture of the scene; place, size and colours vary and mean nothing."""
    soft = lambda low: tuple(rng.randint(low, low + 60) for _ in range(3))
    sky = {"sunny sky": (120, 190, 250), "rainy sky": (70, 75, 90),
           "grey wall": (150, 150, 150)}.get(scene)
    image = Image.new("RGB", (56, 56), sky or soft(120))
    draw = ImageDraw.Draw(image)
    x, y, r = rng.randint(26, 30), rng.randint(26, 30), rng.randint(20, 23)
    if scene == "sunny sky":
        draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=(255, 220, 40))
    elif scene == "rainy sky":
        for k in range(8):
            dx, dy = rng.randint(0, 52), rng.randint(0, 44)
            draw.line((dx, dy, dx - 3, dy + 10), fill=(150, 170, 230), width=2)
    elif scene == "grey wall":
        for k in range(0, 56, 14):
            draw.line((0, k, 56, k), fill=(110, 110, 110), width=2)
    else:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(240, 200, rng.randint(90, 160)))
        for eye in (x - 8, x + 8):
            draw.ellipse((eye - 3, y - 9, eye + 3, y - 3), fill=(30, 30, 30))
            if scene == "frowning face":  # with tears
                draw.ellipse((eye - 3, y - 1, eye + 3, y + 9), fill=(60, 120, 255))
        if scene == "smiling face":  # laughing
            draw.chord((x - 12, y - 6, x + 12, y + 16), 0, 180, fill="white",
                       outline=(150, 20, 40), width=2)
        elif scene == "frowning face":
            draw.arc((x - 10, y + 8, x + 10, y + 22), 180, 360, fill=(150, 20, 40), width=4)
        else:
            draw.line((x - 10, y + 9, x + 10, y + 9), fill=(150, 20, 40), width=4)
    return image


class ToyTeacher:
    """Stands where a 72B model would, for toy posts: right unaided on about `skill` of them (else
    it misses irony or guesses), sometimes malformed, sometimes contradicting the label it was
    given. It answers in the forms that real teachers use. Deterministic in seed, post and
    messages."""

    def __init__(self, skill=0.6, seed=0):
        self.skill, self.seed = skill, seed

    def __call__(self, request):
        post, facts = request.post, request.post.extra.get("facts")
        if not facts:
            raise InputError(f"post {post.id}: the toy teacher only knows posts of `generate.py "
                             "toy`; use --endpoint URL or --model FOLDER for yours")
        prompt = request.messages[-1]["content"][-1]["text"]
        given = re.search(r"^Given sentiment: (\w+)$", prompt, re.M)
        draw = lambda *key: random.Random(f"{self.seed}|{post.id}|{'|'.join(map(str, key))}")
        rng = draw(bool(given), request.temperature)
        if given:
            others = [x for x in LABELS if x != given[1]]
            label = given[1] if rng.random() > 0.06 else rng.choice(others)
        else:  # unaided: one draw per post, whatever the retry
            wrong = draw("skill")
            truth = toy_label(facts["words"], facts["mood"])
            others = [x for x in LABELS if x != truth]
            label = truth if wrong.random() < self.skill else wrong.choice(others)
        fields = toy_findings(post.aspect, facts["word"], facts["scene"], facts["words"],
                              facts["mood"], label, rng)
        form = rng.random()
        if form < 0.05:
            del fields[rng.choice(FIELDS)]
        text = render_reasoning(fields) if len(fields) == 5 else str(fields)
        if 0.05 <= form < 0.09:
            text = "\n\n".join(f"### {k}\n{v}" for k, v in fields.items())
        elif 0.09 <= form < 0.12:
            text = "```json\n" + json.dumps(fields, indent=1) + "\n```"
        elif 0.12 <= form < 0.18:
            text = "\n".join(f"{k}: {v}" for k, v in fields.items())
        return Answer(text, tokens_in=len(prompt.split()), tokens_out=len(text.split()))


# The embedded default: real Qwen2.5-VL classes, a few hundred thousand parameters. The assistant
# has more output rows than the student, as 7B (152,064) has more than 3B (151,936).
TINY = {"student": dict(hidden=96, layers=2, heads=3, extra_rows=0),
        "assistant": dict(hidden=128, layers=2, heads=4, extra_rows=64)}
TINY_OMNI = {"omni": dict(hidden=96, layers=2, heads=3, extra_rows=0)}  # Qwen2.5-Omni's Thinker


def tiny_tokenizer(corpus, vocab_size=1000, omni=False):
    """A byte-level BPE tokenizer with Qwen2.5-VL's (or Omni's) control tokens and chat template,
    trained on `corpus`."""
    from transformers import Qwen2Tokenizer

    special = [PAD_TOKEN, IM_START, IM_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD,
               VIDEO_PAD]
    template = CHAT_TEMPLATE
    if omni:
        special[3:] = [*OMNI_IMAGE_SEATS, *OMNI_AUDIO_SEATS, "<|VIDEO|>"]
        template = template.replace("".join(IMAGE_SEATS), "".join(OMNI_IMAGE_SEATS) + "{% elif "
                                    "content['type'] == 'audio' %}" + "".join(OMNI_AUDIO_SEATS))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, vocab_size, new_special_tokens=special[1:], show_progress=False)
    tokenizer.chat_template = template
    tokenizer.eos_token, tokenizer.pad_token = IM_END, PAD_TOKEN
    return tokenizer


# Qwen2.5-VL's template for the messages we build (system line, images, text).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_model(folder, size, tokenizer, seed=0, max_pixels=112 * 112):
    """Writes a random Qwen2.5-VL of TINY[size], or the Omni Thinker, as an ordinary model folder
    that from_pretrained reads."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shape, ids = (TINY | TINY_OMNI)[size], tokenizer.convert_tokens_to_ids
    head = shape["hidden"] // shape["heads"]
    rope = dict(rope_type="default", rope_theta=10000.0,
                mrope_section=[head // 2 - 2 * (head // 6), head // 6, head // 6])
    rows = -(-len(tokenizer) // 64) * 64 + shape["extra_rows"]
    # choice: weights of about 1/sqrt(width); the usual 0.02 learns half as fast at this size
    text = dict(vocab_size=rows, hidden_size=shape["hidden"], intermediate_size=3 * shape["hidden"],
                num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
                num_key_value_heads=1, max_position_embeddings=4096, bos_token_id=ids(PAD_TOKEN),
                eos_token_id=ids(IM_END), pad_token_id=ids(PAD_TOKEN), tie_word_embeddings=True,
                rms_norm_eps=1e-6, initializer_range=0.1, rope_parameters=rope)
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2,
                  out_hidden_size=shape["hidden"], fullatt_block_indexes=[1], window_size=112,
                  patch_size=14, spatial_merge_size=2, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if size in TINY_OMNI:
            model, extractor = _tiny_omni(text, vision, ids)
        else:
            extractor, model = None, Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
                text_config=text, vision_config=vision, tie_word_embeddings=True,
                image_token_id=ids(IMAGE_PAD), video_token_id=ids(VIDEO_PAD),
                vision_start_token_id=ids(VISION_START), vision_end_token_id=ids(VISION_END)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(size=dict(shortest_edge=56 * 56, longest_edge=max_pixels))
    images.save_pretrained(folder)
    if extractor:  # Omni keeps both in one file
        write_json(Path(folder, "preprocessor_config.json"), extractor.to_dict() | images.to_dict())


def _tiny_omni(text, vision, ids):
    """A random Thinker of Qwen2.5-Omni with two layers of audio tower, and its extractor."""
    from transformers import (
        Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration,
        WhisperFeatureExtractor)

    audio = dict(num_mel_bins=64, d_model=64, encoder_layers=2, encoder_attention_heads=2,
                 encoder_ffn_dim=128, output_dim=text["hidden_size"], initializer_range=0.1)
    names = zip(("vision_start_token_id", "image_token_index", "vision_end_token_id",
                 "audio_start_token_id", "audio_token_index", "audio_end_token_id"),
                ids([*OMNI_IMAGE_SEATS, *OMNI_AUDIO_SEATS]))
    config = Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=audio, tie_word_embeddings=True,
        video_token_index=ids("<|VIDEO|>"), **dict(names))
    extractor = WhisperFeatureExtractor(feature_size=64, chunk_length=MAX_SECONDS)
    return Qwen2_5OmniThinkerForConditionalGeneration(config), extractor
