"""Speed, measured side by side. Not a test: `python tests/bench.py teacher`.

teacher: `generate.py teacher` against a server on this machine that takes 200 ms for each call and
has no limit, with 1, 8 and 32 workers; the ceiling is workers / 0.2 s.

metrics: all chain metrics of eval.py but Sim against sacrebleu, rouge and nltk one after another,
one process each, on the same pairs; only ours also count Distinct, agreement and the like.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Slow(BaseHTTPRequestHandler):
    """A right and whole answer after 200 ms; the label stands in the post's text."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet, as real servers send them (no 40 ms of Nagle)

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        label = re.search(r"label is (\w+)", text)[1]
        names = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion")
        chain = "\n".join(f'"{n}": "{"word " * 40}"' for n in names) + f'\n"Prediction": "{label}"'
        reply = dict(choices=[dict(message=dict(content=chain), finish_reason="stop")],
                     usage=dict(prompt_tokens=500, completion_tokens=250))
        data = json.dumps(reply).encode()
        time.sleep(0.2)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def server(connection):
    ThreadingHTTPServer.request_queue_size = 128
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    connection.send(httpd.server_port)
    httpd.serve_forever()


def teacher(_):
    """Kept posts per second for 1, 8 and 32 workers, and peak memory for 1,000 and 10,000 posts."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=server, args=(theirs,), daemon=True)
    process.start()
    port, rows = ours.recv(), []
    with tempfile.TemporaryDirectory() as folder:
        from PIL import Image

        Image.effect_noise((280, 280), 90).convert("RGB").save(f"{folder}/x.jpg")
        for workers, posts in ((1, 40), (8, 320), (32, 1280), (32, 5120)):
            lines = (dict(id=i, text=f"post {i} whose label is neutral", image="x.jpg",
                          label="neutral") for i in range(posts))
            data = Path(folder, f"{workers}-{posts}.jsonl")
            data.write_text("".join(json.dumps(row) + "\n" for row in lines))
            code = ("import sys, time, resource as r, generate; t = time.time(); "
                    "generate.main(sys.argv[1:]); "
                    "print(time.time() - t, r.getrusage(r.RUSAGE_SELF).ru_maxrss)")
            out = subprocess.run(
                [sys.executable, "-c", code, "teacher", "--data", str(data), "--images", folder,
                 "--endpoint", f"http://127.0.0.1:{port}/v1", "--model", "slow", "--workers",
                 str(workers), "--out", f"{folder}/{workers}-{posts}.out.jsonl"], cwd=ROOT,
                capture_output=True, text=True, check=True)
            seconds, memory = map(float, out.stdout.split("\n")[-2].split())
            rate, ceiling = posts / seconds, workers / 0.2
            rows.append((workers, posts, f"{rate:.1f}", f"{rate / ceiling:.2f}",
                         f"{memory / 1024:.0f}"))
    process.terminate()
    return ("workers", "posts", "posts/s", "of workers/0.2 s", "peak MiB"), rows


def chain_pairs(n):
    """({id: row}, {id: reference}): chains of real posts where they exist, else of as many made-up
    words, each beside another one's with a third of the words dropped."""
    real = ROOT.parent / "shared" / "data" / "twitter2015" / "dev_chains.json"
    rng, names = random.Random(0), ("Text_analysis", "Image_analysis", "Conflict_resolution",
                                    "Final_conclusion")
    if real.exists():
        chains = [row["cot"] for row in json.loads(real.read_text(encoding="utf-8"))]
    else:
        words = [f"w{round(rng.paretovariate(0.5))}" for _ in range(20000)]
        text = lambda: ". ".join(" ".join(rng.sample(words, 17)) for _ in range(3))
        chains = ["\n".join(f'"{name}": "{text()}."' for name in names) for _ in range(1000)]
        chains = [f'{text}\n"Prediction": "neutral"' for text in chains]
    thinned = lambda text: re.sub(r"(?<= )\w+ ", lambda m: m[0] * (rng.random() < 0.67), text)
    return ({i: dict(raw=thinned(chains[i % len(chains)]), prediction="neutral") for i in range(n)},
            {i: chains[i % len(chains)] for i in range(n)})


def ours(rows, references):
    """All chain metrics but Sim -> the means that the libraries have too."""
    from eval import chain_metrics

    out = chain_metrics(rows, references)
    return [out[k] for k in ("bleu4", "bleu4_corpus", "rouge_l", "meteor")]


def theirs(rows, references):
    """sacrebleu, rouge and nltk, without synonyms."""
    import logging
    from types import SimpleNamespace

    import sacrebleu
    from nltk.tokenize import TreebankWordTokenizer
    from nltk.translate.meteor_score import single_meteor_score
    from rouge import Rouge

    from eval import chain_text
    from mulcot import parse_reasoning

    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    text = lambda raw: chain_text(parse_reasoning(raw))
    pairs = [(text(row["raw"]), text(references[i])) for i, row in rows.items()]
    judge, tokens = Rouge(metrics=["rouge-l"]), TreebankWordTokenizer().tokenize
    none = SimpleNamespace(synsets=lambda word: [])
    mean = lambda values: sum(values) / len(pairs)
    return [mean(sacrebleu.sentence_bleu(p, [r], smooth_method="none", use_effective_order=False)
                 .score / 100 for p, r in pairs),
            sacrebleu.corpus_bleu([p for p, _ in pairs], [[r for _, r in pairs]]).score / 100,
            mean(judge.get_scores(p, r)[0]["rouge-l"]["f"] for p, r in pairs),
            mean(single_meteor_score(tokens(r.lower()), tokens(p.lower()), wordnet=none)
                 for p, r in pairs)]


def timed(connection, work, n):
    """Sends (CPU seconds of this one process, MiB that the work itself added, its result)."""
    import eval  # noqa: F401, so that its start is not timed

    pairs = chain_pairs(n)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, began = peak(), time.process_time()
    result = work(*pairs)
    connection.send((time.process_time() - began, peak() - before, result))


def metrics(_):
    """Seconds and memory for 1,000 and 10,000 pairs; the libraries' time beside it."""
    rows = []
    for n in (1000, 10000):
        told = []
        for work in (ours, theirs):
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=timed,
                                                                   args=(there, work, n))
            process.start()
            there.close()  # so that recv ends if the process dies
            told.append(here.recv())
            process.join()
        (a, memory, mine), (b, _, others) = told
        apart = max(abs(x - y) for x, y in zip(mine, others))
        rows.append((n, f"{a:.1f}", f"{b:.1f}", f"{b / a:.1f}", f"{memory:.0f}", f"{apart:.0e}"))
    return ("pairs", "ours, CPU s", "libraries, CPU s", "times faster", "ours, MiB added",
            "largest difference of a mean"), rows


def main(argv=None):
    """Prints one table per subject."""
    subjects = dict(teacher=teacher, metrics=metrics)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("subject", choices=tuple(subjects), help="what to measure")
    args = parser.parse_args(argv)
    head, rows = subjects[args.subject](args)
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
