"""Write what models say: toy posts, teacher chains, augmented chains, soft labels, predictions.

    python generate.py teacher --data train.tsv --images img --model gpt-4o-mini \\
        --endpoint https://api.openai.com/v1 --out chains.jsonl
    python generate.py predict --data test.tsv --images img --model runs/student/best \\
        --out said.jsonl
    python generate.py predict --model runs/student/best --image x.jpg --text "what a day"

Last line: `wrote 300 rows to said.jsonl (0 set aside)`. Reads posts (.jsonl, the authors' .json,
TomBERT .tsv, MVSA folder). Appends rows to --out and bad ones to <out>.rejects.jsonl. Killed and
run again with the same command it skips what is done and ends with the same rows.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from mulcot import (
    LABELS, Answer, Endpoint, InputError, Post, RowWriter, SoftLabels, ToyTeacher, answer_all,
    check_answer, collate, digest, encode, fingerprint, forward_branches, generate_text,
    label_branches, load_image, load_model, parse_reasoning, read_posts, render_reasoning,
    run_stage, score_labels, task_format, top_k_soft, toy_posts, toy_warmup, training_branches,
    two_stage_cot, write_atomic)


def parse_args(argv=None):
    """The command line."""
    yes_no, show = argparse.BooleanOptionalAction, argparse.ArgumentDefaultsHelpFormatter
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                  epilog="`generate.py STAGE --help` lists a stage's flags.")
    stages = top.add_subparsers(dest="stage", required=True)

    def stage(name, about, model=True):
        """A stage's parser with the flags that stages share; returns its add_argument."""
        p = stages.add_parser(name, help=about, description=about, formatter_class=show)
        flag, single = p.add_argument, name == "predict"
        flag("--out", required=not single, help="where the rows go")
        flag("--seed", type=int, default=42, help="of all that is drawn or sampled")
        if model:
            flag("--data", nargs="+", metavar="POSTS", required=not single,
                 help="posts: .jsonl, .json, .tsv or an MVSA folder")
            flag("--images", help="images folder (default: images/ beside the posts, or theirs)")
            flag("--model", required=True, help="hub name, model folder or adapter folder")
            flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, …")
            flag("--batch", type=int, default=24, help="posts at once (authors: 24)")
            flag("--max-pixels", type=int, default=0,
                 help="image size cap, 0: the model's own (paper: 280 * 280 = 78400)")
        return flag

    flag = stage("toy", "write the synthetic set in the ordinary formats", model=False)
    for split, size in (("train", 600), ("dev", 100), ("test", 300), ("warmup", 1280)):
        flag(f"--{split}", type=int, default=size, help=f"number of {split} posts")

    flag = stage("teacher", "two-stage chains: predict; keep if right, else explain the label")
    flag("--endpoint", help="OpenAI-compatible base URL ending in /v1; --model is its name there, "
                            "the key is read from OPENAI_API_KEY")
    flag("--allow-http", action="store_true", help="plain http to another machine")
    flag("--split", default="train", help="only posts of this split, where posts have one, or all")
    flag("--max-tries", type=int, default=3, help="answers asked for in each stage (ARC)")
    flag("--max-new-tokens", type=int, default=512, help="of an answer; doubled if cut")
    flag("--stage2", action=yes_no, default=True, help="--no-stage2: unaided chains only")
    flag("--skill", type=float, default=0.6, help="--model toy: share of posts right unaided")

    flag = stage("augment", "one more chain per training post by the assistant, kept if right")
    flag("--temperature", type=float, default=0.7, help="of sampling")
    flag("--max-new-tokens", type=int, default=512, help="of a chain (paper: 512)")

    flag = stage("soft", "the assistant's distributions at the supervised positions")
    flag("--temperature", type=float, default=2.0, help="τ (paper: 2)")
    flag("--top-k", type=int, default=64, help="likeliest tokens kept; the rest is one more bin")
    flag("--kl-positions", choices=("response", "all"), default="response",
         help="all: prompt and image positions too, near to what the authors' script does")
    flag("--max-answer", type=int, default=512, help="as in training (paper: 512)")

    flag = stage("predict", "label by the label prompt, chain by the reason prompt")
    flag("--split", default="all", help="only posts of this split, where posts have one, or all")
    flag("--decode", choices=("score", "greedy"), default="score",
         help="label by scoring the three answers, or generated as the authors do")
    flag("--chain", action=yes_no, default=True, help="--no-chain writes labels only")
    flag("--max-new-tokens", type=int, default=512, help="of a chain (paper: 512)")
    flag("--shuffle-images", action="store_true", help="control: deal the images out anew")
    flag("--blank-text", action="store_true", help="control: take the words away")
    flag("--source", default="student", help="the writer's name in the rows")
    flag("--text", help="one post instead of --data: its text")
    flag("--image", help="one post: its image")
    flag("--aspect", help="one post: its target aspect")
    args = top.parse_args(argv)
    if args.stage == "predict" and not (args.text or (args.data and args.out)):
        top.error("predict needs --data and --out, or one post in --text (and --image, --aspect)")
    return args


# ---- shared by the stages ----------------------------------------------------------------------


def posts_of(args, keep=lambda post: True):
    """Posts of --data and --split; unreadable rows go to <out>.rejects.jsonl, once."""
    rejects, posts = [], []
    for path in args.data:
        posts += read_posts(path, args.images, rejects)
    twice = [i for i, n in Counter(p.id for p in posts).items() if n > 1]
    if twice:
        raise InputError(f"id {twice[0]!r} occurs in two --data files: ids name posts later on")
    split = getattr(args, "split", "all")
    if split != "all" and any(p.split for p in posts):
        posts = [p for p in posts if p.split == split]
    with RowWriter(f"{args.out}.rejects.jsonl", "where") as aside:
        for where, why in rejects:
            if where not in aside.done:
                aside.write(dict(where=where, problem=why))
    for where, why in rejects[:5]:
        print(f"set aside  {where}: {why}")
    posts = [p for p in posts if keep(p)]
    if not posts:
        raise InputError(f"{', '.join(args.data)}: no post of split {split!r} that the "
                         f"{args.stage} stage can use")
    return posts


def fixed_batches(posts, size, done):
    """(number, batch) of like lengths, those not wholly done. Their make-up depends on all posts,
    not on what is left, so that a resumed run pads, samples and rounds as an unbroken one."""
    order = sorted(range(len(posts)), key=lambda i: (len(posts[i].cot or posts[i].text), i))
    for a in range(0, len(order), size):
        batch = [posts[i] for i in order[a : a + size]]
        if any(p.id not in done for p in batch):
            yield a // size, batch


def new_row(post, args, source, began, batch, **more):
    """The post's row with what a model said about it; `seconds` is its share of the batch."""
    row = post.row() | dict(source=source, model=str(args.model)) | more
    row["seconds"] = round((time.time() - began) / len(batch), 4)
    return row if row.get("cot") else {k: v for k, v in row.items() if k != "cot"}


def closing(out):
    """The last line: rows written and set aside, counted in the files."""
    written, aside = (sum(1 for _ in open(f, "rb")) for f in (out, f"{out}.rejects.jsonl"))
    print(f"wrote {written} rows to {out} ({aside} set aside)")


# ---- toy ---------------------------------------------------------------------------------------


def toy(args):
    """posts.jsonl, warmup.jsonl and images/ of the synthetic world."""
    sizes, images = dict(train=args.train, dev=args.dev, test=args.test), f"{args.out}/images"
    posts = toy_posts(images, sizes, args.seed)
    warmup = toy_warmup(images, args.warmup, args.seed + 1)
    for name, rows in (("posts", posts), ("warmup", warmup)):
        lines = "".join(json.dumps(p.row(), ensure_ascii=False) + "\n" for p in rows)
        write_atomic(f"{args.out}/{name}.jsonl", lambda part: Path(part).write_text(lines, "utf-8"))
    print(f"test labels: {dict(Counter(p.label for p in posts if p.split == 'test'))}")
    print(f"wrote {len(posts)} posts and {len(warmup)} warm-up rows to {args.out}")


# ---- teacher -----------------------------------------------------------------------------------


def teacher(args):
    """paper: chain-of-thought enhancement. D_t = right stage-1 chains and stage-2 explanations."""
    posts, ask = posts_of(args, lambda p: p.label), teacher_of(args)
    counts, size = Counter(), 1 if args.endpoint else args.batch
    bar = tqdm(total=len(posts), desc="teacher", unit="post")
    with RowWriter(args.out) as kept, RowWriter(f"{args.out}.rejects.jsonl") as aside, bar:
        bar.update(len([p for p in posts if p.id in kept.done | aside.done]))
        for _, batch in fixed_batches(posts, size, kept.done | aside.done):
            began, done = time.time(), kept.done | aside.done
            asked = [two_stage_cot(p, args.max_tries, args.max_new_tokens, args.stage2)
                     for p in batch]
            results = dict(answer_all(asked, ask))
            for i, post in enumerate(batch):
                if post.id in done:
                    continue
                attempts = results[i].pop("attempts")
                row = new_row(post, args, "teacher", began, batch, **results[i])
                if "cot" in row:
                    kept.write(row)
                else:
                    aside.write(row | dict(attempts=attempts))
                counts[f"stage {row['stage']}" if "cot" in row else "set aside"] += 1
                counts["asked again"] += row["tries"] - row["stage"]
                bar.update()
            bar.set_postfix(counts)
    print("this run   " + "  ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    closing(args.out)


def teacher_of(args):
    """ask(list of Requests) -> list of Answers: the toy teacher, an endpoint, a local model."""
    if args.endpoint or args.model == "toy":
        one = (Endpoint(args.endpoint, args.model, allow_http=args.allow_http) if args.endpoint
               else ToyTeacher(args.skill, args.seed))
        return lambda requests: [one(r) for r in requests]
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels)

    def ask(requests):
        answers, groups = [None] * len(requests), {}
        for i, r in enumerate(requests):  # a batch shares its temperature and token budget
            groups.setdefault((r.temperature, r.max_tokens), []).append(i)
        for (temperature, budget), members in sorted(groups.items()):
            seed = digest(args.seed, temperature, [requests[i].post.id for i in members])
            torch.manual_seed(int(seed[:8], 16))
            prompts = [requests[i].messages[-1]["content"][-1]["text"] for i in members]
            examples = [encode(requests[i].post, [("", None)], processor, prompt=text)
                        for i, text in zip(members, prompts)]
            texts = generate_text(model, processor, examples, budget, temperature)
            for i, example, (text, finish) in zip(members, examples, texts):
                answers[i] = Answer(text, finish, len(example), len(processor.text_ids(text)))
        return answers

    return ask


# ---- augment and soft --------------------------------------------------------------------------


def augment(args):
    """paper: the assistant writes one more chain per training post; D_a keeps the right ones."""
    posts = posts_of(args, lambda p: p.label)
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels)
    bar = tqdm(total=len(posts), desc="augment", unit="post")
    with RowWriter(args.out) as kept, RowWriter(f"{args.out}.rejects.jsonl") as aside, bar:
        for n, batch in fixed_batches(posts, args.batch, kept.done | aside.done):
            began, done = time.time(), kept.done | aside.done
            torch.manual_seed(args.seed * 100_003 + n)
            asked = [encode(p, [(task_format("reason"), None)], processor) for p in batch]
            said = generate_text(model, processor, asked, args.max_new_tokens, args.temperature)
            for post, (text, finish) in zip(batch, said):
                if post.id in done:
                    continue
                parsed, problem = check_answer(text, post.label, finish)
                row = new_row(post, args, "assistant", began, batch, raw=text, stage=1, tries=1,
                              prediction=parsed.prediction, problem=problem,
                              cot=None if problem else render_reasoning(parsed.fields))
                (aside if problem else kept).write(row)
            bar.update(len(batch))
    closing(args.out)


@torch.no_grad()
def soft(args):
    """The assistant's softened distributions for both tasks of every row, taken in eval mode."""
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels)
    rows = []  # the branches that train.py will ask for
    for path in args.data:
        for post in read_posts(path, args.images, []):
            branches, problem = training_branches(post, processor, args.max_answer)
            rows += [] if problem else [(post, branches)]
    assistant, tokenizer = fingerprint(model, processor.tokenizer)
    vocab = len(processor.tokenizer)  # ids that mean the same in every size of a model family
    cache = SoftLabels(args.out, dict(
        assistant=assistant, tokenizer=tokenizer, temperature=args.temperature, top_k=args.top_k,
        positions=args.kl_positions, vocab=vocab))
    everywhere = args.kl_positions == "all"
    rows.sort(key=lambda row: len(row[1][0][1]))  # by the length of the chain
    for a in tqdm(range(0, len(rows), args.batch), desc="soft", unit="batch"):
        examples = [encode(*row, processor) for row in rows[a : a + args.batch]]
        names = [SoftLabels.names(e) for e in examples]
        if all(n in cache.index for each in names for n in each[not everywhere :]):
            continue
        batch, entries = collate(examples, processor.pad).to(args.device), {}
        hidden = forward_branches(model, batch)
        at = (batch.branch >= 0) if everywhere else (batch.targets != -100)
        logits = model.lm_head(hidden[at])[:, :vocab]  # (N, V)
        parts = [x.cpu() for x in top_k_soft(logits, args.top_k, args.temperature)]
        row, branch = at.nonzero()[:, 0].cpu(), batch.branch[at].cpu()
        for b, each in enumerate(names):
            for k, name in enumerate(each):
                here = (row == b) & (branch == k)
                if here.any():
                    entries[name] = tuple(x[here] for x in parts)
        cache.write_part(entries)
    size = sum(f.stat().st_size for f in Path(args.out).glob("*.safetensors"))
    tokens = sum(end - start for _, start, end in cache.index.values())
    print(f"wrote {len(cache.index)} entries, {tokens} positions of {size / max(tokens, 1):.0f} "
          f"bytes, to {args.out}")


# ---- predict -----------------------------------------------------------------------------------


def predict(args):
    """paper: the label from the label prompt, the chain from another run by the reason prompt."""
    if args.text:
        return predict_one(args)
    posts = controlled(posts_of(args), args)
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels)
    with RowWriter(args.out) as kept, tqdm(total=len(posts), desc="predict", unit="post") as bar:
        for _, batch in fixed_batches(posts, args.batch, kept.done):
            began, done = time.time(), set(kept.done)
            for post, said in zip(batch, predict_batch(args, model, processor, batch)):
                if post.id not in done:
                    kept.write(new_row(post, args, args.source, began, batch, **said, cot=None))
            bar.update(len(batch))
    closing(args.out)


def controlled(posts, args):
    """Two controls that each break one modality: images dealt out anew, words taken away."""
    if args.shuffle_images:
        images = [p.image for p in posts]
        random.Random(args.seed).shuffle(images)
        for post, image in zip(posts, images):
            post.image = image
    if args.blank_text:
        for post in posts:
            post.text = ""
    return posts


def predict_batch(args, model, processor, posts):
    """What is said of each post: prediction, probs or raw_label, and the chain with its problem."""
    if args.decode == "score":
        examples = [encode(p, label_branches(), processor) for p in posts]
        batch = collate(examples, processor.pad).to(args.device)
        rows = [dict(prediction=LABELS[max(range(3), key=probs.__getitem__)],
                     probs=[round(p, 6) for p in probs])
                for probs in score_labels(model, batch).exp().tolist()]
    else:
        asked = [encode(p, [(task_format("label"), None)], processor) for p in posts]
        rows = [dict(prediction=parse_reasoning(text).prediction, raw_label=text)
                for text, _ in generate_text(model, processor, asked, 32)]
    if args.chain:
        asked = [encode(p, [(task_format("reason"), None)], processor) for p in posts]
        for row, (text, finish) in zip(rows, generate_text(model, processor, asked,
                                                           args.max_new_tokens)):
            parsed = parse_reasoning(text)
            row |= dict(raw=text, chain_prediction=parsed.prediction,
                        problem="truncated" if finish == "length" else parsed.problem,
                        tokens=len(processor.text_ids(text)))
    return rows


def predict_one(args):
    """One post from the shell: its chain, its label and the label's probability."""
    if args.image:
        load_image(args.image)
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels)
    post = Post("1", args.text, args.image, args.aspect)
    said = predict_batch(args, model, processor, [post])[0]
    if "raw" in said:
        print(said["raw"] + "\n")
    sure = f" ({max(said['probs']):.1%})" if "probs" in said else ""
    print(f"label: {said['prediction'] or 'none in ' + repr(said['raw_label'])}{sure}")


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    stages = dict(toy=toy, teacher=teacher, augment=augment, soft=soft, predict=predict)
    return run_stage(stages[args.stage], args)


if __name__ == "__main__":
    sys.exit(main())
