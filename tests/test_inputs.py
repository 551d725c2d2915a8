"""Frames and audio: files to features, positions and states as the models' own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image, tone
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import mulcot
import train
from mulcot import (LABEL_FORMAT, SCORE_FORMAT, InputError, Post, build_messages, collate, encode,
                    encode_batch, forward_branches, load_model, load_trained, read_posts,
                    without_inputs, write_rows)
from toy import tiny_model, tiny_tokenizer, write_wav


@pytest.fixture(scope="module")
def omni(toy, posts, tmp_path_factory):
    """(random tiny Thinker of Qwen2.5-Omni, its Processor, its folder)."""
    folder = tmp_path_factory.mktemp("omni")
    texts = [mulcot.post_prompt(p) + SCORE_FORMAT for p in posts]
    tiny_model(folder, "omni", tiny_tokenizer(texts, 500, omni=True), seed=1)
    return *load_model(folder), folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Posts with every mix of image, frames and audio, of unequal sizes and lengths."""
    folder = tmp_path_factory.mktemp("clips")
    for i, size in enumerate([(56, 56), (150, 40), (30, 120)]):
        noise_image(folder / f"{i}.png", size, i)
    for i, seconds in enumerate((0.06, 0.5, 2.341)):
        write_wav(folder / f"{i}.wav", tone(200 + 100 * i, seconds))
    inputs = [dict(text="words alone"), dict(text="one image", image="0.png"),
              dict(text="frames", frames=["1.png", "2.png"]),
              dict(text="short sound", audio="0.wav"),
              dict(text="all of it", image="0.png", frames=["2.png", "1.png", "0.png"],
                   audio="1.wav"),
              dict(text="long sound " * 5, frames=["1.png"], audio="2.wav")]
    write_rows(folder / "clips.jsonl", [dict(each, id=str(n)) for n, each in enumerate(inputs)])
    return read_posts(folder / "clips.jsonl")


def states(model, processor, posts, grad=False):
    """(examples, Batch, hidden states) of both branches of all posts at once."""
    branches = [(SCORE_FORMAT, "1.4"), (LABEL_FORMAT, None)]
    examples = [encode(post, branches, processor) for post in posts]
    batch = collate(examples, processor.pad_id)
    with torch.set_grad_enabled(grad):
        return examples, batch, forward_branches(model, batch)


def own_inputs(e, k):
    """What the model's own forward takes for one post and its branch k."""
    ids = torch.tensor([e.prefix + e.branches[k - 1][0]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    inputs |= {key: value for key, value in e.media.items() if key != "audio"}
    if "audio" in e.media:
        inputs |= dict(input_features=e.media["audio"].T[None],
                       feature_attention_mask=torch.ones(1, len(e.media["audio"])).long())
    return inputs


# ---- the Thinker

def test_hidden_states_equal_the_models_own_forward(omni, clips):
    """One padded batch of unequal modalities against a pass for each post and branch; positions
    are those of get_rope_index, images and audio mixed, and audio alone."""
    model, processor, _ = omni
    examples, batch, hidden = states(model, processor, clips)
    for row, e in enumerate(examples):
        length = torch.tensor([len(e.media["audio"])]) if "audio" in e.media else None
        for k in (1, 2):
            inputs, at = own_inputs(e, k), batch.attended(k)[row]
            with torch.no_grad():
                want = model.model(**inputs).last_hidden_state[0]
            assert (hidden[row, at] - want).abs().max() < 2e-5
            ids, grids = inputs["input_ids"], inputs.get("image_grid_thw")
            want, _ = model.get_rope_index(ids, grids, None, inputs["attention_mask"],
                                           audio_seqlens=length)
            assert torch.equal(batch.position_ids[:, row, at], want[:, 0])


def test_ids_equal_the_chat_template(omni, clips):
    """Frames before audio before text, each placeholder widened to what the tower gives."""
    model, processor, _ = omni
    for post in clips:
        e = encode(post, [(LABEL_FORMAT, None)], processor)
        ids = processor.tokenizer.apply_chat_template(
            build_messages(post, "label"), add_generation_prompt=True, tokenize=True,
            return_dict=False)
        grids, got = iter(e.media.get("image_grid_thw", [])), []
        for t in ids:
            n = 1
            if t == model.config.image_token_id:
                n = int(next(grids).prod()) // 4
            elif t == model.config.audio_token_id:
                length = torch.tensor(len(e.media["audio"]))
                n = int(model.model.audio_tower._get_feat_extract_output_lengths(length)[1])
            got += [t] * n
        assert e.prefix + e.branches[0][0] == got


def test_greedy_text_does_not_depend_on_the_batch(omni, clips):
    """Padding and neighbours, heard or not, change no word."""
    model, processor, _ = omni
    together, *alone = (
        mulcot.generate_text(model, processor, encode_batch(
            posts, [(SCORE_FORMAT, None)], model, processor), 6)
        for posts in (clips, *([post] for post in clips)))
    assert together == sum(alone, []) and len(set(together)) > 1


@pytest.fixture
def released(omni, tmp_path):
    """The Thinker's folder as a whole Omni is released: keys thinker.model.layers…,
    thinker.visual…, a talker."""
    folder, tensors = omni[2], {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        tensors["thinker." + old.replace("model.audio_tower.", "audio_tower.")] = tensor.clone()
    assert any(k.startswith("thinker.model.layers.0.") for k in tensors)
    tensors["talker.model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    mulcot.write_json(tmp_path / "config.json", dict(
        model_type="qwen2_5_omni", architectures=["Qwen2_5OmniModel"],
        thinker_config=mulcot.read_json(folder / "config.json")))
    return tmp_path


def test_a_whole_omni_loads_as_its_thinker(omni, clips, released):
    """The talker is left out. In 4 bits the Thinker's language linears alone are quantised; image,
    frames and audio go in as ever."""
    model, processor, folder = omni
    dense = states(model, processor, clips)[2]
    assert torch.equal(states(load_model(released)[0], processor, clips)[2], dense)
    packed, twin = load_trained(released, nf4=True)[0], load_model(folder)[0]
    names = [n for n, m in packed.named_modules() if isinstance(m, mulcot.NF4Linear)]
    assert len(names) == 14 and all("language_model" in n for n in names)
    for name in names:
        twin.get_submodule(name).weight.data = packed.get_submodule(name).weight(torch.float32)
    hidden = states(packed, processor, clips)[2]
    assert torch.equal(hidden, states(twin, processor, clips)[2])
    assert (hidden - dense).abs().max() > 0.01


def test_gradient_reaches_all_towers(omni, clips):
    """LoRA with scope all adapts language, vision and audio; language leaves the towers alone."""
    model, processor = load_model(omni[2])
    names = mulcot.add_lora(model, 2, 4, 0.0, scope="all")
    towers = {t: [n for n in names if f".{t}." in n]
              for t in ("language_model", "visual", "audio_tower")}
    assert [len(x) for x in towers.values()] == [14, 2 * 3, 2 * 3]
    states(model, processor, clips, grad=True)[2].sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if n.endswith("lora_B")}
    assert all(g.abs().sum() > 0 for g in grads.values()) and len(grads) == len(names)


def test_a_model_that_hears_nothing_says_so(student, clips):
    """Qwen2.5-VL takes several frames; audio is refused, with the way out."""
    with pytest.raises(InputError, match="without audio"):
        encode(clips[4], [("Say.", None)], student[1])
    assert encode(without_inputs(clips[4], ["audio"]), [("Say.", None)], student[1])


def test_soft_labels_know_the_audio(omni, clips):
    """Another voice is another entry."""
    a, b = (encode(Post("1", "x", audio=clips[n].audio), [("Say.", "a")], omni[1]) for n in (3, 4))
    b.prefix = a.prefix
    assert mulcot.SoftLabels.names(a)[0] != mulcot.SoftLabels.names(b)[0]


# ---- audio files

@pytest.mark.parametrize("seconds", [0.06, 0.5, 1.2345, 7.0])
def test_features_equal_the_feature_extractors(omni, tmp_path, seconds):
    """As the model's own processor calls it: padded to its full length, cut by its mask."""
    noise = np.random.default_rng(0).normal(size=round(16e3 * seconds))
    samples = tone(313, seconds) + 0.01 * noise
    path = write_wav(tmp_path / "a.wav", samples)
    own = omni[1].extractor(mulcot.load_audio(path).numpy(), sampling_rate=16_000,
                            padding="max_length", return_attention_mask=True, return_tensors="pt")
    want = own["input_features"][0][:, own["attention_mask"][0].bool()].T
    got = omni[1].audio(path)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5


def test_stereo_and_silence(omni, tmp_path):
    """Left and right weigh the same; all zeros give finite features and a finite state."""
    left, right = tone(200, 0.2), tone(900, 0.2)
    both = np.stack([left, right], 1).reshape(-1)
    got = mulcot.load_audio(write_wav(tmp_path / "s.wav", both, channels=2)).numpy()
    assert np.abs(got - (left + right) / 2).max() < 1e-4
    model, processor, _ = omni
    path = write_wav(tmp_path / "z.wav", np.zeros(8_000))
    _, batch, hidden = states(model, processor, [Post("1", "x", audio=path)])
    heard = batch.media["input_features"]
    assert torch.isfinite(heard).all() and heard.std() == 0 and torch.isfinite(hidden).all()


def test_which_frames_are_taken(tmp_path):
    """Sixteen of a thousand, evenly spaced, neither end preferred; a short clip keeps all. 2 stands
    before 10, as ffmpeg's %d.jpg has it. Rows read back as the same post."""
    for clip, names in (("short", ["10", "2", "f10", "f2"]), ("long", range(1000))):
        (tmp_path / clip).mkdir()
        (tmp_path / clip / "notes.txt").write_text("no frame")
        for name in names:
            Image.new("RGB", (28, 28)).save(tmp_path / clip / f"{name}.png")
    rows = [dict(id=clip, text="x", frames=clip) for clip in ("short", "long")]
    write_rows(tmp_path / "posts.jsonl", rows)
    short, long = posts = read_posts(tmp_path / "posts.jsonl")
    assert [Path(file).stem for file in short.frames] == ["2", "10", "f2", "f10"]
    numbers = [int(Path(file).stem) for file in long.frames]
    assert len(numbers) == 16 and set(np.diff(numbers)) <= {62, 63}
    assert abs(numbers[0] - (999 - numbers[-1])) <= 1
    write_rows(tmp_path / "again.jsonl", [post.row() for post in posts])
    assert read_posts(tmp_path / "again.jsonl") == posts


def test_controls_of_clips(clips):
    """One takes the words alone. The other deals out frames too, not only single images; words and
    voices stay."""
    predict = ["predict", "--data", "x", "--model", "y", "--out", "z"]
    posts = [replace(post, aspect="Rex") for post in clips]
    generate.break_modality(posts, generate.parse_args([*predict, "--blank-text"]))
    assert posts == [replace(post, text="", aspect="Rex") for post in clips]
    posts = [replace(post) for post in clips]
    args = generate.parse_args([*predict, "--shuffle-images"])
    dealt = [post.images for post in generate.break_modality(posts, args)]
    assert sorted(dealt) == sorted(post.images for post in clips)
    assert dealt != [post.images for post in clips]
    assert [(p.text, p.audio) for p in posts] == [(p.text, p.audio) for p in clips]


def test_label_file(tmp_path):
    """MMSA's label.csv: official splits, ids, frames and audio where they exist."""
    (tmp_path / "frames/v1/2").mkdir(parents=True), (tmp_path / "audio/v1").mkdir(parents=True)
    Image.new("RGB", (28, 28)).save(tmp_path / "frames/v1/2/0001.jpg")
    write_wav(tmp_path / "audio/v1/2.wav", tone(300, 0.2))
    (tmp_path / "label.csv").write_text(
        "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode\n"
        'v1,2,"HE SAID, ""GOOD""",1.6,,,,Positive,train\n\nv1,3,FINE,-0.2,,,,Negative,'
        'valid\n-x$y,10,BAD,-3.0,,,,Negative,test\nv2,1,ODD,much,,,,,test\nv2,2,FAR,3.4,,,,,test\n'
        "v2,3,SHORT,1.0\nv2,4,SIMS,0.8,0.6,0.4,1.0,,test\n")
    rejects = []
    a, b, c = read_posts(tmp_path / "label.csv", rejects=rejects)
    assert (a.id, a.text, a.score, a.split) == ("v1$_$2", 'HE SAID, "GOOD"', 1.6, "train")
    assert (len(a.frames), a.audio[-8:]) == (1, "v1/2.wav")
    assert (b.split, b.frames, b.audio) == ("dev", [], None)
    assert (c.id, c.split, c.score) == ("-x$y$_$10", "test", -3.0)
    assert [reason.split(":")[0] for _, reason in rejects] == [
        "not a row", "score must be a number in [-3, 3], got 3.4", "expected 9 cells, got 4",
        "a row of CH-SIMS, whose scores lie in [-1, 1], not [-3, 3]"]
    assert "multiply its column label by 3" in rejects[-1][1]


def test_readout_of_clips_from_file_to_rows(omni, clips, tmp_path):
    """Rows that lack a modality train and are read beside others; what was left out in training is
    left out ever after."""
    folder = Path(clips[1].image).parent
    rows, data, scores = [], f"{folder}/posts.jsonl", {}
    for split in ("train", "dev", "test"):
        for i, post in enumerate(clips):
            rows.append(post.row() | dict(id=f"{split}{i}", split=split, score=i / 2 - 1))
    write_rows(data, rows)
    for name, more in (("all", []), ("deaf", ["--without", "audio"])):
        out = tmp_path / name
        assert train.main(["readout", "--data", data, "--dev", data, "--model", str(omni[2]),
                           "--out", str(out), "--epochs", "1", "--batch", "6",
                           "--accumulate", "1", *more]) == 0
        assert generate.main(["predict", "--data", data, "--split", "test", "--model",
                              f"{out}/best", "--out", f"{out}.jsonl"]) == 0
        scores[name] = {r["id"]: r["score"] for r in mulcot.read_rows(f"{out}.jsonl")}
        assert len(scores[name]) == 6
    model, processor = load_trained(tmp_path / "deaf/best")
    posts = [without_inputs(p, ["audio"]) for p in read_posts(data) if p.split == "test"]
    for post, row in zip(posts, mulcot.read_out(model, processor, posts)):
        assert scores["deaf"][post.id] == pytest.approx(row["score"], abs=2e-4)
