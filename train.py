"""Train with MulCoT-RD: an assistant on a teacher's chains, a student on chains and soft labels.

    python train.py                              the whole road on the embedded default, offline
    python train.py assistant --data chains.jsonl --dev dev.tsv --images img --out runs/assistant \\
        --model Qwen/Qwen2.5-VL-7B-Instruct
    python train.py student --data chains.jsonl augmented.jsonl --dev dev.tsv --images img \\
        --soft soft --model Qwen/Qwen2.5-VL-3B-Instruct --out runs/student
    python train.py readout --data label.csv --dev label.csv --target score --out runs/readout \\
        --model Qwen/Qwen2.5-Omni-7B
    python train.py ubm --data train.tsv --dev dev.tsv --images img --out runs/ubm \\
        --text-encoder sentence-transformers/all-MiniLM-L6-v2

Last line: `best dev accuracy 0.930 (macro F1 0.912) at step 120: runs/student/best`. Reads rows
with `cot` and `label` as generate.py writes them. Writes into --out: config.json, log.jsonl,
lora_modules.json, set_aside.json, state.pt (to resume from), best/ and last/ (adapters, a readout's
head with them; base: last/ is a whole model, from the random one in init/). Killed and run again
with the same command it goes on and ends with the same result.
"""

import argparse
import json
import math
import os
import re
import runpy
import shlex
import shutil
import statistics
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mulcot import (
    LABELS, SCORES, SYSTEM, TINY, TINY_OMNI, Help, InputError, NF4Linear, Readout, Shelf,
    SoftLabels, add_lora, build_messages, check_settings, chunked_ce_kl, class_targets, collate,
    digest, encode, fit_temperature, forward_branches, gather, iter_posts, join_ranks,
    label_example, load_model, load_processor, mark_aspect, multitask_loss, new_ubm, of_split,
    positive, ranks, read_out, read_posts, read_rows, readout_branches, readout_loss, refuse_ranks,
    regression_metrics, render_label, render_score, run_stage, save_adapter, save_readout,
    save_ubm, score_labels, seed_everything, show_tokens, sum_gradients, task_format, tell_aside,
    tiny_model, tiny_tokenizer, tokenizer_hash, training_branches, wait_for_ranks, without,
    write_atomic, write_json)


def parse_args(argv=None):
    """The command line."""
    yes_no = argparse.BooleanOptionalAction
    top = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=Help,
        epilog="Without a stage: every stage in turn on the embedded default. "
               "`train.py STAGE --help` lists a stage's flags with the paper's values.")
    top.add_argument("--out", default="runs/demo", help="without a stage: where everything lands")
    top.add_argument("--seed", type=int, default=42, help="without a stage: of all that is drawn")
    stages = top.add_subparsers(dest="stage", metavar="{base,assistant,student,readout,"
                                                      "ubm,ablate}")
    abouts = {"base": "warm up a random tiny model (stands where pre-training would)",
              "assistant": "both tasks on the teacher's chains",
              "student": "both tasks on all chains, from hard and soft labels",
              "readout": "a score or label read off the last hidden state (arXiv 2606.05713)"}
    ubm_flags(stages)
    ablate_flags(stages)
    for stage, about in abouts.items():
        p = stages.add_parser(stage, help=about, description=about, formatter_class=Help)
        flag = p.add_argument
        needed = stage != "readout"  # its --compare brings its own
        flag("--data", nargs="+", required=needed, metavar="ROWS",
             help="rows with cot and label" if needed else "posts with scores or labels")
        flag("--images", help="images folder (default: images/ beside the rows, else their folder)")
        flag("--out", required=needed, help="folder for adapters, log and resume state")
        flag("--seed", type=int, default=42, help="of data order, dropout, new weights (paper: 42)",
             **(dict(nargs="+") if stage == "readout" else {}))
        flag("--epochs", type=positive, default=20, help="passes over the data (paper: 20)")
        flag("--batch", type=positive, default=2, help="posts per micro-batch (paper: 2)")
        flag("--accumulate", type=positive, default=20, help="micro-batches per step (paper: 20)")
        flag("--lr", type=float, default=3e-4, help="peak rate of AdamW (paper: 3e-4)")
        flag("--beta2", type=float, default=0.999, help="of AdamW; 0.99 suits short runs")
        flag("--schedule", choices=("plateau", "cosine"), default="plateau",
             help="plateau: halve at the 3rd epoch in a row without better dev accuracy (paper: "
                  "patience 2); cosine: to 0")
        flag("--warmup", type=float, default=0.0, help="share of steps with rising rate (paper: 0)")
        flag("--clip", type=float, default=1.0, help="gradient norm cap, 0 for none (paper: none)")
        flag("--save-every", type=int, default=0, help="resume point each N steps, not just epochs")
        flag("--log-every", type=positive, default=10, help="steps per log line")
        flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
             help="cpu, cuda or cuda:1")
        flag("--gradient-checkpointing", action=yes_no, default=False, help="less memory, slower")
        flag("--show", type=int, default=0, metavar="N",
             help="print N examples with the supervised tokens in green, and stop")
        if stage == "base":
            flag("--size", choices=(*TINY, *TINY_OMNI), required=True,
                 help="which embedded tiny model")
            continue
        flag("--dev", required=needed,
             help="posts to select on (split dev, where splits are given)")
        flag("--model", required=needed, help="hub name or folder (paper: Qwen2.5-VL-7B, then 3B)")
        flag("--nf4", action=yes_no, default=False, help="quantise the frozen base to 4 bits")
        flag("--rank", type=positive, default=16, help="of LoRA (paper: 16)")
        flag("--alpha", type=float, default=32, help="of LoRA (paper: 32)")
        flag("--dropout", type=float, default=0.2 if stage == "assistant" else 0.05,
             help="on LoRA's inputs (paper: 0.2 assistant, 0.05 student)")
        flag("--scope", choices=("language", "all"), default="language",
             help="what LoRA adapts; all: the vision tower's MLPs too, as the authors do")
        flag("--max-pixels", type=int, default=0,
             help="image size cap, 0: the model's own (paper: 280 * 280 = 78400)")
        flag("--ties", choices=("macro", "weighted"), default="macro",
             help="F1 that breaks ties in dev accuracy (paper: macro Twitter, weighted MVSA)")
        if stage == "readout":
            flag("--target", choices=("score", "label"), default="score", help="what is read")
            flag("--how", choices=("read", "generate"), default="read",
                 help="generate: its rival, which writes the score as text")
            flag("--without", nargs="*", choices=("frames", "audio"), default=[],
                 help="inputs to leave out, in training and ever after")
            flag("--compare", action="store_true", help="both readouts over all sets of inputs, in "
                 "one table; without --model on an embedded default of its own")
            flag("--head-lr", type=float, default=1e-3, help="peak rate of the head (paper: 1e-3)")
            p.description += ("; (paper: ...) is MulCoT-RD's but for --head-lr; defaults are this "
                              "one's, epochs, batch and schedule ours")
            p.set_defaults(rank=32, dropout=0.1, lr=2e-4, epochs=10, batch=4, accumulate=8,
                           schedule="cosine", warmup=0.1, seed=[42])
            continue
        flag("--reasoning-weight", type=float, default=0.8, help="λ_rea (paper: 0.8)")
        flag("--label-weight", type=float, default=0.2, help="λ_cls (paper: 0.2)")
        flag("--reasoning", action=yes_no, default=True, help="--no-reasoning: label task alone")
        flag("--max-answer", type=int, default=512,
             help="longest chain in tokens; longer rows are set aside (paper: 512)")
        if stage == "student":
            flag("--soft", help="folder of generate.py soft; or say --no-soft")
            flag("--no-soft", action="store_true", help="hard labels only (ablation)")
            flag("--augment", action=yes_no, default=True,
                 help="--no-augment leaves the assistant's chains out (ablation)")
            flag("--lam", type=float, default=0.3, help="λ, weight of the soft labels (paper: 0.3)")
            flag("--t-squared", action=yes_no, default=False,
                 help="Hinton's τ² on the KL term (the authors: off)")
    args = top.parse_args(argv)
    if args.stage == "student" and not args.no_soft and not args.soft:
        top.error("student needs --soft FOLDER (from generate.py soft) or --no-soft")
    if args.stage == "readout" and (args.target, args.how) == ("label", "generate"):
        top.error("--how generate is for --target score; labels are generated by the student")
    if args.stage == "readout":
        args.out = args.out or ("runs/compare" if args.compare else None)
        given = [bool(x) for x in (args.data, args.dev, args.model)]
        if not args.out or not all(given) and not (args.compare and not any(given)):
            top.error("readout needs --data, --dev, --model and --out, or --compare alone")
    return args


def ablate_flags(stages):
    """The command line of the ablations."""
    about = "the paper's ablations on toy posts: table.md with mean ± deviation and p against full"
    p = stages.add_parser("ablate", help=about, description=about, formatter_class=Help)
    p.add_argument("--out", default="runs/ablate", help="where everything lands")
    p.add_argument("--seeds", type=positive, default=3, help="runs of each setting")
    p.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")


def ubm_flags(stages):
    """The flags of `ubm`. choice: the whole recipe; the number of runs is not settled on dev."""
    about = "small classifier for the cascade: short runs, their weights averaged, calibrated"
    p = stages.add_parser("ubm", help=about, description=about, formatter_class=Help)
    flag = p.add_argument
    flag("--data", nargs="+", required=True, metavar="POSTS", help="posts with label (or score)")
    flag("--dev", required=True, help="posts to select and calibrate on (split dev, if given)")
    flag("--images", help="images folder (default: images/ beside the posts, else their folder)")
    flag("--out", required=True, help="folder for the model, its log and resume state")
    flag("--text-encoder", required=True, help="hub name or folder, or tiny: a random one")
    flag("--image-encoder", help="hub name or folder, or small: four convolutions (default: none)")
    flag("--bins", type=int, choices=(7,), help="learn `score` in [-3, 3] as so many classes")
    flag("--seed", type=int, default=42, help="of data order, dropout, new weights")
    flag("--members", type=positive, default=3, help="runs that part after their first epoch")
    flag("--epochs", type=positive, default=3, help="of each run; dev chooses among them")
    flag("--batch", type=positive, default=32, help="posts per step")
    flag("--lr", type=float, default=1e-4, help="of the pretrained encoders, falling to 0")
    flag("--head-lr", type=float, default=1e-3, help="of new layers, falling to 0")
    flag("--decay", type=float, default=0.98, help="of the running average of the weights")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
         help="cpu, cuda or cuda:1")


# ---- data --------------------------------------------------------------------------------------


def training_items(args, processor):
    """(post, branches) of all rows, on a Shelf; what cannot be used is set aside with its
    reason."""
    items, aside = Shelf(), []
    for path in args.data:
        for post in iter_posts(path, args.images, aside, may_be_empty=len(args.data) > 1):
            branches, problem = usable(args, post, processor)
            if problem:
                aside.append((f"{path}: {post.id}", problem))
            elif branches:
                post = without(post, args.without) if args.stage == "readout" else post
                items.append((post, branches), sum(len(a or "") for _, a in branches))
    tell_aside(aside, f"rows in all, reasons in {args.out}/set_aside.json")
    if aside and ranks()[0] == 0:
        write_json(Path(args.out, "set_aside.json"), aside)
    if not items:
        raise InputError(f"{', '.join(args.data)}: no row that the {args.stage} stage can train on")
    return items


def usable(args, post, processor):
    """(the post's branches, or None; why not, or None where a flag leaves the row out)."""
    if args.stage == "base":
        branches = post.extra.get("branches")
        return branches, None if branches else "no branches: the base stage reads warmup.jsonl"
    if args.stage == "readout":
        if post.split in ("dev", "test"):  # MOSI's and MOSEI's label files hold all splits
            return None, None
        if getattr(post, args.target) is None:
            return None, f"no {args.target}"
        if args.how == "generate":
            return [(task_format("score"), render_score(post.score))], None
        return readout_branches(args.target), None
    if post.split in ("dev", "test"):
        return None, f"split {post.split} is not for training"
    if args.stage == "student" and not args.augment and post.extra.get("source") == "assistant":
        return None, None
    return training_branches(post, processor, args.max_answer, args.reasoning)


def dev_posts(args):
    """Labelled posts to select on: those of split dev, or all where no row has a split."""
    aside = []
    target = args.target if args.stage == "readout" else "label"
    posts = [p for p in read_posts(args.dev, args.images, aside)
             if getattr(p, target) is not None]
    tell_aside(aside, "of the dev rows")
    chosen = of_split(posts, "dev")
    if not chosen:
        raise InputError(f"{args.dev} has no post of split dev with a {target} to select on")
    return chosen


def epoch_steps(lengths, size, epoch, seed, window=4):
    """Which items make up each optimiser step of an epoch: shuffled, sorted by length within
    windows of a few steps, so that little is padded, and the steps shuffled again. A function of
    its arguments alone: a resumed run goes on with the right posts and decodes no image."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order, steps = torch.randperm(len(lengths), generator=generator).tolist(), []
    for a in range(0, len(order), window * size):
        alike = sorted(order[a : a + window * size], key=lambda i: lengths[i])
        steps += [alike[b : b + size] for b in range(0, len(alike), size)]
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


# ---- the loss of each stage --------------------------------------------------------------------


def kl_positions(batch, k, everywhere):
    """Where branch k's KL is taken (B, T): its response tokens, or every token of prompt, image and
    answer (never padding)."""
    if everywhere:
        return (batch.branch == 0) | (batch.branch == k)
    return (batch.targets != -100) & (batch.branch == k)


def token_counts(batches, everywhere=False):
    """({branch: supervised tokens}, {branch: KL positions}, posts) of a whole optimiser step, over
    all processes. trap: to divide by each micro-batch's own count would make 1 x 8 differ from
    8 x 1."""
    ce, kl = Counter(), Counter()
    for b in batches:
        for k in range(1, int(b.branch.max()) + 1):
            ce[k] += int(kl_positions(b, k, False).sum())
            kl[k] += int(kl_positions(b, k, everywhere).sum())
    ces, kls, posts = zip(*gather((ce, kl, sum(len(b.ids) for b in batches))))
    return sum(ces, Counter()), sum(kls, Counter()), sum(posts)


def gold_of(args, post):
    """What a readout is to say of a post: its score, or its label's number."""
    return float(post.score) if args.target == "score" else LABELS.index(post.label)


def soft_targets(soft, examples, k, everywhere, device):
    """The soft labels of branch k, in the order of the batch's positions, as soft_kl takes them."""
    entries = []
    for names in map(SoftLabels.names, examples):
        entries += [soft.read(names[0])] if everywhere else []
        entries.append(soft.read(names[k]))
    parts = [torch.cat(parts).to(device) for parts in zip(*entries)]
    return parts if soft.head is None else (parts[0].to(soft.head.dtype), soft.head)


def step_loss(args, model, batch, examples, soft, counts):
    """One micro-batch's share of the loss -> (loss, {name: float}). Stages differ only here: base
    has three equal tasks, assistant two weighted ones, student the same with soft labels, a readout
    the distance of what it reads, or one task where it generates."""
    hidden, weight = forward_branches(model, batch), model.lm_head.weight
    if args.stage == "readout" and args.how == "read":
        out, about = model.readout(hidden, batch.branch >= 0), model.readout.about
        gold = torch.tensor([gold_of(args, e.post) for e in examples], device=out.device)
        loss = readout_loss(out, gold, about["mean"], about["deviation"]) / counts[2]
        return loss, {"loss": loss.item()}
    if args.stage == "readout":
        tasks = ("score",)
    elif args.stage == "base":
        tasks = ("describe", "write", "name")
    else:
        tasks = ("reason", "label") if args.reasoning else ("label",)
    everywhere = soft is not None and soft.about["positions"] == "all"
    losses, parts = [], {}
    for k, task in enumerate(tasks, 1):
        at = kl_positions(batch, k, everywhere)
        targets = batch.targets[at]  # (N,)
        weights = (targets != -100).float() / counts[0][k]
        distil = {}
        if soft is not None:
            tau = soft.about["temperature"]
            share = (tau**2 if args.t_squared else 1) / counts[1][k]
            distil = dict(soft=soft_targets(soft, examples, k, everywhere, hidden.device),
                          lam=args.lam, temperature=tau, vocab=soft.about["vocab"],
                          kl_weights=torch.full_like(weights, share))
        loss, terms = chunked_ce_kl(hidden[at], weight, targets.clamp(min=0), weights, **distil)
        losses.append(loss)
        parts[f"ce_{task}"] = terms["ce"]
        if distil:
            parts[f"kl_{task}"] = terms["kl"]
    if len(tasks) == 2:
        loss = multitask_loss(*losses, args.reasoning_weight, args.label_weight)
    else:
        loss = sum(losses) / len(losses)
    told = torch.stack([loss.detach(), *parts.values()]).tolist()  # a GPU is waited for once
    return loss, dict(zip(("loss", *parts), told))


# ---- the loop ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(args, model, processor, posts, batch=16):
    """(accuracy, macro or weighted F1) on dev posts by label scoring, or by the readout; of scores
    (-MAE, correlation). More is better."""
    model.eval()
    (rank, world), share, said = ranks(), [], [None] * len(posts)
    mine = posts[rank::world]
    for i in range(0, len(mine), batch):
        if args.stage == "readout":
            rows = read_out(model, processor, mine[i : i + batch])
            share += [row["score" if args.target == "score" else "prediction"] for row in rows]
            continue
        examples = [label_example(p, processor) for p in mine[i : i + batch]]
        scores = score_labels(model, collate(examples, processor.pad).to(model.device))
        share += [LABELS[j] for j in scores.argmax(-1).tolist()]
    model.train()
    for r, part in enumerate(gather(share)):
        said[r::world] = part
    if reads_scores(args):
        far = [6.0 if s is None else abs(s - p.score) for s, p in zip(said, posts)]
        metrics = regression_metrics([p.score for p in posts], said)
        return -sum(far) / len(far), metrics["corr"] or 0.0  # choice: no number is as far as can be
    return accuracy_f1([p.label for p in posts], said, args.ties == "weighted")


def accuracy_f1(gold, said, weighted=False):
    """(accuracy, macro or weighted F1) of labels."""
    right = Counter(g for g, s in zip(gold, said) if g == s)
    golds, saids, f1 = Counter(gold), Counter(said), 0.0
    for x in LABELS:
        share = golds[x] / len(gold) if weighted else 1 / len(LABELS)
        f1 += share * 2 * right[x] / max(1, golds[x] + saids[x])
    return right.total() / len(gold), f1


def reads_scores(args):
    """Whether this stage is judged by regression, not by classification."""
    return args.stage == "readout" and args.target == "score"


def build(args, folder, items):
    """(model in train mode, processor, what is trained {name: parameter})."""
    if args.stage == "base":  # all weights are trained: in fp32, also on a GPU
        model, processor = load_model(folder, args.device, torch.float32)
        model.requires_grad_(True)
    else:
        model, processor = load_model(folder, args.device, max_pixels=args.max_pixels, nf4=args.nf4)
        names = add_lora(model, args.rank, args.alpha, args.dropout, scope=args.scope)
        if ranks()[0] == 0:
            write_json(Path(args.out, "lora_modules.json"), names)
        kinds = Counter(name.rpartition(".")[2] for name in names)
        print(f"lora       {', '.join(f'{n} {k}' for k, n in kinds.items())}; all {len(names)} "
              f"names in {args.out}/lora_modules.json")
    if args.stage == "readout":
        about = dict(target=args.target, how=args.how, without=args.without)
        if args.target == "score":
            scores = torch.tensor([post.score for post, _ in items], dtype=torch.float64)
            about |= dict(mean=scores.mean().item(),
                          deviation=scores.std(correction=0).item() or 1.0)
        model.readout = Readout(model.lm_head.in_features, about).to(args.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count, total = (sum(p.numel() for p in ps) for ps in (trained.values(), model.parameters()))
    total += sum(2 * m.codes.numel() for m in model.modules() if isinstance(m, NF4Linear))
    print(f"trainable  {count:,} of {total:,} parameters ({count / total:.2%})")
    return model.train(), processor, trained


def random_init(args):
    """The folder of the random tiny model that the base stage starts from, made on first use."""
    init = Path(args.out, "init")
    if not init.exists() and ranks()[0] == 0:
        corpus = [render_label(x) for x in LABELS]
        for post in read_posts(args.data[0], args.images):
            corpus += [part for branch in post.extra.get("branches", []) for part in branch]
            for task in ("score",) if args.size in TINY_OMNI else ("reason", "label"):
                prompt = build_messages(post, task)[0]["content"][-1]["text"]
                corpus.append(f"{SYSTEM}\nsystem\nuser\n{prompt}\nassistant\n")
        shutil.rmtree(f"{init}.part", ignore_errors=True)
        tokenizer = tiny_tokenizer(corpus, omni=args.size in TINY_OMNI)
        tiny_model(f"{init}.part", args.size, tokenizer, args.seed)
        os.replace(f"{init}.part", init)
    wait_for_ranks()
    return init


def open_soft(args, processor, model):
    """The soft labels to train with, or None; those of another tokenizer are refused."""
    if args.stage != "student" or args.no_soft or args.lam == 0:
        return None
    soft = SoftLabels(args.soft)
    if soft.about["tokenizer"] != tokenizer_hash(processor.tokenizer):
        raise InputError(f"{args.soft} was made with another tokenizer than {args.model} has: "
                         "equal ids would be other words; use an assistant of its family, or "
                         "--no-soft")
    rows = model.lm_head.weight.shape[0]
    assert soft.about["vocab"] <= rows, (soft.about["vocab"], rows)
    soft.load_head(args.device)
    return soft


class Log:
    """One fixed-field line per interval, the same row in log.jsonl; later rows go on resume."""

    def __init__(self, path, step, sums):
        self.path, self.sums, self.started, self.tokens = path, sums, time.time(), 0
        if ranks()[0]:
            self.path = os.devnull
            return
        rows = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        write_atomic(path, lambda part: Path(part).write_text("".join(rows)))

    def add(self, terms, tokens):
        self.tokens += tokens
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def line(self, **row):
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
        tqdm.write("  ".join(f"{k} {v}" for k, v in zip(row, shown)))

    def interval(self, steps, epoch, step, **more):
        """The means of the last `steps` steps."""
        means = {k: v / steps for k, v in self.sums.items()}
        speed = round(self.tokens / (time.time() - self.started))
        self.line(step=step, epoch=round(epoch, 2), **means, **more, tokens_per_s=speed)
        self.sums, self.started, self.tokens = {}, time.time(), 0


def rate_groups(args, trained):
    """Parameter groups, each with its peak rate: a readout's head has its own."""
    head = [p for name, p in trained.items() if name.startswith("readout.")]
    groups = [dict(params=[p for name, p in trained.items() if not name.startswith("readout.")],
                   lr=args.lr, peak=args.lr)]
    return groups + ([dict(params=head, lr=args.head_lr, peak=args.head_lr)] if head else [])


def learning_rate(args, step, total):
    """Which share of its peak a rate has at step `step`, or None where the plateau schedule has
    it."""
    rise = min(1.0, (step + 1) / max(1.0, args.warmup * total))
    if args.schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * step / total))
    return rise if step <= args.warmup * total else None


FREE = ("out", "show", "device", "log_every", "images")  # settings that may change in a rerun


def train(args):
    """The one loop: micro-batches -> clip -> step -> log; at each epoch's end evaluate and save."""
    if args.show:
        return show_examples(args)
    args.device, (rank, world) = join_ranks(args.device), ranks()
    out, state_file = Path(args.out), Path(args.out, "state.pt")
    folder = random_init(args) if args.stage == "base" else args.model
    items = training_items(args, load_processor(folder, getattr(args, "max_pixels", None)))
    dev = dev_posts(args) if args.stage != "base" else []
    settings = {k: v for k, v in vars(args).items() if k not in FREE} | {
        "rows": digest([digest(p.id, b) for p, b in items]),
        "dev_rows": digest([p.id for p in dev])}
    if rank == 0:
        check_settings(out / "config.json", settings, state_file.exists())
    print("settings   " + "  ".join(f"{k}={v}" for k, v in settings.items()))
    state = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if state and state["finished"]:
        print(f"finished   {out} is complete; delete it to train anew\n{state['finished']}")
        return state["best"]
    seed_everything(args.seed)
    model, processor, trained = build(args, folder, items)
    soft = open_soft(args, processor, model)
    size = args.batch * args.accumulate
    per_epoch = math.ceil(len(items) / size)
    total = per_epoch * args.epochs
    print(f"data       {len(items)} rows, {len(dev)} dev posts, {per_epoch} steps an epoch, "
          f"{total} in all" + (f"; {world} processes share each step" if world > 1 else ""))
    if rank:  # choice: each process draws its own dropout
        torch.manual_seed(args.seed + 7919 * rank)
    optimizer = torch.optim.AdamW(rate_groups(args, trained), betas=(0.9, args.beta2))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2,
                                                         min_lr=1e-6)
    step, best, sums = 0, [-math.inf, -math.inf, 0], {}
    if state:
        step, best, sums = state["step"], state["best"], state["sums"]
        restore(state, trained, optimizer, plateau)
        print(f"resumed    at step {step}")
    log = Log(out / "log.jsonl", step, sums)

    def save(finished=None):
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        drawn = gather((torch.get_rng_state(), cuda))
        values = dict(step=step, best=best, sums=log.sums, finished=finished, drawn=drawn,
                      optimizer=optimizer.state_dict(), plateau=plateau.state_dict(),
                      trained={k: p.detach().cpu() for k, p in trained.items()})
        if rank == 0:
            write_atomic(state_file, lambda part: torch.save(values, part))

    bar = tqdm(total=total, initial=step, desc=args.stage, unit="step", mininterval=1,
               disable=rank > 0)
    epoch, steps = None, []
    on_gpu = str(args.device).startswith("cuda")
    while step < total:
        if (rate := learning_rate(args, step, total)) is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            steps = epoch_steps(items.sizes, size, epoch, args.seed)
        mine = steps[step % per_epoch][rank::world]  # this process's share
        examples = [encode(*items[i], processor) for i in mine]
        examples.sort(key=len)  # like lengths in a micro-batch, less padding
        micro = [examples[i : i + args.batch] for i in range(0, len(examples), args.batch)]
        batches = [collate(part, processor.pad) for part in micro]
        counts = token_counts(batches, soft is not None and soft.about["positions"] == "all")
        terms = {}
        for part, batch in zip(micro, batches):
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss, shown = step_loss(args, model, batch.to(args.device), part, soft, counts)
            loss.backward()
            terms = {k: terms.get(k, 0.0) + v for k, v in shown.items()}
        sum_gradients(list(trained.values()))
        for share in gather((terms, sum(map(len, examples)))):
            log.add(*share)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip or math.inf).item()
        if not math.isfinite(norm) or not math.isfinite(log.sums["loss"]):
            bar.close()
            raise InputError(f"step {step + 1}: loss {log.sums['loss']}, gradient norm {norm}: "
                             "training diverged; lower --lr or set --clip; the last whole state "
                             f"is in {out}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if step % args.log_every == 0 or step == total:
            log.interval((step - 1) % args.log_every + 1, step / per_epoch, step, grad_norm=norm,
                         lr=optimizer.param_groups[0]["lr"])
        if step % per_epoch == 0 and dev:
            first, second = evaluate(args, model, processor, dev)
            log.line(step=step, **(dict(dev_mae=-first, dev_corr=second) if reads_scores(args) else
                                   dict(dev_accuracy=first, dev_f1=second)))
            if args.schedule == "plateau":
                plateau.step(first)
            if [first, second] > best[:2]:
                best = [first, second, step]
                save_trained(model, processor, out / "best")
            save_trained(model, processor, out / "last")
        if step % per_epoch == 0 or (args.save_every and step % args.save_every == 0):
            save()
    bar.close()
    if args.stage == "base":
        save_base(model, processor, out)
        closing = f"base model after {total} steps: {out}/last"
    else:
        closing = (f"best dev MAE {-best[0]:.3f} (Corr {best[1]:.3f})" if reads_scores(args) else
                   f"best dev accuracy {best[0]:.3f} ({args.ties} F1 {best[1]:.3f})")
        closing += f" at step {best[2]}: {out}/best"
    save(closing)
    print(f"rows {len(items)}  steps {total}\nlog {out}/log.jsonl  config {out}/config.json")
    print(closing)
    return best


def save_trained(model, processor, folder):
    """The adapter with the image size it was trained with, and a readout's head."""
    if ranks()[0]:
        return
    save_adapter(model, folder)
    processor.image_processor.save_pretrained(folder)
    if hasattr(model, "readout"):
        save_readout(model.readout, folder)


def restore(state, trained, optimizer, plateau):
    """Weights, optimiser, schedule and random numbers as they were."""
    for name, p in trained.items():
        p.data.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    plateau.load_state_dict(state["plateau"])
    drawn = state["drawn"]  # by each process; there may be more of them now
    rng, cuda = drawn[ranks()[0] % len(drawn)]
    torch.set_rng_state(rng)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def show_examples(args):
    """Prints the first training examples as the model sees them."""
    folder = random_init(args) if args.stage == "base" else args.model
    processor = load_processor(folder, getattr(args, "max_pixels", None))
    for post, branches in islice(training_items(args, processor), args.show):
        example = encode(post, branches, processor)
        print(show_tokens(collate([example], processor.pad), processor.tokenizer))


def save_base(model, processor, out):
    """The warmed-up model as an ordinary folder, whole or not there."""
    if ranks()[0]:
        return
    part, last = Path(out, "last.part"), Path(out, "last")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.tokenizer.save_pretrained(part)
    processor.image_processor.save_pretrained(part)
    shutil.rmtree(last, ignore_errors=True)
    os.replace(part, last)


# ---- the readout -------------------------------------------------------------------------------


def readout(args):
    """A run for each --seed, in a folder of its own where there are several; then their mean and
    deviation."""
    if args.compare:
        return compare(args)
    seeds, out, bests = args.seed, args.out, []
    for args.seed in seeds:
        args.out = out if len(seeds) == 1 else f"{out}/seed-{args.seed}"
        bests.append(train(args))
    if len(seeds) > 1 and not args.show:
        names = ("MAE", "Corr") if reads_scores(args) else ("accuracy", f"{args.ties} F1")
        figures = [[abs(b[0]) for b in bests], [b[1] for b in bests]]
        print(f"best dev over {len(seeds)} seeds: " + ", ".join(
            f"{name} {statistics.mean(xs):.3f} ± {statistics.stdev(xs):.3f}"
            for name, xs in zip(names, figures)) + f": {out}/seed-*/best")


INPUTS = {"text": "--without frames audio", "text + frames": "--without audio",
          "text + frames + audio": ""}


def compare_commands(args):
    """{(readout, inputs): [the commands that train and ask it]}, all with the same backbone, data,
    LoRA and budget; under (None, None) what the embedded default needs first."""
    out, seed, runs = args.out, args.seed[0], {}
    data, dev, model, flags = args.data, args.dev, args.model, "batch accumulate epochs lr".split()
    if not model:
        data, dev, model = [f"{out}/posts.jsonl"], f"{out}/posts.jsonl", f"{out}/base/last"
        runs[None, None] = [
            f"generate.py toy --clips --seed {seed} --out {out}",
            f"train.py base --size omni --data {out}/warmup.jsonl --epochs 3 --lr 0.002 --batch 16 "
            f"--accumulate 1 --beta2 0.99 --log-every 40 --seed {seed} --out {out}/base"]
        settings = ("--batch 8 --accumulate 1 --beta2 0.99 --epochs 6 --lr 0.003 --head-lr 0.002 "
                    "--dropout 0.05")
    else:
        flags += "head_lr beta2 schedule warmup clip rank alpha dropout scope max_pixels".split()
        settings = " ".join(f"--{k.replace('_', '-')} {getattr(args, k)}" for k in flags)
        settings += " --nf4" * args.nf4 + " --gradient-checkpointing" * args.gradient_checkpointing
    images = f" --images {shlex.quote(args.images)}" if args.images else ""
    for n, (inputs, left_out) in enumerate(INPUTS.items()):
        for how in ("read", "generate"):
            run = shlex.quote(f"{out}/{how}-{n}")
            runs[how, inputs] = [
                f"train.py readout --data {shlex.join(data)} --dev {shlex.quote(dev)}{images} "
                f"--model {shlex.quote(model)} --how {how} {settings} --log-every 40 --seed {seed} "
                f"--device {args.device} --out {run} {left_out}".rstrip(),
                f"generate.py predict --data {shlex.quote(dev)}{images} --split test "
                f"--device {args.device} --model {run}/best --batch 64 --out {run}.jsonl"]
    return runs


def compare(args):
    """paper: the discriminative against the generative readout, and what each input adds; judged on
    the test split of --dev."""
    table, numbers = [], {inputs: n for n, inputs in enumerate(INPUTS)}
    for (how, inputs), commands in compare_commands(args).items():
        peaks = run_commands(commands)
        if how is None:
            continue
        rows = read_rows(f"{args.out}/{how}-{numbers[inputs]}.jsonl")
        posts = iter_posts(args.dev or f"{args.out}/posts.jsonl", args.images, [])
        gold, said = {p.id: p.score for p in posts}, [r["score"] for r in rows]
        metrics = regression_metrics([gold[r["id"]] for r in rows], said)
        shares = {k: metrics[k] / len(said) for k in ("unparsed", "out_of_range")}
        table.append(dict(readout=how, inputs=inputs) | metrics | shares | dict(
            s_per_post=statistics.mean(r["seconds"] for r in rows), peak_mib=max(peaks)))
    write_json(Path(args.out, "compare.json"), table)
    shown = [list(table[0])] + [[f"{v:.4f}" if isinstance(v, float) else str(v)
                                 for v in row.values()] for row in table]
    widths = [max(map(len, column)) for column in zip(*shown)]
    for row in shown:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"wrote {args.out}/compare.json")


def peak_mib(reset=False):
    """The most memory in MiB held since the last reset: of the GPU where there is one, else of this
    process (0 where the system does not tell)."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) >> 10
    except (OSError, TypeError):
        return 0


# ---- the small model ---------------------------------------------------------------------------


def ubm_posts(args):
    """(training posts, dev posts, the targets (N, C) of either) for the wanted classes."""
    need, aside = "score" if args.bins else "label", []
    posts = [p for path in args.data for p in read_posts(path, args.images, aside)]
    dev = read_posts(args.dev, args.images, aside)
    tell_aside(aside, "rows in all")
    posts = [p for p in posts if p.split not in ("dev", "test")]
    sets = [[p for p in rows if getattr(p, need) is not None]
            for rows in (posts, of_split(dev, "dev"))]
    for name, rows in zip(("--data", "--dev"), sets):
        if not rows:
            raise InputError(f"{name}: no post of a fitting split has a {need}")
    return *sets, *(class_targets(rows, SCORES if args.bins else LABELS) for rows in sets)


@torch.no_grad()
def ubm_logits(model, posts):
    """Logits (N, C) on the CPU, in the posts' order."""
    model.eval()
    order = sorted(range(len(posts)), key=lambda i: len(posts[i].text))
    parts = [model([posts[i] for i in order[a : a + 64]]).cpu() for a in range(0, len(order), 64)]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def ubm_score(classes, logits, posts):
    """({name: number}, what dev selects by): accuracy and macro F1, their mean; or MAE, -MAE."""
    if classes == LABELS:
        said = [LABELS[k] for k in logits.argmax(1).tolist()]
        accuracy, f1 = accuracy_f1([p.label for p in posts], said)
        return dict(dev_accuracy=accuracy, dev_f1=f1), (accuracy + f1) / 2
    said = logits.softmax(1) @ torch.tensor(classes, dtype=torch.float)
    mae = (said - torch.tensor([float(p.score) for p in posts])).abs().mean().item()
    return dict(dev_mae=mae), -mae


def ubm_run(args, k, model, posts, targets, dev):
    """Run k: two rates, linear decay, a running average of the weights. Leaves the average as of
    its best dev epoch in `model`. All runs share their first epoch, which is kept in trunk.pt;
    killed, a run goes on from the last epoch's end."""
    out, weights = Path(args.out), list(model.parameters())
    new = ("head", "images") if args.image_encoder == "small" else ("head",)
    groups = [dict(params=[p for n, p in model.named_parameters() if n.startswith(new) == own])
              for own in (False, True)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.01, fused=True)
    average, first, best, kept = [p.detach().clone() for p in weights], 0, -math.inf, None
    for file in (out / f"state-{k}.pt", out / "trunk.pt"):
        if file.exists():
            was = torch.load(file, map_location=args.device, weights_only=True)
            average, first, best, kept = (was[x] for x in ("average", "epoch", "best", "kept"))
            model.load_state_dict(was["model"])
            optimizer.load_state_dict(was["optimizer"])
            break
    per_epoch = math.ceil(len(posts) / args.batch)
    step, total = first * per_epoch, args.epochs * per_epoch
    log = [row for row in read_rows(out / "log.jsonl") if row["run"] != k or row["epoch"] <= first]
    for epoch in range(first, args.epochs):
        # order and dropout depend on nothing else
        seed = args.seed * 10_000 + (1000 * k if epoch else 0)
        seed_everything(seed + epoch)
        steps = epoch_steps([len(p.text) for p in posts], args.batch, epoch, seed, window=16)
        model.train()
        sum_loss, began = 0.0, time.time()
        for rows in tqdm(steps, f"run {k} epoch {epoch + 1}", leave=False):
            for group, peak in zip(optimizer.param_groups, (args.lr, args.head_lr)):
                group["lr"] = peak * (1 - step / total)
            with torch.autocast(args.device.split(":")[0], torch.bfloat16):
                logits = model([posts[i] for i in rows]).float()
            loss = F.cross_entropy(logits, targets[rows].to(args.device))
            if not math.isfinite(loss.item()):
                raise InputError(f"run {k}, step {step + 1}: loss {loss.item()}: lower --lr")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            sum_loss += loss.item()
            memory = min(args.decay, (1 + step) / (10 + step))  # short at first
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - memory)
        here = [p.detach().clone() for p in weights]
        fill(weights, average)
        terms, value = ubm_score(model.classes, ubm_logits(model, dev), dev)
        log.append(dict(run=k, epoch=epoch + 1, loss=sum_loss / per_epoch, **terms,
                        seconds=round(time.time() - began, 1)))
        if value > best:
            best, kept = value, [p.clone() for p in average]
        fill(weights, here)
        values = dict(epoch=epoch + 1, average=average, best=best, kept=kept,
                      model=model.state_dict(), optimizer=optimizer.state_dict())
        lines = "".join(json.dumps(row) + "\n" for row in log)
        write_atomic(out / "log.jsonl", lambda part: Path(part).write_text(lines))
        write_atomic(out / (f"state-{k}.pt" if epoch else "trunk.pt"),
                     lambda part: torch.save(values, part))
        print("  ".join(f"{x} {v:.4g}" if isinstance(v, float) else f"{x} {v}"
                        for x, v in log[-1].items()))
    fill(weights, kept)


def ubm(args):
    """choice: `--members` short runs that part after a shared first epoch, so that the mean of
    their weights is a model too; dev chooses among all of them and fits the temperature."""
    out = Path(args.out)
    posts, dev, targets, dev_targets = ubm_posts(args)
    settings = {k: v for k, v in vars(args).items() if k not in FREE} | {
        "rows": digest([(p.id, p.text, p.label, p.score) for p in posts]),
        "dev_rows": digest([p.id for p in dev])}
    check_settings(out / "config.json", settings, (out / "config.json").exists())
    text = tiny_encoder(args, posts) if args.text_encoder == "tiny" else args.text_encoder
    seed_everything(args.seed)
    model = new_ubm(text, SCORES if args.bins else LABELS, args.image_encoder).to(args.device)
    weights, found = list(model.parameters()), {}
    start = {k: v.clone() for k, v in model.state_dict().items()}
    for k in range(args.members):
        file = out / f"run-{k}.safetensors"
        if not file.exists():
            model.load_state_dict(start)
            ubm_run(args, k, model, posts, targets, dev)
            write_atomic(file, lambda part: save_file(model.state_dict(), part))
            Path(out, f"state-{k}.pt").unlink(missing_ok=True)
        model.load_state_dict(load_file(file))
        found[f"run {k}"] = [p.detach().clone() for p in weights]
    found["mean"] = [sum(ps) / len(ps) for ps in zip(*found.values())]
    values = {}
    for name, tensors in found.items():
        fill(weights, tensors)
        terms, values[name] = ubm_score(model.classes, ubm_logits(model, dev), dev)
        print(f"{name:6s} " + "  ".join(f"{k} {v:.4f}" for k, v in terms.items()))
    chosen = max(values, key=values.get)
    fill(weights, found[chosen])
    logits = ubm_logits(model, dev)
    model.temperature = fit_temperature(logits, dev_targets)
    save_ubm(model, out)
    Path(out, "trunk.pt").unlink(missing_ok=True)
    print(f"rows {len(posts)}  temperature {model.temperature:.2f}\nlog {out}/log.jsonl  config "
          f"{out}/config.json")
    terms, _ = ubm_score(model.classes, logits, dev)
    print(f"best is {chosen}: " + "  ".join(f"{k} {v:.3f}" for k, v in terms.items()) + f": {out}")


def tiny_encoder(args, posts):
    """The folder of a random two-layer BERT that knows the posts' words and all letters, made on
    first use."""
    from transformers import BertConfig, BertModel, BertTokenizer

    init, part = Path(args.out, "init"), Path(args.out, "init.part")
    if not init.exists():
        words = Counter(w for p in posts for w in mark_aspect(p)[0].lower().split())
        signs = sorted({sign for word in words for sign in word})
        # trap: the library's own training of word pieces differs from run to run
        pieces = [*signs, *("##" + s for s in signs), *sorted(words, key=lambda w: (-words[w], w))]
        names = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces[:2000]])
        tokenizer = BertTokenizer(vocab={name: n for n, name in enumerate(names)})
        config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2,
                            num_attention_heads=2, intermediate_size=128)
        seed_everything(args.seed)
        BertModel(config).save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, init)
    return str(init)


def fill(weights, values):
    """Copies tensors into parameters."""
    for p, value in zip(weights, values):
        p.data.copy_(value)


# ---- no arguments: the whole road --------------------------------------------------------------

DEMO_TRAININGS = ("base/assistant", "base/student", "assistant", "student")


def demo_commands(out, seed):
    """The stages of the embedded default, each as a user would type it."""
    out = shlex.quote(out)
    posts, chains, more = f"{out}/posts.jsonl", f"{out}/chains.jsonl", f"{out}/augmented.jsonl"
    base = f"--data {out}/warmup.jsonl --epochs 3 --lr 0.002 --log-every 40"
    lora = f"--dev {posts} --lr 0.01 --schedule cosine --log-every 20"
    short = f"--batch 16 --accumulate 1 --beta2 0.99 --seed {seed}"
    assistant, student, said = f"{out}/assistant/best", f"{out}/student/best", f"{out}/predictions"
    predict = f"generate.py predict --data {posts} --split test --batch 64"
    runs = {"student": said, "assistant": f"{said}.assistant",
            "base/student": f"{said}.base.student", "base/assistant": f"{said}.base.assistant",
            "shuffled_images": f"{said}.shuffled_images", "blank_text": f"{said}.blank_text"}
    return [
        f"generate.py toy --out {out} --seed {seed}",
        f"train.py base --size assistant {base} {short} --out {out}/base/assistant",
        f"train.py base --size student {base} {short} --out {out}/base/student",
        f"generate.py teacher --data {posts} --model toy --out {chains}",
        f"train.py assistant --data {chains} {lora} {short} --epochs 4 --dropout 0.05 "
        f"--model {out}/base/assistant/last --out {out}/assistant",
        f"generate.py augment --data {chains} --model {assistant} --batch 64 --out {more}",
        f"generate.py soft --data {chains} {more} --model {assistant} --batch 32 --out {out}/soft",
        f"train.py student --data {chains} {more} --soft {out}/soft {lora} {short} --epochs 3 "
        f"--model {out}/base/student/last --out {out}/student",
        f"generate.py teacher --data {posts} --split test --model toy --out {out}/references.jsonl",
        f"{predict} --model {student} --out {said}.jsonl",
        f"{predict} --model {assistant} --source assistant --out {runs['assistant']}.jsonl",
        *(f"{predict} --no-chain --model {out}/base/{size}/last --source base "
          f"--out {runs[f'base/{size}']}.jsonl" for size in ("student", "assistant")),
        f"{predict} --no-chain --shuffle-images --model {student} "
        f"--out {runs['shuffled_images']}.jsonl",
        f"{predict} --no-chain --blank-text --model {student} --out {runs['blank_text']}.jsonl",
        f"eval.py {' '.join(f'{name}={file}.jsonl' for name, file in runs.items())} --gold {posts} "
        f"--chains {chains} --references {out}/references.jsonl --logs "
        f"{' '.join(f'{run}={out}/{run}/log.jsonl' for run in DEMO_TRAININGS)} --out {out}",
    ]


def run_commands(commands):
    """Runs each in this process (libraries load once), printed as a command line; returns their
    peaks of memory in MiB."""
    here, peaks = Path(__file__).resolve().parent, []
    for command in commands:
        print(f"\n$ python {command}", flush=True)
        script, *argv = shlex.split(command)
        sys.argv = [str(here / script), *argv]
        peak_mib(reset=True)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        peaks.append(peak_mib())
    return peaks


# ---- ablations ---------------------------------------------------------------------------------

# teacher's rows and what grows on them; settings of the student on top. "full" is the paper's.
TEACHERS = {"full": "--skill 0.6", "no-stage2": "--skill 0.6 --no-stage2",
            "teacher-40": "--skill 0.4", "teacher-80": "--skill 0.8"}
SETTINGS = {
    "full": ("full", ""), "no-assistant": ("full", "--no-soft --no-augment"),
    "no-soft-labels": ("full", "--no-soft"), "no-augmentation": ("full", "--no-augment"),
    "no-reasoning-task": ("full", "--no-reasoning"), "no-stage2": ("no-stage2", ""),
    "teacher-40": ("teacher-40", ""), "teacher-80": ("teacher-80", ""),
    **{f"reasoning-weight-{x}": ("full", f"--reasoning-weight {x} --label-weight {1 - x:.1f}")
       for x in (0.5, 0.7, 0.9)},
    "lambda-0.5": ("full", "--lam 0.5")}
QUICK = ("full", "no-assistant", "no-soft-labels", "no-reasoning-task", "no-stage2")


def ablation_commands(out, seeds, quick):
    """(commands, {setting: [its predictions, one file a seed]}). Posts and base models are shared
    by all, a teacher's chains, assistant and soft labels by the settings of a seed."""
    short = "--batch 16 --accumulate 1 --beta2 0.99"
    posts, files = f"{out}/posts.jsonl", {}
    lora = f"--dev {posts} --lr 0.01 --schedule cosine --log-every 20 {short}"
    commands = [f"generate.py toy --train 200 --out {out}"]
    commands += [f"train.py base --size {size} --data {out}/warmup.jsonl --epochs 3 --lr 0.002 "
                 f"--log-every 40 {short} --out {out}/base/{size}"
                 for size in ("assistant", "student")]
    chosen = {name: SETTINGS[name] for name in (QUICK if quick else SETTINGS)}
    for seed in seeds:
        for teacher in dict.fromkeys(teacher for teacher, _ in chosen.values()):
            at = f"{out}/{teacher}-{seed}"
            commands += [
                f"generate.py teacher --data {posts} --model toy {TEACHERS[teacher]} --seed {seed} "
                f"--out {at}.chains.jsonl",
                f"train.py assistant --data {at}.chains.jsonl {lora} --epochs 6 --dropout 0.05 "
                f"--seed {seed} --model {out}/base/assistant/last --out {at}.assistant",
                f"generate.py augment --data {at}.chains.jsonl --model {at}.assistant/best "
                f"--seed {seed} --out {at}.augmented.jsonl",
                f"generate.py soft --data {at}.chains.jsonl {at}.augmented.jsonl "
                f"--model {at}.assistant/best --out {at}.soft"]
        for name, (teacher, flags) in chosen.items():
            at, run = f"{out}/{teacher}-{seed}", f"{out}/students/{name}-{seed}"
            files.setdefault(name, []).append(f"{run}.jsonl")
            soft = "" if "--no-soft" in flags else f"--soft {at}.soft "
            commands += [
                f"train.py student --data {at}.chains.jsonl {at}.augmented.jsonl {soft}{lora} "
                f"--epochs 4 --seed {seed} --model {out}/base/student/last --out {run} "
                f"{flags}".rstrip(),
                f"generate.py predict --data {posts} --split test --no-chain --model {run}/best "
                f"--out {run}.jsonl"]
    return commands, files


def ablate(args):
    """The paper's ablations on toy posts, every student judged on the same test posts."""
    refuse_ranks("ablate")
    out = shlex.quote(args.out)
    commands, files = ablation_commands(out, range(1, args.seeds + 1), args.quick)
    runs = " ".join(f"{name}={file}" for name, each in files.items() for file in each)
    run_commands([*commands, f"eval.py {runs} --gold {out}/posts.jsonl --baseline full "
                             f"--out {out}"])


def demo(args):
    """Runs every stage of the embedded default."""
    refuse_ranks("the whole road")
    began = time.time()
    run_commands(demo_commands(args.out, args.seed))
    logs = {name: read_rows(Path(args.out, name, "log.jsonl")) for name in DEMO_TRAININGS}
    rows = [json.dumps({"run": name} | row) + "\n" for name, log in logs.items() for row in log]
    write_atomic(f"{args.out}/log.jsonl", lambda part: Path(part).write_text("".join(rows)))
    print(f"\nthe whole road took {time.time() - began:.0f} s; report: {args.out}/report.html")


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    stages = {None: demo, "readout": readout, "ubm": ubm, "ablate": ablate}
    return run_stage(stages.get(args.stage, train), args)


if __name__ == "__main__":
    sys.exit(main())
