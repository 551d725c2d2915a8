"""The roads over the toy world, each a list of command lines that a user would type, run in this
process (libraries load once).

    python tests/demo.py                  teacher -> assistant -> student -> report (train.py's door)
    python tests/demo.py ablate --quick   the paper's ablations: table.md
    python tests/demo.py readout          discriminative against generative, input by input
    python tests/demo.py readout --data label.csv --dev label.csv --model Qwen/Qwen2.5-Omni-7B

Each is resumable: killed and run again it goes on where it was.
"""

import argparse
import re
import runpy
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from generate import refuse_ranks  # noqa: E402
from mulcot import (  # noqa: E402
    Help, InputError, read_posts, read_rows, regression_metrics, run_stage, write_json)

SHORT = "--batch 16 --accumulate 1"  # for models of half a million parameters


TOY = "Toy posts, tiny models of half a million weights: this says nothing about real posts."


def run_commands(commands):
    """Runs each as `python COMMAND`; returns their peaks of memory in MiB."""
    peaks = []
    for n, command in enumerate(commands, 1):
        print(f"\n[stage {n} of {len(commands)}] $ python {command}", flush=True)
        script, *argv = shlex.split(command)
        peak_mib(reset=True)
        main = runpy.run_path(str(ROOT / script))["main"]
        code = main(argv)
        if code:
            raise SystemExit(code)
        peaks.append(peak_mib())
    return peaks


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


# ---- the whole road


def demo_commands(out, seed):
    """The stages of the embedded default, each as a user would type it."""
    out = shlex.quote(out)
    posts, chains, more = f"{out}/posts.jsonl", f"{out}/chains.jsonl", f"{out}/augmented.jsonl"
    lora = f"--dev {posts} --lr 0.01 --schedule cosine --log-every 20 {SHORT} --seed {seed}"
    assistant, student = f"{out}/assistant/best", f"{out}/student/best"
    predict = f"generate.py predict --data {posts} --split test"
    rows = f"{out}/predictions"
    runs = {"student": rows, "assistant": f"{rows}.assistant",
            "base/student": f"{rows}.base.student", "base/assistant": f"{rows}.base.assistant",
            "shuffled_images": f"{rows}.shuffled_images", "blank_text": f"{rows}.blank_text"}
    judged = " ".join(f"{name}={file}.jsonl" for name, file in runs.items())
    return [
        f"tests/toy.py posts --out {out} --seed {seed}",
        f"tests/toy.py base --size assistant --data {out}/warmup.jsonl --seed {seed} "
        f"--out {out}/base/assistant",
        f"tests/toy.py base --size student --data {out}/warmup.jsonl --seed {seed} "
        f"--out {out}/base/student",
        f"tests/toy.py teacher --data {posts} --out {chains}",
        f"train.py assistant --data {chains} {lora} --epochs 4 --dropout 0.05 "
        f"--model {out}/base/assistant --out {out}/assistant",
        f"generate.py augment --data {posts} --model {assistant} --out {more}",
        f"generate.py soft --data {chains} {more} --model {assistant} --batch 32 --out {out}/soft",
        f"train.py student --data {chains} {more} --soft {out}/soft {lora} --epochs 3 "
        f"--model {out}/base/student --out {out}/student",
        f"tests/toy.py teacher --data {posts} --split test --out {out}/references.jsonl",
        f"{predict} --model {student} --out {rows}.jsonl",
        f"{predict} --model {assistant} --out {runs['assistant']}.jsonl",
        f"{predict} --no-chain --model {out}/base/student --out {runs['base/student']}.jsonl",
        f"{predict} --no-chain --model {out}/base/assistant --out {runs['base/assistant']}.jsonl",
        f"{predict} --no-chain --shuffle-images --model {student} "
        f"--out {runs['shuffled_images']}.jsonl",
        f"{predict} --no-chain --blank-text --model {student} --out {runs['blank_text']}.jsonl",
        f"eval.py {judged} --gold {posts} --chains {chains} --references {out}/references.jsonl "
        f"--out {out} --title '{TOY}'",
    ]


def show_table(table, file):
    """Prints rows of cells {title: value}, and keeps them in a file."""
    write_json(file, table)
    shown = [list(table[0])]
    for row in table:
        shown.append([f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(map(len, column)) for column in zip(*shown)]
    for row in shown:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"wrote {file}")


def demo(args):
    """Runs every stage of the embedded default."""
    refuse_ranks("the whole road")
    began = time.time()
    run_commands(demo_commands(args.out, args.seed))
    print(f"\nthe whole road took {time.time() - began:.0f} s; report: {args.out}/report.html")


# ---- ablations

# teacher's rows and what grows on them; settings of the student on top. "full" is the paper's.
TEACHERS = {"full": "--skill 0.6", "no-stage2": "--skill 0.6 --no-stage2",
            "teacher-40": "--skill 0.4", "teacher-80": "--skill 0.8"}
SETTINGS = {
    "full": ("full", ""), "no-assistant": ("full", "--no-soft --no-augment"),
    "no-soft-labels": ("full", "--no-soft"), "no-augmentation": ("full", "--no-augment"),
    "no-reasoning-task": ("full", "--no-reasoning"), "no-stage2": ("no-stage2", ""),
    "teacher-40": ("teacher-40", ""), "teacher-80": ("teacher-80", ""),
    "reasoning-weight-0.5": ("full", "--reasoning-weight 0.5 --label-weight 0.5"),
    "reasoning-weight-0.7": ("full", "--reasoning-weight 0.7 --label-weight 0.3"),
    "reasoning-weight-0.9": ("full", "--reasoning-weight 0.9 --label-weight 0.1"),
    "lambda-0.5": ("full", "--lam 0.5")}
QUICK = ("full", "no-assistant", "no-soft-labels", "no-reasoning-task", "no-stage2")


def world_commands(out):
    """Posts and base models, which all seeds share."""
    commands = [f"tests/toy.py posts --train 400 --noise 0.1 --out {out}"]
    for size in ("assistant", "student"):
        commands.append(f"tests/toy.py base --size {size} --data {out}/warmup.jsonl "
                        f"--out {out}/base/{size}")
    return commands


def training_flags(out, seed):
    """What the trainings of a seed share."""
    return (f"--dev {out}/posts.jsonl --lr 0.01 --schedule cosine --log-every 20 {SHORT} "
            f"--seed {seed}")


def teacher_commands(out, teacher, seed):
    """A teacher's chains; the assistant that learns from them, its chains and its soft labels."""
    at = f"{out}/{teacher}-{seed}"
    return [
        f"tests/toy.py teacher --data {out}/posts.jsonl {TEACHERS[teacher]} --seed {seed} "
        f"--out {at}.chains.jsonl",
        f"train.py assistant --data {at}.chains.jsonl {training_flags(out, seed)} --epochs 6 "
        f"--dropout 0.05 --model {out}/base/assistant --out {at}.assistant",
        f"generate.py augment --data {out}/posts.jsonl --model {at}.assistant/best "
        f"--seed {seed} --out {at}.augmented.jsonl",
        f"generate.py soft --data {at}.chains.jsonl {at}.augmented.jsonl "
        f"--model {at}.assistant/best --out {at}.soft"]


def student_command(out, seed, run, teacher, flags):
    """A student of a teacher and its assistant, with a setting's flags."""
    at = f"{out}/{teacher}-{seed}"
    soft = "" if "--no-soft" in flags else f"--soft {at}.soft "
    return (f"train.py student --data {at}.chains.jsonl {at}.augmented.jsonl {soft}"
            f"{training_flags(out, seed)} --epochs 7 --model {out}/base/student --out {run} "
            f"{flags}").rstrip()


def ablation_commands(out, seeds, quick):
    """(commands, {setting: [its predictions, one file a seed]}). Posts and base models are shared
    by all, a teacher's chains, assistant and soft labels by the settings of a seed."""
    commands, files = world_commands(out), {}
    for seed in seeds:
        for name in QUICK if quick else SETTINGS:
            run, (teacher, flags) = f"{out}/students/{name}-{seed}", SETTINGS[name]
            files.setdefault(name, []).append(f"{run}.jsonl")
            commands += [*teacher_commands(out, teacher, seed),
                         student_command(out, seed, run, teacher, flags),
                         f"generate.py predict --data {out}/posts.jsonl --split test --no-chain "
                         f"--model {run}/best --out {run}.jsonl"]
    return list(dict.fromkeys(commands)), files


def ablate(args):
    """The paper's ablations on toy posts, every student judged on the same test posts."""
    refuse_ranks("ablate")
    out = shlex.quote(args.out)
    seeds = args.seeds or (2 if args.quick else 3)
    commands, files = ablation_commands(out, range(1, seeds + 1), args.quick)
    runs = " ".join(f"{name}={file}" for name, each in files.items() for file in each)
    judge = f"eval.py {runs} --gold {out}/posts.jsonl --out {out} --baseline full"
    run_commands([*commands, judge])


# ---- readouts

# choice: after 6 epochs the tiny base names voices or words, or neither; at a constant rate it is
# even a matter of the last digits (one thread or two) how far the readouts on it get
OMNI_WARMUP = "--epochs 8 --lr 0.003 --schedule cosine"
INPUTS = {"text": "--without frames audio", "text + frames": "--without audio",
          "text + frames + audio": ""}
TOY_READOUT = ("--batch 8 --accumulate 1 --epochs 5 --lr 0.003 --head-lr 0.002 "
               "--dropout 0.05")


def readout_commands(args):
    """({(readout, inputs): its predictions}, commands): both readouts over all sets of inputs, with
    the same backbone, data, LoRA and budget; first what the toy world needs."""
    out, commands, files = shlex.quote(args.out), [], {}
    data, dev, model, flags = args.data, args.dev, args.model, " ".join(args.flags)
    if not model:
        data = dev = f"{args.out}/posts.jsonl"
        model, flags = f"{args.out}/base", TOY_READOUT
        commands = [
            f"tests/toy.py posts --clips --seed {args.seed} --out {out}",
            f"tests/toy.py base --size omni --data {out}/warmup.jsonl {OMNI_WARMUP} "
            f"--seed {args.seed} --out {out}/base"]
    data, dev, model = shlex.quote(data), shlex.quote(dev), shlex.quote(model)
    images = f" --images {shlex.quote(args.images)}" if args.images else ""
    for n, (inputs, left_out) in enumerate(INPUTS.items()):
        for readout in ("discriminative", "generative"):
            run = f"{out}/{readout}-{n}"
            files[readout, inputs] = f"{args.out}/{readout}-{n}.jsonl"
            commands += [
                f"train.py readout --data {data} --dev {dev}{images} --model {model} --readout "
                f"{readout} {flags} --seed {args.seed} --out {run} {left_out}".rstrip(),
                f"generate.py predict --data {dev}{images} --split test --model {run}/best "
                f"--out {run}.jsonl"]
    return files, commands


def gold_scores(file, images):
    """{id: score} of the test posts, which judge."""
    posts = read_posts(file, images, [])
    gold = {p.id: p.score for p in posts if p.split == "test" and p.score is not None}
    if not gold:
        raise InputError(f"{file} has no post of split test with a score to judge on")
    return gold


def compare_readouts(args):
    """paper: the discriminative against the generative readout, and what each input adds; judged on
    the test split of --dev."""
    refuse_ranks("readout")
    files, commands = readout_commands(args)
    if args.dev:  # before anything is trained
        gold_scores(args.dev, args.images)
    peaks = run_commands(commands)[-2 * len(files) :]
    gold = gold_scores(args.dev or f"{args.out}/posts.jsonl", args.images)
    table = []
    for n, ((readout, inputs), file) in enumerate(files.items()):
        rows = [row for row in read_rows(file) if row["id"] in gold]
        metrics = regression_metrics([gold[r["id"]] for r in rows], [r["score"] for r in rows])
        for key in ("unparsed", "out_of_range"):
            metrics[key] /= len(rows)
        table.append(dict(readout=readout, inputs=inputs) | metrics | dict(
            s_per_post=statistics.mean(row["seconds"] for row in rows),
            peak_mib=max(peaks[2 * n : 2 * n + 2])))
    show_table(table, f"{args.out}/compare.json")


# ---- the command line


def parse_args(argv=None):
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    top.add_argument("--out", default="runs/demo", help="where everything lands")
    top.add_argument("--seed", type=int, default=42, help="of all that is drawn")
    roads = top.add_subparsers(dest="road")
    p = roads.add_parser("ablate", formatter_class=Help, help="the paper's ablations on toy posts: "
                         "table.md with mean ± deviation and p against full")
    p.add_argument("--out", default="runs/ablate", help="where everything lands")
    p.add_argument("--quick", action="store_true", help="five settings, two seeds")
    p.add_argument("--seeds", type=int, default=0, help="runs of each setting (0: three, or two)")
    p = roads.add_parser("readout", formatter_class=Help, help="both readouts over all sets of "
                         "inputs, in one table; other flags go to train.py readout")
    p.add_argument("--out", default="runs/compare", help="where everything lands")
    p.add_argument("--seed", type=int, default=42, help="of all that is drawn")
    for name in ("data", "dev", "images", "model"):
        p.add_argument(f"--{name}", help="instead of the toy clips, as in train.py readout")
    args, args.flags = top.parse_known_args(argv)
    if args.flags and args.road != "readout":
        top.error(f"unrecognized arguments: {' '.join(args.flags)}")
    if args.road == "readout":
        if len({bool(args.data), bool(args.dev), bool(args.model)}) > 1:
            p.error("--data, --dev and --model belong together")
        if {"--readout", "--without", "--target"} & set(args.flags):
            p.error("--readout and --without are what is compared, of scores")
    return args


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    roads = {None: demo, "ablate": ablate, "readout": compare_readouts}
    return run_stage(roads[args.road], args)


if __name__ == "__main__":
    sys.exit(main())
