"""Speed and memory, measured side by side. Not a test: `python tests/bench.py train`.

Ours and the oracle run in turns in one process on the same weights and samples; times are medians
of 5, peak memory above the weights is taken in fresh processes (shapes: see there). "of ceiling":
floating-point operations per second against a 2048 x 2048 matrix product on the same threads.

train: one multi-task step against PEFT LoRA with two ordinary Hugging Face passes.
student: one student step, soft labels from files against the assistant beside the student.
teacher: `generate.py teacher` against a server on this machine that takes 200 ms for each call and
has no limit, with 1, 8 and 32 workers; the ceiling is workers / 0.2 s.
nf4: forward and backward through 4 frozen linears of 2048 x 2048: ours, bitsandbytes' and dense
ones, on the same device, in turns.
shapes: on a GPU, training steps and answers at the real shapes of Qwen2.5-VL-3B and 7B (random
weights) against PEFT under autocast, TRL's SFTTrainer (pip install trl==1.16.0) and generate, one
way after another in one process: seconds, the most memory held, weights and all, and the part of
the card's dense peak that is reached, recomputation counted. --rows "7B answers" "step of 8"
measures those rows alone.
recipe: no measurement; the paper's recipe on one card, estimated from BENCHMARKS.md's GPU table.
trl: train.py's own loop against TRL's SFTTrainer (pip install trl==1.16.0): the same model, posts
without images, token ids, LoRA, dtype and optimiser steps; seconds a post and each process's peak.
"""

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import demo  # noqa: E402
import families  # noqa: E402
import generate as generate_script  # noqa: E402
import mulcot  # noqa: E402
import train as train_script  # noqa: E402


# ---- measuring ---------------------------------------------------------------------------------

REPEATS = 5


def median_seconds(ways, device, repeats=None):
    """{name: median seconds} of {name: function}, run in turns, one unmeasured round first."""
    times, repeats = {name: [] for name in ways}, repeats or REPEATS
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - began)
            gc.collect()
    return {name: statistics.median(values) for name, values in times.items()}


def ceiling(device):
    """Floating-point operations a second of a large matrix product, best of 5."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.randn(2048, 2048, device=device, dtype=dtype)
    best = min(median_seconds({"": lambda: x @ x}, device, 1)[""] for _ in range(5))
    return 2 * 2048**3 / best


def operations(way):
    """{aten operation: floating-point operations} of a function, and all of them as "sum"."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()  # trap: counting by module refuses autograd.grad
    counter.mod_tracker.parents = {"Global"}
    with counter:
        way()
    by_name = {str(name): n for name, n in counter.get_flop_counts().get("Global", {}).items()}
    return by_name | {"sum": counter.get_total_flops()}


def peak(way, device):
    """GiB that a function needs above what is held before it."""
    gc.collect()
    gpu = device != "cpu"
    before = demo.peak_mib(gpu, reset=True)
    way()
    return (demo.peak_mib(gpu) - before) / 1024


def peak_alone(args, name):
    """`peak` of one of the subject's ways in a fresh process."""
    command = [sys.executable, __file__, args.subject, "--device", args.device, "--peak-of", name]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    return float(out.stdout.split()[-1])


def side_by_side(args, makers, oracle):
    """Table rows of {name: maker of a function}: seconds, times faster than `oracle`, peak, part of
    its peak, of ceiling. A fresh process makes one way only."""
    if args.peak_of:
        print(peak(makers[args.peak_of](), args.device))
        sys.exit()
    ways = {name: make() for name, make in makers.items()}
    top, done = ceiling(args.device), {name: operations(way) for name, way in ways.items()}
    seconds = median_seconds(ways, args.device)
    peaks = {name: peak_alone(args, name) for name in ways}
    head = ("way", "seconds", "times faster", "peak GiB above weights", "of its peak", "of ceiling")
    return head, [(name, f"{seconds[name]:.2f}", f"{seconds[oracle] / seconds[name]:.2f}",
                   f"{peaks[name]:.2f}", f"{peaks[name] / peaks[oracle]:.2f}",
                   f"{done[name]['sum'] / seconds[name] / top:.2f}") for name in ways]


# ---- a random Qwen2.5-VL and random samples of real size -----------------------------------------

IMAGE, START, PAD = 151655, 151652, 151643


def qwen(device, hidden=512, layers=8, vocab=151936, mlp=1376, tied=True, seed=0, **more):
    """A random Qwen2.5-VL of heads of 64, one key head for 8; vision depth 4."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads = hidden // 64
    text = dict(vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp,
                num_hidden_layers=layers, num_attention_heads=heads, tie_word_embeddings=tied,
                num_key_value_heads=max(1, heads // 8), rms_norm_eps=1e-6,
                rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                     mrope_section=[8, 12, 12])) | more
    vision = dict(depth=4, hidden_size=320, intermediate_size=856, num_heads=4,
                  out_hidden_size=hidden, fullatt_block_indexes=[1, 3])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied,
                              image_token_id=vocab - 281, vision_start_token_id=vocab - 284,
                              video_token_id=vocab - 280)
    torch.manual_seed(seed)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Qwen2_5_VLForConditionalGeneration(config).to(device, dtype).eval()


def samples(count, vocab=151936, seed=0):
    """Examples of random ids: prefix 270-330 with 100 visual tokens, a reason branch with a chain
    of 200-330 tokens, a label branch with an answer of 8."""
    rng, examples, grid = random.Random(seed), [], torch.tensor([[1, 20, 20]])
    generator = torch.Generator().manual_seed(seed)
    words = lambda k: [rng.randrange(vocab - 300) for _ in range(k)]
    for n in range(count):
        prefix = words(20) + [vocab - 284] + [vocab - 281] * 100 + words(rng.randint(149, 209))
        chain, answer = rng.randint(200, 330), 8
        branches = [(words(70 + chain), chain), (words(25 + answer), answer)]
        positions = mulcot.rope_positions(prefix, vocab - 281, grid, 2)
        patches = torch.randn(400, 1176, generator=generator)
        post = mulcot.Post(str(n), "random", image=f"{n}.png")
        media = dict(pixel_values=patches, image_grid_thw=grid)
        examples.append(mulcot.Example(prefix, positions, branches, post, media))
    return examples


def hf_inputs(examples, k, vocab, device):
    """Branch k of each example as an ordinary right-padded Hugging Face batch with labels."""
    rows = [e.prefix + e.branches[k][0] for e in examples]
    T = max(map(len, rows))
    ids = torch.tensor([r + [0] * (T - len(r)) for r in rows])
    real = torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in rows])
    labels = torch.full_like(ids, -100)
    for row, r, e in zip(labels, rows, examples):
        row[len(r) - e.branches[k][1] : len(r)] = torch.tensor(r[-e.branches[k][1] :])
    inputs = dict(input_ids=ids, attention_mask=real, labels=labels, use_cache=False,
                  mm_token_type_ids=(ids == vocab - 281).int(),
                  pixel_values=torch.cat([e.media["pixel_values"] for e in examples]),
                  image_grid_thw=torch.cat([e.media["image_grid_thw"] for e in examples]))
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}


def with_lora(model, seed=0):
    """Our adapters, no longer at zero, so that both their halves have gradients."""
    mulcot.add_lora(model, 16, 32, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for layer in mulcot.lora_layers(model).values():
        for p in (layer.lora_A, layer.lora_B):
            p.data += (0.02 * torch.randn(p.shape, generator=generator)).to(p.device)
    return model.train()


FLAGS = "--data x --dev x --out x --model x --no-soft --device cpu".split()


def our_stage(soft=None, weights=(0.8, 0.2)):
    """train.py's student."""
    stage = train_script.ChainStage(train_script.parse_args(["student", *FLAGS]), None)
    stage.soft_labels = soft
    stage.args.reasoning_weight, stage.args.label_weight = weights
    return stage


def our_step(stage, model, batch, examples):
    """train.py's own step: one forward pass, two chunked losses, one backward pass."""
    counts = train_script.step_counts([(batch, examples)])
    loss, _ = stage.loss(model, batch, examples, counts)
    loss.backward()
    return loss.detach()


def token_weights(examples):
    """Weights of the tasks' two means with which their sum is TRL's one mean over all tokens."""
    tokens = [sum(e.branches[k][1] for e in examples) for k in (0, 1)]
    return [n / sum(tokens) for n in tokens]


def hf_step(model, inputs, weights=(0.8, 0.2)):
    """The usual step: a pass with `labels` for each branch, one after another; with a base in bf16
    under autocast, as Trainer."""
    total, half = 0, model.dtype == torch.bfloat16
    for weight, one in zip(weights, inputs):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            loss = weight * model(**one).loss
        loss.backward()
        total += loss.detach()
    return total


def train(args):
    """One multi-task step, batch 4, both sides with the same adapters and samples."""
    from peft import PeftModel

    examples, models = samples(4), {}

    def ours():
        models["ours"] = model = with_lora(qwen(args.device))
        batch, stage = mulcot.collate(examples, PAD).to(args.device), our_stage()
        return lambda: our_step(stage, model, batch, examples)

    def theirs():
        inputs = [hf_inputs(examples, k, 151936, args.device) for k in (0, 1)]
        with tempfile.TemporaryDirectory() as folder:
            mulcot.save_adapter(with_lora(qwen(args.device)), folder)
            model = PeftModel.from_pretrained(qwen(args.device), folder, is_trainable=True).train()
        models["theirs"] = model
        return lambda: hf_step(model, inputs)

    head, rows = side_by_side(args, {"ours": ours, "PEFT, two HF passes": theirs},
                              "PEFT, two HF passes")
    mine = {f"base_model.model.{name}.lora_{half}.weight": getattr(layer, f"lora_{half}").grad
            for name, layer in mulcot.lora_layers(models["ours"]).items() for half in "AB"}
    their = {k.replace(".default", ""): p.grad for k, p in models["theirs"].named_parameters()
             if p.grad is not None}
    assert mine.keys() == their.keys()  # both hold the sum over the same number of steps
    gap = sum((mine[k] - their[k]).square().sum() for k in mine).sqrt()
    gap = (gap / sum(g.square().sum() for g in mine.values()).sqrt()).item()
    print(f"gradients of {len(mine)} adapter matrices differ by {gap:.1e} (relative norm)\n")
    return head, rows


class Soft:
    """Soft labels at hand, as train.py reads them from files."""

    def __init__(self, teacher, examples, pad):
        self.head, names = teacher.lm_head.weight.detach(), map(mulcot.SoftLabels.names, examples)
        with torch.no_grad():
            self.entries = generate_script.soft_entries(
                teacher, argparse.Namespace(pad_id=pad), examples, list(names))

    def hidden(self, examples, branch):
        names = [mulcot.SoftLabels.names(example)[branch - 1] for example in examples]
        return torch.cat([self.entries[name] for name in names]).to(self.head)


def student(args):
    """One student step, batch 4, with an assistant 2.2 times its size; output layers have the same
    part in the models as at 3B and 7B, hence the small vocabulary."""
    V, tau = 8192, 2.0
    examples, pad = samples(4, V), V - 290
    batch = mulcot.collate(examples, pad).to(args.device)
    small = lambda: with_lora(qwen(args.device, vocab=V, mlp=2752))
    large = lambda: qwen(args.device, hidden=896, layers=6, vocab=V, mlp=4816, seed=1)

    def cached():
        model, stage = small(), our_stage(Soft(large(), examples, pad))
        return lambda: our_step(stage, model, batch, examples)

    def online():
        model, teacher = small(), large()
        return lambda: our_step(our_stage(Soft(teacher, examples, pad)), model, batch, examples)

    def released():
        model, teacher = small(), large()
        inputs = [hf_inputs(examples, k, V, args.device) for k in (0, 1)]

        def step():
            loss = 0
            for weight, one in zip((0.8, 0.2), inputs):
                at = one["labels"][:, 1:] != -100
                mine = model(**one)
                with torch.no_grad():
                    theirs = teacher(**one)
                kl = mulcot.distill_kl(mine.logits[:, :-1][at], theirs.logits[:, :-1][at], tau)
                loss = loss + weight * mulcot.student_loss(mine.loss, kl)
            loss.backward()

        return step

    makers = {"soft labels from files": cached,
              "assistant beside the student, our layout": online,
              "assistant beside the student, HF passes": released}
    return side_by_side(args, makers, "assistant beside the student, HF passes")


# ---- the teacher stage ---------------------------------------------------------------------------


def server(connection):
    """Answers rightly and wholly after 200 ms; the label stands in the post's text."""
    from conftest import Handler, chain, chat

    def answer(asked):
        label = re.search(r"label is (\w+)", asked.prompt)[1]
        time.sleep(0.2)
        return chat(chain(label, "word " * 40), tokens=(500, 250))

    ThreadingHTTPServer.request_queue_size = 128
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.plan, httpd.asked, httpd.lock = answer, deque(maxlen=1), threading.Lock()
    connection.send(httpd.server_port)
    httpd.serve_forever()


def teacher(_):
    """Kept posts per second for 1, 8 and 32 workers, and peak memory for up to 5,120 posts."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=server, args=(theirs,), daemon=True)
    process.start()
    port, rows = ours.recv(), []
    with tempfile.TemporaryDirectory() as folder:
        from PIL import Image

        Image.effect_noise((280, 280), 90).convert("RGB").save(f"{folder}/x.jpg")
        for workers, posts in ((1, 40), (8, 320), (32, 1280), (32, 5120)):
            lines = (dict(id=i, text=f"post {i} whose label is neutral", image="x.jpg",
                          label="neutral") for i in range(posts))
            data = Path(folder, f"{workers}-{posts}.jsonl")
            data.write_text("".join(json.dumps(row) + "\n" for row in lines))
            code = ("import sys, time, resource as r, generate; t = time.time(); "
                    "generate.main(sys.argv[1:]); "
                    "print(time.time() - t, r.getrusage(r.RUSAGE_SELF).ru_maxrss)")
            out = subprocess.run(
                [sys.executable, "-c", code, "teacher", "--data", str(data), "--images", folder,
                 "--endpoint", f"http://127.0.0.1:{port}/v1", "--model", "slow", "--workers",
                 str(workers), "--out", f"{folder}/{workers}-{posts}.out.jsonl"], cwd=ROOT,
                capture_output=True, text=True, check=True)
            seconds, memory = map(float, out.stdout.split("\n")[-2].split())
            rate, ceiling = posts / seconds, workers / 0.2
            rows.append((workers, posts, f"{rate:.1f}", f"{rate / ceiling:.2f}",
                         f"{memory / 1024:.0f}"))
    process.terminate()
    return ("workers", "posts", "posts/s", "of workers/0.2 s", "peak MiB"), rows


def nf4(_):
    """Milliseconds of one forward and backward (the input's gradient), medians of 15 rounds; the
    ratio is the median of the rounds' own, which a busy machine disturbs less."""
    import bitsandbytes

    from mulcot import NF4Linear

    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    for dtype in (torch.float32, torch.bfloat16):
        dense = [torch.nn.Linear(2048, 2048, bias=False, dtype=dtype).requires_grad_(False)
                 for _ in range(4)]
        theirs = [bitsandbytes.nn.Linear4bit(2048, 2048, False, dtype, compress_statistics=False,
                                             quant_type="nf4") for _ in dense]
        for a, b in zip(theirs, dense):
            a.load_state_dict(b.state_dict())
        ours = [NF4Linear(layer) for layer in dense]
        stacks = [torch.nn.Sequential(*x).to(device).train() for x in (ours, theirs, dense)]
        for tokens in (64, 512):
            x = torch.randn(tokens, 2048, dtype=dtype, device=device, requires_grad=True)
            times, found = [[] for _ in stacks], []
            for _ in range(16):  # the first round warms up
                for stack, seconds in zip(stacks, times):
                    began, x.grad = time.perf_counter(), None
                    stack(x).sum().backward()
                    found.append(x.grad.sum().item())  # waits for a GPU, too
                    seconds.append(time.perf_counter() - began)
            assert found[-3] == found[-2] != found[-1], found[-3:]  # ours, theirs, dense
            medians = [1000 * statistics.median(seconds[1:]) for seconds in times]
            ratio = statistics.median(a / b for a, b in zip(times[0][1:], times[1][1:]))
            rows.append((device, str(dtype)[6:], tokens, *(f"{t:.1f}" for t in medians),
                         f"{ratio:.2f}"))
    return ("device", "dtype", "tokens", "ours ms", "bitsandbytes ms", "dense ms",
            "ours / bitsandbytes"), rows


def recipe(_):
    """Twitter-2015: 3,179 training posts, 1,122 dev posts scored at each of 20 epochs, eight posts
    at once; the assistant writes one chain of 250 tokens a post, 70 % are kept; a forward pass
    takes a third of a step; the 7B writes as much slower than the 3B as its weights are more."""
    table = {}
    for line in Path(ROOT, "tests/BENCHMARKS.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ("3B", "7B") and len(cells) == 8:
            table[cells[0], cells[1]] = float(cells[2]), float(cells[4])
    large, small = table["7B", "step of 8"], table["3B", "step of 8"]
    answers = table["3B", "answers of 64"][0] / 64 * 250 / 64 * 16.6 / 7.5  # seconds a chain
    posts, rows, dev, epochs = 3179, 3179 * 1.7, 1122, 20
    training = lambda step, n: epochs * (n + dev / 3) / 8 * step[0]
    parts = {"assistant, 7B": (training(large, posts), large[1]),
             "its chains and soft labels": (posts * answers + rows / 8 * large[0] / 3, large[1]),
             "student, 3B": (training(small, rows), small[1])}
    parts["all"] = sum(s for s, _ in parts.values()), max(peak for _, peak in parts.values())
    return ("part", "hours", "GiB"), [(name, f"{s / 3600:.1f}", f"{peak:.0f}")
                                      for name, (s, peak) in parts.items()]


# ---- real shapes, on a GPU -----------------------------------------------------------------------

def real_shape(shape, device):
    """A Qwen2.5-VL of a real shape in bf16, its random weights drawn on the device."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = families.qwen_config(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def shape_step(shape, device, side, posts, checkpointing=False, nf4=False, compiled=False):
    """An optimiser step of `posts` posts at once, rank 16, dropout 0.05, each token weighed alike,
    as `in_turn`. Ours counts its tokens on the device, theirs works out positions: train.py does
    neither there."""
    from peft import LoraConfig, get_peft_model

    model, examples = real_shape(shape, device), samples(posts)
    names, weights = mulcot.linear_names(model), token_weights(examples)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=names)
    inputs = [hf_inputs(examples, k, 151936, device) for k in (0, 1)]
    if nf4:
        mulcot.quantize_linears(model, names)
    if side == "TRL":
        return trl_steps(model, lora, inputs, posts, checkpointing)
    if checkpointing:
        train_script.checkpoint_layers(model)
    if compiled:
        for layer in model.model.language_model.layers:
            layer.compile()
    if side == "ours":
        mulcot.add_lora(model)
        stage, batch = our_stage(weights=weights), mulcot.collate(examples, PAD).to(device)
        gradients = lambda: our_step(stage, model, batch, examples)
    else:
        model = get_peft_model(model, lora)
        model.get_base_model().disable_input_require_grads()  # PEFT asks for them again
        gradients = lambda: hf_step(model, inputs, weights)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model.train()

    def step():
        loss = gradients()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return in_turn(step)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(way):
    """A function that calls `way` so many times -> (what the first call gave, when each ended)."""
    def run(count):
        results, ends = [], []
        for _ in range(count):
            results.append(way())
            synchronize()
            ends.append(time.perf_counter())
        return results[0], ends

    return run


# of SFTTrainer, wherever it stands beside ours
SFT = dict(max_length=None, lr_scheduler_type="constant", weight_decay=0.01, report_to="none",
           train_sampling_strategy="sequential", save_strategy="no")


def trl_steps(model, lora, inputs, posts, checkpointing):
    """SFTTrainer's own loop over these inputs, task after task, as `in_turn`. Ids, images and masks
    are at hand, as for the others; losses are in tiles, which is TRL's way since 1.16."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model.accepts_loss_kwargs = True  # trap: else the mean of the micro-batches' own means
    model.enable_input_require_grads = lambda *_, **__: None  # the tower is frozen, as elsewhere
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **more):
            synchronize()
            ends.append(time.perf_counter())

    config = SFTConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=posts, gradient_accumulation_steps=2,
        learning_rate=1e-4, max_grad_norm=1.0, bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=checkpointing, use_cpu=model.device.type == "cpu",
        logging_first_step=True, logging_steps=1000, disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False, dataset_kwargs=dict(skip_prepare_dataset=True), **SFT)
    task = [k for _ in range(8) for k in (0, 1) for _ in range(posts)]  # of each row, for 8 steps
    trainer = SFTTrainer(
        model, config, peft_config=lora, callbacks=[Clock()],
        train_dataset=Dataset.from_dict(dict(input_ids=[[0]] * len(task), task=task)),
        data_collator=lambda rows: dict(inputs[rows[0]["task"]]), processing_class=(
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="pad")))

    def run(count):
        ends.clear()
        trainer.args.max_steps = count
        trainer.train()
        assert len(ends) == count
        return trainer.state.log_history[0]["loss"], list(ends)

    return run


def hf_generate(model, processor, examples, most, **options):
    """Ids of transformers' own greedy generate, prompts padded on the left."""
    rows = [e.prefix + e.branches[0][0] for e in examples]
    T, pad = max(map(len, rows)), processor.pad_id
    ids = torch.tensor([[pad] * (T - len(r)) + r for r in rows], device=model.device)
    real = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows], device=model.device)
    patches = torch.cat([e.media["pixel_values"] for e in examples])
    return model.generate(
        input_ids=ids, attention_mask=real, max_new_tokens=most, do_sample=False,
        eos_token_id=[processor.end_id, pad], pad_token_id=pad, repetition_penalty=1.0,
        suppress_tokens=processor.never_generated,
        pixel_values=patches.to(model.device, model.dtype),
        image_grid_thw=torch.cat([e.media["image_grid_thw"] for e in examples]).to(model.device),
        mm_token_type_ids=(ids == model.config.image_token_id).int(), **options)[:, T:].tolist()


def shape_answers(shape, device, side, posts, tokens=64):
    """Label and chain of `posts` posts at once, every chain `tokens` long."""
    model, drawn = real_shape(shape, device), samples(posts)
    ends = [PAD, 151645]
    processor = argparse.Namespace(pad_id=PAD, end_id=ends[1], never_generated=ends, tokenizer=(
        argparse.Namespace(batch_decode=list)))  # the ids themselves
    questions = [(e.branches[1][0][:25], e.branches[0][0][:70]) for e in drawn]  # label, chain
    if side == "ours":
        packed = []
        for e, (label, chain) in zip(drawn, questions):
            answers = [(label + [1, 2, 3, 4, i, 8, 9], 7) for i in (5, 6, 7)]
            packed.append(replace(e, branches=[*answers, (chain, 0)]))

        def answer():
            with torch.no_grad():  # as mulcot.predict
                batch, cache = mulcot.collate(packed, PAD).to(device), mulcot.new_cache(model)
                hidden = mulcot.forward_branches(model, batch, cache)
                mulcot.score_labels(model, batch, hidden)
                chains = mulcot.decode_branch(model, processor, batch, hidden, cache, tokens)
            assert all(len(ids) == tokens for ids, _ in chains)
    else:
        asked = []
        for k in (0, 1):
            asked.append([replace(e, branches=[(q[k], 0)]) for e, q in zip(drawn, questions)])

        def answer():
            hf_generate(model, processor, asked[0], 7, min_new_tokens=7)
            chains = hf_generate(model, processor, asked[1], tokens, min_new_tokens=tokens)
            assert all(len(ids) == tokens for ids in chains)
    return in_turn(answer)


PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, FLOP/s


def measured(args, make, *how, **options):
    """(seconds, GiB held at most, the first call's result, its FLOP by operation) of what `make`
    gives; seconds are None where the memory does not suffice."""
    first = seconds = flop = None
    gc.collect()
    torch._dynamo.reset()  # trap: what once ran while it was counted would never be compiled
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        run = make(*how, **options)
        first, ends = run(args.repeats + 2)
        seconds = statistics.median(b - a for a, b in zip(ends[1:], ends[2:]))  # warm from then on
        held = torch.cuda.max_memory_allocated()
        flop = operations(lambda: run(1))  # runs uncompiled
    except torch.OutOfMemoryError:
        seconds, held = None, torch.cuda.max_memory_allocated()
    return seconds, held / 2**30, first, flop


def shape_works():
    """(name, posts, their ways, maker, its options) of each row."""
    peft, checkpointing = "PEFT, two HF passes", dict(checkpointing=True)
    for posts, others in {2: [peft], 8: [peft, "TRL"], 16: []}.items():
        yield f"step of {posts}", posts, others, shape_step, {}
        yield f"step of {posts}, checkpointing", posts, others, shape_step, checkpointing
        if posts < 16:
            yield f"step of {posts}, nf4", posts, [], shape_step, dict(nf4=True)
            yield f"step of {posts}, compiled", posts, [], shape_step, dict(compiled=True)
    for posts in (1, 64):
        yield f"answers of {posts}", posts, ["two HF generate calls"], shape_answers, {}


def shapes(args):
    """Ours and the others' ways one after another, each with a model of its own; medians."""
    if args.device == "cpu":
        raise SystemExit("shapes: say --device cuda")
    card = torch.cuda.get_device_name()
    top = next((peak for name, peak in PEAKS.items() if name in card), math.nan)
    rows = []
    for shape in families.SHAPES:
        for name, posts, theirs, make, options in shape_works():
            if not any(part in f"{shape} {name}" for part in args.rows):
                continue
            sides = {}
            for side in ("ours", *theirs):
                sides[side] = seconds, held, first, flop = measured(
                    args, make, shape, args.device, side, posts, **options)
                numbers = ("out of memory", "", "", "", f"{held:.1f}", "")
                if seconds:
                    attention = [name[len("aten._scaled_dot_product_"):-len("_attention")]
                                 for name in flop if name.endswith("_attention")]
                    # trap: with a mask attention can fall back to many kernels of simple sums;
                    # flash attention, which takes none, is the vision tower's
                    assert side != "ours" or {"efficient", "cudnn"} & {*attention}, flop
                    numbers = (f"{seconds:.3f}", f"{posts / seconds:.2f}",
                               f"{seconds / (sides['ours'][0] or math.nan):.2f}",
                               f"{flop['sum'] / seconds / top:.3f}", f"{held:.1f}",
                               ", ".join(attention))
                rows.append((shape, name, side, *numbers))
                print(rows[-1], flush=True)
            # lora_B is zero in the first step, so that no dropout tells the sides apart
            losses = [float(first) for *_, first, _ in sides.values() if first is not None]
            assert not losses or max(losses) < 1.01 * min(losses), (name, losses)
    return ("shape", "work", "way", "seconds", "posts/s", "ours times faster", "of peak",
            "peak GiB", "attention"), rows


# ---- beside TRL ----------------------------------------------------------------------------------

MICRO, ACCUMULATE = 2, 2  # posts per micro-batch, micro-batches per step


def trl_theirs(options, steps, size):
    """SFTTrainer on the same steps, a post's two tasks as two examples, `size` of them at once; its
    log. loss_type stays "nll", which since 1.16 is what "chunked_nll" was."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, processor = mulcot.load_model(options.model, "cpu", options.dtype)
    model.accepts_loss_kwargs = True  # trap: else the mean of the micro-batches' own means
    asked, tokenizer = [], processor.tokenizer
    for step in steps:  # like lengths together: in the posts' order it takes 1.7 times as long
        rows = [(e.prefix + ids[:-n], ids[-n:]) for e in step for ids, n in e.branches]
        asked += sorted(rows, key=lambda row: len(row[0] + row[1]))
    rows = [dict(zip(("prompt", "completion"), tokenizer.decode(row))) for row in asked]
    config = SFTConfig(
        options.out, num_train_epochs=1, per_device_train_batch_size=size, learning_rate=options.lr,
        gradient_accumulation_steps=2 * MICRO * ACCUMULATE // size, max_grad_norm=options.clip,
        use_cpu=True, bf16=options.dtype == "bfloat16", gradient_checkpointing=False,
        logging_steps=1, **SFT)
    lora = LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,
                      target_modules=mulcot.linear_names(model), task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), peft_config=lora,
                         processing_class=tokenizer)
    for row, (ask, answer) in zip(trainer.train_dataset, asked, strict=True):
        assert (row["input_ids"], row["labels"]) == (ask + answer, [-100] * len(ask) + answer)
    trainer.train()
    return trainer.state.log_history[: len(steps)]


def trl_side(args, folder):
    """[seconds a post, the process's peak in GiB, losses of all steps] of one side, in this
    process; posts without images, as many as fill whole steps; the first step is not measured."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    rows = json.loads(Path(args.data).read_text(encoding="utf-8"))
    no_image = dict.fromkeys(("image", "image_id", "image_path"))
    mulcot.write_json(f"{folder}/rows.json", [row | no_image for row in rows])
    options = train_script.parse_args([
        "student", *FLAGS, "--data", f"{folder}/rows.json", "--out", folder, "--model", args.model,
        "--dtype", args.dtype, "--batch", str(MICRO), "--accumulate", str(ACCUMULATE), "--epochs",
        "1", "--log-every", "1"])
    stage = train_script.ChainStage(options, mulcot.load_processor(args.model))
    items, _ = mulcot.training_items(options.data, None, stage.branches_of)
    size, ends = MICRO * ACCUMULATE, []  # posts of a step; when the steps ended
    items = items[: args.posts // size * size]
    steps = [[example for _, part in step for example in part]
             for step in train_script.step_loader(options, items, stage.processor, 0)]
    options.reasoning_weight, options.label_weight = token_weights(sum(steps, []))
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    if args.peak_of == "ours":
        model = train_script.build_model(options, stage, items)
        state = train_script.TrainingState(options, model)
        train_script.train_loop(options, stage, model, state, items, None, len(steps) + 1,
                                len(steps))  # no epoch ends, so nothing is evaluated or saved
        log = mulcot.read_rows(Path(options.out, "log.jsonl"))
    else:
        log = trl_theirs(options, steps, int(args.peak_of.split()[1]))
    assert len(ends) == len(log) == len(steps)
    return [(ends[-1] - ends[0]) / (len(items) - size),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, [r["loss"] for r in log]]


def trl(args):
    """A fresh process for each side, in turns; means of two."""
    if args.peak_of:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(trl_side(args, folder)))
        sys.exit()
    sides = {"ours": [], f"TRL, {2 * MICRO} examples": [], f"TRL, {MICRO} examples": []}
    for name in [*sides] * 2:
        out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peak-of", name],
                             capture_output=True, text=True)
        assert out.returncode == 0, out.stderr[-2000:]
        sides[name].append(json.loads(out.stdout.split("\n")[-2]))
    rows, mean = [], lambda name, k: statistics.mean(run[k] for run in sides[name])
    for name, ((_, _, losses), _) in sides.items():
        s, peak = mean(name, 0), mean(name, 1)
        # lora_B is zero in the first step, so that no dropout tells the sides apart
        assert abs(losses[0] / sides["ours"][0][2][0] - 1) < 2e-3, sides
        rows.append((name, f"{s:.2f}", f"{s / mean('ours', 0):.2f}", f"{peak:.2f}",
                     f"{mean('ours', 1) / peak:.2f}", f"{losses[0]:.4f}", f"{losses[-1]:.4f}"))
    return ("way", "s a post", "ours times faster", "peak GiB of the process", "ours of its peak",
            "first loss", "last loss"), rows


def main(argv=None):
    """Prints one table per subject."""
    subjects = dict(train=train, student=student, shapes=shapes, recipe=recipe, nf4=nf4,
                    teacher=teacher, trl=trl)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("subject", choices=tuple(subjects), help="what to measure")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default="models/smol", help="of trl: what to train")
    parser.add_argument("--data", default="dev_chains.json", help="of trl: a .json list with cot")
    parser.add_argument("--posts", type=int, default=16, help="of trl: how many")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="trl")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of shapes")
    parser.add_argument("--rows", nargs="+", default=[""],
                        help="of shapes: rows with one of these in their shape and work")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    head, rows = subjects[args.subject](args)
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
