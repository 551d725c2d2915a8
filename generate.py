"""Write what models say: a teacher's chains, soft labels, predictions, a cascade's answers.

    python generate.py teacher --data train.tsv --images img --model gpt-4o-mini \\
        --endpoint https://api.openai.com/v1 --out chains.jsonl
    python generate.py augment --data train.tsv --images img --model runs/assistant/best \\
        --out augmented.jsonl
    python generate.py soft --data chains.jsonl augmented.jsonl --images img \\
        --model runs/assistant/best --out soft
    python generate.py predict --data test.tsv --images img --model runs/student/best \\
        --out predictions.jsonl
    python generate.py predict --model runs/student/best --image x.jpg --text "what a day"
    python generate.py predict --data test.tsv --images img --model qwen2.5-vl-72b-instruct \\
        --endpoint http://localhost:8000/v1 --out zero_shot.jsonl
    python generate.py cascade --ubm runs/ubm --mllm runs/student/best --data test.tsv \\
        --dev dev.tsv --images img --out cascade.jsonl
    python generate.py export --model runs/student/best --out models/student

Last line: `wrote 300 rows to predictions.jsonl (0 set aside)`, of soft and export what is in the
folder. Reads posts (.jsonl, the authors' .json, TomBERT .tsv, MMSA's .csv). Appends rows to --out
(cascade writes it anew), bad ones to NAME.rejects.jsonl. Killed and run again with the same command
it skips what is done and ends with the same rows, but for their `seconds`.
"""

import argparse
import base64
import itertools
import json
import math
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import requests
import torch

from mulcot import (
    FORMATS, LABELS, LABEL_FORMAT, REASON_FORMAT, SCORE_BINS, UBM, Answer, Help, InputError,
    Refused, Request, SoftLabels, Verdict, barrier, base_of, build_messages, cascade_route,
    chain_row, check_answer, check_at_least, check_settings, chunks, collate, count_parameters,
    data_url, default_dtype, digest, encode, encode_batch, explaining, flag_groups,
    forward_branches, gather, generate_text, get_rank, get_world_size, init_distributed,
    label_branches, load_trained, mark_aspect, merge_lora, new_ubm, parse_reasoning, parse_score,
    post_prompt, predict, progress, read_dev_posts, read_json, read_out, read_posts, read_rows,
    read_tensors, render_reasoning, report_rejects, row_line, row_text, run_info, run_stage, say,
    score_labels, score_verdict, select_split, settings_file, settings_of, sibling, to_json,
    to_post, tokenizer_hash, training_branches, training_items, two_stage_cot, uncertainty,
    write_json, write_rows)

YES_NO = argparse.BooleanOptionalAction  # --flag and --no-flag


# ---- the command line --------------------------------------------------------------------------

STAGES = {
    "teacher": "two-stage chains: predict; keep if right, else explain the label",
    "augment": "one more chain per training post by the assistant, kept if right",
    "soft": "what the student imitates: the assistant's last hidden states at every answer token",
    "predict": "label by the label prompt, chain by the reason prompt",
    "cascade": "a small model first, the MLLM only where that one is unsure",
    "export": "base and adapter as one ordinary model folder, to serve or to load anywhere"}


def parse_args(argv=None):
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                  epilog="`generate.py STAGE --help` lists a stage's flags.")
    stages = top.add_subparsers(dest="stage", required=True)
    for stage, about in STAGES.items():
        p = stages.add_parser(stage, help=about, description=about, formatter_class=Help)
        groups = flag_groups(p, __doc__)
        shared_flags(groups, stage)
        own_flags(groups, stage)
        if stage in ("teacher", "predict", "cascade"):
            endpoint_flags(p.add_argument_group("endpoint").add_argument, stage)
    args = top.parse_args(argv)
    p = stages.choices[args.stage]
    check_at_least(p, args, 1, "batch", "workers", "max_tries")
    check_at_least(p, args, 0, "max_pixels", "max_posts", "budget_tokens", "temperature")
    if args.stage == "cascade":
        args.model, args.budget_tokens, args.max_posts = args.mllm or args.model, 0, 0
        if bool(args.mllm) == bool(args.endpoint) or not args.model:
            p.error("cascade needs --mllm FOLDER, or --endpoint URL with --model NAME")
    if args.stage == "predict" and not (args.data and args.out):
        if not args.text or args.endpoint:
            p.error("needs --data and --out; or, without --endpoint, one post: --text, --image, …")
    if not getattr(args, "endpoint", None):
        for name in ("max_posts", "budget_tokens"):
            if vars(args).get(name):
                p.error(f"--{name.replace('_', '-')} is for --endpoint alone")
    if args.stage != "export":  # settings.json shall hold it, or a rerun could go on in another
        args.dtype = args.dtype or default_dtype(args.device)
    args.run = run_info("generate.py", argv)
    return args


def shared_flags(groups, stage):
    """Of every stage."""
    flag = groups["model"]
    flag("--model", required=stage != "cascade",
         help="hub name, model or adapter folder; with --endpoint the model's name there")
    flag("--dtype", choices=("float32", "bfloat16"), help="of the model (default: bfloat16 on GPU, "
         "float32 on CPU; of export the base's own)")
    flag = groups["run"]
    flag("--out", required=stage != "predict", help="rows (.jsonl); of soft and export a folder")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1 …")
    if stage == "export":
        return
    flag("--seed", type=int, default=42, help="of all that is drawn or sampled")
    flag("--batch", type=int, default=64, help="posts at once (release: 16 to 24)")
    groups["model"]("--nf4", action=YES_NO, help="4-bit base (default: as its adapter was trained)")
    flag = groups["data"]
    flag("--data", nargs="+", required=stage != "predict", metavar="POSTS",
         help=".jsonl, .json, .tsv or .csv")
    flag("--images", help="images folder (default: images/ beside the posts, else theirs)")
    flag("--max-pixels", type=int, default=0,
         help="image size cap, 0: the model's own (78400: at most the release's 100 tokens)")
    if stage != "soft":
        flag("--split", default=None if stage in ("predict", "cascade") else "train",
             help="which posts, or all (default: train; of predict and cascade test if there is "
                  "one, else all)")


def json_object(text):
    """The object that a flag gives as JSON."""
    return {} | json.loads(text)


def endpoint_flags(flag, stage):
    """How to reach an endpoint."""
    flag("--endpoint", help="OpenAI-compatible base URL ending in /v1; key from OPENAI_API_KEY")
    flag("--allow-http", action="store_true", help="plain http to another machine")
    flag("--extra-body", type=json_object, default={}, metavar="JSON", help="merged "
         'into each request, null removes a key; reasoning models: {"max_tokens": null, '
         '"max_completion_tokens": 4096, "temperature": null}')
    flag("--workers", type=int, default=8, help="calls at once")
    flag("--timeout", type=float, default=120.0, help="seconds without a byte")
    flag("--proxy", help="URL of a proxy (those of the environment are not used)")
    if stage != "cascade":  # which needs an answer to every question
        flag("--budget-tokens", type=int, default=0,
             help="cap on the tokens of all runs onto this --out, 0: none")
        flag("--max-posts", type=int, default=0, help="posts of this run, 0: all")


def own_flags(groups, stage):
    """Of one stage."""
    data, model, flag, run = groups.values()
    if stage in ("teacher", "augment", "predict"):
        flag("--max-new-tokens", type=int, default=512, help="of a chain (paper: 512)")
    if stage == "teacher":
        flag("--max-tries", type=int, default=3, help="answers to each of its two prompts (ARC)")
        flag("--stage2", action=YES_NO, default=True, help="--no-stage2: unaided chains only")
        data("--allow-test", action="store_true",
             help="let --split send posts of split test, with labels")
        run("--dry-run", action="store_true", help="print the prompts and an estimate, send none")
    elif stage == "augment":
        flag("--temperature", type=float, default=0.7, help="of sampling")
    elif stage == "soft":
        flag("--max-answer", type=int, default=512, help="longest chain in tokens, as in training")
    elif stage == "predict":
        flag("--decode", choices=("score", "greedy"), default="score",
             help="label by scoring the answers, or generated (theirs, and of --endpoint)")
        flag("--chain", action=YES_NO, default=True, help="--no-chain writes labels only")
        data("--shuffle-images", action="store_true", help="control: deal the images out anew")
        data("--blank-text", action="store_true", help="control: take the words away")
        data("--text", help="one post instead of --data: its text")
        data("--image", help="one post: its image")
        data("--aspect", help="one post: its target aspect")
        data("--frames", help="one clip: the folder of its frames")
        data("--audio", help="one clip: its voice (.wav)")
    elif stage == "cascade":
        model("--ubm", required=True, help="folder of train.py ubm")
        model("--mllm", help="the MLLM: model or adapter folder; or --endpoint and --model")
        data("--dev", required=True, help="posts to fit the thresholds on (split dev, if given)")
        flag("--logprobs", action=YES_NO, default=True, help="--endpoint: ask for them")
        flag("--budget", type=float, default=0.4, help="MLLM passes per post, at most, on dev")


# ---- shared by the stages ----------------------------------------------------------------------


def load(args):
    """(model, Processor) of --model."""
    return load_trained(args.model, args.device, args.dtype, args.max_pixels, args.nf4)


def select_posts(args, labelled=False):
    """(posts of --data and --split, unreadable rows); says how many are left out, for another split
    or, if they must be `labelled`, for want of a label."""
    rejects, everyone = [], []
    for path in args.data:
        if os.path.realpath(path) == os.path.realpath(args.out):
            raise InputError(f"--out {args.out} is one of the --data files: choose another")
        everyone += read_posts(path, args.images, rejects)
    report_rejects(rejects, "unreadable rows")
    if args.split is None:  # predict and cascade answer what eval.py will judge
        args.split = "test" if any(post.split == "test" for post in everyone) else "all"
    posts = select_split(everyone, args.split)
    commonest, n = Counter(post.id for post in everyone).most_common(1)[0]
    if n > 1:
        raise InputError(f"id {commonest!r} occurs in two --data files: ids name posts later on")
    if len(posts) < len(everyone):
        print(f"left out   {len(everyone) - len(posts)} posts that are not of split {args.split}; "
              "--split all takes them too")
    unlabelled = [post for post in posts if labelled and not post.label]
    if unlabelled:
        print(f"left out   {len(unlabelled)} posts without a label")
        posts = [post for post in posts if post.label]
    if not posts:
        raise InputError(f"{', '.join(args.data)}: no post of split {args.split!r} that the "
                         f"{args.stage} stage can use")
    return posts, rejects


def refuse_ranks(what):
    """Raises InputError under torchrun with more than one process."""
    if get_world_size() > 1:
        raise InputError(f"{what} needs one process: run it without torchrun")


class RowWriter:
    """Appends rows to a .jsonl, one whole line per call, flushed. Opening it cuts off a torn last
    line (the mark of a killed run), so that `done` (the rows' values of `key`) holds just what is
    safe to skip."""

    def __init__(self, path, key="id"):
        self.path, self.key = str(path), key
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self.file = open(self.path, "ab")
        torn = Path(path).read_bytes().rpartition(b"\n")[2]
        self.file.truncate(self.file.tell() - len(torn))
        self.done = {str(row[key]) for row in read_rows(path) if key in row}

    def write(self, row):
        self.file.write(row_line(self.path, row).encode("utf-8", "replace"))
        self.file.flush()
        self.done.add(row.get(self.key))


def fingerprint(model):
    """Names a model with its adapter: every tensor's name, shape and 256 values spread over it.
    Seconds even for 7B; another training run gives another name."""
    parts = []
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.reshape(-1)
        sample = flat[:: flat.numel() // 256 + 1].float()
        parts += [name, tuple(tensor.shape), sample]
    return digest(*parts)


# flags that a rerun onto the same --out may change: more posts, the way to a server, when to stop;
# device and batch, which change rounding and draws alone; --dev and --budget of a cascade, whose
# rows are written anew
MAY_CHANGE = ("run", "out", "device", "data", "dev", "images", "split", "batch", "endpoint",
              "allow_http", "workers", "timeout", "proxy", "budget", "budget_tokens", "max_posts",
              "allow_test", "dry_run", "text", "image", "aspect", "frames", "audio")


class Output:
    """The rows of a stage in --out, those set aside in NAME.rejects.jsonl. Only the first process
    writes. `model`: who answers, if it is at hand.

    After a kill, posts whose id is in neither file are answered again; `done` holds the ids in the
    files, a torn last line counts as not written. --out may not go on with other settings or
    another model."""

    def __init__(self, args, rejects, model=None):
        self.path, self.rejected, done = args.out, sibling(args.out, "rejects.jsonl"), set()
        if get_rank() == 0:
            settings = settings_of(args, MAY_CHANGE)
            if model is not None:
                settings["weights"] = fingerprint(model)
            files = [file for file in (self.path, self.rejected) if os.path.exists(file)]
            # begun: --out exists, and it or its rejects hold a row (a run creates both empty)
            begun = self.path in files and any(map(os.path.getsize, files))
            check_settings(sibling(args.out, "settings.json"), settings, begun, run=args.run)
            if not begun:  # --out was deleted: what an earlier run set aside is not done
                Path(self.rejected).unlink(missing_ok=True)
            self.kept, self.aside = RowWriter(self.path), RowWriter(self.rejected)
            done = self.kept.done | self.aside.done
            # rows of --data that cannot be read: an earlier run's may be repaired by now
            before = read_rows(self.rejected)
            unread = [dict(where=where, problem=problem) for where, problem in rejects]
            now = unread + [row for row in before if "where" not in row]
            if now != before:
                write_rows(self.rejected, now)
                self.aside = RowWriter(self.rejected)
        self.done = gather(done)[0]

    def write(self, row, keep=True):
        if get_rank() == 0:
            (self.kept if keep else self.aside).write(row)

    def print_summary(self):
        """The last line: rows written and set aside, counted in the files."""
        if get_rank() > 0:  # trap: the first process may still be writing
            return
        rows, aside = len(read_rows(self.path)), len(read_rows(self.rejected))
        print(f"wrote {rows} rows to {self.path} ({aside} set aside)")


def in_batches(args, posts, done, respond):
    """Yields (post, result) for each post not done: the dict that respond(batch, number of the
    batch) has for it, with `seconds`, the batch's mean. Under torchrun each process answers some of
    the batches. Their make-up depends on all posts, not on what is left, so that a resumed or
    divided run pads, samples and rounds as an unbroken one."""
    # like lengths together; a post's own chain, if it has one, tells how long the new one will be
    order = sorted(posts, key=lambda post: len(post.cot or post.text))
    batches = chunks(order, args.batch)
    bar = progress(len(posts), args.stage, "post")
    for first in range(0, len(batches), get_world_size()):
        n = first + get_rank()
        batch = batches[n] if n < len(batches) else []
        answered, began = [], time.time()
        if any(post.id not in done for post in batch):  # the whole batch, so that it pads as before
            answered = list(zip(batch, respond(batch, n), strict=True))
        for _, result in answered:
            result["seconds"] = round((time.time() - began) / len(batch), 4)
        for part in gather(answered):
            for post, result in part:
                if post.id not in done:
                    yield post, result
        bar.update(sum(len(each) for each in batches[first : first + get_world_size()]))
    bar.close()


def new_row(post, args, source, predicted):
    """The post's row with what a model said about it. The post's own chain and gold score are
    dropped, since a new `cot` and a readout's `score` have these names (a predicted chain is
    `raw`)."""
    row = post.row()
    row.pop("cot", None)
    row.pop("score", None)
    row |= dict(source=source, model=str(args.model)) | predicted
    if not row.get("cot"):  # None of a post that is set aside
        row.pop("cot", None)
    return row


# ---- teacher -----------------------------------------------------------------------------------


def teacher(args, own_ask=None):
    """paper: chain-of-thought enhancement. D_t = right stage-1 chains and stage-2 explanations.

    After a kill, a post whose row is in neither --out nor its rejects is asked about again. With an
    endpoint the answers in the journal of paid calls are used again; only calls that a hard kill
    met in flight are sent once more."""
    posts, rejects = select_posts(args, labelled=True)
    if args.endpoint and not args.allow_test and any(post.split == "test" for post in posts):
        raise InputError("these are posts of split test, and stage 2 would send their labels: "
                         "choose another --split, or say --allow-test")
    if args.dry_run:
        return dry_run(args, posts)
    options = (args.max_tries, args.max_new_tokens, args.stage2)
    if args.endpoint:
        output = Output(args, rejects)
        results = from_endpoint(args, posts, output.done,
                                lambda post, ask: two_stage_cot([post], ask, *options)[0])
    else:
        model, ask = None, own_ask
        if not own_ask:
            model, processor = load(args)
            ask = local_teacher(args, model, processor)
        output = Output(args, rejects, model)
        results = in_batches(args, posts, output.done,
                             lambda batch, _: two_stage_cot(batch, ask, *options))
    counts = Counter()
    for post, result in results:
        row = new_row(post, args, "teacher", result)
        for name in {"temperature", "max_tokens"} & args.extra_body.keys():
            row[name] = args.extra_body[name]  # what was sent
        kept = result["cot"] is not None
        if kept:
            del row["attempts"]
        output.write(row, keep=kept)
        kind = {1: "unaided chains", 2: "explained chains"}[row["stage"]] if kept else "set aside"
        counts.update({kind: 1, "answers": row["tries"], "tokens in": row["tokens_in"],
                       "tokens out": row["tokens_out"]})
    print(f"new rows   {row_text(dict(sorted(counts.items())))}")
    output.print_summary()


def local_teacher(args, model, processor):
    """ask(list of Requests) -> list of Answers of a local model, a batch at once."""
    def ask(requests):
        ids = [request.post.id for request in requests]
        torch.manual_seed(int(digest(args.seed, requests[0].temperature, ids)[:8], 16))
        examples = [encode(each.post, [("", None)], processor, each.prompt) for each in requests]
        batch = collate(examples, processor.pad_id).to(model.device)
        budget = max(request.max_tokens for request in requests)  # the batch shares the largest
        texts = generate_text(model, processor, batch, budget, requests[0].temperature)
        return [Answer(text, finish, len(example), len(processor.text_ids(text)))
                for example, (text, finish) in zip(examples, texts)]

    return ask


def dry_run(args, posts):
    """One prompt of each kind as it would be sent, and what the whole stage would cost."""
    post = posts[0]
    prompts = dict(unaided=post_prompt(post, "unaided") + FORMATS["unaided"])
    if args.stage2:
        prompts["explained"] = post_prompt(post, "explained", post.label) + FORMATS["explained"]
    for task, prompt in prompts.items():
        print(f"---- {task} ----\n[image {post.image}]\n{prompt}\n")
    calls = round((1.5 if args.stage2 else 1) * min(len(posts), args.max_posts or len(posts)))
    tokens = len(prompts["unaided"]) // 4 + 400  # words, and a picture of moderate size
    print(f"{len(posts)} posts, about {calls} calls of {tokens} tokens in and 300 out (a guess), "
          f"{calls * (tokens + 300):,} tokens in all; nothing was sent")


# ---- an endpoint -------------------------------------------------------------------------------


class Unreachable(InputError):
    """The server gave no usable answer to this post, however often it was asked."""


class OverBudget(InputError):
    """This call might cost more than is left of --budget-tokens."""


class Endpoint:
    """An OpenAI-compatible chat-completions server (OpenAI, vLLM, SGLang, Ollama, llama.cpp); many
    threads may call it at once. The key is read from OPENAI_API_KEY and cut out of every text that
    comes back. `timeout`: seconds without a byte. `extra_body` is merged into each request; None
    removes a key. `proxy`: a URL; those of the environment are not used.

    `retries` counts failures by kind ("HTTP 503"); `mended`: kinds that a retry has overcome at
    least once; `waiting` says what is waited for; `stop` ends all waiting."""

    RETRIED = {408, 409, 429} | set(range(500, 600))

    def __init__(self, url, model, timeout=120.0, max_retries=6, allow_http=False, extra_body=None,
                 proxy=None):
        with explaining(f"--endpoint {url!r} is no address"):
            requests.Request("POST", url).prepare()
            address = urlsplit(url)
        local = address.hostname in ("localhost", "127.0.0.1", "::1")
        http = address.scheme == "http" and (local or allow_http)
        if address.scheme != "https" and not http:
            raise InputError(f"--endpoint {url!r} must start with https://, on this machine "
                             "http://; --allow-http sends posts and key in the clear")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.timeout, self.max_retries = model, timeout, max_retries
        self.extra_body = extra_body or {}
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # trap: requests would print it
            raise InputError("OPENAI_API_KEY holds a character that no header takes: set it anew")
        self.retries = Counter()
        self.mended = set()
        self.waiting = ""
        self.stop = threading.Event()
        self._paused_until = 0.0  # of all threads
        self.session = requests.Session()  # of all threads, which it keeps connections for
        self.session.mount(self.url, requests.adapters.HTTPAdapter(pool_maxsize=256))
        # trap: else the environment's proxies see the key, and ~/.netrc replaces it
        self.session.trust_env = False
        self.session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        self.session.proxies = dict(http=proxy, https=proxy)
        if self._key:
            self.session.headers["Authorization"] = f"Bearer {self._key}"

    def __call__(self, request):
        """Request -> Answer. 408/409/429/5xx, time-outs and broken replies are asked again with
        jittered exponential back-off; Retry-After holds back all threads. Raises InputError for
        what would fail for every post (401, 402, 404, a redirect, a wait of over an hour, a failure
        that no retry has ever overcome), Refused for what concerns this post alone, Unreachable
        after the last retry."""
        body, ready_at, kinds = self._body(request), 0.0, set()
        for attempt in range(self.max_retries + 1):
            delay = max(ready_at, self._paused_until) - time.monotonic()
            if delay > 0:
                self.pause(delay)
            answer, problem = self._post(body)
            if answer:
                self.waiting = ""
                self.mended |= kinds
                return answer
            kind = problem.split(":")[0]
            kinds.add(kind)
            self.retries[kind] += 1
            if self.retries[kind] == 1:
                say(f"asked again: post {request.post.id}: {problem}")
            seconds = min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)
            ready_at = time.monotonic() + seconds
            self.waiting = (f"{kind}, {attempt + 1} of {self.max_retries + 1}, again in "
                            f"{seconds:.0f} s")
        problem = f"{self.url} failed {self.max_retries + 1} times, last: {problem}"
        if kind not in self.mended:
            raise InputError(f"post {request.post.id}: {problem}; asking again helped no post: "
                             "mend this and run again")
        raise Unreachable(problem)

    def _body(self, request):
        """What is sent for a Request."""
        (message,) = request.messages
        message = message | dict(content=[_wire_part(part) for part in message["content"]])
        body = dict(model=self.model, messages=[message], temperature=request.temperature,
                    max_tokens=request.max_tokens)
        if request.logprobs:
            body |= dict(logprobs=True, top_logprobs=5)
        body |= self.extra_body
        return {key: value for key, value in body.items() if value is not None}

    def _post(self, body):
        """One call -> (Answer or None, why it is worth another try)."""
        try:  # whatever happens while a reply is read and understood is worth another try
            reply = self.session.post(self.url, json=body, timeout=self.timeout,
                                      allow_redirects=False)
            if reply.status_code == 200:
                return _read_reply(json.loads(self._plain(reply.content.decode()))), ""
        except Exception as e:
            return None, self._line(f"{type(e).__name__}: {e}")
        status, problem = reply.status_code, f"HTTP {reply.status_code}: {self._line(reply.text)}"
        if status == 401:
            problem += " (the key is read from OPENAI_API_KEY)"
        if status in (401, 402, 404) or status < 400:
            raise InputError(f"{self.url} refused: {problem}")
        if status not in self.RETRIED:
            raise Refused(f"{self.url} refused: {problem}")
        wish = reply.headers.get("Retry-After", "")  # a date is left to our own back-off
        seconds = float(wish) if wish.isdigit() else 0.0
        if seconds > 3600:
            raise InputError(f"{self.url} asks to wait {seconds:.0f} s: run again later")
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)
        return None, problem

    def pause(self, seconds):
        """Sleeps; raises InputError if asked to stop meanwhile."""
        if self.stop.wait(seconds):
            raise InputError("stopped")  # nobody reads it: the stage is ending

    def _plain(self, text):
        """A text from the server without the key. choice: keys of fewer than 8 characters are no
        secrets (EMPTY, x)."""
        return text.replace(self._key, "***") if len(self._key) >= 8 else text

    def _line(self, text):
        """The start of such a text, as one line."""
        return " ".join(self._plain(text).split())[:300]


def _read_reply(reply):
    """A chat-completions reply -> Answer; a missing text (refusal, null content) is an empty
    answer. Raises what there is to raise."""
    choice = reply["choices"][0]
    content = choice["message"].get("content") or ""
    if isinstance(content, list):  # some servers answer in parts
        content = "".join(part.get("text") or "" for part in content)
    logprobs = []
    for token in (choice.get("logprobs") or {}).get("content") or []:
        likely = {x["token"]: float(x["logprob"]) for x in token.get("top_logprobs") or []}
        logprobs.append((token["token"], likely))
    usage = reply.get("usage") or {}
    tokens = [int(usage.get(f"{name}_tokens") or 0) for name in ("prompt", "completion")]
    return Answer(content, choice.get("finish_reason") or "stop", *tokens, logprobs)


def _wire_part(part):
    """A content part as it goes over the wire: images become data URLs, audio base64."""
    if part["type"] == "audio":
        data = base64.b64encode(Path(part["audio"]).read_bytes()).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": data_url(part["image"])}}
    return part


class PaidCalls:
    """Asks the endpoint, and keeps every answer in NAME.calls.jsonl before it is used: killed and
    rerun, the stage pays for nothing twice but the calls that were in flight. A call is sent only
    if its max_tokens and the longest prompt so far fit into what is left of --budget-tokens; a
    longer prompt may go over by the difference."""

    def __init__(self, args):
        self.endpoint = Endpoint(args.endpoint, args.model, args.timeout,
                                 allow_http=args.allow_http, extra_body=args.extra_body,
                                 proxy=args.proxy)
        self.journal = RowWriter(sibling(args.out, "calls.jsonl"), "call")
        self.budget = args.budget_tokens
        self.first_call = threading.Lock()
        self.lock = threading.Condition()  # guards the journal and the counts below
        self.spent = self.under_way = self.longest_prompt = 0  # in tokens
        # name of a call -> its answers in order, each used once by its post's thread: a list, since
        # with --max-tries over 4 the last tries are the same call, at temperature 1.2
        self.known = {}
        for row in read_rows(self.journal.path):
            answer = Answer(**row["answer"])
            self.count(answer)
            self.known.setdefault(row["call"], []).append(answer)

    def count(self, answer):
        """Adds what an answer cost."""
        self.spent += answer.tokens_in + answer.tokens_out
        self.longest_prompt = max(self.longest_prompt, answer.tokens_in)

    def call(self, request):
        """The Answer, from the journal if it is there."""
        name = digest(self.endpoint.model, request.post.id, request.prompt,
                      files_digest(request.post), request.temperature, request.max_tokens,
                      request.logprobs, self.endpoint.extra_body)
        if self.known.get(name):
            return self.known[name].pop(0)
        if self.budget:
            with self.first_call:  # one call alone tells how long a prompt is
                if not self.longest_prompt:
                    return self.pay(request, name)
        return self.pay(request, name)

    def pay(self, request, name):
        """Asks the server, within the budget: a call is expected to cost its whole max_tokens and
        the longest prompt so far."""
        self.endpoint.pause(0)  # ends this post's dialogue if the stage is stopping
        extra = self.endpoint.extra_body
        most = extra.get("max_completion_tokens") or extra.get("max_tokens") or request.max_tokens
        with self.lock:
            expected = self.longest_prompt + most
            while self.budget and self.spent + self.under_way + expected > self.budget:
                if not self.under_way:
                    raise OverBudget("over --budget-tokens")
                self.lock.wait()  # what is under way may cost less than expected
            self.under_way += expected
        try:
            began = time.time()
            answer = self.endpoint(request)
            answer.seconds = round(time.time() - began, 4)
            with self.lock:
                self.journal.write(dict(call=name, id=request.post.id, answer=vars(answer)))
                self.count(answer)
        finally:
            with self.lock:
                self.under_way -= expected
                self.lock.notify_all()
        if self.budget and not answer.tokens_in + answer.tokens_out:
            raise InputError("the server counts no tokens, so --budget-tokens cannot hold: say "
                             "--max-posts")
        return answer


def files_digest(post):
    """Names the content of a post's pictures and sound."""
    sound = [post.audio] if post.audio else []
    return digest(*[Path(file).read_bytes() for file in post.images + sound])


def from_endpoint(args, posts, done, dialogue):
    """(post, dialogue(post, ask)) as they are finished, --workers posts at once; a dialogue may ask
    as often as it likes. Refused posts wait: they are set aside as soon as a later post is
    answered, since a wrong --model would refuse all. The stage stops where many are refused in a
    row, where asking again never helped, and before a call that --budget-tokens does not cover."""
    calls = PaidCalls(args)
    ask = lambda requests: [calls.call(request) for request in requests]
    todo = islice((post for post in posts if post.id not in done), args.max_posts or None)
    bar = progress(len(posts), args.stage, "post", done=sum(post.id in done for post in posts))
    running, refused = {}, []
    unanswered, over_budget = 0, False
    with bar, ThreadPoolExecutor(args.workers) as pool:
        try:
            while True:
                if not over_budget:
                    for post in islice(todo, 2 * args.workers - len(running)):
                        running[pool.submit(dialogue, post, ask)] = post
                if not running:
                    break
                finished = wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done
                bar.set_postfix_str("" if finished else calls.endpoint.waiting,
                                    refresh=sys.stderr.isatty())  # a log gets a line a minute
                for future in finished:
                    post = running.pop(future)
                    bar.update()
                    try:
                        result = future.result()
                    except OverBudget:
                        over_budget = True
                    except Unreachable as e:
                        say(f"unanswered, run again: post {post.id}: {e}")
                        unanswered += 1
                    except Refused as e:
                        refused.append((post, e))
                        if len(refused) > max(8, args.workers):
                            raise InputError(f"{len(refused)} posts in a row: {e}") from None
                    else:
                        yield from set_aside(refused)
                        refused = []
                        yield post, result
            # trap: a wrong --model may be a 400 for every post, and then no answer is on file
            if refused and not calls.journal.done:  # nothing was ever answered
                raise InputError(f"no post was answered: {refused[0][1]}")
            yield from set_aside(refused)
        finally:  # on Ctrl-C too: calls under way are waited for and kept, none is sent any more
            calls.endpoint.stop.set()
    if calls.endpoint.retries:
        print(f"asked again {row_text(calls.endpoint.retries)}")
    if unanswered:
        print(f"unanswered {unanswered} posts, run again")
    if over_budget:
        print(f"stopped    {calls.spent} tokens spent of --budget-tokens {args.budget_tokens}")


def set_aside(refused):
    """(post, result) of posts that the server refused."""
    for post, error in refused:
        say(f"set aside  post {post.id}: {error}")
        # stage 0: refused before any answer
        yield post, dict(cot=None, stage=0, tries=0, problem=str(error), tokens_in=0,
                         tokens_out=0)


# ---- augment and soft --------------------------------------------------------------------------


def augment(args):
    """paper: the assistant writes one more chain per training post; D_a keeps the right ones."""
    posts, rejects = select_posts(args, labelled=True)
    model, processor = load(args)
    output = Output(args, rejects, model)

    def respond(posts, n):
        torch.manual_seed(args.seed * 100_003 + n)
        batch = encode_batch(posts, [(REASON_FORMAT, None)], model, processor)
        answers = generate_text(model, processor, batch, args.max_new_tokens, args.temperature)
        results = []
        for post, (text, finish) in zip(posts, answers):
            parsed, problem = check_answer(text, post.label, finish)
            results.append(dict(raw=text, stage=1, tries=1, prediction=parsed.prediction,
                                problem=problem,
                                cot=None if problem else render_reasoning(parsed.fields)))
        return results

    for post, result in in_batches(args, posts, output.done, respond):
        output.write(new_row(post, args, "assistant", result), keep=result["problem"] is None)
    output.print_summary()


@torch.no_grad()
def soft(args):
    """What the assistant says to both tasks of every row, in eval mode: its last hidden state at
    every answer token, and its output matrix once. Their product are the logits."""
    model, processor = load(args)
    branches_of = partial(training_branches, processor=processor, max_answer=args.max_answer)
    items, _ = training_items(args.data, args.images, branches_of)
    settings = settings_of(args, MAY_CHANGE)
    settings |= dict(weights=fingerprint(model), tokenizer=tokenizer_hash(processor.tokenizer))
    if get_rank() == 0:
        begun = any(Path(args.out).glob("*.safetensors"))
        check_settings(settings_file(args.out), settings, begun, run=args.run)
    barrier()
    soft_labels = SoftLabels(args.out)
    if get_rank() == 0:
        vocab = len(processor.tokenizer)  # ids that mean the same in every size of a model family
        soft_labels.write_head(model.lm_head.weight[:vocab])
    items.sort(key=lambda item: len(item[1][0][1]))  # (post, [(question, chain), …])
    starts = range(get_rank() * args.batch, len(items), get_world_size() * args.batch)
    bar = progress(len(starts), "soft", "batch")
    for start in starts:
        examples = [encode(*item, processor) for item in items[start : start + args.batch]]
        names = [SoftLabels.names(example) for example in examples]
        if not soft_labels.parts.keys() >= set(itertools.chain(*names)):
            soft_labels.write_part(soft_entries(model, processor, examples, names))
        bar.update()
    bar.close()
    barrier()  # the line is of all processes
    print(f"wrote {sum(len(branches) for _, branches in items)} entries to {args.out}")


def soft_entries(model, processor, examples, names):
    """{entry name: hidden states (n, D')} of every branch of a batch of examples."""
    batch = collate(examples, processor.pad_id).to(model.device)
    hidden = forward_branches(model, batch)  # (B, T, D')
    entries = {}
    for branch in range(1, int(batch.branch_ids.max()) + 1):
        supervised = batch.supervised(branch)  # (B, T)
        for row, of_branches in enumerate(names):
            entries[of_branches[branch - 1]] = hidden[row, supervised[row]].cpu()
    return entries


# ---- predict -----------------------------------------------------------------------------------


def predict_posts(args):
    """Rows of what a model says of each post."""
    if args.text:
        return predict_one(args)
    posts, rejects = select_posts(args)
    posts = break_modality(posts, args)
    if args.endpoint:
        output, source = Output(args, rejects), "endpoint"
        results = from_endpoint(args, posts, output.done, partial(zero_shot, args))
    else:
        model, respond = responder(args)
        output, source = Output(args, rejects, model), "ubm" if isinstance(model, UBM) else "model"
        results = in_batches(args, posts, output.done, respond)
    for post, result in results:
        refused = result.get("stage") == 0  # set_aside says so
        output.write(new_row(post, args, source, result), keep=not refused)
    output.print_summary()


def zero_shot(args, post, ask):
    """What a model behind an endpoint says of a post by the students' two prompts: the label
    generated (no `probs`), and its chain."""
    (answer,) = ask([Request(post, build_messages(post, "label"), 0.0, 32)])
    row = dict(prediction=parse_reasoning(answer.text).prediction, raw_label=answer.text)
    if args.chain:
        request = Request(post, build_messages(post, "reason"), 0.0, args.max_new_tokens)
        try:
            (answer,) = ask([request])
        except Refused as e:  # the label stands
            return row | dict(problem=str(e))
        row |= chain_row(answer.text, answer.finish) | dict(tokens=answer.tokens_out)
        del row["fields"]  # eval.py reads them from `raw`
    return row


def responder(args):
    """(the loaded model, respond(posts, batch number) -> list of dicts): of a UBM its verdicts, of
    a model with a readout what that reads, else labels and chains."""
    if Path(args.model, "ubm.json").exists():
        model, processor = load_ubm(args.model, args.device), None
    else:
        model, processor = load(args)

    def respond(posts, _=0):
        if processor is None:
            return [verdict(p, model.classes).row(cost=False) for p in model.probs(posts)]
        if hasattr(model, "readout"):
            return read_out(model, processor, posts)
        rows = predict(model, processor, posts, args.chain, args.decode, args.max_new_tokens)
        for row in rows:
            row.pop("fields", None)  # eval.py reads them from `raw`
        return rows

    return model, respond


def break_modality(posts, args):
    """Two controls, each without one modality: images dealt out anew (a row still names the post's
    own), words taken away."""
    if args.shuffle_images:
        pictures = [(post.image, post.frames) for post in posts]
        random.Random(args.seed).shuffle(pictures)
        for post, (image, frames) in zip(posts, pictures):
            post.image, post.frames = image, frames
    if args.blank_text:
        for post in posts:
            post.text = ""
    return posts


def predict_one(args):
    """One post from the shell: its chain, then the rest of its row, as a file would hold it."""
    row = dict(id="1", text=args.text, aspect=args.aspect)
    for name in ("image", "frames", "audio"):
        row[name] = vars(args)[name] and os.path.abspath(vars(args)[name])
    with explaining("the post from the command line"):
        post = to_post(row, "/")
    _, respond = responder(args)
    row = respond([post])[0]
    if "raw" in row:
        print(row.pop("raw") + "\n")
    print(to_json(row, args.model))


# ---- export ------------------------------------------------------------------------------------


def export(args):
    """The base with its adapter merged into it, as `from_pretrained` of its class and servers read
    it: weights, config, generation config, tokenizer with chat template, image processor."""
    from transformers.utils import cached_file

    if os.path.exists(args.out):
        raise InputError(f"--out {args.out} is there already: choose another")
    model, processor = load_trained(args.model, args.device, args.dtype or "auto")
    if hasattr(model, "readout"):
        raise InputError(f"{args.model} is a readout, whose head has no place in a model folder")
    part = f"{Path(args.out)}.part"  # trap: a slash at its end
    shutil.rmtree(part, ignore_errors=True)  # of a killed run
    with explaining(f"{part} cannot be written"):
        merge_lora(model).save_pretrained(part)
        processor.tokenizer.save_pretrained(part)
    sizes = processor.image_processor.to_dict()
    if processor.extractor:  # Omni keeps both in one file
        sizes = processor.extractor.to_dict() | sizes
    write_json(Path(part, "preprocessor_config.json"), sizes)
    for name in ("processor_config.json", "video_preprocessor_config.json"):
        file = cached_file(base_of(args.model), name, _raise_exceptions_for_missing_entries=False)
        if file:
            config = read_json(file)
            config.pop("image_processor", None)  # it would stand before the sizes of training
            write_json(Path(part, name), config)
    os.replace(part, args.out)
    print(f"wrote {args.out}: {count_parameters(model):,} weights in {model.dtype}")


# ---- U-ACS: the cascade (arXiv 2509.04459) -----------------------------------------------------

BIN_FORMAT = """Answer with this field only:
"Prediction": a whole number from -3 (most negative) to 3 (most positive)"""


def cascade(args):
    """paper: U-ACS. The UBM keeps what it is sure of, the MLLM is asked about the rest, and a
    second time where it is unsure and contradicts the UBM."""
    ubm = load_ubm(args.ubm, args.device)
    posts, rejects = select_posts(args)
    dev = read_dev_posts(args.dev, args.images, ubm.target)
    judged = {post.id: post.text for post in posts}
    for post in dev:
        if judged.get(post.id) == post.text:
            raise InputError(f"post {post.id} is in --dev and in --data: thresholds are not fitted "
                             "on posts that they are judged by")
    mllm, processor = load(args) if args.mllm else (None, None)
    if hasattr(mllm, "readout"):
        raise InputError(f"--mllm {args.mllm} is a readout, which writes no label to score")
    output = Output(args, rejects, mllm)
    passes = CascadePasses(args, ubm, mllm, processor)

    def error(answer, n):  # of scores their distance
        if ubm.target == "label":
            return float(answer.prediction != dev[n].label)
        return abs(answer.predicted_score - dev[n].score)

    grid = threshold_grid(passes.verdicts(dev, -1, -1), error)
    dev_passes, dev_error, *taus = best_thresholds(grid, args.budget)
    print(f"thresholds {taus[0]:.3f} UBM, {taus[1]:.3f} MLLM: {dev_passes:.2f} MLLM passes a post, "
          f"error {dev_error:.3f}, on {len(dev)} dev posts")
    rows = []
    routes = Counter()
    costs = dict(passes=0.0, seconds=0.0)  # of a post
    for post, verdicts in zip(posts, passes.verdicts(posts, *taus)):
        route, answer, reason = cascade_route(*verdicts, *taus)
        asked = verdicts[: passes_asked(verdicts, *taus)]
        by_pass = {name: each.row() for name, each in zip(("ubm", "mllm", "second_pass"), asked)}
        fields = answer.row(cost=False) | dict(route=route, reason=reason, passes=by_pass)
        rows.append(new_row(post, args, "cascade", fields))
        routes[route] += 1
        costs["passes"] += (len(asked) - 1) / len(posts)
        costs["seconds"] += sum(each.seconds for each in asked) / len(posts)
    write_json(sibling(args.out, "cascade.json"), dict(
        taus=taus, budget=args.budget, ubm=args.ubm, mllm=args.model, dev_passes=dev_passes,
        dev_error=dev_error, routes=routes, costs=costs))
    write_rows(args.out, rows)
    print(f"routes     {row_text(routes)}\na post     {row_text(costs)}")
    output.print_summary()


def load_ubm(folder, device="cpu"):
    """The UBM that `save_ubm` wrote, in eval mode."""
    with explaining(f"{folder} is a damaged folder of train.py ubm, or an older one"):
        config = read_json(Path(folder, "ubm.json"))
        if tuple(config["classes"]) not in (LABELS, SCORE_BINS):
            raise InputError(f"{folder} was trained on other labels: {config['classes']}")
        image = str(Path(folder, "image")) if config["image"] else None
        model = new_ubm(str(Path(folder, "text")), config["classes"], image, config["members"],
                        weights=False)
        model.load_state_dict(read_tensors(Path(folder, "ubm.safetensors")))
        model.temperature = config["temperature"]
    return model.to(device).eval()


class CascadePasses:
    """Asks the passes for their verdicts. The MLLM's are kept as they come, a local model's in
    NAME.asked.jsonl, an endpoint's answers in the journal of paid calls: killed and rerun, also
    with another --budget, nothing is asked twice."""

    def __init__(self, args, ubm, mllm, processor):
        self.args, self.ubm, self.mllm, self.processor = args, ubm, mllm, processor
        prompt = LABEL_FORMAT if ubm.classes == LABELS else BIN_FORMAT
        self.branches = label_branches(ubm.classes, prompt)
        self.known, self.file = {}, None
        if mllm is not None:
            self.settings = settings_of(args, MAY_CHANGE), fingerprint(mllm), ubm.classes
            self.file = RowWriter(sibling(args.out, "asked.jsonl"), "key")
            for row in read_rows(self.file.path):
                self.known[row["key"]] = Verdict(**row["verdict"])

    def verdicts(self, posts, tau1, tau2):
        """[[UBM, MLLM, second pass], …] on posts, asking no more than the routes at these
        thresholds want (-1: nobody is ever sure)."""
        verdicts = [[self.ask_ubm(post), None, None] for post in posts]
        for number, wanted in ((1, "ask mllm"), (2, "ask second_pass")):
            questions = []  # (number of the post, post, prompt)
            for i, post in enumerate(posts):
                if cascade_route(*verdicts[i], tau1, tau2)[0] == wanted:
                    prompt = post_prompt(post)
                    if number == 2:
                        prompt = second_pass_prompt(post, *verdicts[i][:2])
                    questions.append((i, post, prompt))
            ask = self.ask_endpoint if self.args.endpoint else self.ask_model
            for i, answer in ask(questions):
                verdicts[i][number] = answer
            if any(verdicts[i][number] is None for i, _, _ in questions):
                raise InputError("the server did not answer all questions: run the same command "
                                 "again, what was answered is kept")
        return verdicts

    def ask_ubm(self, post):
        """The UBM's Verdict."""
        began = time.time()
        answer = verdict(self.ubm.probs([post])[0], self.ubm.classes)
        answer.tokens = len(self.ubm.tokenizer(*mark_aspect(post)[:2]).input_ids)
        answer.seconds = round(time.time() - began, 4)
        return answer

    def ask_model(self, questions):
        """(number, Verdict) of [(number, post, prompt), …]: a local model scores all answers, so
        that its distribution is exact."""
        new = []
        for i, post, prompt in questions:
            key = digest(self.settings, post.id, files_digest(post), prompt)
            if key in self.known:
                yield i, self.known[key]
            else:
                new.append((i, post, prompt, key))
        new.sort(key=lambda question: len(question[2]))
        bar = progress(len(new), "mllm", "post")
        for part in chunks(new, self.args.batch):
            began = time.time()
            examples = [encode(post, self.branches, self.processor, prompt)
                        for _, post, prompt, _ in part]
            batch = collate(examples, self.processor.pad_id).to(self.args.device)
            probs = score_labels(self.mllm, batch).exp().cpu()
            seconds = round((time.time() - began) / len(part), 4)
            for (i, _, _, key), example, p in zip(part, examples, probs):
                answer = verdict(p, self.ubm.classes)
                answer.tokens, answer.seconds = len(example), seconds
                self.file.write(dict(key=key, verdict=answer.row()))
                yield i, answer
            bar.update(len(part))
        bar.close()

    def ask_endpoint(self, questions):
        """The same from an endpoint, with the teacher stage's client, retries and stops."""
        by_id = {post.id: (i, prompt) for i, post, prompt in questions}

        def dialogue(post, ask):
            messages = build_messages(post, "label")
            messages[-1]["content"][-1]["text"] = by_id[post.id][1] + self.branches[0][0]
            (answer,) = ask([Request(post, messages, 0.0, 32, self.args.logprobs)])
            return answer_verdict(answer, self.ubm.classes)

        posts = [post for _, post, _ in questions]
        for post, answer in from_endpoint(self.args, posts, set(), dialogue):
            if not isinstance(answer, Verdict):  # the server refused
                answer = Verdict(failed=answer["problem"])
            yield by_id[post.id][0], answer


def verdict(probs, classes):
    """The Verdict of a distribution (C,) over `classes` (LABELS or SCORE_BINS)."""
    u = round(uncertainty(probs).item(), 6)
    probs = [round(p, 6) for p in probs.tolist()]
    if tuple(classes) == LABELS:
        return Verdict(LABELS[probs.index(max(probs))], u, probs)
    expectation = sum(p * c for p, c in zip(probs, classes))
    return score_verdict(expectation, u, probs)


def second_pass_prompt(post, ubm, mllm):
    """The shared part of the prompt of the second pass: the post, then both answers and how sure
    they were."""
    return (post_prompt(post) + "Two earlier answers disagree. A small classifier: "
            f"{_in_words(ubm)}. You: {_in_words(mllm)}. Look again and decide.\n\n")


def _in_words(answer):
    words = answer.prediction
    if answer.predicted_score is not None:
        words = f"{answer.predicted_score:+.1f}"
    if answer.uncertainty is None:
        return words
    return f"{words} (uncertainty {answer.uncertainty:.2f} of 1)"


def answer_verdict(answer, classes):
    """The Verdict of an endpoint's Answer. Its uncertainty is None without log-probabilities, and
    for scores, whose signs are tokens apart."""
    found = Verdict(failed=f"no label in {answer.text[:80]!r}")
    parsed = parse_reasoning(answer.text)
    if tuple(classes) != LABELS:
        score = parse_score(parsed.fields.get("Prediction", answer.text))
        found.failed = f"no score in {answer.text[:80]!r}"
        if score is not None and classes[0] <= score <= classes[-1]:
            found = score_verdict(score, None)
    elif parsed.prediction:
        found = Verdict(parsed.prediction)
        for token, likely in reversed(answer.logprobs or []):
            if _label_of_token(token) == parsed.prediction:  # where the label begins
                mass = dict.fromkeys((*LABELS, None), 1e-6)  # None: begins no label, or several
                for other, log_p in likely.items():
                    mass[_label_of_token(other)] += math.exp(log_p)
                probs = torch.tensor([mass[label] for label in LABELS])
                found = verdict(probs / probs.sum(), LABELS)  # choice: the largest is the answer
                break
    found.tokens, found.seconds = answer.tokens_in + answer.tokens_out, answer.seconds
    return found


def _label_of_token(token):
    """The one label that begins with this token ("neg", " Positive"), or None."""
    start = token.strip(' "').lower()
    labels = [label for label in LABELS if start and label.startswith(start)]
    return labels[0] if len(labels) == 1 else None


def passes_asked(verdicts, tau1, tau2):
    """How many of a post's three passes (1 to 3) its route asks; `verdicts` (ubm, mllm,
    second_pass) may hold more of them. Those of the MLLM are one less."""
    ubm, mllm, _ = verdicts
    if cascade_route(ubm, None, None, tau1, tau2)[0] != "ask mllm":
        return 1
    if cascade_route(ubm, mllm, None, tau1, tau2)[0] != "ask second_pass":
        return 2
    return 3


def threshold_grid(verdicts, error):
    """[(passes per post, mean error, τ1, τ2), …] for `verdicts`, a list of (ubm, mllm, second_pass)
    of posts that were all asked, at all pairs of the quantiles of u. error(Verdict, n): what an
    answer to post n costs."""
    grid = []
    levels = [_uncertainty_levels([v[number] for v in verdicts]) for number in (0, 1)]
    for tau1, tau2 in itertools.product(*levels):
        passes = wrong = 0.0
        for n, of_post in enumerate(verdicts):
            passes += passes_asked(of_post, tau1, tau2) - 1
            _, answer, _ = cascade_route(*of_post, tau1, tau2)
            wrong += error(answer, n)
        grid.append((passes / len(verdicts), wrong / len(verdicts), tau1, tau2))
    return grid


def _uncertainty_levels(answers):
    """Nobody is sure (-1), the 5 % quantiles of the answers' uncertainties, all are sure (1)."""
    u = sorted(each.uncertainty for each in answers if each and each.uncertainty is not None)
    if not u:
        return [-1.0]
    return [-1.0] + sorted({u[max(len(u) * k // 20 - 1, 0)] for k in range(20)} | {1.0})


def best_thresholds(grid, budget):
    """The entry of least error whose passes stay within the budget (the UBM alone always does).
    choice: few dev posts leave many equals; of those the one that asks about most posts, then the
    one that asks a second time about fewest."""
    affordable = [entry for entry in grid if entry[0] <= budget]
    return min(affordable or [min(grid)], key=lambda entry: (entry[1], entry[2], -entry[3]))


def main(argv=None, own_ask=None):
    """Runs the command line; returns the exit code. own_ask(list of Requests) -> list of Answers: a
    teacher of one's own in place of --model."""
    args = parse_args(argv)

    def stage(args):
        if args.stage in ("cascade", "export") or getattr(args, "endpoint", None):
            refuse_ranks("this stage (an endpoint has --workers)")
        args.device = init_distributed(args.device)
        stages = dict(teacher=partial(teacher, own_ask=own_ask), augment=augment, soft=soft,
                      predict=predict_posts, cascade=cascade, export=export)
        stages[args.stage](args)

    return run_stage(stage, args)


if __name__ == "__main__":
    sys.exit(main())
