"""The report in a real browser: it runs nothing but its own script, shows and filters the posts."""

import fcntl
import html
import json
import os
import random
import re
import select
import shutil
import time

import pytest
from PIL import Image

import eval as scores
import mulcot
from mulcot import FIELDS, LABELS, render_reasoning
from toy import ToyTeacher, toy_posts

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
        """Loads a file and waits until its posts are there. Through an empty page, so that a busy
        machine cannot take the page before, perhaps the same one, for it."""
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href == 'about:blank'")
        self.events = []
        self.call("Page.navigate", url=f"file://{path}")
        self.wait("document.readyState == 'complete' && document.forms[0]?.left.value")

    def wait(self, condition):
        """Until a JavaScript expression holds."""
        end = time.time() + 60
        while not self.js(condition):
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


def report(folder, posts, rows, more=(), **others):
    """Runs eval.py on gold posts and prediction rows, also of other runs; the page's path."""
    gold, files = write(folder / "gold.jsonl", posts), []
    for i, (name, own) in enumerate({"run": rows, **others}.items()):
        files.append(f"{name}={write(folder / f'{i}.jsonl', own)}")
    assert scores.main([*files, "--gold", str(gold), "--out", str(folder / "out"), *more]) == 0
    return folder / "out" / "report.html"


# ---- nothing but its own script runs

DO = "document.title='hacked'"
EVIL = [f"<script>{DO}</script>", f'"><img src=x onerror="{DO}">', f"'><svg onload={DO}>",
        f"</style><script>{DO}</script>", f"</script><script>{DO}</script>", "</article></div>",
        f"]]><script>{DO}</script>", f"<!--<script>{DO}", "a\u2028b\u2029c", f"javascript:{DO}",
        f"<a href=javascript:{DO} autofocus onfocus={DO}>", f"`${{{DO}}}`", "\\u003cb>\\",
        "%3Cb%3E", "&lt;b&gt; &amp; & &#60;", "<link rel=stylesheet href=http://x.example/a.css>",
        "<meta http-equiv=refresh content='0;url=http://x.example'>", "a\0b", "</title><b>x",
        "<iframe srcdoc='<script>parent.document.title=1</script>'>", "{}", "<b>bold</b>"]
KNOWN = set("html head meta title style body h1 h2 p b br small code div span table tbody tr th td "
            "details summary figure svg path text g circle polyline i form label input button "
            "output article a img mark dl dt dd script".split())


def evil_inputs(folder):
    """Every hostile string in every place that data can reach, and no others."""
    Image.new("RGB", (300, 200), "red").save(folder / "x.png")
    posts, rows = [], []
    for i, evil in enumerate(EVIL):
        post = dict(id=f"{i}{evil}", text=f"so {evil} !", aspect=evil, label="neutral",
                    image="x.png", cot=evil)
        posts += [post, post | dict(id=str(i), aspect="so", cot=chain("neutral", evil))]
        row = dict(prediction="neutral", label=evil, image=evil, source=evil, route=evil,
                   reason=evil, stages=evil)
        rows += [row | dict(id=f"{i}{evil}", raw=evil, probs=[0.1, 0.7, 0.2]),
                 row | dict(id=str(i), raw=chain("positive", evil + "\ud83d"), model=evil)]
    return posts, rows


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory):
    """A page of hostile posts, chains, routes, names and diagnoses."""
    folder = tmp_path_factory.mktemp("evil")
    posts, rows = evil_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "diagnose", lambda runs, teacher: EVIL)
        return report(folder, posts, rows, **{"</b><script>\"'&": rows})


def test_hostile_strings_do_nothing(browser, evil_page):
    """They are seen as they are, and no script, request, element or attribute comes of them."""
    browser.open(evil_page)
    assert browser.js("document.title") == "MulCoT-RD: run"
    assert set(browser.js("[...document.querySelectorAll('*')].map(e => e.localName)")) <= KNOWN
    names = browser.js("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in names if name.startswith("on")]
    shown = [evil.replace("\0", "") for evil in EVIL]
    texts = browser.js("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert sorted(texts) == sorted([f"so {evil} !" for evil in shown] * 2)
    assert browser.js("document.querySelectorAll('article').length") == 2 * len(EVIL)
    for place in ("article a", "dl", "article p", ".note"):
        seen = browser.js(f"[...document.querySelectorAll({place!r})].map(e => e.textContent)")
        seen = " ".join(" ".join(seen).split())
        assert not [evil for evil in shown if " ".join(evil.split()) not in seen], place
    urls = {e["params"]["request"]["url"][:10] for e in browser.events
            if e["method"] == "Network.requestWillBeSent"}
    assert urls <= {"file:///" + str(evil_page)[1:3], "data:image"}, urls
    assert not [e for e in browser.events if e["method"] in ("Log.entryAdded",
                                                             "Runtime.exceptionThrown")]


def test_policy_holds_where_escaping_fails(browser, tmp_path, monkeypatch):
    """With no escaping at all the page's policy still lets nothing run and nothing load."""
    monkeypatch.setattr(scores, "escape", lambda text: text)
    evil = [f'<img src=x onerror="{DO}">', "<img src=http://127.0.0.1:9/a.png>",
            f"<script>{DO}</script>", "<link rel=stylesheet href=http://127.0.0.1:9/a.css>",
            f"<iframe srcdoc=\"<script>parent.{DO}</script>\"></iframe>"]
    posts = [dict(id=str(i), text=x, label="neutral") for i, x in enumerate(evil)]
    page = report(tmp_path, posts, [dict(id="0", prediction=None)])
    assert f"<script>{DO}</script>" in page.read_text()
    browser.open(page)
    assert browser.js("document.title") == "MulCoT-RD: run"
    came = [e for e in browser.events if e["method"] == "Network.responseReceived"]
    assert all(e["params"]["response"]["url"].startswith(("file:", "about:")) for e in came)
    blocked = [e for e in browser.events if e["method"] == "Log.entryAdded"]
    assert len(blocked) >= 3  # the strings do try


def test_page_is_one_file(evil_page):
    """Nothing in it names another file or server, and one policy stands before everything else."""
    page = evil_page.read_text()
    assert page.index("Content-Security-Policy") < page.index("<title>") < page.index("<style>")
    assert not re.search(r"url\(|@import|http:|https:", scores.STYLE + scores.SCRIPT)
    assert page.count("data:image/jpeg") == 2 * len(EVIL)


# ---- filters and search


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Six posts that differ in all that can be filtered."""
    folder = tmp_path_factory.mktemp("small")
    posts = [dict(id=f"p{i}", text=f"text {i} of Rex", aspect="Rex", label=x, cot=chain(x))
             for i, x in enumerate(["positive"] * 2 + ["negative"] * 2 + ["neutral"] * 2)]
    predicted = [("positive", "positive"), ("negative", "positive"), ("negative", "neutral"),
                 (None, "negative"), ("neutral", None), ("positive", "negative")]
    rows = [dict(id=f"p{i}", prediction=x, raw=chain(y, "Zürich") if y else "just prose",
                 probs=[0.25 + (k == (x or "neutral")) / 4 for k in LABELS]) for i, (x, y) in enumerate(predicted)]
    return report(folder, posts, rows)


def ids(browser):
    """The posts that are seen."""
    return browser.js("[...document.querySelectorAll('article')].filter(a => a.checkVisibility())"
                      ".map(a => a.querySelector('a').textContent).sort().join(' ')")


def sees(browser, left):
    """Whether these posts are seen, at the latest when the page's handler has had 10 s."""
    end = time.time() + 10
    while ids(browser) != left and time.time() < end:
        time.sleep(0.02)
    return ids(browser) == left


def click(browser, *values):
    for value in values:
        browser.js(f"document.querySelector(`form [value=\"{value}\"]`).click()")


WRONG, CONFLICT, UNPARSED, DISAGREE, ONE_RIGHT = scores.FLAGS
CHOICES = [
    ([WRONG], "p1 p3 p5"), ([CONFLICT], "p1 p2 p5"), ([UNPARSED], "p3 p4"), ([DISAGREE], "p2 p5"),
    (["gold positive"], "p0 p1"), (["gold negative"], "p2 p3"), (["gold neutral"], "p4 p5"),
    (["label positive"], "p0 p5"), (["label negative"], "p1 p2"), (["label neutral"], "p4"),
    ([WRONG, CONFLICT], "p1 p5"), ([CONFLICT, DISAGREE], "p2 p5"),
    ([WRONG, CONFLICT, DISAGREE, "gold neutral"], "p5"),
    (["gold positive", "label negative"], "p1"), ([UNPARSED, DISAGREE], ""),
    (["gold positive", "gold neutral"], "")]


@pytest.mark.parametrize("choice, left", CHOICES)
def test_filters_show_and_hide(browser, small, choice, left):
    """Each filter, and several together: what is ticked must all hold."""
    browser.open(small)
    click(browser, *choice)
    assert sees(browser, left)
    assert browser.js("document.querySelector('output').value") == (
        f"{len(left.split())} of 6 posts")
    click(browser, *choice)
    assert sees(browser, "p0 p1 p2 p3 p4 p5")


@pytest.mark.parametrize("words, left", [
    ("text 4", "p4"), ("ZÜRICH", "p0 p1 p2 p3 p5"), ("prose", "p4"), ("p5", "p5"),
    ("rex  nothing", ""), ("", "p0 p1 p2 p3 p4 p5"), (".*", ""), ("teacher's", "p2 p5")])
def test_search(browser, small, words, left):
    """Typed words must all occur in what the post's card shows."""
    browser.open(small)
    browser.js("document.querySelector('[name=search]').focus()")
    browser.call("Input.insertText", text=words)
    assert sees(browser, left), ids(browser)


def test_clear(browser, small):
    """One button brings everything back."""
    browser.open(small)
    click(browser, WRONG)
    assert sees(browser, "p1 p3 p5")
    browser.js("document.querySelector('button').click()")
    assert sees(browser, "p0 p1 p2 p3 p4 p5")


def test_keyboard(browser, small):
    """Tab reaches every control in the order of the page, Space ticks a box, and Enter in the
    search leaves the page where it is."""
    browser.open(small)
    stops = []
    while stops[-1:] != ["a"] and len(stops) < 40:
        browser.key("Tab", 9)
        stop = browser.js("(e => e == document.body ? null : e.name || e.value || e.localName)"
                          "(document.activeElement)")
        stops.append(stop)
    boxes = [*scores.FLAGS[:4], *(f"gold {x}" for x in LABELS), *(f"label {x}" for x in LABELS)]
    # the runs, the fold, the confusion, the form, then a post's link
    assert stops == ["div", "summary", "div", "search", *boxes, "button", "a"]
    browser.open(small)
    for _ in range(5):  # up to the first box
        browser.key("Tab", 9)
    browser.key(" ", 32, " ")
    assert sees(browser, "p1 p3 p5")
    browser.js("document.querySelector('[name=search]').focus()")
    browser.key("Enter", 13, "\r")
    assert ids(browser) == "p1 p3 p5"


def test_each_post_has_a_link(browser, evil_page):
    """The address with a card's own #id leads to that card."""
    browser.open(evil_page)
    for i in (3, 20):
        browser.js(f"document.querySelectorAll('article a')[{i}].click()")
        browser.wait(f"document.querySelector(':target') == "
                     f"document.querySelectorAll('article')[{i}]")


def test_controls_and_images_have_names(browser, evil_page):
    """For those who listen to the page."""
    browser.open(evil_page)
    roles = {}
    for node in browser.call("Accessibility.getFullAXTree")["nodes"]:
        role, name = (node.get(k, {}).get("value") for k in ("role", "name"))
        roles.setdefault(role, []).append(name)
    for role in ("checkbox", "searchbox", "button", "region"):
        assert roles.get(role) and all(roles[role]), role
    assert browser.js("[...document.images].every(image => image.alt)")
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
      for (const q of ["h1", "h2", ".lead b", "small", "code", ".note", "td", "th", ".negative",
                       ".neutral", ".positive", "summary", "figure", "figure small", ".text",
                       "mark", "article a", "article b", "dt", "dd", "dd small", "label",
                       "output"]) {
        const e = document.querySelector(q); if (!e) continue;
        const a = bright(rgb(getComputedStyle(e).color)), b = bright(ground(e));
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < 4.5) low[q] = ratio }
      return low })()""")
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert low == {} and (ground == "rgb(255, 255, 255)") == (scheme == "light")


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
    assert browser.js("document.querySelector('output').value") == "3000 of 3000 posts"
    took = browser.js("""(() => { const began = performance.now();
      document.querySelector("[type=checkbox]").click();
      document.querySelector("[name=search]").value = "nr3 post";
      document.querySelector("form").dispatchEvent(new Event("input"));
      document.querySelector("article").getBoundingClientRect();
      return performance.now() - began })()""")
    wrong = [i for i in range(3000) if i % 3 != i % 2 and i % 7 == 3]
    left = browser.js("document.querySelector('output').value")
    assert left == f"{len(wrong)} of 3000 posts"
    assert len(ids(browser).split()) == len(wrong)
    print(f"3,000 posts: open {opened:.2f} s, two filters {took:.0f} ms")
    assert opened < 6 and took < 1500


@pytest.fixture(scope="module")
def toy_page(tmp_path_factory):
    """210 posts of the embedded default with chains, references and probabilities."""
    folder = tmp_path_factory.mktemp("size")
    posts = toy_posts(folder / "images", {"test": 210})
    teacher, rng, gold, rows = ToyTeacher(), random.Random(0), [], []
    for post in posts:
        messages = mulcot.build_messages(post, "unaided")
        raw = [teacher.answer(mulcot.Request(post, messages, t, 512)).text for t in (0.0, 0.7)]
        gold.append(post.row() | dict(cot=raw[0]))
        draws = [rng.random() for _ in LABELS]
        rows.append(dict(id=post.id, prediction=LABELS[draws.index(max(draws))], raw=raw[1],
                         probs=[draw / sum(draws) for draw in draws]))
    return report(folder, gold, rows)


def test_images_are_seen(browser, toy_page):
    """200 posts by default, each with its own thumbnail."""
    browser.open(toy_page)
    seen = browser.js("(async () => { const images = [...document.images];"
                      "await Promise.all(images.map(i => i.decode()));"
                      "return images.map(i => i.naturalWidth) })()")
    assert seen == [56] * 200
    assert toy_page.stat().st_size < 1_500_000


# ---- what it shows


def words_of(page, post):
    """What the card of a post says."""
    inner = next(x for x in page.read_text().split("<article")[1:] if f">{post}</a>" in x)
    inner = inner.partition(">")[2].partition("</article>")[0]
    return html.unescape(" ".join(re.sub("<[^>]*>", " ", inner).split()))


def test_a_case_by_hand(small):
    """Flags, verdicts, probabilities and both chains of one post."""
    assert words_of(small, "p5").startswith(
        "p5 wrong · chain ≠ label · chain ≠ teacher's text 5 of Rex gold neutral run label "
        "positive ✗ 25.0% 25.0% 50.0% · chain negative ✗ Text analysis run: Text Zürich "
        "teacher: Text one two three Image analysis")
    assert "missing Text analysis" in words_of(small, "p4")


def test_two_runs_share_a_card(browser, tmp_path):
    """Both labels and chains, equal fields once; a filter shows where only one of them is right."""
    posts = [dict(id=f"p{i}", text="t", label="neutral", cot=chain("neutral")) for i in range(3)]
    runs = []
    for labels in (("neutral", "positive", "positive"), ("neutral", "neutral", "negative")):
        runs.append([dict(id=f"p{i}", prediction=x, raw=chain(x)) for i, x in enumerate(labels)])
    page = report(tmp_path, posts, runs[0], other=runs[1], third=runs[0])
    browser.open(page)
    click(browser, ONE_RIGHT)
    assert sees(browser, "p1")
    text = words_of(page, "p1")
    assert "run label positive ✗ · chain positive ✗ other label neutral ✓ · chain neutral ✓" in text
    assert text.count("run = other = teacher: Text one two three") == 1 and "third" not in text


def test_route_of_a_cascade(tmp_path):
    """Which stage settled the post, and why."""
    row = dict(id="p", prediction="neutral", route="agree", reason="the MLLM is unsure")
    page = report(tmp_path, [dict(id="p", text="t", label="neutral")], [row])
    assert words_of(page, "p").endswith("run label neutral ✓ · route agree: the MLLM is unsure")


def test_wrong_posts_first(small, tmp_path):
    """Then the others, each in the order of the file; as many as --cards says."""
    shown = lambda page: re.findall(r">(p\d)</a>", page.read_text())
    assert shown(small) == ["p1", "p3", "p5", "p0", "p2", "p4"]
    posts = [dict(id=f"p{i}", text="t", label="neutral") for i in range(4)]
    rows = [dict(id=f"p{i}", prediction=x) for i, x in enumerate(["neutral", None, "positive"])]
    assert shown(report(tmp_path, posts, rows, ["--cards", "3"])) == ["p1", "p2", "p3"]


@pytest.mark.parametrize("aspect", ["amp", "lt", "quot", "x27", "R"])
def test_aspect_is_marked_without_breaking_the_text(tmp_path, aspect):
    """An aspect that is also the name of an HTML entity marks words, not the escapes."""
    text = "R & D <3 \"fun\" it's amp lt quot x27"
    page = report(tmp_path, [dict(id="1", text=text, aspect=aspect, label="neutral")],
                  [dict(id="1", prediction="neutral")])
    inner = re.search("<p class=text>(.*?)<p>", page.read_text())[1]
    assert inner.count(f"<mark>{aspect}</mark>") == 1
    assert html.unescape(re.sub("</?mark>", "", inner)) == text


def test_page_without_extras(browser, tmp_path):
    """No chains, probabilities, images or diagnosis: their parts are left out."""
    page = report(tmp_path, [dict(id="1", text="t", label="neutral")],
                  [dict(id="1", prediction="neutral")])
    browser.open(page)
    assert browser.js("document.querySelectorAll('figure, article img, dd').length") == 0
    assert ids(browser) == "1"


def test_tables(browser, small):
    """The runs as in table.md; the confusion with each class's scores."""
    browser.open(small)
    runs, confusion = browser.js(
        "[...document.querySelectorAll('table')].map(t => [...t.rows].map("
        "row => [...row.cells].map(cell => cell.textContent)))")
    assert confusion[1] == ["negative", "1", "0", "0", "1", "0.500", "0.500", "0.500", "2"]
    markdown = (small.parent / "table.md").read_text().splitlines()
    lines = [line.strip("|").split("|") for line in markdown if line.startswith("|")]
    assert runs == [[cell.strip().strip("*") for cell in line] for line in [lines[0], *lines[2:]]]


def test_top_of_the_page(small):
    """First what counts, then how it was made."""
    text = html.unescape(re.sub("<[^>]*>", "", small.read_text().partition("</h1>")[2]))[:600]
    metrics = json.loads((small.parent / "metrics.json").read_text())
    for part in (f"{metrics['run']['accuracy']:.3f}", f"{metrics['run']['macro_f1']:.3f}", "n\xa06",
                 "split\xa0all", metrics["date"], "numpy", "--gold"):
        assert part in text, part


@pytest.mark.parametrize("points", [[[1, 1, 9]], [[0, 0, 1], [1, 0.2, 8]], [[0.5, 0]],
                                    [[0.1, 0.01], [1, 0.033]], [[0, 1.0], [1, 0.3]]])
def test_charts_stay_within_their_frame(points):
    """Counts are areas of dots, a curve is a line."""
    art = scores.chart("t", points, 9)
    places = [pair.split(",") for pair in re.search('points="(.*?) "', art)[1].split()]
    assert len(places) == len(points)
    assert all(40 <= float(x) <= 300 and 14 <= float(y) <= 174 for x, y in places)
    radii = [float(r) for r in re.findall("r=([0-9.]+)", art)]
    counts = [point[2] for point in points if len(point) == 3]
    assert radii == pytest.approx([2 + 10 * (n / 9) ** 0.5 for n in counts], abs=0.1)
