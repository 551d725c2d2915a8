"""Train with MulCoT-RD: the assistant on the teacher's chains, the student on all chains and soft labels.

    python train.py                                    the whole road on the embedded default, offline
    python train.py assistant --data chains.jsonl --dev dev.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --out a
    python train.py student --data chains.jsonl augmented.jsonl --dev dev.jsonl --soft soft \\
        --model Qwen/Qwen2.5-VL-3B-Instruct --out s

Last line: `best dev accuracy 0.930 (macro F1 0.912) at step 120: s/best`. Reads rows with `cot` and `label` as
generate.py writes them; writes to --out: config.json, log.jsonl, state.pt (resume), best/ and last/ (adapters).
Killed and run again with the same command it goes on, with the same result.
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
from pathlib import Path

import torch
from tqdm import tqdm

from mulcot import (LABELS, SYSTEM, TINY, InputError, SoftLabels, add_lora, build_messages,
                    chain_branches, collate,
                    dense_ce_kl, encode, forward_branches, label_branches, load_model,
                    multitask_loss,
                    read_posts, read_rows, render_label, run_stage, save_adapter, score_labels,
                    seed_everything, show_tokens, task_format, tiny_model, tiny_tokenizer,
                    tokenizer_hash,
                    write_atomic, write_json)


def parse_args(argv=None):
    yes_no = argparse.BooleanOptionalAction
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                  epilog="Without a stage: the whole road on "
                                  "the embedded default, into runs/demo.")
    top.add_argument("--out", default="runs/demo",
                     help="without a stage: where everything lands (default %(default)s)")
    top.add_argument("--seed", type=int, default=42,
                     help="without a stage: of everything drawn (default %(default)s)")
    stages = top.add_subparsers(dest="stage", metavar="{base,assistant,student}")
    for stage, about in (("base", "warm up a random tiny model (stands where pre-training would)"),
                         ("assistant", "both tasks on the teacher's chains"),
                         ("student", "both tasks on all chains, hard and soft labels")):
        p = stages.add_parser(stage, help=about,
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--data", nargs="+", required=True, metavar="ROWS",
                       help="rows with cot and label (.jsonl, .json)")
        p.add_argument("--images",
                       help="folder of the images (default: images/ beside the rows, else their "
                            "folder)")
        p.add_argument("--out", required=True, help="folder for adapters, log and resume state")
        p.add_argument("--seed", type=int, default=42,
                       help="of data order, dropout and fresh weights (paper: 42)")
        p.add_argument("--epochs", type=int, default=20, help="passes over the data (paper: 20)")
        p.add_argument("--batch", type=int, default=2, help="posts per micro-batch (paper: 2)")
        p.add_argument("--accumulate", type=int, default=20,
                       help="micro-batches per step (paper: 20)")
        p.add_argument("--lr", type=float, default=3e-4,
                       help="peak learning rate of AdamW (paper: 3e-4)")
        p.add_argument("--beta2", type=float, default=0.999,
                       help="AdamW's second moment; shorter memory suits short runs")
        p.add_argument("--schedule", choices=("plateau", "cosine"), default="plateau",
                       help="plateau: halve after 2 epochs without a better dev accuracy (paper); "
                            "cosine to zero")
        p.add_argument("--warmup", type=float, default=0.0,
                       help="share of the steps with rising rate (paper: none)")
        p.add_argument("--clip", type=float, default=1.0,
                       help="gradient norm cap, 0 for none (paper: none)")
        p.add_argument("--save-every", type=int, default=0,
                       help="resume point every N steps, beside each epoch's end")
        p.add_argument("--log-every", type=int, default=10, help="steps per log line")
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu, cuda, cuda:1 …")
        p.add_argument("--gradient-checkpointing", action=yes_no, default=False,
                       help="less memory, one more forward")
        p.add_argument("--show", type=int, default=0, metavar="N",
                       help="print N examples, supervised tokens in green, and stop")
        if stage == "base":
            p.add_argument("--size", choices=tuple(TINY), required=True,
                           help="which embedded tiny model")
            continue
        p.add_argument("--dev", required=True,
                       help="posts to select on; rows of split dev where splits are given")
        p.add_argument("--model", required=True,
                       help="hub name or folder (paper: Qwen2.5-VL 7B / 3B Instruct)")
        p.add_argument("--rank", type=int, default=16, help="LoRA rank (paper: 16)")
        p.add_argument("--alpha", type=float, default=32, help="LoRA alpha (paper: 32)")
        p.add_argument("--dropout", type=float, default=0.2 if stage == "assistant" else 0.05,
                       help="of LoRA inputs (paper: 0.2 assistant, 0.05 student)")
        p.add_argument("--scope", choices=("language", "all"), default="language",
                       help="all: also the towers' MLPs (the authors')")
        p.add_argument("--max-pixels", type=int, default=0,
                       help="image size cap, 0: the model's own (paper: 280*280 = 78400)")
        p.add_argument("--reasoning-weight", type=float, default=0.8, help="λ_rea (paper: 0.8)")
        p.add_argument("--label-weight", type=float, default=0.2, help="λ_cls (paper: 0.2)")
        p.add_argument("--reasoning", action=yes_no, default=True,
                       help="--no-reasoning trains the label task alone")
        p.add_argument("--max-answer", type=int, default=512,
                       help="longest chain in tokens; longer rows are set aside (paper: 512)")
        if stage == "student":
            p.add_argument("--soft", help="folder of generate.py soft, or --no-soft")
            p.add_argument("--no-soft", action="store_true", help="hard labels only (ablation)")
            p.add_argument("--augment", action=yes_no, default=True,
                           help="--no-augment leaves the assistant's chains out")
            p.add_argument("--lam", type=float, default=0.3,
                           help="λ, weight of the soft labels (paper: 0.3)")
            p.add_argument("--t-squared", action=yes_no, default=False,
                           help="Hinton's τ² on the KL (the authors: off)")
    args = top.parse_args(argv)
    if args.stage == "student" and not args.no_soft and not args.soft:
        top.error("student needs --soft FOLDER (from generate.py soft) or --no-soft")
    return args


# ---- data
# ----------------------------------------------------------------------------------------------


def training_items(args, processor):
    """[(post, branches)] to train on: all rows of all files; what cannot be used is counted with
    its reason."""
    items, aside = [], []
    for path in args.data:
        for post in read_posts(path, args.images, aside):
            where = f"{path}: {post.id}"
            if args.stage == "base":
                items.append((post, post.extra["branches"]))
            elif post.label is None or (args.reasoning and not post.cot):
                aside.append((where, "no label" if post.label is None
                              else "no cot: run generate.py teacher first"))
            elif getattr(args, "augment", True) or post.extra.get("source") != "assistant":
                if args.reasoning and len(processor.text_ids(post.cot)) >= args.max_answer:
                    aside.append((where, f"chain longer than --max-answer {args.max_answer} "
                                         "tokens"))
                    continue
                both = chain_branches(post.cot, post.label)
                items.append((post, both if args.reasoning else both[1:]))
    for where, why in aside[:5]:
        print(f"set aside  {where}: {why}")
    if aside:
        write_json(Path(args.out, "set_aside.json"), aside)
        print(f"set aside  {len(aside)} rows in all, reasons in {args.out}/set_aside.json")
    if not items:
        raise InputError(f"{', '.join(args.data)}: no row has what --stage {args.stage} needs")
    return items


def dev_posts(args):
    posts = [p for p in read_posts(args.dev, args.images, []) if p.label]
    return [p for p in posts if p.split == "dev"] or posts


def step_items(items, step, size, per_epoch, seed):
    """The items of optimiser step `step`: a seeded order per epoch, so a resumed run needs no
    image decoded."""
    epoch, at = divmod(step, per_epoch)
    order = torch.randperm(len(items),
                           generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
    return [items[i] for i in order[at * size : (at + 1) * size]]


# ---- the loss of each stage
# ----------------------------------------------------------------------------


def kl_positions(batch, k, everywhere):
    """Where branch k's KL is taken (B, T): its response tokens, or every real token of prompt and
    answer."""
    if everywhere:
        return (batch.branch == 0) | (batch.branch == k)
    return (batch.targets != -100) & (batch.branch == k)


def token_counts(batches, everywhere):
    """Per branch: supervised tokens and KL positions of the whole optimiser step. trap: dividing
    by each micro-batch's own count would make 1 x 8 differ from 8 x 1."""
    branches = range(1, int(max(b.branch.max() for b in batches)) + 1)
    ce = {k: sum(int(((b.targets != -100) & (b.branch == k)).sum()) for b in batches)
          for k in branches}
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
    """One micro-batch's share of the loss -> (loss, {name: float}). The only place where stages
    differ."""
    hidden, weight = forward_branches(model, batch), model.lm_head.weight
    everywhere = soft is not None and soft.about["positions"] == "all"
    losses, parts = [], {}
    names = ("describe", "write", "name") if args.stage == "base" else ("reason",
                                                                        "label")[not args.reasoning :]
    for k, name in enumerate(names, 1):
        at = kl_positions(batch, k, everywhere)
        targets = batch.targets[at]  # (N,)
        weights = (targets != -100).float() / counts[0][k]
        distil = {}
        if soft is not None:
            kl_weights = torch.full_like(weights,
                                         (soft.about["temperature"] ** 2 if args.t_squared
                                          else 1) / counts[1][k])
            distil = dict(soft=soft_targets(soft, examples, k, everywhere, hidden.device),
                          lam=args.lam,
                          temperature=soft.about["temperature"], kl_weights=kl_weights,
                          vocab=soft.about["vocab"])
        loss, terms = dense_ce_kl(hidden[at], weight, targets.clamp(min=0), weights, **distil)
        losses.append(loss)
        parts |= {f"ce_{name}": terms["ce"].item()} | ({f"kl_{name}": terms["kl"].item()} if distil
                                                       else {})
    if len(losses) == 2:
        loss = multitask_loss(*losses, args.reasoning_weight, args.label_weight)
    else:  # base: its three tasks count alike; --no-reasoning: the label task alone
        loss = sum(losses) / len(losses)
    return loss, {"loss": loss.item()} | parts


# ---- the loop
# ------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, processor, posts, batch=16):
    """Dev accuracy and macro F1 by label scoring."""
    model.eval()
    predicted = []
    for i in range(0, len(posts), batch):
        examples = [encode(p, label_branches(), processor) for p in posts[i : i + batch]]
        best = score_labels(model, collate(examples, processor.pad).to(model.device)).argmax(-1)
        predicted += [LABELS[j] for j in best.tolist()]
    model.train()
    pairs = [(p.label, said) for p, said in zip(posts, predicted)]
    f1 = []
    for label in LABELS:
        right, both = pairs.count((label, label)), sum((g == label) + (s == label) for g,
                                                       s in pairs)
        f1.append(2 * right / both if both else 0.0)
    return sum(g == s for g, s in pairs) / len(pairs), sum(f1) / len(f1)


def build(args):
    """(model in train mode, processor, what is trained {name: parameter})."""
    if args.stage == "base":
        init = Path(args.out, "init")
        if not (init / "config.json").exists():
            rows = [r for path in args.data for r in read_rows(path)]
            posts = read_posts(args.data[0], args.images)
            prompts = [SYSTEM + build_messages(p,
                                               t)[0]["content"][-1]["text"] + "\nassistant\nsystem\nuser\n"
                       for p in posts for t in ("reason", "label")]
            answers = [part for r in rows for branch in r["branches"] for part in branch]
            tokenizer = tiny_tokenizer(prompts + answers + [render_label(x) for x in LABELS])
            shutil.rmtree(init, ignore_errors=True)
            tiny_model(f"{init}.part", args.size, tokenizer, args.seed)
            os.replace(f"{init}.part", init)
        model, processor = load_model(init, args.device)
        model.requires_grad_(True)
    else:
        model, processor = load_model(args.model, args.device, max_pixels=args.max_pixels or None)
        names = add_lora(model, args.rank, args.alpha, args.dropout, scope=args.scope)
        write_json(Path(args.out, "lora_modules.json"), names)
        print(f"lora       {len(names)} linears, first {names[0]}, last {names[-1]} (all: "
              f"{args.out}/lora_modules.json)")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count, total = sum(p.numel() for p in trained.values()), sum(p.numel()
                                                                 for p in model.parameters())
    print(f"trainable  {count:,} of {total:,} parameters ({count / total:.2%})")
    return model.train(), processor, trained


def check_soft(args, processor, model):
    """The soft labels to train with, or None; refused when they belong to another tokenizer or
    temperature."""
    if args.stage != "student" or args.no_soft or args.lam == 0:
        return None
    soft = SoftLabels(args.soft)
    if soft.about["tokenizer"] != tokenizer_hash(processor.tokenizer):
        raise InputError(f"{args.soft} was made with another tokenizer than {args.model}: "
                         "equal-looking ids would be "
                         "other words; teach with a model of the same family, or --no-soft")
    assert soft.about["vocab"] <= model.lm_head.weight.shape[0], (soft.about["vocab"],
                                                                  model.lm_head.weight.shape)
    return soft


def train(args):
    """The one loop: evaluate and save at each epoch's end, else micro-batches -> clip -> step ->
    log."""
    out, settings = Path(args.out), {k: v for k,
                                     v in vars(args).items() if k not in ("out", "show", "device",
                                                                          "log_every")}
    state_file, config_file = out / "state.pt", out / "config.json"
    if state_file.exists() and config_file.exists() and not args.show:
        was = json.loads(config_file.read_text())
        odd = [k for k in settings if was.get(k) != settings[k]]
        if odd:
            raise InputError(f"{out} was trained with another {odd[0]} ({was.get(odd[0])!r}): "
                             "delete it or choose another --out")
    seed_everything(args.seed)
    state = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if state and state["finished"]:
        print(f"finished   {out} is complete; delete it to train again\n" + state["finished"])
        return
    model, processor, trained = build(args)
    items = training_items(args, processor)
    dev = dev_posts(args) if args.stage != "base" else []
    soft = check_soft(args, processor, model)
    if args.show:
        for post, branches in items[: args.show]:
            print(show_tokens(collate([encode(post, branches, processor)], processor.pad),
                              processor.tokenizer))
        return
    size = args.batch * args.accumulate
    per_epoch = math.ceil(len(items) / size)
    total = per_epoch * args.epochs
    write_json(config_file, settings)
    print(f"data       {len(items)} rows, {len(dev)} dev posts, {per_epoch} steps an epoch, "
          f"{total} in all")
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, betas=(0.9, args.beta2))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2,
                                                         min_lr=1e-6)
    step, best, sums, log = 0, [-1.0, -1.0, 0], {}, []
    if state:
        for name, p in trained.items():
            p.data.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"]), plateau.load_state_dict(state["plateau"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        step, best, sums = state["step"], state["best"], state["sums"]
        log = [row for row in read_rows(out / "log.jsonl") if row["step"] <= step]
        print(f"resumed    at step {step}")
    write_atomic(out / "log.jsonl",
                 lambda part: Path(part).write_text("".join(json.dumps(r) + "\n" for r in log)))

    def save(finished=None):
        cuda = torch.cuda.get_rng_state() if str(args.device).startswith("cuda") else None
        values = dict(step=step, best=best, sums=sums, finished=finished,
                      rng=torch.get_rng_state(), cuda_rng=cuda,
                      trained={k: p.detach().cpu() for k, p in trained.items()},
                      optimizer=optimizer.state_dict(), plateau=plateau.state_dict())
        write_atomic(state_file, lambda part: torch.save(values, part))

    def report(row):
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        tqdm.write("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k,
                             v in row.items()))

    bar = tqdm(total=total, initial=step, desc=args.stage, unit="step", mininterval=1)
    started, tokens, autocast = time.time(), 0, str(args.device).startswith("cuda")
    while step < total:
        if args.schedule == "cosine" or step < args.warmup * total:  # plateau lowers the rate by itself
            rise = min(1.0, (step + 1) / max(1.0, args.warmup * total))
            fall = 0.5 * (1 + math.cos(math.pi * step / total)) if args.schedule == "cosine" else 1.0
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rise * fall
        rows = step_items(items, step, size, per_epoch, args.seed)
        examples = [encode(post, branches, processor) for post, branches in rows]
        order = sorted(range(len(examples)),
                       key=lambda i: len(examples[i]))  # like lengths, less padding
        micro = [[examples[i] for i in order[a : a + args.batch]]
                 for a in range(0, len(order), args.batch)]
        batches = [collate(part, processor.pad) for part in micro]
        counts = token_counts(batches, soft is not None and soft.about["positions"] == "all")
        for part, batch in zip(micro, batches):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss, terms = step_loss(args, model, batch.to(args.device), part, soft, counts)
            loss.backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip or math.inf).item()
        if not math.isfinite(norm) or not math.isfinite(sums["loss"]):
            raise InputError(f"step {step + 1}: loss {sums['loss']:.3g}, gradient norm "
                             f"{norm:.3g}: training diverged; "
                             f"lower --lr or set --clip; the last whole state is in {out}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + sum(map(len, examples))
        bar.update()
        if step % args.log_every == 0 or step == total:
            n = (step - 1) % args.log_every + 1
            row = dict(step=step, epoch=round(step / per_epoch, 2)) | {k: v / n for k,
                                                                       v in sums.items()}
            report(row | dict(grad_norm=norm, lr=optimizer.param_groups[0]["lr"],
                              tokens_per_s=round(tokens / (time.time() - started))))
            sums, started, tokens = {}, time.time(), 0
        if step % per_epoch == 0 and dev:
            accuracy, f1 = evaluate(model, processor, dev)
            report(dict(step=step, dev_accuracy=accuracy, dev_macro_f1=f1))
            if args.schedule == "plateau":
                plateau.step(accuracy)
            if [accuracy, f1] > best[:2]:
                best = [accuracy, f1, step]
                save_adapter(model, out / "best")
            save_adapter(model, out / "last")
        if step % per_epoch == 0 or (args.save_every and step % args.save_every == 0):
            save()
    bar.close()
    if args.stage == "base":
        save_base(model, processor, out)
        closing = f"base model of {total} steps: {out}/last"
    else:
        closing = f"best dev accuracy {best[0]:.3f} (macro F1 {best[1]:.3f}) at step {best[2]}: {out}/best"
    save(closing)
    print(f"rows {len(items)}  steps {total}\nlog {out}/log.jsonl  config {config_file}\n{closing}")


def save_base(model, processor, out):
    """The warmed-up model as an ordinary folder, whole or not there."""
    shutil.rmtree(out / "last.part", ignore_errors=True)
    model.save_pretrained(out / "last.part")
    processor.tokenizer.save_pretrained(out / "last.part")
    processor.image_processor.save_pretrained(out / "last.part")
    shutil.rmtree(out / "last", ignore_errors=True)
    os.replace(out / "last.part", out / "last")


# ---- no arguments: the whole road
# ----------------------------------------------------------------------


def demo_commands(out, seed):
    """The stages of the embedded default as a user would type them."""
    small = "--batch 16 --accumulate 1 --lr 0.01 --beta2 0.99 --schedule cosine"
    posts, all_chains = f"{out}/posts.jsonl", f"{out}/chains.jsonl {out}/augmented.jsonl"
    predict = f"generate.py predict --data {posts} --split test --batch 64 --max-new-tokens 160"
    return [
        f"generate.py toy --out {out} --seed {seed}",
        *(f"train.py base --size {size} --data {out}/warmup.jsonl --out {out}/base/{size} "
          "--epochs 3 --batch 16 "
          f"--accumulate 1 --lr 0.002 --beta2 0.99 --log-every 40"
          for size in ("assistant", "student")),
        f"generate.py teacher --data {posts} --model toy --out {out}/chains.jsonl",
        f"train.py assistant --data {out}/chains.jsonl --dev {posts} --model "
        f"{out}/base/assistant/last "
        f"--out {out}/assistant {small} --epochs 4 --dropout 0.05",
        f"generate.py augment --data {out}/chains.jsonl --model {out}/assistant/best --out "
        f"{out}/augmented.jsonl "
        "--batch 64 --max-new-tokens 160",
        f"generate.py soft --data {all_chains} --model {out}/assistant/best --out {out}/soft "
        "--batch 32",
        f"train.py student --data {all_chains} --dev {posts} --soft {out}/soft --model "
        f"{out}/base/student/last "
        f"--out {out}/student {small} --epochs 3",
        f"generate.py teacher --data {posts} --split test --model toy --out {out}/references.jsonl",
        f"{predict} --model {out}/student/best --out {out}/predictions.jsonl",
        f"{predict} --model {out}/assistant/best --out {out}/predictions.assistant.jsonl",
        *(f"{predict} --no-chain --model {out}/base/{size}/last --out "
          f"{out}/predictions.base.{size}.jsonl"
          for size in ("student", "assistant")),
        f"{predict} --no-chain --shuffle-images --model {out}/student/best --out "
        f"{out}/predictions.shuffled_images.jsonl",
        f"{predict} --no-chain --blank-text --model {out}/student/best --out "
        f"{out}/predictions.blank_text.jsonl",
        f"eval.py student={out}/predictions.jsonl assistant={out}/predictions.assistant.jsonl "
        f"base/student={out}/predictions.base.student.jsonl "
        f"base/assistant={out}/predictions.base.assistant.jsonl "
        f"shuffled_images={out}/predictions.shuffled_images.jsonl "
        f"blank_text={out}/predictions.blank_text.jsonl "
        f"--gold {posts} --chains {out}/chains.jsonl --references {out}/references.jsonl --out "
        f"{out}",
    ]


def demo(args):
    """Runs every stage in this process (the libraries load once), each printed as its command
    line."""
    here, began = Path(__file__).resolve().parent, time.time()
    for command in demo_commands(args.out, args.seed):
        print(f"\n$ python {command}", flush=True)
        script, *argv = shlex.split(command)
        sys.argv = [str(here / script), *argv]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise SystemExit(end.code)
    print(f"\nthe whole road took {time.time() - began:.0f} s; report: {args.out}/report.html")


def main(argv=None):
    args = parse_args(argv)
    return run_stage(train if args.stage else demo, args)


if __name__ == "__main__":
    sys.exit(main())
