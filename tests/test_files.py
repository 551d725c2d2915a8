"""What happens to researchers: two runs on one --out, a full disk or GPU, NaN, broken rows
and copies."""

import contextlib
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT

import generate
import mulcot
from mulcot import InputError, read_rows, write_rows


@contextlib.contextmanager
def another_run(out):
    """A process that is at work on this --out."""
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import mulcot, argparse\n"
            "def stage(args): print('on', flush=True); time.sleep(60)\n"
            f"sys.exit(mulcot.run_stage(stage, argparse.Namespace(out={str(out)!r})))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    yield
    process.kill()
    process.wait()


def test_the_second_run_is_refused(tmp_path, capsys):
    """One line, exit 2 and nothing done while another process runs, also through a link; after its
    kill -9 the stage runs, within another stage too. Dry runs lock nothing."""
    out, link, ran = tmp_path / "new/out", tmp_path / "link", []
    link.symlink_to(out)
    with another_run(out):
        assert mulcot.run_stage(ran.append, Namespace(out=str(link))) == 2 and not ran
        assert capsys.readouterr().err.startswith("error: another run is at work on --out")
        assert mulcot.run_stage(ran.append, Namespace(out=str(out), dry_run=True)) == 0 and ran
    nested = lambda args: mulcot.run_stage(ran.append, args)  # as tests/demo.py runs stages
    assert mulcot.run_stage(nested, Namespace(out=str(out))) == 0 and len(ran) == 2


def test_a_full_gpu_or_disk_is_one_line(toy, tmp_path, monkeypatch, capsys):
    """What to lower stands beside torch's own words; a full disk also where a library calls it
    something else; and a path that cannot be written."""
    def stage(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    assert mulcot.run_stage(stage, Namespace(out=str(tmp_path / "x"))) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: CUDA out of memory") and "lower --batch" in err
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    argv = ["--model", str(toy / "student"), "--out"]
    assert generate.main(["export", *argv, str(tmp_path / "out")]) == 2
    assert "cannot be written: No space left" in capsys.readouterr().err
    argv += ["/proc/nowhere/x.jsonl", "--data", str(toy / "posts.jsonl"), "--no-chain"]
    assert generate.main(["predict", *argv]) == 2 and "error: " in capsys.readouterr().err


def test_no_file_holds_nan(tmp_path):
    """Rows name their post; the file is as it was."""
    file, row = tmp_path / "x.jsonl", dict(id="7", probs=[float("nan")])
    writer = generate.RowWriter(file)
    for write in (writer.write, lambda row: write_rows(file, [row])):
        with pytest.raises(InputError, match="x.jsonl.*post 7 .*is a model damaged"):
            write(row)
    with pytest.raises(InputError, match="x.jsonl"):
        mulcot.write_json(file, row)
    assert file.read_bytes() == b""


@pytest.mark.parametrize("how", [["--no-chain"], ["--max-new-tokens", "2"],
                                 ["--decode", "greedy", "--max-new-tokens", "2"]])
def test_a_model_that_yields_nan_stops(how, toy, tmp_path, capsys, monkeypatch):
    """Never "negative" and exit 0."""
    model, processor = mulcot.load_model(toy / "student")
    model.get_input_embeddings().weight.data[:] = torch.nan
    monkeypatch.setattr(generate, "load_trained", lambda *_: (model, processor))
    out, argv = tmp_path / "p.jsonl", ["predict", "--model", "x", *how]
    assert generate.main([*argv, "--data", str(toy / "posts.jsonl"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "damaged?" in error and read_rows(out) == []
    assert generate.main([*argv, "--text", "so dismal"]) == 2


@pytest.mark.parametrize("line", [b"5", b"null", b'{"id": "b"', b"\xff"])
def test_a_broken_row_is_named(tmp_path, line):
    """In the middle of a file of ours, as an editor or a bad copy leaves it."""
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "a"}\n' + line + b'\n{"id": "c"}\n')
    for read in (read_rows, generate.RowWriter):
        with pytest.raises(InputError, match="a.jsonl:2: "):
            read(tmp_path / "a.jsonl")


def test_a_single_post_is_checked_as_one_in_a_file(toy, capsys):
    for more in (["t" * 10_001], [" "], ["t", "--image", "nowhere.png"]):
        assert generate.main(["predict", "--model", str(toy / "student"), "--text", *more]) == 2
        assert capsys.readouterr().err.startswith("error: ")
