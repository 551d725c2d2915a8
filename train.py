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

Last line: `best dev accuracy 0.930 (macro_f1 0.912) at step 120: runs/student/best`. Reads rows
with `cot` and `label` as generate.py writes them. Writes into --out: settings.json, log.jsonl,
lora_modules.json, set_aside.json, state.pt (to resume from), best/ and last/ (adapters, a readout's
head with them). ubm writes settings.json, member-K.jsonl (log) and member-K.safetensors (a killed
member starts anew), then ubm.safetensors, ubm.json, text/ and image/; its last line begins
`2 members together:`. Killed and run again with the same command each goes on and ends with the
same result.
"""

import argparse
import copy
import math
import runpy
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mulcot import (
    CHUNK_LOGITS, LABELS, PLACEHOLDERS, SCORE_BINS, SCORE_FORMAT, Help, InputError, Readout,
    SoftLabels, add_lora, barrier, check_at_least, check_settings, chunks, collate,
    confusion_scores, confusion_table, count_parameters, default_dtype, digest, distill_kl,
    encode, explaining, flag_groups, forward_branches, gather, get_rank, get_world_size, in_chunks,
    init_distributed, label_rows, load_model, load_processor, lora_layers, multitask_loss,
    new_ubm, predict, progress, read_dev_posts, read_out, read_tensors, readout_branches,
    readout_loss, render_score, row_text, run_info, run_stage, save_adapter, say, settings_file,
    settings_of, student_loss, tokenizer_hash, training_branches, training_items, without_inputs,
    write_atomic, write_json, write_rows, write_tensors)

# How to read this file: `train` sets up and calls `train_loop`, which asks a stage for its `loss`
# and, at each epoch's end, its `metrics`: ChainStage for assistant and student, ReadoutStage for
# readout; `ubm` is a small loop of its own. The losses are functions of mulcot.py §6 and §10. A
# stage of your own: its name in STAGES, its flags in parse_args, its class in `train`; for weights
# beside LoRA it has its own `add_weights` and `save`.

YES_NO = argparse.BooleanOptionalAction  # --flag and --no-flag
SAVE_SECONDS = 600  # choice: a killed run loses ten minutes and a step
DEV_BATCH = 4  # a dev batch has so many times --batch posts: no gradients are held


# ---- the command line --------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=Help,
        epilog="Without a stage: every stage in turn on the embedded default (tests/demo.py). "
               "`train.py STAGE --help` lists a stage's flags with the papers' values.")
    stages = top.add_subparsers(dest="stage", required=True)
    for stage, about in STAGES.items():
        p = stages.add_parser(stage, help=about, description=about, formatter_class=Help)
        groups = flag_groups(p, __doc__)
        shared_flags(groups)
        if stage == "ubm":
            ubm_flags(groups)
            p.set_defaults(epochs=3, batch=32, lr=1e-4)
            continue
        loop_flags(groups)
        if stage == "readout":
            readout_flags(groups["method"])
            p.set_defaults(rank=32, dropout=0.1, lr=2e-4, epochs=10, batch=4, accumulate=8,
                           schedule="cosine", warmup=0.1)
        else:
            chain_flags(groups["method"], stage)
    stages.choices["assistant"].set_defaults(dropout=0.2)
    args = top.parse_args(argv)
    p = stages.choices[args.stage]
    check_at_least(p, args, 1, "epochs", "batch", "accumulate", "log_every", "rank", "members")
    check_at_least(p, args, 0, "max_pixels", "workers", "save_every")
    if not (args.dev and args.out) and not getattr(args, "show", 0):
        p.error("needs --dev and --out")
    if args.stage == "student" and not args.no_soft and not args.soft:
        p.error("student needs --soft FOLDER (from generate.py soft) or --no-soft")
    if args.stage == "readout" and (args.target, args.readout) == ("label", "generative"):
        p.error("--readout generative is for --target score; labels are generated by the student")
    if args.stage != "ubm":  # settings.json shall hold it, or a rerun could go on in another
        args.dtype = args.dtype or default_dtype(args.device)
    args.run = run_info("train.py", argv)
    return args


STAGES = {
    "assistant": "both tasks on the teacher's chains",
    "student": "both tasks on all chains, from hard and soft labels",
    "readout": "a score or label read off the last hidden state (arXiv 2606.05713; its values: "
               "rank, dropout, --lr, --head-lr, --nf4, --scope all; the rest is ours)",
    "ubm": "small classifier for the cascade: short runs that answer together, calibrated"}


def shared_flags(groups):
    """Of every stage."""
    flag = groups["data"]
    flag("--data", nargs="+", required=True, metavar="ROWS",
         help="training rows: with cot and label; of readout and ubm posts with label or score")
    flag("--dev", help="posts to select on (split dev, where splits are given)")
    flag("--images", help="images folder (default: images/ beside the rows, else their folder)")
    flag = groups["method"]
    flag("--epochs", type=int, default=20, help="passes over the data (MulCoT-RD: 20)")
    flag("--batch", type=int, default=2, help="posts per micro-batch (MulCoT-RD: 2)")
    flag("--lr", type=float, default=3e-4, help="peak rate of AdamW (MulCoT-RD: 3e-4)")
    flag = groups["run"]
    flag("--out", help="folder for what is trained, its log and resume state")
    flag("--seed", type=int, default=42, help="of data order, dropout, new weights (MulCoT-RD: 42)")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda:1 …")


def loop_flags(groups):
    """Of the stages that train an adapter in the one loop."""
    flag = groups["data"]
    flag("--max-pixels", type=int, default=0,
         help="image size cap, 0: the model's own (78400: at most the release's 100 tokens)")
    flag("--show", type=int, default=0, metavar="N",
         help="print N examples with the supervised tokens in green, and stop")
    flag = groups["model"]
    flag("--model", required=True, help="hub name or folder (MulCoT-RD: Qwen2.5-VL-7B, 3B)")
    flag("--rank", type=int, default=16, help="of LoRA (MulCoT-RD: 16)")
    flag("--alpha", type=float, default=32, help="of LoRA (MulCoT-RD: 32)")
    flag("--dropout", type=float, default=0.05,
         help="of LoRA (MulCoT-RD: 0.2 assistant, 0.05 student)")
    flag("--scope", choices=("language", "all"), default="language",
         help="what LoRA adapts; all: the vision tower's MLPs too, as the authors do")
    flag("--nf4", action=YES_NO, default=False, help="quantise the language model to 4 bits")
    flag("--dtype", choices=("float32", "bfloat16"), help="of the frozen base (default: bfloat16 "
         "on GPU, float32 on CPU); LoRA, optimiser and losses are float32")
    flag = groups["method"]
    flag("--accumulate", type=int, default=20, help="micro-batches per step (MulCoT-RD: 20)")
    flag("--schedule", choices=("plateau", "cosine"), default="plateau", help="plateau: halve at "
         "the 3rd epoch without better dev accuracy (MulCoT-RD: patience 2); cosine: to 0")
    flag("--warmup", type=float, default=0.0, help="share of steps with rising rate (MulCoT-RD: 0)")
    flag("--clip", type=float, default=1.0, help="gradient norm cap, 0 for none (MulCoT-RD: none)")
    flag = groups["run"]
    flag("--workers", type=int, default=4 if torch.cuda.is_available() else 0,
         help="processes that decode images, 0: this one (in Docker they want --shm-size 8g)")
    flag("--save-every", type=int, default=0, help="resume point each N steps, not just epochs")
    flag("--log-every", type=int, default=10, help="steps per log line")
    flag("--gradient-checkpointing", action=YES_NO, default=False, help="less memory, slower")


def chain_flags(flag, stage):
    """Of the two tasks, and of the student's soft labels and ablations."""
    flag("--reasoning-weight", type=float, default=0.8, help="λ_rea (paper: 0.8)")
    flag("--label-weight", type=float, default=0.2, help="λ_cls (paper: 0.2)")
    flag("--reasoning", action=YES_NO, default=True,
         help="--no-reasoning: label task alone, weight 1")
    flag("--max-answer", type=int, default=512,
         help="longest chain in tokens; longer rows are set aside (release: none is)")
    if stage == "student":
        flag("--soft", help="folder of generate.py soft; or say --no-soft")
        flag("--no-soft", action="store_true", help="hard labels only (ablation)")
        flag("--augment", action=YES_NO, default=True,
             help="--no-augment leaves the assistant's chains out (ablation)")
        flag("--lam", type=float, default=0.3, help="λ, weight of the soft labels (paper: 0.3)")
        flag("--temperature", type=float, default=2.0, help="τ, softens both sides (paper: 2)")
        flag("--t-squared", action=YES_NO, default=False, help="Hinton's τ² on the KL (paper: off)")


# ---- MulCoT-RD: assistant and student ----------------------------------------------------------


class Stage:
    """What the loop needs of a stage: `branches_of` (a post -> [(question, answer), ...] to train
    on, counted from branch 1), `loss`, `metrics`, and the names of two dev metrics, of which more
    is better: `selected_by` chooses the best epoch, `ties` decides between equals."""

    selected_by, ties = "accuracy", "macro_f1"

    def __init__(self, args, processor):
        self.args, self.processor, self.soft_labels = args, processor, None

    def add_weights(self, model, items):
        """Puts on the model what is trained beside LoRA: nothing."""

    def save(self, model, folder):
        """Writes what was trained, and the image size of training."""
        save_adapter(model, folder)
        self.processor.image_processor.save_pretrained(folder)

    def task_loss(self, model, hidden, batch, examples, branch, answer_tokens):
        """One task's loss at the hidden states (B, T, D) -> {"loss": differentiable scalar, "ce":
        its cross-entropy, "kl": its KL, where there are soft labels}. Cross-entropy and KL are
        summed over the supervised positions of this branch and divided by `answer_tokens`, their
        number in the whole optimiser step. Positions are taken in chunks, so that no (N, V) logits
        are held."""
        supervised = batch.supervised(branch)  # (B, T)
        targets = batch.targets[supervised]  # (N,)
        assert targets.max() < model.lm_head.out_features, (targets.max(), model.lm_head)
        if self.soft_labels:
            assistant_hidden = self.soft_labels.hidden(examples, branch)  # (N, D')
            assert len(assistant_hidden) == len(targets), (len(assistant_hidden), len(targets))

        def sums_of(h, positions):  # hidden states h (n, D) of a slice of the N positions
            logits = model.lm_head(h).float()  # (n, V)
            hard = F.cross_entropy(logits, targets[positions], reduction="sum") / answer_tokens
            if not self.soft_labels:
                return dict(loss=hard, ce=hard)
            head = self.soft_labels.head
            assistant_logits = F.linear(assistant_hidden[positions], head)  # (n, V')
            soft = distill_kl(logits, assistant_logits, self.args.temperature,
                              self.args.t_squared, reduction="sum") / answer_tokens
            # the paper adds the tasks and mixes then: the same sum
            return dict(loss=student_loss(hard, soft, self.args.lam), ce=hard, kl=soft)

        size = max(1, CHUNK_LOGITS // model.lm_head.out_features)
        return in_chunks(sums_of, hidden[supervised], size)


class ChainStage(Stage):
    """`assistant` and `student`: the reasoning and the label task of a post, two branches of one
    prefix. The student also learns from the assistant's soft labels, unless --no-soft."""

    def __init__(self, args, processor):
        super().__init__(args, processor)
        # the number of each task's branch: the order of training_branches, counted from 1
        self.branch_of = {"reason": 1, "label": 2} if args.reasoning else {"label": 1}
        if args.stage == "student" and not args.no_soft and args.lam > 0:
            self.soft_labels = open_soft_labels(args, processor)

    def branches_of(self, post):
        """The training tasks of a post as branches; [] of rows that --no-augment leaves out. Raises
        InputError where a row is to be set aside."""
        args = self.args
        if post.split in ("dev", "test"):
            raise InputError(f"split {post.split} is not for training")
        by_assistant = post.columns.get("source") == "assistant"
        if args.stage == "student" and not args.augment and by_assistant:
            return []
        # rows without a chain have no soft labels: generate.py soft skips them
        need_chain = args.reasoning or self.soft_labels is not None
        branches = training_branches(post, self.processor, args.max_answer, need_chain)
        return branches if args.reasoning else branches[-1:]  # the last is the label task

    def loss(self, model, batch, examples, counts):
        """A micro-batch's part of the step's loss -> (scalar, {name: detached scalar}). paper:
        L_multi = λ_rea L_rea + λ_cls L_cls; each L is already mixed from hard and soft."""
        hidden = forward_branches(model, batch)  # (B, T, D)
        losses = {}
        terms = {}
        for task, branch in self.branch_of.items():
            answer_tokens = counts.answer_tokens[branch]
            sums = self.task_loss(model, hidden, batch, examples, branch, answer_tokens)
            losses[task] = sums.pop("loss")
            terms |= {f"{name}_{task}": value for name, value in sums.items()}
        if not self.args.reasoning:
            return losses["label"], terms
        loss = multitask_loss(losses["reason"], losses["label"], self.args.reasoning_weight,
                              self.args.label_weight)
        return loss, terms

    def metrics(self, model, posts):
        """{name: number} of dev posts."""
        rows = []
        for part in chunks(posts, DEV_BATCH * self.args.batch):
            rows += predict(model, self.processor, part, chain=False)
        return label_scores(rows, posts)


def open_soft_labels(args, processor):
    """The soft labels to train with, and the assistant's output matrix on our device; those of
    another tokenizer are refused."""
    soft_labels = SoftLabels(args.soft)
    if soft_labels.settings.get("tokenizer") != tokenizer_hash(processor.tokenizer):
        raise InputError(f"{args.soft} was made with another tokenizer than {args.model} has: "
                         "equal ids would be other words; use an assistant of its family, or "
                         "--no-soft")
    soft_labels.load_head(args.device)
    return soft_labels


def label_scores(rows, posts):
    """{accuracy, macro F1} of predicted rows; a row without a prediction is wrong. paper: the best
    dev accuracy selects; macro F1 breaks ties, here on MVSA too (departure 21)."""
    gold = [post.label for post in posts]
    predicted = [row["prediction"] for row in rows]
    scores = confusion_scores(confusion_table(gold, predicted))
    return dict(accuracy=float(scores["accuracy"]), macro_f1=float(scores["macro_f1"]))


# ---- set-up ------------------------------------------------------------------------------------


# flags that a rerun may change: they do not change the result, except that another device rounds
# and draws dropout differently. --data, --dev and --images may be other paths to the same rows,
# which record_settings compares
MAY_CHANGE = ("run", "out", "show", "device", "data", "dev", "images", "workers", "log_every",
              "save_every", "gradient_checkpointing")


def record_settings(args, items, rejects, dev, resumable):
    """Writes settings.json and set_aside.json, before anything else; refuses to go on with a run of
    other settings or rows."""
    settings = settings_of(args, MAY_CHANGE)
    settings["rows"] = digest([(post.row(), branches) for post, branches in items])
    settings["dev_rows"] = digest([post.row() for post in dev])
    if get_rank() == 0:
        file = settings_file(args.out)
        if file.exists() and not resumable:
            print("note       nothing had been saved when this run was stopped: it begins anew")
        check_settings(file, settings, resumable, run=args.run)
        write_json(Path(args.out, "set_aside.json"), rejects)
    barrier()  # none begins where the first refuses
    print(f"settings   {row_text(settings)}")
    texts = {post.text for post, _ in items}
    shared = sum(post.text in texts for post in dev)
    if shared:
        print(f"note       {shared} of {len(dev)} dev posts have the text of a training post: what "
              "is chosen on them is not chosen on unseen posts")


def build_model(args, stage, items):
    """The model with what is to be trained on it, in train mode. The base is frozen, in --dtype
    (bfloat16 on a GPU that has it) or in 4 bits with --nf4; what is trained is in fp32."""
    torch.manual_seed(args.seed)
    # the stage has its processor already
    model, _ = load_model(args.model, args.device, args.dtype, args.max_pixels, args.nf4)
    if lora_layers(model):
        raise InputError(f"--model {args.model} is an adapter: generate.py export makes a model of "
                         "it")
    names = add_lora(model, args.rank, args.alpha, args.dropout, scope=args.scope)
    if get_rank() == 0:
        write_json(Path(args.out, "lora_modules.json"), names)
    print(f"lora       {len(names)} layers, named in {args.out}/lora_modules.json")
    stage.add_weights(model, items)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = count_parameters(model)
    print(f"trainable  {count:,} of {total:,} parameters ({count / total:.2%})")
    if get_rank() > 0:  # choice: each process draws its own dropout
        torch.manual_seed(args.seed + 7919 * get_rank())
    return model.train()


def checkpoint_layers(model):
    """Gradient checkpointing: of each layer only the input is kept, for backward it runs again."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # trap: this asks for gradients of embeddings, of most vision towers' too, which sends a frozen
    # tower through a backward pass for nothing
    model.disable_input_require_grads()


def show_tokens(batch, tokenizer, row=0):
    """One row of a batch as text for the terminal: supervised tokens green, prompts plain, a ruler
    per branch. A token is coloured where it is the target, so the colours prove shift and mask."""
    green, plain = "\033[32m", "\033[0m"
    lines, branch, piece = [], None, None
    for t, token in enumerate(batch.input_ids[row].tolist()):
        before, branch = branch, int(batch.branch_ids[row, t])
        last, piece = piece, tokenizer.decode([token])
        if branch == -1:  # padding
            break
        if branch != before:
            lines.append(f"\n{plain}---- {f'branch {branch}' if branch else 'prefix'} ----\n")
        if piece == last and piece in PLACEHOLDERS:
            continue  # hundreds of one placeholder are shown once
        supervised = branch == before and batch.targets[row, t - 1] != -100
        lines.append((green if supervised else plain) + piece)
    return "".join(lines) + plain


def steps_of_epoch(lengths, size, epoch, seed, window=4):
    """Which items make up each optimiser step of an epoch: shuffled, sorted by length within
    windows of a few steps, so that little is padded, and the steps shuffled again; one may be
    smaller. A function of its arguments alone: a resumed run goes on with the right posts."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    steps = []
    for start in range(0, len(order), window * size):
        alike = sorted(order[start : start + window * size], key=lambda i: lengths[i])
        steps += chunks(alike, size)
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


def step_loader(args, items, processor, first):
    """A DataLoader of the optimiser steps from `first` to the last epoch's end: each a list of this
    process's micro-batches (Batch, its examples). Its workers decode the images. Under torchrun the
    posts of a step are dealt out among the processes; together they make the same step."""
    step_size = args.batch * args.accumulate
    # characters of the answers; micro_batches sorts again, by tokens
    lengths = [sum(len(answer or "") for _, answer in branches) for _, branches in items]
    per_epoch = math.ceil(len(items) / step_size)
    steps = []
    for epoch in range(first // per_epoch, args.epochs):
        steps += steps_of_epoch(lengths, step_size, epoch, args.seed)
    steps = steps[first % per_epoch :]
    mine = [step[get_rank() :: get_world_size()] for step in steps]
    # trap: the default takes a file handle for each tensor under way
    torch.multiprocessing.set_sharing_strategy("file_system")
    return torch.utils.data.DataLoader(
        items, batch_sampler=mine, collate_fn=partial(micro_batches, processor, args.batch),
        num_workers=args.workers, prefetch_factor=1 if args.workers else None,
        timeout=600 if args.workers else 0,  # trap: with /dev/shm full they would wait for ever
        generator=torch.Generator())  # trap: else the loader would draw from the one of dropout


def micro_batches(processor, size, items):
    """[(Batch, examples), …] of one step's items, like lengths together."""
    examples = sorted((encode(*item, processor) for item in items), key=len)
    return [(collate(part, processor.pad_id), part) for part in chunks(examples, size)]


# ---- the loop ----------------------------------------------------------------------------------


class TrainingState:
    """All that a killed run needs to go on as if nothing had happened: trained weights, optimiser,
    schedule, the step, the log and the best so far, every process's random numbers and running
    sums. The order of the data is a function of seed and step (steps_of_epoch).

    After a kill the steps since the last `save` (an epoch's end, --save-every, ten minutes, a
    signal) are made again, with the same posts and draws."""

    def __init__(self, args, model):
        self.args, self.file = args, Path(args.out, "state.pt")
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        adapter = [p for name, p in self.trained.items() if not name.startswith("readout.")]
        groups = [dict(params=adapter, peak_lr=args.lr)]
        if args.stage == "readout":
            groups.append(dict(params=model.readout.parameters(), peak_lr=args.head_lr))
        # paper: AdamW; its betas, epsilon and weight decay (0.01) are torch's
        self.optimizer = torch.optim.AdamW(groups)  # set_learning_rate says how fast
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, "max", factor=0.5, patience=2, min_lr=1e-6,
            threshold=0)  # trap: the default threshold is relative, and -MAE is negative
        self.step = 0
        self.sums = Counter()
        # standing: [selecting metric, tie-breaker], compared in this order; [] is below all
        self.best = dict(step=0, metrics={}, standing=[])
        self.rows = []  # of log.jsonl
        self.restore()

    def save(self):
        """Atomically; the random numbers and running sums of every process."""
        on_gpu = str(self.args.device).startswith("cuda")
        cuda = torch.cuda.get_rng_state(self.args.device) if on_gpu else None
        processes = gather((torch.get_rng_state(), cuda, dict(self.sums)))
        trained = {name: p.detach().cpu() for name, p in self.trained.items()}
        values = dict(step=self.step, best=self.best, rows=self.rows, processes=processes,
                      trained=trained, optimizer=self.optimizer.state_dict(),
                      plateau=self.plateau.state_dict())
        if get_rank() == 0:
            write_atomic(self.file, lambda part: torch.save(values, part))

    def restore(self):
        """Everything as it was, if there is something; a run that was killed before its first
        resume point begins anew."""
        if not self.file.exists():
            return
        with explaining(f"{self.file} is damaged: delete it to train anew"):
            values = torch.load(self.file, weights_only=True, map_location="cpu")
            self.step, self.best, self.rows = values["step"], values["best"], values["rows"]
            for name, p in self.trained.items():
                p.data.copy_(values["trained"][name])
            self.optimizer.load_state_dict(values["optimizer"])
            self.plateau.load_state_dict(values["plateau"])
        if len(values["processes"]) == get_world_size():  # else other processes, other draws
            rng, cuda, sums = values["processes"][get_rank()]
            self.sums = Counter(sums)
            torch.set_rng_state(rng)
            if cuda is not None and str(self.args.device).startswith("cuda"):
                torch.cuda.set_rng_state(cuda, self.args.device)
        print(f"resumed    at step {self.step}")

    def log(self, **row):
        """Prints a row and writes log.jsonl with it, in the first process. The rows are part of the
        state, so that the file of a resumed run holds no step twice."""
        if get_rank() == 0:
            self.rows.append(row)
            write_rows(Path(self.args.out, "log.jsonl"), self.rows)
            say(row_text(row))


def all_reduce_gradients(parameters):
    """Gradients summed over all processes. trap: DDP would do it, but we call the model's parts and
    not its forward. A missing gradient (no image in the step) becomes zero, so that AdamW treats
    it alike on any number of processes."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if get_world_size() > 1:
            torch.distributed.all_reduce(p.grad)


def sum_over_processes(counts):
    """A Counter summed over all processes."""
    total = Counter()
    for part in gather(counts):
        total.update(part)
    return total


@dataclass
class StepCounts:
    """What an optimiser step holds, over all processes: posts, and the tokens of each branch's
    answers {branch: tokens}."""

    posts: int
    answer_tokens: dict


def step_counts(micro):
    """The StepCounts of a step's micro-batches. trap: to divide by each micro-batch's own count
    would make 1 x 8 differ from 8 x 1."""
    counts = Counter()
    for batch, examples in micro:
        counts["posts"] += len(examples)
        for branch in range(1, int(batch.branch_ids.max()) + 1):
            counts[branch] += int(batch.supervised(branch).sum())
    total = sum_over_processes(counts)
    posts = total.pop("posts")  # what is left is {branch: tokens}
    return StepCounts(posts, total)


def set_learning_rate(args, state, total):
    """Warm-up and cosine. Under the plateau schedule the rate is set here at the first step and
    during warm-up only; afterwards it belongs to ReduceLROnPlateau, which halves it in
    evaluate_and_save when dev stops getting better."""
    factor = min(1.0, (state.step + 1) / max(1.0, args.warmup * total))
    if args.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * state.step / total))
    elif state.step > args.warmup * total:
        return
    for group in state.optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def train(args):
    """Set-up, the loop, the closing lines."""
    args.device = init_distributed(args.device)
    processor = load_processor(args.model, args.max_pixels)
    stage_class = dict(assistant=ChainStage, student=ChainStage, readout=ReadoutStage)
    stage = stage_class[args.stage](args, processor)
    items, rejects = training_items(args.data, args.images, stage.branches_of)
    if args.stage == "readout":
        items = [(without_inputs(post, args.without), branches) for post, branches in items]
    for post, branches in items[: args.show]:
        batch = collate([encode(post, branches, processor)], processor.pad_id)
        print(show_tokens(batch, processor.tokenizer))
    if args.show:
        return
    dev = read_dev_posts(args.dev, args.images, getattr(args, "target", "label"))
    record_settings(args, items, rejects, dev, resumable=Path(args.out, "state.pt").exists())
    per_epoch = math.ceil(len(items) / (args.batch * args.accumulate))
    total = per_epoch * args.epochs
    images = sum(bool(post.images) for post, _ in items)
    audio = sum(bool(post.audio) for post, _ in items)
    print(f"data       {len(items)} rows ({images} with images, {audio} with audio), "
          f"{len(dev)} dev posts, {per_epoch} steps an epoch, {total} in all")
    model = build_model(args, stage, items)
    state = TrainingState(args, model)
    train_loop(args, stage, model, state, items, dev, per_epoch, total)
    best = state.best["metrics"]
    print(f"rows {len(items)}  steps {total}\nlog {args.out}/log.jsonl  settings "
          f"{args.out}/settings.json\nbest dev {stage.selected_by} {best[stage.selected_by]:.3f} "
          f"({stage.ties} {best[stage.ties]:.3f}) at step {state.best['step']}: {args.out}/best")


def train_loop(args, stage, model, state, items, dev, per_epoch, total):
    """Rate -> micro-batches -> clip -> step -> log; at each epoch's end evaluate and save.

    Losses are sums divided by the whole step's counts, so the micro-batches' gradients only add up:
    1 x 8 posts, 8 x 1 and two processes are the same step, but for their draws of dropout."""
    parameters = list(state.trained.values())
    bar = progress(total, args.stage, "step", done=state.step)
    signals = note_signals()
    began = saved = time.time()
    for micro in step_loader(args, items, stage.processor, state.step):  # one step's micro-batches
        set_learning_rate(args, state, total)
        norm = backward(args, stage, model, state, micro, parameters)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.sums.update(steps=1, seconds=time.time() - began)
        bar.update()
        if state.step % args.log_every == 0 or state.step == total:
            log_means(state, per_epoch, norm)
        epoch_ends = state.step % per_epoch == 0
        if epoch_ends:
            evaluate_and_save(args, stage, model, state, dev)
        # all processes do as one: by the first one's clock, and by anybody's signal (0: none)
        overdue = gather(time.time() - saved > SAVE_SECONDS)[0]
        stopped = max(gather(signals[0] if signals else 0))
        every = args.save_every and state.step % args.save_every == 0
        if epoch_ends or every or stopped or overdue:
            state.save()
            saved = time.time()
        if stopped and state.step < total:
            say(f"saved at step {state.step}")
            raise KeyboardInterrupt(stopped)
        began = time.time()
    bar.close()


def backward(args, stage, model, state, micro, parameters):
    """The gradient of one optimiser step over all its micro-batches and processes, clipped; returns
    its norm before that. Losses are added to the running sums."""
    counts = step_counts(micro)
    for batch, examples in micro:
        loss, terms = stage.loss(model, batch.to(args.device), examples, counts)
        loss.backward()
        values = torch.stack([loss.detach(), *terms.values()]).tolist()  # waits for a GPU once
        state.sums.update(dict(zip(("loss", *terms), values)))  # a Counter: adds
        state.sums["seen_tokens"] += int((batch.branch_ids >= 0).sum())
    all_reduce_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf).item()
    if not math.isfinite(norm + state.sums["loss"]):
        raise InputError(f"step {state.step + 1}: gradient norm {norm}, loss since last log "
                         f"{state.sums['loss']}: training diverged; delete {args.out} and begin "
                         "with a lower --lr or with --clip")
    return norm


def log_means(state, per_epoch, norm):
    """A line of the log: means since the last one, over all processes; the last step's gradient
    norm and rate."""
    # each process counts every step and second, but holds only its part of tokens and losses
    sums = sum_over_processes(state.sums)
    speed = round(sums.pop("seen_tokens") * get_world_size() / sums.pop("seconds"))
    steps = sums.pop("steps") / get_world_size()
    means = {name: value / steps for name, value in sums.items()}
    state.log(step=state.step, epoch=round(state.step / per_epoch, 2), grad_norm=norm,
              lr=state.optimizer.param_groups[0]["lr"], tokens_per_s=speed, **means)
    state.sums.clear()


def note_signals():
    """[], into which the first Ctrl-C or SIGTERM puts its number, so that the loop can finish its
    step and save; the second one stops at once. In place of run_stage's handlers."""
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt(number)
        noted.append(number)
        say("asked to stop: this step is finished and saved first; once more stops at once")

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return noted


def evaluate_and_save(args, stage, model, state, dev):
    """The dev metrics into the log and the plateau schedule, the adapter into last/ and, if it is
    the best so far, into best/. Every process evaluates all dev posts and so sees the same plateau;
    the first one writes."""
    model.eval()
    metrics = stage.metrics(model, dev)
    model.train()
    state.log(step=state.step, **{f"dev_{name}": value for name, value in metrics.items()})
    if args.schedule == "plateau":
        state.plateau.step(metrics[stage.selected_by])
    folders = [Path(args.out, "last")]
    standing = [metrics[stage.selected_by], metrics[stage.ties]]
    if standing > state.best["standing"]:
        state.best = dict(step=state.step, metrics=metrics, standing=standing)
        folders.append(Path(args.out, "best"))
    for folder in folders if get_rank() == 0 else []:
        stage.save(model, folder)


# ---- the readout (arXiv 2606.05713) ------------------------------------------------------------


def readout_flags(flag):
    """Of what is read, and how."""
    flag("--target", choices=("score", "label"), default="score", help="what is read")
    flag("--readout", choices=("discriminative", "generative"), default="discriminative",
         help="generative: its rival, which writes the score as text")
    flag("--without", nargs="*", choices=("frames", "audio"), default=[],
         help="inputs to leave out, in training and ever after")
    flag("--head-lr", type=float, default=1e-3, help="peak rate of the head (paper: 1e-3)")


class ReadoutStage(Stage):
    """`readout`: a score or a label read off the last hidden state, or a score written as text.
    paper: arXiv 2606.05713."""

    def __init__(self, args, processor):
        super().__init__(args, processor)
        if args.target == "score":
            self.selected_by, self.ties = "neg_mae", "corr"

    def add_weights(self, model, items):
        """The readout. Of scores it learns z-scores, so it keeps the mean and deviation of its
        training scores."""
        config = dict(target=self.args.target, readout=self.args.readout, without=self.args.without)
        if self.args.target == "score":
            scores = [post.score for post, _ in items]
            config |= dict(mean=statistics.fmean(scores), deviation=statistics.pstdev(scores) or 1)
        model.readout = Readout(model.lm_head.in_features, config).to(self.args.device)

    def save(self, model, folder):
        """The readout's head too: `head.safetensors` (where it has layers), then `head.json`."""
        super().save(model, folder)
        if model.readout.discriminative:
            write_tensors(Path(folder, "head.safetensors"), model.readout.state_dict())
        write_json(Path(folder, "head.json"), model.readout.config)

    def branches_of(self, post):
        """The prompt of a post as a branch, with the score as its answer where that is written;
        else as `target_branches`."""
        branches = target_branches(post, self.args.target)
        if branches and self.args.readout == "generative":
            return [(SCORE_FORMAT, render_score(post.score))]
        return branches

    def loss(self, model, batch, examples, counts):
        """A micro-batch's part of the step's loss -> (scalar, {name: detached scalar})."""
        hidden = forward_branches(model, batch)  # (B, T, D)
        if self.args.readout == "generative":
            sums = self.task_loss(model, hidden, batch, examples, 1, counts.answer_tokens[1])
            return sums["loss"], dict(ce_score=sums["ce"])
        config = model.readout.config
        if self.args.target == "score":
            gold = [float(example.post.score) for example in examples]
        else:
            gold = [LABELS.index(example.post.label) for example in examples]
        gold = torch.tensor(gold, device=hidden.device)
        out = model.readout(hidden, batch.branch_ids >= 0)  # (B, 1) or (B, 3)
        loss = readout_loss(out, gold, config["mean"], config["deviation"]) / counts.posts
        return loss, {}

    def metrics(self, model, posts):
        """{name: number} of dev posts."""
        rows = []
        for part in chunks(posts, DEV_BATCH * self.args.batch):
            rows += read_out(model, self.processor, part)
        if self.args.target == "label":
            return label_scores(rows, posts)
        scores = [math.nan if row["score"] is None else row["score"] for row in rows]
        pairs = torch.tensor([scores, [post.score for post in posts]], dtype=torch.double)  # (2, n)
        # choice: an answer without a number is as far off as can be
        errors = (pairs[0] - pairs[1]).abs().nan_to_num(6.0)
        pairs = pairs[:, ~pairs[0].isnan()]
        corr = 0.0  # where one side has fewer than two different numbers
        if pairs.shape[1] and (pairs.amax(1) > pairs.amin(1)).all():
            corr = torch.corrcoef(pairs)[0, 1].item()
        return dict(neg_mae=-errors.mean().item(), corr=corr)


def target_branches(post, target):
    """The prompt of a post as a branch; [] of dev and test posts, which MOSI's and MOSEI's label
    files hold too. Raises InputError where a row is to be set aside."""
    if post.split in ("dev", "test"):
        return []
    if getattr(post, target) is None:
        raise InputError(f"no {target}")
    return readout_branches(target)


# ---- the UBM (arXiv 2509.04459) ----------------------------------------------------------------


def ubm_flags(groups):
    """choice: the whole recipe, found on dev."""
    flag = groups["model"]
    flag("--text-encoder", required=True, help="hub name or folder")
    flag("--image-encoder", help="hub name or folder (default: none)")
    flag = groups["method"]
    flag("--bins", type=int, choices=(7,), help="learn `score` in [-3, 3] as so many classes")
    flag("--members", type=int, default=2, help="runs whose probabilities are averaged")
    flag("--head-lr", type=float, default=1e-3, help="of the linear layer, falling to 0")
    flag("--adv-epsilon", type=float, default=0.1, help="length of each post's adversarial step in "
         "its word embeddings: less overfitting; 0: none, half the time, for random encoders")


def ubm(args):
    """choice: an ensemble of `--members` short runs, its temperature fitted on dev. Under torchrun
    each process trains some of the members. A member that is done is on disk; a killed one starts
    anew. paper: arXiv 2509.04459 asks for a small model whose entropy can be trusted."""
    args.device = init_distributed(args.device)
    out = Path(args.out)
    classes, target = (SCORE_BINS, "score") if args.bins else (LABELS, "label")
    # a UBM has no prompt: a branch says that a post is used
    branches_of = partial(target_branches, target=target)
    items, rejects = training_items(args.data, args.images, branches_of)
    posts = [post for post, _ in items]
    dev = read_dev_posts(args.dev, args.images, target)
    record_settings(args, items, rejects, dev, resumable=settings_file(out).exists())
    torch.manual_seed(args.seed)
    model = new_ubm(args.text_encoder, classes, args.image_encoder, args.members).to(args.device)
    for member in model.members:
        reinit_top_layer(member.text)
    files = [out / f"member-{k}.safetensors" for k in range(args.members)]
    for k in range(get_rank(), args.members, get_world_size()):
        if not files[k].exists():
            write_tensors(files[k], train_member(args, k, model.members[k], posts, dev, classes))
    barrier()
    if get_rank() > 0:
        return
    for member, file in zip(model.members, files):
        member.load_state_dict(read_tensors(file))
    logits = ubm_logits(model, dev)
    model.temperature = fit_temperature(logits, class_targets(dev, classes))
    save_ubm(model, out)
    print(f"rows {len(posts)}  temperature {model.temperature:.2f}\nlog {out}/member-*.jsonl  "
          f"settings {out}/settings.json")
    metrics = row_text(ubm_metrics(classes, logits, dev))
    print(f"{args.members} members together: dev {metrics}: {out}")


@torch.no_grad()
def ubm_logits(model, posts):
    """Logits (N, C) on the CPU, in the posts' order."""
    model.eval()
    return torch.cat([model(model.inputs(part)).cpu() for part in chunks(posts, 64)])


def ubm_metrics(classes, logits, posts):
    """{name: number}, more is better; their mean selects."""
    if classes == LABELS:
        return label_scores(label_rows(logits.softmax(1)), posts)
    scores = logits.softmax(1) @ torch.tensor(classes, dtype=torch.float)
    gold = torch.tensor([float(post.score) for post in posts])
    return dict(neg_mae=-(scores - gold).abs().mean().item())


class WordEmbeddings:
    """Watches an encoder's word embeddings (B, T, D) and adds `offset` to them: what an adversarial
    step needs, as a forward hook, so that any Hugging Face encoder will do."""

    def __init__(self, encoder):
        self.handle = encoder.get_input_embeddings().register_forward_hook(self.hook)

    def hook(self, module, inputs, output):
        self.moved = output + self.offset
        self.moved.retain_grad()
        return self.moved

    def uphill(self, epsilon):
        """A step of length epsilon for each post, to where its loss is higher. Miyato et al. 2017,
        arXiv 1605.07725."""
        return epsilon * F.normalize(self.moved.grad.flatten(1)).view_as(self.moved)


def reinit_top_layer(encoder):
    """Draws the top layer of a text encoder anew: it is made for the task that it was trained on,
    and on few posts a random start learns better (Zhang et al. 2021, arXiv 2006.05987). An encoder
    whose layers share their weights (ALBERT) keeps them."""
    stacks = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]
    layers = max(stacks, key=len, default=nn.ModuleList())
    if len(layers) != encoder.config.num_hidden_layers:
        return
    for module in layers[-1].modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=encoder.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def class_targets(posts, classes):
    """What to learn (N, C): the label; a score's two neighbouring bins, so that the expectation is
    the score. Scores beyond the outer bins count as those."""
    if tuple(classes) == LABELS:
        labels = torch.tensor([LABELS.index(post.label) for post in posts])
        return F.one_hot(labels, len(LABELS)).float()
    scores = torch.tensor([float(post.score) for post in posts]).clamp(classes[0], classes[-1])
    return (1 - (scores[:, None] - torch.tensor(classes)).abs()).clamp(min=0)


def fit_temperature(logits, targets):
    """The temperature of least cross-entropy for logits and targets (N, C), to 1 %, between 0.5 and
    11. Guo et al. 2017, arXiv 1706.04599. Fit it on dev, never on test."""
    grid = 2.0 ** torch.linspace(-1, 3.5, 313)
    losses = torch.stack([F.cross_entropy(logits / t, targets) for t in grid])
    return grid[losses.argmin()].item()


def save_ubm(model, folder):
    """ubm.safetensors, the encoders' configs and tokenizer, ubm.json last: a folder that needs no
    hub."""
    folder, member = Path(folder), model.members[0]
    member.text.config.save_pretrained(folder / "text")
    model.tokenizer.save_pretrained(folder / "text")
    if member.image is not None:
        member.image.config.save_pretrained(folder / "image")
        member.image_processor.save_pretrained(folder / "image")
    write_tensors(folder / "ubm.safetensors", model.state_dict())
    write_json(folder / "ubm.json", dict(classes=model.classes, temperature=model.temperature,
                                         members=len(model.members),
                                         image=member.image is not None))


def train_member(args, k, model, posts, dev, classes):
    """Trains member k: two rates, linear decay, each batch once more with the posts' word
    embeddings moved uphill (adversarial training), the weights averaged as they go. Returns
    {name: tensor} of the weights' running average as of its best dev epoch."""
    average, words = copy.deepcopy(model), WordEmbeddings(model.text)
    encoders = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    optimizer = torch.optim.AdamW([dict(params=encoders, peak_lr=args.lr),
                                   dict(params=model.head.parameters(), peak_lr=args.head_lr)],
                                  lr=0.0, weight_decay=0.01, fused=True)
    seed = args.seed * 1000 + k
    torch.manual_seed(seed)  # order and dropout depend on nothing else
    lengths = [len(post.text) for post in posts]
    best = -math.inf
    log = []
    for epoch in range(args.epochs):
        steps = steps_of_epoch(lengths, args.batch, epoch, seed, window=16)
        loss = member_epoch(args, epoch, steps, model, average, optimizer, words, posts, classes)
        for old, new in zip(average.buffers(), model.buffers()):
            old.copy_(new)  # a convolutional encoder's running statistics
        metrics = ubm_metrics(classes, ubm_logits(average, dev), dev)
        log.append(dict(member=k, epoch=epoch + 1, loss=loss,
                        **{f"dev_{name}": value for name, value in metrics.items()}))
        write_rows(Path(args.out, f"member-{k}.jsonl"), log)
        print(row_text(log[-1]))
        if statistics.mean(metrics.values()) > best:
            best = statistics.mean(metrics.values())
            kept = copy.deepcopy(average.state_dict())
    words.handle.remove()
    return kept


def member_epoch(args, epoch, steps, model, average, optimizer, words, posts, classes):
    """One epoch of a member, `steps` as steps_of_epoch gives them; returns the mean loss of
    the plain passes. Each batch is read once and passed twice: plain, then with its word embeddings
    moved by the first pass's gradient; both gradients add up before the step."""
    step, total, losses = epoch * len(steps), args.epochs * len(steps), []
    bar = progress(len(steps), f"epoch {epoch + 1}", "step")
    model.train()
    for rows in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (1 - step / total)
        batch = [posts[i] for i in rows]
        inputs = model.inputs(batch)
        targets = class_targets(batch, classes).to(args.device)
        words.offset = 0.0
        for adversarial in (False, True) if args.adv_epsilon else (False,):
            if adversarial:
                words.offset = words.uphill(args.adv_epsilon)
            with torch.autocast(args.device.split(":")[0], torch.bfloat16):
                logits = model(inputs)
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            if not adversarial:
                losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise InputError(f"step {step + 1}: loss {losses[-1]}: lower --lr")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(0.98, (1 + step) / (10 + step))  # choice: short at first
        for mean, new in zip(average.parameters(), model.parameters()):
            mean.data.lerp_(new.data, 1 - decay)
        bar.update()
    bar.close()
    return statistics.mean(losses)


def main(argv=None):
    """Runs the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("--out", "--seed"):  # the whole road
        road = Path(__file__).with_name("tests") / "demo.py"
        if not road.exists():
            sys.exit(f"error: the embedded default needs {road}; without it give a stage: python "
                     "train.py --help")
        return runpy.run_path(str(road))["main"](words)
    args = parse_args(argv)
    return run_stage(ubm if args.stage == "ubm" else train, args)


if __name__ == "__main__":
    sys.exit(main())
