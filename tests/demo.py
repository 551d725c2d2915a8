"""The roads over the toy world, each a list of command lines that a user would type, run in this
process (libraries load once).

    python tests/demo.py                  teacher -> assistant -> student -> report (train.py's door)
    python tests/demo.py ablate --quick   the paper's ablations: table.md
    python tests/demo.py prefer           preference training after KD and instead of it
    python tests/demo.py sizes            smaller and larger students, with and without assistant
    python tests/demo.py reasons          do chain and label follow a post that is changed?
    python tests/demo.py symbols          emojis, names, links, hashtags, mojibake
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

from mulcot import (  # noqa: E402
    Help, InputError, parse_reasoning, read_posts, read_rows, refuse_ranks, regression_metrics,
    run_stage, write_json)
from toy import TOY_SCENES, TOY_WORDS  # noqa: E402

SHORT = "--batch 16 --accumulate 1 --beta2 0.99"  # for models of half a million parameters


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
        f"generate.py augment --data {chains} --model {assistant} --out {more}",
        f"generate.py soft --data {chains} {more} --model {assistant} --batch 32 --out {out}/soft",
        f"train.py student --data {chains} {more} --soft {out}/soft {lora} --epochs 3 "
        f"--model {out}/base/student --out {out}/student",
        f"tests/toy.py teacher --data {posts} --split test --out {out}/references.jsonl",
        f"{predict} --model {student} --out {rows}.jsonl",
        f"{predict} --model {assistant} --source assistant --out {runs['assistant']}.jsonl",
        f"{predict} --no-chain --model {out}/base/student --source base "
        f"--out {runs['base/student']}.jsonl",
        f"{predict} --no-chain --model {out}/base/assistant --source base "
        f"--out {runs['base/assistant']}.jsonl",
        f"{predict} --no-chain --shuffle-images --model {student} "
        f"--out {runs['shuffled_images']}.jsonl",
        f"{predict} --no-chain --blank-text --model {student} --out {runs['blank_text']}.jsonl",
        f"eval.py {judged} --gold {posts} --chains {chains} --references {out}/references.jsonl "
        f"--out {out}",
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


def world_commands(out, sizes=("assistant", "student")):
    """Posts and base models, which all seeds share."""
    commands = [f"tests/toy.py posts --train 400 --noise 0.1 --out {out}"]
    for size in sizes:
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
        f"generate.py augment --data {at}.chains.jsonl --model {at}.assistant/best "
        f"--seed {seed} --out {at}.augmented.jsonl",
        f"generate.py soft --data {at}.chains.jsonl {at}.augmented.jsonl "
        f"--model {at}.assistant/best --out {at}.soft"]


def student_command(out, seed, run, teacher, flags="", model="base/student", epochs=7):
    """A student of a teacher and its assistant, with a setting's flags, from a model in `out`."""
    at = f"{out}/{teacher}-{seed}"
    soft = "" if "--no-soft" in flags else f"--soft {at}.soft "
    return (f"train.py student --data {at}.chains.jsonl {at}.augmented.jsonl {soft}"
            f"{training_flags(out, seed)} --epochs {epochs} --model {out}/{model} --out {run} "
            f"{flags}").rstrip()


def setting_commands(out, seed, name):
    """A student of the ablations, with all that it needs of its seed."""
    teacher, flags = SETTINGS[name]
    return [*teacher_commands(out, teacher, seed),
            student_command(out, seed, f"{out}/students/{name}-{seed}", teacher, flags)]


def predict_command(posts, model, out, flags=""):
    """A model's answers to the test posts."""
    command = f"generate.py predict --data {posts} --split test --model {model} --out {out} {flags}"
    return command.rstrip()


def judge_command(files, gold, out, flags):
    """eval.py over {run: its predictions, one file a seed}."""
    runs = " ".join(f"{run}={file}" for run, each in files.items() for file in each)
    return f"eval.py {runs} --gold {gold} --out {out} {flags}"


def ablation_commands(out, seeds, quick):
    """(commands, {setting: [its predictions, one file a seed]}). Posts and base models are shared
    by all, a teacher's chains, assistant and soft labels by the settings of a seed."""
    commands, files = world_commands(out), {}
    for seed in seeds:
        for name in QUICK if quick else SETTINGS:
            run = f"{out}/students/{name}-{seed}"
            files.setdefault(name, []).append(f"{run}.jsonl")
            commands += [*setting_commands(out, seed, name),
                         predict_command(f"{out}/posts.jsonl", f"{run}/best", f"{run}.jsonl",
                                         "--no-chain")]
    return list(dict.fromkeys(commands)), files


def ablate(args):
    """The paper's ablations on toy posts, every student judged on the same test posts."""
    refuse_ranks("ablate")
    out = shlex.quote(args.out)
    seeds = args.seeds or (2 if args.quick else 3)
    commands, files = ablation_commands(out, range(1, seeds + 1), args.quick)
    run_commands([*commands, judge_command(files, f"{out}/posts.jsonl", out, "--baseline full")])


# ---- preference, sizes, reasons, symbols: on the ablations' posts and runs

SAMPLING = "--samples 8 --temperature 1"  # where a third to a half are wrong
# choice: the rate by the first seed's dev posts, of 0.0003, 0.001 and 0.003; about as many steps as
# two epochs of KD
PREFERENCE = f"--lr 0.0003 --epochs 4 --log-every 20 {SHORT}"


def preference_commands(out, seeds):
    """The paper's open question 1: students of hard labels and of KD, both with preference training
    on their own chains, and KD for as many more steps."""
    posts = f"{out}/posts.jsonl"
    references = f"{out}/references.jsonl"
    files = {}
    commands = [*world_commands(out),
                f"tests/toy.py teacher --data {posts} --split test --out {references}"]
    for seed in seeds:
        runs = {}
        for name, setting in (("hard", "no-soft-labels"), ("KD", "full")):
            run = runs[name] = f"{out}/students/{setting}-{seed}"
            runs[f"{name}-RPO"] = f"{run}-rpo"
            sampled = f"{out}/{setting}-{seed}.sampled"  # beside images/
            commands += [
                *setting_commands(out, seed, setting),
                f"generate.py augment --data {out}/full-{seed}.chains.jsonl --model {run}/best "
                f"{SAMPLING} --seed {seed} --out {sampled}.jsonl",
                f"train.py dpo --data {sampled}.jsonl --rejected {sampled}.rejects.jsonl "
                f"--dev {posts} --adapter {run}/best {PREFERENCE} --seed {seed} --out {run}-rpo"]
        # choice: a new adapter on the student's merged weights, with a schedule of its own
        merged = f"students/full-{seed}-merged"
        runs["KD-more"] = f"{out}/students/full-{seed}-more"
        commands += [f"generate.py export --model {runs['KD']}/best --out {out}/{merged}",
                     student_command(out, seed, runs["KD-more"], "full", "", merged, epochs=2)]
        for name, run in runs.items():
            files.setdefault(name, []).append(f"{run}.chains.jsonl")
            commands.append(predict_command(posts, f"{run}/best", f"{run}.chains.jsonl"))
    flags = f"--references {references} --baseline KD --all-columns"
    return [*commands, judge_command(files, posts, f"{out}/prefer", flags)]


def size_commands(out, seeds):
    """The paper's open question 2: students of three sizes with the assistant and on the teacher's
    chains alone, and the assistant itself; a table against the assistant, and one of each size."""
    posts, files = f"{out}/posts.jsonl", {}
    commands = world_commands(out, ("assistant", "student", "half"))
    for seed in seeds:
        commands += teacher_commands(out, "full", seed)
        runs = {"assistant": f"{out}/full-{seed}.assistant"}
        for size in ("assistant", "student", "half"):
            for setting, alone in (("full", ""), ("no-assistant", "-alone")):
                other = "" if size == "student" else f"-{size}"  # else it is the ablations' own
                run = runs[f"size-{size}{alone}"] = f"{out}/students/{setting}{other}-{seed}"
                model = f"base/{size}"
                commands.append(student_command(out, seed, run, *SETTINGS[setting], model))
        for name, run in runs.items():
            files.setdefault(name, []).append(f"{run}.jsonl")
            commands.append(predict_command(posts, f"{run}/best", f"{run}.jsonl", "--no-chain"))
    commands.append(judge_command(files, posts, f"{out}/sizes", "--baseline assistant"))
    for name in ("size-assistant", "size-student", "size-half"):
        both = {each: files[each] for each in (name, f"{name}-alone")}
        commands.append(judge_command(both, posts, f"{out}/sizes/{name}", f"--baseline {name}"))
    return commands


def reason_commands(out, seeds):
    """The reviewers' check 2, reasons or justifications: students on both stages' chains and on
    stage 1's alone answer the test posts, and those with a part exchanged."""
    posts = f"{out}/posts.jsonl"
    changed = f"{out}/exchanged.jsonl"
    files = {}
    commands = [*world_commands(out), f"tests/toy.py exchange --data {posts} --out {changed}"]
    for seed in seeds:
        for name in ("full", "no-stage2"):
            run = f"{out}/students/{name}-{seed}"
            files.setdefault(name, []).append(f"{run}.exchanged.jsonl")
            commands += [
                *setting_commands(out, seed, name),
                predict_command(posts, f"{run}/best", f"{run}.chains.jsonl"),
                predict_command(changed, f"{run}/best", f"{run}.exchanged.jsonl")]
    return [*commands, judge_command(files, changed, f"{out}/reasons", "--baseline full")]


# part -> the field that reads it, the fact that it shows, all that it can be
FIELD_OF = {"picture": ("Image_analysis", "mood", TOY_SCENES),
            "words": ("Text_analysis", "words", TOY_WORDS)}


def reason_shares(students, part):
    """What students do where a part of the post was exchanged. students: of each {id: row} of its
    answers to the test posts, and its rows for the exchanged ones -> shares (None of nothing):
    field, the right field names what is there now and nothing else; of the posts that were right
    before and where the law asks for another label now: label and chain, how often each follows;
    old, how often the chain argues for the old label, and old_read, of those chains, how often the
    field was right all the same; label_stays, of those where the law still asks for the old one."""
    field, fact, values = FIELD_OF[part]
    found = {key: [] for key in ("field", "label", "chain", "old", "old_read", "label_stays")}
    for before, after in students:
        for row in [row for row in after if row["exchanged"] == part]:
            chain = parse_reasoning(row["raw"])
            named = {value for value in values if value in chain.fields.get(field, "")}
            reads = named == {row["facts"][fact]}
            found["field"].append(reads)
            old = before[row["post_id"]]["prediction"]
            if old != row["label_before"]:
                continue
            if old == row["label"]:
                found["label_stays"].append(row["prediction"] == old)
                continue
            found["label"].append(row["prediction"] == row["label"])
            found["chain"].append(chain.prediction == row["label"])
            found["old"].append(chain.prediction == old)
            if chain.prediction == old:
                found["old_read"].append(reads)
    sizes = dict(n=len(found["field"]), n_change=len(found["label"]))
    return sizes | {key: statistics.fmean(x) if x else None for key, x in found.items()}


def reason_table(out, seeds):
    """reason_shares of both settings and parts, over the students of all seeds."""
    table = []
    for name in ("full", "no-stage2"):
        students = []
        for seed in seeds:
            run = f"{out}/students/{name}-{seed}"
            before = {row["id"]: row for row in read_rows(f"{run}.chains.jsonl")}
            students.append((before, read_rows(f"{run}.exchanged.jsonl")))
        for part in FIELD_OF:
            table.append(dict(students=name, exchanged=part) | reason_shares(students, part))
    return table


RATES = (0, 0.25, 0.5, 1)
TOY_UBM = ("--reinit-layers 0 --members 1 --epochs 10 --lr 0.002 --head-lr 0.002 --adv-epsilon 0 "
           "--text-encoder {out}/encoders/text --image-encoder {out}/encoders/image")


def symbol_commands(out, seeds):
    """The paper's open question 3: the student and a UBM on test posts with more and more emojis,
    user names, links, hashtags and mojibake; a table of each."""
    posts, student, ubm = f"{out}/posts.jsonl", {}, {}
    commands = [*world_commands(out), f"tests/toy.py encoders --data {posts} --out {out}/encoders"]
    for rate in RATES:
        commands.append(f"tests/toy.py symbols --data {posts} --rate {rate} "
                        f"--out {out}/symbols-{rate}.jsonl")
    for seed in seeds:
        run = f"{out}/students/full-{seed}"
        small = f"{out}/ubm-{seed}"
        commands += [*setting_commands(out, seed, "full"),
                     f"train.py ubm --data {posts} --dev {posts} {TOY_UBM.format(out=out)} "
                     f"--seed {seed} --out {small}"]
        for rate in RATES:
            name = f"symbols-{rate}"
            changed = f"{out}/{name}.jsonl"
            student.setdefault(f"student-{rate}", []).append(f"{run}.{name}.jsonl")
            ubm.setdefault(f"ubm-{rate}", []).append(f"{small}.{name}.jsonl")
            commands += [
                predict_command(changed, f"{run}/best", f"{run}.{name}.jsonl"),
                predict_command(changed, small, f"{small}.{name}.jsonl", "--source ubm")]
    return [*commands,
            judge_command(student, posts, f"{out}/symbols/student", "--baseline student-0"),
            judge_command(ubm, posts, f"{out}/symbols/ubm", "--baseline ubm-0")]


EXPERIMENTS = {
    "prefer": (preference_commands, "KD and hard labels, with preference training or more KD"),
    "sizes": (size_commands, "smaller and larger students, with and without the assistant"),
    "reasons": (reason_commands, "pictures and words exchanged: do chain and label follow?"),
    "symbols": (symbol_commands, "emojis, names, links, hashtags, mojibake put into test posts")}


def experiment(args):
    """One of the four, and what eval.py does not count."""
    refuse_ranks(args.road)
    commands_of, _ = EXPERIMENTS[args.road]
    seeds = range(1, args.seeds + 1)
    commands = dict.fromkeys(commands_of(shlex.quote(args.out), seeds))  # each once
    # trap: export refuses a folder that is there
    run_commands([command for command in commands if not command.startswith("generate.py export")
                  or not Path(shlex.split(command)[-1]).exists()])
    if args.road == "reasons":
        show_table(reason_table(args.out, seeds), f"{args.out}/reasons/reasons.json")


# ---- readouts

# choice: after 6 epochs the tiny base names voices or words, or neither; at a constant rate it is
# even a matter of the last digits (one thread or two) how far the readouts on it get
OMNI_WARMUP = "--epochs 8 --lr 0.003 --schedule cosine"
INPUTS = {"text": "--without frames audio", "text + frames": "--without audio",
          "text + frames + audio": ""}
TOY_READOUT = ("--batch 8 --accumulate 1 --beta2 0.99 --epochs 5 --lr 0.003 --head-lr 0.002 "
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
    for name, (_, about) in EXPERIMENTS.items():
        p = roads.add_parser(name, formatter_class=Help, help=about)
        p.add_argument("--out", default="runs/ablate", help="where everything lands: beside the "
                       "ablations, whose posts and runs are the same")
        p.add_argument("--seeds", type=int, default=3, help="runs of each setting")
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
    return run_stage(roads.get(args.road, experiment), args)


if __name__ == "__main__":
    sys.exit(main())
