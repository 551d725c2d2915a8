"""The roads over the toy world, each a list of command lines that a user would type, run in this
process (libraries load once).

    python tests/demo.py                  teacher -> assistant -> student -> report (train.py's door)
    python tests/demo.py ablate --quick   the paper's ablations: table.md
    python tests/demo.py readout          discriminative against generative, input by input

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

from eval import regression_metrics  # noqa: E402
from generate import refuse_ranks  # noqa: E402
from mulcot import Help, read_posts, read_rows, run_stage, write_json  # noqa: E402

SHORT = "--batch 16 --accumulate 1"  # for models of half a million parameters


TOY = "Toy posts, tiny models of under a million weights: this says nothing about real posts."


def run_commands(commands):
    """Runs each as `python COMMAND`; returns their peaks of memory in MiB."""
    peaks, gpu = [], torch.cuda.is_available()
    for n, command in enumerate(commands, 1):
        print(f"\n[stage {n} of {len(commands)}] $ python {command}", flush=True)
        script, *argv = shlex.split(command)
        peak_mib(gpu, reset=True)
        main = runpy.run_path(str(ROOT / script))["main"]
        code = main(argv)
        if code:
            raise SystemExit(code)
        peaks.append(peak_mib(gpu))
    return peaks


def peak_mib(gpu, reset=False):
    """The most memory in MiB held since the last reset: of the GPU or of this process (0 where the
    system does not tell)."""
    if gpu:
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


def world_commands(out, seed, flags=""):
    """Posts and base models."""
    commands = [f"tests/toy.py posts --seed {seed} --out {out} {flags}".rstrip()]
    for size in ("assistant", "student"):
        commands.append(f"tests/toy.py base --size {size} --data {out}/warmup.jsonl --seed {seed} "
                        f"--out {out}/base/{size}")
    return commands


def training_flags(out, seed):
    """What the trainings of a seed share."""
    return (f"--dev {out}/posts.jsonl --lr 0.01 --schedule cosine --log-every 20 {SHORT} "
            f"--seed {seed}")


def demo_commands(out, seed):
    """The stages of the embedded default, each as a user would type it."""
    out = shlex.quote(out)
    posts, chains, more = f"{out}/posts.jsonl", f"{out}/chains.jsonl", f"{out}/augmented.jsonl"
    lora = training_flags(out, seed)
    assistant, student = f"{out}/assistant/best", f"{out}/student/best"
    predict = f"generate.py predict --data {posts} --split test"
    rows = f"{out}/predictions"
    runs = {  # name -> its rows, its model and flags
        "student": (rows, student), "assistant": (f"{rows}.assistant", assistant),
        "base/student": (f"{rows}.base.student", f"{out}/base/student --no-chain"),
        "base/assistant": (f"{rows}.base.assistant", f"{out}/base/assistant --no-chain"),
        "shuffled_images": (f"{rows}.shuffled_images", f"{student} --no-chain --shuffle-images"),
        "blank_text": (f"{rows}.blank_text", f"{student} --no-chain --blank-text")}
    judged = " ".join(f"{name}={file}.jsonl" for name, (file, _) in runs.items())
    return [
        *world_commands(out, seed),
        f"tests/toy.py teacher --data {posts} --out {chains}",
        f"train.py assistant --data {chains} {lora} --epochs 4 --dropout 0.05 "
        f"--model {out}/base/assistant --out {out}/assistant",
        f"generate.py augment --data {posts} --model {assistant} --out {more}",
        f"generate.py soft --data {chains} {more} --model {assistant} --batch 32 --out {out}/soft",
        f"train.py student --data {chains} {more} --soft {out}/soft {lora} --epochs 3 "
        f"--model {out}/base/student --out {out}/student",
        f"tests/toy.py teacher --data {posts} --split test --out {out}/references.jsonl",
        *(f"{predict} --model {model} --out {file}.jsonl" for file, model in runs.values()),
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
    commands, files = world_commands(out, 42, "--train 400 --noise 0.1"), {}
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
    seeds = (1, 2) if args.quick else (1, 2, 3)
    commands, files = ablation_commands(out, seeds, args.quick)
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


def readout_commands(out, seed):
    """({(readout, inputs): its predictions}, commands): both readouts over all sets of inputs, with
    the same backbone, data, LoRA and budget; first the toy world."""
    folder, out, files = out, shlex.quote(out), {}
    posts, base = f"{out}/posts.jsonl", f"{out}/base"
    commands = [f"tests/toy.py posts --clips --seed {seed} --out {out}",
                f"tests/toy.py base --size omni --data {out}/warmup.jsonl {OMNI_WARMUP} "
                f"--seed {seed} --out {base}"]
    for n, (inputs, left_out) in enumerate(INPUTS.items()):
        for readout in ("discriminative", "generative"):
            run = f"{out}/{readout}-{n}"
            files[readout, inputs] = f"{folder}/{readout}-{n}.jsonl"
            commands += [
                f"train.py readout --data {posts} --dev {posts} --model {base} --readout {readout} "
                f"{TOY_READOUT} --seed {seed} --out {run} {left_out}".rstrip(),
                f"generate.py predict --data {posts} --split test --model {run}/best "
                f"--out {run}.jsonl"]
    return files, commands


def compare_readouts(args):
    """paper: the discriminative against the generative readout, and what each input adds; judged on
    the test posts."""
    refuse_ranks("readout")
    files, commands = readout_commands(args.out, args.seed)
    peaks = run_commands(commands)[-2 * len(files) :]
    gold = {p.id: p.score for p in read_posts(f"{args.out}/posts.jsonl") if p.split == "test"}
    table = []
    for n, ((readout, inputs), file) in enumerate(files.items()):
        rows = read_rows(file)
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
    roads = top.add_subparsers(dest="road")
    ablate = roads.add_parser("ablate", formatter_class=Help, help="the paper's ablations on toy "
                              "posts: table.md with mean ± deviation and p against full")
    ablate.add_argument("--quick", action="store_true", help="five settings, two seeds")
    readout = roads.add_parser("readout", formatter_class=Help, help="both readouts over all sets "
                               "of inputs, in one table")
    for p, name in ((top, "demo"), (ablate, "ablate"), (readout, "compare")):
        p.add_argument("--out", default=f"runs/{name}", help="where everything lands")
    for p in (top, readout):
        p.add_argument("--seed", type=int, default=42, help="of all that is drawn")
    return top.parse_args(argv)


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    roads = {None: demo, "ablate": ablate, "readout": compare_readouts}
    return run_stage(roads[args.road], args)


if __name__ == "__main__":
    sys.exit(main())
