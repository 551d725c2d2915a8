"""Speed, measured side by side. Not a test: `python tests/bench.py teacher`.

teacher: `generate.py teacher` against a server on this machine that takes 200 ms for each call and
has no limit, with 1, 8 and 32 workers; the ceiling is workers / 0.2 s.

nf4: forward and backward through 4 frozen linears of 2048 x 2048: ours, bitsandbytes' and dense
ones, on the same device, in turns.
"""

import argparse
import json
import multiprocessing
import os
import re
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


def nf4(_):
    """Milliseconds of one forward and backward (the input's gradient), medians of 15 rounds; the
    ratio is the median of the rounds' own, which a busy machine disturbs less."""
    import statistics

    import bitsandbytes
    import torch

    from mulcot import NF4Linear

    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    for dtype in (torch.float32, torch.bfloat16):
        dense = [torch.nn.Linear(2048, 2048, bias=False, dtype=dtype).requires_grad_(False)
                 for _ in range(4)]
        theirs = [bitsandbytes.nn.Linear4bit(2048, 2048, False, dtype, compress_statistics=False,
                                             quant_type="nf4") for _ in dense]
        for a, b in zip(theirs, dense):
            a.load_state_dict(b.state_dict())
        ours = [NF4Linear(layer) for layer in dense]
        stacks = [torch.nn.Sequential(*x).to(device).train() for x in (ours, theirs, dense)]
        for tokens in (64, 512):
            x = torch.randn(tokens, 2048, dtype=dtype, device=device, requires_grad=True)
            times, found = [[] for _ in stacks], []
            for _ in range(16):  # the first round warms up
                for stack, seconds in zip(stacks, times):
                    began, x.grad = time.perf_counter(), None
                    stack(x).sum().backward()
                    found.append(x.grad.sum().item())  # waits for a GPU, too
                    seconds.append(time.perf_counter() - began)
            assert found[-3] == found[-2] != found[-1], found[-3:]  # ours, theirs, dense
            medians = [1000 * statistics.median(seconds[1:]) for seconds in times]
            ratio = statistics.median(a / b for a, b in zip(times[0][1:], times[1][1:]))
            rows.append((device, str(dtype)[6:], tokens, *(f"{t:.1f}" for t in medians),
                         f"{ratio:.2f}"))
    return ("device", "dtype", "tokens", "ours ms", "bitsandbytes ms", "dense ms",
            "ours / bitsandbytes"), rows


def main(argv=None):
    """Prints one table per subject."""
    subjects = dict(teacher=teacher, nf4=nf4)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("subject", choices=tuple(subjects), help="what to measure")
    args = parser.parse_args(argv)
    head, rows = subjects[args.subject](args)
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
