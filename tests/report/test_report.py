"""The report's site: built from two tiny executed notebooks, then opened in headless Chromium."""

import base64
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mclip import params
from mclip.report import build as report

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


def png(width: int = 30, height: int = 20) -> str:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + bytes([200, 60, 60]) * width for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(data).decode()


def executed(
    title: str, answer: str, *, figure: str = "Figure: a <red> box"
) -> nbformat.NotebookNode:
    picture = new_output("display_data", {"image/png": png(), "text/plain": figure})
    table = new_output(
        "display_data", {"text/html": "<table><tr><td>1</td></tr></table><script>1</script>"}
    )
    said = new_output(
        "display_data",
        {"text/html": f"<p>{answer}</p>", "text/plain": answer},
        metadata={"mclip": {"answer": True}},
    )
    return new_notebook(
        cells=[
            new_markdown_cell(
                f"# {title}\n\nWhy this is asked, at a < b & c.\n\n**Run:** `dvc repro`"
            ),
            new_code_cell("sections = None", metadata={"tags": ["parameters"]}),
            new_code_cell("sections = {'a': 1}", metadata={"tags": ["injected-parameters"]}),
            new_code_cell("draw('<b>')", outputs=[picture], metadata={"tags": ["key-figure"]}),
            new_code_cell("print()", outputs=[new_output("stream", text="1 < 2\n"), table]),
            new_code_cell("report.answer('...')", outputs=[said], metadata={"tags": ["answer"]}),
        ]
    )


@pytest.fixture
def reports(tmp_path):
    folder = tmp_path / "reports"
    (folder / "ablations").mkdir(parents=True)
    (folder / "metrics").mkdir()
    (folder / "evaluate").mkdir()
    for name, title in (
        ("balance", "What is <too> alike?"),
        ("evaluate/clip", "How good?"),
        ("ablations/clusters", "Which k?"),
        ("ablations/pca", "What is seen?"),
    ):
        nbformat.write(executed(title, f"{name}: 40 % & more."), folder / f"{name}.ipynb")
    nbformat.write(new_notebook(), folder / "embed.failed.ipynb")
    sets = {
        "cifar10": {"top1": {"mean": 0.5, "std": 0.01}},
        "emoji-unseen": {"mean_r1": {"mean": 0.2, "std": 0.0}},
    }
    tree = {"clip": sets | {"mean": {"mean": 0.2, "std": 0.003, "sets": 1}}}
    (folder / "metrics" / "clip.json").write_text(json.dumps(tree))
    (folder / "metrics" / "teachers.json").write_text(
        json.dumps({"large": {"cifar10": {"top1": 0.9}}})
    )
    return folder


def build(reports: Path) -> Path:
    return report.build(reports, reports / "site", ROOT / "params.yaml").parent


@pytest.mark.slow
def test_index_has_titles_answers_numbers_and_says_what_is_missing(reports):
    site = build(reports)
    assert sorted(p.name for p in site.iterdir()) == [
        "ablations-clusters.html",
        "ablations-pca.html",
        "balance.html",
        "evaluate-clip.html",
        "index.html",
    ]
    index = (site / "index.html").read_text()
    for part in (
        "What is &lt;too&gt; alike?",
        "balance: 40 % &amp; more.",
        "evaluate · CLIP",
        "Ablations",
        "50.0",
        "±1.0",
        "20.0",
        "90.0",
        "No wall times",
        "openmoji-black",
        "a &lt;red&gt; box",
    ):
        assert part in index, part
    order = [
        index.index(f'class="card" href="{name}.html"')
        for name in ("balance", "evaluate-clip", "ablations-clusters", "ablations-pca")
    ]
    assert order == sorted(order)
    headings = re.findall(r'<h2 id="(\w+)"', index)
    assert headings == ["result", "pipeline", "recipes", "ablations", "pictures", "cost", "same"]
    assert re.findall(r'href="#(\w+)"', index) == headings


@pytest.mark.slow
def test_a_group_without_pages_has_no_heading_and_many_ablations_are_all_there(reports):
    (reports / "ablations/pca.ipynb").unlink()
    for i in range(12):
        nbformat.write(
            executed(f"Question {i}?", f"answer {i}"),
            reports / "ablations" / f"study-{i:02d}.ipynb",
        )
    settings = params.read_yaml(ROOT / "params.yaml")
    settings["ablations"]["studies"] |= {
        f"study-{i:02d}": settings["ablations"]["studies"]["terms"] for i in range(12)
    }
    (reports / "params.yaml").write_text(json.dumps(settings))  # YAML, too
    index = report.build(reports, reports / "site", reports / "params.yaml").read_text()
    assert 'id="others"' not in index
    assert 'id="pictures"' not in index and "#pictures" not in index
    assert all(f"Question {i}?" in index and f"answer {i}" in index for i in range(12))


@pytest.mark.slow
def test_every_page_is_linked_from_every_page(reports):
    site = build(reports)
    names = {path.name for path in site.glob("*.html")}
    for path in site.glob("*.html"):
        linked = set(re.findall(r'href="([\w-]+\.html)"', path.read_text()))
        assert linked | {path.name} == names | (
            {"index.html"} if path.name == "index.html" else set()
        ), path.name


def test_page_folds_code_and_has_neighbours(reports):
    site = build(reports)
    page = (site / "evaluate-clip.html").read_text()
    assert 'href="balance.html"' in page and 'href="ablations-clusters.html"' in page
    assert page.count("<h1>") == 1 and "How good?" in page
    assert "<summary>Parameters of this run</summary>" in page and "None" not in page
    assert page.count("evaluate/clip: 40 % &amp; more.") == 1  # at the head, not again at the end
    assert "1 &lt; 2" in page and "<script" not in page
    assert re.search(r'<img[^>]*\balt="a &lt;red&gt; box"', page)
    for text in site.glob("*.html"):
        assert not re.search(r'(?:src|href)\s*=\s*"(?!data:|#|[\w-]+\.html")', text.read_text()), (
            text
        )


@pytest.mark.slow
def test_same_input_same_bytes(reports):
    first = {p.name: p.read_bytes() for p in build(reports).iterdir()}
    assert {p.name: p.read_bytes() for p in build(reports).iterdir()} == first


@pytest.mark.slow
def test_times_are_summed(reports):
    (reports / "times").mkdir()
    for stage, seconds in (("data", 65.0), ("balance", 3.5)):
        times = {"stage": stage, "seconds": seconds, "peak_rss_mb": 1234}
        (reports / "times" / f"{stage}.json").write_text(json.dumps(times))
    index = (build(reports) / "index.html").read_text()
    assert (
        index.index("1 min 05 s") < index.index("3.5 s")
        and "1 min 08 s" in index
        and "1,234 MB" in index
    )


@pytest.mark.slow
def test_what_is_left_of_a_recipe_that_is_gone_is_not_shown(reports):
    nbformat.write(executed("An old question?", "old answer"), reports / "evaluate" / "old.ipynb")
    (reports / "metrics" / "old.json").write_text(
        (reports / "metrics" / "clip.json").read_text().replace("clip", "old")
    )
    (reports / "times" / "evaluate").mkdir(parents=True)
    times = {"stage": "evaluate", "recipe": "old", "seconds": 12.5, "peak_rss_mb": 1}
    (reports / "times" / "evaluate" / "old.json").write_text(json.dumps(times))
    site = build(reports)
    assert not (site / "evaluate-old.html").exists()
    assert not re.search(r"\bold\b|12\.5 s", (site / "index.html").read_text().partition("<pre")[0])


@pytest.mark.slow
def test_an_ablation_of_another_run_is_shown_as_such(reports):
    nbformat.write(executed("Ten seeds?", "another answer"), reports / "ablations" / "seeds.ipynb")
    (reports / "times" / "ablations").mkdir(parents=True)
    for name, seconds in (("seeds", 12.5), ("clusters", 3.5)):
        times = {"stage": f"ablations/{name}", "seconds": seconds, "peak_rss_mb": 1}
        (reports / "times" / "ablations" / f"{name}.json").write_text(json.dumps(times))
    index = (build(reports) / "index.html").read_text()
    _, _, others = index.partition('<h2 id="others"')
    assert "From other runs" in others and "another answer" in others.partition("<h2")[0]
    assert index.count("another answer") == 1 and "12.5 s" not in index and "3.5 s" in index


def test_an_ablation_that_is_left_out_has_no_page(reports):
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# amount", metadata={"tags": ["left-out"]})]
    )
    nbformat.write(nb, reports / "ablations" / "amount.ipynb")
    index = build(reports) / "index.html"
    assert "ablations-amount.html" not in index.read_text()
    assert not (index.parent / "ablations-amount.html").exists()


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(report.ReportError, match="run `dvc repro` first"):
        report.build(tmp_path, tmp_path / "site", ROOT / "params.yaml")


def test_answer_is_found_by_build(monkeypatch):
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, **options: shown.append((data, options["metadata"]))
    )
    report.answer("40 % <of> it\n is  gone")
    data, metadata = shown[0]
    assert data["text/plain"] == "40\u00a0% <of> it is gone" and "&lt;of&gt;" in data["text/html"]
    assert metadata == {"mclip": {"answer": True}}


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        quiet = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield chromium
        chromium.close()


def check_site(browser, site: Path) -> None:
    pages = sorted(site.glob("*.html"))
    assert pages
    for path in pages:
        for width, scheme in ((1200, "light"), (390, "dark")):
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
            page = context.new_page()
            requests, console = [], []
            page.on("request", lambda r, seen=requests: seen.append(r.url))
            page.on("console", lambda m, seen=console: seen.append(m.text))
            page.on("pageerror", lambda e, seen=console: seen.append(str(e)))
            page.goto(path.as_uri())
            outside = [
                url for url in requests if url != path.as_uri() and not url.startswith("data:")
            ]
            assert outside == [], f"{path.name}: {outside[0]}"
            assert console == [], f"{path.name}: {console[0]}"
            images = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt])")
            assert all(natural > 0 and alt for natural, alt in images), f"{path.name}: {images}"
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (
                f"{path.name} is wider than {width} px"
            )
            links = page.evaluate("[...document.links].map(a => a.href)")
            local = [
                link.removeprefix("file://").split("#")[0]
                for link in links
                if link.startswith("file:")
            ]
            assert all(Path(link).exists() for link in local), f"{path.name}: dead link"
            context.close()


@pytest.mark.slow
def test_site_in_chromium(reports, browser):
    check_site(browser, build(reports))


@pytest.mark.slow
def test_committed_site_in_chromium(browser):
    if not (ROOT / "reports/site/index.html").exists():
        pytest.skip("reports/site is not built")
    check_site(browser, ROOT / "reports/site")
