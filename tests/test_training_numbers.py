"""More of the training loop by the numbers: what a seed draws, how LoRA's settings and the readout
reach the step, which rows are trained on, how fast it says it was."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from test_selection import folder, log, plan, run  # noqa: F401, fixtures and a reader

import mulcot
import train

SAME = ("--lr", "0", "--log-every", "1", "--no-reasoning")  # weights as they are, a row a step


def test_a_seed_draws_order_and_weights(run, plan):
    """Another seed gives other matrices A and, of some seeds, other steps: two posts each, so that
    their losses tell them apart."""
    losses, matrices = set(), []
    for seed in ("1", "2", "3"):
        plan("pppppp")
        out = run("--epochs", "1", "--accumulate", "2", "--seed", seed, *SAME, out=seed)
        weights = load_file(out / "last" / "adapter_model.safetensors")
        matrices.append(torch.cat([w.flatten() for k, w in weights.items() if "lora_A" in k]))
        losses.add(tuple(round(loss, 4) for loss in log(out, "loss")))
    assert len(losses) > 1
    assert not torch.equal(matrices[0], matrices[1])


def test_alpha_scales_the_gradient(run, plan):
    """B begins at 0, so that the first gradient is B's alone: α / rank times the rest."""
    norms = []
    for alpha in ("32", "96"):
        plan("pppppp")
        norms += log(run("--epochs", "1", "--alpha", alpha, *SAME, out=alpha), "grad_norm")
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-4)


def test_dropout_acts_in_training_alone(run, plan, monkeypatch):
    """LoRA's dropout changes each epoch's gradient, the second one's too, after dev was judged in
    eval mode."""
    plan(*["pppppp"] * 2)
    modes, planned = [], train.predict

    def predict(model, *more, **options):
        modes.append({module.training for module in model.modules()})
        return planned(model, *more, **options)

    monkeypatch.setattr(train, "predict", predict)
    out = run("--epochs", "2", "--dropout", "0.5", "--clip", "0", *SAME)
    assert set(map(tuple, modes)) == {(False,)}
    plan(*["pppppp"] * 2)
    still = run("--epochs", "2", "--clip", "0", *SAME, out="still")
    noisy, quiet = log(out, "grad_norm"), log(still, "grad_norm")
    assert quiet[1] == pytest.approx(quiet[0], rel=1e-4)
    assert all(abs(norm / quiet[0] - 1) > 0.01 for norm in noisy)
    assert noisy[1] != pytest.approx(noisy[0], rel=1e-3)


def test_speed_counts_the_posts_tokens(toy, folder, run, plan, monkeypatch):
    """With a clock of a second a call a step takes one: tokens per second are those of the four
    posts, prefix and label task, without padding."""
    calls = []

    def clock():
        calls.append(1)
        return float(len(calls))

    monkeypatch.setattr(train, "time", SimpleNamespace(time=clock))
    plan(*["pppppp"] * 2)
    out = run("--epochs", "2", "--batch", "4", "--accumulate", "1", *SAME)
    processor = mulcot.load_processor(toy / "student")
    tokens = 0
    for post in mulcot.read_posts(folder / "chains.jsonl", toy / "images"):
        branches = mulcot.training_branches(post, processor, need_chain=False)
        tokens += len(mulcot.encode(post, branches, processor))
    assert log(out, "tokens_per_s") == [tokens] * 2


def test_the_student_may_leave_the_assistants_chains_out(toy, folder, tmp_path, plan, capsys):
    """D_all is both; --no-augment (ablation) trains on the teacher's chains alone."""
    rows = mulcot.read_rows(folder / "chains.jsonl")
    data = tmp_path / "all.jsonl"
    mulcot.write_rows(data, [row | dict(source=source, id=f"{row['id']} {source}")
                             for row in rows[:2] for source in ("teacher", "assistant")])
    for flags, n in (([], 4), (["--no-augment"], 2)):
        plan("pppppp")
        argv = ["student", "--no-soft", "--data", str(data), "--dev", f"{folder}/dev.jsonl",
                "--images", f"{toy}/images", "--model", f"{toy}/student", "--device", "cpu",
                "--out", f"{tmp_path}/{n}", "--workers", "0", "--epochs", "1", *flags]
        assert train.main(argv) == 0
        assert f"\nrows {n}  steps 1\n" in capsys.readouterr().out


def test_the_longest_chain_that_is_trained_on(toy, folder):
    """--max-answer counts the end of the turn."""
    processor = mulcot.load_processor(toy / "student")
    post = mulcot.read_posts(folder / "chains.jsonl", toy / "images")[0]
    (_, chain), _ = mulcot.training_branches(post, processor)
    n = len(processor.text_ids(chain)) + 1
    assert len(mulcot.training_branches(post, processor, n)) == 2
    with pytest.raises(mulcot.InputError, match="longer"):
        mulcot.training_branches(post, processor, n - 1)


# ---- the neighbours' constants


def train_readout(toy, out, *flags):
    """Trains a readout in OUT/run on the posts of OUT/data.jsonl, dev in OUT/dev.jsonl."""
    argv = ["readout", "--data", f"{out}/data.jsonl", "--dev", f"{out}/dev.jsonl", "--model",
            f"{toy}/student", "--out", f"{out}/run", "--device", "cpu", "--workers", "0", *flags]
    assert train.main(argv) == 0


def test_dev_error_of_a_readout(toy, tmp_path, monkeypatch):
    """Minus the mean distance, so that more is better; no number is 6 away, as far as can be. A
    single training score has no deviation, and z-scores divide by 1."""
    said = {"dev-0": 1.0, "dev-1": -1.0, "dev-2": None}
    dev = [dict(id=name, text="so it goes", score=2.0) for name in said]
    mulcot.write_rows(tmp_path / "dev.jsonl", dev)
    mulcot.write_rows(tmp_path / "data.jsonl", [dict(id="1", text="a day", score=1.0)])

    def read_out(model, processor, posts):
        return [dict(score=said[post.id], raw="") for post in posts]

    monkeypatch.setattr(train, "read_out", read_out)
    train_readout(toy, tmp_path, "--readout", "generative", "--epochs", "1")
    assert log(tmp_path / "run", "dev_neg_mae") == pytest.approx([-(1 + 3 + 6) / 3])
    head = mulcot.read_json(tmp_path / "run" / "best" / "head.json")
    assert (head["mean"], head["deviation"]) == (1, 1)


def test_logged_loss_of_a_readout(toy, tmp_path, monkeypatch):
    """paper: L1 of z-scores, a mean over the step's posts. Without dropout and updates it is the
    mean distance of what the model says from the gold scores, in deviations."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    scores = [2.0, -1.0, 1.0]
    rows = [dict(id=str(n), text="a day " * (n + 1), score=s) for n, s in enumerate(scores)]
    for name in ("data", "dev"):
        mulcot.write_rows(tmp_path / f"{name}.jsonl", rows)
    train_readout(toy, tmp_path, "--epochs", "2", "--batch", "2", "--accumulate", "2", "--dropout",
                  "0", "--lr", "0", "--head-lr", "0")
    model, processor = mulcot.load_trained(tmp_path / "run" / "last")
    said = mulcot.read_out(model, processor, mulcot.read_posts(tmp_path / "data.jsonl"))
    error = sum(abs(row["score"] - gold) for row, gold in zip(said, scores)) / 3
    deviation = torch.tensor(scores).std(correction=0).item()
    want = pytest.approx(error / deviation, rel=1e-4)
    assert log(tmp_path / "run", "loss") == [want]
