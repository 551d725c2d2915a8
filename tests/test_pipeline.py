"""The stages as a user runs them: a small road, kills and reruns, users' mistakes, clear exits."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tqdm.std
from conftest import ROOT

import demo
import eval as evaluation
import generate
import mulcot
import toy
import train


def road_commands(out):
    """{stage: (script, its command line)} of a small road, in the order in which they run."""
    posts, chains, base = f"{out}/posts.jsonl", f"{out}/chains.jsonl", f"{out}/base"
    loop = (f"--dev {posts} --batch 4 --accumulate 2 --lr 0.01 --seed 1 --log-every 2 "
            "--save-every 1 --epochs 2")
    commands = {
        "posts": (toy, f"posts --train 24 --dev 6 --test 12 --warmup 24 --out {out}"),
        "base/assistant": (toy, f"base --size assistant --data {out}/warmup.jsonl --epochs 2 "
                                f"--out {base}/assistant"),
        "base/student": (toy, f"base --size student --data {out}/warmup.jsonl --epochs 2 "
                              f"--out {base}/student"),
        "encoders": (toy, f"encoders --data {posts} --out {out}/encoders"),
        "teacher": (toy, f"teacher --data {posts} --out {chains}"),
        "assistant": (train, f"assistant --data {chains} {loop} --model {base}/assistant "
                             f"--out {out}/assistant"),
        "augment": (generate, f"augment --data {chains} --model {out}/assistant/best --batch 7 "
                              f"--max-new-tokens 24 --out {out}/augmented.jsonl"),
        "soft": (generate, f"soft --data {chains} --model {out}/assistant/best --out {out}/soft"),
        "student": (train, f"student --data {chains} {loop} --soft {out}/soft "
                           f"--model {base}/student --out {out}/student"),
        "readout": (train, f"readout --data {posts} {loop} --target label --model {base}/student "
                           f"--out {out}/readout"),
        "ubm": (train, f"ubm --data {posts} --dev {posts} --batch 4 --epochs 2 --seed 1 "
                       f"--text-encoder {out}/encoders/text --out {out}/ubm"),
        "predict": (generate, f"predict --data {posts} --split test --model {out}/student/best "
                              f"--batch 5 --max-new-tokens 24 --out {out}/predictions.jsonl"),
        "eval": (evaluation, f"student={out}/predictions.jsonl --gold {posts} --chains {chains} "
                             f"--out {out}")}
    return {stage: (script, command.split()) for stage, (script, command) in commands.items()}


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The folder in which the stages of MulCoT-RD ran once, with few posts."""
    out = tmp_path_factory.mktemp("road")
    for stage, (script, argv) in road_commands(out).items():
        if stage not in ("readout", "ubm"):
            assert script.main(argv) == 0, stage
    return out


def command(road, stage, *more):
    """(script, argv) of a stage of the road; what stands in `more` overrides it."""
    script, argv = road_commands(road)[stage]
    return script, [*argv, *map(str, more)]


def run(road, stage, *more):
    """The exit code of a stage of the road, run again."""
    script, argv = command(road, stage, *more)
    return script.main(argv)


def fails(capsys, script, argv):
    """The one line that a failing command prints; exit code 2."""
    capsys.readouterr()
    assert script.main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def rows(path):
    """Rows of a file without the fields that a clock decides."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")}
            for row in mulcot.read_rows(path)]


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(2, 5): the second and fifth step from now on are interrupted; gives all steps."""
    step, calls = torch.optim.AdamW.step, []

    def start(*numbers):
        def killed(self, *args, **kwargs):
            calls.append(1)
            if len(calls) in numbers:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", killed)
        return calls

    return start


def files(folder, name="*"):
    """{path: bytes, or rows} of what a stage left, without its command line and resume point."""
    left = {}
    for path in Path(folder).rglob(name):
        if path.is_file() and path.name not in ("settings.json", "state.pt"):
            content = rows(path) if path.suffix == ".jsonl" else path.read_bytes()
            left[str(path.relative_to(folder))] = content
    return left


def test_road_leaves_what_the_readme_names(road):
    """Files of every stage, the fields that metrics.json promises, and how each run was made: the
    command as typed and the versions."""
    for name in ("posts.jsonl", "images", "chains.jsonl", "assistant/best/adapter_config.json",
                 "student/log.jsonl", "student/lora_modules.json", "predictions.jsonl", "metrics.json",
                 "report.html"):
        assert (road / name).exists(), name
    metrics = json.loads((road / "metrics.json").read_text())
    assert {"accuracy", "macro_f1", "parse_rate", "agreement"} <= metrics["student"].keys()
    assert metrics["teacher"]["kept"] > 15 and len(rows(road / "predictions.jsonl")) == 12
    for file, begin in (("student/settings.json", "train.py student"),
                        ("soft/settings.json", "generate.py soft"),
                        ("predictions.settings.json", "generate.py predict")):
        settings = json.loads((road / file).read_text())
        assert settings["command"].startswith(f"python {begin} --data {road}")
        assert settings["versions"].keys() == {"python", "numpy", "torch", "transformers"}


def parsed(line):
    """A command line as its script reads it."""
    script, *argv = shlex.split(line)
    if script != "tests/toy.py":
        scripts = {"train.py": train, "generate.py": generate, "eval.py": evaluation}
        return scripts[script].parse_args(argv)
    args, rest = toy.parse_args(argv)
    if args.stage == "teacher":
        args = generate.parse_args(["teacher", *rest, "--model", "toy"])
    return args


@pytest.mark.parametrize("name", ["demo", "ablate", "ablate --quick"])
def test_roads_parse_and_feed_each_other(name):
    """Each printed command is one that its script accepts, in a folder with blanks too; whatever it
    reads, an earlier one wrote; every setting has a file per seed."""
    out, stages = "my demo's", []
    lines = demo.demo_commands(out, 42)
    if name != "demo":
        lines, predicted = demo.ablation_commands(shlex.quote(out), (1, 2), "--quick" in name)
        settings = demo.QUICK if "--quick" in name else demo.SETTINGS
        assert list(predicted) == list(settings) and {len(x) for x in predicted.values()} == {2}
        lines.append(f"eval.py {' '.join(sum(predicted.values(), []))} --gold "
                     f"{shlex.quote(out)}/posts.jsonl --out x")
    assert len(lines) == len(set(lines))
    written = {"toy", f"{out}/posts.jsonl", f"{out}/warmup.jsonl"}
    for line in lines[1:]:
        args, read = parsed(line), set()
        for flag in ("data", "dev", "soft", "model", "gold", "chains", "references", "predictions"):
            value = getattr(args, flag, None) or []
            read |= {value} if isinstance(value, str) else set(value)
        read = {(file.partition("=")[2] or file).removesuffix("/best") for file in read}
        assert read <= written, (line, read - written)
        written.add(args.out)
        stages.append(getattr(args, "stage", "eval"))
    assert {"base", "teacher", "assistant", "augment", "soft", "student", "predict",
            "eval"} == set(stages)


# ---- kills and reruns


@pytest.mark.parametrize("stage, more, kills, steps", [
    ("student", "--schedule plateau --warmup 0.3 --dropout 0.2", (2, 5), 8),
    ("student", "--schedule cosine --warmup 0.3 --dropout 0.2", (2, 5), 8),
    ("student", "--dtype bfloat16 --dropout 0.2", (2, 5), 8),
    ("readout", "", (2, 5), 8),
    ("ubm", "--members 2", (10, 27), 39)])  # a member that is not done begins anew
def test_resume_equals_uninterrupted_bit_for_bit(road, tmp_path, kill_at, stage, more, kills,
                                                 steps):
    """Killed in the middle of an epoch and again later, a run ends with the same bytes and log;
    another seed is refused meanwhile."""
    more = more.split()
    assert run(road, stage, *more, "--out", tmp_path / "whole") == 0
    calls = kill_at(*kills)
    codes = [run(road, stage, *more, "--out", tmp_path / "broken", "--seed", seed)
             for seed in (1, 9, 1, 1)]
    assert codes == [130, 2, 130, 0] and len(calls) == steps
    whole, broken = files(tmp_path / "whole"), files(tmp_path / "broken")
    assert whole == broken and len(whole) > 5


@pytest.mark.parametrize("number, file, code, said", [
    (signal.SIGKILL, "state.pt", -9, ""), (signal.SIGINT, "log.jsonl", 130, "saved at step"),
    (signal.SIGTERM, "log.jsonl", 143, "saved at step")])
def test_a_signal_in_training_loses_nothing(road, tmp_path, number, file, code, said):
    """A run that gets a signal from outside when that file is there, then rerun, equals an unbroken
    one; Ctrl-C and SIGTERM finish the step and save, long before the first epoch ends."""
    more = ("--epochs", "2", "--batch", "1", "--accumulate", "1", "--log-every", "1")
    _, argv = command(road, "student", "--out", tmp_path / "killed", *more)
    argv += ["--save-every", "3" if number == signal.SIGKILL else "0"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline, seen = time.time() + 120, tmp_path / "killed" / file
    while not seen.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate()
    assert process.returncode == code and said in printed
    assert (tmp_path / "killed" / "state.pt").exists() and train.main(argv) == 0
    assert run(road, "student", "--out", tmp_path / "whole", *more) == 0
    assert files(tmp_path / "whole") == files(tmp_path / "killed")


def test_a_run_killed_before_its_first_resume_point_begins_anew(road, tmp_path, monkeypatch):
    """Also with other settings: there is nothing to go on with."""
    with monkeypatch.context() as patch:
        patch.setattr(train.TrainingState, "save", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(road, "student", "--out", tmp_path / "a", "--epochs", "2")
    assert run(road, "student", "--out", tmp_path / "a", "--epochs", "1") == 0
    assert max(row["step"] for row in rows(tmp_path / "a/log.jsonl")) == 3


@pytest.mark.parametrize("stage", ["predict", "augment"])
def test_rows_after_a_cut_are_the_same(road, tmp_path, stage):
    """Cut in the middle of a row, the files are mended and completed to the same rows: sampling
    depends on seed and batch, not on what an earlier run had done. Other settings are refused."""
    name = dict(predict="predictions", augment="augmented")[stage]
    for file in road.glob(f"{name}.*"):
        whole = file.read_bytes()
        cut = whole[: len(whole) * 2 // 3] if file.suffix == ".jsonl" else whole
        (tmp_path / file.name).write_bytes(cut)
    out = tmp_path / f"{name}.jsonl"
    assert run(road, stage, "--out", out, "--seed", "9") == 2
    assert run(road, stage, "--out", out) == 0
    count = 0
    for end in ("jsonl", "rejects.jsonl"):
        assert rows(tmp_path / f"{name}.{end}") == rows(road / f"{name}.{end}")
        count += len(rows(road / f"{name}.{end}"))
    assert count == dict(predict=12, augment=len(rows(road / "chains.jsonl")))[stage]


@pytest.mark.parametrize("stage, flags, told", [
    ("student", "--rank 4", "rank = 16, not 4"), ("student", "--epochs 1", "epochs = 2, not 1"),
    ("student", "--schedule cosine", "schedule = 'plateau', not 'cosine'"),
    ("student", "--no-augment", "augment = True, not False"),
    ("assistant", "--lr 0.1", "lr = 0.01, not 0.1"),
    ("assistant", "--max-answer 300", "max_answer = 512, not 300"),
    ("teacher", "--max-tries 2", "max_tries = 3, not 2"),
    ("augment", "--temperature 0.5", "temperature = 0.7, not 0.5"),
    ("soft", "--max-pixels 3136", "max_pixels = 0, not 3136"),
    ("predict", "--decode greedy", "decode = 'score', not 'greedy'")])
def test_other_settings_are_refused(road, capsys, stage, flags, told):
    """Rerun of a finished stage, of train.py as of generate.py, with what touches weights or rows:
    refused, naming the setting, and nothing is changed. With its own flags it is done."""
    script, argv = command(road, stage)
    out = Path(argv[argv.index("--out") + 1])
    before = files(out.parent, f"{out.stem}*") if out.suffix else files(out)
    assert told in fails(capsys, script, [*argv, *flags.split()])
    assert script.main(argv) == 0
    assert before == (files(out.parent, f"{out.stem}*") if out.suffix else files(out))
    printed = capsys.readouterr().out
    if script is train:
        assert "resumed" in printed and printed.splitlines()[-1].startswith("best dev accuracy")


def test_settings_that_touch_no_weight_may_change(road, tmp_path, kill_at):
    """Half a run, then the rest with other logging, saving, memory and workers: the weights of a
    whole run."""
    kill_at(4)
    assert run(road, "student", "--out", tmp_path / "a") == 130
    more = "--log-every 3 --save-every 0 --gradient-checkpointing --workers 2".split()
    assert run(road, "student", "--out", tmp_path / "a", *more) == 0
    for part in ("best", "last"):
        assert files(tmp_path / "a" / part) == files(road / "student" / part)


def test_changed_rows_are_refused_on_resume(road, tmp_path, capsys):
    """The settings hold a digest of the training rows, not their file's name."""
    data = tmp_path / "rows.jsonl"
    lines = (road / "chains.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    script, argv = command(road, "assistant", "--data", data, "--images", road / "images",
                           "--epochs", "1", "--out", tmp_path / "t")
    assert script.main(argv) == 0
    data.write_text("".join(lines[:-1]))
    assert "begun with rows" in fails(capsys, script, argv)


def test_rows_of_two_models_never_mix(road, tmp_path, capsys):
    """Another model, or the same folder with other weights, onto the same --out: refused."""
    model = shutil.copytree(road / "student/best", tmp_path / "model")
    script, argv = command(road, "predict", "--no-chain", "--out", tmp_path / "rows.jsonl")
    assert script.main([*argv, "--model", str(model)]) == 0
    assert "begun with model" in fails(capsys, script, argv)
    shutil.copy(road / "student/last/adapter_model.safetensors", model)
    tensors = mulcot.read_tensors(model / "adapter_model.safetensors")
    mulcot.write_tensors(model / "adapter_model.safetensors",
                         {name: 2 * tensor for name, tensor in tensors.items()})
    assert "begun with weights" in fails(capsys, script, [*argv, "--model", model])


def test_out_is_an_empty_or_a_new_one(road, tmp_path, capsys):
    """mktemp's file and mkdir's folder are taken. A user's list, note, rows or model and the data
    itself are not, and stay as they were."""
    model = shutil.copytree(road / "base/student", tmp_path / "model")
    assert "not of this program" in fails(capsys, *command(road, "soft", "--out", model))
    assert files(model) == files(road / "base/student")
    (tmp_path / "soft").mkdir()
    (tmp_path / "empty.jsonl").touch()
    assert run(road, "soft", "--out", tmp_path / "soft") == 0
    assert run(road, "predict", "--no-chain", "--out", tmp_path / "empty.jsonl") == 0
    shutil.copy(road / "posts.jsonl", tmp_path / "mine.jsonl")
    (tmp_path / "list.json").write_text('[{"id": 1}]')
    (tmp_path / "note.txt").write_text("one\ntwo")
    for name, told in (("mine.jsonl", "nobody knows"), ("list.json", "choose another --out"),
                       ("note.txt", "choose another --out")):
        before = (tmp_path / name).read_bytes()
        assert told in fails(capsys, *command(road, "teacher", "--out", tmp_path / name))
        assert (tmp_path / name).read_bytes() == before
    data = command(road, "teacher", "--out", road / "posts.jsonl")
    assert "one of the --data files" in fails(capsys, *data)


# ---- training


def test_steps_of_epoch():
    """Every item once; the same for the same arguments; like lengths in a step; another epoch
    differs."""
    lengths = [i * 37 % 101 for i in range(250)]
    batches = train.steps_of_epoch
    steps = batches(lengths, 8, 3, 42)
    assert sorted(i for step in steps for i in step) == list(range(250))
    assert [len(step) for step in steps].count(8) == 31 and len(steps) == 32
    assert steps == batches(lengths, 8, 3, 42) != batches(lengths, 8, 4, 42)
    spread = lambda each: sum(max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in each)
    assert spread(steps) < 0.5 * spread(batches(lengths, 8, 3, 42, window=1))
    by_hand = torch.Generator().manual_seed(3 * 1000 + 2)  # posts, then steps, in the seed's order
    order = torch.randperm(5, generator=by_hand)
    order = order[torch.randperm(5, generator=by_hand)]
    assert train.steps_of_epoch([1] * 5, 1, epoch=2, seed=3, window=1) == order[:, None].tolist()


def test_bfloat16_trains_and_predicts_like_float32(road, tmp_path):
    """The frozen base is held in bf16, the adapters in fp32; losses and labels come out alike."""
    losses, probs = {}, []
    for dtype in ("float32", "bfloat16"):
        assert run(road, "student", "--out", tmp_path / dtype, "--dtype", dtype, "--dropout",
                   "0") == 0
        trained = torch.load(tmp_path / dtype / "state.pt")["trained"]
        assert {p.dtype for p in trained.values()} == {torch.float32}
        losses[dtype] = [row["loss"] for row in rows(tmp_path / dtype / "log.jsonl")
                         if "loss" in row]
        model, processor = mulcot.load_trained(tmp_path / "float32/best", dtype=dtype)
        assert model.dtype == getattr(torch, dtype)
        posts = mulcot.read_posts(road / "posts.jsonl")[:6]
        answers = mulcot.predict(model, processor, posts, chain=False)
        probs.append(torch.tensor([row["probs"] for row in answers]))
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert 0 < (probs[0] - probs[1]).abs().max() < 0.05


def test_the_dtype_is_a_setting_even_by_default(monkeypatch, capsys):
    """A run begun on a CPU must not go on over a GPU's 16 bits unseen; a GPU without bfloat16 gets
    32 and says so."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert mulcot.default_dtype("cuda") == "float32" and "no bfloat16" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    words = "student --no-soft --data a --dev b --model m --out o --device".split()
    assert train.parse_args([*words, "cpu"]).dtype == "float32"
    assert train.parse_args([*words, "cuda:1"]).dtype == "bfloat16"
    words = "augment --data a --model m --out o --device cuda".split()
    assert generate.parse_args(words).dtype == "bfloat16"
    assert generate.parse_args("export --model m --out o --device cuda".split()).dtype is None


def test_checkpointing_sends_no_gradient_through_the_frozen_vision_tower(road):
    """Noticed after slow steps on a GPU."""
    args = train.parse_args(command(road, "student", "--gradient-checkpointing")[1])
    model = mulcot.load_model(args.model)[0].train()
    mulcot.add_lora(model)
    train.checkpoint_layers(model)
    asked = []
    model.model.visual.blocks[-1].register_forward_hook(
        lambda block, inputs, out: asked.append(out.requires_grad))
    processor = mulcot.load_processor(args.model)
    post = mulcot.read_posts(road / "posts.jsonl")[0]
    batch = mulcot.encode_batch([post], mulcot.label_branches(), model, processor)
    assert mulcot.forward_branches(model, batch).requires_grad and asked == [False]


def test_what_is_printed_before_training(road, tmp_path, capsys):
    """--show prints the example with its supervised tokens and trains nothing. Dev posts whose text
    is trained on are counted."""
    assert run(road, "student", "--out", tmp_path / "shown", "--show", "1") == 0
    out = capsys.readouterr().out
    assert "branch 2" in out and "\033[32m" in out and not (tmp_path / "shown").exists()
    posts = [row | dict(split="dev") for row in mulcot.read_rows(road / "chains.jsonl")[:2]]
    posts += [row for row in mulcot.read_rows(road / "posts.jsonl") if row["split"] == "dev"]
    mulcot.write_rows(tmp_path / "dev.jsonl", posts)
    more = ["--images", road / "images", "--dev", tmp_path / "dev.jsonl", "--epochs", "1"]
    assert run(road, "assistant", *more, "--out", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "note       2 of 8 dev posts have the text of a training post" in out


def test_an_adapter_knows_its_base_and_image_size_from_anywhere(road, tmp_path, monkeypatch):
    """Trained with --max-pixels, it predicts with that size, also from another directory."""
    assert run(road, "assistant", "--out", tmp_path / "small", "--max-pixels", "3136", "--epochs",
               "1") == 0
    monkeypatch.chdir(tmp_path)
    _, processor = mulcot.load_model("small/best")
    assert processor.image_processor.size["longest_edge"] == 3136
    with pytest.raises(mulcot.InputError, match="use small/best"):
        mulcot.load_model("small")


def test_only_training_posts_are_trained_on(road, tmp_path, capsys):
    """Augment asks about split train, and says what it left out; train sets rows of other splits
    aside."""
    posts = ["--data", road / "posts.jsonl"]
    assert run(road, "augment", *posts, "--max-new-tokens", "4", "--out", tmp_path / "a.jsonl") == 0
    assert "left out   18 posts that are not of split train" in capsys.readouterr().out
    assert {row["split"] for row in rows(tmp_path / "a.rejects.jsonl")} == {"train"}
    more = "--no-soft --no-reasoning --epochs 1 --out".split()
    assert run(road, "student", *posts, *more, tmp_path / "t") == 0
    assert "24 rows (24 with images, 0 with audio), 6 dev posts" in capsys.readouterr().out
    aside = json.loads((tmp_path / "t/set_aside.json").read_text())
    assert sum("split test is not for training" in why for _, why in aside) == 12


def test_without_reasoning_rows_as_soft_has_them(road, tmp_path, capsys):
    """generate.py soft takes rows with a usable chain alone: so does who learns from it."""
    chains = mulcot.read_rows(road / "chains.jsonl")
    chains[0]["cot"] = None
    mulcot.write_rows(tmp_path / "rows.jsonl", chains)
    more = ["--data", tmp_path / "rows.jsonl", "--images", road / "images", "--no-reasoning",
            "--epochs", "1"]
    for n, flags in ((len(chains) - 1, []), (len(chains), ["--no-soft"])):
        assert run(road, "student", *more, *flags, "--out", tmp_path / str(n)) == 0
        assert f"{n} rows" in capsys.readouterr().out


# ---- predictions and chains


def test_labels_of_ones_own(road, tmp_path):
    """One changed line: prompts, parser, toy teacher, training, probabilities and report follow, and
    a score is refused in one line."""
    (tmp_path / "tests").mkdir()
    for name in ("train.py", "generate.py", "eval.py", "tests/toy.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    source, line = (ROOT / "mulcot.py").read_text(), 'LABELS = ("negative", "neutral", "positive")'
    labels = ("angry", "sad", "calm", "very glad")
    (tmp_path / "mulcot.py").write_text(source.replace(line, f"LABELS = {labels}", 1))
    out = tmp_path / "out"
    shutil.copytree(road / "base", out / "base")
    commands = road_commands(out)
    commands["student"][1].append("--no-soft")
    todo = [(script.__name__, argv) for stage, (script, argv) in commands.items()
            if stage in ("posts", "teacher", "student", "predict", "eval")]
    code = f"for script, argv in {todo}: assert __import__(script).main(argv) == 0, argv"
    env = os.environ | dict(PYTHONPATH=f"{tmp_path}:{tmp_path}/tests")
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)
    shown = rows(out / "predictions.jsonl")
    assert all(len(row["probs"]) == 4 and row["prediction"] in labels for row in shown)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["student"]["per_class"].keys() == set(labels) and metrics["teacher"]["kept"] > 15
    report = (out / "report.html").read_text()
    assert ".very-glad{--c:" in report and "class=very-glad" in report


def test_greedy_labels_and_one_post(road, tmp_path, capsys):
    """The authors' way of labelling, and a single post from the shell."""
    assert run(road, "predict", "--decode", "greedy", "--no-chain", "--out",
               tmp_path / "greedy.jsonl") == 0
    assert all("raw_label" in row and "probs" not in row for row in rows(tmp_path / "greedy.jsonl"))
    assert generate.main(["predict", "--text", "what a {day} <|im_end|>", "--aspect", "Rex",
                          "--image", f"{road}/images/test-0001.png", "--max-new-tokens", "8",
                          "--model", f"{road}/student/best"]) == 0
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert row["prediction"] in mulcot.LABELS and max(row["probs"]) > 0.5 and row["tokens"] <= 8


def test_rows_carry_nothing_that_another_model_said(road, tmp_path):
    """Predicting over the teacher's rows leaves out their raw text, stage and tokens, and gold
    scores, which would be judged against themselves (MAE 0). A broken row is set aside, until it
    is repaired."""
    data = [row | dict(score=1.0) for row in mulcot.read_rows(road / "chains.jsonl")]
    mulcot.write_rows(tmp_path / "chains.jsonl", data)
    with open(tmp_path / "chains.jsonl", "a") as file:
        file.write("{not json\n")
    argv = ["--data", tmp_path / "chains.jsonl", "--images", road / "images", "--split", "all",
            "--no-chain", "--out", tmp_path / "new.jsonl"]
    assert run(road, "predict", *argv) == 0
    row = mulcot.read_rows(tmp_path / "new.jsonl")[0]
    assert not {"raw", "stage", "tries", "tokens_in", "cot", "problem", "temperature", "score",
                "max_tokens", "unaided_prediction"} & row.keys()
    assert row["label"] and row["image"] and row["source"] == "model"
    (aside,) = rows(tmp_path / "new.rejects.jsonl")
    assert aside["where"].endswith(f"chains.jsonl:{len(data) + 1}")
    mulcot.write_rows(tmp_path / "chains.jsonl", [*data, data[0] | dict(id="repaired")])
    assert run(road, "predict", *argv) == 0 and rows(tmp_path / "new.rejects.jsonl") == []
    assert rows(tmp_path / "new.jsonl")[-1]["id"] == "repaired"


def test_progress_is_a_line_a_minute_where_nobody_watches(monkeypatch, capsys):
    """stderr is no terminal here: a run of under a minute prints nothing, one of five minutes a
    line each and a last one."""
    clock = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    for seconds, most in ((55, 0), (300, 6)):
        bar = mulcot.progress(seconds, "student", "step")
        for _ in range(seconds):
            clock[0] += 1.0
            bar.update()
        bar.close()
        lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
        assert min(most, 4) <= len(lines) <= most, lines
    assert re.fullmatch(r"student:? 60/300 01:00 *", lines[0])


# ---- users' mistakes


def test_one_line_and_exit_code_2(road, tmp_path, capsys):
    """What, where, how to fix; never a traceback."""
    predict = command(road, "predict", "--out", tmp_path / "out.jsonl")[1]
    adapter = shutil.copytree(road / "assistant/best", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(road / "base/student")  # made for the assistant
    mulcot.write_json(adapter / "adapter_config.json", config)
    for flags, told in ((["--data", "no.jsonl"], "does not exist"),
                        (["--model", "no/such/folder"], "'no/such/folder' cannot be loaded"),
                        (["--model", tmp_path], "cannot be loaded"),
                        (["--model", adapter], "wrong base model?"),
                        (["--out", tmp_path], "nobody knows")):
        assert told in fails(capsys, generate, [*predict, *flags])
    student = command(road, "student", "--out", tmp_path / "out")[1]
    for flags, told in ((["--soft", tmp_path], "settings.json is missing"),
                        (["--no-soft", "--model", road / "student/best"], "export makes a model"),
                        (["--no-soft", "--lr", "1e30", "--clip", "0"], "training diverged")):
        assert told in fails(capsys, train, [*student, *flags])


def test_a_wrong_value_prints_the_stages_own_usage(road, capsys):
    """A wrong value: the stage's flags, not the list of stages; argparse's exit code 2."""
    for stage, wrong in (("student", "--batch 0"), ("student", "--rank -1"),
                         ("predict", "--batch many"), ("predict", "--max-posts 2")):
        script, argv = command(road, stage, *wrong.split())
        with pytest.raises(SystemExit) as end:
            script.main(argv)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.splitlines()[0].split()[2] == argv[0], err
        assert "--max-pixels" in err
    for script, argv in ((train, ["student", "--data", "x"]), (generate, ["predict"]),
                         (train, ["--nonsense"]), (generate, ["--nonsense"])):
        with pytest.raises(SystemExit) as end:
            script.main(argv)
        assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_full_disk_is_a_clear_stop_and_earlier_rows_are_whole(road, tmp_path):
    """Under a file-size limit (the kernel's way to say full) the stage stops with exit code 2; with
    room again the same command completes the file."""
    import resource

    _, argv = command(road, "teacher", "--batch", "2", "--out", tmp_path / "chains.jsonl")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    done = subprocess.run([sys.executable, str(ROOT / "tests/toy.py"), *argv], preexec_fn=limit,
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 2 and "run the same command again" in done.stderr, done.stderr
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert toy.main(argv) == 0
    assert rows(tmp_path / "chains.jsonl") == rows(road / "chains.jsonl")
