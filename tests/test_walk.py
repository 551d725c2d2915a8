"""How far a reader walks: which of our functions one training step, one predicted batch and the
teacher stage go through. `python -m pytest -s tests/test_walk.py` prints them."""

import sys
import threading
from pathlib import Path

import pytest
from conftest import chat

import generate
import mulcot
import toy as toy_world
import train

OURS = {module.__file__: Path(module.__file__).stem for module in (mulcot, train, generate)}


class Walk:
    """Within the block: the distinct functions of ours that are called, in order, in all threads.
    Comprehensions and lambdas are part of the function around them."""

    def __enter__(self):
        self.functions = {}
        threading.setprofile(self.see)
        sys.setprofile(self.see)
        return self

    def see(self, frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename in OURS and code.co_name[0] != "<":
            self.functions[f"{OURS[code.co_filename]}.{code.co_qualname}"] = None

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)

    def check(self, name, about):
        """Prints the functions; as many as when this was written, or the house has grown."""
        print(f"\n{name}: {len(self.functions)} functions\n  " + "\n  ".join(self.functions))
        assert about - 5 <= len(self.functions) <= about + 1, sorted(self.functions)


@pytest.fixture(scope="module")
def chains(toy, tmp_path_factory):
    """The toy teacher's chains and a random assistant's soft labels."""
    folder = tmp_path_factory.mktemp("walk")
    assert toy_world.main(["teacher", "--data", f"{toy}/posts.jsonl", "--out",
                           f"{folder}/chains.jsonl"]) == 0
    assert generate.main(["soft", "--data", f"{folder}/chains.jsonl", "--images", f"{toy}/images",
                          "--model", f"{toy}/assistant", "--out", f"{folder}/soft"]) == 0
    return folder


def test_a_training_step(toy, chains):
    """Of the student: from an item to its gradient."""
    args = train.parse_args(["student", "--data", f"{chains}/chains.jsonl", "--images",
                             f"{toy}/images", "--soft", f"{chains}/soft", "--dev", "-", "--model",
                             f"{toy}/student", "--out", f"{chains}/run", "--workers", "0"])
    processor = mulcot.load_processor(args.model)
    stage = train.ChainStage(args, processor)
    items, _ = mulcot.training_items(args.data, args.images, stage.branches_of)
    model = train.build_model(args, stage, items)
    steps = iter(train.step_loader(args, items, processor, 0))
    with Walk() as walk:
        step = next(steps)
        counts = train.step_counts(step)
        for batch, examples in step:
            loss, _ = stage.loss(model, batch, examples, counts)
            loss.backward()
    walk.check("a student's training step", 41)


def test_a_predicted_batch(student, posts):
    """Labels by scoring and chains, from posts to rows."""
    with Walk() as walk:
        generate.predict(*student, posts[:3], max_new_tokens=4)
    walk.check("a predicted batch", 39)


def test_the_teacher_stage(toy, serve, tmp_path):
    """The whole command against an endpoint on this machine, both stages."""
    chain = dict.fromkeys(mulcot.FIELDS, "Some words.") | dict(Prediction="positive")
    server = serve(lambda request: chat(mulcot.render_reasoning(chain)))
    with Walk() as walk:
        assert generate.main(["teacher", "--data", f"{toy}/posts.jsonl", "--model", "big",
                              "--endpoint", server.url, "--max-tries", "1", "--out",
                              f"{tmp_path}/chains.jsonl"]) == 0
    walk.check("the teacher stage", 77)
