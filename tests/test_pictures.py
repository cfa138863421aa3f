"""The figure and the page of a run.

The page stands alone, nothing in it can run or reach out, and its numbers are those of the record.
"""
import html.parser
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import pytest
import tiny
import torch
from matplotlib.figure import Figure

import flatten
from beyond import refit
from console import picture
from console.page import page

SHORT = ["--samples", 8, "--length", 32, "--ratio", 0.3]
BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome", "msedge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
    *map(str, Path.home().glob(".cache/ms-playwright/chromium*/*/chrome"))))), None)
VOID = {"meta", "br", "hr", "img", "link", "input"}  # elements of HTML that have no end


class Page(html.parser.HTMLParser):
    """Reads a page: its tables, its text, its tags, and what attributes and styles refer to."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.text, self.tags, self.open, self.references = [], "", set(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.references += [value for name, value in attributes
                            if name.split(":")[-1] in ("href", "src", "srcset", "data", "action")]
        self.references += [value.partition("url(")[2].strip("'\" ") for _, value in attributes
                            if "url(" in (value or "")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data


def read(path):
    text = path.read_text(encoding="utf-8")
    assert "@import" not in text and "url(http" not in text and "url(//" not in text
    found = Page(text)
    assert all(reference.startswith(("#", "data:")) for reference in found.references)
    assert not found.tags & {"script", "link", "iframe", "object", "embed", "img"}
    return found


@pytest.fixture
def run(cli, text_file, ckpt, tmp_path):
    """Compress the tiny checkpoint with more options. Returns exit code, stdout and stderr."""
    def call(main, *arguments):
        return cli(main, "--ckpt", ckpt, "--data", text_file, "--out", tmp_path / "out", *SHORT,
                   *arguments)
    return call


def no_work(monkeypatch, main):
    """Let the test fail when the command starts its long work."""
    module = sys.modules[main.__module__]
    monkeypatch.setattr(module, "measure", lambda *args: pytest.fail("worked"))


@pytest.mark.parametrize("main, options, steps", [
    (flatten.main, [], ("flattened", "selected", "compensated")),
    (flatten.main, ["--keep-wide"], ("flattened",)), (refit.main, [], ("refit",))])
def test_the_page_stands_alone_and_its_numbers_are_those_of_the_record(tmp_path, run, main,
                                                                       options, steps):
    file = tmp_path / "pages" / "report.html"
    code, out, err = run(main, *options, "--report", file)
    assert code == 0 and f"wrote {file}" in out, err
    found, record = read(file), json.loads((tmp_path / "out" / "flatten.json").read_text())
    assert record["command"] in found.text and "svg" in found.tags
    sizes, groups, samples = found.tables
    printed = [row.split(" | ") for row in out.splitlines() if row.startswith("| ")][1:]
    assert sizes[1:] == [
        ["tiny", "5", f"{record['parameters_before']:,}", printed[0][4]],
        ["out", str(len(record["groups"])), f"{record['parameters_after']:,}", printed[1][4]]]
    merged = [group for group in record["groups"] if len(group["blocks"]) > 1]
    rows = [dict(zip(groups[0], row, strict=True)) for row in groups[1:]]
    assert len(rows) == len(merged) >= 1
    for row, group in zip(rows, merged, strict=True):
        assert row.pop("blocks") == "+".join(map(str, group["blocks"]))
        assert row.pop("similarity") == f"{group['similarity']:.3f}"
        for step in steps:
            assert row.pop(f"error, {step}") == f"{group[f'error_{step}']:.1%}"
        if "--keep-wide" not in options:  # 3 query heads for each KV head
            assert [int(n) for n in row.pop("heads").split("+")] == [
                3 * len(member) for member in group["kv_heads"]]
            assert [int(n) for n in row.pop("channels").split("+")] == [
                len(member) for member in group["channels"]]
        assert not row
    assert samples[0] == ["tiny", "out"]
    assert all(text.startswith(flatten.PROMPT) for text in samples[1])


def test_without_the_comparison_the_page_has_no_perplexity_and_no_sample(tmp_path, run):
    code, _, err = run(flatten.main, "--no-eval", "--report", tmp_path / "r.html")
    assert code == 0, err
    found = read(tmp_path / "r.html")
    assert len(found.tables) == 2 and "perplexity" not in found.text.lower()


def test_what_a_page_tells_is_escaped(tmp_path):
    evil = "<script>alert('&amp;')</script>\"><img src=http://x>"
    record = {"source": evil, "method": evil, "command": evil, "calibration": {"text": evil},
              "groups": [{"blocks": [0, 1], "similarity": 0.5, "error_flattened": 0.25}],
              "parameters_before": 2, "parameters_after": 1, "ratio_reached": 0.5,
              "ratio_asked": 0.4}
    file = tmp_path / "page.html"
    file.write_text(page(record, tiny.config(), evil, b"<svg></svg>", [1.0, 2.0], evil, evil,
                         [evil, evil]), encoding="utf-8")
    found = read(file)
    assert found.text.count(evil) == 13  # each place that it was put
    assert found.tables[2] == [[evil, evil], [evil, evil]]


def test_the_figure_outlines_the_groups_and_its_bars_are_the_errors():
    S = torch.linspace(0.2, 1, 25).view(5, 5)
    merged = [{"blocks": [1, 2, 3], "error_flattened": 0.1, "error_selected": 0.4},
              {"blocks": [4, 5], "error_flattened": 0.2, "error_selected": 0.3}]
    left, right = Figure().subplots(1, 2)
    picture.similarity(left, S, [[0], [1, 2, 3], [4]])
    outline, = left.patches
    assert (outline.get_xy(), outline.get_width(), outline.get_height()) == ((0.5, 0.5), 3, 3)
    assert left.images[0].get_clim() == (pytest.approx(float(S[1:, 1:].min())), 1)
    picture.group_errors(right, merged)
    assert [[bar.get_height() for bar in bars] for bars in right.containers] == [[0.1, 0.2],
                                                                                [0.4, 0.3]]
    assert [label.get_text() for label in right.get_xticklabels()] == ["1-3", "4-5"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["flattened", "selected"]


def test_the_same_run_draws_the_same():
    merged = [{"blocks": [0, 1], "error_refit": 0.1}]
    for S in (torch.eye(2), torch.ones(2, 2), torch.eye(40)):
        first, again = (picture.draw(S, merged, "svg") for _ in range(2))
        assert first == again
    assert xml.etree.ElementTree.fromstring(first).tag.endswith("svg")


@pytest.mark.parametrize("main, name, start", [(flatten.main, "a.PNG", b"\x89PNG"),
                                               (refit.main, "a.svg", b"<?xml")])
def test_the_figure_is_written_as_its_name_asks_and_replaces_a_file_when_asked(
        tmp_path, run, main, name, start):
    (tmp_path / name).write_text("mine")
    code, out, err = run(main, "--no-eval", "--overwrite", "--plot", tmp_path / name)
    assert code == 0 and f"wrote {tmp_path / name}" in out, err
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("main", [flatten.main, refit.main])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, run, main,
                                                                  monkeypatch):
    no_work(monkeypatch, main)
    (tmp_path / "there.svg").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    for option, name, more, message in (
            ("--plot", "there.svg", [], "exists already"),
            ("--report", "folder.html", ["--overwrite"], "exists already"),
            ("--plot", "figure.pdf", [], "must end with .svg or .png"),
            ("--report", "report.svg", [], "must end with .html"),
            ("--plot", "there.svg/x.svg", [], "not a folder"),
            ("--plot", "o.svg", ["--out", tmp_path / "o.svg"], "overlap")):
        code, out, err = run(main, option, tmp_path / name, *more)
        assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert (tmp_path / "there.svg").read_text() == "mine" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--plot", "--report"])
@pytest.mark.parametrize("main", [flatten.main, refit.main])
def test_without_matplotlib_one_line_says_so_before_the_work(tmp_path, run, main, option,
                                                             monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it is an ImportError now
    no_work(monkeypatch, main)
    code, _, err = run(main, option, tmp_path / "x.svg")
    assert code == 2 and err.count("\n") == 1 and "pip install matplotlib" in err
    code, _, err = run(main, "--dry-run")  # nothing else needs it
    assert code == 0, err


def test_pruning_a_wide_checkpoint_draws_nothing_and_says_so(tmp_path, run, cli):
    assert run(flatten.main, "--keep-wide", "--no-eval")[0] == 0
    code, _, err = cli(flatten.main, "--ckpt", tmp_path / "out", "--plot", tmp_path / "x.svg")
    assert code == 2 and "--plot is for a model that has not been flattened" in err


def shown(file, folder):
    """Open a page in a browser. Returns its elements, complaints, requests and picture."""
    folder.mkdir()
    done = subprocess.run([
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--enable-logging=stderr", f"--user-data-dir={folder}",
        f"--log-net-log={folder / 'net.json'}", f"--screenshot={folder / 'page.png'}",
        "--window-size=1200,1600", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    events = json.loads((folder / "net.json").read_text(encoding="utf-8"))["events"]
    requests = [event["params"]["url"] for event in events if "url" in event.get("params", {})]
    return done.stdout, complaints, requests, matplotlib.image.imread(folder / "page.png")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_draws_the_page_without_a_complaint_or_a_request(tmp_path, run):
    file = tmp_path / "report.html"
    assert run(flatten.main, "--no-eval", "--report", file)[0] == 0
    elements, complaints, requests, picture_of = shown(file, tmp_path / "profile")
    assert "<h2>Groups</h2>" in elements and elements.count("<table>") == 2
    assert not complaints and not requests
    for name in ("flattened", "selected", "compensated"):  # the bars can be seen
        color = torch.tensor(matplotlib.colors.to_rgb(picture.COLORS[name]))
        near = (torch.from_numpy(picture_of)[..., :3] - color).abs().amax(-1) < 0.01
        assert near.sum() > 1000, name
    bad = "<img src='http://127.0.0.1:9/x.png'><script>nothing()</script>"
    file.write_text(file.read_text(encoding="utf-8") + bad, encoding="utf-8")
    _, complaints, requests, _ = shown(file, tmp_path / "again")
    assert len(complaints) == 2 and not requests  # both are forbidden by the page itself
    file.write_text(bad)
    _, complaints, requests, _ = shown(file, tmp_path / "bad")
    assert complaints and set(requests) == {"http://127.0.0.1:9/x.png"}  # they would be seen
