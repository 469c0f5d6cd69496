"""The playground, and a page of another origin, in a real browser, on a real llama.cpp: `make test-browser`."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("playwright", reason="`make test-browser` installs a driver of browsers")

from playwright import sync_api as playwright
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route

from tests.llama_proxy import KEY, MODEL, llama_proxy
from tests.loopback import Server
from tests.patience import PATIENCE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
IDLE = "#send:not([disabled])"
CALL = """async ([url, key, model]) => {
  const answer = await fetch(url + "/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", authorization: "Bearer " + key },
    body: JSON.stringify({ model, max_tokens: 4, stream: true, messages: [{ role: "user", content: "hello" }] }),
  });
  return [answer.status, answer.headers.get("x-idp-prompt"), await answer.text()];
}"""


@pytest.fixture(scope="module")
def other_page():
    """A page of another origin."""

    async def page(_request):
        return HTMLResponse("<!doctype html><title>other</title>")

    with Server(Starlette(routes=[Route("/", page)])) as server:
        yield server.url


@pytest.fixture(scope="module")
def url(tmp_path_factory, other_page):
    folder = tmp_path_factory.mktemp("browser")
    with llama_proxy(folder, playground=True, allow_origins=(other_page,)) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """The playground, with its token, and a list of what the browser complains of."""
    context = browser.new_context()
    context.set_default_timeout(1000 * PATIENCE)
    page = context.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    page.on(
        "request",
        lambda request: (
            page.complaints.append(request.url) if not request.url.startswith(url.removesuffix("/v1")) else None
        ),
    )
    page.goto(f"{url.removesuffix('/v1')}/playground")
    page.wait_for_selector("#forced option:nth-child(2)", state="attached")
    page.fill("#key", KEY)
    page.fill("#tokens", "4")
    yield page
    context.close()


def say(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector(f"#with .turn.user:has-text({text!r})")
    page.wait_for_selector(IDLE)


def turns(page, side: str, role: str) -> list[str]:
    return page.locator(f"#{side} .turn.{role}").all_text_contents()


def test_a_chat_of_two_turns_beside_the_same_without_a_prompt(page):
    say(page, "hello")
    chosen = page.text_content("#choice")
    assert "chosen by the text" in chosen
    scores = page.locator("#scores .score").all_text_contents()
    assert len(scores) == page.locator("#forced option").count() - 1
    assert page.locator("#scores .score.chosen").count() == 1
    say(page, "there")
    assert page.text_content("#choice") == chosen, "a chat keeps its prompt"
    for side in ("with", "without"):
        assert turns(page, side, "user") == ["hello", "there"]
        assert len(turns(page, side, "assistant")) == 2
        assert all(turns(page, side, "assistant"))
        assert not turns(page, side, "error")
    assert page.complaints == []


def test_another_prompt_can_be_forced_and_a_new_chat_begun(page):
    for number in range(page.locator("#forced option").count() - 1):
        page.select_option("#forced", str(number))
        page.click("#new")
        say(page, "hello")
        name = page.locator("#forced option").nth(number + 1).text_content()
        assert page.text_content("#choice") == f"Prompt: {name} (forced)."
        assert turns(page, "with", "user") == ["hello"]
    assert page.complaints == []


def test_text_is_never_markup(page):
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    page.fill("#text", text)
    page.click("#send")
    page.wait_for_selector("#with .turn.user")
    page.wait_for_selector(IDLE)
    assert turns(page, "with", "user") == [text]
    assert page.locator(".turn *").count() == 0


def test_an_error_is_said_in_words(page):
    page.fill("#key", "wrong")
    say(page, "hello")
    for side in ("with", "without"):
        assert turns(page, side, "error") == ["No answer: the bearer token is missing or wrong"]
        assert not turns(page, side, "assistant")
    page.fill("#key", KEY)
    page.click("#new")
    say(page, "hello")
    assert all(turns(page, "with", "assistant"))


def test_a_page_of_an_allowed_origin_reads_streams_and_the_prompt(browser, url, other_page):
    context = browser.new_context()
    page = context.new_page()
    page.goto(other_page)
    status, prompt, text = page.evaluate(CALL, [url, KEY, MODEL])
    assert status == 200
    assert int(prompt) >= 0
    assert text.rstrip().endswith("data: [DONE]")
    page.goto(other_page.replace("127.0.0.1", "localhost"))  # another origin, which is not allowed
    with pytest.raises(playwright.Error, match="Failed to fetch"):
        page.evaluate(CALL, [url, KEY, MODEL])
    context.close()
