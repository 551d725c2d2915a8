"""MulCoT-RD in one file: a large teacher's reasoning chains, distilled into a small vision-language
model that reads a social-media post (text + image), writes a reasoning chain and labels its
sentiment.

The method is arXiv 2508.05234 (teacher -> assistant -> student). Nothing here is a program; the
three scripts beside this file are. Read the sections in order and you follow one post from file to
loss:

  §1 Posts      files -> Post                      §5 LoRA    adapters in PEFT's format; NF4 base
  §2 Prompts    Post -> messages, text -> fields   §6 Model   loading, branches, labels, chains
  §3 Teacher    two-stage chains with retries      §7 Losses  pure functions of tensors and floats
  §4 Tokens     Post -> Example -> Batch           §9 Files   rows, soft labels, fingerprints
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
 6. Soft labels come from the assistant in eval mode, kept as its 64 likeliest tokens plus one bin
    for the rest; the authors run the assistant beside the student, full vocabulary, at every step.
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
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
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
# §1 Posts [needs: hashlib, json, os, re, dataclass, field, Path, Image, ImageOps, LABELS,
#    InputError]
# ================================================================================================

IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
MAX_IMAGE_PIXELS = 50_000_000  # choice: a decompression bomb is an error, not an out-of-memory kill


@dataclass
class Post:
    """One social-media post. `image` is a resolved path inside `folder`, or None for text alone.
    `cot` is a teacher's chain; `extra` holds the columns we do not know, kept as they came."""

    id: str
    text: str
    image: str | None = None
    aspect: str | None = None
    label: str | None = None
    score: float | None = None
    split: str | None = None
    cot: str | None = None
    folder: str | None = None
    extra: dict = field(default_factory=dict)

    def row(self):
        """The post as a JSON row; the image goes back to a name inside its folder."""
        image = os.path.relpath(self.image, os.path.realpath(self.folder)) if self.image else None
        known = dict(id=self.id, text=self.text, image=image, aspect=self.aspect, label=self.label,
                     score=self.score, split=self.split, cot=self.cot)
        return {k: v for k, v in known.items() if v is not None} | self.extra


def safe_path(name, folder):
    """A manifest's image name as a path inside `folder`; anything that leads outside is refused."""
    root = os.path.realpath(folder)
    odd = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) or "\\" in name or "\0" in name
    if odd or os.path.isabs(name):
        raise InputError(f"image {name!r} must be a plain name inside {folder}: no URL, no "
                         "absolute path")
    path = os.path.realpath(os.path.join(root, name))  # trap: a link inside may lead outside
    if ".." in Path(name).parts or os.path.commonpath([root, path]) != root:
        raise InputError(f"image {name!r} leads outside {folder}")
    return path


def load_image(path):
    """RGB image, upright (EXIF), first frame of an animation. Raises InputError with the reason."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise InputError(f"image {path} has {image.width} x {image.height} pixels, the cap "
                                 f"is {MAX_IMAGE_PIXELS:,}: shrink it")
            if max(image.size) > 200 * min(image.size):
                raise InputError(f"image {path} is {image.width} x {image.height}: image "
                                 "processors refuse shapes beyond 200 : 1, crop it")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image {path} is missing: check --images") from None
    except InputError:
        raise
    except Exception as e:  # trap: broken EXIF alone raises struct.error or TypeError in Pillow
        raise InputError(f"image {path} cannot be read ({e}): replace it or drop its row") from None


def read_posts(path, images=None, rejects=None, may_be_empty=False):
    """Posts from a `.jsonl` of rows, the authors' `.json` list, a TomBERT `.tsv`, or an MVSA
    folder as downloaded. `images`: their folder (default: `images/` beside the file, else the
    file's own folder). Bad rows are appended to `rejects` as (where, reason); with rejects=None
    the first raises InputError."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give a .jsonl, .json or .tsv file or an MVSA "
                         "folder")
    if path.is_dir():
        rows, images = _mvsa_rows(path), images or path / "data"
    elif path.suffix in (".jsonl", ".json", ".tsv"):
        rows = {".jsonl": _jsonl_rows, ".json": _json_rows, ".tsv": _tsv_rows}[path.suffix](path)
        beside = path.parent / "images"
        images = images or (beside if beside.is_dir() else path.parent)
    else:
        raise InputError(f"{path}: unknown format {path.suffix!r}: use .jsonl, .json or .tsv")
    posts, seen, good_images = [], set(), set()
    for where, row in rows:
        try:
            if isinstance(row, InputError):
                raise row
            post = _to_post(row, images)
            if post.id in seen:
                raise InputError(f"duplicate id {post.id!r}: ids name posts in every later file")
            if post.image and post.image not in good_images:
                load_image(post.image)  # choice: decode now, so that no run dies on image 9,000
                good_images.add(post.image)
            seen.add(post.id)
            posts.append(post)
        except InputError as e:
            if rejects is None:
                raise InputError(f"{where}: {e}") from None
            rejects.append((where, str(e)))
    if not posts and not may_be_empty:
        why = f"; {len(rejects)} bad rows, first {': '.join(rejects[0])}" if rejects else ""
        raise InputError(f"{path} holds no usable post{why}")
    return posts


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
    if label is not None:
        label = str(label).strip().lower()
        if label not in LABELS:
            raise InputError(f"unknown label {label!r}: use one of {', '.join(LABELS)}")
    name = row.pop("image", None) or row.pop("image_path", None)
    if name is None and row.get("image_id") is not None:  # the authors' rows may name it only so
        name = f"{row['image_id']}.jpg"
    row.pop("image_path", None), row.pop("image_id", None)
    if not (name is None or isinstance(name, str)):
        raise InputError(f"image must be a file name, got {name!r}")
    if row.get("id") is None:
        raise InputError("no id: every row needs one")
    score = row.pop("score", None)
    if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
        raise InputError(f"score must be a number, got {score!r}")
    return Post(id=str(row.pop("id")), text=text.replace("$T$", aspect or "$T$"), aspect=aspect,
                label=label,
                image=safe_path(name, images) if name else None, score=score,
                split=row.pop("split", None),
                cot=row.pop("cot", None), folder=str(images), extra=row)


def _lines(path):
    """(where, text or InputError) per line; a line that is not UTF-8 costs that line only."""
    with open(path, "rb") as f:
        for n, raw in enumerate(f, 1):
            try:
                yield f"{path}:{n}", raw.decode("utf-8-sig" if n == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as e:
                why = f"not UTF-8 (byte {e.start + 1} of the line): re-save it as UTF-8"
                yield f"{path}:{n}", InputError(why)


def _jsonl_rows(path):
    for where, line in _lines(path):
        if isinstance(line, str):
            if not line.strip():
                continue
            try:
                line = json.loads(line)
            except (ValueError, RecursionError) as e:
                line = InputError(f"not a JSON row ({e})")
        yield where, line


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
    for n, (where, line) in enumerate(_lines(path)):
        if n == 0 or line == "":
            continue
        if isinstance(line, str):
            cells = line.split("\t")  # trap: csv would join lines at a stray quote
            if len(cells) != 5 or cells[1] not in ("0", "1", "2"):
                line = InputError(f"expected index, label 0-2, image, text, aspect; got "
                                  f"{len(cells)} cells "
                                  f"and label {cells[1] if len(cells) > 1 else None!r}")
            else:
                line = dict(id=f"{path.stem}-{cells[0]}", label=LABELS[int(cells[1])],
                            image=cells[2],
                            text=cells[3], aspect=cells[4], split=split)
        yield where, line


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
    rows = []
    for where, line in list(_lines(table))[1:]:
        if line == "":
            continue
        if isinstance(line, str):
            cells = line.split("\t")
            pairs = [tuple(c.strip().lower().split(",")) for c in cells[1:]]
            if not pairs or any(len(p) != 2 or not set(p) <= set(LABELS) for p in pairs):
                line = InputError("expected an id and pairs of text,image labels")
            elif (label := mvsa_label(pairs)) is None:
                line = InputError("annotators conflict or have no majority: dropped by the MVSA "
                                  "rule")
            else:
                name = cells[0].strip()
                line = dict(id=name, image=f"{name}.jpg", label=label)
                try:
                    line["text"] = (folder / "data" / f"{name}.txt").read_bytes().decode().strip()
                except FileNotFoundError:
                    line = InputError(f"data/{name}.txt is missing")
                except UnicodeDecodeError:
                    line = InputError(f"data/{name}.txt is not UTF-8: re-save it as UTF-8")
        rows.append((where, line))
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
}
TEACHER_RULES = """
Write two to four full sentences in each analysis. Quote the words and name the parts of the image \
you rely on. \
Give exactly one word as the Prediction and write nothing after it."""
TASKS = ("reason", "label", "predict", "explain")


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
    """OpenAI-style messages. task: "reason" | "label" for the trained models, "predict" |
    "explain" for the teacher's two stages; only "explain" takes (and needs) the gold label. paper:
    stage 1 / stage 2."""
    assert task in TASKS and (gold in LABELS) == (task == "explain"), (task, gold)
    image = [{"type": "image", "image": post.image}] if post.image else []
    text = post_prompt(post, task, gold) + task_format(task)
    return [{"role": "user", "content": image + [{"type": "text", "text": text}]}]


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


# ================================================================================================
# §3 Teacher [needs: base64, hashlib, io, os, random, re, threading, time, Counter, dataclass,
#    parsedate_to_datetime, Path, requests, Image, InputError, §1, §2]
# ================================================================================================


@dataclass
class Request:
    """One question to a teacher: the post (for teachers that hold the picture themselves), the
    messages, and what a retry changes."""

    post: Post
    messages: list
    temperature: float
    max_tokens: int


@dataclass
class Answer:
    """What came back. `finish` is "stop" or "length" (truncated); tokens as the teacher counts
    them."""

    text: str
    finish: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0


def two_stage_cot(post, max_tries=3, max_tokens=512, stage2=True):
    """The teacher's two stages with an adaptive retry controller (ARC), as a generator: it yields
    a Request, is sent the Answer, and returns a row of `cot` (or None), `stage`, `tries`,
    `problem`, `attempts`, tokens.

    paper: stage 1 asks without the label and is kept if right; stage 2 gets the label and explains
    it; ARC repeats what is incomplete. choice: a retry raises the temperature (0, 0.4, 0.8 …), or
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
        host = requests.utils.urlparse(url).hostname or ""
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
        401, 403, 404 InputError, the rest Refused; after the last retry Unreachable."""
        messages = [dict(m, content=[_wire(p) for p in m["content"]]) for m in request.messages]
        body = dict(model=self.model, messages=messages, temperature=request.temperature,
                    max_tokens=request.max_tokens)
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
        final = reply.status_code in (401, 403, 404) or reply.status_code < 400
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
    return Answer(content, choice.get("finish_reason") or "stop", usage.get("prompt_tokens") or 0,
                  usage.get("completion_tokens") or 0)


def _wire(part):
    """A content part as it goes over the wire: images become data URLs."""
    if part["type"] != "image":
        return part
    return {"type": "image_url", "image_url": {"url": data_url(part["image"])}}


def data_url(path, max_side=1120):
    """The image as a data URL: upright, its longer side at most max_side, without metadata (GPS!).
    A JPEG or PNG that is all that already goes as it is, anything else is written anew as JPEG."""
    image, harmless = load_image(path), {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi"}
    with Image.open(path) as file:
        kind, clean = file.format, set(file.info) <= harmless and not file.getexif()
    if kind in ("JPEG", "PNG") and clean and max(image.size) <= max_side:
        data = Path(path).read_bytes()
    else:
        image.thumbnail((max_side, max_side))
        buffer, kind = io.BytesIO(), "JPEG"
        image.save(buffer, kind, quality=92)
        data = buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


# ================================================================================================
# §4 Tokens [needs: OrderedDict, dataclass, torch, §1, §2]
# ================================================================================================

IM_START, IM_END, PAD_TOKEN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_PAD, IMAGE_PAD, VIDEO_PAD = "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"
SYSTEM = "You are a helpful assistant."  # what Qwen2.5-VL's own chat template puts first


class Processor:
    """Tokenizer and PIL image processor of a model folder, with the few ids we place ourselves.
    (AutoProcessor would need torchvision.) Pixels of the last images are kept, up to `cache_mb`."""

    def __init__(self, tokenizer, image_processor, cache_mb=256):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        ids = tokenizer.convert_tokens_to_ids
        self.im_end, self.pad, self.image_pad = ids(IM_END), ids(PAD_TOKEN), ids(IMAGE_PAD)
        self.merge = image_processor.merge_size
        self._pixels, self._room, self._template = OrderedDict(), cache_mb * 2**20, {}

    def text_ids(self, text):
        """Ids of plain text. trap: a tweet may hold <|im_end|>; user text never becomes a control
        token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def template_ids(self, text):
        """Ids of our own template text, control tokens included. Never give it user text. Kept:
        the few pieces recur in every example."""
        if text not in self._template:
            self._template[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._template[text]

    def image(self, path):
        """Patches (n, 1176) and grid (3,) of an image file; identical files are processed once."""
        if path not in self._pixels:
            out = self.image_processor(images=[load_image(path)], return_tensors="pt")
            self._pixels[path] = out["pixel_values"], out["image_grid_thw"][0]
            self._room -= out["pixel_values"].nbytes
            while self._room < 0 and len(self._pixels) > 1:
                self._room += self._pixels.popitem(last=False)[1][0].nbytes
        self._pixels.move_to_end(path)
        return self._pixels[path]


@dataclass
class Example:
    """Token ids of one post. `prefix` (P,) and its 3-D positions (3, P); per branch the ids of
    prompt and answer, and how many of them (from the end) are supervised answer tokens."""

    prefix: list
    positions: torch.Tensor
    branches: list  # of (ids, number of answer tokens)
    pixels: torch.Tensor | None
    grid: torch.Tensor | None

    def __len__(self):
        return len(self.prefix) + sum(len(ids) for ids, _ in self.branches)


def encode(post, branches, processor, prompt=None):
    """One post and its branches [(prompt text, answer text or None), …] -> Example. `prompt`: the
    shared text before the branches (default `post_prompt(post)`). Ids equal those of the model's
    chat template. trap: train on <|im_end|> and mask by length; with pad == eos a model never
    learns to stop."""
    p, image, grid, pixels = processor, [], None, None
    if post.image:
        pixels, grid = p.image(post.image)
        slots = int(grid.prod()) // p.merge**2
        image = p.template_ids(VISION_START) + [p.image_pad] * slots + p.template_ids(VISION_END)
    head = p.template_ids(f"{IM_START}system\n{SYSTEM}{IM_END}\n{IM_START}user\n")
    prefix = head + image + p.text_ids(prompt if prompt is not None else post_prompt(post))
    ready = p.template_ids(f"{IM_END}\n{IM_START}assistant\n")
    tails = []
    for question, answer in branches:
        answer_ids = [] if answer is None else p.text_ids(answer) + [p.im_end]
        tails.append((p.text_ids(question) + ready + answer_ids, len(answer_ids)))
    return Example(prefix, rope_positions(prefix, p.image_pad, [grid] if image else [], p.merge),
                   tails, pixels, grid)


def rope_positions(ids, image_pad, grids, merge):
    """Qwen-VL's 3-D (time, height, width) positions (3, T): text counts up on all three axes; an
    image spans a grid and text goes on after its longer side. trap: without these (or
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
    pixels: torch.Tensor | None  # (patches of all rows, 1176)
    grid: torch.Tensor | None  # (images, 3)

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
    images = [e for _, e, _ in rows if e.pixels is not None]
    pixels = torch.cat([e.pixels for e in images]) if images else None
    grid = torch.stack([e.grid for e in images]) if images else None
    example = torch.tensor([n for n, _, _ in rows])
    return Batch(ids, position_ids, branch, targets, example, pixels, grid)


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
    green, plain, lines, last = "\033[32m", "\033[0m", [], None
    pads = 0
    for t, (i, k) in enumerate(zip(batch.ids[row].tolist(), batch.branch[row].tolist())):
        if k != last:
            name = {0: "prefix", -1: "padding"}.get(k, f"branch {k}")
            lines.append(f"\n{plain}---- {name} ----\n")
        supervised = t > 0 and k == last and batch.targets[row, t - 1] != -100
        piece = tokenizer.decode([i])
        if i == tokenizer.convert_tokens_to_ids(IMAGE_PAD):
            pads, piece = pads + 1, "" if pads > 1 else IMAGE_PAD + "…"
        lines.append((green if supervised else plain) + piece)
        last = k
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
    for part in weight.detach().flatten().split(SLICES.get(weight.device.type, 2**24)):
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
    size, pairs = SLICES.get(codes.device.type, 2**24), NF4_PAIRS.to(codes.device)
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
        return _NF4Matmul.apply(x, self)


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
        return y + self.scale * F.linear(low, self.lora_B).to(y.dtype)


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
    os.makedirs(folder, exist_ok=True)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=one.rank, lora_alpha=one.alpha,
                  lora_dropout=one.dropout.p, bias="none", target_modules=sorted(layers),
                  base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
                  inference_mode=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_tensors(model).items()}
    write_atomic(os.path.join(folder, "adapter_model.safetensors"),
                 lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomic(os.path.join(folder, "adapter_config.json"),
                 lambda path: Path(path).write_text(json.dumps(config, indent=1)))
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
# §6 Model [needs: json, os, re, Path, torch, SafetensorError, safe_open, LABELS, InputError, §2,
#    §4, §5]
# ================================================================================================

def load_model(name, device="cpu", dtype=None, max_pixels=None, nf4=None):
    """(model in eval mode, Processor) from a hub name, a model folder or an adapter folder (whose
    base is read first). dtype: default float32 on CPU, bfloat16 on GPU; max_pixels: image cap;
    nf4: the language model's linears in 4 bits, by default as the adapter was trained."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this torch sees no GPU; use cpu")
    base, processor = base_of(name), load_processor(name, max_pixels)
    dtype = dtype or (torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    try:
        if nf4 is None:
            nf4 = base != str(name) and adapter_nf4(name)
        if nf4:
            model, missing = _load_nf4(AutoModelForImageTextToText, base, device, dtype)
        else:
            model, report = AutoModelForImageTextToText.from_pretrained(
                base, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
            missing = report["missing_keys"]
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(f"model {base!r} cannot be loaded: {str(e).splitlines()[0]}") from None
    if missing:  # trap: saved with LoRA wrappers it reloads with random layers
        raise InputError(f"model {base!r} lacks {len(missing)} weights, first {min(missing)}: was "
                         "it saved before merge_lora?")
    if base != str(name):
        load_adapter(model, name)
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
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.from_pretrained(base), dtype=dtype,
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
    from transformers import AutoImageProcessor, AutoTokenizer

    base = base_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        trained = Path(name, "preprocessor_config.json").exists()  # the image size of training
        images = AutoImageProcessor.from_pretrained(name if trained else base, backend="pil")
    except (OSError, ValueError) as e:
        raise InputError(f"model {base!r} cannot be loaded: {str(e).splitlines()[0]}") from None
    if max_pixels:
        images.size = dict(shortest_edge=min(56 * 56, max_pixels), longest_edge=max_pixels)
    return Processor(tokenizer, images)


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


def forward_branches(model, batch):
    """Hidden states (B, T, D) of the last layer: one vision pass and one language pass for all
    branches. The logits are left to the caller, who needs them at few positions."""
    core = model.model
    if "flash" in (model.config._attn_implementation or ""):
        raise InputError("flash attention cannot take the branch mask: load the model with sdpa "
                         "or eager")
    embeds = core.get_input_embeddings()(batch.ids)  # (B, T, D)
    if batch.pixels is not None:
        parts = core.get_image_features(batch.pixels.to(embeds.dtype), batch.grid).pooler_output
        seats = batch.ids == model.config.image_token_id
        embeds = embeds.masked_scatter(seats[..., None], torch.cat(list(parts)).to(embeds.dtype))
    out = core.language_model(inputs_embeds=embeds, position_ids=batch.position_ids,
                              use_cache=False,
                              attention_mask=branch_mask(batch.branch, embeds.dtype))
    return out.last_hidden_state


@torch.no_grad()
def score_labels(model, batch):
    """Log-probabilities (B, 3) in the order of LABELS, normalised over the three, from a batch
    whose examples were encoded with `label_branches()`. One forward pass, exact, never
    unparsed."""
    hidden = forward_branches(model, batch)
    at = batch.targets != -100
    logits = model.lm_head(hidden[at]).float()  # (N, V)
    token = logits.log_softmax(-1).gather(1, batch.targets[at][:, None])[:, 0]  # (N,)
    row = torch.arange(len(batch.ids), device=at.device)[:, None].expand_as(at)[at]
    scores = token.new_zeros(int(batch.example.max()) + 1, len(LABELS))
    scores.index_put_((batch.example[row], batch.branch[at] - 1), token, accumulate=True)
    return scores.log_softmax(-1)


def label_branches():
    """The label prompt with each of the three answers."""
    return [(task_format("label"), render_label(label)) for label in LABELS]


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
    """Answers [(text, finish), …] to examples that have one branch without an answer each, in one
    batch with left padding. finish is "stop" or "length". Greedy at temperature 0. trap: Qwen
    ships sampling defaults; greedy and penalties are given explicitly. Vision ids never come
    out."""
    rows = [e.prefix + e.branches[0][0] for e in examples]
    T, device = max(map(len, rows)), model.device
    ids = torch.tensor([[processor.pad] * (T - len(r)) + r for r in rows], device=device)  # (B, T)
    real = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows], device=device)
    images = [e for e in examples if e.pixels is not None]
    extra = {}
    if images:
        extra = dict(pixel_values=torch.cat([e.pixels for e in images]).to(device, model.dtype),
                     image_grid_thw=torch.stack([e.grid for e in images]).to(device),
                     mm_token_type_ids=(ids == processor.image_pad).int())
    sampling = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if temperature:
        sampling = dict(do_sample=True, temperature=temperature, top_p=1.0, top_k=0)
    never = [VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD]
    never = processor.tokenizer.convert_tokens_to_ids(never)
    out = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=max_new_tokens,
                         eos_token_id=[processor.im_end, processor.pad],
                         pad_token_id=processor.pad, repetition_penalty=1.0, use_cache=True,
                         suppress_tokens=never, **sampling, **extra)[:, T:]  # (B, new)
    answers = []
    for row in out.tolist():
        stops = [i for i, t in enumerate(row) if t in (processor.im_end, processor.pad)]
        text = processor.tokenizer.decode(row[: stops[0]] if stops else row)
        answers.append((text, "stop" if stops else "length"))
    return answers


# ================================================================================================
# §7 Losses [needs: torch, F]
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
    """KL (N,) between soft labels as `top_k_soft` keeps them and the student, over the same K + 1
    bins; equals distill_kl per position when K = V. The student's logits must be cut to the soft
    labels' vocabulary."""
    ids, log_p, tail_p = soft
    log_q = (student_logits.float() / temperature).log_softmax(-1)  # (N, V)
    tail_q = log_q.scatter(1, ids, -torch.inf).logsumexp(-1)  # (N,)
    kl = (log_p.exp() * (log_p - log_q.gather(1, ids))).sum(-1)
    whole = torch.isinf(tail_p) | torch.isinf(tail_q)  # K = V: there is no rest
    zero = torch.zeros_like(tail_p)
    return kl + torch.where(whole, zero, tail_p.exp() * (tail_p - torch.where(whole, zero, tail_q)))


def dense_ce_kl(hidden, weight, targets, weights=None, soft=None, lam=0.0, temperature=2.0,
                kl_weights=None, vocab=None):
    """Σ_n w_n [(1 - λ) CE_n + λ KL_n] over the supervised positions -> (loss, {"ce", "kl"}
    detached sums).

    hidden (N, D), output weight (V, D), targets (N,); weights (N,) default 1/N; soft as from
    `top_k_soft`, whose ids lie below `vocab`; kl_weights (N,) default `weights` (they differ with
    τ² and with positions "all"). The readable form: it holds the (N, V) logits of the positions it
    is given, and no others."""
    N = len(targets)
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()  # (N, V)
    weights = torch.full((N,), 1 / max(N, 1), device=hidden.device) if weights is None else weights
    ce = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
    if soft is None or lam == 0.0:
        return ce, {"ce": ce.detach(), "kl": torch.zeros_like(ce)}
    kl_weights = weights if kl_weights is None else kl_weights
    kl = (kl_weights * soft_kl(logits[:, :vocab], soft, temperature)).sum()
    return student_loss(ce, kl, lam), {"ce": ce.detach(), "kl": kl.detach()}


# ================================================================================================
# §9 Files and command lines [needs: argparse, errno, hashlib, json, os, random, sys, Path, torch,
#    safe_open, save_file, InputError]
# ================================================================================================


def write_atomic(path, write):
    """`write(temporary path)` in the same folder, fsync, then rename: the file is whole or not
    there."""
    path = str(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = path + ".part"
    write(part)
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


def seed_everything(seed):
    """Python's and torch's random numbers."""
    random.seed(seed)
    torch.manual_seed(seed)


def digest(*parts):
    """A short hex name of strings, bytes, numbers, lists and tensors."""
    h = hashlib.sha256()
    for part in parts:
        if torch.is_tensor(part):
            part = part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        h.update(part if isinstance(part, bytes) else repr(part).encode())
        h.update(b"|")
    return h.hexdigest()[:24]


def fingerprint(model, tokenizer):
    """Names a model with its adapter and tokenizer: every tensor's name, shape and 256 values
    spread over it, and the vocabulary. Seconds even for 7B; another training run gives another
    name."""
    h = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        flat = t.reshape(-1)
        step = max(1, flat.numel() // 256)
        h.update(f"{name}{tuple(t.shape)}".encode())
        h.update(flat[::step][:257].float().cpu().numpy().tobytes())
    return h.hexdigest()[:24], tokenizer_hash(tokenizer)


def tokenizer_hash(tokenizer):
    """Names a vocabulary. trap: between different tokenizers equal-looking ids give silent
    nonsense."""
    return digest(sorted(tokenizer.get_vocab().items()))


def check_settings(file, settings, begun):
    """Writes what a stage was started with; a rerun onto what others began is refused, since rows
    and weights of two settings would mix. `begun`: whether there is something to go on with."""
    settings = json.loads(json.dumps(settings))
    if begun and os.path.exists(file):
        was = json.loads(Path(file).read_text())
        for k in settings:
            if was.get(k) != settings[k]:
                raise InputError(f"{file}: this --out was begun with {k} = {was.get(k)!r}, not "
                                 f"{settings[k]!r}: delete it or choose another --out")
    write_json(file, settings)


class SoftLabels:
    """The assistant's distributions at the supervised positions, in `folder`: `soft.json` says
    what they are valid for, `part-*.safetensors` hold them, each written atomically. An entry is
    one branch of one post, named by a hash of its token ids, its prefix and its image, so that a
    stale or foreign one is not found. Cost per position: K x (4-byte id + 2-byte log-probability)
    + 4 bytes for the rest."""

    def __init__(self, folder, about=None):
        """about: what to write these for (a dict); None opens them for reading."""
        self.folder, self.index, self.open_files = str(folder), {}, {}
        header = Path(folder, "soft.json")
        if about is not None:
            if not header.exists():
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
        for part in sorted(Path(folder).glob("part-*.safetensors")):
            with safe_open(part, "pt") as f:
                for name, (start, end) in json.loads(f.metadata()["entries"]).items():
                    self.index[name] = (part, start, end)

    @staticmethod
    def names(example):
        """The entry names of an example: its prefix's, then one per branch."""
        prefix = digest(example.prefix, b"" if example.pixels is None else example.pixels)
        return [prefix] + [digest(prefix, ids, n) for ids, n in example.branches]

    def write_part(self, entries):
        """entries: {name: (ids (n, K), log-probabilities (n, K), tail (n,))} -> one more file."""
        parts = len(list(Path(self.folder).glob("part-*.safetensors")))
        part = Path(self.folder, f"part-{parts:05d}.safetensors")
        spans, at = {}, 0
        for name, (ids, _, _) in entries.items():
            spans[name] = (at, at + len(ids))
            at += len(ids)
        tensors = dict(ids=torch.cat([e[0] for e in entries.values()]).int(),
                       log_p=torch.cat([e[1] for e in entries.values()]).half(),
                       tail=torch.cat([e[2] for e in entries.values()]).float())
        write_atomic(part, lambda path: save_file(tensors, path,
                                                  metadata={"entries": json.dumps(spans)}))
        self.index.update({name: (part, *span) for name, span in spans.items()})

    def read(self, name):
        """(ids (n, K), log-probabilities (n, K), tail (n,)) of one entry."""
        if name not in self.index:
            raise InputError(f"{self.folder} has no soft labels for this post, prompt and image: "
                             "rerun generate.py soft with the same --data, chains and model "
                             "sizes, or train with --no-soft")
        part, start, end = self.index[name]
        if part not in self.open_files:
            self.open_files[part] = safe_open(part, "pt")
        f = self.open_files[part]
        ids, log_p, tail = (f.get_slice(k)[start:end] for k in ("ids", "log_p", "tail"))
        return ids.long(), log_p.float(), tail


def tell_aside(aside, what):
    """Prints the first of the rows that were set aside [(where, why)], and how many there are."""
    for where, why in aside[:5]:
        print(f"set aside  {where}: {why}")
    if aside:
        print(f"set aside  {len(aside)} {what}")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help text where there is one worth telling."""

    def _get_help_string(self, action):
        if action.default in (None, False, 0):
            return action.help
        return super()._get_help_string(action)


def positive(text):
    """An argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def run_stage(stage, args):
    """Runs stage(args) and returns the exit code: a user's mistake or a full disk is one line and
    2, Ctrl-C says how to go on and is 130."""
    try:
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
# §10 The embedded default [needs: json, os, random, re, torch, Image, ImageDraw, LABELS,
#    InputError, §1, §2, §3, §4]
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


def toy_posts(folder, sizes, seed=0):
    """Writes drawn 56 x 56 images into `folder` and returns posts; `sizes`: {"train": 700, "dev":
    60, …}. `extra["facts"]` keeps what was drawn, for the toy teacher. In the test split every
    (word, aspect) pair and half the sentence templates are ones that no other split shows."""
    rng, posts = random.Random(seed), []
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
            posts.append(Post(f"{split}-{i:04d}", text, safe_path(name, folder), aspect,
                              toy_label(words, mood), split=split, folder=str(folder),
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


def tiny_tokenizer(corpus, vocab_size=1000):
    """A byte-level BPE tokenizer with Qwen's control tokens and chat template, trained on
    `corpus`."""
    from transformers import Qwen2Tokenizer

    special = [PAD_TOKEN, IM_START, IM_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD,
               VIDEO_PAD]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, vocab_size, new_special_tokens=special[1:], show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
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
    """Writes a random Qwen2.5-VL of TINY[size] as an ordinary model folder that from_pretrained
    reads."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shape, ids = TINY[size], tokenizer.convert_tokens_to_ids
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
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True,
                              image_token_id=ids(IMAGE_PAD), video_token_id=ids(VIDEO_PAD),
                              vision_start_token_id=ids(VISION_START),
                              vision_end_token_id=ids(VISION_END))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size=dict(shortest_edge=56 * 56,
                                       longest_edge=max_pixels)).save_pretrained(folder)
