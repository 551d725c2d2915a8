"""What generate.py asks a model for, and what it makes of the answers: temperatures, budgets,
seeds, seconds; the assistant's hidden states; a cut answer."""

from types import SimpleNamespace

import pytest
import torch
from conftest import chain
from safetensors.torch import load_file

import generate
import mulcot

CLOCK = SimpleNamespace(now=0.0)


@pytest.fixture
def answers(toy, tmp_path, monkeypatch):
    """answers(planned, stage, *flags): runs a stage on three posts in one batch, where `planned`
    has a list of (text, finish) for each time that texts are generated, in the posts' order; each
    time takes six seconds. Returns what was asked for, the rows and those set aside."""
    rows = [dict(id=name, text=name, label="positive", cot=chain("positive"))
            for name in ("a", "bb", "ccc")]
    mulcot.write_rows(tmp_path / "posts.jsonl", rows)

    def start(planned, stage, *flags):
        asked = []

        def generate_text(model, processor, batch, max_new_tokens, temperature=0.0):
            CLOCK.now += 6.0
            asked.append(dict(tokens=max_new_tokens, temperature=temperature,
                              seed=torch.initial_seed(), posts=len(batch.input_ids)))
            return planned[len(asked) - 1]

        monkeypatch.setattr(generate, "generate_text", generate_text)
        monkeypatch.setattr(generate, "time", SimpleNamespace(time=lambda: CLOCK.now))
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        assert generate.main([stage, "--data", f"{tmp_path}/posts.jsonl", "--model",
                              f"{toy}/student", "--out", str(out), "--device", "cpu",
                              *flags]) == 0
        return asked, mulcot.read_rows(out), mulcot.read_rows(mulcot.sibling(out, "rejects.jsonl"))

    return start


RIGHT, WRONG, CUT = (chain("positive"), "stop"), (chain("negative"), "stop"), ("So", "length")
UNFINISHED = ('"Text_analysis": "So it is."', "stop")


def test_augment_samples_once_and_keeps_what_is_right(answers):
    """paper: one chain a post; D_a are those whose label is right. Sampled, at the temperature and
    length that are asked for; a post's seconds are its share of the batch's."""
    asked, kept, aside = answers([[RIGHT, WRONG, CUT]], "augment", "--max-new-tokens", "99")
    assert [(each["tokens"], each["temperature"]) for each in asked] == [(99, 0.7)]
    assert [(row["id"], row["source"], row["cot"]) for row in kept] == [
        ("a", "assistant", chain("positive"))]
    assert {row["id"]: row["problem"] for row in aside} == {
        "bb": "predicts negative, label is positive", "ccc": "truncated"}
    assert [row["seconds"] for row in kept + aside] == [2.0] * 3


def test_augment_draws_each_batch_and_each_seed_anew(answers):
    """Else posts that are alike would get the same chain."""
    seeds = []
    for seed in ("1", "2"):
        planned = [[RIGHT]] * 3
        asked, _, _ = answers(planned, "augment", "--batch", "1", "--seed", seed)
        seeds += [each["seed"] for each in asked]
    assert len(set(seeds)) == 6


def test_a_local_teacher_retries_with_more_heat_and_room(answers):
    """Stage 1 takes a right chain at once; an incomplete one is asked again at 0.4 and 0.8 (choice)
    and a cut one with twice the room, of which the batch gets the largest; stage 2 explains the
    rest. No stage asks oftener than --max-tries. Tokens of all tries are added up."""
    planned = [[RIGHT, UNFINISHED, CUT], [UNFINISHED, CUT], [WRONG, CUT], [RIGHT, WRONG], [WRONG],
               [WRONG]]
    asked, kept, aside = answers(planned, "teacher", "--max-new-tokens", "50")
    assert [each["posts"] for each in asked] == [3, 2, 2, 2, 1, 1]
    assert [each["temperature"] for each in asked] == pytest.approx([0, 0.4, 0.8, 0, 0.4, 0.8])
    assert [each["tokens"] for each in asked] == [50, 100, 200, 50, 50, 50]
    assert {row["id"]: (row["stage"], row["tries"]) for row in kept} == {"a": (1, 1), "bb": (2, 4)}
    assert [(row["id"], row["tries"]) for row in aside] == [("ccc", 6)]
    for row in aside:
        for name in ("tokens_in", "tokens_out"):
            assert row[name] == sum(each[name] for each in row["attempts"]) > 0


def test_soft_labels_are_taken_without_dropout(toy, posts, tmp_path):
    """Of an assistant whose LoRA was trained with dropout: its states are those of eval mode, the
    same each time."""
    model, _ = mulcot.load_model(toy / "assistant")
    mulcot.add_lora(model, 4, 8, dropout=0.5)
    for layer in mulcot.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    mulcot.save_adapter(model, tmp_path / "adapter")
    rows = [post.row() | dict(cot=chain(post.label)) for post in posts[:3]]
    mulcot.write_rows(tmp_path / "chains.jsonl", rows)
    entries = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        out = tmp_path / f"soft-{seed}"
        assert generate.main([
            "soft", "--data", f"{tmp_path}/chains.jsonl", "--images", f"{toy}/images", "--model",
            f"{tmp_path}/adapter", "--out", str(out), "--device", "cpu"]) == 0
        (part,) = out.glob("part-*.safetensors")
        entries.append(load_file(part))
    assert len(entries[0]) == 6
    assert all(torch.equal(entries[0][name], entries[1][name]) for name in entries[0])


def test_a_cut_chain_is_called_truncated(student, posts):
    """It may parse well and lack its end."""
    assert mulcot.predict(*student, posts[0], max_new_tokens=3)["problem"] == "truncated"
