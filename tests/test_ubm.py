"""The small model: what it reads, what it is saved as, uncertainty, adversarial steps, rows. Its
training by numbers stands in test_ubm_steps.py."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AlbertConfig, AlbertModel, ModernBertConfig, ModernBertModel, ViTConfig, ViTModel)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import generate
import mulcot
import train


# ---- what it reads


@pytest.mark.parametrize("tweet, clean", [
    ("RT @ Ginger Zee : Florida : warning https://t.co/x1", "Florida : warning"),
    ("RT @bob: so good", "so good"),
    ("thanks @ann and @ kim_2 !", "thanks @ user and @ user !"),
    ("# NewYorkCity #tbt", "# New York City # tbt"),
    ("RT is short for retweet", "RT is short for retweet"),
    ("a  b\n c", "a b c")])
def test_cleaning(tweet, clean):
    assert mulcot.clean_tweet(tweet) == clean


@pytest.mark.parametrize("text, aspect, marked", [
    ("Kanye loves Kanye", "Kanye", "* Kanye * loves Kanye"),
    ("KardashianReact on Kardashian", "Kardashian", "KardashianReact on * Kardashian *"),
    ("so # BigDay !", "# BigDay", "so * # Big Day * !"),
    ("what (a|b)* is", "(a|b)*", "what * (a|b)* * is"),
    ("no such word", "Rex", "no such word"), ("none", None, "none")])
def test_the_aspect_is_marked_in_place(text, aspect, marked):
    got, named, (start, end) = mulcot.mark_aspect(mulcot.Post("1", text, aspect=aspect))
    assert got == marked
    assert got[start:end] == (named if "* " in marked else got)


@pytest.fixture(scope="module")
def vit(encoders):
    """A random tiny ViT beside the BERT and the ResNet."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=32,
                       num_attention_heads=2, image_size=32)
    ViTModel(config).save_pretrained(encoders / "vit")
    ViTImageProcessorPil(size=dict(height=32, width=32)).save_pretrained(encoders / "vit")


@pytest.fixture
def encoder(encoders):
    return str(encoders / "text")


@pytest.fixture
def three(tmp_path):
    Image.new("RGB", (30, 50), "red").save(tmp_path / "a.png")
    return [mulcot.Post("1", "Rex is dull but Mia shines", aspect="Rex", label="negative"),
            mulcot.Post("2", "Rex is dull but Mia shines", aspect="Mia", label="positive"),
            mulcot.Post("3", "[SEP] such a day [CLS]", label="neutral",
                        image=str(tmp_path / "a.png"))]


@pytest.mark.parametrize("most, pieces", [(int(1e30), 256), (300, 256), (100, 100)])
def test_long_posts_are_cut(encoder, most, pieces):
    """At 256 pieces, or at what the encoder has positions for."""
    model = mulcot.new_ubm(encoder)
    model.tokenizer.model_max_length = most
    tokens, *_ = model.inputs([mulcot.Post("1", "dull " * 400)])
    assert tokens["input_ids"].shape == (1, pieces)


def test_the_head_reads_the_aspect(encoder, three):
    """Same words, other aspect: the head's second part is the mean over that aspect's pieces."""
    model = mulcot.new_ubm(encoder).eval()
    seen = []
    member = model.members[0]
    member.head.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        model(model.inputs(three))
        ids = model.tokenizer("* Rex * is dull but Mia shines", "Rex", return_tensors="pt")
        hidden = member.text(**ids).last_hidden_state[0]
    pieces = model.tokenizer.convert_ids_to_tokens(ids.input_ids[0])
    stars = [n for n, piece in enumerate(pieces) if piece == "*"]
    assert torch.allclose(seen[0][0, :64], hidden[0], atol=1e-5)
    assert torch.allclose(seen[0][0, 64:], hidden[stars[0] + 1 : stars[1]].mean(0), atol=1e-5)


def test_batches_do_not_matter_and_tweets_hold_no_control_tokens(encoder, encoders, three):
    """One by one equals together, with and without images; `[SEP]` in a tweet is plain text."""
    model = mulcot.new_ubm(encoder, image=str(encoders / "image"))
    together = model.probs(three)
    assert torch.allclose(together, torch.cat([model.probs([p]) for p in three]), atol=1e-5)
    three[2].image = None
    assert not torch.allclose(together[2], model.probs(three)[2], atol=1e-4)
    ids = model.tokenizer(mulcot.mark_aspect(three[2])[0], split_special_tokens=True).input_ids
    assert ids.count(model.tokenizer.sep_token_id) == 1


def test_members_answer_together(encoder, three):
    """The mean of the members' probabilities, then the temperature."""
    model = mulcot.new_ubm(encoder, members=3).eval()
    with torch.no_grad():
        each = torch.stack([m(m.inputs(three)).softmax(-1) for m in model.members])
        assert torch.allclose(model(model.inputs(three)).exp(), each.mean(0), atol=1e-6)
    assert (each[0] - each[1]).abs().max() > 1e-3
    assert torch.allclose(model.probs(three), each.mean(0), atol=1e-6)
    model.temperature = 2.0
    root = each.mean(0).sqrt()
    assert torch.allclose(model.probs(three), root / root.sum(1, keepdim=True), atol=1e-6)


# ---- files


@pytest.mark.parametrize("image", [None, "vit", "image"])
def test_saved_and_loaded(encoder, encoders, vit, three, image, tmp_path):
    """The folder holds all it needs; the loaded model says the same."""
    image = image and str(encoders / image)
    model = mulcot.new_ubm(encoder, mulcot.SCORE_BINS, image, members=2)
    model.temperature = 1.7
    train.save_ubm(model, tmp_path / "ubm")
    again = generate.load_ubm(tmp_path / "ubm")
    assert again.classes == mulcot.SCORE_BINS and again.target == "score" and not again.training
    assert torch.equal(again.probs(three), model.probs(three))


def test_the_top_layer_is_drawn_anew(encoder):
    """It alone changes, to BERT's own way of drawing; layers that are shared stay."""
    text = mulcot.new_ubm(encoder).members[0].text
    for p in text.parameters():
        torch.nn.init.constant_(p, 3.0)
    train.reinit_top_layer(text)
    for name, p in text.named_parameters():
        assert (p == 3).any() != name.startswith("encoder.layer.1."), name
    top = text.encoder.layer[1]
    assert top.intermediate.dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not top.intermediate.dense.bias.any() and (top.output.LayerNorm.weight == 1).all()
    shape = dict(vocab_size=20, hidden_size=8, num_attention_heads=1, intermediate_size=8)
    shared = AlbertModel(AlbertConfig(num_hidden_layers=3, **shape))
    before = [p.clone() for p in shared.parameters()]
    train.reinit_top_layer(shared)
    assert all(torch.equal(p, old) for p, old in zip(shared.parameters(), before))
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id",
                         "sep_token_id"), 1)
    bare = ModernBertModel(ModernBertConfig(num_hidden_layers=2, **shape, **ids))
    train.reinit_top_layer(bare)  # its linears have no biases


def test_bad_folders(tmp_path, encoders, monkeypatch):
    """Each tells what to do; so does an encoder whose tokenizer cannot say where words stand."""
    with pytest.raises(mulcot.InputError, match="ubm.json is missing or damaged"):
        generate.load_ubm(tmp_path)
    with pytest.raises(mulcot.InputError, match="cannot be loaded"):
        mulcot.new_ubm(str(tmp_path / "nothing"))
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: slow)
    with pytest.raises(mulcot.InputError, match="slow tokenizer"):
        mulcot.new_ubm(str(encoders / "text"))


# ---- uncertainty and targets


def test_uncertainty_by_hand():
    probs = torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]])
    expected = torch.tensor([0, 1, math.log(2) / math.log(3)])
    assert torch.allclose(mulcot.uncertainty(probs), expected, atol=1e-6)


def test_score_targets_have_the_score_as_expectation():
    posts = [mulcot.Post("1", "x", score=s) for s in (1.4, -3, 0, 2.75, 9.0)]
    targets = train.class_targets(posts, mulcot.SCORE_BINS)
    assert torch.allclose(targets.sum(1), torch.ones(5))
    mean = targets @ torch.tensor(mulcot.SCORE_BINS, dtype=torch.float)
    assert torch.allclose(mean, torch.tensor([1.4, -3, 0, 2.75, 3.0]))


# ---- training and rows


def test_adversarial_steps(toy, encoders, tmp_path, monkeypatch):
    """Each batch is seen twice: the second time with each post's word embeddings moved by
    --adv-epsilon along the gradient of the first. BatchNorm's means are no parameters: the kept
    average has those that training left."""
    seen, forward = [], mulcot.UBMMember.forward

    def watched(self, inputs):
        def keep(module, ids, words):
            seen.append(dict(words=words.detach().clone()))
            words.register_hook(lambda g, at=seen[-1]: at.update(gradient=g.clone()))

        if not self.training:
            return forward(self, inputs)
        hook = self.text.get_input_embeddings().register_forward_hook(keep)
        logits = forward(self, inputs)
        hook.remove()
        return logits

    monkeypatch.setattr(mulcot.UBMMember, "forward", watched)
    data = str(toy / "posts.jsonl")
    assert train.main(["ubm", "--data", data, "--dev", data, "--text-encoder", f"{encoders}/text",
                       "--image-encoder", f"{encoders}/image", "--out", f"{tmp_path}/ubm",
                       "--members", "2", "--epochs", "1", "--batch", "4", "--lr", "0.001",
                       "--adv-epsilon", "0.5"]) == 0
    assert len(seen) == 2 * 3 * 2  # two members, twelve posts in fours
    for plain, moved in zip(seen[::2], seen[1::2]):
        for b in range(4):
            uphill = plain["gradient"][b] / plain["gradient"][b].norm()
            step = moved["words"][b] - plain["words"][b]
            assert torch.allclose(step, 0.5 * uphill, atol=1e-5) and step.norm() > 0.49
    kept = generate.load_ubm(tmp_path / "ubm").members[0].image.embedder.embedder.normalization
    assert kept.num_batches_tracked > 0 and kept.running_mean.any()


def test_rows_of_a_ubm(toy, encoder, tmp_path, capsys):
    """predict writes rows with the likeliest label, and prints that of a single post."""
    out, predictions = str(tmp_path / "ubm"), tmp_path / "rows.jsonl"
    train.save_ubm(mulcot.new_ubm(encoder), out)
    assert generate.main(["predict", "--model", out, "--data", str(toy / "posts.jsonl"), "--split",
                          "dev", "--out", str(predictions)]) == 0
    rows = mulcot.read_rows(predictions)
    assert len(rows) == 6
    for row in rows:
        assert row["source"] == "ubm" and 0 <= row["uncertainty"] <= 1
        assert row["prediction"] == mulcot.LABELS[row["probs"].index(max(row["probs"]))]
    post = ["--text", "lovely Rex", "--aspect", "Rex"]
    assert generate.main(["predict", "--model", out, *post]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prediction"] in mulcot.LABELS
