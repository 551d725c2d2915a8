"""Small things that an audit found unpinned: published files, asserts that hold the loss together,
where LoRA's dropout stands, the readout's layers, the optimiser's constants."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import noise_image
from torch import nn

import generate
import mulcot
import train

# ---- published files


def test_clmlfs_split_of_mvsa(tmp_path, capsys):
    """0 is positive, 1 neutral, 2 negative, the other way round than in TomBERT's files; the picture
    has the row's id, the split is the file's name. A bad label costs its row."""
    rows = [dict(id=str(n), text=f"post {n}", emotion_label=n) for n in range(4)]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    for n in range(3):
        noise_image(tmp_path / f"{n}.jpg", (8, 8))
    rejects = []
    posts = mulcot.read_posts(tmp_path / "dev.json", rejects=rejects)
    assert [post.label for post in posts] == ["positive", "neutral", "negative"]
    assert [post.image.rpartition("/")[2] for post in posts] == ["0.jpg", "1.jpg", "2.jpg"]
    assert {post.split for post in posts} == {"dev"} and "emotion_label" in rejects[0][1]
    assert "no row has" not in capsys.readouterr().out


def test_a_list_without_labels_and_images_says_so_once(tmp_path, capsys):
    rows = [dict(id=1, text="a", sentiment=2), dict(id=2, text="b", sentiment=0)]
    (tmp_path / "posts.json").write_text(json.dumps(rows))
    assert len(mulcot.read_posts(tmp_path / "posts.json")) == 2
    assert capsys.readouterr().out.count("no row has a label or an image") == 1


def test_predict_answers_the_test_posts(toy):
    """Of a file that holds other splits too, unless --split says otherwise."""
    args = generate.parse_args(["predict", "--model", "m", "--data", f"{toy}/posts.jsonl",
                                "--out", "rows.jsonl"])
    assert {post.split for post in generate.select_posts(args)[0]} == {"test"}


# ---- asserts that hold the loss together


def test_padding_stands_at_the_end(student, posts):
    """A row that begins with padding is refused."""
    model, processor = student
    batch = mulcot.encode_batch(posts[:2], mulcot.label_branches(), model, processor)
    batch.branch_ids[0, 0] = -1
    with pytest.raises(AssertionError, match="padding"):
        mulcot.forward_branches(model, batch)


@pytest.mark.parametrize("fault", ["fewer soft labels", "a target beyond the vocabulary"])
def test_task_loss_refuses(student, posts, fault):
    """Soft labels that are not as many as the positions, and ids that the output layer has not."""
    model, processor = student
    batch = mulcot.encode_batch(posts[:2], mulcot.label_branches(), model, processor)
    stage = train.Stage(SimpleNamespace(lam=0.3, temperature=2.0, t_squared=False), processor)
    hidden = mulcot.forward_branches(model, batch).detach()
    if fault == "fewer soft labels":
        stage.soft_labels = SimpleNamespace(hidden=lambda *_: torch.zeros(3, 5))
    else:
        batch.targets[batch.supervised(1)] = model.lm_head.out_features
    with pytest.raises(AssertionError):
        stage.task_loss(model, hidden, batch, [], 1, 1)


def test_soft_labels_take_the_heads_dtype(tmp_path):
    """They lie in float16, and meet a head in bfloat16."""
    mulcot.write_json(tmp_path / "settings.json", dict(stage="soft"))
    labels = mulcot.SoftLabels(tmp_path)
    example = mulcot.Example([1, 2], None, [([3, 4], 1)], None, {})
    labels.write_part({labels.names(example)[0]: torch.full((1, 4), 0.1)})
    labels.write_head(torch.ones(7, 4, dtype=torch.bfloat16))
    labels = mulcot.SoftLabels(tmp_path)
    labels.load_head("cpu")
    assert labels.hidden([example], 1).dtype == torch.bfloat16


# ---- layers and optimiser


def test_loras_dropout_stands_before_a():
    """y = base(x) + (α / r) B A dropout(x), with a dropout that takes the first two inputs away."""
    base = nn.Linear(6, 5)
    layer = mulcot.LoRALinear(base, rank=2, alpha=6, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    kept = torch.tensor([0.0, 0, 1, 1, 1, 1])
    layer.dropout = nn.Identity()
    layer.dropout.forward = lambda x: x * kept
    x = torch.randn(3, 4, 6)
    want = base(x) + 3 * (x * kept) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), want)


def test_lora_begins_as_its_paper_has_it():
    """A as Kaiming's uniform with a = √5, B at 0."""
    layer = mulcot.LoRALinear(nn.Linear(64, 8), rank=4, alpha=8)
    bound = 1 / math.sqrt(64)  # √(6 / ((1 + 5) · fan in))
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not layer.lora_B.any()


def test_dropout_off_the_cpu_is_torchs_own(monkeypatch):
    """With the layer's rate, in training alone."""
    seen = []
    monkeypatch.setattr(torch, "native_dropout", lambda *args: (seen.append(args), [args[0]])[1])
    dropout, x = mulcot.Dropout(0.3), torch.empty(2, 3, device="meta")
    dropout(x)
    dropout.eval()(x)
    assert [args[1:] for args in seen] == [(0.3, True)]


def test_the_readouts_layers():
    """paper, arXiv 2606.05713: Linear D -> 256, LayerNorm, ReLU, Dropout 0.2, Linear 256 -> 1."""
    layers = mulcot.Readout(8, dict(target="score")).layers
    assert [type(layer) for layer in layers] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout,
                                                 nn.Linear]
    assert (layers[0].out_features, layers[3].p, layers[4].out_features) == (256, 0.2, 1)


def test_adamws_constants(tmp_path):
    """torch's defaults."""
    args = SimpleNamespace(out=str(tmp_path), lr=0.1, stage="student", device="cpu")
    optimizer = train.TrainingState(args, nn.Linear(2, 2)).optimizer
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)


def test_a_readouts_dev_metrics(monkeypatch):
    """The mean distance with 6 for an answer without a number, and Pearson's r of the others; 0
    where one side is constant or nothing has a number."""
    posts = [mulcot.Post(str(n), "t", score=score) for n, score in enumerate((1.0, 2.0, -1.0, 0.5))]
    stage = train.ReadoutStage(SimpleNamespace(target="score", batch=4), None)
    r_of_three = np.corrcoef([0, -2, 0.5], [1, -1, 0.5])[0, 1]
    for said, distance, r in (
            ((0.0, None, -2.0, 0.5), (1 + 6 + 1 + 0) / 4, r_of_three),
            ((1.0, 1.0, 1.0, 1.0), (0 + 1 + 2 + 0.5) / 4, 0.0), ((None,) * 4, 6.0, 0.0)):
        monkeypatch.setattr(train, "read_out", lambda *_: [dict(score=score) for score in said])
        want = dict(neg_mae=pytest.approx(-distance), corr=pytest.approx(r))
        assert stage.metrics(None, posts) == want
