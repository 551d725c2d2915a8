"""Masks and colours of packed rows on Qwen2.5-VL. That one pass equals separate passes stands
in test_families.py, for every family; what is never generated in test_by_hand.py."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import chain, noise_image

import train
from mulcot import (
    LABEL_FORMAT, LABELS, REASON_FORMAT, InputError, Post, collate, encode, encode_batch,
    forward_branches, label_branches, load_model, render_label, score_labels)
from toy import IM_END

COT = chain("neutral")


@pytest.fixture(scope="module")
def examples(tmp_path_factory, student):
    """Both tasks of posts with wide, square, tall, small and no image, with and without an
    aspect."""
    folder, examples = tmp_path_factory.mktemp("mixed"), []
    for i, size in enumerate([(150, 40), (56, 56), (30, 120), (9, 9), None]):
        image = size and noise_image(folder / f"{i}.png", size, i)
        post = Post(f"m{i}", "so many words " * (1 + 3 * i), image, "Rex" if i % 2 else None)
        tasks = [(REASON_FORMAT, COT), (LABEL_FORMAT, render_label(LABELS[i % 3]))]
        examples.append(encode(post, tasks, student[1]))
    return examples


def test_eager_attention_equals_sdpa(toy, student, examples):
    """The additive mask means the same to both attention functions."""
    eager, processor = load_model(toy / "student")
    eager.set_attn_implementation("eager")
    assert eager.model.language_model.config._attn_implementation == "eager"
    batch = collate(examples, processor.pad_id)
    with torch.no_grad():
        a, b = (forward_branches(model, batch) for model in (eager, student[0]))
    real = batch.branch_ids >= 0
    assert (a[real] - b[real]).abs().max() < 1e-5


def test_label_scores_are_summed_in_fp32(student, posts):
    """Of a model in bf16 too, whose own logits, near 16 each 0.125, would move probabilities."""
    model, processor = student
    batch = encode_batch(posts[:2], label_branches(), model, processor)
    head = torch.nn.Linear(48, len(processor.tokenizer), bias=False, dtype=torch.bfloat16)
    hidden = 30 * torch.randn(*batch.targets.shape, 48, dtype=torch.bfloat16)
    logits = hidden.double() @ head.weight.double().T
    log_p = logits.log_softmax(-1).gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
    sums = [(log_p * batch.supervised(branch)).sum(1) for branch in (1, 2, 3)]
    got = score_labels(SimpleNamespace(lm_head=head), batch, hidden).double()
    torch.testing.assert_close(got, torch.stack(sums, 1).log_softmax(-1), rtol=0, atol=1e-3)


def test_flash_attention_is_refused(student, posts, monkeypatch):
    """It would ignore the branch mask without a word."""
    batch = encode_batch(posts[:1], label_branches(), *student)
    monkeypatch.setattr(student[0].config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(InputError, match="flash"):
        forward_branches(student[0], batch)


def test_show_tokens_colours_the_supervised_text(student, examples):
    """Green are the answers with their end token, branch by branch, and nothing else."""
    processor = student[1]
    batch = collate(examples, processor.pad_id)
    for row in range(len(examples)):
        shown = train.show_tokens(batch, processor.tokenizer, row)
        parts = re.split(r"\n\x1b\[0m---- (prefix|branch \d) ----\n", shown)
        green = {name: "".join(re.findall(r"\x1b\[32m([^\x1b]*)", text))
                 for name, text in zip(parts[1::2], parts[2::2])}
        assert green == {"prefix": "", "branch 1": COT + IM_END,
                         "branch 2": render_label(LABELS[row % 3]) + IM_END}
