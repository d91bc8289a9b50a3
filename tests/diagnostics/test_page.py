"""The page: whole in itself, true to the numbers, and of use in a real browser."""

import base64
import html.parser
import json
import re
from importlib import resources

import numpy as np
import pytest

from hola_jax import LanguageModel
from hola_jax.diagnostics import charts, insight
from hola_jax.diagnostics.page import Shown, example, page, plain, visible_weights
from tests.diagnostics import browser
from tests.laws.mixers import small

TOKENS = np.random.default_rng(0).integers(0, 31, 37).astype(np.int32)
TEXT = [chr(97 + token % 26) + ("\n" if token % 7 == 0 else " ") for token in TOKENS]
TEXT[3], TEXT[4], TEXT[5] = "</script>", "<b>&amp;", '"\u2028{{DATA}}'
NAMES = {"gdn": "GDN", "hola": "HOLA <1>"}


@pytest.fixture(scope="module")
def model():
    return LanguageModel(small("hola"))


@pytest.fixture(scope="module")
def html_text(model):
    far = np.zeros(37, np.int32)
    far[[20, 30]] = 15, 3
    figures = charts.bars({"gdn": 20.0, "hola": 10.0}, NAMES, "bars")
    first = Shown(model, "odd<name>.py", "A <b>text</b>.", TOKENS, TEXT, far)
    second = Shown(model, "other", "Shorter.", TOKENS[:12], TEXT[:12], far[:12], marked=[3, 7])
    return page([first, second], figures, ["One is < the other."])


@pytest.fixture(scope="module")
def file(html_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(html_text)
    return path


def squares(text):
    return (np.frombuffer(base64.b64decode(text), np.uint8) / 255.0) ** 2


def test_the_numbers_are_those_of_the_model(model, html_text):
    found, data = insight(model, TOKENS), plain(html_text)[0]
    weights = squares(data["weights"]).reshape(2, 2, 37, 3 + 8)
    np.testing.assert_allclose(weights, visible_weights(found, 8), atol=0.004)
    np.testing.assert_allclose(weights.sum(-1) + np.asarray(found.sink).transpose(0, 2, 1), 1, atol=0.02)
    surprise = data["most"] * squares(data["surprise"]).reshape(2, 2, 37)
    np.testing.assert_allclose(surprise, np.asarray(found.surprise).transpose(0, 2, 1), atol=0.004 * data["most"])
    kept = np.frombuffer(base64.b64decode(data["kept"]), "<i2").reshape(2, 2, 5, 3)
    np.testing.assert_array_equal(kept, np.asarray(found.kept).transpose(0, 2, 1, 3))
    assert data["text"] == TEXT and len(data["chance"]) == 37 and 0 < min(data["chance"][1:]) < 1


def test_every_weight_that_is_visible_is_there_once(model):
    found = insight(model, TOKENS)
    np.testing.assert_allclose(
        visible_weights(found, 8).sum(-1), np.asarray(found.weights).sum(-1).transpose(0, 2, 1), rtol=1e-5
    )


def test_the_example_is_the_read_that_gave_most_to_what_comes_again(model):
    found, distances = insight(model, TOKENS), np.zeros(37, np.int32)
    weights, kept = visible_weights(found, 8)[..., :3], np.asarray(found.kept)
    lean = example(weights, kept, distances, 8)
    assert weights[lean["layer"], lean["head"], lean["token"]].max() == weights.max()
    answer = int(kept[1, 3, 0, 2])  # a token that one cache holds in block 3: say that token 30 is the same again
    distances[30] = 30 - answer
    chosen = example(weights, kept, distances, 8)
    assert chosen["token"] == 29 and answer in kept[chosen["layer"], 3, chosen["head"]]
    given = np.asarray(found.weights)[:, 29, :, answer] * (kept[:, 3] == answer).any(-1)
    assert given[chosen["layer"], chosen["head"]] == given.max() > 0


def test_the_page_needs_nothing_else(html_text):
    tags = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            assert not {"src", "href", "srcset"} & {name for name, _ in attributes}

    Reader().feed(html_text)
    assert not {"link", "img", "iframe", "base"} & set(tags) and tags.count("script") == 2
    assert not re.search(r"https?://|@import|url\(|fetch\(|{{[A-Z]", html_text.replace(json.dumps(TEXT[5])[1:-1], ""))
    assert "One is &lt; the other." in html_text and "HOLA &lt;1&gt;" in html_text and "odd<name>" not in html_text


def test_the_template_is_part_of_the_package():
    assert resources.files("hola_jax.diagnostics").joinpath("page.html").is_file()


def test_curves_leave_out_what_was_not_measured():
    found = {"gdn": charts.Curve([0.5, 0.2, float("nan")], [0.1, 0.1, float("nan")])}
    svg = charts.curves(["1-64", "65-96", "97-192"], found, NAMES, "recall", 2, "beyond")
    assert svg.count("<circle") == 2 and "nan" not in svg and "beyond" in svg
    assert "nan" not in charts.curves(
        ["1-64"], {"gdn": charts.Curve([float("nan")], [float("nan")])}, NAMES, "x", 2, ""
    )


@pytest.fixture(scope="module")
def window():
    command = browser.found()
    if command is None:
        pytest.skip("no Chromium is on PATH; `sh tools/browser.sh` says how to get one")
    opened = browser.Browser(command)
    yield opened
    opened.close()


def test_a_click_on_a_token_shows_where_its_read_looked(window, file, model):
    window.open(file)
    assert "No token is chosen" in window.ask("document.getElementById('read').innerText")
    assert window.ask("document.querySelectorAll('#text .kept').length") == 3
    window.click('span[data-token="21"]')
    said = window.ask("document.getElementById('read').innerText")
    rows = window.ask(
        "[...document.querySelectorAll('#entries tr')].slice(1).map(r => [...r.cells].map(c => c.innerText))"
    )
    first = plain(file.read_text())[0]["example"]  # its layer and head are those that the page begins with
    weights = visible_weights(insight(model, TOKENS), 8)[first["layer"], first["head"], 21]
    shares = [float(row[0].rstrip("%")) / 100 for row in rows]
    np.testing.assert_allclose(shares, np.sort(weights)[::-1][: len(rows)], atol=0.01)
    assert len(rows) == 8 and "Token 21" in said and "null sink" in said
    assert all(int(row[1]) + int(row[2]) == 21 for row in rows) and {row[3] for row in rows} == {"cache", "block"}
    tinted = "[...document.querySelectorAll('#text span')].filter(s => s.style.getPropertyValue('--level') > 0).length"
    assert 5 < window.ask(tinted) <= 3 + 6  # the cache's three and the block's six
    assert window.ask("location.hash") == f"#token=21&layer={first['layer']}&head={first['head']}" and not window.failed


def test_the_page_is_used_by_keys_alone(window, file):
    window.open(file)
    window.ask("document.querySelector('#text span').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        window.press(key)
    assert window.ask("document.querySelector('.chosen').dataset.token") == "1"
    assert window.ask("document.activeElement.dataset.token") == "1"
    window.press("ArrowDown")
    assert int(window.ask("document.querySelector('.chosen').dataset.token")) > 1
    window.press("Escape")
    assert window.ask("document.querySelector('.chosen')") is None and not window.failed


def test_another_head_and_a_link_show_another_read(window, file):
    window.open(file, "#token=30&layer=1&head=1")
    assert window.ask("document.getElementById('layer').value + document.getElementById('head').value") == "11"
    first = window.ask("document.getElementById('entries').innerText")
    window.ask("(e => { e.value = 0; e.dispatchEvent(new Event('change')) })(document.getElementById('head'))")
    assert window.ask("document.getElementById('entries').innerText") != first
    window.click("#clear")
    window.click("#example")
    chosen = plain(file.read_text())[0]["example"]
    assert window.ask("document.querySelector('.chosen').dataset.token") == str(chosen["token"])
    assert window.ask("document.getElementById('layer').value") == str(chosen["layer"]) and not window.failed


def test_another_text_is_one_choice_away_and_has_a_link(window, file):
    window.open(file)
    assert window.ask("document.getElementById('name').innerText") == "odd<name>.py"
    assert "A <b>text</b>." in window.ask("document.getElementById('about').innerText")
    window.ask("(e => { e.value = 1; e.dispatchEvent(new Event('change')) })(document.getElementById('shown'))")
    assert window.ask("document.getElementById('name').innerText") == "other"
    assert window.ask("[...document.querySelectorAll('#text .marked')].map(s => s.dataset.token)") == ["3", "7"]
    window.click('span[data-token="9"]')
    first = plain(file.read_text())[1]["example"]
    assert window.ask("location.hash") == f"#text=1&token=9&layer={first['layer']}&head={first['head']}"
    window.open(file, "#text=1&token=9&layer=1&head=0")
    assert window.ask("document.querySelectorAll('#text span').length") == 12
    assert window.ask("document.querySelector('.chosen').dataset.token") == "9" and not window.failed


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False)])
def test_nothing_is_wider_than_the_window_and_text_is_readable(window, file, width, dark):
    window.open(file, "#token=30", width=width, dark=dark)
    assert window.ask("document.documentElement.scrollWidth <= innerWidth")
    page_colour, ink = (
        np.array([int(x) for x in re.findall(r"\d+", window.ask(f"getComputedStyle(document.body).{name}"))[:3]])
        for name in ("backgroundColor", "color")
    )
    assert (page_colour.mean() < 60 and ink.mean() > 180) if dark else (page_colour.mean() > 230 and ink.mean() < 70)
