"""How far a reader walks: which of our functions one training step, one predicted batch and the
teacher's command go through. `python -m pytest -s tests/test_walk.py` prints them."""

import contextlib
import sys
import threading
from pathlib import Path

from conftest import chain, chat

import generate
import mulcot
import toy as toy_world
import train

OURS = {module.__file__: Path(module.__file__).stem for module in (mulcot, train, generate)}


@contextlib.contextmanager
def walk(name, count):
    """Counts and prints the distinct functions of ours that are called within the block, in all
    threads; comprehensions and lambdas are part of the function around them. One more than `count`
    is a house that has grown, one less a count to lower."""
    functions = {}

    def see(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename in OURS and code.co_name[0] != "<":
            functions[f"{OURS[code.co_filename]}.{code.co_qualname}"] = None

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    print(f"\n{name}: {len(functions)} functions\n  " + "\n  ".join(functions))
    assert len(functions) == count, sorted(functions)


def test_a_training_step(toy, tmp_path):
    """Of the student: from an item to its gradient."""
    data = ["--data", f"{tmp_path}/chains.jsonl", "--images", f"{toy}/images"]
    soft = f"{tmp_path}/soft"
    assert toy_world.main(["teacher", "--data", f"{toy}/posts.jsonl", "--out", data[1]]) == 0
    assert generate.main(["soft", *data, "--model", f"{toy}/assistant", "--out", soft]) == 0
    args = train.parse_args(["student", *data, "--soft", soft, "--dev", "-", "--model",
                             f"{toy}/student", "--out", f"{tmp_path}/run", "--workers", "0"])
    processor = mulcot.load_processor(args.model)
    stage = train.ChainStage(args, processor)
    items, _ = mulcot.training_items(args.data, args.images, stage.branches_of)
    model = train.build_model(args, stage, items)
    steps = iter(train.step_loader(args, items, processor, 0))
    with walk("a student's training step", 37):
        step = next(steps)
        counts = train.step_counts(step)
        for batch, examples in step:
            loss, _ = stage.loss(model, batch, examples, counts)
            loss.backward()


def test_a_predicted_batch(student, posts):
    """Labels by scoring and chains, from posts to rows."""
    with walk("a predicted batch", 33):
        generate.predict(*student, posts[:3], max_new_tokens=4)


def test_the_teachers_command(toy, tmp_path, serve):
    """Against a server, both stages, from the command line to the last line printed."""
    answer = chat(chain("positive"))
    server = serve(lambda request: answer)
    with walk("the teacher's command", 76):
        assert generate.main(["teacher", "--data", f"{toy}/posts.jsonl", "--model", "big",
                              "--endpoint", server.url, "--max-tries", "1", "--out",
                              f"{tmp_path}/chains.jsonl"]) == 0
