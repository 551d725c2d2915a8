"""A UBM's training by hand: its rates, its running average, the epoch that is kept, its
temperature, its members' own orders."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import (
    register_optimizer_step_post_hook, register_optimizer_step_pre_hook)

import generate
import mulcot
import train


@pytest.fixture
def command(toy, encoders, tmp_path):
    """The arguments of a run of one member: twelve posts in fours, no adversarial step."""
    data = f"{toy}/posts.jsonl"
    return ["ubm", "--data", data, "--dev", data, "--text-encoder", f"{encoders}/text",
            "--device", "cpu", "--out", f"{tmp_path}/ubm", "--members", "1", "--epochs", "2",
            "--batch", "4", "--lr", "0.01", "--head-lr", "0.04", "--adv-epsilon", "0"]


@pytest.fixture
def steps():
    """What optimisers have before and after each step: dicts of rates, decay, the gradients'
    length, the weights before and after (encoder's first, then the head's)."""
    seen = []

    def weights(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]

    def before(optimizer, *_):
        groups = optimizer.param_groups
        gradients = torch.cat([p.grad.flatten() for p in weights(optimizer)
                               if p.grad is not None])  # a pooler is not used
        seen.append(dict(rates=[g["lr"] for g in groups], length=gradients.norm().item(),
                         decay=[g["weight_decay"] for g in groups],
                         before=[p.detach().clone() for p in weights(optimizer)]))

    def after(optimizer, *_):
        seen[-1]["after"] = [p.detach().clone() for p in weights(optimizer)]

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield seen
    for handle in handles:
        handle.remove()


def planned_logits(monkeypatch, answers, size=5.0):
    """Plans what a UBM says of the dev posts: `answers` are functions of (n, gold class) -> class,
    one for each epoch and one for the end. Returns the models' weights as they were asked."""
    asked = []

    def logits(model, posts):
        answer = answers[len(asked)]
        asked.append({k: v.clone() for k, v in model.state_dict().items()})
        said = [answer(n, mulcot.LABELS.index(post.label)) for n, post in enumerate(posts)]
        return size * torch.nn.functional.one_hot(torch.tensor(said), 3).float()

    monkeypatch.setattr(train, "ubm_logits", logits)
    return asked


def wrong_on(count):
    """Answers that are wrong on the first `count` posts of six."""
    return lambda n, gold: (gold + 1) % 3 if n < count else gold


right, wrong_on_two, wrong = wrong_on(0), wrong_on(2), wrong_on(6)


def test_the_steps_of_a_member(command, steps):
    """choice: both rates fall to 0 in a line, the head has its own; weight decay 0.01; the
    gradients' length is at most 1."""
    assert train.main(command) == 0
    falling = [1 - k / 6 for k in range(6)]
    assert [step["rates"] for step in steps] == [pytest.approx([0.01 * f, 0.04 * f])
                                                 for f in falling]
    assert all(step["decay"] == [0.01, 0.01] for step in steps)
    assert max(step["length"] for step in steps) == pytest.approx(1, abs=1e-3)


def test_the_running_average(command, encoders, steps, monkeypatch, tmp_path):
    """Step t moves the average to (1 + t) / (10 + t) of itself and the rest of the new weights; it
    begins at the first weights, and is what the member is."""
    planned_logits(monkeypatch, [wrong, right, right])
    assert train.main(command) == 0
    average = steps[0]["before"]
    for t, step in enumerate(steps, 1):
        keep = (1 + t) / (10 + t)
        average = [keep * old + (1 - keep) * new for old, new in zip(average, step["after"])]
    kept = load_file(tmp_path / "ubm" / "member-0.safetensors")
    member = mulcot.new_ubm(encoders / "text").members[0]
    assert member.head[0].p == 0.1
    for name, want in zip(dict(member.named_parameters()), average, strict=True):
        assert torch.allclose(kept[name], want, atol=1e-6), name


def test_the_average_never_gets_slower_than_a_fiftieth(command):
    """choice: from step 441 on the average keeps 0.98 of itself, and no more."""
    args = train.parse_args([*command, "--epochs", "2000", "--lr", "0", "--head-lr", "0"])
    posts = [mulcot.Post(str(n), "so dull", label="neutral") for n in range(2)]
    model = mulcot.new_ubm(args.text_encoder).members[0]
    average = copy.deepcopy(model)
    for p in average.parameters():
        p.data += 1.0
    optimizer = torch.optim.AdamW([dict(params=list(model.parameters()), peak_lr=0.0)], lr=0.0)
    words = train.WordEmbeddings(model.text)
    train.member_epoch(args, 1000, [[0], [1]], model, average, optimizer, words, posts,
                       mulcot.LABELS)
    for mean, p in zip(average.parameters(), model.parameters()):
        assert (mean - p - 0.98**2).abs().max() < 1e-5


def test_the_best_epoch_is_kept(command, monkeypatch, tmp_path):
    """Of four epochs the second, not its equal that follows nor the last; the log has what dev
    said."""
    asked = planned_logits(monkeypatch, [wrong, right, right, wrong_on_two, right])
    assert train.main([*command, "--epochs", "4"]) == 0
    kept = load_file(tmp_path / "ubm" / "member-0.safetensors")
    same = [all(torch.equal(kept[k], weights[k]) for k in kept) for weights in asked[:4]]
    assert same == [False, True, False, False]
    log = mulcot.read_rows(tmp_path / "ubm" / "member-0.jsonl")
    assert [row["dev_accuracy"] for row in log] == pytest.approx([0, 1, 1, 4 / 6])


def test_the_temperature_is_fitted_on_dev(command, monkeypatch, tmp_path):
    """Logits 5, 0, 0 that are right on four posts of six: e^(5/T) / (e^(5/T) + 2) = 2/3 at
    T = 5 / log 4."""
    planned_logits(monkeypatch, [wrong_on_two] * 3)
    assert train.main(command) == 0
    config = json.loads((tmp_path / "ubm" / "ubm.json").read_text())
    assert config["temperature"] == pytest.approx(5 / math.log(4), rel=0.01)


def test_the_logged_loss_is_of_the_plain_pass(command, monkeypatch, tmp_path):
    """With both rates 0 and dropout off every epoch's loss is that of the weights as they are; the
    adversarial pass, whose loss is higher, is not in it."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    assert train.main([*command, "--lr", "0", "--head-lr", "0", "--adv-epsilon", "0.5"]) == 0
    model = generate.load_ubm(tmp_path / "ubm")
    posts = [post for post in mulcot.read_posts(command[2]) if post.split == "train"]
    targets = train.class_targets(posts, mulcot.LABELS)
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(model.inputs(posts)), targets).item()
    log = mulcot.read_rows(tmp_path / "ubm" / "member-0.jsonl")
    assert [row["loss"] for row in log] == pytest.approx([want, want], rel=0.01)


def test_members_differ(command, tmp_path, monkeypatch):
    """Each member draws an order of its own over split train, and weights, or their mean would be
    worth no more than one; a step begins without gradients."""
    orders, read = [], mulcot.UBMMember.inputs

    def watched(self, posts):
        if self.training:
            orders.append([post.id for post in posts])
            assert {post.split for post in posts} == {"train"}
            assert not any(p.grad is not None and p.grad.any() for p in self.parameters())
        return read(self, posts)

    monkeypatch.setattr(mulcot.UBMMember, "inputs", watched)
    assert train.main([*command, "--members", "2", "--epochs", "1"]) == 0
    assert len(orders) == 6 and orders[:3] != orders[3:]
    one, other = generate.load_ubm(tmp_path / "ubm").members
    assert not torch.equal(one.head[1].weight, other.head[1].weight)


def test_score_bins_are_selected_by_the_smaller_error(command, toy, tmp_path, capsys):
    """More is better: the metric that selects is minus the mean distance. --bins 7 needs scores,
    and predicts one."""
    assert train.main([*command, "--bins", "7"]) == 2
    assert "no row that this stage can use" in capsys.readouterr().err
    rows = [row | dict(score=n % 7 - 3.0) for n, row in
            enumerate(mulcot.read_rows(toy / "posts.jsonl"))]
    data = str(tmp_path / "scored.jsonl")
    mulcot.write_rows(data, rows)
    argv = [data if arg.endswith("posts.jsonl") else arg for arg in command]
    assert train.main([*argv, "--bins", "7", "--images", f"{toy}/images"]) == 0
    model = generate.load_ubm(tmp_path / "ubm")
    dev = [post for post in mulcot.read_posts(data, toy / "images") if post.split == "dev"]
    bins = torch.tensor(mulcot.SCORE_BINS, dtype=torch.float)
    with torch.no_grad():
        scores = model(model.inputs(dev)).softmax(-1) @ bins
    error = (scores - torch.tensor([post.score for post in dev])).abs().mean().item()
    log = mulcot.read_rows(tmp_path / "ubm" / "member-0.jsonl")
    assert max(row["dev_neg_mae"] for row in log) == pytest.approx(-error, abs=1e-4)
    assert generate.main(["predict", "--model", f"{tmp_path}/ubm", "--text", "so dull"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert -3 <= row["predicted_score"] <= 3
