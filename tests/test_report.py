"""The report in a real browser: it runs nothing but its own script, shows and filters the posts."""

import html
import json
import re
import shutil
import subprocess

import pytest
from conftest import chain, write
from PIL import Image

import eval as scores
from mulcot import LABELS

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome")


def report(folder, posts, rows, more=(), **others):
    """Runs eval.py on gold posts and prediction rows, also of other runs; the page's path."""
    gold, files = write(folder / "gold.jsonl", posts), []
    for i, (name, own) in enumerate({"run": rows, **others}.items()):
        files.append(f"{name}={write(folder / f'{i}.jsonl', own)}")
    assert scores.main([*files, "--gold", str(gold), "--out", str(folder / "out"), *more]) == 0
    return folder / "out" / "report.html"


def browse(page, code):
    """What a JavaScript function body returns in the page, once it is loaded and its own script
    has run. The page's policy lets this script run because it has the page's nonce."""
    text = page.read_text()
    nonce = re.search("'nonce-(.*?)'", text)[1]
    script = (f"<script nonce={nonce}>addEventListener('load', () => {{ document.documentElement"
              f".dataset.got = JSON.stringify((() => {{ {code} }})()) }})</script>")
    copy = page.with_name("copy.html")
    copy.write_text(text.replace("</html>", script + "</html>"))
    argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", f"--user-data-dir={page.parent}/profile", "--dump-dom"]
    run = subprocess.run([*argv, f"file://{copy}"], capture_output=True, timeout=120)
    return json.loads(html.unescape(re.search(' data-got="(.*?)"', run.stdout.decode())[1]))


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
            "details summary figure svg path text g circle polyline form label input button "
            "output article a img mark dl dt dd script".split())


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory):
    """Every hostile string in every place that data can reach: posts, chains, routes, names,
    diagnoses."""
    folder = tmp_path_factory.mktemp("evil")
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "diagnose", lambda runs, teacher: EVIL)
        return report(folder, posts, rows, **{"</b><script>\"'&": rows})


@needs_browser
def test_hostile_strings_do_nothing(evil_page):
    """They are seen as they are, and no script, request, element or attribute comes of them; each
    post has its picture and a link of its own."""
    got = browse(evil_page, """
      const texts = query => [...document.querySelectorAll(query)].map(e => e.textContent);
      const all = [...document.querySelectorAll('*')];
      return {title: document.title, names: all.map(e => e.localName),
              attributes: all.flatMap(e => e.getAttributeNames()), posts: texts('.text'),
              requests: performance.getEntriesByType('resource').map(e => e.name.slice(0, 10)),
              images: [...document.images].map(e => e.naturalWidth),
              links: [...document.querySelectorAll('article a')].filter(
                a => document.getElementById(a.hash && a.getAttribute('href').slice(1))).length,
              shown: ['article a', 'dl', 'article p', '.note'].map(q => texts(q).join(' '))}""")
    assert got["title"] == "MulCoT-RD: run" and set(got["names"]) <= KNOWN
    assert not [name for name in got["attributes"] if name.startswith("on")]
    assert set(got["requests"]) <= {"data:image"}
    assert got["images"] == [160] * 2 * len(EVIL) and got["links"] == 2 * len(EVIL)
    shown = [evil.replace("\0", "") for evil in EVIL]
    assert sorted(got["posts"]) == sorted([f"so {evil} !" for evil in shown] * 2)
    for place in got["shown"]:
        seen = " ".join(place.split())
        assert not [evil for evil in shown if " ".join(evil.split()) not in seen]


def test_policy_stands_first(evil_page):
    """Before all that could load or run something, and nothing else in the page names a server."""
    page = evil_page.read_text()
    assert page.index("default-src 'none'") < page.index("<title>") < page.index("<style>")
    assert page.count("<script nonce=") == 1 and page.count("script-src 'nonce-") == 1
    assert not re.search(r"url\(|@import|http:|https:", scores.STYLE + scores.SCRIPT)


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
                 probs=[0.25 + (k == (x or "neutral")) / 4 for k in LABELS])
            for i, (x, y) in enumerate(predicted)]
    return report(folder, posts, rows)


SEEN = """
  const form = document.forms[0], posts = [];
  for (const [boxes, words] of %s) {
    form.reset();
    for (const box of boxes) document.querySelector(`form [value="${box}"]`).click();
    form.search.value = words;
    form.search.dispatchEvent(new Event('input', {bubbles: true}));
    const seen = [...document.querySelectorAll('article')].filter(a => a.checkVisibility());
    posts.push([seen.map(a => a.id).sort().join(' '), form.left.value]);
  }
  return posts"""
WRONG, CONFLICT, UNPARSED, DISAGREE, ONE_RIGHT = scores.FLAGS
CHOICES = [
    ([WRONG], "", "p1 p3 p5"), ([CONFLICT], "", "p1 p2 p5"), ([UNPARSED], "", "p3 p4"),
    ([DISAGREE], "", "p2 p5"), (["gold positive"], "", "p0 p1"), (["gold negative"], "", "p2 p3"),
    (["gold neutral"], "", "p4 p5"), (["label positive"], "", "p0 p5"),
    (["label negative"], "", "p1 p2"), (["label neutral"], "", "p4"),
    ([WRONG, CONFLICT, DISAGREE, "gold neutral"], "", "p5"), ([UNPARSED, DISAGREE], "", ""),
    (["gold positive", "gold neutral"], "", ""), ([], "text 4", "p4"), ([], "prose", "p4"),
    ([], "ZÜRICH", "p0 p1 p2 p3 p5"), ([], "rex  nothing", ""), ([], ".*", ""),
    ([WRONG], "zürich", "p1 p3 p5"), ([DISAGREE], "p5", "p5"), ([], "", "p0 p1 p2 p3 p4 p5")]


@needs_browser
def test_filters_and_search(small):
    """All ticked boxes must hold and all typed words occur; a reset brings everything back."""
    cases = json.dumps([choice[:2] for choice in CHOICES])
    for (boxes, words, left), got in zip(CHOICES, browse(small, SEEN % cases), strict=True):
        assert got == [left, f"{len(left.split())} of 6 posts"], (boxes, words)


CONTRAST = """
  const rgb = color => { const ink = document.createElement('canvas').getContext('2d');
    ink.fillStyle = color; ink.fillRect(0, 0, 1, 1);
    return [...ink.getImageData(0, 0, 1, 1).data] };
  const bright = color => color.slice(0, 3).map(v => v / 255).map(v =>
    v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce(
    (sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] == 255) return c } };
  const low = {};
  for (const scheme of ['light', 'dark']) {
    document.documentElement.style.colorScheme = scheme;
    for (const q of ['h1', '.lead b', 'small', 'code', '.note', 'td', 'th', '.negative', '.neutral',
                     '.positive', 'summary', 'figure', '.text', 'mark', 'article a', 'article b',
                     'dt', 'dd', 'dd small', 'label', 'output']) {
      const e = document.querySelector(q), pair = [rgb(getComputedStyle(e).color), ground(e)];
      const [a, b] = pair.map(bright).sort((x, y) => y - x);
      if ((a + .05) / (b + .05) < 4.5) low[scheme + ' ' + q] = pair } }
  return low"""


@needs_browser
def test_text_can_be_read_and_fits_a_phone(evil_page, small):
    """Every text stands out from its ground by 4.5 : 1 or more (WCAG AA), light and dark; only
    tables scroll sideways, within their box."""
    assert browse(small, CONTRAST) == {}
    for page in (evil_page, small):
        assert browse(page, """
          document.body.style.width = '320px'; document.body.style.margin = 0; const wide = [];
          for (const e of document.querySelectorAll('body > *, article *'))
            if (e.getBoundingClientRect().right > 321) wide.push(e.outerHTML);
          return wide""") == []


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


def test_two_runs_share_a_card(tmp_path):
    """Both labels and chains, equal fields once; a flag says where only one of them is right."""
    posts = [dict(id=f"p{i}", text="t", label="neutral", cot=chain("neutral")) for i in range(3)]
    runs = []
    for labels in (("neutral", "positive", "positive"), ("neutral", "neutral", "negative")):
        runs.append([dict(id=f"p{i}", prediction=x, raw=chain(x)) for i, x in enumerate(labels)])
    page = report(tmp_path, posts, runs[0], other=runs[1], third=runs[0])
    assert [ONE_RIGHT in words_of(page, f"p{i}") for i in range(3)] == [False, True, False]
    text = words_of(page, "p1")
    assert "run label positive ✗ · chain positive ✗ other label neutral ✓ · chain neutral ✓" in text
    assert text.count("run = other = teacher: Text one two three") == 1 and "third" not in text


def test_route_of_a_cascade(tmp_path):
    """Which stage settled the post, and why; parts that have no data are left out."""
    row = dict(id="p", prediction="neutral", route="agree", reason="the MLLM is unsure")
    page = report(tmp_path, [dict(id="p", text="t", label="neutral")], [row])
    assert words_of(page, "p").endswith("run label neutral ✓ · route agree: the MLLM is unsure")
    assert not re.search("<figure|<img|<dd", page.read_text())


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


def test_numbers_of_the_page(small):
    """First what counts, then how it was made; the runs as in table.md; the confusion with each
    class's scores."""
    page = small.read_text()
    text = html.unescape(re.sub("<[^>]*>", "", page.partition("</h1>")[2]))[:600]
    metrics = json.loads((small.parent / "metrics.json").read_text())
    for part in (f"{metrics['run']['accuracy']:.3f}", f"{metrics['run']['macro_f1']:.3f}", "n\xa06",
                 f"{metrics['run']['weighted_f1']:.3f}", "split\xa0all", metrics["date"], "--gold"):
        assert part in text, part
    tables = [[re.split("<t[hd]>", re.sub("</?(b|span|tb|table|div).*?>", "", row))[1:]
               for row in table.partition("</table>")[0].split("<tr>")[1:]]
              for table in page.split("<table>")[1:]]
    assert tables[1][1] == ["negative", "1", "0", "0", "1", "0.500", "0.500", "0.500", "2"]
    lines = [line.strip("|").split("|") for line in (small.parent / "table.md").read_text()
             .splitlines() if line.startswith("|")]
    assert tables[0] == [[cell.strip().strip("*") for cell in line]
                         for line in [lines[0], *lines[2:]]]


@pytest.mark.parametrize("points", [[[1, 1, 9]], [[0, 0, 1], [1, 0.2, 8]], [[0.5, 0]],
                                    [[0.1, 0.01], [1, 0.033]], [[0, 1.0], [1, 0.3]]])
def test_charts_stay_within_their_frame(points):
    """Counts are areas of dots, a curve is a line."""
    art = scores.chart("t", "across", "up", points, 9)
    places = [pair.split(",") for pair in re.search('points="(.*?) "', art)[1].split()]
    assert len(places) == len(points)
    assert all(40 <= float(x) <= 300 and 14 <= float(y) <= 174 for x, y in places)
    radii = [float(r) for r in re.findall("r=([0-9.]+)", art)]
    counts = [point[2] for point in points if len(point) == 3]
    assert radii == pytest.approx([2 + 10 * (n / 9) ** 0.5 for n in counts], abs=0.1)
