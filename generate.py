"""Write what models say: toy posts, chains, soft labels, predictions, a cascade's answers.

    python generate.py teacher --data train.tsv --images img --model gpt-4o-mini \\
        --endpoint https://api.openai.com/v1 --out chains.jsonl
    python generate.py predict --data test.tsv --images img --model runs/student/best \\
        --out said.jsonl
    python generate.py predict --model runs/student/best --image x.jpg --text "what a day"
    python generate.py cascade --ubm runs/ubm --mllm runs/student/best --data test.tsv \\
        --dev dev.tsv --images img --out cascade.jsonl

Last line: `wrote 300 rows to said.jsonl (0 set aside)`. Reads posts (.jsonl, the authors' .json,
TomBERT .tsv, MMSA's .csv, MVSA folder). Appends rows to --out, bad ones to NAME.rejects.jsonl.
Killed and run again with the same command it skips what is done and ends with the same rows.
"""

import argparse
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from mulcot import (
    LABELS, Answer, Endpoint, Help, InputError, NF4Linear, Post, Refused, Request, RowWriter, Shelf,
    SoftLabels, ToyTeacher, Unreachable, answer_all, answer_verdict, beside, best_thresholds,
    build_messages, cascade_route, check_answer, check_settings, collate, dev_posts, digest, encode,
    fingerprint, forward_branches, generate_text, iter_posts, join_ranks, label_branches,
    label_example, label_row, load_image, load_model, load_ubm, mark_aspect, new_cache,
    not_negative, of_split, parse_reasoning, positive, post_prompt, ranks, read_out, read_posts,
    read_rows, reference_prompt, refuse_ranks, regression_metrics, render_reasoning, run_stage,
    score_labels, shared_rows, shares_of, stages_asked, task_format, tell_aside, threshold_grid,
    tokenizer_hash, top_k_soft, toy_clip_warmup, toy_clips, toy_posts, toy_warmup,
    training_branches, two_stage_cot, verdict, wait_for_ranks, write_atomic, write_branch,
    write_json)


YES_NO = argparse.BooleanOptionalAction  # --flag and --no-flag


def above_zero(text):
    """An argparse type: a number above 0."""
    if not float(text) > 0:
        raise ValueError
    return float(text)


def parse_args(argv=None):
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                  epilog="`generate.py STAGE --help` lists a stage's flags.")
    stages = top.add_subparsers(dest="stage", required=True)

    def stage(name, about, model=True):
        """A stage's parser with the flags that stages share; returns its add_argument."""
        p = stages.add_parser(name, help=about, description=about, formatter_class=Help)
        flag, single = p.add_argument, name in ("predict", "cascade")
        flag("--out", required=not single,
             help="a folder" if name in ("toy", "soft") else "where the rows go (.jsonl)")
        flag("--seed", type=int, default=42, help="of all that is drawn or sampled")
        if model:
            flag("--data", nargs="+", metavar="POSTS", required=not single,
                 help="posts: .jsonl, .json, .tsv, .csv or an MVSA folder")
            flag("--images", help="images folder (default: images/ beside the posts, else theirs)")
            flag("--model", required=name != "cascade",
                 help="the MLLM's name at --endpoint" if name == "cascade" else "hub name, model "
                      "or adapter folder (teacher: also toy, or the name at --endpoint)")
            flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                 help="cpu, cuda or cuda:1")
            flag("--nf4", action=YES_NO,
                 help="quantise the base to 4 bits (default: as its adapter was trained)")
            flag("--batch", type=positive, default=64, help="posts at once (authors: 24)")
            flag("--max-pixels", type=not_negative, default=0,
                 help="image size cap, 0: the model's own (paper: 280 * 280 = 78400)")
        return flag

    flag = stage("toy", "write the synthetic set in the ordinary formats", model=False)
    for split, size in (("train", 600), ("dev", 100), ("test", 300), ("warmup", 1280)):
        flag(f"--{split}", type=int, default=size, help=f"number of {split} posts")
    flag("--noise", type=float, default=0.0, help="share of posts with a wrong label")
    flag("--clips", action="store_true", help="posts with frames, a voice and a score")

    teacher_flags(stage("teacher", "two-stage chains: predict; keep if right, else explain the "
                                   "label"))
    flag = stage("augment", "one more chain per training post by the assistant, kept if right")
    flag("--split", default="train", help="only posts of this split, where posts have one, or all")
    flag("--temperature", type=float, default=0.7, help="of sampling")
    flag("--max-new-tokens", type=int, default=512, help="of a chain (paper: 512)")

    flag = stage("soft", "the assistant's distributions at the supervised positions")
    flag("--temperature", type=above_zero, default=2.0, help="τ (paper: 2)")
    flag("--top-k", type=not_negative, default=0, help="keep only so many likeliest tokens and one "
         "bin for the rest; 0: exact, by hidden states and output matrix")
    flag("--kl-positions", choices=("response", "all"), default="response",
         help="all: prompt and image positions too, near to what the authors' script does")
    flag("--max-answer", type=int, default=512, help="as in training (paper: 512)")

    predict_flags(stage("predict", "label by the label prompt, chain by the reason prompt"))
    cascade_flags(stage("cascade", "a small model first, the MLLM only where that one is unsure"))
    args = top.parse_args(argv)
    check_args(top, args)
    return args


def teacher_flags(flag):
    """Who writes the chains, how often it is asked, and what that may cost."""
    endpoint_flags(flag)
    flag("--split", default="train", help="only posts of this split, where posts have one, or all")
    flag("--allow-test", action="store_true", help="also send posts of split test, with labels")
    flag("--budget-tokens", type=not_negative, default=0,
         help="--endpoint: stop after so many, 0: never")
    flag("--max-posts", type=not_negative, default=0,
         help="--endpoint: stop after so many posts, 0: never")
    flag("--dry-run", action="store_true", help="print the prompts and an estimate, send nothing")
    flag("--max-tries", type=positive, default=3, help="answers asked for in each stage (ARC)")
    flag("--max-new-tokens", type=int, default=512, help="of an answer; doubled if cut")
    flag("--stage2", action=YES_NO, default=True, help="--no-stage2: unaided chains only")
    flag("--skill", type=float, default=0.6, help="--model toy: share of posts right unaided")


def predict_flags(flag):
    """What is said of a post, and the controls."""
    flag("--split", default="all", help="only posts of this split, where posts have one, or all")
    flag("--decode", choices=("score", "greedy"), default="score",
         help="label by scoring the three answers, or generated as the authors do")
    flag("--chain", action=YES_NO, default=True, help="--no-chain writes labels only")
    flag("--max-new-tokens", type=int, default=512, help="of a chain (paper: 512)")
    flag("--shuffle-images", action="store_true", help="control: deal the images out anew")
    flag("--blank-text", action="store_true", help="control: take the words away")
    flag("--source", default="student", help="the writer's name in the rows (a UBM's: ubm)")
    one_post_flags(flag)


def cascade_flags(flag):
    """Who is asked, and how much of it."""
    flag("--ubm", required=True, help="folder of train.py ubm")
    flag("--mllm", help="the MLLM: hub name, model or adapter folder; or give --endpoint, --model")
    endpoint_flags(flag)
    flag("--logprobs", action=YES_NO, default=True,
         help="--endpoint: --no-logprobs for a server that refuses to give them")
    flag("--dev", help="posts to fit the thresholds on (split dev, where posts have one)")
    flag("--split", default="all", help="only posts of this split, where posts have one, or all")
    flag("--budget", type=float, default=0.4, help="MLLM passes per post, at most, on dev")
    flag("--compare", action="store_true",
         help="ask the MLLM about every post, for the accuracy-cost curve")
    one_post_flags(flag)


def check_args(top, args):
    """What argparse cannot say."""
    if args.stage == "toy" and args.clips and args.noise:
        top.error("--noise is of labels; --clips have scores")
    if args.stage == "augment" and not args.temperature >= 0:
        top.error("--temperature must be at least 0")
    if args.stage in ("predict", "cascade"):
        if not (args.text or (args.data and args.out)):
            top.error(f"{args.stage} needs --data and --out, or one post in --text (and --image, "
                      "--aspect)")
        if args.text and args.data:
            top.error("--text (one post) and --data (many) exclude each other")
    if args.stage == "cascade":
        if bool(args.mllm) == bool(args.endpoint) or bool(args.endpoint) != bool(args.model):
            top.error("cascade needs --mllm FOLDER, or --endpoint URL with --model NAME")
        if not (args.dev if args.data else args.out):
            top.error("cascade fits its thresholds on --dev; one post in --text needs the --out of "
                      "such a run")
        args.model, args.max_posts, args.budget_tokens = args.mllm or args.model, 0, 0


def endpoint_flags(flag):
    """How to reach an endpoint."""
    flag("--endpoint", help="OpenAI-compatible base URL ending in /v1; --model is its name there, "
                            "the key is read from OPENAI_API_KEY")
    flag("--allow-http", action="store_true", help="plain http to another machine")
    flag("--workers", type=positive, default=8, help="--endpoint: calls at once")
    flag("--timeout", type=float, default=120.0, help="--endpoint: seconds for one call")


def one_post_flags(flag):
    """One post from the shell."""
    flag("--text", help="one post instead of --data: its text")
    flag("--image", help="one post: its image")
    flag("--aspect", help="one post: its target aspect")


# ---- shared by the stages ----------------------------------------------------------------------


def posts_of(args, keep=lambda post: True):
    """Posts of --data and --split; unreadable rows go to NAME.rejects.jsonl, once."""
    rejects, everyone, posts, split = [], [], [], args.split
    for path in args.data:
        if os.path.realpath(path) == os.path.realpath(args.out):
            raise InputError(f"--out {args.out} is one of the --data files: choose another")
        found = read_posts(path, args.images, rejects)
        everyone += found
        posts += found if split == "all" else of_split(found, split)
    twice = [i for i, n in Counter(p.id for p in everyone).items() if n > 1]
    if twice:
        raise InputError(f"id {twice[0]!r} occurs in two --data files: ids name posts later on")
    splits = {p.split for p in everyone if p.split}
    if ranks()[0] == 0:
        settings, refused = beside(args.out, "settings.json"), beside(args.out, "rejects.jsonl")
        begun = os.path.exists(args.out) and (os.path.getsize(args.out) > 0  # not mktemp's file
                                              or os.path.exists(settings))
        check_settings(settings, settings_of(args), begun)
        if not begun:  # --out was deleted: nothing that an earlier run left counts as done
            for left in (refused, *shares_of(refused), *shares_of(args.out)):
                Path(left).unlink(missing_ok=True)
        with RowWriter(refused, "where") as aside:
            for where, why in rejects:
                if where not in aside.done:
                    aside.write(dict(where=where, problem=why))
    tell_aside(rejects, "unreadable rows")
    posts = [p for p in posts if keep(p)]
    if not posts:
        raise InputError(f"{', '.join(args.data)}: no post of split {split!r} that the "
                         f"{args.stage} stage can use (splits there: {sorted(splits) or 'none'})")
    return posts


def files_of(post):
    """Names the content of a post's pictures and sound."""
    sound = [post.audio] if post.audio else []
    return digest(*(Path(file).read_bytes() for file in post.pictures + sound))


# settings that a rerun onto an --out must share
KEPT = ("stage", "model", "seed", "temperature", "decode", "chain", "shuffle_images", "blank_text",
        "max_pixels", "max_new_tokens", "max_tries", "nf4", "stage2", "skill", "logprobs")


def settings_of(args):
    """What decides the rows of a stage, the adapter's weights among it."""
    files = [Path(args.model, f"{x}.safetensors") for x in ("adapter_model", "head", "ubm")]
    weights = [file.read_bytes() for file in files if file.exists()]
    return {k: v for k, v in vars(args).items() if k in KEPT} | {
        "adapter": digest(*weights) if weights else None}


def fixed_batches(posts, size, done, say):
    """(post, what say(batch, its number) has for it and its seconds) of all posts not done, like
    lengths together; under torchrun of this process's share. The batches' make-up depends on all
    posts, not on what is left, so that a resumed or divided run pads, samples and rounds as an
    unbroken one."""
    rank, world = ranks()
    order = sorted(posts, key=lambda p: len(p.cot or p.text))
    for n, a in enumerate(range(0, len(order), size)):
        batch, began = order[a : a + size], time.time()
        if n % world == rank and any(p.id not in done for p in batch):
            for post, said in zip(batch, say(batch, n)):
                if post.id not in done:
                    yield post, said | dict(seconds=share(began, batch))


# what a model says of a post; a readout says the score
SAID = {"raw", "raw_label", "probs", "prediction", "chain_prediction", "problem", "stage", "tries",
        "tokens", "tokens_in", "tokens_out", "seconds", "attempts", "label_conditioned", "prompt",
        "score", "uncertainty", "predicted_score", "bin_probs", "route", "reason", "stages"}


def new_row(post, args, source, **more):
    """The post's row with what a model said about it, and nothing that another model said."""
    row = {k: v for k, v in post.row().items() if k not in SAID}
    row |= dict(source=source, model=str(args.model)) | more
    return row if row.get("cot") else {k: v for k, v in row.items() if k != "cot"}


def share(began, batch):
    """Seconds since `began` for each of the batch."""
    return round((time.time() - began) / len(batch), 4)


def closing(out):
    """The last line: rows written and set aside, counted in the files."""
    written, aside = (sum(1 for _ in open(f, "rb")) for f in (out, beside(out, "rejects.jsonl")))
    print(f"wrote {written} rows to {out} ({aside} set aside)")


# ---- toy ---------------------------------------------------------------------------------------


def toy(args):
    """posts.jsonl, warmup.jsonl and images/ (with --clips also voices) of the synthetic world."""
    sizes, images = dict(train=args.train, dev=args.dev, test=args.test), f"{args.out}/images"
    settings = dict(sizes, warmup=args.warmup, seed=args.seed, noise=args.noise, clips=args.clips)
    check_settings(f"{args.out}/toy.json", settings, os.path.exists(f"{args.out}/posts.jsonl"))
    if args.clips:
        posts = toy_clips(images, sizes, args.seed)
    else:
        posts = toy_posts(images, sizes, args.seed, args.noise)
    warm = toy_clip_warmup if args.clips else toy_warmup
    warmup = warm(images, args.warmup, args.seed + 1)
    for name, rows in (("posts", posts), ("warmup", warmup)):
        lines = "".join(json.dumps(p.row(), ensure_ascii=False) + "\n" for p in rows)
        write_atomic(f"{args.out}/{name}.jsonl", lambda part: Path(part).write_text(lines, "utf-8"))
    if not args.clips:
        print(f"test labels: {dict(Counter(p.label for p in posts if p.split == 'test'))}")
    print(f"wrote {len(posts)} posts and {len(warmup)} warm-up rows to {args.out}")


# ---- teacher -----------------------------------------------------------------------------------


def teacher(args):
    """paper: chain-of-thought enhancement. D_t = right stage-1 chains and stage-2 explanations."""
    posts = posts_of(args, lambda p: p.label)
    if args.endpoint and not args.allow_test and any(p.split == "test" for p in posts):
        raise InputError("these are posts of split test, and stage 2 would send their labels: "
                         "choose another --split, or say --allow-test")
    if args.dry_run:
        return dry_run(args, posts)
    counts, began = Counter(), time.time()
    bar = tqdm(desc="teacher", unit="post", smoothing=0.02, disable=ranks()[0] > 0)
    rejects = beside(args.out, "rejects.jsonl")
    with bar, shared_rows(args.out) as kept, shared_rows(rejects) as aside:
        done = kept.done | aside.done
        bar.reset(len(posts))
        bar.update(sum(p.id in done for p in posts))
        ask = lambda p: two_stage_cot(p, args.max_tries, args.max_new_tokens, args.stage2)
        results = from_endpoint if args.endpoint else from_batches
        for post, result in results(args, posts, done, counts, ask):
            counts.update(f"answers: {a['problem'].split()[0]}"
                          for a in result.get("attempts", ()) if a["problem"])
            row = new_row(post, args, "teacher", **result)
            if "cot" in row:
                del row["attempts"]
                kept.write(row)
            else:
                aside.write(row)
            counts[f"stage {row['stage']}" if "cot" in row else "set aside"] += 1
            counts["asked again"] += max(0, row["tries"] - row["stage"])
            counts.update({f"{k} tokens": row[f"tokens_{k}"] for k in ("in", "out")})
            bar.update()
            bar.set_postfix({k: counts[k] for k in ("stage 1", "stage 2", "set aside")})
    counts["answers a minute"] = round(60 * counts["answers"] / max(1e-9, time.time() - began))
    print("this run   " + "  ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    closing(args.out)


def from_batches(args, posts, done, counts, dialogue):
    """(post, result) of the toy teacher or a local model, --batch posts at once; dialogue(post) is
    a generator like two_stage_cot."""
    answers = local_teacher(args)
    say = lambda batch, _: [result for _, result in
                            sorted(answer_all(map(dialogue, batch), answers))]
    for post, result in fixed_batches(posts, args.batch, done, say):
        counts["answers"] += result["tries"]
        yield post, result


def local_teacher(args):
    """ask(list of Requests) -> list of Answers: the toy teacher or a local model."""
    if args.model == "toy":
        one = ToyTeacher(args.skill, args.seed)
        return lambda requests: [one(r) for r in requests]
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels, nf4=args.nf4)

    def ask(requests):
        answers, shared = {}, lambda r: (r.temperature, r.max_tokens)  # by a batch
        for temperature, budget in sorted(set(map(shared, requests))):
            group = [r for r in requests if shared(r) == (temperature, budget)]
            seed = digest(args.seed, temperature, [r.post.id for r in group])
            torch.manual_seed(int(seed[:8], 16))
            examples = [encode(r.post, [("", None)], processor,
                               prompt=r.messages[-1]["content"][-1]["text"]) for r in group]
            texts = generate_text(model, processor, examples, budget, temperature)
            for r, example, (text, finish) in zip(group, examples, texts):
                answers[r.post.id] = Answer(text, finish, len(example),
                                            len(processor.text_ids(text)))
        return [answers[r.post.id] for r in requests]

    return ask


class PaidCalls:
    """Asks the endpoint, and keeps every answer in NAME.calls.jsonl before it is used: killed and
    rerun, the stage pays for nothing twice but the calls that were in flight."""

    def __init__(self, args, done, counts):
        self.endpoint = Endpoint(args.endpoint, args.model, args.timeout,
                                 allow_http=args.allow_http)
        self.file, self.counts = RowWriter(beside(args.out, "calls.jsonl"), "call"), counts
        self.lock, self.known, self.spent = threading.Lock(), {}, 0
        for row in read_rows(self.file.path):
            answer = Answer(**row["answer"])
            self.spent += answer.tokens_in + answer.tokens_out
            if row["id"] not in done:  # finished posts need theirs no more
                self.known[row["call"]] = answer

    def __call__(self, request):
        text = request.messages[-1]["content"][-1]["text"]
        call = digest(self.endpoint.model, request.post.id, text, files_of(request.post),
                      request.temperature, request.max_tokens, request.logprobs)
        if call in self.known:
            return self.known.pop(call)
        self.endpoint.pause(0)  # ends this dialogue if the stage is stopping
        answer = self.endpoint(request)
        with self.lock:
            self.file.write(dict(call=call, id=request.post.id, answer=vars(answer)))
            self.spent += answer.tokens_in + answer.tokens_out
            self.counts["answers"] += 1
        return answer


def from_endpoint(args, posts, done, counts, dialogue):
    """(post, result) as they are finished, --workers dialogues at once; dialogue(post) is a
    generator like two_stage_cot. A post that the server refuses is set aside; when it answers none,
    or the budget is spent, the stage stops."""
    calls, failed = PaidCalls(args, done, counts), []
    todo = islice((p for p in posts if p.id not in done), args.max_posts or None)

    def talk(post):
        began = time.time()
        (_, result), = answer_all([dialogue(post)], lambda requests: [calls(requests[0])])
        return result | dict(seconds=share(began, [post]))

    running = {}
    with calls.file, ThreadPoolExecutor(args.workers) as pool:
        try:
            while True:
                spent = args.budget_tokens and calls.spent >= args.budget_tokens
                room = 0 if spent else 2 * args.workers - len(running)
                running |= {pool.submit(talk, post): post for post in islice(todo, room)}
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    post = running.pop(future)
                    try:
                        result = future.result()
                    except (Refused, Unreachable) as e:  # this post's fault, or the server's?
                        failed.append((post, e))
                        if len(failed) > max(8, args.workers):
                            raise InputError(f"{len(failed)} posts in a row failed: {e}") from None
                        continue
                    yield from set_aside(failed, counts)
                    failed = []
                    yield post, result
            if failed and not calls.file.done:  # trap: a wrong --model may be a 400 for every post
                raise InputError(f"no post was answered: {failed[0][1]}")
            yield from set_aside(failed, counts)
        finally:
            calls.endpoint.stop.set()
    counts.update({f"retries: {k}": n for k, n in calls.endpoint.retries.items()})
    if args.budget_tokens and calls.spent >= args.budget_tokens:
        print(f"stopped    {calls.spent} tokens spent of --budget-tokens {args.budget_tokens}")


def set_aside(failed, counts):
    """(post, result) of posts that the server refused; unanswered ones are left for a rerun."""
    for post, error in failed:
        if isinstance(error, Unreachable):
            counts["unanswered, run again"] += 1
        else:
            yield post, dict(cot=None, stage=0, tries=0, problem=str(error), tokens_in=0,
                             tokens_out=0)


def dry_run(args, posts):
    """One prompt of each kind as it would be sent, and what the whole stage would cost."""
    post = posts[0]
    for task, gold in (("predict", None), ("explain", post.label))[: 1 + args.stage2]:
        text = build_messages(post, task, gold)[0]["content"][-1]["text"]
        print(f"---- {task} ----\n[image {post.image}]\n{text}\n")
    calls = round((1.5 if args.stage2 else 1) * min(len(posts), args.max_posts or len(posts)))
    known = [row["answer"] for row in read_rows(beside(args.out, "calls.jsonl"))]
    tokens = [len(text) // 4 + 400, 300]  # words, a picture of moderate size, a chain of 200 words
    if known:
        tokens = [sum(a[f"tokens_{k}"] for a in known) // len(known) for k in ("in", "out")]
    print(f"{len(posts)} posts, about {calls} calls of {tokens[0]} tokens in and {tokens[1]} out "
          f"({'as measured so far' if known else 'a guess'}), {calls * sum(tokens):,} tokens in "
          "all; nothing was sent")


# ---- augment and soft --------------------------------------------------------------------------


def augment(args):
    """paper: the assistant writes one more chain per training post; D_a keeps the right ones."""
    posts = posts_of(args, lambda p: p.label)
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels, nf4=args.nf4)
    bar = tqdm(total=len(posts), desc="augment", unit="post", disable=ranks()[0] > 0)
    rejects = beside(args.out, "rejects.jsonl")

    def say(batch, n):
        torch.manual_seed(args.seed * 100_003 + n)
        asked = [encode(p, [(task_format("reason"), None)], processor) for p in batch]
        said = generate_text(model, processor, asked, args.max_new_tokens, args.temperature)
        for post, (text, finish) in zip(batch, said):
            parsed, problem = check_answer(text, post.label, finish)
            yield dict(raw=text, stage=1, tries=1, prediction=parsed.prediction, problem=problem,
                       cot=None if problem else render_reasoning(parsed.fields))

    with bar, shared_rows(args.out) as kept, shared_rows(rejects) as aside:
        done = kept.done | aside.done
        bar.update(sum(p.id in done for p in posts))
        for post, said in fixed_batches(posts, args.batch, done, say):
            (aside if said["problem"] else kept).write(new_row(post, args, "assistant", **said))
            bar.update()
    closing(args.out)


@torch.no_grad()
def soft(args):
    """The assistant's softened distributions for both tasks of every row, taken in eval mode."""
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels, nf4=args.nf4)
    rows, aside = Shelf(), []  # the branches that train.py will ask for
    for path in args.data:
        for post in iter_posts(path, args.images, aside, may_be_empty=len(args.data) > 1):
            branches, problem = training_branches(post, processor, args.max_answer)
            if problem:
                aside.append((f"{path}: {post.id}", problem))
            else:
                rows.append((post, branches), len(branches[0][1]))
    tell_aside(aside, "rows without a usable chain")
    if not rows:
        raise InputError(f"{', '.join(args.data)}: no row with a usable chain and label")
    vocab = len(processor.tokenizer)  # ids that mean the same in every size of a model family
    about = dict(assistant=fingerprint(model), tokenizer=tokenizer_hash(processor.tokenizer),
                 temperature=args.temperature, top_k=args.top_k, positions=args.kl_positions,
                 vocab=vocab)
    rank, world = ranks()
    if rank == 0:
        SoftLabels(args.out, about)
        if not args.top_k:
            SoftLabels(args.out).write_head(model.lm_head.weight[:vocab])
    wait_for_ranks()
    cache, everywhere = SoftLabels(args.out, about), args.kl_positions == "all"
    order = sorted(range(len(rows)), key=lambda i: rows.sizes[i])  # by the length of the chain
    starts = range(rank * args.batch, len(rows), world * args.batch)
    for a in tqdm(starts, desc="soft", unit="batch", disable=rank > 0):
        examples = [encode(*rows[i], processor) for i in order[a : a + args.batch]]
        names = [SoftLabels.names(e) for e in examples]
        if all(n in cache.index for each in names for n in each[not everywhere :]):
            continue
        batch, entries = collate(examples, processor.pad).to(args.device), {}
        hidden = forward_branches(model, batch)
        at = (batch.branch >= 0) if everywhere else (batch.targets != -100)
        parts = [hidden[at]]
        if args.top_k:  # in chunks: all logits (N, V) at once would be gigabytes
            each = [top_k_soft(model.lm_head(h)[:, :vocab], args.top_k, args.temperature)
                    for h in hidden[at].split(512)]
            parts = map(torch.cat, zip(*each))
        parts = [x.cpu() for x in parts]
        row, branch = at.nonzero()[:, 0].cpu(), batch.branch[at].cpu()
        for b, each in enumerate(names):
            for k, name in enumerate(each):
                here = (row == b) & (branch == k)
                if here.any():
                    entries[name] = tuple(x[here] for x in parts)
        cache.write_part(entries)
    wait_for_ranks()
    cache = SoftLabels(args.out)
    size = sum(f.stat().st_size for f in Path(args.out).glob("part-*.safetensors"))
    tokens = sum(end - start for _, start, end in cache.index.values())
    print(f"wrote {len(cache.index)} entries, {tokens} positions of {size / max(tokens, 1):.0f} "
          f"bytes, to {args.out}")


# ---- predict -----------------------------------------------------------------------------------


def predict(args):
    """paper: the label from the label prompt, the chain from another run by the reason prompt."""
    if args.text:
        return predict_one(args)
    posts = controlled(posts_of(args), args)
    model, processor = load_either(args)
    bar = tqdm(total=len(posts), desc="predict", unit="post", disable=ranks()[0] > 0)
    with bar, shared_rows(args.out) as kept:
        done = set(kept.done)
        bar.update(sum(p.id in done for p in posts))
        say = lambda batch, _: predict_batch(args, model, processor, batch)
        for post, said in fixed_batches(posts, args.batch, done, say):
            kept.write(new_row(post, args, args.source, **said, cot=None))
            bar.update()
    closing(args.out)


def load_either(args):
    """(model, Processor), or (UBM, None) where --model is a folder of train.py ubm."""
    if Path(args.model, "ubm.json").exists():
        args.source = "ubm"
        return load_ubm(args.model, args.device), None
    return load_model(args.model, args.device, max_pixels=args.max_pixels, nf4=args.nf4)


def controlled(posts, args):
    """Two controls that each break one modality: images dealt out anew, words taken away."""
    if args.shuffle_images:
        pictures = [(p.image, p.frames) for p in posts]
        random.Random(args.seed).shuffle(pictures)
        for post, (image, frames) in zip(posts, pictures):
            post.image, post.frames = image, frames
    if args.blank_text:
        for post in posts:
            post.text = ""
    return posts


@torch.no_grad()
def predict_batch(args, model, processor, posts):
    """What is said of each post: prediction, probs or raw_label, and the chain with its problem; of
    a UBM (no processor) its verdict, of a model with a readout what that reads."""
    if processor is None:
        return [verdict(probs, model.classes) for probs in model.probs(posts)]
    if hasattr(model, "readout"):
        return read_out(model, processor, posts)
    chain, chains = [(task_format("reason"), None)], []
    if args.decode == "score":
        scored = label_branches() + chain  # one pass over image and post for labels and chain
        examples = [encode(p, scored, processor) if args.chain else label_example(p, processor)
                    for p in posts]
        batch = collate(examples, processor.pad).to(model.device)
        cache = new_cache() if args.chain else None
        hidden = forward_branches(model, batch, cache)
        rows = [label_row(probs) for probs in score_labels(model, batch, hidden).exp().tolist()]
        if args.chain:
            chains = write_branch(model, processor, batch, hidden, cache, args.max_new_tokens)
    else:
        asked = [encode(p, [(task_format("label"), None)], processor) for p in posts]
        rows = [dict(prediction=parse_reasoning(text).prediction, raw_label=text)
                for text, _ in generate_text(model, processor, asked, 32)]
        if args.chain:
            asked = [encode(p, chain, processor) for p in posts]
            chains = generate_text(model, processor, asked, args.max_new_tokens)
    if args.chain:
        for row, (text, finish) in zip(rows, chains):
            parsed = parse_reasoning(text)
            row |= dict(raw=text, chain_prediction=parsed.prediction,
                        problem="truncated" if finish == "length" else parsed.problem,
                        tokens=len(processor.text_ids(text)))
    return rows


def predict_one(args):
    """One post from the shell: its chain, its label and the label's probability."""
    if args.image:
        load_image(args.image)
    model, processor = load_either(args)
    post = Post("1", args.text, args.image, args.aspect)
    said = predict_batch(args, model, processor, [post])[0]
    if "raw" in said:
        print(said["raw"] + "\n")
    for score in ("score", "predicted_score"):  # a readout's, a UBM's
        if score in said:
            return print(f"score: {said[score]}")
    sure = f" ({max(said['probs']):.1%})" if "probs" in said else ""
    print(f"label: {said['prediction'] or 'none in ' + repr(said['raw_label'])}{sure}")


# ---- cascade -----------------------------------------------------------------------------------


def cascade(args):
    """paper: U-ACS. The UBM keeps what it is sure of, the MLLM is asked about the rest, and again
    where it is unsure and contradicts the UBM."""
    ubm = load_ubm(args.ubm, args.device)
    refuse_other_labels(args, ubm.classes)
    if args.text:
        return cascade_one(args, ubm)
    posts = posts_of(args)
    dev = dev_posts(args.dev, args.images, ubm.target)
    asked = Asked(args, ubm)
    with asked.file:
        grid = threshold_grid(asked.settle(dev), errors(dev, ubm.target))
        passes, wrong, *taus = best_thresholds(grid, args.budget)
        print(f"thresholds {taus[0]:.3f} UBM, {taus[1]:.3f} MLLM: {passes:.2f} MLLM passes a post, "
              f"error {wrong:.3f}, on {len(dev)} dev posts")
        said = asked.settle(posts, *((-1, -1) if args.compare else taus))
    rows = [cascade_row(args, post, x, taus) for post, x in zip(posts, said)]
    about = dict(taus=taus, budget=args.budget, ubm=args.ubm, mllm=args.model, dev_passes=passes,
                 dev_error=wrong, routes=Counter(row["route"] for row in rows))
    about |= costs(posts, said, rows, grid, args.compare, ubm.target)
    write_json(beside(args.out, "cascade.json"), about)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(args.out, lambda part: Path(part).write_text(lines, "utf-8"))
    print("routes     " + "  ".join(f"{k} {n}" for k, n in about["routes"].items()))
    for name, numbers in about["runs"].items():
        print(f"{name:10s} " + "  ".join(f"{k} {'-' if v is None else f'{v:.4g}'}"
                                         for k, v in numbers.items()))
    closing(args.out)


def refuse_other_labels(args, classes):
    """A model that was trained to give other answers must not be scored on these."""
    if not args.mllm:  # an endpoint answers what the prompt asks for
        return
    folder = Path(args.mllm)
    config = folder.parent / "config.json"  # of train.py, beside best/
    stage = json.loads(config.read_text()).get("stage") if config.exists() else None
    other = (folder / "head.json").exists() or (stage in ("assistant", "student")
                                                and classes != LABELS)
    if other or (folder / "ubm.json").exists():
        raise InputError(f"--mllm {args.mllm} was trained for other answers than the UBM's "
                         f"{', '.join(map(str, classes))}: choose another of the two")


class Asked:
    """Who says what of each post. The MLLM's answers are kept in NAME.asked.jsonl as they come:
    killed and rerun, also with another --budget, nothing is asked twice."""

    def __init__(self, args, ubm):
        self.args, self.ubm, self.model = args, ubm, None
        self.about = settings_of(args), ubm.classes
        self.file = RowWriter(beside(args.out, "asked.jsonl"), "key")
        self.known = {row["key"]: row["said"] for row in read_rows(self.file.path)}

    def settle(self, posts, tau1=-1, tau2=-1):
        """[[UBM, MLLM, MLLM again], …]: the verdicts on posts, asking no more than the routes at
        these thresholds want (-1: nobody is ever sure)."""
        said = [[self.by_ubm(post), None, None] for post in tqdm(posts, "ubm", unit="post")]
        for stage, wanted in ((1, "ask"), (2, "ask again")):
            todo = {}
            for i, (post, x) in enumerate(zip(posts, said)):
                if cascade_route(*x, tau1, tau2)[0] == wanted:
                    prompt = post_prompt(post) if stage == 1 else reference_prompt(post, *x[:2])
                    key = digest(self.about, post.id, files_of(post), prompt)
                    todo[i] = key, post, prompt
            new = [it for it in todo.values() if it[0] not in self.known]
            answers = self.by_endpoint(new) if self.args.endpoint else self.by_model(new)
            for key, answer in tqdm(answers, ("mllm", "mllm again")[stage - 1], len(new)):
                self.known[key] = answer
                self.file.write(dict(key=key, said=answer))
            lost = sum(key not in self.known for key, _, _ in todo.values())
            if lost:
                print(f"unanswered {lost} of {len(todo)} posts: run again before you use this")
            for i, (key, _, _) in todo.items():
                said[i][stage] = self.known.get(key, "the server did not answer")
        return said

    def by_ubm(self, post):
        """The UBM's verdict, or why it has none."""
        began = time.time()
        try:
            answer = verdict(self.ubm.probs([post])[0], self.ubm.classes)
        except InputError as e:
            return str(e)
        tokens = len(self.ubm.tokenizer(*mark_aspect(post)[:2]).input_ids)
        return answer | spent(self.ubm, tokens, time.time() - began)

    def by_model(self, todo):
        """(key, verdict or why there is none) of [(key, post, prompt), …]: a local model scores all
        answers, so that its distribution is exact."""
        if todo and self.model is None:
            self.model = load_model(self.args.model, self.args.device,
                                    max_pixels=self.args.max_pixels, nf4=self.args.nf4)
        todo = sorted(todo, key=lambda it: len(it[2]))
        for a in range(0, len(todo), self.args.batch):
            (model, processor), began, examples = self.model, time.time(), {}
            for key, post, prompt in todo[a : a + self.args.batch]:
                try:
                    examples[key] = encode(post, label_branches(self.ubm.classes), processor,
                                           prompt)
                except InputError as e:
                    yield key, str(e)
            if examples:
                batch = collate(list(examples.values()), processor.pad).to(self.args.device)
                probs = score_labels(model, batch).exp().cpu()
                for (key, example), p in zip(examples.items(), probs):
                    yield key, verdict(p, self.ubm.classes) | spent(model, len(example),
                                                                    share(began, examples))

    def by_endpoint(self, todo):
        """The same from an endpoint, with the teacher stage's client, retries and stops."""
        asked, question = {it[1].id: it for it in todo}, label_branches(self.ubm.classes)[0][0]

        def dialogue(post):
            messages = build_messages(post, "label")
            messages[-1]["content"][-1]["text"] = asked[post.id][2] + question
            answer = yield Request(post, messages, 0.0, 32, self.args.logprobs)
            used = dict(tokens=answer.tokens_in + answer.tokens_out)
            return dict(said=answer_verdict(answer, self.ubm.classes), used=used)

        posts = [post for _, post, _ in todo]
        for post, result in from_endpoint(self.args, posts, set(), Counter(), dialogue):
            said = result.get("said", result.get("problem"))
            if isinstance(said, dict):
                said |= result["used"] | dict(seconds=result["seconds"])
            yield asked[post.id][0], said


def spent(model, tokens, seconds):
    """What a pass cost; FLOPs: 2 x parameters x tokens."""
    size = sum(p.numel() for p in model.parameters()) + sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    return dict(tokens=tokens, seconds=round(seconds, 4), gflops=round(2e-9 * size * tokens, 4))


def errors(posts, target):
    """error(answer or None, n): 1 for a wrong or no label; the distance of a score, 6 for none."""
    def error(answer, n):
        if target == "label":
            return float(answer is None or answer["prediction"] != posts[n].label)
        return abs(answer["predicted_score"] - posts[n].score) if answer else 6.0

    return error


def cascade_row(args, post, said, taus):
    """The post with its answer, the route and why, and the verdict (or failure) of every stage that
    this route asked."""
    route, answer, reason = cascade_route(*said, *taus)
    stages = dict(zip(("ubm", "mllm", "again")[: stages_asked(said, *taus)], said))
    kept = {k: v for k, v in (answer or dict(prediction=None)).items()
            if k not in ("tokens", "seconds", "gflops")}
    return new_row(post, args, "cascade", **kept, route=route, reason=reason, stages=stages)


def costs(posts, said, rows, grid, compare, target):
    """runs: what a post cost and the mean error (where gold is known; of scores also their metrics)
    of the cascade and of either model alone; with --compare the curve [[passes, error], …] at the
    thresholds that dev chose for each budget."""
    known = all(getattr(p, target) is not None for p in posts)
    error, mean = errors(posts, target), lambda values: sum(values) / len(posts)

    def run(passes, answers, paid):
        cost = lambda k: mean(v.get(k, 0) for each in paid for v in each if isinstance(v, dict))
        told = dict(passes=passes, seconds=cost("seconds"), gflops=cost("gflops"))
        if known:
            told["error"] = mean(error(x, n) for n, x in enumerate(answers))
        if known and target == "score":
            metrics = regression_metrics([p.score for p in posts],
                                         [x and x["predicted_score"] for x in answers])
            told |= {k: metrics[k] for k in ("mae", "corr", "acc7", "acc2_has0", "acc2_non0")}
        return told

    def alone(stage, passes):
        return run(passes, [x[stage] if isinstance(x[stage], dict) else None for x in said],
                   [[x[stage]] for x in said])

    paid = [list(row["stages"].values()) for row in rows]
    runs = dict(cascade=run(mean(len(stages) - 1 for stages in paid),
                            [row if row["prediction"] else None for row in rows], paid),
                ubm=alone(0, 0))
    if not compare:
        return dict(runs=runs)
    taus = [best_thresholds(grid, tenths / 10)[2:] for tenths in range(21)]
    curve = sorted({g[:2] for g in threshold_grid(said, error, taus)}) if known else []
    return dict(runs=runs | dict(mllm=alone(1, 1)), curve=curve)


def cascade_one(args, ubm):
    """One post from the shell: what each stage says, and who settles it, in words."""
    file = Path(beside(args.out, "cascade.json"))
    if not file.exists():
        raise InputError(f"{file} does not exist: run cascade with --data and --dev onto this "
                         "--out first, which fits the thresholds")
    about = json.loads(file.read_text())
    if (about["ubm"], about["mllm"]) != (args.ubm, args.model):
        raise InputError(f"{file} holds thresholds for {about['ubm']} and {about['mllm']}: give "
                         "these two, or fit others with --data and --dev")
    taus = about["taus"]
    if args.image:
        load_image(args.image)
    asked = Asked(args, ubm)
    with asked.file:
        said, = asked.settle([Post("1", args.text, args.image, args.aspect)], *taus)
    for name, x in zip(("small model", "large model", "asked again"), said):
        if isinstance(x, dict):
            u = "unknown" if x["uncertainty"] is None else f"{x['uncertainty']:.2f} of 1"
            print(f"{name}: {x.get('predicted_score', x['prediction'])}, uncertainty {u}")
        elif x:
            print(f"{name}: failed: {x}")
    route, answer, reason = cascade_route(*said, *taus)
    last = answer.get("predicted_score", answer["prediction"]) if answer else "none"
    print(f"route: {route} ({reason})\n{ubm.target}: {last}")


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    stages = dict(toy=toy, teacher=teacher, augment=augment, soft=soft, predict=predict,
                  cascade=cascade)

    def stage(args):
        if args.stage in ("toy", "cascade") or getattr(args, "endpoint", None) or getattr(
                args, "text", None):
            refuse_ranks("this stage (an endpoint has --workers)")
        else:
            args.device = join_ranks(args.device)
        stages[args.stage](args)

    return run_stage(stage, args)


if __name__ == "__main__":
    sys.exit(main())
