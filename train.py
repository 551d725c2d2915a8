"""Train with MulCoT-RD: an assistant on a teacher's chains, a student on chains and soft labels.

    python train.py                              the whole road on the embedded default, offline
    python train.py assistant --data chains.jsonl --dev dev.tsv --images img --out runs/assistant \\
        --model Qwen/Qwen2.5-VL-7B-Instruct
    python train.py student --data chains.jsonl augmented.jsonl --dev dev.tsv --images img \\
        --soft soft --model Qwen/Qwen2.5-VL-3B-Instruct --out runs/student
    python train.py ubm --data train.tsv --dev dev.tsv --images img --out runs/ubm \\
        --text-encoder sentence-transformers/all-MiniLM-L6-v2

Last line: `best dev accuracy 0.930 (macro F1 0.912) at step 120: runs/student/best`. Reads rows
with `cot` and `label` as generate.py writes them. Writes into --out: config.json, log.jsonl,
lora_modules.json, set_aside.json, state.pt (to resume from), best/ and last/ (adapters; base: last/
is a whole model, from the random one in init/). Killed and run again with the same command it goes
on and ends with the same result.
"""

import argparse
import json
import math
import os
import runpy
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mulcot import (
    LABELS, SCORES, SYSTEM, TINY, Help, InputError, SoftLabels, add_lora, build_messages,
    check_settings, class_targets, collate, dense_ce_kl, digest, encode, fit_temperature,
    forward_branches, label_branches, load_model, load_processor, mark_aspect, multitask_loss,
    new_ubm, of_split, positive, read_posts, read_rows, render_label, run_stage, save_adapter,
    save_ubm, score_labels, seed_everything, show_tokens, tell_aside, tiny_model, tiny_tokenizer,
    tokenizer_hash, training_branches, write_atomic, write_json)


def parse_args(argv=None):
    """The command line."""
    yes_no = argparse.BooleanOptionalAction
    top = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=Help,
        epilog="Without a stage: every stage in turn on the embedded default. "
               "`train.py STAGE --help` lists a stage's flags with the paper's values.")
    top.add_argument("--out", default="runs/demo", help="without a stage: where everything lands")
    top.add_argument("--seed", type=int, default=42, help="without a stage: of all that is drawn")
    stages = top.add_subparsers(dest="stage", metavar="{base,assistant,student,ubm}")
    abouts = {"base": "warm up a random tiny model (stands where pre-training would)",
              "assistant": "both tasks on the teacher's chains",
              "student": "both tasks on all chains, from hard and soft labels"}
    ubm_flags(stages)
    for stage, about in abouts.items():
        p = stages.add_parser(stage, help=about, description=about, formatter_class=Help)
        flag = p.add_argument
        flag("--data", nargs="+", required=True, metavar="ROWS", help="rows with cot and label")
        flag("--images", help="images folder (default: images/ beside the rows, else their folder)")
        flag("--out", required=True, help="folder for adapters, log and resume state")
        flag("--seed", type=int, default=42, help="of data order, dropout, new weights (paper: 42)")
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
            flag("--size", choices=tuple(TINY), required=True, help="which embedded tiny model")
            continue
        flag("--dev", required=True, help="posts to select on (split dev, where splits are given)")
        flag("--model", required=True, help="hub name or folder (paper: Qwen2.5-VL-7B, then 3B)")
        flag("--rank", type=positive, default=16, help="of LoRA (paper: 16)")
        flag("--alpha", type=float, default=32, help="of LoRA (paper: 32)")
        flag("--dropout", type=float, default=0.2 if stage == "assistant" else 0.05,
             help="on LoRA's inputs (paper: 0.2 assistant, 0.05 student)")
        flag("--scope", choices=("language", "all"), default="language",
             help="what LoRA adapts; all: the vision tower's MLPs too, as the authors do")
        flag("--max-pixels", type=int, default=0,
             help="image size cap, 0: the model's own (paper: 280 * 280 = 78400)")
        flag("--reasoning-weight", type=float, default=0.8, help="λ_rea (paper: 0.8)")
        flag("--label-weight", type=float, default=0.2, help="λ_cls (paper: 0.2)")
        flag("--reasoning", action=yes_no, default=True, help="--no-reasoning: label task alone")
        flag("--max-answer", type=int, default=512,
             help="longest chain in tokens; longer rows are set aside (paper: 512)")
        flag("--ties", choices=("macro", "weighted"), default="macro",
             help="F1 that breaks ties in dev accuracy (paper: macro Twitter, weighted MVSA)")
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
    return args


def ubm_flags(stages):
    """The flags of `ubm`. choice: the whole recipe, picked on Twitter-2015's dev posts."""
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
    """[(post, branches)] of all rows; what cannot be used is set aside with its reason."""
    items, aside = [], []
    for path in args.data:
        for post in read_posts(path, args.images, aside, may_be_empty=len(args.data) > 1):
            branches, problem = usable(args, post, processor)
            if problem:
                aside.append((f"{path}: {post.id}", problem))
            elif branches:
                items.append((post, branches))
    tell_aside(aside, f"rows in all, reasons in {args.out}/set_aside.json")
    if aside:
        write_json(Path(args.out, "set_aside.json"), aside)
    if not items:
        raise InputError(f"{', '.join(args.data)}: no row that the {args.stage} stage can train on")
    return items


def usable(args, post, processor):
    """(the post's branches, or None; why not, or None where a flag leaves the row out)."""
    if args.stage == "base":
        branches = post.extra.get("branches")
        return branches, None if branches else "no branches: the base stage reads warmup.jsonl"
    if post.split in ("dev", "test"):
        return None, f"split {post.split} is not for training"
    if args.stage == "student" and not args.augment and post.extra.get("source") == "assistant":
        return None, None
    return training_branches(post, processor, args.max_answer, args.reasoning)


def dev_posts(args):
    """Labelled posts to select on: those of split dev, or all where no row has a split."""
    aside = []
    posts = [p for p in read_posts(args.dev, args.images, aside) if p.label]
    tell_aside(aside, "of the dev rows")
    chosen = of_split(posts, "dev")
    if not chosen:
        raise InputError(f"{args.dev} has no labelled post of split dev to select on")
    return chosen


def step_items(items, step, size, per_epoch, seed):
    """The items of optimiser step `step`: a seeded order per epoch, a function of nothing else, so
    that a resumed run goes on with the right posts without decoding an image."""
    epoch, at = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(items), generator=generator).tolist()
    return [items[i] for i in order[at * size : (at + 1) * size]]


# ---- the loss of each stage --------------------------------------------------------------------


def kl_positions(batch, k, everywhere):
    """Where branch k's KL is taken (B, T): its response tokens, or every token of prompt, image and
    answer (never padding)."""
    if everywhere:
        return (batch.branch == 0) | (batch.branch == k)
    return (batch.targets != -100) & (batch.branch == k)


def token_counts(batches, everywhere=False):
    """({branch: supervised tokens}, {branch: KL positions}) of a whole optimiser step. trap: to
    divide by each micro-batch's own count would make 1 x 8 differ from 8 x 1."""
    branches = range(1, int(max(b.branch.max() for b in batches)) + 1)
    ce = {k: sum(int(kl_positions(b, k, False).sum()) for b in batches) for k in branches}
    kl = {k: sum(int(kl_positions(b, k, everywhere).sum()) for b in batches) for k in branches}
    return ce, kl


def soft_targets(soft, examples, k, everywhere, device):
    """The soft labels of branch k, in the order of the batch's positions."""
    entries = []
    for names in map(SoftLabels.names, examples):
        entries += [soft.read(names[0])] if everywhere else []
        entries.append(soft.read(names[k]))
    return [torch.cat(parts).to(device) for parts in zip(*entries)]


def step_loss(args, model, batch, examples, soft, counts):
    """One micro-batch's share of the loss -> (loss, {name: float}). Stages differ only here: base
    has three equal tasks, assistant two weighted ones, student the same with soft labels."""
    hidden, weight = forward_branches(model, batch), model.lm_head.weight
    if args.stage == "base":
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
        loss, terms = dense_ce_kl(hidden[at], weight, targets.clamp(min=0), weights, **distil)
        losses.append(loss)
        parts[f"ce_{task}"] = terms["ce"].item()
        if distil:
            parts[f"kl_{task}"] = terms["kl"].item()
    if len(tasks) == 2:
        loss = multitask_loss(*losses, args.reasoning_weight, args.label_weight)
    else:
        loss = sum(losses) / len(losses)
    return loss, {"loss": loss.item()} | parts


# ---- the loop ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(args, model, processor, posts, batch=16):
    """(accuracy, macro or weighted F1) on dev posts by label scoring."""
    model.eval()
    said = []
    for i in range(0, len(posts), batch):
        examples = [encode(p, label_branches(), processor) for p in posts[i : i + batch]]
        scores = score_labels(model, collate(examples, processor.pad).to(model.device))
        said += [LABELS[j] for j in scores.argmax(-1).tolist()]
    model.train()
    return accuracy_f1([p.label for p in posts], said, args.ties == "weighted")


def accuracy_f1(gold, said, weighted=False):
    """(accuracy, macro or weighted F1) of labels."""
    right = Counter(g for g, s in zip(gold, said) if g == s)
    golds, saids, f1 = Counter(gold), Counter(said), 0.0
    for x in LABELS:
        share = golds[x] / len(gold) if weighted else 1 / len(LABELS)
        f1 += share * 2 * right[x] / max(1, golds[x] + saids[x])
    return right.total() / len(gold), f1


def build(args, folder):
    """(model in train mode, processor, what is trained {name: parameter})."""
    if args.stage == "base":  # all weights are trained: in fp32, also on a GPU
        model, processor = load_model(folder, args.device, torch.float32)
        model.requires_grad_(True)
    else:
        model, processor = load_model(folder, args.device, max_pixels=args.max_pixels)
        names = add_lora(model, args.rank, args.alpha, args.dropout, scope=args.scope)
        write_json(Path(args.out, "lora_modules.json"), names)
        kinds = Counter(name.rpartition(".")[2] for name in names)
        print(f"lora       {', '.join(f'{n} {k}' for k, n in kinds.items())}; all {len(names)} "
              f"names in {args.out}/lora_modules.json")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count, total = (sum(p.numel() for p in ps) for ps in (trained.values(), model.parameters()))
    print(f"trainable  {count:,} of {total:,} parameters ({count / total:.2%})")
    return model.train(), processor, trained


def random_init(args):
    """The folder of the random tiny model that the base stage starts from, made on first use."""
    init = Path(args.out, "init")
    if not init.exists():
        corpus = [render_label(x) for x in LABELS]
        for post in read_posts(args.data[0], args.images):
            corpus += [part for branch in post.extra.get("branches", []) for part in branch]
            for task in ("reason", "label"):
                prompt = build_messages(post, task)[0]["content"][-1]["text"]
                corpus.append(f"{SYSTEM}\nsystem\nuser\n{prompt}\nassistant\n")
        shutil.rmtree(f"{init}.part", ignore_errors=True)
        tiny_model(f"{init}.part", args.size, tiny_tokenizer(corpus), args.seed)
        os.replace(f"{init}.part", init)
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
    return soft


class Log:
    """One fixed-field line per interval, the same row in log.jsonl; later rows go on resume."""

    def __init__(self, path, step, sums):
        self.path, self.sums, self.started, self.tokens = path, sums, time.time(), 0
        rows = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        write_atomic(path, lambda part: Path(part).write_text("".join(rows)))

    def add(self, terms):
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


def learning_rate(args, step, total):
    """The rate of step `step`, or None where the plateau schedule has it."""
    rise = min(1.0, (step + 1) / max(1.0, args.warmup * total))
    if args.schedule == "cosine":
        return args.lr * rise * 0.5 * (1 + math.cos(math.pi * step / total))
    return args.lr * rise if step <= args.warmup * total else None


FREE = ("out", "show", "device", "log_every", "images")  # settings that may change in a rerun


def train(args):
    """The one loop: micro-batches -> clip -> step -> log; at each epoch's end evaluate and save."""
    if args.show:
        return show_examples(args)
    out, state_file = Path(args.out), Path(args.out, "state.pt")
    folder = random_init(args) if args.stage == "base" else args.model
    items = training_items(args, load_processor(folder, getattr(args, "max_pixels", None)))
    dev = dev_posts(args) if args.stage != "base" else []
    settings = {k: v for k, v in vars(args).items() if k not in FREE} | {
        "rows": digest([(p.id, b) for p, b in items]), "dev_rows": digest([p.id for p in dev])}
    check_settings(out / "config.json", settings, state_file.exists())
    print("settings   " + "  ".join(f"{k}={v}" for k, v in settings.items()))
    state = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if state and state["finished"]:
        print(f"finished   {out} is complete; delete it to train anew\n{state['finished']}")
        return
    seed_everything(args.seed)
    model, processor, trained = build(args, folder)
    soft = open_soft(args, processor, model)
    size = args.batch * args.accumulate
    per_epoch = math.ceil(len(items) / size)
    total = per_epoch * args.epochs
    print(f"data       {len(items)} rows, {len(dev)} dev posts, {per_epoch} steps an epoch, "
          f"{total} in all")
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, betas=(0.9, args.beta2))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2,
                                                         min_lr=1e-6)
    step, best, sums = 0, [-1.0, -1.0, 0], {}
    if state:
        step, best, sums = state["step"], state["best"], state["sums"]
        restore(state, trained, optimizer, plateau)
        print(f"resumed    at step {step}")
    log = Log(out / "log.jsonl", step, sums)

    def save(finished=None):
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        values = dict(step=step, best=best, sums=log.sums, finished=finished, cuda=cuda,
                      rng=torch.get_rng_state(), optimizer=optimizer.state_dict(),
                      plateau=plateau.state_dict(),
                      trained={k: p.detach().cpu() for k, p in trained.items()})
        write_atomic(state_file, lambda part: torch.save(values, part))

    bar = tqdm(total=total, initial=step, desc=args.stage, unit="step", mininterval=1)
    on_gpu = str(args.device).startswith("cuda")
    while step < total:
        if (rate := learning_rate(args, step, total)) is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate
        rows = step_items(items, step, size, per_epoch, args.seed)
        examples = [encode(post, branches, processor) for post, branches in rows]
        examples.sort(key=len)  # like lengths in a micro-batch, less padding
        micro = [examples[i : i + args.batch] for i in range(0, len(examples), args.batch)]
        batches = [collate(part, processor.pad) for part in micro]
        counts = token_counts(batches, soft is not None and soft.about["positions"] == "all")
        for part, batch in zip(micro, batches):
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss, terms = step_loss(args, model, batch.to(args.device), part, soft, counts)
            loss.backward()
            log.add(terms)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip or math.inf).item()
        if not math.isfinite(norm) or not math.isfinite(log.sums["loss"]):
            bar.close()
            raise InputError(f"step {step + 1}: loss {log.sums['loss']}, gradient norm {norm}: "
                             "training diverged; lower --lr or set --clip; the last whole state "
                             f"is in {out}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log.tokens += sum(map(len, examples))
        bar.update()
        if step % args.log_every == 0 or step == total:
            log.interval((step - 1) % args.log_every + 1, step / per_epoch, step, grad_norm=norm,
                         lr=optimizer.param_groups[0]["lr"])
        if step % per_epoch == 0 and dev:
            accuracy, f1 = evaluate(args, model, processor, dev)
            log.line(step=step, dev_accuracy=accuracy, dev_f1=f1)
            if args.schedule == "plateau":
                plateau.step(accuracy)
            if [accuracy, f1] > best[:2]:
                best = [accuracy, f1, step]
                save_adapter(model, out / "best")
                processor.image_processor.save_pretrained(out / "best")  # its image size
            save_adapter(model, out / "last")
            processor.image_processor.save_pretrained(out / "last")
        if step % per_epoch == 0 or (args.save_every and step % args.save_every == 0):
            save()
    bar.close()
    if args.stage == "base":
        save_base(model, processor, out)
        closing = f"base model after {total} steps: {out}/last"
    else:
        closing = (f"best dev accuracy {best[0]:.3f} ({args.ties} F1 {best[1]:.3f}) at step "
                   f"{best[2]}: {out}/best")
    save(closing)
    print(f"rows {len(items)}  steps {total}\nlog {out}/log.jsonl  config {out}/config.json")
    print(closing)


def restore(state, trained, optimizer, plateau):
    """Weights, optimiser, schedule and random numbers as they were."""
    for name, p in trained.items():
        p.data.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    plateau.load_state_dict(state["plateau"])
    torch.set_rng_state(state["rng"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def show_examples(args):
    """Prints the first training examples as the model sees them."""
    folder = random_init(args) if args.stage == "base" else args.model
    processor = load_processor(folder, getattr(args, "max_pixels", None))
    for post, branches in training_items(args, processor)[: args.show]:
        example = encode(post, branches, processor)
        print(show_tokens(collate([example], processor.pad), processor.tokenizer))


def save_base(model, processor, out):
    """The warmed-up model as an ordinary folder, whole or not there."""
    part, last = Path(out, "last.part"), Path(out, "last")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.tokenizer.save_pretrained(part)
    processor.image_processor.save_pretrained(part)
    shutil.rmtree(last, ignore_errors=True)
    os.replace(part, last)


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


def buckets(posts, size):
    """Batches of indices in random order, posts of like length together."""
    order, batches = torch.randperm(len(posts)).tolist(), []
    for a in range(0, len(order), 16 * size):
        part = sorted(order[a : a + 16 * size], key=lambda i: len(posts[i].text))
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


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
        seed_everything(args.seed * 10_000 + (1000 * k if epoch else 0) + epoch)
        model.train()
        sum_loss, began = 0.0, time.time()
        for rows in tqdm(buckets(posts, args.batch), f"run {k} epoch {epoch + 1}", leave=False):
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
        f"--chains {chains} --references {out}/references.jsonl --out {out}",
    ]


def demo(args):
    """Runs every stage in this process (libraries load once), each printed as a command line."""
    here, began = Path(__file__).resolve().parent, time.time()
    for command in demo_commands(args.out, args.seed):
        print(f"\n$ python {command}", flush=True)
        script, *argv = shlex.split(command)
        sys.argv = [str(here / script), *argv]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    logs = {name: read_rows(Path(args.out, name, "log.jsonl"))
            for name in ("base/assistant", "base/student", "assistant", "student")}
    rows = [json.dumps({"run": name} | row) + "\n" for name, log in logs.items() for row in log]
    write_atomic(f"{args.out}/log.jsonl", lambda part: Path(part).write_text("".join(rows)))
    print(f"\nthe whole road took {time.time() - began:.0f} s; report: {args.out}/report.html")


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    return run_stage({"ubm": ubm, None: demo}.get(args.stage, train), args)


if __name__ == "__main__":
    sys.exit(main())
