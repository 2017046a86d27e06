"""See-through mode from end to end: a real browser, the real server, and a model that knows some lines by heart."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import COUNT, CPU, GREETING, Live, running

from glasshouse.serve.models import open_models

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
POLICY = "default-src 'self'"


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    """The page with an answer of the model, greedy, opened in see-through mode."""
    context = browser.new_context(locale="en-US")
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda request: None if request.url.startswith(live.url) else wrong.append(request.url)
    )
    answer = page.goto(live.url)
    assert answer.headers["content-security-policy"].startswith(POLICY)
    expect(page.locator("#model option").first).to_be_attached()
    page.locator("#sampling").click()
    page.locator("#field-temperature").fill("0")
    page.keyboard.press("Escape")
    page.locator("#mode-chat").click()
    page.locator("#see").click()
    yield page
    context.close()
    assert wrong == []


def say(page: Any, text: str) -> None:
    page.locator("#composer-text").fill(text)
    page.locator("#composer-text").press("Enter")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".turn:not(.mine) .token:not(.live)").first).to_be_visible()


def explanation(live: Live, said: str, written: str, **asked: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": written}]
    return live.ask("/v1/explain", messages=messages, **asked)


def answer(page: Any) -> Any:
    return page.locator(".turn:not(.mine) .body")


def test_every_word_of_question_and_answer_can_be_opened(page, live):
    say(page, "count")
    assert answer(page).inner_text() == COUNT
    expect(page.locator(".mine .token").first).to_be_visible()
    expected = explanation(live, "count", COUNT)["tokens"]
    shown = "".join(page.locator(".turn:not(.mine) .token").all_text_contents())
    assert shown == COUNT
    page.locator(".turn:not(.mine) .token").nth(3).click()
    first = len(live.ask("/tokenize", messages=[{"role": "user", "content": "count"}])["tokens"])
    token = expected[first + 3]
    expect(page.locator("#panel h2")).to_have_text(token["text"].replace(" ", "·"))
    rows = page.locator("#panel .choice")
    assert rows.count() == 8
    assert rows.first.locator(".label").inner_text() == token["alternatives"][0]["text"].replace(" ", "·")
    expect(page.locator("#panel .choice.own .number")).to_have_text("> 99.9 %" if token["probability"] > 0.9995 else
                                                                    f"{round(token['probability'] * 100)} %")  # fmt: skip
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel h2")).to_have_text(expected[first + 4]["text"].replace(" ", "·"))
    bars = page.locator("#panel .spark path").first.get_attribute("d")
    assert bars.count("M") >= len(expected) - 2  # the marks that end a turn may be on one side only


def test_another_word_goes_on_from_there_as_a_new_version(page):
    say(page, "count")
    tokens = page.locator(".turn:not(.mine) .token")
    kept = "".join(tokens.all_text_contents()[:4])
    tokens.nth(4).click()
    others = page.locator("#panel button.choice .label").all_inner_texts()
    place, label = next(
        (number, text) for number, text in enumerate(others) if text.isascii() and "<" not in text
    )
    page.locator("#panel button.choice").nth(place).click()
    expect(page.locator(".turn:not(.mine) .versions")).to_have_text("2/2")
    expect(page.locator("#send")).to_be_visible()
    written = answer(page).text_content()
    assert written.startswith(kept + label)
    assert not COUNT.startswith(kept + label)
    expect(page.locator(".turn:not(.mine) .token:not(.live)").first).to_be_visible()
    assert "".join(tokens.all_text_contents()) == written
    page.locator(".turn:not(.mine)").get_by_role("button", name="Earlier version").click()
    expect(answer(page)).to_have_text(COUNT)


def test_layers_show_what_each_would_have_said_and_where_the_word_first_leads(page, live):
    say(page, "count")
    page.locator(".turn:not(.mine) .token").nth(5).click()
    page.locator("#tab-layers").click()
    rows = page.locator("#panel .layers li")
    expect(rows).to_have_count(3)  # the embedding and two layers
    word = page.locator("#panel h2").inner_text()
    assert rows.last.locator(".label").inner_text() == word
    expect(page.locator("#panel .layers li.first")).to_have_count(1)
    expect(page.locator("#panel .layers .leads")).to_contain_text("leads")
    page.locator("#panel-next").click()
    expect(rows.last.locator(".label")).to_have_text(page.locator("#panel h2").inner_text())


def test_attention_shades_only_what_came_before(page, live):
    say(page, "count")
    tokens = page.locator("#transcript .token")
    page.locator(".turn:not(.mine) .token").nth(6).click()
    page.locator("#tab-attention").click()
    expect(page.locator("#panel .looked li").first).to_be_visible()
    classes = [token.get_attribute("class").split() for token in tokens.all()]
    here = next(place for place, names in enumerate(classes) if "open" in names)
    weights = [
        next((int(name[1]) for name in names if name[0] == "a" and name[1:].isdigit()), 0)
        for names in classes
    ]
    assert max(weights[:here]) == 5
    assert max(weights[here:]) == 0
    expect(page.locator("#legend")).to_contain_text("looked here most")
    everywhere = page.locator("#panel .looked .number").all_text_contents()
    page.locator("#pick-layer").select_option("1")
    page.locator("#pick-head").select_option("2")
    assert page.locator("#panel .looked .number").all_text_contents() != everywhere
    page.locator("#panel .looked button").first.click()
    now = page.locator("#transcript .token.open")
    assert now.count() <= 1  # it may be a mark of the template, which the text does not show
    page.locator("#tab-chances").click()
    expect(page.locator("#legend")).to_contain_text("it was surprised")


def test_characters_of_several_tokens_are_one_place_with_a_step_for_each(page, live):
    say(page, "hello")
    assert answer(page).text_content() == GREETING
    tokens = page.locator(".turn:not(.mine) .token")
    ids = live.ask("/tokenize", prompt=GREETING, add_special_tokens=False)["tokens"]
    assert tokens.count() < len(ids)
    tokens.first.click()
    seen = []
    for _ in range(len(ids)):
        seen.append(page.locator("#panel h2").inner_text())
        page.keyboard.press("ArrowRight")
    assert len(seen) == len(ids)
    assert "▯" in seen
    tokens.first.click()
    expect(page.locator("#panel .word p")).not_to_contain_text("Part")
    tokens.filter(has_text="👋").click()
    expect(page.locator("#panel .word p")).to_contain_text("of this character")


def test_the_same_text_is_asked_for_once(page, live):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.post_data) if "explain" in request.url else None)
    say(page, "count")
    page.locator(".turn:not(.mine) .token").nth(4).click()
    page.locator("#tab-layers").click()
    expect(page.locator("#panel .layers li")).to_have_count(3)
    for _ in range(2):
        page.keyboard.press("Escape")
        page.locator(".turn:not(.mine) .token").nth(4).click()
        expect(page.locator("#panel .layers li")).to_have_count(3)
    page.locator("#see").click()
    page.locator("#see").click()
    page.locator(".turn:not(.mine) .token").nth(4).click()
    expect(page.locator("#panel .layers li")).to_have_count(3)
    assert len(asked) == len(set(asked))


def test_everything_one_can_press_has_a_name(page):
    say(page, "count")
    page.locator(".turn:not(.mine) .token").first.click()
    for button in page.locator("button:visible, select:visible, textarea:visible").all():
        name = button.evaluate(
            "e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim()"
        )
        assert name, button.evaluate("e => e.outerHTML")


def test_only_a_run_that_was_pretrained_and_no_more_is_said_to_be_a_base_model(
    model_folder: Path, tmp_path: Path
):
    folder = tmp_path / "run" / "model"
    shutil.copytree(model_folder, folder)
    assert open_models([f"one={folder}"], CPU)["one"].description()["capabilities"]["instructed"]
    for stage, instructed in (("pretrain", False), ("finetune", True)):
        (folder.parent / "run.json").write_text(json.dumps({"stage": stage}))
        served = open_models([f"one={folder}"], CPU)["one"]
        assert served.description()["capabilities"]["instructed"] == instructed


def test_the_page_of_a_server_with_a_key(browser, model_folder: Path):
    with running(model_folder, key="a-long-secret") as server:
        context = browser.new_context(http_credentials={"username": "any", "password": "a-long-secret"})
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#model option").first).to_be_attached()
        page.locator("#composer-text").fill("Once")
        page.locator("#composer-text").press("Enter")
        expect(page.locator("#transcript .status").last).to_contain_text("tokens/s")
        context.close()
