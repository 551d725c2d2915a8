"""Everything that writes text or distributions: toy posts, teacher chains, augmented chains, soft labels, predictions.

    python generate.py teacher --data train.tsv --images img --endpoint https://host/v1 --model NAME --out chains.jsonl
    python generate.py predict --data test.tsv --images img --model s/best --out predictions.jsonl
    python generate.py predict --model s/best --image x.jpg --text "what a day" --aspect Rex

Last line: `wrote 300 rows to predictions.jsonl (0 set aside)`. Reads posts (.jsonl, authors' .json, TomBERT .tsv,
MVSA folder); appends rows to --out and bad ones to <out>.rejects.jsonl. Killed and run again with the same
command it skips what is done and ends with the same rows.
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

from mulcot import (IMAGE_FORMATS, LABELS, Answer, Endpoint, InputError, Post, RowWriter,
                    SoftLabels, ToyTeacher,
                    answer_all, chain_branches, collate, digest, encode, fingerprint,
                    forward_branches,
                    generate_text, label_branches, load_image, load_model, parse_reasoning,
                    read_posts,
                    render_reasoning, run_stage, score_labels, task_format, top_k_soft, toy_posts,
                    toy_warmup,
                    two_stage_cot, write_atomic)


def parse_args(argv=None):
    yes_no, show = argparse.BooleanOptionalAction, argparse.ArgumentDefaultsHelpFormatter
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    stages = top.add_subparsers(dest="stage", required=True)

    def stage(name, about, data=True, model=True):
        p = stages.add_parser(name, help=about, description=about, formatter_class=show)
        if data:
            p.add_argument("--data", nargs="+", metavar="POSTS", required=name != "predict",
                           help="posts: .jsonl, .json, .tsv or an MVSA folder")
            p.add_argument("--images",
                           help="folder of the images (default: images/ beside the posts, else "
                                "their folder)")
        p.add_argument("--out", required=name != "predict", help="where the rows go")
        p.add_argument("--seed", type=int, default=42, help="of everything drawn or sampled")
        if model:
            p.add_argument("--model", required=True,
                           help="hub name, model folder or adapter folder")
            p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                           help="cpu, cuda, cuda:1 …")
            p.add_argument("--batch", type=int, default=24, help="posts at once (authors: 24)")
            p.add_argument("--max-pixels", type=int, default=0,
                           help="image size cap, 0: the model's own (paper: 280*280 = 78400)")
        return p

    p = stage("toy", "write the synthetic set in the ordinary formats", data=False, model=False)
    for split, size in (("train", 600), ("dev", 100), ("test", 300), ("warm", 1280)):
        p.add_argument(f"--{split}", type=int, default=size,
                       help=f"{split} posts" if split != "warm" else "warm-up posts")

    p = stage("teacher", "two-stage chains with retries: predict, keep if right, else explain the "
                         "label")
    p.add_argument("--endpoint",
                   help="OpenAI-compatible base URL ending in /v1 (key: OPENAI_API_KEY); --model "
                        "is its name there")
    p.add_argument("--allow-http", action="store_true", help="plain http to another machine")
    p.add_argument("--split", default="train",
                   help="only posts of this split, where posts have one; 'all' for every post")
    p.add_argument("--max-tries", type=int, default=3, help="answers asked for per stage (ARC)")
    p.add_argument("--max-new-tokens", type=int, default=512,
                   help="of an answer; doubled after a truncated one")
    p.add_argument("--stage2", action=yes_no, default=True,
                   help="--no-stage2 keeps only unaided chains (ablation)")
    p.add_argument("--skill", type=float, default=0.6,
                   help="share of posts that --model toy gets right unaided")

    p = stage("augment", "one more chain per training post by the assistant, kept if its "
                         "prediction is right")
    p.add_argument("--temperature", type=float, default=0.7, help="of sampling")
    p.add_argument("--max-new-tokens", type=int, default=512, help="of a chain (paper: 512)")

    p = stage("soft", "the assistant's distributions at the supervised positions")
    p.add_argument("--temperature", type=float, default=2.0, help="τ (paper: 2)")
    p.add_argument("--top-k", type=int, default=64,
                   help="likeliest tokens kept per position; the rest is one more bin")
    p.add_argument("--kl-positions", choices=("response", "all"), default="response",
                   help="all: prompt and image positions too (cf. the authors)")
    p.add_argument("--max-answer", type=int, default=512, help="as in training (paper: 512)")

    p = stage("predict", "label by the label prompt, chain by the reason prompt; or one post from "
                         "--image/--text")
    p.add_argument("--split", default="all", help="only posts of this split, where posts have one")
    p.add_argument("--decode", choices=("score", "greedy"), default="score",
                   help="label by scoring the three answers, or generated (the authors')")
    p.add_argument("--chain", action=yes_no, default=True, help="--no-chain writes labels only")
    p.add_argument("--max-new-tokens", type=int, default=512, help="of a chain (paper: 512)")
    p.add_argument("--shuffle-images", action="store_true",
                   help="control: deal the images anew among the posts")
    p.add_argument("--blank-text", action="store_true", help="control: remove the words")
    p.add_argument("--source", default="student", help="name of the writer in the rows")
    p.add_argument("--image", help="one post: its image"), p.add_argument("--text",
                                                                          help="one post: its text")
    p.add_argument("--aspect", help="one post: its target aspect")
    args = top.parse_args(argv)
    if args.stage == "predict" and not (args.text or (args.data and args.out)):
        top.error("predict needs --data and --out, or one post in --text (with --image, --aspect)")
    return args


# ---- shared
# --------------------------------------------------------------------------------------------


def posts_of(args, keep=lambda post: True):
    """Posts of --data and --split; unreadable rows go to <out>.rejects.jsonl, once."""
    rejects, posts = [], []
    for path in args.data:
        posts += read_posts(path, args.images, rejects)
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
        raise InputError(f"{', '.join(args.data)}: no post of split {split!r} that {args.stage} "
                         "can use")
    return posts


def fixed_batches(posts, size, done):
    """Batches of like length that are not wholly done. Their make-up depends on all posts, not on
    what is left, so a resumed run pads, samples and rounds as an uninterrupted one."""
    order = sorted(range(len(posts)), key=lambda i: (len(posts[i].cot or posts[i].text), i))
    for a in range(0, len(order), size):
        batch = [posts[i] for i in order[a : a + size]]
        if any(p.id not in done for p in batch):
            yield a // size, batch


def base_row(post, args, **more):
    return post.row() | dict(source=more.pop("source"), model=str(args.model)) | more


def closing(out, rejects=None):
    """The last line: rows written and set aside, counted in the files."""
    aside = sum(1 for _ in open(rejects or f"{out}.rejects.jsonl", "rb"))
    print(f"wrote {sum(1 for _ in open(out, 'rb'))} rows to {out} ({aside} set aside)")


# ---- stages
# --------------------------------------------------------------------------------------------


def toy(args):
    sizes = dict(train=args.train, dev=args.dev, test=args.test)
    posts = toy_posts(f"{args.out}/images", sizes, args.seed)
    warm = toy_warmup(f"{args.out}/images", args.warm, args.seed + 1)
    for name, rows in (("posts", posts), ("warmup", warm)):
        lines = "".join(json.dumps(p.row(), ensure_ascii=False) + "\n" for p in rows)
        write_atomic(f"{args.out}/{name}.jsonl",
                     lambda part: Path(part).write_text(lines, encoding="utf-8"))
    share = Counter(p.label for p in posts if p.split == "test")
    print(f"test labels: {dict(share)}\nwrote {len(posts)} posts and {len(warm)} warm-up rows to "
          f"{args.out}")


def local_teacher(args):
    """A model folder as teacher: answers requests in batches of equal temperature and token
    budget."""
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels or None)

    def ask(requests):
        answers, groups = [None] * len(requests), {}
        for i, r in enumerate(requests):
            groups.setdefault((r.temperature, r.max_tokens), []).append(i)
        for (temperature, budget), members in sorted(groups.items()):
            torch.manual_seed(int(digest(args.seed, temperature,
                                         [requests[i].post.id for i in members])[:8], 16))
            examples = [encode(requests[i].post, [("", None)], processor,
                               prompt=requests[i].messages[-1]["content"][-1]["text"])
                        for i in members]
            texts = generate_text(model, processor, examples, budget, temperature)
            for i, e, (text, finish) in zip(members, examples, texts):
                answers[i] = Answer(text, finish, len(e), len(processor.text_ids(text)))
        return answers

    return ask


def teacher(args):
    """paper: chain-of-thought enhancement. D_t = right stage-1 chains and label-explaining stage-2
    chains."""
    posts = posts_of(args, lambda p: p.label)
    if args.endpoint:
        one = Endpoint(args.endpoint, args.model, allow_http=args.allow_http)
    elif args.model == "toy":
        one = ToyTeacher(args.skill, args.seed)
    else:
        one = None
    ask = (lambda requests: [one(r) for r in requests]) if one else local_teacher(args)
    size, counts, rejects = (1 if args.endpoint
                             else args.batch), Counter(), f"{args.out}.rejects.jsonl"
    with RowWriter(args.out) as kept, RowWriter(rejects) as aside, tqdm(total=len(posts),
                                                                        desc="teacher", unit="post") as bar:
        for _, batch in fixed_batches(posts, size, kept.done | aside.done):
            began = time.time()
            dialogues = [two_stage_cot(p, args.max_tries, args.max_new_tokens, args.stage2)
                         for p in batch]
            rows = sorted(answer_all(dialogues,
                                     ask))  # by index: the file's order does not depend on retries
            for i, row in rows:
                post, attempts = batch[i], row.pop("attempts")
                if post.id in kept.done | aside.done:
                    continue
                row = base_row(post, args, source="teacher",
                               seconds=round((time.time() - began) / len(batch), 3), **row)
                if row["cot"]:
                    kept.write(row)
                else:
                    aside.write({k: v for k, v in row.items()
                                 if k != "cot"} | dict(attempts=attempts))
                counts["set aside" if not row["cot"] else f"stage {row['stage']}"] += 1
                counts["retries"] += max(0, row["tries"] - row["stage"])
                bar.set_postfix(counts, refresh=False)
            bar.update(len(batch))
    print("this run: " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    closing(args.out)


def augment(args):
    """paper: the assistant writes one more chain per training post; D_a keeps those whose
    prediction is right."""
    posts = posts_of(args, lambda p: p.label)
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels or None)
    with RowWriter(args.out) as kept, RowWriter(f"{args.out}.rejects.jsonl") as aside, tqdm(total=len(posts), desc="augment", unit="post") as bar:
        for n, batch in fixed_batches(posts, args.batch, kept.done | aside.done):
            began = time.time()
            torch.manual_seed(args.seed * 100_003 + n)
            examples = [encode(p, [(task_format("reason"), None)], processor) for p in batch]
            for post, (text, finish) in zip(batch,
                                            generate_text(model, processor, examples,
                                                          args.max_new_tokens, args.temperature)):
                parsed = parse_reasoning(text)
                problem = "truncated" if finish == "length" else parsed.problem
                if problem is None and parsed.prediction != post.label:
                    problem = f"predicts {parsed.prediction}, label is {post.label}"
                row = base_row(post, args, source="assistant", raw=text,
                               prediction=parsed.prediction, problem=problem,
                               stage=1, tries=1, seconds=round((time.time() - began) / len(batch), 3))
                row.pop("cot", None)
                if post.id in kept.done | aside.done:
                    continue
                (aside if problem else kept).write(row if problem
                                                   else row | dict(cot=render_reasoning(parsed.fields)))
            bar.update(len(batch))
    closing(args.out)


@torch.no_grad()
def soft(args):
    """The assistant's softened distributions for both training tasks of every row, taken in eval
    mode."""
    posts = []
    for path in args.data:
        posts += [p for p in read_posts(path, args.images, []) if p.label and p.cot]
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels or None)
    assistant, tokenizer = fingerprint(model, processor.tokenizer)
    vocab = min(len(processor.tokenizer),
                model.lm_head.weight.shape[0])  # ids that mean something in every model size
    cache = SoftLabels(args.out,
                       dict(assistant=assistant, tokenizer=tokenizer, temperature=args.temperature,
                                      top_k=args.top_k, positions=args.kl_positions, vocab=vocab))
    order = sorted(range(len(posts)), key=lambda i: (len(posts[i].cot), i))
    everywhere = args.kl_positions == "all"
    for a in tqdm(range(0, len(order), args.batch), desc="soft", unit="batch"):
        rows = [posts[i] for i in order[a : a + args.batch]]
        rows = [p for p in rows if len(processor.text_ids(p.cot)) < args.max_answer]
        examples = [encode(p, chain_branches(p.cot, p.label), processor) for p in rows]
        names = [SoftLabels.names(e) for e in examples]
        if all(n in cache.index for each in names for n in each[not everywhere :]):
            continue
        batch = collate(examples, processor.pad).to(args.device)
        hidden, entries = forward_branches(model, batch), {}
        at = (batch.branch >= 0) if everywhere else (batch.targets != -100)
        logits = model.lm_head(hidden[at])[:, :vocab]
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
    print(f"wrote {len(cache.index)} entries, {tokens} positions, {size / max(tokens, 1):.0f} "
          f"bytes each, to {args.out}")


def controlled(posts, args):
    """The two controls: images dealt anew, words removed. Each breaks one modality and leaves the
    other."""
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
    """[(label, probs or None, raw label answer or None, chain text or None, finish)] of a batch."""
    if args.decode == "score":
        batch = collate([encode(p, label_branches(), processor) for p in posts],
                        processor.pad).to(args.device)
        probs = score_labels(model, batch).exp().tolist()
        labels = [(LABELS[max(range(3), key=row.__getitem__)], row, None) for row in probs]
    else:
        asked = [encode(p, [(task_format("label"), None)], processor) for p in posts]
        labels = [(parse_reasoning(text).prediction, None, text) for text,
                  _ in generate_text(model, processor, asked, 32)]
    chains = [(None, None)] * len(posts)
    if args.chain:
        asked = [encode(p, [(task_format("reason"), None)], processor) for p in posts]
        chains = generate_text(model, processor, asked, args.max_new_tokens)
    return [(*one, *chain) for one, chain in zip(labels, chains)]


def predict(args):
    """paper: labels from the label prompt, chains from a separate generation with the reason
    prompt."""
    if args.text:
        return predict_one(args)
    posts = controlled(posts_of(args), args)
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels or None)
    with RowWriter(args.out) as kept, tqdm(total=len(posts), desc="predict", unit="post") as bar:
        for _, batch in fixed_batches(posts, args.batch, kept.done):
            began = time.time()
            for post, (label, probs, answer, chain, finish) in zip(batch,
                                                                   predict_batch(args, model,
                                                                                 processor, batch)):
                if post.id in kept.done:
                    continue
                row = base_row(post, args, source=args.source, prediction=label)
                row.pop("cot", None)
                row |= {} if probs is None else dict(probs=[round(p, 6) for p in probs])
                row |= {} if answer is None else dict(raw_label=answer)
                if chain is not None:
                    parsed = parse_reasoning(chain)
                    row |= dict(raw=chain, chain_prediction=parsed.prediction,
                                problem="truncated" if finish == "length" else parsed.problem,
                                tokens=len(processor.text_ids(chain)))
                kept.write(row | dict(seconds=round((time.time() - began) / len(batch), 4)))
            bar.update(len(batch))
    closing(args.out)


def predict_one(args):
    """One post from the shell: its chain, its label and the label's probability."""
    if args.image:
        load_image(args.image)
    post = Post("1", args.text, args.image, args.aspect)
    model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels or None)
    label, probs, answer, chain, _ = predict_batch(args, model, processor, [post])[0]
    if chain is not None:
        print(chain + "\n")
    sure = f" ({max(probs):.1%})" if probs else ""
    print(f"label: {label or f'none in {answer!r}'}{sure}")


def main(argv=None):
    args = parse_args(argv)
    return run_stage(dict(toy=toy, teacher=teacher, augment=augment, soft=soft,
                          predict=predict)[args.stage], args)


if __name__ == "__main__":
    sys.exit(main())
