"""Today's families of vision-language models, tiny and random: folders that from_pretrained reads,
and what each family's own classes make of a post (the oracle of test_families.py)."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer,
    PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2Tokenizer)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from mulcot import load_image, post_prompt
from toy import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "internvl_qwen3",
            "qwen2_5_omni_thinker", "qwen3_5")
TOYS = ("qwen2_5_vl", "qwen2_5_omni_thinker")  # as toy.py makes them
SIZES = {"student": dict(heads=4, extra_rows=0), "assistant": dict(heads=6, extra_rows=64)}

# ---- real shapes

SHAPES = {  # as in the models' own config.json
    "3B": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, intermediate_size=11008, vocab_size=151936,
               tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, intermediate_size=18944, vocab_size=152064,
               tie_word_embeddings=False)}


def qwen_config(shape):
    """Of Qwen2.5-VL-3B or 7B."""
    text = SHAPES[shape] | dict(rope_parameters=dict(
        rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420,
                  num_heads=16, out_hidden_size=text["hidden_size"],
                  fullatt_block_indexes=[7, 15, 23, 31])
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision,
                            tie_word_embeddings=text["tie_word_embeddings"])


# ---- tokenizers

CHATML = ["<|im_start|>", "<|im_end|>"]
QWEN_VISION = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
               "<|video_pad|>"]
INTERN_VISION = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
SMOL_VISION = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>",
               *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))]
PLACEHOLDER = {"smolvlm": "<image>", "internvl": "<IMG_CONTEXT>", "internvl_qwen3": "<IMG_CONTEXT>",
               "qwen2_5_omni_thinker": "<|IMAGE|>"}  # the others: <|image_pad|>

SYSTEM_TURN = ("{% if loop.first and message['role'] != 'system' %}"
               "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}")
NO_THOUGHT = "<think>\n\n</think>\n\n"
INTERN_TEMPLATE = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>",
                                        "<IMG_CONTEXT>\n")
QWEN3_5_TEMPLATE = CHAT_TEMPLATE.replace(SYSTEM_TURN, "").replace(
    "<|im_start|>{{ message['role'] }}\n", "<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}" + NO_THOUGHT + "{% endif %}").replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}" + NO_THOUGHT +
    "{% else %}<think>\n{% endif %}{% endif %}")
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
# family -> (class, special tokens, other added tokens, chat template)
TOKENIZERS = {
    "qwen2_vl": (Qwen2Tokenizer, CHATML + QWEN_VISION, [], CHAT_TEMPLATE),
    "qwen3_vl": (Qwen2Tokenizer, CHATML + QWEN_VISION, ["<think>", "</think>"],
                 CHAT_TEMPLATE.replace(SYSTEM_TURN, "")),
    "qwen3_5": (Qwen3_5Tokenizer, CHATML + QWEN_VISION, ["<think>", "</think>"], QWEN3_5_TEMPLATE),
    "internvl": (Qwen2Tokenizer, CHATML + INTERN_VISION, [], INTERN_TEMPLATE),
    "internvl_qwen3": (Qwen2Tokenizer, CHATML + INTERN_VISION, ["<think>", "</think>"],
                       INTERN_TEMPLATE.replace(SYSTEM_TURN, ""))}


def family_tokenizer(family, texts, vocab_size=600):
    """A byte-level BPE tokenizer with the family's pre-tokenizer, control tokens and template."""
    # as in every real vocabulary, a blank line and a word with its blank are one token each
    texts = [*texts, *(" " + text for text in texts), *["a line\n\n"] * 99]
    if family == "smolvlm":
        return _smol_tokenizer(texts, vocab_size)
    if family in TOYS:
        return tiny_tokenizer(texts, vocab_size, omni=family == "qwen2_5_omni_thinker")
    base, special, added, template = TOKENIZERS[family]
    tokenizer = base().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=special, show_progress=False)
    tokenizer.add_tokens(added)
    tokenizer.chat_template = template
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    if family.startswith("internvl"):
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        tokenizer._set_model_specific_special_tokens(dict(zip(names, INTERN_VISION)))
    return tokenizer


def _smol_tokenizer(texts, vocab_size):
    """SmolLM2's: GPT-2's pieces, but each digit by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SMOL_VISION]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=SMOL_TEMPLATE, bos_token="<|im_start|>",
        eos_token="<end_of_utterance>", pad_token="<|im_end|>", unk_token="<|endoftext|>")


# ---- model folders


def _text(tokenizer, size, **more):
    """What the text configs of all families share."""
    shape = SIZES[size]
    rows = -(-len(tokenizer) // 64) * 64 + shape["extra_rows"]
    return dict(vocab_size=rows, hidden_size=16 * shape["heads"], num_hidden_layers=3,
                intermediate_size=96, num_attention_heads=shape["heads"], num_key_value_heads=2,
                max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.1,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id) | more


def _rope(*sections, **more):
    return dict(rope_type="default", rope_theta=10000.0, mrope_section=list(sections), **more)


def _qwen_vision(width, **more):
    return dict(depth=2, num_heads=2, hidden_size=32, intermediate_size=48, out_hidden_size=width,
                patch_size=16, spatial_merge_size=2, num_position_embeddings=64,
                initializer_range=0.1) | more


def _qwen2_vl(text):
    return dict(text_config=text | dict(rope_parameters=_rope(4, 2, 2)),
                vision_config=dict(depth=2, embed_dim=32, hidden_size=text["hidden_size"],
                                   num_heads=2, mlp_ratio=2, initializer_range=0.1))


def _qwen3_vl(text):
    rope = _rope(4, 2, 2, mrope_interleaved=True)
    return dict(text_config=text | dict(head_dim=16, rope_parameters=rope),
                vision_config=_qwen_vision(text["hidden_size"], deepstack_visual_indexes=[0, 1]))


def _qwen3_5(text):
    rope = _rope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25)
    text = text | dict(num_hidden_layers=4, head_dim=32, linear_key_head_dim=16,
                       linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                       rope_parameters=rope)  # the fourth layer has full attention
    return dict(text_config=text, vision_config=_qwen_vision(text["hidden_size"]))


TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             initializer_range=0.1)


def _smolvlm(text):
    vision = TOWER | dict(image_size=32, patch_size=8)
    return dict(text_config=text | dict(model_type="llama"), vision_config=vision, scale_factor=2)


def _internvl(text, language="qwen2"):
    vision = TOWER | dict(image_size=[28, 28], patch_size=[7, 7])
    return dict(text_config=text | dict(model_type=language), vision_config=vision,
                image_seq_length=4)


CONFIGS = {"qwen2_vl": _qwen2_vl, "qwen3_vl": _qwen3_vl, "qwen3_5": _qwen3_5,
           "smolvlm": _smolvlm, "internvl": _internvl,
           "internvl_qwen3": lambda text: _internvl(text | dict(head_dim=16), "qwen3")}
PIXELS = dict(shortest_edge=56 * 56, longest_edge=96 * 96)
IMAGE_PROCESSORS = {
    "qwen2_vl": Qwen2VLImageProcessorPil(size=PIXELS),
    "qwen3_vl": Qwen2VLImageProcessorPil(size=PIXELS, patch_size=16),
    "smolvlm": SmolVLMImageProcessorPil(size=dict(longest_edge=64),
                                        max_image_size=dict(longest_edge=32)),
    "internvl": GotOcr2ImageProcessorPil(size=dict(height=28, width=28), max_patches=4,
                                         crop_to_patches=True)}
IMAGE_PROCESSORS |= dict(qwen3_5=IMAGE_PROCESSORS["qwen3_vl"],
                         internvl_qwen3=IMAGE_PROCESSORS["internvl"])


def family_config(family, size, tokenizer, **more):
    """The family's config of this size; `more` goes into its text config."""
    parts = CONFIGS[family](_text(tokenizer, size, **more))
    ids = {}
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        ids[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    if "<|image_pad|>" not in tokenizer.get_vocab():
        ids = dict(image_token_id=tokenizer.convert_tokens_to_ids(PLACEHOLDER[family]))
    model_type = family.removesuffix("_qwen3")
    return AutoConfig.for_model(model_type, tie_word_embeddings=True, **parts, **ids)


def write_family(folder, family, size, tokenizer, seed=1, weights=True):
    """The family's tiny random model as an ordinary folder; without `weights` config, tokenizer
    and image processor alone."""
    if family in TOYS:
        size = "omni" if family == "qwen2_5_omni_thinker" else size
        return tiny_model(folder, size, tokenizer, seed, max_pixels=96 * 96, window=56)
    config = family_config(family, size, tokenizer)
    if weights:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    IMAGE_PROCESSORS[family].save_pretrained(folder)


# ---- the oracle: what the family's own classes make of a post


PROCESSORS = dict(smolvlm=SmolVLMProcessor, internvl=InternVLProcessor)


class Oracle:
    """Tokens, pictures and passes as the family's own tokenizer, image processor, processor class
    and model have them: one post, one branch, no padding."""

    def __init__(self, family, folder, model):
        self.family, self.model = family, model
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.placeholder = PLACEHOLDER.get(family, "<|image_pad|>")
        self.placeholder_id = self.tokenizer.convert_tokens_to_ids(self.placeholder)

    def text(self, prompt, images=(), answer=None):
        """The chat template's text of a user's turn, and of the answer up to its end token."""
        parts = [dict(type="image")] * len(images) + [dict(type="text", text=prompt)]
        messages = [dict(role="user", content=parts)]
        if answer is not None:
            messages.append(dict(role="assistant", content=[dict(type="text", text=answer)]))
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None, enable_thinking=False)
        return text if answer is None else text.removesuffix("\n")

    def expanded(self, text, images):
        """(text with every placeholder as wide as its picture, the model's image arguments)."""
        if not images:
            return text, {}
        pictures = [load_image(path) for path in images]
        if self.family == "smolvlm":
            out = self.images(images=[pictures], return_tensors="pt", return_row_col_info=True)
        else:
            out = self.images(images=pictures, return_tensors="pt")
        before, *behind = text.split(self.placeholder)
        assert len(behind) == len(images), text
        for number, words in enumerate(behind):
            before += self._wide(out, number) + words
        names = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
        return before, {name: out[name] for name in names if name in out}

    def _wide(self, out, number):
        """Picture `number` as text, by the family's own processor class (which itself would need
        torchvision)."""
        own = PROCESSORS.get(self.family.removesuffix("_qwen3"), Qwen2VLProcessor)
        me = SimpleNamespace(
            image_processor=self.images, image_token=self.placeholder, image_seq_len=4,
            image_seq_length=4, fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>", start_image_token="<img>",
            end_image_token="</img>")  # a tile of 2 x 2 tokens, as _smolvlm and _internvl have it
        return own.replace_image_token(me, out, number)

    def inputs(self, post, question, answer=None, prompt=None):
        """Keyword arguments of the model's forward for a post, a question and perhaps an answer."""
        prompt = (post_prompt(post) if prompt is None else prompt) + question
        text, more = self.expanded(self.text(prompt, post.images, answer), post.images)
        ids = torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])
        if "image_grid_thw" in more and self.family != "qwen2_5_omni_thinker":
            more["mm_token_type_ids"] = (ids == self.placeholder_id).int()
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids)) | more

    def ids(self, *args, **options):
        return self.inputs(*args, **options)["input_ids"][0].tolist()

    def answer_logits(self, post, question, answer):
        """(logits (N, V) at the answer's tokens with its end token, their ids (N,))."""
        start = len(self.ids(post, question))
        inputs = self.inputs(post, question, answer)
        return (self.model(**inputs).logits[0, start - 1 : -1], inputs["input_ids"][0, start:])

    def generated(self, post, question, never, max_new_tokens):
        """(text, finish) by transformers' own greedy search."""
        inputs, stop = self.inputs(post, question), self.tokenizer.eos_token_id
        ids = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, suppress_tokens=never,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=[stop, self.tokenizer.pad_token_id])
        ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
        ended = ids[-1] in (stop, self.tokenizer.pad_token_id)
        return self.tokenizer.decode(ids[:-1] if ended else ids), "stop" if ended else "length"
