"""The readout: which state is read, its head and loss, its training from data to rows, metrics."""

import json
import math
import shlex
import shutil

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration)

import demo
import generate
import mulcot
import toy as toy_world
import train
from families import SHAPES
from mulcot import InputError, Readout
from toy import TOY_PITCHES, TOY_SIDES, toy_clip_warmup, toy_clips, write_wav

SMALL = "--batch 4 --accumulate 2 --epochs 2 --log-every 2 --save-every 1 --lr 0.003".split()


@pytest.fixture(scope="module")
def scored(toy, tmp_path_factory):
    """The toy posts with scores."""
    file = tmp_path_factory.mktemp("scored") / "posts.jsonl"
    worth = dict(positive=2.4, neutral=0.2, negative=-1.7)
    mulcot.write_rows(file, [p.row() | dict(score=worth[p.label] + (i % 3) / 10)
                             for i, p in enumerate(mulcot.read_posts(toy / "posts.jsonl"))])
    return file


def readout_args(toy, scored, out, *more):
    return ["readout", "--data", str(scored), "--dev", str(scored), "--images", f"{toy}/images",
            "--model", f"{toy}/student", "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def runs(toy, scored, tmp_path_factory):
    """A finished run of each kind: score, label, generative."""
    out = tmp_path_factory.mktemp("runs")
    for name, more in (("score", []), ("label", ["--target", "label"]),
                       ("generative", ["--readout", "generative"])):
        assert train.main(readout_args(toy, scored, out / name, *more)) == 0
    return out


# ---- which state is read

def test_last_attended_token_under_either_padding_side():
    """The story: with left padding, count - 1 is the index of another token."""
    hidden = torch.arange(24.0).reshape(3, 8, 1)
    left = torch.tensor([[0] * 5 + [1] * 3, [1] * 8, [0] * 7 + [1]])
    right = left.flip(1)
    assert mulcot.last_hidden(hidden, left)[:, 0].tolist() == [7, 15, 23]
    assert mulcot.last_hidden(hidden, right)[:, 0].tolist() == [2, 15, 16]
    gaps = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 0]])
    assert mulcot.last_hidden(hidden[:1], gaps == 1).item() == 5
    count = left.sum(1) - 1
    assert hidden[torch.arange(3), count, 0].tolist() == [2, 15, 16]  # what the bug reads


# ---- head, loss, counts

def test_head_parameters_at_the_papers_width():
    """918,529 at D = 3,584; three classes need two more outputs."""
    count = lambda target: sum(p.numel() for p in Readout(3584, dict(target=target)).parameters())
    assert count("score") == 918_529 and count("label") == 918_529 + 2 * 257
    assert not list(Readout(3584, dict(target="score", readout="generative")).parameters())


def test_loss_by_hand():
    """L1 of z-scores, summed; cross-entropy of classes, summed."""
    out, gold = torch.tensor([[0.5], [-1.0]]), torch.tensor([2.0, -1.0])
    assert mulcot.readout_loss(out, gold, 1.0, 2.0).item() == pytest.approx(0.0 + 0.0)
    assert mulcot.readout_loss(out, gold, 0.0, 1.0).item() == pytest.approx(1.5 + 0.0)
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.log(2), 0.0]])
    want = math.log(3) + math.log(2)
    assert mulcot.readout_loss(logits, torch.tensor([2, 1])).item() == pytest.approx(want)


def test_lora_on_the_omni_7b_shape():
    """METHOD: 103,043,072 parameters at rank 32 over language, vision and audio."""
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
                  spatial_merge_size=2, out_hidden_size=3584)
    audio = dict(encoder_layers=32, d_model=1280, encoder_attention_heads=20, encoder_ffn_dim=5120,
                 output_dim=3584)
    config = Qwen2_5OmniThinkerConfig(text_config=SHAPES["7B"], vision_config=vision,
                                      audio_config=audio)
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
        mulcot.add_lora(model, 32, 32, 0.1, scope="all")
    language, vision, audio = 80_740_352, 14_438_400, 7_864_320
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        (language, vision, audio)) == 103_043_072


# ---- training

def test_learning_rates_are_separate(runs):
    """The head's peak rate is its own, the schedule the same; both kinds of weights moved."""
    state = torch.load(runs / "score/state.pt")
    groups = state["optimizer"]["param_groups"]
    assert groups[1]["lr"] > 0 and groups[0]["lr"] / groups[1]["lr"] == pytest.approx(3.0)
    assert len(groups[1]["params"]) == 6  # two linears and a norm
    assert all(state["trained"][k].abs().sum() > 0 for k in state["trained"] if "lora_B" in k)


def test_best_holds_adapter_and_head(toy, scored, runs):
    """Folder -> the same model; mean and deviation are those of the training posts."""
    names = {p.name for p in (runs / "score/best").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "head.safetensors",
            "head.json"} <= names
    config = json.loads((runs / "score/best/head.json").read_text())
    scores = [p.score for p in mulcot.read_posts(scored, toy / "images") if p.split == "train"]
    assert config["mean"] == pytest.approx(np.mean(scores))
    assert config["deviation"] == pytest.approx(np.std(scores))
    model, processor = mulcot.load_trained(runs / "score/best")
    assert model.readout.config == config and not model.readout.training
    posts = mulcot.read_posts(scored, toy / "images")
    dev = [p for p in posts if p.split == "dev"]
    mae = np.mean([abs(row["score"] - p.score)
                   for row, p in zip(mulcot.read_out(model, processor, dev), dev)])
    best = torch.load(runs / "score/state.pt")["best"]
    assert -best["metrics"]["neg_mae"] == pytest.approx(mae, abs=1e-4)
    assert not (runs / "generative/best/head.safetensors").exists()


def test_predict_rows(toy, scored, runs, tmp_path):
    """Scores, or predictions with probabilities; independent of the batch; no chain."""
    rows = {}
    for name in ("score", "label", "generative"):
        for batch in ("1", "24"):
            out = tmp_path / f"{name}{batch}.jsonl"
            assert generate.main(["predict", "--data", str(scored), "--images", f"{toy}/images",
                                  "--split", "test", "--model", f"{runs}/{name}/best", "--batch",
                                  batch, "--out", str(out)]) == 0
            rows[name, batch] = {r["id"]: r for r in mulcot.read_rows(out)}
        assert len(rows[name, "1"]) == 6
    for i, one in rows["score", "1"].items():
        assert abs(one["score"]) <= 3 and "prediction" not in one
        assert one["score"] == pytest.approx(rows["score", "24"][i]["score"], abs=2e-4)
    for i, one in rows["label", "1"].items():
        assert one["probs"] == pytest.approx(rows["label", "24"][i]["probs"], abs=1e-4)
    for i, one in rows["generative", "1"].items():
        assert one["raw"] == rows["generative", "24"][i]["raw"]
        assert one["score"] == mulcot.parse_score(one["raw"])
        assert (one["problem"] is None) == (one["score"] is not None)


def test_one_clip_from_the_shell(toy, runs, tmp_path, capsys):
    """The score of a row in a file with the same frames; a voice reaches the model too, and this
    one says that it hears nothing."""
    frames = shutil.copytree(toy / "images", tmp_path / "frames")
    for file in sorted(frames.iterdir())[2:]:
        file.unlink()
    wav = write_wav(tmp_path / "a.wav", np.zeros(8000))
    argv = ["predict", "--model", f"{runs}/score/best", "--text", "so dismal", "--frames"]
    assert generate.main([*argv, str(frames)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    model, processor = mulcot.load_trained(runs / "score/best")
    post = mulcot.Post("1", "so dismal", frames=[str(p) for p in sorted(frames.iterdir())])
    assert row == mulcot.read_out(model, processor, [post])[0]
    assert generate.main([*argv, str(frames), "--audio", wav]) == 2
    assert "hears nothing" in capsys.readouterr().err


# ---- bad input

def test_rows_without_a_score_are_set_aside(toy, scored, tmp_path, capsys):
    """With the reason; without any, to train on or to select on, the stage stops."""
    rows, some, bare = mulcot.read_rows(scored), tmp_path / "some.jsonl", tmp_path / "bare.jsonl"
    mulcot.write_rows(some, [rows[0] | dict(score=None), *rows[1:]])
    mulcot.write_rows(bare, [row | dict(score=None) for row in rows])
    args = readout_args(toy, scored, tmp_path / "out", "--epochs", "1")
    assert train.main([*args, "--data", str(some)]) == 0
    (aside,) = json.loads((tmp_path / "out/set_aside.json").read_text())
    assert rows[0]["id"] in aside[0] and aside[1] == "no score"
    for flag, told in (("--data", "no row that this stage can use"),
                       ("--dev", "no post of split dev with a score")):
        assert train.main([*args, flag, str(bare)]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "head.safetensors").unlink(), "head.safetensors is missing"),
    (lambda f: mulcot.write_tensors(f / "head.safetensors",
                                    Readout(32, dict(target="score")).state_dict()),
     "size mismatch")])
def test_foreign_heads_are_refused(runs, tmp_path, damage, message):
    """A head that is gone, or of another width, is named."""
    folder = shutil.copytree(runs / "score/best", tmp_path / "best")
    damage(folder)
    with pytest.raises(InputError, match=message):
        mulcot.load_trained(folder)


# ---- scores as text, and their metrics

@pytest.mark.parametrize("text, score", [
    ("1.4", 1.4), ("-0.6", -0.6), ("+2", 2.0), (" \u22121.5\n", -1.5), ("Score: 0.0 of 3", 0.0),
    ("14", 14.0), (".5", 0.5), ("", None), ("positive", None), ("-", None), ("1e5", 1.0),
    ("9" * 400, 999999999.0), ("\u0663", None)])
def test_parse_score(text, score):
    """The first number, in range or not; anything else is None. The written form has one decimal
    and no negative zero."""
    assert mulcot.parse_score(text) == score
    for tenth in range(-30, 31):
        assert mulcot.parse_score(mulcot.render_score(tenth / 10)) == tenth / 10
    assert mulcot.render_score(-0.04) == "0.0" and mulcot.render_score(2.4000000953) == "2.4"


# ---- the comparison

def test_toy_clips_need_each_input(tmp_path):
    """The score is words + frames + pitch, in tenths, within the range; files are there."""
    posts = toy_clips(tmp_path, {"train": 40}, seed=5)
    sums = []
    for post in posts:
        facts = post.columns["facts"]
        side = sum(TOY_SIDES.get(facts[k], 0) for k in ("words", "mood"))
        pitch = round(post.score - side, 1)
        assert abs(pitch) <= 1 and facts["pitch"] == TOY_PITCHES[round((pitch + 1) * 2)]
        samples = mulcot.load_audio(post.audio)
        spectrum = torch.fft.rfft(samples * torch.hann_window(len(samples))).abs()
        peak = spectrum.argmax().item() * 16_000 / len(samples)
        assert peak == pytest.approx(250 * 2**pitch, rel=0.05)
        assert facts["word"] in post.text and len(post.frames) == 2 and post.image is None
        sums.append((side, pitch))
    assert len(set(sums)) > 25
    warm = toy_clip_warmup(tmp_path / "warm", 6)
    assert all(p.score is None and len(p.columns["branches"]) == 3 for p in warm)


def test_the_base_is_warmed_up_at_a_rate_that_falls(tmp_path):
    """A base that ends at its full rate ends wherever its last steps threw it."""
    warm, rates = toy_clip_warmup(tmp_path / "warm", 6), []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    toy_world.warm_up(tmp_path / "base", "omni", warm, 20, 0.003, "cosine", batch_size=3)
    handle.remove()
    assert len(rates) == 40 and rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[0] == 0.0015 and rates[1] == pytest.approx(0.003, rel=0.01)
    assert rates[-1] < 0.003 / 500
    args, _ = toy_world.parse_args(
        f"base --size omni --data w --out o {demo.OMNI_WARMUP}".split())
    assert args.schedule == "cosine"


def test_compare_commands_parse_and_differ_in_one_thing():
    """Both readouts: same data, model, LoRA and budget; inputs as the table says."""
    files, commands = demo.readout_commands("my out", 1)
    runs = [train.parse_args(shlex.split(c)[1:]) for c in commands if c.startswith("train.py")]
    parsed = {key: vars(ran) for key, ran in zip(files, runs, strict=True)}
    predicted = [generate.parse_args(shlex.split(command)[1:]).out for command in commands
                 if command.startswith("generate.py")]
    assert predicted == list(files.values()) and len(parsed) == 6
    for (readout, inputs), ran in parsed.items():
        assert ran.pop("readout") == readout and ran.pop("run") and ran.pop("out")
        assert {"frames", "audio"} - set(ran["without"]) == set(inputs.split(" + ")) - {"text"}
    for inputs in demo.INPUTS:
        assert parsed["discriminative", inputs] == parsed["generative", inputs]


def test_compare_table(toy, scored, tmp_path, monkeypatch, capsys):
    """Rows of the six runs -> metrics, parts of unparsed and out-of-range answers."""
    test = [p for p in mulcot.read_posts(scored, toy / "images") if p.split == "test"]

    def pretend(commands):
        for command in commands[3::2]:
            out = shlex.split(command)[-1]
            answers = [p.score if "discriminative" in out else [None, 5.0, p.score][i % 3]
                       for i, p in enumerate(test)]
            mulcot.write_rows(out, [dict(id=p.id, score=score, seconds=0.5)
                                    for p, score in zip(test, answers)])
        return [10, 20] * (len(commands) // 2)

    monkeypatch.setattr(demo, "run_commands", pretend)
    mulcot.write_rows(tmp_path / "posts.jsonl", [p.row() | dict(image=None) for p in test])
    assert demo.main(["readout", "--out", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "compare.json").read_text())
    assert [row["readout"] for row in table] == ["discriminative", "generative"] * 3
    assert table[0]["mae"] == 0 and table[0]["acc7"] == 1 and table[0]["unparsed"] == 0
    assert table[1]["unparsed"] == pytest.approx(1 / 3) == table[1]["out_of_range"]
    assert table[1]["acc7"] < 1 and table[1]["s_per_post"] == 0.5 and table[1]["peak_mib"] == 20
    assert "text + frames + audio" in capsys.readouterr().out


@pytest.mark.parametrize("more", [
    [], ["--data", "x"],
    "--data x --dev x --model x --readout generative --target label".split()])
def test_incomplete_or_contradicting_flags_are_refused(more):
    """A readout needs data, dev posts and a model, and writes scores alone as text."""
    with pytest.raises(SystemExit):
        train.parse_args(["readout", "--out", "o", *more])
