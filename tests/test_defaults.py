"""The papers' settings, and ours where they say nothing, as a user gets them without a flag."""

import inspect

import pytest

import generate
import mulcot
import train

MULCOT, READOUT, UACS = "arXiv 2508.05234", "arXiv 2606.05713", "arXiv 2509.04459"
RELEASE, OURS = "the authors' released scripts", "our choice"

# what both MulCoT-RD stages share: setting -> (value, source)
CHAINS = dict(
    rank=(16, MULCOT), alpha=(32, MULCOT), lr=(3e-4, MULCOT), batch=(2, MULCOT),
    accumulate=(20, MULCOT), epochs=(20, MULCOT), seed=(42, MULCOT), schedule=("plateau", MULCOT),
    warmup=(0.0, MULCOT), reasoning_weight=(0.8, MULCOT), label_weight=(0.2, MULCOT),
    max_answer=(512, OURS), reasoning=(True, MULCOT), clip=(1.0, OURS), scope=("language", OURS),
    nf4=(False, MULCOT), max_pixels=(0, OURS), log_every=(10, OURS), save_every=(0, OURS))

TRAIN = {
    "assistant": CHAINS | dict(dropout=(0.2, MULCOT)),
    "student": CHAINS | dict(
        dropout=(0.05, MULCOT), lam=(0.3, MULCOT), temperature=(2.0, MULCOT),
        t_squared=(False, RELEASE), augment=(True, MULCOT)),
    "readout": dict(
        rank=(32, READOUT), alpha=(32, READOUT), dropout=(0.1, READOUT), lr=(2e-4, READOUT),
        head_lr=(1e-3, READOUT), target=("score", READOUT), readout=("discriminative", READOUT),
        epochs=(10, OURS), batch=(4, OURS), accumulate=(8, OURS), schedule=("cosine", OURS),
        warmup=(0.1, OURS), clip=(1.0, OURS), scope=("language", OURS), nf4=(False, OURS),
        seed=(42, OURS)),
    "ubm": dict(
        epochs=(3, OURS), batch=(32, OURS), lr=(1e-4, OURS), head_lr=(1e-3, OURS),
        members=(2, OURS), adv_epsilon=(0.1, OURS), bins=(None, OURS), seed=(42, OURS))}

GENERATE = {
    "teacher": dict(
        max_tries=(3, OURS), max_new_tokens=(512, MULCOT), stage2=(True, MULCOT),
        allow_test=(False, OURS), seed=(42, MULCOT), split=("train", MULCOT)),
    "augment": dict(
        temperature=(0.7, RELEASE), max_new_tokens=(512, MULCOT), seed=(42, MULCOT),
        split=("train", MULCOT)),
    "soft": dict(max_answer=(512, OURS)),
    "predict": dict(
        max_new_tokens=(512, MULCOT), chain=(True, MULCOT), decode=("score", OURS),
        shuffle_images=(False, OURS), blank_text=(False, OURS)),
    "cascade": dict(budget=(0.4, OURS), logprobs=(True, OURS))}

# what a stage cannot do without
NEEDED = {
    "assistant": ["--model", "m"], "student": ["--model", "m", "--no-soft"],
    "readout": ["--model", "m"], "ubm": ["--text-encoder", "t"], "teacher": ["--model", "m"],
    "augment": ["--model", "m"], "soft": ["--model", "m"], "predict": ["--model", "m"],
    "cascade": ["--ubm", "u", "--mllm", "m", "--dev", "d"]}


def rows_of(table):
    """(stage, setting, value, source) of a table of stages."""
    return [(stage, name, *entry) for stage, entries in table.items()
            for name, entry in entries.items()]


@pytest.mark.parametrize("stage, name, value, source", rows_of(TRAIN))
def test_training_defaults(stage, name, value, source):
    """`source` is for whoever reads a failure."""
    shared = ["--data", "d", "--dev", "d", "--out", "o"]
    args = train.parse_args([stage, *shared, *NEEDED[stage]])
    assert getattr(args, name) == value, source


@pytest.mark.parametrize("stage, name, value, source", rows_of(GENERATE))
def test_generation_defaults(stage, name, value, source):
    """As above."""
    args = generate.parse_args([stage, "--data", "d", "--out", "o", *NEEDED[stage]])
    assert getattr(args, name) == value, source


# the equations and the teacher, for whoever calls them from Python
FUNCTIONS = {
    "multitask_loss": dict(reasoning_weight=(0.8, MULCOT), label_weight=(0.2, MULCOT)),
    "student_loss": dict(lam=(0.3, MULCOT)),
    "distill_kl": dict(temperature=(2.0, MULCOT), t_squared=(False, RELEASE)),
    "add_lora": dict(rank=(16, MULCOT), alpha=(32, MULCOT), dropout=(0.05, MULCOT)),
    "two_stage_cot": dict(max_tries=(3, OURS), max_tokens=(512, MULCOT), stage2=(True, MULCOT)),
    "nf4_quantize": dict(block=(64, "QLoRA, arXiv 2305.14314"))}


@pytest.mark.parametrize("function, name, value, source", rows_of(FUNCTIONS))
def test_function_defaults(function, name, value, source):
    """As above."""
    parameter = inspect.signature(getattr(mulcot, function)).parameters[name]
    assert parameter.default == value, source
