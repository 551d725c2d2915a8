"""Numbers that can be worked out on paper: what a readout says, what sampling draws, which
thresholds a cascade takes."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

import mulcot
from mulcot import LABEL_FORMAT, LABELS, Readout, encode_batch, generate_text, read_out


@pytest.fixture
def tiny(toy):
    """(a tiny student of one's own, its Processor)."""
    return mulcot.load_model(toy / "student")


# ---- the readout


@pytest.mark.parametrize("z, score", [(0.4, 1.46), (-0.5, -0.25), (2.0, 3.0), (-2.0, -3.0)])
def test_a_score_is_mean_plus_z_deviations(tiny, posts, z, score):
    """A head that says z of every post, whose training scores had mean 0.7 and deviation 1.9: the
    score is 0.7 + 1.9 z, within [-3, 3]."""
    model, processor = tiny
    head = Readout(model.lm_head.in_features, dict(target="score", mean=0.7, deviation=1.9))
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.constant_(head.layers[-1].bias, z)
    model.readout = head.eval()
    scores = [row["score"] for row in read_out(model, processor, posts[:2])]
    assert scores == pytest.approx([score] * 2, abs=1e-6)


def test_a_label_is_the_likeliest(tiny, posts):
    """Logits 0, log 2, log 5 are probabilities 1/8, 2/8, 5/8."""
    model, processor = tiny
    head = Readout(model.lm_head.in_features, dict(target="label"))
    nn.init.zeros_(head.layers[-1].weight)
    head.layers[-1].bias.data = torch.tensor([0.0, math.log(2), math.log(5)])
    model.readout = head.eval()
    (row,) = read_out(model, processor, posts[:1])
    assert row["prediction"] == LABELS[2]
    assert row["probs"] == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=1e-6)


# ---- sampling


def letters(tiny, temperature, rows=16, tokens=60):
    """{letter: share} of texts written at this temperature by a model whose logits are 2, 1 and 0
    for "a", "b" and "c", and 9 for an image's placeholder."""
    model, processor = tiny
    ids = [*processor.tokenizer.convert_tokens_to_ids(["a", "b", "c"]), processor.placeholder_id]
    said = torch.full((model.lm_head.out_features,), -torch.inf)
    said[ids] = torch.tensor([2.0, 1.0, 0.0, 9.0])
    model.lm_head.register_forward_hook(lambda layer, args, logits: said.expand_as(logits))
    posts = [mulcot.Post("1", "so it goes")] * rows
    batch = encode_batch(posts, [(LABEL_FORMAT, None)], model, processor)
    answers = generate_text(model, processor, batch, tokens, temperature)
    assert [finish for _, finish in answers] == ["length"] * rows
    drawn = Counter("".join(text for text, _ in answers))
    assert drawn.total() == rows * tokens
    return {letter: n / drawn.total() for letter, n in drawn.items()}


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampling_follows_the_softened_distribution(tiny, temperature):
    """Each token's share is softmax(logits / temperature), within four standard errors; tokens that
    no answer may hold never come out, however likely."""
    shares = letters(tiny, temperature)
    want = (torch.tensor([2.0, 1.0, 0.0]) / temperature).softmax(0).tolist()
    for letter, p in zip("abc", want):
        assert shares[letter] == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 960))
