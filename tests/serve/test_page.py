"""The page in a real browser, against a server that says what the test wrote: streams, versions, files, hostility, keys."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve.scripted import Scripted, scripted

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

HOSTILE = [
    '<img src=x onerror="window.hacked=1">', "<script>window.hacked=1</script>", "\n\n[click](javascript:window.hacked=1) ",
    "[data](data:text/html,<script>window.hacked=1</script>) ", "[ok](https://example.org/a_(b)?c=d) ",
    "![x](https://evil.example/x.png)\n\n", "```html\n<script>window.hacked=1</script>\n```\n",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>", '<a href="javascript:hacked=1">a</a>',
]  # fmt: skip


@pytest.fixture
def script() -> Iterator[Scripted]:
    with scripted() as server:
        yield server


@pytest.fixture
def open_page(browser: Any, script: Scripted) -> Iterator[Any]:
    """Opens the page in a fresh profile; at the end, no error was thrown and nobody else was asked for anything."""
    contexts, wrong = [], []

    def opened(url: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"locale": "en-US", **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        home = url or script.url
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: None if request.url.startswith((home, "blob:")) else wrong.append(request.url),
        )
        page.goto(home)
        expect(page.locator("#model option").first).to_be_attached()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(open_page: Any) -> Any:
    return open_page()


def say(page: Any, text: str = "Hi", wait: bool = True) -> None:
    page.locator("#composer-text").fill(text)
    page.locator("#composer-text").press("Enter")
    if wait:
        written(page)


def written(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible()


def another(page: Any) -> None:
    page.get_by_role("button", name="Write another version").click()
    written(page)


def answers(page: Any) -> Any:
    return page.locator(".turn:not(.mine) .body")


def exported(page: Any, name: str) -> str:
    page.locator("#data").click()
    with page.expect_download() as download:
        page.locator(f"#export-{name}").click()
    page.keyboard.press("Escape")
    return Path(download.value.path()).read_text()


# ---- streaming


def test_text_appears_while_it_is_written_and_is_announced_once_it_is_finished(page, script):
    script.answers, script.holds = [["**Hel", "lo**", " there", ", *you*."]], (2,)
    say(page, wait=False)
    expect(answers(page)).to_have_text("Hello")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#live")).to_have_text("")
    script.gate.set()
    written(page)
    expect(answers(page)).to_have_text("Hello there, you.")
    expect(answers(page).locator("strong")).to_have_text("Hello")
    expect(answers(page).locator("em")).to_have_text("you")
    expect(page.locator("#live")).to_have_text("Answer finished: **Hello** there, *you*.")
    expect(page.locator(".status")).to_contain_text("tokens/s")
    (asked,) = script.asked("/v1/chat/completions")
    assert (asked["messages"], asked["model"]) == ([{"role": "user", "content": "Hi"}], "one")
    assert (asked["temperature"], asked["stream"], asked["return_token_ids"]) == (0.8, True, True)


def test_stop_keeps_what_came_and_go_on_continues_exactly_there(page, script):
    script.answers, script.holds = [["One", " two", " three"]], (2,)
    say(page, wait=False)
    expect(answers(page)).to_have_text("One two")
    page.keyboard.press("Escape")
    written(page)
    expect(answers(page)).to_have_text("One two")
    expect(page.locator(".status")).to_contain_text("Stopped.")
    script.holds, script.answers = (), [[" and", " more"]]
    page.get_by_role("button", name="Go on").click()
    expect(answers(page)).to_have_text("One two and more")
    (asked,) = script.asked("/v1/completions")
    assert [script.words[number] for number in asked["prompt"]][-2:] == ["One", " two"]


def test_free_text_goes_on_and_takes_words_in_between(page, script):
    page.get_by_role("radio", name="Free text").click()
    script.answers = [[" a", " time"], [" there", " was"], [" a", " cat"]]
    say(page, "Once upon")
    expect(page.locator(".flow")).to_have_text("Once upon a time")
    page.get_by_role("button", name="Go on").click()
    expect(page.locator(".flow")).to_have_text("Once upon a time there was")
    say(page, ", in Rome,")
    expect(page.locator(".flow").last).to_have_text(", in Rome, a cat")
    first, second, third = script.asked("/v1/completions")
    assert (first["prompt"], third["prompt"]) == ("Once upon", "Once upon a time there was, in Rome,")
    assert [script.words[number] for number in second["prompt"]][-2:] == [" a", " time"]


def test_a_long_answer_grows_without_being_rebuilt_and_one_can_type_meanwhile(page, script):
    pieces = [f"word{number} " + ("\n\n" if number % 50 == 49 else "") for number in range(1400)]
    script.answers, script.holds = [pieces], (700, 1300)
    say(page, wait=False)
    expect(answers(page)).to_contain_text("word699")
    answers(page).locator("p").first.evaluate("element => { element.dataset.mark = 'same' }")
    page.locator("#composer-text").press_sequentially("typed meanwhile", delay=0)
    expect(page.locator("#composer-text")).to_have_value("typed meanwhile")
    script.gate.set()
    expect(answers(page)).to_contain_text("word1299")
    expect(answers(page).locator("p").first).to_have_attribute("data-mark", "same")
    script.gate.set()
    written(page)
    assert len(answers(page).inner_text()) > 10_000
    assert answers(page).locator("p").count() == 28
    page.locator("#see").click()
    expect(answers(page).locator(".token")).to_have_count(1400)


def test_chinese_emoji_and_joined_characters(page, script):
    text = "你好，世界。👨‍👩‍👧‍👦 naïve e\u0301 🇫🇷 **猫**坐着"
    script.answers = [[*text]]  # one code point each, so that families come in parts
    say(page, "猫 🐈")
    expect(answers(page)).to_have_text(text.replace("**", ""))
    expect(answers(page).locator("strong")).to_have_text("猫")
    assert script.asked("/v1/chat/completions")[0]["messages"][0]["content"] == "猫 🐈"


# ---- versions


def test_edit_again_and_back_lose_nothing(page, script):
    script.answers = [["first"], ["second"], ["third"]]
    say(page, "Hi")
    another(page)
    expect(answers(page)).to_have_text("second")
    expect(page.locator(".versions")).to_have_text("2/2")
    page.get_by_role("button", name="Edit").first.click()
    page.locator(".editor textarea").fill("Hi, you")
    page.get_by_role("button", name="Send the edited words").click()
    expect(answers(page)).to_have_text("third")
    expect(page.locator(".mine .versions")).to_have_text("2/2")
    page.locator(".mine").hover()
    page.locator(".mine").get_by_role("button", name="Earlier version").click()
    expect(page.locator(".mine .body")).to_have_text("Hi")
    expect(answers(page)).to_have_text("second")
    page.get_by_role("button", name="Earlier version").last.click()
    expect(answers(page)).to_have_text("first")
    page.reload()
    page.locator("#conversations button").first.click()
    expect(answers(page)).to_have_text("first")
    expect(page.locator(".versions").first).to_have_text("1/2")


def test_an_alternative_begins_a_new_version_there(page, script):
    script.answers = [["The", " cat", " sat"], [" ran"]]
    say(page)
    page.locator("#see").click()
    expect(answers(page).locator(".token")).to_have_count(3)
    answers(page).locator(".token", has_text="cat").click()
    expect(page.locator("#panel h2")).to_have_text("·cat")
    page.get_by_role("button", name="Go on with ·dog instead").click()
    expect(answers(page)).to_have_text("The dog ran")
    expect(page.locator(".turn:not(.mine) .versions")).to_have_text("2/2")
    (asked,) = script.asked("/v1/completions")
    assert [script.words[number] for number in asked["prompt"]][-2:] == ["The", " dog"]
    assert len(asked["prompt"]) == len(script.asked("/v1/explain")[0]["token_ids"]) - 1


def test_two_models_side_by_side_make_a_preference(page, script):
    script.answers = [["left"], ["right"]]
    page.locator("#second").select_option("two")
    say(page)
    expect(page.locator(".answer")).to_have_count(2)
    assert sorted(body["model"] for body in script.asked("/v1/chat/completions")) == ["one", "two"]
    better = page.locator(".answer", has_text="right")
    better.get_by_role("button", name="This one is better").click()
    expect(better.get_by_role("button", name="Preferred")).to_be_visible()
    (pair,) = [json.loads(line) for line in exported(page, "preferences").splitlines()]
    assert pair["prompt"] == [{"role": "user", "content": "Hi"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "right"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "left"}]
    script.answers = [["later"]]
    say(page, "Go on")
    assert script.asked("/v1/chat/completions")[-1]["messages"][1]["content"] == "right"


def test_thumbs_make_pairs_of_versions(page, script):
    script.answers = [["good"], ["bad"], ["unrated"]]
    say(page)
    page.get_by_role("button", name="Good answer").click()
    another(page)
    expect(answers(page)).to_have_text("bad")
    page.get_by_role("button", name="Bad answer").click()
    another(page)
    expect(answers(page)).to_have_text("unrated")
    (pair,) = [json.loads(line) for line in exported(page, "preferences").splitlines()]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("good", "bad")
    (line,) = [json.loads(line) for line in exported(page, "training").splitlines()]
    assert [message["content"] for message in line["messages"]] == ["Hi", "unrated"]


# ---- what goes wrong


def test_hostile_output_runs_nothing(page, script):
    script.answers = [HOSTILE]
    say(page, '<img src=x onerror="window.hacked=1">')
    for see in (False, True):
        if see:
            page.locator("#see").click()
            expect(answers(page).locator(".token").first).to_be_visible()
        expect(page.locator("#transcript").locator("img, script, iframe")).to_have_count(0)
        assert page.evaluate("() => window.hacked") is None
        assert "<script>window.hacked=1</script>" in answers(page).inner_text()
    page.locator("#see").click()
    links = answers(page).locator("a")
    addresses = [link.get_attribute("href") for link in links.all()]
    assert addresses == ["https://example.org/a_(b)?c=d", "https://evil.example/x.png"]
    assert all("noopener" in link.get_attribute("rel") for link in links.all())
    answers(page).locator("pre").click()
    assert page.evaluate("() => window.hacked") is None


def test_a_server_that_dies_mid_answer_loses_nothing(page, script):
    script.answers, script.holds, script.die_after = [["Half", " an", " answer"]], (2,), 2
    say(page, "My words", wait=False)
    expect(answers(page)).to_have_text("Half an")  # what a browser has not yet read dies with the connection
    script.gate.set()
    written(page)
    expect(page.locator(".trouble")).to_contain_text("What was written is kept.")
    expect(answers(page)).to_have_text("Half an")
    page.reload()
    page.locator("#conversations button").first.click()
    expect(page.locator(".mine .body")).to_have_text("My words")
    expect(answers(page)).to_have_text("Half an")
    script.die_after, script.holds, script.answers = None, (), [[" answer", "."]]
    page.locator(".trouble button").click()
    expect(answers(page)).to_have_text("Half an answer.")
    expect(page.locator(".trouble")).to_have_count(0)


def test_a_server_that_does_not_answer_can_be_asked_again(page, script):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page)
    expect(page.locator(".trouble")).to_contain_text("The server does not answer.")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("Hello there.")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=400, json={"error": {"message": "too long <b>"}}),
    )
    say(page)
    expect(page.locator(".trouble")).to_contain_text("The server says: too long <b>")


def test_a_key_is_asked_for_and_stays_in_the_tab(browser, script, open_page):
    script.key = "a long secret"
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    page.goto(script.url)
    page.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("dialog .trouble")).to_have_text("The server does not accept this key.")
    page.get_by_label("Key", exact=True).fill("a long secret")
    page.keyboard.press("Enter")
    expect(page.locator("dialog[open]")).to_have_count(0)  # the key is tried first
    say(page)
    expect(answers(page)).to_have_text("Hello there.")
    assert page.evaluate("() => JSON.stringify({...localStorage})").find("secret") == -1
    context.close()


# ---- files


def test_export_and_import_are_a_round_trip(page, open_page, script, tmp_path):
    script.answers = [["first"], ["second 猫🙂"]]
    say(page)
    another(page)
    expect(answers(page)).to_have_text("second 猫🙂")
    text = exported(page, "conversations")
    (tmp_path / "kept.json").write_text(text)
    other = open_page()
    other.locator("#data").click()
    other.locator("#import-file").set_input_files(tmp_path / "kept.json")
    expect(other.locator("dialog [role=status]")).to_have_text("1 conversations came in.")
    other.keyboard.press("Escape")
    other.locator("#conversations button").first.click()
    expect(answers(other)).to_have_text("second 猫🙂")
    expect(other.locator(".versions")).to_have_text("2/2")
    again = json.loads(exported(other, "conversations"))
    assert again == json.loads(text)
    other.locator("#data").click()
    other.locator("#import-file").set_input_files(tmp_path / "kept.json")
    expect(other.locator("dialog [role=status]")).to_have_text("0 conversations came in.")


def test_a_strangers_file_is_cleaned_or_refused(page, tmp_path):
    def node(**facts: Any) -> dict[str, Any]:
        return {"role": "assistant", "text": "x", "children": [], **facts}

    nodes = {
        "root": node(children=["a", "a", "missing", "__proto__", 5]),
        "a": node(
            text={"toString": "no"},
            children=["root", "a", "b"],
            ids="<script>",
            promptIds=[1, "2"],
            rating="many",
        ),
        "b": node(role="user", text="<img src=x onerror=window.hacked=1>", children=["a"], error={"x": 1}),
    }
    files = {
        "not.json": "{", "other.json": '{"format": "x"}',
        "odd.json": json.dumps({"format": "glasshouse-conversations", "version": 1, "conversations": [
            None, 5, {"nodes": 3}, {"id": 7, "title": "<b>odd</b>", "mode": "chat", "nodes": nodes, "chosen": {"root": "z"}},
        ]}),
    }  # fmt: skip
    page.locator("#data").click()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        page.locator("#import-file").set_input_files(tmp_path / name)
        said = (
            "1 conversations came in." if name == "odd.json" else "This is no file of exported conversations."
        )
        expect(page.locator("dialog [role=status]")).to_have_text(said)
    page.keyboard.press("Escape")
    page.locator("#conversations button", has_text="<b>odd</b>").click()
    expect(page.locator(".mine .body")).to_have_text("<img src=x onerror=window.hacked=1>")
    assert page.evaluate("() => window.hacked") is None


# ---- everyone


def test_dark_mode_follows_the_system_until_it_is_chosen(open_page):
    def lightness(page: Any) -> int:
        return int(
            re.findall(r"\d+", page.evaluate("() => getComputedStyle(document.body).backgroundColor"))[0]
        )

    page = open_page(color_scheme="dark")
    assert lightness(page) < 60
    page.locator("#theme").click()
    assert lightness(page) > 200
    page.reload()
    expect(page.locator("#model option").first).to_be_attached()
    assert lightness(page) > 200
    assert lightness(open_page(color_scheme="light")) > 200


def test_chinese_from_the_browser_and_back(open_page):
    page = open_page(locale="zh-CN")
    expect(page.locator("html")).to_have_attribute("lang", "zh-Hans")
    expect(page.get_by_role("button", name="透视")).to_be_visible()
    say(page)
    expect(page.locator(".status")).to_contain_text("词元/秒")
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="See through")).to_be_visible()
    expect(page.locator(".status")).to_contain_text("tokens/s")


def test_a_phone_never_scrolls_sideways(open_page, script):
    page = open_page(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)

    def fits() -> None:
        assert page.evaluate("() => [document.documentElement.scrollWidth, document.body.scrollWidth]") == [
            390,
            390,
        ]

    fits()
    script.answers = [["x" * 300, "\n\n```\n" + "long line " * 40 + "\n```\n", "| a | b |\n", "猫" * 200]]
    say(page, "y" * 300)
    fits()
    page.locator("#see").tap()
    answers(page).locator(".token").last.tap()
    expect(page.locator("#panel")).to_be_visible()
    for tab in ("layers", "attention", "chances"):
        page.locator(f"#tab-{tab}").tap()
        fits()
    page.get_by_role("button", name="Close").last.tap()
    page.locator("#open-sidebar").tap()
    fits()
    expect(page.locator("#new")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#new")).not_to_be_in_viewport()


def test_the_keyboard_reaches_everything(page, script):
    script.answers = [["The", " cat", " sat"]]
    page.keyboard.press("/")
    page.keyboard.type("Hi")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Enter")
    written(page)
    assert script.asked("/v1/chat/completions")[0]["messages"][0]["content"] == "Hi\nyou"
    page.locator("#transcript").focus()
    page.keyboard.press("s")
    expect(answers(page).locator(".token")).to_have_count(3)
    for _ in range(20):  # Tab comes to the text, whatever else stands before it
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.classList.contains('token')"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#panel")).to_be_visible()
    expect(page.locator("#tab-chances")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-layers")).to_have_attribute("aria-selected", "true")
    before = page.locator("#panel h2").inner_text()
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel h2")).not_to_have_text(before)
    expect(page.locator(".token.open")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#panel h2")).to_have_text(before)
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Keyboard")
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    expect(page.locator("#composer-text")).to_be_focused()
    expect(page.locator(".welcome")).to_be_visible()


def test_sampling_settings_are_what_is_asked_for_and_are_kept(page, script):
    page.locator("#sampling").click()
    for name, value in {"temperature": "0", "top_k": "7", "max_tokens": "33", "seed": "5"}.items():
        page.locator(f"#field-{name}").fill(value)
    page.locator("#field-stops").fill("END\n\n.")
    page.locator("#field-system").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    say(page)
    asked = script.asked("/v1/chat/completions")[0]
    assert {name: asked[name] for name in ("temperature", "top_k", "max_tokens", "seed")} == {
        "temperature": 0, "top_k": 7, "max_tokens": 33, "seed": 5,
    }  # fmt: skip
    assert (asked["stop"], asked["messages"][0]) == (["END", "."], {"role": "system", "content": "Be brief."})
    page.reload()
    page.locator("#sampling").click()
    expect(page.locator("#field-top_k")).to_have_value("7")


def test_a_base_model_begins_with_free_text_and_says_why(open_page, script):
    script.models = [{"id": "base", "capabilities": {"generate": True, "chat": True, "instructed": False}}]
    page = open_page()
    expect(page.get_by_role("radio", name="Free text")).to_have_attribute("aria-checked", "true")
    expect(page.locator("#why")).to_have_text("This model continues text; it was not taught to answer.")
    page.locator(".examples button").nth(1).click()
    expect(page.locator(".flow")).to_have_text("Once upon a time there was a little Hello there.")
