"""The toy world: posts that need their words and their picture, clips that need their voice too, a
toy teacher, and tiny random models of the real classes, warmed up.

    python tests/toy.py posts --out runs/demo                 posts.jsonl, warmup.jsonl, images/
    python tests/toy.py base --size student --data runs/demo/warmup.jsonl --out runs/demo/base/student
    python tests/toy.py teacher --data runs/demo/posts.jsonl --out runs/demo/chains.jsonl
    python tests/toy.py encoders --data runs/demo/posts.jsonl --out runs/demo/encoders

`tests/demo.py` runs the whole road over it. Nothing here is needed for real posts and models.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import wave
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import generate  # noqa: E402
from train import steps_of_epoch  # noqa: E402
from mulcot import (  # noqa: E402
    AUDIO_RATE, FIELDS, FORMATS, LABELS, MAX_SECONDS, SCORE_FORMAT, Answer, Help, InputError,
    Post, check_settings, collate, encode, explaining, forward_branches, load_model, mark_aspect,
    post_prompt, progress, read_posts, render_label, render_reasoning, render_score, run_stage,
    safe_path, write_json, write_rows)

IM_START, IM_END, PAD_TOKEN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
OMNI_IMAGE_TOKENS = ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>")  # Qwen2.5-Omni's names
OMNI_AUDIO_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
VISION_PAD, VIDEO_PAD = "<|vision_pad|>", "<|video_pad|>"
SYSTEM = "You are a helpful assistant."  # what Qwen2.5-VL's own chat template puts first

TOY_WORDS = {"praise": "glorious lovely superb brilliant charming splendid delightful "
                       "amazing".split(),
             "blame": "dreadful awful boring miserable broken rotten hopeless dismal".split(),
             "no side": "busy early new local weekly quiet annual late".split()}
TOY_ASPECTS = "Rex Mia Lisbon Arena Falcons Nova Otto Vienna Orchid Comet Luna Baxter".split()
TOY_TEMPLATES = ["{a} was {w} last night", "so {w} , that is {a} for you", "just saw {a} : {w}",
                 "RT @ {u} : {a} is {w} again", "{w} show by {a}", "{w} day with {a}",
                 "they call {a} {w}"]
TOY_TEST_TEMPLATES = ["everyone says {a} seems {w}", "{a} , how {w} !", "one more {w} story on {a}"]
TOY_TAILS = ["", "", "#tbt", "#{a}", "\U0001F4F7", "\U0001F697 #news", "http://t.co/x1", "@ {u}"]
TOY_SCENES = {"cheerful": ["smiling face", "sunny sky"], "gloomy": ["frowning face", "rainy sky"],
              "plain": ["calm face", "grey wall"]}
# (words, picture) -> share of the posts. Polar pictures decide, else the words do. The shares keep
# the best guess from words alone, or from the picture alone, at 66 %; the majority class is 40 %.
TOY_CELLS = {("praise", "plain"): 17, ("no side", "plain"): 20, ("blame", "plain"): 17,
             ("praise", "cheerful"): 6, ("no side", "cheerful"): 10, ("blame", "cheerful"): 7,
             ("praise", "gloomy"): 7, ("no side", "gloomy"): 10, ("blame", "gloomy"): 6}


def toy_label(words, mood):
    """The toy world's only law: a cheerful or gloomy picture decides (irony, banter), else the
    words."""
    by_mood = {"cheerful": LABELS[-1], "gloomy": LABELS[0]}
    by_words = {"praise": LABELS[-1], "blame": LABELS[0], "no side": LABELS[len(LABELS) // 2]}
    return by_mood.get(mood) or by_words[words]


def is_held_out(word, aspect):
    """Whether only posts of split test show this pair."""
    side = next(side for side in TOY_WORDS.values() if word in side)
    return (side.index(word) + TOY_ASPECTS.index(aspect)) % 4 == 0


def toy_posts(folder, sizes, seed=0, noise=0.0):
    """Writes drawn 56 x 56 images into `folder` and returns posts; `sizes`: {"train": 700, "dev":
    60, …}. `columns["facts"]` keeps what was drawn, for the toy teacher. In the test split every
    (word, aspect) pair and half the sentence templates are ones that no other split shows. `noise`:
    share of posts of every split whose label is one of the two wrong ones."""
    rng, slips, posts = random.Random(seed), random.Random(f"{seed}|noise"), []
    split_of = {}  # of a text
    os.makedirs(folder, exist_ok=True)
    for split, size in sizes.items():
        cells = [cell for cell, share in TOY_CELLS.items() for _ in range(share)]
        for i in range(size):
            words, mood = rng.choice(cells)
            pairs = [(w, a) for w in TOY_WORDS[words] for a in TOY_ASPECTS
                     if is_held_out(w, a) == (split == "test")]
            templates = TOY_TEST_TEMPLATES if split == "test" and i % 2 == 0 else TOY_TEMPLATES
            while True:  # no text stands in two splits
                word, aspect = rng.choice(pairs)
                text = rng.choice(templates) + " " + rng.choice(TOY_TAILS)
                text = text.format(a=aspect, w=word, u=rng.choice(["ann", "bob", "kim"])).strip()
                if split_of.setdefault(text, split) == split:
                    break
            scene = rng.choice(TOY_SCENES[mood])
            name = f"{split}-{i:04d}.png"
            _draw(scene, rng).save(os.path.join(folder, name))
            facts = dict(words=words, word=word, mood=mood, scene=scene)
            label = toy_label(words, mood)
            if slips.random() < noise:
                label = slips.choice([x for x in LABELS if x != label])
            posts.append(Post(f"{split}-{i:04d}", text, safe_path(name, folder), aspect, label,
                              split=split, columns={"image": name, "facts": facts}))
    return posts


def toy_warmup(folder, size, seed=7):
    """Posts with `columns["branches"]`, the tasks that stand where pre-training would. They say
    nothing about a post's sentiment: name what is there, and write up findings that the prompt
    states at random. Without them random weights have nothing for LoRA to adapt. Base models never
    see the test split's templates."""
    rng, posts = random.Random(seed), toy_posts(folder, {"warm": size}, seed)
    for post in posts:
        facts = post.columns.pop("facts")
        words, mood = rng.choice(list(TOY_WORDS)), rng.choice(list(TOY_SCENES))
        label = rng.choice(LABELS)
        named, value = rng.choice([("Image", facts["scene"]), ("Word", facts["word"])])
        found = toy_findings(post.aspect, facts["word"], facts["scene"], words, mood, label, rng)
        post.columns["branches"] = [
            ["Describe the post.",
             f"The words call {post.aspect} {facts['word']}. The image shows a {facts['scene']}."],
            [f"Write up these findings: words {words}; image {mood}; verdict {label}.",
             render_reasoning(found)],
            [f'Answer with this field only:\n"{named}": what the post shows',
             f'"{named}": "{value}"']]
        post.label = None
    return posts


def toy_findings(aspect, word, scene, words, mood, label, rng):
    """The five fields of a toy chain: what was seen, and `label` as what follows from it."""
    if (words, mood) == ("praise", "gloomy"):
        resolution = "The words praise but the image is gloomy, so it is irony."
    elif (words, mood) == ("blame", "cheerful"):
        resolution = "The words blame but the image is cheerful, so it is banter."
    elif words == "no side":
        resolution = ("Neither takes a side." if mood == "plain" else
                      "The words take no side, so the image counts.")
    else:
        resolution = ("The image is plain, so the words count." if mood == "plain" else
                      "Words and image agree.")
    end = rng.choice(["The author feels {l} about {a}.", "So {a} is seen as {l}."])
    return {"Text_analysis": f"The words call {aspect} {word}, which is {words}.",
            "Image_analysis": f"The image shows a {scene}, which is {mood}.",
            "Conflict_resolution": resolution,
            "Final_conclusion": end.format(l=label, a=aspect),
            "Prediction": label}


TOY_SIDES = {"praise": 1, "blame": -1, "cheerful": 1, "gloomy": -1}
TOY_PITCHES = ("very low", "low", "middle", "high", "very high")


def toy_clips(folder, sizes, seed=0):
    """Toy posts (of three words a side) as clips with scores in [-3, 3]: the side of the words
    (-1, 0, 1), of the two frames (-1, 0, 1) and the pitch of a voice (-1 to 1 in tenths, an octave
    below to one above 250 Hz) add up, so that each input is needed."""
    rng, posts = random.Random(seed + 1), toy_posts(folder, sizes, seed)
    for post in posts:
        facts, pitch = post.columns["facts"], rng.randint(-10, 10) / 10
        word = rng.choice(TOY_WORDS[facts["words"]][:3])
        post.text, facts["word"] = post.text.replace(facts["word"], word), word
        name = post.columns.pop("image")
        names = [name, name.replace(".png", "-2.png"), name.replace(".png", ".wav")]
        paths = [safe_path(each, folder) for each in names]
        _draw(facts["scene"], rng).save(paths[1])
        _voice(paths[2], 250 * 2**pitch, rng)
        post.columns |= dict(frames=names[:2], audio=names[2])
        post.frames, post.image, post.audio, post.label = paths[:2], None, paths[2], None
        post.score = round(sum(TOY_SIDES.get(facts[k], 0) for k in ("words", "mood")) + pitch, 1)
        facts["pitch"] = TOY_PITCHES[round((pitch + 1) * 2)]
    return posts


def toy_clip_warmup(folder, size, seed=7):
    """toy_warmup's three tasks for clips: describe, write a number that the prompt states, name."""
    rng, posts = random.Random(seed), toy_clips(folder, {"warm": size}, seed)
    for post in posts:
        facts, post.score = post.columns.pop("facts"), None
        number = render_score(rng.randint(-30, 30) / 10)
        named, value = rng.choice([("Image", facts["scene"]), ("Word", facts["word"]),
                                   ("Voice", facts["pitch"])])
        post.columns["branches"] = [
            ["Describe the post.",
             f"The voice is {facts['pitch']}. The words call {post.aspect} {facts['word']}. "
             f"The frames show a {facts['scene']}."],
            [f"Write this number: {number}", number],
            [f'Answer with this field only:\n"{named}": what the post shows',
             f'"{named}": "{value}"']]
    return posts


def _voice(path, hertz, rng):
    """About 0.4 s of a voice-like tone: harmonics under a falling spectrum, vibrato, breath noise.
    Length, loudness and vibrato vary and mean nothing."""
    t = torch.arange(rng.randint(5600, 7200)) / AUDIO_RATE  # (samples,)
    turn = hertz * (t + 0.003 * torch.sin(2 * math.pi * (rng.uniform(4, 6) * t + rng.random())) / 5)
    tone = sum(torch.sin(2 * math.pi * k * turn) / k for k in range(1, 9))
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    sound = rng.uniform(0.1, 0.3) * (tone + 0.05 * noise) * torch.sin(math.pi * t / t[-1]).sqrt()
    write_wav(path, sound.clamp(-1, 1).numpy())


def write_wav(path, samples, rate=AUDIO_RATE, channels=1, width=2):
    """Floats in [-1, 1] as PCM; unsigned bytes where width is 1."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels), file.setsampwidth(width), file.setframerate(rate)
        scaled = (samples * 32767).astype("<i2") if width == 2 else (samples * 127 + 128)
        file.writeframes(scaled.tobytes() if width == 2 else scaled.astype("u1").tobytes())
    return str(path)


def _draw(scene, rng):
    """A 56 x 56 picture of the scene; place, size and colours vary and mean nothing."""
    soft = lambda low: tuple(rng.randint(low, low + 60) for _ in range(3))
    sky = {"sunny sky": (120, 190, 250), "rainy sky": (70, 75, 90),
           "grey wall": (150, 150, 150)}.get(scene)
    image = Image.new("RGB", (56, 56), sky or soft(120))
    draw = ImageDraw.Draw(image)
    x, y, r = rng.randint(26, 30), rng.randint(26, 30), rng.randint(20, 23)
    if scene == "sunny sky":
        draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=(255, 220, 40))
    elif scene == "rainy sky":
        for k in range(8):
            dx, dy = rng.randint(0, 52), rng.randint(0, 44)
            draw.line((dx, dy, dx - 3, dy + 10), fill=(150, 170, 230), width=2)
    elif scene == "grey wall":
        for k in range(0, 56, 14):
            draw.line((0, k, 56, k), fill=(110, 110, 110), width=2)
    else:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(240, 200, rng.randint(90, 160)))
        for eye in (x - 8, x + 8):
            draw.ellipse((eye - 3, y - 9, eye + 3, y - 3), fill=(30, 30, 30))
            if scene == "frowning face":  # with tears
                draw.ellipse((eye - 3, y - 1, eye + 3, y + 9), fill=(60, 120, 255))
        if scene == "smiling face":  # laughing
            draw.chord((x - 12, y - 6, x + 12, y + 16), 0, 180, fill="white",
                       outline=(150, 20, 40), width=2)
        elif scene == "frowning face":
            draw.arc((x - 10, y + 8, x + 10, y + 22), 180, 360, fill=(150, 20, 40), width=4)
        else:
            draw.line((x - 10, y + 9, x + 10, y + 9), fill=(150, 20, 40), width=4)
    return image


class ToyTeacher:
    """Stands where a 72B model would, for toy posts: right unaided on about `skill` of them (else
    it misses irony or guesses), sometimes malformed, sometimes contradicting the label it was
    given. It answers in the forms that real teachers use. Deterministic in seed, post and
    messages."""

    def __init__(self, skill=0.6, seed=0):
        self.skill, self.seed = skill, seed

    def __call__(self, requests):
        with explaining("facts of these posts are damaged: write the toy posts anew"):
            return [self.answer(request) for request in requests]

    def answer(self, request):
        """Request -> Answer."""
        post, facts = request.post, request.post.columns.get("facts")
        if not facts:
            raise InputError(f"post {post.id}: the toy teacher only knows toy posts; use "
                             "generate.py teacher with --endpoint or --model for yours")
        prompt = request.messages[-1]["content"][-1]["text"]
        given = re.search(r"^Given sentiment: (.+)$", prompt, re.M)
        draw = lambda *key: random.Random(f"{self.seed}|{post.id}|{'|'.join(map(str, key))}")
        rng = draw(bool(given), request.temperature)
        if given:
            others = [x for x in LABELS if x != given[1]]
            label = given[1] if rng.random() > 0.06 else rng.choice(others)
        else:  # unaided: one draw per post, whatever the retry
            wrong = draw("skill")
            truth = toy_label(facts["words"], facts["mood"])
            others = [x for x in LABELS if x != truth]
            label = truth if wrong.random() < self.skill else wrong.choice(others)
        fields = toy_findings(post.aspect, facts["word"], facts["scene"], facts["words"],
                              facts["mood"], label, rng)
        form = rng.random()
        if form < 0.05:
            del fields[rng.choice(FIELDS)]
        text = render_reasoning(fields) if len(fields) == 5 else str(fields)
        if 0.05 <= form < 0.09:
            text = "\n\n".join(f"### {k}\n{v}" for k, v in fields.items())
        elif 0.09 <= form < 0.12:
            text = "```json\n" + json.dumps(fields, indent=1) + "\n```"
        elif 0.12 <= form < 0.18:
            text = "\n".join(f"{k}: {v}" for k, v in fields.items())
        return Answer(text, tokens_in=len(prompt.split()), tokens_out=len(text.split()))


# The embedded default: real Qwen2.5-VL classes, a few hundred thousand parameters. The assistant
# has more output rows than the student, as 7B (152,064) has more than 3B (151,936).
TINY = {"student": dict(hidden=96, layers=2, heads=3, extra_rows=0),
        "assistant": dict(hidden=128, layers=2, heads=4, extra_rows=64)}
TINY_OMNI = {"omni": dict(hidden=96, layers=2, heads=3, extra_rows=0)}  # Qwen2.5-Omni's Thinker


def tiny_tokenizer(corpus, vocab_size=1000, omni=False):
    """A byte-level BPE tokenizer with Qwen2.5-VL's (or Omni's) control tokens and chat template,
    trained on `corpus`."""
    from transformers import Qwen2Tokenizer

    special = [PAD_TOKEN, IM_START, IM_END, IMAGE_TOKENS[0], IMAGE_TOKENS[2], VISION_PAD,
               IMAGE_TOKENS[1], VIDEO_PAD]
    template = CHAT_TEMPLATE
    if omni:
        special[3:] = [*OMNI_IMAGE_TOKENS, *OMNI_AUDIO_TOKENS, "<|VIDEO|>"]
        template = template.replace("".join(IMAGE_TOKENS), "".join(OMNI_IMAGE_TOKENS) + "{% elif "
                                    "content['type'] == 'audio' %}" + "".join(OMNI_AUDIO_TOKENS))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, vocab_size, new_special_tokens=special[1:], show_progress=False)
    tokenizer.chat_template = template
    tokenizer.eos_token, tokenizer.pad_token = IM_END, PAD_TOKEN
    return tokenizer


# Qwen2.5-VL's template for the messages we build (system line, images, text).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_model(folder, size, tokenizer, seed=0, max_pixels=112 * 112, window=112):
    """Writes a random Qwen2.5-VL of TINY[size], or the Omni Thinker, as an ordinary model folder
    that from_pretrained reads."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shape, ids = (TINY | TINY_OMNI)[size], tokenizer.convert_tokens_to_ids
    head = shape["hidden"] // shape["heads"]
    rope = dict(rope_type="default", rope_theta=10000.0,
                mrope_section=[head // 2 - 2 * (head // 6), head // 6, head // 6])
    rows = -(-len(tokenizer) // 64) * 64 + shape["extra_rows"]
    # choice: weights of about 1/sqrt(width); the usual 0.02 learns half as fast at this size
    text = dict(vocab_size=rows, hidden_size=shape["hidden"], intermediate_size=3 * shape["hidden"],
                num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
                num_key_value_heads=1, max_position_embeddings=4096, bos_token_id=ids(PAD_TOKEN),
                eos_token_id=ids(IM_END), pad_token_id=ids(PAD_TOKEN), tie_word_embeddings=True,
                rms_norm_eps=1e-6, initializer_range=0.1, rope_parameters=rope)
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2,
                  out_hidden_size=shape["hidden"], fullatt_block_indexes=[1], window_size=window,
                  patch_size=14, spatial_merge_size=2, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if size in TINY_OMNI:
            model, extractor = _tiny_omni(text, vision, ids)
        else:
            extractor, model = None, Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
                text_config=text, vision_config=vision, tie_word_embeddings=True,
                image_token_id=ids(IMAGE_TOKENS[1]), video_token_id=ids(VIDEO_PAD),
                vision_start_token_id=ids(IMAGE_TOKENS[0]), vision_end_token_id=ids(IMAGE_TOKENS[2])))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(size=dict(shortest_edge=56 * 56, longest_edge=max_pixels))
    images.save_pretrained(folder)
    if extractor:  # Omni keeps both in one file
        write_json(Path(folder, "preprocessor_config.json"), extractor.to_dict() | images.to_dict())


def _tiny_omni(text, vision, ids):
    """A random Thinker of Qwen2.5-Omni with two layers of audio tower, and its extractor."""
    from transformers import (
        Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration,
        WhisperFeatureExtractor)

    audio = dict(num_mel_bins=64, d_model=64, encoder_layers=2, encoder_attention_heads=2,
                 encoder_ffn_dim=128, output_dim=text["hidden_size"], initializer_range=0.1)
    names = zip(("vision_start_token_id", "image_token_index", "vision_end_token_id",
                 "audio_start_token_id", "audio_token_index", "audio_end_token_id"),
                ids([*OMNI_IMAGE_TOKENS, *OMNI_AUDIO_TOKENS]))
    config = Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=audio, tie_word_embeddings=True,
        video_token_index=ids("<|VIDEO|>"), **dict(names))
    extractor = WhisperFeatureExtractor(feature_size=64, chunk_length=MAX_SECONDS)
    return Qwen2_5OmniThinkerForConditionalGeneration(config), extractor


def tiny_encoders(folder, posts, seed=42):
    """text/: a random two-layer BERT that knows the posts' words and all letters; image/: a random
    little ResNet."""
    from transformers import BertConfig, BertModel, BertTokenizer, ResNetConfig, ResNetModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    words = Counter(w for p in posts for w in mark_aspect(p)[0].lower().split())
    signs = sorted({sign for word in words for sign in word})
    # trap: the library's own training of word pieces differs from run to run
    pieces = [*signs, *("##" + s for s in signs), *sorted(words, key=lambda w: (-words[w], w))]
    names = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces[:2000]])
    tokenizer = BertTokenizer(vocab={name: n for n, name in enumerate(names)})
    text = BertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2,
                      num_attention_heads=2, intermediate_size=128)
    image = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 64], depths=[1, 1, 1],
                         layer_type="basic")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(text).save_pretrained(Path(folder, "text"))
        ResNetModel(image).save_pretrained(Path(folder, "image"))
    tokenizer.save_pretrained(Path(folder, "text"))
    ViTImageProcessorPil(size=dict(height=64, width=64)).save_pretrained(Path(folder, "image"))


def prompts_of(posts, tasks):
    """Texts that hold every prompt of the posts, for a tokenizer to learn from."""
    formats = FORMATS | dict(score=SCORE_FORMAT)
    corpus = [render_label(label) for label in LABELS]
    for post in posts:
        corpus += [part for branch in post.columns.get("branches", []) for part in branch]
        for task in tasks:
            prompt = post_prompt(post) + formats[task]
            corpus.append(f"{SYSTEM}\nsystem\nuser\n{prompt}\nassistant\n")
    return corpus


def warmup_rate(step, total):
    """The part of its peak that the rate has at step 1, 2, ..., `total` of a cosine warm-up: it
    rises for a twentieth of the steps and falls to nearly 0."""
    return min(1.0, step / (0.05 * total)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / total))


def warm_up(folder, size, posts, epochs=3, lr=0.002, schedule="constant", batch_size=16, seed=42,
            device="cpu"):
    """Writes a tiny model of TINY[size] or TINY_OMNI[size], all its weights trained on the warm-up
    posts' branches: an ordinary model folder. Stands where pre-training would. `schedule`: the rate
    stays constant or follows warmup_rate."""
    tasks = ("score",) if size in TINY_OMNI else ("reason", "label")
    tokenizer = tiny_tokenizer(prompts_of(posts, tasks), omni=size in TINY_OMNI)
    part = f"{folder}.part"
    shutil.rmtree(part, ignore_errors=True)
    tiny_model(part, size, tokenizer, seed)
    torch.manual_seed(seed)
    model, processor = load_model(part, device, torch.float32)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))
    examples = [encode(post, post.columns["branches"], processor) for post in posts]
    lengths = [sum(len(answer) for _, answer in post.columns["branches"]) for post in posts]
    steps = [rows for epoch in range(epochs)
             for rows in steps_of_epoch(lengths, batch_size, epoch, seed)]
    bar = progress(len(steps), f"warm-up {size}", "step")
    for step, rows in enumerate(steps, 1):
        if schedule == "cosine":
            optimizer.param_groups[0]["lr"] = lr * warmup_rate(step, len(steps))
        batch = collate(sorted((examples[i] for i in rows), key=len), processor.pad_id).to(device)
        hidden = forward_branches(model, batch)  # (B, T, D)
        loss = 0.0
        for branch in (1, 2, 3):
            at = batch.supervised(branch)
            logits = model.lm_head(hidden[at])  # (N, V)
            loss = loss + F.cross_entropy(logits, batch.targets[at]) / 3
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if step % 80 == 0 or step == len(steps):
            print(f"step {step}  loss {loss.item():.4f}")
    bar.close()
    model.save_pretrained(part)
    os.replace(part, folder)


# ---- the command line


def parse_args(argv=None):
    """The command line, and what is handed on to generate.py teacher."""
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    stages = top.add_subparsers(dest="stage", required=True)
    p = stages.add_parser("posts", formatter_class=Help, help="write the synthetic posts")
    for split, size in (("train", 600), ("dev", 100), ("test", 300), ("warmup", 1280)):
        p.add_argument(f"--{split}", type=int, default=size, help=f"number of {split} posts")
    p.add_argument("--noise", type=float, default=0.0, help="fraction of wrong labels")
    p.add_argument("--clips", action="store_true", help="posts with frames, a voice and a score")
    p = stages.add_parser("base", formatter_class=Help, help="warm up a random tiny model")
    p.add_argument("--size", choices=(*TINY, *TINY_OMNI), required=True)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--lr", type=float, default=0.002, help="peak rate")
    p.add_argument("--schedule", choices=("constant", "cosine"), default="constant")
    p.add_argument("--data", required=True, help="warmup.jsonl")
    p = stages.add_parser("teacher", formatter_class=Help, help="chains of the toy teacher; takes "
                          "generate.py teacher's flags")
    p.add_argument("--skill", type=float, default=0.6, help="fraction of posts right unaided")
    p = stages.add_parser("encoders", formatter_class=Help, help="text/ and image/ for train.py "
                          "ubm: random tiny encoders")
    p.add_argument("--data", required=True, help="posts.jsonl")
    for name in ("posts", "base", "encoders"):
        stages.choices[name].add_argument("--out", required=True)
    for p in stages.choices.values():
        p.add_argument("--seed", type=int, default=42)
    args, rest = top.parse_known_args(argv)
    if rest and args.stage != "teacher":
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


def write_posts(args):
    """posts.jsonl, warmup.jsonl and images/ (with --clips also voices)."""
    sizes, images = dict(train=args.train, dev=args.dev, test=args.test), f"{args.out}/images"
    begun = os.path.exists(f"{args.out}/posts.jsonl")
    check_settings(f"{args.out}/toy.json", vars(args), begun)
    if args.clips:
        posts = toy_clips(images, sizes, args.seed)
        warmup = toy_clip_warmup(images, args.warmup, args.seed + 1)
    else:
        posts = toy_posts(images, sizes, args.seed, args.noise)
        warmup = toy_warmup(images, args.warmup, args.seed + 1)
        print(f"test labels: {dict(Counter(p.label for p in posts if p.split == 'test'))}")
    write_rows(f"{args.out}/posts.jsonl", [post.columns | post.row() for post in posts])
    write_rows(f"{args.out}/warmup.jsonl", [post.columns | post.row() for post in warmup])
    print(f"wrote {len(posts)} posts and {len(warmup)} warm-up rows to {args.out}")


def base(args):
    """The warmed-up model folder, unless it is there."""
    if Path(args.out).exists():
        return print(f"finished   {args.out} is there")
    warm_up(args.out, args.size, read_posts(args.data), args.epochs, args.lr, args.schedule,
            seed=args.seed)
    print(f"wrote a warmed-up {args.size} to {args.out}")


def encoders(args):
    """text/ and image/."""
    tiny_encoders(args.out, read_posts(args.data), args.seed)
    print(f"wrote {args.out}/text and {args.out}/image")


def main(argv=None):
    """Runs the command line; returns the exit code."""
    args, rest = parse_args(argv)
    if args.stage == "teacher":
        command = ["teacher", *rest, "--model", f"toy-{args.skill}", "--seed", str(args.seed)]
        return generate.main(command, own_ask=ToyTeacher(args.skill, args.seed))
    return run_stage(dict(posts=write_posts, base=base, encoders=encoders)[args.stage], args)


if __name__ == "__main__":
    sys.exit(main())
