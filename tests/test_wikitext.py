"""Text is found, fetched once, checked, and joined as the field does it."""
import hashlib
import http.server
import os
import threading
import zipfile

import pytest
import tiny

from text import wikitext
from text.wikitext import calibration_text, download, evaluation_text, held_out_text, join_rows

RAW = b" \n = Title = \n \n First row . \n Second row . \n \n \n"
JOINED = "\n\n = Title = \n\n\n\n\n First row . \n\n\n Second row . \n\n\n\n\n"


def test_rows_are_joined_by_blank_lines_and_blank_rows_are_empty():
    rows = ["", " = Title = \n", "", " First row . \n", " Second row . \n", "", ""]
    assert join_rows(RAW) == "\n\n".join(rows) == JOINED
    assert join_rows(RAW.replace(b"\n", b"\r\n")) == JOINED


@pytest.mark.skipif(not (tiny.DATA / "wikitext-2-raw").exists(), reason="needs WikiText-2")
def test_the_official_test_split_has_4358_rows():
    raw = (tiny.DATA / "wikitext-2-raw" / "wiki.test.raw").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == wikitext.TEST_SHA256
    rows = raw.decode().split("\n")[:-1]
    assert len(rows) == 4358 and sum(bool(row.strip()) for row in rows) == 2891
    assert len(join_rows(raw)) == sum(len(row) + 1 if row.strip() else 0 for row in rows) + 2 * 4357


def make_folder(folder, splits=("train", "valid", "test"), end="raw"):
    """Write a small text for each split; each ends with the split's name. Returns the folder."""
    folder.mkdir(parents=True)
    for split in splits:
        (folder / f"wiki.{split}.{end}").write_bytes(RAW + split.encode())
    return folder


def make_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", RAW + split.encode())
    return path


@pytest.mark.parametrize("make", [
    lambda path: make_folder(path / "w"), lambda path: make_folder(path / "w", end="txt"),
    lambda path: make_folder(path / "w" / "wikitext-2-raw").parent,
    lambda path: make_zip(path / "any.zip"),
    lambda path: make_zip(path / wikitext.ZIP_NAME).parent,
], ids=["folder", "txt", "parent", "zip", "folder_with_zip"])
def test_folders_and_zips_give_their_splits(tmp_path, make):
    path, test = str(make(tmp_path)), (JOINED + "\n\ntest", "WikiText-2 test")
    assert calibration_text(path) == (JOINED + "\n\ntrain", "WikiText-2 train")
    assert evaluation_text(path) == held_out_text([path]) == test


def test_without_the_train_split_validation_calibrates_and_never_test(tmp_path):
    path = make_folder(tmp_path / "a", ("valid", "test"))
    assert calibration_text(str(path))[1] == "WikiText-2 validation"
    with pytest.raises(ValueError, match=r"wiki\.train\.raw"):
        calibration_text(str(make_folder(tmp_path / "b", ("test",))))
    with pytest.raises(ValueError, match=r"wiki\.test\.raw"):
        evaluation_text(str(make_folder(tmp_path / "c", ("train",))))


def test_the_test_split_under_any_name_is_no_calibration_text(tmp_path, monkeypatch):
    monkeypatch.setattr(wikitext, "TEST_SHA256", hashlib.sha256(RAW).hexdigest())
    path = tmp_path / "innocent.txt"
    path.write_bytes(RAW)
    assert evaluation_text(str(path)) == (JOINED, "WikiText-2 test")
    with pytest.raises(ValueError, match="test split"):
        calibration_text(str(path))


def test_any_text_file_is_cut_into_a_part_to_calibrate_on_and_a_held_out_part(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    (first, a), (last, b) = calibration_text(str(path)), held_out_text([str(path), "another"])
    assert first + last == path.read_text() == evaluation_text(str(path))[0]
    assert 0.08 < len(last) / len(path.read_text()) < 0.12 and last.startswith("line ")
    assert a == "notes.txt, first 90%" and b == "notes.txt, last 10%"


@pytest.mark.parametrize("content", [b"", b"  \n\n", b"\xff\xfe\x00"])
def test_what_is_not_text_is_refused(tmp_path, content):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.txt"):
        calibration_text(str(path))


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        calibration_text(str(tmp_path / "none"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_is_refused(tmp_path, compression):
    path = tmp_path / "w.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("wikitext-2-raw/wiki.train.raw", RAW * 50)
    data = bytearray(path.read_bytes())
    data[60:70] = b"##########"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        calibration_text(str(path))


@pytest.fixture
def server(tmp_path):
    """A web server on 127.0.0.1 that serves one zip and counts the requests."""
    content = make_zip(tmp_path / "served.zip").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            type(self).requests += 1
            self.send_response(200 if self.path == "/good" else 404)
            self.end_headers()
            if self.path == "/good":
                self.wfile.write(content)

        def log_message(self, *args):
            pass
    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", content, Handler
    httpd.shutdown()
    httpd.server_close()


def test_wikitext_is_downloaded_once_and_then_cached(server, tmp_path, monkeypatch):
    url, content, handler = server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FLATTENGPT_WIKITEXT_URL", f"{url}/good")
    monkeypatch.setattr(wikitext, "ZIP_BYTES", len(content))
    monkeypatch.setattr(wikitext, "ZIP_SHA256", hashlib.sha256(content).hexdigest())
    for _ in range(2):
        assert calibration_text(None)[1] == "WikiText-2 train"
    assert handler.requests == 1
    assert os.listdir(tmp_path / "cache" / "flattengpt") == [wikitext.ZIP_NAME]


def test_a_file_of_the_expected_size_and_checksum_is_kept(server, tmp_path):
    url, content, _ = server
    path = tmp_path / "cache" / "w.zip"
    download(f"{url}/good", path, len(content), hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content


@pytest.mark.parametrize("size, sha", [(1, "right"), (-1, "right"), (0, "wrong")])
def test_another_size_or_checksum_leaves_no_file(server, tmp_path, size, sha):
    url, content, _ = server
    expected = hashlib.sha256(content).hexdigest() if sha == "right" else "0" * 64
    path = tmp_path / "cache" / "w.zip"
    with pytest.raises(ValueError, match="not the expected file"):
        download(f"{url}/good", path, len(content) + size, expected)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("url", ["{}/missing", "http://127.0.0.1:9"])
def test_without_a_network_the_error_says_what_to_put_where(server, tmp_path, monkeypatch, url):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FLATTENGPT_WIKITEXT_URL", url.format(server[0]))
    with pytest.raises(ValueError, match=r"wikitext-2-raw-v1\.zip.*--data") as caught:
        calibration_text(None)
    assert str(tmp_path / "cache" / "flattengpt") in str(caught.value)
