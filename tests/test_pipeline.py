"""The stages as a user runs them: one small road, resume after a kill, bad input, clear exits."""

import argparse
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

SMALL = "--batch 4 --accumulate 2 --lr 0.01 --seed 1".split()


def rows(path, *drop):
    """Rows of a file without the fields that a clock decides."""
    drop = {"seconds", "tokens_per_s", *drop}
    return [{k: v for k, v in row.items() if k not in drop} for row in mulcot.read_rows(path)]


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Every stage once, with few posts: warm-up to report."""
    out = tmp_path_factory.mktemp("road")
    sizes = "--train 24 --dev 6 --test 12 --warmup 24".split()
    assert toy.main(["posts", "--out", str(out), *sizes]) == 0
    for size in ("assistant", "student"):
        assert toy.main(["base", "--size", size, "--data", f"{out}/warmup.jsonl", "--epochs", "2",
                         "--out", f"{out}/base/{size}"]) == 0
    posts, chains, more = (f"{out}/{name}.jsonl" for name in ("posts", "chains", "augmented"))
    assert toy.main(["teacher", "--data", posts, "--out", chains]) == 0
    assert train.main(["assistant", "--data", chains, "--dev", posts, "--epochs", "1", "--model",
                       f"{out}/base/assistant", "--out", f"{out}/assistant", *SMALL]) == 0
    model = f"{out}/assistant/best"
    assert generate.main(["augment", "--data", chains, "--model", model, "--out", more,
                          "--max-new-tokens", "24"]) == 0
    assert generate.main(["soft", "--data", chains, "--model", model, "--out",
                          f"{out}/soft"]) == 0
    assert train.main(["student", "--data", chains, "--dev", posts, "--soft", f"{out}/soft",
                       "--epochs", "1", "--model", f"{out}/base/student", "--out",
                       f"{out}/student", *SMALL]) == 0
    assert generate.main(["predict", "--data", posts, "--split", "test", "--max-new-tokens", "24",
                          "--model", f"{out}/student/best", "--batch", "5", "--out",
                          f"{out}/predictions.jsonl"]) == 0
    assert evaluation.main([f"student={out}/predictions.jsonl", "--gold", posts, "--chains", chains,
                            "--out", str(out)]) == 0
    return out


def test_road_leaves_what_the_readme_names(road):
    """Files of every stage, and the fields that metrics.json promises."""
    for name in ("posts.jsonl", "images", "chains.jsonl", "assistant/best/adapter_config.json",
                 "student/log.jsonl", "predictions.jsonl", "metrics.json", "report.html"):
        assert (road / name).exists(), name
    metrics = json.loads((road / "metrics.json").read_text())
    assert {"accuracy", "macro_f1", "parse_rate", "agreement"} <= metrics["student"].keys()
    assert metrics["majority"]["accuracy"] < 0.75 and metrics["teacher"]["kept"] > 15
    predictions = mulcot.read_rows(road / "predictions.jsonl")
    assert len(predictions) == 12 and all(abs(sum(r["probs"]) - 1) < 1e-4 for r in predictions)


def test_config_tells_how_a_run_was_made(road):
    """The command as typed and the versions, for training and for rows."""
    for file, script in (("student/config.json", "train.py student"),
                         ("soft/soft.json", "generate.py soft"),
                         ("predictions.settings.json", "generate.py predict")):
        config = json.loads((road / file).read_text())
        assert config["command"].startswith(f"python {script} --data {road}")
        assert config["versions"]["torch"] == torch.__version__
        assert config["versions"].keys() == {"python", "numpy", "torch", "transformers"}


# ---- roads of commands


def parsed(command):
    """A command line as its script reads it."""
    script, *argv = shlex.split(command)
    if script != "tests/toy.py":
        scripts = {"train.py": train, "generate.py": generate, "eval.py": evaluation}
        return scripts[script].parse_args(argv)
    args, rest = toy.parse_args(argv)
    if args.stage == "teacher":
        args = generate.parse_args(["teacher", *rest, "--model", "toy"])
    return args


@pytest.mark.parametrize("out", ["runs/demo", "my demo's"])
def test_demo_commands_cover_the_road_and_parse(out):
    """Each printed command is one that its script accepts, in a folder with blanks too."""
    stages = [getattr(parsed(command), "stage", None) for command in demo.demo_commands(out, 42)]
    assert {"posts", "base", "teacher", "assistant", "augment", "soft", "student", "predict",
            None} == set(stages)


@pytest.mark.parametrize("quick", [False, True])
def test_ablation_commands_parse_and_feed_each_other(tmp_path, quick):
    """Whatever a command reads, an earlier one wrote; every setting has a file per seed."""
    commands, files = demo.ablation_commands(str(tmp_path), (1, 2), quick)
    assert len(commands) == len(set(commands))
    written = files_written(commands, tmp_path)
    assert set(files) == set(demo.QUICK if quick else demo.SETTINGS)
    assert all(len(each) == 2 and set(each) <= written for each in files.values())


def files_written(commands, folder):
    """What the commands write, in turn; fails where one reads what none before it wrote."""
    written = {f"{folder}/posts.jsonl", f"{folder}/warmup.jsonl"}
    for command in commands[1:]:
        args = parsed(command)
        read = {getattr(args, name, None) for name in ("soft", "text_encoder", "image_encoder")}
        for name in ("data", "rejected", "gold", "references", "predictions"):
            files = getattr(args, name, [])
            files = {files} if isinstance(files, str) else {*files}
            beside = all(Path(file).parent == folder for file in files)
            assert beside or name == "predictions", command  # where images/ is looked for
            read |= files
        model = (getattr(args, "model", None) or "toy").removesuffix("/best")
        read = {file.partition("=")[2] or file for file in {*read, model} - {None, "toy"}}
        assert read <= written, (command, read - written)
        written |= {args.out, args.out.replace(".jsonl", ".rejects.jsonl"), f"{args.out}/text",
                    f"{args.out}/image"}
    return written


@pytest.mark.parametrize("road", demo.EXPERIMENTS)
def test_experiments_parse_and_feed_each_other(tmp_path, road):
    """What they share with the ablations is the same command."""
    commands = demo.EXPERIMENTS[road][0](str(tmp_path), (3,))
    files_written(commands, tmp_path)
    own = {shlex.split(each.partition("--out ")[2])[0]: each for each in commands}
    shared = 0
    for command in demo.ablation_commands(str(tmp_path), (3,), quick=False)[0]:
        same = own.get(shlex.split(command.partition("--out ")[2])[0])
        shared += same == command
        assert same in (None, command)
    assert shared >= 8 and parsed(commands[-1]).baseline
    assert demo.parse_args([road, "--seeds", "1"]).out == demo.parse_args(["ablate"]).out


def test_a_killed_experiment_goes_on(tmp_path, monkeypatch):
    """Each command once; an exported folder that is there is not asked for again."""
    ran = []
    monkeypatch.setattr(demo, "run_commands", ran.extend)
    (tmp_path / "my out" / "students" / "full-1-merged").mkdir(parents=True)
    assert demo.main(["prefer", "--out", f"{tmp_path}/my out", "--seeds", "2"]) == 0
    exports = [parsed(command).out for command in ran if " export " in command]
    assert exports == [f"{tmp_path}/my out/students/full-2-merged"] and len(ran) == len(set(ran))


def test_exchanged_posts_and_symbols(tmp_path):
    """One part changes, and the label by the law; symbols come between words, more at a higher
    rate."""
    posts = toy.toy_posts(tmp_path / "images", {"test": 40}, 5, noise=0.5)
    mulcot.write_rows(tmp_path / "posts.jsonl", [post.row() for post in posts])
    posts = {post.id: post for post in posts}
    at = ["--data", f"{tmp_path}/posts.jsonl", "--out", f"{tmp_path}/new.jsonl"]
    assert toy.main(["exchange", *at]) == 0
    changed = mulcot.read_posts(tmp_path / "new.jsonl")
    assert len(changed) == 80 and len({post.id for post in changed}) == 80
    for post in changed:
        old, new = posts[post.columns["post_id"]], post.columns["facts"]
        facts, picture = old.columns["facts"], post.columns["exchanged"] == "picture"
        assert (new["mood"] != facts["mood"]) == picture == (new["scene"] != facts["scene"])
        assert (new["words"] != facts["words"]) != picture != (new["word"] != facts["word"])
        assert (post.text == old.text) == picture == (post.image != old.image)
        assert post.text == old.text.replace(f" {facts['word']}", f" {new['word']}") or (
            post.text.startswith(new["word"]))
        assert post.columns["label_before"] == toy.toy_label(facts["words"], facts["mood"])
        assert post.label == toy.toy_label(new["words"], new["mood"])
    before = 0
    for rate in ("0", "0.3", "1"):
        assert toy.main(["symbols", *at, "--rate", rate]) == 0
        symbols = 0
        for post in mulcot.read_posts(tmp_path / "new.jsonl"):
            old = posts[post.id]
            words = iter(post.text.split())
            assert all(word in words for word in old.text.split()) and post.label == old.label
            symbols += len(post.text.split()) - len(old.text.split())
        assert symbols > before or rate == "0" == str(symbols)
        before = symbols
    assert before == sum(len(post.text.split()) + 1 for post in posts.values())
    mulcot.write_rows(tmp_path / "posts.jsonl", [dict(id="1", text="x", split="test")])
    assert toy.main(["symbols", *at, "--rate", "1"]) == 2


def answer(post, part, law, label, chain, seen, before="negative", scene="cheerful"):
    """A row for an exchanged post: its law's label, the model's, its chain's, and what that saw."""
    fields = dict.fromkeys(mulcot.FIELDS, "x") | dict(Prediction=chain)
    fields["Image_analysis"] = f"The image shows a face, which is {seen}."
    return dict(id=f"{post}-{part}", post_id=post, exchanged=part, label=law, label_before=before,
                facts=dict(mood=scene, words="blame"), prediction=label,
                raw=mulcot.render_reasoning(fields))


def test_reason_shares_by_hand():
    """Six posts, of which one was wrong before, two must keep their label and three must change."""
    old = {str(n): dict(prediction="negative") for n in range(6)} | {
        "5": dict(prediction="neutral")}
    rows = [answer("0", "picture", "positive", "positive", "positive", "cheerful"),
            answer("1", "picture", "positive", "positive", "negative", "cheerful"),
            answer("2", "picture", "positive", "negative", "negative", "gloomy"),
            answer("3", "picture", "negative", "negative", "negative", "cheerful, not gloomy"),
            answer("4", "picture", "negative", "positive", "positive", "plain"),
            answer("5", "picture", "positive", "positive", "positive", "cheerful"),
            answer("0", "words", "positive", "positive", "positive", "cheerful")]
    assert demo.reason_shares([(old, rows)], "picture") == dict(
        n=6, n_change=3, field=3 / 6, label=2 / 3, chain=1 / 3, old=2 / 3, old_read=1 / 2,
        label_stays=1 / 2)
    assert demo.reason_shares([(old, rows)] * 2, "words") == dict(
        n=2, n_change=2, field=0, label=1, chain=1, old=0, old_read=None, label_stays=None)


# ---- training: order, resume, settings


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


def train_args(road, out, *more):
    return ["student", "--data", f"{road}/chains.jsonl", "--dev", f"{road}/posts.jsonl", "--soft",
            f"{road}/soft", "--model", f"{road}/base/student", "--out", str(out), "--epochs",
            "2", "--save-every", "1", "--log-every", "2", *SMALL, *more]


@pytest.fixture(scope="module")
def trained(road):
    """A whole run of train_args."""
    assert train.main(train_args(road, road / "trained")) == 0
    return road / "trained"


@pytest.mark.parametrize("schedule, dtype", [("plateau", "float32"), ("cosine", "float32"),
                                             ("plateau", "bfloat16")])
def test_resume_equals_uninterrupted_bit_for_bit(road, tmp_path, monkeypatch, schedule, dtype):
    """Stopped in the middle of an epoch and again later, a run ends with the same bytes and log."""
    more = ("--schedule", schedule, "--warmup", "0.3", "--dropout", "0.2", "--dtype", dtype)
    assert train.main(train_args(road, tmp_path / "whole", *more)) == 0
    real, calls = train.multitask_loss, []

    def stopping(*args):
        calls.append(1)
        if len(calls) in (5, 12):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "multitask_loss", stopping)
    codes = [train.main(train_args(road, tmp_path / "broken", *more)) for _ in range(3)]
    assert codes == [130, 130, 0]
    for part in ("best", "last"):
        assert files(tmp_path / "whole" / part) == files(tmp_path / "broken" / part)
    assert rows(tmp_path / "whole/log.jsonl") == rows(tmp_path / "broken/log.jsonl")
    whole, broken = (torch.load(tmp_path / x / "state.pt") for x in ("whole", "broken"))
    assert all(torch.equal(whole["trained"][k], broken["trained"][k]) for k in whole["trained"])


def test_bfloat16_trains_and_predicts_like_float32(road, tmp_path, monkeypatch):
    """The frozen base is held in bf16, the adapters in fp32; losses and labels come out alike."""
    losses, real = {}, train.TrainingState
    for dtype in ("float32", "bfloat16"):
        def state(args, model):
            dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
            assert dtypes == {True: torch.float32, False: getattr(torch, dtype)}
            return real(args, model)

        monkeypatch.setattr(train, "TrainingState", state)
        out = tmp_path / dtype
        assert train.main(train_args(road, out, "--dtype", dtype, "--dropout", "0")) == 0
        losses[dtype] = [row["loss"] for row in rows(out / "log.jsonl") if "loss" in row]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    probs = []
    for dtype in ("float32", "bfloat16"):
        model, processor = mulcot.load_trained(tmp_path / "float32/best", dtype=dtype)
        posts = mulcot.read_posts(road / "posts.jsonl")[:6]
        rows_ = mulcot.predict(model, processor, posts, max_new_tokens=4)
        probs.append(torch.tensor([row["probs"] for row in rows_]))
    assert 0 < (probs[0] - probs[1]).abs().max() < 0.05


def test_sigkill_in_training_loses_nothing(road, tmp_path):
    """A run killed with SIGKILL from outside, then rerun, equals an unbroken one."""
    args = train_args(road, tmp_path / "killed", "--epochs", "8")
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, state = time.time() + 60, tmp_path / "killed" / "state.pt"
    while not state.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and train.main(args) == 0
    assert train.main(train_args(road, tmp_path / "whole", "--epochs", "8")) == 0
    assert files(tmp_path / "whole/last") == files(tmp_path / "killed/last")


def test_finished_run_is_not_trained_again(road, trained, capsys):
    """Rerun: says finished, and changes no weight."""
    before = files(trained / "last"), rows(trained / "log.jsonl")
    assert train.main(train_args(road, trained)) == 0
    out = capsys.readouterr().out
    assert "finished" in out and out.splitlines()[-1].startswith("best dev accuracy")
    assert (files(trained / "last"), rows(trained / "log.jsonl")) == before


def test_settings_that_touch_no_weight_may_change(road, trained, tmp_path):
    """Half a run, then the rest with other logging, saving and memory, and with more epochs under
    the plateau schedule: the weights of a whole run."""
    out = tmp_path / "a"
    assert train.main(train_args(road, out, "--epochs", "1")) == 0
    more = "--log-every 3 --save-every 0 --gradient-checkpointing --workers 1".split()
    assert train.main(train_args(road, out, *more)) == 0
    for part in ("best", "last"):
        assert files(out / part) == files(trained / part)


@pytest.mark.parametrize("flags, told", [
    ("--rank 4", "rank = 16, not 4"), ("--epochs 1", "epochs = 2, not 1"),
    ("--schedule cosine", "schedule = 'plateau', not 'cosine'"), ("--lr 0.1", "lr = 0.01, not 0.1"),
    ("--dropout 0", "dropout = 0.05, not 0.0"), ("--no-augment", "augment = True, not False")])
def test_other_settings_are_refused(road, trained, capsys, flags, told):
    """Rerun with what touches weights, or with fewer epochs: refused, naming the setting."""
    assert told in fails(capsys, train, *train_args(road, trained, *flags.split()))


def test_an_adapter_is_no_base(road, trained, tmp_path, capsys):
    """A second adapter on top would find no layers: say what to do instead."""
    args = train_args(road, tmp_path / "a", "--no-soft", "--model", trained / "best")
    assert "export makes a model" in fails(capsys, train, *args)


def test_the_dtype_is_a_setting_even_by_default():
    """A run begun on a CPU must not go on over a GPU's 16 bits unseen."""
    words = "student --no-soft --data a --dev b --model m --out o --device".split()
    assert train.parse_args([*words, "cpu"]).dtype == "float32"
    assert train.parse_args([*words, "cuda:1"]).dtype == "bfloat16"
    words = "augment --data a --model m --out o --device cuda".split()
    assert generate.parse_args(words).dtype == "bfloat16"
    assert generate.parse_args("export --model m --out o --device cuda".split()).dtype is None


def test_more_epochs_only_where_the_rate_does_not_know_their_number(road, tmp_path, capsys):
    """Cosine and warm-up are laid out over all steps: another number is refused."""
    for n, more in enumerate((["--schedule", "cosine"], ["--warmup", "0.1"])):
        args = train_args(road, tmp_path / str(n), "--no-soft", "--epochs", "1", *more)
        assert train.main(args) == 0
        assert "epochs = 1, not 2" in fails(capsys, train, *args, "--epochs", "2")


def test_workers_change_nothing(road, trained, tmp_path):
    """Images decoded by two processes: the same bytes and log."""
    assert train.main(train_args(road, tmp_path / "a", "--workers", "2")) == 0
    for part in ("best", "last"):
        assert files(tmp_path / "a" / part) == files(trained / part)
    assert rows(tmp_path / "a/log.jsonl") == rows(trained / "log.jsonl")


def test_gradient_checkpointing_changes_nothing_but_memory(road, tmp_path, monkeypatch):
    """The same log with and without, dropout included; the frozen vision tower has no backward pass
    (noticed after slow steps on a GPU)."""
    asked, build = [], train.build_model

    def watched(*args):
        model = build(*args)
        model.model.visual.blocks[-1].register_forward_hook(
            lambda block, inputs, out: asked.append(out.requires_grad))
        return model

    monkeypatch.setattr(train, "build_model", watched)
    more = ("--no-soft", "--dropout", "0.2")
    assert train.main(train_args(road, tmp_path / "a", *more)) == 0
    assert train.main(train_args(road, tmp_path / "b", *more, "--gradient-checkpointing")) == 0
    pairs = zip(rows(tmp_path / "a/log.jsonl"), rows(tmp_path / "b/log.jsonl"), strict=True)
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in pairs)
    assert asked and not any(asked)


def test_show_prints_supervised_tokens(road, capsys):
    """--show prints the example and trains nothing."""
    assert train.main(train_args(road, road / "shown", "--show", "1")) == 0
    out = capsys.readouterr().out
    assert "branch 2" in out and '\033[32m' in out and not (road / "shown").exists()


def test_few_steps_an_epoch_are_told(road, tmp_path, capsys):
    """Three steps of 4 x 2 posts are little to learn from; ten and more need no note."""
    assert train.main(train_args(road, tmp_path / "a", "--epochs", "1", "--no-soft")) == 0
    assert "an epoch has only 3 steps of 4 x 2 posts" in capsys.readouterr().out
    more = "--batch 1 --accumulate 1 --no-soft --no-reasoning --epochs 1".split()
    assert train.main(train_args(road, tmp_path / "b", *more)) == 0
    assert "an epoch has only" not in capsys.readouterr().out


# ---- predictions and chains


def test_predict_resumes_with_the_same_rows(road, tmp_path):
    """Cut in the middle of a row, the file is mended and completed to the same rows."""
    whole = (road / "predictions.jsonl").read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    shutil.copy(road / "predictions.settings.json", tmp_path / "cut.settings.json")
    assert generate.main(["predict", "--data", f"{road}/posts.jsonl", "--split", "test", "--model",
                          f"{road}/student/best", "--batch", "5", "--max-new-tokens", "24",
                          "--out", str(cut)]) == 0
    assert rows(cut) == rows(road / "predictions.jsonl")


def test_augment_samples_the_same_chains_after_a_cut(road, tmp_path):
    """Sampling at 0.7 depends on seed and batch, not on what an earlier run had done."""
    args = ["augment", "--data", f"{road}/chains.jsonl", "--model", f"{road}/assistant/best",
            "--max-new-tokens", "24", "--batch", "7", "--out"]
    assert generate.main([*args, str(tmp_path / "a.jsonl")]) == 0
    for end in ("jsonl", "settings.json"):
        shutil.copy(tmp_path / f"a.{end}", tmp_path / f"b.{end}")
    rejects = (tmp_path / "a.rejects.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.rejects.jsonl").write_bytes(b"".join(rejects[:9]) + rejects[9][:20])
    assert generate.main([*args, str(tmp_path / "b.jsonl")]) == 0
    assert rows(tmp_path / "a.rejects.jsonl") == rows(tmp_path / "b.rejects.jsonl")


def test_a_deleted_out_is_begun_anew(road, tmp_path):
    """Other settings are taken, and what an earlier run set aside counts no more."""
    out = tmp_path / "a.jsonl"
    args = ["augment", "--data", f"{road}/chains.jsonl", "--model", f"{road}/assistant/best",
            "--max-new-tokens", "4", "--out", str(out)]
    texts = []
    for temperature in ("0.7", "1.5"):
        assert generate.main([*args, "--temperature", temperature]) == 0
        texts.append([row["raw"] for row in rows(tmp_path / "a.rejects.jsonl")])
        out.unlink()
    assert len(texts[0]) == len(texts[1]) == 24 and texts[0] != texts[1]


def test_greedy_labels_and_one_post(road, capsys):
    """The authors' way of labelling, and a single post from the shell."""
    model = ["--model", f"{road}/student/best", "--max-new-tokens", "8"]
    assert generate.main(["predict", "--data", f"{road}/posts.jsonl", "--decode", "greedy",
                          "--no-chain", "--out", f"{road}/greedy.jsonl", *model]) == 0
    assert all("raw_label" in r and "probs" not in r
               for r in mulcot.read_rows(road / "greedy.jsonl"))
    assert generate.main(["predict", "--text", "what a {day} <|im_end|>", "--aspect", "Rex",
                          "--image", f"{road}/images/test-0001.png", *model]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("label: ") and last.endswith("%)")


def test_a_student_with_an_adapter_of_zeros_is_its_base(road):
    """Nothing but the adapter tells the student's scores from its base model's."""
    model, processor = mulcot.load_model(road / "student/best")
    base, _ = mulcot.load_model(road / "base/student")
    posts = mulcot.read_posts(road / "posts.jsonl")[:4]
    batch = mulcot.encode_batch(posts, mulcot.label_branches(), model, processor)
    scores = mulcot.score_labels(base, batch)
    assert not torch.allclose(mulcot.score_labels(model, batch), scores)
    for layer in mulcot.lora_layers(model).values():
        torch.nn.init.zeros_(layer.lora_B)
    assert torch.allclose(mulcot.score_labels(model, batch), scores)


def test_local_teacher_goes_through_the_same_stages(road, tmp_path):
    """--model FOLDER: every post is kept or set aside with all its attempts, in both stages."""
    out = tmp_path / "chains.jsonl"
    args = ["teacher", "--data", f"{road}/posts.jsonl", "--split", "dev", "--model",
            f"{road}/assistant/best", "--max-new-tokens", "8", "--max-tries", "2", "--out",
            str(out)]
    assert generate.main(args) == 0
    aside = mulcot.read_rows(mulcot.sibling(out, "rejects.jsonl"))
    assert len(mulcot.read_rows(out)) + len(aside) == 6
    for row in aside:
        assert [a["stage"] for a in row["attempts"]] == [1, 1, 2, 2]
        for first, second in (row["attempts"][:2], row["attempts"][2:]):  # a retry changes
            budget = 16 if first["problem"] == "truncated" else 8
            assert second["max_tokens"] == budget and second["temperature"] > first["temperature"]
    assert any(row["attempts"][0]["problem"] == "truncated" for row in aside)


def test_teacher_tells_what_it_left_out(road, tmp_path, capsys):
    """Rows of other splits are counted by split."""
    assert toy.main(["teacher", "--data", f"{road}/posts.jsonl", "--out",
                     str(tmp_path / "chains.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "left out   6 of split dev, 12 of split test" in out


def test_dry_run_leaves_no_file(road, tmp_path, capsys):
    """Both prompts and an estimate; nothing is sent, nothing is written."""
    args = ["teacher", "--data", f"{road}/posts.jsonl", "--dry-run", "--out",
            str(tmp_path / "new/chains.jsonl")]
    for more in (["--endpoint", "https://example.com/v1", "--model", "big"], ["--model", "x/y"]):
        assert generate.main([*args, *more]) == 0
        out = capsys.readouterr().out
        assert "---- predict ----" in out and "Given sentiment: " in out
        assert "24 posts, about 36 calls" in out and "nothing was sent" in out
        assert not any(tmp_path.iterdir())


# ---- progress bars


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


def test_stages_print_no_progress_to_a_file(road, tmp_path):
    """A whole stage with its bars writes nothing to a stderr that is a file."""
    done = subprocess.run([sys.executable, str(ROOT / "generate.py"), "predict", "--data",
                           f"{road}/posts.jsonl", "--no-chain", "--model", f"{road}/student/best",
                           "--out", str(tmp_path / "predictions.jsonl")], capture_output=True)
    assert done.returncode == 0 and done.stderr == b""


# ---- bad input


def fails(capsys, module, *argv):
    """The one line that a failing command prints; exit code 2."""
    capsys.readouterr()
    assert module.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_an_empty_out_is_a_new_one(road, tmp_path):
    """mktemp's file and mkdir's folder are taken; a file of the user's is not, and stays as it
    is."""
    (tmp_path / "soft").mkdir()
    (tmp_path / "predictions.jsonl").touch()
    shutil.copy(road / "posts.jsonl", tmp_path / "mine.jsonl")
    data = ["--data", f"{road}/chains.jsonl", "--out"]
    assert generate.main(["soft", "--model", f"{road}/assistant/best", *data,
                          str(tmp_path / "soft")]) == 0
    predict = ["predict", "--model", f"{road}/student/best", "--no-chain", *data]
    assert generate.main([*predict, str(tmp_path / "predictions.jsonl")]) == 0
    assert generate.main([*predict, str(tmp_path / "mine.jsonl")]) == 2
    assert (tmp_path / "mine.jsonl").read_bytes() == (road / "posts.jsonl").read_bytes()


def test_one_line_and_exit_code_2(road, tmp_path, capsys):
    """Users' mistakes: what, where, how to fix; never a traceback."""
    posts, out = road / "posts.jsonl", tmp_path / "out"
    predict = ["predict", "--out", out, "--data"]
    assert "does not exist" in fails(capsys, generate, *predict, "no.jsonl", "--model", "x/y")
    assert "neither a folder nor a hub name" in fails(capsys, generate, *predict, posts, "--model",
                                                      "no/such/folder")
    assert "cannot be loaded" in fails(capsys, generate, *predict, posts, "--model", tmp_path)
    adapter = tmp_path / "adapter"  # made for the assistant, told that its base is the student
    shutil.copytree(road / "assistant/best", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(road / "base/student")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "wrong base model?" in fails(capsys, generate, *predict, posts, "--model", adapter)
    assert "no soft labels" in fails(capsys, train, *train_args(road, out, "--soft", tmp_path))
    plain = [{k: v for k, v in row.items() if k != "facts"} for row in mulcot.read_rows(posts)]
    mulcot.write_rows(tmp_path / "plain.jsonl", plain)
    assert "only knows toy posts" in fails(capsys, toy, "teacher", "--data",
                                           tmp_path / "plain.jsonl", "--images", road / "images",
                                           "--out", tmp_path / "chains.jsonl")
    assert "nobody knows" in fails(capsys, generate, *predict[:2], tmp_path, "--data", posts,
                                     "--no-chain", "--model", road / "student/best")


@pytest.mark.parametrize("argv", [["--nonsense"], ["predict"], ["student", "--data", "x"]])
def test_unknown_or_missing_flags_exit_2(argv, capsys):
    """argparse's own message, whichever script."""
    for module in (train, generate):
        with pytest.raises(SystemExit) as end:
            module.main(argv)
        assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_a_wrong_flag_prints_the_stages_own_usage(road, capsys):
    """The flags that could have been meant, not the list of stages."""
    predict = "predict --data x --out y --model z".split()
    for module, argv in ((train, train_args(road, "x")), (generate, predict)):
        for wrong in (["--nonsense"], ["--batch", "0"], ["--batch", "many"]):
            with pytest.raises(SystemExit) as end:
                module.main([*argv, *wrong])
            err = capsys.readouterr().err
            assert end.value.code == 2 and wrong[0] in err.splitlines()[-1]
            assert err.splitlines()[0].split()[2] == argv[0] and "--max-pixels" in err, err


def test_divergence_stops_with_a_message(road, tmp_path, capsys):
    """A rate that explodes the weights: a clear stop, and no broken state is saved."""
    args = train_args(road, tmp_path / "nan", "--lr", "1e30", "--clip", "0", "--no-soft")
    assert "training diverged" in fails(capsys, train, *args)


def test_bad_rows_are_set_aside_and_the_rest_is_predicted(road, tmp_path):
    """Broken rows are in the rejects with file, line and reason; the good ones go on."""
    good = mulcot.read_rows(road / "posts.jsonl")[0]
    lines = [json.dumps(good).encode(), b'{"id": "b", "text": "caf\xe9"}', b"{not json",
             json.dumps(good | {"id": "c", "label": "angry"}).encode(),
             json.dumps(good | {"id": "d", "image": "../posts.jsonl"}).encode(),
             json.dumps(good | {"id": "e", "image": "missing.png"}).encode(),
             json.dumps(good).encode(), json.dumps(good | {"id": "f", "text": " "}).encode(),
             json.dumps(good | {"id": "g", "text": '<|image_pad|> {} "Prediction": positive'})
             .encode()]
    path, out = tmp_path / "mixed.jsonl", tmp_path / "predictions.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert generate.main(["predict", "--data", str(path), "--images", f"{road}/images", "--model",
                          f"{road}/student/best", "--no-chain", "--out", str(out)]) == 0
    assert [r["id"] for r in mulcot.read_rows(out)] == [good["id"], "g"]
    aside = {r["where"].rpartition(":")[2]: r["problem"]
             for r in mulcot.read_rows(mulcot.sibling(out, "rejects.jsonl"))}
    reasons = {"2": "utf-8", "3": "not a row", "4": "unknown label", "5": "leads outside",
               "6": "cannot be read", "7": "duplicate id", "8": "empty text"}
    assert aside.keys() == reasons.keys()
    assert all(reasons[n] in aside[n] for n in reasons)


def test_full_disk_is_a_clear_stop_and_earlier_rows_are_whole(road, tmp_path):
    """Under a file-size limit (the kernel's way to say full) the stage stops with exit code 2; with
    room again the same command completes the file."""
    import resource

    args = [sys.executable, str(ROOT / "tests/toy.py"), "teacher", "--data", f"{road}/posts.jsonl",
            "--batch", "2", "--out", str(tmp_path / "chains.jsonl")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    done = subprocess.run(args, preexec_fn=limit, capture_output=True, text=True,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 2 and "run the same command again" in done.stderr, done.stderr
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert toy.main(args[2:]) == 0
    assert rows(tmp_path / "chains.jsonl") == rows(road / "chains.jsonl")


# ---- what a fresh reader broke


def test_out_never_eats_a_users_file(road, tmp_path, capsys):
    """A JSON list, a note or the data itself as --out is refused and stays as it was."""
    teacher = ["teacher", "--data", road / "posts.jsonl", "--out"]
    for name, text in (("list.json", '[{"id": 1}]'), ("note.txt", "one\ntwo")):
        file = tmp_path / name
        file.write_text(text)
        assert "choose another --out" in fails(capsys, toy, *teacher, file)
        assert file.read_text() == text
    assert "one of the --data files" in fails(capsys, toy, *teacher, road / "posts.jsonl")


def test_rows_of_two_models_never_mix(road, tmp_path, capsys):
    """Another model, or the same folder with other weights, onto the same --out: refused."""
    model, out = tmp_path / "model", tmp_path / "predictions.jsonl"
    shutil.copytree(road / "student/best", model)
    args = ["predict", "--data", f"{road}/posts.jsonl", "--no-chain", "--out", str(out), "--model"]
    assert generate.main([*args, str(model)]) == 0
    assert "begun with model" in fails(capsys, generate, *args, road / "base/student")
    shutil.copy(road / "assistant/best/adapter_model.safetensors", model)
    assert "begun with adapter" in fails(capsys, generate, *args, model)


def test_rows_carry_nothing_that_another_model_said(road, tmp_path):
    """Predicting over the teacher's rows leaves out their raw text, stage and tokens."""
    assert generate.main(["predict", "--data", f"{road}/chains.jsonl", "--no-chain", "--model",
                          f"{road}/student/best", "--out", str(tmp_path / "new.jsonl")]) == 0
    row = mulcot.read_rows(tmp_path / "new.jsonl")[0]
    assert not {"raw", "stage", "tries", "tokens_in", "cot", "problem", "temperature",
                "max_tokens"} & row.keys()


def test_gold_score_is_no_prediction():
    """A gold score in a predicted row would be judged against itself: MAE 0."""
    post = mulcot.Post("1", "t", label="neutral", score=2.0, columns={"seconds": 9, "mine": 1})
    args = argparse.Namespace(model="m")
    row = generate.new_row(post, args, "student", dict(prediction="neutral"))
    assert not {"score", "seconds"} & set(row) and row["mine"] == 1
    assert generate.new_row(post, args, "student", dict(score=0.5))["score"] == 0.5


def test_only_training_posts_are_trained_on(road, tmp_path, capsys):
    """augment asks about split train; train sets rows of other splits aside."""
    out = tmp_path / "augmented.jsonl"
    assert generate.main(["augment", "--data", f"{road}/posts.jsonl", "--model",
                          f"{road}/assistant/best", "--max-new-tokens", "4", "--out",
                          str(out)]) == 0
    rejects = mulcot.read_rows(mulcot.sibling(out, "rejects.jsonl"))
    assert {row["split"] for row in rejects} == {"train"}
    args = train_args(road, tmp_path / "t", "--no-soft", "--no-reasoning", "--epochs", "1")
    args[2] = f"{road}/posts.jsonl"
    assert train.main(args) == 0
    assert "24 rows (24 with images, 0 with audio), 6 dev posts" in capsys.readouterr().out
    aside = json.loads((tmp_path / "t/set_aside.json").read_text())
    assert sum("split test is not for training" in why for _, why in aside) == 12


def test_without_reasoning_rows_as_soft_has_them(road, tmp_path, capsys):
    """generate.py soft takes rows with a usable chain alone: so does who learns from it."""
    chains = mulcot.read_rows(road / "chains.jsonl")
    chains[0]["cot"] = None
    data = tmp_path / "rows.jsonl"
    mulcot.write_rows(data, chains)
    args = train_args(road, tmp_path / "t", "--no-reasoning", "--images", f"{road}/images")
    args[2] = str(data)
    assert train.main(args) == 0
    assert f"{len(chains) - 1} rows" in capsys.readouterr().out
    assert train.main([*args, "--no-soft", "--out", str(tmp_path / "all")]) == 0
    assert f"{len(chains)} rows" in capsys.readouterr().out


def test_no_model_is_written_over(road, tmp_path, capsys):
    """A folder with a config.json, or with weights, that no stage of ours made."""
    model = tmp_path / "model"
    shutil.copytree(road / "base/student", model)
    before = files(model)
    args = train_args(road, model)
    assert "not of this program" in fails(capsys, train, *args)
    (model / "config.json").write_text("[1")
    assert "not of this program" in fails(capsys, train, *args)
    (model / "config.json").write_bytes(before["config.json"])
    assert "soft.json is missing" in fails(capsys, generate, "soft", "--data",
                                           road / "chains.jsonl", "--model",
                                           road / "assistant/best", "--out", model)
    assert files(model) == before


def test_changed_rows_are_refused_on_resume(road, tmp_path, capsys):
    """The settings hold a digest of the training rows, not their file's name."""
    data = tmp_path / "rows.jsonl"
    lines = (road / "chains.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    args = train_args(road, tmp_path / "t", "--no-soft", "--images", f"{road}/images")
    args[2] = str(data)
    assert train.main(args) == 0
    data.write_text("".join(lines[:-1]))
    assert "begun with rows" in fails(capsys, train, *args)


def test_an_adapter_knows_its_base_and_image_size_from_anywhere(road, tmp_path, monkeypatch):
    """Trained with --max-pixels, it predicts with that size, also from another directory."""
    out = tmp_path / "small"
    assert train.main(train_args(road, out, "--no-soft", "--max-pixels", "3136")) == 0
    monkeypatch.chdir(tmp_path)
    _, processor = mulcot.load_model("small/best")
    assert processor.image_processor.size["longest_edge"] == 3136
    with pytest.raises(mulcot.InputError, match="use small/best"):
        mulcot.load_model("small")


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--epochs", "0"], ["--log-every", "-1"]])
def test_numbers_out_of_range_are_refused(road, tmp_path, flags):
    """argparse says so; no traceback later."""
    with pytest.raises(SystemExit):
        train.main(train_args(road, tmp_path, *flags))


def test_toy_posts_of_another_seed_do_not_overwrite_a_run(tmp_path, capsys):
    """Rows of two seeds would mix."""
    posts = ["posts", "--train", 2, "--dev", 1, "--test", 1, "--warmup", 1, "--out", tmp_path]
    assert toy.main([str(word) for word in posts]) == 0
    before = (tmp_path / "posts.jsonl").read_bytes()
    assert "begun with seed" in fails(capsys, toy, *posts, "--seed", 7)
    assert (tmp_path / "posts.jsonl").read_bytes() == before
