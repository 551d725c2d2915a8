"""The report in a real browser: it runs nothing but its own script, filters, and stays small."""

import base64
import fcntl
import html
import json
import os
import random
import re
import select
import shutil
import time
import zlib

import pytest
from PIL import Image

import eval as scores
import mulcot
from mulcot import FIELDS, LABELS, render_reasoning

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
         "--remote-debugging-pipe"]


class Browser:
    """Headless Chromium, driven by JSON messages over two pipes (the DevTools protocol)."""

    def __init__(self, folder):
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for _ in range(2) for end in os.pipe()]
        theirs_in, self.to, self.back, theirs_out = pipes
        log = os.open(folder / "chromium.log", os.O_WRONLY | os.O_CREAT)
        actions = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                   (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        argv = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", "about:blank"]
        self.pid = os.posix_spawn(CHROMIUM, argv, os.environ, file_actions=actions)
        for end in (theirs_in, theirs_out, log):
            os.close(end)
        self.buffer, self.count, self.session = b"", 0, None
        self.events = []
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of one protocol command; events on the way are kept in `events`."""
        self.count += 1
        message = dict(id=self.count, method=method, params=params)
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                if not select.select([self.back], [], [], 60)[0]:
                    pytest.fail(f"chromium did not answer {method} in 60 s")
                self.buffer += os.read(self.back, 1 << 20) or pytest.fail("chromium ended")
            line, self.buffer = self.buffer.split(b"\0", 1)
            reply = json.loads(line)
            if reply.get("id") == self.count:
                assert "result" in reply, reply
                return reply["result"]
            self.events.append(reply)

    def js(self, code):
        """The value of an expression, promises awaited."""
        got = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def open(self, path):
        """Loads a file and waits until its posts are there."""
        self.events = []
        self.call("Page.navigate", url=f"file://{path}")
        end = time.time() + 60
        while not self.js("document.body && document.body.dataset.ready"):
            assert time.time() < end, self.js("document.body.innerText.slice(-300)")
            time.sleep(0.02)

    def key(self, key, code=0, text=None):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=code, **({"text": text} if text else {}))

    def close(self):
        self.session = None
        self.call("Browser.close")
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("needs chromium or google-chrome")
    chromium = Browser(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chain(label, words="one two three"):
    return render_reasoning({k: f"{k[:4]} {words}" for k in FIELDS} | {"Prediction": label})


def report(folder, posts, rows, more=()):
    """Runs eval.py on gold posts and prediction rows; the page's path."""
    gold, said = write(folder / "gold.jsonl", posts), write(folder / "said.jsonl", rows)
    code = scores.main([f"run={said}", "--gold", str(gold), "--out", str(folder / "out"), *more])
    assert code == 0
    return folder / "out" / "report.html"


def cards(page):
    """The packed HTML of the posts."""
    packed = re.search(r"id=packed>([^<]*)<", page.read_text())[1]
    return zlib.decompress(base64.b64decode(packed)).decode()


def bare(page):
    """The page's bytes without thumbnails."""
    return re.sub(rb'data:image/jpeg;base64,[^"]*', b"", page.read_bytes())


# ---- nothing but its own script runs

DO = "document.title='hacked'"
EVIL = [f"<script>{DO}</script>", f'"><img src=x onerror="{DO}">', f"'><svg onload={DO}>",
        f"</style><script>{DO}</script>", f"</script><script>{DO}</script>", "</article></div>",
        f"]]><script>{DO}</script>", f"<!--<script>{DO}", "a\u2028b\u2029c", f"javascript:{DO}",
        f"<a href=javascript:{DO} autofocus onfocus={DO}>", f"`${{{DO}}}`", "\\u003cb>\\",
        "%3Cb%3E", "&lt;b&gt; &amp; & &#60;", "<link rel=stylesheet href=http://x.example/a.css>",
        "<meta http-equiv=refresh content='0;url=http://x.example'>", "a\0b", "</title><b>x",
        "<iframe srcdoc='<script>parent.document.title=1</script>'>", "{}", "<b>bold</b>"]
KNOWN = set("html head meta title style body header main footer nav section h1 h2 p div table "
            "thead tbody tr th td ul li article img small mark dl dt dd b i details summary a span "
            "form label input fieldset legend button output figure figcaption svg path text g "
            "polyline circle noscript script pre".split())


def evil_inputs(folder):
    """Every hostile string in every place that data can reach, and no others."""
    Image.new("RGB", (300, 200), "red").save(folder / "x.png")
    posts, rows, logs = [], [], []
    for i, evil in enumerate(EVIL):
        post = dict(id=f"{i}{evil}", text=f"so {evil} !", aspect=evil, label="neutral",
                    image="x.png", cot=evil)
        posts += [post, post | dict(id=str(i), aspect="so", cot=chain("neutral", evil))]
        row = dict(prediction="neutral", route=evil, reason=evil, label=evil, image=evil,
                   stages={evil: dict(prediction=evil, uncertainty=evil), "mllm": evil})
        rows += [row | dict(id=f"{i}{evil}", raw=evil, probs=[0.1, 0.2, 0.7]),
                 row | dict(id=str(i), raw=chain("positive", evil + "\ud83d"), model=evil)]
        logs.append({"run": evil, "step": i, f"ce_{evil}": 1 + i, "dev_accuracy": 0.5})
    cost = dict(passes=1, seconds=1, gflops=1, error=1)
    (folder / "said.cascade.json").write_text(json.dumps(dict(
        routes={evil: 1 for evil in EVIL}, runs={evil: cost for evil in EVIL}, curve=[[0, 1]])))
    return posts, rows, ["--logs", str(write(folder / "log.jsonl", logs))]


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evil")
    posts, rows, more = evil_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        inner = scores.report
        patch.setattr(scores, "report", lambda runs, rows, shown, *rest: inner(
            runs | {evil: TRUSTED for evil in EVIL[:8]}, rows + [[evil] * 3 for evil in EVIL],
            shown, *rest[:4], EVIL, *rest[5:]))
        return report(folder, posts, rows, more)


TRUSTED = dict(ece=0.1, reliability=[[0.5, 0.4, 3], [0.9, 1.0, 7]], aurc=0.2,
               risk_coverage=[[i / 200, i / 400] for i in range(1, 201)])


def test_hostile_strings_do_nothing(browser, evil_page):
    """They are seen as they are, and no script, request, element or attribute comes of them."""
    browser.open(evil_page)
    assert browser.js("document.title") == "run: MulCoT-RD report"
    assert set(browser.js("[...document.querySelectorAll('*')].map(e => e.localName)")) <= KNOWN
    names = browser.js("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in names if name.startswith("on")]
    assert set(browser.js("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
               ) <= {f"#{x}" for x in "summary diagnosis runs errors trust cost training "
                                            "posts".split()}
    shown = [evil.replace("\0", "") for evil in EVIL]
    texts = browser.js("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert sorted(texts) == sorted([f"so {evil} !" for evil in shown] * 2)
    assert browser.js("document.querySelectorAll('article').length") == 2 * len(EVIL)
    for place in (".route b", "pre", ".diagnosis li", "tbody th", "#training figcaption"):
        seen = browser.js(f"[...document.querySelectorAll({place!r})].map(e => e.textContent)")
        assert {" ".join(x.split()) for x in shown} <= {" ".join(x.split()) for x in seen}, place
    urls = {e["params"]["request"]["url"][:10] for e in browser.events
            if e["method"] == "Network.requestWillBeSent"}
    assert urls <= {"file:///" + str(evil_page)[1:3], "data:image"}, urls
    assert not [e for e in browser.events if e["method"] in ("Log.entryAdded",
                                                             "Runtime.exceptionThrown")]


def test_policy_holds_where_escaping_fails(browser, tmp_path, monkeypatch):
    """With no escaping at all the page's policy still lets nothing run and nothing load."""
    monkeypatch.setattr(scores, "escape", lambda text, quote=True: text)
    evil = [f'<img src=x onerror="{DO}">', "<img src=http://127.0.0.1:9/a.png>",
            f"<script>{DO}</script>", "<link rel=stylesheet href=http://127.0.0.1:9/a.css>",
            f"<iframe srcdoc=\"<script>parent.{DO}</script>\"></iframe>"]
    posts = [dict(id=str(i), text=x, label="neutral") for i, x in enumerate(evil)]
    logs = write(tmp_path / "log.jsonl", [{"run": x, "step": 1, "loss": 1.0} for x in evil])
    page = report(tmp_path, posts, [dict(id="0", prediction=None)], ["--logs", str(logs)])
    assert f"<script>{DO}</script>" in page.read_text()
    browser.open(page)
    assert browser.js("document.title") == "run: MulCoT-RD report"
    came = [e for e in browser.events if e["method"] == "Network.responseReceived"]
    assert all(e["params"]["response"]["url"].startswith(("file:", "about:")) for e in came)
    blocked = [e for e in browser.events if e["method"] == "Log.entryAdded"]
    assert len(blocked) >= 3  # the strings do try


def test_page_is_one_file(evil_page):
    """Nothing in it names another file or server, and one policy stands before everything else."""
    page = evil_page.read_text()
    assert page.index("Content-Security-Policy") < page.index("<title>") < page.index("<style>")
    assert not re.search(r"url\(|@import|http:|https:", scores.STYLE + scores.SCRIPT)
    assert page.count("data:image/jpeg") == 1  # the same image in all posts


# ---- filters and search


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Six posts that differ in all that can be filtered."""
    folder = tmp_path_factory.mktemp("small")
    posts = [dict(id=f"p{i}", text=f"text {i} of Rex", aspect="Rex", label=x, cot=chain(x))
             for i, x in enumerate(["positive"] * 2 + ["negative"] * 2 + ["neutral"] * 2)]
    said = [("positive", "positive"), ("negative", "positive"), ("negative", "neutral"),
            (None, "negative"), ("neutral", None), ("positive", "negative")]
    rows = [dict(id=f"p{i}", prediction=x, raw=chain(y, "Zürich") if y else "just prose",
                 probs=[0.25, 0.5, 0.25]) for i, (x, y) in enumerate(said)]
    rows[0] |= dict(route="ubm", reason="entropy 0.10 <= 0.30")
    return report(folder, posts, rows)


def ids(browser):
    return browser.js("[...document.querySelectorAll('article')].filter(a => a.checkVisibility())"
                      ".map(a => a.querySelector('.id').textContent).sort().join(' ')")


def click(browser, *values):
    for value in values:
        browser.js(f"document.querySelector('form [value={value}]').click()")


def counts(browser):
    return browser.js("Object.fromEntries([...document.querySelectorAll('form [type=checkbox]')]"
                      ".map(b => [b.value, +b.nextElementSibling.textContent]))")


CHOICES = {"wrong": "p1 p3 p5", "conflict": "p1 p2 p5", "unparsed": "p3 p4", "disagree": "p2 p5",
           "gold-positive": "p0 p1", "gold-negative": "p2 p3", "gold-neutral": "p4 p5",
           "label-positive": "p0 p5", "label-negative": "p1 p2", "label-neutral": "p4",
           "label-none": "p3", "wrong conflict": "p1 p5", "conflict disagree": "p2 p5",
           "wrong conflict disagree gold-neutral": "p5",
           "gold-positive gold-neutral": "p0 p1 p4 p5",
           "gold-positive label-negative": "p1", "wrong gold-negative gold-neutral": "p3 p5",
           "unparsed disagree": ""}


@pytest.mark.parametrize("choice", CHOICES)
def test_filters_show_and_hide(browser, small, choice):
    """Each filter, and several together: states and classes narrow, classes of one kind widen."""
    browser.open(small)
    click(browser, *choice.split())
    left = CHOICES[choice]
    assert ids(browser) == left
    assert browser.js("document.querySelector('#left').textContent") == (
        f"{len(left.split())} of 6 posts")
    click(browser, *choice.split())
    assert ids(browser) == "p0 p1 p2 p3 p4 p5"


def test_counts_say_what_a_box_would_leave(browser, small):
    """All posts at first, then those within what is chosen elsewhere."""
    browser.open(small)
    assert counts(browser) == {k: len(v.split()) for k, v in list(CHOICES.items())[:11]}
    click(browser, "gold-positive")
    got = counts(browser)
    assert (got["wrong"], got["conflict"], got["gold-neutral"], got["label-none"]) == (1, 1, 2, 0)


@pytest.mark.parametrize("words, left", [
    ("text 4", "p4"), ("ZÜRICH", "p0 p1 p2 p3 p5"), ("prose", "p4"), ("ubm entropy", "p0"),
    ("p5", "p5"), ("rex  nothing", ""), ("", "p0 p1 p2 p3 p4 p5"), (".*", ""), ("conflict", "")])
def test_search(browser, small, words, left):
    """Typed words must all occur in the post, its chains, its id or how it was decided."""
    browser.open(small)
    browser.js("document.querySelector('#search').focus()")
    browser.call("Input.insertText", text=words)
    assert ids(browser) == left


def test_clear(browser, small):
    """One button brings everything back."""
    browser.open(small)
    click(browser, "wrong")
    browser.js("document.querySelector('button').click()")
    browser.js("new Promise(done => setTimeout(done, 20))")
    assert ids(browser) == "p0 p1 p2 p3 p4 p5" and counts(browser)["wrong"] == 3


def test_keyboard(browser, small):
    """Tab reaches every control in the order of the page, the focus is seen, Space ticks a box, and
    the first stop leads straight to the posts."""
    browser.open(small)
    stops = []
    while len(stops) < 40:
        browser.key("Tab", 9)
        stop = browser.js("(e => e == document.body ? null : [e.localName, (e.value || e"
                          ".textContent).slice(0, 14), getComputedStyle(e).outlineStyle])"
                          "(document.activeElement)")
        if stop is None or stop in stops:
            break
        stops.append(stop)
    assert all(style == "solid" for *_, style in stops), stops
    assert stops[0][:2] == ["a", "skip to the po"]
    kinds = [kind for kind, *_ in stops]
    assert kinds.count("input") == 12 and {"a", "summary", "button", "div"} <= set(kinds)
    browser.open(small)
    browser.key("Tab", 9)
    browser.key("Enter", 13, "\r")
    assert browser.js("location.hash") == "#posts"
    for _ in range(3):  # search, clear, first box
        browser.key("Tab", 9)
    browser.key(" ", 32, " ")
    assert ids(browser) == "p1 p3 p5"


def test_labels_and_landmarks(browser, small):
    """Controls, images and charts have names; each landmark is there once."""
    browser.open(small)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {}
    for node in tree:
        role, name = (node.get(k, {}).get("value") for k in ("role", "name"))
        roles.setdefault(role, []).append(name)
    for role in ("banner", "main", "navigation", "search", "contentinfo"):
        assert len(roles.get(role, [])) == 1, role
    for role in ("checkbox", "searchbox", "button", "region", "link"):
        assert roles.get(role) and all(roles[role]), role
    assert browser.js("document.documentElement.lang") == "en"


# ---- looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, evil_page, scheme):
    """Every text stands out from its ground by 4.5 : 1 or more (WCAG AA), light and dark."""
    browser.call("Emulation.setEmulatedMedia",
                 features=[dict(name="prefers-color-scheme", value=scheme)])
    browser.open(evil_page)
    low = browser.js("""(() => {
      const rgb = color => { const ink = document.createElement("canvas").getContext("2d");
        ink.fillStyle = color; ink.fillRect(0, 0, 1, 1);
        return [...ink.getImageData(0, 0, 1, 1).data] };
      const bright = color => color.slice(0, 3).map(v => v / 255).map(v =>
        v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce(
        (sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const ground = e => { for (; e; e = e.parentElement) {
        const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] == 255) return c } };
      const low = {};
      for (const q of ["h1", "h2", ".dim", "nav a", ".tiles b", ".tiles small", "th", "tbody th",
                       "td", ".text", "mark", ".badge", "b.negative", "b.neutral", "b.positive",
                       "dt", "dd", ".said span", "small", "legend", "label", ".legend li",
                       "svg text", ".tiles small"]) {
        const e = document.querySelector(q); if (!e) continue;
        const style = getComputedStyle(e), svg = e.namespaceURI.endsWith("svg");
        const a = bright(rgb(svg ? style.fill : style.color)), b = bright(ground(e));
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < 4.5) low[q] = ratio }
      return low })()""")
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert low == {} and (ground == "rgb(244, 245, 247)") == (scheme == "light")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_sideways_scrolling(browser, evil_page, width):
    """The page fits a phone; only tables scroll, within their box."""
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800,
                 deviceScaleFactor=1, mobile=width < 800)
    browser.open(evil_page)
    wide = browser.js("document.documentElement.scrollWidth")
    browser.call("Emulation.clearDeviceMetricsOverride")
    assert wide <= width


# ---- size and speed


def test_three_thousand_posts(browser, tmp_path):
    """Opened, filtered and searched in well under the blink of a loaded machine."""
    words = " ".join(f"word{i}" for i in range(60))
    posts = [dict(id=str(i), text=f"post {i} {words}", label=LABELS[i % 3])
             for i in range(3000)]
    rows = [dict(id=str(i), prediction=LABELS[i % 2], raw=chain("positive", f"nr{i % 7} {words}"))
            for i in range(3000)]
    page = report(tmp_path, posts, rows, ["--cards", "5000"])
    began = time.time()
    browser.open(page)
    opened = time.time() - began
    assert len(browser.js("document.querySelector('#left').textContent").split()) == 4
    took = browser.js("""(() => { const began = performance.now();
      document.querySelector("[value=wrong]").click();
      document.querySelector("#search").value = "nr3 post";
      document.querySelector("form").dispatchEvent(new Event("input"));
      document.querySelector("article").getBoundingClientRect();
      return performance.now() - began })()""")
    wrong = [i for i in range(3000) if i % 3 != i % 2 and i % 7 == 3]
    left = browser.js("document.querySelector('#left').textContent")
    assert left == f"{len(wrong)} of 3000 posts"
    assert len(ids(browser).split()) == len(wrong)
    print(f"3,000 posts: open {opened:.2f} s, two filters {took:.0f} ms, {len(bare(page)):,} bytes")
    assert opened < 6 and took < 1500


@pytest.fixture(scope="module")
def toy_page(tmp_path_factory):
    """200 posts of the embedded default with chains, references, probabilities and curves."""
    folder = tmp_path_factory.mktemp("size")
    posts = mulcot.toy_posts(folder / "images", {"test": 200})
    teacher, rng, gold, rows = mulcot.ToyTeacher(), random.Random(0), [], []
    for post in posts:
        messages = mulcot.build_messages(post, "predict")
        raw = [teacher(mulcot.Request(post, messages, t, 512)).text for t in (0.0, 0.7)]
        gold.append(post.row() | dict(cot=raw[0]))
        rows.append(dict(id=post.id, prediction=rng.choice(LABELS), raw=raw[1],
                         probs=[rng.random() for _ in LABELS]))
    logs = [{"run": run, "step": step, "loss": rng.random()} | {
        f"{kind}_{task}": rng.random() for kind in ("ce", "kl") for task in ("reason", "label")}
        for run in ("base/assistant", "base/student", "assistant", "student") for step in range(20)]
    logs += [dict(run="student", step=19, dev_accuracy=1.0)]
    return report(folder, gold, rows, ["--logs", str(write(folder / "log.jsonl", logs))])


def test_size(toy_page):
    """At most 100 KB plus thumbnails for the default number of posts."""
    assert cards(toy_page).count("<article") == 200
    assert len(bare(toy_page)) < 100_000
    urls = re.findall(r"data:image/jpeg;base64,[^\"]*", toy_page.read_text())
    assert len(urls) == len(set(urls)) and all(len(url) < 20_000 for url in urls)


def test_long_chains_leave_room_for_fewer_posts(tmp_path):
    """Each of 300 posts with a chain of its own 240 words: below 100 KB, unless asked for more."""
    rng = random.Random(0)
    words = lambda: " ".join("".join(rng.choices("etaoinsr", k=6)) for _ in range(60))
    posts = [dict(id=f"p{i:03}", text="t", label="neutral", cot=chain("neutral", words()))
             for i in range(300)]
    rows = [dict(id=f"p{i:03}", prediction="positive" if i == 299 else "neutral",
                 raw=chain("neutral", words())) for i in range(300)]
    page = report(tmp_path, posts, rows)
    shown = re.findall("class=id>(p...)<", cards(page))
    assert 20 < len(shown) < 200 and shown[:2] == ["p299", "p000"] and len(bare(page)) < 100_000
    assert cards(report(tmp_path, posts, rows, ["--cards", "250"])).count("<article") == 250


def test_images_and_curves_are_seen(browser, toy_page):
    """Each post shows its own thumbnail; a chart for each training run."""
    browser.open(toy_page)
    seen = browser.js("(async () => { const images = [...document.images];"
                      "await Promise.all(images.map(i => i.decode()));"
                      "return images.map(i => i.naturalWidth) })()")
    assert seen == [56] * 200
    titles = browser.js("[...document.querySelectorAll('#training figcaption')]"
                        ".map(e => e.textContent)")
    assert titles == ["base/assistant", "base/student", "assistant", "student", "dev accuracy"]


# ---- what it shows


def test_a_case_by_hand(small):
    """Verdicts, flags, field names and both chains of one post."""
    inner = next(x for x in cards(small).split("</article>") if "p5" in x)
    assert 'data-is="wrong conflict disagree gold-neutral label-positive"' in inner
    text = " ".join(re.sub("<[^>]*>", " ", inner).split())
    assert text.startswith("gold neutral label positive chain negative teacher neutral")
    assert "negative&nbsp;25.0%" in text and "p5 wrong conflict disagree text 5 of Rex" in text
    assert "Text analysis Text Zürich Text one two three" in text
    assert "decided by <b>ubm</b>: entropy 0.10 &lt;= 0.30" in cards(small)


def test_wrong_posts_first_then_flagged(small):
    """Wrong ones, then those with another flag, then the rest; as many as --cards says."""
    assert re.findall(r"class=id>(p\d)", cards(small)) == ["p1", "p3", "p5", "p2", "p4", "p0"]


def test_equal_fields_stand_once():
    """A field that student and teacher word alike is shown once and says so."""
    ours, theirs = (mulcot.parse_reasoning(chain("neutral", x)) for x in ("a", "b"))
    assert scores.chain_list(ours, ours).count("<dd class=same>") == 5
    assert scores.chain_list(ours, theirs).count("<dd class=told>") == 4
    assert scores.chain_list(ours, None).count("<dd>") == 5
    assert scores.chain_list(None, theirs).count("<dd class=told>") == 5
    assert scores.chain_list(None, None) == ""


@pytest.mark.parametrize("aspect", ["amp", "lt", "quot", "x27", "R"])
def test_aspect_is_marked_without_breaking_the_text(tmp_path, aspect):
    """An aspect that is also the name of an HTML entity marks words, not the escapes."""
    text = "R & D <3 \"fun\" it's amp lt quot x27"
    page = report(tmp_path, [dict(id="1", text=text, aspect=aspect, label="neutral")],
                  [dict(id="1", prediction="neutral")])
    inner = re.search("<p class=text>(.*?)</p>", cards(page))[1]
    assert inner.count(f"<mark>{aspect}</mark>") == 1
    assert html.unescape(re.sub("</?mark>", "", inner)) == text


def test_page_without_extras(browser, tmp_path):
    """No chains, probabilities, images, logs or diagnosis: their parts are left out."""
    page = report(tmp_path, [dict(id="1", text="t", label="neutral")],
                  [dict(id="1", prediction="neutral")])
    browser.open(page)
    assert browser.js("[...document.querySelectorAll('h2')].map(e => e.textContent)") == [
        "Summary", "Runs", "Errors", "Posts"]
    assert ids(browser) == "1"


@pytest.mark.parametrize("top, steps", [
    (1, [0, 0.25, 0.5, 0.75, 1]), (300, [0, 100, 200, 300]), (1.01, [0, 0.5, 1, 1.5]),
    (0.03, [0, 0.01, 0.02, 0.03]), (9, [0, 2.5, 5, 7.5, 10]), (10, [0, 2.5, 5, 7.5, 10])])
def test_ticks(top, steps):
    """Round steps that reach the largest value."""
    assert scores.ticks(top) == pytest.approx(steps)


@pytest.mark.parametrize("values", [
    [1.0], [1.0, 1.0], [1e-9, 1e9], [0.0, 2.0], [float("nan"), 3.0], [float("inf"), 3.0], [-1, 3.0],
    [1e-300, 1e300], [9.99, 10.01]])
@pytest.mark.parametrize("log", [False, True])
def test_plot_keeps_points_within_its_frame(values, log):
    """Whatever the numbers, every point drawn lies between the axes, and few ticks are."""
    art = scores.plot("t", {"a": [(i, v, 0) for i, v in enumerate(values)]}, "x", "y", log=log)
    points = [tuple(map(float, p.split(","))) for p in re.search('points="(.*?)"', art)[1].split()]
    assert points and all(38 <= x <= 310 and 20 <= y <= 176 for x, y in points), points
    assert art.count("<path class=grid") < 12 and "nan" not in art


def test_plots_say_what_they_are_given():
    """A point at (0.5, 1) of a square plot, sizes by weight, the legend; nothing of nothing."""
    art = scores.trust_plots({"a": TRUSTED, "b": {}})
    assert "a (ECE 0.100)" in art and "a (AURC 0.200)" in art and ">b" not in art
    assert '<circle cx=174.0 cy=113.6 r=3.7 />' in art
    assert len(re.findall(r"[\d.]+,[\d.]+ ", art)) < 60  # 200 points are thinned
    assert scores.plot("t", {"a": []}, "x", "y") == scores.trust_plots({"b": {}}) == ""


def test_numbers_of_several_seeds():
    """Means, even of counts, with intervals; a cell that is significantly best in bold."""
    labels = dict(scores.majority_metrics(["neutral"]), intervals=dict(accuracy=[0.9, 0.975]))
    post = mulcot.Post("1", "t", label="neutral")
    page = scores.report({"majority": labels, "a": labels | dict(unparsed=1.5, seeds=[labels] * 3)},
                         [["run", "accuracy"], ["a", "**0.9 ± 0.1**"]], ("a", {}, [post]), {}, 9,
                         {"bleu4": "how <it> is done"}, {}).decode()
    assert "<b>1.5</b>" in page and "95 %: 90.0% to 97.5%" in page and "3 seeds" in page
    assert "<td><b>0.9 ± 0.1</b>" in page and "<li>how &lt;it&gt; is done" in page


def test_cost_of_a_cascade(tmp_path):
    """The table and the curve of NAME.cascade.json, and what each stage said of a post."""
    stages = dict(ubm=dict(prediction="neutral", uncertainty=0.5), mllm="HTTP <500>")
    about = dict(routes=dict(ubm=1), curve=[[0, 0.5], [1, 0.25]], runs=dict(
        cascade=dict(passes=0.5, seconds=0.002, gflops=0.125, error=0.375),
        ubm=dict(passes=0, seconds=0.001, gflops=0.1)))
    (tmp_path / "said.cascade.json").write_text(json.dumps(about))
    page = report(tmp_path, [dict(id="1", text="t", label="neutral")],
                  [dict(id="1", prediction="neutral", route="ubm", reason="sure", stages=stages)])
    text = page.read_text()
    assert "<tr><th scope=row>run: cascade<td>0.50<td>2.0<td>0.125<td>0.375" in text
    assert "<tr><th scope=row>run: ubm<td>0.00<td>1.0<td>0.100<td>" in text
    assert "error by cost" in text and "run: each budget" in text and "run: 1 by ubm" in text
    assert "ubm neutral, uncertainty 0.5; mllm failed" in cards(page)


@pytest.mark.parametrize("content", ['{"loss": 1}', '{"step": "1"}', "[1]", "nonsense",
                                     '{"step": -1}'])
def test_bad_log(tmp_path, capsys, content):
    """A log that is none: exit code 2 and one line; so for a file that is not there."""
    log = tmp_path / "log.jsonl"
    gold = write(tmp_path / "g.jsonl", [dict(id="1", text="t", label="neutral")])
    said = write(tmp_path / "s.jsonl", [dict(id="1", prediction="neutral")])
    run = [str(said), "--gold", str(gold), "--out", str(tmp_path / "out"), "--logs", f"a={log}"]
    assert scores.main(run) == 2
    log.write_text(content + "\n")
    assert scores.main(run) == 2
    assert capsys.readouterr().err.count("error: ") == 2 and not (tmp_path / "out").exists()


def test_logs_are_named(tmp_path):
    """By NAME=, else by the row's own run, else by the folder."""
    log = write(tmp_path / "log.jsonl", [dict(step=1, loss=1.0)])
    both = write(tmp_path / "both.jsonl", [dict(step=1, run="x"), dict(step=2, run="y")])
    assert list(scores.training_logs([f"a={log}", str(log), str(both)])) == [
        "a", tmp_path.name, "x", "y"]
